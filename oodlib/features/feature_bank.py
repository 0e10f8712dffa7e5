"""FeatureBank: what one forward pass leaves of a data set, in memory or memory-mapped on disk."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oodlib.arrays import check_finite, check_shape, to_numpy
from oodlib.errors import OodlibError
from oodlib.files import atomic_folder, read_json, sha256, write_json


@dataclass(frozen=True, eq=False)
class Head:
    """The linear classifier behind the features: ``logits = features @ weight.T + bias``.

    weight (C, D), bias (C,); mask (C, D) bool: which weights pruning has left, if it was pruned
    """

    weight: NDArray[np.floating[Any]]
    bias: NDArray[np.floating[Any]]
    mask: NDArray[np.bool_] | None = None

    def __call__(self, features: ArrayLike) -> NDArray[np.float64]:
        """(n, D) -> (n, C), float64."""
        h = to_numpy(features).astype(np.float64)
        return np.asarray(h @ self.weight.astype(np.float64).T + self.bias)

    @property
    def num_classes(self) -> int:
        return len(self.weight)

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of weight and bias in float32, which identifies the network."""
        digest = hashlib.sha256(str(self.weight.shape).encode())
        for values in (self.weight, self.bias):
            digest.update(np.ascontiguousarray(values, "<f4").tobytes())
        return digest.hexdigest()

    def masked(self, mask: NDArray[np.bool_]) -> Self:
        """A copy without the weights where ``mask`` (C, D) is False and those removed before."""
        mask = np.asarray(mask, dtype=bool) if self.mask is None else mask & self.mask
        return replace(self, weight=self.weight * mask, mask=mask)


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

    Examples
    --------
    >>> h = np.array([[2.0, 0.0], [0.0, 1.0]])
    >>> bank = FeatureBank.from_arrays(h, weight=np.eye(2), labels=[0, 0])
    >>> bank, bank.accuracy
    (FeatureBank(2 x 2 features, 2 classes), 0.5)
    >>> bank.logits
    array([[2., 0.],
           [0., 1.]])
    """

    features: NDArray[np.float32]
    logits: NDArray[np.floating[Any]]
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
    ) -> Self:
        """Make a bank from arrays or tensors of any network.

        Parameters
        ----------
        weight, bias : (C, D) and (C,) of the last linear layer; ``bias=None`` means zero
        labels : (N,) integers; methods that need classes ask for them
        logits : (N, C), checked against the head where given, else computed from it

        Raises
        ------
        OodlibError : shapes that do not fit, values that are not finite, logits of another head
        """
        features, weight = to_numpy(features), to_numpy(weight)
        if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
            raise OodlibError(
                "FeatureBank: features (N, D) and weight (C, D) need the same D, got "
                f"{features.shape} and {weight.shape}. Is the weight transposed?"
            )
        n, classes = len(features), len(weight)
        bias = np.zeros(classes) if bias is None else to_numpy(bias)
        check_shape("FeatureBank: bias", bias, "(C,)", (classes,))
        if n == 0:
            raise OodlibError("FeatureBank: features hold no row. Check the loader or the filter.")
        head = Head(weight, bias)
        if labels is not None:
            labels = to_numpy(labels).astype(np.int64)
            check_shape("FeatureBank: labels", labels, "(N,)", (n,))
        if not np.issubdtype(features.dtype, np.floating):
            features = features.astype(np.float32)
        check_finite("FeatureBank: features", features)
        if logits is None:
            logits = np.concatenate([head(features[i : i + 65536]) for i in range(0, n, 65536)])
        else:
            logits = to_numpy(logits)
            check_head(head, features, logits)
        pooled = {name: to_numpy(values) for name, values in (layers or {}).items()}
        return cls(features, logits, labels, head, pooled, meta or {})

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        facts = [f"{len(self)} x {self.features.shape[1]} features"]
        facts += [f"{self.head.num_classes} classes"]
        if self.labels is not None and self.unknown:
            facts += [f"{self.unknown} labels unknown"]
        if "data" in self.meta:
            facts += [self.meta["data"]]
        return f"FeatureBank({', '.join(facts)})"

    def subset(self, index: NDArray[Any] | slice) -> Self:
        """The chosen rows (integer or boolean index, or a slice), in that order."""
        chosen = {name: values[index] for name, values in self.arrays().items()}
        return self.of_arrays(chosen, self.head, self.meta)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything with one row per image, by name; layers as ``layer.<name>``."""
        labels = {} if self.labels is None else {"labels": self.labels}
        layers = {f"layer.{name}": values for name, values in self.layers.items()}
        return {"features": self.features, "logits": self.logits, **labels, **layers}

    @classmethod
    def of_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], head: Head, meta: Mapping[str, Any] | None = None
    ) -> Self:
        """The bank of what `arrays` returns, unchecked."""
        features, logits, labels = arrays["features"], arrays["logits"], arrays.get("labels")
        return cls(features, logits, labels, head, _layers(arrays), meta or {})

    @property
    def unknown(self) -> int:
        """Number of rows whose label is not known: -1, or none at all."""
        return len(self) if self.labels is None else int((self.labels < 0).sum())

    @property
    def accuracy(self) -> float:
        """Share of rows of known label whose arg-max logit is the label; OodlibError: none is."""
        if self.labels is None or self.unknown == len(self):
            why = "" if self.labels is None else " All are -1, which stands for unknown."
            raise OodlibError(f"FeatureBank.accuracy: this bank has no labels.{why}")
        known = self.labels >= 0
        return float((self.logits.argmax(1) == self.labels)[known].mean())

    def require_accuracy(self, at_least: float, *, what: str = "the network") -> float:
        """The accuracy, or OodlibError if it is lower: no OOD score means anything without it."""
        if self.accuracy < at_least:
            left_out = f" ({self.unknown} of unknown label left out)" if self.unknown else ""
            raise OodlibError(
                f"{what}: accuracy {self.accuracy:.1%} on {len(self) - self.unknown} ID images"
                f"{left_out}, expected at least {at_least:.1%}. Check weights, labels, transform."
            )
        return self.accuracy

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``.npy`` files and ``bank.json`` with their checksums, whole or not at all."""
        arrays = {**self.arrays(), "weight": self.head.weight, "bias": self.head.bias}
        with atomic_folder(path) as temporary:
            for name, value in arrays.items():
                np.save(temporary / f"{name}.npy", value)
            write_checksums(temporary, self.meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Self:
        """Open a saved bank, memory-mapped; ``verify`` compares checksums (about 1 s per GB).

        OodlibError : no bank there, a file is missing, or a checksum differs
        """
        path, remedy = Path(path), "This is not a complete bank. Extract again."
        sidecar = read_json(path / "bank.json", "FeatureBank.load", remedy)
        try:
            for name, digest in sidecar["sha256"].items():
                if verify and sha256(path / name) != digest:
                    raise OodlibError(
                        f"FeatureBank.load: {path / name} does not match its checksum. Delete the "
                        "folder and extract again."
                    )
            files = [path / name for name in sidecar["sha256"]]
            arrays = {file.stem: np.load(file, mmap_mode="r") for file in files}
            head = Head(np.asarray(arrays.pop("weight")), np.asarray(arrays.pop("bias")))
            meta = sidecar["meta"]
            if "logits" in arrays:
                return cls.of_arrays(arrays, head, meta)
            # left out to halve the size: the head gives them
            given: Any = {"labels": arrays.get("labels"), "layers": _layers(arrays), "meta": meta}
            return cls.from_arrays(arrays["features"], weight=head.weight, bias=head.bias, **given)
        except (FileNotFoundError, KeyError) as error:
            raise OodlibError(f"FeatureBank.load: {path}: {error}. {remedy}") from error


def _layers(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {k.removeprefix("layer."): v for k, v in arrays.items() if k.startswith("layer.")}


def check_head(
    head: Head, features: NDArray[Any], logits: NDArray[Any], rtol: float = 1e-3, rows: int = 1024
) -> None:
    """Raise OodlibError unless the first ``rows`` of ``head(features)`` are those of the logits."""
    expected, got = head(features[:rows]), np.asarray(logits[:rows], dtype=np.float64)
    check_shape("FeatureBank: logits", logits, "(N, C)", (len(features), head.num_classes))
    check_finite("FeatureBank: logits", got)
    error = np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-12)
    if error > rtol:
        raise OodlibError(
            f"FeatureBank: head(features) differs from the logits by {error:.1e} of their size (at "
            f"most {rtol:g}). The features are not the input of this head, or something follows "
            "the head."
        )


def write_checksums(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write ``bank.json``: the checksum of every array in the folder, and where they came from."""
    checksums = {path.name: sha256(path) for path in sorted(folder.glob("*.npy"))}
    write_json(folder / "bank.json", {"format": 1, "meta": dict(meta), "sha256": checksums})
