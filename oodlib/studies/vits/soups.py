"""Model soups: the weights of several finetunes of one checkpoint, averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


def fill_with_mean(model: nn.Module, states: Sequence[State]) -> None:
    """Give ``model`` the mean of the weights, in place."""

    def mean(key: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return torch.stack([state[key] for state in states]).mean(0)

    model.load_state_dict({key: mean(key, value) for key, value in states[0].items()})


def fill_greedily(
    model: nn.Module,
    states: Mapping[str, State],
    accuracy: Mapping[str, float],
    evaluate: Callable[[nn.Module], float],
) -> list[str]:
    """Give ``model`` the mean of the members that do not harm; returns their names in order.

    In falling order of their own accuracy, a member stays if the mean with it is not worse than the
    one before.

    Parameters
    ----------
    states : member -> weights; accuracy : member -> accuracy on held-out training images
    evaluate : accuracy of a model on the same images

    References
    ----------
    Wortsman et al., ICML 2022, arXiv 2203.05482, section 2
    """
    first, *others = sorted(states, key=lambda name: -accuracy[name])
    chosen, best = [first], accuracy[first]
    for name in others:
        fill_with_mean(model, [states[n] for n in (*chosen, name)])
        reached = evaluate(model)
        if reached >= best:
            chosen, best = [*chosen, name], reached
    fill_with_mean(model, [states[n] for n in chosen])
    return chosen
