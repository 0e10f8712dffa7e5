"""Statistics of the ViT study against scipy, scikit-learn and tables whose answer is known."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from pandas import DataFrame
from scipy.stats import binomtest, spearmanr, ttest_1samp, ttest_ind

from oodlib import OodlibError, metrics
from oodlib.studies.vits.effects import (
    clustered_mean,
    common_levels,
    group_difference,
    interaction,
    paired_effects,
    pool_frame,
)
from oodlib.studies.vits.measures import (
    against_best,
    averaged,
    choose_weights,
    flat,
    model_frame,
    per_class,
    summary,
)
from oodlib.studies.vits.pool_table import PoolRow
from oodlib.studies.vits.statistics import (
    eta_squared,
    recipe_percentile,
    soup_against_members,
    spearman,
    spearman_difference,
    spread_within,
    standing,
    top_share,
    wins,
)

NEAR = ["greek", "cyrillic"]


def made_table(seed: int = 0, quality: float = 1.0) -> DataFrame:
    """Scores of 120 ID images, 60 of validation, two near sets of three classes of unequal size,
    and 17 unit tests.
    """
    rng, parts = np.random.default_rng(seed), []
    for name, labels, shift in (
        ("id", [0] * 120, 0.0),
        ("val", [0] * 60, 0.0),
        ("val_ood", [0] * 50, 1.0),
        ("greek", [0] * 30 + [1] * 10 + [2] * 5, 1.0),
        ("cyrillic", [0] * 20 + [1] * 8, 0.5),
        ("unit_tests", [t for t in range(17) for _ in range(4)], 2.0),
    ):
        values = rng.normal(size=(len(labels), 2)) + shift * quality
        parts.append(
            DataFrame(
                {
                    "set": name,
                    "index": np.arange(len(labels)),
                    "label": labels,
                    "msp": values[:, 0].round(1).astype("float32"),  # with ties
                    "mahalanobis": values[:, 1].astype("float32"),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def values_of(table: DataFrame, score: str, name: str, label: int | None = None) -> np.ndarray:
    rows = table[(table["set"] == name) & ((table["label"] == label) | (label is None))]
    return rows[score].to_numpy()


@pytest.mark.parametrize("score", ["msp", "mahalanobis"])
def test_class_values_are_those_of_the_metrics(score: str) -> None:
    table = made_table()
    found = per_class(table, [*NEAR, "unit_tests"])
    found = found[found["score"] == score]
    assert len(found) == 3 + 2 + 17
    for row in found.itertuples():
        ids, ood = values_of(table, score, "id"), values_of(table, score, row.set, row.label)
        assert row.images == len(ood)
        assert row.fpr == pytest.approx(metrics.fpr_at_tpr(ids, ood, positive="id"))
        assert row.auroc == pytest.approx(metrics.auroc(ids, ood))


def test_a_summary_averages_classes_and_pools_images() -> None:
    table = made_table()
    found = summary(table, near=NEAR).set_index(["score", "suite"]).loc[("msp", "near")]
    ids = values_of(table, "msp", "id")
    classes = [
        values_of(table, "msp", name, label)
        for name, label in [
            ("greek", 0),
            ("greek", 1),
            ("greek", 2),
            ("cyrillic", 0),
            ("cyrillic", 1),
        ]
    ]
    assert found["fpr"] == pytest.approx(
        np.mean([metrics.fpr_at_tpr(ids, c, positive="id") for c in classes])
    )
    assert found["auroc"] == pytest.approx(np.mean([metrics.auroc(ids, c) for c in classes]))
    assert found["fpr_pooled"] == pytest.approx(
        metrics.fpr_at_tpr(ids, np.concatenate(classes), positive="id")
    )
    assert found["auroc_pooled"] == pytest.approx(metrics.auroc(ids, np.concatenate(classes)))
    assert (found["classes"], found["images"]) == (5, 73) and np.isnan(found["failed"])


def test_a_unit_test_fails_above_ten_per_cent() -> None:
    table = made_table()
    tests = table["set"] == "unit_tests"
    table.loc[tests, "mahalanobis"] = np.where(
        table.loc[tests, "label"] < 5, -99.0, 99.0
    )  # 5 accepted whole
    table.loc[tests & (table["label"] == 16), "mahalanobis"] = [
        99,
        99,
        99,
        -99,
    ]  # a quarter accepted
    found = (
        summary(table, near=NEAR).set_index(["score", "suite"]).loc[("mahalanobis", "unit_tests")]
    )
    assert found["failed"] == 6 and found["fpr"] == pytest.approx(5.25 / 17)


def test_a_flat_summary_names_score_suite_and_metric() -> None:
    found = flat(summary(made_table(), near=NEAR))
    assert len(found) == 2 * (4 + 5) and "msp/near/failed" not in found
    assert {"mahalanobis/unit_tests/failed", "msp/near/auroc_pooled"} <= set(found)


def test_a_table_without_the_set_is_refused() -> None:
    with pytest.raises(OodlibError, match="no set ninco; it has id, val"):
        summary(made_table(), near=["ninco"])
    with pytest.raises(OodlibError, match="none was named"):
        per_class(made_table(), [])


def test_a_nan_score_is_refused() -> None:
    table = made_table()
    table.loc[table["set"] == "greek", "mahalanobis"] = np.nan
    with pytest.raises(OodlibError, match="mahalanobis holds 45 NaN"):
        per_class(table, NEAR)


# --- averages of several models


def test_equal_weights_average_z_values() -> None:
    tables = {"a": made_table(1), "b": made_table(2)}
    expected = 0.0
    for table in tables.values():
        known = values_of(table, "mahalanobis", "val").astype(float)
        expected = (
            expected + (table["mahalanobis"].to_numpy(float) - known.mean()) / known.std() / 2
        )
    found = averaged(tables, "mahalanobis")
    np.testing.assert_allclose(found["mahalanobis"], expected)
    assert list(found) == ["set", "index", "label", "mahalanobis"]
    assert set(summary(found, near=NEAR)["score"]) == {"mahalanobis"}


def test_ranks_are_shares_of_the_validation_images_below() -> None:
    table = made_table(1)
    known = values_of(table, "msp", "val")
    found = averaged({"a": table}, "msp", scale="rank")["msp"]
    expected = [(known < v).mean() + (known == v).mean() / 2 for v in table["msp"]]
    np.testing.assert_allclose(found, expected)


def test_z_values_ignore_a_models_scale_and_weights_theirs() -> None:
    a, b = made_table(1), made_table(2)
    scaled = b.assign(mahalanobis=1000 * b["mahalanobis"] + 7)
    first = averaged({"a": a, "b": b}, "mahalanobis", weights={"a": 1, "b": 3})
    second = averaged({"a": a, "b": scaled}, "mahalanobis", weights={"a": 10, "b": 30})
    np.testing.assert_allclose(first["mahalanobis"], second["mahalanobis"], rtol=1e-3, atol=1e-3)


def test_the_better_model_gets_the_weight_and_test_images_do_not_matter() -> None:
    tables = {"noise": made_table(1, quality=0.0), "good": made_table(2, quality=3.0)}
    weights = choose_weights(tables, "mahalanobis", validation_ood="val_ood")
    assert weights["good"] >= 0.75 and sum(weights.values()) == pytest.approx(1)
    blind = {
        name: table.assign(
            mahalanobis=table["mahalanobis"].where(table["set"].isin(["val", "val_ood"]), 0)
        )
        for name, table in tables.items()
    }
    assert choose_weights(blind, "mahalanobis", validation_ood="val_ood") == weights


def test_of_equally_good_weights_the_even_ones_are_taken() -> None:
    tables = dict.fromkeys("abcd", made_table(1))
    assert choose_weights(tables, "mahalanobis", validation_ood="val_ood") == dict.fromkeys(
        "abcd", 0.25
    )


def test_equal_weights_are_among_those_looked_at() -> None:
    tables = dict.fromkeys("abcdefgh", made_table(1))  # no multiple of a quarter is an eighth
    assert choose_weights(tables, "mahalanobis", validation_ood="val_ood") == dict.fromkeys(
        "abcdefgh", 0.125
    )


def test_an_average_is_held_against_the_best_model() -> None:
    tables = {str(seed): made_table(seed) for seed in range(4)}
    average = averaged(tables, "mahalanobis")
    found = against_best(average, tables, "mahalanobis", near=NEAR, n_boot=50)
    near = [
        summary(t, near=NEAR).query("score == 'mahalanobis' and suite == 'near'")["auroc"].item()
        for t in (average, *tables.values())
    ]
    assert found.value == pytest.approx(near[0] - max(near[1:]))
    assert found.low < found.value < found.high and (found.n, found.clusters) == (120, 4)
    itself = against_best(tables["0"], {"0": tables["0"]}, "mahalanobis", near=NEAR, n_boot=5)
    assert (itself.value, itself.low, itself.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"a": 1.0}}, "one weight of at least 0"),
        ({"weights": {"a": -1.0, "b": 2.0}}, "one weight of at"),
        ({"scale": "log"}, 'scale "z" or "rank"'),
        ({"validation": "none"}, "no set none"),
    ],
)
def test_bad_averages_are_named(change: dict, message: str) -> None:
    with pytest.raises(OodlibError, match=message):
        averaged({"a": made_table(1), "b": made_table(2)}, "msp", **change)


def test_models_scored_on_other_images_are_not_averaged() -> None:
    a = made_table(1)
    with pytest.raises(OodlibError, match="b was scored on other images"):
        averaged({"a": a, "b": a.iloc[:-1]}, "msp")


def test_weights_need_their_set_and_a_small_grid() -> None:
    with pytest.raises(OodlibError, match="no set 'dev'"):
        choose_weights({"a": made_table()}, "msp", validation_ood="dev")
    with pytest.raises(OodlibError, match="more than 10000 vectors"):
        choose_weights(
            dict.fromkeys("abcdefgh", made_table()), "msp", validation_ood="val_ood", steps=12
        )


# --- effects


def made_cells(effect: float = 0.3, noise: float = 0.0) -> DataFrame:
    """Two pretraining sets x two weight decays x three seeds x two finetuning rates; the
    pretraining has an effect.
    """
    rng, rows, found = np.random.default_rng(0), [], []
    for data, decay, seed, rate in itertools.product(
        ("cifar10", "tiny-imagenet"), (0.05, 1.0), range(3), (0.01, 0.03)
    ):
        rows.append(
            PoolRow(
                name=f"m{len(rows)}",
                network="vit",
                pretraining=data,
                objective="sigmoid",
                weight_decay=decay,
                ft_lr=rate,
                seed=seed,
            )
        )
        base = 0.5 + effect * (data == "tiny-imagenet") + decay * 0.01 + noise * rng.normal()
        found.append({"maha": base, "logit": 0.5 + seed / 100})
    return pool_frame(rows, found)


def test_a_paired_effect_is_the_one_put_in() -> None:
    found = paired_effects(made_cells(), "pretraining", "cifar10", "tiny-imagenet", "maha")
    assert found.value == pytest.approx(0.3) and found.low == pytest.approx(0.3) == found.high
    assert (found.n, found.clusters) == (12, 6)  # finetunes of one pair of checkpoints: one
    assert found.p == pytest.approx(binomtest(6, 6).pvalue)
    assert set(found.pairs) >= {
        "weight_decay",
        "seed",
        "ft_lr",
        "low",
        "high",
        "difference",
        "cluster",
    }


def test_a_factor_of_the_finetuning_is_clustered_by_checkpoint() -> None:
    cells = made_cells()
    cells["maha"] += np.where(cells["ft_lr"] == 0.03, -cells["seed"] / 10, 0)
    found = paired_effects(cells, "ft_lr", 0.01, 0.03, "maha")
    assert found.value == pytest.approx(-0.1) and (found.n, found.clusters) == (12, 12)
    assert found.p == pytest.approx(binomtest(0, 8).pvalue)  # the four ties of seed 0 are dropped


def test_a_checkpoint_with_more_pairs_has_one_vote() -> None:
    rows = [
        PoolRow(
            name=f"{lr}{head}{seed}",
            network="vit",
            objective="sigmoid",
            ft_lr=lr,
            head=head,
            seed=seed,
        )
        for lr in (0.01, 0.03)
        for head, seed in (("raw", 0), ("unit", 0), ("raw", 1))
    ]
    cells = pool_frame(rows, [{"v": 0.0}] * 3 + [{"v": 1.0}, {"v": 1.0}, {"v": 4.0}])
    found = paired_effects(cells, "ft_lr", 0.01, 0.03, "v")
    assert (found.value, found.n, found.clusters) == (2.5, 3, 2)


def test_with_few_clusters_the_interval_is_students_over_clusters_not_models() -> None:
    cells = made_cells()
    cells["maha"] += np.where(cells["pretraining"] == "tiny-imagenet", cells["seed"] - 1.0, 0)
    found = paired_effects(cells, "pretraining", "cifar10", "tiny-imagenet", "maha", n_boot=400)
    expected = ttest_1samp(np.tile([-0.7, 0.3, 1.3], 2), 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_where_clusters_are_skewed_the_bootstrap_is_the_wider() -> None:
    values = np.repeat([0.0, 10.0], [98, 2])  # a resample has five tens, rarely six
    found, t = clustered_mean(values), ttest_1samp(values, 0).confidence_interval()
    assert found.high == pytest.approx(0.5) and t.high < 0.49
    assert found.low == pytest.approx(t.low)


def test_an_interaction_is_the_difference_of_two_effects() -> None:
    cells = made_cells(noise=0.1)
    arguments = ("pretraining", "cifar10", "tiny-imagenet")
    found = interaction(cells, *arguments, "maha", "logit")
    each = [paired_effects(cells, *arguments, score).value for score in ("maha", "logit")]
    assert found.value == pytest.approx(each[0] - each[1])


def test_a_free_column_may_change_with_the_factor() -> None:
    rows = [
        PoolRow(name=f"m{i}", network="vit", dropout=d, stochastic_depth=d, seed=s)
        for i, (d, s) in enumerate(itertools.product((0.0, 0.1), range(2)))
    ]
    cells = pool_frame(rows, [{"maha": row.dropout or 0.0} for row in rows])
    with pytest.raises(OodlibError, match="no two cells differ in dropout alone"):
        paired_effects(cells, "dropout", 0.0, 0.1, "maha")
    assert paired_effects(
        cells, "dropout", 0.0, 0.1, "maha", free=["stochastic_depth"]
    ).value == pytest.approx(0.1)


def test_cells_that_are_empty_in_a_factor_pair_with_empty_ones() -> None:
    rows = [
        PoolRow(name="a", network="vit", ft_lr=0.01),
        PoolRow(name="b", network="vit", ft_lr=0.03),
        PoolRow(name="c", network="vit", ft_lr=0.01, aug="x"),
    ]
    found = paired_effects(
        pool_frame(rows, [{"v": 1.0}, {"v": 3.0}, {"v": 9.0}]), "ft_lr", 0.01, 0.03, "v"
    )
    assert (found.value, found.n) == (2.0, 1)


def test_bad_tables_of_models_are_named() -> None:
    cells = made_cells()
    with pytest.raises(OodlibError, match="no column 'knn'"):
        paired_effects(cells, "ft_lr", 0.01, 0.03, "knn")
    with pytest.raises(OodlibError, match=r"two cells with weight_decay = 0\.05 agree"):
        paired_effects(cells, "weight_decay", 0.05, 1.0, "maha", free=["ft_lr"])
    with pytest.raises(OodlibError, match="no other factor"):
        paired_effects(cells[["ft_lr", "maha", "checkpoint"]], "ft_lr", 0.01, 0.03, "maha")
    with pytest.raises(OodlibError, match="1 NaN"):
        clustered_mean([1.0, np.nan])
    with pytest.raises(OodlibError, match="equal length"):
        spearman([1.0, 2.0], [1.0])
    with pytest.raises(OodlibError, match="Every model needs a cluster"):
        clustered_mean([1.0, 2.0], ["a"])


def test_groups_differ_and_the_permutation_test_is_exact() -> None:
    values, chosen = np.array([5.0, 6, 7, 1, 2, 3, 4]), np.arange(7) < 3
    found = group_difference(values, chosen)
    expected = ttest_ind(values[chosen], values[~chosen]).confidence_interval()
    assert found.value == pytest.approx(3.5) and (found.low, found.high) == pytest.approx(
        (expected.low, expected.high)
    )
    assert found.p == pytest.approx(2 / 35)  # the most extreme of 35, on both sides


def test_clusters_are_permuted_whole() -> None:
    values, chosen = np.repeat([5.0, 6, 1, 2], 10), np.repeat([True, True, False, False], 10)
    found = group_difference(values, chosen, np.repeat(list("abcd"), 10))
    assert found.p == pytest.approx(2 / 6) and (found.n, found.clusters) == (40, 4)
    with pytest.raises(OodlibError, match="no cluster may lie in both"):
        group_difference(values, chosen, ["a"] * 40)
    with pytest.raises(OodlibError, match="both groups need a model"):
        group_difference(values, np.ones(40, bool))


# --- correlations, ranks, soups


def test_spearman_is_scipys_with_an_interval() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    found = spearman(x, y)
    assert found.value == pytest.approx(spearmanr(x, y).statistic)
    draws = [spearmanr(x[i], y[i]).statistic for i in rng.integers(0, 60, (600, 60))]
    np.testing.assert_allclose(
        [found.low, found.high], np.quantile(draws, [0.025, 0.975]), atol=0.05
    )


def test_copies_in_one_cluster_do_not_narrow_an_interval() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 15))
    few = spearman(x, y)
    copied = spearman(np.repeat(x, 5), np.repeat(y, 5), np.repeat(np.arange(15), 5))
    naive = spearman(np.repeat(x, 5), np.repeat(y, 5))
    assert copied.high - copied.low == pytest.approx(few.high - few.low, rel=0.05)
    assert naive.high - naive.low < 0.6 * (few.high - few.low)


def test_two_correlations_are_compared_on_the_same_models() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    same = spearman_difference(x, y, 2 * y)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    found = spearman_difference(x, x, -x)
    assert (found.value, found.low, found.high) == pytest.approx((-2, -2, -2))


def test_wins_are_shared_by_ties() -> None:
    cells = DataFrame({"a": [1.0, 2, 2], "b": [2.0, 2, 1], "c": [3.0, 3, 3]})
    assert wins(cells, ["a", "b", "c"], larger_is_better=False).mean().to_dict() == {
        "a": 0.5,
        "b": 0.5,
        "c": 0.0,
    }
    assert wins(cells, ["a", "b"], larger_is_better=True)["a"].tolist() == [0, 0.5, 1]


def test_eta_squared_splits_the_variance_of_a_balanced_grid() -> None:
    grid = DataFrame(itertools.product([0, 1], [0, 1, 2], [None, 1.0]), columns=["a", "b", "c"])
    grid["v"] = 3 * grid["a"] + grid["c"].isna()
    found = eta_squared(grid, ["a", "b", "c"], "v")
    assert found.to_dict() == pytest.approx({"a": 0.9, "b": 0.0, "c": 0.1})


def test_standing_counts_ties_half() -> None:
    assert standing(2, [1, 2, 3, 4], larger_is_better=True) == pytest.approx(3 / 8)
    assert standing(2, [1, 2, 3, 4], larger_is_better=False) == pytest.approx(5 / 8)


def test_a_soup_is_held_against_its_members() -> None:
    members = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    found = soup_against_members([0.35, 0.75], members, larger_is_better=True)
    assert found["percentile"].value == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert found["advantage"].value == pytest.approx((0.1 + 0.0) / 2)
    assert found["share"].value == pytest.approx(0.75)  # better once, tied once
    assert found["advantage"].low < 0.05 < found["advantage"].high and found["share"].clusters == 4
    turned = soup_against_members([0.35, 0.75], members, larger_is_better=False)
    assert turned["advantage"].value == pytest.approx(-0.05) and turned[
        "share"
    ].value == pytest.approx(0.25)
    with pytest.raises(OodlibError, match="at least two members"):
        soup_against_members([0.35], members, larger_is_better=True)


def test_the_recipe_is_ranked_among_the_others() -> None:
    values, chosen = [0.95, 0.5, 0.6, 0.7, 0.8], [True, False, False, False, False]
    best = recipe_percentile(values, chosen, larger_is_better=True, n_boot=50)
    assert (best.value, best.low, best.high) == (1, 1, 1)
    assert recipe_percentile(values, chosen, larger_is_better=False, n_boot=50).value == 0
    middle = recipe_percentile([0.65, *values[1:]], chosen, larger_is_better=True)
    assert middle.value == 0.5 and middle.low < 0.3 and middle.high > 0.7
    with pytest.raises(OodlibError, match="a cell each"):
        recipe_percentile(values, [False] * 5, larger_is_better=True)


def test_two_checkpoints_that_disagree_leave_a_recipe_open() -> None:
    values, chosen = [0.9, 0.9, 0.1, 0.5, 0.6], [True, True, True, False, False]
    found = recipe_percentile(values, chosen, list("aabcd"), larger_is_better=True)
    assert found.value == pytest.approx(2 / 3) and found.clusters == 2  # the recipe's alone
    assert (found.low, found.high) == (0, 1)  # Student's is wider; a share ends at 0 and 1


def test_share_of_the_most_accurate_that_fail() -> None:
    accuracy, fpr = np.arange(8) / 10, [0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.6, 0.4]
    assert top_share(accuracy, fpr).value == 0.5
    assert top_share(accuracy, fpr, part=0.5).value == 0.75


def test_spread_within_groups() -> None:
    groups, values = ["a", "a", "b", "b", "c"], [0.0, 0.2, 5.0, 5.4, 77.0]
    expected = np.sqrt((2 * 0.1**2 + 2 * 0.2**2) / 2)  # alone in its group: no part
    assert spread_within(values, groups).value == pytest.approx(expected)
    assert spread_within([1.0, 2.0], [0, 1]).value == 0
    assert spread_within(values, groups, minus=[0.0, 1, 0, 0, 0]).value == pytest.approx(
        expected - 0.5
    )


# --- a pool as one table of models


def test_the_two_levels_that_most_pairs_have_are_compared() -> None:
    def rows(*cells: tuple[float, float]) -> DataFrame:
        pool = [
            PoolRow(name=f"m{i}", network="vit", weight_decay=wd, ft_lr=lr)
            for i, (wd, lr) in enumerate(cells)
        ]
        return pool_frame(pool, [{}] * len(pool))

    assert common_levels(
        rows((0.1, 1), (0.5, 1), (0.1, 2), (0.5, 2), (1.0, 1)), "weight_decay"
    ) == (0.1, 0.5)
    assert common_levels(rows((0.1, 1), (0.5, 1), (1.0, 1)), "weight_decay") == (0.5, 1.0)
    assert common_levels(rows((0.1, 1), (0.5, 2)), "weight_decay") is None


@pytest.mark.parametrize(("quality", "sign"), [("auroc", 1), ("fpr", -1)])
def test_models_become_rows_whose_quality_grows_with_detection(quality: str, sign: int) -> None:
    kinds = {"a": ("unicode", "sigmoid"), "b": ("latin", "softmax"), "c": ("unicode", "cosine")}
    models = [
        SimpleNamespace(
            row=PoolRow(name=name, network="vit", pretraining=data, objective=objective),
            table=made_table(seed),
            record={"accuracy": 0.9, "geometry": {"nc1": 1.0}},
        )
        for seed, (name, (data, objective)) in enumerate(kinds.items())
    ]
    frame = model_frame(models, near=NEAR, quality=quality)
    assert frame["data"].to_dict() == {"a": "broad", "b": "narrow", "c": "CLIP-like"}
    expected = frame[f"msp/near/{quality}"] if sign == 1 else 1 - frame[f"msp/near/{quality}"]
    assert frame["Q/msp/near"].equals(expected) and frame.loc["a", "nc1"] == 1.0
