"""Pipelines that edit images, whose denoisers are given references beside what they denoise."""

from __future__ import annotations

import warnings

import pytest
import torch

import turbovlm
from edit_pipelines import EDITS
from turbovlm.diffusion import denoiser, rank

pytest.importorskip("diffusers")
MERGING = [name for name, edit in EDITS.items() if edit.whole is None]


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", MERGING)
def test_merges_and_comes_back(name, monkeypatch):
    edit, own, seen = EDITS[name], denoiser._grids_of, set()
    pipe = edit()
    plain = edit.run(pipe)
    with turbovlm.apply(pipe, keep=1.0):
        assert torch.equal(edit.run(pipe), plain)
    monkeypatch.setattr(denoiser, "_grids_of", lambda *args: (found := own(*args), seen.add(found))[0])
    with turbovlm.apply(pipe, keep=0.5) as handle, warnings.catch_warnings():
        warnings.filterwarnings("error", message="turbovlm")
        merged = edit.run(pipe)
        assert torch.equal(edit.run(pipe), merged) and merged.isfinite().all()
        assert f"tokens of {len(edit.images)} images" in repr(handle) and "left whole" not in repr(handle)
    assert seen == {tuple((1, *grid)[-3:] for grid in edit.images)}
    assert 1e-3 < float((merged - plain).norm() / plain.norm()) < 1
    assert torch.equal(edit.run(pipe), plain)


@pytest.mark.parametrize("name", [name for name in MERGING if EDITS[name].batched])
def test_a_batch_is_as_single_runs(name):
    edit = EDITS[name]
    pipe = edit()
    with turbovlm.apply(pipe, keep=0.5):
        together = edit.run(pipe, (0, 1))
        for row in (0, 1):
            assert gap(together[row], edit.run(pipe, (row,))[0]) < 1e-3


@pytest.mark.parametrize("name", ["kontext, guided", "qwen edit", "flux2 klein"])
@pytest.mark.parametrize("refresh", [1, 2])
def test_guidance_in_two_forwards_decides_once_for_both(name, refresh, monkeypatch):
    edit, compare, seen = EDITS[name], rank.mutual_redundancy, []
    monkeypatch.setattr(rank, "mutual_redundancy", lambda *args, **how: (seen.append(1), compare(*args, **how))[1])
    pipe = edit()
    with turbovlm.apply(pipe, keep=0.5, refresh=refresh) as handle:
        assert edit.run(pipe, num_inference_steps=4).isfinite().all()
        groups = len({place.stack.site.group for place in handle.features[0].places})
    assert len(seen) == 4 // refresh * groups * len(edit.images)


def test_one_pipeline_with_references_and_without():
    edit = EDITS["kontext"]
    pipe = edit()
    plain = edit.run(pipe, image=None)
    with turbovlm.apply(pipe, keep=0.5) as handle:
        alone = edit.run(pipe, image=None)
        assert "96 → 48 tokens\n" in f"{handle!r}\n" and not torch.equal(alone, plain)
        edit.run(pipe)
        assert "176 → 88 tokens of 2 images" in repr(handle)
        assert torch.equal(edit.run(pipe, image=None), alone)


def test_references_whose_keys_are_kept():
    edit = EDITS["flux2 klein kv"]
    pipe = edit()
    plain, alone = edit.run(pipe), edit.run(pipe, image=None)
    with turbovlm.apply(pipe, keep=0.5) as handle:
        with pytest.warns(UserWarning, match=f"{edit.whole}"):
            assert torch.equal(edit.run(pipe), plain)
        assert edit.whole in repr(handle)
        assert not torch.equal(edit.run(pipe, image=None), alone) and "96 → 48 tokens" in repr(handle)
    assert torch.equal(edit.run(pipe), plain)
