"""Protobuf's wire format, as much of it as an ONNX file's own description takes: where each field lies.

The readers of ONNX (ONNX Runtime, onnx, OpenVINO, TensorRT) agree on well-formed bytes.  What some of them might read
otherwise than this module does (groups, field numbers beyond the schema's, lengths beyond the end) is refused, so that
nothing is hidden from it that they would see.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4, groups, are in no ONNX file
_MAX_FIELD = (1 << 29) - 1


class WireError(ValueError):
    """The bytes are no protobuf message."""


def fields(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The fields of the message in data[begin:end], in their order.

    Of each: its number, its wire type, where it begins, where its content begins, and where both end.  Raises `WireError` where the
    bytes are no message.
    """
    at = begin
    while at < end:
        tag, value = data[at], at + 1
        if tag >= 0x80:
            tag, value = _varint(data, at, end, 5)
        number, wire = tag >> 3, tag & 7
        if not 1 <= number <= _MAX_FIELD:
            raise WireError(f"field {number} at byte {at}")
        if wire == LENGTH:
            size, value = _varint(data, value, end, 5)
            after = value + size
        elif wire == VARINT:
            after = _varint(data, value, end, 10)[1]
        elif wire == FIXED32:
            after = value + 4
        elif wire == FIXED64:
            after = value + 8
        else:
            raise WireError(f"wire type {wire} at byte {at}")
        if after > end:
            raise WireError(f"field {number} at byte {at} ends {after - end} bytes too late")
        yield number, wire, at, value, after
        at = after


def _varint(data: bytes, at: int, end: int, most: int) -> tuple[int, int]:
    """The number at data[at], of at most `most` bytes, and where it ends."""
    if at < end and data[at] < 0x80:
        return data[at], at + 1
    value = shift = 0
    for place in range(at, min(end, at + most)):
        byte = data[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place + 1
        shift += 7
    raise WireError(f"no number at byte {at}")


def encode(number: int, content: bytes) -> bytes:
    """A field of wire type LENGTH."""
    return _number(number << 3 | LENGTH) + _number(len(content)) + content


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
