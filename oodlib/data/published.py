"""Numbers that papers and leaderboards print: ``data/published/*.csv``, checked on reading."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from oodlib.errors import OodlibError
from oodlib.workspace import root

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["published"]

_VALUES = ("value", "mean", "std", "note")  # everything else identifies a row
_LARGEST = {"%": 100.0} | dict.fromkeys(
    ["bits/dim", "steps", "count", "ratio"], float("inf")
)  # by unit
_NEEDED = {"source", "id_dataset", "method", "metric", "positive_class", "note"}


def published(name: str, *, folder: Path | None = None) -> DataFrame:
    """The rows of ``data/published/<name>.csv``; texts as they stand, numbers as float64, an unread
    number as NaN.

    Parameters
    ----------
    name : "imagenet", "openood_v15", "gradnorm_unread", ...: a file name without suffix
    folder : of the files; by default ``data/published`` of the project

    Returns
    -------
    DataFrame with the file's columns; the number is in ``value`` or in ``mean`` (with ``std``), in per cent unless
    the column ``unit`` says "bits/dim", "steps", "count" or "ratio"

    Raises
    ------
    OodlibError : no such file, a column is missing, a unit is unknown, a number is negative or above 100 %, an empty
        number has no note, a row has no source, or two rows have the same key
    """
    import pandas as pd

    folder = folder or root() / "data" / "published"
    path = Path(folder) / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path(folder).glob("*.csv"))) or "none"
        raise OodlibError(f"{path}: there is no such file of published numbers. Known: {known}.")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    number = "value" if "value" in table else "mean"
    missing = (_NEEDED | {number}) - set(table)
    if missing:
        raise OodlibError(
            f"{path}: the columns {', '.join(sorted(missing))} are missing. See README.md beside "
            "it."
        )
    unit = table["unit"] if "unit" in table else pd.Series("%", table.index)
    _refuse(path, table, ~unit.isin(list(_LARGEST)), f"the unit is none of {', '.join(_LARGEST)}")
    largest = unit.map(_LARGEST)
    for column in {number, "std"} & set(table):
        values = pd.to_numeric(table[column].replace("", "nan"), errors="coerce")
        _refuse(
            path,
            table,
            values.isna() & ~table[column].isin(["", "nan"]),
            f"{column} is not a number",
        )
        outside = values.notna() & ~values.between(0, largest)
        _refuse(path, table, outside & (unit == "%"), f"{column} is outside [0, 100]")
        _refuse(path, table, outside, f"{column} is negative")
        table[column] = values
    _refuse(path, table, table["source"] == "", "the source is missing")
    _refuse(
        path, table, table[number].isna() & (table["note"] == ""), "an empty number needs a note"
    )
    _refuse(
        path,
        table,
        ~table["positive_class"].isin(["ID", "OOD", "none", ""]),
        "positive_class is not ID or OOD",
    )
    key = [column for column in table if column not in _VALUES]
    _refuse(path, table, table.duplicated(key), "the same key stands in an earlier row")
    return table


def _refuse(path: Path, table: DataFrame, bad: object, reason: str) -> None:
    rows = table.index[bad]  # type: ignore[index]
    if len(rows):
        raise OodlibError(
            f"{path}, line {rows[0] + 2}: {reason} ({len(rows)} such rows). Correct the file."
        )
