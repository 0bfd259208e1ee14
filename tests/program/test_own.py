"""One's own images: each form gives the same bits. A wrong file costs one line, and no memory."""

import gzip
import json
import os
import struct
import tracemalloc
import zipfile

import glyphs
import jax
import numpy as np
import pytest
import tiny

from vnca.program import VncaError, checkpoint, data, evaluate, own, train, workdir
from vnca.program.config import check as check_config
from vnca.program.config import flatten
from vnca.program.machine import fit_to_machine
from vnca.program.method import make_method
from vnca.report import check, compile, operations, packaged

pytestmark = pytest.mark.usefixtures("quickly_compiled")

TRAIN, TRAIN_LABELS = glyphs.draw(2300, seed=1)  # three chunks, of which the last is shorter
TEST, TEST_LABELS = glyphs.draw(50, seed=2)
LABELS = {"train_labels": TRAIN_LABELS, "test_labels": TEST_LABELS}


def draws(*arrays):
    """The bits of arrays in order, each pixel by its own draw: bool, each [N, H, W]."""
    random = np.random.RandomState(0)
    for array in arrays:
        levels = array / 255 if array.dtype == np.uint8 else array
        chances = [random.random_sample() for _ in range(array.size)]
        yield np.array(chances).reshape(array.shape) < levels


def pixels(packed):
    return np.unpackbits(packed, axis=1).reshape(-1, 28, 28)


def refused(match, path):
    with pytest.raises(VncaError, match=match) as caught:
        data.load("own", path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def npz(tmp_path):
    """Writes an .npz of these arrays. Returns its path."""

    def write(**arrays):
        np.savez(tmp_path / "mine.npz", **arrays)
        return tmp_path / "mine.npz"

    return write


# ---- What is read --------------------------------------------------------------------------------


def test_each_form_gives_the_bits_of_one_draw_a_pixel(tmp_path, npz):
    all_arrays = (TRAIN, TEST, TRAIN_LABELS, TEST_LABELS)
    forms = [
        glyphs.write_idx(tmp_path / "gzipped", *all_arrays),
        glyphs.write_idx(tmp_path / "plain", *all_arrays, ending=""),
        npz(train=TRAIN, test=TEST, **LABELS),
        tmp_path,  # a folder with one .npz
    ]
    np.savez_compressed(tmp_path / "plain" / "x", train=TRAIN / 255, test=TEST / 255, **LABELS)
    os.renames(tmp_path / "plain" / "x.npz", tmp_path / "floats" / "x.NPZ")
    glyphs.write_idx(tmp_path / "plain", TEST, TRAIN, TEST_LABELS, TRAIN_LABELS, ending="")
    glyphs.write_idx(tmp_path / "plain", *all_arrays)  # a gzipped copy comes before a plain one
    wanted = list(draws(TRAIN, TEST))
    for path in [*forms, tmp_path / "floats", tmp_path / "floats" / "x.NPZ"]:
        found = data.load("own", path)
        assert found.name == "own" and found.train.shape == (2300, 98)
        np.testing.assert_array_equal(pixels(found.train), wanted[0])
        np.testing.assert_array_equal(pixels(found.test), wanted[1])
        np.testing.assert_array_equal(found.train_labels, TRAIN_LABELS)
        np.testing.assert_array_equal(found.test_labels, TEST_LABELS)
        assert {array.dtype for array in found[1:]} == {np.dtype(np.uint8)}


def test_black_and_white_images_stay_as_they_are_and_smaller_ones_are_centred(npz):
    small = glyphs.draw(7, seed=3, side=20)[0][:, :, :13] > 0
    for kind in (bool, np.float16, np.float32):
        found = data.load("own", npz(train=small.astype(kind), test=np.ones((1, 28, 28), kind)))
        images = pixels(found.train)
        np.testing.assert_array_equal(images[:, 4:24, 7:20], small)
        assert images.sum() == small.sum() and found.test.min() == 255
        assert found.train_labels is None and found.test_labels is None


def test_the_brightest_pixel_may_be_no_darker_than_half(npz):
    dark = np.minimum(TEST, 128)
    data.load("own", npz(train=dark, test=dark))
    refused("no grey level above 127,", npz(train=TEST, test=np.minimum(TEST, 127)))


def test_a_dark_chunk_is_read_and_a_wrong_value_in_a_later_one_is_named(npz):
    dark = TRAIN.copy()
    dark[2000:] = 0
    assert pixels(data.load("own", npz(train=dark, test=TEST)).train)[2000:].max() == 0
    floats = np.zeros((2300, 2, 2))
    floats[2100, 1, 0] = -1
    refused(r"train has the value -1\.0 in image 2,100: ", npz(train=floats, test=TEST))


def test_as_many_images_as_are_allowed_are_not_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "MOST", 50)
    glyphs.write_idx(tmp_path, TEST, TEST)
    assert len(data.load("own", tmp_path).train) == 50
    glyphs.write_idx(tmp_path, TRAIN[:51], TEST)
    refused("has 51 images: choose at most 50", tmp_path)


def test_the_fingerprint_is_that_of_the_bits_alone(npz):
    first = data.load("own", npz(train=TRAIN, test=TEST))
    again = data.load("own", npz(train=TRAIN, test=TEST, **LABELS))
    assert first.sha256 == again.sha256 and first.identity == f"own {first.sha256[:12]}"
    changed = TEST.copy()
    changed[0, 0, 0] = 255
    other = data.load("own", npz(train=TRAIN, test=changed))
    assert other.sha256 != first.sha256
    moved = data.Dataset("own", first.train[:-1], np.r_[first.train[-1:], first.test], None, None)
    assert moved.sha256 != first.sha256
    assert data.load("bundled").identity == "bundled"


@pytest.mark.parametrize(
    "names",
    [
        ("emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-test-images-idx3-ubyte.gz"),
        ("qmnist-train-images-idx3-ubyte", "qmnist-test-images-idx3-ubyte"),
        ("train-images.idx3-ubyte", "t10k-images.idx3-ubyte"),
    ],
)
def test_files_are_found_under_the_names_of_the_published_sets(tmp_path, names):
    for name, array in zip(names, (TRAIN, TEST), strict=True):
        content = glyphs.idx(array)
        (tmp_path / name).write_bytes(gzip.compress(content) if name[-3:] == ".gz" else content)
    labels = np.zeros((50, 8), np.int32)  # QMNIST's have eight columns
    labels[:, 0], labels[:, 1] = TEST_LABELS, 99
    (tmp_path / "qmnist-test-labels-idx2-int").write_bytes(glyphs.idx(labels))
    (tmp_path / f"._{names[0]}").write_bytes(b"macOS adds such files")
    (tmp_path / ".hidden.npz").touch()
    found = data.load("own", tmp_path)
    assert found.train.shape == (2300, 98) and found.train_labels is None
    np.testing.assert_array_equal(found.test_labels, TEST_LABELS)


# ---- What is refused -----------------------------------------------------------------------------

FLOATS = TEST / 255
WRONG = {  # name: (arrays of an .npz, what the line has in it)
    "too large": ({"train": np.zeros((3, 40, 40), np.uint8)}, "train has images of 40×40"),
    "too wide": ({"test": np.zeros((3, 28, 29), np.uint8)}, "test has images of 28×29"),
    "NaN": ({"test": np.where(FLOATS > 0.9, np.nan, FLOATS)}, "test has the value nan in image"),
    "infinite": ({"train": np.full((2, 28, 28), np.inf)}, "train has the value inf in image 0"),
    "negative": ({"train": -FLOATS}, r"train has the value -0\.\d+ in image 0"),
    "not of 0 to 1": ({"train": FLOATS * 255}, r"train has the value \d+\.0 in image 0"),
    "whole numbers": ({"train": TEST.astype(int)}, "train is int64: it must be bool, uint8 0…255"),
    "complex": ({"train": FLOATS * 1j}, "train is complex128"),
    "texts": ({"train": TEST.astype(str)}, "train is <U3"),
    "ragged": ({"train": np.array([TEST[0], TEST[0, 1:]], object)}, "train is object"),
    "empty": ({"train": TEST[:0]}, r"train is empty, \[0, 28, 28\]"),
    "of no width": ({"test": TEST[:, :, :0]}, r"test is empty, \[50, 28, 0\]"),
    "flat": ({"test": TEST.reshape(50, 784)}, r"test has the shape \[50, 784\]: it must be"),
    "in colour": ({"test": TEST[..., None]}, r"test has the shape \[50, 28, 28, 1\]"),
    "just above 1": (
        {"test": np.where(FLOATS > 0.9, 1.01, FLOATS)},
        r"test has the value 1\.01 in",
    ),
    "0 and 1 as grey levels": ({"train": (TEST > 0).astype(np.uint8)}, "no grey level above 1,"),
    "17 grey levels": ({"test": TEST // 16}, "no grey level above 15, and white is 255: scale"),
    "in Fortran order": ({"train": np.asfortranarray(TEST)}, "train is in Fortran order"),
    "no test": ({"test": None}, "has no array test: save train and test"),
    "too few labels": ({"test_labels": TEST_LABELS[1:]}, r"test_labels is uint8 \[49\]"),
    "labels in rows": ({"test_labels": np.zeros((50, 10), int)}, r"int64 \[50, 10\]"),
    "labels as floats": ({"test_labels": np.zeros(50)}, r"test_labels is float64 \[50\]"),
    "a label below 0": ({"test_labels": np.arange(-1, 49)}, "has the label -1"),
    "a label above 255": ({"test_labels": np.full(50, 256)}, "has the label 256"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_array_costs_one_line(npz, what):
    changed, match = WRONG[what]
    arrays = {"train": TEST, "test": TEST} | changed
    path = npz(**{key: array for key, array in arrays.items() if array is not None})
    refused(f"mine.npz.*{match}", path)


def header(count, *shape, code=8):
    return struct.pack(f">HBB{1 + len(shape)}I", 0, code, 1 + len(shape), count, *shape)


IMAGES = glyphs.idx(TEST)
IDX_FAULTS = {  # name: (content of the training images, what the line has in it)
    "cut": (IMAGES[:-1], "ends after 49 of 50 rows"),
    "longer": (IMAGES + b"\0", "more bytes than its header promises"),
    "empty": (b"", "does not begin like an IDX file"),
    "of text": (b"<!DOCTYPE html>" * 99, "does not begin like an IDX file"),
    "cut in its header": (IMAGES[:11], "does not begin like an IDX file"),
    "of floats": (header(50, 28, 28, code=13), "does not begin like an IDX file"),
    "of labels": (glyphs.idx(TEST_LABELS), r"has the shape \[50\]"),
    "of 40×40": (header(1, 40, 40) + bytes(1600), "has images of 40×40"),
    "of no images": (header(0, 28, 28), r"is empty, \[0, 28, 28\]"),
    "of 13 million": (header(13_000_000, 28, 28), "has 13,000,000 images: choose at most"),
    "of whole numbers": (header(1, 28, 28, code=12) + bytes(3136), "is >i4"),
    "a truncated gzip": (gzip.compress(IMAGES)[:-20], "ended before .*; copy or download it again"),
    "a damaged gzip": (gzip.compress(IMAGES)[:-8] + bytes(8), "CRC.*; copy or download it again"),
}


@pytest.mark.parametrize("what", IDX_FAULTS)
def test_a_wrong_idx_file_costs_one_line(tmp_path, what):
    content, match = IDX_FAULTS[what]
    glyphs.write_idx(tmp_path, TEST, TEST, ending="")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    refused(f"train-images-idx3-ubyte.*{match}", tmp_path)


def test_a_missing_doubled_or_unreadable_file_is_named(tmp_path, npz):
    refused("nowhere: No such file or directory; give --config.data.dir", tmp_path / "nowhere")
    refused("has no IDX files of images and no .npz file", tmp_path)
    with pytest.raises(VncaError, match="add --config.data.dir=PATH"):
        data.load("own")
    idx = glyphs.write_idx(tmp_path / "idx", TEST, TEST)
    (idx / "train-images.idx3-ubyte").mkdir()  # no file of images, although it is called so
    (idx / "t10k-images-idx3-ubyte.gz").rename(idx / "other-t10k-images-idx3-ubyte")
    (idx / "test-images-idx3-ubyte").write_bytes(IMAGES)
    refused("has both other-t10k-images-idx3-ubyte and test-images-idx3-ubyte", idx)
    for path in idx.glob("*t*-images*"):
        if "train" not in path.name:
            path.unlink()
    refused("has no t10k-images-idx3-ubyte, gzipped or not", idx)
    os.mkfifo(idx / "t10k-images-idx3-ubyte")  # it would never end
    refused("t10k-images-idx3-ubyte is not a file", idx)
    path = npz(train=TEST, test=TEST)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(IMAGES)
    refused("has IDX files and mine.npz: move one away", tmp_path)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    path.with_name("another.npz").write_bytes(b"")
    refused("2 .npz files, such as another.npz", tmp_path)
    refused("another.npz: .*; copy or download it again", path.with_name("another.npz"))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(IMAGES)
    refused("idx3-ubyte is not an .npz file; give", tmp_path / "train-images-idx3-ubyte")
    path.write_bytes(path.read_bytes()[:-30])
    refused("mine.npz: .*; copy or download it again", path)


def test_a_link_to_nothing_and_too_little_memory_are_no_question_of_rights(tmp_path, monkeypatch):
    glyphs.write_idx(tmp_path, TEST, TEST, ending="")
    (tmp_path / "t10k-labels-idx1-ubyte").symlink_to(tmp_path / "nowhere")
    refused("labels-idx1-ubyte: No such file or directory; copy or download", tmp_path)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(own, "binarize", fail)
    with pytest.raises(MemoryError):  # and not that the file is damaged
        own.read_own(tmp_path)


@pytest.mark.parametrize("key", ["train", "test_labels"])
def test_no_pickle_is_run(npz, key):
    arrays = {"train": TRAIN, "test": TEST, "test_labels": TEST_LABELS}
    refused(f"{key} is object", npz(**arrays | {key: np.array([tiny.Trap()], object)}))


def test_a_file_of_zip_that_lies_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    for content, match in (
        (b"no header", "copy or download it again"),
        (b"\x93NUMPY\x02\0" + bytes(200), r"is not .npy version 1\.0"),
        (npy("(50, 28, 28)") + bytes(50 * 784 - 1), "train ends after 49 of 50 rows"),
        (npy("(50, 28, 28)") + bytes(50 * 784 + 1), "train has more bytes than"),
        (npy("(10**9, 28, 28)"), "copy or download it again"),
        (npy("(1000000000, 28, 28)"), "has 1,000,000,000 images: choose at most"),
        (npy("(-1, 28, 28)"), "copy or download it again"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train.npy", content)
            archive.writestr("test.npy", content)
        refused(match, path)


def npy(shape):
    """The header of a .npy file of uint8 with this shape, as text."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()


# ---- Memory --------------------------------------------------------------------------------------


def peak(path):
    """The most memory, in bytes, that a load takes, and its result or error."""
    tracemalloc.start()
    try:
        found = data.load("own", path)
    except VncaError as fault:
        found = fault
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size, found


ONE_CHUNK = 30e6  # 1,000 images of float64, their draws, and the comparison


def test_memory_is_that_of_the_packed_bits_and_one_chunk(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, train=np.full((20_000, 28, 28), 0.5), test=FLOATS)  # 125 MB
    size, found = peak(path)
    assert found.train.shape == (20_000, 98) and size < found.train.nbytes + ONE_CHUNK


def test_neither_ten_gigabytes_nor_a_gzip_bomb_are_read(tmp_path):
    glyphs.write_idx(tmp_path, TEST, TEST, ending="")
    path = tmp_path / "train-images-idx3-ubyte"
    for content in (b"", IMAGES, header(13_000_000, 28, 28)):
        with open(path, "wb") as file:
            file.write(content)
            file.truncate(10 << 30)  # it takes no room on the disk
        size, found = peak(tmp_path)
        assert size < ONE_CHUNK and isinstance(found, VncaError)
    path.write_bytes(gzip.compress(IMAGES + bytes(100 << 20)))
    size, found = peak(tmp_path)
    assert size < ONE_CHUNK and "more bytes than its header promises" in str(found)


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, npz):
    """A config of a tiny model on glyphs, and a workdir in which it has made two updates."""
    path = npz(train=TRAIN[:40], test=TEST[:10], test_labels=TEST_LABELS[:10])
    config = tiny.config("baseline", data__name="own", data__dir=str(path), train__updates=2)
    config.eval.every = config.eval.samples = 1
    lines = []
    train.train(config, tmp_path / "run", lines.append, lambda *_: {})
    assert any(line.endswith("(10 images)") for line in lines)  # a quick test takes 64 at most
    return config, tmp_path / "run", path


def test_a_run_keeps_the_fingerprint_and_refuses_other_images(run, tmp_path):
    config, folder, path = run
    found = data.load("own", path)
    _, saved, _ = checkpoint.newest(folder)
    assert saved["data"] == {"name": "own", "dir": str(path), "sha256": found.sha256}
    assert tiny.metrics(folder)[1]  # quick tests, though there are fewer than 64 test images
    config.train.updates, lines = 3, []
    train.train(config, folder, lines.append, lambda *_: {})
    assert any("resuming" in line for line in lines)
    config.data.dir = str(path.rename(path.with_name("moved.npz")))  # the same images
    config.train.updates = 4
    train.train(config, folder, lines.append, lambda *_: {})
    assert checkpoint.newest(folder)[1]["data"]["dir"] == config.data.dir
    np.savez(config.data.dir, train=TRAIN[1:41], test=TEST[:10])
    with pytest.raises(VncaError, match="are not those of the run .* SHA-256") as caught:
        train.train(config, folder, print, lambda *_: {})
    assert "\n" not in str(caught.value) and found.sha256[:12] in str(caught.value)


def test_a_model_is_evaluated_on_other_images_than_it_was_trained_on_with_a_warning(run):
    config, folder, path = run

    def warnings():
        lines = []
        evaluate.evaluate(config, folder, lines.append, packaged.stand_in)
        result = json.loads((folder / "evaluation.json").read_text())
        assert not any("evaluated before" in line for line in lines)  # of these images, none was
        return [line for line in lines if "was trained on other images (own)" in line], result

    assert warnings()[0] == []
    np.savez(path, train=TRAIN[1:41], test=TEST[:10])
    said, result = warnings()
    assert len(said) == 1 and result["config"]["data"]["sha256"] == data.load("own", path).sha256
    config.data.update(name="bundled", dir=None)
    config.eval.images = 2
    said, result = warnings()
    assert (
        len(said) == 1 and result["data"] == "bundled" and "sha256" not in result["config"]["data"]
    )
    config.data.name = "auto"  # that of the training
    with pytest.raises(VncaError, match="own needs the place of your images"):
        warnings()
    config.data.update(dir=str(path))
    with pytest.raises(VncaError, match="own for your own images"):  # auto with a place: larochelle
        warnings()


def test_arrays_that_are_not_used_are_named(npz):
    path, lines = npz(train=TRAIN[:4], test=TEST[:4], y_train=TRAIN_LABELS[:4]), []
    assert data.load("own", path, lines.append).train_labels is None
    words = "these arrays are not used: y_train. Labels are the arrays train_labels and test_labels"
    assert lines == [f"warning: {path}: {words}"]
    data.load("own", npz(train=TRAIN[:4], test=TEST[:4], test_labels=TEST_LABELS[:4]), pytest.fail)


@pytest.mark.parametrize("split, count", [("test", 10), ("train", 40)])
def test_every_image_of_either_split_is_evaluated_and_no_more(run, split, count):
    config, folder, path = run
    config.eval.split = split
    evaluate.evaluate(config, folder, [].append, packaged.stand_in)
    result = json.loads((folder / "evaluation.json").read_text())
    assert (result["images"], result["data"], result["split"]) == (count, "own", split)
    assert result["config"]["data"]["sha256"] == data.load("own", path).sha256
    config.eval.images = count + 1
    with pytest.raises(
        VncaError, match=f"eval.images={count + 1}: the set has no more than {count}"
    ):
        evaluate.evaluate(config, folder, print, packaged.stand_in)


def test_a_test_set_of_ones_own_may_have_more_images_than_mnists():
    check_config(tiny.changed("doubling", data__name="own", data__dir="x", eval__images=60_000))


def test_a_batch_or_pool_above_the_training_set_is_refused(tmp_path, npz):
    path = str(npz(train=TRAIN[:40], test=TEST))
    for name, field in (("baseline", "train__batch_size"), ("nondoubling", "train__pool_size")):
        config = tiny.config(name, data__name="own", data__dir=path, **{field: 48})
        match = f"config.{field.replace('__', '.')}=48: the training set has only 40 images"
        with pytest.raises(VncaError, match=match):
            train.train(config, tmp_path / name, print, lambda *_: {})
        with pytest.raises(VncaError, match=match):
            operations.operations(config, tmp_path / name, print)
        with pytest.raises(VncaError, match=match):
            compile.lower_update(make_method(config), fit_to_machine(config), jax.devices())
        config.train[field.removeprefix("train__")] = 60_008  # of the bundled ones
        with pytest.raises(VncaError, match="=60008: the training set has only 60,000 images"):
            check.check(config, tmp_path / name, print)


def test_the_numbers_of_ones_own_images_are_read_once_and_without_a_word(npz, monkeypatch, capsys):
    path, loads, load = str(npz(train=TRAIN[:40], test=TEST, more=TEST)), [], data.load
    monkeypatch.setattr(data, "load", lambda *a, **b: loads.append(a) or load(*a, **b))
    assert data.image_counts("own", path) == data.image_counts("own", path) == (40, 50)
    assert len(loads) == 1 and capsys.readouterr() == ("", "")


def test_a_host_with_other_images_than_process_0_is_refused(npz, tmp_path, monkeypatch):
    path = str(npz(train=TRAIN[:40], test=TEST))
    config = tiny.config("baseline", data__name="own", data__dir=path)
    there = {name: value for name, value in flatten(config).items() if name != "data.dir"}
    # The config; no checkpoint; what process 0 has loaded.
    answers = iter([there, None, ["own", "own 0123456789ab"]])
    monkeypatch.setattr(workdir, "agree", lambda decide: next(answers))
    with pytest.raises(VncaError, match="copy the same files to every host"):
        workdir.open_run(config, tmp_path, print)


def test_a_process_with_another_config_than_process_0_is_refused(monkeypatch):
    sent = []
    monkeypatch.setattr(workdir, "agree", lambda decide: sent.append(decide()) or sent[0])
    for settings in ({}, {"data__dir": "another place of equal images"}):
        workdir.agree_on(tiny.config("healing", eval__samples=200, **settings))
    assert json.loads(json.dumps(sent[0])) == sent[0]  # as it is sent
    with pytest.raises(VncaError, match="config.eval.samples is 2 on this .* and 200 on process 0"):
        workdir.agree_on(tiny.config("healing", eval__samples=2))
