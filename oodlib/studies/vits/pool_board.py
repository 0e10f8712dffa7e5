"""The finished models of a small pool as a `oodlib.metrics.Board`: one network per model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

from oodlib.claims import Run
from oodlib.errors import OodlibError
from oodlib.metrics import Board
from oodlib.studies.vits.image_sets import NEAR, TASKS
from oodlib.studies.vits.pool_table import read_pool
from oodlib.studies.vits.stored import Models, pool_models


def pool_board(
    run: Run, pool: str, names: Sequence[str], scores: Mapping[str, str], *, n_boot: int
) -> tuple[Models, Board]:
    """Finished models of a small pool, and a board of their scores on its near sets and unit tests.

    The run is told their hashes; how many are missing is printed.

    Parameters
    ----------
    pool : "embedded" or "cifar"; "" gives no model and an empty board
    names : patterns of the models' names (``"*-ft0.1-s1"``); soups and pretrained ones are left out
    scores : method of the board -> column of `oodlib.studies.vits.stored.STORED`

    Raises
    ------
    OodlibError : no model of the pool has such a name
    """
    rows = [row for row in (read_pool(pool) if pool else []) if not row.role]
    chosen = [row for row in rows if any(fnmatch(row.name, pattern) for pattern in names)]
    if pool and not chosen:
        raise OodlibError(
            f"pool_board: no model of the pool {pool} matches {', '.join(names)}. "
            f"It has {', '.join(row.name for row in rows)}."
        )
    models = pool_models(pool, rows=chosen, device=run.device) if chosen else Models([], {})
    if models.missing:
        first = next(iter(models.missing.values()))
        print(f"{len(models.missing)} models are neither trained here nor shipped. First: {first}")
    if not models:
        return models, Board(scores={})

    sets = ["id", *NEAR[pool], "unit_tests"]
    table = {}
    for model in models:
        parts = dict(iter(model.table.groupby("set")))
        table[model.row.name] = {
            method: {name: parts[name][column].to_numpy() for name in sets}
            for method, column in scores.items()
        }
    hashes = "".join(model.record["sha256"] for model in models)
    run.uses(
        weights={f"{len(models)} ViTs of {pool}": hashlib.sha256(hashes.encode()).hexdigest()},
        data={f"{pool}/{k}": v["fingerprint"] for k, v in models[0].record["sets"].items()},
    )
    group = {name: "far" if name == "unit_tests" else "near" for name in sets if name != "id"}
    id_name = TASKS[pool].id_set
    board = Board(
        scores=table,
        group=dict.fromkeys(table, group),
        id_name=dict.fromkeys(table, id_name),
        n_boot=n_boot,
        seed=run.seed,
    )
    return models, board


def pretraining_kind(models: Models, pool: str) -> dict[str, str]:
    """Model -> "broad", "narrow" (the ID set alone) or "CLIP-like" pretraining."""
    return {
        model.row.name: "CLIP-like"
        if model.row.objective == "cosine"
        else "broad"
        if model.row.pretraining == TASKS[pool].pretraining
        else "narrow"
        for model in models
    }
