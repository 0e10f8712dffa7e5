"""The study of a pool: its models in one table, effects of factors, the recipe, the soups."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from pandas import DataFrame

from oodlib.claims import Run
from oodlib.errors import OodlibError
from oodlib.metrics import Estimate
from oodlib.studies.vits import effects, measures, statistics
from oodlib.studies.vits.image_sets import NEAR
from oodlib.studies.vits.pool_table import read_pool
from oodlib.studies.vits.stored import Models, pool_models
from oodlib.studies.vits.sweep.results import swept_models

THREE = ("mahalanobis", "relative_mahalanobis", "max_logit")  # the scores of the study
SUITES = ("near", "unit_tests")
FREE = {"dropout": ("stochastic_depth",)}  # factor -> what changes with it
_FACTORS = ("pretraining", "weight_decay", "ft_lr", "aug", "dropout", "penalty", "head")


@dataclass(frozen=True, eq=False)
class Study:
    """The models of a pool, and what the study asks of them.

    Attributes
    ----------
    models : with their scores and records
    every : one row per model, by name (`oodlib.studies.vits.measures.model_frame`)
    near : the near-OOD sets
    boot : n_boot and seed of every interval
    """

    models: Models
    every: DataFrame
    near: tuple[str, ...]
    boot: Mapping[str, int]

    @cached_property
    def cells(self) -> DataFrame:
        """The models that are compared: all but soups, their members, and bare checkpoints."""
        return self.every[self.every["role"] == ""]

    @property
    def plain(self) -> DataFrame:
        """Cells with the usual head and no penalty in the finetuning."""
        cells = self.cells
        return cells[(cells["head"] == "raw") & (cells["penalty"] == 0)]

    @property
    def supervised(self) -> DataFrame:
        """Plain cells whose pretraining is not CLIP-like."""
        return self.plain[self.plain["data"] != "CLIP-like"]

    @property
    def members(self) -> DataFrame:
        """Finetunes that soups are made of."""
        return self.every[self.every["role"] == "member"]

    @property
    def soups(self) -> DataFrame:
        """Models whose weights are averages of those of members."""
        return self.every[self.every["role"].str.startswith("soup-")]

    @property
    def accuracy(self) -> float:
        """Median ID accuracy of the plain cells."""
        return float(self.plain["accuracy"].median())

    @cached_property
    def tables(self) -> dict[str, DataFrame]:
        """Model -> the scores of its images."""
        return {model.row.name: model.table for model in self.models}

    @property
    def averageable(self) -> dict[str, DataFrame]:
        """Tables of the members, if they are several and all have validation images; or none."""
        tables = {name: self.tables[name] for name in self.members.index}
        whole = all({"val", "ood_val"} <= set(table["set"]) for table in tables.values())
        return tables if whole and len(tables) > 1 else {}

    def part(self, factor: str) -> DataFrame:
        """The cells among which a factor is varied."""
        if factor == "penalty":
            return self.cells[self.cells["head"] == "raw"]
        if factor == "head":
            return self.cells[self.cells["penalty"] == 0]
        return self.supervised if factor == "pretraining" else self.plain

    @cached_property
    def levels(self) -> dict[str, list[Any]]:
        """Factor -> the two levels that most pairs have; only factors that some pair differs in.

        Of pretraining sets the narrow one comes first, of other factors the lower level.
        """
        found = {
            factor: effects.common_levels(self.part(factor), factor, free=FREE.get(factor, ()))
            for factor in _FACTORS
        }
        levels = {factor: list(pair) for factor, pair in found.items() if pair}
        if "pretraining" in levels:
            levels["pretraining"].sort(key=lambda name: name in measures.BROAD)
        return levels

    def effect(self, factor: str, value: str, *, minus: str = "") -> effects.Effect:
        """`paired_effects` of a factor on a column of the table, or on a difference of two."""
        cells, (low, high) = self.part(factor), self.levels[factor]
        values = cells.assign(_value=cells[value] - cells[minus] if minus else cells[value])
        free = FREE.get(factor, ())
        return effects.paired_effects(values, factor, low, high, "_value", free=free, **self.boot)

    def effect_table(self) -> DataFrame:
        """Every factor's effect on Q, by score and suite, and on ID accuracy, as fractions."""
        rows = []
        for factor, (low, high) in self.levels.items():
            accuracy = self.effect(factor, "accuracy").value
            for score, suite in itertools.product(THREE, SUITES):
                effect = self.effect(factor, f"Q/{score}/{suite}")
                what = {"factor": factor, "from": low, "to": high, "score": score, "suite": suite}
                numbers = {"value": effect.value, "low": effect.low, "high": effect.high}
                counts = {"pairs": effect.n, "checkpoints": effect.clusters}
                rows.append(
                    what | numbers | counts | {"sign test p": effect.p, "accuracy": accuracy}
                )
        return DataFrame(rows)

    def recipe(self) -> Estimate | None:
        """Share of all other pairs of cell and score that the study's recipe beats; over suites.

        The recipe is broad supervised pretraining, high weight decay, low learning rate of the
        finetuning, and Mahalanobis. None where no cell follows it, or all do.
        """
        plain, follows = self.plain, self.supervised["data"] == "broad"
        for factor, index in (("weight_decay", 1), ("ft_lr", 0)):
            follows &= self.supervised[factor] == self.levels.get(factor, (None, None))[index]
        if not follows.any() or len(plain) <= follows.sum():
            return None
        chosen = follows.reindex(plain.index, fill_value=False)
        inside = np.concatenate([chosen & (score == "mahalanobis") for score in THREE])
        checkpoints = np.tile(plain["checkpoint"], len(THREE))
        parts = {
            suite: statistics.recipe_percentile(
                np.concatenate([plain[f"Q/{score}/{suite}"] for score in THREE]),
                inside,
                checkpoints,
                larger_is_better=True,
                **self.boot,
            )
            for suite in SUITES
        }
        mean, clusters = Estimate.combined(parts), parts["near"].clusters
        return replace(mean, each={}, n=len(plain), clusters=clusters, resampled="checkpoints")

    def soups_beside_members(self) -> dict[str, Estimate]:
        """`soup_against_members` over all soups, three scores and two suites; {} without soups."""
        measured = [f"Q/{score}/{suite}" for score in THREE for suite in SUITES]
        if len(self.members) < 2 or not len(self.soups):
            return {}
        return statistics.soup_against_members(
            self.soups[measured].to_numpy(np.float64).ravel(),
            np.tile(self.members[measured].to_numpy(np.float64), len(self.soups)),
            larger_is_better=True,
            **self.boot,
        )

    def by_set(self, scores: Sequence[str] = THREE) -> DataFrame:
        """AUROC per OOD set, mean over its classes and over the cells of one pretraining, in %."""
        rows = []
        for name, cell in self.cells.iterrows():
            table = self.tables[str(name)]
            left_out = ("id", "val", "ood_val", "unit_tests")
            sets = [known for known in table["set"].unique() if known not in left_out]
            classes = measures.per_class(table[["set", "index", "label", *scores]], sets)
            means = classes.groupby(["set", "score"])["auroc"].mean()
            rows.append(means.reset_index().assign(data=cell["data"]))
        pivot = pd.concat(rows).pivot_table(index=["data", "score"], columns="set", values="auroc")
        return pivot.mul(100).reset_index()


def load_study(
    run: Run, networks: Sequence[str], *, models: str = "*", n_boot: int = 1000, **sweep: str
) -> Study:
    """The models of a pool that are available; prints which are not, and gives the run the hashes.

    Q, the quality of a score, is AUROC; in the profile paper, whose models are accurate enough, it
    is 1 - FPR95, as in the study.

    Parameters
    ----------
    networks : one pool of ours; in the profile paper what `swept_models` takes
    models : only rows of the pool whose name matches
    sweep : data_root, output and weights of `swept_models`

    Raises
    ------
    OodlibError : no model is available
    """
    if run.profile == "paper":
        found = swept_models(networks, device=run.device, **sweep)
        near: tuple[str, ...] = ("ninco",)
    else:
        (pool,) = networks
        rows = [row for row in read_pool(pool) if fnmatch(row.name, models)]
        found, near = pool_models(pool, rows=rows, device=run.device), tuple(NEAR[pool])
    if not found:
        raise OodlibError(
            f"No model of {', '.join(networks)} is available: {next(iter(found.missing.values()))}"
        )
    if found.missing:
        first = next(iter(found.missing.values()))
        print(f"{len(found.missing)} models are not available. First: {first}")
    quality: Literal["auroc", "fpr"] = "fpr" if run.profile == "paper" else "auroc"
    every = measures.model_frame(found, near=near, quality=quality)
    boot = {"n_boot": n_boot, "seed": run.seed}
    study = Study(models=found, every=every, near=near, boot=boot)
    checkpoints = study.cells["checkpoint"].nunique()
    print(
        f"{len(study.cells)} cells of {checkpoints} pretrained checkpoints; median ID accuracy "
        f"{study.accuracy:.1%}"
    )
    run.uses(
        weights={model.row.name: model.record.get("sha256", "") for model in found},
        data={
            name: str(entry["fingerprint"])
            for name, entry in found[0].record.get("sets", {}).items()
        },
    )
    return study
