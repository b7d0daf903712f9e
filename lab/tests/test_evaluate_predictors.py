"""Models from folders, asked as tasks ask them, against the same models called by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import turbovlm
from folders import blip2_folder, blip_folder, clip_folder, llava_folder, saved, siglip2_folder, tokenizer
from turbovlm import ReadConfig, TurboConfig
from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.evaluate.asked_model import AskedModel
from turbovlm_lab.evaluate.data import Data, LazyImage, Sample
from turbovlm_lab.evaluate.predictors import load_predictor
from turbovlm_lab.evaluate.predictors.encoders import Pair, by_names, class_order
from turbovlm_lab.evaluate.predictors.images import Making, features_of, made_by
from turbovlm_lab.evaluate.run import Setting
from turbovlm_lab.evaluate.scoring import Score
from turbovlm_lab.evaluate.settings import METHODS, encoder_macs, methods, smaller
from turbovlm_lab.evaluate.study import run_study
from vlms import CLIP, seeded

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")


def image(number):
    noise = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    return LazyImage(f"image {number}", lambda: Image.fromarray(noise.numpy()))


def samples(count, text="", answers=("a dog",), images=1):
    return tuple(
        Sample(f"s{i}", tuple(image(i * images + side) for side in range(images)), text, answers) for i in range(count)
    )


def asked(predictor, some, image_size=None):
    return predictor.predict([predictor.prepare(sample, image_size) for sample in some])


def loaded(task, folder, data=None, prompt=None):
    return load_predictor(task, AskedModel(str(folder), prompt=prompt), data or Data("d", ()), Making(), None)


def classifier_folder(tmp_path, labels=("ant", "bee", "cat", "dog", "eel", "fox")):
    names = dict(enumerate(labels))
    config = transformers.ViTConfig(**CLIP, id2label=names, label2id={name: i for i, name in names.items()})
    model = seeded(lambda: transformers.ViTForImageClassification(config))
    return saved(tmp_path / "vit", model, transformers.ViTImageProcessor(size={"height": 48, "width": 48}))


def test_classification(tmp_path):
    folder = classifier_folder(tmp_path)
    predictor = loaded("classification", folder, Data("d", (), classes=("ant", "bee", "cat", "dog", "eel", "fox")))
    found = asked(predictor, samples(3))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor([s.images[0].open() for s in samples(3)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = predictor.model(pixels).logits
    assert found == logits.topk(5).indices.tolist()
    assert len(asked(predictor, samples(2), image_size=32)) == 2 and predictor.image_sizes == range(8, 49, 8)


def test_classes_are_found_by_name_or_by_number():
    labels = {0: "Ant", 1: "bee", 2: "cat"}
    assert class_order(["cat", "ant"], labels, "m").tolist() == [2, 0]
    assert class_order(["n01", "n02", "n03"], labels, "m").tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match="m: has 3 classes and the data have 2, of which it does not know 'wasp'"):
        class_order(["ant", "wasp"], labels, "m")


def test_classes_by_their_names(tmp_path):
    folder = clip_folder(tmp_path)
    data = Data("d", (), classes=("dog", "temple", "red_flower"))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    for prompt in ("a photo of a {}.", "what is a {}"):
        predictor = loaded("classification", folder, data, prompt=prompt)
        names = [prompt.format(name) for name in ("dog", "temple", "red flower")]
        images = [sample.images[0].open() for sample in samples(4)]
        inputs = processor(images=images, text=names, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = predictor.model(**inputs).logits_per_image.argsort(dim=1, descending=True)
        assert asked(predictor, samples(4)) == expected.tolist()
    with pytest.raises(ConfigError, match=r"prompt='a thing': must have \{\}"):
        loaded("classification", folder, data, prompt="a thing")


@pytest.mark.parametrize("make", [clip_folder, lambda path: blip_folder(path, "ImageTextRetrieval")])
def test_retrieval(make, tmp_path):
    folder = make(tmp_path)
    predictor = loaded("retrieval", folder)
    some = samples(3, answers=("a dog", "what is a temple"))
    found = asked(predictor, some)
    images = torch.tensor([each["picture"] for each in found])
    captions = torch.tensor([each["captions"] for each in found])
    assert captions.shape[:2] == (3, 2)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(images=some[0].images[0].open(), text=["a dog"], return_tensors="pt")
    more = {"use_itm_head": False} if "Blip" in type(predictor.model).__name__ else {}
    with torch.no_grad():
        out = predictor.model(**inputs, **more)
    expected = out.itm_score if more else out.logits_per_image / predictor.model.logit_scale.exp()
    torch.testing.assert_close((images[0] @ captions[0, 0]).view(1, 1), expected, rtol=0, atol=1e-5)
    with turbovlm.apply(predictor.model, r=4):
        merged = torch.tensor([each["picture"] for each in asked(predictor, some)])
    assert not torch.equal(merged, images)


def test_retrieval_with_images_of_many_shapes(tmp_path):
    """SigLIP 2: images come with their shapes, sentences all have the length that it was trained with."""
    folder = siglip2_folder(tmp_path)
    predictor = loaded("retrieval", folder)
    found = asked(predictor, samples(2, answers=("a dog",)))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    images = processor.image_processor(images=[s.images[0].open() for s in samples(2)], return_tensors="pt")
    words = processor.tokenizer(["a dog"], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = predictor.model(**images, input_ids=words["input_ids"])
    similar = torch.tensor([each["picture"] for each in found]) @ torch.tensor(found[0]["captions"][0])
    torch.testing.assert_close(similar, (out.image_embeds @ out.text_embeds[0]), rtol=0, atol=1e-5)
    with turbovlm.apply(predictor.model, r=2):
        assert asked(predictor, samples(2, answers=("a dog",))) != found


def test_classes_that_bfloat16_cannot_tell_apart():
    """Similarities of normalised vectors near 1 differ by less than its 8 bits."""
    names = torch.tensor([[1, 0.04], [1, 0.02]], dtype=torch.bfloat16)
    seen = torch.tensor([[1, 0.0]], dtype=torch.bfloat16)
    pair = Pair(None, lambda image, size: torch.zeros(1), lambda batch, _: seen, lambda texts: names[: len(texts)])
    predictor = by_names(pair, Data("d", (), classes=("a", "b")), "{}")
    assert asked(predictor, samples(1)) == [[1, 0]]


def test_captions_are_written_without_the_prompt(tmp_path):
    """BLIP's begin with it: its reference captions do not."""
    from tokenizers.processors import TemplateProcessing

    folder = blip_folder(tmp_path, "ConditionalGeneration")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    ends = [("<s>", processor.tokenizer.bos_token_id), ("</s>", processor.tokenizer.eos_token_id)]
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=ends)
    processor.save_pretrained(folder)
    found = asked(loaded("captioning", folder, prompt="what is"), samples(2))
    predictor = loaded("captioning", folder)
    inputs = processor(images=[s.images[0].open() for s in samples(2)], text=["what is"] * 2, return_tensors="pt")
    made = processor.batch_decode(predictor.model.generate(**inputs, max_new_tokens=40), skip_special_tokens=True)
    assert all(text.startswith("what is ") for text in made)
    assert found == [text.removeprefix("what is ").strip() for text in made]


def test_captions(tmp_path):
    folder = blip_folder(tmp_path, "ConditionalGeneration")
    predictor = loaded("captioning", folder)
    found = asked(predictor, samples(2))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(images=[s.images[0].open() for s in samples(2)], return_tensors="pt")
    made = predictor.model.generate(**inputs, max_new_tokens=40, do_sample=False, num_beams=1)
    assert found == [text.strip() for text in processor.batch_decode(made, skip_special_tokens=True)]
    begun = asked(loaded("captioning", folder, prompt="a dog"), samples(2))
    assert all(isinstance(text, str) for text in begun)
    assert len(asked(predictor, samples(1), image_size=32)) == 1


def test_questions(tmp_path):
    folder = blip_folder(tmp_path, "QuestionAnswering")
    predictor = loaded("vqa", folder)
    some = (*samples(1, "what is a dog"), *samples(2, "what is"))
    found = asked(predictor, some)
    assert found == [asked(predictor, [sample])[0] for sample in some]


def test_questions_of_many_lengths_to_a_model_that_goes_on_with_them(tmp_path):
    predictor = loaded("vqa", blip2_folder(tmp_path), prompt="{}")
    some = (*samples(1, "what is a dog temple flower"), *samples(2, "is")[1:])
    assert asked(predictor, some) == [asked(predictor, [sample])[0] for sample in some]


def test_chat(tmp_path):
    folder = llava_folder(tmp_path)
    predictor = loaded("vqa", folder)
    some = (*samples(1, "what is a dog"), *samples(2, "is")[1:])
    found = asked(predictor, some)
    assert found == [asked(predictor, [sample])[0] for sample in some]
    processor = transformers.AutoProcessor.from_pretrained(folder)
    question = "what is a dog\nAnswer the question using a single word or phrase."
    text = f"user : <image> {question} assistant :"
    inputs = processor(images=some[0].images[0].open(), text=text, return_tensors="pt")
    made = predictor.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    expected = processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert found[0] == expected
    assert not predictor.image_sizes


def test_statements_about_two_images_in_a_chat(tmp_path):
    predictor = loaded("nlvr2", llava_folder(tmp_path), prompt="true or false : {}")
    found = asked(predictor, samples(2, "what is a dog", ("True",), images=2))
    assert len(found) == 2 and all(isinstance(answer, str) for answer in found)


@pytest.mark.parametrize(
    ("task", "kind", "settings"),
    [
        ("vqa", "ViltForQuestionAnswering", {"id2label": {0: "red", 1: "blue", 2: "two"}}),
        ("nlvr2", "ViltForImagesAndTextClassification", {"id2label": {0: "False", 1: "True"}, "num_images": 2}),
    ],
)
def test_answers_from_a_list(task, kind, settings, tmp_path):
    size = CLIP | {"vocab_size": 100, "max_position_embeddings": 64}
    if task == "nlvr2":
        size["modality_type_vocab_size"] = 3
    labels = {name: i for i, name in settings["id2label"].items()}
    config = transformers.ViltConfig(**size, **settings, label2id=labels)
    image_processor = transformers.ViltImageProcessor(size={"shortest_edge": 48}, size_divisor=8)
    processor = transformers.ViltProcessor(image_processor, tokenizer())
    model = seeded(lambda: getattr(transformers, kind)(config))
    predictor = loaded(task, saved(tmp_path / "vilt", model, processor))
    some = (*samples(1, "what is a dog", images=1 + (task == "nlvr2")),)
    assert asked(predictor, some)[0] in settings["id2label"].values()


def test_text_to_image(tmp_path):
    """A sample's image does not depend on its batch; it is kept under its seed."""
    pytest.importorskip("diffusers")
    from turbovlm_lab.zoo.emoji import load_emoji_pipeline

    def means(images):
        return torch.stack([torch.from_numpy(np.array(p)).float().mean(dim=(0, 1)) for p in images])

    some = [Sample(f"line {i}", text=text) for i, text in enumerate(["red apple, noto, on white", "dog", "cat"])]
    making = Making(steps=2, guidance=2.0, seed=5, folder=tmp_path)
    predictor = made_by(load_emoji_pipeline(), some, making, means)
    found = asked(predictor, some)
    torch.testing.assert_close(torch.tensor(asked(predictor, some[1:2])), torch.tensor(found[1:2]), rtol=0, atol=0.5)
    kept = [LazyImage.file(tmp_path / f"00000{seed}.png") for seed in (5, 6, 7)]
    torch.testing.assert_close(features_of(kept, means, batch=2), torch.tensor(found))
    with turbovlm.apply(predictor.model, keep=0.5):
        assert asked(predictor, some) != found


def test_image_to_image():
    """An image begins as its sample's: the less it is noised, the more of it stays."""
    pytest.importorskip("diffusers")
    from turbovlm_lab.evaluate.asking import asked as ask_task
    from turbovlm_lab.evaluate.asking import beginning
    from turbovlm_lab.zoo.emoji import load_emoji_pipeline

    def means(images):
        return torch.stack([torch.from_numpy(np.array(p)).float().mean(dim=(0, 1)) for p in images])

    colours = ((250, 20, 20), (20, 20, 250))
    real = tuple(
        LazyImage(f"real {i}", lambda colour=colour: Image.new("RGB", (90, 70), colour))
        for i, colour in enumerate(colours)
    )
    some = tuple(Sample(f"line {i}", text="dog, noto, on white") for i in range(3))
    data = beginning(Data("d", some, real=real))
    assert [sample.images[0].name for sample in data.samples] == ["real 0", "real 1", "real 0"]
    apart = []
    for strength in (0.2, 0.9):
        predictor = made_by(load_emoji_pipeline(), data.samples, Making(steps=5, strength=strength), means)
        made = torch.tensor(asked(predictor, data.samples))
        apart.append((made - means([image.open() for image in (*real, real[0])])).norm(dim=-1))
    assert (apart[0] < apart[1]).all()
    with pytest.raises(ConfigError, match=r"strength=1.5: must be a number in \(0, 1\]"):
        Making(strength=1.5)
    with pytest.raises(ConfigError, match="the data have no images to begin with"):
        ask_task("text-to-image", AskedModel("zoo:emoji"), Data("d", some, real=real), Making(strength=0.5), "vit")


def test_how_a_model_is_asked_is_told(tmp_path):
    """What predictions depend on beside the model: it goes into their file, so that others are not taken for them."""
    folder = blip_folder(tmp_path, "QuestionAnswering")
    where = AskedModel(folder, dtype=torch.bfloat16, prompt="what {}")
    assert loaded("vqa", folder).about == {}
    assert load_predictor("vqa", where, Data("d", ()), Making(), None).about == {
        "dtype": "bfloat16",
        "prompt": "what {}",
    }
    making, features = Making(steps=2, seed=3), lambda images: torch.zeros(len(images), 2)
    emoji = load_predictor("text-to-image", AskedModel("zoo:emoji"), Data("d", ()), making, features)
    assert emoji.about == {"steps": "2", "seed": "3", "features": "<lambda>"}


def test_what_a_task_does_not_take(tmp_path):
    with pytest.raises(TurboError, match="is a ViTForImageClassification; this task takes …CLIPModel, …"):
        loaded("retrieval", classifier_folder(tmp_path))
    (tmp_path / "c").mkdir()
    captioner, answering = (
        blip_folder(tmp_path / "c", "ConditionalGeneration"),
        blip_folder(tmp_path, "QuestionAnswering"),
    )
    with pytest.raises(TurboError, match="is a BlipForConditionalGeneration, which writes captions"):
        loaded("vqa", captioner)
    with pytest.raises(TurboError, match="is a BlipForQuestionAnswering; this task takes …ForConditionalGeneration"):
        loaded("captioning", answering)
    with pytest.raises(TurboError, match="is a Blip2ForConditionalGeneration without a chat template"):
        loaded("nlvr2", blip2_folder(tmp_path))
    with pytest.raises(TurboError, match=r"https://hub/x: 'https' has no model for vqa, which takes BLIP-VQA"):
        loaded("vqa", "https://hub/x")
    with pytest.raises(TurboError, match="'timm' has no model for retrieval"):
        loaded("retrieval", "timm:vit_tiny_patch16_224")
    with pytest.raises(TurboError, match="nowhere: there is no such folder"):
        loaded("vqa", tmp_path / "nowhere")
    with pytest.raises(TurboError, match="saliency takes zoo:saliency"):
        loaded("saliency", tmp_path / "vit")
    with pytest.raises(ConfigError, match=r"prompt='what': must have \{\} where the question stands"):
        loaded("vqa", answering, prompt="what")


def test_models_that_are_not_whole(tmp_path):
    folder = blip_folder(tmp_path, "QuestionAnswering")
    weights = tmp_path / "blip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TurboError, match="blip: transformers could not load it: "):
        loaded("vqa", folder)


def test_a_prompt_without_the_image(tmp_path):
    """Older folders of LLaVA have no chat template: the prompt must say where the image is."""
    folder = llava_folder(tmp_path)
    for path in (tmp_path / "llava").glob("chat_template*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"llava: cannot be asked 'is' \(.*<image> tokens.*\); give it a prompt"):
        asked(loaded("vqa", folder), samples(2, "is"))
    predictor = loaded("vqa", folder, prompt="user : <image> {} assistant :")
    some = (*samples(1, "what is a dog temple"), *samples(2, "is")[1:])
    assert asked(predictor, some) == [asked(predictor, [sample])[0] for sample in some]


def test_methods_and_smaller_images_cost_the_same(tmp_path):
    predictor = loaded("classification", classifier_folder(tmp_path), Data("d", (), classes=tuple("abcdef")))
    (sample,) = samples(1)
    full = encoder_macs(predictor, sample, Setting("own"))
    every = methods((TurboConfig(r=4),), seeds=2)
    assert [setting.name for setting in every] == [
        *list(METHODS)[:4],
        "random, seed 0",
        "random, seed 1",
        "uniform",
    ]
    costs = [encoder_macs(predictor, sample, setting) for setting in every]
    assert max(costs) < 0.9 * full and max(costs) < 1.02 * min(costs)
    less = smaller(predictor, sample, costs[0])
    sizes = {size: encoder_macs(predictor, sample, Setting("", image_size=size)) for size in (24, 32, 40, 48)}
    assert sizes[48] == full and less.image_size == min(sizes, key=lambda size: abs(sizes[size] - costs[0]))


def test_visual_keep_is_counted_in_the_whole_model(tmp_path):
    """Its encoder costs what it did; the language model reads less."""
    predictor = loaded("captioning", llava_folder(tmp_path))
    data = Data("d", samples(2))
    settings = [
        Setting("own"),
        Setting("half", (ReadConfig(0.5),)),
        Setting("both", (TurboConfig(r=4), ReadConfig(0.5))),
    ]
    study = run_study(
        "captioning", "llava", predictor, data, settings, tmp_path / "out", scoring=lambda *_: [Score("s", 1.0)]
    )
    own, half, both = study.rows
    assert both.ratio < half.ratio < 0.95 and own.macs > encoder_macs(predictor, data.samples[0], settings[0])
