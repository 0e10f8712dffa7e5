"""The suite's flows: network, recipe and images of each, and the sets that it is tested on."""

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

_INVERTED = ("omniglot",)  # black on white, unlike its ID sets
_TEST_SPLITS = {  # splits that are not called "test"
    "tiny-imagenet": "valid",
    "dtd": "all",
    "omniglot": "background",
    "imagenet32": "val",
}


@dataclass(frozen=True, kw_only=True)
class FlowSpec:
    """What decides a trained flow, besides the seed, and the sets it is tested on.

    Attributes
    ----------
    id_set : of the registry, or of the embedded corpus; the last ``n_validation`` training images
        are held out
    ood : names; sets that are not available are skipped
    n_train : number of images, in a seeded order; None for all
    n : images of each test set: "fit", "id", and every OOD set
    published_bpd : test bits per dim of the paper's code after 250 epochs, where its network and
        images are ours
    shipped : steps whose weights are shipped, for seed 0
    pooled : images are averaged over areas instead of interpolated, and split as `_POOLED` says:
        the first 2 n of the test split are "fit" and "id", the next ``n_validation`` validate, and
        training images equal to one of them are dropped
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
        sizes = {"steps": self.steps, "levels": self.levels, "hidden": self.hidden}
        return Glow(self.image_shape, **sizes, generator=torch.Generator().manual_seed(seed))

    def training_images(self) -> tuple[Tensor, Tensor]:
        """Training and validation images, (n, c, h, w) uint8 each."""
        if self.pooled:
            n_held_out = 2 * self.n + self.n_validation
            held_out = _images(self.id_set, "test", self.image_shape, n_held_out, pooled=True)
            pool = _images(self.id_set, "train", self.image_shape, None, pooled=True)
            taken = set(held_out.image_hashes())
            fresh = np.array([digest not in taken for digest in pool.image_hashes()])
            training, validation = pool.images[fresh][: self.n_train], held_out.images[2 * self.n :]
        else:
            images = _images(self.id_set, "train", self.image_shape, self.n_train).images
            training, validation = images[: -self.n_validation], images[-self.n_validation :]
        return torch.from_numpy(training), torch.from_numpy(validation)


def _spec(name: str, id_set: str, ood: tuple[str, ...], **more: Any) -> FlowSpec:
    """A small flow, tested on all of ``ood`` but its ID set."""
    ood = tuple(other for other in ood if other != id_set)
    return FlowSpec(**{"name": name, "id_set": id_set, "ood": ood, "steps": 4, **more})


def _embedded(id_set: str) -> FlowSpec:
    """Trained and scored in a minute; few images, so that it matures within that minute."""
    return _spec(
        f"{id_set}_glow",
        id_set,
        ("latin", "textures", "greek", "digits"),
        image_shape=(3, 16, 16),
        levels=2,
        hidden=32,
        recipe=FlowRecipe((0, 30, 100, 300, 600), batch_size=32, warmup=50),
        n_train=800,
        n_validation=400,
        n=200,
        shipped=(30, 600),
    )


_STEPS = (0, 100, 300, 1000, 2000, 4000, 8000)
_GREY = ("mnist", "fashion-mnist", "notmnist", "omniglot", "kmnist")
_COLOUR = ("cifar10", "cifar100", "tiny-imagenet", "dtd", "svhn", "gtsrb", "celeba")
_COLOUR_AND_GREY = (*_COLOUR, "mnist", "fashion-mnist")


def _grey(name: str, id_set: str, last: int, **more: Any) -> FlowSpec:
    recipe = FlowRecipe(tuple(s for s in _STEPS if s <= last))
    size = {"image_shape": (1, 28, 28), "levels": 2, "hidden": 32}
    return _spec(name, id_set, _GREY, recipe=recipe, **size, **more)


def _colour(name: str, id_set: str, last: int, ood: tuple[str, ...], **more: Any) -> FlowSpec:
    recipe = FlowRecipe(tuple(s for s in _STEPS if s <= last), flip="random", shift=3)
    size = {"image_shape": (3, 32, 32), "levels": 3, "hidden": 64}
    return _spec(name, id_set, ood, recipe=recipe, n=500, **size, **more)


_PAPER: dict[str, Any] = {  # training images, flip, shift, test bits per dim after 250 epochs
    "cifar10": (50_000, "random", 3, 3.4359),
    "svhn": (73_257, "none", 3, 2.1235),
    "celeba": (162_770, "none", 0, None),
    "gtsrb": (26_640, "random", 3, 2.7476),
    "imagenet32": (128_116, "none", 0, None),
}


def _paper_flow(id_set: str) -> FlowSpec:
    """Full size, 250 epochs; the rate rises over the first five, step by step."""
    n_train, flip, shift, published_bpd = _PAPER[id_set]
    epoch = (n_train - 1000) // 64
    steps = (0, 100, 300, *(epochs * epoch for epochs in (1, 3, 10, 30, 125, 250)))
    return _spec(
        f"paper_{id_set}_glow",
        id_set,
        (*_PAPER, *(["cifar10-jpeg"] if id_set == "cifar10" else [])),
        image_shape=(3, 32, 32),
        steps=32,
        levels=3,
        hidden=512,
        recipe=FlowRecipe(steps, lr=5e-4, warmup=5 * epoch, flip=flip, shift=shift),
        n_train=n_train,
        published_bpd=published_bpd,
    )


_POOLED: dict[str, Any] = {  # splits to train on and to test on, training images, flip, channels
    "cifar10": ("train", "test", 50_000, "random", 3),
    "cifar100": ("train", "test", 50_000, "random", 3),
    "tiny-imagenet": ("train", "valid", 20_000, "random", 3),
    "gtsrb": ("final-train", "test", 39_209, "none", 3),
    "mnist": ("train", "test", 60_000, "none", 1),
    "fashion-mnist": ("train", "test", 60_000, "none", 1),
    "notmnist": ("test", "test", 5_000, "none", 1),
    "omniglot": ("background", "evaluation", 19_280, "none", 1),
}


def _pooled(id_set: str, run: Literal["", "_double", "_epoch"]) -> FlowSpec:
    """One of eight ID sets at 16 pixels, tested on the other seven; cosine decay of the rate.

    "_double" is a separate run, twice as long; "_epoch" one of a single epoch: both with the same
    shape of decay. Colour sets are modelled in colour, grey sets in grey, and a test set takes the
    form of the ID set. Grey copied into three channels would have no density: two of three
    dimensions would be constant, every coloured image would be detected by that alone, and half of
    the pairs of a grey ID set would say nothing.
    """
    _, _, n_train, flip, channels = _POOLED[id_set]
    epoch, last = n_train // 64, 32_000
    steps = {
        "": {0, 100, epoch, 3 * epoch, 10 * epoch, last // 2, last},
        "_double": {0, epoch, last, 2 * last},
        "_epoch": {0, epoch},
    }[run]
    return _spec(
        f"{id_set.replace('-', '_')}_glow16{run}",
        id_set,
        tuple(_POOLED),
        image_shape=(channels, 16, 16),
        levels=2,
        hidden=64,
        recipe=FlowRecipe(tuple(sorted(steps)), warmup=50, flip=flip, shift=1, decay="cosine"),
        n_train=n_train,
        n=2000,
        pooled=True,
        shipped=() if run else (epoch, last),
    )


_ALL = (
    _embedded("latin"),
    _embedded("textures"),
    _grey("fashion_glow", "fashion-mnist", 8000, shipped=_STEPS[1:]),
    _grey("mnist_glow", "mnist", 4000),
    _colour(
        "cifar10_glow", "cifar10", 2000, ("cifar10-jpeg", *_COLOUR_AND_GREY), shipped=(100, 2000)
    ),
    _colour("tiny_imagenet_glow", "tiny-imagenet", 1000, _COLOUR_AND_GREY),
    *map(_paper_flow, _PAPER),
    *(_pooled(id_set, run) for run in ("", "_double", "_epoch") for id_set in _POOLED),
)
FLOWS: dict[str, FlowSpec] = {spec.name: spec for spec in _ALL}


def flow_spec(name: str) -> FlowSpec:
    """The entry of FLOWS, or an OodlibError that names the known ones."""
    if name not in FLOWS:
        raise OodlibError(f"There is no flow {name!r}. Known ones: {', '.join(FLOWS)}.")
    return FLOWS[name]


def flow_sets(spec: FlowSpec, *, n_fit: int, n_test: int, n_ood: int) -> dict[str, ImageSet]:
    """The sets "fit" and "id" (disjoint parts of the ID test split) and every available OOD set.

    Images have the flow's shape. OodlibError: more ID test images are asked for than there are.
    """
    from oodlib.data.public.prepare import DatasetNotFound

    n_id = n_fit + n_test
    if spec.pooled and n_id > 2 * spec.n:
        raise OodlibError(
            f"flow_sets: {spec.name} validates, and may train, on images behind the first "
            f"{2 * spec.n} of {spec.id_set}; n_fit + n_test = {n_id} would take them. Ask for "
            "fewer."
        )
    test = _images(spec.id_set, "test", spec.image_shape, n_id, pooled=spec.pooled)
    if len(test) < n_id:
        raise OodlibError(
            f"flow_sets: {spec.id_set} has {len(test)} test images, fewer than n_fit + n_test = "
            f"{n_id}. Ask for fewer."
        )
    sets = {"fit": test.subset(slice(n_fit), split="fit"), "id": test.subset(slice(n_fit, None))}
    for name in spec.ood:
        if name == f"{spec.id_set}-jpeg":
            longer = _images(spec.id_set, "test", spec.image_shape, n_id + n_ood)
            sets[name] = _jpeg(longer.subset(slice(n_id, None)))
            continue
        try:
            images = _images(name, "test", spec.image_shape, n_ood, pooled=spec.pooled)
            sets[images.name] = images  # a partial copy says so in its name
        except DatasetNotFound as error:
            print(f"skipped: {error}")
    return sets


def _images(
    name: str, split: str, shape: tuple[int, int, int], n: int | None, *, pooled: bool = False
) -> ImageSet:
    """n images of a set (all for None), in a seeded order, brought to a shape."""
    from oodlib.data import EMBEDDED, embedded, load

    if name in EMBEDDED:
        return embedded(name, split, n=n, size=shape[1])
    if pooled:
        split = _POOLED[name][split == "test"]
    elif split == "test":
        split = _TEST_SPLITS.get(name, split)
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
