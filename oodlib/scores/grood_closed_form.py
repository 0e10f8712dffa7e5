"""The gradient of GROOD's nearest-prototype loss at a prototype, in closed form."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from oodlib import arrays
from oodlib.arrays import Array, by_rows, check_finite, check_rows, tensor64, to_numpy
from oodlib.errors import OodlibError


def grood_polar(
    features: Array,
    prototypes: Any,
    ood_prototype: Any,
    *,
    temperature: float = 1.0,
    squared: bool = False,
    classes: Any = None,
) -> tuple[Array, Array]:
    r"""The gradient of `grood_gradient` as log of its L2 norm and direction: nothing underflows.

    log ||g|| = log pi_o - log T  (N,),   u = (h - p_o) / ||h - p_o||  (N, D)

    float64; -inf and zero where h = p_o. Arguments and errors as in `grood_gradient`.

    Examples
    --------
    >>> log_norm, u = grood_polar(np.array([[3.0, 4.0]]), np.array([[6.0, 8.0]]), np.zeros(2))
    >>> log_norm.round(4), u
    (array([-0.6931]), array([[0.6, 0.8]]))
    """
    arrays.check_temperature("grood", temperature)
    p, o = (tensor64(a).cpu() for a in (prototypes, ood_prototype))
    y = check_prototypes(features, prototypes, ood_prototype, classes)

    def function(h: Tensor, y: Tensor | None = None) -> Tensor:
        return _polar(h.cpu(), p, o, temperature, squared, y)

    columns = by_rows("grood", function, features, *y)
    return columns[:, 0], columns[:, 1:]


def grood_gradient(
    features: Array,
    prototypes: Any,
    ood_prototype: Any,
    *,
    temperature: float = 1.0,
    squared: bool = False,
    classes: Any = None,
) -> Array:
    r"""Gradient of the nearest-prototype cross-entropy at the OOD prototype, without autograd.

    H = -log pi_y,   pi = softmax(-||h - p_1|| / T, .., -||h - p_C|| / T, -||h - p_o|| / T)

    g = dH/dp_o = (pi_o / T) (h - p_o) / ||h - p_o||      (``squared``: 2 (pi_o / T) (h - p_o))

    (N, D) float64. g does not depend on the label y. Its L2 norm is pi_o / T; below 1e-308 it
    becomes zero, which `grood_polar` represents.

    ElAraby et al., TMLR 2025, arXiv 2312.14427, Eq. 5 (as the authors' code has it)

    Parameters
    ----------
    features : (N, D)
    prototypes : (C, D) class means of the training features, by true label
    ood_prototype : (D,)
    temperature : T > 0; the paper has none
    squared : squared distances in the softmax
    classes : (N,) predicted classes y; then the gradient at the prototype of that class instead,
        dH/dp_y = ((pi_y - 1) / T) (h - p_y) / ||h - p_y||

    Raises
    ------
    OodlibError : sizes differ, values are not finite, T out of range, a class outside 0 .. C-1

    Examples
    --------
    >>> grood_gradient(torch.tensor([[3., 4.]]), torch.tensor([[6., 8.]]), torch.zeros(2))
    tensor([[0.3000, 0.4000]], dtype=torch.float64)
    """
    options: Any = {"temperature": temperature, "squared": squared, "classes": classes}
    log_norm, direction = grood_polar(features, prototypes, ood_prototype, **options)
    scale = np.exp(to_numpy(log_norm))[:, None]
    if isinstance(direction, Tensor):
        return torch.from_numpy(scale) * direction
    return np.asarray(scale * direction)


def _polar(
    h: Tensor, p: Tensor, o: Tensor, temperature: float, squared: bool, classes: Tensor | None
) -> Tensor:
    """(n, 1 + D): log norm and direction."""
    log_pi, difference, distance = softmax(h, p, o, temperature, squared)
    log_norm = log_pi[:, -1]
    if classes is not None:
        y = classes.long().cpu()
        log_norm = log_pi.scatter(1, y, -math.inf).logsumexp(1)  # log(1 - pi_y), not cancelled
        difference = p[y[:, 0]] - h  # pi_y - 1 is negative
        distance = vector_norm(difference, dim=1)
    if squared:
        log_norm = log_norm + math.log(2) + distance.log()
    log_norm = torch.where(distance > 0, log_norm - math.log(temperature), -math.inf)
    return torch.cat([log_norm[:, None], unit(difference, distance)], 1)


def unit(difference: Tensor, distance: Tensor) -> Tensor:
    """Rows (n, D) of length (n,) divided by it; zero rows stay zero."""
    return difference / torch.where(distance > 0, distance, 1)[:, None]


def softmax(
    h: Tensor, p: Tensor, o: Tensor, temperature: float, squared: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """log pi (n, C + 1), h - p_o (n, D) and its length (n,)."""
    difference = h - o
    distance = vector_norm(difference, dim=1)
    every = torch.cat([distances(h, p), distance[:, None]], 1)
    log_pi = (-(every.square() if squared else every) / temperature).log_softmax(1)
    return log_pi, difference, distance


def distances(h: Tensor, p: Tensor) -> Tensor:
    """(n, C), the same for any batch size."""
    return torch.cdist(h, p, compute_mode="donot_use_mm_for_euclid_dist")


def check_prototypes(features: Any, prototypes: Any, ood_prototype: Any, y: Any) -> list[Any]:
    """The classes as a column, where they are given."""
    check_rows("grood", features)
    given = {"features": features, "prototypes": prototypes, "ood_prototype": ood_prototype}
    (_, size), shape, ood_shape = shapes = [tuple(np.shape(values)) for values in given.values()]
    if len(shape) != 2 or not shape[0] or shape[1] != size or ood_shape != (size,):
        raise OodlibError(
            "grood: features (N, D), prototypes (C, D) and ood_prototype (D,) need the same D, "
            f"got {shapes[0]}, {shape} and {ood_shape}."
        )
    for what, values in given.items():
        check_finite(f"grood: {what}", to_numpy(values))
    if y is None:
        return []
    y = to_numpy(y)
    if y.shape != (len(features),) or not np.isin(y, np.arange(len(prototypes))).all():
        raise OodlibError(
            f"grood: classes must be (N,) = ({len(features)},) whole numbers in 0 .. "
            f"{len(prototypes) - 1}, got {y.shape} of {np.unique(y)[:5].tolist()}."
        )
    return [y[:, None]]
