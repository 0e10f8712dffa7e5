"""Splits of the ImageNet models on a miniature tree: labels, native unit tests, loaders."""

import shutil

import numpy as np
import pytest
import torch
from helpers import refuses

from oodlib.data import ImageSet
from oodlib.data.builtin.ninco_tests import UNIT_TESTS, unit_test
from oodlib.data.folders import ImageList, image_loader
from oodlib.data.imagenet import (
    NATIVE,
    SPLITS,
    UnitTests,
    imagenet_split,
    ood_classes,
    open_paper_set,
)

OOD = ("ninco", "ssb-hard", "inaturalist", "textures", "openimage-o")


def small(picture):
    """(3, 8, 8) of any picture: a transform."""
    return torch.from_numpy(np.asarray(picture.resize((8, 8))).copy()).permute(2, 0, 1)


def original(picture):
    return torch.from_numpy(np.asarray(picture).copy())


@pytest.fixture(scope="module")
def ids(tree):
    return open_paper_set("imagenet-1k", tree)


@pytest.fixture(scope="module")
def loaders(tree):
    numbers = {"unit_tests": 1, "fit": 5}
    splits = {split: imagenet_split(split, tree, small, n=numbers.get(split)) for split in SPLITS}
    return {split: image_loader(s, workers=0, batch_size=7) for split, s in splits.items()}


def test_every_split_has_a_loader(loaders):
    for split, loader in loaders.items():
        x, y = next(iter(loader))
        assert x.shape[1:] == (3, 8, 8) and len(x) == len(y) == min(7, len(loader.dataset)), split
        assert len(loader.dataset.fingerprint) == 64


def test_labels_of_id_splits_are_the_sorted_class_folders(tree):
    assert imagenet_split("id", tree).labels.tolist() == [0] * 12 + [1] * 12
    assert imagenet_split("fit", tree).labels.tolist() == [0] * 8 + [1] * 8


@pytest.mark.parametrize("split", OOD)
def test_ood_images_have_the_class_of_their_folder(tree, split):
    images = imagenet_split(split, tree)
    assert images.labels.tolist() == [int(path.split("/")[-1][0]) for path in images.paths]


def test_ninco_has_the_same_classes_by_openood_s_list_and_by_folder(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "imagenet")
    by_folder = imagenet_split("ninco", root)
    rows = [f"ninco/{path} -1\n" for path in reversed(by_folder.paths)]
    (root / "benchmark_imglist/imagenet/test_ninco.txt").write_text("".join(rows))
    assert open_paper_set("ninco", root).labels.tolist() == [-1] * 4  # what OpenOOD's list says
    by_list = imagenet_split("ninco", root)
    assert by_list.labels.tolist() == [1, 1, 0, 0] and by_folder.labels.tolist() == [0, 0, 1, 1]


def test_images_of_one_folder_are_one_class(tree):
    images = ImageList(tree / "images_largescale/inaturalist/n00")
    assert images.labels.tolist() == [-1] * 3 and ood_classes(images).tolist() == [0] * 3


def test_split_is_cut_by_a_seeded_draw(tree):
    whole, five, again, other = (
        imagenet_split("fit", tree, n=n, seed=seed)
        for n, seed in ((None, 0), (5, 0), (5, 0), (5, 1))
    )
    assert (
        five.paths == again.paths != other.paths
        and len(five) == 5
        and set(five.paths) < set(whole.paths)
    )
    labels = dict(zip(whole.paths, whole.labels, strict=True))
    assert five.labels.tolist() == [labels[path] for path in five.paths]
    assert len(imagenet_split("fit", tree, n=99)) == 16


def test_unknown_split_and_missing_images(tree, tmp_path):
    with refuses("no split 'lsun'", "ninco"):
        imagenet_split("lsun", tree)
    with refuses("imagenet-1k", "missing"):
        imagenet_split("unit_tests", tmp_path)


# The unit tests


def test_unit_tests_are_all_17_at_native_size(ids):
    loader = image_loader(UnitTests(ids, transform=original, n=1), batch_size=17, workers=0)
    x, y = next(iter(loader))
    assert x.shape == (17, *NATIVE, 3) and y.tolist() == list(range(17))


def test_unit_tests_are_those_of_the_other_pools(ids):
    """Each row is what `unit_test` draws, from the validation image that the row names."""
    drawn = UnitTests(ids, n=3, canvas=(24, 32))
    sources = np.stack([np.asarray(ImageList.picture(drawn, i)) for i in range(3)]).transpose(
        0, 3, 1, 2
    )
    shuffled = ImageSet("id", "val", sources, np.zeros(3, np.int64))
    for label, name in enumerate(UNIT_TESTS):
        rows = np.flatnonzero(drawn.labels == label)
        wanted = unit_test(
            name, n=3, size=None, canvas=(24, 32), id_images=shuffled
        ).images.transpose(0, 2, 3, 1)
        np.testing.assert_array_equal([np.asarray(drawn[i][0]) for i in rows], wanted, err_msg=name)


def test_validation_images_are_drawn_without_replacement(ids):
    drawn = UnitTests(ids, n=len(ids))
    assert (
        sorted(drawn.paths[: len(ids)]) == sorted(ids.paths)
        and drawn.paths[: len(ids)] != ids.paths
    )


def test_fewer_pictures_are_the_first_ones(ids):
    few, more = UnitTests(ids, n=2, canvas=(24, 32)), UnitTests(ids, n=4, canvas=(24, 32))
    for label in range(17):
        for i in range(2):
            a, b = few[2 * label + i][0], more[4 * label + i][0]
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_fingerprint_follows_seed_canvas_number_and_transform(ids):
    variants = [{}, {"seed": 1}, {"canvas": (24, 32)}, {"n": 3}, {"transform": small}]
    assert len({UnitTests(ids, **{"n": 2, **options}).fingerprint for options in variants}) == len(
        variants
    )


def test_too_few_validation_images(ids):
    with refuses("n must lie in 1 .. 24", "imagenet-1k", "got 400"):
        UnitTests(ids)
