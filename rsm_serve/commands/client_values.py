"""Observations from a command line or a file, and answers as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import UsageError
from rsm_common.policy import ActResult, Adjustment
from rsm_common.spec import PolicySpec


def read_observation(spec: PolicySpec, text: str | None, path: Path | None) -> NDArray[Any]:
    """Read the observation of a command line, or the array [O] or [B, O] of a file; without both, zeros [O].

    Raises:
        UsageError: both are given; the text is not numbers; the file is not a .npy file.
    """
    if text is not None and path is not None:
        raise UsageError("wanted --obs or --obs-file, got both; leave one of them out")
    if path is not None:
        try:
            array = np.load(path, allow_pickle=False)
            if isinstance(array, np.ndarray):
                return array
            reason = "an archive of arrays"
            array.close()
        # A damaged file can be a BadZipFile, a MemoryError, a TokenError, ..., and no list of them is complete.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"wanted a .npy file of numbers, got {str(path)!r} ({reason:.200}); check the file")
    if text is None:
        return np.zeros(spec.observation.size, np.float32)
    try:
        return np.array([float(number) for number in text.split(",")], np.float32)
    except ValueError:
        raise UsageError(f"wanted numbers such as 0.1,0,-2 for --obs, got {text!r}") from None


def answer_json(result: ActResult) -> dict[str, Any]:
    """Make the object that `rsm-client act` prints."""
    return {
        "action": result.action.tolist(),
        "q": None if result.q is None else _numbers(result.q),
        **({} if result.adjusted is None else {"adjusted": _names(result.adjusted)}),
        # Text, because JSON readers round numbers beyond 2**53.
        "seed": None if result.seed is None else _each(result.seed, str),
        "version": result.version,
        "timing_us": {
            "queue": round(result.timing.queue_us, 1),
            "batch": round(result.timing.batch_us, 1),
            "compute": round(result.timing.compute_us, 1),
            "total": round(result.timing.total_us, 1),
            "batch_rows": result.timing.batch_rows,
        },
    }


def _numbers(values: NDArray[np.float32]) -> Any:
    """As JSON has it: null for what is not a number, such as the value of a fallback."""
    return _each(values, lambda value: None if np.isnan(value) else float(value))


def _names(adjusted: NDArray[np.int32]) -> Any:
    names = {kind.value: kind.name.lower() for kind in Adjustment}
    # A newer server may know another one.
    return _each(adjusted, lambda value: names.get(value, str(value)))


def _each(array: NDArray[Any], convert: Callable[[Any], Any]) -> Any:
    """The converted numbers, in lists as deep as the array."""
    return np.vectorize(convert, otypes=[object])(array).tolist()
