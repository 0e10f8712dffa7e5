"""A network, its ID set and the OOD sets it is tested on, each image passed forward once. All notebooks start here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from oodlib.bank import FeatureBank
from oodlib.checkpoints import SPECS, Trained, load_or_train, load_trained
from oodlib.data import ImageSet, assert_disjoint, embedded
from oodlib.data.image_lists import ImageList, image_loader, open_paper_set
from oodlib.data.protocol import cifar10_protocol
from oodlib.errors import OodlibError
from oodlib.extraction import extract
from oodlib.models.public import PUBLIC, paper_model, public_model
from oodlib.project import root

__all__ = ["ImageNetFiles", "Testbed", "testbed"]

# OOD sets with the group each is reported in
_EMBEDDED = {"greek": "near", "cyrillic": "near", "armenian": "near", "georgian": "near", "hebrew": "near",
             "math": "near", "digits": "far", "textures": "far", "unit_tests": "far"}
_DISTINCT = {"digits": 537}      # handwritten drawings there are; more images would repeat them with other jitter
_IMAGENET = {"inaturalist": "far", "sun": "far", "places": "far", "textures": "far"}


@dataclass(frozen=True)
class ImageNetFiles:
    """Where a user keeps ImageNet-scale data and weights (the ``paper`` profile).

    data_root : folder laid out as `oodlib.data.describe_paper_sets` prints
    weights : file of the network; without it timm downloads the tag's own, or leaves them random if not ``pretrained``
    id_list : list with the checkpoint's own class order, such as MOS's ``imagenet2012_val_list.txt``
    expected_accuracy : asserted on the ID images before any score
    """

    data_root: str
    weights: str | None = None
    id_list: str | None = None
    expected_accuracy: float = 0.7
    pretrained: bool = True


@dataclass(frozen=True, eq=False)
class Testbed:
    """One network with the feature banks of its ID and OOD sets.

    Attributes
    ----------
    network, id_name : names for tables
    model, mean, std : to run it on more images
    fit : ID training images, for methods that learn something; None where the profile has none
    val, test : ID images for choices and for reporting; no image is in two of the three (ImageNet: val is part of test)
    ood, group : OOD test sets by name, and near or far for each
    images : the pixels behind the banks, where they fit in memory ("fit", "val", "test" and the OOD names)
    fingerprints, provenance : identity of the data, and of the weights
    notes : what a table must say about a set: incomplete, images left out, not at hand
    """

    network: str
    id_name: str
    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: FeatureBank | None
    val: FeatureBank
    test: FeatureBank
    ood: dict[str, FeatureBank]
    group: dict[str, str]
    images: Mapping[str, ImageSet] = field(repr=False)
    fingerprints: dict[str, str] = field(repr=False)
    provenance: dict[str, Any] = field(repr=False)
    notes: dict[str, str] = field(default_factory=dict, repr=False)


def testbed(network: str, *, n_fit: int = 10_000, n_test: int = 10_000, n_ood: int = 10_000, seed: int = 0,
            device: str = "auto", layers: Sequence[str] = (), cache: Path | None = None,
            imagenet: ImageNetFiles | None = None, progress: bool = True) -> Testbed:
    """Load (or train) a network, gather its data, pass every image through it once, assert its ID accuracy.

    Parameters
    ----------
    network : ``latin_fast`` (embedded data, shipped weights; ``latin_fast:live`` trains it on the spot under ``seed``),
        ``cifar10_fast:<training seed>``, a public CIFAR-10 network (``resnet20_cifar10``, ``resnet56_cifar10``,
        ``densenet100_cifar10``), or a timm name with its tag, for ImageNet-1k
    n_fit, n_test, n_ood : images at most for fitting, for the ID test and for each OOD set
    seed : of every subsample
    layers : earlier layers to keep, by name
    cache : folder for banks; ``data/cache/banks`` of the project where not given
    imagenet : where a user keeps ImageNet-scale data and weights

    Raises
    ------
    OodlibError : unknown network, an ID accuracy below the expected one, ID splits that share an image
    """
    base, _, variant = network.partition(":")
    sets: dict[str, ImageSet] = {}
    notes: dict[str, str] = {}
    loaders: dict[str, DataLoader] = {}
    if base == "latin_fast":
        trained = load_or_train(base, seed=seed, device=device) if variant == "live" else load_trained(base)
        sets, group = _embedded(n_fit, n_test, n_ood, seed)
    elif base in SPECS:
        trained = load_trained(base, seed=int(variant or 0))
        sets, group, notes = _cifar10(n_fit, n_test, n_ood, seed)
    elif base in PUBLIC:
        model, info = public_model(base)
        accuracy, n = info.measured_accuracy
        trained = Trained(model, info.mean, info.std, {"expected": accuracy - 0.02, "sha256": info.sha256, "n_test": n,
                                                       "accuracy": accuracy, "address": info.address})
        sets, group, notes = _cifar10(n_fit, n_test, n_ood, seed)
    else:
        trained, loaders, group = _imagenet(network, n_test, n_ood, seed, imagenet)
    if sets:
        assert_disjoint(sets["fit"], sets["val"], sets["test"])
    fingerprints = {name: s.fingerprint for name, s in sets.items()}
    fingerprints |= {name: _list_fingerprint(loader.dataset) for name, loader in loaders.items()}  # type: ignore
    options: dict[str, Any] = {"layers": layers, "cache": cache or root() / "data" / "cache" / "banks",
                               "model_name": network.replace(":", "-"), "device": device, "progress": progress}
    every: dict[str, Any] = {**sets, **loaders}
    banks = {name: extract(trained.model, data, mean=trained.mean, std=trained.std, fingerprint=fingerprints[name],
                           **options) for name, data in every.items()}
    banks["test"].require_accuracy(trained.provenance["expected"], what=network)
    return Testbed(network, sets["test"].name if sets else "imagenet-1k", trained.model, trained.mean, trained.std,
                   banks.get("fit"), banks["val"], banks["test"], {name: banks[name] for name in group}, group, sets,
                   fingerprints, trained.provenance, notes)


def _embedded(n_fit: int, n_test: int, n_ood: int, seed: int) -> tuple[dict[str, ImageSet], dict[str, str]]:
    sets = {"fit": embedded("latin", "train", n=n_fit), "val": embedded("latin", "val", n=min(n_test, 1000)),
            "test": embedded("latin", "test", n=n_test)}
    ood = {name: embedded(name, n=min(n_ood, _DISTINCT.get(name, n_ood)), seed=seed) for name in _EMBEDDED}
    return sets | ood, dict(_EMBEDDED)


def _cifar10(n_fit: int, n_test: int, n_ood: int,
             seed: int) -> tuple[dict[str, ImageSet], dict[str, str], dict[str, str]]:
    protocol = cifar10_protocol(n_fit=n_fit, seed=seed)
    ood = {name: s.sample(n_ood, seed=seed) for name, s in (protocol.near | protocol.far).items()}
    sets = {"fit": protocol.id_fit, "val": protocol.id_val, "test": protocol.id_test.sample(n_test, seed=seed)}
    group = {name: "near" if name in protocol.near else "far" for name in ood}
    return sets | ood, group, protocol.notes | protocol.missing


def _imagenet(network: str, n_test: int, n_ood: int, seed: int, files: ImageNetFiles | None,
              ) -> tuple[Trained, dict[str, DataLoader], dict[str, str]]:
    """ImageNet-1k validation and the four OOD sets of the GradNorm paper."""
    if files is None:
        raise OodlibError(f"testbed: {network!r} is none of {', '.join([*SPECS, *PUBLIC])}, so it is taken as a timm "
                          "model for ImageNet-1k, which needs imagenet=ImageNetFiles(data_root, ...).")
    model, transform = paper_model(network, files.weights, pretrained=files.pretrained,
                                   preprocessing="gradnorm" if "_bit" in network else "timm")

    def loader(images: ImageList, rows: NDArray) -> DataLoader:
        chosen = [(images.paths[i], int(images.labels[i])) for i in np.sort(rows)]
        return image_loader(ImageList(images.root, chosen, transform=images.transform, name=images.name))

    ids = open_paper_set("imagenet-1k", files.data_root, transform=transform, list_file=files.id_list)
    if len(set(ids.paths)) < len(ids):
        raise OodlibError(f"testbed: {files.id_list or ids.root} names an image more than once, so it could be used "
                          "for choices and for reporting. Remove the repeated rows.")
    order = np.random.default_rng(seed).permutation(len(ids))
    n_val = max(1, len(order) // 20)
    # the paper tests on every validation image and chooses nothing, so "val" is a part of "test" here
    loaders = {"val": loader(ids, order[:n_val]), "test": loader(ids, order[:n_test])}
    for name in _IMAGENET:
        images = open_paper_set(name, files.data_root, transform=transform)
        loaders[name] = loader(images, np.random.default_rng(seed).permutation(len(images))[:n_ood])
    provenance = {"expected": files.expected_accuracy, "weights": files.weights or f"timm {network}"}
    return Trained(model, (), (), provenance), loaders, dict(_IMAGENET)


def _list_fingerprint(images: ImageList) -> str:
    """Identity of a list: its rows, the sizes of the files, and what the transform does."""
    digest = hashlib.sha256(repr(images.transform).encode())
    for path, label in zip(images.paths, images.labels, strict=True):
        digest.update(f"{path} {label} {(images.root / path).stat().st_size}\n".encode())
    return digest.hexdigest()
