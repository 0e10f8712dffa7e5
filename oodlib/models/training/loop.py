"""The training loop of every recipe: resumable, with history, progress bar and overflow error."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from oodlib.errors import OodlibError
from oodlib.files import atomic_path

SAVE_EVERY = 60.0  # seconds between two saved states, besides those at rows of history
_FORMAT = b"oodlib training state 2"  # enters the checksum: older files are refused


class TrainingRun:
    """Steps of one training, resumed from the state in ``path`` where there is one.

    Parameters
    ----------
    name : of the training function, for messages
    key : what decides the run; a state with another key is refused
    path : where states are saved; None saves none
    parts : whatever else has a state (``state_dict``, ``load_state_dict``) that decides later steps

    Attributes
    ----------
    step : number of finished steps
    history : rows so far, each with its "step"
    losses : of the steps since the last row

    Raises
    ------
    OodlibError : the state is damaged, of an earlier version, or belongs to another run
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        *,
        key: Any,
        path: str | Path | None = None,
        parts: Mapping[str, Any] | None = None,
    ):
        self.name, self.model, self.optimiser, self.key = name, model, optimiser, key
        self.path = Path(path) if path else None
        self.parts = {"model": model, "optimiser": optimiser, **(parts or {})}
        self.step, self.history, self.losses = 0, list[dict[str, Any]](), list[float]()
        self._started = time.monotonic()
        if self.path and self.path.exists():
            state = load_state(self.path)
            if state["key"] != key:
                raise OodlibError(
                    f"{name}: {self.path} belongs to another run: {state['key']}, this one is "
                    f"{key}. Delete it to start afresh, or restore the old settings."
                )
            for part, content in state["parts"].items():
                self.parts[part].load_state_dict(content)
            self.step, self.history, self.losses = state["step"], state["history"], state["losses"]
            self._started -= state["seconds"]

    @property
    def seconds(self) -> float:
        """Wall time of the whole run, interruptions left out."""
        return time.monotonic() - self._started

    def mean_loss_row(self) -> dict[str, Any]:
        """The usual row of history: step, mean loss since the last row, seconds of the run."""
        return {"step": self.step, "loss": float(np.mean(self.losses)), "seconds": self.seconds}

    def overflow(self, what: str) -> OodlibError:
        """The error for a number that is infinite or NaN."""
        good = "no usable weights were saved"
        if self.path and self.history:
            good = f"the last good weights are those after step {self.history[-1]['step']}"
        return OodlibError(f"{self.name}: {what} overflowed. Lower lr or lengthen warmup; {good}.")

    def run_steps(
        self,
        loss: Callable[[int], Tensor],
        *,
        rate: Callable[[int], float],
        rows: Collection[int],
        row: Callable[[], dict[str, Any]] | None = None,
        clip: float | None = None,
        after_step: Callable[[int], None] | None = None,
        after_row: Callable[[dict[str, Any]], None] | None = None,
        progress: bool = True,
        title: str = "training",
    ) -> list[dict[str, Any]]:
        """Train up to the last step of ``rows``; returns the history and leaves evaluation mode.

        Parameters
        ----------
        loss : of a step, counted from 0; it draws its batch itself, from generators of that step
        rate : learning rate of a step, as a share of a parameter group's "peak" where it has one
        rows : numbers of finished steps at which the history gets a row and the state is saved
        row : makes that row, before the state is saved; `mean_loss_row` where not given
        clip : largest L2 norm of the model's gradient
        after_step, after_row : called with the number of finished steps; with the row, after saving

        Raises
        ------
        OodlibError : a loss or gradient that overflows; the last good state stays on disk
        """
        total, pending, saved = max(rows), None, time.monotonic()

        def add_row() -> None:
            nonlocal pending, saved
            self.history.append((row or self.mean_loss_row)())
            self.losses.clear()
            if self.path:
                save_state(self.path, self._pack())
            pending, saved = None, time.monotonic()
            if after_row:
                after_row(self.history[-1])
                self.model.train()

        self.model.train()
        if 0 in rows and not self.history:
            add_row()
        bar = tqdm(
            desc=title,
            total=total,
            initial=self.step,
            unit="step",
            disable=None if progress else True,
        )
        with bar:
            while self.step < total:
                # gradient
                for group in self.optimiser.param_groups:
                    group["lr"] = group.get("peak", 1.0) * rate(self.step)
                self.optimiser.zero_grad(set_to_none=True)
                batch_loss = loss(self.step)
                batch_loss.backward()
                norm = math.nan
                if clip is not None:
                    norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), clip))

                # a state is written once the next loss shows that its weights are good
                value = batch_loss.item()
                if not math.isfinite(value) or (clip is not None and not math.isfinite(norm)):
                    raise self.overflow(
                        f"step {self.step + 1} (loss {value:.4g}, gradient norm {norm:.4g})"
                    )
                if self.path and pending:
                    save_state(self.path, pending)
                    pending, saved = None, time.monotonic()

                # step
                self.optimiser.step()
                self.losses.append(value)
                self.step += 1
                if after_step:
                    after_step(self.step)
                bar.update()
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                if self.step in rows:
                    add_row()
                elif self.path and time.monotonic() - saved > SAVE_EVERY:
                    pending = self._pack()
        self.model.eval()
        return self.history

    def _pack(self) -> memoryview:
        return pack_state(
            {
                "key": self.key,
                "step": self.step,
                "history": self.history,
                "losses": self.losses,
                "seconds": self.seconds,
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
            }
        )


def pack_state(state: dict[str, Any]) -> memoryview:
    """Tensors, numbers, texts and containers of them as bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def save_state(path: str | Path, packed: memoryview) -> None:
    """Write what `pack_state` gave behind its checksum, whole or not at all."""
    checksum = hashlib.sha256(_FORMAT)
    checksum.update(packed)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(checksum.digest())
        file.write(packed)


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote, tensors on the CPU; OodlibError for a damaged file."""
    data = Path(path).read_bytes()
    if hashlib.sha256(_FORMAT + data[32:]).digest() != data[:32]:
        raise OodlibError(
            f"{path} is damaged, or an earlier version of oodlib wrote it. Delete it; the training "
            "then starts afresh."
        )
    state: dict[str, Any] = torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
    return state
