"""What every score function begins with: NumPy or torch in, float64 of the same kind out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from oodlib.errors import OodlibError

if TYPE_CHECKING:
    from torch import Tensor


# what goes in comes out: NumPy for NumPy, torch for torch
Array = TypeVar("Array", NDArray[Any], "Tensor")

BLOCK = 2**21  # numbers of one array in one block: 16 MiB in float64


def tensor64(value: Any) -> Tensor:
    """A detached float64 tensor; on the CPU where the device has no float64."""
    import torch  # late: metrics and claims read arrays without it

    if isinstance(value, torch.Tensor):
        detached: torch.Tensor = value.detach()
        return (detached.cpu() if detached.device.type == "mps" else detached).double()
    # a copy: memory-mapped banks are read-only
    return torch.from_numpy(np.array(value, dtype=np.float64))


def check_temperature(name: str, temperature: float) -> None:
    """OodlibError unless the temperature is a positive, finite number."""
    if not 0 < temperature < float("inf"):
        raise OodlibError(f"{name}: temperature must be positive and finite, got {temperature}.")


def check_rows(name: str, *arrays: Any) -> None:
    """Raise OodlibError unless the arrays are (N, .) with the same N > 0."""
    shapes = [tuple(np.shape(a)) for a in arrays]
    if any(len(s) != 2 or 0 in s for s in shapes) or len({s[0] for s in shapes}) != 1:
        raise OodlibError(
            f"{name}: needs non-empty arrays (N, .) of equal row count, got "
            f"{' and '.join(map(str, shapes))}. Features are pooled to (N, D), and all arrays come "
            "from one pass over one loader."
        )


def check_shape(what: str, got: Any, axes: str, shape: tuple[int, ...], remedy: str = "") -> None:
    """Raise OodlibError unless an array has the shape, whose axes are called e.g. "(C, D)"."""
    if tuple(np.shape(got)) != shape:
        raise OodlibError(f"{what} must be {axes} = {shape}, got {np.shape(got)}. {remedy}".strip())


def check_finite(what: str, values: NDArray[Any]) -> None:
    """Raise OodlibError if values (N, ...) hold NaN or infinity; a block of rows at a time."""
    if not all(np.isfinite(values[i : i + 65536]).all() for i in range(0, len(values), 65536)):
        raise OodlibError(f"{what} hold NaN or infinity. Check the transform and the weights.")


def check_k(name: str, k: Any, size: int) -> None:
    """OodlibError unless k is between 1 and the number of rows."""
    if not isinstance(k, int | np.integer) or not 1 <= k <= size:
        raise OodlibError(
            f"{name}: k must lie in 1 .. {size} (the size of the bank), got {k!r}. Give a smaller "
            "whole number or a larger bank."
        )


def by_rows(name: str, function: Callable[..., Tensor], first: Array, *others: Any) -> Array:
    """Apply ``function`` to blocks of rows in float64 and join the results.

    Parameters
    ----------
    name : of the caller, for messages
    function : blocks (n, .) as float64 tensors -> (n,) or (n, d) tensor
    first, others : each (N, .) with the same N, NumPy (memory-mapped is fine) or torch

    Returns
    -------
    (N,) or (N, d) float64; torch if the first array is torch, else NumPy. Scores (N,) that are not
    finite become +inf, with a warning that counts them.

    Raises
    ------
    OodlibError : an array is not (N, .), rows differ, or there is none
    """
    import torch

    arrays = (first, *others)
    check_rows(name, *arrays)
    rows = max(1, BLOCK // max(np.shape(a)[1] for a in arrays))
    parts = [
        function(*(tensor64(a[i : i + rows]) for a in arrays)) for i in range(0, len(first), rows)
    ]
    result = torch.cat(parts)
    if result.ndim == 1:
        bad = ~torch.isfinite(result)
        if bad.any():
            warnings.warn(
                f"{name}: {int(bad.sum())} of {len(result)} scores overflowed or were NaN; they "
                "are +inf now (most OOD).",
                RuntimeWarning,
                stacklevel=3,
            )
            result = torch.where(bad, torch.inf, result)
    same: Any = result if isinstance(first, torch.Tensor) else result.cpu().numpy()
    return same  # type: ignore[no-any-return]


def to_numpy(value: Any) -> NDArray[Any]:
    """NumPy view of an array or tensor (detached, on the CPU)."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asanyarray(value)
