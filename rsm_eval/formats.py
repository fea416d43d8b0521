"""Numbers as tables and reports show them."""

from __future__ import annotations

from collections.abc import Sequence


def format_ms(value: float) -> str:
    """Milliseconds with three significant digits, never an exponent."""
    if value < 0.0005:
        return "0"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def format_returns(values: Sequence[float], scale: float) -> list[str]:
    """Episode returns beside each other, all with the decimals that suit a return of size `scale`."""
    decimals = 0 if abs(scale) >= 1000 else 1 if abs(scale) >= 10 else 2
    return [f"{value:,.{decimals}f}" for value in values]


def format_return(value: float) -> str:
    """An episode return with a precision that suits its size."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"
