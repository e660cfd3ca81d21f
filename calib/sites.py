"""Where activations become int8: the inputs of a ViTRM's linear layers, by step and role; those of a ViT's or CCT's layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrm.baselines import Baseline, Transformer
from vitrm.model import Embedded, State, ViTRM

NET = "net"  # the one role of a ViT or CCT, at step 0: it has no recursion
ROLES = ("embed", "project_answer", "project_latents", "latents", "answer")


class Site(NamedTuple):
    """Where an activation is quantized.

    The same layer sees other values in each role (the embedding, layer 1's projections of y and z, the latent update, the
    answer update) and at each step.  The projection of z₀ belongs to step 1.
    """

    step: int  # 1, 2, …; 0 for what runs once per image
    role: str  # one of ROLES, or NET: the fragment it belongs to
    layer: str  # the linear layer whose input it is, e.g. "block.1.ffn.up"

    def __str__(self) -> str:
        return f"{self.step}/{self.role}/{self.layer}"


# Called with a site and its values [B, tokens, width]; what it returns takes their place, None leaves them.
Look = Callable[[Site, Tensor], Tensor | None]


@dataclass(frozen=True)
class Start:
    """Where a run may go on from, so that what came before need not be computed again."""

    step: int  # steps already taken, at least 1
    embedded: Embedded
    state: State  # after them


@torch.no_grad()
def run_watched(
    model: ViTRM, images: Tensor, steps: int, look: Look | None = None, start: Start | None = None
) -> list[State]:
    """Runs up to `steps` steps on images [B, 3, H, W] in [0, 1], `look`ing at every site; the state after each step.

    With `start`, the steps after it alone, whose sites are looked at.
    """
    at, states = (0, "embed"), []

    def hook(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor] | None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            replaced = look(Site(*at, layer), inputs[0]) if look else None
            return None if replaced is None else (replaced,)

        return see

    handles = [
        module.register_forward_pre_hook(hook(f"block.{name}"))
        for name, module in model.block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        if start is None:
            embedded = model.embed(images)
            at = 1, "project_latents"
            state = model.initial_state(len(images))
        else:
            embedded, at = start.embedded, (start.step, "project_latents")
            state = model.state(start.state.y, start.state.z)
        for step in range(1 + (start.step if start else 0), steps + 1):

            def enter(role: str, step: int = step) -> None:
                nonlocal at
                at = step, role

            state = model.step(embedded, state, enter)
            states.append(state)
    finally:
        for handle in handles:
            handle.remove()
    return states


@torch.no_grad()
def watch(model: ViTRM | Baseline, images: Tensor, steps: int, look: Look) -> None:
    """Runs any model that int8 is for on images [B, 3, H, W] in [0, 1], `look`ing at every site.

    A ViT's or CCT's classifier is none: heads stay floating point.
    """
    if isinstance(model, ViTRM):
        run_watched(model, images, steps, look)
        return
    assert isinstance(model.net, Transformer)

    def hook(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            look(Site(0, NET, layer), inputs[0])

        return see

    handles = [
        module.register_forward_pre_hook(hook(f"net.layers.{name}"))
        for name, module in model.net.layers.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
