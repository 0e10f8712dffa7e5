"""The suite's own classifiers: how each was trained, the shipped weights with their provenance, and
training anew.

Weights are half-precision safetensors under ``data/checkpoints``, each beside a JSON file that says
where it came from.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError
from oodlib.files import atomic_path, sha256, write_json
from oodlib.models.cifar_families import FAMILIES, AveragedFastConvNet, Family
from oodlib.models.fast_convnet import FastConvNet
from oodlib.models.training.augment import normalise
from oodlib.models.training.classifier import Recipe, evaluate, train
from oodlib.workspace import code_hash, root

__all__ = [
    "SPECS",
    "Spec",
    "Trained",
    "cached_build",
    "load_or_train",
    "load_trained",
    "to_half",
    "to_single",
    "train_and_save",
]

_KILO = 1024 * (
    1 + 1 / (1 - 0.85)
)  # Jordan 2024 states its rates per 1,024 images at infinite momentum


def _fast_recipe(epochs: float, batch_size: int, *, shift: int, flip: str) -> Recipe:
    """The recipe of arXiv 2404.00498 without label smoothing and without test-time augmentation.

    Both change the logits that OOD scores read, so neither is used; the logit scale 1/9 sits in the
    head.
    """
    return Recipe(
        epochs=epochs,
        batch_size=batch_size,
        lr=11.5 / _KILO * batch_size,
        momentum=0.85,
        decay=0.0153 / _KILO * batch_size,
        schedule="triangle",
        warmup=0.23,
        final_lr=0.07,
        norm_bias_lr=64.0,
        head_lr=1 / 81,
        whiten_bias_epochs=3,
        lookahead=True,
        flip=flip,
        shift=shift,
    )  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What decides a checkpoint, besides the seed.

    ``data(split)`` gives the training and the test images; ``expected`` is the test accuracy to
    assert on loading.
    """

    name: str
    network: Callable[[], FastConvNet | Family]
    data: Callable[[str], ImageSet]
    recipe: Recipe
    mean: tuple[float, ...]
    std: tuple[float, ...]
    expected: float
    snapshots: tuple[int, ...] = ()  # epochs whose weights are kept too


def _cifar10(split: str) -> ImageSet:
    from oodlib.data import load

    return load("cifar10", split)


def _latin(split: str) -> ImageSet:
    from oodlib.data import embedded

    return embedded("latin", split, n={"train": 6000, "test": 2000}[split])


_CIFAR10: dict[str, Any] = {
    "data": _cifar10,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}
_SMOOTHED = (
    "plain",
    "residual",
    "depthwise",
)  # families with a twin of the same seed and smoothed labels


def _family(name: str, label_smoothing: float = 0.0) -> Spec:
    """One recipe for all families: 22 epochs, the rate rises to 0.1 and falls to zero along a
    triangle.
    """
    recipe = Recipe(
        epochs=22,
        batch_size=128,
        lr=0.1,
        schedule="triangle",
        warmup=0.2,
        flip="alternating",
        shift=2,
        label_smoothing=label_smoothing,
    )
    return Spec(
        name=f"cifar10_{name}{'_smooth' * bool(label_smoothing)}",
        network=FAMILIES[name],
        recipe=recipe,
        expected=0.88,
        **_CIFAR10,
    )


SPECS = {
    spec.name: spec
    for spec in (
        Spec(
            name="cifar10_fast",
            network=lambda: FastConvNet(10),
            recipe=_fast_recipe(10, 500, shift=2, flip="alternating"),
            expected=0.92,
            **_CIFAR10,
        ),
        Spec(
            name="latin_fast",
            network=lambda: FastConvNet(26, widths=(16, 32, 128)),
            data=_latin,
            recipe=_fast_recipe(6, 250, shift=2, flip="none"),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            expected=0.97,
            snapshots=(0, 1, 2, 3, 4, 5, 6),
        ),
        Spec(
            name="cifar10_fast_average",
            network=AveragedFastConvNet,
            recipe=_fast_recipe(10, 500, shift=2, flip="alternating"),
            expected=0.88,
            **_CIFAR10,
        ),
        *map(_family, FAMILIES),
        *(_family(name, 0.1) for name in _SMOOTHED),
    )
}


@dataclass(frozen=True, eq=False)
class Trained:
    """A network with what is needed to use it. ``provenance["accuracy"]`` is its test accuracy in
    [0, 1].
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    provenance: dict[str, Any]


def folder() -> Path:
    """``data/checkpoints`` of the project."""
    return root() / "data" / "checkpoints"


def _spec(name: str) -> Spec:
    if name not in SPECS:
        raise OodlibError(f"There is no training recipe {name!r}. Known ones: {', '.join(SPECS)}.")
    return SPECS[name]


def load_trained(
    name: str, *, seed: int = 0, epoch: int | None = None, source: Path | None = None
) -> Trained:
    """A shipped network, in evaluation mode.

    Parameters
    ----------
    name : a key of `SPECS`
    epoch : one of the spec's snapshots along training; the finished network where not given
    source : folder of weights; the shipped ones where not given

    Raises
    ------
    OodlibError : unknown name, no such seed or snapshot, a file that does not match its provenance
    """
    from safetensors.torch import load_file

    spec, source = _spec(name), source or folder()
    stem = f"{name}_s{seed}" + ("" if epoch is None else "_snapshots")
    weights, record = source / f"{stem}.safetensors", source / f"{stem}.json"
    if not weights.exists() or not record.exists():
        have = sorted(p.stem for p in source.glob(f"{name}_s*.safetensors"))
        raise OodlibError(
            f"load_trained: {weights.name} is not there (present: {', '.join(have) or 'none'}). "
            f"Train it: python -m oodlib train {name} --seed {seed}"
        )
    provenance = json.loads(record.read_text())
    if sha256(weights) != provenance["sha256"]:
        raise OodlibError(
            f"load_trained: {weights} is not the file its provenance describes. Restore it from "
            "git."
        )
    state = to_single(load_file(weights))
    if epoch is not None:
        prefix = f"epoch{epoch}."
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if not state:
            raise OodlibError(
                f"load_trained: no snapshot of epoch {epoch}. Kept ones: {spec.snapshots}."
            )
    model = spec.network()
    model.load_state_dict(state)
    return Trained(model.eval(), spec.mean, spec.std, {**provenance, "expected": spec.expected})


def train_and_save(
    name: str, *, seed: int = 0, device: str = "auto", output: Path | None = None
) -> Path:
    """Train a network of `SPECS`, resuming an interrupted run, and write weights and provenance.

    The accuracy in the provenance is that of the half-precision weights as written, on the whole
    test split.
    """
    from oodlib.models.device import pick_device, random_state

    spec, output = _spec(name), output or folder()
    where = pick_device(device)
    images, test = spec.data("train"), spec.data("test")
    pixels, labels = torch.from_numpy(images.images[:]), torch.from_numpy(images.labels[:])
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    with random_state() as seed_torch:
        seed_torch(seed)
        model = spec.network()
    model.initialise(normalise(pixels[:5000], mean, std))
    resume = folder().parent / "training" / f"{name}_s{seed}.pt"
    snapshots: dict[str, Tensor] = {}

    def keep(epoch: int, model: nn.Module) -> None:
        if epoch in spec.snapshots:
            snapshots.update({f"epoch{epoch}.{k}": v for k, v in to_half(model).items()})

    history = train(
        model,
        pixels,
        labels,
        spec.recipe,
        seed=seed,
        mean=mean,
        std=std,
        device=where,
        checkpoint=None if spec.snapshots else resume,
        on_epoch=keep,
    )
    state = to_half(model)
    model.load_state_dict(to_single(state))
    accuracy = evaluate(
        model,
        torch.from_numpy(test.images[:]),
        torch.from_numpy(test.labels[:]),
        mean,
        std,
        device=where,
    )
    provenance = {
        "name": name,
        "seed": seed,
        "recipe": asdict(spec.recipe),
        "accuracy": accuracy,
        "n_test": len(test),
        "n_train": len(images),
        "train_fingerprint": images.fingerprint,
        "test_fingerprint": test.fingerprint,
        "mean": spec.mean,
        "std": spec.std,
        "dtype": "float16",
        "torch": torch.__version__,
        "device": where.type,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "history": history,
        "command": f"python -m oodlib train {name} --seed {seed}",
        "code": code_hash(__name__),
    }
    if snapshots:
        _write(
            output / f"{name}_s{seed}_snapshots",
            snapshots,
            {**provenance, "epochs": spec.snapshots},
        )
    path = _write(output / f"{name}_s{seed}", state, provenance)
    resume.unlink(missing_ok=True)
    return path


def load_or_train(name: str, *, seed: int = 0, device: str = "auto") -> Trained:
    """The network trained here earlier, else trained now: the live route of the laptop profile.

    One trained by another recipe, on other images or by other code is not used again.
    """
    spec = _spec(name)
    made_of = [
        asdict(spec.recipe),
        spec.mean,
        spec.std,
        spec.data("train").fingerprint,
        "1 thread",
        code_hash(__name__),
    ]
    output = cached_build(
        made_of,
        f"{name}_s{seed}.json",
        lambda output: train_and_save(name, seed=seed, device=device, output=output),
    )
    return load_trained(name, seed=seed, source=output)


def cached_build(made_of: list[Any], done: str, make: Callable[[Path], object]) -> Path:
    """A folder of ``data/cache/trained`` for what ``made_of`` (JSON) decides; ``make`` fills it
    unless ``done`` exists.

    On a CPU one thread makes it: the order of sums follows the number of threads, and with it every
    number that rests on the result.
    """
    from filelock import FileLock

    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    output = folder().parent / "cache" / "trained" / key
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / f"{done}.lock"):  # two notebooks may want the same
        if not (output / done).exists():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                make(output)
            finally:
                torch.set_num_threads(threads)
    return output


def to_half(model: nn.Module) -> dict[str, Tensor]:
    """The model's state as it is shipped: half precision, on the CPU."""
    return {
        k: (v.half() if v.is_floating_point() else v).cpu().contiguous().clone()
        for k, v in model.state_dict().items()
    }


def to_single(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A shipped state in float32 again."""
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _write(stem: Path, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    path = stem.with_suffix(".safetensors")
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    write_json(stem.with_suffix(".json"), {**provenance, "sha256": sha256(path)})
    return path
