"""Tasks in processes of this machine, each in one of its own."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any, TypeVar

Task = TypeVar("Task")
_PRELOAD = ["oodlib.studies.vits.score_table", "oodlib.features.extract"]


def run_processes(
    tasks: Iterable[Task],
    work: Callable[[Task, int], object],
    ended: Callable[[Task, int | None], object],
    *,
    at_once: int,
    timeout: float | None = None,
) -> None:
    """Run ``work(task, slot)`` of every task in a new process, ``at_once`` at a time.

    A process that crashes takes nothing with it (a `ProcessPoolExecutor` would lose all its tasks).
    ``ended(task, exit code)`` is called here as each ends; the code is None after ``timeout``
    seconds. ``slot`` counts 0 .. at_once - 1. An error or interrupt kills what is running.
    """
    # a server that has imported torch once forks every task in no time; Windows has none
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload(_PRELOAD)
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(at_once):
        slots.put(slot)
    running: set[Any] = set()
    stopped = threading.Event()

    def run(task: Task) -> int | None:
        slot = slots.get()
        process = context.Process(target=work, args=(task, slot))
        process.start()
        running.add(process)
        if stopped.is_set():
            process.kill()
        process.join(timeout)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        running.discard(process)
        slots.put(slot)
        return None if late else process.exitcode

    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(run, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                ended(futures[future], future.result())
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(running):
                process.kill()


def ending(code: int | None, timeout: float | None = None) -> str:
    """An exit code in words."""
    if code is None:
        return f"ran longer than {(timeout or 0) / 60:g} min"
    if code < 0:
        return f"was ended by signal {-code}" + " (killed: out of memory?)" * (code == -9)
    return f"ended with code {code} and left no record"
