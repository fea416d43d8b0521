"""The unrolled policy: the whole denoising chain and the choice among particles as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsm_train.networks import SplitDenoiser
from rsm_train.policy import ActionScale, PolicyWeights, act_best_of_n


class UnrolledPolicy(nn.Module):
    """(obs [B, O], noise [B, T, N, A]) -> (action [B, A], q [B]), all float32.

    It calls the very function that evaluation in training calls, on weights whose observation-independent
    parts are folded already: no time embedding is left in the graph, and the schedule is constants.
    """

    def __init__(self, weights: PolicyWeights) -> None:
        super().__init__()
        self._schedule = weights.schedule
        self._sampler = weights.sampler
        self.scale = _Buffers(vars(weights.scale))
        self.denoiser = _Buffers(
            {
                "obs_weight": weights.denoiser.obs_weight,
                "action_weight": weights.denoiser.action_weight,
                "step_bias": weights.denoiser.step_bias,
                **weights.denoiser.tail,
            }
        )
        self.critic = _Buffers(weights.critics)

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        folded = self.denoiser.tensors()
        denoiser = SplitDenoiser(
            folded.pop("obs_weight"), folded.pop("action_weight"), folded.pop("step_bias"), folded
        )
        scale = ActionScale(**self.scale.tensors())
        weights = PolicyWeights(denoiser, self.critic.tensors(), self._schedule, self._sampler, scale)
        return act_best_of_n(weights, obs, noise)


class _Buffers(nn.Module):
    """Tensors under dotted names, as nested buffers."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = list(tensors)
        for name, value in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_buffer(leaf, value.detach().clone().contiguous())

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self._names}


def example_inputs(
    module: UnrolledPolicy, noise_shape: tuple[int, int, int], rows: int
) -> tuple[Tensor, Tensor]:
    """Standard normal (obs, noise) of `rows` rows, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    obs_size = module.denoiser.tensors()["obs_weight"].shape[1]
    return (
        torch.randn(rows, obs_size, generator=generator),
        torch.randn(rows, *noise_shape, generator=generator),
    )
