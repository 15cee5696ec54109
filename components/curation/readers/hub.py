"""Data sets of the Hugging Face hub: one pinned commit, fetched into the hub's own cache and then read like a folder.

Only a full commit id is accepted, so that the same recipe reads the same pictures tomorrow; no code is ever run.
"""

import re
from pathlib import Path

from components.errors import BadInput

DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def fetch_dataset(name: str, revision: str) -> tuple[Path, Path]:
    """The folder of a data set at a commit, and the folder of the cache that its links may lead into.

    Raises BadInput, one line, for an id that is none, and where the hub does not give it.
    """
    if not DATASET_ID.fullmatch(name) or ".." in name or "--" in name:
        raise BadInput(f"{name!r}: no id of a data set, expected owner/name; or leave revision out for a folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        root = Path(snapshot_download(name, repo_type="dataset", revision=revision, ignore_patterns=["*.py"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"data set {name!r} at {revision[:8]}: not in the local cache and the hub gave"
                       f" {type(error).__name__}; check id and revision, accept its terms and set HF_TOKEN if it is"
                       " gated, or download it once while online") from None
    return root.resolve(), root.resolve().parent.parent
