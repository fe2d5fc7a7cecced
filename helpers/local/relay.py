"""Public objects that this cloud does not hold, fetched from the real Cloud Storage: a Keras model's weights, say."""

from collections.abc import Callable

import requests
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

SECONDS = (5, 60)  # to connect, and between two parts
BLOCK = 1 << 20
PASSED = ("range", "accept-encoding", "if-none-match", "if-modified-since")
RETURNED = ("content-type", "content-length", "content-range", "content-encoding", "etag", "last-modified")


def through(proxy: str | None) -> Callable[[Request], Response]:
    """Return what answers a request for an object by asking the real service, through a proxy if there is one.

    The token of the local cloud stays here: only what is public can be had.
    """
    proxies = {"https": proxy} if proxy else None

    def relay(request: Request) -> Response:
        target = f"https://storage.googleapis.com{request.scope['raw_path'].decode('latin-1')}"
        headers = {name: request.headers[name] for name in PASSED if name in request.headers}
        try:
            answer = requests.request(
                request.method,
                target,
                params=request.url.query,
                headers=headers,
                proxies=proxies,
                stream=True,
                timeout=SECONDS,
            )
        except requests.RequestException as error:
            return not_there(type(error).__name__)
        if answer.status_code in (401, 403, 404):
            return not_there(f"it answers {answer.status_code}, so there is no public object of this name")
        kept = {name: answer.headers[name] for name in RETURNED if name in answer.headers}
        return StreamingResponse(answer.raw.stream(BLOCK, decode_content=False), answer.status_code, kept)

    return relay


def not_there(reason: str) -> JSONResponse:
    """Answer as Cloud Storage does for a bucket that is not there, and say why it was not found elsewhere either."""
    message = (
        "The specified bucket does not exist. It is not in the local cloud, and was looked for at the real "
        f"storage.googleapis.com without success: {reason}."
    )
    error = {"code": 404, "message": message, "errors": [{"message": message, "reason": "notFound"}]}
    return JSONResponse({"error": error}, 404)
