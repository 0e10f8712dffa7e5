"""Metrics of a test bed's scores, a control of fonts, and what notebooks used before `Board`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from oodlib import metrics
from oodlib.claims import Run
from oodlib.experiments.testbed import Testbed
from oodlib.metrics import METRICS, Board, Estimate, Scores


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
        found = metrics.bootstrap(
            metrics.auroc, values["id"][same], values[ood], n=n_boot, seed=run.seed
        )
        value, low, high = found
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


def mean_metric(values: Scores, metric: str = "AUROC") -> float:
    """Unweighted mean of a metric over the OOD sets, without interval."""
    return Board(scores={"": {"": values}}).value("", metric)


# goes with the notebooks' rewriting
def record(
    run: Run,
    bed: Testbed,
    scores: Mapping[str, Scores],
    *,
    variants: Mapping[str, str] | None = None,
    which: Sequence[str] = tuple(METRICS),
    n_boot: int = 1000,
) -> None:
    """`Board.results` of one test bed, written into a run."""
    if scores:
        board = Board(
            scores={bed.network: scores},
            group={bed.network: bed.group},
            id_name={bed.network: bed.id_name},
            n_boot=n_boot,
            seed=run.seed,
        )
        run.show(board, metrics=which, variants=variants, tables=(), scores=False)


# goes with the notebooks' rewriting
def judged(values: Scores, smallest_n: int) -> Scores:
    """Scores without the OOD sets that are too small to judge a claim."""
    return {k: v for k, v in values.items() if k == "id" or len(v) >= smallest_n}


# goes with the notebooks' rewriting
def interval(
    methods: Mapping[str, Mapping[str, Scores]],
    statistic: Callable[[dict[str, Any]], Any],
    *,
    metric: str = "AUROC",
    n_boot: int = 1000,
    seed: int = 0,
) -> Estimate:
    """`Board.statistic`."""
    return Board(scores=methods, n_boot=n_boot, seed=seed).statistic(statistic, metric)


# goes with the notebooks' rewriting
def judge_each(
    run: Run,
    claim: str,
    found: Sequence[float],
    each: Mapping[str, Sequence[float]],
    *,
    n: int,
    detail: str = "",
) -> list[dict[str, str]]:
    """`Run.judge` -> one row per network."""

    def estimate(numbers: Sequence[float], **more: Any) -> Estimate:
        value, low, high = map(float, numbers)
        return Estimate(value=value, low=low, high=high, **more)

    networks = {name: estimate(numbers) for name, numbers in each.items()}
    done = len(run.judged_networks())
    run.judge(claim, estimate(found, each=networks), n=n, detail=detail, paper_setting=True)
    rows: list[dict[str, str]] = run.judged_networks()[done:].to_dict("records")
    return rows
