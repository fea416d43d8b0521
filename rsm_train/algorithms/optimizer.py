"""Adam with everything that it reads and writes in tensors that stay where they are.

`torch.optim.Adam` keeps its gradients on the parameters, makes its moments in its first step and reads numbers
on the host. An update that is compiled or captured as a CUDA graph needs a step without all three.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adam import adam

from rsm_train.algorithms.common import load_params
from rsm_train.model.networks import Params, subset


class Adam:
    """Adam (Kingma and Ba 2015) with the usual decay rates, 0.9 and 0.999, by torch's kernels."""

    def __init__(self, params: Params, learning_rate: float) -> None:
        """An optimiser of parameters, which are leaves on one device.

        Args:
            params: by name.
            learning_rate: at the start.
        """
        device = next(iter(params.values())).device
        self._params = params
        self._step = {name: torch.zeros((), device=device) for name in params}
        self._exp_avg = {name: torch.zeros_like(value) for name, value in params.items()}
        self._exp_avg_sq = {name: torch.zeros_like(value) for name, value in params.items()}
        self.learning_rate = torch.tensor(learning_rate, device=device)  # 0-d
        self.epsilon = 1e-8

    def descend(self, loss: Tensor, *, repeats: int = 1) -> None:
        """Differentiate a loss, 0-d, once and apply the gradient, `repeats` times."""
        params = list(self._params.values())
        # torch's fused kernel takes every tensor for a contiguous one; a product's gradient may be transposed.
        gradients = [gradient.contiguous() for gradient in torch.autograd.grad(loss, params)]
        compiling = torch.compiler.is_compiling()
        with torch.no_grad():
            for _ in range(repeats):
                adam(
                    params,
                    gradients,
                    list(self._exp_avg.values()),
                    list(self._exp_avg_sq.values()),
                    max_exp_avg_sqs=[],
                    state_steps=list(self._step.values()),
                    # A compiler makes its own kernel of plain operations.
                    foreach=compiling,
                    fused=not compiling,
                    capturable=compiling or loss.device.type == "cuda",
                    amsgrad=False,
                    beta1=0.9,
                    beta2=0.999,
                    lr=self.learning_rate,
                    weight_decay=0.0,
                    eps=self.epsilon,
                    maximize=False,
                )

    def state(self) -> Params:
        """The number of steps and the moments, themselves: "<moment>.<parameter>", as torch names moments."""
        moments = {"step": self._step, "exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        return {f"{moment}.{name}": value for moment, kept in moments.items() for name, value in kept.items()}


def save_state(optimizers: Mapping[str, Adam], kept: Mapping[str, Tensor]) -> Params:
    """What `state()` of an agent is: its own tensors, and "<optimizer>.<moment>.<parameter>"."""
    states = {
        f"{name}.{key}": value
        for name, optimizer in optimizers.items()
        for key, value in optimizer.state().items()
    }
    return states | dict(kept)


def load_state(optimizers: Mapping[str, Adam], kept: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """The reverse of `save_state`, in place; an optimiser without a state had made no step.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has another shape.
    """
    for name, optimizer in optimizers.items():
        if found := subset(state, f"{name}."):
            load_params(optimizer.state(), found)
    load_params(kept, state)
