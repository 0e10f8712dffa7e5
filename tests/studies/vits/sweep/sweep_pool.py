"""A pool of tiny networks for the sweep's tests: images and weights follow from names, and traps
can be set.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import nn

from oodlib import OodlibError
from oodlib.data import ImageSet
from oodlib.studies.vits.pool_table import PoolRow
from oodlib.studies.vits.sweep.jobs import Job, make_jobs, prepare, run_job, state
from oodlib.studies.vits.sweep.launch import Resources, run_sweep
from oodlib.studies.vits.sweep.models_and_images import Opened
from oodlib.studies.vits.sweep.tables import read_record

CLASSES = 3
ROWS = {
    "fit": 400,
    "id": 200,
    "odd": 10_300,
}  # the last is more than one bank, so that a kill can hit its middle
NAMES = ("killed", "broken")


class TinyNet(nn.Module):
    """Two layers. In the middle of a large set it deletes the file ``trap`` and sends itself the
    signal named there.
    """

    def __init__(self, seed: int, trap: Path):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.fc = nn.Linear(48, 6), nn.Linear(6, CLASSES)
        self.trap, self.seen = trap, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        if self.seen > 10_100 and self.trap.exists():
            sent = signal.Signals[self.trap.read_text()]
            self.trap.unlink()
            os.kill(os.getpid(), sent)
        return self.fc(torch.relu(self.body(x.flatten(1))))


@dataclass(frozen=True)
class TinySource:
    """Three splits of noise. In its store, ``traps/<model>`` hits a pass over "odd",
    ``traps/error`` broken/id.
    """

    files: ClassVar[bool] = False
    per_class: ClassVar[int] = 20
    store: Path
    shift: int = 0

    def splits(self) -> tuple[str, ...]:
        return tuple(ROWS)

    def settings(self) -> dict[str, Any]:
        return {"shift": self.shift}

    def counts(self) -> dict[str, int]:
        return dict(ROWS)

    def manifest(self, split: str) -> str:
        if (self.store / "traps" / f"absent-{split}").exists():
            raise OodlibError(f"{split}: the folder is missing.")
        return self.images(split).fingerprint

    def weights(self, row: PoolRow) -> str:
        return str(row.seed)

    def images(self, split: str) -> ImageSet:
        rng = np.random.default_rng(len(split) + self.shift)
        labels = np.arange(ROWS[split]) % CLASSES
        pixels = rng.integers(0, 200, (ROWS[split], 3, 4, 4)) + 20 * labels[:, None, None, None]
        return ImageSet(split, "tiny", pixels.astype(np.uint8), labels)

    def open(self, row: PoolRow, split: str) -> Opened:
        if (row.name, split) == ("broken", "id") and (self.store / "traps" / "error").exists():
            raise OodlibError("the weights are missing.")
        model = TinyNet(row.seed, self.store / "traps" / row.name).eval()
        return Opened(
            model=model,
            data=self.images(split),
            transform="noise",
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
        )


def tiny_jobs(output: Path, names: Iterable[str] = NAMES) -> list[Job]:
    rows = [PoolRow(name=name, network=name, seed=i) for i, name in enumerate(names)]
    return make_jobs(rows, TinySource(output), output, device="cpu")


def set_traps(output: Path, **traps: str) -> None:
    (output / "traps").mkdir(parents=True)
    for name, text in {"killed": "SIGKILL", "error": "", **traps}.items():
        (output / "traps" / name).write_text(text)


def run_until_killed(output: str) -> None:
    """One job in this process, which its trap kills."""
    set_traps(Path(output))
    (job,) = (job for job in prepare(tiny_jobs(Path(output)))[0] if job.name == "killed/odd")
    run_job(job)


def check_scenario(
    output: Path, where: str, resources: Resources, capsys: Any, *, poll: float = 0.2, **traps: str
) -> None:
    """A sweep with a killed job and a failing model; then, repaired, a run of what is left."""
    set_traps(output, **traps)
    jobs = tiny_jobs(output)
    assert run_sweep(jobs, output, where, resources, poll=poll) == 1
    shown = capsys.readouterr().out
    states = {job.name: state(job) for job in jobs}
    bad = {"killed/odd", "broken/id"}
    assert {name for name, (found, _) in states.items() if found == "done"} == set(states) - bad
    assert {states[name][0] for name in bad} == {"failed"}
    assert states["broken/id"][1] == "the weights are missing."
    assert "failed  broken/id: the weights are missing." in shown
    assert "killed" in states["killed/odd"][1]
    done = {job.sidecar: job.sidecar.read_bytes() for job in jobs if job.name not in bad}

    (output / "traps" / "error").unlink()
    assert run_sweep(jobs, output, where, resources, poll=poll) == 0
    assert "6 jobs, 2 to run." in capsys.readouterr().out
    assert {path: path.read_bytes() for path in done} == done
    assert not list(output.rglob("*.part"))
    summary = pd.read_csv(output / "summary.csv")
    assert (
        list(summary["model"].drop_duplicates()) == list(NAMES) and len(summary) == len(NAMES) * 9
    )
    for name in NAMES:
        assert len(pd.read_parquet(output / name / "scores.parquet")) == ROWS["id"] + ROWS["odd"]
        assert read_record(output / name / "fit.json")["images"] == ROWS["fit"]
