"""A run's results: one row per measurement, as it was handed over."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oodlib.claims import Run
from oodlib.claims.run import RESULT_COLUMNS, RESULT_KEY
from oodlib.errors import OodlibError
from oodlib.metrics import Board
from oodlib.workspace import root

ROW: dict[str, Any] = {
    "model": "net",
    "id": "a",
    "ood": "b",
    "group": "near",
    "method": "msp",
    "variant": "x",
    "metric": "fpr95",
    "positive": "id",
    "value": 0.5,
    "low": 0.4,
    "high": 0.6,
    "n_id": 7,
    "n_ood": 8,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    monkeypatch.delenv("OODLIB_OUTPUT", raising=False)
    return Run("01_toy", profile="laptop", seed=3)


def test_a_row_holds_what_was_handed_over(run: Run) -> None:
    run.result(**ROW)
    run.result(**{**ROW, "seed": 4})
    assert run.results().to_dict("records") == [{**ROW, "seed": 3}, {**ROW, "seed": 4}]
    assert tuple(run.results()) == RESULT_COLUMNS


@pytest.mark.parametrize("change", [{}, {"value": 0.7}, {"seed": 3}, {"low": None, "n_id": None}])
def test_a_second_result_under_one_key_is_refused(run: Run, change: dict[str, Any]) -> None:
    run.result(**ROW)
    with pytest.raises(
        OodlibError, match=r"a result of model 'net', seed '3', id 'a', .*variant 'x'.* already"
    ):
        run.result(**{**ROW, **change})
    assert len(run.results()) == 1


@pytest.mark.parametrize("column", RESULT_KEY)
def test_each_column_of_the_key_tells_results_apart(run: Run, column: str) -> None:
    run.result(**ROW)
    run.result(**{**ROW, column: 9 if column == "seed" else "another"})
    assert len(run.results()) == 2


def test_averages_of_settings_are_rows_without_intervals(run: Run) -> None:
    scores = {
        f"T={t}": {"id": np.arange(4.0), "near": np.arange(4.0) + t, "far": np.arange(4.0) + 9}
        for t in (0, 9)
    }
    board = Board(scores={"net": scores}, id_name={"net": "latin"})
    assert run.averages(board, method="gradnorm").loc["net"].tolist() == [75.0, 100.0]
    rows = run.results()
    assert rows.variant.tolist() == ["T=0", "T=9"] and rows.value.tolist() == [0.75, 1.0]
    assert set(rows.ood) == {"average"} and set(rows.id) == {"latin"} and rows.low.isna().all()


@pytest.mark.parametrize(
    "path",
    sorted((root() / "figures" / "reference").glob("*/*/results.csv")),
    ids=lambda path: "/".join(path.parts[-3:-1]),
)
def test_no_committed_result_stands_twice(path: Path) -> None:
    with open(path, newline="", encoding="utf-8") as file:
        keys = [tuple(row[column] for column in RESULT_KEY) for row in csv.DictReader(file)]
    assert keys and len(set(keys)) == len(keys)
