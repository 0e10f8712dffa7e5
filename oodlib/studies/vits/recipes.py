"""How the models of the small pools are trained, and where their files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oodlib.errors import OodlibError
from oodlib.models.training.vit import VitRecipe
from oodlib.studies.vits.image_sets import TASKS
from oodlib.studies.vits.pool_table import PoolRow
from oodlib.workspace import root


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Images seen in a pool's trainings, the same for every arm, and images that are scored.

    Attributes
    ----------
    pretraining, finetuning, member : images seen; ``member``: by a soup's ingredient
    n_fit, n_test, n_ood : see `oodlib.studies.vits.image_sets.pool_sets`
    """

    pretraining: int
    finetuning: int
    member: int
    n_fit: int
    n_test: int
    n_ood: int


BUDGETS = {
    "embedded": Budget(
        pretraining=100_000, finetuning=8_000, member=4_000, n_fit=3_000, n_test=800, n_ood=3
    ),
    "cifar": Budget(
        pretraining=180_000, finetuning=150_000, member=40_000, n_fit=20_000, n_test=1_000, n_ood=10
    ),
}


def pool_of(row: PoolRow) -> str:
    """The small pool a row belongs to, by its pretraining set. OodlibError: neither."""
    for pool, task in TASKS.items():
        if row.pretraining in (task.id_set, task.pretraining):
            return pool
    raise OodlibError(
        f"{row.name}: {row.pretraining or 'unknown'} pretraining is not done here; rows of the "
        f"small pools are pretrained on {', '.join(t.pretraining for t in TASKS.values())}."
    )


def pretrain_recipe(row: PoolRow) -> VitRecipe:
    """AdamW, peak rate 4e-3, batches of 64 images."""
    task = TASKS[pool_of(row)]
    return VitRecipe(
        samples=BUDGETS[pool_of(row)].pretraining,
        optimiser="adamw",
        lr=4e-3,
        objective=row.objective,  # type: ignore[arg-type]
        weight_decay=row.weight_decay or 0.0,
        batch_size=64,
        aug=row.aug or "none",
        flip=task.flip,
        shift=task.shift,
    )


def finetune_recipe(row: PoolRow) -> VitRecipe:
    """SGD with momentum, softmax cross-entropy, batches of 32; no decay, mixup or dropout."""
    task, budget = TASKS[pool_of(row)], BUDGETS[pool_of(row)]
    if row.ft_lr is None:
        raise OodlibError(f"{row.name}: a row that is trained here needs ft_lr.")
    return VitRecipe(
        samples=budget.member if row.role == "member" else budget.finetuning,
        optimiser="sgd",
        lr=row.ft_lr,
        batch_size=32,
        flip=task.flip,
        shift=task.shift,
        penalty=row.penalty,
    )


def train_command(row: PoolRow) -> str:
    """The command that trains a row."""
    return f"python -m oodlib train-vit --pool {pool_of(row)} --models {row.name}"


def shipped_folder(pool: str) -> Path:
    """``data/checkpoints/vits_<pool>``."""
    return root() / "data" / "checkpoints" / f"vits_{pool}"


def trained_folder(pool: str) -> Path:
    """``data/training/vits_<pool>``."""
    return root() / "data" / "training" / f"vits_{pool}"


def made_folder(row: PoolRow) -> Path:
    """Where a row is trained: ``data/training/vits_<pool>/<row>``."""
    return trained_folder(pool_of(row)) / row.name


def pretrained_path(row: PoolRow) -> Path:
    """The pretrained checkpoint of a row: shipped, else where it is trained."""
    name, pool = f"{row.checkpoint}.safetensors", pool_of(row)
    shipped = shipped_folder(pool) / name
    if shipped.with_suffix(".json").exists():
        return shipped
    return trained_folder(pool) / "pretrained" / name
