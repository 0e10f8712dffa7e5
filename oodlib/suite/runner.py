"""Headless, incremental runs of the notebooks.

A run is done when its folder ``figures/<profile>/<notebook>/`` holds the stamp with the right key:
a hash of the notebook, its parameters, and everything it depends on. The folder appears whole, by a
rename, or not at all. papermill and torch are imported only where something has to run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from oodlib.files import atomic_folder, key_of, locked, remove_parts, sha256, write_text
from oodlib.suite.notebooks import Notebook, check_names, list_notebooks, load_profile
from oodlib.workspace import STAMP, code_closure, imported_modules, root

if TYPE_CHECKING:
    from oodlib.suite.progress import Progress


_DATA = ("claims", "manifests", "published", "checkpoints")


@dataclass(frozen=True)
class Options:
    """What the command line says about a run. ``extra`` holds the ``-p name value`` pairs, values
    as text.
    """

    profile: str = "laptop"
    seed: int | None = None
    device: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    jobs: int | None = None  # notebooks at a time; None: as many as cores and memory allow
    force: bool = False
    output: Path | None = None  # instead of figures/


@dataclass(frozen=True)
class Plan:
    """One notebook to run: its parameters, its output folder, and the key that says whether that is
    up to date.
    """

    notebook: Notebook
    parameters: dict[str, Any]
    folder: Path
    key: str


def make_plans(names: list[Path] | None, options: Options) -> tuple[list[Plan], dict[str, str]]:
    """Plans for the given notebooks (default: all), and the reasons of those that the profile
    skips.

    Raises
    ------
    OodlibError : unknown profile, or a parameter that no chosen notebook has
    """
    notebooks = [Notebook.read(path) for path in names or list_notebooks()]
    wanted = load_profile(options.profile, notebooks)
    extra = {key: yaml.safe_load(value) for key, value in options.extra.items()}
    if extra and notebooks:
        known = {name for notebook in notebooks for name in notebook.parameters()}
        if not set(extra) <= known:
            for notebook in notebooks:
                check_names(notebook, extra, where="-p")
    data = _data_hash()
    plans, skipped = [], {}
    for notebook in notebooks:
        values = wanted[notebook.name]
        if isinstance(values, str):
            skipped[notebook.name] = values
            continue
        for name, value in {**extra, "seed": options.seed, "device": options.device}.items():
            if value is not None and name in notebook.parameters():
                values[name] = value
        folder = (options.output or root() / "figures") / options.profile / notebook.name
        plans.append(Plan(notebook, values, folder, _key(notebook, values, options, data)))
    return plans, skipped


def _key(notebook: Notebook, values: dict[str, Any], options: Options, data: dict[str, str]) -> str:
    """Hash over everything that can change the run's result."""
    modules = code_closure(*imported_modules("\n".join(notebook.code())))
    # a notebook with claims of its own reads those; one without may read all
    judged_by = {}
    for path in (root() / "data" / "claims").glob("*.yaml"):
        found = re.search(r"^notebook:\s*(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        judged_by[f"claims/{path.name}"] = found[1] if found else ""
    if notebook.name in judged_by.values():
        data = {k: v for k, v in data.items() if judged_by.get(k, notebook.name) == notebook.name}
    real = options.profile in ("benchmark", "paper")
    content = {
        "cells": notebook.cells,
        "parameters": values,
        "device": options.device,
        "seed": options.seed,
        "modules": {name: sha256(path) for name, path in modules.items()},
        "data": data,
        "mirror": os.environ.get("OODLIB_MIRROR", "") if real else "",
    }
    return key_of(content, length=64)


def _data_hash() -> dict[str, str]:
    """Hashes of the committed data (claims, manifests, published numbers, checkpoints) and of the
    pinned lock.
    """
    base = root() / "data"
    files = sorted(
        path
        for name in _DATA
        for path in (base / name).rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )
    found = {path.relative_to(base).as_posix(): sha256(path) for path in files}
    lock = root() / "requirements.lock"
    return {**found, "lock": sha256(lock) if lock.exists() else ""}


def is_done(plan: Plan) -> bool:
    """Whether the output folder holds a finished run of exactly this plan."""
    stamp = plan.folder / STAMP
    return stamp.exists() and stamp.read_text(encoding="utf-8").strip() == plan.key


def run_all(plans: list[Plan], options: Options) -> list[str]:
    """Run what is not done, several at a time and the longest first; returns the names of the
    notebooks that failed. A failure does not stop the others, an interrupt stops all kernels.

    Where several notebooks are planned each has one thread, however many of them are left to run,
    so that results repeat; a single one has all cores.
    """
    todo = [plan for plan in plans if options.force or not is_done(plan)]
    for plan in plans:
        if plan not in todo:
            print(f"{plan.notebook.name}  up to date", flush=True)
    if not todo:
        return []
    from oodlib.suite.progress import Progress

    facts = _reference_facts(options.profile)
    expected = {name: record["wall_seconds"] for name, record in facts.items()}
    todo.sort(key=lambda plan: -expected.get(plan.notebook.name, 0))
    own = {name: expected[name] for name in facts if facts[name].get("notebook", name) == name}
    progress = Progress({} if options.profile == "smoke" else own)
    threads = 1 if len(plans) > 1 else _cores()
    stop = threading.Event()
    try:
        with ThreadPoolExecutor(options.jobs or _jobs(todo, facts)) as pool:
            futures = {
                plan.notebook.name: pool.submit(run_one, plan, options, progress, stop, threads)
                for plan in todo
            }
            try:
                while wait(futures.values(), timeout=1).not_done:
                    progress.tick()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                _stop_children()
                raise
    finally:
        progress.close()
    return [name for name in sorted(futures) if not futures[name].result()]


def _reference_facts(profile: str) -> dict[str, dict[str, Any]]:
    """The provenance of the committed runs of a profile, by notebook; for smoke those of laptop."""
    base = root() / "figures" / "reference" / {"smoke": "laptop"}.get(profile, profile)
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in base.glob("*/provenance.json")
    }


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _jobs(plans: list[Plan], facts: dict[str, dict[str, Any]]) -> int:
    """As many notebooks as there are cores, if the largest of them fit into the free memory at
    once; one where no committed run says what a notebook needs.
    """
    import psutil

    if not facts:
        return 1
    free = psutil.virtual_memory().available / 2**20
    usual = max(record["peak_memory_mib"] for record in facts.values())
    needs = sorted(
        (facts.get(plan.notebook.name, {}).get("peak_memory_mib", usual) for plan in plans),
        reverse=True,
    )
    return max(1, sum(total <= free for total in accumulate(needs[: _cores()])))


def _stop_children() -> None:
    """Interrupt all kernels, so that they tidy up; kill those that are still there after 3 s."""
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.send_signal(signal.SIGINT)
    for child in psutil.wait_procs(children, timeout=3)[1]:
        with contextlib.suppress(psutil.Error):
            child.kill()


def run_one(
    plan: Plan, options: Options, progress: Progress, stop: threading.Event, threads: int = 1
) -> bool:
    """Run one notebook into its folder; False, with the cell and its traceback on stderr, where it
    fails. Raises KeyboardInterrupt once ``stop`` is set.
    """
    from oodlib.suite.execute import NotebookFailure, execute

    name = plan.notebook.name

    def on_cell(index: int, cells: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        progress.cell(name, index, cells)

    with _lock(plan.folder, progress, stop):
        remove_parts(plan.folder)
        if is_done(plan) and not options.force:  # another process finished it while this one waited
            return True
        progress.start(name)
        try:
            with atomic_folder(plan.folder) as folder:
                copy = folder / f"{name}.ipynb"
                environment = _environment(folder, options, threads)
                execute(plan.notebook.path, copy, plan.parameters, environment, on_cell)
                write_text(folder / STAMP, plan.key + "\n")
        except NotebookFailure as failure:
            if stop.is_set():
                raise KeyboardInterrupt from None
            progress.end(name, "FAILED")
            kept = root() / "build" / "failed" / options.profile / f"{name}.ipynb"
            write_text(kept, failure.executed)
            kept_as = f"The executed notebook is kept as {kept.relative_to(root())}."
            progress.write(f"{failure}\n{kept_as}", error=True)
            return False
        progress.end(name, "done")
    return True


def _environment(folder: Path, options: Options, threads: int = 1) -> dict[str, str]:
    """Environment of a kernel: output folder, threads, no network through the hub, fixed hash seed
    and dates.
    """
    places = {
        name: str(Path(os.environ[name]).resolve())
        for name in ("OODLIB_MIRROR", "OODLIB_DATA")
        if os.environ.get(name)
    }  # the kernel starts in another folder
    # passive: a waiting thread gives its core away; spinning made small networks six times slower
    # on a busy machine
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        **places,
        "OODLIB_OUTPUT": str(folder.resolve()),
        "OODLIB_ROOT": str(root().resolve()),
        "OODLIB_DEVICE": options.device or os.environ.get("OODLIB_DEVICE", "auto"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": "315532800",
    }


@contextlib.contextmanager
def _lock(folder: Path, progress: Progress, stop: threading.Event) -> Iterator[None]:
    """Let one process at a time run a notebook; the lock of a process that dies is free."""
    path = root() / "build" / "locks" / f"{folder.parent.name}-{folder.name}.lock"
    waiting = False
    while not stop.is_set():
        with locked(path, timeout=1 if waiting else 0) as held:
            if held:
                yield
                return
        if not waiting:
            progress.write(f"{folder.name}  waiting for another run of it")
        waiting = True
    raise KeyboardInterrupt
