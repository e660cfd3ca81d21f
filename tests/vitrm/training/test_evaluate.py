"""Accuracy by depth."""

from __future__ import annotations

import torch
from small_models import make_checkpoint

from vitrm.training.evaluate import accuracy_by_depth


def test_an_accuracy_in_float32_is_none_of_tf32(digits) -> None:
    model = make_checkpoint("tiny").build()
    seen = []
    model.tokenizer.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    allowed = torch.backends.cudnn.allow_tf32
    assert allowed, "PyTorch's default has changed: is the switch still needed?"
    found = accuracy_by_depth(model, digits.validation, 2)
    assert len(found.accuracy) == 2
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32 == allowed
