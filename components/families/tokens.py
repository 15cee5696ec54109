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
    count: Callable[[Sequence[str]], list[int]]


def caption_readers(base: BaseModel) -> list[CaptionReader]:
    """The base's tokenizers, each with the limit that training uses."""
    folders = sorted(path for path in base.path.glob("tokenizer*") if path.is_dir())
    return [CaptionReader(folder.name, _limit(base, folder), _counter(folder)) for folder in folders]


def _limit(base: BaseModel, folder: Path) -> int | None:
    """A T5's is what its family asks for, since its tokenizer has none that matters."""
    config = read_config(base.path, folder.name, "tokenizer_config.json")
    if str(config.get("tokenizer_class", "")).startswith("T5"):
        asked = base.architecture.prompt_settings(base.path).get("max_sequence_length")
        if asked is not None:
            return asked
    stated = config.get("model_max_length")
    return int(stated) if isinstance(stated, int | float) and stated < UNLIMITED else None


def _counter(folder: Path) -> Callable[[Sequence[str]], list[int]]:
    """By the tokenizer's file where there is one; else as transformers makes it of the parts, which takes a second."""
    file = folder / "tokenizer.json"
    if file.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return lambda texts: [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
    from transformers import AutoTokenizer

    parts: Any = AutoTokenizer.from_pretrained(folder)
    return lambda texts: [len(ids) for ids in parts(list(texts), truncation=False)["input_ids"]] if texts else []
