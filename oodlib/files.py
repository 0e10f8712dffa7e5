"""Files written whole or not at all, and their checksums."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["atomic_folder", "atomic_path", "remove_parts", "sha256", "write_json", "write_text"]


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on any error it is
    removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it replaces ``path``.

    On any error the temporary folder is removed and ``path`` is as it was. A folder cannot be
    replaced in one step: a process that is killed between the two renames leaves the former content
    as ``.<name>.old.part``, which the next call, or `remove_parts`, puts back.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _put_back(path)
    old = _former(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(temporary, path)
        if old.is_dir():
            with contextlib.suppress(OSError):
                os.replace(old, temporary)  # a half-deleted folder must not pass for the former one
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(path)


def remove_parts(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left beside ``path``; a former content that is the only copy is
    put back.
    """
    path = Path(path)
    _put_back(path)
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _former(path: Path) -> Path:
    """Where `atomic_folder` lays the former content while it renames."""
    return path.with_name(f".{path.name}.old.part")


def _put_back(path: Path) -> None:
    if _former(path).is_dir() and not path.exists():
        os.replace(_former(path), path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text with ``\\n`` line ends, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON (sorted keys, indented, no NaN), whole or not at all."""
    write_text(
        path,
        json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n",
    )


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
