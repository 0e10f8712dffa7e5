"""The ImageNet-scale sets of the paper profile: where they come from, how they are opened, what is
present.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from oodlib.data.builtin.ninco_tests import NEEDS_ID_IMAGES, UNIT_TESTS, draw
from oodlib.data.folders import ImageList, Transform, image_loader, read_list
from oodlib.errors import OodlibError

__all__ = [
    "NATIVE",
    "PAPER_SETS",
    "SPLITS",
    "PaperSet",
    "UnitTests",
    "class_remap",
    "describe_paper_sets",
    "imagenet_loaders",
    "imagenet_split",
    "ood_classes",
    "open_paper_set",
    "paper_set_status",
    "unit_test_loader",
]


# split -> name of the set in `oodlib.data.imagenet.PAPER_SETS`
_SETS = {
    "fit": "imagenet-1k-train",
    "id": "imagenet-1k",
    "ninco": "ninco",
    "ssb-hard": "ssb-hard",
    "inaturalist": "inaturalist",
    "textures": "textures",
    "openimage-o": "openimage-o",
}
SPLITS = (*_SETS, "unit_tests")
NATIVE = (375, 500)  # height and width of most ImageNet images, hence of the unit tests


@dataclass(frozen=True, kw_only=True)
class PaperSet:
    """One set of the ``paper`` profile; nothing of it can be downloaded here, so this says what a
    user must provide.

    Attributes
    ----------
    tree : the folder expected below the data root
    counts : image counts that a correct copy may have, with the protocol each belongs to
    list_name : OpenOOD's list below ``benchmark_imglist/imagenet/``, "" if it has none
    size : on disk, "unknown" where our sources do not say
    needs_list : its folder holds other sets' images too, so it exists through its list only
    """

    name: str
    title: str
    role: str
    source: str
    terms: str
    tree: str
    counts: dict[str, int]
    list_name: str = ""
    size: str = "unknown"
    root: str = "images_largescale"
    needs_list: bool = False


_MOS = "sampled for MOS (arXiv 2105.01879): pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/"
PAPER_SETS: dict[str, PaperSet] = {
    entry.name: entry
    for entry in (
        PaperSet(
            name="imagenet-1k",
            title="ImageNet-1k (ILSVRC 2012) validation",
            role="ID",
            source="image-net.org, on registration",
            terms="ImageNet terms: non-commercial research",
            tree="images_largescale/imagenet_1k/val/<WordNet id>/*.JPEG",
            counts={"GradNorm": 50_000, "OpenOOD test": 45_000},
            list_name="test_imagenet.txt",
        ),
        PaperSet(
            name="imagenet-1k-train",
            title="ImageNet-1k training images",
            role="for methods that are fitted",
            source="image-net.org, on registration",
            terms="ImageNet terms: non-commercial research",
            tree="images_largescale/imagenet_1k/train/<WordNet id>/*.JPEG",
            counts={"ImageNet": 1_281_167},
            list_name="train_imagenet.txt",
        ),
        PaperSet(
            name="inaturalist",
            title="iNaturalist, 10,000 plant images",
            role="far-OOD",
            source=_MOS + "iNaturalist.tar.gz",
            terms="unknown",
            tree="images_largescale/inaturalist/**/*.jpg",
            counts={"GradNorm": 10_000, "OpenOOD": 10_000},
            list_name="test_inaturalist.txt",
        ),
        PaperSet(
            name="sun",
            title="SUN, 10,000 images",
            role="OOD of the GradNorm paper",
            source=_MOS + "SUN.tar.gz",
            terms="unknown",
            tree="images_largescale/sun/**/*.jpg",
            counts={"GradNorm": 10_000},
        ),
        PaperSet(
            name="places",
            title="Places, 10,000 images",
            role="OOD of the GradNorm paper",
            source=_MOS + "Places.tar.gz",
            terms="unknown",
            tree="images_largescale/places/**/*.jpg",
            counts={"GradNorm": 10_000},
        ),
        PaperSet(
            name="textures",
            title="Describable Textures",
            role="far-OOD",
            source="www.robots.ox.ac.uk/~vgg/data/dtd/",
            terms="research use (Oxford VGG)",
            tree="images_classic/texture/<class>/*.jpg",
            counts={"GradNorm": 5_640, "OpenOOD": 5_160},
            list_name="test_textures.txt",
            root="images_classic",
        ),
        PaperSet(
            name="ninco",
            title="NINCO, 64 classes",
            role="near-OOD",
            source="github.com/j-cb/NINCO (arXiv 2306.00826)",
            terms="unknown",
            tree="images_largescale/ninco/<class>/*",
            counts={"OpenOOD": 5_879},
            list_name="test_ninco.txt",
        ),
        PaperSet(
            name="ssb-hard",
            title="SSB-hard",
            role="near-OOD",
            source="OpenOOD v1.5 (arXiv 2306.09301)",
            terms="unknown",
            tree="images_largescale/ssb_hard/<WordNet id>/*",
            counts={"OpenOOD": 49_000},
            list_name="test_ssb_hard.txt",
        ),
        PaperSet(
            name="openimage-o",
            title="OpenImage-O",
            role="far-OOD",
            source="OpenOOD v1.5 (arXiv 2306.09301)",
            terms="unknown",
            tree="images_largescale/openimage_o/**/*.jpg",
            counts={"OpenOOD": 15_869},
            list_name="test_openimage_o.txt",
        ),
        PaperSet(
            name="openimage-o-val",
            title="OpenImage-O, OpenOOD's validation part",
            role="OOD validation",
            source="OpenOOD v1.5 (arXiv 2306.09301)",
            terms="unknown",
            tree="images_largescale/openimage_o/**/*.jpg",
            counts={"OpenOOD": 1_763},
            list_name="val_openimage_o.txt",
            needs_list=True,
        ),
    )
}


def class_remap(
    checkpoint_list: str | os.PathLike[str], reference: Sequence[tuple[str, int]]
) -> NDArray[np.int64]:
    """Which reference class each output of a checkpoint means, from two lists of the same images.

    The BiT checkpoint of the GradNorm paper has MOS's class order (``imagenet2012_val_list.txt`` of
    its repository); with folder order its accuracy is about 0.1 %. ``logits[:,
    np.argsort(class_remap(...))]`` is in reference order.

    Parameters
    ----------
    checkpoint_list : list file in the checkpoint's label order
    reference : rows in the order wanted, for example ``read_list(...)``; images are matched by file name

    Returns
    -------
    (C,) int64, a permutation

    Raises
    ------
    OodlibError : the lists share too few images, or contradict each other
    """
    labels = {Path(path).name: label for path, label in reference}
    pairs = {
        (label, labels[Path(path).name])
        for path, label in read_list(checkpoint_list)
        if Path(path).name in labels
    }
    n = len(pairs)
    if n == 0 or {a for a, _ in pairs} != set(range(n)) or {b for _, b in pairs} != set(range(n)):
        raise OodlibError(
            f"class_remap: {checkpoint_list} and the reference list do not give a one-to-one map "
            f"of classes ({n} pairs of labels seen). Both must list the same images of every class."
        )
    return np.array([b for _, b in sorted(pairs)], dtype=np.int64)


def open_paper_set(
    name: str,
    data_root: str | os.PathLike[str],
    *,
    transform: Callable[[Any], Any] | None = None,
    list_file: str | os.PathLike[str] | None = None,
) -> ImageList:
    """A set of the paper profile below ``data_root``: by ``list_file``, else OpenOOD's list, else
    all of its folder.
    """
    if name not in PAPER_SETS:
        raise OodlibError(
            f"There is no paper-profile set {name!r}. Known: {', '.join(PAPER_SETS)}."
        )
    entry, root = PAPER_SETS[name], Path(data_root)
    default = root / "benchmark_imglist" / "imagenet" / entry.list_name
    if list_file is None and entry.list_name and default.is_file():
        list_file = default
    if list_file is not None:
        return ImageList(root / entry.root, list_file, transform=transform, name=name)
    folder = _folder(entry, root)
    if entry.needs_list:
        raise OodlibError(
            f"{name}: the list {default} is missing; its folder alone does not say which images "
            f"belong to it. Source: {entry.source}."
        )
    if not folder.is_dir():
        raise OodlibError(
            f"{name}: the folder {folder} is missing. Expected tree: {entry.tree}; "
            f"source: {entry.source}."
        )
    return ImageList(folder, transform=transform, name=name)


def _folder(entry: PaperSet, root: Path) -> Path:
    return root / entry.tree.split("/<")[0].split("/**")[0]


def paper_set_status(data_root: str | os.PathLike[str]) -> dict[str, str]:
    """For each set, what is present: "absent", or the number of images and which protocol's count
    it meets.
    """
    out = {}
    for name, entry in PAPER_SETS.items():
        try:
            n = len(open_paper_set(name, data_root))
        except OodlibError as error:
            folder = _folder(entry, Path(data_root))
            out[name] = (
                f"damaged: {error}" if folder.is_dir() and any(folder.iterdir()) else "absent"
            )
            continue
        meets = [protocol for protocol, count in entry.counts.items() if count == n]
        out[name] = f"{n:,} images, " + (
            f"as {' and '.join(meets)}" if meets else "which no known protocol has"
        )
    return out


def describe_paper_sets(data_root: str | os.PathLike[str]) -> str:
    """For each set of the paper profile: source, terms, size, expected tree and counts, and what is
    present.
    """
    status, lines = paper_set_status(data_root), []
    for name, entry in PAPER_SETS.items():
        counts = ", ".join(f"{count:,} ({protocol})" for protocol, count in entry.counts.items())
        lines += [
            f"{name}: {entry.title} [{entry.role}]",
            f"  source    {entry.source}",
            f"  terms     {entry.terms}",
            f"  size      {entry.size}",
            f"  expected  {entry.tree}",
            f"  counts    {counts}",
        ]
        if entry.list_name:
            lines.append(f"  list      benchmark_imglist/imagenet/{entry.list_name} (optional)")
        lines.append(f"  present   {status[name]}")
    lines += [
        "imagenet200_resnet18:0, :1, :2: OpenOOD v1.5's networks for ImageNet-200 [images of ImageNet-1k]",
        "  source    OpenOOD's archive imagenet200_res18_v1.5, and its benchmark_imglist",
        "  expected  results/imagenet200_resnet18_224x224_base_e90_lr0.1_default/s<seed>/best.ckpt",
        "  lists     benchmark_imglist/imagenet200/{train,test}_imagenet200.txt",
    ]
    return "\n".join(lines)


def ood_classes(images: ImageList) -> NDArray[np.int64]:
    """Class of each OOD image, (n,): the rank of its folder among the folders of the set; never -1.

    A set read from its folder has these labels already. OpenOOD's lists say -1 for every OOD image,
    so for them the class is taken from the path; images that share one folder are one class.
    """
    if (images.labels >= 0).all():
        return images.labels
    folders = [Path(path).parent.as_posix() for path in images.paths]
    return np.unique(folders, return_inverse=True)[1].astype(np.int64)


class UnitTests(ImageList):
    """The 17 unit tests as their authors draw them, before the network's transform; one picture a
    row, test by test.

    Parameters
    ----------
    id_images : ImageNet's validation images; ``n`` of them, drawn without replacement, have their pixels shuffled
    transform : of PIL images
    n : pictures per test (the original: 400)
    seed : of the drawing; every picture depends on it and on its own number alone
    canvas : height and width in pixels

    Attributes
    ----------
    labels : (17 n,), index in `UNIT_TESTS`; ``paths`` names the validation image that a row may use

    Raises
    ------
    OodlibError : fewer than ``n`` validation images
    """

    def __init__(
        self,
        id_images: ImageList,
        *,
        transform: Transform | None = None,
        n: int = 400,
        seed: int = 0,
        canvas: tuple[int, int] = NATIVE,
    ):
        if not 1 <= n <= len(id_images):
            raise OodlibError(
                f"UnitTests: n must lie in 1 .. {len(id_images)}, the number of images of "
                f"{id_images.name} whose pixels are shuffled, got {n}."
            )
        chosen = np.random.default_rng(seed).permutation(len(id_images))[:n]
        rows = [(id_images.paths[i], test) for test in range(len(UNIT_TESTS)) for i in chosen]
        super().__init__(id_images.root, rows, transform=transform, name="unit_tests")
        self.n, self.seed, self.canvas = n, seed, canvas

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal): as of an `ImageList`, with the seed and the canvas."""
        return hashlib.sha256(
            f"{super().fingerprint} {self.seed} {self.canvas}".encode()
        ).hexdigest()

    def picture(self, index: int) -> Any:
        from PIL import Image

        name = UNIT_TESTS[int(self.labels[index])]
        source = super().picture(index) if name in NEEDS_ID_IMAGES else None
        return Image.fromarray(
            draw(name, index % self.n, self.canvas, seed=self.seed, source=source)
        )


def unit_test_loader(
    transform: Transform,
    id_images: ImageList,
    *,
    n: int = 400,
    batch_size: int = 64,
    workers: int | None = None,
) -> DataLoader:
    """Batches of `UnitTests`; labels number the tests. Drawing takes about four minutes of one core
    for n = 400.
    """
    return image_loader(
        UnitTests(id_images, transform=transform, n=n), batch_size=batch_size, workers=workers
    )


def imagenet_split(
    split: str,
    data_root: str | Path,
    transform: Transform | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
) -> ImageList:
    """One of `SPLITS` below ``data_root``, in the trees that ``oodlib data --profile paper``
    describes.

    Labels are ImageNet's classes for "fit" and "id", those of `ood_classes` for the OOD sets, the
    test's number for "unit_tests".

    Parameters
    ----------
    n : at most so many images, drawn with ``seed``; of the unit tests, pictures per test (without it 400, or as many as
        there are ID images)

    Raises
    ------
    OodlibError : unknown split, or its images are not there
    """
    if split not in SPLITS:
        raise OodlibError(
            f"There is no split {split!r} of the ImageNet models. Known: {', '.join(SPLITS)}."
        )
    if split == "unit_tests":
        ids = open_paper_set("imagenet-1k", data_root)
        return UnitTests(
            ids, transform=transform, n=min(400, len(ids)) if n is None else n, seed=seed
        )
    images = open_paper_set(_SETS[split], data_root, transform=transform)
    images.labels = ood_classes(images)
    if n is not None and n < len(images):
        kept = np.sort(np.random.default_rng(seed).permutation(len(images))[:n])
        rows = [(images.paths[i], int(images.labels[i])) for i in kept]
        images = ImageList(images.root, rows, transform=transform, name=images.name)
    return images


def imagenet_loaders(
    data_root: str | Path,
    transform: Transform,
    *,
    splits: Sequence[str] = SPLITS,
    n: Mapping[str, int] | None = None,
    batch_size: int = 64,
    workers: int | None = None,
) -> dict[str, DataLoader]:
    """Batches of every split through a network's transform; each loader's ``dataset`` has a
    ``fingerprint``.

    ``n`` : how many images of a split, as in `imagenet_split`; other arguments and errors as there
    and in `oodlib.data.folders.image_loader`.
    """
    sizes = n or {}
    return {
        split: image_loader(
            imagenet_split(split, data_root, transform, n=sizes.get(split)),
            batch_size=batch_size,
            workers=workers,
        )
        for split in splits
    }
