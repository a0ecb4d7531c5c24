"""Tiny random vision-language models of several families, with their processors, made on the spot."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from placement import place
from tiny import make_tokenizer
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # distributions far enough from uniform for the losses to differ
}


class Family(NamedTuple):
    """How to make a model and its processor."""

    special_tokens: tuple[str, ...]
    image: str  # what the chat template writes for one
    processor: Callable[[Any, str], ProcessorMixin]  # from tokenizer and chat template
    model: Callable[[Any, dict[str, Any]], PreTrainedModel]  # from tokenizer and what text configurations share


def make_image(seed: int, size: tuple[int, int] = (20, 28)) -> Image.Image:
    """Noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def make_vlm(family: str, seed: int = 0, **text: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model in fp32, on the device of the tests, and its processor. `text` is of the language model."""
    made = FAMILIES[family]
    tokenizer = make_tokenizer()
    specials = [*tokenizer.special_tokens_map.get("additional_special_tokens", []), *made.special_tokens]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    processor = made.processor(tokenizer, chat_template(made.image))
    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = made.model(tokenizer, {**TEXT, **ids, "vocab_size": len(tokenizer), **text})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return place(model.float()), processor


def chat_template(image: str) -> str:
    """ChatML over parts."""
    return (
        "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}"
        "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
        "{%- for part in message['content'] %}"
        "{%- if part['type'] == 'image' %}{{- '" + image + "' }}{%- else %}{{- part['text'] }}{%- endif %}"
        "{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )


def _without_videos(processor: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A video processor takes torchvision."""

    class OfImages(processor):
        def check_argument_for_proper_class(self, argument_name, argument):
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    return OfImages


def _qwen_processor(processor: type[ProcessorMixin]) -> Callable[[Any, str], ProcessorMixin]:
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
    )

    def make(tokenizer: Any, template: str) -> ProcessorMixin:
        if not is_torchvision_available():
            return _without_videos(processor)(images, tokenizer, None, chat_template=template)
        videos = Qwen2VLVideoProcessor if processor is Qwen2_5_VLProcessor else Qwen3VLVideoProcessor
        given = videos(patch_size=4, merge_size=2, temporal_patch_size=2)
        return processor(images, tokenizer, given, chat_template=template)

    return make


def _ids(tokenizer: Any, **names: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
QWEN_VISION |= {"patch_size": 4, "spatial_merge_size": 2}


def _of_qwen(text: dict[str, Any]) -> dict[str, Any]:
    sections = [text["head_dim"] // 16 * share for share in (2, 3, 3)]
    return {**text, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}}


def _qwen2_5_vl(tokenizer: Any, text: dict[str, Any]) -> PreTrainedModel:
    own = {"out_hidden_size": text["hidden_size"], "window_size": 16, "fullatt_block_indexes": [1]}
    vision = {**QWEN_VISION, **own}
    config = Qwen2_5_VLConfig(text_config=_of_qwen(text), vision_config=vision, **_ids(tokenizer, **QWEN_TOKENS))
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(tokenizer: Any, text: dict[str, Any]) -> PreTrainedModel:
    vision = {**QWEN_VISION, "out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": [0]}
    vision["num_position_embeddings"] = 64
    text = _of_qwen(text)
    text["rope_parameters"]["mrope_interleaved"] = True  # for vLLM: transformers takes it for granted
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_ids(tokenizer, **QWEN_TOKENS))
    return Qwen3VLForConditionalGeneration(config)


def _gemma3_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    for name, token in (("boi", "<start_of_image>"), ("eoi", "<end_of_image>"), ("image", "<image_soft_token>")):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)


def _gemma3(tokenizer: Any, text: dict[str, Any]) -> PreTrainedModel:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = _ids(
        tokenizer, boi_token_id="<start_of_image>", eoi_token_id="<end_of_image>", image_token_id="<image_soft_token>"
    )
    config = Gemma3Config(
        text_config={**text, "query_pre_attn_scalar": 16, "sliding_window": 2048},
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        **tokens,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero by default
    return model


def _llava_next_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )


def _llava_next(tokenizer: Any, text: dict[str, Any]) -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config={"model_type": "mistral", **text},
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        vision_feature_layer=-2,
        **_ids(tokenizer, image_token_id="<image>"),
    )
    return LlavaNextForConditionalGeneration(config)


def _idefics3_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


def _idefics3(config_class: type, model_class: type) -> Callable[[Any, dict[str, Any]], PreTrainedModel]:
    def make(tokenizer: Any, text: dict[str, Any]) -> PreTrainedModel:
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = config_class(
            text_config={"model_type": "llama", **text},
            vision_config={**vision, "image_size": 16, "patch_size": 4},
            scale_factor=2,
            **_ids(tokenizer, image_token_id="<image>"),
        )
        return model_class(config)

    return make


QWEN = tuple(QWEN_TOKENS.values())
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
IDEFICS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *TILES)

FAMILIES = {
    "qwen2_5_vl": Family(QWEN, QWEN_IMAGE, _qwen_processor(Qwen2_5_VLProcessor), _qwen2_5_vl),
    "qwen3_vl": Family(QWEN, QWEN_IMAGE, _qwen_processor(Qwen3VLProcessor), _qwen3_vl),
    "gemma3": Family(
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>"), "<start_of_image>", _gemma3_processor, _gemma3
    ),
    "llava_next": Family(("<image>",), "<image>", _llava_next_processor, _llava_next),
    "idefics3": Family(
        IDEFICS, "<image>", _idefics3_processor, _idefics3(Idefics3Config, Idefics3ForConditionalGeneration)
    ),
    "smolvlm": Family(
        IDEFICS, "<image>", _idefics3_processor, _idefics3(SmolVLMConfig, SmolVLMForConditionalGeneration)
    ),
}
