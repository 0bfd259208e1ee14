"""The data: what is loaded is what was published, whatever the network or the disk does."""

import errno
import hashlib
import http.server
import os
import pickle
import tempfile
import threading
import zipfile
from pathlib import Path

import glyphs
import numpy as np
import pytest
import tiny

from vnca.program import VncaError, data, download

PUBLISHED, PUBLISHED_COUNTS = data.LAROCHELLE, data.TEST_COUNTS
PUBLISHED_URL = data.LAROCHELLE_URL
# A small stand-in for the published set: its bits, and the text files that they were packed from.
_ROWS = {"train": 20, "valid": 6, "test": 10}
_RANDOM = np.random.RandomState(1)
PIXELS = {key: (_RANDOM.rand(n, 784) < 0.2).astype(np.uint8) for key, n in _ROWS.items()}
BITS = {key: np.packbits(x, axis=1) for key, x in PIXELS.items()}
TEXTS = {
    f"{key}.amat": "".join(" ".join(map(str, row)) + "\n" for row in x).encode()
    for key, x in PIXELS.items()
}


def sha256(content) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The stand-in takes the place of the published set, at an address where nothing answers. The
    cache is empty: the folder is returned, which does not exist."""
    splits = {
        key: data.Split(f"{key}.amat", n, sha256(TEXTS[f"{key}.amat"]), sha256(BITS[key]))
        for key, n in _ROWS.items()
    }
    monkeypatch.setattr(data, "LAROCHELLE", splits)
    monkeypatch.setattr(data, "LAROCHELLE_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(data, "TEST_COUNTS", (2, 3, 0, 1, 0, 0, 0, 0, 0, 4))
    monkeypatch.setattr(download, "TIMEOUT", 10)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "vnca"


@pytest.fixture
def site(request, monkeypatch):
    """The web server of the stand-in, with the fault that the test is given, if any."""
    fault = getattr(request, "param", None)
    if fault in ("hangs", "stalls"):
        monkeypatch.setattr(download, "TIMEOUT", 0.3)
    with Site(fault) as site:
        monkeypatch.setattr(data, "LAROCHELLE_URL", site.url)
        yield site


class Site:
    """A web server on loopback with the stand-in's files; `fault` says what it does to "valid"."""

    def __init__(self, fault=None):
        self.requests, self.released = [], threading.Event()
        self.redirects = fault == "redirects"
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                name = self.path.rsplit("/", 1)[1]
                site.requests.append(name)
                body = TEXTS[name]
                bad = fault if name == "valid.amat" else None
                if bad == "hangs":
                    site.released.wait(10)
                    return
                if bad == "404":
                    self.send_error(404)
                    return
                if site.redirects and self.path.startswith("/old/"):
                    self.send_response(302)
                    self.send_header("Location", f"/new/{name}")
                    self.end_headers()
                    return
                self.send_response(200)
                if bad == "too long":
                    body *= 2
                else:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if bad == "wrong byte":
                    body = bytes([body[0] ^ 1]) + body[1:]
                half = len(body) // 2
                self.wfile.write(body[:half] if bad in ("cut", "stalls") else body)
                self.wfile.flush()
                if bad in ("stalls", "too long"):
                    site.released.wait(10)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/old/"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def write_texts(folder: Path, texts=TEXTS) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return folder


def write_cache(folder: Path, **changed) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "larochelle.npz", **{**BITS, **changed})
    return folder


def assert_is_stand_in(dataset: data.Dataset) -> None:
    assert dataset.name == "larochelle"
    assert dataset.train.dtype == dataset.test.dtype == dataset.test_labels.dtype == np.uint8
    np.testing.assert_array_equal(dataset.train, np.concatenate([BITS["train"], BITS["valid"]]))
    np.testing.assert_array_equal(dataset.test, BITS["test"])
    assert dataset.train_labels is None
    np.testing.assert_array_equal(dataset.test_labels, [0, 0, 1, 1, 1, 3, 9, 9, 9, 9])


def assert_refused(match: str, *args) -> None:
    """`load` raises one line that matches, under the name and under auto alike."""
    for name in ("larochelle", "auto"):
        with pytest.raises(VncaError, match=match) as caught:
            data.load(name, *args)
        assert "\n" not in str(caught.value)


def assert_unavailable(*words: str) -> None:
    """`load` raises one line with these words, and under auto warns of it and loads bundled."""
    with pytest.raises(VncaError) as caught:
        data.load("larochelle", log=[].append)
    message, lines = str(caught.value), []
    assert all(word in message for word in words), message
    assert "--config.data.dir=DIR" in message and "\n" not in message
    assert data.load("auto", log=lines.append).name == "bundled"
    [warning] = [line for line in lines if line.startswith("warning:")]
    assert message in warning and "not comparable" in warning


# The download.


@pytest.mark.parametrize("name", ["larochelle", "auto"])
@pytest.mark.parametrize("site", [None, "redirects"], indirect=True)
def test_a_download_is_cached_and_the_second_load_asks_for_nothing(cache, site, name):
    lines = []
    assert_is_stand_in(data.load(name, log=lines.append))
    assert list(dict.fromkeys(site.requests)) == ["train.amat", "valid.amat", "test.amat"]
    assert len(site.requests) == (6 if site.redirects else 3)
    assert os.listdir(cache) == ["larochelle.npz"]
    assert lines[-1].startswith("0.1 of 0.1 MB  ") and lines[-1].endswith(" MB/s  ETA 0 s")
    asked, lines = len(site.requests), []
    assert_is_stand_in(data.load(name, log=lines.append))
    assert len(site.requests) == asked and not lines


FAULTS = {
    "hangs": "timed out",
    "404": "HTTP Error 404",
    "wrong byte": "the text has SHA-256",
    "cut": "bytes",
    "stalls": "timed out",
    "too long": "bytes",
}


@pytest.mark.parametrize("site, words", FAULTS.items(), indirect=["site"])
def test_a_failed_download_is_an_error_by_name_and_a_warning_under_auto(cache, site, words):
    assert_unavailable(f"{site.url}valid.amat: ", words)
    assert os.listdir(cache) == []


def test_a_site_that_does_not_answer_is_an_error_by_name_and_a_warning_under_auto():
    assert_unavailable("http://127.0.0.1:9/train.amat: ", "refused")


def test_a_download_that_is_interrupted_leaves_nothing(cache, site):
    def interrupt(line):
        if "ETA" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.load("auto", log=interrupt)
    assert os.listdir(cache) == []


def test_several_that_download_at_once_all_succeed(cache, site):
    results = []
    threads = [threading.Thread(target=lambda: results.append(data.load("auto"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for dataset in results:
        assert_is_stand_in(dataset)
    assert os.listdir(cache) == ["larochelle.npz"]


def fail(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_cache_that_cannot_be_used_is_found_before_the_download(cache, site, monkeypatch):
    cache.parent.write_text("")
    assert_unavailable(f"cannot use the cache {cache}: Not a directory")
    cache.parent.unlink()
    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    assert_unavailable(f"cannot use the cache {cache}: No space left on device")
    assert not site.requests


def test_a_cache_that_becomes_full_keeps_no_part_of_a_download_and_the_run_has_it_all(
    cache, site, monkeypatch
):
    monkeypatch.setattr(np, "savez_compressed", fail)
    lines = []
    assert_is_stand_in(data.load("auto", None, lines.append))
    assert "cannot be written (No space left on device)" in lines[-1]
    assert lines[-1].startswith("warning: the next start downloads it again")
    assert os.listdir(cache) == []


# Files that are at hand. Damage in them is told under every name, and never worked around.


def test_a_folder_of_texts_is_read_and_never_written_to(tmp_path, cache):
    folder = write_texts(tmp_path / "given")
    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode & 0o555)
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    for name in ("larochelle", "auto"):
        assert_is_stand_in(data.load(name, folder))
    assert before == {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    assert not cache.exists()


def test_a_folder_with_one_file_of_packed_bits_is_read_in_fortran_order_too(tmp_path):
    folder = write_cache(tmp_path, valid=np.asfortranarray(BITS["valid"]))
    assert_is_stand_in(data.load("auto", folder))
    assert_is_stand_in(data.load("auto", folder / "larochelle.npz"))


def test_a_file_that_is_missing_from_the_given_folder_is_named(tmp_path):
    folder = write_texts(tmp_path / "given")
    (folder / "valid.amat").unlink()
    assert_refused("given/valid.amat: No such file", folder)
    assert_refused("absent is not a folder", tmp_path / "absent")


def test_a_wrong_byte_in_a_given_text_is_found(tmp_path):
    folder = write_texts(tmp_path / "given")
    text = bytearray(TEXTS["test.amat"])
    text[-2] ^= 1
    (folder / "test.amat").write_bytes(text)
    assert_refused("given/test.amat: the text has SHA-256", folder)


def test_the_published_texts_in_a_folder_are_read_whatever_else_is_there(tmp_path):
    folder = write_texts(tmp_path / "given")
    np.savez(folder / "other.npz", x=1)
    assert_is_stand_in(data.load("auto", folder))


def test_a_damaged_cache_is_named_with_its_remedy(cache):
    path = write_cache(cache) / "larochelle.npz"
    good = path.read_bytes()
    for damage in (good[:-30], b"", good[:300] + b"\0\0\0\0" + good[304:], b"PK" * 500):
        path.write_bytes(damage)
        assert_refused("larochelle.npz: .+; delete it")


@pytest.mark.parametrize(
    "wrong, match",
    [
        (BITS["valid"] ^ np.uint8(1), "valid has SHA-256"),
        (BITS["valid"].astype(np.int16), "valid is int16"),
        (BITS["valid"][:, :97], r"valid is uint8 \[6, 97\], not uint8 \[6, 98\]"),
    ],
)
def test_packed_bits_of_wrong_content_type_or_shape_are_refused(cache, wrong, match):
    write_cache(cache, valid=wrong)
    assert_refused(match)


def test_a_pickle_in_packed_bits_is_never_run(cache):
    write_cache(cache, valid=np.array(tiny.Trap()))
    assert_refused("Object arrays cannot be loaded")
    with zipfile.ZipFile(cache / "larochelle.npz", "w") as archive:
        for key in BITS:
            archive.writestr(f"{key}.npy", pickle.dumps(tiny.Trap()))
    assert_refused("magic")


def test_a_key_that_is_missing_is_named(cache):
    path = write_cache(cache) / "larochelle.npz"
    np.savez(path, train=BITS["train"], test=BITS["test"])
    assert_refused("valid.npy")


def test_an_unknown_name_is_told_the_choices():
    with pytest.raises(VncaError, match="'mnist': choose auto, larochelle, bundled or own"):
        data.load("mnist")


def test_the_bundled_set_takes_no_folder(tmp_path):
    with pytest.raises(VncaError, match="no meaning for the bundled set"):
        data.load("bundled", tmp_path)


def test_a_pipe_or_device_in_place_of_data_is_not_waited_for(tmp_path):
    path = tmp_path / "packed.npz"
    path.symlink_to("/dev/null")  # first, as it has an end
    assert_refused("packed.npz: it is not a file", tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert_refused("packed.npz: it is not a file", tmp_path)


@pytest.mark.parametrize("form", ["texts", "npz", "cache"])
def test_data_damaged_anywhere_is_refused_or_whole(tmp_path, cache, form):
    random = np.random.RandomState(0)
    make = write_texts if form == "texts" else write_cache
    folder = make(cache if form == "cache" else tmp_path / "data")
    paths, refused = sorted(folder.iterdir()), 0
    for _ in range(30):
        path = paths[random.randint(len(paths))]
        good = path.read_bytes()
        at, size = random.randint(len(good)), random.randint(1, 50)
        flipped = bytes([good[at] ^ 1 << random.randint(8)])
        path.write_bytes(
            [
                good[:at] + flipped + good[at + 1 :],
                good[:at],
                good[:at] + good[at + size :],
                good[:at] + random.bytes(size) + good[at:],
                good + random.bytes(size),
                good[:at] + bytes(size) + good[at + size :],
            ][random.randint(6)]
        )
        try:
            assert_is_stand_in(data.load("larochelle", None if form == "cache" else folder))
        except VncaError as fault:
            assert str(path) in str(fault) and len(str(fault).splitlines()) == 1
            refused += 1
        path.write_bytes(good)
    assert refused > 20


# The bundled set.


@pytest.fixture(scope="module")
def bundled():
    return data.load("bundled")


def test_the_bundled_set_has_mnists_sizes_and_label_counts(bundled):
    assert bundled.name == "bundled"
    assert bundled.train.shape == (60000, 98) and bundled.test.shape == (10000, 98)
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_array_equal(np.bincount(bundled.test_labels), counts)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    np.testing.assert_array_equal(np.bincount(bundled.train_labels), counts)
    assert {a.dtype for a in bundled[1:]} == {np.dtype(np.uint8)}


def test_the_published_test_labels_have_the_same_counts(bundled):
    counts = np.bincount(bundled.test_labels)
    np.testing.assert_array_equal(PUBLISHED_COUNTS, counts)
    rows = {key: split.rows for key, split in PUBLISHED.items()}
    assert rows == {"train": 50_000, "valid": 10_000, "test": counts.sum()}


def test_the_published_files_are_known_by_their_names_and_hashes():
    assert PUBLISHED_URL == "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
    known = {
        "train": (
            "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
            "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906",
        ),
        "valid": (
            "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
            "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d",
        ),
        "test": (
            "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
            "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2",
        ),
    }
    for key, split in PUBLISHED.items():
        name, _, *hashes = split
        assert name == f"binarized_mnist_{key}.amat" and tuple(hashes) == known[key]


def test_the_bundled_labels_belong_to_the_images(bundled):
    pixels = np.unpackbits(bundled.train[:10_000], axis=1).astype(np.float32)
    labels = bundled.train_labels[:10_000]
    means = np.stack([pixels[labels == digit].mean(0) for digit in range(10)])
    # A zero is empty in the middle, where a one is inked; about 13% of MNIST's light is ink.
    assert means[0, 14 * 28 + 14] < 0.1 and means[1, 14 * 28 + 14] > 0.8
    assert abs(pixels.mean() - 0.13) < 0.01
    test = np.unpackbits(bundled.test, axis=1).astype(np.float32)
    nearest = (test @ means.T - (means**2).sum(1) / 2).argmax(1)
    assert (nearest == bundled.test_labels).mean() > 0.75  # one in ten by chance


def test_a_damaged_bundled_file_is_found(tmp_path, monkeypatch, bundled):
    labels = bundled.test_labels.copy()
    labels[0] ^= 1
    arrays = {**bundled._asdict(), "test_labels": labels}
    del arrays["name"]
    np.savez(tmp_path / "bundled.npz", **arrays)
    monkeypatch.setattr(data, "BUNDLED", tmp_path / "bundled.npz")
    with pytest.raises(VncaError, match="test_labels has SHA-256 .*reinstall"):
        data.load("bundled")


def test_files_that_are_not_mnists_own_make_no_bundled_set(tmp_path):
    with pytest.raises(VncaError, match="has no IDX files of images"):
        data.make_bundled(tmp_path)
    images, labels = glyphs.draw(5, seed=0)
    glyphs.write_idx(tmp_path, images, images, labels, labels)
    with pytest.raises(VncaError, match="train has SHA-256 .*; provide MNIST's original files"):
        data.make_bundled(tmp_path)


@pytest.mark.skipif(
    "VNCA_MNIST_DIR" not in os.environ, reason="VNCA_MNIST_DIR does not name MNIST's IDX files"
)
def test_the_bundled_set_is_made_again_from_mnists_files(bundled):
    made = data.make_bundled(os.environ["VNCA_MNIST_DIR"])
    assert set(made) == set(data.BUNDLED_ARRAYS)
    for key, array in made.items():
        np.testing.assert_array_equal(array, getattr(bundled, key))


def test_data_that_may_not_be_read_is_no_damage(monkeypatch):
    def denied(path, _):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(data, "_read_npz", denied)
    with pytest.raises(VncaError, match="Permission denied; get permission to read it$"):
        data.load("bundled")


@pytest.mark.parametrize("base", ["", "relative"])
def test_a_cache_folder_that_is_not_absolute_is_not_used(base, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / ".cache" / "vnca"
