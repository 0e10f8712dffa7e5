"""Sweeps of a pool: one job per (model, split), each redone only where its result is missing,
failed or out of date.

A job's result lies below ``<output>/<model>/``: for "fit" the file ``fit.safetensors`` (a
`Reference`), for any other split a folder with a `FeatureBank` that leaves out the logits (its head
gives them). ``<split>.json`` is written last: where it stands with the job's key and says "done",
the result is whole. A job that raised leaves "failed" and its error. A lock that ends with its
process says what is running. So nothing needs a daemon, a data base or accounting.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import itertools
import json
import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from oodlib.errors import OodlibError
from oodlib.files import atomic_folder, remove_parts, write_json
from oodlib.studies.vits.pool_table import PoolRow, read_pool
from oodlib.studies.vits.sweep.models_and_images import FIT, Opened, Source
from oodlib.studies.vits.sweep.tables import make_table, read_record
from oodlib.workspace import code_hash

if TYPE_CHECKING:
    from oodlib.features.feature_bank import FeatureBank

__all__ = [
    "STATES",
    "Job",
    "chosen",
    "describe",
    "make_jobs",
    "note_death",
    "prepare",
    "run_job",
    "state",
    "try_lock",
]

STATES = ("done", "running", "failed", "missing")
_DTYPE = "float32"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model and one split.

    Attributes
    ----------
    source : what finds the model and the images
    output : folder of the sweep
    all_features : whether "fit" keeps the features of every image beside the `Reference`
    inputs : hashes of the weights and of the images as `prepare` saw them; empty where nobody has looked
    slot : number of the local worker, which takes the GPU of that number
    """

    row: PoolRow
    split: str
    source: Source
    output: Path
    all_features: bool = False
    device: str = "auto"
    inputs: tuple[str, ...] = ()
    slot: int | None = None

    @property
    def name(self) -> str:
        return f"{self.row.name}/{self.split}"

    @property
    def folder(self) -> Path:
        return self.output / self.row.name

    @property
    def sidecar(self) -> Path:
        return self.folder / f"{self.split}.json"

    @cached_property
    def request(self) -> str:
        """Hash of what is asked for, as far as it shows without weights and images."""
        asked = {
            "format": 1,
            "version": version("oodlib"),
            "dtype": _DTYPE,
            "row": asdict(self.row),
            "split": self.split,
            "source": self.source.settings(),
            "all": self.all_features and self.split == FIT,
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def chosen(pool: Path, glob: str) -> list[PoolRow]:
    """The rows of a pool with such names; OodlibError where there is none."""
    rows = read_pool(pool)
    found = [row for row in rows if fnmatch.fnmatchcase(row.name, glob)]
    if not found:
        raise OodlibError(
            f"sweep: no model of {pool.name} is called {glob!r}. Its first is {rows[0].name}."
        )
    return found


def make_jobs(
    rows: Iterable[PoolRow],
    source: Source,
    output: Path,
    *,
    all_features: bool = False,
    device: str = "auto",
) -> list[Job]:
    """All jobs of a pool; the long ones ("fit") first, so that every shard ``jobs[i::n]`` gets its
    part of them.
    """
    rows = list(rows)
    return [
        Job(
            row=row,
            split=split,
            source=source,
            output=output,
            all_features=all_features,
            device=device,
        )
        for split in source.splits()
        for row in rows
    ]


def prepare(jobs: Sequence[Job]) -> tuple[list[Job], dict[str, str]]:
    """The jobs with the hashes of their inputs, and the splits whose images are not available with
    the reason.
    """
    images: dict[str, str] = {}
    absent: dict[str, str] = {}
    for split in dict.fromkeys(job.split for job in jobs):
        try:
            images[split] = jobs[0].source.manifest(split)
        except OodlibError as error:
            absent[split] = str(error)
    if absent and not images:
        raise OodlibError(
            f"sweep: the images of no split are available. {next(iter(absent.values()))}"
        )
    weights = {job.row.name: job.source.weights(job.row) for job in jobs}
    return [
        replace(job, inputs=(weights[job.row.name], images[job.split]))
        for job in jobs
        if job.split in images
    ], absent


def state(job: Job) -> tuple[str, str]:
    """One of `STATES`, and the error of a failed job. Reads small files only: no weights, no
    images, no torch.
    """
    record = read_record(job.sidecar)
    current = record.get("request") == job.request and (
        not job.inputs or record.get("inputs") == list(job.inputs)
    )
    if current and record["state"] == "done":
        return "done", ""
    with try_lock(job, patience=0) as mine:
        if not mine:
            return "running", ""
    return ("failed", record["error"]) if current else ("missing", "")


@contextlib.contextmanager
def try_lock(job: Job, *, patience: float = 2) -> Iterator[bool]:
    """Hold the job's lock, or yield False where another process has held it for ``patience``
    seconds.

    Somebody who only looks (`state`) holds it for an instant, so that one who means to work waits a
    little.
    """
    if patience == 0 and not job.folder.is_dir():
        yield True  # looking leaves no trace
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.folder / f".{job.split}.lock", timeout=patience)
    try:
        lock.acquire(poll_interval=0.05)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def run_job(job: Job) -> str:
    """Do one job unless it is done or another process is at it; its `state` afterwards. An error
    becomes its record.
    """
    with try_lock(job) as mine:
        if not mine:
            return "running"
        if state_known(job) == "done":
            return "done"
        remove_parts(job.folder / job.split)
        job.sidecar.unlink(missing_ok=True)
        started = time.time()
        try:
            found = _pass(job)
        except Exception as error:  # whatever it is, the sweep goes on
            _record(job, "failed", error=_one_line(error), traceback=traceback.format_exc())
            return "failed"
        _record(job, "done", seconds=round(time.time() - started, 2), **found)
    make_table(job.folder, job.source.splits(), wait_for_all=True)
    return "done"


def state_known(job: Job) -> str:
    """The state on record, for the process that holds the lock."""
    record = read_record(job.sidecar)
    return (
        record["state"]
        if record.get("request") == job.request and record["inputs"] == list(job.inputs)
        else ""
    )


def note_death(job: Job, reason: str) -> None:
    """Record that the job's process ended without leaving anything, unless it is done or running
    after all.
    """
    with try_lock(job) as mine:
        if mine and not state_known(job):
            _record(job, "failed", error=reason, traceback="")


def _pass(job: Job) -> dict[str, Any]:
    """The forward pass, written whole; what the record says about it."""
    import torch

    from oodlib.features.extract import stream
    from oodlib.models.device import pick_device, weights_hash
    from oodlib.studies.vits.reference import reference

    device = job.device
    if device == "auto" and job.slot is not None and torch.cuda.is_available():
        device = f"cuda:{job.slot % torch.cuda.device_count()}"
    opened = job.source.open(job.row, job.split)
    count = Counter[str]()

    def counted(banks: Iterable[FeatureBank]) -> Iterator[FeatureBank]:
        for bank in banks:
            count["images"] += len(bank)
            if bank.labels is not None:
                count["labelled"] += int((bank.labels >= 0).sum())
                count["right"] += int((bank.logits.argmax(1) == bank.labels).sum())
            yield bank

    banks = counted(
        stream(
            opened.model,
            opened.data,
            mean=opened.mean,
            std=opened.std,
            device=device,
            progress=False,
        )
    )
    facts = {
        "model": job.row.name,
        "data": job.split,
        "weights": weights_hash(opened.model),
        "dtype": _DTYPE,
        "transform": opened.transform,
        **opened.provenance,
    }
    if job.split != FIT:
        with atomic_folder(job.folder / job.split) as folder:
            for _ in _kept(banks, folder, opened, facts):
                pass
    else:
        with contextlib.ExitStack() as stack:
            if job.all_features:
                banks = _kept(
                    banks, stack.enter_context(atomic_folder(job.folder / FIT)), opened, facts
                )
            first = next(banks)
            fitted = reference(
                itertools.chain([first], banks),
                first.head.num_classes,
                per_class=job.source.per_class,
            )
        fitted.save(job.folder / f"{FIT}.safetensors")
    labelled = count["labelled"] if job.split in (FIT, "id") else 0
    accuracy = {"accuracy": count["right"] / labelled} if labelled else {}
    return {
        "images": count["images"],
        "device": str(pick_device(device)),
        "torch": torch.__version__,
        "code": code_hash(__name__),
        **accuracy,
        **facts,
    }


def _kept(
    banks: Iterable[FeatureBank], folder: Path, opened: Opened, facts: dict[str, Any]
) -> Iterator[FeatureBank]:
    """The same banks, written to a folder as they pass, without logits: the head must give them
    again.
    """
    from oodlib.features.stores import DiskStore

    store = DiskStore(folder, opened.rows, logits=False)
    for bank in banks:
        store.write(bank)
        yield bank
    store.seal(facts)


def _record(job: Job, outcome: str, **content: Any) -> None:
    write_json(
        job.sidecar,
        {
            "state": outcome,
            "request": job.request,
            "inputs": list(job.inputs),
            "version": version("oodlib"),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "finished": round(time.time(), 1),
            **content,
        },
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, OodlibError) else f"{type(error).__name__}: {text}"


def describe(jobs: Sequence[Job]) -> str:
    """The table of `STATES` by split, and the error of every failed job and of every table that
    could not be made.
    """
    states = {job: state(job) for job in jobs}
    counts = Counter((job.split, found) for job, (found, _) in states.items())
    splits = list(dict.fromkeys(job.split for job in jobs))
    width = max(len(split) for split in [*splits, "split", "total"])
    lines = [f"{'split':{width}}" + "".join(f"{name:>9}" for name in STATES)]
    lines += [
        f"{split:{width}}" + "".join(f"{counts[split, name]:>9,}" for name in STATES)
        for split in splits
    ]
    lines.append(
        f"{'total':{width}}"
        + "".join(f"{sum(counts[s, name] for s in splits):>9,}" for name in STATES)
    )
    lines += [
        f"failed  {job.name}: {error}"
        for job, (found, error) in states.items()
        if found == "failed"
    ]
    for folder in dict.fromkeys(job.folder for job in jobs):
        table = read_record(folder / "scores.json")
        if table.get("state") == "failed":
            lines.append(f"failed  {folder.name}/scores: {table['error']}")
    return "\n".join(lines)
