"""Eight threads on one accelerated model: each gets what it would get alone, and its own reports."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import turbovlm
from denoisers import DENOISERS
from families import FAMILIES
from fuzz.drawing import EXAMPLES
from vlms import VLMS, seeded

THREADS, ROUNDS = 8, 3

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Job:
    """What one thread runs, over and over."""

    model: Any
    handle: turbovlm.Handle
    inputs: dict[str, Any]

    @torch.no_grad()
    def run(self) -> list[torch.Tensor]:
        """All tensors that the model gives, and those that the handle tells of this forward."""
        return [*tensors_of(self.model(**self.inputs)), *reports_of(self.handle)]


def tensors_of(out: Any) -> list[torch.Tensor]:
    """The tensors of an output, in order: of a dict or a model's output class by its values."""
    if isinstance(out, torch.Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else ()
    return [tensor for each in values for tensor in tensors_of(each)]


def reports_of(handle: turbovlm.Handle) -> list[torch.Tensor]:
    found = []
    for feature in handle.features:
        if isinstance(feature.config, turbovlm.TurboConfig):
            found += [tensor for entry in handle.trace for tensor in (entry.source, entry.sizes, entry.semantic)]
            found.append(handle.restore(handle.trace[-1].sizes.unsqueeze(-1)))
        elif isinstance(feature.config, turbovlm.ReadConfig):
            found += [tensor for each in handle.visual for tensor in (each.kept, each.destination, each.weights)]
    return found


def brighter(inputs: dict[str, Any], thread: int) -> dict[str, Any]:
    """The same but for the images, which no two threads have alike."""
    images = ("x", "image", "pixel_values", "pixel_values_videos", "sample", "hidden_states")
    return {name: value * (1 + 0.1 * thread) if name in images else value for name, value in inputs.items()}


def alone_and_together(jobs: list[Job]) -> None:
    """Every thread gets, in every round, what its job gave alone; several start at once."""
    wanted = [job.run() for job in jobs]
    assert all(wanted)
    start, wrong = threading.Barrier(len(jobs)), []

    def work(number: int) -> None:
        torch.set_num_threads(1)
        try:
            start.wait(60)
            for turn in range(ROUNDS):
                found = jobs[number].run()
                if len(found) != len(wanted[number]):
                    wrong.append(f"thread {number}, turn {turn}: {len(found)} tensors, not {len(wanted[number])}")
                wrong.extend(
                    f"thread {number}, turn {turn}: tensor {place} of {len(found)} differs"
                    for place, (ours, theirs) in enumerate(zip(found, wanted[number]))
                    if ours.shape != theirs.shape or not torch.equal(ours.nan_to_num(), theirs.nan_to_num())
                )
        except Exception as error:
            wrong.append(f"thread {number}: {error!r}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, "\n".join(wrong[:5])
    EXAMPLES["threads"] += len(jobs) * ROUNDS


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_encoders(name, dense):
    family = FAMILIES[name]
    model = family.make()
    with turbovlm.apply(model, r=5, trace=True, dense=dense) as handle:
        alone_and_together([Job(model, handle, brighter(family.inputs(1 + n % 3), n)) for n in range(THREADS)])


PROMPTS = ([[5, "image", 7]], [[5, 6, "image", 8, 9], [3, "image"]], [["image", 5, 6, "image", 7]])


@pytest.mark.parametrize("name", VLMS)
def test_vlms(name):
    family = VLMS[name]
    model = seeded(family.make)
    with turbovlm.apply(model, visual_keep=0.4) as handle:
        jobs = [Job(model, handle, brighter(family.inputs(*PROMPTS[n % 3]), n)) for n in range(THREADS)]
        alone_and_together(jobs)


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers(name):
    family = DENOISERS[name]
    model = family().eval()
    with turbovlm.apply(model, keep=0.5) as handle:
        sizes = [(1, 16, 16), (2, 16, 16), (1, 32, 32 if name == "dit" else 16)]  # DiT takes squares
        alone_and_together([Job(model, handle, brighter(family.inputs(*sizes[n % 3]), n)) for n in range(THREADS)])
