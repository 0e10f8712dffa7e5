"""What the published substitute numbers say, recomputed, against the values of the project's notes
on the papers.
"""

from __future__ import annotations

import pytest
from pandas import DataFrame
from scipy.stats import spearmanr

from oodlib.data.published import published
from oodlib.studies.vits.effects import group_difference, interaction, paired_effects
from oodlib.studies.vits.published_models import METHODS, published_models
from oodlib.studies.vits.statistics import spearman, spearman_difference, wins

MAHA, LOGIT, RELATIVE, NORMALISED = (
    f"{score}/near/fpr"
    for score in ("mahalanobis", "max_logit", "relative_mahalanobis", "mahalanobis++")
)
FAILED = "mahalanobis/unit_tests/failed"


@pytest.fixture(scope="module")
def models() -> DataFrame:
    return published_models()


@pytest.fixture(scope="module")
def tested(models: DataFrame) -> DataFrame:
    return models[models[FAILED].notna()]


def test_every_model_has_its_numbers(models: DataFrame, tested: DataFrame) -> None:
    columns = [
        "accuracy",
        *(f"{score}/near/{metric}" for score in METHODS.values() for metric in ("fpr", "auroc")),
    ]
    assert models.shape[0] == 44 and models[columns].notna().all(axis=None)
    assert (len(tested), len(models["variance_deviation"].dropna())) == (39, 11)
    found = models.loc["ViT-B16-In21k-augreg", ["accuracy", MAHA, LOGIT, "variance_deviation"]]
    assert found.tolist() == pytest.approx([0.84528, 0.313, 0.454, 0.05])


def test_means_of_the_models_are_the_printed_ones(models: DataFrame) -> None:
    rows = published("vit_study")
    printed = rows[
        rows["aggregation"].str.startswith("printed mean") & rows["method"].isin(list(METHODS))
    ]
    suffix = printed["metric"].map({"FPR95": "/near/fpr", "AUROC": "/near/auroc"})
    ours = [
        100 * models[METHODS[method] + end].mean()
        for method, end in zip(printed["method"], suffix, strict=True)
    ]
    assert len(printed) == 18
    assert ours == pytest.approx(printed["value"].tolist(), abs=0.11)


def test_broad_pretraining_gains_most_with_mahalanobis_on_augreg(models: DataFrame) -> None:
    narrow, broad = models.loc["ViT-B16-augreg"], models.loc["ViT-B16-In21k-augreg"]
    gains = [
        100 * (narrow[f"{score}/near/fpr"] - broad[f"{score}/near/fpr"])
        for score in ("mahalanobis", "max_logit", "msp")
    ]
    assert gains == pytest.approx([31.6, 25.7, 15.4])


def test_ten_architectures_are_pairs_of_1k_and_21k(models: DataFrame) -> None:
    found = paired_effects(models, "data", "1k", "21k", MAHA, free=["pretraining"], n_boot=50)
    expected = {
        name: models.loc[
            name.replace("augreg", "In21k-augreg") if "augreg" in name else f"{name}-In21k", MAHA
        ]
        - models.loc[name, MAHA]
        for name in found.pairs["network"]
    }
    assert found.pairs.set_index("network")["difference"].to_dict() == pytest.approx(expected)
    assert (found.n, found.clusters) == (10, 10)
    assert (
        interaction(models, "data", "1k", "21k", MAHA, LOGIT, free=["pretraining"], n_boot=50).n
        == 10
    )


def test_the_finetuning_alone_changes_mahalanobis(models: DataFrame) -> None:
    first, second = models.loc["ViT-B16-In21k-augreg"], models.loc["ViT-B16-In21k-augreg2"]
    assert first["checkpoint"] == second["checkpoint"]
    assert [100 * (second[c] - first[c]) for c in ("accuracy", MAHA)] == pytest.approx(
        [0.568, 38.5]
    )


def test_mahalanobis_minus_logit_and_its_repair(models: DataFrame) -> None:
    gap = 100 * (models[MAHA] - models[LOGIT])
    clip = [f"ViT-{size}-CLIP-L2b-In12k" for size in ("B16", "L14", "H14")]
    augreg = [f"ViT-{size}-In21k-augreg" for size in ("T16", "S16", "B16", "L16")]
    assert gap[clip].tolist() == pytest.approx([13.2, 5.4, 1.9])
    assert gap[augreg].tolist() == pytest.approx([-12.4, -9.9, -14.1, -13.5])
    assert gap[["ViT-B16-In21k-miil", "ViT-B16-In21k-augreg2"]].tolist() == pytest.approx(
        [6.9, 15.2]
    )
    assert 100 * (models[NORMALISED] - models[MAHA])[clip[0]] == pytest.approx(-21.4)


def test_clip_like_models_are_four_and_clusters_of_the_others_seven(models: DataFrame) -> None:
    vits = models[
        (models["family"] == "ViT") & models["group"].isin(["CLIP-like", "supervised 21k"])
    ]
    found = group_difference(
        vits[MAHA] - vits[LOGIT], vits["group"] == "CLIP-like", vits["checkpoint"], n_boot=50
    )
    assert (found.n, found.clusters) == (12, 11)


def test_accuracy_tells_about_ninco_more_than_about_unit_tests(tested: DataFrame) -> None:
    accuracy = tested["accuracy"]
    assert spearman(accuracy, tested[MAHA], n_boot=9).value == pytest.approx(-0.75, abs=0.005)
    assert spearman(accuracy, tested[FAILED], n_boot=9).value == pytest.approx(-0.28, abs=0.005)
    found = spearman_difference(accuracy, tested[MAHA], tested[FAILED])
    assert (found.value, found.low, found.high) == pytest.approx((0.47, 0.16, 0.76), abs=0.03)


def test_on_vits_alone_the_difference_is_suggestive(tested: DataFrame) -> None:
    vits = tested[tested["family"].isin(["ViT", "DeiT3", "EVA02"])]
    found = spearman_difference(vits["accuracy"], vits[MAHA], vits[FAILED])
    assert len(vits) == 20 and found.value == pytest.approx(0.35, abs=0.006)
    assert (found.low, found.high) == pytest.approx((-0.02, 0.77), abs=0.05)


@pytest.mark.parametrize(
    ("method", "all_models", "vits"),
    [
        ("MSP", -0.76, -0.73),
        ("MaxLogit", -0.71, -0.67),
        ("Energy", -0.59, -0.58),
        ("ViM", -0.68, -0.65),
        ("KNN", -0.80, -0.83),
        ("Mahalanobis", -0.66, -0.57),
        ("RelMahalanobis", -0.75, -0.72),
        ("Mahalanobis++", -0.80, -0.75),
        ("RelMahalanobis++", -0.86, -0.82),
    ],
)
def test_accuracy_correlations_of_every_score(
    models: DataFrame, method: str, all_models: float, vits: float
) -> None:
    some = models[models["family"].isin(["ViT", "DeiT3", "EVA02"])]
    found = [
        spearmanr(part["accuracy"], part[f"{METHODS[method]}/near/fpr"]).statistic
        for part in (models, some)
    ]
    assert len(some) == 24 and found == pytest.approx([all_models, vits], abs=0.0051)


def test_wins_by_pretraining(models: DataFrame) -> None:
    vits = models[models["family"] == "ViT"]
    found = wins(vits, [MAHA, RELATIVE, LOGIT], larger_is_better=False).groupby(vits["group"]).sum()
    assert found.loc["supervised 21k"].tolist() == [5, 2, 1]
    assert found.loc["CLIP-like"].tolist() == [0, 2, 2]
