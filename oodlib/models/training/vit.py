"""Training of the pool's small ViTs: pretraining and finetuning.

After AugReg (Steiner et al., arXiv 2106.10270): pretraining by sigmoid cross-entropy with the
head's bias at -log C and AdamW, decaying weight matrices and filters only; finetuning by SGD with
momentum, a zero head, no weight decay and softmax cross-entropy; both with a cosine schedule,
warm-up and gradients clipped at norm 1. The CLIP-like objective is ours: InfoNCE between an image's
unit-norm feature and the learned unit-norm code of its class.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    log_softmax,
    normalize,
)

from oodlib.errors import OodlibError
from oodlib.models.device import random_state
from oodlib.models.training.augment import augment, hash_seed, normalise, seeded
from oodlib.models.training.loop import TrainingRun

Objective = Literal["sigmoid", "softmax", "cosine"]
# AugReg's names -> (mixup's beta parameter, RandAugment's layers and magnitude); without light0,
# of magnitude 0: there timm's posterize keeps no bit, which Pillow refuses
AUGMENTATIONS: dict[str, tuple[float, int, int]] = {
    "none": (0.0, 0, 0),
    "light1": (0.2, 2, 10),
    "medium1": (0.2, 2, 15),
    "medium2": (0.5, 2, 15),
    "strong1": (0.5, 2, 20),
    "strong2": (0.8, 2, 20),
}


@dataclass(frozen=True)
class VitRecipe:
    """Everything that decides one phase of training, besides the images, the network and the seed.

    Attributes
    ----------
    samples : images seen, counted with repetition
    optimiser : "adamw" (pretraining) or "sgd" (finetuning, momentum 0.9)
    weight_decay : of AdamW: a weight shrinks by ``lr * weight_decay`` a step
    aug : one of `AUGMENTATIONS`; flips and shifts come on top
    warmup : share of the steps
    penalty : weight of the squared coefficient of variation of a batch's feature norms
    """

    samples: int
    optimiser: Literal["adamw", "sgd"]
    lr: float
    objective: Objective = "softmax"
    weight_decay: float = 0.0
    batch_size: int = 128
    warmup: float = 0.05
    clip: float = 1.0
    aug: str = "none"
    flip: Literal["none", "random"] = "random"
    shift: int = 4
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.aug not in AUGMENTATIONS or self.objective not in ("sigmoid", "softmax", "cosine"):
            raise OodlibError(
                f"VitRecipe: aug must be one of {', '.join(AUGMENTATIONS)} and the objective "
                f"sigmoid, softmax or cosine, got {self.aug!r} and {self.objective!r}."
            )
        positive = min(self.samples, self.batch_size) >= 1 and self.lr > 0
        if self.optimiser not in ("adamw", "sgd") or not positive:
            raise OodlibError(
                "VitRecipe: optimiser must be adamw or sgd, samples, batch_size and lr positive, "
                f"got {self}."
            )

    @property
    def steps(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine to zero."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2


def decay_integral(recipe: VitRecipe) -> float:
    """Lambda = weight_decay * sum of the learning rates: how often weights shrink e-fold in a run.

    It makes runs of any length comparable; AugReg's 0.03 and 0.1 are about 1.4 and 4.7 on
    ImageNet-1k.
    """
    return recipe.weight_decay * sum(map(recipe.rate, range(recipe.steps)))


def fit_vit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: VitRecipe,
    *,
    mean: Tensor,
    std: Tensor,
    seed: int,
    checkpoint: Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    title: str = "training",
) -> list[dict[str, float]]:
    """Train ``model`` (a timm classifier with ``head``) in place; returns ten rows of history.

    A killed run resumes from ``checkpoint`` to the same weights as one that was not killed: bit by
    bit on a CPU with the same number of threads.

    Parameters
    ----------
    images, labels : (n, c, h, w) uint8 and (n,) int64, on the CPU
    mean, std : (c,), in units of pixel / 255
    seed : of order, augmentation, dropout and class codes; initialise the weights yourself
    checkpoint : file of this run alone; the caller deletes it once the result is stored

    Raises
    ------
    OodlibError : a loss that overflows, a checkpoint that is damaged or belongs to another run
    """
    n = len(images)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    codes = _class_codes(model, recipe, seed).to(device)
    policy = _rand_augment(recipe)
    run = TrainingRun(
        "fit_vit",
        model,
        _optimiser(model, codes, recipe),
        key=[repr(recipe), seed, n, int(labels.sum()), int(images[::97].sum())],
        path=checkpoint,
        parts={"codes": codes},
    )

    @lru_cache(2)  # a batch may reach into the next epoch
    def order(epoch: int) -> Tensor:
        return torch.randperm(n, generator=seeded(seed, epoch))

    def loss(step: int) -> Tensor:
        first = step * recipe.batch_size
        samples = range(first, min(first + recipe.batch_size, recipe.samples))
        index = [int(order(i // n)[i % n]) for i in samples]
        seed_all(hash_seed(seed, recipe.steps, step))
        x, targets = _batch(
            images[index], labels[index], len(codes.weight), recipe, policy, mean, std
        )
        x = x.to(device, memory_format=torch.channels_last)
        return _loss(model, codes, x, targets.to(device), recipe)

    with _random_state(device) as seed_all:
        tenth = max(1, recipe.steps // 10)
        return run.run_steps(
            loss,
            rate=recipe.rate,
            rows={*range(tenth, recipe.steps, tenth), recipe.steps},
            clip=recipe.clip,
            progress=progress,
            title=title,
        )


class _Codes(nn.Module):
    """One vector per class, and the logarithm of the inverse temperature."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's first temperature


def _class_codes(model: nn.Module, recipe: VitRecipe, seed: int) -> _Codes:
    weight: Any = model.get_submodule("head").weight
    codes = _Codes(torch.randn(weight.shape, generator=seeded(seed, 1)))
    return codes.requires_grad_(recipe.objective == "cosine")


def _optimiser(model: nn.Module, codes: nn.Module, recipe: VitRecipe) -> torch.optim.Optimizer:
    parameters = [p for p in (*model.parameters(), *codes.parameters()) if p.requires_grad]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.lr, momentum=0.9)
    kernels = [p for name, p in model.named_parameters() if p.ndim > 1 and "pos_embed" not in name]
    decayed = {id(p) for p in kernels}
    groups: list[dict[str, Any]] = [
        {"params": kernels, "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr)


def _batch(
    images: Tensor,
    labels: Tensor,
    classes: int,
    recipe: VitRecipe,
    policy: Any,
    mean: Tensor,
    std: Tensor,
) -> tuple[Tensor, Tensor]:
    """Augmented network input, and targets (n, C) that sum to one."""
    if policy is not None:
        from PIL import Image

        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        augmented = [torch.from_numpy(np.array(policy(picture))) for picture in pictures]
        images = torch.stack(augmented).permute(0, 3, 1, 2)
    x = augment(normalise(images, mean, std), recipe, 0, None, torch.default_generator)
    targets = nn.functional.one_hot(labels, classes).float()
    mixing = AUGMENTATIONS[recipe.aug][0]
    if mixing:
        from timm.data.mixup import Mixup

        even = len(x) - len(x) % 2  # timm's mixup needs pairs
        mixup = Mixup(mixup_alpha=mixing, label_smoothing=0.0, num_classes=classes)
        mixed, soft = mixup(x[:even], labels[:even])
        x, targets = torch.cat([mixed, x[even:]]), torch.cat([soft, targets[even:]])
    return x, targets


def _loss(model: Any, codes: _Codes, x: Tensor, targets: Tensor, recipe: VitRecipe) -> Tensor:
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    if recipe.objective == "cosine":
        scale = codes.log_scale.clamp(max=math.log(100)).exp()
        logits = scale * normalize(features) @ normalize(codes.weight).T
        code_of_image = -(targets * log_softmax(logits, 1)).sum(1).mean()
        images_of_code = -(targets * log_softmax(logits, 0)).sum() / targets.sum()
        return (code_of_image + images_of_code) / 2
    logits = model.head(features)
    if recipe.objective == "sigmoid":
        terms = binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss = terms.sum(1).mean()
    else:
        loss = cross_entropy(logits, targets)
    if recipe.penalty:
        norms = features.norm(dim=1)
        loss = loss + recipe.penalty * norms.var() / norms.mean().square()
    return loss


def _rand_augment(recipe: VitRecipe) -> Any:
    """timm's RandAugment on a PIL image, or None."""
    _, layers, magnitude = AUGMENTATIONS[recipe.aug]
    if not layers:
        return None
    from timm.data.auto_augment import rand_augment_transform

    options = {"translate_pct": 0.3, "img_mean": (128, 128, 128)}
    return rand_augment_transform(f"rand-m{magnitude}-n{layers}", options)


@contextlib.contextmanager
def _random_state(device: str | torch.device) -> Iterator[Callable[[int], None]]:
    """Yield what seeds all global generators (timm draws from them); restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002

    def seed_all(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        seed_torch(seed)

    with random_state(device) as seed_torch:
        try:
            yield seed_all
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
