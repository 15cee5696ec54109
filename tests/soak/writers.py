"""Many processes that fill one cache with the same pictures at once, some of them killed: who encoded what.

    python -m tests.soak.writers FOLDER --items 2000 --writers 16 --killed 0 8

Prints one JSON document: what a lone writer reads, and a result for each number of killed ones. Passes when each
picture was encoded once, or at most a lease more for each killed writer, and everybody who lived reads what the lone
one reads.
The writers are forks of a process that has imported torch and used nothing of it.
"""

import argparse
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from components.catalog.encodings import locate
from components.curation.pixels import rgb_digest
from components.families.autoencoders import GaussianEncoder
from components.latents import encoding, pieces
from components.latents.buckets import Bucket, cover
from components.latents.encoding import encode_missing, normalised, picture_of
from components.latents.keys import Item
from components.latents.reading import ShardReader
from components.stages import Bench
from components.storage import Store
from components.tensors import to_safetensors
from components.workspace import Workspace

ENCODER = "encoder"
SIDE = 32  # pixels


def prepare(folder: Path, count: int) -> None:
    """A base's autoencoder, and a store that holds the pictures."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=SIDE)  # fmt: skip
    vae.save_pretrained(folder / "base" / "vae")
    store = Store(folder / "pictures")
    random = np.random.default_rng(0)
    items = []
    for index in range(count):
        image = Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        image.save(data := BytesIO(), "PNG")
        items.append([store.put(data.getvalue()).sha256, rgb_digest(image), f"{index}.png"])
    (folder / "items.json").write_text(json.dumps(items))


def items_of(folder: Path) -> list[Item]:
    return [
        Item(f"{rgb}@{SIDE}x{SIDE}", sha256, cover(SIDE, SIDE, Bucket(SIDE, SIDE)), file_name=name)
        for sha256, rgb, name in json.loads((folder / "items.json").read_text())
    ]


def opened(home: Path) -> Bench:
    bench = Bench.open(Workspace(home))
    bench.catalog.migrate()
    return bench


def write(folder: Path, home: Path, log: Path) -> None:
    """Encode every picture that nobody has encoded, and read all of them; `log` gets each key when it is encoded."""
    bench, items = Bench.open(Workspace(home)), items_of(folder)
    encoder = None
    pictures = Store(folder / "pictures")
    with log.open("a", buffering=1) as told:

        def encode(inputs: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
            nonlocal encoder
            encoder = encoder or GaussianEncoder(folder / "base", "cpu")
            told.write("".join(f"{key}\n" for key in dict(inputs)))
            return encoder.encode(normalised([picture for _, picture in inputs]))

        encode_missing(
            bench, ENCODER, items, encode, lambda _: None, prepare=lambda item: (item.key, picture_of(pictures, item))
        )
    log.with_suffix(".digest").write_text(digest_of(bench, items))


def digest_of(bench: Bench, items: list[Item]) -> str:
    """Of every row, read back."""
    keys = [item.key for item in items]
    rows = ShardReader(bench.store, locate(bench.catalog, ENCODER, keys))(keys)
    return hashlib.sha256(to_safetensors(rows)).hexdigest()


def fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def done(work: Callable[[], object]) -> None:
    """In a process of its own, so that this one stays free of threads."""
    assert os.waitpid(fork(work), 0)[1] == 0


def encoded(logs: Path) -> list[str]:
    return [line for log in sorted(logs.glob("*.log")) for line in log.read_text().splitlines()]


def together(folder: Path, name: str, writers: int, killed: int) -> dict[str, Any]:
    """Let them write; when a third of the pictures is encoded, kill those that have encoded most."""
    home, logs = folder / name, folder / f"{name}-logs"
    logs.mkdir()
    done(lambda: opened(home))
    count, started = len(items_of(folder)), time.monotonic()

    def start(writer: str) -> int:
        return fork(lambda: write(folder, home, logs / f"{writer}.log"))

    children = {f"{index:02d}": start(f"{index:02d}") for index in range(writers)}
    if killed:
        while len(encoded(logs)) < count / 3:
            time.sleep(0.005)
        busiest = sorted(logs.glob("*.log"), key=lambda log: -log.stat().st_size)
        for writer in list(dict.fromkeys([*(log.stem for log in busiest), *children]))[:killed]:
            os.kill(children[writer], signal.SIGKILL)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children.values()]
    keys = encoded(logs)
    return {
        "ended": sorted(ended),
        "encodes": len(keys),
        "distinct": len(set(keys)),
        "workers": sum(log.stat().st_size > 0 for log in logs.glob("*.log")),
        "digests": sorted({path.read_text() for path in logs.glob("*.digest")}),
        "pieces_left": sum(path.is_file() for path in Workspace(home).pieces.rglob("[!.]*")),
        "seconds": round(time.monotonic() - started, 1),
    }


def shards(folder: Path, name: str) -> list[int]:
    """Rows of each shard, fewest first."""
    catalog = Bench.open(Workspace(folder / name)).catalog
    places = locate(catalog, ENCODER, [item.key for item in items_of(folder)])
    return sorted(Counter(shard for shard, _ in places.values()).values())


def passed(result: dict[str, Any], killed: int, asked: argparse.Namespace, alone: str) -> bool:
    lived = asked.writers - killed
    return (
        result["ended"] == [-signal.SIGKILL] * killed + [0] * lived
        and result["distinct"] == sum(result["shards"]) == asked.items
        and result["encodes"] <= asked.items + killed * asked.lease
        and result["digests"] == [alone]
        and result["pieces_left"] == 0
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--items", type=int, default=2000)
    options.add_argument("--writers", type=int, default=16)
    options.add_argument("--killed", type=int, nargs="+", default=[0, 8])
    options.add_argument("--lease", type=int, default=encoding.LEASE_ITEMS)
    options.add_argument("--shard", type=int, default=pieces.SHARD_ITEMS)
    asked = options.parse_args()
    folder: Path = asked.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    encoding.LEASE_ITEMS, pieces.SHARD_ITEMS = asked.lease, asked.shard
    gc.freeze()  # so that the forks share the memory of what was imported
    done(lambda: prepare(folder, asked.items))
    done(lambda: (opened(folder / "alone"), write(folder, folder / "alone", folder / "alone.log")))
    results = {killed: together(folder, f"killed-{killed}", asked.writers, killed) for killed in asked.killed}
    found = {killed: result | {"shards": shards(folder, f"killed-{killed}")} for killed, result in results.items()}
    alone = (folder / "alone.digest").read_text()
    print(json.dumps({"lease": asked.lease, "alone": alone, "killed": found}))
    good = all(passed(result, killed, asked, alone) for killed, result in found.items())
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
