"""Captions counted as the base's own tokenizers count them."""

from pathlib import Path
from typing import Any

import pytest

from components.config import BaseModelConfig
from components.families.bases import BaseModel, resolve_base
from components.families.tokens import caption_readers

TEXTS = ["", "a fox", "red rocket, app icon style " * 9, "naïve 日本 🚀"]


def counted_by_transformers(folder: Path, texts: list[str]) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return [len(tokenizer(text, truncation=False)["input_ids"]) for text in texts]


def test_the_embedded_bases_captions_are_counted_as_transformers_counts_them():
    base = resolve_base(BaseModelConfig())
    (reader,) = caption_readers(base)
    assert (reader.name, reader.limit) == ("tokenizer", 24)
    assert reader.count(TEXTS) == counted_by_transformers(base.path / "tokenizer", TEXTS)
    assert reader.count(TEXTS)[2] > 24 and reader.count([]) == []


@pytest.fixture
def parts_only(tmp_path: Path) -> BaseModel:
    """A base whose tokenizer is vocabulary and merges, as Stable Diffusion 1.5 has it, with no tokenizer.json."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz, "
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(str({word: i for i, word in enumerate(words)}).replace("'", '"'))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}')
    return BaseModel("parts", None, "StableDiffusionPipeline", tmp_path, {})


def test_a_tokenizer_in_parts_is_read_too(parts_only: BaseModel):
    (reader,) = caption_readers(parts_only)
    assert reader.limit == 77
    assert reader.count(["a fox", "fox"]) == [6, 5]  # start, one token a letter, end


def test_a_t5_takes_what_its_family_asks_for_and_a_limit_beyond_reason_is_none(parts_only: BaseModel, monkeypatch):
    config = parts_only.path / "tokenizer" / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "T5TokenizerFast", "model_max_length": 9999}')
    monkeypatch.setattr(
        type(parts_only.architecture), "prompt_settings", lambda self, base: {"max_sequence_length": 256}
    )
    assert [reader.limit for reader in caption_readers(parts_only)] == [256]
    config.write_text('{"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 1000000000000000019884624838656}')
    assert [reader.limit for reader in caption_readers(parts_only)] == [None]
