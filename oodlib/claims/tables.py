"""Data frames as Markdown and LaTeX tables, and the table of a run's claims."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from oodlib.claims.judge import Verdict, cite, condition


def markdown_table(table: pd.DataFrame, *, decimals: int = 2) -> str:
    """A data frame as a Markdown table: floats with ``decimals`` places, missing values empty.

    >>> frame = pd.DataFrame({"method": ["msp", "a|b"], "AUROC": [0.5, None]})
    >>> print(markdown_table(frame), end="")
    | method | AUROC |
    |---|---:|
    | msp | 0.50 |
    | a\\|b |  |
    """

    def show(value: Any) -> str:
        if pd.api.types.is_scalar(value) and pd.isna(value):
            return ""
        if isinstance(value, float | np.floating):
            return f"{value:.{decimals}f}"
        return str(value).replace("|", "\\|").replace("\n", " ")

    marks = ["---:" if pd.api.types.is_numeric_dtype(kind) else "---" for kind in table.dtypes]
    rows = [table.columns, *table.itertuples(index=False, name=None)]
    lines = ["| " + " | ".join(map(show, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join(marks) + "|", *lines[1:]]) + "\n"


def latex_table(table: pd.DataFrame, *, caption: str = "", decimals: int = 2) -> str:
    """A data frame as a LaTeX table (booktabs), as `markdown_table`."""
    styler = table.style.format(precision=decimals, escape="latex", na_rep="")
    styler = styler.hide(axis="index").format_index(escape="latex", axis="columns")
    escaped = re.sub(r"([&%$#_{}])", r"\\\1", caption)
    return str(styler.to_latex(hrules=True, caption=escaped or None))


def claim_table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """One row per claim: statistic, verdict, measurement, published value and where it was read."""
    rows = []
    for verdict in verdicts:
        claim, show = verdict.claim, verdict.claim.show
        interval = "" if verdict.low is None else f"[{show(verdict.low)}, {show(verdict.high)}]"
        rows.append(
            {
                "claim": claim.short,
                "statement": claim.statement,
                "statistic": claim.statistic,
                "holds if": condition(claim.kind, claim.direction, claim.margin, claim.unit),
                "verdict": verdict.verdict,
                "measured": show(verdict.measured),
                "interval": interval,
                "unit": claim.unit,
                "published": cite(claim.published, claim.unit),
                "read in": claim.source,
                "detail": verdict.detail,
                "reason": verdict.reason,
            }
        )
    return pd.DataFrame(rows)


def file_stem(*words: str) -> str:
    """Words as the name of a figure or table: ``auroc_latin_fast-live``.

    >>> file_stem("AUROC", "latin_fast:live"), file_stem("FPR95(OOD+)", "net/a")
    ('auroc_latin_fast-live', 'fpr95-ood_net-a')
    """
    parts = [words[0].lower().replace("(id+)", "").replace("(ood+)", "-ood"), *words[1:]]
    return re.sub("[^A-Za-z0-9_-]", "-", "_".join(parts))
