"""Classifiers that others trained: public CIFAR checkpoints, and timm models with a user's weights.

``pretrained.yaml`` lists the public ones; checkpoints of others are never part of this project.
"""

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from oodlib.data.images import ImageSet
from oodlib.data.records import read_records
from oodlib.errors import OodlibError, explained, first_line, one_of
from oodlib.files import sha256
from oodlib.models import cifar_nets, timm_checks
from oodlib.models.training.classifier import evaluate
from oodlib.workspace import data_root

FilePath = str | os.PathLike[str]
Transform = Callable[[Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Facts about one public checkpoint; ``mean`` and ``std`` in units of pixel / 255."""

    name: str
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str
    address: str
    licence: str
    measured_accuracy: tuple[float, int]  # on the test split, by us, and the number of images
    id_set: str  # that it was trained on
    file: str  # below ``weights/`` of a mirror


def _entry(
    name: str, *, network: tuple[str, int], **facts: Any
) -> tuple[ModelInfo, Callable[[], nn.Module]]:
    return ModelInfo(name=name, **facts), partial(getattr(cifar_nets, network[0]), network[1])


# name -> facts, and what builds the network
PUBLIC = read_records(__name__, _entry)


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
    ``weights_only=True``. OodlibError: unknown name, wrong hash, or no file and no download.
    """
    one_of("public_model: name", name, PUBLIC)
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
            wrong = f"SHA-256 is {digest}, not {info.sha256}"
            raise OodlibError(f"{path}: {wrong}. Delete it and fetch it again.")
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
    remedy = "Download it again, or save its state dict with torch.save."
    with explained(Exception, f"{path}: not a checkpoint for weights_only=True", remedy):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise OodlibError(f"{path}: not a state dict but a {type(loaded).__name__}. {remedy}")
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

    ``checkpoint`` is the user's copy of an OpenOOD ``best.ckpt``; without it weights are random.
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

    The GradNorm checkpoint's outputs are in MOS's class order, on which only accuracy depends: pass
    the images with ``imagenet2012_val_list.txt`` or use ``oodlib.data.class_remap``. OodlibError:
    unknown model, no tag and no file, a file that is missing or does not fit, no connection.

    Parameters
    ----------
    timm_name : with its tag, "resnetv2_101x1_bit.goog_in21k_ft_in1k" (without tag only with a
        ``weights_file`` or random weights); or "torchvision/resnet50" for IMAGENET1K_V1
    weights_file : ``.npz`` (Google's BiT and ViT), ``.safetensors``, or a checkpoint with timm's
        names or those of the GradNorm paper's ``BiT-S-R101x1-flat-finetune.pth.tar``; where not
        given, the tag's weights are downloaded, or stay random if ``pretrained`` is False
    preprocessing : "own" is what the tag or torchvision states; "gradnorm" is the paper's: both
        sides to 480, no crop, mean and std 0.5
    num_classes : of the weights file, where it is not the tag's own
    """
    if weights_file is not None and not Path(weights_file).is_file():
        raise OodlibError(f"paper_model: the weights file {weights_file} is missing.")
    if timm_name.startswith("torchvision/"):
        name = timm_name.removeprefix("torchvision/")
        return _torchvision_model(name, weights_file, pretrained, num_classes)
    import timm
    from timm.data import create_transform, resolve_model_data_config

    suffix = "" if weights_file is None else Path(weights_file).suffix
    download = weights_file is None and pretrained
    timm_checks.check_timm_name(timm_name, tag_needed=download)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    overlay: dict[str, Any] | None = None
    if suffix == ".safetensors":
        # without "num_classes" timm would take the file's head for another task's and drop it
        overlay = {"file": str(weights_file), "custom_load": False, **options}

    # network
    with timm_checks.reachable_hub() if download else contextlib.nullcontext(False) as answers:
        try:
            options |= {"pretrained": download or overlay is not None}
            model = timm.create_model(timm_name, pretrained_cfg_overlay=overlay, **options)
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
        timm_checks.load_npz(model, str(weights_file))
    elif suffix == ".safetensors":
        with safe_open(str(weights_file), framework="pt") as file:
            if "pos_embed" in file.keys():  # noqa: SIM118 no dict
                tokens = file.get_slice("pos_embed").get_shape()[1]
                timm_checks.require_positions(model, tokens, str(weights_file))
    elif weights_file is not None:
        state = read_state_dict(weights_file)
        fill(model, {_bit_name(key): value for key, value in state.items()}, weights_file)

    # transform
    if preprocessing == "gradnorm":
        from torchvision.transforms import Compose, Normalize, Resize, ToTensor

        transform = Compose([Resize((480, 480)), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])
    else:
        transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return model.eval(), transform


def _torchvision_model(
    name: str, weights_file: FilePath | None, pretrained: bool, num_classes: int | None
) -> tuple[nn.Module, Transform]:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise OodlibError(
            f"paper_model: no torchvision classifier {name!r}; see models.list_models()."
        )
    weights = models.get_model_weights(name)["IMAGENET1K_V1"]
    own = weights if pretrained and weights_file is None else None
    options = {} if num_classes is None else {"num_classes": num_classes}
    what = f"paper_model: torchvision's weights of {name} could not be loaded"
    with explained(Exception, what, "Give a copy as weights_file."):
        model = models.get_model(name, weights=own, **options)
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

    Call it before any OOD score: wrong weights, label order or normalisation show here first.
    """
    pixels, labels = torch.from_numpy(images.images[:].copy()), torch.from_numpy(images.labels)
    measured = evaluate(model, pixels, labels, torch.tensor(mean), torch.tensor(std), device=device)
    if not abs(measured - expected) <= tolerance:
        what = f"{images.name}/{images.split} gives {measured:.4f} on {len(images)} images"
        raise OodlibError(
            f"assert_accuracy: {what}, not {expected:.4f} +- {tolerance:.4f}. Check weights, label "
            "order and normalisation."
        )
    return measured
