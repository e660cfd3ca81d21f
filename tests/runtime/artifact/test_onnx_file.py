"""An .onnx file from anyone: damage is noticed, and no weights are read from elsewhere."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import digest_of, with_props

import vitrm.runtime
from vitrm.errors import UserError
from vitrm.export.targets import triton
from vitrm.runtime.artifact import onnx_file
from vitrm.runtime.artifact import protobuf_wire as wire
from vitrm.runtime.artifact.metadata import DIGEST
from vitrm.runtime.artifact.onnx_file import inspect, write_metadata
from vitrm.runtime.artifact.plan_sidecar import (
    BuildRecord,
    Sidecar,
    read_sidecar,
    read_weights,
    sidecar_path,
    weights_path,
    write_sidecar,
)
from vitrm.runtime.backends.openvino import OpenVinoSession
from vitrm.runtime.bench import cli
from vitrm.runtime.halting.store_threshold import store_threshold
from vitrm.runtime.session import Result

pytestmark = pytest.mark.slow

IMAGES = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)


def answers(path: Path, **settings: bool) -> Result:
    return vitrm.runtime.open(path, threads=1, **settings).infer(IMAGES)


def same(a: Result, b: Result) -> bool:
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("logits", "halt_prob", "steps_used"))


# The digest -----------------------------------------------------------------------------------------


def test_the_digest_is_the_one_that_is_described(artifact: Path) -> None:
    model = onnx.load(str(artifact))
    props = {p.key: p.value for p in model.metadata_props}
    del model.metadata_props[:]
    assert props[DIGEST] == digest_of(model, props)


def flipped(data: bytes, generator: random.Random, positions: range) -> bytes:
    at = generator.choice(positions)
    return data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :]


@pytest.mark.parametrize("graph", ["loop", "artifact"])
def test_a_flipped_bit_is_refused_or_changes_nothing(graph: str, tmp_path: Path, request) -> None:
    source: Path = request.getfixturevalue(graph)
    data, expected, damaged = source.read_bytes(), answers(source), tmp_path / "a.onnx"
    spans = [(number, begin, value, end) for number, _, begin, value, end in wire.fields(data, 0, len(data))]
    ours = [range(begin, end) for number, begin, _, end in spans if number == 14]
    ((begin, graph_begins, graph_ends),) = [tuple(rest) for number, *rest in spans if number == 7]
    generator, refused, total = random.Random(0), 0, 0
    # The parts of the file that are small get as many flips as those that are large.
    regions = [range(begin), range(begin, begin + 4000), range(graph_begins, graph_ends)]
    regions += [range(graph_ends, ours[0].start), *ours]
    for positions in filter(len, regions):
        for _ in range(60 if positions.stop - positions.start > 3000 else 12):
            damaged.write_bytes(flipped(data, generator, positions))
            total += 1
            try:
                found = answers(damaged)
            except UserError:
                refused += 1
            else:
                assert same(found, expected)
    assert total > 250
    assert refused > 0.9 * total


def test_a_flipped_bit_in_a_side_car_is_refused_or_changes_nothing(artifact: Path, tmp_path: Path) -> None:
    plan = tmp_path / "a.plan"
    plan.write_bytes(b"not looked into")
    sidecar = Sidecar(vitrm.runtime.open(artifact).metadata, engine_of(plan))
    write_sidecar(sidecar, sidecar_path(plan))
    data, generator = sidecar_path(plan).read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        sidecar_path(plan).write_bytes(flipped(data, generator, range(len(data))))
        try:
            assert read_sidecar(plan) == sidecar
        except UserError:
            refused += 1
    assert refused > 200  # some are in white space


def engine_of(plan: Path) -> BuildRecord:
    return BuildRecord(
        flavour="full", version="10.3.0", gpus=["sm87"], gpu_name=None, system="Linux aarch64", profiles=[[1, 1, 1]], flags=[],
        workspace_mib=None, source="run", sha256=onnx_file.hashlib.sha256(plan.read_bytes()).hexdigest(), bytes=plan.stat().st_size,
    )  # fmt: skip


def test_a_file_that_was_changed_on_purpose_opens_when_asked(artifact: Path, tmp_path: Path, capsys) -> None:
    model = onnx.load(str(artifact))
    model.producer_name = "another tool"
    onnx.save(model, str(tmp_path / "a.onnx"))
    with pytest.raises(UserError, match=r"its own metadata says .*verify=False\) or vitrm-bench --no-verify"):
        vitrm.runtime.open(tmp_path / "a.onnx")
    assert same(answers(tmp_path / "a.onnx", verify=False), answers(artifact))
    words = [
        str(tmp_path / "a.onnx"),
        "--limit",
        "8",
        "--batch",
        "1",
        "--seconds",
        "0.01",
        "--no-eager",
        "--threads",
        "1",
    ]
    assert cli.main(words) == 2
    assert "it is damaged, or was changed" in capsys.readouterr().err
    assert cli.main([*words, "--no-verify"]) == 0
    assert cli.main([*words, "--no-verify", "--halting"]) == 2
    assert "leave out verify=False (--no-verify)" in capsys.readouterr().err


def test_a_file_of_version_0_1_opens_with_a_note(loop: Path, tmp_path: Path) -> None:
    old = with_props(loop, tmp_path / "old.onnx", format="1", preprocessing=None, sha256=None)
    assert vitrm.runtime.open(old, threads=1).notes == (onnx_file.NOT_CHECKED,)
    # A threshold does not make it a file that was checked since its export.
    assert store_threshold(old, 0.5, 3, {}).format == 1
    assert DIGEST not in inspect(old).props
    assert vitrm.runtime.open(old, threads=1).metadata.halt_threshold == 0.5


def test_a_stored_threshold_renews_the_digest_of_a_whole_file_alone(loop: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a.onnx"
    shutil.copy(loop, copy)
    with open(copy, "ab") as file:  # what other tools add stays
        file.write(wire.encode(14, wire.encode(1, b"theirs") + wire.encode(2, b"kept")))
    store_threshold(copy, 0.5, 3, {"why": "a test"})
    found = inspect(copy)
    assert (found.metadata.halt_threshold, found.props["theirs"]) == (0.5, "kept")
    assert found.props[DIGEST] != inspect(loop).props[DIGEST]
    assert onnx.load(str(copy)).graph == onnx.load(str(loop)).graph
    copy.write_bytes(flipped(copy.read_bytes(), random.Random(0), range(20_000, 30_000)))
    before = copy.read_bytes()
    with pytest.raises(UserError, match="it is damaged"):
        store_threshold(copy, 0.6, 3, {})
    assert copy.read_bytes() == before


# External weights -----------------------------------------------------------------------------------


def external(source: Path, target: Path, location: str) -> Path:
    """A copy of `source` whose first large weight lies in the file `location`; the weight itself."""
    model = onnx.load(str(source))
    tensor = next(i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT and len(i.raw_data) > 4000)
    weights = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    target.write_bytes(model.SerializeToString())
    (target.parent.parent / "weights").write_bytes(weights)
    return target


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


DOORS = {
    "open": vitrm.runtime.open,
    "openvino": lambda path: OpenVinoSession(path, threads=1),
    "threshold": lambda path: store_threshold(path, 0.5, 3, {}),
    "triton": lambda path: triton.add_file(path.parent / "models", "a", path),
    "weights of a plan": lambda path: read_weights(path.with_name(path.name.removesuffix(".onnx")), inspect(path).metadata),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
def test_no_door_leads_to_weights_from_elsewhere(door: str, loop: Path, place: Path) -> None:
    if door == "openvino":
        pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'vitrm[peers]'")
    path = external(loop, place / "a.plan.onnx", "../weights")
    with pytest.raises(
        UserError, match=r"keeps weights in '\.\./weights', expected a file beside it: it is not opened"
    ):
        DOORS[door](path)


@pytest.mark.rtx
def test_a_plan_is_not_built_of_weights_from_elsewhere(loop: Path, place: Path) -> None:
    from vitrm.export.tensorrt.build import build_engine
    from vitrm.export.tensorrt.options import PlanOptions

    path = external(loop, place / "a.onnx", "../weights")
    with pytest.raises(UserError, match="expected a file beside it"):
        build_engine(path, place / "a.plan", PlanOptions(gpus=("sm89",), flavour="rtx"))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{outside}/weights", "expected a file beside it"),
        ("sub/../../weights", "expected a file beside it"),
        ("sub\\..\\..\\weights", "expected a file beside it"),
        ("C:\\weights", "expected a file beside it"),
        ("C:weights", "expected a file beside it"),
        ("\\\\server\\share", "expected a file beside it"),
        ("", "expected a file beside it"),
        (".", "expected a file beside it"),
        ("a\nb", "expected a file beside it"),
        ("*/_ORT_MEM_ADDR_/*", "expected a file beside it"),  # ONNX Runtime's name for an address in memory
        ("link", r"a link to .*/weights outside its folder"),
        ("sub/weights", r"a link to .*/weights outside its folder"),
        ("fifo", "is a FIFO, expected a regular file"),
        ("missing", "must be copied along: .*missing does not exist"),
    ],
)
def test_weights_lie_in_the_files_own_folder(location: str, message: str, artifact: Path, place: Path) -> None:
    (place / "link").symlink_to("../weights")
    (place / "sub").symlink_to("..")
    os.mkfifo(place / "fifo")
    path = external(artifact, place / "a.onnx", location.format(outside=place.parent))
    began = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        vitrm.runtime.open(path)
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 5


def test_weights_beside_the_file_are_part_of_it(artifact: Path, place: Path) -> None:
    path = external(artifact, place / "a.onnx", "sub/a.data")
    (place / "sub").mkdir()
    shutil.copy(place.parent / "weights", place / "sub" / "a.data")
    write_metadata(path, path, inspect(path, verify=False).metadata)
    expected = answers(artifact)
    session = vitrm.runtime.open(path, threads=1)
    assert same(session.infer(IMAGES), expected)
    assert session.size_bytes == path.stat().st_size + (place / "sub" / "a.data").stat().st_size
    version = triton.add_file(place / "models", "a", path)
    assert sorted(str(p.relative_to(version)) for p in version.rglob("*") if p.is_file()) == [
        "model.onnx",
        "sub/a.data",
    ]
    assert same(answers(version / "model.onnx"), expected)
    data = (place / "sub" / "a.data").read_bytes()
    (place / "sub" / "a.data").write_bytes(flipped(data, random.Random(0), range(len(data))))
    with pytest.raises(UserError, match="it is damaged"):
        vitrm.runtime.open(path)
    (version / "model.onnx").rename(version / "a.onnx")
    shutil.move(place / "sub" / "a.data", place / "model.onnx")
    clash = external(artifact, place / "b.onnx", "model.onnx")
    write_metadata(clash, clash, inspect(clash, verify=False).metadata)
    with pytest.raises(UserError, match=r"keeps weights in 'model\.onnx', which is model\.onnx here"):
        triton.add_file(place / "models", "b", clash)
    assert not (place / "models" / "b").exists()


def test_a_loop_with_weights_beside_it_is_served_with_them_inside(loop: Path, place: Path) -> None:
    path = external(loop, place / "a.onnx", "a.data")
    shutil.copy(place.parent / "weights", place / "a.data")
    write_metadata(path, path, inspect(path, verify=False).metadata)
    version = triton.add_file(place / "models", "a", path)
    assert [p.name for p in version.iterdir()] == ["model.onnx"]
    assert same(answers(version / "model.onnx"), answers(loop))


def test_a_plans_weights_are_those_it_was_built_from(artifact: Path, halting: Path, tmp_path: Path) -> None:
    plan, metadata = tmp_path / "a.plan", vitrm.runtime.open(artifact).metadata
    with pytest.raises(UserError, match=r"holds no weights and .*a\.plan\.onnx is not there"):
        read_weights(plan, metadata)
    shutil.copy(artifact, weights_path(plan))
    assert read_weights(plan, metadata) == weights_path(plan)
    with_props(artifact, weights_path(plan), weights_sha256='"other"')
    with pytest.raises(UserError, match=r"has other weights \(other\) than"):
        read_weights(plan, metadata)


def everywhere() -> onnx.ModelProto:
    """A model with an external tensor in every place that a tensor can have."""

    def tensor(name: str) -> TensorProto:
        made = numpy_helper.from_array(np.zeros(2, np.float32), name)
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        made.external_data.add(key="offset", value="0")
        made.external_data.add(key="location", value=name)
        return made

    def graph(name: str, depth: int) -> onnx.GraphProto:
        node = helper.make_node("Constant", [], ["a"])
        node.attribute.append(helper.make_attribute("value", tensor(f"{name}.t")))
        node.attribute.append(helper.make_attribute("tensors", [tensor(f"{name}.tensors")]))
        sparse = onnx.SparseTensorProto(values=tensor(f"{name}.values"), indices=tensor(f"{name}.indices"))
        node.attribute.append(helper.make_attribute("sparse", sparse))
        node.attribute.append(helper.make_attribute("sparses", [sparse]))
        if depth:
            node.attribute.append(helper.make_attribute("body", graph(f"{name}.g", depth - 1)))
            node.attribute.append(helper.make_attribute("bodies", [graph(f"{name}.graphs", depth - 1)]))
        made = helper.make_graph([node], name, [], [], initializer=[tensor(f"{name}.initializer")])
        made.sparse_initializer.append(sparse)
        return made

    model = helper.make_model(graph("main", 2))
    function = model.functions.add(name="f", domain="d")
    function.node.append(graph("function", 1).node[0])
    function.attribute_proto.append(helper.make_attribute("default", tensor("function.default")))
    training = model.training_info.add()
    training.initialization.CopyFrom(graph("initialization", 0))
    training.algorithm.CopyFrom(graph("algorithm", 0))
    return model


def locations_in(message: object) -> set[str]:
    """What onnx's own schema finds."""
    if isinstance(message, TensorProto):
        return {e.value for e in message.external_data if e.key == "location"}
    found: set[str] = set()
    for descriptor, value in message.ListFields():  # type: ignore[attr-defined]
        if descriptor.message_type is not None:
            values = value if isinstance(value, (list, tuple)) or not hasattr(value, "ListFields") else [value]
            found |= {location for v in values for location in locations_in(v)}
    return found


def test_tensors_are_found_wherever_the_schema_has_them() -> None:
    model = everywhere()
    expected = locations_in(model)
    assert len(expected) > 40
    assert set(onnx_file._locations(model.SerializeToString())) == expected
    # And the schema has them nowhere else, in this version of onnx.
    holders, reach = {}, {"TensorProto"}
    messages = {m.name: m for m in onnx.ModelProto.DESCRIPTOR.file.message_types_by_name.values()}
    while True:
        more = {
            n for n, m in messages.items() if any(f.message_type and f.message_type.name in reach for f in m.fields)
        }
        if more <= reach:
            break
        reach |= more
    for name in reach - {"TensorProto"}:
        fields = messages[name].fields
        holders[name] = {
            f.number: f.message_type.name for f in fields if f.message_type and f.message_type.name in reach
        }
    assert holders == onnx_file.MESSAGES


# Bytes that are no model ----------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """Graphs in attributes of nodes of graphs …, with the one word that makes them looked into."""
    body = wire.encode(10, b"location")
    sizes = []
    # Lengths first: building the bytes from the inside out would copy them a hundred thousand times.
    size = len(body)
    for level in range(3 * depth):
        tag = (1, 5, 6)[level % 3]
        head = wire.encode(tag, b"")[:1] + wire._number(size)
        sizes.append(head)
        size += len(head)
    return wire.encode(7, b"".join(reversed(sizes)) + body)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a model",
        b"\x00",
        wire.encode(7, b"")[:1],
        b"\x3b\x3c" + b"location",  # a group
        b"\xba\x80\x80\x80\x80\x00",  # a tag of six bytes
        b"\xba\x80\x80\x80\x70\x00",  # a field beyond 2^29, the seventh for a reader that cuts it off
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a length of 2^64
        b"\x3a\x7f" + b"x" * 10,
        wire.encode(14, wire.encode(1, b"vitrm.run") + wire.encode(2, b"\xff\xfe")),
        wire.encode(7, wire.encode(10, b"location") + b"\x3b"),
        wire.encode(7, wire.encode(10, b"location") + wire.encode(1, b"") * 1_100_000),
    ],
    ids=range(12),
)
def test_other_bytes_are_refused_in_a_line_at_once(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(data)
    began = time.process_time()
    with pytest.raises(UserError, match=r"is not a whole ONNX file .* may be truncated") as caught:
        inspect(tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 10


def test_depth_is_no_bomb(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(nested(30_000))
    began = time.process_time()
    assert inspect(tmp_path / "a.onnx").external == {}
    assert time.process_time() - began < 10
    with pytest.raises(UserError, match="not written by vitrm-export"):
        vitrm.runtime.open(tmp_path / "a.onnx")


def test_special_files_are_not_opened(artifact: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.onnx")
    os.mkfifo(tmp_path / "b.plan.json")
    (tmp_path / "b.plan").write_bytes(b"plan")
    os.mkfifo(tmp_path / "c.plan")
    (tmp_path / "c.plan.json").write_text("{}")
    (tmp_path / "d.onnx").symlink_to("/dev/zero")
    for name, kind in (("a.onnx", "FIFO"), ("b.plan", "FIFO"), ("c.plan", "FIFO"), ("d.onnx", "device")):
        with pytest.raises(UserError, match=f"is a {kind}, expected a regular file"):
            vitrm.runtime.open(tmp_path / name)
    with open(tmp_path / "e.onnx", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="an ONNX file has at most 2147483647"):
        vitrm.runtime.open(tmp_path / "e.onnx")
