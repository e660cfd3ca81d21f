"""Every call that our code makes to CUDA's and TensorRT's bindings fits one of the signatures that the installed ones tell of.

Without a GPU most of these calls are never made: an argument too many would wait for the first user.  By name, as in
`test_tensorrt_api.py`, which holds the names themselves against TensorRT 10.3 … 11.  What only the full TensorRT has is not
seen here: no wheel of it installs everywhere.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
SOURCES = [path for room in ("export", "runtime") for path in sorted((ROOT / room).rglob("*.py"))]
# Of classes of Python's that our calls are made to as well.
COMMON = {name for kind in (str, bytes, dict, set, list, io.BytesIO, np.ndarray) for name in dir(kind)}


class Call(NamedTuple):
    """A call in our sources."""

    where: str
    name: str
    count: int  # of arguments by position
    names: tuple[str, ...]  # of the others
    starred: bool  # there are more, as many as the list has


class Signature(NamedTuple):
    """What an overload takes."""

    names: tuple[str, ...]
    needed: int  # of them without a default


def calls_of(path: Path) -> Iterator[Call]:
    """The calls of attributes in a file, but for those of its own object and of modules other than CUDA's."""
    tree = ast.parse(path.read_text())
    others: set[str] = set()  # none of what is imported is TensorRT, which comes as an argument
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            others |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            root: ast.expr = node.func.value
            while isinstance(root, ast.Attribute):
                root = root.value
            name = root.id if isinstance(root, ast.Name) else ""
            own = name == "self" and root is node.func.value
            if (own or name in others) and not node.func.attr.startswith("cuda"):
                continue
            plain = [a for a in node.args if not isinstance(a, ast.Starred)]
            names = tuple(k.arg for k in node.keywords if k.arg)
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            yield Call(where, node.func.attr, len(plain), names, len(plain) < len(node.args))


def fits(call: Call, signature: Signature) -> bool:
    """True if the call can be one of that signature."""
    if call.count + len(call.names) > len(signature.names):
        return False
    if not set(call.names) <= set(signature.names[call.count :]):
        return False
    return call.starred or set(signature.names[call.count : signature.needed]) <= set(call.names)


def documented(text: str, name: str) -> list[Signature]:
    """The signatures that the first lines of a bound function's help consist of, without `self`."""
    found = []
    for line in text.splitlines():
        start = line.find(f"{name}(")
        if start in (0, 3, 4) and "*args" not in line:  # "1. " before an overload
            parts = list(_split(line[start + len(name) + 1 :]))
            names = [part.partition(":")[0].partition("=")[0].strip() for part in parts if part.strip()]
            needed = [part for part in parts if part.strip() and " = " not in part]
            own = bool(names) and names[0] == "self"
            found.append(Signature(tuple(names[own:]), len(needed) - own))
    return found


def _split(text: str) -> Iterator[str]:
    """The arguments of a signature, up to the bracket that closes it."""
    depth, part = 0, ""
    for character in text:
        if character == ")" and depth == 0:
            break
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            yield part
            part = ""
        else:
            part += character
    yield part


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx")


def signatures(trt: Any, wanted: set[str]) -> dict[str, list[Signature]]:
    """What those of TensorRT's methods and classes take that are called `wanted`, by their names."""
    found: dict[str, list[Signature]] = {}
    for class_name, kind in inspect.getmembers(trt, inspect.isclass):
        if "Plugin" in class_name:
            continue  # we have none
        if class_name in wanted:
            found.setdefault(class_name, []).extend(documented(kind.__init__.__doc__ or "", "__init__"))
        for name in wanted & set(dir(kind)):
            found.setdefault(name, []).extend(documented(getattr(kind, name).__doc__ or "", name))
    return {name: known for name, known in found.items() if known}


def test_calls_of_tensorrt_fit_its_signatures(trt: Any) -> None:
    paths = [path for path in SOURCES if "tensorrt" in path.parent.name]
    calls = [call for path in paths for call in calls_of(path) if call.name not in COMMON]
    known = signatures(trt, {call.name for call in calls})
    found = [call for call in calls if call.name in known]
    wrong = [
        f"{call.where}: {call.name}, which takes {known[call.name]}"
        for call in found
        if not any(fits(call, signature) for signature in known[call.name])
    ]
    assert wrong == []
    checked = {call.name for call in found}
    assert {"Builder", "OnnxParser", "Runtime", "build_serialized_network", "set_shape", "set_input_shape"} <= checked
    assert {"set_tensor_address", "execute_async_v3", "create_execution_context", "set_device_memory"} <= checked


def test_calls_of_cuda_fit_its_signatures() -> None:
    pytest.importorskip("cuda.bindings")
    runtime = importlib.import_module("cuda.bindings.runtime")
    paths = [path for path in SOURCES if "cuda.bindings" in path.read_text()]
    found = [call for path in paths for call in calls_of(path) if call.name.startswith("cuda")]
    wrong = []
    for call in found:
        try:
            function = getattr(runtime, call.name)
            if not inspect.isclass(function):
                inspect.signature(function).bind(*[None] * call.count, **dict.fromkeys(call.names))
        except (AttributeError, TypeError) as error:
            wrong.append(f"{call.where}: {call.name}: {error}")
    assert wrong == []
    assert {"cudaMalloc", "cudaMemcpyAsync", "cudaMemcpyBatchAsync", "cudaGraphLaunch"} <= {call.name for call in found}


def test_what_does_not_fit_is_seen() -> None:
    (one,) = documented("f(self: a.B, x: list[int, str], y: int = <E.A: 0>) -> None\n\n  Says f(z).", "f")
    assert one == Signature(("x", "y"), 1)
    overloads = documented(
        "g(*args, **kwargs)\nOverloaded function.\n\n1. g(self: B) -> int\n\n2. g(self: B, n: int) -> int", "g"
    )
    assert overloads == [Signature((), 0), Signature(("n",), 1)]
    for count, names, good in ((0, (), False), (1, (), True), (2, (), True), (3, (), False), (0, ("x",), True),
                               (1, ("x",), False), (1, ("z",), False), (0, ("y",), False)):  # fmt: skip
        assert fits(Call("", "f", count, names, False), one) == good
    assert fits(Call("", "f", 0, (), True), one)
