"""Calibration: what was met at each site, the ranges that follow, and what a calibration is refused for."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pictures
import pytest
import reference
import torch
from hostile import little_memory, mutants, refused_or_read

from vitrm.calib.calibration import (
    CALIBRATION_FORMAT,
    CALIBRATION_IMAGES,
    calibrate,
    calibration_images,
    check_calibration,
    digest,
    load_calibration,
)
from vitrm.calib.histogram import BINS, Histogram, collect
from vitrm.calib.methods import Range, activation_range
from vitrm.calib.quant_params import quant_params, quant_table
from vitrm.calib.sites import Site
from vitrm.calib.state_error import draw_state_error, state_error
from vitrm.checkpoint import Checkpoint, build_model
from vitrm.config import preset
from vitrm.data import Images, load
from vitrm.errors import UserError

STEPS = 3


@pytest.fixture(scope="module")
def model():
    return reference.shaken("tiny", recursions=2, n=2)


@pytest.fixture(scope="module")
def checkpoint(model) -> Checkpoint:
    data = {"name": "digits", "classes": [str(i) for i in range(10)]}
    return Checkpoint(model=model.config, data=data, weights=model.state_dict(), source="test")


@pytest.fixture(scope="module")
def images() -> Images:
    return load("digits", "train").take(slice(0, 130))


def test_every_site_of_every_step_is_met(model, images):
    found = collect(model, images.floats(slice(0, 8)), STEPS)
    layers = [f"block.{i}.{part}" for i in range(2) for part in ("q", "k", "v", "out", "ffn.up", "ffn.down")]
    first = ["block.0.q", "block.0.k", "block.0.v"]
    expected = {Site(0, "embed", layer) for layer in first}
    for step in range(1, STEPS + 1):
        expected |= {Site(step, role, layer) for role in ("project_answer", "project_latents") for layer in first}
        expected |= {
            Site(step, role, layer) for role in ("latents", "answer") for layer in layers if layer not in first
        }
    assert set(found) == expected


def test_extremes_and_counts_are_those_of_the_activations(model, images):
    floats = images.floats()
    found = collect(model, floats, STEPS)
    # The input of the first layer's keys in the embedding, computed apart.
    with torch.no_grad():
        x = model.tokenizer((torch.from_numpy(floats) - model.mean) / model.std) + model.pos
        values = model.block[0].norm1(x).numpy()
    histogram = found[Site(0, "embed", "block.0.k")]
    assert (histogram.low, histogram.high) == pytest.approx((values.min(), values.max()), abs=1e-5)
    assert histogram.counts.sum() == values.size
    own, _ = np.histogram(values, BINS, (histogram.low, histogram.high))
    assert np.abs(own - histogram.counts).sum() < 1e-3 * values.size  # values on a bin's edge may fall either way
    # Steps differ: the reason for a scale of their own.
    lows = {found[Site(step, "answer", "block.1.ffn.down")].high for step in range(1, STEPS + 1)}
    assert len(lows) == STEPS


def test_calibration_methods():
    counts = np.zeros(BINS, np.int64)
    counts[BINS // 2 - 50 : BINS // 2 + 50] = 100_000  # all but one value lie in the middle twentieth
    counts[-1] = 1
    outlier = Histogram(-10.0, 10.0, counts)
    assert activation_range(outlier, "minmax") == (-10.0, 10.0)
    low, high = activation_range(outlier, "percentile")
    assert (low, high) == pytest.approx((-0.49, 0.49), abs=0.02)
    low, high = activation_range(outlier, "mse")
    assert 0.4 < high < 10, "one outlier is worth some clipping"
    assert activation_range(Histogram(2.0, 3.0, counts), "minmax") == (0.0, 3.0), "zero is always representable"
    empty = activation_range(Histogram(0.0, 0.0, np.zeros(BINS, np.int64)), "mse")
    assert empty.high > empty.low
    with pytest.raises(UserError, match="calibration method is 'max'"):
        activation_range(outlier, "max")


@pytest.mark.slow
def test_the_same_file_whatever_the_order(checkpoint, images, tmp_path):
    calibrate(checkpoint, 2, images=images).save(tmp_path / "a.json")
    shuffled = images.take(np.random.default_rng(0).permutation(len(images)))
    calibrate(checkpoint, 2, images=shuffled).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    again = load_calibration(tmp_path / "a.json", checkpoint, 2)
    assert again == calibrate(checkpoint, 2, images=images)
    assert again.shared("latents", "block.1.k") == Range(
        min(again.ranges[Site(s, "latents", "block.1.k")].low for s in (1, 2)),
        max(again.ranges[Site(s, "latents", "block.1.k")].high for s in (1, 2)),
    )


def test_a_calibration_of_something_else_is_refused_with_both_ids(checkpoint, images, tmp_path):
    made = calibrate(checkpoint, 2, images=images)
    made.save(tmp_path / "a.json")
    other = Checkpoint(
        model=checkpoint.model, data={}, weights={k: v * 1.01 for k, v in checkpoint.weights.items()}, source="other"
    )
    with pytest.raises(UserError, match=rf"id {made.id[:12]}.*weights .*, the model has {other.weights_id[:12]}"):
        load_calibration(tmp_path / "a.json", other, 2)
    with pytest.raises(UserError, match=rf"id {made.id[:12]}.* 2 steps, asked for are 3 \(id "):
        load_calibration(tmp_path / "a.json", checkpoint, 3)
    brighter = Checkpoint(
        model=replace(checkpoint.model, mean=(0.1, 0.1, 0.1)), data={}, weights=checkpoint.weights, source="brighter"
    )
    with pytest.raises(UserError, match="another preprocessing"):
        check_calibration(made, brighter, 2, "it")
    looking = replace(checkpoint, model=replace(checkpoint.model, glimpses="shift"))
    with pytest.raises(UserError, match=r"made for glimpses none, the model has shift \(id"):
        check_calibration(made, looking, 2, "it")
    check_calibration(calibrate(looking, 2, images=images), looking, 2, "it")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v["ranges"].update({"1/latents/block.1.k": [0]}), "not a calibration file"),
        (lambda v: v["ranges"].update({"1/latents/block.1.k": [0, 1]}), "its ranges were changed"),
        (lambda v: v["ranges"].pop("1/latents/block.1.k"), "its ranges were changed"),
        (lambda v: v.update(ranges=[]), "not a calibration file"),
        (lambda v: v.pop("steps"), "not a calibration file"),
        (lambda v: v.update(steps=9), "was changed after it was written"),
        (lambda v: v.update(format=CALIBRATION_FORMAT + 1), f"calibration format {CALIBRATION_FORMAT + 1}"),
    ],
)
def test_damaged_files_are_refused(checkpoint, images, tmp_path, damage, message):
    calibrate(checkpoint, 1, images=images.take(slice(0, 8))).save(tmp_path / "a.json")
    values = json.loads((tmp_path / "a.json").read_text())
    damage(values)
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        load_calibration(tmp_path / "a.json", checkpoint, 1)


@pytest.mark.parametrize("sealed", [False, True])
def test_any_calibration_file_is_one_or_one_line(checkpoint, images, tmp_path, sealed):
    """`sealed`: by somebody who knows how the checksums are made."""
    path = tmp_path / "a.json"
    made = calibrate(checkpoint, 1, images=images.take(slice(0, 8)))
    made.save(path)
    values, refused = json.loads(path.read_text()), 0
    values["ranges"] = dict(list(values["ranges"].items())[:4])
    values["ranges_sha256"] = digest(values["ranges"])
    with little_memory():
        for what, text in mutants(values, 400, seed=sealed):
            if sealed:
                with suppress(ValueError, TypeError, KeyError, RecursionError):
                    changed = json.loads(text)
                    c = changed | {"ranges_sha256": digest(changed["ranges"])}
                    c["id"] = digest([c[k] for k in ("weights_sha256", "preprocessing", "steps", "data", "estimator")])
                    text = json.dumps(c)
            path.write_text(text)
            with refused_or_read(what) as said:
                found = load_calibration(path, checkpoint, 1)
                assert sealed or (found.id, found.method) == (made.id, made.method)
                for extent in found.ranges.values():
                    for target in ("cpu", "tensorrt"):
                        params = quant_params(extent, target)
                        assert 0 < params.scale < np.inf
                        assert params.lowest <= params.zero_point <= params.highest
                    assert sealed or extent in made.ranges.values()
                f"{found.data['name']} {found.data['count']:d} {found.note}"
            refused += bool(said)
    assert refused > 200


def test_no_flipped_bit_changes_a_scale(checkpoint, images, tmp_path):
    path = tmp_path / "a.json"
    made = calibrate(checkpoint, 1, images=images.take(slice(0, 8)))
    made.save(path)
    raw, dice = path.read_bytes(), random.Random(0)
    for bit in dice.sample(range(8 * len(raw)), 600):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with refused_or_read(f"bit {bit}"):
            assert load_calibration(path, checkpoint, 1).ranges == made.ranges


def test_what_cannot_be_calibrated(checkpoint, images):
    constant = replace(images, pixels=np.full_like(images.pixels, 7))
    with pytest.raises(UserError, match="130 calibration images are all the same"):
        calibrate(checkpoint, 1, images=constant)
    with pytest.raises(UserError, match="image is alone"):
        calibrate(checkpoint, 1, images=images.take(slice(0, 1)))
    with pytest.raises(UserError, match="no images"):
        calibrate(checkpoint, 1, images=images.take(slice(0, 0)))
    weights = {k: v * 1e38 if k == "block.1.out.weight" else v for k, v in checkpoint.weights.items()}
    broken = Checkpoint(model=checkpoint.model, data={}, weights=weights, source="broken")
    with pytest.raises(UserError, match=r"NaN or infinite at step 1, latents, block\.1\.ffn\.up"):
        calibrate(broken, 1, images=images)


@pytest.mark.slow
def test_images_come_from_the_training_part_or_from_photographs(checkpoint, tmp_path):
    found, note = calibration_images(checkpoint)
    assert (found.name, found.split, len(found), note) == ("digits", "train", CALIBRATION_IMAGES, "")
    test = {p.tobytes() for p in load("digits", "test").pixels}
    assert not any(p.tobytes() in test for p in found.pixels)
    elsewhere = replace(checkpoint, data={"name": "no-such-set"})
    photographs, note = calibration_images(elsewhere)
    assert (photographs.name, len(photographs)) == ("photo crops", CALIBRATION_IMAGES)
    assert "no-such-set" in note
    assert calibrate(elsewhere, 1).note == note
    with pytest.raises(UserError, match="cifar10"):
        calibration_images(replace(checkpoint, data={"name": "cifar10"}), tmp_path)


def test_a_missing_site_and_another_kind_of_model_are_named(checkpoint, images):
    made = calibrate(checkpoint, 1, images=images)
    lacking = {site: r for site, r in made.ranges.items() if site != Site(1, "latents", "block.1.k")}
    with pytest.raises(UserError, match=r"it has no range for 1/latents/block\.1\.k: calibrate again"):
        check_calibration(replace(made, ranges=lacking), checkpoint, 1, "it")
    config = preset("resnet18")
    other = Checkpoint(model=config, data={}, weights=build_model(config).state_dict(), source="net")
    with pytest.raises(UserError, match="net is a resnet: a calibration is for ViTRMs, ViTs and CCTs"):
        calibrate(other, 1, images=images)


@pytest.mark.slow
def test_the_states_error_and_its_picture(checkpoint, images, tmp_path, monkeypatch):
    made = calibrate(checkpoint, STEPS, images=images)
    floats = images.floats(slice(0, 64))
    found = {
        (target, shared): state_error(checkpoint, quant_table(made, target, shared=shared), floats, STEPS)
        for target in ("cpu", "tensorrt")
        for shared in (False, True)
    }
    for error in found.values():
        assert len(error.y) == len(error.z) == STEPS
        assert all(10 < v < 60 for v in (*error.y, *error.z)), "int8 keeps 8 bits at most, and something"
    # With ranges ten times too wide, an error ten times as large: 20 dB.
    wide = replace(made, ranges={site: Range(10 * r.low, 10 * r.high) for site, r in made.ranges.items()})
    worse = state_error(checkpoint, quant_table(wide, "cpu", shared=False), floats, STEPS)
    assert 8 < np.mean(found["cpu", False].z) - np.mean(worse.z) < 25
    seen = pictures.watch(monkeypatch)
    draw_state_error(found["cpu", True], found["cpu", False], made, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert {
        "revising the latents z",
        "reading the answer y",
        "answer y, one range for all",
        "latents z, ranges by step",
    } <= set(seen)
    assert torch.is_grad_enabled()
