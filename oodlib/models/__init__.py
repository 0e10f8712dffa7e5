"""Networks of the suite, and public checkpoints."""

from oodlib.models.networks import FastConvNet
from oodlib.models.public import PUBLIC, ModelInfo, assert_accuracy, paper_model, public_model, resnet18_32x32

__all__ = ["PUBLIC", "FastConvNet", "ModelInfo", "assert_accuracy", "paper_model", "public_model", "resnet18_32x32"]
