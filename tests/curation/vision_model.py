"""A tiny vision model, built on the spot for `transformers serve`.

LLaVA's architecture with random weights and a tokenizer of 95 characters: its captions are nonsense, but each
picture's own.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE = "<image>"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def build(folder: Path) -> None:
    """Write model and processor."""
    letters = ["<unk>", "<s>", "</s>", IMAGE, *map(chr, range(32, 127))]
    characters = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>")
    )
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    characters.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=[IMAGE],
    )
    side = {"height": 32, "width": 32}
    pictures = CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False)
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=16),
            text_config=LlamaConfig(**sizes, vocab_size=len(letters), max_position_embeddings=1024),
            image_token_index=3,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # wide enough for captions that differ from picture to picture
        model.get_output_embeddings().weight[:4] = 0.0
    model.generation_config.update(pad_token_id=0, eos_token_id=2)
    model.save_pretrained(folder)
