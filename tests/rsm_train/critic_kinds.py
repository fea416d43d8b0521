"""Settings of critics of every kind, for tests that hold for all of them."""

from __future__ import annotations

from typing import Any

CROSSQ: dict[str, Any] = {"critic_norm": "batch", "critic_target": "none"}
"""Bhatt et al. 2024: one normalisation for both halves of the joint batch, and no target."""
ALL_AT_ONCE: dict[str, Any] = {
    **CROSSQ,
    "critic_input_norm": True,
    "critic_unit_weights": True,
    "critic_loss": "categorical",
    "value_atoms": 31,
}

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer": {"critic_norm": "layer"},
    "batch": {"critic_norm": "batch"},
    "input norm": {"critic_input_norm": True},
    "unit weights": {"critic_unit_weights": True},
    "categorical": {"critic_loss": "categorical", "value_atoms": 31},
    "categorical of the mean": {"critic_loss": "categorical", "value_atoms": 31, "critic_selection": "mean"},
    "no target": {"critic_target": "none"},
    "batch without target": CROSSQ,
    "layer, three, pessimistic": {
        "critic_norm": "layer",
        "critics": 3,
        "critic_selection": "mean_std",
        "critic_std_factor": -0.5,
    },
    "layer, unit weights, categorical, input norm": {
        **ALL_AT_ONCE,
        "critic_norm": "layer",
        "critic_target": "average",
    },
    "batch, categorical": {"critic_norm": "batch", "critic_loss": "categorical", "value_atoms": 31},
    "all at once": ALL_AT_ONCE,
    "all at once, one critic": {**ALL_AT_ONCE, "critics": 1},
}
