"""What `rsm-export` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rsm_serve.errors import ConfigError

Precision = Literal["fp32", "fp16", "bf16", "int8"]
SamplerName = Literal["ddpm", "ddim"]


@dataclass(frozen=True)
class ExportConfig:
    """How the exported chain samples; what is None stays as it was trained.

    Raises:
        ConfigError: a value is out of range, or eta without ddim.
    """

    steps: int | None = field(
        default=None, metadata={"help": "Denoising steps to take, evenly spread over those that were trained."}
    )
    sampler: SamplerName = field(
        default="ddpm",
        metadata={"help": "Reverse steps with the noise of DDPM, or DDIM, which adds --eta times as much."},
    )
    eta: float | None = field(
        default=None,
        metadata={"help": "For ddim: from 0 (no noise but the initial one) to 1 (ddpm).  [default: 0]"},
    )
    particles: int | None = field(
        default=None, metadata={"help": "Candidates of which the critics choose the best; 1 drops the critics."}
    )
    prior_std: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of the initial noise; smaller is a lower temperature."},
    )
    precision: Precision = field(
        default="fp32",
        metadata={"help": "Of the hidden layers; int8 stores weights only. What leaves the graph is float32."},
    )
    verify: bool = field(
        default=True, metadata={"help": "Check the graph against the checkpoint before anything is written."}
    )

    def __post_init__(self) -> None:
        for name in ("steps", "particles"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"wanted --{name} of at least 1, got {value}")
        if self.prior_std is not None and not 0 < self.prior_std < float("inf"):
            raise ConfigError(f"wanted --prior-std above 0, got {self.prior_std}")
        if self.eta is not None and (self.sampler != "ddim" or not 0 <= self.eta <= 1):
            raise ConfigError(
                f"wanted --eta from 0 to 1 with --sampler ddim, got {self.eta} with {self.sampler}"
            )
