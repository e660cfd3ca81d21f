"""Writes docs/messages.md: every error message of the code, by what it is about, with cause and remedy.

python docs/scripts/messages.py           writes it anew (make messages)

Messages are read from the source: the text of each UserError, with … for what differs from case to case.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "messages.md"
ROOMS = ("vitrm", "export", "calib", "runtime")


@dataclass(frozen=True)
class Group:
    """Messages of one kind: the files that say them (by the beginning of their path), the cause and the remedy."""

    title: str
    files: tuple[str, ...]
    cause: str


GROUPS = (
    Group(
        "Words on the command line",
        ("vitrm/command_line.py", "vitrm/fields.py", "vitrm/recipe.py", "vitrm/training/run_config.py", "vitrm/training/cli.py",
         "vitrm/training/sweep.py", "export/arguments.py", "export/settings.py", "export/cli.py", "runtime/bench/cli.py",
         "runtime/bench/options.py", "vitrm/system/outputs.py", "calib/methods.py"),
        "A flag, key or value is unknown, out of range, or does not go with another one. The message names what it takes; `--help` lists all."
        " Nothing was computed or written.",
    ),
    Group(
        "A model that cannot be built",
        ("vitrm/config.py", "vitrm/baseline_configs.py", "vitrm/model_limits.py", "vitrm/tokens.py"),
        "The settings contradict each other, or make a model that no machine it is meant for could run. Every patch"
        " is a token, so a large `image_size` needs a large `patch_size`. Change the setting that the message names.",
    ),
    Group(
        "Data sets and folders of photos",
        ("vitrm/data/", "vitrm/preprocessing.py"),
        "The folder is not laid out as a folder for each class, a picture is damaged, CIFAR is not where it is looked for, or all images together"
        " do not fit into memory. See [your own photos](start/photos.md#the-folder) and [CIFAR](troubles.md#cifar-10-is-not-found).",
    ),
    Group(
        "Run folders, checkpoints, resuming",
        ("vitrm/checkpoint.py", "vitrm/training/run_folder/", "vitrm/training/preparation.py", "vitrm/system/tensor_file.py"),
        "The folder holds no run, another run, or files that were changed or cut short while they were copied. A file is never half loaded: copy it"
        " again, or go back to the copy that you have. [More](troubles.md#a-run-cannot-be-resumed).",
    ),
    Group(
        "Training",
        ("vitrm/training/",),
        "The loss became infinite, a batch needs more memory than there is, a teacher or other weights do not fit, or devices and processes do not. The last good state is kept.",
    ),
    Group(
        "Files, permissions, disks, locks",
        ("vitrm/errors.py", "vitrm/system/files.py", "vitrm/system/locks.py"),
        "The operating system said no, or a file is not of the kind that was expected, or another process has it. Nothing is half-written: the old"
        " file is there until the new one is whole.",
    ),
    Group(
        "int8 and calibration",
        ("calib/",),
        "int8 needs the ranges of activations, and they belong to these weights, this depth and this preprocessing. Leave the old file away and"
        " calibrate again: `--calibration` writes a new one where none is.",
    ),
    Group(
        "Exports that are refused",
        ("export/verify.py", "export/images.py", "export/pipeline.py", "export/precision/", "export/write.py"),
        "The file would have given other answers than the model, or numbers do not fit into its precision. No file was written."
        " [More](troubles.md#the-exported-graph-differs).",
    ),
    Group(
        "TensorRT: building a plan",
        ("export/tensorrt/",),
        "TensorRT builds for the GPU of its own machine; TensorRT for RTX builds anywhere, for RTX cards. See [TensorRT](deploy/tensorrt.md).",
    ),
    Group(
        "TensorRT: running a plan",
        ("runtime/backends/tensorrt/", "runtime/artifact/plan_sidecar.py"),
        "A plan runs on the kind of GPU and the version of TensorRT that built it. Build it again where it runs, with the command in the"
        " message. Copy `NAME.plan.json` along with `NAME.plan`.",
    ),
    Group(
        "Serving: Triton and Hugging Face",
        ("export/targets/",),
        "A server's folder has rules of its own. See [Serving](deploy/serving.md).",
    ),
    Group(
        "The page in the browser",
        ("export/web/",),
        "The page needs onnxruntime-web's files, and a folder of its own. See [the page](deploy/browser.md).",
    ),
    Group(
        "Opening a file",
        ("runtime/artifact/", "runtime/session.py", "runtime/backends/onnxruntime/", "runtime/backends/openvino.py", "runtime/stepping.py"),
        "The file is damaged, was changed, comes from another tool or version, its backend is not installed, or the images are not what it takes:"
        " float32 [batch, 3, H, W] in [0, 1]. [More](troubles.md#images-are-refused).",
    ),
    Group(
        "Devices and eager PyTorch",
        ("runtime/backends/eager.py", "runtime/system/"),
        "The GPU that was asked for is not there, or not for this torch. `vitrm-export --doctor` says what is here.",
    ),
    Group(
        "Measuring and halting",
        ("runtime/bench/", "runtime/halting/"),
        "There is nothing to compare with, a package for a row is missing, or too few images bear what is asked of them."
        " [More](troubles.md#too-few-images-to-choose-a-halting-threshold).",
    ),
    Group(
        "Classifying pictures",
        ("runtime/predict/",),
        "A picture cannot be found or read. The others are classified, and the exit code is 2.",
    ),
)  # fmt: skip


def text_of(node: ast.expr) -> str:
    """The text of a message, with … for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "…"


def messages() -> dict[str, list[str]]:
    """The messages that each source file of the four rooms raises as UserError, in their order."""
    found: dict[str, list[str]] = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT)
            if room == "vitrm" and name.parts[1] in ROOMS:  # a link to another room
                continue
            calls = [
                node
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError" and node.args
            ]
            texts = [text_of(node.args[0]) for node in sorted(calls, key=lambda node: node.lineno)]
            kept = [re.sub(r"…[…\s]*…", "…", " ".join(t.split())) for t in texts if re.search(r"[a-z]{3}", t)]
            if kept:
                found[str(name)] = list(dict.fromkeys(kept))
    return found


def group_of(file: str) -> Group:
    """The group that a source file's messages belong to: of those that name it, the one that does so most exactly."""
    fitting = [(len(start), group) for group in GROUPS for start in group.files if file.startswith(start)]
    if not fitting:
        sys.exit(f"{file} raises UserError and is in no group of docs/scripts/messages.py: add it to one")
    return max(fitting, key=lambda pair: pair[0])[1]


def markdown() -> str:
    """The page."""
    by_group: dict[str, list[str]] = {group.title: [] for group in GROUPS}
    for file, texts in messages().items():
        by_group[group_of(file).title] += texts
    parts = [
        "# All error messages\n",
        "Every error that the commands print, by what it is about. … stands for what differs: a file, a number. An error ends with exit"
        " code 2, and leaves nothing half-written. Search this page for a part of your message that is no name or number.\n",
        "[Troubles](troubles.md) has the usual ones, with more words. This page is written by `make messages` from the source.\n",
    ]
    for group in GROUPS:
        listed = "\n".join(f"- {_code(text)}" for text in dict.fromkeys(by_group[group.title]))
        parts.append(f"## {group.title}\n\n{group.cause}\n\n{listed}\n")
    return "\n".join(parts)


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(markdown())
