"""The models that ViTRM is compared with."""
