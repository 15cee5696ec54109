"""Captions: read from text, caption and JSON files or table cells, as UTF-8 or not at all, and brought to one form.

Also the form that a model's prose and tags are brought to, where a recipe lets them fill in.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from components.config import CaptionsConfig
from components.errors import BadInput

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
JSON_KEYS = ("caption", "text")  # of a caption file in JSON, the first that is there
CaptionLines = Literal["first", "whole", "variants"]

DEFAULT_TEMPLATES = {"prose": "{prose}", "tags": "{tags}", "both": "{prose}, {tags}"}  # by policy
PICTURE = r"(?:image|picture|photo|photograph)"
OPENING = re.compile(  # what captioners begin with that says nothing of the picture; "a drawing of" does
    rf"(?:in (?:the|this) {PICTURE},? (?:(?:we|you) (?:can )?see |there (?:is|are) )?"
    rf"|(?:this is |there is |here is )?(?:an?|the|this) {PICTURE}"
    r" (?:(?:of|shows|showing|depicts|depicting|features|featuring|displays|captures|presents|portrays) )"
    r"|(?:this|it) (?:shows|depicts|features) |there (?:is|are) )(?=\S)", re.IGNORECASE)

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


# of models ----------------------------------------------------------------------------------------------------------


def composed(prose: str, tags: Sequence[tuple[str, float, str]], config: CaptionsConfig,
             places: Mapping[str, str]) -> str:
    """The caption that the recipe's template makes of a model's prose and tags; "" where they say nothing.

    `places` fills the template's other places.
    """
    said = without_words(strip_opening(prose) if config.strip_openings else prose, config.exclude)
    named = ", ".join(chosen_tags(tags, config))
    template = config.template or DEFAULT_TEMPLATES[config.policy]
    if not (said and "{prose}" in template) and not (named and "{tags}" in template):
        return ""
    if template != DEFAULT_TEMPLATES["prose"]:
        said = said.removesuffix(".")
    return _tidy(f"{config.prefix} {filled(template, {'prose': said, 'tags': named} | dict(places))}")


def filled(template: str, places: Mapping[str, str]) -> str:
    """A recipe's template with what stands in its {places}, whatever braces that holds."""
    return re.sub(r"\{(\w+)\}", lambda place: places[place[1]], template)


def chosen_tags(tags: Sequence[tuple[str, float, str]], config: CaptionsConfig) -> list[str]:
    """Those that reach their category's threshold and are not excluded, each once, the likeliest first."""
    excluded = {word.casefold() for word in config.exclude}
    likeliest = sorted(tags, key=lambda tag: -tag[1])
    chosen = dict.fromkeys(
        tag for tag, score, category in likeliest
        if score >= config.tag_thresholds.get(category, 2.0) and tag.casefold() not in excluded)
    return list(chosen)[: config.max_tags]


def strip_opening(text: str) -> str:
    """Prose without "an image of" and its like; what follows keeps its case."""
    return OPENING.sub("", text, count=1) if OPENING.match(text) else text


def without_words(text: str, words: Sequence[str]) -> str:
    """Prose without these words or phrases, whatever the case of their letters."""
    for word in words:
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "", text, flags=re.IGNORECASE)
    return _tidy(text)


def _tidy(text: str) -> str:
    """One space between words, none before a comma, no comma that separates nothing."""
    text = re.sub(r"\s+([,.])", r"\1", " ".join(text.split()))
    return re.sub(r",(?:\s*,)+", ",", text).strip(", ")
