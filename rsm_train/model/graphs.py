"""CUDA graphs: an update as one launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Record = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]

WARM_UP_CALLS = 3
"""Calls before the capture: optimisers make their moments, compilers compile, libraries their handles."""


class Captured:
    """A function of dataclasses of tensors that updates state in place, replayed as a CUDA graph.

    The first calls run the function, on a side stream as capturing needs it; the next one captures it, and
    every call from then on copies its arguments into the buffers the graph reads, and replays. What the
    function reads beside its arguments must be tensors that stay where they are: a Python number would be
    frozen at its value. Outputs are the graph's own buffers, overwritten by the next call.

    On a CPU every call runs the function. `record` replaces the capture, for tests of what surrounds it.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        device: torch.device,
        *,
        record: Record | None = None,
    ) -> None:
        self._function = function
        self._device = device
        self._record = record or (_record_cuda if device.type == "cuda" else None)
        self._calls = 0
        self._inputs: tuple[Any, ...] = ()
        self._replay: Callable[[], None] | None = None
        self._outputs: Outputs = {}

    def __call__(self, *arguments: Any) -> Outputs:
        """The function's outputs for these arguments."""
        if self._record is None:
            return self._function(*arguments)
        if self._device.type == "cuda":
            # Streams and graphs belong to the current device, which need not be the one of the tensors.
            with torch.cuda.device(self._device):
                return self._run_or_replay(arguments, _on_side_stream)
        return self._run_or_replay(arguments, _run)

    def _run_or_replay(
        self, arguments: tuple[Any, ...], run: Callable[[Callable[..., Outputs], tuple[Any, ...]], Outputs]
    ) -> Outputs:
        assert self._record is not None
        self._calls += 1
        if self._calls <= WARM_UP_CALLS:
            return run(self._function, arguments)
        if self._replay is None:
            self._inputs = tuple(_map_tensors(argument, torch.clone) for argument in arguments)
            self._replay, self._outputs = self._record(lambda: self._function(*self._inputs))
        else:
            for static, argument in zip(self._inputs, arguments, strict=True):
                for name, value in vars(static).items():
                    value.copy_(getattr(argument, name))
        self._replay()
        return self._outputs


class CapturedVariants:
    """A function like that of `Captured`, with one graph for each value of its keyword arguments.

    Keyword arguments are plain Python values that choose a branch, such as `policy_due`.
    """

    def __init__(self, function: Callable[..., Outputs], device: torch.device) -> None:
        self._function = function
        self._device = device
        self.record: Record | None = None
        """See `Captured`."""
        self._variants: dict[tuple[tuple[str, object], ...], Captured] = {}

    def __call__(self, *arguments: Any, **static: object) -> Outputs:
        """The function's outputs for these arguments."""
        key = tuple(sorted(static.items()))
        if key not in self._variants:
            self._variants[key] = Captured(partial(self._function, **static), self._device, record=self.record)
        return self._variants[key](*arguments)


def _map_tensors(argument: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return type(argument)(**{name: change(value) for name, value in vars(argument).items()})


def _run(function: Callable[..., Outputs], arguments: tuple[Any, ...]) -> Outputs:
    return function(*arguments)


def _on_side_stream(function: Callable[..., Outputs], arguments: tuple[Any, ...]) -> Outputs:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = function(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    return outputs


def _record_cuda(function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs
