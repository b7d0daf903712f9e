"""Checkpoints of BLIP as UPop prunes it: small ones in the same layout, and what their authors' models compute."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import turbovlm
from test_models import authors_names
from turbovlm.errors import ConfigError, TurboError
from turbovlm.profile import macs

transformers = pytest.importorskip("transformers")
DEPTH, HEAD_DIM, PATCH, SIDE, WORDS = 3, 8, 8, 6, 120
SEE, READ = 32, 24
"""Widths of an image's and of a text's tokens: 4 heads and 3, of 8 features before pruning."""
WHOLE = {"see": [8] * 3, "see_mlp": [128] * 3, "read": [8] * 3, "cross": [8] * 3, "cross_too": [8] * 3}
WHOLE |= {"read_mlp": [96] * 3}
PRUNED = {"see": [5, 8, 3], "see_mlp": [50, 128, 20], "read": [3, 8, 5], "cross": [8, 2, 6], "cross_too": [4, 8, 1]}
PRUNED |= {"read_mlp": [40, 96, 11]}
"""Features of a head, or of an MLP, that are left in each layer."""
CLASSES = {
    "retrieval": "BlipForImageTextRetrieval",
    "captioning": "BlipForConditionalGeneration",
    "vqa": "BlipForQuestionAnswering",
    "nlvr2": "BlipForNLVR2",
}


class Tensors(dict):
    """A state dict in the making, seeded."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def add(self, name, *shape, std=1.0):
        self[name] = std * torch.randn(shape, generator=self.generator)

    def linear(self, name, given, taken):
        self.add(f"{name}.weight", given, taken, std=1.5 * taken**-0.5)
        self.add(f"{name}.bias", given, std=0.2)

    def norm(self, name, width):
        self.add(f"{name}.weight", width, std=0.1)
        self[f"{name}.weight"] += 1
        self.add(f"{name}.bias", width, std=0.1)

    def attention(self, name, head_dim, read_from, output):
        for part, taken in (("query", READ), ("key", read_from), ("value", read_from)):
            self.linear(f"{name}.{part}", 3 * head_dim, taken)
        self.linear(output, READ, 3 * head_dim)

    def image_encoder(self, widths):
        self.add("visual_encoder.cls_token", 1, 1, SEE)
        self.add("visual_encoder.pos_embed", 1, SIDE**2 + 1, SEE)
        self.add("visual_encoder.patch_embed.proj.weight", SEE, 3, PATCH, PATCH, std=0.1)
        self.add("visual_encoder.patch_embed.proj.bias", SEE)
        for layer in range(DEPTH):
            block, width, hidden = f"visual_encoder.blocks.{layer}", 4 * widths["see"][layer], widths["see_mlp"][layer]
            for norm in ("norm1", "norm2"):
                self.norm(f"{block}.{norm}", SEE)
            self.linear(f"{block}.attn.qkv", 3 * width, SEE)
            self.linear(f"{block}.attn.proj", SEE, width)
            self.linear(f"{block}.mlp.fc1", hidden, SEE)
            self.linear(f"{block}.mlp.fc2", SEE, hidden)
        self.norm("visual_encoder.norm", SEE)

    def text_model(self, name, widths, cross_from=SEE, images=1):
        self.add(f"{name}.embeddings.word_embeddings.weight", WORDS, READ, std=0.3)
        self.add(f"{name}.embeddings.position_embeddings.weight", 20, READ, std=0.3)
        self[f"{name}.embeddings.position_ids"] = torch.arange(20).unsqueeze(0)
        self.norm(f"{name}.embeddings.LayerNorm", READ)
        for layer in range(DEPTH):
            here = f"{name}.encoder.layer.{layer}"
            self.attention(f"{here}.attention.self", widths["read"][layer], READ, f"{here}.attention.output.dense")
            cross = f"{here}.crossattention"
            if images == 1:
                self.attention(f"{cross}.self", widths["cross"][layer], cross_from, f"{cross}.output.dense")
            else:
                self.attention(f"{cross}.self0", widths["cross"][layer], cross_from, f"{cross}.output.dense0")
                self.attention(f"{cross}.self1", widths["cross_too"][layer], cross_from, f"{cross}.output.dense1")
                if layer >= DEPTH // 2:
                    self.linear(f"{cross}.output.merge_layer", READ, 2 * READ)
            self.linear(f"{here}.intermediate.dense", widths["read_mlp"][layer], READ)
            self.linear(f"{here}.output.dense", READ, widths["read_mlp"][layer])
            for norm in ("attention.output", "crossattention.output", "output"):
                self.norm(f"{here}.{norm}.LayerNorm", READ)

    def word_head(self):
        head = "text_decoder.cls.predictions"
        self.linear(f"{head}.transform.dense", READ, READ)
        self.norm(f"{head}.transform.LayerNorm", READ)
        self.add(f"{head}.bias", WORDS)
        self[f"{head}.decoder.weight"] = self["text_decoder.bert.embeddings.word_embeddings.weight"]
        self[f"{head}.decoder.bias"] = self[f"{head}.bias"]


def checkpoint(task, widths=PRUNED):
    """What the authors' `state_dict()` would hold."""
    made = Tensors()
    made.image_encoder(widths)
    if task != "captioning":
        made.text_model("text_encoder", widths, images=2 if task == "nlvr2" else 1)
    if task in ("captioning", "vqa"):
        made.text_model("text_decoder.bert", widths, cross_from=SEE if task == "captioning" else READ)
        made.word_head()
    if task == "retrieval":
        for name, given, taken in (("vision_proj", 16, SEE), ("text_proj", 16, READ), ("itm_head", 2, READ)):
            made.linear(name, given, taken)
            made.linear(f"{name}_m", given, taken)
        made.add("visual_encoder_m.norm.weight", SEE)
        made.add("image_queue", 16, 10)
        made.add("temp")
    if task == "nlvr2":
        made.linear("cls_head.0", READ, READ)
        made.linear("cls_head.2", 2, READ)
    return dict(made)


class Reference:
    """What UPop's models compute, from the tensors alone."""

    def __init__(self, state):
        self.state = state

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, x, eps=1e-12):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def mixed(self, q, k, v, heads, scale, mask=None):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) * scale
        scores = scores if mask is None else scores + mask
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def see(self, pixels):
        name = "visual_encoder.patch_embed.proj"
        patches = F.conv2d(pixels, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride=PATCH)
        x = torch.cat([self.state["visual_encoder.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], 1)
        x = x + self.state["visual_encoder.pos_embed"]
        for layer in range(DEPTH):
            block = f"visual_encoder.blocks.{layer}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
            x = x + self.linear(f"{block}.attn.proj", self.mixed(*qkv, 4, HEAD_DIM**-0.5))
            hidden = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", F.gelu(hidden))
        return self.norm("visual_encoder.norm", x, 1e-6)

    def attention(self, name, x, y, mask=None):
        q, k, v = (self.linear(f"{name}.{part}", z) for part, z in (("query", x), ("key", y), ("value", y)))
        return self.mixed(q, k, v, 3, (q.shape[-1] // 3) ** -0.5, mask)

    def read(self, name, ids, seen=None, causal=False):
        embeddings = f"{name}.embeddings"
        positions = self.state[f"{embeddings}.position_embeddings.weight"][: ids.shape[1]]
        words = self.state[f"{embeddings}.word_embeddings.weight"][ids]
        x = self.norm(f"{embeddings}.LayerNorm", words + positions)
        mask = torch.full((ids.shape[1],) * 2, -10000.0).triu(1) if causal else None
        for layer in range(DEPTH):
            here = f"{name}.encoder.layer.{layer}"
            out = f"{here}.attention.output"
            x = self.norm(
                f"{out}.LayerNorm",
                x + self.linear(f"{out}.dense", self.attention(f"{here}.attention.self", x, x, mask)),
            )
            cross = f"{here}.crossattention"
            if isinstance(seen, tuple):
                parts = [
                    self.linear(f"{cross}.output.dense{i}", self.attention(f"{cross}.self{i}", x, seen[i]))
                    for i in (0, 1)
                ]
                joined = layer >= DEPTH // 2
                both = self.linear(f"{cross}.output.merge_layer", torch.cat(parts, -1)) if joined else sum(parts) / 2
                x = self.norm(f"{cross}.output.LayerNorm", x + both)
            elif seen is not None:
                both = self.linear(f"{cross}.output.dense", self.attention(f"{cross}.self", x, seen))
                x = self.norm(f"{cross}.output.LayerNorm", x + both)
            hidden = F.gelu(self.linear(f"{here}.intermediate.dense", x))
            x = self.norm(f"{here}.output.LayerNorm", x + self.linear(f"{here}.output.dense", hidden))
        return x

    def words(self, ids, seen):
        head, x = "text_decoder.cls.predictions", self.read("text_decoder.bert", ids, seen, causal=True)
        x = self.norm(f"{head}.transform.LayerNorm", F.gelu(self.linear(f"{head}.transform.dense", x)))
        return self.linear(f"{head}.decoder", x)

    def answer(self, task):
        """The same as `asked`."""
        seen = self.see(PIXELS)
        if task == "retrieval":
            return self.linear("itm_head", self.read("text_encoder", IDS, seen)[:, 0])
        if task == "captioning":
            return self.words(IDS, seen)
        if task == "vqa":
            scores = self.words(ANSWERS, self.read("text_encoder", IDS, seen))
            return F.cross_entropy(scores[:, :-1].flatten(0, 1), ANSWERS[:, 1:].flatten())
        ids = torch.cat([torch.full((1, 1), WORDS - 1), IDS[:1, 1:]], dim=1)
        x = self.read("text_encoder", ids, (seen[:1], seen[1:]))[:, 0]
        return self.linear("cls_head.2", self.linear("cls_head.0", x).relu())


PIXELS = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(1, 100, (2, 7), generator=torch.Generator().manual_seed(2))
ANSWERS = torch.randint(1, 100, (2, 4), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def asked(model, task):
    if task == "retrieval":
        return model(input_ids=IDS, pixel_values=PIXELS).itm_score
    if task == "captioning":
        return model(input_ids=IDS, pixel_values=PIXELS).logits
    if task == "vqa":
        return model(input_ids=IDS, pixel_values=PIXELS, labels=ANSWERS).loss
    return model(PIXELS, IDS[:1])


@pytest.fixture
def load(tmp_path):
    """Save a state dict as the authors do, and load it."""
    from turbovlm_lab.models import load_upop

    def loaded(state, task=None, head_dim=HEAD_DIM):
        torch.save({"model": state}, tmp_path / "model.pth")
        return load_upop(tmp_path / "model.pth", task, head_dim)

    return loaded


@pytest.mark.parametrize("widths", [PRUNED, WHOLE], ids=["pruned", "whole"])
@pytest.mark.parametrize("task", CLASSES)
@torch.no_grad()
def test_models_compute_what_their_authors_do(load, task, widths):
    state = checkpoint(task, widths)
    model, reference = load(state), Reference(state)
    assert type(model).__name__ == CLASSES[task] and not model.training
    seen = model.vision_model(PIXELS).last_hidden_state
    torch.testing.assert_close(seen, reference.see(PIXELS), rtol=0, atol=1e-5)
    torch.testing.assert_close(asked(model, task), reference.answer(task), rtol=0, atol=1e-5)
    assert torch.equal(asked(load(state, task), task), asked(model, task))
    assert torch.equal(asked(copy.deepcopy(model), task), asked(pickle.loads(pickle.dumps(model)), task))


@torch.no_grad()
def test_features_and_captions(load):
    state = checkpoint("retrieval")
    model, reference = load(state), Reference(state)
    image = F.normalize(reference.linear("vision_proj", reference.see(PIXELS)[:, 0]), dim=-1)
    text = F.normalize(reference.linear("text_proj", reference.read("text_encoder", IDS)[:, 0]), dim=-1)
    found = model(input_ids=IDS, pixel_values=PIXELS, use_itm_head=False).itm_score
    torch.testing.assert_close(found, image @ text.mT, rtol=0, atol=1e-5)
    state = checkpoint("captioning")
    model, reference = load(state), Reference(state)
    assert model.config.text_config.bos_token_id == WORDS - 2
    said, seen = torch.full((2, 1), WORDS - 2), reference.see(PIXELS)
    for _ in range(5):
        said = torch.cat([said, reference.words(said, seen)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(PIXELS, max_new_tokens=5, do_sample=False, num_beams=1), said)


@torch.no_grad()
def test_attention_maps_on_request(load):
    tower = load(checkpoint("captioning")).vision_model
    plain, asked_for = tower(PIXELS), tower(PIXELS, output_attentions=True)
    torch.testing.assert_close(asked_for.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-5)
    assert [maps.shape for maps in asked_for.attentions] == [(2, 4, 37, 37)] * DEPTH
    torch.testing.assert_close(asked_for.attentions[0].sum(-1), torch.ones(2, 4, 37))


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa"])
@torch.no_grad()
def test_whole_models_equal_those_of_transformers(load, task):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = {**size, "image_size": 48, "patch_size": 8, "layer_norm_eps": 1e-6, "initializer_range": 0.2}
    text = {**size, "vocab_size": WORDS, "max_position_embeddings": 20, "initializer_range": 0.2}
    model = getattr(transformers, CLASSES[task])(transformers.BlipConfig(vision_config=vision, text_config=text)).eval()
    loaded = load(authors_names(model.state_dict()))
    assert type(loaded) is type(model)
    torch.testing.assert_close(asked(loaded, task), asked(model, task), rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", CLASSES)
def test_merging_and_back(load, task):
    model = load(checkpoint(task))
    own = asked(model, task)
    with turbovlm.apply(model, r=0):
        assert torch.equal(asked(model, task), own)
    with turbovlm.apply(model, flops=0.6) as handle:
        assert [schedule.ratio for schedule in handle.schedules] == [pytest.approx(0.6, abs=0.03)]
        merged = asked(model, task)
        assert torch.equal(asked(copy.deepcopy(model), task), merged)
    assert merged.isfinite().all() and not torch.allclose(merged, own, atol=1e-3)
    assert torch.equal(asked(model, task), own)


@pytest.mark.parametrize("settings", [{"visual_keep": 0.5}, {"cross_keep": 0.5}, {"r": 3, "visual_keep": 20}])
def test_text_models_read_less(load, settings):
    model = load(checkpoint("captioning"))
    own = asked(model, "captioning")
    with turbovlm.apply(model, **settings):
        assert not torch.allclose(asked(model, "captioning"), own, atol=1e-3)
    assert torch.equal(asked(model, "captioning"), own)


def test_schedules_count_the_widths_that_are_left(load):
    tower = load(checkpoint("retrieval")).vision_model
    with turbovlm.apply(tower, flops=0.6) as handle:
        schedule, counted = handle.schedules[0], macs(tower, PIXELS[:1])
    patches, norms = (
        36 * SEE * 3 * PATCH**2,
        sum(5 * SEE * (a + b) for a, b in zip(schedule.tokens, schedule.tokens[1:])),
    )
    assert sum(schedule.macs_after) - norms + patches == pytest.approx(counted, rel=0.01)
    for before, heads, hidden in zip(schedule.macs_before, PRUNED["see"], PRUNED["see_mlp"]):
        width, tokens = 4 * heads, SIDE**2 + 1
        assert before - 10 * SEE * tokens == tokens * SEE * (4 * width + 2 * hidden) + 2 * tokens**2 * width


BLOCK, LAYER = "visual_encoder.blocks.0", "text_encoder.encoder.layer.0"
BROKEN = {
    "no positions": ({"visual_encoder.pos_embed": None}, r"the checkpoint has no visual_encoder\.pos_embed"),
    "no norm": (
        {f"{BLOCK}.norm1.bias": None},
        r"1 missing, such as vision_model\.encoder\.layers\.0\.layer_norm1\.bias",
    ),
    "no qkv": (
        {f"{BLOCK}.attn.qkv.weight": None},
        r"1 missing, such as vision_model\S+layers\.0\.self_attn\.qkv\.weight",
    ),
    "no head": ({"itm_head.bias": None}, r"1 missing, such as itm_head\.bias"),
    "flat": ({"visual_encoder.pos_embed": torch.zeros(37, SEE)}, r"3 dimensions expected, shape \(37, 32\) found"),
    "a narrower projection": (
        {f"{BLOCK}.attn.proj.weight": torch.zeros(SEE, 16)},
        r"self_attn\.qkv\.weight gives 60 features, 3 × 16 expected, as \S+self_attn\.projection\.weight .* 16",
    ),
    "unequal heads": (
        {f"{BLOCK}.attn.qkv.weight": torch.zeros(54, SEE), f"{BLOCK}.attn.proj.weight": torch.zeros(SEE, 18)},
        r"takes 18, in 4 heads of equal width",
    ),
    "a narrower key": (
        {f"{LAYER}.attention.self.key.weight": torch.zeros(6, READ)},
        r"text_encoder\.encoder\.layer\.0\.attention\.self\.key\.weight gives 6 features, 9 expected",
    ),
    "a narrower MLP": (
        {f"{LAYER}.output.dense.weight": torch.zeros(READ, 30)},
        r"layer\.0\.intermediate\.dense\.weight gives 40 features, 30 expected",
    ),
    "a bias": ({f"{BLOCK}.attn.qkv.bias": torch.zeros(96)}, r"1 of another shape, such as \S+self_attn\.qkv\.bias"),
    "not a square": ({"visual_encoder.pos_embed": torch.zeros(1, 31, SEE)}, r"1 of another shape, such as \S+position"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_named(load, what):
    tensors, message = BROKEN[what]
    with pytest.raises(TurboError, match=message):
        load({name: tensor for name, tensor in (checkpoint("retrieval") | tensors).items() if tensor is not None})


def test_one_file_for_several_tasks(load):
    state = checkpoint("captioning") | checkpoint("retrieval")
    for task in (None, "captioning"):
        assert type(load(state, task)).__name__ == CLASSES[task or "retrieval"]


def test_what_is_no_checkpoint_of_blip(load, tmp_path):
    from turbovlm_lab.models import load_upop

    with pytest.raises(TurboError, match=r"no model of BLIP's .*; found: layer, visual_encoder"):
        load({"layer.weight": torch.zeros(2), "visual_encoder.pos_embed": torch.zeros(2)})
    with pytest.raises(TurboError, match=r"has no visual_encoder\.blocks\.0"):
        load({name: tensor for name, tensor in checkpoint("captioning").items() if ".blocks." not in name})
    with pytest.raises(
        ConfigError, match=r"task='captions': one of 'retrieval', 'captioning', 'vqa', 'nlvr2' expected"
    ):
        load(checkpoint("captioning"), "captions")
    with pytest.raises(
        ConfigError, match=r"task='vqa': \S+model\.pth has no text_decoder; it has a model for retrieval"
    ):
        load(checkpoint("retrieval"), "vqa")
    with pytest.raises(ConfigError, match=r"head_dim=7: visual_encoder\.blocks have 32 features"):
        load(checkpoint("captioning"), head_dim=7)
    with pytest.raises(TurboError, match="there is no such file"):
        load_upop(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("an image of")
    with pytest.raises(TurboError, match=r"text\.pth: not a file of tensors"):
        load_upop(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(TurboError, match=r"list\.pth: a state dict expected, list found"):
        load_upop(tmp_path / "list.pth")
