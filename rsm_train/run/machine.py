"""The device of a run, how it computes there, and what the settings came to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rsm_common.errors import ConfigError
from rsm_train.config import RunConfig
from rsm_train.model.kernels import Compute, can_compile


@contextlib.contextmanager
def own_torch_settings(threads: int | None) -> Iterator[None]:
    """torch for a run: as in a new process, whatever its caller has set, which comes back at the end.

    Args:
        threads: of the CPU; None: as they are.
    """
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(torch.set_float32_matmul_precision, precision)
        stack.callback(torch.set_num_threads, before)
        torch.set_default_dtype(torch.float32)
        if threads is not None:
            torch.set_num_threads(threads)
        yield


def pick_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"wanted a device of auto, cpu, cuda or cuda:N, got {name!r}") from None
    available = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    )
    if not available:
        raise ConfigError(f"device {name!r} is not available here; use --device cpu or --device auto")
    return device


def pick_compute(run: RunConfig, device: torch.device) -> Compute:
    """How a run computes its particles.

    Raises:
        ConfigError: compilation was asked for and there is no compiler.
    """
    possible = can_compile(device)
    if run.compile == "on" and not possible:
        wanted = "Triton" if device.type == "cuda" else "a C++ compiler (g++, clang++ or $CXX)"
        raise ConfigError(f"wanted {wanted} for compile on, found none; install one or use --compile off")
    enabled = run.compile == "on" or (run.compile == "auto" and possible)
    return Compute(precision=run.precision, compile=enabled)


def effective_settings(device: torch.device, compute: Compute) -> dict[str, Any]:
    """What the settings came to on this machine; other values round differently."""
    return {
        "threads": torch.get_num_threads(),
        "compiled": compute.compile,
        "device": str(device),
        "torch": torch.__version__,
    }


def changes(before: Any, now: Mapping[str, Any]) -> str:
    """ "threads 1 instead of 2, ..."; empty if nothing changed or the values before are unknown."""
    if not isinstance(before, Mapping):
        return ""
    differing = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name} {now[name]} instead of {before[name]}" for name in differing)
