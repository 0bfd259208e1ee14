"""What a model costs: against published numbers, and against what JAX would run and keep."""

import re

import jax
import pytest
import tiny

from vnca.program import VncaError
from vnca.program.arithmetic import operations, update_flops
from vnca.program.method import make_model
from vnca.program.runs import open_run
from vnca.report.compile import Core, lowered_update, memory_of
from vnca.report.summary import summary, training_memory

PUBLISHED = {"doubling": 6_585_088, "nondoubling": 5_042_432, "baseline": 10_282_497}


def summarized(config, workdir, capsys, **flags):
    """What the mode prints: {name: number} of each of its tables."""
    summary(open_run(config, workdir, "summary", **flags))
    tables = capsys.readouterr().out.strip().split("\n\n")
    found = [re.findall(r"(?m)^(.*?)  +([\d,]+)$", table) for table in tables]
    return [{name: int(n.replace(",", "")) for name, n in table} for table in found]


def bytes_of(config, workdir, devices=1, **flags):
    """The bytes of each part, in their order, of training on so many devices."""
    run = open_run(config, workdir, "summary", **flags)
    return [*training_memory(run.method, run.config, devices).values()]


# ---- Arithmetic: against published numbers; test_operations.py counts every operation -----------


def decoder(name, *steps):
    counts = operations(tiny.committed(name).model, *steps)
    return sum(n for layer, n in counts.items() if layer.startswith("decoder"))


def test_the_models_cost_what_is_published():
    assert decoder("doubling") == 8 * (4 + 16 + 64 + 256 + 1024) * 1_179_648  # of a cell
    assert round(decoder("nondoubling", 1) / 1e6) == 168
    assert round(decoder("nondoubling", 48) / 1e9, 1) == 8.1
    updates = [round(update_flops(tiny.committed(name)) / 1e12, 2) for name in PUBLISHED]
    assert updates == [2.48, 6.23, 0.02]


# ---- What the mode prints ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_array_and_operation_is_printed_with_the_sums(name, tmp_path, capsys):
    config = tiny.committed(name)
    arrays, costs, memory = summarized(config, tmp_path, capsys)
    shapes = jax.eval_shape(make_model(config.model).init, jax.random.key(0))
    wanted = {
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(x.shape)}": x.size
        for path, x in jax.tree.leaves_with_path(shapes)
    }
    assert arrays == wanted | {"together": PUBLISHED[name]}
    counts = operations(config.model)
    assert costs.items() >= (counts | {"together": sum(counts.values())}).items()
    assert update_flops(config) in costs.values()
    if name == "nondoubling":  # the mean of T = 32…63, rounded up
        mean = sum(operations(config.model, 48).values())
        assert costs["together at T = 48, the mean in training"] == mean
    parameters, moments, *_, together = memory.values()
    assert parameters == 4 * PUBLISHED[name] == moments / 2
    assert together == sum(memory.values()) - together


def test_a_run_that_training_refuses_is_not_described(tmp_path):
    with pytest.raises(VncaError, match="config.train.batch_size"):
        open_run(tiny.config(train__batch_size=12), tmp_path, "summary")  # on eight devices


# ---- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["doubling", "baseline", "nondoubling"])
def test_the_memory_is_about_what_xla_allocates(name, tmp_path):
    config = tiny.config(name, model__latent_size=16, model__encoder_width=8)
    run = open_run(config, tmp_path, "summary", plain=True)
    memory = sum(training_memory(run.method, run.config, 1).values())
    lowered = lowered_update(run.method, run.config, jax.devices()[:1], 60_000)
    allocated = memory_of(lowered.compile().memory_analysis(), Core())["memory_bytes"]
    assert 0.8 * allocated < memory < 1.3 * allocated


def test_the_memory_grows_with_the_micro_batch_and_is_that_of_the_form_in_use(tmp_path):
    config = tiny.committed("quickstart")
    fast, plain = (bytes_of(config, tmp_path, plain=plain)[-1] for plain in (False, True))
    assert fast < 0.7 * plain  # the plain ELU keeps its input, too
    config.train.micro_batch = 4  # in place of 2
    assert 1.6 * plain < bytes_of(config, tmp_path, plain=True)[-1] < 2 * plain


def test_the_pool_is_split_over_the_devices(tmp_path):
    config = tiny.committed("nondoubling")  # 1,024 rows of 512 KiB and an index
    for devices in 1, 8:
        _, _, pool, _, rest = bytes_of(config, tmp_path, devices)
        assert pool == 1024 * (4 * 32 * 32 * 128 + 4) // devices
        # 128 rows are put back on each device, in full.
        assert rest > 128 * 4 * 32 * 32 * 128
