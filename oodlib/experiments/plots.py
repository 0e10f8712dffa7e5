"""Figures that several notebooks draw: rows of images, score histograms, metric dots with
intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine

from oodlib.claims.style import COLOURS, METHOD_COLOURS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray


def image_rows(pictures: Mapping[str, NDArray[np.uint8]], *, per_set: int = 9) -> Figure:
    """One row of images per set, as `oodlib.experiments.Testbed.pictures` gives them.

    pictures : title -> (n, 3, h, w)
    """
    figure, axes = plt.subplots(
        len(pictures),
        per_set,
        figsize=(6.4, 0.85 * len(pictures)),
        squeeze=False,
        layout=ConstrainedLayoutEngine(h_pad=0.1),
    )
    for row, (title, images) in zip(axes, pictures.items(), strict=True):
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(
                visible=True, color=COLOURS["chance"], linewidth=0.5
            )  # a white image stays visible
        for ax, image in zip(row, images, strict=False):
            ax.imshow(image.transpose(1, 2, 0))
        row[0].set_title(" ", fontsize=8)  # room for the name, which is wider
        row[0].annotate(
            title,
            (0, 1),
            (0, 6),
            "axes fraction",
            textcoords="offset points",
            fontsize=8,
            in_layout=False,
        )
    return figure


def histograms(
    ax: Axes, scores: Mapping[str, ArrayLike], groups: Sequence[str], *, bins: int = 45
) -> None:
    """Densities of several score arrays over common bins that leave out 0.2 % at either end.

    scores : legend label -> (n,)
    groups : "id", "near" or "far" for each, which is its colour
    """
    low, high = np.quantile(
        np.concatenate([np.asarray(v) for v in scores.values()]), [0.002, 0.998]
    )
    edges = np.linspace(low, high, bins).tolist()
    for (label, values), group in zip(scores.items(), groups, strict=True):
        ax.hist(
            np.asarray(values), edges, density=True, alpha=0.6, color=COLOURS[group], label=label
        )
    ax.set(xlabel="score (larger = more OOD)", ylabel="density")


def interval_dots(ax: Axes, results: pd.DataFrame, *, rows: str, series: str, label: str) -> None:
    """Values in per cent with their intervals: one line per value of ``rows``, one colour or marker
    per ``series``.

    results : rows of results.csv with one metric
    rows, series : columns of it; methods have fixed colours
    """
    names, kinds = list(results[rows].unique()), list(results[series].unique())
    for i, kind in enumerate(kinds):
        part = results[results[series] == kind]
        y = np.array([names.index(name) for name in part[rows]]) + 0.7 * (
            i - (len(kinds) - 1) / 2
        ) / max(len(kinds), 3)
        spread = 100 * np.array([part.value - part.low, part.high - part.value])
        ax.errorbar(
            100 * part.value,
            y,
            xerr=spread,
            fmt="osD^vP*X"[i % 8] if rows == "method" else "o",
            ms=4,
            lw=1,
            color=METHOD_COLOURS.get(kind),
            label=kind,
        )
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlabel=label)
    ax.legend(fontsize=8, ncols=2 if len(kinds) > 4 else 1, loc="best")
