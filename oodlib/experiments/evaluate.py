"""Detectors on a test bed: scores of every set, metrics with intervals, and the tables notebooks
show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from oodlib import metrics
from oodlib.claims import Run, judge
from oodlib.scores import Detector, create

if TYPE_CHECKING:
    from oodlib.experiments.testbed import Testbed

__all__ = [
    "AVERAGE",
    "METRICS",
    "Scores",
    "font_control",
    "interval",
    "judge_each",
    "judged",
    "mean_metric",
    "record",
    "score",
    "wide_table",
]

Scores = Mapping[str, NDArray[np.float64]]  # "id" and each OOD set -> (n,)
AVERAGE = "average"  # unweighted mean over the OOD sets, not pooled

# what tables call it -> (name and positive class in results.csv, metric)
METRICS: dict[str, tuple[str, str, Callable[..., float]]] = {
    "AUROC": ("auroc", "", metrics.auroc),
    "FPR95(ID+)": ("fpr95", "id", partial(metrics.fpr_at_tpr, positive="id")),
    "FPR95(OOD+)": ("fpr95", "ood", partial(metrics.fpr_at_tpr, positive="ood")),
}


def score(bed: Testbed, detectors: Sequence[str] | Mapping[str, Detector]) -> dict[str, Scores]:
    """Fit each detector on ``bed.fit`` and score the ID test set ("id") and every OOD set, all from
    the same banks.

    Where the bed has no training images (ImageNet), detectors that learn are left out, and their
    names printed.

    detectors : names, or name -> detector with its own parameters
    """
    made = (
        detectors if isinstance(detectors, Mapping) else {name: create(name) for name in detectors}
    )
    left_out = [name for name, detector in made.items() if detector.needs_fit and bed.fit is None]
    if left_out:
        print(
            f"{bed.network}: left out {', '.join(left_out)}: they learn from ID training images, "
            "and this test bed has none (ImageNetFiles(train=True) gathers them)."
        )
    out: dict[str, Scores] = {}
    for name, detector in made.items():
        if name in left_out:
            continue
        if bed.fit is not None and detector.needs_fit:
            detector.fit(bed.fit)
        out[name] = {"id": detector.score(bed.test)} | {
            k: detector.score(bank) for k, bank in bed.ood.items()
        }
    return out


def record(
    run: Run,
    bed: Testbed,
    scores: Mapping[str, Scores],
    *,
    variants: Mapping[str, str] | None = None,
    which: Sequence[str] = tuple(METRICS),
    n_boot: int = 1000,
) -> None:
    """Write metrics with bootstrap intervals (images resampled) into a run: each OOD set, and their
    average.

    variants : scores' name -> variant column, for settings of one method; the name itself is then
        dropped
    """
    if not scores:
        return
    sets = [k for k in next(iter(scores.values())) if k != "id"]
    sizes = {k: len(v) for k, v in next(iter(scores.values())).items()}
    pairs = {name: (values["id"], [values[k] for k in sets]) for name, values in scores.items()}
    for label in which:
        metric, positive, function = METRICS[label]
        for name, (found, draws) in metrics.replicates_by_set(
            function, pairs, n=n_boot, seed=run.seed
        ).items():
            method, variant = (
                (name, "") if variants is None else (name.split(" ")[0], variants[name])
            )
            columns = [
                *zip(sets, found, draws.T, strict=True),
                (AVERAGE, found.mean(), draws.mean(1)),
            ]
            for ood, value, resampled in columns:
                low, high = np.quantile(resampled, [0.025, 0.975])
                run.result(
                    model=bed.network,
                    id=bed.id_name,
                    ood=ood,
                    group=bed.group.get(ood, ""),
                    method=method,
                    variant=variant,
                    metric=metric,
                    positive=positive,
                    value=float(value),
                    low=float(low),
                    high=float(high),
                    n_id=sizes["id"],
                    n_ood=sizes.get(ood),
                )


def font_control(
    run: Run, bed: Testbed, method: str, values: Scores, *, n_boot: int = 1000
) -> pd.DataFrame:
    """AUROC of each script against the ID images in its own fonts, beside the value in all fonts.

    Fonts that hold a script are few, so typeface could give OOD images away; the two columns say
    whether it does.
    """
    ids, rows = bed.images.get("test"), []
    for ood in bed.ood:
        if ids is None or "font" not in ids.meta or "font" not in bed.images[ood].meta:
            continue
        same = np.isin(ids.meta["font"], bed.images[ood].meta["font"])
        value, low, high = metrics.bootstrap(
            metrics.auroc, values["id"][same], values[ood], n=n_boot, seed=run.seed
        )
        run.result(
            model=bed.network,
            id=bed.id_name,
            ood=ood,
            group=bed.group[ood],
            method=method,
            variant="same fonts",
            metric="auroc",
            value=value,
            low=low,
            high=high,
            n_id=int(same.sum()),
            n_ood=len(values[ood]),
        )
        rows.append(
            {
                "OOD set": ood,
                "ID images in its fonts": int(same.sum()),
                "same fonts": 100 * value,
                "low": 100 * low,
                "high": 100 * high,
                "all fonts": 100 * metrics.auroc(values["id"], values[ood]),
            }
        )
    return pd.DataFrame(rows)


def wide_table(
    results: pd.DataFrame,
    *,
    model: str,
    metric: str = "AUROC",
    sets: Sequence[str] | None = None,
    index: str = "method",
    decimals: int = 1,
) -> pd.DataFrame:
    """Rows of results.csv as ``value [low, high]`` in per cent: one row per method (or variant),
    one column per set.
    """
    name, positive, _ = METRICS[metric]
    rows = results[
        (results.model == model) & (results.metric == name) & (results.positive == positive)
    ]
    rows = rows[(rows.variant == "") == (index == "method")]
    cells = [
        f"{100 * r.value:.{decimals}f} [{100 * r.low:.{decimals}f}, {100 * r.high:.{decimals}f}]"
        for r in rows.itertuples()
    ]
    table = rows.assign(cell=cells).pivot(index=index, columns="ood", values="cell")
    return (
        table.loc[rows[index].unique(), sets or list(rows.ood.unique())]
        .reset_index()
        .rename_axis(columns=None)
    )


def judged(values: Scores, smallest_n: int) -> Scores:
    """Scores without the OOD sets that are too small to judge a claim; their rows stay in the
    tables.
    """
    return {k: v for k, v in values.items() if k == "id" or len(v) >= smallest_n}


def mean_metric(values: Scores, metric: str = "AUROC") -> float:
    """Unweighted mean of a metric over the OOD sets, without interval."""
    function = METRICS[metric][2]
    return float(np.mean([function(values["id"], v) for k, v in values.items() if k != "id"]))


def interval(
    methods: Mapping[str, Mapping[str, Scores]],
    statistic: Callable[[dict], Any],
    *,
    metric: str = "AUROC",
    n_boot: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A statistic of several methods' average metrics, with a paired bootstrap interval.

    Images are resampled, the same ones for every method; with several networks the average is over
    them too.

    Parameters
    ----------
    methods : network -> method -> scores
    statistic : function of a mapping method -> average metric; floats or (n_boot,) arrays

    Returns
    -------
    value, low, high (2.5 % and 97.5 %)
    """
    function = METRICS[metric][2]
    per_network = []
    for scores in methods.values():
        pairs = {m: (v["id"], [v[k] for k in v if k != "id"]) for m, v in scores.items()}
        per_network.append(metrics.replicates(function, pairs, n=n_boot, seed=seed))
    names = per_network[0]
    value = statistic({m: float(np.mean([r[m][0] for r in per_network])) for m in names})
    draws = statistic({m: np.mean([r[m][1] for r in per_network], axis=0) for m in names})
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(value), float(low), float(high)


def judge_each(
    run: Run,
    claim: str,
    found: Sequence[float],
    each: Mapping[str, Sequence[float]],
    *,
    n: int,
    detail: str = "",
) -> list[dict[str, str]]:
    """Judge a claim over all networks, print the verdict, and judge each network alone by the same
    rule.

    Parameters
    ----------
    claim : "opnp/C1"
    found, each : (value, low, high), over all networks and of each of them
    n, detail : as `Run.claim` takes them

    Returns
    -------
    one row per network: claim ("C1"), network, measured (value and interval), unit, verdict
    """

    def numbers(x: Sequence[float]) -> str:
        return f"{rule.show(x[0])} [{rule.show(x[1])}, {rule.show(x[2])}]"

    value, low, high = found
    verdict = run.claim(
        claim, value=value, low=low, high=high, n=n, network=", ".join(each), detail=detail
    )
    rule, name = verdict.claim, claim.split("/")[-1]
    print(f"{name}: {numbers(found)} {rule.unit}  ->  {verdict.verdict}")
    return [
        {
            "claim": name,
            "network": network,
            "measured": numbers(x),
            "unit": rule.unit,
            "verdict": judge(rule, run.profile, x[0], x[1], x[2], n).verdict,
        }
        for network, x in each.items()
    ]
