"""Readers of image sets: Parquet shards, IDX files, zips of class folders, torchvision's classes.

Each returns a `Raw`: decoded uint8 images of one size, labels, class names and their source.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from oodlib.data.images import ImageSet
from oodlib.data.public.registry import SetInfo, Split
from oodlib.errors import OodlibError

_CHUNK = 1024


@dataclass(frozen=True)
class Raw:
    """A split as it was read: (n, c, h, w), (n,), names, and the source without machine paths."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    source: str


def find_in_mirror(info: SetInfo, split: str, mirror: Path) -> Raw | None:
    """A split from a mirror, None if it is not there; OodlibError for a damaged file."""
    entry = info.split(split)
    for folder in (mirror / name for name in info.folders):
        shards = sorted(folder.glob(f"{entry.mirror or split}-*.parquet"))
        if shards:
            return read_parquet(shards, info)
        zips = [folder / file for file in entry.zips if (folder / file).is_file()]
        if zips:
            return from_zips(zips, info)
        if entry.idx:
            for files in ([root / file for file in entry.idx] for root in (folder / "raw", folder)):
                if any(file.is_file() for file in files):
                    return read_idx(files[0], files[1], md5=info.raw_md5)
    if info.archive and (archive := mirror / Path(info.archive[0]).name).is_file():
        return from_archive(archive, split, info)
    return None


def download_raw(info: SetInfo, split: str, folder: Path) -> Raw:
    """A split from its archive or through torchvision; raises what pooch and torchvision raise."""
    entry = info.split(split)
    if not (archive := entry.archive or info.archive):
        return from_torchvision(info, entry, folder, download=True)
    import pooch

    address, md5 = archive
    name = Path(address).name
    path = Path(pooch.retrieve(address, f"md5:{md5}", fname=name, path=folder, progressbar=True))
    return from_zips([path], info) if entry.zips else from_archive(path, split, info)


def read_parquet(shards: Sequence[Path], info: SetInfo) -> Raw:
    """Columns ``image`` {bytes, path} and ``label``; class names from the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_shards(shards)
    names: tuple[str, ...] = ()
    try:
        opened = []
        for shard in shards:  # `shard` names the file in the message below
            opened.append(pq.ParquetFile(shard))
            metadata = opened[-1].schema_arrow.metadata or {}
            names = tuple(json.loads(metadata.get(b"class_names", b"[]"))) or names
            missing = {"image", "label"} - set(opened[-1].schema_arrow.names)
            if missing:
                raise OodlibError(
                    f"{shard}: the columns image and label are needed, "
                    f"{', '.join(sorted(missing))} is missing. Write the file in the layout that "
                    "docs/data.md shows."
                )
        total = sum(file.metadata.num_rows for file in opened)
        images, labels = np.empty((total, *info.size), np.uint8), np.empty(total, np.int64)
        done = 0
        with _bar(total, shards[0].parent.name) as bar:
            for shard, file in zip(shards, opened, strict=True):
                for batch in file.iter_batches(_CHUNK, columns=["image", "label"]):
                    rows = batch.column("image").to_pylist()
                    jobs = [(row["bytes"], f"{shard}, image {row['path']}") for row in rows]
                    _decode_all(jobs, info, images[done : done + len(rows)], bar)
                    column = batch.column("label").to_numpy(zero_copy_only=False)
                    labels[done : done + len(rows)] = column
                    done += len(rows)
    except (pa.ArrowException, OSError) as error:
        raise OodlibError(
            f"{shard}: not a readable Parquet file ({_short(error)}). It is probably truncated: "
            "copy it again, or unset OODLIB_MIRROR to download the set instead."
        ) from error
    source = f"{shards[0].parent.name}/{shards[0].name.split('-')[0]}-*.parquet"
    return Raw(images, labels, names, source)


def _check_shards(shards: Sequence[Path]) -> None:
    """A missing part of ``x-00000-of-00002`` must not pass for a small set."""
    parts = [re.search(r"-(\d+)-of-(\d+)\.parquet$", shard.name) for shard in shards]
    if all(parts):
        expected = int(parts[0][2])  # type: ignore[index]
        if len(shards) != expected:
            raise OodlibError(
                f"{shards[0].parent}: {len(shards)} of {expected} Parquet files of "
                f"{shards[0].name.split('-')[0]} are there. Copy the missing ones."
            )


def _decode_all(
    jobs: Sequence[tuple[bytes, str]], info: SetInfo, out: NDArray[np.uint8], bar: tqdm
) -> None:
    """Decode the pictures (bytes, where from) into ``out``, in parallel."""
    with _pool() as pool:
        for i, image in enumerate(pool.map(lambda job: _decode(job[0], job[1], info), jobs)):
            out[i] = image
            bar.update()


def _decode(data: bytes, where: str, info: SetInfo) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            return _fit(picture, info)
    except Exception as error:  # Pillow raises many types for broken data
        raise OodlibError(
            f"{where}: the image cannot be decoded ({_short(error)}). Copy or download the file "
            "again."
        ) from error


def _fit(picture: Any, info: SetInfo) -> NDArray[np.uint8]:
    """A PIL picture as (c, h, w) uint8: cropped as the set says, then `ImageSet.resized`."""
    from PIL import Image

    c, h, w = info.size
    picture = picture.convert("RGB" if c == 3 else "L")
    if picture.size != (w, h):  # pictures of the prepared size have been cropped before
        if info.crop == "whole":
            picture = picture.resize((w, h), Image.Resampling.BILINEAR)
        elif info.crop != "centre":
            if picture.width < info.crop[2] or picture.height < info.crop[3]:
                raise OodlibError(
                    f"{info.name}: the crop box {info.crop} does not fit into a picture of "
                    f"{picture.width}x{picture.height} pixels. Use the publisher's own pictures."
                )
            picture = picture.crop(info.crop)
    pixels = np.asarray(picture).reshape(picture.height, picture.width, c).transpose(2, 0, 1)
    one = ImageSet("picture", "", pixels[None], np.zeros(1, np.int64))
    return one.resized(h, channels=c).images[0]


def read_idx(image_file: Path, label_file: Path, *, md5: Any = None) -> Raw:
    """The gzip files of the MNIST family; ``md5`` maps file names to the MD5 they must have."""
    images, labels = (_idx(path, (md5 or {}).get(path.name)) for path in (image_file, label_file))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise OodlibError(
            f"{image_file}: shapes {images.shape} and {labels.shape} (labels) do not fit together. "
            "Copy both files again."
        )
    source = f"{image_file.name} and {label_file.name}"
    return Raw(images[:, None], labels.astype(np.int64), (), source)


def _idx(path: Path, md5: str | None) -> NDArray[np.uint8]:
    remedy = "Copy it again, or unset OODLIB_MIRROR to download the set instead."
    try:
        data = path.read_bytes()
        unpacked = gzip.decompress(data)
    except FileNotFoundError as error:
        raise OodlibError(f"{path}: the file is missing. {remedy}") from error
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise OodlibError(
            f"{path}: not a readable gzip file ({_short(error)}), perhaps truncated. {remedy}"
        ) from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if md5 and found != md5:
        raise OodlibError(f"{path}: MD5 is {found}, the publisher's file has {md5}. {remedy}")
    ndim = unpacked[3] if len(unpacked) > 4 and unpacked[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(unpacked[4 : 4 + 4 * ndim], ">i4").tolist())
    if not ndim or len(unpacked) != 4 + 4 * ndim + int(np.prod(shape)):
        raise OodlibError(f"{path}: not an IDX file of bytes, or cut short. {remedy}")
    return np.frombuffer(unpacked, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def from_torchvision(info: SetInfo, entry: Split, root: Path, *, download: bool) -> Raw:
    """A split through torchvision's class; raises what torchvision raises."""
    import torchvision

    build: Callable[..., Any] = getattr(torchvision.datasets, info.torchvision)
    parts = [build(root=str(root), download=download, **kwargs) for kwargs in entry.torchvision]
    picks = [(part, i) for part in parts for i in range(len(part))]
    images, labels = np.empty((len(picks), *info.size), np.uint8), np.empty(len(picks), np.int64)

    def take(row: int) -> None:
        part, i = picks[row]
        picture, labels[row] = part[i]
        images[row] = _fit(picture, info)

    with _pool() as pool, _bar(len(picks), info.name) as bar:
        for _ in pool.map(take, range(len(picks))):
            bar.update()
    names = tuple(getattr(parts[0], "classes", ()))
    return Raw(images, labels, names, f"torchvision.datasets.{info.torchvision}")


def from_archive(archive: Path, split: str, info: SetInfo) -> Raw:
    """Tiny-ImageNet's zip: train/<id>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt."""
    try:
        with zipfile.ZipFile(archive) as opened:
            files = opened.namelist()
            root = files[0].split("/")[0]
            ids = tuple(sorted(opened.read(f"{root}/wnids.txt").decode().split()))
            if split == "train":
                train = re.compile(rf"{re.escape(root)}/train/([^/]*)/.*\.JPEG")
                owner = {f: found[1] for f in files if (found := train.fullmatch(f))}
            else:
                lines = opened.read(f"{root}/val/val_annotations.txt").decode().splitlines()
                rows = (line.split("\t") for line in lines)
                owner = {f"{root}/val/images/{row[0]}": row[1] for row in rows}
            images = np.empty((len(owner), *info.size), np.uint8)
            with _bar(len(owner), info.name) as bar:
                for i, file in enumerate(owner):
                    images[i] = _decode(opened.read(file), f"{archive}, image {file}", info)
                    bar.update()
    except (zipfile.BadZipFile, KeyError, IndexError, OSError, EOFError) as error:
        raise OodlibError(
            f"{archive}: not a readable Tiny-ImageNet archive ({_short(error)}). Delete it and run "
            "again to download it afresh."
        ) from error
    number = {name: i for i, name in enumerate(ids)}
    labels = np.array([number[name] for name in owner.values()], np.int64)
    return Raw(images, labels, ids, archive.name)


def from_zips(zips: Sequence[Path], info: SetInfo) -> Raw:
    """Zips of <any folder>/<class>/<file>.png, where <class> may be several folders deep.

    A file found in two of the zips is read once. Classes are numbered in the order of their names.
    """
    found: dict[str, bytes] = {}
    for path in zips:  # `path` names the file in the message below
        try:
            with zipfile.ZipFile(path) as opened:
                found |= {
                    file.split("/", 1)[1]: opened.read(file)
                    for file in opened.namelist()
                    if file.endswith(".png")
                }
        except (zipfile.BadZipFile, zlib.error, IndexError, OSError, EOFError) as error:
            raise OodlibError(
                f"{path}: not a readable zip of class folders ({_short(error)}). Copy or download "
                "it again."
            ) from error
    source = " and ".join(path.name for path in zips)
    images = np.empty((len(found), *info.size), np.uint8)
    jobs = [(data, f"{source}, image {file}") for file, data in found.items()]
    with _bar(len(jobs), info.name) as bar:
        _decode_all(jobs, info, images, bar)
    owners = [file.rpartition("/")[0] for file in found]
    names, labels = np.unique(owners, return_inverse=True)
    return Raw(images, labels.astype(np.int64), tuple(names.tolist()), source)


def _pool() -> ThreadPoolExecutor:
    """Pillow releases the GIL while it decodes."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _bar(total: int, name: str) -> tqdm:
    return tqdm(total=total, desc=f"preparing {name}", unit="image", disable=None)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no details'])[0][:200]}"
