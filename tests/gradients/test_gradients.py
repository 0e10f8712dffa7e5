"""Per-layer GradNorm equals a loop of backward passes, and the closed form on the last layer."""

import math

import pytest
import torch
from torch import nn

from oodlib import OodlibError
from oodlib.gradients import gradnorm_by_layer, parameter_groups
from oodlib.models.fast_convnet import FastConvNet
from oodlib.scores import gradnorm

close = torch.testing.assert_close


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = FastConvNet(num_classes=7, widths=(8, 8, 12)).eval()
    return model, torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_last_layer_equals_the_closed_form(net):
    model, x = net
    for norm in (0.5, 1, 2, math.inf):
        by_layer = gradnorm_by_layer(
            model, x, groups={"head": ["head.weight"]}, temperature=2.0, norm=norm
        )
        closed = gradnorm(model.features(x), model(x), temperature=2.0, norm=norm)
        close(by_layer["head"], closed, rtol=1e-4, atol=0)


@pytest.mark.oracle
@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_groups_equal_a_loop_of_backward_passes(net, norm):
    model, x = net
    groups = {"stage 0": ["blocks.0.*"], "head": ["head.*"], "all": ["*"]}
    result = gradnorm_by_layer(model, x, groups=groups, norm=norm, chunk_size=2)
    names = parameter_groups(model, groups)
    for p in model.parameters():
        p.requires_grad_(True)
    for i in range(len(x)):
        model.zero_grad()
        (-model(x[i : i + 1]).log_softmax(1).mean()).backward()
        for group, members in names.items():
            g = torch.cat([model.get_parameter(n).grad.flatten() for n in members]).double()
            close(-result[group][i], torch.linalg.vector_norm(g, norm), rtol=1e-4, atol=0)


def test_every_parameter_is_a_group_by_default(net):
    model, x = net
    assert list(gradnorm_by_layer(model, x[:2])) == [n for n, _ in model.named_parameters()]


def test_chunked_equals_whole(net):
    model, x = net
    groups = {"last": ["blocks.2.*", "head.weight"]}
    close(
        gradnorm_by_layer(model, x, groups=groups, chunk_size=1)["last"],
        gradnorm_by_layer(model, x, groups=groups, chunk_size=5)["last"],
        rtol=1e-4,
        atol=0,
    )


def test_model_is_left_as_it_was(net):
    model, x = net
    model.train()
    model.blocks[0].norm1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradnorm_by_layer(model, x[:2], groups={"head": ["head.*"]})
    assert model.training and not model.blocks[0].norm1.training
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        close(value, before[key], rtol=0, atol=0)


@pytest.mark.slow
def test_torchvision_resnet():
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = models.resnet18(num_classes=6).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    result = gradnorm_by_layer(
        model, x, groups={"last": ["fc.weight"], "stage 4": ["layer4.*"]}, chunk_size=2
    )
    taps = {}
    model.avgpool.register_forward_hook(lambda _, __, out: taps.update(h=out.flatten(1)))
    close(result["last"], gradnorm(*reversed((model(x), taps["h"]))), rtol=1e-4, atol=0)
    assert (result["stage 4"] < 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"groups": {"last": ["fc.weight"]}},
            "'fc.weight' of group 'last' matches no parameter. Known: whiten.weight",
        ),
        ({"norm": 0}, "norm q must lie in"),
        ({"temperature": -1}, "temperature must be positive"),
        ({"chunk_size": 0}, "chunk_size >= 1"),
    ],
)
def test_refusals(net, options, message):
    with pytest.raises(OodlibError, match=message):
        gradnorm_by_layer(*net, **options)


def test_logits_of_another_shape_are_refused():
    with pytest.raises(OodlibError, match=r"must return logits \(n, C\)"):
        gradnorm_by_layer(nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 4, 4))
