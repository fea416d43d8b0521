"""Exploration noise that is held for some steps: what it pushes towards is then reached.

Dabney, Ostrovski, Barreto, "Temporally-Extended epsilon-Greedy Exploration", ICLR 2021: a span
has n steps with a probability proportional to n^-2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_EXPONENT = 2.0


class HeldNoise:
    """Noise of every environment, each with a span of its own."""

    def __init__(
        self, envs: int, longest: int, generator: torch.Generator, shapes: Mapping[str, Sequence[int]]
    ) -> None:
        """Draw new noise in the first step.

        Args:
            envs: number of environments.
            longest: steps of the longest span.
            generator: draws the lengths of the spans, on the CPU.
            shapes: of the noise of one environment, by name.
        """
        self._weights = torch.arange(1, longest + 1, dtype=torch.float64) ** -_EXPONENT
        self._generator = generator
        self._left = torch.zeros(envs, dtype=torch.int64)
        self._held = {name: torch.zeros(envs, *shape) for name, shape in shapes.items()}

    def hold(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The noise of this step: what is held, or what was drawn where a span begins.

        Args:
            drawn: new noise by name; the first axis of each tensor is that of the environments.
        """
        begins = self._left == 0
        lengths = torch.multinomial(self._weights, len(begins), replacement=True, generator=self._generator) + 1
        self._left = torch.where(begins, lengths, self._left) - 1
        for name, held in self._held.items():
            held[begins] = drawn[name][begins]
        return {name: held.clone() for name, held in self._held.items()}

    def release(self, ended_B: Tensor) -> None:
        """End the spans of environments whose episode ended, [B] bool."""
        self._left[ended_B] = 0

    def state(self) -> dict[str, Tensor]:
        """The tensors that `restore` continues from."""
        return {"left": self._left, **{f"noise.{name}": value for name, value in self._held.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state()` was.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor has another shape, is not finite, or no span has that length.
        """
        for name, own in self.state().items():
            value = state[name]
            if value.shape != own.shape or not torch.isfinite(value).all():
                raise ValueError(f"held.{name}: wanted finite {list(own.shape)}, got {list(value.shape)}")
        if not ((state["left"] >= 0) & (state["left"] < len(self._weights))).all():
            raise ValueError(f"held.left: wanted 0 to {len(self._weights) - 1}, got {state['left'].tolist()}")
        self._left = state["left"].to(torch.int64).clone()
        self._held = {name: state[f"noise.{name}"].to(own.dtype).clone() for name, own in self._held.items()}
