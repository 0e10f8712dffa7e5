"""Networks of the suite, and public checkpoints."""

from oodlib.models.glow import Glow, bits_per_dim, dequantise, quantise
from oodlib.models.networks import FastConvNet
from oodlib.models.prototypes import (
    EarlyPrototypes,
    OodFeatures,
    early_layers,
    early_prototypes,
    noise_features,
    noise_images,
    split_forward,
    synthetic_features,
)
from oodlib.models.public import PUBLIC, ModelInfo, assert_accuracy, paper_model, public_model, resnet18_32x32

__all__ = ["PUBLIC", "EarlyPrototypes", "FastConvNet", "Glow", "ModelInfo", "OodFeatures", "assert_accuracy",
           "bits_per_dim", "dequantise", "early_layers", "early_prototypes", "noise_features", "noise_images",
           "paper_model", "public_model", "quantise", "resnet18_32x32", "split_forward", "synthetic_features"]
