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
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register
from oodlib.scores.grood_closed_form import (
    check_prototypes,
    distances,
    grood_polar,
    softmax,
    unit,
)
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

    Parameters
    ----------
    features : (N, D)
    bank : (M, D), ID training features
    prototypes, ood_prototype, temperature : as in `grood_gradient`
    k : 1 .. M; the paper has k = 1

    Returns
    -------
    (N,) float64; -inf for a member of the bank (k = 1)

    Raises
    ------
    OodlibError : as in `grood_gradient`, and k outside 1 .. M

    References
    ----------
    ElAraby, Sahoo, Pequignot, Novello, Paull, TMLR 2025, arXiv 2312.14427, Algorithm 2. Their
    confidence is -S.

    Notes
    -----
    The logarithm changes no ranking; the gradients of ID images of a collapsed network are too
    small for float32, and their squared distances for float64. Search is exact and does not depend
    on the number of queries at a time.

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


@register(
    key="grood",
    title="GROOD: GRadient-Aware Out-of-Distribution Detection",
    authors="ElAraby, Sahoo, Pequignot, Novello, Paull",
    year=2025,
    arxiv="2312.14427",
    needs="labels",
    deviations=(
        "closed form instead of a backward pass per image, and log S instead of S: the same "
        "ranking",
        "the OOD prototype is the mean of the class prototypes unless another one is given",
        "exact search by default; the released code probes 4 inverted lists",
    ),
)
class GROOD(Detector):
    """Detector of `grood`; holds the training features of its bank (memory-mapped ones on disk).

    Parameters
    ----------
    k : the k-th nearest gradient counts
    ood_source : where the OOD prototype comes from: "proto_mean" (mean of the class prototypes), or
        "synthetic", "noise", "val_ood": then give it, see `synthetic_features` and `noise_features`
        of `oodlib.scores.grood_prototypes`
    ood_prototype : (D,), or (n, D) penultimate features whose mean it is
    filter : use of those features only the ones whose distance to the nearest class prototype
        exceeds its 0.8 quantile (at least 2), as an option of the released code does
    bank_filter : "correct" (gradients of correctly classified training images, released code) or
        "all" (Algorithm 1)
    fraction : of the bank to use, in (0, 1], drawn by ``seed`` in every class alike
    variant : "gradient" (the paper), or for ablations "magnitude" (log pi_o), "l1" (log of the
        gradient's L1 norm), "direction" (nearest u_o), "distance" (-||h - p_o||), "nearest"
        (distance to the nearest class prototype), "class_gradient" (gradient at the prototype of
        the predicted class), "squared" (squared distances)
    temperature : T
    index, nlist, nprobe, seed : as in `oodlib.scores.neighbours.PolarSearch`

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
                "grood: ood_prototype must be numbers, (D,) or (n, D), got "
                f"{type(self.ood_prototype).__name__}."
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
                    "grood.fit: no training image is classified correctly, so the bank is empty. "
                    'Check the labels, or use bank_filter="all".'
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
        check_prototypes("grood", features, self.prototypes_, self.ood_prototype_, None)
        p, o = torch.from_numpy(self.prototypes_), torch.from_numpy(self.ood_prototype_)

        def function(h: Tensor) -> Tensor:
            log_pi, difference, distance = softmax(h, p, o, self.temperature)
            if self.variant == "distance":
                return -distance
            if self.variant == "nearest":
                return distances(h, p).amin(1)
            if self.variant == "l1":
                return log_pi[:, -1] + (difference.abs().sum(1) / distance).log()
            return log_pi[:, -1]

        return by_rows("grood", function, features)

    def _gradients(
        self, features: NDArray[Any], classes: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        log_norm, direction = grood_polar(
            features,
            self.prototypes_,
            self.ood_prototype_,
            temperature=self.temperature,
            squared=self.variant == "squared",
            classes=classes if self.variant == "class_gradient" else None,
        )
        return (np.zeros(len(direction)) if self.variant == "direction" else log_norm), direction

    @cached_property
    def _search(self) -> PolarSearch:
        parts = [slice(i, i + _ROWS) for i in range(0, len(self.bank_), _ROWS)]
        return PolarSearch(
            np.concatenate([self._gradients(self.bank_[s], self.classes_[s])[0] for s in parts]),
            self._directions,
            index=self.index,
            nlist=self.nlist,
            nprobe=self.nprobe,
            seed=self.seed,
        )

    def _directions(self, rows: Any) -> NDArray[np.float64]:
        if self.variant == "class_gradient":
            difference = self.prototypes_[self.classes_[rows]] - self.bank_[rows]
        else:
            difference = self.bank_[rows] - self.ood_prototype_
        tensor = torch.from_numpy(difference)
        return np.asarray(unit(tensor, vector_norm(tensor, dim=1)))

    def _ood_prototype(self) -> NDArray[np.float64]:
        if self.ood_prototype is None:
            return np.asarray(self.prototypes_.mean(0))
        given, size = np.asarray(self.ood_prototype, dtype=np.float64), self.prototypes_.shape[1]
        fits = given.ndim in (1, 2) and given.shape[-1] == size and len(given) > 0
        if not fits or not np.isfinite(given).all():
            raise OodlibError(
                f"grood.fit: ood_prototype must be ({size},) or (n, {size}), finite, got "
                f"{given.shape}. Give penultimate features of the same network."
            )
        if not self.filter:
            return given
        if given.ndim != 2 or len(given) < 2:
            raise OodlibError(
                f"grood.fit: filter=True chooses among features (n, {size}), n >= 2, got "
                f"{given.shape}. Give the features instead of their mean."
            )
        p = torch.from_numpy(self.prototypes_)
        nearest = torch.cdist(torch.from_numpy(given), p).amin(1).numpy()
        far = nearest > np.quantile(nearest, 0.8)
        if far.sum() < 2:
            far = np.argsort(nearest)[-2:]
        return np.asarray(given[far].mean(0))

    def _check_parameters(self) -> None:
        check_temperature("grood.fit", self.temperature)
        if not 0 < self.fraction <= 1 or self.seed < 0:
            raise OodlibError(
                "grood.fit: fraction must lie in (0, 1] and seed be at least 0, got "
                f"{self.fraction} and {self.seed}."
            )
        if self.ood_prototype is None and (self.filter or self.ood_source != "proto_mean"):
            raise OodlibError(
                f"grood.fit: ood_source={self.ood_source!r}, filter={self.filter} need "
                "ood_prototype=, features of such images (see synthetic_features and "
                "noise_features of oodlib.scores.grood_prototypes, Testbed.ood_val)."
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
