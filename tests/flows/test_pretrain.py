"""Pre-training as a flow: its series, figures and pictures reach MLflow; a second run trains nothing again."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from components.families.bases import EMBEDDED
from components.storage import sha256_of
from tests.conftest import Served
from tests.emoji import EMOJI, MORE, write_packages
from tests.flows.conftest import safelight

TINY = {
    "vae_steps": 2, "vae_batch_size": 2, "vocab_size": 512, "max_prompt_tokens": 12, "text_size": 48, "text_layers": 1,
    "unet_channels": [48, 48], "unet_steps": 4, "unet_batch_size": 2, "checkpointing_steps": 2, "held_out": 0.4,
}  # fmt: skip


@pytest.mark.services
def test_pre_training_ends_in_a_pipeline_with_its_figures_in_mlflow(served: Served, tmp_path: Path):
    packages = write_packages(tmp_path / "node_modules", EMOJI | MORE)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    words = ("pretrain", "--node-modules", str(packages), "--out", str(tmp_path / "out"))
    document = safelight(served, *words, "--config", str(tmp_path / "tiny.json"))
    assert Path(document["pipeline"], "model_index.json").is_file()
    run = MlflowClient(served.urls.mlflow_url).get_run(document["mlflow"].rsplit("/", 1)[1])
    assert run.info.status == "FINISHED"
    assert run.data.params["config.unet_steps"] == "4"
    assert {"vae/loss", "unet/train_loss", "base/reconstruction_psnr_db"} <= run.data.metrics.keys()
    assert run.data.metrics["base/concepts"] == document["figures"]["concepts"] == 5
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["emoji@1"]
    pictures = {entry.path for entry in MlflowClient(served.urls.mlflow_url).list_artifacts(run.info.run_id)}
    assert {"grid.png", "curves.png", "figures.json"} <= pictures


@pytest.mark.services
def test_another_objective_on_the_shipped_autoencoder_trains_the_denoiser_alone(served: Served, tmp_path: Path):
    packages = write_packages(tmp_path / "node_modules", EMOJI | MORE)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    words = ("pretrain", "--node-modules", str(packages), "--out", str(tmp_path / "out"), "--objective", "v")
    options = ("--autoencoder", str(EMBEDDED), "--config", str(tmp_path / "tiny.json"))
    pipeline = Path(safelight(served, *words, *options)["pipeline"])
    assert not (tmp_path / "out/vae").exists()
    assert sha256_of(pipeline / "vae/diffusion_pytorch_model.safetensors") == sha256_of(
        EMBEDDED / "vae/diffusion_pytorch_model.safetensors"
    )
    scheduler = json.loads((pipeline / "scheduler/scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    refused = safelight(served, *words[:-2], "--start", str(pipeline), "--config", str(tmp_path / "tiny.json"), code=2)
    assert "objective 'flow' asks for 'flow_prediction' on a rectified-flow path" in refused["error"]


@pytest.mark.services
def test_settings_that_do_not_exist_are_named_before_anything_starts(served: Served, tmp_path: Path):
    (tmp_path / "bad.json").write_text('{"unet_step": 4}')
    words = ("pretrain", "--node-modules", str(tmp_path), "--config", str(tmp_path / "bad.json"))
    error = safelight(served, *words, code=2)["error"]
    assert "bad.json: unet_step" in error and "fields of PretrainConfig" in error
