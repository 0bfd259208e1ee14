"""The program that a GPU would run, compiled where there is none, and the least time that it takes.

XLA's GPU compiler needs neither a GPU nor a driver. What is said of the program's time here is a
floor, from its own kernels, bytes and FLOP and from the card's data sheet. It is neither an
estimate by XLA nor a measurement: caches, and what cuDNN and the autotuner choose on the card
itself, are not in it. It is good for comparing two programs.
"""

import importlib.metadata
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib.version
from jax.experimental import topologies

from vnca.program import VncaError, files, first_line
from vnca.program.arithmetic import most_steps, training_steps
from vnca.program.machine import check_batch, fit_to_machine
from vnca.program.method import make_method
from vnca.program.quiet import quiet
from vnca.report import compile, kernels

NVCC = "12.9.86"  # of the PyPI package nvidia-cuda-nvcc-cu12, which has ptxas and libdevice
PREALLOCATED = 0.75  # of a card's memory, which JAX takes at its start unless told otherwise
FLOOR = (
    "a floor from the program's bytes and FLOP and the card's data sheet, neither an estimate by "
    "XLA nor a measurement; caches and the autotuner's choices are not in it"
)


class Card(NamedTuple):
    """A GPU. FLOP/s are dense, two per multiply-add, for float32 products at default precision
    (TF32 where the card has it), float32 itself and bfloat16 (None: emulated)."""

    name: str  # JAX's device kind
    capability: tuple  # compute capability
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each
    threads: int  # each can hold
    shared: int  # bytes of shared memory of each
    shared_of_block: int  # bytes that one block may have of it
    l2: int  # bytes
    clock: float  # GHz
    memory: int  # bytes that a program can have
    rate: float  # bytes/s
    tf32: float
    float32: float
    bfloat16: float | None


# Each number was compared with quotations of the documents that are named above its card. The
# documents themselves were not at hand. Where a data sheet gives FLOP/s with sparsity, half of them
# are here. Products in bfloat16 are summed in float32: on GeForce cards that takes twice the time
# of sums in float16. "The driver" means what it reports of such a card. The memory that it reports
# differs by about 1% between its versions.
# Lanes, threads and shared memory: NVIDIA's tuning guides for Turing, Ampere and Ada, and XLA's own
# descriptions of cards for the A100 and the H100 (its folder gpu/target_config/specs).
KIB, MIB = 1 << 10, 1 << 20
TURING = {"capability": (7, 5), "lanes": 64, "threads": 1024}
TURING |= {"shared": 64 * KIB, "shared_of_block": 64 * KIB}
AMPERE = {"capability": (8, 0), "lanes": 64, "threads": 2048}
AMPERE |= {"shared": 164 * KIB, "shared_of_block": 163 * KIB}
AMPERE_RTX = {"capability": (8, 6), "lanes": 128, "threads": 1536}
AMPERE_RTX |= {"shared": 100 * KIB, "shared_of_block": 99 * KIB}
ADA = AMPERE_RTX | {"capability": (8, 9)}
HOPPER = {"capability": (9, 0), "lanes": 128, "threads": 2048}
HOPPER |= {"shared": 228 * KIB, "shared_of_block": 227 * KIB}
CARDS = {
    # NVIDIA's Turing whitepaper, table 5. The T4's data sheet of 2019 has 300 GB/s, but the driver
    # reports 256 bits at 5 GHz, which is 320 GB/s at both edges. L2 and memory: the driver.
    "t4": Card(
        "Tesla T4", **TURING, cores=40, l2=4 * MIB, clock=1.59, memory=15_642_329_088,
        rate=320e9, tf32=8.1e12, float32=8.1e12, bfloat16=None,
    ),
    # NVIDIA's whitepaper on GA102, version 2, table 9, its clock by one quotation alone. L2 and
    # memory: the driver.
    "rtx3090": Card(
        "NVIDIA GeForce RTX 3090", **AMPERE_RTX, cores=82, l2=6 * MIB, clock=1.695,
        memory=25_438_126_080, rate=936e9, tf32=35.6e12, float32=35.6e12, bfloat16=71e12,
    ),
    # NVIDIA's A100 whitepaper, table 4. Memory: the driver.
    "a100": Card(
        "NVIDIA A100-SXM4-40GB", **AMPERE, cores=108, l2=40 * MIB, clock=1.41,
        memory=42_505_273_344, rate=1555e9, tf32=156e12, float32=19.5e12, bfloat16=312e12,
    ),
    # NVIDIA's A100 data sheet. L2, clock and memory: XLA's description.
    "a100-80gb": Card(
        "NVIDIA A100-SXM4-80GB", **AMPERE, cores=108, l2=40 * MIB, clock=1.41,
        memory=85_100_068_864, rate=2039e9, tf32=156e12, float32=19.5e12, bfloat16=312e12,
    ),
    # NVIDIA's L4 data sheet. Cores, L2, clock and memory: the driver.
    "l4": Card(
        "NVIDIA L4", **ADA, cores=58, l2=48 * MIB, clock=2.04, memory=23_612_293_120,
        rate=300e9, tf32=60e12, float32=30.3e12, bfloat16=121e12,
    ),
    # NVIDIA's Ada whitepaper, version 2.1, table 2. Memory: the driver.
    "rtx4090": Card(
        "NVIDIA GeForce RTX 4090", **ADA, cores=128, l2=72 * MIB, clock=2.52,
        memory=25_386_352_640, rate=1008e9, tf32=82.6e12, float32=82.6e12, bfloat16=165.2e12,
    ),
    # NVIDIA's H100 whitepaper, version 1.04, table 3; FLOP/s rounded. Memory: XLA's description.
    "h100": Card(
        "NVIDIA H100 80GB HBM3", **HOPPER, cores=132, l2=50 * MIB, clock=1.98,
        memory=84_942_979_072, rate=3352e9, tf32=495e12, float32=67e12, bfloat16=989e12,
    ),
    # NVIDIA's H200 data sheet. Cores, L2 and clock: XLA's description. Memory: the driver.
    "h200": Card(
        "NVIDIA H200", **HOPPER, cores=132, l2=50 * MIB, clock=1.98, memory=150_110_011_392,
        rate=4800e9, tf32=495e12, float32=67e12, bfloat16=989e12,
    ),
}  # fmt: skip


# ---- The compiler --------------------------------------------------------------------------------


def is_card(topology):
    """Whether a topology names GPUs: a card, or a card and its count on one host ("h100:8")."""
    return topology.partition(":")[0].lower() in CARDS


def parse_topology(topology):
    """The Card and the number of cards that "h100" or "h100:8" names."""
    name, _, number = topology.lower().partition(":")
    if not number:
        return CARDS[name], 1
    if not number.isdecimal() or not 1 <= int(number) <= 16:
        raise VncaError(f"--topology={topology}: 1 to 16 cards of one host, such as {name}:8")
    return CARDS[name], int(number)


def check_installed():
    """Raises VncaError unless XLA's GPU compiler is installed, in the version of JAX."""
    wanted = {
        "jax-cuda12-plugin": jaxlib.version.__version__,
        "jax-cuda12-pjrt": jaxlib.version.__version__,
        "nvidia-cuda-nvcc-cu12": None,
    }
    for package, version in wanted.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if not found or version and found != version:
            commands = [f"{p}=={v or NVCC}" for p, v in wanted.items()]
            raise VncaError(
                f"--topology needs {package}{f' {version}' if version else ''}, but "
                f"{f'{found} is' if found else 'it is not'} installed: "
                f"{sys.executable} -m pip install --no-deps {' '.join(commands)}"
            )


def devices_of(topology):
    """The devices of a topology that this machine does not have, and their Card."""
    card, number = parse_topology(topology)
    check_installed()
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # or the plugin asks for a driver
    try:
        with quiet():
            target = target_config(card)
            shape = f"1x1x{number}"
            found = topologies.get_topology_desc(
                topology, "cuda", target_config=target, topology=shape
            )
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as fault:
        raise VncaError(
            f"--topology={topology}: {first_line(fault)}; known: {', '.join(CARDS)}"
        ) from fault
    return tuple(found.devices), card


def target_config(card):
    """The card as XLA's compiler knows it: a GpuTargetConfigProto, in text."""
    major, minor = card.capability
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": card.threads,
        "shared_memory_per_block": 48 * KIB,
        "shared_memory_per_core": card.shared,
        "shared_memory_per_block_optin": card.shared_of_block,
        "core_count": card.cores,
        "fpus_per_core": card.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": int(card.rate),
        "l2_cache_size": card.l2,
        "clock_rate_ghz": card.clock,
        "device_memory_size": card.memory,
        "device_address_bits": 64,
        "pcie_bandwidth": 32 << 30,
        "name": f'"{card.name}"',
        "device_vendor": '"NVIDIA Corporation"',
        "platform_version": f'"Compute Capability {major}.{minor}"',
        "driver_version": '"13.0.0"',  # any that the toolkit of NVCC runs with
        "runtime_version": '"12.8.0"',
        "compile_time_toolkit_version": '"12.8.0"',
        "dnn_version": '"9.10.0"',  # cuDNN
    }
    fields = " ".join(f"{field}: {value}" for field, value in device.items())
    return (
        f"gpu_device_info {{ {fields} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} '
        f'device_description_str: "{card.name}"'
    )


# ---- The floor -----------------------------------------------------------------------------------


def seconds_on(card):
    """kernel -> the least seconds that it takes: the longest of its bytes at 85% of the card's
    rate, its FLOP at 60% of its peak, and the 2.5 µs that it takes to start a kernel.

    Products in bfloat16 are taken at the rate of TF32, although the card may have a higher one.
    """

    def seconds(kernel):
        peak = card.float32 if kernel.exact else card.tf32
        return max(kernel.bytes / (0.85 * card.rate), kernel.flops / (0.6 * peak), 2.5e-6)

    return seconds


def peak(card, config, program):
    """The card's FLOP/s at the precision in which a program multiplies."""
    if program == "evaluation":
        return card.float32 if config.eval.precision == "highest" else card.tf32
    return (card.bfloat16 or card.float32) if config.train.dtype == "bfloat16" else card.tf32


def caveats(card, dtype):
    """What one should know of training on a card in this dtype: lines."""
    if card.capability < (8, 0):
        yield f"{card.name}: no TF32, float32 is multiplied in float32"
        if dtype == "bfloat16":
            yield f"{card.name}: bfloat16 is emulated there, and no faster; float32 is better"


# ---- The mode ------------------------------------------------------------------------------------


def compile_for(topology, config, workdir, log, make_method=make_method):
    """Compiles the config's update and evaluation calls for GPUs that need not be here; writes
    compile.json and both programs, optimised HLO, in `workdir`. Raises VncaError where the compiler
    is missing, or the topology is not one. For TPUs, see `vnca.report.compile.compile_for`."""
    if re.match(r"v\d", topology):
        return compile.compile_for(topology, config, workdir, log, make_method)
    if not is_card(topology):
        cards, tpus = ", ".join(CARDS), compile.SOME_TOPOLOGIES
        raise VncaError(f"--topology={topology}: GPUs are {cards}; TPUs such as {tpus}")
    devices, card = devices_of(topology)
    check_batch(config, len(devices))
    config = fit_to_machine(config, "gpu", len(devices), card.name)
    method = make_method(config, platform="cuda", device_kind=card.name)
    files.make_folder(workdir)
    result = compile.subject(topology, card.name, config, len(devices)) | {
        "seconds_are": FLOOR,
        "memory_bytes_of_a_card": card.memory,
    }
    log(f"compiling for {len(devices)} × {card.name}; times are {FLOOR}")
    for line in caveats(card, config.train.dtype):
        log(line)
    if "train_steps" in config.model:
        result["steps"] = most_steps(config.model)
        mean = training_steps(config.model)
        log(f"an update's {result['steps']} steps are all counted; in training {mean} are the mean")
    for name in "update", "evaluation":
        program, seconds = compile.compiled(name, method, config, devices)
        result[f"{name}_compile_seconds"] = seconds
        result |= report_memory(name, program.memory_analysis(), card, log)
        text = program.as_text()
        files.write_bytes(Path(workdir, f"{name}.hlo.txt"), text.encode())
        try:
            counted = kernels.count(text, seconds_on(card), compile.names(text))
        except (ValueError, LookupError) as fault:  # a text that is written in another way
            log(f"{name}: not counted, as its text is not understood: {fault!r}")
        else:
            result |= report(name, counted, peak(card, config, name), log)
    files.write_json(Path(workdir) / "compile.json", result)
    log(f"written to {workdir}: compile.json, update.hlo.txt, evaluation.hlo.txt")


def report_memory(name, memory, card, log):
    """Logs what one program holds in a card's memory; returns it as a result's fields."""
    held = compile.memory_held(memory)
    share = held["all"] / card.memory
    fits = "fits" if share <= PREALLOCATED else "does not fit"
    log(f"{name}: memory {held['all'] / 1e9:.2f} GB of {card.memory / 1e9:.1f} ("
        + ", ".join(f"{what} {size / 1e9:.2f}" for what, size in held.items() if what != "all")
        + f"); it {fits} in the {PREALLOCATED:.0%} that JAX takes by default")  # fmt: skip
    return {f"{name}_memory_bytes": held["all"], f"{name}_memory": held}


def report(name, counted, peak, log):
    """Logs what a program does, each loop of unknown length once; returns it as a result's
    fields."""
    what = "one update" if name == "update" else "evaluation, one sample of each image"
    fraction = counted.flops / counted.seconds / peak
    log(f"{what}: {counted.kernels:,} kernels, {counted.bytes / 1e9:.2f} GB, "
        f"{counted.flops / 1e12:.3f} TFLOP, floor {1e3 * counted.seconds:.2f} ms, "
        f"{fraction:.0%} of peak")  # fmt: skip
    for opcode, times in counted.collectives.items():
        log(f"  {times} × {opcode}, {counted.collective_bytes[opcode] / 1e6:,.1f} MB")
    dearest = counted.operations.most_common(10)
    for operation, seconds in dearest:
        log(f"  {seconds / counted.seconds:6.1%}  {operation}")
    return {
        f"{name}_kernels": counted.kernels,
        f"{name}_bytes": counted.bytes,
        f"{name}_flops": counted.flops,
        f"{name}_floor_seconds": counted.seconds,
        f"{name}_fraction_of_peak": fraction,
        f"{name}_collectives": dict(counted.collectives),
        f"{name}_collective_bytes": dict(counted.collective_bytes),
        f"{name}_operations": {words: s / counted.seconds for words, s in dearest},
    }
