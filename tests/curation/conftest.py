"""A bench for each test."""

from pathlib import Path

import pytest

from components.stages import Bench
from tests.curation.folders import new_bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Its catalog's tables are made at once instead of by migrations, which cost a second each time."""
    return new_bench(tmp_path / "home")
