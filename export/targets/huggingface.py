"""A folder that Hugging Face's libraries open: model.onnx with the two JSON files that say how to use it.

    ORTModelForImageClassification.from_pretrained(folder)          optimum
    pipeline("image-classification", model=…, image_processor=…)    transformers

The pixels' normalization is inside the graph, so the processor only brings an image to size and divides by 255.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitrm.preprocessing import Preprocessing
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.system.files import write_json

MODEL_FILE = "model.onnx"
CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
FILES = (MODEL_FILE, CONFIG_FILE, PROCESSOR_FILE)
_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # PIL's numbers for them


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
    """The artifact's preprocessing as transformers reads it; a ViT's own processor would squash every image.

    Under `vitrm` stands the preprocessing itself, and in words where transformers' is another.
    """
    of = metadata.preprocessing
    height, width = of.size
    whole = {"height": height, "width": width}
    shapes: dict[str, dict[str, Any]] = {
        "crop": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": height},
            "do_center_crop": True,
            "crop_size": whole,
        },
        "squash": {"image_processor_type": "ViTImageProcessor", "size": whole},
        # It pads with the color `image_mean`, and normalizes only if asked.
        "letterbox": {
            "image_processor_type": "LlavaImageProcessor",
            "do_pad": True,
            "image_mean": [(value + 0.5) / 255 for value in of.padding],  # it truncates 255 times this
            "size": {"shortest_edge": height},
            "do_center_crop": False,
        },
    }
    return {
        **shapes[of.fit],
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _RESAMPLING[of.resampling],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "vitrm": {"preprocessing": of.to_dict(), "differences": differences(of)},
    }


def differences(of: Preprocessing) -> list[str]:
    """Sentences on the pictures that transformers prepares otherwise than `of` says."""
    found = [
        "16-bit gray: transformers cuts values off at 255, here 65535 becomes 255",
        f"transparency: transformers drops it, here it is laid on RGB {list(of.background)}: lay it on that first",
        "resampling: the same pixels with Pillow 13; before, Pillow resized the rows of tall pictures first, which rounds otherwise",
    ]
    if of.orientation == "exif":
        found.append("EXIF orientation: transformers' pipeline applies it, its image processor alone does not")
    else:
        found.append("EXIF orientation: transformers' pipeline applies it, here it is left alone")
    if of.jpeg_reduction:
        found.append(
            f"large JPEGs: here decoded at 1/2, 1/4 or 1/8 of their size where at least {of.jpeg_reduction} times the size wanted is "
            "left; transformers decodes them whole, which gives values that differ by up to some 5 % of the range at sharp edges"
        )
    return found
