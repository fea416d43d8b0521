"""How long a test waits for something that must happen."""

HANG_S = 600
"""Seconds. Its end means that something hangs, never that the machine is slow: no verdict depends on it."""
