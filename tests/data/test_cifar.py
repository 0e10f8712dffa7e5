"""Splits of the CIFAR protocol: disjoint, balanced, without the classes that overlap."""

import dataclasses
import os

import numpy as np
import pytest
from helpers import refuses

from oodlib.data.cifar import cifar_protocol, split_test, tiny_imagenet_classes, tiny_imagenet_ood
from oodlib.data.images import ImageSet, assert_disjoint
from oodlib.data.public.registry import SETS

needs_mirror = pytest.mark.skipif(
    "OODLIB_MIRROR" not in os.environ, reason="OODLIB_MIRROR is not set"
)


def pixels(n, shape=(3, 8, 8)):
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def test_excluded_tiny_imagenet_classes():
    classes = tiny_imagenet_classes()
    excluded = {c.words.split(",")[0]: c.cifar10_class for c in classes if c.cifar10_class}
    assert (
        len(classes) == 200
        and len(excluded) == 26
        and [c.wnid for c in classes] == sorted(c.wnid for c in classes)
    )
    assert (
        excluded["bullfrog"] == "frog"
        and excluded["limousine"] == "automobile"
        and excluded["tractor"] == "truck"
    )
    assert "lion" not in excluded and "gazelle" not in excluded
    assert set(excluded.values()) <= set(SETS["cifar10"].class_names)
    wide = {c.words.split(",")[0]: c.cifar100_class for c in classes if c.cifar100_class}
    assert (
        len(wide) == 48
        and wide["lampshade"] == "lamp"
        and wide["school bus"] == "bus"
        and "abacus" not in wide
    )


def tiny_like(per_class=2):
    labels = np.repeat(np.arange(200), per_class)
    return ImageSet(
        "tiny-imagenet",
        "valid",
        pixels(len(labels), (3, 4, 4)),
        labels,
        tuple(c.wnid for c in tiny_imagenet_classes()),
    )


def test_near_and_validation_classes_are_disjoint():
    near, val = tiny_imagenet_ood(tiny_like())
    overlap = {i for i, c in enumerate(tiny_imagenet_classes()) if c.cifar10_class}
    assert len(np.unique(near.labels)) == 154 and len(np.unique(val.labels)) == 20
    assert not (set(near.labels) & set(val.labels)) and not (overlap & {*near.labels, *val.labels})


def test_classes_left_out_depend_on_the_id_set():
    near, val = tiny_imagenet_ood(tiny_like(), id_name="cifar100")
    assert len(np.unique(near.labels)) == 132 and len(np.unique(val.labels)) == 20


def test_tiny_imagenet_without_wordnet_ids_is_refused():
    with refuses("WordNet ids"):
        tiny_imagenet_ood(dataclasses.replace(tiny_like(), class_names=("cat",) * 200))


def test_test_split_is_balanced_disjoint_and_seeded():
    images = ImageSet("x", "test", pixels(100), np.arange(100) % 10)
    val, test = split_test(images, n_val=20)
    assert (np.bincount(val.labels) == 2).all() and (np.bincount(test.labels) == 8).all()
    assert_disjoint(val, test)
    assert split_test(images, n_val=20)[0].fingerprint == val.fingerprint
    assert split_test(images, n_val=20, seed=1)[0].fingerprint != val.fingerprint


def test_uneven_validation_is_refused():
    with refuses("cannot be drawn evenly"):
        split_test(ImageSet("x", "test", pixels(100), np.arange(100) % 10), n_val=25)


@pytest.mark.mirror
@pytest.mark.slow
@needs_mirror
def test_cifar_protocol_on_the_mirror(tmp_path):
    p = cifar_protocol(download=False, data_dir=tmp_path)
    assert (len(p.id_fit), len(p.id_val), len(p.id_test)) == (10_000, 1_000, 9_000)
    assert (np.bincount(p.id_fit.labels) == 1000).all() and (
        np.bincount(p.id_test.labels) == 900
    ).all()
    ood = {**p.near, **p.far}
    assert all(s.images.shape[1:] == (3, 32, 32) for s in ood.values())
    assert_disjoint(p.id_fit, p.id_val, p.id_test, *p.ood_val.values(), *ood.values())
    assert "notmnist" in p.ood_val and p.leaks == {
        "tiny-imagenet-incomplete-val": "tiny-imagenet-incomplete"
    }
    assert all(name in p.notes for name in ood if name.endswith("-incomplete"))
