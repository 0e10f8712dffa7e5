"""Where a sweep finds models and images: pools trained here, and ImageNet models on disk.

A source is small and can be pickled; what it opens is opened in the process that does the job.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from oodlib.errors import OodlibError
from oodlib.studies.vits.pool_table import PoolRow
from oodlib.workspace import code_hash, data_root

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from oodlib.data.images import ImageSet


FIT, UNIT_TESTS = "fit", "unit_tests"
# of `oodlib.data.imagenet`, whose import takes seconds
IMAGENET = (FIT, "id", "ninco", "ssb-hard", "inaturalist", "textures", "openimage-o", UNIT_TESTS)
_N_UNIT = 30  # pictures of each unit test for 32-pixel models
_PIECE = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A model in evaluation mode with the images of one split, for `extract.stream`.

    Attributes
    ----------
    data : an `ImageSet`, with ``mean`` and ``std`` of the network; or batches that went through its
        transform
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
        """Names: "fit" (ID training images), "id" (ID test images), then the OOD sets."""

    def settings(self) -> dict[str, Any]:
        """What decides the results, besides weights and images; part of every job's key."""

    def counts(self) -> dict[str, int]:
        """Images of each split, as far as known without having them."""

    def manifest(self, split: str) -> str:
        """Hash of the split's images; OodlibError where they are not available."""

    def weights(self, row: PoolRow) -> str:
        """Hash of the model's file, "" where it has none or it is missing (the job will say so)."""

    def open(self, row: PoolRow, split: str) -> Opened:
        """Model and images of one job."""


def find_source(
    pool: Path, *, data: Path | None, weights: Path | None, workers: int, sizes: dict[str, str]
) -> Source:
    """The source of a pool: models trained here for ``embedded*`` and ``cifar*``, else ImageNet's.

    sizes : ``n_fit``, ``n_test``, ``n_ood`` of the pools that are trained here, as typed, where
        they differ from the study's

    OodlibError : another name, or not a whole number
    """
    known = next((name for name in ("embedded", "cifar") if pool.stem.startswith(name)), None)
    unknown = sorted(set(sizes) - ({"n_fit", "n_test", "n_ood"} if known else set()))
    if unknown:
        raise OodlibError(
            f"sweep: the pool {pool.stem} has no parameter {unknown[0]!r}. The pools trained here "
            "have n_fit, n_test and n_ood; the ImageNet pools are judged on whole sets."
        )
    for name, text in sizes.items():
        if not text.isdigit():
            raise OodlibError(f"sweep: {name} must be a number of images, got {text!r}.")
    if known is None:
        return ImagenetSource(data, weights, workers)
    from oodlib.studies.vits.recipes import BUDGETS

    budget = BUDGETS[known]
    study = {"n_fit": budget.n_fit, "n_test": budget.n_test, "n_ood": budget.n_ood}
    return TrainedSource(known, **study | {name: int(text) for name, text in sizes.items()})


@dataclass(frozen=True)
class TrainedSource:
    """The ``embedded`` and ``cifar`` pools: `oodlib.studies.vits.trained` and `pool_sets`."""

    files: ClassVar[bool] = False
    per_class: ClassVar[int] = 100
    pool: str
    n_fit: int
    n_test: int
    n_ood: int

    def splits(self) -> tuple[str, ...]:
        from oodlib.studies.vits.image_sets import NEAR

        return (FIT, "id", *NEAR[self.pool], UNIT_TESTS)

    def settings(self) -> dict[str, Any]:
        code = code_hash("oodlib.studies.vits.trained")
        return {"pool": self.pool, **self._sizes(), "code": code}

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
        unit_tests = 17 * min(_N_UNIT, self.n_test)
        return {FIT: self.n_fit, "id": self.n_test, **near, UNIT_TESTS: unit_tests}

    def manifest(self, split: str) -> str:
        return self._images(split).fingerprint

    def weights(self, row: PoolRow) -> str:
        from oodlib.studies.vits.trained import load_row

        if self.pool == "embedded":
            return ""  # trained on demand: the code and the row decide them
        try:
            return load_row(row).provenance["sha256"]
        except OodlibError:
            return ""

    def open(self, row: PoolRow, split: str) -> Opened:
        from oodlib.studies.vits.trained import load_row

        loaded = load_row(row)
        return Opened(
            model=loaded.model,
            data=self._images(split),
            transform=f"(pixel / 255 - {loaded.mean}) / {loaded.std}",
            mean=loaded.mean,
            std=loaded.std,
            provenance={
                "file": loaded.provenance["sha256"],
                "command": loaded.provenance["command"],
            },
        )

    def _sizes(self) -> dict[str, int]:
        return {"n_fit": self.n_fit, "n_test": self.n_test, "n_ood": self.n_ood}

    def _images(self, split: str) -> ImageSet:
        from oodlib.studies.vits.scored_sets import scored_sets

        return scored_sets(self.pool, **self._sizes())[split]


@dataclass(frozen=True)
class ImagenetSource:
    """ImageNet classifiers, on the sets of the paper profile and the unit tests at native size.

    Attributes
    ----------
    data : folder with the trees that ``oodlib data --profile paper`` describes; None: the data root
    models : folder of weight files; None for those of `imagenet_models.find_weights`
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

        sets = {FIT: "imagenet-1k-train", "id": "imagenet-1k", **{s: s for s in IMAGENET[2:-1]}}
        counts = {split: max(PAPER_SETS[name].counts.values()) for split, name in sets.items()}
        return {**counts, UNIT_TESTS: 17 * 400}

    def manifest(self, split: str) -> str:
        """Hash over paths, labels and sizes, not times: the same for every copy of the set."""
        from oodlib.data.imagenet import imagenet_split

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
            return ""

    def open(self, row: PoolRow, split: str) -> Opened:
        import timm

        from oodlib.data.folders import image_loader
        from oodlib.data.imagenet import imagenet_split
        from oodlib.studies.vits.imagenet_models import load_tagged

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
