"""A hub on this machine: what huggingface_hub asks for to list a commit and to read ranges of its files."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest


class Hub(ThreadingHTTPServer):
    """Serves the files below `root` as the data set `name` at `commit`; counts what it was asked for."""

    def __init__(self, root: Path, name: str, commit: str):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.root, self.name, self.commit = root, name, commit
        self.asked, self.sent = 0, 0  # requests, and bytes of files
        self.away = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked += 1
        api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/{hub.commit}/"
        if hub.away:
            self._say(404, b"{}")
        elif path == f"{api}/revision/{hub.commit}":
            self._say(200, json.dumps({"id": hub.name, "sha": hub.commit, "siblings": []}).encode())
        elif path.startswith(f"{api}/tree/{hub.commit}"):
            self._say(200, json.dumps(self._tree(path.removeprefix(f"{api}/tree/{hub.commit}").strip("/"))).encode())
        elif path.startswith(files):
            self._send(hub.root / path.removeprefix(files))
        else:
            self._say(404, b"{}")

    def _tree(self, below: str) -> list[dict[str, object]]:
        everything = "recursive=true" in self.path.lower()
        paths = sorted((self.server.root / below).rglob("*") if everything else (self.server.root / below).iterdir())
        return [{"type": "directory" if path.is_dir() else "file", "oid": "0" * 40, "size": path.stat().st_size,
                 "path": path.relative_to(self.server.root).as_posix()} for path in paths]  # fmt: skip

    def _send(self, path: Path) -> None:
        body = path.read_bytes()
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            body = body[int(wanted[1]) : int(wanted[2] or len(body)) + 1]
        self.server.sent += len(body)
        self._say(206 if wanted else 200, body)

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quietly."""


@contextmanager
def serving(root: Path, name: str, commit: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one, in this process."""
    from huggingface_hub import HfFileSystem, constants

    with Hub(root, name, commit) as hub:
        thread = Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()
        try:
            yield hub
        finally:
            HfFileSystem.clear_instance_cache()
            hub.shutdown()
            thread.join()
