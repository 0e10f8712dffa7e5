"""What is scored: image folders, lists, single images, and files of features or logits."""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import nn

from oodlib.data.folders import SUFFIXES, ImageList, Transform, image_loader
from oodlib.errors import OodlibError
from oodlib.features.extract import extract, stream
from oodlib.features.feature_bank import FeatureBank
from oodlib.workspace import root

__all__ = [
    "FEATURE_SUFFIXES",
    "SHARD",
    "UNREADABLE",
    "EveryImage",
    "FeatureFile",
    "Images",
    "Transform",
    "open_images",
]

SHARD = 500  # on a CPU, 500 large images are minutes of work that an interruption may cost
FEATURE_SUFFIXES = {".npz", ".safetensors"}
UNREADABLE = int(np.iinfo(np.int64).min)  # label of an image that does not decode


def open_images(path: str | Path, transform: Transform) -> ImageList:
    """The images of a folder (all below it; label = rank of the first-level folder), of a list
    file, or one image.

    A list holds one path per line, relative to the list's own folder, alone or followed by a space
    and a label.

    Raises
    ------
    OodlibError : nothing there, no image in it, or a listed file is missing
    """
    if not str(path):  # Path("") would be the current folder
        raise OodlibError("score: no folder was named. Give a folder of images.")
    path = Path(path)
    if path.is_dir():
        return ImageList(path, transform=transform)
    if not path.is_file():
        raise OodlibError(
            f"score: {path} is neither a folder nor a file. Give a folder of images, or a text "
            "file with one path per line."
        )
    if path.suffix.lower() in SUFFIXES:
        return ImageList(path.parent, [(path.name, -1)], transform=transform)
    try:
        lines = [
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except UnicodeDecodeError as error:
        raise OodlibError(
            f"score: {path} is neither an image ({', '.join(sorted(SUFFIXES))}) nor a text file "
            "with one path per line."
        ) from error
    return ImageList(
        path.parent,
        [_list_row(path.parent, line) for line in lines],
        transform=transform,
        name=path.stem,
    )


class EveryImage(ImageList):
    """The same images, for a pass that must not stop at a damaged file: another image of the list
    stands in for it.

    Its label is `UNREADABLE`, so that nothing made of the stand-in is used. OodlibError: no image
    decodes.
    """

    def __init__(self, images: ImageList):
        rows = list(zip(images.paths, images.labels.tolist(), strict=True))
        super().__init__(images.root, rows, transform=images.transform, name=images.name)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            picture, label = self.picture(index), int(self.labels[index])
        except OodlibError:
            picture, label = self._stand_in, UNREADABLE
        return (picture if self.transform is None else self.transform(picture)), label

    @functools.cached_property
    def _stand_in(self) -> Any:
        for index in range(len(self)):
            with contextlib.suppress(OodlibError):
                return self.picture(index)
        raise OodlibError(
            f"score: none of the {len(self)} images of {self.name} can be decoded. Check the "
            "folder, or copy the images again."
        )


def _list_row(folder: Path, line: str) -> tuple[str, int]:
    before, _, last = line.rpartition(" ")
    if before and last.removeprefix("-").isdecimal() and not (folder / line).is_file():
        return before, int(last)
    return line, -1


class FeatureFile:
    """What some network computed, without the network: ``.safetensors`` (read in pieces) or
    ``.npz`` (read whole).

    It holds ``features`` (N, D) with the ``weight`` (C, D) and ``bias`` (C,) of the head, or only
    ``logits`` (N, C); besides, ``labels`` (N,) and, in ``.npz``, ``paths`` (N,).

    Attributes
    ----------
    only_logits : there are no features, so that only methods of the logits can be used

    Raises
    ------
    OodlibError : no such file, none of these arrays in it, arrays that do not fit
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise OodlibError(f"score: there is no file {path}.")
        try:
            if self.path.suffix == ".npz":
                with np.load(self.path) as file:
                    self._arrays: dict[str, Any] = {key: file[key] for key in file.files}
            else:
                self._map()
        except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
            raise OodlibError(
                f"score: {path} cannot be read as {self.path.suffix} ({error}). Write it again."
            ) from error
        self.only_logits = "weight" not in self._arrays
        self._main = "logits" if self.only_logits else "features"
        if self._main not in self._arrays:
            raise OodlibError(
                f"score: {path} holds {', '.join(sorted(self._arrays)) or 'nothing'}; it needs "
                "features and the head's weight (and bias), or logits."
            )
        self.bank(0, 1)

    def _map(self) -> None:
        """Map the file anew: what was read of it before no longer counts as this process's memory."""
        file = safe_open(self.path, framework="numpy")
        self._arrays = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 no dict

    def __len__(self) -> int:
        return self._shape(self._main)[0]

    def _shape(self, key: str) -> tuple[int, ...]:
        value = self._arrays[key]
        return tuple(value.get_shape() if hasattr(value, "get_shape") else value.shape)

    def bank(self, start: int = 0, stop: int | None = None) -> FeatureBank:
        """Rows ``start`` to ``stop`` as a bank; of logits alone, they are the features under an
        identity head.
        """
        for key in {"labels", "paths", "logits"} & self._arrays.keys():
            if self._shape(key)[:1] != self._shape(self._main)[:1]:
                raise OodlibError(
                    f"score: {self.path}: {self._main} {self._shape(self._main)} and {key} "
                    f"{self._shape(key)} need equal row counts."
                )
        stop = len(self) if stop is None else min(stop, len(self))
        rows: dict[str, Any] = {
            key: np.asarray(self._arrays[key][start:stop])
            for key in ("features", "logits", "labels")
            if key in self._arrays
        }
        if self.only_logits:
            rows["features"] = rows.pop("logits")
            rows["weight"] = np.eye(rows["features"].shape[-1], dtype=np.float32)
        else:
            rows |= {
                key: np.asarray(self._arrays[key][:])
                for key in ("weight", "bias")
                if key in self._arrays
            }
        return FeatureBank.from_arrays(**rows)

    def names(self, start: int, stop: int) -> list[str]:
        if "paths" in self._arrays:
            return [str(path) for path in self._arrays["paths"][start:stop]]
        return [f"{self.path}:{i}" for i in range(start, stop)]

    @property
    def identity(self) -> str:
        stat = self.path.stat()
        return f"{self.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"

    def stamp(self, start: int, stop: int) -> str:
        return ""  # one changed row changes the file, see identity

    def banks(self, start: int, rows: int) -> Iterator[FeatureBank]:
        for i in range(start, len(self), rows):
            if self.path.suffix != ".npz":
                self._map()
            yield self.bank(i, i + rows)


class Images:
    """Images on disk behind a network: the counterpart of `FeatureFile`."""

    def __init__(
        self, path: str, model: nn.Module, transform: Transform, given: argparse.Namespace
    ):
        self.list, self.model, self.given = open_images(path, transform), model, given

    def __len__(self) -> int:
        return len(self.list)

    def _loader(self, images: ImageList) -> Any:
        return image_loader(images, batch_size=self.given.batch_size, workers=self.given.workers)

    def bank(self) -> FeatureBank:
        """All of it from one pass; a finished one is read from the cache, an interrupted one goes
        on.
        """
        with plain_errors(Exception):
            return extract(
                self.model,
                self._loader(self.list),
                shard_rows=SHARD,
                device=self.given.device,
                cache=self.given.cache or root() / "data" / "cache" / "banks",
                model_name="".join(
                    c if c.isalnum() or c in "._-" else "-" for c in self.given.model
                ),
            )

    def banks(self, start: int, rows: int) -> Iterator[FeatureBank]:
        """Image by image; the label of one that does not decode is `UNREADABLE`."""
        with plain_errors(Exception):
            yield from stream(
                self.model,
                self._loader(EveryImage(self.list)),
                start=start,
                shard_rows=rows,
                device=self.given.device,
            )

    def names(self, start: int, stop: int) -> list[str]:
        return [str(self.list.root / path) for path in self.list.paths[start:stop]]

    @property
    def identity(self) -> str:
        return repr(self.list.transform)

    def stamp(self, start: int, stop: int) -> str:
        """What tells these rows from changed ones."""
        stats = [(self.list.root / path).stat() for path in self.list.paths[start:stop]]
        return "".join(
            f"{name} {stat.st_size} {stat.st_mtime_ns}\n"
            for name, stat in zip(self.names(start, stop), stats, strict=True)
        )


@contextlib.contextmanager
def plain_errors(kind: type[Exception]) -> Iterator[None]:
    """One line: a worker process wraps its error in a traceback, a user's transform and model may
    raise anything.
    """
    try:
        yield
    except kind as error:
        text = str(error).strip()
        found = re.findall(rf"^[\w.]*\b{type(error).__name__}: (.*)$", text, re.MULTILINE)
        line = found[-1] if found else text.partition("\n")[0]
        if isinstance(error, OSError):
            line = f"score: {line[:300]}. Check the path, its permissions and the free disk space."
        elif not isinstance(error, OodlibError):
            line = (
                "score: an image did not pass through the transform and the model "
                f"({type(error).__name__}: {line[:300]}). The transform must give tensors of one "
                "shape that the model takes."
            )
        raise OodlibError(line) from error
