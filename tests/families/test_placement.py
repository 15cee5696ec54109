"""Models that are larger than what a device has left: the same numbers, with their weights in the CPU's memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from components.config import BaseModelConfig
from components.families import placement
from components.families.bases import resolve_base
from components.families.placement import placed, weight_bytes
from tests.families.members import MEMBERS

PROMPTS = ["disc, red sign", ""]


def count_all(model: torch.nn.Module, not_on: str = "") -> int:
    """As if they had to go elsewhere: here the device is the CPU, where they are."""
    return weight_bytes(model)


@pytest.mark.parametrize("name", ["sdxl", "flux1-dev", "qwen-image"])
def test_encoders_that_do_not_fit_give_the_same_embeddings_block_by_block(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = resolve_base(BaseModelConfig(model=str(MEMBERS[name].build(tmp_path / "base"))))
    family = base.architecture
    fitting = family.load_prompt_encoder(base.path, "cpu").encode(PROMPTS)
    models: list[Any] = []

    def noted(model: Any, device: str) -> Any:
        models.append(placed(model, device))
        return models[-1]

    monkeypatch.setattr("components.families.text.placed", noted)
    monkeypatch.setattr(placement, "free_bytes", lambda device: 0.0)
    monkeypatch.setattr(placement, "weight_bytes", count_all)
    encoder = family.load_prompt_encoder(base.path, "cpu")
    for _ in range(2):
        for tensor_name, tensor in encoder.encode(PROMPTS).items():
            assert torch.equal(tensor, fitting[tensor_name])
        assert all(parameter.is_meta for model in models for parameter in model.parameters())


def test_of_a_pipeline_the_denoiser_comes_first_and_what_does_not_fit_draws_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Room for the U-Net alone: the text encoders and the VAE are fetched, and the picture is the same."""
    member = MEMBERS["sdxl"]
    base = resolve_base(BaseModelConfig(model=str(member.build(tmp_path / "base"))))
    family = base.architecture

    def draw(pipeline: Any) -> torch.Tensor:
        return pipeline(  # type: ignore[no-any-return]
            PROMPTS[:1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images

    whole = draw(family.load_pipeline(base.path, "cpu", torch.float32))
    rooms: list[int] = []

    def room(device: str) -> float:
        rooms.append(1)
        return float("inf") if len(rooms) == 1 else 0.0

    monkeypatch.setattr(placement, "free_bytes", room)
    monkeypatch.setattr(placement, "weight_bytes", count_all)
    pipeline = family.load_pipeline(base.path, "cpu", torch.float32)
    assert not any(parameter.is_meta for parameter in pipeline.unet.parameters())
    others = (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert all(parameter.is_meta for part in others for parameter in part.parameters())
    assert torch.equal(draw(pipeline), whole)


def test_weights_that_are_already_there_need_no_room(monkeypatch: pytest.MonkeyPatch):
    """A denoiser in training, which is handed to the pipeline that draws previews with it."""
    monkeypatch.setattr(placement, "free_bytes", lambda device: 0.0)
    layer = torch.nn.Linear(2, 2)
    assert weight_bytes(layer) == 4 * 6 and weight_bytes(layer, not_on="cpu") == 0
    assert placed(layer, "cpu") is layer and not layer.weight.is_meta
