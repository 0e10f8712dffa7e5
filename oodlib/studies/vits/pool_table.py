"""A pool of models as a table: one row per model, with its network, its pretraining and its
finetuning.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from oodlib.errors import OodlibError
from oodlib.files import write_text
from oodlib.workspace import root

__all__ = ["PoolRow", "find_pool", "read_pool", "write_pool"]


@dataclass(frozen=True, kw_only=True)
class PoolRow:
    """One model. An empty text or None stands for what is not known (other people's models) or has
    no meaning.

    Attributes
    ----------
    name : unique in the pool; names files and rows of tables
    network : timm name with its tag, or without where ``weights`` names a file; or one of `oodlib.models.small_vit`
    weights : file below the folder of weights; empty for the tag's own, and for networks trained here
    pretraining : data set, for example "in21k", "in1k", "clip-openai", "unicode", "tiny-imagenet", "cifar10"
    objective : of the pretraining: "sigmoid", "softmax", "cosine" (CLIP-like)
    aug : augmentation of the pretraining; weight_decay, dropout, stochastic_depth : of the pretraining
    ft_lr : peak learning rate of the finetuning
    head : "raw" features or "unit" (L2-normalised) features go into the linear head
    penalty : weight of the feature-space regulariser in the finetuning
    resolution : side of the input in pixels
    seed : of pretraining and finetuning
    role : "" for a cell of the study, "pretrained" for a checkpoint without finetuning (its head is zero), "member" for
        a soup's ingredient, "soup-uniform" and "soup-greedy" for the soups
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
        """Names the pretrained checkpoint: rows that share it are finetunes of one model, not
        independent.
        """
        architecture = self.network.partition(".")[0].removesuffix(f"_{self.resolution}")
        known = (
            architecture,
            self.pretraining,
            self.objective,
            self.aug,
            self.weight_decay,
            self.dropout,
            self.stochastic_depth,
        )
        parts = [str(part) for part in known if part not in ("", None)]
        return "-".join([*parts, f"s{self.seed}"]) if self.objective else self.name


_COLUMNS = [field.name for field in fields(PoolRow)]
_NUMBERS: dict[str, type[float] | type[int]] = {
    "weight_decay": float,
    "dropout": float,
    "stochastic_depth": float,
    "ft_lr": float,
    "penalty": float,
    "resolution": int,
    "seed": int,
}


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
    OodlibError : no such file, a column is missing or unknown, a cell that is no number, no name or network, a name
        that occurs twice
    """
    path = find_pool(name)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, table = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OodlibError(f"{path}: the pool cannot be read ({error}).") from error
    missing, unknown = (
        [c for c in _COLUMNS if c not in columns],
        [c for c in columns if c not in _COLUMNS],
    )
    if missing or unknown:
        problem = (
            f"the column {missing[0]} is missing"
            if missing
            else f"the column {unknown[0]!r} is unknown"
        )
        raise OodlibError(
            f"{path}: {problem}. A pool has the columns {', '.join(_COLUMNS)}; cells may be empty."
        )
    rows = tuple(_row(path, number, cells) for number, cells in enumerate(table, 2))
    names = [row.name for row in rows]
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice or not rows:
        raise OodlibError(
            f"{path}: {f'duplicate name {twice}' if twice else 'the pool has no row'}."
        )
    return rows


def write_pool(path: Path, rows: Iterable[PoolRow]) -> None:
    """Write a table that `read_pool` reads."""
    lines = [",".join(_COLUMNS)]
    lines += [
        ",".join("" if (v := getattr(row, c)) is None else str(v) for c in _COLUMNS) for row in rows
    ]
    write_text(path, "\n".join(lines) + "\n")


def _row(path: Path, number: int, cells: dict[str, str | None]) -> PoolRow:
    where = f"{path}, line {number}"
    if None in cells or None in cells.values():
        raise OodlibError(f"{where}: {len(_COLUMNS)} cells are needed, one a column.")
    values: dict[str, object] = {}
    for column in _COLUMNS:
        text = (cells[column] or "").strip()
        if column not in _NUMBERS:
            values[column] = text
        elif text:
            try:
                values[column] = _NUMBERS[column](text)
            except ValueError as error:
                raise OodlibError(
                    f"{where}: {column} must be a number or empty, got {text!r}."
                ) from error
    if not values["name"] or not values["network"]:
        raise OodlibError(f"{where}: a model needs a name and a network.")
    if set(str(values["name"])) & set('/\\:*?"<>| '):
        raise OodlibError(f"{where}: the name {values['name']!r} must be fit for a file name.")
    return PoolRow(**values)  # type: ignore[arg-type]
