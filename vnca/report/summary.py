"""What a model is and computes: its arrays, its arithmetic and its memory."""

import jax

from vnca.optimizer import adam_init
from vnca.program.arithmetic import (
    cell_channels,
    hidden_channels,
    inherited_channels,
    operations,
    training_steps,
    update_flops,
)
from vnca.program.machine import fit_to_machine
from vnca.program.method import make_method, make_model
from vnca.program.order import fresh_images

PUBLISHED = {  # parameters, by model and latent size, at encoder width 32
    ("doubling", 256): 6_585_088,
    ("nondoubling", 128): 5_042_432,
    ("nondoubling", 256): 6_058_752,
    ("baseline", 256): 10_282_497,
}


def summary(config, workdir, log, make_method=make_method):
    """Prints every parameter array, every operation's arithmetic, the totals, and the memory that
    a device needs in training. Reads and writes no file."""
    del workdir
    model, settings = make_method(config).model, config.train
    params = jax.eval_shape(model.init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    log(f"{'parameters':44}{'shape':>20}{'count':>12}  initial range")
    for path, x in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = "×".join(map(str, x.shape))
        log(f"{name:44}{shape:>20}{x.size:>12,}  {_initial_range(params, path)}")
    published = PUBLISHED.get((config.model.name, config.model.latent_size))
    beside = (
        f" (published: {published:,})" if published and config.model.encoder_width == 32 else ""
    )
    log(f"{'total':44}{'':20}{count:>12,} {beside}")

    counts = operations(config.model)
    at_steps = f" at T = {config.model.steps}" if model.develop else ""
    log(f"\n{'operation, one image forward' + at_steps:44}{'multiply-adds':>20}{'share':>12}")
    for name, macs in counts.items():
        log(f"{name:44}{macs:>20,}{macs / sum(counts.values()):>12.2%}")
    log(f"{'total':44}{sum(counts.values()):>20,}")
    if model.develop:
        mean = sum(operations(config.model, training_steps(config.model)).values())
        log(f"{f'total at T = {training_steps(config.model)}, the mean in training':44}{mean:>20,}")
    log(
        f"{'update: forward, backward, batch of ' + str(settings.batch_size):44}"
        f"{update_flops(config) / 1e9:>20,.1f} GFLOP"
    )
    log("every kernel tap counts, also on padding; biases, ELUs and the likelihood do not")

    devices = jax.device_count()
    of = "the device" if devices == 1 else f"each of {devices} devices"
    log(f"\nmemory of {of} in training, MiB, float32")
    for name, numbers in memory(config, devices).items():
        log(f"{name:76}{numbers * 4 / 2**20:>12,.1f}")
    log(f"{'training images, packed bits':76}{60_000 * 98 / 2**20:>12,.1f}")


def memory(config, devices):
    """What training holds on each of so many devices: {words: float32 numbers}."""
    model, settings = make_model(config.model), config.train
    params = jax.eval_shape(model.init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    local = -(-settings.batch_size // devices)
    at_once = min(local, fit_to_machine(config).train.micro_batch)
    held = {
        "parameters": count,
        "optimizer (Adam's two moments)": sum(
            x.size for x in jax.tree.leaves(jax.eval_shape(adam_init, params))
        ),
        "gradient: a micro-batch's, and the sum": 2 * count,
        f"activations kept for the gradient, {at_once} of {local} images at once": (
            kept_activations(config) * at_once
        ),
    }
    if model.develop:
        steps = max(config.model.steps, *config.model.train_steps)
        nca = sum(x.size for x in jax.tree.leaves(params["decoder"]))
        held[f"kernels kept for the gradient by lax.cond, for each of {steps} steps"] = steps * nca
        # All of a batch but its fresh images taken, and all of it put back: once whole, as any
        # device may hold a row of the pool, and once this device's share.
        rows = 2 * settings.batch_size - fresh_images(config)
        rows += -(-rows // devices)
        grid = 1024 * cell_channels(config.model)
        held["cells taken from the pool and results"] = rows * grid
        pool = settings.pool_size * grid
        held[f"pool, split over {devices} device{'s' * (devices > 1)}"] = pool // devices
    return held


def kept_activations(config):
    """Numbers that the gradient keeps of one image: what each layer's gradient needs of its input
    and output, counted by hand."""
    model, width, latent = config.model, config.model.encoder_width, config.model.latent_size
    encoder = 1024 + sum((1024 >> 2 * i) * (width << i) for i in range(5)) + 3 * latent
    if model.name == "baseline":
        return encoder + latent + sum((4 << 2 * i) * (width << 4 - i) for i in range(5)) + 28 * 28
    if model.name in ("nondoubling", "healing"):  # of each step
        # Its input and activation, and zeros, which JAX keeps as the slope of what is inherited.
        widths = cell_channels(model) + hidden_channels(model) + inherited_channels(model)
        return encoder + max(model.steps, *model.train_steps) * widths * 1024
    cells = model.steps_per_doubling * sum(4**k for k in range(1, model.doublings + 1))
    return encoder + cells * 10 * latent  # the step's input, 4 × (block's input, ELU), the last


def _initial_range(params, path):
    """The bounds of an array's initial values, 1/√fan_in of its layer, as words."""
    *parent, _ = path
    layer = params
    for key in parent:
        layer = layer[getattr(key, "key", getattr(key, "idx", None))]
    kernel = layer["kernel"]
    names = [str(getattr(key, "key", "")) for key in path]
    if "decoder" in names and "residual" in names:
        return "0"
    transposed = any(name.startswith("conv_transpose") for name in names)
    inputs = kernel.shape[-1] if transposed else kernel.shape[-2]
    taps = kernel.shape[0] * kernel.shape[1] if kernel.ndim == 4 else 1
    return f"± 1/√{taps * inputs} = ± {(taps * inputs) ** -0.5:.5f}"
