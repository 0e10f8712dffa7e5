"""The small pools, trained here: pretrained checkpoints, finetuned models, soups, and their scores.

Everything lies in ``data/training/vits_<pool>``: ``pretrained/<checkpoint>.safetensors`` and a
folder per row with ``model.safetensors``, ``scores.parquet`` and ``run.json``, which is written
last. Results of the same recipe are reused, whatever the code. The pretrained checkpoints of the
embedded pool are shipped in ``data/checkpoints``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError
from oodlib.features.extract import extract
from oodlib.features.feature_bank import FeatureBank
from oodlib.files import atomic_folder, read_json, read_sealed, write_sealed
from oodlib.models.device import pick_device
from oodlib.models.shipped import Trained, cached_build, to_half, to_single
from oodlib.models.small_vit import small_vit
from oodlib.models.training.augment import hash_seed
from oodlib.models.training.classifier import evaluate
from oodlib.models.training.vit import decay_integral, fit_vit
from oodlib.scores import gradnorm, gradnorm_factors
from oodlib.studies.vits.image_sets import TASKS, training_images
from oodlib.studies.vits.pool_table import PoolRow
from oodlib.studies.vits.recipes import (
    BUDGETS,
    finetune_recipe,
    made_folder,
    pool_of,
    pretrain_recipe,
    pretrained_path,
    train_command,
    trained_folder,
)
from oodlib.studies.vits.reference import reference
from oodlib.studies.vits.score_table import geometry, norm_correlation, score_table
from oodlib.studies.vits.scored_sets import scored_sets, write_seen
from oodlib.studies.vits.soups import fill_greedily, fill_with_mean
from oodlib.workspace import code_hash

HELD_OUT = 1000  # last training images, which finetuning leaves out: greedy soups choose by them


def pretrain(row: PoolRow, *, device: str = "auto", progress: bool = True) -> Path:
    """Pretrain the checkpoint of a row (resumable), unless it is there; returns its file.

    OodlibError : the file is not the one its record describes, or was made by another recipe
    """
    path, recipe = pretrained_path(row), pretrain_recipe(row)
    if path.with_suffix(".json").exists():
        again = f"Restore both files, or delete both and train again: {train_command(row)}"
        record = read_sealed(path, "pretrain", again)
        if record["recipe"] != asdict(recipe):
            raise OodlibError(
                f"{path} was pretrained by another recipe, {record['recipe']}, than today's, "
                f"{asdict(recipe)}. Restore the recipe, or delete the checkpoint and what was "
                f"finetuned from it and train again: {train_command(row)}"
            )
        return path

    # a leak shows before the hours of training
    pool = pool_of(row)
    images = training_images(pool, row.pretraining)
    if row.pretraining == TASKS[pool].pretraining:
        write_seen(path.parent, row.pretraining, images)
    _sets(pool)

    # network
    classes = len(images.class_names)
    drop: dict[str, Any] = {"dropout": row.dropout, "stochastic_depth": row.stochastic_depth}
    drop = {name: rate or 0.0 for name, rate in drop.items()}
    model = small_vit(row.network, classes, seed=row.seed, **drop)
    if recipe.objective == "sigmoid":  # every class starts at its frequency
        nn.init.constant_(_head(model).bias, -math.log(classes))

    # training
    resume = path.with_suffix(".resume")
    options = _options(pool, device, progress) | {"title": row.checkpoint, "checkpoint": resume}
    history = fit_vit(model, *_tensors(images), recipe, seed=row.seed, **options)
    model.head = nn.Identity()
    record = {
        "checkpoint": row.checkpoint,
        "recipe": asdict(recipe),
        "decay_integral": decay_integral(recipe),
        "images": len(images),
        "classes": classes,
        "fingerprint": images.fingerprint,
        "dtype": "float16",
        "history": history,
        **_made_by(row),
    }
    write_sealed(path, lambda temporary: save_file(to_half(model), temporary), record)
    resume.unlink()
    return path


def is_trained(row: PoolRow, folder: Path | None = None) -> bool:
    """Whether the folder (default: `made_folder`) holds this row, made by today's recipe.

    Its code is on record (``code``, see `code_hash`) but not compared: hours of training outlive an
    edit.
    """
    try:
        record = read_json((folder or made_folder(row)) / "run.json", "is_trained", "")
    except OodlibError:
        return False
    recipe = asdict(finetune_recipe(row)) if row.role in ("", "member") else None
    return record.get("row") == asdict(row) and record.get("recipe") == recipe


def load_row(row: PoolRow, *, device: str = "auto") -> Trained:
    """A model of a small pool with its ``run.json``; of the embedded pool, trained now if missing.

    Raises
    ------
    OodlibError : a row of neither small pool, not trained yet, a damaged file
    """
    pool, folder = pool_of(row), made_folder(row)
    if not is_trained(row):
        if pool != "embedded" or row.role.startswith("soup-"):
            raise OodlibError(f"{row.name} is not trained yet: {train_command(row)}")
        folder = live_folder(row, device=device)
    path, again = folder / "model.safetensors", f"Delete its folder, then {train_command(row)}"
    record = read_sealed(path, "load_row", again, record_path=folder / "run.json")
    model = small_vit(row.network, TASKS[pool].classes, head=row.head)
    model.load_state_dict(load_file(path))
    return Trained(model.eval(), TASKS[pool].mean, TASKS[pool].std, record)


def train_row(
    row: PoolRow,
    *,
    device: str = "auto",
    progress: bool = True,
    rows: Sequence[PoolRow] = (),
    folder: Path | None = None,
) -> Path:
    """Finetune a row from its checkpoint (or mix a soup, or leave it); returns its folder.

    rows : of the pool; a soup's members are those of role "member" with its checkpoint
    folder : instead of ``data/training/vits_<pool>/<row>``
    """
    folder = folder or made_folder(row)
    if is_trained(row, folder):
        return folder
    pool = pool_of(row)
    pixels, labels = _tensors(training_images(pool, TASKS[pool].id_set))
    resume = trained_folder(pool) / "resume" / row.name

    def accuracy(model: nn.Module) -> float:
        return evaluate(model, pixels[-HELD_OUT:], labels[-HELD_OUT:], *_statistics(pool))

    # start from the checkpoint, with a zero head
    start = to_single(load_file(pretrain(row, device=device, progress=progress)))
    _sets(pool)  # a leak shows before the training
    model = small_vit(row.network, TASKS[pool].classes, head=row.head)
    model.load_state_dict(start, strict=False)
    nn.init.zeros_(_head(model).weight)
    nn.init.zeros_(_head(model).bias)

    # finetune or mix
    extra: dict[str, Any] = {}
    if row.role.startswith("soup-"):
        members = [r for r in rows if r.role == "member" and r.checkpoint == row.checkpoint]
        extra["members"] = _mix(model, row, members, accuracy)
    elif row.role != "pretrained":
        recipe = finetune_recipe(row)
        order = row.name if row.role == "member" else ""  # cells see the images in one order
        extra["recipe"], seed = asdict(recipe), hash_seed(row.seed, crc32(order.encode()))
        options = _options(pool, device, progress) | {"title": row.name, "checkpoint": resume}
        images = (pixels[:-HELD_OUT], labels[:-HELD_OUT])
        extra["history"] = fit_vit(model, *images, recipe, seed=seed, **options)

    # score and record
    model.cpu().eval()
    with atomic_folder(folder) as temporary:
        scores, measures = score_row(model, pool)
        scores.to_parquet(temporary / "scores.parquet", index=False, compression="zstd")
        record = {
            "row": asdict(row),
            "start": _digest(start),
            "moved": _moved(start, model),
            **extra,
            **measures,
            "held_out_accuracy": accuracy(model),
            "decay_integral": decay_integral(pretrain_recipe(row)),
            **_made_by(row),
        }
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        path, record_path = temporary / "model.safetensors", temporary / "run.json"
        write_sealed(path, lambda part: save_file(state, part), record, record_path=record_path)
    resume.unlink(missing_ok=True)
    return folder


def score_row(model: nn.Module, pool: str) -> tuple[Any, dict[str, Any]]:
    """Score table of a model on its pool's sets, and what else is measured on the same features.

    The table is that of `score_table` with two more columns for the notebook on GradNorm: its score
    ``gradnorm`` and the factor ``gradnorm_u`` = -U, larger = more OOD. The measures: accuracy on
    "id" in [0, 1], `geometry`, and the correlation of norm and score on the unit tests (None where
    one is constant).
    """
    sets, task = _sets(pool), TASKS[pool]
    options: dict[str, Any] = {"mean": task.mean, "std": task.std, "device": "cpu"}
    banks = {
        name: extract(model, images, progress=False, **options) for name, images in sets.items()
    }
    fitted = reference([banks.pop("fit")], task.classes, per_class=100)
    table = score_table(fitted, banks)
    parts = [_gradnorm(bank) for bank in banks.values()]
    table = table.assign(**{key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    correlation = norm_correlation(fitted, banks["unit_tests"])
    measures = {
        "accuracy": float(banks["id"].accuracy),
        "geometry": geometry(fitted),
        # NaN of a constant score: a zero head
        "norm_correlation": {k: None if rho != rho else rho for k, rho in correlation.items()},
        "sets": {name: {"n": len(s), "fingerprint": s.fingerprint} for name, s in sets.items()},
    }
    return table, measures


def live_folder(row: PoolRow, *, device: str = "auto") -> Path:
    """Folder of a model finetuned now, or earlier by the same code from the same checkpoint."""
    start = _digest(load_file(pretrain(row, device=device)))
    made_of = [asdict(row), repr(BUDGETS["embedded"]), start, "1 thread", code_hash(__name__)]
    train = partial(train_row, row, device=device, progress=False)
    return cached_build(made_of, "row/run.json", lambda made: train(folder=made / "row")) / "row"


def _sets(pool: str) -> dict[str, ImageSet]:
    """The images that the models of the study are scored on."""
    budget = BUDGETS[pool]
    return scored_sets(pool, n_fit=budget.n_fit, n_test=budget.n_test, n_ood=budget.n_ood)


def _mix(model: nn.Module, row: PoolRow, members: Sequence[PoolRow], accuracy: Any) -> list[str]:
    """Give ``model`` the mean weights of all members, or greedily of those that do not harm."""
    if not members:
        raise OodlibError(
            f"{row.name}: a soup needs rows of role member with the checkpoint {row.checkpoint}."
        )
    missing = [member.name for member in members if not is_trained(member)]
    if missing:
        raise OodlibError(f"{row.name}: its members {', '.join(missing)} are not trained yet.")
    states, alone = {}, {}
    for member in members:
        folder = made_folder(member)
        states[member.name] = load_file(folder / "model.safetensors")
        alone[member.name] = read_json(folder / "run.json", "soup", "")["held_out_accuracy"]
    if row.role == "soup-greedy":
        return fill_greedily(model, states, alone, accuracy)
    order = sorted(states, key=lambda name: -alone[name])
    fill_with_mean(model, [states[name] for name in order])
    return order


def _gradnorm(bank: FeatureBank) -> dict[str, np.ndarray]:
    u, _ = gradnorm_factors(bank.features, bank.logits)
    return {
        "gradnorm": gradnorm(bank.features, bank.logits).astype(np.float32),
        "gradnorm_u": -np.asarray(u, dtype=np.float32),
    }


def _made_by(row: PoolRow) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "code": code_hash(__name__),
        "threads": torch.get_num_threads(),
        "command": train_command(row),
    }


def _tensors(images: ImageSet) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.array(images.images)), torch.from_numpy(np.array(images.labels))


def _statistics(pool: str) -> tuple[Tensor, Tensor]:
    return torch.tensor(TASKS[pool].mean), torch.tensor(TASKS[pool].std)


def _options(pool: str, device: str, progress: bool) -> dict[str, Any]:
    mean, std = _statistics(pool)
    return {"mean": mean, "std": std, "device": pick_device(device), "progress": progress}


def _head(model: nn.Module) -> Any:
    return model.get_submodule("head")


def _squares(tensors: dict[str, Tensor]) -> float:
    return sum(float(v.double().square().sum()) for v in tensors.values())


def _digest(state: dict[str, Tensor]) -> str:
    return f"{_squares(state):.9e}"


def _moved(start: dict[str, Tensor], model: nn.Module) -> float:
    """||theta_ft - theta_pre|| / ||theta_pre||, of the parameters without the head."""
    end = {name: p.detach().cpu() for name, p in model.named_parameters() if name in start}
    change = _squares({name: value - start[name] for name, value in end.items()})
    return math.sqrt(change / _squares({name: start[name] for name in end}))
