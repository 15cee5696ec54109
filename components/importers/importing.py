"""From another trainer's configuration to a recipe. A new trainer is one new file and one line in TRAINERS.

Nothing is run and nothing outside of the file and those it names is read. A key that the other trainer does not know
is reported, not taken over: it never did anything.
"""

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config import Recipe, load_recipe
from components.errors import BadInput
from components.importers import ai_toolkit, kohya, one_trainer
from components.importers.settings import Imported, Line
from components.storage import atomic_write

MAX_BYTES = 4 << 20
MAX_VALUES = 100_000  # of a document, each as often as aliases repeat it


@dataclass(frozen=True, slots=True)
class Trainer:
    name: str
    recognises: Callable[[Any, str], bool]  # from the document and the file's ending
    translate: Callable[[Any, Path], Imported]


TRAINERS: tuple[Trainer, ...] = (
    Trainer("kohya", kohya.recognises, kohya.translate),
    Trainer("ai-toolkit", ai_toolkit.recognises, ai_toolkit.translate),
    Trainer("OneTrainer", one_trainer.recognises, one_trainer.translate),
)


@dataclass(frozen=True, slots=True)
class Import:
    """A recipe that was written, and what became of every key."""

    trainer: str
    path: Path
    recipe: Recipe
    lines: tuple[Line, ...]


def import_config(path: Path, *, out: Path | None = None, force: bool = False) -> Import:
    """Write the recipe that a configuration stands for, beside it or to `out`, and check it as every recipe is.

    Raises BadInput, one line, for a file of no known trainer, a training that is none of an adapter, and a recipe that
    is there already, unless `force`.
    """
    body = _document(path)
    trainer = next((one for one in TRAINERS if one.recognises(body, path.suffix.lower())), None)
    if trainer is None:
        raise BadInput(f"{path}: no configuration of {', '.join(one.name for one in TRAINERS)}; expected kohya's TOML,"
                       " ai-toolkit's YAML or OneTrainer's JSON")
    try:
        imported = trainer.translate(body, path)
        document = imported.document()
    except BadInput as problem:
        raise BadInput(f"{path}: {problem}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadInput(f"{path}: a value is not what {trainer.name} expects there ({error}); correct it") from None
    target = out or path.with_name(f"{path.stem}-recipe.toml")
    if target.exists() and not force:
        raise BadInput(f"{target}: is there already; pass --force to overwrite it, or --out for another name")
    text = as_toml(document, f"Imported from {path.name}, a configuration of {trainer.name}.")
    with atomic_write(target) as file:
        file.write(text.encode())
    try:
        recipe = load_recipe(target)
    except BadInput:
        target.unlink()
        raise
    notes = [_note_on(source, target.parent) for source in imported.sources if "revision" not in source]
    return Import(trainer.name, target, recipe, (*imported.lines, *(note for note in notes if note)))


def as_toml(document: Mapping[str, Any], comment: str) -> str:
    """A recipe's document as TOML."""
    lines = [f"# {comment}", f"name = {_value(document['name'])}"]
    for source in document["data"]["sources"]:
        lines += ["", "[[data.sources]]", *(f"{key} = {_value(value)}" for key, value in source.items())]
    for section in ("curation", "base", "training"):
        if section in document:
            lines += ["", f"[{section}]", *(f"{key} = {_value(value)}" for key, value in document[section].items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """A scalar in TOML; JSON's strings are TOML's, but for the one character that TOML wants escaped as well."""
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return f"{value:.1f}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _note_on(source: Mapping[str, Any], folder: Path) -> Line | None:
    place = (folder / str(source["path"])).expanduser()
    return None if place.exists() else Line("data.sources", "note", f"{place} is not there; correct the path")


def _unfolded(body: Any, path: Path) -> Any:
    """The document, unless its aliases make it much larger than the file. Raises BadInput."""
    pending, seen = [body], 0
    while pending:
        seen += 1
        if seen > MAX_VALUES:
            raise BadInput(f"{path}: holds more than {MAX_VALUES:,} values, so it is no configuration; pass another")
        value = pending.pop()
        pending += list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return body


def _document(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"{path}: has more than {MAX_BYTES:,} bytes, so it is no configuration; pass another file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not UTF-8; pass a TOML, YAML or JSON file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}; pass a TOML, YAML or JSON file") from None
    import yaml

    try:
        match path.suffix.lower():
            case ".toml":
                return tomllib.loads(text)
            case ".json":
                return json.loads(text)
            case ".yaml" | ".yml":
                return _unfolded(yaml.safe_load(text), path)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise BadInput(f"{path}: cannot be read: {said}; correct that place") from None
    raise BadInput(f"{path}: expected a file that ends in .toml, .yaml, .yml or .json")
