"""OOD prototypes: the split by hooks reproduces the network, early means stream, mixing and noise
are as said.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from oodlib.errors import OodlibError
from oodlib.models import FastConvNet
from oodlib.models.cifar_nets import DenseNetBC, ResNetA
from oodlib.scores.grood_prototypes import (
    early_layers,
    early_prototypes,
    noise_features,
    noise_images,
    split_forward,
    synthetic_features,
)


def transformer(library, name, **options):
    return lambda: getattr(pytest.importorskip(library), name)(num_classes=7, **options)


NETWORKS = {  # name -> constructor, layers; all for 32 x 32 pixels
    "FastConvNet": (lambda: FastConvNet(7, widths=(8, 12, 16)), ["whiten", "blocks.0", "blocks.1"]),
    "ResNet-20": (lambda: ResNetA(3, 7), ["layer1", "layer2", "layer2.1"]),
    "ResNet-56": (lambda: ResNetA(9, 7), ["layer1"]),
    "DenseNet": (lambda: DenseNetBC(7, layers=2), ["block1", "trans1", "trans2"]),
    "torchvision ResNet": (transformer("torchvision.models", "resnet18"), ["layer1", "layer3"]),
    "torchvision ViT": (
        transformer(
            "torchvision.models",
            "VisionTransformer",
            image_size=32,
            patch_size=8,
            num_layers=3,
            num_heads=2,
            hidden_dim=24,
            mlp_dim=32,
        ),
        ["encoder.layers.encoder_layer_1"],
    ),
    "torchvision Swin": (
        transformer(
            "torchvision.models",
            "SwinTransformer",
            patch_size=[4, 4],
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=[4, 4],
        ),
        ["features.1"],
    ),
    "timm ViT": (
        transformer(
            "timm.models.vision_transformer",
            "VisionTransformer",
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=3,
            num_heads=3,
        ),
        ["blocks.0", "blocks.1"],
    ),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A random network, the names of its early layers, three images."""
    build, layers = NETWORKS[request.param]
    torch.manual_seed(0)
    return (
        build().eval(),
        layers,
        torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    )


def test_the_split_reproduces_the_logits_whatever_image_comes_before_it(network):
    model, layers, x = network
    with torch.no_grad():
        logits = model(x)
    for layer in layers:
        early, features, again = split_forward(model, layer, x)
        torch.testing.assert_close(again, logits)
        _, features_after, resumed = split_forward(model, layer, torch.zeros_like(x), early)
        torch.testing.assert_close(resumed, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features_after, features, rtol=1e-4, atol=1e-5)


def test_known_early_layers_carry_all_information(network):
    model, layers, x = network
    if isinstance(model, FastConvNet | ResNetA | DenseNetBC) or "layer1" in layers:
        assert set(layers) & set(early_layers(model))
        early_prototypes(
            model, early_layers(model), [(x, torch.arange(3))], 3
        )  # refuses a path around one


@pytest.fixture
def small():
    """A small network, 30 images and labels of 7 classes."""
    torch.manual_seed(0)
    model, g = FastConvNet(7, widths=(8, 12, 16)).eval(), torch.Generator().manual_seed(1)
    return model, torch.randn(30, 3, 32, 32, generator=g), torch.arange(30) % 7


def in_batches(x, y, size, order=None):
    order = torch.arange(len(x)) if order is None else order
    return [(x[i], y[i]) for i in order.split(size)]


def test_streamed_early_prototypes_are_the_class_means_in_any_order(small):
    model, x, y = small
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    found = early_prototypes(model, ["blocks.0", "blocks.1"], in_batches(x, y, 7), 7)
    shuffled = early_prototypes(model, ["blocks.0", "blocks.1"], in_batches(x, y, 4, order), 7)
    for layer in ("blocks.0", "blocks.1"):
        maps = split_forward(model, layer, x)[0]
        for c in range(7):
            torch.testing.assert_close(
                found.means[layer][c], maps[y == c].mean(0), rtol=1e-4, atol=1e-5
            )
        torch.testing.assert_close(shuffled.means[layer], found.means[layer], rtol=1e-5, atol=1e-6)
    assert found.forwards == 30


def test_mixing_by_hand(small):
    model, x, y = small
    means = early_prototypes(model, ["blocks.0"], in_batches(x, y, 10), 7).means["blocks.0"]
    mixed = synthetic_features(model, "blocks.0", means, in_batches(x, y, 10), lam=0.3)
    with torch.no_grad():
        early = model.blocks[0](nn.functional.gelu(model.whiten(x)))
        z = 0.3 * early + 0.7 * means[model(x).argsort(1, descending=True)[:, 1]]
        expected = model.pool(model.blocks[2](model.blocks[1](z))).flatten(1)
    np.testing.assert_allclose(mixed.features, expected, rtol=1e-4, atol=1e-5)
    assert mixed.forwards == 60


def test_lambda_one_is_the_plain_forward_pass(small):
    model, x, y = small
    means = early_prototypes(model, ["blocks.1"], in_batches(x, y, 10), 7).means["blocks.1"]
    with torch.no_grad():
        plain = model.features(x)
    np.testing.assert_allclose(
        synthetic_features(model, "blocks.1", means, [(x, y)], lam=1.0).features,
        plain,
        rtol=1e-5,
        atol=1e-6,
    )


def test_noise_images_are_blurred_uniform_noise():
    images = noise_images(200, (3, 16, 16), generator=torch.Generator().manual_seed(0))
    assert images.shape == (200, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    assert abs(images.mean() - 0.5) < 0.01
    step = (images[..., 1:] - images[..., :-1]).abs().mean()
    assert step < 0.2  # 1/3 without the blur
    again = noise_images(200, (3, 16, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, images, rtol=0, atol=0)


def test_noise_keeps_the_least_certain_tenth(small):
    model = small[0]
    found = noise_features(model, (3, 32, 32), n=15, seed=3)
    g = torch.Generator().manual_seed(3)
    expected = []
    with torch.no_grad():
        for _ in range(2):
            h = model.features(noise_images(100, (3, 32, 32), generator=g))
            expected.append(h[model.head(h).logsumexp(1).argsort()[:10]])
    np.testing.assert_allclose(found.features, torch.cat(expected)[:15], rtol=1e-4, atol=1e-5)
    assert found.forwards == 200
    normalised = noise_features(model, (3, 32, 32), n=15, seed=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert not np.allclose(normalised.features, found.features)


def test_the_mode_of_the_model_is_kept_and_no_hook_is_left(small):
    model, x, y = small
    model.train()
    early_prototypes(model, ["blocks.0"], [(x, y)], 7)
    split_forward(model, "blocks.0", x)
    assert model.training and not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 7)

    def forward(self, x):
        return self.head(relu(self.shared(self.shared(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, x, y: split_forward(m, "stem", x),
            "has no layer 'stem'. Its top-level layers are whiten, blocks",
        ),
        (lambda m, x, y: split_forward(Twice(), "shared", x), "'shared' ran 2 times in one pass"),
        (
            lambda m, x, y: early_prototypes(ResNetA(3, 7), ["layer1.1.conv1"], [(x, y)], 7),
            "a path leads around layer",
        ),
        (
            lambda m, x, y: split_forward(ResNetA(3, 7), "layer1.1.conv1", torch.zeros_like(x)),
            "a path leads around layer",
        ),
        (
            lambda m, x, y: synthetic_features(
                ResNetA(3, 7), "layer1.1.conv1", torch.ones(7, 16, 32, 32), [(x, y)]
            ),
            "a path leads around layer",
        ),
        (lambda m, x, y: early_layers(m.blocks), "none are known for Sequential"),
        (lambda m, x, y: early_prototypes(m, [], [(x, y)], 7), "name at least one layer"),
        (lambda m, x, y: early_prototypes(m, ["blocks.0"], [], 7), "there was no batch"),
        (lambda m, x, y: early_prototypes(m, ["blocks.0"], [(x, y)], 8), "class 7 has none"),
        (lambda m, x, y: early_prototypes(m, ["blocks.0"], [(x, y - 1)], 7), "got -1 .. 5"),
        (
            lambda m, x, y: synthetic_features(m, "blocks.0", torch.ones(7, 3), [(x, y)]),
            "prototypes of 'blocks.0' must be",
        ),
        (
            lambda m, x, y: synthetic_features(m, "blocks.0", torch.ones(7, 3), [(x, y)], lam=1.5),
            r"lam must lie in \[0, 1",
        ),
        (
            lambda m, x, y: synthetic_features(m, "blocks.0", torch.ones(7, 3), []),
            "there was no batch",
        ),
        (
            lambda m, x, y: synthetic_features(m, "blocks.0", torch.ones(7, 3), [(x[:0], y)]),
            "a batch without an image",
        ),
        (
            lambda m, x, y: early_prototypes(m, ["blocks.0"], [(x[:0], y)], 7),
            "a batch without an image",
        ),
        (lambda m, x, y: noise_features(m, (3, 32, 32), mean=(0.5,) * 3), "both mean and std"),
        (lambda m, x, y: noise_features(m, (3, 32, 32), n=0), "n must be at least 1, got 0"),
        (
            lambda m, x, y: noise_images(1, (3, 2, 2), generator=torch.Generator()),
            "at least 4 x 4 pixels",
        ),
    ],
)
def test_refusals(small, call, message):
    with pytest.raises(OodlibError, match=message):
        call(*small)
