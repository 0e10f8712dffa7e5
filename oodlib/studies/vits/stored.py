"""The finished models of a small pool, trained here or shipped: for each its record and its scores
on the pool's sets.

Shipped, in ``data/checkpoints/vits_<pool>``, are scores (``scores.parquet``) and records
(``runs.json``) of the models; of some of the ``embedded`` pool (`is_live`) the pretrained
checkpoints instead, with hashes of the images that they were pretrained on
(``seen_<set>-<fingerprint>``): they are finetuned on the spot.

Scores are shipped as dense ranks among the images of their model (ties stay ties): AUROC, FPR and
averages on the scale of ranks see the order only, and two bytes a score compress better than four.
Models that were trained here are ranked too, so that a number does not depend on where a table came
from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame
from tqdm import tqdm

from oodlib.errors import OodlibError
from oodlib.files import atomic_folder, sha256, write_json
from oodlib.studies.vits.pool_table import PoolRow, read_pool
from oodlib.studies.vits.score_table import SCORES
from oodlib.studies.vits.trained import (
    is_trained,
    live_folder,
    made_folder,
    pool_of,
    pretrained_path,
    train_command,
)
from oodlib.workspace import root

__all__ = ["STORED", "Models", "Scored", "is_live", "pool_models", "ranked", "ship"]

STORED = (*SCORES, "gradnorm", "gradnorm_u")
_KEYS = ["set", "index", "label"]


@dataclass(frozen=True, eq=False)
class Scored:
    """A finished model.

    Attributes
    ----------
    row : of the pool
    record : ``run.json`` (row, accuracy, held_out_accuracy, geometry, norm_correlation, moved, decay_integral, recipe,
        members of a soup, sets, sha256 of the weights, torch), its history as ``losses`` and
        ``seconds``, and ``pretraining``: the record of the checkpoint it started from
    table : set, index, label and the scores of `STORED`; larger = more OOD. Ranks, but for models
        finetuned on the spot
    """

    row: PoolRow
    record: dict[str, Any]
    table: DataFrame


class Models(list[Scored]):
    """Finished models, in the order of the pool; ``missing``: name -> the command that trains it."""

    def __init__(self, models: Sequence[Scored], missing: dict[str, str]):
        super().__init__(models)
        self.missing = missing


def pool_models(
    pool: str, *, rows: Sequence[PoolRow] | None = None, device: str = "auto", progress: bool = True
) -> Models:
    """The models of a small pool: finetuned on the spot where `is_live`, else trained here, else
    shipped.

    Parameters
    ----------
    rows : only these, for example some of ``read_pool(pool)``; default all

    Raises
    ------
    OodlibError : a damaged file; models that were scored on different images
    """
    shipped, found, missing = _shipped(_folder(pool)), [], {}
    for row in tqdm(
        read_pool(pool) if rows is None else rows, desc="models", disable=None if progress else True
    ):
        if is_live(row):
            found.append(_trained(row, live_folder(row, device=device)))
        elif is_trained(row):
            model = _trained(row, made_folder(row))
            found.append(Scored(row, model.record, ranked(model.table)))
        elif row.name in shipped and shipped[row.name].row == row:
            found.append(shipped[row.name])
        else:
            missing[row.name] = train_command(row)
    return _checked(found, missing)


def is_live(row: PoolRow) -> bool:
    """Whether a row is finetuned on the spot: cells of the embedded pool whose pretrained
    checkpoint is shipped.
    """
    return (
        pool_of(row) == "embedded"
        and row.seed == 0
        and row.weight_decay == 0.1
        and row.role in ("", "pretrained")
    )


def ranked(table: DataFrame) -> DataFrame:
    """Every score of `STORED` replaced by its dense rank among all rows, 0 the least, equal scores
    equal (float32).

    OodlibError : a score is NaN
    """
    ranks = {
        name: np.unique(table[name], return_inverse=True)[1].astype(np.float32) for name in STORED
    }
    bad = [name for name in STORED if table[name].isna().any()]
    if bad:
        raise OodlibError(
            f"ranked: {bad[0]} holds NaN. Find their cause; a score that overflowed must be +inf "
            "(most OOD), never dropped."
        )
    return table[_KEYS].assign(**ranks)


def ship(pool: str) -> Path:
    """Copy what is finished of a pool into ``data/checkpoints/vits_<pool>``, whole or not at all;
    returns the folder.

    Models that were shipped before and are not here stay in.

    Raises
    ------
    OodlibError : nothing is finished; as `pool_models`
    """
    target = _folder(pool)
    rows = read_pool(pool)
    models = pool_models(pool, rows=[row for row in rows if not is_live(row)])
    checkpoints = {pretrained_path(row) for row in rows if is_live(row)}
    absent = [path.name for path in checkpoints if not path.with_suffix(".json").exists()]
    if not models or absent:
        raise OodlibError(
            f"ship: {', '.join(absent) or 'every model'} of the pool {pool} is missing. Train it: "
            f"python -m oodlib train-vit --pool {pool}"
        )
    with atomic_folder(target) as temporary:
        _pack(models, temporary)
        for path in checkpoints:
            shutil.copy(path, temporary)
            shutil.copy(path.with_suffix(".json"), temporary)
        for folder in {path.parent for path in checkpoints}:
            for hashes in folder.glob("seen_*"):  # of the pretraining images
                shutil.copy(hashes, temporary)
    return target


def _pack(models: Sequence[Scored], folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pd.concat(
        [model.table.assign(model=model.row.name) for model in models], ignore_index=True
    )
    table = table[["model", *_KEYS, *STORED]].astype(
        dict.fromkeys(STORED, np.int32)
    )  # two bytes are zero
    pq.write_table(
        pa.Table.from_pandas(table, preserve_index=False),
        folder / "scores.parquet",
        compression="zstd",
        compression_level=19,
        use_dictionary=["model", "set"],
        use_byte_stream_split=list(STORED),
    )
    own = {
        m.row.name: {k: v for k, v in m.record.items() if k not in ("sets", "pretraining")}
        for m in models
    }
    write_json(
        folder / "runs.json",
        {
            "models": own,
            "pretraining": {m.row.checkpoint: m.record["pretraining"] for m in models},
            "sets": models[0].record["sets"],
            "sha256": sha256(folder / "scores.parquet"),
        },
    )


def _shipped(folder: Path) -> dict[str, Scored]:
    """Name -> model; empty where nothing is shipped."""
    if not folder.exists():
        return {}
    try:
        runs = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
        if sha256(folder / "scores.parquet") != runs["sha256"]:
            raise ValueError("the checksum of scores.parquet differs")
        scores = pd.read_parquet(folder / "scores.parquet").astype(
            dict.fromkeys(STORED, np.float32)
        )
        tables = {
            name: part.drop(columns="model").reset_index(drop=True)
            for name, part in scores.groupby("model")
        }
        rows = {name: PoolRow(**record["row"]) for name, record in runs["models"].items()}
        return {
            name: Scored(
                row,
                runs["models"][name]
                | {"pretraining": runs["pretraining"][row.checkpoint], "sets": runs["sets"]},
                tables[name],
            )
            for name, row in rows.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OodlibError(
            f"{folder}: runs.json or scores.parquet is missing or damaged ({_reason(error)}). "
            "Restore the folder from git, or delete it."
        ) from error


def _trained(row: PoolRow, folder: Path) -> Scored:
    """A model from the folder that `train_row` wrote."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        record["pretraining"] = json.loads(
            pretrained_path(row).with_suffix(".json").read_text(encoding="utf-8")
        )
        table = pd.read_parquet(folder / "scores.parquet")[[*_KEYS, *STORED]]
    except (OSError, ValueError, KeyError) as error:
        raise OodlibError(
            f"{folder} or the checkpoint it started from is missing or damaged "
            f"({_reason(error)}). Delete the folder and train again: {train_command(row)}"
        ) from error
    return Scored(row, _short(record) | {"pretraining": _short(record["pretraining"])}, table)


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """The record with ``losses`` and ``seconds`` instead of ``history``."""
    if "history" not in record:
        return record
    kept = {key: value for key, value in record.items() if key != "history"}
    return kept | {
        "losses": [round(point["loss"], 4) for point in record["history"]],
        "seconds": round(record["history"][-1]["seconds"], 1),
    }


def _checked(models: list[Scored], missing: dict[str, str]) -> Models:
    """All models must have been scored on the same images."""
    for model in models[1:]:
        same = model.record["sets"] == models[0].record["sets"] and model.table[_KEYS].equals(
            models[0].table[_KEYS]
        )
        if not same:
            raise OodlibError(
                f"{model.row.name} was scored on other images than {models[0].row.name}. Shipped "
                "scores need the locked versions of the libraries that draw images (make doctor); "
                f"what was trained here: delete its folder, then {train_command(model.row)}"
            )
    return Models(models, missing)


def _reason(error: Exception) -> str:
    return repr(error).partition("\\n")[0]


def _folder(pool: str) -> Path:
    return root() / "data" / "checkpoints" / f"vits_{pool}"
