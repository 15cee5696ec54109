"""Fetching from the hub, spoken to as it answers: what is taken, what is left, and what a closed door is told as."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from components.config import BaseModelConfig, parse_recipe
from components.errors import BaseModelError, RecipeError
from components.families.bases import find_base, resolve_base
from tests.tiny import tiny_stable_diffusion

COMMIT = "c0ffee" * 6 + "c0ff"
MODEL = "someone/tiny-sd"


@dataclass
class Hub:
    """A folder served as the one model of a hub; `closed` is the status and error code of every answer instead."""

    folder: Path
    closed: tuple[int, str] | None = None
    asked: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        if self.closed:
            return self.closed[0], {"X-Error-Code": self.closed[1], "X-Error-Message": "no"}, b""
        if path.startswith(f"/api/models/{MODEL}/tree/"):
            files = [(file.relative_to(self.folder).as_posix(), file) for file in sorted(self.folder.rglob("*"))]
            tree = [
                {"type": "file", "path": name, "oid": "0" * 40, "size": file.stat().st_size}
                for name, file in files
                if file.is_file()
            ]
            return 200, {}, json.dumps(tree).encode()
        if path.startswith("/api/models/"):
            return 200, {}, json.dumps({"id": MODEL, "sha": COMMIT, "siblings": []}).encode()
        body = (self.folder / path.partition("/resolve/")[2].partition("/")[2]).read_bytes()
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}, body


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(tmp_path / "served")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.tokens.append(self.headers["Authorization"])
            status, headers, body = hub.answer(self.path.partition("?")[0])
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # seconds between looks for an end
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield hub
    server.shutdown()
    server.server_close()


def test_a_hub_pipeline_is_fetched_without_pickles_code_and_second_copies(hub: Hub):
    tiny_stable_diffusion(hub.folder)
    local = resolve_base(BaseModelConfig(model=str(hub.folder)))
    copies = ("unet/model.fp16.safetensors", "unet/model.fp16-00001-of-00002.safetensors")
    unwanted = ("sd.safetensors", "unet/pytorch_model.bin", "unet/evil.py", "x/y.json", *copies)
    for name in unwanted:
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_bytes(b"not asked for")
    fetched = resolve_base(BaseModelConfig(model=MODEL, revision=COMMIT))
    assert fetched.digests == local.digests
    assert not [path for path in hub.asked if path.endswith(unwanted)]
    assert all(f"/{COMMIT}" in path for path in hub.asked)


def test_without_a_revision_everything_comes_from_the_commit_that_the_index_came_from_and_it_is_named(hub: Hub):
    """A branch that moves between two requests would mix two models."""
    tiny_stable_diffusion(hub.folder)
    base = resolve_base(BaseModelConfig(model=MODEL))
    assert base.revision == COMMIT
    (index, *others) = [path for path in hub.asked if path.startswith(f"/{MODEL}/resolve/")]
    assert index.endswith("/main/model_index.json") and others
    assert all(path.startswith((f"/{MODEL}/resolve/{COMMIT}/", index)) for path in others)


def test_a_token_comes_from_the_environment_and_from_no_recipe(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    tiny_stable_diffusion(hub.folder)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(hub.folder / "no-login"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    resolve_base(BaseModelConfig(model=MODEL, revision=COMMIT))
    assert set(hub.tokens) == {"Bearer hf_of_the_environment"}
    cached = [file for file in hub.folder.parent.rglob("*") if file.is_file()]
    assert cached and not any(b"hf_of_the_environment" in file.read_bytes() for file in cached)
    body = {"name": "x", "data": {"sources": [{"path": "."}]}, "base": {"token": "hf_of_the_recipe"}}
    with pytest.raises(RecipeError, match=r"unknown key 'base\.token'"):
        parse_recipe(body, origin="recipe.toml")


def test_what_was_fetched_once_at_a_pinned_revision_needs_no_hub(hub: Hub):
    tiny_stable_diffusion(hub.folder)
    pinned = BaseModelConfig(model=MODEL, revision=COMMIT)
    path, _ = find_base(pinned)
    hub.closed = (403, "")
    assert find_base(pinned)[0] == path


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", f"licence is not accepted .* https://huggingface.co/{MODEL} and set HF_TOKEN"),
        (401, "GatedRepo", f"accept it at https://huggingface.co/{MODEL}"),
        (401, "RepoNotFound", "no such model, or it is private; .* HF_TOKEN"),
        (404, "RevisionNotFound", f"has no revision '{COMMIT}'; correct base.revision"),
        (404, "EntryNotFound", "has no model_index.json, so it is no diffusers pipeline"),
        (403, "", "not in the local cache and the hub gave"),
    ],
)
def test_a_closed_door_is_one_line_that_says_what_to_do(hub: Hub, status: int, code: str, said: str):
    hub.closed = (status, code)
    with pytest.raises(BaseModelError, match=said) as refusal:
        find_base(BaseModelConfig(model=MODEL, revision=COMMIT))
    assert "\n" not in str(refusal.value)
