"""Folders of pictures, one's own and CelebA: what is read is what Pillow reads, in the right set
and class; a wrong folder costs one line."""

import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny

from vnca.likelihoods import as_floats, binomial, logistic_mixture
from vnca.program import VncaError, data, folders, machine, runs

Image = pytest.importorskip("PIL.Image")
RANDOM = np.random.RandomState(0)
GREY, COLOURS = binomial(16, 1, 255), binomial(16, 3, 255)


def write(path, array=None, **options):
    """Writes an array, uint8 [H, W(, 3 or 4)], as a picture: by default noise of 20×16 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = RANDOM.randint(256, size=(20, 16, 3), dtype=np.uint8) if array is None else array
    Image.fromarray(array).save(path, **options)
    return path


def read(path, likelihood=COLOURS):
    return data.load("own", str(path), likelihood, log=pytest.fail)


def numbers(likelihood, stored):
    """0 … 255, int [N, size, size, colours]."""
    return np.rint(255 * np.asarray(as_floats(likelihood, stored))).astype(int)


def refused(path, *words, likelihood=COLOURS):
    line = tiny.fault_of(data.load, "own", path, likelihood)
    for word in words:
        assert word in line, line


# ---- A picture -----------------------------------------------------------------------------------


def test_a_picture_is_cut_to_its_centre_and_resized_by_pillows_bilinear_filter(tmp_path):
    wide = RANDOM.randint(256, size=(40, 60, 3), dtype=np.uint8)
    for array, cut in (
        (wide, wide[:, 10:50]),
        (wide.swapaxes(0, 1), wide[:, 10:50].swapaxes(0, 1)),
    ):
        path = write(tmp_path / "a.png", array)
        expected = Image.fromarray(cut).resize((16, 16), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(folders.read_picture(path, 16, 3, True), expected)
        grey = Image.fromarray(cut).convert("L").resize((16, 16), Image.Resampling.BILINEAR)
        found = folders.read_picture(path, 16, 1, True)
        np.testing.assert_array_equal(found[..., 0], grey)
        # CelebA keeps the whole picture, not its aspect.
        whole = Image.fromarray(array).resize((16, 16), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(folders.read_picture(path, 16, 3, False), whole)


def test_what_is_transparent_is_white_and_exif_says_what_is_up(tmp_path):
    array = np.zeros((16, 16, 4), np.uint8)
    array[:8] = [200, 100, 0, 255]
    found = folders.read_picture(write(tmp_path / "a.png", array), 16, 3, True)
    assert (found[:8] == [200, 100, 0]).all() and (found[8:] == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    bright_above = np.zeros((16, 16, 3), np.uint8)
    bright_above[:8] = 255
    path = write(tmp_path / "a.jpg", bright_above, exif=exif, quality=95)
    found = folders.read_picture(path, 16, 3, True)
    assert found[:, :7].max() < 30 and found[:, 9:].min() > 225


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "a.webp"])
def test_each_kind_of_picture_is_read(tmp_path, name):
    write(tmp_path / "train" / name)
    write(tmp_path / "test" / name)
    found = read(tmp_path)
    assert found.train.shape == found.test.shape == (1, 768)


# ---- A folder ------------------------------------------------------------------------------------


def test_train_and_test_are_subfolders_and_theirs_are_classes(tmp_path):
    paths = {}
    for part, kind, name in (
        ("train", "cat", "2.png"), ("train", "cat", "1.png"), ("train", "dog", "0.png"),
        ("test", "dog", "in/3.png"), ("test", "ape", "4.png"),
    ):  # fmt: skip
        paths[part, kind, name] = write(tmp_path / part / kind / name)
    write(tmp_path / "train" / ".hidden" / "5.png")
    found = read(tmp_path)
    assert found.class_names == ("ape", "cat", "dog")
    assert found.train_labels.tolist() == [1, 1, 2] and found.test_labels.tolist() == [0, 2]
    order = [("cat", "1.png"), ("cat", "2.png"), ("dog", "0.png")]
    expected = [folders.read_picture(paths["train", *key], 16, 3, True) for key in order]
    np.testing.assert_array_equal(numbers(COLOURS, found.train), expected)


def test_every_tenth_picture_of_one_folder_is_for_testing_by_its_name_alone(tmp_path):
    shade = np.full((8, 8), 255, np.uint8)
    names = [f"{i}.png" for i in range(200)]
    for i, name in enumerate(names):
        write(tmp_path / "one" / name, shade - i)
    found = read(tmp_path / "one", GREY)
    tests = [i for i, name in enumerate(names) if zlib.crc32(name.encode()) % 10 == 0]
    assert 10 < len(tests) < 30 and len(found.train) == 200 - len(tests)
    assert sorted({*(255 - numbers(GREY, found.test)[:, 0, 0, 0])}) == tests
    assert found.test_labels is None and found.class_names is None
    (tmp_path / "one" / names[1]).unlink()
    np.testing.assert_array_equal(read(tmp_path / "one", GREY).test, found.test)


def test_pictures_are_rounded_to_levels_or_drawn_once_as_arrays_are(tmp_path):
    for i in range(4):
        write(tmp_path / ("train" if i else "test") / f"{i}.png")
    train = [folders.read_picture(tmp_path / f"train/{i}.png", 16, 1, True) for i in (1, 2, 3)]
    test = [folders.read_picture(tmp_path / "test/0.png", 16, 1, True)]
    np.savez(tmp_path / "same.npz", train=train, test=test)
    for levels in (1, 16):
        likelihood = binomial(16, 1, levels)
        arrays = data.load("own", str(tmp_path / "same.npz"), likelihood)
        (tmp_path / "same.npz").rename(tmp_path.parent / "same.npz")
        pictures = read(tmp_path, likelihood)
        (tmp_path.parent / "same.npz").rename(tmp_path / "same.npz")
        np.testing.assert_array_equal(pictures.train, arrays.train)
        np.testing.assert_array_equal(pictures.test, arrays.test)


def test_the_progress_of_reading_is_said(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{i}.png") for i in range(3)]
    monkeypatch.setattr(folders, "PRINT", -1)
    lines = []
    folders.read_pictures(paths, COLOURS, True, lines.append)
    assert [line.split(" pictures read  ")[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("ETA" in line for line in lines)


def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path):
    ramp = np.uint16(np.maximum(257 * np.arange(256) - 100, 0)).reshape(16, 16)
    found = folders.read_picture(write(tmp_path / "a.png", ramp), 16, 1, True)
    np.testing.assert_array_equal(found.ravel(), np.arange(256))


def test_links_are_followed_but_not_in_circles_and_any_name_will_do(tmp_path):
    write(tmp_path / "elsewhere" / "dog.png")
    one = tmp_path / "one"
    for i in range(30):
        write(one / "cat" / f"{i}.png")
    (one / "dog").symlink_to(tmp_path / "elsewhere")
    (one / "dog" / "circle").symlink_to(one)
    shutil.copy(one / "cat" / "0.png", os.fsencode(one / "cat") + b"/\xff.png")
    assert len(folders.pictures_in(one)) == 32
    found = read(one)
    assert found.class_names == ("cat", "dog") and len(found.train) + len(found.test) == 32
    (one / "dog" / "gone.png").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"No such file.*gone\.png"):
        read(one)


def test_train_and_test_may_be_in_capitals_and_one_of_them_alone_is_refused(tmp_path):
    for name in ("Train/a.png", "TEST/b.png", "val/c.png"):
        write(tmp_path / name)
    lines = []
    found = data.load("own", str(tmp_path), COLOURS, lines.append)
    assert (len(found.train), len(found.test)) == (1, 1)
    assert lines == [f"warning: pictures outside of train and test are not used: 1 in {tmp_path}"]
    (tmp_path / "TEST").rename(tmp_path / "valid")
    refused(tmp_path, f"{tmp_path} has Train, but no folder test: give it both, or neither")


def test_a_wrong_folder_costs_one_line(tmp_path, monkeypatch):
    refused(tmp_path, "has no file of train images", "a folder of pictures (.png, .jpg")
    few = write(tmp_path / "few" / "1.png").parent
    words = "has no picture to test with. Of all (.png, .jpg, .jpeg, .webp) there are 1"
    refused(few, f"{few} {words} in {few}")
    write(tmp_path / "train" / "cat" / "1.png")
    (tmp_path / "test").mkdir()
    refused(tmp_path, "/test has no picture to test with", "(.png, .jpg, .jpeg, .webp)")
    shutil.rmtree(few)
    write(tmp_path / "test" / "cat" / "1.png")
    stray = write(tmp_path / "train" / "2.png")
    refused(tmp_path, f"{stray} is in no class, and others are")
    stray.unlink()
    damaged = tmp_path / "train" / "cat" / "0.png"
    damaged.write_bytes((tmp_path / "train" / "cat" / "1.png").read_bytes()[:100])
    refused(tmp_path, f"{damaged}: ", "remove it, or copy it again")
    damaged.write_bytes(b"<html>")
    refused(tmp_path, f"{damaged}: cannot identify image file")
    damaged.unlink()
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    refused(tmp_path, "pictures need Pillow", "pip install -e '.[pictures]'")


def test_the_classes_of_an_npz_have_names(tmp_path):
    arrays = {key: RANDOM.randint(256, size=(6, 16, 16, 3), dtype=np.uint8) for key in folders.SETS}
    labels = {f"{key}_labels": np.arange(6) % 3 for key in folders.SETS}
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays, **labels, names=["a", "b", "c"])
    assert read(path).class_names == ("a", "b", "c")
    for names in (["a", "b"], [1, 2, 3], "abc"):
        np.savez(path, **arrays, **labels, names=names)
        refused(path, "names is", "one for each label from 0 to 2")


# ---- CelebA --------------------------------------------------------------------------------------


@pytest.fixture(params=["txt", "csv"])
def celeba(request, tmp_path, monkeypatch):
    """A folder like CelebA of 12 drawn pictures, as published or as on Kaggle; its pictures; and
    the file that parts them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kaggle = request.param == "csv"
    inner = "img_align_celeba/img_align_celeba" if kaggle else "img_align_celeba"
    lines, pictures = ["image_id,partition"] if kaggle else [], {}
    for i in range(1, 13):
        name = f"{i:06d}.jpg"
        array = RANDOM.randint(256, size=(218, 178, 3), dtype=np.uint8)
        pictures[i] = write(tmp_path / "set" / inner / name, array)
        lines.append(f"{name}{',' if kaggle else ' '}{0 if i <= 7 else 1 if i <= 9 else 2}")
    partition = tmp_path / "set" / f"list_eval_partition.{request.param}"
    partition.write_text("\n".join(lines) + "\n")
    return tmp_path / "set", pictures, partition


MIXTURE = logistic_mixture(64, 3, 1)


def test_celeba_is_read_in_both_layouts_and_kept(celeba, monkeypatch):
    folder, pictures, _ = celeba
    found = data.load("celeba", str(folder), MIXTURE)
    assert (len(found.train), len(found.test)) == (7, 3)
    assert found.identity == f"celeba {found.sha256[:12]}"
    for i, stored in zip((1, 7, 10, 12), [*found.train[[0, 6]], *found.test[[0, 2]]], strict=True):
        picture = Image.open(pictures[i]).resize((64, 64), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(stored.reshape(64, 64, 3), picture)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "read_pictures", pytest.fail)
        again = data.load("celeba", str(folder), MIXTURE)
    assert again.sha256 == found.sha256
    coarse = data.load("celeba", str(folder), binomial(64, 3, 15))  # of the same kept pictures
    np.testing.assert_array_equal(coarse.test, np.rint(found.test / 17))
    [kept] = Path(data.cache_folder()).glob("celeba_*.npz")
    kept.write_bytes(kept.read_bytes()[:-100])
    lines = []
    assert data.load("celeba", str(folder), MIXTURE, lines.append).sha256 == found.sha256
    assert "is damaged" in lines[0] and "read again" in lines[0]


def test_a_run_keeps_the_hash_of_celeba_so_that_it_resumes_on_no_other_pictures(
    celeba, tmp_path, monkeypatch
):
    folder, pictures, _ = celeba
    config = tiny.changed("celeba", data__dir=str(folder), train__batch_size=8)
    monkeypatch.setattr(machine, "check_images", lambda *_: None)  # seven do for this test
    hashes = []
    for array in (None, np.zeros((218, 178, 3), np.uint8)):
        if array is not None:
            write(pictures[12], array)
        run = runs.open_run(config, tmp_path / "run")
        hashes.append(run.config.data.sha256)
        run.unlock()
    assert len({*hashes}) == 2


def test_what_is_wrong_with_celeba_costs_one_line(celeba):
    folder, pictures, partition = celeba

    def fault(*words, likelihood=MIXTURE, place=str(folder)):
        line = tiny.fault_of(data.load, "celeba", place, likelihood)
        assert all(word in line for word in words), line

    fault("celeba with the place of the images", place=None)
    fault("model.levels=1", "needs more levels", likelihood=binomial(64, 3, 1))
    pictures[12].write_bytes(pictures[12].read_bytes()[:500])
    fault(f"{pictures[12]}: ", "remove it, or copy it again")
    for i in (2, 3):
        pictures[i].unlink()
    fault("lacks 2 of the pictures in list_eval_partition", "the first is 000002.jpg")
    text = partition.read_text()
    for line in ("hello", "000003.jpg 3", "000001.jpg 0"):
        partition.write_text(f"{text}{line}\n")
        fault(f"{partition}, line {len(text.splitlines()) + 1}: {line!r}: it must name one more")
    partition.write_text(text.replace(" 2\n", " 1\n").replace(",2\n", ",1\n"))
    fault("names no picture of part 2, to test with")
    partition.unlink()
    fault("has no list_eval_partition.txt or list_eval_partition.csv")


def test_more_images_than_the_memory_holds_are_refused_before_they_are_read(monkeypatch, capsys):
    monkeypatch.setattr(machine.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**6}.get)
    machine.check_memory(40_000, MIXTURE.stored_bytes)  # 0.49 GB on each of eight devices
    assert "images   0.49 GB of training images on each of 8 device(s)" in capsys.readouterr().out
    with pytest.raises(VncaError, match=r"need 16\.0 GB, and this machine has 4\.1 GB"):
        machine.check_memory(162_770, MIXTURE.stored_bytes)
