"""Fetching a pipeline from the Hugging Face hub: the folders its index names, safetensors only, and never code."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.errors import BaseModelError
from components.storage import sha256_of

HUB = "https://huggingface.co"
CONFIGURATION = ("*.json", "*.txt", "*.model")  # of models and schedulers, and what tokenizers read
VARIANTS = ("*.fp16[.-]*", "*.bf16[.-]*", "*.fp32[.-]*", "*.non_ema[.-]*", "*.ema[.-]*")  # second copies of weights
BLOB = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_pipeline(model: str, revision: str | None) -> Path:
    """The local folder of a hub pipeline, downloaded as far as it is not there; the token is the environment's.

    Raises: BaseModelError, one line, that says where to accept a licence when the repository asks for one.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with hub_answers(f"base model {model!r}", model, "base.model", revision, "base.revision"):
        try:
            index = Path(hf_hub_download(model, "model_index.json", revision=revision))
        except RemoteEntryNotFoundError:
            raise BaseModelError(
                f"base model {model!r}: has no model_index.json, so it is no diffusers pipeline; choose one in that"
                " layout"
            ) from None
        folders = [name for name, entry in read_json(index).items() if isinstance(entry, list) and entry[0]]
        wanted = [f"{folder}/{pattern}" for folder in folders for pattern in (*CONFIGURATION, "*.safetensors")]
        patterns = ["model_index.json", *wanted]
        commit = commit_of(index.parent) or revision  # what the index came from, though the branch may have moved since
        return Path(snapshot_download(model, revision=commit, allow_patterns=patterns, ignore_patterns=[*VARIANTS]))


@contextmanager
def hub_answers(subject: str, model: str, model_key: str, revision: str | None, revision_key: str) -> Iterator[None]:
    """Within the block what the hub refuses becomes a BaseModelError, one line, about `subject`.

    The keys are where a person wrote the model and its revision.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise BaseModelError(
            f"{subject}: its licence is not accepted by this account; accept it at {HUB}/{model} "
            "and set HF_TOKEN to a token of that account"
        ) from None
    except RevisionNotFoundError:
        raise BaseModelError(f"{subject}: has no revision {revision!r}; correct {revision_key}") from None
    except RepositoryNotFoundError:
        raise BaseModelError(
            f"{subject}: the hub has no such model, or it is private; "
            f"correct {model_key}, or set HF_TOKEN to a token that may read it"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"{subject}: not in the local cache and the hub gave "
            f"{type(error).__name__}; download it once while online, or give a folder"
        ) from None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds, `models--owner--name/snapshots/<commit>`; None elsewhere."""
    return folder.name if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) else None


def digest_of(file: Path) -> str:
    """sha256 of a base's file. The hub's cache names large files by it, so they are not read at every start."""
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and BLOB.fullmatch(blob.name) else sha256_of(file)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises BaseModelError when the file holds something else."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BaseModelError(f"{path}: not valid JSON: {error}; fetch the pipeline again") from None
    if not isinstance(body, dict):
        raise BaseModelError(f"{path}: holds no JSON object; fetch the pipeline again")
    return body
