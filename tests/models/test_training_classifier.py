"""Training of classifiers: schedule, seeds, Lookahead, resuming, augmentation."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from oodlib import OodlibError
from oodlib.models.training import loop
from oodlib.models.training.augment import augment, hash_seed, normalise
from oodlib.models.training.classifier import Recipe, _look_ahead, evaluate, train

MEAN, STD = torch.tensor([0.5]), torch.tensor([0.25])


@pytest.fixture(scope="module")
def bright():
    """48 grey 8-pixel images of two classes, one brighter than the other."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 2
    images = rng.integers(0, 128, (48, 1, 8, 8)) + 100 * labels[:, None, None, None]
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(bright, *, seed=0, model=None, **recipe):
    model = model or network()
    options = {key: recipe.pop(key) for key in ("checkpoint", "on_epoch") if key in recipe}
    recipe = {"epochs": 2, "batch_size": 16, "lr": 0.2, "shift": 1} | recipe
    history = train(
        model, *bright, Recipe(**recipe), seed=seed, mean=MEAN, std=STD, progress=False, **options
    )
    return model, history


def test_triangle_rises_to_one_and_falls_to_the_end():
    recipe = Recipe(schedule="triangle", warmup=0.25, final_lr=0.1)
    assert [recipe.factor(t) for t in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx(
        [0.2, 0.6, 1, 0.55, 0.1]
    )


def test_cosine_rises_from_zero_and_falls_to_the_end():
    recipe = Recipe(schedule="cosine", warmup=0.5, final_lr=0.0)
    assert [recipe.factor(t) for t in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_without_warm_up_the_peak_comes_first():
    assert Recipe(warmup=0.0).factor(0) == 1


def test_it_learns(bright):
    model, history = run(bright, epochs=8)
    assert evaluate(model, *bright, MEAN, STD) > 0.9 and history[-1]["loss"] < history[0]["loss"]


def test_seed_decides_the_result(bright):
    first, again, other = (weights(run(bright, seed=seed, lookahead=True)[0]) for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_global_random_state_is_left_alone(bright):
    before = torch.random.get_rng_state()
    run(bright)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("epochs", [1.5, 2])
def test_part_of_an_epoch_counts_steps(bright, epochs):
    assert run(bright, epochs=epochs)[1][-1]["step"] == np.ceil(epochs * 3)


@pytest.mark.parametrize("lookahead", [False, True])
def test_resumed_run_equals_the_whole_run(bright, tmp_path, lookahead):
    def stop(epoch, _):
        if epoch == 2:
            raise KeyboardInterrupt

    options = {"epochs": 4, "lookahead": lookahead, "flip": "alternating"}
    with pytest.raises(KeyboardInterrupt):
        run(bright, checkpoint=tmp_path / "a.pt", on_epoch=stop, **options)
    resumed, history = run(bright, checkpoint=tmp_path / "a.pt", **options)
    whole, _ = run(bright, **options)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]


@pytest.mark.parametrize("step", [2, 5, 6, 11])
def test_a_run_stopped_within_an_epoch_goes_on_from_its_last_step(
    bright, tmp_path, monkeypatch, step
):
    options = {"epochs": 11 / 3, "lookahead": True, "flip": "alternating"}  # three steps an epoch
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)  # a state after every step
    steps = []

    def stop(*_):
        steps.append(1)
        if len(steps) == step:
            raise KeyboardInterrupt

    handle = register_optimizer_step_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(bright, checkpoint=tmp_path / "a.pt", **options)
        resumed, history = run(bright, checkpoint=tmp_path / "a.pt", **options)
    finally:
        handle.remove()
    whole, expected = run(bright, **options)
    assert len(steps) == 12  # one step was begun twice
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert [(row["step"], row["loss"]) for row in history] == [
        (row["step"], row["loss"]) for row in expected
    ]


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"seed": 1}])
def test_resume_refuses_another_recipe_or_seed(bright, tmp_path, change):
    run(bright, checkpoint=tmp_path / "a.pt")
    with pytest.raises(OodlibError, match=r"a\.pt belongs to another run: .* this one is"):
        run(bright, checkpoint=tmp_path / "a.pt", **change)


@pytest.mark.parametrize("damage", [lambda d: d[:-100], lambda d: d[:10], lambda d: b""])
def test_a_damaged_checkpoint_is_named(bright, tmp_path, damage):
    run(bright, checkpoint=tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(damage((tmp_path / "a.pt").read_bytes()))
    with pytest.raises(OodlibError, match=r"a\.pt is damaged, .*Delete it"):
        run(bright, checkpoint=tmp_path / "a.pt")


def test_too_few_images_for_one_batch(bright):
    with pytest.raises(OodlibError, match="48 images do not fill one batch of 64"):
        run(bright, batch_size=64)


def test_diverging_loss_is_an_error(bright):
    with pytest.raises(OodlibError, match=r"train: step \d+ .loss .* overflowed. Lower lr"):
        run(bright, lr=1e30, epochs=4)


def test_look_ahead_moves_both_to_the_weighted_mean():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 4.0)
    slow = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(slow.weight)
    _look_ahead(model, slow, 0.75)
    assert model.weight.item() == slow.weight.item() == 1.0


def test_normalise_is_per_channel_in_units_of_one():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    assert normalise(
        pixels, torch.tensor([0.5, 0.0]), torch.tensor([0.5, 2.0])
    ).flatten().tolist() == [-1.0, 0.5]


def test_alternating_flip_shows_each_image_both_ways():
    x, keys = torch.arange(8.0).view(2, 1, 1, 4), torch.tensor([0, 1])
    first, second = (
        augment(x, Recipe(flip="alternating"), epoch, keys, torch.Generator()) for epoch in (0, 1)
    )
    torch.testing.assert_close(first, torch.stack([x[0], x[1].flip(2)]))
    torch.testing.assert_close(second, first.flip(3))


def test_shift_keeps_shape_and_takes_pixels_from_the_image():
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = augment(
        x, Recipe(flip="none", shift=2), 0, torch.zeros(6), torch.Generator().manual_seed(0)
    )
    assert moved.shape == x.shape and not torch.equal(moved, x)
    assert all(
        set(a.flatten().tolist()) <= set(b.flatten().tolist())
        for a, b in zip(moved, x, strict=True)
    )


def test_epochs_and_seeds_have_generators_of_their_own():
    assert len({hash_seed(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25
