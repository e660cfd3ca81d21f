"""Settings of the page in the browser."""

from __future__ import annotations

from dataclasses import dataclass

from vitrm import fields
from vitrm.fields import flag, real, text_or_none, whole, whole_or_none

DEEPEST = 64  # steps that a page can show side by side


@dataclass(frozen=True, kw_only=True)
class WebOptions:
    """Settings of a page.  Raises `UserError` for a value out of its range."""

    steps: int | None = whole_or_none(1, DEEPEST, "depth that the page begins with (default: the trained depth)")
    halt_threshold: float = real(0.9, 0, 1000, "threshold that the page begins with", above=True)
    max_steps: int = whole(
        16, 1, DEEPEST, "deepest step that --web's slider reaches (default: 16)", flag="--web-max-steps", unit="N"
    )
    images: int = whole(
        16, 0, 64, "test images in --web's gallery, half of them easy and half hard (default: 16)", flag="--web-images"
    )
    runtime: str | None = text_or_none(
        "where --web finds onnxruntime-web: its npm package, as .tgz or unpacked (default: what --download kept)",
        flag="--web-runtime",
        unit="PATH",
    )
    download: bool = flag(
        False,
        "let --web fetch onnxruntime-web from registry.npmjs.org (33 MB, once; its checksum is checked)",
        flag="--download",
    )

    def __post_init__(self) -> None:
        fields.check(self)
