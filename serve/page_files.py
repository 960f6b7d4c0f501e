"""The page at `/`: its files, read once, with the headers that keep it to this server."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import PurePath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for again: an updated server shows an updated page
}


def page_routes() -> list[Route]:
    """GET and HEAD of `/`, which is `page/index.html`, and of `/page/NAME` for each other file of the page."""
    entries = sorted((files("phalanx.serve") / "page").iterdir(), key=lambda entry: entry.name)
    kinds = {entry: CONTENT_TYPES.get(PurePath(entry.name).suffix) for entry in entries}
    return [_route(entry.name, entry.read_bytes(), kind) for entry, kind in kinds.items() if kind]


def _route(name: str, body: bytes, content_type: str) -> Route:
    path = "/" if name == "index.html" else f"/page/{name}"
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag}

    async def serve(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=content_type)

    return Route(path, serve, name=f"page {name}")
