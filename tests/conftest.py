"""Fixtures that several test modules share."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oodlib import FeatureBank


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first; of the slow ones those that run notebooks first, since they take longest
    and all cores should end at the same time.
    """

    def order(item: pytest.Item) -> tuple[bool, bool]:
        slow = item.get_closest_marker("slow") is not None
        return slow, slow and item.path.name != "test_notebooks.py"

    items.sort(key=order)


@pytest.fixture
def batch():
    """Features h (20, 8) of either sign, head W (5, 8), b (5,), logits (20, 5); float64 torch."""
    g = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((20, 8), (5, 8), (5,)))
    return h, w, b, h @ w.T + b


@pytest.fixture
def killed_process(request: pytest.FixtureRequest):
    """Runs ``module.call``, of a module beside the test, in a process of its own, which must end by
    SIGKILL.
    """

    def run(module: str, call: str) -> None:
        folder = str(request.path.parent)
        code = f"import sys; sys.path.insert(0, {folder!r}); import {module}; {module}.{call}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        assert done.returncode == -signal.SIGKILL, done.stderr

    return run


@pytest.fixture(scope="session")
def blobs():
    """Banks (train, ID test, OOD test): 4 Gaussian classes in 16 non-negative dimensions, OOD weak
    and in between.
    """
    rng = np.random.default_rng(0)
    centres = np.kron(np.eye(4), np.ones(4)) * 6
    noise = 0.5

    def features(n, means):
        return np.abs(means + noise * rng.normal(size=(n, 16))).astype(np.float32)

    def bank(n):
        labels = np.arange(n) % 4
        return FeatureBank.from_arrays(
            features(n, centres[labels]), weight=centres / 8, bias=np.full(4, -2.0), labels=labels
        )

    train, test = bank(800), bank(400)
    weak = rng.uniform(0, 3, size=(400, 16)) * (rng.random((400, 16)) < 0.5)
    ood = FeatureBank.from_arrays(features(400, weak), weight=centres / 8, bias=np.full(4, -2.0))
    return train, test, ood


# folder of each set, images in each of its two classes
TREE = {
    "images_largescale/imagenet_1k/val": 12,
    "images_largescale/inaturalist": 3,
    "images_largescale/sun": 2,
    "images_largescale/places": 2,
    "images_classic/texture": 2,
    "images_largescale/imagenet_1k/train": 8,
    "images_largescale/ninco": 2,
    "images_largescale/ssb_hard": 2,
    "images_largescale/openimage_o": 4,
}
# OpenImage-O holds its validation images in the same folder: lists tell them apart
LISTS = {"test_openimage_o.txt": (2, 3), "val_openimage_o.txt": (0, 1)}


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise JPEGs in the layout that `make data PROFILE=paper` describes."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for folder, count in TREE.items():
        for label in range(2):
            (root / folder / f"n0{label}").mkdir(parents=True)
            for i in range(count):
                suffix = "JPEG" if "imagenet" in folder else "jpg"
                pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"n0{label}" / f"{label}_{i}.{suffix}")
    lists = root / "benchmark_imglist" / "imagenet"
    lists.mkdir(parents=True)
    for name, numbers in LISTS.items():
        rows = [
            f"openimage_o/n0{label}/{label}_{i}.jpg -1\n" for label in range(2) for i in numbers
        ]
        (lists / name).write_text("".join(rows))
    return root
