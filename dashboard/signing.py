"""Signatures under picture addresses and reviewers' names, made with one key that never leaves the workspace."""

import contextlib
import hashlib
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from itsdangerous import BadData, Signer, URLSafeTimedSerializer

from components.workspace import Workspace

TOKEN_LIFE_S = 12 * 3600


def read_key(workspace: Workspace) -> bytes:
    """The workspace's signing key (64 hex digits), made at first use, readable by its owner alone."""
    path = workspace.home / "dashboard.key"
    if not path.exists():
        _make_key(path)
    return path.read_bytes()


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # whoever is first wins; a link never shows half a key
            os.link(draft, path)
    finally:
        draft.unlink()


@dataclass(frozen=True, slots=True)
class Seal:
    """Signs with the workspace's key."""

    key: bytes

    @classmethod
    def of(cls, workspace: Workspace) -> "Seal":
        return cls(read_key(workspace))

    def thumb_url(self, sha256: str, size: int, *, today: date | None = None) -> str:
        """The address of a picture, good for the rest of this calendar week and all of the next."""
        return f"/thumb/{sha256}/{size}.webp?k={self._thumb_signature(sha256, size, _week(today or _today()))}"

    def thumb_allowed(self, sha256: str, size: int, signature: str, *, today: date | None = None) -> bool:
        """Whether `signature` was made for this picture in this calendar week or the last."""
        today = today or _today()
        signer = self._thumb_signer()
        return any(
            signer.verify_signature(_thumb_message(sha256, size, _week(day)), signature.encode())
            for day in (today, today - timedelta(days=7))
        )

    def reviewer_token(self, reviewer: str) -> str:
        """What the page hands to the browser so that a review carries this name."""
        return self._tokens().dumps(reviewer)

    def reviewer(self, token: str) -> str | None:
        """The name in a token; None when it is forged or older than twelve hours."""
        try:
            return self._tokens().loads(token, max_age=TOKEN_LIFE_S)
        except BadData:
            return None

    def _thumb_signature(self, sha256: str, size: int, week: str) -> str:
        return self._thumb_signer().get_signature(_thumb_message(sha256, size, week)).decode()

    def _thumb_signer(self) -> Signer:
        return Signer(self.key, salt=b"safelight thumb", key_derivation="hmac", digest_method=hashlib.sha256)

    def _tokens(self) -> URLSafeTimedSerializer:
        return URLSafeTimedSerializer(
            self.key,
            salt=b"safelight reviewer",
            signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
        )


def _thumb_message(sha256: str, size: int, week: str) -> bytes:
    return f"{sha256}/{size}/{week}".encode()


def _today() -> date:
    return datetime.now(UTC).date()


def _week(day: date) -> str:
    year, week, _ = day.isocalendar()
    return f"{year}-W{week:02}"
