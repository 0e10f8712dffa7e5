"""The small pools, trained here: pretrained checkpoints, finetuned models, soups, and each model's
scores.

Everything lies in ``data/training/vits_<pool>``: ``pretrained/<checkpoint>.safetensors`` and a
folder per row with ``model.safetensors``, ``scores.parquet`` and ``run.json``, the last file to be
written. What is there and was made by the same recipe is not made again, whatever the code. The
embedded pool's pretrained checkpoints are shipped in ``data/checkpoints``. Beside checkpoints lie
the hashes of the images that they were pretrained on, for `assert_never_trained_on`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from oodlib.files import atomic_folder, atomic_path, sha256, write_json
from oodlib.models.device import pick_device
from oodlib.models.shipped import Trained, cached_build, to_half, to_single
from oodlib.models.small_vit import small_vit
from oodlib.models.training.augment import hash_seed
from oodlib.models.training.classifier import evaluate
from oodlib.models.training.vit import VitRecipe, decay_integral, fit_vit
from oodlib.scores import gradnorm, gradnorm_factors
from oodlib.studies.vits.image_sets import (
    TASKS,
    assert_never_trained_on,
    pool_sets,
    training_images,
)
from oodlib.studies.vits.pool_table import PoolRow
from oodlib.studies.vits.score_table import geometry, norm_correlation, reference, score_table
from oodlib.studies.vits.soups import fill_greedily, fill_with_mean
from oodlib.workspace import code_hash, root

__all__ = [
    "BUDGETS",
    "Budget",
    "check_test_images",
    "finetune_recipe",
    "is_trained",
    "live_folder",
    "load_row",
    "made_folder",
    "pool_of",
    "pretrain",
    "pretrain_recipe",
    "pretrained_path",
    "score_row",
    "train_command",
    "train_row",
]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a pool's models are trained: images seen, the same for every arm; and on how many
    images they score.
    """

    pretraining: int
    finetuning: int
    member: int  # finetuning of a soup's ingredient
    n_fit: int
    n_test: int
    n_ood: int  # of each near-OOD class


BUDGETS = {
    "embedded": Budget(
        pretraining=100_000, finetuning=8_000, member=4_000, n_fit=3_000, n_test=800, n_ood=3
    ),
    "cifar": Budget(
        pretraining=180_000, finetuning=150_000, member=40_000, n_fit=20_000, n_test=1_000, n_ood=10
    ),
}
HELD_OUT = 1000  # last training images, which finetuning leaves out: greedy soups choose by them


def pool_of(row: PoolRow) -> str:
    """The small pool a row belongs to, by its pretraining set. OodlibError: neither."""
    for pool, task in TASKS.items():
        if row.pretraining in (task.id_set, task.pretraining):
            return pool
    raise OodlibError(
        f"{row.name}: {row.pretraining or 'unknown'} pretraining is not done here; rows of the "
        "small pools are pretrained on "
        f"{', '.join(f'{t.pretraining} or {t.id_set}' for t in TASKS.values())}."
    )


def pretrain_recipe(row: PoolRow) -> VitRecipe:
    """AdamW, peak rate 4e-3, batches of 64 images."""
    task, budget = TASKS[pool_of(row)], BUDGETS[pool_of(row)]
    return VitRecipe(
        budget.pretraining,
        "adamw",
        4e-3,
        objective=row.objective,  # type: ignore[arg-type]
        weight_decay=row.weight_decay or 0.0,
        batch_size=64,
        aug=row.aug or "none",
        flip=task.flip,
        shift=task.shift,
    )


def finetune_recipe(row: PoolRow) -> VitRecipe:
    """SGD with momentum, softmax cross-entropy, batches of 32 images, no weight decay, no mixup, no
    dropout.
    """
    task, budget = TASKS[pool_of(row)], BUDGETS[pool_of(row)]
    if row.ft_lr is None:
        raise OodlibError(f"{row.name}: a row that is trained here needs ft_lr.")
    return VitRecipe(
        budget.member if row.role == "member" else budget.finetuning,
        "sgd",
        row.ft_lr,
        batch_size=32,
        flip=task.flip,
        shift=task.shift,
        penalty=row.penalty,
    )


def pretrained_path(row: PoolRow) -> Path:
    """Where the pretrained checkpoint of a row lies: shipped, else among what was trained here."""
    name = f"{row.checkpoint}.safetensors"
    shipped = _shipped_folder(pool_of(row)) / name
    return shipped if shipped.with_suffix(".json").exists() else _folder(row) / "pretrained" / name


def pretrain(row: PoolRow, *, device: str = "auto", progress: bool = True) -> Path:
    """Pretrain the checkpoint that a row starts from (resumable), unless it is there; returns its
    file.

    OodlibError : the file is not the one its record describes, or was made by another recipe
    """
    path, recipe = pretrained_path(row), pretrain_recipe(row)
    if path.with_suffix(".json").exists():
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if not path.exists() or sha256(path) != record["sha256"]:
            raise OodlibError(
                f"{path} is not the file its {path.stem}.json describes. Restore both, or delete "
                f"both and train again: {train_command(row)}"
            )
        if record["recipe"] != asdict(recipe):
            raise OodlibError(
                f"{path} was pretrained by another recipe, {record['recipe']}, than that of today, "
                f"{asdict(recipe)}. Restore the recipe, or delete the checkpoint and what was "
                f"finetuned from it and train again: {train_command(row)}"
            )
        return path
    pool = pool_of(row)
    mean, std = _statistics(pool)
    images = training_images(pool, row.pretraining)
    model = small_vit(
        row.network,
        len(images.class_names),
        dropout=row.dropout or 0.0,
        stochastic_depth=row.stochastic_depth or 0.0,
        seed=row.seed,
    )
    if recipe.objective == "sigmoid":
        nn.init.constant_(
            _head(model).bias, -math.log(len(images.class_names))
        )  # every class starts at its frequency
    pixels, labels = (
        torch.from_numpy(np.array(images.images)),
        torch.from_numpy(np.array(images.labels)),
    )
    fingerprint = images.fingerprint
    if row.pretraining == TASKS[pool].pretraining:
        _write_seen(
            path.parent / f"seen_{row.pretraining}-{fingerprint[:16]}.safetensors",
            images,
            fingerprint,
        )
    _sets(pool)  # a leak shows before the hours of training
    resume = path.with_suffix(".resume")
    history = fit_vit(
        model,
        pixels,
        labels,
        recipe,
        seed=row.seed,
        checkpoint=resume,
        device=pick_device(device),
        progress=progress,
        title=row.checkpoint,
        mean=mean,
        std=std,
    )
    with atomic_path(path) as temporary:
        save_file(to_half(_without_head(model)), temporary)
    write_json(
        path.with_suffix(".json"),
        {
            "checkpoint": row.checkpoint,
            "recipe": asdict(recipe),
            "decay_integral": decay_integral(recipe),
            "images": len(images),
            "classes": len(images.class_names),
            "fingerprint": fingerprint,
            "dtype": "float16",
            "history": history,
            "sha256": sha256(path),
            "torch": torch.__version__,
            "code": code_hash(__name__),
            "threads": torch.get_num_threads(),
            "command": train_command(row),
        },
    )
    resume.unlink()
    return path


def made_folder(row: PoolRow) -> Path:
    """Where `train_row` writes: ``data/training/vits_<pool>/<row>``."""
    return _folder(row) / row.name


def is_trained(row: PoolRow, folder: Path | None = None) -> bool:
    """Whether the folder (default: `made_folder`) holds this row, finished, made by the recipe of
    today.

    Its code is on record (``code``, see `code_hash`) but not compared: hours of training outlive an
    edit.
    """
    try:
        record = json.loads(((folder or made_folder(row)) / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    recipe = asdict(finetune_recipe(row)) if row.role in ("", "member") else None
    return record.get("row") == asdict(row) and record.get("recipe") == recipe


def load_row(row: PoolRow, *, device: str = "auto") -> Trained:
    """A model of a small pool, with its ``run.json``: trained here before, else, of the embedded
    pool, now.

    Raises
    ------
    OodlibError : a row of neither small pool, not trained yet, a damaged file
    """
    pool, folder = pool_of(row), made_folder(row)
    if not is_trained(row):
        if pool != "embedded" or row.role.startswith("soup-"):
            raise OodlibError(f"{row.name} is not trained yet: {train_command(row)}")
        folder = live_folder(row, device=device)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if sha256(folder / "model.safetensors") != record["sha256"]:
        raise OodlibError(
            f"{folder / 'model.safetensors'} is not the file its run.json describes. Delete the "
            f"folder and train again: {train_command(row)}"
        )
    model = small_vit(row.network, _classes(pool), head=row.head)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return Trained(model.eval(), TASKS[pool].mean, TASKS[pool].std, record)


def train_row(
    row: PoolRow,
    *,
    device: str = "auto",
    progress: bool = True,
    rows: Sequence[PoolRow] = (),
    folder: Path | None = None,
) -> Path:
    """Finetune a row from its pretrained checkpoint (or mix a soup, or leave it), and write its
    folder; returns it.

    rows : of the pool; a soup's members are those of role "member" with its checkpoint
    folder : instead of ``data/training/vits_<pool>/<row>``
    """
    folder = folder or made_folder(row)
    if is_trained(row, folder):
        return folder
    pool, task = pool_of(row), TASKS[pool_of(row)]
    images = training_images(pool, task.id_set)
    pixels, labels = (
        torch.from_numpy(np.array(images.images)),
        torch.from_numpy(np.array(images.labels)),
    )
    model, extra = small_vit(row.network, _classes(pool), head=row.head), {}
    resume = _folder(row) / "resume" / row.name
    start = to_single(load_file(pretrain(row, device=device, progress=progress)))
    _sets(pool)  # a leak shows before the training
    model.load_state_dict(start, strict=False)
    nn.init.zeros_(_head(model).weight)
    nn.init.zeros_(_head(model).bias)
    if row.role.startswith("soup-"):
        held_out = (pixels[-HELD_OUT:], labels[-HELD_OUT:])
        extra = _soup(
            model,
            row,
            [r for r in rows if r.role == "member" and r.checkpoint == row.checkpoint],
            held_out,
        )
    elif row.role != "pretrained":
        recipe, (mean, std) = finetune_recipe(row), _statistics(pool)
        order = (
            row.name if row.role == "member" else ""
        )  # cells are compared on the same order of images
        extra["history"] = fit_vit(
            model,
            pixels[:-HELD_OUT],
            labels[:-HELD_OUT],
            recipe,
            mean=mean,
            std=std,
            seed=hash_seed(row.seed, crc32(order.encode())),
            checkpoint=resume,
            device=pick_device(device),
            progress=progress,
            title=row.name,
        )
        extra |= {"recipe": asdict(recipe)}
    model.cpu().eval()
    with atomic_folder(folder) as temporary:
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()},
            temporary / "model.safetensors",
        )
        scores, measures = score_row(model, pool)
        scores.to_parquet(temporary / "scores.parquet", index=False, compression="zstd")
        write_json(
            temporary / "run.json",
            {
                "row": asdict(row),
                "start": _digest(start),
                "moved": _moved(start, model),
                **extra,
                **measures,
                "held_out_accuracy": evaluate(
                    model, pixels[-HELD_OUT:], labels[-HELD_OUT:], *_statistics(pool)
                ),
                "decay_integral": decay_integral(pretrain_recipe(row)),
                "torch": torch.__version__,
                "code": code_hash(__name__),
                "sha256": sha256(temporary / "model.safetensors"),
                "threads": torch.get_num_threads(),
                "command": train_command(row),
            },
        )
    resume.unlink(missing_ok=True)
    return folder


def score_row(model: nn.Module, pool: str) -> tuple[Any, dict[str, Any]]:
    """Score table of a model on its pool's sets, and what else is measured on the same features.

    The table is that of `score_table` with two columns more, of the notebook on GradNorm: its score
    ``gradnorm`` and the factor ``gradnorm_u`` = -U, larger = more OOD. The measures: accuracy on
    "id" in [0, 1], `geometry`, and the correlation of norm and score on the unit tests (None where
    one is constant).
    """
    sets = _sets(pool)
    options: dict[str, Any] = {
        "mean": TASKS[pool].mean,
        "std": TASKS[pool].std,
        "device": "cpu",
        "progress": False,
    }
    banks = {name: extract(model, images, **options) for name, images in sets.items()}
    fitted = reference([banks.pop("fit")], _classes(pool), per_class=100)
    table = score_table(fitted, banks)
    parts = [_gradnorm(bank) for bank in banks.values()]
    table = table.assign(**{key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    measures = {
        "accuracy": float(banks["id"].accuracy),
        "geometry": geometry(fitted),
        "norm_correlation": {
            score: None if rho != rho else rho  # of a constant score: a zero head
            for score, rho in norm_correlation(fitted, banks["unit_tests"]).items()
        },
        "sets": {
            name: {"n": len(images), "fingerprint": images.fingerprint}
            for name, images in sets.items()
        },
    }
    return table, measures


def _gradnorm(bank: FeatureBank) -> dict[str, np.ndarray]:
    u, _ = gradnorm_factors(bank.features, bank.logits)
    return {
        "gradnorm": gradnorm(bank.features, bank.logits).astype(np.float32),
        "gradnorm_u": -np.asarray(u, dtype=np.float32),
    }


@functools.cache
def _sets(pool: str) -> dict[str, ImageSet]:
    """The images that models are scored on, once per process, after a look that no model was
    trained on them.
    """
    budget = BUDGETS[pool]
    sets = pool_sets(pool, n_fit=budget.n_fit, n_test=budget.n_test, n_ood=budget.n_ood)
    check_test_images(pool, sets)
    return sets


def check_test_images(pool: str, sets: Mapping[str, ImageSet]) -> None:
    """`assert_never_trained_on`, with the hashes of pretraining images that lie beside the pool's
    checkpoints.

    The pretraining set itself is read or drawn where there are none.
    """
    task = TASKS[pool]
    places = (_shipped_folder(pool), _trained_folder(pool) / "pretrained")
    known: set[str] = set()
    for path in (
        path for place in places for path in place.glob(f"seen_{task.pretraining}-*.safetensors")
    ):
        record = path.with_suffix(".json")
        if not record.exists() or json.loads(record.read_text(encoding="utf-8"))[
            "sha256"
        ] != sha256(path):
            raise OodlibError(
                f"{path} is not the file its {record.name} describes. Restore both from git, or "
                "delete both."
            )
        known |= {f"{value:016x}" for value in load_file(path)["hashes"].numpy().view(np.uint64)}
    assert_never_trained_on(
        pool,
        sets,
        training={
            task.id_set: _digests(training_images(pool, task.id_set)),
            task.pretraining: known or _digests(training_images(pool, task.pretraining)),
        },
    )


def _write_seen(path: Path, images: ImageSet, fingerprint: str) -> None:
    """The hashes of the images that a checkpoint is pretrained on, with a record of what they are."""
    hashes = np.sort(np.array([int(digest, 16) for digest in _digests(images)], dtype=np.uint64))
    with atomic_path(path) as temporary:
        save_file({"hashes": torch.from_numpy(hashes.view(np.int64))}, temporary)
    write_json(
        path.with_suffix(".json"),
        {
            "set": f"{images.name}/{images.split}",
            "images": len(images),
            "fingerprint": fingerprint,
            "hashes": "first 64 bits of the SHA-256 of each image's pixels, sorted as unsigned integers",
            "sha256": sha256(path),
        },
    )


def _digests(images: ImageSet) -> list[str]:
    return [digest[:16] for digest in images.image_hashes()]


def _soup(
    model: nn.Module, row: PoolRow, members: Sequence[PoolRow], held_out: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Give ``model`` the mean weights of its members: all ("soup-uniform"), or greedily those that
    do not harm.
    """
    if not members:
        raise OodlibError(
            f"{row.name}: a soup needs rows of role member with the checkpoint {row.checkpoint}."
        )
    folders = {member.name: made_folder(member) for member in members}
    missing = [member.name for member in members if not is_trained(member)]
    if missing:
        raise OodlibError(f"{row.name}: its members {', '.join(missing)} are not trained yet.")
    states = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    accuracy = {
        name: json.loads((folder / "run.json").read_text())["held_out_accuracy"]
        for name, folder in folders.items()
    }
    if row.role == "soup-greedy":
        return {
            "members": fill_greedily(
                model,
                states,
                accuracy,
                lambda m: evaluate(m, *held_out, *_statistics(pool_of(row))),
            )
        }
    chosen = sorted(states, key=lambda name: -accuracy[name])
    fill_with_mean(model, [states[name] for name in chosen])
    return {"members": chosen}


def live_folder(row: PoolRow, *, device: str = "auto") -> Path:
    """Folder of a model finetuned now, or earlier by the same code (`code_hash`) from the same
    checkpoint.
    """
    made_of = [
        asdict(row),
        repr(BUDGETS["embedded"]),
        _digest(load_file(pretrain(row, device=device))),
        "1 thread",
        code_hash(__name__),
    ]
    made = cached_build(
        made_of,
        "row/run.json",
        lambda output: train_row(row, device=device, progress=False, folder=output / "row"),
    )
    return made / "row"


def _shipped_folder(pool: str) -> Path:
    return root() / "data" / "checkpoints" / f"vits_{pool}"


def _trained_folder(pool: str) -> Path:
    return root() / "data" / "training" / f"vits_{pool}"


def _folder(row: PoolRow) -> Path:
    return _trained_folder(pool_of(row))


def _classes(pool: str) -> int:
    return {"latin": 26, "cifar10": 10}[TASKS[pool].id_set]


def _statistics(pool: str) -> tuple[Tensor, Tensor]:
    return torch.tensor(TASKS[pool].mean), torch.tensor(TASKS[pool].std)


def train_command(row: PoolRow) -> str:
    """The command that trains a row."""
    return f"python -m oodlib train-vit --pool {pool_of(row)} --models {row.name}"


def _head(model: nn.Module) -> Any:
    return model.get_submodule("head")


def _without_head(model: nn.Module) -> nn.Module:
    model.head = nn.Identity()
    return model


def _digest(state: dict[str, Tensor]) -> str:
    return f"{sum(float(v.double().square().sum()) for v in state.values()):.9e}"


def _moved(start: dict[str, Tensor], model: nn.Module) -> float:
    """||theta_ft - theta_pre|| / ||theta_pre||, of the parameters without the head."""
    end = {name: p.detach().cpu() for name, p in model.named_parameters() if name in start}
    change = sum(float((end[k] - start[k]).double().square().sum()) for k in end)
    return math.sqrt(change / sum(float(start[k].double().square().sum()) for k in end))
