"""What is scored: image folders, lists, single images, and files of features or logits."""

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
from oodlib.errors import OodlibError, explained
from oodlib.features.extract import extract, stream
from oodlib.features.feature_bank import FeatureBank
from oodlib.workspace import root

SHARD = 500  # on a CPU, 500 large images are minutes of work that an interruption may cost
FEATURE_SUFFIXES = {".npz", ".safetensors"}
UNREADABLE = int(np.iinfo(np.int64).min)  # label of an image that does not decode


def open_images(path: str | Path, transform: Transform) -> ImageList:
    """The images of a folder, of a list file, or one image; OodlibError if there are none.

    A folder gives all images below it, labelled by the rank of the first-level folder. A list holds
    one path per line, relative to its own folder, alone or followed by a space and a label.
    """
    if not str(path):  # Path("") would be the current folder
        raise OodlibError("open_images: path is empty. Give a folder of images.")
    path = Path(path)
    if path.is_dir():
        return ImageList(path, transform=transform)
    if not path.is_file():
        raise OodlibError(f"{path} is neither a folder nor a file. Give images or a list.")
    if path.suffix.lower() in SUFFIXES:
        return ImageList(path.parent, [(path.name, -1)], transform=transform)
    what = f"{path} is neither an image nor a text file"
    with explained(UnicodeDecodeError, what, f"Give one path per line, or {', '.join(SUFFIXES)}."):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [_list_row(path.parent, line) for line in lines if line]
    return ImageList(path.parent, rows, transform=transform, name=path.stem)


def _list_row(folder: Path, line: str) -> tuple[str, int]:
    before, _, last = line.rpartition(" ")
    if before and last.removeprefix("-").isdecimal() and not (folder / line).is_file():
        return before, int(last)
    return line, -1


class EveryImage(ImageList):
    """The same images, where another one of the list stands in for an image that does not decode.

    Its label is `UNREADABLE`: nothing computed from it is used. OodlibError: no image decodes.
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
        raise OodlibError(f"{self.name}: none of the {len(self)} images can be decoded. Check it.")


class Images:
    """Images on disk behind a network; ``batches`` are options of `image_loader`."""

    only_logits = False  # there are features, for all methods

    def __init__(
        self,
        images: ImageList,
        model: nn.Module,
        *,
        weights: str,
        model_name: str,
        device: str = "auto",
        cache: str | Path | None = None,
        **batches: Any,
    ):
        self.list, self.model, self.weights, self.device = images, model, weights, device
        self.model_name = "".join(c if c.isalnum() or c in "._-" else "-" for c in model_name)
        self.cache = cache or root() / "data" / "cache" / "banks"
        self._batches = batches

    def __len__(self) -> int:
        return len(self.list)

    def bank(self) -> FeatureBank:
        """All images in one pass, or from the cache; an interrupted pass resumes."""
        with plain_errors(Exception):
            loader = image_loader(self.list, **self._batches)
            place: dict[str, Any] = {"cache": self.cache, "model_name": self.model_name}
            return extract(self.model, loader, shard_rows=SHARD, device=self.device, **place)

    def banks(self, start: int, rows: int) -> Iterator[FeatureBank]:
        """From row ``start`` on, ``rows`` at a time; a damaged image has the label `UNREADABLE`."""
        loader = image_loader(EveryImage(self.list), **self._batches)
        with plain_errors(Exception):
            yield from stream(self.model, loader, start=start, shard_rows=rows, device=self.device)

    def names(self, start: int, stop: int) -> list[str]:
        """The path of each row."""
        return [str(self.list.root / path) for path in self.list.paths[start:stop]]

    @property
    def identity(self) -> str:
        """What all rows have in common: the transform."""
        return repr(self.list.transform)

    def stamp(self, start: int, stop: int) -> str:
        """What tells these rows from changed ones."""
        stats = [(name, Path(name).stat()) for name in self.names(start, stop)]
        return "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in stats)


class FeatureFile:
    """What a network computed, in ``.safetensors`` (read in pieces) or ``.npz`` (read whole).

    It holds ``features`` (N, D) with the ``weight`` (C, D) and ``bias`` (C,) of the head, or only
    ``logits`` (N, C); besides, ``labels`` (N,) and, in ``.npz``, ``paths`` (N,). OodlibError: no
    such file, none of these arrays in it, arrays that do not fit.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise OodlibError(f"FeatureFile: there is no file {path}. Check the path.")
        kinds = (OSError, ValueError, zipfile.BadZipFile, SafetensorError)
        with explained(kinds, f"{path} cannot be read as {self.path.suffix}", "Write it again."):
            if self.path.suffix == ".npz":
                with np.load(self.path) as file:
                    self._arrays: dict[str, Any] = {key: file[key] for key in file.files}
            else:
                self._map()
        self.only_logits = "weight" not in self._arrays
        self._main = "logits" if self.only_logits else "features"
        if self._main not in self._arrays:
            found = ", ".join(sorted(self._arrays)) or "nothing"
            needed = "features and the head's weight (and bias), or logits"
            raise OodlibError(f"{path} holds {found}; it needs {needed}.")
        self.weights = self.bank(0, 1).head.digest

    def _map(self) -> None:
        """Map the file anew: what was read before no longer counts as this process's memory."""
        file = safe_open(self.path, framework="numpy")
        self._arrays = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 no dict

    def __len__(self) -> int:
        return self._shape(self._main)[0]

    def _shape(self, key: str) -> tuple[int, ...]:
        value = self._arrays[key]
        return tuple(value.get_shape() if hasattr(value, "get_shape") else value.shape)

    def bank(self, start: int = 0, stop: int | None = None) -> FeatureBank:
        """Rows ``start`` to ``stop``; logits alone become features under an identity head."""
        shape = self._shape(self._main)
        for key in {"labels", "paths", "logits"} & self._arrays.keys():
            if (other := self._shape(key))[:1] != shape[:1]:
                needed = f"as many rows as {self._main} {shape}"
                raise OodlibError(
                    f"{self.path}: {key} {other} need {needed}. Write the file again."
                )
        stop = len(self) if stop is None else min(stop, len(self))
        wanted = dict.fromkeys(("features", "logits", "labels"), slice(start, stop))
        if not self.only_logits:
            wanted |= dict.fromkeys(("weight", "bias"), slice(None))
        present = self._arrays.keys()
        rows: dict[str, Any] = {
            key: np.asarray(self._arrays[key][part])
            for key, part in wanted.items()
            if key in present
        }
        if self.only_logits:
            rows["features"] = rows.pop("logits")
            rows["weight"] = np.eye(shape[-1], dtype=np.float32)
        return FeatureBank.from_arrays(**rows)

    def banks(self, start: int, rows: int) -> Iterator[FeatureBank]:
        for i in range(start, len(self), rows):
            if self.path.suffix != ".npz":
                self._map()
            yield self.bank(i, i + rows)

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


Inputs = Images | FeatureFile


@contextlib.contextmanager
def plain_errors(kind: type[Exception]) -> Iterator[None]:
    """Any error in one line: workers wrap theirs in a traceback, user code may raise anything."""
    try:
        yield
    except kind as error:
        text = str(error).strip()
        found = re.findall(rf"^[\w.]*\b{type(error).__name__}: (.*)$", text, re.MULTILINE)
        line = found[-1] if found else text.partition("\n")[0]
        if isinstance(error, OSError):
            line = f"{line[:300]}. Check the path, its permissions and the free disk space."
        elif not isinstance(error, OodlibError):
            line = (
                "An image did not pass through the transform and the model "
                f"({type(error).__name__}: {line[:300]}). The transform must give tensors of one "
                "shape that the model takes."
            )
        raise OodlibError(line) from error
