"""Online learning of diffusion policies with Reweighted Score Matching.

The names below are imported when they are first used, so that `import rsm_train` is cheap. They need the extra
train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rsm_common.lazy import lazy_names

if TYPE_CHECKING:
    from rsm_train.library import Run as Run
    from rsm_train.library import train as train
    from rsm_train.progress import Progress as Progress
    from rsm_train.progress import StopTraining as StopTraining

    __version__: str

_HOMES = {
    "Progress": "rsm_train.progress",
    "Run": "rsm_train.library",
    "StopTraining": "rsm_train.progress",
    "train": "rsm_train.library",
}
"""The module of each public name."""

__all__ = [*_HOMES, "__version__"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
