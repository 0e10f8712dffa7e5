"""How the jobs of a sweep are started: processes of this machine, or submitit (a SLURM cluster, or
its local stand-in).

Whether a job is done is read from its files alone. A process that has ended without a record is
recorded as failed.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
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
from oodlib.studies.vits.sweep.tables import collect

__all__ = ["Resources", "run_local", "run_submitit", "run_sweep"]

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
    """Do what is missing or failed, bring the tables up to date, say what came of it; 1 if
    something is not done.

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
    ended = 0

    def report(job: Job) -> None:
        nonlocal ended
        ended += 1
        found, error = state(job)
        print(
            f"[{ended}/{len(todo)}] {job.name}  {found}{': ' if error else ''}{error}", flush=True
        )

    for job in todo:
        with try_lock(job) as held:
            if held:
                job.sidecar.unlink(missing_ok=True)  # an error of an earlier run
    if todo and where == "local":
        run_local(todo, resources, report)
    elif todo:
        run_submitit(todo, output, where, resources, report, poll=poll)
    path = collect(output, dict.fromkeys(job.row.name for job in jobs), jobs[0].source.splits())
    print(
        "",
        describe(jobs),
        "",
        f"Summary: {path}" if path else "No model has all it needs for a score table yet.",
        sep="\n",
    )
    return int(any(state(job)[0] != "done" for job in mine))


def run_local(jobs: Sequence[Job], resources: Resources, report: Report) -> None:
    """Run every job in a process of its own, so that one that crashes takes nothing with it."""
    # a server that has imported torch once forks every job in no time; Windows has none
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload(
            ["oodlib.studies.vits.score_table", "oodlib.features.extract"]
        )
    waiting, free = list(reversed(jobs)), list(range(resources.at_once))
    running: dict[Any, tuple[Job, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and free:
                job = replace(waiting.pop(), slot=free.pop(0))
                process = context.Process(
                    target=_work, args=(job, resources.at_once), name=job.name
                )
                process.start()
                running[process.sentinel] = job, process, time.monotonic() + 60 * resources.timeout
            ended = wait(
                list(running), timeout=min(end for _, _, end in running.values()) - time.monotonic()
            )
            late = [sentinel for sentinel, (_, _, end) in running.items() if time.monotonic() > end]
            for sentinel in {*ended, *late}:
                job, process, _ = running.pop(sentinel)
                if sentinel in late and sentinel not in ended:
                    process.kill()
                process.join()
                free.append(job.slot or 0)
                reason = (
                    f"ran longer than {resources.timeout} min"
                    if sentinel in late
                    else _ending(process.exitcode)
                )
                note_death(job, f"The process {reason}.")
                report(job)
    finally:
        for _, process, _ in running.values():
            process.kill()


def _work(job: Job, at_once: int) -> None:
    import torch

    if "OMP_NUM_THREADS" not in os.environ:  # the process is the job's own
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // at_once))
    run_job(job)


def _ending(code: int) -> str:
    signal = f"was ended by signal {-code}" + (" (killed: out of memory?)" if code == -9 else "")
    return signal if code < 0 else f"ended with code {code} and left no record"


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
    poll : seconds between two looks; a job out of the queue gets three to show its record (network disks are slow)

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
    cluster = "slurm" if where == "slurm" else "local"
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise OodlibError(
            "sweep: there is no SLURM here (no sbatch). Start it on a machine of the cluster, or "
            "with --where local."
        )
    executor = submitit.AutoExecutor(
        folder=output / "logs" / "%j", cluster=cluster, slurm_max_num_timeout=0
    )
    executor.update_parameters(
        name="oodlib-sweep",
        timeout_min=resources.timeout,
        cpus_per_task=resources.cpus,
        **({"gpus_per_node": resources.gpus} if resources.gpus else {}),
    )
    waiting, running = list(jobs), {}
    if cluster == "slurm":
        running, waiting = dict(_submit_arrays(executor, waiting, resources)), []
    last_seen: dict[Job, int] = {}  # looks since it was seen in the queue
    queue = _SlurmQueue()
    while waiting or running:
        while waiting and len(running) < resources.at_once:
            job = waiting.pop(0)
            running[job] = executor.submit(Task(), job)
        time.sleep(poll)
        alive = (
            queue.alive(running)
            if cluster == "slurm"
            else {job for job, handle in running.items() if not handle.done()}
        )
        for job in list(running):
            last_seen[job] = 0 if job in alive else last_seen.get(job, 0) + 1
            if last_seen[job] == 3:
                note_death(
                    job,
                    f"The process of job {running[job].job_id} ended and left no record (killed, "
                    f"out of memory or time?). Its log: {running[job].paths.stderr}",
                )
            if last_seen[job] == 3 or state(job)[0] in ("done", "failed"):
                del running[job]
                report(job)


class Task:
    """What submitit runs; on pre-emption SLURM starts it again, and since a job leaves nothing
    half-done, from anew.
    """

    def __call__(self, job: Job) -> str:
        return run_job(job)

    def checkpoint(self, job: Job) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, job)


def _submit_arrays(
    executor: Any, jobs: Sequence[Job], resources: Resources
) -> Iterator[tuple[Job, Any]]:
    """Job arrays no larger than the site allows, one after the other, so that ``at_once`` holds for
    all together.
    """
    limit, previous = _array_limit(), ""
    for start in range(0, len(jobs), limit):
        part = jobs[start : start + limit]
        extra = {**resources.slurm, **({"dependency": f"afterany:{previous}"} if previous else {})}
        executor.update_parameters(
            slurm_array_parallelism=resources.at_once,
            slurm_additional_parameters=extra,
            **({"slurm_partition": resources.partition} if resources.partition else {}),
        )
        try:
            handles = executor.map_array(Task(), part)
        except Exception as error:  # submitit's, subprocess's: no common base
            raise OodlibError(
                f"sweep: SLURM refuses the jobs: {' '.join(str(error).split())[-400:]}. Check "
                "partition, account and limits (--partition, --gpus, --timeout, --slurm "
                "KEY=VALUE)."
            ) from error
        previous = handles[0].job_id.split("_")[0]
        yield from zip(part, handles, strict=True)


def _array_limit() -> int:
    config = _ask(["scontrol", "show", "config"]) or ""
    found = [
        line.partition("=")[2] for line in config.splitlines() if line.startswith("MaxArraySize")
    ]
    return max(1, int(found[0]) if found else _MAX_ARRAY)


class _SlurmQueue:
    """Who is still in the queue, by squeue: it needs no accounting, which many small clusters lack."""

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
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
