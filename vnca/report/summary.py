"""The size of a model: its parameter arrays, its arithmetic and its memory in training."""

import jax

from vnca.program.arithmetic import forward, inner_jaxprs, mean_steps, update_flops
from vnca.program.data import training_images
from vnca.program.learner import make_model, param_shapes
from vnca.program.stop import say
from vnca.program.trees import array_name
from vnca.report.operations import traced_update

LINE = "{:76}{:>20,}"


def summary(run):
    """Prints every parameter array, the multiply-adds of encoder and decoder, the memory that a
    device needs in training, and the sums."""
    config, devices = run.config, jax.device_count()
    model = make_model(config.model)
    params = jax.tree.leaves_with_path(param_shapes(model))
    show("parameters", {f"{array_name(path)} {list(x.shape)}": x.size for path, x in params})
    counts = forward(model)
    at = f", at T = {model.steps}" if model.steps else ""
    show(
        f"multiply-adds, forward, one image{at}; every kernel tap counts",
        {"encoder": counts.encode, "decoder": counts.decode},
    )
    if steps := mean_steps(model):
        words = f"together at T = {steps}, the mean in training with a pool"
        say(LINE.format(words, counts.encode + steps * counts.step))
    words = f"FLOP of an update of {config.train.batch_size} images, forward and backward"
    say(LINE.format(words, update_flops(config)))
    memory = training_memory(run.learner, config, devices)
    show(f"bytes in training on each of {devices} device(s)", memory)


def show(title, figures):
    """Prints figures, {name: number}, and their sum."""
    say(f"\n{title}")
    for what, number in (figures | {"together": sum(figures.values())}).items():
        say(LINE.format(what, number))


def training_memory(learner, config, devices):
    """The bytes of each device in training: {description: bytes}.

    What an update holds beside its state is that of the program that JAX traces: each array lives
    until its last use. XLA joins some operations, and keeps a few arrays longer. The sum is 0.88 to
    1.25 times what XLA allocates on CPUs and GPUs (JAX 0.10.2).
    """
    images = training_images(config)
    update = traced_update(learner, config, images, devices)
    *state, stored, _ = update.invars
    params = 4 * sum(x.size for x in jax.tree.leaves(param_shapes(learner.model)))
    pool = size(state) - 3 * params - 8  # without the number of the update and the seed
    rest = peak_bytes(update, state) - size(state)
    return {
        "parameters": params,
        "Adam's two moments": 2 * params,
        "pool, split over the devices": pool,
        "training images": size([stored]),
        "activations, gradients and others, by micro-batches of at most "
        f"{config.train.micro_batch} images, about": rest,
    }


def size(variables):
    """The bytes of some variables of a jaxpr."""
    return sum(x.aval.size * x.aval.dtype.itemsize for x in variables)


def peak_bytes(jaxpr, overwritten=()):
    """The most bytes that live at once while a jaxpr runs: of the variables that it makes, and of
    those that it overwrites."""
    last = {x: i for i, e in enumerate(jaxpr.eqns) for x in e.invars if not hasattr(x, "val")}
    last |= {x: None for x in jaxpr.outvars if not hasattr(x, "val")}  # these are never freed
    alive, most = set(overwritten), 0
    for i, equation in enumerate(jaxpr.eqns):
        results = size(equation.outvars)
        inside = max(map(peak_bytes, inner_jaxprs(equation)), default=0)
        if "length" in equation.params or "body_jaxpr" in equation.params:
            inside += results  # a loop's results are filled turn by turn
        most = max(most, size(alive) + max(results, inside))
        alive |= set(equation.outvars)
        alive -= {x for x in alive if last.get(x, i) == i}
    return most
