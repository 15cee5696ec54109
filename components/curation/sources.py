"""Reading data in every layout people bring, as one list of items. Sources are never changed.

A new layout is one new file in `readers` and one line in LAYOUTS. Only regular files inside a source's folder are
opened; whatever cannot be used becomes an item with a problem, whatever is no picture is listed with the reason.
`docs/data.md` has the rules.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from itertools import count
from pathlib import Path

from components.config import DataConfig, DataSource
from components.curation.items import PICTURE_SUFFIXES, Found, Item, Member, Problem, Skipped
from components.curation.masks import ALPHA, mask_folder, masks_of, with_mask
from components.curation.memory import FileDigest, Recall, afresh, hash_files
from components.curation.readers.folders import read_pictures
from components.curation.readers.hub import fetch_dataset, list_dataset
from components.curation.readers.rows import SUFFIXES as ROW_SUFFIXES
from components.curation.readers.rows import member_of_rows, read_rows
from components.curation.readers.tables import TABLE_NAMES
from components.curation.readers.tars import member_of_tar, read_tars
from components.curation.readers.walking import REPEATS, Entry, Listing, OnListed, list_source, walk
from components.errors import BadInput

__all__ = [
    "LAYOUTS", "PICTURE_SUFFIXES", "FileDigest", "Item", "Member", "Problem", "Reading", "Skipped", "SourceReading",
    "hash_files", "picture_file", "picture_files", "read_data", "read_folder", "read_picture", "read_sources",
    "require_captions", "require_folders", "require_pictures", "worded",
]

ADDRESS = re.compile(r"(?:^|/)([A-Za-z][A-Za-z0-9+.-]+):/")  # also behind the folder of the recipe
ARCHIVES = (".tar", *ROW_SUFFIXES)  # files that are a source by themselves


@dataclass(frozen=True, slots=True)
class Layout:
    """A way in which people keep captioned pictures."""

    name: str
    means: str  # what is said of a source in this layout
    fits: Callable[[Listing], bool]  # decided from names alone
    read: Callable[[Listing, DataSource, Recall], Found]


def _holds_repeats(listing: Listing) -> bool:
    """Folders such as `10_sks dog` at the top, and neither pictures nor a table beside them."""
    if not any(entry.folder and REPEATS.fullmatch(entry.file_name.partition("/")[0]) for entry in listing.files):
        return False
    at_top = [entry for entry in listing.files if "/" not in entry.file_name]
    return not any(entry.is_picture or entry.file_name in TABLE_NAMES for entry in at_top)


def _holds(*suffixes: str) -> Callable[[Listing], bool]:
    return lambda listing: not listing.has_pictures and any(
        entry.suffix in suffixes and entry.name.name not in TABLE_NAMES for entry in listing.files
    )


LAYOUTS: tuple[Layout, ...] = (  # of those that fit the first is taken
    Layout("dataset", "a data set whose rows hold the pictures", _holds(*ROW_SUFFIXES), read_rows),
    Layout("webdataset", "tars with captions beside pictures", _holds(".tar"), read_tars),
    Layout("kohya", "folders named repeats_tokens", _holds_repeats, partial(read_pictures, folder_names="required")),
    Layout("mixed", "pictures, some in folders named repeats_tokens",
           lambda listing: any(entry.folder for entry in listing.files),
           partial(read_pictures, folder_names="counted")),
    Layout("folder", "a folder of pictures", lambda listing: True, partial(read_pictures, folder_names="ignored")),
)
HELD_INSIDE = ("dataset", "webdataset")  # layouts whose pictures are no files of their own


@dataclass(frozen=True, slots=True)
class SourceReading:
    """What is said of one source of a recipe."""

    path: str
    layout: str
    means: str
    pictures: int
    skipped: tuple[Skipped, ...]

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Names of the skipped files by the reason, the commonest first."""
        found: dict[str, list[str]] = {}
        for one in self.skipped:
            found.setdefault(one.reason, []).append(one.file_name)
        return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))

    def __str__(self) -> str:
        """One line for a person."""
        skipped = "; ".join(f"{reason} ({len(names)})" for reason, names in self.reasons.items())
        return f"{self.path}: {self.pictures} pictures, {self.means} ({self.layout})" + (
            f"; skipped: {skipped}" if skipped else ""
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """Every picture of every source, sorted by file name, and what is said of each source."""

    items: list[Item]
    sources: tuple[SourceReading, ...]


def read_data(data: DataConfig, recall: Recall = afresh, *, captioned: bool = True,
              on_listed: OnListed = lambda files: None) -> Reading:
    """Read the sources' listings, captions and tables; `recall` knows what earlier scans learnt of them.

    `on_listed` hears how many files of a source were found so far.

    With several sources file names begin with the source folder's name. Raises BadInput, one line, for a source that
    is missing, is empty, holds no pictures, or, if they must be `captioned`, holds not a single caption, and for a
    table that cannot be read.
    """
    items, said, taken = [], [], set()
    for origin, source in enumerate(data.sources):
        found, about = _read(source, recall, on_listed)
        said.append(about)
        if len(data.sources) == 1:
            require_captions(found if captioned else (), data)
            return Reading(found, tuple(said))
        prefix = next(name for name in _names(Path(source.path).name or "source") if name not in taken)
        taken.add(prefix)
        items += [replace(item, file_name=f"{prefix}/{item.file_name}", origin=origin) for item in found]
    require_captions(items if captioned else (), data)
    return Reading(sorted(items, key=lambda item: item.file_name), tuple(said))


def require_captions(items: Iterable[Item], data: DataConfig) -> None:
    """Raises BadInput, one line, for a source of which no picture has a caption."""
    wanting: dict[int, list[str | None]] = {}  # by source, of each picture why it has no caption; None: it has one
    for item in items:
        problem = item.problem
        reason = problem.reason if problem is not None and problem.check == "caption" else None
        wanting.setdefault(item.origin, []).append(reason)
    for origin, reasons in sorted(wanting.items()):
        if None not in reasons:
            raise BadInput(f"{data.sources[origin].path}: none of its {len(reasons)} pictures has a caption that can be"
                           f" used ({reasons[0]}); write captions to files such as a.txt beside a.png, or to"
                           " metadata.jsonl, or let `safelight caption` write them")


def read_sources(data: DataConfig) -> list[Item]:
    """Every picture of every source, sorted by file name. Raises BadInput as `read_data` does."""
    return read_data(data).items


def read_folder(source: DataSource) -> list[Item]:
    """Every picture of one source, sorted by file name. Raises BadInput as `read_data` does."""
    items = _read(source, afresh)[0]
    require_captions(items, DataConfig(sources=(source,)))
    return items


def read_picture(item: Item) -> bytes:
    """The bytes of an item's picture, which may have changed since it was scanned. Raises OSError."""
    location, member = str(item.location), item.member
    if member is None:
        return Path(location).read_bytes()
    return member_of_rows(location, member) if member.column else member_of_tar(location, member)


def picture_file(item: Item) -> Path | BytesIO:
    """What Pillow opens an item's picture from."""
    return BytesIO(read_picture(item)) if item.member else Path(str(item.location))


def picture_files(source: DataSource) -> list[Path]:
    """The picture files of a source in folders, none where larger files hold them. Opens none.

    Raises BadInput and OSError for a source that is not there or cannot be listed.
    """
    root, home = _root_of(source)
    listing = list_source(root, home, apart=_masks_of(source))
    layout = _layout_of(source, listing).name
    if layout in HELD_INSIDE:
        return []
    return [entry.path for entry in listing.files
            if entry.is_picture and not entry.problem and (entry.folder or layout != "kohya")]


def require_folders(data: DataConfig) -> None:
    """Raises BadInput for a source whose pictures are inside of larger files, or on the hub, and so are not counted."""
    for source in data.sources:
        if source.revision is None and not Path(source.path).exists():
            continue  # it may come later
        if source.revision or _layout_of(source, list_source(*_root_of(source))).name in HELD_INSIDE:
            raise BadInput(f"--when-new: counts picture files, but {source.path} holds its pictures inside of others;"
                           " use --every or --cron")


def require_pictures(data: DataConfig) -> None:
    """Raises BadInput, as `read_data` would, for a source on this machine that is missing or empty. Opens no file."""
    for source in data.sources:
        if source.streaming:
            continue  # the hub is asked when it is read
        root, home = _root_of(source)
        if root.is_dir() and not any(isinstance(one, Entry) for one in walk(root, home)):
            raise BadInput(_no_pictures(root, 0))


def _read(source: DataSource, recall: Recall,
          on_listed: OnListed = lambda files: None) -> tuple[list[Item], SourceReading]:
    masks = _masks_of(source)
    if source.streaming:
        listing = list_dataset(source.path, str(source.revision), recall)
        on_listed(len(listing.files))
    else:
        root, home = _root_of(source)
        listing = list_source(root, home, apart=masks, on_listed=on_listed)
    layout = _layout_of(source, listing)
    if source.streaming and (layout.name not in HELD_INSIDE or listing.with_suffix(".arrow")):
        raise BadInput(f"data set {source.path!r}: its pictures are no rows of .parquet and in no .tar, which alone can"
                       " be streamed; leave streaming out, and it is downloaded")
    found = layout.read(listing, source, recall)
    items = found.items
    if not items:
        raise BadInput(_no_pictures(listing.root, len(listing.files)))
    if source.masks is not None:
        items = _masked(items, listing, masks, source)
    items = [_as_the_recipe_says(item, source) for item in items]
    return items, SourceReading(source.path, layout.name, layout.means, len(items), tuple(found.skipped))


def _layout_of(source: DataSource, listing: Listing) -> Layout:
    return next(layout for layout in LAYOUTS if source.layout == layout.name
                or (source.layout == "auto" and layout.fits(listing)))


def _as_the_recipe_says(item: Item, source: DataSource) -> Item:
    """The item with the source's licence, weight and wording."""
    words = (source.trigger, source.caption_prefix, source.caption_suffix)
    if any(words) and item.problem is None:
        item = replace(item, caption=worded(item.caption, source),
                       variants=tuple(worded(caption, source) for caption in item.variants))
    if source.licence is None and source.repeats == 1 and not source.is_reg:
        return item
    return replace(item, licence=item.licence or source.licence, repeats=item.repeats * source.repeats,
                   is_reg=source.is_reg)


def worded(caption: str, source: DataSource) -> str:
    """A caption with the trigger in place of [trigger], or before it where it is nowhere, between prefix and suffix."""
    if source.trigger:
        caption = caption.replace("[trigger]", source.trigger)
        caption = caption if source.trigger in caption else f"{source.trigger} {caption}"
    return " ".join(part for part in (source.caption_prefix, caption, source.caption_suffix) if part)


def _masked(items: list[Item], listing: Listing, folder: Path | None, source: DataSource) -> list[Item]:
    root = listing.root
    if source.masks != ALPHA and any(item.member for item in items):
        raise BadInput(f"{root}: masks = {source.masks!r}, but its pictures are inside of files, expected 'alpha'")
    masks = {} if source.masks == ALPHA else masks_of(source, listing, folder)
    items = [with_mask(item, source, masks) for item in items]
    if not any(item.mask or (item.problem and item.problem.check == "mask") for item in items):
        raise BadInput(f"{root}: none of its {len(items)} pictures has a mask where masks = {source.masks!r} says; "
                       "give masks the pictures' names, or leave masks out")
    return items


def _masks_of(source: DataSource) -> Path | None:
    folder = mask_folder(source)
    if folder is not None and not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of masks; give one, or masks = 'masklabel' or 'alpha'")
    return folder


def _no_pictures(root: Path, files: int) -> str:
    found = f"{files} files but no pictures" if files else "nothing"
    return f"{root}: holds {found}; expected pictures such as .png or .jpg with captions"


def _root_of(source: DataSource) -> tuple[Path, Path]:
    """The source's folder or archive, resolved, and the folder that its links must stay in."""
    if source.revision is not None:
        return fetch_dataset(source.path, source.revision)
    root = Path(source.path)
    if not root.exists() and (address := ADDRESS.search(source.path)):  # with what may be a password
        raise BadInput(f"{address[1]}://…: is an address, expected a folder; download the data and name its folder")
    if not root.exists():
        raise BadInput(f"{root}: no such folder; pass a folder of pictures with captions")
    if not root.is_dir() and (root.suffix.lower() not in ARCHIVES or not root.is_file()):
        raise BadInput(f"{root}: is a file, expected a folder of pictures with captions, or {', '.join(ARCHIVES)}")
    root = root.resolve()
    return root, root


def _names(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))
