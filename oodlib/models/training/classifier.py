"""Training of the suite's small classifiers by SGD, with Lookahead where a recipe says so."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oodlib.errors import OodlibError
from oodlib.models.training.augment import augment, normalise, seeded
from oodlib.models.training.loop import TrainingRun


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, besides the data, the network and the seed.

    ``lr`` is the peak learning rate for the *mean* loss of a batch; ``decay`` the share by which
    every weight shrinks in one step at that peak (``lr * weight_decay`` in PyTorch's terms).
    """

    epochs: float = 10
    batch_size: int = 500
    lr: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-5
    schedule: Literal["cosine", "triangle"] = "cosine"
    warmup: float = 0.0  # share of the steps
    final_lr: float = 0.0  # share of the peak
    norm_bias_lr: float = 1.0  # factor for biases of normalisation layers
    head_lr: float = 1.0  # factor for the head's weight
    whiten_bias_epochs: float | None = None  # the whitening bias is frozen after these
    lookahead: bool = False
    flip: Literal["none", "random", "alternating"] = "random"
    shift: int = 0  # random translation by up to so many pixels, reflected border
    label_smoothing: float = 0.0

    def factor(self, progress: float) -> float:
        """Learning rate as a share of its peak, at ``progress`` in [0, 1] of the run."""
        if progress < self.warmup:
            start = 0.2 if self.schedule == "triangle" else 0.0
            return start + (1 - start) * progress / self.warmup
        rest = (progress - self.warmup) / (1 - self.warmup)
        shape = 1 - rest if self.schedule == "triangle" else (1 + math.cos(math.pi * rest)) / 2
        return self.final_lr + (1 - self.final_lr) * shape


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    norm_biases = {id(m.bias) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    head = model.get_submodule("head") if hasattr(model, "head") else None
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            factor = recipe.norm_bias_lr if id(parameter) in norm_biases else 1.0
            if head is not None and parameter is head.weight:
                factor = recipe.head_lr
            groups.setdefault(factor, []).append(parameter)
    options = []
    for factor, parameters in groups.items():
        peak = factor * recipe.lr
        decay = recipe.decay / peak
        options.append({"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay})
    return torch.optim.SGD(options, lr=recipe.lr, momentum=recipe.momentum, nesterov=True)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    batch_size: int = 500,
    device: str | torch.device = "cpu",
) -> float:
    """Share of images (uint8, n x c x h x w) whose arg-max class is the label, in [0, 1]."""
    model.eval()
    correct = 0
    for batch, classes in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        x = normalise(batch, mean, std).to(device, memory_format=torch.channels_last)
        correct += int((model(x).argmax(1).cpu() == classes).sum())
    return correct / len(images)


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    mean: Tensor,
    std: Tensor,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    on_epoch: Callable[[int, nn.Module], None] | None = None,
) -> list[dict[str, Any]]:
    """Train ``model`` in place by SGD (Nesterov) on cross-entropy; a row of history per epoch.

    Parameters
    ----------
    images, labels : (n, c, h, w) uint8 and (n,) int64
    seed : of order and augmentation; initialise the model yourself under a seed of its own
    mean, std : (c,), in units of pixel / 255
    checkpoint : saved after every epoch and within long ones; an interrupted run resumes from it
    on_epoch : ``on_epoch(epochs_done, model)``, in evaluation mode, also with 0 at the start

    Raises
    ------
    OodlibError : a loss that overflows, a checkpoint that is damaged or of another recipe or seed
    """
    n, per_epoch = len(images), len(images) // recipe.batch_size
    if per_epoch == 0:
        raise OodlibError(
            f"train: {n} images do not fill one batch of {recipe.batch_size}. Use a smaller "
            "batch_size."
        )
    total = math.ceil(recipe.epochs * per_epoch)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    whiten = getattr(model, "whiten", None) if recipe.whiten_bias_epochs is not None else None
    flip_keys = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))
    shuffle = _Shuffle(n, seed)
    slow = copy.deepcopy(model) if recipe.lookahead else None
    run = TrainingRun(
        "train",
        model,
        _optimiser(model, recipe),
        key={"recipe": asdict(recipe), "seed": seed, "n": n},
        path=checkpoint,
        parts={"shuffle": shuffle} | ({"slow": slow} if slow else {}),
    )

    def loss(step: int) -> Tensor:
        epoch, batch = divmod(step, per_epoch)
        shuffle.start(epoch)
        index = shuffle.order[batch * recipe.batch_size : (batch + 1) * recipe.batch_size]
        x = normalise(images[index], mean, std)
        x = augment(x, recipe, epoch, flip_keys[index], shuffle.generator)
        if whiten is not None:
            whiten.bias.requires_grad_(step < (recipe.whiten_bias_epochs or 0) * per_epoch)
        return nn.functional.cross_entropy(
            model(x.to(device, memory_format=torch.channels_last)),
            labels[index].to(device),
            label_smoothing=recipe.label_smoothing,
        )

    def look_ahead(step: int) -> None:
        if slow and step % 5 == 0:
            _look_ahead(model, slow, 0.95**5 * (step / total) ** 3)
        if slow and step == total:
            _look_ahead(model, slow, 1.0)

    def row() -> dict[str, Any]:
        earlier = sum(row["seconds"] for row in run.history)
        mean_loss = run.mean_loss_row()
        epoch = math.ceil(run.step / per_epoch)
        return {**mean_loss, "epoch": epoch, "seconds": mean_loss["seconds"] - earlier}

    if on_epoch and run.step == 0:
        on_epoch(0, model.eval())
    return run.run_steps(
        loss,
        rate=lambda step: recipe.factor(step / total),
        rows={*range(per_epoch, total, per_epoch), total},
        row=row,
        after_step=look_ahead,
        after_row=lambda row: on_epoch(row["epoch"], model.eval()) if on_epoch else None,
        progress=progress,
    )


class _Shuffle:
    """Order of the images and augmentation of an epoch, drawn from one generator in turn."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self.epoch = n, seed, -1

    def start(self, epoch: int) -> None:
        """Draw the order of an epoch, unless it has begun."""
        if epoch != self.epoch:
            self.epoch, self.generator = epoch, seeded(self.seed, epoch)
            self.order = torch.randperm(self.n, generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start(state["epoch"])
        self.generator.set_state(state["generator"])


@torch.no_grad()
def _look_ahead(model: nn.Module, slow: nn.Module, decay: float) -> None:
    """slow <- decay slow + (1 - decay) model, then model <- slow (Zhang et al. 2019)."""
    fast = model.state_dict()
    for name, value in slow.state_dict().items():
        if value.is_floating_point():
            value.lerp_(fast[name], 1 - decay)
            fast[name].copy_(value)
