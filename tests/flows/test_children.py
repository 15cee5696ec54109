import os
from pathlib import Path

import pytest

from components.config import BaseModelConfig
from components.families.bases import BaseModel, resolve_base
from flows.children import SMALL_DENOISER, threads_for


def test_a_small_base_gets_one_thread_and_a_large_one_the_cores_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("SAFELIGHT_THREADS", raising=False)
    assert threads_for(resolve_base(BaseModelConfig())) == 1
    (tmp_path / "unet").mkdir()
    with (tmp_path / "unet/diffusion_pytorch_model.safetensors").open("wb") as file:
        file.truncate(SMALL_DENOISER)
    large = BaseModel("large", None, "StableDiffusionPipeline", tmp_path, {})
    assert threads_for(large) == len(os.sched_getaffinity(0))
    monkeypatch.setenv("SAFELIGHT_THREADS", "3")
    assert threads_for(large) == 3
