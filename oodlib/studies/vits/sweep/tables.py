"""From finished jobs to tables: the scores of every image of a model (parquet), and a summary of
all models (CSV).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from oodlib.errors import OodlibError
from oodlib.files import atomic_path, write_json, write_text
from oodlib.studies.vits.sweep.models_and_images import FIT

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["COLUMNS", "collect", "make_table", "read_record"]

# of the summary; fractions, FPR at 95 % TPR with ID positive; the plain ones are unweighted means
# over the OOD classes
COLUMNS = (
    "model",
    "accuracy",
    "set",
    "score",
    "fpr",
    "auroc",
    "fpr_pooled",
    "auroc_pooled",
    "failed",
    "classes",
    "images",
)


def make_table(folder: Path, splits: Sequence[str], *, wait_for_all: bool = False) -> str:
    """Score a model's finished splits into ``scores.parquet``, once; ``scores.json`` is written
    last.

    Parameters
    ----------
    folder : of the model, in a sweep's output
    splits : of the source
    wait_for_all : do nothing unless every split is done; otherwise "fit", "id" and one OOD set are enough

    Returns
    -------
    "done", "failed" (the error is on record) or "missing"
    """
    found = {split: read_record(folder / f"{split}.json") for split in splits}
    records = {split: record for split, record in found.items() if record["state"] == "done"}
    if not {FIT, "id"} <= set(records) or len(records) < (len(splits) if wait_for_all else 3):
        return "missing"
    made_of = {
        split: [record["request"], record["inputs"], record["finished"]]
        for split, record in records.items()
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    path = folder / "scores.json"
    with FileLock(folder / ".scores.lock"):
        known = read_record(path)
        if known["state"] == "done" and known["key"] == key:
            return "done"
        path.unlink(missing_ok=True)
        try:
            if len({(record["weights"], record["transform"]) for record in records.values()}) > 1:
                raise OodlibError(
                    f"the splits went through other weights or transforms. Delete {folder}, run "
                    "again."
                )
            summary = _score(
                folder, [split for split in records if split != FIT], records["id"]["accuracy"]
            )
        except Exception as error:  # one model's table never stops the others
            write_json(
                path, {"state": "failed", "key": key, "error": f"{type(error).__name__}: {error}"}
            )
            return "failed"
        write_json(path, {"state": "done", "key": key, "summary": summary})
    return "done"


def collect(output: Path, models: Iterable[str], splits: Sequence[str]) -> Path | None:
    """Bring every model's table up to date and write ``summary.csv``; its path, or None where no
    model has one yet.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for model in models:
        if make_table(output / model, splits) == "done":
            rows += read_record(output / model / "scores.json")["summary"]
    if not rows:
        return None
    path = output / "summary.csv"
    write_text(
        path, pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, float_format="%.6f")
    )
    return path


def read_record(path: Path) -> dict[str, Any]:
    """A record of a job or a table; ``state`` is "" where there is none, or none that can be read."""
    try:
        return {"state": "", **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return {"state": ""}


def _score(folder: Path, splits: Sequence[str], accuracy: float) -> list[dict[str, Any]]:
    from oodlib.features.feature_bank import FeatureBank
    from oodlib.studies.vits.score_table import Reference, score_table

    banks = {split: FeatureBank.load(folder / split) for split in splits}
    table = score_table(Reference.load(folder / f"{FIT}.safetensors"), banks)
    summary = _summary(table, [split for split in splits if split != "id"])
    with atomic_path(folder / "scores.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    return summary.assign(model=folder.name, accuracy=accuracy)[list(COLUMNS)].to_dict("records")


def _summary(table: DataFrame, sets: Sequence[str]) -> DataFrame:
    """One row a set and score: means over the OOD classes and over the images, and how many classes
    exceed 10 % FPR.
    """
    import pandas as pd

    from oodlib.studies.vits.measures import FAILED, over_classes, per_class

    rows = [
        {
            "set": name,
            "score": score,
            **over_classes(part),
            "failed": int((part["fpr"] > FAILED).sum()),
        }
        for (name, score), part in per_class(table, sets).groupby(["set", "score"], sort=False)
    ]
    if not rows:
        raise OodlibError("sweep: there is no OOD set to judge.")
    return pd.DataFrame(rows)
