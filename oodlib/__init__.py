"""Out-of-distribution detection: methods, metrics and the machinery behind the suite's notebooks.

Scores everywhere: larger = more out-of-distribution.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from oodlib.errors import OodlibError

if TYPE_CHECKING:
    from oodlib.features.extract import extract
    from oodlib.features.feature_bank import FeatureBank
    from oodlib.scores import Detector, create, list_detectors, load_detector, names

__version__ = "0.1.0"
__all__ = [
    "Detector",
    "FeatureBank",
    "OodlibError",
    "create",
    "extract",
    "list_detectors",
    "load_detector",
    "names",
]

# loaded on first use, so that `import oodlib` and the command line start without torch
_HOME = {
    "FeatureBank": "oodlib.features",
    "extract": "oodlib.features",
    **dict.fromkeys(
        ("Detector", "create", "list_detectors", "load_detector", "names"), "oodlib.scores"
    ),
}
_MODULES = {"claims", "data", "features", "gradients", "metrics", "models", "scores"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"oodlib.{name}")
    raise AttributeError(f"module 'oodlib' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
