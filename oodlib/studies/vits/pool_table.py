"""A pool of models as a table: one row per model, its network, pretraining and finetuning."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from oodlib.errors import OodlibError
from oodlib.files import write_text
from oodlib.workspace import root


@dataclass(frozen=True, kw_only=True)
class PoolRow:
    """One model. Empty text or None: not known (other people's models), or without meaning.

    Attributes
    ----------
    name : unique in the pool; names files and rows of tables
    network : timm name with its tag, or without where ``weights`` names a file; or one of
        `oodlib.models.small_vit`
    weights : file below the folder of weights; empty for the tag's own, and for networks trained
        here
    pretraining : dataset: "in21k", "in1k", "clip-openai", "unicode", "tiny-imagenet", "cifar10" ...
    objective : of the pretraining: "sigmoid", "softmax", "cosine" (CLIP-like)
    aug, weight_decay, dropout, stochastic_depth : of the pretraining
    ft_lr : peak learning rate of the finetuning
    head : the linear head takes "raw" or "unit" (L2-normalised) features
    penalty : weight of the feature-space regulariser in the finetuning
    resolution : side of the input in pixels
    seed : of pretraining and finetuning
    role : "" for a cell of the study, "pretrained" for a checkpoint without finetuning (its head is
        zero), "member" for an ingredient of a soup, "soup-uniform" and "soup-greedy" for soups
    """

    name: str
    network: str
    weights: str = ""
    pretraining: str = ""
    objective: str = ""
    aug: str = ""
    weight_decay: float | None = None
    dropout: float | None = None
    stochastic_depth: float | None = None
    ft_lr: float | None = None
    head: str = "raw"
    penalty: float = 0.0
    resolution: int | None = None
    seed: int = 0
    role: str = ""

    @property
    def checkpoint(self) -> str:
        """Name of the pretrained checkpoint: rows that share it are finetunes of one model."""
        architecture = self.network.partition(".")[0].removesuffix(f"_{self.resolution}")
        recipe = (self.aug, self.weight_decay, self.dropout, self.stochastic_depth)
        factors = (architecture, self.pretraining, self.objective, *recipe)
        parts = [str(part) for part in factors if part not in ("", None)]
        return "-".join([*parts, f"s{self.seed}"]) if self.objective else self.name


_COLUMNS = [field.name for field in fields(PoolRow)]
_INTEGERS = ("resolution", "seed")
_NUMBERS = ("weight_decay", "dropout", "stochastic_depth", "ft_lr", "penalty", *_INTEGERS)


def find_pool(name: str | Path) -> Path:
    """The table called ``name``: a path, or the stem of a file in ``data/pools``."""
    path, folder = Path(name), root() / "data" / "pools"
    for candidate in (path, folder / f"{name}.csv"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.stem for p in folder.glob("*.csv"))) or "none"
    raise OodlibError(
        f"There is no pool {str(name)!r}: neither a file nor one of data/pools ({known})."
    )


def read_pool(name: str | Path) -> tuple[PoolRow, ...]:
    """All rows of a pool, checked.

    Raises
    ------
    OodlibError : no such file, a missing or unknown column, a cell that is not a number, no name or
        network, a duplicate name
    """
    path = find_pool(name)
    try:
        with open(path, newline="", encoding="utf-8") as file:  # csv, for errors with line and cell
            columns, *table = [cells for cells in csv.reader(file) if cells] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OodlibError(f"{path}: the pool cannot be read ({error}).") from error
    faults = [f"the column {c} is missing" for c in _COLUMNS if c not in columns]
    faults += [f"the column {c!r} is unknown" for c in columns if c not in _COLUMNS]
    if faults:
        raise OodlibError(
            f"{path}: {faults[0]}. A pool has the columns {', '.join(_COLUMNS)}; cells may be "
            "empty."
        )
    rows = tuple(_row(f"{path}, line {n}", columns, cells) for n, cells in enumerate(table, 2))
    duplicates = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    if duplicates or not rows:
        fault = f"duplicate name {duplicates[0]}" if duplicates else "the pool has no row"
        raise OodlibError(f"{path}: {fault}.")
    return rows


def write_pool(path: Path, rows: Iterable[PoolRow]) -> None:
    """Write a table that `read_pool` reads."""
    table = [_COLUMNS, *(["" if v is None else str(v) for v in astuple(row)] for row in rows)]
    write_text(path, "".join(",".join(cells) + "\n" for cells in table))


def _row(where: str, columns: list[str], cells: list[str]) -> PoolRow:
    if len(cells) != len(columns):
        raise OodlibError(f"{where}: {len(columns)} cells are needed, one per column.")
    values: dict[str, Any] = {}
    for column, text in zip(columns, map(str.strip, cells), strict=True):
        if column not in _NUMBERS:
            values[column] = text
        elif text:
            try:
                values[column] = int(text) if column in _INTEGERS else float(text)
            except ValueError as error:
                raise OodlibError(
                    f"{where}: {column} must be a number or empty, got {text!r}."
                ) from error
    if not values["name"] or not values["network"]:
        raise OodlibError(f"{where}: a model needs a name and a network.")
    if set(values["name"]) & set('/\\:*?"<>| '):
        raise OodlibError(f"{where}: the name {values['name']!r} is not a valid file name.")
    return PoolRow(**values)
