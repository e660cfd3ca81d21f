"""Learning from a teacher: the loss, the teacher's answer, and runs that need theirs to go on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_learners import make_batch, make_learner

from vitrm import checkpoint
from vitrm.checkpoint import Checkpoint
from vitrm.config import preset
from vitrm.errors import UserError
from vitrm.recipe import TEACHER_KEYS, recipe
from vitrm.system import strict_json
from vitrm.training.cli import main
from vitrm.training.loop import train
from vitrm.training.parallel.device import Execution
from vitrm.training.run_folder.state import STATE_FILE, read_header
from vitrm.training.teachers.distillation import Teacher, TeacherTargets, classification_loss

pytestmark = pytest.mark.slow

CPU = Execution(device="cpu", precision="fp32", save_every=0.0)


@pytest.fixture(scope="module")
def teacher(few, tmp_path_factory):
    """A residual network that knows the few digits a little, as a checkpoint on disk."""
    still = recipe("fast", "resnet", epochs=1, batch_size=16, lr=1e-3, crop_padding=0)
    return train(
        preset("resnet18", image_size=32), still, few, tmp_path_factory.mktemp("t") / "resnet", execution=CPU
    ).out


def test_the_loss_is_the_equation():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 5, dtype=torch.float64)
    target = torch.softmax(torch.randn(7, 5, dtype=torch.float64), 1)
    cross = -(target * student.log_softmax(1)).sum(1).mean()
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    got = classification_loss(student, target, TeacherTargets(teacher, 0.3, 3.0))
    torch.testing.assert_close(got, 0.7 * cross + 0.3 * 9 * divergence)
    torch.testing.assert_close(classification_loss(student, target, TeacherTargets(teacher, 0.0, 3.0)), cross)
    torch.testing.assert_close(classification_loss(student, target, None), cross)


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn():
    logits = torch.randn(4, 5, requires_grad=True)
    classification_loss(
        logits, F.one_hot(torch.arange(4), 5).float(), TeacherTargets(logits.detach(), 1.0, 2.0)
    ).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(4, 5))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_does_not_shrink_with_the_temperature(temperature):
    # T² is there for that: for small logits the gradient is (student − teacher) / classes at any T.
    student, teacher = 1e-3 * torch.randn(2, 3, 5, dtype=torch.float64)
    student.requires_grad_()
    classification_loss(student, torch.full((3, 5), 0.2).double(), TeacherTargets(teacher, 1.0, temperature)).backward()
    centered = (student - teacher).detach()
    centered = (centered - centered.mean(1, keepdim=True)) / 5 / 3
    torch.testing.assert_close(student.grad, centered, atol=2e-7, rtol=2e-3)


def test_a_recursive_teacher_answers_at_the_deepest_step_it_was_trained_for():
    kept = checkpoint.load("nano-cifar10")
    ask, images = Teacher(kept, torch.device("cpu")), torch.rand(3, 3, 32, 32)
    assert ask.steps == 6
    with torch.no_grad():
        expected = kept.build().trajectory(images, 6)[0][-1]
    answer = ask(images)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)
    assert not answer.requires_grad
    with torch.no_grad():
        first = kept.build().trajectory(images, 1)[0][0]
    torch.testing.assert_close(Teacher(kept, torch.device("cpu"), 1)(images), first, atol=1e-5, rtol=1e-5)


def test_training_leaves_the_teacher_as_it_was_and_brings_the_student_nearer(few, model, teacher, tmp_path):
    kept = checkpoint.load(teacher)
    images = torch.from_numpy(few.train.pixels).float() / 255
    answers = Teacher(kept, torch.device("cpu"))(images).log_softmax(1)

    def distance(made: Checkpoint) -> float:
        with torch.no_grad():
            said = made.build()(images, 2).logits.log_softmax(1)
        return float(F.kl_div(said, answers, reduction="batchmean", log_target=True))

    still = recipe("fast", epochs=8, batch_size=16, lr=3e-3, crop_padding=0, flip="off", ema_decay=0.0)
    results = {}
    for weight in (0.0, 1.0):
        run = tmp_path / f"{weight}"
        train(model, replace(still, distill_weight=weight), few, run, execution=CPU, teacher=kept)
        results[weight] = distance(checkpoint.load(run))
    assert results[1.0] < 0.7 * results[0.0]
    after = checkpoint.load(teacher).weights
    assert all(torch.equal(after[k], v) for k, v in kept.weights.items())


def test_a_run_goes_on_with_its_own_teacher_only(few, model, short, teacher, tmp_path):
    kept = checkpoint.load(teacher)
    whole = train(model, short, few, tmp_path / "whole", execution=CPU, teacher=kept)

    def die(epoch: int, batch: int, losses: list[float]) -> None:
        if (epoch, batch) == (1, 2):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(model, short, few, tmp_path / "cut", execution=CPU, teacher=kept, on_batch=die)
    with pytest.raises(UserError, match=r"teacher\.run is 'absent', the run has 'resnet'"):
        train(model, short, few, tmp_path / "cut", execution=CPU, resume=True)
    other = replace(kept, weights={k: v + 1 if v.is_floating_point() else v for k, v in kept.weights.items()})
    with pytest.raises(UserError, match=r"teacher\.weights_sha256 is"):
        train(model, short, few, tmp_path / "cut", execution=CPU, teacher=other, resume=True)
    train(model, short, few, tmp_path / "cut", execution=CPU, teacher=kept, resume=True)
    a, b = (checkpoint.load(folder) for folder in (whole.out, tmp_path / "cut"))
    assert a.weights_id == b.weights_id
    assert b.training["teacher"] == {"run": "resnet", "weights_sha256": kept.weights_id}


def test_a_teacher_of_other_classes_or_another_size_is_refused(few, model, short, teacher, tmp_path):
    with pytest.raises(UserError, match=r"nano-cifar10 knows 10 classes \(airplane.*name a teacher that was trained"):
        train(model, short, few, tmp_path / "a", teacher=checkpoint.load("nano-cifar10"))
    small = replace(few, **{k: replace(v, pixels=v.pixels[..., ::2, ::2]) for k, v in vars(few).items()})
    kept = checkpoint.load(teacher)
    with pytest.raises(UserError, match="takes images of 32 pixels, the student of 16"):
        train(model, short, small, tmp_path / "b", teacher=kept)
    assert not list(tmp_path.iterdir())


def test_the_command_line_keeps_the_teacher_for_resuming(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    out = str(tmp_path / "run")
    small = ["--model", "tiny", "--dim", "16", "--limit-train", "70", "--epochs", "1", "--batch-size", "16"]
    assert main([*small, "--teacher", "no-such-run", "--out", out]) == 2
    assert "no run folder no-such-run" in capsys.readouterr().err
    assert main([*small, "--teacher", "resnet", "--distill-weight", "0.9", "--out", out, "--device", "cpu"]) == 0
    assert read_header(tmp_path / "run" / STATE_FILE)["settings"]["teacher"] == str(teacher)
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", "--out", out, "--device", "cpu"]) == 0
    assert "has finished" in capsys.readouterr().out
    assert checkpoint.load(out).training["recipe"]["distill_weight"] == 0.9


def test_a_state_saved_before_a_setting_existed_is_resumed(few, model, short, tmp_path):
    made = train(model, short, few, tmp_path / "old", execution=CPU)
    path = made.out / STATE_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["vitrm_state"])
    for name in TEACHER_KEYS:
        del header["identity"]["recipe"][name]
    del header["sha256"]
    header["sha256"] = strict_json.digest(header)
    save_file(load_file(path), path, metadata={"vitrm_state": json.dumps(header)})
    assert train(model, short, few, made.out, execution=CPU, resume=True).test_accuracy == made.test_accuracy


def test_a_baseline_learns_from_a_recursive_teacher():
    learner = make_learner(preset("vit-small", dim=16, layers=1, heads=2, mlp=16), distill_weight=1.0)
    learner.teacher = Teacher(checkpoint.load("nano-cifar10"), torch.device("cpu"))
    first, *_, last = (float(learner.train_step(make_batch(), 1e-2).losses[0]) for _ in range(40))
    assert last < 0.5 * first
