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
import time
import urllib.request
from pathlib import Path

import glyphs
import numpy as np
import pytest
import tiny

from vnca.program import VncaError, data

SITE = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/binarized_mnist_"
# A small stand-in for the published set: its bits, and its text files.
RANDOM = np.random.RandomState(1)
BITS = {key: RANDOM.randint(256, size=(5, 98), dtype=np.uint8) for key in data.TEXTS}
TEXTS = {
    key: b"".join(b" ".join(b"%d" % pixel for pixel in row) + b"\n" for row in np.unpackbits(x, 1))
    for key, x in BITS.items()
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The stand-in is published, but nothing answers. The cache, which is returned, is empty."""
    for name, contents in ("TEXTS", TEXTS), ("BITS", BITS):
        hashes = {key: hashlib.sha256(content).hexdigest() for key, content in contents.items()}
        monkeypatch.setattr(data, name, hashes)
    monkeypatch.setattr(data, "TIMEOUT", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    urllib.request.install_opener(None)  # urllib keeps the proxies of its first call
    return tmp_path / "caches" / "vnca"


@pytest.fixture
def site(monkeypatch):
    """A proxy through which the stand-in comes from the published site: {URL: content}, which a
    test may change. None is not answered in time."""
    served = {f"{SITE}{key}.amat": text for key, text in TEXTS.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = served.get(self.path, b"")
            if content is None:
                time.sleep(3)
            self.send_response(200 if content else 404)
            self.end_headers()
            self.wfile.write(content)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=[0.02]).start()
        yield served
        server.shutdown()


def write_texts(folder):
    folder.mkdir()
    for key, text in TEXTS.items():
        (folder / f"binarized_mnist_{key}.amat").write_bytes(text)


def write_bits(folder, **changed):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "larochelle.npz", **BITS | changed)


def assert_is_stand_in(found):
    assert found.name == found.identity == "larochelle"
    np.testing.assert_array_equal(found.train, np.concatenate([BITS["train"], BITS["valid"]]))
    np.testing.assert_array_equal(found.test, BITS["test"])
    assert found.train_labels is None
    assert tuple(np.bincount(found.test_labels)) == data.TEST_COUNTS


# ---- From its site -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["larochelle", "auto"])
def test_the_published_set_is_downloaded_once_and_kept_for_later_starts(cache, site, name):
    cache.mkdir(parents=True)
    (cache / ".larochelle.npz.1.writing").touch()  # of a killed write
    assert_is_stand_in(data.load(name))
    assert os.listdir(cache) == ["larochelle.npz"]
    site.clear()
    assert_is_stand_in(data.load(name, log=pytest.fail))


FAULTS = {  # what the line has in it: what the site has as its second text
    "404": b"",
    "valid has SHA-256": TEXTS["valid"][::-1],
    "timed out": None,
}


@pytest.mark.parametrize("words", FAULTS)
def test_auto_takes_the_bundled_set_with_a_warning_where_the_site_fails(cache, site, words):
    site[f"{SITE}valid.amat"] = FAULTS[words]
    line, lines = tiny.fault_of(data.load, "larochelle"), []
    assert words in line and "://www.cs.toronto" in line and "--config.data.dir=DIR" in line
    assert data.load("auto", log=lines.append).name == "bundled"
    assert line in lines[-1] and lines[-1].startswith("warning: ") and "comparable" in lines[-1]
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_a_warning(cache, site):
    cache.parent.touch()
    lines = []
    assert_is_stand_in(data.load("auto", log=lines.append))
    assert "warning: the next start downloads it again" in lines[-1]


def test_the_cache_is_in_the_home_folder_unless_an_absolute_path_is_set(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert data.cache_folder() == Path("/home/someone/.cache/vnca")


# ---- From files ----------------------------------------------------------------------------------


def test_files_at_hand_are_read_without_the_network_and_never_written_to(tmp_path):
    texts, bits = tmp_path / "tex ts", tmp_path / "bits"
    write_texts(texts)
    np.savez(texts / "other.npz", x=1)
    write_bits(bits, valid=np.asfortranarray(BITS["valid"], np.int16))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for place in texts, bits, bits / "larochelle.npz":
        assert_is_stand_in(data.load("auto", str(place)))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("write", [write_texts, write_bits])
def test_data_damaged_anywhere_is_whole_or_refused_under_auto_as_well(tmp_path, write):
    folder, random = tmp_path / "given", np.random.RandomState(0)
    write(folder)
    for path in [*folder.iterdir()] * 30:
        good = path.read_bytes()
        at = random.randint(len(good))
        flip = bytes([good[at] ^ 1 << random.randint(8)])
        for content in good[:at] + flip + good[at + 1 :], good[:at]:
            path.write_bytes(content)
            with contextlib.suppress(VncaError):
                assert_is_stand_in(data.load("auto", folder))
        path.write_bytes(good)


def test_what_is_wrong_with_a_file_costs_one_line_and_runs_no_pickle(tmp_path, cache):
    def refused(words, place, name="auto"):
        assert words in tiny.fault_of(data.load, name, place)

    refused("bundled without data.dir", tmp_path, "bundled")
    refused("nowhere: No such file or directory; provide the three .amat", tmp_path / "nowhere")
    write_bits(tmp_path, valid=np.array([tiny.Trap()], object))
    refused("Object arrays cannot be loaded", tmp_path)
    write_texts(tmp_path / "texts")
    (tmp_path / "texts" / "binarized_mnist_valid.amat").unlink()
    refused("binarized_mnist_valid.amat", tmp_path / "texts")
    write_bits(cache, test=BITS["train"])
    refused("larochelle.npz: test has SHA-256", None)


def test_the_hashes_are_the_published_ones():
    source = Path(data.__file__).read_text()
    texts = "ad693b29f94c1427", "1de3d397c40fe8ee", "e6687bfea3f820c1"  # train, valid, test
    for start in *texts, "727146c35424b019", "a256ac44ae26be72", "9fcd8da6f0fdf09b":
        assert source.count(start) == 1


# ---- The bundled set -----------------------------------------------------------------------------


def test_the_bundled_set_has_mnists_digits_and_needs_no_network(monkeypatch):
    tiny.without_network(monkeypatch)
    found = data.load("bundled")
    assert found.identity == "bundled" and found.sha256.startswith("a0f37136048606b1")
    assert np.bincount(found.test_labels).tolist() == [*data.TEST_COUNTS]
    assert data.image_counts("auto", None) == (60_000, 10_000)


def test_a_bundled_file_of_another_content_is_refused(monkeypatch):
    monkeypatch.setitem(data.BUNDLED_BITS, "test_labels", "0123")
    assert "bundled.npz: test_labels has SHA-256" in tiny.fault_of(data.load, "bundled")


def test_other_images_make_no_bundled_set(tmp_path):
    images, kinds = glyphs.draw(5, seed=0)
    for labels in kinds, None:
        glyphs.write_idx(tmp_path, images, images, labels, labels)
        assert "MNIST's original files" in tiny.fault_of(data.make_bundled, tmp_path)


@pytest.mark.skipif(
    "VNCA_MNIST_DIR" not in os.environ, reason="VNCA_MNIST_DIR does not name MNIST's IDX files"
)
def test_the_bundled_set_is_made_again_from_mnists_files_whole_or_not_at_all(tmp_path):
    shutil.copytree(Path(data.__file__).parents[1], tmp_path / "vnca")
    program = tmp_path / "vnca" / "program"
    for limit in "500", "unlimited":  # the size of files, in KiB
        command = f"ulimit -f {limit}; {sys.executable} -m vnca.program.data $VNCA_MNIST_DIR"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE)
        assert (b"error: " in done.stderr) == (done.returncode == 1) == (limit == "500")
        assert not [*program.glob(".*")]
        with np.load(program / "bundled.npz") as made, np.load(data.BUNDLED) as committed:
            for key in committed.files:
                np.testing.assert_array_equal(made[key], committed[key])
        (program / "bundled.npz").write_bytes(b"damaged")
