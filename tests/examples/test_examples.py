"""Every example, run as its first lines say."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitrm.runtime
from vitrm import data

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def answers(artifact: Path, pictures: Path) -> dict[str, vitrm.runtime.predict.Prediction]:
    """What the runtime itself says of the pictures, by file name."""
    found = vitrm.runtime.open(artifact).predict(sorted(pictures.glob("*.jpg")), top=3)
    return {prediction.path.name: prediction for prediction in found}


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason="needs pip install 'vitrm[examples]'")


def test_all_are_in_the_index() -> None:
    index = (EXAMPLES / "README.md").read_text()
    assert all(f"]({file.name})" in index for file in EXAMPLES.iterdir() if file.suffix in (".py", ".sh"))


def test_shards_become_class_folders_that_training_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("webdataset")
    monkeypatch.syspath_prepend(EXAMPLES)
    unpack_shards = importlib.import_module("unpack_shards")

    def unpacked(shards: str) -> tuple[int, str, str]:
        words = [str(tmp_path / shards), str(out), "--classes", str(tmp_path / "names"), "--side", "64"]
        monkeypatch.setattr(sys, "argv", ["unpack_shards.py", *words])
        return unpack_shards.main(), *capsys.readouterr()

    out, rng = tmp_path / "photos", np.random.default_rng(0)

    def shard(path: Path, samples: dict[str, bytes]) -> None:
        with tarfile.open(path, "w") as tar:
            for name, content in samples.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    def picture(size: tuple[int, int], kind: str, **how: object) -> bytes:
        few = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
        written = io.BytesIO()
        few.resize(size, Image.Resampling.BICUBIC).save(written, kind, **how)
        return written.getvalue()

    sideways = Image.Exif()
    sideways[0x0112] = 6
    small = picture((40, 30), "PNG")
    for part in (0, 1):
        samples = {"small.png": small, "small.cls": b"1"}
        for i in range(6):
            samples |= {f"dir/{i}.jpg": picture((400, 300), "JPEG", exif=sideways), f"dir/{i}.cls": str(i % 2).encode()}
        shard(tmp_path / f"train-{part}.tar", samples | {"alone.txt": b"0"} if part else samples)
    (tmp_path / "names").write_text("../cat\ndog\n")
    code, said, complaints = unpacked("train-{0..1}.tar")
    assert (code, "14 pictures of 2 shards" in said, "1 samples passed over" in complaints) == (2, True, True)
    assert sorted(p.name for p in out.iterdir()) == [".unpacked", "_cat", "dog"]
    assert {Image.open(f).size for f in out.rglob("*.jpg")} == {(64, 85)}  # upright, and no larger than asked for
    assert [f.read_bytes() for f in out.rglob("*.png")] == [small, small]
    assert sum(len(data.load(str(out), split)) for split in data.SPLITS) == 14
    code, said, _ = unpacked("train-{0..1}.tar")
    assert (code, "0 pictures of 0 shards" in said) == (0, True)
    (tmp_path / "train-2.tar").write_bytes((tmp_path / "train-0.tar").read_bytes()[:2000])
    code, _, complaints = unpacked("train-{2..3}.tar")
    assert (code, "train-2.tar cannot be read to its end" in complaints) == (2, True)


def test_the_service_answers_as_the_runtime_does(
    artifacts: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("fastapi", "httpx")
    from fastapi.testclient import TestClient

    monkeypatch.setenv("VITRM_ARTIFACT", str(artifacts / "mine.onnx"))
    spec = importlib.util.spec_from_file_location("fastapi_service", EXAMPLES / "fastapi_service.py")
    assert spec is not None
    assert spec.loader is not None
    service = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(service)
    expected = answers(artifacts / "mine.onnx", pictures)
    with TestClient(service.app) as client:
        assert client.get("/health").json()["steps"] == 3
        for name in ("00.jpg", "07.jpg"):
            answer = client.post("/predict?top=3", content=(pictures / name).read_bytes())
            assert answer.status_code == 200
            assert [t["label"] for t in answer.json()["top"]] == list(expected[name].labels)
        refused = client.post("/predict", content=(pictures / "damaged.jpg").read_bytes())
        assert refused.status_code == 422
        assert "the request's body cannot be read as an image" in refused.json()["detail"]
        monkeypatch.setattr(service, "MOST_BYTES", 100)
        assert client.post("/predict", content=b"x" * 101).status_code == 413


class Inference(BaseHTTPRequestHandler):
    """KServe's protocol, which Triton speaks, in front of `session`: as much of it as one model takes."""

    session: vitrm.runtime.Session
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.endswith("/config"):  # as `vitrm-export --triton` writes it
            stored = json.dumps(self.session.metadata.preprocessing.to_dict())
            self.answer({"name": "mine", "parameters": {"vitrm_preprocessing": {"string_value": stored}}})
            return
        size = self.session.metadata.image_size
        pixels = {"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, size, size]}
        self.answer({"name": "mine", "inputs": [pixels], "outputs": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = int(self.headers["Inference-Header-Content-Length"])
        (asked,) = json.loads(body[:head])["inputs"]
        assert asked["parameters"]["binary_data_size"] == len(body) - head
        result = self.session.infer(np.frombuffer(body[head:], np.float32).reshape(asked["shape"]))
        assert result.steps_used is not None
        self.answer(
            {
                "model_name": "mine",
                "outputs": [
                    {"name": "logits", "datatype": "FP32", "shape": list(result.logits.shape), "data": result.logits.ravel().tolist()},
                    {"name": "steps_used", "datatype": "INT64", "shape": [1], "data": result.steps_used.tolist()},
                ],
            }
        )  # fmt: skip

    def answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_the_client_asks_as_triton_is_asked(artifacts: Path, pictures: Path, tmp_path: Path) -> None:
    needs("tritonclient", "geventhttpclient")
    session = vitrm.runtime.open(artifacts / "mine.onnx")
    names = session.metadata.class_names
    (tmp_path / "labels.txt").write_text("\n".join(names) + "\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfMine", (Inference,), {"session": session}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        files = [pictures / "00.jpg", pictures / "07.jpg"]
        url = f"127.0.0.1:{server.server_port}"
        ended = run(
            sys.executable, EXAMPLES / "triton_client.py", "mine", tmp_path / "labels.txt", *files, "--url", url
        )
    finally:
        server.shutdown()
        server.server_close()
    expected = answers(artifacts / "mine.onnx", pictures)
    for line, file in zip(ended.stdout.splitlines(), files, strict=True):
        p = expected[file.name]
        assert line == f"{file}  {p.labels[0]} {100 * p.probabilities[0]:.1f} %  [3 steps]"


def test_ray_labels_a_folder_on_several_workers(artifacts: Path, pictures: Path, tmp_path: Path) -> None:
    needs("ray", "pyarrow", "pandas")
    quiet = {"RAY_DEDUP_LOGS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    flags = ["--workers", "2", "--batch", "5"]
    run(
        sys.executable,
        EXAMPLES / "ray_batch.py",
        artifacts / "mine.onnx",
        pictures,
        tmp_path / "labels",
        *flags,
        **quiet,
    )
    rows = [row for file in (tmp_path / "labels").glob("*.csv") for row in csv.DictReader(file.open())]
    expected = answers(artifacts / "mine.onnx", pictures)
    assert {Path(row["path"]).name for row in rows} == set(expected)
    assert len(rows) == len(expected)
    for row in rows:
        p = expected[Path(row["path"]).name]
        if p.error is not None:
            assert "cannot be read as an image" in row["error"]
            continue
        assert row["label"] == p.labels[0]
        assert float(row["probability"]) == pytest.approx(p.probabilities[0], abs=1e-4)
        assert int(float(row["steps_used"])) == 3


def test_the_video_loop_answers_every_frame(artifacts: Path, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV: pip install 'vitrm[video]'")
    file = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 64))
    for i in range(10):
        writer.write(np.full((64, 64, 3), 20 * i, np.uint8))
    writer.release()
    loop, stepwise = EXAMPLES / "video_loop.py", artifacts / "mine-stepwise"
    slow = run(sys.executable, loop, stepwise, file, "--fps", "1", "--halt-threshold", "1").stdout.splitlines()
    assert len(slow) == 1
    assert "6 steps" in slow[0]  # a second is enough for all
    hurried = run(sys.executable, loop, stepwise, file, "--fps", "1000", "--halt-threshold", "1").stdout.splitlines()
    assert len(hurried) == 10
    steps = [int(line.split(",")[-2].split()[0]) for line in hurried]
    assert all(1 <= used <= 6 for used in steps)


def test_the_script_for_a_jetson_measures_and_labels(artifacts: Path, pictures: Path, tmp_path: Path) -> None:
    good = tmp_path / "pictures"
    good.mkdir()
    for name in ("00.jpg", "07.jpg"):
        (good / name).write_bytes((pictures / name).read_bytes())
    command = ["bash", EXAMPLES / "jetson.sh", artifacts / "mine.onnx", good, tmp_path / "out"]
    run(*command, PYTHON=sys.executable, SECONDS_EACH="0.2")
    rows = list(csv.DictReader((tmp_path / "out" / "labels.csv").open()))
    expected = answers(artifacts / "mine.onnx", good)
    assert {Path(row["path"]).name: row["label"] for row in rows} == {name: p.labels[0] for name, p in expected.items()}
    measured = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert measured
