"""vitrm-predict: a photo.jpg in, its class out, on a machine without torch too."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import WITHOUT_TORCH

import vitrm.runtime
from vitrm import data
from vitrm.runtime.predict import predict, prepare
from vitrm.runtime.predict.cli import main
from vitrm.runtime.predict.predictions import best_batch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Path, data.Images]:
    """Digits as PNG files, in folders and under names of all kinds."""
    folder, digits = tmp_path_factory.mktemp("pictures"), data.load("digits", "test").take(slice(0, 40))
    (folder / "more" / ".hidden").mkdir(parents=True)
    for i, image in enumerate(digits.pixels):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / ("more" if i % 2 else ".") / f"{i:02}.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "more" / ".hidden" / "a.png").write_bytes(b"hidden")
    return folder, digits


def test_a_folder_in_json_is_what_infer_says(artifact, pictures, capsys):
    folder, digits = pictures
    assert main([str(artifact), str(folder), "--json", "--top", "3", "--batch", "7"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(digits)
    session = vitrm.runtime.open(artifact)
    result = session.infer(digits.floats())
    for line in lines:
        i = int(Path(line["path"]).stem)
        order = np.argsort(-result.logits[i])
        assert [int(t["label"]) for t in line["top"]] == order[:3].tolist()
        shares = np.exp(result.logits[i] - result.logits[i].max())
        np.testing.assert_allclose(
            [t["probability"] for t in line["top"]], np.sort(shares / shares.sum())[::-1][:3], atol=2e-4
        )
        assert line["steps_used"] == result.steps_used[i]
        assert line["halt_prob"] == pytest.approx(float(result.halt_prob[i]), abs=2e-5)


def test_csv_a_pattern_and_a_threshold(stepwise, pictures, capsys):
    folder, _ = pictures
    argv = [str(stepwise), str(folder / "more" / "*.png"), "--csv", "--top", "1", "--halt-threshold", "0.5"]
    assert main(argv) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 20
    steps = vitrm.runtime.open(stepwise).metadata.steps
    assert {1 <= int(row["steps_used"]) <= steps for row in rows} == {True}


def test_pictures_that_halt_wait_for_no_others(loop, stepwise, artifact, halting):
    batches = {path.stem: best_batch(vitrm.runtime.open(path), 0.9) for path in (loop, stepwise)}
    assert batches == {"loop": 1, "stepwise": 32}
    assert best_batch(vitrm.runtime.open(loop), 1.0) == 32
    assert best_batch(vitrm.runtime.open(halting)) == 32  # unrolled: all steps are computed whatever halts


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(artifact, pictures, tmp_path, capsys):
    folder, _ = pictures
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert main([str(artifact), str(tmp_path / "broken.jpg"), str(folder / "00.png")]) == 2
    out, err = capsys.readouterr()
    assert "00.png" in out
    assert "broken.jpg cannot be read as an image" in err
    assert "1 of 2 pictures could not be read" in err


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["nothing.jpg"], "nothing.jpg does not exist: name a picture"),
        (["none/*.jpg"], "no file is called like none/"),
        (["."], "holds no pictures"),
        (["--top", "0", "a.jpg"], "--top is 0, expected 1 to"),
        (["--steps", "5000", "a.jpg"], "--steps is 5000, expected 1 to"),
        (["--fps", "0", "a.jpg"], "--fps is 0, expected more than 0"),
        (["camera:77"], "camera:77 would be /dev/video77, which is no camera"),
    ],
)
def test_impossible_input_is_one_line(artifact, tmp_path, monkeypatch, capsys, sources, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(artifact), *sources]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_picture_on_standard_input_without_torch(artifact, pictures):
    folder, _ = pictures
    code = (
        WITHOUT_TORCH
        + f"from vitrm.runtime.predict.cli import main\nsys.exit(main([{str(artifact)!r}, '-', '--json']))"
    )
    with open(folder / "00.png", "rb") as picture:
        ended = subprocess.run([sys.executable, "-c", code], stdin=picture, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(json.loads(ended.stdout)["top"]) == 5


def test_the_same_from_python(artifact, pictures):
    folder, digits = pictures
    session = vitrm.runtime.open(artifact)
    (prediction,) = predict(session, [folder / "00.png"], top=1)
    np.testing.assert_array_equal(prepare(folder / "00.png", 32), digits.floats(slice(0, 1))[0])
    assert prediction.labels == (str(int(session.infer(digits.floats(slice(0, 1))).logits.argmax())),)
    assert list(session.predict([folder / "00.png"], top=1)) == [prediction]


def test_copies_bear_the_answer_and_lie_as_the_originals_do(artifact, pictures, tmp_path, capsys):
    folder, _ = pictures
    sources = [folder / "00.png", folder / "more" / "01.png"]
    before = [source.read_bytes() for source in sources]
    assert main([str(artifact), *map(str, sources), "--annotate", str(tmp_path / "seen")]) == 0
    for source, kept in zip(sources, before, strict=True):
        assert source.read_bytes() == kept
        with Image.open(tmp_path / "seen" / source.relative_to(folder)) as copy, Image.open(source) as original:
            assert min(copy.size) >= 160  # 32 pixels have no room for letters
            same = np.asarray(original.convert("RGB").resize(copy.size, Image.Resampling.NEAREST))
            changed = (np.asarray(copy.convert("RGB")) != same).any(2)
            assert 0.1 < changed.mean() < 0.9
    assert main([str(artifact), str(sources[0]), "--annotate", str(folder)]) == 2
    assert f"would replace {sources[0]} by its copy" in capsys.readouterr().err
    assert sources[0].read_bytes() == before[0]
