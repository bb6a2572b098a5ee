"""How many fields a message on the wire has, found without parsing it.

Parsing makes an object of each message of a repeated field: 16 MiB can hold eight million of two bytes, which
take over a second and a gigabyte before anything could count them.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_END, _FIXED32 = 0, 1, 2, 3, 4, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}


def has_more_fields(payload: bytes, descriptor: Descriptor, most: int) -> bool:
    """Whether a message has more than ``most`` fields, those of messages in single fields included.

    A packed field counts as one, each entry of any other repeated field as one, and so do both ends of a
    group, a form that no message here has, but that the parser skips. Takes at most ``most`` steps. Where a
    message is not valid its rest is left to the parser, which builds nothing of it.

    Args:
        payload: the message's bytes.
        descriptor: its type.
        most: how many it may have.
    """
    left = most
    # Where messages begin and end that are still to be counted, with their types.
    open_ = [(0, len(payload), descriptor)]
    while open_:
        position, end, type_ = open_.pop()
        while position < end:
            left -= 1
            if left < 0:
                return True
            tag, position = _varint(payload, position, end)
            kind = tag & 7
            if kind == _VARINT:
                _, position = _varint(payload, position, end)
            elif kind in _FIXED:
                position += _FIXED[kind]
            elif kind == _BYTES:
                length, position = _varint(payload, position, end)
                inner = _single_message(type_.fields_by_number.get(tag >> 3))
                if inner is not None:
                    open_.append((position, min(position + length, end), inner))
                position += length
            elif kind not in (_GROUP, _GROUP_END):
                break
    return False


def _single_message(field: FieldDescriptor | None) -> Descriptor | None:
    return None if field is None or field.is_repeated else field.message_type


def _varint(payload: bytes, position: int, end: int) -> tuple[int, int]:
    """A number, of ten bytes at most, and where the next thing begins."""
    value = shift = 0
    while position < end and shift < 70:
        byte = payload[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, position
