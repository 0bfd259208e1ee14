"""The training update: its arithmetic, and the same numbers on any number of devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference import equations

from configs import quickstart
from vnca import training
from vnca.likelihoods import as_floats
from vnca.model import Model
from vnca.pool import fresh_images
from vnca.program.data import load
from vnca.program.learner import make_learner
from vnca.program.order import batches
from vnca.training import normal, stream

BATCH, LATENT, IMAGES = 8, 3, 40
PIXELS = np.random.RandomState(0).rand(IMAGES, 28, 28) < 0.2
PIXELS = np.pad(PIXELS, [(0, 0), (2, 2), (2, 2)]).reshape(IMAGES, -1)
STORED = np.packbits(PIXELS, axis=1)
ORDER = np.random.RandomState(1).randint(0, IMAGES, (6, BATCH))  # image numbers of six updates
SEED = 3
CLIP = 10.0  # all gradients here are larger
RATE = 1e-2
AUTOMATA = ["doubling", "nondoubling", "healing"]


# A linear VAE: it compiles in a second, and its gradient can be derived by hand.


def init(key):
    keys = jax.random.split(key)
    return {
        "encoder": {
            "kernel": 0.1 * jax.random.normal(keys[0], (1024, LATENT)),
            "logvar": jnp.linspace(-1, 1, LATENT),
        },
        "decoder": {
            "kernel": 0.5 * jax.random.normal(keys[1], (LATENT, 1024)),
            "bias": jnp.zeros(1024),
        },
    }


def encode(params, x):
    mean = x.reshape(len(x), -1) @ params["encoder"]["kernel"]
    return mean, jnp.broadcast_to(params["encoder"]["logvar"], mean.shape)


def decode(params, z):
    logits = z @ params["decoder"]["kernel"] + params["decoder"]["bias"]
    return logits.reshape(-1, 32, 32, 1)


LINEAR = training.Learner(Model(LATENT, tiny.DIGITS, init, encode, decode))


def hand_gradient(params, x, noise, kl_weight):
    """Loss, reconstruction and KL of the linear VAE, and its gradient, in float64."""
    kernel, logvar = params["encoder"]["kernel"], params["encoder"]["logvar"]
    batch, mean, scale = len(x), x @ kernel, np.exp(logvar / 2)
    z = mean + scale * noise
    logits = z @ params["decoder"]["kernel"] + params["decoder"]["bias"]
    reconstruction = np.sum(np.logaddexp(0, logits) - x * logits) / batch
    kl = np.sum(np.exp(logvar) + mean**2 - 1 - logvar) / 2 / batch
    g = (1 / (1 + np.exp(-logits)) - x) / batch
    to_z = g @ params["decoder"]["kernel"].T
    return (reconstruction + kl_weight * kl, reconstruction, kl), {
        "encoder": {
            "kernel": x.T @ (to_z + kl_weight * mean / batch),
            "logvar": np.sum(to_z * noise * scale / 2, axis=0)
            + kl_weight * (np.exp(logvar) - 1) / 2,
        },
        "decoder": {"kernel": z.T @ g, "bias": g.sum(axis=0)},
    }


def hand_training(params, order, kl_weight=1.0, encoder_from=None):
    """Loss terms and gradient norms of each update, the parameters and moments after the last."""
    params = jax.tree.map(np.float64, params)
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    rows = []
    for t, numbers in enumerate(order, 1):
        noise = normal(stream(SEED, "posterior", t), np.arange(BATCH), LATENT)
        x = PIXELS[numbers].astype(float)
        terms, g = hand_gradient(params, x, np.float64(noise), kl_weight)
        if encoder_from:
            g["encoder"] = jax.tree.map(np.zeros_like, g["encoder"])
        norm = np.sqrt(sum(np.sum(a**2) for a in jax.tree.leaves(g)))
        g = jax.tree.map(lambda a: a * min(1, CLIP / norm), g)  # noqa: B023
        first = jax.tree.map(lambda m, a: 0.9 * m + 0.1 * a, first, g)
        second = jax.tree.map(lambda v, a: 0.999 * v + 0.001 * a**2, second, g)
        params = jax.tree.map(
            lambda p, m, v: p - RATE * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8),  # noqa: B023
            params, first, second,
        )  # fmt: skip
        rows.append((*terms, norm))
    return np.array(rows), params, {"mean": first, "square": second}


def settings(**fields):
    given = {"micro_batch": BATCH, "learning_rate": RATE, "clip_norm": CLIP} | fields
    return tiny.config(seed=SEED, **{f"train__{name}": value for name, value in given.items()})


def train(devices=1, counts=(6,), per_call=6, **fields):
    """State and metrics after the updates of ORDER, so many in each call as `counts` says."""
    call = training.make_update_call(LINEAR, settings(**fields))
    state, rows, done = training.init_state(LINEAR, settings(), None), [], 0
    for count in counts:
        order = np.zeros((per_call, BATCH), np.int32)
        order[:count] = ORDER[done : done + count]
        dealt = order.reshape(per_call, devices, -1).swapaxes(0, 1)
        state, metrics = call(state, STORED, dealt, np.int32(count))
        rows.append(np.asarray(metrics)[:count])
        done += count
    return jax.device_get(state), np.concatenate(rows)


@pytest.fixture(scope="module")
def reference():
    return train()


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_alike(one, other):
    """Up to rounding: the order of a sum differs, and Adam magnifies it where gradients are ~0."""
    np.testing.assert_allclose(one[1], other[1], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


# ---- Arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"kl_weight": 4.0}, {"encoder_from": "elsewhere"}],
    ids=["published", "kl", "given"],
)
def test_updates_are_adam_on_the_gradient_clipped_before(fields, reference):
    begun = training.init_state(LINEAR, settings(), None).params
    drawn = init(stream(SEED, "init"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), begun, drawn)
    rows, params, moments = hand_training(begun, ORDER, **fields)
    state, metrics = train(**fields) if fields else reference
    assert (rows[:, 3] > CLIP).all() and np.ptp(rows[:, 3]) > 1  # or clipping would not be seen
    np.testing.assert_allclose(metrics, rows, rtol=1e-4)
    for found, wanted in [(state.params, params), (state.moments, moments)]:
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())
    assert state.update == len(ORDER)


@pytest.mark.slow  # for 5 seconds
def test_forty_updates_bring_the_test_elbo_to_where_it_belongs():
    # Measured: −240.5 nats. With the gradient's sign flipped: NaN. With ten times the learning
    # rate: −211.4; with a tenth: −558.5. Without Adam's correction of the bias: −205.0.
    config = tiny.config(
        "baseline",
        model__latent_size=8,
        model__encoder_width=1,
        train__batch_size=8,
        train__micro_batch=8,
        train__learning_rate=4e-3,
    )
    learner, data = tiny.learner_of(config), load("bundled")
    state = training.init_state(learner, config, data.train)
    update = partial(training.one_update, learner, config)
    axes = training.State(None, None, None, None, ())
    update = jax.jit(jax.vmap(update, (axes, None, 0), (axes, None), axis_name="devices"))
    with tiny.fast_compilation():
        for indices in batches(config.seed, 1, 40, 8, len(data.train)):
            state, _ = update(state, data.train, indices[None])
        noise = np.random.RandomState(0).randn(500, 8).astype(np.float32)
        test = as_floats(tiny.DIGITS, data.test[:500])
        loss, _ = jax.jit(partial(training.loss, learner.model))(state.params, test, noise)
    assert -250 < -loss < -232


@pytest.mark.slow  # each compiles for 6 seconds or more
@pytest.mark.parametrize("name", ["doubling", "nondoubling"])  # as the quickstart; with a pool
def test_the_eleven_lines_of_the_readme_train_as_the_program_does(name, monkeypatch, capsys):
    text = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"## Training in eleven lines\n[^#]*?```python\n(.*?)```", text, re.S)
    assert len([line for line in lines.splitlines() if line]) == 11
    config = tiny.config(name, train__micro_batch=None)  # as in every committed config
    monkeypatch.setattr(quickstart, "get_config", lambda: config)
    with tiny.fast_compilation():
        exec(lines, {})
    printed = [[float(x) for x in line.split()] for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 100 and {len(row) for row in printed} == {len(training.METRICS)}
    losses = [printed[update - 1][0] for update in (1, 10, 20)]
    np.testing.assert_allclose(losses, tiny.LOSSES[name], rtol=1e-4)


# ---- One training, however it is divided ------------------------------------------------------


@pytest.mark.parametrize("devices", [2, 8])
def test_more_devices_train_like_one(devices, reference):
    assert_alike(train(devices), reference)


@pytest.mark.parametrize("micro_batch", [4, 3, 1, None])  # 3 does not divide the batch: 2 does
def test_micro_batches_train_like_the_whole_batch(micro_batch, reference):
    assert_alike(train(micro_batch=micro_batch), reference)


@pytest.mark.parametrize("batch", [1, 2, 6, 7, 8, 12])
def test_micro_batches_are_equal_the_largest_possible_and_at_most_the_limit(batch):
    x = np.random.RandomState(2).randn(batch, 3).astype(np.float32)
    params = {"a": np.zeros(3, np.float32)}
    for limit in [None, *range(1, batch + 3)]:
        sizes = []

        def gradient(params, x, n):
            sizes.append(len(x))  # noqa: B023
            mean = jnp.mean(x, axis=0)
            return {"a": mean}, (2 * mean, n)

        grads, terms, n = training.accumulate(limit, gradient, params, x, np.arange(batch))
        sizes_that_fit = (
            n for n in range(1, batch + 1) if batch % n == 0 and n <= (limit or batch)
        )
        wanted = max(sizes_that_fit)
        assert set(sizes) == {wanted}
        np.testing.assert_allclose(grads["a"], x.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(terms, 2 * x.mean(axis=0), rtol=1e-5, atol=1e-6)
        assert n.tolist() == list(range(batch))


@pytest.mark.parametrize("counts", [(2, 2, 2), (1,) * 6])
def test_any_number_of_updates_per_call_gives_identical_bits(counts, reference):
    assert_same(train(counts=counts, per_call=counts[0]), reference)


def test_a_shorter_last_call_is_the_same_program_and_does_exactly_its_updates(reference, caplog):
    call = training.make_update_call(LINEAR, settings())
    state, rows, compiled = training.init_state(LINEAR, settings(), None), [], []
    with jax.log_compiles():
        for done, count in [(0, 0), (0, 4), (4, 2)]:
            order = np.zeros((1, 6, BATCH), np.int32)
            order[0, :count] = ORDER[done : done + count]
            caplog.clear()
            state, metrics = call(state, STORED, order, np.int32(count))
            compiled.append(any("XLA compilation" in line for line in caplog.messages))
            rows.append(metrics[:count])
            assert state.update == done + count
    assert compiled[0] and not compiled[2]
    np.testing.assert_array_equal(np.concatenate(rows), reference[1])
    assert_same(jax.device_get(state), reference[0])


# ---- What is held, and what moves ------------------------------------------------------------


@pytest.fixture(scope="module")
def held():
    """On eight devices: the call, and its arguments in the devices' memory."""
    mesh = jax.sharding.Mesh(jax.devices(), "devices")
    whole, split = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in ((), ("devices",))
    )
    order = np.int32(ORDER).reshape(6, 8, -1).swapaxes(0, 1)
    call = training.make_update_call(LINEAR, settings())
    return call, lambda: (
        *jax.device_put((training.init_state(LINEAR, settings(), None), STORED), whole),
        jax.device_put(order, split),
        jax.device_put(np.int32(6), whole),
    )


def test_no_image_crosses_the_host_link(held, reference):
    call, arguments = held
    state, images, order, count = arguments()
    with jax.transfer_guard("disallow"):
        state, metrics = call(state, images, order, count)
    np.testing.assert_allclose(np.asarray(metrics), reference[1], rtol=1e-5)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed"):
        call(state, STORED, order, count)  # so this guard sees images that do cross
    assert images.dtype == np.uint8 and images.nbytes == IMAGES * 128


def addresses(tree):
    """Where its arrays lie in the memory of all devices."""
    shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards]
    return {shard.data.unsafe_buffer_pointer() for shard in shards}


def test_the_state_is_updated_in_its_own_memory(held):
    call, arguments = held
    state, *rest = arguments()
    before, places = jax.tree.leaves(state), addresses(state)
    after, _ = call(state, *rest)
    assert all(x.is_deleted() for x in before)
    assert addresses(after) == places


COLLECTIVES = "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute"


def test_devices_exchange_one_gradient_an_update_and_nothing_else():
    config = tiny.config("baseline", train__micro_batch=4)
    learner = tiny.learner_of(config)
    state = jax.eval_shape(lambda: training.init_state(learner, config, None))
    images, order, count = (
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in [((60_000, 128), "uint8"), ((8, 3, 1), "int32"), ((), "int32")]
    )
    call = training.make_update_call(learner, config)
    with tiny.fast_compilation():  # of the kernels: what is exchanged is settled before
        program = call.lower(state, images, order, count).compile().as_text()
    found = re.findall(rf"= (.*?) ((?:{'|'.join(COLLECTIVES)})[a-z-]*)\(", program)
    assert [kind for _, kind in found] == ["all-reduce"]
    shapes = re.findall(r"f32\[([\d,]*)\]", found[0][0])
    moved = sum(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    assert moved == parameters + 3  # and the loss, the reconstruction and the KL


# ---- bfloat16 --------------------------------------------------------------------------------


def real_update_call(name, dtype, updates, form):
    """A call of some updates of a small model, plain or in a platform's form; its arguments."""
    fields = {"train__dtype": dtype, "train__learning_rate": 1e-3, "train__micro_batch": 4}
    if name != "healing":  # its channels are those of a latent size
        fields |= {"model__latent_size": 16, "model__encoder_width": 4}
    config = tiny.config(name, train__updates_per_call=updates, **fields)
    learner = make_learner(config, form == "plain", form, device_kind="TPU v5 lite")
    images = load("bundled").train
    state = training.init_state(learner, config, images)
    state = state._replace(pool=jax.tree.map(lambda x: x[None], state.pool))
    order = batches(0, 1, updates, fresh_images(config), len(images))[None]
    return training.make_update_call(learner, config), (state, images, order, np.int32(updates))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, updates, form",
    [
        ("baseline", 5, "plain"),
        # On a CPU the plain layers take many minutes, because their gradients in bfloat16 are slow.
        *((name, 30, "cpu") for name in tiny.OF_MODELS),
    ],
)
def test_losses_in_bfloat16_follow_those_in_float32_within_half_a_percent(name, updates, form):
    with tiny.fast_compilation():
        (state, losses), (_, exact) = (
            call(*arguments)
            for call, arguments in (
                real_update_call(name, dtype, updates, form) for dtype in ("bfloat16", "float32")
            )
        )
    losses, exact = np.asarray(losses), np.asarray(exact)
    assert np.abs(losses[:, :2] / exact[:, :2] - 1).max() < 5e-3  # loss, reconstruction
    assert not (losses == exact).all()
    assert {x.dtype for x in jax.tree.leaves(state)} == {np.dtype("float32"), np.dtype("int32")}


@pytest.mark.parametrize(
    "name", ["baseline", *(pytest.param(n, marks=pytest.mark.slow) for n in AUTOMATA)]
)
@pytest.mark.parametrize("form", [pytest.param("cpu", marks=pytest.mark.slow), "gpu", "plain"])
def test_products_in_bfloat16_are_of_bfloat16(name, form):
    call, arguments = real_update_call(name, "bfloat16", 5, form)
    program = list(equations(jax.make_jaxpr(call)(*arguments)))
    products = [e for e in program if e.primitive.name in ("dot_general", "conv_general_dilated")]
    # A GPU's products of vectors are of gradients of biases, once an update.
    products = [e for e in products if e.invars[0].aval.ndim > 1]
    assert products
    for e in products:
        assert {v.aval.dtype for v in e.invars} == {np.dtype(jnp.bfloat16)}
    # On a CPU gradients of kernels leave the product in float32, so their sums are exact.
    results = {"bfloat16", "float32"} if form == "cpu" else {"bfloat16"}
    assert {e.outvars[0].aval.dtype.name for e in products} == results
    # Sums of more than the four copies of a cell, as in the gradients of biases, are of float32.
    sums = [
        (e.invars[0].aval, e.outvars[0].aval) for e in program if e.primitive.name == "reduce_sum"
    ]
    summed = {each.dtype for each, total in sums if each.size > 4 * total.size}
    assert summed == {np.dtype(jnp.float32)}
