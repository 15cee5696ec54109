"""A registered version, loaded by MLflow in a process that knows nothing of us, draws the gallery's own pictures."""

import io
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select

from components.catalog.models import Evaluation, Generation
from components.stages import Bench
from tests.conftest import Served

LOADER = """
import json, sys
import mlflow, numpy as np, torch
request = json.load(sys.stdin)
pipeline = mlflow.diffusers.load_model(request["uri"]).load_pipeline()
pipeline.set_progress_bar_config(disable=True)
def draw(rows):
    return pipeline(prompt=[row["prompt"] for row in rows],
                    generator=[torch.Generator().manual_seed(row["seed"]) for row in rows], **request["call"]).images
np.savez(request["out"], batch=np.stack([np.asarray(image) for image in draw(request["rows"])]),
         single=np.asarray(draw(request["rows"][:1])[0]))
"""


@pytest.mark.services
def test_a_gallery_micro_batch_is_reproduced_to_the_bit_and_a_single_picture_within_one_level(
    served: Served, trained: dict[str, Any], tmp_path: Any
):
    bench = Bench.open(served.workspace)
    version = trained["model"]["version"]
    with bench.catalog.read() as session:
        evaluation = session.scalars(
            select(Evaluation).where(Evaluation.adapter_sha256 == trained["adapter"]["sha256"])
        ).one()
        rows = session.scalars(
            select(Generation)
            .where(
                Generation.evaluation_key == evaluation.key, Generation.role == "candidate", Generation.batch_index == 0
            )
            .order_by(Generation.batch_row)
        ).all()
    pictures = [np.asarray(Image.open(io.BytesIO(bench.store.read(row.image_sha256)))) for row in rows]
    made = json.loads(Image.open(io.BytesIO(bench.store.read(rows[0].image_sha256))).text["safelight"])["settings"]  # type: ignore[attr-defined]
    request = {
        "uri": f"models:/signs/{version}",
        "rows": [{"prompt": row.prompt, "seed": row.seed} for row in rows],
        "call": {
            "num_inference_steps": made["num_inference_steps"],
            "guidance_scale": made["guidance_scale"],
            "height": made["side"],
            "width": made["side"],
        },
        "out": str(tmp_path / "drawn.npz"),
    }
    environment = os.environ | served.environment | {"OMP_NUM_THREADS": str(made["threads"])}
    done = subprocess.run(
        [sys.executable, "-c", LOADER],
        input=json.dumps(request),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    drawn = np.load(tmp_path / "drawn.npz")
    assert len(rows) == made["batch_size"]
    assert np.array_equal(drawn["batch"], np.stack(pictures))
    assert np.abs(drawn["single"].astype(int) - pictures[0].astype(int)).max() <= 1
