"""Stage "assemble": the graphs of an artifact, from fragments at their final precision."""

from __future__ import annotations

import onnx_ir as ir

from vitrm.config import ModelConfig, ViTRMConfig
from vitrm.export.graph import layouts
from vitrm.export.graph.fragments import Fragment, Fragments
from vitrm.export.graph.layouts import Recursion
from vitrm.export.settings import ExportSettings


def assemble(
    config: ModelConfig, fragments: Fragment | tuple[Fragments, ...], settings: ExportSettings
) -> dict[str, ir.Model]:
    """The graphs, by file name in the folder; the one graph of a single file by ""."""
    if isinstance(fragments, Fragment):
        return {"": layouts.single(fragments, config.image_size)}
    assert isinstance(config, ViTRMConfig)
    recursion = Recursion(config, fragments[0], fragments if len(fragments) > 1 else ())
    if settings.graph == "stepwise":
        return {f"{part}.onnx": model for part, model in layouts.stepwise(recursion).items()}
    if settings.graph == "loop":
        return {"": layouts.loop(recursion)}
    return {"": layouts.unrolled(recursion, settings.steps, settings.halt_threshold, settings.every_step)}
