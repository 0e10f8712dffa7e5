"""``train-vit`` and ``sweep``: train and score a pool of small ViTs; score all models of a pool."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from oodlib.workspace import root


def train_options(command: argparse.ArgumentParser) -> None:
    """Arguments of ``train-vit``."""
    add, cores = command.add_argument, os.cpu_count() or 1
    add("--pool", help="embedded, cifar, or a table of such rows")
    add("--models", default="*", help="only rows whose name matches this pattern")
    add("--jobs", type=int, default=cores, help="processes of one thread each")
    packed = "train nothing; pack what is finished into data/checkpoints"
    add("--ship", action="store_true", help=packed)


def sweep_options(command: argparse.ArgumentParser) -> None:
    """Arguments of ``sweep``."""
    add = command.add_argument
    flag: dict[str, Any] = {"action": "store_true"}
    add("--pool", required=True, help="a file, or the name of one in data/pools")
    add("--dry-run", **flag, help="print what it would cost, and stop")
    add("--status", **flag, help="print what is done, running, failed and missing")
    add("--output", type=Path, help="folder of results; default data/sweeps/<pool>")
    add("--models", default="*", metavar="GLOB", help="only the rows with such names")
    add("--where", default="local", choices=("local", "slurm", "submitit-local"))
    add("--jobs", type=int, metavar="N", help="jobs at a time; default 1, on SLURM 64")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help="only the I-th of N parts")
    cores = "cores (and image decoders) of a job; default 8 for ImageNet, else 1"
    add("--cpus", type=int, metavar="N", help=cores)
    add("--gpus", type=int, metavar="N", help="of a SLURM job; default 1 for ImageNet, else none")
    add("--timeout", type=int, default=1440, metavar="MIN", help="longest time of a job")
    add("--partition", default="", help="of SLURM")
    other = "any other option of sbatch, for example account=vision"
    add("--slurm", type=_pair, action="append", metavar="KEY=VALUE", help=other)
    sets = "of the ImageNet sets, as `data --profile paper` lists them"
    add("--data-root", type=Path, metavar="DIR", help=sets)
    add("--weights", type=Path, metavar="DIR", help="folder of the weight files")
    add("--all-features", **flag, help="keep the features of every training image too")
    add("--tflops", type=float, help="for --dry-run: what the device reaches in float32")
    sizes = "n_fit, n_test or n_ood of the pools trained here"
    pair: Any = ("NAME", "VALUE")
    add("-p", dest="parameter", nargs=2, action="append", metavar=pair, help=sizes)


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shard: I/N with 1 <= I <= N, for example 2/8"
        )
    return int(part), int(parts)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key.replace("-", "_"), value


def train_vit(given: argparse.Namespace) -> int:
    """Train and score the missing rows of a pool; with ``--ship``, pack what is finished."""
    pool = given.pool or {"benchmark": "cifar", "paper": "imagenet"}.get(given.profile, "embedded")
    if given.ship:
        from oodlib.studies.vits.stored import ship

        print(ship(pool))
        return 0
    from oodlib.studies.vits.sweep.train_pool import train_pool

    jobs, device = max(1, given.jobs), given.device or "cpu"
    done = train_pool(pool, models=given.models, jobs=jobs, device=device)
    print(f"{len(done)} models of the pool {pool} are trained and scored.")
    return 0


def sweep(given: argparse.Namespace) -> int:
    """Score every model of a pool on every image set, or print the cost or the status of that."""
    from oodlib.studies.vits.pool_table import find_pool
    from oodlib.studies.vits.sweep.jobs import chosen, describe, make_jobs
    from oodlib.studies.vits.sweep.models_and_images import find_source

    pool = find_pool(given.pool).resolve()
    output = (given.output or root() / "data" / "sweeps" / pool.stem).resolve()
    source = find_source(
        pool,
        data=given.data_root,
        weights=given.weights,
        workers=given.cpus or 8,
        sizes=dict(given.parameter or []),
    )
    cpus = given.cpus or (8 if source.files else 1)
    options = {"all_features": given.all_features, "device": given.device or "auto"}
    jobs = make_jobs(chosen(pool, given.models), source, output, **options)
    if given.dry_run:
        from oodlib.studies.vits.sweep.cost import describe_plan

        print(describe_plan(jobs, tflops=given.tflops, cpus=cpus))
        return 0
    if given.status:
        print(describe(jobs))
        return 0
    from oodlib.studies.vits.sweep.launch import Resources, run_sweep

    resources = Resources(
        at_once=given.jobs or (64 if given.where == "slurm" else 1),
        timeout=given.timeout,
        cpus=cpus,
        gpus=int(source.files) if given.gpus is None else given.gpus,
        partition=given.partition,
        slurm=dict(given.slurm or []),
    )
    return run_sweep(jobs, output, given.where, resources, shard=given.shard)
