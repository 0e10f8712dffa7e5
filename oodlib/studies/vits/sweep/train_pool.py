"""Training a whole pool: processes of one thread, each taking what is neither done nor in work."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial

from oodlib.errors import OodlibError
from oodlib.files import locked
from oodlib.studies.vits.pool_table import PoolRow, read_pool
from oodlib.studies.vits.sweep.processes import run_processes


def train_pool(pool: str, *, models: str = "*", jobs: int = 1, device: str = "auto") -> list[str]:
    """Pretrain, finetune and score the rows of a small pool; returns the names of those done.

    Rows with results are skipped; interrupted ones are resumed. Two calls at a time share the work.

    Parameters
    ----------
    pool : "embedded", "cifar", or a table of such rows
    models : only rows whose name matches this pattern; a soup brings its members
    jobs : processes of one thread each: on networks this small faster than threads

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
    members = [row for row in rows if row.role == "member" and row.checkpoint in soups]
    chosen = [row for row in rows if row in chosen or row in members]
    if jobs == 1:
        _work(0, 0, chosen, rows, device)
        return [row.name for row in chosen]

    codes: list[int | None] = []
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process imports its libraries
    try:
        work = partial(_work, chosen=chosen, rows=rows, device=device)
        run_processes(range(jobs), work, lambda _, code: codes.append(code), at_once=jobs)
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({"OMP_NUM_THREADS": before} if before is not None else {})
    failed = sum(code != 0 for code in codes)
    if failed:
        raise OodlibError(
            f"train-vit: {failed} of {jobs} processes failed; see their messages above. The same "
            "command resumes with what is missing."
        )
    return [row.name for row in chosen]


def _work(
    _task: int, _slot: int, chosen: Sequence[PoolRow], rows: Sequence[PoolRow], device: str
) -> None:
    """Visit the rows in turn until each is done, by this process or another."""
    import torch

    from oodlib.studies.vits.recipes import pool_of, trained_folder
    from oodlib.studies.vits.trained import pretrain, train_row

    torch.set_num_threads(1)  # the order of sums follows the number of threads
    waiting = list(chosen)
    while waiting:
        before = len(waiting)
        for row in tuple(waiting):
            missing = [r for r in waiting if r.role == "member" and r.checkpoint == row.checkpoint]
            if row.role.startswith("soup-") and missing:
                continue
            locks = trained_folder(pool_of(row)) / "locks"
            with locked(locks / f"{row.checkpoint}.lock", timeout=0) as mine:
                if not mine:  # another process is at it
                    continue
                pretrain(row, device=device)
            with locked(locks / f"{row.name}.lock", timeout=0) as mine:
                if not mine:
                    continue
                train_row(row, device=device, rows=rows)
            waiting.remove(row)
            print(f"{row.name}: done", flush=True)
        if waiting and len(waiting) == before:
            time.sleep(2)
