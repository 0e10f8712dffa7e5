"""The suite's flows: which images each was trained on, how, and training anew.

Every flow keeps weights along its training, because the question is what maturity does to OOD detection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError
from oodlib.flow_training import FlowRecipe, train_flow
from oodlib.models.glow import Glow
from oodlib.project import root

__all__ = ["FLOWS", "FlowSpec", "flow_spec", "train_named_flow"]

_STEPS = (0, 30, 100, 300, 1000, 2000, 4000, 8000, 16000, 32000)
N_VALIDATION = 1000


@dataclass(frozen=True)
class FlowSpec:
    """What decides a trained flow, besides the seed.

    ``data()`` gives the training images, of which the last ``n_validation`` of a seeded order are held out.
    """

    name: str
    image_shape: tuple[int, int, int]
    steps: int
    levels: int
    hidden: int
    data: Callable[[], ImageSet]
    recipe: FlowRecipe
    n_validation: int = N_VALIDATION

    def network(self, seed: int) -> Glow:
        """The untrained flow of a seed."""
        return Glow(self.image_shape, steps=self.steps, levels=self.levels, hidden=self.hidden,
                    generator=torch.Generator().manual_seed(seed))

    def split(self) -> tuple[Tensor, Tensor]:
        """Training and validation images, (n, c, h, w) uint8 each."""
        images = self.data().sample(10**9, seed=0).images
        return torch.from_numpy(images[:-self.n_validation]), torch.from_numpy(images[-self.n_validation:])


def _real(name: str, split: str = "train", size: int | None = None) -> Callable[[], ImageSet]:
    def load_it() -> ImageSet:
        from oodlib.data import load

        images = load(name, split)
        return images if size is None else images.resized(size)

    return load_it


FLOWS = {spec.name: spec for spec in (
    FlowSpec("fashion_glow", (1, 28, 28), 4, 2, 32, _real("fashion-mnist"), FlowRecipe(_STEPS)),
    FlowSpec("mnist_glow", (1, 28, 28), 4, 2, 32, _real("mnist"), FlowRecipe(_STEPS[:8])),
    FlowSpec("cifar10_glow", (3, 32, 32), 4, 3, 64, _real("cifar10"),
             FlowRecipe(_STEPS[:8], flip="random", shift=3)),
    FlowSpec("tiny_imagenet_glow", (3, 32, 32), 4, 3, 64, _real("tiny-imagenet", size=32),
             FlowRecipe(_STEPS[:7], flip="random", shift=3)),
)}
