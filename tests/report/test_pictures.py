"""Pictures: the files are valid PNG, and every image stands where it should."""

import struct
import zlib

import numpy as np
import pytest

from vnca.report import pictures

PAPER = 96  # the grey between images


def decode(content):
    """The pixels of a grey 8-bit PNG without filters, after checks of all that a reader checks."""
    [frame] = decode_all(content)
    return frame


def decode_all(content):
    """The same of every frame of an animated one."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        body = content[at + 8 : at + 8 + length]
        (crc,) = struct.unpack(">I", content[at + 8 + length : at + 12 + length])
        assert crc == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    kinds = [kind for kind, _ in chunks]
    assert (kinds[0], kinds[-1], chunks[-1][1]) == (b"IHDR", b"IEND", b"")
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 0, 0, 0, 0]  # bits, grey, deflate, adaptive filters, not interlaced
    frames, numbers = [], []
    for kind, body in chunks[1:-1]:
        if kind == b"acTL":
            promised, plays = struct.unpack(">II", body)
            assert plays == 0  # for ever
        if kind in (b"fcTL", b"fdAT"):
            numbers += struct.unpack(">I", body[:4])
        if kind == b"fcTL":
            assert struct.unpack(">IIII", body[4:20]) == (width, height, 0, 0)
            assert struct.unpack(">HH", body[20:24]) == (100, 1000)  # 100 of 1,000 a second
        if kind in (b"IDAT", b"fdAT"):
            packed = zlib.decompress(body[4 * (kind == b"fdAT") :])
            rows = np.frombuffer(packed, np.uint8).reshape(height, 1 + width)
            assert not rows[:, 0].any()  # no row is filtered
            frames.append(rows[:, 1:])
    if len(frames) > 1:
        order = [b"acTL", b"fcTL", b"IDAT", *[b"fcTL", b"fdAT"] * (len(frames) - 1)]
        assert promised == len(frames) and numbers == list(range(2 * len(frames) - 1))
    else:
        order = [b"IDAT"]
    assert kinds[1:-1] == order
    return frames


def test_several_images_make_an_animation():
    frames = list(np.random.RandomState(0).randint(0, 256, (3, 5, 7), np.uint8))
    np.testing.assert_array_equal(decode_all(pictures.png(*frames)), frames)


def image(number, scale, gap, size, page):
    """The image at (row, column) of a sheet, its pixels shrunk back, and checked to be blocks."""
    i, j = number
    top, left = (scale * (gap + k * (size + gap)) for k in (i, j))
    block = page[top : top + scale * size, left : left + scale * size]
    small = block[::scale, ::scale]
    assert np.array_equal(block, np.kron(small, np.ones((scale, scale), np.uint8)))
    return small


def logit(p):
    return np.log(p / (1 - p))


def has_shade(pixels, p):
    """Whether uint8 pixels are p of white, rounded."""
    return np.abs(pixels - 255 * p).max() < 0.5 + 1e-4


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 40)], ids=str)
def test_a_picture_is_a_valid_png_of_its_pixels(shape):
    pixels = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    assert np.array_equal(decode(pictures.png(pixels)), pixels)


def test_logits_become_probabilities_however_large_they_are():
    p = np.array([0.001, 0.25, 0.5, 0.75, 0.999])
    logits = np.array([*logit(p), -1e4, 1e4, -np.inf, np.inf], np.float32).reshape(1, 1, -1, 1)
    with np.errstate(all="raise"):
        found = pictures.probabilities(logits)
    assert found.shape == (1, 1, 9)
    np.testing.assert_allclose(found[0, 0], [*p, 0, 1, 0, 1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("scale", "gap"), [(4, 2), (1, 0), (3, 5)])
def test_a_sheet_holds_every_image_enlarged_in_its_row_and_column(scale, gap):
    rows = np.random.RandomState(0).rand(2, 3, 5, 5)
    page = pictures.sheet(rows, scale, gap)
    assert page.dtype == np.uint8
    assert page.shape == (scale * (2 * (5 + gap) + gap), scale * (3 * (5 + gap) + gap))
    for i in range(2):
        for j in range(3):
            found = image((i, j), scale, gap, 5, page)
            assert has_shade(found, rows[i, j])
    images = 2 * 3 * (scale * 5) ** 2
    assert np.sum(page == PAPER) >= page.size - images  # paper everywhere else
    blank = pictures.sheet(0 * rows, scale, gap)
    assert set(np.unique(blank)) <= {0, PAPER} and np.sum(blank == 0) == images


def test_smaller_grids_are_centred_on_paper_and_short_rows_end_in_it():
    rows = [[np.ones((2, 2)), np.zeros((4, 4))], [np.ones((8, 8))]]
    page = pictures.sheet(rows, 1, 2)
    expected = np.full((22, 22), PAPER)
    expected[5:7, 5:7] = 255
    expected[4:8, 14:18] = 0
    expected[12:20, 2:10] = 255
    assert np.array_equal(page, expected)


def test_samples_fill_rows_of_eight():
    p = np.linspace(0.05, 0.95, 11)
    logits = np.broadcast_to(logit(p).reshape(-1, 1, 1, 1), (11, 4, 4, 1))
    page = decode(pictures.rows_of_eight(logits))
    assert page.shape == (4 * (2 * 6 + 2), 4 * (8 * 6 + 2))
    for n in range(11):
        assert has_shade(image(divmod(n, 8), 4, 2, 4, page), p[n])
    assert np.all(image((1, 3), 4, 2, 4, page) == PAPER)


def test_reconstructions_stand_below_their_originals():
    images = (np.random.RandomState(0).rand(10, 4, 4, 1) < 0.5).astype(np.float32)
    page = decode(pictures.pairs(images, 60 * images - 30))  # the same, near enough
    assert page.shape == (4 * (4 * 6 + 2), 4 * (8 * 6 + 2))
    for n in range(10):
        for below in (0, 1):
            found = image((2 * (n // 8) + below, n % 8), 4, 2, 4, page)
            assert np.array_equal(found, 255 * images[n, ..., 0])


def test_growth_shows_each_stage_in_a_row_from_its_first_grid_on():
    p = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    rows = [
        np.broadcast_to(logit(np.array(p[i])).reshape(-1, 1, 1, 1), (3, n, n, 1))
        for i, n in enumerate((2, 4))
    ]
    page = decode(pictures.rows_of_growth(rows))
    assert page.shape == (4 * (2 * 6 + 2), 4 * (3 * 6 + 2))
    for j in range(3):
        small = image((0, j), 4, 2, 4, page)
        assert has_shade(small[1:3, 1:3], p[0][j]) and small[0, 0] == PAPER
        assert has_shade(image((1, j), 4, 2, 4, page), p[1][j])


@pytest.mark.parametrize(("length", "lines"), [(1, 1), (9, 1), (10, 1), (11, 2), (37, 4)])
def test_a_long_growth_is_broken_into_lines_that_repeat_where_they_left_off(length, lines):
    p = np.linspace(0.1, 0.9, length)
    row = np.broadcast_to(logit(p).reshape(-1, 1, 1, 1), (length, 2, 2, 1))
    page = decode(pictures.rows_of_growth([row]))
    assert page.shape == (4 * (lines * 4 + 2), 4 * (min(length, 10) * 4 + 2))
    for n in range(length):
        line = max(n - 1, 0) // 9
        found = image((line, n - 9 * line), 4, 2, 2, page)
        assert has_shade(found, p[n])
