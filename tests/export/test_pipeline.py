"""export() and vitrm-export: verified files, honest evidence, clear refusals, nothing half-written."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from small_models import SMALL, small

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm.checkpoint import Checkpoint
from vitrm.config import preset
from vitrm.data import load
from vitrm.errors import UserError
from vitrm.export import cli, export, write
from vitrm.export.graph import layouts
from vitrm.export.images import verification_images
from vitrm.export.verify import verify
from vitrm.recipe import recipe
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.artifact.onnx_file import inspect, write_metadata
from vitrm.runtime.bench import cli as bench_cli

pytestmark = pytest.mark.slow


def test_fp32_file_describes_itself(run, model, digits, tmp_path):
    made = export(checkpoints.load(run), tmp_path / "a.onnx", steps=3)
    assert made.parity.logits < 1e-4
    assert made.parity.agreement == 1
    assert made.bytes == (tmp_path / "a.onnx").stat().st_size
    proto = onnx.load(tmp_path / "a.onnx")
    metadata = Metadata.from_props({p.key: p.value for p in proto.metadata_props}, "a.onnx")
    assert metadata == made.metadata
    assert (metadata.graph, metadata.steps, metadata.precision, metadata.run) == ("unrolled", 3, "fp32", "shaken")
    assert metadata.weights_sha256 == checkpoints.load(run).weights_id
    assert metadata.parity["logits"] == made.parity.logits
    assert torch.__version__.startswith(metadata.versions["torch"])
    result = vitrm.runtime.open(tmp_path / "a.onnx").infer(digits[:33])
    with torch.no_grad():
        np.testing.assert_allclose(result.logits, model(torch.from_numpy(digits[:33]), 3).logits.numpy(), atol=1e-4)


def test_fp16_halves_the_weights_and_keeps_the_answers(run, model, digits, tmp_path):
    single = export(checkpoints.load(run), tmp_path / "a.onnx", steps=4)
    half = export(checkpoints.load(run), tmp_path / "b.onnx", steps=4, precision="fp16")
    # Heads stay float32; mean and std are the model's, in float16 as the embedding is.
    assert half.weights - half.half_weights == 4
    assert half.headroom is not None
    assert half.headroom.factor > 1
    proto = onnx.load(tmp_path / "b.onnx")
    stored = sum(len(i.raw_data) for i in proto.graph.initializer)
    assert stored < 0.53 * sum(len(i.raw_data) for i in onnx.load(tmp_path / "a.onnx").graph.initializer)
    assert {v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)} == {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }
    a, b = (vitrm.runtime.open(m.path).infer(digits) for m in (single, half))
    assert np.abs(a.logits - b.logits).max() < 3e-2 * np.abs(a.logits).max()
    assert np.abs(a.logits - b.logits).max() > 0, "float16 must leave a trace"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loop_takes_its_depth_at_run_time(run, model, digits, tmp_path, precision):
    settings = {"graph": "loop", "steps": 6, "precision": precision, "halt_threshold": 0.8}
    made = export(checkpoints.load(run), tmp_path / "a.onnx", **settings)
    assert (made.metadata.graph, made.metadata.steps, made.metadata.halt_threshold) == ("loop", 6, 0.8)
    session = vitrm.runtime.open(made.path)
    for steps in (1, 4, 16):
        result = session.infer(digits[:9], steps=steps, halt_threshold=2.0)
        with torch.no_grad():
            eager = model(torch.from_numpy(digits[:9]), steps)
        np.testing.assert_allclose(result.logits, eager.logits, atol=1e-4 if precision == "fp32" else made.parity.limit)
        assert result.steps_used.tolist() == [steps] * 9
    assert session.infer(digits).steps_used.max() <= 6
    with pytest.raises(UserError, match="--every-step needs --graph unrolled"):
        export(checkpoints.load(run), tmp_path / "b.onnx", graph="loop", every_step=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_stepwise_is_a_folder_that_describes_itself(run, model, digits, tmp_path, precision):
    with torch.no_grad():
        threshold = float(model.trajectory(torch.from_numpy(digits), 6)[1].median())
    settings = {"graph": "stepwise", "steps": 6, "precision": precision, "halt_threshold": threshold}
    made = export(checkpoints.load(run), tmp_path / "a", **settings)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"embed.onnx", "step.onnx", "heads.onnx"}
    assert (made.metadata.graph, made.metadata.steps, made.metadata.halt_threshold) == ("stepwise", 6, threshold)
    assert made.bytes == sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    session = vitrm.runtime.open(made.path)
    assert session.metadata == made.metadata
    assert session.size_bytes == made.bytes
    result = session.infer(digits[:9], steps=4, halt_threshold=2.0)
    with torch.no_grad():
        eager = model(torch.from_numpy(digits[:9]), 4)
    np.testing.assert_allclose(result.logits, eager.logits, atol=1e-4 if precision == "fp32" else made.parity.limit)
    assert 1 < session.infer(digits).steps_used.mean() < 6
    # Another export takes its place; nothing else does.
    again = export(checkpoints.load(run), tmp_path / "a", graph="stepwise", steps=3)
    assert vitrm.runtime.open(again.path).metadata.steps == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("graph", ["unrolled", "loop", "stepwise"])
def test_the_default_depth_is_the_one_that_was_trained(run, tmp_path, monkeypatch, capsys, graph):
    loaded = checkpoints.load(run)
    monkeypatch.chdir(tmp_path)
    two = {"recipe": dataclasses.asdict(recipe("paper", n_sup=2))}
    checkpoints.save("two", dataclasses.replace(loaded, training=two))

    def depth(*arguments: str) -> tuple[str, int, int | None, str]:
        """The file's name and depths, and what is printed about them."""
        before = set(tmp_path.iterdir())
        assert cli.main([*arguments, "--graph", graph]) == 0
        (made,) = set(tmp_path.iterdir()) - before
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  depth")]
        metadata = vitrm.runtime.open(made).metadata
        return made.name, metadata.steps, metadata.trained_depth, " ".join(said)

    name, steps, trained, said = depth("two")
    assert (steps, trained, said) == (2, 2, "")
    assert graph != "unrolled" or name == "two-2steps-fp32.onnx"
    _, steps, trained, said = depth("two", "--steps", "3", "-o", "deep" if graph == "stepwise" else "deep.onnx")
    assert (steps, trained) == (3, 2)
    assert "3 steps, deeper than the 2 steps it was trained to" in said
    _, steps, trained, said = depth(str(run))
    assert (steps, trained) == (1, None)
    assert "does not say how deep it was trained" in said


@pytest.mark.parametrize("size", [428, 640, 1024])
def test_large_images_are_exported_and_measured_without_their_data_set(tmp_path, monkeypatch, capsys, size):
    monkeypatch.chdir(tmp_path)
    config = preset("tiny", dim=16, heads=2, layers=1, latents=2, n=1, image_size=size, patch_size=size // 4)
    weights = checkpoints.build_model(config).state_dict()
    checkpoints.save("large", Checkpoint(model=config, data={"name": "not at hand"}, weights=weights))
    assert cli.main(["large", "-o", "a.onnx", "--fp16"]) == 0
    assert "photo crops, as unknown data set 'not at hand'" in capsys.readouterr().out
    assert bench_cli.main(["a.onnx", "--run", "large", "--batch", "1,2", "--seconds", "0.02", "--limit", "8"]) == 0
    assert "agreement is measured on 8 unlabelled images (photo crops)" in " ".join(capsys.readouterr().out.split())


def test_photographs_are_added_to_validation_images_that_are_few(tmp_path):
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    config = preset("tiny", dim=16, heads=2, layers=1, latents=2, n=1, classes=2)
    checkpoint = Checkpoint(
        model=config,
        data={"name": str(tmp_path / "photos"), "classes": ["cat", "dog"]},
        weights=checkpoints.build_model(config).state_dict(),
    )
    made = export(checkpoint, tmp_path / "a.onnx")
    assert (
        made.verified_on == f"images: 2 validation images of {tmp_path / 'photos'}, which has no more, and photo crops"
    )
    images, _ = verification_images(checkpoint, None)
    np.testing.assert_array_equal(images[:2], load(str(tmp_path / "photos"), "validation").floats())
    settings = {"steps": 1, "halt_threshold": 2.0, "precision": "fp32"}
    assert verify(made.path, checkpoint.build(), images, **settings, seconds=600).images == 64


def test_a_folder_with_other_things_is_not_replaced(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("important")
    assert cli.main([str(run), "--graph", "stepwise", "-o", str(folder)]) == 2
    assert "other things in it: name a new one" in capsys.readouterr().err
    assert cli.main([str(run), "--graph", "stepwise", "-o", str(folder / "chapter1.tex")]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    assert cli.main([str(run), "--graph", "stepwise", "-o", str(tmp_path / "a.onnx")]) == 2
    assert "leave out .onnx" in capsys.readouterr().err
    stepwise = layouts.stepwise
    monkeypatch.setattr(layouts, "stepwise", lambda r: {k: v for k, v in stepwise(r).items() if k != "heads"})
    assert cli.main([str(run), "--graph", "stepwise", "-o", str(tmp_path / "b")]) == 2
    assert "lacks heads.onnx" in capsys.readouterr().err
    assert (folder / "chapter1.tex").read_text() == "important"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *itertools.product(["resnet18", "resnet18-cifar", "vit-small"], ["fp32", "fp16"]),
        *((name, "fp16") for name in SMALL if name not in ("vit-small", "mobilenetv2-cifar")),
    ],
)
def test_baselines_export(name, precision, digits, tmp_path):
    torch.manual_seed(0)
    config = small(name) if name in SMALL else preset(name)
    net = checkpoints.build_model(config)
    weights = {
        k: v + 0.02 * torch.randn(v.shape) if v.is_floating_point() and "running" not in k else v
        for k, v in net.state_dict().items()
    }
    made = export(
        Checkpoint(model=config, data={"name": "digits"}, weights=weights, source=name),
        tmp_path / "a.onnx",
        precision=precision,
    )
    assert (made.metadata.graph, made.metadata.steps, made.metadata.recursive) == ("single", 1, False)
    result = vitrm.runtime.open(made.path).infer(digits[:33])
    net.load_state_dict(weights)
    with torch.no_grad():
        eager = net.eval()(torch.from_numpy(digits[:33])).numpy()
    np.testing.assert_allclose(result.logits, eager, atol=made.parity.limit)
    assert result.halt_prob is None


def test_a_graph_that_differs_gets_no_name(run, tmp_path, monkeypatch):
    target = tmp_path / "a.onnx"
    target.write_bytes(b"an earlier file")
    unrolled = layouts.unrolled
    # One step too few: the kind of mistake that verification is for.
    monkeypatch.setattr(layouts, "unrolled", lambda r, steps, *rest: unrolled(r, steps - 1, *rest))
    with pytest.raises(UserError, match=r"differs from the eager model: logits by"):
        export(checkpoints.load(run), target, steps=4)
    assert target.read_bytes() == b"an earlier file"
    assert list(tmp_path.iterdir()) == [target]


def test_a_graph_that_differs_on_a_few_images_is_found_among_all(run, model, digits, tmp_path):
    path = export(checkpoints.load(run), tmp_path / "a.onnx", steps=2).path
    proto = onnx.load(path)
    # Bright pixels are cut off: the first seven images have none, and cannot tell.
    for node in proto.graph.node:
        node.input[:] = ["dim" if name == "pixel_values" else name for name in node.input]
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.float32(v), n) for n, v in (("low", 0), ("top", 0.5))
    )
    proto.graph.node.insert(0, onnx.helper.make_node("Clip", ["pixel_values", "low", "top"], ["dim"]))
    onnx.save(proto, path)
    write_metadata(path, path, inspect(path, verify=False).metadata)
    images = digits[:64].copy()
    images[:7] *= 0.5
    settings = {"steps": 2, "halt_threshold": 2.0, "precision": "fp32"}
    assert verify(path, model, images, **settings, seconds=0).images == 7
    with pytest.raises(UserError, match=r"differs from the eager model: logits by .* of the largest\)"):
        verify(path, model, images, **settings, seconds=600)


@pytest.mark.parametrize(
    ("scale", "way_out"),
    [(0.05, r"hardly learned yet.*--init RUN\), or export with --fp16"), (9, "--estimator minmax")],
)
def test_an_int8_file_that_differs_says_what_to_do_for_such_a_model(run, model, digits, tmp_path, scale, way_out):
    path = export(checkpoints.load(run), tmp_path / "a.onnx", steps=1).path
    other = copy.deepcopy(model)  # answers other than the file's, small or large ones
    with torch.no_grad():
        other.classifier.weight *= scale
        other.classifier.bias *= scale
    with pytest.raises(UserError, match=f"no file was written: .*{way_out}"):
        verify(path, other, digits[:7], steps=1, halt_threshold=2.0, precision="int8", seconds=0)


def test_float16_overflow_is_refused_before_anything_is_written(run, tmp_path):
    loaded = checkpoints.load(run)
    loud = {k: v * 1e5 if k == "block.0.ffn.down.bias" else v for k, v in loaded.weights.items()}
    checkpoint = Checkpoint(model=loaded.model, data=loaded.data, weights=loud)
    with pytest.raises(UserError, match=r"activations reach .* in (step|the embedding)"):
        export(checkpoint, tmp_path / "a.onnx", steps=2, precision="fp16")
    louder = {k: v * 1e6 if k == "block.0.ffn.down.weight" else v for k, v in loaded.weights.items()}
    with pytest.raises(UserError, match=r"float16"):
        export(
            Checkpoint(model=loaded.model, data=loaded.data, weights=louder),
            tmp_path / "a.onnx",
            steps=1,
            precision="fp16",
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], r"--steps is 0, expected 1 to 256"),
        (["--steps", "100000"], r"--steps is 100000, expected 1 to 256"),
        (["-o", "{tmp}/model.pt"], r"ending in \.onnx"),
        (["-o", "{tmp}"], r"ending in \.onnx"),
        (["-o", "/proc/nowhere/a.onnx"], r"writing /proc/nowhere"),
        (["-o", "{tmp}/" + 300 * "a" + ".onnx"], r"File name too long"),
        (["-o", "{tmp}/" + os.fsdecode(b"\xff") + ".onnx"], r"its name is not UTF-8"),
        (["--halt-threshold", "0"], r"above 0"),
        (["--halt-threshold", "nan"], r"above 0"),
        (["--halt-threshold", "inf"], r"halt threshold is inf, expected a number above 0, at most 1000"),
        (["--data-dir", "{tmp}/none", "--steps", "1"], None),
    ],
)
def test_bad_requests_end_with_one_line_and_2(run, tmp_path, capsys, arguments, message):
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    if "-o" not in arguments:
        arguments += ["-o", str(tmp_path / "a.onnx")]
    code = cli.main([str(run), *arguments])
    err = capsys.readouterr().err
    if message is None:  # digits needs no folder
        assert code == 0
        return
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert __import__("re").search(message, err)
    assert not list(tmp_path.glob("*.onnx"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--int8", "--sensitivity", "{old}"], "is an ONNX file, which it would replace"),
        (["--int8", "--sensitivity", "{run}/config.json"], "--sensitivity .* is part of the model in|is read by"),
        (["--int8", "--sensitivity", "{tmp}/s.png"], "--sensitivity's picture both name"),
        (["--int8", "--sensitivity", "{tmp}/a.json", "--calibration", "{tmp}/a.txt"], "picture both name"),
        (["--int8", "--calibration", "{run}/curve.json"], r"curve\.png is part of the model in"),
        (["--hf", "{run}"], r"holds a run \(model\.safetensors\), whose config\.json would be replaced"),
    ],
)
def test_nothing_is_written_over_something_else(run, tmp_path, capsys, options, message):
    own = Path(shutil.copytree(run, tmp_path / "run"))
    for name in ("curve.png", "old.onnx"):
        (own / name).write_bytes(b"whole")
    before = {p: p.read_bytes() for p in own.iterdir()}
    options = [o.format(old=own / "old.onnx", run=own, tmp=tmp_path) for o in options]
    assert cli.main([str(own), *options, *([] if "--hf" in options else ["-o", str(tmp_path / "a.onnx")])]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert {p: p.read_bytes() for p in own.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_baseline_has_no_steps(tmp_path, capsys):
    config = preset("resnet18")
    checkpoints.save(
        tmp_path / "run",
        Checkpoint(model=config, data={"name": "digits"}, weights=checkpoints.build_model(config).state_dict()),
    )
    assert cli.main([str(tmp_path / "run"), "--steps", "6", "-o", str(tmp_path / "a.onnx")]) == 2
    assert "a resnet has no recursion: leave out --steps" in capsys.readouterr().err


def _edit(folder, old, new, unseal=False):
    """Changes a run's config; `unseal` takes its checksums out, as whoever means the change does."""
    config = json.loads((folder / "config.json").read_text().replace(old, new))
    if unseal:
        del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "does not exist"),
        (lambda f: (f / "config.json").unlink(), "does not exist"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated"),
        (lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:50]), "truncated"),
        (lambda f: (f / "config.json").write_text("[]"), "expected an object"),
        (lambda f: (f / "config.json").write_text('{"format": 99}'), "format is 99"),
        (lambda f: _edit(f, '"latents": 8', '"latents": 9'), "was changed after it was written"),
        (lambda f: _edit(f, '"latents": 8', '"latents": 9', unseal=True), "of another shape"),
        (lambda f: _edit(f, '"layers": 2', '"layers": 3', unseal=True), "missing"),
        (lambda f: _edit(f, '"layers": 2', '"layers": 1', unseal=True), "unexpected"),
        (lambda f: _edit(f, '"vitrm"', '"mlp"', unseal=True), "model kind is 'mlp'"),
    ],
)
def test_damaged_runs_are_refused(run, tmp_path, capsys, damage, message):
    folder = tmp_path / "run"
    folder.mkdir()
    for file in run.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    assert cli.main([str(folder), "--steps", "1", "-o", str(tmp_path / "a.onnx")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.onnx").exists()


def test_a_missing_run_names_the_bundled_ones(capsys, tmp_path):
    assert cli.main([str(tmp_path / "nothing")]) == 2
    assert checkpoints.DEFAULT_BUNDLED in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(run, tmp_path):
    # RLIMIT_FSIZE stands for the full disk: the write fails part way.
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code = "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from vitrm.export.cli import main; sys.exit(main())"
    target = tmp_path / "a.onnx"
    target.write_bytes(b"an earlier file")
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), "--steps", "6", "-o", str(target)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")  # on a busy machine behind a line of progress
    assert target.read_bytes() == b"an earlier file"
    assert list(tmp_path.iterdir()) == [target]


def test_help_is_quick_and_loads_no_torch():
    code = "import sys; from vitrm.export import cli; cli.parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_default_name_says_what_it_is(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(run), "--steps", "2", "--fp16"]) == 0
    assert (tmp_path / "shaken-2steps-fp16.onnx").exists()
    out = capsys.readouterr().out
    assert "parity" in out
    assert "headroom" in out
    assert Path("shaken-2steps-fp16.onnx").name in out.splitlines()[-1]


def test_glimpses_are_chosen_when_exporting(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(run), "--steps", "2", "--glimpses", "shift", "--graph", "loop"]) == 0
    made = vitrm.runtime.open("shaken-shift-loop-fp32.onnx")
    assert made.metadata.model["glimpses"] == "shift"
    assert made.metadata.weights_sha256 == checkpoints.load(run).weights_id
    images = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    eager = checkpoints.load(run).with_glimpses("shift").build()
    with torch.no_grad():
        expected, _ = eager.trajectory(torch.from_numpy(images), 4)
    for steps in (1, 2, 4):
        np.testing.assert_allclose(made.infer(images, steps=steps).logits, expected[steps - 1], atol=1e-4)
    assert cli.main(["shaken-shift-loop-fp32.onnx", "--glimpses", "none", "-o", "a.plan"]) == 2
    assert "--glimpses was decided when shaken-shift-loop-fp32.onnx was exported" in capsys.readouterr().err


def test_without_torch_the_command_says_what_it_needs(run, tmp_path):
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from vitrm.export.cli import main\n"
        f"sys.exit(main([{str(run)!r}, '-o', {str(tmp_path / 'a.onnx')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "this needs torch, which is not installed: pip install torch" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_beyond_what_an_onnx_file_holds_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "MAX_FILE", 1000)  # two gigabytes of weights take too long to make
    for graph in ("unrolled", "stepwise"):
        target = tmp_path / ("a" if graph == "stepwise" else "a.onnx")
        with pytest.raises(UserError, match=r"weights take .* GB, an ONNX file has at most .*--fp16 or --int8"):
            export(checkpoints.load(run), target, steps=2, graph=graph)
    assert list(tmp_path.iterdir()) == []
