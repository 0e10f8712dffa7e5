"""From scores of images to numbers: FPR and AUROC by class, and averages of several models."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas import DataFrame

from oodlib.errors import OodlibError
from oodlib.metrics import Estimate, auroc, replicates, threshold
from oodlib.studies.vits.effects import pool_frame
from oodlib.studies.vits.score_table import SCORES

BROAD = ("unicode", "tiny-imagenet", "in21k")  # pretraining sets of many other classes
FAILED = 0.10  # a unit test fails where its FPR95 is above (arXiv 2306.00826)
_KEYS = ["set", "index", "label"]
_MOST = 10_000  # grid points of `choose_weights`


def per_class(table: DataFrame, sets: Sequence[str], *, id_set: str = "id") -> DataFrame:
    """FPR at 95 % TPR (ID positive) and AUROC of each OOD class (or unit test) against all of ID.

    Parameters
    ----------
    table : of `oodlib.studies.vits.score_table.score_table`; larger = more OOD
    sets : names of OOD sets; a class is a pair (set, label)

    Returns
    -------
    DataFrame : score, set, label, images, fpr, auroc; fractions. The threshold is
        `oodlib.metrics.threshold` of the ID scores; an image at the threshold counts as accepted.

    Raises
    ------
    OodlibError : a set is not in the table, a score is NaN
    """
    ood, ids = _rows(table, sets), _rows(table, [id_set])
    parts = []
    for score in (name for name in SCORES if name in table):
        values, found = np.sort(ids[score].to_numpy()), ood[score].to_numpy()
        if np.isnan(found).any():
            raise OodlibError(
                f"per_class: {score} holds {int(np.isnan(found).sum())} NaN. Find their cause; a "
                "score that overflowed must be +inf (most OOD), never dropped."
            )
        # the mean of the share of ID images below an image is the AUROC of the class
        shares = {"fpr": found <= threshold(values), "auroc": _share_below(values, found)}
        classes = ood[["set", "label"]].assign(**shares).groupby(["set", "label"], sort=False)
        parts.append(classes.mean().assign(images=classes.size(), score=score).reset_index())
    return pd.concat(parts, ignore_index=True)[["score", "set", "label", "images", "fpr", "auroc"]]


def summary(
    table: DataFrame,
    *,
    near: Sequence[str],
    unit_tests: str | None = "unit_tests",
    id_set: str = "id",
) -> DataFrame:
    """A model in a few numbers: one row per score and suite, "near" and "unit_tests".

    Parameters
    ----------
    table : of `oodlib.studies.vits.score_table.score_table`
    near : the near-OOD sets; the suite "near" is the classes of all of them together
    unit_tests : the set whose labels are the unit tests; None where there is none

    Returns
    -------
    DataFrame : score, suite, `over_classes` of the classes or tests, failed (number of unit tests
        with FPR95 above 10 %, NaN for near)

    Raises
    ------
    OodlibError : as `per_class`
    """
    suites = {"near": list(near)} | ({"unit_tests": [unit_tests]} if unit_tests else {})
    rows = []
    for suite, sets in suites.items():
        for score, classes in per_class(table, sets, id_set=id_set).groupby("score", sort=False):
            failed = float((classes["fpr"] > FAILED).sum()) if suite == "unit_tests" else np.nan
            rows.append({"score": score, "suite": suite, **over_classes(classes), "failed": failed})
    return DataFrame(rows)


def over_classes(classes: DataFrame) -> dict[str, float]:
    """Rows of `per_class` as one: fpr and auroc (unweighted mean over the classes), their means
    over the images (``_pooled``), and numbers of classes and images."""
    n, both = classes["images"], ("fpr", "auroc")
    means = {m: classes[m].mean() for m in both}
    pooled = {f"{m}_pooled": np.average(classes[m], weights=n) for m in both}
    return means | pooled | {"classes": len(classes), "images": int(n.sum())}


def model_frame(
    models: Iterable[Any], *, near: Sequence[str], quality: Literal["auroc", "fpr"] = "auroc"
) -> DataFrame:
    """One row per model, by name: pool columns, ``checkpoint``, ``data``, and all measures.

    Parameters
    ----------
    models : with ``row``, ``record`` and ``table`` (`oodlib.studies.vits.stored.Scored`)
    quality : what "Q/<score>/<suite>" holds, larger = better: AUROC, or 1 - FPR95

    Returns
    -------
    DataFrame. ``data`` is "CLIP-like" (cosine objective), else "broad" (`BROAD` sets) or "narrow";
    ``accuracy``, `summary` as "<score>/<suite>/<metric>", the record's geometry, ``moved`` and
    ``decay`` (NaN where unknown)
    """
    rows, measures = [], []
    for model in models:
        numbers, record = flat(summary(model.table, near=near)), model.record
        best = {
            f"Q/{name.removesuffix('/' + quality)}": value if quality == "auroc" else 1 - value
            for name, value in numbers.items()
            if name.endswith("/" + quality)
        }
        training = {"moved": "moved", "decay": "decay_integral"}
        known = {name: record.get(key, np.nan) for name, key in training.items()}
        rows.append(model.row)
        accuracy = {"accuracy": record["accuracy"]}
        measures.append(accuracy | known | record["geometry"] | numbers | best)
    frame = pool_frame(rows, measures).set_index("name", drop=False)
    broad = np.where(frame["pretraining"].isin(BROAD), "broad", "narrow")
    frame.insert(1, "data", np.where(frame["objective"] == "cosine", "CLIP-like", broad))
    return frame


def flat(summary: DataFrame) -> dict[str, float]:
    """A summary as one row of a table of models: "mahalanobis/near/auroc" -> value, and so on."""
    metrics = ["fpr", "auroc", "fpr_pooled", "auroc_pooled", "failed"]
    long = summary.set_index(["score", "suite"])[metrics].stack().dropna()
    return {"/".join(key): float(value) for key, value in long.items()}


def averaged(
    tables: Mapping[str, DataFrame],
    score: str,
    *,
    weights: Mapping[str, float] | None = None,
    validation: str = "val",
    scale: Literal["z", "rank"] = "z",
) -> DataFrame:
    """One score of several models, averaged image by image, as a table that `summary` takes.

    Each model's scores are first put on one scale with its *ID validation* images alone: "z": (s -
    mean) / standard deviation; "rank": share of validation images below, ties half (whatever is
    above all validation images ties at 1).

    Parameters
    ----------
    tables : model -> its score table, all of the same images in the same order
    weights : model -> weight >= 0; equal weights where not given

    Raises
    ------
    OodlibError : no model, other images, no validation set, unknown scale, a weight that is missing
        or negative
    """
    values = _scaled(tables, score, validation, scale)
    given = dict.fromkeys(tables, 1.0) if weights is None else dict(weights)
    if set(given) != set(tables) or min(given.values()) < 0 or not sum(given.values()) > 0:
        raise OodlibError(
            f"averaged: one weight of at least 0 is needed for each of {', '.join(tables)}, and "
            f"one above 0; got {given}."
        )
    w = np.array([given[name] for name in tables])
    return next(iter(tables.values()))[_KEYS].assign(**{score: values @ (w / w.sum())})


def choose_weights(
    tables: Mapping[str, DataFrame],
    score: str,
    *,
    validation_ood: str,
    validation: str = "val",
    scale: Literal["z", "rank"] = "z",
    steps: int = 4,
) -> dict[str, float]:
    """Weights for `averaged` with the best AUROC of ``validation_ood`` against the ID validation.

    Tries equal weights and every vector of multiples of 1 / ``steps`` that sums to 1; in a tie the
    most even one wins.

    Parameters
    ----------
    validation_ood : a set for this choice alone, never one that is tested on

    Raises
    ------
    OodlibError : as `averaged`; no validation OOD set; more than 10,000 vectors
    """
    values = _scaled(tables, score, validation, scale)
    sets = next(iter(tables.values()))["set"].to_numpy()
    if not (sets == validation_ood).any():
        raise OodlibError(
            f"choose_weights: there is no set {validation_ood!r}; known: "
            f"{', '.join(pd.unique(sets))}."
        )
    grid = list(itertools.islice(_simplex(len(tables), steps), _MOST + 1))
    if len(grid) > _MOST:
        raise OodlibError(
            f"choose_weights: {len(tables)} models with {steps} steps give more than {_MOST} "
            "vectors. Give fewer models or steps."
        )
    grid.sort(key=lambda w: sum(x * x for x in w))  # the most even first: max keeps the first
    ids, ood = values[sets == validation], values[sets == validation_ood]
    vectors = [np.full(len(tables), 1 / len(tables)), *(np.array(w) / steps for w in grid)]
    best = max(vectors, key=lambda w: auroc(ids @ w, ood @ w))
    return dict(zip(tables, best.tolist(), strict=True))


def against_best(
    average: DataFrame,
    tables: Mapping[str, DataFrame],
    score: str,
    *,
    near: Sequence[str],
    id_set: str = "id",
    n_boot: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Class-mean AUROC of an average minus that of its best model, picked on the same test images.

    Picking the best on test (and again in every resample) favours the single model. The interval
    resamples images of ID and of every class.
    """
    methods = {"": average} | {f"model {name}": table for name, table in tables.items()}
    scores = {}
    for name, table in methods.items():
        classes = _rows(table, near).groupby(["set", "label"], sort=False)[score]
        ids = _rows(table, [id_set])[score].to_numpy()
        scores[name] = ids, [part.to_numpy() for _, part in classes]
    by_method = replicates(auroc, scores, n=n_boot, seed=seed)
    value, draws = by_method.pop("")
    best = max(v for v, _ in by_method.values())
    best_draws = np.max([d for _, d in by_method.values()], axis=0)
    return Estimate.of(value - best, draws - best_draws, n=len(ids), clusters=len(tables))


def _rows(table: DataFrame, sets: Sequence[str]) -> DataFrame:
    missing = [name for name in sets if not (table["set"] == name).any()]
    if missing or not sets:
        raise OodlibError(
            f"The score table has no set {missing[0] if missing else '(none was named)'}; it has "
            f"{', '.join(pd.unique(table['set']))}."
        )
    return table[table["set"].isin(sets)]


def _scaled(
    tables: Mapping[str, DataFrame], score: str, validation: str, scale: str
) -> NDArray[np.float64]:
    """(rows, models): the score of each model on the scale of its ID validation images."""
    if not tables or scale not in ("z", "rank"):
        raise OodlibError(
            f'averaged: needs at least one model and scale "z" or "rank", got {len(tables)} and '
            f"{scale!r}."
        )
    first, columns = next(iter(tables.values())), []
    for name, table in tables.items():
        keys, expected = table[_KEYS].to_numpy(), first[_KEYS].to_numpy()
        if len(keys) != len(expected) or not (keys == expected).all():
            raise OodlibError(
                f"averaged: {name} was scored on other images than the first model. Score all "
                "models on the same sets."
            )
        known = np.sort(_rows(table, [validation])[score].to_numpy(np.float64))
        values = table[score].to_numpy(np.float64)
        if scale == "z":
            columns.append((values - known.mean()) / max(known.std(), 1e-12))
        else:
            columns.append(_share_below(known, values))
    return np.stack(columns, axis=1)


def _share_below(known: NDArray, values: NDArray) -> NDArray[np.float64]:
    """Share of the sorted ``known`` below each value, ties half."""
    both = np.searchsorted(known, values, "left") + np.searchsorted(known, values, "right")
    return both / (2 * len(known))


def _simplex(models: int, steps: int) -> Iterator[tuple[int, ...]]:
    """Vectors of ``models`` whole numbers >= 0 that sum to ``steps``."""
    if models == 1:
        yield (steps,)
        return
    for first in range(steps + 1):
        for rest in _simplex(models - 1, steps - first):
            yield first, *rest
