"""Sixteen processes on the same pictures of one workspace do the work once, also when half of them are killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

ITEMS, WRITERS, KILLED, LEASE, SHARD = 200, 16, 8, 8, 64


def test_sixteen_processes_encode_each_picture_once_and_a_killed_one_costs_at_most_its_lease(tmp_path: Path):
    words = ("--items", ITEMS, "--writers", WRITERS, "--killed", 0, KILLED, "--lease", LEASE, "--shard", SHARD)
    told = subprocess.run(
        [sys.executable, "-m", "tests.soak.writers", str(tmp_path / "writers"), *map(str, words)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert told.returncode == 0, f"{told.stdout}{told.stderr}"
    document = json.loads(told.stdout)
    whole, halved = document["killed"]["0"], document["killed"][str(KILLED)]
    assert whole["ended"] == [0] * WRITERS and whole["workers"] > 1
    assert whole["encodes"] == whole["distinct"] == ITEMS
    assert halved["ended"] == [-9] * KILLED + [0] * (WRITERS - KILLED)
    assert halved["distinct"] == ITEMS and halved["encodes"] <= ITEMS + KILLED * LEASE
    for result in (whole, halved):  # everybody who lived reads, to the bit, what a lone run makes
        assert result["digests"] == [document["alone"]]
        assert sum(result["shards"]) == ITEMS and result["pieces_left"] == 0
        assert sum(rows < SHARD for rows in result["shards"]) <= 1
