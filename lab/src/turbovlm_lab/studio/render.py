"""What came of a run, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from turbovlm_lab.studio.measuring import Times
from turbovlm_lab.studio.patches import data_uri
from turbovlm_lab.studio.subjects import Answer, Outcome

SHOWN_LABELS = 6


def costs(outcome: Outcome, times: Sequence[Times] | None, link: Mapping[str, str]) -> str:
    """Tokens, multiply-accumulates, time and drift, one beside the other.

    Args:
        times: of the unmerged and of the merged model; None while they are being measured.
        link: what was run; tests read it off the page.
    """
    whole, merged = outcome.unmerged, outcome.merged
    cards = []
    if merged.tokens:
        cards.append(card("Tokens", f"{whole.tokens[-1]} → {merged.tokens[-1]}", outcome.counted))
    cards.append(_gmacs(whole.gmacs, merged.gmacs))
    cards.append(_time(times))
    if outcome.drift is not None:
        centred = "1 − cosine" if outcome.centred is None else f"1 − cosine · centred {_small(outcome.centred)}"
        cards.append(card("Drift", _small(outcome.drift), centred))
    note = f"Of {outcome.measured}"
    if times is not None:
        runs = times[1].runs
        note += f"; times are the median of {runs} runs of each, in turn" if runs > 1 else "; time of one run of each"
    state = escape("&".join(f"{name}={value}" for name, value in link.items() if value), quote=True)
    done = "measuring" if times is None else "done"
    return (
        f"<div class='cards' data-state='{state}' data-stage='{done}'>{''.join(cards)}</div>"
        f"<p class='note'>{escape(note)}.</p>"
    )


def answers(outcome: Outcome) -> str:
    """The merged model's answer beside the unmerged one's, and what must be known to read them."""
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in outcome.notes)
    if outcome.merged.labels:
        return _labels(outcome.unmerged, outcome.merged) + notes
    if outcome.merged.picture is not None:
        return _pictures(outcome.unmerged, outcome.merged) + notes
    if outcome.merged.text is not None:
        return _texts(outcome.unmerged, outcome.merged) + notes
    return notes


def code(line: str, said: str) -> str:
    """The line of Python that does the same, and what `print(handle)` says."""
    return (
        f"<p class='note'>The same in Python, and what <code>print(handle)</code> says:</p>"
        f"<pre class='code' tabindex='0'>{escape(line)}\n\n{escape(said)}</pre>"
    )


def problem(message: str | None) -> str:
    """What is wrong, beside the control; nothing where nothing is."""
    return "" if message is None else f"<p class='problem' role='alert'>{escape(message)}</p>"


def card(title: str, value: str, detail: str) -> str:
    """A number with its title above and what must be known of it beneath."""
    return f"<div class='card'><span>{title}</span><b>{value}</b><small>{escape(detail)}</small></div>"


def _gmacs(whole: float | None, merged: float | None) -> str:
    if not whole or merged is None:
        return card("Multiply-accumulates", "…", "being counted")
    return card("Multiply-accumulates", f"{whole:.3g} → {merged:.3g} G", f"{merged / whole:.0%} of them left")


def _time(times: Sequence[Times] | None) -> str:
    if times is None:
        return card("CPU time", "…", "being measured")
    whole, merged = times
    faster = whole.cpu / merged.cpu
    said = f"{faster:.2f}× as fast" if faster >= 1 else f"{1 / faster:.2f}× as slow"
    clock = f"clock {_ms(whole.wall)} → {_ms(merged.wall)} ms"
    return card("CPU time", f"{_ms(whole.cpu)} → {_ms(merged.cpu)} ms", f"{said} · {clock}")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.1f}"


def _small(drift: float) -> str:
    return f"{max(drift, 0):.2g}" if drift >= 1e-6 else "0"


def _labels(whole: Answer, merged: Answer) -> str:
    order = sorted(whole.labels, key=lambda name: -max(whole.labels[name], merged.labels[name]))[:SHOWN_LABELS]
    rows = "".join(
        f"<div class='label'><b>{escape(name)}</b>{_bar('whole', 'unmerged', whole.labels[name])}"
        f"{_bar('merged', 'merged', merged.labels[name])}</div>"
        for name in order
    )
    same = max(whole.labels, key=whole.labels.__getitem__) == max(merged.labels, key=merged.labels.__getitem__)
    return f"<h3>{'The same label' if same else 'Another label'}</h3>{_KEY}<div class='labels'>{rows}</div>"


_KEY = "<p class='key'><i class='whole'></i>unmerged<i class='merged'></i>merged</p>"


def _bar(kind: str, who: str, share: float) -> str:
    said = f"{100 * share:.1f} %"
    return (
        f"<span class='bar' title='{who}: {said}'><i><i class='{kind}' style='width:{100 * share:.2f}%'></i></i>"
        f"<em>{said}</em></span>"
    )


def _pictures(whole: Answer, merged: Answer) -> str:
    shown = "".join(
        f"<figure><img src='{data_uri(answer.picture)}' alt='{who}'><figcaption>{who}</figcaption></figure>"
        for who, answer in (("unmerged", whole), ("merged", merged))
        if answer.picture is not None
    )
    return f"<div class='pictures'>{shown}</div>"


def _texts(whole: Answer, merged: Answer) -> str:
    same = whole.text == merged.text
    shown = "".join(
        f"<div class='text'><span>{who}</span><p>{escape(text or '(nothing)')}</p></div>"
        for who, text in (("unmerged", whole.text), ("merged", merged.text))
    )
    return f"<h3>{'The same words' if same else 'Other words'}</h3>{shown}"
