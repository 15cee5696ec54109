"""What Safelight's curation finds in a folder: `python -m tests.benchmarks.our_checks FOLDER RESULT`.

The whole stage with the snapshot and its catalog rows; the files are read where they are, as the others read them.
"""

import json
import sys
import tempfile
from itertools import combinations
from pathlib import Path

import pyarrow.parquet as pq

from components.config import CurationConfig, DataConfig, DataSource
from components.curation.checks import ImageFacts
from components.curation.duplicates import near_duplicates
from components.curation.examining import examine_files
from components.curation.profiles import PHOTO
from components.curation.scanning import scan
from components.curation.snapshots import curate
from components.stages import Bench
from components.workspace import Workspace

FLAGS = {"dark": "dark", "bright": "bright", "blur": "blur", "low_information": "low_information",
         "aspect": "odd_aspect", "tiny": "odd_size"}


def found_in(folder: Path, home: Path) -> dict:
    bench = Bench.open(Workspace(home))
    bench.catalog.migrate()
    sources = (DataSource(path=str(folder)),)
    data, curation = DataConfig(sources=sources, copy_pictures=False), CurationConfig()
    scanned = scan(bench, data)
    product = curate(bench, data, curation, dataset="planted", training_size=512, scanned=scanned)
    flags: dict[str, list[str]] = {name: [] for name in FLAGS.values()}
    for row in pq.read_table(bench.store.path(product.outputs["verdicts"].sha256)).to_pylist():
        if row["check"] in FLAGS:
            flags[FLAGS[row["check"]]].append(row["file_name"])
    return {"flags": flags} | pairs_of(bench, scanned.files, curation)


def pairs_of(bench: Bench, files, curation: CurationConfig) -> dict:
    """Pairs that the verdicts tell only as groups: from the remembered facts, without a picture being opened."""
    examined, decoded = examine_files(bench, files, lambda done, total: None)
    assert decoded == 0
    known = [(file.item.file_name, facts) for file in files
             if isinstance(facts := examined[file.sha256], ImageFacts)]
    alike: dict[str, list[str]] = {}
    for name, facts in known:
        alike.setdefault(facts.rgb_digest, []).append(name)
    near = near_duplicates([f.phash for _, f in known], [f.dhash for _, f in known], [f.mean_colour for _, f in known],
                           phash_distance=curation.phash_distance, dhash_distance=curation.dhash_distance,
                           colour_distance=curation.colour_distance, brightness_gain=PHOTO.brightness_gain)
    return {"exact": [pair for names in alike.values() for pair in combinations(names, 2)],
            "near": [[known[i][0], known[j][0]] for i, j in near.tolist()]}


if __name__ == "__main__":
    source, result = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as home:
        result.write_text(json.dumps(found_in(source, Path(home))))
