"""Training a whole pool: independent processes of one thread, each taking what is neither done nor
being done.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from oodlib.errors import OodlibError
from oodlib.studies.vits.pool_table import PoolRow, read_pool
from oodlib.workspace import root

__all__ = ["train_pool"]


def train_pool(pool: str, *, models: str = "*", jobs: int = 1, device: str = "auto") -> list[str]:
    """Pretrain, finetune and score the rows of a small pool; returns the names of those that are
    done.

    Rows whose results are there are skipped; what was interrupted goes on. Two calls at a time
    share the work.

    Parameters
    ----------
    pool : "embedded", "cifar", or a table of such rows
    models : only rows whose name matches this pattern; the members of a soup are trained with it
    jobs : processes; one thread each, because two threads on a network this small are slower than two processes

    Raises
    ------
    OodlibError : no row matches; a process failed (the others finish what they can)
    """
    rows = read_pool(pool)
    chosen = [row for row in rows if fnmatch(row.name, models)]
    if not chosen:
        raise OodlibError(
            f"train-vit: no row of the pool {pool} matches {models!r}. It has "
            f"{', '.join(row.name for row in rows[:6])}, ..."
        )
    soups = {row.checkpoint for row in chosen if row.role.startswith("soup-")}
    chosen = [
        row for row in rows if row in chosen or (row.role == "member" and row.checkpoint in soups)
    ]
    if jobs == 1:
        _work(chosen, rows, device)
    else:
        command = [
            sys.executable,
            "-m",
            "oodlib",
            "train-vit",
            "--pool",
            str(pool),
            "--models",
            models,
            "--device",
            device,
            "--jobs",
            "1",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        workers = [subprocess.Popen(command, env=environment) for _ in range(jobs)]
        try:
            failed = [worker for worker in workers if worker.wait()]
        except BaseException:
            for worker in workers:
                worker.terminate()
            raise
        if failed:
            raise OodlibError(
                f"train-vit: {len(failed)} of {jobs} processes failed; their messages stand above. "
                "The same command goes on with what is missing."
            )
    return [row.name for row in chosen]


def _work(chosen: Sequence[PoolRow], rows: Sequence[PoolRow], device: str) -> None:
    """Go round the rows until each is done, by this process or another."""
    import torch

    from oodlib.studies.vits.trained import pool_of, pretrain, train_row

    torch.set_num_threads(1)  # the order of sums follows the number of threads
    waiting = list(chosen)
    while waiting:
        before = len(waiting)
        for row in tuple(waiting):
            unmade = [r for r in waiting if r.role == "member" and r.checkpoint == row.checkpoint]
            if row.role.startswith("soup-") and unmade:
                continue
            locks = root() / "data" / "training" / f"vits_{pool_of(row)}" / "locks"
            try:
                with _lock(locks / f"{row.checkpoint}.lock"):
                    pretrain(row, device=device)
                with _lock(locks / f"{row.name}.lock"):
                    train_row(row, device=device, rows=rows)
            except Timeout:  # another process is at it
                continue
            waiting.remove(row)
            print(f"{row.name}: done", flush=True)
        if waiting and len(waiting) == before:
            time.sleep(2)


def _lock(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout=0)
