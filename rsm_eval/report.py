"""The HTML report: one self-contained file with everything a reader needs to judge an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from rsm_common.policy import STAGES
from rsm_common.spec import PolicySpec
from rsm_eval import plots
from rsm_eval.animation import Animation, NoAnimation
from rsm_eval.evaluation import Evaluation, PolicyEvaluation
from rsm_eval.learning import LearningCurve
from rsm_eval.templates import load_template

_WIDE_IN, _NARROW_IN = 7.6, 3.7
"""Each figure is drawn for a desk and for a phone; the page shows the one that fits."""

_STAGE_NOTES = {
    "queue": "waiting for a free lane",
    "batch": "stacking rows, drawing noise",
    "compute": "the network",
    "network": "transport or call",
    "total": "as the control loop sees it",
}


def render_report(
    evaluation: Evaluation, *, curve: LearningCurve | None, animation: Animation | NoAnimation
) -> str:
    """The report as one HTML document without external assets.

    Args:
        evaluation: what was measured.
        curve: the learning curve of the training run, if one is known.
        animation: the recorded episode, or why there is none.
    """
    recorded = evaluation.policies[0]
    return load_template("report.html.j2").render(
        evaluation=evaluation,
        config=evaluation.config,
        policies=evaluation.policies,
        series=plots.SERIES,
        stages=STAGES,
        stage_notes=_STAGE_NOTES,
        has_latency=any(policy.latency is not None for policy in evaluation.policies),
        budget_percent=_budget_percent(evaluation),
        curve=curve,
        curve_figures=_curve_figures(curve),
        return_figures=_return_figures(evaluation),
        latency_figures=_latency_figures(evaluation),
        animation=animation if isinstance(animation, Animation) else None,
        no_animation=animation.reason if isinstance(animation, NoAnimation) else None,
        recorded=recorded,
        recorded_episode=recorded.rollouts[0],
        spec_rows=_spec_rows(evaluation.policies),
    )


def _budget_percent(evaluation: Evaluation) -> dict[str, float]:
    """{label: p99 latency as a percentage of the control period}, where both are known."""
    dt_s = evaluation.control_dt_s
    if dt_s is None:
        return {}
    return {
        policy.label: policy.latency.percentile_ms("total", 99) / (10 * dt_s)
        for policy in evaluation.policies
        if policy.latency is not None
    }


def _curve_figures(curve: LearningCurve | None) -> dict[str, Markup]:
    if curve is None or not (curve.eval_steps.size or curve.train_steps.size):
        return {}
    sizes = {"wide": (_WIDE_IN, 3.1), "narrow": (_NARROW_IN, 2.9)}
    return {
        width: Markup(plots.learning_curve_svg(curve, ident=f"curve-{width}", size_in=size))
        for width, size in sizes.items()
    }


def _return_figures(evaluation: Evaluation) -> dict[str, Markup]:
    returns = {policy.label: policy.returns for policy in evaluation.policies}
    summaries = {policy.label: policy.summary for policy in evaluation.policies}
    return {
        width: Markup(plots.returns_svg(returns, summaries, ident=f"returns-{width}", width_in=size))
        for width, size in {"wide": _WIDE_IN, "narrow": _NARROW_IN}.items()
    }


def _latency_figures(evaluation: Evaluation) -> dict[str, Markup]:
    """{stage: figure} of the stages in which any policy spends time."""
    measured = {policy.label: policy.latency for policy in evaluation.policies}
    figures = {}
    for stage in STAGES:
        samples = {label: latency.samples_ms[stage] for label, latency in measured.items() if latency}
        svg = (
            plots.latency_svg(stage, samples, ident=f"latency-{stage}", size_in=(3.1, 2.1)) if samples else None
        )
        if svg is not None:
            figures[stage] = Markup(svg)
    return figures


def _spec_rows(policies: tuple[PolicyEvaluation, ...]) -> list[tuple[str, list[str]]]:
    """Rows of the specification table: (field, one value per policy)."""
    columns = [_spec_fields(policy.spec) | _runtime_field(policy) for policy in policies]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [(name, [column.get(name, "-") for column in columns]) for name in names]


def _runtime_field(policy: PolicyEvaluation) -> dict[str, str]:
    return {"Runtime": policy.runtime} if policy.runtime else {}


def _spec_fields(spec: PolicySpec) -> dict[str, str]:
    fields = {
        "Name": spec.name,
        "Version": spec.version if spec.version != "0" else "not exported",
        "Algorithm": spec.algorithm,
        "Environment": spec.env_id,
        "Observation size": str(spec.observation.size),
        "Action size": str(spec.action.size),
        "Action bounds": _bounds(spec),
        "Denoising steps T": str(spec.steps),
        "Particles N": str(spec.particles),
        "Noise per action": " × ".join(str(size) for size in spec.noise_shape),
        "Sampler": spec.sampler,
        "Precision": spec.precision,
    }
    if spec.control_dt_s is not None:
        fields["Control period"] = f"{1000 * spec.control_dt_s:g} ms"
    return fields | {_sentence_case(name): _plain(value) for name, value in spec.provenance.items()}


def _bounds(spec: PolicySpec) -> str:
    pairs = [f"[{low:g}, {high:g}]" for low, high in zip(spec.action_low, spec.action_high, strict=True)]
    return pairs[0] if len(set(pairs)) == 1 else ", ".join(pairs)


def _sentence_case(name: str) -> str:
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    return "-" if value is None else str(value)
