"""What starts, shows and stops a run of minutes: two buttons, a bar, and a line for what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from turbovlm.errors import TurboError
from turbovlm_lab.studio import render
from turbovlm_lab.studio.controls import seen
from turbovlm_lab.studio.jobs import Job, Progress, Report, Stopped, in_words
from turbovlm_lab.studio.subjects import Models

POLL = 0.4
"""Seconds between two looks at a run."""
Updates = dict[Any, Any]
"""Components and what they are to show."""
Work = Callable[[Report], Any]


@dataclass(frozen=True, eq=False)
class Runner:
    """The components; `job` is the run of this page that was started last."""

    start: gr.Button
    cancel: gr.Button
    bar: gr.HTML
    problem: gr.HTML
    job: gr.State

    @classmethod
    def add(cls, name: str, title: str) -> Runner:
        """Add them to the page that is open.

        Args:
            name: of the tab, which their ids begin with; `title`: on the button.
        """
        problem = gr.HTML("", elem_id=f"problem-{name}")
        with gr.Row():
            start = gr.Button(title, variant="primary", elem_id=f"{name}-start", min_width=120)
            cancel = gr.Button("Cancel", variant="stop", elem_id=f"{name}-cancel", min_width=120, **seen(False))
        bar = gr.HTML("", elem_id=f"{name}-bar")
        return cls(start, cancel, bar, problem, gr.State(None, time_to_live=3600))

    def wire(
        self,
        shop: Models,
        prepare: Callable[..., Work],
        inputs: Sequence[Any],
        show: Callable[[Any], Updates],
        outputs: Sequence[Any],
    ) -> None:
        """Make the buttons do what they say.

        Args:
            prepare: the values of `inputs` → what is to be done, which then waits for its turn; raises `TurboError`.
            show: what came of it → what `outputs` show.
        """

        def run(*values: Any) -> Iterator[Updates]:
            try:
                work = prepare(*values)
            except TurboError as error:
                yield self._ended("", error)
                return
            job = Job(work, shop.computing)
            try:
                yield {**self._ended(_bar(job.report.progress)), **self._running(job)}
                while not job.wait(POLL):
                    yield {self.bar: _bar(job.report.progress)}
                yield {**show(job.result()), **self._ended("")}
            except Stopped:
                after = in_words(job.report.progress.seconds)
                yield self._ended(f"<p class='note' role='status'>Cancelled after {after}; nothing was changed.</p>")
            except TurboError as error:
                yield self._ended("", error)
            except Exception:
                yield self._ended("", TurboError("something went wrong that should not; the terminal says what"))
                raise
            finally:
                job.stop()

        own = [self.start, self.cancel, self.bar, self.problem, self.job]
        how = {"show_progress": "hidden", "api_visibility": "private"}
        self.start.click(run, list(inputs), [*own, *outputs], concurrency_limit=None, **how)
        self.cancel.click(_stop, self.job, self.cancel, queue=False, **how)

    def _running(self, job: Job[Any]) -> Updates:
        return {
            self.start: gr.update(interactive=False),
            self.cancel: gr.update(**seen(True), interactive=True, value="Cancel"),
            self.job: job,
        }

    def _ended(self, said: str, error: TurboError | None = None) -> Updates:
        return {
            self.start: gr.update(interactive=True),
            self.cancel: gr.update(**seen(False)),
            self.bar: said,
            self.problem: render.problem(None if error is None else str(error)),
        }


def _stop(job: Job[Any] | None) -> Any:
    if job is not None:
        job.stop()
    return gr.update(interactive=False, value="Stopping …")


def _bar(progress: Progress) -> str:
    """A bar, the stage, and the time that is left where it is known."""
    done, total = min(progress.done, progress.total), progress.total
    value = f" value='{done}' max='{total}'" if total and progress.done < total else ""
    counted = f": {done} of {total}" if value else ""
    left = "" if progress.left is None else f", about {in_words(progress.left)} left"
    return (
        f"<div class='running'><progress{value} aria-label='Progress'></progress>"
        f"<p class='note'>{escape(progress.stage)}{counted} · {in_words(progress.seconds)}{left}</p></div>"
    )
