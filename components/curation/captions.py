"""Captions: read from text, caption and JSON files or table cells, as UTF-8 or not at all, and brought to one form."""

import json
import re
from collections.abc import Iterator
from typing import Literal

from components.errors import BadInput

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
JSON_KEYS = ("caption", "text")  # of a caption file in JSON, the first that is there
CaptionLines = Literal["first", "whole", "variants"]

BYTE_ORDER_MARK = "\ufeff"


class CaptionProblem(BadInput):
    """A picture's caption cannot be used; the picture is rejected with this message as the reason."""


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 text without a byte order mark. Raises CaptionProblem naming the file and the offending byte's offset."""
    try:
        return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise CaptionProblem(
            f"{name}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; save the file as UTF-8"
        ) from None


def normalise(text: str, name: str) -> str:
    """One line: byte order marks and NULs gone, runs of white space made one space. Raises CaptionProblem if empty."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CaptionProblem(f"{name}: character {error.start} of the caption is half of a surrogate pair; "
                             "write the whole character") from None
    line = " ".join(text.replace(BYTE_ORDER_MARK, "").replace("\0", "").split())
    if not line:
        raise CaptionProblem(f"{name}: the caption is empty; write one")
    return line


def caption_in(data: bytes, name: str, lines: CaptionLines = "first") -> str:
    """The caption in a `.txt`, `.caption` or `.json` file's bytes: its first line with words, or with "whole" all.

    `name` is the file's, also for messages. Raises CaptionProblem.
    """
    text = _text_in(data, name)
    return normalise(text if lines == "whole" else next(_worded_lines(text), ""), name)


def variants_in(data: bytes, name: str) -> tuple[str, ...]:
    """The captions in a file's bytes besides its first, one to a line. Raises CaptionProblem."""
    return tuple(normalise(line, name) for line in _worded_lines(_text_in(data, name)))[1:]


def _text_in(data: bytes, name: str) -> str:
    text = decode_text(data, name)
    return _json_caption(text, name) if name.lower().endswith(".json") else text


def _worded_lines(text: str) -> Iterator[str]:
    yield from (line for line in text.splitlines() if line.strip(f"{BYTE_ORDER_MARK} \t\0"))


def caption_cells(value: object, name: str) -> tuple[str, ...]:
    """The captions in a table's cell, one or a list. Raises CaptionProblem where one is empty or no text."""
    return tuple(_cell(one, name) for one in (value if isinstance(value, list) and value else [value]))


def _cell(value: object, name: str) -> str:
    if value is None:
        raise CaptionProblem(f"{name}: the caption is empty; write one")
    if not isinstance(value, str):
        raise CaptionProblem(f"{name}: the caption is {type(value).__name__}, expected text; write it as a string")
    return normalise(value, name)


def name_as_caption(stem: str, name: str) -> str:
    """A file name's words: `red_fox-02 (3)` says "red fox". Raises CaptionProblem when it has none."""
    words = re.sub(r"[_\s]+", " ", stem).strip()
    return normalise(re.sub(r"(?:[ -]*(?:\(\d+\)|(?<=[ -])\d+))+$", "", words) or words, name)


def _json_caption(text: str, name: str) -> str:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise CaptionProblem(f"{name}: not valid JSON; expected {{\"caption\": \"…\"}}") from None
    found = next((body[key] for key in JSON_KEYS if key in body), None) if isinstance(body, dict) else body
    if not isinstance(found, str):
        raise CaptionProblem(f"{name}: no text under {' or '.join(JSON_KEYS)!s}; expected {{\"caption\": \"…\"}}")
    return found
