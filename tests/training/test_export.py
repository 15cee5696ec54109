"""What a run exports: files that stock programs draw the same with, headers and a card without a local path."""

import hashlib
import io
import json
import re
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoraConfig
from PIL import Image
from sqlalchemy import select
from torch import Tensor
from transformers import CLIPTextModel

from components.catalog.models import (
    Adapter,
    Evaluation,
    Generation,
    Run,
    Snapshot,
    SnapshotItem,
    StageResultRow,
    StageRun,
)
from components.config import parse_recipe
from components.curation.manifest import MANIFEST_SCHEMA, SampleRow
from components.errors import BadInput, DamagedArtifact
from components.families.stable_diffusion import StableDiffusion
from components.layouts.files import read_adapter
from components.layouts.names import Layout
from components.layouts.reading import stored_layers
from components.layouts.tokens import Token
from components.stages import Bench, canonical_json
from components.training.adapters import adapter_bytes
from components.training.export import export_adapter
from tests.pictures import draw
from tests.tiny import tiny_stable_diffusion

RANK, ALPHA = 4, 3.0  # different on purpose: a reader that takes alpha for the rank is 25 % off
RUN, STAGE = "0199aaaa-0000-7000-8000-000000000001", "k" * 32
EVERY: tuple[Layout, ...] = ("diffusers", "kohya", "comfyui")


def picture() -> bytes:
    buffer = io.BytesIO()
    draw("wedge", "red", 32).save(buffer, "PNG")
    return buffer.getvalue()


def rows() -> list[SampleRow]:
    """Two pictures that count twice, in somebody's folder, and one that is held out."""
    folder = "home/ada/2_sks rocket"
    return [
        SampleRow("a", "a", f"{folder}/a.png", "Rocket, red app icon", None, "a", "train", 40, 32, *[None] * 3, 2),
        SampleRow("b", "b", f"{folder}/b.png", "rocket, blue app icon", None, "b", "train", 32, 32, *[None] * 3, 2),
        SampleRow("c", "c", "c.png", "comet", None, "c", "test", 32, 32, *[None] * 3, 1),
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion(tmp_path_factory.mktemp("bases") / "tiny-sd")


def tiny_unet(base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base, subfolder="unet")


def adapted_unet(base: Path, rslora: bool = False, preset: str = "all") -> UNet2DConditionModel:
    family, unet = StableDiffusion(), tiny_unet(base)
    unet.add_adapter(
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=family.target_modules(unet, preset),  # type: ignore[arg-type]
            use_rslora=rslora,
        )
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return unet.eval()


def output(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, 16, generator=generator)
    with torch.inference_mode():
        return unet(x, torch.tensor([10, 700]), context).sample


def loaded_by_diffusers(base: Path, folder: Path, weight_name: str) -> Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(str(folder), weight_name=weight_name)
    return output(pipeline.unet)


def store_adapter(bench: Bench, unet: UNet2DConditionModel, base: Path, *learnt: Any) -> str:
    """An adapter with the run, snapshot, evaluation and picture that lead to it; `learnt` is its text side."""
    ref = bench.store.put(adapter_bytes(unet, StableDiffusion(), *learnt))
    drawn = bench.store.put(picture())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows()], schema=MANIFEST_SCHEMA), sink)
    manifest = bench.store.put(sink.getvalue().to_pybytes())
    committed = bench.store.put(canonical_json({"facts": {"device": "NVIDIA A10G"}}))
    recipe = parse_recipe(
        {
            "name": "icons",
            "data": {"sources": [{"path": "/home/ada/private/icons"}]},
            "training": {
                "init_adapter": "/home/ada/start.safetensors",
                "max_train_steps": 60,
                "train_batch_size": 3,
                "class_prompt": "an icon",
                "snr_gamma": 5.0,
                "scale_weight_norms": 1.0,
            },
        },
        origin="test",
    )
    body = recipe.model_dump(mode="json") | {"base": {"model": str(base), "revision": None}}
    began, ended = (datetime(2026, 1, 2, 3, minute, tzinfo=UTC) for minute in (4, 9))
    difference = {"value": -0.1, "low": -0.2, "high": -0.05}
    with bench.catalog.write() as session:
        profile = {"rejects": {"tiny": 1}}
        snapshot = Snapshot(
            dataset="icons", version=3, digest=manifest.sha256, stage_key="s", kept=2, rejected=1, profile=profile
        )
        session.add(snapshot)
        session.flush()
        for ordinal in range(2):
            session.add(
                SnapshotItem(
                    snapshot_id=snapshot.id,
                    ordinal=ordinal,
                    file_name=f"{ordinal}.png",
                    kept=True,
                    caption="a rocket",
                    split="train",
                    licence="CC-BY-4.0",
                    source="/home/ada/icons",
                )
            )
        session.add(
            Run(
                run_uid=RUN,
                name="icons",
                kind="retrain",
                status="completed",
                recipe=body,
                created_at=began,
                host="laptop",
                pid=1,
                git_commit="abc",
                snapshot_id=snapshot.id,
                mlflow_run_id="m1",
                progress={},
                card={},
            )
        )
        session.flush()
        session.add(
            StageRun(run_uid=RUN, stage="fine-tune", key=STAGE, outcome="produced", seconds=1, items=1, bytes=1)
        )
        session.add(
            StageResultRow(
                key=STAGE, stage="fine-tune", version=1, manifest_sha256=committed.sha256, items=60, seconds=12.53
            )
        )
        session.add(Adapter(sha256=ref.sha256, stage_key=STAGE, step=40, created_at=ended))
        session.add(
            Evaluation(
                key="e",
                run_uid=RUN,
                fingerprint="f",
                adapter_sha256=ref.sha256,
                snapshot_digest=manifest.sha256,
                metrics={
                    "kid": {
                        "candidate": 0.1,
                        "base": 0.2,
                        "champion": None,
                        "difference": difference,
                        "n": 100,
                        "better": "lower",
                    }
                },
                verdict={"decision": "promote", "reasons": [{"outcome": "pass", "sentence": "kid is better"}]},
            )
        )
        session.flush()
        session.add(
            Generation(
                evaluation_key="e",
                role="candidate",
                step=40,
                adapter_sha256=ref.sha256,
                prompt_index=0,
                prompt='a "rocket"',
                seed=0,
                batch_index=0,
                batch_row=0,
                image_sha256=drawn.sha256,
                metrics={},
            )
        )
    return ref.sha256


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha / r", "alpha / sqrt(r)"])
def test_both_layouts_draw_what_training_drew_when_alpha_is_not_the_rank(
    bench: Bench, tmp_path: Path, base: Path, rslora: bool
):
    unet = adapted_unet(base, rslora)
    export = export_adapter(bench, store_adapter(bench, unet, base), tmp_path / "out")
    expected = output(unet)
    assert (expected - output(tiny_unet(base))).abs().max() > 0.1  # the adapter matters
    assert torch.equal(loaded_by_diffusers(base, export.folder, export.files["diffusers"].name), expected)
    kohya = loaded_by_diffusers(base, export.folder, export.files["kohya"].name)
    assert (kohya - expected).abs().max() < 1e-4


def test_a_run_exports_what_its_adapter_fits_into_and_says_what_it_does_not(bench: Bench, tmp_path: Path, base: Path):
    unet = tiny_unet(base)
    unet.add_adapter(LoHaConfig(r=RANK, alpha=2, target_modules=["to_q"]))  # type: ignore[arg-type]
    sha256 = store_adapter(bench, unet, base)
    export = export_adapter(bench, sha256, tmp_path / "out")
    assert set(export.files) == {"kohya"}
    assert "reads no LoHa; export the kohya layout" in export.skipped["diffusers"]
    _, metadata = read_adapter(export.files["kohya"])
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert metadata["ss_network_args"] == '{"algo": "loha"}'
    with pytest.raises(BadInput, match="reads no LoHa"):
        export_adapter(bench, sha256, tmp_path / "asked", ["diffusers"])


def test_without_its_base_an_adapter_is_exported_under_the_names_it_has(bench: Bench, tmp_path: Path, base: Path):
    sha256 = store_adapter(bench, adapted_unet(base), tmp_path / "gone")
    export = export_adapter(bench, sha256, tmp_path / "out")
    assert set(export.files) == {"diffusers"}
    assert "names layers as the base does, which is not here" in export.skipped["kohya"]


def test_the_diffusers_file_holds_the_stored_numbers_and_exporting_twice_gives_the_same_bytes(
    bench: Bench, tmp_path: Path, base: Path
):
    sha256 = store_adapter(bench, adapted_unet(base), base)
    first, again = (export_adapter(bench, sha256, tmp_path / name, EVERY) for name in ("first", "again"))
    names = {layout: path.name for layout, path in first.files.items()}
    assert names == {
        "diffusers": "pytorch_lora_weights.safetensors",
        "kohya": "icons.safetensors",
        "comfyui": "icons-comfyui.safetensors",
    }
    stored, ours = (stored_layers(*read_adapter(path)) for path in (bench.store.path(sha256), first.files["diffusers"]))
    assert [(a.name, a.scale) for a in stored] == [(b.name, b.scale) for b in ours]
    for mine, theirs in zip(stored, ours, strict=True):
        assert all(torch.equal(mine.weights[name], theirs.weights[name]) for name in ("down", "up"))
    for layout in EVERY:
        assert first.files[layout].read_bytes() == again.files[layout].read_bytes()


@pytest.mark.parametrize("preset", ["attention", "attention-mlp", "all-linear", "all"])
def test_a_stored_adapter_is_read_by_the_stock_loader_as_it_was_trained(tmp_path: Path, base: Path, preset: str):
    unet = adapted_unet(base, preset=preset)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(adapter_bytes(unet, StableDiffusion()))
    assert torch.equal(loaded_by_diffusers(base, tmp_path, "pytorch_lora_weights.safetensors"), output(unet))


def test_every_layouts_header_names_data_base_and_run_but_no_local_path(bench: Bench, tmp_path: Path, base: Path):
    export = export_adapter(bench, store_adapter(bench, adapted_unet(base), base), tmp_path / "out", EVERY)
    said = {
        "ss_session_id": RUN,
        "ss_training_started_at": "1767323040.0",
        "ss_training_finished_at": "1767323340.0",
        "ss_network_dim": "4",
        "ss_network_alpha": "3.0",
        "ss_sd_model_name": "tiny-sd",
        "ss_base_model_version": "sd_v1",
        "ss_zero_terminal_snr": "False",
        "ss_noise_offset": "0.0",
        "ss_resolution": "(32, 32)",
        "ss_enable_bucket": "False",  # the tiny base takes squares
        "ss_bucket_no_upscale": "True",
        "ss_num_train_images": "4",
        "ss_num_validation_images": "1",
        "ss_num_reg_images": "100",
        "ss_num_batches_per_epoch": "3",  # of 3, from 4 pictures and as many of the class
        "ss_num_epochs": "20",
        "ss_steps": "40",
        "ss_epoch": "14",
        "ss_dataset_dirs": '{"2_sks rocket": {"n_repeats": 2, "img_count": 2}}',
        "ss_tag_frequency": '{"2_sks rocket": {"rocket": 2, "blue app icon": 1, "red app icon": 1}}',
        "ss_bucket_info": '{"buckets": {"0": {"resolution": [32, 32], "count": 4}}, "mean_img_ar_error": 0.125}',
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "icons",
        "modelspec.description": "A LoRA for tiny-sd, trained with Safelight for 40 steps on 2 pictures of icons@v3.",
        "modelspec.resolution": "32x32",
        "modelspec.prediction_type": "epsilon",
        "modelspec.date": "2026-01-02T03:09:00Z",
        "safelight.run_uid": RUN,
        "safelight.git_commit": "abc",
        "safelight.mlflow_run_id": "m1",
    }
    for path in export.files.values():
        _, metadata = read_adapter(path)
        assert {key: metadata.get(key) for key in said} == said
        (dataset,) = json.loads(metadata["ss_datasets"])
        assert [(subset["image_dir"], subset["num_repeats"]) for subset in dataset["subsets"]] == [("2_sks rocket", 2)]
        data = path.read_bytes()
        assert not [word for word in (b"/home", b"ada/", b"laptop", str(base.parent).encode()) if word in data]
        assert hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest() == metadata["sshs_model_hash"]


def test_the_page_on_layouts_names_every_key_of_the_header_and_no_other(bench: Bench, tmp_path: Path, base: Path):
    page = Path(__file__).parents[2] / "components" / "layouts" / "README.md"
    named: set[str] = set()
    for entry in page.read_text(encoding="utf-8").partition("## Headers")[2].split("\nOf kohya")[0].split("\n- ")[1:]:
        prefix, *keys = re.findall(r"`([\w.]+)`", entry)
        named |= {key if key.startswith("sshs_") else f"{prefix}{key}" for key in keys}
    export = export_adapter(bench, store_adapter(bench, adapted_unet(base), base), tmp_path / "out", ["kohya"])
    _, metadata = read_adapter(export.files["kohya"])
    assert {*metadata, "safelight.base_model_revision"} == named  # a folder has no revision


def test_the_card_has_a_gallery_and_says_how_it_came_about_without_a_local_path(
    bench: Bench, tmp_path: Path, base: Path
):
    export = export_adapter(bench, store_adapter(bench, adapted_unet(base), base), tmp_path / "out", EVERY)
    card = export.card.read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["widget"] == [{"text": 'a "rocket"', "output": {"url": "images/0.png"}}] and "<Gallery />" in card
    assert Image.open(export.folder / front["widget"][0]["output"]["url"]).size == (32, 32)
    assert front["pipeline_tag"] == "text-to-image" and front["library_name"] == "diffusers"
    assert set(front["tags"]) == {"text-to-image", "diffusers", "lora", "template:sd-lora"}
    licence = (export.folder / front["license_link"]).read_text()
    assert front["license"] == "other" and "CC-BY-4.0" in licence and "`tiny-sd`: the licences of both apply" in licence
    assert all(path.name in card for path in export.files.values())
    for said in (
        "| KID to held-out pictures | lower | 0.2 | – | 0.1 | -0.1 [-0.2, -0.05] | 100 |",
        "| CC-BY-4.0 | 2 |",
        "**promote**",
        "Rejected by check: tiny 1.",
        "| `test_fraction` | 0.1 |",
        "| `init_adapter` | start.safetensors |",
        "- trained on: `NVIDIA A10G`",
        "- seconds: `12.5`",
    ):
        assert said in card
    assert not [word for word in ("/home/", str(base.parent), "laptop") if word in card]
    assert "ada" not in card.split("## Training")[0].replace("adapter", "")


def test_without_its_data_an_adapter_is_exported_with_what_is_known(bench: Bench, tmp_path: Path, base: Path):
    sha256 = store_adapter(bench, adapted_unet(base), base)
    with bench.catalog.read() as session:
        (digest,) = session.scalars(select(Snapshot.digest))
    bench.store.path(digest).unlink()
    _, metadata = read_adapter(export_adapter(bench, sha256, tmp_path / "out").files["kohya"])
    assert metadata["ss_num_train_images"] == "2" and "ss_tag_frequency" not in metadata


def test_text_layers_and_a_token_go_into_every_layout_and_the_card_says_the_word(
    bench: Bench, tmp_path: Path, base: Path
):
    text = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    text.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "fc2"], use_dora=True))  # type: ignore[arg-type]
    token = Token("<icon>", {"text_encoder": torch.ones(2, 16)})
    sha256 = store_adapter(bench, adapted_unet(base), base, {"text_encoder": text}, [token])
    export = export_adapter(bench, sha256, tmp_path / "out", ("diffusers", "kohya", "comfyui"))
    assert {name: path.name for name, path in export.files.items()} == {
        "diffusers": "pytorch_lora_weights.safetensors",
        "kohya": "icons.safetensors",
        "comfyui": "icons-comfyui.safetensors",
        "embeddings": "learned_embeds.safetensors",
    }
    keys = {name: set(read_adapter(path)[0]) for name, path in export.files.items()}
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    assert f"text_encoder.{layer}.lora_magnitude_vector.weight" in keys["diffusers"]  # as transformers loads it
    assert {f"lora_te_{layer.replace('.', '_')}.{leaf}" for leaf in ("alpha", "dora_scale")} <= keys["kohya"]
    assert f"text_encoders.clip_l.transformer.{layer}.lora_A.weight" in keys["comfyui"]
    assert keys["embeddings"] == {"<icon>"}
    bundled = {name for name, found in keys.items() if "bundle_emb.<icon>.string_to_param.*" in found}
    assert bundled == {"kohya", "comfyui"}
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_textual_inversion(str(export.folder))
    pipeline.load_lora_weights(str(export.folder), weight_name=export.files["diffusers"].name)
    assert pipeline.tokenizer.tokenize("<icon> <icon>_1") == ["<icon>", "<icon>_1"]
    _, metadata = read_adapter(export.files["kohya"])
    assert metadata["modelspec.trigger_phrase"] == "<icon>"
    card = export.card.read_text()
    assert 'instance_prompt: "<icon>"' in card
    assert 'pipeline.load_textual_inversion(".", weight_name="learned_embeds.safetensors")' in card


def test_an_adapter_whose_bytes_were_altered_is_not_exported(bench: Bench, tmp_path: Path, base: Path):
    sha256 = store_adapter(bench, adapted_unet(base), base)
    path = bench.store.path(sha256)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedArtifact, match="was altered"):
        export_adapter(bench, sha256, tmp_path / "out")
    assert not (tmp_path / "out").exists()
