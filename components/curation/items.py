"""What a source gives: pictures with what is said of them, and the files that are none, each with the reason."""

from dataclasses import dataclass, field
from pathlib import Path

PICTURE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl",
    ".svg", ".eps", ".psd",  # the decoder refuses what it does not know, with a verdict that says so
})
NO_PICTURES = ("-masklabel", "-condlabel")  # stems' endings: masks and conditions, in other trainers' layout
SPLITS = {"train": "train", "training": "train", "test": "test", "validation": "test", "valid": "test", "val": "test"}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file cannot become a sample, under the name of the check that says so."""

    check: str
    reason: str


@dataclass(frozen=True, slots=True)
class Member:
    """A picture inside a file that holds many: where, and what its bytes are."""

    place: tuple[int, int]  # of a tar: offset and size in bytes; of a table: row group and row in it
    column: str  # of a table, the one that holds pictures; of a tar: ""
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Item:
    """A picture as its source presents it: where it lies, what is said of it, or why it cannot be used."""

    file_name: str  # relative to the source's folder, with forward slashes; unique over all sources
    location: str | None  # the file, or the one that holds it as a member; None when it must not be opened
    caption: str = ""
    problem: Problem | None = None
    group: str | None = None
    split: str | None = None  # "train" or "test" where the source says so
    licence: str | None = None
    author: str | None = None
    source: str | None = None
    repeats: int = 1
    fallback: bool = False  # the caption is the folder's class tokens
    variants: tuple[str, ...] = ()  # other captions of it
    mask: str | None = None  # the file that says where the picture counts; the picture itself: its alpha channel
    member: Member | None = None
    is_reg: bool = False  # a picture of the class, trained on to keep what the base knows of it
    origin: int = 0  # which of the recipe's sources it is from
    caption_by: str | None = None  # who wrote the caption, where it is not the source's

    @property
    def path(self) -> Path | None:
        """`location`, which is kept as text: a path takes several times its memory, and there may be a million."""
        return None if self.location is None else Path(self.location)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder of a source that is no picture and was not needed to read one."""

    file_name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """What one source holds."""

    items: list[Item]
    skipped: list[Skipped] = field(default_factory=list)


def is_picture(file_name: str) -> bool:
    ending = ending_of(file_name)
    return ending.lower() in PICTURE_SUFFIXES and not file_name.removesuffix(ending).endswith(NO_PICTURES)


def ending_of(file_name: str) -> str:
    """The ending of a file's name with its dot, or nothing: `PurePath.suffix` in a tenth of its time."""
    name = file_name.rpartition("/")[2]
    at = name.rfind(".")
    return name[at:] if 0 < at < len(name) - 1 else ""


def printable(name: object) -> str:
    """Text that can be stored and shown, whatever bytes the name is made of; the same object where it is such text."""
    text = str(name)
    shown = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if shown == text else shown
