"""Request-response logging: what endpoints were asked and what they answered, as rows of BigQuery tables.

A row is a request that was answered; `request_payload` holds each instance as JSON, `response_payload` each
prediction. Rows are written a moment later, so that no client waits for them.
"""

import json
import logging
import random
import re
import threading
from datetime import UTC, datetime

from google.protobuf.message import Message

from helpers.local import PROJECT, PROJECT_NUMBER, errors
from helpers.local.store import new_id

log = logging.getLogger(__name__)

TABLE = "request_response_logging"  # unless the endpoint names another
FIELDS = [
    {"name": "endpoint", "type": "STRING"},
    {"name": "deployed_model_id", "type": "STRING"},
    {"name": "logging_time", "type": "TIMESTAMP"},
    {"name": "request_id", "type": "NUMERIC"},
    {"name": "request_payload", "type": "STRING", "mode": "REPEATED"},
    {"name": "response_payload", "type": "STRING", "mode": "REPEATED"},
]
PAUSE_SECONDS = 0.5  # between the first row and the moment at which it is written with those that followed


class RequestLogs:
    """The rows that wait, and a thread that writes them as long as there are any."""

    def __init__(self, cloud):
        """Write into a cloud's BigQuery."""
        self.cloud = cloud
        self._waiting: list[tuple[str, dict]] = []  # the endpoint's name and the row
        self._lock = threading.Lock()

    def add(self, endpoint: Message, deployed_id: str, instances: list, predictions: list) -> None:
        """Log a request, or not, by the endpoint's own choice."""
        config = endpoint.predict_request_response_logging_config
        if not config.enabled or random.random() >= (config.sampling_rate or 1):
            return
        row = {
            "endpoint": endpoint.name.rsplit("/", 1)[1],
            "deployed_model_id": deployed_id,
            "logging_time": datetime.now(UTC).isoformat(),
            "request_id": new_id(),
            "request_payload": [json.dumps(instance) for instance in instances],
            "response_payload": [json.dumps(prediction) for prediction in predictions],
        }
        with self._lock:
            self._waiting.append((endpoint.name, row))
            is_first = len(self._waiting) == 1
        if is_first:
            threading.Timer(PAUSE_SECONDS, self._write).start()

    def _write(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for name in dict.fromkeys(name for name, _ in waiting):
            endpoint = self.cloud.store.find(name)
            if endpoint is None:  # deleted by now: its table must not come back
                continue
            try:
                self._insert(endpoint, [row for owner, row in waiting if owner == name])
            except Exception:
                log.exception("the requests of %s were not logged", name)

    def _insert(self, endpoint: Message, rows: list[dict]) -> None:
        from helpers.local.bigquery_files import insert
        from helpers.local.bigquery_schemas import Name

        warehouse, name = self.cloud.bigquery.warehouse, Name(PROJECT, *destination(endpoint))
        with warehouse.writing(name) as cursor:
            warehouse.create_dataset(cursor, name.dataset, {}, exist_ok=True)
            if warehouse.find(cursor, name) is None:
                warehouse.create_table(cursor, name, FIELDS)
            if problems := insert(warehouse, cursor, name, {"rows": [{"json": row} for row in rows]}):
                raise ValueError(problems[0])


def destination(endpoint: Message) -> tuple[str, str]:
    """Return the dataset and the table for an endpoint's requests; refuse what is no place for them."""
    uri = endpoint.predict_request_response_logging_config.bigquery_destination.output_uri
    found = re.fullmatch(r"bq://([\w-]+)(?:\.(\w+))?(?:\.([\w-]+))?", uri)
    if not found:
        raise errors.invalid(f"{uri!r} is no BigQuery destination: expected bq://PROJECT.DATASET.TABLE.")
    if found[1] not in (PROJECT, PROJECT_NUMBER):
        raise errors.invalid(f"{uri!r} is in another project; the local BigQuery has one, {PROJECT}.")
    own = re.sub(r"\W", "_", f"logging_{endpoint.display_name}_{endpoint.name.rsplit('/', 1)[1]}")
    return found[2] or own, found[3] or TABLE
