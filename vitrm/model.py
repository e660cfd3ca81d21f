"""ViTRM: one k-layer block f, applied again and again.

    x = tokens(image) + pos                          x ∈ R^{N×D}, once per image             (1)
    z ← f([x; y; z])[−K:]      n times               z ∈ R^{K×D}, the latent update           (2)
    y ← f([y; z])[:1]                                y ∈ R^{1×D}, the answer update           (3)
    logits = W_c y + b_c,  halt = σ(w_h·y + b_h)     the chance that the answer is right      (4)

(2) and (3) make a recursion, T recursions a step.  The model is three pure functions, and every
exported shape is assembled from them:

    embed(images) → x        step(x, y, z) → y, z        heads(y) → logits, halt

Two savings are exact, so this one implementation trains, evaluates and exports with them:

  * What layer 1 projects from x (LayerNorm, Q, K, V) never changes: `embed` computes it, once per
    image.  What it projects from y is shared by the n latent updates and the answer update.
  * In the last layer only the rows that f keeps (z in (2), y in (3)) need a query, an output
    projection and a feed-forward network: the others are dead.

While training in bfloat16 (autocast) the tokens themselves are bfloat16, not only the products' operands, and one
product gives Q, K and V: both save memory traffic, which is most of a small model's time.

y and z at depth 0 are learned (y₀, z₀).  f is pre-norm: h + Attention(LN h), then h + FFN(LN h).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrm.config import ViTRMConfig


class Projected(NamedTuple):
    """Queries, keys and values of some tokens in one layer, each [B, heads, tokens, D / heads]; q is already scaled."""

    q: Tensor
    k: Tensor
    v: Tensor


class Embedded(NamedTuple):
    """What the recursion needs of an image: its tokens x [B, N, D], and layer 1's projection of them."""

    x: Tensor
    first: Projected


class State(NamedTuple):
    """The recursion's state: the answer y [B, 1, D] and the latents z [B, K, D]."""

    y: Tensor
    z: Tensor


class Output(NamedTuple):
    """What a run of the recursion gives."""

    logits: Tensor  # [B, classes] float
    halt_prob: Tensor  # [B] float in [0, 1]: the model's own chance of being right
    steps_used: Tensor  # [B] int64


def _in_autocast_dtype(h: Tensor) -> Tensor:
    """h in the type that autocast computes in; as it is where autocast is off."""
    kind = h.device.type
    return h.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else h


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


class Layer(nn.Module):
    """One pre-norm transformer layer, cut in two where the savings need it: `project`, then `finish`."""

    def __init__(self, *, dim: int, heads: int, ffn: str, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
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

    def project(self, h: Tensor, queries: slice = slice(None)) -> Projected:
        """LayerNorm and Q, K, V of h [B, tokens, D]; only the tokens in `queries` get a query."""
        # LayerNorm may give float32: cast once here, not once for each product.
        h = _in_autocast_dtype(self.norm1(h))
        if self.training:
            return self._project_at_once(h, queries)
        # The query is scaled, not the scores: that is the pattern TensorRT fuses.
        return Projected(
            self._split(self.q(h[:, queries]) * self.scale), self._split(self.k(h)), self._split(self.v(h))
        )

    def _project_at_once(self, h: Tensor, queries: slice) -> Projected:
        """What `project` gives, in as few products as there are kinds of rows."""
        every = queries == slice(None)
        weights: list[Tensor] = [self.k.weight, self.v.weight]
        biases: list[Tensor] = [self.k.bias, self.v.bias]
        if every:
            weights.insert(0, self.q.weight * self.scale)
            biases.insert(0, self.q.bias * self.scale)
        parts = _affine(h, torch.cat(weights), torch.cat(biases)).unflatten(-1, (len(weights), self.heads, -1))
        found = parts.permute(2, 0, 3, 1, 4).unbind()  # [B, tokens, 3, heads, D / heads] → 3 × [B, heads, tokens, …]
        if every:
            return Projected(*found)
        return Projected(self._split(_affine(h[:, queries], self.q.weight, self.q.bias) * self.scale), *found)

    def finish(self, h: Tensor, p: Projected) -> Tensor:
        """Attention and feed-forward network for the rows h [B, tokens, D] whose queries are p.q."""
        mixed = attend(*p).transpose(1, 2).flatten(2)  # [B, heads, tokens, D / heads] → [B, tokens, D]
        h = h + self.dropout(_through(self.out, mixed))
        return h + self.dropout(self.ffn(self.norm2(h)))


class PatchTokenizer(nn.Module):
    """The paper's: one linear projection of each P × P patch."""

    def __init__(self, config: ViTRMConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, D, H/P, W/P] → [B, N, D]


class ConvTokenizer(nn.Module):
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


def initialise(model: nn.Module, embeddings: list[nn.Parameter], std: float) -> None:
    """Linear weights from Xavier's uniform distribution, biases 0, embeddings from a truncated normal of σ `std`.

    The usual σ of 0.02 for linear weights is made for D = 768: at D = 192 it leaves attention nearly uniform, and
    training on a small data set does not get off the ground.
    """
    for parameter in embeddings:
        nn.init.trunc_normal_(parameter, std=std)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


class ViTRM(nn.Module):
    """The model of this module's docstring.  Images are float [B, 3, H, W] in [0, 1]; normalisation is inside."""

    recursive = True
    mean: Tensor
    std: Tensor

    def __init__(self, config: ViTRMConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)
        self.tokenizer = (PatchTokenizer if config.tokenizer == "patch" else ConvTokenizer)(config)
        self.pos = nn.Parameter(torch.empty(1, config.tokens, config.dim))
        self.y0 = nn.Parameter(torch.empty(1, 1, config.dim))
        self.z0 = nn.Parameter(torch.empty(1, config.latents, config.dim))
        self.block = nn.ModuleList(
            Layer(dim=config.dim, heads=config.heads, ffn=config.ffn, hidden=config.hidden, dropout=config.dropout)
            for _ in range(config.layers)
        )
        self.classifier = nn.Linear(config.dim, config.classes)
        self.halt = nn.Linear(config.dim, 1)
        self.dropout = nn.Dropout(config.dropout)
        # The latents must differ from each other from the start, or they all learn the same.
        initialise(self, [self.pos, self.y0, self.z0], std=0.2)
        for head in (self.classifier, self.halt):
            nn.init.trunc_normal_(head.weight, std=0.02)

    # The three functions ----------------------------------------------------------------------

    def embed(self, images: Tensor) -> Embedded:
        """Eq. 1, and layer 1's projection of it: images [B, 3, H, W] in [0, 1] → x [B, N, D] with its Q, K, V."""
        x = self.tokens(images)
        return Embedded(x, self.project(x))

    def step(self, embedded: Embedded, state: State) -> State:
        """T recursions: each n latent updates, then one answer update."""
        y, z = map(_in_autocast_dtype, state)
        of_z = self.project(z)
        for _ in range(self.config.recursions):
            of_y = self.project(y)
            for _ in range(self.config.n):
                z = self.update_latents(embedded, y, of_y, z, of_z)
                of_z = self.project(z)
            y = self.update_answer(y, of_y, z, of_z)
        return State(y, z)

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 4: y [B, 1, D] → logits [B, classes], halt_prob [B]."""
        logits, halt_logit = self.head_logits(y)
        return logits, halt_logit.sigmoid()

    # What a step is made of ---------------------------------------------------------------------

    def tokens(self, images: Tensor) -> Tensor:
        """Eq. 1: images [B, 3, H, W] in [0, 1] → x [B, N, D]."""
        return _in_autocast_dtype(self.dropout(self.tokenizer((images - self.mean) / self.std) + self.pos))

    def project(self, h: Tensor) -> Projected:
        """Layer 1's projection of some tokens h [B, tokens, D]."""
        return self._first.project(h)

    def update_latents(self, embedded: Embedded, y: Tensor, of_y: Projected, z: Tensor, of_z: Projected) -> Tensor:
        """Eq. 2: z ← f([x; y; z])[−K:], given layer 1's projections of y and z; z [B, K, D]."""
        x, of_x = embedded
        return self._f(torch.cat([x, y, z], 1), _join(of_x, of_y, of_z), slice(-self.config.latents, None))

    def update_answer(self, y: Tensor, of_y: Projected, z: Tensor, of_z: Projected) -> Tensor:
        """Eq. 3: y ← f([y; z])[:1], given layer 1's projections of y and z; y [B, 1, D]."""
        return self._f(torch.cat([y, z], 1), _join(of_y, of_z), slice(0, 1))

    def head_logits(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 4 before the sigmoid, for losses: logits [B, classes] and the halting logit [B]."""
        y = y[:, 0]
        return self.classifier(y), self.halt(y)[:, 0]

    def initial_state(self, batch: int) -> State:
        """y₀ and z₀ for `batch` images."""
        return State(self.y0.expand(batch, -1, -1), self.z0.expand(batch, -1, -1))

    def forward(self, images: Tensor, steps: int, halt_threshold: float = 2.0) -> Output:
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
    def _first(self) -> Layer:
        layer = self.block[0]
        assert isinstance(layer, Layer)
        return layer

    def _f(self, h: Tensor, first: Projected, keep: slice) -> Tensor:
        """f(h)[keep] for h [B, tokens, D], given layer 1's projection of h."""
        last = len(self.block) - 1
        for i, layer in enumerate(self.block):
            assert isinstance(layer, Layer)
            if i == 0:
                p = Projected(first.q[:, :, keep], first.k, first.v) if i == last else first
            else:
                p = layer.project(h, keep if i == last else slice(None))
            h = layer.finish(h[:, keep] if i == last else h, p)
        return h


def _join(*parts: Projected) -> Projected:
    return Projected(*(torch.cat(tensors, 2) for tensors in zip(*parts, strict=True)))
