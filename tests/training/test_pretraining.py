import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from components.errors import BadInput
from components.training.base_evaluation import retrieval, tile
from components.training.checkpoints import newest_checkpoint
from components.training.pictures import hash_fraction, read_pictures
from components.training.pretraining import run_stage
from components.training.pretraining_config import PretrainConfig

TINY = PretrainConfig(
    vae_steps=2, vae_batch_size=2, vocab_size=512, max_prompt_tokens=12, text_size=48, text_layers=1,
    unet_channels=(48, 48), unet_steps=4, unet_batch_size=2, checkpointing_steps=2, held_out=0.4, held_out_styles=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    rows = []
    for i, name in enumerate(("ball", "box", "cup", "hat")):
        for style in ("noto", "fluent"):
            file_name = f"{style}-{i}.png"
            Image.new("RGB", (64, 64), (60 * i, 80, 200)).save(folder / file_name)
            rows.append({"file_name": file_name, "name": name, "synonyms": [], "style": style, "color": None,
                         "concrete": True, "group": str(i), "license": "CC0-1.0"})  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    for stage in ("vae", "unet", "assemble"):
        run_stage(stage, data, out, TINY)
    return out


def test_the_stages_end_in_a_pipeline_that_draws(run: Path):
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert pipeline("ball, noto style", num_inference_steps=2).images[0].size == (64, 64)
    assert [concept["name"] for concept in json.loads((run / "concepts.json").read_text())] == [
        "ball",
        "box",
        "cup",
        "hat",
    ]


def test_a_stopped_pre_training_resumes_to_the_bits_of_an_unbroken_one(run: Path, data: Path, tmp_path: Path):
    (tmp_path / "vae").symlink_to(run / "vae")
    stop_at_once = iter([False, False, False, True])
    run_stage("unet", data, tmp_path, TINY, should_stop=lambda: next(stop_at_once))
    stopped = newest_checkpoint(tmp_path / "unet")
    assert stopped is not None and stopped.step == 3
    run_stage("unet", data, tmp_path, TINY)
    ours, theirs = newest_checkpoint(tmp_path / "unet"), newest_checkpoint(run / "unet")
    assert ours is not None and theirs is not None and ours.step == theirs.step == 4
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, theirs.tensors[part][name]) for name, tensor in ours.tensors[part].items())


def test_going_on_with_a_model_of_other_sizes_is_refused_in_one_line(run: Path, data: Path):
    wider = TINY.model_copy(update={"unet_channels": (48, 96)})
    with pytest.raises(BadInput, match=r"unet_channels \[48, 48\] \(asked for: \[48, 96\]\); choose another") as error:
        run_stage("unet", data, run, wider)
    assert "\n" not in str(error.value)


def test_training_can_go_on_from_a_finished_pipeline(run: Path, data: Path, tmp_path: Path):
    run_stage("unet", data, tmp_path, TINY, start=run / "pipeline")
    run_stage("assemble", data, tmp_path, TINY, start=run / "pipeline")
    first = DiffusionPipeline.from_pretrained(run / "pipeline")
    second = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert torch.equal(first.vae.decoder.conv_in.weight, second.vae.decoder.conv_in.weight)
    assert not torch.equal(first.unet.conv_in.weight, second.unet.conv_in.weight)


def test_splits_by_hash_do_not_move_when_data_is_added(data: Path):
    pictures = read_pictures(data)
    held_out = {row.group for row in pictures.rows if hash_fraction(row.group) < TINY.held_out}
    assert held_out == {group for group in "0123" if hash_fraction(group) < TINY.held_out}


def test_retrieval_asks_for_the_concept_among_the_nearest_ones():
    references = np.eye(4)
    names = ["a", "a", "b", "c"]
    queries = np.array([[0.1, 1.0, 0.0, 0.0], [0.0, 0.0, 0.4, 1.0]])
    assert retrieval(queries, ["a", "b"], references, names, k=1) == 0.5
    assert retrieval(queries, ["a", "b"], references, names, k=2) == 1.0


def test_tiles_fill_rows_from_the_left():
    red, blue = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    sheet = tile([red, red, blue], columns=2, gap=1)
    assert sheet.size == (5, 5)
    assert [sheet.getpixel(place) for place in ((0, 0), (3, 0), (0, 3), (3, 3))] == [
        (255, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)
    ]  # fmt: skip
