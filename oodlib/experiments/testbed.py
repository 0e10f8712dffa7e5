"""A network, its ID set and the OOD sets it is tested on, each image passed forward once. All
notebooks start here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from oodlib.data import ImageSet, assert_disjoint, embedded, patch_shuffled
from oodlib.data.cifar import cifar_protocol
from oodlib.data.folders import ImageList, image_loader
from oodlib.data.imagenet import open_paper_set
from oodlib.errors import OodlibError
from oodlib.features.extract import batches, extract
from oodlib.features.feature_bank import FeatureBank
from oodlib.models.pretrained import PUBLIC, paper_model, public_model
from oodlib.models.shipped import SPECS, Trained, load_or_train, load_trained
from oodlib.workspace import root

__all__ = ["ImageNetFiles", "Testbed", "testbed", "validation_banks"]

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
_DISTINCT = {
    "digits": 537
}  # handwritten drawings there are; more images would repeat them with other jitter
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
        OpenOOD's, else all of the
        folder), and keep the images for choices out of the test
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Testbed:
    """One network with the feature banks of its ID and OOD sets.

    Attributes
    ----------
    network, id_name : names for tables
    model, mean, std : to run it on more images
    fit : ID training images, for methods that learn something; None where the profile has none
    val, test : ID images for choices and for reporting; no image is in two of the three (ImageNet
        without training images: val is part of test)
    ood, group : OOD test sets by name, and near or far for each
    ood_val : OOD sets for choosing hyper-parameters, by name; never tested
    leaks : the sets of ``ood_val`` whose source is tested too -> that tested set; `clean_val`
        leaves them out
    images : the pixels behind the banks, where they fit in memory ("fit", "val", "test" and the OOD
        names)
    fingerprints, provenance : identity of the data, and of the weights
    notes : what a table must say about a set: incomplete, images left out, not available
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
    ood_val: dict[str, FeatureBank]
    leaks: dict[str, str]
    images: Mapping[str, ImageSet] = field(repr=False)
    fingerprints: dict[str, str] = field(repr=False)
    provenance: dict[str, Any] = field(repr=False)
    notes: dict[str, str] = field(default_factory=dict, repr=False)
    loaders: Mapping[str, DataLoader] = field(default_factory=dict, repr=False)

    @property
    def clean_val(self) -> dict[str, FeatureBank]:
        """The OOD validation sets that share no source with a tested set."""
        return {name: bank for name, bank in self.ood_val.items() if name not in self.leaks}

    @property
    def pictures(self) -> dict[str, NDArray[np.uint8]]:
        """Pixels (n, 3, h, w) of the ID test set, then of every OOD set, where they fit in memory;
        titles as keys.
        """
        titles = {
            "test": f"{self.id_name} (ID)",
            **{name: f"{name} ({self.group[name]})" for name in self.ood},
        }
        return {
            title: self.images[name].images for name, title in titles.items() if name in self.images
        }

    def batches(self, name: str, *, batch_size: int = 250) -> Iterable[tuple[Tensor, Tensor]]:
        """Network inputs and labels of a set ("fit", "val", "test" or an OOD name), for one more
        pass over it.

        OodlibError for a set that is not there.
        """
        data: Any = self.images.get(name, self.loaders.get(name))
        if data is None:
            known = ", ".join({**self.images, **self.loaders})
            raise OodlibError(f"batches: {self.network} has no set {name!r}. It has {known}.")
        return batches(data, batch_size=batch_size, mean=self.mean, std=self.std)


def testbed(
    network: str,
    *,
    n_fit: int = 10_000,
    n_test: int = 10_000,
    n_ood: int = 10_000,
    seed: int = 0,
    device: str = "auto",
    layers: Sequence[str] = (),
    cache: Path | None = None,
    imagenet: ImageNetFiles | None = None,
    progress: bool = True,
) -> Testbed:
    """Load (or train) a network, gather its data, pass every image through it once, assert its ID
    accuracy.

    Parameters
    ----------
    network : ``latin_fast`` (embedded data, shipped weights; ``latin_fast:live`` trains it on the spot under ``seed``,
        ``latin_fast:epoch3`` is the shipped network after three epochs), ``cifar10_fast:<training
        seed>``, a public CIFAR network (``resnet20_cifar10``, ``densenet100_cifar100``, ...), for
        ImageNet-1k a timm name with its tag or ``torchvision/<name>``, or OpenOOD's
        ``imagenet200_resnet18:<training seed>`` for ImageNet-200
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
    loaders: dict[str, DataLoader] = {}
    if base == "latin_fast":
        trained = (
            load_or_train(base, seed=seed, device=device)
            if variant == "live"
            else _snapshot(base, variant)
        )
        parts = _embedded(n_fit, n_test, n_ood, seed)
    elif base in SPECS:
        trained = load_trained(base, seed=int(variant or 0))
        parts = _cifar("cifar10", n_fit, n_test, n_ood, seed)
    elif base in PUBLIC:
        model, info = public_model(base)
        accuracy, n = info.measured_accuracy
        trained = Trained(
            model,
            info.mean,
            info.std,
            {
                "expected": accuracy - 0.02,
                "sha256": info.sha256,
                "n_test": n,
                "accuracy": accuracy,
                "address": info.address,
            },
        )
        parts = _cifar(info.id_set, n_fit, n_test, n_ood, seed)
    else:
        trained, parts, loaders = _imagenet(network, n_fit, n_test, n_ood, seed, imagenet)
    sets = parts.sets
    if sets:
        assert_disjoint(*sets.values())
    fingerprints = {name: s.fingerprint for name, s in sets.items()}
    fingerprints |= {name: loader.dataset.fingerprint for name, loader in loaders.items()}  # type: ignore
    options: dict[str, Any] = {
        "layers": layers,
        "cache": cache or root() / "data" / "cache" / "banks",
        "model_name": network.replace(":", "-").replace("/", "-"),
        "device": device,
        "progress": progress,
    }
    every: dict[str, Any] = {**sets, **loaders}
    banks = {
        name: extract(
            trained.model,
            data,
            mean=trained.mean,
            std=trained.std,
            fingerprint=fingerprints[name],
            **options,
        )
        for name, data in every.items()
    }
    for name in {"fit", "test"} & banks.keys():  # "fit" too: its labels may come from another list
        banks[name].require_accuracy(trained.provenance["expected"], what=network)
    return Testbed(
        network=network,
        id_name=parts.id_name,
        model=trained.model,
        mean=trained.mean,
        std=trained.std,
        fit=banks.get("fit"),
        val=banks["val"],
        test=banks["test"],
        ood={name: banks[name] for name in parts.group},
        group=parts.group,
        ood_val={name: banks[name] for name in parts.ood_val},
        leaks=parts.leaks,
        images=sets,
        fingerprints=fingerprints,
        provenance=trained.provenance,
        notes=parts.notes,
        loaders=loaders,
    )


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The image sets of a test bed ("fit", "val", "test" and OOD names), and the role of each OOD
    set.
    """

    id_name: str
    sets: dict[str, ImageSet]
    group: dict[str, str]
    ood_val: tuple[str, ...]
    leaks: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)


def _snapshot(name: str, variant: str) -> Trained:
    if not variant:
        return load_trained(name)
    epoch = variant.removeprefix("epoch")
    if not epoch.isdecimal():
        raise OodlibError(
            f"testbed: {name} knows no variant {variant!r}. Use {name}, {name}:live or "
            f"{name}:epoch<k>."
        )
    found = load_trained(name, epoch=int(epoch))
    return Trained(
        found.model, found.mean, found.std, found.provenance | {"expected": 0.0}
    )  # untrained ones too


def _embedded(n_fit: int, n_test: int, n_ood: int, seed: int) -> _Parts:
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
    return _Parts(
        id_name="latin",
        sets=sets | ood | val,
        group=dict(_EMBEDDED),
        ood_val=tuple(val),
        leaks={"greek-val": "greek"},
    )


def _cifar(id_name: str, n_fit: int, n_test: int, n_ood: int, seed: int) -> _Parts:
    protocol = cifar_protocol(id_name, n_fit=n_fit, n_val=N_VAL, seed=seed)
    ood = {name: s.sample(n_ood, seed=seed) for name, s in (protocol.near | protocol.far).items()}
    sets = {"val": protocol.id_val, "test": protocol.id_test.sample(n_test, seed=seed)}
    if protocol.id_fit is not None:
        sets = {"fit": protocol.id_fit, **sets}
    val = {"patch_shuffled": patch_shuffled(protocol.id_val, seed=seed), **protocol.ood_val}
    group = {name: "near" if name in protocol.near else "far" for name in ood}
    return _Parts(
        id_name=id_name,
        sets=sets | ood | val,
        group=group,
        ood_val=tuple(val),
        leaks=protocol.leaks,
        notes=protocol.notes | protocol.missing,
    )


def _imagenet(
    network: str, n_fit: int, n_test: int, n_ood: int, seed: int, files: ImageNetFiles | None
) -> tuple[Trained, _Parts, dict[str, DataLoader]]:
    """ImageNet's validation images, the OOD sets of ``files``, and the training images where asked
    for.
    """
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

    def loader(images: ImageList, rows: NDArray) -> DataLoader:
        chosen = [(images.paths[i], int(images.labels[i])) for i in np.sort(rows)]
        return image_loader(
            ImageList(images.root, chosen, transform=images.transform, name=images.name)
        )

    def sampled(images: ImageList, n: int) -> DataLoader:
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
        _Parts(
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


def validation_banks(bed: Testbed, names: Sequence[str] | None = None) -> dict[str, FeatureBank]:
    """ID validation images as "id", and the OOD validation sets that ratios may be chosen on.

    Parameters
    ----------
    bed : test bed
    names : OOD validation sets; by default all whose source is not tested

    Raises
    ------
    OodlibError : a set is tested, or its source is; a set is unknown; there is none; an image is in two splits
    """
    chosen = list(bed.clean_val) if names is None else list(names)
    for name in chosen:
        if name in bed.ood:
            raise OodlibError(
                f"validation_banks: {name} is a test set of {bed.network}: a ratio chosen on it "
                "would be chosen on the test. Use "
                f"{', '.join(bed.clean_val) or 'a set that is not tested'}."
            )
        if name in bed.leaks:
            raise OodlibError(
                f"validation_banks: {name} comes from the source of {bed.leaks[name]}, which is "
                f"tested. Use {', '.join(bed.clean_val) or 'a set of another source'}."
            )
        if name not in bed.ood_val:
            raise OodlibError(
                f"validation_banks: {bed.network} has no validation set {name!r}. It has "
                f"{', '.join(bed.ood_val) or 'none'}."
            )
    if not chosen:
        raise OodlibError(
            f"validation_banks: {bed.network} has no OOD validation set whose source is not "
            "tested, so no ratio can be chosen."
        )
    sets = ["val", "test", *bed.ood, *chosen]
    if bed.images:
        assert_disjoint(*(bed.images[name] for name in sets))
    else:
        _paths_disjoint(bed, sets)
    return {"id": bed.val, **{name: bed.ood_val[name] for name in chosen}}


def _paths_disjoint(bed: Testbed, sets: Sequence[str]) -> None:
    seen: dict[Path, str] = {}
    for name in sets:
        images: Any = bed.loaders[name].dataset
        for path in (images.root / p for p in images.paths):
            if seen.setdefault(path, name) != name:
                raise OodlibError(
                    f"validation_banks: {path} is in {seen[path]} and in {name} of {bed.network}. "
                    "Choose on images that are not tested: ImageNetFiles(train=True) keeps them "
                    "apart."
                )
