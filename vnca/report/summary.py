"""The size of a model: its parameter arrays, its arithmetic and its memory in training."""

import jax
import jax.numpy as jnp

from vnca.images import IMAGE_SIZE
from vnca.optimizer import adam_init
from vnca.pool import fresh_images
from vnca.program.arithmetic import (
    cell_channels,
    most_steps,
    operations,
    training_steps,
    update_flops,
)
from vnca.program.check import as_trained, micro_batch_size
from vnca.program.checkpoint import array_name
from vnca.program.data import image_counts
from vnca.program.machine import fit_to_machine
from vnca.program.method import make_method, param_shapes
from vnca.training import batch_gradient, loss

PUBLISHED = {  # parameter counts, by model and latent size, at encoder width 32
    ("doubling", 256): 6_585_088,
    ("nondoubling", 128): 5_042_432,
    ("nondoubling", 256): 6_058_752,
    ("baseline", 256): 10_282_497,
}


def summary(config, workdir, log, make_method=make_method):
    """Prints every parameter array, the multiply-adds of every operation, the totals, and the
    memory that a device needs in training. Writes no file, and reads none but one's own images."""
    del workdir
    training_images, _ = image_counts(config.data.name, config.data.dir)
    method, settings = make_method(config), config.train
    model = method.model
    params = param_shapes(model)
    total = sum(x.size for x in jax.tree.leaves(params))
    log(f"{'parameters':44}{'shape':>20}{'count':>12}  initial range")
    for path, x in jax.tree.leaves_with_path(params):
        name = array_name(path)
        shape = "×".join(map(str, x.shape))
        log(f"{name:44}{shape:>20}{x.size:>12,}  {_initial_range(params, path)}")
    published = PUBLISHED.get((config.model.name, config.model.latent_size))
    if published and config.model.encoder_width == 32:
        log(f"{'total':44}{'':20}{total:>12,}  (published: {published:,})")
    else:
        log(f"{'total':44}{'':20}{total:>12,}")

    counts = operations(config.model)
    at_steps = f" at T = {config.model.steps}" if model.develop else ""
    log(f"\n{'operation, forward, one image' + at_steps:44}{'multiply-adds':>20}{'share':>12}")
    for name, macs in counts.items():
        log(f"{name:44}{macs:>20,}{macs / sum(counts.values()):>12.2%}")
    log(f"{'total':44}{sum(counts.values()):>20,}")
    if model.develop:
        steps = training_steps(config.model)
        mean = sum(operations(config.model, steps).values())
        log(f"{f'total at T = {steps}, the mean in training':44}{mean:>20,}")
    log(
        f"{'update, forward and backward, batch of ' + str(settings.batch_size):44}"
        f"{update_flops(config) / 1e9:>20,.1f} GFLOP"
    )
    log("Every kernel tap counts, even on padding. Biases, ELUs and the likelihood do not count.")

    devices = jax.device_count()
    where = "the device" if devices == 1 else f"each of the {devices} devices"
    log(f"\nmemory of {where} in training, MiB, float32")
    for name, count in training_memory(config, method, devices).items():
        log(f"{name:76}{count * 4 / 2**20:>12,.1f}")
    log(f"{'training images, packed bits':76}{training_images * 98 / 2**20:>12,.1f}")


def training_memory(config, method, devices):
    """The memory of each device in training with this Method: {description: number of float32
    values}."""
    model, settings = method.model, config.train
    params = param_shapes(model)
    count = sum(x.size for x in jax.tree.leaves(params))
    moments = sum(x.size for x in jax.tree.leaves(jax.eval_shape(adam_init, params)))
    local_batch = -(-settings.batch_size // devices)
    micro_batch = micro_batch_size(local_batch, fit_to_machine(config).train.micro_batch)
    activations = kept_activations(config, model)
    memory = {
        "parameters": count,
        "optimizer (Adam's two moments)": moments,
        "gradient: of a micro-batch, and the sum": 2 * count,
    }
    if not model.develop and method.gradient is not batch_gradient:  # `cpu.batch_gradient`
        encoder = kept_activations(config, model, encoder_only=True)
        activations -= encoder
        memory[f"activations of the encoder, all {local_batch} images"] = encoder * local_batch
    memory[
        f"activations for the gradient, micro-batch of {micro_batch} of {local_batch} images"
    ] = activations * micro_batch
    if model.develop:
        steps = most_steps(config.model)
        decoder = sum(x.size for x in jax.tree.leaves(params["decoder"]))
        memory[f"kernels that lax.cond keeps for the gradient of {steps} steps"] = steps * decoder
        # The rows taken, B − fresh, and the rows put back, B. Each exists once in full, because any
        # device may hold a row of the pool, and once as this device's share. Beside its share of
        # the rows taken a device has as many zeros as fresh images.
        fresh = fresh_images(config)
        rows = 2 * settings.batch_size - fresh
        rows += -(-rows // devices) + fresh // devices
        grid = 1024 * cell_channels(config.model)
        memory["cells taken from the pool, and cells put back"] = rows * grid
        pool = settings.pool_size * grid
        memory[f"pool, split over {devices} device{'s' * (devices > 1)}"] = pool // devices
    return memory


def kept_activations(config, model, encoder_only=False):
    """How many float32 values JAX keeps of one image between the loss and its gradient, with this
    model's functions, or between the encoder and its gradient. Parameters are not among them."""
    model = as_trained(model, training_steps(config.model))
    params = param_shapes(model)

    def kept(images):
        x = jax.ShapeDtypeStruct((images, IMAGE_SIZE, IMAGE_SIZE, 1), jnp.float32)
        noise = jax.ShapeDtypeStruct((images, model.latent_size), jnp.float32)

        def value(params, x, noise):
            return model.encode(params, x) if encoder_only else loss(model, params, x, noise)[0]

        def pull_back(params, *of):
            return jax.vjp(lambda params: value(params, *of), params)[1]

        pull = jax.eval_shape(pull_back, params, x, noise)
        return sum(x.size for x in jax.tree.leaves(pull) if x.dtype == jnp.float32)

    return kept(2) - kept(1)


def _initial_range(params, path):
    """The range of an array's initial values, ± 1/√fan_in of its layer, as text."""
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
