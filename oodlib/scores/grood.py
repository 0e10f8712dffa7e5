"""GROOD: how near the gradient at an OOD prototype is to those of ID training data."""

from dataclasses import field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import vector_norm

from oodlib.arrays import Array, by_rows, check_k, check_temperature, to_numpy
from oodlib.errors import OodlibError, check_interval
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores import grood_closed_form as closed
from oodlib.scores.detector import Detector, register
from oodlib.scores.grood_closed_form import grood_polar
from oodlib.scores.moments import stream_means
from oodlib.scores.neighbours import Index, PolarSearch

Variant = Literal[
    "gradient", "magnitude", "l1", "direction", "distance", "nearest", "class_gradient", "squared"
]
Source = Literal["proto_mean", "synthetic", "noise", "val_ood"]
_SEARCHED = ("gradient", "direction", "class_gradient", "squared")
_ROWS = 8192


def grood(
    features: Array,
    bank: Any,
    prototypes: Any,
    ood_prototype: Any,
    *,
    k: int = 1,
    temperature: float = 1.0,
) -> Array:
    r"""Log distance from a sample's gradient to the bank's k-th nearest; larger = more OOD.

    log S,   S = k-th smallest over the bank x' of ||g(x) - g(x')||_2,   g as in `grood_gradient`

    (N,) float64; -inf for a member of the bank (k = 1). The logarithm changes no ranking; gradients
    of ID images of a collapsed network are too small for float32, their squared distances for
    float64. Search is exact, whatever the number of queries at a time.

    ElAraby et al., TMLR 2025, arXiv 2312.14427, Algorithm 2. Their confidence is -S.

    Parameters
    ----------
    features, prototypes, ood_prototype, temperature : as in `grood_gradient`, as are the errors
    bank : (M, D), ID training features
    k : 1 .. M; the paper has k = 1

    Examples
    --------
    >>> bank, prototypes = np.array([[6.0, 8.0]]), np.array([[6.0, 8.0]])
    >>> grood(np.array([[6.0, 8.0], [3.0, 4.0]]), bank, prototypes, np.zeros(2)).round(4)
    array([   -inf, -0.6932])
    """
    check_k("grood", k, len(bank))
    polar: Any = {"temperature": temperature}
    log_norm, direction = grood_polar(to_numpy(bank), prototypes, ood_prototype, **polar)
    search = PolarSearch(log_norm, lambda rows: direction[rows])
    found = search(*grood_polar(to_numpy(features), prototypes, ood_prototype, **polar), k)
    return torch.from_numpy(found) if isinstance(features, Tensor) else found


@register("grood")
class GROOD(Detector):
    """Detector of `grood`; holds the training features of its bank (memory-mapped ones on disk).

    Parameters
    ----------
    k, temperature : as in `grood`; index, nlist, nprobe, seed : as in `PolarSearch`
    ood_source : where the OOD prototype comes from: "proto_mean" (mean of the class prototypes), or
        "synthetic", "noise", "val_ood": then give it, see `synthetic_features`, `noise_features`
    ood_prototype : (D,), or (n, D) penultimate features whose mean it is
    filter : of those features only the ones whose distance to the nearest class prototype exceeds
        its 0.8 quantile (at least 2), an option of the released code
    bank_filter : "correct" (correctly classified training images, released code) or "all"
        (Algorithm 1)
    fraction : of the bank to use, in (0, 1], drawn by ``seed`` in every class alike
    variant : "gradient" (the paper), or for ablations "magnitude" (log pi_o), "l1" (log of the
        gradient's L1 norm), "direction" (nearest u_o), "distance" (-||h - p_o||), "nearest"
        (distance to the nearest class prototype), "class_gradient" (at the prototype of the
        predicted class), "squared" (squared distances)

    Learned: ``prototypes_`` (C, D), ``ood_prototype_`` (D,), ``bank_`` (M, D) and ``classes_``
    (M,), ``kept_`` (share of the training rows that pass ``bank_filter``).
    """

    k: int = 1
    ood_source: Source = "proto_mean"
    ood_prototype: Any = field(default=None, repr=False)
    filter: bool = False
    bank_filter: Literal["correct", "all"] = "correct"
    fraction: float = 1.0
    variant: Variant = "gradient"
    temperature: float = 1.0
    index: Index = "flat"
    nlist: int | None = None
    nprobe: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ood_prototype is None:
            return
        try:
            given = to_numpy(self.ood_prototype).astype(np.float64)
        except (TypeError, ValueError) as error:
            raise OodlibError(
                f"grood: ood_prototype must be numbers, got {type(self.ood_prototype).__name__}."
            ) from error
        if given.ndim == 2 and len(given) and not self.filter:
            given = given.mean(0)
        self.ood_prototype = given.tolist()  # plain numbers, which a saved detector keeps exactly

    def _fit(self, bank: FeatureBank) -> None:
        self._check_parameters()
        assert bank.labels is not None
        self.prototypes_ = stream_means([(bank.features, bank.labels)], bank.head.num_classes)
        self.ood_prototype_ = self._ood_prototype()
        predicted = np.asarray(bank.logits.argmax(1))
        rows = np.arange(len(bank))
        if self.bank_filter == "correct":
            rows = np.flatnonzero(predicted == bank.labels)
            if len(rows) == 0:
                raise OodlibError(
                    "grood.fit: no training image is classified correctly. Check the labels, or "
                    'use bank_filter="all".'
                )
        self.kept_ = len(rows) / len(bank)
        rows = _stratified(rows, bank.labels, self.fraction, self.seed)
        check_k("grood.fit", self.k, len(rows))
        self.bank_ = np.asarray(bank.features if len(rows) == len(bank) else bank.features[rows])
        self.classes_ = predicted[rows].astype(np.int64)
        self.__dict__.pop("_search", None)
        if self.variant in _SEARCHED:
            _ = self._search  # built now, so that a wrong index is refused here

    def _score(self, bank: FeatureBank) -> Any:
        predicted = np.asarray(bank.logits.argmax(1))
        parts = [slice(i, i + _ROWS) for i in range(0, len(bank), _ROWS)]
        return np.concatenate([self._values(bank.features[s], predicted[s]) for s in parts])

    def _values(self, features: NDArray[Any], classes: NDArray[Any]) -> NDArray[Any]:
        if self.variant in _SEARCHED:
            return self._search(*self._gradients(features, classes), self.k)
        closed.check_prototypes(features, self.prototypes_, self.ood_prototype_, None)
        p, o = torch.from_numpy(self.prototypes_), torch.from_numpy(self.ood_prototype_)

        def function(h: Tensor) -> Tensor:
            log_pi, difference, distance = closed.softmax(h, p, o, self.temperature)
            if self.variant == "distance":
                return -distance
            if self.variant == "nearest":
                return closed.distances(h, p).amin(1)
            if self.variant == "l1":
                return log_pi[:, -1] + (difference.abs().sum(1) / distance).log()
            return log_pi[:, -1]

        return by_rows("grood", function, features)

    def _gradients(
        self, features: NDArray[Any], classes: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        options: Any = {"temperature": self.temperature, "squared": self.variant == "squared"}
        if self.variant == "class_gradient":
            options["classes"] = classes
        found = grood_polar(features, self.prototypes_, self.ood_prototype_, **options)
        return (np.zeros(len(features)), found[1]) if self.variant == "direction" else found

    @cached_property
    def _search(self) -> PolarSearch:
        parts = [slice(i, i + _ROWS) for i in range(0, len(self.bank_), _ROWS)]
        norms = [self._gradients(self.bank_[s], self.classes_[s])[0] for s in parts]
        options: Any = {name: getattr(self, name) for name in ("index", "nlist", "nprobe", "seed")}
        return PolarSearch(np.concatenate(norms), self._directions, **options)

    def _directions(self, rows: Any) -> NDArray[np.float64]:
        if self.variant == "class_gradient":
            difference = self.prototypes_[self.classes_[rows]] - self.bank_[rows]
        else:
            difference = self.bank_[rows] - self.ood_prototype_
        tensor = torch.from_numpy(difference)
        return np.asarray(closed.unit(tensor, vector_norm(tensor, dim=1)))

    def _ood_prototype(self) -> NDArray[np.float64]:
        if self.ood_prototype is None:
            return np.asarray(self.prototypes_.mean(0))
        given, size = np.asarray(self.ood_prototype, dtype=np.float64), self.prototypes_.shape[1]
        fits = given.ndim in (1, 2) and given.shape[-1] == size and len(given) > 0
        if not (fits and np.isfinite(given).all()):
            raise OodlibError(
                f"grood.fit: ood_prototype must be ({size},) or (n, {size}), finite, got "
                f"{given.shape}. Give penultimate features of the same network."
            )
        if not self.filter:
            return given
        if given.ndim != 2 or len(given) < 2:
            raise OodlibError(
                f"grood.fit: filter=True chooses among features (n, {size}), n >= 2, got "
                f"{given.shape}. Give them instead of their mean."
            )
        p = torch.from_numpy(self.prototypes_)
        nearest = torch.cdist(torch.from_numpy(given), p).amin(1).numpy()
        far = nearest > np.quantile(nearest, 0.8)
        if far.sum() < 2:
            far = np.argsort(nearest)[-2:]
        return np.asarray(given[far].mean(0))

    def _check_parameters(self) -> None:
        check_temperature("grood.fit", self.temperature)
        check_interval("grood.fit: fraction", self.fraction, "(0, 1]")
        check_interval("grood.fit: seed", self.seed, "[0, inf)")
        if self.ood_prototype is None and (self.filter or self.ood_source != "proto_mean"):
            raise OodlibError(
                f"grood.fit: ood_source={self.ood_source!r}, filter={self.filter} need "
                "ood_prototype=, see synthetic_features, noise_features and Testbed.ood_val."
            )


def _stratified(
    rows: NDArray[Any], labels: NDArray[Any], fraction: float, seed: int
) -> NDArray[Any]:
    """A seeded random fraction (at least one) of each class's rows, ascending."""
    if fraction == 1:
        return rows
    shuffled = np.random.default_rng(seed).permutation(rows)
    chosen = []
    for c in np.unique(labels[rows]):
        members = shuffled[labels[shuffled] == c]
        chosen.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))
