"""JetPack 6 has TensorRT 10.3, newer machines have 11: the API that we call must be in both, or be asked for first.

`tensorrt_api_10_3.json` holds names read from real bindings: the classes and enums of 10.3 that matter here, the names
that came later, by version, and those that 11 no longer has.  The walk over our own sources is by name: Python's types
are not known to it, so a name that only a later version has is refused wherever it is read from something that may be
TensorRT's.
"""

from __future__ import annotations

import ast
import enum
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
API = json.loads(Path(__file__).with_name("tensorrt_api_10_3.json").read_text())
NEWER = {name: version for version, names in API["newer"].items() for name in names}
GONE = {name: version for version, names in API["gone"].items() for name in names}
TYPES = {*API["classes"], *API["enums"], *API["other_classes"]}
# What Python's and numpy's own objects have as well says nothing about TensorRT.
COMMON = {name for kind in (str, bytes, dict, set, list, io.BytesIO, np.ndarray, np.dtype) for name in dir(kind)}
COMMON |= set(dir(next(iter(enum.Enum("E", "A"))))) | {"name", "value"}
SWITCH = "vitrm.runtime.backends.tensorrt.api"  # the module that imports TensorRT
# What that module says of the TensorRT at hand: a block that asks for one of these knows what it has.
KNOWS = {"flavour", "targets"}
FLAVOURS = {"RTX": True, "FULL": False}  # whether it has what 10.3 has not


def uses_tensorrt(source: str) -> bool:
    """True for a file that imports TensorRT, or the module that does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        if any(name == SWITCH or name.split(".")[0] in ("tensorrt", "tensorrt_rtx") for name in names):
            return True
    return False


def files() -> list[Path]:
    found = [p for room in ("export", "runtime") for p in sorted((ROOT / room).rglob("*.py"))]
    return [p for p in found if "tensorrt" in p.parent.name or uses_tensorrt(p.read_text())]


def complaints(source: str) -> list[str]:
    """What the source reads that 10.3 or 11 does not have, and does not ask for first: "line: name (why)"."""
    tree = ast.parse(source)
    return [f"{node.lineno}: {what}" for node, guarded in accesses(tree) if not guarded for what in wrong(node, tree)]


def wrong(node: ast.Attribute, tree: ast.Module) -> Iterator[str]:
    base = node.value
    if isinstance(base, ast.Name) and (base.id == "self" or base.id in imported(tree)):
        return  # ours, or another library's
    owner = base.attr if isinstance(base, ast.Attribute) else base.id if isinstance(base, ast.Name) else ""
    if owner in API["enums"]:
        if node.attr not in API["enums"][owner]:
            yield f"{owner}.{node.attr} is not in TensorRT {API['version']}"
        elif node.attr in GONE:
            yield f"{owner}.{node.attr} is gone in TensorRT {GONE[node.attr]}"
    elif owner == "trt" and node.attr[:1].isupper() and node.attr not in TYPES:
        yield f"trt.{node.attr} is not in TensorRT {API['version']}"
    elif node.attr in NEWER and node.attr not in COMMON:
        yield f"{node.attr} came with TensorRT {NEWER[node.attr]}"
    elif node.attr in GONE and node.attr not in COMMON:
        yield f"{node.attr} is gone in TensorRT {GONE[node.attr]}"


def imported(tree: ast.Module) -> set[str]:
    """Names of modules and of what was imported from them: none of them is TensorRT, which only the switch imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names - {"tensorrt", "tensorrt_rtx"}


def accesses(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[ast.Attribute, bool]]:
    """Every attribute in the tree, and whether it is only reached where somebody asked what this TensorRT has."""
    if isinstance(tree, ast.Attribute):
        yield tree, guarded
    if isinstance(tree, (ast.If, ast.IfExp, ast.While)):
        yes, no = asks(tree.test)
        yield from accesses(tree.test, guarded)
        yield from block(tree.body, guarded or yes)
        yield from block(tree.orelse, guarded or no)
    elif isinstance(tree, ast.BoolOp):
        for value in tree.values:
            yield from accesses(value, guarded)
            yes, no = asks(value)
            guarded = guarded or (yes if isinstance(tree.op, ast.And) else no)
    elif isinstance(tree, ast.Try):
        caught = any(h.type is not None and "AttributeError" in ast.unparse(h.type) for h in tree.handlers)
        yield from block(tree.body, guarded or caught)
        for rest in (tree.handlers, tree.orelse, tree.finalbody):
            yield from block(rest, guarded)
    else:
        for _, value in ast.iter_fields(tree):
            if isinstance(value, list):
                yield from block([v for v in value if isinstance(v, ast.AST)], guarded)
            elif isinstance(value, ast.AST):
                yield from accesses(value, guarded)


def block(body: object, guarded: bool) -> Iterator[tuple[ast.Attribute, bool]]:
    """The statements of a block; those behind `if …: return` are reached only where the question was answered no."""
    for node in body if isinstance(body, list) else [body]:
        yield from accesses(node, guarded)
        if isinstance(node, ast.If) and isinstance(node.body[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break)):
            guarded = guarded or asks(node.test)[1]


def asks(test: ast.expr) -> tuple[bool, bool]:
    """Whether a test being true, or being false, says that this TensorRT has what was asked for."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yes, no = asks(test.operand)
        return no, yes
    if isinstance(test, ast.BoolOp):
        answers = [asks(value) for value in test.values]
        both = isinstance(test.op, ast.And)
        return (any(yes for yes, _ in answers), False) if both else (False, any(no for _, no in answers))
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name):
        return test.func.id == "hasattr" or (test.func.id == "getattr" and len(test.args) == 3), False
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        op, right = test.ops[0], test.comparators[0]
        if not (isinstance(test.left, (ast.Attribute, ast.Name)) and ast.unparse(test.left).split(".")[-1] in KNOWS):
            return False, False
        if isinstance(right, ast.Constant) and right.value is None:
            return isinstance(op, ast.IsNot), isinstance(op, ast.Is)
        newer = FLAVOURS.get(ast.unparse(right).split(".")[-1])
        if newer is not None and isinstance(op, (ast.Eq, ast.NotEq)):
            same = isinstance(op, ast.Eq)
            return same == newer, same != newer
    return False, False


@pytest.mark.parametrize("path", files(), ids=lambda p: p.name)
def test_what_we_call_is_in_every_tensorrt(path: Path) -> None:
    assert complaints(path.read_text()) == []


def test_the_files_are_found() -> None:
    assert (ROOT / "runtime" / "backends" / "tensorrt" / "api.py") in files()
    names = {p.name for p in files()}
    # Whoever writes trt.X and is not looked at would be a hole in the test.
    for room in ("export", "runtime"):
        for path in (ROOT / room).rglob("*.py"):
            if any(isinstance(n, ast.Name) and n.id == "trt" for n in ast.walk(ast.parse(path.read_text()))):
                assert path.name in names


def test_the_facts_hold_together() -> None:
    known = TYPES | {m for members in (*API["classes"].values(), *API["enums"].values()) for m in members}
    assert not known & set(NEWER)
    assert not set(GONE) & set(NEWER)
    for name in ("build_serialized_network", "set_input_shape", "execute_async_v3", "STRONGLY_TYPED", "OnnxParser"):
        assert name in known
    assert "create_runtime_config" in NEWER
    assert "FP16" in GONE


BAD = {
    "config.set_flag(trt.BuilderFlag.FP16)": "BuilderFlag.FP16 is gone",
    "config.set_flag(trt.BuilderFlag.MONITOR_MEMORY)": "BuilderFlag.MONITOR_MEMORY is not in TensorRT 10.3",
    "config.tiling_optimization_level = trt.TilingOptimizationLevel.FULL": "trt.TilingOptimizationLevel is not in",
    "size = engine.device_memory_size": "device_memory_size is gone in TensorRT 11",
    "context = engine.create_execution_context(engine.create_runtime_config())": "create_runtime_config came with",
    "config.set_compute_capability(0, 0)": "set_compute_capability came with TensorRT rtx",
    "if api.flavour != RTX:\n    engine.create_runtime_config()": "create_runtime_config came with",
    "if api.flavour == RTX:\n    pass\nelse:\n    engine.create_runtime_config()": "create_runtime_config came with",
    "if hasattr(engine, 'x'):\n    pass\nengine.create_runtime_config()": "create_runtime_config came with",
    "if not hasattr(c, 'is_stream_capturable'):\n    c.is_stream_capturable(s)": "is_stream_capturable came with",
    "try:\n    engine.get_engine_stat(0)\nexcept ValueError:\n    pass": "get_engine_stat came with",
    "x = getattr(trt, 'ComputeCapability', None) or trt.ComputeCapability.SM89": "trt.ComputeCapability is not in",
}
GOOD = [
    "config.clear_flag(trt.BuilderFlag.TF32)",
    "network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))",
    "if hasattr(engine, 'create_runtime_config'):\n    engine.create_runtime_config()",
    "if api.flavour != RTX:\n    return\nengine.create_runtime_config()",
    "if api.flavour == FULL:\n    return\nengine.create_runtime_config()",
    "if gpus is not None and api.targets is not None:\n    config.set_compute_capability(0, 0)",
    "ok = hasattr(c, 'is_stream_capturable') and c.is_stream_capturable(s)",
    "ok = not hasattr(c, 'is_stream_capturable') or c.is_stream_capturable(s)",
    "ok = c.is_stream_capturable(s) if hasattr(c, 'is_stream_capturable') else False",
    "try:\n    engine.get_engine_stat(0)\nexcept AttributeError:\n    pass",
    "import numpy as np\nnp.query(0); self.mask; file.write(b''); kind.value",
]


@pytest.mark.parametrize(("source", "message"), BAD.items())
def test_the_walk_finds(source: str, message: str) -> None:
    found = complaints(f"def f():\n{indented(source)}")
    assert found
    assert any(message in one for one in found)


@pytest.mark.parametrize("source", GOOD)
def test_the_walk_lets_pass(source: str) -> None:
    assert complaints(f"def f():\n{indented(source)}") == []


def indented(source: str) -> str:
    return "".join(f"    {line}\n" for line in source.splitlines())


def test_files_are_told_by_what_they_import() -> None:
    assert uses_tensorrt("from vitrm.runtime.backends.tensorrt.api import load_tensorrt")
    assert uses_tensorrt("from vitrm.runtime.backends.tensorrt import api as tensorrt_api")
    assert uses_tensorrt("import tensorrt_rtx as trt")
    assert not uses_tensorrt("import numpy\nfrom vitrm.runtime.artifact.graph_names import PIXELS")
