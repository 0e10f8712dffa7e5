"""The real image sets oodlib knows: where each comes from, under which terms, and what a correct
copy looks like.

A new set is one more entry in ``SETS``; nothing else needs to change as long as it comes as
Parquet, as IDX files, as zips with one folder a class, or through a torchvision class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from oodlib.errors import OodlibError

__all__ = ["SETS", "SetInfo", "Split", "set_info"]


@dataclass(frozen=True)
class Split:
    """One official split.

    Attributes
    ----------
    count : images in the official split
    checksum : ``pixel_checksum`` of the complete official split; None where no complete copy could be hashed
    idx : names of the IDX image and label file, where the set comes in that form
    torchvision : keyword arguments of the torchvision class, one mapping per part that is concatenated
    mirror : file prefix in a mirror, where it differs from the split's name
    zips : zips with one folder a class, where the set comes in that form; a mirror may hold any of them, and a file
        that is in two of them counts once
    archive : address and MD5 of the one of ``zips`` that holds the whole split
    """

    count: int
    checksum: str | None = None
    idx: tuple[str, str] | None = None
    torchvision: tuple[Mapping[str, Any], ...] = ()
    mirror: str | None = None
    zips: tuple[str, ...] = ()
    archive: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """Facts about one set; the tables of docs/data.md and ``oodlib doctor`` are made from these.

    Attributes
    ----------
    size : (c, h, w) of the prepared images; other sizes are brought to it, bilinearly
    crop : what of a picture is resized: "centre" (shorter side to the size, then the centre), "whole" (both sides to
        the size, so the aspect ratio changes), or a box (left, upper, right, lower) in pixels
    folders : names under which a mirror may hold the set, the first that exists wins
    torchvision : class name in ``torchvision.datasets``, "" if there is none
    raw_md5 : of the publisher's files, as torchvision checks them
    archive : address and MD5 of an archive that torchvision does not know
    partial : a smaller copy is accepted, and named ``<name>-incomplete`` wherever it is used
    """

    name: str
    title: str
    terms: str
    citation: str
    size: tuple[int, int, int]
    splits: Mapping[str, Split]
    folders: tuple[str, ...]
    crop: Literal["centre", "whole"] | tuple[int, int, int, int] = "centre"
    class_names: tuple[str, ...] = ()
    torchvision: str = ""
    raw_md5: Mapping[str, str] = field(default_factory=dict)
    archive: tuple[str, str] | None = None
    partial: bool = False
    note: str = ""

    def split(self, split: str) -> Split:
        """The entry of one split, or an OodlibError that names the splits there are."""
        if split not in self.splits:
            raise OodlibError(
                f"{self.name}: there is no split {split!r}. Choose one of {', '.join(self.splits)}."
            )
        return self.splits[split]


def _train_test(
    train: int,
    test: int,
    *,
    idx: bool = False,
    checksums: tuple[str | None, str | None] = (None, None),
) -> dict[str, Split]:
    out = {}
    rows = zip(("train", "test"), ("train", "t10k"), (train, test), checksums, strict=True)
    for name, prefix, count, checksum in rows:
        files = (
            (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz") if idx else None
        )
        out[name] = Split(count, checksum, files, ({"train": name == "train"},))
    return out


_DIGITS = tuple("0123456789")
_OMNIGLOT = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"

_ENTRIES = (
    SetInfo(
        name="cifar10",
        title="CIFAR-10",
        terms="research use; the publisher states no formal licence",
        citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        size=(3, 32, 32),
        folders=("cifar10",),
        torchvision="CIFAR10",
        splits=_train_test(
            50_000,
            10_000,
            checksums=(
                "48c874bd70e82a47574a698457ed64553e32033cd63465fabb8ffeee8a46fcfd",
                "88e0f4c50a48486bc4e11145ceb5d7748dadc8eb53a87f0c158cb6143fe1faa6",
            ),
        ),
        class_names=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        raw_md5={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
    ),
    SetInfo(
        name="cifar100",
        title="CIFAR-100 (fine labels)",
        terms="research use; the publisher states no formal licence",
        citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        size=(3, 32, 32),
        folders=("cifar100",),
        torchvision="CIFAR100",
        splits=_train_test(
            50_000,
            10_000,
            checksums=(None, "03046521b66af8d2e53cce2e1e39d1050123238182e48daa9c5e6a20bd100e1d"),
        ),
        raw_md5={"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"},
    ),
    SetInfo(
        name="tiny-imagenet",
        title="Tiny-ImageNet-200",
        terms="ImageNet terms: non-commercial research",
        citation="Le and Yang, Tiny ImageNet Visual Recognition Challenge (Stanford CS231n), 2015",
        size=(3, 64, 64),
        folders=("tiny-imagenet",),
        partial=True,
        splits={"train": Split(100_000), "valid": Split(10_000)},
        archive=(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "90528d7ca1a48142e341f4ef8d21d0de",
        ),
        note="class names are WordNet ids; data/manifests/tiny_imagenet_classes.csv holds their words",
    ),
    SetInfo(
        name="fashion-mnist",
        title="Fashion-MNIST",
        terms="MIT",
        citation="Xiao, Rasul, Vollgraf, Fashion-MNIST, arXiv 1708.07747, 2017",
        size=(1, 28, 28),
        folders=("FashionMNIST", "fashion-mnist"),
        torchvision="FashionMNIST",
        splits=_train_test(
            60_000,
            10_000,
            idx=True,
            checksums=(
                "a23bf247b063aed49017848248b3292f5a1fa99face3cc82245340234a168654",
                "7b4c1a5acdf5a994db74cc15d2419f605562c1b55a774faf6f39b436bcf55eb1",
            ),
        ),
        class_names=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        raw_md5={
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    SetInfo(
        name="mnist",
        title="MNIST",
        terms="CC BY-SA 3.0",
        citation="LeCun, Bottou, Bengio, Haffner, Gradient-Based Learning Applied to Document Recognition, 1998",
        size=(1, 28, 28),
        folders=("MNIST", "mnist"),
        torchvision="MNIST",
        splits=_train_test(
            60_000,
            10_000,
            idx=True,
            checksums=(
                "685d6314ddde61a49fcb50d07ccdd4ee91468c999f64dada9d924813dd117bda",
                "a03216200113f452e8715e63388eb2116ae57c317a4333d1468619f0c0219702",
            ),
        ),
        class_names=_DIGITS,
        raw_md5={
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    SetInfo(
        name="kmnist",
        title="Kuzushiji-MNIST",
        terms="CC BY-SA 4.0",
        citation="Clanuwat, Bober-Irizar, Kitamoto, Lamb, Yamamoto, Ha, Deep Learning for Classical Japanese "
        "Literature, arXiv 1812.01718, 2018",
        size=(1, 28, 28),
        folders=("KMNIST", "kmnist"),
        torchvision="KMNIST",
        splits=_train_test(60_000, 10_000, idx=True),
        raw_md5={
            "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
            "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
            "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
            "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
        },
    ),
    SetInfo(
        name="notmnist",
        title="notMNIST, glyphs A to J of many fonts",
        terms="the author states no licence",
        citation="Bulatov, notMNIST dataset, 2011",
        size=(1, 28, 28),
        folders=("notmnist",),
        class_names=tuple("ABCDEFGHIJ"),
        splits={
            "test": Split(10_000, idx=("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"))
        },
        note="from a mirror only: no library downloads it",
    ),
    SetInfo(
        name="omniglot",
        title="Omniglot, drawn characters of 50 alphabets",
        terms="MIT",
        citation="Lake, Salakhutdinov, Tenenbaum, Human-level concept learning through probabilistic program "
        "induction, Science 2015",
        size=(1, 28, 28),
        folders=("omniglot",),
        partial=True,
        splits={
            "background": Split(
                19_280,
                zips=(
                    "images_background.zip",
                    "images_background_small1.zip",
                    "images_background_small2.zip",
                ),
                archive=(f"{_OMNIGLOT}/images_background.zip", "68d2efa1b9178cc56df9314c21c6e718"),
            ),
            "evaluation": Split(
                13_180,
                zips=("images_evaluation.zip",),
                archive=(f"{_OMNIGLOT}/images_evaluation.zip", "6b91aef0f799c5bb55b94e3f2daec811"),
            ),
        },
        note="black on white as published, unlike MNIST; a class is one character of one alphabet; the two zips "
        "images_background_small together hold 4,840 different drawings, 1,000 are in both",
    ),
    SetInfo(
        name="dtd",
        title="Describable Textures",
        terms="research use (Oxford VGG)",
        citation="Cimpoi, Maji, Kokkinos, Mohamed, Vedaldi, Describing Textures in the Wild, CVPR 2014",
        size=(3, 48, 48),
        folders=("dtd", "dtd-48px"),
        torchvision="DTD",
        partial=True,
        splits={
            "all": Split(
                5_640,
                mirror="train",
                torchvision=({"split": "train"}, {"split": "val"}, {"split": "test"}),
            )
        },
        raw_md5={"dtd-r1.0.1.tar.gz": "fff73e5086ae6bdbea199a49dfb8a4c1"},
        note="centre-cropped and scaled to 48x48; the mirror's dtd-48px holds 10 of the 47 classes only",
    ),
    SetInfo(
        name="svhn",
        title="Street View House Numbers (cropped digits)",
        terms="non-commercial use",
        citation="Netzer, Wang, Coates, Bissacco, Wu, Ng, Reading Digits in Natural Images, 2011",
        size=(3, 32, 32),
        folders=("svhn",),
        torchvision="SVHN",
        class_names=_DIGITS,
        splits={
            "train": Split(73_257, torchvision=({"split": "train"},)),
            "test": Split(26_032, torchvision=({"split": "test"},)),
        },
        raw_md5={
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
        },
    ),
    SetInfo(
        name="gtsrb",
        title="German Traffic Sign Recognition Benchmark",
        terms="not read here; see the publisher's page",
        citation="Stallkamp, Schlipsing, Salmen, Igel, Man vs. computer: Benchmarking machine learning algorithms for "
        "traffic sign recognition, 2012",
        size=(3, 32, 32),
        crop="whole",
        folders=("gtsrb",),
        torchvision="GTSRB",
        splits={
            "train": Split(26_640, torchvision=({"split": "train"},)),
            "final-train": Split(39_209),
            "test": Split(12_630, torchvision=({"split": "test"},)),
        },
        raw_md5={
            "GTSRB-Training_fixed.zip": "513f3c79a4c5141765e10e952eaa2478",
            "GTSRB_Final_Test_Images.zip": "c7e4e6327067d32654124b0fe9e82185",
            "GTSRB_Final_Test_GT.zip": "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
        },
        note="from a mirror only: final-train, of the final competition; train is torchvision's. Both hold about 30 "
        "frames of each sign. The whole picture is resized to 32x32 without a crop, so its aspect ratio changes",
    ),
    SetInfo(
        name="celeba",
        title="CelebA, aligned faces",
        terms="non-commercial research",
        citation="Liu, Luo, Wang, Tang, Deep Learning Face Attributes in the Wild, ICCV 2015",
        size=(3, 32, 32),
        crop=(15, 40, 163, 188),
        folders=("celeba",),
        torchvision="CelebA",
        splits={
            split: Split(count, torchvision=({"split": split, "target_type": "identity"},))
            for split, count in (("train", 162_770), ("valid", 19_867), ("test", 19_962))
        },
        raw_md5={
            "img_align_celeba.zip": "00d2c5bc6d35e252742224ab0c1e8fcb",
            "identity_CelebA.txt": "32bd1bd63d3c78cd57e08160ec5ed1e2",
            "list_eval_partition.txt": "d32c9cbf5e040fd4025c592c306e6668",
        },
        note="official splits; the box (15, 40, 163, 188) of the aligned pictures, resized; labels are persons; "
        "torchvision's download needs the package gdown",
    ),
    SetInfo(
        name="imagenet32",
        title="ImageNet at 32x32",
        terms="ImageNet terms: non-commercial research",
        citation="Chrabaszcz, Loshchilov, Hutter, A Downsampled Variant of ImageNet as an Alternative to the CIFAR "
        "Datasets, arXiv 1707.08819, 2017",
        size=(3, 32, 32),
        folders=("imagenet32",),
        partial=True,
        splits={"train": Split(1_281_167), "val": Split(50_000)},
        note="from a mirror only: its publisher asks for registration; without the JPEG copies that Immature Glow's "
        "authors made",
    ),
    SetInfo(
        name="places365",
        title="Places365, validation images",
        terms="research and education",
        citation="Zhou, Lapedriza, Khosla, Oliva, Torralba, Places: A 10 Million Image Database for Scene Recognition, "
        "2017",
        size=(3, 32, 32),
        folders=("places365",),
        torchvision="Places365",
        splits={"val": Split(36_500, torchvision=({"split": "val", "small": True},))},
        note="OpenOOD leaves out 1,305 of the images for CIFAR-10; which ones is not known here",
    ),
)

SETS: dict[str, SetInfo] = {entry.name: entry for entry in _ENTRIES}


def set_info(name: str) -> SetInfo:
    """The registry's entry, or an OodlibError that names the known sets."""
    if name not in SETS:
        raise OodlibError(f"There is no image set {name!r}. Known sets: {', '.join(SETS)}.")
    return SETS[name]
