r"""Scores of a generative model's gradients and likelihoods; larger = more OOD, +inf = most OOD.

f_l = ||d sum_b log p(x_b) / d theta_l||^2 comes from `oodlib.gradients.layer_gradient_norms`; a row
is an image or a group of B images.
"""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from oodlib.arrays import to_numpy
from oodlib.errors import OodlibError, check_interval

Floats = NDArray[np.float64]


class LayerwiseDensity:
    r"""Density of log gradient norms: one Gaussian for every parameter tensor, fitted on ID rows.

    u_l = log f_l

    S = -sum_l log N(u_l; mu_l, sigma_l^2)
      = sum_l 1/2 [(u_l - mu_l)^2 / sigma_l^2 + log(2 pi sigma_l^2)]

    Two-sided: a gradient that is too small counts as much as one that is too large.

    Parameters
    ----------
    epsilon : 0, the definition: tensors whose gradient is zero for a fit row, or the same for all,
        are left out, and a zero met later counts as the smallest fitted value. Above 0, as in the
        released code (1e-10): u = log(f + epsilon), sigma^2 + epsilon, every tensor counts; then
        the unit of the objective matters.

    Attributes
    ----------
    mean_, variance_ : (L,) of u over the fit rows, unbiased
    kept_ : (L,) bool, the tensors that count
    overflowed_ : fit rows left out because a norm was infinite

    References
    ----------
    Montazeran, Köthe 2025, arXiv 2502.00820; Dauncey et al., TMLR 2024, arXiv 2403.01485

    Examples
    --------
    >>> density = LayerwiseDensity().fit([[1.0, 2.0], [2.0, 1.0], [4.0, 4.0]])
    >>> density.score([[2.0, 2.0], [200.0, 0.02]]).round(1)
    array([ 1.1, 45.2])
    """

    def __init__(self, *, epsilon: float = 0.0):
        check_interval("LayerwiseDensity: epsilon", epsilon, "[0, 1)")
        self.epsilon = epsilon

    def fit(self, norms: Any) -> Self:
        """Fit on norms (N, L) of ID rows, squared L2, at least two without overflow."""
        f = _norms(norms, "LayerwiseDensity.fit")
        finite = np.isfinite(f).all(1)
        self.overflowed_, f = int((~finite).sum()), f[finite]
        if len(f) < 2:
            raise OodlibError(
                f"LayerwiseDensity.fit: needs at least 2 rows of finite norms, got {len(f)} "
                f"({self.overflowed_} overflowed). Give more ID images, or a flow that trained "
                "stably."
            )
        self._floor = f.min(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            u = np.log(f + self.epsilon)
            self.mean_, self.variance_ = u.mean(0), u.var(0, ddof=1) + self.epsilon
            varies = (self._floor > 0) & (np.ptp(u, 0) > 0)
        self.kept_ = np.ones_like(varies) if self.epsilon else varies
        if not self.kept_.any():
            raise OodlibError(
                "LayerwiseDensity.fit: every tensor has a zero or constant gradient, so there is "
                "nothing to fit. Check the objective, and that the fit images differ."
            )
        return self

    def log_norms(self, norms: Any) -> Floats:
        """u (n, L); NaN for tensors that are left out."""
        if not hasattr(self, "mean_"):
            raise OodlibError("LayerwiseDensity: call fit(norms of ID rows) first.")
        f = _norms(norms, "LayerwiseDensity")
        if f.shape[1] != len(self.mean_):
            raise OodlibError(
                f"LayerwiseDensity: fitted on {len(self.mean_)} tensors, got norms of "
                f"{f.shape[1]}. Take both from one network."
            )
        f = f + self.epsilon if self.epsilon else np.where(f > 0, f, self._floor)
        with np.errstate(divide="ignore"):
            u: Floats = np.log(f)
        u[:, ~self.kept_] = np.nan
        return u

    def terms(self, norms: Any) -> Floats:
        """Each tensor's part of the score, (n, L): 0 if left out, +inf after an overflow."""
        u = self.log_norms(norms)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            deviation = (u - self.mean_) ** 2 / self.variance_
            out: Floats = 0.5 * (deviation + np.log(2 * np.pi * self.variance_))
        out[:, ~self.kept_] = 0.0
        return out

    def score(self, norms: Any) -> Floats:
        """S (n,), +inf where a norm overflowed."""
        return np.asarray(self.terms(norms).sum(1))


def naive_norm(norms: Any) -> Floats:
    """Log of the squared norm of the whole gradient, log sum_l f_l, (n,)."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(_norms(norms, "naive_norm").sum(1)))


def typicality(nll: Any, fit_nll: Any) -> Floats:
    """|nll - mean of fit_nll|, (n,): how far from the typical set.

    Nalisnick et al. 2019, arXiv 1906.02994, without the bootstrap, as Dauncey et al. use it.
    nll (n,), fit_nll (m,) in one unit; infinite fit rows are left out, an infinite nll scores +inf.
    """
    nll, fit = _vector(nll, "typicality"), _vector(fit_nll, "typicality")
    fit = fit[np.isfinite(fit)]
    if len(fit) == 0:
        raise OodlibError(
            "typicality: no finite likelihood to average. Give ID images of a flow that trained "
            "stably."
        )
    return np.asarray(np.abs(nll - fit.mean()))


def input_complexity(nll_bits: Any, code_bits: Any) -> Floats:
    """-log2 p(x) - L(x), (n,): the likelihood beside a general-purpose code.

    nll_bits (n,) and code_bits (n,), both in bits per image (or per group), from `compressed_bits`.
    Serrà et al. 2020, arXiv 1909.11480.
    """
    nll, code = _vector(nll_bits, "input_complexity"), _vector(code_bits, "input_complexity")
    if len(nll) != len(code) or not np.isfinite(code).all():
        raise OodlibError(
            f"input_complexity: needs a finite code length for each of {len(nll)} images, got "
            f"{len(code)}."
        )
    return nll - code


def _norms(norms: Any, name: str) -> Floats:
    f = np.array(to_numpy(norms), dtype=np.float64)
    if f.ndim != 2 or 0 in f.shape or not (f >= 0).all():  # NaN fails too
        raise OodlibError(
            f"{name}: needs squared norms (N, tensors), none negative or NaN, got shape {f.shape}. "
            "Use layer_gradient_norms."
        )
    return f


def _vector(values: Any, name: str) -> Floats:
    v = np.asarray(to_numpy(values), dtype=np.float64)
    if v.ndim != 1 or len(v) == 0 or np.isnan(v).any() or (v == -np.inf).any():
        raise OodlibError(
            f"{name}: needs values (n,), none NaN or -inf, got shape {v.shape}. Use -log_prob."
        )
    return v
