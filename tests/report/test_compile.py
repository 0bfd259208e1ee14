"""What a TPU's compiler estimates: counted as its text says, for a TPU that is not there."""

import fcntl
import importlib.util
import json
from pathlib import Path

import jax
import pytest
import tiny

from vnca.program import VncaError
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

%update (p: (f32[8])) -> (f32[8]) {{
  %loop = (f32[8]{{0}}) while(%p), condition=%less, body=%step
  %branch = (f32[8]{{0}}) conditional(%p), branch_computations={{%step, %cheap}}
  %sum = (f32[16,2]{{1,0}}, f32[4]{{0}}) all-reduce(%p)
  %kernel = f32[10]{{0}} custom-call(%p), custom_call_target="Kernel"
  %buffer = f32[1000]{{0}} custom-call(), custom_call_target="AllocateBuffer"
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


def test_a_trip_count_that_the_text_bounds_alone_is_given():
    assert sum(compile.estimate(PROGRAM, {5: 3}).once.values()) == 3 * 100 + 100 + 7


def test_what_has_no_estimate_is_listed_with_its_bytes():
    counted = compile.estimate(PROGRAM, {})
    assert counted.collectives == {"all-reduce": 4 * (16 * 2 + 4)}
    assert counted.left_out == {"Kernel": 40}


def test_a_text_without_figures_is_no_zero():
    with pytest.raises(VncaError, match="no estimated cycles"):
        compile.estimate(PROGRAM.replace("estimated_cycles", "guessed_cycles"), {})


def test_without_libtpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(VncaError, match=r"needs libtpu.*pip install"):
        compile.topology_devices("v5e:2x4")


# ---- With the compiler ---------------------------------------------------------------------------

MOST = {  # M cycles of an update, T = 48, or of evaluation's image × sample: 5% above the estimates
    ("v5e:2x4", "doubling", "float32"): 6.17,
    ("v5e:2x4", "nondoubling", "float32"): 11.0,
    ("v5e:2x4", "baseline", "float32"): 1.64,
}


def compiled(workdir, *flags):
    """compile.json of a run of the program, and what it wrote to standard output."""
    command = "-W", "error", "main.py", "--mode=compile", f"--workdir={workdir}", *flags
    with tiny.Process(*command) as run:
        assert run.end(timeout=600) == 0, run.complained()
        return json.loads((workdir / "compile.json").read_text()), run.printed()


@needs_libtpu
def test_an_unknown_topology_is_one_line():
    with tiny.Process(
        "main.py", "--config=configs/quickstart.py", "--mode=compile", "--topology=v5e:9x9"
    ) as run:
        assert run.end(timeout=100) == 1
        assert not run.printed()
        last = run.complained().strip().splitlines()[-1]
    assert last.startswith("error: --topology=v5e:9x9: ")
    assert "v5e:2x4" in last


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("topology", "name", "dtype"), MOST)
def test_the_published_updates_take_no_more_than_they_did(topology, name, dtype, tmp_path):
    lock = Path("/tmp/libtpu_lockfile")
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a process that has a TPU holds it
        found, out = compiled(
            tmp_path,
            f"--config=configs/{name}.py",
            f"--topology={topology}",
            f"--config.train.dtype={dtype}",
            "--config.eval.precision=default",
        )
    assert found["topology"] == topology and found["devices"] == 8
    assert 0.5 < found["update_cycles"] / 1e6 / MOST[topology, name, dtype] <= 1
    assert found["memory_bytes"] < 16e9
    gradient = {"all-reduce"}
    pool = {"all-gather", "reduce-scatter"} if name == "nondoubling" else set()
    assert set(found["update_collectives"]) <= gradient | pool
    assert "M cycles" in out
    program = (tmp_path / "update.hlo.txt").read_text()
    assert "input_output_alias" in program.splitlines()[0]  # the state, in its own memory
    assert jax.__version__ == found["jax"]
