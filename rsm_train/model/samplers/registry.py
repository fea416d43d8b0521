"""The kinds of samplers and their saved form in config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rsm_train.model.samplers.common import Sampler
from rsm_train.model.samplers.diffusion import DiffusionSampler
from rsm_train.model.samplers.gaussian import GaussianSampler

SAMPLERS: dict[str, type[DiffusionSampler] | type[GaussianSampler]] = {
    sampler.kind: sampler for sampler in (DiffusionSampler, GaussianSampler)
}


def sampler_settings(sampler: Sampler) -> dict[str, Any]:
    """The saved form of a sampler: "kind" and its settings."""
    return {"kind": sampler.kind, **{item: getattr(sampler, item) for item in _fields(type(sampler))}}


def read_sampler(settings: Mapping[str, Any]) -> DiffusionSampler | GaussianSampler:
    """The sampler of its saved form. Settings without a kind are those of a diffusion policy.

    Raises:
        KeyError: an unknown kind.
        TypeError: settings that the kind does not have, or missing ones.
    """
    kind = SAMPLERS[settings.get("kind", DiffusionSampler.kind)]
    return kind(**{name: value for name, value in settings.items() if name != "kind"})


def _fields(kind: type) -> Sequence[str]:
    return [item.name for item in dataclasses.fields(kind)]
