"""The one exception class that oodlib raises for bad input."""

__all__ = ["OodlibError"]


class OodlibError(ValueError):
    """Bad input. The message says what was expected, what came, and what to do."""
