"""Checks the fast form against the plain method, as training and measurements on an accelerator
do by themselves: values and gradients of a few digits, computed both ways on this machine.
"""

import contextlib
import hashlib
import json
import math
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

import vnca
from vnca import training
from vnca.images import unpack
from vnca.losses import elbo, reparametrize
from vnca.program import VncaError, files, first_line
from vnca.program.arithmetic import training_steps
from vnca.program.checkpoint import array_name
from vnca.program.config import flatten
from vnca.program.data import cache_folder, load
from vnca.program.hosts import agree, ask_all, is_first
from vnca.program.machine import CPU_DEVICES
from vnca.program.method import make_method, param_shapes

IMAGES = 8  # in the check, at least; at most twice as many: see `share`
# The largest deviations allowed. On a CPU the small models were within 1.1e-6 of the plain method
# in float32, and the quickstart within 1.5e-2 in bfloat16. A TPU sums a bias's gradient in two
# parts of bfloat16, exact to 2⁻¹⁷. "training" is the precision in which training multiplies.
TOLERANCES = {"highest": 1e-3, "training": 0.1}
EVERYTHING = "everything"  # what deviates, infinitely, if the device refuses the fast form


def deviations(found, known):
    """How far arrays are from known ones: {name: the largest difference, divided by the largest
    number of the known array}, floats; infinite where a number is not finite."""

    def deviation(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            return math.inf
        return float(abs(x - y).max(initial=0) / (abs(y).max(initial=0) or 1))

    return {name: deviation(found[name], y) for name, y in known.items()}


def named(tree, prefix):
    """The arrays of a pytree by their paths: {"prefix/decoder/perceive/kernel": array, …}."""
    return {f"{prefix}/{array_name(path)}": x for path, x in jax.tree.leaves_with_path(tree)}


def drawn_params(model):
    """Parameters with no array of zeros, as NumPy float32 arrays. Before training, an automaton's
    steps change nothing, so that its gradients are mostly zeros."""
    random = np.random.RandomState(0)

    def draw(path, x):
        limit = max(math.prod(x.shape[:-1]), 16) ** -0.5
        # Small, so that the cells of 64 steps stay in the range that training keeps them in.
        limit *= 0.1 if "residual" in jax.tree_util.keystr(path) else 1
        return random.uniform(-limit, limit, x.shape).astype(np.float32)

    return jax.tree.map_with_path(draw, param_shapes(model))


def precisions(config):
    """The precisions to check at: "highest", and "training" where training multiplies otherwise."""
    same = not is_accelerator() and config.train.dtype == "float32"
    return ("highest",) if same else ("highest", "training")


def is_accelerator():
    """Whether the devices are something other than CPUs."""
    return jax.default_backend() != "cpu"


def multiplied(precision):
    """A context in which products have this precision."""
    is_highest = precision == "highest"
    return jax.default_matmul_precision("highest") if is_highest else contextlib.nullcontext()


def micro_batch_size(batch, at_most):
    """The images in each micro-batch, as `vnca.training.accumulate` cuts a device's batch."""
    return next(batch // n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= at_most)


def share(config, devices):
    """The size of a micro-batch in the check, and the number of images, at most 16.

    Fast forms may choose by the size, so it is that of training if it is at most 16, as it is on a
    CPU. A larger one is reduced by eights to 8…15: what a form chooses for multiples of eight is
    then checked, but not what it chooses for large arrays.
    """
    local = max(config.train.batch_size // devices, 1)
    size = micro_batch_size(local, config.train.micro_batch)
    size = size if size <= 2 * IMAGES else IMAGES + size % IMAGES
    return size, size * -(-IMAGES // size)


def values(method, dtype, params, bits, noise):
    """The forward passes of packed images, uint8 [n, 98], with noise [n, latent]: mean, logvar, the
    logits of the 28×28 pixels, and in nats log p(x|z), the KL and the ELBO, each by its name. Of a
    model that can be developed, also one step from `damaged_cells`."""
    model = training.computed_in(method.model, dtype)
    x = unpack(bits)
    mean, logvar = model.encode(params, x)
    z = reparametrize(mean, logvar, noise)
    bound, log_px_z, kl = elbo(mean, logvar, model.decode(params, z), x)
    logits = model.decode(params, noise)[:, 2:-2, 2:-2]  # the baseline's border is a constant
    step = {"decoder/step": model.step(params, damaged_cells(model, noise))} if model.step else {}
    return step | {
        "encoder/mean": mean,
        "encoder/logvar": logvar,
        "decoder/logits": logits,
        "log p(x|z)": log_px_z,
        "KL": kl,
        "ELBO": bound,
    }


def damaged_cells(model, z):
    """The initial cells of z [B, latent], of which every second image has lost a square."""
    return model.initial_cells(z).at[::2, 8:24, 8:24].set(0)


def as_trained(model, steps):
    """The model, and if it can be developed, with a decoder of this many steps, as in training,
    from `damaged_cells`."""

    def decode(params, z):
        return model.develop(params, damaged_cells(model, z), steps)[..., :1]

    return model._replace(decode=decode) if model.develop else model


def gradients(method, config, dtype, micro_batch, params, bits, noise, steps):
    """Like `values`, for the gradient of the loss: each array, the loss terms, and the global norm.

    Models that can be developed take `steps` steps from damaged cells, without a pool. On a CPU,
    the others run the Method's gradient function, which draws its own noise. On accelerators, the
    gradient is JAX's, because there no Method of such a model has another.
    """
    model = as_trained(training.computed_in(method.model, dtype), steps)
    config = config.copy_and_resolve_references()
    config.train.micro_batch = micro_batch

    def loss_of(params, bits, noise):
        value, terms = training.loss(model, params, unpack(bits), noise)
        return value, (terms, ())

    def of_method(indices):
        state = training.State(params, None, None, ())
        return method.gradient(model, config, state, 1, bits, indices)

    if model.develop or is_accelerator():
        grads, terms, _ = training.accumulate(
            micro_batch, jax.grad(loss_of, has_aux=True), params, bits, noise
        )
    else:
        results = jax.vmap(of_method, axis_name="devices")(jnp.arange(len(bits))[None])
        grads, terms, _ = jax.tree.map(lambda x: x[0], results)  # of the one device
    return named(grads, "gradient") | {"loss": terms, "norm": method.global_norm(grads)}


def computed(method, config, precision, bits):
    """What `values` and `gradients` give on this process's first device, as NumPy arrays."""
    micro_batch, count = share(config, jax.device_count())
    model = method.model
    dtype = "float32" if precision == "highest" else config.train.dtype
    noise = np.random.RandomState(1).standard_normal((count, model.latent_size))
    arguments = drawn_params(model), bits[:count], noise.astype(np.float32)
    steps = jnp.int32(training_steps(config.model))
    with multiplied(precision):
        found = jax.jit(partial(values, method, dtype))(*arguments)
        found |= jax.jit(partial(gradients, method, config, dtype, micro_batch))(*arguments, steps)
        return jax.device_get(found)


def fast_against_plain(method, plain, config, precision, bits):
    """The `deviations` of a method from the plain one on this process's first device; if only the
    method's program is refused, the reason, with an infinite one.

    config: one that is fitted to the machine; bits: packed images, uint8 [16 or more, 98]. Raises
    VncaError if the device has too little free memory, or refuses the plain program too.
    """
    expected = None
    try:
        expected = computed(plain, config, precision, bits)
        found = computed(method, config, precision, bits)
    except jax.errors.JaxRuntimeError as fault:
        if "RESOURCE_EXHAUSTED" in str(fault):  # says nothing about the form, and may pass
            raise VncaError(
                "the device has too little free memory to check the fast form: stop other "
                "programs that use it, or add --plain"
            ) from fault
        if expected is None:
            raise VncaError(
                f"the device refuses the plain method ({first_line(fault)}): stop other programs "
                "that use it, or repair its driver"
            ) from fault
        return {f"{EVERYTHING} ({first_line(fault)})": math.inf}
    return deviations(found, expected)


def worst(found):
    """The name of the largest deviation, and that deviation."""
    return max(found.items(), key=lambda item: item[1])


def amount(name, off):
    """A deviation in words: its size, or why it has none. name: of what deviates."""
    if math.isfinite(off):
        return f"{off:.1e}" if off else "equal bits"
    return "refused" if name.startswith(EVERYTHING) else "not finite"


# ---- Before training and measurements ------------------------------------------------------------


def trusted(method, config, log):
    """The method, or the plain one if the two deviate on this accelerator.

    They are compared once for each `verdict_key`. The verdict is kept in the cache folder, and all
    hosts follow one. On CPUs, and where the method is the plain one already, nothing is compared:
    the tests run there. config: fitted to the machine.
    """
    plain = make_method(config, plain=True)
    if not is_accelerator() or method == plain:
        return method
    key = verdict_key(config)
    path = agree(lambda: verdict_path(key))
    verdict = agree(lambda: read_verdict(path, key))
    if verdict is None:
        log("checking the fast form on this kind of device; later runs use the verdict")
        verdict = judge(method, plain, config, log)
        keep_verdict(path, key, verdict)
    if verdict["deviates"]:
        again = f". To compare again, delete {path}" if path else ""
        log(
            "warning: the fast form is not used here, and the plain method is used instead: "
            f"{verdict['deviates']}; --mode=check has every figure{again}"
        )
        return plain
    return method


def judge(method, plain, config, log):
    """The verdict on a method, the same on every process: {"deviates": words, "" if it does not,
    "figures": {precision: [name of the worst array, deviation, tolerance]}}. Raises VncaError as
    `fast_against_plain` does."""
    bits, figures, faults = load("bundled").test[: 2 * IMAGES], {}, []
    for precision in precisions(config):
        name, off = worst(fast_against_plain(method, plain, config, precision, bits))
        limit = TOLERANCES[precision]
        figures[precision] = [name, off if math.isfinite(off) else None, limit]
        if name.startswith(EVERYTHING):
            reason = name.removeprefix(EVERYTHING)
            faults.append(f"at {precision} precision, the device refuses it{reason}")
        elif not off <= limit:
            faults.append(
                f"at {precision} precision, {name} deviates from the plain method ("
                f"{amount(name, off)}, where at most {limit:g} is allowed)"
            )
    deviates = bool(ask_all(lambda: bool(faults))())
    words = "; ".join(faults) or "it failed on another host" * deviates
    if not deviates:
        log("it agrees with the plain method")
    return {"deviates": words, "figures": figures}


def verdict_key(config):
    """What a verdict applies to, as JSON: the kind of device, the versions of JAX, of its compiler
    and of the code, the compiler's flags, the model, the dtype and the micro-batch."""
    folder = Path(vnca.__file__).parent
    sources = sorted([*folder.glob("*.py"), *folder.glob("fast/*.py")])
    sources += [Path(__file__), folder / "program" / "method.py"]  # the tolerances, and which form
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "runtime": jax.devices()[0].client.platform_version,  # libtpu or CUDA, without new jaxlib
        "flags": compiler_flags(),
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
        "model": flatten(config.model),
        "dtype": config.train.dtype,
        "micro_batch": share(config, jax.device_count())[0],
    }


def compiler_flags():
    """The flags in XLA_FLAGS, and those in LIBTPU_INIT_ARGS. They are without the number of CPU
    devices: the program sets it by the config, and no accelerator heeds it."""
    given = [os.environ.get(name, "").split() for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return [[flag for flag in flags if CPU_DEVICES not in flag] for flags in given]


def verdict_path(key):
    """The verdict's file in the cache folder, as text; None if the user has no such folder."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    try:
        return str(cache_folder() / f"checked-{digest[:16]}.json")
    except VncaError:
        return None


def read_verdict(path, key):
    """The verdict that is kept for this key, or None."""
    try:
        kept = json.loads(Path(path).read_text(encoding="utf-8"))
        return kept["verdict"] if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: it is made again
        return None


def keep_verdict(path, key, verdict):
    """Writes a verdict, on process 0, if there is a folder that it can be written to."""
    if path and is_first():
        with contextlib.suppress(OSError, VncaError):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, {"key": key, "verdict": verdict})
