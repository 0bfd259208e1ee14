"""The programs that a TPU or a GPU would run, compiled where there is none: do they fit its memory,
and about how long do they take?

XLA's compilers need neither the device nor a driver. For a TPU, the compiler writes the cycles that
it estimates beside the operations of the optimised HLO; here they are summed. For a GPU, the
kernels that the card runs are counted, and each is taken to need the longest of three times: its
bytes at 85% of the card's rate, its FLOP at 60% of the card's peak, and 2.5 µs to start. This
leaves out caches, and what cuDNN and the autotuner choose on the card. The times of a TPU and of a
GPU are not measured: use them to compare programs.

A new card takes an entry in CARDS. A new TPU takes one in TPUS and, if it is known, in CORES.
"""

import importlib.util
import os
import re
import time
from collections import Counter, defaultdict
from functools import cache
from math import inf, prod
from operator import itemgetter
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from vnca.program import VncaError, machine, store
from vnca.program.arithmetic import mean_steps
from vnca.program.clock import MOST
from vnca.program.data import training_images
from vnca.program.evaluate import estimator
from vnca.program.learner import make_learner, param_shapes, stored_shapes, update_shapes
from vnca.program.stop import say
from vnca.training import make_update_call

TPUS = "v5e:2x4 (hosted notebooks), v3:2x2 (the reproduction), v4:2x2x1, v5p:2x2x1, v6e:2x4"
PREALLOCATED = 0.75  # of a card's memory, which JAX takes at its start unless told otherwise
CORE_SECONDS = (
    "Seconds, if any, are estimated by XLA: for the reproduction's three models on a TPU v3-8, "
    "they were 0.96, 0.82 and 0.45 of the reported times."
)
CARD_SECONDS = "Seconds are an estimate from the card's data sheet, without its caches."
FORMS = {int: ",", float: ",.4g"}
ENVIRONMENT = {  # read by the compilers when they are loaded
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for those who have a TPU
    "TPU_SKIP_MDS_QUERY": "1",  # else it waits for a metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class Core(NamedTuple):
    """What JAX calls a device of a TPU."""

    memory: int | None = None  # bytes that a program can have
    clock: float | None = None  # cycles/s; None: what XLA estimates for it is not known to be right


CORES = {  # a v2 or v3 chip has two cores, which share its memory
    "TPU v2": Core(8 * 10**9),
    "TPU v3": Core(16 * 10**9, 0.94e9),
    "TPU v4": Core(32 * 10**9),
    "TPU v5 lite": Core(16 * 10**9, 1.5e9),
    "TPU v5": Core(95 * 10**9),
    "TPU v6 lite": Core(32 * 10**9),
}


class Card(NamedTuple):
    """A GPU. FLOP/s are dense, two per multiply-add, for products of float32 at default precision
    (TF32 where the card has it; products in bfloat16 are taken at this rate, too), and in float32
    itself."""

    name: str  # JAX's device kind
    capability: tuple  # compute capability
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each
    threads: int  # each can hold
    shared: int  # KiB of shared memory of each
    l2: int  # MiB
    clock: float  # GHz
    memory: int  # bytes that a program can have
    rate: float  # bytes/s
    tf32: float
    float32: float


# Each number was compared with quotations of the documents that are named beside its card. The
# documents themselves were not at hand. Where a data sheet gives FLOP/s with sparsity, half of them
# are here. "The driver" means what it reports of such a card; the memory that it reports differs by
# about 1% between its versions. Lanes, threads and shared memory: NVIDIA's tuning guides for
# Turing, Ampere and Ada, and XLA's own descriptions of the A100 and the H100 (its folder
# gpu/target_config/specs).
CARDS = {
    # NVIDIA's Turing whitepaper, table 5. The T4's data sheet of 2019 has 300 GB/s, but the driver
    # reports 256 bits at 5 GHz, which is 320 GB/s at both edges. L2 and memory: the driver.
    "t4": Card(
        "Tesla T4", (7, 5), 40, 64, 1024, 64, 4, 1.59, 15_642_329_088,
        rate=320e9, tf32=8.1e12, float32=8.1e12,  # it has no TF32
    ),
    # NVIDIA's A100 whitepaper, table 4. Memory: the driver.
    "a100": Card(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 164, 40, 1.41, 42_505_273_344,
        rate=1555e9, tf32=156e12, float32=19.5e12,
    ),
    # NVIDIA's L4 data sheet. Cores, L2, clock and memory: the driver.
    "l4": Card(
        "NVIDIA L4", (8, 9), 58, 128, 1536, 100, 48, 2.04, 23_612_293_120,
        rate=300e9, tf32=60e12, float32=30.3e12,
    ),
    # NVIDIA's Ada whitepaper, version 2.1, table 2. Memory: the driver.
    "rtx4090": Card(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 1536, 100, 72, 2.52,
        25_386_352_640, rate=1008e9, tf32=82.6e12, float32=82.6e12,
    ),
    # NVIDIA's H100 whitepaper, version 1.04, table 3; FLOP/s rounded. Memory: XLA's description.
    "h100": Card(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228, 50, 1.98, 84_942_979_072,
        rate=3352e9, tf32=495e12, float32=67e12,
    ),
}  # fmt: skip


# ---- The mode ------------------------------------------------------------------------------------


def compile(run):
    """Compiles the update and evaluation calls of the run's config for a topology; writes
    compile.json and both programs, optimised HLO, in the workdir.

    Raises VncaError for a topology that is not known, a compiler that is not installed, or a batch
    that the devices do not divide.
    """
    config, topology = run.config, run.topology
    devices, card = devices_of(topology)
    kind, platform = (card.name, "gpu") if card else (devices[0].device_kind, "tpu")
    device = card or CORES.get(kind, Core())
    machine.check_batch(config, len(devices))
    machine.fit(config, platform)
    images = training_images(config)
    machine.check_images(config, images)
    learner = make_learner(config, run.plain, platform, kind)
    result = {
        "topology": topology,
        "devices": len(devices),
        "device": kind,
        "memory_bytes_of_a_device": device.memory,
        "jax": jax.__version__,
        "config": config.to_dict(),
    }
    bounds = {}
    # A GPU's program has no loop over steps: all of them count.
    if config.train.pool_size and not card:
        bounds[learner.model.max_steps] = mean_steps(learner.model)
    say(f"compiling for {len(devices)} × {kind}")
    for name, lowered in (
        ("update", lowered_update(learner, config, devices, images)),
        ("evaluation", lowered_evaluation(learner, config, devices)),
    ):
        began = time.perf_counter()
        program = lowered.compile()
        figures = {"compile_seconds": time.perf_counter() - began}
        text = program.as_text()
        path = run.workdir / f"{name}.hlo.txt"
        store.write(path, lambda file, text=text: file.write(text.encode()))
        figures |= memory_of(program.memory_analysis(), device)
        if card or device.clock:
            try:
                figures |= count(text, device, bounds)
            except (LookupError, TypeError, ValueError) as fault:  # HLO has no specification
                say(f"{name}: its text is not understood, so no time is known: {fault!r}")
        for what, value in figures.items():
            result[f"{name}_{what}"] = value
            say(f"{name}_{what:32}{value:{FORMS.get(type(value), '')}}")
    say(CARD_SECONDS if card else CORE_SECONDS)
    store.write_json(run.workdir / "compile.json", result)
    say(f"written to {run.workdir}: compile.json, update.hlo.txt, evaluation.hlo.txt")


def devices_of(topology):
    """The devices of a topology that this machine does not have; and for GPUs their Card, else
    None."""
    os.environ |= ENVIRONMENT
    name, _, number = topology.lower().partition(":")
    if card := CARDS.get(name):
        known = number in map(str, range(1, 17)) or ":" not in topology
        compiler, extra, platform = "jax_cuda12_plugin", "gpu-compiler", "cuda"
        options = {"target_config": target_config(card), "topology": f"1x1x{number or 1}"}
    else:
        known = re.match(r"v\d", name)
        compiler, extra, platform = "libtpu", "tpu", "tpu"
        one_host = {"chips_per_host_bounds": (2, 4, 1)}
        options = one_host if topology in ("v5e:2x4", "v6e:2x4") else {}
    if not known:
        raise VncaError(
            f"--topology={topology}: GPUs are {', '.join(CARDS)}, and up to 16 of them such as "
            f"h100:8; TPUs such as {TPUS}"
        )
    if not importlib.util.find_spec(compiler):
        raise VncaError(f"--topology={topology} needs a compiler: pip install -e '.[{extra}]'")
    try:
        description = topologies.get_topology_desc(topology, platform, **options)
        return tuple(description.devices), card
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as fault:
        reason = str(fault).split("\n")[0]
        raise VncaError(f"--topology={topology}: {reason}; TPUs such as {TPUS}") from fault


def target_config(card):
    """The card as XLA's compiler knows it: a GpuTargetConfigProto, in text."""
    major, minor = card.capability
    return f"""
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{card.name}"
        gpu_device_info {{
          name: "{card.name}" device_vendor: "NVIDIA Corporation"
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          platform_version: "Compute Capability {major}.{minor}"
          threads_per_block_limit: 1024 threads_per_warp: 32
          threads_per_core_limit: {card.threads}
          shared_memory_per_block: 49152 shared_memory_per_core: {card.shared << 10}
          shared_memory_per_block_optin: {card.shared - (major > 7) << 10}
          core_count: {card.cores} fpus_per_core: {card.lanes} clock_rate_ghz: {card.clock}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {int(card.rate)} l2_cache_size: {card.l2 << 20}
          device_memory_size: {card.memory} device_address_bits: 64
          pcie_bandwidth: 34359738368 driver_version: "13.0.0" runtime_version: "12.8.0"
          compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
        }}"""


def lowered_update(learner, config, devices, images):
    """The call that training makes with so many training images, lowered for these devices."""
    shape = jax.ShapeDtypeStruct
    state, stored, indices = update_shapes(learner, config, images, len(devices))
    pool = jax.tree.map(lambda x: shape((len(devices), *x.shape), x.dtype), state.pool)
    updates = config.train.updates_per_call or MOST
    indices = shape((len(devices), updates, *indices.shape), indices.dtype)
    call = make_update_call(learner, config, devices)
    return call.lower(state._replace(pool=pool), stored, indices, np.int32(1))


def lowered_evaluation(learner, config, devices):
    """The call that evaluation makes, lowered for these devices."""
    params = param_shapes(learner.model)
    images = len(devices), config.eval.chunk
    stored, indices = stored_shapes(learner.model, *images), np.zeros(images, np.int32)
    with jax.default_matmul_precision(config.eval.precision):
        call = estimator(learner.model, devices)
        return call.lower(params, stored, indices, np.int32(1), np.int32(0))


def memory_of(memory, device):
    """What a program holds in memory, in bytes, and whether it fits a device (None: not known), of
    a card in what JAX takes of it. memory: JAX's analysis of the program."""
    held = {
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
    }
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = sum(held.values()) + results
    share = PREALLOCATED if isinstance(device, Card) else 1
    fits = device.memory and total <= share * device.memory
    return held | {"memory_bytes": total, "fits": fits}


# ---- The reader of HLO ---------------------------------------------------------------------------

LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, (.*))?$")
NO_KERNEL = (
    "while", "conditional", "call", "async-start", "parameter", "constant", "iota", "tuple",
    "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
)  # fmt: skip


class Instruction(NamedTuple):
    """A line `[ROOT] %name = result opcode(operands), attributes` of the text."""

    root: str
    name: str
    result: str  # its type: dtype[dimensions], or a tuple of those
    opcode: str
    operands: str
    attributes: str


def parse(text):
    """{name of a computation: {name: Instruction}}, and the name of the entry."""
    computations, entry = {}, None
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            body = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := LINE.match(line):
            body[match[2]] = Instruction(*match.groups(""))
    return computations, entry


def names(text):
    """The names of the instructions or computations in a part of a line."""
    return re.findall(r"%([\w.\-]+)", text)


def attribute(instruction, pattern):
    """The first group of a pattern in an instruction's attributes, or ""."""
    match = re.search(pattern, instruction.attributes)
    return match[1] if match else ""


def called(instruction, role):
    """The names of the computations that an instruction calls in a role, a pattern: "body", …"""
    return names(attribute(instruction, rf"\b(?:{role})=(%[\w.\-]+|\{{[^}}]*)"))


def arrays(text):
    """(bits of a number, dimensions) of each array in a type."""
    matches = re.findall(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\]", text)
    return [(int(bits or 8), [int(n) for n in dims.split(",") if n]) for bits, dims in matches]


def size(*types):
    """Bytes of all arrays in some types."""
    return sum(bits * prod(dims) // 8 for bits, dims in arrays(" ".join(types)))


def count(text, device, bounds):
    """What a program does in one turn of its costliest loop of unknown length, which is an update
    or a sample of all images: a Counter of its "seconds" and, on a Core, its "cycles" by XLA's
    estimate, or, on a Card, its "kernels", "bytes" and "flops".

    bounds: {bound of a loop in the text: how often to count it}, where the length is data. Of a
    conditional, the costliest branch counts. Raises LookupError, TypeError or ValueError for a text
    that is written in another way, and ValueError if it holds no figures.
    """
    computations, entry = parse(text)
    by_seconds = itemgetter("seconds")
    turns = []  # of the loops of unknown length

    @cache
    def cost(name):
        total = Counter()
        for instruction in computations[name].values():
            if instruction.opcode == "while":
                length = length_of(computations, instruction)
                turn = cost(called(instruction, "body")[0])
                if not length:
                    turns.append(turn)
                times = bounds.get(length, length or 1)
                total.update({figure: times * number for figure, number in turn.items()})
            elif instruction.opcode == "conditional":
                branches = map(cost, called(instruction, r"\w+_computations?"))
                total.update(max(branches, key=by_seconds))
            elif instruction.opcode in ("call", "async-start"):
                total.update(cost(called(instruction, "to_apply|calls")[0]))
            if isinstance(device, Card):
                total.update(kernel(computations, computations[name], instruction, device))
            elif cycles := int(attribute(instruction, r'"estimated_cycles":"(\d+)"') or 0):
                total.update({"cycles": cycles, "seconds": cycles / device.clock})
        return total

    call = cost(entry)
    if not by_seconds(call):
        raise ValueError("it holds no figures")
    return max(turns, key=by_seconds, default=call)


def length_of(computations, loop):
    """How often a loop runs; 0 where only data say."""

    def constants(name):
        for instruction in computations[name].values():
            if instruction.opcode == "constant" and instruction.result.startswith("s32[]"):
                yield int(instruction.operands)
            for inner in called(instruction, "calls|to_apply"):
                yield from constants(inner)

    known = attribute(loop, r'"known_trip_count":\{"n":"(\d+)"')
    return int(known or max(constants(called(loop, "condition")[0]), default=0))


# ---- Kernels -------------------------------------------------------------------------------------


def kernel(computations, body, instruction, card):
    """{figure: number} of an instruction in `body`, {} if it is no kernel. A kernel reads its
    operands and writes its results once: of a sliced operand only the slice counts, of a result
    updated in place only the update, and the libraries' scratch memory is left out."""
    if instruction.opcode in NO_KERNEL or instruction.opcode.endswith("-done"):
        return {}
    if instruction.opcode == "fusion":
        moved = fusion_bytes(computations[called(instruction, "calls")[0]])
    else:
        scratch = r"\b[us]8\[\d+\]" if instruction.opcode == "custom-call" else "$"
        results = re.sub(scratch, "", instruction.result)
        moved = size(results, *(body[name].result for name in names(instruction.operands)))
    products = list(products_in(computations, body, instruction))
    flops = sum(flops_of(*product) for product in products)
    precision = r'operand_precision"?[=:][{\[]"?(\w+)'
    exact = any(attribute(part, precision).lower() == "highest" for _, part in products)
    peak = card.float32 if exact else card.tf32
    seconds = max(moved / (0.85 * card.rate), flops / (0.6 * peak), 2.5e-6)
    return {"kernels": 1, "bytes": moved, "flops": flops, "seconds": seconds}


def products_in(computations, body, instruction):
    """Yields (computation, instruction): an instruction of `body`, or those inside of a fusion."""
    if instruction.opcode == "fusion":
        inner = computations[called(instruction, "calls")[0]]
        for part in inner.values():
            yield from products_in(computations, inner, part)
    else:
        yield body, instruction


def flops_of(body, instruction):
    """The FLOP of a product or a call of cuBLAS or cuDNN, two for each multiply-add, padding
    included; 0 of anything else."""
    target = attribute(instruction, r'custom_call_target="__(cu\w+)')
    if instruction.opcode != "dot" and not target:
        return 0
    left, right = (arrays(body[name].result)[0][1] for name in names(instruction.operands)[:2])
    result = arrays(instruction.result)[0][1]
    if target != "cudnn":
        axes = attribute(instruction, r'lhs_contracting_dim\w+"?[=:][{\[]([^\]}]*)')
        return 2 * prod(result) * prod(left[int(axis)] for axis in re.findall(r"\d+", axes))
    # Each cell of the convolution's own output is a sum over taps and input channels. In a backward
    # pass that output is an operand: the right one for the kernel, the left one for the input.
    backward = {"BackwardFilter": (right, result), "BackwardInput": (left, right)}
    output, taps = backward.get(attribute(instruction, r"\$conv(\w+)"), (result, right))
    return 2 * prod(output) * prod(taps) // taps[attribute(instruction, r"_(\w+)->").index("o")]


def fusion_bytes(inner):
    """Bytes that a fusion reads and writes; inner: the computation that it calls."""
    source = {}  # what a value is another name of
    reads = defaultdict(list)  # the bytes that are read of it
    for instruction in inner.values():
        operands = [source[name] for name in names(instruction.operands)]
        if instruction.opcode in ("bitcast", "reshape"):
            source[instruction.name] = operands[0]
            continue
        source[instruction.name] = instruction.name
        parts = {"dynamic-slice": size(instruction.result), "dynamic-update-slice": 0}
        for place, name in enumerate(operands):
            reads[name].append(inf if place else parts.get(instruction.opcode, inf))
    total = 0
    for instruction in inner.values():
        if instruction.opcode == "parameter":
            total += min(size(instruction.result), sum(reads[instruction.name]))
        if instruction.root:
            results = (
                names(instruction.operands) if instruction.opcode == "tuple" else [instruction.name]
            )
            for name in results:
                written = inner[source[name]]
                if written.opcode == "dynamic-update-slice":
                    written = inner[names(written.operands)[1]]
                total += size(written.result)
    return total
