"""Models of an ImageNet-scale pool from a sweep: finished results, and missing ones made now."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from oodlib.errors import OodlibError
from oodlib.files import read_sealed
from oodlib.models.device import pick_device
from oodlib.studies.vits.pool_table import PoolRow, find_pool, read_pool
from oodlib.studies.vits.reference import Reference
from oodlib.studies.vits.score_table import geometry
from oodlib.studies.vits.stored import Models, Scored
from oodlib.studies.vits.sweep.jobs import make_jobs, prepare, run_job, state
from oodlib.studies.vits.sweep.models_and_images import FIT, ImagenetSource
from oodlib.studies.vits.sweep.tables import collect, read_record
from oodlib.workspace import root


def swept_models(
    networks: Sequence[str],
    *,
    data_root: str,
    output: str = "",
    weights: str = "",
    device: str = "auto",
) -> Models:
    """Scores of ImageNet models, in the form of `oodlib.studies.vits.stored.pool_models`.

    Parameters
    ----------
    networks : one pool (a name of ``data/pools`` or a table), or timm models by name and tag
    data_root : folder laid out as ``python -m oodlib data --profile paper`` prints; "" where the
        sweep is complete
    output : of a sweep, for example one that ran on a cluster; default ``data/sweeps/<pool>``.
        What is done there counts, whether or not its images and weights are available here too.
        Other jobs are done now, one after the other; unavailable splits are skipped
    weights : folder that the ``weights`` of a pool lie below

    Raises
    ------
    OodlibError : a pool's table is missing or damaged; no model has its scores: no data root, no
        images, no weights
    """
    rows, name = _rows(networks)
    folder = Path(output) if output else root() / "data" / "sweeps" / name
    source = ImagenetSource(
        Path(data_root) if data_root else None,
        Path(weights) if weights else None,
        min(16, os.cpu_count() or 1),
    )

    # do what is missing; asked without inputs, which may be elsewhere
    jobs = make_jobs(rows, source, folder, device=str(pick_device(device)))
    todo = [job for job in jobs if state(job)[0] != "done"]
    reason = ""
    if todo and data_root:
        try:
            for job in prepare(todo)[0]:
                run_job(job)
        except OodlibError as error:  # the images of none of these splits are available
            reason = str(error)
    elif not data_root:
        reason = (
            "Give data_root, the folder of the ImageNet-scale sets; `python -m oodlib data "
            "--profile paper` says what must be in it."
        )

    # read the tables
    collect(folder, [row.name for row in rows], source.splits())
    models, missing = [], {}
    for row in rows:
        model = _read(row, folder / row.name, source.splits())
        if isinstance(model, str):
            missing[row.name] = model
        else:
            models.append(model)
    if not models:
        raise OodlibError(
            f"swept_models: no model could be scored. {reason or next(iter(missing.values()))}"
        )
    return Models(models, missing)


def _read(row: PoolRow, folder: Path, splits: Sequence[str]) -> Scored | str:
    """A model's scores, or the reason why it has none."""
    records = {name: read_record(folder / f"{name}.json") for name in (*splits, "scores")}
    for name in (FIT, "id", "scores"):
        if records[name]["state"] != "done":
            return str(records[name].get("error", f"{name} is not done"))
    scores, again = folder / "scores.parquet", "Delete it and its record and run the sweep again."
    read_sealed(scores, "swept_models", again)
    done = {split: records[split] for split in splits if records[split]["state"] == "done"}
    record = {
        "accuracy": done["id"]["accuracy"],
        "geometry": geometry(Reference.load(folder / f"{FIT}.safetensors")),
        "sets": {split: {"fingerprint": found["inputs"][1]} for split, found in done.items()},
        "sha256": done["id"]["weights"],
    }
    return Scored(row, record, pd.read_parquet(scores))


def _rows(networks: Sequence[str]) -> tuple[list[PoolRow], str]:
    """Rows of a named pool, or of named models: with their factors where a pool knows them."""
    if len(networks) == 1:
        table = None
        with contextlib.suppress(OodlibError):  # no such table: the name of a timm model
            table = find_pool(networks[0])
        if table or networks[0].endswith(".csv"):
            return list(read_pool(networks[0])), Path(networks[0]).stem
    known = {row.network: row for row in read_pool("imagenet_timm")}
    return [known.get(name, PoolRow(name=name, network=name)) for name in networks], "timm_models"
