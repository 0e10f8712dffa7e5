"""Glow: exact inverse, exact determinant, the paper's size, and one clear error for every bad
input.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from oodlib import OodlibError
from oodlib.models import Glow, bits_per_dim, dequantise, quantise
from oodlib.models.glow import ActNorm, InvertibleConv, ZeroConv

close = torch.testing.assert_close
SHAPES = [(3, 4, 4), (1, 4, 8)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_images(n: int, shape: tuple[int, ...] = (3, 8, 8), seed: int = 0) -> torch.Tensor:
    g = seeded(seed)
    return dequantise(torch.randint(256, (n, *shape), dtype=torch.uint8, generator=g), generator=g)


def small(shape: tuple[int, ...] = (3, 8, 8), **options) -> Glow:
    """A float64 Glow away from its start: every parameter moved, so no coupling is the identity."""
    glow = Glow(
        shape, **{"steps": 2, "levels": 2, "hidden": 6, **options}, generator=seeded()
    ).double()
    g = seeded(1)
    with torch.no_grad():
        for p in glow.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return glow


@pytest.fixture(scope="module")
def paper_size() -> Glow:
    return Glow((3, 32, 32))


# --- the flow


@pytest.mark.parametrize("shape", SHAPES)
def test_inverse_undoes_forward(shape):
    glow, x = small(shape), noise_images(5, shape).double()
    latents, _ = glow(x)
    assert [tuple(z.shape[1:]) for z in latents] == glow.latent_shapes
    assert sum(z[0].numel() for z in latents) == math.prod(shape)
    close(glow.inverse(latents), x, rtol=0, atol=1e-10)


@pytest.mark.oracle
@pytest.mark.parametrize("shape", SHAPES)
def test_log_determinant_equals_that_of_the_jacobian(shape):
    glow, x = small(shape), noise_images(2, shape).double()

    def flat(image):
        return torch.cat([z.flatten() for z in glow(image[None])[0]])

    for image, log_det in zip(x, glow(x)[1], strict=True):
        jacobian = torch.autograd.functional.jacobian(flat, image).flatten(1)
        close(torch.linalg.slogdet(jacobian.detach())[1], log_det.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.oracle
def test_log_prob_is_the_change_of_variables_with_the_learned_priors():
    glow, x = small(), noise_images(3).double()
    (z1, z2), log_det = glow(x)
    y = z2
    for step in reversed(glow.levels[1].steps):
        y = step.inverse(y)
    prior = glow.levels[0].split(F.pixel_shuffle(y, 2))  # z_1 is judged by the half that went on
    top = (glow.top.conv.bias * (3 * glow.top.scale.logs.flatten()).exp())[None, :, None, None]
    expected = (
        log_det
        + Normal(prior[:, ::2], prior[:, 1::2].exp()).log_prob(z1).sum((1, 2, 3))
        + Normal(top[:, ::2], top[:, 1::2].exp()).log_prob(z2).sum((1, 2, 3))
        - 3 * 64 * math.log(256)
    )
    close(glow.log_prob(x), expected)
    close(bits_per_dim(glow.log_prob(x), (3, 8, 8)), -expected / math.log(2) / 192)


def test_the_density_integrates_to_one():
    """Importance sampling of 4 dimensions from a wider normal in latent space."""
    glow = small((1, 2, 2), levels=1)
    with torch.no_grad():
        glow.levels[0].steps[0].actnorm.logs += 1.2  # so that a good part lies in [-0.5, 0.5]
    z = 2 * torch.randn(20_000, 4, 1, 1, generator=seeded(), dtype=torch.float64)
    x = glow.inverse([z])
    _, log_det = glow(x)
    q = Normal(0.0, 2.0).log_prob(z).sum((1, 2, 3)) + log_det  # density of the proposal, in x
    keep = x.abs().amax((1, 2, 3)) <= 0.5
    inside = (glow.log_prob(x[keep]) + 4 * math.log(256) - q[keep]).exp().sum() / len(x)
    drawn = glow.sample(20_000, generator=seeded(3)).abs().amax((1, 2, 3)) <= 0.5
    assert 0.05 < inside < 0.95
    close(inside.item(), drawn.double().mean().item(), rtol=0, atol=0.02)


@pytest.mark.oracle
def test_lu_convolution_is_a_convolution_by_its_weight():
    conv = InvertibleConv(12, seeded()).double()
    with torch.no_grad():
        for p in conv.parameters():
            p += 0.1 * torch.randn(p.shape, generator=seeded(2), dtype=p.dtype)
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64, generator=seeded())
    y, log_det = conv(x)
    weight = torch.stack(
        [conv(e.view(1, 12, 1, 1))[0].flatten() for e in torch.eye(12, dtype=torch.float64)], 1
    )
    close(y, F.conv2d(x, weight[:, :, None, None]))
    close(log_det, 15 * torch.linalg.slogdet(weight)[1].expand(2))


def test_lu_convolution_starts_as_a_rotation_and_ignores_the_other_halves():
    conv = InvertibleConv(12, seeded()).double()
    x = torch.randn(2, 12, 2, 2, dtype=torch.float64, generator=seeded())
    y, log_det = conv(x)
    close(y.square().sum(1), x.square().sum(1), rtol=1e-5, atol=1e-5)
    close(log_det, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-5)
    with torch.no_grad():
        conv.lower += torch.ones(12, 12).triu()
        conv.upper += torch.ones(12, 12).tril()
    close(conv(x)[0], y)


def test_squeeze_order():
    glow, seen = Glow((2, 4, 4), steps=1, levels=1, hidden=2, generator=seeded()), []
    glow.levels[0].steps[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.arange(32.0).view(1, 2, 4, 4) / 100
    glow(x)
    for c, dy, dx in np.ndindex(2, 2, 2):
        close(seen[0][0, 4 * c + 2 * dy + dx], x[0, c, dy::2, dx::2])


def test_couplings_and_priors_start_as_constants():
    glow = Glow((3, 8, 8), steps=2, levels=2, hidden=6, generator=seeded())
    coupling = glow.levels[0].steps[0].coupling
    z = torch.randn(2, 12, 4, 4, generator=seeded())
    y, log_det = coupling(z)
    scale = 1 / (1 + math.exp(-2))
    close(y, torch.cat([z[:, :6], z[:, 6:] * scale], 1))
    close(log_det, torch.full((2,), 6 * 16 * math.log(scale)))
    assert all(
        not p.any() for m in glow.modules() if isinstance(m, ZeroConv) for p in m.parameters()
    )
    assert coupling.conv2.weight.detach().std() == pytest.approx(0.05, rel=0.3)


# --- size, weights, files


def test_the_papers_size(paper_size):
    assert sum(p.numel() for p in paper_size.parameters()) == 44_235_312
    assert len(list(paper_size.parameters())) == 1353
    assert paper_size.latent_shapes == [(6, 16, 16), (12, 8, 8), (48, 4, 4)]


@pytest.mark.parametrize(("steps", "levels"), [(1, 1), (4, 2), (3, 3)])
def test_number_of_tensors(steps, levels):
    glow = Glow((1, 16, 16), steps=steps, levels=levels, hidden=4)
    assert len(list(glow.parameters())) == 14 * steps * levels + 3 * (levels - 1) + 3


def test_tensor_order_of_a_step():
    names = [
        n.rpartition(".")[2]
        for n, _ in Glow((3, 4, 4), steps=1, levels=1, hidden=4).levels[0].named_parameters()
    ]
    assert names == [
        "bias",
        "logs",
        "lower",
        "log_s",
        "upper",
        "weight",
        "bias",
        "logs",
        "weight",
        "bias",
        "logs",
        "logs",
        "weight",
        "bias",
    ]


def test_weights_come_from_the_generator_alone():
    before = torch.get_rng_state()
    a, b, c = (
        Glow((3, 8, 8), steps=1, levels=1, hidden=4, generator=seeded(s)).state_dict()
        for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["levels.0.steps.0.mix.lower"], c["levels.0.steps.0.mix.lower"])


def test_saved_and_loaded_is_the_same_model(tmp_path):
    x = noise_images(256)
    glow = Glow((3, 8, 8), steps=2, levels=2, hidden=6, generator=seeded())
    glow.initialise(x)
    torch.save(glow.state_dict(), tmp_path / "glow.pt")
    other = Glow((3, 8, 8), steps=2, levels=2, hidden=6, generator=seeded(5))
    assert not other.initialised
    other.load_state_dict(torch.load(tmp_path / "glow.pt", weights_only=True))
    assert other.initialised
    assert torch.equal(other.log_prob(x), glow.log_prob(x))
    with pytest.warns(UserWarning, match="initialised already"):
        other.initialise(noise_images(256, seed=9))
    assert torch.equal(other.log_prob(x), glow.log_prob(x))


# --- initialisation


def test_actnorm_outputs_are_standardised():
    glow, seen = Glow((3, 16, 16), steps=3, levels=2, hidden=8, generator=seeded()).double(), []
    x = noise_images(300, (3, 16, 16)).double() ** 3  # neither uniform nor of variance 1/12
    glow.initialise(x)
    for module in glow.modules():
        if isinstance(module, ActNorm):
            module.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    glow(x)
    assert len(seen) == 3 * 2 * 3
    for y in seen:
        close(y.mean((0, 2, 3)), torch.zeros(y.shape[1], dtype=y.dtype), rtol=0, atol=1e-8)
        close(
            y.var((0, 2, 3), correction=0), torch.ones(y.shape[1], dtype=y.dtype), rtol=0, atol=1e-3
        )


def test_uniform_noise_costs_what_a_gaussian_fit_costs():
    """8 bits of uniform noise, and 0.25 for describing it by a normal of its variance: log2(2 pi e
    / 12) / 2.
    """
    glow, x = (
        Glow((3, 16, 16), steps=4, levels=2, hidden=8, generator=seeded()),
        noise_images(256, (3, 16, 16)),
    )
    glow.initialise(x)
    expected = 8 + math.log2(2 * math.pi * math.e / 12) / 2
    assert bits_per_dim(glow.log_prob(x), (3, 16, 16)).mean().item() == pytest.approx(
        expected, abs=0.04
    )


def test_few_images_warn_and_none_are_refused():
    glow = Glow((3, 8, 8), steps=1, levels=1, hidden=4, generator=seeded())
    with pytest.raises(OodlibError, match="at least one image"):
        glow.initialise(noise_images(4)[:0])
    assert not glow.initialised
    with pytest.warns(UserWarning, match="255 images are few"):
        glow.initialise(noise_images(255))


@pytest.mark.parametrize(
    "x", [dequantise(torch.full((300, 3, 8, 8), 7, dtype=torch.uint8)), torch.zeros(300, 3, 8, 8)]
)
def test_constant_images_cannot_initialise(x):
    glow = Glow((3, 8, 8), steps=1, levels=1, hidden=4, generator=seeded())
    before = copy.deepcopy(glow.state_dict())
    with pytest.raises(OodlibError, match="300 of constant colour"):
        glow.initialise(x)
    assert all(torch.equal(v, before[k]) for k, v in glow.state_dict().items())


def test_a_constant_image_among_others_is_scored():
    glow = Glow((3, 8, 8), steps=1, levels=1, hidden=4, generator=seeded())
    glow.initialise(noise_images(256))
    assert glow.log_prob(dequantise(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))).isfinite().all()


# --- pixels


@pytest.mark.parametrize("bits", [8, 5])
def test_dequantise_and_back(bits):
    v = torch.arange(256, dtype=torch.uint8).repeat(48).view(16, 3, 16, 16)
    x = dequantise(v, bits=bits, generator=seeded())
    assert x.dtype == torch.float32 and x.min() >= -0.5 and x.max() < 0.5
    close(quantise(x, bits=bits), v >> (8 - bits) << (8 - bits), rtol=0, atol=0)
    u = (x + 0.5) * 2**bits % 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.std() - 12**-0.5) < 0.01


def test_white_stays_below_the_upper_limit():
    """255 plus noise is rounded up to 256 about once in 130,000."""
    assert (
        dequantise(torch.full((16, 1, 256, 256), 255, dtype=torch.uint8), generator=seeded()).max()
        < 0.5
    )


def test_dequantise_follows_its_generator_and_takes_numpy():
    v = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8, generator=seeded())
    close(
        dequantise(v.numpy(), generator=seeded(1)),
        dequantise(v, generator=seeded(1)),
        rtol=0,
        atol=0,
    )
    assert not torch.equal(dequantise(v, generator=seeded(1)), dequantise(v, generator=seeded(2)))


def test_samples_follow_the_generator_and_have_the_models_likelihood():
    glow = Glow((3, 8, 8), steps=2, levels=2, hidden=6, generator=seeded())
    glow.initialise(noise_images(256) / 4)
    x = glow.sample(200, generator=seeded(4))
    assert torch.equal(x, glow.sample(200, generator=seeded(4))) and x.shape == (200, 3, 8, 8)
    latents, _ = glow(x)
    for z in latents:  # priors are still standard normal
        assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    assert quantise(x).dtype == torch.uint8 and not quantise(torch.tensor([[[[math.nan]]]])).any()


# --- per-sample transforms, overflow, refusals


def test_per_sample_gradients_by_torch_func():
    glow, x = small(steps=1), noise_images(3).double()

    class LogProb(nn.Module):
        def __init__(self):
            super().__init__()
            self.glow = glow

        def forward(self, image):
            return self.glow.log_prob(image[None])[0]

    model = LogProb()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    gradients = vmap(grad(lambda p, image: functional_call(model, p, image)), (None, 0))(
        parameters, x
    )
    for i, image in enumerate(x):
        for (name, _), g in zip(
            model.named_parameters(),
            torch.autograd.grad(model(image), list(model.parameters())),
            strict=True,
        ):
            close(gradients[name][i], g, rtol=1e-8, atol=1e-8)


def test_an_overflow_is_minus_infinity_and_leaves_its_neighbours_alone():
    glow = Glow((3, 8, 8), steps=2, levels=2, hidden=6, generator=seeded())
    x = noise_images(3)
    x[0] = 0
    with torch.no_grad():
        glow.levels[0].steps[0].actnorm.logs.fill_(60.0)  # e^60 twice is more than float32 holds
        glow.levels[0].steps[1].actnorm.logs.fill_(60.0)
    value = glow.log_prob(x)
    assert value[0].isfinite() and (value[1:] == -math.inf).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 8, 4), r"got \(2, 3, 8, 4\) torch.float32"),
        (torch.zeros(2, 1, 8, 8), r"got \(2, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"\(N, 3, 8, 8\) torch.float32, got \(3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), "at least one image"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), "torch.float64"),
        (torch.full((2, 3, 8, 8), math.nan), "needs finite values"),
        (torch.full((2, 3, 8, 8), math.inf), "needs finite values"),
        (torch.full((2, 3, 8, 8), 0.7), r"in \[-0.5, 0.5\], got 0.7"),
        (torch.full((2, 3, 8, 8), -3.0), r"in \[-0.5, 0.5\], got -3"),
    ],
)
def test_inputs_that_are_refused(x, message):
    glow = Glow((3, 8, 8), steps=1, levels=1, hidden=4)
    for method in (glow.log_prob, glow.initialise):
        with pytest.raises(OodlibError, match=message):
            method(x)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 4, 4),
        torch.full((2, 3, 4, 4), 300),
        torch.zeros(3, 4, 4).byte(),
        torch.zeros(0, 3, 4, 4).byte(),
    ],
)
def test_dequantise_refuses(images):
    with pytest.raises(OodlibError, match=r"\(N, C, H, W\) uint8"):
        dequantise(images)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 28, 28), {"levels": 3}, "divisible by 8; got 28 x 28"),
        ((3, 32, 30), {"levels": 2}, "divisible by 4; got 32 x 30"),
        ((32, 32), {}, r"image_shape \(C, H, W\)"),
        ((3, 32, 32), {"steps": 0}, "at least 1"),
        ((3, 32, 32), {"bits": 9}, "bits in 1 .. 8"),
    ],
)
def test_shapes_that_are_refused(shape, options, message):
    with pytest.raises(OodlibError, match=message):
        Glow(shape, **options)


def test_latents_and_sizes_that_are_refused():
    glow = Glow((3, 8, 8), steps=1, levels=2, hidden=4)
    latents, _ = glow(noise_images(2))
    for wrong in ([], latents[:1], [latents[0], latents[1][:1]], latents[::-1]):
        with pytest.raises(OodlibError, match="needs latents"):
            glow.inverse(wrong)
    with pytest.raises(OodlibError, match="n >= 1"):
        glow.sample(0)
