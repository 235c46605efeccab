"""The best scalar codes of normally distributed numbers, computed.

A codebook of n levels c_1 < ... < c_n codes a number by its nearest level. Its distortion is the mean square of
what that gets wrong, for numbers of mean 0 and variance 1. Lloyd (1982) and Max (1960): at the least distortion every
level is the mean of the numbers that it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import pi, sqrt

import torch

_LLOYD_STEPS, _NEWTON_STEPS = 10, 10
"""Newton's method needs a start near the end; with 8 bits Lloyd's alone would take some 100,000 steps."""


@dataclass(frozen=True)
class Codebook:
    """Levels of the Lloyd-Max quantizer of the standard normal distribution."""

    levels: torch.Tensor
    """``[2**bits]`` float32, ascending."""
    bounds: torch.Tensor
    """``[2**bits - 1]`` float32: halfway between neighbouring levels."""
    distortion: float
    """Expected square of the error of a standard normal number."""

    @property
    def noise(self) -> float:
        """The same after the levels were stretched so that the error isn't correlated with the number: D / (1 - D).

        A number x and its level c have E[x c] = E[c^2] = 1 - D, so that stretches by 1 / (1 - D).
        """
        return self.distortion / (1 - self.distortion)


@cache
def lloyd_max(bits: int) -> Codebook:
    """The codebook of ``2**bits`` levels.

    With phi and Phi the normal density and distribution, bounds b_i = (c_i + c_i+1) / 2, b_0 = -inf, b_n = inf and
    m_i = Phi(b_i) - Phi(b_i-1), half the gradient of the distortion is

        g_i = c_i m_i - (phi(b_i-1) - phi(b_i))

    Lloyd's step solves g_i = 0 for c_i with the bounds held. Newton's uses the derivatives of g_i:

        left_i = phi(b_i-1) (b_i-1 - c_i) / 2 by c_i-1, right_i = phi(b_i) (c_i - b_i) / 2 by c_i+1,
        m_i + left_i + right_i by c_i

    No other point has gradient 0, as the normal density is log-concave.
    """
    # Many levels lie as densely as the cube root of the density, which is a normal one of variance 3 (Bennett).
    middles = (torch.arange(1 << bits, dtype=torch.float64, device="cpu") + 0.5) / (1 << bits)
    levels = torch.special.ndtri(middles) * sqrt(3)
    for step in range(_LLOYD_STEPS + _NEWTON_STEPS):
        bounds, mass = _cells(levels)
        density = torch.exp(-(bounds**2) / 2) / sqrt(2 * pi)
        if step < _LLOYD_STEPS:
            levels = -density.diff() / mass
            continue
        left = (density[:-1] * (bounds[:-1] - levels) / 2).nan_to_num(0)  # 0 x inf at the outer bounds
        right = (density[1:] * (levels - bounds[1:]) / 2).nan_to_num(0)
        hessian = torch.diag(mass + left + right) + torch.diag(left[1:], -1) + torch.diag(right[:-1], 1)
        levels = levels - torch.linalg.solve(hessian, levels * mass + density.diff())
    bounds, mass = _cells(levels)
    # Every level is the mean of its cell, so that E[x c(x)] = E[c(x)^2].
    return Codebook(levels.float(), bounds[1:-1].float(), 1 - float((mass * levels**2).sum()))


def _cells(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of the levels' cells, from -inf to inf, and their probabilities."""
    edge = levels.new_tensor([torch.inf])
    bounds = torch.cat([-edge, (levels[1:] + levels[:-1]) / 2, edge])
    return bounds, torch.special.ndtr(bounds).diff()
