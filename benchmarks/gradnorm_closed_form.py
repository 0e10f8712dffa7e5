"""GradNorm of 10,000 x 2048 features and 1000 classes: closed form, the official per-sample loop,
pytorch-ood's vmap.

Head only, side by side in one run. The two slow ones are timed on a sub-sample and scaled to all
rows.

    OMP_NUM_THREADS=1 python benchmarks/gradnorm_closed_form.py [--n 10000] [--loop 100] [--vmap 64]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pytorch_ood.detector import GradNorm
from torch import Tensor, nn

from oodlib.scores import gradnorm


def official_loop(head: nn.Linear, features: Tensor) -> Tensor:
    """One forward and one backward pass per sample, reading the weight's gradient, as the released
    code does.
    """
    scores = []
    for h in features:
        head.zero_grad()
        logits = head(h[None])
        torch.sum(-torch.ones_like(logits) * logits.log_softmax(1), 1).mean().backward()
        scores.append(head.weight.grad.abs().sum() / len(head.weight))
    return -torch.stack(scores)


def timed(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
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
    parser.add_argument("--n", type=int, default=10_000, help="rows of the bank")
    parser.add_argument("--loop", type=int, default=100, help="rows timed in the per-sample loop")
    parser.add_argument(
        "--vmap", type=int, default=64, help="rows timed in pytorch-ood, in its micro-batches of 32"
    )
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    features = torch.rand(options.n, 2048, generator=generator)
    head = nn.Linear(2048, 1000)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=generator)
        head.bias.zero_()
        logits = head(features)
    theirs = GradNorm(head, param_filter=lambda name: name == "weight")

    loop, loop_s = timed(lambda: official_loop(head, features[: options.loop]), 2)
    vmap, vmap_s = timed(lambda: theirs.predict(features[: options.vmap]), 2)
    closed, closed_s = timed(lambda: gradnorm(features.numpy(), logits.numpy()), 3)
    rows = {
        "closed form": (options.n, closed_s),
        "official loop": (options.loop, loop_s),
        "pytorch-ood vmap": (options.vmap, vmap_s),
    }

    print(
        f"GradNorm, {options.n} x 2048 features, 1000 classes, {torch.get_num_threads()} "
        "thread(s), head only\n"
    )
    print(
        "| way | rows timed | seconds | seconds for all rows | times the closed form "
        "|\n|---|---|---|---|---|"
    )
    report: dict[str, Any] = {
        "n": options.n,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for name, (count, seconds) in rows.items():
        scaled = seconds * options.n / count
        print(f"| {name} | {count} | {seconds:.3f} | {scaled:.2f} | {scaled / closed_s:.1f} |")
        report[name] = {
            "rows_timed": count,
            "seconds": seconds,
            "seconds_all": scaled,
            "ratio": scaled / closed_s,
        }
    report["largest_relative_difference"] = {
        "official loop": float(np.abs(closed[: options.loop] / loop.detach().numpy() - 1).max()),
        "pytorch-ood vmap": float(np.abs(closed[: options.vmap] / vmap.numpy() - 1).max()),
    }
    print("\n" + json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
