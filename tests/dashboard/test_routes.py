"""Pictures need a signature, reviews need a token and our own origin; both are exact about what they refuse."""

import json
import stat
from datetime import date, timedelta
from io import BytesIO

import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient

from components.catalog import gallery
from components.catalog.database import Catalog
from dashboard.asgi import routes
from dashboard.events import events_route
from dashboard.signing import Seal, read_key
from dashboard.thumbs import encode
from tests.dashboard.seed import Seeded, png

ORIGIN = "http://testserver"
MONDAY = date(2026, 11, 23)


@pytest.fixture
def client(writable: Seeded) -> TestClient:
    return TestClient(Starlette(routes=routes(writable.bench.workspace, writable.bench.catalog)))


@pytest.fixture
def seal(writable: Seeded) -> Seal:
    return Seal.of(writable.bench.workspace)


def shot(seeded: Seeded) -> gallery.Shot:
    return gallery.board(seeded.bench.catalog, seeded.evaluation_key, reviewer="Mia").rows[-1].shots["candidate"]


# pictures


def test_a_signed_address_gives_a_webp_that_may_be_kept(client: TestClient, seal: Seal, writable: Seeded):
    answer = client.get(seal.thumb_url(shot(writable).image_sha256, 256))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert answer.headers["x-content-type-options"] == "nosniff"
    with Image.open(BytesIO(answer.content)) as image:
        assert (image.format, image.size) == ("WEBP", (256, 256))


def test_a_signature_is_for_one_picture_and_one_size(client: TestClient, seal: Seal, writable: Seeded):
    sha256 = shot(writable).image_sha256
    url = seal.thumb_url(sha256, 256)
    other = "0" * 64
    for wrong in (
        url[:-1] + ("A" if url[-1] != "A" else "B"),
        url.replace("/256.", "/512."),
        url.replace(sha256, other),
        url.partition("?")[0],
    ):
        assert client.get(wrong).status_code == 403
    assert client.get(seal.thumb_url(other, 256)).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/thumb/xyz/256.webp?k=a",
        f"/thumb/{'A' * 64}/256.webp?k=a",
        f"/thumb/{'a' * 64}/300.webp?k=a",
        "/thumb/..%2f..%2fcatalog.db/256.webp?k=a",
        f"/thumb/{'a' * 64}/256.webp.webp?k=a",
    ],
)
def test_an_address_that_names_no_object_is_not_found(client: TestClient, path: str):
    assert client.get(path).status_code == 404


def test_addresses_live_through_the_next_calendar_week(seal: Seal):
    signature = seal.thumb_url("a" * 64, 256, today=MONDAY).partition("k=")[2]
    allowed = {
        days: seal.thumb_allowed("a" * 64, 256, signature, today=MONDAY + timedelta(days=days))
        for days in (-1, 0, 6, 7, 13, 14)
    }
    assert allowed == {-1: False, 0: True, 6: True, 7: True, 13: True, 14: False}


def test_damaged_and_unreadable_objects_are_not_found(client: TestClient, seal: Seal, writable: Seeded):
    store = writable.bench.store
    words, picture = store.put(b"no picture"), store.put(png(Image.new("RGB", (9, 9), "red")))
    store.path(picture.sha256).write_bytes(b"altered")
    for sha256 in (words.sha256, picture.sha256):
        assert client.get(seal.thumb_url(sha256, 256)).status_code == 404


@pytest.mark.parametrize(
    ("source", "size", "expected"),
    [
        ((64, 64), 256, (256, 256)),
        ((64, 48), 256, (256, 192)),
        ((100, 100), 256, (200, 200)),
        ((200, 200), 256, (200, 200)),
        ((1000, 500), 256, (256, 128)),
        ((1, 1), 256, (256, 256)),
        ((64, 64), 512, (512, 512)),
    ],
)
def test_small_pictures_are_enlarged_by_whole_factors_and_large_ones_reduced(source, size, expected):
    with Image.open(BytesIO(encode(png(Image.new("RGB", source, "red")), size))) as image:
        assert image.size == expected


def test_transparency_lies_on_white_and_metadata_stays_behind():
    source = BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(source, "PNG", exif=exif)
    data = encode(source.getvalue(), 256)
    with Image.open(BytesIO(data)) as image:
        assert min(image.convert("L").tobytes()) > 250
    assert b"secret place" not in data


def test_the_key_is_made_once_and_readable_by_its_owner_alone(writable: Seeded):
    workspace = writable.bench.workspace
    assert read_key(workspace) == read_key(workspace)
    assert stat.S_IMODE((workspace.home / "dashboard.key").stat().st_mode) == 0o600
    assert [path.name for path in workspace.home.iterdir() if path.name.startswith(".dashboard")] == []


# reviews


def post(client: TestClient, seal: Seal, body: object, *, reviewer: str = "Mia", **headers: str):
    given = {
        "Origin": ORIGIN,
        "Content-Type": "application/json",
        "X-Safelight-Reviewer": seal.reviewer_token(reviewer),
    }
    return client.post("/api/events", content=json.dumps(body), headers=given | headers)


def test_a_review_is_stored_under_the_name_in_the_token(client: TestClient, seal: Seal, writable: Seeded):
    body = {"generation": shot(writable).id, "kind": "stars", "value": 4, "text": None, "key": "abcdefgh"}
    answer = post(client, seal, body)
    assert answer.status_code == 200
    assert answer.json() | {"id": 0} == {
        "id": 0,
        "reviewer": "Mia",
        "stars": 4,
        "flag": False,
        "mean": 4.0,
        "raters": 1,
        "flags": 0,
    }
    assert shot(writable).standing.my_stars == 4


def test_the_same_post_twice_is_one_review_and_another_body_conflicts(client: TestClient, seal: Seal, writable: Seeded):
    body = {"generation": shot(writable).id, "kind": "flag", "value": 1, "key": "abcdefgh"}
    first, second = post(client, seal, body), post(client, seal, body)
    assert (first.status_code, first.json()["id"]) == (200, second.json()["id"])
    assert post(client, seal, body | {"value": 0}).status_code == 409
    assert shot(writable).standing.my_flag


def test_a_comment_comes_back_word_for_word(client: TestClient, seal: Seal, writable: Seeded):
    text = "<b>too</b> dark ![](http://192.0.2.7/x.png)"
    assert (
        post(
            client, seal, {"generation": shot(writable).id, "kind": "comment", "text": text, "key": "abcdefgh"}
        ).status_code
        == 200
    )
    assert [comment.text for comment in shot(writable).standing.comments] == [text]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"X-Safelight-Reviewer": "Mia"}, 401),
        ({"X-Safelight-Reviewer": ""}, 401),
    ],
)
def test_a_request_from_elsewhere_is_refused_and_stores_nothing(client, seal, writable, headers, status):
    body = {"generation": shot(writable).id, "kind": "stars", "value": 4, "key": "abcdefgh"}
    assert post(client, seal, body, **headers).status_code == status
    assert shot(writable).standing.my_stars == 0


def test_a_token_of_another_workspace_is_refused(client: TestClient, writable: Seeded):
    body = {"generation": shot(writable).id, "kind": "stars", "value": 4, "key": "abcdefgh"}
    assert post(client, Seal(b"another key"), body).status_code == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ([], 422),
        ("text", 422),
        ({}, 422),
        ({"generation": "1", "kind": "stars", "value": 1, "key": "abcdefgh"}, 422),
        ({"generation": True, "kind": "stars", "value": 1, "key": "abcdefgh"}, 422),
        ({"generation": 2**70, "kind": "stars", "value": 1, "key": "abcdefgh"}, 422),
        ({"generation": 1, "kind": "stars", "value": 9, "key": "abcdefgh"}, 422),
        ({"generation": 1, "kind": "stars", "value": 1, "key": "abcdefgh", "reviewer": "Ana"}, 422),
        ({"generation": 10**9, "kind": "stars", "value": 1, "key": "abcdefgh"}, 404),
        ({"generation": 1, "kind": "comment", "text": "x" * 9000, "key": "abcdefgh"}, 413),
    ],
)
def test_a_malformed_review_is_refused_with_a_sentence(client, seal, body, status):
    answer = post(client, seal, body)
    assert answer.status_code == status
    assert answer.json()["error"]


def test_an_absent_catalog_answers_come_again(seal: Seal, tmp_path):
    catalog = Catalog(f"sqlite:///{tmp_path / 'missing' / 'catalog.db'}")
    client = TestClient(Starlette(routes=[events_route(catalog, seal)]))
    assert post(client, seal, {"generation": 1, "kind": "flag", "value": 1, "key": "abcdefgh"}).status_code == 503
