"""Figures that several notebooks draw: rows of images, score histograms, metric dots with
intervals.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.layout_engine import ConstrainedLayoutEngine

from oodlib.claims.style import COLOURS, METHOD_COLOURS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

__all__ = ["histograms", "image_rows", "interval_dots"]


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
    groups : "id", "near" or "far" for each, which is its colour and its outline
    """
    arrays = {label: np.asarray(values) for label, values in scores.items()}
    low, high = np.quantile(np.concatenate(list(arrays.values())), [0.002, 0.998])
    edges = np.linspace(low, high, bins).tolist()
    for (label, values), group in zip(arrays.items(), groups, strict=True):
        sns.histplot(
            x=values,
            bins=edges,
            stat="density",
            element="step",
            alpha=0.4,
            color=COLOURS[group],
            linestyle={"id": "-", "near": "--"}.get(group, ":"),
            linewidth=1.5,
            label=label,
            ax=ax,
        )
    ax.set(xlabel="score (larger = more OOD)", ylabel="density")


def interval_dots(ax: Axes, results: pd.DataFrame, *, rows: str, series: str, label: str) -> None:
    """Values in per cent with their intervals: one line per value of ``rows``, one colour and
    marker per ``series``. Methods are sorted by their median; one series needs no legend.

    results : rows of results.csv with one metric
    rows, series : columns of it; methods have fixed colours
    """
    kinds = list(results[series].unique())
    medians = results.groupby(rows, sort=False).value.median()
    if rows == "method":
        medians = medians.sort_values(ascending=False, kind="stable")
    spare = itertools.cycle(sns.color_palette())
    ends = results.melt([rows, series], ["value", "low", "high"], value_name="per cent")
    sns.pointplot(
        ends.assign(**{"per cent": 100 * ends["per cent"].astype(float)}),
        x="per cent",
        y=rows,
        hue=series,
        order=list(medians.index),
        hue_order=kinds,
        estimator=lambda found: found.iloc[0],  # the value; the other two are its interval
        errorbar=lambda found: (found.min(), found.max()),
        dodge=0.7 * (len(kinds) - 1) / max(len(kinds), 3),
        markers=list(itertools.islice(itertools.cycle("osD^vPXp<>dh"), len(kinds))),
        palette={kind: METHOD_COLOURS.get(kind) or next(spare) for kind in kinds},
        linestyle="none",
        markersize=5,
        markeredgewidth=0,
        err_kws={"linewidth": 1.2},
        legend=len(kinds) > 1,
        ax=ax,
    )
    ax.set(xlabel=label, ylabel="")
    ax.grid(True, axis="x")
    if len(kinds) > 1:
        sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), title=None)
