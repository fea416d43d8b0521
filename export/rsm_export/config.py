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
"""More particles do not fit into memory in the check on batches of 64, and do not improve the policy."""


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
            "help": "Number of denoising steps, evenly spread over the trained steps.",
        },
    )
    sampler: SamplerName | None = field(
        default=None,
        metadata={
            "group": "Chain",
            "help": "Denoising with the noise of DDPM, or with --eta times this noise (ddim).  [default: ddpm]",
        },
    )
    eta: float | None = field(
        default=None,
        metadata={
            "group": "Chain",
            "help": "Factor of the noise of ddim, from 0 (only the initial noise) to 1 (the same as ddpm).  "
            "[default: 0]",
        },
    )
    particles: int | None = field(
        default=None,
        metadata={
            "group": "Chain",
            "help": "Number of candidate actions; the critics choose the best. 1 removes the critics.",
        },
    )
    prior_std: float | None = field(
        default=None,
        metadata={
            "group": "Chain",
            "help": "Standard deviation of the initial noise; a smaller value is a lower temperature.",
        },
    )
    precision: Precision = field(
        default="fp32",
        metadata={
            "group": "Precision and runtime",
            "help": "Precision of the hidden layers; int8 applies to the weights only. Outputs are float32.",
        },
    )
    backend: Backend | None = field(
        default=None,
        metadata={
            "group": "Precision and runtime",
            "help": "Runtime in which the graph is checked and timed.  [default: onnxruntime, or for bf16 a "
            "runtime "
            "with bf16]",
        },
    )
    verify: bool = field(
        default=True,
        metadata={
            "group": "Checks",
            "help": "Check the graph against the checkpoint before the bundle is written.",
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
            "help": "Largest loss of return, as a fraction of the full policy's mean return.",
        },
    )
    env: str | None = field(
        default=None,
        metadata={
            "group": "Checks",
            "help": "Environment for --auto: an id, or module:EnvId with an installed or local module. "
            "Without --auto, "
            "the return in this environment becomes a check.  [default with --auto: the policy's own]",
        },
    )
    env_arg: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "group": "Checks",
            "help": "Argument of the environment's constructor, such as size=3; can be repeated. The "
            "policy's own "
            "environment has the arguments of the training by default.",
        },
    )
    episodes: int = field(
        default=20,
        metadata={"group": "Checks", "help": "Number of episodes in which the returns are compared."},
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
        metadata={"group": "Search", "help": "With --auto: write all measurements to this file."},
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
