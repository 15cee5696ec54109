"""Data sets of the Hugging Face hub: one pinned commit, fetched into the hub's own cache and then read like a folder,
or streamed: read over the network and never kept.

Only a full commit id is accepted, so that the same recipe reads the same pictures tomorrow; no code is ever run.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from components.curation.items import Skipped, printable
from components.curation.memory import REMOTE, Recall
from components.curation.readers.walking import Entry, Listing
from components.errors import BadInput

DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
LISTING = "listing/1"  # changes when `_listed` does
BLOCK = 8 << 20  # bytes asked for at a time of a file that is read from its beginning to its end


def fetch_dataset(name: str, revision: str) -> tuple[Path, Path]:
    """The folder of a data set at a commit, and the folder of the cache that its links may lead into.

    Raises BadInput, one line, for an id that is none, and where the hub does not give it.
    """
    _require_id(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        root = Path(snapshot_download(name, repo_type="dataset", revision=revision, ignore_patterns=["*.py"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"data set {name!r} at {revision[:8]}: not in the local cache and the hub gave"
                       f" {type(error).__name__}; check id and revision, accept its terms and set HF_TOKEN if it is"
                       " gated, or download it once while online") from None
    return root.resolve(), root.resolve().parent.parent


def list_dataset(name: str, revision: str, recall: Recall) -> Listing:
    """The files of a data set at a commit, which stay where they are. Raises BadInput as `fetch_dataset` does."""
    _require_id(name)
    root = f"{REMOTE}datasets/{name}@{revision}"
    body = recall([root], LISTING, _listed)[root]
    assert isinstance(body, bytes), "what the hub gives instead is raised"
    shown, hidden = json.loads(body)
    skipped = tuple(Skipped(printable(file), "hidden") for file in hidden)
    return Listing(Path(root), tuple(Entry(file, root, None, None) for file in shown), skipped)


@contextmanager
def opened(location: str, *, in_order: bool) -> Iterator[IO[bytes]]:
    """A file to be read, of this machine or of the hub, of which no more is sent than is read unless it is read
    `in_order`. Raises OSError, and of the hub BadInput."""
    if not location.startswith(REMOTE):
        with Path(location).open("rb") as file:
            yield file
        return
    from huggingface_hub import HfFileSystem

    with _heard(location):
        remote: Any = HfFileSystem().open(
            location, "rb", block_size=BLOCK, cache_type="readahead" if in_order else "none"
        )
        with remote as file:
            yield file


def _listed(root: str) -> bytes:
    """Names of files, and of those that are hidden or in a hidden folder, as JSON."""
    from huggingface_hub import HfFileSystem

    with _heard(root):
        system = HfFileSystem()
        found: Any = system.find(root, detail=True)
        resolved = system.resolve_path(root).unresolve()
        names = [path.removeprefix(f"{resolved}/") for path, about in found.items() if about["type"] == "file"]
        hidden = [name for name in names if name.startswith(".") or "/." in name]
        return json.dumps([sorted({*names} - {*hidden}), sorted(hidden)]).encode()


@contextmanager
def _heard(location: str) -> Iterator[None]:
    """Whatever goes wrong between here and the hub is said in one line."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of the client it uses

    try:
        yield
    except (HTTPError, OSError) as error:
        what = location.removeprefix(f"{REMOTE}datasets/")
        raise BadInput(f"data set {what}: the hub gave {type(error).__name__} while it was streamed; check id and"
                       " revision, accept its terms and set HF_TOKEN if it is gated, and run the same command"
                       " again") from None


def _require_id(name: str) -> None:
    if not DATASET_ID.fullmatch(name) or ".." in name or "--" in name:
        raise BadInput(f"{name!r}: no id of a data set, expected owner/name; or leave revision out for a folder")
