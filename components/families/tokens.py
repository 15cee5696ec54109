"""How long captions are for a base's tokenizers, without torch: more than a text encoder reads is cut off unseen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.families.bases import BaseModel
from components.families.family import read_config

UNLIMITED = 1_000_000  # tokenizers without a limit of their own state a larger one


@dataclass(frozen=True, slots=True)
class CaptionReader:
    """One of a base's tokenizers: how many tokens it takes, start and end included, and how many a caption has."""

    name: str  # its folder in the base
    limit: int | None  # None: as many as there are
    encode: "Encode"

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, start and end included."""
        return [len(marks) for marks in self.encode(texts)]

    def lost(self, text: str) -> str:
        """What of a text lies beyond the limit, as it is written there."""
        (marks,) = self.encode([text])
        words = [mark for mark in marks if mark is not None]
        room = (self.limit or UNLIMITED) - (len(marks) - len(words))
        return text[words[room] :] if len(words) > room else ""


Encode = Callable[[Sequence[str]], list[list[int | None]]]  # of each token where it begins; None: it is no text's


def caption_readers(base: BaseModel) -> list[CaptionReader]:
    """The base's tokenizers, each with the limit that training uses."""
    folders = sorted(path for path in base.path.glob("tokenizer*") if path.is_dir())
    return [CaptionReader(folder.name, _limit(base, folder), _encoder(folder)) for folder in folders]


def need_transformers(base: BaseModel) -> bool:
    """Whether a tokenizer lies there in parts, which only transformers puts together, and it loads torch."""
    return any(not (path / "tokenizer.json").exists() for path in base.path.glob("tokenizer*") if path.is_dir())


def _limit(base: BaseModel, folder: Path) -> int | None:
    """A T5's is what its family asks for, since its tokenizer has none that matters."""
    config = read_config(base.path, folder.name, "tokenizer_config.json")
    if str(config.get("tokenizer_class", "")).startswith("T5"):
        asked = base.architecture.prompt_settings(base.path).get("max_sequence_length")
        if asked is not None:
            return asked
    stated = config.get("model_max_length")
    return int(stated) if isinstance(stated, int | float) and stated < UNLIMITED else None


def _encoder(folder: Path) -> Encode:
    """By the tokenizer's file where there is one; else as transformers makes it of the parts, which takes a second."""
    file = folder / "tokenizer.json"
    if file.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return lambda texts: [
            _marks(one.offsets, one.special_tokens_mask) for one in tokenizer.encode_batch(list(texts))
        ]
    from transformers import AutoTokenizer

    parts: Any = AutoTokenizer.from_pretrained(folder)

    def encode(texts: Sequence[str]) -> list[list[int | None]]:
        if not texts:
            return []
        if not parts.is_fast:  # counts, but does not say where a token begins
            return [[None] * len(ids) for ids in parts(list(texts), truncation=False)["input_ids"]]
        found = parts(list(texts), truncation=False, return_offsets_mapping=True, return_special_tokens_mask=True)
        return list(map(_marks, found["offset_mapping"], found["special_tokens_mask"]))

    return encode


def _marks(offsets: Sequence[tuple[int, int]], special: Sequence[int]) -> list[int | None]:
    return [None if added else begin for (begin, _), added in zip(offsets, special, strict=True)]
