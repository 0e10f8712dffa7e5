"""What detectors share: facts about the paper, fit and score on a bank, save, load and registry."""

import dataclasses
import json
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
)

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from oodlib.errors import OodlibError, one_of
from oodlib.features.feature_bank import FeatureBank
from oodlib.files import atomic_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """Facts about one method; docs/methods.md is generated from these.

    arxiv : its number there; empty where the paper is not on arXiv and has a ``url`` instead
    needs : what ``fit`` reads: nothing (``score`` works at once), features, or features and labels
    deviations : where ours differs from the paper or its released code
    """

    key: str
    title: str
    authors: str
    year: int
    arxiv: str
    needs: Literal["none", "features", "labels"] = "none"
    deviations: tuple[str, ...] = ()
    url: str = ""

    @property
    def link(self) -> str:
        return self.url or f"https://arxiv.org/abs/{self.arxiv}"


@dataclasses.dataclass(kw_only=True, eq=False)
class Detector:
    """A method with its parameters. The constructor only stores; learned values end in ``_``.

    A new method is a subclass under `register`, with ``_score`` and, where it learns, ``_fit``.
    """

    info: ClassVar[Info]

    @property
    def needs_fit(self) -> bool:
        return self.info.needs != "none"

    def fit(self, bank: FeatureBank) -> Self:
        """Learn from ID training data; nothing happens where the method learns nothing.

        Raises
        ------
        OodlibError : no row, no labels, a class without a sample, a parameter that does not fit
        """
        _check_bank(f"{self.info.key}.fit", bank)
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
        """(N,) float64, larger = more OOD; a warning counts scores that overflowed and are +inf.

        Raises
        ------
        OodlibError : not fitted, or fitted on another network; a bank without a row
        """
        name = f"{self.info.key}.score"
        _check_bank(name, bank)
        if self.needs_fit:
            self._check_network(name, bank)
        return np.asarray(self._score(bank), dtype=np.float64)

    def _check_network(self, name: str, bank: FeatureBank) -> None:
        if not hasattr(self, "num_features_"):
            raise OodlibError(f"{name}: not fitted. Call fit(bank) with ID training data first.")
        shape = (bank.features.shape[1], bank.head.num_classes)
        if shape != (self.num_features_, self.num_classes_):
            raise OodlibError(
                f"{name}: fitted on {self.num_features_} features and {self.num_classes_} classes, "
                f"got a bank of {shape[0]} and {shape[1]}. Use one network for both."
            )
        fitted, other = getattr(self, "fitted_on_", {}), _network(bank)
        if any(v and other[k] and other[k] != v for k, v in fitted.items()):
            raise OodlibError(
                f"{name}: fitted on a bank of another network: the sizes agree, the weights do "
                "not. Fit on training data of this network, or use the old weights."
            )

    def _fit(self, bank: FeatureBank) -> None:
        """Learn values named ``..._``; by default nothing."""

    def _score(self, bank: FeatureBank) -> NDArray[np.float64]:
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters and learned values, whole or not at all: safetensors, a JSON header."""
        arrays: dict[str, NDArray[Any]] = {}
        header = json.dumps(_pack(self, arrays, ""), sort_keys=True)
        with atomic_path(path) as temporary:
            try:
                save_file(arrays, temporary, metadata={"oodlib": header})
            except SafetensorError as error:
                raise OSError(f"{path}: {error}") from error


def _check_bank(name: str, bank: FeatureBank) -> None:
    if not isinstance(bank, FeatureBank):
        raise OodlibError(
            f"{name}: needs a FeatureBank, got {type(bank).__name__}. Use FeatureBank.from_arrays."
        )
    if len(bank) == 0:
        raise OodlibError(f"{name}: the bank holds no image. Check the folder or the filter.")


def _network(bank: FeatureBank) -> dict[str, str]:
    """What identifies the network behind a bank: its head, and all weights where they are known."""
    return {"head": bank.head.digest, "weights": bank.meta.get("weights", "")}


D = TypeVar("D", bound=Detector)
_REGISTRY: dict[str, type[Detector]] = {}
_TYPES: dict[Any, Any] = {
    int: numbers.Integral,
    float: numbers.Real,
    bool: (bool, np.bool_),
    str: str,
    int | None: (numbers.Integral, type(None)),
    str | Detector: (str, Detector),
}


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(dataclasses.field,))
def register(**facts: Any) -> Callable[[type[D]], type[D]]:
    """Class decorator: a dataclass with its `Info`, of these facts, and known to `create`."""
    info = Info(**facts)

    def attach(cls: type[D]) -> type[D]:
        _REGISTRY[info.key] = dataclasses.dataclass(kw_only=True, eq=False)(cls)
        cls.info = info
        return cls

    return attach


def list_detectors() -> dict[str, Info]:
    """Every detector by name, with its facts."""
    return {key: _REGISTRY[key].info for key in sorted(_REGISTRY)}


names = list_detectors  # its first name, kept


def create(name: str, **params: Any) -> Detector:
    """Make a detector; ``then=`` of react, ash, dice and opnp is another name or a detector.

    Raises
    ------
    OodlibError : an unknown name or parameter (the message lists the known ones), a wrong value

    Examples
    --------
    >>> bank = FeatureBank.from_arrays([[2., 0.], [0., 1.]], weight=[[1., 0.], [0., 1.]])
    >>> create("react", percentile=75, then="max_logit").fit(bank).score(bank)
    array([-1.25, -1.  ])
    """
    if name not in _REGISTRY:
        raise OodlibError(
            f"create: unknown detector {name!r}. Known: {', '.join(sorted(_REGISTRY))}."
        )
    fields = dataclasses.fields(_REGISTRY[name])
    known = [f.name for f in fields]
    if unknown := sorted(set(params) - set(known)):
        raise OodlibError(
            f"create: {name} has no parameter {unknown[0]!r}. Known: {', '.join(known) or 'none'}."
        )
    for field in fields:
        kind: Any = field.type
        value, title = params.get(field.name, field.default), f"create: {name}'s {field.name}"
        if get_origin(kind) is Literal:
            one_of(title, value, get_args(kind))
        elif not isinstance(value, _TYPES.get(kind, object)) or (
            isinstance(value, bool) and kind in (int, float, int | None)
        ):
            raise OodlibError(
                f"{title} must be of type {getattr(kind, '__name__', kind)}, got {value!r}."
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


def _pack(detector: Detector, arrays: dict[str, NDArray[Any]], prefix: str) -> dict[str, Any]:
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


def _unpack(record: dict[str, Any], arrays: dict[str, NDArray[Any]], prefix: str) -> Detector:
    then = {"then": _unpack(record["then"], {}, "")} if record["then"] else {}
    detector = create(record["name"], **record["params"], **then)
    vars(detector).update(record["learned"])
    for key, value in record["nested"].items():
        setattr(detector, key, _unpack(value, arrays, f"{prefix}{key}."))
    for key, value in arrays.items():
        if key.startswith(prefix) and "." not in key[len(prefix) :]:
            setattr(detector, key[len(prefix) :], value)
    return detector
