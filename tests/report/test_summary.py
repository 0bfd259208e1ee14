"""What a model costs: against published numbers, and against what JAX would run and keep."""

import re

import jax
import pytest
import tiny

from vnca.program.runs import open_run
from vnca.report.compile import Core, lowered_update, memory_of
from vnca.report.summary import summary, training_memory

# By hand: the encoder's kernels of 5×5 on 32×32 … 2×2 cells, and its linear map.
CONVOLUTIONS = 25 * (32**2 * 1 * 32 + 16**2 * 32 * 64 * 4)
PUBLISHED = {  # parameters; multiply-adds of the encoder and the decoder; GFLOP of an update
    # The decoder's cells, 2×2 … 32×32, take eight steps each.
    "doubling": (6_585_088, CONVOLUTIONS + 2048 * 512, 10_912 * 1_179_648, 2482),
    "nondoubling": (5_042_432, CONVOLUTIONS + 2048 * 256, 36 * 32**2 * 10 * 128**2, 6226),
    # A linear map, and kernels of 5×5 on 2×2 … 16×16 cells; the last one draws 28×28 cells alone.
    "baseline": (
        10_282_497,
        CONVOLUTIONS + 2048 * 512,
        256 * 2048 + 25 * (2**2 * 512 * 256 * 4 + 28**2 * 32),
        20.7,
    ),
}


def summarized(config, workdir, capsys, **flags):
    """What the mode prints: {name: number} of each of its tables."""
    summary(open_run(config, workdir, "summary", **flags))
    tables = capsys.readouterr().out.replace(",", "").strip().split("\n\n")
    return [
        {name: int(n) for name, n in re.findall(r"(?m)^(.*?)  +(\d+)$", table)} for table in tables
    ]


def bytes_of(config, workdir, devices=1, **flags):
    """The bytes of each part, in their order, of training on so many devices."""
    run = open_run(config, workdir, "summary", **flags)
    return [*training_memory(run.learner, run.config, devices).values()]


# ---- What the mode prints; test_operations.py counts every operation ----------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_array_and_the_cost_of_both_parts_are_printed_with_the_sums(name, tmp_path, capsys):
    config = tiny.committed(name)
    arrays, costs, memory = summarized(config, tmp_path, capsys)
    count, encoder, decoder, gflop = PUBLISHED[name]
    assert arrays.pop("together") == sum(arrays.values()) == count
    assert arrays["encoder/conv0/kernel [5 5 1 32]"] == 5 * 5 * 32
    assert costs.pop("encoder") == encoder
    assert costs.pop("decoder") == decoder
    assert costs.pop("together") == encoder + decoder
    flop = costs.pop(f"FLOP of an update of {config.train.batch_size} images forward and backward")
    assert flop / 1e9 == pytest.approx(gflop, abs=0.05 if gflop < 100 else 0.5)
    if name == "nondoubling":  # the mean of T = 32…63, rounded up; as published
        in_training = costs.pop("together at T = 48 the mean in training with a pool")
        assert in_training == encoder + decoder // 36 * 48
        assert round(in_training / 1e9, 1) == 8.1
    assert not costs
    parameters, moments, *_ = memory.values()
    assert parameters == 4 * count == moments / 2


# ---- Memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this is of JAX 0.10: 0.12 takes less")
@pytest.mark.slow  # each compiles for 4 to 6 seconds
@pytest.mark.parametrize("name", ["baseline", "doubling", "nondoubling"])
def test_the_memory_is_about_what_xla_allocates(name, tmp_path):
    config = tiny.config(name, model__latent_size=16, model__encoder_width=8)
    run = open_run(config, tmp_path, "summary", plain=True)
    memory = sum(training_memory(run.learner, run.config, 1).values())
    lowered = lowered_update(run.learner, run.config, jax.devices()[:1], 60_000)
    allocated = memory_of(lowered.compile().memory_analysis(), Core())["memory_bytes"]
    assert 0.8 * allocated < memory < 1.3 * allocated


@pytest.mark.slow  # traces three updates, for 3 seconds
def test_the_memory_grows_with_the_micro_batch_and_is_that_of_the_form_in_use(tmp_path):
    config = tiny.committed("quickstart")
    fast, plain = (bytes_of(config, tmp_path, plain=plain)[-1] for plain in (False, True))
    assert fast < 0.7 * plain  # the plain ELU keeps its input, too
    config.train.micro_batch = 4  # in place of 2
    assert 1.6 * plain < bytes_of(config, tmp_path, plain=True)[-1] < 2 * plain


def test_the_pool_is_split_over_the_devices(tmp_path):
    config = tiny.committed("nondoubling")  # 1,024 rows of 512 KiB and an index
    _, _, pool, _, rest = bytes_of(config, tmp_path, devices=8)
    assert pool == 1024 * (4 * 32 * 32 * 128 + 4) // 8
    assert rest > 128 * 4 * 32 * 32 * 128  # 128 rows are put back on each device, in full
