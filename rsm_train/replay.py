"""The replay buffer: a ring of transitions in preallocated tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from rsm_train.algorithms.common import Batch


class ReplayBuffer:
    """The last `capacity` transitions, float32, on one device; memory is touched as it fills."""

    def __init__(
        self, capacity: int, obs_size: int, action_size: int, device: torch.device | str = "cpu"
    ) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(capacity, *shape, device=device)

        self._data = Batch(
            obs=empty(obs_size),
            action=empty(action_size),
            reward=empty(),
            next_obs=empty(obs_size),
            terminated=empty(),
        )
        self.capacity = capacity
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes when full."""
        return sum(stored.nbytes for stored in vars(self._data).values())

    def add(self, rows: Batch) -> None:
        """Append transitions, overwriting the oldest when full."""
        count = len(rows.reward)
        index = torch.arange(self.added, self.added + count, device=self._data.reward.device) % self.capacity
        for name, stored in vars(self._data).items():
            stored[index] = getattr(rows, name).to(stored.device, stored.dtype)
        self.added += count

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Transitions drawn uniformly with replacement."""
        index = torch.randint(len(self), (batch_size,), generator=generator, device=generator.device)
        return Batch(**{name: stored[index] for name, stored in vars(self._data).items()})

    def sample_obs(self, count: int, generator: torch.Generator) -> Tensor:
        """Observations [count, O] drawn uniformly with replacement."""
        index = torch.randint(len(self), (count,), generator=generator, device=generator.device)
        return self._data.obs[index]
