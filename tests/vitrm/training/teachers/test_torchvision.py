"""torchvision's networks as teachers, from weights in a file: nothing is fetched here."""

from __future__ import annotations

import urllib.error
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from vitrm import checkpoint
from vitrm.data import Images
from vitrm.errors import UserError
from vitrm.training.cli import main
from vitrm.training.loop import train
from vitrm.training.parallel.device import Execution
from vitrm.training.run_folder.state import STATE_FILE, read_header
from vitrm.training.teachers import torchvision
from vitrm.training.teachers.torchvision import TorchvisionTeacher, fit_classifier, load, make_teacher

CPU = Execution(device="cpu", precision="fp32", save_every=0.0)
CHEAP = "squeezenet1_1"  # 4.9 MB; an untrained one's features tell digits apart well enough


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files with weights of networks whose last layer has 1000 outputs, and 10."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(models.squeezenet1_1().state_dict(), folder / "squeeze.pth")
    torch.save({"model": {f"module.{k}": v for k, v in _mobile(10).items()}}, folder / "mobile-10.pth")
    save_file(_mobile(3), folder / "mobile-3.safetensors")
    return folder


def _mobile(classes: int) -> dict[str, torch.Tensor]:
    return models.mobilenet_v3_small(num_classes=classes).state_dict()


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "densenet121", "googlenet", "inception_v3", "vit_b_16", CHEAP]
)
def test_every_kind_of_network_loses_its_last_layer_alone(name):
    with torch.device("meta"):
        whole = torchvision._network(name, 1000).eval()
        head = torchvision._last_layer(whole)
        images = torch.zeros(2, 3, 224, 224)
        before = whole(images)
        last = whole.get_submodule(head)
        whole.set_submodule(head, nn.Identity())
        features = whole(images)
    assert before.shape == (2, 1000)
    assert features.flatten(1).shape == (2, getattr(last, "in_features", None) or last.in_channels)


def test_features_are_the_networks_own_of_the_image_as_it_was_trained(weights):
    source = load(f"torchvision:{CHEAP}:{weights / 'squeeze.pth'}")
    assert (source.outputs, source.image_size) == (1000, 224)
    teacher, images = TorchvisionTeacher(source, torch.device("cpu")), torch.rand(2, 3, 48, 32)
    network = models.squeezenet1_1()
    network.load_state_dict(torch.load(weights / "squeeze.pth"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    large = F.interpolate(images, (336, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), network.eval()((large - mean) / std), atol=1e-4, rtol=1e-4)


def test_the_classifier_is_right_on_what_it_has_not_seen_and_no_surer_than_that():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 600)
    features = random.standard_normal((600, 40)).astype(np.float32) * 3 + 5
    features[np.arange(600), labels] += 4
    weight, bias, right, held_out = fit_classifier(features, labels, 4, balanced=False)
    fresh = random.integers(0, 3, 2000)
    x = random.standard_normal((2000, 40)).astype(np.float32) * 3 + 5
    x[np.arange(2000), fresh] += 4
    p = torch.from_numpy(x @ weight.T + bias).softmax(1).numpy()
    accuracy = (p.argmax(1) == fresh).mean()
    assert held_out == pytest.approx(120, abs=2)  # a fifth of each class
    assert accuracy == pytest.approx(right, abs=0.12)
    assert accuracy > 0.6  # 3 classes
    assert p.max(1).mean() == pytest.approx(accuracy, abs=0.08)  # soft labels that mean what they say
    assert p[:, 3].max() < 1e-6  # a class without images


def test_two_classes_and_a_rare_one_that_counts_as_much():
    random = np.random.default_rng(0)
    labels = np.array([0] * 190 + [1] * 10)
    features = random.standard_normal((200, 5)).astype(np.float32)
    features[:, 0] += 1.5 * labels
    said = {}
    for balanced in (False, True):
        weight, bias, _, _ = fit_classifier(features, labels, 2, balanced=balanced)
        said[balanced] = (features @ weight.T + bias).argmax(1)[labels == 1].mean()
    assert said[True] > said[False] + 0.2


@pytest.mark.slow
def test_a_run_learns_from_features_and_goes_on_with_the_same_teacher(few, model, short, weights, tmp_path, capsys):
    teacher = load(f"torchvision:{CHEAP}:{weights / 'squeeze.pth'}")
    small = replace(short, epochs=1, teacher_image_size=64, distill_weight=1.0)
    made = train(model, small, few, tmp_path / "a", execution=CPU, teacher=teacher)
    kept = checkpoint.load(made.out).training["teacher"]
    assert kept == {"run": f"torchvision:{CHEAP}", "weights_sha256": teacher.weights_id}
    with pytest.raises(UserError, match=r"teacher\.run is 'absent'"):
        train(model, small, few, tmp_path / "a", execution=CPU, resume=True)
    again = train(model, small, few, tmp_path / "b", execution=CPU, teacher=teacher)
    assert checkpoint.load(again.out).weights_id == checkpoint.load(made.out).weights_id


@pytest.mark.slow
def test_the_command_says_what_the_teacher_knows_and_keeps_where_it_lies(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(weights)
    small = [
        "--model",
        "tiny",
        "--dim",
        "16",
        "--limit-train",
        "70",
        "--epochs",
        "1",
        "--batch-size",
        "16",
        "--device",
        "cpu",
    ]
    flags = ["--teacher-image-size", "64", "--out", str(tmp_path / "run")]
    assert main([*small, "--teacher", f"torchvision:{CHEAP}:squeeze.pth", *flags]) == 0
    out = capsys.readouterr().out
    assert "a linear classifier of its 512 features is right on" in out
    assert (
        read_header(tmp_path / "run" / STATE_FILE)["settings"]["teacher"]
        == f"torchvision:{CHEAP}:{weights}/squeeze.pth"
    )


@pytest.mark.slow
def test_a_classifier_of_the_own_classes_is_asked_itself(few, model, short, weights, tmp_path):
    teacher = load(f"torchvision:mobilenet_v3_small:{weights / 'mobile-10.pth'}")
    said: list[str] = []
    asked = make_teacher(
        teacher,
        few.train,
        torch.device("cpu"),
        image_size=64,
        balanced=False,
        broadcast=lambda make: make(),
        say=said.append,
    )
    assert "its 10 outputs are taken for the classes in their order (0, 1, 2 …)" in said[0]
    images = torch.from_numpy(few.train.floats(slice(0, 2)))
    assert asked(images).shape == (2, 10)
    assert asked.classifier is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet19", "no classification network 'resnet19': did you mean resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classification network"),
        ("torchvision:resnet18:", "names no file"),
        ("torchvision:resnet18:none.pth", "none.pth"),
        ("torchvision:resnet18:text.pth", "text.pth cannot be read as weights"),
        ("torchvision:resnet18:list.pth", "list.pth holds no weights"),
        ("torchvision:resnet18:squeeze.pth", "there is no fc.weight in it, so it is no resnet18"),
        ("torchvision:mobilenet_v3_large:mobile-10.pth", "the weights do not fit a mobilenet_v3_large"),
    ],
)
def test_what_cannot_be_a_teacher_is_one_line(weights, tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(weights)
    (weights / "text.pth").write_text("no weights")
    torch.save([1, 2], weights / "list.pth")
    assert main(["--model", "tiny", "--limit-train", "70", "--teacher", name, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_without_a_network_the_way_out_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(*args, **more):
        raise urllib.error.URLError("[Errno -2] Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(
        UserError, match=r"cannot be fetched from https://.*resnet50.*write torchvision:resnet50:FILE\.pth"
    ):
        load("torchvision:resnet50")


def test_settings_of_the_other_kind_of_teacher_are_refused(few: Images, model, short, weights, tmp_path):
    source = load(f"torchvision:{CHEAP}:{weights / 'squeeze.pth'}")
    with pytest.raises(UserError, match="has no steps"):
        train(model, replace(short, teacher_steps=2), few, tmp_path / "a", teacher=source, execution=CPU)
    with pytest.raises(UserError, match="leave out --teacher-image-size, which is 224 then"):
        train(model, replace(short, teacher_image_size=4), few, tmp_path / "a", teacher=source, execution=CPU)
    run = checkpoint.load("nano-cifar10")
    with pytest.raises(UserError, match="a run has an image size of its own"):
        train(model, replace(short, teacher_image_size=64), few, tmp_path / "a", teacher=run, execution=CPU)
