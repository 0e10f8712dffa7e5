"""Glow: an invertible network, image <-> Gaussian noise, with an exact likelihood.

    log p(x) = log p(z) + log |det dz/dx|,   z = f(x)

Architecture, initial values and order of tensors follow the y0ast/Glow-PyTorch implementation that
Montazeran and Köthe build on (arXiv 2502.00820): squeeze -> K steps of (actnorm, invertible 1x1
convolution, affine coupling) -> split, on L levels. Layers are pure functions for `torch.func`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pixel_shuffle, pixel_unshuffle
from torch.nn.utils import skip_init

from oodlib.errors import OodlibError


def dequantise(images: Any, *, bits: int = 8, generator: torch.Generator | None = None) -> Tensor:
    """Images to a continuous variable: v / 2^bits - 1/2 + U(0, 2^-bits), in [-0.5, 0.5).

    images (N, C, H, W) uint8, torch or NumPy -> float32 on the same device; below 8 bits the lower
    bits are dropped. ``generator`` None draws from torch's own; draw once per image set where
    scores are compared. OodlibError: no image, another dtype.
    """
    v = images if isinstance(images, Tensor) else torch.tensor(np.asarray(images))
    if v.dtype != torch.uint8 or v.ndim != 4 or len(v) == 0:
        raise OodlibError(
            f"dequantise: needs images (N, C, H, W) uint8, N >= 1, with values 0 .. 255, got "
            f"{tuple(v.shape)} {v.dtype}. Turn x in [0, 1] into (255 * x).round().to(torch.uint8)."
        )
    device = generator.device if generator else v.device
    noise = torch.rand(v.shape, generator=generator, device=device)
    x = ((v >> (8 - bits)) + noise.to(v.device)) / 2**bits - 0.5
    return x.clamp(max=0.5 - 2**-25)  # 255 + noise may round up to 256


def quantise(x: Tensor, *, bits: int = 8) -> Tensor:
    """The inverse of `dequantise`: float -> uint8, clipped to [-0.5, 0.5), NaN black."""
    v = ((x.nan_to_num(-0.5) + 0.5) * 2**bits).floor().clamp(0, 2**bits - 1)
    return v.to(torch.uint8) << (8 - bits)


def bits_per_dim(log_prob: Any, image_shape: Sequence[int]) -> Any:
    """-log p / (ln 2 * C * H * W): nats per image -> bits per pixel and channel."""
    return -log_prob / (math.log(2) * math.prod(image_shape))


class ActNorm(nn.Module):
    """y = (x + b) exp(s) per channel, standardised by `Glow.initialise`; log|det| = H W sum(s)."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.logs = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.shape[2] * x.shape[3] * self.logs.sum()
        return (x + self.bias) * self.logs.exp(), log_det.expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.logs).exp() - self.bias

    def fit(self, x: Tensor) -> None:
        """b = -mean, s = -log(std + 1e-6) of x (N, C, H, W)."""
        std, mean = torch.std_mean(x, (0, 2, 3), correction=0, keepdim=True)
        self.bias.copy_(-mean[0])
        self.logs.copy_(-(std[0] + 1e-6).log())


class InvertibleConv(nn.Module):
    """1x1 convolution by P L (U + diag(sign exp(log_s))), P fixed; log|det| = H W sum(log_s)."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, generator: torch.Generator | None):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.lower = nn.Parameter(lower.tril(-1))
        self.log_s = nn.Parameter(upper.diagonal().abs().log())
        self.upper = nn.Parameter(upper.triu(1))
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", upper.diagonal().sign())

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U, (C, C) each; the other halves of the parameters have no effect."""
        ones = torch.ones_like(self.log_s)
        return self.lower.tril(-1) + torch.diag_embed(ones), self.upper.triu(1) + torch.diag_embed(
            self.sign * self.log_s.exp()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self.factors()
        y = (self.permutation @ lower @ upper) @ x.flatten(2)  # (N, C, H W)
        return y.view_as(x), (y.shape[2] * self.log_s.sum()).expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        lower, upper = self.factors()
        x = torch.linalg.solve_triangular(
            lower, self.permutation.T @ y.flatten(2), upper=False, unitriangular=True
        )
        return torch.linalg.solve_triangular(upper, x, upper=True).view_as(y)


class LogScale(nn.Module):
    """x exp(3 logs) per channel; the factor 3 speeds up learning of the scale."""

    def __init__(self, channels: int):
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (3 * self.logs).exp()


class ZeroConv(nn.Module):
    """3x3 convolution that starts at zero: constant couplings, standard normal priors."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.scale = LogScale(channels_out)
        self.conv = skip_init(nn.Conv2d, channels_in, channels_out, 3, padding=1)
        for p in self.conv.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.conv(x))


class Coupling(nn.Module):
    """z1 stays; z2 <- (z2 + shift) scale, both computed from z1; log|det| = sum log scale."""

    def __init__(self, channels: int, hidden: int, generator: torch.Generator | None):
        super().__init__()
        self.conv1 = skip_init(nn.Conv2d, channels // 2, hidden, 3, padding=1, bias=False)
        self.norm1 = ActNorm(hidden)
        self.conv2 = skip_init(nn.Conv2d, hidden, hidden, 1, bias=False)
        self.norm2 = ActNorm(hidden)
        self.conv3 = ZeroConv(hidden, channels)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, 0, 0.05, generator=generator)

    def net(self, z1: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log scale of z2, (N, C / 2, H, W) each."""
        h = z1.movedim(1, 3).contiguous().movedim(3, 1)  # channels last: up to 3x faster on a CPU
        h = self.norm1(self.conv1(h))[0].relu()
        h = self.norm2(self.conv2(h))[0].relu()
        shift, raw = _cross(self.conv3(h).contiguous())
        return shift, logsigmoid(raw + 2)  # scale in (0, 1); 0.88 at the start

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2 = z.chunk(2, 1)
        shift, log_scale = self.net(z1)
        return torch.cat([z1, (z2 + shift) * log_scale.exp()], 1), log_scale.sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        z1, y2 = y.chunk(2, 1)
        shift, log_scale = self.net(z1)
        return torch.cat([z1, y2 * (-log_scale).exp() - shift], 1)


class Step(nn.Module):
    """Actnorm, invertible 1x1 convolution, affine coupling."""

    def __init__(self, channels: int, hidden: int, generator: torch.Generator | None):
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.mix = InvertibleConv(channels, generator)
        self.coupling = Coupling(channels, hidden, generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, of_actnorm = self.actnorm(x)
        x, of_mix = self.mix(x)
        x, of_coupling = self.coupling(x)
        return x, of_actnorm + of_mix + of_coupling

    def inverse(self, y: Tensor) -> Tensor:
        return self.actnorm.inverse(self.mix.inverse(self.coupling.inverse(y)))


class Level(nn.Module):
    """K steps at one resolution; but for the last level, a prior of the half that leaves."""

    steps: Any

    def __init__(
        self, channels: int, steps: int, hidden: int, last: bool, generator: torch.Generator | None
    ):
        super().__init__()
        self.steps = nn.ModuleList(Step(channels, hidden, generator) for _ in range(steps))
        self.split = None if last else ZeroConv(channels // 2, channels)


class Glow(nn.Module):
    """Multi-scale Glow (Kingma, Dhariwal, arXiv 1807.03039); ``initialise(x)`` once, then train.

    Parameters
    ----------
    image_shape : (C, H, W); H and W divisible by 2^levels
    steps, levels, hidden : K, L and the channels inside couplings; 14 K L + 3 L tensors. Defaults
        are the paper's: 1,353 tensors, 44,235,312 parameters
    bits : of a pixel value, for the likelihood of the discrete image
    generator : of the initial weights; None draws from torch's own

    All methods take x (N, C, H, W) as `dequantise` makes it, in the model's dtype. The buffer
    `initialised` is saved.

    Raises
    ------
    OodlibError : a shape that cannot be halved L times, a size below one; x of another shape or
        dtype, empty, with a NaN or outside [-0.5, 0.5] (not checked inside `vmap`)
    """

    initialised: Tensor
    levels: Any

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        steps: int = 32,
        levels: int = 3,
        hidden: int = 512,
        bits: int = 8,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        shape = tuple(int(n) for n in image_shape)
        if len(shape) != 3 or min(*shape, steps, levels, hidden) < 1 or not 1 <= bits <= 8:
            raise OodlibError(
                "Glow: needs image_shape (C, H, W), steps, levels and hidden of at least 1, bits "
                f"in 1 .. 8, got {shape}, {steps}, {levels}, {hidden} and {bits}."
            )
        channels, height, width = shape
        if height % 2**levels or width % 2**levels:
            raise OodlibError(
                f"Glow: the sides are halved {levels} times and must be divisible by {2**levels}; "
                f"got {height} x {width}. Pad or resize the images, or use fewer levels."
            )
        self.image_shape, self.bits = shape, bits
        self.latent_shapes: list[tuple[int, int, int]] = []
        self.levels = nn.ModuleList()
        for level in range(1, levels + 1):
            channels, height, width = 4 * channels, height // 2, width // 2
            self.levels.append(Level(channels, steps, hidden, level == levels, generator))
            channels = channels if level == levels else channels // 2
            self.latent_shapes.append((channels, height, width))
        self.top = ZeroConv(2 * channels, 2 * channels)
        self.register_buffer("initialised", torch.tensor(False))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set every actnorm so that its output for a batch has mean 0 and variance 1; once.

        A second call changes nothing and warns; fewer than 256 images warn. OodlibError: images of
        constant colour, or a channel without noise.
        """
        self._check("initialise", x, images=True)
        if self.initialised:
            return warnings.warn(
                "Glow.initialise: initialised already, nothing changed.", UserWarning, stacklevel=2
            )
        spread = x.amax((0, 2, 3)) - x.amin((0, 2, 3))
        if spread.max() <= 2**-self.bits or spread.min() == 0:
            raise OodlibError(
                f"Glow.initialise: needs images that vary, got {len(x)} of constant colour: range "
                f"per channel {[round(s, 5) for s in spread.tolist()]}. Give dequantised training "
                "images."
            )
        if len(x) < 256:
            message = f"Glow.initialise: {len(x)} images are few; use 256 or more."
            warnings.warn(message, UserWarning, stacklevel=2)
        hooks = [
            module.register_forward_pre_hook(lambda actnorm, inputs: actnorm.fit(*inputs))
            for module in self.modules()
            if isinstance(module, ActNorm)
        ]
        try:
            self(x)
        finally:
            for hook in hooks:
                hook.remove()
        self.initialised.fill_(True)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Raw latents z_1 .. z_L (coarsest last), log|det dz/dx| (N,) in nats."""
        self._check("forward", x)
        latents, log_det, _ = self._encode(x)
        return latents, log_det

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) - C H W ln 2^bits, (N,) nats; -inf where it overflows, never NaN."""
        self._check("log_prob", x, images=True)
        _, log_det, log_prior = self._encode(x)
        value = log_prior + log_det - math.prod(self.image_shape) * self.bits * math.log(2)
        return value.where(value.isfinite(), -math.inf)

    @torch.no_grad()
    def inverse(self, latents: Sequence[Tensor]) -> Tensor:
        """x (N, C, H, W) of the latents that `forward` gives."""
        n, shapes = len(latents[-1]) if latents else 0, [tuple(z.shape) for z in latents]
        if n == 0 or shapes != [(n, *shape) for shape in self.latent_shapes]:
            raise OodlibError(
                f"Glow.inverse: needs latents (N, ...) of shapes {self.latent_shapes} and one N, "
                f"got {shapes}. Give what forward returned."
            )
        return self._decode(latents[-1], list(latents[:-1]), None)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """n draws (n, C, H, W), not confined to [-0.5, 0.5); `quantise` makes them images."""
        if n < 1:
            raise OodlibError(f"Glow.sample: needs n >= 1, got {n}.")
        return self._decode(_draw(*self._top_prior(n), generator), None, generator)

    def _encode(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Latents, log|det| (N,) and log p(z) (N,)."""
        latents: list[Tensor] = []
        log_det = log_prior = x.new_zeros(len(x))
        for level in self.levels:
            x = pixel_unshuffle(x, 2)  # channel c, row dy, column dx -> 4c + 2dy + dx
            for step in level.steps:
                x, change = step(x)
                log_det = log_det + change
            if level.split is not None:
                x, z = x.chunk(2, 1)
                latents.append(z)
                log_prior = log_prior + _log_normal(z, *_cross(level.split(x)))
        return [*latents, x], log_det, log_prior + _log_normal(x, *self._top_prior(len(x)))

    def _decode(
        self, x: Tensor, latents: list[Tensor] | None, generator: torch.Generator | None
    ) -> Tensor:
        """From the coarsest latent upwards; the others are given, or drawn from their priors."""
        for i, level in reversed(list(enumerate(self.levels))):
            if level.split is not None:
                z = latents[i] if latents is not None else _draw(*_cross(level.split(x)), generator)
                x = torch.cat([x, z], 1)
            for step in reversed(level.steps):
                x = step.inverse(x)
            x = pixel_shuffle(x, 2)
        return x

    def _top_prior(self, n: int) -> tuple[Tensor, Tensor]:
        """Mean and log-sd of the coarsest latent: a convolution of zeros, that is its bias."""
        channels, height, width = self.latent_shapes[-1]
        return _cross(self.top(self.top.conv.weight.new_zeros(n, 2 * channels, height, width)))

    def _check(self, method: str, x: Tensor, *, images: bool = False) -> None:
        dtype = self.top.conv.weight.dtype
        if tuple(x.shape[1:]) != self.image_shape or len(x) == 0 or x.dtype != dtype:
            raise OodlibError(
                f"Glow.{method}: needs at least one image, (N, {str(self.image_shape)[1:-1]}) "
                f"{dtype}, got {tuple(x.shape)} {x.dtype}. Use dequantise(uint8 images)."
            )
        try:
            low, high = (float(v) for v in x.detach().aminmax())
        except RuntimeError:  # inside vmap no value can be read
            return
        if not max(-low, high) <= (0.5 if images else 3e38):
            raise OodlibError(
                f"Glow.{method}: needs finite values{' in [-0.5, 0.5]' * images}, got {low:.4g} .. "
                f"{high:.4g}. Use dequantise(uint8 images)."
            )


def _cross(h: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd channels."""
    return h[:, ::2], h[:, 1::2]


def _log_normal(z: Tensor, mean: Tensor, logs: Tensor) -> Tensor:
    """log N(z; mean, exp(logs)^2), summed over all but the batch axis; (N,) nats."""
    terms = math.log(2 * math.pi) + 2 * logs + (z - mean) ** 2 * (-2 * logs).exp()
    return -0.5 * terms.sum((1, 2, 3))


def _draw(mean: Tensor, logs: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator else mean.device
    noise = torch.randn(mean.shape, generator=generator, device=device)
    return mean + logs.exp() * noise.to(mean)
