"""vitrm.baselines.networks: torchvision's ViT, weight for weight, what is special about others, and the shared input contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_learners import make_batch, make_learner
from small_models import small
from torchvision import models

from vitrm.baseline_configs import ViTConfig
from vitrm.baselines.networks import CLASSIFIERS, BasicBlock
from vitrm.checkpoint import build_model
from vitrm.config import PRESETS, preset
from vitrm.layers.conv_group import ConvGroup
from vitrm.training.parallel.cpu_workers import Workers


def test_vit_equals_torchvisions():
    config = ViTConfig(dim=32, layers=2, heads=4, mlp=64, patch_size=8, dropout=0.0)
    torch.manual_seed(0)
    ours = build_model(config).eval()
    theirs = models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=10,
        norm_layer=torch.nn.LayerNorm,
    ).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        net, enc = ours.net, theirs.encoder
        copies = {theirs.conv_proj: net.proj, enc.ln: net.norm, theirs.heads.head: net.head}
        theirs.class_token.copy_(net.cls)
        enc.pos_embedding.copy_(net.pos)
        for layer, other in zip(net.layers, enc.layers, strict=True):
            copies |= {other.ln_1: layer.norm1, other.ln_2: layer.norm2, other.self_attention.out_proj: layer.out}
            copies |= {other.mlp[0]: layer.ffn.up, other.mlp[3]: layer.ffn.down}
            other.self_attention.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.k.weight, layer.v.weight]))
            other.self_attention.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.k.bias, layer.v.bias]))
        for target, source in copies.items():
            target.load_state_dict(source.state_dict())
        images = torch.rand(3, 3, 32, 32)
        torch.testing.assert_close(ours(images), theirs((images - 0.5) / 0.5), atol=1e-5, rtol=1e-5)


def test_normalization_is_inside():
    model = build_model(preset("resnet18", mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])).eval()
    images = torch.rand(2, 3, 32, 32)
    by_hand = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(model(images), model.net(by_hand))


def test_a_cifar_resnets_shortcut_has_no_weights():
    block = BasicBlock(4, 8, stride=2).eval()
    torch.nn.init.zeros_(block.norm2.weight)  # nothing but the shortcut is left
    maps = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = maps[:, :, ::2, ::2]
    assert torch.equal(block(maps), expected)


def test_mobilenets_maps_stay_large():
    model = build_model(small("mobilenetv2-cifar")).eval()
    assert model.net.features(torch.rand(1, 3, 32, 32)).shape[2:] == (4, 4)


def test_normalizing_before_or_after_the_pooling_is_the_same():
    torch.manual_seed(0)
    group = ConvGroup(6, 8).eval()
    for norm in (group.norm1, group.norm2):
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 2)
    maps = torch.rand(2, 6, 9, 9)
    h = F.gelu(group.norm1(F.max_pool2d(group.conv1(maps), 2)))  # the order of training
    torch.testing.assert_close(group(maps), F.gelu(group.norm2(group.conv2(h))))


def test_a_convolution_begins_as_the_identity():
    group = ConvGroup(6, 8)
    maps = torch.rand(2, 6, 9, 9)
    torch.testing.assert_close(group.conv1(maps)[:, :6], maps)


@pytest.mark.parametrize("workers", [None, 2])
def test_the_whitening_is_kept_and_not_trained(workers):
    learner = make_learner(small("airbench"), workers=Workers(workers) if workers else None)
    whitening = learner.model.net.whitening
    torch.manual_seed(1)
    images = torch.randn(64, 3, 16, 16).cumsum(3)  # neighbors are alike
    whitening.whiten(images)
    before = whitening.weight.clone()
    whitened = whitening(images).transpose(0, 1).flatten(1)[:12]
    torch.testing.assert_close(whitened @ whitened.T / whitened.shape[1], torch.eye(12), atol=0.02, rtol=0)
    learner.train_step(make_batch(), 1e-3)
    assert torch.equal(whitening.weight, before)
    assert whitening.bias.abs().max() > 0
    assert torch.equal(learner.model.state_dict()["net.whitening.weight"], before)


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config.parameters < 25e6])
def test_every_models_classifier_is_known_as_such(name):
    """`--init` for other classes begins with a new one."""
    with torch.device("meta"):
        few, more = (build_model(preset(name, classes=classes)).state_dict() for classes in (5, 7))
    differ = [k for k in few if few[k].shape != more[k].shape]
    assert differ
    assert all(k.startswith(CLASSIFIERS) for k in differ)
