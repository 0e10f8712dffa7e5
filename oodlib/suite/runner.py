"""Headless, incremental runs of the notebooks.

A run is done when its folder ``figures/<profile>/<notebook>/`` holds the stamp with the right key:
a hash of the notebook, its parameters, and everything it depends on. The folder appears whole, by a
rename, or not at all. papermill and torch are imported only where something has to run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from oodlib.files import atomic_folder, remove_parts, sha256, write_text
from oodlib.suite.notebooks import Notebook, check_names, list_notebooks, load_profile
from oodlib.workspace import STAMP, code_closure, imported_modules, root

__all__ = ["Options", "Plan", "is_done", "make_plans", "run_all", "run_one"]

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
    jobs: int = 1
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
        lacking = [
            name
            for name in extra
            if not any(name in notebook.parameters() for notebook in notebooks)
        ]
        for notebook in notebooks if lacking else []:
            check_names(notebook, extra, where="-p")
    data = _data_hash()
    plans, skipped = [], {}
    for notebook in notebooks:
        values = wanted[notebook.name]
        if isinstance(values, str):
            skipped[notebook.name] = values
            continue
        given = {**extra, "seed": options.seed, "device": options.device}
        values = {
            **values,
            **{
                name: value
                for name, value in given.items()
                if value is not None and name in notebook.parameters()
            },
        }
        folder = (options.output or root() / "figures") / options.profile / notebook.name
        plans.append(Plan(notebook, values, folder, _key(notebook, values, options, data)))
    return plans, skipped


def _key(notebook: Notebook, values: dict[str, Any], options: Options, data: dict[str, str]) -> str:
    """Hash over everything that can change the run's result."""
    modules = code_closure(*imported_modules("\n".join(notebook.code())))
    judge = {
        path: re.search(r"^notebook:\s*(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        for path in (root() / "data" / "claims").glob("*.yaml")
    }
    own = {
        f"claims/{path.name}"
        for path, found in judge.items()
        if found and found[1] == notebook.name
    }
    others = (
        {f"claims/{path.name}" for path in judge} - own if own else set()
    )  # without own claims: may read all
    content = {
        "cells": notebook.cells,
        "parameters": values,
        "device": options.device,
        "seed": options.seed,
        "modules": {name: sha256(path) for name, path in modules.items()},
        "data": {name: value for name, value in data.items() if name not in others},
        "mirror": os.environ.get("OODLIB_MIRROR", "")
        if options.profile in ("benchmark", "paper")
        else "",
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


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
    """Run what is not done, ``options.jobs`` at a time; returns the names of the notebooks that
    failed.
    """
    todo = [plan for plan in plans if options.force or not is_done(plan)]
    for plan in plans:
        if plan not in todo:
            print(f"{plan.notebook.name}  up to date", flush=True)
    if options.jobs == 1 or len(todo) <= 1:
        return [plan.notebook.name for plan in todo if not run_one(plan, options)]
    children: list[subprocess.Popen[bytes]] = []
    pool = ThreadPoolExecutor(
        options.jobs
    )  # one process a notebook, so that each has its own environment
    try:
        good = list(pool.map(lambda plan: _run_process(plan, options, children), todo))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.terminate()
        raise
    return [plan.notebook.name for plan, fine in zip(todo, good, strict=True) if not fine]


def _run_process(plan: Plan, options: Options, children: list[subprocess.Popen[bytes]]) -> bool:
    command = [
        sys.executable,
        "-m",
        "oodlib",
        "notebook",
        plan.notebook.name,
        "--profile",
        options.profile,
    ]
    command += ["--seed", str(options.seed)] if options.seed is not None else []
    command += ["--device", options.device] if options.device else []
    command += ["--force"] if options.force else []
    command += ["--output", str(options.output)] if options.output else []
    for name, value in options.extra.items():
        if name in plan.notebook.parameters():
            command += ["-p", name, value]
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    child = subprocess.Popen(
        command, env={"OMP_NUM_THREADS": threads, **os.environ, "OODLIB_ROOT": str(root())}
    )
    children.append(child)
    return child.wait() == 0


def run_one(plan: Plan, options: Options) -> bool:
    """Run one notebook into its folder; False, with the cell and its traceback on stderr, where it
    fails.
    """
    from oodlib.suite.execute import NotebookFailure, execute

    name = plan.notebook.name
    with _lock(plan.folder):
        remove_parts(plan.folder)
        if is_done(plan) and not options.force:  # another process finished it while this one waited
            return True
        try:
            with atomic_folder(plan.folder) as folder:
                execute(
                    plan.notebook.path,
                    folder / f"{name}.ipynb",
                    plan.parameters,
                    _environment(folder, options),
                )
                write_text(folder / STAMP, plan.key + "\n")
        except NotebookFailure as failure:
            kept = root() / "build" / "failed" / options.profile / f"{name}.ipynb"
            write_text(kept, failure.executed)
            kept_as = f"The executed notebook is kept as {kept.relative_to(root())}."
            print(f"{failure}\n{kept_as}", file=sys.stderr, flush=True)
            return False
    return True


def _environment(folder: Path, options: Options) -> dict[str, str]:
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
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
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
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time run one notebook; the system frees the lock of a process that dies."""
    path = root() / "build" / "locks" / f"{folder.parent.name}-{folder.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{folder.name}  waiting for another run of it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
