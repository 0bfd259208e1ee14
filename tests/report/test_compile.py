"""What a TPU's compiler estimates: counted as its text says, for a TPU that is not there."""

import fcntl
import importlib.util
import json
import os
from pathlib import Path

import jax
import pytest
import tiny

from vnca.models import make_model
from vnca.program import VncaError
from vnca.program.arithmetic import update_flops
from vnca.report import compile

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu, of the extra tpu, is not installed"
)

PROGRAM = f"""HloModule call

FileNames
1 "{Path(compile.__file__).parents[1]}/layers.py"
2 "elsewhere.py"

FunctionNames
1 "convolve"
2 "call"

FileLocations
1 {{file_name_id=2 function_name_id=2 line=1}}
2 {{file_name_id=1 function_name_id=1 line=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}

%less (p: (s32[])) -> pred[] {{
  %five = s32[] constant(5)
}}

%unbounded (p: (s32[])) -> pred[] {{
  %p = s32[] parameter(0)
}}

%step (p: (f32[8])) -> (f32[8]) {{
  %conv = f32[8] conv(%p), {{op_name="while/conv" stack_frame_id=2}}, "estimated_cycles":"100"
}}

%cheap (p: (f32[8])) -> (f32[8]) {{
  %add.1 = f32[8]{{0}} add(%p), c={{"estimated_cycles":"1"}}
}}

%begin (p: f32[2]) -> (f32[2], f32[16]) {{
  %all = f32[16]{{0}} all-gather(%p), dimensions={{0}}
  ROOT %start = (f32[2], f32[16]) custom-call(%all), custom_call_target="AsyncCollectiveStart"
}}

%update (p: (f32[8])) -> (f32[8]) {{
  %loop = (f32[8]{{0}}) while(%p), condition=%less, body=%step
  %branch = (f32[8]{{0}}) conditional(%p), branch_computations={{%step, %cheap}}
  %sum = (f32[16,2]{{1,0}}, f32[4]{{0}}) all-reduce(%p)
  %kernel = f32[10]{{0}} custom-call(%p), custom_call_target="Kernel"
  %tiled = f32[3,2]{{1,0}} reshape(%p)
  %done = f32[100]{{0}} copy-done(%p)
  %buffer = f32[1000]{{0}} custom-call(), custom_call_target="AllocateBuffer"
  %gather = (f32[2]{{0}}, f32[16]{{0}}) fusion(%p), kind=kLoop, calls=%begin
  %mul = f32[8] mul(%p) {{op_name="transpose(jvp(a))/mul" stack_frame_id=2}}, "estimated_cycles":"7"
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %convert.1 = f32[8]{{0}} convert(%p), c={{"estimated_cycles":"1000"}}
  %updates = (f32[8]{{0}}) while(%p), condition=%unbounded, body=%update
}}
"""


def test_cycles_are_summed_over_loops_and_the_dearest_branch():
    counted = compile.estimate(PROGRAM, {})
    assert counted.total == 1000 + 5 * 100 + 100 + 7
    assert counted.once == {
        "layers.py convolve: conv": 600,
        "layers.py convolve a: mul, backward": 7,
    }


KNOWN = "body=%step", 'body=%step, c={"known_trip_count":{"n":"5"}}'


@pytest.mark.parametrize("text", [PROGRAM, PROGRAM.replace(*KNOWN)])
def test_a_trip_count_that_the_text_bounds_alone_is_given(text):
    assert sum(compile.estimate(text, {5: 3}).once.values()) == 3 * 100 + 100 + 7


def test_what_has_no_estimate_is_listed_with_its_bytes():
    counted = compile.estimate(PROGRAM, {})
    assert counted.collectives == {"all-reduce": 4 * (16 * 2 + 4), "all-gather": 4 * 16}
    assert counted.left_out == {"Kernel": 40, "reshape": 4 * 3 * 2}


def test_a_call_is_compiled_as_it_is_made():
    config = tiny.config("nondoubling", model__steps=5, eval__chunk=32, eval__images=100)
    assert compile.lengths(config) == {5: 3}  # T is 2 or 3, in a loop of up to 5
    assert compile.evaluated_at_once(config, 8) == 13
    config.eval.images = None
    assert compile.evaluated_at_once(config, 8) == 32


def test_the_training_set_is_counted_where_it_is_the_one_evaluated():
    config = tiny.config("baseline", eval__chunk=10_000, eval__split="train")
    assert compile.evaluated_at_once(config, 8) == 7_500


def test_cycles_become_seconds_at_a_cores_clock_and_a_share_of_the_peak_of_all_devices():
    config = tiny.config("baseline", eval__samples=10)
    core = compile.Core(16e9, clock=1e9, memory_rate=1e9, flops=100)
    result = {
        "images_of_evaluation": 4, "evaluation_cycles": 1200, "evaluation_call_cycles": 1600,
        "update_cycles": 2e6, "update_left_out_bytes": 3e6,
    }  # fmt: skip
    compile.report_times(config, result, devices=range(8), core=core, log=[].append)
    # For each of 10 samples 1,200 cycles, and once 400, in which 4 images are encoded.
    assert result["evaluation_cycles_per_image_sample"] == (1200 + 40) / 4
    assert result["update_seconds"] == 3e-3  # the bytes without an estimate take longer
    peak = update_flops(config) / 3e-3 / (100 * 1e9 * 8)
    assert result["update_fraction_of_peak"] == pytest.approx(peak)


@pytest.mark.parametrize("word", ["estimated_cycles", "ENTRY"])
def test_a_text_in_which_no_figures_are_found_is_no_zero(word):
    with pytest.raises(VncaError, match="no estimated cycles"):
        compile.estimate(PROGRAM.replace(word, "another"), {})


def test_without_libtpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(VncaError, match=r"needs libtpu.*pip install"):
        compile.topology_devices("v5e:2x4")


# ---- With the compiler ---------------------------------------------------------------------------

ESTIMATED = {  # M cycles of an update, T = 48, by JAX 0.10.2 and libtpu 0.0.42.1
    ("v5e:2x4", "doubling", "float32"): 5.60,
    ("v5e:2x4", "doubling", "bfloat16"): 9.76,
    ("v5e:2x4", "nondoubling", "float32"): 10.69,
    ("v5e:2x4", "baseline", "float32"): 0.98,
    ("v3:2x2", "doubling", "float32"): 18.71,
}
OF_EVALUATION = 0.274  # of an image × sample of the doubling model's
BY_MODE = "v5e:2x4", "doubling", "float32"  # by --mode=compile, with its evaluation

UPDATE = """
import importlib, json, sys
from vnca.program.method import make_method
from vnca.report import compile
topology, name, dtype = sys.argv[1:]
config = importlib.import_module(f"configs.{name}").get_config()
config.train.dtype = dtype
config, devices = compile.fit_to(topology, config)
method = make_method(config, platform="tpu", device_kind=devices[0].device_kind)
program, _ = compile.compiled("update", method, config, devices)
text, memory = program.as_text(), program.memory_analysis()
counted = compile.estimate(text, compile.lengths(config))
print(json.dumps([
    len(devices), counted.once.total() / 1e6, counted.collectives, text.splitlines()[0],
    memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
]))
"""


@needs_libtpu
def test_an_unknown_topology_is_one_line():
    with tiny.Process(
        "main.py", "--config=configs/quickstart.py", "--mode=compile", "--topology=v5e:9x9"
    ) as run:
        assert run.end(timeout=100) == 1
        assert not run.printed()
        [line] = run.complained().splitlines()
    assert line.startswith("error: --topology=v5e:9x9: ")
    assert "v5e:2x4" in line


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("topology", "name", "dtype"), [of for of in ESTIMATED if of != BY_MODE])
def test_the_published_updates_take_no_more_than_they_did(topology, name, dtype):
    with tiny.Process("-W", "error", "-c", UPDATE, topology, name, dtype) as run:
        assert run.end(timeout=600) == 0, run.complained()
        devices, cycles, collectives, head, memory = json.loads(run.printed())
    assert devices == 8
    assert 0.8 < cycles / ESTIMATED[topology, name, dtype] < 1.05
    assert memory < 16e9
    assert "input_output_alias" in head  # the state, in its own memory
    # As on a CPU: one gradient, in float32, and three terms of the loss; and rows of a pool, B/2 of
    # them to their devices and B to all, their numbers (up to 1 kB) with the gradient.
    params = jax.eval_shape(make_model(tiny.published(name).model).init, jax.random.key(0))
    gradient = 4 * (sum(x.size for x in jax.tree.leaves(params)) + 3)
    assert 0 <= collectives.pop("all-reduce") - gradient <= 1024 * (name == "nondoubling")
    row = 4 * 32 * 32 * 128
    pool = {"reduce-scatter": 64 // 8 * row, "all-gather": 128 * row}
    assert collectives == (pool if name == "nondoubling" else {})


@pytest.mark.slow
@needs_libtpu
def test_the_mode_compiles_both_programs_while_another_process_holds_a_tpu(tmp_path):
    with Path("/tmp/libtpu_lockfile").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a process that has a TPU holds it
        command = (
            "main.py", "--mode=compile", "--config=configs/doubling.py",
            "--config.eval.precision=default", f"--workdir={tmp_path}",
        )  # fmt: skip
        with tiny.Process("-W", "error", *command) as run:
            assert run.end(timeout=600) == 0, run.complained()
            assert "M cycles" in run.printed()
        assert os.path.samestat(os.stat(held.name), os.fstat(held.fileno()))
    found = json.loads((tmp_path / "compile.json").read_text())
    assert found["topology"] == "v5e:2x4" and found["devices"] == 8
    assert found["update_memory_bytes"] < 16e9 and found["evaluation_memory_bytes"] < 16e9
    assert found["update_collectives"].keys() == {"all-reduce"}
    assert 0.8 < found["update_cycles"] / 1e6 / ESTIMATED[BY_MODE] < 1.05
    evaluation = found["evaluation_cycles_per_image_sample"] / 1e6
    assert 0.8 < evaluation / OF_EVALUATION < 1.05
    assert (tmp_path / "update.hlo.txt").exists() and (tmp_path / "evaluation.hlo.txt").exists()
