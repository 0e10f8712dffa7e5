"""Image lists and folders of the paper profile, on a miniature tree."""

import numpy as np
import pytest
import torch
from helpers import refuses
from PIL import Image

from oodlib.data.folders import ImageList, image_loader, read_list
from oodlib.data.imagenet import (
    PAPER_SETS,
    class_remap,
    describe_paper_sets,
    open_paper_set,
    paper_set_status,
)


def to_tensor(picture):
    return torch.from_numpy(np.asarray(picture.resize((8, 8))).copy()).permute(2, 0, 1)


@pytest.fixture
def tree(tmp_path):
    """Two classes of three images in imagenet_1k/val; grey value = position in the list."""
    root = tmp_path / "images_largescale" / "imagenet_1k" / "val"
    for i in range(6):
        path = root / f"n0{i // 3}" / f"image {i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 16 + i), i).save(path)
    return tmp_path


def write_list(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_list_is_split_at_the_first_space_only(tmp_path):
    assert read_list(write_list(tmp_path / "a.txt", "x/a.png 3\n\ny.jpg -1\n")) == [
        ("x/a.png", 3),
        ("y.jpg", -1),
    ]
    with refuses("b.txt, line 1", "integer label"):
        read_list(write_list(tmp_path / "b.txt", "x/a b.png 3\n"))


def test_mos_list_is_refused(tmp_path):
    with refuses("a.txt, line 2", "integer label"):
        read_list(write_list(tmp_path / "a.txt", "x.png 1\nx.png {'group': 1}\n"))


def test_missing_and_empty_list(tmp_path):
    with refuses("none.txt", "cannot be read"):
        read_list(tmp_path / "none.txt")
    with refuses("a.txt", "empty"):
        read_list(write_list(tmp_path / "a.txt", "\n"))


def test_list_naming_a_missing_file(tree):
    path = write_list(tree / "a.txt", "n00/gone.png 0\n")
    with refuses("a.txt", "1 of 1 listed files are missing", "gone.png"):
        ImageList(tree / "images_largescale/imagenet_1k/val", path)


def test_folder_without_images(tmp_path):
    with refuses(tmp_path, "no image was found"):
        ImageList(tmp_path)


def test_empty_rows(tmp_path):
    with refuses("no rows"):
        ImageList(tmp_path, [])


def test_folder_labels_follow_the_sorted_class_folders(tree):
    images = ImageList(tree / "images_largescale/imagenet_1k/val")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(images) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_keeps_the_order(tree, workers):
    images = ImageList(tree / "images_largescale/imagenet_1k/val", transform=to_tensor)
    batches = list(image_loader(images, batch_size=4, workers=workers))
    assert torch.cat([x for x, _ in batches])[:, 0, 0, 0].tolist() == list(range(6))
    assert torch.cat([y for _, y in batches]).tolist() == images.labels.tolist()


def test_loader_needs_a_transform(tree):
    with refuses("no transform"):
        image_loader(ImageList(tree / "images_largescale/imagenet_1k/val"))


@pytest.mark.parametrize("workers", [0, 1])
def test_undecodable_image_is_named_even_from_a_worker(tree, workers):
    bad = tree / "images_largescale/imagenet_1k/val/n01/image 4.png"
    bad.write_bytes(bad.read_bytes()[:30])
    images = ImageList(tree / "images_largescale/imagenet_1k/val", transform=to_tensor)
    with refuses("image 4.png", "cannot be decoded"):
        list(image_loader(images, workers=workers))


def test_paper_set_by_openood_s_list(tree):
    write_list(tree / "benchmark_imglist/imagenet/test_ninco.txt", "imagenet_1k/val/n00/a.png -1\n")
    Image.new("RGB", (9, 9)).save(tree / "images_largescale/imagenet_1k/val/n00/a.png")
    assert open_paper_set("ninco", tree).labels.tolist() == [-1]


def test_paper_set_by_folder(tree):
    assert len(open_paper_set("imagenet-1k", tree)) == 6


def test_absent_and_unknown_paper_sets(tree):
    with refuses("sun", "folder", "missing", "Expected tree"):
        open_paper_set("sun", tree)
    with refuses("no paper-profile set 'lsun'", "ninco"):
        open_paper_set("lsun", tree)


def test_description_covers_every_set_and_says_what_is_present(tree):
    text, status = describe_paper_sets(tree), paper_set_status(tree)
    for name, entry in PAPER_SETS.items():
        assert f"{name}: " in text and entry.tree in text and entry.source in text
    assert (
        status["imagenet-1k"] == "6 images, which no known protocol has"
        and status["sun"] == "absent"
    )


def test_damaged_set_is_told_from_an_absent_one(tree):
    write_list(
        tree / "benchmark_imglist/imagenet/test_imagenet.txt", "imagenet_1k/val/n00/gone.png 0\n"
    )
    assert paper_set_status(tree)["imagenet-1k"].startswith("damaged: ")


def test_class_remap(tmp_path):
    theirs = write_list(
        tmp_path / "imagenet2012_val_list.txt",
        "val/a.jpg 2\nval/b.jpg 0\nval/c.jpg 1\nval/d.jpg 2\n",
    )
    reference = [("n0/a.jpg", 0), ("n1/b.jpg", 1), ("n2/c.jpg", 2), ("n0/d.jpg", 0)]
    remap = class_remap(theirs, reference)
    assert remap.tolist() == [1, 2, 0]
    logits = np.eye(3)[[2, 0, 1, 2]]  # right for every image, in the checkpoint's order
    assert logits[:, np.argsort(remap)].argmax(1).tolist() == [label for _, label in reference]


def test_contradicting_class_lists(tmp_path):
    theirs = write_list(tmp_path / "a.txt", "a.jpg 0\nb.jpg 0\n")
    with refuses("a.txt", "one-to-one"):
        class_remap(theirs, [("a.jpg", 0), ("b.jpg", 1)])
