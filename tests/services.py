"""A loopback proxy that breaks a server in the ways servers break, so that one real server serves every outage test."""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["pass", "drop", "503", "cut", "silent"]
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length", "host", "content-encoding"}


class Proxy:
    """Forwards to `upstream` while `mode` is "pass".

    "drop" closes every connection unanswered; "503" refuses; "cut" lets the server do the work and loses its answer;
    "silent" takes the request and never answers.
    """

    def __init__(self, upstream: str):
        self.mode: Mode = "pass"
        self.cut_after: int | None = None  # requests that still pass before the mode becomes "cut" by itself
        self.requests = 0
        self.released = threading.Event()
        proxy, target = self, urlsplit(upstream)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests += 1
                mode = proxy.next_mode()
                if mode == "silent":
                    proxy.released.wait(60)
                    return
                if mode == "drop":
                    return
                if mode == "503":
                    self.send_error(503)
                    return
                upstream = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
                upstream.request(self.command, self.path, body, headers | {"Accept-Encoding": "identity"})
                answer = upstream.getresponse()
                data = answer.read()
                upstream.close()
                if mode == "cut":
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in HOP_BY_HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing: pytest shows what matters."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def next_mode(self) -> Mode:
        if self.cut_after is not None:
            self.cut_after -= 1
            if self.cut_after < 0:
                self.mode, self.cut_after = "cut", None
        return self.mode

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def proxied(upstream: str) -> Iterator[Proxy]:
    """A proxy in front of `upstream` for the length of the block."""
    proxy = Proxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
