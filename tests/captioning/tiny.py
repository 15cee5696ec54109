"""Tiny captioners of the real classes with random weights, saved as the hub has them."""

import csv
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = (
    *("a", "an", "the", "of", "on", "in", "red", "blue", "green", "dark", "bright", "square", "round"),
    *("fox", "cat", "ball", "box", "sky", "sea", "tree", "photo", "picture"),
)
SIDE = 32  # pixels
CHAT = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tiny_blip(folder: Path, seed: int = 0) -> Path:
    """A BLIP of 32 px pictures."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]")
    text = {"vocab_size": len(vocabulary), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "projection_dim": 16,
            "bos_token_id": 5, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": SIDE, "patch_size": 8, "projection_dim": 16, "initializer_range": 0.02}  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    _outspoken(BlipForConditionalGeneration(config)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer).save_pretrained(folder)
    return folder


def tiny_florence(folder: Path, seed: int = 0) -> Path:
    """A Florence-2 of 32 px pictures."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer("<s>", "<pad>", "</s>", "<unk>", "<image>")
    text = {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 16, "encoder_layers": 1,
            "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32, "max_position_embeddings": 128, "bos_token_id": 0, "pad_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 2, "forced_bos_token_id": 0,
            "forced_eos_token_id": 2}  # fmt: skip
    vision = {"depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1),
              "patch_prenorm": (False, True), "embed_dim": (16, 16), "num_heads": (2, 2), "num_groups": (2, 2),
              "window_size": 4, "projection_dim": 16, "max_position_embeddings": 16}  # fmt: skip
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=4)
    model = _outspoken(Florence2ForConditionalGeneration(config))
    model.generation_config.forced_bos_token_id = 0
    model.save_pretrained(folder)
    images: Any = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    images.image_seq_length = 17  # 4 x 4 places and their mean
    parsing = {"pure_text": {}}
    Florence2Processor(images, tokenizer, post_processor_config=parsing).save_pretrained(folder)
    return folder


def tiny_llava(folder: Path, seed: int = 0, *, chat_template: str | None = CHAT) -> Path:
    """A LLaVA of 32 px pictures."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer("<s>", "<pad>", "</s>", "<unk>", "<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, patch_size=8,
                                       num_attention_heads=2, image_size=SIDE, projection_dim=16),
        text_config=LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, pad_token_id=1,
                                eos_token_id=2),
        image_token_index=4,
    )  # fmt: skip
    _outspoken(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(folder)
    return folder


def tiny_tagger(folder: Path, tags: list[tuple[str, int]], batch: int | str = "batch") -> Path:
    """A WD tagger whose score of tag i is the mean of channel i (blue, green, red) over 255, from the fourth on 0.5."""
    folder.mkdir(parents=True)
    weights = torch.zeros(3, len(tags))
    for channel in range(min(3, len(tags))):
        weights[channel, channel] = 1 / 255
    offset = torch.tensor([0.0] * 3 + [0.5] * max(0, len(tags) - 3))[: len(tags)]
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["products"]),
        helper.make_node("Add", ["products", "offset"], ["output"]),
    ]
    constants = {"axes": torch.tensor([1, 2]), "weights": weights, "offset": offset}
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, len(tags)])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(folder / "model.onnx"))
    with (folder / "selected_tags.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("tag_id", "name", "category", "count"))
        writer.writerows((number, name, category, 1) for number, (name, category) in enumerate(tags))
    return folder


def _outspoken(model: Any) -> Any:
    """With larger weights, or a random model says one word whatever it sees."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(part in name.lower() for part in ("norm", "position", "class", "shared", "embed_tokens")):
                seeing = any(part in name for part in ("vision", "cross", "projector", "encoder_attn"))
                parameter.mul_(20 if seeing else 6)
    return model


def _tokenizer(*special: str) -> PreTrainedTokenizerFast:
    words = [*special, *WORDS, ":", "user", "assistant", ".", "describe", "what", "does", "image", "with", "paragraph"]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    named = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=256,
        **named,
    )
