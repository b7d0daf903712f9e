"""Pretrained models together with what turns images into their input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from turbovlm.errors import ConfigError, TurboError
from turbovlm.loading.models import load_model
from turbovlm.loading.spec import ModelSpec, library_errors

Prepare = Callable[[Sequence[Any]], Any]
"""RGB images to what the model takes: a tensor, or tensors by argument name; a list of tensors where images stay of
several sizes."""
PrepareOne = Callable[[Any], Mapping[str, torch.Tensor]]
"""An RGB image to a model's input of it, tensors `[1, …]` by argument name."""
CAPTION_PROMPT = "Describe this image in one sentence."
"""What a chat model is asked of an image where nothing else is."""


def load_for_images(spec: ModelSpec) -> tuple[Any, Prepare]:
    """Load a model with its weights, in eval mode, and what turns images into its input.

    Returns:
        The model, and a function from RGB images to its input, on its device and in its dtype.

    Raises:
        TurboError: it cannot be loaded, or takes no images.
    """
    added = spec.added
    if added is not None:
        prepare = added.prepare
        if prepare is None:
            raise TurboError(f"{spec.text}: makes images, and takes none")
        return load_model(spec, pretrained=True), lambda images: _placed(prepare(images), spec)
    if spec.library == "timm":
        model, transform = load_timm(spec)
        return model, lambda images: _placed(torch.stack([transform(image) for image in images]), spec)
    if spec.library != "transformers":
        raise TurboError(f"{spec.text}: {spec.library!r} is none of transformers, timm")
    model, processor = load_with_processor(spec, transformers_class(spec))
    image_processor = getattr(processor, "image_processor", processor)

    def prepared(images: Sequence[Any]) -> Any:
        each = [image_processor(images=[image], return_tensors="pt") for image in images]
        if len({tuple(tuple(value.shape) for value in made.values()) for made in each}) == 1:
            return {name: _placed(torch.cat([made[name] for made in each]), spec) for name in each[0]}
        names = {name for made in each for name in made}
        if names != {"pixel_values"}:
            raise TurboError(
                f"{spec.text}: its processor makes {', '.join(sorted(names))} of several sizes of these images; give "
                "images of one size"
            )
        return [_placed(made["pixel_values"][0], spec) for made in each]

    return model, prepared


def load_preparation(spec: ModelSpec, prompt: str | None = None, *, generates: bool = False) -> PrepareOne:
    """What turns an image into a model's input, on the CPU and without the model's weights.

    Args:
        spec: the model.
        prompt: what a model that generates is asked beside the image.
        generates: whether its input is that of `generate`, and not of its encoder.

    Returns:
        A function from an RGB image to tensors `[1, …]` by argument name; the one input of timm's models is `"x"`, that
        of models that other packages bring `"pixel_values"`.

    Raises:
        TurboError: its processor is not there, or it takes no images.
    """
    added = spec.added
    if added is not None:
        prepare = added.prepare
        if prepare is None:
            raise TurboError(f"{spec.text}: makes images, and takes none")
        return lambda image: {"pixel_values": prepare([image])}
    if spec.library == "timm":
        transform = _timm_transform(load_model(dataclasses.replace(spec, device="meta")))
        return lambda image: {"x": transform(image).unsqueeze(0)}
    if spec.library != "transformers":
        raise TurboError(f"{spec.text}: {spec.library!r} is none of transformers, timm")
    with library_errors(spec):
        import transformers

        processor = transformers.AutoProcessor.from_pretrained(spec.name)
    if not generates:
        image_processor = getattr(processor, "image_processor", processor)
        return lambda image: dict(image_processor(images=[image], return_tensors="pt"))
    return lambda image: dict(_with_prompt(processor, image, prompt))


def _with_prompt(processor: Any, image: Any, prompt: str | None) -> Mapping[str, Any]:
    """An image and a prompt as the processor of a model that generates has them."""
    made: Mapping[str, Any]
    if getattr(processor, "chat_template", None):
        said = [{"type": "image", "image": image}, {"type": "text", "text": prompt or CAPTION_PROMPT}]
        made = processor.apply_chat_template(
            [{"role": "user", "content": said}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return made
    made = processor(images=image, return_tensors="pt", **({} if prompt is None else {"text": prompt}))
    return made


def load_timm(spec: ModelSpec) -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """Load a model of timm with its weights, in eval mode, and its transform of one RGB image.

    Raises:
        TurboError: there is no such model, or there are no weights.
    """
    model: Any = load_model(spec, pretrained=True)
    return model, _timm_transform(model)


def _timm_transform(model: Any) -> Callable[[Any], torch.Tensor]:
    import timm

    settings = timm.data.resolve_model_data_config(model)
    transform: Callable[[Any], torch.Tensor] = timm.data.create_transform(**settings, is_training=False)
    return transform


def transformers_class(spec: ModelSpec, endings: Sequence[str] = ("",)) -> Any:
    """Find the class of `transformers` that a model's config names.

    Args:
        spec: the model.
        endings: of the names of classes that will do; any if left out, and then also the one that fits where the
            config names none.

    Raises:
        TurboError: there is no such model, or it is of another class; the message says which would do.
    """
    with library_errors(spec):
        import transformers

        config = transformers.AutoConfig.from_pretrained(spec.name)
    names = config.architectures or []
    for name in names:
        if hasattr(transformers, name) and name.endswith(tuple(endings)):
            return getattr(transformers, name)
    if "" in endings:
        return transformers.AutoModel
    raise TurboError(
        f"{spec.text}: is a {', '.join(names) or config.model_type}; this task takes …{', …'.join(endings)}"
    )


def load_with_processor(spec: ModelSpec, kind: Any) -> tuple[Any, Any]:
    """Load a model of `transformers` with its weights, in eval mode, and its processor.

    Args:
        spec: the model.
        kind: its class, such as `transformers_class` finds.

    Raises:
        TurboError: the weights or the processor's files are not there.
    """
    with library_errors(spec):
        import transformers

        model = kind.from_pretrained(spec.name, dtype=spec.dtype).eval().to(spec.device)
        processor = transformers.AutoProcessor.from_pretrained(spec.name)
    return model, processor


def size_arguments(processor: Any, image_size: int | None, name: str) -> dict[str, Any]:
    """What to call an image processor with for images of another size than its own.

    Args:
        processor: of `transformers`, for images or for images and text.
        image_size: pixels per side; None for its own size.
        name: of the model, for the error.

    Raises:
        ConfigError: it does not make images of one size.
    """
    if image_size is None:
        return {}
    own = _own_size(processor)
    square = {"height": image_size, "width": image_size}
    if set(own) <= {"height", "width"}:
        return {"size": square}
    if set(own) == {"shortest_edge"}:
        crops = getattr(getattr(processor, "image_processor", processor), "do_center_crop", False)
        return {"size": {"shortest_edge": image_size}, **({"crop_size": square} if crops else {})}
    raise ConfigError(f"{name}: makes images of many sizes ({own}), so image_size={image_size} cannot be asked of it")


def image_sizes(model: Any, processor: Any) -> Sequence[int]:
    """Pixels per side that a model can be given, whole patches, its own last; none if it takes its own size alone."""
    config = getattr(model.config, "vision_config", model.config)
    patch, own = getattr(config, "patch_size", None), getattr(config, "image_size", None)
    resizes = _own_size(processor).keys() <= {"height", "width", "shortest_edge"}
    if not isinstance(patch, int) or not isinstance(own, int) or not resizes:
        return ()
    return range(patch, own + 1, patch)


def _own_size(processor: Any) -> dict[str, int]:
    return dict(getattr(getattr(processor, "image_processor", processor), "size", None) or {})


def _placed(value: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    return value.to(spec.device, spec.dtype) if value.is_floating_point() else value.to(spec.device)
