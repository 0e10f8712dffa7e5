"""What the study measures on one model: nine scores, and the geometry of its features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from oodlib.errors import OodlibError
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores import energy, knn, mahalanobis, max_logit, msp, relative_mahalanobis, vim
from oodlib.scores.moments import Moments
from oodlib.studies.vits.reference import Reference, unit

if TYPE_CHECKING:
    from pandas import DataFrame


_LOGIT_SCORES = ("msp", "max_logit", "energy")
_DISTANCES = ("mahalanobis", "relative_mahalanobis")
SCORES = (*_LOGIT_SCORES, *_DISTANCES, *(f"{name}++" for name in _DISTANCES), "vim", "knn")

Array = NDArray[np.float64]


def all_scores(reference: Reference, bank: FeatureBank) -> dict[str, Array]:
    """Every score of `SCORES`; larger = more OOD.

    "++" stands for L2-normalised features, in fitting and scoring (arXiv 2505.18032). ViM's space
    and the Mahalanobis distances use all training features; ViM's alpha and the neighbours use the
    subsample of the reference.

    Returns
    -------
    name -> (N,) float64

    Raises
    ------
    OodlibError : the bank is of another network
    """
    if bank.head.digest != reference.head.digest:
        raise OodlibError(
            "all_scores: the bank and the reference are of two networks: their heads differ. Fit "
            "and score with the same model."
        )
    scores = {
        "msp": msp(bank.logits),
        "max_logit": max_logit(bank.logits),
        "energy": energy(bank.logits),
        "vim": vim(bank.features, bank.logits, **reference.virtual),
        "knn": knn(bank.features, reference.features, k=reference.neighbours),
    }
    for suffix, moments, features in (
        ("", reference.moments, bank.features),
        ("++", reference.unit_moments, unit(bank.features)),
    ):
        within, total = reference.whitenings[suffix]
        scores[f"mahalanobis{suffix}"] = mahalanobis(features, moments.class_means, within)
        scores[f"relative_mahalanobis{suffix}"] = relative_mahalanobis(
            features, moments.class_means, within, moments.mean, total
        )
    return {name: scores[name] for name in SCORES}


def score_table(reference: Reference, banks: Mapping[str, FeatureBank]) -> DataFrame:
    """One row per image: set, index there, label (-1: unknown) and every score (float32).

    banks : set name -> bank

    Raises
    ------
    OodlibError : there is no bank, or one is of another network
    """
    import pandas as pd

    if not banks:
        raise OodlibError("score_table: there is no bank to score.")
    parts = []
    for name, bank in banks.items():
        labels = np.full(len(bank), -1) if bank.labels is None else np.asarray(bank.labels)
        keys = {"set": name, "index": np.arange(len(bank)), "label": labels}
        scores = {k: v.astype(np.float32) for k, v in all_scores(reference, bank).items()}
        parts.append(pd.DataFrame({**keys, **scores}))
    return pd.concat(parts, ignore_index=True)


def geometry(reference: Reference) -> dict[str, float]:
    r"""Measures of the training features of one model.

    - norm_mean, norm_spread: mean of ||phi||, and its standard deviation divided by the mean
      (subsample)
    - variance_deviation, variance_deviation++ (of unit features): how far the classes are from
      sharing one covariance, ``(1/C) sum_c |tr(Sigma^+ Sigma_c) / r - 1|``, r the rank of Sigma;
      Sigma and the class means from all features, ``Sigma_c`` about its mean from the subsample.
      0 where all classes spread equally
    - nc1: ``tr(Sigma_W Sigma_B^+) / C``, Sigma_B the mean of (mu_c - mu_G)(mu_c - mu_G)^T, mu_G
      the mean of the class means; 0 at collapse
    - nc2_norm: standard deviation of ||mu_c - mu_G|| divided by its mean; 0 at collapse
    - nc2_angle: mean over pairs of classes of |cos(mu_c - mu_G, mu_c' - mu_G) + 1/(C-1)|; 0 at
      collapse, which needs D >= C - 1

    Returns
    -------
    name -> value, without unit (norm_mean in the unit of the features)

    References
    ----------
    Papyan, Han, Donoho, PNAS 2020, arXiv 2008.08186 (neural collapse)

    Notes
    -----
    arXiv 2505.18032 compares covariances in its Eq. 5, which we have not read; this measure is
    ours. It averages over directions, so that 50 images per class suffice: the sampling noise is
    about sqrt(2 / (r n_c)).
    """
    norms = np.linalg.norm(reference.features.astype(np.float64), axis=1)
    found = {"norm_mean": float(norms.mean()), "norm_spread": float(norms.std() / norms.mean())}
    for suffix, moments, features in (
        ("", reference.moments, reference.features),
        ("++", reference.unit_moments, unit(reference.features)),
    ):
        within, x = reference.whitenings[suffix][0], np.asarray(features, dtype=np.float64)
        deviation = _variance_deviation(moments, within, x, reference.labels)
        found[f"variance_deviation{suffix}"] = deviation
    return found | _collapse(reference.moments)


def norm_correlation(reference: Reference, bank: FeatureBank) -> dict[str, float]:
    """Spearman correlation of ||phi|| and each score over one set; nan where one is constant."""
    norms = np.linalg.norm(np.asarray(bank.features, dtype=np.float64), axis=1)
    rho = dict.fromkeys(SCORES, float("nan"))
    for name, score in all_scores(reference, bank).items():
        if np.ptp(score) and np.ptp(norms):
            rho[name] = float(spearmanr(norms, score).statistic)
    return rho


def _variance_deviation(
    moments: Moments, whitening: Array, features: Array, labels: NDArray[np.int64]
) -> float:
    white = (features - moments.class_means[labels]) @ whitening
    squared = np.square(white).mean(1)  # tr(Sigma^+ x x^T) / r
    ratio = np.bincount(labels, weights=squared) / np.bincount(labels)
    return float(np.abs(ratio - 1).mean())


def _collapse(moments: Moments) -> dict[str, float]:
    spread = moments.class_means - moments.class_means.mean(0)
    classes = len(spread)
    _, sizes, directions = np.linalg.svd(spread, full_matrices=False)
    in_span = sizes > 1e-8 * sizes[0]  # rank at most C - 1
    directions, sizes = directions[in_span], sizes[in_span]
    within = np.einsum("rd,de,re->r", directions, moments.covariance, directions)
    norms = np.linalg.norm(spread, axis=1)
    cosines = (spread / norms[:, None]) @ (spread / norms[:, None]).T
    pairs = cosines[np.triu_indices(classes, 1)]
    return {
        "nc1": float((within / np.square(sizes)).sum()),  # Sigma_B has eigenvalues sizes^2 / C
        "nc2_norm": float(norms.std() / norms.mean()),
        "nc2_angle": float(np.abs(pairs + 1 / (classes - 1)).mean()),
    }
