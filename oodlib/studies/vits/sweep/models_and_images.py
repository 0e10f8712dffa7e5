"""Where a sweep finds models and images: one class for the pools trained here, one for ImageNet
models on disk.

A source is small and can be pickled; what it opens is opened in the process that does the job.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from oodlib.errors import OodlibError
from oodlib.files import atomic_folder, write_json
from oodlib.studies.vits.pool_table import PoolRow
from oodlib.workspace import code_hash

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from oodlib.data.images import ImageSet

__all__ = ["FIT", "ImagenetSource", "Opened", "Source", "TrainedSource", "find_source"]

FIT = "fit"
# of `oodlib.data.imagenet`, whose import takes seconds
IMAGENET = (FIT, "id", "ninco", "ssb-hard", "inaturalist", "textures", "openimage-o", "unit_tests")
UNIT_TESTS = "unit_tests"
_N_UNIT = 30  # pictures of each unit test for 32-pixel models
_PIECE = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A model in evaluation mode with the images of one split, ready for
    `oodlib.features.extract.stream`.

    Attributes
    ----------
    data : an `ImageSet`, with ``mean`` and ``std`` of the network; or batches that went through its transform
    transform : what becomes of the pixels, in words or as torchvision prints it
    provenance : where the model comes from, for the record
    """

    model: nn.Module
    data: ImageSet | DataLoader
    transform: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(getattr(self.data, "dataset", self.data))


class Source(Protocol):
    """What a sweep asks of a pool's models and images.

    ``files`` : whether images are decoded from files, so that jobs want a GPU and several CPU cores
    ``per_class`` : training features of each class that a `Reference` keeps
    """

    files: ClassVar[bool]
    per_class: ClassVar[int]

    def splits(self) -> tuple[str, ...]:
        """ "fit" (ID training images), "id" (ID test images), then the OOD sets."""

    def settings(self) -> dict[str, Any]:
        """What decides the results and shows without weights and images; part of every job's key."""

    def counts(self) -> dict[str, int]:
        """Images of each split, as far as known without having them."""

    def manifest(self, split: str) -> str:
        """Hash of the split's images; OodlibError where they are not available."""

    def weights(self, row: PoolRow) -> str:
        """Hash of the model's file, "" where it has none or it is not there."""

    def open(self, row: PoolRow, split: str) -> Opened:
        """Model and images of one job."""


def find_source(
    pool: Path,
    store: Path,
    *,
    data: Path | None,
    weights: Path | None,
    workers: int,
    sizes: dict[str, str],
) -> Source:
    """The source of a pool: files called ``embedded*`` and ``cifar*`` are of models trained here,
    others of ImageNet's.

    ``store`` : folder for images that are drawn once for all models ``sizes`` : ``n_fit``,
    ``n_test``, ``n_ood`` of the pools that are trained here, as typed, where not as in the study

    OodlibError: another name, or no whole number.
    """
    known = next((name for name in ("embedded", "cifar") if pool.stem.startswith(name)), None)
    unknown = sorted(set(sizes) - ({"n_fit", "n_test", "n_ood"} if known else set()))
    if unknown:
        raise OodlibError(
            f"sweep: the pool {pool.stem} has no parameter {unknown[0]!r}. The pools trained here "
            "have n_fit, n_test and n_ood; the ImageNet pools are judged on whole sets."
        )
    wrong = next((name for name, text in sizes.items() if not text.isdigit()), None)
    if wrong:
        raise OodlibError(f"sweep: {wrong} must be a number of images, got {sizes[wrong]!r}.")
    if known is None:
        return ImagenetSource(data, weights, workers)
    from oodlib.studies.vits.trained import BUDGETS

    budget = BUDGETS[known]
    return TrainedSource(
        known,
        store,
        **{
            "n_fit": budget.n_fit,
            "n_test": budget.n_test,
            "n_ood": budget.n_ood,
            **{name: int(text) for name, text in sizes.items()},
        },
    )


@dataclass(frozen=True)
class TrainedSource:
    """The ``embedded`` and ``cifar`` pools: `oodlib.studies.vits.trained` and
    `oodlib.studies.vits.image_sets`.

    Attributes
    ----------
    pool : its name
    store : folder for images that are drawn once for all models
    n_fit, n_test, n_ood : as for `oodlib.studies.vits.image_sets.pool_sets`
    """

    files: ClassVar[bool] = False
    per_class: ClassVar[int] = 100
    pool: str
    store: Path
    n_fit: int
    n_test: int
    n_ood: int

    def splits(self) -> tuple[str, ...]:
        from oodlib.studies.vits.image_sets import NEAR

        return (FIT, "id", *NEAR[self.pool], UNIT_TESTS)

    def settings(self) -> dict[str, Any]:
        return {
            "pool": self.pool,
            "n_fit": self.n_fit,
            "n_test": self.n_test,
            "n_ood": self.n_ood,
            "code": code_hash("oodlib.studies.vits.trained"),
        }

    def counts(self) -> dict[str, int]:
        from oodlib.data import EMBEDDED
        from oodlib.data.cifar import tiny_imagenet_classes
        from oodlib.studies.vits.image_sets import NEAR, OVERLAPS

        if self.pool == "embedded":
            classes = {name: EMBEDDED[name].classes for name in NEAR["embedded"]}
        else:
            seen = len({c.cifar100_class for c in tiny_imagenet_classes()} - {"", *OVERLAPS})
            classes = {"cifar100-seen": seen, "cifar100-unseen": 100 - len(OVERLAPS) - seen}
        near = {name: self.n_ood * n for name, n in classes.items()}
        return {
            FIT: self.n_fit,
            "id": self.n_test,
            **near,
            UNIT_TESTS: 17 * min(_N_UNIT, self.n_test),
        }

    def manifest(self, split: str) -> str:
        return json.loads((self._drawn() / "manifest.json").read_text(encoding="utf-8"))[split]

    def weights(self, row: PoolRow) -> str:
        from oodlib.studies.vits.trained import load_row

        if self.pool == "embedded":
            return ""  # trained on demand: the code and the row decide them
        try:
            return load_row(row).provenance["sha256"]
        except OodlibError:
            return ""  # the job will say so

    def open(self, row: PoolRow, split: str) -> Opened:
        import numpy as np

        from oodlib.data.images import ImageSet
        from oodlib.studies.vits.trained import load_row

        drawn = self._drawn()
        images, labels = (
            np.load(drawn / f"{split}.{kind}.npy", mmap_mode="r") for kind in ("images", "labels")
        )
        loaded = load_row(row)
        return Opened(
            model=loaded.model,
            data=ImageSet(split, "sweep", images, np.asarray(labels)),
            transform=f"(pixel / 255 - {loaded.mean}) / {loaded.std}",
            mean=loaded.mean,
            std=loaded.std,
            provenance={
                "file": loaded.provenance["sha256"],
                "command": loaded.provenance["command"],
            },
        )

    def _drawn(self) -> Path:
        """Folder of the image sets, drawn by the first process that asks for them."""
        import numpy as np
        from filelock import FileLock

        from oodlib.studies.vits.image_sets import pool_sets
        from oodlib.studies.vits.trained import check_test_images

        key = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]
        folder = self.store / "images" / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                sets = pool_sets(
                    self.pool,
                    n_fit=self.n_fit,
                    n_test=self.n_test,
                    n_ood=self.n_ood,
                    n_unit=_N_UNIT,
                )
                check_test_images(self.pool, sets)
                with atomic_folder(folder) as temporary:
                    for split in self.splits():
                        np.save(temporary / f"{split}.images.npy", sets[split].images)
                        np.save(temporary / f"{split}.labels.npy", sets[split].labels)
                    write_json(
                        temporary / "manifest.json",
                        {split: sets[split].fingerprint for split in self.splits()},
                    )
        return folder


@dataclass(frozen=True)
class ImagenetSource:
    """ImageNet classifiers by timm tag or file, on the sets of the paper profile and the unit tests
    at native size.

    Attributes
    ----------
    data : folder with the trees that ``oodlib data --profile paper`` describes; None for the data root
    models : folder of weight files; None for the folders of `oodlib.studies.vits.imagenet_models.find_weights`
    workers : processes that decode images
    """

    files: ClassVar[bool] = True
    per_class: ClassVar[int] = 50
    data: Path | None
    models: Path | None
    workers: int

    def splits(self) -> tuple[str, ...]:
        return IMAGENET

    def settings(self) -> dict[str, Any]:
        return {"pool": "imagenet"}

    def counts(self) -> dict[str, int]:
        from oodlib.data.imagenet import PAPER_SETS

        sets = {FIT: "imagenet-1k-train", "id": "imagenet-1k"}
        found = {
            split: max(PAPER_SETS[sets.get(split, split)].counts.values())
            for split in IMAGENET[:-1]
        }
        return {**found, UNIT_TESTS: 17 * 400}

    def manifest(self, split: str) -> str:
        """Hash over paths, labels and sizes, not times: the same for every copy of the set."""
        from oodlib.data.imagenet import imagenet_split
        from oodlib.workspace import data_root

        images = imagenet_split(split, data_root(self.data))
        digest = hashlib.sha256()
        for path, label in zip(images.paths, images.labels, strict=True):
            digest.update(f"{path} {label} {(images.root / path).stat().st_size}\n".encode())
        return digest.hexdigest()

    def weights(self, row: PoolRow) -> str:
        from oodlib.studies.vits.imagenet_models import find_weights

        try:
            return _sampled(find_weights(row, self.models)) if row.weights else ""
        except OodlibError:
            return ""  # the job will say so

    def open(self, row: PoolRow, split: str) -> Opened:
        import timm

        from oodlib.data.folders import image_loader
        from oodlib.data.imagenet import imagenet_split
        from oodlib.studies.vits.imagenet_models import load_tagged
        from oodlib.workspace import data_root

        model, transform = load_tagged(row, weights=self.models)
        images = imagenet_split(split, data_root(self.data), transform)
        return Opened(
            model=model,
            data=image_loader(images, workers=self.workers),
            transform=repr(transform),
            provenance={"network": row.network, "file": row.weights, "timm": timm.__version__},
        )


def _sampled(path: Path) -> str:
    """Hash of a file's size and of three pieces of it: two trained networks differ everywhere."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in (0, max(0, size // 2 - _PIECE), max(0, size - _PIECE)):
            file.seek(start)
            digest.update(file.read(_PIECE))
    return digest.hexdigest()
