"""WebDataset tars: `key.jpg` with `key.txt` or `key.json` in the same archive, read where they are.

A key is a member's name up to the first dot after the last slash. Of several captions the first of .txt, .caption and
.json counts, because writers put the same words into all of them. Nothing is unpacked: a picture is known by its
offset, and only regular members whose names stay inside are looked at.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from components.config import DataSource
from components.curation.captions import CAPTION_SUFFIXES, CaptionProblem, name_as_caption
from components.curation.items import PICTURE_SUFFIXES, Found, Item, Member, Problem, Skipped, printable
from components.curation.memory import Recall
from components.curation.readers.folders import MAX_CAPTION_BYTES, captions_in, without_caption
from components.curation.readers.hub import opened
from components.curation.readers.shards import read_shards
from components.curation.readers.tables import contained
from components.curation.readers.walking import Entry, Listing

INDEX = "tar/1"  # changes when `_index` does


def read_tars(listing: Listing, source: DataSource, recall: Recall) -> Found:
    """The pictures of every tar of the source, named `shard.tar/key.jpg`."""
    tars = listing.with_suffix(".tar")
    skipped = list(listing.skipped)
    skipped += [Skipped(printable(entry.file_name), "no tar") for entry in listing.files if entry.suffix != ".tar"]
    indexes = recall([tar.location for tar in tars if not tar.problem], INDEX, _index)
    readable, items = read_shards(tars, indexes)
    for tar, members in readable:
        found = _read_index(tar, members, source)
        items += found.items
        skipped += found.skipped
    return Found(sorted(items, key=lambda item: item.file_name), skipped)


def member_of_tar(location: str, member: Member) -> bytes:
    """The picture's bytes, as far as the file still holds them."""
    offset, size = member.place
    with opened(location, in_order=False) as file:
        file.seek(offset)
        return file.read(size)


def _index(location: str) -> bytes:
    """What the tar holds, as JSON: each member's name, place and sha256, a caption's text, or why it is not read.

    Why nothing of it can be read, as a string, where it is damaged.
    """
    try:
        with opened(location, in_order=True) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = list(_members(archive))
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError) as error:
        said = " ".join(str(error).split()) or "it ends early"
        return json.dumps(f"not a tar that can be read: {said}; write it again, without compression").encode()
    return json.dumps(members).encode()


def _members(archive: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    for info in archive:
        if info.isdir():
            continue
        name, problem = contained(info.name, "member")
        about: dict[str, Any] = {"name": name.encode("utf-8", "backslashreplace").decode()}
        if problem:
            yield about | {"refused": problem.reason}
        elif not info.isreg() or info.issparse():
            yield about | {"refused": "is not a regular file"}
        elif (suffix := _split_name(name)[1]) in PICTURE_SUFFIXES:
            yield about | {"place": [info.offset_data, info.size], "sha256": _sha256(archive, info)}
        elif suffix in CAPTION_SUFFIXES:
            file = archive.extractfile(info)
            body = file.read(MAX_CAPTION_BYTES + 1) if file else b""
            yield about | {"text": body.decode("latin-1")}  # bytes as they are, in JSON
        else:
            yield about


def _sha256(archive: tarfile.TarFile, info: tarfile.TarInfo) -> str:
    file = archive.extractfile(info)
    if file is None:
        raise tarfile.ReadError(f"{info.name} is not there")
    digest, left = hashlib.sha256(), info.size
    while chunk := file.read(1 << 20):
        digest.update(chunk)
        left -= len(chunk)
    if left:
        raise tarfile.ReadError(f"it ends inside {info.name}")
    return digest.hexdigest()


def _split_name(name: str) -> tuple[str, str]:
    """The key, and the rest with its dot, in lower case."""
    path = PurePosixPath(name)
    key, dot, rest = path.name.partition(".")
    return str(path.with_name(key)) if key else name, f"{dot}{rest}".lower()


def _read_index(tar: Entry, members: list[dict[str, Any]], source: DataSource) -> Found:
    items: dict[str, Item] = {}
    captions: dict[str, list[dict[str, Any]]] = {}
    skipped = []
    for about in members:
        full = f"{printable(tar.file_name)}/{about['name']}"
        if "refused" in about:
            items[full] = Item(full, None, problem=Problem("file", about["refused"]))
        elif full in items:
            skipped.append(Skipped(full, "the tar holds another member of this name before it"))
        elif "place" in about:
            offset, size = about["place"]
            items[full] = Item(full, tar.location, member=Member((offset, size), "", about["sha256"], size))
        elif "text" in about:
            captions.setdefault(_split_name(about["name"])[0], []).append(about)
        else:
            skipped.append(Skipped(full, "neither a picture nor a caption by its ending after the first dot"))
    keys = {_split_name(name.removeprefix(f"{printable(tar.file_name)}/"))[0] for name in items}
    skipped += [
        Skipped(f"{printable(tar.file_name)}/{about['name']}", "no picture of this key")
        for key, found in captions.items() if key not in keys for about in found
    ]
    return Found([_captioned(item, tar, captions, source) for item in items.values()], skipped)


def _captioned(item: Item, tar: Entry, captions: dict[str, list[dict[str, Any]]], source: DataSource) -> Item:
    if item.problem:
        return item
    key = _split_name(item.file_name.removeprefix(f"{printable(tar.file_name)}/"))[0]
    wanted = [
        about for about in captions.get(key, [])
        if source.caption_extension in ("any", _split_name(about["name"])[1])
    ]
    wanted.sort(key=lambda about: CAPTION_SUFFIXES.index(_split_name(about["name"])[1]))
    try:
        if source.caption_from == "file_name":
            return replace(item, caption=name_as_caption(PurePosixPath(key).name, item.file_name))
        if wanted:
            caption, others = captions_in(wanted[0]["text"].encode("latin-1"), wanted[0]["name"], source)
            return replace(item, caption=caption, variants=others)
    except CaptionProblem as problem:
        return replace(item, problem=Problem("caption", str(problem)))
    return without_caption(item, source.class_tokens, f"{item.file_name}: no caption; add {key}.txt to the tar")
