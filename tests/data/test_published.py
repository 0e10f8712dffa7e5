"""The files of published numbers, and the checks that guard them."""

import pytest

from oodlib.data.published import published
from oodlib.errors import OodlibError
from oodlib.workspace import root

FILES = sorted(path.stem for path in (root() / "data" / "published").glob("*.csv"))
HEAD = "source,id_dataset,method,metric,positive_class,value,note\n"


@pytest.mark.parametrize("name", FILES)
def test_files_pass_their_checks(name):
    assert len(published(name)) > 0


def test_gradnorm_s_own_rows():
    table = published("imagenet")
    rows = table[
        (table["table"] == "A")
        & (table["method"] == "GradNorm")
        & (table["ood_dataset"] == "average")
    ]
    assert dict(zip(rows["metric"], rows["value"], strict=True)) == {"FPR95": 54.70, "AUROC": 86.31}
    assert set(rows["positive_class"]) == {"ID"}


def test_printed_averages_of_table_a_are_the_means_of_their_sets():
    table = published("imagenet")
    table = table[table["table"] == "A"]
    sets = table[table["ood_dataset"] != "average"].groupby(["method", "metric"])["value"].mean()
    printed = table[table["ood_dataset"] == "average"].set_index(["method", "metric"])["value"]
    assert ((sets - printed).abs() < 0.0101).all() and len(printed) == 10


def test_unread_numbers_stay_empty_unless_they_carry_a_page():
    table = published("gradnorm_unread")
    filled = table[table["value"].notna()]
    assert filled["note"].str.contains(r"\bp\. ?\d+").all()
    assert {"ablation: norm", "ablation: layers", "ablation: temperature", "CIFAR"} <= set(
        table["table"]
    )


@pytest.fixture(scope="module")
def glow():
    return published("immature_glow")


@pytest.fixture(scope="module")
def cells(glow):
    """AUROC by (batch size, ID, OOD), one column a checkpoint."""
    rows = glow[glow["table"] == "auroc_all_tensors"]
    return rows.pivot(
        index=["batch_size", "id_dataset", "ood_dataset"], columns="checkpoint", values="value"
    )


def test_released_aurocs_of_immature_glow(cells):
    assert cells.shape == (40, 2) and cells.notna().all(axis=None)
    means = cells.groupby("batch_size").mean().round(2)
    assert means.to_dict("index") == {
        "1": {"epoch_1": 77.21, "epoch_10": 81.75},
        "5": {"epoch_1": 94.32, "epoch_10": 97.00},
    }


@pytest.mark.parametrize("batch_size, better, worse, ties", [("1", 13, 7, 0), ("5", 12, 4, 4)])
def test_signs_between_epochs_1_and_10(cells, batch_size, better, worse, ties):
    change = cells.loc[batch_size, "epoch_10"] - cells.loc[batch_size, "epoch_1"]
    assert ((change > 0).sum(), (change < 0).sum(), (change == 0).sum()) == (better, worse, ties)


def test_steps_of_the_checkpoints(glow):
    steps = glow[glow["metric"] == "optimizer_steps"].pivot(
        index="id_dataset", columns="checkpoint", values="value"
    )
    assert len(steps) == 5
    assert (steps["epoch_10"] == 10 * steps["epoch_1"]).all() and (
        steps["epoch_250"] == 250 * steps["epoch_1"]
    ).all()
    noted = glow[glow["note"].str.contains("step=") & (glow["table"] == "auroc_all_tensors")]
    said = noted["note"].str.extract(r"step=(\d+)")[0].astype(float)
    ours = [steps.loc[row.id_dataset, row.checkpoint] for row in noted.itertuples()]
    assert len(said) == 80 and (said == ours).all()


def test_units_of_immature_glow(glow):
    assert len(glow) == 402
    assert set(zip(glow["metric"], glow["unit"], glow["positive_class"], strict=True)) == {
        ("AUROC", "%", "OOD"),
        ("bits_per_dim", "bits/dim", "none"),
        ("optimizer_steps", "steps", "none"),
    }
    mature = glow[glow["table"] == "auroc_mature"].set_index(["id_dataset", "batch_size"])["value"]
    assert mature.to_dict() == {("cifar10", "5"): 98.54, ("svhn", "1"): 93.11, ("svhn", "5"): 99.94}


@pytest.mark.parametrize(
    "row, reason",
    [
        ("AUROC,OOD,101,%", "outside [0, 100]"),
        ("bpd,none,-1,bits/dim", "is negative"),
        ("AUROC,OOD,0.9,fraction", "the unit is none of %, bits/dim, steps, count, ratio"),
    ],
)
def test_numbers_that_do_not_fit_their_unit(tmp_path, row, reason):
    head = "source,id_dataset,method,metric,positive_class,value,unit,note\n"
    (tmp_path / "x.csv").write_text(f"{head}a,i,m,steps,none,7000,steps,\na,i,m,{row},\n")
    with pytest.raises(OodlibError) as caught:
        published("x", folder=tmp_path)
    assert reason in str(caught.value) and "line 3" in str(caught.value)


@pytest.mark.parametrize(
    "row, reason",
    [
        ("a,i,m,AUROC,ID,101,", "outside [0, 100]"),
        ("a,i,m,AUROC,ID,x,", "not a number"),
        (",i,m,AUROC,ID,50,", "source is missing"),
        ("a,i,m,AUROC,ID,,", "needs a note"),
        ("a,i,m,AUROC,both,50,", "positive_class"),
        ("a,i,m,AUROC,ID,50,\na,i,m,AUROC,ID,51,", "same key"),
    ],
)
def test_bad_rows_are_refused(tmp_path, row, reason):
    (tmp_path / "x.csv").write_text(HEAD + row + "\n")
    with pytest.raises(OodlibError) as caught:
        published("x", folder=tmp_path)
    assert reason in str(caught.value) and "x.csv, line" in str(caught.value)


def test_missing_file_and_columns(tmp_path):
    with pytest.raises(OodlibError, match="no such file"):
        published("none", folder=tmp_path)
    (tmp_path / "x.csv").write_text("source,value\na,1\n")
    with pytest.raises(OodlibError, match=r"columns .* are missing"):
        published("x", folder=tmp_path)
