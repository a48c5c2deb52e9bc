"""The delicate step of scripts/te/carry_te.py: which bytes of a CUDA library are zeroed.

Tried by hand on the real one: cuobjdump extracts the same 90 sm_90 cubins from libtransformer_engine 2.20.2 as before.
"""

import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "te"))
import carry_te


def entry(arch: int, code: bytes) -> bytes:
    """A code object with the 64-byte header that nvcc 13 writes."""
    header = bytearray(64)
    struct.pack_into("<HHIQ", header, 0, 2, 0x101, 64, len(code))
    struct.pack_into("<I", header, 28, arch)
    return bytes(header) + code


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", carry_te.FATBIN_MAGIC, 1, 16, len(body)) + body + bytes(-len(body) % 8)


def test_only_code_of_other_architectures_is_zeroed():
    hopper, ada, blackwell = b"H" * 24, b"A" * 20, b"B" * 33
    head, tail = b"before..", b"behind"
    section = container(entry(89, ada), entry(90, hopper)) + container(entry(100, blackwell), entry(90, hopper))
    data = bytearray(head + section + tail)
    assert carry_te.keep_architecture(data, len(head), len(section), 90) == (2, 2)
    wanted = container(entry(89, bytes(20)), entry(90, hopper)) + container(entry(100, bytes(33)), entry(90, hopper))
    assert bytes(data) == head + wanted + tail


def test_unknown_layout_and_absent_architecture_are_refused():
    section = container(entry(90, b"H" * 8))
    with pytest.raises(ValueError, match="needed 0xba55ed50"):
        carry_te.keep_architecture(bytearray(b"\0" * 16 + section), 0, 16 + len(section), 90)
    with pytest.raises(ValueError, match="no code object for architecture 80"):
        carry_te.keep_architecture(bytearray(section), 0, len(section), 80)
