"""Ways to damage a file: blindly, by its bytes; knowingly, by its fields; and by what kind of file it is.

Every function takes the file's content and a seeded generator, and says what it did.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEEP = 100_000  # levels of nesting
# Literals that JSON readers meet in the wild and in attacks; most are valid JSON as Python reads it.
JSON_VALUES = (
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1",
    "2",
    "0.5",
    "-0.0",
    "1e-320",
    "1e308",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "1000000000",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "1" + "0" * 5000,
    "1" * 4000,
    '""',
    '"x"',
    '"../../../../etc/passwd"',
    '"/dev/zero"',
    r'"a\nb: 1"',
    r'"\u001b[2J\u001b]0;owned\u0007"',
    r'"[bold red]x[/]"',
    r'"\u0000"',
    r'"\ud800"',
    r'"\u202egnp.exe"',
    '"' + "A" * 200_000 + '"',
    "[]",
    "{}",
    "[[]]",
    "[null]",
    '{"a": 1}',
    "[1, 2, 3]",
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP,
)
TOML_VALUES = (
    "0",
    "-1",
    "1",
    "3",
    "1000000000",
    "9223372036854775807",
    "9" * 5000,
    "0xff",
    "0xffffffffffffffffffffffff",
    "0x" + "f" * 300,
    "1e999",
    "inf",
    "-inf",
    "nan",
    "-0.0",
    "1e-320",
    "true",
    '""',
    '"x"',
    '"../../../etc"',
    r'"a\nb"',
    r'"\u001b[2J"',
    "'''a\nb'''",
    "[]",
    "[1]",
    "{}",
    "{ a = 1 }",
    "1979-05-27",
    "07:32:00",
    "[" * 2000 + "]" * 2000,
    "[" * DEEP + "]" * DEEP,
    '"' + "A" * 200_000 + '"',
)


@dataclass(frozen=True)
class Done:
    """What was done to a file, and whether it must then be refused."""

    what: str
    refuse: bool = False
    resealed: bool = False  # its digests are right again, so that it is another file rather than a damaged one


def damage(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Blind damage, as by a bad disk, cable or copy."""
    size = len(data)
    at = rng.randrange(size)
    length = min(rng.choice((1, 2, 4, 8, 64, 512, 4096)), size - at)
    head = rng.random() < 0.4  # headers are small and most is decided there
    if head:
        at = rng.randrange(min(size, 600))
        length = min(length, size - at)
    kind = rng.choice(
        (
            "bit",
            "bit",
            "bit",
            "bits",
            "byte",
            "swap",
            "zeros",
            "ones",
            "truncate",
            "delete",
            "insert",
            "splice",
            "repeat",
            "tail",
        )
    )
    new = bytearray(data)
    if kind == "bit":
        bit = rng.randrange(8)
        new[at] ^= 1 << bit
        return f"bit {bit} of byte {at} flipped", bytes(new)
    if kind == "bits":
        for _ in range(rng.randrange(2, 40)):
            new[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return "some bits flipped", bytes(new)
    if kind == "byte":
        new[at] = rng.randrange(256)
        return f"byte {at} is {new[at]}", bytes(new)
    if kind == "swap":
        other = rng.randrange(size)
        new[at], new[other] = new[other], new[at]
        return f"bytes {at} and {other} swapped", bytes(new)
    if kind in ("zeros", "ones"):
        new[at : at + length] = (b"\x00" if kind == "zeros" else b"\xff") * length
        return f"{length} {kind} at {at}", bytes(new)
    if kind == "truncate":
        at = rng.choice((0, 1, 7, 8, 9, at, size - 1, size // 2))
        return f"truncated to {at} of {size} bytes", data[:at]
    if kind == "delete":
        return f"{length} bytes at {at} deleted", data[:at] + data[at + length :]
    if kind == "insert":
        return f"{length} random bytes inserted at {at}", data[:at] + rng.randbytes(length) + data[at:]
    if kind == "splice":
        source = rng.randrange(size)
        block = data[source : source + length]
        new[at : at + len(block)] = block
        return f"{len(block)} bytes from {source} copied over {at}", bytes(new)
    if kind == "repeat":
        return "the whole file twice", data + data
    return f"{length} random bytes appended", data + rng.randbytes(length)


def json_text(text: str, rng: random.Random, values: Sequence[str] = JSON_VALUES) -> tuple[str, str]:
    """A JSON document with one field of another value, name or number, or one more or less."""
    tree = json.loads(text)
    places = list(_places(tree))
    holder, key = rng.choice(places)
    literal = rng.choice(values)
    kind = rng.choice(("value", "value", "value", "value", "nudge", "delete", "rename", "add", "double", "type"))
    mark = "torture-mark"
    shown = literal if len(literal) < 40 else f"{literal[:12]}… ({len(literal)} characters)"
    old = holder[key]
    if kind == "nudge" and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[key] = rng.choice((old + 1, old - 1, old * 2, -old, old * 1_000_003, old + 0.5, old * (1 + 1e-6)))
        return f"{key} is {holder[key]} (was {old})", json.dumps(tree)
    if kind == "delete":
        del holder[key]
        return f"{key} deleted", json.dumps(tree)
    if kind == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
        return f"{key} renamed", json.dumps(tree)
    if kind == "add":
        if isinstance(holder, dict):
            holder["extra"] = mark
        else:
            holder.append(mark)
        return f"{shown} added beside {key}", json.dumps(tree).replace(f'"{mark}"', literal)
    if kind == "double":
        holder[key] = mark
        if isinstance(holder, dict):
            pair = f"{json.dumps(old)}, {json.dumps(str(key))}: {literal}"
            return f"{key} twice, then {shown}", json.dumps(tree).replace(f'"{mark}"', pair)
    if kind == "type":
        holder[key] = [old] if rng.random() < 0.5 else str(old)
        return f"{key} is {type(holder[key]).__name__} of what it was", json.dumps(tree)
    holder[key] = mark
    return f"{key} is {shown}", json.dumps(tree).replace(f'"{mark}"', literal)


def _places(tree: Any) -> Any:
    """Every (container, key or index) of a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


def toml_text(text: str, rng: random.Random, keys: Sequence[str]) -> tuple[str, str]:
    """A TOML document with one line of another value, or one more."""
    lines = text.splitlines()
    value = rng.choice(TOML_VALUES)
    shown = value if len(value) < 40 else f"{value[:12]}… ({len(value)} characters)"
    assigned = [i for i, line in enumerate(lines) if "=" in line]
    kind = rng.choice(("value", "value", "key", "key", "double", "section", "drop", "dotted"))
    at = rng.choice(assigned)
    key = lines[at].split("=")[0].strip()
    if kind == "value":
        lines[at] = f"{key} = {value}"
        return f"{key} = {shown}", "\n".join(lines)
    if kind == "key":
        key = rng.choice(keys)
        lines.insert(at, f"{key} = {value}")
        return f"{key} = {shown} inserted", "\n".join(lines)
    if kind == "double":
        lines.insert(at, f"{key} = {value}")
        return f"{key} twice", "\n".join(lines)
    if kind == "section":
        name = rng.choice(("model", "recipe", "data", "seed", "a" * 10_000, "x.y.z", ".".join("a" * 3000)))
        lines.append(f"[{name}]\n{rng.choice(keys)} = {value}")
        return f"section {name[:20]} with {shown}", "\n".join(lines)
    if kind == "dotted":
        lines.insert(0, f"{rng.choice(('model', 'recipe', 'data'))}.{rng.choice(keys)} = {value}")
        return f"{lines[0][:60]}", "\n".join(lines)
    del lines[at]
    return f"{key} dropped", "\n".join(lines)


def safetensors(data: bytes, rng: random.Random, metadata_key: str | None = None) -> tuple[str, bytes]:
    """A safetensors file with another header, other values, or (`metadata_key`) another JSON document in its metadata."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [k for k in header if k != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]

    def pack(text: str | None = None, length: int | None = None) -> bytes:
        raw = (json.dumps(header) if text is None else text).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(raw) if length is None else length) + raw + body

    kinds = (
        "json",
        "length",
        "shape",
        "dtype",
        "offsets",
        "swap names",
        "rename",
        "drop",
        "values",
        "exchange",
        "metadata",
    )
    kind = rng.choice(kinds if metadata_key is None else (*kinds, *("metadata",) * 8))
    if kind == "json":
        what, text = json_text(json.dumps(header), rng)
        return f"header: {what}", pack(text)
    if kind == "length":
        length = rng.choice((0, 1, size - 1, size + 1, size * 2, 1 << 31, 1 << 40, (1 << 64) - 1))
        return f"header length {length}", pack(None, length)
    if kind == "shape":
        entry["shape"] = rng.choice(
            ([], [0], [1 << 40], [-1, 2], [1 << 62, 4], list(reversed(entry["shape"])), [1] * 70_000)
        )
        return f"shape of {name}", pack()
    if kind == "dtype":
        entry["dtype"] = rng.choice(("F16", "F64", "I64", "BOOL", "BF16", "F8_E4M3", "U8", "X", ""))
        return f"dtype of {name} is {entry['dtype']}", pack()
    if kind == "offsets":
        a, b = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([b, a], [a, b + 4], [a + 4, b], [-4, b], [0, 1 << 63], [a, a], [0, len(body)])
        )
        return f"offsets of {name}", pack()
    if kind in ("swap names", "exchange"):
        alike = [n for n in names if n != name and header[n]["shape"] == entry["shape"]]
        if alike:
            other = rng.choice(alike)
            header[name], header[other] = header[other], header[name]
            return f"{name} and {other} exchanged", pack()
    if kind == "rename":
        header[rng.choice(("x", "", "../x", name + "\n", "\u001b[2J"))] = header.pop(name)
        return f"{name} renamed", pack()
    if kind == "drop":
        del header[name]
        return f"{name} dropped", pack()
    if kind == "metadata":
        inner = header.setdefault("__metadata__", {})
        if metadata_key in inner:
            what, inner[metadata_key] = json_text(inner[metadata_key], rng)
            return f"{metadata_key}: {what}", pack()
        inner["x"] = "y" * rng.choice((1, 1_000_000))
        return "more metadata", pack()
    a, b = entry["data_offsets"]
    value = rng.choice(
        (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x00\x00\x00", b"\x00\x00\x80\x3f")
    )
    at = a + 4 * rng.randrange(max(1, (b - a) // 4))
    body = body[:at] + value + body[at + 4 :]
    return f"a value of {name} is {value.hex()}", pack()


def disguise(path: Path, rng: random.Random) -> Done:
    """Puts another kind of thing in the place of a file."""
    kind = rng.choice(
        (
            "fifo",
            "folder",
            "empty",
            "dangling",
            "itself",
            "zero",
            "null",
            "tty",
            "proc",
            "sparse",
            "pickle",
            "zeros",
            "newlines",
            "far",
        )
    )
    data = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "itself":
        path.symlink_to(path)
    elif kind in ("zero", "null", "tty"):
        path.symlink_to(f"/dev/{kind}")
    elif kind == "proc":
        path.symlink_to("/proc/self/maps")
    elif kind == "sparse":
        path.write_bytes(data)
        os.truncate(path, 40 << 30)
    elif kind == "pickle":
        path.write_bytes(b"cos\nsystem\n(S'touch torture-was-here'\ntR.")
    elif kind == "far":  # a link to the very file is as good as the file
        far = path.with_name("far")
        far.write_bytes(data)
        path.symlink_to(far)
        return Done("a link to the file itself elsewhere")
    else:
        path.write_bytes((b"\x00" if kind == "zeros" else b"\n") * len(data))
    return Done(f"{path.name} is {kind}", refuse=True)


def rewrite(path: Path, change: Callable[[bytes, random.Random], tuple[str, bytes | str]], rng: random.Random) -> Done:
    """Changes a file's content."""
    what, data = change(path.read_bytes(), rng)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return Done(f"{path.name}: {what}")
