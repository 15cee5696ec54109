"""Content-addressed objects: immutable bytes named by their sha256, written so that a crash leaves all or nothing."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from components.errors import DamagedArtifact, StorageFull

CHUNK = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_ROOM_WORDS = (  # of libraries that raise errors of their own: safetensors, pyarrow and SQLite
    "No space left on device",
    "Disk quota exceeded",
    "database or disk is full",
)


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """A stored object: `sha256` (64 hex) of its bytes and their number."""

    sha256: str
    bytes: int


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hex digits, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_dir(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lack_of_room(error: BaseException, folder: Path) -> StorageFull | None:
    """What `error` comes down to when a full disk is behind it, or None. `folder` is named if the error names no file.

    Libraries report a full disk in words of their own, and what fails while they clean up hides it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StorageFull):
            return cause
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            return _storage_full(Path(cause.filename) if isinstance(cause.filename, str) else folder)
        if any(words in str(cause) for words in NO_ROOM_WORDS):
            return _storage_full(folder)
        cause = cause.__cause__ or cause.__context__
    return None


def _storage_full(path: Path) -> StorageFull:
    there = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    what = "in it" if path.is_dir() else "to write it"
    return StorageFull(
        f"{path}: no space left {what} ({free} bytes free); free some space and run the same command again"
    )


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Write `path` through a temporary name in the same folder: fsync, rename, fsync the folder.

    The file appears whole or not at all. Raises StorageFull, naming the path, when the disk has no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)  # mkstemp's 0600 would keep a team from reading what one of them made
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
        fsync_dir(path.parent)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        if error.errno in NO_ROOM:
            raise _storage_full(path) from error
        raise
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class Store:
    """Objects under `root`, each at `ab/cdef...` after its sha256."""

    root: Path
    elsewhere: Callable[[str], bytes | None] | None = None  # looks for the bytes of an object that is not there

    def path(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256[2:]

    @contextmanager
    def lock(self, *, alone: bool) -> Iterator[None]:
        """Whoever keeps an object shares it, whoever deletes one holds it alone: what is wanted again is not lost."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root.with_name(f"{self.root.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    def put(self, data: bytes) -> ObjectRef:
        """Keep `data`; writing the same bytes twice writes once, and makes the object young again."""
        ref = ObjectRef(hashlib.sha256(data).hexdigest(), len(data))
        with self.lock(alone=False):
            if not (self.intact(ref) and self._renew(ref)):
                with atomic_write(self.path(ref.sha256)) as file:
                    file.write(data)
        return ref

    def put_file(self, path: Path) -> ObjectRef:
        """Keep a copy of the file's present bytes; the file itself is left alone."""
        ref = ObjectRef(sha256_of(path), path.stat().st_size)
        with self.lock(alone=False):
            if not (self.intact(ref) and self._renew(ref)):
                digest = hashlib.sha256()
                with path.open("rb") as source, atomic_write(self.path(ref.sha256)) as target:
                    while chunk := source.read(CHUNK):
                        digest.update(chunk)
                        target.write(chunk)
                    if digest.hexdigest() != ref.sha256:
                        raise DamagedArtifact(f"{path}: changed while it was being read; run the same command again")
        return ref

    def keep(self, ref: ObjectRef) -> bool:
        """`holds`, for an object that is going to be used again: it is as young as if it had been put now."""
        with self.lock(alone=False):
            return self.holds(ref) and self._renew(ref)

    def _renew(self, ref: ObjectRef) -> bool:
        """Set the object's time to now; False where that is not allowed, since it is somebody else's file."""
        try:
            os.utime(self.path(ref.sha256))
        except (FileNotFoundError, PermissionError):
            return False
        return True

    def objects(self) -> Iterator[tuple[str, os.stat_result]]:
        """The sha256 and the state of every object, in no particular order; unfinished writes are left out."""
        with os.scandir(self.root) as folders:
            prefixes = sorted(folder.name for folder in folders if len(folder.name) == 2 and folder.is_dir())
        for prefix in prefixes:
            with os.scandir(self.root / prefix) as files:
                for file in files:
                    if SHA256.fullmatch(prefix + file.name):
                        with suppress(FileNotFoundError):
                            yield prefix + file.name, file.stat(follow_symlinks=False)

    def holds(self, ref: ObjectRef) -> bool:
        """Whether an object of this name and size is there (its bytes are not hashed)."""
        try:
            return self.path(ref.sha256).stat().st_size == ref.bytes
        except FileNotFoundError:
            return False

    def intact(self, ref: ObjectRef) -> bool:
        """Whether the object is there and its bytes still hash to its name."""
        return self.holds(ref) and sha256_of(self.path(ref.sha256)) == ref.sha256

    def read(self, sha256: str) -> bytes:
        """The object's bytes, verified, or those that `elsewhere` finds. Raises DamagedArtifact: gone or altered."""
        try:
            data = self.path(sha256).read_bytes()
        except FileNotFoundError:
            if self.elsewhere and (found := self.elsewhere(sha256)) is not None:
                return found
            raise DamagedArtifact(
                f"object {sha256} is gone from {self.root}; run the stage that made it again"
            ) from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedArtifact(f"object {sha256} in {self.root} was altered; run the stage that made it again")
        return data
