"""The few words that are spoken to Prefect's REST API without importing Prefect, which takes seconds."""

import json
import os
import socket
from base64 import b64encode
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from components.errors import ServiceUnavailable

TIMEOUT_S = 20
CONFLICT = 409
ZOMBIE_AUTOMATION = "safelight: a flow run without heartbeats has crashed"
HEARTBEATS_MISSED_S = 90.0  # three of the shortest that Prefect accepts
AFTER_WHICH_NONE_IS_DUE = (
    "Completed",
    "Failed",
    "Cancelled",
    "Crashed",
    "Cancelling",
    "Paused",
    "Suspended",
    "AwaitingRetry",
    "Scheduled",
)


def call(root: str, path: str, body: dict[str, Any], method: str = "POST") -> Any:
    """Send JSON to `{root}/api/{path}` and return the answer's. Raises ServiceUnavailable, one line."""
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = "Basic " + b64encode(secret.encode()).decode()
    try:
        with urlopen(
            Request(f"{root}/api/{path}", json.dumps(body).encode(), headers, method=method), timeout=TIMEOUT_S
        ) as answer:
            text = answer.read()
    except (OSError, HTTPException) as error:
        raise ServiceUnavailable(
            f"Prefect at {root} answered {path} with {error}; `safelight status` shows its state"
        ) from error
    return json.loads(text) if text else None


def slot_name() -> str:
    """The concurrency limit that keeps one training at a time on this host."""
    return f"gpu:{socket.gethostname()}"


def prepare(root: str) -> None:
    """Create what runs rely on, where it is missing: this host's slot, and the automation that ends zombies.

    Usually both are there, and nothing is written: a write waits for whoever holds the server's database.
    """
    if slot_name() not in {limit["name"] for limit in call(root, "v2/concurrency_limits/filter", {})}:
        _create(root, "v2/concurrency_limits/", {"name": slot_name(), "limit": 1, "active": True})
    if call(root, "automations/filter", {"automations": {"name": {"any_": [ZOMBIE_AUTOMATION]}}}):
        return
    _create(
        root,
        "automations/",
        {
            "name": ZOMBIE_AUTOMATION,
            "enabled": True,
            "description": "The process that ran it is gone; the next run goes on from what it had committed.",
            "trigger": {
                "type": "event",
                "posture": "Proactive",
                "threshold": 1,
                "within": HEARTBEATS_MISSED_S,
                "match": {"prefect.resource.id": ["prefect.flow-run.*"]},
                "for_each": ["prefect.resource.id"],
                "after": ["prefect.flow-run.heartbeat"],
                "expect": [
                    "prefect.flow-run.heartbeat",
                    *(f"prefect.flow-run.{state}" for state in AFTER_WHICH_NONE_IS_DUE),
                ],
            },
            "actions": [
                {
                    "type": "change-flow-run-state",
                    "state": "CRASHED",
                    "name": "Crashed",
                    "message": "No heartbeat for 90 s.",
                }
            ],
        },
    )


def _create(root: str, path: str, body: dict[str, Any]) -> None:
    try:
        call(root, path, body)
    except ServiceUnavailable as error:
        if not (isinstance(error.__cause__, HTTPError) and error.__cause__.code == CONFLICT):  # it exists: as wanted
            raise
