"""Batch norms that share a batch: what they take over.  That torch's own runs takes several GPUs."""

from __future__ import annotations

import torch
from torch import nn

from vitrm.config import preset
from vitrm.layers.conv_group import ShiftBatchNorm
from vitrm.model import ViTRM
from vitrm.training.parallel.sync_batch_norm import sync_batch_norms_on_gpus


def test_gpus_share_every_kind_of_batch_norm_by_the_same_tensors():
    model = ViTRM(preset("nano-v2"))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    trained = [name for name, _ in model.named_parameters()]
    sync_batch_norms_on_gpus(model, None)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) and norm.training for norm in norms)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert [name for name, _ in model.named_parameters()] == trained, "a fixed scale is not trained"
    # Without training, which needs no other GPU, they are what they were.
    norm, plain = norms[0].eval(), ShiftBatchNorm(norms[0].num_features).eval()
    nn.init.normal_(norm.bias)
    plain.bias, x = norm.bias, torch.randn(2, norm.num_features, 4, 4)
    torch.testing.assert_close(norm(x), plain(x))
