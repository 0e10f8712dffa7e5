"""Procedural textures: twelve families of grey fields, coloured like the glyphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float64]
TAU = 2 * np.pi


def _turn(x: Field, y: Field, u: Field, low: float, high: float) -> tuple[Field, Field]:
    """Turned by a random angle, scaled to ``low`` to ``high`` periods per picture, and shifted."""
    angle, frequency = TAU * u[0], low + (high - low) * u[1]
    cos, sin = np.cos(angle), np.sin(angle)
    return frequency * (cos * x + sin * y) + u[2], frequency * (cos * y - sin * x) + u[3]


def _noise(x: Field, y: Field, u: Field, cells: int) -> Field:
    """Value noise in [0, 1]: smoothly interpolated random values on a lattice of ``cells``."""
    lattice = u[: (cells + 2) ** 2].reshape(cells + 2, cells + 2)
    column, row = np.clip(x, 0, 1) * cells, np.clip(y, 0, 1) * cells
    i, j = column.astype(int), row.astype(int)
    s, t = column - i, row - j
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    top = lattice[j, i] * (1 - s) + lattice[j, i + 1] * s
    return top * (1 - t) + (lattice[j + 1, i] * (1 - s) + lattice[j + 1, i + 1] * s) * t


def _turbulence(x: Field, y: Field, u: Field) -> Field:
    """Three octaves of value noise (3, 6 and 10 cells), in [0, 1]."""
    return (4 * _noise(x, y, u, 3) + 2 * _noise(x, y, u[25:], 6) + _noise(x, y, u[89:], 10)) / 7


def _cells(x: Field, y: Field, u: Field) -> tuple[Field, Field]:
    """Distances to the nearest and second nearest of 12 random points."""
    points = u[:24].reshape(12, 2)
    distance = np.sqrt((x[..., None] - points[:, 0]) ** 2 + (y[..., None] - points[:, 1]) ** 2)
    distance.sort(-1)
    return distance[..., 0], distance[..., 1]


def _checker(x: Field, y: Field, u: Field) -> Field:
    a, b = _turn(x, y, u, 2, 5)
    return ((np.floor(a) + np.floor(b)) % 2 == 0).astype(float)


def _grating(x: Field, y: Field, u: Field) -> Field:
    return 0.5 + 0.5 * np.sin(TAU * _turn(x, y, u, 2, 7)[0])


def _plaid(x: Field, y: Field, u: Field) -> Field:
    a, b = _turn(x, y, u, 2, 5)
    return 0.5 + 0.25 * np.sin(TAU * a) + 0.25 * np.sin(TAU * b * (1 + u[4]))


def _dots(x: Field, y: Field, u: Field) -> Field:
    a, b = _turn(x, y, u, 3, 6)
    return ((a % 1 - 0.5) ** 2 + (b % 1 - 0.5) ** 2 < (0.2 + 0.2 * u[4]) ** 2).astype(float)


def _bricks(x: Field, y: Field, u: Field) -> Field:
    a, b = _turn(x, y, u, 3, 6)
    a = a / 2 + 0.5 * (np.floor(b) % 2)
    return ((a % 1 > 0.08) & (b % 1 > 0.16)).astype(float)


def _ripples(x: Field, y: Field, u: Field) -> Field:
    radius = np.sqrt((x - u[0]) ** 2 + (y - u[1]) ** 2)
    return 0.5 + 0.5 * np.sin(TAU * (3 + 5 * u[2]) * radius)


def _wood(x: Field, y: Field, u: Field) -> Field:
    a, b = _turn(x, y, u, 0.6, 1.2)
    return (4 * (np.sqrt((a - 0.5) ** 2 + 0.15 * b**2) + 0.5 * _noise(x, y, u[4:], 3))) % 1


def _marble(x: Field, y: Field, u: Field) -> Field:
    return 0.5 + 0.5 * np.sin(TAU * (_turn(x, y, u, 1, 3)[0] + 2 * _turbulence(x, y, u[4:])))


def _clouds(x: Field, y: Field, u: Field) -> Field:
    return np.clip(2.2 * _turbulence(x, y, u) - 0.6, 0, 1)


def _camouflage(x: Field, y: Field, u: Field) -> Field:
    return np.clip(np.floor(4 * (1.6 * _turbulence(x, y, u) - 0.3)), 0, 3) / 3


def _voronoi(x: Field, y: Field, u: Field) -> Field:
    nearest, second = _cells(x, y, u)
    return np.clip((second - nearest) * (8 + 12 * u[24]), 0, 1)


def _pebbles(x: Field, y: Field, u: Field) -> Field:
    return np.clip(1.2 - (4 + 2 * u[24]) * _cells(x, y, u)[0], 0, 1)


TEXTURES: dict[str, Callable[[Field, Field, Field], Field]] = {
    "bricks": _bricks,
    "camouflage": _camouflage,
    "checker": _checker,
    "clouds": _clouds,
    "dots": _dots,
    "grating": _grating,
    "marble": _marble,
    "pebbles": _pebbles,
    "plaid": _plaid,
    "ripples": _ripples,
    "voronoi": _voronoi,
    "wood": _wood,
}
NUMBERS = 256  # uniform numbers that one texture may use


def texture(family: str, uniform: Field, side: int) -> NDArray[np.int32]:
    """One grey field, (side, side) integers 0..255, from ``NUMBERS`` uniform numbers in [0, 1).

    Coordinates run over [0, 1] whatever the side, so a larger picture shows the same texture in
    more detail.
    """
    grid = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid(grid, grid)
    return np.rint(255 * np.clip(TEXTURES[family](x, y, uniform), 0, 1)).astype(np.int32)
