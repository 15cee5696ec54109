"""Learned tokens inside a pipeline's own folder: for programs that open folders and know no files of embeddings."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from components.errors import BadInput
from components.layouts.names import ARCHITECTURES
from components.layouts.tokens import Token
from components.storage import atomic_write
from components.tensors import to_safetensors

INDEX = "model_index.json"
VOCABULARY = "embeddings.token_embedding.weight"  # how the name of CLIP's matrix ends, whatever is around it


def teach(folder: Path, tokens: Sequence[Token]) -> None:
    """Give a pipeline's tokenizers and text encoders the tokens, with the ids that `load_textual_inversion` gives them.

    Weights keep their names and their precision. Raises BadInput for a token that the vocabulary has.
    """
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for part in sorted({part for token in tokens for part in token.vectors}):
        held = [(token.name, token.vectors[part]) for token in tokens if part in token.vectors]
        words = [word for name, rows in held for word in (name, *(f"{name}_{i}" for i in range(1, len(rows))))]
        place = folder / part.replace("text_encoder", "tokenizer")
        tokenizer: Any = getattr(transformers, index[place.name][1]).from_pretrained(place)
        first = len(tokenizer)
        tokenizer.add_tokens(words)
        if len(tokenizer) != first + len(words):
            raise BadInput(f"{place}: has one of {', '.join(words)} already; choose another name for the token")
        tokenizer.save_pretrained(place)
        for file in sorted((folder / part).glob("*.safetensors")):
            _lengthen(file, first, torch.cat([rows for _, rows in held]))
        config = folder / part / "config.json"
        body = json.loads(config.read_text(encoding="utf-8")) | {"vocab_size": len(tokenizer)}
        with atomic_write(config) as stream:
            stream.write((json.dumps(body, indent=2, sort_keys=True) + "\n").encode())


def _lengthen(file: Path, first: int, rows: Tensor) -> None:
    with safe_open(file, "pt") as stored:
        metadata, keys = stored.metadata(), sorted(stored.keys())
        if not any(key.endswith(VOCABULARY) for key in keys):
            return
        tensors = {key: stored.get_tensor(key) for key in keys}
    for key in (key for key in keys if key.endswith(VOCABULARY)):
        tensors[key] = torch.cat([tensors[key][:first], rows.to(tensors[key])])
    with atomic_write(file) as stream:
        stream.write(to_safetensors(tensors, metadata))


def base_with_tokens(base: Path, pipeline: str, tokens: Sequence[Token], folder: Path) -> Path:
    """A pipeline folder like the base whose vocabulary has the tokens; what they do not change is linked to the base.

    A folder that is there already is taken as it is: its name has to say which tokens it has.
    """
    if folder.exists():
        return folder
    parts = ARCHITECTURES[pipeline].encoders
    changed = {name for part in parts for name in (part, part.replace("text_encoder", "tokenizer"))}
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for entry in sorted(base.iterdir()):
        if entry.name == INDEX:
            shutil.copy(entry, partial)
        elif entry.is_dir() and entry.name in changed:
            shutil.copytree(entry, partial / entry.name)
        elif entry.is_dir():
            (partial / entry.name).symlink_to(entry.resolve())
    teach(partial, tokens)
    partial.rename(folder)
    return folder
