"""One pass and every detector, against the bare forward pass over the same batches.

10,000 images of 32 pixels through ResNet-20 (random weights and pixels: speed does not depend on
them), once with nothing but the forward pass, once with `extract` and then the scores of all
detectors. Detectors that learn are fitted beforehand on a bank of 10,000 other images. The two take
turns, so that other work on the machine meets both alike.

    python benchmarks/one_pass.py [--n 10000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oodlib import create, extract, names
from oodlib.data import ImageSet
from oodlib.features import batches
from oodlib.models.cifar_nets import ResNetA

STATISTICS: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BATCH = 250
Seconds = NDArray[np.float64]


def now() -> Seconds:
    """Wall time and CPU time of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def noise(n: int, seed: int) -> ImageSet:
    """Smooth random images: features differ from image to image, as they do for real ones."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)
    return ImageSet(
        "noise", str(seed), coarse.repeat(4, axis=2).repeat(4, axis=3), np.arange(n) % 10
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10_000, help="images to score, and to fit on")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    options = parser.parse_args()
    model = ResNetA(3).eval()
    images, training = noise(options.n, 0), noise(options.n, 1)
    fit = extract(model, training, **STATISTICS, batch_size=BATCH, device="cpu", progress=False)
    detectors = {name: create(name).fit(fit) for name in names()}

    def bare() -> dict[str, Seconds]:
        start = now()
        with torch.inference_mode():
            for x, _ in batches(images, batch_size=BATCH, **STATISTICS):
                model(x.contiguous(memory_format=torch.channels_last))
        return {"forward": now() - start}

    def everything() -> dict[str, Seconds]:
        start = now()
        bank = extract(model, images, **STATISTICS, batch_size=BATCH, device="cpu", progress=False)
        seconds = {"extract": now() - start}
        for name, detector in detectors.items():
            start = now()
            detector.score(bank)
            seconds[name] = now() - start
        return seconds

    runs = [(bare(), everything()) for _ in range(options.repeats)]
    bare_s = np.array([sum(one.values()) for one, _ in runs])  # (repeats, 2): wall, CPU
    total_s = np.array([sum(whole.values()) for _, whole in runs])
    report: dict[str, Any] = {
        "n": options.n,
        "repeats": options.repeats,
        "torch": torch.__version__,
    }
    for i, prefix in enumerate(("", "cpu_")):
        report |= {
            f"{prefix}bare_s": {"min": bare_s[:, i].min(), "median": np.median(bare_s[:, i])},
            f"{prefix}total_s": {"min": total_s[:, i].min(), "median": np.median(total_s[:, i])},
            f"{prefix}ratio_of_minima": total_s[:, i].min() / bare_s[:, i].min(),
            f"{prefix}ratio_of_medians": np.median(total_s[:, i]) / np.median(bare_s[:, i]),
            f"{prefix}parts_min_s": {
                name: min(whole[name][i] for _, whole in runs) for name in runs[0][1]
            },
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
