"""Listing a source: every file below a folder, without opening one, and without leaving the folder."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from sys import intern

from components.curation.items import PICTURE_SUFFIXES, Problem, Skipped, ending_of, is_picture, printable
from components.errors import BadInput

PEERS_CACHES = frozenset({"_latent_cache", "_t_e_cache", "__pycache__", "__macosx"})  # other trainers', in lower case
REPEATS = re.compile(r"(\d+)_(.+)")  # a folder of the kohya layout
SAID_EVERY = 1000  # files, while they are listed

OnListed = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, and what its place and its name say. A listing may have millions: it keeps text, and paths are made of it
    where they are asked for."""

    file_name: str  # relative to the source's folder
    root: str  # the source's folder, without a slash at its end; one text for all of its files
    problem: Problem | None  # why it must not be opened
    folder: re.Match[str] | None  # the innermost folder of the kohya layout
    suffix: str = field(init=False)  # the ending, in lower case
    is_picture: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "suffix", intern(ending_of(self.file_name).lower()))
        object.__setattr__(self, "is_picture", self.suffix in PICTURE_SUFFIXES and is_picture(self.file_name))

    @property
    def base_name(self) -> str:
        """The name without its folders."""
        return self.file_name.rpartition("/")[2]

    @property
    def name(self) -> PurePosixPath:
        return PurePosixPath(self.file_name)

    @property
    def location(self) -> str:
        return f"{self.root}/{self.file_name}"

    @property
    def path(self) -> Path:
        return Path(self.location)

    @property
    def stem(self) -> str:
        """The name with its folders, without its ending: what picture and caption share."""
        return self.file_name.removesuffix(ending_of(self.file_name))


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a source, sorted by name within each folder."""

    root: Path
    files: tuple[Entry, ...]
    skipped: tuple[Skipped, ...]

    @property
    def has_pictures(self) -> bool:
        return any(entry.is_picture for entry in self.files)

    def with_suffix(self, *suffixes: str) -> list[Entry]:
        return [entry for entry in self.files if entry.suffix in suffixes]


def list_source(
    root: Path, home: Path, *, apart: Path | None = None, on_listed: OnListed = lambda files: None
) -> Listing:
    """The files below `root`, or `root` itself if it is a file. Links may lead anywhere in `home`, and no further.

    What lies in the folder `apart` is left out. Both folders are resolved. `on_listed` hears how many there are so far.
    """
    if not root.is_dir():
        return Listing(root.parent, (Entry(root.name, str(root.parent).rstrip("/"), None, None),), ())
    files: list[Entry] = []
    skipped: list[Skipped] = []
    for one in walk(root, home):
        if isinstance(one, Skipped):
            skipped.append(one)
        elif apart is None or not one.path.is_relative_to(apart):
            files.append(one)
            if len(files) % SAID_EVERY == 0:
                on_listed(len(files))
    on_listed(len(files))
    return Listing(root, tuple(files), tuple(skipped))


def walk(root: Path, home: Path) -> Iterator[Entry | Skipped]:
    """Files under `root`, and whatever is not looked into: hidden files, other trainers' caches, links to folders, and
    folders that may not be listed or lie too deep.

    Raises BadInput where `root` itself may not be listed.
    """
    opened: list[tuple[Iterator[os.DirEntry[str]], str, re.Match[str] | None]]
    at = str(root).rstrip("/")
    try:
        opened = [(_listed(root), "", None)]
    except OSError as error:
        raise BadInput(f"{root}: cannot be listed: {error.strerror}; change its permissions") from None
    while opened:  # no recursion: folders may be nested deeper than calls
        entries, relative, folder = opened[-1]
        entry = next(entries, None)
        if entry is None:
            opened.pop()
            continue
        name = f"{relative}/{entry.name}" if relative else entry.name
        if entry.name.startswith("."):
            yield Skipped(printable(name), "hidden")
        elif entry.is_dir(follow_symlinks=False):
            if entry.name.lower() in PEERS_CACHES:
                yield Skipped(printable(name), "a folder of another program's cache")
                continue
            try:
                opened.append((_listed(root / name), name, REPEATS.fullmatch(entry.name) or folder))
            except OSError as error:
                yield Skipped(printable(name), f"a folder that cannot be listed: {error.strerror}")
        elif entry.is_symlink() and _leads_to_folder(entry):
            yield Skipped(printable(name), "a link to a folder, which is not entered")
        else:
            yield Entry(name, at, _kind_problem(root, home, name, entry), folder)


def _listed(folder: Path) -> Iterator[os.DirEntry[str]]:
    """By name; each is let go of once it was given, since a folder may hold a million."""
    with os.scandir(folder) as listing:
        found = sorted(listing, key=lambda entry: entry.name, reverse=True)
    return (found.pop() for _ in range(len(found)))


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    """False for a link to itself."""
    try:
        return link.is_dir()
    except OSError:
        return False


def _kind_problem(root: Path, home: Path, name: str, entry: os.DirEntry[str]) -> Problem | None:
    """Why the file is not opened: not regular, a link out of the folder, a name that is no text. Opens nothing."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return Problem("file", "the file's name is not UTF-8; rename it")
    if entry.is_symlink():
        try:
            target = (root / name).resolve(strict=True)
        except (OSError, RuntimeError):
            return Problem("file", "is a link that leads nowhere; replace it by the file")
        if not target.is_relative_to(home):
            return Problem("file", "is a link to a file outside the folder; copy the file into it")
    return None if entry.is_file() else Problem("file", "is not a regular file; remove it")
