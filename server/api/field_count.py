"""How many fields a message on the wire has, found without parsing it.

Parsing makes an object of each message of a repeated field: 16 MiB can hold eight million of two bytes, which
take over a second and a gigabyte before anything could count them.
"""

from __future__ import annotations

import functools

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_END, _FIXED32 = 0, 1, 2, 3, 4, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
# Of a field with a number, or an entry of a map from numbers to numbers, as clients write it: at most.
_NUMBER_BYTES = 32
# Of a number's byte: others follow.
_MORE = 0x80


def has_more_fields(payload: bytes, descriptor: Descriptor, most: int) -> bool:
    """Whether a message has more than ``most`` fields, those of messages in single fields included.

    A packed field counts as one, each entry of any other repeated field as one, and so do both ends of a
    group, a form that no message here has, but that the parser skips. Takes at most ``most`` steps, and none
    for a message of numbers alone that is longer than so many fields make it, as with tens of thousands of
    biases. Where a message is not valid its rest is left to the parser, which builds nothing of it.

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
        single = _single_messages(type_)
        while position < end:
            left -= 1
            if left < 0:
                return True
            # Nearly all tags and lengths have one byte, for which a call would take most of the time.
            tag = payload[position]
            position += 1
            if tag >= _MORE:
                tag, position = _varint(payload, position - 1, end)
            kind = tag & 7
            if kind == _BYTES:
                length = payload[position] if position < end else 0
                position += 1
                if length >= _MORE:
                    length, position = _varint(payload, position - 1, end)
                inner = single.get(tag >> 3)
                if inner is not None:
                    if length > most * _NUMBER_BYTES and _only_numbers(inner):
                        return True
                    open_.append((position, min(position + length, end), inner))
                position += length
            elif kind == _VARINT:
                _, position = _varint(payload, position, end)
            elif kind in _FIXED:
                position += _FIXED[kind]
            elif kind not in (_GROUP, _GROUP_END):
                break
    return False


@functools.cache
def _single_messages(type_: Descriptor) -> dict[int, Descriptor]:
    """Types of the messages that are in single fields, by the fields' numbers."""
    return {
        field.number: field.message_type
        for field in type_.fields
        if field.message_type is not None and not field.is_repeated
    }


@functools.cache
def _only_numbers(type_: Descriptor) -> bool:
    """Whether the fields of a message are numbers, and maps from numbers to numbers."""
    return all(
        field.message_type.GetOptions().map_entry and _only_numbers(field.message_type)
        if field.message_type is not None
        else field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
        and not field.is_repeated
        for field in type_.fields
    )


def _varint(payload: bytes, position: int, end: int) -> tuple[int, int]:
    """A number, of ten bytes at most, and where the next thing begins."""
    value = shift = 0
    while position < end and shift < 70:
        byte = payload[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < _MORE:
            break
        shift += 7
    return value, position
