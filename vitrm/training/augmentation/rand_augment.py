"""RandAugment of a batch: every image its own operations, on the device, without waiting for it.

torchvision's transform draws its operations once for all images that it is given, on the host.  Here they are drawn for every
image, and the images of one operation are computed together.  What is computed is torchvision's `RandAugment`, pixel by
pixel.  A recipe has one magnitude, so an operation has at most two forms, with either sign: geometric ones are a table of
which pixel goes where, and those that look at one value alone a table of values.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vitrm.training.upload import upload

GEOMETRIC = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
POINTWISE = ("Brightness", "Posterize", "Solarize")
BLENDS = ("Color", "Contrast", "Sharpness")  # of the image with a duller one of itself
OPERATIONS = (*GEOMETRIC, *POINTWISE, *BLENDS, "AutoContrast", "Equalize")
# In one call each, of all images that drew one of them: their range in an order of operation and sign.
_GEOMETRIC_END, _POINTWISE_END = 2 * len(GEOMETRIC), 2 * len(GEOMETRIC + POINTWISE)
_BLENDS_END = _POINTWISE_END + 2 * len(BLENDS)


def draw_operations(ops: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Operations of `size` images, one after the other: int64 [ops, size], 2 × the place in `OPERATIONS`, + 1 for a negative one."""
    return 2 * rng.integers(len(OPERATIONS), size=(ops, size)) + rng.integers(2, size=(ops, size))


def apply_operations(pixels: Tensor, drawn: NDArray[np.int64], magnitude: int) -> Tensor:
    """RandAugment of uint8 images [B, 3, H, W] with the operations `drawn` [ops, B]; `magnitude` in 0 … 30, as torchvision's."""
    b, _, h, w = pixels.shape
    # Images are sorted by operation, so that those of one lie together; each round sorts what the last one left.
    place = np.arange(b)
    takes, sorted_ = [], []
    for operation in drawn:
        order = np.argsort(operation[place], kind="stable")
        takes.append(order)
        place = place[order]
        sorted_.append(operation[place])
    takes.append(np.argsort(place))
    device = pixels.device
    sent = upload(np.stack([*takes, *sorted_]), device)  # [2 ops + 1, B]
    moves, values = _tables(magnitude, h, w, device)
    for i, codes in enumerate(sorted_):
        pixels = pixels[sent[i]]
        kinds = sent[len(takes) + i]
        cuts = np.searchsorted(codes, range(2 * len(OPERATIONS) + 1))
        done = []
        if end := int(cuts[_GEOMETRIC_END]):
            done.append(_moved(pixels[:end], moves[kinds[:end]]))
        start, end = end, int(cuts[_POINTWISE_END])
        if start < end:
            done.append(_looked_up(pixels[start:end], values[kinds[start:end] - _GEOMETRIC_END]))
        if end < int(cuts[_BLENDS_END]):
            done.append(_blended(pixels, cuts[_POINTWISE_END : _BLENDS_END + 1].tolist(), magnitude))
        for code, function in ((_BLENDS_END, F.autocontrast_image), (_BLENDS_END + 2, F.equalize_image)):
            start, end = int(cuts[code]), int(cuts[code + 2])  # the sign says nothing here
            if start < end:
                done.append(function(pixels[start:end]))
        pixels = torch.cat(done)
    return pixels[sent[len(takes) - 1]]


def _moved(pixels: Tensor, sources: Tensor) -> Tensor:
    """Images whose pixels come from `sources` int64 [n, H × W], of which H × W is black."""
    flat = torch.nn.functional.pad(pixels.flatten(2), (0, 1))
    return flat.gather(2, sources[:, None].expand(-1, pixels.shape[1], -1)).view_as(pixels)


def _looked_up(pixels: Tensor, values: Tensor) -> Tensor:
    """Images whose values are those of `values` uint8 [n, 256]."""
    return values.gather(1, pixels.flatten(1).long()).view_as(pixels)


@lru_cache(maxsize=8)
def _tables(magnitude: int, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`_host_tables` on the device."""
    moves, values = _host_tables(magnitude, h, w)
    return upload(moves, device), upload(values, device)


@lru_cache(maxsize=8)
def _host_tables(magnitude: int, h: int, w: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Tables of which pixel each form of the geometric operations puts where, int64 [forms, H × W], and what each form of the pointwise
    ones makes of a value, uint8 [forms, 256]: as torchvision does it.
    """
    # Numbers from 1, as what comes in from outside is 0; float32 holds them to 2 ** 24.
    numbered = torch.arange(1, h * w + 1, dtype=torch.float32).view(1, h, w)
    moves = [_torchvisions(name, magnitude, sign, numbered) for name in GEOMETRIC for sign in (1, -1)]
    sources = torch.stack(moves).flatten(1).long() - 1
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    values = [_torchvisions(name, magnitude, sign, ramp) for name in POINTWISE for sign in (1, -1)]
    return torch.where(sources < 0, h * w, sources).numpy(), torch.stack(values).flatten(1).numpy()


def _torchvisions(name: str, magnitude: int, sign: int, image: Tensor) -> Tensor:
    """torchvision's operation of that name on one image."""
    transform = v2.RandAugment(magnitude=magnitude)
    factor = signed_magnitude(name, magnitude, sign, *image.shape[-2:])
    return transform._apply_image_or_video_transform(
        image, name, factor, interpolation=transform.interpolation, fill=transform._fill
    )


@lru_cache(maxsize=256)
def signed_magnitude(name: str, magnitude: int, sign: int, h: int, w: int) -> float:
    """The number that torchvision gives the operation at that magnitude; the sign counts where it draws one."""
    transform = v2.RandAugment(magnitude=magnitude)
    magnitudes, signed = transform._AUGMENTATION_SPACE[name]
    found = magnitudes(transform.num_magnitude_bins, h, w)
    if found is None:
        return 0.0
    return float(found[magnitude]) * (sign if signed else 1)


def _blended(pixels: Tensor, cuts: list[int], magnitude: int) -> Tensor:
    """The images from `cuts[0]` to `cuts[6]`, each blended with a duller one of itself: those up to `cuts[1]` in color by the
    positive factor, then by the negative one, then in contrast, then in sharpness; uint8.

    Rounding is torchvision's: f · image first, then (1 − f) · duller added, in float32.
    """
    first, last = cuts[0], cuts[-1]
    factors = [1.0 + signed_magnitude(name, magnitude, sign, 1, 1) for name in BLENDS for sign in (1, -1)]
    found = torch.empty(last - first, *pixels.shape[1:], device=pixels.device)
    gray = _gray(pixels[first : cuts[4]]) if first < cuts[4] else None  # of all that lose color or contrast
    mean = gray[cuts[2] - first :].mean((1, 2, 3), keepdim=True) if gray is not None and cuts[2] < cuts[4] else None
    for form in range(4):
        start, end = cuts[form], cuts[form + 1]
        if start < end:
            duller = gray if form < 2 else mean
            offset = first if form < 2 else cuts[2]
            assert duller is not None
            part = torch.mul(pixels[start:end], factors[form], out=found[start - first : end - first])
            part.add_(duller[start - offset : end - offset], alpha=1.0 - factors[form])
    if cuts[4] < last:
        found[cuts[4] - first :] = pixels[cuts[4] : last]
        _sharpen(found[cuts[4] - first :], cuts[5] - cuts[4], factors[4:])
    return found.clamp_(0, 255).to(torch.uint8)


def _gray(pixels: Tensor) -> Tensor:
    """torchvision's brightness of each pixel, rounded down: float32 [n, 1, H, W]."""
    r, g, b = pixels.unbind(1)
    return r.mul(0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114).floor_()[:, None]


def _sharpen(image: Tensor, positive: int, factors: list[float]) -> None:
    """Does in place, without rounding, what torchvision's `adjust_sharpness_image` does to float32 [n, 3, H, W]: to the first
    `positive` images by the first of two factors, to the others by the second.

    Theirs sends its kernel from the host each time, and a GPU may blur in TF32.  Sums of whole numbers are exact, and
    thirteenths are never halfway between two.
    """
    if min(image.shape[-2:]) <= 2:
        return
    inner = image[..., 1:-1, 1:-1]
    rows = image[..., :-2, :] + image[..., 1:-1, :] + image[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    duller = (sums / 13).round_().sub_(inner)
    for part, factor in ((slice(positive), factors[0]), (slice(positive, None), factors[1])):
        if len(inner[part]):
            inner[part].add_(duller[part], alpha=1.0 - factor)
