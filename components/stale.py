"""Cached latents that no snapshot asks for any more: named by the catalog, made again at the cost of encoding them.

A result of the caching stage is wanted while a run of a data set's newest snapshot has it, while a run has passed
through it lately, or when no run ever has (a notebook's, of which nobody knows). Its shards are stale with it unless a
wanted result names them. The folder of a base with an adapter's tokens is stale when no registered version has the
adapter.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import Select, delete, func, select, text
from sqlalchemy.orm import Session

from components.catalog.models import EncodedItem, ModelVersion, Run, Snapshot, StageResultRow, StageRun
from components.errors import DamagedArtifact
from components.stages import Bench

BASE_DIGITS = 16  # of an adapter's sha256 in the name of its base's folder
QUERY_ITEMS = 500  # values in one SQL statement
INDEX = "index"  # the one output of the caching stage that is no shard
Dead = frozenset[tuple[str, datetime]]  # runs that the catalog calls running and that are not: uid and last heartbeat


@dataclass(frozen=True, slots=True)
class Stale:
    """What may be forgotten, all of it together, as long as no run is at work."""

    manifests: frozenset[str] = frozenset()  # of results of the caching stage
    shards: frozenset[str] = frozenset()
    bases: tuple[Path, ...] = ()


NOTHING = Stale()


def find_stale(bench: Bench, before: datetime, dead: Dead) -> Stale:
    """What nobody has asked for since `before`; nothing at all while a run is at work that is not among the `dead`."""
    with bench.catalog.read() as session:
        if _at_work(session, dead):
            return NOTHING
        wanted = set(session.scalars(_wanted_keys(before)))
        known = set(session.scalars(select(StageRun.key).where(StageRun.stage == "cache")))
        results = session.execute(
            select(StageResultRow.key, StageResultRow.manifest_sha256, StageResultRow.created_at).where(
                StageResultRow.stage == "cache"
            )
        ).all()
        adapters = {sha256[:BASE_DIGITS] for sha256 in session.scalars(select(ModelVersion.adapter_sha256))}
    old = {row.manifest_sha256 for row in results if row.key in known - wanted and row.created_at < before}
    kept = {row.manifest_sha256 for row in results} - old
    shards = _shards_of(bench, old) - _shards_of(bench, kept)
    bases = [
        folder
        for folder in sorted(bench.workspace.bases.glob("[!.]*"))
        if folder.name not in adapters and folder.stat().st_mtime < before.timestamp()
    ]
    return Stale(frozenset(old), frozenset(shards), tuple(bases))


def forget(bench: Bench, stale: Stale, dead: Dead) -> bool:
    """Take what is stale out of the catalog, in one transaction; False, with nothing done, if a run has begun since.

    A run that begins later finds no rows and encodes again. Bytes go with the next sweep, and not if they are wanted
    again by then.
    """
    with bench.catalog.write() as session:
        if session.get_bind().dialect.name == "postgresql":
            session.execute(text(f"LOCK TABLE {Run.__tablename__} IN SHARE MODE"))  # no run begins meanwhile
        if _at_work(session, dead):
            return False
        for shards in _chunks(sorted(stale.shards)):
            session.execute(delete(EncodedItem).where(EncodedItem.shard.in_(shards)))
        for manifests in _chunks(sorted(stale.manifests)):
            session.execute(delete(StageResultRow).where(StageResultRow.manifest_sha256.in_(manifests)))
    return True


def _at_work(session: Session, dead: Dead) -> bool:
    running = session.execute(select(Run.run_uid, Run.heartbeat_at).where(Run.status == "running")).all()
    return any(tuple(row) not in dead for row in running)


def _wanted_keys(before: datetime) -> Select[tuple[str]]:
    newest = select(func.max(Snapshot.id)).group_by(Snapshot.dataset)
    return (
        select(StageRun.key)
        .join(Run, Run.run_uid == StageRun.run_uid)
        .where(StageRun.stage == "cache", Run.snapshot_id.in_(newest) | (Run.created_at >= before))
    )


def _shards_of(bench: Bench, manifests: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for manifest in manifests:
        try:
            outputs = json.loads(bench.store.read(manifest))["outputs"]
        except DamagedArtifact:  # of what is gone nothing is known, and what was altered stops every deletion
            continue
        found |= {ref["sha256"] for name, ref in outputs.items() if name != INDEX}
    return found


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    yield from (values[start : start + QUERY_ITEMS] for start in range(0, len(values), QUERY_ITEMS))
