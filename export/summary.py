"""The lines that vitrm-export prints of an export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from vitrm.export.precision.accuracy_budget import Budget
    from vitrm.export.result import ExportResult
    from vitrm.export.tensorrt.build import BuildResult
    from vitrm.export.web.page import PageResult

_COMPLAINTS = 3  # of TensorRT's that are shown


def summary(result: ExportResult, shown: Path) -> Iterator[str]:
    """Describes an export whose artifact is at `shown`: graph, precision, evidence, file."""
    m, parity = result.metadata, result.parity
    depth = f", {_steps(m.steps)}" if m.recursive else ""
    kinds = [f"{n} {kind}" for n, kind in ((result.int8_weights, "int8"), (result.half_weights, "float16")) if n]
    half = f", {' and '.join(kinds)}" if kinds else ""
    yield f"  graph    {m.graph}{depth}, {m.precision}: {result.nodes} nodes, {result.weights} weight tensors stored once{half}"
    if result.depth_note:
        yield f"  depth    {result.depth_note}"
    yield from _int8(result)
    if result.budget is not None:
        yield from _budget(result.budget)
    if result.headroom is not None:
        yield f"  headroom {result.headroom.factor:.0f} × to float16's limit: largest activation {result.headroom.where}"
    halting = f", halt_prob {parity.halt_prob:.1e}" if m.recursive else ""
    yield (
        f"  parity   max |Δ| logits {parity.logits:.1e}{halting} (limit {parity.limit:.1e}, {parity.tolerance:g} of the largest "
        f"logit), top-1 agreement {parity.agreement:.1%} on {parity.images} {result.verified_on}"
    )
    if result.plan is not None:
        yield plan_line(result.plan)
        yield from complaint_lines(result.plan)
        if not result.plan_verified:
            yield "           the parity is that of its ONNX graph: the plan itself was not run, its GPU is not here"
    share = result.bytes / result.float32_bytes
    yield f"  file     {shown}, {result.bytes / 1e6:.2f} MB, {share:.2f} × the float32 weights, in {result.seconds:.1f} s"


def _int8(result: ExportResult) -> Iterator[str]:
    if result.calibration is not None:
        c = result.calibration
        images = f"{c.data['name']} ({c.note})" if c.note else f"training images of {c.data['name']}"
        yield (
            f"  int8     for {result.metadata.target}; activations calibrated on {c.data['count']} {images} at "
            f"{_steps(c.steps)} ({c.method}), id {c.id[:12]}"
        )
    if result.state_error is not None:
        y, z = result.state_error.y, result.state_error.z
        yield (
            f"  error    of the state, signal to noise: y {y[0]:.1f} dB after step 1, {y[-1]:.1f} dB after step {len(y)}; "
            f"z {z[0]:.1f} dB, {z[-1]:.1f} dB"
        )


def _budget(b: Budget) -> Iterator[str]:
    yield (
        f"  budget   {b.final:.2%} of {b.images} validation images, PyTorch {b.exact:.2%}: drop {b.drop:.2f} of {b.allowed:g} "
        f"points, top-1 agreement {b.agreement:.2%}"
    )
    if b.kept:
        yield f"           {b.first:.2%} with everything in int8; in floating point since, most harmful first:"
    for sites, noise in b.kept:
        steps = f"step {sites[0].step}" if len(sites) == 1 else "all steps"
        yield f"           {sites[0].role} {sites[0].layer}, {steps} (noise of the logits {noise:.1e} of their variance)"


def plan_line(build: BuildResult) -> str:
    """Describes a plan: TensorRT, GPUs, batch sizes, and how it was built."""
    from vitrm.runtime.backends.tensorrt.api import NAMES

    e = build.engine
    batches = "; ".join(
        f"batch {low}" if low == high else f"batch {low} to {high}, best at {best}" for low, best, high in e.profiles
    )
    built_on = f" on an {e.gpu_name}" if e.gpu_name else ""
    return (
        f"  engine   {NAMES[e.flavour]} {e.version} for {', '.join(e.gpus)}{built_on}, {e.system}; {batches}; "
        f"{build.layers} layers before fusion, built in {build.seconds:.1f} s"
    )


def complaint_lines(build: BuildResult) -> Iterator[str]:
    """Describes what TensorRT logged as errors of a build that succeeded."""
    for text in build.complaints[:_COMPLAINTS]:
        yield f"  warning  TensorRT logged an error and built the plan all the same: {text}"
    if (more := len(build.complaints) - _COMPLAINTS) > 0:
        yield f"           and {more} more"


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def page_summary(page: PageResult) -> Iterator[str]:
    """Describes a page: its models, images and sizes."""
    for precision, result in page.models.items():
        parity = result.parity
        yield (
            f"  {precision:8} {result.bytes / 1e6:.2f} MB, max |Δ| logits {parity.logits:.1e} (limit {parity.limit:.1e}), "
            f"top-1 agreement {parity.agreement:.1%} on {parity.images} {result.verified_on}"
        )
        if result.calibration is not None and result.calibration.note:
            yield f"           calibrated on {result.calibration.note}"
    first = next(iter(page.models.values()))
    if first.depth_note:
        yield f"  depth    {first.depth_note}"
    yield f"  gallery  {len(page.gallery.images)} images. {page.gallery.note}"
    yield (
        f"  page     {page.folder}, {page.bytes / 1e6:.1f} MB; {page.first_bytes / 1e6:.1f} MB before the first answer, of which the "
        f"runtime is most: {page.compressed_runtime / 1e6:.1f} MB where the server compresses"
    )
