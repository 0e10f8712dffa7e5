"""A user's own network and data: models by name or function, image folders, feature files, a check of the labels."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import nn

from oodlib.bank import FeatureBank
from oodlib.data.image_lists import SUFFIXES, ImageList
from oodlib.errors import OodlibError
from oodlib.files import sha256

__all__ = ["FEATURE_SUFFIXES", "UNREADABLE", "ClassCheck", "EveryImage", "FeatureFile", "check_classes", "load_network",
           "open_images"]

FEATURE_SUFFIXES = {".npz", ".safetensors"}
UNREADABLE = int(np.iinfo(np.int64).min)                   # label of an image that does not decode
Transform = Callable[[Any], Any]
_OWN: set[str] = set()                                     # modules that were loaded from a user's file


@dataclass(frozen=True)
class OwnTransform:
    """A user's transform under a name that stays the same between runs, for caches: no memory addresses."""

    function: Transform
    source: str

    def __call__(self, picture: Any) -> Any:
        return self.function(picture)

    def __repr__(self) -> str:
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self.function)) + self.source


def load_network(name: str, *, weights: str | None = None, num_classes: int | None = None,
                 ) -> tuple[nn.Module, Transform]:
    """A classifier in evaluation mode and the transform of PIL images that goes with it.

    Parameters
    ----------
    name : one of the suite's networks (``cifar10_fast``, ``cifar10_fast:1`` for training seed 1, ``latin_fast``), a
        public CIFAR network (``resnet20_cifar10``), a timm model with its tag, or a function of yours that
        returns ``(model, transform)``: ``package.module:function`` or ``path/to/file.py:function``
    weights, num_classes : for timm only: a file to use instead of timm's download, and its number of classes where
        that is not the model's own

    Raises
    ------
    OodlibError : an unknown name, a function that fails or returns something else, options that do not apply
    """
    from oodlib.checkpoints import SPECS, load_trained
    from oodlib.models.public import PUBLIC, paper_model, public_model

    base, _, variant = name.rpartition(":") if ":" in name else (name, "", "")
    own = base not in SPECS and base not in PUBLIC
    if own and not variant.isidentifier():
        return paper_model(name, weights, num_classes=num_classes)
    if weights is not None or num_classes is not None:
        raise OodlibError(f"score: {name} comes with its own weights; --weights and --num-classes are for timm models.")
    if own:
        return _from_function(base, variant)
    if variant and (base in PUBLIC or not variant.isdecimal()):
        raise OodlibError(f"score: there is no network {name!r}. The suite's own take a training seed, as in "
                          "cifar10_fast:1; public ones take none.")
    if base in SPECS:
        trained = load_trained(base, seed=int(variant or 0))
        model, mean, std = trained.model, trained.mean, trained.std
    else:
        model, info = public_model(base)
        mean, std = info.mean, info.std
    from torchvision import transforms

    return model, transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor(),
                                      transforms.Normalize(mean, std)])


def _from_function(module_name: str, function: str) -> tuple[nn.Module, Transform]:
    path = Path(module_name)
    if module_name.endswith(".py"):
        if not path.is_file():
            raise OodlibError(f"score: there is no file {path}. Give path/to/file.py:function.")
        sys.path.insert(0, str(path.resolve().parent))     # so that worker processes and its own imports find it
        module_name = path.stem
        if module_name in _OWN:                            # an earlier version, or a file of the same name elsewhere
            sys.modules.pop(module_name, None)
        importlib.invalidate_caches()
        if module_name not in sys.modules:
            _OWN.add(module_name)
    try:
        module = importlib.import_module(module_name)
        result = getattr(module, function)()
    except Exception as error:                             # a user's code may raise anything
        raise OodlibError(f"score: {module_name}:{function} failed ({type(error).__name__}: "
                          f"{(str(error).splitlines() or [''])[0][:200]}). It must be a "
                          "function without arguments that returns (model, transform).") from error
    loaded = Path(getattr(module, "__file__", None) or "")
    if path.suffix == ".py" and loaded.resolve() != path.resolve():
        raise OodlibError(f"score: Python knows another module {module_name!r} ({loaded}). Rename {path}.")
    if (not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], nn.Module)
            or not callable(result[1])):
        raise OodlibError(f"score: {module_name}:{function} must return (model, transform), an nn.Module and a "
                          f"function of PIL images, got {type(result).__name__}.")
    return result[0].eval(), OwnTransform(result[1], f" {sha256(loaded)}" if loaded.is_file() else "")


def open_images(path: str | Path, transform: Transform) -> ImageList:
    """The images of a folder (all below it; label = rank of the first-level folder), of a list file, or one image.

    A list holds one path per line, relative to the list's own folder, alone or followed by a space and a label.

    Raises
    ------
    OodlibError : nothing there, no image in it, or a listed file is missing
    """
    if not str(path):                                      # Path("") would be the current folder
        raise OodlibError("score: no folder was named. Give a folder of images.")
    path = Path(path)
    if path.is_dir():
        return ImageList(path, transform=transform)
    if not path.is_file():
        raise OodlibError(f"score: {path} is neither a folder nor a file. Give a folder of images, or a text file with "
                          "one path per line.")
    if path.suffix.lower() in SUFFIXES:
        return ImageList(path.parent, [(path.name, -1)], transform=transform)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise OodlibError(f"score: {path} is neither an image ({', '.join(sorted(SUFFIXES))}) nor a text file with "
                          "one path per line.") from error
    return ImageList(path.parent, [_list_row(path.parent, line) for line in lines], transform=transform, name=path.stem)


class EveryImage(ImageList):
    """The same images, for a pass that must not stop at a damaged file: another image of the list stands in for it.

    Its label is `UNREADABLE`, so that nothing made of the stand-in is used. OodlibError: no image decodes.
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
        raise OodlibError(f"score: none of the {len(self)} images of {self.name} can be decoded. Check the folder, or "
                          "copy the images again.")


def _list_row(folder: Path, line: str) -> tuple[str, int]:
    before, _, last = line.rpartition(" ")
    if before and last.removeprefix("-").isdecimal() and not (folder / line).is_file():
        return before, int(last)
    return line, -1


class FeatureFile:
    """What some network computed, without the network: ``.safetensors`` (read in pieces) or ``.npz`` (read whole).

    It holds ``features`` (N, D) with the ``weight`` (C, D) and ``bias`` (C,) of the head, or only ``logits`` (N, C);
    besides, ``labels`` (N,) and, in ``.npz``, ``paths`` (N,).

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
            raise OodlibError(f"score: {path} cannot be read as {self.path.suffix} ({error}). Write it "
                              "again.") from error
        self.only_logits = "weight" not in self._arrays
        self._main = "logits" if self.only_logits else "features"
        if self._main not in self._arrays:
            raise OodlibError(f"score: {path} holds {', '.join(sorted(self._arrays)) or 'nothing'}; it needs features "
                              "and the head's weight (and bias), or logits.")
        self.bank(0, 1)

    def _map(self) -> None:
        """Map the file anew: what was read of it before no longer counts as this process's memory."""
        file = safe_open(self.path, framework="numpy")
        self._arrays = {key: file.get_slice(key) for key in file.keys()}               # noqa: SIM118 no dict

    def __len__(self) -> int:
        return self._shape(self._main)[0]

    def _shape(self, key: str) -> tuple[int, ...]:
        value = self._arrays[key]
        return tuple(value.get_shape() if hasattr(value, "get_shape") else value.shape)

    def bank(self, start: int = 0, stop: int | None = None) -> FeatureBank:
        """Rows ``start`` to ``stop`` as a bank; of logits alone, they are the features under an identity head."""
        for key in {"labels", "paths", "logits"} & self._arrays.keys():
            if self._shape(key)[:1] != self._shape(self._main)[:1]:
                raise OodlibError(f"score: {self.path}: {self._main} {self._shape(self._main)} and {key} "
                                  f"{self._shape(key)} need equal row counts.")
        stop = len(self) if stop is None else min(stop, len(self))
        rows: dict[str, Any] = {key: np.asarray(self._arrays[key][start:stop]) for key in
                                ("features", "logits", "labels") if key in self._arrays}
        if self.only_logits:
            rows["features"] = rows.pop("logits")
            rows["weight"] = np.eye(rows["features"].shape[-1], dtype=np.float32)
        else:
            rows |= {key: np.asarray(self._arrays[key][:]) for key in ("weight", "bias") if key in self._arrays}
        return FeatureBank.from_arrays(**rows)

    def names(self, start: int, stop: int) -> list[str]:
        if "paths" in self._arrays:
            return [str(path) for path in self._arrays["paths"][start:stop]]
        return [f"{self.path}:{i}" for i in range(start, stop)]

    @property
    def made_by(self) -> str:
        stat = self.path.stat()
        return f"{self.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"

    def stamp(self, start: int, stop: int) -> str:
        return ""                                          # one changed row changes the file, see made_by

    def banks(self, start: int, rows: int) -> Iterator[FeatureBank]:
        for i in range(start, len(self), rows):
            if self.path.suffix != ".npz":
                self._map()
            yield self.bank(i, i + rows)


@dataclass(frozen=True)
class ClassCheck:
    """Are the labels the model's classes, in its order?

    accuracy : share of images whose label is the model's answer
    chance : share of the most frequent label, what a blind guess would get
    best : accuracy if the labels were renamed one to one as well as possible
    order : (C,), ``order[label]`` is the model's class that the images of this label mostly get
    """

    n: int
    accuracy: float
    chance: float
    best: float
    order: NDArray[np.int64]

    @property
    def hint(self) -> str:
        """What is probably wrong, or nothing."""
        from scipy.stats import binom

        def beyond(share: float, expected: float) -> float:
            return float(binom.sf(round(share * self.n) - 1, self.n, expected))
        if (self.n >= 10 * len(self.order) and self.best >= max(0.5, self.accuracy + 0.1)
                and beyond(self.best, max(self.accuracy, self.chance)) < 1e-6):
            wrong = int(np.flatnonzero(self.order != np.arange(len(self.order)))[0])
            return (f"accuracy is {self.accuracy:.1%}, but {self.best:.1%} with the labels in another order: images of "
                    f"label {wrong} are called class {self.order[wrong]}. Name the folders so that they sort in the "
                    "model's order, for example 00_cat, 01_dog.")
        if beyond(self.accuracy, self.chance) > 1e-3:
            return (f"accuracy {self.accuracy:.1%} on {self.n} images is near chance ({self.chance:.1%}): wrong "
                    "weights, transform (size, mean and std, colour order) or class order. Until this is mended no OOD "
                    "score means anything.")
        return ""


def check_classes(bank: FeatureBank) -> ClassCheck | None:
    """Compare labels and answers; None where the labels are not 0 .. C-1, all of them present."""
    from scipy.optimize import linear_sum_assignment

    classes = bank.head.num_classes
    if bank.labels is None or not np.array_equal(np.unique(bank.labels), np.arange(classes)):
        return None
    counts = np.zeros((classes, classes), dtype=np.int64)                 # label by answer
    np.add.at(counts, (bank.labels, bank.logits.argmax(1)), 1)
    rows, order = linear_sum_assignment(-counts)
    n = len(bank)
    return ClassCheck(n, float(np.trace(counts) / n), float(counts.sum(1).max() / n),
                      float(counts[rows, order].sum() / n), order)
