"""GROOD: closed-form gradients against per-sample autograd; search in a bank of 50,000 x 512
gradients.

Side by side in one run, on Gaussian clusters of 10 classes. Search: one query at a time against
batches, exact against approximate with its recall (share of queries whose nearest gradient was
found).

    OMP_NUM_THREADS=1 python benchmarks/grood_search.py [--bank 50000] [--queries 2000] [--single
    50]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodlib.scores import grood_gradient, grood_polar
from oodlib.scores.neighbours import PolarSearch

SIZE, CLASSES = 512, 10
INDEXES: dict[str, dict[str, Any]] = {
    "flat": {},
    "ivf, 1 probe": {"index": "ivf", "nprobe": 1},
    "ivf, 4 probes": {"index": "ivf", "nprobe": 4},
    "ivf, 16 probes": {"index": "ivf", "nprobe": 16},
    "ivf, 4 of 56 lists": {"index": "ivf", "nlist": 56},
    "hnsw": {"index": "hnsw"},
    "ivfpq, 4 probes": {"index": "ivfpq", "nprobe": 4},
}


def per_sample(features: Tensor, prototypes: Tensor, ood: Tensor, labels: Tensor) -> Tensor:
    """One forward and one backward pass per sample, as the released code does."""
    rows = []
    for h, y in zip(features, labels, strict=True):
        point = ood.clone().requires_grad_()
        s = -torch.cdist(h[None], torch.cat([prototypes, point[None]]))
        rows.append(torch.autograd.grad(torch.nn.functional.cross_entropy(s, y[None]), point)[0])
    return torch.stack(rows)


def timed(function: Callable[[], Any], repeats: int = 3) -> tuple[Any, float]:
    """The result and the best wall time in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=int, default=50_000, help="gradients in the bank")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument(
        "--single", type=int, default=50, help="queries that are searched one at a time"
    )
    parser.add_argument("--autograd", type=int, default=2000, help="samples of the per-sample loop")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    prototypes = rng.normal(size=(CLASSES, SIZE))
    ood = prototypes.mean(0)

    def features(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(0, CLASSES, n)
        return (prototypes[y] + 0.5 * rng.normal(size=(n, SIZE))).astype(np.float32), y

    x, y = features(options.autograd)
    single = tuple(torch.from_numpy(a).double() for a in (x, prototypes, ood))
    loop, loop_s = timed(lambda: per_sample(*single, torch.from_numpy(y)), 2)
    closed, closed_s = timed(lambda: grood_gradient(x, prototypes, ood))
    difference = float(np.abs(closed - loop.numpy()).max() / np.abs(closed).max())
    print(
        f"gradients of {options.autograd} samples, {SIZE} features, {CLASSES} classes: autograd "
        f"{loop_s:.3f} s, closed form {closed_s:.3f} s, {loop_s / closed_s:.0f}x; largest relative "
        f"difference {difference:.1e}\n"
    )

    bank, queries = (
        grood_polar(features(n)[0], prototypes, ood) for n in (options.bank, options.queries)
    )
    print(
        "| index | build s | ms per query, batched | one at a time | recall@1 "
        "|\n|---|---|---|---|---|"
    )
    rows, exact = {}, np.empty(0)
    for name, how in INDEXES.items():
        search, build_s = timed(
            lambda how=how: PolarSearch(bank[0], lambda rows: bank[1][rows], **how), 1
        )
        found, batched_s = timed(lambda search=search: search(*queries), 2)
        _, single_s = timed(
            lambda search=search: [
                search(queries[0][i : i + 1], queries[1][i : i + 1]) for i in range(options.single)
            ],
            2,
        )
        exact = found if name == "flat" else exact
        rows[name] = {
            "build_s": build_s,
            "batched_ms": 1e3 * batched_s / options.queries,
            "single_ms": 1e3 * single_s / options.single,
            "recall": float(np.mean(found <= exact + 1e-9)),
        }
        print(
            f"| {name} | {build_s:.1f} | {rows[name]['batched_ms']:.3f} | "
            f"{rows[name]['single_ms']:.2f} | {rows[name]['recall']:.3f} |"
        )
    print(
        "\n"
        + json.dumps(
            {
                "bank": options.bank,
                "queries": options.queries,
                "autograd_s": loop_s,
                "closed_s": closed_s,
                "ratio": loop_s / closed_s,
                "difference": difference,
                "samples": options.autograd,
                "index": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
