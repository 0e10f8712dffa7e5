"""Tables of several flows along their trainings, made from a `Study`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from oodlib.metrics.statistics import spearman_along
from oodlib.studies.flows.maturity import Pairs, Study

_SHORT = {"fashion-mnist": "F-MNIST", "tiny-imagenet": "TIN", "-incomplete": ""}


def short(label: str) -> str:
    """A set, or a pair of sets, by short names for figures.

    >>> short("fashion-mnist → omniglot-incomplete")
    'F-MNIST → omniglot'
    """
    for name, brief in _SHORT.items():
        label = label.replace(name, brief)
    return label


def flow_table(study: Study) -> pd.DataFrame:
    """One row per run: its images, size and length, and whether it is mature and detects."""
    rows = []
    for run in study.runs.values():
        last, found = run.record["history"][-1], study.aurocs[run.name, 1]
        mature, why = study.mature(run.spec.name)
        row = {
            "flow": run.name,
            "ID": run.spec.id_set,
            "training images": run.record["n_train"],
            "parameters": sum(p.numel() for p in run.spec.network().parameters()),
            "steps": int(last["step"]),
            "epochs": last["epoch"],
            "mature": "yes" if mature else "no",
            "why": why,
            "beats chance": "yes" if study.beats_chance(run.spec.name) else "no",
            "images a set": found.n,
            "OOD sets": ", ".join(found.sets),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def history(study: Study) -> pd.DataFrame:
    """Validation and training bits per dim of every run and saved step."""
    parts = []
    for members in study.families.values():
        for run in members:
            keys = {"flow": run.spec.name, "ID": run.spec.id_set, "seed": run.seed}
            parts.append(pd.DataFrame(run.record["history"]).assign(model=run.name, **keys))
    return pd.concat(parts, ignore_index=True)


def curves(study: Study, names: Sequence[str]) -> pd.DataFrame:
    """AUROC (%) of single images along training, a row per run, OOD set, step and score.

    Columns flow, seed, main (whether the run is the one shown), pair, step, score, value, low,
    high.
    """
    rows = []
    for run in study.runs.values():
        found, main = study.aurocs[run.name, 1], run in study.mains.values()
        keys = {"flow": run.spec.name, "seed": run.seed, "main": main}
        for (step, score), values in found.values.items():
            if score in names:
                low, high = found.ends(step, score)
                pair = [f"{run.spec.id_set} → {ood}" for ood in found.sets]
                ends = {"value": 100 * values, "low": 100 * low, "high": 100 * high}
                rows.append(pd.DataFrame({"pair": pair, "step": step, "score": score, **ends}))
                rows[-1] = rows[-1].assign(**keys)
    return pd.concat(rows, ignore_index=True)


def results(study: Study) -> Iterator[dict[str, Any]]:
    """Rows for results.csv: bits per dim of every step, then AUROCs with their intervals.

    Likelihood and density at every step, the other scores after one epoch and at the last step.
    """
    for row in history(study).to_dict("records"):
        what = {"method": "flow", "variant": f"step {row['step']}", "metric": "bits per dim"}
        where = {"model": row["model"], "id": row["ID"], "ood": "", "seed": row["seed"]}
        yield where | what | {"value": row["validation_bpd"]}
    for (name, size), found in study.aurocs.items():
        run = study.runs[name]
        ends = study.step(run, "one epoch"), study.step(run, "last")
        for (step, score), values in found.values.items():
            if step not in ends and score not in ("nll", "density"):
                continue
            low, high = found.ends(step, score)
            what = {"method": score, "variant": f"step {step}, B = {size}", "metric": "auroc"}
            where = {"model": name, "id": run.spec.id_set, "seed": run.seed}
            counts = {"n_id": found.n, "n_ood": found.n}
            for i, ood in enumerate(found.sets):
                interval = {"value": values[i], "low": low[i], "high": high[i]}
                yield where | {"ood": ood} | what | interval | counts


def overlap_along(study: Study, *, n_boot: int = 100) -> tuple[pd.DataFrame, Pairs]:
    """Overlap and AUROC of the density at every step after 0, and their Spearman correlations.

    The table has a row per run, step and OOD set; the correlation of a pair along the training
    is the mean over its seeds.
    """
    rows, rhos, rho_draws = [], [], []
    n_boot = min(n_boot, study.n_boot)
    for members in study.families.values():
        of_seeds = []
        for run in members:
            found = study.aurocs[run.name, 1]
            steps, shared, drawn = study.overlaps(run, n_boot=n_boot)
            wide = study.overlaps(run, bandwidth=0.5, n_boot=1)[1]
            auroc = np.array([found.values[step, "density"] for step in steps])
            draws = np.array([found.draws[step, "density"][:n_boot] for step in steps])
            of_seeds.append((spearman_along(shared, auroc), spearman_along(drawn, draws)))
            for (at, step), (i, ood) in itertools.product(enumerate(steps), enumerate(found.sets)):
                cells = {
                    "overlap": shared[at, i],
                    "overlap, bandwidth 0.5": wide[at, i],
                    "AUROC nll": 100 * found.values[step, "nll"][i],
                    "AUROC density": 100 * auroc[at, i],
                }
                rows.append({"flow": run.name, "OOD": ood, "step": step, **cells})
        rhos.append(np.mean([rho for rho, _ in of_seeds], axis=0))
        rho_draws.append(np.mean([draws for _, draws in of_seeds], axis=0))
    labels = study.pairs("density", "last").labels
    draws = np.concatenate(rho_draws, axis=1)
    return pd.DataFrame(rows), Pairs(np.concatenate(rhos), draws, labels, study.n())
