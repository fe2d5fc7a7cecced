"""What a job printed, read from Cloud Logging.

    logs.read(job)                                    # a DataFrame: replica, severity and message of each line

In a terminal, while it runs: `gcloud ai custom-jobs stream-logs ID --region=REGION`; for the local cloud
`python3 -m helpers cloud logs ID`.
"""

import json

URL = "https://logging.googleapis.com/v2/entries:list"
PAGE = 1000  # entries, the most that one answer holds


def read(job):
    """Return a DataFrame with the replica, the severity and the message of each line that a job printed.

    `job` is one of the SDK's custom, tuning or training jobs. A line that is JSON gives its field `message`, or all of
    itself if it has none. Google Cloud shows a line some seconds, at times a minute, after it was printed.
    """
    import pandas as pd

    job_id = _custom_job(job).rsplit("/", 1)[-1]
    words = f'resource.type="ml_job" AND resource.labels.job_id="{job_id}"'
    lines = [
        (entry["resource"]["labels"].get("task_name", ""), entry.get("severity", "DEFAULT"), _message(entry))
        for entry in _entries(job.project, words)
    ]
    return pd.DataFrame(lines, columns=["replica", "severity", "message"])


def _custom_job(job) -> str:
    """Return the name under which a job logs: of a training pipeline, that of the custom job in it."""
    return job.to_dict().get("trainingTaskMetadata", {}).get("backingCustomJob", job.resource_name)


def _entries(project: str, words: str):
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    request = {"resourceNames": [f"projects/{project}"], "filter": words, "orderBy": "timestamp asc", "pageSize": PAGE}
    with AuthorizedSession(credentials) as session:
        while True:
            answer = session.post(URL, json=request)
            if not answer.ok:
                raise RuntimeError(f"Cloud Logging refused to read the log: {answer.text}")
            found = answer.json()
            yield from found.get("entries", [])
            if not found.get("nextPageToken"):
                return
            request["pageToken"] = found["nextPageToken"]


def _message(entry: dict) -> str:
    fields = entry.get("jsonPayload", {})
    return entry.get("textPayload") or fields.get("message") or json.dumps(fields)
