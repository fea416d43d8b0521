"""What every runtime asks of a graph before it runs it, and how it says that it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rsm_common.errors import BundleError
from rsm_common.spec import PolicySpec

FLOAT32 = "float32"


@dataclass(frozen=True)
class GraphTensor:
    """An input or output of a graph, as the runtime sees it."""

    name: str
    dtype: str
    """"float32", or the runtime's own name of another type."""
    shape: tuple[int | str, ...]
    """Text stands for an axis of any length."""


def check_signature(
    runtime: str, spec: PolicySpec, inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor]
) -> None:
    """Compare a graph's inputs and outputs, as a runtime reads them, with the specification.

    Raises:
        BundleError: they differ.
    """
    wanted_inputs = {"obs": [spec.observation.size], "noise": list(spec.noise_shape)}
    wanted_outputs: dict[str, list[int]] = {"action": [spec.action.size]}
    if spec.has_q:
        wanted_outputs["q"] = []
    for kind, wanted, tensors in (("inputs", wanted_inputs, inputs), ("outputs", wanted_outputs, outputs)):
        found = {tensor.name: tensor for tensor in tensors}
        if found.keys() != wanted.keys():
            raise BundleError(
                f"wanted a graph with the {kind} {', '.join(wanted)} for policy {spec.name!r}, "
                f"got {', '.join(found) or 'none'} from {runtime}; export the policy again"
            )
        for name, shape in wanted.items():
            _check_tensor(runtime, spec, found[name], shape)


def _check_tensor(runtime: str, spec: PolicySpec, found: GraphTensor, shape: list[int]) -> None:
    # A number in front would be a fixed batch size.
    dynamic = len(found.shape) > 0 and not isinstance(found.shape[0], int)
    if found.dtype != FLOAT32 or not dynamic or list(found.shape[1:]) != shape:
        raise BundleError(
            f"wanted {found.name} of the graph as {FLOAT32} {['B', *shape]} for policy {spec.name!r}, "
            f"got {found.dtype} {list(found.shape)} from {runtime}; export the policy again"
        )


def unloadable(runtime: str, spec: PolicySpec, reason: str) -> BundleError:
    """The error of a runtime that cannot load a graph."""
    return BundleError(
        f"policy {spec.name!r}: {runtime} cannot load the graph ({reason}); export the policy again"
    )
