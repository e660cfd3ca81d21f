"""Videos frame by frame: a generated file, a damaged one, and a camera's thread."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

import vitrm.runtime
from vitrm import data
from vitrm.errors import UserError
from vitrm.runtime.predict import video
from vitrm.runtime.predict.cli import main

pytestmark = pytest.mark.slow

cv2 = pytest.importorskip("cv2", reason="needs OpenCV: pip install 'vitrm[video]'")
RATE, COUNT, SIZE = 10, 30, 96


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Three seconds: ten frames of each of three digits."""
    file = tmp_path_factory.mktemp("video") / "clip.mp4"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), RATE, (SIZE, SIZE))
    for i in range(COUNT):
        writer.write(cv2.resize(_digits()[i // 10], (SIZE, SIZE), interpolation=cv2.INTER_CUBIC))
    writer.release()
    return file


def _digits() -> np.ndarray:
    return data.load("digits", "test").pixels[:3].transpose(0, 2, 3, 1)


def test_frames_come_in_order_with_their_times(clip):
    seen = list(video.frames(clip))
    assert [frame.seconds for frame in seen] == pytest.approx([i / RATE for i in range(COUNT)])
    for i, frame in enumerate(seen):
        shown = cv2.resize(_digits()[i // 10], (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
        assert np.abs(frame.pixels.astype(int) - shown).mean() < 12  # lossy


def test_colors_are_not_mirrored(tmp_path):
    file = tmp_path / "red.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), RATE, (SIZE, SIZE))
    for _ in range(3):
        writer.write(np.full((SIZE, SIZE, 3), (0, 0, 255), np.uint8))  # OpenCV's order: blue, green, red
    writer.release()
    red, green, blue = next(video.frames(file)).pixels.reshape(-1, 3).mean(0)
    assert red > 200 > 60 > max(green, blue)


@pytest.mark.parametrize(
    ("rate", "times"), [(2, [0, 0.5, 1, 1.5, 2, 2.5]), (1, [0, 1, 2]), (50, [i / RATE for i in range(COUNT)])]
)
def test_a_rate_leaves_frames_out_evenly(clip, rate, times):
    assert [frame.seconds for frame in video.frames(clip, rate)] == pytest.approx(times)


def test_the_command_classifies_frames_as_infer_does(stepwise, clip, tmp_path, capsys):
    flags = ["--fps", "1", "--json", "--top", "1", "--halt-threshold", "0.5", "--annotate", str(tmp_path)]
    assert main([str(stepwise), str(clip), *flags]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seconds"] for line in lines] == [0, 1, 2]
    session = vitrm.runtime.open(stepwise)
    direct = list(session.predict([clip], top=1, rate=1, halt_threshold=0.5, batch=2))
    assert [(line["top"][0]["label"], line["steps_used"]) for line in lines] == [
        (p.labels[0], p.steps_used) for p in direct
    ]
    assert len(list(video.frames(tmp_path / "clip.mp4"))) == 3


def test_a_damaged_video_is_named_after_its_good_frames(artifact, clip, tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("no video")
    avi = tmp_path / "cut.avi"  # keeps its index in front: a cut one still opens
    writer = cv2.VideoWriter(str(avi), cv2.VideoWriter_fourcc(*"MJPG"), RATE, (SIZE, SIZE))
    for i in range(COUNT):
        writer.write(cv2.resize(_digits()[i // 10], (SIZE, SIZE)))
    writer.release()
    avi.write_bytes(avi.read_bytes()[: avi.stat().st_size // 2])
    assert main([str(artifact), str(tmp_path / "text.mp4"), str(avi), str(clip), "--top", "1"]) == 2
    out, err = capsys.readouterr()
    assert "text.mp4 cannot be read as a video" in err
    assert "cut.avi ends after" in err
    assert "2 of 3 files could not be read" in err
    assert 5 < out.count("cut.avi") < COUNT
    assert out.count("clip.mp4") == COUNT


def test_a_slow_reader_of_a_camera_gets_its_newest_frame(clip, monkeypatch):
    # A file stands for the device: opened, read and closed the same way, by the thread that reads cameras.
    monkeypatch.setattr(video, "is_camera", lambda path: True)
    seen = []

    def watch() -> None:
        for frame in video.frames(clip):
            seen.append(frame)
            time.sleep(0.3)  # a file is read faster than any camera: by then it has ended

    with pytest.raises(UserError, match="gives no more frames"):
        watch()
    assert 1 <= len(seen) < COUNT
    last = cv2.resize(_digits()[2], (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    assert np.abs(seen[-1].pixels.astype(int) - last).mean() < 12


def test_videos_in_a_folder_are_passed_over_with_a_word(artifact, clip, tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(clip.read_bytes())
    assert main([str(artifact), str(tmp_path)]) == 2
    assert "its videos (1) are read where they are named" in capsys.readouterr().err
