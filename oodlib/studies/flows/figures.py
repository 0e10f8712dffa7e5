"""Figures of flows along their trainings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from oodlib.claims.style import COLOURS
from oodlib.studies.flows.maturity import Moment, Run, Study
from oodlib.studies.flows.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SCORE_COLOURS = {
    "nll": COLOURS["chance"],
    "typicality": "#B8860B",
    "complexity_png": "#009E73",
    "density": COLOURS["far"],
}


def draw_curves(curves: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """AUROC against training step, a panel per pair: band of the main seed, thin other seeds.

    curves : of `oodlib.studies.flows.curves`; step 0 is drawn at 10
    titles : pair -> title of its panel
    """
    rows = -(-len(titles) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(11, 2.7 * rows), sharey=True, squeeze=False)
    curves = curves.assign(step=curves.step.clip(lower=10))
    for ax, (pair, title) in zip(axes.flat, titles.items(), strict=False):
        part = curves[curves.pair == pair]
        main, others = part[part.main], part[~part.main]
        look = {"x": "step", "y": "value", "hue": "score", "palette": SCORE_COLOURS, "ax": ax}
        sns.lineplot(main, style="score", errorbar=None, **look)
        sns.lineplot(others, units="seed", estimator=None, legend=False, lw=0.6, **look)
        for score, band in main.groupby("score"):
            colour = SCORE_COLOURS[str(score)]
            ax.fill_between(band.step, band.low, band.high, color=colour, alpha=0.2, lw=0)
        ax.axhline(50, color="black", lw=0.5)
        ax.set(xscale="log", ylim=(0, 103), ylabel="AUROC (%)", title=title)
        handles, names = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    for ax in axes.flat[len(titles) :]:
        ax.set_visible(False)
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    return figure


def draw_bits(ax: Axes, study: Study, run: Run, moment: Moment) -> None:
    """Histograms of bits per dim: the ID set, filled, and at most three OOD sets.

    Images far from every ID image are cut off; the legend says how many of a set are shown.
    """
    part, sets = study.at(run, moment), study.aurocs[run.name, 1].sets[:3]
    ids = part.nll[part["set"] == "id"]
    low, high = np.quantile(ids[np.isfinite(ids)], [0.005, 0.995])
    edges = np.linspace(low - 0.3 * (high - low), high + 0.3 * (high - low), 45).tolist()
    look = {"bins": edges, "element": "step", "ax": ax}
    share = np.full(len(ids), 1 / len(ids))  # of the set, shown or not
    sns.histplot(x=ids, weights=share, alpha=0.3, label=short(run.spec.id_set), **look)
    for name, colour, dash in zip(sets, ("C1", "C2", "C3"), ("--", ":", "-."), strict=False):
        values = part.nll[part["set"] == name]
        shown = values.between(edges[0], edges[-1]).mean()
        label = short(name) + (f" ({shown:.0%} shown)" if shown < 0.95 else "")
        look |= {"color": colour, "fill": False, "linestyle": dash}
        share = np.full(len(values), 1 / len(values))
        sns.histplot(x=values, weights=share, label=label, **look)
    title = f"{short(run.spec.id_set)} flow, step {study.step(run, moment)}"
    ax.set(xlabel="bits/dim", ylabel="", yticks=[], title=title)
    ax.legend(fontsize=9)


def draw_overlap(ax: Axes, lines: pd.DataFrame, score: str, rho: pd.Series) -> None:
    """AUROC of a score against overlap, a line per pair; arrows for the two extreme correlations.

    lines : columns pair, step (rising), overlap, "AUROC <score>"
    rho : pair -> correlation of overlap and density along the training
    """
    look = {"x": "overlap", "y": f"AUROC {score}", "sort": False, "estimator": None, "ax": ax}
    sns.lineplot(lines, units="pair", color=COLOURS["chance"], lw=0.6, **look)
    for pair, colour in {rho.idxmin(): "C0", rho.idxmax(): "C3"}.items():
        way = lines[lines.pair == pair]
        label = f"{short(str(pair))}, ρ = {rho[pair]:+.1f}"
        sns.lineplot(way, color=colour, marker="o", label=label, **look)
        before, last = way[["overlap", f"AUROC {score}"]].to_numpy()[-2:]
        ax.annotate("", last, before, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})
    ax.axhline(50, color="black", lw=0.5)
    ax.set(xlabel="overlap of bits/dim", ylabel="AUROC (%)", title=score)
    if legend := ax.get_legend():
        legend.remove()
