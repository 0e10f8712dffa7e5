"""Score functions on arrays, and the detectors made of them; larger = more OOD, float64.

Each name below is the function, although some modules have the same name: the imports bind the
functions after the modules are loaded.
"""

from oodlib.scores.ash import ash
from oodlib.scores.complexity import compressed_bits
from oodlib.scores.detector import Detector, Info, create, list_detectors, load_detector, names
from oodlib.scores.dice import dice
from oodlib.scores.energy import energy
from oodlib.scores.gen import gen
from oodlib.scores.gradnorm import gradnorm, gradnorm_factors, gradnorm_limit
from oodlib.scores.grood import grood
from oodlib.scores.grood_closed_form import grood_gradient, grood_polar
from oodlib.scores.grood_prototypes import (
    EarlyPrototypes,
    OodFeatures,
    early_layers,
    early_prototypes,
    noise_features,
    noise_images,
    split_forward,
    synthetic_features,
)
from oodlib.scores.kl_matching import kl_matching
from oodlib.scores.knn import knn
from oodlib.scores.layerwise import LayerwiseDensity
from oodlib.scores.mahalanobis import mahalanobis, relative_mahalanobis, whitening
from oodlib.scores.max_logit import max_logit
from oodlib.scores.moments import class_moments
from oodlib.scores.msp import msp
from oodlib.scores.odin import odin
from oodlib.scores.opnp import opnp, opnp_neurons, opnp_sensitivity
from oodlib.scores.react import react
from oodlib.scores.vim import vim

__all__ = [
    "Detector",
    "EarlyPrototypes",
    "Info",
    "LayerwiseDensity",
    "OodFeatures",
    "ash",
    "class_moments",
    "compressed_bits",
    "create",
    "dice",
    "early_layers",
    "early_prototypes",
    "energy",
    "gen",
    "gradnorm",
    "gradnorm_factors",
    "gradnorm_limit",
    "grood",
    "grood_gradient",
    "grood_polar",
    "kl_matching",
    "knn",
    "list_detectors",
    "load_detector",
    "mahalanobis",
    "max_logit",
    "msp",
    "names",
    "noise_features",
    "noise_images",
    "odin",
    "opnp",
    "opnp_neurons",
    "opnp_sensitivity",
    "react",
    "relative_mahalanobis",
    "split_forward",
    "synthetic_features",
    "vim",
    "whitening",
]
