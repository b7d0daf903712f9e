"""Merging in a single tower that reads text and image as one sequence: ViLT."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

import turbovlm

transformers = pytest.importorskip("transformers")
from families import _livelier as livelier  # noqa: E402

SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
SIZE |= {"vocab_size": 60, "image_size": 48, "patch_size": 8, "max_image_length": -1, "max_position_embeddings": 12}
PATCHES = 36


def make(task="ForQuestionAnswering", **settings):
    torch.manual_seed(0)
    return livelier(getattr(transformers, f"Vilt{task}")(transformers.ViltConfig(**SIZE, **settings)))


def inputs(words=7, batch=3):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (batch, words), generator=generator)
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 48, 48, generator=generator)}


@torch.no_grad()
def run(model, given, **settings):
    torch.manual_seed(1)  # the library shuffles the patches
    return model(**given, **settings)


def test_nothing_merged_changes_nothing():
    model, given = make(), inputs()
    before = run(model, given).logits
    with turbovlm.apply(model, r=0):
        assert torch.equal(run(model, given).logits, before)
    with turbovlm.apply(model, r=0, trace=True):
        torch.testing.assert_close(run(model, given).logits, before, rtol=0, atol=1e-5)
    assert torch.equal(run(model, given).logits, before)


@pytest.mark.parametrize("words", (3, 7, 12))
def test_words_are_never_merged(words):
    model, given = make(), inputs(words)
    with turbovlm.apply(model, r=4, blocks="every", trace=True) as handle:
        hidden = run(model, given, output_hidden_states=True).hidden_states
        assert {h.shape[1] for h in hidden[:-1]} == {words + 1 + PATCHES}  # restored, but for what is handed on
        run(model, given)
        assert [block.sizes.shape[1] for block in handle.trace] == [words + 1 + PATCHES - 4 * i for i in range(1, 5)]
        last = handle.trace[-1]
        assert last.prefix == words + 1
        assert torch.equal(last.source[:, : words + 1], torch.arange(words + 1).expand(3, -1))
        assert (last.sizes[:, : words + 1] == 1).all()
        assert (last.sizes.sum(1) == words + 1 + PATCHES).all()


def test_heads_that_read_words():
    model, given = make("ForMaskedLM"), inputs()
    before = run(model, given).logits
    with turbovlm.apply(model, keep=0.7):
        after = run(model, given).logits
    assert after.shape == before.shape == (3, 7, 60)
    assert 1e-3 < (after - before).abs().max() < before.abs().max()


@torch.no_grad()
def test_pairs_of_images():
    model = make("ForImagesAndTextClassification", num_images=2, modality_type_vocab_size=3)
    given = inputs()
    given["pixel_values"] = torch.stack([given["pixel_values"], given["pixel_values"].flip(-1)], dim=1)
    with turbovlm.apply(model, r=4):
        assert run(model, given).logits.isfinite().all()


def test_padding_goes_first():
    """Of words, which nobody attends to, and of patches, which are the first to be merged."""
    model, given = make(), inputs()
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][1, 4:] = 0
    given["pixel_mask"] = torch.ones(3, 48, 48, dtype=torch.long)
    given["pixel_mask"][1, 24:] = 0
    before = run(model, given).logits
    with turbovlm.apply(model, r=4):
        after = run(model, given).logits
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-5)
    assert (after[0] - before[0]).abs().max() > 1e-3


@torch.no_grad()
def test_doubled_patches_change_nothing():
    model = make("Model")
    generator = torch.Generator().manual_seed(2)
    patches = torch.randn(1, PATCHES, 32, generator=generator).repeat_interleave(2, dim=1)
    image = torch.cat([torch.randn(1, 1, 32, generator=generator), patches], dim=1)
    given = {
        "input_ids": inputs()["input_ids"][:1],
        "image_embeds": image,
        "pixel_mask": torch.ones(1, 2 * PATCHES + 1),
    }
    before = model(**given).pooler_output
    halving = [PATCHES, 0, 0, 0]
    with turbovlm.apply(model, r=halving, degree="redundancy", partition="alternate", similarity="hidden"):
        out = model(**given)
    assert out.last_hidden_state.shape[1] == 7 + 1 + PATCHES
    torch.testing.assert_close(out.pooler_output, before, rtol=0, atol=1e-5)


def test_batch_is_as_single_ones():
    model = make("Model")
    embedded = {"input_ids": inputs()["input_ids"], "image_embeds": torch.randn(3, PATCHES + 1, 32)}
    embedded["pixel_mask"] = torch.ones(3, PATCHES + 1)
    with turbovlm.apply(model, r=4):
        together = run(model, embedded).pooler_output
        alone = [run(model, {k: v[i : i + 1] for k, v in embedded.items()}).pooler_output for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_copies_and_pickles_are_accelerated():
    model, given = make(), inputs()
    with turbovlm.apply(model, r=4):
        expected = run(model, given).logits
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    plain = run(model, given).logits
    for twin in twins:
        assert torch.equal(run(twin, given).logits, expected)
        turbovlm.get_handle(twin).remove()
        assert torch.equal(run(twin, given).logits, plain)
        assert all("forward" not in module.__dict__ for module in twin.modules())


def test_inspect_and_macs(tmp_path, capsys):
    pytest.importorskip("rich")
    from turbovlm.cli import main

    model = make()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--r", "2"]) == 0
    assert "49" in capsys.readouterr().out
    assert main(["macs", str(tmp_path), "--flops", "0.8", "--json", str(tmp_path / "macs.json")]) == 0
    (row,) = json.loads((tmp_path / "macs.json").read_text())["encoders"]
    assert row["macs_merged"] / row["macs"] == pytest.approx(0.8, abs=0.02)
