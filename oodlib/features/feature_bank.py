"""FeatureBank: what one forward pass leaves of a data set, in memory or memory-mapped on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oodlib.arrays import to_numpy
from oodlib.errors import OodlibError
from oodlib.files import atomic_folder, sha256, write_json

__all__ = ["FeatureBank", "Head"]


@dataclass(frozen=True, eq=False)
class Head:
    """The linear classifier behind the features: ``logits = features @ weight.T + bias``.

    weight : (C, D); bias : (C,)
    mask : (C, D) bool where pruning has removed weights: which ones are left
    """

    weight: NDArray[np.floating]
    bias: NDArray[np.floating]
    mask: NDArray[np.bool_] | None = None

    def __call__(self, features: ArrayLike) -> NDArray[np.float64]:
        """(n, D) -> (n, C), float64."""
        return to_numpy(features).astype(np.float64) @ self.weight.astype(np.float64).T + self.bias

    @property
    def num_classes(self) -> int:
        return len(self.weight)

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of weight and bias in float32: whose head it is."""
        digest = hashlib.sha256(str(self.weight.shape).encode())
        for values in (self.weight, self.bias):
            digest.update(np.ascontiguousarray(values, "<f4").tobytes())
        return digest.hexdigest()

    def masked(self, mask: NDArray[np.bool_]) -> Head:
        """The head without the weights where ``mask`` (C, D) is False, beside those removed before;
        a copy.
        """
        mask = np.asarray(mask, dtype=bool) if self.mask is None else mask & self.mask
        return Head(self.weight * mask, self.bias, mask)


@dataclass(frozen=True, eq=False)
class FeatureBank:
    """Features, logits and labels of N images, and the head that turns the first into the second.

    Attributes
    ----------
    features : (N, D) float32, input of the last linear layer
    logits : (N, C) float32 or float64
    labels : (N,) int64, -1 where unknown; or None
    head : weight (C, D) and bias (C,)
    layers : named earlier layers, each (N, d), pooled over positions; empty unless asked for
    meta : what the bank was made from (model, weights hash, transform, data fingerprint)
    """

    features: NDArray[np.float32]
    logits: NDArray[np.floating]
    labels: NDArray[np.int64] | None
    head: Head
    layers: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_arrays(
        cls,
        features: Any,
        *,
        weight: Any,
        bias: Any = None,
        labels: Any = None,
        logits: Any = None,
        layers: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> FeatureBank:
        """Make a bank from arrays or tensors of any network.

        Parameters
        ----------
        features : (N, D)
        weight, bias : (C, D) and (C,) of the last linear layer; ``bias=None`` means zero
        labels : (N,) integers, optional; methods that need classes ask for them
        logits : (N, C), computed from the head where not given; checked against it where given

        Raises
        ------
        OodlibError : shapes that do not fit, values that are not finite, logits that are not the head's
        """
        features, weight = to_numpy(features), to_numpy(weight)
        if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
            raise OodlibError(
                "FeatureBank: features (N, D) and weight (C, D) need the same D, got "
                f"{features.shape} and {weight.shape}. Is the weight transposed?"
            )
        n, classes = len(features), len(weight)
        bias = np.zeros(classes) if bias is None else to_numpy(bias)
        if bias.shape != (classes,):
            raise OodlibError(f"FeatureBank: bias must be (C,) = ({classes},), got {bias.shape}.")
        if n == 0:
            raise OodlibError(
                "FeatureBank: features hold no row. Check the loader or the filter before it."
            )
        head = Head(weight, bias)
        if labels is not None:
            labels = to_numpy(labels).astype(np.int64)
            if labels.shape != (n,):
                raise OodlibError(f"FeatureBank: labels must be (N,) = ({n},), got {labels.shape}.")
        if not np.issubdtype(features.dtype, np.floating):
            features = features.astype(np.float32)
        for start in range(0, n, 65536):
            if not np.isfinite(features[start : start + 65536]).all():
                raise OodlibError(
                    "FeatureBank: features hold NaN or infinity. Check the transform and the "
                    "weights."
                )
        if logits is None:
            logits = np.concatenate([head(features[i : i + 65536]) for i in range(0, n, 65536)])
        else:
            logits = to_numpy(logits)
            check_head(head, features, logits)
        return cls(
            features,
            logits,
            labels,
            head,
            {k: to_numpy(v) for k, v in (layers or {}).items()},
            meta or {},
        )

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        unknown = (
            f", {self.unknown} labels unknown" if self.labels is not None and self.unknown else ""
        )
        return (
            f"FeatureBank({len(self)} x {self.features.shape[1]} features, {self.head.num_classes} "
            f"classes{unknown}{', ' + self.meta['data'] if 'data' in self.meta else ''})"
        )

    def subset(self, index: NDArray | slice) -> FeatureBank:
        """The chosen rows (integer or boolean index, or a slice), in that order."""
        return FeatureBank(
            self.features[index],
            self.logits[index],
            None if self.labels is None else self.labels[index],
            self.head,
            {k: v[index] for k, v in self.layers.items()},
            self.meta,
        )

    @property
    def unknown(self) -> int:
        """Number of rows whose label is not known: -1, or none at all."""
        return len(self) if self.labels is None else int((self.labels < 0).sum())

    @property
    def accuracy(self) -> float:
        """Share of rows of known label whose arg-max logit is the label, in [0, 1]; `unknown`
        counts the others.

        OodlibError : no label is known
        """
        if self.labels is None or self.unknown == len(self):
            raise OodlibError(
                "FeatureBank.accuracy: this bank has no labels."
                + ("" if self.labels is None else " All are -1, which stands for unknown.")
            )
        known = self.labels >= 0
        return float((self.logits.argmax(1) == self.labels)[known].mean())

    def require_accuracy(self, at_least: float, *, what: str = "the network") -> float:
        """The accuracy, or OodlibError if it is lower: no OOD score means anything without it."""
        if self.accuracy < at_least:
            left_out = f" ({self.unknown} of unknown label left out)" if self.unknown else ""
            raise OodlibError(
                f"{what}: accuracy {self.accuracy:.1%} on {len(self) - self.unknown} ID "
                f"images{left_out}, expected at least {at_least:.1%}. Check the weights, the label "
                "order and the transform."
            )
        return self.accuracy

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder of ``.npy`` files and ``bank.json`` with their checksums; whole or not at
        all.
        """
        arrays: dict[str, NDArray] = {
            "features": self.features,
            "logits": self.logits,
            "weight": self.head.weight,
            "bias": self.head.bias,
        }
        if self.labels is not None:
            arrays["labels"] = self.labels
        arrays |= {f"layer.{name}": value for name, value in self.layers.items()}
        with atomic_folder(path) as temporary:
            for name, value in arrays.items():
                np.save(temporary / f"{name}.npy", value)
            write_checksums(temporary, dict(self.meta))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> FeatureBank:
        """Open a saved bank, memory-mapped.

        ``verify`` compares every file with its checksum (about 1 s per GB).

        Raises
        ------
        OodlibError : no bank there, a file is missing, or a checksum differs
        """
        path = Path(path)
        try:
            sidecar = json.loads((path / "bank.json").read_text())
            for name, digest in sidecar["sha256"].items():
                if verify and sha256(path / name) != digest:
                    raise OodlibError(
                        f"FeatureBank.load: {path / name} does not match its checksum: it was "
                        "changed or cut after writing. Delete the folder and extract again."
                    )
            arrays = {
                name.removesuffix(".npy"): np.load(path / name, mmap_mode="r")
                for name in sidecar["sha256"]
            }
            head = Head(np.asarray(arrays["weight"]), np.asarray(arrays["bias"]))
            layers = {
                k.removeprefix("layer."): v for k, v in arrays.items() if k.startswith("layer.")
            }
            if "logits" not in arrays:  # left out to halve the size: the head gives them
                return cls.from_arrays(
                    arrays["features"],
                    weight=head.weight,
                    bias=head.bias,
                    labels=arrays.get("labels"),
                    layers=layers,
                    meta=sidecar["meta"],
                )
            return cls(
                arrays["features"],
                arrays["logits"],
                arrays.get("labels"),
                head,
                layers,
                sidecar["meta"],
            )
        except (FileNotFoundError, NotADirectoryError, KeyError, json.JSONDecodeError) as error:
            raise OodlibError(
                f"FeatureBank.load: {path} is not a complete bank ({error}). Extract again."
            ) from error


def check_head(
    head: Head, features: NDArray, logits: NDArray, *, rtol: float = 1e-3, rows: int = 1024
) -> None:
    """Raise OodlibError unless ``head(features)`` gives the logits (first ``rows`` rows, relative
    to their size).
    """
    expected, got = head(features[:rows]), np.asarray(logits[:rows], dtype=np.float64)
    if expected.shape != got.shape or len(features) != len(logits):
        raise OodlibError(
            f"FeatureBank: logits must be (N, C) = {(len(features), head.num_classes)}, "
            f"got {logits.shape}."
        )
    if not np.isfinite(got).all():
        raise OodlibError(
            "FeatureBank: logits hold NaN or infinity. Check the transform and the weights."
        )
    error = np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-12)
    if error > rtol:
        raise OodlibError(
            f"FeatureBank: head(features) differs from the logits by {error:.1e} of their size (at "
            f"most {rtol:g}). The features are not the input of this head, or something follows "
            "the head."
        )


def write_checksums(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write ``bank.json``: the checksum of every array in the folder, and where they came from."""
    write_json(
        folder / "bank.json",
        {
            "format": 1,
            "meta": dict(meta),
            "sha256": {p.name: sha256(p) for p in sorted(folder.glob("*.npy"))},
        },
    )
