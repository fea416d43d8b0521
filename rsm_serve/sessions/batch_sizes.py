"""The batch sizes for which a runtime keeps a graph."""

from __future__ import annotations


def bucket_sizes(max_batch_size: int) -> list[int]:
    """Return 1, 2, 4, ... up to the maximum, which is always the last.

    A runtime that ran each of these sizes has made all its graphs before the first request.
    """
    return [*(1 << power for power in range((max_batch_size - 1).bit_length())), max_batch_size]
