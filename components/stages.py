"""Stage keys and the one cache: a stage whose inputs, configuration and code are unchanged is never run twice.

A result is committed by one catalog row that names its manifest; a result whose bytes are gone or wrong is
produced again ("repaired"), never returned.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from filelock import FileLock

from components.catalog import results
from components.catalog.database import Catalog
from components.curation.memory import hash_files, reading_in_place
from components.errors import DamagedArtifact
from components.storage import ObjectRef, Store
from components.workspace import Workspace

Outcome = Literal["reused", "produced", "repaired"]

STAGE_VERSIONS = {"curate": 2, "cache": 1, "fine-tune": 1, "generate": 1, "evaluate": 1, "register": 1, "study": 1}


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def stage_key(stage: str, *, inputs: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """First 32 hex of sha256 over {stage, version, input digests, the stage's own configuration}.

    Base weights, seed and dtype count as inputs or configuration of the stages that use them.
    """
    body = {"stage": stage, "version": STAGE_VERSIONS[stage], "inputs": dict(inputs), "config": dict(config)}
    return hashlib.sha256(canonical_json(body)).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Product:
    """What a stage made: named objects, small facts (JSON), and how many items it worked on."""

    outputs: dict[str, ObjectRef]
    facts: dict[str, Any] = field(default_factory=dict)
    items: int = 0


@dataclass(frozen=True, slots=True)
class StageResult:
    """A committed result, with how it was come by this time."""

    stage: str
    key: str
    outcome: Outcome
    seconds: float
    product: Product

    @property
    def bytes(self) -> int:
        return sum(ref.bytes for ref in self.product.outputs.values())


@dataclass(frozen=True, slots=True)
class Bench:
    """Where stages do their work: the workspace's folders, its object store and its catalog."""

    workspace: Workspace
    store: Store
    catalog: Catalog

    @classmethod
    def open(cls, workspace: Workspace) -> "Bench":
        return cls.at(workspace, workspace.catalog_url)

    @classmethod
    def at(cls, workspace: Workspace, catalog_url: str) -> "Bench":
        catalog = Catalog(catalog_url)
        return cls(workspace.create(), Store(workspace.objects, reading_in_place(catalog, workspace.objects)), catalog)


def intact(bench: Bench, digests: Iterable[str], *, verify: bool = False) -> set[str]:
    """Those of some objects that are there with the bytes of their names.

    Hashed once: after that an object whose file is unchanged (see memory.py) is known, unless `verify`.
    """
    paths = {bench.store.path(digest): digest for digest in digests}
    found = hash_files(bench.catalog, [path for path in paths if path.exists()], verify=verify)
    return {paths[path] for path, file in found.items() if file.sha256 == paths[path]}


def ensure(
    bench: Bench,
    stage: str,
    key: str,
    produce: Callable[[], Product],
    *,
    run_uid: str | None = None,
    still_there: Callable[[Product], bool] = lambda product: True,
    verify: bool = False,
) -> StageResult:
    """The committed result of `key`: reused when every object it names is intact, else produced and committed.

    Two callers with one key: the second waits for the first and adopts its result. The lock ends with its holder.
    `still_there` checks what a stage keeps outside the store, such as a registered model version. `verify` hashes also
    what is known to be unchanged.
    """
    started = time.monotonic()
    with FileLock(bench.workspace.locks / f"{key}.lock"):
        committed = results.manifest_digest(bench.catalog, key)
        product = _verified(bench, committed, verify) if committed else None
        outcome: Outcome = "reused"
        if product is None or not still_there(product):
            outcome = "repaired" if committed else "produced"
            product = produce()
            manifest = bench.store.put(canonical_json({"stage": stage, "key": key} | asdict(product)))
            results.commit(
                bench.catalog,
                key=key,
                stage=stage,
                version=STAGE_VERSIONS[stage],
                manifest=manifest,
                items=product.items,
                seconds=time.monotonic() - started,
                run_uid=run_uid,
            )
    return StageResult(stage, key, outcome, time.monotonic() - started, product)


def committed(bench: Bench, key: str) -> Product | None:
    """The product of a committed and intact result, or None: what `plan` shows as reusable."""
    digest = results.manifest_digest(bench.catalog, key)
    return _verified(bench, digest) if digest else None


def _verified(bench: Bench, manifest_sha256: str, verify: bool = False) -> Product | None:
    try:
        body = json.loads(bench.store.read(manifest_sha256))
    except (DamagedArtifact, ValueError):
        return None
    outputs = {name: ObjectRef(**ref) for name, ref in body["outputs"].items()}
    if not all(bench.store.holds(ref) for ref in outputs.values()):
        return None
    digests = {ref.sha256 for ref in outputs.values()}
    if intact(bench, digests, verify=verify) != digests:
        return None
    return Product(outputs, body["facts"], body["items"])
