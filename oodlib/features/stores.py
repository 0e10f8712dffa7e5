"""Where the banks of a pass are collected: in memory, or on disk, where a pass can be resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank, check_head, write_checksums
from oodlib.files import atomic_folder, read_json, write_json


class MemoryStore:
    """Arrays of N rows, filled bank by bank."""

    def __init__(self, rows: int):
        self.rows, self.done = rows, 0
        self.arrays: dict[str, NDArray[Any]] = {}

    def write(self, bank: FeatureBank) -> None:
        """The next rows."""
        stop = self.done + len(bank)
        if stop > self.rows:
            raise OodlibError(
                f"extract: the loader gave more rows than the {self.rows} of its dataset. Use a "
                "loader that gives each row once (no sampler that repeats)."
            )
        for name, values in self._arrays(bank).items():
            array = self._array(name, (self.rows, *values.shape[1:]), values.dtype)
            array[self.done : stop] = values
            if isinstance(array, np.memmap):
                array.flush()
        self.done, self.head = stop, bank.head

    def _arrays(self, bank: FeatureBank) -> dict[str, NDArray[Any]]:
        return bank.arrays()

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        if name not in self.arrays:
            self.arrays[name] = np.empty(shape, dtype)
        return self.arrays[name]


class DiskStore(MemoryStore):
    """The same on disk, where ``progress.json`` counts the safe rows: a pass can be resumed.

    logits : False leaves them out, after a check that head and features give them (rtol 1e-4)
    """

    def __init__(self, folder: Path, rows: int, *, logits: bool = True):
        super().__init__(rows)
        self.folder, self.logits, self.progress = folder, logits, folder / "progress.json"
        folder.mkdir(exist_ok=True)
        if self.progress.exists():
            self.done = read_json(self.progress, "extract", "Delete its folder.")["rows"]

    def write(self, bank: FeatureBank) -> None:
        """The next rows, safe on disk when it returns."""
        super().write(bank)
        np.save(self.folder / "weight.npy", bank.head.weight)
        np.save(self.folder / "bias.npy", bank.head.bias)
        write_json(self.progress, {"rows": self.done})

    def _arrays(self, bank: FeatureBank) -> dict[str, NDArray[Any]]:
        arrays = bank.arrays()
        if not self.logits:
            check_head(bank.head, bank.features, arrays.pop("logits"), rtol=1e-4, rows=len(bank))
        return arrays

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        # opened for each bank, so that mapped pages do not pile up in memory
        path = self.folder / f"{name}.npy"
        if self.done == 0:
            return np.lib.format.open_memmap(path, "w+", dtype, shape)
        return np.lib.format.open_memmap(path, "r+")

    def seal(self, meta: Mapping[str, Any]) -> None:
        """Turn the folder into a bank that `FeatureBank.load` opens."""
        self.progress.unlink(missing_ok=True)
        write_checksums(self.folder, meta)

    def finish(self, path: Path, meta: Mapping[str, Any]) -> None:
        """`seal`, then move the folder to ``path``."""
        self.seal(meta)
        with atomic_folder(path) as temporary:
            for file in self.folder.iterdir():
                file.replace(temporary / file.name)
        self.folder.rmdir()
