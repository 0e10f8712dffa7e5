"""All OOD scores of one flow on all image sets, for single images and for groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError
from oodlib.gradients import Objective, layer_gradient_norms
from oodlib.models.glow import Glow, dequantise
from oodlib.scores.complexity import compressed_bits
from oodlib.scores.layerwise import LayerwiseDensity, input_complexity, naive_norm, typicality

SCORES = ("nll", "typicality", "complexity_png", "complexity_jpeg2000", "naive_norm", "density")
# of the layer-wise density: objective sum(z) instead of log p; Gaussians fitted on evaluation
# images too; "released" is both, with the 1e-10 of the released code
VARIANTS = ("density_leaky", "density_sum_z", "density_sum_z_leaky", "density_released")


def dequantised(images: ImageSet) -> Tensor:
    """Images (n, c, h, w) float32 with noise that depends on the set alone, not on the flow."""
    seed = crc32(f"{images.name}/{images.split}".encode())
    return dequantise(images.images, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def group_bits(
    model: Glow, x: Tensor, group_size: int = 1, *, batch_size: int = 250
) -> NDArray[np.float64]:
    """-log2 p summed over consecutive groups of B images, (N / B,) bits; +inf on overflow."""
    device = next(model.parameters()).device
    nats = torch.cat([-model.log_prob(part.to(device)).cpu() for part in x.split(batch_size)])
    return (nats.double() / math.log(2)).unflatten(0, (-1, group_size)).sum(1).numpy()


def gradient_norms(
    model: Glow,
    x: Tensor,
    group_size: int = 1,
    *,
    objective: Objective = "log_prob",
    pieces: int = 250,
) -> NDArray[np.float64]:
    """`layer_gradient_norms` of a whole set, (N / B, tensors), moved to the device in pieces."""
    device, step = next(model.parameters()).device, group_size * max(1, pieces // group_size)
    options: dict[str, Any] = {"group_size": group_size, "objective": objective}
    parts = [layer_gradient_norms(model, part.to(device), **options) for part in x.split(step)]
    return torch.cat(parts).numpy()


def score_flow(
    model: Glow,
    sets: Mapping[str, ImageSet],
    *,
    group_sizes: tuple[int, ...] = (1, 5),
    variants: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Every score of every image, or group of consecutive images, of "id" and the OOD sets.

    Parameters
    ----------
    model : an initialised flow; on its own device
    sets : "fit" (ID images that the Gaussians and the typical likelihood are fitted on), "id"
        (other ID images), then OOD sets by name; images of the model's shape
    group_sizes : B; images left over in a set are not used
    variants : also the density's `VARIANTS`, which cost a second pass

    Returns
    -------
    DataFrame: group_size, set, index, and a float32 column for each of `SCORES` and, if asked for,
    `VARIANTS`; larger = more OOD, +inf on overflow; ``nll`` in bits per dim, ``density`` in nats

    Raises
    ------
    OodlibError : no "fit" or "id", a set smaller than a group, images of another shape
    """
    if not {"fit", "id"} <= set(sets):
        raise OodlibError(
            f'score_flow: needs the sets "fit" and "id", got {", ".join(sets) or "none"}.'
        )
    for name, images in sets.items():
        if images.images.shape[1:] != model.image_shape or len(images) < max(group_sizes):
            raise OodlibError(
                f"score_flow: {name} must hold at least {max(group_sizes)} images "
                f"{model.image_shape}, got {images.images.shape}. Use ImageSet.resized."
            )
    noisy = {name: dequantised(images) for name, images in sets.items()}
    objectives: list[Literal["log_prob", "sum_z"]] = ["log_prob", "sum_z"]
    objectives = objectives[: 1 + variants]
    steps = len(sets) * len(group_sizes) * len(objectives)
    bar = tqdm(total=steps, desc="scoring", unit="set", disable=None if progress else True)
    parts = []
    for size in group_sizes:
        # likelihoods and gradient norms of the groups
        x = {name: value[: len(value) // size * size] for name, value in noisy.items()}
        bits = {name: group_bits(model, value, size) for name, value in x.items()}
        norms: dict[str, dict[str, NDArray[np.float64]]] = {key: {} for key in objectives}
        for objective in objectives:
            for name, value in x.items():
                norms[objective][name] = gradient_norms(model, value, size, objective=objective)
                bar.update()

        # densities: the objective whose norms they see, and the fitted Gaussians
        densities = {"density": ("log_prob", _fitted(norms["log_prob"]))}
        if variants:
            of_z = norms["sum_z"]
            densities |= {
                "density_leaky": ("log_prob", _fitted(norms["log_prob"], leaky=True)),
                "density_sum_z": ("sum_z", _fitted(of_z)),
                "density_sum_z_leaky": ("sum_z", _fitted(of_z, leaky=True)),
                "density_released": ("sum_z", _fitted(of_z, leaky=True, epsilon=1e-10)),
            }

        # one part of the table for each set
        for name, images in sets.items():
            if name == "fit":
                continue
            n, b = len(bits[name]), bits[name]
            columns = {
                "nll": b / (size * math.prod(model.image_shape)),
                "typicality": typicality(b, bits["fit"]),
            }
            for codec in ("png", "jpeg2000"):
                length = _code_lengths(images, codec)[: n * size].reshape(n, size).sum(1)
                columns[f"complexity_{codec}"] = input_complexity(b, length)
            columns["naive_norm"] = naive_norm(norms["log_prob"][name])
            for label, (key, density) in densities.items():
                columns[label] = density.score(norms[key][name])
            scores = {label: column.astype(np.float32) for label, column in columns.items()}
            keys = {"group_size": size, "set": name, "index": np.arange(n)}
            parts.append(pd.DataFrame({**keys, **scores}))
    bar.close()
    return pd.concat(parts, ignore_index=True)


@lru_cache(maxsize=64)
def _code_lengths(images: ImageSet, codec: str) -> NDArray[np.int64]:
    """Bits of each image's file; the same images are scored at every saved step."""
    return compressed_bits(images.images, codec)


def _fitted(
    norms: Mapping[str, NDArray], *, leaky: bool = False, epsilon: float = 0.0
) -> LayerwiseDensity:
    """Fitted on the fit images alone; ``leaky``: on those and the ID images that are evaluated."""
    rows = np.concatenate([norms["fit"], norms["id"]]) if leaky else norms["fit"]
    return LayerwiseDensity(epsilon=epsilon).fit(rows)
