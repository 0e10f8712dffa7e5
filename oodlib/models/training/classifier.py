"""One training loop for the suite's small classifiers: seeded, resumable, with checkpoints and a
progress bar.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from oodlib.errors import OodlibError
from oodlib.models.training.augment import augment, hash_seed, normalise
from oodlib.models.training.state import load_state, save_state

__all__ = ["Recipe", "evaluate", "train"]

SAVE_EVERY = 120.0  # seconds between two states to resume from, within an epoch


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, besides the data, the network and the seed.

    ``lr`` is the peak learning rate for the *mean* loss of a batch. ``decay`` is the share by which
    a weight shrinks in one step at that peak (``lr * weight_decay`` in PyTorch's terms), the same
    for every parameter group.
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
    return torch.optim.SGD(
        [
            {
                "params": p,
                "lr": f * recipe.lr,
                "peak": f * recipe.lr,
                "weight_decay": recipe.decay / (f * recipe.lr),
            }
            for f, p in groups.items()
        ],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
    )


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
    right = 0
    for i in range(0, len(images), batch_size):
        x = normalise(images[i : i + batch_size], mean, std).to(
            device, memory_format=torch.channels_last
        )
        right += int((model(x).argmax(1).cpu() == labels[i : i + batch_size]).sum())
    return right / len(images)


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
    """Train ``model`` in place with cross-entropy and SGD (Nesterov); returns one row of history
    per epoch.

    Parameters
    ----------
    images, labels : (n, c, h, w) uint8 and (n,) int64
    seed : of the order of images and of the augmentation; initialise the model yourself under a seed of its own
    mean, std : (c,), in units of pixel / 255
    checkpoint : written after every epoch and within long ones; an interrupted run resumes from it with the same result
    on_epoch : called as ``on_epoch(epochs_done, model)``, in evaluation mode, also with 0 before the first step

    Raises
    ------
    OodlibError : the checkpoint is damaged, or belongs to another recipe or seed
    """
    n = len(images)
    steps_per_epoch = n // recipe.batch_size
    if steps_per_epoch == 0:
        raise OodlibError(
            f"train: {n} images do not fill one batch of {recipe.batch_size}. Use a smaller "
            "batch_size."
        )
    total = math.ceil(recipe.epochs * steps_per_epoch)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = _optimiser(model, recipe)
    slow = copy.deepcopy(model.state_dict()) if recipe.lookahead else None
    history: list[dict[str, Any]] = []
    losses: list[float] = []  # of the epoch that is under way, as are its seconds and its generator
    seconds, drawn, step, key = 0.0, None, 0, {"recipe": asdict(recipe), "seed": seed, "n": n}
    checkpoint = Path(checkpoint) if checkpoint else None
    if checkpoint and checkpoint.exists():
        state = load_state(checkpoint)
        if state["key"] != key:
            raise OodlibError(
                f"train: {checkpoint} was written with {state['key']}, this run asks for {key}. "
                "Delete it to start afresh, or restore the old settings."
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        slow, history, step = state["slow"], state["history"], state["step"]
        losses, seconds, drawn = state["losses"], state["seconds"], state["generator"]
        if slow is not None:
            slow = {name: value.to(device) for name, value in slow.items()}
    saved = time.monotonic()

    def save(seconds: float, drawn: Tensor | None) -> None:
        nonlocal saved
        if checkpoint:
            save_state(
                checkpoint,
                {
                    "key": key,
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "slow": slow,
                    "history": history,
                    "step": step,
                    "losses": losses,
                    "seconds": seconds,
                    "generator": drawn,
                },
            )
        saved = time.monotonic()

    if on_epoch and step == 0:
        on_epoch(0, model.eval())
    flip_keys = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))
    bar = tqdm(
        total=total, initial=step, desc="training", unit="step", disable=None if progress else True
    )
    while step < total:
        epoch, first = divmod(step, steps_per_epoch)
        generator = torch.Generator().manual_seed(hash_seed(seed, epoch))
        order = torch.randperm(n, generator=generator)
        if drawn is not None:
            generator.set_state(drawn)
        model.train()
        started, end = (
            time.perf_counter() - seconds,
            min(steps_per_epoch, total - epoch * steps_per_epoch),
        )
        for i in range(first, end):
            index = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
            x = augment(
                normalise(images[index], mean, std), recipe, epoch, flip_keys[index], generator
            )
            x = x.to(device, memory_format=torch.channels_last)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * recipe.factor(step / total)
            whiten = getattr(model, "whiten", None)
            if whiten is not None and recipe.whiten_bias_epochs is not None:
                whiten.bias.requires_grad_(step < recipe.whiten_bias_epochs * steps_per_epoch)
            optimiser.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(
                model(x), labels[index].to(device), label_smoothing=recipe.label_smoothing
            )
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            step += 1
            if slow is not None and step % 5 == 0:
                _look_ahead(model, slow, 0.95**5 * (step / total) ** 3)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            if i + 1 < end and time.monotonic() - saved > SAVE_EVERY:
                save(time.perf_counter() - started, generator.get_state())
        if not np.isfinite(losses).all():
            raise OodlibError(
                f"train: the loss became infinite or NaN in epoch {epoch + 1}. Lower the learning "
                "rate."
            )
        if slow is not None and step == total:
            _look_ahead(model, slow, 1.0)
        history.append(
            {
                "epoch": epoch + 1,
                "step": step,
                "loss": float(np.mean(losses)),
                "seconds": time.perf_counter() - started,
            }
        )
        losses, seconds, drawn = [], 0.0, None
        save(seconds, drawn)
        if on_epoch:
            on_epoch(epoch + 1, model.eval())
    bar.close()
    model.eval()
    return history


@torch.no_grad()
def _look_ahead(model: nn.Module, slow: dict[str, Tensor], decay: float) -> None:
    """slow <- decay * slow + (1 - decay) * model, then model <- slow (Lookahead, Zhang et al. 2019,
    with a ramp).
    """
    state = model.state_dict()
    for name, value in slow.items():
        if value.is_floating_point():
            value.lerp_(state[name], 1 - decay)
            state[name].copy_(value)
