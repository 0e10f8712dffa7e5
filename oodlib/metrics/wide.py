"""The metrics that tables show, and the table of one network: methods by OOD sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd

from oodlib.metrics.detection import auroc, fpr_at_tpr

AVERAGE = "average"  # unweighted mean over the OOD sets, not pooled

# what tables call it -> (name and positive class in results.csv, metric)
METRICS: dict[str, tuple[str, str, Callable[..., float]]] = {
    "AUROC": ("auroc", "", auroc),
    "FPR95(ID+)": ("fpr95", "id", partial(fpr_at_tpr, positive="id")),
    "FPR95(OOD+)": ("fpr95", "ood", partial(fpr_at_tpr, positive="ood")),
}


def wide_table(
    results: pd.DataFrame,
    *,
    model: str,
    metric: str = "AUROC",
    sets: Sequence[str] | None = None,
    index: str = "method",
    decimals: int = 1,
) -> pd.DataFrame:
    """Rows of results.csv as ``value [low, high]`` in per cent, one row per method (or variant).

    One column per OOD set, in the order of ``sets``.
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
        table.loc[rows[index].unique(), list(sets) if sets else list(rows.ood.unique())]
        .reset_index()
        .rename_axis(columns=None)
    )
