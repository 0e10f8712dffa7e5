"""Where the project and its data lie, the four profiles, and what code a cached result rests on. No
heavy import.
"""

from __future__ import annotations

import ast
import hashlib
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from oodlib.errors import OodlibError
from oodlib.files import sha256

PROFILES = ("smoke", "laptop", "benchmark", "paper")
STAMP = ".key"  # the runner's mark in the folder of a finished headless run
_PACKAGE = Path(__file__).resolve().parent
_LIBRARIES = ("torch", "torchvision", "timm")


def root() -> Path:
    """The repository: ``OODLIB_ROOT`` where set, else the folder above the package.

    Raises
    ------
    OodlibError : ``OODLIB_ROOT`` is not set, and no repository lies around the package
    """
    named = os.environ.get("OODLIB_ROOT")
    if named:
        return Path(named)
    if not (_PACKAGE.parent / "data" / "claims").is_dir():
        raise OodlibError(
            "This installation of oodlib holds the code alone: clone the repository and set "
            "OODLIB_ROOT to its folder, which holds the data, weights, claims and notebooks."
        )
    return _PACKAGE.parent


def data_root(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where downloads and prepared sets live: ``data_dir``, else ``OODLIB_DATA``, else ``data/`` of
    the project.
    """
    return Path(data_dir or os.environ.get("OODLIB_DATA") or root() / "data")


def check_profile(profile: str) -> str:
    """Return ``profile`` if it is one of the four; otherwise an OodlibError that names them."""
    if profile not in PROFILES:
        raise OodlibError(f"profile must be one of {', '.join(PROFILES)}; got {profile!r}.")
    return profile


def _file_of(module: str) -> Path | None:
    """The file of one of our modules; None where there is no such module."""
    path = _PACKAGE.parent.joinpath(*module.split("."))
    return next(
        (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None
    )


def imported_modules(source: str) -> set[str]:
    """Our modules that a Python text imports anywhere in it, or reaches as ``oodlib.x.y`` after
    ``import oodlib``.
    """
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise OodlibError(
                    f"imported_modules: line {node.lineno} holds a relative import. Write the full "
                    "name."
                )
            names += [f"{node.module}.{item.name}" for item in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    found = set()
    for name in names:
        while name and not (name.partition(".")[0] == _PACKAGE.name and _file_of(name)):
            name = name.rpartition(".")[0]
        found |= {name} - {""}
    return found


@cache
def _imports_of(path: Path, _changed: int) -> frozenset[str]:
    return frozenset(imported_modules(path.read_text(encoding="utf-8")))


def code_closure(*modules: str) -> dict[str, Path]:
    """These modules and all of ours that they reach by imports, with their files.

    A name taken from a package stands for everything that its ``__init__`` hands on.
    """
    found: dict[str, Path] = {}
    todo = set(modules)
    while todo:
        module = todo.pop()
        path = _file_of(module)
        if path is None:
            raise OodlibError(f"code_closure: there is no module {module!r} in {_PACKAGE}.")
        found[module] = path
        if (records := path.with_suffix(".yaml")).is_file():  # facts that the module reads
            found[f"{module}.yaml"] = records
        todo |= _imports_of(path, path.stat().st_mtime_ns) - found.keys()
    return dict(sorted(found.items()))


@cache  # of the code as it was when this process first asked
def code_hash(*modules: str) -> str:
    """SHA-256 (hexadecimal) of the code behind a cached result: its closure, and versions of torch,
    torchvision, timm.

    One function for banks, networks trained live and sweeps, so that no list of files has to be
    kept by hand.
    """
    digest = hashlib.sha256()
    for module, path in code_closure(*modules).items():
        digest.update(f"{module} {sha256(path)}\n".encode())
    for library in _LIBRARIES:
        try:
            digest.update(f"{library} {version(library)}\n".encode())
        except PackageNotFoundError:
            digest.update(f"{library} absent\n".encode())
    return digest.hexdigest()
