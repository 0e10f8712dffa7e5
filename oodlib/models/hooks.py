"""A network in evaluation mode for a while, and its head."""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oodlib.errors import OodlibError


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def named_layers(caller: str, model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """All modules by name; OodlibError where one of the layers is not among them."""
    modules = dict(model.named_modules())
    if unknown := [name for name in layers if name not in modules]:
        raise OodlibError(
            f"{caller}: the model has no layer {unknown[0]!r}. Its top-level layers are "
            f"{', '.join(name for name, _ in model.named_children())}."
        )
    return modules


def find_head(model: nn.Module, example: Tensor) -> str:
    """Name of the linear layer (or 1x1 convolution on one position) whose output is the model's.

    example : a batch (n, c, h, w). OodlibError: no such layer, or an activation or pooling follows.
    """
    outputs: dict[str, Tensor] = {}

    def store(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs[name] = output

    handles = [
        module.register_forward_hook(partial(store, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
    ]
    try:
        with torch.inference_mode():
            logits = model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise OodlibError(f"find_head: the model must return logits (n, C) alone, got {shape}.")
    for name in reversed(outputs):
        output = outputs[name]
        if output.numel() == logits.numel() and torch.equal(output.reshape(logits.shape), logits):
            return name
    config = getattr(model, "pretrained_cfg", None) or {}
    raise OodlibError(
        f"find_head: in {type(model).__name__} ({config.get('architecture', 'no timm model')}) no "
        "linear layer gives the model's output as it stands, but scores need logits = W features + "
        "b. Use a network (or wrapper) with one linear head (undistilled, if distilled)."
    )
