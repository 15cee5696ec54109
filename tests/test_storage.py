"""The object store: immutable, verified, and never half-written."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components import storage
from components.catalog.database import Catalog
from components.errors import DamagedArtifact, StorageFull
from components.storage import Store, atomic_write, lack_of_room
from tests.disks import SmallDisk, small_disk


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "objects")


def test_what_is_put_is_read_back_under_the_sha256_of_its_bytes(store: Store):
    ref = store.put(b"abc")
    assert ref.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert store.read(ref.sha256) == b"abc"


def test_the_same_bytes_are_written_once(store: Store, monkeypatch: pytest.MonkeyPatch):
    synced = []
    monkeypatch.setattr(storage.os, "fsync", synced.append)
    store.put(b"abc")
    count = len(synced)
    store.put(b"abc")
    assert len(synced) == count


def test_an_altered_object_is_refused_and_written_again_when_put(store: Store):
    ref = store.put(b"abc")
    store.path(ref.sha256).write_bytes(b"abd")
    assert store.holds(ref)
    assert not store.intact(ref)
    with pytest.raises(DamagedArtifact, match="altered"):
        store.read(ref.sha256)
    store.put(b"abc")
    assert store.read(ref.sha256) == b"abc"


def test_a_missing_object_is_refused(store: Store):
    with pytest.raises(DamagedArtifact, match="is gone"):
        store.read("0" * 64)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_in_one_line_with_the_path(store: Store, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageFull, match=r"no space left to write it \(\d+ bytes free\)"):
        store.put(b"abc")
    assert not [path for path in store.root.rglob("*") if path.is_file()]


# on a disk that is really full ------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        yield disk


def write_object(folder: Path) -> None:
    Store(folder).put(os.urandom(100_000))


def write_file(folder: Path) -> None:
    (folder / "plain").write_bytes(bytes(100_000))


def write_tables(folder: Path) -> None:
    catalog = Catalog(f"sqlite:///{folder / 'catalog.db'}")
    try:
        catalog.migrate()
    finally:
        catalog.engine.dispose()


def write_weights(folder: Path) -> None:
    import torch

    from components.training.checkpoints import save_checkpoint

    save_checkpoint(folder, 1, {"adapter": {"weight": torch.zeros(25_000)}}, {})


def write_and_fail_to_clean_up(folder: Path) -> None:
    try:
        write_object(folder)
    finally:
        raise ZeroDivisionError("the disk is full, so this failed too")


@pytest.mark.parametrize(
    "write",
    [write_object, write_file, write_tables, write_weights, write_and_fail_to_clean_up],
    ids=lambda w: w.__name__,
)
def test_a_full_disk_is_known_behind_every_librarys_own_error(disk: SmallDisk, write: Callable[[Path], None]):
    with pytest.raises(Exception) as caught:
        write(disk.path)
    full = lack_of_room(caught.value, disk.path)
    assert isinstance(full, StorageFull) and str(full).startswith(str(disk.path)) and "\n" not in str(full)
    assert "no space left" in str(full) and "free some space and run the same command again" in str(full)


@pytest.mark.parametrize("write", [write_object, write_tables, write_weights], ids=lambda w: w.__name__)
def test_what_a_full_disk_stopped_is_done_once_there_is_room(disk: SmallDisk, write: Callable[[Path], None]):
    with pytest.raises(Exception):  # noqa: B017
        write(disk.path)
    disk.resize(4096)
    write(disk.path)


def test_other_errors_are_no_lack_of_room(tmp_path: Path):
    assert lack_of_room(PermissionError(errno.EACCES, "no", str(tmp_path)), tmp_path) is None
    assert lack_of_room(ZeroDivisionError(), tmp_path) is None
