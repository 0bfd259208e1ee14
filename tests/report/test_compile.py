"""What a TPU's compiler estimates and a GPU's program does at least, counted by hand in texts like
XLA's; then for a TPU that is not there, where the extra tpu is installed (`.ci/run` does so)."""

import fcntl
import importlib.util
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import tiny

from vnca.program.runs import open_run
from vnca.report import compile

V5E, H100 = compile.CORES["TPU v5 lite"], compile.CARDS["h100"]
TPU_PROGRAM = """HloModule call

%five (p: (s32[])) -> pred[] {
  %five = s32[] constant(5)
}

%unbounded (p: (s32[])) -> pred[] {
  %p = s32[]{:T(128)} parameter(0)
}

%step (p: (f32[8])) -> (f32[8]) {
  %conv = f32[8]{0:T(8,128)S(1)} convolution(%p, %p), c={"estimated_cycles":"100"}
}

%cheap (p: (f32[8])) -> (f32[8]) {
  %add.1 = f32[8]{0} add(%p), c={"estimated_cycles":"1"}
}

%update (p: (f32[8])) -> (f32[8]) {
  %loop = (f32[8]{0:T(8,128)}, /*index=1*/f32[8]{0}) while(%p), condition=%five, body=%step
  %branch = (f32[8]{0}) conditional(%p), branch_computations={%cheap, %step}
  %mul = f32[8]{0} multiply(%p), c={"estimated_cycles":"7"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %convert.1 = f32[8]{0} convert(%p), c={"estimated_cycles":"1000"}
  %updates = (f32[8]{0}) while(%p), condition=%unbounded, body=%update
}
"""


@pytest.mark.parametrize("known", ["", ', c={"known_trip_count":{"n":"5"}}'])
def test_cycles_are_those_of_one_update_with_its_loops_and_dearest_branches(known):
    text = TPU_PROGRAM.replace("body=%step", f"body=%step{known}")
    for bounds, turns in ({}, 5), ({5: 3}, 3):  # T, of which the text has only the bound
        found = compile.count(text, V5E, bounds)
        assert found["cycles"] == turns * 100 + 100 + 7
        assert found["seconds"] == pytest.approx(found["cycles"] / 1.5e9)


GPU_PROGRAM = """HloModule call, is_scheduled=true

%multiply_add (a: f32[64,8], b: f32[8,4], c: f32[4]) -> f32[64,4] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %c = f32[4]{0} parameter(2)
  %dot = f32[64,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %row = f32[64,4]{1,0} broadcast(%c), dimensions={1}
  ROOT %add = f32[64,4]{1,0} add(%dot, %row)
}

%keep (stack: f32[5,64,4], new: f32[64,4], i: s32[]) -> f32[5,64,4] {
  %stack = f32[5,64,4]{2,1,0} parameter(0)
  %new = f32[64,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %one = f32[1,64,4]{2,1,0} bitcast(%new)
  %zero = s32[] constant(0)
  ROOT %update = f32[5,64,4]{2,1,0} dynamic-update-slice(%stack, %one, %i, %zero, %zero)
}

%look (stack: f32[5,64,4], i: s32[]) -> (f32[64,4], f32[4]) {
  %stack = f32[5,64,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %renamed = f32[5,64,4]{2,1,0} bitcast(%stack)
  %slice = f32[1,64,4]{2,1,0} dynamic-slice(%renamed, %i, %zero, %zero)
  %flat = f32[64,4]{1,0} bitcast(%slice)
  %sum = f32[4]{0} reduce(%flat, %zero), dimensions={0}, to_apply=%plus
  ROOT %both = (f32[64,4]{1,0}, f32[4]{0}) tuple(%flat, %sum)
}

%inner (p: f32[64,4]) -> f32[64,4] {
  %p = f32[64,4]{1,0} parameter(0)
  ROOT %turn = f32[64,4]{1,0} copy(%p)
}

%outer (p: f32[64,4]) -> f32[64,4] {
  %p = f32[64,4]{1,0} parameter(0)
  %two = f32[64,4]{1,0} while(%p), condition=%c, body=%inner, b={"known_trip_count":{"n":"2"}}
  ROOT %jump = f32[64,4]{1,0} call(%two), to_apply=%inner
}

%twice (q: f32[64,4]) -> f32[64,4] {
  %q = f32[64,4]{1,0} parameter(0)
  %once = f32[64,4]{1,0} copy(%q)
  ROOT %again = f32[64,4]{1,0} copy(%once)
}

ENTRY %main (x: f32[64,8]) -> f32[64,4] {
  %x = f32[64,8]{1,0} parameter(0)
  %w = f32[8,4]{1,0} constant({...})
  %b = f32[4]{0} constant({...})
  %s = f32[5,64,4]{2,1,0} constant({...})
  %y = f32[64,4]{1,0} constant({...})
  %i = s32[] constant(3)
  %g = bf16[2,6,6,16]{3,2,1,0} constant({...})
  %k = bf16[16,3,3,32]{3,2,1,0} constant({...})
  %h = bf16[2,6,6,32]{3,2,1,0} constant({...})
  %done = f32[64,8] copy-done(%x)
  ROOT %end = LINE
}

%c (p: f32[]) -> pred[] {
}
"""
CELLS = 4 * 64 * 4  # bytes of f32[64,4]
PRODUCT = 2 * 64 * 8 * 4  # FLOP
TAPS = 2 * (2 * 6 * 6) * (3 * 3 * 32 * 16)
CUDNN = 'window={size=3x3}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv'
IMAGES = 2 * (2 * 6 * 6 * (16 + 32) + 16 * 3 * 3 * 32)  # bytes of %g, %h and %k


@pytest.mark.parametrize(
    ("line", "kernels", "size", "flops"),
    {
        "a fusion reads its operands and writes its result": (
            "f32[64,4]{1,0} fusion(%x, %w, %b), calls=%multiply_add",
            1, 4 * (64 * 8 + 8 * 4 + 4) + CELLS, PRODUCT,
        ),
        "of what is updated in place, the update; and it, and the index": (
            "f32[5,64,4]{2,1,0} fusion(%s, %y, %i), calls=%keep", 1, 2 * CELLS + 4, 0,
        ),
        "of what is only sliced, the slice": (
            "(f32[64,4]{1,0}, f32[4]{0}) fusion(%s, %i), calls=%look",
            1, CELLS + 4 + CELLS + 16, 0,
        ),
        "loops in loops": (
            'f32[64,4]{1,0} while(%x), condition=%c, body=%outer, b={"known_trip_count":{"n":"3"}}',
            9, 9 * 2 * CELLS, 0,
        ),
        "the dearest branch": (
            "f32[64,4]{1,0} conditional(%i, %x), branch_computations={%twice, %inner}",
            2, 2 * 2 * CELLS, 0,
        ),
        "a convolution, without its scratch memory": (
            f'(bf16[2,6,6,16]{{3,2,1,0}}, u8[4096]{{0}}) custom-call(%h, %k), {CUDNN}Forward"',
            1, IMAGES, TAPS,
        ),
        "its gradient by the kernel": (
            f'(bf16[16,3,3,32]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%h, %g), {CUDNN}BackwardFilter"',
            1, IMAGES, TAPS,
        ),
        "its gradient by the input, of a stride of 2": (
            f"(bf16[2,12,12,32]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%g, %k), "
            f'{CUDNN}BackwardInput"',
            1, 2 * (2 * 6 * 6 * 16 + 16 * 3 * 3 * 32 + 2 * 12 * 12 * 32), TAPS,
        ),
        "a product of cuBLAS": (
            '(f32[64,4]{1,0}, s8[99999]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt", '
            'b={"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}',
            1, 4 * (64 * 8 + 8 * 4) + CELLS, PRODUCT,
        ),
    }.values(),
)  # fmt: skip
def test_a_kernel_counts_by_what_it_reads_writes_and_multiplies(line, kernels, size, flops):
    found = compile.count(GPU_PROGRAM.replace("LINE", line), H100, {})
    assert (found["kernels"], found["bytes"], found["flops"]) == (kernels, size, flops)
    assert found["seconds"] == pytest.approx(kernels * 2.5e-6)  # they are all too small


def test_a_kernel_takes_as_long_as_its_bytes_or_its_flop_take():
    large = f"f32[1] copy(%large)\n  %large = f32[{1 << 30}]{{0}} constant({{...}})"
    found = compile.count(GPU_PROGRAM.replace("LINE", large), H100, {})
    assert found["seconds"] == pytest.approx((4 * (1 << 30) + 4) / (0.85 * 3352e9))
    square = "f32[9999,9999] dot(%m, %m), lhs_contracting_dims={0}"
    for precision, peak in ("", 495e12), (", operand_precision={highest,highest}", 67e12):
        line = f"{square}{precision}\n  %m = f32[9999,9999] constant({{...}})"
        found = compile.count(GPU_PROGRAM.replace("LINE", line), H100, {})
        assert found["seconds"] == pytest.approx(2 * 9999**3 / (0.6 * peak))


@pytest.mark.parametrize("card", compile.CARDS.values(), ids=compile.CARDS)
def test_the_figures_of_a_card_belong_together(card):
    # Two FLOP a clock and unit: within 20% of the data sheet, as boost clocks differ.
    assert card.float32 == pytest.approx(2e9 * card.cores * card.lanes * card.clock, rel=0.2)
    # 12.5 to 101 FLOP a byte of memory's rate, and 25 to 79 ms to read all of the memory: a slip of
    # the unit or of a zero in any of them is outside.
    assert 12 < card.float32 / card.rate < 102
    assert 0.024 < card.memory / card.rate < 0.08


@pytest.mark.parametrize(("device", "most"), [(H100, 0.75 * 84_942_979_072), (V5E, 16e9)])
def test_a_program_fits_if_it_needs_no_more_than_there_is(device, most):
    sizes = {"argument": most - 6, "temp": 4, "generated_code": 2, "output": 7, "alias": 7}
    memory = SimpleNamespace(**{f"{of}_size_in_bytes": n for of, n in sizes.items()})
    assert compile.memory_of(memory, device)["fits"]
    memory.temp_size_in_bytes += 1
    found = compile.memory_of(memory, device)
    assert found["memory_bytes"] == most + 1 and not found["fits"]
    assert compile.memory_of(memory, compile.Core())["fits"] is None


@pytest.mark.parametrize("card", [None, H100], ids=["tpu", "gpu"])
def test_a_program_is_fitted_to_the_device_that_it_is_for_and_not_to_this_one(
    card, tmp_path, monkeypatch
):
    class Lowered(Exception):
        """Raised with the config of the update, before anything is compiled."""

    def lowered_update(learner, config, devices, images):
        raise Lowered(config)

    devices = (SimpleNamespace(device_kind="TPU v5 lite"),)
    monkeypatch.setattr(compile, "devices_of", lambda _: (devices, card))
    monkeypatch.setattr(compile, "lowered_update", lowered_update)
    config = tiny.config(train__batch_size=64, train__micro_batch=None, eval__chunk=None)
    with pytest.raises(Lowered) as fault:
        compile.compile(open_run(config, tmp_path, "compile"))
    [fitted] = fault.value.args
    assert (fitted.train.micro_batch, fitted.eval.chunk) == (64, 32)  # a CPU's: 2 and 2


@pytest.mark.slow  # compiles two programs, for 5 seconds
def test_the_memory_is_reported_where_a_text_holds_no_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compile, "devices_of", lambda _: (tuple(jax.devices()), None))
    monkeypatch.setitem(compile.CORES, "cpu", V5E)  # whose compiler estimates nothing
    run = open_run(tiny.config(train__batch_size=12), tmp_path, "compile")
    assert "config.train.batch_size" in tiny.fault_of(compile.compile, run)
    with tiny.fast_compilation():
        compile.compile(open_run(tiny.config(), tmp_path, "compile"))
    found = json.loads((tmp_path / "compile.json").read_text())
    assert found["update_memory_bytes"] > 8 * 4 * 60_000
    assert "update_seconds" not in found
    assert "update: its text is not understood" in capsys.readouterr().out


TPUS, INSTALLED = "v5e:2x4", importlib.util.find_spec("libtpu")
WRONG = {  # by --topology: what the line says
    **dict.fromkeys(("h100:0", "h100:17"), "h100:8; TPUs such as v5e:2x4"),
    "v5e:9x9": "TPUs such as v5e:2x4" if INSTALLED else "pip install -e '.[tpu]'",
}
if not importlib.util.find_spec("jax_cuda12_plugin"):
    WRONG["H100:8"] = "pip install -e '.[gpu-compiler]'"


def test_a_topology_that_cannot_be_is_one_line():
    command = ["--config=configs/baseline.py", "--mode=compile"]
    results = tiny.outcomes([[*command, f"--topology={topology}"] for topology in WRONG])
    for (topology, words), (status, _, errors) in zip(WRONG.items(), results, strict=True):
        assert status == 1 and errors.count("\n") == 1, errors
        assert f"--topology={topology}" in errors and words in errors


CRASHES = """
import ctypes, os, sys
from vnca.program import machine
from vnca.report import compile
def load(_):
    os.write(2, b"there is no driver\\n")
    "loading" in sys.argv[-1] and os.abort()
def end(*_):
    os.write(2, b"a check failed\\n")
    os.abort()
ctypes.CDLL = load
compile.compile = end
sys.path.insert(0, "FOLDER")
"""


def test_a_crash_of_a_compiler_is_heard_and_what_libraries_print_when_loaded_is_not(tmp_path):
    plugin = tmp_path / "jax_plugins" / "xla_cuda12" / "__init__.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text("def initialize(): pass")
    command = ["--config=configs/baseline.py", "--mode=compile"]
    crashes = [[*command, f"--workdir={tmp_path / name}"] for name in ("compiling", "loading")]
    results = tiny.outcomes(crashes, CRASHES.replace("FOLDER", str(tmp_path)))
    for (status, _, errors), is_heard in zip(results, (True, False), strict=True):
        assert (status, "a check failed" in errors) == (-signal.SIGABRT, is_heard), errors
        assert "Fatal Python error: Aborted" in errors and "driver" not in errors


# ---- With a TPU's compiler -----------------------------------------------------------------------

ESTIMATED = {  # M cycles of an update, T = 48, by JAX 0.10.2 and libtpu 0.0.42.1
    (TPUS, "doubling", "float32"): 5.60,
    (TPUS, "doubling", "bfloat16"): 9.76,
    (TPUS, "nondoubling", "float32"): 10.69,
    (TPUS, "baseline", "float32"): 0.98,
    ("v3:2x2", "doubling", "float32"): 18.71,
}


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="libtpu, of the extra tpu, is not installed")
@pytest.mark.parametrize("case", ESTIMATED)
def test_the_published_updates_take_no_more_than_they_did(case, tmp_path):
    topology, name, dtype = case
    flags = f"""--mode=compile --topology={topology} --workdir={tmp_path}
        --config=configs/{name}.py --config.train.dtype={dtype} --config.eval.precision=default"""
    with Path("/tmp/libtpu_lockfile").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a process that has a TPU holds it
        with tiny.Process("main.py", *flags.split()) as run:
            assert (run.end(timeout=600), run.complained()) == (0, "")
    found = json.loads((tmp_path / "compile.json").read_text())
    assert found["devices"] == 8 and found["update_fits"] and found["evaluation_fits"]
    assert 0.8 < found["update_cycles"] / 1e6 / ESTIMATED[case] < 1.05
    if case == (TPUS, "doubling", "float32"):  # evaluation: one sample of 32 images
        assert 0.8 < found["evaluation_cycles"] / 32e6 / 0.274 < 1.05
    with (tmp_path / "update.hlo.txt").open() as text:
        assert "input_output_alias" in text.readline()  # the state, in its own memory
