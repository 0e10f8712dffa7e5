"""Public image sets, prepared once into memory-mapped arrays and verified on every load."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodlib.data.images import ImageSet
from oodlib.data.public.readers import Raw, download_raw, find_in_mirror
from oodlib.data.public.registry import SetInfo, set_info
from oodlib.errors import OodlibError
from oodlib.files import atomic_folder, locked, read_json, write_json
from oodlib.workspace import data_root

Place = str | os.PathLike[str] | None


class DatasetNotFound(OodlibError):
    """A set is not available: no source holds it (a damaged source is another OodlibError)."""


def load(
    name: str,
    split: str,
    *,
    mirror: Place = None,
    download: bool = True,
    data_dir: Place = None,
) -> ImageSet:
    """A public set, memory-mapped; prepared first where this has not been done yet.

    The rows are sorted by the hashes of their pixels: the same order for every source of a set, and
    without class or time structure, so that any prefix is a fair subset.

    Parameters
    ----------
    name, split : as in ``SETS``, for example "cifar10", "test"
    mirror : folder with ``<name>/<split>-*.parquet`` or torchvision's own files; default
        ``OODLIB_MIRROR``
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
        with locked(folder.with_name(f".{split}.lock.part")):  # two notebooks may ask at once
            if not (folder / "info.json").is_file():
                prepare(name, split, mirror=mirror, download=download, data_dir=data_dir)
    return _open(folder, set_info(name), split)


def prepare(
    name: str,
    split: str,
    *,
    mirror: Place = None,
    download: bool = True,
    data_dir: Place = None,
) -> Path:
    """Read and check a split; write it to ``prepared/<name>/<split>``, replaced only on success."""
    info, folder = set_info(name), _folder(name, split, data_dir)
    mirror = mirror or os.environ.get("OODLIB_MIRROR")
    raw = _read(info, split, mirror, download, data_root(data_dir))
    # the number of images and their pixels must be the official ones
    entry, n = info.split(split), len(raw.labels)
    if n != entry.count and not (info.partial and 0 < n < entry.count):
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


def prepared_info(name: str, split: str, *, data_dir: Place = None) -> dict[str, Any] | None:
    """Count, shape, checksum, source, terms and note of prepared data; None if there is none."""
    path = _folder(name, split, data_dir) / "info.json"
    return json.loads(path.read_text()) if path.is_file() else None


def pixel_checksum(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    """SHA-256 of the sorted hashes of (label, shape, pixels), whatever the order of the rows."""
    return _combine(_row_hashes(images, labels))


def _unwritable(folder: Path, error: OSError) -> OodlibError:
    return OodlibError(
        f"{folder}: could not be written ({error}). Free some space, or set OODLIB_DATA to a "
        "folder on another disk; data prepared earlier is unchanged."
    )


def _folder(name: str, split: str, data_dir: Place) -> Path:
    set_info(name).split(split)
    return data_root(data_dir) / "prepared" / name / split


def _read(info: SetInfo, split: str, mirror: Place, download: bool, root: Path) -> Raw:
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
    shards = f"{entry.mirror or split}-*.parquet"
    lacking = f"{info.name}/{split} is not available: {tried}, and"
    remedy = f"Put {info.folders[0]}/{shards} under OODLIB_MIRROR, or allow the download."
    if not (info.torchvision or entry.archive or info.archive):
        raise DatasetNotFound(
            f"{lacking} no library downloads it. Put {', '.join(entry.idx or [shards])} under "
            f"{info.folders[0]}/ of OODLIB_MIRROR."
        )
    if not download:
        raise DatasetNotFound(f"{lacking} downloads are off. {remedy}")
    try:
        return download_raw(info, split, root / "raw")
    except OodlibError:
        raise
    except Exception as error:  # urllib, tarfile, RuntimeError, ...: torchvision and pooch differ
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DatasetNotFound(f"{lacking} the download failed ({reason}). {remedy}") from error


def _row_hashes(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.bytes_]:
    shape = str(images.shape[1:]).encode()
    rows = (
        b"%d %b " % (label, shape) + np.ascontiguousarray(image).tobytes()
        for image, label in zip(images, labels.tolist(), strict=True)
    )
    return np.array([hashlib.sha256(row).hexdigest() for row in rows], dtype="S64")


def _combine(hashes: NDArray[np.bytes_]) -> str:
    return hashlib.sha256(b"".join(np.sort(hashes).tolist())).hexdigest()


@functools.lru_cache(maxsize=64)
def _checksum_of(folder: str, stamp: tuple[int, ...]) -> str:
    """Full checksum of prepared data, once per process and state of the files."""
    return pixel_checksum(*_arrays(Path(folder)))


def _arrays(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy")


def _open(folder: Path, info: SetInfo, split: str) -> ImageSet:
    remedy = f"Delete the folder {folder} and run again to prepare it afresh."
    sidecar = read_json(folder / "info.json", "prepared data", remedy)
    try:
        images, labels = _arrays(folder)
        states = [(folder / file).stat() for file in ("images.npy", "labels.npy")]
        stamp = tuple(n for s in states for n in (s.st_size, s.st_mtime_ns))
        found = _checksum_of(str(folder), stamp)
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
