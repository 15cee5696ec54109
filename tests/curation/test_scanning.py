"""What it costs to look at data again, counted: a hundredth of the files changed is a hundredth of the work."""

from collections import Counter
from pathlib import Path

import pytest

from components.curation import memory
from components.stages import Bench, Product
from tests.curation.folders import curated, picture, pictures
from tests.curation.listening import listening

NUMBER = 100


def curated_with_opens(bench: Bench, folder: Path) -> tuple[Product, Counter[str]]:
    """What curating gives, and how often each of the folder's files was opened for it."""
    with listening() as heard:
        product = curated(bench, folder)
    return product, Counter(Path(name).name for name in heard if name.startswith(str(folder)))


def test_a_hundredth_of_the_pictures_changed_costs_a_hundredth_of_the_work(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "TRUSTED_AGE_NS", -(10**12))  # the files are younger than would be trusted
    folder = pictures(tmp_path / "data", NUMBER)
    first, opened = curated_with_opens(bench, folder)
    assert (first.facts["hashed"], first.facts["examined"]) == (NUMBER, NUMBER)
    assert opened == {path.name: 2 if path.suffix == ".png" else 1 for path in folder.iterdir()}  # hashed, then decoded

    unchanged, opened = curated_with_opens(bench, folder)
    assert (unchanged.facts["hashed"], unchanged.facts["examined"], opened) == (0, 0, {})
    assert unchanged.outputs == first.outputs

    picture(1000).save(folder / "007.png")
    (folder / "050.txt").write_text("another caption\n")
    changed, opened = curated_with_opens(bench, folder)
    assert (changed.facts["hashed"], changed.facts["examined"]) == (1, 1)
    assert opened == {"007.png": 2, "050.txt": 1}
