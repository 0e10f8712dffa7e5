"""The device a model runs on, its random state, and hashes of its weights and code."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import nn

from oodlib.errors import OodlibError
from oodlib.workspace import code_hash


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` is CUDA, then Apple's MPS, then the CPU; OodlibError for an unusable device."""
    if str(device) != "auto":
        try:
            torch.empty(0, device=device)
        except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: by device
            reason = str(error).splitlines()[0][:60]
            raise OodlibError(
                f"device {device!s} cannot be used ({reason}). Use auto, cpu, cuda or mps."
            ) from error
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextlib.contextmanager
def random_state(device: str | torch.device = "cpu") -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds torch's generators of CPU and device; restore them afterwards.

    `torch.manual_seed` would seed those of every device, and nothing would restore them.
    """
    generators, where = [torch.default_generator], torch.device(device)
    if where.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if where.index is None else where.index
        generators.append(torch.cuda.default_generators[index])
    elif where.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    states = [generator.get_state() for generator in generators]

    def seed_torch(seed: int) -> None:
        for generator in generators:
            generator.manual_seed(seed)

    try:
        yield seed_torch
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (hexadecimal) over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def model_code_hash(model: nn.Module) -> str:
    """SHA-256 (hexadecimal) over a model's module tree and the code of its classes.

    Our modules count with all that they import, torch, torchvision and timm by version, any other
    class by its source where Python can read it.
    """
    classes = sorted(
        {type(m) for m in model.modules()}, key=lambda c: (c.__module__, c.__qualname__)
    )
    ours = sorted({c.__module__ for c in classes if c.__module__.startswith("oodlib.")})
    digest = hashlib.sha256(f"{model!r} {code_hash(*ours)}".encode())
    for c in classes:
        if c.__module__.partition(".")[0] not in ("oodlib", "timm", "torch", "torchvision"):
            with contextlib.suppress(OSError, TypeError):
                digest.update(inspect.getsource(c).encode())
    return digest.hexdigest()
