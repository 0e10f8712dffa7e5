"""Where a sweep finds models and images: one class for the pools trained here, one for ImageNet models on disk.

A source is small and can be pickled; what it opens is opened in the process that does the job.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from oodlib.errors import OodlibError
from oodlib.files import atomic_folder, sha256, write_json
from oodlib.vits.pools import PoolRow, read_pool

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from oodlib.data.image_lists import ImageList
    from oodlib.data.images import ImageSet

__all__ = ["FIT", "ImagenetSource", "Opened", "Source", "TrainedSource", "find_source"]

FIT = "fit"
# split -> name in `oodlib.data.image_lists.PAPER_SETS`
IMAGENET = {FIT: "imagenet-1k-train", "id": "imagenet-1k"} | {name: name for name in (
    "ninco", "ssb-hard", "inaturalist", "textures", "openimage-o")}
UNIT_TESTS = "unit_tests"
_N_UNIT, _CANVAS = 400, (375, 500)       # of each unit test, as in the original
_N_UNIT_SMALL = 50                       # for 32-pixel models
_PIECE = 1 << 20


@dataclass(frozen=True, eq=False)
class Opened:
    """A model in evaluation mode with the images of one split, ready for `oodlib.extraction.stream`.

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
        """"fit" (ID training images), "id" (ID test images), then the OOD sets."""

    def settings(self) -> dict[str, Any]:
        """What decides the results and shows without weights and images; part of every job's key."""

    def counts(self) -> dict[str, int]:
        """Images of each split, as far as known without having them."""

    def manifest(self, split: str) -> str:
        """Hash of the split's images; OodlibError where they are not at hand."""

    def weights(self, row: PoolRow) -> str:
        """Hash of the model's file, "" where it has none or it is not there."""

    def open(self, row: PoolRow, split: str) -> Opened:
        """Model and images of one job."""


def find_source(pool: Path, store: Path, *, data: Path | None, weights: Path | None, workers: int,
                sizes: dict[str, int]) -> Source:
    """The source of a pool: files called ``embedded*`` and ``cifar*`` are of models trained here, others of ImageNet's.

    ``store`` : folder for images that are drawn once for all models
    ``sizes`` : ``n_fit``, ``n_test``, ``n_ood`` of the pools that are trained here, where not as in the study
    """
    known = next((name for name in ("embedded", "cifar") if pool.stem.startswith(name)), None)
    unknown = sorted(set(sizes) - ({"n_fit", "n_test", "n_ood"} if known else set()))
    if unknown:
        raise OodlibError(f"sweep: the pool {pool.stem} has no parameter {unknown[0]!r}. The pools trained here have "
                          "n_fit, n_test and n_ood; the ImageNet pools are judged on whole sets.")
    if known is None:
        return ImagenetSource(data, weights, store, workers)
    from oodlib.vits.trained import BUDGETS

    budget = BUDGETS[known]
    return TrainedSource(known, pool, store, **{"n_fit": budget.n_fit, "n_test": budget.n_test, "n_ood": budget.n_ood,
                                                **sizes})


@dataclass(frozen=True)
class TrainedSource:
    """The ``embedded`` and ``cifar`` pools: `oodlib.vits.trained` and `oodlib.vits.sets`.

    Attributes
    ----------
    pool, table : its name and its file
    n_fit, n_test, n_ood : as for `oodlib.vits.sets.pool_sets`
    """

    files: ClassVar[bool] = False
    per_class: ClassVar[int] = 100
    pool: str
    table: Path
    store: Path
    n_fit: int
    n_test: int
    n_ood: int

    def splits(self) -> tuple[str, ...]:
        from oodlib.vits.sets import NEAR

        return (FIT, "id", *NEAR[self.pool], UNIT_TESTS)

    def settings(self) -> dict[str, Any]:
        return {"pool": self.pool, "n_fit": self.n_fit, "n_test": self.n_test, "n_ood": self.n_ood,
                "code": _training_code()}

    def counts(self) -> dict[str, int]:
        from oodlib.data import EMBEDDED
        from oodlib.data.protocol import tiny_imagenet_classes
        from oodlib.vits.sets import OVERLAPS

        if self.pool == "embedded":
            classes = {name: info.classes for name, info in EMBEDDED.items()}
        else:
            seen = len({c.cifar100_class for c in tiny_imagenet_classes()} - {"", *OVERLAPS})
            classes = {"cifar100-seen": seen, "cifar100-unseen": 100 - len(OVERLAPS) - seen}
        near = {split: self.n_ood * classes[split] for split in self.splits()[2:-1]}
        return {FIT: self.n_fit, "id": self.n_test, **near, UNIT_TESTS: 17 * min(_N_UNIT_SMALL, self.n_test)}

    def manifest(self, split: str) -> str:
        return json.loads((self._drawn() / "manifest.json").read_text(encoding="utf-8"))[split]

    def weights(self, row: PoolRow) -> str:
        from oodlib.vits.trained import load_row

        if self.pool == "embedded":
            return ""                                 # trained on demand: the code and the row decide them
        try:
            return load_row(row).provenance["sha256"]
        except OodlibError:
            return ""                                 # the job will say so

    def open(self, row: PoolRow, split: str) -> Opened:
        import numpy as np

        from oodlib.data.images import ImageSet
        from oodlib.vits.trained import load_row

        drawn = self._drawn()
        images, labels = (np.load(drawn / f"{split}.{kind}.npy", mmap_mode="r") for kind in ("images", "labels"))
        loaded = load_row(row, rows=read_pool(self.table))
        return Opened(loaded.model, ImageSet(split, "sweep", images, np.asarray(labels)),
                      f"(pixel / 255 - {loaded.mean}) / {loaded.std}", loaded.mean, loaded.std,
                      {"file": loaded.provenance["sha256"], "command": loaded.provenance["command"]})

    def _drawn(self) -> Path:
        """Folder of the image sets, drawn by the first process that asks for them."""
        def draw(folder: Path) -> None:
            import numpy as np

            from oodlib.vits.sets import pool_sets

            sets = pool_sets(self.pool, n_fit=self.n_fit, n_test=self.n_test, n_ood=self.n_ood, n_unit=_N_UNIT_SMALL)
            for split in self.splits():
                np.save(folder / f"{split}.images.npy", sets[split].images)
                np.save(folder / f"{split}.labels.npy", sets[split].labels)
            write_json(folder / "manifest.json", {split: sets[split].fingerprint for split in self.splits()})

        return _made_once(self.store / "images", self.settings(), draw)


@dataclass(frozen=True)
class ImagenetSource:
    """ImageNet classifiers by timm tag or file, on the sets of the paper profile and the unit tests at native size.

    Attributes
    ----------
    data : folder with the trees that ``oodlib data --profile paper`` describes; None for the data root
    models : folder of weight files; None for the folders of `oodlib.vits.tagged.find_weights`
    workers : processes that decode images
    """

    files: ClassVar[bool] = True
    per_class: ClassVar[int] = 50
    data: Path | None
    models: Path | None
    store: Path
    workers: int

    def splits(self) -> tuple[str, ...]:
        return (*IMAGENET, UNIT_TESTS)

    def settings(self) -> dict[str, Any]:
        return {"pool": "imagenet", "unit_tests": [_N_UNIT, *_CANVAS]}

    def counts(self) -> dict[str, int]:
        from oodlib.data.image_lists import PAPER_SETS

        return {split: max(PAPER_SETS[name].counts.values()) for split, name in IMAGENET.items()} | {
            UNIT_TESTS: 17 * _N_UNIT}

    def manifest(self, split: str) -> str:
        return _manifest(self._listed("id" if split == UNIT_TESTS else split, None))

    def weights(self, row: PoolRow) -> str:
        from oodlib.vits.tagged import find_weights

        try:
            return _sampled(find_weights(row, self.models)) if row.weights else ""
        except OodlibError:
            return ""                                    # the job will say so

    def open(self, row: PoolRow, split: str) -> Opened:
        import timm

        from oodlib.data.image_lists import image_loader
        from oodlib.vits.tagged import load_tagged

        model, transform = load_tagged(row, weights=self.models)
        images = self._unit_tests(transform) if split == UNIT_TESTS else self._listed(split, transform)
        return Opened(model, image_loader(images, workers=self.workers), repr(transform),
                      provenance={"network": row.network, "file": row.weights, "timm": timm.__version__})

    def _listed(self, split: str, transform: Callable[[Any], Any] | None) -> ImageList:
        """A set with the classes of its folders as labels: OpenOOD's lists say -1 for every OOD image."""
        from oodlib.data.image_lists import PAPER_SETS, ImageList, open_paper_set
        from oodlib.data.prepare import data_root

        name = IMAGENET[split]
        images = open_paper_set(name, data_root(self.data), transform=transform)
        if (images.labels >= 0).all() or "/<" not in PAPER_SETS[name].tree:
            return images
        folders = [Path(path).parent.name for path in images.paths]
        rank = {folder: i for i, folder in enumerate(sorted(set(folders)))}
        rows = [(path, rank[folder]) for path, folder in zip(images.paths, folders, strict=True)]
        return ImageList(images.root, rows, transform=transform, name=name)

    def _unit_tests(self, transform: Callable[[Any], Any] | None) -> ImageList:
        """All unit tests, drawn by the first process that asks for them; labels number the tests."""
        from oodlib.data import unit_tests
        from oodlib.data.image_lists import ImageList

        ids = self._listed("id", None)

        def draw(folder: Path) -> None:
            import numpy as np
            from PIL import Image

            from oodlib.data.images import ImageSet

            chosen = np.random.default_rng(0).permutation(len(ids))[:_N_UNIT]
            pixels = [np.asarray(ids[i][0].resize(_CANVAS[::-1], Image.Resampling.BICUBIC)) for i in chosen]
            shuffled = ImageSet("id", "sweep", np.stack(pixels).transpose(0, 3, 1, 2), ids.labels[chosen])
            for name in unit_tests.UNIT_TESTS:
                drawn = unit_tests.unit_test(name, n=len(chosen), size=None, canvas=_CANVAS, id_images=shuffled)
                (folder / name).mkdir()
                for i, image in enumerate(drawn.images):
                    Image.fromarray(image.transpose(1, 2, 0)).save(folder / name / f"{i:03}.png")

        root = _made_once(self.store / "images", {"unit_tests": _manifest(ids)}, draw)
        rows = [(path.relative_to(root).as_posix(), label) for label, name in enumerate(unit_tests.UNIT_TESTS)
                for path in sorted((root / name).iterdir())]
        return ImageList(root, rows, transform=transform, name=UNIT_TESTS)


@cache
def _training_code() -> str:
    """Hash over the modules that the trained pools and their images are made by."""
    from oodlib.depends import ModuleGraph

    graph = ModuleGraph(Path(__file__).resolve().parents[1])
    modules = sorted(graph.reachable(["from oodlib.vits import sets, trained"]))
    return hashlib.sha256(" ".join(sha256(graph.files[name]) for name in modules).encode()).hexdigest()


def _made_once(parent: Path, content: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """``parent/<hash of content>``, filled by ``make`` where it is not there; whole or not at all."""
    from filelock import FileLock

    folder = parent / hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with atomic_folder(folder) as temporary:
                make(temporary)
    return folder


def _manifest(images: ImageList) -> str:
    """Hash over paths, labels and sizes, not times: the same for every copy of the set."""
    digest = hashlib.sha256()
    for path, label in zip(images.paths, images.labels, strict=True):
        digest.update(f"{path} {label} {(images.root / path).stat().st_size}\n".encode())
    return digest.hexdigest()


def _sampled(path: Path) -> str:
    """Hash of a file's size and of three pieces of it: two trained networks differ everywhere."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in (0, max(0, size // 2 - _PIECE), max(0, size - _PIECE)):
            file.seek(start)
            digest.update(file.read(_PIECE))
    return digest.hexdigest()
