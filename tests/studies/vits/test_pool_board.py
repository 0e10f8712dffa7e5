"""Models of a shipped pool as a board: the stored scores, and who was pretrained on what."""

import pytest

from oodlib import OodlibError
from oodlib.claims import Run
from oodlib.metrics import auroc
from oodlib.studies.vits.pool_board import pool_board, pretraining_kind

SHOWN = {"U": "gradnorm_u", "MSP": "msp"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("OODLIB_OUTPUT", str(tmp_path))
    return Run("01b_gradnorm", profile="laptop", seed=0)


def test_the_board_holds_the_stored_scores(run, monkeypatch):
    told = {}
    monkeypatch.setattr(run, "uses", told.update)
    models, board = pool_board(run, "cifar", ["id-ft0.1-s*", "clip-ft0.1-s0"], SHOWN, n_boot=5)
    assert board.networks == [m.row.name for m in models]
    kinds = pretraining_kind(models, "cifar")
    assert kinds["clip-ft0.1-s0"] == "CLIP-like" and kinds["id-ft0.1-s1"] == "narrow"
    table = models[0].table
    ids, oods = (table[table.set == k].gradnorm_u for k in ("id", "unit_tests"))
    (value,), _ = board.only("unit_tests").by_set()[board.networks[0]]["U"]
    assert value == auroc(ids, oods)
    assert set(board.group[board.networks[0]].values()) == {"near", "far"}
    assert list(told["weights"]) == ["3 ViTs of cifar"] and "cifar/id" in told["data"]


def test_no_pool_gives_an_empty_board_and_an_unknown_name_an_error(run):
    models, board = pool_board(run, "", ["*"], SHOWN, n_boot=5)
    assert not models and not board
    with pytest.raises(OodlibError, match="no model of the pool cifar matches nothing"):
        pool_board(run, "cifar", ["nothing"], SHOWN, n_boot=5)
