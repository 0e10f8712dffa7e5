"""A user's own network and data: models by name or function, image folders, feature files, a check of the labels."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from oodlib.data.imagenet import Transform
from oodlib.errors import OodlibError
from oodlib.files import sha256

__all__ = ["load_network"]

_OWN: set[str] = set()                                     # modules that were loaded from a user's file


@dataclass(frozen=True)
class OwnTransform:
    """A user's transform under a name that stays the same between runs, for caches: no memory addresses."""

    function: Transform
    source: str

    def __call__(self, picture: Any) -> Any:
        return self.function(picture)

    def __repr__(self) -> str:
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self.function)) + self.source


def load_network(name: str, *, weights: str | None = None, num_classes: int | None = None,
                 ) -> tuple[nn.Module, Transform]:
    """A classifier in evaluation mode and the transform of PIL images that goes with it.

    Parameters
    ----------
    name : one of the suite's networks (``cifar10_fast``, ``cifar10_fast:1`` for training seed 1, ``latin_fast``), a
        public CIFAR network (``resnet20_cifar10``), a timm model with its tag, or a function of yours that
        returns ``(model, transform)``: ``package.module:function`` or ``path/to/file.py:function``
    weights, num_classes : for timm only: a file to use instead of timm's download, and its number of classes where
        that is not the model's own

    Raises
    ------
    OodlibError : an unknown name, a function that fails or returns something else, options that do not apply
    """
    from oodlib.models.pretrained import PUBLIC, paper_model, public_model
    from oodlib.models.shipped import SPECS, load_trained

    base, _, variant = name.rpartition(":") if ":" in name else (name, "", "")
    own = base not in SPECS and base not in PUBLIC
    if own and not variant.isidentifier():
        return paper_model(name, weights, num_classes=num_classes)
    if weights is not None or num_classes is not None:
        raise OodlibError(f"score: {name} comes with its own weights; --weights and --num-classes are for timm models.")
    if own:
        return _from_function(base, variant)
    if variant and (base in PUBLIC or not variant.isdecimal()):
        raise OodlibError(f"score: there is no network {name!r}. The suite's own take a training seed, as in "
                          "cifar10_fast:1; public ones take none.")
    if base in SPECS:
        trained = load_trained(base, seed=int(variant or 0))
        model, mean, std = trained.model, trained.mean, trained.std
    else:
        model, info = public_model(base)
        mean, std = info.mean, info.std
    from torchvision import transforms

    return model, transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor(),
                                      transforms.Normalize(mean, std)])


def _from_function(module_name: str, function: str) -> tuple[nn.Module, Transform]:
    path = Path(module_name)
    if module_name.endswith(".py"):
        if not path.is_file():
            raise OodlibError(f"score: there is no file {path}. Give path/to/file.py:function.")
        sys.path.insert(0, str(path.resolve().parent))     # so that worker processes and its own imports find it
        module_name = path.stem
        if module_name in _OWN:                            # an earlier version, or a file of the same name elsewhere
            sys.modules.pop(module_name, None)
        importlib.invalidate_caches()
        if module_name not in sys.modules:
            _OWN.add(module_name)
    try:
        module = importlib.import_module(module_name)
        result = getattr(module, function)()
    except Exception as error:                             # a user's code may raise anything
        raise OodlibError(f"score: {module_name}:{function} failed ({type(error).__name__}: "
                          f"{(str(error).splitlines() or [''])[0][:200]}). It must be a "
                          "function without arguments that returns (model, transform).") from error
    loaded = Path(getattr(module, "__file__", None) or "")
    if path.suffix == ".py" and loaded.resolve() != path.resolve():
        raise OodlibError(f"score: Python knows another module {module_name!r} ({loaded}). Rename {path}.")
    if (not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], nn.Module)
            or not callable(result[1])):
        raise OodlibError(f"score: {module_name}:{function} must return (model, transform), an nn.Module and a "
                          f"function of PIL images, got {type(result).__name__}.")
    return result[0].eval(), OwnTransform(result[1], f" {sha256(loaded)}" if loaded.is_file() else "")

