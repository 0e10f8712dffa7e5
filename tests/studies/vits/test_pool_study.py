"""The study of a pool: which models are compared, the levels of factors, effects, recipe, soups."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from oodlib.errors import OodlibError
from oodlib.studies.vits import effects
from oodlib.studies.vits.pool_table import read_pool
from oodlib.studies.vits.study import SUITES, THREE, Study, load_study

MAHA, MAXL = "Q/mahalanobis/near", "Q/max_logit/near"


def fake_run(told: dict[str, Any]) -> Any:
    return SimpleNamespace(profile="smoke", seed=0, device="cpu", uses=lambda **k: told.update(k))


@pytest.fixture(scope="module")
def study() -> Study:
    told: dict[str, Any] = {}
    found = load_study(fake_run(told), ["cifar"], models="*-s0", n_boot=20)
    assert set(told["weights"]) == set(found.every.index) and told["data"]
    return found


def test_what_is_available_is_compared_by_its_pretraining(study: Study) -> None:
    roles = {row.name: row.role for row in read_pool("cifar")}
    assert list(study.cells.index) == [name for name in study.every.index if not roles[name]]
    assert set(study.plain["head"]) == {"raw"} and set(study.plain["penalty"]) == {0}
    assert "CLIP-like" in set(study.plain["data"]) and "CLIP-like" not in set(study.supervised.data)
    assert study.accuracy == study.plain["accuracy"].median()
    assert not study.averageable and not study.soups_beside_members()


def test_effects_are_those_of_the_pairs(study: Study) -> None:
    assert study.levels["pretraining"] == ["cifar10", "tiny-imagenet"]  # narrow first
    assert study.levels["weight_decay"] == [0.1, 0.5] and "dropout" not in study.levels
    levels, boot = study.levels["weight_decay"], study.boot
    expected = effects.paired_effects(study.plain, "weight_decay", *levels, MAHA, **boot)
    assert study.effect("weight_decay", MAHA) == expected
    more = study.effect("pretraining", MAHA, minus=MAXL)
    levels = study.levels["pretraining"]
    assert more == effects.interaction(study.supervised, "pretraining", *levels, MAHA, MAXL, **boot)

    table = study.effect_table()
    assert len(table) == len(study.levels) * len(THREE) * len(SUITES)
    row = table[(table.factor == "weight_decay") & (table.score == "mahalanobis")].iloc[0]
    assert (row["value"], row["checkpoints"], row["pairs"]) == (expected.value, 2, expected.n)


def test_the_recipe_is_compared_with_all_other_pairs_of_cell_and_score(study: Study) -> None:
    recipe, plain = study.recipe(), study.plain
    assert recipe is not None and recipe.n == len(plain) and not recipe.each
    (follows,) = plain[
        (plain.data == "broad") & (plain.weight_decay == 0.5) & (plain.ft_lr == 0.03)
    ].index
    shares = []
    for suite in SUITES:
        others = plain[[f"Q/{score}/{suite}" for score in THREE]].stack()
        ours = others.pop((follows, f"Q/mahalanobis/{suite}"))
        shares.append((others < ours).mean() + (others == ours).mean() / 2)
    assert recipe.value == pytest.approx(np.mean(shares))
    one_rate = study.every[study.every["ft_lr"] != 0.03]
    assert replace(study, every=one_rate).recipe() is None


def test_a_soup_is_compared_with_the_median_of_its_members(study: Study) -> None:
    roles = ["member"] * (len(study.every) - 1) + ["soup-uniform"]
    measured = [f"Q/{score}/{suite}" for score in THREE for suite in SUITES]
    every = study.every.assign(role=roles)
    every.loc[every.index[-1], measured] = 2.0  # better than all
    found = replace(study, every=every).soups_beside_members()
    assert found["share"].value == found["percentile"].value == 1
    assert found["advantage"].clusters == len(every) - 1


def test_sets_are_averaged_over_the_cells_of_one_pretraining(study: Study) -> None:
    table = study.by_set()
    assert list(table.columns) == ["data", "score", *sorted(study.near)]
    assert set(table["score"]) == set(THREE) and table[list(study.near)].gt(50).all(axis=None)


def test_without_a_model_the_command_that_trains_one_is_named() -> None:
    with pytest.raises(OodlibError, match="train-vit"):
        load_study(fake_run({}), ["cifar"], models="tiny-medium1-*", n_boot=5)
