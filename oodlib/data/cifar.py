"""The CIFAR benchmarks: fit, validation and test images, near and far OOD sets.

They follow OpenOOD v1.5 (Zhang et al., arXiv 2306.09301) in shape, but not image by image, because
OpenOOD's lists are not available here. A table must state where ours differ:

- ID validation (1,000) and ID test (9,000) are another balanced split of the 10,000 test images.
- Other classes of Tiny-ImageNet are left out (rule below), so near-OOD and OOD validation differ.
- Near-OOD is the test images of the other CIFAR set, without those that the ID set holds too.
- OOD validation: OpenOOD's is 20 classes of Tiny-ImageNet, whose other classes it tests on; such a
  set is named in ``leaks`` here, beside notMNIST and Kuzushiji-MNIST, which are not tested.
- The 10,000 test images of MNIST are far-OOD (OpenOOD: 70,000); Fashion-MNIST is tested too.
  Places365, where available, is all 36,500 validation images (OpenOOD: 35,195 and 33,773).

**Tiny-ImageNet classes left out** (column ``cifar10_class`` of
``data/manifests/tiny_imagenet_classes.csv``), 26 of 200: a class whose WordNet words contain one of
the search terms under which CIFAR-10 was collected (the terms are its original file names:
"bullfrog", "tabby", "station wagon", ...), or which by its WordNet definition is a kind of
airplane, automobile (buses are among CIFAR-10's search terms for it), bird, domestic cat, deer,
dog, frog, horse, ship or truck. Look-alikes that are none of these stay: lion and cougar, gazelle,
go-kart. For CIFAR-100 (column ``cifar100_class``), 48: a class whose words name a CIFAR-100 class
or a kind, part or close relative of one (lampshade, seashore, freight car, bison).
"""

from __future__ import annotations

import csv
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oodlib.data.images import ImageSet
from oodlib.data.public.prepare import DatasetNotFound, load
from oodlib.data.public.registry import set_info
from oodlib.errors import OodlibError
from oodlib.workspace import root


@dataclass(frozen=True)
class TinyClass:
    """A Tiny-ImageNet class: WordNet id and words, overlapping CIFAR classes ("" if none)."""

    wnid: str
    words: str
    cifar10_class: str
    reason: str  # of the CIFAR-10 class
    cifar100_class: str


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The image sets of one benchmark, all 32x32 RGB.

    Attributes
    ----------
    id_fit, id_val, id_test : for fitting (None without the training images), choices, reporting
    ood_val : OOD sets for choosing hyper-parameters, by name
    leaks : the sets of ``ood_val`` whose source is tested too -> the tested set
    near, far : OOD test sets by name
    notes : what a table must say about a set, by name
    missing : why a set is not available, by name
    """

    id_fit: ImageSet | None
    id_val: ImageSet
    id_test: ImageSet
    ood_val: dict[str, ImageSet]
    leaks: dict[str, str]
    near: dict[str, ImageSet]
    far: dict[str, ImageSet]
    notes: dict[str, str]
    missing: dict[str, str]


def tiny_imagenet_classes() -> tuple[TinyClass, ...]:
    """All 200 classes, in the order of their labels."""
    return _read_classes(root() / "data" / "manifests" / "tiny_imagenet_classes.csv")


@functools.cache
def _read_classes(path: Path) -> tuple[TinyClass, ...]:
    with open(path, newline="", encoding="utf-8") as file:
        return tuple(TinyClass(**row) for row in csv.DictReader(file))


def tiny_imagenet_ood(
    tiny: ImageSet, *, id_name: str = "cifar10", n_val_classes: int = 20
) -> tuple[ImageSet, ImageSet]:
    """Split Tiny-ImageNet into (near-OOD test, OOD validation) that share no class.

    The classes that overlap with the CIFAR set are left out. The others, in the order of WordNet
    ids (which puts relatives side by side), go to validation at equal steps, so that it spans
    animals, things and food.
    """
    left = [c.wnid for c in tiny_imagenet_classes() if not getattr(c, f"{id_name}_class")]
    unknown = set(tiny.class_names) - {c.wnid for c in tiny_imagenet_classes()}
    if unknown or not tiny.class_names:
        raise OodlibError(
            "tiny_imagenet_ood: class names must be Tiny-ImageNet's WordNet ids, got "
            f"{sorted(unknown)[:3] or 'none'}. Pass the set that load('tiny-imagenet', ...) "
            "returns."
        )
    position = np.linspace(0, len(left) - 1, n_val_classes).round().astype(int)
    held_out = {left[i] for i in position}
    names = np.array(tiny.class_names)[tiny.labels]
    is_val = np.isin(names, sorted(held_out))
    is_test = np.isin(names, [w for w in left if w not in held_out])
    return tiny.subset(is_test, split="near"), tiny.subset(is_val, split="ood_val")


def split_test(test: ImageSet, *, n_val: int, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Split into (validation, test), disjoint and class-balanced; C must divide ``n_val``."""
    counts = np.bincount(test.labels)
    if n_val % len(counts) or counts.min() <= n_val // len(counts):
        raise OodlibError(
            f"split_test: {n_val} validation images cannot be drawn evenly from classes of "
            f"{counts.min()} to {counts.max()} images. Choose a smaller multiple of {len(counts)}."
        )
    order, each = np.random.default_rng(seed).permutation(len(test)), n_val // len(counts)
    val = np.concatenate([order[test.labels[order] == c][:each] for c in range(len(counts))])
    rest = np.setdiff1d(np.arange(len(test)), val)
    return test.subset(np.sort(val), split="val"), test.subset(rest)


def cifar_protocol(
    id_name: str = "cifar10",
    *,
    n_fit: int = 10_000,
    n_val: int = 1_000,
    seed: int = 0,
    mirror: str | os.PathLike[str] | None = None,
    download: bool = True,
    data_dir: str | os.PathLike[str] | None = None,
) -> Protocol:
    """The sets of a CIFAR benchmark (see the module's text for where it departs from OpenOOD's).

    Parameters
    ----------
    id_name : "cifar10" or "cifar100"
    n_fit : training images, stratified, for methods that are fitted
    n_val : images of the ID validation set, and of each OOD validation set at most
    seed : of the draw of ``id_fit`` and of the validation / test split
    mirror, download, data_dir : as for ``load``; OOD sets and training images that are not
        available go to ``missing``, the ID test images must be available
    """
    if id_name not in ("cifar10", "cifar100"):
        raise OodlibError(
            f'cifar_protocol: id_name must be "cifar10" or "cifar100", got {id_name!r}.'
        )
    opened = functools.partial(load, mirror=mirror, download=download, data_dir=data_dir)
    notes: dict[str, str] = {}
    missing: dict[str, str] = {}
    known: set[str] = set()

    def attempt(name: str, split: str) -> ImageSet | None:
        """A set without the images that the ID set holds too, or None (then see ``missing``)."""
        try:
            found = opened(name, split)
        except DatasetNotFound as error:
            missing[name] = str(error)
            return None
        remarks = []
        if found.name != name:
            remarks.append(
                f"incomplete: {len(found):,} of {set_info(name).split(split).count:,} images, "
                f"{len(np.unique(found.labels))} classes. {set_info(name).note}"
            )
        shared = np.array([h in known for h in found.image_hashes()])
        if shared.any():
            found = found.subset(~shared)
            remarks.append(f"left out because {id_name} holds the same image: {shared.sum()}")
        if remarks:
            notes[found.name] = "; ".join(remarks)
        return found.resized(32) if name != "tiny-imagenet" else found

    # ID images
    test = opened(id_name, "test")
    id_val, id_test = split_test(test, n_val=n_val, seed=seed)
    train = attempt(id_name, "train")
    known.update(test.image_hashes(), train.image_hashes() if train else ())
    # OOD images for choices and for reporting
    near: dict[str, ImageSet] = {}
    far: dict[str, ImageSet] = {}
    ood_val: dict[str, ImageSet] = {}
    leaks: dict[str, str] = {}
    for name in ("notmnist", "kmnist"):
        if found := attempt(name, "test"):
            ood_val[name] = found.sample(n_val, seed=seed)
    if tiny := attempt("tiny-imagenet", "valid"):
        tiny_near, tiny_val = (s.resized(32) for s in tiny_imagenet_ood(tiny, id_name=id_name))
        near[tiny_near.name] = tiny_near
        ood_val[f"{tiny_val.name}-val"] = tiny_val.sample(n_val, seed=seed)
        leaks[f"{tiny_val.name}-val"] = tiny_near.name
    other = "cifar100" if id_name == "cifar10" else "cifar10"
    for group, name, split in (
        (near, other, "test"),
        (far, "mnist", "test"),
        (far, "fashion-mnist", "test"),
        (far, "dtd", "all"),
        (far, "svhn", "test"),
        (far, "places365", "val"),
    ):
        if found := attempt(name, split):
            group[found.name] = found
    id_fit = train.sample(n_fit, seed=seed, stratified=True) if train else None
    return Protocol(
        id_fit=id_fit,
        id_val=id_val,
        id_test=id_test,
        ood_val=ood_val,
        leaks=leaks,
        near=near,
        far=far,
        notes=notes,
        missing=missing,
    )
