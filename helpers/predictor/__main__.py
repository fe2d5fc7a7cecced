"""Serve the SavedModel in AIP_STORAGE_URI on AIP_HTTP_PORT, by as many processes as WEB_CONCURRENCY says, or one.

A container listens on all its addresses; UVICORN_HOST=127.0.0.1 keeps a server on your own machine to yourself.
"""

import os

import uvicorn

host, port = os.environ.get("UVICORN_HOST", "0.0.0.0"), int(os.environ.get("AIP_HTTP_PORT", "8080"))
app = "helpers.predictor.server:app"
uvicorn.run(app, factory=True, host=host, port=port, access_log=False, log_level="warning")
