"""The suite's flows along their training: weights and scores of every image, stored or made now.

A flow's folder holds weights (``step_*.safetensors``), scores of every image (``scores_*.parquet``)
and ``run.json``, which says how they were made. Shipped folders, in ``data/checkpoints``, keep
half-precision weights at some steps only.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError
from oodlib.files import (
    atomic_folder,
    atomic_path,
    read_json,
    read_sealed,
    sha256,
    write_json,
    write_sealed,
)
from oodlib.models.device import pick_device
from oodlib.models.glow import Glow
from oodlib.models.shipped import cached_build, to_half, to_single
from oodlib.models.training.flow import kept_step, snapshot_path, train_flow
from oodlib.studies.flows.score_images import VARIANTS, score_flow
from oodlib.studies.flows.specs import FlowSpec, flow_sets, flow_spec
from oodlib.workspace import code_hash, root

_AGAIN = "Restore it, or delete its folder and train again: python -m oodlib train"


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowRun:
    """A flow along its training: scores of every image at each saved step, weights at some.

    Attributes
    ----------
    name, spec, seed : as asked for, "fashion_glow:0"; what it is
    record : ``run.json``: history (per saved step: step, epoch, train_bpd, validation_bpd,
        seconds), sets with sizes and fingerprints, versions
    scores : the table of `score_flow` with a column ``step``
    folder : of the weights
    """

    name: str
    spec: FlowSpec
    seed: int
    record: dict[str, Any]
    scores: pd.DataFrame
    folder: Path

    @property
    def history(self) -> pd.DataFrame:
        """One row per saved step, rising."""
        return pd.DataFrame(self.record["history"])

    @property
    def weights(self) -> list[int]:
        """Steps whose weights are here, rising."""
        stems = [path.stem for path in self.folder.glob("step_*.safetensors")]
        return sorted(int(stem.removeprefix("step_")) for stem in stems)

    def model(self, step: int) -> Glow:
        """The flow after ``step`` steps, in evaluation mode; errors as `load_weights`."""
        return load_weights(self.spec, snapshot_path(self.folder, step))


def run_flow(
    spec: FlowSpec,
    seed: int,
    folder: Path,
    *,
    n_fit: int | None = None,
    n_test: int | None = None,
    n_ood: int | None = None,
    device: str = "auto",
    progress: bool = True,
) -> None:
    """Train a flow and score every saved step, into ``folder``; resumes where it was interrupted.

    The variants of the density, which cost a second pass, are computed after one epoch and at the
    last step, and for full-size flows after ten epochs, for which the authors released values too.

    n_fit, n_test, n_ood : images of "fit", "id" and each OOD set; default ``spec.n``

    Raises
    ------
    OodlibError : as `train_flow`, `flow_sets` and `score_flow`; a damaged file, by name
    """
    # train
    where, recipe = pick_device(device), spec.recipe
    images, validation = spec.training_images()
    options: dict[str, Any] = {"seed": seed, "device": where, "progress": progress}
    network = spec.network(seed)
    history = train_flow(network, images, validation, recipe, folder=folder, **options)

    # score what is not scored yet
    sets = flow_sets(spec, n_fit=n_fit or spec.n, n_test=n_test or spec.n, n_ood=n_ood or spec.n)
    with_variants = {kept_step(history, 1), history[-1]["step"]}
    if spec.full_size:
        with_variants.add(kept_step(history, 10, nearest=True))
    for step in recipe.snapshots:
        path, variants = _scores_path(folder, step), step in with_variants
        if not _scored(path, sets, variants=variants):
            model = load_weights(spec, snapshot_path(folder, step)).to(where)
            table = score_flow(model, sets, variants=variants, progress=progress)
            with atomic_path(path) as temporary:
                table.assign(step=step).to_parquet(temporary, index=False, compression="zstd")

    # record
    record = {
        "flow": spec.name,
        "seed": seed,
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "code": code_hash(__name__),
        "network": {k: getattr(spec, k) for k in ("image_shape", "steps", "levels", "hidden")},
        "history": [{k: None if v != v else v for k, v in row.items()} for row in history],
        "sets": {name: {"n": len(s), "fingerprint": s.fingerprint} for name, s in sets.items()},
        "weights": sha256(snapshot_path(folder, recipe.snapshots[-1])),
        "train_fingerprint": hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        "n_train": len(images),
        "device": where.type,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "command": f"python -m oodlib train {spec.name} --seed {seed}",
    }
    write_json(folder / "run.json", record)


def flow_run(
    name: str,
    *,
    n_fit: int | None = None,
    n_test: int | None = None,
    n_ood: int | None = None,
    device: str = "auto",
) -> FlowRun:
    """A flow by name: "fashion_glow:0" (shipped, or trained here), "latin_glow:live" (trained now).

    A live flow is trained by one thread on a CPU, so that every machine gets the same weights, and
    cached; ``n_fit``, ``n_test`` and ``n_ood`` are for live flows alone.

    Raises
    ------
    OodlibError : unknown name; a seed that is neither shipped nor trained here; a missing or
        damaged file, by name
    """
    flow, _, which = name.partition(":")
    spec, data = flow_spec(flow), root() / "data"
    if which == "live":
        folder = _live(spec, n_fit or spec.n, n_test or spec.n, n_ood or spec.n, device)
    elif which.isdigit():
        places = [data / kind / f"{flow}_s{which}" for kind in ("checkpoints", "training")]
        found = [place for place in places if (place / "run.json").exists()]
        if not found:
            raise OodlibError(
                f"flow_run: {name} is neither shipped nor trained here. Train and score it "
                f"(resumable): python -m oodlib train {flow} --seed {which}"
            )
        folder = found[0]
    else:
        raise OodlibError(
            f"flow_run: {name!r} needs a seed or live behind the colon: {flow}:0 or {flow}:live."
        )
    record = read_json(folder / "run.json", "flow_run", f"{_AGAIN} {flow}")
    if not {"seed", "history", "sets", "weights"} <= set(record):
        raise OodlibError(f"flow_run: {folder / 'run.json'} is incomplete. {_AGAIN} {flow}")
    tables = [_table(_scores_path(folder, row["step"])) for row in record["history"]]
    scores, seed = pd.concat(tables, ignore_index=True), int(record["seed"])
    return FlowRun(name=name, spec=spec, seed=seed, record=record, scores=scores, folder=folder)


def train_and_ship(name: str, *, seed: int = 0, device: str = "auto") -> Path:
    """Train and score a flow in ``data/training`` (resumable) and ship what is shipped of it.

    Returns the folder of the results.
    """
    spec = flow_spec(name)
    folder = root() / "data" / "training" / f"{name}_s{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    run_flow(spec, seed, folder, device=device)
    if spec.full_size:
        return folder
    target = root() / "data" / "checkpoints" / folder.name
    with atomic_folder(target) as temporary:
        shutil.copy(folder / "run.json", temporary)
        for step in spec.recipe.snapshots:
            table = _table(_scores_path(folder, step))
            floats = [*table.select_dtypes("float32")]  # bytes of floats side by side pack better
            packing: dict[str, Any] = {"compression": "zstd", "compression_level": 19}
            packing |= {"use_dictionary": ["set"], "use_byte_stream_split": floats}
            table.to_parquet(_scores_path(temporary, step), index=False, **packing)
        for step in spec.shipped if seed == 0 else ():
            state = to_half(load_weights(spec, snapshot_path(folder, step)))
            path, record = snapshot_path(temporary, step), {"step": step, "dtype": "float16"}
            write_sealed(path, partial(save_file, state), record)
    return target


def load_weights(spec: FlowSpec, path: Path) -> Glow:
    """A flow at one saved step, in evaluation mode. OodlibError: missing or damaged."""
    present = ", ".join(p.stem for p in sorted(path.parent.glob("step_*.safetensors"))) or "none"
    read_sealed(path, "load_weights", f"Present: {present}. {_AGAIN} {spec.name}")
    model = spec.network()
    model.load_state_dict(to_single(load_file(path)))
    return model.eval()


def _scores_path(folder: Path, step: int) -> Path:
    return folder / f"scores_{step:07d}.parquet"


def _table(path: Path) -> pd.DataFrame:
    """A table of scores, or an OodlibError that names the file."""
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # those of pyarrow are one or the other
        reason = str(error).partition("\n")[0]
        raise OodlibError(
            f"{path} is missing or damaged ({reason}). Restore it, or delete it: then "
            "python -m oodlib train NAME scores that step again."
        ) from error


def _scored(path: Path, sets: dict[str, ImageSet], *, variants: bool) -> bool:
    """Whether a table holds what is wanted: sets, their sizes or the variants may have changed."""
    if not path.exists():
        return False
    table = _table(path)
    counts = table[table.group_size == 1]["set"].value_counts().to_dict()
    wanted = {name: len(images) for name, images in sets.items() if name != "fit"}
    return counts == wanted and (not variants or set(VARIANTS) <= set(table))


def _live(spec: FlowSpec, n_fit: int, n_test: int, n_ood: int, device: str) -> Path:
    """Folder of a flow trained and scored now, or earlier by the same code, recipe and counts."""
    pixels = spec.training_images()[0].sum().item()
    made_of = [repr(spec), n_fit, n_test, n_ood, pixels, code_hash(__name__)]
    sizes: dict[str, Any] = {"n_fit": n_fit, "n_test": n_test, "n_ood": n_ood}
    return cached_build(
        made_of, "run.json", lambda folder: run_flow(spec, 0, folder, device=device, **sizes)
    )
