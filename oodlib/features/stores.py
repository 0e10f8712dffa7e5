"""Where the banks of a pass are collected: in memory, or on disk so that an interrupted pass goes
on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank, Head, check_head, write_checksums
from oodlib.files import atomic_folder, write_json

__all__ = ["DiskStore", "MemoryStore"]


def _arrays(bank: FeatureBank) -> dict[str, np.ndarray]:
    assert bank.labels is not None  # every batch brings them
    return {
        "features": bank.features,
        "logits": bank.logits,
        "labels": bank.labels,
        **{f"layer.{name}": value for name, value in bank.layers.items()},
    }


def _check_room(store: MemoryStore | DiskStore, shard: FeatureBank) -> None:
    if store.done + len(shard) > store.rows:
        raise OodlibError(
            f"extract: the loader gave more rows than the {store.rows} of its dataset. Use a "
            "loader that gives each row once (no sampler that repeats)."
        )


class MemoryStore:
    """Arrays of N rows, filled shard by shard."""

    def __init__(self, rows: int):
        self.rows, self.done = rows, 0
        self.arrays: dict[str, np.ndarray] = {}
        self.head = Head(np.empty((0, 0)), np.empty(0))

    def write(self, shard: FeatureBank) -> None:
        _check_room(self, shard)
        stop, self.head = self.done + len(shard), shard.head
        for name, value in _arrays(shard).items():
            if name not in self.arrays:
                self.arrays[name] = np.empty((self.rows, *value.shape[1:]), value.dtype)
            self.arrays[name][self.done : stop] = value
        self.done = stop


class DiskStore:
    """The same on disk. The folder survives a kill; ``progress.json`` counts the safe rows.

    logits : False leaves them out, after a check that head and features give them
    """

    def __init__(self, folder: Path, rows: int, *, logits: bool = True):
        self.folder, self.rows, self.logits = folder, rows, logits
        folder.mkdir(exist_ok=True)
        progress = folder / "progress.json"
        self.done = json.loads(progress.read_text())["rows"] if progress.exists() else 0

    def write(self, shard: FeatureBank) -> None:
        _check_room(self, shard)
        if not self.logits:
            check_head(shard.head, shard.features, shard.logits, rtol=1e-4, rows=len(shard))
        stop = self.done + len(shard)
        for name, value in _arrays(shard).items():
            if name == "logits" and not self.logits:  # the head gives them
                continue
            path = self.folder / f"{name}.npy"
            # opened for each shard, so that mapped pages do not pile up in memory
            if self.done == 0:
                array = np.lib.format.open_memmap(
                    path, "w+", value.dtype, (self.rows, *value.shape[1:])
                )
            else:
                array = np.lib.format.open_memmap(path, "r+")
            array[self.done : stop] = value
            array.flush()
        self.done = stop
        np.save(self.folder / "weight.npy", shard.head.weight)
        np.save(self.folder / "bias.npy", shard.head.bias)
        write_json(self.folder / "progress.json", {"rows": stop})

    def seal(self, meta: dict[str, Any]) -> None:
        """Turn the folder into a bank that `FeatureBank.load` opens."""
        (self.folder / "progress.json").unlink(missing_ok=True)
        write_checksums(self.folder, meta)

    def finish(self, path: Path, meta: dict[str, Any]) -> None:
        """`seal`, then move the folder to ``path``."""
        self.seal(meta)
        with atomic_folder(path) as temporary:
            for file in self.folder.iterdir():
                file.replace(temporary / file.name)
        self.folder.rmdir()
