"""torchvision's classification networks as teachers: `torchvision:NAME`, or `torchvision:NAME:FILE` for weights at hand.

What ImageNet's thousand classes say of other classes is nothing that a student could be told as it is.  What their networks see
is worth more (Kornblith et al., 2019): the features before the last layer, on which a linear classifier of the own classes is
fitted, by logistic regression on the training images.  Its answers are soft labels like any other teacher's.  How far it is
right on images that it was not fitted on is said before training, so that a teacher that knows nothing is seen.

Matching the features themselves (Romero et al., 2015) would teach more than the own classes; it takes a map that is learned beside
the student.  This takes none: a run's state, its processes and its resuming stay as they are.

Weights of FILE with as many outputs as there are classes are taken for a classifier of these, in their order, and asked themselves.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vitrm.checkpoint import check_fit, weights_sha256
from vitrm.data import Images
from vitrm.data.splits import limited, stratified
from vitrm.errors import UserError, first_line
from vitrm.fields import did_you_mean
from vitrm.system import tensor_file
from vitrm.system.files import check_regular
from vitrm.training.run_config import TORCHVISION as PREFIX

FEATURE_IMAGES = 20_000  # of the training images, that the classifier is fitted on at most
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the classifier: scikit-learn's C, on standardized features
_HELD_OUT = 0.2  # of the images, that choose among them
_BATCH = 32
_NEVER = -50.0  # the logit of a class without training images
_IMAGENET = 1000
_TIMEOUT = 20.0  # seconds without an answer, after which a download has failed
_NESTED = ("model", "state_dict", "model_state_dict")  # under which training scripts save weights


@dataclass(frozen=True, kw_only=True)
class TorchvisionWeights:
    """A network of torchvision with weights, and what its images are to be like."""

    name: str  # as torchvision has it: resnet50
    source: str  # as it was asked for
    head: str  # the last layer's name
    outputs: int
    weights: dict[str, Tensor]
    image_size: int  # that these weights were made for, or that the network is usually trained at
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def weights_id(self) -> str:
        """SHA-256 of the weights, as of a checkpoint."""
        return weights_sha256(self.weights)

    def build(self) -> nn.Module:
        """The network with these weights, which `load` found to be its own, in eval mode.  Raises `UserError` if they are not finite."""
        tensor_file.check_finite(self.weights, self.source)
        model = _network(self.name, self.outputs)
        model.load_state_dict(self.weights)
        return model.eval()


class TorchvisionTeacher:
    """A network of torchvision that answers about the student's classes, on `device`, without gradient."""

    def __init__(self, source: TorchvisionWeights, device: torch.device, image_size: int = 0) -> None:
        """`image_size`: to which images are resized before; 0: the one of `source`."""
        self.source, self.device, self.size = source, device, image_size or source.image_size
        self.model = source.build().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (source.mean, source.std))
        self.classifier: tuple[Tensor, Tensor] | None = (
            None  # W [classes, features] and b on the features; None: its own
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images float [B, 3, H, W] in [0, 1] → logits, float32 [B, classes]."""
        seen = self._see(images)
        if self.classifier is None:
            return seen
        weight, bias = self.classifier
        with torch.autocast(self.device.type, enabled=False):
            return F.linear(seen, weight, bias)

    def behead(self) -> None:
        """Takes the last layer off: what the network gives from here on are features."""
        self.model.set_submodule(self.source.head, nn.Identity())

    def fitted(self, images: Images, *, balanced: bool) -> tuple[str, Tensor, Tensor]:
        """Fits a classifier on the features of training images: a sentence that says how good it is, its W and its b."""
        some = limited(images, FEATURE_IMAGES) if len(images) > FEATURE_IMAGES else images
        features = self.features(some)
        weight, bias, right, held_out = fit_classifier(features, some.labels, len(images.classes), balanced=balanced)
        most = np.bincount(some.labels).max() / len(some)
        said = (
            f"teacher {self.source.source}: a linear classifier of its {features.shape[1]} features is right on "
            f"{100 * right:.1f} % of {held_out} training images that it was not fitted on (the largest class: {100 * most:.1f} %)"
        )
        return said, torch.from_numpy(weight), torch.from_numpy(bias)

    def features(self, images: Images) -> NDArray[np.float32]:
        """[n, features] before the last layer, which must have been taken off."""
        found = [
            self._see(torch.from_numpy(images.floats(slice(i, i + _BATCH))).to(self.device)).cpu().numpy()
            for i in range(0, len(images), _BATCH)
        ]
        return np.concatenate(found)

    @torch.no_grad()
    def _see(self, images: Tensor) -> Tensor:
        scale = self.size / min(images.shape[-2:])
        if scale != 1:
            height, width = (round(side * scale) for side in images.shape[-2:])
            images = F.interpolate(images.float(), (height, width), mode="bilinear", antialias=True)
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.model(images).flatten(1).float()


def absolute(source: str) -> str:
    """`torchvision:NAME:FILE` with the file's whole path, so that a run can be resumed from elsewhere."""
    name, colon, file = source[len(PREFIX) :].partition(":")
    return f"{PREFIX}{name}{colon}{os.path.abspath(os.path.expanduser(file)) if file else ''}"


def load(source: str) -> TorchvisionWeights:
    """The network and weights that `torchvision:NAME` or `torchvision:NAME:FILE` names; the former may download them.

    Raises `UserError` for an unknown network, and for weights that cannot be had or are not the network's.
    """
    from torchvision import models

    name, colon, file = source[len(PREFIX) :].partition(":")
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(
            f"torchvision has no classification network {name!r}{did_you_mean(name, known) or ': expected one like resnet50'}"
        )
    if colon and not file:
        raise UserError(f"{source} names no file: write {PREFIX}{name}, or {PREFIX}{name}:FILE.pth for weights at hand")
    official = models.get_model_weights(name).DEFAULT
    prepared = official.transforms()
    weights = _read(Path(file), source) if file else _fetched(official, name)
    with torch.device("meta"):
        head = _last_layer(_network(name, _IMAGENET))
    last = weights.get(f"{head}.weight")
    if last is None:
        raise UserError(
            f"{source}: there is no {head}.weight in it, so it is no {name}: name the network that it was saved from"
        )
    loaded = TorchvisionWeights(
        name=name,
        source=source,
        head=head,
        outputs=len(last),
        weights=weights,
        image_size=prepared.crop_size[0],
        mean=tuple(prepared.mean),
        std=tuple(prepared.std),
    )
    with torch.device("meta"):
        check_fit(_network(name, loaded.outputs), weights, source, f"a {name}")
    return loaded


def make_teacher(
    source: TorchvisionWeights,
    images: Images,
    device: torch.device,
    *,
    image_size: int,
    balanced: bool,
    broadcast: Callable[[Callable[[], Any]], Any],
    say: Callable[[str], None],
) -> TorchvisionTeacher:
    """A teacher of the classes of `images`, the training images.

    `broadcast` gives every process what the first one computes.  Raises `UserError` for images that the network cannot take.
    """
    teacher = TorchvisionTeacher(source, device, image_size)
    try:
        teacher(torch.from_numpy(images.floats(slice(0, 2))).to(device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{source.source} cannot take images of {teacher.size} pixels ({first_line(error)}): leave out "
            f"--teacher-image-size, which is {source.image_size} then, or name another network"
        ) from None
    # ImageNet's own classes are never meant: a data set with a thousand classes has others, or its own teacher's file.
    if source.outputs == len(images.classes) and source.source.count(":") > 1:
        names = ", ".join(images.classes[:3])
        say(
            f"teacher {source.source}: its {source.outputs} outputs are taken for the classes in their order ({names} …)"
        )
        return teacher
    say(f"teacher {source.source}: computing its features of {min(len(images), FEATURE_IMAGES):,} training images")
    teacher.behead()
    said, weight, bias = broadcast(lambda: teacher.fitted(images, balanced=balanced))
    teacher.classifier = weight.to(device), bias.to(device)
    say(said)
    return teacher


def fit_classifier(
    features: NDArray[np.float32], labels: NDArray[np.int64], classes: int, *, balanced: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32], float, int]:
    """Fits W [classes, features] and b so that softmax(W f + b) are the classes' chances, by logistic regression.

    Its strength is the one with the least log loss on a held-out fifth of each class; then all images are fitted.  Returns
    W, b, the accuracy on the fifth, and how many images that is.
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    x = (features - mean) / std
    rest, cut = stratified(labels, _HELD_OUT)
    best: tuple[float, float, float] | None = None
    for strength in STRENGTHS:
        weight, bias = _regression(x[rest], labels[rest], classes, strength, balanced)
        log_p = torch.from_numpy(x[cut] @ weight.T + bias).log_softmax(1).numpy()
        loss = -float(log_p[np.arange(len(cut)), labels[cut]].mean())
        if best is None or loss < best[0]:
            best = loss, strength, float((log_p.argmax(1) == labels[cut]).mean())
    assert best is not None
    weight, bias = _regression(x, labels, classes, best[1], balanced)
    weight = weight / std
    return weight.astype(np.float32), (bias - weight @ mean).astype(np.float32), best[2], len(cut)


def _regression(
    x: NDArray[np.float32], labels: NDArray[np.int64], classes: int, strength: float, balanced: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    weight, bias = np.zeros((classes, x.shape[1]), np.float32), np.full(classes, _NEVER, np.float32)
    there = np.unique(labels)
    if len(there) == 1:
        bias[there] = 0
        return weight, bias
    model = LogisticRegression(C=strength, max_iter=300, class_weight="balanced" if balanced else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # nearly the least loss will do
        model.fit(x, labels)
    w, b = model.coef_, model.intercept_
    if len(there) == 2:  # of two classes it keeps the difference of their logits
        w, b = np.concatenate([-w, w]) / 2, np.concatenate([-b, b]) / 2
    weight[there], bias[there] = w, b
    return weight, bias


def _network(name: str, outputs: int) -> nn.Module:
    from torchvision import models

    more: dict[str, Any] = {}
    if name in (
        "googlenet",
        "inception_v3",
    ):  # as their published weights are: with branches for training, and a normalization inside
        more = {"aux_logits": True, "init_weights": False, "transform_input": True}
    return models.get_model(name, weights=None, num_classes=outputs, **more)


def _last_layer(model: nn.Module) -> str:
    """The name of the layer that gives the logits."""
    named = [
        n
        for n, m in model.named_modules()
        if _IMAGENET in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))
    ]
    return named[-1]


def _fetched(official: Any, name: str) -> dict[str, Tensor]:
    """torchvision's own weights, from its cache or from the network."""
    try:
        with _timeout():
            return dict(official.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash a RuntimeError
        raise UserError(
            f"the weights of torchvision's {name} are not in {torch.hub.get_dir()} and cannot be fetched from {official.url} "
            f"({first_line(error)}): fetch that file elsewhere, and write {PREFIX}{name}:FILE.pth"
        ) from None


@contextmanager
def _timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read(file: Path, source: str) -> dict[str, Tensor]:
    """The state dict in a .pth or .safetensors file; loading it executes nothing."""
    check_regular(file, "weights")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensor_file.read_header(file)
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file the parsers raise anything
        raise UserError(
            f"{source}: {file} cannot be read as weights ({first_line(error)}): expected what torch.save(model.state_dict(), "
            "FILE) writes, or .safetensors"
        ) from None
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{source}: {file} holds no weights: expected what torch.save(model.state_dict(), FILE) writes")
    return {str(k).removeprefix("_orig_mod.").removeprefix("module."): v for k, v in content.items()}
