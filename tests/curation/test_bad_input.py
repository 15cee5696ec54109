"""Hostile and broken folders, archives and tables: a bad file is named with the reason and costs no other its place."""

import json
import os
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from components.catalog import datasets
from components.config import CurationConfig, DataConfig, load_recipe
from components.curation import examining
from components.curation.manifest import SampleRow, read_manifest
from components.curation.scanning import scan
from components.curation.snapshots import curate
from components.curation.sources import read_data
from components.errors import BadInput, DamagedArtifact
from components.stages import Bench
from tests.curation.folders import picture, pictures, table, tree_digest
from tests.curation.handmade import png as handmade_png
from tests.curation.handmade import tiff
from tests.curation.test_layouts import as_parquet, data, items, listening, png, skipped, write_tar
from tests.curation.test_snapshots import header_only_png

ROOT = Path(__file__).parents[2]


def judged(bench: Bench, source: DataConfig) -> tuple[dict[str, SampleRow], dict[str, str]]:
    """What is kept, and why each other file is not; the sources are as they were."""
    folder = Path(source.sources[0].path)
    before = tree_digest(folder)
    made = curate(bench, source, CurationConfig(), dataset="blobs", training_size=64)
    assert tree_digest(folder) == before
    said = pq.read_table(pa.BufferReader(bench.store.read(made.outputs["verdicts"].sha256))).to_pylist()
    rejected = {row["file_name"]: row["reason"] for row in said if row["decision"] == "reject"}
    assert all("\n" not in reason for reason in rejected.values())
    assert made.facts["rejected"] == len(rejected)
    return {row.file_name: row for row in read_manifest(bench.store, made.facts["digest"])}, rejected


# one folder with everything -------------------------------------------------------------------------------------------

SPOILT: dict[str, tuple[bytes, str]] = {  # what is in the picture's file, and what is said of it
    "empty.png": (b"", "the file is empty (0 bytes)"),
    "cut.png": (png(90)[:900], "cut short or damaged"),
    "flipped.png": (png(91)[:300] + b"!" + png(91)[301:], "cut short or damaged"),
    "letter.jpg": (b"Dear all,", "not a PNG, JPEG"),
    "vast.png": (header_only_png(100_000), "10000000000 pixels"),
    "tile.tif": (tiff(64, 64, (8,), 1, b"", tile=(9000, 9000)), "tiles of 9000 x 9000 pixels for 64 x 64"),
    "text.png": (handmade_png(1, 1, 2, 8, bytes(4), *[(b"tEXt", b"x\0" + bytes(1 << 20))] * 70), "text chunks"),
    "vector.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "not a PNG"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n", "not a PNG"),
    "layers.psd": (b"8BPS\0\1" + bytes(40), "not a PNG"),
    "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(40), "not a PNG"),
}
UNSAID: dict[str, tuple[bytes, str]] = {  # what is in the caption's file, and what is said of it
    "nothing.png": (b"", "nothing.txt: the caption is empty"),
    "mark.png": (b"\xef\xbb\xbf", "mark.txt: the caption is empty"),
    "white.png": (" \t\r\n\u2003\u3000\n".encode(), "white.txt: the caption is empty"),
    "cp1252.png": ("grün".encode("cp1252"), "cp1252.txt: byte 0xfc at offset 2 is not UTF-8"),
    "quote.png": (b"it\x92s", "quote.txt: byte 0x92 at offset 2 is not UTF-8"),
    "utf16.png": ("a cat".encode("utf-16"), "utf16.txt: byte 0xff at offset 0 is not UTF-8"),
    "utf16le.png": ("grün".encode("utf-16-le"), "utf16le.txt: byte 0xfc at offset 4 is not UTF-8"),
    "surrogate.png": (b"a \xed\xa0\x80", "surrogate.txt: byte 0xed at offset 2 is not UTF-8"),
    "nul.png": (b"\0\0\0", "nul.txt: the caption is empty"),
    "book.png": (b"word " * 300_000, "book.txt: has more than 1,048,576 bytes"),
}


def test_whatever_is_wrong_with_one_file_every_other_keeps_its_place(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 4)
    for name, (body, _) in SPOILT.items():
        (folder / name).write_bytes(body)
        (folder / name).with_suffix(".txt").write_text("a caption")
    for seed, (name, (body, _)) in enumerate(UNSAID.items()):
        picture(200 + seed).save(folder / name)
        (folder / name).with_suffix(".txt").write_bytes(body)
    kept, rejected = judged(bench, data(folder))
    assert kept.keys() == {f"{i:03}.png" for i in range(4)}
    expected = {name: said for name, (_, said) in (SPOILT | UNSAID).items()}
    assert rejected.keys() == expected.keys()
    assert {name: reason for name, reason in rejected.items() if expected[name] not in reason} == {}


@pytest.mark.parametrize(
    ("body", "caption"),
    [
        ("שלום עולם \u202eabc\u202c", "שלום עולם \u202eabc\u202c"),
        ("猫 🐈‍⬛ \U000e0001", "猫 🐈‍⬛ \U000e0001"),
        ("w" * 100_000, "w" * 100_000),
        ("a\0cat", "acat"),
        ("\u2028\x85a cat\x0cb", "a cat"),
        ("<script>alert(1)</script> ![x](http://192.0.2.1/x)", "<script>alert(1)</script> ![x](http://192.0.2.1/x)"),
        ("../../etc/passwd", "../../etc/passwd"),
    ],
    ids=["right to left", "emoji", "100 kB", "a NUL", "odd ends of lines", "a script", "a path"],
)
def test_captions_are_kept_as_they_are_written(bench: Bench, tmp_path: Path, body: str, caption: str):
    folder = pictures(tmp_path / "data", 2)
    (folder / "000.txt").write_text(body, encoding="utf-8", newline="")
    kept, rejected = judged(bench, data(folder))
    assert (kept["000.png"].text, rejected) == (caption, {})


# names ----------------------------------------------------------------------------------------------------------------


def test_names_that_differ_in_ending_case_or_unicode_form_are_samples_of_their_own(bench: Bench, tmp_path: Path):
    forms = [unicodedata.normalize(form, "naïve.png") for form in ("NFC", "NFD")]
    names = [
        "a.png",
        "a.jpg",
        "A.png",
        "sub/a.png",
        *forms,
        "-rf.png",
        "con.png",
        " .png",
        "a\nb.png",
        "x" * 240 + ".png",
    ]
    for seed, name in enumerate(names):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).convert("RGB").save(path)
        path.with_suffix(".txt").write_text(f"caption of {path.stem[:9]}")
    kept, rejected = judged(bench, data(tmp_path / "data"))
    assert rejected == {}
    assert kept.keys() == set(names)
    assert len({row.sha256 for row in kept.values()}) == len(names)


def test_a_name_that_is_no_text_is_rejected_and_shown_and_does_not_pass_for_another(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 2)
    picture(7).save(os.fsencode(folder) + b"/\xff.png")
    picture(8).save(folder / "\\udcff.png")  # what the other is shown as
    (folder / "\\udcff.txt").write_text("a name with a backslash")
    made = curate(bench, data(folder), CurationConfig(), dataset="blobs", training_size=64)
    assert (made.facts["kept"], made.facts["rejected"], made.facts["rejects"]) == (3, 1, {"file": 1})
    assert len(datasets.items_page(bench.catalog, made.facts["snapshot_id"]).items) == 3


# what is no regular file ----------------------------------------------------------------------------------------------


def test_links_out_pipes_sockets_and_devices_are_never_opened(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    picture(9).save(tmp_path / "outside.png")
    (folder / "chain-1.png").symlink_to("chain-2.png")
    (folder / "chain-2.png").symlink_to("../outside.png")
    for name, target in {
        "loop-1": "loop-2.png",
        "loop-2": "loop-1.png",
        "zero": "/dev/zero",
        "random": "/dev/urandom",
        "up": "..",
        "self": "/proc/self/mem",
        "root": "/proc/self/root/etc/passwd",
    }.items():
        (folder / f"{name}.png").symlink_to(target)
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "001.caption")
    expected = {
        f"{name}.png"
        for name in ("chain-1", "chain-2", "loop-1", "loop-2", "zero", "random", "self", "root", "pipe", "socket")
    }
    if os.geteuid() == 0:
        os.mknod(folder / "device.png", stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero by another name
        expected.add("device.png")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)  # a socket's name must be short
        try:
            listener.bind("socket.png")
        finally:
            os.chdir(here)
        with listening() as opened:
            kept, rejected = judged(bench, data(folder))
    assert kept.keys() == {"000.png", "001.png", "002.png"}
    assert rejected.keys() == expected
    strangers = [name for name in opened if name.startswith(("/dev/zero", "/dev/urandom", "/proc", "/etc/passwd"))]
    assert strangers == [] and str(tmp_path / "outside.png") not in opened
    assert skipped(folder)["up.png"] == "a link to a folder, which is not entered"


def test_a_link_to_a_mask_outside_is_not_followed_and_a_pipe_for_one_is_not_opened(bench: Bench, tmp_path: Path):
    folder, apart = pictures(tmp_path / "data", 4), tmp_path / "masks"
    apart.mkdir()
    picture(9).save(tmp_path / "secret.png")
    for where, name in ((folder, "{}-masklabel.png"), (apart, "{}.png")):
        picture(20).convert("L").save(where / name.format("000"))
        (where / name.format("001")).symlink_to(tmp_path / "secret.png")
        os.mkfifo(where / name.format("002"))
    picture(21).convert("L").save(apart / "000.bmp")
    with listening() as opened:
        kept, rejected = judged(bench, data(folder, masks="masklabel"))
        assert kept.keys() == {"000.png", "003.png"} and kept["000.png"].mask
        assert rejected == {
            "001.png": "001-masklabel.png: is a link to a file outside the folder; copy the file into it",
            "002.png": "002-masklabel.png: is not a regular file; remove it",
        }
        kept, rejected = judged(bench, data(folder, masks=str(apart)))
        assert kept.keys() == {"003.png"}
        assert rejected["000.png"] == "it has two masks, 000.bmp and 000.png; remove one"
    assert str(tmp_path / "secret.png") not in opened


def test_a_mask_has_the_limits_of_a_picture(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(examining, "MAX_FILE_BYTES", 1 << 20)
    folder = pictures(tmp_path / "data", 4)
    (folder / "000-masklabel.png").write_bytes(header_only_png(9_000))
    (folder / "001-masklabel.png").write_bytes(png(91)[:300])
    with (folder / "002-masklabel.png").open("wb") as file:
        file.truncate((1 << 20) + 1)
    picture(20).convert("L").save(folder / "003-masklabel.png")
    with listening() as opened:
        made = curate(bench, data(folder, masks="masklabel"), CurationConfig(), dataset="blobs", training_size=64)
    assert Counter(opened)[str(folder / "002-masklabel.png")] == 1  # hashed, a piece at a time, and not read
    said = pq.read_table(pa.BufferReader(bench.store.read(made.outputs["verdicts"].sha256))).to_pylist()
    reasons = {row["file_name"]: row["reason"] for row in said if row["check"] == "mask"}
    assert [row.file_name for row in read_manifest(bench.store, made.facts["digest"]) if row.mask] == ["003.png"]
    assert reasons.keys() == {"000.png", "001.png", "002.png"}
    assert "000-masklabel.png: its header says 9000 x 9000 pixels, more than 64,000,000" in reasons["000.png"]
    assert "001-masklabel.png: cut short or damaged" in reasons["001.png"]
    assert reasons["002.png"] == "002-masklabel.png: the file has more than 1,048,576 bytes, which is no mask"


def test_a_mask_that_changed_since_the_scan_ends_the_run_in_one_line(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 2)
    mask = folder / "000-masklabel.png"
    picture(20).convert("L").save(mask)
    scanned = scan(bench, data(folder, masks="masklabel"))
    settings = {"dataset": "blobs", "training_size": 64, "scanned": scanned}
    for change, said in ((lambda: picture(21).convert("L").save(mask), "changed while"), (mask.unlink, "since it was")):
        change()
        with pytest.raises(DamagedArtifact, match=rf"^{mask}: .*{said}.*; run the same command again$"):
            curate(bench, data(folder), CurationConfig(), **settings)


def test_folders_nested_deeper_than_calls_are_read_and_deeper_than_paths_are_listed(tmp_path: Path):
    folder = pictures(tmp_path / "data", 1)
    here = Path.cwd()
    try:
        os.chdir(folder)
        for depth in range(2200):
            if depth == 1200:
                picture(5).save("deep.png")
                Path("deep.txt").write_text("deep down")
            Path("d").mkdir()
            os.chdir("d")
    finally:
        os.chdir(here)
    try:
        found = items(folder)
        assert {name.count("/"): item.caption for name, item in found.items()} == {
            0: "blobs number 0",
            1200: "deep down",
        }
        assert list(skipped(folder).values()) == ["a folder that cannot be listed: File name too long"]
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_what_this_user_may_not_read_is_rejected_or_listed_with_the_reason():
    code = (
        "import json, os, sys\n"
        "from components.curation.scanning import scan\n"
        "from tests.curation.folders import new_bench, sources\n"
        "from pathlib import Path\n"
        "bench, where = new_bench(Path(sys.argv[1]) / 'home'), Path(sys.argv[1])\n"
        "scan(bench, sources(where / 'data'))\n"  # whatever is imported late
        "if os.geteuid() == 0:\n"
        "    [os.chown(path, 65534, 65534) for path in (where / 'home').rglob('*')]\n"
        "    os.chown(where / 'home', 65534, 65534)\n"
        "    os.setuid(65534)\n"
        "bench.catalog.engine.dispose()\n"
        "found = scan(bench, sources(where / 'data'), verify=True)\n"
        "said = {file.item.file_name: file.item.problem and file.item.problem.reason for file in found.files}\n"
        "print(json.dumps([said, found.sources[0].reasons]))\n"
    )
    with tempfile.TemporaryDirectory() as where:
        Path(where).chmod(0o777)
        folder = pictures(Path(where) / "data", 3)
        pictures(folder / "shut", 1, first=9)
        for name in ("001.png", "002.txt", "shut"):
            (folder / name).chmod(0)
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, where],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        finally:
            (folder / "shut").chmod(0o755)
    assert done.returncode == 0, done.stderr
    said, reasons = json.loads(done.stdout)
    assert said == {
        "000.png": None,
        "001.png": "cannot be read: Permission denied; change its permissions or remove it",
        "002.png": "002.txt: cannot be read: Permission denied; change its permissions or remove it",
    }
    assert reasons == {"a folder that cannot be listed: Permission denied": ["shut"]}


# names in tables and archives -----------------------------------------------------------------------------------------

REACHING_OUT = (
    "../secret.png",
    "a/../../secret.png",
    "/etc/passwd.png",
    "//proc/self/root/etc/passwd",
    "..\\secret.png",
    "C:\\secret.png",
    "\\\\host\\share\\x.png",
    "a\0.png",
    "%2e%2e/secret.png",
    "..%2fsecret.png",
    "link.png",
    "door/secret.png",
    "file:///etc/passwd",
    "~/secret.png",
    "$HOME/secret.png",
    "#/../../secret.png",
)


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.json", "meta.json"])
def test_no_table_opens_anything_outside_of_its_folder(bench: Bench, tmp_path: Path, kind: str):
    folder = pictures(tmp_path / "data", 2)
    (folder / "000.txt").unlink()
    picture(9).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "door").symlink_to(tmp_path)
    rows = [{"file_name": name, "text": "a secret"} for name in REACHING_OUT] + [
        {"file_name": "000.png", "text": "good"}
    ]
    if kind == "metadata.jsonl":
        table(folder, rows)
    elif kind == "metadata.parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / kind)
    elif kind == "metadata.csv":
        pa.csv.write_csv(pa.Table.from_pylist(rows), folder / kind)
    else:
        entries = {
            row["file_name"]: row["text"] if kind == "captions.json" else {"caption": row["text"]} for row in rows
        }
        (folder / kind).write_text(json.dumps(entries))
    with listening() as opened:
        kept, rejected = judged(bench, data(folder))
    assert {name: row.text for name, row in kept.items()} == {"000.png": "good", "001.png": "blobs number 1"}
    assert len(rejected) >= len(REACHING_OUT) - 2
    allowed = (str(folder), str(bench.workspace.home))
    inside = [name for name in opened if name.startswith(str(tmp_path)) and not name.startswith(allowed)]
    assert inside == [] and not any("passwd" in name for name in opened)


def test_a_tar_and_a_data_set_open_nothing_but_themselves(bench: Bench, tmp_path: Path):
    folder = tmp_path / "data"
    good = {"good.png": png(0), "good.txt": b"good"}
    write_tar(folder / "a.tar", good | {name.replace("\0", "0"): png(1) for name in REACHING_OUT})
    with tarfile.open(folder / "a.tar", "a") as archive:
        for name, kind, target in (
            ("soft.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.png", tarfile.LNKTYPE, "good.png"),
            ("node.png", tarfile.CHRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    with listening() as opened:
        kept, rejected = judged(bench, data(folder))
    assert list(kept) == ["a.tar/good.png"] and len(rejected) >= 8
    assert not any("passwd" in name or "secret" in name for name in opened)


def test_an_address_in_the_data_is_never_asked(bench: Bench, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.png"
        folder, rows = pictures(tmp_path / "data", 2), tmp_path / "rows"
        (folder / "000.txt").write_text(f"![x]({url})")
        table(folder, [{"file_name": url, "text": "fetch me"}, {"file_name": "001.png", "text": url, "source": url}])
        rows.mkdir()
        pq.write_table(
            pa.Table.from_pylist(
                [
                    {"image": {"bytes": png(5), "path": url}, "text": url},
                    {"image": {"bytes": None, "path": url}, "text": "b"},
                ]
            ),
            rows / "a.parquet",
        )
        write_tar(tmp_path / "tars" / "a.tar", {"a.png": png(6), "a.txt": url.encode(), f"{url}": png(7)})
        for source in (folder, rows, tmp_path / "tars"):
            judged(bench, data(source))
        (folder / "metadata.jsonl").unlink()
        (folder / "captions.json").write_text(json.dumps({url: ["fetch me"], "000.png": ["good"]}))
        judged(bench, data(folder))
        for address in (url, "file:///etc/passwd", "hf://datasets/a/b", "s3://a/b"):
            with pytest.raises(BadInput):
                read_data(data(address))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("address", ["https://me:hf_canary@host/set", "s3://AKIACANARY:canary@bucket/set"])
def test_an_address_for_a_source_is_refused_without_its_password(tmp_path: Path, address: str):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'name = "blobs"\n[[data.sources]]\npath = "{address}"\n')
    with pytest.raises(BadInput, match=r"^(https|s3)://…: is an address, expected a folder") as caught:
        read_data(load_recipe(recipe).data)
    assert "canary" not in str(caught.value).lower()


# damaged shards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["cut", "empty", "other"])
@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_a_damaged_shard_is_rejected_by_name_and_the_others_are_read(
    bench: Bench, tmp_path: Path, layout: str, harm: str
):
    folder = tmp_path / "data"
    if layout == "tar":
        for shard in "ab":
            write_tar(folder / f"{shard}.tar", {f"{shard}.png": png(ord(shard)), f"{shard}.txt": b"text"})
        bad = folder / "b.tar"
    else:
        as_parquet(folder)
        bad = folder / "data" / "train-2.parquet"
        bad.write_bytes((folder / "data" / "train-00000-of-00001.parquet").read_bytes())
    body = bad.read_bytes()
    bad.write_bytes({"cut": body[: len(body) * 2 // 3], "empty": b"", "other": b"no shard at all " * 100}[harm])
    kept, rejected = judged(bench, data(folder))
    name = str(bad.relative_to(folder))
    assert kept and not any(file_name.startswith(name) for file_name in kept)
    if harm != "empty" or layout == "parquet":  # an empty tar is one without members
        assert (rejected.keys() == {name} and "that can be read" in rejected[name]) or "readable" in rejected[name]


FLIPPED = """
import random, sys
from pathlib import Path
from components.config import DataConfig
from components.curation.examining import examine
from components.curation.sources import read_data, read_picture
from components.errors import BadInput
path, draw, read, refused = Path(sys.argv[1]), random.Random(0), 0, 0
whole = path.read_bytes()
for trial in range(150):
    body = bytearray(whole)
    for _ in range(1 + trial % 3):
        at = draw.randrange(len(body)) if trial % 2 else draw.choice([draw.randrange(600), -1 - draw.randrange(900)])
        body[at] ^= 1 << draw.randrange(8)
    path.write_bytes(body)
    try:
        for item in read_data(DataConfig.model_validate({"sources": [{"path": str(path)}]})).items:
            if item.path:
                read_picture(item)
                read += 1
    except (BadInput, OSError) as error:
        assert "\\n" not in str(error), error
        refused += 1
print(read, refused)
"""


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow"])
def test_whatever_bits_of_a_shard_are_flipped_it_is_read_or_refused(tmp_path: Path, kind: str):
    """In a process of its own: a reader that trusts a file's offsets ends with a signal."""
    rows = {
        "image": [{"bytes": png(i)[:500], "path": f"{i}.png"} for i in range(6)],
        "text": [f"t {i}" for i in range(6)],
    }
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        write_tar(path, {f"{i}.{end}": body for i in range(6) for end, body in (("png", png(i)[:500]), ("txt", b"t"))})
    elif kind == "parquet":
        pq.write_table(pa.table(rows), path)
    else:
        Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
        path = next((tmp_path / "set").glob("*.arrow"))
    done = subprocess.run(
        [sys.executable, "-c", FLIPPED, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    read, refused = map(int, done.stdout.split())
    assert read > 50 and refused > 5


# many files -----------------------------------------------------------------------------------------------------------


FILES = 5_000


def test_thousands_of_files_cost_a_look_and_one_opening_each_and_the_next_time_only_a_look(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("components.curation.memory.TRUSTED_AGE_NS", -(10**15))  # nothing is too young to be trusted
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(FILES):
        (folder / f"{i:06}.png").touch()
    looks: Counter[str] = Counter()
    look = os.stat

    def counted(name, *given, **named):
        looks[str(name)] += 1
        return look(name, *given, **named)

    monkeypatch.setattr(os, "stat", counted)
    for openings in (1, 0):
        looks.clear()
        with listening() as opened:
            found = scan(bench, data(folder, class_tokens="a thing"))
        inside = Counter(name for name in opened if name.startswith(f"{folder}/"))
        assert len(found.files) == FILES and found.hashed == FILES * openings
        assert set(inside.values()) <= {openings} and len(inside) == FILES * openings
        assert {looks[str(file.item.path)] for file in found.files} == {1}
