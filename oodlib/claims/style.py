"""One look for every figure, and one way to save them so that the bytes repeat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Okabe and Ito's colours, told apart by readers with any common colour-vision deficiency
_BLUE, _ORANGE, _GREEN, _VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PURPLE, _SKY, _BLACK, _GREY = "#CC79A7", "#56B4E9", "#000000", "#7F7F7F"

COLOURS = {"id": _BLUE, "near": _ORANGE, "far": _VERMILION, "threshold": _BLACK, "chance": _GREY}
METHOD_COLOURS = {
    "gradnorm": _VERMILION,
    "opnp": _GREEN,
    "grood": _PURPLE,
    "msp": _GREY,
    "odin": "#B8860B",
    "max_logit": _ORANGE,
    "energy": _BLUE,
    "mahalanobis": _SKY,
    "relative_mahalanobis": "#004C6D",
    "knn": _BLACK,
    "vim": "#8C564B",
    "react": "#A6761D",
    "ash": "#5E4FA2",
    "dice": "#66A61E",
    "gen": "#B2182B",
    "kl_matching": "#80B1D3",
}


def use_style() -> None:
    """Set the suite's matplotlib style: readable at half a page's width, colour-blind safe, fixed
    hash salt.
    """
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcParams.update(
        {
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.labelsize": 12,
            "axes.prop_cycle": cycler(
                color=[_BLUE, _ORANGE, _GREEN, _VERMILION, _PURPLE, _SKY, _BLACK]
            ),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 12,
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "figure.figsize": (6.4, 4.0),
            "font.family": "DejaVu Sans",
            "font.size": 11,
            "grid.alpha": 0.3,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "pdf.fonttype": 42,
            "savefig.dpi": 130,
            "svg.hashsalt": "oodlib",
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
        }
    )


def savefig(figure: Figure, path: Path) -> None:
    """Save ``figure`` as ``path``.png and ``path``.pdf, whole, without dates or version stamps."""
    from oodlib.files import atomic_path

    metadata: dict[str, dict[str, None]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    for suffix, empty in metadata.items():
        with atomic_path(path.with_name(f"{path.name}.{suffix}")) as temporary:
            figure.savefig(temporary, format=suffix, metadata=empty)
