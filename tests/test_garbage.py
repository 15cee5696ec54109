"""Collecting garbage: what anything needs stays, also when the collector is killed or others write meanwhile."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.catalog import results
from components.catalog.models import (
    Adapter,
    Base,
    EncodedItem,
    Evaluation,
    ExaminedImage,
    Generation,
    ModelVersion,
    Run,
    Snapshot,
    SnapshotItem,
    SourceFile,
    now,
)
from components.curation.manifest import read_manifest
from components.errors import BadInput, DamagedArtifact
from components.garbage import REMEMBERED, is_naming, reachable, survey, sweep
from components.stages import Bench, Product, canonical_json, committed, ensure
from components.storage import ObjectRef, Store
from tests.curation.folders import curated, new_bench, pictures

DAY_S = 86_400
GRACE = timedelta(days=30)
STAGES = ("curate", "cache", "fine-tune", "evaluate", "register", "generate")


def age(store: Store, digest: str, days: float) -> None:
    then = time.time() - days * DAY_S
    os.utime(store.path(digest), (then, then))


def stored(store: Store) -> set[str]:
    return {digest for digest, _ in store.objects()}


def swept(bench: Bench) -> int:
    return sweep(bench, survey(bench, now() - GRACE)).objects


# a workspace in which something rests on something ------------------------------------------------------------------


@dataclass
class World:
    """Random results, rows and folders that name objects, and what a collector must not and what it should delete."""

    bench: Bench
    draw: random.Random
    needed: set[str] = field(default_factory=set)
    keys: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0

    def put(self, data: bytes | None = None) -> ObjectRef:
        self.count += 1
        ref = self.bench.store.put(data or f"object {self.count} of {self.draw.random()}".encode())
        age(self.bench.store, ref.sha256, self.draw.choice((0.5, 29, 31, 400)))
        return ref

    def need(self, data: bytes | None = None) -> str:
        ref = self.put(data)
        self.needed.add(ref.sha256)
        return ref.sha256

    def chain(self, length: int) -> ObjectRef:
        """A document that names a document ... that names an object; all of them needed."""
        ref = self.put()
        self.needed.add(ref.sha256)
        for _ in range(length):
            body = {"next": ref.sha256} if self.draw.random() < 0.7 else [[ref.sha256, ref.bytes]]
            table = io.BytesIO()
            pq.write_table(pa.table({"mask": [None, ref.sha256], "text": ["words", "more"]}), table)
            ref = self.put(self.draw.choice((canonical_json(body), table.getvalue())))
            self.needed.add(ref.sha256)
        return ref

    def result(self) -> None:
        outputs = {str(i): self.chain(self.draw.randrange(3)) for i in range(self.draw.randrange(1, 4))}
        facts = {"also": self.need()} if self.draw.random() < 0.5 else {}
        stage, key = self.draw.choice(STAGES), f"{self.draw.getrandbits(128):032x}"
        self.keys.append((stage, key))
        ensure(self.bench, stage, key, lambda: Product(outputs, facts))
        manifest = results.manifest_digest(self.bench.catalog, key)
        assert manifest is not None
        self.needed.add(manifest)
        age(self.bench.store, manifest, 400)

    def rows(self, number: int) -> None:
        """A row of each table that names objects, and folders that do."""
        with self.bench.catalog.write() as session:
            snapshot = Snapshot(dataset="d", version=number, digest=self.chain(2).sha256, stage_key="k", kept=1,
                                rejected=0, profile={})
            session.add(snapshot)
            session.flush()
            session.add(SnapshotItem(snapshot_id=snapshot.id, ordinal=0, file_name="a", sha256=self.need(), caption="c",
                                     kept=False))
            session.add(EncodedItem(encoder="e", item=f"{number}", shard=self.need(), row=0))
            session.add(Adapter(sha256=self.need(), stage_key="k", step=number))
            session.add(ModelVersion(name="m", version=number, run_uid="r", adapter_sha256=self.need(), aliases=[],
                                     evaluation_key=f"{number}", mlflow_uri=""))
            session.add(Evaluation(key=f"{number}", run_uid="r", fingerprint="f", adapter_sha256=self.need(),
                                   champion_sha256=self.need(), snapshot_digest=self.need(), verdict={},
                                   metrics={"kid": {"of": self.need()}}))
            session.flush()
            session.add(Generation(evaluation_key=f"{number}", role="base", step=0, adapter_sha256=self.need(),
                                   prompt_index=0, prompt="p", seed=0, batch_index=0, batch_row=0,
                                   image_sha256=self.need(), metrics={"nearest": self.need()}))
            session.add(Run(run_uid=f"u{number}", name="n", kind="retrain", status="completed", host="h", pid=1,
                            recipe={"training": {"init_adapter": f"/x/objects/{self.slashed(self.need())}"}},
                            progress={}, card={"adapter": {"sha256": self.need()}}))
            unneeded = self.put()  # a file that was seen and a picture that was examined are no claim
            session.add(SourceFile(path=f"/{number}", size=1, mtime_ns=1, ctime_ns=1, inode=1, seen_ns=1,
                                   sha256=unneeded.sha256))
            session.add(ExaminedImage(sha256=unneeded.sha256, version=1, rgb_digest=None, facts={}))
        home = self.bench.workspace.home
        journal = home / "runs" / f"u{number}" / "journal.jsonl"
        checkpoint = home / "work" / f"k{number}" / "step-00000001" / "manifest.json"
        for path, body in ((journal, {"kind": "image", "body": {"sha256": self.need()}}),
                           (checkpoint, {"facts": {"adapters": {"1": [self.need(), 3]}}})):
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(body))
        (self.bench.workspace.exports / "m" / self.need()[:12]).mkdir(parents=True)

    @staticmethod
    def slashed(digest: str) -> str:
        return f"{digest[:2]}/{digest[2:]}"

    @property
    def expected(self) -> set[str]:
        """What a collector leaves: what is needed, and what is young."""
        limit = time.time() - GRACE.total_seconds()
        young = {digest for digest, state in self.bench.store.objects() if state.st_mtime >= limit}
        return self.needed | young

    def require_whole(self) -> None:
        """Every needed object is intact and every result can be reused."""
        for digest in self.needed:
            assert sha256(self.bench.store.path(digest).read_bytes()).hexdigest() == digest
        for stage, key in self.keys:
            assert committed(self.bench, key) is not None
            assert ensure(self.bench, stage, key, lambda: pytest.fail("made again")).outcome == "reused"


def world(bench: Bench, seed: int, *, results: int = 12, loose: int = 40) -> World:
    made = World(bench, random.Random(seed))
    for number in range(1, 3):
        made.rows(number)
    for _ in range(results):
        made.result()
    for _ in range(loose):
        made.put()
    return made


@pytest.mark.parametrize("seed", range(12))
def test_whatever_rests_on_what_a_collector_that_ends_anywhere_loses_nothing(tmp_path: Path, seed: int):
    made = world(new_bench(tmp_path), seed)
    found = survey(made.bench, now() - GRACE)
    left, expected = random.Random(seed).randrange(len(found.garbage)), made.expected

    def end(_: object) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1

    with pytest.raises(KeyboardInterrupt):
        sweep(made.bench, found, on_delete=end)
    made.require_whole()
    deleted = swept(made.bench)
    assert deleted and stored(made.bench.store) == expected
    made.require_whole()
    assert swept(made.bench) == 0


CHILD = """
import os, signal, sys
from datetime import timedelta
from pathlib import Path
from components.catalog.models import now
from components.garbage import survey, sweep
from tests.curation.folders import new_bench
left = int(sys.argv[2])
def die(_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
bench = new_bench(Path(sys.argv[1]))
sweep(bench, survey(bench, now() - timedelta(days=30)), on_delete=die)
"""


def test_after_a_kill_in_the_middle_everything_needed_is_there_and_the_rest_can_be_deleted(tmp_path: Path):
    made = world(new_bench(tmp_path), 99)
    expected, before = made.expected, len(stored(made.bench.store))
    command = [sys.executable, "-c", CHILD, str(tmp_path), "7"]
    child = subprocess.run(command, cwd=Path(__file__).parents[1], check=False)
    assert child.returncode == -signal.SIGKILL
    assert len(stored(made.bench.store)) == before - 7
    made.require_whole()
    swept(made.bench)
    assert stored(made.bench.store) == expected
    made.require_whole()


# beside others ------------------------------------------------------------------------------------------------------


def test_what_others_want_again_while_it_deletes_is_there_when_they_have_it(tmp_path: Path):
    bench = new_bench(tmp_path)
    contents = [f"object {i}".encode() for i in range(400)]
    refs = [bench.store.put(data) for data in contents]
    for ref in refs:
        age(bench.store, ref.sha256, 100)
    found = survey(bench, now() - GRACE)
    assert len(found.garbage) == 400
    wanted: list[ObjectRef] = []

    def want(turn: int) -> None:
        order = random.Random(turn).sample(range(400), 150)
        for i in order:
            if i % 2 or not bench.store.keep(refs[i]):
                bench.store.put(contents[i])
            wanted.append(refs[i])

    writers = [threading.Thread(target=want, args=(turn,)) for turn in range(3)]
    for writer in writers:
        writer.start()
    deleted = sweep(bench, found).objects
    for writer in writers:
        writer.join()
    assert all(bench.store.intact(ref) for ref in wanted) and len({ref.sha256 for ref in wanted}) > 200
    assert deleted > 0


def test_what_is_put_or_kept_again_is_young(tmp_path: Path):
    bench = new_bench(tmp_path)
    first, second, third = (bench.store.put(data) for data in (b"one", b"two", b"three"))
    for ref in (first, second, third):
        age(bench.store, ref.sha256, 100)
    found = survey(bench, now() - GRACE)
    bench.store.put(b"one")
    assert bench.store.keep(second) and not bench.store.keep(ObjectRef("0" * 64, 3))
    assert sweep(bench, found).objects == 1 and stored(bench.store) == {first.sha256, second.sha256}


def test_a_curation_that_failed_leaves_garbage_and_the_next_takes_its_pictures_up_again(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 5)
    (folder / "000.png").write_bytes(b"")
    with pytest.raises(BadInput):
        curated(bench, folder, strict=True)
    for digest in stored(bench.store):
        age(bench.store, digest, 100)
    found = survey(bench, now() - GRACE)
    assert len(found.garbage) == 4
    rows = read_manifest(bench.store, curated(bench, folder).facts["digest"])  # finds them in the store, puts nothing
    assert sweep(bench, found).objects == 0
    assert all(bench.store.read(row.sha256) for row in rows)


# what is told -------------------------------------------------------------------------------------------------------


def test_a_masks_bytes_are_reachable_through_the_manifest_alone(bench: Bench, tmp_path: Path):
    from components.config import CurationConfig, DataConfig, DataSource
    from components.curation.snapshots import curate

    folder = pictures(tmp_path / "data", 2)
    Image.new("L", (64, 64), 200).save(folder / "000-masklabel.png")
    data = DataConfig(sources=(DataSource(path=str(folder), masks="masklabel"),))
    digest = curate(bench, data, CurationConfig(), dataset="blobs", training_size=64).facts["digest"]
    (mask,) = [row.mask for row in read_manifest(bench.store, digest) if row.mask]
    assert reachable(bench)[0][mask] == "snapshots"


def test_thumbnails_of_what_is_deleted_go_too(bench: Bench):
    kept, lost = bench.store.put(b"one").sha256, bench.store.put(b"two").sha256
    age(bench.store, lost, 100)
    thumbs = [bench.workspace.thumbs / digest[:2] / f"{digest[2:]}-256.webp" for digest in (kept, lost)]
    for thumb in thumbs:
        thumb.parent.mkdir(exist_ok=True)
        thumb.write_bytes(b"webp")
    assert swept(bench) == 1
    assert [thumb.exists() for thumb in thumbs] == [True, False]


def test_an_altered_document_stops_every_deletion_and_one_that_is_gone_does_not(bench: Bench):
    made = world(bench, 5, results=1, loose=5)
    manifest = results.manifest_digest(bench.catalog, made.keys[0][1])
    assert manifest is not None
    bench.store.path(manifest).write_bytes(b'{"altered": true}')
    before = stored(bench.store)
    found = survey(bench, now() - GRACE)
    assert found.damaged == (manifest,)
    with pytest.raises(DamagedArtifact, match="nothing is deleted; run the recipe that made it again"):
        sweep(bench, found)
    assert stored(bench.store) == before
    bench.store.path(manifest).unlink()
    assert swept(bench) > 0 and made.needed & stored(bench.store)


def test_every_column_that_names_objects_is_known_to_this_file():
    """A new one: give it a row in `World.rows`, so that what it names is seen to stay."""
    naming = {f"{name}.{column.name}" for name, table in Base.metadata.tables.items() if name not in REMEMBERED
              for column in table.columns if is_naming(column)}
    assert naming == {
        "adapter.sha256", "encoded_item.shard", "evaluation.adapter_sha256", "evaluation.champion_sha256",
        "evaluation.metrics", "evaluation.snapshot_digest", "evaluation.verdict", "generation.adapter_sha256",
        "generation.image_sha256", "generation.metrics", "model_version.adapter_sha256", "model_version.aliases",
        "run.card", "run.progress", "run.recipe", "snapshot.digest", "snapshot.profile", "snapshot_item.sha256",
        "stage_result.manifest_sha256"}
