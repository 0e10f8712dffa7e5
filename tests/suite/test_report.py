"""What a run leaves, and the report made of it."""

import csv
import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

from oodlib.claims import Run
from oodlib.claims.run import RESULT_COLUMNS, markdown_table
from oodlib.errors import OodlibError
from oodlib.metrics import Estimate
from oodlib.suite.report import build_report, collect, verdict_lines
from oodlib.suite.verify import update_reference
from oodlib.workspace import STAMP

matplotlib.use("agg")
CLAIMS = """
paper: toy
notebook: 01_toy
claims:
- {id: C1, statement: "A < B & C", source: abs, statistic: AUROC, kind: trend, direction: above,
   margin: 0.5, unit: percent, counted: images, smallest_n: 10, profiles: [laptop],
   paper_setting: [], published: {value: 0.9, source: abstract}}
- {id: C2, statement: only there, source: 2nd, statistic: AUROC, kind: trend, direction: above,
   margin: 0.5, unit: percent, counted: images, smallest_n: 10, profiles: [paper],
   paper_setting: [paper], published: null}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data" / "claims").mkdir(parents=True)
    (tmp_path / "data" / "claims" / "toy.yaml").write_text(CLAIMS)
    (tmp_path / "figures" / "reference").mkdir(parents=True)
    (tmp_path / "figures" / "reference" / "tolerances.yaml").write_text(
        "{default: 0.02, fpr95: 0.05}\n"
    )
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    monkeypatch.delenv("OODLIB_OUTPUT", raising=False)
    return tmp_path


def toy_run(auroc: float = 0.75, *, fpr: float = 0.4, low: float = 0.7) -> Run:
    from matplotlib.figure import Figure

    run = Run("01_toy", profile="laptop", seed=3)
    figure = Figure()
    figure.subplots().plot([1, 2, 3], label="line")
    run.figure(figure, "line", caption="A <line>")
    run.table(
        pd.DataFrame({"set|a": ["x_1"], "AUROC": [75.0], "n": [3]}), "main", caption="50 % of it"
    )
    run.result(
        model="net",
        id="a",
        ood="b",
        group="near",
        method="msp",
        metric="auroc",
        value=auroc,
        low=low,
        high=0.8,
        n_id=10,
        n_ood=20,
    )
    run.result(
        model="net",
        id="a",
        ood="b",
        group="near",
        method="msp",
        metric="fpr95",
        positive="id",
        value=fpr,
    )
    run.scores(model="net", set="b", split="test", method="msp", values=np.arange(4.0))
    measured = Estimate(value=auroc, low=low, high=0.8)
    run.judge("C1", measured, n=10, network="toy net", paper_setting=True)
    run.uses(weights={"net": "abc"}, data={"a": "def"})
    run.finish()
    (run.folder / STAMP).write_text("key")
    return run


def test_files_of_a_run(root: Path) -> None:
    folder = toy_run().folder
    assert folder == root / "figures" / "laptop" / "01_toy"
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == RESULT_COLUMNS
    assert (rows[0]["value"], rows[0]["seed"], rows[0]["n_ood"], rows[1]["low"]) == (
        "0.75",
        "3",
        "20",
        "",
    )
    records = {record["id"]: record for record in json.loads((folder / "claims.json").read_text())}
    assert records["toy/C1"]["verdict"] == "trend holds"
    assert (
        records["toy/C2"]["verdict"] == "not testable here"
        and records["toy/C2"]["measured"] is None
    )
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["weights"] == {"net": "abc"} and provenance["peak_memory_mib"] > 0
    assert len(pd.read_parquet(folder / "scores.parquet")) == 4


def test_bytes_repeat(root: Path) -> None:
    def state(folder: Path) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes()
            for path in folder.iterdir()
            if path.name != "provenance.json"
        }

    first = state(toy_run().folder)
    assert state(toy_run().folder) == first
    report = build_report("laptop").read_bytes()
    assert build_report("laptop").read_bytes() == report


def test_a_forgotten_claim_is_an_error_in_a_headless_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OODLIB_OUTPUT", str(root / "elsewhere"))
    run = Run("01_toy", profile="laptop", seed=0)
    assert list(run.claim_table()["verdict"]) == ["not judged yet", "not testable here"]
    with pytest.raises(OodlibError, match="toy/C1 must be judged at laptop"):
        run.finish()
    with pytest.raises(OodlibError, match="no claim 'toy/C9'"):
        run.judge("toy/C9", 1.0)


def test_a_claim_is_judged_over_all_networks_and_on_each(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run("01_toy", profile="laptop", seed=0)
    each = {
        "good": Estimate(value=0.9, low=0.8, high=0.95),
        "bad": Estimate(value=0.3, low=0.2, high=0.4),
    }
    pooled = Estimate(value=0.6, low=0.45, high=0.7, each=each)
    run.judge("C1", pooled, n=10, detail="mean")
    rows = run.judged_networks()[["claim", "network", "measured", "unit", "verdict"]]
    assert list(rows.itertuples(index=False, name=None)) == [
        ("C1", "good", "90.00 [80.00, 95.00]", "percent", "trend holds"),
        ("C1", "bad", "30.00 [20.00, 40.00]", "percent", "trend absent"),
    ]
    verdict = run.verdicts["toy/C1"]
    assert (verdict.verdict, verdict.network, verdict.detail) == (
        "inconclusive",
        "good, bad",
        "mean",
    )
    assert capsys.readouterr().out == "C1: 60.00 [45.00, 70.00] percent  ->  inconclusive\n"


def test_by_hand_a_cell_may_be_left_out(root: Path) -> None:
    run = Run("01_toy", profile="laptop", seed=0)
    run.finish()
    assert run.claim_table()["reason"][0] == "the cell that judges it was not run"


def test_a_run_by_hand_invalidates_the_headless_one(root: Path) -> None:
    folder = toy_run().folder
    Run("01_toy", profile="laptop", seed=0)
    assert not (folder / STAMP).exists()


def test_the_output_folder_comes_from_the_environment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OODLIB_OUTPUT", str(root / "elsewhere"))
    assert Run("01_toy", profile="laptop", seed=0).folder == root / "elsewhere"


@pytest.mark.parametrize("name", ["a b", "../x", ""])
def test_a_bad_figure_name_is_refused(root: Path, name: str) -> None:
    with pytest.raises(OodlibError, match=r"Run\.table: a name"):
        Run("01_toy", profile="laptop", seed=0).table(pd.DataFrame(), name)


def test_a_result_that_is_not_finite_is_refused(root: Path) -> None:
    with pytest.raises(OodlibError, match="finite"):
        Run("01_toy", profile="laptop", seed=0).result(
            model="m", id="a", ood="b", method="msp", metric="auroc", value=float("nan")
        )


def test_markdown_table() -> None:
    table = pd.DataFrame({"a|b": ["x|y", None], "v": [1.234, np.nan]})
    assert markdown_table(table) == "| a\\|b | v |\n|---|---:|\n| x\\|y | 1.23 |\n|  |  |\n"


def test_the_report_is_complete_and_self_contained(root: Path) -> None:
    toy_run()
    text = build_report("laptop").read_text()
    for expected in (
        "trend holds",
        "75.00 [70.00, 80.00]",
        "90.00",
        "A &lt; B &amp; C",
        "A &lt;line&gt;",
        "toy net",
        "data:image/png;base64,",
        "set|a",
        "not testable here",
        "abc",
    ):
        assert expected in text
    assert "http" not in text and "<script" not in text
    markdown = (root / "figures" / "laptop" / "REPORT.md").read_text()
    assert "![line](01_toy/line.png)" in markdown and "trend holds" in markdown
    assert "toy/C1  trend holds        75.00 [70.00, 80.00]  90.00" in verdict_lines(
        collect("laptop")
    )


def test_no_report_without_a_run(root: Path) -> None:
    with pytest.raises(OodlibError, match="make reproduce PROFILE=smoke"):
        build_report("smoke")


def test_references_stand_in_for_runs(root: Path) -> None:
    folder = toy_run().folder
    assert update_reference("laptop") == ["01_toy"]
    kept = {path.name for path in (root / "figures" / "reference" / "laptop" / "01_toy").iterdir()}
    assert {"results.csv", "claims.json", "provenance.json", "line.png", "main.md"} <= kept
    assert not kept & {"line.pdf", "scores.parquet", STAMP}
    (folder / STAMP).unlink()
    assert [entry.reference for entry in collect()] == [True]
