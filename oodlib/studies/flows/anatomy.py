"""Where the layer-wise density comes from, and whether its two assumptions hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import kstest, norm
from sklearn.covariance import LedoitWolf

from oodlib import metrics
from oodlib.data import DatasetNotFound
from oodlib.models.device import pick_device
from oodlib.scores.layerwise import LayerwiseDensity
from oodlib.studies.flows.runs import FlowRun
from oodlib.studies.flows.score_images import dequantised, gradient_norms, group_bits
from oodlib.studies.flows.specs import flow_sets

_KINDS = {  # of tensors, by their names
    "actnorm": "actnorm|norm1|norm2",
    "1x1 convolution": "mix",
    "coupling, hidden": "conv1|conv2",
    "coupling, last": "conv3",
    "prior": "split|top",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """Gradient norms of every tensor of a flow at its last step.

    Attributes
    ----------
    levels : of the flow
    tensors : (L,) names
    norms : set -> (n, L) squared norms; "fit", "id" and OOD sets
    density : fitted on "fit"
    """

    levels: int
    tensors: NDArray[np.str_]
    norms: dict[str, NDArray[np.float64]]
    density: LayerwiseDensity

    @property
    def ood(self) -> list[str]:
        """Names of the OOD sets."""
        return [name for name in self.norms if name not in ("fit", "id")]

    @property
    def gaussians(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of u of each tensor that counts, on the fit images."""
        kept = self.density.kept_
        return self.density.mean_[kept], np.sqrt(self.density.variance_[kept])

    def u(self, name: str) -> NDArray[np.float64]:
        """Log norms (n, tensors that count) of the images of a set that did not overflow."""
        u = self.density.log_norms(self.norms[name])[:, self.density.kept_]
        return u[np.isfinite(u).all(1)]

    def terms(self, name: str) -> NDArray[np.float64]:
        """Each tensor's part of the density, (n, L)."""
        return self.density.terms(self.norms[name])

    def parts(self) -> pd.DataFrame:
        """AUROC (%) of each level and each kind of tensor alone: part, tensors, OOD, AUROC."""
        names, terms = pd.Series(self.tensors), {k: self.terms(k) for k in ("id", *self.ood)}
        groups = {
            f"level {i + 1}": names.str.startswith(f"levels.{i}.") for i in range(self.levels)
        }
        groups |= {kind: names.str.contains(pattern) for kind, pattern in _KINDS.items()}
        rows = []
        for (part, inside), ood in itertools.product(groups.items(), self.ood):
            columns = inside.to_numpy() & self.density.kept_
            if columns.any():
                of_id, of_ood = (terms[name][:, columns].sum(1) for name in ("id", ood))
                auroc = 100 * metrics.auroc(of_id, of_ood)
                rows.append({"part": part, "tensors": columns.sum(), "OOD": ood, "AUROC": auroc})
        return pd.DataFrame(rows)

    def full_covariance(self) -> pd.DataFrame:
        """AUROC (%) of independent Gaussians and of one with a full, shrunk covariance."""
        full, rows = LedoitWolf().fit(self.u("fit")), []
        for ood in self.ood:
            independent = [self.terms(name).sum(1) for name in ("id", ood)]
            far = []
            for name in ("id", ood):
                u = self.density.log_norms(self.norms[name])[:, self.density.kept_]
                distance = full.mahalanobis(np.nan_to_num(u, posinf=0))
                far.append(np.where(np.isfinite(u).all(1), distance, np.inf))
            found = {"independent": independent, "full covariance": far}
            rows.append({"OOD": ood} | {k: 100 * metrics.auroc(*v) for k, v in found.items()})
        return pd.DataFrame(rows)

    def chi_squared(self) -> NDArray[np.float64]:
        """Kolmogorov distance of each tensor's ID norms from a scaled chi-squared variable.

        Scale and degrees of freedom are fitted, by two moments, on the same images.
        """
        f = np.exp(self.u("id"))
        freedom = 2 * f.mean(0) ** 2 / f.var(0)
        scaled = zip((f / f.mean(0) * freedom).T, freedom, strict=True)
        return np.array([kstest(values, "chi2", (k,)).statistic for values, k in scaled])


def dissect(
    runs: Iterable[FlowRun], *, n: int, device: str = "auto", leave_out: Collection[str] = ()
) -> dict[str, Anatomy]:
    """`Anatomy` of each flow whose last weights and images are here, by the flow's name.

    It prints what it measured and what it had to leave out.

    n : images of each set;   leave_out : sets to skip
    """
    found = {}
    for run in runs:
        last = run.record["history"][-1]["step"]
        if last not in run.weights:
            continue
        try:
            sets = flow_sets(run.spec, n_fit=n, n_test=n, n_ood=n)
        except DatasetNotFound as error:
            print(f"{run.name} left out: {error}")
            continue
        x = {name: dequantised(images) for name, images in sets.items() if name not in leave_out}
        flow = run.model(last).to(pick_device(device))
        tensors = np.array([name for name, _ in flow.named_parameters()])
        norms = {name: gradient_norms(flow, images) for name, images in x.items()}
        density = LayerwiseDensity().fit(norms["fit"])
        found[run.spec.name] = Anatomy(
            levels=run.spec.levels, tensors=tensors, norms=norms, density=density
        )
        bpd = group_bits(flow, x["id"]).mean() / math.prod(run.spec.image_shape)
        print(
            f"{run.name}: {bpd:.3f} bits/dim on ID images; {density.kept_.sum()} of {len(tensors)} "
            f"tensors have a gradient that varies. Left out: {', '.join(tensors[~density.kept_])}"
        )
    return found


def kolmogorov(u: NDArray[Any], mean: NDArray[Any], sd: NDArray[Any]) -> NDArray[np.float64]:
    """Kolmogorov distance of each column of u (n, L) from N(mean, sd^2).

    >>> kolmogorov(np.array([[0.0]]), np.array([0.0]), np.array([1.0])).tolist()
    [0.5]
    """
    cdf, ranks = norm.cdf(np.sort(u, axis=0), mean, sd), np.arange(1, len(u) + 1)[:, None] / len(u)
    distance: NDArray[np.float64] = np.maximum(ranks - cdf, cdf - ranks + 1 / len(u)).max(0)
    return distance


def mean_correlation(u: NDArray[Any]) -> float:
    """Mean absolute correlation between two different columns of u (n, L).

    >>> round(mean_correlation(np.array([[0.0, 1.0], [1.0, 0.0], [2.0, -1.0]])), 3)
    1.0
    """
    r = np.abs(np.corrcoef(u, rowvar=False))
    return float((r.sum() - len(r)) / (r.size - len(r)))
