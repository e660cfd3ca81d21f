"""Training runs: continued ones equal uninterrupted ones, and nothing is ever half-written."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vitrm import checkpoint, data
from vitrm.config import preset
from vitrm.data import Splits, limited
from vitrm.errors import UserError
from vitrm.recipe import recipe
from vitrm.training.evaluate import accuracy_by_depth
from vitrm.training.loop import train
from vitrm.training.parallel.device import Execution
from vitrm.training.progress import Reporter
from vitrm.training.run_folder.files import RunFiles
from vitrm.training.run_folder.state import STATE_FILE, read_header

pytestmark = pytest.mark.slow

EVERY_BATCH = Execution(device="cpu", save_every=0.0)
TIMES = ("seconds", "images_per_s")


class Killed(Exception):
    """What the tests raise inside a run: like a kill, it gives the run no chance to save."""


class Recorder:
    """Keeps every batch's losses, and dies at the batch `at`, before its state is saved."""

    def __init__(self, at: tuple[int, int] | None = None) -> None:
        self.at = at
        self.losses: dict[tuple[int, int], list[float]] = {}

    def __call__(self, epoch: int, batch: int, losses: list[float]) -> None:
        if (epoch, batch) == self.at:
            raise Killed
        self.losses[epoch, batch] = losses


def _metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def whole(few, model, short, tmp_path_factory):
    """A run that nothing interrupted, with its losses."""
    recorder = Recorder()
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = train(model, short, few, folder, execution=EVERY_BATCH, on_batch=recorder, seed=5)
    return result, recorder.losses


@pytest.mark.parametrize("at", [(1, 2), (1, 0), (0, 0)], ids=["mid-epoch", "epoch's end", "first batch"])
@pytest.mark.parametrize("every", [0.0, 1e9], ids=["saved each batch", "saved at the start alone"])
def test_a_killed_run_continues_bit_for_bit(few, model, short, whole, tmp_path, at, every):
    result, losses = whole
    execution = replace(EVERY_BATCH, save_every=every)
    folder = tmp_path / "run"
    first, second = Recorder(at), Recorder()
    with pytest.raises(Killed):
        train(model, short, few, folder, execution=execution, on_batch=first, seed=5)
    continued = train(model, short, few, folder, execution=execution, on_batch=second, seed=5, resume=True)
    kept = len(losses) - len(second.losses)
    if every == 0:
        assert kept == len(first.losses)
    else:  # but for an epoch that a busy machine stretched so much that saving it cost a hundredth
        assert kept in (0, sum(epoch < at[0] for epoch, _ in losses))
    assert first.losses | second.losses == losses
    for key in first.losses.keys() & second.losses.keys():  # batches redone since the last state
        assert first.losses[key] == second.losses[key]
    assert _metrics(folder) == _metrics(result.out)
    assert continued.test_accuracy == result.test_accuracy
    for name in (STATE_FILE, checkpoint.WEIGHTS_FILE):
        one, two = load_file(folder / name), load_file(result.out / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one), name


def test_saving_after_epochs_costs_a_hundredth_of_the_time(few, model, short, whole, tmp_path, monkeypatch):
    saved = []
    save = RunFiles.save_state

    def slow(self, learner, progress):
        time.sleep(0.2)  # a hundred times as long is longer than the run
        saved.append((progress.epoch, progress.batch, (self.path / checkpoint.WEIGHTS_FILE).exists()))
        save(self, learner, progress)

    monkeypatch.setattr(RunFiles, "save_state", slow)
    minute = replace(EVERY_BATCH, save_every=60.0)
    train(model, short, few, tmp_path / "slow", execution=minute, seed=5)
    assert saved == [(0, 0, False), (3, 0, True), (3, 0, True)]  # at the start, after the last epoch, and tested
    # What an interruption finds unsaved is saved: the weights that the state tells of, too.
    saved.clear()

    def stop(epoch: int, batch: int, losses: list[float]) -> None:
        if (epoch, batch) == (1, 0):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="the state is saved"):
        train(model, short, few, tmp_path / "stopped", execution=minute, on_batch=stop, seed=5)
    assert saved == [(0, 0, False), (1, 1, True)]
    train(model, short, few, tmp_path / "stopped", execution=EVERY_BATCH, seed=5, resume=True)
    one, two = (load_file(folder / checkpoint.WEIGHTS_FILE) for folder in (tmp_path / "stopped", whole[0].out))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_different_seeds_differ(few, model, short, whole, tmp_path):
    recorder = Recorder()
    train(model, replace(short, epochs=1), few, tmp_path / "run", execution=EVERY_BATCH, on_batch=recorder, seed=6)
    assert recorder.losses[0, 0] != whole[1][0, 0]


def test_training_leaves_the_callers_random_numbers_alone(few, model, short, tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train(model, replace(short, epochs=1), few, tmp_path / "run", execution=EVERY_BATCH)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_run_folder_holds_a_checkpoint_that_says_what_it_is(whole, few, short):
    result, _ = whole
    assert {p.name for p in result.out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "metrics.jsonl",
        "curve.png",
        "state.safetensors",
        "results.json",
        "confusion.csv",
        "confusion.png",
        "mistakes.png",
    }
    assert (result.out / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    loaded = checkpoint.load(result.out)
    assert loaded.data["name"] == "digits"
    assert loaded.data["classes"] == [str(i) for i in range(10)]
    assert loaded.model.mean == data.normalization(few.train).mean
    assert loaded.training["recipe"]["epochs"] == short.epochs
    assert loaded.training["best_epoch"] == result.best_epoch
    assert loaded.training["test_accuracy"] == result.test_accuracy
    # The accuracies written down are those of the weights written down.
    found = accuracy_by_depth(loaded.build(), few.test, 6)
    assert found.accuracy == result.test_accuracy
    assert len(found.accuracy) == 6
    assert found.predictions.shape == found.halt_prob.shape == (6, 40)
    best = result.history[result.best_epoch - 1]
    assert len(best["validation_accuracy"]) == short.trained_depth == 4


def test_the_run_folder_holds_the_test_results_by_class(whole, few, short):
    result, _ = whole
    by_class = result.by_class
    found = accuracy_by_depth(checkpoint.load(result.out).build(), few.test, 4)
    assert by_class.accuracy == pytest.approx(result.test_accuracy[short.trained_depth - 1])
    assert by_class.balanced_accuracy == pytest.approx(found.balanced[3])
    values = json.loads((result.out / "results.json").read_text())
    assert values == by_class.to_dict()
    rows = (result.out / "confusion.csv").read_text().splitlines()
    assert rows[0] == "class,0,1,2,3,4,5,6,7,8,9"
    assert [[int(v) for v in row.split(",")[1:]] for row in rows[1:]] == by_class.confusion.tolist()
    assert result.training_images == torch.bincount(torch.from_numpy(few.train.labels), minlength=10).tolist()
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(result.out / name) as picture:
            assert min(picture.size) > 300
    # The probabilities are those of the answers; five of ten classes hold more labels than one.
    assert found.confidence.shape == found.in_top5.shape == (4, 40)
    assert (found.confidence >= 0.1).all()
    assert (found.in_top5 >= (found.predictions == few.test.labels)).all()
    assert found.in_top5.sum() > (found.predictions == few.test.labels).sum()


def _rare(digits, label: int, count: int) -> Splits:
    """Threes and eights, of which `count` in training are `label`; 20 and 20 in the test part."""

    def two(images, counts):
        rows = [np.flatnonzero(images.labels == digit)[:n] for digit, n in counts.items()]
        chosen = images.take(np.concatenate(rows))
        return replace(chosen, labels=(chosen.labels == 8).astype(np.int64), classes=("three", "eight"))

    other = 11 - label
    return Splits(
        two(digits.train, {label: count, other: 120}),
        two(digits.validation, {label: 3, other: 14}),
        two(digits.test, {label: 20, other: 20}),
    )


def test_with_balancing_the_recall_of_a_rare_class_rises(digits, model, tmp_path):
    data = _rare(digits, 8, 5)
    recalls, mean = {}, {}
    for balance in ("none", "loss", "sampling"):
        chosen = recipe("fast", epochs=16, batch_size=16, lr=5e-3, balance=balance, flip="off", crop_padding=0)
        result = train(replace(model, dropout=0.0), chosen, data, tmp_path / balance, execution=Execution(device="cpu"))
        recalls[balance], mean[balance] = result.by_class.recall[1], result.by_class.balanced_accuracy
    assert recalls["none"] < 0.2
    assert recalls["sampling"] > recalls["none"] + 0.15
    assert recalls["loss"] > recalls["none"] + 0.15
    assert min(mean["sampling"], mean["loss"]) > mean["none"] + 0.05  # it is not that all is taken for the rare class


def test_a_frozen_tokenizer_stays_as_it_came(few, model, short, whole, tmp_path):
    init = checkpoint.load(whole[0].out)
    chosen = replace(short, freeze="tokenizer", epochs=1)
    with pytest.raises(UserError, match=r"freeze is 'tokenizer', .*name them with --init RUN"):
        train(model, chosen, few, tmp_path / "without")
    result = train(model, chosen, few, tmp_path / "run", init=init, execution=EVERY_BATCH)
    after = checkpoint.load(result.out).weights
    changed = {name for name, value in init.weights.items() if not torch.equal(value, after[name])}
    assert any(name.startswith("tokenizer.") for name in after)
    assert not any(name.startswith("tokenizer.") for name in changed)
    assert any(name.startswith("block.") for name in changed)
    # What it was resumed from is no --init, and is there all the same.
    assert train(model, chosen, few, tmp_path / "run", execution=EVERY_BATCH, resume=True).epochs == 1


def test_metrics_have_one_line_per_epoch(whole):
    result, _ = whole
    assert [line["epoch"] for line in _metrics(result.out)] == [1, 2, 3]
    for line in result.history:
        assert 1 <= line["steps"] <= 2
        assert 0 <= line["halt"] <= 1
        assert line["images_per_s"] > 0


def test_a_finished_run_is_not_run_again(whole, few, model, short):
    recorder = Recorder()
    again = train(model, short, few, whole[0].out, execution=EVERY_BATCH, on_batch=recorder, seed=5, resume=True)
    assert recorder.losses == {}
    assert again.test_accuracy == whole[0].test_accuracy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, "recipe.lr is 0.5, the run has 0.001"),
        ({"epochs": 30}, "recipe.epochs is 30, the run has 3 .*shapes the learning rate's schedule"),
    ],
)
def test_another_recipe_cannot_resume_a_run(whole, few, model, short, changes, message):
    with pytest.raises(UserError, match=message):
        train(model, replace(short, **changes), few, whole[0].out, seed=5, resume=True)


def test_a_run_goes_on_with_another_batch_size_behind_the_images_that_it_learned(few, model, short, tmp_path):
    """Of 70 images in batches of 16 it has learned 32 of the second epoch: in batches of 8 it goes on with the fifth of eight."""
    said: list[str] = []

    class Listener(Reporter):
        def say(self, text):
            said.append(text)

    first, second = Recorder((1, 2)), Recorder()
    with pytest.raises(Killed):
        train(model, short, few, tmp_path / "run", execution=EVERY_BATCH, on_batch=first)
    smaller = replace(short, batch_size=8)
    result = train(
        model, smaller, few, tmp_path / "run", execution=EVERY_BATCH, on_batch=second, resume=True, reporter=Listener()
    )
    assert sorted(second.losses) == [(1, i) for i in range(4, 8)] + [(2, i) for i in range(8)]
    assert any("from here on 8 images a batch instead of 16" in text for text in said)
    means = result.history[1]
    assert 0 <= means["train_accuracy"] <= 1
    steps = [len(losses) for (epoch, _), losses in first.losses.items() if epoch == 1]
    steps += [len(losses) for (epoch, _), losses in second.losses.items() if epoch == 1 for _ in range(1)]
    assert 1 <= means["steps"] <= max(steps)
    assert read_header(tmp_path / "run" / STATE_FILE)["identity"]["recipe"]["batch_size"] == 8
    # And it is a run of that batch size from then on.
    train(model, smaller, few, tmp_path / "run", execution=EVERY_BATCH, resume=True)


def test_another_model_seed_or_data_cannot_resume_a_run(whole, few, model, short):
    with pytest.raises(UserError, match=r"model\.latents is 4, the run has 2"):
        train(replace(model, latents=4), short, few, whole[0].out, seed=5, resume=True)
    with pytest.raises(UserError, match="seed is 1, the run has 5"):
        train(model, short, few, whole[0].out, seed=1, resume=True)
    fewer = replace(few, train=limited(few.train, 64))
    with pytest.raises(UserError, match=r"data\.train is 64, the run has 70"):
        train(model, short, fewer, whole[0].out, seed=5, resume=True)


def test_a_folder_with_a_run_or_something_else_is_not_written_to(whole, few, model, short, tmp_path):
    before = {p.name: p.read_bytes() for p in whole[0].out.iterdir()}
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        train(model, short, few, whole[0].out)
    assert {p.name: p.read_bytes() for p in whole[0].out.iterdir()} == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(UserError, match="not empty and holds no run"):
        train(model, short, few, tmp_path / "letters")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        train(model, short, few, tmp_path / "letters" / "a.txt")
    with pytest.raises(UserError, match="nothing to resume"):
        train(model, short, few, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other"])
def test_a_damaged_state_is_refused(whole, few, model, short, tmp_path, damage):
    folder = tmp_path / "run"
    folder.mkdir()
    raw = bytearray((whole[0].out / STATE_FILE).read_bytes())
    if damage == "flipped":
        raw[-40] ^= 255
    content = {
        "cut": raw[:-100],
        "flipped": raw,
        "emptied": b"",
        "other": (whole[0].out / "model.safetensors").read_bytes(),
    }
    (folder / STATE_FILE).write_bytes(content[damage])
    with pytest.raises(UserError, match="cannot be read as a training state"):
        train(model, short, few, folder, seed=5, resume=True)


def test_a_diverging_run_stops_and_keeps_its_last_good_state(few, model, short, tmp_path):
    wild = replace(short, lr=1e18, warmup=0.5, n_sup=1, randaugment_ops=0)
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"not finite|diverged"):
        train(model, wild, few, folder, execution=EVERY_BATCH)
    header = read_header(folder / STATE_FILE)
    assert header["epoch"] * 4 + header["batch"] < 3 * 4
    assert all(v.isfinite().all() for v in load_file(folder / STATE_FILE).values())
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("Resource temporarily unavailable"),  # a thread's stack
        ImportError("x.so: failed to map segment from shared object"),
    ],
)
def test_too_little_memory_within_a_run_keeps_its_state(few, model, short, whole, tmp_path, error):
    def full(epoch: int, batch: int, losses: list[float]) -> None:
        if (epoch, batch) == (1, 2):
            raise error

    with pytest.raises(UserError, match="out of memory: free some, and --resume goes on from the state saved last"):
        train(model, short, few, tmp_path / "run", execution=EVERY_BATCH, on_batch=full, seed=5)
    continued = train(model, short, few, tmp_path / "run", execution=EVERY_BATCH, seed=5, resume=True)
    assert continued.test_accuracy == whole[0].test_accuracy


def test_early_stopping_keeps_the_best_epoch(few, model, tmp_path):
    # A learning rate this small changes no answer: nothing is gained after the first epochs.
    stuck = recipe("fast", epochs=30, batch_size=64, lr=1e-12, final_lr=0.0, patience=2, ema_decay=0.0)
    result = train(model, stuck, few, tmp_path / "run")
    assert result.epochs == result.best_epoch + 2 < 30
    assert checkpoint.load(tmp_path / "run").training["best_epoch"] == result.best_epoch


def test_selection_never_sees_the_test_images(few, model, short, whole, tmp_path):
    shuffled = replace(few.test, labels=(few.test.labels + 1) % 10)
    result = train(model, short, replace(few, test=shuffled), tmp_path / "run", execution=EVERY_BATCH, seed=5)
    assert _metrics(tmp_path / "run") == _metrics(whole[0].out)
    assert result.best_epoch == whole[0].best_epoch


def test_a_baseline_trains_and_resumes(few, tmp_path):
    config = preset("vit-small", dim=16, layers=1, heads=2, mlp=16)
    chosen = recipe("paper", "vit", epochs=2, batch_size=16, lr=1e-3)
    whole, first, second = Recorder(), Recorder((1, 1)), Recorder()
    result = train(config, chosen, few, tmp_path / "a", execution=EVERY_BATCH, on_batch=whole)
    with pytest.raises(Killed):
        train(config, chosen, few, tmp_path / "b", execution=EVERY_BATCH, on_batch=first)
    train(config, chosen, few, tmp_path / "b", execution=EVERY_BATCH, on_batch=second, resume=True)
    assert first.losses | second.losses == whole.losses
    assert len(result.test_accuracy) == 1
    assert result.history[0]["validation_halt"] == []


def test_batch_norm_statistics_survive_resuming(few, tmp_path):
    config = preset("resnet18")
    tiny = Splits(limited(few.train, 16), few.validation.take(slice(0, 8)), few.test.take(slice(0, 8)))
    chosen = recipe("fast", epochs=2, batch_size=8, lr=1e-3)
    each_epoch = replace(EVERY_BATCH, save_every=1e9)
    whole, first, second = Recorder(), Recorder((1, 0)), Recorder()
    train(config, chosen, tiny, tmp_path / "a", execution=each_epoch, on_batch=whole)
    with pytest.raises(Killed):
        train(config, chosen, tiny, tmp_path / "b", execution=each_epoch, on_batch=first)
    train(config, chosen, tiny, tmp_path / "b", execution=each_epoch, on_batch=second, resume=True)
    assert first.losses | second.losses == whole.losses
    one, two = (load_file(tmp_path / run / STATE_FILE) for run in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_few_epochs_learn_digits(digits, tmp_path):
    part = replace(digits, train=limited(digits.train, 512))
    config = preset("tiny", image_size=32)
    chosen = recipe("fast", epochs=10, batch_size=32, lr=4e-3, n_sup=1, crop_padding=1)
    result = train(config, chosen, part, tmp_path / "run", execution=Execution(precision="fp32"))
    assert result.test_accuracy[0] > 0.4  # 0.6 to 0.8, as torch's version draws; 0.1 is chance
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]


def test_a_run_may_start_from_other_weights(few, model, short, whole, tmp_path):
    init = checkpoint.load(whole[0].out)
    still = replace(short, epochs=1, lr=1e-12, final_lr=0.0)
    result = train(model, still, few, tmp_path / "still", execution=EVERY_BATCH, init=init)
    assert result.test_accuracy == whole[0].test_accuracy
    made = checkpoint.load(tmp_path / "still")
    for name, tensor in init.weights.items():
        torch.testing.assert_close(made.weights[name], tensor, atol=1e-8, rtol=0)
    assert made.training["init"] == {"run": "run", "weights_sha256": init.weights_id}
    # Killed and resumed, it is the same run, and needs the other no more.
    with pytest.raises(Killed):
        train(model, still, few, tmp_path / "b", execution=EVERY_BATCH, init=init, on_batch=Recorder((0, 2)))
    train(model, still, few, tmp_path / "b", execution=EVERY_BATCH, resume=True)
    assert checkpoint.load(tmp_path / "b").weights_id == made.weights_id
    assert checkpoint.load(tmp_path / "b").training["init"] == made.training["init"]


def test_other_classes_get_a_new_classifier_and_other_models_are_refused(few, model, short, whole, tmp_path):
    init = checkpoint.load(whole[0].out)
    letters = [replace(part, classes=tuple("abcdefghij")) for part in vars(few).values()]
    still = replace(short, epochs=1, lr=1e-12, final_lr=0.0)
    train(model, still, Splits(*letters), tmp_path / "letters", execution=EVERY_BATCH, init=init)
    classifier = checkpoint.load(tmp_path / "letters").weights["classifier.weight"]
    assert (classifier - init.weights["classifier.weight"]).abs().max() > 1e-3, "letters are no digits"
    halves = [replace(part, labels=part.labels // 5, classes=("low", "high")) for part in vars(few).values()]
    train(model, still, Splits(*halves), tmp_path / "halves", execution=EVERY_BATCH, init=init)
    made = checkpoint.load(tmp_path / "halves")
    assert made.weights["classifier.weight"].shape[0] == 2
    torch.testing.assert_close(made.weights["block.0.q.weight"], init.weights["block.0.q.weight"], atol=1e-8, rtol=0)
    with pytest.raises(UserError, match=r"another model than asked for \(latents 3 against 2\)"):
        train(replace(model, latents=3), still, few, tmp_path / "c", init=init)
    with pytest.raises(UserError, match="leave out --init"):
        train(model, still, few, tmp_path / "halves", init=init, resume=True)
