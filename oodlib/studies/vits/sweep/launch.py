"""How jobs of a sweep are started: processes of this machine, or submitit (SLURM, or locally).

Whether a job is done is read from its files alone. A process that has ended without a record is
recorded as failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from oodlib.errors import OodlibError
from oodlib.studies.vits.sweep.jobs import (
    Job,
    describe,
    note_death,
    prepare,
    run_job,
    state,
    try_lock,
)
from oodlib.studies.vits.sweep.processes import ending, run_processes
from oodlib.studies.vits.sweep.tables import collect

Report = Callable[[Job], None]
_MAX_ARRAY = 1001  # SLURM's default MaxArraySize
_SILENCES = 30  # polls in a row that squeue may fail


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job gets, and how many run at a time.

    Attributes
    ----------
    timeout : minutes; a job that runs longer is ended
    slurm : further options of sbatch, for example ``{"account": "vision", "mem": "32G"}``
    """

    at_once: int = 1
    timeout: int = 1440
    cpus: int = 1
    gpus: int = 0
    partition: str = ""
    slurm: dict[str, str] = field(default_factory=dict)


def run_sweep(
    jobs: Sequence[Job],
    output: Path,
    where: str,
    resources: Resources,
    *,
    shard: tuple[int, int] = (1, 1),
    poll: float = 10,
) -> int:
    """Do what is missing or failed, update the tables, print the outcome; 1 if work is left.

    Parameters
    ----------
    jobs : all of the sweep, as `oodlib.studies.vits.sweep.jobs.make_jobs` gives them
    where : "local", "slurm" or "submitit-local"
    shard : (i, n): only every n-th job, from the i-th on
    poll : see `run_submitit`
    """
    ready, absent = prepare(jobs)
    for split, reason in absent.items():
        print(f"{split} is skipped: {reason}", flush=True)
    mine = ready[shard[0] - 1 :: shard[1]]
    todo = [job for job in mine if state(job)[0] in ("failed", "missing")]
    print(f"{len(mine):,} jobs, {len(todo):,} to run.", flush=True)
    ended: list[Job] = []

    def report(job: Job) -> None:
        ended.append(job)
        text = ": ".join(filter(None, state(job)))
        print(f"[{len(ended)}/{len(todo)}] {job.name}  {text}", flush=True)

    for job in todo:
        with try_lock(job) as held:
            if held:
                job.sidecar.unlink(missing_ok=True)  # an error of an earlier run
    if todo and where == "local":
        run_local(todo, resources, report)
    elif todo:
        run_submitit(todo, output, where, resources, report, poll=poll)
    path = collect(output, dict.fromkeys(job.row.name for job in jobs), jobs[0].source.splits())
    print(f"\n{describe(jobs)}\n")
    print(f"Summary: {path}" if path else "No model has all it needs for a score table yet.")
    return int(any(state(job)[0] != "done" for job in mine))


def run_local(jobs: Sequence[Job], resources: Resources, report: Report) -> None:
    """Run every job in a process of its own, so that one that crashes takes nothing with it."""
    timeout = 60 * resources.timeout

    def ended(job: Job, code: int | None) -> None:
        note_death(job, f"The process {ending(code, timeout)}.")
        report(job)

    work = partial(_work, at_once=resources.at_once)
    run_processes(jobs, work, ended, at_once=resources.at_once, timeout=timeout)


def _work(job: Job, slot: int, at_once: int) -> None:
    import torch

    if "OMP_NUM_THREADS" not in os.environ:  # the process is the job's own
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // at_once))
    run_job(replace(job, slot=slot))


def run_submitit(
    jobs: Sequence[Job],
    output: Path,
    where: str,
    resources: Resources,
    report: Report,
    *,
    poll: float = 10,
) -> None:
    """Run the jobs through submitit and wait until each has a record or has left the queue.

    Parameters
    ----------
    where : "slurm", or "submitit-local" for submitit's processes on this machine
    poll : seconds between two looks; a job that left the queue gets three of them to show its
        record (network disks are slow)

    Raises
    ------
    OodlibError : submitit is not installed, SLURM refuses the jobs, or does not answer
    """
    try:
        import submitit
    except ImportError as error:
        raise OodlibError(
            "sweep: SLURM needs submitit. Install it: pip install 'oodlib[sweep]' (or pip install "
            "submitit)."
        ) from error
    slurm = where == "slurm"
    if slurm and shutil.which("sbatch") is None:
        raise OodlibError(
            "sweep: there is no SLURM here (no sbatch). Start it on a machine of the cluster, or "
            "with --where local."
        )
    executor = submitit.AutoExecutor(
        folder=output / "logs" / "%j",
        cluster="slurm" if slurm else "local",
        slurm_max_num_timeout=0,
    )
    executor.update_parameters(
        name="oodlib-sweep",
        timeout_min=resources.timeout,
        cpus_per_task=resources.cpus,
        **({"gpus_per_node": resources.gpus} if resources.gpus else {}),
    )
    waiting, queue = list(jobs), _SlurmQueue()
    running: dict[Job, Any] = {}
    if slurm:
        running, waiting = dict(_submit_arrays(executor, waiting, resources)), []
    unseen: dict[Job, int] = {}  # looks since it was last in the queue
    while waiting or running:
        while waiting and len(running) < resources.at_once:
            job = waiting.pop(0)
            running[job] = executor.submit(Task(), job)
        time.sleep(poll)
        alive = queue.alive(running) if slurm else {j for j, h in running.items() if not h.done()}
        for job, handle in list(running.items()):
            unseen[job] = 0 if job in alive else unseen.get(job, 0) + 1
            if unseen[job] == 3:
                note_death(
                    job,
                    f"The process of job {handle.job_id} ended and left no record (killed, out of "
                    f"memory or time?). Its log: {handle.paths.stderr}",
                )
            if unseen[job] == 3 or state(job)[0] in ("done", "failed"):
                del running[job]
                report(job)


class Task:
    """What submitit runs; SLURM restarts it after pre-emption: nothing is left half-done."""

    def __call__(self, job: Job) -> str:
        return run_job(job)

    def checkpoint(self, job: Job) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, job)


def _submit_arrays(
    executor: Any, jobs: Sequence[Job], resources: Resources
) -> Iterator[tuple[Job, Any]]:
    """Job arrays within the site's limit, one after the other: ``at_once`` holds for all."""
    limit, previous = _array_limit(), ""
    for start in range(0, len(jobs), limit):
        part = jobs[start : start + limit]
        after = {"dependency": f"afterany:{previous}"} if previous else {}
        executor.update_parameters(
            slurm_array_parallelism=resources.at_once,
            slurm_additional_parameters={**resources.slurm, **after},
            **({"slurm_partition": resources.partition} if resources.partition else {}),
        )
        try:
            handles = executor.map_array(Task(), part)
        except Exception as error:  # submitit's, subprocess's: no common base
            raise OodlibError(
                f"sweep: SLURM refuses the jobs: {' '.join(str(error).split())[-400:]}. Check "
                "partition, account and limits (--partition, --gpus, --timeout, --slurm KEY=VALUE)."
            ) from error
        previous = handles[0].job_id.split("_")[0]
        yield from zip(part, handles, strict=True)


def _array_limit() -> int:
    lines = (_ask(["scontrol", "show", "config"]) or "").splitlines()
    limits = [int(text.partition("=")[2]) for text in lines if text.startswith("MaxArraySize")]
    return max(1, limits[0]) if limits else _MAX_ARRAY


class _SlurmQueue:
    """Who is still in the queue, by squeue: it needs no accounting, which small clusters lack."""

    def __init__(self) -> None:
        self.silences = 0

    def alive(self, handles: dict[Job, Any]) -> set[Job]:
        text = _ask(["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"])
        self.silences = 0 if text is not None else self.silences + 1
        if self.silences > _SILENCES:
            raise OodlibError(
                f"sweep: squeue has not responded {_SILENCES} times. The jobs keep running; run "
                "the same command again to wait for them."
            )
        queued = set((text or "").split())
        return {job for job, handle in handles.items() if text is None or handle.job_id in queued}


def _ask(command: list[str]) -> str | None:
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "check": True}
    try:
        return subprocess.run(command, **options).stdout
    except (OSError, subprocess.SubprocessError):
        return None
