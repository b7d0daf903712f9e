"""What `print(handle)` says."""

from __future__ import annotations

from turbovlm.config import TurboConfig
from turbovlm.encoder.block import Plan
from turbovlm.encoder.schedule import Schedule
from turbovlm.vlm.grounding import GroundingPlan
from turbovlm.vlm.plan import ReadingPlan
from turbovlm.vlm.select import needs_attention

WEIGHTED = ("weighted_distance", "weighted_difference", "damped")
"""Degrees that read alpha."""


def describe(config: TurboConfig) -> str:
    """The settings that say which tokens are merged."""
    degree = getattr(config.degree, "__name__", str(config.degree))
    alpha = f", alpha={config.alpha:g}" if degree in WEIGHTED and config.alpha is not None else ""
    return f"degree={degree}{alpha}, partition={config.partition}, {config.reduce}"


def report_reading(plan: ReadingPlan) -> list[str]:
    """What a language model reads of each image."""
    keep, where = plan.config.visual_keep, f"{plan.name}." if plan.name else ""
    much = f"{keep} visual tokens" if isinstance(keep, int) else f"{keep:.0%} of the visual tokens"
    guided = f", guided by {plan.guidance} in {where}{plan.guide}" if needs_attention(plan.config) else ""
    how = f"visual_select={plan.config.visual_select}, {plan.config.reduce}"
    return [f"  {plan.name or 'model'} ({plan.reader.family}): reads {much} of each image ({how}){guided}"]


def report_grounding(plan: GroundingPlan) -> list[str]:
    """What a text model's layers attend to."""
    keep = plan.config.cross_keep
    much = f"{keep} image tokens" if isinstance(keep, int) else f"{keep:.0%} of the image tokens"
    return [
        f"  {plan.layers} ({plan.family}): {plan.depth} layers, the last third of which cross-attends to {much}, "
        f"guided by the words ({plan.config.reduce})"
    ]


def report_encoder(plan: Plan, schedule: Schedule) -> list[str]:
    """Tokens and multiply-accumulates of an encoder, block by block."""
    tokens, before, after = schedule.tokens, sum(schedule.macs_before), sum(schedule.macs_after)
    name = schedule.tower or "model"
    lines = [
        f"  {name}: {len(schedule.blocks)} blocks, {tokens[0]} → {tokens[-1]} tokens, "
        f"{before / 1e9:.2f} → {after / 1e9:.2f} GMACs in the blocks, {schedule.ratio:.1%} of the encoder's left, "
        f"guided by {plan.guidance}, similarity of {plan.similarity}"
    ]
    lines += [
        f"    {block}: {tokens[i]} → {tokens[i + 1]} tokens, "
        f"{schedule.macs_before[i] / 1e9:.3f} → {schedule.macs_after[i] / 1e9:.3f} GMACs"
        for i, block in enumerate(schedule.blocks)
    ]
    if plan.restore:
        lines.append(f"    after {schedule.blocks[-1]}: restored to {tokens[0]} tokens ({plan.restore})")
    if not plan.plain_stem:
        lines.append("    note: the convolutional network before the blocks is not counted")
    if schedule.note:
        lines.append(f"    note: {schedule.note}")
    return lines
