"""Numbers that papers and leaderboards print: ``data/published/*.csv``, checked on reading."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from oodlib.errors import OodlibError
from oodlib.workspace import root

if TYPE_CHECKING:
    from pandas import DataFrame, Series


_VALUES = ("value", "mean", "std", "note")  # everything else identifies a row
_UNITS = ("%", "bits/dim", "steps", "count", "ratio")
_NEEDED = {"source", "id_dataset", "method", "metric", "positive_class", "note"}


def published(name: str, *, folder: Path | None = None) -> DataFrame:
    """The rows of ``data/published/<name>.csv``: numbers as float64, an unread number as NaN.

    Parameters
    ----------
    name : "imagenet", "openood_v15", "gradnorm_unread", ...: a file name without suffix
    folder : of the files; by default ``data/published`` of the project

    Returns
    -------
    DataFrame with the file's columns; the number is in ``value`` or in ``mean`` (with ``std``), in
    per cent unless the column ``unit`` says "bits/dim", "steps", "count" or "ratio"

    Raises
    ------
    OodlibError : no such file, a column is missing, a unit is unknown, a number is negative or
        above 100 %, an empty number has no note, a row has no source, or two rows share a key
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
        columns = ", ".join(sorted(missing))
        raise OodlibError(f"{path}: the columns {columns} are missing. See README.md beside it.")

    def refuse(bad: Series, reason: str) -> None:
        rows = table.index[bad]
        if len(rows):
            raise OodlibError(
                f"{path}, line {rows[0] + 2}: {reason} ({len(rows)} such rows). Correct the file."
            )

    unit = table["unit"] if "unit" in table else pd.Series("%", table.index)
    refuse(~unit.isin(_UNITS), f"the unit is none of {', '.join(_UNITS)}")
    for column in {number, "std"} & set(table):
        values = pd.to_numeric(table[column].replace("", "nan"), errors="coerce")
        unread = table[column].isin(["", "nan"])
        refuse(values.isna() & ~unread, f"{column} is not a number")
        refuse((unit == "%") & ((values < 0) | (values > 100)), f"{column} is outside [0, 100]")
        refuse(values < 0, f"{column} is negative")
        table[column] = values
    refuse(table["source"] == "", "the source is missing")
    refuse(table[number].isna() & (table["note"] == ""), "an empty number needs a note")
    positive = table["positive_class"].isin(["ID", "OOD", "none", ""])
    refuse(~positive, "positive_class is not ID or OOD")
    key = [column for column in table if column not in _VALUES]
    refuse(table.duplicated(key), "the same key as in an earlier row")
    return table
