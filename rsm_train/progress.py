"""What a run tells the program that started it, and how that program stops the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

Kind: TypeAlias = Literal["train", "eval", "checkpoint"]


@dataclass(frozen=True)
class Progress:
    """One event of a run: a line of metrics, an evaluation or a checkpoint."""

    kind: Kind
    """ "train" every `log_every` steps, "eval" after each evaluation, "checkpoint" after each checkpoint.

    An evaluation follows the checkpoint of the policy that was evaluated.
    """
    step: int
    """Steps of all environments so far."""
    total_steps: int
    """Steps of the whole run."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The line of metrics.jsonl for "train" and "eval"; empty for "checkpoint"."""
    checkpoint: Path | None = None
    """The newest checkpoint; None before the first one."""


class StopTraining(Exception):  # noqa: N818 - not an error: the run is saved
    """A callback raises this to stop a run, as if it returned True."""


Callback: TypeAlias = Callable[[Progress], object]
"""Called with each event. True, and no other value, stops the run after its present step."""


def wants_stop(callback: Callback, progress: Progress) -> bool:
    """Call a callback; return whether it wants the run to stop. Its other exceptions pass."""
    try:
        answer = callback(progress)
    except StopTraining:
        return True
    # `lambda progress: file.write(...)` returns a number, and means nothing by it.
    return isinstance(answer, bool | np.bool_) and bool(answer)
