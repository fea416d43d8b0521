"""What `rsm-export` can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rsm_common.errors import ConfigError
from rsm_serve.sessions.choice import Backend

Precision = Literal["fp32", "fp16", "bf16", "int8"]
SamplerName = Literal["ddpm", "ddim"]

MAX_PARTICLES = 4096
"""More would not fit into memory where the graph is checked on batches of 64, and help nobody."""


@dataclass(frozen=True)
class ExportConfig:
    """How the exported chain samples; what is None stays as it was trained, or is searched for.

    Raises:
        ConfigError: a value is out of range, or eta without ddim.
    """

    steps: int | None = field(
        default=None,
        metadata={
            "group": "Chain",
            "help": "Denoising steps to take, evenly spread over those that were trained.",
        },
    )
    sampler: SamplerName | None = field(
        default=None,
        metadata={
            "group": "Chain",
            "help": "Reverse steps with the noise of DDPM, or DDIM, which adds --eta times as much.  "
            "[default: ddpm]",
        },
    )
    eta: float | None = field(
        default=None,
        metadata={
            "group": "Chain",
            "help": "For ddim: from 0 (no noise but the initial one) to 1 (ddpm).  [default: 0]",
        },
    )
    particles: int | None = field(
        default=None,
        metadata={
            "group": "Chain",
            "help": "Candidates of which the critics choose the best; 1 drops the critics.",
        },
    )
    prior_std: float | None = field(
        default=None,
        metadata={
            "group": "Chain",
            "help": "Standard deviation of the initial noise; smaller is a lower temperature.",
        },
    )
    precision: Precision = field(
        default="fp32",
        metadata={
            "group": "Precision and runtime",
            "help": "Of the hidden layers; int8 stores weights only. What leaves the graph is float32.",
        },
    )
    backend: Backend | None = field(
        default=None,
        metadata={
            "group": "Precision and runtime",
            "help": "Runtime in which the graph is checked and timed.  [default: onnxruntime, or what runs "
            "bf16]",
        },
    )
    verify: bool = field(
        default=True,
        metadata={
            "group": "Checks",
            "help": "Check the graph against the checkpoint before anything is written.",
        },
    )

    def __post_init__(self) -> None:
        for name in ("steps", "particles"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"wanted --{name} of at least 1, got {value}")
        if self.particles is not None and self.particles > MAX_PARTICLES:
            raise ConfigError(f"wanted --particles of at most {MAX_PARTICLES:,}, got {self.particles:,}")
        if self.prior_std is not None and not 0 < self.prior_std < float("inf"):
            raise ConfigError(f"wanted --prior-std above 0, got {self.prior_std}")
        if self.eta is not None and (self.sampler != "ddim" or not 0 <= self.eta <= 1):
            raise ConfigError(
                f"wanted --eta from 0 to 1 with --sampler ddim, got {self.eta} with {self.sampler or 'ddpm'}"
            )


@dataclass(frozen=True)
class SearchConfig:
    """How closely, and in what, the exported policy must return what the full one returns.

    Raises:
        ConfigError: a value is out of range.
    """

    tolerance: float = field(
        default=0.02,
        metadata={
            "group": "Search",
            "help": "Loss of return that is allowed, as a fraction of the full policy's mean return.",
        },
    )
    env: str | None = field(
        default=None,
        metadata={
            "group": "Checks",
            "help": "Act in this environment (an id, or module:EnvId with a module installed or here): --auto "
            "searches in it, by default in the "
            "policy's own; without --auto the return is one of the checks.",
        },
    )
    env_arg: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "group": "Checks",
            "help": "Argument of that environment's constructor, such as size=3; repeat for more. In the "
            "policy's own environment the default is what it was trained with.",
        },
    )
    episodes: int = field(
        default=20, metadata={"group": "Checks", "help": "Episodes that the returns are compared on."}
    )
    plot: Path | None = field(
        default=None,
        metadata={
            "group": "Search",
            "help": "With --auto: draw latency against return to this .svg, .png or .pdf.",
        },
    )
    json: Path | None = field(
        default=None,
        metadata={"group": "Search", "help": "With --auto: write all that was measured to this file."},
    )

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"wanted --tolerance between 0 and 1, got {self.tolerance}")
        if self.episodes < 2:
            raise ConfigError(
                f"wanted --episodes of at least 2, got {self.episodes}; one says nothing of chance"
            )
        if self.plot is not None and self.plot.suffix not in (".svg", ".png", ".pdf"):
            raise ConfigError(f"wanted --plot with the suffix .svg, .png or .pdf, got {str(self.plot)!r}")
