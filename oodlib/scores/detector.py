"""What every detector shares: facts about its paper, fit and score on a bank, save and load, and
the registry.
"""

from __future__ import annotations

import dataclasses
import json
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.files import atomic_path

__all__ = ["Detector", "Info", "create", "list_detectors", "load_detector", "names", "register"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """Facts about one method; docs/methods.md is generated from these.

    arxiv : its number there; empty where the paper is not on arXiv, and ``url`` is its address
    needs : what ``fit`` reads: nothing (``score`` works at once), features, or features and labels
    deviations : ours against the paper and its released code
    """

    key: str
    title: str
    authors: str
    year: int
    arxiv: str
    paper_larger_means: Literal["id", "ood"]
    needs: Literal["none", "features", "labels"] = "none"
    deviations: tuple[str, ...] = ()
    url: str = ""

    @property
    def link(self) -> str:
        return self.url or f"https://arxiv.org/abs/{self.arxiv}"


@dataclasses.dataclass(kw_only=True, eq=False)
class Detector:
    """A method with its parameters. The constructor only stores; learned values end in ``_``.

    A new method is a dataclass with ``_score`` and, where it learns, ``_fit``, under `register`.
    """

    info: ClassVar[Info]

    @property
    def needs_fit(self) -> bool:
        return self.info.needs != "none"

    def fit(self, bank: FeatureBank) -> Self:
        """Learn from ID training data; nothing happens where the method learns nothing.

        Raises
        ------
        OodlibError : no row, labels are missing, a class has no sample, a parameter does not fit the bank
        """
        _check_some(f"{self.info.key}.fit", bank)
        if self.info.needs == "labels" and bank.labels is None:
            raise OodlibError(
                f"{self.info.key}.fit: needs labels, this bank has none. Give labels= to "
                "FeatureBank.from_arrays."
            )
        self._fit(bank)
        self.num_features_, self.num_classes_ = bank.features.shape[1], bank.head.num_classes
        self.fitted_on_ = _network(bank)
        return self

    def score(self, bank: FeatureBank) -> NDArray[np.float64]:
        """(N,) float64, larger = more OOD. ``overflows_`` counts those that overflowed and became
        +inf.

        Raises
        ------
        OodlibError : not fitted, or fitted on another network; a bank without a row
        """
        _check_some(f"{self.info.key}.score", bank)
        if self.needs_fit and not hasattr(self, "num_features_"):
            raise OodlibError(
                f"{self.info.key}.score: not fitted. Call fit(bank) with ID training data first."
            )
        shape = (bank.features.shape[1], bank.head.num_classes)
        if self.needs_fit and shape != (self.num_features_, self.num_classes_):
            raise OodlibError(
                f"{self.info.key}.score: fitted on {self.num_features_} features and "
                f"{self.num_classes_} classes, got a bank of {shape[0]} and {shape[1]}. Use one "
                "network for both."
            )
        other = _network(bank)
        if self.needs_fit and any(
            other[k] and v and other[k] != v for k, v in getattr(self, "fitted_on_", {}).items()
        ):
            raise OodlibError(
                f"{self.info.key}.score: fitted on a bank of another network: the sizes agree, the "
                "weights do not. Fit it again on training data of this network, or use the old "
                "weights."
            )
        scores = np.asarray(self._score(bank), dtype=np.float64)
        self.overflows_ = int(np.isposinf(scores).sum())
        return scores

    def _fit(self, bank: FeatureBank) -> None:
        """Learn values named ``..._``; by default nothing."""

    def _score(self, bank: FeatureBank) -> NDArray[np.float64]:
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters and learned values into one safetensors file with a JSON header, whole
        or not at all.
        """
        arrays: dict[str, NDArray] = {}
        record = _pack(self, arrays, "")
        with atomic_path(path) as temporary:
            try:
                save_file(
                    arrays, temporary, metadata={"oodlib": json.dumps(record, sort_keys=True)}
                )
            except SafetensorError as error:
                raise OSError(f"{path}: {error}") from error


def _check_some(name: str, bank: FeatureBank) -> None:
    if not isinstance(bank, FeatureBank):
        raise OodlibError(
            f"{name}: needs a FeatureBank, got {type(bank).__name__}. Make one of arrays with "
            "FeatureBank.from_arrays."
        )
    if len(bank) == 0:
        raise OodlibError(f"{name}: the bank holds no image. Check the folder or the filter.")


def _network(bank: FeatureBank) -> dict[str, str]:
    """What tells the networks behind two banks apart: the head, and all weights where the bank
    knows them.
    """
    return {"head": bank.head.digest, "weights": bank.meta.get("weights", "")}


_REGISTRY: dict[str, type[Detector]] = {}
_TYPES: dict[str, Any] = {
    "int": numbers.Integral,
    "float": numbers.Real,
    "str": str,
    "bool": (bool, np.bool_),
    "int | None": (numbers.Integral, type(None)),
    "str | Detector": (str, Detector),
}


def register(info: Info) -> Callable[[type[Detector]], type[Detector]]:
    """Class decorator: attach the facts and make the detector known to `create`."""

    def attach(cls: type[Detector]) -> type[Detector]:
        cls.info = info
        _REGISTRY[info.key] = cls
        return cls

    return attach


def list_detectors() -> dict[str, Info]:
    """Every detector by name, with its facts."""
    return {key: _REGISTRY[key].info for key in sorted(_REGISTRY)}


names = list_detectors  # the name of the first edition


def create(name: str, **params: Any) -> Detector:
    """Make a detector; ``then=`` of react, ash and dice is another name or a detector.

    Raises
    ------
    OodlibError : an unknown name or parameter (the message lists the known ones), or a value of another type
    """
    if name not in _REGISTRY:
        raise OodlibError(
            f"create: unknown detector {name!r}. Known: {', '.join(sorted(_REGISTRY))}."
        )
    known = [f.name for f in dataclasses.fields(_REGISTRY[name])]
    if unknown := sorted(set(params) - set(known)):
        raise OodlibError(
            f"create: {name} has no parameter {unknown[0]!r}. Known: {', '.join(known) or 'none'}."
        )
    for field in dataclasses.fields(_REGISTRY[name]):
        wanted = _TYPES.get(str(field.type), object)
        value = params.get(field.name, field.default)
        if not isinstance(value, wanted) or (
            isinstance(value, bool) and str(field.type).startswith(("int", "float"))
        ):
            raise OodlibError(
                f"create: {name}'s {field.name} must be of type {field.type}, got {value!r}."
            )
    if isinstance(params.get("then"), str):
        create(params["then"])  # an unknown name is refused here, not after a long fit
    return _REGISTRY[name](**params)


def load_detector(path: str | os.PathLike[str]) -> Detector:
    """Read a detector written by `Detector.save`.

    Raises
    ------
    OodlibError : no such file, or not a detector
    """
    if not Path(path).is_file():
        raise OodlibError(
            f"load_detector: there is no file {path}. Save a fitted detector with "
            "detector.save(path)."
        )
    try:
        with safe_open(path, framework="numpy") as file:
            record = json.loads(file.metadata()["oodlib"])
            return _unpack(record, {key: file.get_tensor(key) for key in file.keys()}, "")  # noqa: SIM118 not a dict
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise OodlibError(
            f"load_detector: {path} is not a saved detector ({error}). Fit and save it again."
        ) from error


def _pack(detector: Detector, arrays: dict[str, NDArray], prefix: str) -> dict[str, Any]:
    params = {f.name: getattr(detector, f.name) for f in dataclasses.fields(detector)}
    record: dict[str, Any] = {"name": detector.info.key, "learned": {}, "nested": {}, "then": None}
    if isinstance(params.get("then"), Detector):
        record["then"] = _pack(params.pop("then"), {}, "")  # its parameters alone
    record["params"] = params
    for key, value in vars(detector).items():
        if not key.endswith("_"):
            continue
        if isinstance(value, Detector):
            record["nested"][key] = _pack(value, arrays, f"{prefix}{key}.")
        elif isinstance(value, np.ndarray):
            arrays[prefix + key] = np.ascontiguousarray(value)
        else:
            record["learned"][key] = value
    return record


def _unpack(record: dict[str, Any], arrays: dict[str, NDArray], prefix: str) -> Detector:
    then = {"then": _unpack(record["then"], {}, "")} if record["then"] else {}
    detector = create(record["name"], **record["params"], **then)
    vars(detector).update(record["learned"])
    for key, value in record["nested"].items():
        setattr(detector, key, _unpack(value, arrays, f"{prefix}{key}."))
    for key, value in arrays.items():
        if key.startswith(prefix) and "." not in key[len(prefix) :]:
            setattr(detector, key[len(prefix) :], value)
    return detector
