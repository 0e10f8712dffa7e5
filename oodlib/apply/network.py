"""A network to score with, by name: the suite's, a public one, timm's, or a user's function."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pickle
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from torch import nn

from oodlib.data.folders import Transform
from oodlib.errors import OodlibError
from oodlib.files import sha256

# private name of the module of a user's file -> the modules that it imported from its own folder
_BESIDE: dict[str, dict[str, ModuleType]] = {}


@dataclass(frozen=True)
class OwnTransform:
    """A user's transform under a name that is the same in every run, for caches.

    A worker process that receives a transform from a file runs that file again, under the same
    private name.
    """

    function: Transform
    source: str
    module: str = ""
    file: str = ""

    def __call__(self, picture: Any) -> Any:
        return self.function(picture)

    def __repr__(self) -> str:
        name = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self.function))
        return (
            name.replace(self.module, Path(self.file).stem) if self.file else name
        ) + self.source

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.file:
            return OwnTransform, (self.function, self.source)
        with _importable(self.module, Path(self.file)):
            return _reopened, (pickle.dumps(self.function), self.source, self.module, self.file)


def _reopened(function: bytes, source: str, module: str, file: str) -> OwnTransform:
    if module not in sys.modules:
        _run_file(Path(file), module)
    with _importable(module, Path(file)):
        return OwnTransform(pickle.loads(function), source, module, file)


def load_network(
    name: str, *, weights: str | None = None, num_classes: int | None = None
) -> tuple[nn.Module, Transform]:
    """A classifier in evaluation mode and the transform of PIL images that goes with it.

    Parameters
    ----------
    name : one of the suite's networks (``cifar10_fast``, ``cifar10_fast:1`` for training seed 1,
        ``latin_fast``), a public CIFAR network (``resnet20_cifar10``), a timm model with its tag,
        or a function of yours that returns ``(model, transform)``: ``package.module:function`` or
        ``path/to/file.py:function``. The file may import what lies beside it while it is loaded and
        its function runs, not later
    weights, num_classes : for timm only: a file to use instead of timm's download, and its number
        of classes where that is not the model's own

    Raises
    ------
    OodlibError : an unknown name, a function that fails or returns something else, options that do
        not apply
    """
    from oodlib.models.pretrained import PUBLIC, paper_model, public_model
    from oodlib.models.shipped import SPECS, load_trained

    base, _, variant = name.rpartition(":") if ":" in name else (name, "", "")
    own = base not in SPECS and base not in PUBLIC
    if own and not variant.isidentifier():
        return paper_model(name, weights, num_classes=num_classes)
    if weights is not None or num_classes is not None:
        raise OodlibError(
            f"load_network: {name} comes with its own weights; weights and num_classes are for "
            "timm models. Omit them."
        )
    if own:
        return _from_function(base, variant)
    if variant and (base in PUBLIC or not variant.isdecimal()):
        raise OodlibError(
            f"load_network: there is no network {name!r}. The suite's own take a training seed, as "
            "in cifar10_fast:1; public ones take none."
        )
    if base in SPECS:
        trained = load_trained(base, seed=int(variant or 0))
        model, mean, std = trained.model, trained.mean, trained.std
    else:
        model, info = public_model(base)
        mean, std = info.mean, info.std
    from torchvision import transforms

    resize = [transforms.Resize(32), transforms.CenterCrop(32)]
    to_tensor = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return model, transforms.Compose([*resize, *to_tensor])


def _from_function(place: str, function: str) -> tuple[nn.Module, Transform]:
    file = Path(place).resolve() if place.endswith(".py") else None
    if file is not None and not file.is_file():
        raise OodlibError(f"load_network: there is no file {place}. Give path/to/file.py:function.")
    try:
        if file is None:
            module = importlib.import_module(place)
            result = getattr(module, function)()
        else:
            module = _run_file(file, f"_own_{uuid4().hex}")
            with _importable(module.__name__, file):
                result = getattr(module, function)()
    except Exception as error:  # a user's code may raise anything
        raise OodlibError(
            f"{place}:{function} failed ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:200]}). It must be a function without "
            "arguments that returns (model, transform)."
        ) from error
    match result:
        case (nn.Module() as model, transform) if callable(transform):
            pass
        case _:
            raise OodlibError(
                f"{place}:{function} must return (model, transform), an nn.Module and a function "
                f"of PIL images, got {type(result).__name__}."
            )
    modules = (module, *_BESIDE.get(module.__name__, {}).values())
    files = [Path(path) for m in modules if (path := getattr(m, "__file__", None))]
    source = "".join(f" {sha256(path)}" for path in files if path.is_file())
    own = () if file is None else (module.__name__, str(file))
    return model.eval(), OwnTransform(transform, source, *own)


def _run_file(file: Path, name: str) -> ModuleType:
    """Run a user's file as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as the import statement does, before it runs
    try:
        with _importable(name, file):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _importable(name: str, file: Path) -> Iterator[None]:
    """What lies beside a user's file can be imported for a while; no trace of it stays in `sys`.

    name : of the file's own module, under which its imports from there wait for the next time
    """
    if str(file.parent) in (str(Path(entry).resolve()) for entry in sys.path):
        yield  # the folder can be imported from anyway
        return
    beside = _BESIDE.setdefault(name, {})
    before = set(sys.modules)
    hidden = {other: sys.modules[other] for other in beside if other in sys.modules}
    sys.modules.update(beside)
    sys.path.insert(0, str(file.parent))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # taken out by the user's file
            sys.path.remove(str(file.parent))
        new = (beside.keys() | (sys.modules.keys() - before)) & sys.modules.keys()
        tops = {other for other in new if _lies_in(sys.modules[other], file.parent)}
        ours = [other for other in new if other.partition(".")[0] in tops]
        beside |= {other: sys.modules.pop(other) for other in ours}
        sys.modules.update(hidden)


def _lies_in(module: ModuleType | None, folder: Path) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place and Path(place).parent == folder for place in places)
