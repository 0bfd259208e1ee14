"""Promise 13, one's own images: each form gives the same numbers; a wrong file costs one line."""

import contextlib
import gzip
import json
import os
import tracemalloc

import glyphs
import numpy as np
import pytest
import tiny

from vnca.likelihoods import binomial
from vnca.program import VncaError, data

TRAIN, KINDS = glyphs.draw(2300, seed=1)
TEST = TRAIN[:50][::-1]
FLOATS = TEST / 255
LABELS = {"train_labels": KINDS, "test_labels": KINDS[:50]}
IMAGES = "train-images-idx3-ubyte"


def refused(path, *words, likelihood=tiny.DIGITS):
    line = tiny.fault_of(data.load, "own", path, likelihood)
    for word in words:
        assert word in line


@pytest.fixture
def npz(tmp_path):
    """Writes mine.npz with the test images as train and test, unless other arrays are given."""

    def write(**arrays):
        np.savez(tmp_path / "mine.npz", **{"train": TEST, "test": TEST} | arrays)
        return tmp_path / "mine.npz"

    return write


# ---- What is read --------------------------------------------------------------------------------


def test_each_form_gives_the_bits_of_one_draw_a_pixel(tmp_path, npz):
    grey = np.r_[TRAIN, TEST].reshape(2350, 784) / 255
    bits = np.packbits(np.random.RandomState(0).random_sample(grey.shape) < grey, axis=1)
    for path in (
        glyphs.write_idx(tmp_path / "idx", TRAIN, TEST, *LABELS.values(), ending=""),
        glyphs.write_idx(tmp_path / "idx", TRAIN, TEST, *LABELS.values()),  # as of `gunzip -k`
        npz(train=TRAIN, **LABELS).rename(tmp_path / "grey"),
        npz(train=np.asfortranarray(TRAIN / 255), test=FLOATS, **LABELS).parent,
    ):
        found = data.load("own", str(path), log=pytest.fail)
        stored = np.r_[found.train, found.test]
        np.testing.assert_array_equal(glyphs.central_bits(stored), bits)
        assert [*found.train_labels, *found.test_labels] == [*KINDS, *KINDS[:50]]
        config = tiny.config(data__name="own", data__dir=str(path))
        assert data.training_images(config) == len(found.train) == 2300


def test_black_and_white_images_stay_as_they_are_and_smaller_ones_are_centred(npz):
    small = TRAIN[:7, 4:24, 8:21] > 0
    found = data.load("own", npz(train=small))
    right = np.pad(small, [(0, 0), (6, 6), (9, 10)]).reshape(7, 1024)
    np.testing.assert_array_equal(np.unpackbits(found.train, axis=1), right)
    assert found.train_labels is None and found.test_labels is None


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("colours, levels", [(1, 16), (3, 1), (3, 255)])
def test_images_of_every_size_in_grey_or_colours_are_centred_and_stored_in_their_levels(
    npz, size, colours, levels
):
    shape = 3, size - 3, size - 4, colours
    images = np.random.RandomState(size).randint(256, size=shape, dtype=np.uint8)
    images[:, 0, 0] = 255
    likelihood = binomial(size, colours, levels)
    found = data.load("own", npz(train=images[:2], test=images[2:]), likelihood)
    grey = images / 255
    if levels == 1:
        numbers = np.random.RandomState(0).random_sample(shape) < grey
    else:
        numbers = np.uint8(levels * grey + 0.5)
    expected = np.pad(numbers, [(0, 0), (1, 2), (2, 2), (0, 0)]).reshape(3, -1)
    expected = np.packbits(expected, axis=1) if levels == 1 else expected
    np.testing.assert_array_equal(np.r_[found.train, found.test], expected)


@pytest.mark.parametrize("levels", [2, 16, 254, 255])
def test_each_form_is_rounded_to_the_same_levels(npz, levels):
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    rounded = (2 * levels * grey.astype(int) + 255) // 510
    for form in grey, grey[..., None], grey / 255, np.float32(grey / 255):
        found = data.load("own", npz(train=form, test=form), binomial(16, 1, levels))
        np.testing.assert_array_equal(found.train, rounded.reshape(1, 256))
    white = np.ones((1, 16, 16), bool)
    found = data.load("own", npz(train=white, test=white), binomial(16, 1, levels))
    assert np.all(found.train == levels)


@pytest.mark.parametrize(
    "train, test, test_labels",
    [
        ("emnist-letters-train-images-idx3-ubyte", "emnist-letters-test-images-idx3-ubyte",
         "emnist-letters-test-labels-idx1-ubyte"),
        ("train-images.idx3-ubyte", "t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"),
        ("qmnist-train-images-idx3-ubyte", "qmnist-test-images-idx3-ubyte",
         "qmnist-test-labels-idx2-int"),
    ],
)  # fmt: skip
def test_files_are_found_under_the_names_of_the_published_sets(tmp_path, train, test, test_labels):
    labels = np.full((50, 8), 99, np.int32)  # QMNIST's have eight columns
    labels[:, 0] = KINDS[:50]
    for name, content in {
        train: glyphs.idx(TRAIN),
        test: glyphs.idx(TEST),
        test_labels: glyphs.idx(labels if test_labels.endswith("int") else KINDS[:50]),
        f"._{train}": b"macOS adds such files",
        "._x.npz": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / f"x-{IMAGES}").mkdir()  # as some archives have it
    found = data.load("own", tmp_path)
    assert len(found.train) == 2300
    np.testing.assert_array_equal(found.test_labels, KINDS[:50])


def test_files_of_two_sets_in_one_folder_are_refused(tmp_path):
    (tmp_path / "letters-train-images-idx3-ubyte").write_bytes(glyphs.idx(TRAIN[:9]))
    (tmp_path / "digits-t10k-images-idx3-ubyte").write_bytes(glyphs.idx(TEST))
    refused(tmp_path, "letters-train-images-idx3-ubyte and digits-t10k", "are two sets")


def test_an_array_of_another_size_is_refused_by_its_header(npz, monkeypatch):
    path = npz(train=np.zeros((2, 99, 99), np.uint8))
    monkeypatch.setattr(np.lib.format, "read_array", pytest.fail)
    refused(path, "train is uint8 [2, 99, 99]", "at most 32×32")


def test_the_fingerprint_is_that_of_the_bits_alone_and_stays_what_it_was(npz):
    images = {"train": np.eye(28, dtype=bool)[None], "test": np.ones((2, 28, 28), bool)}
    for labels in {}, {"test_labels": [7, 8]}:
        found = data.load("own", npz(**images, **labels))
        assert found.identity == "own 9584e768479c"
        bits = {name: glyphs.central_bits(getattr(found, name)) for name in images}
        assert found._replace(**bits).identity == "own a403e2822d14"  # as of 28×28 pixels


def test_arrays_that_are_not_used_are_named(npz):
    lines = []
    data.load("own", npz(y_train=KINDS), log=lines.append)
    assert len(lines) == 1 and "y_train" in lines[0]


# ---- What is refused -----------------------------------------------------------------------------

WRONG = [  # the key of a wrong array, and what the line has in it
    ("train", np.zeros((3, 40, 40), bool), "train is bool [3, 40, 40]: for config.model.size=32"),
    ("train", TEST[:0], "train is uint8 [0, 28, 28]"),
    ("test", TEST.reshape(50, 784), "[images, height, width]"),
    ("test", np.ones((1_000_001, 1, 1), bool), "1 to 1,000,000 images of at most 32×32"),
    ("train", TEST.astype(int), "train is int64"),
    ("test", np.array([tiny.Trap()], object), "Object arrays cannot be loaded"),
    ("test", np.where(TEST, np.nan, FLOATS), "test has values from nan to nan"),
    ("test", FLOATS * 1.01, "to 1.0"),
    ("train", FLOATS - 0.01, "from -0.01"),
    ("test", np.minimum(TEST, 127), "values from 0 to 127: black must be 0 and white 255"),
    ("test_labels", KINDS[:49], "test_labels is uint8 [49]"),
    ("train_labels", np.zeros(50), "train_labels is float64"),
    ("test_labels", np.arange(-1, 49), "whole numbers from 0 to 255"),
]


@pytest.mark.parametrize("key, array, words", WRONG)
def test_a_wrong_array_costs_one_line(npz, key, array, words):
    refused(npz(**{key: array}), "mine.npz: ", words)


@pytest.mark.parametrize(
    "size, colours, images, words",
    [
        (16, 1, TEST, "config.model.size=16 and config.model.colours=1 … at most 16×16"),
        (32, 3, TEST, "[50, 28, 28]: … config.model.colours=3 … [images, height, width, 3]"),
        (32, 1, np.stack([TEST] * 3, axis=-1), "[50, 28, 28, 3]: … colours=1"),
        (64, 1, np.zeros((1, 65, 1), bool), "[1, 65, 1]: … config.model.size=64 … at most 64×64"),
        (128, 3, np.zeros((1, 1, 129, 3), bool), "config.model.size=128 … at most 128×128"),
        (32, 3, np.zeros((1, 28, 28, 4), bool), "[1, 28, 28, 4]: … config.model.colours=3"),
    ],
)
def test_images_of_another_size_or_of_other_colours_cost_one_line_that_names_the_fields(
    npz, size, colours, images, words
):
    likelihood = binomial(size, colours, 16)
    refused(npz(train=images), "train is ", *words.split(" … "), likelihood=likelihood)


@pytest.mark.parametrize("likelihood", [tiny.DIGITS, binomial(16, 3, 255), binomial(64, 1, 1)])
def test_a_baseline_is_refused_images_that_reach_beyond_what_it_draws(npz, likelihood):
    size, last = likelihood.size, likelihood.size - 3
    for row, column in (2, 9), (last, 9), (9, 2), (9, last):
        reaching = np.zeros((2, size, size, likelihood.colours))
        reaching[1, row, column, -1] = 1
        plain = np.ones((1, 2, 2, likelihood.colours))
        for key in data.IMAGES:
            path = npz(**{"train": plain, "test": plain, key: reaching})
            found = data.load("own", path, likelihood)
            for side in size, size - 2, size - 4:
                data.check_border(found, likelihood, side)
            line = tiny.fault_of(data.check_border, found, likelihood, size - 6)
            assert line.startswith(f"config.model.drawn_size={size - 6}: ")
            assert line.endswith(f"set it to {size}")


def test_the_brightest_pixel_may_be_half_as_bright_as_white(npz):
    data.load("own", npz(train=np.minimum(TEST, 128), test=np.minimum(FLOATS, 0.5)))


CONTENT = glyphs.idx(TEST)
ZIPPED = gzip.compress(CONTENT)
IDX_FAULTS = {  # what the line has in it: the content of the training images
    "of size 39199 into shape (50,28,28)": CONTENT[:-1],
    "of size 39201 into shape (50,28,28)": CONTENT + b"\0",
    "does not begin like an IDX file": b"<!DOCTYPE html>",
    "[50]": glyphs.idx(KINDS[:50]),
    "ended before": ZIPPED[:-20],
    "CRC": ZIPPED[:-8] + bytes(8),
    "into shape (50,28,28)": gzip.compress(CONTENT + bytes(100 << 20)),
}


@pytest.mark.parametrize("words", IDX_FAULTS)
def test_a_wrong_idx_file_costs_one_line_and_little_memory(tmp_path, words):
    glyphs.write_idx(tmp_path, None, TEST)
    (tmp_path / IMAGES).write_bytes(IDX_FAULTS[words])
    tracemalloc.start()
    refused(tmp_path, str(tmp_path), words)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_a_missing_doubled_or_unreadable_file_is_named(tmp_path, npz):
    refused(tmp_path, "has no file of train images")
    idx = glyphs.write_idx(tmp_path / "idx", TEST, TEST)
    glyphs.write_idx(idx, TRAIN[:50], None, ending="")  # beside its own .gz, with other content
    refused(idx, f"{IMAGES} and {IMAGES}.gz are two sets")
    (idx / IMAGES).unlink()
    os.mkfifo(idx / IMAGES)  # it would never end
    refused(idx, f"{IMAGES}: it is not a file")
    (idx / "a.NPZ").touch()
    refused(idx, f"a.NPZ and {IMAGES} are two sets")
    npz().with_name("a.npz").touch()
    refused(tmp_path, "a.npz and mine.npz are two sets")


def test_an_npz_damaged_anywhere_is_whole_or_refused(npz):
    path = npz()
    good, wanted = path.read_bytes(), data.load("own", path).sha256
    for _ in glyphs.damaged(path, range(-200, 300)):
        with contextlib.suppress(VncaError):
            assert data.load("own", path).sha256 == wanted
    path.write_bytes(good.replace(b"(50, 28", b"(40, 28"))
    refused(path, "train has more bytes than its header promises")


# ---- A run ---------------------------------------------------------------------------------------


@pytest.mark.slow  # two processes that compile, for 6 seconds
def test_a_run_keeps_the_fingerprint_and_evaluates_every_image(tmp_path, npz):
    for count, mode, words in (
        (10, "train", "(10 images)"),  # of the quick test
        (9, "evaluate", "was trained on other images: config.data.sha256"),
        (9, "train", "belongs to a run with another config: config.data.sha256"),
    ):
        with tiny.Command(
            f"--workdir={tmp_path}", f"--mode={mode}", name="baseline", data__name="own",
            data__dir=npz(test=TEST[:count]), train__updates=1, eval__every=1, eval__samples=1,
        ) as command:  # fmt: skip
            assert command.end() == ("belongs" in words), command.complained()
            assert words in command.printed() + command.complained()
    assert json.loads((tmp_path / "evaluation.json").read_text())["images"] == 9
