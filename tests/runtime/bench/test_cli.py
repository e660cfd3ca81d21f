"""vitrm-bench as users meet it: exit codes, messages, files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from processes import PATIENCE, WITHOUT_TORCH, interruptible, timed
from small_models import with_props

from vitrm.runtime.bench.cli import main

pytestmark = pytest.mark.slow

QUICK = ["--seconds", "0.05", "--threads", "1", "--limit", "20", "--batch", "1"]


def command(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vitrm.runtime.bench.cli", *map(str, args)], capture_output=True, text=True, **options
    )


def test_help_is_quick_and_whole() -> None:
    done, seconds = timed([sys.executable, "-m", "vitrm.runtime.bench.cli", "--help"])
    assert done.returncode == 0
    for flag in (
        "--run",
        "--data",
        "--data-dir",
        "--batch",
        "--threads",
        "--seconds",
        "--json",
        "--report",
        "--device",
    ):
        assert flag in done.stdout
    assert seconds < 1  # 0.2 on a quiet machine


def test_prints_table_and_writes_files(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, page = tmp_path / "new" / "bench.json", tmp_path / "report.html"
    assert main([str(artifact), *QUICK, "--json", str(figures), "--report", str(page), "--min-agreement", "1"]) == 0
    out = capsys.readouterr().out
    for text in (
        "artifact",
        "p50 ms",
        "× eager",
        "agreement",
        "tiny.onnx",
        "eager PyTorch",
        "onnxruntime-cpu",
        "100.00 %",
    ):
        assert text in out
    assert "20 of the 359 test images of digits" in out
    assert "1 thread" in out
    read = json.loads(figures.read_text())
    assert read["command"].startswith("vitrm-bench ")
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "report.html"]


def test_bad_input_is_one_line_and_2(
    artifact: Path, run: Path, vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = artifact.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "file").write_text("")
    (tmp_path / "linked.onnx").hardlink_to(artifact)
    (tmp_path / "x.plan.json").write_text("{}")
    weights = (run / "model.safetensors").read_bytes()
    for args, message in [
        (["missing.onnx"], "missing.onnx does not exist"),
        ([str(tmp_path / "cut.onnx")], "may be truncated"),
        ([str(tmp_path)], "is a folder"),
        ([str(run)], "is a run folder"),
        ([str(artifact), "--run", str(vit_run)], "is a vit, the artifact a vitrm"),
        ([str(artifact), "--run", "nowhere"], "no run folder"),
        ([str(artifact), "--data", "nothing"], "unknown data set"),
        ([str(artifact), "--compile", "--no-eager"], "choose one"),
        ([str(artifact), "--min-agreement", "1", "--no-eager"], "needs the eager model"),
        ([str(artifact), "--json", str(tmp_path)], "is a folder: name a file"),
        ([str(artifact), "--report", str(tmp_path / "file" / "r.html")], "is a file, expected a folder"),
        ([str(artifact), "--json", "/dev/full"], "not a regular file"),
        ([str(artifact), "--json", str(tmp_path / "a"), "--report", str(tmp_path / "a")], "different names"),
        ([str(artifact), "--report", str(artifact)], "is read by this command"),
        ([str(artifact), "--json", str(tmp_path / "linked.onnx")], "is read by this command"),
        ([str(artifact), "--json", str(tmp_path / "cut.onnx")], "is an ONNX file, which it would replace"),
        ([str(artifact), "--json", str(tmp_path / "x.plan.json")], "is the side-car of a plan"),
        ([str(artifact), "--json", str(run / "config.json")], "is part of the model in"),
        ([str(artifact), "--report", str(run / "model.safetensors")], "is a file of weights"),
    ]:
        assert main([*args, *QUICK]) == 2, args
        captured = capsys.readouterr()
        assert message in captured.err, args
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert artifact.read_bytes() == whole
    assert (run / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch", "0"],
        ["--batch", "1,x"],
        ["--threads", "0"],
        ["--seconds", "-1"],
        ["--limit", "0"],
        ["--min-agreement", "2"],
        ["--steps", "0"],
        ["--steps", "3-1"],
        ["--steps", "1-99999999999"],
        ["--halt-threshold", "nan"],
        ["--halt-threshold", "-1"],
        [],
    ],
)
def test_bad_flags_are_2(artifact: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(artifact), *flags] if flags else []) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_cuda_asked_where_none_is(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert main([str(artifact), *QUICK, "--device", "cuda"]) == 2
    assert "device cuda was asked for" in capsys.readouterr().err


def test_a_failed_artifact_is_2_after_the_others(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(artifact), "missing.onnx", *QUICK]) == 2
    captured = capsys.readouterr()
    assert "✗ missing.onnx: missing.onnx does not exist" in captured.out
    assert "100.00 %" in captured.out
    assert captured.err.startswith("error: missing.onnx could not be measured")


def test_gate(rough: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "bench.json"
    quick = [a if a != "20" else "359" for a in QUICK]
    assert main([str(rough), *quick, "--min-agreement", "0.999", "--json", str(figures)]) == 2
    assert "--min-agreement asks for 0.999" in capsys.readouterr().err
    assert figures.exists()  # what was measured is kept
    agreement = json.loads(figures.read_text())["rows"][1]["agreement"]
    assert main([str(rough), *quick, "--min-agreement", str(agreement)]) == 0
    alone = shutil.copy(rough, tmp_path / "alone.onnx")  # its run is not beside it
    assert main([str(alone), *QUICK, "--min-agreement", "0.5"]) == 2
    assert "could not be measured" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--report"])
def test_full_disk_leaves_the_old_file(artifact: Path, tmp_path: Path, flag: str) -> None:
    target = tmp_path / "out"
    target.write_text("old")

    def limit() -> None:  # the kernel refuses to let any file grow beyond this, as a full disk would
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = command(artifact, *QUICK, "--no-eager", flag, target, preexec_fn=limit)
    assert done.returncode == 2
    assert "while writing" in done.stderr
    assert "Traceback" not in done.stderr
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_no_space_left_is_explained(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main([str(artifact), *QUICK, "--json", str(tmp_path / "bench.json")]) == 2
    assert "no space left on the disk while writing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_works_without_torch(artifact: Path) -> None:
    script = WITHOUT_TORCH + f"from vitrm.runtime.bench.cli import main\nsys.exit(main({[str(artifact), *QUICK]!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch is not installed, so there is no eager model" in done.stdout
    assert "eager PyTorch" not in done.stdout
    assert "tiny.onnx" in done.stdout


def test_works_with_numpy_and_onnxruntime_alone(artifact: Path, tmp_path: Path) -> None:
    """What docs/deploy/jetson.md calls needed: without the rest there is a plain table, no progress, and noise to run on."""
    absent = (
        "torch",
        "torchvision",
        "onnx",
        "onnx_ir",
        "rich",
        "sklearn",
        "PIL",
        "matplotlib",
        "safetensors",
        "pynvml",
    )
    script = WITHOUT_TORCH.replace('("torch", "torchvision")', repr(absent))
    script += (
        f"from vitrm.runtime.bench.cli import main\nsys.exit(main({[str(artifact), *QUICK, '--json', 'b.json']!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["artifact", "backend"]
    assert lines[2].startswith("tiny.onnx  onnxruntime-cpu  fp32")
    assert "noise" in done.stdout
    assert json.loads((tmp_path / "b.json").read_text())["rows"][0]["latency_ms"]["n"] >= 10


def test_a_report_without_its_libraries_is_refused_before_measuring(artifact: Path, tmp_path: Path) -> None:
    script = WITHOUT_TORCH.replace('("torch", "torchvision")', '("torch", "torchvision", "jinja2")')
    words = [str(artifact), *QUICK, "--seconds", "600", "--report", "b.html"]
    script += f"from vitrm.runtime.bench.cli import main\nsys.exit(main({words!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE
    )
    assert done.returncode == 2
    assert done.stderr == "error: --report needs Jinja2 and Pillow (jinja2 is refused): pip install jinja2 pillow\n"
    assert list(tmp_path.iterdir()) == []


def test_narrow_terminal_gets_two_tables(artifact: Path) -> None:
    from rich.console import Console

    from vitrm.runtime.bench.report.table import print_result
    from vitrm.runtime.bench.run import bench

    found = bench([artifact], batches=(1, 2), limit=5, seconds=0.05, threads=1, eager=False)
    for width, titles in ((100, 1), (180, 0)):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        print_result(found, console)
        text = console.export_text()
        assert text.count("Answers") == titles
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
        for head in ("p50 ms", "p99 ms", "images/s", "accuracy", "agreement", "size"):
            assert head in text


@pytest.mark.parametrize(("output", "code"), [("| head -c 0", 141), (">/dev/full", 2), (">&- 2>&-", 0)])
def test_figures_are_written_whoever_reads(artifact: Path, tmp_path: Path, output: str, code: int) -> None:
    """Also on a terminal that has no characters but ASCII."""
    figures, page = tmp_path / "bench.json", tmp_path / "report.html"
    words = [sys.executable, "-m", "vitrm.runtime.bench.cli", artifact, *QUICK, "--no-eager"]
    words += ["--json", figures, "--report", page]
    line = f"set -o pipefail; {shlex.join(map(str, words))} {output}"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(figures.read_text())["rows"]
    assert "</html>" in page.read_text()


def test_interrupt_is_clean(artifact: Path, tmp_path: Path) -> None:
    args = [artifact, "--seconds", "600", "--threads", "1", "--no-eager", "--json", tmp_path / "bench.json"]
    # On a terminal it says what it does: the signal comes while it measures.
    terminal, its_end = pty.openpty()
    process = interruptible(
        [sys.executable, "-m", "vitrm.runtime.bench.cli", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=its_end,
        text=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(its_end)
    said = b""
    while b"latency, batch 1" not in said:
        said += os.read(terminal, 4096)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the end of a terminal
        while more := os.read(terminal, 4096):
            said += more
    os.close(terminal)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert out == ""
    assert said.endswith(b"interrupted\r\n")
    assert b"Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def hostile(loop: Path, tmp_path: Path) -> Path:
    """A file whose name, run, classes and data set would like to write to the terminal and into the page."""
    name = "\x1b]0;owned\x07[red]\u202e\r\n[/none]"
    values = {
        "run": json.dumps(f"run{name}"),
        "classes": json.dumps([f"{i}{name}" for i in range(10)]),
        "data": json.dumps({"name": f"data{name}"}),
        "versions": json.dumps({f"torch{name}": name}),
    }
    return with_props(loop, tmp_path / "a\x1b]0;owned\x07[red]\u202e\n.onnx", **values)


def test_names_from_files_do_nothing_to_a_log_or_page(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    assert main([str(hostile), *QUICK, "--report", str(page), "--json", str(tmp_path / "b.json")]) == 0
    out, err = capsys.readouterr()
    assert "a\\x1b]0;owned\\x07[red]\\u202e\\n.onnx" in out
    assert "no eager model to compare" in out
    for text in (out, err, page.read_text()):
        assert not set(text) & set("\x1b\x07\r\u202e")
    assert main([str(hostile), *QUICK, "--run", "nano-cifar10"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "[red]" in err
    assert not set(err) & set("\x1b\x07\r\u202e")


def test_names_from_files_do_nothing_to_a_terminal(hostile: Path) -> None:
    """With a real terminal on both streams `rich` draws a bar with the file's name in it, and colors."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "vitrm.runtime.bench.cli", str(hostile), *QUICK, "--no-eager"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "LINES": "40"}
    process = subprocess.Popen(words, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # a closed terminal ends with an error
        while block := os.read(ours, 65536):
            seen += block
    os.close(ours)
    assert process.wait(60) == 0, seen
    text = seen.decode()
    assert "accuracy of a\\x1b]0;owned\\x07[red]\\u202e\\n.onnx" in text  # the bar
    assert "\x1b[" in text  # rich's own
    assert "\x1b]" not in text
    assert not set(text) & set("\x07\u202e")
