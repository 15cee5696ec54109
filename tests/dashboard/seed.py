"""Fills a workspace with rows and real pictures such as a few weeks of retraining leave behind.

`python -m tests.dashboard.seed FOLDER` makes one to look at: SAFELIGHT_HOME=FOLDER uvicorn dashboard.asgi:app
"""

import hashlib
import json
import math
import random
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter
from sqlalchemy import insert

from components.catalog.models import (
    Adapter,
    Evaluation,
    Generation,
    ModelVersion,
    Promotion,
    Review,
    Run,
    Snapshot,
    SnapshotItem,
    StageRun,
    Verdict,
    now,
)
from components.stages import Bench
from components.workspace import Workspace

PALETTE = {
    "red": (229, 83, 45),
    "orange": (244, 166, 24),
    "green": (75, 146, 104),
    "blue": (46, 134, 171),
    "purple": (127, 92, 171),
}
CONCEPTS = (
    "rocket",
    "paper plane",
    "anchor",
    "bicycle",
    "lemon",
    "hourglass",
    "umbrella",
    "cactus",
    "teapot",
    "compass",
    "lighthouse",
    "acorn",
    "violin",
    "snail",
    "kite",
    "lantern",
    "mushroom",
    "owl",
    "telescope",
    "windmill",
    "origami crane",
    "pocket watch",
    "fern",
    "fox in the snow",
    "harbour at night",
    "watering can",
)
HOSTILE = (
    '<script>window.pwned=1</script><img src=x onerror="window.pwned=2"> ![shot](http://192.0.2.7/leak.png) '
    "[click](http://192.0.2.7/) :material/bolt: $x^2$"
)
HOSTILE_NAME = 'icons/<img src=x onerror="window.pwned=3"> ![shot](http:)<script>window.pwned=4.png'


@dataclass(frozen=True)
class Seeded:
    """What a test wants to name."""

    bench: Bench
    run_uid: str
    evaluation_key: str
    live_run_uid: str
    failed_run_uid: str
    snapshot_id: int


def seed(home: Path, *, prompts: int = 26, hostile: bool = True) -> Seeded:
    """A catalog with four weekly runs (one failed), a live one, two dataset versions, three model versions, reviews."""
    bench = Bench.open(Workspace(home))
    bench.catalog.migrate()
    draw = random.Random(7)
    captions = [f"{CONCEPTS[i % len(CONCEPTS)]}, {list(PALETTE)[i % 5]} app icon" for i in range(prompts)]
    if hostile:
        captions[1] = HOSTILE
    snapshot_ids = [_snapshot(bench, version, captions, draw) for version in (1, 2)]
    uids = [f"0193{week:04x}-7000-7000-8000-{week:012x}" for week in range(1, 6)]
    keys = [hashlib.sha256(f"evaluation {week}".encode()).hexdigest()[:32] for week in range(1, 4)]
    verdicts = ("promote", "hold", "promote")
    for week, (uid, key, decision) in enumerate(zip(uids, keys, verdicts, strict=False), start=1):
        _run(bench, uid, week, status="completed", snapshot_id=snapshot_ids[week > 1])
        remark = HOSTILE if hostile and week == 3 else None
        _evaluation(bench, uid, key, week, decision=decision, captions=captions, remark=remark, draw=draw)
        _stages(bench, uid, key, reused=week == 2)
        _model(bench, uid, key, week)
    _run(
        bench,
        uids[3],
        4,
        status="failed",
        snapshot_id=snapshot_ids[1],
        error="loss is nan at step 212: lower learning_rate, resume from the last checkpoint",
    )
    live = uids[4]
    _run(bench, live, 5, status="running", snapshot_id=snapshot_ids[1])
    _stages(bench, live, None, reused=True)
    return Seeded(bench, uids[2], keys[2], live, uids[3], snapshot_ids[1])


@cache
def icon(concept: str, colour: str, *, role: str, seed: int, size: int = 64) -> bytes:
    """A PNG that stands for a generated picture: a soft emoji-like blob (base) or a white glyph on a rounded square."""
    draw = random.Random(f"{concept}/{seed}/{role}")
    shape = random.Random(f"{concept}/{seed}")
    scale = 3
    image = Image.new("RGB", (size * scale, size * scale), "white")
    pen = ImageDraw.Draw(image)
    centre, rgb = size * scale / 2, PALETTE[colour]
    if role == "base":
        for ring in range(3):
            points = _outline(shape, centre, size * scale * (0.42 - 0.1 * ring), wobble=0.16)
            pen.polygon(points, fill=tuple(min(255, int(c * (0.75 + 0.25 * ring) + draw.random() * 30)) for c in rgb))
        image = image.filter(ImageFilter.GaussianBlur(size * scale / 40))
    else:
        pen.rounded_rectangle((8, 8, size * scale - 8, size * scale - 8), radius=size, fill=rgb)
        pen.polygon(
            _outline(shape, centre, size * scale * 0.27, wobble=0.3 if role == "champion" else 0.22), fill="white"
        )
        if role == "champion":
            image = image.filter(ImageFilter.GaussianBlur(size * scale / 60))
        elif shape.random() < 0.6:
            radius = size * scale * 0.08
            pen.ellipse((centre - radius, centre - radius, centre + radius, centre + radius), fill=rgb)
    return png(image.resize((size, size), Image.Resampling.LANCZOS))


def keep(bench: Bench, data: bytes) -> str:
    """Store bytes without the fsyncs that real work needs and a test's hundreds of pictures do not."""
    sha256 = hashlib.sha256(data).hexdigest()
    path = bench.store.path(sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return sha256


def png(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _outline(draw: random.Random, centre: float, radius: float, *, wobble: float) -> list[tuple[float, float]]:
    corners = draw.choice((3, 4, 5, 6, 8, 12))
    phase, waves = draw.random() * math.tau, draw.choice((2, 3, 5))
    points = []
    for step in range(corners * 6):
        angle = step / (corners * 6) * math.tau
        reach = radius * (1 + wobble * math.sin(waves * angle + phase) + (0.18 if step % 6 == 0 else 0))
        points.append((centre + reach * math.cos(angle), centre + reach * math.sin(angle)))
    return points


def _snapshot(bench: Bench, version: int, captions: list[str], draw: random.Random) -> int:
    kept, rejected = 70 + 20 * version, 6 + version
    rows, verdicts = [], []
    for ordinal in range(kept + rejected):
        concept, colour = CONCEPTS[ordinal % len(CONCEPTS)], list(PALETTE)[ordinal % 5]
        data = icon(concept, colour, role="candidate", seed=ordinal, size=128)
        sha256 = keep(bench, data) if ordinal != kept else None
        rows.append(
            {
                "ordinal": ordinal,
                "file_name": HOSTILE_NAME if ordinal == 3 else f"icons/{concept.replace(' ', '-')}-{ordinal:03}.png",
                "sha256": sha256,
                "rgb_digest": sha256,
                "caption": captions[1] if ordinal == 3 else f"{concept}, {colour} app icon",
                "kept": ordinal < kept,
                "split": None if ordinal >= kept else "test" if ordinal % 9 == 0 else "train",
                "group": concept,
                "component": concept,
                "width": 128,
                "height": 128,
                "licence": "CC-BY-4.0",
                "author": "Studio North",
                "source": None,
            }
        )
        if ordinal >= kept:
            check, reason = draw.choice(
                (
                    ("near_duplicate", "3 bits from icons/anchor-002.png, which is kept"),
                    ("min_side", "48 px on its short side, expected at least 64"),
                    ("blur", "sharpness 0.8, expected at least 2.0"),
                )
            )
            if sha256 is None:
                check, reason = "unreadable", "the file ends in the middle of its data"
            verdicts.append(
                {
                    "ordinal": ordinal,
                    "check": check,
                    "decision": "reject",
                    "score": 0.8,
                    "threshold": 2.0,
                    "reason": reason,
                }
            )
        elif ordinal % 14 == 5:
            verdicts.append(
                {
                    "ordinal": ordinal,
                    "check": "short_caption",
                    "decision": "flag",
                    "score": 1.0,
                    "threshold": 3.0,
                    "reason": "one word, expected at least three",
                }
            )
    with bench.catalog.write() as session:
        snapshot = Snapshot(
            dataset="app-icons",
            version=version,
            digest=hashlib.sha256(bytes([version])).hexdigest(),
            stage_key=f"{version:032x}",
            kept=kept,
            rejected=rejected,
            created_at=now() - timedelta(days=30 - 7 * version),
            profile={"splits": {"train": kept - kept // 9, "test": kept // 9}, "licences": {"CC-BY-4.0": kept}},
        )
        session.add(snapshot)
        session.flush()
        session.execute(insert(SnapshotItem), [row | {"snapshot_id": snapshot.id} for row in rows])
        session.execute(insert(Verdict), [row | {"snapshot_id": snapshot.id} for row in verdicts])
        return snapshot.id


def _run(bench: Bench, uid: str, week: int, *, status: str, snapshot_id: int, error: str | None = None) -> None:
    started = now() - (timedelta(days=28 - 7 * week, hours=3) if status != "running" else timedelta(minutes=6))
    running = status == "running"
    with bench.catalog.write() as session:
        session.add(
            Run(
                run_uid=uid,
                name="app-icons",
                kind="retrain",
                status=status,
                created_at=started,
                heartbeat_at=now() if running else started,
                ended_at=None if running else started + timedelta(minutes=9),
                host="studio-1",
                pid=4242,
                git_commit="9f2c1e7ab4",
                snapshot_id=snapshot_id,
                error=error,
                recipe={"name": "app-icons", "training": {"rank": 16, "max_train_steps": 600}},
                prefect_flow_run_id=f"flow-{week}",
                mlflow_run_id=f"mlflow-{week}",
                progress={"stage": "fine-tune", "done": 366, "total": 600} if running else {},
                card={
                    "adapter": {
                        "path": f"/data/exports/app-icons/v{week}/pytorch_lora_weights.safetensors",
                        "sha256": hashlib.sha256(bytes([week])).hexdigest(),
                        "step": 600,
                    },
                    "urls": {"mlflow": f"http://127.0.0.1:5000/#/runs/{week}"},
                }
                if status == "completed"
                else {},
            )
        )
    journal = bench.workspace.run_dir(uid) / "journal.jsonl"
    journal.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(week)
    with journal.open("w") as file:
        for seq, step in enumerate(range(0, 600, 10), start=1):
            loss = 0.07 + 0.2 * math.exp(-step / 120) + draw.random() * 0.02
            file.write(
                json.dumps(
                    {
                        "seq": seq,
                        "t_ms": 1_790_000_000_000 + 1000 * step,
                        "kind": "metrics",
                        "body": {"step": step, "values": {"loss": loss}},
                    }
                )
                + "\n"
            )
        for index in range(24):
            at, concept = (100 * (1 + index // 8), index % 8)
            role = "champion" if at < 300 else "candidate"
            sha256 = keep(bench, icon(CONCEPTS[concept], list(PALETTE)[concept % 5], role=role, seed=90 + concept))
            file.write(
                json.dumps(
                    {
                        "seq": 61 + index,
                        "t_ms": 1_790_000_700_000,
                        "kind": "image",
                        "body": {"key": f"preview/{concept}", "step": at, "sha256": sha256},
                    }
                )
                + "\n"
            )


def _stages(bench: Bench, uid: str, evaluation_key: str | None, *, reused: bool) -> None:
    lines = [("curate", 2.1, 117, 18_400), ("cache", 11.4, 110, 912_000)]
    if evaluation_key:
        lines += [
            ("fine-tune", 168.0, 600, 2_910_000),
            ("evaluate", 74.2, 480, 1_630_000),
            ("register", 8.8, 6, 2_950_000),
        ]
    with bench.catalog.write() as session:
        for stage, seconds, items, size in lines:
            old = reused and stage in ("curate", "cache")
            key = evaluation_key if stage == "evaluate" else hashlib.sha256(f"{uid}{stage}".encode()).hexdigest()[:32]
            session.add(
                StageRun(
                    run_uid=uid,
                    stage=stage,
                    key=key,
                    outcome="reused" if old else "produced",
                    seconds=0.04 if old else seconds,
                    items=items,
                    bytes=size,
                )
            )


def _evaluation(
    bench: Bench,
    uid: str,
    key: str,
    week: int,
    *,
    decision: str,
    captions: list[str],
    remark: str | None,
    draw: random.Random,
) -> None:
    adapter = hashlib.sha256(bytes([week])).hexdigest()
    gain = {"promote": -0.021, "hold": -0.002}[decision]
    metrics = {
        "kid": {
            "candidate": 0.0412 + gain,
            "base": 0.1183,
            "champion": 0.0412 if week > 1 else None,
            "n": 160,
            "better": "lower",
            "against": "champion",
            "difference": {"value": gain, "low": gain - 0.008, "high": gain + 0.008},
        },
        "prompt_match": {
            "candidate": 0.71,
            "base": 0.38,
            "champion": 0.66 if week > 1 else None,
            "n": 160,
            "better": "higher",
            "against": "champion",
            "difference": {"value": 0.05, "low": 0.01, "high": 0.09},
        },
        "variety": {
            "candidate": 0.31,
            "base": 0.36,
            "champion": None,
            "n": 80,
            "better": "higher",
            "against": "base",
            "difference": {"value": -0.05, "low": -0.09, "high": -0.01},
        },
        "copy_rate": {
            "candidate": 0.0063,
            "base": 0.0,
            "champion": None,
            "n": 160,
            "better": "lower",
            "threshold": 0.92,
            "difference": {"value": 0.0063, "low": 0.0, "high": 0.034},
        },
    }
    sentences = {
        "promote": [
            ("pass", "KID 0.020 against the champion's 0.041: the whole interval of the gain lies above 0."),
            ("pass", "Prompt match did not fall below the base (0.71 against 0.38)."),
            ("pass", "1 of 160 pictures is a near copy of a training picture; at most 5 % are allowed."),
        ],
        "hold": [
            (
                "hold",
                "The gain over the champion is not decided: its interval contains 0. About 60 more prompts would do.",
            ),
            ("pass", "Prompt match did not fall below the base."),
        ],
    }[decision]
    roles = [("base", 0, None)] + ([("champion", 600, "c" * 64)] if week > 1 else [])
    roles += [("candidate", step, adapter) for step in ((200, 400, 600) if week == 3 else (600,))]
    rows = []
    for index, caption in enumerate(captions):
        for seed in range(4) if index < 6 else (0,):
            for role, step, sha256 in roles:
                concept, colour = CONCEPTS[index % len(CONCEPTS)], list(PALETTE)[index % 5]
                image = icon(concept, colour, role=role, seed=1000 * week * (role != "base") + seed + step % 600)
                near = icon(concept, colour, role="candidate", seed=index, size=128)
                rows.append(
                    {
                        "evaluation_key": key,
                        "role": role,
                        "step": step,
                        "adapter_sha256": sha256,
                        "prompt_index": index,
                        "prompt": caption,
                        "group": concept,
                        "seed": 1234 + 100 * index + seed,
                        "batch_index": index // 20,
                        "batch_row": index % 20,
                        "image_sha256": keep(bench, image),
                        "metrics": {
                            "prompt_rank": draw.choice((1, 1, 1, 2, 5)),
                            "similarity": 0.6 + draw.random() / 3,
                            "nearest": keep(bench, near),
                        },
                    }
                )
    with bench.catalog.write() as session:
        session.add(
            Evaluation(
                key=key,
                run_uid=uid,
                fingerprint="f" * 16,
                adapter_sha256=adapter,
                snapshot_digest="d" * 64,
                champion_sha256="c" * 64 if week > 1 else None,
                metrics=metrics,
                created_at=now() - timedelta(days=28 - 7 * week),
                verdict={"decision": decision, "reasons": [{"outcome": o, "sentence": s} for o, s in sentences]},
            )
        )
        session.add(Adapter(sha256=adapter, stage_key=key, step=600))
        session.flush()
        session.execute(insert(Generation), rows)
        first = (
            session.query(Generation)
            .where(Generation.evaluation_key == key, Generation.role == "candidate", Generation.step == 600)
            .order_by(Generation.id)
            .limit(8)
            .all()
        )
        for number, generation in enumerate(first):
            for reviewer, value in (("Ana", 3 + number % 3), ("Jun", 2 + number % 4)):
                session.add(
                    Review(
                        generation_id=generation.id,
                        reviewer=reviewer,
                        kind="stars",
                        value=value,
                        idempotency_key=f"seed-{generation.id}-{reviewer}",
                    )
                )
        session.add(
            Review(
                generation_id=first[2].id,
                reviewer="Jun",
                kind="flag",
                value=1,
                idempotency_key=f"seed-flag-{first[2].id}",
            )
        )
        session.add(
            Review(
                generation_id=first[0].id,
                reviewer="Ana",
                kind="comment",
                text=remark or "Glyph sits a little low; otherwise on brand.",
                idempotency_key=f"seed-comment-{first[0].id}",
            )
        )


def _model(bench: Bench, uid: str, key: str, week: int) -> None:
    aliases = {1: ["previous"], 2: ["champion"], 3: ["challenger"]}[week]
    with bench.catalog.write() as session:
        session.add(
            ModelVersion(
                name="app-icons",
                version=week,
                run_uid=uid,
                evaluation_key=key,
                aliases=aliases,
                adapter_sha256=hashlib.sha256(bytes([week])).hexdigest(),
                mlflow_uri=f"models:/app-icons/{week}",
                created_at=now() - timedelta(days=28 - 7 * week),
            )
        )
        if week < 3:
            session.add(
                Promotion(
                    name="app-icons",
                    version=week,
                    previous_version=week - 1 or None,
                    decided_by="gate" if week == 1 else "Ana",
                    reason="first version" if week == 1 else "cleaner edges; the team prefers it in 14 of 20",
                )
            )


if __name__ == "__main__":
    print(seed(Path(sys.argv[1]).resolve()).run_uid)
