"""Stage results: the rows that make a result real."""

from sqlalchemy import select

from components.catalog.database import Catalog
from components.catalog.models import StageResultRow
from components.storage import ObjectRef


def manifest_digest(catalog: Catalog, key: str) -> str | None:
    """The sha256 of the committed result's manifest, or None when the stage was never finished under this key."""
    with catalog.read() as session:
        return session.scalar(select(StageResultRow.manifest_sha256).where(StageResultRow.key == key))


def commit(
    catalog: Catalog,
    *,
    key: str,
    stage: str,
    version: int,
    manifest: ObjectRef,
    items: int,
    seconds: float,
    run_uid: str | None,
) -> None:
    """Make a result real, or replace the row of one that was repaired."""
    with catalog.write() as session:
        session.merge(
            StageResultRow(
                key=key,
                stage=stage,
                version=version,
                manifest_sha256=manifest.sha256,
                items=items,
                seconds=seconds,
                run_uid=run_uid,
            )
        )
