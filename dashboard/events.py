"""POST /api/events: stars, flags and comments from the gallery, each stored exactly once."""

import json
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from components.catalog import reviews
from components.catalog.database import Catalog
from components.errors import BadInput
from dashboard.signing import Seal

MAX_BODY = 8192  # bytes
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
FIELDS = {"generation": int, "kind": str, "value": int | None, "text": str | None, "key": str}


class Refused(Exception):
    """A request that is not even looked at: status and the sentence for the reader."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def events_route(catalog: Catalog, seal: Seal) -> Route:
    """The reviewer's name comes from the signed token in `X-Safelight-Reviewer`, never from the body."""

    async def record_event(request: Request) -> JSONResponse:
        try:
            _same_origin(request)
            body = _event(await _read(request))
            reviewer = seal.reviewer(request.headers.get("x-safelight-reviewer", ""))
            if reviewer is None:
                raise Refused(401, "this page was opened too long ago; reload it to go on reviewing")
            act, standing = await run_in_threadpool(_append, catalog, reviewer, body)
        except Refused as refused:
            return _answer(refused.status, error=str(refused))
        except reviews.ReviewConflict as error:
            return _answer(409, error=str(error))
        except reviews.UnknownGeneration as error:
            return _answer(404, error=str(error))
        except BadInput as error:
            return _answer(422, error=str(error))
        except SQLAlchemyError:
            return _answer(503, error="the catalog does not answer; this review is kept and sent again")
        return _answer(
            200,
            id=act.id,
            reviewer=act.reviewer,
            stars=standing.my_stars,
            flag=standing.my_flag,
            mean=standing.mean_stars,
            raters=standing.raters,
            flags=standing.flags,
        )

    return Route("/api/events", record_event, methods=["POST"])


def _append(catalog: Catalog, reviewer: str, body: dict[str, Any]) -> tuple[reviews.Act, reviews.Standing]:
    act = reviews.append(
        catalog,
        generation_id=body["generation"],
        reviewer=reviewer,
        kind=body["kind"],
        value=body["value"],
        text=body["text"],
        key=body["key"],
    )
    return act, reviews.standing(catalog, act.generation_id, reviewer=reviewer)


def _same_origin(request: Request) -> None:
    """A page of another site can neither read our token nor get past this check."""
    origin, site = request.headers.get("origin", ""), request.headers.get("sec-fetch-site", "same-origin")
    if urlsplit(origin).netloc != request.headers.get("host") or site != "same-origin":
        raise Refused(403, "reviews are taken from the dashboard's own pages only")


async def _read(request: Request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "expected application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise Refused(413, f"expected at most {MAX_BODY} bytes")
    return body


def _event(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused(422, "expected one JSON object") from None
    if not isinstance(body, dict) or not body.keys() <= FIELDS.keys():
        raise Refused(422, f"expected a JSON object with the fields {', '.join(FIELDS)}")
    event: dict[str, Any] = {name: body.get(name) for name in FIELDS}
    for name, expected in FIELDS.items():
        if not isinstance(event[name], expected) or isinstance(event[name], bool):
            raise Refused(422, f"{name} is {event[name]!r:.80}, expected {getattr(expected, '__name__', expected)}")
    if not 0 <= event["generation"] < 1 << 63:
        raise Refused(422, "generation is out of range")
    return event


def _answer(status: int, **body: Any) -> JSONResponse:
    return JSONResponse(body, status, HEADERS)
