"""The suite's small Vision Transformers for 32-pixel images: timm's, with small dimensions.

Hybrids like AugReg's R+Ti/16: a few convolutions (timm's `ConvStem`) instead of one patch
projection, without which a tiny ViT learns several times slower from a few hundred thousand images.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from oodlib.errors import OodlibError
from oodlib.models.device import random_state

# name -> (width, depth, heads, channels of the convolutions, their strides)
NETWORKS: dict[str, tuple[int, int, int, tuple[int, ...], tuple[int, ...]]] = {
    "vit_conv_64": (64, 3, 2, (24, 48, 96, 96, 64), (2, 2, 2, 1, 1)),
    "vit_conv_48": (48, 3, 2, (16, 32, 48, 48, 48), (2, 2, 2, 1, 1)),
}


class UnitNorm(nn.Module):
    """``scale * x / ||x||_2``: features on a sphere of radius ``scale``, as for CLIP's objective.

    With ``scale`` 1 the head needs weights, hence gradients, larger by the usual feature norm.
    """

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * normalize(x, dim=-1)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def small_vit(
    name: str,
    num_classes: int,
    *,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    head: str = "raw",
    seed: int = 0,
) -> nn.Module:
    """A network of `NETWORKS` with fresh weights: mean of normalised tokens, linear head.

    Parameters
    ----------
    dropout : after each projection of attention and MLP and on the embedded patches (AugReg's "do")
    stochastic_depth : rate of the last block, rising linearly from the first (AugReg's "sd")
    head : "raw", or "unit" for a head on L2-normalised features, as that of the model soups
    seed : of the weights; the global random state is left as it was

    Raises
    ------
    OodlibError : unknown name or head
    """
    import timm
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer_hybrid import ConvStem

    if name not in NETWORKS or head not in ("raw", "unit"):
        raise OodlibError(
            f"small_vit: the network must be one of {', '.join(NETWORKS)} and the head 'raw' or "
            f"'unit', got {name!r} and {head!r}."
        )
    width, depth, heads, channels, strides = NETWORKS[name]
    with random_state() as seed_torch:
        seed_torch(seed)
        stem = ConvStem(channels=channels, stride=strides, depth=len(channels), act_layer=nn.GELU)
        embedding: Any = partial(HybridEmbed, stem, proj=False)
        model = timm.create_model(
            "vit_tiny_patch16_224",
            embed_layer=embedding,
            img_size=32,
            patch_size=1,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=num_classes,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            pos_drop_rate=dropout,
            proj_drop_rate=dropout,
            drop_path_rate=stochastic_depth,
        )
    if head == "unit":
        model.fc_norm = UnitNorm(width**0.5)
    return model
