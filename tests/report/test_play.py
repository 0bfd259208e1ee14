"""The page to play with, in a real browser, from the disk, without a network: its arithmetic is the
model's, and what one can do on it does what it says."""

import html
import os
import re

import browser
import glyphs
import jax
import numpy as np
import pytest
import reference
import tiny
from ml_collections import ConfigDict

from vnca.likelihoods import as_floats, binomial
from vnca.model import make_model
from vnca.program import pictures, runs
from vnca.program.data import Dataset, load
from vnca.program.pictures import advance
from vnca.report import play
from vnca.report.trained import TrainedModel, posterior_means

pytestmark = pytest.mark.usefixtures("quickly_compiled")
READY = "typeof asked === 'undefined' || !asked && !waiting"  # undefined around a frame
SEEN = """(({ width: n }, canvas = document.createElement('canvas')) => {
  [canvas.width, canvas.height] = [n, n];
  canvas.getContext('2d').drawImage($('cells'), 0, 0);
  return Array.from(canvas.getContext('2d').getImageData(0, 0, n, n).data);
})($('cells'))"""
LOST = """[...Array(1024).keys()]
  .filter(i => shown.seen.subarray(4 * i, 4 * i + 4).every(x => x === 0))"""  # the erased cells


@pytest.fixture(scope="module")
def shown():
    """The packaged models, as of a run without a checkpoint."""
    return {
        name: TrainedModel(*runs.packaged(name)[:3], load("bundled"), None, "packaged.npz")
        for name in ("doubling", "healing")
    }


@pytest.fixture(scope="module")
def text(shown):
    return play.page(shown)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not browser.PATH and not os.environ.get("CI"):
        pytest.skip(browser.MISSING)
    running = browser.Browser(tmp_path_factory.mktemp("profile"))
    running("Emulation.setTouchEmulationEnabled", enabled=True)  # it has a mouse, too
    yield running
    running.close()


@pytest.fixture
def visit(chromium, tmp_path):
    """Opens a page's text as a file, in a window of this width; gives the browser. At the end there
    must have been no error, and no request but for the file and its worker."""

    def visit(text, width=1280):
        path = tmp_path / "play.html"
        path.write_text(text, encoding="utf-8")
        chromium.size(width)
        chromium.open(path)
        chromium.wait(READY)
        return chromium

    yield visit
    assert chromium.errors() == []
    for event in chromium.heard("Network.requestWillBeSent"):
        assert event["request"]["url"].startswith(("file:", "blob:"))


@pytest.fixture
def grown(visit, text):
    """The page with the healing model's digit, grown, and paused."""
    page = visit(text)
    page.press("[value=wound]")
    page.value("$('speed').value = 60")
    page.wait("mode === 'wound' && shown.n === 32 && shown.steps >= models.healing.steps")
    page.press("#play")
    page.wait("!waiting")
    return page


def of(page):
    """The picture on the canvas as drawn: int [n, n, 4]."""
    return np.reshape(page.value(SEEN), (page.value("shown.n"), -1, 4))


def assert_shows(page, model, logits):
    """The picture is a figure's of these logits, [n, n, 1], but for rounding."""
    grey = np.round(255 * pictures.shown(model, logits))
    assert np.abs(of(page)[..., :3] - grey).max() <= 1


# ---- The file --------------------------------------------------------------------------------


def test_the_page_is_one_small_file_that_asks_for_nothing(shown, text, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "packaged_names", lambda: ["doubling", "healing"])
        assert len(play.page(shown).encode()) <= 500_000  # of digits alone
    assert len(text.encode()) <= 1_200_000
    assert not re.search(r"https?:|//\w+\.|\b(src|href)=|@import|url\(", text)
    assert "Content-Security-Policy\" content=\"default-src 'none'; " in text
    assert "CC BY-SA 3.0" in text and "@" not in re.sub("@media", "", text)


@pytest.mark.parametrize(
    "count, doublings", [(100_001, 5), pytest.param(25_601, 6, marks=pytest.mark.slow)]
)
def test_a_decoder_too_large_for_the_page_gives_way_to_the_packaged_one(shown, count, doublings):
    config = tiny.config("doubling", model__doublings=doublings)
    large = shown["doubling"]._replace(config=config, params={"decoder": np.zeros(count)})
    line = "the doubling model, from the package, because the run's model is too large"
    assert line in play.page(shown | {"doubling": large})


@pytest.mark.parametrize("likelihood", [(64, 1, 1), (32, 3, 1), (32, 1, 15)])
def test_other_images_than_those_of_the_package_come_first_and_alone(shown, likelihood):
    likelihood = binomial(*likelihood)
    mine = shown["doubling"].model._replace(likelihood=likelihood)
    groups = play.by_likelihood({"doubling": shown["doubling"]._replace(model=mine)})
    (models, packaged), *others = groups
    assert [m.model.likelihood for m in models] == [likelihood] and packaged == []
    assert ([], ["baseline", "doubling", "healing"]) in others
    assert play.choose_model(groups[0], play.PARTS["healing"][0], plain=True) is None


def test_a_model_that_the_script_cannot_compute_is_passed_over(shown):
    config = ConfigDict(shown["healing"].config.to_dict())
    config.model.name = "mine"
    group = [shown["healing"]._replace(config=config), *shown.values()], []
    for part, name in ("growing", "doubling"), ("healing", "healing"):
        found = play.choose_model(group, play.PARTS[part][0], plain=False)
        assert found.params is shown[name].params


def test_a_page_has_no_picture_of_celeba(shown):
    images = shown["doubling"].data._replace(name="celeba")
    group = [shown["doubling"]._replace(data=images)], []
    assert play.choose_model(group, play.PARTS["growing"][0], plain=False) is None


def test_a_damaged_file_says_so_in_a_line(visit, text):
    # Two characters change places.
    page = visit(re.sub(r'(id="block">.{1000}.*?)(\w)(?!\2)(\w)', r"\1\3\2", text))
    assert page.value("document.querySelector('main').offsetParent") is None
    assert page.value("$('fault').innerText").startswith("The weights in this file are damaged")


def test_who_asked_for_less_motion_sees_none_before_pressing_play(chromium, visit, text):
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    chromium("Emulation.setEmulatedMedia", features=features)
    rests = visit(text).value("!playing && !shown.steps")
    chromium("Emulation.setEmulatedMedia", features=[])
    assert rests


@pytest.mark.slow  # waits for a page in a page
def test_it_runs_in_the_frame_of_a_notebook(visit, text):
    frame = f'<iframe srcdoc="{html.escape(text)}" width="100%" height="900"></iframe>'
    page = visit(f'<meta charset="utf-8">{frame}')  # without it, Chromium may guess another one
    page.wait("+frames[0].document.querySelector('#likelihood').textContent.replace('−', '-') < 0")


@pytest.mark.slow  # each draws a page, for 3 seconds
@pytest.mark.parametrize("classes", [4, 9])
def test_a_model_of_ones_own_images_shows_them_and_the_other_model_its_digits(
    shown, visit, classes
):
    images, labels = glyphs.draw(9, seed=0, side=32)
    bits = np.packbits((images > 0).reshape(9, -1), axis=1)
    mine = Dataset("own", bits, bits, None, 20 + labels if classes == 4 else None)
    run = shown["doubling"]._replace(data=mine, origin="a/<!-- <script>.npz")
    text = play.page(shown | {"doubling": run})
    assert "MNIST" in text
    page = visit(text)
    assert " weights, from <!-- <script>.npz." in page.value("$('origin').textContent")
    page.key("3")
    pixels = page.value("Array.from({ length: 1024 }, (_, i) => ends[0].number(i))")
    assert pixels == (images[3] > 0).ravel().tolist()
    state = "document.querySelectorAll('#images0 button:not([hidden])').length - 1, ends[0].label"
    assert page.value(f"[{state}]") == [classes, 3]
    page.press("#modes [value=wound]")
    page.wait(READY)
    assert page.value(f"[{state}]") == [10, 3]


# ---- The arithmetic --------------------------------------------------------------------------


WIDTHS = {"model__channels": 15, "model__hidden": 18, "model__position_waves": 2}


@pytest.mark.slow  # each compiles for 3 seconds
@pytest.mark.parametrize(
    "name, part, latent_size, fields",
    [
        ("doubling", "growing", 10, {"model__steps_per_doubling": 2}),
        ("nondoubling", "healing", 5, {}),
        ("healing", "healing", 5, WIDTHS),
    ],
)
def test_a_run_with_channels_that_are_no_multiple_of_four_is_computed_as_well(
    visit, shown, name, part, latent_size, fields
):
    config = tiny.config(name, model__latent_size=latent_size, **fields)
    model = make_model(config.model)
    params = reference.numbers_like(jax.eval_shape(model.init, jax.random.key(0)), 0, 0.1)
    params = jax.tree.map(lambda x: np.float32(np.float16(x)), params)
    run = shown["doubling"]._replace(config=config, model=model, params=params)
    page = visit(play.page({name: run} | {n: m for n, m in shown.items() if n != name}))
    code = np.array(page.value(f"[Array.from(models.{part}.codes[0])]"))
    expected, moves = jax.jit(model.grow, static_argnums=2)(params, code, None)[-1][-1], 1000
    if model.steps:  # then rows 13 to 27 lose their right half, and heal
        expected = advance(model, params, expected.at[:, 13:28, 16:].set(0), 7)
        moves = model.steps + 7
    found = page.value(
        f"(() => {{ let state = initialState(models.{part}, models.{part}.codes[0]);"
        f"const C = state.model.channels; for (let i = 0; i < {moves} && !isGrown(state); i++) {{"
        f"if (i === {model.steps or -1}) for (let j = 13 * 32; j < 28 * 32; j++) if (j % 32 >= 16)"
        "state.s.fill(0, at(j, 32) * C, (at(j, 32) + 1) * C); state = move(state); }"
        "return Array.from(state.s); })()"
    )
    # Its border and further channels are 0.
    framed = np.pad(expected[0], [(1, 1), (1, 1), (0, -expected.shape[-1] % 4)])
    error = np.abs(np.reshape(found, framed.shape) - framed).max() / np.abs(framed).max()
    assert error < (1e-3 if model.steps else 1e-4)


def test_a_3_grows_as_in_the_figure_step_by_step_and_blends_into_a_6(visit, shown, text):
    _, model, params, data, *_ = shown["doubling"]
    stored = np.stack([data.test[data.test_labels == label][1] for label in (3, 6)])
    images = as_floats(model.likelihood, stored)
    a, b = np.float32(np.float16(posterior_means(model, params, images)))  # as the page has them
    page = visit(text)
    page.key("3")
    page.key("3")
    page.value("restart(), playing = false")  # from the beginning, and paused there
    page.wait(READY)
    for stage in jax.jit(model.grow, static_argnums=2)(params, a[None], None):
        for cells in stage[:, 0]:
            page.press("#step")
            page.wait("!moves && !waiting")
            assert_shows(page, model, cells[..., :1])
    expected = model.likelihood.log_prob(cells[None, ..., :1], images[:1])
    likelihood = page.value("+$('likelihood').textContent.replace('−', '-')")
    assert abs(likelihood - expected[0]) < 0.06
    page.press("#memory")  # channels 1 to 3, on the scale of the first digit of each kind
    codes = page.value("models.growing.codes.filter((_, i) => i % 10 === 0).map(z => [...z])")
    grown = jax.jit(model.grow, static_argnums=2)(params, np.array(codes), 4)[-1][-1][..., 1:]
    low, middle, high = np.percentile(grown, (10, 50, 90), axis=(0, 1, 2))
    colours = 255 / (1 + np.exp(2 * (middle - cells[..., 1:4]) / (high - low)))
    assert np.abs(of(page)[..., :3] - colours).max() <= 2
    page.press("#memory")
    page.press("[value=blend]")
    page.press("#images1 [aria-label='6']")
    page.press("#images1 [aria-label='6']")
    for mix in (0, 0.37, 1):
        page.value(f"$('mix').value = {mix}; $('mix').dispatchEvent(new Event('input'))")
        page.wait("shown.grown && !asked && !waiting")
        assert_shows(page, model, jax.jit(model.decode)(params, (a + mix * (b - a))[None])[0])


# ---- Colours ---------------------------------------------------------------------------------


FACES = binomial(16, 3, 16)


def coloured(name):
    """A TrainedModel of faces with drawn parameters, one whose pictures have all colours."""
    fields = {"model__doublings": 4}
    if name == "healing":
        fields = WIDTHS | {"model__channels": 18, "train__damage_size": 8}
    config = tiny.config(
        name,
        data__name="faces",
        model__size=16,
        model__colours=3,
        model__levels=16,
        model__latent_size=5,
        **fields,
    )
    model = make_model(config.model)
    params = reference.numbers_like(jax.eval_shape(model.init, jax.random.key(0)), 0, 0.15)
    params = jax.tree.map(lambda x: np.float32(np.float16(x)), params)
    faces = load("faces", None, FACES)
    return TrainedModel(config, model, params, faces, None, "checkpoint.npz")


@pytest.fixture(scope="module")
def faces():
    return {name: coloured(name) for name in ("doubling", "healing")}


def test_digits_and_faces_are_sets_of_one_page(faces, visit):
    text = play.page(faces)
    assert len(text.encode()) <= 1_200_000 and "CC0 1.0" in text and "MNIST" in text
    page = visit(text)
    assert page.value("sets.map(x => x.name)") == ["Faces", "Digits"]
    buttons = "[...document.querySelectorAll('#images0 button:not([hidden])')]"
    classes = ["short hair", "long hair", "hat"]
    classes += [f"{name}, glasses" for name in classes]
    assert page.value(f"{buttons}.map(x => x.title)") == [*classes, ""]
    page.press("#sets [value='1']")
    page.wait("current && model().size === 32")
    assert page.value(f"{buttons}.map(x => x.title)") == [*"0123456789", ""]
    page.press("#modes [value=wound]")
    page.press("#sets [value='0']")
    page.wait("current && mode === 'wound' && shown.n === 16")


def test_a_face_grows_as_in_the_figure_and_its_likelihood_is_the_models(faces, visit):
    _, model, params, data, *_ = faces["doubling"]
    page = visit(play.page(faces))
    page.key("3")
    page.wait("shown.grown && current && !waiting")
    z = np.float32(page.value("[[...model().codes[ends[0].k]]]"))
    stored = data.test[data.test_labels == 3][:1]
    numbers = page.value("Array.from({ length: 768 }, (_, i) => ends[0].number(i))")
    np.testing.assert_array_equal(numbers, stored[0])
    logits = jax.jit(model.decode)(params, z)
    assert_shows(page, model, logits[0])
    assert np.ptp(of(page)[..., :3], axis=-1).max() > 20  # it has colours
    expected = float(model.likelihood.log_prob(logits, as_floats(FACES, stored))[0])
    likelihood = page.value("+$('likelihood').textContent.replace('−', '-')")
    assert likelihood == pytest.approx(expected, rel=1e-4)


def test_a_wounded_face_counts_pixels_of_which_a_colour_has_changed(faces, visit):
    page = visit(play.page(faces))
    page.press("#modes [value=wound]")
    page.wait("mode === 'wound' && current && !waiting")
    page.value("restart(); [playing, moves] = [false, model().steps]; tick()")
    page.wait("current && !waiting && shown.steps === model().steps")
    before = of(page)[..., :3]
    assert page.value("[+$('size').max, model().size]") == [8, 16]
    page.value("erase((column, row) => row < 12)")
    page.wait("before && !wounds.size && !waiting")
    after = of(page)[..., :3]
    assert (after[:12] == 128).all() and (after[12:] == before[12:]).all()
    distance = np.max(abs(before - 127.5), axis=-1)[:12]
    assert np.any((distance > 33) & (distance < 60))  # some are just far enough
    near = np.sum(abs(distance - 32) < 1)  # the canvas has rounded
    assert abs(page.value("+$('changed').textContent") - np.sum(distance > 32)) <= near


# ---- Mouse, keys, fingers --------------------------------------------------------------------


def test_a_wound_by_the_mouse_changes_pixels_and_they_heal(grown):
    before = of(grown)[..., 0]
    grown.drag("#cells", [(0.35, 0.45), (0.5, 0.45), (0.6, 0.55)])
    grown.wait("!wounds.size && !waiting")
    hole = of(grown)[..., 0] != before
    assert (of(grown)[hole][:, :3] == 128).all() and hole.sum() > 50  # a logit of 0: one half
    peak = grown.value("+$('changed').textContent")
    assert peak == ((before > 127) & hole).sum() > 0
    grown.press("#play")
    grown.wait(f"+$('changed').textContent < {peak}")


def test_the_keys_do_all_that_the_mouse_does(grown):
    grown.value("$('cells').focus()")
    for keys, condition in (
        ("q", f"(i => i.length === 256 && i[255] - i[0] === 15 * 32 + 15)({LOST})"),
        ("a", "playing && !before"),
        ("p", "!playing && !waiting"),
        ("ArrowLeft ArrowUp ArrowUp", "brush.x === 15 && brush.y === 14 && !$('brush').hidden"),
        ("Enter", f"[430, 431, 462, 463].every(i => {LOST}.includes(i))"),
        ("m", "$('memory').checked"),
        ("8", "ends[0].label === 8"),
        ("r", "ends[0].random"),
    ):  # fmt: skip
        for key in keys.split():
            grown.key(key)
        grown.wait(condition)
    z = grown.value("Array.from(ends[0].random)")  # from the prior
    assert abs(np.std(z) - 1) < 0.1


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
# One finger comes, then a second one; both move, and go.
TOUCHES = """(({ left, top, width }) => {
  window.height = scrollY;
  const [first, later, second, last] = [[0.5, 0.3], [0.5, 0.7], [0.9, 0.9], [0.9, 0.8]]
    .map(([u, v]) => ({ x: left + u * width, y: top + v * width }));
  return [[first], [first, second], [later, last], []];
})($('cells').getBoundingClientRect())"""


@pytest.mark.slow  # a browser at many widths, for 9 seconds
@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_overlaps_and_one_finger_wounds_without_scrolling_at_any_width(visit, text, width):
    page = visit(text, width)
    for mode in ("grow", "blend", "wound"):
        page.press(f"[value={mode}]")
        page.wait(f"mode === '{mode}' && current && shown.n === 32 && shown.steps > 8")
        assert page.value(RECTANGLES) == []
        assert page.value("document.documentElement.scrollWidth") <= width
    page.press("#play")
    page.box("#cells")  # brings it into view
    for kind, points in zip(("Start", "Start", "Move", "End"), page.value(TOUCHES), strict=True):
        page("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=points)
    page.wait("before && !wounds.size && !waiting && scrollY === height")
    # The first finger's line is lost, rows 10 to 21 of column 16, and none below the second one.
    assert page.value(
        f"{LOST}.filter(i => i % 32 === 16 && i >= 320 && i < 704).length === 12"
        f" && {LOST}.every(i => i % 32 < 26)"
    )
