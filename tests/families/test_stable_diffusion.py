"""The SD family: what is trained is what the stock pipeline loads, and a wrong base is named in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from components.config import BaseModelConfig, TrainingConfig
from components.errors import BaseModelError
from components.families.bases import BaseModel, find_base, resolve_base
from components.training.adapters import adapter_bytes, add_adapter
from tests.tiny import tiny_stable_diffusion


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return resolve_base(BaseModelConfig(model=str(tiny_stable_diffusion(tmp_path_factory.mktemp("base")))))


@pytest.mark.parametrize("targets", ["attention", "attention-mlp", "all-linear", "all"])
def test_the_stock_pipeline_computes_with_the_adapter_what_the_trained_model_does(
    base: BaseModel, targets: str, tmp_path: Path
):
    family = base.architecture
    trained = family.load_denoiser(base.path, "cpu")
    parameters = add_adapter(trained, family, TrainingConfig(targets=targets, rank=4, lora_alpha=10))
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(adapter_bytes(trained, family))
    pipeline = family.load_pipeline(base.path, "cpu", torch.float32)
    x, embeds = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 16)
    with torch.no_grad():
        before = pipeline.unet(x, torch.tensor([3, 500]), embeds)[0]
        pipeline.load_lora_weights(tmp_path)
        stock = pipeline.unet(x, torch.tensor([3, 500]), embeds)[0]
        ours = family.denoise(trained.eval(), x, torch.tensor([3, 500]), {"prompt_embeds": embeds})
    assert (stock - before).abs().max() > 1e-2
    assert torch.equal(stock, ours)


def test_equal_adapters_have_equal_bytes(base: BaseModel):
    def build() -> bytes:
        model = base.architecture.load_denoiser(base.path, "cpu")
        add_adapter(model, base.architecture, TrainingConfig())
        return adapter_bytes(model, base.architecture)

    assert build() == build()


def test_a_fresh_adapter_changes_nothing(base: BaseModel):
    model = base.architecture.load_denoiser(base.path, "cpu").eval()
    x, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([7]), {"prompt_embeds": torch.randn(1, 24, 16)}
    with torch.no_grad():
        before = base.architecture.denoise(model, x, t, cond)
        add_adapter(model, base.architecture, TrainingConfig(targets="all"))
        assert torch.equal(base.architecture.denoise(model, x, t, cond), before)


def test_any_change_of_a_part_is_another_digest_of_that_part_alone(base: BaseModel, tmp_path: Path):
    copy = shutil.copytree(base.path, tmp_path / "copy")
    (copy / "vae" / "config.json").write_text((copy / "vae" / "config.json").read_text() + " ")
    other = resolve_base(BaseModelConfig(model=str(copy)))
    assert {part for part in base.digests if base.digests[part] != other.digests[part]} == {"vae"}


WEIGHTS = "diffusion_pytorch_model.safetensors"


def spoil(folder: Path, how: str) -> Path:
    index = folder / "model_index.json"
    match how:
        case "no index":
            index.unlink()
        case "not JSON":
            index.write_text("{")
        case "other class":
            index.write_text(json.dumps({"_class_name": "AudioLDMPipeline"}))
        case "no unet":
            shutil.rmtree(folder / "unet")
        case "no weights":
            (folder / "unet" / WEIGHTS).unlink()
        case "weights cut short":
            with (folder / "vae" / WEIGHTS).open("rb+") as file:
                file.truncate(1000)
        case "no configuration":
            (folder / "unet" / "config.json").unlink()
        case "a broken configuration":
            (folder / "scheduler" / "scheduler_config.json").write_text("{")
        case "no tokenizer":
            shutil.rmtree(folder / "tokenizer")
            (folder / "tokenizer").mkdir()
    return folder


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no index", "is no diffusers pipeline"),
        ("not JSON", "not valid JSON"),
        ("other class", "expected one of"),
        ("no unet", "lacks unet/"),
        ("no weights", r"unet: holds no \*\.safetensors"),
        ("weights cut short", f"{WEIGHTS}: damaged, .* the file has 1000"),
        ("no configuration", r"unet: holds no config\.json"),
        ("a broken configuration", r"scheduler_config\.json: not valid JSON"),
        ("no tokenizer", r"holds no tokenizer_config\.json"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_refused_in_one_line(base: BaseModel, tmp_path: Path, how: str, said: str):
    folder = spoil(shutil.copytree(base.path, tmp_path / "copy"), how)
    with pytest.raises(BaseModelError, match=said) as refusal:
        find_base(BaseModelConfig(model=str(folder)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["../x", "--upload-pack=x", "/no/such/folder", "just-a-word"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match="no such folder and no hub id"):
        resolve_base(BaseModelConfig(model=name))
