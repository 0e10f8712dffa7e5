"""One training loop for flows: seeded, resumable after a kill, with weights kept at chosen steps.

The recipe is that of Montazeran and Köthe's code (arXiv 2502.00820) but for three stated
departures: the warm-up goes step by step instead of epoch by epoch, gradients are clipped, and the
rate is set by the caller.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from oodlib.errors import OodlibError
from oodlib.files import atomic_path, sha256, write_json
from oodlib.models.glow import Glow, bits_per_dim, dequantise
from oodlib.models.training.augment import augment, hash_seed
from oodlib.models.training.state import load_state, save_state

__all__ = ["FlowRecipe", "kept_step", "mean_bits_per_dim", "snapshot_path", "train_flow"]

SAVE_EVERY = 60.0  # seconds between two states to resume from
_ORDER, _INITIALISE, _VALIDATE, _BATCH = range(4)  # what a generator is for


@dataclass(frozen=True)
class FlowRecipe:
    """Everything that decides a training run, besides the images, the network and the seed.

    ``snapshots`` are the steps whose weights are kept, 0 being the state after actnorm's
    initialisation; the last one ends the run. Without decay, a longer run with the same first
    snapshots repeats the shorter one.
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
    decay: Literal["none", "cosine"] = (
        "none"  # of the rate, over the whole run: a longer run is another run
    )

    def rate(self, step: int) -> float:
        """Learning rate of the step that follows ``step`` others: lr min(1, (step + 1) / warmup) (1
        + cos pi t) / 2.

        t = step / last step; without decay the last factor is 1.
        """
        rate = self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr
        return (
            rate
            if self.decay == "none"
            else rate * (1 + math.cos(math.pi * step / self.snapshots[-1])) / 2
        )

    def __post_init__(self) -> None:
        steps = self.snapshots
        if len(steps) < 2 or steps[0] != 0 or any(later <= step for step, later in pairwise(steps)):
            raise OodlibError(
                f"FlowRecipe: snapshots must rise from 0 to the last step, got {steps}."
            )
        positive, others = (
            (self.batch_size, self.n_initialise, self.lr, self.clip),
            (self.warmup, self.weight_decay),
        )
        if not (
            min(positive) > 0 and min(others) >= 0 and all(map(math.isfinite, positive + others))
        ):
            raise OodlibError(
                f"FlowRecipe: batch_size, n_initialise, lr and clip must be positive, warmup and "
                f"weight_decay not negative, all finite, got {self}. A large clip clips nothing."
            )
        if self.flip not in ("none", "random"):
            raise OodlibError(f'FlowRecipe: flip must be "none" or "random", got {self.flip!r}.')
        if self.decay not in ("none", "cosine"):
            raise OodlibError(f'FlowRecipe: decay must be "none" or "cosine", got {self.decay!r}.')


def snapshot_path(folder: Path, step: int) -> Path:
    """Where the weights after ``step`` steps lie; a JSON file with their checksum lies beside them."""
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
    """Mean bits per dim of uint8 images; noise of a seed, so that two models are compared on the
    same numbers.
    """
    x = dequantise(images, bits=model.bits, generator=_generator(seed, _VALIDATE, 0))
    values = [
        bits_per_dim(model.log_prob(part.to(device)), model.image_shape).cpu()
        for part in x.split(batch_size)
    ]
    return float(torch.cat(values).mean())


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

    loss = mean bits per dim of a batch; Adamax. A run that was killed goes on from the last saved
    state and gives the same weights as one that was not: bit by bit on a CPU with the same number
    of threads.

    Parameters
    ----------
    images, validation : (n, c, h, w) uint8 on the CPU, disjoint
    seed : of order, augmentation and noise; initialise the weights yourself under a seed of its own
    folder : of this run alone; gets ``step_*.safetensors`` with their records, and ``resume.pt``, with which a finished
        run without decay can be made longer

    Returns
    -------
    rows with step, epoch, train_bpd (mean since the last row, NaN at 0), validation_bpd, seconds

    Raises
    ------
    OodlibError : images that the flow cannot take, fewer than a batch, none for validation; a loss or gradient that
        overflows (the last good state stays on disk); a state in ``folder`` that is damaged or
        belongs to another run
    """
    _check(model, images, validation, recipe)
    n, steps_per_epoch, last = len(images), len(images) // recipe.batch_size, recipe.snapshots[-1]
    model.to(device).train()
    optimiser = torch.optim.Adamax(
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    key = _key(model, recipe, seed, images)
    history: list[dict[str, Any]] = []
    step, seconds, losses, resume = 0, 0.0, [], folder / "resume.pt"
    if resume.exists():
        state = load_state(resume)
        if state["key"] != key:
            raise OodlibError(
                f"train_flow: {resume} belongs to another run: {state['key']}, this one is {key}. "
                "Delete the folder to start afresh, or restore the old settings."
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        history, step, seconds, losses = (
            state["history"],
            state["step"],
            state["seconds"],
            state["losses"],
        )
        kept = [row["step"] for row in history][: len(recipe.snapshots)]
        if kept != [wanted for wanted in recipe.snapshots if wanted <= step]:
            raise OodlibError(
                f"train_flow: {resume} has run {step} steps and saved {kept}, but the snapshots "
                f"asked for are {recipe.snapshots}. Ask for those kept and later ones, or use "
                "another folder."
            )
        if step > last:  # a longer run lies here
            _load(model, snapshot_path(folder, last))
            history = history[: len(kept)]
    else:
        first = torch.randperm(n, generator=_generator(seed, _INITIALISE, 1))[: recipe.n_initialise]
        model.initialise(
            _batch(images[first], model, recipe, _generator(seed, _INITIALISE, 0)).to(device)
        )
    started, saved = time.monotonic() - seconds, time.monotonic()

    def overflow(what: str) -> OodlibError:
        good = (
            f"the last good weights are {snapshot_path(folder, history[-1]['step'])}"
            if history
            else "no usable weights were saved"
        )
        return OodlibError(f"train_flow: {what} overflowed. Lower lr or lengthen warmup; {good}.")

    def save() -> None:
        nonlocal saved
        save_state(
            resume,
            {
                "key": key,
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "history": history,
                "step": step,
                "seconds": time.monotonic() - started,
                "losses": losses,
            },
            checksum=True,
        )
        saved = time.monotonic()

    def keep() -> None:
        bpd = mean_bits_per_dim(model, validation, seed=seed, device=device)
        if not math.isfinite(bpd):
            raise overflow(f"the validation images after step {step} ({bpd:.4g} bits per dim)")
        history.append(
            {
                "step": step,
                "epoch": step / steps_per_epoch,
                "validation_bpd": bpd,
                "train_bpd": sum(losses) / len(losses) if losses else math.nan,
                "seconds": time.monotonic() - started,
            }
        )
        losses.clear()
        path = snapshot_path(folder, step)
        with atomic_path(path) as temporary:
            save_file(
                {name: value.cpu().contiguous() for name, value in model.state_dict().items()},
                temporary,
            )
        row = {name: None if value != value else value for name, value in history[-1].items()}
        write_json(path.with_suffix(".json"), {"key": key, "sha256": sha256(path), **row})
        save()
        if progress:  # a log file shows no bar
            tqdm.write(f"step {step}: {bpd:.3f} bits/dim on validation images")

    if not history:
        keep()
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    with tqdm(
        total=last, initial=step, desc="training", unit="step", disable=None if progress else True
    ) as bar:
        while step < last:
            if epoch != step // steps_per_epoch:
                epoch = step // steps_per_epoch
                order = torch.randperm(n, generator=_generator(seed, _ORDER, epoch))
            start = step % steps_per_epoch * recipe.batch_size
            x = _batch(
                images[order[start : start + recipe.batch_size]],
                model,
                recipe,
                _generator(seed, _BATCH, step),
            )
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step)
            loss = bits_per_dim(model.log_prob(x.to(device)), model.image_shape).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            value = loss.item()
            if not math.isfinite(value) or not norm.isfinite():
                raise overflow(
                    f"step {step + 1} (loss {value:.4g}, gradient norm {float(norm):.4g})"
                )
            if time.monotonic() - saved > SAVE_EVERY:  # here the weights are known to be good
                save()
            optimiser.step()
            losses.append(value)
            step += 1
            bar.update()
            bar.set_postfix(bpd=f"{value:.3f}", refresh=False)
            if step in recipe.snapshots:
                keep()
    model.eval()
    return history


def _check(model: Glow, images: Tensor, validation: Tensor, recipe: FlowRecipe) -> None:
    for name, part, least in (("images", images, recipe.batch_size), ("validation", validation, 1)):
        if (
            not isinstance(part, Tensor)
            or part.dtype != torch.uint8
            or part.device.type != "cpu"
            or tuple(part.shape[1:]) != model.image_shape
        ):
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
    if not 0 <= recipe.shift < min(model.image_shape[1:]):
        raise OodlibError(
            f"train_flow: shift must lie in [0, {min(model.image_shape[1:])}), the border is "
            f"reflected; got {recipe.shift}."
        )


def _key(model: Glow, recipe: FlowRecipe, seed: int, images: Tensor) -> dict[str, Any]:
    """What a saved state belongs to. Snapshots are left out: a finished run without decay may be
    made longer.
    """
    made_of = {
        **asdict(recipe),
        "snapshots": None if recipe.decay == "none" else recipe.snapshots[-1],
    }
    shapes = hashlib.sha256(
        str([(name, tuple(p.shape)) for name, p in model.named_parameters()]).encode()
    )
    pixels = hashlib.sha256(images.numpy().tobytes())
    return {
        "recipe": made_of,
        "seed": seed,
        "network": shapes.hexdigest()[:16],
        "images": pixels.hexdigest()[:16],
    }


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash_seed(*numbers))


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
    """The first kept step of at least so many epochs, the last one if there is none; or the
    nearest, by ratio.
    """
    rows = [row for row in history if row["step"] > 0]
    if nearest:
        return min(rows, key=lambda row: abs(math.log(row["epoch"] / epochs)))["step"]
    return next((row["step"] for row in rows if row["epoch"] >= epochs), rows[-1]["step"])
