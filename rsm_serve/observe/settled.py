"""How a request ended: what every part of the server that counts, traces or records is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Answered(Generic[Answer]):
    """An answer and how long its request waited."""

    answer: Answer
    queue_us: float
