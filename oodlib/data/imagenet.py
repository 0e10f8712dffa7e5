"""The ImageNet-scale sets of the paper profile: their source, how to open them, what is present."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodlib.data.builtin.ninco_tests import NEEDS_ID_IMAGES, UNIT_TESTS, draw
from oodlib.data.folders import ImageList, Transform, read_list
from oodlib.data.records import read_records
from oodlib.errors import OodlibError

_ID = {"fit": "imagenet-1k-train", "id": "imagenet-1k"}  # split -> name in PAPER_SETS
_OOD = ("ninco", "ssb-hard", "inaturalist", "textures", "openimage-o")
SPLITS = (*_ID, *_OOD, "unit_tests")
NATIVE = (375, 500)  # height and width of most ImageNet images, hence of the unit tests


@dataclass(frozen=True, kw_only=True)
class PaperSet:
    """One set of the ``paper`` profile, none of which is downloaded: what a user must provide.

    Attributes
    ----------
    tree : the folder expected below the data root
    counts : image counts that a correct copy may have, with the protocol each belongs to
    list_name : OpenOOD's list below ``benchmark_imglist/imagenet/``, "" if it has none
    needs_list : its folder holds other sets' images too, so that its list alone defines it
    """

    name: str
    title: str
    role: str
    source: str
    terms: str
    tree: str
    counts: dict[str, int]
    list_name: str = ""
    root: str = "images_largescale"
    needs_list: bool = False


PAPER_SETS: dict[str, PaperSet] = read_records(__name__, PaperSet)


def class_remap(
    checkpoint_list: str | os.PathLike[str], reference: Sequence[tuple[str, int]]
) -> NDArray[np.int64]:
    """The reference class of each output of a checkpoint, from two lists of the same images.

    The BiT checkpoint of the GradNorm paper has MOS's class order (``imagenet2012_val_list.txt`` of
    its repository); with folder order its accuracy is about 0.1 %.
    ``logits[:, np.argsort(class_remap(...))]`` is in reference order.

    Parameters
    ----------
    checkpoint_list : list file in the checkpoint's label order
    reference : rows in the wanted order, as `read_list` gives; images are matched by file name

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
    transform: Transform | None = None,
    list_file: str | os.PathLike[str] | None = None,
) -> ImageList:
    """A set below ``data_root``: by ``list_file``, else OpenOOD's list, else its whole folder."""
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
    """What is present of each set: "absent", or how many images and whose protocol has as many."""
    out = {}
    for name, entry in PAPER_SETS.items():
        try:
            n = len(open_paper_set(name, data_root))
        except OodlibError as error:
            folder = _folder(entry, Path(data_root))
            partly = folder.is_dir() and any(folder.iterdir())
            out[name] = f"damaged: {error}" if partly else "absent"
            continue
        meets = " and ".join(who for who, count in entry.counts.items() if count == n)
        out[name] = f"{n:,} images, " + (f"as {meets}" if meets else "which no known protocol has")
    return out


def describe_paper_sets(data_root: str | os.PathLike[str]) -> str:
    """Each set's source, terms, expected tree and counts, and what is present, as a text."""
    status, lines = paper_set_status(data_root), []
    for name, entry in PAPER_SETS.items():
        counts = ", ".join(f"{count:,} ({protocol})" for protocol, count in entry.counts.items())
        lines += [
            f"{name}: {entry.title} [{entry.role}]",
            f"  source    {entry.source}",
            f"  terms     {entry.terms}",
            f"  expected  {entry.tree}",
            f"  counts    {counts}",
        ]
        if entry.list_name:
            lines.append(f"  list      benchmark_imglist/imagenet/{entry.list_name} (optional)")
        lines.append(f"  present   {status[name]}")
    lines += [
        "imagenet200_resnet18:0, :1, :2: OpenOOD v1.5's networks for ImageNet-200 [of ImageNet-1k]",
        "  source    OpenOOD's archive imagenet200_res18_v1.5, and its benchmark_imglist",
        "  expected  results/imagenet200_resnet18_224x224_base_e90_lr0.1_default/s<seed>/best.ckpt",
        "  lists     benchmark_imglist/imagenet200/{train,test}_imagenet200.txt",
    ]
    return "\n".join(lines)


def ood_classes(images: ImageList) -> NDArray[np.int64]:
    """Class of each OOD image, (n,): the rank of its folder among those of the set; never -1.

    A set read from its folder has these labels already. OpenOOD's lists say -1 for every OOD image,
    so for them the class is taken from the path; images that share one folder are one class.
    """
    if (images.labels >= 0).all():
        return images.labels
    folders = [Path(path).parent.as_posix() for path in images.paths]
    return np.unique(folders, return_inverse=True)[1].astype(np.int64)


class UnitTests(ImageList):
    """The 17 unit tests as their authors draw them, one picture per row, test by test.

    Parameters
    ----------
    id_images : ImageNet's validation images; ``n`` of them, drawn without replacement, have their
        pixels shuffled
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
        text = f"{super().fingerprint} {self.seed} {self.canvas}"
        return hashlib.sha256(text.encode()).hexdigest()

    def picture(self, index: int) -> Any:
        from PIL import Image

        name = UNIT_TESTS[int(self.labels[index])]
        source = super().picture(index) if name in NEEDS_ID_IMAGES else None
        pixels = draw(name, index % self.n, self.canvas, seed=self.seed, source=source)
        return Image.fromarray(pixels)


def imagenet_split(
    split: str,
    data_root: str | Path,
    transform: Transform | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
) -> ImageList:
    """One of `SPLITS` below ``data_root``, laid out as ``oodlib data --profile paper`` describes.

    Labels are ImageNet's classes for "fit" and "id", those of `ood_classes` for the OOD sets, the
    test's number for "unit_tests".

    Parameters
    ----------
    n : at most so many images, drawn with ``seed``; of the unit tests, pictures per test (by
        default 400, or as many as there are ID images)

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
        n = min(400, len(ids)) if n is None else n
        return UnitTests(ids, transform=transform, n=n, seed=seed)
    images = open_paper_set(_ID.get(split, split), data_root, transform=transform)
    images.labels = ood_classes(images)
    if n is not None and n < len(images):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:n])
        rows = [(images.paths[i], int(images.labels[i])) for i in chosen]
        images = ImageList(images.root, rows, transform=transform, name=images.name)
    return images
