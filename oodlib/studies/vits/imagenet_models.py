"""Models of a pool that others trained: a timm name with its tag, or a file of an architecture."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor, nn

from oodlib.errors import OodlibError
from oodlib.models.hooks import find_head
from oodlib.models.pretrained import fill, paper_model, read_state_dict
from oodlib.models.small_vit import UnitNorm
from oodlib.models.timm_checks import check_timm_name, require_positions
from oodlib.studies.vits.pool_table import PoolRow
from oodlib.workspace import data_root

if TYPE_CHECKING:
    from timm.models import VisionTransformer


Transform = Callable[[Any], Tensor]
_CLASSES = 1000  # of ImageNet
_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# where the files of a folder of weights come from
ADDRESSES = {
    "augreg": "https://storage.googleapis.com/vit_models/augreg/",
    "model-soups": "https://github.com/mlfoundations/model-soups/releases/download/v0.0.2/",
}


def load_tagged(
    row: PoolRow, *, weights: Path | None = None, pretrained: bool = True
) -> tuple[nn.Module, Transform]:
    """The model of a row in evaluation mode, and the transform of PIL images it was finetuned for.

    Parameters
    ----------
    row : ``network`` is timm's name with its tag, or without where ``weights`` names a file:
        ``.npz`` (AugReg), ``.safetensors`` or ``.pth`` (timm's names), or with ``head`` "unit" a
        ``.pt`` of model-soups
    weights : folder that ``row.weights`` lies below; by default ``weights`` of ``OODLIB_MIRROR``,
        then of the data root
    pretrained : False leaves the weights random and needs no file

    Returns
    -------
    model : its output is that of its last linear layer, see `oodlib.models.hooks.find_head`. Of
        model-soups, that layer takes the unit embedding; the submodule ``tower`` gives the raw one
    transform : PIL image -> (3, h, w). The tag states it; an ``.npz`` has AugReg's (mean and std
        0.5, bicubic, crop 0.9 below 384 pixels, else 1.0), model-soups OpenAI's for CLIP

    Raises
    ------
    OodlibError : a name or tag that timm does not know, a bare name without a file, a missing file
        (with its address where known), weights of another network, a head that is not one linear
        layer, a transform to another size than the network's or the row's

    References
    ----------
    Layout of the model-soups files: ``utils.py`` and ``main.py`` of mlfoundations/model-soups
    (arXiv 2203.05482); AugReg's evaluation transform: arXiv 2106.10270, as timm states it for the
    tags of these files
    """
    try:
        check_timm_name(row.network, tag_needed=not row.weights)
        file = find_weights(row, weights) if row.weights and pretrained else None
        if row.head == "unit":
            model, config = _clip_classifier(row, file)
            transform = _transform(config, _CLIP_MEAN, _CLIP_STD, 1.0)
        else:
            model, transform = paper_model(row.network, file, pretrained=pretrained)
            config = cast("dict[str, Any]", model.pretrained_cfg)
            if row.weights.endswith(".npz"):
                crop = 0.9 if config["input_size"][-1] < 384 else 1.0
                transform = _transform(config, _HALF, _HALF, crop)
        _check(row, model, transform, config["input_size"][-1])
    except OodlibError as error:
        raise OodlibError(f"{row.name}: {error}") from error
    return model, transform


def find_weights(row: PoolRow, weights: Path | None = None) -> Path:
    """The file of a row; folders as in `load_tagged`. OodlibError: missing (with its address)."""
    mirror = os.environ.get("OODLIB_MIRROR")
    folders = [Path(mirror) / "weights"] if mirror else []
    folders = [weights] if weights else [*folders, data_root() / "weights"]
    for folder in folders:
        if (folder / row.weights).is_file():
            return folder / row.weights
    source, _, name = row.weights.partition("/")
    origin = f" It comes from {ADDRESSES[source]}{name}." if source in ADDRESSES else ""
    raise OodlibError(
        f"the weights {row.weights} are missing below {' and '.join(map(str, folders))}.{origin} "
        "Put the file there, or name another folder."
    )


def _clip_classifier(row: PoolRow, file: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """A CLIP image tower, L2 normalisation and a linear head, filled from a file of model-soups."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    if not row.weights:
        raise OodlibError(
            'a head on "unit" features needs a file in weights: no tag of timm has one. Write head '
            "raw."
        )
    tower = cast("VisionTransformer", timm.create_model(row.network))
    config = cast("dict[str, Any]", tower.pretrained_cfg)
    # its classes are the width of CLIP's embedding
    head = nn.Linear(config["num_classes"], _CLASSES)
    if file is not None:
        state = read_state_dict(file)
        visual = {k: v for k, v in _below(state, "model.").items() if k.startswith("visual.")}
        last = _below(state, "classification_head.")
        if "visual.positional_embedding" not in visual or not last:
            raise OodlibError(
                f"{file} is not a file of model-soups: it needs model.visual.* as in OpenAI's "
                "CLIP and classification_head.weight and .bias, but holds "
                f"{', '.join(list(state)[:3])}."
            )
        require_positions(tower, len(visual["visual.positional_embedding"]), file)
        fill(tower, checkpoint_filter_fn(visual, tower), file)
        fill(head, last, file)
    model = nn.Sequential(OrderedDict(tower=tower, unit=UnitNorm(1.0), head=head))
    return model.eval(), config


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _transform(
    config: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...], crop_pct: float
) -> Transform:
    from timm.data import create_transform

    options: dict[str, Any] = {"interpolation": "bicubic", "mean": mean, "std": std}
    return create_transform(config["input_size"], crop_pct=crop_pct, **options)


def _check(row: PoolRow, model: nn.Module, transform: Transform, side: int) -> None:
    """Send one picture through transform and network: sizes must agree, and the head be found."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    x = transform(Image.fromarray(noise))
    if tuple(x.shape) != (3, side, side) or row.resolution not in (None, side):
        raise OodlibError(
            f"the transform gives pictures of {' x '.join(map(str, x.shape))}, the network "
            f"{row.network} takes 3 x {side} x {side}, and the row states a resolution of "
            f"{row.resolution}. Name the network of that resolution, or correct the row."
        )
    find_head(model, x[None])
