"""The program that a TPU would run, compiled where there is none, and what its compiler expects.

XLA's TPU compiler needs no TPU. It writes the cycles that it estimates beside the operations of the
program that it makes; here they are summed over loops. They are not measured: the reproduction's
updates calibrate them, compiled in the same way and reported for a TPU v3-8.
"""

import importlib.util
import os
import re
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from vnca.pool import fresh_images
from vnca.program import VncaError, files, first_line
from vnca.program.arithmetic import most_steps, training_steps, update_flops
from vnca.program.data import image_counts
from vnca.program.evaluate import estimator
from vnca.program.machine import check_batch, check_images, fit_to_machine
from vnca.program.method import make_method, param_shapes
from vnca.program.order import images_to_evaluate
from vnca.report import kernels
from vnca.training import init_state, make_update_call

SOME_TOPOLOGIES = "v5e:2x4 (hosted notebooks), v3:2x2 (the study), v4:2x2x1, v5p:2x2x1, v6e:2x4"
CALIBRATION = "an estimate of XLA's; on a TPU v3-8 24 ms were reported where it estimates 23.0"


class Core(NamedTuple):
    """What JAX calls a device: bytes of memory; cycles/s, FLOP a cycle, bytes/s, where known."""

    memory: float
    clock: float | None = None
    flops: int | None = None
    memory_rate: float | None = None


CORES = {  # a v2 or v3 chip has two cores, which share its memory
    "TPU v2": Core(8e9),
    "TPU v3": Core(16e9, 0.94e9, 65_536, 450e9),
    "TPU v4": Core(32e9),
    "TPU v5 lite": Core(16e9, 1.5e9, 131_072, 819e9),
    "TPU v5": Core(95e9),
    "TPU v6 lite": Core(32e9),
}


def compile_for(topology, config, workdir, log, make_method=make_method):
    """Compiles the config's update and evaluation calls for a topology; writes compile.json and
    both programs, optimised HLO, in `workdir`. Raises VncaError where that topology is not known or
    libtpu is missing."""
    config, devices = fit_to(topology, config)
    kind = devices[0].device_kind
    core = CORES.get(kind, Core(0))
    files.make_folder(workdir)
    method = make_method(config, platform="tpu", device_kind=kind)
    result = subject(topology, kind, config, len(devices)) | {
        "cycles_and_seconds_are": CALIBRATION,
        "memory_bytes_of_a_core": core.memory or None,
    }
    log(f"compiling for {len(devices)} × {kind}: {CALIBRATION}")
    for name in "update", "evaluation":
        program, seconds = compiled(name, method, config, devices)
        text = program.as_text()
        files.write_bytes(Path(workdir, f"{name}.hlo.txt"), text.encode())
        report_memory(name, result, program.memory_analysis(), seconds, core, log)
        try:
            counted = estimate(text, lengths(config) if name == "update" else {})
        except (VncaError, LookupError, TypeError, ValueError) as fault:  # written in another way
            log(f"{name}: no cycles: {fault}")
        else:
            report(name, result, counted, log)
    if {"update_cycles", "evaluation_cycles"} <= result.keys():
        report_times(config, result, devices, core, log)
    files.write_json(Path(workdir) / "compile.json", result)
    log(f"written to {workdir}: compile.json, update.hlo.txt, evaluation.hlo.txt")


def subject(topology, device_kind, config, devices):
    """What compile.json says first: the machine, and what is compiled for it."""
    return {
        "topology": topology,
        "devices": devices,
        "device": device_kind,
        "jax": jax.__version__,
        "model": config.model.name,
        "dtype": config.train.dtype,
        "precision_of_evaluation": config.eval.precision,
        "images_of_evaluation": evaluated_at_once(config, devices),
    }


def report_times(config, result, devices, core, log):
    """Adds to the result, and logs, the cycles in seconds and as a peak fraction."""
    samples, images = config.eval.samples, result["images_of_evaluation"]
    cycles = result.pop("evaluation_cycles")
    once = result["evaluation_call_cycles"] - cycles
    each = result["evaluation_cycles_per_image_sample"] = (cycles + once / samples) / images
    log(f"evaluation: {each:,.0f} cycles an image × sample, estimated")
    if core.clock:
        left_out = result["update_left_out_bytes"] / core.memory_rate
        seconds = max(result["update_cycles"] / core.clock, left_out)
        peak = update_flops(config) / seconds / (core.flops * core.clock * len(devices))
        result |= {"update_seconds": seconds, "update_fraction_of_peak": peak}
        log(f"  {1e6 * each / core.clock:.1f} µs of a core")
        log(f"an update: {1e3 * seconds:.2f} ms, {peak:.0%} of peak, estimated")
        log(f"100,000 updates: {1e5 * seconds / 3600:.2f} hours, estimated")
    else:
        result["update_seconds"] = result["update_fraction_of_peak"] = None
        log("an update: milliseconds not known, as the clock of such a core is not")


def fit_to(topology, config):
    """The config fitted to that machine, and its devices."""
    devices = topology_devices(topology)
    check_batch(config, len(devices))
    return fit_to_machine(config, "tpu", len(devices)), devices


def topology_devices(name):
    """The devices of a topology that this machine does not have."""
    if not importlib.util.find_spec("libtpu"):
        raise VncaError("--mode=compile needs libtpu, a TPU's compiler: pip install -e '.[tpu]'")
    # Read by libtpu when it is loaded, by this process alone. Its lock is for those who have a TPU.
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",  # else it waits for a metadata server
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    one_host = {"chips_per_host_bounds": (2, 4, 1)} if name in ("v5e:2x4", "v6e:2x4") else {}
    try:
        return tuple(topologies.get_topology_desc(name, "tpu", **one_host).devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as fault:
        raise VncaError(
            f"--topology={name}: {first_line(fault)}; such as {SOME_TOPOLOGIES}"
        ) from fault


def compiled(name, method, config, devices):
    """The program of an "update" or an "evaluation", compiled for these devices, and the seconds
    that the compiler took."""
    lower = lower_update if name == "update" else lower_evaluation
    lowered = lower(method, config, devices)
    began = time.perf_counter()
    return lowered.compile(), time.perf_counter() - began


def lengths(config):
    """{the most steps of a loop whose length is data: the steps to count}, for `estimate`."""
    steps = training_steps(config.model)
    return {most_steps(config.model): steps} if steps else {}


def evaluated_at_once(config, devices):
    """How many images an evaluation call has on each of `devices`, as in `evaluate`."""
    train, test = image_counts(config.data.name, config.data.dir)
    count = images_to_evaluate(config, train if config.eval.split == "train" else test)
    return min(config.eval.chunk, -(-count // devices))


def lower_update(method, config, devices):
    """The call that training makes, lowered for these devices."""
    count, shape = len(devices), jax.ShapeDtypeStruct
    train_images, _ = image_counts(config.data.name, config.data.dir)
    check_images(config, train_images)
    images = shape((train_images, 98), jnp.uint8)
    state = jax.eval_shape(partial(init_state, method, config), images)
    split = lambda x: shape((count, len(x) // count, *x.shape[1:]), x.dtype)  # noqa: E731
    state = state._replace(pool=jax.tree.map(split, state.pool))
    per_call, fresh = config.train.updates_per_call, fresh_images(config)
    indices = shape((count, per_call, fresh // count), jnp.int32)
    call = make_update_call(method, config, devices)
    return call.lower(state, images, indices, shape((), jnp.int32))


def lower_evaluation(method, config, devices):
    """The call that evaluation makes, lowered for these devices."""
    model, count, shape = method.model, len(devices), jax.ShapeDtypeStruct
    params = param_shapes(model)
    chunk, number = evaluated_at_once(config, count), shape((), jnp.int32)
    images, numbers = shape((count, chunk, 98), jnp.uint8), shape((count, chunk), jnp.int32)
    with jax.default_matmul_precision(config.eval.precision):
        return estimator(model, devices).lower(params, images, numbers, number, number)


def memory_held(memory):
    """Bytes of what a program holds, by kind, and of all of it."""
    held = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    held["all"] = sum(held.values()) + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held


def report_memory(name, result, memory, seconds, core, log):
    """Adds to the result, and logs, what one program holds in memory."""
    held = memory_held(memory)
    log(f"{name}: compiled in {seconds:.0f} s; "
        + ", ".join(f"{what} {size / 1e6:,.0f} MB" for what, size in held.items())
        + (f" of {core.memory / 1e6:,.0f}" if core.memory else ""))  # fmt: skip
    result |= {
        f"{name}_memory_bytes": held["all"],
        f"{name}_memory": held,
        f"{name}_compile_seconds": seconds,
    }


def report(name, result, counted, log):
    """Adds to the result, and logs, what one program is made of."""
    cycles = counted.once.total()
    log(f"{name}: {cycles / 1e6:.3f} M cycles")
    shares = {words: n / cycles for words, n in counted.once.most_common(10)}
    for words, share in shares.items():
        log(f"  {share:6.1%}  {words}")
    for words, size in [*counted.collectives.items(), *counted.left_out.most_common(5)]:
        log(f"  {size / 1e6:,.1f} MB without an estimate: {words}")
    result |= {
        f"{name}_cycles": cycles,
        f"{name}_call_cycles": counted.total,
        f"{name}_operations": shares,
        f"{name}_collectives": dict(counted.collectives),
        f"{name}_left_out": dict(counted.left_out),
        f"{name}_left_out_bytes": counted.left_out.total() + counted.collectives.total(),
    }


# ---- The counter --------------------------------------------------------------------------------


class Counted(NamedTuple):
    """Cycles of the whole call, with loops of unknown length counted once. Also one turn of the
    costliest such loop (over updates or samples): cycles and bytes by operation."""

    total: int
    once: Counter
    collectives: Counter
    left_out: Counter


FREE = "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"
JAX_SCOPES = (
    "while|body|cond|shard_map|closed_call|checkpoint|branch_.*|_fun|_where|.*_index_in_dim"
)


def estimate(text, bounds):
    """What the compiler estimates of a program, given its optimised HLO.

    bounds: {loop bound in the text: how often it runs}, for loops whose length is data.
    Raises VncaError where no figures are found in the text.
    """
    computations, entry = kernels.parse(text)
    named, loops = names(text), []

    @cache
    def cost(name):
        """{(a kind of figure, an operation): their sum} over a computation and what it calls."""
        total = Counter()
        for made in computations.get(name, {}).values():
            own = re.search(r'"estimated_cycles":"(\d+)"', made.line)
            if own:
                total["cycles", named(made.opcode, made.line)] += int(own[1])
            if made.opcode == "while":
                inner, turns = cost(*kernels.called(made, "body")), length(made)
                if turns is None:
                    loops.append(inner)
                total.update({key: n * (turns or 1) for key, n in inner.items()})
            elif made.opcode == "conditional":
                branches = map(cost, kernels.called(made, *kernels.BRANCHES))
                total.update(max(branches, key=cycles))
            elif made.opcode == "call":
                total.update(cost(*kernels.called(made, "to_apply")))
            elif collective := collective_begun(made):
                opcode = collective.opcode.removesuffix("-start")
                total["collectives", opcode] += kernels.result_size(collective)
            elif not own and moves(made):
                target = kernels.attribute(made, r'custom_call_target="(\w+)"')
                total["left out", target or made.opcode] += kernels.result_size(made)
        return total

    def collective_begun(made):
        """The collective that this instruction is, or that this fusion starts and does not wait
        for; else None."""
        if made.opcode.removesuffix("-start") in kernels.COLLECTIVES:
            return made
        if made.opcode == "fusion":
            [name] = kernels.called(made, "calls")
            inner = computations[name].values()
            if any('"AsyncCollectiveStart"' in of.line for of in inner):
                return next(of for of in inner if of.opcode in kernels.COLLECTIVES)
        return None

    def length(loop):
        """How often a loop runs; None where only data say."""
        known = kernels.attribute(loop, r'"known_trip_count":\{"n":"(\d+)"')
        if known:  # a scan that does nothing beyond a length in the data
            return bounds.get(int(known), int(known))
        todo, constants = kernels.called(loop, "condition"), []
        while todo:
            for inner in computations.get(todo.pop(), {}).values():
                if inner.opcode == "constant" and inner.shapes == [("s32", [])]:
                    constants.append(int(inner.argument))
                todo += kernels.called(inner, "calls", "to_apply")
        most = max(constants, default=None)
        return bounds.get(most, most)

    whole = cost(entry)
    if not cycles(whole):
        raise VncaError("the compiler's text has no estimated cycles: this libtpu writes another")
    once = max(loops, key=cycles, default=whole)
    parts = ("cycles", "collectives", "left out")
    return Counted(cycles(whole), *(figures(once, part) for part in parts))


def figures(total, kind):
    """The figures of one kind in `estimate`'s sums: {operation: sum}."""
    return Counter({words: n for (of, words), n in total.items() if of == kind})


def cycles(total):
    return figures(total, "cycles").total()


def moves(made):
    """Whether an instruction without a figure is one that moves arrays or computes."""
    if made.opcode == "custom-call":
        return not any(f'"{free}"' in made.line for free in FREE)
    return not (made.opcode.endswith("-done") or made.opcode in kernels.NO_KERNEL)


def names(text):
    """A function that names an operation as our code does: file, function, operation of JAX."""

    def table(title):
        part = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, re.M)
        return dict(line.split(" ", 1) for line in part[1].splitlines()) if part else {}

    files, functions = table("FileNames"), table("FunctionNames")
    places, frames = table("FileLocations"), table("StackFrames")
    ours = f"{Path(__file__).parent.parent}"

    @cache
    def place(frame):
        """The innermost function of ours at a frame of the stack."""
        here = dict(re.findall(r"(\w+)=(\d+)", frames.get(frame, "")))
        at = dict(re.findall(r"(\w+)=(\d+)", places.get(here.get("file_location_id"), "")))
        file = files.get(at.get("file_name_id"), "").strip('"')
        if file.startswith(ours):
            function = functions[at["function_name_id"]].strip('"').replace(".<locals>", "")
            return f"{Path(file).name} {function}"
        parent = int(here.get("parent_frame_id", 0)) - 1  # written one too large
        return place(str(parent)) if parent > 0 else "XLA"

    def name(opcode, line):
        of = re.search(r'op_name="([^"]*)"', line)
        frame = re.search(r"stack_frame_id=(\d+)", line)
        backward = ", backward" if of and "transpose(" in of[1] else ""
        *scopes, words = of[1].split("/") if of else [opcode]
        scopes = [found[1] for scope in scopes if (found := re.search(r"(\w+)\)*$", scope))]
        scopes = [scope for scope in scopes if not re.fullmatch(JAX_SCOPES, scope)]
        where = place(frame[1]) if frame else "XLA"
        return f"{' '.join([where, *scopes[-1:]])}: {words}{backward}"

    return name
