"""vitrm.baselines: torchvision's ViT, weight for weight, and the shared input contract."""

from __future__ import annotations

import torch
from torchvision import models

from vitrm.baseline_configs import ViTConfig
from vitrm.checkpoint import build_model
from vitrm.config import preset


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


def test_normalisation_is_inside():
    model = build_model(preset("resnet18", mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])).eval()
    images = torch.rand(2, 3, 32, 32)
    by_hand = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(model(images), model.net(by_hand))
