"""GROOD: the gradient of a nearest-prototype loss at a hypothetical OOD prototype, against those of
ID data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodlib.arrays import by_rows, check_k, check_rows, check_temperature, tensor64, to_numpy
from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, Info, register
from oodlib.scores.moments import stream_means
from oodlib.scores.neighbours import Index, PolarSearch

Variant = Literal[
    "gradient", "magnitude", "l1", "direction", "distance", "nearest", "class_gradient", "squared"
]
_VARIANTS = (
    "gradient",
    "magnitude",
    "l1",
    "direction",
    "distance",
    "nearest",
    "class_gradient",
    "squared",
)
_SEARCHED = ("gradient", "direction", "class_gradient", "squared")
_SOURCES = ("proto_mean", "synthetic", "noise", "val_ood")
_ROWS = 8192


def grood_polar(
    features: Any,
    prototypes: Any,
    ood_prototype: Any,
    *,
    temperature: float = 1.0,
    squared: bool = False,
    classes: Any = None,
) -> tuple[Any, Any]:
    r"""The gradient of `grood_gradient` as the log of its L2 norm and its direction: nothing
    underflows.

    With d_j = ||h - p_j||, s_j = -d_j / T and log pi = log softmax(s_1 .. s_C, s_o):

    log ||g|| = log pi_o - log T,   u = (h - p_o) / d_o

    Arguments and errors as in `grood_gradient`.

    Returns
    -------
    log_norm : (N,) float64; -inf where h = p_o
    direction : (N, D) float64, unit length; zero where h = p_o
    """
    check_temperature("grood", temperature)
    h, *extra = _checked(features, prototypes, ood_prototype, classes)
    p, o = (tensor64(a).cpu() for a in (prototypes, ood_prototype))
    columns = by_rows(
        "grood", lambda x, *y: _polar(x.cpu(), p, o, temperature, squared, *y), h, *extra
    )
    return columns[:, 0], columns[:, 1:]


def grood_gradient(
    features: Any,
    prototypes: Any,
    ood_prototype: Any,
    *,
    temperature: float = 1.0,
    squared: bool = False,
    classes: Any = None,
) -> Any:
    r"""Gradient of the nearest-prototype cross-entropy with respect to the OOD prototype, without
    autograd.

    H = -log pi_y,   pi = softmax(-||h - p_1|| / T, .., -||h - p_C|| / T, -||h - p_o|| / T)

    g = dH/dp_o = (pi_o / T) (h - p_o) / ||h - p_o||          (``squared`` distances: 2 (pi_o / T) (h - p_o))

    g does not depend on the label y. Its L2 norm is pi_o / T.

    Parameters
    ----------
    features : (N, D)
    prototypes : (C, D) class means of the training features, by true label
    ood_prototype : (D,)
    temperature : T > 0; the paper has none
    squared : squared distances in the softmax
    classes : (N,) predicted classes y; then the gradient at the prototype of that class instead,
        dH/dp_y = ((pi_y - 1) / T) (h - p_y) / ||h - p_y||

    Returns
    -------
    (N, D) float64, torch if ``features`` is torch. A norm below 1e-308 becomes zero: `grood_polar` keeps it.

    Raises
    ------
    OodlibError : sizes differ, values are not finite, T out of range, a class outside 0 .. C-1

    References
    ----------
    ElAraby, Sahoo, Pequignot, Novello, Paull, TMLR 2025, arXiv 2312.14427, Eq. 5 (as the authors' code has it)

    Examples
    --------
    >>> grood_gradient(torch.tensor([[3., 4.]]), torch.tensor([[6., 8.]]), torch.zeros(2))
    tensor([[0.3000, 0.4000]], dtype=torch.float64)
    """
    log_norm, direction = grood_polar(
        features,
        prototypes,
        ood_prototype,
        temperature=temperature,
        squared=squared,
        classes=classes,
    )
    scale = np.exp(to_numpy(log_norm))[:, None]
    return (
        torch.from_numpy(scale) * direction if isinstance(direction, Tensor) else scale * direction
    )


def grood(
    features: Any,
    bank: Any,
    prototypes: Any,
    ood_prototype: Any,
    *,
    k: int = 1,
    temperature: float = 1.0,
) -> Any:
    r"""Log of the distance from a sample's gradient to the k-th nearest gradient of the bank;
    larger = more OOD.

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
    ElAraby, Sahoo, Pequignot, Novello, Paull, TMLR 2025, arXiv 2312.14427, Algorithm 2. Their confidence is -S.

    Notes
    -----
    The logarithm changes no ranking; the gradients of ID images of a collapsed network are too small for float32, and
    their squared distances for float64. Search is exact and does not depend on the number of queries at a time.
    """
    check_k("grood", k, len(bank))
    log_norm, direction = grood_polar(
        to_numpy(bank), prototypes, ood_prototype, temperature=temperature
    )
    search = PolarSearch(log_norm, lambda rows: direction[rows])
    queries = grood_polar(to_numpy(features), prototypes, ood_prototype, temperature=temperature)
    found = search(*queries, k)
    return torch.from_numpy(found) if isinstance(features, Tensor) else found


def _polar(
    h: Tensor,
    p: Tensor,
    o: Tensor,
    temperature: float,
    squared: bool,
    classes: Tensor | None = None,
) -> Tensor:
    """(n, 1 + D): log norm and direction."""
    log_pi, difference, distance = _softmax(h, p, o, temperature, squared)
    log_norm = log_pi[:, -1]
    if classes is not None:
        y = classes.long().cpu()
        log_norm = log_pi.scatter(1, y, -math.inf).logsumexp(1)  # log(1 - pi_y), not cancelled
        difference = p[y[:, 0]] - h  # pi_y - 1 is negative
        distance = torch.linalg.vector_norm(difference, dim=1)
    if squared:
        log_norm = log_norm + math.log(2) + distance.log()
    log_norm = torch.where(distance > 0, log_norm - math.log(temperature), -math.inf)
    direction = difference / torch.where(distance > 0, distance, 1)[:, None]
    return torch.cat([log_norm[:, None], direction], 1)


def _softmax(
    h: Tensor, p: Tensor, o: Tensor, temperature: float, squared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log pi (n, C + 1), h - p_o (n, D) and its length (n,)."""
    difference = h - o
    distance = torch.linalg.vector_norm(difference, dim=1)
    others = torch.cdist(
        h, p, compute_mode="donot_use_mm_for_euclid_dist"
    )  # the same for any batch size
    every = torch.cat([others, distance[:, None]], 1)
    return (
        (-(every.square() if squared else every) / temperature).log_softmax(1),
        difference,
        distance,
    )


def _checked(features: Any, prototypes: Any, ood_prototype: Any, classes: Any) -> list[Any]:
    """The features, and the classes as a column where they are given."""
    check_rows("grood", features)
    size = np.shape(features)[1]
    shape = np.shape(prototypes)
    if (
        len(shape) != 2
        or not shape[0]
        or shape[1] != size
        or tuple(np.shape(ood_prototype)) != (size,)
    ):
        raise OodlibError(
            "grood: features (N, D), prototypes (C, D) and ood_prototype (D,) need the same D, "
            f"got {tuple(np.shape(features))}, {tuple(shape)} and {tuple(np.shape(ood_prototype))}."
        )
    for name, values in (
        ("features", features),
        ("prototypes", prototypes),
        ("ood_prototype", ood_prototype),
    ):
        if not np.isfinite(to_numpy(values)).all():
            raise OodlibError(
                f"grood: {name} hold NaN or infinity. Check the transform and the weights."
            )
    if classes is None:
        return [features]
    y = to_numpy(classes)
    if y.shape != (len(features),) or not np.isin(y, np.arange(len(prototypes))).all():
        raise OodlibError(
            f"grood: classes must be (N,) = ({len(features)},) whole numbers in 0 .. "
            f"{len(prototypes) - 1}, got {y.shape} of {np.unique(y)[:5].tolist()}."
        )
    return [features, y[:, None]]


@register(
    Info(
        key="grood",
        title="GROOD: GRadient-Aware Out-of-Distribution Detection",
        authors="ElAraby, Sahoo, Pequignot, Novello, Paull",
        year=2025,
        arxiv="2312.14427",
        paper_larger_means="id",
        needs="labels",
        deviations=(
            "closed form instead of a backward pass per image, and log S instead of S: the same ranking",
            "the OOD prototype is the mean of the class prototypes unless another one is given",
            "exact search by default; the released code probes 4 inverted lists",
        ),
    )
)
@dataclass(kw_only=True, eq=False)
class GROOD(Detector):
    """Detector of `grood`; keeps the training features of its bank (a memory-mapped bank stays on
    disk).

    Parameters
    ----------
    k : the k-th nearest gradient counts
    ood_source : where the OOD prototype comes from: "proto_mean" (mean of the class prototypes), or "synthetic",
        "noise", "val_ood": then give it, see `synthetic_features` and `noise_features` of
        `oodlib.scores.grood_prototypes`
    ood_prototype : (D,), or (n, D) penultimate features whose mean it is
    filter : keep of those features only the ones whose distance to the nearest class prototype
        exceeds its 0.8
        quantile (at least 2), as an option of the released code does
    bank_filter : "correct" (gradients of correctly classified training images, released code) or
        "all" (Algorithm 1)
    fraction : of the bank to keep, in (0, 1], drawn by ``seed`` in every class alike
    variant : "gradient" (the paper), or for ablations "magnitude" (log pi_o), "l1" (log of the
        gradient's L1 norm),
        "direction" (nearest u_o), "distance" (-||h - p_o||), "nearest" (distance to the nearest
        class prototype), "class_gradient" (gradient at the prototype of the predicted class),
        "squared" (squared distances)
    temperature : T
    index, nlist, nprobe, seed : as in `oodlib.scores.neighbours.PolarSearch`

    Learned: ``prototypes_`` (C, D), ``ood_prototype_`` (D,), ``bank_`` (M, D) and ``classes_``
    (M,), ``kept_`` (share of the training rows that pass ``bank_filter``).
    """

    k: int = 1
    ood_source: str = "proto_mean"
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
        if self.ood_prototype is not None:  # plain numbers, which a saved detector keeps exactly
            try:
                given = to_numpy(self.ood_prototype).astype(np.float64)
            except (TypeError, ValueError) as error:
                raise OodlibError(
                    "grood: ood_prototype must be numbers, (D,) or (n, D), got "
                    f"{type(self.ood_prototype).__name__}."
                ) from error
            if given.ndim == 2 and len(given) and not self.filter:
                given = given.mean(0)
            self.ood_prototype = given.tolist()

    def _fit(self, bank: FeatureBank) -> None:
        self._check()
        assert bank.labels is not None
        self.prototypes_ = stream_means([(bank.features, bank.labels)], bank.head.num_classes)
        self.ood_prototype_ = self._ood_prototype()
        predicted = np.asarray(bank.logits.argmax(1))
        kept = np.arange(len(bank))
        if self.bank_filter == "correct":
            kept = np.flatnonzero(predicted == bank.labels)
            if len(kept) == 0:
                raise OodlibError(
                    "grood.fit: no training image is classified correctly, so the bank is empty. "
                    "Check "
                    'the labels, or use bank_filter="all".'
                )
        self.kept_ = len(kept) / len(bank)
        kept = _stratified(kept, bank.labels, self.fraction, self.seed)
        check_k("grood.fit", self.k, len(kept))
        self.bank_ = np.asarray(bank.features if len(kept) == len(bank) else bank.features[kept])
        self.classes_ = predicted[kept].astype(np.int64)
        self.__dict__.pop("_search", None)
        if self.variant in _SEARCHED:
            self._search = self._searcher()

    def _score(self, bank: FeatureBank) -> Any:
        if self.variant in _SEARCHED and not hasattr(self, "_search"):
            self._search = self._searcher()  # a loaded detector builds its index at the first score
        predicted = np.asarray(bank.logits.argmax(1))
        return np.concatenate(
            [
                self._values(bank.features[i : i + _ROWS], predicted[i : i + _ROWS])
                for i in range(0, len(bank), _ROWS)
            ]
        )

    def _values(self, features: Any, classes: NDArray) -> Any:
        if self.variant in _SEARCHED:
            return self._search(*self._gradients(features, classes), self.k)
        _checked(features, self.prototypes_, self.ood_prototype_, None)
        p, o = torch.from_numpy(self.prototypes_), torch.from_numpy(self.ood_prototype_)

        def function(h: Tensor) -> Tensor:
            log_pi, difference, distance = _softmax(h, p, o, self.temperature, False)
            if self.variant == "distance":
                return -distance
            if self.variant == "nearest":
                return torch.cdist(h, p, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
            if self.variant == "l1":
                return log_pi[:, -1] + (difference.abs().sum(1) / distance).log()
            return log_pi[:, -1]

        return by_rows("grood", function, features)

    def _gradients(self, features: Any, classes: NDArray) -> tuple[NDArray, NDArray]:
        log_norm, direction = grood_polar(
            features,
            self.prototypes_,
            self.ood_prototype_,
            temperature=self.temperature,
            squared=self.variant == "squared",
            classes=classes if self.variant == "class_gradient" else None,
        )
        return (np.zeros(len(direction)) if self.variant == "direction" else log_norm), direction

    def _searcher(self) -> PolarSearch:
        log_norm = np.concatenate(
            [
                self._gradients(self.bank_[i : i + _ROWS], self.classes_[i : i + _ROWS])[0]
                for i in range(0, len(self.bank_), _ROWS)
            ]
        )
        return PolarSearch(
            log_norm,
            self._directions,
            index=self.index,
            nlist=self.nlist,
            nprobe=self.nprobe,
            seed=self.seed,
        )

    def _directions(self, rows: Any) -> NDArray[np.float64]:
        origin = (
            self.prototypes_[self.classes_[rows]]
            if self.variant == "class_gradient"
            else self.ood_prototype_
        )
        difference = torch.from_numpy(self.bank_[rows] - origin)
        if self.variant == "class_gradient":
            difference = -difference
        distance = torch.linalg.vector_norm(difference, dim=1)
        return (difference / torch.where(distance > 0, distance, 1)[:, None]).numpy()

    def _ood_prototype(self) -> NDArray[np.float64]:
        if self.ood_prototype is None:
            return self.prototypes_.mean(0)
        given, size = np.asarray(self.ood_prototype, dtype=np.float64), self.prototypes_.shape[1]
        if (
            given.ndim not in (1, 2)
            or given.shape[-1] != size
            or len(given) == 0
            or not np.isfinite(given).all()
        ):
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
        nearest = (
            torch.cdist(torch.from_numpy(given), torch.from_numpy(self.prototypes_)).amin(1).numpy()
        )
        far = nearest > np.quantile(nearest, 0.8)
        if far.sum() < 2:
            far = np.argsort(nearest)[-2:]
        return given[far].mean(0)

    def _check(self) -> None:
        check_temperature("grood.fit", self.temperature)
        for name, known in (
            ("variant", _VARIANTS),
            ("ood_source", _SOURCES),
            ("bank_filter", ("correct", "all")),
        ):
            if (value := getattr(self, name)) not in known:
                raise OodlibError(
                    f"grood.fit: {name} must be one of {', '.join(known)}, got {value!r}."
                )
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


def _stratified(rows: NDArray, labels: NDArray, fraction: float, seed: int) -> NDArray:
    """Of the rows of each class the fraction (at least one) that a seeded permutation puts first;
    ascending.
    """
    if fraction == 1:
        return rows
    shuffled = np.random.default_rng(seed).permutation(rows)
    chosen = []
    for c in np.unique(labels[rows]):
        members = shuffled[labels[shuffled] == c]
        chosen.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))
