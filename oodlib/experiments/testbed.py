"""A network, its ID set and the OOD sets it is tested on, each image passed forward once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from oodlib.data import ImageSet, assert_disjoint
from oodlib.errors import OodlibError
from oodlib.experiments import protocols
from oodlib.experiments.protocols import ImageNetFiles
from oodlib.features.extract import batches, extract
from oodlib.features.feature_bank import FeatureBank
from oodlib.models.pretrained import PUBLIC, public_model
from oodlib.models.shipped import SPECS, Trained, load_or_train, load_trained
from oodlib.workspace import root

__all__ = ["Testbed", "testbed", "validation_banks"]


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
    loaders: Mapping[str, DataLoader[Any]] = field(default_factory=dict, repr=False)

    @property
    def clean_val(self) -> dict[str, FeatureBank]:
        """The OOD validation sets that share no source with a tested set."""
        return {name: bank for name, bank in self.ood_val.items() if name not in self.leaks}

    @property
    def tested(self) -> dict[str, FeatureBank]:
        """The ID test set as "id", and each OOD set."""
        return {"id": self.test, **self.ood}

    @property
    def pictures(self) -> dict[str, NDArray[np.uint8]]:
        """Title -> pixels (n, 3, h, w) of the ID test set and OOD sets that fit in memory."""
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
    """Load (or train) a network and its images, pass each image once, assert the ID accuracy.

    Parameters
    ----------
    network : ``latin_fast`` (embedded data, shipped weights; ``latin_fast:live`` trains it on the
        spot under ``seed``, ``latin_fast:epoch3`` is the shipped network after three epochs),
        ``cifar10_fast:<training seed>``, a public CIFAR network (``resnet20_cifar10``,
        ``densenet100_cifar100``, ...), for ImageNet-1k a timm name with its tag or
        ``torchvision/<name>``, or OpenOOD's ``imagenet200_resnet18:<training seed>``
    n_fit, n_test, n_ood : images at most for fitting, for the ID test and for each OOD set
    seed : of every subsample
    layers : earlier layers to keep, by name
    cache : folder for banks; ``data/cache/banks`` of the project where not given
    imagenet : where a user keeps ImageNet-scale data and weights

    Raises
    ------
    OodlibError : unknown network, too low an ID accuracy, ID splits that share an image
    """
    base, _, variant = network.partition(":")
    loaders: dict[str, DataLoader[Any]] = {}
    if base == "latin_fast":
        trained = (
            load_or_train(base, seed=seed, device=device)
            if variant == "live"
            else _snapshot(base, variant)
        )
        parts = protocols.embedded_sets(n_fit, n_test, n_ood, seed)
    elif base in SPECS:
        trained = load_trained(base, seed=int(variant or 0))
        parts = protocols.cifar("cifar10", n_fit, n_test, n_ood, seed)
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
        parts = protocols.cifar(info.id_set, n_fit, n_test, n_ood, seed)
    else:
        trained, parts, loaders = protocols.imagenet(network, n_fit, n_test, n_ood, seed, imagenet)
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


def validation_banks(bed: Testbed, names: Sequence[str] | None = None) -> dict[str, FeatureBank]:
    """ID validation images as "id", and the OOD validation sets that ratios may be chosen on.

    Parameters
    ----------
    bed : test bed
    names : OOD validation sets; by default all whose source is not tested

    Raises
    ------
    OodlibError : a set or its source is tested; a set is unknown; no set; an image in two splits
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
