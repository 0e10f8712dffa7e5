"""Images on disk: lists in OpenOOD's format or plain folders, decoded by worker processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from oodlib.errors import OodlibError

if TYPE_CHECKING:
    from PIL import Image


Transform = Callable[[Any], Any]  # of a PIL image into what the network takes
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def read_list(list_file: str | os.PathLike[str]) -> list[tuple[str, int]]:
    """Rows ``path label`` of an image list in OpenOOD's format, split at the first space only.

    Raises
    ------
    OodlibError : the list is missing or empty, or a label is not an integer (OpenOOD's ``_mos``
        lists hold a mapping there)
    """
    try:
        text = Path(list_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OodlibError(
            f"{list_file}: the image list cannot be read ({error}). Check its path."
        ) from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            path, _, label = line.strip().partition(" ")
            try:
                rows.append((path, int(label)))
            except ValueError as error:
                raise OodlibError(
                    f"{list_file}, line {number}: expected 'path label' with an integer label, got "
                    f"{line.strip()[:80]!r}. Use a list in OpenOOD's format."
                ) from error
    if not rows:
        raise OodlibError(f"{list_file}: the image list is empty. Check the file.")
    return rows


def _folder_rows(root: Path) -> list[tuple[str, int]]:
    """All images below a folder, sorted; label = rank of the first-level folder, -1 without one."""
    paths = sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise OodlibError(
            f"{root}: no image was found in this folder. Check the path, and that it was unpacked."
        )
    classes = sorted({p.parts[0] for p in paths if len(p.parts) > 1})
    rank = {name: i for i, name in enumerate(classes)}
    return [(p.as_posix(), rank[p.parts[0]] if len(p.parts) > 1 else -1) for p in paths]


class ImageList(Dataset[tuple[Any, int]]):
    """Images on disk with labels, decoded on access and passed through any transform of PIL images.

    Parameters
    ----------
    root : folder that the list's paths are relative to
    rows : the list file, or (path, label) pairs; by default every image below ``root`` (label =
        rank of its first-level folder)
    transform : for example torchvision's ``weights.transforms()``; without it, items are PIL images
    name : for messages and provenance

    Attributes
    ----------
    paths, labels : in the order of the rows; ``labels`` is (n,) int64

    Raises
    ------
    OodlibError : empty list, a listed file is missing, or (on access) an image does not decode
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        rows: str | os.PathLike[str] | Sequence[tuple[str, int]] | None = None,
        *,
        transform: Transform | None = None,
        name: str = "",
    ):
        self.root, self.transform = Path(root), transform
        self.name = name or self.root.name
        origin = f"{self.root} (list)"
        if rows is None:
            rows = _folder_rows(self.root)
        elif isinstance(rows, str | os.PathLike):
            origin, rows = str(rows), read_list(rows)
        if not rows:
            raise OodlibError(f"ImageList {self.name}: no rows were given. Check list or filter.")
        self.paths = [path for path, _ in rows]
        self.labels = np.array([label for _, label in rows], dtype=np.int64)
        missing = [path for path in self.paths if not (self.root / path).is_file()]
        if missing:
            raise OodlibError(
                f"{origin}: {len(missing)} of {len(self.paths)} listed files are missing, the "
                f"first is {self.root / missing[0]}. Check the image root, or unpack the archive "
                "again."
            )

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the rows, the files' sizes and times, and the transform."""
        digest = hashlib.sha256(repr(self.transform).encode())
        for path, label in zip(self.paths, self.labels, strict=True):
            stat = (self.root / path).stat()
            digest.update(f"{path} {label} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def picture(self, index: int) -> Image.Image:
        """An image as it is on disk, in RGB; OodlibError if it does not decode."""
        from PIL import Image

        path = self.root / self.paths[index]
        try:
            with Image.open(path) as picture:
                return picture.convert("RGB")
        except Exception as error:  # Pillow raises many types for broken data
            raise OodlibError(
                f"{path}: the image cannot be decoded ({type(error).__name__}). Copy or download "
                "it again."
            ) from error

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.picture(index)
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


def image_loader(
    images: ImageList, *, batch_size: int = 64, workers: int | None = None
) -> DataLoader:
    """Batches in the list's order, decoded by worker processes (default: a core each, up to 16)."""
    if images.transform is None:
        raise OodlibError(
            f"image_loader: {images.name} has no transform, so its images cannot be stacked. "
            "Give ImageList the model's transform."
        )
    workers = min(16, os.cpu_count() or 1) if workers is None else workers
    return DataLoader(
        images,
        batch_size=batch_size,
        num_workers=workers,
        shuffle=False,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )
