"""Classifiers that others trained: public CIFAR checkpoints, and timm models with a user's weights.

``pretrained.yaml`` lists the public ones; checkpoints of others are never part of this project.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from oodlib.data.images import ImageSet
from oodlib.errors import OodlibError
from oodlib.files import sha256
from oodlib.models import cifar_nets
from oodlib.models.timm_checks import (
    check_timm_name,
    first_line,
    load_npz,
    reachable_hub,
    require_positions,
)
from oodlib.models.training.classifier import evaluate
from oodlib.workspace import data_root

FilePath = str | os.PathLike[str]
Transform = Callable[[Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Facts about one public checkpoint.

    Attributes
    ----------
    mean, std : of the normalisation it was trained with, in units of pixel / 255
    address, licence : where it comes from, and its terms
    measured_accuracy : on the dataset's test split, by us; (accuracy, number of images)
    id_set : name of the dataset it was trained on
    file, sha256 : name below ``weights/`` of a mirror, and its checksum
    """

    name: str
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str
    address: str
    licence: str
    measured_accuracy: tuple[float, int]
    id_set: str
    file: str


def _entry(
    name: str, *, network: tuple[str, int], **facts: Any
) -> tuple[ModelInfo, Callable[[], nn.Module]]:
    facts = {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()}
    return ModelInfo(name=name, **facts), partial(getattr(cifar_nets, network[0]), network[1])


# name -> facts, and what builds the network
_FACTS = yaml.safe_load(resources.files(__package__).joinpath("pretrained.yaml").read_text("utf-8"))
PUBLIC = {name: _entry(name, **facts) for name, facts in _FACTS.items()}


def public_model(
    name: str,
    *,
    mirror: FilePath | None = None,
    download: bool = True,
    data_dir: FilePath | None = None,
) -> tuple[nn.Module, ModelInfo]:
    """A public checkpoint in evaluation mode, with its facts; its last layer is an ``nn.Linear``.

    The file comes from ``weights/`` of the mirror (default ``OODLIB_MIRROR``), else by download
    into ``<data>/weights``; its SHA-256 is checked either way and its pickle is read with
    ``weights_only=True``.

    Raises
    ------
    OodlibError : unknown name, wrong hash, or no file and no download
    """
    if name not in PUBLIC:
        raise OodlibError(f"There is no public model {name!r}. Known: {', '.join(PUBLIC)}.")
    info, build = PUBLIC[name]
    model = build()
    model.load_state_dict(read_state_dict(_weights_file(info, mirror, download, data_dir)))
    return model.eval(), info


def _weights_file(
    info: ModelInfo, mirror: FilePath | None, download: bool, data_dir: FilePath | None
) -> Path:
    folder, mirror = data_root(data_dir) / "weights", mirror or os.environ.get("OODLIB_MIRROR")
    candidates = [Path(mirror) / "weights" / info.file] if mirror else []
    for path in (*candidates, folder / info.file):
        if not path.is_file():
            continue
        if (digest := sha256(path)) != info.sha256:
            raise OodlibError(
                f"{path}: SHA-256 is {digest}, {info.name} has {info.sha256}. Delete the file and "
                "copy or download it again."
            )
        return path
    reason = "downloads are off"
    if download:
        import pooch

        checksum = f"sha256:{info.sha256}"
        try:
            return Path(pooch.retrieve(info.address, checksum, fname=info.file, path=folder))
        except Exception as error:  # requests' and pooch's errors have no common base
            reason = f"the download failed ({first_line(error)})"
    raise OodlibError(
        f"{info.name}: {info.file} is not available and {reason}. Put it under weights/ of "
        f"OODLIB_MIRROR, or download {info.address} into {folder}."
    )


def read_state_dict(path: FilePath) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without DataParallel's ``module.``; OodlibError if none."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and runtime errors
        raise OodlibError(
            f"{path}: not a checkpoint of tensors that weights_only=True can read "
            f"({first_line(error)}). Download it again, "
            "or save its state dict with torch.save."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise OodlibError(
            f"{path}: a state dict was expected, got {type(loaded).__name__}. Save "
            "model.state_dict()."
        )
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def fill(model: nn.Module, state: dict[str, Tensor], path: FilePath) -> None:
    """Load a state dict read from ``path``; OodlibError unless names and shapes fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        details = " ".join(line.strip() for line in str(error).splitlines()[1:3])[:300]
        raise OodlibError(
            f"{path}: its tensors do not fit {type(model).__name__}: {details} Check that the "
            "checkpoint belongs to this network."
        ) from error


def resnet18_32x32(checkpoint: FilePath | None = None, *, num_classes: int = 10) -> nn.Module:
    """OpenOOD's ResNet-18 for 32-pixel images, in evaluation mode; 512 features.

    torchvision's with a 3x3 stem and no max-pool. ``checkpoint`` is the user's copy of an OpenOOD
    ``best.ckpt``; without it the weights are random.
    """
    from torchvision.models import resnet18

    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    if checkpoint is not None:
        _fill_torchvision(model, checkpoint)
    return model.eval()


def _fill_torchvision(model: nn.Module, path: FilePath) -> None:
    """Fill a ResNet; what other code calls ``shortcut`` is torchvision's ``downsample``."""
    state = read_state_dict(path)
    fill(model, {k.replace(".shortcut.", ".downsample."): v for k, v in state.items()}, path)


def paper_model(
    timm_name: str,
    weights_file: FilePath | None = None,
    *,
    preprocessing: Literal["own", "gradnorm"] = "own",
    pretrained: bool = True,
    num_classes: int | None = None,
) -> tuple[nn.Module, Transform]:
    """A timm or torchvision classifier in evaluation mode and its image transform.

    Parameters
    ----------
    timm_name : with its tag, for example "resnetv2_101x1_bit.goog_in21k_ft_in1k" (without tag only
        with a ``weights_file`` or random weights); or torchvision's, for example
        "torchvision/resnet50", which stands for its weights IMAGENET1K_V1
    weights_file : ``.npz`` (Google's BiT and ViT), ``.safetensors``, or a checkpoint with timm's
        names or those of the GradNorm paper's ``BiT-S-R101x1-flat-finetune.pth.tar``; where not
        given, the tag's weights are downloaded, or stay random if ``pretrained`` is False
    preprocessing : "own" is what the tag or torchvision states; "gradnorm" is the paper's: both
        sides to 480, no crop, mean and std 0.5
    num_classes : of the weights file, where it is not the tag's own

    Raises
    ------
    OodlibError : unknown model or tag, no tag and no file, a missing or unreadable file, tensors
        that do not fit, no connection

    Notes
    -----
    The GradNorm checkpoint's outputs are in MOS's class order: pass the images with
    ``imagenet2012_val_list.txt`` (same order) or use ``oodlib.data.class_remap``. OOD scores do not
    depend on it, accuracy does.
    """
    if weights_file is not None and not Path(weights_file).is_file():
        raise OodlibError(
            f"paper_model: the weights file {weights_file} is missing. Check its path."
        )
    if timm_name.startswith("torchvision/"):
        return _torchvision_model(
            timm_name.removeprefix("torchvision/"), weights_file, pretrained, num_classes
        )
    import timm
    from timm.data import create_transform, resolve_model_data_config

    suffix = "" if weights_file is None else Path(weights_file).suffix
    download = weights_file is None and pretrained
    check_timm_name(timm_name, tag_needed=download)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    overlay: dict[str, Any] | None = None
    if suffix == ".safetensors":
        # without "num_classes" timm would take the file's head for another task's and drop it
        overlay = {"file": str(weights_file), "custom_load": False, **options}

    # network
    with reachable_hub() if download else contextlib.nullcontext(False) as answers:
        try:
            model = timm.create_model(
                timm_name,
                pretrained=download or overlay is not None,
                pretrained_cfg_overlay=overlay,
                **options,
            )
        except Exception as error:  # timm, hub and zip errors have no common base
            details = " ".join(line.strip() for line in str(error).splitlines()[:3])[:300]
            remedy = "Check that the file belongs to this network, with as many classes."
            if download:
                remedy = "Fetch them once, or give a file with weights."
                if not answers:
                    details = "the hub does not answer, and they are not in its local cache"
            raise OodlibError(
                f"paper_model: timm cannot build {timm_name} from "
                f"{weights_file or 'its own weights'} ({details or type(error).__name__}). {remedy}"
            ) from error

    # weights
    if suffix == ".npz":
        load_npz(model, str(weights_file))
    elif suffix == ".safetensors":
        with safe_open(str(weights_file), framework="pt") as file:
            if "pos_embed" in file.keys():  # noqa: SIM118 no dict
                tokens = file.get_slice("pos_embed").get_shape()[1]
                require_positions(model, tokens, str(weights_file))
    elif weights_file is not None:
        state = read_state_dict(weights_file)
        fill(model, {_bit_name(key): value for key, value in state.items()}, weights_file)

    # transform
    if preprocessing == "gradnorm":
        from torchvision import transforms

        normalisation = transforms.Normalize([0.5] * 3, [0.5] * 3)
        steps = [transforms.Resize((480, 480)), transforms.ToTensor(), normalisation]
        transform = transforms.Compose(steps)
    else:
        transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return model.eval(), transform


def _torchvision_model(
    name: str, weights_file: FilePath | None, pretrained: bool, num_classes: int | None
) -> tuple[nn.Module, Transform]:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise OodlibError(
            f"paper_model: torchvision has no classifier {name!r}. See "
            "torchvision.models.list_models()."
        )
    weights = models.get_model_weights(name)["IMAGENET1K_V1"]
    own = weights if pretrained and weights_file is None else None
    options = {} if num_classes is None else {"num_classes": num_classes}
    try:
        model = models.get_model(name, weights=own, **options)
    except Exception as error:  # urllib and hash errors have no common base
        raise OodlibError(
            f"paper_model: torchvision's weights of {name} could not be loaded "
            f"({first_line(error)}). Give a copy as weights_file."
        ) from error
    if weights_file is not None:
        _fill_torchvision(model, weights_file)
    return model.eval(), weights.transforms()


_BIT_NAMES = {
    "root.conv": "stem.conv",
    "before_head.gn": "norm",
    "head.conv": "head.fc",
    ".downsample.": ".downsample.conv.",
    ".gn": ".norm",
}


def _bit_name(key: str) -> str:
    """A tensor's name in the GradNorm paper's BiT code, translated to timm's; other names stay."""
    if not key.startswith(("root.", "body.", "before_head.", "head.conv.")):
        return key
    if match := re.match(r"body\.block(\d+)\.unit(\d+)\.", key):
        stage, block = int(match[1]) - 1, int(match[2]) - 1
        key = f"stages.{stage}.blocks.{block}.{key[match.end() :]}"
    for theirs, timms in _BIT_NAMES.items():
        key = key.replace(theirs, timms)
    return key


def assert_accuracy(
    model: nn.Module,
    images: ImageSet,
    *,
    expected: float,
    tolerance: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: str | torch.device = "cpu",
) -> float:
    """Accuracy on an ID set; OodlibError unless within ``tolerance`` of ``expected`` (in [0, 1]).

    To be called before any OOD score is shown: wrong weights, label order or normalisation show
    here first.
    """
    pixels, labels = torch.from_numpy(images.images[:].copy()), torch.from_numpy(images.labels)
    measured = evaluate(model, pixels, labels, torch.tensor(mean), torch.tensor(std), device=device)
    if not abs(measured - expected) <= tolerance:
        raise OodlibError(
            f"assert_accuracy: {images.name}/{images.split} gives {measured:.4f} on {len(images)} "
            f"images, {expected:.4f} +- {tolerance:.4f} was expected. Check weights, label order "
            "and normalisation before any OOD score."
        )
    return measured
