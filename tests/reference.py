"""The equations of ViTRM written down plainly, on the weights of the real model: what vitrm.model must equal.

No saving of any kind: every token goes through every layer, x is projected anew in each application of f.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrm.config import ViTRMConfig, preset
from vitrm.model import ViTRM


def shaken(name: str, **changes: object) -> ViTRM:
    """A preset's model in which, untrained, every weight matters, and depth, images and halting show.

    The halting head is scaled so that its probabilities spread over (0, 1).
    """
    torch.manual_seed(0)
    config = preset(name, **changes)
    assert isinstance(config, ViTRMConfig)
    model = ViTRM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        halts = torch.cat(
            [halt for _, halt in run(model, torch.rand(32, 3, config.image_size, config.image_size), 6)]
        ).logit(1e-6)
        scale = 1.5 / halts.std()
        model.halt.weight.mul_(scale)
        model.halt.bias.copy_(scale * (model.halt.bias - halts.mean()))
    return model


def f(model: ViTRM, h: Tensor, x: Tensor | None = None) -> Tensor:
    """The shared block: k pre-norm layers over all tokens h [B, tokens, D].

    With x [B, N, D], each layer reads these tokens before h and updates h alone.
    """
    for layer in model.block:
        known = h if x is None else torch.cat([x, h], 1)
        n = layer.norm1(known)
        mixed = attention(layer, n) if model.config.token_mixer == "attention" else token_mlp(model, layer, n)
        h = h + mixed[:, known.shape[1] - h.shape[1] :]
        n = layer.norm2(h)
        if model.config.ffn == "gelu":
            h = h + layer.ffn.down(F.gelu(layer.ffn.up(n)))
        else:
            h = h + layer.ffn.down(F.silu(layer.ffn.gate(n)) * layer.ffn.up(n))
    return h


def attention(layer: torch.nn.Module, n: Tensor) -> Tensor:
    """Attention of all tokens n [B, tokens, D] to all."""
    b, t, d = n.shape
    q, k, v = (p(n).view(b, t, layer.heads, d // layer.heads).transpose(1, 2) for p in (layer.q, layer.k, layer.v))
    a = torch.softmax(q @ k.transpose(2, 3) / (d // layer.heads) ** 0.5, dim=-1) @ v
    return layer.out(a.transpose(1, 2).reshape(b, t, d))


def token_mlp(model: ViTRM, layer: torch.nn.Module, n: Tensor) -> Tensor:
    """W₂ GELU(W₁ nᵀ + b₁) + b₂ over the tokens n = [x; y; z], or [y; z] for an x of zeros, [B, tokens, D].

    A layer that nobody's x depends on has no rows of W₂ for it: zeros stand in.
    """
    tokens = model.config.tokens
    with_x = n.shape[1] > 1 + model.config.latents
    if not with_x:
        n = torch.cat([n.new_zeros(len(n), tokens, n.shape[2]), n], 1)
    up = torch.cat([layer.up_x.weight, layer.up_y.T, layer.up_z.weight], 1)
    down_x = getattr(layer, "down_x", None)
    rows = (torch.zeros(tokens, len(up)), torch.zeros(tokens)) if down_x is None else (down_x.weight, down_x.bias)
    down = torch.cat([rows[0].to(n.dtype), layer.down_y.weight, layer.down_z.weight])
    bias = torch.cat([rows[1].to(n.dtype), layer.down_y.bias, layer.down_z.bias])
    mixed = (F.gelu(n.transpose(1, 2) @ up.T + layer.up_z.bias) @ down.T + bias).transpose(1, 2)
    return mixed if with_x else mixed[:, tokens:]


def views(images: Tensor, glimpses: str) -> list[Tensor]:
    """What steps look at in turn, of images [B, 3, 32, 32]: as they are, moved down and right by a pixel, up and left; after each its mirror image."""
    if glimpses == "none":
        return [images]
    wide = F.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = [images, wide[:, :, :-2, :-2], wide[:, :, 2:, 2:]]
    return moved if glimpses == "shift" else [view for each in moved for view in (each, each.flip(3))]


def run(model: ViTRM, images: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """(logits, halt_prob) after each of `steps` steps, by equations 1 to 4."""
    config = model.config
    seen = views(images, config.glimpses)
    y = model.y0.expand(len(images), 1, config.dim)
    z = model.z0.expand(len(images), config.latents, config.dim)
    outputs = []
    for t in range(steps):
        x = model.tokenizer((seen[t % len(seen)] - model.mean) / model.std) + model.pos  # (1), with glimpses (1')
        for _ in range(config.recursions):
            for _ in range(config.n):
                if config.mixing == "joint":
                    z = f(model, torch.cat([x, y, z], 1))[:, -config.latents :]  # (2)
                else:
                    z = f(model, torch.cat([y, z], 1), x)[:, -config.latents :]  # (2')
            y = f(model, torch.cat([y, z], 1))[:, :1]  # (3)
        outputs.append((model.classifier(y[:, 0]), torch.sigmoid(model.halt(y[:, 0]))[:, 0]))  # (4)
    return outputs
