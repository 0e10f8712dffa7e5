"""How mature a flow is, and how its OOD detection changes along its training.

A pair is an ID set and an OOD set. Seeds of a pair are averaged first; then pairs count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from oodlib import metrics
from oodlib.errors import OodlibError
from oodlib.metrics.estimate import Estimate
from oodlib.metrics.statistics import overlap
from oodlib.models.training.flow import kept_step

Moment = Literal["one epoch", "ten epochs", "last"]

MATURE_GAIN, NEAR_PUBLISHED = 0.01, 0.15  # bits per dim


def is_mature(
    history: Sequence[Mapping[str, Any]], published_bpd: float | None = None
) -> tuple[bool, str]:
    """Whether a training's last step is mature, by a rule fixed before any result, and why.

    Within 0.15 bits per dim of the published 250-epoch value, or gaining less than 0.01 per
    doubling of the steps, measured on validation images between the last two kept steps.

    history : rows with ``step`` and ``validation_bpd``, rising
    """
    last, before = history[-1], history[-2]
    bpd = f"{last['validation_bpd']:.2f} bits/dim"
    if published_bpd is not None and last["validation_bpd"] <= published_bpd + NEAR_PUBLISHED:
        return True, f"{bpd}; published after 250 epochs: {published_bpd:.2f}"
    if before["step"] == 0:
        return False, f"{bpd}, only one kept step"
    gain = (before["validation_bpd"] - last["validation_bpd"]) / math.log2(
        last["step"] / before["step"]
    )
    how = f"gaining {gain:.3f}" if gain > 0 else f"rising by {-gain:.3f} (past its best)"
    return gain < MATURE_GAIN, f"{bpd}, {how} per doubling of the steps"


@dataclass(frozen=True, kw_only=True, eq=False)
class Aurocs:
    """AUROCs of several scores at several steps on the same images, with paired bootstrap draws.

    Attributes
    ----------
    sets : OOD sets, the order of all arrays below
    values : (step, score) -> (sets,);   draws : (step, score) -> (n_boot, sets)
    n : images, or groups, of the smallest set
    infinite : (step, score) -> number of images of all sets that overflowed
    """

    sets: list[str]
    values: dict[tuple[int, str], NDArray[np.float64]]
    draws: dict[tuple[int, str], NDArray[np.float64]]
    n: int
    infinite: dict[tuple[int, str], int]

    def ends(self, step: int, score: str) -> NDArray[np.float64]:
        """Lower and upper ends of the 95 % intervals, (2, sets)."""
        return np.quantile(self.draws[step, score], [0.025, 0.975], axis=0)


def auroc_along(
    scores: pd.DataFrame,
    names: Sequence[str],
    *,
    group_size: int = 1,
    n_boot: int = 1000,
    seed: int = 0,
    leave_out: Sequence[str] = (),
) -> Aurocs:
    """AUROC of every OOD set, score and step, on the same resamples of images (or groups).

    Parameters
    ----------
    scores : columns step, group_size, set ("id" and OOD sets), index, and the scores; a score that
        was not computed at a step is NaN there and skipped
    names : of the scores
    leave_out : sets to skip

    Raises
    ------
    OodlibError : no rows of this group size, no OOD set left
    """
    rows = scores[scores.group_size == group_size]
    if rows.empty:
        raise OodlibError(
            f"auroc_along: no rows of group size {group_size}; there are "
            f"{sorted(scores.group_size.unique().tolist())}."
        )
    sets = [name for name in rows["set"].unique() if name not in ("id", *leave_out)]
    if not sets:
        raise OodlibError(
            f"auroc_along: no OOD set is left of {', '.join(rows['set'].unique())} without "
            f"{', '.join(leave_out) or 'any'}. Provide one and score the flow again."
        )
    pairs, infinite = {}, {}
    for (step,), part in rows.groupby(["step"]):
        by_set = {name: part[part["set"] == name].sort_values("index") for name in ["id", *sets]}
        for name in names:
            if name in part and not part[name].isna().all():
                of_id, *of_ood = (t[name].to_numpy(dtype=np.float64) for t in by_set.values())
                pairs[int(step), name] = of_id, of_ood
                infinite[int(step), name] = sum(int(np.isinf(v).sum()) for v in (of_id, *of_ood))
    named = {str(key): pair for key, pair in pairs.items()}
    found = metrics.replicates_by_set(metrics.auroc, named, n=n_boot, seed=seed)
    return Aurocs(
        sets=sets,
        values={key: found[str(key)][0] for key in pairs},
        draws={key: found[str(key)][1] for key in pairs},
        n=int(rows.groupby(["step", "set"]).size().min()),
        infinite=infinite,
    )


@dataclass(frozen=True, eq=False)
class Pairs:
    """A number per pair: ``values`` (P,), bootstrap ``draws`` (n_boot, P), ``labels`` (P,).

    ``n``: images, or groups, of the smallest set.

    >>> pairs = Pairs(np.array([0.4, 0.8]), np.array([[0.3, 0.7], [0.5, 0.9]]), ["a", "b"])
    >>> print(pairs.estimate(), pairs.smallest()[0])
    0.600 [0.505, 0.695] a
    """

    values: NDArray[np.float64]
    draws: NDArray[np.float64]
    labels: list[str]
    n: int | None = None

    def __sub__(self, other: Pairs) -> Pairs:
        """Paired difference; the pairs must be the same."""
        if self.labels != other.labels:
            raise OodlibError(
                f"Pairs: only the same pairs can be compared, got {self.labels} and {other.labels}."
            )
        return Pairs(self.values - other.values, self.draws - other.draws, self.labels, self.n)

    def only(self, chosen: NDArray[np.bool_]) -> Pairs:
        """Some of the pairs, ``chosen`` (P,)."""
        labels = [label for label, kept in zip(self.labels, chosen, strict=True) if kept]
        return Pairs(self.values[chosen], self.draws[:, chosen], labels, self.n)

    @property
    def mean(self) -> tuple[float, NDArray[np.float64]]:
        """Mean over the pairs, and its draws (n_boot,)."""
        return float(self.values.mean()), self.draws.mean(1)

    def estimate(self, statistic: Callable[[NDArray[Any]], Any] | None = None) -> Estimate:
        """Mean over the pairs, or a ``statistic`` of arrays (..., P) over their last axis."""
        found = statistic or (lambda values: values.mean(-1))
        return Estimate.of(found(self.values), found(self.draws), n=self.n)

    def smallest(self) -> tuple[str, Estimate]:
        """The pair with the smallest value, and that value with an interval of level 0.05 / P.

        It was picked among P pairs, so its interval is one that holds for all P at once.
        """
        worst, level = int(self.values.argmin()), 0.05 / len(self.values)
        estimate = Estimate.of(self.values[worst], self.draws[:, worst], level=level, n=self.n)
        return self.labels[worst], estimate

    @property
    def intervals(self) -> pd.DataFrame:
        """One row per pair: pair, value, low, high (95 %)."""
        low, high = np.quantile(self.draws, [0.025, 0.975], axis=0)
        return pd.DataFrame({"pair": self.labels, "value": self.values, "low": low, "high": high})


class Run(Protocol):
    """What a study reads of a flow's run; `oodlib.studies.flows.runs.FlowRun` has it.

    Attributes
    ----------
    spec : ``name`` of the flow, its ``id_set``, and ``published_bpd`` or None
    seed : of the training
    record : ``record["history"]`` holds a row per saved step: step, epoch, validation_bpd;
        ``n_train`` is the number of training images
    scores : columns step, group_size, set, index, and the scores
    weights : steps whose weights are there
    """

    name: str
    seed: int
    spec: Any
    record: dict[str, Any]
    scores: pd.DataFrame

    @property
    def weights(self) -> list[int]: ...


class Study:
    """Several flows along their trainings, with AUROCs for OOD sets that all seeds of a flow have.

    Attributes
    ----------
    runs : by name;   families : flow -> its seeds
    mains : flow -> the seed that is shown (with weights if any has)
    aurocs : (run's name, B) -> `Aurocs`
    """

    def __init__(
        self,
        runs: Sequence[Run],
        names: Sequence[str],
        *,
        n_boot: int = 1000,
        seed: int = 0,
        leave_out: Sequence[str] = (),
    ):
        if not runs:
            raise OodlibError("Study: needs at least one flow. Name one, for example latin_glow:0.")
        self.runs = {run.name: run for run in runs}
        self.families: dict[str, list[Run]] = {}
        for run in runs:
            self.families.setdefault(run.spec.name, []).append(run)
        self.mains = {
            flow: next((r for r in members if r.weights), members[0])
            for flow, members in self.families.items()
        }
        self.n_boot, self.seed = n_boot, seed
        self.aurocs = {}
        for run in runs:
            seeds = self.families[run.spec.name]
            common = set.intersection(*(set(member.scores["set"]) for member in seeds))
            skip = [*leave_out, *set(run.scores["set"]) - common]
            for size in (1, 5):
                options: dict[str, Any] = {"group_size": size, "leave_out": skip}
                options |= {"n_boot": n_boot, "seed": seed}
                self.aurocs[run.name, size] = auroc_along(run.scores, names, **options)

    def step(self, run: Run, moment: Moment) -> int:
        """The saved step of "one epoch" (first of at least one), "ten epochs" (nearest), "last"."""
        if moment == "one epoch":
            return kept_step(run.record["history"], 1)
        if moment == "ten epochs":
            return kept_step(run.record["history"], 10, nearest=True)
        return run.record["history"][-1]["step"]

    def at(self, run: Run, moment: Moment, group_size: int = 1) -> pd.DataFrame:
        """The run's scores at a moment: columns set, index, and the scores."""
        step, size = run.scores["step"], run.scores["group_size"]
        return run.scores[(step == self.step(run, moment)) & (size == group_size)]

    def id_bits(self, run: Run, moment: Moment) -> NDArray[np.float64]:
        """Bits per dim of the ID images under the flow, (n,)."""
        part = self.at(run, moment)
        return part.nll[part["set"] == "id"].to_numpy(dtype=np.float64)

    def n(self, group_size: int = 1) -> int:
        """Images, or groups, of the smallest set of all runs."""
        return min(found.n for (_, size), found in self.aurocs.items() if size == group_size)

    def pairs(
        self, score: str, moment: Moment, group_size: int = 1, runs: Sequence[Run] | None = None
    ) -> Pairs:
        """AUROC of every pair; ``runs``: only of these."""
        values, draws, labels = [], [], []
        for members in self.families.values():
            used = [run for run in members if runs is None or run in runs]
            if used:
                aurocs = [self.aurocs[run.name, group_size] for run in used]
                keys = [(self.step(run, moment), score) for run in used]
                found = list(zip(aurocs, keys, strict=True))
                values.append(np.mean([of_run.values[key] for of_run, key in found], axis=0))
                draws.append(np.mean([of_run.draws[key] for of_run, key in found], axis=0))
                labels += [f"{used[0].spec.id_set} → {ood}" for ood in aurocs[0].sets]
        n = self.n(group_size)
        return Pairs(np.concatenate(values), np.concatenate(draws, axis=1), labels, n)

    def mature(self, flow: str) -> tuple[bool, str]:
        """`is_mature` of a flow's last step, on the mean of its seeds at common steps."""
        histories = [
            {row["step"]: row["validation_bpd"] for row in run.record["history"]}
            for run in self.families[flow]
        ]
        steps = sorted(set.intersection(*map(set, histories)))
        mean = [
            {"step": step, "validation_bpd": np.mean([history[step] for history in histories])}
            for step in steps
        ]
        return is_mature(mean, self.families[flow][0].spec.published_bpd)

    def beats_chance(self, flow: str, score: str = "density") -> bool:
        """Whether, at a saved step, the interval of the mean AUROC (pairs, seeds) is above 1/2."""
        found = [self.aurocs[run.name, 1].draws for run in self.families[flow]]
        keys = [key for key in set.intersection(*map(set, found)) if key[1] == score]
        means = [np.mean([draws[key].mean(1) for draws in found], axis=0) for key in keys]
        return any(np.quantile(mean, 0.025) > 0.5 for mean in means)

    def overlaps(
        self, run: Run, *, bandwidth: float = 0.1, n_boot: int = 100
    ) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]]:
        """Overlap of ID and OOD bits per dim: steps after 0, (steps, sets), (steps, n_boot, sets).

        Images are resampled as for the AUROCs, so that the first draws of both belong together.
        """
        part, sets = run.scores[run.scores.group_size == 1], self.aurocs[run.name, 1].sets
        steps = sorted(step for step in part.step.unique().tolist() if step > 0)
        pairs = {}
        for step in steps:
            nll = {
                name: rows.sort_values("index").nll.to_numpy(dtype=np.float64)
                for name, rows in part[part.step == step].groupby("set")
            }
            pairs[str(step)] = nll["id"], [nll[name] for name in sets]

        shared = partial(overlap, bandwidth=bandwidth)
        found = metrics.replicates_by_set(shared, pairs, n=n_boot, seed=self.seed)
        values, draws = (np.array([found[str(step)][i] for step in steps]) for i in (0, 1))
        return steps, values, draws

    def steps_to_best(
        self, run: Run, score: str = "density", *, within: float = 0.01
    ) -> tuple[float, NDArray[np.float64]]:
        """Share of the training until the mean AUROC is ``within`` of its best, and its draws."""
        found = self.aurocs[run.name, 1]
        steps = np.array(sorted(step for step, name in found.values if name == score))
        keys = [(step, score) for step in steps]
        means = np.array([[found.values[k].mean(), *found.draws[k].mean(1)] for k in keys])
        shares = steps[(means >= means.max(0) - within).argmax(0)] / steps[-1]
        return float(shares[0]), shares[1:]
