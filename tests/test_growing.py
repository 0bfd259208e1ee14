"""GrowingVNCA: its seed, its life, its coins, and a step against NumPy loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from vnca import layers
from vnca.losses import reparametrize
from vnca.model import SettingError
from vnca.models import growing
from vnca.program.learner import validate_model
from vnca.training import normal, stream

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LATENT, CHANNELS, HIDDEN, START, RATE = 4, 9, 5, 6, 0.25
LIFE, NUMBER = 1, -1  # channels: a logit, life, 4 of z, 2 more, a random number
make = partial(growing.make, layers, tiny.DIGITS, LATENT, 1, 3, (1, 4), CHANNELS, HIDDEN)
MODEL = make(START, RATE)
Z = np.random.RandomState(0).randn(3, LATENT).astype(np.float32)


def random_params(scale=0.2):
    """Parameters of which none is zero, so that every array counts."""
    return reference.numbers_like(jax.eval_shape(MODEL.init, jax.random.key(0)), 1, scale)


def test_at_first_a_square_in_the_middle_is_alive_and_holds_the_latent():
    cells = np.array(MODEL.initial_cells(Z))
    numbers = cells[..., NUMBER]
    assert cells.shape == (3, 32, 32, CHANNELS) and len(np.unique(numbers)) == 3
    np.testing.assert_array_equal(numbers, numbers[:, :1, :1] + np.zeros((32, 32)))
    seed = [0, 1, *Z[1], 0, 0]  # no logit, life, z, nothing else
    np.testing.assert_array_equal(
        cells[1, 13:19, 13:19, :NUMBER], np.broadcast_to(seed, (6, 6, CHANNELS - 1))
    )
    cells[:, 13:19, 13:19, 0] = -4
    cells[:, 13:19, 13:19, 1:] = 0
    assert (cells[..., 0] == -4).all() and not cells[..., LIFE:NUMBER].any()  # empty


def test_a_step_is_what_loops_over_the_cells_give():
    params = random_params()["decoder"]
    random = np.random.RandomState(2)
    s = random.randn(2, 7, 6, CHANNELS).astype(np.float32)
    s[..., LIFE] = random.choice([0.0, 0.09, 0.11], (2, 7, 6), p=[0.7, 0.2, 0.1])
    s[..., NUMBER] = np.array([3, 2**24 - 1])[:, None, None]
    s[:, 2:4, 2:5, NUMBER] = 0  # as damage does
    change = reference.nondoubling_change(tiny.in_float64(params), s[..., :NUMBER])
    heads = [
        jax.random.uniform(jax.random.fold_in(jax.random.key(0), n), (7, 6)) < RATE
        for n in (3, 2**24 - 1)
    ]
    expected = np.zeros(s.shape)
    expected[..., 0] = -4
    expected[..., NUMBER] = np.array(
        [(1_664_525 * n + 1_013_904_223) % 2**24 for n in (3, 2**24 - 1)]
    )[:, None, None]
    for b, i, j in np.ndindex(s.shape[:3]):
        if s[b, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2, LIFE].max() > 0.1:
            expected[b, i, j, :NUMBER] = s[b, i, j, :NUMBER] + heads[b][i, j] * change[b, i, j]
    after = np.asarray(MODEL.step({"decoder": params}, s))
    np.testing.assert_array_equal(after[..., NUMBER], expected[..., NUMBER])
    tiny.close(after[..., :NUMBER], expected[..., :NUMBER])
    dead = ~expected[..., LIFE:NUMBER].any(axis=-1)
    assert 5 < dead.sum() < dead.size - 5
    assert not after[dead][:, LIFE:NUMBER].any()


def test_life_moves_by_one_cell_a_step_and_what_is_far_from_it_stays_empty():
    params = random_params()
    always = make(START, 1.0)  # every coin shows heads
    cells = always.initial_cells(Z)
    for steps in range(1, 4):
        cells = always.step(params, cells)
        grown = np.asarray(cells)[..., LIFE:NUMBER].any(axis=(0, 3))
        first, last = 13 - steps, 19 + steps
        assert grown[first:last, first:last].sum() == grown.sum() > 36


def tosses(model, z, steps=3):
    """Which cells change in each step, if all are alive: bool [steps, B, 32, 32]."""
    params = random_params()
    cells = model.initial_cells(z).at[..., LIFE].set(1)
    shown = []
    for _ in range(steps):
        after = model.step(params, cells)
        shown.append(np.any(after != cells, axis=-1, where=np.arange(CHANNELS) < CHANNELS - 1))
        cells = after.at[..., LIFE].set(1)
    return np.array(shown)


def test_equal_latents_have_equal_tosses_in_any_batch():
    together = tosses(MODEL, Z)
    np.testing.assert_array_equal(tosses(MODEL, Z[2:]), together[:, 2:])
    np.testing.assert_array_equal(tosses(MODEL, Z[[1, 1, 0]]), together[:, [1, 1, 0]])


def test_rounding_errors_of_a_latent_change_no_toss():
    np.testing.assert_array_equal(tosses(MODEL, Z * np.float32(1 + 1e-6)), tosses(MODEL, Z))


def test_tosses_differ_by_image_by_sample_by_update_and_by_step():
    mean, logvar = np.zeros((1, LATENT), np.float32), np.zeros((1, LATENT), np.float32)
    latents = {
        "an image": reparametrize(mean, logvar, normal(stream(0, "posterior", 1), np.arange(1), 4)),
        "another": reparametrize(mean, logvar, normal(stream(0, "posterior", 1), np.ones(1), 4)),
        "update": reparametrize(mean, logvar, normal(stream(0, "posterior", 2), np.arange(1), 4)),
        "sample": reparametrize(mean, logvar, normal(stream(0, "evaluation", 1), np.arange(1), 4)),
    }
    near = np.array(latents["an image"])
    near[0, -1] += growing.Z_STEP
    shown = [step for z in (*latents.values(), near) for step in tosses(MODEL, z)]
    for i, one in enumerate(shown):
        for other in shown[:i]:  # independent coins of this rate differ in 3/8 of all cells
            assert abs((one != other).mean() - 2 * RATE * (1 - RATE)) < 0.08


def test_the_share_of_heads_is_the_rate():
    heads = tosses(MODEL, Z, steps=40).mean()
    assert abs(heads - RATE) < 5 * (RATE * (1 - RATE) / (40 * 3 * 1024)) ** 0.5


def test_growing_repeats_to_the_bit_and_differs_for_another_latent():
    params = random_params()
    decode = jax.jit(MODEL.decode)
    np.testing.assert_array_equal(decode(params, Z), decode(params, Z.copy()))
    assert np.any(decode(params, Z) != decode(params, Z + np.float32(1e-6)))


def test_gradients_reach_encoder_and_every_weight_of_the_decoder():
    params = random_params()

    def loss(params, z):
        return jnp.sum(MODEL.decode(params, z) ** 2)

    grads, of_z = jax.jit(jax.grad(loss, (0, 1)))(params, Z)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["decoder"]))
    assert np.all(np.abs(of_z).max(axis=0) > 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"channels": 6}, "config.model.channels=6: it must be at least 7"),
        ({"rate": 1.5}, "config.model.rate=1.5: it must be above 0, and at most 1"),
        ({"start": 34}, "config.model.start=34: it must be even, and at most 32"),
        ({"start": 5}, "config.model.start=5: it must be even, and at most 32"),
    ],
)
def test_a_setting_that_cannot_be_costs_one_line(settings, words):
    config = tiny.config("growing", **{f"model__{name}": v for name, v in settings.items()})
    assert words in tiny.fault_of(validate_model, config)


def test_bfloat16_which_does_not_hold_the_numbers_costs_one_line():
    config = tiny.config("growing", train__dtype="bfloat16")
    assert "config.model.name=growing: bfloat16 does not hold" in tiny.fault_of(
        validate_model, config
    )
    with pytest.raises(SettingError):
        MODEL.step(random_params(), jnp.zeros((1, 32, 32, CHANNELS), jnp.bfloat16))
