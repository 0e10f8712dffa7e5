"""Pruning ratios of OPNP: a whole grid in one pass, and the choice on validation sets alone."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodlib import arrays, metrics
from oodlib.arrays import to_numpy
from oodlib.errors import OodlibError, check_interval, one_of
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores import energy
from oodlib.scores.opnp import Scope, kept, ranks, tail_size

Floats = NDArray[np.float64]

# shares of the low and of the high tail: the suite's grid
LOW = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
HIGH = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True, eq=False)
class Sweep:
    """Scores and ID accuracy of every pair of ratios low (L,), high (H,).

    scores : set, or "id" -> (L, H, N) float64, larger = more OOD; NaN where low + high >= 1
    accuracy : (L, H) of the ID images whose label is known; NaN where none is
    """

    low: Floats
    high: Floats
    scores: dict[str, Floats]
    accuracy: Floats
    _known: dict[Callable[..., float], dict[str, Floats]] = field(default_factory=dict, repr=False)

    def metric(self, function: Callable[..., float] = metrics.auroc) -> dict[str, Floats]:
        """(L, H) of every OOD set, by default AUROC; measured once."""
        if function in self._known:
            return dict(self._known[function])
        out = {name: np.full(self.accuracy.shape, np.nan) for name in self.scores if name != "id"}
        for i, j in np.argwhere(~np.isnan(self.scores["id"][:, :, 0])):
            for name in out:
                out[name][i, j] = function(self.scores["id"][i, j], self.scores[name][i, j])
        self._known[function] = out
        return dict(out)

    def mean(self, *, without: Collection[str] = ()) -> Floats:
        """(L, H) mean AUROC over the OOD sets."""
        used = [a for k, a in self.metric().items() if k not in without]
        return np.asarray(np.mean(used, axis=0))


def sweep(
    banks: Mapping[str, FeatureBank],
    sensitivity: Any,
    *,
    low: Sequence[float] = LOW,
    high: Sequence[float] = HIGH,
    scope: Scope = "global",
    keep: Any = None,
    score: Callable[[Tensor], Tensor] = energy,
) -> Sweep:
    r"""Scores of the pruned head at every pair of ratios, in one pass over the banks.

    The logits of a pair are ``z - H L_i^T - H U_j^T`` with L_i and U_j the weights of the low and
    the high tail, which are disjoint: an L x H grid costs L + H matrix products. Products are in
    float32, scores in float64.

    Parameters
    ----------
    banks : "id" and OOD sets, all of one head
    sensitivity : (C, D) of weights, or (D,) of neurons, whose columns are then pruned
    low, high, scope : as in `oodlib.scores.opnp.kept`
    keep : (D,) or (C, D) bool, removed beforehand
    score : (n, C) logits -> (n,), larger = more OOD

    Raises
    ------
    OodlibError : no "id", a bank of another network or without a row, wrong shapes or ratios
    """
    if "id" not in banks:
        raise OodlibError(f"sweep: banks need an ID set called 'id', got {', '.join(banks)}.")
    head, labels = banks["id"].head, banks["id"].labels
    sensitivity = to_numpy(sensitivity)
    for what, values in {"sensitivity": sensitivity, "keep": keep}.items():
        shapes = (head.weight.shape, head.weight.shape[1:])
        if values is not None and np.shape(values) not in shapes:
            raise OodlibError(
                f"sweep: {what} must be (C, D) = {shapes[0]} or (D,), got {np.shape(values)}."
            )
    for name, bank in banks.items():
        if bank.head.digest != head.digest or len(bank) == 0:
            what = "is empty" if len(bank) == 0 else "has another head than the ID set"
            raise OodlibError(f"sweep: the bank of {name} {what}. Take all from one network.")
    weight = np.array(head.weight if keep is None else head.weight * keep, dtype=np.float32)
    for title, grid in {"low": low, "high": high}.items():
        for ratio in grid:
            check_interval(f"sweep: {title}", ratio, "[0, 1)")
    rank, n = ranks(sensitivity, scope=scope if sensitivity.ndim == 2 else "global")
    removed = [
        [_part(weight, rank < tail_size(ratio, n)) for ratio in low],
        [_part(weight, rank >= n - tail_size(ratio, n)) for ratio in high],
    ]
    valid = np.add.outer(np.asarray(low), np.asarray(high)) < 1
    scores = {name: np.full((*valid.shape, len(bank)), np.nan) for name, bank in banks.items()}
    known = 0 if labels is None else int((labels >= 0).sum())
    right = np.where(valid & (known > 0), 0.0, np.nan)
    base, bias = torch.from_numpy(weight), torch.from_numpy(np.array(head.bias, dtype=np.float32))
    rows = max(1, arrays.BLOCK // (2 * max(weight.shape)))
    for name, bank in banks.items():
        for start in range(0, len(bank), rows):
            part = slice(start, start + rows)
            h = torch.from_numpy(np.array(bank.features[part], dtype=np.float32))
            z = h @ base.T + bias
            lows, highs = (
                [(h if columns is None else h[:, columns]) @ w.T for columns, w in tail]
                for tail in removed
            )
            for i, lowered in enumerate(lows):
                without = z - lowered
                for j in np.flatnonzero(valid[i]):
                    pruned = without - highs[j]
                    scores[name][i, j, part] = score(pruned)
                    if name == "id" and labels is not None and known:
                        right[i, j] += float((pruned.argmax(1).numpy() == labels[part]).sum())
    return Sweep(np.array(low, float), np.array(high, float), scores, right / max(known, 1))


def _part(weight: NDArray[np.float32], removed: NDArray[np.bool_]) -> tuple[Tensor | None, Tensor]:
    """The weights to subtract, without the columns that hold none."""
    mask = np.broadcast_to(removed, weight.shape)
    columns = mask.any(0)
    if columns.all():
        return None, torch.from_numpy(weight * mask)
    return torch.from_numpy(np.flatnonzero(columns)), torch.from_numpy((weight * mask)[:, columns])


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The ratios chosen on validation sets.

    ratios : as keywords of the detector "opnp"
    index : of the pair in the sweep's grid, where it is on one
    auroc, accuracy : mean over the validation sets, and of ID images; unpruned : before pruning
    by_set : AUROC of each validation set
    dropped : sets that the unpruned network separates too well to rank ratios -> its AUROC
    """

    ratios: dict[str, float]
    index: tuple[int, int] | None
    auroc: float
    accuracy: float
    unpruned: tuple[float, float]
    by_set: dict[str, float]
    dropped: dict[str, float]


def choose(
    found: Sweep, prefix: str = "weight", *, tolerance: float = 0.01, ceiling: float = 0.995
) -> Choice:
    """The pair with the best mean AUROC that costs at most ``tolerance`` of ID accuracy.

    Ties go to less pruning. Sets that the unpruned network separates better than ``ceiling`` are
    dropped, unless that would leave none.

    Parameters
    ----------
    found : a sweep over labelled ID and OOD validation sets; ratio 0 must be in both grids
    prefix : "weight" or "neuron": of the ratios' names
    """
    one_of("choose: prefix", prefix, ("weight", "neuron"))
    if 0 not in found.low or 0 not in found.high:
        raise OodlibError(
            "choose: both grids need the ratio 0, the unpruned network, got low "
            f"{found.low.tolist()} and high {found.high.tolist()}."
        )
    none = (int(np.argmin(found.low)), int(np.argmin(found.high)))
    if np.isnan(found.accuracy[none]):
        raise OodlibError("choose: the ID validation set has no labels. Accuracy needs them.")
    every = found.metric()
    if not every:
        raise OodlibError("choose: no OOD validation set in this sweep. See validation_banks.")
    dropped = {name: float(a[none]) for name, a in every.items() if a[none] > ceiling}
    if len(dropped) == len(every):
        dropped = {}
    unpruned = float(_mean(every, dropped)[none]), float(found.accuracy[none])
    choice = _best(found, prefix, tolerance, unpruned, dropped)
    assert choice is not None  # the unpruned network itself is allowed
    return choice


def _mean(every: dict[str, Floats], dropped: Mapping[str, float]) -> Floats:
    return np.asarray(np.mean([a for name, a in every.items() if name not in dropped], axis=0))


def _best(
    found: Sweep,
    prefix: str,
    tolerance: float,
    unpruned: tuple[float, float],
    dropped: dict[str, float],
) -> Choice | None:
    """The best pair of the sweep, or None where every pair costs more than ``tolerance``."""
    every = found.metric()
    mean, amount = _mean(every, dropped), np.add.outer(found.low, found.high)
    enough = found.accuracy >= unpruned[1] - tolerance - 1e-12
    if not enough.any():
        return None
    allowed: list[list[int]] = np.argwhere(~np.isnan(mean) & enough).tolist()
    i, j = min(allowed, key=lambda k: (-mean[*k], amount[*k], k[1]))
    return Choice(
        ratios={f"{prefix}_low": float(found.low[i]), f"{prefix}_high": float(found.high[j])},
        index=(i, j),
        auroc=float(mean[i, j]),
        accuracy=float(found.accuracy[i, j]),
        unpruned=unpruned,
        by_set={name: float(a[i, j]) for name, a in every.items()},
        dropped=dropped,
    )


def choose_both(
    banks: Mapping[str, FeatureBank],
    sensitivity: Any,
    neurons: Any,
    weight: Choice,
    neuron: Choice,
    *,
    low: Sequence[float] = LOW,
    high: Sequence[float] = HIGH,
    scope: Scope = "global",
    score: Callable[[Tensor], Tensor] = energy,
    tolerance: float = 0.01,
) -> Choice:
    """Ratios of both: the single choices and their grid neighbours (up to 81), by the same rule.

    Arguments as in `sweep` and `choose`; neurons (D,), weight and neuron from `choose`.
    """
    ratios = weight.ratios | neuron.ratios
    near = {k: _neighbours(high if k.endswith("high") else low, v) for k, v in ratios.items()}
    options: Any = {"low": near["weight_low"], "high": near["weight_high"]}
    options |= {"scope": scope, "score": score}
    candidates: list[Choice] = []
    for neuron_low in near["neuron_low"]:
        for neuron_high in near["neuron_high"]:
            if neuron_low + neuron_high >= 1:
                continue
            options["keep"] = kept(neurons, low=neuron_low, high=neuron_high)
            found = sweep(banks, sensitivity, **options)
            choice = _best(found, "weight", tolerance, weight.unpruned, weight.dropped)
            if choice is not None:
                ratios = choice.ratios | {"neuron_low": neuron_low, "neuron_high": neuron_high}
                candidates.append(replace(choice, ratios=ratios, index=None))
    if candidates:
        return max(candidates, key=lambda c: (c.auroc, -sum(c.ratios.values())))
    # both together cost more accuracy than either alone
    single = max(weight, neuron, key=lambda c: c.auroc)
    return replace(single, ratios=dict.fromkeys(near, 0.0) | single.ratios, index=None)


def _neighbours(grid: Sequence[float], value: float) -> list[float]:
    ordered = sorted(grid)
    if value not in ordered:
        raise OodlibError(
            f"choose_both: the chosen ratio {value} is not in the grid {ordered}. Use the grids of "
            "the single choices."
        )
    at = ordered.index(value)
    return ordered[max(0, at - 1) : at + 2]
