"""Export: a checkpoint becomes one static graph in a bundle that acts the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rsm_common.lazy import lazy_names

if TYPE_CHECKING:
    __version__: str

__getattr__, __dir__ = lazy_names(__name__, {})
