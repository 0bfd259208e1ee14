"""Promise 9: the same seed and config give the same bits on a machine, and the same numbers up to
rounding with other versions of JAX, environments and devices.

tests/test_training.py and tests/test_pool.py have the devices, the micro-batches and the grouping
of updates, and test_train.py the losses on record; here are the environment, and what is fitted to
the machine.
"""

import json
import os

import jax
import pytest
import tiny

from vnca.program import config, machine

# ---- Results -------------------------------------------------------------------------------------


def train(name, workdir, updates, **more):
    """The losses of a tiny model's first updates."""
    command = tiny.Command(
        f"--workdir={workdir}", name=name, before=tiny.NO_PICTURES, train__updates=updates, **more
    )
    with command as run:
        assert run.end() == 0, run.complained()
    return [record["loss"] for record in tiny.metrics(workdir)[0]]


OTHERS = {  # settings of JAX's that change results, or make the program's own steps errors
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_DISABLE_JIT": "1",
}


@pytest.mark.slow  # three processes that compile, for 10 seconds or more
@pytest.mark.parametrize("name", ["baseline", "doubling", "healing"])
def test_a_seed_gives_the_same_bits_whatever_jax_is_told_and_another_seed_gives_others(
    tmp_path, name
):
    one, again, other = (tmp_path / folder for folder in ("one", "again", "other"))
    losses = train(name, one, 2)
    assert losses == train(name, again, 2, environment=OTHERS)
    assert all(a != b for a, b in zip(losses, train(name, other, 2, seed=1), strict=True))
    for file in ("metrics.jsonl", "checkpoint_00000002.npz"):
        assert (one / file).read_bytes() == (again / file).read_bytes(), file


OWN_PROGRAM = """
import jax, numpy as np
from vnca.program import machine
machine.pin_settings()
x = jax.random.normal(jax.random.key(0), (2,)) @ np.full((2, 2), 1 / 3)
y = x + np.int8(1) * jax.numpy.ones((2, 2), "int16")
print(y.dtype, *map(float.hex, y.ravel().tolist()))
print(jax.make_jaxpr(jax.numpy.dot)(y, y))
"""


def test_a_program_of_ones_own_can_have_the_same_protection():
    with (
        tiny.Process("-c", OWN_PROGRAM) as plain,
        tiny.Process("-c", OWN_PROGRAM, **OTHERS) as other,
    ):
        assert plain.end() == other.end() == 0, other.complained()
        assert plain.printed() == other.printed() and "float32" in plain.printed()


# ---- Devices -------------------------------------------------------------------------------------

SHOW = """
import jax, vnca.program.train, vnca.report.benchmark
def show(run):
    settings = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
    pinned = {name: getattr(jax.config, name) for name in vnca.program.machine.PINNED}
    print(json.dumps([jax.device_count(), os.environ["XLA_FLAGS"], pinned, *settings]))
vnca.program.train.train = vnca.report.benchmark.benchmark = show
os.environ["XLA_FLAGS"] = "--xla_cpu_enable_fast_math=false"
"""


@pytest.mark.parametrize("mode", ["train", "benchmark"])
def test_the_program_starts_with_devices_for_its_cores_its_own_settings_and_compiled_programs(
    tmp_path, monkeypatch, mode
):
    for name, value in OTHERS.items():
        monkeypatch.setenv(name, value)
    command = ["--config=configs/quickstart.py", f"--workdir={tmp_path}", f"--mode={mode}"]
    [(status, out, err)] = tiny.outcomes([command], SHOW)
    assert status == 0 and not err, err
    devices, flags, pinned, is_cached, folder = json.loads(out)
    assert pinned == machine.PINNED and {*pinned} == {*map(str.lower, OTHERS)}
    assert devices == {1: 1, 2: 2, 3: 2}.get(machine.cores(), 4)  # a batch of 16 images
    assert flags.startswith("--xla_cpu_enable_fast_math=false --xla_")
    assert is_cached == (mode == "train")  # how long compiling takes is a result of the other
    assert folder == os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.mark.parametrize(
    ("cores", "name", "batch", "devices"),
    [
        (1, "baseline", 16, ""),
        (3, "baseline", 16, "2"),  # three would not divide it
        (64, "baseline", 16, "4"),  # four images each
        (64, "baseline", 128, "8"),
        (2, "baseline", 4, ""),
        (2, "nondoubling", 12, ""),  # two would have to divide a quarter of it
    ],
)
def test_a_cpu_is_as_many_devices_as_have_work(monkeypatch, cores, name, batch, devices):
    monkeypatch.setattr(machine, "cores", lambda: cores)
    for flags in "", "flags.txt":  # a file of flags is left alone
        monkeypatch.setenv("XLA_FLAGS", flags)
        machine.split_cpu(tiny.config(name, train__batch_size=batch))
        found = os.environ["XLA_FLAGS"].rpartition("device_count=")[2]
        assert found == (flags or devices)


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000 100000\n", 2), ("20000 100000", 1), ("max 100000", 64)]
)
def test_a_container_may_have_fewer_cores(monkeypatch, tmp_path, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    machine.QUOTA.write_text(quota)
    assert machine.cores() == expected


# ---- What is fitted ------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_fitting_sets_what_is_unset_and_nothing_else_on_any_number_of_cores(
    name, platform, monkeypatch
):
    monkeypatch.setattr(machine, "cores", lambda: pytest.fail("it depends on the cores"))
    made, before = tiny.committed(name), config.flatten(tiny.committed(name))
    machine.fit(made, platform)
    config.validate(made)
    machine.check_batch(made, 8 if name in tiny.OF_MODELS else 1)  # 8, as of the reported runs
    fitted = config.flatten(made)
    assert {field for field in before if fitted[field] != before[field]} == {
        "train.micro_batch",
        "eval.chunk",
    }
    assert platform == "cpu" or made.train.micro_batch == made.train.batch_size


@pytest.mark.parametrize(
    "name, fields, expected",
    [
        ("baseline", {}, (16, 16)),
        ("doubling", {"latent_size": 64}, (2, 2)),
        ("doubling", {"latent_size": 65}, (4, 4)),
        ("nondoubling", {"latent_size": 64}, (2, 4)),
        ("healing", {"channels": 65}, (4, 4)),
        ("healing", {"channels": 64, "size": 16, "colours": 3}, (2, 4)),
    ],
)
def test_models_of_few_channels_and_those_without_cells_have_micro_batches_of_their_own_on_a_cpu(
    name, fields, expected
):
    fields = {f"model__{field}": value for field, value in fields.items()}
    made = tiny.config(name, **fields, train__micro_batch=None)
    machine.fit(made, "cpu")
    assert (made.train.micro_batch, made.eval.chunk) == expected


def test_each_kind_of_processor_keeps_its_compiled_programs_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None)
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    one = "processor: 0\nflags: fpu avx\n"
    texts = one, one.replace("0", "1"), one.replace("avx", "avx2"), "Features: fp asimd"
    for text, folders in zip(texts, (1, 1, 2, 3), strict=True):
        monkeypatch.setattr(machine.Path, "read_text", lambda _, text=text: text)
        machine.keep_compiled()
        assert len([*tmp_path.iterdir()]) == folders
