"""Recipes and the TOML files that change them."""

import re
from pathlib import Path

import pytest

from vitrm.errors import UserError
from vitrm.recipe import RECIPES, Recipe, default_recipe, from_dict, recipe
from vitrm.training.optimizers import learning_rate
from vitrm.training.run_config import RunConfig, read


def test_the_papers_recipe():
    paper = recipe("paper")
    assert (paper.epochs, paper.batch_size, paper.lr, paper.weight_decay) == (1000, 128, 3e-4, 0.05)
    assert (paper.beta1, paper.beta2, paper.ema_decay, paper.patience) == (0.9, 0.999, 0.999, 10)
    assert (paper.randaugment_ops, paper.randaugment_magnitude) == (2, 9)
    assert (paper.mixup_alpha, paper.cutmix_alpha) == (0.2, 1.0)
    assert (paper.supervision, paper.n_sup, paper.halt_threshold) == ("sequential", 1, 0.5)
    assert recipe("paper", "resnet").epochs == 300


@pytest.mark.parametrize(
    ("preset", "kind", "expected"),
    [
        ("paper", "vitrm", "paper"),
        ("paper-swiglu", "vitrm", "paper"),
        ("paper+", "vitrm", "paper+"),
        ("resnet18", "resnet", "paper"),
        ("nano", "vitrm", "anytime"),
    ],
)
def test_the_default_recipe_of_a_preset(preset, kind, expected):
    assert default_recipe(preset, kind) == expected


def test_learning_rate_rises_linearly_then_falls_as_a_cosine():
    paper = recipe("paper")
    assert learning_rate(paper, 0.015) == pytest.approx(1.5e-4)
    assert learning_rate(paper, 0.03) == pytest.approx(3e-4)
    assert learning_rate(paper, 0.515) == pytest.approx((3e-4 + 1e-6) / 2)
    assert learning_rate(paper, 1.0) == pytest.approx(1e-6)


def test_step_weights_have_mean_one_and_grow_with_their_power():
    even = recipe("fast", n_sup=3).step_weights()
    rising = recipe("fast", n_sup=3, step_weight_power=1.0).step_weights()
    assert even == [1.0, 1.0, 1.0]
    assert rising == pytest.approx([0.5, 1.0, 1.5])


def test_free_steps_come_in_gradually():
    anytime = recipe("anytime", free_steps=4, free_ramp=0.5)
    assert [anytime.free_steps_at(p) for p in (0.0, 0.09, 0.11, 0.21, 0.41, 0.5, 1.0)] == [0, 0, 1, 2, 4, 4, 4]
    assert recipe("anytime", free_ramp=0.0).free_steps_at(0.0) == 4
    assert recipe("fast").free_steps_at(1.0) == 0
    assert anytime.trained_depth == 6


def test_digits_are_not_mirrored_unless_asked_for():
    assert not Recipe().flips("digits")
    assert Recipe().flips("cifar10")
    assert Recipe(flip="on").flips("digits")
    assert not Recipe(flip="off").flips("cifar10")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected a whole number from 1 to 1,000,000"),
        ({"epochs": "ten"}, "epochs is 'ten', expected a whole number"),
        ({"epochs": 1.5}, "epochs is 1.5, expected a whole number"),
        ({"epochs": True}, "expected a whole number"),
        ({"lr": "fast"}, "lr is 'fast', expected a number in"),
        ({"lr": float("nan")}, "lr is nan, expected a number in"),
        ({"lr": 0}, r"lr is 0, expected a number in \(0, 1e\+30\]"),
        ({"decay_all": 1}, "expected true or false"),
        ({"supervision": "deep"}, "'sequential'"),
        ({"flip": "sometimes"}, "'auto', 'on', 'off' or 'alternate'"),
        ({"warmup": 1.0}, r"\[0, 1\)"),
        ({"free_ramp": 1.5}, r"free_ramp is 1.5, expected a number in \[0, 1\]"),
        ({"learning_rate": 1.0}, "unknown key learning_rate for a recipe; known are epochs, batch_size, lr"),
    ],
)
def test_impossible_recipes_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(values, "recipe")


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(UserError, match=re.escape(f"unknown recipe 'slow': choose one of {', '.join(RECIPES)}")):
        recipe("slow")


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_sections_and_flat_keys_say_the_same(tmp_path):
    sections = read(
        _file(
            tmp_path,
            'seed = 3\n[data]\nname = "digits"\n[model]\npreset = "tiny"\nn = 2\n[recipe]\nname = "fast"\nlr = 1\n',
        )
    )
    flat = read(_file(tmp_path, 'seed = 3\ndata = "digits"\nmodel = "tiny"\nn = 2\nrecipe = "fast"\nlr = 1\n'))
    assert sections == flat
    assert flat == RunConfig(
        data={"name": "digits"}, model={"preset": "tiny", "n": 2}, recipe={"name": "fast", "lr": 1}, seed=3
    )


def test_flags_win_over_the_file(tmp_path):
    file = read(_file(tmp_path, 'model = "tiny"\nn = 2\nepochs = 4\nlr = 0.1\n'))
    merged = RunConfig(recipe={"epochs": 9}, seed=1).over(file)
    assert merged.recipe == {"epochs": 9, "lr": 0.1}
    assert merged.model == {"preset": "tiny", "n": 2}
    # Another preset is another model: the file's n was not meant for it.
    assert RunConfig(model={"preset": "nano"}).over(file).model == {"preset": "nano"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = \n", "is not valid TOML"),
        ("epoch = 3\n", "unknown key epoch; known are model, recipe, data, seed"),
        ("[recipe]\ndepth = 3\n", r"\[recipe\]: unknown key depth; known are name, epochs"),
        ("[model]\nclasses = 3\n", r"\[model\]: unknown key classes"),
        ("[data]\npath = 'x'\n", r"\[data\]: unknown key path; known are name, dir, download, limit_train"),
        ("seed = 'a'\n", "seed is 'a', expected a whole number"),
        ("[data]\ndownload = 1\n", "download is 1, expected true or false"),
        ("model = 3\n", "preset is 3, expected a text"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(_file(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "none.toml")
