"""Finding a base model and saying exactly which weights it is, without importing torch."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config import BaseModelConfig
from components.errors import BaseModelError
from components.families import EXCLUDED, FAMILIES
from components.families.family import Family, has_part
from components.families.hub import commit_of, digest_of, fetch_pipeline, read_json
from components.stages import canonical_json

EMBEDDED = Path(__file__).parents[1] / "base" / "embedded"
HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
IGNORED = (".md", ".png", ".jpg", ".gitattributes", ".part")
WEIGHTS = "*.safetensors"
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # whose classes an index may name
NEEDED = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}  # by how a part's name begins
NEEDED_OF_A_MODEL = ("config.json", WEIGHTS)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base on disk: its family, its folder and a digest for each of its parts."""

    name: str  # as the recipe names it
    revision: str | None  # the commit of a hub model
    family: str  # key of FAMILIES
    path: Path
    digests: dict[str, str]  # part -> sha256 over its files' names and bytes
    vae_precision: str = "fp32"  # of encoding, as the recipe says

    @property
    def architecture(self) -> Family:
        return FAMILIES[self.family]

    @property
    def digest(self) -> str:
        """One sha256 for the whole base."""
        return hashlib.sha256(canonical_json(self.digests)).hexdigest()

    def digest_of(self, parts: tuple[str, ...]) -> str:
        present = {part: self.digests[part] for part in parts if part in self.digests}
        return hashlib.sha256(canonical_json(present)).hexdigest()


def resolve_base(config: BaseModelConfig) -> BaseModel:
    """The base that a recipe names: the embedded one, a folder in diffusers layout, or a hub id in the local cache.

    Raises BaseModelError, one line, when it is none of these or a part is missing.
    """
    path, name = find_base(config)
    parts = _parts(FAMILIES[name], _read_index(path))
    digests = {part: _digest_of_folder(path / part) for part in parts}
    return BaseModel(config.model, commit_of(path) or config.revision, name, path, digests, config.vae_precision)


def find_base(config: BaseModelConfig) -> tuple[Path, str]:
    """The folder and the family of the base that a recipe names, checked but not hashed. Raises BaseModelError."""
    path = _locate(config)
    index = _read_index(path)
    name = index["_class_name"]
    family = FAMILIES.get(name)
    if reason := EXCLUDED.get(name) or (family and family.refusal(index)):
        raise BaseModelError(f"{path}: {reason}")
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise BaseModelError(f"{path}: is a {name!r}, expected one of {known}; choose another base")
    own = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] not in (None, *LIBRARIES)]
    if own:
        raise BaseModelError(
            f"{path}: brings code of its own for {', '.join(own)}, which is never run; use a base of stock classes"
        )
    parts = _parts(family, index)
    missing = [part for part in parts if not (path / part).is_dir()]
    if missing:
        raise BaseModelError(f"{path}: lacks {', '.join(missing)}/; fetch the whole pipeline again")
    if fault := next((fault for part in parts for fault in _faults(path / part)), None):
        raise BaseModelError(f"{fault}; fetch the whole pipeline again")
    return path, name


def _parts(family: Family, index: Mapping[str, Any]) -> tuple[str, ...]:
    """The family's parts without those that this base says it goes without, as `[null, null]`."""
    return family.parts + tuple(part for part in family.optional_parts if has_part(index, part))


def _locate(config: BaseModelConfig) -> Path:
    if config.model == "embedded":
        return EMBEDDED
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or config.model.startswith((".", "~")) or not HUB_ID.match(config.model):
        raise BaseModelError(
            f"base model {config.model!r}: no such folder and no hub id (owner/name); "
            'use "embedded", a folder in diffusers layout, or a hub id'
        )
    return fetch_pipeline(config.model, config.revision)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = read_json(path / "model_index.json")
    except FileNotFoundError:
        raise BaseModelError(
            f"{path}: no model_index.json, so it is no diffusers pipeline; give the folder that `save_pretrained` wrote"
        ) from None
    if not isinstance(index.get("_class_name"), str):
        raise BaseModelError(f"{path / 'model_index.json'}: names no pipeline class; fetch the pipeline again")
    return index


def _faults(part: Path) -> Iterator[str]:
    """What is missing or cut short in a part's folder, from names, sizes and headers; no weight is read."""
    alone = [pattern for name, pattern in NEEDED.items() if part.name.startswith(name)]
    for pattern in alone or NEEDED_OF_A_MODEL:
        if not any(part.glob(pattern)):
            yield f"{part}: holds no {pattern}"
    for file in sorted(part.glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            yield f"{file}: not valid JSON: {error}"
    for file in sorted(part.glob(WEIGHTS)):
        if fault := safetensors_fault(file):
            yield f"{file}: damaged, {fault}"


def safetensors_fault(path: Path) -> str:
    """What is wrong with a safetensors file by its header and size, or ''. No tensor is read."""
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= total - 8:
            return f"its header says {length} bytes, the file has {total}"
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return "its header is not readable"
    return "" if 8 + length + end == total else f"it has {total} bytes, its header promises {8 + length + end}"


def _digest_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in IGNORED):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{digest_of(file)}\n".encode())
    return digest.hexdigest()
