"""``train-vit`` and ``sweep``: train and score a pool of small ViTs, or score every model of a
pool.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from oodlib.workspace import root

__all__ = ["sweep", "sweep_options", "train_options", "train_vit"]


def train_options(command: argparse.ArgumentParser) -> None:
    """Arguments of ``train-vit``."""
    command.add_argument("--pool", help="embedded, cifar, or a table of such rows")
    command.add_argument("--models", default="*", help="only rows whose name matches this pattern")
    command.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes of one thread each"
    )
    command.add_argument(
        "--ship",
        action="store_true",
        help="train nothing; pack what is finished into data/checkpoints",
    )


def sweep_options(command: argparse.ArgumentParser) -> None:
    """Arguments of ``sweep``."""
    command.add_argument("--pool", required=True, help="a file, or the name of one in data/pools")
    command.add_argument(
        "--dry-run", action="store_true", help="print what it would cost, and stop"
    )
    command.add_argument(
        "--status", action="store_true", help="print what is done, running, failed and missing"
    )
    command.add_argument(
        "--output", type=Path, help="folder of results; default data/sweeps/<pool>"
    )
    command.add_argument(
        "--models", default="*", metavar="GLOB", help="only the rows with such names"
    )
    command.add_argument("--where", default="local", choices=("local", "slurm", "submitit-local"))
    command.add_argument(
        "--jobs", type=int, metavar="N", help="jobs at a time; default 1, on SLURM 64"
    )
    command.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="only the I-th of N parts"
    )
    command.add_argument(
        "--cpus",
        type=int,
        metavar="N",
        help="cores (and image decoders) of a job; default 8 for ImageNet, else 1",
    )
    command.add_argument(
        "--gpus", type=int, metavar="N", help="of a SLURM job; default 1 for ImageNet, else none"
    )
    command.add_argument(
        "--timeout",
        type=int,
        default=1440,
        metavar="MIN",
        help="longest time of a job; default 1440",
    )
    command.add_argument("--partition", default="", help="of SLURM")
    command.add_argument(
        "--slurm",
        type=_pair,
        action="append",
        metavar="KEY=VALUE",
        help="any other option of sbatch, for example account=vision",
    )
    command.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="of the ImageNet sets, as `data --profile paper` lists them",
    )
    command.add_argument("--weights", type=Path, metavar="DIR", help="folder of the weight files")
    command.add_argument(
        "--all-features", action="store_true", help="keep the features of every training image too"
    )
    command.add_argument(
        "--tflops", type=float, help="for --dry-run: what the device reaches in float32"
    )
    command.add_argument(
        "-p",
        dest="parameter",
        nargs=2,
        action="append",
        metavar=("NAME", "VALUE"),
        help="n_fit, n_test or n_ood of the pools trained here",
    )


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shard: I/N with 1 <= I <= N, for example 2/8"
        )
    return int(part), int(parts)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key.replace("-", "_"), value


def train_vit(given: argparse.Namespace) -> int:
    """Train and score the rows of a pool that are missing; with ``--ship``, pack what is finished."""
    pool = given.pool or {"benchmark": "cifar", "paper": "imagenet"}.get(given.profile, "embedded")
    if given.ship:
        from oodlib.studies.vits.stored import ship

        print(ship(pool))
        return 0
    from oodlib.studies.vits.sweep.train_pool import train_pool

    done = train_pool(
        pool, models=given.models, jobs=max(1, given.jobs), device=given.device or "cpu"
    )
    print(f"{len(done)} models of the pool {pool} are trained and scored.")
    return 0


def sweep(given: argparse.Namespace) -> int:
    """Score every model of a pool on every image set, or say what that would cost or where it
    stands.
    """
    from oodlib.studies.vits.pool_table import find_pool
    from oodlib.studies.vits.sweep.jobs import chosen, describe, make_jobs
    from oodlib.studies.vits.sweep.models_and_images import find_source

    pool = find_pool(given.pool).resolve()
    output = (given.output or root() / "data" / "sweeps" / pool.stem).resolve()
    source = find_source(
        pool,
        output,
        data=given.data_root,
        weights=given.weights,
        workers=given.cpus or 8,
        sizes=dict(given.parameter or []),
    )
    cpus = given.cpus or (8 if source.files else 1)
    jobs = make_jobs(
        chosen(pool, given.models),
        source,
        output,
        all_features=given.all_features,
        device=given.device or "auto",
    )
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
