"""Each captioner says, word for word, what the stock call of its class says of each picture alone."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from components.captioning.captioner import CAPTIONERS, CaptionContext, Captioner, Generation, captioner_class
from components.captioning.weights import Weights
from components.curation.memory import hash_files
from components.errors import BadInput
from components.stages import Bench
from tests.captioning import tiny

TOKENS = 8


def images() -> list[Image.Image]:
    noise = [np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8) for i in range(3)]
    return [*map(Image.fromarray, noise), Image.new("RGB", (50, 50), "red"), Image.new("RGB", (30, 60), "black")]


def loaded(name: str, folder: Path) -> Captioner:
    captioner = captioner_class(name)(Weights(str(folder), "revision", folder), Generation(TOKENS, 1))
    captioner.load("cpu", torch.float32, offline=True)
    return captioner


def said(captioner: Captioner, *prompts: str) -> list[str]:
    """Of every picture in one batch; prompts take turns."""
    contexts = [CaptionContext(f"{i}.png", prompts[i % len(prompts)]) for i in range(len(images()))]
    return [result.text for result in captioner.caption(images(), contexts)]


def test_blip_says_what_the_stock_model_says_from_a_prompt_and_without(blip: Path):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    processor: Any = BlipProcessor.from_pretrained(blip)
    model: Any = BlipForConditionalGeneration.from_pretrained(blip)
    prompts = ["", "a red"]
    stock = []
    for i, image in enumerate(images()):
        asked = {"text": prompts[i % 2]} if prompts[i % 2] else {}
        inputs = processor(images=image, return_tensors="pt", **asked)
        tokens = model.generate(**inputs, max_new_tokens=TOKENS)[0]
        stock.append(processor.decode(tokens, skip_special_tokens=True).strip())
    assert said(loaded("blip", blip), *prompts) == stock
    assert len(set(stock)) > 3 and stock[1].startswith("a red")


def test_florence_says_what_the_stock_model_says_of_its_task(tmp_path: Path):
    from transformers import Florence2ForConditionalGeneration, Florence2Processor

    folder = tiny.tiny_florence(tmp_path / "florence", seed=2)
    processor: Any = Florence2Processor.from_pretrained(folder)
    model: Any = Florence2ForConditionalGeneration.from_pretrained(folder)
    stock = []
    for image in images():
        inputs = processor(text="<MORE_DETAILED_CAPTION>", images=image, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, num_beams=1, do_sample=False)
        text = processor.batch_decode(tokens, skip_special_tokens=False)[0]
        answer = processor.post_process_generation(text, task="<MORE_DETAILED_CAPTION>", image_size=image.size)
        stock.append(answer["<MORE_DETAILED_CAPTION>"])
    captioner = loaded("florence2", folder)
    assert said(captioner, captioner.default_prompt) == stock
    assert len(set(stock)) > 3 and len({len(text.split()) for text in stock}) > 1  # so that some were padded
    with pytest.raises(BadInput, match=r"<OD> answers with boxes; ask for <MORE_DETAILED_CAPTION>"):
        said(captioner, "<OD>")


def test_a_llava_says_what_the_stock_pipeline_says_of_questions_of_different_length(tmp_path: Path):
    from transformers import pipeline

    folder = tiny.tiny_llava(tmp_path / "llava")
    ask: Any = pipeline("image-text-to-text", model=str(folder), device="cpu")
    prompts = ["describe the picture", "what"]
    stock = []
    for i, image in enumerate(images()):
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompts[i % 2]}]
        answer = ask(text=[{"role": "user", "content": content}], max_new_tokens=TOKENS, return_full_text=False,
                     generate_kwargs={"do_sample": False})  # fmt: skip
        stock.append(answer[0]["generated_text"].strip())
    assert said(loaded("vlm", folder), *prompts) == stock
    assert len(set(stock)) > 3


def test_a_wd_tagger_scores_the_padded_picture_in_blue_green_red(tmp_path: Path):
    tags = [("blue_sky", 0), ("green", 0), ("red_hair", 4), (">_<", 0), ("safe", 9)]
    captioner = loaded("wd", tiny.tiny_tagger(tmp_path / "wd", tags))
    wide = Image.new("RGB", (60, 30), "red")  # half of its square is white: blue and green 0.5, red 1
    (tagged,) = captioner.caption([wide], [CaptionContext("a.png")])
    assert tagged.tags == (
        ("red hair", 1.0, "character"),
        ("blue sky", pytest.approx(0.5, abs=0.02), "general"),
        ("green", pytest.approx(0.5, abs=0.02), "general"),
        (">_<", 0.5, "general"),
        ("safe", 0.5, "rating"),
    ) or {tag: round(score, 1) for tag, score, _ in tagged.tags} == {
        "red hair": 1.0, "blue sky": 0.5, "green": 0.5, ">_<": 0.5, "safe": 0.5}  # fmt: skip
    black = captioner.caption([Image.new("RGB", (32, 32))], [CaptionContext("b.png")])[0]
    assert [tag for tag, _, _ in black.tags] == [">_<", "safe"]  # what is unlikely is not kept


def test_a_tagger_whose_batch_is_fixed_takes_no_more(tmp_path: Path):
    captioner = loaded("wd", tiny.tiny_tagger(tmp_path / "wd", [("a", 0)], batch=1))
    assert captioner.max_batch == 1


@pytest.mark.parametrize(
    ("name", "make"), [("blip", tiny.tiny_blip), ("florence2", tiny.tiny_florence), ("vlm", tiny.tiny_llava)]
)
def test_pixels_are_given_in_the_models_precision(tmp_path: Path, name: str, make: Any):
    """As on a GPU, where models are loaded in bfloat16."""
    captioner = captioner_class(name)(Weights("x", "revision", make(tmp_path / name)), Generation(2, 1))
    captioner.load("cpu", torch.bfloat16, offline=True)
    prompt = captioner.default_prompt or "a red"
    assert len(captioner.caption(images(), [CaptionContext("a.png", prompt)] * len(images()))) == len(images())


def damaged(folder: Path, name: str) -> Path:
    """A folder of weights with one fault."""
    match name:
        case "a model of another kind":
            return tiny.tiny_llava(folder)
        case "a task it has no class for":
            tiny.tiny_blip(folder)
            config = folder / "config.json"
            config.write_text(config.read_text().replace("{", '{"auto_map": {"AutoModel": "code.Model"},', 1))
        case "pickled weights":
            tiny.tiny_blip(folder)
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        case "missing tensors":
            from safetensors.torch import load_file, save_file

            tiny.tiny_blip(folder)
            tensors = load_file(folder / "model.safetensors")
            tensors.pop(next(name for name in sorted(tensors) if "crossattention" in name))
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("a model of another kind", "holds a llava model, expected blip"),
        ("a task it has no class for", "needs code of its own, which is never run"),
        ("pickled weights", "pickled weights are never read"),
        ("missing tensors", "lacks 1 of its tensors, such as text_decoder"),
    ],
)
def test_weights_that_cannot_be_trusted_are_refused_in_one_line(tmp_path: Path, fault: str, says: str):
    with pytest.raises(BadInput, match=says) as caught:
        loaded("blip", damaged(tmp_path / "weights", fault))
    assert "\n" not in str(caught.value)


def test_a_chat_model_without_a_chat_template_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="has no chat template"):
        loaded("vlm", tiny.tiny_llava(tmp_path / "llava", chat_template=None))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_model_whose_processor_needs_torchvision_is_refused_in_one_line(tmp_path: Path):
    """Laid out as Qwen-VL is, with a processor of videos."""
    folder = tiny.tiny_llava(tmp_path / "qwen")
    (folder / "processor_config.json").write_text('{"processor_class": "Qwen2_5_VLProcessor"}')
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    (folder / "video_preprocessor_config.json").write_text('{"video_processor_type": "Qwen2VLVideoProcessor"}')
    with pytest.raises(BadInput, match=r"needs torchvision, which is not installed; pip install torchvision"):
        loaded("vlm", folder)


def test_a_tagger_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tiny.tiny_tagger(tmp_path / "wd", [("a", 0), ("b", 0)])
    (folder / "selected_tags.csv").write_text("tag_id,name,category,count\n0,a,0,1\n")
    with pytest.raises(BadInput, match=r"the model scores 2 tags, selected_tags\.csv lists 1"):
        loaded("wd", folder)
    (folder / "selected_tags.csv").unlink()
    with pytest.raises(BadInput, match=r"has no selected_tags\.csv"):
        loaded("wd", folder)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadInput, match=r"pip install 'safelight\[caption\]'"):
        loaded("wd", folder)


def test_an_unknown_captioner_is_named_with_those_there_are(tmp_path: Path):
    with pytest.raises(BadInput, match="did you mean 'blip'"):
        captioner_class("blipp")
    with pytest.raises(BadInput, match=", ".join(CAPTIONERS)):
        captioner_class("qqq")


def test_a_plug_in_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "mine-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[safelight.captioners]\nmine = my_captioner:Mine\nlost = gone:Gone\n")
    (tmp_path / "my_captioner.py").write_text("class Mine:\n    name = 'mine'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert captioner_class("mine").__name__ == "Mine"  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="captioner 'lost': its package cannot be loaded"):
        captioner_class("lost")


def test_weights_are_named_by_their_bytes_and_hub_models_by_their_commit(bench: Bench, blip: Path, tmp_path: Path):
    def at(source: str) -> Weights:
        return Weights.at(source, lambda paths: hash_files(bench.catalog, paths))

    first = at(str(blip))
    assert len(first.revision) == 40 and at(str(blip)) == first
    other = tiny.tiny_blip(tmp_path / "other", seed=1)
    assert at(str(other)).revision != first.revision
    commit = "a" * 40
    assert at(f"Salesforce/blip-image-captioning-base@{commit}").revision == commit
    with pytest.raises(BadInput, match="40 hex digits of a commit"):
        at("Salesforce/blip-image-captioning-base")
    with pytest.raises(BadInput, match="holds no weights"):
        at(str(tmp_path))


def test_florences_first_ids_stand_for_the_repositories_without_code(bench: Bench):
    florence: Any = captioner_class("florence2")
    source = f"microsoft/Florence-2-base@{'b' * 40}"
    weights = Weights.at(source, lambda paths: {}, florence.renamed)
    assert weights.repository == "florence-community/Florence-2-base"
    with pytest.raises(BadInput, match=r"now florence-community/Florence-2-base, whose own commit is to be given"):
        weights.fetched(offline=True)
