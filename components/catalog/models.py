"""The catalog's tables. Bytes live in the object store; rows hold digests, words and numbers."""

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    MetaData,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Instant(TypeDecorator[datetime]):
    """A moment in UTC; SQLite forgets the zone, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: JSON,
        list[Any]: JSON,
        datetime: Instant(),
        float: Double(),
    }


def now() -> datetime:
    return datetime.now(UTC)


# what a folder holds, and what its pictures are -------------------------------------------------------------------


class SourceFile(Base):
    """A file as last seen on disk: unchanged stat means unchanged bytes, unless it was younger than two seconds."""

    __tablename__ = "source_file"
    path: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    mtime_ns: Mapped[int] = mapped_column(BigInteger)
    ctime_ns: Mapped[int] = mapped_column(BigInteger)
    inode: Mapped[int] = mapped_column(BigInteger)
    seen_ns: Mapped[int] = mapped_column(BigInteger)  # clock at the scan that hashed it
    sha256: Mapped[str] = mapped_column(index=True)


class SourceNote(Base):
    """What was learnt from a file as last seen on disk: a caption's bytes, what an archive holds. See SourceFile."""

    __tablename__ = "source_note"
    path: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)  # what was learnt, and by which version of the code
    size: Mapped[int] = mapped_column(BigInteger)
    mtime_ns: Mapped[int] = mapped_column(BigInteger)
    ctime_ns: Mapped[int] = mapped_column(BigInteger)
    inode: Mapped[int] = mapped_column(BigInteger)
    seen_ns: Mapped[int] = mapped_column(BigInteger)
    body: Mapped[bytes]


class ExaminedImage(Base):
    """What one decode of these bytes told: facts for the checks, or why they are unreadable."""

    __tablename__ = "examined_image"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)  # of the examining code
    rgb_digest: Mapped[str | None] = mapped_column(index=True)  # None: unreadable
    facts: Mapped[dict[str, Any]]


class MeasuredItem(Base):
    """Figures that a measure found in a picture, or in a picture and its caption: little-endian float64."""

    __tablename__ = "measured_item"
    measure: Mapped[str] = mapped_column(primary_key=True)  # its name and revision
    item: Mapped[str] = mapped_column(primary_key=True)  # digest of the pixels, with the caption's where it is read
    figures: Mapped[bytes]


class StoredCaption(Base):
    """A version of a picture's caption that no source holds: a person's for one dataset, or a model's. Append-only.

    Of a captioner's the newest with the same revision and prompt counts; of people's the newest of the dataset, and one
    without text says that the source's counts again.
    """

    __tablename__ = "stored_caption"
    __table_args__ = (
        UniqueConstraint("sha256", "dataset", "author", "revision", "prompt_hash", "version",
                         name="uq_stored_caption_version"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(index=True)  # of the picture's bytes
    dataset: Mapped[str] = mapped_column(index=True)  # "": of any, a model's
    author: Mapped[str]  # a captioner's name or a person's
    kind: Mapped[str]  # "person", "prose", "tags", "both"
    source: Mapped[str]  # of the captioner: folder or owner/name@commit; "": a person
    revision: Mapped[str]  # digest of its weights, or their commit
    prompt: Mapped[str]
    prompt_hash: Mapped[str]  # of the prompt and the captioner's settings
    version: Mapped[int]
    text: Mapped[str]
    tags: Mapped[list[Any]]  # [tag, score, category], the likeliest first
    created_at: Mapped[datetime] = mapped_column(default=now)


class EncodedItem(Base):
    """Where a latent or a prompt embedding lies: row `row` of the safetensors object `shard`."""

    __tablename__ = "encoded_item"
    encoder: Mapped[str] = mapped_column(primary_key=True)  # digest of weights, preprocessing, dtype, code version
    item: Mapped[str] = mapped_column(primary_key=True)  # rgb digest, or sha256 of a caption
    shard: Mapped[str] = mapped_column(index=True)
    row: Mapped[int]


class Snapshot(Base):
    """An immutable version of a dataset; `digest` is the sha256 of its manifest."""

    __tablename__ = "snapshot"
    __table_args__ = (UniqueConstraint("dataset", "version"), UniqueConstraint("dataset", "digest"))
    id: Mapped[int] = mapped_column(primary_key=True)
    dataset: Mapped[str]
    version: Mapped[int]
    digest: Mapped[str] = mapped_column(index=True)
    stage_key: Mapped[str]
    kept: Mapped[int]
    rejected: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(default=now)
    profile: Mapped[dict[str, Any]]  # counts per split, check and licence; sizes; largest duplicate groups


class SnapshotItem(Base):
    """One file of a snapshot, kept or rejected. Caption, licence and source belong to (snapshot, file)."""

    __tablename__ = "snapshot_item"
    __table_args__ = (Index("ix_snapshot_item_page", "snapshot_id", "kept", "ordinal"),)
    snapshot_id: Mapped[int] = mapped_column(ForeignKey("snapshot.id", ondelete="CASCADE"), primary_key=True)
    ordinal: Mapped[int] = mapped_column(primary_key=True)
    file_name: Mapped[str]
    sha256: Mapped[str | None] = mapped_column(index=True)  # None: the file could not even be read
    rgb_digest: Mapped[str | None]
    caption: Mapped[str]
    kept: Mapped[bool]
    split: Mapped[str | None]  # "train" or "test", of a dropped duplicate as well; None when rejected otherwise
    group: Mapped[str | None]  # concept, subject, burst: never crosses splits
    component: Mapped[str | None]  # duplicates and groups joined; never crosses splits
    width: Mapped[int | None]
    height: Mapped[int | None]
    licence: Mapped[str | None]
    author: Mapped[str | None]
    source: Mapped[str | None]


class Verdict(Base):
    """One check's word on one file: "flag" or "reject", with score, threshold and reason (passes are not stored)."""

    __tablename__ = "verdict"
    id: Mapped[int] = mapped_column(primary_key=True)
    snapshot_id: Mapped[int] = mapped_column(ForeignKey("snapshot.id", ondelete="CASCADE"), index=True)
    ordinal: Mapped[int]
    check: Mapped[str] = mapped_column(index=True)
    version: Mapped[str | None]  # of the check; None: written before checks told theirs
    decision: Mapped[str]
    score: Mapped[float | None]
    threshold: Mapped[float | None]
    reason: Mapped[str]


# what ran, and what it made ---------------------------------------------------------------------------------------


class Run(Base):
    """One execution of a flow. Its results belong to stage keys; the run says who asked for them and when."""

    __tablename__ = "run"
    run_uid: Mapped[str] = mapped_column(primary_key=True)  # UUIDv7, so ordering by it is ordering by time
    name: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]  # "retrain", "pretrain", "evaluate", ...
    status: Mapped[str] = mapped_column(index=True)  # running, completed, failed, stopped, crashed
    recipe: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)
    heartbeat_at: Mapped[datetime] = mapped_column(default=now)
    ended_at: Mapped[datetime | None]
    host: Mapped[str]
    pid: Mapped[int]
    git_commit: Mapped[str | None]
    snapshot_id: Mapped[int | None] = mapped_column(ForeignKey("snapshot.id"), index=True)
    prefect_flow_run_id: Mapped[str | None]
    mlflow_run_id: Mapped[str | None] = mapped_column(index=True)
    progress: Mapped[dict[str, Any]]  # stage, done, total, latest loss: what the live view shows
    card: Mapped[dict[str, Any]]  # the document that `retrain --json` prints; empty until the end
    error: Mapped[str | None]


class StageResultRow(Base):
    """The commit of a stage: this row exists if and only if the result is complete."""

    __tablename__ = "stage_result"
    key: Mapped[str] = mapped_column(primary_key=True)
    stage: Mapped[str] = mapped_column(index=True)
    version: Mapped[int]
    manifest_sha256: Mapped[str]
    items: Mapped[int]
    seconds: Mapped[float]
    run_uid: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class StageRun(Base):
    """A run's passage through a stage: reused, produced or repaired, and what it cost."""

    __tablename__ = "stage_run"
    run_uid: Mapped[str] = mapped_column(ForeignKey("run.run_uid", ondelete="CASCADE"), primary_key=True)
    stage: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(index=True)
    outcome: Mapped[str]
    seconds: Mapped[float]
    items: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger)


class Adapter(Base):
    """A checkpoint of a fine-tuning. `sha256` names the safetensors object in the diffusers layout."""

    __tablename__ = "adapter"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    stage_key: Mapped[str] = mapped_column(index=True)
    step: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(default=now)


class Evaluation(Base):
    """A gallery with its metrics and the gate's verdict."""

    __tablename__ = "evaluation"
    key: Mapped[str] = mapped_column(primary_key=True)  # stage key
    run_uid: Mapped[str] = mapped_column(index=True)  # the run that first produced it
    fingerprint: Mapped[str]  # of prompts, seeds, sampler, base, references, micro-batch, threads
    adapter_sha256: Mapped[str] = mapped_column(index=True)
    champion_sha256: Mapped[str | None]
    snapshot_digest: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    verdict: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class Generation(Base):
    """An image sampled from base (+ adapter), with everything needed to sample it again."""

    __tablename__ = "generation"
    __table_args__ = (UniqueConstraint("evaluation_key", "role", "step", "prompt_index", "seed"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    evaluation_key: Mapped[str] = mapped_column(ForeignKey("evaluation.key", ondelete="CASCADE"), index=True)
    role: Mapped[str]  # base, champion, candidate
    step: Mapped[int]  # of the adapter's checkpoint; 0 for the base
    adapter_sha256: Mapped[str | None] = mapped_column(index=True)
    prompt_index: Mapped[int]
    prompt: Mapped[str]
    group: Mapped[str | None]  # the held-out concept the prompt asks for
    seed: Mapped[int] = mapped_column(BigInteger)
    batch_index: Mapped[int]  # micro-batch in which it was made, and its row there: bits depend on the batch shape
    batch_row: Mapped[int]
    image_sha256: Mapped[str] = mapped_column(index=True)
    metrics: Mapped[dict[str, Any]]  # per image: prompt rank, nearest training sample and similarity


class ModelVersion(Base):
    """A registered version, mirrored from the MLflow registry for joins; `aliases` as last seen there."""

    __tablename__ = "model_version"
    name: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    run_uid: Mapped[str] = mapped_column(index=True)
    adapter_sha256: Mapped[str] = mapped_column(index=True)
    evaluation_key: Mapped[str]
    mlflow_uri: Mapped[str]
    aliases: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


# what people decided ----------------------------------------------------------------------------------------------


class Review(Base):
    """One act of a reviewer on a generation; append-only, the newest act of each kind counts."""

    __tablename__ = "review"
    __table_args__ = (UniqueConstraint("reviewer", "idempotency_key"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    generation_id: Mapped[int] = mapped_column(ForeignKey("generation.id", ondelete="CASCADE"), index=True)
    reviewer: Mapped[str]
    kind: Mapped[str]  # "stars" (value 0-5, 0 clears), "flag" (0 or 1), "comment" (text)
    value: Mapped[int | None]
    text: Mapped[str | None]
    idempotency_key: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=now)


class Promotion(Base):
    """The audit trail of the registry's aliases: who moved what, when and why."""

    __tablename__ = "promotion"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
    version: Mapped[int]
    previous_version: Mapped[int | None]
    decided_by: Mapped[str]  # "gate", a reviewer's name, or "outside" when found moved in MLflow
    reason: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=now)
