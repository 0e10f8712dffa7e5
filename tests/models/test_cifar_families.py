"""Families of small classifiers: linear head on non-negative features, size, what each family is
made of.
"""

import pytest
import torch
from torch import nn

from oodlib.models.cifar_families import FAMILIES, AveragedFastConvNet
from oodlib.models.fast_convnet import FastConvNet


@pytest.fixture
def x():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_a_linear_head_of_non_negative_features(name, bias, x):
    model = FAMILIES[name](7, bias=bias).eval()
    features = model.features(x)
    assert features.min() >= 0 and features.shape == (4, model.head.in_features)
    assert (model.head.bias is not None) == bias
    torch.testing.assert_close(
        model(x), features @ model.head.weight.T + (model.head.bias if bias else 0)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_learns_and_half_precision_fits(name, x):
    model = FAMILIES[name]()
    assert sum(value.numel() for value in model.state_dict().values()) < 600_000
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_features_are_the_mean_over_all_places(x):
    model = FAMILIES["plain"]().eval()
    torch.testing.assert_close(model.features(x), model.body(x).mean((2, 3)))


def test_depthwise_and_shuffled_have_no_full_spatial_convolution_but_the_first():
    for name in ("depthwise", "shuffled"):
        convolutions = [m for m in FAMILIES[name]().modules() if isinstance(m, nn.Conv2d)]
        assert all(c.kernel_size == (1, 1) or c.groups == c.in_channels for c in convolutions[1:])


def test_half_of_the_channels_passes_a_unit_and_lands_in_every_second_place():
    unit = FAMILIES["shuffled"]().body[2].eval()
    h = torch.rand(1, 96, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit(h)[:, ::2], h[:, :48])
    torch.testing.assert_close(unit(h)[:, 1::2], unit.branch(h[:, 48:]))


def test_averaged_differs_in_the_pooling_alone(x):
    ours, theirs = AveragedFastConvNet().eval(), FastConvNet().eval()
    ours.load_state_dict(theirs.state_dict())
    before = ours.blocks(nn.functional.gelu(ours.whiten(x)))
    torch.testing.assert_close(ours.features(x), before.mean((2, 3)))
    torch.testing.assert_close(theirs.features(x), before.amax((2, 3)))
