"""Where a captioner's weights are: a folder, or a model of the hub at one commit. Never code, never pickles."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.config import HUB_MODEL
from components.curation.memory import FileDigest
from components.errors import BadInput
from components.families.hub import hub_answers

READ = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "model.onnx", "selected_tags.csv")
HashFiles = Callable[[Sequence[Path]], Mapping[Path, FileDigest]]


@dataclass(frozen=True, slots=True)
class Weights:
    """A captioner's weights, named by what they are: the hub's commit, or a digest of the folder's files."""

    source: str  # as a recipe names it
    revision: str
    folder: Path | None = None
    repository: str = ""  # of the hub

    @classmethod
    def at(cls, source: str, hash_files: HashFiles, renamed: Mapping[str, str] | None = None) -> "Weights":
        """The weights that `source` names, of which nothing is fetched yet. `renamed` has ids by their old names.

        Raises BadInput for a folder that is not there, and for a hub id without a commit.
        """
        if HUB_MODEL.fullmatch(source):
            repository, _, commit = source.partition("@")
            return cls(source, commit, repository=(renamed or {}).get(repository, repository))
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise BadInput(
                f"captioner {source!r}: no such folder; for a model of the hub write"
                " OWNER/MODEL@<40 hex digits of a commit>"
            )
        files = sorted(path for pattern in READ for path in folder.glob(pattern))
        if not files:
            raise BadInput(f"captioner {folder}: holds no weights; give a folder saved with save_pretrained")
        digest = hashlib.sha256()
        for path, found in hash_files(files).items():
            if found.sha256 is None:
                raise BadInput(f"captioner {path}: cannot be read; change its permissions")
            digest.update(f"{path.name}\0{found.sha256}\n".encode())
        return cls(source, digest.hexdigest()[:40], folder=folder)

    def fetched(self, offline: bool) -> Path:
        """The folder that holds them, downloaded as far as it is not there. Raises BadInput, one line."""
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        said = f"captioner {self.source!r}"
        if not self.source.startswith(f"{self.repository}@"):
            said += f" (now {self.repository}, whose own commit is to be given)"
        with hub_answers(said, self.repository, "the captioner's id", self.revision, "its commit"):
            return Path(
                snapshot_download(
                    self.repository, revision=self.revision, allow_patterns=[*READ], local_files_only=offline
                )
            )


def model_type(folder: Path) -> str:
    """What the folder's config.json says it holds. Raises BadInput for one that needs code of its own."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(
            f"captioner {folder}: has no config.json that names a model_type; give a folder saved with save_pretrained"
        ) from None
    if "auto_map" in config:
        raise BadInput(
            f"captioner {folder}: needs code of its own, which is never run; choose a model whose class"
            " transformers has, such as florence-community/Florence-2-base"
        )
    return found


def is_offline() -> bool:
    """Whether the hub is not to be asked, as its library has it from the environment."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return HF_HUB_OFFLINE
