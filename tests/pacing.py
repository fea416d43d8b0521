"""The time that the tests' own slow work takes, which the environment can scale."""

from __future__ import annotations

import os
import time

SCALE = "RSM_TEST_WORK_SCALE"
"""Environment variable: a factor, 1 by default. 0 and 20 must give the same verdicts; `make test-matrix`."""


def work(seconds: float) -> None:
    """Do slow work: sleep `seconds` times the factor of the environment. Child processes inherit the factor."""
    time.sleep(seconds * float(os.environ.get(SCALE, "1")))
