"""Files written whole or not at all; sealed files, locks and cache keys."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from oodlib.errors import OodlibError


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


def key_of(value: Any, length: int = 16) -> str:
    """Cache key: the first ``length`` hexadecimal digits of the SHA-256 of ``value`` as JSON.

    >>> key_of({"b": 1, "a": 2}) == key_of({"a": 2, "b": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], timeout: float = -1) -> Iterator[bool]:
    """Hold the lock file ``path`` and yield True; False where another process holds it for longer
    than ``timeout`` seconds (negative: wait until it is free).
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def read_json(path: str | os.PathLike[str], what: str, remedy: str) -> dict[str, Any]:
    """A JSON object; OodlibError "``what``: <path> is missing or damaged. ``remedy``"."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        fault = f"damaged (a {type(content).__name__}, not an object)"
    except FileNotFoundError:
        fault = "missing"
    except (OSError, ValueError) as error:
        fault = f"damaged ({error})"
    raise OodlibError(f"{what}: {path} is {fault}. {remedy}")


def write_sealed(
    path: str | os.PathLike[str],
    write: Callable[[Path], object],
    record: Mapping[str, Any],
    *,
    record_path: str | os.PathLike[str] | None = None,
) -> None:
    """Write a file by ``write(temporary path)``, then its JSON record with the file's SHA-256.

    The record lies beside the file as ``<stem>.json`` unless ``record_path`` names another place.
    A reader that comes between the two writes sees a damaged file, never a wrong one.
    """
    path = Path(path)
    with atomic_path(path) as temporary:
        write(temporary)
    write_json(record_path or path.with_suffix(".json"), {**record, "sha256": sha256(path)})


def read_sealed(
    path: str | os.PathLike[str],
    what: str,
    remedy: str,
    *,
    record_path: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The record that `write_sealed` wrote, after the file has been checked against it.

    Raises
    ------
    OodlibError : "``what``: <path> is missing or damaged. ``remedy``" (which fault it is, in words)
    """
    path = Path(path)
    record = read_json(record_path or path.with_suffix(".json"), what, remedy)
    if not path.is_file():
        raise OodlibError(f"{what}: {path} is missing. {remedy}")
    if record.get("sha256") != sha256(path):
        raise OodlibError(
            f"{what}: {path} is damaged: its checksum is not the recorded one. {remedy}"
        )
    return record
