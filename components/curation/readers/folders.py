"""Folders of picture files: captions of the same stem beside them, tables, and kohya's trees of `10_sks dog` folders.

Rules where names collide, one each: two pictures of one stem are two samples with one caption; two caption files for
one stem stop the run; names that differ in case or in Unicode form are different names, on every system.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

from components.config import DataSource
from components.curation.captions import CAPTION_SUFFIXES, CaptionProblem, caption_in, name_as_caption, variants_in
from components.curation.items import NO_PICTURES, Found, Item, Problem, Skipped, printable
from components.curation.masks import BESIDE
from components.curation.memory import CHUNK, Recall, why_unreadable
from components.curation.readers.tables import JSON_TABLES, TABLE_NAMES, Row, from_row, json_rows, table_rows
from components.curation.readers.walking import Entry, Listing
from components.errors import BadInput

MAX_CAPTION_BYTES = 1 << 20
FolderNames = Literal["ignored", "counted", "required"]  # what `10_sks dog` is: a name, repeats and tokens, or a must
PEERS_FILES = {  # endings of what other programs leave beside pictures
    ".npz": "another trainer's cache", ".pt": "another trainer's cache", ".bin": "another trainer's cache",
    ".tar": "an archive among pictures; name it as a source of its own",
    ".zip": "an archive; unpack it", ".gz": "an archive; unpack it", ".tgz": "an archive; unpack it",
    ".parquet": "a table among pictures; name it as a source of its own",
}


def read_pictures(listing: Listing, source: DataSource, recall: Recall, folder_names: FolderNames) -> Found:
    """Every picture file of a folder, by name, and the files that are none."""
    root, skipped = listing.root, list(listing.skipped)
    chosen = []
    for entry in listing.files:
        if folder_names == "required" and entry.folder is None:
            skipped.append(Skipped(printable(entry.file_name), "in no folder that is named like 10_tokens, where"
                                   " kohya's trainers look for pictures; set layout = \"folder\" to read it"))
        else:
            ignored = folder_names == "ignored" and entry.folder is not None
            chosen.append(replace(entry, folder=None) if ignored else entry)
    pictures = {entry.file_name: entry for entry in chosen if entry.is_picture}
    listed, beside, unused = _what_is_said(root, chosen, pictures, source, recall)
    items: list[Item] = []
    names = sorted(pictures.keys() | listed.keys()) if listed else sorted(pictures)
    for start in range(0, len(names), CHUNK):
        part = names[start : start + CHUNK]
        captions = [entry.path for name in part if name not in listed for entry in beside.get(pictures[name].stem, ())]
        texts = recall(captions, "caption/1", _caption_bytes)
        for name in part:
            if name in listed:
                items.append(from_row(root, name, listed[name], pictures.get(name)))
            else:
                items.append(_beside_caption(pictures[name], beside, texts, source))
    return Found(items, sorted([*skipped, *unused], key=lambda one: one.file_name))


def _what_is_said(
    root: Path, entries: Sequence[Entry], pictures: Mapping[str, Entry], source: DataSource, recall: Recall
) -> tuple[dict[str, Row], dict[str, list[Entry]], list[Skipped]]:
    """Rows of tables by picture, caption files by their stem, and what is neither.

    A `metadata` table counts before a caption file, which counts before another trainer's JSON.
    """
    stems = {entry.stem for entry in pictures.values()}
    from_names = source.caption_from == "file_name"
    tables, jsons, captions, unused = [], [], [], []
    for entry in entries:
        if entry.is_picture:
            continue
        name = entry.name
        if name.name in TABLE_NAMES and not from_names:
            tables.append(entry)
        elif name.name in JSON_TABLES and entry.stem not in stems and not from_names:
            jsons.append(entry)
        elif reason := _why_skipped(entry, stems, source):
            unused.append(Skipped(printable(name), reason))
        else:
            captions.append(entry)
    beside: dict[str, list[Entry]] = {}
    for entry in captions:
        beside.setdefault(entry.stem, []).append(entry)
    listed = table_rows(root, tables, source, recall)
    speakers = {table.name.parent: table.name.name for table in tables}
    others, said_nothing = json_rows(jsons, pictures, speakers, recall)
    others = {name: row for name, row in others.items() if str(PurePosixPath(name).with_suffix("")) not in beside}
    return others | listed, beside, unused + said_nothing


def _why_skipped(entry: Entry, stems: set[str], source: DataSource) -> str | None:
    """Why a file that is no picture is not read; None for a picture's caption."""
    name, suffix = entry.name, entry.suffix
    if name.stem.endswith(NO_PICTURES) and suffix not in CAPTION_SUFFIXES:
        return "the mask of a picture" if source.masks == BESIDE else "another trainer's mask or condition"
    if suffix not in CAPTION_SUFFIXES or name.name in TABLE_NAMES:
        return PEERS_FILES.get(suffix, "no picture")
    if entry.problem:
        return entry.problem.reason
    if source.caption_from == "file_name":
        return "captions are taken from the pictures' names"
    if source.caption_extension not in ("any", suffix):
        return f"caption_extension is {source.caption_extension!r}"
    return None if entry.stem in stems else "no picture of this name"


def _beside_caption(entry: Entry, captions: Mapping[str, Sequence[Entry]],
                    texts: Mapping[Path, bytes | OSError], source: DataSource) -> Item:
    repeats, tokens = (int(entry.folder[1]), entry.folder[2].strip()) if entry.folder else (1, "")
    location = None if entry.problem else entry.location
    item = Item(printable(entry.file_name), location, problem=entry.problem, repeats=max(1, repeats))
    if entry.problem:
        return item
    matches = captions.get(entry.stem, [])
    if len(matches) > 1:
        raise BadInput(f"{entry.location}: has two captions, {matches[0].name} and {matches[1].name}; remove one")
    try:
        if source.caption_from == "file_name":
            return replace(item, caption=name_as_caption(entry.name.stem, item.file_name))
        if matches:
            return with_caption(item, texts[matches[0].path], matches[0].file_name, source)
    except CaptionProblem as problem:
        return replace(item, problem=Problem("caption", str(problem)))
    return without_caption(item, tokens or source.class_tokens,
                           f"{entry.name}: no caption; write {entry.name.stem}.txt beside it")


def _caption_bytes(path: Path) -> bytes:
    """The file's bytes; of one that is too long no more than it takes to say so."""
    with path.open("rb") as file:
        return file.read(MAX_CAPTION_BYTES + 1)


def with_caption(item: Item, body: bytes | OSError, name: str, source: DataSource) -> Item:
    """The item with the caption in a caption file's bytes. Raises CaptionProblem."""
    if isinstance(body, OSError):
        raise CaptionProblem(f"{name}: {why_unreadable(body)}")
    if len(body) > MAX_CAPTION_BYTES:
        raise CaptionProblem(f"{name}: has more than {MAX_CAPTION_BYTES:,} bytes, which is no caption; shorten it")
    lines = source.caption_lines
    others = variants_in(body, name) if lines == "variants" else ()
    return replace(item, caption=caption_in(body, name, lines), variants=others)


def without_caption(item: Item, tokens: str | None, reason: str) -> Item:
    """The item with class tokens for a caption, or the problem that it has none."""
    if tokens:
        return replace(item, caption=tokens, fallback=True)
    return replace(item, problem=Problem("caption", reason))
