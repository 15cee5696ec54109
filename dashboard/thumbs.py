"""Pictures for the browser: WebP of at most 256 or 512 px, made at first sight and kept in the workspace."""

import re
import secrets
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from components.catalog.database import Catalog
from components.curation.memory import reading_in_place
from components.errors import SafelightError
from components.storage import Store
from components.workspace import Workspace
from dashboard.signing import Seal

SIZES = (256, 512)
SHA256 = re.compile(r"[0-9a-f]{64}")
PAPER = (255, 255, 255)  # behind transparent pictures
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
KEPT = {
    "Cache-Control": "private, max-age=31536000, immutable",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
REFUSED = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def thumb_route(workspace: Workspace, catalog: Catalog, seal: Seal) -> Route:
    """GET /thumb/{sha}/{size}.webp?k=<signature>: 403 without a good signature, 404 where no picture can be made."""
    store = Store(workspace.objects, reading_in_place(catalog, workspace.objects))

    def thumbnail(request: Request) -> Response:
        sha256, size = request.path_params["sha"], request.path_params["size"]
        if not SHA256.fullmatch(sha256) or size not in map(str, SIZES):
            return PlainTextResponse("no such picture", 404, REFUSED)
        if not seal.thumb_allowed(sha256, int(size), request.query_params.get("k", "")):
            return PlainTextResponse("this address has expired or was altered; reload the page", 403, REFUSED)
        try:
            path = thumb(workspace, store, sha256, int(size))
        except (SafelightError, OSError, Image.DecompressionBombError, ValueError, SyntaxError):
            return PlainTextResponse("this picture is gone or cannot be read", 404, REFUSED)
        return FileResponse(path, media_type="image/webp", headers=KEPT)

    return Route("/thumb/{sha}/{size}.webp", thumbnail)


def thumb(workspace: Workspace, store: Store, sha256: str, size: int) -> Path:
    """The WebP of an object, made now if it is not kept yet.

    Raises DamagedArtifact when the object is gone or altered, OSError when its bytes are no picture.
    """
    path = workspace.thumbs / sha256[:2] / f"{sha256[2:]}-{size}.webp"
    if not path.exists() or path.stat().st_size == 0:
        _keep(path, encode(store.read(sha256), size))
    return path


def encode(data: bytes, size: int) -> bytes:
    """WebP bytes of a picture fitted into size x size px, upright, on white, without metadata.

    Browsers enlarge small pictures with a blur, so one of at most half of `size` is enlarged here, by a whole factor
    with Lanczos' steeper edges; anything in between keeps its own size. Raises OSError when the bytes are no picture.
    """
    image = Image.open(BytesIO(data))
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
    image.draft("RGB", (size, size))  # JPEG only: decodes at the next larger of 1/8, 1/4, 1/2
    image = _on_paper(ImageOps.exif_transpose(image))
    longest, quality = max(image.size), 80
    if longest > size:
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
    elif longest * 2 <= size:
        image, quality = ImageOps.scale(image, size // longest, Image.Resampling.LANCZOS), 90
    out = BytesIO()
    image.save(out, "WEBP", quality=quality, method=0)
    return out.getvalue()


def _on_paper(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    paper = Image.new("RGB", layer.size, PAPER)
    paper.paste(layer, mask=layer.getchannel("A"))
    return paper


def _keep(path: Path, data: bytes) -> None:
    """Thumbs can be made again at any time, so they are renamed into place but not fsynced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{secrets.token_hex(8)}.part")
    draft.write_bytes(data)
    draft.replace(path)
