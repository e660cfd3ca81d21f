"""Ways to alter an ONNX file that still is one: its metadata, its graph, where its weights lie."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from vitrm.runtime.artifact.metadata import DIGEST

from .mutations import JSON_VALUES, Done, json_text

# What class names and run names come with: configuration, terminal codes, markup, paths.
NAMES = (
    'a\nmodel_operations { op_library_filename: "/tmp/x.so" }\n#',
    'a\r\nname: "x"',
    "\x1b[2J\x1b]0;owned\x07",
    "[bold red]x[/bold red]",
    "[/]",
    "../../../etc/passwd",
    "/etc/passwd",
    "",
    " ",
    "\x00",
    "\u202etxt.exe",
    "\u2028",
    "a" * 100_000,
    "<script>alert(1)</script>",
    "=cmd|'/C calc'!A0",
    "-o",
    "é" * 300,
)


def metadata(path: Path, rng: random.Random) -> Done:
    """One of the file's own fields altered."""
    model = onnx.load(str(path))
    props = {p.key: p for p in model.metadata_props}
    keys = sorted(k for k in props if k.startswith("vitrm.") and k != DIGEST)
    key = rng.choice(keys)
    kind = rng.choice(("json", "json", "json", "whole", "whole", "name", "name", "drop", "add", "raw", "double"))
    if kind == "json" and isinstance(json.loads(props[key].value), (dict, list)) and json.loads(props[key].value):
        what, props[key].value = json_text(props[key].value, rng)
        what = f"{key}: {what}"
    elif kind == "name":
        key, name = rng.choice(("vitrm.run", "vitrm.classes", "vitrm.data")), rng.choice(NAMES)
        value = json.loads(props[key].value)
        if key == "vitrm.classes":
            value[rng.randrange(len(value))] = name
        elif key == "vitrm.data":
            value["name"] = name
        else:
            value = name
        props[key].value = json.dumps(value)
        what = f"{key} with {name[:30]!r}"
    elif kind == "drop":
        model.metadata_props.remove(props[key])
        what = f"{key} dropped"
    elif kind == "add":
        model.metadata_props.add(
            key=rng.choice(("vitrm.x", "vitrm.", "vitrm.format\n", "x" * 1000)), value=rng.choice(JSON_VALUES)
        )
        what = "a field more"
    elif kind == "double":
        model.metadata_props.add(key=key, value=rng.choice(JSON_VALUES))
        what = f"{key} twice"
    else:
        literal = rng.choice(JSON_VALUES) if kind == "whole" else rng.choice(("", "x", "{", "\x00", "NaN,", "'a'"))
        props[key].value = literal
        what = f"{key} is {literal[:40]!r}{'…' if len(literal) > 40 else ''}"
    path.write_bytes(model.SerializeToString())
    return Done(f"{path.name}: {what}")


def graph(path: Path, rng: random.Random) -> Done:
    """The graph altered: its interface, nodes, types, weights."""
    model = onnx.load(str(path))
    g = model.graph
    node = rng.choice(_nodes(g))
    weights = [w for w in g.initializer if w.data_type == TensorProto.FLOAT] or list(g.initializer)
    weight = rng.choice(weights)
    kind = rng.choice(
        ("weight", "scale", "swap", "op", "remove", "rewire", "input name", "output name", "input type", "input shape",
         "attribute", "opset", "dims", "weight type", "domain", "cycle", "outputs swapped", "function", "ir")
    )  # fmt: skip
    what = kind
    if kind in ("weight", "scale"):
        values = numpy_helper.to_array(weight).copy()
        flat = values.reshape(-1)
        if kind == "scale":
            flat *= values.dtype.type(1.01)
        else:
            flat[rng.randrange(len(flat))] += 1
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        what = f"{kind} of {weight.name}"
    elif kind == "swap":
        other = rng.choice([w for w in weights if list(w.dims) == list(weight.dims)])
        weight.name, other.name = other.name, weight.name
        what = f"weights {weight.name} and {other.name} swapped"
    elif kind == "op":
        was, node.op_type = (
            node.op_type,
            rng.choice(("Relu", "Add", "Identity", "Loop", "NoSuchOp", "If", "Mul", "Softmax")),
        )
        what = f"{was} is {node.op_type}"
    elif kind == "remove":
        node.op_type, node.domain = "Identity", ""
        del node.input[1:]
        del node.output[1:]
        del node.attribute[:]
        what = f"{node.name} replaced by Identity"
    elif kind == "rewire" and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(("", "pixel_values", "nowhere", weight.name))
    elif kind == "input name":
        g.input[0].name = rng.choice(("x", "", "logits", "pixel_values\n"))
    elif kind == "output name":
        rng.choice(list(g.output)).name = rng.choice(("x", "", "pixel_values"))
    elif kind == "input type":
        rng.choice(list(g.input)).type.tensor_type.elem_type = rng.choice(
            (TensorProto.INT64, TensorProto.FLOAT16, TensorProto.STRING, 0, 99)
        )
    elif kind == "input shape":
        dims = g.input[0].type.tensor_type.shape.dim
        if dims:
            d = rng.choice(list(dims))
            d.dim_value = rng.choice((0, 1, 7, 33, 1 << 40, -1))
        else:
            del g.input[0]
    elif kind == "attribute" and node.attribute:
        attribute = rng.choice(list(node.attribute))
        attribute.i = rng.choice((0, -1, 1 << 40, 99))
        attribute.f = rng.choice((0.0, 1e30, -1.0))
        what = f"attribute {attribute.name} of {node.op_type}"
    elif kind == "opset":
        model.opset_import[0].version = rng.choice((0, -1, 1, 7, 10, 22, 999, 1 << 40))
    elif kind == "dims":
        weight.dims[:] = rng.choice(([], [0], [1 << 40], [1 << 62, 4], [-1], [2] * 60, list(reversed(weight.dims))))
        what = f"dims of {weight.name} are {list(weight.dims)[:4]}"
    elif kind == "weight type":
        weight.data_type = rng.choice((0, 2, 7, 8, 10, 11, 16, 99))
        what = f"type of {weight.name} is {weight.data_type}"
    elif kind == "domain":
        node.domain = rng.choice(("com.microsoft", "evil", "ai.onnx.ml"))
    elif kind == "cycle" and node.input and node.output:
        node.input[0] = node.output[0]
    elif kind == "outputs swapped" and len(g.output) > 1:
        a, b = rng.sample(list(g.output), 2)
        a.name, b.name = b.name, a.name
    elif kind == "function":
        node.op_type, node.domain = "F", "local"
        f = model.functions.add(name="F", domain="local", input=["x"], output=["y"])
        f.node.add(op_type="F", domain="local", input=["x"], output=["y"])
        f.opset_import.add(domain="local", version=1)
    elif kind == "ir":
        model.ir_version = rng.choice((0, 1, 3, 99, 1 << 40))
    path.write_bytes(model.SerializeToString())
    return Done(f"{path.name}: {what}")


def _nodes(g: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The graph's nodes and those of the graphs in them."""
    found = []
    for node in g.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += _nodes(attribute.g)
    return found


def external(path: Path, rng: random.Random) -> Done:
    """Weights moved out of the file: beside it, or to where an artifact has no business."""
    model = onnx.load(str(path))
    outside = path.parent.parent / f"outside-{path.parent.name}"
    weight = max(model.graph.initializer, key=lambda w: len(w.raw_data))
    kind = rng.choice(
        (
            "beside",
            "absolute",
            "parent",
            "link",
            "link folder",
            "link inside",
            "folder",
            "missing",
            "offset",
            "length",
            "device",
            "fifo",
            "hard",
        )
    )
    data = weight.raw_data
    location, offset, length, where = "weights.data", 0, len(data), path.parent / "weights.data"
    if kind == "absolute":
        where = path.parent / "weights.data"
        location = str(where)
    elif kind == "parent":
        where = path.parent.parent / f"{path.parent.name}-weights.data"
        location = f"../{where.name}"
    elif kind == "link":
        where = outside
        (path.parent / location).symlink_to(outside)
    elif kind in ("link folder", "link inside"):
        (path.parent / "real").mkdir()
        where = path.parent / "real" / "w"
        (path.parent / "sub").symlink_to("real")
        location = "sub/../../" + path.parent.name + "/real/w" if kind == "link folder" else "sub/w"
    elif kind == "folder":
        location = "sub/weights.data"
        where = path.parent / location
        where.parent.mkdir()
    elif kind == "offset":
        offset = rng.choice((4, 1 << 40, -4, (1 << 63) - 1))
    elif kind == "length":
        length = rng.choice((4, 1 << 40, -4, 0, (1 << 63) - 1))
    elif kind == "device":
        location = rng.choice(("/dev/zero", "/proc/self/mem"))
    elif kind == "fifo":
        os.mkfifo(where)
    if kind not in ("missing", "device", "fifo"):
        where.write_bytes(data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    del weight.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        weight.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    strange = kind not in ("beside", "folder", "offset", "length", "hard", "link inside")
    shown = "…" if location.startswith("/tmp") else location
    return Done(f"{path.name}: weights {kind} ({shown}, offset {offset}, length {length})", refuse=strange)
