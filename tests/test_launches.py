"""One warning where a GPU waits for Python, and none where it does not."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch

import turbovlm
from families import FAMILIES
from turbovlm.encoder.launches import LaunchWatch

ON_GPU = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), shape=(2, 17, 8))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is idle at the ends of forwards, or is not: `gpu.idle` says it, one after the other."""
    found = SimpleNamespace(idle=[], capturing=False, recorded=0)

    class Event:
        def record(self, stream):
            found.recorded += 1

        def query(self):
            return found.idle.pop(0)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    return found


def run(watch, forwards, x=ON_GPU, depth=12):
    """The warnings of some forwards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(forwards):
            for block in range(1, depth + 1):
                watch.behind(block, depth, x)
    return [str(each.message) for each in caught]


def test_it_warns_once_where_the_gpu_is_idle_in_three_forwards(gpu):
    gpu.idle = [True, True, True]
    watch = LaunchWatch()
    assert run(watch, 4) == [] and gpu.recorded == 2
    (told,) = run(watch, 10)
    assert "cuda:0" in told and "batch of 2" in told and "reduce-overhead" in told and "larger batches" in told
    assert watch.is_over and gpu.idle == []


def test_a_gpu_that_is_busy_once_is_asked_no_more(gpu):
    gpu.idle = [True, False]
    assert run(LaunchWatch(), 20) == [] and gpu.idle == []


def test_nothing_is_recorded_on_cpus_or_while_a_graph_is_captured(gpu):
    assert run(LaunchWatch(), 9, torch.zeros(2, 17, 8)) == []
    gpu.capturing = True
    assert run(LaunchWatch(), 9) == [] and gpu.recorded == 0


def test_a_copy_looks_anew(gpu):
    gpu.idle = [False]
    watch = LaunchWatch()
    run(watch, 3)
    for other in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        assert watch.is_over and not other.is_over and other.forwards == 0


def test_blocks_behind_a_merge_are_seen(monkeypatch):
    seen = []
    monkeypatch.setattr(LaunchWatch, "behind", lambda self, block, depth, x: seen.append((block, depth)))
    family = FAMILIES["timm_vit"]
    model, inputs = family.make().eval(), family.inputs(2)
    for r, first in (((0, 2, 0, 0), 2), ((0, 0, 0, 0), 5)):
        seen.clear()
        with turbovlm.apply(model, r=r), torch.no_grad():
            model(**inputs)
        assert seen == [(block, 4) for block in range(first, 5)]
