"""Promise 13, one's own images: each form gives the same bits; a wrong file costs one line."""

import contextlib
import gzip
import json
import os
import tracemalloc

import glyphs
import numpy as np
import pytest
import tiny

from vnca.program import VncaError, data

TRAIN, KINDS = glyphs.draw(2300, seed=1)
TEST = TRAIN[:50][::-1]
FLOATS = TEST / 255
LABELS = {"train_labels": KINDS, "test_labels": KINDS[:50]}
IMAGES = "train-images-idx3-ubyte"


def refused(path, *words):
    line = tiny.fault_of(data.load, "own", path)
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
        np.testing.assert_array_equal(np.r_[found.train, found.test], bits)
        assert [*found.train_labels, *found.test_labels] == [*KINDS, *KINDS[:50]]
    assert data.image_counts("own", str(path)) == (2300, 50)


def test_black_and_white_images_stay_as_they_are_and_smaller_ones_are_centred(npz):
    small = TRAIN[:7, 4:24, 8:21] > 0
    found = data.load("own", npz(train=small))
    right = np.pad(small, [(0, 0), (4, 4), (7, 8)]).reshape(7, 784)
    np.testing.assert_array_equal(np.unpackbits(found.train, axis=1), right)
    assert found.train_labels is None and found.test_labels is None


def test_files_are_found_under_the_names_of_the_published_sets(tmp_path):
    labels = np.full((50, 8), 99, np.int32)  # QMNIST's have eight columns
    labels[:, 0] = KINDS[:50]
    for name, content in {
        "emnist-letters-train-images-idx3-ubyte": glyphs.idx(TRAIN),
        "t10k-images.idx3-ubyte": glyphs.idx(TEST),
        "qmnist-test-labels-idx2-int": glyphs.idx(labels),
        "._emnist-letters-train-images-idx3-ubyte": b"macOS adds such files",
        "._x.npz": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / IMAGES).mkdir()  # as some archives have it
    found = data.load("own", tmp_path)
    assert len(found.train) == 2300
    np.testing.assert_array_equal(found.test_labels, KINDS[:50])


def test_the_fingerprint_is_that_of_the_bits_alone_and_stays_what_it_was(npz):
    images = {"train": np.eye(28, dtype=bool)[None], "test": np.ones((2, 28, 28), bool)}
    for labels in {}, {"test_labels": [7, 8]}:
        assert data.load("own", npz(**images, **labels)).identity == "own a403e2822d14"


def test_arrays_that_are_not_used_are_named(npz):
    lines = []
    data.load("own", npz(y_train=KINDS), lines.append)
    assert len(lines) == 1 and "y_train" in lines[0]


# ---- What is refused -----------------------------------------------------------------------------

WRONG = [  # the key of a wrong array, and what the line has in it
    ("train", np.zeros((3, 40, 40), bool), "train is bool [3, 40, 40]: it must be"),
    ("train", TEST[:0], "train is uint8 [0, 28, 28]"),
    ("test", TEST.reshape(50, 784), "[images, height, width]"),
    ("test", np.ones((1_000_001, 1, 1), bool), "1 to 1,000,000 images of at most 28×28"),
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
