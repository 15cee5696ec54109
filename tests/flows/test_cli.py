"""The command line: quick to start, one document, one-line errors, exit codes that scripts can rely on."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.catalog import runs
from components.catalog.models import ModelVersion, Run
from components.config import Recipe, load_recipe
from components.stages import Bench
from components.tensors import to_safetensors
from components.workspace import Workspace
from flows.console import number, seconds, size
from tests.conftest import Served
from tests.curation.folders import pictures
from tests.flows.conftest import Shell, safelight
from tests.pictures import write_pictures
from tests.tiny import tiny_stable_diffusion

COMMANDS = [
    *("demo", "init", "import-config", "up", "down", "status", "doctor"),
    *("plan", "caption", "curate", "cache", "retrain", "evaluate", "promote"),
    *("schedule", "runs", "show", "logs", "stop", "diff", "export-dataset", "edit-caption", "caption-history", "gc"),
    *("generate", "export", "pretrain"),
]
GROUPS = {"study": ["samplers"]}
ROOT = Path(__file__).parents[2]


def safetensors_file(path: Path, metadata: dict[str, str]) -> Path:
    header = json.dumps(
        {"__metadata__": metadata, "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    return path


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom flows import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'prefect', 'mlflow', 'torch', 'sqlalchemy', 'streamlit', 'pydantic'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert told.splitlines()[-1] == "heavy []"
    assert [
        line.split()[0]
        for line in told.partition("Commands:")[2].splitlines()
        if line.startswith("  ") and line[2] != " "
    ] == [*COMMANDS, *GROUPS]


@pytest.mark.parametrize("words", [[name] for name in COMMANDS] + [[g, name] for g in GROUPS for name in GROUPS[g]])
def test_every_command_has_help_and_json(shell: Shell, words: list[str]):
    assert shell(*words, "--help") == 0
    assert "--json" in shell.out


def test_an_import_says_what_became_of_every_key_and_writes_a_recipe_that_plan_reads(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "300")
    pictures(tmp_path / "pictures", 6)
    (tmp_path / "pictures" / "old.npz").write_bytes(b"x")
    (tmp_path / "kohya.toml").write_text(
        "[[datasets]]\nresolution = 64\n"
        '[[datasets.subsets]]\nimage_dir = "pictures"\nnum_repaets = 3\nflip_aug = true\n'
    )
    assert shell("import-config", str(tmp_path / "kohya.toml")) == 0
    assert "did you mean 'num_repeats'?" in shell.out and "next: safelight plan" in shell.out
    document = shell.document("import-config", str(tmp_path / "kohya.toml"), "--force")
    assert {line["outcome"] for line in document["keys"]} == {"mapped", "note", "unknown", "ignored"}
    (source,) = shell.document("plan", document["recipe"])["sources"]
    assert (source["layout"], source["pictures"]) == ("folder", 6)
    assert source["skipped"] == {"another trainer's cache": ["old.npz"]}
    assert shell("plan", document["recipe"]) == 0
    assert "6 pictures, a folder of pictures (folder)" in shell.out
    assert "skipped   old.npz: another trainer's cache" in shell.out


def recipe(folder: Path, body: str) -> str:
    (folder / "recipe.toml").write_text(body)
    return str(folder / "recipe.toml")


def pickled(folder: Path) -> str:
    (folder / "lora.safetensors").write_bytes(b"PK\x03\x04 what torch.save writes is a zip of pickles")
    return str(folder / "lora.safetensors")


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no such command": (lambda _: ["retrian"], "retrian"),
    "no such option": (lambda _: ["runs", "--colour"], "--colour"),
    "an option without its value": (lambda _: ["export", "icons"], "--out"),
    "a number that is none": (lambda _: ["runs", "--limit", "many"], "--limit"),
    "no such recipe": (lambda f: ["plan", str(f / "none.toml")], "no such recipe"),
    "a folder for a recipe": (lambda f: ["plan", str(f)], "--data"),
    "broken TOML": (lambda f: ["plan", recipe(f, "name = ")], "not valid TOML"),
    "a misspelt key": (
        lambda f: ["plan", recipe(f, 'name = "x"\n[data]\nsources = [{path = "."}]\n[training]\nrnak = 2')],
        "'rank'",
    ),
    "an override without a key": (
        lambda f: ["plan", recipe(f, 'name = "x"\n[data]\nsources = [{path = "."}]'), "--set", "32"],
        "section.key=value",
    ),
    "a data folder that is not there": (
        lambda f: ["retrain", recipe(f, 'name = "x"\n[data]\nsources = [{path = "."}]'), "--data", str(f / "no")],
        "no such folder",
    ),
    "an address that others can reach": (lambda _: ["up", "--host", "0.0.0.0"], "reverse proxy"),
    "nothing to schedule": (lambda _: ["schedule"], "name a recipe"),
    "a span that means nothing": (
        lambda f: ["schedule", recipe(f, 'name = "x"\n[data]\nsources = [{path = "."}]'), "--every", "soon"],
        "1h30m",
    ),
    "a schedule that is not there": (lambda _: ["schedule", "--remove", "icons"], "there are: none"),
    "a run that is not there": (lambda _: ["logs", "0190"], "safelight runs"),
    "neither run, file nor model": (lambda _: ["show", "icons"], "models: none"),
    "a file that is not there": (lambda _: ["show", "icons.safetensors"], "no such file"),
    "an unknown layout": (lambda f: ["export", "icons", "--out", str(f), "--layout", "onnx"], "kohya"),
    "two adapters": (
        lambda f: ["generate", "--prompt", "a", "--model", "m", "--adapter", str(f / "a.safetensors")],
        "one of them",
    ),
    "an adapter that is a pickle": (lambda f: ["generate", "--prompt", "a", "--adapter", pickled(f)], "a pickle"),
    "a layout of a merged pipeline": (
        lambda f: ["export", "icons", "--out", str(f), "--merge", "--layout", "kohya"],
        "one of them",
    ),
    "a base for a registered model": (
        lambda f: ["export", "icons", "--out", str(f), "--base", "embedded"],
        "knows its base",
    ),
    "a base that is no pipeline": (lambda f: ["generate", "--prompt", "a", "--base", str(f)], "pipeline"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_the_mend_and_exit_code_2(shell: Shell, tmp_path: Path, case: str):
    arguments, word = BAD[case]
    assert shell(*arguments(tmp_path)) == 2
    assert shell.out == "" and shell.err.count("\n") == 1 and shell.err.startswith("error: ")
    assert word in shell.err
    failed = shell.document(*arguments(tmp_path), code=2)
    assert failed["status"] == "failed" and word in failed["error"]


def test_an_unforeseen_error_is_one_line_and_keeps_its_traceback(shell: Shell, workspace: Workspace, monkeypatch):
    def fail(_: Workspace) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("flows.services.status", fail)
    assert shell("status") == 1
    assert shell.err.count("\n") == 1 and "ZeroDivisionError: two lines" in shell.err
    assert "Traceback" in (workspace.logs / "safelight.log").read_text()


@pytest.mark.parametrize(("number_", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_the_code_that_shells_expect(number_: signal.Signals, code: int):
    slow = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
        "from flows import cli; import time\n@cli.app.command()\ndef slow(json: bool = False):\n"
        "    print('ready', file=__import__('sys').stderr, flush=True); time.sleep(60)\ncli.main(['slow', '--json'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None and child.stderr.readline() == "ready\n"
        child.send_signal(number_)
        out, _ = child.communicate(timeout=30)
    assert child.returncode == code and json.loads(out)["status"] == "stopped"


def test_init_writes_a_recipe_whose_comments_are_the_defaults(shell: Shell, tmp_path: Path):
    path = Path(shell.document("init", str(tmp_path / "new"))["recipe"])
    written = path.read_text()
    assert load_recipe(path).training.rank == Recipe.model_fields["training"].default.rank
    uncommented = "\n".join(line.removeprefix("# ") for line in written.splitlines()[1:] if "= …" not in line)
    expected = Recipe.model_validate({"name": "my-style", "data": {"sources": [{"path": "pictures"}]}})
    assert Recipe.model_validate(tomllib.loads(uncommented)) == expected
    assert shell("init", str(tmp_path / "new")) == 2 and "--force" in shell.err
    assert shell("init", str(tmp_path / "new"), "--force") == 0


def test_init_writes_a_packaged_recipe_with_the_folder_as_its_source(shell: Shell, tmp_path: Path):
    write_pictures(tmp_path / "signs")
    recipe = load_recipe(Path(shell.document("init", str(tmp_path / "signs"), "--recipe", "sdxl")["recipe"]))
    assert recipe.base.model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert recipe.data.sources[0].path == str((tmp_path / "signs").resolve())
    assert shell("init", str(tmp_path / "other"), "--recipe", "sdlx") == 2 and "did you mean sdxl?" in shell.err


def test_a_folder_of_pictures_becomes_its_own_source(shell: Shell, tmp_path: Path):
    write_pictures(tmp_path / "signs")
    path = Path(shell.document("init", str(tmp_path / "signs"))["recipe"])
    assert load_recipe(path).data.sources[0].path == str((tmp_path / "signs").resolve())


def test_show_prints_all_metadata_of_an_adapter_file(shell: Shell, tmp_path: Path):
    tags = json.dumps({"2_sks": {f"tag {i}": i for i in range(200)}})
    metadata = {"safelight.git_commit": "abc", "format": "pt", "ss_tag_frequency": tags}
    path = safetensors_file(tmp_path / "a.safetensors", metadata)
    shown = shell.document("show", str(path))
    assert shown["metadata"] == metadata and shown["parameters"] == 6
    assert shell("show", str(path)) == 0
    assert all(key in shell.out and value in shell.out for key, value in metadata.items())
    path.write_bytes(b"PK\x03\x04 a pickle in a zip")
    assert shell("show", str(path)) == 1 and "no safetensors file" in shell.err


def test_a_file_of_another_program_is_exported_in_the_layout_that_is_asked_for(shell: Shell, tmp_path: Path):
    """kohya's names for the embedded base, alpha half the rank -> ComfyUI's, with the same alpha."""
    factors = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 8, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(96, 2, 1, 1),
        "lora_unet_conv_in.alpha": torch.tensor(1.0),
    }
    (tmp_path / "style.safetensors").write_bytes(to_safetensors(factors, {"ss_output_name": "style"}))
    arguments = ("export", str(tmp_path / "style.safetensors"), "--out", str(tmp_path / "out"))
    document = shell.document(*arguments, "--layout", "comfyui")
    assert document["files"] == {"comfyui": str(tmp_path / "out" / "style.safetensors")}
    shown = shell.document("show", document["files"]["comfyui"])
    assert shown["tensors"]["diffusion_model.input_blocks.0.0.lora_A.weight"]["shape"] == [2, 8, 3, 3]
    assert shown["metadata"] == {
        "format": "pt", "ss_network_alpha": "1.0", "ss_network_dim": "2", "ss_output_name": "style"
    }  # fmt: skip
    assert shell(*arguments, "--rank", "1") == 0 and "lost by the lower rank" not in shell.out  # rank 1 already


def test_an_adapter_is_merged_into_its_base_and_extracted_and_resized_by_the_command(shell: Shell, tmp_path: Path):
    base, path = tiny_stable_diffusion(tmp_path / "base"), tmp_path / "style.safetensors"
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 16, generator=generator), torch.randn(16, 3, generator=generator)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    path.write_bytes(to_safetensors({f"{layer}.{name}": tensor for name, tensor in factors.items()}))

    def export(what: str, *options: str) -> tuple[dict[str, str], float]:
        out = str(tmp_path / options[-1])
        document = shell.document("export", what, "--base", str(base), "--out", out, *options[:-1])
        return document["files"], document["frobenius_error"]

    def update(file: str) -> torch.Tensor:
        down, up, alpha = (load_file(file)[f"{layer}.{name}"] for name in factors)
        return alpha / len(down) * up @ down

    expected = 0.5 * up @ down
    merged, _ = export(str(path), "--merge", "merged")
    extracted, error = export(merged["pipeline"], "--rank", "3", "--layout", "kohya", "extracted")
    assert error < 1e-5 and torch.allclose(update(extracted["kohya"]), expected, atol=1e-5)
    resized, error = export(str(path), "--rank", "2", "--layout", "kohya", "resized")
    values = torch.linalg.svdvals(expected)
    assert error == pytest.approx((values[2] / values.norm()).item(), rel=1e-4)
    assert (update(resized["kohya"]) - expected).norm().item() == pytest.approx(values[2].item(), rel=1e-4)


def test_a_run_is_found_by_the_start_of_its_uid(shell: Shell, bench: Bench):
    uids = [runs.open_run(bench.catalog, name="signs", kind="retrain", recipe={}, git_commit=None) for _ in range(2)]
    runs.close_run(bench.catalog, uids[0], "failed", error="no space left")
    assert [row["run_uid"] for row in shell.document("runs")["runs"]] == uids[::-1]
    assert shell.document("show", uids[0])["run"]["error"] == "no space left"
    assert shell.document("logs", uids[0])["lines"] == []
    assert shell("show", "0") == 2 and "several runs" in shell.err
    assert shell("stop", uids[0]) == 0 and "is not running, it is failed" in shell.out


def test_stop_asks_the_process_of_a_run_to_end_and_waits(shell: Shell, bench: Bench):
    code = (
        "import sys, time, signal\nfrom components.catalog import runs\nfrom components.stages import Bench\n"
        "from components.workspace import Workspace\nbench = Bench.open(Workspace.from_environment())\n"
        "uid = runs.open_run(bench.catalog, name='signs', kind='retrain', recipe={}, git_commit=None)\n"
        "def end(*_):\n    time.sleep(0.5); runs.close_run(bench.catalog, uid, 'stopped'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\nprint(uid, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        uid = child.stdout.readline().strip()
        assert shell.document("stop", uid)["outcome"] == "stopped"
        child.wait(10)
    with bench.catalog.read() as session:
        assert session.get_one(Run, uid).status == "stopped"


def test_schedules_are_stored_listed_and_removed(shell: Shell, tmp_path: Path):
    path = recipe(tmp_path, 'name = "signs"\n[data]\nsources = [{path = "."}]')
    stored = shell.document("schedule", path, "--every", "6h", "--when-new", "50")
    assert stored["schedules"] == [{"name": "signs", "when": "every 6h, when 50 pictures are new", "recipe": path}]
    assert stored["runner"] == "down"
    assert shell("schedule", "--list") == 0 and "safelight up" in shell.out
    assert shell.document("schedule", "--remove", "signs")["schedules"] == []


def test_status_and_down_work_where_nothing_was_ever_started(shell: Shell):
    assert {state["state"] for state in shell.document("status")["services"]} <= {"down", "absent"}
    assert shell.document("down")["ended"] == []


def test_doctor_ends_with_1_when_something_cannot_be_mended(shell: Shell, workspace: Workspace):
    folder = workspace.home / "schedules"
    folder.mkdir()
    (folder / "x.json").write_text("{")
    found = shell.document("doctor", "--fix", code=1)
    assert not found["healthy"] and any(f["where"].endswith("x.json") and not f["fixed"] for f in found["findings"])


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.26, "0.3 s"), (61.2, "61 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_read_well(value: float | None, text: str):
    assert seconds(value) == text


def test_numbers_and_sizes_read_well():
    assert [size(n) for n in (12, 1200, 48_000_000, 7.2e12)] == ["12 B", "1.2 kB", "48.0 MB", "7.2 TB"]
    assert [number(n) for n in (None, 0.123456, 1234.5)] == ["–", "0.1235", "1234"]


# against real servers ---------------------------------------------------------------------------------------------


@pytest.mark.services
def test_retrain_ends_with_the_run_card(trained: dict[str, Any]):
    assert trained["status"] == "completed" and trained["error"] is None and trained["schema"] == 1
    assert [stage["name"] for stage in trained["stages"]] == ["curate", "cache", "fine-tune", "evaluate", "register"]
    assert {stage["outcome"] for stage in trained["stages"]} == {"produced"}
    assert trained["model"]["name"] == "signs" and "challenger" in trained["model"]["aliases"]
    assert trained["gate"]["decision"] in ("promote", "hold", "reject")
    assert all(url is None or url.startswith("http://127.0.0.1:") for url in trained["urls"].values())


@pytest.mark.services
def test_the_same_command_again_reuses_everything_and_plan_says_so_before(served: Served, trained: dict[str, Any]):
    same = ("--set", "training.checkpointing_steps=5")
    planned = safelight(served, "plan", trained["recipe_path"], *same)
    assert [stage["reused"] for stage in planned["stages"]] == [True] * 5
    assert planned["pictures"] == {"found": 60, "usable": 60, "unusable": 0} and planned["expected_seconds"] == 0
    again = safelight(served, "retrain", trained["recipe_path"], *same)
    assert {stage["outcome"] for stage in again["stages"]} == {"reused"}
    assert again["adapter"]["sha256"] == trained["adapter"]["sha256"]


@pytest.mark.services
def test_a_person_promotes_the_challenger_and_the_model_is_shown_exported_and_used(
    served: Served, trained: dict[str, Any], tmp_path: Path
):
    version = trained["model"]["version"]
    promoted = safelight(served, "promote", "signs", "--by", "mara", "--reason", "looks right", "--force")
    assert (promoted["version"], promoted["changed"]) == (version, True) and "champion" in promoted["aliases"]
    assert safelight(served, "promote", f"signs/{version}")["changed"] is False
    shown = safelight(served, "show", "signs@champion")
    assert [entry["version"] for entry in shown["versions"]] == [version]
    assert [(move["by"], move["reason"]) for move in shown["promotions"]] == [("mara", "looks right")]
    files = safelight(served, "export", "signs", "--out", str(tmp_path / "out"))["files"]
    assert set(files) == {"diffusers", "kohya"}
    assert safelight(served, "show", files["kohya"])["metadata"]["ss_network_dim"] == "4"
    drawn = safelight(
        served,
        "generate",
        "--model",
        "signs@champion",
        "--prompt",
        "disc, red sign",
        "--count",
        "2",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "drawn"),
    )["files"]
    assert [Path(file).read_bytes()[:4] for file in drawn] == [b"\x89PNG"] * 2


@pytest.mark.services
def test_promoting_what_does_not_exist_is_bad_input(served: Served, trained: dict[str, Any]):
    assert "there are: 1" in safelight(served, "promote", "signs/99", code=2)["error"]
    error = safelight(served, "promote", "sings", code=2)["error"]
    known = error.removeprefix("no model is called 'sings'; registered models: ")
    assert known != error and "signs" in known.split(", ")


@pytest.mark.services
def test_a_terminated_retraining_says_stopped_and_the_same_command_goes_on(served: Served, trained: dict[str, Any]):
    arguments = [
        sys.executable,
        "-m",
        "flows.cli",
        "retrain",
        trained["recipe_path"],
        "--set",
        "training.max_train_steps=400",
        "--json",
    ]
    with subprocess.Popen(
        arguments,
        env=os.environ | served.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as child:
        bench = Bench.open(served.workspace)
        deadline = time.monotonic() + 120
        while not any(run.progress.get("stage") == "fine-tune" for run in runs.running(bench.catalog)):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate(timeout=120)
    stopped = json.loads(out)
    assert child.returncode == 143 and stopped["status"] == "stopped"
    with bench.catalog.read() as session:
        assert session.get_one(Run, stopped["run_uid"]).status == "stopped"
        assert session.get(ModelVersion, ("signs", 99)) is None
