"""OOD prototypes of GROOD that need the network again: mixed early maps, and noise.

A network is split at a *named* module by forward hooks: one pass records the module's output, the
next one puts another output in its place. No list of children is replayed, so functional
activations, skips and token handling stay as they are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from oodlib.errors import OodlibError, check_interval
from oodlib.models.hooks import eval_mode, find_head
from oodlib.scores.moments import stream_means

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class EarlyPrototypes:
    """Class means (C, ...) of the output of each named module, and how many images they took."""

    means: Mapping[str, Tensor]
    forwards: int


@dataclass(frozen=True, eq=False)
class OodFeatures:
    """Penultimate features (n, D) whose mean is an OOD prototype, and the forward passes."""

    features: NDArray[np.float32]
    forwards: int


# three stages of known networks that all information goes through, early to late
_EARLY = (
    ("layer1", "layer2", "layer3", "layer4"),
    ("bn1", "layer1", "layer2"),
    ("whiten", "blocks.0", "blocks.1"),
    ("block1", "trans1", "trans2"),
    tuple(f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8)),
    ("features.1", "features.3", "features.5"),
    ("blocks.2", "blocks.5", "blocks.8"),
    ("stages.0", "stages.1", "stages.2"),
)


def early_layers(model: nn.Module) -> list[str]:
    """Names of three early modules, early to late; the last is the usual place to mix.

    Known: ResNets (of torchvision, timm, CIFAR), FastConvNet, DenseNetBC, ViT (torchvision, timm),
    Swin, BiT and ConvNeXt.

    Raises
    ------
    OodlibError : another kind of network: name a layer yourself
    """
    known = {name for name, _ in model.named_modules()}
    for names in _EARLY:
        if known.issuperset(names):
            return list(names[:3])
    raise OodlibError(
        f"early_layers: no early modules are known for {type(model).__name__}. Name a stage that "
        "all information goes through, see model.named_modules()."
    )


def split_forward(
    model: nn.Module, layer: str, x: Tensor, replace: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass in evaluation mode that returns, or replaces, the output of a named module.

    Parameters
    ----------
    layer : as in ``model.named_modules()``; all information must go through it
    x : (n, c, h, w) network inputs, on the model's device
    replace : output of the layer to go on with, (n, ...); then only the batch size of x matters

    Returns
    -------
    output of the layer (n, ...), input of the linear head (n, D), logits (n, C)

    Raises
    ------
    OodlibError : no such layer, it runs never or more than once, its output is not a tensor, a path
        leads around it, no linear head
    """
    with eval_mode(model):
        return _split(model, layer, _check_split(model, layer, x[:2]), x, replace)


def early_prototypes(
    model: nn.Module,
    layers: Sequence[str],
    batches: Batches,
    num_classes: int,
    *,
    device: str | torch.device = "cpu",
) -> EarlyPrototypes:
    """Class means of the outputs of named early modules, streamed: memory C x (size of the maps).

    Parameters
    ----------
    layers : names of modules that all information goes through; this is checked on the first images
    batches : network inputs and true labels, `Testbed.batches("fit")`
    num_classes : C

    Raises
    ------
    OodlibError : as in `split_forward`; a batch without an image, a label outside 0 .. C-1, a class
        without a sample
    """
    shapes: dict[str, torch.Size] = {}
    forwards = 0

    def maps() -> Iterator[tuple[NDArray[Any], Tensor]]:
        nonlocal forwards
        for x, y in batches:
            _check_batch("early_prototypes", x)
            x = x.to(device)
            if not shapes:
                for layer in layers:
                    _check_split(model, layer, x[:2])
            found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
            hooks = {layer: _record(found[layer]) for layer in layers}
            with _hooks(model, hooks), torch.inference_mode():
                model(x)
            shapes.update({layer: found[layer][0].shape[1:] for layer in layers})
            forwards += len(x)
            flat = [found[layer][0].flatten(1).float().cpu().numpy() for layer in layers]
            yield np.concatenate(flat, 1), y

    if not layers:
        raise OodlibError("early_prototypes: name at least one layer.")
    model.to(device)
    with eval_mode(model):
        means = torch.from_numpy(stream_means(maps(), num_classes).astype(np.float32))
    parts = torch.split(means, [shapes[layer].numel() for layer in layers], 1)
    named = zip(layers, parts, strict=True)
    return EarlyPrototypes(
        {layer: part.reshape(num_classes, *shapes[layer]) for layer, part in named}, forwards
    )


def synthetic_features(
    model: nn.Module,
    layer: str,
    prototypes: Tensor,
    batches: Batches,
    *,
    lam: float = 0.5,
    device: str | torch.device = "cpu",
) -> OodFeatures:
    r"""Penultimate features of training images, mixed early with another class's prototype.

    z = lambda f_early(x) + (1 - lambda) P_early[r],   r = class with the second largest logit of x

    Parameters
    ----------
    layer : name of the early module
    prototypes : (C, ...) class means of its output, `EarlyPrototypes.means[layer]`
    batches : network inputs of training images, of all classes alike (labels are not read)
    lam : lambda in [0, 1]; 1 is the plain forward pass. The released code has 0.5, its
        configuration 0.8

    Returns
    -------
    OodFeatures : two passes per image

    Raises
    ------
    OodlibError : lambda out of range, prototypes of another shape or number of classes, no image;
        as `split_forward`

    References
    ----------
    ElAraby, Sahoo, Pequignot, Novello, Paull, TMLR 2025, arXiv 2312.14427, section 5.2 and Eq. 8
    (neither could be read: the formula is that of the authors' code)
    """
    check_interval("synthetic_features: lam", lam, "[0, 1]")
    model.to(device)
    prototypes = prototypes.to(device)
    features: list[NDArray[Any]] = []
    head, forwards = "", 0
    with eval_mode(model):
        for x, _ in batches:
            _check_batch("synthetic_features", x)
            x = x.to(device)
            head = head or _check_split(model, layer, x[:2])
            early, _, logits = _split(model, layer, head, x, None)
            if logits.shape[1] < 2 or prototypes.shape != (logits.shape[1], *early.shape[1:]):
                raise OodlibError(
                    f"synthetic_features: prototypes of {layer!r} must be (C, ...) = "
                    f"{(logits.shape[1], *early.shape[1:])} with C > 1, got "
                    f"{tuple(prototypes.shape)}. Use early_prototypes with the same layer and "
                    "image size."
                )
            runner_up = logits.topk(2).indices[:, 1]
            mixed = lam * early + (1 - lam) * prototypes[runner_up].to(early.dtype)
            features.append(_split(model, layer, head, x, mixed)[1].float().cpu().numpy())
            forwards += 2 * len(x)
    if not features:
        raise OodlibError("synthetic_features: there was no batch. Check the loader.")
    return OodFeatures(np.concatenate(features), forwards)


def noise_images(n: int, shape: tuple[int, int, int], *, generator: torch.Generator) -> Tensor:
    """Blurred uniform noise (n, c, h, w) in [0, 1], float32.

    Gaussian blur of 5 x 7 pixels, sigma uniform in (0.2, 5) for each image.
    """
    c, h, w = shape
    if min(h, w) < 4:
        raise OodlibError(
            f"noise_images: images of at least 4 x 4 pixels are needed, got {h} x {w}."
        )
    images = torch.rand(n, c, h, w, generator=generator)
    sigma = 0.2 + 4.8 * torch.rand(n, 1, generator=generator)
    for size, axis in ((7, 2), (5, 3)):  # torchvision's order is (x, y): 5 wide, 7 high
        offsets = torch.arange(size) - size // 2
        kernel = (-0.5 * (offsets / sigma).square()).softmax(1).repeat_interleave(c, 0)
        kernel = kernel[:, None, :, None] if axis == 2 else kernel[:, None, None, :]
        margin = (0, 0, size // 2, size // 2) if axis == 2 else (size // 2, size // 2, 0, 0)
        flat = pad(images, margin, mode="reflect").flatten(0, 1)[None]
        images = conv2d(flat, kernel, groups=n * c).reshape(n, c, h, w)
    return images


def noise_features(
    model: nn.Module,
    shape: tuple[int, int, int],
    *,
    n: int = 100,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> OodFeatures:
    """Penultimate features of blurred noise with a small logsumexp of the logits (10 of each 100).

    Parameters
    ----------
    shape : (c, h, w) of the network's inputs
    n : number of features
    mean, std : of the network's input normalisation; the released code feeds the noise without it

    Returns
    -------
    OodFeatures : ten passes per feature

    Raises
    ------
    OodlibError : n below 1, only one of mean and std
    """
    if (mean is None) != (std is None):
        raise OodlibError("noise_features: give both mean and std, or neither.")
    generator = torch.Generator().manual_seed(seed)
    model.to(device)
    kept: list[NDArray[Any]] = []
    forwards = 0
    with eval_mode(model), torch.inference_mode():
        head = find_head(model, torch.zeros(2, *shape, device=device))
        while 10 * len(kept) < n:
            x = noise_images(100, shape, generator=generator)
            if mean is not None and std is not None:
                x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
            found: list[Tensor] = []
            with _hooks(model, {}, {head: found}):
                logits = model(x.to(device))
            chosen = logits.logsumexp(1).argsort()[:10]
            kept.append(found[0].flatten(1)[chosen].float().cpu().numpy())
            forwards += len(x)
    if not kept:
        raise OodlibError(f"noise_features: n must be at least 1, got {n}.")
    return OodFeatures(np.concatenate(kept)[:n], forwards)


def _check_batch(name: str, x: Tensor) -> None:
    if len(x) == 0:
        raise OodlibError(f"{name}: a batch without an image. Check the loader or the filter.")


@torch.inference_mode()
def _split(
    model: nn.Module, layer: str, head: str, x: Tensor, replace: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    outputs: list[Tensor] = []
    features: list[Tensor] = []
    with _hooks(model, {layer: _record(outputs, replace)}, {head: features}):
        logits = model(x)
    if len(outputs) != 1:
        raise OodlibError(
            f"split: layer {layer!r} ran {len(outputs)} times in one pass, once is needed. Name a "
            "module that is used once."
        )
    return outputs[0], features[0].flatten(1), logits


def _check_split(model: nn.Module, layer: str, x: Tensor) -> str:
    """Name of the head, after a check that the layer's output alone determines the logits."""
    head = find_head(model, x)
    output, _, logits = _split(model, layer, head, x, None)
    again = _split(model, layer, head, 1 - x, output)[2]
    if not torch.allclose(again, logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
        raise OodlibError(
            f"split: a path leads around layer {layer!r}, so its output does not determine the "
            "logits. Name a whole stage or block instead of a layer inside a residual branch."
        )
    return head


def _record(found: list[Tensor], replace: Tensor | None = None) -> Callable[..., Tensor | None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            raise OodlibError(
                f"split: layers must return one tensor, got {type(output).__name__}. Name another."
            )
        found.append(output if replace is None else replace)
        return replace

    return hook


def _record_input(found: list[Tensor], _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    found.append(inputs[0])


@contextmanager
def _hooks(
    model: nn.Module,
    after: Mapping[str, Callable[..., Tensor | None]],
    before: Mapping[str, list[Tensor]] | None = None,
) -> Iterator[None]:
    """Forward hooks after some modules, and lists that get the input of others."""
    modules = dict(model.named_modules())
    if unknown := [name for name in after if name not in modules]:
        raise OodlibError(
            f"split: the model has no layer {unknown[0]!r}. Its top-level layers are "
            f"{', '.join(n for n, _ in model.named_children())}."
        )
    handles = [modules[name].register_forward_hook(hook) for name, hook in after.items()]
    handles += [
        modules[name].register_forward_pre_hook(partial(_record_input, found))
        for name, found in (before or {}).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
