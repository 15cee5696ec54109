"""Captions of the embedded base's training pictures, and the tokenizer trained on them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from components.training.pictures import Picture

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
EMPTY_PROMPT = ""  # what classifier-free guidance compares with


def caption(picture: Picture, wording: float, styling: float) -> str:
    """One of the captions of a picture, chosen by two numbers in [0, 1): the subject's wording, and with style or not.

    The name most often; else name and synonym, a synonym alone, or the drawing's colour before the name.
    """
    subject = picture.name
    if wording < 0.15 and picture.color and picture.color not in picture.name.split():
        subject = f"{picture.color} {picture.name}"
    elif wording < 0.35 and picture.synonyms:
        synonym = picture.synonyms[int((wording / 0.35 * 97) % len(picture.synonyms))]
        subject = synonym if wording < 0.22 else f"{picture.name} {synonym}"
    return subject if styling < 0.12 else f"{subject}, {picture.style} style"


def all_captions(pictures: Sequence[Picture]) -> Iterator[str]:
    """Every word the captions use, each picture's name counting more than its synonyms."""
    for picture in pictures:
        yield from [f"{picture.name}, {picture.style} style"] * 3
        yield from (f"{picture.name} {synonym}" for synonym in picture.synonyms)
        if picture.color:
            yield f"{picture.color} {picture.name}"


def train_tokenizer(corpus: Iterator[str], folder: Path, *, vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Train byte-level BPE in CLIP's format (lower case, end-of-word marks) and save it as `folder`.

    All 256 bytes are in the vocabulary, with and without end-of-word mark, so no prompt word is invisible.
    `vocab_size` leaves out the 256 end-of-word bytes.
    """
    template = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[])
    trained = template.train_new_from_iterator(corpus, vocab_size)
    merges = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    letters = sorted(ByteLevel.alphabet())
    tokens = [BOS, EOS, *letters, *(letter + END_OF_WORD for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    return CLIPTokenizer.from_pretrained(folder)
