"""The one exception class that oodlib raises for bad input."""

import contextlib
from collections.abc import Iterable, Iterator


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


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut at 200 characters; its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def explained(
    kinds: type[Exception] | tuple[type[Exception], ...], what: str, remedy: str
) -> Iterator[None]:
    """Raise errors of these kinds as OodlibError "``what`` (class: first line). ``remedy``"."""
    try:
        yield
    except OodlibError:
        raise
    except kinds as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise OodlibError(f"{what} ({reason}). {remedy}") from error
