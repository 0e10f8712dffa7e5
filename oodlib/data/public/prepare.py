"""Real image sets, prepared once into memory-mapped arrays and verified each time they are loaded."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock  # torch depends on it
from numpy.typing import NDArray

from oodlib.data.images import ImageSet
from oodlib.data.public.readers import (
    Raw,
    find_in_mirror,
    from_archive,
    from_torchvision,
    from_zips,
)
from oodlib.data.public.registry import SetInfo, set_info
from oodlib.errors import OodlibError
from oodlib.files import atomic_folder, write_json
from oodlib.workspace import data_root

__all__ = ["DatasetNotFound", "load", "pixel_checksum", "prepare", "prepared_info"]


class DatasetNotFound(OodlibError):
    """No source holds the set (as opposed to a source that is damaged)."""


def load(
    name: str,
    split: str,
    *,
    mirror: str | os.PathLike[str] | None = None,
    download: bool = True,
    data_dir: str | os.PathLike[str] | None = None,
) -> ImageSet:
    """A real set, memory-mapped; prepared first if this has not been done yet.

    The rows are in an order that follows from the pixels alone (that of their hashes: no class or
    time structure, so any prefix is a fair subset), hence the same for every source of the same
    set.

    Parameters
    ----------
    name, split : as in ``SETS``, for example "cifar10", "test"
    mirror : folder with ``<name>/<split>-*.parquet`` or torchvision's own files; default ``OODLIB_MIRROR``
    download : ask torchvision where the mirror does not hold the set
    data_dir : default ``OODLIB_DATA``, else ``data/`` of the project

    Returns
    -------
    ImageSet; a smaller copy than the official one is named ``<name>-incomplete``

    Raises
    ------
    OodlibError : unknown name, no source available, damaged source, or damaged prepared data
    """
    folder = _folder(name, split, data_dir)
    if not (folder / "info.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error
        with FileLock(
            folder.with_name(f".{split}.lock.part")
        ):  # two notebooks may ask at the same time
            if not (folder / "info.json").is_file():
                prepare(name, split, mirror=mirror, download=download, data_dir=data_dir)
    return _open(folder, set_info(name), split)


def prepare(
    name: str,
    split: str,
    *,
    mirror: str | os.PathLike[str] | None = None,
    download: bool = True,
    data_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Read, check and write one split under ``prepared/<name>/<split>``, replacing what is there
    only on success.
    """
    info, folder = set_info(name), _folder(name, split, data_dir)
    raw = _read(
        info, split, mirror or os.environ.get("OODLIB_MIRROR"), download, data_root(data_dir)
    )
    entry, n = info.split(split), len(raw.labels)
    if n == 0:
        raise OodlibError(
            f"{name}/{split}: {raw.source} holds no image. Copy or download it again."
        )
    if n != entry.count and not (info.partial and n < entry.count):
        raise OodlibError(
            f"{name}/{split}: {entry.count} images were expected, {raw.source} holds {n}. "
            "Copy or download it again."
        )
    hashes = _row_hashes(raw.images, raw.labels)
    checksum = _combine(hashes)
    if n == entry.count and entry.checksum and checksum != entry.checksum:
        raise OodlibError(
            f"{name}/{split}: the pixels or labels of {raw.source} have checksum {checksum}, the "
            f"official split has {entry.checksum}. Copy or download it again."
        )
    order = np.argsort(hashes, kind="stable")
    sidecar = {
        "count": n,
        "official_count": entry.count,
        "shape": list(raw.images.shape),
        "checksum": checksum,
        "class_names": list(info.class_names or raw.class_names),
        "source": raw.source,
        "terms": info.terms,
        "note": info.note if n < entry.count or not info.partial else "",
    }
    try:
        with atomic_folder(folder) as temporary:
            np.save(temporary / "images.npy", raw.images[order])
            np.save(temporary / "labels.npy", raw.labels[order])
            write_json(temporary / "info.json", sidecar)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def prepared_info(
    name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None
) -> dict[str, Any] | None:
    """The sidecar of prepared data (count, shape, checksum, source, terms, note); None if there is
    none.
    """
    path = _folder(name, split, data_dir) / "info.json"
    return json.loads(path.read_text()) if path.is_file() else None


def pixel_checksum(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    """SHA-256 over the sorted hashes of (label, shape, pixels): the same for every order of the
    rows.
    """
    return _combine(_row_hashes(images, labels))


def _unwritable(folder: Path, error: OSError) -> OodlibError:
    return OodlibError(
        f"{folder}: could not be written ({error}). Free some space, or set OODLIB_DATA to a "
        "folder on another disk; data prepared earlier is unchanged."
    )


def _folder(name: str, split: str, data_dir: str | os.PathLike[str] | None) -> Path:
    set_info(name).split(split)
    return data_root(data_dir) / "prepared" / name / split


def _read(
    info: SetInfo, split: str, mirror: str | os.PathLike[str] | None, download: bool, root: Path
) -> Raw:
    entry, tried = info.split(split), "OODLIB_MIRROR is not set"
    if mirror:
        if not Path(mirror).is_dir():
            raise OodlibError(
                f"OODLIB_MIRROR names {mirror}, which is not a folder. Correct it or unset it."
            )
        raw = find_in_mirror(info, split, Path(mirror))
        if raw:
            return raw
        tried = "the mirror does not hold it"
    remedy = f"Put {info.folders[0]}/{entry.mirror or split}-*.parquet under OODLIB_MIRROR, or allow the download."
    archive = entry.archive or info.archive
    if not (info.torchvision or archive):
        files = ", ".join(entry.idx or ()) or f"{entry.mirror or split}-*.parquet"
        raise DatasetNotFound(
            f"{info.name}/{split} is not available: {tried}, and no library downloads it. Put "
            f"{files} under {info.folders[0]}/ of OODLIB_MIRROR."
        )
    if not download:
        raise DatasetNotFound(
            f"{info.name}/{split} is not available: {tried}, and downloads are off. {remedy}"
        )
    try:
        if archive:
            import pooch

            address, md5 = archive
            path = pooch.retrieve(
                address, f"md5:{md5}", fname=Path(address).name, path=root / "raw", progressbar=True
            )
            return (
                from_zips([Path(path)], info)
                if entry.zips
                else from_archive(Path(path), split, info)
            )
        return from_torchvision(info, entry, root / "raw", download=True)
    except OodlibError:
        raise
    except Exception as error:  # urllib, tarfile, RuntimeError, ...: torchvision and pooch differ
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DatasetNotFound(
            f"{info.name}/{split} is not available: {tried}, and the download failed ({reason}). "
            f"{remedy}"
        ) from error


def _row_hashes(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.bytes_]:
    shape = str(images.shape[1:]).encode()
    digests = [
        hashlib.sha256(
            b"%d %b " % (label, shape) + np.ascontiguousarray(image).tobytes()
        ).hexdigest()
        for image, label in zip(images, labels.tolist(), strict=True)
    ]
    return np.array(digests, dtype="S64")


def _combine(hashes: NDArray[np.bytes_]) -> str:
    return hashlib.sha256(b"".join(np.sort(hashes).tolist())).hexdigest()


@functools.lru_cache(maxsize=64)
def _checksum_of(folder: str, stamp: tuple[int, ...]) -> str:
    """Full checksum of prepared data, once per process and state of the files."""
    return pixel_checksum(
        np.load(Path(folder) / "images.npy", mmap_mode="r"), np.load(Path(folder) / "labels.npy")
    )


def _open(folder: Path, info: SetInfo, split: str) -> ImageSet:
    remedy = f"Delete the folder {folder} and run again to prepare it afresh."
    try:
        sidecar = json.loads((folder / "info.json").read_text())
        images, labels = (
            np.load(folder / "images.npy", mmap_mode="r"),
            np.load(folder / "labels.npy"),
        )
        states = [(folder / file).stat() for file in ("images.npy", "labels.npy")]
        found = _checksum_of(
            str(folder), tuple(n for s in states for n in (s.st_size, s.st_mtime_ns))
        )
    except (OSError, ValueError, EOFError) as error:
        raise OodlibError(
            f"{folder}: the prepared data cannot be read ({error}). {remedy}"
        ) from error
    if list(images.shape) != sidecar["shape"] or len(labels) != sidecar["count"]:
        raise OodlibError(
            f"{folder}: shape {sidecar['shape']} was written, {list(images.shape)} is there. "
            f"{remedy}"
        )
    if found != sidecar["checksum"]:
        raise OodlibError(
            f"{folder}: checksum {sidecar['checksum']} was written, the files have {found}. "
            f"{remedy}"
        )
    name = info.name if sidecar["count"] == sidecar["official_count"] else f"{info.name}-incomplete"
    return ImageSet(name, split, images, labels, tuple(sidecar["class_names"]))
