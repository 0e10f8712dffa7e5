"""From finished jobs to tables: scores of all images of a model, and a summary of all models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame

from oodlib.errors import OodlibError
from oodlib.files import key_of, locked, write_json, write_sealed, write_text
from oodlib.studies.vits.sweep.models_and_images import FIT

# of the summary; fractions, FPR at 95 % TPR with ID positive; unweighted means over the OOD
# classes, "pooled" over the images
COLUMNS = (
    *("model", "accuracy", "set", "score", "fpr", "auroc", "fpr_pooled", "auroc_pooled"),
    *("failed", "classes", "images"),
)


def make_table(folder: Path, splits: Sequence[str], *, wait_for_all: bool = False) -> str:
    """Score a model's finished splits into ``scores.parquet``; ``scores.json`` is written last.

    Parameters
    ----------
    folder : of the model, in a sweep's output
    splits : of the source
    wait_for_all : do nothing unless every split is done; else "fit", "id" and one OOD set suffice

    Returns
    -------
    "done", "failed" (the error is on record) or "missing"
    """
    records = {split: read_record(folder / f"{split}.json") for split in splits}
    records = {split: record for split, record in records.items() if record["state"] == "done"}
    if not {FIT, "id"} <= set(records) or len(records) < (len(splits) if wait_for_all else 3):
        return "missing"
    parts = ("request", "inputs", "finished")
    key = key_of({split: [record[part] for part in parts] for split, record in records.items()})
    path = folder / "scores.json"
    with locked(folder / ".scores.lock"):
        table = read_record(path)
        if table["state"] == "done" and table["key"] == key:
            return "done"
        path.unlink(missing_ok=True)
        try:
            if len({(record["weights"], record["transform"]) for record in records.values()}) > 1:
                raise OodlibError(
                    f"the splits went through different weights or transforms. Delete {folder} "
                    "and run again."
                )
            tested = [split for split in records if split != FIT]
            scores = _score(folder, tested)
            summary = _summary(scores, [split for split in tested if split != "id"])
            whole = summary.assign(model=folder.name, accuracy=records["id"]["accuracy"])
            rows = whole[list(COLUMNS)].to_dict("records")
            write_sealed(
                folder / "scores.parquet",
                lambda temporary: scores.to_parquet(temporary, index=False),
                {"state": "done", "key": key, "summary": rows},
            )
        except Exception as error:  # one model's table never stops the others
            reason = f"{type(error).__name__}: {error}"
            write_json(path, {"state": "failed", "key": key, "error": reason})
            return "failed"
    return "done"


def collect(output: Path, models: Iterable[str], splits: Sequence[str]) -> Path | None:
    """Bring all tables up to date and write ``summary.csv``; None where there is no table yet."""
    rows: list[dict[str, Any]] = []
    for model in models:
        if make_table(output / model, splits) == "done":
            rows += read_record(output / model / "scores.json")["summary"]
    if not rows:
        return None
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    write_text(output / "summary.csv", table.to_csv(index=False, float_format="%.6f"))
    return output / "summary.csv"


def read_record(path: Path) -> dict[str, Any]:
    """A record of a job or a table; ``state`` is "" where it is missing or cannot be read."""
    try:
        return {"state": "", **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return {"state": ""}


def _score(folder: Path, splits: Sequence[str]) -> DataFrame:
    from oodlib.features.feature_bank import FeatureBank
    from oodlib.studies.vits.reference import Reference
    from oodlib.studies.vits.score_table import score_table

    banks = {split: FeatureBank.load(folder / split) for split in splits}
    return score_table(Reference.load(folder / f"{FIT}.safetensors"), banks)


def _summary(table: DataFrame, sets: Sequence[str]) -> DataFrame:
    """One row per set and score: means, and how many OOD classes exceed 10 % FPR."""
    from oodlib.studies.vits.measures import FAILED, over_classes, per_class

    if not sets:
        raise OodlibError("sweep: there is no OOD set to judge.")
    rows = []
    for (name, score), part in per_class(table, sets).groupby(["set", "score"], sort=False):
        failed = int((part["fpr"] > FAILED).sum())
        rows.append({"set": name, "score": score, **over_classes(part), "failed": failed})
    return pd.DataFrame(rows)
