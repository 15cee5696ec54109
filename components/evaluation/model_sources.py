"""Where an embedder's weights come from and what pins them, told without loading torch."""

import hashlib
import re
from pathlib import Path

from components.errors import BadInput

AUTO = "imagenet"                            # what "auto" means
KINDS = ("imagenet", "dinov2", "clip")
PREPARATION = "p1"                           # part of the revision: bump when an image reaches the network differently
IMAGENET_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*@[0-9a-f]{40}")


def kind_and_source(name: str) -> tuple[str, str]:
    """What a recipe's embedder is: "auto", "imagenet", "dinov2:SOURCE" or "clip:SOURCE".

    SOURCE is a folder or "owner/name@<40 hex digits>". Raises BadInput for anything else.
    """
    kind, _, source = (AUTO if name == "auto" else name).partition(":")
    if kind not in KINDS or (kind == AUTO) == bool(source):
        raise BadInput(f'the embedder is {name!r}: expected "auto", "imagenet", "dinov2:SOURCE" or "clip:SOURCE", with'
                       " a folder or owner/name@<40 hex digits> as SOURCE")
    return kind, source


def feature_key(name: str) -> str:
    """What the features of this embedder are kept under: its name and its revision."""
    kind, source = kind_and_source(name)
    if not source:
        return f"features:{kind}:{IMAGENET_WEIGHTS_SHA256}-{PREPARATION}"
    where, _, revision = locate(source)
    return f"features:{kind}:{Path(where).name}:{revision}"


def locate(source: str) -> tuple[str, str | None, str]:
    """What to load, the hub revision if any, and the revision for cache keys."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise BadInput(f"{folder}: holds no *.safetensors; save the embedder there with save_pretrained")
        digest = hashlib.sha256()
        for path in [*weights, *(p for p in sorted(folder.glob("*.json")) if p.name != "tokenizer.json")]:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return str(folder), None, f"{digest.hexdigest()}-{PREPARATION}"
    if HUB_ID.fullmatch(source):
        where, _, revision = source.partition("@")
        return where, revision, f"{revision}-{PREPARATION}"
    raise BadInput(f"{source!r} is no folder; for a hub model write owner/name@<40 hex digits of a commit>")
