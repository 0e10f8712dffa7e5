"""What is kept of the small pools' models: shipped scores say the same as the original ones, or
nothing.
"""

import json
import os
import re
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from oodlib import __main__
from oodlib.errors import OodlibError
from oodlib.files import write_json
from oodlib.metrics import auroc, fpr_at_tpr
from oodlib.studies.vits.measures import averaged, summary
from oodlib.studies.vits.pool_table import PoolRow, write_pool
from oodlib.studies.vits.recipes import finetune_recipe, made_folder, pretrained_path
from oodlib.studies.vits.stored import STORED, pool_models, ranked, ship

CELL = PoolRow(
    name="cell",
    network="vit_conv_64",
    weights="",
    pretraining="cifar10",
    objective="sigmoid",
    aug="none",
    weight_decay=0.1,
    dropout=0.0,
    stochastic_depth=0.0,
    ft_lr=0.1,
    resolution=32,
)
OTHER = replace(CELL, name="other", pretraining="tiny-imagenet")
START = replace(CELL, name="start", ft_lr=None, role="pretrained")
ROWS = (CELL, OTHER, START)
SETS = {"val": 40, "id": 120, "cifar100-seen": 60, "unit_tests": 34}
CONSTANT = ("msp", "max_logit", "energy", "vim", "gradnorm")


def table(seed, sizes=SETS, constant=()):
    """Scores as a model gives them: float32, of any scale, with ties, and some that overflowed."""
    rng = np.random.default_rng(seed)
    parts = [
        pd.DataFrame(
            {
                "set": name,
                "index": np.arange(n),
                "label": np.arange(n) % (17 if name == "unit_tests" else 10),
            }
        )
        for name, n in sizes.items()
    ]
    keys = pd.concat(parts, ignore_index=True)
    shift = np.where(keys["set"].isin(["val", "id"]), 0.0, 1.0)
    scores = {
        name: np.exp(np.round(rng.normal(shift), 2) * (i + 1)).astype(np.float32)
        for i, name in enumerate(STORED)
    }
    scores["knn"][-5:], scores["msp"][:3] = np.inf, -np.inf
    return keys.assign(
        **scores | {name: np.float32(0) for name in constant}, gradnorm_v=np.float32(1)
    )


def record(row, sizes=SETS):
    history = [
        {"step": 1, "loss": 2.34567, "seconds": 1.0},
        {"step": 2, "loss": 1.0, "seconds": 2.52},
    ]
    trained = {"recipe": asdict(finetune_recipe(row)), "history": history} if not row.role else {}
    return {
        "row": asdict(row),
        "accuracy": 0.8,
        "geometry": {"norm_mean": 2.0},
        "norm_correlation": {"msp": None},
        "sha256": "0" * 64,
        "sets": {name: {"n": n, "fingerprint": "f"} for name, n in sizes.items()},
        **trained,
    }


def train(row, tables, seed, **options):
    """Leave what `train_row` leaves of a row."""
    pretrained_path(row).parent.mkdir(parents=True, exist_ok=True)
    write_json(
        pretrained_path(row).with_suffix(".json"),
        {"checkpoint": row.checkpoint, "history": [{"step": 1, "loss": 3.0, "seconds": 9.0}]},
    )
    made_folder(row).mkdir(parents=True)
    tables[row.name] = table(seed, constant=CONSTANT if row.role else (), **options)
    tables[row.name].to_parquet(made_folder(row) / "scores.parquet")
    write_json(made_folder(row) / "run.json", record(row, **options))


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Row name -> original scores, of a pool of three rows whose third is not trained yet."""
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    write_pool(tmp_path / "data" / "pools" / "cifar.csv", ROWS)
    tables = {}
    train(CELL, tables, 0)
    train(START, tables, 1)
    return tables


@pytest.fixture
def shipped(tables, tmp_path):
    """The same, shipped, with nothing else left; the folder of what is shipped."""
    folder = ship("cifar")
    (tmp_path / "data" / "training").rename(tmp_path / "elsewhere")
    return folder


def test_models_come_in_the_order_of_the_pool_and_missing_ones_with_their_command(shipped):
    models = pool_models("cifar")
    assert [m.row for m in models] == [CELL, START]
    assert models.missing == {"other": "python -m oodlib train-vit --pool cifar --models other"}
    assert [m.row for m in pool_models("cifar", rows=[START])] == [START]


def test_a_clean_clone_gives_what_the_machine_that_trained_gives(tables, tmp_path):
    ship("cifar")
    here = pool_models("cifar")
    (tmp_path / "data" / "training").rename(tmp_path / "elsewhere")
    for own, other in zip(here, pool_models("cifar"), strict=True):
        assert own.row == other.row and own.record == other.record
        pd.testing.assert_frame_equal(own.table, other.table)


def test_the_record_keeps_what_the_study_asks_for(shipped):
    cell, start = pool_models("cifar")
    assert cell.record["losses"] == [2.3457, 1.0] and cell.record["seconds"] == 2.5
    assert cell.record["recipe"]["lr"] == 0.1 and "recipe" not in start.record
    assert cell.record["pretraining"] == {
        "checkpoint": CELL.checkpoint,
        "losses": [3.0],
        "seconds": 9.0,
    }
    assert cell.record["sets"]["id"] == {"n": 120, "fingerprint": "f"}


@pytest.mark.parametrize("score", STORED)
def test_auroc_and_fpr_are_those_of_the_original_scores(tables, shipped, score):
    for model in pool_models("cifar"):
        before, after = tables[model.row.name], model.table
        for ood in ("cifar100-seen", "unit_tests"):
            a, b = (
                [t.loc[t["set"] == name, score].to_numpy() for name in ("id", ood)]
                for t in (before, after)
            )
            assert auroc(*a) == auroc(*b)
            assert fpr_at_tpr(*a, positive="id") == fpr_at_tpr(*b, positive="id")


def test_summaries_and_averages_on_ranks_are_those_of_the_original_scores(tables, shipped):
    after = {model.row.name: model.table for model in pool_models("cifar")}
    for name, found in after.items():
        pd.testing.assert_frame_equal(
            summary(found, near=["cifar100-seen"]), summary(tables[name], near=["cifar100-seen"])
        )
    for score in ("mahalanobis", "knn"):
        pd.testing.assert_frame_equal(
            averaged(after, score, scale="rank"), averaged(tables, score, scale="rank")
        )


def test_ranks_keep_ties_and_infinities(tables):
    original = tables["cell"].assign(
        msp=[np.inf, 2.0, 2.0, -np.inf, *[3.0] * (sum(SETS.values()) - 4)]
    )
    assert ranked(original)["msp"].head(5).tolist() == [3, 1, 1, 0, 2]
    assert "gradnorm_v" not in ranked(original)
    with pytest.raises(OodlibError, match="vim holds NaN"):
        ranked(original.assign(vim=np.nan))


def test_what_was_shipped_stays_and_what_is_trained_here_comes_first(shipped, tables):
    train(OTHER, tables, 2)
    train(CELL, tables, 3)
    ship("cifar")
    assert [m.row.name for m in pool_models("cifar")] == ["cell", "other", "start"]
    pd.testing.assert_frame_equal(pool_models("cifar")[0].table, ranked(tables["cell"]))


def test_a_row_that_was_changed_is_not_the_one_that_was_shipped(shipped, tmp_path):
    write_pool(tmp_path / "data" / "pools" / "cifar.csv", [replace(CELL, ft_lr=0.2), START])
    models = pool_models("cifar")
    assert [m.row.name for m in models] == ["start"] and list(models.missing) == ["cell"]


def test_models_scored_on_other_images_are_refused(shipped, tables):
    train(OTHER, tables, 2, sizes={**SETS, "id": 119})
    with pytest.raises(
        OodlibError, match=r"other was scored on other images than cell.*--models other"
    ):
        pool_models("cifar")


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("scores.parquet", flipped),
        ("scores.parquet", os.remove),
        ("runs.json", os.remove),
        ("runs.json", lambda path: path.write_text(path.read_text()[:-100])),
        ("runs.json", lambda path: path.write_text("[]")),
        (
            "runs.json",
            lambda path: write_json(path, {**json.loads(path.read_text()), "pretraining": {}}),
        ),
    ],
)
def test_a_damaged_file_is_one_clear_error(shipped, name, damage):
    damage(shipped / name)
    with pytest.raises(
        OodlibError,
        match=rf"vits_cifar.{re.escape(name)} is (missing|damaged).* Restore the folder",
    ):
        pool_models("cifar")


def test_a_damaged_folder_of_a_trained_row_is_named_with_its_command(tables):
    (made_folder(CELL) / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        OodlibError, match=r"vits_cifar.cell.scores.parquet is missing.*--models cell"
    ):
        pool_models("cifar")


def test_nothing_to_ship_leaves_the_shipped_files_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    write_pool(tmp_path / "data" / "pools" / "cifar.csv", ROWS)
    with pytest.raises(OodlibError, match="every model of the pool cifar is missing"):
        ship("cifar")
    assert not [path for path in (tmp_path / "data").rglob("*") if "vits" in path.name]


def test_a_large_pool_fits_the_repository(tmp_path, monkeypatch):
    """46 models, 3,456 images, 12 scores with hardly a tie: what is shipped stays within 2.8 MB."""
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    rows = [replace(CELL, name=f"tiny-imagenet-wd0.5-ft0.{i}") for i in range(46)]
    write_pool(tmp_path / "data" / "pools" / "cifar.csv", rows)
    sizes = {
        "val": 200,
        "id": 1200,
        "ood_val": 200,
        "cifar100-seen": 588,
        "cifar100-unseen": 588,
        "unit_tests": 680,
    }
    tables, rng = {}, np.random.default_rng(0)
    for row in rows:
        train(row, tables, 0, sizes=sizes)
        scores = {name: rng.random(sum(sizes.values()), dtype=np.float32) for name in STORED}
        tables[row.name].assign(**scores).to_parquet(made_folder(row) / "scores.parquet")
    size = sum(path.stat().st_size for path in ship("cifar").iterdir())
    assert 2.0e6 < size < 2.8e6


def test_the_command_ships_without_training(tables, tmp_path, capsys):
    assert __main__.main(["train-vit", "--pool", "cifar", "--ship"]) == 0
    folder = tmp_path / "data" / "checkpoints" / "vits_cifar"
    assert str(folder) in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["runs.json", "scores.parquet"]
    assert not made_folder(OTHER).exists()


def test_of_the_embedded_pool_checkpoints_are_shipped_where_rows_are_finetuned_on_the_spot(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    live = replace(CELL, pretraining="latin")
    other = replace(live, name="other", weight_decay=0.5)
    write_pool(
        tmp_path / "data" / "pools" / "embedded.csv",
        [live, replace(live, name="low", ft_lr=0.03), other],
    )
    train(other, {}, 0)
    with pytest.raises(
        OodlibError, match=rf"ship: {re.escape(live.checkpoint)}\.safetensors .* is missing"
    ):
        ship("embedded")
    path = pretrained_path(live)
    path.write_bytes(b"weights")
    write_json(path.with_suffix(".json"), {})
    folder = ship("embedded")
    assert sorted(p.name for p in folder.iterdir()) == [
        "runs.json",
        "scores.parquet",
        *(path.with_suffix(suffix).name for suffix in (".json", ".safetensors")),
    ]
    assert pretrained_path(live) == folder / path.name
    assert list(json.loads((folder / "runs.json").read_text())["models"]) == ["other"]
