"""OPNP's ratios on 10,000 x 2048 features and 1000 classes: a 10 x 10 grid in one pass, against
pair by pair.

Energy and ID accuracy of every pair. Pair by pair is timed on two pairs and scaled: each prunes the
head again and computes all logits in float64, as the detector does; the sensitivities are given to
both.

    OMP_NUM_THREADS=1 python benchmarks/opnp_sweep.py [--n 10000]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from oodlib import FeatureBank
from oodlib.scores import energy, opnp, opnp_sensitivity
from oodlib.scores.opnp_ratios import sweep

LOW = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.79)
HIGH = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10_000, help="rows of the bank")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    features = rng.random((options.n, 2048), dtype=np.float32)
    weight = 0.1 * rng.standard_normal((1000, 2048), dtype=np.float32)
    bank = FeatureBank.from_arrays(features, weight=weight, labels=np.arange(options.n) % 1000)

    start = time.perf_counter()
    m = opnp_sensitivity(bank.features, bank.logits)
    sensitivity_s = time.perf_counter() - start
    start = time.perf_counter()
    found = sweep({"id": bank}, m, low=LOW, high=HIGH)
    seconds = time.perf_counter() - start

    pairs, worst, start = [(3, 4), (8, 9)], 0.0, time.perf_counter()
    for i, j in pairs:
        head = bank.head.masked(
            opnp(bank.head.weight, m, weight_low=LOW[i], weight_high=HIGH[j]) != 0
        )
        alone = energy(head(bank.features))
        worst = max(worst, float(np.abs(found.scores["id"][i, j] / alone - 1).max()))
    each_s = (time.perf_counter() - start) / len(pairs)

    points = len(LOW) * len(HIGH)
    print(
        f"OPNP sweep, {options.n} x 2048 features, 1000 classes, {points} pairs, "
        f"{torch.get_num_threads()} thread(s)"
    )
    print(
        "\n"
        + json.dumps(
            {
                "n": options.n,
                "points": points,
                "seconds": seconds,
                "seconds_sensitivity": sensitivity_s,
                "seconds_pair_by_pair": each_s * points,
                "ratio": each_s * points / seconds,
                "largest_relative_difference": worst,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
