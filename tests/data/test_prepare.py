"""Preparation of public sets from small files; the mirror only where OODLIB_MIRROR is set."""

import dataclasses
import gzip
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import refuses
from PIL import Image

from oodlib.data.images import ImageSet
from oodlib.data.public import prepare as prepare_module
from oodlib.data.public import readers
from oodlib.data.public.prepare import load, pixel_checksum, prepare, prepared_info
from oodlib.data.public.registry import SETS, SetInfo, Split

needs_mirror = pytest.mark.skipif(
    "OODLIB_MIRROR" not in os.environ, reason="OODLIB_MIRROR is not set"
)
N = 12


def pixels(n=N, shape=(3, 8, 8), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def encode(image, suffix="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, suffix)
    return buffer.getvalue()


def write_parquet(path, blobs, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        "image": [{"bytes": blob, "path": f"{i}.png"} for i, blob in enumerate(blobs)],
        "label": list(labels),
    }
    table = pa.table(
        rows,
        schema=pa.schema(
            [
                ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                ("label", pa.int64()),
            ]
        ),
    )
    pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(["a", "b"])}), path)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A registered set of 12 images, its mirror (Parquet) and an empty data folder."""
    info = SetInfo(
        name="toy",
        title="Toy",
        terms="none",
        citation="nobody 2026",
        size=(3, 8, 8),
        splits={"test": Split(N, torchvision=({"train": False},))},
        folders=("toy",),
        torchvision="CIFAR10",
    )
    monkeypatch.setitem(SETS, "toy", info)
    monkeypatch.setenv("OODLIB_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("OODLIB_DATA", str(tmp_path / "data"))
    shard = tmp_path / "mirror" / "toy" / "test-00000-of-00001.parquet"
    write_parquet(shard, [encode(p) for p in pixels()], np.arange(N) % 2)
    return shard


@pytest.fixture
def toy_idx(monkeypatch, tmp_path):
    """The same in the MNIST family's form."""
    files = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
    info = SetInfo(
        name="toy-idx",
        title="Toy",
        terms="none",
        citation="nobody 2026",
        size=(1, 8, 8),
        splits={"test": Split(N, idx=files)},
        folders=("Toy",),
    )
    monkeypatch.setitem(SETS, "toy-idx", info)
    monkeypatch.setenv("OODLIB_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("OODLIB_DATA", str(tmp_path / "data"))
    folder = tmp_path / "mirror" / "Toy" / "raw"
    write_idx(folder / files[0], pixels(shape=(8, 8)))
    write_idx(folder / files[1], (np.arange(N) % 2).astype(np.uint8))
    return folder


def redefine(monkeypatch, name="toy", **changes):
    info = SETS[name]
    splits = {key: dataclasses.replace(split, **changes) for key, split in info.splits.items()}
    monkeypatch.setitem(SETS, name, dataclasses.replace(info, splits=splits))


# What is prepared


def test_parquet_gives_the_pixels_in_an_order_of_their_own(toy):
    loaded = load("toy", "test")
    assert (
        isinstance(loaded.images, np.memmap)
        and loaded.class_names == ("a", "b")
        and loaded.name == "toy"
    )
    original = {p.tobytes(): i % 2 for i, p in enumerate(pixels())}
    assert {
        i.tobytes(): label for i, label in zip(loaded.images, loaded.labels, strict=True)
    } == original


def test_order_of_the_source_does_not_matter(toy, tmp_path):
    first = load("toy", "test")
    write_parquet(toy, [encode(p) for p in pixels()[::-1]], (np.arange(N) % 2)[::-1])
    second = load("toy", "test", data_dir=tmp_path / "other")
    assert first.fingerprint == second.fingerprint
    assert (
        pixel_checksum(first.images[::-1], first.labels[::-1])
        == prepared_info("toy", "test")["checksum"]
    )


def test_other_sizes_and_modes_are_brought_to_the_set_s(toy):
    grey = np.full((1, 20, 30), 77, np.uint8)
    write_parquet(toy, [encode(grey)] * N, np.zeros(N, int))
    images = load("toy", "test").images
    assert images.shape == (N, 3, 8, 8) and (images == 77).all()


def test_idx_files(toy_idx):
    loaded = load("toy-idx", "test")
    assert loaded.images.shape == (N, 1, 8, 8)
    assert {i.tobytes() for i in loaded.images} == {p.tobytes() for p in pixels(shape=(8, 8))}


def test_several_shards(toy):
    toy.unlink()
    for part, rows in enumerate((slice(0, 5), slice(5, N))):
        write_parquet(
            toy.with_name(f"test-0000{part}-of-00002.parquet"),
            [encode(p) for p in pixels()[rows]],
            (np.arange(N) % 2)[rows],
        )
    assert len(load("toy", "test")) == N


def test_second_load_does_not_read_the_mirror(toy):
    load("toy", "test")
    shutil.rmtree(toy.parent)
    assert len(load("toy", "test")) == N


def test_smaller_copy_is_named_incomplete(toy, monkeypatch):
    redefine(monkeypatch, count=N + 1)
    monkeypatch.setitem(
        SETS, "toy", dataclasses.replace(SETS["toy"], partial=True, note="half of it")
    )
    assert load("toy", "test").name == "toy-incomplete"
    assert prepared_info("toy", "test")["note"] == "half of it"


def test_torchvision_s_class_is_used_without_a_mirror(toy, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    calls = []

    class Fake:
        classes = ("x", "y")

        def __init__(self, root, train, download):
            calls.append((Path(root).name, train, download))

        def __len__(self):
            return N

        def __getitem__(self, i):
            return Image.fromarray(pixels()[i].transpose(1, 2, 0)), i % 2

    monkeypatch.delenv("OODLIB_MIRROR")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    loaded = load("toy", "test")
    assert calls == [("raw", False, True)] and loaded.class_names == ("x", "y")
    assert prepared_info("toy", "test")["source"] == "torchvision.datasets.CIFAR10"


def test_tiny_imagenet_archive(tmp_path, monkeypatch):
    root, archive = "tiny-imagenet-200", tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr(f"{root}/wnids.txt", "n2\nn1\n")
        out.writestr(
            f"{root}/val/val_annotations.txt",
            "val_0.JPEG\tn2\t0\t0\t1\t1\nval_1.JPEG\tn1\t0\t0\t1\t1\n",
        )
        for i, image in enumerate(pixels(2, (3, 64, 64))):
            out.writestr(f"{root}/val/images/val_{i}.JPEG", encode(image, "JPEG"))
            out.writestr(f"{root}/train/n{i + 1}/images/n{i + 1}_0.JPEG", encode(image, "JPEG"))
    monkeypatch.setenv("OODLIB_MIRROR", str(tmp_path))
    monkeypatch.setenv("OODLIB_DATA", str(tmp_path / "data"))
    valid, train = load("tiny-imagenet", "valid"), load("tiny-imagenet", "train")
    assert valid.class_names == ("n1", "n2") and sorted(valid.labels) == [0, 1]
    by_pixels = {
        image.tobytes(): label for image, label in zip(train.images, train.labels, strict=True)
    }
    assert [by_pixels[image.tobytes()] for image in valid.images] == [
        1 - label for label in valid.labels
    ]
    archive.write_bytes(archive.read_bytes()[:-200])
    with refuses(archive, "not a readable Tiny-ImageNet archive"):
        prepare("tiny-imagenet", "valid")


def drawings():
    """Six drawings of three characters: file names within a zip, pixels 105x105."""
    names = [
        f"{character}/{i}.png"
        for character in ("Greek/character02", "Greek/character01", "Latin/character01")
        for i in range(2)
    ]
    return dict(zip(names, pixels(6, (1, 105, 105)), strict=True))


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(f"{path.stem}/", b"")
        for name, image in files.items():
            out.writestr(f"{path.stem}/{name}", encode(image))


@pytest.fixture
def omniglot(tmp_path, monkeypatch):
    monkeypatch.setenv("OODLIB_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("OODLIB_DATA", str(tmp_path / "data"))
    return tmp_path / "mirror" / "omniglot"


def test_zips_of_class_folders_are_merged(omniglot):
    files = list(drawings().items())
    write_zip(omniglot / "images_background_small1.zip", dict(files[:4]))
    write_zip(
        omniglot / "images_background_small2.zip", dict(files[2:])
    )  # two drawings are in both
    loaded = load("omniglot", "background", download=False)
    assert loaded.name == "omniglot-incomplete" and len(loaded) == 6
    assert loaded.class_names == ("Greek/character01", "Greek/character02", "Latin/character01")
    small = ImageSet(
        "x", "", np.stack(list(drawings().values())), np.array([1, 1, 0, 0, 2, 2])
    ).resized(28, channels=1)
    expected = {
        image.tobytes(): label for image, label in zip(small.images, small.labels, strict=True)
    }
    assert {
        i.tobytes(): label for i, label in zip(loaded.images, loaded.labels, strict=True)
    } == expected


def test_complete_zip_alone_is_the_whole_set(omniglot, monkeypatch):
    redefine(monkeypatch, "omniglot", count=6)
    write_zip(omniglot / "images_evaluation.zip", drawings())
    assert load("omniglot", "evaluation", download=False).name == "omniglot"
    with refuses("omniglot/background is not available", "downloads are off"):
        load("omniglot", "background", download=False)


def test_zip_is_downloaded_with_its_md5(omniglot, tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")
    calls = []

    def retrieve(address, known_hash, **options):
        calls.append((address, known_hash))
        write_zip(tmp_path / "images_evaluation.zip", drawings())
        return str(tmp_path / "images_evaluation.zip")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.delenv("OODLIB_MIRROR")
    redefine(monkeypatch, "omniglot", count=6)
    loaded = load("omniglot", "evaluation")
    address, md5 = SETS["omniglot"].split("evaluation").archive
    assert len(loaded) == 6 and calls == [(address, f"md5:{md5}")]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-30], lambda data: data.replace(b"IDAT", b"IDAX")]
)
def test_damaged_zip(omniglot, damage):
    path = omniglot / "images_evaluation.zip"
    write_zip(path, drawings())
    path.write_bytes(damage(path.read_bytes()))
    with refuses(path, "not a readable zip of class folders"):
        load("omniglot", "evaluation", download=False)


def test_undecodable_drawing_in_a_zip(omniglot):
    path = omniglot / "images_evaluation.zip"
    write_zip(path, drawings())
    with zipfile.ZipFile(path, "a") as out:
        out.writestr("images_evaluation/Greek/character09/x.png", b"no picture")
    with refuses("images_evaluation.zip, image Greek/character09/x.png", "cannot be decoded"):
        load("omniglot", "evaluation", download=False)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Where torchvision looks for its files; there is no mirror."""
    pytest.importorskip("torchvision")
    monkeypatch.delenv("OODLIB_MIRROR", raising=False)
    monkeypatch.setenv("OODLIB_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "raw"


def by_label(loaded):
    return {int(label): image for image, label in zip(loaded.images, loaded.labels, strict=True)}


def whole(image):
    """A picture squeezed to 32x32 with all its rows and columns."""
    picture = Image.fromarray(image.transpose(1, 2, 0)).resize((32, 32), Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1)


def test_gtsrb_layout_and_uncropped_resize(raw, monkeypatch):
    redefine(monkeypatch, "gtsrb", count=2)
    images = [pixels(1, (3, 40, 60))[0], pixels(1, (3, 25, 15))[0]]
    for i, image in enumerate(images):
        for folder in (f"Training/{i:05d}", "Final_Test/Images"):
            path = raw / "gtsrb" / "GTSRB" / folder / f"{i:05d}.ppm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(image, "PPM"))
    (raw / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;1\n00001.ppm;0\n")
    train, test = by_label(load("gtsrb", "train")), by_label(load("gtsrb", "test"))
    for i, image in enumerate(images):
        np.testing.assert_array_equal(train[i], whole(image))
        np.testing.assert_array_equal(test[1 - i], whole(image))


def celeba_files(raw, monkeypatch, shape):
    """Two pictures a split, of persons 70 to 75; returns the pictures."""
    import torchvision

    monkeypatch.setattr(torchvision.datasets.CelebA, "file_list", [])  # made files have other MD5s
    folder, images = raw / "celeba", pixels(6, shape)
    (folder / "img_align_celeba").mkdir(parents=True)
    for i, image in enumerate(images):
        (folder / "img_align_celeba" / f"{i + 1:06d}.jpg").write_bytes(
            encode(image)
        )  # PNG: nothing is lost
    rows = {
        "list_eval_partition": "{split}",
        "identity_CelebA": "{person}",
        "list_bbox_celeba": "1 2 3 4",
        "list_landmarks_align_celeba": "1 2",
        "list_attr_celeba": "-1 1",
    }
    for name, row in rows.items():
        lines = [f"{i + 1:06d}.jpg " + row.format(split=i // 2, person=70 + i) for i in range(6)]
        (folder / f"{name}.txt").write_text(
            "\n".join(lines if "{" in row else ["6", "a b", *lines]) + "\n"
        )
    return images


def test_celeba_layout_splits_and_crop_box(raw, monkeypatch):
    redefine(monkeypatch, "celeba", count=2)
    images = celeba_files(raw, monkeypatch, (3, 218, 178))
    for first, split in ((0, "train"), (2, "valid"), (4, "test")):
        loaded = by_label(load("celeba", split))
        assert sorted(loaded) == [70 + first, 71 + first]
        for i in (first, first + 1):
            np.testing.assert_array_equal(loaded[70 + i], whole(images[i][:, 40:188, 15:163]))


def test_pictures_too_small_for_the_crop_box(raw, monkeypatch):
    celeba_files(raw, monkeypatch, (3, 100, 90))
    with refuses("celeba", "crop box (15, 40, 163, 188)", "(90, 100)"):
        load("celeba", "test")


def test_mirror_of_prepared_pictures_is_not_cropped_again(tmp_path, monkeypatch):
    redefine(monkeypatch, "celeba", count=2)
    write_parquet(
        tmp_path / "celeba" / "test-0.parquet", [encode(p) for p in pixels(2, (3, 32, 32))], [0, 1]
    )
    loaded = by_label(load("celeba", "test", mirror=tmp_path, data_dir=tmp_path / "data"))
    np.testing.assert_array_equal(np.stack([loaded[0], loaded[1]]), pixels(2, (3, 32, 32)))


# Bad input: the file is named, and what was prepared before stays


def test_truncated_parquet(toy):
    before = load("toy", "test").fingerprint
    toy.write_bytes(toy.read_bytes()[:-100])
    with refuses(toy, "truncated", "Copy it again"):
        prepare("toy", "test")
    assert load("toy", "test").fingerprint == before


def test_missing_shard(toy):
    toy.rename(toy.with_name("test-00000-of-00002.parquet"))
    with refuses(toy.parent, "1 of 2 Parquet files"):
        load("toy", "test")


def test_parquet_without_the_columns(toy):
    pq.write_table(pa.table({"image": [1], "y": [2]}), toy)
    with refuses(toy, "columns label are missing"):
        load("toy", "test")


@pytest.mark.parametrize("which", [0, 1])
def test_truncated_gzip(toy_idx, which):
    before = load("toy-idx", "test").fingerprint
    path = sorted(toy_idx.iterdir())[which]
    path.write_bytes(path.read_bytes()[:-6])
    with refuses(path, "truncated", "Copy it again"):
        prepare("toy-idx", "test")
    assert load("toy-idx", "test").fingerprint == before


def test_damaged_gzip_data(toy_idx):
    path = sorted(toy_idx.iterdir())[0]
    data = bytearray(path.read_bytes())
    data[20:40] = bytes(20)
    path.write_bytes(data)
    with refuses(path, "not a readable gzip file"):
        load("toy-idx", "test")


def test_idx_file_cut_before_compression(toy_idx):
    path = sorted(toy_idx.iterdir())[0]
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with refuses(path, "cut short"):
        load("toy-idx", "test")


def test_wrong_md5_of_a_publisher_s_file(toy_idx, monkeypatch):
    path = sorted(toy_idx.iterdir())[0]
    monkeypatch.setitem(
        SETS, "toy-idx", dataclasses.replace(SETS["toy-idx"], raw_md5={path.name: "0" * 32})
    )
    with refuses(path, "MD5 is", "0" * 32):
        load("toy-idx", "test")


def test_missing_idx_labels(toy_idx):
    path = sorted(toy_idx.iterdir())[1]
    path.unlink()
    with refuses(path, "missing"):
        load("toy-idx", "test")


def test_wrong_pixels(toy, monkeypatch):
    before = load("toy", "test").fingerprint
    redefine(monkeypatch, checksum="0" * 64)
    with refuses("toy/test", "checksum", "0" * 64, "again"):
        prepare("toy", "test")
    assert load("toy", "test").fingerprint == before


def test_wrong_count(toy, monkeypatch):
    redefine(monkeypatch, count=N + 1)
    with refuses("13 images were expected", "holds 12"):
        load("toy", "test")


def test_empty_set(toy, monkeypatch):
    write_parquet(toy, [], [])
    with refuses("toy/test: 12 images were expected", "holds 0"):
        load("toy", "test")


def test_undecodable_image(toy):
    blobs = [encode(p) for p in pixels()]
    blobs[7] = blobs[7][:40]
    write_parquet(toy, blobs, np.zeros(N, int))
    with refuses(toy, "7.png", "cannot be decoded"):
        load("toy", "test")


def test_missing_split_names_what_to_do(toy):
    toy.unlink()
    with refuses(
        "toy/test is not available", "downloads are off", "toy/test-*.parquet under OODLIB_MIRROR"
    ):
        load("toy", "test", download=False)


def test_failed_download_says_why(toy, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    toy.unlink()
    monkeypatch.setattr(readers, "from_torchvision", fail)
    with refuses("toy/test is not available", "no route to host"):
        load("toy", "test")


def test_mirror_that_is_no_folder(toy, tmp_path):
    with refuses(tmp_path / "nowhere", "not a folder"):
        load("toy", "test", mirror=tmp_path / "nowhere")


def test_unknown_names(toy):
    with refuses("image set must be one of cifar10", "got 'imagnet'"):
        load("imagnet", "test")
    with refuses("split must be one of test, got 'val'"):
        load("toy", "val")


def test_failed_write_leaves_the_earlier_data(toy, tmp_path, monkeypatch):
    before = load("toy", "test").fingerprint

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_json", disk_full)
        with refuses("could not be written", "No space left", "OODLIB_DATA"):
            prepare("toy", "test")
    assert load("toy", "test").fingerprint == before
    assert sorted(
        p.name for p in (tmp_path / "data/prepared/toy").iterdir() if "lock" not in p.name
    ) == ["test"]


def test_prepared_pixels_that_changed_are_noticed(toy, tmp_path):
    load("toy", "test")
    path = tmp_path / "data/prepared/toy/test/images.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with refuses(path.parent, "checksum", "Delete the folder"):
        load("toy", "test")


def test_truncated_prepared_data_is_noticed(toy, tmp_path):
    load("toy", "test")
    path = tmp_path / "data/prepared/toy/test/images.npy"
    path.write_bytes(path.read_bytes()[:-50])
    with refuses(path.parent, "cannot be read", "Delete the folder"):
        load("toy", "test")


def test_set_that_only_a_mirror_holds(tmp_path):
    with refuses("notmnist/test is not available", "no library downloads it", "under notmnist/"):
        load("notmnist", "test", mirror=tmp_path, data_dir=tmp_path)


# The real mirror


@pytest.mark.mirror
@needs_mirror
@pytest.mark.parametrize(
    "name, split", [("mnist", "test"), ("fashion-mnist", "test"), ("cifar100", "test")]
)
def test_official_sets_on_the_mirror_have_the_registered_checksum(name, split, tmp_path):
    loaded = load(name, split, download=False, data_dir=tmp_path)
    assert pixel_checksum(loaded.images, loaded.labels) == SETS[name].splits[split].checksum
    assert len(loaded.class_names) == loaded.labels.max() + 1


@pytest.mark.mirror
@needs_mirror
def test_omniglot_on_the_mirror(tmp_path):
    loaded = load("omniglot", "background", download=False, data_dir=tmp_path)
    assert loaded.name == "omniglot-incomplete" and loaded.images.shape == (4_840, 1, 28, 28)
    assert len(loaded.class_names) == 242 and (np.bincount(loaded.labels) == 20).all()
    assert loaded.images.mean() > 200  # black on white


def test_parallel_decoding_keeps_labels_with_their_images(toy, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 5)  # several batches
    blobs = [encode(np.full((3, 8, 8), i, np.uint8)) for i in range(N)]
    write_parquet(toy, blobs, np.arange(N))
    loaded = load("toy", "test")
    assert (loaded.images[:, 0, 0, 0] == loaded.labels).all()


# Pooled images


@pytest.mark.parametrize("side", [16, 28, 32, 48, 64])
def test_pooled_pixels_are_means_over_their_area(side):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, side, side)).astype(np.uint8)
    fine = 16 * side // np.gcd(16, side)  # pixels of both sizes are whole numbers of these
    blocks = (
        images.repeat(fine // side, 2).repeat(fine // side, 3).reshape(3, 3, 16, fine // 16, 16, -1)
    )
    pooled = ImageSet("x", "", images, np.zeros(3)).pooled(16).images
    np.testing.assert_array_equal(pooled, np.floor(blocks.mean((3, 5)).round(6) + 0.5))
    np.testing.assert_array_equal(
        ImageSet("x", "", images[:, :1], np.zeros(3)).pooled(16).images, pooled[:, [0, 0, 0]]
    )


def test_pooled_grey_is_pillows():
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 20, 20)).astype(np.uint8)
    grey = ImageSet("x", "", images, np.zeros(1)).pooled(20, channels=1).images[0, 0]
    np.testing.assert_array_equal(
        grey, np.asarray(Image.fromarray(images[0].transpose(1, 2, 0)).convert("L"))
    )


@pytest.mark.parametrize("shape", [(8, 8), (20, 24)])
def test_pooled_needs_square_images_that_are_large_enough(shape):
    with refuses(
        f"square images of at least 16 pixels, got {shape[0]} x {shape[1]}", "Use resized"
    ):
        ImageSet("x", "", np.zeros((1, 1, *shape), np.uint8), np.zeros(1)).pooled(16)
