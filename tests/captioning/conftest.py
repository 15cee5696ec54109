"""A bench for each test, and tiny captioners that are made once."""

from pathlib import Path

import pytest

from components.stages import Bench
from tests.curation.folders import new_bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return new_bench(tmp_path / "home")


@pytest.fixture(scope="session")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.captioning.tiny import tiny_blip  # loads torch, which most of these tests do without

    return tiny_blip(tmp_path_factory.mktemp("captioners") / "blip")
