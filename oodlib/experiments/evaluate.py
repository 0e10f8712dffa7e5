"""A mean metric without interval, and the control of fonts."""

from __future__ import annotations

import numpy as np
import pandas as pd

from oodlib import metrics
from oodlib.claims import Run
from oodlib.experiments.testbed import Testbed
from oodlib.metrics import Board, Scores


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
