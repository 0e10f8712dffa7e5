"""Strict checks of what timm accepts in silence: bare names, files of another network, no hub."""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from oodlib.errors import OodlibError, explained


def check_timm_name(name: str, *, tag_needed: bool) -> None:
    """Raise OodlibError unless ``name`` is a timm model with an existing tag, or none is needed.

    A bare name means other weights in other versions of timm. Names with a source
    (``hf-hub:owner/model``) are not checked.
    """
    import timm
    from timm.models import get_pretrained_cfg, split_model_name_tag

    if ":" in name:
        return
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        known = sorted({m.partition(".")[0] for m in timm.list_models(pretrained=True)})
        similar = timm.list_models(f"*{name}*", pretrained=True) or [
            f"{model}.{its_tag}"
            for model in difflib.get_close_matches(architecture, known, 3)
            for its_tag in _tags(model)[:4]
        ]
        raise OodlibError(
            f"timm cannot build {name}: timm {timm.__version__} has no such model. Close to it: "
            f"{', '.join(similar[:8]) or 'nothing'}; see timm.list_models()."
        )
    tags = _tags(architecture)
    if tag and tag not in tags:
        own = ", ".join(tags) or "none"
        raise OodlibError(f"timm's {architecture} has no tag {tag!r}. Its tags: {own}.")
    if tag_needed and not tags:
        raise OodlibError(f"timm has no weights of {architecture}. Give a file with weights.")
    if tag_needed and not tag:
        default = get_pretrained_cfg(name)
        today = f"{name}.{default.tag}" if default else "nothing"
        raise OodlibError(
            f"{name} names no weights: without a tag it is {today} in timm {timm.__version__}, "
            f"perhaps others elsewhere. Add a tag ({', '.join(tags)}), or give a file with weights."
        )


def _tags(architecture: str) -> list[str]:
    import timm

    models = timm.list_models(f"{architecture}.*", pretrained=True)
    return [model.partition(".")[2] for model in models]


@contextmanager
def reachable_hub() -> Iterator[bool]:
    """Yield whether the Hugging Face hub answers; if not, downloads use its local cache only.

    Otherwise a download without a connection retries twelve times, for about 50 seconds.
    """
    from huggingface_hub import constants, get_session

    before, answers = constants.HF_HUB_OFFLINE, False
    if not before:
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            answers = True
        except Exception:  # of the hub's HTTP library, which may change
            constants.HF_HUB_OFFLINE = True
    try:
        yield answers
    finally:
        constants.HF_HUB_OFFLINE = before


def load_npz(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fill a timm model from Google's ``.npz``; OodlibError where the file is another network's.

    timm skips what does not fit (a head with other classes) and interpolates position embeddings,
    both in silence; here every parameter must come from the file unchanged.
    """
    name, load = type(model).__name__, getattr(model, "load_pretrained", None)
    if load is None:
        raise OodlibError(f"{path}: timm cannot read .npz into {name}. Give .safetensors or .pth.")
    remedy = "Check that the file is whole and belongs to this network, with as many classes."
    with explained(Exception, f"{path}: cannot be read as weights of {name}", remedy):
        with np.load(path) as file:
            positions = [file[key].shape[-2] for key in file.files if key.endswith("pos_embedding")]
        if positions:
            require_positions(model, positions[0], path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        load(str(path))
    empty = [key for key, value in model.named_parameters() if value.isnan().any()]
    if empty:
        raise OodlibError(
            f"{path}: it has no fitting values for {', '.join(empty[:3])} of {name} with "
            f"{getattr(model, 'num_classes', '?')} classes. {remedy}"
        )


def require_positions(model: nn.Module, tokens: int, path: str | os.PathLike[str]) -> None:
    """Raise OodlibError unless the model's position embedding has as many tokens as the file's."""
    embedding = getattr(model, "pos_embed", None)
    if isinstance(embedding, nn.Parameter) and embedding.ndim == 3 and embedding.shape[1] != tokens:
        raise OodlibError(
            f"{path}: its position embedding has {tokens} tokens, the network's "
            f"{embedding.shape[1]}. It is for another resolution or patch size; use that network."
        )
