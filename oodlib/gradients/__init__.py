"""Gradient norms per image and per tensor: one forward and one backward pass for a whole batch."""

from oodlib.gradients.gradnorm_by_layer import gradnorm_by_layer, parameter_groups
from oodlib.gradients.per_image import Objective, layer_gradient_norms

__all__ = ["Objective", "gradnorm_by_layer", "layer_gradient_norms", "parameter_groups"]
