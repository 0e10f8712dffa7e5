"""Tasks in processes: a crash, a kill or a late task ends alone; an interrupt ends what runs."""

import os
import signal
import time
from pathlib import Path

import pytest

from oodlib.studies.vits.sweep import processes
from oodlib.studies.vits.sweep.processes import ending, run_processes


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PRELOAD", [])
    here = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, here)))


def act(task: str, slot: int) -> None:
    assert slot in (0, 1)
    if task == "raises":
        raise ValueError(task)
    if task == "sleeps":
        time.sleep(60)
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_ends_badly_takes_nothing_with_it() -> None:
    codes: dict[str, int | None] = {}
    tasks = ["killed", "fine", "raises", "sleeps", "good"]
    run_processes(tasks, act, codes.__setitem__, at_once=2, timeout=8)
    assert codes == {"killed": -9, "fine": 0, "raises": 1, "sleeps": None, "good": 0}
    assert "killed" in ending(-9) and "without" not in ending(1) and "0.5 min" in ending(None, 30)


def test_an_error_of_the_caller_ends_what_is_running() -> None:
    def stop(task: str, code: int | None) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_processes(["fine", "sleeps", "sleeps"], act, stop, at_once=2)
    assert time.monotonic() - started < 40
