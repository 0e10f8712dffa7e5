"""The suite's flows: which images each was trained on and how, their weights and scores along training, and anew.

A flow's folder holds weights (``step_*.safetensors``), scores of every image (``scores_*.parquet``) and ``run.json``,
which says how they were made. Shipped folders, in ``data/checkpoints``, keep half-precision weights at some steps only.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oodlib import flow_scores, flow_training, gradients, layer_rules, training
from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError
from oodlib.files import atomic_folder, atomic_path, sha256, write_json
from oodlib.flow_scores import score_flow
from oodlib.flow_training import FlowRecipe, snapshot_path, train_flow
from oodlib.maturity import is_mature, kept_step
from oodlib.models import glow
from oodlib.models.glow import Glow
from oodlib.project import root
from oodlib.scores import layerwise

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FLOWS", "FlowRun", "FlowSpec", "flow_run", "flow_sets", "flow_spec", "load_weights",
           "run_flow", "train_and_ship"]

_STEPS = (0, 100, 300, 1000, 2000, 4000, 8000)
_SPLITS = {"tiny-imagenet": "valid", "dtd": "all", "omniglot": "background", "imagenet32": "val"}    # not called "test"
_INVERTED = ("omniglot",)                                                        # black on white, unlike its ID sets


@dataclass(frozen=True)
class FlowSpec:
    """What decides a trained flow, besides the seed, and the sets it is tested on.

    Attributes
    ----------
    id_set : of the registry, or of the embedded corpus; the last ``n_validation`` training images are held out
    ood : names; sets that are not at hand are left out
    n_train : the first so many images; None for all
    n : images of each test set: "fit", "id", and every OOD set
    published_bpd : test bits per dim of the paper's code after 250 epochs, where its network and images are ours
    shipped : steps whose weights are shipped, for seed 0
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

    def network(self, seed: int = 0) -> Glow:
        """The untrained flow of a seed."""
        return Glow(self.image_shape, steps=self.steps, levels=self.levels, hidden=self.hidden,
                    generator=torch.Generator().manual_seed(seed))

    def training_images(self) -> tuple[Tensor, Tensor]:
        """Training and validation images, (n, c, h, w) uint8 each."""
        images = _images(self.id_set, "train", self.image_shape, self.n_train).images
        return torch.from_numpy(images[:-self.n_validation]), torch.from_numpy(images[-self.n_validation:])


_GREY = ("mnist", "fashion-mnist", "notmnist", "omniglot", "kmnist")
_COLOUR = ("cifar10", "cifar100", "tiny-imagenet", "dtd", "svhn", "gtsrb", "celeba", "mnist", "fashion-mnist")
_EMBEDDED = ("latin", "textures", "greek", "digits")
_PAPER = {                                     # training images, flip, shift, test bits per dim after 250 epochs
    "cifar10": (50_000, "random", 3, 3.4359), "svhn": (73_257, "none", 3, 2.1235), "celeba": (162_770, "none", 0, None),
    "gtsrb": (26_640, "random", 3, 2.7476), "imagenet32": (128_116, "none", 0, None)}


def _small(name: str, id_set: str, shape: tuple[int, int, int], levels: int, hidden: int, last: int,
           ood: tuple[str, ...], *, augmented: bool = False, **more: Any) -> FlowSpec:
    recipe = FlowRecipe(tuple(s for s in _STEPS if s <= last), flip="random" if augmented else "none",
                        shift=3 if augmented else 0)
    return FlowSpec(name, id_set, shape, 4, levels, hidden, recipe, tuple(s for s in ood if s != id_set), **more)


def _embedded(id_set: str) -> FlowSpec:
    """Small enough to be trained and scored in a minute; few images, so that it matures within that minute."""
    recipe = FlowRecipe((0, 30, 100, 300, 600), batch_size=32, warmup=50)
    return FlowSpec(f"{id_set}_glow", id_set, (3, 16, 16), 4, 2, 32, recipe, tuple(s for s in _EMBEDDED if s != id_set),
                    n_train=800, n_validation=400, n=200, shipped=(30, 600))


def _paper_flow(id_set: str) -> FlowSpec:
    """Full size, 250 epochs; the rate rises over the first five, step by step."""
    n_train, flip, shift, published_bpd = _PAPER[id_set]
    epoch = (n_train - 1000) // 64
    steps = (0, 100, 300, epoch, 3 * epoch, 10 * epoch, 30 * epoch, 125 * epoch, 250 * epoch)
    recipe = FlowRecipe(steps, lr=5e-4, warmup=5 * epoch, flip=flip, shift=shift)                  # type: ignore[arg-type]
    return FlowSpec(f"paper_{id_set}_glow", id_set, (3, 32, 32), 32, 3, 512, recipe,
                    tuple(s for s in _PAPER if s != id_set), published_bpd=published_bpd)


FLOWS: dict[str, FlowSpec] = {spec.name: spec for spec in (
    _embedded("latin"), _embedded("textures"),
    _small("fashion_glow", "fashion-mnist", (1, 28, 28), 2, 32, 8000, _GREY, shipped=_STEPS[1:]),
    _small("mnist_glow", "mnist", (1, 28, 28), 2, 32, 4000, _GREY),
    _small("cifar10_glow", "cifar10", (3, 32, 32), 3, 64, 2000, ("cifar10-jpeg", *_COLOUR), augmented=True, n=500,
           shipped=(100, 1000, 2000)),
    _small("tiny_imagenet_glow", "tiny-imagenet", (3, 32, 32), 3, 64, 1000, _COLOUR, augmented=True, n=500),
    *map(_paper_flow, _PAPER),
)}


@dataclass(frozen=True, eq=False)
class FlowRun:
    """A flow along its training: scores of every image at every kept step, and weights at some of them.

    Attributes
    ----------
    name, spec, seed : as asked for, "fashion_glow:0"; what it is
    record : ``run.json``: history (one row a kept step: step, epoch, train_bpd, validation_bpd, seconds), sets with
        sizes and fingerprints, versions
    scores : the table of `score_flow` with a column ``step``
    folder : of the weights
    """

    name: str
    spec: FlowSpec
    seed: int
    record: dict[str, Any]
    scores: pd.DataFrame
    folder: Path

    @property
    def history(self) -> pd.DataFrame:
        """One row a kept step, rising."""
        import pandas as pd

        return pd.DataFrame(self.record["history"])

    @property
    def weights(self) -> list[int]:
        """Steps whose weights are here, rising."""
        return sorted(int(path.stem.removeprefix("step_")) for path in self.folder.glob("step_*.safetensors"))

    def model(self, step: int) -> Glow:
        """The flow after ``step`` steps, in evaluation mode. OodlibError: no weights of that step, a damaged file."""
        return load_weights(self.spec, snapshot_path(self.folder, step))

    def mature(self) -> tuple[bool, str]:
        """Whether the last step is mature, and why, in words; see `oodlib.maturity.is_mature`."""
        return is_mature(self.record["history"], self.spec.published_bpd)


def flow_spec(name: str) -> FlowSpec:
    """The entry of FLOWS, or an OodlibError that names the known ones."""
    if name not in FLOWS:
        raise OodlibError(f"There is no flow {name!r}. Known ones: {', '.join(FLOWS)}.")
    return FLOWS[name]


def flow_sets(spec: FlowSpec, *, n_fit: int, n_test: int, n_ood: int) -> dict[str, ImageSet]:
    """"fit" and "id" (disjoint parts of the ID test split) and every OOD set at hand, brought to the flow's shape."""
    from oodlib.data.prepare import NotAtHand

    test = _images(spec.id_set, "test", spec.image_shape, n_fit + n_test)
    if len(test) < n_fit + n_test:
        raise OodlibError(f"flow_sets: {spec.id_set} has {len(test)} test images, fewer than n_fit + n_test = "
                          f"{n_fit + n_test}. Ask for fewer.")
    sets = {"fit": test.subset(slice(n_fit), split="fit"), "id": test.subset(slice(n_fit, None))}
    for name in spec.ood:
        if name == f"{spec.id_set}-jpeg":
            longer = _images(spec.id_set, "test", spec.image_shape, n_fit + n_test + n_ood)
            sets[name] = _jpeg(longer.subset(slice(n_fit + n_test, None)))
            continue
        try:
            sets[name] = _images(name, "test", spec.image_shape, n_ood)
        except NotAtHand as error:
            print(f"left out: {error}")
    return sets


def run_flow(spec: FlowSpec, seed: int, folder: Path, *, n_fit: int | None = None, n_test: int | None = None,
             n_ood: int | None = None, device: str = "auto", progress: bool = True) -> None:
    """Train a flow and score every kept step, into ``folder``; what is there already is not done again.

    Killed at any moment, the same call goes on. n_fit, n_test, n_ood: images of "fit", "id" and each OOD set, or
    ``spec.n``. The density's variants, which cost a second pass, are computed after one epoch and at the last step.
    """
    from oodlib.extraction import pick_device

    where, recipe = pick_device(device), spec.recipe
    images, validation = spec.training_images()
    history = train_flow(spec.network(seed), images, validation, recipe, seed=seed, folder=folder, device=where,
                         progress=progress)
    sets = flow_sets(spec, n_fit=n_fit or spec.n, n_test=n_test or spec.n, n_ood=n_ood or spec.n)
    with_variants = (kept_step(history, 1), history[-1]["step"])
    for step in recipe.snapshots:
        path = folder / f"scores_{step:07d}.parquet"
        if not _scored(path, sets):
            table = score_flow(load_weights(spec, snapshot_path(folder, step)).to(where), sets,
                               variants=step in with_variants, progress=progress)
            with atomic_path(path) as temporary:
                table.assign(step=step).to_parquet(temporary, index=False, compression="zstd")
    write_json(folder / "run.json", {
        "flow": spec.name, "seed": seed, "recipe": asdict(recipe), "torch": torch.__version__,
        "network": {"image_shape": spec.image_shape, "steps": spec.steps, "levels": spec.levels, "hidden": spec.hidden},
        "history": [{k: None if v != v else v for k, v in row.items()} for row in history],
        "sets": {name: {"n": len(s), "fingerprint": s.fingerprint} for name, s in sets.items()},
        "weights": sha256(snapshot_path(folder, recipe.snapshots[-1])),
        "train_fingerprint": hashlib.sha256(images.numpy().tobytes()).hexdigest(), "n_train": len(images),
        "device": where.type, "machine": platform.machine(), "threads": torch.get_num_threads(),
        "command": f"python -m oodlib train {spec.name} --seed {seed}"})


def flow_run(name: str, *, n_fit: int | None = None, n_test: int | None = None, n_ood: int | None = None,
             device: str = "auto") -> FlowRun:
    """A flow by name: "fashion_glow:0" (shipped, or trained here by the command line), "latin_glow:live" (trained now).

    The numbers of images are for live flows; they are trained by one thread on a CPU, so that every machine gets the
    same weights, and kept for the next call.

    Raises
    ------
    OodlibError : an unknown name, a seed that is neither shipped nor trained here
    """
    import pandas as pd

    flow, _, which = name.partition(":")
    spec = flow_spec(flow)
    if which == "live":
        folder = _live(spec, n_fit or spec.n, n_test or spec.n, n_ood or spec.n, device)
    elif which.isdigit():
        places = [root() / "data" / kind / f"{flow}_s{which}" for kind in ("checkpoints", "training")]
        found = [place for place in places if (place / "run.json").exists()]
        if not found:
            raise OodlibError(f"flow_run: {name} is neither shipped nor trained here. Train and score it (resumable): "
                              f"python -m oodlib train {flow} --seed {which}")
        folder = found[0]
    else:
        raise OodlibError(f"flow_run: {name!r} needs a seed or live behind the colon: {flow}:0 or {flow}:live.")
    record = json.loads((folder / "run.json").read_text())
    tables = [pd.read_parquet(path) for path in sorted(folder.glob("scores_*.parquet"))]
    return FlowRun(name, spec, int(record["seed"]), record, pd.concat(tables, ignore_index=True), folder)


def train_and_ship(name: str, *, seed: int = 0, device: str = "auto") -> Path:
    """Train and score a flow of `FLOWS` in ``data/training`` (resumable), and copy what is shipped of a small one."""
    spec = flow_spec(name)
    folder = root() / "data" / "training" / f"{name}_s{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    run_flow(spec, seed, folder, device=device)
    if name.startswith("paper_"):
        return folder
    target = root() / "data" / "checkpoints" / folder.name
    with atomic_folder(target) as temporary:
        for path in [folder / "run.json", *folder.glob("scores_*.parquet")]:
            shutil.copy(path, temporary)
        for step in spec.shipped if seed == 0 else ():
            state = {k: v.half() if v.is_floating_point() else v for k, v in
                     load_weights(spec, snapshot_path(folder, step)).state_dict().items()}
            path = snapshot_path(temporary, step)
            with atomic_path(path) as part:
                save_file(state, part)
            write_json(path.with_suffix(".json"), {"step": step, "sha256": sha256(path), "dtype": "float16"})
    return target


def load_weights(spec: FlowSpec, path: Path) -> Glow:
    """A flow from one kept step, in evaluation mode. OodlibError: no such file, or not the one its record describes."""
    record = path.with_suffix(".json")
    if not path.exists() or not record.exists():
        there = ", ".join(p.stem for p in sorted(path.parent.glob("step_*.safetensors"))) or "none"
        raise OodlibError(f"load_weights: {path} is not there (present: {there}). Train it: python -m oodlib train "
                          f"{spec.name}")
    if sha256(path) != json.loads(record.read_text())["sha256"]:
        raise OodlibError(f"load_weights: {path} is damaged: its checksum is not that of {record.name}. Restore it, or "
                          "delete it and train again.")
    model = spec.network()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval()


def _images(name: str, split: str, shape: tuple[int, int, int], n: int | None) -> ImageSet:
    """n images of a set (all for None), in a seeded order, brought to a shape."""
    from oodlib.data import EMBEDDED, embedded, load

    if name in EMBEDDED:
        return embedded(name, split, n=n, size=shape[1])
    if split == "test":
        split = _SPLITS.get(name, split)
    images = load(name, split)
    images = images.sample(n or len(images), seed=0).resized(shape[1], channels=shape[0])
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


def _scored(path: Path, sets: dict[str, ImageSet]) -> bool:
    """Whether a table holds scores of these sets: since it was made, one may have come to hand, or n have changed."""
    import pandas as pd

    if not path.exists():
        return False
    table = pd.read_parquet(path, columns=["group_size", "set"])
    counts = table[table.group_size == 1]["set"].value_counts().to_dict()
    return counts == {name: len(images) for name, images in sets.items() if name != "fit"}


def _live(spec: FlowSpec, n_fit: int, n_test: int, n_ood: int, device: str) -> Path:
    """Folder of a flow trained and scored now, or earlier by the same code, recipe and counts."""
    from filelock import FileLock

    made_of = [repr(spec), n_fit, n_test, n_ood, spec.training_images()[0].sum().item(), torch.__version__,
               *(sha256(str(module.__file__)) for module in (training, flow_training, flow_scores, glow, gradients,
                                                     layer_rules, layerwise))]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    folder = root() / "data" / "cache" / "trained" / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):                               # two notebooks may want the same flow
        if not (folder / "run.json").exists():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                run_flow(spec, 0, folder, n_fit=n_fit, n_test=n_test, n_ood=n_ood, device=device)
            finally:
                torch.set_num_threads(threads)
    return folder
