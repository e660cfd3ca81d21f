"""ViTRM: one k-layer block f, applied again and again.

    x = tokens(image) + pos                          x ∈ R^{N×D}, once per image             (1)
    z ← f([x; y; z])[−K:]      n times               z ∈ R^{K×D}, the latent update           (2)
    y ← f([y; z])[:1]                                y ∈ R^{1×D}, the answer update           (3)
    logits = W_c y + b_c,  halt = σ(w_h·y + b_h)     the chance that the answer is right      (4)

(2) and (3) make a recursion, T recursions a step.  The model is three pure functions, and every
exported layout is assembled from them:

    embed(images) → embedded      step(embedded, state) → state      heads(y) → logits, halt

Two forms of (2), the setting `mixing`:

  * joint, the paper's equation: every layer updates x, y and z, and forgets x in the end.
  * cross (the paper's section 2.6): every layer reads x as it is, beside y and z, and updates y and z alone.  What a
    layer reads of x never changes, so all of it is computed once per image:

        z ← f([y; z] | x)[−K:],   a layer's rows y and z attend to (its projection of) x, y and z              (2')

Two ways for a layer to mix tokens, the setting `token_mixer`: attention, or (the same section) an MLP over the token
axis as in MLP-Mixer (Tolstikhin et al., 2021), see `TokenMLP`.

A third setting, `glimpses`, gives every step a look of its own: step t reads the tokens of another view of the image,

    x_t = tokens(view_t(image)) + pos,     view_1 the image as it is                                            (1')

so later steps see something new, and only samples that have not halted pay for it.  `embed` passes the images on then, and the
number of the next view goes from step to step beside y and z.

Two savings are exact, so this one implementation trains, evaluates and exports with them:

  * What layer 1 projects from x (LayerNorm, Q, K, V) never changes: `embed` computes it, once per
    image.  What it projects from y is shared by the n latent updates and the answer update, what it projects from z
    by the update that gives z and the next one.
  * In the last layer only the rows that f keeps (z in (2), y in (3)) need a query, an output
    projection and a feed-forward network: the others are dead.

While training in bfloat16 (autocast) the tokens themselves are bfloat16, not only the operands of matmuls, and one
matmul gives Q, K and V: both save memory traffic, which is most of a small model's time.

y and z at depth 0 are learned (y₀, z₀).  f is pre-norm: h + Mix(LN h), then h + FFN(LN h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrm.config import ViTRMConfig
from vitrm.layers import glimpses
from vitrm.layers.conv_group import ConvGroup, ShiftBatchNorm, dirac
from vitrm.layers.whitening import Whitening
from vitrm.model_limits import NEVER

Projected = tuple[Tensor, ...]  # what a layer projects from some tokens; its kind of layer says what the tensors are
Embedded = tuple[Tensor, ...]  # what the recursion reads of an image, see `ViTRM.embedded_names`
Rows = Literal["x", "y", "z", "yz", "xyz"]  # which tokens a tensor [B, tokens, D] holds, in this order


class State(NamedTuple):
    """The recursion's state."""

    y: Tensor  # [B, 1, D], the answer
    z: Tensor  # [B, K, D], the latents
    of_z: Projected  # layer 1's projection of z
    glimpse: Tensor | None = None  # float [B, 1]: number of the view that the next step looks at; None without glimpses

    @property
    def carried(self) -> tuple[Tensor, ...]:
        """The tensors that `ViTRM.state` makes the same state of."""
        return (self.y, self.z) if self.glimpse is None else (self.y, self.z, self.glimpse)


class Output(NamedTuple):
    """The result of a run of the recursion."""

    logits: Tensor  # [B, classes] float
    halt_prob: Tensor  # [B] float in [0, 1]: the model's own chance of being right
    steps_used: Tensor  # [B] int64


def _in_autocast_dtype(h: Tensor) -> Tensor:
    """h in the type that autocast computes in; as it is where autocast is off."""
    kind = h.device.type
    # torch refuses the question on a device without autocast, as `meta` is.
    return h.to(torch.get_autocast_dtype(kind)) if not h.is_meta and torch.is_autocast_enabled(kind) else h


def _affine(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h Wᵀ + b."""
    if torch.compiler.is_compiling():
        # Apart: the compiler fuses the addition with what follows, a library's product writes b out first.
        product = F.linear(h, weight)
        return product + bias.to(product.dtype)
    return F.linear(h, weight, bias)


def _through(layer: nn.Linear, h: Tensor) -> Tensor:
    """`layer` of h: as a module, which exporters and calibration watch, unless it is being compiled for training."""
    compiling = layer.training and torch.compiler.is_compiling()
    return _affine(h, layer.weight, layer.bias) if compiling else layer(h)


def _normalized(norm: nn.LayerNorm, h: Tensor) -> Tensor:
    """`norm` of h, in the type that autocast computes in.

    Autocast has LayerNorm take and give float32, which on a GPU is three kernels instead of one, forward and backward.
    The kernel itself sums in float32 anyway: where the weights are of h's type, it is called as it is.
    """
    if h.dtype != torch.float32 and norm.weight.dtype == h.dtype:
        with torch.autocast(h.device.type, enabled=False):
            return norm(h)
    # Cast once here, not once for each matmul.
    return _in_autocast_dtype(norm(h))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ) v, for queries scaled beforehand; [B, heads, tokens, D / heads]."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)
    # Spelled out elsewhere: on a CPU its bfloat16 backward is several times faster than the fused
    # kernel's, and the exported graph is the MatMul–Softmax–MatMul that TensorRT fuses.
    return (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class GELU(nn.Module):
    """W₂ GELU(W₁ h)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, h: Tensor) -> Tensor:
        return _through(self.down, F.gelu(_through(self.up, h)))


class SwiGLU(nn.Module):
    """W₂ (SiLU(W_g h) ⊙ W₁ h) (Shazeer, 2020)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, h: Tensor) -> Tensor:
        return _through(self.down, F.silu(_through(self.gate, h)) * _through(self.up, h))


class Affine(nn.Module):
    """A weight [out, in] and a bias [out]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())


class Layer(nn.Module):
    """One pre-norm transformer layer, cut in two where the savings need it: `project`, then `finish`.

    It projects tokens to queries, keys and values, each [B, heads, tokens, D / heads]; queries are scaled already.
    """

    projected = ("q", "k", "v")
    memory = ("k", "v")  # of tokens that are read and not updated

    def __init__(self, *, dim: int, heads: int, ffn: str, hidden: int, dropout: float, apart: bool = False) -> None:
        """`apart`: only some of the tokens get a query."""
        super().__init__()
        self.heads = heads
        self.together = (("q",), ("k", "v")) if apart else (("q", "k", "v"),)  # what is multiplied at once
        self.merged: dict[tuple[str, ...], Affine] = {}
        self.scale = (dim // heads) ** -0.5
        self.norm1 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = (GELU if ffn == "gelu" else SwiGLU)(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def _split(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, tokens, D] → [B, heads, tokens, D / heads]

    def project(self, h: Tensor, rows: Rows = "xyz", queries: slice = slice(None)) -> Projected:
        """LayerNorm and Q, K, V of h [B, tokens, D]; only the tokens in `queries` get a query."""
        h = _normalized(self.norm1, h)
        if self.training:
            if queries == slice(None):
                return self._at_once(h, "q", "k", "v")
            q = (
                self._at_once(h[:, queries].contiguous(), "q")[0]
                if self.merged
                else self._split(self._query(h[:, queries]))
            )
            return q, *self._at_once(h, "k", "v")
        return self._split(self._query(h[:, queries])), self._split(self.k(h)), self._split(self.v(h))

    def project_memory(self, h: Tensor, rows: Rows = "x") -> Projected:
        """LayerNorm, keys and values of tokens h [B, tokens, D] that are read only."""
        h = _normalized(self.norm1, h)
        if self.training:
            return self._at_once(h, "k", "v")
        return self._split(self.k(h)), self._split(self.v(h))

    def _query(self, h: Tensor) -> Tensor:
        # The query is scaled, not the scores: that is the pattern TensorRT fuses.
        return _through(self.q, h) * self.scale

    def merge(self) -> dict[tuple[str, ...], Affine]:
        """Has one layer for those that training applies at once: it learns with these from then on, and does nothing else.

        Returns them by the names of those they consist of.  Their weights are for the caller to set, the queries' scaled.
        """
        for names in self.together:
            first: nn.Linear = getattr(self, names[0])
            merged = Affine(first.weight.repeat(len(names), 1), first.bias.repeat(len(names)))
            self.merged[names] = merged.requires_grad_(first.weight.requires_grad)
            self.add_module(f"merged_{''.join(names)}", merged)
        del self.q, self.k, self.v
        return self.merged

    def _at_once(self, h: Tensor, *names: str) -> Projected:
        """Applies some linear layers to h in one matmul, and scales the queries."""
        weight, bias = self._as_merged(names) if self.merged else self._concatenated(names)
        parts = _affine(h, weight, bias).unflatten(-1, (len(names), self.heads, -1))
        return parts.permute(2, 0, 3, 1, 4).unbind()  # [B, tokens, 3, heads, D / heads] → 3 × [B, heads, tokens, …]

    def _concatenated(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        layers = [getattr(self, name) for name in names]
        scales = [self.scale if layer is self.q else 1.0 for layer in layers]
        weights = [layer.weight if s == 1 else layer.weight * s for layer, s in zip(layers, scales, strict=True)]
        biases = [layer.bias if s == 1 else layer.bias * s for layer, s in zip(layers, scales, strict=True)]
        return torch.cat(weights), torch.cat(biases)

    def _as_merged(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        together, layer = next(item for item in self.merged.items() if names[0] in item[0])
        if names == together:
            return layer.weight, layer.bias
        start = len(layer.bias) // len(together) * together.index(names[0])  # k and v of q, k and v
        return layer.weight[start:], layer.bias[start:]

    @staticmethod
    def join(*parts: Projected) -> Projected:
        """The projection of tokens one after another, given that of each part."""
        return tuple(torch.cat(tensors, 2) for tensors in zip(*parts, strict=True))

    @staticmethod
    def recall(memory: Projected, p: Projected) -> Projected:
        """`p` with what `project_memory` gave of the tokens that come before."""
        q, k, v = p
        return q, torch.cat([memory[0], k], 2), torch.cat([memory[1], v], 2)

    @staticmethod
    def narrow(p: Projected, queries: slice) -> Projected:
        """`p` with the queries of some tokens alone."""
        return p[0][:, :, queries], *p[1:]

    def finish(self, h: Tensor, p: Projected, rows: Rows = "xyz") -> Tensor:
        """Attention and feed-forward network for the rows h [B, tokens, D] whose queries are in p."""
        mixed = attend(*p).transpose(1, 2).flatten(2)  # [B, heads, tokens, D / heads] → [B, tokens, D]
        h = h + self.dropout(_through(self.out, mixed))
        return h + self.dropout(self.ffn(_normalized(self.norm2, h)))


class TokenMLP(nn.Module):
    """One pre-norm layer whose tokens are mixed by an MLP over the token axis; the same interface as `Layer`.

        Mix(h)ᵀ = W₂ GELU(W₁ hᵀ + b₁) + b₂,     W₁ ∈ R^{M×(N+1+K)}, W₂ ∈ R^{(N+1+K)×M}, for every feature alike

    W₁ has columns and W₂ rows of their own for x, y and z.  (3), which does not see x, uses those of y and z: f is the
    same there for an x of zeros.  It projects tokens to their part of the sum W₁ hᵀ + b₁, [B, D, M].
    """

    projected = ("u",)
    memory = ("u",)

    def __init__(
        self, *, tokens: int, latents: int, mixed: int, updates_x: bool, dim: int, ffn: str, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.up_x = nn.Linear(tokens, mixed, bias=False)
        self.up_y = nn.Parameter(torch.empty(1, mixed))
        self.up_z = nn.Linear(latents, mixed)
        if updates_x:
            self.down_x = nn.Linear(mixed, tokens)
        self.down_y = nn.Linear(mixed, 1)
        self.down_z = nn.Linear(mixed, latents)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = (GELU if ffn == "gelu" else SwiGLU)(dim, hidden)
        self.dropout = nn.Dropout(dropout)
        nn.init.trunc_normal_(self.up_y, std=(1 + tokens + latents) ** -0.5)

    def project(self, h: Tensor, rows: Rows, queries: slice = slice(None)) -> Projected:
        """LayerNorm of h [B, tokens, D], and the part of `rows` in W₁ hᵀ + b₁, [B, D, M]."""
        h = _normalized(self.norm1, h).transpose(1, 2)  # [B, D, tokens]
        parts: list[Tensor] = []
        end = h.shape[-1]
        if "z" in rows:
            parts.append(_through(self.up_z, h[..., end - self.up_z.in_features :]))
            end -= self.up_z.in_features
        if "y" in rows:
            parts.append(h[..., end - 1 : end] * self.up_y.to(h.dtype))
            end -= 1
        if "x" in rows:
            parts.append(_through(self.up_x, h[..., :end]))
        return (sum(parts[1:], parts[0]),)

    project_memory = project

    @staticmethod
    def join(*parts: Projected) -> Projected:
        """The projection of tokens one after another, given that of each part."""
        return (sum((u for (u,) in parts[1:]), parts[0][0]),)

    @staticmethod
    def recall(memory: Projected, p: Projected) -> Projected:
        """`p` with what `project_memory` gave of the tokens that come before."""
        return (memory[0] + p[0],)

    @staticmethod
    def narrow(p: Projected, queries: slice) -> Projected:
        """`p` as it is: all rows read one projection."""
        return p

    def finish(self, h: Tensor, p: Projected, rows: Rows) -> Tensor:
        """The MLP over tokens, and the feed-forward network, for the `rows` h [B, tokens, D]."""
        mixed = F.gelu(p[0])
        down = [_through(getattr(self, f"down_{row}"), mixed) for row in rows]
        h = h + self.dropout((torch.cat(down, -1) if len(down) > 1 else down[0]).transpose(1, 2))
        return h + self.dropout(self.ffn(_normalized(self.norm2, h)))


GELU_FLOOR = -4.0  # GELU(−4) = −0.0001


class Convolution(NamedTuple):
    """A tokenizer's convolution that int8 is for, with the norm that a graph folds into it."""

    name: str  # in the tokenizer
    layer: nn.Conv2d
    norm: nn.Module  # its output is that of both
    floor: float  # what is lower counts as this: the activation that follows gives 0, or almost


class Tokenizer(nn.Module):
    """Makes tokens [B, N, D] of normalized images [B, 3, H, W]."""

    def convolutions(self) -> Iterator[Convolution]:
        """The convolutions that int8 is for."""
        return iter(())


class PatchTokenizer(Tokenizer):
    """The paper's: one linear projection of each P × P patch."""

    def __init__(self, config: ViTRMConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, D, H/P, W/P] → [B, N, D]


class ConvTokenizer(Tokenizer):
    """Convolutions to the same grid of tokens (Hassani et al., 2021: compact transformers learn faster with them).

    Each 3 × 3 convolution is followed by batch norm (optional) and ReLU, and the first ones by a max-pooling that
    halves the image, until one token is left per P × P patch.
    """

    def __init__(self, config: ViTRMConfig) -> None:
        super().__init__()
        self.halvings = config.patch_size.bit_length() - 1
        widths = config.conv_widths
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=not config.conv_norm) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) if config.conv_norm else nn.Identity() for w in widths[1:])

    def forward(self, images: Tensor) -> Tensor:
        # Three times as fast on a CPU, forward and backward, for convolutions and pooling alike.
        images = images.contiguous(memory_format=torch.channels_last)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            images = norm(conv(images))
            if not self.training:
                images = F.relu(images)  # here it becomes one with the convolution in an exported graph
            if i < self.halvings:
                images = F.max_pool2d(images, 3, stride=2, padding=1)
            if self.training:
                images = F.relu(images)  # the same, and its gradient too, of a quarter of the values
        return images.flatten(2).transpose(1, 2)

    def convolutions(self) -> Iterator[Convolution]:
        """All but the first, which reads the image."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if i:
                assert isinstance(conv, nn.Conv2d)
                yield Convolution(f"convs.{i}", conv, norm, floor=0.0)


class WhitenedTokenizer(Tokenizer):
    """Convolutions that begin with whitened 2 × 2 patches (after airbench: Jordan, 2024).

        whiten (fixed), GELU
        for each width w of `stage_widths`:  conv 3 × 3 to w, max-pool 2 × 2, norm, GELU;  conv 3 × 3, norm, GELU
        conv 3 × 3 to D, norm, GELU

    The first convolution's filters come from the training images and stay.  The others begin as identities (dirac), norms
    have no scale: training then takes few epochs to see.
    """

    def __init__(self, config: ViTRMConfig) -> None:
        super().__init__()
        self.whitening = Whitening(2, config.directions, padded=True)
        widths = [2 * config.directions, *config.stage_widths]
        self.groups = nn.ModuleList(ConvGroup(a, b) for a, b in pairwise(widths))
        self.conv = dirac(nn.Conv2d(widths[-1], config.dim, 3, padding=1, bias=False))
        self.norm = ShiftBatchNorm(config.dim)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)  # several times as fast on a CPU
        h = F.gelu(self.whitening(images))
        for group in self.groups:
            h = group(h)
        h = F.gelu(self.norm(self.conv(h)))
        return h.flatten(2).transpose(1, 2)

    def convolutions(self) -> Iterator[Convolution]:
        """All but the whitening and the first after it: whitened values spread so widely that rounding those costs a hundred classes
        a point of agreement, and saves a fifteenth of the time.
        """
        for i, group in enumerate(self.groups):
            assert isinstance(group, ConvGroup)
            if i:
                yield Convolution(f"groups.{i}.conv1", group.conv1, group.norm1, floor=GELU_FLOOR)
            yield Convolution(f"groups.{i}.conv2", group.conv2, group.norm2, floor=GELU_FLOOR)
        yield Convolution("conv", self.conv, self.norm, floor=GELU_FLOOR)


TOKENIZERS: dict[str, type[PatchTokenizer | ConvTokenizer | WhitenedTokenizer]] = {
    "patch": PatchTokenizer,
    "conv": ConvTokenizer,
    "whitened": WhitenedTokenizer,
}


def initialize(model: nn.Module, embeddings: list[nn.Parameter], std: float) -> None:
    """Linear weights from Xavier's uniform distribution, biases 0, embeddings from a truncated normal of σ `std`.

    The usual σ of 0.02 for linear weights is made for D = 768: at D = 192 it leaves attention nearly uniform, and
    training on a small data set does not get off the ground.
    """
    for parameter in embeddings:
        nn.init.trunc_normal_(parameter, std=std)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ViTRM(nn.Module):
    """The model of this module's docstring.  Images are float [B, 3, H, W] in [0, 1]; normalization is inside."""

    recursive = True
    mean: Tensor
    std: Tensor

    def __init__(self, config: ViTRMConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)
        self.tokenizer = TOKENIZERS[config.tokenizer](config)
        self.glimpses: glimpses.Glimpses | None = None
        if config.glimpses != "none":
            self.glimpses = glimpses.Glimpses(config.glimpses, config.image_size)
        self.pos = nn.Parameter(torch.empty(1, config.tokens, config.dim))
        self.y0 = nn.Parameter(torch.empty(1, 1, config.dim))
        self.z0 = nn.Parameter(torch.empty(1, config.latents, config.dim))
        self.block = nn.ModuleList(_layer(config, last=i == config.layers - 1) for i in range(config.layers))
        self.classifier = nn.Linear(config.dim, config.classes)
        self.halt = nn.Linear(config.dim, 1)
        self.dropout = nn.Dropout(config.dropout)
        # The latents must differ from each other from the start, or they all learn the same.
        initialize(self, [self.pos, self.y0, self.z0], std=0.2)
        for head in (self.classifier, self.halt):
            nn.init.trunc_normal_(head.weight, std=0.02)

    @property
    def projected_names(self) -> tuple[str, ...]:
        """Names of the tensors that layer 1 projects from tokens."""
        return self._layers[0].projected

    @property
    def embedded_names(self) -> tuple[str, ...]:
        """Names of the tensors that `embed` gives."""
        return self.read_names if self.glimpses is None else ("images",)

    @property
    def read_names(self) -> tuple[str, ...]:
        """Names of the tensors that `read` gives."""
        if self.config.mixing == "joint":
            return "x", *(f"x_{name}" for name in self.projected_names)
        return tuple(f"x{i}_{name}" for i, layer in enumerate(self._layers, 1) for name in layer.memory)

    # The three functions ----------------------------------------------------------------------

    def embed(self, images: Tensor) -> Embedded:
        """Eq. 1, and what of it never changes: images [B, 3, H, W] in [0, 1] → what the steps read of them.

        With glimpses nothing of it stays the same: the images themselves.
        """
        return self.read(self.tokens(images)) if self.glimpses is None else (images,)

    def step(self, embedded: Embedded, state: State, entering: Callable[[str], None] | None = None) -> State:
        """T recursions: each n latent updates, then one answer update; with glimpses, a look at the image first.

        `entering` is told the role of what is computed next: look, project_answer, latents, project_latents or answer.
        """
        if state.glimpse is None:
            return self.recur(embedded, state, entering)
        if entering:
            entering("look")
        read, after = self.look(embedded, state.glimpse)
        return self.recur(read, state._replace(glimpse=after), entering)

    def recur(self, read: Embedded, state: State, entering: Callable[[str], None] | None = None) -> State:
        """The recursions of a step, which read the tensors that `read` gave."""
        tell = entering or _tell_nobody
        y, z, of_z, glimpse = state
        for _ in range(self.config.recursions):
            tell("project_answer")
            of_y = self.project_answer(y)
            for _ in range(self.config.n):
                tell("latents")
                z = self.update_latents(read, y, of_y, z, of_z)
                tell("project_latents")
                of_z = self.project_latents(z)
            tell("answer")
            y = self.update_answer(y, of_y, z, of_z)
        return State(y, z, of_z, glimpse)

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 4: y [B, 1, D] → logits [B, classes], halt_prob [B]."""
        logits, halt_logit = self.head_logits(y)
        return logits, halt_logit.sigmoid()

    # What they are made of ----------------------------------------------------------------------

    def tokens(self, images: Tensor) -> Tensor:
        """Eq. 1: images [B, 3, H, W] in [0, 1] → x [B, N, D]."""
        return _in_autocast_dtype(self.dropout(self.tokenizer((images - self.mean) / self.std) + self.pos))

    def read(self, x: Tensor) -> Embedded:
        """Prepares the tokens x [B, N, D] for the steps, once per image.

        Joint mixing: x and layer 1's projection of it.  Cross mixing: every layer's projection of x.
        """
        if self.config.mixing == "joint":
            return x, *self._layers[0].project(x, "x")
        return tuple(tensor for layer in self._layers for tensor in layer.project_memory(x, "x"))

    def look(self, embedded: Embedded, glimpse: Tensor) -> tuple[Embedded, Tensor]:
        """Eq. 1': what a step reads of the views numbered `glimpse`, float [B, 1], and the numbers after them."""
        assert self.glimpses is not None
        return self.read(self.tokens(self.glimpses(embedded[0], glimpse))), self.glimpses.after(glimpse)

    def project_answer(self, y: Tensor) -> Projected:
        """Layer 1's projection of y [B, 1, D]."""
        return self._layers[0].project(y, "y")

    def project_latents(self, z: Tensor) -> Projected:
        """Layer 1's projection of z [B, K, D]."""
        return self._layers[0].project(z, "z")

    def update_latents(self, read: Embedded, y: Tensor, of_y: Projected, z: Tensor, of_z: Projected) -> Tensor:
        """Eq. 2 or 2', given layer 1's projections of y and z; z [B, K, D]."""
        join, latents = self._layers[0].join, slice(-self.config.latents, None)
        if self.config.mixing == "joint":
            x, *of_x = read
            return self._f(torch.cat([x, y, z], 1), join(tuple(of_x), of_y, of_z), "xyz", "z", latents)
        each = len(read) // len(self.block)
        memories = [read[i : i + each] for i in range(0, len(read), each)]
        return self._f(torch.cat([y, z], 1), join(of_y, of_z), "yz", "z", latents, memories)

    def update_answer(self, y: Tensor, of_y: Projected, z: Tensor, of_z: Projected) -> Tensor:
        """Eq. 3: y ← f([y; z])[:1], given layer 1's projections of y and z; y [B, 1, D]."""
        join = self._layers[0].join
        return self._f(torch.cat([y, z], 1), join(of_y, of_z), "yz", "y", slice(0, 1))

    def head_logits(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 4 before the sigmoid, for losses: logits [B, classes] and the halting logit [B]."""
        y = y[:, 0]
        return self.classifier(y), self.halt(y)[:, 0]

    def state(self, y: Tensor, z: Tensor, glimpse: Tensor | None = None) -> State:
        """The state with y [B, 1, D] and z [B, K, D]; with glimpses, and numbers [B, 1] of the next view (None: the first)."""
        y, z = map(_in_autocast_dtype, (y, z))
        if self.glimpses is not None and glimpse is None:
            glimpse = torch.zeros_like(y[:, :, 0])
        return State(y, z, self.project_latents(z), glimpse)

    def initial_state(self, batch: int) -> State:
        """The state before the first step, of `batch` images: y₀ and z₀."""
        return self.state(self.y0.expand(batch, -1, -1), self.z0.expand(batch, -1, -1))

    def forward(self, images: Tensor, steps: int, halt_threshold: float = NEVER) -> Output:
        """Runs at most `steps` steps; a sample halts after the first step with halt_prob > `halt_threshold`.

        A halted sample keeps the logits and halt_prob it had, whatever its batch mates do; a threshold of 1
        or more never halts.  images [B, 3, H, W] in [0, 1]; raises ValueError for steps < 1.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1")
        embedded = self.embed(images)
        state = self.initial_state(len(images))
        active = torch.ones(len(images), dtype=torch.bool, device=images.device)
        steps_used = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        output: tuple[Tensor, Tensor] | None = None
        for _ in range(steps):
            state = self.step(embedded, state)
            fresh = self.heads(state.y)
            if output is None:
                logits, halt_prob = fresh
            else:
                logits = torch.where(active[:, None], fresh[0], output[0])
                halt_prob = torch.where(active, fresh[1], output[1])
            output = logits, halt_prob
            steps_used = steps_used + active
            if halt_threshold < 1:
                active = active & ~(halt_prob > halt_threshold)
                if not active.any():
                    break
        return Output(logits, halt_prob, steps_used)

    def trajectory(self, images: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The heads after every step: logits [steps, B, classes], halt_prob [steps, B]."""
        embedded = self.embed(images)
        state = self.initial_state(len(images))
        outputs = []
        for _ in range(steps):
            state = self.step(embedded, state)
            outputs.append(self.heads(state.y))
        logits, halt_prob = zip(*outputs, strict=True)
        return torch.stack(logits), torch.stack(halt_prob)

    @property
    def _layers(self) -> list[Layer | TokenMLP]:
        return list(self.block)  # type: ignore[arg-type]

    def _f(
        self,
        h: Tensor,
        first: Projected,
        rows: Rows,
        kept: Rows,
        keep: slice,
        memories: Sequence[Projected] | None = None,
    ) -> Tensor:
        """f(h)[keep] for the `rows` h [B, tokens, D], of which `keep` are those `kept`, given layer 1's projection of h.

        `memories`: what each layer reads of tokens that come before and are not updated.
        """
        last = len(self.block) - 1
        for i, layer in enumerate(self._layers):
            if i == 0:
                p = layer.narrow(first, keep) if i == last else first
            else:
                p = layer.project(h, rows, keep if i == last else slice(None))
            if memories is not None:
                p = layer.recall(memories[i], p)
            h = layer.finish(h[:, keep], p, kept) if i == last else layer.finish(h, p, rows)
        return h


def _tell_nobody(role: str) -> None:
    pass


def _layer(config: ViTRMConfig, last: bool) -> Layer | TokenMLP:
    shared: dict[str, Any] = {"dim": config.dim, "ffn": config.ffn, "hidden": config.hidden, "dropout": config.dropout}
    if config.token_mixer == "attention":
        return Layer(heads=config.heads, apart=last and config.layers > 1, **shared)
    return TokenMLP(
        tokens=config.tokens,
        latents=config.latents,
        mixed=config.mixed,
        updates_x=config.mixing == "joint" and not last,
        **shared,
    )
