"""Measuring any policy in the simulator, and reporting what was measured."""
