"""Networks of the suite, and public checkpoints."""

from oodlib.models.networks import FastConvNet

__all__ = ["FastConvNet"]
