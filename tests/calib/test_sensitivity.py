"""Sensitivity: the error that int8 at one site alone makes, and the order that follows."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pictures
import pytest
import reference
import torch

from vitrm.calib.calibration import calibrate
from vitrm.calib.fake_quant import FakeQuantizer
from vitrm.calib.methods import Range
from vitrm.calib.quant_params import quant_table
from vitrm.calib.sensitivity import sensitivity
from vitrm.calib.sites import Site, Start, run_observed
from vitrm.checkpoint import Checkpoint
from vitrm.data import load

pytestmark = pytest.mark.slow

STEPS = 3


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    model = reference.shaken("tiny", recursions=2, n=2)
    data = {"name": "digits", "classes": [str(i) for i in range(10)]}
    return Checkpoint(model=model.config, data=data, weights=model.state_dict(), source="test")


@pytest.fixture(scope="module")
def calibration(checkpoint):
    return calibrate(checkpoint, STEPS, images=load("digits", "train").take(slice(0, 130)))


@pytest.fixture(scope="module")
def images():
    return load("digits", "validation").floats(slice(0, 32))


def test_a_run_can_go_on_from_any_step(checkpoint, images):
    model, tensor = checkpoint.build(), torch.from_numpy(images[:4])
    whole, met = run_observed(model, tensor, STEPS), []
    with torch.no_grad():
        embedded = model.embed(tensor)
    rest = run_observed(model, tensor, STEPS, lambda site, _: met.append(site), Start(1, embedded, whole[0]))
    assert len(rest) == STEPS - 1
    assert torch.equal(rest[-1].y, whole[-1].y)
    assert {site.step for site in met if site.role == "latents"} == {2, 3}


def test_the_noise_of_one_site_is_that_of_its_rounding_alone(checkpoint, calibration, images):
    found = sensitivity(checkpoint, calibration, quant_table(calibration, "cpu", shared=False), images)
    assert set(found.noise) == set(calibration.ranges)
    assert all(0 < noise < 0.1 for noise in found.noise.values())
    # By hand, for one site in the middle: that weight and that input are rounded, at that step.
    site, model, tensor = Site(2, "latents", "block.1.ffn.up"), checkpoint.build(), torch.from_numpy(images)
    with torch.no_grad():
        exact = model.heads(run_observed(model, tensor, STEPS)[-1].y)[0].double()
        int8 = FakeQuantizer.of(model, quant_table(calibration, "cpu", shared=False)).only(site)
        rounded = model.heads(run_observed(model, tensor, STEPS, int8)[-1].y)[0].double()
    expected = float((rounded - exact).square().sum() / (exact - exact.mean(0)).square().sum())
    assert found.noise[site] == pytest.approx(expected, rel=1e-4)
    assert found.changed[site] == int((rounded.argmax(1) != exact.argmax(1)).sum())


def test_noises_nearly_add_up(checkpoint, calibration, images):
    found = sensitivity(checkpoint, calibration, quant_table(calibration, "cpu", shared=False), images)
    model, tensor = checkpoint.build(), torch.from_numpy(images)
    with torch.no_grad():
        exact = model.heads(run_observed(model, tensor, STEPS)[-1].y)[0].double()
        everything = FakeQuantizer.of(model, quant_table(calibration, "cpu", shared=False))
        rounded = model.heads(run_observed(model, tensor, STEPS, everything)[-1].y)[0].double()
    total = float((rounded - exact).square().sum() / (exact - exact.mean(0)).square().sum())
    assert sum(found.noise.values()) == pytest.approx(total, rel=0.5)


def test_the_site_that_hurts_ranks_first(checkpoint, calibration, images, tmp_path, monkeypatch):
    bad = Site(2, "answer", "block.1.ffn.down")
    ranges = {s: Range(30 * r.low, 30 * r.high) if s == bad else r for s, r in calibration.ranges.items()}
    worse = replace(calibration, ranges=ranges)
    own = sensitivity(checkpoint, worse, quant_table(worse, "tensorrt", shared=False), images)
    assert own.ranked()[0][0] == (bad,)
    # Where steps share their scales, the layer hurts, and goes, at every step.
    shared = sensitivity(checkpoint, worse, quant_table(worse, "tensorrt", shared=True), images)
    sites, noise = shared.ranked()[0]
    assert sites == tuple(Site(step, bad.role, bad.layer) for step in range(1, STEPS + 1))
    assert noise == pytest.approx(sum(shared.noise[s] for s in sites))
    assert [noise for _, noise in shared.ranked()] == sorted((n for _, n in shared.ranked()), reverse=True)
    assert sum(len(sites) for sites, _ in shared.ranked()) == len(calibration.ranges)

    seen = pictures.watch(monkeypatch)
    own.save(tmp_path / "s.json")
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["noise"][str(bad)] == own.noise[bad]
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert {"revising the latents z", "1.ffn.up", "test: harm of int8, one linear layer at a time"} <= set(seen)
    cost = own.work[bad] / sum(own.work.values())
    answers = f"No linear layer alone changes more than {max(own.changed.values())} of the 32 answers."
    assert written["changed_answers"][str(bad)] == own.changed[bad]
    kept = f"Keeping it in floating point at that step costs {100 * cost:.1f} % of the work in int8."
    assert any(text.startswith(f"{answers}\n") and text.endswith(f"\n{kept}") for text in seen)
    shared.save(tmp_path / "shared.json")
    cost = sum(own.work[s] for s in sites) / sum(own.work.values())
    assert any(f"floating point at all steps costs {100 * cost:.1f} % of the work in int8." in text for text in seen)
    exact = replace(own, changed=dict.fromkeys(own.changed, 0))
    exact.save(tmp_path / "exact.json")
    assert any(text.startswith("No linear layer alone changes the answer to any of the 32 images.\n") for text in seen)
    # What each costs: tokens × weights, which no scale changes.
    site, linear = Site(2, "latents", "block.1.ffn.up"), checkpoint.build().block.get_submodule("1.ffn.up")
    assert own.work.keys() == own.noise.keys()
    assert own.work[site] % linear.weight.numel() == 0
    assert own.work[site] // linear.weight.numel() == shared.work[site] // linear.weight.numel() > 1
    assert np.isfinite(list(written["noise"].values())).all()


def test_a_fake_quantizer_changes_no_weight(checkpoint, calibration, images):
    model, tensor = checkpoint.build(), torch.from_numpy(images[:4])
    exact = run_observed(model, tensor, STEPS)[-1].y
    quantizer = FakeQuantizer.of(model, quant_table(calibration, "cpu", shared=False))
    assert not torch.equal(run_observed(model, tensor, STEPS, quantizer)[-1].y, exact)
    assert torch.equal(run_observed(model, tensor, STEPS)[-1].y, exact)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in checkpoint.weights.items())
