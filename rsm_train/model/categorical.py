"""Values as distributions over fixed atoms, learnt by cross-entropy.

Bellemare, Dabney, Munos, "A Distributional Perspective on Reinforcement Learning", ICML 2017 (C51).
"""

from __future__ import annotations

import torch
from torch import Tensor


def make_atoms(count: int, limit: float, device: torch.device | str = "cpu") -> Tensor:
    """K = `count` values evenly spaced over [-limit, limit], [K] float32."""
    return torch.linspace(-limit, limit, count, device=device)


def project(atoms_K: Tensor, values_BK: Tensor, weight_BK: Tensor) -> Tensor:
    """Probabilities [B, K] on evenly spaced atoms of a law with mass `weight_BK` at `values_BK`.

    A mass between two atoms is shared by them so that the mean stays; one beyond the ends goes to the end.
    """
    first, last = atoms_K[0], atoms_K[-1]
    count = len(atoms_K)
    # Rounding may put the last atom's place above its number. A NaN has no place: its mass becomes NaN.
    place_BK = ((values_BK.clamp(first, last) - first) * ((count - 1) / (last - first))).clamp(max=count - 1)
    index = place_BK.long().clamp(0, count - 2)
    upper_share = place_BK - index
    projected = torch.zeros_like(weight_BK)
    projected.scatter_add_(1, index, weight_BK * (1 - upper_share))
    return projected.scatter_add_(1, index + 1, weight_BK * upper_share)
