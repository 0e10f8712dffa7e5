"""A run judges estimates: by short ids, each network too, with a line that says what was found."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from oodlib.claims import Run
from oodlib.errors import OodlibError
from oodlib.metrics import Board, Estimate

RULE = (
    "source: abs, statistic: AUROC, kind: trend, direction: above, margin: 0.5, unit: percent, "
    "counted: images, smallest_n: 10, published: null"
)
CLAIMS = f"""
paper: toy
notebook: 01b_toy
claims:
- {{id: C1, statement: here, {RULE}, profiles: [laptop, paper], paper_setting: [paper]}}
- {{id: C2, statement: there, {RULE}, profiles: [paper], paper_setting: [paper]}}
- {{id: C9, statement: always, source: code, statistic: difference, kind: identity,
   direction: below, margin: 1.0e-9, unit: absolute, counted: rows, smallest_n: 1, published: null,
   profiles: [laptop], paper_setting: []}}
"""
GOOD = Estimate(value=0.9, low=0.8, high=0.95, n=10)
BAD = Estimate(value=0.3, low=0.2, high=0.4, n=12)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data" / "claims").mkdir(parents=True)
    (tmp_path / "data" / "claims" / "toy.yaml").write_text(CLAIMS)
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    monkeypatch.delenv("OODLIB_OUTPUT", raising=False)
    return lambda profile="laptop", notebook="01b_toy": Run(notebook, profile=profile, seed=0)


def test_an_estimate_is_judged_over_all_networks_and_on_each(make, capsys) -> None:
    run = make()
    found = Estimate(value=0.6, low=0.45, high=0.7, n=10, each={"good": GOOD, "bad": BAD})
    verdict = run.judge("C1", found, detail="mean")
    assert capsys.readouterr().out == "C1: 60.00 [45.00, 70.00] percent  ->  inconclusive\n"
    assert verdict is run.verdicts["toy/C1"]
    assert (verdict.network, verdict.detail, verdict.n) == ("good, bad", "mean", 10)
    assert run.judged_networks().to_dict("records") == [
        {"claim": "C1", "network": "good", "measured": "90.00 [80.00, 95.00]", "unit": "percent",
         "verdict": "trend holds"},
        {"claim": "C1", "network": "bad", "measured": "30.00 [20.00, 40.00]", "unit": "percent",
         "verdict": "trend absent"},
    ]  # fmt: skip


def test_reproduced_is_said_where_the_caller_says_so(make) -> None:
    run = make("paper")
    assert run.judge("toy/C1", GOOD).verdict == "trend holds"
    assert run.judge("C1", GOOD, paper_setting=True).verdict == "reproduced"
    assert make("laptop").judge("C1", GOOD, paper_setting=True).verdict == "trend holds"


def test_too_few_or_doubtful_conclude_nothing(make) -> None:
    run = make()
    assert run.judge("C1", GOOD, n=9).verdict == "inconclusive"
    assert run.judge("C1", GOOD, doubt="weak models").reason == "weak models"
    with pytest.raises(OodlibError, match=r"n \(number of images\) is needed"):
        run.judge("C1", Estimate(value=0.9, low=0.8, high=0.95))


def test_an_identity_takes_a_bare_number_and_a_trend_does_not(make, capsys) -> None:
    run = make()
    assert run.judge("C9", np.float64(1e-12), n=5).verdict == "reproduced"
    assert capsys.readouterr().out == "C9: 1e-12 absolute  ->  reproduced\n"
    with pytest.raises(OodlibError, match="low and high are needed"):
        run.judge("C1", 0.9, n=10)


def test_what_the_profile_cannot_judge_keeps_its_measurement(make, capsys) -> None:
    run = make()
    assert not run.judges("C2") and run.judges("C1")
    run.judge("C2", GOOD)
    assert "not testable here (judged at paper)" in capsys.readouterr().out
    assert run.verdicts["toy/C2"].measured == 0.9
    run.absent("C1", "no flow is mature")
    assert run.verdicts["toy/C1"].reason == "no flow is mature"
    other = make()
    other.absent("C2", "no flow is mature")
    assert not other.verdicts  # that it is judged elsewhere says more


def test_unknown_claims_are_named(make) -> None:
    with pytest.raises(OodlibError, match=r"01b_toy has no claim 'C3'. Known: toy/C1, toy/C2"):
        make().rule("C3")
    with pytest.raises(OodlibError, match="Known: none"):
        make(notebook="01a_toy").rule("C1")


def test_a_notebook_without_claims_finishes(make) -> None:
    run = make(notebook="01a_toy")
    run.uses(weights={"net": "3f9c"}, data={"net/id": "a1b2"})
    run.uses(weights={"other": "77"}, data={})
    run.finish()
    assert json.loads((run.folder / "claims.json").read_text()) == []
    provenance = json.loads((run.folder / "provenance.json").read_text())
    assert provenance["weights"] == {"net": "3f9c", "other": "77"}
    assert provenance["data"] == {"net/id": "a1b2"}


def test_a_board_is_written_as_results_tables_and_scores(make) -> None:
    run, rng = make(), np.random.default_rng(0)
    scores = {m: {"id": rng.normal(size=20), "greek": rng.normal(1, 1, 12)} for m in ("msp", "knn")}
    board = Board(
        scores={"net:live": scores},
        group={"net:live": {"greek": "near"}},
        id_name={"net:live": "latin"},
        n_boot=10,
    )
    run.show(board, beside={"ID accuracy": {"net:live": ["90 %", "91 %"]}}, caption="More.")
    rows = run.results()
    pd.testing.assert_frame_equal(
        rows.drop(columns="seed").reset_index(drop=True), board.results(), check_dtype=False
    )
    assert len(rows) == 2 * 2 * 3 and set(rows.seed) == {0}
    table = (run.folder / "auroc_net-live.md").read_text().splitlines()
    assert table[0] == "| method | ID accuracy | greek | average |"
    run.finish()
    stored = pd.read_parquet(run.folder / "scores.parquet")
    assert len(stored) == 2 * (20 + 12) and set(stored["set"]) == {"latin", "greek"}
    contents = json.loads((run.folder / "contents.json").read_text())
    assert [c["name"] for c in contents] == ["auroc_net-live", "fpr95_net-live"]
    assert contents[0]["caption"] == (
        "AUROC in per cent, net:live, ID latin (20 images). Interval: 95 %. More."
    )
