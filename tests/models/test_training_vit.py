"""The pools' training loop: what it optimises, what it leaves alone, and that it goes on after a
kill.
"""

import contextlib
import math
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from oodlib.errors import OodlibError
from oodlib.models.small_vit import NETWORKS, small_vit
from oodlib.models.training import loop
from oodlib.models.training import vit as training
from oodlib.models.training.vit import VitRecipe, decay_integral, fit_vit

TINY = (16, 1, 2, (8, 16), (4, 4))
MEAN, STD = torch.full((3,), 0.5), torch.full((3,), 0.25)
N, CLASSES = 96, 4
LABELS = torch.arange(N) % CLASSES
PLAIN = VitRecipe(12 * 32, "sgd", 0.05, batch_size=32, shift=0, flip="none")
# every state that a resumed run must find again: momenta, class codes, dropout, both kinds of
# augmentation
RICH = VitRecipe(
    10 * 24, "adamw", 4e-3, objective="cosine", weight_decay=0.1, batch_size=24, aug="light1"
)


def pictures():
    """Noise, brighter in the quarter of the picture that says the class."""
    images = torch.randint(
        0, 100, (N, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    for image, label in zip(images, LABELS, strict=True):
        row, column = 16 * (int(label) // 2), 16 * (int(label) % 2)
        image[:, row : row + 16, column : column + 16] += 120
    return images


IMAGES = pictures()


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", TINY)


def run(recipe, *, seed=0, model=None, **options):
    """(model, history) of a fresh tiny network, or of the one given."""
    model = model or small_vit("tiny", CLASSES, dropout=0.1)
    return model, fit_vit(
        model, IMAGES, LABELS, recipe, mean=MEAN, std=STD, seed=seed, progress=False, **options
    )


def untimed(history):
    return [{**point, "seconds": None} for point in history]


def assert_equal(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


class Stop(Exception):
    pass


def stopping(step, stop):
    """`training._loss`, which calls ``stop`` in the step with this number, counted from 0 in this
    process.
    """
    whole, steps = training._loss, []

    def loss(*arguments):
        if len(steps) == step:
            stop()
        steps.append(1)
        return whole(*arguments)

    return loss


def give_up():
    raise Stop


# --- recipes


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    recipe = VitRecipe(1000 * 10, "adamw", 0.2, batch_size=10, warmup=0.1)
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert rates[99] == max(rates) == 0.2 and rates[0] == pytest.approx(0.002)
    assert rates[:100] == sorted(rates[:100]) and rates[99:] == sorted(rates[99:], reverse=True)
    assert rates[550] == pytest.approx(0.1) and recipe.rate(recipe.steps) == pytest.approx(
        0, abs=1e-12
    )


def test_a_last_batch_that_is_not_full_is_a_step():
    recipe = replace(PLAIN, samples=33)
    assert recipe.steps == 2
    assert run(recipe)[1][-1]["step"] == 2


def test_decay_integral_is_the_sum_over_the_steps():
    recipe = VitRecipe(50 * 8, "adamw", 0.01, batch_size=8, weight_decay=0.3)
    total = 0.0
    for step in range(50):
        total += 0.3 * recipe.rate(step)
    assert decay_integral(recipe) == pytest.approx(total)
    assert decay_integral(recipe) == pytest.approx(
        0.3 * 0.01 * 50 / 2, rel=0.05
    )  # a half cosine's mean is lr / 2


@pytest.mark.parametrize(("weight_decay", "integral"), [(0.03, 1.4), (0.1, 4.7)])
def test_decay_integrals_of_augreg_on_imagenet(weight_decay, integral):
    """300 epochs of 1,281,167 images in batches of 4096, 10,000 steps of warm-up, peak 1e-3."""
    steps = 300 * 1_281_167 // 4096
    recipe = VitRecipe(
        steps * 4096, "adamw", 1e-3, batch_size=4096, weight_decay=weight_decay, warmup=1e4 / steps
    )
    assert decay_integral(recipe) == pytest.approx(integral, abs=0.05)


@pytest.mark.parametrize(
    "option",
    [
        {"aug": "heavy"},
        {"objective": "hinge"},
        {"optimiser": "lamb"},
        {"samples": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
    ],
)
def test_a_recipe_out_of_range_is_refused(option):
    with pytest.raises(OodlibError, match=f"VitRecipe: .*{next(iter(option))}"):
        replace(PLAIN, **option)


# --- what a run does


@pytest.mark.parametrize(
    ("objective", "optimiser", "lr", "chance"),
    [
        ("softmax", "sgd", 0.05, math.log(4)),
        ("sigmoid", "adamw", 8e-3, math.log(4) + 3 * math.log(4 / 3)),
        ("cosine", "adamw", 4e-3, (math.log(4) + math.log(32)) / 2),
    ],
)
def test_the_loss_falls_below_that_of_class_frequencies(objective, optimiser, lr, chance):
    recipe = replace(PLAIN, samples=60 * 32, objective=objective, optimiser=optimiser, lr=lr)
    _, history = run(recipe, model=small_vit("tiny", CLASSES))
    assert history[-1]["loss"] < 0.85 * chance < history[0]["loss"]
    assert [point["step"] for point in history] == list(range(6, 61, 6))


def test_the_seed_decides_the_run():
    (first, history), (again, other_history), (other, _) = run(RICH), run(RICH), run(RICH, seed=1)
    assert_equal(first, again)
    assert untimed(history) == untimed(other_history)
    assert not torch.equal(first.norm.bias, other.norm.bias)
    assert not first.training


def test_augmentations_differ_from_none_and_from_each_other():
    weights = [
        run(replace(RICH, samples=48, aug=aug))[0].norm.bias
        for aug in ("none", "light1", "medium2")
    ]
    assert not any(
        torch.equal(a, b) for a, b in zip(weights, weights[1:] + weights[:1], strict=True)
    )


@pytest.mark.parametrize("end", [None, Stop])
def test_global_random_states_are_given_back(end, monkeypatch):
    if end:
        monkeypatch.setattr(training, "_loss", stopping(1, give_up))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with contextlib.suppress(Stop):
        run(replace(RICH, samples=72))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_random_state_of_the_device_in_use_is_given_back(monkeypatch):
    """A generator in the place of the CUDA device's, which dropout would draw from."""
    card, used = torch.Generator().manual_seed(3), []
    whole = training.random_state
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "default_generators", (card,))
    monkeypatch.setattr(
        training, "random_state", lambda device: used.append(device) or whole("cuda:0")
    )
    before = card.get_state()
    run(replace(RICH, samples=48))
    assert used == ["cpu"] and torch.equal(card.get_state(), before)


def test_weight_decay_touches_weight_matrices_and_filters_only():
    """One step at rate lr shrinks those by lr * weight_decay, whatever their gradient."""
    start = {
        name: p.detach().clone()
        for name, p in small_vit("tiny", CLASSES, dropout=0.1).named_parameters()
    }
    recipe = VitRecipe(32, "adamw", 0.01, objective="softmax", batch_size=32)
    free, decayed = (
        dict(run(replace(recipe, weight_decay=w))[0].named_parameters()) for w in (0.0, 0.5)
    )
    for name, p in start.items():
        shrinks = name.endswith("weight") and p.ndim > 1
        torch.testing.assert_close(
            free[name] - decayed[name],
            0.005 * p if shrinks else torch.zeros_like(p),
            atol=1e-7,
            rtol=1e-3,
        )
    assert {"pos_embed", "head.bias", "blocks.0.norm1.weight"} < set(start)


def test_the_penalty_makes_feature_norms_alike():
    def spread(penalty):
        model, _ = run(
            replace(PLAIN, samples=60 * 32, penalty=penalty), model=small_vit("tiny", CLASSES)
        )
        x = (IMAGES / 255 - 0.5) / 0.25
        with torch.no_grad():
            norms = model.forward_head(model.forward_features(x), pre_logits=True).norm(dim=1)
        return float(norms.std() / norms.mean())

    assert spread(3.0) < 0.7 * spread(0.0)


def test_an_infinite_loss_stops_the_run():
    with pytest.raises(OodlibError, match=r"fit_vit: step \d+ .* overflowed. Lower lr"):
        run(replace(PLAIN, lr=1e30, clip=1e30))


# --- objectives


class Features(nn.Module):
    """Stands for a network whose features are its parameters."""

    def __init__(self, features):
        super().__init__()
        self.features, self.head = (
            nn.Parameter(features),
            nn.Linear(features.shape[1], CLASSES).double(),
        )

    def forward_features(self, x):
        return self.features

    def forward_head(self, x, pre_logits):
        return x


@pytest.fixture
def batch():
    """Features (6, 5) and soft targets (6, 4), float64."""
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(6, 5, generator=g, dtype=torch.float64),
        torch.rand(6, CLASSES, generator=g, dtype=torch.float64).softmax(1),
    )


def loss_of(features, targets, recipe):
    model = Features(features)
    codes = training._class_codes(model, recipe, 0).double()
    return model, codes, training._loss(model, codes, features, targets, recipe)


def test_the_cosine_objective_and_its_gradients_are_infonce_both_ways(batch):
    """Pair by pair: -log of a pair's share among the classes of its image, and among the images of
    its class.
    """
    features, targets = batch
    model, codes, loss = loss_of(features, targets, RICH)
    loss.backward()
    z, w = features.clone().requires_grad_(), codes.weight.detach().clone().requires_grad_()
    scale = codes.log_scale.detach().clone().requires_grad_()
    e = [
        [
            torch.exp(
                torch.exp(scale) * (z[i] @ w[c]) / (z[i] @ z[i]).sqrt() / (w[c] @ w[c]).sqrt()
            )
            for c in range(CLASSES)
        ]
        for i in range(6)
    ]
    expected = (
        sum(
            -targets[i, c]
            * (torch.log(e[i][c] / sum(e[i])) + torch.log(e[i][c] / sum(row[c] for row in e)))
            for i in range(6)
            for c in range(CLASSES)
        )
        / 12
    )
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for found, wanted in ((model.features, z), (codes.weight, w), (codes.log_scale, scale)):
        torch.testing.assert_close(found.grad, wanted.grad)
    assert float(scale.detach().exp()) == pytest.approx(1 / 0.07)


def test_the_sigmoid_objective_sums_over_the_classes(batch):
    features, targets = batch
    model, _, loss = loss_of(features, targets, replace(PLAIN, objective="sigmoid"))
    p = torch.sigmoid(model.head(features))
    torch.testing.assert_close(
        loss, -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1).mean()
    )


def test_the_penalty_is_the_squared_coefficient_of_variation(batch):
    features, targets = batch
    norms = features.norm(dim=1)
    torch.manual_seed(0)
    losses = []
    for penalty in (0.0, 2.0):
        model = Features(features)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        recipe = replace(PLAIN, penalty=penalty)
        losses.append(
            training._loss(
                model, training._class_codes(model, recipe, 0), features, targets, recipe
            )
        )
    torch.testing.assert_close(losses[1] - losses[0], 2 * norms.var() / norms.mean() ** 2)


@pytest.mark.parametrize("aug", ["none", "light1", "medium1", "strong2"])
@pytest.mark.parametrize("n", [8, 7])
def test_a_batch_keeps_its_shape_and_its_targets_sum_to_one(aug, n):
    recipe = replace(PLAIN, aug=aug, shift=2, flip="random")
    with training._random_state("cpu") as seed_all:
        seed_all(0)
        x, targets = training._batch(
            IMAGES[:n], LABELS[:n], CLASSES, recipe, training._rand_augment(recipe), MEAN, STD
        )
    assert x.shape == (n, 3, 32, 32) and x.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(n))
    soft = (targets.max(1).values < 1).any()
    assert soft == (training.AUGMENTATIONS[aug][0] > 0)


# --- resume


def run_until_killed(checkpoint: str) -> None:
    """What the process below does: it is killed in step 7, with a state before every step."""
    NETWORKS["tiny"] = TINY
    loop.SAVE_EVERY = -1.0
    training._loss = stopping(7, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(RICH, checkpoint=Path(checkpoint))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, killed_process):
    checkpoint = tmp_path / "resume"
    killed_process("test_training_vit", f"run_until_killed({str(checkpoint)!r})")
    whole, history = run(RICH)
    # six steps were saved: the state after the seventh waited for the loss of the eighth
    monkeypatch.setattr(training, "_loss", stopping(4, give_up))
    resumed, other = run(RICH, checkpoint=checkpoint)
    assert_equal(whole, resumed)
    assert untimed(other) == untimed(history)
    monkeypatch.setattr(training, "_loss", stopping(0, give_up))
    assert_equal(run(RICH, checkpoint=checkpoint)[0], whole)  # until its result is stored elsewhere


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Checkpoint of a run that was interrupted in its third step."""
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "SAVE_EVERY", -1.0)
        patch.setattr(training, "_loss", stopping(2, give_up))
        run(PLAIN, checkpoint=tmp_path / "resume")
    return tmp_path / "resume"


@pytest.mark.parametrize("change", [{"recipe": replace(PLAIN, lr=0.04)}, {"seed": 1}])
def test_a_checkpoint_of_another_run_is_refused_and_kept(interrupted, change):
    before = interrupted.read_bytes()
    with pytest.raises(OodlibError, match=r"resume belongs to another run: .* this one is"):
        run(**{"recipe": PLAIN, **change}, checkpoint=interrupted)
    assert interrupted.read_bytes() == before


@pytest.mark.parametrize("damage", [lambda d: d[:-100], lambda d: d[:10], lambda d: b""])
def test_a_damaged_checkpoint_is_named(interrupted, damage):
    interrupted.write_bytes(damage(interrupted.read_bytes()))
    with pytest.raises(OodlibError, match=r"resume is damaged, .*Delete it"):
        run(PLAIN, checkpoint=interrupted)
