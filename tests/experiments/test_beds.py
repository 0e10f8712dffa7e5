"""Loading the test beds of a run, and what the old helpers of notebooks still give."""

import numpy as np
import pytest
from test_testbed import tiny  # noqa: F401  a fixture

from oodlib import OodlibError, create
from oodlib.claims import Run
from oodlib.experiments import Beds, beds, load, mean_metric, score
from oodlib.metrics import auroc


@pytest.fixture
def loaded(tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.delenv("OODLIB_OUTPUT", raising=False)
    bed = tiny()
    monkeypatch.setattr(beds, "testbed", lambda name, **options: bed)
    run = Run("01a_toy", profile="laptop", seed=2)
    found = load(run, ["latin_fast:live"], n_test=40)
    return run, found, capsys.readouterr().out


def test_a_run_loads_scores_and_compares(loaded):
    run, found, out = loaded
    bed, methods = found.first, ["msp", "energy", "knn"]
    assert found["latin_fast:live"] is bed and found.seed == 2
    assert "ID latin: accuracy" in out and "40 test images, 52 training images" in out
    assert "OOD sets: greek (near, 10)" in out
    with pytest.raises(OodlibError, match="no test bed"):
        _ = Beds().first
    thin = found.thinned(6)
    assert len(thin.first.test) == 6 and thin.seed == 2
    assert list(thin.on(bed.network)) == [bed.network] and thin.on().seed == 2

    board = found.score(
        lambda bed: {m: create(m, **({"k": 5} if m == "knn" else {})) for m in methods}, n_boot=10
    )
    assert board.seed == 2 and board.id_name == {bed.network: "latin"}
    assert board.group[bed.network] == bed.group and board.methods == methods
    by_hand = score(bed, ["msp", "energy"])
    np.testing.assert_array_equal(
        board.scores[bed.network]["msp"]["greek"], by_hand["msp"]["greek"]
    )
    assert board.value("msp") == mean_metric(by_hand["msp"])
    assert mean_metric(by_hand["msp"]) == np.mean(
        [auroc(by_hand["msp"]["id"], by_hand["msp"][k]) for k in bed.ood]
    )
    run.finish()
    text = (run.folder / "provenance.json").read_text()
    assert bed.provenance["sha256"] in text and bed.fingerprints["greek"] in text
