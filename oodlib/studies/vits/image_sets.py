"""The image sets of the small pools: pretraining, ID task, near-OOD classes, unit tests.

``cifar``: near-OOD are the test classes of CIFAR-100 that are absent from CIFAR-10 (without
``OVERLAPS``), 98 classes, in two sets: those that Tiny-ImageNet, the pretraining set, shows too
(column ``cifar100_class`` of ``data/manifests/tiny_imagenet_classes.csv``: the same thing, a kind
or part of it, or a close relative), and the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from oodlib.data import EMBEDDED, ImageSet, assert_disjoint, embedded, load
from oodlib.data.builtin.ninco_tests import UNIT_TESTS, unit_test
from oodlib.data.cifar import split_test, tiny_imagenet_classes
from oodlib.errors import OodlibError

OVERLAPS = ("bus", "pickup_truck")  # automobile and truck of CIFAR-10, by its search terms
N_VAL = 150  # images for choices, ID and OOD
NEAR = {
    "embedded": ("greek", "cyrillic", "armenian", "georgian", "hebrew", "math"),
    "cifar": ("cifar100-seen", "cifar100-unseen"),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a small pool is about.

    Attributes
    ----------
    id_set, pretraining : ID classes and the set with many classes
    classes : number of ID classes
    mean, std : normalisation, per channel, in units of pixel / 255
    flip : whether a mirrored image keeps its class
    shift : largest translation in the augmentation, in pixels
    """

    id_set: str
    pretraining: str
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: Literal["none", "random"]
    shift: int


TASKS = {
    "embedded": Task(
        id_set="latin",
        pretraining="unicode",
        classes=26,
        mean=(0.25, 0.25, 0.25),
        std=(0.25, 0.25, 0.25),
        flip="none",
        shift=2,
    ),
    "cifar": Task(
        id_set="cifar10",
        pretraining="tiny-imagenet",
        classes=10,
        mean=(0.491, 0.482, 0.447),
        std=(0.247, 0.243, 0.262),
        flip="random",
        shift=4,
    ),
}


def training_images(pool: str, name: str) -> ImageSet:
    """All images to train on, 32 x 32 RGB: a pool's ID set or pretraining set.

    OodlibError: neither of them, or not available.
    """
    task = _task(pool)
    if name not in (task.id_set, task.pretraining):
        raise OodlibError(
            f"training_images: the {pool} pool trains on {task.id_set} or {task.pretraining}, not "
            f"on {name}."
        )
    if pool == "embedded":
        return _drawn(name, EMBEDDED[name].default_n["train"])
    return load(name, "train").resized(32)


@lru_cache(maxsize=1)  # row after row is finetuned on the same images
def _drawn(name: str, n: int) -> ImageSet:
    return embedded(name, "train", n=n, style="plain")


def pool_sets(
    pool: str, *, n_fit: int, n_test: int, n_ood: int, n_unit: int = 30, seed: int = 0
) -> dict[str, ImageSet]:
    """The sets that every model of a pool is scored on, 32 x 32 RGB.

    Parameters
    ----------
    n_fit, n_test : ID training images to fit scores with, stratified; ID test images
    n_ood : images of each near-OOD class
    n_unit : images of each of the 17 unit tests
    seed : of every subsample

    Returns
    -------
    "fit", "val" and "id" (other ID images), "ood_val" (for choices, never tested), the near-OOD
    sets of `NEAR` with their classes as labels, "unit_tests" labelled by test. No image is in two
    of them or in a pretraining set.
    """
    task = _task(pool)
    if pool == "embedded":
        wanted = {
            "fit": ("latin", "train", n_fit),
            "val": ("latin", "val", N_VAL),
            "id": ("latin", "test", n_test),
            "ood_val": ("arabic", "val", N_VAL),
            **{name: (name, "test", n_ood * EMBEDDED[name].classes) for name in NEAR[pool]},
        }
        sets = {key: embedded(*which, n=n, style="plain") for key, (*which, n) in wanted.items()}
    else:
        val, test = split_test(load(task.id_set, "test"), n_val=1000)
        sets = {
            "fit": load(task.id_set, "train").sample(n_fit, seed=seed, stratified=True),
            "val": val.sample(N_VAL, seed=seed, stratified=True),
            "id": test.sample(n_test, seed=seed, stratified=True),
            "ood_val": load("dtd", "all").resized(32).sample(N_VAL, seed=seed),
        }
        sets |= {
            name: images.sample(n_ood * len(np.unique(images.labels)), seed=seed, stratified=True)
            for name, images in _cifar100().items()
        }
    sets["unit_tests"] = _unit_tests(sets["id"], n_unit, seed)
    return sets


def assert_never_trained_on(
    pool: str,
    sets: Mapping[str, ImageSet],
    *,
    training: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Raise OodlibError if the pixels of a test image, ID or OOD, are tested twice or trained on.

    training : name -> `short_hashes` of what was trained on; by default the pool's pretraining set
        and ID training images, which then are read or drawn (a minute for the embedded pool)
    """
    task = _task(pool)
    if training is None:
        names = (task.pretraining, task.id_set)
        training = {name: short_hashes(training_images(pool, name)) for name in names}
    tested = [images for name, images in sets.items() if name not in ("fit", "unit_tests")]
    assert_disjoint(*tested)
    for images in tested:
        for name, known in training.items():
            shared = set(known).intersection(short_hashes(images))
            if shared:
                raise OodlibError(
                    f"assert_never_trained_on: {len(shared)} images of "
                    f"{images.name}/{images.split} are also in {name}, which the models of the "
                    f"{pool} pool are trained on. Leave them out of the test."
                )


def short_hashes(images: ImageSet) -> list[str]:
    """First 16 digits of each of the `ImageSet.image_hashes`."""
    return [digest[:16] for digest in images.image_hashes()]


def _task(pool: str) -> Task:
    if pool not in TASKS:
        raise OodlibError(f"There is no small pool {pool!r}; the two are {' and '.join(TASKS)}.")
    return TASKS[pool]


def _cifar100() -> dict[str, ImageSet]:
    test = load("cifar100", "test")
    names = np.array(test.class_names)[test.labels]
    seen = {c.cifar100_class for c in tiny_imagenet_classes()}
    known, overlapping = np.isin(names, sorted(seen)), np.isin(names, OVERLAPS)
    return {
        "cifar100-seen": test.subset(known & ~overlapping, name="cifar100-seen"),
        "cifar100-unseen": test.subset(~known & ~overlapping, name="cifar100-unseen"),
    }


def _unit_tests(id_images: ImageSet, n: int, seed: int) -> ImageSet:
    n = min(n, len(id_images))
    parts = [unit_test(name, n=n, seed=seed, id_images=id_images) for name in UNIT_TESTS]
    labels = np.repeat(np.arange(len(parts)), len(parts[0])).astype(np.int64)
    pixels = np.concatenate([part.images for part in parts])
    return ImageSet("unit_tests", "test", pixels, labels, UNIT_TESTS)
