"""Training of flows by maximum likelihood, with weights saved at chosen steps.

The recipe is that of Montazeran and Köthe's code (arXiv 2502.00820) but for three stated
departures: the warm-up goes step by step instead of epoch by epoch, gradients are clipped, and the
rate is set by the caller.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from oodlib.errors import OodlibError
from oodlib.files import write_sealed
from oodlib.models.glow import Glow, bits_per_dim, dequantise
from oodlib.models.training.augment import augment, seeded
from oodlib.models.training.loop import TrainingRun

_ORDER, _INITIALISE, _VALIDATE, _BATCH = range(4)  # purposes of generators


@dataclass(frozen=True)
class FlowRecipe:
    """Everything that decides a training run, besides the images, the network and the seed.

    ``snapshots`` are the steps whose weights are saved, 0 being the state after actnorm's
    initialisation; the last one ends the run.
    """

    snapshots: tuple[int, ...]
    batch_size: int = 64
    lr: float = 1e-2
    weight_decay: float = 5e-5
    warmup: int = 200  # steps of linear rise to lr
    clip: float = 20.0  # largest L2 norm of a step's gradient, of bits per dim
    n_initialise: int = 512  # images that set the actnorms
    flip: Literal["none", "random"] = "none"
    shift: int = 0  # random translation by up to so many pixels, reflected border
    decay: Literal["none", "cosine"] = "none"  # of the rate, over the whole run

    def rate(self, step: int) -> float:
        """Learning rate: lr min(1, (step + 1) / warmup) (1 + cos(pi step / last step)) / 2.

        The last factor is that of the cosine decay.
        """
        rate = self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr
        if self.decay == "cosine":
            rate = rate * (1 + math.cos(math.pi * step / self.snapshots[-1])) / 2
        return rate

    def __post_init__(self) -> None:
        steps = self.snapshots
        if len(steps) < 2 or steps[0] != 0 or any(later <= step for step, later in pairwise(steps)):
            raise OodlibError(
                f"FlowRecipe: snapshots must rise from 0 to the last step, got {steps}."
            )
        positive = (self.batch_size, self.n_initialise, self.lr, self.clip)
        others = (self.warmup, self.weight_decay)
        finite = all(map(math.isfinite, positive + others))
        if not (finite and min(positive) > 0 and min(others) >= 0):
            raise OodlibError(
                "FlowRecipe: batch_size, n_initialise, lr and clip must be positive, warmup and "
                f"weight_decay not negative, all finite, got {self}. A large clip clips nothing."
            )
        if self.flip not in ("none", "random") or self.decay not in ("none", "cosine"):
            raise OodlibError(
                "FlowRecipe: flip must be none or random and decay none or cosine, got "
                f"{self.flip!r} and {self.decay!r}."
            )


def snapshot_path(folder: Path, step: int) -> Path:
    """File of the weights after ``step`` steps; beside it lies a JSON record with its checksum."""
    return folder / f"step_{step:07d}.safetensors"


@torch.no_grad()
def mean_bits_per_dim(
    model: Glow,
    images: Tensor,
    *,
    seed: int,
    batch_size: int = 250,
    device: str | torch.device = "cpu",
) -> float:
    """Mean bits per dim of uint8 images; compared on the same noise, of ``seed``."""
    x = dequantise(images, bits=model.bits, generator=seeded(seed, _VALIDATE, 0))
    log_probs = torch.cat([model.log_prob(part.to(device)).cpu() for part in x.split(batch_size)])
    return float(bits_per_dim(log_probs, model.image_shape).mean())


def train_flow(
    model: Glow,
    images: Tensor,
    validation: Tensor,
    recipe: FlowRecipe,
    *,
    seed: int,
    folder: Path,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train ``model`` in place by maximum likelihood; returns one row of history per snapshot.

    loss = mean bits per dim of a batch; Adamax. A killed run resumes to the same weights as one
    that was not killed: bit by bit on a CPU with the same number of threads.

    Parameters
    ----------
    images, validation : (n, c, h, w) uint8 on the CPU, disjoint
    seed : of order, augmentation and noise; initialise the weights yourself
    folder : of this run alone; gets ``step_*.safetensors`` with their records, and ``resume.pt``,
        with which a finished run without decay can be made longer

    Returns
    -------
    rows with step, epoch, train_bpd (mean since the last row, NaN at 0), validation_bpd, seconds

    Raises
    ------
    OodlibError : images that the flow cannot take, fewer than a batch, none for validation; a loss
        or gradient that overflows (the last good state stays on disk); a state that is damaged or
        belongs to another run
    """
    _check(model, images, validation, recipe)
    n, per_epoch, last = len(images), len(images) // recipe.batch_size, recipe.snapshots[-1]
    model.to(device)
    key = _key(model, recipe, seed, images)
    run = TrainingRun(
        "train_flow",
        model,
        torch.optim.Adamax(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay),
        key=key,
        path=folder / "resume.pt",
    )

    # where the run stands
    if run.history:
        saved = [row["step"] for row in run.history][: len(recipe.snapshots)]
        if saved != [step for step in recipe.snapshots if step <= run.step]:
            raise OodlibError(
                f"train_flow: {run.path} has run {run.step} steps and saved {saved}, but the "
                f"snapshots asked for are {recipe.snapshots}. Ask for those saved and later ones, "
                "or use another folder."
            )
        if run.step > last:  # of a longer run
            _load(model, snapshot_path(folder, last))
            model.eval()
            return run.history[: len(saved)]
    else:
        first = torch.randperm(n, generator=seeded(seed, _INITIALISE, 1))[: recipe.n_initialise]
        x = _batch(images[first], model, recipe, seeded(seed, _INITIALISE, 0))
        model.initialise(x.to(device))

    @lru_cache(1)
    def order(epoch: int) -> Tensor:
        return torch.randperm(n, generator=seeded(seed, _ORDER, epoch))

    def loss(step: int) -> Tensor:
        epoch, batch = divmod(step, per_epoch)
        index = order(epoch)[batch * recipe.batch_size : (batch + 1) * recipe.batch_size]
        x = _batch(images[index], model, recipe, seeded(seed, _BATCH, step))
        return bits_per_dim(model.log_prob(x.to(device)), model.image_shape).mean()

    def snapshot() -> dict[str, Any]:
        bpd = mean_bits_per_dim(model, validation, seed=seed, device=device)
        if not math.isfinite(bpd):
            raise run.overflow(
                f"the validation images after step {run.step} ({bpd:.4g} bits per dim)"
            )
        row = {
            "step": run.step,
            "epoch": run.step / per_epoch,
            "validation_bpd": bpd,
            "train_bpd": sum(run.losses) / len(run.losses) if run.losses else math.nan,
            "seconds": run.seconds,
        }
        weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        write_sealed(
            snapshot_path(folder, run.step),
            lambda path: save_file(weights, path),
            {"key": key, **row, "train_bpd": row["train_bpd"] if run.losses else None},
        )
        if progress:  # a log file shows no bar
            tqdm.write(f"step {run.step}: {bpd:.3f} bits/dim on validation images")
        return row

    return run.run_steps(
        loss,
        rate=recipe.rate,
        rows=recipe.snapshots,
        row=snapshot,
        clip=recipe.clip,
        progress=progress,
    )


def _check(model: Glow, images: Tensor, validation: Tensor, recipe: FlowRecipe) -> None:
    for name, part, least in (("images", images, recipe.batch_size), ("validation", validation, 1)):
        facts = (type(part), part.dtype, str(part.device), tuple(part.shape[1:]))
        if facts != (Tensor, torch.uint8, "cpu", model.image_shape):
            raise OodlibError(
                f"train_flow: {name} must be a tensor (n, "
                f"{', '.join(map(str, model.image_shape))}) torch.uint8 on the CPU, got "
                f"{type(part).__name__} {tuple(part.shape)} {part.dtype} on {part.device}. Resize "
                "them; turn x in [0, 1] into (255 * x).round().byte()."
            )
        if len(part) < least:
            raise OodlibError(
                f"train_flow: needs at least {least} {name} (a batch of the recipe, and one to "
                f"validate with), got {len(part)}. Give more, or use a smaller batch_size."
            )
    side = min(model.image_shape[1:])
    if not 0 <= recipe.shift < side:
        raise OodlibError(
            f"train_flow: shift must lie in [0, {side}), the border is reflected; got "
            f"{recipe.shift}."
        )


def _key(model: Glow, recipe: FlowRecipe, seed: int, images: Tensor) -> dict[str, Any]:
    """What a saved state belongs to; without snapshots: a run without decay may be made longer."""
    end = None if recipe.decay == "none" else recipe.snapshots[-1]
    shapes = str([(name, tuple(p.shape)) for name, p in model.named_parameters()]).encode()
    return {
        "recipe": {**asdict(recipe), "snapshots": end},
        "seed": seed,
        "network": hashlib.sha256(shapes).hexdigest()[:16],
        "images": hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16],
    }


def _batch(images: Tensor, model: Glow, recipe: FlowRecipe, generator: torch.Generator) -> Tensor:
    """Augmented and dequantised, on the CPU: the same numbers for every device."""
    moved = augment(images.float(), recipe, 0, None, generator).to(torch.uint8)
    return dequantise(moved, bits=model.bits, generator=generator)


def _load(model: Glow, path: Path) -> None:
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise OodlibError(
            f"train_flow: {path} is missing or damaged ({error}). Restore it, or train in another "
            "folder."
        ) from error


def kept_step(history: Sequence[Mapping[str, Any]], epochs: float, *, nearest: bool = False) -> int:
    """The first saved step of at least so many epochs, else the last; or the nearest, by ratio."""
    rows = [row for row in history if row["step"] > 0]
    if nearest:
        return min(rows, key=lambda row: abs(math.log(row["epoch"] / epochs)))["step"]
    return next((row["step"] for row in rows if row["epoch"] >= epochs), rows[-1]["step"])
