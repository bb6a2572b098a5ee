"""Protobuf's wire format by hand, for what no message class writes."""

from __future__ import annotations

VARINT, FIXED64, BYTES, GROUP, GROUP_END, FIXED32 = range(6)
"""Types on the wire."""


def varint(value: int) -> bytes:
    """A number; a negative one as ten bytes, as protobuf has it."""
    value &= (1 << 64) - 1
    encoded = b""
    while value > 0x7F:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def field(number: int, content: bytes, kind: int = BYTES) -> bytes:
    """A field of that number; ``content`` as the type on the wire has it, of ``BYTES`` without its length."""
    length = varint(len(content)) if kind == BYTES else b""
    return varint(number << 3 | kind) + length + content
