"""What a sweep will cost, from architectures and image counts alone: no weights, no images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pandas import DataFrame

from oodlib.errors import OodlibError
from oodlib.studies.vits.sweep.jobs import Job
from oodlib.studies.vits.sweep.models_and_images import FIT

GPU_TFLOPS = 12.0  # assumed, in float32 without tensor cores
CPU_TFLOPS = 0.03  # assumed, of one core
BATCH = 64
DECODED = 150  # JPEGs that one core decodes and resizes in a second, assumed


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one architecture.

    Attributes
    ----------
    flops : of one image, two per multiply-add
    width : of the features
    peak : bytes of a batch's largest activation
    """

    flops: float
    parameters: int
    width: int
    classes: int
    peak: int


@cache
def network_cost(network: str, resolution: int | None, head: str) -> Cost:
    """Cost of a network, counted on torch's meta device, where tensors have shapes but no values.

    OodlibError: neither a network of timm nor one trained here.
    """
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from oodlib.models.small_vit import NETWORKS, small_vit

    model: Any
    outputs: list[int] = []

    def count(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output.numel() if isinstance(output, torch.Tensor) else 0)

    with torch.device("meta"):
        if network in NETWORKS:
            model, side, classes = small_vit(network, 26), 32, 26
        else:
            try:
                model = timm.create_model(network)
            except Exception as error:  # timm raises several types
                raise OodlibError(
                    f"sweep: timm has no network {network!r} ({error}). Correct the pool's table."
                ) from error
            side, classes = model.pretrained_cfg["input_size"][-1], 1000
        model.eval().requires_grad_(False)
        for module in model.modules():
            module.register_forward_hook(count)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, resolution or side, resolution or side))
    # a head on unit features sits behind the projection, which is the network's own last layer
    projected = head == "unit" and network not in NETWORKS
    return Cost(
        flops=float(counter.get_total_flops()),
        parameters=sum(p.numel() for p in model.parameters()),
        width=int(model.num_classes if projected else model.head_hidden_size),
        classes=classes,
        peak=4 * BATCH * max(outputs),
    )


def estimate(jobs: Sequence[Job], *, tflops: float, cpus: int) -> DataFrame:
    """One row per network, in the pool's order; an image takes the longer of compute and decoding.

    Parameters
    ----------
    tflops : 10^12 operations a second that the device reaches in float32
    cpus : processes that decode images for one job

    Returns
    -------
    DataFrame: models, jobs, images, hours (of one device, over all jobs), gpu and host (bytes of
    memory of one job, at most), disk (bytes of all results)
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.row.network, []).append(job)
    rows = {name: _plan(part, tflops, cpus) for name, part in groups.items()}
    return DataFrame.from_dict(rows, orient="index")


def describe_plan(jobs: Sequence[Job], *, tflops: float | None = None, cpus: int = 1) -> str:
    """The plan as a table with its totals, and what it rests on."""
    files, unit = jobs[0].source.files, "GPU" if jobs[0].source.files else "CPU"
    tflops = tflops or (GPU_TFLOPS if files else CPU_TFLOPS)
    plan = estimate(jobs, tflops=tflops, cpus=cpus)
    plan.loc["total"] = [plan[c].max() if c in ("gpu", "host") else plan[c].sum() for c in plan]
    counts = {name: plan[name].map("{:,.0f}".format) for name in ("models", "jobs", "images")}
    counts[f"{unit} h"] = plan["hours"].map("{:,.1f}".format)
    sizes = {"GPU GB": plan["gpu"], "host GB": plan["host"], "disk GB": plan["disk"]}
    table = DataFrame(counts | {name: (v / 1e9).map("{:,.1f}".format) for name, v in sizes.items()})
    basis = " (one CPU core, assumed)"
    if files:
        basis = f", or {cpus} processes that decode {DECODED} images a second each (assumed)"
        basis += ", whichever takes longer"
    training = "" if files else " Training that a model still needs comes on top."
    return (
        f"{table.to_string()}\n\n"
        "Time: operations of the architecture in float32 (a multiply-add is two) at an assumed "
        f"{tflops:g} TFLOP/s{basis}; --tflops sets what your device reaches.{training}\n"
        f"Memory: of one job, batches of {BATCH}. Disk: moments and {jobs[0].source.per_class} "
        "features per class of the training images, float32 features of the others, score tables."
    )


def _plan(jobs: Sequence[Job], tflops: float, cpus: int) -> dict[str, float]:
    source = jobs[0].source
    counts = source.counts()
    images, seconds, disk, peak, fit = 0, 0.0, 0.0, 0.0, 0
    for job in jobs:
        cost, n = network_cost(job.row.network, job.row.resolution, job.row.head), counts[job.split]
        decoding = n / (DECODED * cpus) if source.files else 0.0
        images += n
        seconds += max(n * cost.flops / (tflops * 1e12), decoding)
        disk += _disk(job, cost, n)
        peak = max(peak, 4 * cost.parameters + 3 * cost.peak)
        fit = max(fit, _reference(cost, source.per_class))
    return {
        "models": len({job.row.name for job in jobs}),
        "jobs": len(jobs),
        "images": images,
        "hours": seconds / 3600,
        "gpu": peak,
        "host": 2e9 + (0.4e9 * cpus if source.files else 0) + 2 * fit,
        "disk": disk,
    }


def _reference(cost: Cost, per_class: int) -> int:
    """Bytes of a `Reference`: two sets of moments (float64), subsample and head (float32)."""
    moments = 2 * 8 * (2 * cost.width**2 + cost.classes * cost.width)
    return moments + 4 * cost.width * cost.classes * (per_class + 1)


def _disk(job: Job, cost: Cost, n: int) -> int:
    from oodlib.studies.vits.score_table import SCORES

    features = n * (4 * cost.width + 8) + 4 * cost.classes * cost.width
    if job.split == FIT:
        return _reference(cost, job.source.per_class) + (features if job.all_features else 0)
    return features + n * (4 * len(SCORES) + 12)  # and its rows of scores.parquet
