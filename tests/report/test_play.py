"""The page to play with, in a real browser, from the disk, without a network: its arithmetic is the
model's, and what one can do on it does what it says."""

import html
import os
import re
import time

import browser
import glyphs
import jax
import numpy as np
import pytest
import reference
import tiny

from vnca.images import unpack
from vnca.losses import bernoulli_log_likelihood
from vnca.program import runs
from vnca.program.data import Dataset, load
from vnca.program.method import make_model
from vnca.program.pictures import advance, probabilities
from vnca.report import play
from vnca.report.trained import TrainedModel, posterior_means

KINDS = "doubling", "nondoubling"
SOME = [0, 31, 99]  # of the page's hundred digits: 31 is the second 3
SLOW = pytest.mark.slow
READY = "typeof worker === 'object' && !asked && !waiting"
SEEN = """(({ width: n }, canvas = document.createElement('canvas')) => {
  [canvas.width, canvas.height] = [n, n];
  canvas.getContext('2d').drawImage($('cells'), 0, 0);
  return Array.from(canvas.getContext('2d').getImageData(0, 0, n, n).data);
})($('cells'))"""


@pytest.fixture(scope="module", autouse=True)
def fast():
    with tiny.fast_compilation():
        yield


@pytest.fixture(scope="module")
def shown():
    """The packaged models, as of a run without a checkpoint."""
    found = {}
    for kind in KINDS:
        packaged = runs.packaged(kind)
        origin = f"packaged_{kind}.npz"
        found[kind] = TrainedModel(*packaged[:3], load("bundled"), packaged.curve, origin)
    return found


@pytest.fixture(scope="module")
def text(shown):
    return play.page(shown)


@pytest.fixture(scope="module")
def codes(shown):
    """The codes of the page's hundred digits as it has them, float16, and the digits."""
    bundled = load("bundled")
    chosen = [np.flatnonzero(bundled.test_labels == label)[:10] for label in range(10)]
    images = unpack(bundled.test[np.concatenate(chosen)])
    found = {k: posterior_means(m.model, m.params, images) for k, m in shown.items()}
    return {k: np.float32(np.float16(z)) for k, z in found.items()}, images


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not browser.PATH and not os.environ.get("CI"):
        pytest.skip(browser.MISSING)
    assert browser.PATH, browser.MISSING
    running = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture
def visit(chromium, tmp_path):
    """Opens a page's text as a file, in a window of this width; gives the browser. At the end there
    must have been no error, and no request but for the file and its worker."""

    def visit(text, width=1280, first=""):
        path = tmp_path / "play.html"
        path.write_text(text, encoding="utf-8")
        chromium.size(width)
        chromium.open(path, first)
        return chromium

    yield visit
    assert chromium.errors() == []
    addresses = [e["request"]["url"] for e in chromium.heard("Network.requestWillBeSent")]
    assert {address.partition(":")[0] for address in addresses} <= {"file", "blob"}


@pytest.fixture
def page(visit, text):
    page = visit(text)
    page.wait(READY)
    return page


def of(page):
    """The picture on the canvas as drawn: uint8 [n, n, 4]."""
    pixels = np.array(page.value(SEEN), np.uint8)
    return pixels.reshape(page.value("shown.n"), -1, 4)


def grey(logits):
    """What a figure has for logits [n, n, 1]."""
    return np.round(255 * probabilities(logits))[..., None].astype(int)


def number(page, name):
    """One of the numbers under the picture."""
    return float(page.value(f"$('{name}').textContent").replace("−", "-"))


# ---- The file --------------------------------------------------------------------------------


def test_the_page_is_one_small_file_that_asks_for_nothing(text):
    assert len(text.encode()) <= 500_000
    assert not re.search(r"https?:|//\w+\.|\b(src|href)=|@import|url\(", text)
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'; ", text)
    assert "CC BY-SA 3.0" in text and "@" not in re.sub("@media", "", text)


@pytest.mark.parametrize("count, doublings", [(100_001, 5), (25_601, 6)])
def test_a_decoder_too_large_for_the_page_gives_way_to_the_packaged_one(shown, count, doublings):
    config = shown["doubling"].config.copy_and_resolve_references()
    config.model.doublings = doublings
    params = {"decoder": {"weights": np.zeros(count)}}
    found = play.page(
        shown | {"doubling": shown["doubling"]._replace(config=config, params=params)}
    )
    assert "the doubling model, from the package, because the run's model is too large" in found
    assert len(found.encode()) <= 500_000


# ---- The arithmetic --------------------------------------------------------------------------


WOUND = np.flatnonzero(np.pad(np.ones((15, 16), bool), [(13, 4), (16, 0)]))  # up to the border


def life(page, kind, k, moves, wound=0):
    """The cells [n, n, C] after so many moves of the page's own functions with the code of digit k;
    before the last `wound` of them the WOUND is made."""
    n, s = page.value(
        f"(() => {{ let state = initialState(models.{kind}, models.{kind}.codes[{k}]);"
        f"const C = state.model.channels; for (let i = 0; i < {moves} && !isGrown(state); i++) {{"
        f"if (i === {moves - wound}) for (const j of {WOUND.tolist()})"
        "state.s.fill(0, at(j, state.n) * C, (at(j, state.n) + 1) * C); state = move(state); }"
        "return [state.n, Array.from(state.s)]; })()"
    )
    s = np.reshape(s, (n + 2, n + 2, -1))
    inside = s[1:-1, 1:-1]
    assert np.count_nonzero(inside) == np.count_nonzero(s)  # the border is 0
    return inside


def assert_same(cells, expected, tolerance):
    """Every cell and channel, relative to the largest state; the page's further channels are 0."""
    found, rest = np.split(cells, [expected.shape[-1]], axis=-1)
    assert not rest.any() and np.abs(found - expected).max() / np.abs(expected).max() < tolerance


@pytest.fixture(scope="module")
def stages(shown, codes):
    """How some digits grow in JAX: a list of [1 + steps, 3, n, n, C]."""
    model, params = shown["doubling"][1:3]
    return jax.jit(model.grow, static_argnums=2)(params, codes[0]["doubling"][SOME], None)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("doubling", {"latent_size": 10, "steps_per_doubling": 2}),
        ("nondoubling", {"latent_size": 5}),
        ("healing", {"latent_size": 5, "channels": 15, "hidden": 18, "position_waves": 2}),
    ],
)
def test_a_run_with_channels_that_are_no_multiple_of_four_is_computed_as_well(
    visit, shown, name, fields
):
    config = tiny.config(name, **{f"model__{field}": value for field, value in fields.items()})
    model, kind = make_model(config.model), "doubling" if name == "doubling" else "nondoubling"
    params = reference.numbers_like(jax.eval_shape(model.init, jax.random.key(0)), 0, 0.1)
    params = jax.tree.map(lambda x: np.float32(np.float16(x)), params)
    run = TrainedModel(config, model, params, load("bundled"), None, "a/checkpoint_00000007.npz")
    page = visit(play.page(shown | {kind: run}))
    page.wait(READY)
    assert " weights, from checkpoint_00000007.npz." in page.value("$('origin').textContent")
    code = np.array(page.value(f"Array.from(models.{kind}.codes[0])"), np.float32)
    cells = jax.jit(model.grow, static_argnums=2)(params, code[None], None)[-1][-1]
    moves = model.steps or 1000
    assert_same(life(page, kind, 0, moves), cells[0], 1e-4)
    hurt = cells.reshape(1, len(cells[0]) ** 2, -1).at[:, WOUND].set(0).reshape(cells.shape)
    for steps in (3, 9) if model.steps else ():  # while the hole closes, and after that
        wanted = advance(model, params, hurt, steps)
        assert_same(life(page, kind, 0, moves + steps, steps), wanted[0], 1e-3)


# ---- Grow ------------------------------------------------------------------------------------


def test_a_3_grows_as_in_the_figure_step_by_step(page, stages, codes):
    page.key("3")
    page.key("3")
    page.value("restart(), playing = false")  # from the beginning, and paused there
    page.wait(READY)
    assert page.value("ends[0].k") == 31
    for logits in (stage[t, 1, ..., :1] for stage in stages for t in range(len(stage))):
        page.press("#step")
        page.wait("!moves && !waiting")
        assert np.abs(of(page)[..., :3] - grey(logits)).max() <= 1
    steps = sum(len(stage) - 1 for stage in stages)
    assert page.value("[shown.grown, $('steps').textContent]") == [True, f"{steps} of {steps}"]
    expected = float(bernoulli_log_likelihood(logits[None], codes[1][31:32])[0])
    assert number(page, "likelihood") == pytest.approx(expected, abs=0.06)


def test_random_draws_a_code_from_the_prior(page):
    z = np.array(page.value("choose(0, 10), Array.from(ends[0].random)"))
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1 and abs((z > 0).mean() - 0.5) < 0.05


# ---- Blend -----------------------------------------------------------------------------------


@SLOW
def test_the_slider_blends_two_codes(page, shown, codes):
    model, params = shown["doubling"][1:3]
    page.press("[value=blend]")
    page.press("#digits1 [aria-label='digit 6']")
    a, b = (codes[0]["doubling"][k] for k in page.value("ends.map(end => end.k)"))
    for mix in (0, 0.37, 1):
        page.value(f"$('mix').value = {mix}; $('mix').dispatchEvent(new Event('input'))")
        page.wait("shown.grown && !asked && !waiting")
        logits = jax.jit(model.decode)(params, (a + mix * (b - a))[None])[0]
        assert np.abs(of(page)[..., :3] - grey(logits)).max() <= 1
        assert (page.value("$('likelihood').textContent") == "–") == (mix == 0.37)


# ---- Wound -----------------------------------------------------------------------------------


@pytest.fixture
def grown(page):
    """The page with the non-doubling model's digit, grown, and paused."""
    page.press("[value=wound]")
    page.value("$('speed').value = 60")
    page.wait("mode === 'wound' && shown.n === 32 && shown.steps >= models.nondoubling.steps")
    page.press("#play")
    page.wait("!waiting")
    return page


def test_a_late_answer_of_the_life_before_does_not_stop_the_next(page):
    page.value("enterMode('blend')")
    page.wait("shown.grown && !waiting")
    page.value("restart(), enterMode('wound')")
    page.wait("shown.n === 32 && !shown.grown && shown.steps > 2")


def test_nothing_is_erased_before_the_digit_of_the_mode_is_there(page):
    page.wait("shown.grown && !waiting")
    page.value("enterMode('wound'), $('quarter').click()")
    assert page.value("[before, wounds.size]") == [None, 0]


def test_a_wound_by_the_mouse_changes_pixels_and_they_heal(grown):
    before = of(grown)[..., 0]
    grown.drag("#cells", [(0.35, 0.45), (0.5, 0.45), (0.6, 0.55)])
    grown.wait("!wounds.size && !waiting")
    hole = of(grown)[..., 0] != before
    assert (of(grown)[hole][:, :3] == 128).all() and hole.sum() > 50  # a logit of 0: one half
    peak = number(grown, "changed")
    assert peak == ((before > 127) & hole).sum() > 0
    grown.press("#play")
    grown.wait(f"+$('changed').textContent < {peak}")
    grown.press("#digits0 [aria-label='digit 5']")
    grown.wait("shown.steps < 5 && $('changed').textContent === '–'")


def test_one_finger_wounds_and_does_not_scroll_a_phones_page(visit, text):
    page = visit(text, width=360)
    page("Emulation.setTouchEmulationEnabled", enabled=True)
    page.press("[value=wound]")
    page.wait("mode === 'wound' && shown.n === 32 && shown.steps > 12")
    page.press("#play")
    x, y, width, height = page.box("#cells")
    top = page.value("scrollY")
    first, later, second = ({"x": x + width * u, "y": y + height * v} for u, v in PLACES)
    for kind, points in (
        ("Start", [first]), ("Start", [first, second]), ("Move", [later, second]), ("End", [])
    ):  # fmt: skip
        page("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=points)
    page.wait("before && !wounds.size && !waiting")
    page("Emulation.setTouchEmulationEnabled", enabled=False)
    assert (of(page)[10:22, 16, 0] == 128).all() and (of(page)[26:30, 26:30, 0] != 128).all()
    assert page.value("scrollY") == top


PLACES = (0.5, 0.3), (0.5, 0.7), (0.9, 0.9)


def test_the_keys_do_all_that_the_mouse_does(grown):
    grown.value("$('cells').focus()")
    for keys, condition in (
        ("q", "before && !wounds.size && !waiting"),
        ("a", "playing && !before"),
        ("p", "!playing && !waiting"),
        (["ArrowLeft"] * 4 + ["ArrowUp"] * 4, "brush.x === 12 && !$('brush').hidden"),
        (["Enter"], "before && !wounds.size && !waiting"),
        ("m", "$('memory').checked"),
        ("8", "ends[0].label === 8"),
        ("r", "ends[0].random"),
    ):
        for key in keys:
            grown.key(key)
        grown.wait(condition)
        erased = of(grown)[..., 0] == 128
        assert keys != "q" or erased.reshape(2, 16, 2, 16).all((1, 3)).sum() == 1
        assert keys != ["Enter"] or erased[11:13, 11:13].all()


# ---- As good pages are -----------------------------------------------------------------------

RECTANGLES = """
[...document.querySelectorAll('h1, p, dt, dd, legend, button, input, output, canvas, kbd')]
  .filter(e => e.offsetParent && !e.closest('button > *') && e.name !== 'mode')
  .map(e => [e, e.getBoundingClientRect()])
  .flatMap(([e, r], i, all) => [
    ...(r.left < 0 || r.right > innerWidth ? [`${e.tagName} ${e.textContent} leaves it`] : []),
    ...all.slice(i + 1).filter(([f, q]) => !e.contains(f) && !f.contains(e)
      && Math.min(r.right, q.right) - Math.max(r.left, q.left) > 0.5
      && Math.min(r.bottom, q.bottom) - Math.max(r.top, q.top) > 0.5)
      .map(([f]) => `${e.tagName} ${e.id || e.textContent} overlaps ${f.tagName} ${f.id}`)])
"""


@SLOW
@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_overlaps_at_any_width(visit, text, tmp_path, width):
    page = visit(text, width)
    for mode in ("grow", "blend", "wound"):
        page.wait(READY)
        page.press(f"[value={mode}]")
        page.wait(f"mode === '{mode}' && shown.n === 32")
        assert page.value(RECTANGLES) == []
        assert page.value("document.documentElement.scrollWidth") <= width
        page.screenshot(tmp_path / f"{mode}_{width}.png")


def test_who_asked_for_less_motion_sees_none_before_pressing_play(visit, text):
    visit(text).prefer(reduced_motion="reduce")
    page = visit(text)
    page.prefer(reduced_motion="no-preference")  # it is read once
    for mode, cells in (("grow", 1), ("wound", 32)):
        page.press(f"[value={mode}]")
        page.wait(f"mode === '{mode}' && shown.n === {cells} && !waiting")
        time.sleep(0.5)
        assert page.value("[shown.steps, $('play').textContent]") == [0, "Play"]
    page.press("#play")
    page.wait("shown.steps > 2")


def test_a_mode_that_the_browser_kept_over_a_reload_is_the_mode(visit, text):
    kept = text.replace('value="grow" checked', 'value="grow"')
    page = visit(kept.replace('value="wound"', 'value="wound" checked'))
    page.wait(READY)
    page.wait("mode === 'wound' && shown.n === 32")


@pytest.mark.parametrize("old, new", [(4, "{other}{rest}"), (4, "*{rest}"), (4, ""), (0, "")])
def test_a_damaged_file_says_so_in_a_line(visit, text, old, new):
    start = text.index('id="block">') + 1000
    four = text[start : start + old]  # three bytes
    new = new.format(other="A" if four[:1] != "A" else "B", rest=four[1:])
    damaged = text[:start] + new + text[start + old :]
    page = visit(damaged if old else text.replace('{"models"', '{"mod'))
    assert page.value("document.querySelector('main').offsetParent") is None
    assert page.value("$('fault').innerText").startswith("The weights in this file are damaged")


def test_a_browser_that_lacks_workers_gets_a_line(visit, text):
    page = visit(text, first="delete window.Worker")
    assert page.value("$('fault').innerText").startswith("This browser does not run the page’s web")


def test_it_runs_in_the_frame_of_a_notebook(visit, text):
    frame = f'<iframe srcdoc="{html.escape(text)}" width="100%" height="900"></iframe>'
    page = visit(f'<meta charset="utf-8">{frame}')  # without it, Chromium may guess another one
    page.wait("+frames[0].document.querySelector('#likelihood').textContent.replace('−', '-') < 0")


def test_cells_that_leave_all_bounds_are_told_of_in_a_line(grown):
    grown.value("models.nondoubling.update.bias.fill(3e38), worker.postMessage({models})")
    grown.press("#again")
    grown.wait("$('fault').textContent.startsWith('The cells have diverged')")
    assert not grown.value("playing")


# ---- One's own images ------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [4, 9])
def test_a_model_of_ones_own_images_shows_them_and_the_other_model_its_digits(
    shown, visit, classes
):
    images, labels = glyphs.draw(9, seed=0)
    bits = np.packbits((images > 0).reshape(9, -1), axis=1)
    mine = Dataset("own", bits, bits, None, 20 + labels if classes == 4 else None)
    run = shown["doubling"]._replace(data=mine, origin="a/<!-- <script>.npz")
    page = visit(play.page(shown | {"doubling": run}))
    page.wait(READY)
    assert "written for digits, but your" in page.value("document.body.innerText")
    buttons = "document.querySelectorAll('#digits0 button:not([hidden])').length - 1"
    assert page.value(buttons) == classes
    page.value("choose(0, 10), choose(0, 0)")  # so that the next one is the first again
    for k in range(0, 9, classes):  # the images of class 0
        pixels = page.value("Array.from({ length: 784 }, (_, i) => ends[0].pixel(i))")
        np.testing.assert_array_equal(np.reshape(pixels, (28, 28)), images[k] > 0)
        page.key("0")
    page.key("9")  # no button has it
    page.press("#modes [value=wound]")
    page.wait(READY)
    assert page.value(f"[{buttons}, ends[0].label]") == [10, 0]
    assert "MNIST" in page.value("$('origin').textContent")
