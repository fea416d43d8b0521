"""A policy as the tensors of the Open Inference Protocol.

B rows (the batch axis), O, T, N and A as in the policy's specification:

    inputs   obs     FP32    [B, O]
             noise   FP32    [B, T, N, A]   optional
             seed    UINT64  [B, 1] or [B]  optional, one per row
    outputs  action  FP32    [B, A]
             q       FP32    [B, 1]         unless the policy has no critic

`seed` and `q` are one number per row. Triton has no tensors without axes: there, and in config.pbtxt, such a
number is [1], reshaped to [] for the graph, and clients see [B, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rsm_common.spec import PolicySpec
from rsm_serve.pb import oip_pb2 as pb

SERVICE: str = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT64": np.dtype("<u8")}
"""The layout of each datatype in messages."""


@dataclass(frozen=True)
class Tensor:
    """An input or output as clients see it."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    """Without the batch axis; empty: one number per row, shown as [1]."""
    optional: bool = False

    @property
    def shown(self) -> tuple[int, ...]:
        """The dims in messages."""
        return self.dims or (1,)


def input_tensors(spec: PolicySpec) -> tuple[Tensor, ...]:
    """What a request may carry."""
    return (
        Tensor("obs", "FP32", (spec.observation.size,)),
        Tensor("noise", "FP32", spec.noise_shape, optional=True),
        Tensor("seed", "UINT64", (), optional=True),
    )


def output_tensors(spec: PolicySpec) -> tuple[Tensor, ...]:
    """What an answer may carry, in its order."""
    action = Tensor("action", "FP32", (spec.action.size,))
    return (action, Tensor("q", "FP32", ())) if spec.has_q else (action,)
