"""What is installed, mismatched or missing, and what each profile could run with it: one screen."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from oodlib.errors import OodlibError
from oodlib.workspace import root

if TYPE_CHECKING:
    from oodlib.data.public.registry import SetInfo


_REPAIR = "Install the matched pair in one step: pip install -r requirements.lock"


def check_env() -> list[str]:
    """Problems of this installation, one sentence each with the remedy; empty where all is well."""
    problems = _import_problems()
    try:
        locked = _against_lock()
    except OodlibError as error:
        return [*problems, str(error)]
    repair = "pip install -r requirements.lock"
    for name, (wanted, found) in locked.items():
        if found is None:
            problems.append(f"{name} {wanted} is in the lock but not installed. {repair}")
        elif found.split("+")[0] != wanted:
            problems.append(f"{name} is {found}, the lock has {wanted}. {repair}")
    return problems


def _import_problems() -> list[str]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [f"torch cannot be imported ({error}). {_REPAIR}"]
    try:
        import torchvision
    except (ImportError, OSError, RuntimeError) as error:
        if "torchvision::nms" in str(error):
            return [
                f"torch {torch.__version__} and torchvision {_version('torchvision')} do not match "
                "(operator torchvision::nms does not exist): one is a CPU-only build, or from "
                f"another index. {_REPAIR}"
            ]
        return [f"torchvision cannot be imported ({error}). {_REPAIR}"]
    for requirement in map(Requirement, requires("torchvision") or []):
        if requirement.name == "torch" and not requirement.specifier.contains(
            torch.__version__, prereleases=True
        ):
            return [
                f"torchvision {torchvision.__version__} needs torch{requirement.specifier}, found "
                f"{torch.__version__}. {_REPAIR}"
            ]
    return []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _against_lock() -> dict[str, tuple[str, str | None]]:
    """Packages of the lock that apply here: (pinned version, installed version or None)."""
    lock = root() / "requirements.lock"
    found: dict[str, tuple[str, str | None]] = {}
    for line in lock.read_text(encoding="utf-8").splitlines() if lock.exists() else []:
        line = line.strip().rstrip("\\").strip()
        if re.match(r"[A-Za-z0-9]", line):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                wanted = str(requirement.specifier).removeprefix("==")
                found[requirement.name] = (wanted, _version(requirement.name))
    return found


def describe() -> tuple[str, list[str]]:
    """The screen that ``python -m oodlib doctor`` prints, and the problems in it."""
    import psutil

    problems = check_env()
    memory = psutil.virtual_memory()
    total, free = memory.total / 2**30, memory.available / 2**30
    versions = [f"{name} {_version(name)}" for name in ("torchvision", "timm")]
    rows = [
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", ", ".join([str(_version("torch")), *versions])),
        ("devices", ", ".join(_devices())),
        ("machine", f"{os.cpu_count()} cores, {total:.0f} GB memory ({free:.0f} free)"),
    ]
    with contextlib.suppress(OodlibError):  # the code alone: it is among the problems
        rows += _repository_rows(total)
    lines = [f"{name:<12}{text}" for name, text in rows]
    lines += ["", *([f"PROBLEM     {text}" for text in problems] or ["No problem found."])]
    return "\n".join(lines), problems


def _repository_rows(memory: float) -> list[tuple[str, str]]:
    """The rows of the screen that read files of the repository."""
    disk = shutil.disk_usage(root()).free / 2**30
    locked = _against_lock()
    same = sum(str(found).split("+")[0] == wanted for wanted, found in locked.values())
    present, missing = _image_sets()
    mirror = os.environ.get("OODLIB_MIRROR")
    return [
        ("disk", f"{disk:.0f} GB free"),
        ("packages", f"{same} of {len(locked)} as in the lock"),
        ("mirror", mirror or "none (OODLIB_MIRROR is not set: sets are downloaded)"),
        ("image sets", _list(present) + (f"; missing: {', '.join(missing)}" if missing else "")),
        ("weights", _list(_weights())),
        *_profiles(missing, memory).items(),
    ]


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _devices() -> list[str]:
    try:
        import torch
    except (ImportError, OSError):
        return ["unknown (torch does not import)"]
    found = ["cpu"]
    if torch.cuda.is_available():
        for at in range(torch.cuda.device_count()):
            found.append(f"cuda:{at} {torch.cuda.get_device_name(at)}")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _image_sets() -> tuple[list[str], list[str]]:
    """The real sets ("name/split") that are prepared or in the mirror, and those that are not."""
    from oodlib.data.public.prepare import prepared_info
    from oodlib.data.public.registry import SETS

    present: list[str] = []
    missing: list[str] = []
    for name, info in SETS.items():
        for split in info.splits:
            here = prepared_info(name, split) is not None or _in_mirror(info, split)
            (present if here else missing).append(f"{name}/{split}")
    return present, missing


def _in_mirror(info: SetInfo, split: str) -> bool:
    """Whether a mirror holds files of this split, by their names alone."""
    if not os.environ.get("OODLIB_MIRROR"):
        return False
    mirror, entry = Path(os.environ["OODLIB_MIRROR"]), info.split(split)
    shards = f"{entry.mirror or split}-*.parquet"
    raw = (*(entry.idx or ())[:1], *entry.zips)
    for folder in (mirror / name for name in info.folders):
        if any(folder.glob(shards)):
            return True
        if any((folder / sub / file).is_file() for sub in ("", "raw") for file in raw):
            return True
    return bool(info.archive and (mirror / Path(info.archive[0]).name).is_file())


def _weights() -> list[str]:
    """Files of weights, and folders: of flows, pools, and what a user keeps apart."""
    folders = [root() / "data" / "checkpoints", root() / "data" / "weights"]
    if os.environ.get("OODLIB_MIRROR"):
        folders.append(Path(os.environ["OODLIB_MIRROR"]) / "weights")
    return [
        path.name
        for folder in folders
        for path in sorted(folder.glob("*"))
        if path.is_dir() or path.suffix in (".safetensors", ".th", ".tar", ".pth", ".npz")
    ]


def _profiles(missing: list[str], memory: float) -> dict[str, str]:
    needs = [name for name in ("cifar10/train", "cifar10/test") if name in missing]
    benchmark = f"needs {', '.join(needs)}: make data PROFILE=benchmark" if needs else "can run"
    if not needs and missing:
        benchmark += f", without {', '.join(missing)}"
    return {
        "smoke": "can run",
        "laptop": "can run" if memory >= 3 else "may run out of memory (3 GB are needed)",
        "benchmark": benchmark,
        "paper": "needs your own data and weights: make data PROFILE=paper lists them",
    }
