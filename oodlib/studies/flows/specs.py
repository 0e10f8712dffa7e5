"""What the suite's flows are: network, recipe and images of each, and the sets that it is tested
on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError
from oodlib.models.glow import Glow
from oodlib.models.training.flow import FlowRecipe

__all__ = ["FLOWS", "FlowSpec", "flow_sets", "flow_spec"]

_STEPS = (0, 100, 300, 1000, 2000, 4000, 8000)
_SPLITS = {
    "tiny-imagenet": "valid",
    "dtd": "all",
    "omniglot": "background",
    "imagenet32": "val",
}  # not called "test"
_INVERTED = ("omniglot",)  # black on white, unlike its ID sets


@dataclass(frozen=True, kw_only=True)
class FlowSpec:
    """What decides a trained flow, besides the seed, and the sets it is tested on.

    Attributes
    ----------
    id_set : of the registry, or of the embedded corpus; the last ``n_validation`` training images are held out
    ood : names; sets that are not available are left out
    n_train : so many images, in a seeded order; None for all
    n : images of each test set: "fit", "id", and every OOD set
    published_bpd : test bits per dim of the paper's code after 250 epochs, where its network and images are ours
    shipped : steps whose weights are shipped, for seed 0
    pooled : images are averaged over areas instead of interpolated, and split as `_POOLED` says: the first 2 n of the
        test split are "fit" and "id", the next ``n_validation`` validate, and what equals one of
        them is not trained on
    """

    name: str
    id_set: str
    image_shape: tuple[int, int, int]
    steps: int
    levels: int
    hidden: int
    recipe: FlowRecipe
    ood: tuple[str, ...]
    n_train: int | None = None
    n_validation: int = 1000
    n: int = 1000
    published_bpd: float | None = None
    shipped: tuple[int, ...] = ()
    pooled: bool = False

    @property
    def full_size(self) -> bool:
        """Whether it is a flow of the paper, for a GPU: nothing of it is shipped."""
        return self.name.startswith("paper_")

    def network(self, seed: int = 0) -> Glow:
        """The untrained flow of a seed."""
        return Glow(
            self.image_shape,
            steps=self.steps,
            levels=self.levels,
            hidden=self.hidden,
            generator=torch.Generator().manual_seed(seed),
        )

    def training_images(self) -> tuple[Tensor, Tensor]:
        """Training and validation images, (n, c, h, w) uint8 each."""
        if self.pooled:
            held = _images(
                self.id_set, "test", self.image_shape, 2 * self.n + self.n_validation, pooled=True
            )
            pool, taken = (
                _images(self.id_set, "train", self.image_shape, None, pooled=True),
                set(held.image_hashes()),
            )
            fresh = np.array([digest not in taken for digest in pool.image_hashes()])
            return (
                torch.from_numpy(pool.images[fresh][: self.n_train]),
                torch.from_numpy(held.images[2 * self.n :]),
            )
        images = _images(self.id_set, "train", self.image_shape, self.n_train).images
        return torch.from_numpy(images[: -self.n_validation]), torch.from_numpy(
            images[-self.n_validation :]
        )


_GREY = ("mnist", "fashion-mnist", "notmnist", "omniglot", "kmnist")
_COLOUR = (
    "cifar10",
    "cifar100",
    "tiny-imagenet",
    "dtd",
    "svhn",
    "gtsrb",
    "celeba",
    "mnist",
    "fashion-mnist",
)
_EMBEDDED = ("latin", "textures", "greek", "digits")
_PAPER = {  # training images, flip, shift, test bits per dim after 250 epochs
    "cifar10": (50_000, "random", 3, 3.4359),
    "svhn": (73_257, "none", 3, 2.1235),
    "celeba": (162_770, "none", 0, None),
    "gtsrb": (26_640, "random", 3, 2.7476),
    "imagenet32": (128_116, "none", 0, None),
}


def _small(
    name: str,
    id_set: str,
    shape: tuple[int, int, int],
    levels: int,
    hidden: int,
    last: int,
    ood: tuple[str, ...],
    *,
    augmented: bool = False,
    **more: Any,
) -> FlowSpec:
    recipe = FlowRecipe(
        tuple(s for s in _STEPS if s <= last),
        flip="random" if augmented else "none",
        shift=3 if augmented else 0,
    )
    return FlowSpec(
        name=name,
        id_set=id_set,
        image_shape=shape,
        steps=4,
        levels=levels,
        hidden=hidden,
        recipe=recipe,
        ood=tuple(s for s in ood if s != id_set),
        **more,
    )


def _embedded(id_set: str) -> FlowSpec:
    """Small enough to be trained and scored in a minute; few images, so that it matures within that
    minute.
    """
    recipe = FlowRecipe((0, 30, 100, 300, 600), batch_size=32, warmup=50)
    return FlowSpec(
        name=f"{id_set}_glow",
        id_set=id_set,
        image_shape=(3, 16, 16),
        steps=4,
        levels=2,
        hidden=32,
        recipe=recipe,
        ood=tuple(s for s in _EMBEDDED if s != id_set),
        n_train=800,
        n_validation=400,
        n=200,
        shipped=(30, 600),
    )


def _paper_flow(id_set: str) -> FlowSpec:
    """Full size, 250 epochs; the rate rises over the first five, step by step."""
    n_train, flip, shift, published_bpd = _PAPER[id_set]
    epoch = (n_train - 1000) // 64
    steps = (0, 100, 300, epoch, 3 * epoch, 10 * epoch, 30 * epoch, 125 * epoch, 250 * epoch)
    recipe = FlowRecipe(steps, lr=5e-4, warmup=5 * epoch, flip=flip, shift=shift)  # type: ignore[arg-type]
    return FlowSpec(
        name=f"paper_{id_set}_glow",
        id_set=id_set,
        image_shape=(3, 32, 32),
        steps=32,
        levels=3,
        hidden=512,
        recipe=recipe,
        ood=(
            *(s for s in _PAPER if s != id_set),
            *(["cifar10-jpeg"] if id_set == "cifar10" else []),
        ),
        n_train=n_train,
        published_bpd=published_bpd,
    )


_POOLED = {  # splits to train on and to test on, training images, flip
    "cifar10": ("train", "test", 50_000, "random"),
    "cifar100": ("train", "test", 50_000, "random"),
    "tiny-imagenet": ("train", "valid", 20_000, "random"),
    "gtsrb": ("final-train", "test", 39_209, "none"),
    "mnist": ("train", "test", 60_000, "none"),
    "fashion-mnist": ("train", "test", 60_000, "none"),
    "notmnist": ("test", "test", 5_000, "none"),
    "omniglot": ("background", "evaluation", 19_280, "none"),
}
_COLOURED = ("cifar10", "cifar100", "tiny-imagenet", "gtsrb")


def _pooled(id_set: str, run: Literal["", "_double", "_epoch"]) -> FlowSpec:
    """One of eight ID sets at 16 pixels, each tested on the other seven; the rate falls to zero
    along a cosine.

    "_double" is a run of its own, twice as long; "_epoch" one of a single epoch: both with the same
    shape of decay. Colour sets are modelled in colour, grey sets in grey, and a set that is tested
    takes the form of the ID set. Grey copied into three channels would have no density: two of
    three dimensions were constant, every coloured image were detected by that alone, and half of
    the pairs of a grey ID set would say nothing.
    """
    _, _, n_train, flip = _POOLED[id_set]
    epoch, last = n_train // 64, 32_000
    steps = {
        "": {0, 100, epoch, 3 * epoch, 10 * epoch, last // 2, last},
        "_double": {0, epoch, last, 2 * last},
        "_epoch": {0, epoch},
    }[run]
    recipe = FlowRecipe(tuple(sorted(steps)), warmup=50, flip=flip, shift=1, decay="cosine")  # type: ignore[arg-type]
    return FlowSpec(
        name=f"{id_set.replace('-', '_')}_glow16{run}",
        id_set=id_set,
        image_shape=(3 if id_set in _COLOURED else 1, 16, 16),
        steps=4,
        levels=2,
        hidden=64,
        recipe=recipe,
        ood=tuple(s for s in _POOLED if s != id_set),
        n_train=n_train,
        n=2000,
        pooled=True,
        shipped=() if run else (epoch, last),
    )


FLOWS: dict[str, FlowSpec] = {
    spec.name: spec
    for spec in (
        _embedded("latin"),
        _embedded("textures"),
        _small(
            "fashion_glow", "fashion-mnist", (1, 28, 28), 2, 32, 8000, _GREY, shipped=_STEPS[1:]
        ),
        _small("mnist_glow", "mnist", (1, 28, 28), 2, 32, 4000, _GREY),
        _small(
            "cifar10_glow",
            "cifar10",
            (3, 32, 32),
            3,
            64,
            2000,
            ("cifar10-jpeg", *_COLOUR),
            augmented=True,
            n=500,
            shipped=(100, 2000),
        ),
        _small(
            "tiny_imagenet_glow",
            "tiny-imagenet",
            (3, 32, 32),
            3,
            64,
            1000,
            _COLOUR,
            augmented=True,
            n=500,
        ),
        *map(_paper_flow, _PAPER),
        *(_pooled(id_set, run) for run in ("", "_double", "_epoch") for id_set in _POOLED),
    )
}


def flow_spec(name: str) -> FlowSpec:
    """The entry of FLOWS, or an OodlibError that names the known ones."""
    if name not in FLOWS:
        raise OodlibError(f"There is no flow {name!r}. Known ones: {', '.join(FLOWS)}.")
    return FLOWS[name]


def flow_sets(spec: FlowSpec, *, n_fit: int, n_test: int, n_ood: int) -> dict[str, ImageSet]:
    """ "fit" and "id" (disjoint parts of the ID test split) and every OOD set available, brought to
    the flow's shape.
    """
    from oodlib.data.public.prepare import DatasetNotFound

    if spec.pooled and n_fit + n_test > 2 * spec.n:
        raise OodlibError(
            f"flow_sets: {spec.name} validates, and may train, on images behind the first "
            f"{2 * spec.n} of {spec.id_set}; n_fit + n_test = {n_fit + n_test} would take them. "
            "Ask for fewer."
        )
    test = _images(spec.id_set, "test", spec.image_shape, n_fit + n_test, pooled=spec.pooled)
    if len(test) < n_fit + n_test:
        raise OodlibError(
            f"flow_sets: {spec.id_set} has {len(test)} test images, fewer than n_fit + n_test = "
            f"{n_fit + n_test}. Ask for fewer."
        )
    sets = {"fit": test.subset(slice(n_fit), split="fit"), "id": test.subset(slice(n_fit, None))}
    for name in spec.ood:
        if name == f"{spec.id_set}-jpeg":
            longer = _images(spec.id_set, "test", spec.image_shape, n_fit + n_test + n_ood)
            sets[name] = _jpeg(longer.subset(slice(n_fit + n_test, None)))
            continue
        try:
            found = _images(name, "test", spec.image_shape, n_ood, pooled=spec.pooled)
            sets[found.name] = found  # a partial copy says so in its name
        except DatasetNotFound as error:
            print(f"left out: {error}")
    return sets


def _images(
    name: str, split: str, shape: tuple[int, int, int], n: int | None, *, pooled: bool = False
) -> ImageSet:
    """n images of a set (all for None), in a seeded order, brought to a shape."""
    from oodlib.data import EMBEDDED, embedded, load

    if name in EMBEDDED:
        return embedded(name, split, n=n, size=shape[1])
    if pooled:
        training, testing, *_ = _POOLED[name]
        split = testing if split == "test" else training
    elif split == "test":
        split = _SPLITS.get(name, split)
    images = load(name, split)
    images = images.sample(n or len(images), seed=0)
    images = (images.pooled if pooled else images.resized)(shape[1], channels=shape[0])
    return replace(images, images=255 - images.images) if name in _INVERTED else images


def _jpeg(images: ImageSet) -> ImageSet:
    """JPEG copies, quality 75."""
    from io import BytesIO

    from PIL import Image

    copies = []
    for image in images.images:
        file = BytesIO()
        Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(file, "JPEG", quality=75)
        copies.append(np.asarray(Image.open(file)).reshape(*image.shape[1:], -1).transpose(2, 0, 1))
    return replace(images, name=f"{images.name}-jpeg", images=np.stack(copies))
