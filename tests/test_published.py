"""The files of published numbers, and the checks that guard them."""

import pytest

from oodlib.data.prepare import PROJECT
from oodlib.data.published import published
from oodlib.errors import OodlibError

FILES = sorted(path.stem for path in (PROJECT / "data" / "published").glob("*.csv"))
HEAD = "source,id_dataset,method,metric,positive_class,value,note\n"


@pytest.mark.parametrize("name", FILES)
def test_files_pass_their_checks(name):
    assert len(published(name)) > 0


def test_gradnorm_s_own_rows():
    table = published("imagenet")
    rows = table[(table["table"] == "A") & (table["method"] == "GradNorm") & (table["ood_dataset"] == "average")]
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
    assert {"ablation: norm", "ablation: layers", "ablation: temperature", "CIFAR"} <= set(table["table"])


@pytest.mark.parametrize("row, reason", [
    ("a,i,m,AUROC,ID,101,", "outside [0, 100]"), ("a,i,m,AUROC,ID,x,", "not a number"),
    (",i,m,AUROC,ID,50,", "source is missing"), ("a,i,m,AUROC,ID,,", "needs a note"),
    ("a,i,m,AUROC,both,50,", "positive_class"), ("a,i,m,AUROC,ID,50,\na,i,m,AUROC,ID,51,", "same key")])
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
