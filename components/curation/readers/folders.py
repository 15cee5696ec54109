"""Folders of picture files: captions of the same stem beside them, tables, and kohya's trees of `10_sks dog` folders.

Rules where names collide, one each: two pictures of one stem are two samples with one caption; two caption files for
one stem stop the run; names that differ in case or in Unicode form are different names, on every system.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
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
        theirs = {name: beside.get(pictures[name].stem, ()) for name in part if name not in listed}
        captions = [entry.location for entries in theirs.values() for entry in entries]
        texts = recall(captions, "caption/1", _caption_bytes)
        for name in part:
            if name in listed:
                items.append(from_row(root, name, listed[name], pictures.get(name)))
            else:
                items.append(_beside_caption(pictures[name], theirs[name], texts, source))
    return Found(items, sorted([*skipped, *unused], key=lambda one: one.file_name))


def _what_is_said(
    root: Path, entries: Sequence[Entry], pictures: Mapping[str, Entry], source: DataSource, recall: Recall
) -> tuple[dict[str, Row], dict[str, list[Entry]], list[Skipped]]:
    """Rows of tables by picture, caption files by their stem, and what is neither.

    A `metadata` table counts before a caption file, which counts before another trainer's JSON.
    """
    stems = {entry.stem for entry in pictures.values()}
    from_names = source.caption_from == "file_name"
    tables, jsons, unused = [], [], []
    beside: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.is_picture:
            continue
        stem = entry.stem
        if entry.base_name in TABLE_NAMES and not from_names:
            tables.append(entry)
        elif entry.base_name in JSON_TABLES and stem not in stems and not from_names:
            jsons.append(entry)
        elif reason := _why_skipped(entry, stem, stems, source):
            unused.append(Skipped(printable(entry.file_name), reason))
        else:
            beside.setdefault(stem, []).append(entry)
    listed = table_rows(root, tables, source, recall)
    speakers = {table.name.parent: table.name.name for table in tables}
    others, said_nothing = json_rows(jsons, pictures, speakers, recall)
    others = {name: row for name, row in others.items() if str(PurePosixPath(name).with_suffix("")) not in beside}
    return others | listed, beside, unused + said_nothing


def _why_skipped(entry: Entry, stem: str, stems: set[str], source: DataSource) -> str | None:
    """Why a file that is no picture is not read; None for a picture's caption."""
    suffix = entry.suffix
    if suffix not in CAPTION_SUFFIXES and stem.endswith(NO_PICTURES):
        return "the mask of a picture" if source.masks == BESIDE else "another trainer's mask or condition"
    if suffix not in CAPTION_SUFFIXES or entry.base_name in TABLE_NAMES:
        return PEERS_FILES.get(suffix, "no picture")
    if entry.problem:
        return entry.problem.reason
    if source.caption_from == "file_name":
        return "captions are taken from the pictures' names"
    if source.caption_extension not in ("any", suffix):
        return f"caption_extension is {source.caption_extension!r}"
    return None if stem in stems else "no picture of this name"


def _beside_caption(entry: Entry, captions: Sequence[Entry], texts: Mapping[str, bytes | OSError],
                    source: DataSource) -> Item:
    repeats, tokens = (int(entry.folder[1]), entry.folder[2].strip()) if entry.folder else (1, "")
    name, repeats = printable(entry.file_name), max(1, repeats)
    if entry.problem:
        return Item(name, None, problem=entry.problem, repeats=repeats)
    if len(captions) > 1:
        raise BadInput(f"{entry.location}: has two captions, {captions[0].name} and {captions[1].name}; remove one")
    item = partial(Item, name, entry.location, repeats=repeats)
    try:
        if source.caption_from == "file_name":
            return item(caption=name_as_caption(entry.name.stem, name))
        if captions:
            caption, others = captions_in(texts[captions[0].location], captions[0].file_name, source)
            return item(caption=caption, variants=others)
    except CaptionProblem as problem:
        return item(problem=Problem("caption", str(problem)))
    return without_caption(item(), tokens or source.class_tokens,
                           f"{entry.name}: no caption; write {entry.name.stem}.txt beside it")


def _caption_bytes(path: str) -> bytes:
    """The file's bytes; of one that is too long no more than it takes to say so."""
    with Path(path).open("rb") as file:
        return file.read(MAX_CAPTION_BYTES + 1)


def captions_in(body: bytes | OSError, name: str, source: DataSource) -> tuple[str, tuple[str, ...]]:
    """The caption in the bytes of a caption file, and the further ones. Raises CaptionProblem."""
    if isinstance(body, OSError):
        raise CaptionProblem(f"{name}: {why_unreadable(body)}")
    if len(body) > MAX_CAPTION_BYTES:
        raise CaptionProblem(f"{name}: has more than {MAX_CAPTION_BYTES:,} bytes, which is no caption; shorten it")
    lines = source.caption_lines
    others = variants_in(body, name) if lines == "variants" else ()
    return caption_in(body, name, lines), others


def without_caption(item: Item, tokens: str | None, reason: str) -> Item:
    """The item with class tokens for a caption, or the problem that it has none."""
    if tokens:
        return replace(item, caption=tokens, fallback=True)
    return replace(item, problem=Problem("caption", reason))
