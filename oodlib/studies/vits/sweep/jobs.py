"""Jobs of a sweep, one per (model, split): redone only where missing, failed or out of date.

A job's result lies below ``<output>/<model>/``: for "fit" the file ``fit.safetensors`` (a
`Reference`), for any other split a folder with a `FeatureBank` without logits (its head gives
them). ``<split>.json`` is written last: where it has the job's key and says "done", the result is
whole. A job that raised leaves "failed" and its error. A lock that ends with its process says what
is running. So nothing needs a daemon, a database or accounting.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodlib.errors import OodlibError
from oodlib.files import atomic_folder, key_of, locked, remove_parts, write_json
from oodlib.studies.vits.pool_table import PoolRow, read_pool
from oodlib.studies.vits.sweep.models_and_images import FIT, Source
from oodlib.studies.vits.sweep.tables import make_table, read_record
from oodlib.workspace import code_hash

if TYPE_CHECKING:
    from oodlib.features.feature_bank import FeatureBank


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
    inputs : hashes of weights and images as `prepare` saw them; empty where nobody has looked
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
            "version": version("oodlib"),
            "dtype": _DTYPE,
            "row": asdict(self.row),
            "split": self.split,
            "source": self.source.settings(),
            "all": self.all_features and self.split == FIT,
        }
        return key_of(asked, 64)


def chosen(pool: Path, glob: str) -> list[PoolRow]:
    """The rows of a pool with matching names; OodlibError where there is none."""
    rows = read_pool(pool)
    matching = [row for row in rows if fnmatch.fnmatchcase(row.name, glob)]
    if not matching:
        raise OodlibError(
            f"sweep: no model of {pool.name} is called {glob!r}. Its first is {rows[0].name}."
        )
    return matching


def make_jobs(rows: Iterable[PoolRow], source: Source, output: Path, **options: Any) -> list[Job]:
    """All jobs of a pool; the long ones ("fit") first, so that shards ``jobs[i::n]`` share them.

    options : ``all_features`` and ``device`` of a `Job`
    """
    rows = list(rows)
    return [
        Job(row=row, split=split, source=source, output=output, **options)
        for split in source.splits()
        for row in rows
    ]


def prepare(jobs: Sequence[Job]) -> tuple[list[Job], dict[str, str]]:
    """The jobs with hashes of their inputs, and why the images of other splits are missing."""
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
    """One of `STATES`, and the error of a failed job. Reads small files only, without torch."""
    record = read_record(job.sidecar)
    current = _is_current(job, record) or (not job.inputs and record.get("request") == job.request)
    if current and record["state"] == "done":
        return "done", ""
    with try_lock(job, patience=0) as mine:
        if not mine:
            return "running", ""
    return ("failed", record["error"]) if current else ("missing", "")


def try_lock(job: Job, *, patience: float = 2) -> AbstractContextManager[bool]:
    """Hold the job's lock, or False where another process holds it longer than ``patience`` s.

    `state` holds it for an instant when it looks, so that a worker waits a little.
    """
    if patience == 0 and not job.folder.is_dir():
        return contextlib.nullcontext(True)  # looking leaves no trace
    return locked(job.folder / f".{job.split}.lock", timeout=patience)


def run_job(job: Job) -> str:
    """Do a job unless it is done or running elsewhere; its `state` after. Errors go on record."""
    with try_lock(job) as mine:
        if not mine:
            return "running"
        if _state_on_record(job) == "done":
            return "done"
        remove_parts(job.folder / job.split)
        job.sidecar.unlink(missing_ok=True)
        started = time.time()
        try:
            facts = _pass(job)
        except Exception as error:  # whatever it is, the sweep goes on
            _record(job, "failed", error=_one_line(error), traceback=traceback.format_exc())
            return "failed"
        _record(job, "done", seconds=round(time.time() - started, 2), **facts)
    make_table(job.folder, job.source.splits(), wait_for_all=True)
    return "done"


def note_death(job: Job, reason: str) -> None:
    """Record that a job's process left no record, unless it is done or running after all."""
    with try_lock(job) as mine:
        if mine and not _state_on_record(job):
            _record(job, "failed", error=reason, traceback="")


def _is_current(job: Job, record: dict[str, Any]) -> bool:
    return (record.get("request"), record.get("inputs")) == (job.request, list(job.inputs))


def _state_on_record(job: Job) -> str:
    """The state on record, for the process that holds the lock; "" where it is of another job."""
    record = read_record(job.sidecar)
    return record["state"] if _is_current(job, record) else ""


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
    options: dict[str, Any] = {"mean": opened.mean, "std": opened.std, "device": device}
    facts = {
        "model": job.row.name,
        "data": job.split,
        "weights": weights_hash(opened.model),
        "dtype": _DTYPE,
        "transform": opened.transform,
        **opened.provenance,
    }
    count = Counter[str]()
    banks = _counted(stream(opened.model, opened.data, progress=False, **options), count)
    with contextlib.ExitStack() as stack:
        if job.split != FIT or job.all_features:
            folder = stack.enter_context(atomic_folder(job.folder / job.split))
            banks = _stored(banks, folder, opened.rows, facts)
        if job.split == FIT:
            first = next(banks)
            parts, classes = itertools.chain([first], banks), first.head.num_classes
            fitted = reference(parts, classes, per_class=job.source.per_class)
        else:
            for _ in banks:
                pass
    if job.split == FIT:
        fitted.save(job.folder / f"{FIT}.safetensors")
    labelled = count["labelled"] if job.split in (FIT, "id") else 0
    return {
        "images": count["images"],
        "device": str(pick_device(device)),
        "torch": torch.__version__,
        "code": code_hash(__name__),
        **({"accuracy": count["right"] / labelled} if labelled else {}),
        **facts,
    }


def _counted(banks: Iterable[FeatureBank], count: Counter[str]) -> Iterator[FeatureBank]:
    """The same banks; their images, labelled images and hits are added to ``count``."""
    for bank in banks:
        count["images"] += len(bank)
        if bank.labels is not None:
            count["labelled"] += int((bank.labels >= 0).sum())
            count["right"] += int((bank.logits.argmax(1) == bank.labels).sum())
        yield bank


def _stored(
    banks: Iterable[FeatureBank], folder: Path, rows: int, facts: dict[str, Any]
) -> Iterator[FeatureBank]:
    """The same banks, written to a folder as they pass, without logits: the head gives them."""
    from oodlib.features.stores import DiskStore

    store = DiskStore(folder, rows, logits=False)
    for bank in banks:
        store.write(bank)
        yield bank
    store.seal(facts)


def _record(job: Job, outcome: str, **content: Any) -> None:
    record = {
        "state": outcome,
        "request": job.request,
        "inputs": list(job.inputs),
        "version": version("oodlib"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "finished": round(time.time(), 1),
    }
    write_json(job.sidecar, record | content)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, OodlibError) else f"{type(error).__name__}: {text}"


def describe(jobs: Sequence[Job]) -> str:
    """A table of `STATES` by split, and the error of each failed job and each failed table."""
    states = {job: state(job) for job in jobs}
    counts = Counter((job.split, found) for job, (found, _) in states.items())
    splits = list(dict.fromkeys(job.split for job in jobs))
    width = max(len(split) for split in [*splits, "split", "total"])

    def line(title: str, cells: Iterable[str]) -> str:
        return f"{title:{width}}" + "".join(f"{cell:>9}" for cell in cells)

    lines = [line("split", STATES)]
    lines += [line(split, (f"{counts[split, s]:,}" for s in STATES)) for split in splits]
    totals = (sum(counts[split, s] for split in splits) for s in STATES)
    lines.append(line("total", (f"{total:,}" for total in totals)))
    failed = {job.name: error for job, (found, error) in states.items() if found == "failed"}
    for folder in dict.fromkeys(job.folder for job in jobs):
        table = read_record(folder / "scores.json")
        if table["state"] == "failed":
            failed[f"{folder.name}/scores"] = table["error"]
    return "\n".join([*lines, *(f"failed  {name}: {error}" for name, error in failed.items())])
