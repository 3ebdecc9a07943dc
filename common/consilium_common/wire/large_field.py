"""Cuts the one large field out of a protobuf message without copying it.

A model's chunk has 5 MB. The protobuf library copies it whenever the message around it is read or
written, at each hop several times; here the rest is read as ever, and the chunk stays where it is.
"""

from __future__ import annotations

from typing import Final

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED: Final = {_FIXED64: 8, _FIXED32: 4}


def cut(body: bytes, number: int) -> tuple[bytes, memoryview]:
    """Return the message without its field ``number``, and that field's content.

    Only the first such field is cut out, another one stays in the message; without any the content
    is empty. All other fields are what the protobuf library reads of the whole message.

    Raises
    ------
    ValueError
        The bytes are no protobuf message up to the end of that field.
    """
    at = 0
    while at < len(body):
        begin = at
        tag, at = _varint(body, at)
        kind = tag & 7
        if tag >> 3 == 0:
            raise ValueError("a field without a number")
        if kind == _LENGTH:
            size, at = _varint(body, at)
            end = at + size
        elif kind == _VARINT:
            end = _varint(body, at)[1]
        elif kind in _FIXED:
            end = at + _FIXED[kind]
        else:
            raise ValueError("a group")
        if end > len(body):
            raise ValueError("the message ends within a field")
        if tag >> 3 == number and kind == _LENGTH:
            return body[:begin] + body[end:], memoryview(body)[at:end]
        at = end
    return body, memoryview(b"")


def before(number: int, size: int) -> bytes:
    """Return the bytes that stand before ``size`` bytes of a field's content."""
    return _written(number << 3 | _LENGTH) + _written(size)


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(body):
            raise ValueError("the message ends within a number")
        value |= (body[at] & 0x7F) << shift
        at += 1
        if body[at - 1] < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _written(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
