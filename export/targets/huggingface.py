"""A folder that Hugging Face's libraries open: model.onnx with the two JSON files that say how to use it.

    ORTModelForImageClassification.from_pretrained(folder)          optimum
    pipeline("image-classification", model=…, image_processor=…)    transformers

The pixels' normalization is inside the graph, so the processor only resizes, cuts and divides by 255.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitrm.runtime.artifact.metadata import Metadata
from vitrm.system.files import write_json

MODEL_FILE = "model.onnx"
CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
FILES = (MODEL_FILE, CONFIG_FILE, PROCESSOR_FILE)
_BICUBIC = 3  # PIL's number for it


def write_configs(folder: Path, metadata: Metadata) -> None:
    """Writes config.json and preprocessor_config.json beside the model.onnx of `metadata` in `folder`."""
    write_json(folder / CONFIG_FILE, model_config(metadata))
    write_json(folder / PROCESSOR_FILE, processor_config(metadata))


def model_config(metadata: Metadata) -> dict[str, Any]:
    """The model's config.json, as transformers reads it.

    It has no ViTRM, and needs none to run an ONNX file: a ViT's config says all that counts, images in and classes out.
    """
    m = metadata
    names = m.class_names
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": m.image_size,
        "num_channels": 3,
        "patch_size": m.model.get("patch_size", 1),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "vitrm": {"run": m.run, "steps": m.steps, "precision": m.precision, "weights_sha256": m.weights_sha256},
    }


def processor_config(metadata: Metadata) -> dict[str, Any]:
    """The preprocessing of an image as transformers reads it, which is that of training: the shorter side to the model's size, bicubic, then
    the center, divided by 255.  A ViT's own processor would squash the whole image.
    """
    size = metadata.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }
