"""Squared gradient norms of every tensor of a Glow, per image: ours, a loop of backward passes,
vmap(grad).

Two models, all ways in turns in one run, medians of the milliseconds per image. A batched backward
pass, which yields the gradient of the sum only, is timed beside them: about what ours should cost.

    OMP_NUM_THREADS=2 python benchmarks/layer_gradients.py [--images 128] [--loop 8] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from oodlib.gradients import layer_gradient_norms
from oodlib.models import Glow, dequantise

MODELS: dict[str, dict[str, Any]] = {
    "K=8, h=128, 3x32x32": {"image_shape": (3, 32, 32), "steps": 8, "levels": 3, "hidden": 128},
    "K=4, h=32, 1x28x28": {"image_shape": (1, 28, 28), "steps": 4, "levels": 2, "hidden": 32},
}
CHUNK = 8  # images of one vmap: all their gradients are held at once


class LogProb(nn.Module):
    """log p as a forward pass, which `functional_call` asks for."""

    def __init__(self, glow: Glow):
        super().__init__()
        self.glow = glow

    def forward(self, x: Tensor) -> Tensor:
        return self.glow.log_prob(x).sum()


def one_by_one(glow: Glow, x: Tensor) -> Tensor:
    rows = []
    for image in x.split(1):
        glow.zero_grad()
        glow.log_prob(image).sum().backward()
        rows.append(torch.stack([p.grad.square().sum() for p in glow.parameters()]))  # type: ignore[union-attr]
    return torch.stack(rows).double()


def by_vmap(glow: Glow, x: Tensor) -> Tensor:
    model = LogProb(glow)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def norms(image: Tensor) -> Tensor:
        gradients = grad(lambda weights: functional_call(model, weights, (image[None],)))(weights)
        return torch.stack([g.square().sum() for g in gradients.values()])

    return vmap(norms, chunk_size=CHUNK)(x).double()


def compare(config: dict[str, Any], images: int, few: int, repeats: int) -> dict[str, Any]:
    """Milliseconds per image of every way, ratios, and the largest differences to the loop."""
    g = torch.Generator().manual_seed(0)
    glow = Glow(**config, generator=g)
    x = dequantise(
        torch.randint(
            256, (max(images, 256), *config["image_shape"]), dtype=torch.uint8, generator=g
        ),
        generator=g,
    )
    glow.initialise(x)
    with torch.no_grad():  # away from the start, where half the gradients are zero
        for p in glow.parameters():
            p += 0.02 * torch.randn(p.shape, generator=g)
    ways: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
        "ours": (images, lambda x: layer_gradient_norms(glow, x)),
        "loop": (few, lambda x: one_by_one(glow, x)),
        "vmap": (2 * CHUNK, lambda x: by_vmap(glow, x)),
        "batched backward": (
            64,
            lambda x: torch.autograd.grad(glow.log_prob(x).sum(), list(glow.parameters())),
        ),
    }
    for n, way in ways.values():
        way(x[:n])
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (n, way) in ways.items():
            start = time.perf_counter()
            way(x[:n])
            times[name].append((time.perf_counter() - start) / n * 1000)
    median = {name: statistics.median(values) for name, values in times.items()}
    found, truth = layer_gradient_norms(glow, x[:few]), one_by_one(glow, x[:few])
    used = truth > 0
    error = ((found - truth).abs() / truth)[used]
    return {
        "tensors": len(list(glow.parameters())),
        "parameters": sum(p.numel() for p in glow.parameters()),
        "images": images,
        "ms_per_image": median,
        "ms_all": times,
        "ratio": {name: median[name] / median["ours"] for name in ways if name != "ours"},
        "relative_error": {"median": float(error.median()), "largest": float(error.max())},
        "zeros_agree": bool((found[~used] == 0).all()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=128, help="of one call of ours")
    parser.add_argument("--loop", type=int, default=8, help="images of the loop")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(
        f"Squared gradient norm of every tensor, d log p of one image, {threads} thread(s), "
        f"medians of {options.repeats} turns\n"
    )
    print("| model | tensors | way | ms per image | times ours |\n|---|---|---|---|---|")
    report: dict[str, Any] = {
        "threads": threads,
        "torch": torch.__version__,
        "repeats": options.repeats,
        "models": {},
    }
    for name, config in MODELS.items():
        r = report["models"][name] = compare(config, options.images, options.loop, options.repeats)
        for way, ms in r["ms_per_image"].items():
            print(
                f"| {name} | {r['tensors']} | {way} | {ms:.2f} | "
                f"{ms / r['ms_per_image']['ours']:.2f} |"
            )
    print("\n" + json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
