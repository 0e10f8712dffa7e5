"""Maturity rule, the steps that are compared, AUROC along training, overlap of likelihoods."""

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import trapezoid
from scipy.stats import gaussian_kde

from oodlib import OodlibError
from oodlib.metrics import auroc
from oodlib.metrics.statistics import overlap
from oodlib.models.training.flow import kept_step
from oodlib.studies.flows.maturity import auroc_along, is_mature

RNG = np.random.default_rng(0)


def history(*rows):
    """Rows of (step, validation bits per dim); ten steps are an epoch."""
    return [{"step": step, "epoch": step / 10, "validation_bpd": bpd} for step, bpd in rows]


# --- the rule


@pytest.mark.parametrize(
    ("last", "gain", "mature"),
    [
        ((200, 2.995), "gaining 0.005", True),
        ((200, 2.985), "gaining 0.015", False),
        ((400, 2.986), "gaining 0.007", True),
        ((200, 3.5), "rising by 0.500 (past its best)", True),
    ],
    ids=["slow", "fast", "slow per doubling", "rising"],
)
def test_mature_is_gaining_under_a_hundredth_per_doubling(last, gain, mature):
    found, why = is_mature(history((0, 8.0), (100, 3.0), last))
    assert found is mature and f"{gain} per doubling" in why and f"{last[1]:.2f} bits/dim" in why


@pytest.mark.parametrize(("bpd", "mature"), [(2.64, True), (2.66, False), (2.0, True)])
def test_mature_is_near_the_published_value(bpd, mature):
    found, why = is_mature(history((0, 8.0), (100, 3.0), (200, bpd)), 2.5)
    assert found is mature and ("published after 250 epochs: 2.50" in why) is mature


def test_far_from_the_published_value_the_gain_still_counts():
    assert is_mature(history((0, 8.0), (100, 3.0), (200, 2.995)), 2.5)[0]


def test_one_trained_step_says_nothing_about_gain():
    assert is_mature(history((0, 3.0), (100, 3.0))) == (False, "3.00 bits/dim, only one kept step")


@pytest.mark.parametrize(
    ("epochs", "step"), [(0.01, 3), (0.3, 3), (0.31, 12), (1, 12), (1.2, 12), (5, 90), (10, 90)]
)
def test_kept_step_is_the_first_of_so_many_epochs(epochs, step):
    assert kept_step(history((0, 8), (3, 7), (12, 6), (90, 5)), epochs) == step


@pytest.mark.parametrize(
    ("epochs", "step"), [(0.01, 3), (0.59, 3), (0.61, 12), (3.2, 12), (3.4, 90), (100, 90)]
)
def test_the_nearest_kept_step_is_nearest_by_ratio(epochs, step):
    assert kept_step(history((0, 8), (3, 7), (12, 6), (90, 5)), epochs, nearest=True) == step


# --- AUROC along training


def scores(
    steps=(0, 5), sets=(("id", 30), ("near", 20), ("far", 25)), group_sizes=(1, 5)
) -> pd.DataFrame:
    parts = [
        pd.DataFrame(
            {
                "step": step,
                "group_size": size,
                "set": name,
                "index": range(n // size),
                "nll": RNG.normal(i, 1, n // size),
                "density": RNG.normal(i, 1, n // size),
            }
        )
        for step in steps
        for size in group_sizes
        for i, (name, n) in enumerate(sets)
    ]
    return pd.concat(parts, ignore_index=True)


TABLE = scores()


def values(table, step, name, column, size=1):
    rows = table[(table.step == step) & (table["set"] == name) & (table.group_size == size)]
    return rows.sort_values("index")[column].to_numpy()


@pytest.mark.parametrize("size", [1, 5])
def test_auroc_along_is_the_auroc_of_each_set(size):
    found = auroc_along(TABLE, ["nll", "density"], group_size=size, n_boot=7)
    assert found.sets == ["near", "far"] and found.n == 20 // size
    assert (
        set(found.values)
        == set(found.draws)
        == {(s, name) for s in (0, 5) for name in ("nll", "density")}
    )
    for (step, column), row in found.values.items():
        known = values(TABLE, step, "id", column, size)
        assert row.tolist() == [
            auroc(known, values(TABLE, step, name, column, size)) for name in found.sets
        ]
        assert found.draws[step, column].shape == (7, 2)


def test_the_same_images_are_drawn_at_every_step_and_for_every_score():
    table = TABLE.assign(density=TABLE.nll)
    table.loc[table.step == 5, ["nll", "density"]] = table.loc[
        table.step == 0, ["nll", "density"]
    ].to_numpy()
    draws = auroc_along(table, ["nll", "density"], n_boot=20).draws
    assert (
        all(np.array_equal(draws[key], draws[0, "nll"]) for key in draws)
        and np.ptp(draws[0, "nll"]) > 0
    )


def test_the_order_of_rows_does_not_matter():
    order = RNG.permutation(len(TABLE))
    by_set = TABLE.iloc[order].sort_values(
        "set", ascending=False, key=lambda s: s == "near", kind="stable"
    )
    one, other = (auroc_along(table, ["nll"], n_boot=20) for table in (TABLE, by_set))
    assert one.sets == other.sets and all(
        np.array_equal(one.draws[key], other.draws[key]) for key in one.draws
    )


def test_draws_follow_the_seed():
    one, same, other = (
        auroc_along(TABLE, ["nll"], n_boot=20, seed=seed).draws[0, "nll"] for seed in (0, 0, 1)
    )
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_sets_can_be_left_out():
    found = auroc_along(TABLE, ["nll"], n_boot=3, leave_out=["near"])
    assert found.sets == ["far"] and found.values[0, "nll"].shape == (1,)


def test_a_score_that_was_not_computed_at_a_step_is_left_out():
    table = TABLE.assign(density=TABLE.density.where(TABLE.step == 5))
    assert set(auroc_along(table, ["nll", "density", "else"], n_boot=3).values) == {
        (0, "nll"),
        (5, "nll"),
        (5, "density"),
    }


def test_infinite_scores_rank_last_and_are_counted():
    table = TABLE.copy()
    table.loc[(table.step == 5) & (table["set"] == "far"), "nll"] = np.inf
    table.loc[(table.step == 5) & (table["set"] == "id") & (table["index"] < 3), "density"] = np.inf
    found = auroc_along(table, ["nll", "density"], n_boot=5)
    assert found.infinite == {(0, "nll"): 0, (0, "density"): 0, (5, "nll"): 25, (5, "density"): 3}
    assert found.values[5, "nll"][1] == 1 and (found.draws[5, "nll"][:, 1] == 1).all()


def test_a_group_size_that_is_not_there_is_refused():
    with pytest.raises(OodlibError, match=r"no rows of group size 3; there are \[1, 5\]"):
        auroc_along(TABLE, ["nll"], group_size=3)


# --- overlap

A, B = RNG.normal(3.4, 0.3, 150), RNG.gamma(4, 0.2, 90) + 2.6


@pytest.mark.oracle
@pytest.mark.parametrize("bandwidth", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("shift", [0.0, 0.7, -3.0])
def test_overlap_is_the_integral_under_both_kernel_densities(bandwidth, shift):
    b = B + shift
    grid = np.linspace(-3, 9, 20_001)
    p, q = (gaussian_kde(v, bandwidth / v.std(ddof=1))(grid) for v in (A, b))
    assert overlap(A, b, bandwidth=bandwidth) == pytest.approx(
        trapezoid(np.minimum(p, q), grid), abs=0.01
    )
    assert overlap(A, b, bandwidth=bandwidth) == pytest.approx(
        overlap(b, A, bandwidth=bandwidth), abs=0.01
    )


def test_identical_samples_overlap_wholly_and_far_ones_not_at_all():
    assert overlap(A, A[::-1]) == pytest.approx(1, abs=1e-4)
    assert overlap(A, A + 100) == overlap([0.0], [50.0]) == 0
    assert overlap([2.0], [2.0]) == pytest.approx(1, abs=1e-4)  # no spread


def test_overlap_does_not_depend_on_where_zero_is():
    assert overlap(A + 1e4, B + 1e4) == pytest.approx(overlap(A, B), abs=0.005)


def test_a_stray_value_changes_little():
    assert overlap(np.append(A, 1e12), np.append(B, 1e12)) == pytest.approx(overlap(A, B), abs=0.02)


def test_infinite_values_overlap_with_each_other_alone():
    far = np.full(50, np.inf)
    assert overlap(far, far) == 1 and overlap(A, far) == 0
    halves = np.concatenate([A, np.full(150, np.inf)]), np.concatenate([A, np.full(50, np.inf)])
    assert overlap(*halves) == pytest.approx(0.5 + 0.25, abs=1e-3)
    assert overlap(np.concatenate([A, far]), A) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("bad", [[], [1.0, np.nan], [[1.0]]], ids=["empty", "NaN", "two axes"])
def test_samples_that_are_none_are_refused(bad):
    for pair in ((A, bad), (bad, A)):
        with pytest.raises(OodlibError, match="needs samples"):
            overlap(*pair)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, np.inf, np.nan])
def test_a_bandwidth_that_is_none_is_refused(bandwidth):
    with pytest.raises(OodlibError, match="bandwidth must be positive"):
        overlap(A, B, bandwidth=bandwidth)
