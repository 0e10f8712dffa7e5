"""The examples in docstrings run, and every public score function has one."""

import doctest
import importlib
import inspect
import pkgutil
import warnings

import numpy as np
import pytest
import torch

import oodlib
from oodlib import scores

PACKAGES = ["files", "features", "gradients", "metrics", "scores"]
# reads or splits a network: the example would be a network
NO_EXAMPLE = {
    "early_layers",
    "early_prototypes",
    "load_detector",
    "noise_features",
    "noise_images",
    "split_forward",
    "synthetic_features",
}


def modules():
    for name in PACKAGES:
        package = importlib.import_module(f"oodlib.{name}")
        yield package.__name__
        for module in pkgutil.iter_modules(getattr(package, "__path__", []), f"oodlib.{name}."):
            yield module.name


@pytest.mark.parametrize("name", list(modules()))
def test_examples(name):
    module = importlib.import_module(name)
    globs = {"np": np, "torch": torch, **vars(module)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = doctest.testmod(module, globs=globs)
    assert result.failed == 0


def test_every_score_function_has_an_example():
    functions = [getattr(scores, name) for name in scores.__all__]
    functions = [f for f in functions if inspect.isfunction(f) and f.__name__ not in NO_EXAMPLE]
    without = [f.__name__ for f in functions if ">>>" not in (f.__doc__ or "")]
    assert without == ["list_detectors", "list_detectors"]  # `names` is the same function
    for shown in (oodlib.FeatureBank, oodlib.create):
        assert ">>>" in (shown.__doc__ or "")
