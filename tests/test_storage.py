"""The object store: immutable, verified, and never half-written."""

import errno
import os
from pathlib import Path

import pytest

from components import storage
from components.errors import DamagedArtifact, StorageFull
from components.storage import Store, atomic_write


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
