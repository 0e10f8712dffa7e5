"""The one exception class that oodlib raises for bad input."""

from collections.abc import Iterable


class OodlibError(ValueError):
    """Bad input. The message says what was expected, what came, and what to do."""


def one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Raise OodlibError unless ``value`` is one of the known names."""
    if value not in (known := list(known)):
        raise OodlibError(f"{name} must be one of {', '.join(known)}, got {value!r}.")


def check_interval(name: str, value: float, interval: str, remedy: str = "") -> None:
    """Raise OodlibError unless the value lies in an interval such as "[0, 1)"; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    if not (above and (value <= high if interval[-1] == "]" else value < high)):
        raise OodlibError(f"{name} must lie in {interval}, got {value}. {remedy}".rstrip())
