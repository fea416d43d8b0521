"""Matrix products and compiled functions: the same numbers to rounding, in less time.

Measured on two cores of an AVX-512 machine (benchmarks/results/learner.json): oneDNN's float32 product runs at
twice the rate of the one torch picks on AMD processors; compiled by TorchInductor, the activations between
two products are one pass over memory instead of five.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

Precision = Literal["fp32", "tf32", "bf16"]
CompileMode = Literal["auto", "on", "off"]

P = ParamSpec("P")
R = TypeVar("R")

_ONEDNN_MIN_WORK = 2**21
"""Multiply-adds below which the call into oneDNN costs more than it saves."""


@dataclass(frozen=True)
class Compute:
    """How sampling is computed; the updates of parameters are float32, with tf32 products where that is on."""

    precision: Precision = "fp32"
    """Of the hidden layers' products while sampling: bf16 also stores the activations between them in bf16."""
    compile: bool = False
    """Compile sampling and updates with torch.compile."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden layers while sampling."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


DEFAULT_COMPUTE = Compute()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has the compiler it needs: a C++ one for the CPU, Triton for CUDA."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return any(shutil.which(name) for name in candidates)


def compiled(function: Callable[P, R], enabled: bool) -> Callable[P, R]:
    """torch.compile(function) for fixed shapes; the function itself where that fails, with a warning.

    The function may differentiate and change its arguments in place. Inside another one it is a part of that.
    """
    if not enabled:
        return function
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)
    if hasattr(config, "trace_autograd_ops"):  # since torch 2.12; without it a gradient is outside of the graph
        config.trace_autograd_ops = True
    # On a CPU one file per function, not one per kernel: compiled sooner, and with fewer calls from Python.
    options: dict[str, Any] = {"cpp_wrapper": not torch.cuda.is_available()}
    fast: Callable[P, R] | None = torch.compile(function, dynamic=False, options=options)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal fast
        if fast is not None and not torch.compiler.is_compiling():
            try:
                return fast(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                warnings.warn(f"not compiled, slower: {str(error).splitlines()[0]}", stacklevel=2)
                fast = None
        return function(*args, **kwargs)

    return call


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b: [..., in] -> [..., out]; of a stack, [E, R, in], [E, out, in], [E, out] -> [E, R, out]."""
    if _onednn_pays(x, weight):
        if weight.dim() == 3:
            return torch.stack([_onednn_linear(x[e], weight[e], bias[e]) for e in range(len(weight))])
        flat: Tensor = _onednn_linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return flat.view(*x.shape[:-1], -1)
    if weight.dim() == 3:
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    return torch.nn.functional.linear(x, weight, bias)


def _onednn_pays(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32  # torch itself goes to oneDNN for bf16
        and not torch.is_grad_enabled()
        and _ONEDNN_AVAILABLE
        and not torch.compiler.is_exporting()
        and weight.numel() * (x.numel() // x.shape[-1]) >= _ONEDNN_MIN_WORK
    )


def _run_onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    product: Tensor = _onednn_op(x, weight, bias, "none", [], "")
    return product


# Not a documented operator: where a torch does not have it, torch's own product does the work.
_onednn_op: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_ONEDNN_AVAILABLE = torch._C._has_mkldnn and _onednn_op is not None
# An operator of our own, because TorchInductor takes oneDNN's with constant weights only.
_onednn_linear: Any = torch.library.custom_op("rsm::linear", _run_onednn, mutates_args=())


@_onednn_linear.register_fake  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
