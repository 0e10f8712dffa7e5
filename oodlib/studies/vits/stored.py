"""The finished models of a small pool, trained here or shipped: records, and scores on its sets.

Shipped, in ``data/checkpoints/vits_<pool>``, are scores (``scores.parquet``) and records
(``runs.json``) of the models; of some of the ``embedded`` pool (`is_live`) the pretrained
checkpoints instead, with hashes of the images that they were pretrained on: they are finetuned on
the spot.

Scores are shipped as dense ranks among the images of their model (ties stay ties): AUROC, FPR and
averages on the scale of ranks depend on the order alone, and two bytes per score compress better
than four. Models that were trained here are ranked too, so that a number does not depend on where a
table came from.
"""

from __future__ import annotations

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
from oodlib.files import atomic_folder, read_json, read_sealed, write_sealed
from oodlib.studies.vits.pool_table import PoolRow, read_pool
from oodlib.studies.vits.recipes import (
    made_folder,
    pool_of,
    pretrained_path,
    shipped_folder,
    train_command,
)
from oodlib.studies.vits.score_table import SCORES
from oodlib.studies.vits.trained import is_trained, live_folder

STORED = (*SCORES, "gradnorm", "gradnorm_u")
_KEYS = ["set", "index", "label"]


@dataclass(frozen=True, eq=False)
class Scored:
    """A finished model.

    Attributes
    ----------
    row : of the pool
    record : ``run.json`` (row, accuracy, held_out_accuracy, geometry, norm_correlation, moved,
        decay_integral, recipe, members of a soup, sets, sha256 of the weights, torch), its history
        as ``losses`` and ``seconds``, and ``pretraining``: the record of its checkpoint
    table : set, index, label and the scores of `STORED`; larger = more OOD. Ranks, but for models
        finetuned on the spot
    """

    row: PoolRow
    record: dict[str, Any]
    table: DataFrame


class Models(list[Scored]):
    """Finished models, in the order of the pool; ``missing``: name -> command or reason."""

    def __init__(self, models: Sequence[Scored], missing: dict[str, str]):
        super().__init__(models)
        self.missing = missing


def pool_models(
    pool: str, *, rows: Sequence[PoolRow] | None = None, device: str = "auto", progress: bool = True
) -> Models:
    """The models of a small pool: finetuned on the spot (`is_live`), trained here, or shipped.

    rows : only these, for example some of ``read_pool(pool)``; default all

    Raises
    ------
    OodlibError : a damaged file; models that were scored on different images
    """
    shipped, models, missing = _shipped(shipped_folder(pool)), [], {}
    rows = read_pool(pool) if rows is None else rows
    for row in tqdm(rows, desc="models", disable=None if progress else True):
        if is_live(row):
            models.append(_trained(row, live_folder(row, device=device)))
        elif is_trained(row):
            model = _trained(row, made_folder(row))
            models.append(Scored(row, model.record, ranked(model.table)))
        elif row.name in shipped and shipped[row.name].row == row:
            models.append(shipped[row.name])
        else:
            missing[row.name] = train_command(row)
    for model in models[1:]:
        if not _same_images(model, models[0]):
            raise OodlibError(
                f"{model.row.name} was scored on other images than {models[0].row.name}. Shipped "
                "scores need the locked versions of the libraries that draw images (make doctor); "
                f"what was trained here: delete its folder, then {train_command(model.row)}"
            )
    return Models(models, missing)


def is_live(row: PoolRow) -> bool:
    """Whether a row is finetuned on the spot: an embedded cell whose checkpoint is shipped."""
    arm = (row.seed, row.weight_decay) == (0, 0.1) and row.role in ("", "pretrained")
    return pool_of(row) == "embedded" and arm


def ranked(table: DataFrame) -> DataFrame:
    """Each score of `STORED` as its dense rank among all rows, 0 the least (float32).

    OodlibError : a score is NaN
    """
    bad = [name for name in STORED if table[name].isna().any()]
    if bad:
        raise OodlibError(
            f"ranked: {bad[0]} holds NaN. Find their cause; a score that overflowed must be +inf "
            "(most OOD), never dropped."
        )
    ranks = {name: np.unique(table[name], return_inverse=True)[1] for name in STORED}
    return table[_KEYS].assign(**{name: rank.astype(np.float32) for name, rank in ranks.items()})


def ship(pool: str) -> Path:
    """Copy what is finished of a pool into ``data/checkpoints/vits_<pool>``; returns the folder.

    Models that were shipped before and are not here stay.

    Raises
    ------
    OodlibError : nothing is finished; as `pool_models`
    """
    rows = read_pool(pool)
    models = pool_models(pool, rows=[row for row in rows if not is_live(row)])
    checkpoints = {pretrained_path(row) for row in rows if is_live(row)}
    absent = [path.name for path in checkpoints if not path.with_suffix(".json").exists()]
    if not models or absent:
        raise OodlibError(
            f"ship: {', '.join(absent) or 'every model'} of the pool {pool} is missing. Train it: "
            f"python -m oodlib train-vit --pool {pool}"
        )
    seen = {path for folder in {c.parent for c in checkpoints} for path in folder.glob("seen_*")}
    with atomic_folder(shipped_folder(pool)) as temporary:
        _pack(models, temporary)
        for path in {*checkpoints, *(c.with_suffix(".json") for c in checkpoints), *seen}:
            shutil.copy(path, temporary)
    return shipped_folder(pool)


def _pack(models: Sequence[Scored], folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [model.table.assign(model=model.row.name) for model in models]
    table = pd.concat(tables, ignore_index=True)[["model", *_KEYS, *STORED]]
    table = table.astype(dict.fromkeys(STORED, np.int32))  # two of its bytes are zero

    packing: dict[str, Any] = {"compression": "zstd", "compression_level": 19}
    packing |= {"use_dictionary": ["model", "set"], "use_byte_stream_split": list(STORED)}

    def write(path: Path) -> None:
        pq.write_table(pa.Table.from_pandas(table, preserve_index=False), path, **packing)

    records = {m.row.name: dict(m.record) for m in models}
    pretraining = {m.row.checkpoint: records[m.row.name].pop("pretraining") for m in models}
    sets = [record.pop("sets") for record in records.values()]
    record = {"models": records, "pretraining": pretraining, "sets": sets[0]}
    write_sealed(folder / "scores.parquet", write, record, record_path=folder / "runs.json")


def _shipped(folder: Path) -> dict[str, Scored]:
    """Name -> model; empty where nothing is shipped."""
    if not folder.exists():
        return {}
    path, remedy = folder / "scores.parquet", "Restore the folder from git, or delete it."
    runs = read_sealed(path, "pool_models", remedy, record_path=folder / "runs.json")
    try:
        scores = pd.read_parquet(path).astype(dict.fromkeys(STORED, np.float32))
        tables = dict(list(scores.groupby("model")))
        models = {}
        for name, record in runs["models"].items():
            row = PoolRow(**record["row"])
            record |= {"pretraining": runs["pretraining"][row.checkpoint], "sets": runs["sets"]}
            table = tables[name].drop(columns="model").reset_index(drop=True)
            models[name] = Scored(row, record, table)
        return models
    except (KeyError, TypeError, AttributeError) as error:
        raise OodlibError(
            f"pool_models: {folder / 'runs.json'} is damaged ({error!r}). {remedy}"
        ) from error


def _trained(row: PoolRow, folder: Path) -> Scored:
    """A model from the folder that `train_row` wrote."""
    remedy = f"Delete {folder} and train again: {train_command(row)}"
    record = _short(read_json(folder / "run.json", "pool_models", remedy))
    checkpoint = read_json(pretrained_path(row).with_suffix(".json"), "pool_models", remedy)
    try:
        table = pd.read_parquet(folder / "scores.parquet")[[*_KEYS, *STORED]]
    except (OSError, ValueError, KeyError) as error:
        raise OodlibError(
            f"pool_models: {folder / 'scores.parquet'} is missing or damaged ({error}). {remedy}"
        ) from error
    return Scored(row, record | {"pretraining": _short(checkpoint)}, table)


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """The record with ``losses`` and ``seconds`` instead of ``history``."""
    if "history" not in record:
        return record
    history = record["history"]
    rest = {key: value for key, value in record.items() if key != "history"}
    losses = [round(point["loss"], 4) for point in history]
    return rest | {"losses": losses, "seconds": round(history[-1]["seconds"], 1)}


def _same_images(model: Scored, other: Scored) -> bool:
    same_sets = model.record["sets"] == other.record["sets"]
    return same_sets and model.table[_KEYS].equals(other.table[_KEYS])
