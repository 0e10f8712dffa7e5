"""The suite's own classifiers: their recipes, shipped weights with provenance, training anew.

Weights are half-precision safetensors under ``data/checkpoints``, each with a JSON record.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError
from oodlib.files import key_of, locked, read_sealed, write_sealed
from oodlib.models.cifar_families import FAMILIES, AveragedFastConvNet, Family
from oodlib.models.device import pick_device, random_state
from oodlib.models.fast_convnet import FastConvNet
from oodlib.models.training.augment import normalise
from oodlib.models.training.classifier import Recipe, evaluate, train
from oodlib.workspace import code_hash, root


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What decides a checkpoint, besides the seed.

    ``data(split)`` gives the training and the test images; ``expected`` is the test accuracy to
    assert on loading; ``snapshots`` are epochs whose weights are saved too.
    """

    name: str
    network: Callable[[], FastConvNet | Family]
    data: Callable[[str], ImageSet]
    recipe: Recipe
    mean: tuple[float, ...]
    std: tuple[float, ...]
    expected: float
    snapshots: tuple[int, ...] = ()


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
_SMOOTHED = ("plain", "residual", "depthwise")  # trained with smoothed labels too
_KILO = 1024 * (1 + 1 / (1 - 0.85))  # Jordan's rates are per 1,024 images at infinite momentum


def _fast_recipe(epochs: float, batch_size: int, flip: Literal["none", "alternating"]) -> Recipe:
    """The recipe of arXiv 2404.00498 without label smoothing and without test-time augmentation.

    Both change the logits that OOD scores read; the logit scale 1/9 is part of the head.
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
        shift=2,
    )


def _family(name: str, label_smoothing: float = 0.0) -> Spec:
    """22 epochs for every family; the rate rises to 0.1 and falls to zero along a triangle."""
    return Spec(
        name=f"cifar10_{name}{'_smooth' * bool(label_smoothing)}",
        network=FAMILIES[name],
        recipe=Recipe(
            epochs=22,
            batch_size=128,
            lr=0.1,
            schedule="triangle",
            warmup=0.2,
            flip="alternating",
            shift=2,
            label_smoothing=label_smoothing,
        ),
        expected=0.88,
        **_CIFAR10,
    )


_FAST = Spec(
    name="cifar10_fast",
    network=FastConvNet,
    recipe=_fast_recipe(10, 500, "alternating"),
    expected=0.92,
    **_CIFAR10,
)
_LATIN = Spec(
    name="latin_fast",
    network=lambda: FastConvNet(26, widths=(16, 32, 128)),
    data=_latin,
    recipe=_fast_recipe(6, 250, "none"),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    expected=0.97,
    snapshots=(0, 1, 2, 3, 4, 5, 6),
)
SPECS = {
    spec.name: spec
    for spec in (
        _FAST,
        _LATIN,
        replace(_FAST, name="cifar10_fast_average", network=AveragedFastConvNet, expected=0.88),
        *map(_family, FAMILIES),
        *(_family(name, 0.1) for name in _SMOOTHED),
    )
}


@dataclass(frozen=True, eq=False)
class Trained:
    """A network and how to use it; ``provenance["accuracy"]`` is its test accuracy in [0, 1]."""

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
    spec, source = _spec(name), source or folder()
    weights = source / f"{name}_s{seed}{'' if epoch is None else '_snapshots'}.safetensors"
    present = sorted(path.stem for path in source.glob(f"{name}_s*.safetensors"))
    provenance = read_sealed(
        weights,
        "load_trained",
        f"Restore it from git, or train it: python -m oodlib train {name} --seed {seed} "
        f"(present: {', '.join(present) or 'none'}).",
    )
    state = to_single(load_file(weights))
    if epoch is not None:
        prefix = f"epoch{epoch}."
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if not state:
            raise OodlibError(
                f"load_trained: no snapshot of epoch {epoch}. Saved ones: {spec.snapshots}."
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
    spec, output = _spec(name), output or folder()
    where = pick_device(device)
    images, test = spec.data("train"), spec.data("test")
    pixels, labels = torch.from_numpy(images.images[:]), torch.from_numpy(images.labels[:])
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)

    # training
    with random_state() as seed_torch:
        seed_torch(seed)
        model = spec.network()
    model.initialise(normalise(pixels[:5000], mean, std))
    resume = folder().parent / "training" / f"{name}_s{seed}.pt"
    snapshots: dict[str, Tensor] = {}

    def snapshot(epoch: int, model: nn.Module) -> None:
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
        on_epoch=snapshot,
    )

    # accuracy of the weights as written
    state = to_half(model)
    model.load_state_dict(to_single(state))
    test_pixels, test_labels = torch.from_numpy(test.images[:]), torch.from_numpy(test.labels[:])
    accuracy = evaluate(model, test_pixels, test_labels, mean, std, device=where)

    # files
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
        write_sealed(
            output / f"{name}_s{seed}_snapshots.safetensors",
            lambda path: save_file(snapshots, path),
            {**provenance, "epochs": spec.snapshots},
        )
    path = output / f"{name}_s{seed}.safetensors"
    write_sealed(path, lambda temporary: save_file(state, temporary), provenance)
    resume.unlink(missing_ok=True)
    return path


def load_or_train(name: str, *, seed: int = 0, device: str = "auto") -> Trained:
    """The network as trained here by the same code, recipe and images; else trained now."""
    spec = _spec(name)
    key = [
        asdict(spec.recipe),
        spec.mean,
        spec.std,
        spec.data("train").fingerprint,
        "1 thread",
        code_hash(__name__),
    ]
    output = cached_build(
        key,
        f"{name}_s{seed}.json",
        lambda output: train_and_save(name, seed=seed, device=device, output=output),
    )
    return load_trained(name, seed=seed, source=output)


def cached_build(key: list[Any], done: str, build: Callable[[Path], object]) -> Path:
    """A folder of ``data/cache/trained`` for ``key``; ``build`` fills it unless ``done`` exists.

    It builds with one thread: on a CPU the order of sums follows the number of threads, and with it
    every number that rests on the result.
    """
    output = folder().parent / "cache" / "trained" / key_of(key)
    with locked(output / f"{done}.lock"):  # two notebooks may want the same
        if not (output / done).exists():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                build(output)
            finally:
                torch.set_num_threads(threads)
    return output


def to_half(model: nn.Module) -> dict[str, Tensor]:
    """The model's state as it is shipped: half precision, on the CPU."""
    return {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous().clone()
        for name, value in model.state_dict().items()
    }


def to_single(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A shipped state in float32 again."""
    return {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
