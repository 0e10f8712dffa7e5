"""Networks of the suite, public checkpoints, and what every model needs: device, head, hashes."""

from oodlib.models.device import pick_device, weights_hash
from oodlib.models.fast_convnet import FastConvNet
from oodlib.models.glow import Glow, bits_per_dim, dequantise, quantise
from oodlib.models.hooks import eval_mode, find_head
from oodlib.models.pretrained import (
    PUBLIC,
    ModelInfo,
    assert_accuracy,
    paper_model,
    public_model,
    resnet18_32x32,
)
from oodlib.models.small_vit import small_vit
from oodlib.models.training.augment import normalise
from oodlib.models.training.vit import VitRecipe, decay_integral

__all__ = [
    "PUBLIC",
    "FastConvNet",
    "Glow",
    "ModelInfo",
    "VitRecipe",
    "assert_accuracy",
    "bits_per_dim",
    "decay_integral",
    "dequantise",
    "eval_mode",
    "find_head",
    "normalise",
    "paper_model",
    "pick_device",
    "public_model",
    "quantise",
    "resnet18_32x32",
    "small_vit",
    "weights_hash",
]
