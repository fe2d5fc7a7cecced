"""What a job on Google Cloud needs, checked before one is sent, each with the command that mends it.

    environment.preflight()                          # of the local cloud
    environment.preflight("my-project", "us-west1")  # of a project of yours; it changes nothing there

It asks what Google's own services tell: Service Usage, Resource Manager, Cloud Storage. What cannot be asked is read
from Google's tables, and says so. Commands run where gcloud is installed, such as in Cloud Shell.
"""

import html
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from helpers import containers, hardware, tables

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
VERTEX = "aiplatform.googleapis.com"
LOGIN = "gcloud auth application-default login"
USES = "roles/serviceusage.serviceUsageConsumer"
APIS = {
    VERTEX: "training jobs, models and endpoints (Vertex AI, now Agent Platform)",
    "storage.googleapis.com": "the bucket that jobs read and write",
    "bigquery.googleapis.com": "tables and BigQuery ML",
    "logging.googleapis.com": "what jobs print",
    "cloudresourcemanager.googleapis.com": "the SDK, which asks for the project's number",
    "artifactregistry.googleapis.com": "containers of your own",
    "cloudbuild.googleapis.com": "building them",
}
PERMISSIONS = {  # of the course, by the smallest of Google's roles that gives them
    USES: ("serviceusage.services.use", "serviceusage.services.get"),
    "roles/aiplatform.user": (
        "aiplatform.customJobs.create",
        "aiplatform.trainingPipelines.create",
        "aiplatform.hyperparameterTuningJobs.create",
        "aiplatform.models.upload",
        "aiplatform.endpoints.create",
        "aiplatform.endpoints.deploy",
        "aiplatform.endpoints.predict",
        "aiplatform.batchPredictionJobs.create",
    ),
    "roles/storage.admin": (
        "storage.buckets.create",
        "storage.buckets.get",
        "storage.objects.create",
        "storage.objects.get",
        "storage.objects.list",
        "storage.objects.delete",
    ),
    "roles/bigquery.user": ("bigquery.jobs.create", "bigquery.datasets.create"),
    "roles/logging.viewer": ("logging.logEntries.list",),
    "roles/iam.serviceAccountUser": ("iam.serviceAccounts.actAs",),
    "roles/artifactregistry.admin": (
        "artifactregistry.repositories.create",
        "artifactregistry.repositories.uploadArtifacts",
    ),
    "roles/cloudbuild.builds.editor": ("cloudbuild.builds.create",),
}
MACHINE = "n1-standard-4"  # what the course trains and serves on
METRICS = {"training": "custom_model_training_cpus", "prediction": "custom_model_serving_cpus"}
DISK_GB = 2  # for what the lessons write
SECONDS = 30  # within which a service answers


class Refusal(Exception):  # noqa: N818 - it is an answer
    """What a service of Google's says instead of an answer, in a sentence, with its HTTP status; 0 if it says none."""

    def __init__(self, message: str, status: int = 0):
        """Keep the first sentence: what follows it is advice, which is given here as a command."""
        super().__init__(message.split(". ")[0])
        self.status = status


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `state` is "ok", "missing", or "note" for what is worth knowing and stops nothing.

    `command` mends what is missing; it is empty where nothing has to be done.
    """

    name: str
    state: str
    text: str
    command: str = ""


@dataclass(frozen=True, repr=False)
class Preflight:
    """What was found in a project and region: true if nothing is missing. It shows itself as a table."""

    project: str
    region: str
    findings: tuple[Finding, ...]

    @property
    def missing(self) -> list[Finding]:
        """Return what has to be mended before a job can run."""
        return [finding for finding in self.findings if finding.state == "missing"]

    def __bool__(self) -> bool:
        """Say whether all is well."""
        return not self.missing

    def _verdict(self) -> str:
        if self:
            return f"{self.project} in {self.region} is ready."
        return f"{self.project} in {self.region}: {len(self.missing)} to mend. Run the commands, then check again."

    def __repr__(self) -> str:
        """Return a line for each finding, with its command below it."""
        width = max(len(finding.name) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.state:7} {finding.name:{width}} {finding.text}")
            if finding.command:
                lines.append(f"{'':8}{finding.command}")
        return "\n".join([*lines, self._verdict()])

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'
        rows = []
        for finding in self.findings:
            command = f"<br><code>{html.escape(finding.command)}</code>" if finding.command else ""
            cells = (f"<b>{finding.state}</b>", html.escape(finding.name), html.escape(finding.text) + command)
            rows.append("<tr>" + "".join(f"<td {left}>{cell}</td>" for cell in cells) + "</tr>")
        return f"<table>{''.join(rows)}</table><p>{html.escape(self._verdict())}</p>"


def check(project: str, region: str, bucket: str) -> Preflight:
    """Return what jobs in a project and region would miss; `bucket` is the name of the one that they are to use.

    Raises ValueError for a region that Vertex AI is not in.
    """
    tables.known("region", region, tables.read("regions")["accelerators"])
    asked = _Project(project, region)
    findings = [asked.credentials()]
    if asked.session:
        findings += [asked.apis(), *asked.permissions(), asked.bucket(bucket), *asked.quotas()]
    else:
        findings.append(Finding("project", "note", "APIs, permissions, bucket and quota: asked when you are known"))
    return Preflight(project, region, (*findings, *_images(project, region), *_here()))


class _Project:
    """A project, asked through the credentials that google-auth finds."""

    def __init__(self, project: str, region: str):
        self.project, self.region = project, region
        self.session = None
        self.granted: set[str] = set()

    def credentials(self) -> Finding:
        import google.auth
        from google.auth import exceptions
        from google.auth.transport.requests import AuthorizedSession, Request

        try:
            found, _ = google.auth.default(scopes=[SCOPE], quota_project_id=self.project)
            found.refresh(Request())
        except exceptions.DefaultCredentialsError:
            return Finding("credentials", "missing", "google-auth finds none", LOGIN)
        except exceptions.GoogleAuthError as error:
            return Finding("credentials", "missing", f"those that are there are not accepted: {error}", LOGIN)
        account = getattr(found, "service_account_email", "")
        user = getattr(found, "account", "") or "$(gcloud config get account)"
        self.member = f"serviceAccount:{account}" if account else f"user:{user}"
        self.session = AuthorizedSession(found)
        return Finding("credentials", "ok", self.member)

    def _ask(self, verb: str, url: str, **options) -> dict:
        """Return the JSON that a service answers. Raises Refusal if it refuses."""
        from google.auth.exceptions import TransportError
        from requests import RequestException

        try:
            answer = self.session.request(verb, url, timeout=SECONDS, **options)
            content = answer.json()
        except (RequestException, TransportError, ValueError) as error:
            raise Refusal(f"no answer that can be read: {error}") from None
        if not answer.ok:
            raise Refusal(content["error"]["message"], answer.status_code)
        return content

    def _enable(self, *apis: str) -> str:
        return f"gcloud services enable {' '.join(apis)} --project={self.project}"

    def _grant(self, role: str) -> str:
        member = f'"{self.member}"' if "$" in self.member else self.member
        return f"gcloud projects add-iam-policy-binding {self.project} --member={member} --role={role}"

    def _unanswered(self, name: str, refusal: Refusal, api: str, role: str) -> Finding:
        """Return the finding for a service that has refused, with what makes it answer."""
        command = ""
        if "has not been used in project" in str(refusal):
            command = self._enable(api)
        elif "permission to use project" in str(refusal):
            command = self._grant(USES)
        elif refusal.status == 403:
            command = self._grant(role)
        return Finding(name, "missing", f"cannot be looked at: {refusal}", command)

    def apis(self) -> Finding:
        names = [("names", f"projects/{self.project}/services/{name}") for name in APIS]
        host = "serviceusage.googleapis.com"
        try:
            found = self._ask("GET", f"https://{host}/v1/projects/{self.project}/services:batchGet", params=names)
        except Refusal as refusal:
            return self._unanswered("APIs", refusal, host, USES)
        enabled = {
            service["name"].rpartition("/")[2] for service in found.get("services", ()) if service["state"] == "ENABLED"
        }
        if missing := [name for name in APIS if name not in enabled]:
            text = "; ".join(f"{name} is disabled, for {APIS[name]}" for name in missing)
            return Finding("APIs", "missing", text, self._enable(*missing))
        return Finding("APIs", "ok", ", ".join(name.removesuffix(".googleapis.com") for name in APIS))

    def permissions(self) -> list[Finding]:
        """Ask for those that the project gives; one that is given on a bucket or an account alone is not seen."""
        wanted = [permission for group in PERMISSIONS.values() for permission in group]
        host = "cloudresourcemanager.googleapis.com"
        url = f"https://{host}/v3/projects/{self.project}:testIamPermissions"
        try:
            self.granted = set(self._ask("POST", url, json={"permissions": wanted}).get("permissions", ()))
        except Refusal as refusal:
            return [self._unanswered("permissions", refusal, host, "roles/browser")]
        found = []
        for role, group in PERMISSIONS.items():
            if lacking := [permission for permission in group if permission not in self.granted]:
                found.append(Finding("permissions", "missing", ", ".join(lacking), self._grant(role)))
        return found or [Finding("permissions", "ok", f"all {len(wanted)} that the course needs")]

    def bucket(self, name: str) -> Finding:
        make = f"gcloud storage buckets create gs://{name} --project={self.project} --location={self.region}"
        host = "storage.googleapis.com"
        try:
            location = self._ask("GET", f"https://{host}/storage/v1/b/{name}")["location"].lower()
        except Refusal as refusal:
            if refusal.status != 404:
                return self._unanswered("bucket", refusal, host, "roles/storage.admin")
            if "storage.buckets.create" in self.granted:
                return Finding("bucket", "ok", f"gs://{name} is made by environment.connect, in {self.region}")
            return Finding("bucket", "missing", f"gs://{name} is not there, and you may not make it", make)
        if location != self.region:
            text = (
                f"gs://{name} is in {location}, and jobs in {self.region} need one in {self.region}. It "
                "can be deleted only when it is empty"
            )
            return Finding("bucket", "missing", text, f"gcloud storage buckets delete gs://{name} && {make}")
        return Finding("bucket", "ok", f"gs://{name} in {self.region}")

    def quotas(self) -> list[Finding]:
        found = []
        for purpose, metric in METRICS.items():
            machine = hardware.check(MACHINE, region=self.region, purpose=purpose)
            limit = self._limit(f"{VERTEX}/{metric}")
            name, needs = f"quota, {purpose}", f"one {MACHINE} needs {machine.vcpus}"
            if limit is None:
                day = tables.read("quotas")["date"]
                text = f"cannot be asked; a new project has {machine.quota:,} {machine.quota_of} (on {day}), {needs}"
                found.append(Finding(name, "note", text))
            elif limit == -1:
                found.append(Finding(name, "ok", "CPUs without a limit"))
            else:
                state = "ok" if limit >= machine.vcpus else "missing"
                command = "" if state == "ok" else self._more(f"{VERTEX}/{metric}", 2 * machine.vcpus)
                found.append(Finding(name, state, f"{limit:,} CPUs in {self.region}, and {needs}", command))
        gpus = self._limit(f"{VERTEX}/custom_model_training_nvidia_t4_gpus")
        if gpus == 0:
            text = f"no NVIDIA_TESLA_T4 for training in {self.region}; the course trains on CPUs, and needs none"
            found.append(Finding("quota, GPUs", "note", text))
        return found

    def _limit(self, metric: str) -> int | None:
        """Return the project's limit of a quota in the region, -1 for none, or None if it cannot be read."""
        base = f"https://serviceusage.googleapis.com/v1beta1/projects/{self.project}/services/{VERTEX}"
        try:
            found = self._ask("GET", f"{base}/consumerQuotaMetrics/{quote(metric, safe='')}")
        except Refusal:
            return None
        buckets = [bucket for limit in found.get("consumerQuotaLimits", ()) for bucket in limit.get("quotaBuckets", ())]
        limits = {bucket.get("dimensions", {}).get("region", ""): bucket.get("effectiveLimit") for bucket in buckets}
        limit = limits.get(self.region, limits.get(""))
        return None if limit is None else int(limit)

    def _more(self, metric: str, value: int) -> str:
        """Return the command that asks for more of a quota; its id is looked up by its metric."""
        about = f"--service={VERTEX} --project={self.project}"
        lookup = f"gcloud beta quotas info list {about} --filter=metric={metric} --format='value(quotaId)'"
        return (
            f'gcloud beta quotas preferences create {about} --quota-id="$({lookup})" --preferred-value={value} '
            f"--dimensions=region={self.region}"
        )


def _images(project: str, region: str) -> list[Finding]:
    """Look at the days of Google's newest TensorFlow images: one that is over is replaced by your own."""
    found = []
    for purpose in ("training", "prediction"):
        image = containers.prebuilt("tensorflow", purpose, region=region)
        warning = image.warning()
        command = ""
        if not image.is_available():
            folder = f"output/{purpose}"
            make, _, build = containers.build_commands(project, region, "course", purpose, "1", folder)
            command = f"{make}; {build}"
            warning += f" Its folder: containers.context({folder!r}, {purpose!r})."
        state = "note" if warning else "ok"
        name = image.uri.rpartition("/")[2]
        found.append(Finding(f"image, {purpose}", state, f"{name}: {warning or 'available'}", command))
    return found


def _here() -> list[Finding]:
    """Look at what this machine needs to send a job: setuptools, with which the SDK packages a script, and disk."""
    found = []
    # Asked of a new interpreter, as the SDK starts one.
    tried = subprocess.run([sys.executable, "-c", "import setuptools"], capture_output=True)
    if tried.returncode:
        text = "not here; without it: RuntimeError: Packaging of training script failed"
        install = shlex.join([sys.executable, "-m", "pip", "install", "setuptools"])
        found.append(Finding("setuptools", "missing", text, install))
    else:
        found.append(Finding("setuptools", "ok", "packages training scripts"))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    state, command = ("ok", "") if free >= DISK_GB else ("missing", "du -sh -- * | sort -h")
    found.append(Finding("disk", state, f"{free:,.1f} GB free, {DISK_GB} are needed", command))
    return found
