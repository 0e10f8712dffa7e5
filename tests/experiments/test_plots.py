"""Figures that several notebooks draw show the numbers they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from oodlib.experiments import histograms, interval_dots


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_dots_and_interval_ends_are_those_of_the_results(ax):
    results = pd.DataFrame(
        {
            "method": ["msp", "energy"] * 2,
            "model": ["a", "a", "b", "b"],
            "value": [0.5, 0.75, 0.625, 0.875],
            "low": [0.25, 0.5, 0.6, 0.8],
            "high": [0.9, 0.8, 0.7, 0.9],
        }
    )
    interval_dots(ax, results, rows="method", series="model", label="AUROC (%)")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["energy", "msp"]
    drawn = np.round(sorted(x for line in ax.lines for x in line.get_xdata()), 6)
    wanted = 100 * results[["value", "low", "high"]].to_numpy().ravel()
    assert set(np.round(wanted, 6)) <= set(drawn)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_histograms_are_densities_over_common_bins(ax):
    rng = np.random.default_rng(0)
    scores = {"latin (ID)": rng.normal(size=500), "greek (OOD)": rng.normal(2, 1, 300)}
    histograms(ax, scores, ["id", "near"], bins=20)
    assert ax.get_ylabel() == "density" and len(ax.collections) == 2
    assert 0.3 < ax.get_ylim()[1] < 1
