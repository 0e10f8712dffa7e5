"""All OOD scores of one flow on all image sets: likelihood-based and gradient-based, for single
images and groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal
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

__all__ = ["SCORES", "VARIANTS", "dequantised", "gradient_norms", "group_bits", "score_flow"]

SCORES = ("nll", "typicality", "complexity_png", "complexity_jpeg2000", "naive_norm", "density")
# the layer-wise density, otherwise: objective sum(z) instead of log p; Gaussians fitted on
# evaluation images too; "released" is both, with the 1e-10 of the released code
VARIANTS = ("density_leaky", "density_sum_z", "density_sum_z_leaky", "density_released")


def dequantised(images: ImageSet) -> Tensor:
    """(n, c, h, w) float32 with noise that depends on the set alone: the same numbers for every
    flow and checkpoint.
    """
    seed = crc32(f"{images.name}/{images.split}".encode())
    return dequantise(images.images, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def group_bits(
    model: Glow, x: Tensor, group_size: int = 1, *, batch_size: int = 250
) -> NDArray[np.float64]:
    """-log2 p summed over consecutive groups of B images, (N / B,) bits; +inf where the likelihood
    overflows.
    """
    device = next(model.parameters()).device
    nats = torch.cat(
        [-model.log_prob(part.to(device)).cpu() for part in x.split(batch_size)]
    ).double()
    return (nats / math.log(2)).unflatten(0, (-1, group_size)).sum(1).numpy()


def gradient_norms(
    model: Glow,
    x: Tensor,
    group_size: int = 1,
    *,
    objective: Objective = "log_prob",
    pieces: int = 250,
) -> NDArray[np.float64]:
    """`layer_gradient_norms` of a whole set, (N / B, tensors); images move to the model's device
    piece by piece.
    """
    device, step = next(model.parameters()).device, group_size * max(1, pieces // group_size)
    return torch.cat(
        [
            layer_gradient_norms(model, part.to(device), group_size=group_size, objective=objective)
            for part in x.split(step)
        ]
    ).numpy()


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
    sets : "fit" (ID images the Gaussians and the typical likelihood are learned from), "id" (other ID images), then
        OOD sets by name; images of the model's shape
    group_sizes : B; images left over in a set are not used
    variants : also the density's `VARIANTS`, which cost a second pass

    Returns
    -------
    DataFrame: group_size, set, index, and a float32 column for each of `SCORES` and, if asked for, `VARIANTS`; larger =
    more OOD, +inf where it overflows. ``nll`` is in bits per dim, ``density`` in nats.

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
    codes = {
        codec: {name: _code_lengths(images, codec) for name, images in sets.items()}
        for codec in ("png", "jpeg2000")
    }
    objectives: tuple[Literal["log_prob", "sum_z"], ...] = (
        ("log_prob", "sum_z") if variants else ("log_prob",)
    )
    bar = tqdm(
        total=len(sets) * len(group_sizes) * len(objectives),
        desc="scoring",
        unit="set",
        disable=None if progress else True,
    )
    parts = []
    for size in group_sizes:
        x = {name: value[: len(value) // size * size] for name, value in noisy.items()}
        bits = {name: group_bits(model, value, size) for name, value in x.items()}
        norms: dict[str, dict[str, NDArray[np.float64]]] = {}
        for objective in objectives:
            norms[objective] = {}
            for name, value in x.items():
                norms[objective][name] = gradient_norms(model, value, size, objective=objective)
                bar.update()
        densities = {"density": ("log_prob", _fitted(norms["log_prob"]))}
        if variants:
            densities |= {
                "density_leaky": ("log_prob", _fitted(norms["log_prob"], leaky=True)),
                "density_sum_z": ("sum_z", _fitted(norms["sum_z"])),
                "density_sum_z_leaky": ("sum_z", _fitted(norms["sum_z"], leaky=True)),
                "density_released": ("sum_z", _fitted(norms["sum_z"], leaky=True, epsilon=1e-10)),
            }
        for name in sets:
            if name == "fit":
                continue
            n, b = len(bits[name]), bits[name]
            columns = {
                "nll": b / (size * math.prod(model.image_shape)),
                "typicality": typicality(b, bits["fit"]),
            }
            for codec, lengths in codes.items():
                length = lengths[name][: n * size].reshape(n, size).sum(1)
                columns[f"complexity_{codec}"] = input_complexity(b, length)
            columns["naive_norm"] = naive_norm(norms["log_prob"][name])
            columns |= {
                label: density.score(norms[key][name])
                for label, (key, density) in densities.items()
            }
            parts.append(
                pd.DataFrame(
                    {
                        "group_size": size,
                        "set": name,
                        "index": np.arange(n),
                        **{k: v.astype(np.float32) for k, v in columns.items()},
                    }
                )
            )
    bar.close()
    return pd.concat(parts, ignore_index=True)


@lru_cache(maxsize=64)
def _code_lengths(images: ImageSet, codec: str) -> NDArray[np.int64]:
    """Bits of each image's file; the same images are scored at every kept step."""
    return compressed_bits(images.images, codec)


def _fitted(
    norms: Mapping[str, NDArray], *, leaky: bool = False, epsilon: float = 0.0
) -> LayerwiseDensity:
    """Fitted on the fit images alone, or on those and the ID images that are evaluated."""
    rows = np.concatenate([norms["fit"], norms["id"]]) if leaky else norms["fit"]
    return LayerwiseDensity(epsilon=epsilon).fit(rows)
