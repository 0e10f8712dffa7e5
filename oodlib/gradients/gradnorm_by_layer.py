"""GradNorm of any group of a network's parameters, by one gradient per sample in micro-batches."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.linalg import vector_norm

from oodlib.arrays import check_temperature
from oodlib.errors import OodlibError, check_interval
from oodlib.gradients.layer_norms import wide
from oodlib.models.hooks import eval_mode


def parameter_groups(
    model: nn.Module, groups: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """Parameter names of each group.

    Parameters
    ----------
    groups : name -> shell patterns of parameter names,
        ``{"last": ["fc.weight"], "stage 4": ["layer4.*"]}``; None makes every parameter a group

    Raises
    ------
    OodlibError : a pattern matches no parameter
    """
    known = [name for name, _ in model.named_parameters()]
    if groups is None:
        return {name: [name] for name in known}
    for group, patterns in groups.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise OodlibError(
                    f"parameter_groups: {pattern!r} of group {group!r} matches no parameter. "
                    f"Known: {', '.join(known)}."
                )
    return {
        group: [n for n in known if any(fnmatchcase(n, p) for p in patterns)]
        for group, patterns in groups.items()
    }


def gradnorm_by_layer(
    model: nn.Module,
    x: Tensor,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    temperature: float = 1.0,
    norm: float = 1,
    chunk_size: int = 16,
) -> dict[str, Tensor]:
    r"""GradNorm of each group of parameters, one gradient per sample; larger = more OOD.

    S_g = -||d KL(u || softmax(f(x) / T)) / d theta_g||_q

    Parameters
    ----------
    model : x (n, ...) -> logits (n, C); run in eval mode, its own mode is restored
    x : (N, ...), on the model's device
    groups : as in `parameter_groups`; groups may overlap
    temperature : T > 0
    norm : q in (0, inf]
    chunk_size : samples whose gradients are held at once; memory is chunk_size x (parameters +
        activations)

    Returns
    -------
    group name -> (N,) float64, on the CPU; for a linear head's weight `oodlib.scores.gradnorm`

    Raises
    ------
    OodlibError : a pattern that matches nothing, T or q out of range, logits that are not (n, C)

    References
    ----------
    Huang, Geng, Li, NeurIPS 2021, arXiv 2110.00218 (the paper's sign is the opposite)
    """
    check_temperature("gradnorm_by_layer", temperature)
    check_interval("gradnorm_by_layer: norm q", norm, "(0, inf]", "math.inf is the maximum norm.")
    if chunk_size < 1 or len(x) == 0:
        raise OodlibError(
            f"gradnorm_by_layer: needs a sample and chunk_size >= 1, got {len(x)} and {chunk_size}."
        )
    members = parameter_groups(model, groups)
    used = {name for names in members.values() for name in names}
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    fixed = {name: t.detach() for name, t in tensors.items() if name not in used}
    chosen = {name: t.detach() for name, t in tensors.items() if name in used}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        logits = functional_call(model, {**parameters, **fixed}, (sample[None],))
        if logits.ndim != 2:
            raise OodlibError(
                "gradnorm_by_layer: the model must return logits (n, C), got "
                f"{tuple(logits.shape)} for one sample."
            )
        value: Tensor = -(logits / temperature).log_softmax(1).mean()  # KL(u || p) + log C
        return value

    per_sample = vmap(grad(loss), in_dims=(None, 0))
    parts: dict[str, list[Tensor]] = {group: [] for group in members}
    with eval_mode(model):
        for chunk in torch.split(x, chunk_size):
            norms = {
                name: vector_norm(g.flatten(1), norm, dim=1, dtype=wide(g)).double().cpu()
                for name, g in per_sample(chosen, chunk).items()
            }
            for group, names in members.items():  # the q-norm of q-norms is the whole q-norm
                stacked = torch.stack([norms[name] for name in names])
                parts[group].append(vector_norm(stacked, norm, dim=0))
    return {group: -torch.cat(values) for group, values in parts.items()}
