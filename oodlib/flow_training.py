"""One training loop for flows: seeded, resumable after a kill, with weights kept at chosen steps.

The recipe is that of Montazeran and Köthe's code (arXiv 2502.00820) but for three stated departures: the warm-up goes
step by step instead of epoch by epoch, gradients are clipped, and the rate is set by the caller.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from oodlib.errors import OodlibError
from oodlib.files import atomic_path, sha256, write_json
from oodlib.models.glow import Glow, bits_per_dim, dequantise
from oodlib.training import augment, hash_seed

__all__ = ["FlowRecipe", "mean_bits_per_dim", "snapshot_path", "train_flow"]

SAVE_EVERY = 60.0                 # seconds between two states to resume from
_INITIALISE, _VALIDATE = 1, 2     # what a generator is for, beside the steps


@dataclass(frozen=True)
class FlowRecipe:
    """Everything that decides a training run, besides the images, the network and the seed.

    ``snapshots`` are the steps whose weights are kept, 0 being the state after actnorm's initialisation; the last one
    ends the run. A longer run with the same first snapshots repeats the shorter one.
    """

    snapshots: tuple[int, ...]
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 5e-5
    warmup: int = 200                       # steps of linear rise to lr
    clip: float = 20.0                      # largest L2 norm of a step's gradient, of bits per dim
    n_initialise: int = 512                 # images that set the actnorms
    flip: Literal["none", "random"] = "none"
    shift: int = 0                          # random translation by up to so many pixels, reflected border

    def __post_init__(self) -> None:
        if list(self.snapshots) != sorted({0, *self.snapshots}) or len(self.snapshots) < 2:
            raise OodlibError(f"FlowRecipe: snapshots must rise from 0 to the last step, got {self.snapshots}.")


def snapshot_path(folder: Path, step: int) -> Path:
    """Where the weights after ``step`` steps lie; a JSON file with their checksum lies beside them."""
    return folder / f"step_{step:07d}.safetensors"


@torch.no_grad()
def mean_bits_per_dim(model: Glow, images: Tensor, *, seed: int, batch_size: int = 250,
                      device: str | torch.device = "cpu") -> float:
    """Mean bits per dim of uint8 images; noise of a seed, so that two models are compared on the same numbers."""
    x = dequantise(images, generator=torch.Generator().manual_seed(hash_seed(seed, _VALIDATE, 0)))
    values = [bits_per_dim(model.log_prob(part.to(device)), model.image_shape).cpu() for part in x.split(batch_size)]
    return float(torch.cat(values).mean())


def train_flow(model: Glow, images: Tensor, validation: Tensor, recipe: FlowRecipe, *, seed: int, folder: Path,
               device: str | torch.device = "cpu", progress: bool = True) -> list[dict[str, Any]]:
    """Train ``model`` in place by maximum likelihood; returns one row of history per snapshot.

    loss = mean bits per dim of a batch; Adamax. A run that was killed goes on from the last saved state and gives the
    same weights as one that was not.

    Parameters
    ----------
    images, validation : (n, c, h, w) uint8, disjoint
    seed : of order, augmentation and noise; initialise the weights yourself under a seed of its own
    folder : gets ``step_*.safetensors`` with their records, and ``resume.pt`` while the run is not finished

    Returns
    -------
    rows with step, epoch, train_bpd (mean since the last row, NaN at 0), validation_bpd, seconds

    Raises
    ------
    OodlibError : fewer images than a batch; a loss or gradient that overflows (the last good state stays on disk); a
        state in ``folder`` that is damaged or belongs to another run
    """
    n, steps_per_epoch = len(images), len(images) // recipe.batch_size
    if steps_per_epoch == 0 or len(validation) == 0:
        raise OodlibError(f"train_flow: {n} images do not fill one batch of {recipe.batch_size}, or there is none of "
                          f"the {len(validation)} for validation. Use a smaller batch_size or more images.")
    model.to(device).train()
    optimiser = torch.optim.Adamax(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    key = _key(model, recipe, seed, images)
    history: list[dict[str, Any]] = []
    step, seconds, losses, resume = 0, 0.0, [], folder / "resume.pt"
    if resume.exists():
        state = _read(resume)
        if state["key"] != key:
            raise OodlibError(f"train_flow: {resume} belongs to another run: {state['key']}, this one is {key}. "
                              "Delete the folder to start afresh, or restore the old settings.")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        history, step, seconds, losses = state["history"], state["step"], state["seconds"], state["losses"]
    else:
        model.initialise(_batch(images[torch.randperm(n, generator=_generator(seed, _INITIALISE, 1))]
                                [:recipe.n_initialise], recipe, _generator(seed, _INITIALISE, 0)).to(device))
    wanted, started, saved = set(recipe.snapshots), time.monotonic() - seconds, time.monotonic()

    def save() -> None:
        payload = {"key": key, "model": model.state_dict(), "optimiser": optimiser.state_dict(), "history": history,
                   "step": step, "seconds": time.monotonic() - started, "losses": losses}
        _write(resume, payload)

    def keep() -> None:
        bpd = mean_bits_per_dim(model, validation, seed=seed, device=device)
        history.append({"step": step, "epoch": step / steps_per_epoch, "validation_bpd": bpd,
                        "train_bpd": sum(losses) / len(losses) if losses else math.nan,
                        "seconds": time.monotonic() - started})
        losses.clear()
        path = snapshot_path(folder, step)
        with atomic_path(path) as temporary:
            save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, temporary)
        row = {name: None if value != value else value for name, value in history[-1].items()}
        write_json(path.with_suffix(".json"), {"key": key, "sha256": sha256(path), **row})

    if step == 0 and not history:
        keep()
        save()
    bar = tqdm(total=recipe.snapshots[-1], initial=step, desc="training", unit="step",
               disable=None if progress else True)
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    while step < recipe.snapshots[-1]:
        if epoch != step // steps_per_epoch:
            epoch = step // steps_per_epoch
            order = torch.randperm(n, generator=_generator(seed, 0, epoch))
        start = step % steps_per_epoch * recipe.batch_size
        x = _batch(images[order[start:start + recipe.batch_size]], recipe, _generator(seed, 3, step)).to(device)
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else recipe.lr
        loss = bits_per_dim(model.log_prob(x), model.image_shape).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or not norm.isfinite():
            raise OodlibError(f"train_flow: step {step + 1} overflowed (loss {losses[-1]:.4g}, gradient norm "
                              f"{float(norm):.4g}). Lower lr or lengthen warmup; the last good weights are "
                              f"{snapshot_path(folder, history[-1]['step'])} and the state in {resume}.")
        optimiser.step()
        step += 1
        bar.update()
        bar.set_postfix(bpd=f"{losses[-1]:.3f}", refresh=False)
        if step in wanted:
            keep()
        if step in wanted or time.monotonic() - saved > SAVE_EVERY:
            save()
            saved = time.monotonic()
    bar.close()
    model.eval()
    return history


def _key(model: Glow, recipe: FlowRecipe, seed: int, images: Tensor) -> dict[str, Any]:
    """What a saved state belongs to. The last snapshot is left out: a finished run may be made longer."""
    made_of = {**asdict(recipe), "snapshots": None}
    shapes = hashlib.sha256(str([(name, tuple(p.shape)) for name, p in model.named_parameters()]).encode())
    pixels = hashlib.sha256(images.numpy().tobytes())
    return {"recipe": made_of, "seed": seed, "network": shapes.hexdigest()[:16], "images": pixels.hexdigest()[:16]}


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash_seed(*numbers))


def _batch(images: Tensor, recipe: FlowRecipe, generator: torch.Generator) -> Tensor:
    """Augmented and dequantised, on the CPU: the same numbers for every device."""
    return dequantise(augment(images.float(), recipe, 0, None, generator).to(torch.uint8), generator=generator)


def _write(path: Path, state: dict[str, Any]) -> None:
    """A torch file behind its own SHA-256, so that a damaged one is found before it is used."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(hashlib.sha256(payload).digest())
        file.write(payload)


def _read(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise OodlibError(f"train_flow: {path} is damaged: its checksum does not match. Delete it; the run starts "
                          "afresh, the snapshots beside it stay.")
    return torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
