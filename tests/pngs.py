"""Reads the PNG files that `vnca.program.pictures` writes, and checks all that a reader checks."""

import struct
import zlib

import numpy as np


def decode(content):
    """The pixels of a grey 8-bit PNG without filters."""
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
            assert struct.unpack(">HHBB", body[20:]) == (100, 1000, 0, 0)  # 0.1 s
        if kind in (b"IDAT", b"fdAT"):
            packed = zlib.decompress(body[4 * (kind == b"fdAT") :])
            rows = np.frombuffer(packed, np.uint8).reshape(height, 1 + width)
            assert not rows[:, 0].any()  # no row is filtered
            frames.append(rows[:, 1:])
    order = [b"IDAT"]
    if len(frames) > 1:
        order = [b"acTL", b"fcTL", b"IDAT", *[b"fcTL", b"fdAT"] * (len(frames) - 1)]
        assert promised == len(frames) and numbers == list(range(2 * len(frames) - 1))
    assert kinds[1:-1] == order
    return frames
