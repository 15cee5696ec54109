"""Finding a base model and saying exactly which weights it is, without importing torch."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config import BaseModelConfig
from components.errors import BaseModelError
from components.families import FAMILIES
from components.families.family import Family
from components.stages import canonical_json
from components.storage import sha256_of

EMBEDDED = Path(__file__).parents[1] / "base" / "embedded"
HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
IGNORED = (".md", ".png", ".jpg", ".gitattributes", ".part")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base on disk: its family, its folder and a digest for each of its parts."""

    name: str  # as the recipe names it
    revision: str | None
    family: str  # key of FAMILIES
    path: Path
    digests: dict[str, str]  # part -> sha256 over its files' names and bytes

    @property
    def architecture(self) -> Family:
        return FAMILIES[self.family]

    @property
    def digest(self) -> str:
        """One sha256 for the whole base."""
        return hashlib.sha256(canonical_json(self.digests)).hexdigest()

    def digest_of(self, parts: tuple[str, ...]) -> str:
        return hashlib.sha256(canonical_json({part: self.digests[part] for part in parts})).hexdigest()


def resolve_base(config: BaseModelConfig) -> BaseModel:
    """The base that a recipe names: the embedded one, a folder in diffusers layout, or a hub id in the local cache.

    Raises BaseModelError, one line, when it is none of these or a part is missing.
    """
    path = _locate(config)
    index = _read_index(path)
    family = FAMILIES.get(index.get("_class_name", ""))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise BaseModelError(f"{path}: is a {index.get('_class_name')!r}, expected one of {known}; choose another base")
    missing = [part for part in family.parts if not (path / part).is_dir()]
    if missing:
        raise BaseModelError(f"{path}: lacks {', '.join(missing)}/; fetch the whole pipeline again")
    return BaseModel(
        config.model,
        config.revision,
        index["_class_name"],
        path,
        {part: _digest_of_folder(path / part) for part in family.parts},
    )


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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                config.model, revision=config.revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"base model {config.model!r}: not in the local cache and the hub gave "
            f"{type(error).__name__}; download it once while online, or give a folder"
        ) from None


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(
            f"{path}: no model_index.json, so it is no diffusers pipeline; give the folder that `save_pretrained` wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BaseModelError(
            f"{path / 'model_index.json'}: not valid JSON: {error}; fetch the pipeline again"
        ) from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise BaseModelError(f"{path / 'model_index.json'}: names no pipeline class; fetch the pipeline again")
    return index


def _digest_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in IGNORED):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()
