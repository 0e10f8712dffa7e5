"""OPNP: the head's least and most sensitive weights and neurons are removed."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodlib import arrays
from oodlib.arrays import Array, check_rows, check_temperature, tensor64, to_numpy
from oodlib.errors import OodlibError, check_interval, one_of
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import register
from oodlib.scores.shaper import Shaper, shaped_bank

Neurons = Literal["outgoing", "activation"]
Scope = Literal["global", "class"]


def opnp_sensitivity(features: Array, logits: Any, *, temperature: float = 1.0) -> Array:
    r"""Mean size of the energy's gradient at each weight of the head, without autograd.

    M_ji = (1/m) sum_k |dE/dW_ji (x_k)| = (1/m) sum_k p_kj |h_ki|,   p = softmax(logits / T)

    One matrix product, a block of rows at a time: memory-mapped banks of any length are fine.
    Shards add: the M of all rows is the mean of the shards' M, weighted by their numbers of rows.

    Parameters
    ----------
    features : (m, D), of either sign
    logits : (m, C), before division by the temperature
    temperature : T > 0; the energy is -T logsumexp(logits / T)

    Returns
    -------
    (C, D) float64, in the unit of the features

    Raises
    ------
    OodlibError : row counts differ, there is no row, a temperature that is not positive

    References
    ----------
    Chen, Fu, Liu, Chen, Tao, Ye, NeurIPS 2023, arXiv 2402.10062; the closed form is derived in the
    notebook on OPNP

    Examples
    --------
    >>> opnp_sensitivity(np.array([[1., -2.]]), np.log([[3., 1.]]))
    array([[0.75, 1.5 ],
           [0.25, 0.5 ]])
    """
    return _mean("opnp_sensitivity", features, logits, temperature, lambda h, p: p.T @ h.abs())


def opnp_neurons(
    features: Array,
    logits: Any,
    weight: Any,
    *,
    definition: Neurons = "outgoing",
    temperature: float = 1.0,
) -> Array:
    r"""Sensitivity of each neuron before the head, by two definitions; the paper's was not read.

    "outgoing": the mean over classes of M, ``mean |h_i| / C``, which depends neither on the weights
    nor on the logits. "activation": ``mean |dE/dh_i| = mean |sum_j p_j W_ji|``, which is not zero
    for a neuron that never fires.

    Parameters
    ----------
    features, logits, temperature : as in `opnp_sensitivity`
    weight : (C, D)

    Returns
    -------
    (D,) float64

    Raises
    ------
    OodlibError : an unknown definition, or shapes that do not fit

    Examples
    --------
    >>> opnp_neurons(np.array([[1.0, -2.0]]), np.log([[3.0, 1.0]]), np.eye(2))
    array([0.5, 1. ])
    """
    one_of("opnp_neurons: definition", definition, get_args(Neurons))
    w, size = tensor64(weight), (np.shape(logits)[-1], np.shape(features)[-1])
    if tuple(w.shape) != size:
        raise OodlibError(
            f"opnp_neurons: weight must be (C, D) = {size}, got {tuple(w.shape)}. Is it "
            "transposed, or of another network?"
        )

    def of_rows(h: Tensor, p: Tensor) -> Tensor:
        if definition == "outgoing":
            return h.abs().sum(0) / p.shape[1]
        return (p @ w.to(p.device)).abs().sum(0)

    return _mean("opnp_neurons", features, logits, temperature, of_rows)


def _mean(
    name: str,
    features: Array,
    logits: Any,
    temperature: float,
    of_rows: Callable[[Tensor, Tensor], Tensor],
) -> Array:
    """Sum of ``of_rows(h, p)`` over blocks of rows in float64, divided once by their number."""
    check_temperature(name, temperature)
    check_rows(name, features, logits)
    count = len(features)
    rows = max(1, arrays.BLOCK // max(np.shape(features)[1], np.shape(logits)[1]))
    total = torch.zeros(())
    for i in range(0, count, rows):
        h, z = tensor64(features[i : i + rows]), tensor64(logits[i : i + rows])
        total = total.to(h.device) + of_rows(h, (z / temperature).softmax(1))
    if not torch.isfinite(total).all():
        raise OodlibError(
            f"{name}: features or logits hold NaN or infinity. Check the transform and the weights."
        )
    return total / count if isinstance(features, Tensor) else (total / count).numpy()


def kept(
    values: Any, *, low: float = 0.0, high: float = 0.0, scope: Scope = "global"
) -> NDArray[np.bool_]:
    """Which entries are left without the ``floor(low n)`` smallest and ``floor(high n)`` largest.

    Counts are exact, whatever the ties: of equal values the first counts as the smaller. Hence a
    higher ratio never brings an entry back, and the two tails never overlap.

    Parameters
    ----------
    values : any shape; sensitivities (C, D) of weights or (D,) of neurons
    low, high : shares, in [0, 1), together below 1
    scope : "global": n is the number of all values; "class": every row on its own

    Returns
    -------
    bool array of the same shape

    Raises
    ------
    OodlibError : a ratio outside [0, 1), ratios that remove everything, an unknown scope, NaN

    Examples
    --------
    >>> kept([0.1, 0.4, 0.2, 0.3], low=0.25, high=0.25)
    array([False, False,  True,  True])
    """
    for name, ratio in {"low": low, "high": high}.items():
        check_interval(f"opnp: {name}", ratio, "[0, 1)", "Ten per cent is 0.1.")
    if low + high >= 1:
        raise OodlibError(
            f"opnp: low + high must be below 1, got {low} + {high}: nothing would be left."
        )
    rank, n = ranks(values, scope=scope)
    return (rank >= tail_size(low, n)) & (rank < n - tail_size(high, n))


def ranks(values: Any, *, scope: Scope = "global") -> tuple[NDArray[np.int64], int]:
    """Place of each entry in ascending order (ties by index), and how many are ranked together.

    Raises
    ------
    OodlibError : an unknown scope, NaN
    """
    one_of("opnp: scope", scope, get_args(Scope))
    values = to_numpy(values)
    if np.isnan(values).any():
        raise OodlibError(
            "opnp: sensitivities hold NaN. Check the features and logits they were made from."
        )
    rows = values.reshape(1, -1) if scope == "global" else values.reshape(len(values), -1)
    rank, n = np.empty(rows.shape, np.int64), rows.shape[1]
    np.put_along_axis(rank, np.argsort(rows, axis=1, kind="stable"), np.arange(n)[None], 1)
    return rank.reshape(values.shape), n


def tail_size(ratio: float, n: int) -> int:
    """floor(ratio n), and not one less where ``ratio n`` is rounded: 0.29 * 100 is 28.99999."""
    return math.floor(ratio * n + 1e-9)


def opnp(
    weight: Any,
    sensitivity: Any,
    neurons: Any = None,
    *,
    weight_low: float = 0.0,
    weight_high: float = 0.0,
    neuron_low: float = 0.0,
    neuron_high: float = 0.0,
    scope: Scope = "global",
) -> NDArray[np.float64]:
    r"""The head without its least and most sensitive weights and neurons: not a score, but for one.

    Parameters
    ----------
    weight, sensitivity : (C, D); of `opnp_sensitivity`
    neurons : (D,), of `opnp_neurons`; needed where a neuron ratio is not 0
    weight_low, weight_high, neuron_low, neuron_high : shares to remove, see `kept`
    scope : of the weights' ranking

    Returns
    -------
    (C, D) float64; columns of removed neurons are 0

    Raises
    ------
    OodlibError : ratios as in `kept`, shapes that do not fit, or no weight is left

    References
    ----------
    Chen, Fu, Liu, Chen, Tao, Ye, NeurIPS 2023, arXiv 2402.10062: OPP removes weights, ONP neurons,
    OPNP both

    Examples
    --------
    >>> opnp([[1.0, 2.0], [3.0, 4.0]], [[0.1, 0.2], [0.3, 0.4]], weight_low=0.25, weight_high=0.25)
    array([[0., 2.],
           [3., 0.]])
    """
    weight, sensitivity = to_numpy(weight).astype(np.float64), to_numpy(sensitivity)
    if weight.ndim != 2 or sensitivity.shape != weight.shape:
        raise OodlibError(
            f"opnp: weight and sensitivity need the same shape (C, D), got {weight.shape} and "
            f"{sensitivity.shape}. Were they made from one head?"
        )
    mask = kept(sensitivity, low=weight_low, high=weight_high, scope=scope)
    if neuron_low or neuron_high:
        if neurons is None or np.shape(neurons) != weight.shape[1:]:
            raise OodlibError(
                f"opnp: neurons must be (D,) = {weight.shape[1:]} where a neuron ratio is not 0, "
                f"got {None if neurons is None else tuple(np.shape(neurons))}. See opnp_neurons."
            )
        mask &= kept(neurons, low=neuron_low, high=neuron_high)
    _check_left(mask)
    return np.where(mask, weight, 0)


def _check_left(mask: NDArray[np.bool_]) -> None:
    if not mask.any():
        raise OodlibError(
            "opnp: no weight is left: the neurons that stay have lost all their weights. Lower the "
            "ratios."
        )


@register(
    key="opnp",
    title="Optimal Parameter and Neuron Pruning for Out-of-Distribution Detection",
    authors="Chen, Fu, Liu, Chen, Tao, Ye",
    year=2023,
    arxiv="2402.10062",
    needs="features",
    deviations=(
        "no code or full text could be read: ratios, scope and neuron formula are ours",
        "closed form instead of a backward pass per image; equal to rounding",
    ),
)
class OPNP(Shaper):
    """Detector of ``then`` behind a head pruned by what ID training images say.

    The four ratios are shares of weights and of neurons, removed at the low and the high end of
    their sensitivity. The defaults are the mildest of the suite's grid; choose them with
    `oodlib.scores.opnp_ratios`.

    neurons : "outgoing" or "activation", see `opnp_neurons`
    scope : of the weights' ranking, "global" or "class"
    order : "one-shot", both masks from the network as it is; "sequential", neurons first and M
        again without them, the weights' ratios then counting weights of the neurons that are left
    temperature : of the sensitivities; the score has its own

    A chain applies its shapers in the order it names them: ``create("ash", then="opnp")`` shapes
    before pruning.
    """

    weight_low: float = 0.1
    weight_high: float = 0.001
    neuron_low: float = 0.1
    neuron_high: float = 0.001
    neurons: Neurons = "outgoing"
    scope: Scope = "global"
    order: Literal["one-shot", "sequential"] = "one-shot"
    temperature: float = 1.0

    def _learn(self, bank: FeatureBank) -> None:
        h, z, temperature = bank.features, bank.logits, self.temperature
        values = opnp_neurons(
            h, z, bank.head.weight, definition=self.neurons, temperature=temperature
        )
        self.neurons_ = kept(values, low=self.neuron_low, high=self.neuron_high)
        ratios: Any = {"low": self.weight_low, "high": self.weight_high, "scope": self.scope}
        if self.order == "sequential":
            weights = np.ones(bank.head.weight.shape, bool)
            left = self._without_neurons(bank)[:, self.neurons_]
            weights[:, self.neurons_] = kept(left, **ratios)
        else:
            weights = kept(opnp_sensitivity(h, z, temperature=temperature), **ratios)
        self.mask_ = weights & self.neurons_
        _check_left(self.mask_)

    def _without_neurons(self, bank: FeatureBank) -> NDArray[np.float64]:
        """M of the network without the removed neurons, a shard of the bank at a time."""
        total = np.zeros(bank.head.weight.shape)
        for i in range(0, len(bank), 8192):
            h = bank.features[i : i + 8192] * self.neurons_
            total += len(h) * opnp_sensitivity(h, bank.head(h), temperature=self.temperature)
        return total / len(bank)

    def _shape(self, bank: FeatureBank) -> FeatureBank:
        return shaped_bank(bank, bank.features * self.neurons_, self.mask_)
