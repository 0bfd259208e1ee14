"""Promise 13, the sets that are known by their hashes: what is loaded is what was published,
whatever the network, the disk or a file does."""

import contextlib
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from functools import partial
from pathlib import Path

import glyphs
import numpy as np
import pytest
import tiny

from vnca.likelihoods import as_floats, binomial
from vnca.program import VncaError, data

# The starts of the published set's hashes, before those of a small stand-in take their place.
HASHES = [{key: sha[:16] for key, sha in of.items()} for of in (data.TEXTS, data.BITS)]
# The stand-in.
RANDOM = np.random.RandomState(1).randint(256, size=(3, 5, 98), dtype=np.uint8)
BITS = dict(zip(["train", "valid", "test"], RANDOM, strict=True))
SIXTEEN_LEVELS = binomial(32, 1, 16)


@pytest.fixture(autouse=True)
def site(tmp_path, monkeypatch):
    """The stand-in comes from the published site, through a proxy: the folder of its texts, which a
    test may change. The cache is empty."""
    folder = tmp_path / "http:/www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
    folder.mkdir(parents=True)
    for key, bits in BITS.items():
        path = folder / f"binarized_mnist_{key}.amat"
        np.savetxt(path, np.unpackbits(bits, axis=1), "%d")
        for known, content in (data.TEXTS, path.read_bytes()), (data.BITS, bits):
            monkeypatch.setitem(known, key, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data, "TIMEOUT", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    urllib.request.install_opener(None)  # urllib keeps the proxies of its first call
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=[0.02]).start()
        yield folder
        server.shutdown()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "caches" / "vnca"


def write_bits(folder, **changed):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "larochelle.npz", **BITS | changed)


def assert_is_stand_in(found):
    assert found.name == found.identity == "larochelle"
    bits = glyphs.central_bits(np.r_[found.train, found.test])
    np.testing.assert_array_equal(bits, np.concatenate(RANDOM))
    assert len(found.test) == 5
    assert found.train_labels is None
    assert tuple(np.bincount(found.test_labels)) == data.TEST_COUNTS


# ---- From its site -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["larochelle", "auto"])
def test_the_published_set_is_downloaded_once_and_kept_for_later_starts(cache, site, name):
    cache.mkdir(parents=True)
    (cache / ".larochelle.npz.1.writing").touch()  # of a killed write
    assert_is_stand_in(data.load(name))
    assert os.listdir(cache) == ["larochelle.npz"]
    shutil.rmtree(site)
    assert_is_stand_in(data.load(name, log=pytest.fail))


@pytest.mark.parametrize("words", ["404", "valid has SHA-256", "timed out"])
def test_auto_takes_the_bundled_set_with_a_warning_where_the_site_fails(cache, site, words):
    path = site / "binarized_mnist_valid.amat"
    path.unlink()
    if "SHA-256" in words:
        path.write_bytes(b"1 0")
    elif words != "404":
        os.mkfifo(path)  # the site's answer does not come
    line, lines = tiny.fault_of(data.load, "larochelle"), []
    assert words in line and "://www.cs.toronto" in line and "--config.data.dir=DIR" in line
    found = data.load("auto", None, SIXTEEN_LEVELS, lines.append)
    assert found.name == "bundled" and found.train.shape == (60_000, SIXTEEN_LEVELS.stored_bytes)
    assert line in lines[-1] and lines[-1].startswith("warning: ") and "comparable" in lines[-1]
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_a_warning(cache):
    cache.parent.touch()
    lines = []
    assert_is_stand_in(data.load("auto", log=lines.append))
    assert "warning: the next start downloads it again" in lines[-1]


def test_the_cache_is_in_the_home_folder_unless_an_absolute_path_is_set(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert data.cache_folder() == Path("/home/someone/.cache/vnca")


# ---- From files ----------------------------------------------------------------------------------


def test_files_at_hand_are_read_without_the_network_and_never_written_to(tmp_path, site):
    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    texts, bits = site.rename(tmp_path / "tex ts"), tmp_path / "bits"
    np.savez(texts / "other.npz", x=1)
    write_bits(bits, valid=np.asfortranarray(BITS["valid"], np.int16))
    before = times()
    for place in texts, bits, bits / "larochelle.npz":
        assert_is_stand_in(data.load("auto", str(place)))
    assert times() == before


def test_data_damaged_anywhere_is_whole_or_refused_under_auto_as_well(tmp_path, site):
    write_bits(tmp_path / "bits")
    for path in [*site.iterdir(), tmp_path / "bits" / "larochelle.npz"]:
        for _ in glyphs.damaged(path, range(0, path.stat().st_size, path.stat().st_size // 30)):
            with contextlib.suppress(VncaError):
                assert_is_stand_in(data.load("auto", path.parent))


def test_what_is_wrong_with_a_file_costs_one_line_and_runs_no_pickle(
    monkeypatch, tmp_path, cache, site
):
    def refused(words, place, name="auto"):
        assert words in tiny.fault_of(data.load, name, place)

    refused("bundled or faces without data.dir", tmp_path, "bundled")
    refused("nowhere: No such file or directory; provide the three .amat", tmp_path / "nowhere")
    write_bits(tmp_path, valid=np.array([tiny.Trap()], object))
    refused("Object arrays cannot be loaded", tmp_path)
    (site / "binarized_mnist_valid.amat").unlink()
    refused("binarized_mnist_valid.amat", site)
    write_bits(cache, test=BITS["train"])
    refused("larochelle.npz: test has SHA-256", None)
    monkeypatch.setitem(data.BUNDLED_BITS, "test_labels", "0123")
    refused("bundled.npz: test_labels has SHA-256", None, "bundled")


def test_the_hashes_are_the_published_ones():
    # Computed from a copy of the set, outside of this package.
    texts, bits = HASHES
    assert (texts["train"], bits["train"]) == ("ad693b29f94c1427", "727146c35424b019")
    assert (texts["valid"], bits["valid"]) == ("1de3d397c40fe8ee", "a256ac44ae26be72")
    assert (texts["test"], bits["test"]) == ("e6687bfea3f820c1", "9fcd8da6f0fdf09b")


# ---- For a likelihood ----------------------------------------------------------------------------


@pytest.mark.parametrize("size, levels", [(32, 16), (64, 1), (128, 255)])
def test_digits_are_black_and_white_in_the_centre_of_an_image_of_any_size_and_levels(
    tmp_path, size, levels
):
    write_bits(tmp_path)
    found = data.load("larochelle", tmp_path, binomial(size, 1, levels))
    stored = np.r_[found.train, found.test]
    numbers = stored if levels > 1 else np.unpackbits(stored, axis=1)
    digits = np.unpackbits(np.concatenate(RANDOM), axis=1).reshape(15, 28, 28)
    margin = (size - 28) // 2, (size - 28) // 2
    expected = np.pad(levels * digits, [(0, 0), margin, margin])
    np.testing.assert_array_equal(numbers.reshape(expected.shape), expected)


@pytest.mark.parametrize("size, colours", [(16, 1), (32, 3)])
@pytest.mark.parametrize("name", ["larochelle", "auto", "bundled"])
def test_digits_that_do_not_fit_the_model_cost_one_line_before_any_download(name, size, colours):
    fault = tiny.fault_of(data.load, name, None, binomial(size, colours, 1), pytest.fail)
    assert fault.startswith(f"config.data.name={name}: ") and "grey digits of 28×28" in fault
    assert f"model.colours=1, not {colours}," in fault
    assert f"model.size of 32 or more, not {size}" in fault


@pytest.mark.parametrize("size, colours, levels", [(32, 1, 1), (16, 3, 2), (64, 1, 255)])
def test_noise_has_every_level_but_in_a_border_of_two_zeros_and_is_always_the_same(
    size, colours, levels
):
    likelihood = binomial(size, colours, levels)
    stored = data.noise(likelihood, 30)
    numbers = np.rint(levels * np.asarray(as_floats(likelihood, stored)))
    inner = numbers[:, 2:-2, 2:-2]
    assert numbers.shape == (30, size, size, colours) and inner.sum() == numbers.sum()
    assert np.unique(inner).tolist() == [*range(levels + 1)]
    assert abs(inner.mean() / levels - 0.5) < 0.02
    np.testing.assert_array_equal(data.noise(likelihood, 30), stored)


# ---- The faces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [16, 255])
def test_faces_are_those_of_the_file_rounded_to_the_levels(monkeypatch, levels):
    tiny.without_network(monkeypatch)
    likelihood = binomial(16, 3, levels)
    found = data.load("faces", None, likelihood)
    with np.load(data.FACES) as file:
        expected = np.rint(file["test"][:50] / 255 * levels)
    numbers = np.rint(levels * np.asarray(as_floats(likelihood, found.test[:50])))
    np.testing.assert_array_equal(numbers, expected)
    config = tiny.config(data__name="faces")
    assert data.training_images(config) == len(found.train) == 30_000
    counts = dict(zip(found.class_names, np.bincount(found.test_labels), strict=True))
    assert counts["long hair"] == 1064 and counts["hat, glasses"] == 28
    assert found.identity == "faces" and sum(counts.values()) == len(found.test)


@pytest.mark.parametrize(
    "size, colours, levels", [(32, 3, 16), (16, 1, 16), (16, 3, 1)], ids=["size", "grey", "bits"]
)
def test_faces_that_do_not_fit_the_model_cost_one_line(size, colours, levels):
    fault = tiny.fault_of(data.load, "faces", None, binomial(size, colours, levels), pytest.fail)
    assert fault.startswith("config.data.name=faces: these are faces of 16×16 pixels in colours")
    assert f"size=16, not {size}, model.colours=3, not {colours}," in fault
    assert fault.endswith(f"above 1, not {levels}")


def test_a_damaged_file_of_faces_is_refused(tmp_path, monkeypatch):
    with np.load(data.FACES) as file:
        arrays = dict(file)
    arrays["test"][7, 7, 7, 0] ^= 1
    np.savez(tmp_path / "faces.npz", **arrays)
    monkeypatch.setattr(data, "FACES", tmp_path / "faces.npz")
    fault = tiny.fault_of(data.load, "faces", None, binomial(16, 3, 16))
    assert "test has SHA-256" in fault and fault.endswith("reinstall the package")


# ---- The bundled set -----------------------------------------------------------------------------


def test_the_bundled_set_has_mnists_digits_and_needs_no_network(monkeypatch):
    tiny.without_network(monkeypatch)
    found = data.load("bundled")
    bits = {name: glyphs.central_bits(getattr(found, name)) for name in data.IMAGES}
    assert found.identity == "bundled"
    assert found._replace(**bits).sha256.startswith("a0f37136048606b1")
    assert np.bincount(found.test_labels).tolist() == [*data.TEST_COUNTS]
    assert data.training_images(tiny.config(data__name="auto")) == len(found.train) == 60_000
    assert len(found.test) == 10_000


def test_other_images_make_no_bundled_set(tmp_path):
    shutil.copytree(data.BUNDLED.parents[1], tmp_path / "vnca")
    images, _ = glyphs.draw(5, seed=0)
    glyphs.write_idx(tmp_path / "idx", images, images)
    command = [sys.executable, "-m", "vnca.program.data", tmp_path / "idx"]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"MNIST's original files" in done.stderr
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
    made = tmp_path / "vnca" / "program" / "bundled.npz"
    assert made.read_bytes() == data.BUNDLED.read_bytes()


def test_the_bundled_set_keeps_28x28_pixels_of_an_image(tmp_path, monkeypatch):
    train, test = RANDOM[:2]
    pixels = [255 * np.unpackbits(bits, axis=1).reshape(5, 28, 28) for bits in (train, test)]
    labels = np.arange(5, dtype=np.uint8)
    glyphs.write_idx(tmp_path, *pixels, labels, labels)
    wanted = {"train": train, "test": test, "train_labels": labels, "test_labels": labels}
    for name, array in wanted.items():
        monkeypatch.setitem(data.BUNDLED_BITS, name, hashlib.sha256(array).hexdigest())
    np.testing.assert_equal(data.make_bundled(tmp_path), wanted)


@pytest.mark.skipif(
    "VNCA_MNIST_DIR" not in os.environ, reason="VNCA_MNIST_DIR does not name MNIST's IDX files"
)
def test_the_bundled_set_is_made_again_from_mnists_files():
    assert len(data.make_bundled(os.environ["VNCA_MNIST_DIR"])) == 4  # and has its hashes
