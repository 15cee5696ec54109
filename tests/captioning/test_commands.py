"""`safelight caption`, `edit-caption` and `caption-history`, from pictures without a word to a snapshot."""

from pathlib import Path

import pytest

from components.config import BaseModelConfig, load_recipe
from components.curation.caption_statistics import noted_statistics
from components.curation.snapshots import curate, curate_key
from components.families.bases import resolve_base
from components.stages import Bench
from components.workspace import Workspace
from flows.children import TorchChild
from tests.curation.folders import curated, picture, pictures, sources, tree_digest
from tests.flows.conftest import Shell, shell  # noqa: F401


@pytest.fixture
def recipe(tmp_path: Path, blip: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(4):
        picture(seed).save(folder / f"{seed}.png")
    (folder / "0.txt").write_text("a person wrote this")
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'name = "blobs"\n[[data.sources]]\npath = "pictures"\n'
        f'[captions]\npolicy = "prose"\ncaptioners = ["blip={blip}"]\nmax_new_tokens = 6\n'
    )
    return path


def test_a_tiny_blip_captions_a_folder_into_a_snapshot_and_a_second_run_asks_nothing(
    shell: Shell,  # noqa: F811
    recipe: Path,
):
    before = tree_digest(recipe.parent / "pictures")
    (trial,) = shell.document("caption", str(recipe), "--dry-run", "2")["captioners"]
    assert (trial["captioned"], len(trial["examples"])) == (2, 2)
    (report,) = shell.document("caption", str(recipe))["captioners"]
    assert (report["wanted"], report["known"], report["captioned"], report["failed"]) == (3, 0, 3, [])
    assert {one["file_name"]: one["said"] for one in trial["examples"]}.items() <= {
        one["file_name"]: one["said"] for one in report["examples"]
    }.items()
    assert shell("caption", str(recipe)) == 0
    assert "captioned 0 of 3, 3 were known, 0 failed" in shell.out
    assert tree_digest(recipe.parent / "pictures") == before

    bench, settings = Bench.open(Workspace.from_environment()), load_recipe(recipe)
    sizes = {"dataset": "blobs", "training_size": 64}
    key, found = curate_key(bench, settings.data, settings.curation, captions=settings.captions, **sizes)
    curate(bench, settings.data, settings.curation, scanned=found, key=key, **sizes)
    history = shell.document("caption-history", "blobs", "1.png")
    assert history["caption"] == history["versions"][0]["text"] != ""
    shell.document("edit-caption", "blobs", "1.png", "a ball in the sea", "--by", "Ada")
    assert shell("caption-history", "blobs", "1.png") == 0
    assert "a ball in the sea" in shell.out and "Ada" in shell.out and "blip@" in shell.out
    newer, _ = curate_key(bench, settings.data, settings.curation, captions=settings.captions, **sizes)
    assert newer != key
    assert shell("edit-caption", "blobs", "1.png") == 2
    assert "give the caption's text, or --withdraw" in shell.err
    assert shell("edit-caption", "blobs", "1.png", "--withdraw") == 0
    assert "withdrawn" in shell.out


def test_the_torch_child_describes_captions_where_a_tokenizer_takes_transformers(bench: Bench, tmp_path: Path):
    facts = curated(bench, pictures(tmp_path / "data", 3)).facts
    data = sources(tmp_path / "data")
    request = {"stage": "describe", "snapshot_id": facts["snapshot_id"], "snapshot": facts["digest"]}
    request |= {"base": {"model": "embedded"}, "data": data.model_dump(mode="json")}
    with TorchChild(bench.workspace, tmp_path / "torch.log", threads=1) as child:
        child.ask(request, lambda event: None)
    base = resolve_base(BaseModelConfig())
    noted = noted_statistics(bench, facts["snapshot_id"], facts["digest"], base, data)
    assert noted is not None and noted["captions"] == 3


def test_what_cannot_be_captioned_ends_in_one_line(shell: Shell, recipe: Path, tmp_path: Path):  # noqa: F811
    assert shell("caption", str(recipe), "--captioner", "blip") == 2
    assert "expected NAME=FOLDER or NAME=OWNER/MODEL@COMMIT" in shell.err
    assert shell("caption", str(recipe), "--set", "captions.captioners=[]") == 2
    assert "no captioner is named" in shell.err
    assert shell("caption", str(recipe), "--captioner", f"blip={tmp_path / 'none'}") == 2
    assert "no such folder" in shell.err
    assert len(shell.err.strip().splitlines()) == 1
