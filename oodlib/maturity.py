"""How mature a flow is, and how its OOD detection and the overlap of likelihoods change along its training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter1d

from oodlib import metrics
from oodlib.errors import OodlibError

__all__ = ["Aurocs", "auroc_along", "is_mature", "kept_step", "overlap"]

MATURE_GAIN, NEAR_PUBLISHED = 0.01, 0.15          # bits per dim


def is_mature(history: Sequence[Mapping[str, Any]], published_bpd: float | None = None) -> tuple[bool, str]:
    """Whether a training's last step is mature, by a rule fixed before any result, and why, in words.

    Within 0.15 bits per dim of the published 250-epoch value, or gaining less than 0.01 per doubling of the steps,
    measured on validation images between the last two kept steps.

    history : rows with ``step`` and ``validation_bpd``, rising
    """
    last, before = history[-1], history[-2]
    bpd = f"{last['validation_bpd']:.2f} bits/dim"
    if published_bpd is not None and last["validation_bpd"] <= published_bpd + NEAR_PUBLISHED:
        return True, f"{bpd}; published after 250 epochs: {published_bpd:.2f}"
    if before["step"] == 0:
        return False, f"{bpd}, only one kept step"
    gain = (before["validation_bpd"] - last["validation_bpd"]) / math.log2(last["step"] / before["step"])
    return gain < MATURE_GAIN, f"{bpd}, gaining {gain:.3f} per doubling of the steps"


def kept_step(history: Sequence[Mapping[str, Any]], epochs: float, *, nearest: bool = False) -> int:
    """The first kept step of at least so many epochs, the last one if there is none; or the nearest, by ratio."""
    rows = [row for row in history if row["step"] > 0]
    if nearest:
        return min(rows, key=lambda row: abs(math.log(row["epoch"] / epochs)))["step"]
    return next((row["step"] for row in rows if row["epoch"] >= epochs), rows[-1]["step"])


@dataclass(frozen=True, eq=False)
class Aurocs:
    """AUROCs of several scores at several steps on the same images, with paired bootstrap draws.

    Attributes
    ----------
    sets : OOD sets, the order of all arrays below
    values : (step, score) -> (sets,);   draws : (step, score) -> (n_boot, sets)
    n : images, or groups, a side: the smallest of the sets
    infinite : (step, score) -> how many images of all sets overflowed
    """

    sets: list[str]
    values: dict[tuple[int, str], NDArray[np.float64]]
    draws: dict[tuple[int, str], NDArray[np.float64]]
    n: int
    infinite: dict[tuple[int, str], int]


def auroc_along(scores: pd.DataFrame, names: Sequence[str], *, group_size: int = 1, n_boot: int = 1000, seed: int = 0,
                leave_out: Sequence[str] = ()) -> Aurocs:
    """AUROC of every OOD set, score and step; images (or groups) are resampled, the same ones everywhere.

    Parameters
    ----------
    scores : columns step, group_size, set ("id" and OOD sets), index, and the scores; a score that was not computed at
        a step is NaN there and left out
    names : of the scores
    leave_out : sets that are not wanted
    """
    rows = scores[scores.group_size == group_size]
    if rows.empty:
        raise OodlibError(f"auroc_along: no rows of group size {group_size}; there are "
                          f"{sorted(scores.group_size.unique().tolist())}.")
    sets = [name for name in rows["set"].unique() if name not in ("id", *leave_out)]
    pairs, infinite = {}, {}
    for (step,), part in rows.groupby(["step"]):
        by_set = {name: part[part["set"] == name].sort_values("index") for name in ["id", *sets]}
        for name in names:
            if name in part and not part[name].isna().all():
                columns = {key: table[name].to_numpy(dtype=np.float64) for key, table in by_set.items()}
                pairs[int(step), name] = columns["id"], [columns[key] for key in sets]
                infinite[int(step), name] = sum(int(np.isinf(v).sum()) for v in columns.values())
    named = {str(key): pair for key, pair in pairs.items()}
    found = metrics.replicates_by_set(metrics.auroc, named, n=n_boot, seed=seed)
    return Aurocs(sets, {key: found[str(key)][0] for key in pairs}, {key: found[str(key)][1] for key in pairs},
                  int(rows.groupby(["step", "set"]).size().min()), infinite)


def overlap(a: ArrayLike, b: ArrayLike, *, bandwidth: float = 0.1, resolution: int = 20) -> float:
    """Overlap coefficient of two samples, the integral of min(p, q), in [0, 1].

    p and q are Gaussian kernel density estimates of one bandwidth, in the unit of the samples, on bins of a twentieth
    of it. Infinite values lie beyond every finite one and overlap with each other alone.

    a (n,), b (m,)

    Raises
    ------
    OodlibError : a sample is empty or holds NaN, or the bandwidth is not positive
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or b.ndim != 1 or not len(a) or not len(b) or np.isnan(a).any() or np.isnan(b).any():
        raise OodlibError(f"overlap: needs samples (n,) and (m,) without NaN, got {a.shape} and {b.shape}.")
    if not 0 < bandwidth < math.inf:
        raise OodlibError(f"overlap: bandwidth must be positive and finite, got {bandwidth}.")
    infinite = min(float(np.isinf(a).mean()), float(np.isinf(b).mean()))
    samples = [v[np.isfinite(v)] for v in (a, b)]
    if not all(map(len, samples)):
        return infinite
    step, margin = bandwidth / resolution, 6 * resolution
    # only where both have mass; a stray value far away in both must not ask for endless bins
    low, high = max(v.min() for v in samples), min(v.max() for v in samples)
    size = 2 * margin + int(np.clip((high - low) / step, 0, 2**20))
    densities = []
    for sample, whole in zip(samples, (a, b), strict=True):
        place = np.round((sample - low) / step) + margin
        counts = np.bincount(place[(place >= 0) & (place < size)].astype(int), minlength=size).astype(np.float64)
        densities.append(gaussian_filter1d(counts, resolution, mode="constant", truncate=5) / len(whole))
    return infinite + float(np.minimum(*densities).sum())
