"""`safelight init`: a commented recipe to start from, one of those packaged here or every key with its default."""

import difflib
import json
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from components.config import DataSource, Recipe
from components.curation.sources import PICTURE_SUFFIXES
from components.errors import BadInput
from components.storage import atomic_write

FILE_NAME = "recipe.toml"
PLACEHOLDER = "my-style"
PICTURES = "pictures"  # the folder beside a recipe that its pictures are expected in
RECIPES = Path(__file__).parent / "recipes"
WIDTH = 30  # column at which the comments begin


def write_starter_recipe(folder: Path, *, name: str | None = None, force: bool = False) -> Path:
    """Write `recipe.toml` into `folder`, which becomes its own data source when pictures lie in it.

    `name` is a packaged recipe's. Raises BadInput when there is none of that name, or a recipe already, unless `force`.
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file, expected a folder")
    path = folder / FILE_NAME
    if path.exists() and not force:
        raise BadInput(f"{path}: is there already; edit it, or pass --force to overwrite it")
    source = "." if _holds_pictures(folder) else PICTURES
    text = starter_recipe(source=source) if name is None else packaged_recipe(name, source=source)
    with atomic_write(path) as file:
        file.write(text.encode())
    return path


def packaged_recipe(name: str, *, source: str) -> str:
    """The text of a recipe of flows/recipes with its own data source. Raises BadInput, naming those that there are."""
    known = {path.stem: path for path in RECIPES.glob("*.toml")}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise BadInput(
            f"--recipe {name}: no such packaged recipe; " + (f"did you mean {near[0]}? " if near else "")
            + f"there are {', '.join(sorted(known))}"
        )
    return known[name].read_text(encoding="utf-8").replace(f'path = "{PICTURES}"', f'path = "{source}"')


def starter_recipe(*, source: str) -> str:
    """A recipe in which every key stands with its default, commented out, and what it means."""
    lines = [
        "# A Safelight recipe. Lines that begin with # show the defaults: uncomment one to change it.",
        f'name = "{PLACEHOLDER}"'.ljust(WIDTH) + f"# {Recipe.model_fields['name'].description}",
        "",
        "[[data.sources]]",
        _line("path", DataSource.model_fields["path"], source),
    ]
    lines += [_comment(name, field) for name, field in DataSource.model_fields.items() if name != "path"]
    for section, field in Recipe.model_fields.items():
        model = field.annotation
        if section == "data" or not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        lines += ["", f"[{section}]", *(_comment(name, entry) for name, entry in model.model_fields.items())]
    return "\n".join(lines) + "\n"


def _comment(name: str, field: FieldInfo) -> str:
    return "# " + _line(name, field, field.default)


def _line(name: str, field: FieldInfo, value: Any) -> str:
    return f"{name} = {_toml(value)}".ljust(WIDTH) + f"  # {field.description}{_choices(field)}"


def _choices(field: FieldInfo) -> str:
    words = [value for value in _literals(field.annotation) if isinstance(value, str)]
    return f" One of: {', '.join(words)}." if len(words) > 1 else ""


def _literals(annotation: Any) -> tuple[Any, ...]:
    found: tuple[Any, ...] = ()
    for argument in get_args(annotation):
        found += (
            _literals(argument) if get_args(argument) else () if isinstance(argument, type | NoneType) else (argument,)
        )
    return found


def _toml(value: Any) -> str:
    if value is None:
        return "…"  # TOML knows no null: leaving the key out is the default
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(entry)}" for name, entry in value.items()) + " }" if value else "{}"
    return json.dumps(value, ensure_ascii=False)


def _holds_pictures(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.iterdir())
