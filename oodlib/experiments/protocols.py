"""Which images a test bed holds: the embedded sets, the CIFAR protocols, or a user's ImageNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from oodlib.data import ImageSet, embedded, patch_shuffled
from oodlib.data.cifar import cifar_protocol
from oodlib.data.folders import ImageList, image_loader
from oodlib.data.imagenet import open_paper_set
from oodlib.errors import OodlibError
from oodlib.models.pretrained import PUBLIC, paper_model
from oodlib.models.shipped import SPECS, Trained

# OOD sets with the group each is reported in
_EMBEDDED = {
    "greek": "near",
    "cyrillic": "near",
    "armenian": "near",
    "georgian": "near",
    "hebrew": "near",
    "math": "near",
    "digits": "far",
    "textures": "far",
    "unit_tests": "far",
}
# handwritten drawings there are; more images would repeat them with other jitter
_DISTINCT = {"digits": 537}
_IMAGENET = {"inaturalist": "far", "sun": "far", "places": "far", "textures": "far"}
OPENOOD_SETS = {
    "ssb-hard": "near",
    "ninco": "near",
    "inaturalist": "far",
    "textures": "far",
    "openimage-o": "far",
}
N_VAL = 1000  # images at most of a validation set, ID or OOD
IMAGENET200 = "imagenet200_resnet18"  # OpenOOD's networks of three seeds


@dataclass(frozen=True)
class ImageNetFiles:
    """Where a user keeps ImageNet-scale data and weights (the ``paper`` profile).

    data_root : folder laid out as `oodlib.data.describe_paper_sets` prints
    ood : the OOD sets to test, with the group of each; by default those of the GradNorm paper
    ood_val : OOD validation sets, by default one whose source the default does not test
    train, train_list : gather training images too, as ``fit`` (by a list of the user's, else
        OpenOOD's, else all of the folder), and keep the images for choices out of the test
    num_classes : of the weights file, where it is not 1000
    weights : file of the network; without it timm downloads the tag's own, or leaves them random if
        not ``pretrained``
    id_list : list with the checkpoint's own class order, such as MOS's
        ``imagenet2012_val_list.txt``
    expected_accuracy : asserted on the ID images before any score
    """

    data_root: str
    weights: str | None = None
    id_list: str | None = None
    expected_accuracy: float = 0.7
    pretrained: bool = True
    ood: Mapping[str, str] = field(default_factory=lambda: dict(_IMAGENET))
    ood_val: tuple[str, ...] = ("openimage-o-val",)
    train: bool = False
    train_list: str | None = None
    num_classes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Image sets of a test bed ("fit", "val", "test", OOD names), and the role of each OOD set."""

    id_name: str
    sets: dict[str, ImageSet]
    group: dict[str, str]
    ood_val: tuple[str, ...]
    leaks: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)


def embedded_sets(n_fit: int, n_test: int, n_ood: int, seed: int) -> Parts:
    """The built-in sets of a run: Latin letters as ID, scripts as near-OOD, the rest as far-OOD."""
    n_val = min(n_test, N_VAL)
    sets = {
        "fit": embedded("latin", "train", n=n_fit),
        "val": embedded("latin", "val", n=n_val),
        "test": embedded("latin", "test", n=n_test),
    }
    ood = {
        name: embedded(name, n=min(n_ood, _DISTINCT.get(name, n_ood)), seed=seed)
        for name in _EMBEDDED
    }
    val = {
        "patch_shuffled": patch_shuffled(sets["val"], seed=seed),
        "arabic": embedded("arabic", "val", n=n_val, seed=seed),
        "greek-val": embedded("greek", "val", n=n_val, seed=seed),
    }
    return Parts(
        id_name="latin",
        sets=sets | ood | val,
        group=dict(_EMBEDDED),
        ood_val=tuple(val),
        leaks={"greek-val": "greek"},
    )


def cifar(id_name: str, n_fit: int, n_test: int, n_ood: int, seed: int) -> Parts:
    """The protocol of CIFAR-10 or CIFAR-100, with the OOD sets that are available."""
    protocol = cifar_protocol(id_name, n_fit=n_fit, n_val=N_VAL, seed=seed)
    ood = {name: s.sample(n_ood, seed=seed) for name, s in (protocol.near | protocol.far).items()}
    sets = {"val": protocol.id_val, "test": protocol.id_test.sample(n_test, seed=seed)}
    if protocol.id_fit is not None:
        sets = {"fit": protocol.id_fit, **sets}
    val = {"patch_shuffled": patch_shuffled(protocol.id_val, seed=seed), **protocol.ood_val}
    group = {name: "near" if name in protocol.near else "far" for name in ood}
    return Parts(
        id_name=id_name,
        sets=sets | ood | val,
        group=group,
        ood_val=tuple(val),
        leaks=protocol.leaks,
        notes=protocol.notes | protocol.missing,
    )


def imagenet(
    network: str, n_fit: int, n_test: int, n_ood: int, seed: int, files: ImageNetFiles | None
) -> tuple[Trained, Parts, dict[str, DataLoader[Any]]]:
    """ImageNet's validation images, OOD sets of ``files``, and training images where asked for."""
    if files is None:
        raise OodlibError(
            f"testbed: {network!r} is none of {', '.join([*SPECS, *PUBLIC])}, so it is taken as a "
            "timm or torchvision model for ImageNet-1k, which needs "
            "imagenet=ImageNetFiles(data_root, ...)."
        )
    base, _, run = network.partition(":")
    id_name = "imagenet-1k"
    if base == IMAGENET200:
        network, id_name, files = (
            "torchvision/resnet18",
            "imagenet-200",
            _imagenet200(files, run or "0"),
        )
    model, transform = paper_model(
        network,
        files.weights,
        pretrained=files.pretrained,
        num_classes=files.num_classes,
        preprocessing="gradnorm" if "_bit" in network else "own",
    )
    opened = partial(open_paper_set, data_root=files.data_root, transform=transform)

    def loader(images: ImageList, rows: NDArray[np.int64]) -> DataLoader[Any]:
        chosen = [(images.paths[i], int(images.labels[i])) for i in np.sort(rows)]
        return image_loader(
            ImageList(images.root, chosen, transform=images.transform, name=images.name)
        )

    def sampled(images: ImageList, n: int) -> DataLoader[Any]:
        return loader(images, np.random.default_rng(seed).permutation(len(images))[:n])

    ids = opened("imagenet-1k", list_file=files.id_list)
    if len(set(ids.paths)) < len(ids):
        raise OodlibError(
            f"testbed: {files.id_list or ids.root} names an image more than once, so it could be "
            "used for choices and for reporting. Remove the repeated rows."
        )
    order = np.random.default_rng(seed).permutation(len(ids))
    n_val = max(1, len(order) // 20)
    # GradNorm's authors test on every validation image and choose nothing, so "val" is then a part
    # of "test"
    reported = order[n_val:] if files.train else order
    loaders = {"val": loader(ids, order[:n_val]), "test": loader(ids, reported[:n_test])}
    if files.train:
        loaders["fit"] = sampled(opened("imagenet-1k-train", list_file=files.train_list), n_fit)
    notes: dict[str, str] = {}
    for name in files.ood:
        loaders[name] = sampled(opened(name), n_ood)
    for name in files.ood_val:
        try:
            loaders[name] = sampled(opened(name), N_VAL)
        except OodlibError as error:
            notes[name] = str(error)
    val = tuple(name for name in files.ood_val if name in loaders)
    leaks = {
        name: name.removesuffix("-val") for name in val if name.removesuffix("-val") in files.ood
    }
    provenance = {
        "expected": files.expected_accuracy,
        "weights": files.weights or f"{network}, as published",
    }
    return (
        Trained(model, (), (), provenance),
        Parts(
            id_name=id_name, sets={}, group=dict(files.ood), ood_val=val, leaks=leaks, notes=notes
        ),
        loaders,
    )


def _imagenet200(files: ImageNetFiles, run: str) -> ImageNetFiles:
    """OpenOOD's network and lists of ImageNet-200, where ``files`` does not name others."""
    root = Path(files.data_root)
    lists = root / "benchmark_imglist" / "imagenet200"
    weights = Path(
        files.weights
        or root
        / "results"
        / f"{IMAGENET200}_224x224_base_e90_lr0.1_default"
        / f"s{run}"
        / "best.ckpt"
    )
    ids, train = (
        Path(given or lists / name)
        for given, name in (
            (files.id_list, "test_imagenet200.txt"),
            (files.train_list, "train_imagenet200.txt"),
        )
    )
    missing = [
        str(path)
        for path in (weights, ids, *([train] if files.train else []))
        if not path.is_file()
    ]
    if missing:
        raise OodlibError(
            f"{IMAGENET200}:{run}: {', '.join(missing)} missing. Unpack OpenOOD v1.5's "
            "imagenet200_res18_v1.5 and benchmark_imglist there, or leave the network out of "
            "networks."
        )
    return replace(
        files,
        weights=str(weights),
        id_list=str(ids),
        train_list=str(train),
        num_classes=files.num_classes or 200,
    )
