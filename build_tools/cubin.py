"""Reads what a cubin says about its kernels beside their code: the launch bounds (an ELF file of NVIDIA's)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_PREFIX = ".nv.info."  # one such section per kernel
_SIZED = 4  # a record whose two-byte field is the length of what follows; others hold their value in it
_MAX_THREADS, _REQUIRED_THREADS = 5, 16


def sections(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of every section of a 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no 64-bit ELF file")
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, offset + k * size) for k in range(count)]
    text = headers[names][4]
    for name, kind, _, _, start, length in headers:
        label = data[text + name : data.index(b"\0", text + name)].decode()
        yield label, b"" if kind == 8 else data[start : start + length]


def launch_bounds(data: bytes) -> dict[str, int]:
    """Mangled name -> the most threads of a CTA; kernels without launch bounds are left out."""
    found = {}
    for label, contents in sections(data):
        if not label.startswith(_PREFIX):
            continue
        at = 0
        while at + 4 <= len(contents):
            form, attribute, value = struct.unpack_from("<BBH", contents, at)
            at += 4
            if form != _SIZED:
                continue
            if attribute in (_MAX_THREADS, _REQUIRED_THREADS) and value >= 12:
                x, y, z = struct.unpack_from("<III", contents, at)
                found[label.removeprefix(_PREFIX)] = x * y * z
            at += value
    return found
