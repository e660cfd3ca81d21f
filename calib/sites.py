"""Sites, where activations become int8: the inputs of a ViTRM's linear layers, by step and role; inputs and outputs of its tokenizer's convolutions; the inputs of a ViT's or CCT's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitrm.baselines.networks import Baseline, Transformer
from vitrm.model import Embedded, State, ViTRM

NET = "net"  # the one role of a ViT or CCT, at step 0: it has no recursion
TOKENIZER = "tokenizer."  # before the name of a convolution
OUTPUT = ".output"  # behind the name of a convolution: what it gives
ROLES = ("embed", "look", "project_answer", "project_latents", "latents", "answer")
IN_WORDS = {  # as pictures name them
    "embed": "image, once",
    "look": "look at the image",
    "project_answer": "reading the answer y",
    "project_latents": "reading the latents z",
    "latents": "revising the latents z",
    "answer": "revising the answer y",
    NET: "network",
}


class Site(NamedTuple):
    """A place where an activation is quantized.

    The same layer sees other values in each role (the embedding, a step's look at the image, layer 1's projections of y and z,
    the latent update, the answer update) and at each step.  The projection of z₀ belongs to step 1.
    """

    step: int  # 1, 2, …; 0 for what runs once per image
    role: str  # one of ROLES, or NET: the fragment it belongs to
    layer: (
        str  # the layer whose input it is, e.g. "block.1.ffn.up" or "tokenizer.groups.0.conv2"; with OUTPUT, its output
    )

    def __str__(self) -> str:
        return f"{self.step}/{self.role}/{self.layer}"

    @property
    def of_tokenizer(self) -> bool:
        """True for a convolution's input and output."""
        return self.layer.startswith(TOKENIZER)

    @property
    def is_output(self) -> bool:
        """True for a convolution's output."""
        return self.layer.endswith(OUTPUT)

    @property
    def of_input(self) -> Site:
        """The site of the same layer's input."""
        return self._replace(layer=self.layer.removesuffix(OUTPUT))

    @property
    def of_output(self) -> Site:
        """The site of the same convolution's output."""
        return self._replace(layer=self.of_input.layer + OUTPUT)


# Called with a site and its layer's input [B, tokens, width] or [B, channels, H, W].  A returned tensor replaces the layer's output.
# The site of an output comes with that output, as it is used: cut off where what follows gives 0.
Observer = Callable[[Site, Tensor], Tensor | None]


@dataclass(frozen=True)
class Start:
    """A step to go on from, so that earlier steps need not be computed again."""

    step: int  # steps already taken, at least 1
    embedded: Embedded
    state: State  # after them


@torch.no_grad()
def run_observed(
    model: ViTRM, images: Tensor, steps: int, observer: Observer | None = None, start: Start | None = None
) -> list[State]:
    """Runs up to `steps` steps on images [B, 3, H, W] in [0, 1] and calls `observer` at every site.

    Returns the state after each step.  With `start`, only the steps after it are run and observed.
    """
    step, role, states = 0, "embed", []

    def enter(entered: str) -> None:
        nonlocal role
        role = entered

    def see(layer: str, values: Tensor) -> Tensor | None:
        return observer(Site(step, role, layer), values) if observer else None

    with _until_done([*_hook_linears(model.block, "block", see), *_hook_convolutions(model, see)]):
        if start is None:
            embedded = model.embed(images)
            step, role = 1, "project_latents"
            state = model.initial_state(len(images))
        else:
            embedded, step, role = start.embedded, start.step, "project_latents"
            state = model.state(*start.state.carried)
        for number in range(1 + (start.step if start else 0), steps + 1):
            step = number
            state = model.step(embedded, state, enter)
            states.append(state)
    return states


@torch.no_grad()
def observe(model: ViTRM | Baseline, images: Tensor, steps: int, observer: Observer) -> None:
    """Runs any model that int8 is for on images [B, 3, H, W] in [0, 1] and calls `observer` at every site.

    The classifier of a ViT or CCT is no site: heads stay floating point.
    """
    if isinstance(model, ViTRM):
        run_observed(model, images, steps, observer)
        return
    assert isinstance(model.net, Transformer)

    def see(layer: str, values: Tensor) -> Tensor | None:
        return observer(Site(0, NET, layer), values)

    with _until_done(_hook_linears(model.net.layers, "net.layers", see)):
        model(images)


_See = Callable[[str, Tensor], Tensor | None]  # called with a layer's name and values


@contextmanager
def _until_done(handles: list[RemovableHandle]) -> Iterator[None]:
    """Removes hooks in the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_linears(module: nn.Module, prefix: str, see: _See) -> list[RemovableHandle]:
    """Has `see` called with the name and input of every linear layer of `module` that runs."""
    linears = ((name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear))
    return [_hook_input(linear, f"{prefix}.{name}", see) for name, linear in linears]


def _hook_convolutions(model: ViTRM, see: _See) -> list[RemovableHandle]:
    """Has `see` called with the name and input, then with the output, of every convolution of the tokenizer that int8 is for."""
    handles = []
    for name, layer, norm, floor in model.tokenizer.convolutions():
        handles.append(_hook_input(layer, TOKENIZER + name, see))
        handles.append(_hook_output(norm, TOKENIZER + name + OUTPUT, floor, see))
    return handles


def _hook_input(module: nn.Module, name: str, see: _See) -> RemovableHandle:
    return module.register_forward_hook(lambda _, inputs, __: see(name, inputs[0]))


def _hook_output(module: nn.Module, name: str, floor: float, see: _See) -> RemovableHandle:
    return module.register_forward_hook(lambda _, __, output: see(name, output.clamp(min=floor)))
