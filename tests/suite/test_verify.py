"""A fresh run against the committed references: row for row, and what the references may weigh."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oodlib.claims.run import RESULT_COLUMNS
from oodlib.errors import OodlibError
from oodlib.suite.verify import compare_runs, update_reference
from oodlib.workspace import STAMP

ROWS = {"auroc": 0.75, "fpr95": 0.4}  # metric -> value


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "figures" / "reference").mkdir(parents=True)
    (tmp_path / "figures" / "reference" / "tolerances.yaml").write_text(
        "{default: 0.02, fpr95: 0.05}\n"
    )
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    write_run(tmp_path)
    return tmp_path


def write_run(root: Path, rows: dict[str, float] = ROWS, verdict: str = "trend holds") -> Path:
    """A finished run of one notebook; returns its folder."""
    folder = root / "figures" / "laptop" / "01_toy"
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    table = csv.DictWriter(text, RESULT_COLUMNS, lineterminator="\n")
    table.writeheader()
    for metric, value in rows.items():
        table.writerow(
            {"model": "net", "seed": 3, "id": "a", "ood": "b", "metric": metric, "value": value}
        )
    (folder / "results.csv").write_text(text.getvalue())
    (folder / "claims.json").write_text(json.dumps([{"id": "toy/C1", "verdict": verdict}]))
    (folder / STAMP).write_text("key")
    return folder


def differences(root: Path) -> list[str]:
    return compare_runs("laptop", root / "figures" / "laptop", ["01_toy"])


def add_row(folder: Path, metric: str, value: float) -> None:
    with (folder / "results.csv").open("a") as file:
        file.write(f"net,3,a,b,,,,{metric},,{value},,,,\n")


def test_what_is_within_the_tolerance_is_no_difference(root: Path) -> None:
    update_reference("laptop")
    assert differences(root) == []
    write_run(root, {"auroc": 0.76, "fpr95": 0.44})
    assert differences(root) == []


def test_each_difference_is_told(root: Path) -> None:
    update_reference("laptop")
    folder = write_run(root, {"auroc": 0.72, "fpr95": 0.46}, verdict="inconclusive")
    assert differences(root) == [
        "01_toy: net 3 a b auroc: 0.7200, reference 0.7500, tolerance 0.02",
        "01_toy: net 3 a b fpr95: 0.4600, reference 0.4000, tolerance 0.05",
        "01_toy: verdict of toy/C1: inconclusive, reference trend holds",
    ]
    write_run(root)
    add_row(folder, "aupr", 0.5)
    assert differences(root) == [
        "01_toy: 3 rows, reference 2",
        "01_toy: row not in the reference: net 3 a b aupr",
    ]
    write_run(root, {"auroc": 0.75})
    assert differences(root) == [
        "01_toy: 1 rows, reference 2",
        "01_toy: row missing: net 3 a b fpr95",
    ]


def test_a_value_that_is_no_number_is_a_difference(root: Path) -> None:
    update_reference("laptop")
    write_run(root, {**ROWS, "auroc": float("nan")})
    assert differences(root) == ["01_toy: net 3 a b auroc: nan, reference 0.7500, tolerance 0.02"]


def test_ends_of_intervals_are_compared_too(root: Path) -> None:
    folder = root / "figures" / "laptop" / "01_toy"
    row = "net,3,a,b,,,,aupr,,0.5,{low},{high},,\n"
    with (folder / "results.csv").open("a") as file:
        file.write(row.format(low=0.4, high=0.6))
    update_reference("laptop")
    write_run(root)
    with (folder / "results.csv").open("a") as file:
        file.write(row.format(low=0.45, high=""))
    assert differences(root) == [
        "01_toy: net 3 a b aupr low: 0.4500, reference 0.4000, tolerance 0.02",
        "01_toy: net 3 a b aupr high: nan, reference 0.6000, tolerance 0.02",
    ]


def test_a_key_in_two_rows_is_a_difference_on_either_side(root: Path) -> None:
    folder = root / "figures" / "laptop" / "01_toy"
    update_reference("laptop")
    add_row(folder, "auroc", 0.75)
    assert differences(root) == [
        "01_toy: 3 rows, reference 2",
        "01_toy: 2 rows of the run have one key: net 3 a b auroc",
    ]
    update_reference("laptop")
    write_run(root)
    assert differences(root) == [
        "01_toy: 2 rows, reference 3",
        "01_toy: 2 rows of the reference have one key: net 3 a b auroc",
    ]


def test_the_first_of_two_rows_is_compared_too(root: Path) -> None:
    folder = root / "figures" / "laptop" / "01_toy"
    add_row(folder, "auroc", 0.75)
    update_reference("laptop")
    write_run(root, {**ROWS, "auroc": 0.1})
    add_row(folder, "auroc", 0.75)
    assert "01_toy: net 3 a b auroc: 0.1000, reference 0.7500, tolerance 0.02" in differences(root)


def test_without_a_reference(root: Path) -> None:
    with pytest.raises(OodlibError, match="No reference results"):
        differences(root)


def test_references_have_a_size_limit(root: Path) -> None:
    other = root / "figures" / "reference" / "benchmark" / "01_toy"
    other.mkdir(parents=True)
    (other / "big.md").write_bytes(bytes(7_000_000))  # the limit is on all references together
    (root / "figures" / "laptop" / "01_toy" / "big.md").write_bytes(bytes(6_900_000))
    assert update_reference("laptop") == ["01_toy"]
    (root / "figures" / "laptop" / "01_toy" / "big.md").write_bytes(bytes(7_100_000))
    with pytest.raises(OodlibError, match=r"would take 14\.1 MB, the limit is 14"):
        update_reference("laptop")
    assert (
        root / "figures" / "reference" / "laptop" / "01_toy" / "big.md"
    ).stat().st_size == 6_900_000


@pytest.mark.parametrize("picture", ["plot", "photograph"])
def test_a_palette_is_taken_only_where_it_cannot_be_seen(root: Path, picture: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((200, 300, 3), 255)
    if picture == "photograph":
        pixels = rng.integers(0, 256, pixels.shape)
    else:  # more than 256 colours, many of them alike
        pixels[:150, :, 0] = np.linspace(0, 255, 300)
        pixels[:150, :, 1] = np.linspace(255, 0, 150)[:, None] // 64 * 64
    path = root / "figures" / "laptop" / "01_toy" / "line.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    update_reference("laptop")
    with Image.open(root / "figures" / "reference" / "laptop" / "01_toy" / "line.png") as saved:
        found = np.asarray(saved.convert("RGB")).astype(int)
        assert saved.mode == ("RGB" if picture == "photograph" else "P")
    step = np.abs(found - pixels)
    assert step.max() <= 16 and step.mean() <= 1.5 and (picture != "photograph" or step.max() == 0)
