"""Cached latents go when no snapshot asks for them any more, and never while a run is at work."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from components.catalog.models import EncodedItem, ModelVersion, Run, Snapshot, StageResultRow, StageRun, now
from components.garbage import survey, sweep
from components.stages import Bench, Product, ensure
from components.stale import NOTHING, find_stale, forget
from components.storage import ObjectRef
from components.workspace import Workspace

DAY = timedelta(days=1)
SPAN = 30 * DAY
NOBODY = frozenset()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench.open(Workspace(tmp_path))
    bench.catalog.migrate()
    return bench


def shard(bench: Bench, name: str) -> ObjectRef:
    """A shard with one item of its name, written long ago."""
    ref = bench.store.put(f"shard {name}".encode())
    with bench.catalog.write() as session:
        session.add(EncodedItem(encoder="e", item=name, shard=ref.sha256, row=0))
    return ref


def passed(bench: Bench, dataset: str, version: int, *shards: ObjectRef, days: float) -> str:
    """A run of a snapshot, so many days ago, through a caching stage that names these shards; returns the key."""
    key, uid, then = f"{dataset}{version}".ljust(32, "0"), f"{dataset}-{version}", now() - days * DAY
    index = bench.store.put(f"index of {key}".encode())
    ensure(bench, "cache", key, lambda: Product({"index": index} | {ref.sha256: ref for ref in shards}), run_uid=uid)
    with bench.catalog.write() as session:
        snapshot = Snapshot(dataset=dataset, version=version, digest=key, stage_key=key, kept=1, rejected=0, profile={})
        session.add(snapshot)
        session.flush()
        session.add(
            Run(
                run_uid=uid,
                name="n",
                kind="retrain",
                status="completed",
                recipe={},
                created_at=then,
                host="h",
                pid=1,
                snapshot_id=snapshot.id,
                progress={},
                card={},
            )
        )
        session.flush()
        session.add(StageRun(run_uid=uid, stage="cache", key=key, outcome="produced", seconds=1, items=1, bytes=1))
        row = session.get(StageResultRow, key)
        assert row is not None
        row.created_at = then
    return key


def begin(bench: Bench, uid: str = "later") -> None:
    with bench.catalog.write() as session:
        session.add(
            Run(
                run_uid=uid,
                name="n",
                kind="retrain",
                status="running",
                recipe={},
                host="h",
                pid=1,
                progress={},
                card={},
            )
        )


def grow_old(bench: Bench) -> None:
    then = time.time() - 400 * 86_400
    for path in bench.workspace.home.rglob("*"):
        if path.is_file() and path.is_relative_to(bench.workspace.objects):
            os.utime(path, (then, then))


def items(bench: Bench) -> set[str]:
    with bench.catalog.read() as session:
        return set(session.scalars(select(EncodedItem.item)))


def test_the_newest_snapshots_latents_stay_and_so_does_what_a_late_run_or_a_notebook_has(bench: Bench):
    shared, old, new, late, other = (shard(bench, name) for name in ("shared", "old", "new", "late", "other"))
    first = passed(bench, "cats", 1, shared, old, days=90)
    passed(bench, "cats", 2, late, days=10)
    passed(bench, "cats", 3, shared, new, days=80)
    passed(bench, "dogs", 1, other, days=300)
    notebooks = shard(bench, "notebook")
    ensure(bench, "cache", "n" * 32, lambda: Product({notebooks.sha256: notebooks}))
    grow_old(bench)
    before = now() - SPAN
    stale = find_stale(bench, before, NOBODY)
    assert stale.shards == {old.sha256}
    assert forget(bench, stale, NOBODY)
    found = survey(bench, before)
    assert old.sha256 in {one.sha256 for one in found.garbage}
    sweep(bench, found)
    assert items(bench) == {"shared", "new", "late", "other", "notebook"}
    assert not bench.store.holds(old) and all(bench.store.intact(ref) for ref in (shared, new, late, other, notebooks))
    assert ensure(bench, "cache", first, lambda: Product({})).outcome == "produced"


def test_a_dry_run_counts_what_is_stale_and_forgets_nothing(bench: Bench):
    old = shard(bench, "old")
    passed(bench, "cats", 1, old, days=90)
    passed(bench, "cats", 2, days=90)
    grow_old(bench)
    before = now() - SPAN
    found = survey(bench, before, find_stale(bench, before, NOBODY))
    assert old.sha256 in {one.sha256 for one in found.garbage} and items(bench) == {"old"}
    assert old.sha256 in {one.sha256 for one in survey(bench, before).reachable}


def test_nothing_is_stale_while_a_run_is_at_work_and_nothing_is_forgotten_once_one_has_begun(bench: Bench):
    old = shard(bench, "old")
    passed(bench, "cats", 1, old, days=90)
    passed(bench, "cats", 2, days=90)
    stale = find_stale(bench, now() - SPAN, NOBODY)
    assert stale.shards == {old.sha256}
    begin(bench)
    assert find_stale(bench, now() - SPAN, NOBODY) == NOTHING
    assert not forget(bench, stale, NOBODY) and items(bench) == {"old"}
    with bench.catalog.read() as session:
        dead = frozenset(
            (run.run_uid, run.heartbeat_at) for run in session.scalars(select(Run)) if run.status == "running"
        )
    assert find_stale(bench, now() - SPAN, dead) == stale
    with bench.catalog.write() as session:  # its process is taken up again
        run = session.get(Run, "later")
        assert run is not None
        run.heartbeat_at = now()
    assert not forget(bench, stale, dead)


def test_bases_whose_adapter_no_version_has_go_and_the_base_that_they_link_to_stays(bench: Bench, tmp_path: Path):
    weights = tmp_path / "base" / "unet"
    weights.mkdir(parents=True)
    (weights / "model").write_bytes(b"weights")
    with bench.catalog.write() as session:
        session.add(
            ModelVersion(
                name="m", version=1, run_uid="r", adapter_sha256="a" * 64, aliases=[], evaluation_key="k", mlflow_uri=""
            )
        )
    for name in ("a" * 16, "b" * 16):
        folder = bench.workspace.bases / name
        folder.mkdir(parents=True)
        (folder / "unet").symlink_to(weights)
        (folder / "tokens").write_bytes(b"words")
        os.utime(folder, (0, 0))
    before = now() - SPAN
    found = survey(bench, before, find_stale(bench, before, NOBODY))
    assert [(left.path.name, left.bytes, left.kind) for left in found.leftovers] == [
        ("b" * 16, 5, "bases with tokens")]  # fmt: skip
    assert sweep(bench, found).objects == 1
    assert [folder.name for folder in bench.workspace.bases.iterdir()] == ["a" * 16]
    assert (weights / "model").read_bytes() == b"weights"


def test_what_killed_processes_left_behind_goes_when_it_is_old(bench: Bench):
    made = [
        bench.workspace.pieces / "e" / "shape-digest",
        bench.workspace.pieces / "e" / ".shape-digest.x.part",
        bench.workspace.objects / "ab" / ".cdef.x.part",
    ]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1234")
    before = now() - SPAN
    assert survey(bench, before).leftovers == ()
    for path in made:
        os.utime(path, (0, 0))
    found = survey(bench, before)
    assert sorted(left.kind for left in found.leftovers) == ["latents of no shard"] + ["unfinished writes"] * 2
    assert sweep(bench, found).bytes == 12 and not any(path.exists() for path in made)
