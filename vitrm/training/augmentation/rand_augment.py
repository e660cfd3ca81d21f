"""RandAugment of a batch: every image its own operations, on the device, without waiting for it.

torchvision's transform draws its operations once for all images that it is given, on the host.  Here they are drawn for every
image, and the images of one operation are computed together.  What is computed is torchvision's `RandAugment`, pixel by
pixel.  A recipe has one magnitude, so an operation has at most two forms, with either sign: geometric ones are a table of
which pixel goes where, and those that look at one value alone a table of values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

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
        start, end = int(cuts[_GEOMETRIC_END]), int(cuts[_POINTWISE_END])
        if start < end:
            done.append(_looked_up(pixels[start:end], values[kinds[start:end] - _GEOMETRIC_END]))
        for code in range(_POINTWISE_END, 2 * len(OPERATIONS)):
            start, end = int(cuts[code]), int(cuts[code + 1])
            if start < end:
                done.append(_function(code, magnitude)(pixels[start:end]))
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


def signed_magnitude(name: str, magnitude: int, sign: int, h: int, w: int) -> float:
    """The number that torchvision gives the operation at that magnitude; the sign counts where it draws one."""
    transform = v2.RandAugment(magnitude=magnitude)
    magnitudes, signed = transform._AUGMENTATION_SPACE[name]
    found = magnitudes(transform.num_magnitude_bins, h, w)
    if found is None:
        return 0.0
    return float(found[magnitude]) * (sign if signed else 1)


@lru_cache(maxsize=64)
def _function(code: int, magnitude: int) -> Callable[[Tensor], Tensor]:
    """The operation that the drawn `code` means, of those that look at more than one value."""
    name, sign = OPERATIONS[code // 2], -1 if code % 2 else 1
    if name == "AutoContrast":
        return F.autocontrast_image
    if name == "Equalize":
        return F.equalize_image
    factor = 1.0 + signed_magnitude(name, magnitude, sign, 1, 1)
    if name == "Sharpness":
        return partial(_sharpened, factor=factor)
    return partial(
        F.adjust_saturation_image if name == "Color" else F.adjust_contrast_image, **{_FACTORS[name]: factor}
    )


_FACTORS = {"Color": "saturation_factor", "Contrast": "contrast_factor"}


def _sharpened(pixels: Tensor, factor: float) -> Tensor:
    """torchvision's `adjust_sharpness_image`: it sends its kernel from the host each time, and a GPU may blur in TF32.

    Sums of whole numbers are exact, and thirteenths are never halfway between two.
    """
    image = pixels.float()
    if min(image.shape[-2:]) <= 2:
        return pixels
    inner = image[..., 1:-1, 1:-1]
    rows = image[..., :-2, :] + image[..., 1:-1, :] + image[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    inner.add_((sums / 13).round_().sub_(inner), alpha=1.0 - factor)
    return image.clamp_(0, 255).to(torch.uint8)
