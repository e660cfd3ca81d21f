"""What one batch does: updates per step, detached states, gradients through steps, the averaged weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_cuda import Watch, fake_cuda, moved
from small_learners import make_batch, make_learner
from small_models import SMALL
from torch import Tensor

from vitrm.baselines.networks import CLASSIFIERS
from vitrm.checkpoint import build_model
from vitrm.config import PRESETS, preset
from vitrm.errors import UserError
from vitrm.recipe import RECIPES, Recipe, recipe
from vitrm.training.augmentation import rand_augment
from vitrm.training.augmentation.augment import Batch, augment
from vitrm.training.augmentation.rand_augment import apply_operations
from vitrm.training.ema import EMA, decay_at
from vitrm.training.optimizers import make_optimizers
from vitrm.training.parallel.cpu_workers import Workers
from vitrm.training.supervision import BatchPart, Learner, StepFunctions, step_loss

CONFIG = preset("tiny", dim=16, heads=2, layers=1, latents=2, n=1)


def _learner(**changes):
    return make_learner(CONFIG, **changes)


def _set_halt(learner, value):
    with torch.no_grad():
        learner.model.halt.weight.zero_()
        learner.model.halt.bias.fill_(value)


def test_sequential_supervision_updates_after_every_step():
    learner = _learner(supervision="sequential", n_sup=4)
    _set_halt(learner, -5.0)
    result = learner.train_step(make_batch(), 1e-4)
    assert result.updates == len(result.losses) == 4
    assert learner.updates == 4
    assert int(learner.optimizers[0].state[learner.model.classifier.bias]["step"]) == 4


def test_sequential_supervision_ends_once_the_batch_believes_it_is_right():
    learner = _learner(supervision="sequential", n_sup=4)
    _set_halt(learner, 5.0)
    assert learner.train_step(make_batch(), 1e-4).updates == 1


def test_sequential_steps_start_from_detached_states():
    learner = _learner(supervision="sequential", n_sup=2)
    _set_halt(learner, -5.0)
    learner.train_step(make_batch(), 1e-4)
    # The gradient left is the second step's: it ends at the state that the first step handed over.
    assert learner.model.y0.grad is None
    assert learner.model.z0.grad is None
    assert learner.model.pos.grad is not None


@pytest.mark.slow
def test_joint_supervision_takes_the_gradient_through_all_steps():
    learner = _learner(supervision="joint", n_sup=3, clip_norm=0.0, step_weight_power=1.0)
    batch = make_batch()
    reference = build_model(CONFIG)
    reference.load_state_dict(learner.model.state_dict())
    embedded, state, total = reference.embed(batch.images), reference.initial_state(8), 0.0
    for weight in (0.5, 1.0, 1.5):
        state = reference.step(embedded, state)
        logits, halt = reference.head_logits(state.y)
        right = (logits.argmax(1) == batch.label).float()
        total = total + weight / 3 * (
            F.cross_entropy(logits, batch.label) + F.binary_cross_entropy_with_logits(halt, right)
        )
    total.backward()
    result = learner.train_step(batch, 1e-4)
    assert result.updates == 1
    assert len(result.losses) == 3
    for name, parameter in learner.model.named_parameters():
        assert torch.allclose(parameter.grad, dict(reference.named_parameters())[name].grad, atol=1e-6), name
    assert float(learner.model.y0.grad.abs().sum()) > 0


@pytest.mark.slow
def test_supervised_steps_look_where_the_free_ones_stopped():
    """Of two free and two supervised steps the latter look at the third and fourth view, and their tokens have the classifier's loss."""
    batch = make_batch()
    looking = replace(CONFIG, glimpses="mirror")
    learner = make_learner(looking, supervision="joint", n_sup=2, clip_norm=0.0, token_weight=0.7)
    twin = build_model(learner.model.config)
    twin.load_state_dict(learner.model.state_dict())
    state, total = twin.initial_state(8), 0.0
    with torch.no_grad():
        for _ in range(2):
            state = twin.step(twin.embed(batch.images), state)
    state = twin.state(*state.carried)
    for number in (2.0, 3.0):
        assert (state.glimpse == number).all()
        x = twin.tokens(twin.glimpses(batch.images, state.glimpse))
        state = twin.step(twin.embed(batch.images), state)
        logits, halt = twin.head_logits(state.y)
        right = (logits.argmax(1) == batch.label).float()
        own = F.cross_entropy(logits, batch.label) + F.binary_cross_entropy_with_logits(halt, right)
        total = total + own / 2 + 0.35 * F.cross_entropy(twin.classifier(x.max(1).values), batch.label)
    total.backward()
    learner.train_step(batch, 1e-4, free_steps=2)
    for (name, parameter), other in zip(learner.model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(
                parameter.grad, other.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("supervision", ["joint", "sequential"])
def test_the_classifier_answers_from_the_tokens_too(supervision):
    """What `token_weight` adds to every gradient is its loss's, computed on its own."""
    batch, gradients = make_batch(), []
    for weight in (0.0, 0.7):
        learner = _learner(supervision=supervision, n_sup=1, clip_norm=0.0, token_weight=weight)
        twin = build_model(CONFIG)
        twin.load_state_dict(learner.model.state_dict())
        learner.train_step(batch, 1e-4)
        gradients.append([p.grad for p in learner.model.parameters()])
    x = twin.tokens(batch.images)
    (0.7 * F.cross_entropy(twin.classifier(x.max(1).values), batch.label)).backward()
    assert twin.pos.grad.abs().max() > 0
    for without, added, parameter in zip(*gradients, twin.parameters(), strict=True):
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(added, without + own)


@pytest.mark.slow
@pytest.mark.parametrize("supervision", ["joint", "sequential"])
def test_free_steps_are_not_in_the_gradient_but_change_the_state(supervision):
    with_free, without = (_learner(supervision=supervision, n_sup=1) for _ in range(2))
    deep = with_free.train_step(make_batch(), 1e-4, free_steps=2)
    shallow = without.train_step(make_batch(), 1e-4)
    assert with_free.model.y0.grad is None
    assert without.model.y0.grad is not None
    assert float(deep.losses[0]) != float(shallow.losses[0])


def test_free_steps_give_the_state_that_as_many_steps_give():
    learner = _learner(supervision="joint", n_sup=1, clip_norm=0.0)
    batch = make_batch()
    with torch.no_grad():
        logits, halts = learner.model.trajectory(batch.images, 3)
    right = (logits[2].argmax(1) == batch.label).float()
    expected = F.cross_entropy(logits[2], batch.label) + F.binary_cross_entropy(halts[2], right)
    result = learner.train_step(batch, 1e-4, free_steps=2)
    assert float(result.losses[0]) == pytest.approx(float(expected), rel=1e-4)


def test_the_gradient_survives_free_steps_under_autocast():
    # Autocast caches the weights it casts; those cast without gradient must not serve the supervised step.
    learner = _learner(supervision="joint", n_sup=1, clip_norm=0.0)
    learner.bf16 = True
    learner.train_step(make_batch(), 1e-4, free_steps=1)
    assert float(learner.model.block[0].ffn.up.weight.grad.abs().sum()) > 0


def test_the_halting_target_is_whether_the_answer_is_the_unmixed_label():
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    halt = torch.tensor([1.0, -2.0])
    target = torch.tensor([[0.3, 0.7], [0.6, 0.4]])  # mixed: the larger share is the other class
    label = torch.tensor([0, 0])
    loss, right = step_loss(logits, halt, target, label, 0.5)
    assert right.tolist() == [True, False]
    expected = -(target * logits.log_softmax(1)).sum(1).mean() + 0.5 * F.binary_cross_entropy_with_logits(
        halt, torch.tensor([1.0, 0.0])
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_levels_are_not_decayed_and_slopes_are():
    model = build_model(CONFIG)
    decayed, plain = make_optimizers(model, recipe("paper"))[0].param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    of_plain = {names[id(p)] for p in plain["params"]}
    assert plain["weight_decay"] == 0
    assert decayed["weight_decay"] == 0.05
    assert {"pos", "y0", "z0", "classifier.bias", "block.0.norm1.weight"} <= of_plain
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - of_plain
    assert "classifier.weight" not in of_plain
    assert len(make_optimizers(model, recipe("paper", decay_all=True))[0].param_groups) == 1


def test_ema_follows_its_formula():
    model = torch.nn.Linear(2, 1)
    ema = EMA(model, 0.5)
    expected = model.weight.detach().clone()
    for update in range(6):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update(model, update)
        d = min(0.5, (1 + update) / (10 + update))
        expected = d * expected + (1 - d) * model.weight.detach()
        assert torch.allclose(ema.model.weight, expected, atol=1e-6)
    assert decay_at(0, 0.999) == 0.1
    assert decay_at(10**6, 0.999) == 0.999
    assert not ema.model.weight.requires_grad


def test_ema_averages_batch_norm_statistics_and_copies_counts():
    model = torch.nn.BatchNorm1d(2)
    ema = EMA(model, 0.9)
    model.train()(torch.randn(4, 2) + 3)
    ema.update(model, 0)
    assert int(ema.model.num_batches_tracked) == 1
    assert torch.allclose(ema.model.running_mean, 0.9 * model.running_mean)


@pytest.mark.slow
def test_a_baseline_learns_with_the_same_recipe():
    torch.manual_seed(0)
    learner = Learner(
        build_model(preset("vit-small", dim=16, layers=1, heads=2, mlp=16)), recipe("paper"), torch.device("cpu"), False
    )
    losses = [float(learner.train_step(make_batch(), 1e-2).losses[0]) for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ["nano-v2", "resnet20", "mobilenetv2-cifar", "cct-7-3x1"])
def test_muon_is_for_hidden_matrices_and_for_no_classifier(name):
    model = build_model(preset(name))
    adamw, muon = make_optimizers(model, recipe("nano-v2"))
    names = {id(p): n for n, p in model.named_parameters()}
    of_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    of_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert of_muon | of_adamw == set(names.values())
    assert not of_muon & of_adamw
    assert all(p.ndim > 1 for group in muon.param_groups for p in group["params"])
    assert not any(n.startswith(CLASSIFIERS) for n in of_muon)
    assert any(n.startswith(CLASSIFIERS) for n in of_adamw)


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "glimpses"), [(1, "none"), (1, "shift"), (2, "mirror")])
def test_a_frozen_tokenizer_keeps_weights_and_statistics_in_workers_too(parts, glimpses):
    workers = Workers(parts) if parts > 1 else None
    config = preset(
        "tiny", tokenizer="conv", conv_norm=True, conv_layers=3, conv_width=8, dropout=0.0, glimpses=glimpses
    )
    learner = make_learner(config, workers=workers, freeze="tokenizer", clip_norm=1.0, weight_decay=0.1)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    for _ in range(2):
        learner.train_step(make_batch(), 1e-2)
    after = learner.model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert "tokenizer.norms.0.running_mean" in after
    assert not any(name.startswith("tokenizer.") for name in changed)
    assert {"pos", "classifier.weight"} <= changed
    assert not any(name.startswith("tokenizer.") for name, p in learner.model.named_parameters() if p.grad is not None)


def test_what_a_model_does_not_have_cannot_be_frozen():
    with pytest.raises(UserError, match="a cifar-resnet has no tokenizer: leave out --freeze"):
        make_learner(preset("resnet20"), freeze="tokenizer")


# On a GPU, as far as one without data shows it (tests/fake_cuda.py) ------------------------------------


def cuda_batch(size: int, chosen: Recipe, seed: int) -> Batch:
    pixels = torch.zeros(size, 3, 32, 32, dtype=torch.uint8, device="cuda")
    return augment(
        pixels, torch.zeros(size, dtype=torch.int64, device="cuda"), 10, chosen, True, np.random.default_rng(seed)
    )


def watched(name: str, chosen: Recipe, monkeypatch: pytest.MonkeyPatch, *, size: int = 4, bf16: bool = True) -> Watch:
    """What the second batch of a run on a GPU does: drawing it and learning from it, with as many free steps as there are."""
    magnitude = chosen.randaugment_magnitude
    apply_operations(
        torch.zeros(28, 3, 32, 32, dtype=torch.uint8), np.arange(28)[None], magnitude
    )  # tables of the host
    model = build_model(preset(name, **SMALL.get(name, {})))
    watch = Watch()
    try:
        with fake_cuda(monkeypatch):
            learner = Learner(moved(model), chosen, torch.device("cuda"), bf16)
            for seed in range(2):
                if seed:
                    watch.__enter__()
                learner.train_step(cuda_batch(size, chosen, seed), 1e-3, chosen.free_steps)
            watch.__exit__(None, None, None)
    finally:
        rand_augment._tables.cache_clear()  # they are no tensors
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p is not getattr(model, "y0", None)
               and p is not getattr(model, "z0", None))  # fmt: skip
    return watch


FORMS = [(name, "anytime") for name in PRESETS if PRESETS[name].kind == "vitrm"]
FORMS += [("tiny", name) for name in RECIPES if name != "anytime"] + [(name, "paper") for name in SMALL]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "by"), FORMS, ids=["-".join(form) for form in FORMS])
def test_a_batch_is_learned_on_a_gpu_without_waiting(
    name: str, by: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    config = preset(name)
    watch = watched(name, recipe(by, config.kind), monkeypatch, bf16=name != "tiny")
    assert watch.launches > 100
    assert watch.waits == []
    assert not [w for w in recwarn if "autocast" in str(w.message).lower()]


def test_ending_a_batch_early_waits_once_for_each_step_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[Tensor] = []
    monkeypatch.setattr(Learner, "_mean_over_processes", lambda self, halt: decided.append(halt) or 0.0)
    watch = watched("tiny", recipe("paper", n_sup=3), monkeypatch)
    assert len(decided) == 2 * 2  # of two batches: each is compared, and so waited for
    assert watch.waits == []


def test_kernels_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watched("paper", recipe("paper"), monkeypatch, size=128)
    # Uncompiled.  The model alone takes 472 and copies that join tokens: docs/train/speed.md counts them.
    assert watch.launches <= 908
    assert watch.kernels["_foreach_copy_"] <= 2  # weights to bfloat16 and gradients back, once per update
    assert watch.kernels["_fused_adamw_"] <= 3
    assert watch.kernels["_foreach_lerp_"] <= 2


GRAPHS = [("tiny", name) for name in RECIPES]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "by"), GRAPHS, ids=["-".join(form) for form in GRAPHS])
def test_what_is_compiled_is_one_graph(name: str, by: str) -> None:
    torch._dynamo.reset()
    learner = make_learner(preset(name), replicated=True)
    chosen = recipe(by, "vitrm")
    functions = StepFunctions(
        learner.replicas[0].model,
        chosen,
        lambda _, function: torch.compile(function, backend="eager", fullgraph=True, dynamic=False),
    )
    learner.to_train_mode()
    result = learner.compute(functions, BatchPart(make_batch(), None), min(1, chosen.free_steps))
    result.loss.backward()
    learner.compute(functions, BatchPart(make_batch(), None, result.state)).loss.backward()
