"""The data: what is loaded is what was published, whatever the network or the disk does."""

import errno
import hashlib
import http.server
import os
import pickle
import socket
import threading
import time
import zipfile
from pathlib import Path

import glyphs
import numpy as np
import pytest

from vnca.program import VncaError, data, download

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


def small_source(url="http://127.0.0.1:9/", texts=TEXTS) -> data.Source:
    splits = {
        key: data.Split(f"{key}.amat", n, sha256(texts[f"{key}.amat"]), sha256(BITS[key]))
        for key, n in _ROWS.items()
    }
    return data.Source(url, splits, (2, 3, 0, 1, 0, 0, 0, 0, 0, 4), connect_s=0.3, stall_s=0.3)


class Site:
    """A web server on loopback with the stand-in's files; `fault` says what it does to "valid"."""

    def __init__(self, fault=None):
        self.requests, self.released = [], threading.Event()
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
                if fault == "redirects" and self.path.startswith("/old/"):
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
                self.wfile.write(body[:half] if bad in ("cut", "stalls", "pauses") else body)
                self.wfile.flush()
                if bad == "pauses":
                    time.sleep(0.5)
                    self.wfile.write(body[half:])
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


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def write_texts(folder: Path, texts=TEXTS) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return folder


def write_cache(folder: Path, **changed) -> Path:
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "larochelle.npz", **{**BITS, **changed})
    return folder


def assert_is_stand_in(dataset: data.Dataset) -> None:
    assert dataset.name == "larochelle"
    assert dataset.train.dtype == dataset.test.dtype == dataset.test_labels.dtype == np.uint8
    np.testing.assert_array_equal(dataset.train, np.concatenate([BITS["train"], BITS["valid"]]))
    np.testing.assert_array_equal(dataset.test, BITS["test"])
    assert dataset.train_labels is None
    np.testing.assert_array_equal(dataset.test_labels, [0, 0, 1, 1, 1, 3, 9, 9, 9, 9])


def assert_refused(match: str, *args, **kwargs) -> None:
    """`load` raises one line that matches, under the name and under auto alike."""
    for name in ("larochelle", "auto"):
        with pytest.raises(VncaError, match=match) as caught:
            data.load(name, *args, source=small_source(), **kwargs)
        assert "\n" not in str(caught.value)


# The download.


@pytest.mark.parametrize("name", ["larochelle", "auto"])
def test_a_download_is_cached_and_the_second_load_asks_for_nothing(tmp_path, name):
    with Site() as site:
        source = small_source(site.url)
        assert_is_stand_in(data.load(name, cache_dir=tmp_path, source=source, log=[].append))
        assert site.requests == ["train.amat", "valid.amat", "test.amat"]
        assert os.listdir(tmp_path) == ["larochelle.npz"]
        lines = []
        assert_is_stand_in(data.load(name, cache_dir=tmp_path, source=source, log=lines.append))
        assert len(site.requests) == 3 and not lines


def test_a_redirect_is_followed(tmp_path):
    with Site("redirects") as site:
        source = small_source(site.url)
        assert_is_stand_in(data.load("auto", cache_dir=tmp_path, source=source, log=[].append))


def test_a_slow_transfer_is_waited_for_longer_than_a_connection(tmp_path):
    with Site("pauses") as site:
        source = small_source(site.url)._replace(connect_s=0.2, stall_s=5)
        assert_is_stand_in(data.load("auto", cache_dir=tmp_path, source=source, log=[].append))


def test_progress_is_told_and_ends_at_100_percent(tmp_path):
    lines = []
    with Site() as site:
        data.load("auto", cache_dir=tmp_path, source=small_source(site.url), log=lines.append)
    assert any(line.startswith("100%  0.1 of 0.1 MB") for line in lines)
    assert len(lines) <= 12


def test_progress_in_a_log_is_a_line_every_tenth():
    lines = []
    with download.progress(1_000_000, lines.append) as show:
        for done in range(1000, 1_000_001, 1000):
            show(done)
    assert [line[:4] for line in lines] == [f"{percent:3d}%" for percent in range(10, 101, 10)]


def test_a_terminal_gets_one_line_of_progress_that_is_rewritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with Site() as site:
        data.load("auto", cache_dir=tmp_path, source=small_source(site.url))
    out = capsys.readouterr().out
    assert "\r100%" in out and out.endswith("\n") and out.count("\n") == 2


FAULTS = {
    "closed": "refused",
    "hangs": "timed out",
    "404": "HTTP Error 404",
    "wrong byte": "the text has SHA-256",
    "cut": "bytes",
    "stalls": "timed out",
    "too long": "bytes",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_download_is_an_error_by_name_and_a_warning_under_auto(tmp_path, fault):
    with Site(fault) as site, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening: a connection to it is refused
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        source = small_source(closed if fault == "closed" else site.url)
        bad = source.url + ("train.amat" if fault == "closed" else "valid.amat")

        with pytest.raises(VncaError, match=FAULTS[fault]) as caught:
            data.load("larochelle", cache_dir=tmp_path, source=source, log=[].append)
        message = str(caught.value)
        assert bad in message and "--config.data.dir=DIR" in message and "\n" not in message
        assert os.listdir(tmp_path) == []

        lines = []
        dataset = data.load("auto", cache_dir=tmp_path, source=source, log=lines.append)
        assert dataset.name == "bundled"
        warnings = [line for line in lines if line.startswith("warning:")]
        assert len(warnings) == 1 and bad in warnings[0] and "not comparable" in warnings[0]
        assert os.listdir(tmp_path) == []


def test_a_download_that_is_interrupted_leaves_nothing(tmp_path):
    def interrupt(line):
        if "%" in line:
            raise KeyboardInterrupt

    with Site() as site, pytest.raises(KeyboardInterrupt):
        data.load("auto", cache_dir=tmp_path, source=small_source(site.url), log=interrupt)
    assert os.listdir(tmp_path) == []


def test_a_folder_of_another_download_may_go_while_one_looks_at_it(tmp_path):
    (tmp_path / "download-gone").symlink_to(tmp_path / "gone")  # listed, but not there
    with Site() as site:
        assert_is_stand_in(data.load("auto", cache_dir=tmp_path, source=small_source(site.url)))


def test_two_that_download_at_once_both_succeed(tmp_path):
    results = []
    with Site() as site:
        source = small_source(site.url)

        def one():
            results.append(data.load("auto", cache_dir=tmp_path, source=source, log=[].append))

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 4
    for dataset in results:
        assert_is_stand_in(dataset)
    assert os.listdir(tmp_path) == ["larochelle.npz"]


def test_a_cache_that_cannot_be_written_is_an_error_by_name_and_a_warning_under_auto(tmp_path):
    (tmp_path / "file").write_text("")
    cache, lines = tmp_path / "file" / "cache", []
    with pytest.raises(VncaError, match="file/cache"):
        data.load("larochelle", cache_dir=cache, source=small_source())
    dataset = data.load("auto", cache_dir=cache, source=small_source(), log=lines.append)
    assert dataset.name == "bundled" and len(lines) == 1 and "file/cache" in lines[0]


def test_the_cache_is_where_xdg_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_cache(tmp_path / "vnca")
    assert_is_stand_in(data.load("auto", source=small_source()))


# Files that are at hand. Damage in them is told under every name, and never worked around.


def test_a_folder_of_texts_is_read_and_never_written_to(tmp_path):
    folder = write_texts(tmp_path / "given")
    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode & 0o555)
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    for name in ("larochelle", "auto"):
        dataset = data.load(name, folder, cache_dir=tmp_path / "cache", source=small_source())
        assert_is_stand_in(dataset)
    assert before == {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    assert not (tmp_path / "cache").exists()


def test_a_folder_with_one_file_of_packed_bits_is_read(tmp_path):
    folder = write_cache(tmp_path)
    assert_is_stand_in(data.load("auto", folder, source=small_source()))


def test_packed_bits_may_lie_in_fortran_order(tmp_path):
    folder = write_cache(tmp_path, valid=np.asfortranarray(BITS["valid"]))
    assert_is_stand_in(data.load("auto", folder, source=small_source()))


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


@pytest.mark.parametrize("at, byte", [(0, b"2"), (1, b","), (1567, b" "), (1565, b"\n")])
def test_a_text_that_is_not_rows_of_0_and_1_is_refused_though_its_hash_is_right(tmp_path, at, byte):
    text = TEXTS["valid.amat"]
    texts = {**TEXTS, "valid.amat": text[:at] + byte + text[at + 1 :]}
    folder = write_texts(tmp_path / "given", texts)
    with pytest.raises(VncaError, match="not lines of 784"):
        data.load("larochelle", folder, source=small_source(texts=texts))


def test_a_damaged_cache_is_named_with_its_remedy(tmp_path):
    path = write_cache(tmp_path) / "larochelle.npz"
    good = path.read_bytes()
    for damage in (good[:-30], b"", good[:300] + b"\0\0\0\0" + good[304:], b"PK" * 500):
        path.write_bytes(damage)
        assert_refused("larochelle.npz: .+; delete it", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "wrong, match",
    [
        (BITS["valid"] ^ np.uint8(1), "valid has SHA-256"),
        (BITS["valid"].astype(np.int16), "valid is int16"),
        (BITS["valid"][:, :97], r"valid is uint8 \[6, 97\], not uint8 \[6, 98\]"),
        (np.zeros((50_000_000,), np.uint8), "valid declares 50,000,128 bytes"),
    ],
)
def test_packed_bits_of_wrong_content_type_shape_or_size_are_refused(tmp_path, wrong, match):
    assert_refused(match, cache_dir=write_cache(tmp_path, valid=wrong))


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_a_pickle_in_packed_bits_is_never_run(tmp_path):
    assert_refused("valid is object", cache_dir=write_cache(tmp_path, valid=np.array(Trap())))
    with zipfile.ZipFile(tmp_path / "larochelle.npz", "w") as archive:
        for key in BITS:
            archive.writestr(f"{key}.npy", pickle.dumps(Trap()))
    assert_refused("magic", cache_dir=tmp_path)


def test_a_key_that_is_missing_is_named(tmp_path):
    np.savez(tmp_path / "larochelle.npz", train=BITS["train"], test=BITS["test"])
    assert_refused("valid.npy", cache_dir=tmp_path)


def test_an_unknown_name_is_told_the_choices():
    with pytest.raises(VncaError, match="'mnist': choose auto, larochelle, bundled or own"):
        data.load("mnist")


def test_the_bundled_set_takes_no_folder(tmp_path):
    with pytest.raises(VncaError, match="no meaning for the bundled set"):
        data.load("bundled", tmp_path)


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
    np.testing.assert_array_equal(data.LAROCHELLE.test_counts, counts)
    rows = {key: split.rows for key, split in data.LAROCHELLE.splits.items()}
    assert rows == {"train": 50_000, "valid": 10_000, "test": counts.sum()}


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
