"""The eager model with the roundings that an int8 graph makes, written down step by step: what the graphs must equal."""

from __future__ import annotations

import numpy as np
import torch

from vitrm.calib.calibration import Calibration
from vitrm.calib.int8_weights import quantize_filters, quantize_weight
from vitrm.calib.sites import Site
from vitrm.checkpoint import Checkpoint
from vitrm.model import ViTRM


def rounded(values: torch.Tensor, low: float, high: float, target: str) -> torch.Tensor:
    """What int8 keeps of activations."""
    if target == "tensorrt" and (high - low) / 255 >= 0.75 * max(-low, high) / 127:
        scale = np.float32(max(-low, high) / 127)
        return torch.clamp(torch.round(values / scale), -128, 127) * scale
    scale = np.float32((high - low) / 255)  # TensorRT, too, where the range is lopsided
    zero = round(-low / float(scale))
    return (torch.clamp(torch.round(values / scale) + zero, 0, 255) - zero) * scale


@torch.no_grad()
def simulated(
    checkpoint: Checkpoint,
    calibration: Calibration,
    images: np.ndarray,
    target: str,
    shared: bool,
    convolutions: bool = False,
) -> np.ndarray:
    """The eager model with weights and inputs of linear layers rounded as int8 rounds them; with `convolutions` theirs and their outputs, too."""
    model = checkpoint.build()
    assert isinstance(model, ViTRM)
    place = [0, "embed"]

    def hook(layer):
        def round_input(_, inputs):
            step, role = place
            extent = calibration.shared(role, layer) if shared and step else calibration.ranges[Site(step, role, layer)]
            return (rounded(inputs[0], *extent, target),)

        return round_input

    for name, module in model.block.named_modules():
        if isinstance(module, torch.nn.Linear):
            integers, scales = quantize_weight(module.weight.T.contiguous().numpy())
            module.weight.copy_(torch.from_numpy(integers * scales).T)
            module.register_forward_pre_hook(hook(f"block.{name}"))
    for name, conv, norm, floor in model.tokenizer.convolutions() if convolutions else ():
        assert model.glimpses is None
        into, out = (calibration.ranges[Site(0, "embed", f"tokenizer.{name}{end}")] for end in ("", ".output"))
        # A norm maps each channel by a line, which belongs to filters and bias.
        at_0, at_1 = (norm(torch.full((1, conv.out_channels, 1, 1), v)).flatten() for v in (0.0, 1.0))
        filters, by = quantize_filters((conv.weight * (at_1 - at_0)[:, None, None, None]).numpy())
        bias = at_0 if conv.bias is None else at_0 + (at_1 - at_0) * conv.bias
        unit = torch.from_numpy(by * np.float32((into.high - into.low) / 255))  # of the integer sums, so of biases
        conv.weight.copy_(torch.from_numpy(filters * by[:, None, None, None]))
        conv.bias = torch.nn.Parameter(torch.round(bias / unit) * unit)
        conv.register_forward_pre_hook(lambda _, inputs, of=into: (rounded(inputs[0], *of, target),))
        norm.register_forward_hook(
            lambda _, inputs, __, of=out, floor=floor: rounded(inputs[0].clamp(min=floor), *of, target)
        )
    embedded = model.embed(torch.from_numpy(images))
    y, z = model.y0.expand(len(images), -1, -1), model.z0.expand(len(images), -1, -1)
    place[:] = 1, "project_latents"
    of_z = model.project_latents(z)
    glimpse = torch.zeros(len(images), 1)
    for step in range(1, calibration.steps + 1):
        if model.glimpses is not None:
            place[:] = step, "look"
            read, glimpse = model.look(embedded, glimpse)
        else:
            read = embedded
        for _ in range(model.config.recursions):
            place[:] = step, "project_answer"
            of_y = model.project_answer(y)
            for _ in range(model.config.n):
                place[:] = step, "latents"
                z = model.update_latents(read, y, of_y, z, of_z)
                place[:] = step, "project_latents"
                of_z = model.project_latents(z)
            place[:] = step, "answer"
            y = model.update_answer(y, of_y, z, of_z)
    return model.heads(y)[0].numpy()
