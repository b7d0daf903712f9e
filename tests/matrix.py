"""What an accelerated model does with the everyday machinery around it: expected outcomes as data, and their table.

A cell is a check (`matrix_checks.CHECKS`) of a family (`matrix_cases.CASES`). It works unless `EXPECTED` says
otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from matrix_cases import CASES, GROUPS, Case
from matrix_checks import CHECKS, Check


@dataclass(frozen=True)
class Works:
    """The check passes."""


@dataclass(frozen=True)
class Refused:
    """turbovlm raises an error with this fragment in its text."""

    fragment: str
    why: str


@dataclass(frozen=True)
class Neither:
    """The model cannot do it without turbovlm either: that raises an error with this fragment."""

    fragment: str
    why: str


@dataclass(frozen=True)
class Fails:
    """Known to go wrong: an error with this fragment, and none of turbovlm's. To be cured."""

    fragment: str
    why: str


Outcome = Works | Refused | Neither | Fails
BERTS = ("bert", "roberta", "xlm_roberta", "electra")
PLACEHOLDERS = tuple(name for name, case in CASES.items() if "visual_keep" in (case.settings or {}))
WAVES = ("wav2vec2", "wav2vec2_stable", "hubert", "hubert_stable")
READERS = tuple(name for name, case in CASES.items() if case.group == "language" and "r" in (case.settings or {}))
"""Vision-language models whose towers merge."""


def _each(names: Iterable[str], outcome: Outcome) -> dict[str, Outcome]:
    return dict.fromkeys(names, outcome)


NOT_CALLED = Refused("an accelerated block does not call it", "an accelerated block computes attention by itself")
DROPOUT = Refused("never builds its attention map", "hooks on what reads the attention map, which is never built")
PACKED = "peft's adapter of `nn.MultiheadAttention` changes weights that an accelerated block reads by itself"
MAPS = Refused("output_attentions=True", "attention maps are never built")
BRANCHES = "its forward looks at values, which `vmap` forbids"
EVA = Neither("not close", "timm reads `qkv.weight`, so an adapter on it has no effect")
EXPECTED: dict[str, dict[str, Outcome]] = {
    "hooks_on_attention": {
        **_each(BERTS, NOT_CALLED),
        **_each(("blip", "blip_language", "vilt"), DROPOUT),
    },
    "hooks_that_change_attention": _each(BERTS, NOT_CALLED),
    "lora_before": {
        "timm_eva02": EVA,
        **_each(("torchvision", "open_clip"), Refused("whose adapter an accelerated block would not see", PACKED)),
    },
    "lora_after": {
        "timm_eva02": EVA,
        **_each(("torchvision", "open_clip"), Refused("which an accelerated block does not call", PACKED)),
    },
    "data_parallel": _each(
        ("qwen2_5_vl", "qwen3_vl", "internvl", "qwen2_vl", "idefics3", "smolvlm"),
        Neither("StopIteration", "`transformers` asks a replica for its parameters, which it has none of"),
    ),
    "jit_trace": {
        **_each(("llava_next", "llava_onevision"), Neither("__round__", "`transformers` rounds a size")),
        "gemma3": Neither("unordered_map::at", "PyTorch fails on its masks"),
    },
    "onnx": {
        "llava": Refused("visual_keep cannot be exported", "what is left of a prompt depends on its values"),
        "sd15": Refused("has no operator in ONNX", '`restore="linear"` has no operator; `"copy"` has'),
        "flux": Neither("rms_norm", "there is no such operator"),
    },
    "export": {"llava": Refused("visual_keep cannot be exported", "what is left of a prompt depends on its values")},
    "compile_": {"llava": Fails("data-dependent expression", "`visual_keep` with `fullgraph=True`")},
    "per_sample": {
        "text": Neither("data-dependent control flow", BRANCHES),
        "siglip2": Neither("Cannot access data pointer", BRANCHES),
        "blip_2_language": Neither("data-dependent control flow", BRANCHES),
        **_each(("llava", "internvl", "paligemma", "gemma3"), Neither(".item() on a Tensor", BRANCHES)),
        **_each(
            ("qwen2_5_vl", "qwen2_vl", "llava_next", "llava_onevision"), Neither("Cannot access data pointer", BRANCHES)
        ),
        "qwen3_vl": Neither("stack expects each tensor", BRANCHES),
        **_each(("idefics3", "smolvlm"), Neither("dynamic shape", BRANCHES)),
    },
    "persistence": _each(
        ("wav2vec2", "wav2vec2_stable"), Neither("Serialization of parametrized modules", "weight norm does not pickle")
    ),
    "gradient_checkpointing": {
        "blip_cross_keep": Refused(
            "cross_keep with gradient checkpointing", "a checkpoint does not hand on what layers read"
        ),
        **_each(
            WAVES, Neither("requires_grad flags of leaf variables", "`transformers` makes a leaf of what these hear")
        ),
    },
    "feature_extractor": _each(
        ("timm", "torchvision"), Refused("an accelerated block merges by the values of its tokens", "a graph has none")
    ),
    "attentions_in_the_call": {
        "transformers": MAPS,
        "text": MAPS,
        **_each(("blip_language", "vision_encoder_decoder", "whisper_speech"), MAPS),
        "data2vec": Neither("AssertionError", "`transformers` hands out no maps"),
    },
    "attentions_in_the_config": {
        "transformers": MAPS,
        "text": MAPS,
        **_each(READERS, MAPS),
        **_each(
            ("data2vec", "vision_encoder_decoder"),
            Neither("is not supported", "one of its parts has no eager attention"),
        ),
    },
}
"""By the check's function and then the family, or its group."""

TITLES = {
    "transformers": "`transformers` encoders",
    "timm": "timm",
    "torchvision": "torchvision",
    "open_clip": "open_clip",
    "text": "text encoders, ViLT",
    "language": "VLMs",
    "diffusers": "denoisers",
}


def cells() -> list[tuple[Check, Case]]:
    """Every check of every family that it can be asked of, and is run for."""
    return [(check, case) for check in CHECKS.values() for case in CASES.values() if is_run(check, case)]


def is_run(check: Check, case: Case) -> bool:
    """Whether a cell is tested: those that are not are either senseless or stood for by others of their group."""
    return check.applies(case) and (not check.only or case.name in check.only)


def expected(check: Check, case: Case) -> Outcome:
    """What a cell comes to: what is said of the family, or of its group, or that it works."""
    said = EXPECTED.get(check.run.__name__, {})
    return said.get(case.name) or said.get(case.group) or Works()


# ----------------------------------------------------------------------------------------------------- the table

SIGNS = {Works: "✓", Refused: "refused", Neither: "–", Fails: "✗"}


def table() -> str:
    """The table in Markdown, and its notes."""
    notes: list[str] = []
    lines = [f"| | {' | '.join(TITLES[group] for group in GROUPS)} |", "|---|" + ":-:|" * len(GROUPS)]
    for check in CHECKS.values():
        lines.append(f"| {check.name} | {' | '.join(_cell(check, group, notes) for group in GROUPS)} |")
    counted = [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *counted])


def _cell(check: Check, group: str, notes: list[str]) -> str:
    cases = [case for case in CASES.values() if case.group == group]
    run = [case for case in cases if is_run(check, case)]
    if not run:
        asked = any(check.applies(case) for case in cases)
        return "not tried" if asked else ""
    by_outcome: dict[Outcome, list[str]] = {}
    for case in run:
        outcome = expected(check, case)
        if isinstance(outcome, Neither | Fails):  # what they raise is not turbovlm's, and not told
            outcome = replace(outcome, fragment="")
        by_outcome.setdefault(outcome, []).append(case.name)
    parts = []
    for kind, sign in SIGNS.items():
        marks = []
        for outcome, names in by_outcome.items():
            if not isinstance(outcome, kind):
                continue
            if not isinstance(outcome, Works):
                marks.append(_note(outcome, names if len(by_outcome) > 1 else [], notes))
            elif check.only:
                marks.append(f"of {_listed(names)}")
        if any(isinstance(outcome, kind) for outcome in by_outcome):
            parts.append(" ".join([sign, *sorted(marks)]))
    return ", ".join(parts)


def _note(outcome: Outcome, names: list[str], notes: list[str]) -> str:
    assert not isinstance(outcome, Works)
    who = f"{_listed(names)}: " if names else ""
    text = f"{who}{outcome.why}"
    if isinstance(outcome, Refused):
        text += f" (“… {outcome.fragment} …”)"
    if text not in notes:
        notes.append(text)
    return f"<sup>{notes.index(text) + 1}</sup>"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
