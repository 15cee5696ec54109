"""A person's caption of a dataset's picture: a stored version, in place of the source's from the next curation on."""

from dataclasses import dataclass

from components.catalog import captions as stored
from components.catalog import datasets
from components.catalog.captions import CaptionVersion
from components.catalog.database import Catalog
from components.catalog.datasets import ItemRow
from components.curation.captions import normalise
from components.errors import BadInput

MAX_CAPTION, MAX_NAME = 8000, 80  # characters


@dataclass(frozen=True, slots=True)
class CaptionHistory:
    """A picture of a dataset's newest version, and every stored version of its caption, the newest first."""

    item: ItemRow
    versions: list[CaptionVersion]


def edit_caption(catalog: Catalog, dataset: str, file_name: str, text: str, *, by: str) -> CaptionVersion:
    """Store what a person writes of a picture. Raises BadInput for a picture that is not there and for no words."""
    by = " ".join(by.split())
    if not 0 < len(by) <= MAX_NAME:
        raise BadInput(f"the author's name has {len(by)} characters, expected 1 to {MAX_NAME}; give another with --by")
    if len(text) > MAX_CAPTION:
        raise BadInput(f"the caption has {len(text)} characters, expected {MAX_CAPTION} at most; shorten it")
    return _stored(catalog, dataset, file_name, normalise(text, file_name), by)


def withdraw_caption(catalog: Catalog, dataset: str, file_name: str, *, by: str) -> CaptionVersion:
    """Let the source's caption of a picture count again. Raises BadInput where nobody has edited it."""
    history = caption_history(catalog, dataset, file_name)
    newest = next((version for version in history.versions if version.kind == "person"), None)
    if newest is None or not newest.text:
        raise BadInput(f"{file_name}: its caption in {dataset} is not edited; there is nothing to withdraw")
    return _stored(catalog, dataset, file_name, "", by)


def caption_history(catalog: Catalog, dataset: str, file_name: str) -> CaptionHistory:
    """Raises BadInput for a dataset or picture that is not there."""
    item = _item(catalog, dataset, file_name)
    return CaptionHistory(item, stored.history(catalog, dataset, str(item.sha256)))


def _stored(catalog: Catalog, dataset: str, file_name: str, text: str, by: str) -> CaptionVersion:
    item = _item(catalog, dataset, file_name)
    (version,) = stored.store(catalog, [CaptionVersion(str(item.sha256), dataset, by, "person", text)])
    return version


def _item(catalog: Catalog, dataset: str, file_name: str) -> ItemRow:
    snapshot = datasets.latest_snapshot(catalog, dataset)
    if snapshot is None:
        raise BadInput(f"{dataset!r} is no dataset of this workspace; `safelight curate` makes one")
    item = datasets.find_item(catalog, snapshot.id, file_name)
    if item is None:
        raise BadInput(
            f"{dataset} has no file {file_name!r} in its newest version {snapshot.version}; names are as"
            " `safelight diff` and the Datasets page show them"
        )
    if item.sha256 is None:
        raise BadInput(f"{file_name}: its bytes could not be read, so it cannot be captioned; mend the file")
    return item
