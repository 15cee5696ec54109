"""What a run tells MLflow arrives there whole and once, whatever happens to the server or to the run on the way."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.catalog import runs
from components.catalog.models import ModelVersion, Run
from components.config import load_recipe, parse_recipe
from components.errors import BadInput, ServiceUnavailable, StageFailed
from components.stages import Bench
from flows.journal import Entry, Journal, journal_path, read_entries
from flows.tracking import background, recovery, registry
from flows.tracking.batches import BATCH_ENTITIES, BATCH_LIMITS, batches
from flows.tracking.documents import without_secrets
from flows.tracking.registrar import STEP_TAG
from flows.tracking.registration import Checkpoint, Registration, RegistrationRequest, ask_registrar, register_model
from flows.tracking.server import ADAPTER_TAG, RUN_TAG, connect, run_url
from flows.tracking.tracker import PARAM_CHARACTERS, open_tracker
from tests.conftest import Served
from tests.services import Proxy, proxied

ROOT = Path(__file__).parents[2]
PROMPTS = ["red <icon> rocket", "blue cat"]


def recipe_called(name: str) -> dict[str, Any]:
    body = {"name": name, "data": {"sources": [{"path": "/pictures"}]}, "training": {"rank": 4}}
    return parse_recipe(body, origin="test").model_dump(mode="json")


def open_run(bench: Bench, name: str) -> str:
    return runs.open_run(bench.catalog, name=name, kind="retrain", recipe={}, git_commit=None)


def png(bench: Bench, colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return bench.store.put(buffer.getvalue()).sha256


# without a server -------------------------------------------------------------------------------------------------


def entry(seq: int, kind: str, count: int, length: int = 5) -> Entry:
    return Entry(seq, 0, kind, {"values": {f"{seq}.{i}": "x" * length for i in range(count)}, "step": 0}, seq)


def test_batches_keep_the_order_and_stay_within_the_limits_of_one_request():
    sizes = [
        ("run", 0),
        ("params", 60),
        ("metrics", 900),
        ("tags", 50),
        ("metrics", 3),
        ("image", 0),
        ("params", 50),
        ("params", 51),
        ("metrics", 1000),
        ("metrics", 1),
        ("status", 0),
    ]
    entries = [entry(seq, kind, count) for seq, (kind, count) in enumerate(sizes)]
    found = list(batches(entries))
    assert [[one.seq for one in batch] for batch in found] == [[1, 2], [3, 4], [5], [6], [7], [8], [9], [10]]
    for batch in found:
        counts = {kind: sum(len(one.body["values"]) for one in batch if one.kind == kind) for kind in BATCH_LIMITS}
        assert all(counts[kind] <= limit for kind, limit in BATCH_LIMITS.items())
        assert sum(counts.values()) <= BATCH_ENTITIES


def test_long_values_are_spread_over_requests_below_one_megabyte():
    found = list(batches(entry(seq, "tags", 20, 8000) for seq in range(5)))
    assert [len(batch) for batch in found] == [3, 2]


def test_a_run_without_any_server_costs_microseconds_a_step_and_seconds_at_the_end(bench: Bench):
    run_uid = open_run(bench, "icons")
    begun = time.monotonic()
    tracker = open_tracker(bench, run_uid, recipe_called("icons"), url="http://127.0.0.1:9")
    assert time.monotonic() - begun < 1
    begun = time.process_time()
    for step in range(1000):
        tracker.metrics(step, {"loss": 1 / (step + 1), "grad_norm": 1.0})
    assert time.process_time() - begun < 1
    until(lambda: tracker._sending is not None and tracker._sending.failing)
    begun = time.monotonic()
    assert not tracker.close("completed")
    assert time.monotonic() - begun < 2 * background.DEAD_SERVER_GRACE_S
    assert tracker.url is None
    assert recovery.pending(bench) == [run_uid]
    until(lambda: not _senders(run_uid))  # given up is over: no thread is left that holds the journal's lock
    with pytest.raises(ServiceUnavailable, match="safelight up"):
        recovery.catch_up(bench, run_uid, url="http://127.0.0.1:9")


def test_a_run_where_no_server_is_known_keeps_its_journal_for_later(bench: Bench):
    run_uid = open_run(bench, "icons")
    tracker = open_tracker(bench, run_uid, recipe_called("icons"))
    assert not tracker.close("failed")
    kinds = [one.kind for one in read_entries(journal_path(bench.workspace, run_uid))]
    assert (kinds[0], kinds[-1]) == ("run", "status")
    with pytest.raises(ServiceUnavailable, match="no MLflow server is known"):
        recovery.catch_up(bench, run_uid)


def test_importing_the_tracker_imports_neither_mlflow_nor_torch():
    code = "import sys, flows.tracking.tracker; sys.exit(bool({'mlflow', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_runs_page_is_addressed_as_mlflow_addresses_it():
    assert run_url("http://h:1/", "3", "abc") == "http://h:1/#/experiments/3/runs/abc"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://me:hunter2@pictures/icons", "s3://***@pictures/icons"),
        ("https://ghp_0123@host/icons", "https://***@host/icons"),
        ("https://me:p@ss@host:80/icons@v2", "https://***@host:80/icons@v2"),
        ("s3://AKIA:a/b+c/d@pictures/icons", "s3://***@pictures/icons"),
        ("/recipes/s3:/me:hunter2@pictures/icons", "/recipes/s3:/***@pictures/icons"),  # resolved against a folder
        ("simplecache::ftp://me:hunter2@host/a", "simplecache::ftp://***@host/a"),
        ("https://h/a?rev=2&Token=t0k&x=1", "https://h/a?rev=2&Token=***&x=1"),
        ("https://h/a?X-Amz-Credential=c/d&X-Amz-Signature=s", "https://h/a?X-Amz-Credential=***&X-Amz-Signature=***"),
        ("az://box/a?sv=2&sig=a%2Fb=", "az://box/a?sv=2&sig=***"),
        ("https://h/a#access_token=t0k", "https://h/a#access_token=***"),
        ("/a, s3://u:p@h/b, https://h?key=k", "/a, s3://***@h/b, https://h?key=***"),
    ],
)
def test_a_secret_in_an_address_is_masked(address: str, shown: str):
    assert without_secrets(address) == shown
    assert without_secrets(shown) == shown
    assert without_secrets({"sources": [{"path": address}], "rank": 4}) == {"sources": [{"path": shown}], "rank": 4}


@pytest.mark.parametrize(
    "address",
    [
        "/pictures/me@home/a?b=c",
        "https://host:8080/icons@v2?rev=main",
        "hf://datasets/icons@main/train",
        "a: me@host",
        "http://[::1]:80/a@b",
        "C:/me@home/icons",
        "file:///data/me@home",
        "s3://bucket/a=b",
        "",
    ],
)
def test_an_address_without_a_secret_stays_as_it_is(address: str):
    assert without_secrets(address) == address


def test_no_secret_of_a_source_gets_as_far_as_the_journal(bench: Bench, tmp_path: Path):
    run_uid, secret, source = open_run(bench, "icons"), "hunter2", "s3://me:hunter2@pictures/icons?token=hunter2"
    (tmp_path / "recipe.toml").write_text(f'name = "icons"\n[[data.sources]]\npath = "{source}"\n')
    recipe = load_recipe(tmp_path / "recipe.toml").model_dump(mode="json")
    tracker = open_tracker(bench, run_uid, recipe, tags={"source": source})
    tracker.params({"cut": "x" * (PARAM_CHARACTERS - 13) + source})
    tracker.dataset("icons@v1", "d" * 64, source)
    tracker.document("card.json", {"sources": [source]})
    tracker.close("completed")
    journal = journal_path(bench.workspace, run_uid).read_text()
    assert secret[:4] not in journal  # also where cutting comes close
    assert "s3:/***@pictures/icons?token=***" in journal


# with the real server ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow_url(served: Served) -> str:
    return served.urls.mlflow_url


@pytest.fixture
def proxy(mlflow_url: str) -> Iterator[Proxy]:
    with proxied(mlflow_url) as proxy:
        yield proxy


def run_in_mlflow(url: str, run_uid: str) -> Any:
    client = connect(url)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{run_uid}'")
    return run


def history(url: str, run_uid: str, name: str) -> list[tuple[int, float]]:
    points = connect(url).get_metric_history(run_in_mlflow(url, run_uid).info.run_id, name)
    return sorted((point.step, point.value) for point in points)


@pytest.mark.services
def test_a_run_arrives_whole(bench: Bench, mlflow_url: str):
    run_uid, digest = open_run(bench, "whole"), "0123456789abcdef" * 4
    tracker = open_tracker(bench, run_uid, recipe_called("whole"), url=mlflow_url, tags={"git_commit": "abc"})
    for step in range(1200):
        tracker.metrics(step, {"loss": 1 / (step + 1), "validation_loss": None})
    tracker.metrics(1200, {"loss": math.nan})
    tracker.evaluation(
        {
            "kid": {
                "candidate": 0.1,
                "base": 0.3,
                "champion": None,
                "difference": {"value": -0.2, "low": -0.3, "high": -0.1},
            }
        },
        step=1200,
    )
    for step, colour in ((100, "red"), (200, "blue")):
        tracker.image("preview/0", png(bench, colour), step)
    sheet = png(bench, "green")
    tracker.artifact("gallery/sheet.png", sheet)
    tracker.dataset("icons@v3", digest, "/pictures")
    assert tracker.close("completed", timeout_s=60)
    assert recovery.pending(bench) == []

    run, client = run_in_mlflow(mlflow_url, run_uid), connect(mlflow_url)
    assert run.info.run_id == tracker.mlflow_run_id
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/whole/")
    assert run.data.params["training.rank"] == "4"
    assert run.data.params["data.sources.0.path"] == "/pictures"
    assert run.data.tags["git_commit"] == "abc"
    steps = [step for step, _ in history(mlflow_url, run_uid, "loss")]
    assert sorted(steps) == list(range(1201))
    assert {name: run.data.metrics[name] for name in run.data.metrics if name.startswith("kid")} == {
        "kid/candidate": 0.1,
        "kid/base": 0.3,
        "kid/difference": -0.2,
        "kid/difference/low": -0.3,
        "kid/difference/high": -0.1,
    }
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("icons@v3", digest[:32])
    images = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")]
    assert sorted(name.partition("+timestamp")[0] for name in images if name.endswith(".png")) == [
        "preview~0+step+100",
        "preview~0+step+200",
    ]
    assert Path(client.download_artifacts(run.info.run_id, "gallery/sheet.png")).read_bytes() == bench.store.read(sheet)
    recipe = json.loads(Path(client.download_artifacts(run.info.run_id, "recipe.json")).read_text())
    assert recipe == recipe_called("whole")
    with bench.catalog.read() as session:
        known = session.get(Run, run_uid)
        assert known
        assert known.mlflow_run_id == run.info.run_id


@pytest.mark.services
@pytest.mark.parametrize("mode", ["drop", "503", "cut"])
def test_an_outage_stops_nothing_and_the_rest_is_sent_once_later(
    bench: Bench, proxy: Proxy, mlflow_url: str, mode: Any
):
    name = f"outage-{mode}"
    run_uid = open_run(bench, name)
    tracker = open_tracker(bench, run_uid, recipe_called(name), url=proxy.url, every_s=0.2)
    tracker.metrics(0, {"loss": 1.0})
    tracker.image("preview/0", png(bench, "red"), 0)
    until(lambda: tracker._sending is not None and not tracker._sending.sender.pending())
    proxy.mode = mode
    spent = time.process_time()
    for step in range(1, 500):
        tracker.metrics(step, {"loss": 1 / (step + 1)})
    assert time.process_time() - spent < 1
    tracker.image("preview/0", png(bench, "blue"), 100)
    tracker.dataset("icons@v3", "d" * 64, "/pictures")
    until(lambda: proxy.requests > 3)
    begun = time.monotonic()
    assert not tracker.close("completed")
    assert time.monotonic() - begun < 3 * background.DEAD_SERVER_GRACE_S
    assert recovery.pending(bench) == [run_uid]

    proxy.mode = "pass"
    until(lambda: recovery.catch_up(bench, run_uid, url=proxy.url) > 0 or not recovery.pending(bench))
    assert recovery.pending(bench) == []
    assert recovery.catch_up(bench, run_uid, url=proxy.url) == 0
    assert history(mlflow_url, run_uid, "loss") == [(step, 1 / (step + 1)) for step in range(500)]
    run = run_in_mlflow(mlflow_url, run_uid)
    assert run.info.status == "FINISHED"
    assert len(run.inputs.dataset_inputs) == 1
    images = connect(mlflow_url).list_artifacts(run.info.run_id, "images")
    assert len({Path(file.path).name.partition("+timestamp")[0] for file in images}) == 2


def _senders(run_uid: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if run_uid in thread.name]


def until(happened: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.services
def test_answers_lost_at_any_request_duplicate_nothing(bench: Bench, proxy: Proxy, mlflow_url: str):
    """The server does the work of one request, of the first, the second, ... and its answer is lost."""
    run_uid = open_run(bench, "lost")
    journal = Journal(journal_path(bench.workspace, run_uid))
    journal.append("run", {"experiment": "lost", "run_name": "lost"})
    journal.append("params", {"values": {"rank": "4"}})
    for step in range(3):
        journal.append("metrics", {"step": step, "values": {"loss": float(step)}})
    journal.append("document", {"name": "recipe.json", "text": "{}"})
    journal.append("dataset", {"name": "icons", "digest": "d" * 32, "source": "s", "context": "train"})
    journal.append("status", {"status": "FINISHED"})
    journal.close()
    for passing in range(40):
        proxy.mode, proxy.cut_after = "pass", passing
        try:
            recovery.catch_up(bench, run_uid, url=proxy.url)
        except ServiceUnavailable:
            journal_path(bench.workspace, run_uid).with_name("mlflow-cursor.json").unlink(missing_ok=True)
            continue
        break
    else:
        pytest.fail("forty requests were not enough")
    assert passing > 8
    run = run_in_mlflow(mlflow_url, run_uid)  # fails if there are two
    assert history(mlflow_url, run_uid, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert (run.info.status, run.data.params, len(run.inputs.dataset_inputs)) == ("FINISHED", {"rank": "4"}, 1)


@pytest.mark.services
def test_a_server_that_takes_requests_and_never_answers_is_given_up(
    bench: Bench, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(background, "SILENT_SERVER_GRACE_S", 1.0)
    proxy.mode = "silent"
    tracker = open_tracker(bench, open_run(bench, "silent"), recipe_called("silent"), url=proxy.url)
    until(lambda: proxy.requests > 0)
    begun = time.monotonic()
    assert not tracker.close("completed")
    assert time.monotonic() - begun < 3


@pytest.mark.services
def test_a_resumed_run_goes_on_in_the_same_mlflow_run_and_counts_no_step_twice(bench: Bench, mlflow_url: str):
    run_uid = open_run(bench, "resumed")
    for first, status in ((0, "stopped"), (30, "completed")):
        tracker = open_tracker(bench, run_uid, recipe_called("resumed"), url=mlflow_url)
        for step in range(first, first + 50):
            tracker.metrics(step, {"loss": float(step)})
        assert tracker.close(status, timeout_s=60)  # type: ignore[arg-type]
        expected = "KILLED" if status == "stopped" else "FINISHED"
        assert run_in_mlflow(mlflow_url, run_uid).info.status == expected
    assert history(mlflow_url, run_uid, "loss") == [(step, float(step)) for step in range(80)]


@pytest.mark.services
def test_an_entry_that_mlflow_refuses_holds_up_nothing_else(
    bench: Bench, mlflow_url: str, caplog: pytest.LogCaptureFixture
):
    run_uid = open_run(bench, "refused")
    tracker = open_tracker(bench, run_uid, recipe_called("refused"), url=mlflow_url)
    tracker.metrics(0, {"loss": 1.0})
    tracker.metrics(0, {"no such ∆ name": 1.0})
    tracker.params({"training.rank": "another"})
    tracker.artifact("gone.bin", "f" * 64)
    tracker.metrics(1, {"loss": 2.0})
    assert tracker.close("completed", timeout_s=60)
    assert history(mlflow_url, run_uid, "loss") == [(0, 1.0), (1, 2.0)]
    assert run_in_mlflow(mlflow_url, run_uid).data.params["training.rank"] == "4"
    assert sum("did not take" in record.message for record in caplog.records) == 3


@pytest.mark.services
def test_a_killed_run_is_caught_up_and_ended_and_others_are_left_alone(bench: Bench, mlflow_url: str):
    run_uid, alive = open_run(bench, "killed"), open_run(bench, "killed")
    tracker = open_tracker(bench, alive, recipe_called("killed"), url=mlflow_url, every_s=0.2)
    program = f"""
import time
from components.stages import Bench
from components.workspace import Workspace
from flows.tracking.tracker import open_tracker
recipe = {{"name": "killed"}}
bench = Bench.open(Workspace.from_environment())
tracker = open_tracker(bench, {run_uid!r}, recipe, url={mlflow_url!r}, every_s=0.2)
tracker.metrics(0, {{"loss": 1.0}})
while tracker._sending.sender.pending():
    time.sleep(0.05)
tracker._sending.sender.lock.acquire()
tracker.metrics(1, {{"loss": 2.0}})
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout
        assert child.stdout.readline() == b"ready\n"
        os.kill(child.pid, signal.SIGKILL)
    until(lambda: tracker.mlflow_run_id is not None)
    assert run_in_mlflow(mlflow_url, run_uid).info.status == "RUNNING"
    assert recovery.catch_up(bench, run_uid, url=mlflow_url) == 1
    runs.close_run(bench.catalog, run_uid, "crashed")
    assert recovery.heal(bench, url=mlflow_url) == [(run_uid, "KILLED")]
    assert run_in_mlflow(mlflow_url, run_uid).info.status == "KILLED"
    assert run_in_mlflow(mlflow_url, alive).info.status == "RUNNING"
    assert history(mlflow_url, run_uid, "loss") == [(0, 1.0), (1, 2.0)]
    assert tracker.close("completed", timeout_s=60)
    assert recovery.heal(bench, url=mlflow_url) == []


# the registry -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A tiny base on disk, the adapters of two checkpoints, and the pictures drawn with each."""

    base: Any
    checkpoints: tuple[Checkpoint, ...]
    pictures: list[list[Image.Image]]


def train(bench: Bench, folder: Path) -> Trained:
    """The final checkpoint has a LoRA on the text encoder and a token of two vectors as well."""
    import torch
    from peft import LoraConfig

    from components.config import BaseModelConfig
    from components.evaluation.generation import Request, Settings, draw_batch, open_pipeline
    from components.families.bases import resolve_base
    from components.layouts.tokens import Token
    from components.training.adapters import adapter_bytes
    from tests.tiny import tiny_stable_diffusion

    torch.set_num_threads(1)
    base = resolve_base(BaseModelConfig(model=str(tiny_stable_diffusion(folder / "base"))))
    checkpoints = []
    for step in (10, 20):
        unet: Any = base.architecture.load_denoiser(base.path, "cpu")
        unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v"]))
        text: Any = base.architecture.load_clip_prompts(base.path, "cpu", torch.float32).clips[0].model
        text.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "fc1"]))
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for name, parameter in [*unet.named_parameters(), *text.named_parameters()]:
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        token = Token("<icon>", {"text_encoder": torch.randn(2, 16, generator=generator)})
        learnt = ({"text_encoder": text}, [token]) if step == 20 else ({}, [])
        checkpoints.append(Checkpoint(step, bench.store.put(adapter_bytes(unet, base.architecture, *learnt)).sha256))
    requests = [Request(i, prompt, None, seed=7 + i) for i, prompt in enumerate(PROMPTS)]
    pipelines = [open_pipeline(bench.store, base, checkpoint.sha256, "auto") for checkpoint in checkpoints]
    settings = Settings(3, 2.0, "auto", 32, 2, 1)
    return Trained(base, tuple(checkpoints), [draw_batch(pipeline, requests, settings) for pipeline in pipelines])


@pytest.mark.services
def test_every_checkpoint_becomes_a_model_that_draws_the_gallerys_bits_in_another_process(
    bench: Bench, mlflow_url: str, tmp_path: Path
):
    trained, run_uid = train(bench, tmp_path), open_run(bench, "registered")
    tracker = open_tracker(bench, run_uid, recipe_called("registered"), url=mlflow_url)
    for step in (10, 20):
        tracker.metrics(step, {"loss": 1 / step, "validation_ratio": 1 - step / 100})
    assert tracker.close("completed", timeout_s=60)
    half_done(mlflow_url, run_uid, trained.checkpoints[0])

    def register() -> Registration:
        return register_model(
            bench,
            run_uid=run_uid,
            name="registered",
            base_path=trained.base.path,
            checkpoints=trained.checkpoints,
            final_sha256=trained.checkpoints[-1].sha256,
            resolution=32,
            num_inference_steps=3,
            guidance_scale=2.0,
            dataset=("icons@v1", "d" * 64),
            tags={"evaluation_key": "e1"},
            metrics={"kid": {"candidate": 0.5}},
            url=mlflow_url,
        )

    first = register()
    assert register() == first  # done again, nothing is there twice
    assert (first.version, first.uri) == (1, "models:/registered/1")
    assert registry.aliases(bench.workspace, "registered", url=mlflow_url) == {"challenger": 1}
    with bench.catalog.read() as session:
        row = session.get(ModelVersion, ("registered", 1))
        assert row
        assert (row.adapter_sha256, row.evaluation_key, row.aliases) == (
            trained.checkpoints[-1].sha256,
            "e1",
            ["challenger"],
        )
    assert_logged(mlflow_url, run_uid, first)

    program = f"""
import mlflow, mlflow.diffusers, torch
from components.evaluation.generation import Request, Settings, draw_batch
torch.set_num_threads(1)
mlflow.set_tracking_uri({mlflow_url!r})
requests = [Request(i, prompt, None, seed=7 + i) for i, prompt in enumerate({PROMPTS!r})]
for place, uri in enumerate(["models:/{first.model_ids[10]}", "models:/registered@challenger"]):
    pipeline = mlflow.diffusers.load_model(uri).load_pipeline()
    for i, picture in enumerate(draw_batch(pipeline, requests, Settings(3, 2.0, "auto", 32, 2, 1))):
        picture.save(f"{tmp_path}/{{place}}-{{i}}.png")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    drawn = [[Image.open(tmp_path / f"{place}-{i}.png").tobytes() for i in range(2)] for place in range(2)]
    assert drawn == [[picture.tobytes() for picture in pictures] for pictures in trained.pictures]
    assert len({*drawn[0], *drawn[1]}) == 4


def assert_logged(url: str, run_uid: str, registration: Registration) -> None:
    """Each checkpoint once, with its metrics, found by "best checkpoint on this data set"."""
    run, client, ids = run_in_mlflow(url, run_uid), connect(url), registration.model_ids
    models = client.search_logged_models([run.info.experiment_id])
    assert {model.model_id: model.status for model in models} == dict.fromkeys(ids.values(), "READY")
    assert sorted((output.step, output.model_id) for output in run.outputs.model_outputs) == sorted(ids.items())
    best = client.search_logged_models(
        [run.info.experiment_id],
        datasets=[{"dataset_name": "icons@v1", "dataset_digest": "d" * 32}],
        order_by=[{"field_name": "metrics.validation_ratio", "ascending": True}],
    )
    assert [model.model_id for model in best] == [ids[20], ids[10]]
    assert {metric.key: metric.value for metric in best[0].metrics or []} == {
        "loss": 0.05,
        "validation_ratio": 0.8,
        "kid/candidate": 0.5,
    }
    assert history(url, run_uid, "loss") == [(10, 0.1), (20, 0.05)]  # attaching has added no point


@pytest.mark.services
def test_a_new_champion_makes_the_old_one_previous_and_promoting_twice_changes_nothing(bench: Bench, mlflow_url: str):
    client, workspace = connect(mlflow_url), bench.workspace
    run = client.create_run(client.create_experiment("promoted", artifact_location="mlflow-artifacts:/promoted"))
    client.create_registered_model("promoted")
    for _ in range(2):
        client.create_model_version("promoted", f"{run.info.artifact_uri}/model", run.info.run_id)
    client.set_registered_model_alias("promoted", "challenger", "1")
    assert registry.set_champion(workspace, "promoted", 1, url=mlflow_url) is None
    assert registry.aliases(workspace, "promoted", url=mlflow_url) == {"champion": 1}
    for _ in range(2):
        assert registry.set_champion(workspace, "promoted", 2, url=mlflow_url) == 1
        assert registry.aliases(workspace, "promoted", url=mlflow_url) == {"champion": 2, "previous": 1}
    with pytest.raises(BadInput, match="no version 9"):
        registry.set_champion(workspace, "promoted", 9, url=mlflow_url)
    assert registry.aliases(workspace, "never-registered", url=mlflow_url) == {}


def half_done(url: str, run_uid: str, checkpoint: Checkpoint) -> None:
    """What a child leaves that is killed before the model's files are up."""
    run = run_in_mlflow(url, run_uid)
    connect(url).create_logged_model(
        run.info.experiment_id,
        name="half",
        source_run_id=run.info.run_id,
        tags={RUN_TAG: run_uid, ADAPTER_TAG: checkpoint.sha256, STEP_TAG: str(checkpoint.step)},
    )


def test_a_registering_child_that_dies_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StageFailed, match="exit code 1 and no answer") as failure:
        ask_registrar({}, timeout_s=10)
    assert "\n" not in str(failure.value)


def test_the_registering_child_dies_with_its_parent(tmp_path: Path):
    program = f"""
import json, time
from pathlib import Path
from flows.tracking.registrar import main
def work(request):
    Path({str(tmp_path / "alive")!r}).touch()
    time.sleep(60)
main(work)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, cwd=ROOT, text=True)
    assert child.stdin
    request = dict.fromkeys(RegistrationRequest.__slots__, "")  # type: ignore[attr-defined]
    child.stdin.write(json.dumps(request) + "\n")
    child.stdin.flush()
    until((tmp_path / "alive").exists)
    child.stdin.close()
    assert child.wait(timeout=30) == 137
