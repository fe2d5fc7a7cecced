"""ModelService: the registry, in which a model has versions, and a version aliases and a copy of its artifacts."""

import re
import shutil
from pathlib import Path

from google.cloud.aiplatform_v1 import types
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from grpc import StatusCode

from helpers.local import MANAGED_BUCKET, checks, errors
from helpers.local.service import Service, location_of, merge, page
from helpers.local.store import new_id

Model = types.Model.pb()
UploadModelResponse = types.UploadModelResponse.pb()
CopyModelResponse = types.CopyModelResponse.pb()
ExportModelResponse = types.ExportModelResponse.pb()

DEDICATED_RESOURCES = 1  # Model.DeploymentResourcesType
ALIAS = re.compile(r"[a-z][a-zA-Z0-9-]{0,126}[a-z0-9-]")
MODEL_ID = re.compile(r"[a-z0-9_][a-z0-9_-]{0,62}")
EXPORT_FORMAT = "custom-trained"


class ModelService(Service):
    """Models. The store holds MODEL with the number of its last version, and MODEL/versions/N for each version."""

    name = "ModelService"
    resources = {"Model": "models", "ModelEvaluation": "evaluations"}

    def list_model_evaluations(self, request: Message) -> Message:
        """Return the evaluations of a model."""
        found = self.store.list(request.parent.partition("@")[0], "evaluations")
        return page(found, request, types.ListModelEvaluationsResponse.pb())

    def restore(self) -> None:
        """Forget a model whose first version was never finished."""
        with self.store.transaction():
            for model in self.store.all("models"):
                if not self.store.list(model.name, "versions"):
                    self.store.delete(model.name)

    # Reading

    def version(self, name: str) -> Message:
        """Return a version of a model: MODEL@NUMBER, MODEL@ALIAS, or MODEL for its default version."""
        model, _, wanted = name.partition("@")
        versions = self.store.list(model, "versions")
        for version in versions:
            if wanted == version.version_id or (wanted or "default") in version.version_aliases:
                return version
        raise errors.not_found(name)

    def get_model(self, request: Message) -> Message:
        """Return a version."""
        return self.version(request.name)

    def list_models(self, request: Message) -> Message:
        """Return the default version of each model."""
        versions = self.store.list(f"{request.parent}/models/-", "versions")
        defaults = [version for version in versions if "default" in version.version_aliases]
        return page(defaults, request, types.ListModelsResponse.pb())

    def list_model_versions(self, request: Message) -> Message:
        """Return all versions of a model."""
        model = request.name.partition("@")[0]
        self.store.get(model)
        return page(self.store.list(model, "versions"), request, types.ListModelVersionsResponse.pb())

    # Writing

    def upload_model(self, request: Message) -> Message:
        """Register a model or a new version of one."""
        self.check_upload(request.model)

        def work():
            version = self.register(request.parent, request.model, request.model_id, request.parent_model)
            return UploadModelResponse(model=version.name, model_version_id=version.version_id)

        return self.cloud.operations.start(request.parent, work)

    def check_upload(self, model: Message) -> None:
        """Refuse a model that cannot be served, before its artifacts are there."""
        if not model.display_name:
            raise errors.invalid("List of found errors: 1.Field: model.display_name; Message: It is not set.")
        if model.container_spec.image_uri:
            checks.serving_image(model.container_spec)
        for alias in model.version_aliases:
            check_alias(alias)

    def register(self, location: str, model: Message, model_id: str = "", parent_model: str = "") -> Message:
        """Add a version with a copy of its artifacts, and return it."""
        self.check_upload(model)
        if model_id and not MODEL_ID.fullmatch(model_id):
            raise errors.invalid(f"Invalid model id {model_id!r}: expected up to 63 of a-z, 0-9, _ and -, not - first.")
        if parent_model:
            parent = parent_model.partition("@")[0]
            name = parent if "/" in parent else f"{location}/models/{parent}"
            self.store.get(name)
        else:
            name = f"{location}/models/{model_id or new_id()}"
            if self.store.find(name) is not None:
                raise errors.Refused(StatusCode.ALREADY_EXISTS, f"Model {name} already exists.")
        source = self._artifacts(model)
        version = Model()
        version.CopyFrom(model)
        version.name = name
        del version.version_aliases[:]
        for field in ("version_create_time", "version_update_time"):
            getattr(version, field).GetCurrentTime()
        self.stamp(version, created=True)
        version.supported_deployment_resources_types[:] = [DEDICATED_RESOURCES]
        version.supported_input_storage_formats[:] = ["jsonl", "csv"]
        version.supported_output_storage_formats[:] = ["jsonl", "csv"]
        with self.store.transaction():
            # The number is taken before the artifacts are copied, which may take long; it is never given twice.
            counter = self.store.find(name) or Model(name=name, version_id="0")
            counter.version_id = version.version_id = str(int(counter.version_id) + 1)
            self.store.put(name, counter)
        try:
            if source:
                contents = [types.Model.ExportFormat.ExportableContent.ARTIFACT]
                version.supported_export_formats.add(id=EXPORT_FORMAT, exportable_contents=contents)
                # Vertex AI serves a copy: what happens to the source later changes nothing.
                shutil.rmtree(self.artifacts_of(version), ignore_errors=True)
                shutil.copytree(source, self.artifacts_of(version))
            with self.store.transaction():
                aliases = [*model.version_aliases]
                if not self.store.list(name, "versions") and "default" not in aliases:
                    aliases.append("default")
                self._put(version)
                self._give(name, version.version_id, aliases)
        except BaseException:
            shutil.rmtree(self.artifacts_of(version), ignore_errors=True)
            self.restore()
            raise
        return self.version(f"{name}@{version.version_id}")

    def _artifacts(self, model: Message) -> Path | None:
        if not model.artifact_uri:
            return None
        source = self.cloud.path_of(model.artifact_uri)
        checks.files(source, model.artifact_uri)
        if model.container_spec.image_uri and (framework := checks.serving_image(model.container_spec)):
            checks.artifacts(framework, source, model.artifact_uri)
        return source

    def artifacts_of(self, version: Message) -> Path:
        """Return the folder with a version's copy of its artifacts, there or not."""
        location, model = version.name.split("/")[3], version.name.rsplit("/", 1)[1]
        return self.cloud.buckets / MANAGED_BUCKET / location / model / version.version_id

    def _put(self, version: Message) -> None:
        self.store.put(f"{version.name}/versions/{version.version_id}", version)

    def _give(self, model: str, number: str, aliases: list[str]) -> None:
        """Give aliases to one version and take them from the others."""
        for version in self.store.list(model, "versions"):
            kept = [alias for alias in version.version_aliases if alias not in aliases]
            version.version_aliases[:] = [*kept, *aliases] if version.version_id == number else kept
            self._put(version)

    def update_model(self, request: Message) -> Message:
        """Change what the mask names."""
        with self.store.transaction():
            version = self.version(request.model.name)
            merge(request.model, version, request.update_mask)
            self.stamp(version)
            version.version_update_time.GetCurrentTime()
            self._put(version)
        return version

    def merge_version_aliases(self, request: Message) -> Message:
        """Add aliases to a version, and take away those that begin with a minus."""
        with self.store.transaction():
            version = self.version(request.name)
            added = [alias for alias in request.version_aliases if not alias.startswith("-")]
            removed = [alias[1:] for alias in request.version_aliases if alias.startswith("-")]
            for alias in added:
                check_alias(alias)
            if "default" in removed:
                raise errors.invalid("The alias default cannot be removed: give it to another version.")
            version.version_aliases[:] = [alias for alias in version.version_aliases if alias not in removed]
            self._put(version)
            self._give(version.name, version.version_id, added)
        return self.version(f"{version.name}@{version.version_id}")

    def delete_model(self, request: Message) -> Message:
        """Delete a model with all its versions."""
        with self.store.transaction():
            self.store.get(request.name)
            versions = self.store.list(request.name, "versions")
            for version in versions:
                refuse_deployed(version)
            self.store.delete(request.name)
        for version in versions:
            shutil.rmtree(self.artifacts_of(version), ignore_errors=True)
        return Empty()

    def delete_model_version(self, request: Message) -> Message:
        """Delete a version that is not the default one."""
        with self.store.transaction():
            version = self.version(request.name)
            if "default" in version.version_aliases:
                raise errors.precondition(
                    f"The version {version.version_id} is the default version of {version.name}: give the alias "
                    "default to another version, or delete the model."
                )
            refuse_deployed(version)
            self.store.delete(f"{version.name}/versions/{version.version_id}")
        shutil.rmtree(self.artifacts_of(version), ignore_errors=True)
        return Empty()

    def copy_model(self, request: Message) -> Message:
        """Copy a version to another region or under another name."""

        def work():
            source = self.version(request.source_model)
            copy = Model()
            copy.CopyFrom(source)
            for field in ("deployed_models", "version_aliases"):
                copy.ClearField(field)
            made = self.register(request.parent, copy, request.model_id, request.parent_model)
            return CopyModelResponse(model=made.name, model_version_id=made.version_id)

        return self.cloud.operations.start(request.parent, work)

    def export_model(self, request: Message) -> Message:
        """Copy a version's artifacts to Cloud Storage."""
        version = self.version(request.name)
        artifacts = self.artifacts_of(version)
        if not artifacts.is_dir():
            raise errors.precondition(f"The model {version.name} has no artifacts to export.")
        prefix = request.output_config.artifact_destination.output_uri_prefix.rstrip("/")
        stamp = version.update_time.ToDatetime().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        uri = f"{prefix}/model-{version.name.rsplit('/', 1)[1]}/{EXPORT_FORMAT}/{stamp}"
        checks.bucket(uri, request.name.split("/")[3], self.cloud.bucket_location)

        def work():
            shutil.copytree(artifacts, self.cloud.path_of(uri), dirs_exist_ok=True)
            return ExportModelResponse()

        metadata = types.ExportModelOperationMetadata.pb()()
        metadata.output_info.artifact_output_uri = uri
        return self.cloud.operations.start(location_of(request.name), work, metadata)

    def import_model_evaluation(self, request: Message) -> Message:
        """Store an evaluation of a version."""
        evaluation = request.model_evaluation
        evaluation.name = f"{self.version(request.parent).name}/evaluations/{new_id()}"
        self.stamp(evaluation, created=True)
        self.store.put(evaluation.name, evaluation)
        return evaluation


def check_alias(alias: str) -> None:
    """Refuse an alias that Vertex AI refuses."""
    if not ALIAS.fullmatch(alias):
        raise errors.invalid(f"Invalid version alias {alias!r}: expected [a-z][a-zA-Z0-9-]{{0,126}}[a-z0-9-].")


def refuse_deployed(version: Message) -> None:
    """Refuse to delete what an endpoint serves."""
    if version.deployed_models:
        endpoints = ", ".join(reference.endpoint for reference in version.deployed_models)
        raise errors.precondition(
            f"The model {version.name} version {version.version_id} is deployed or being deployed at the following "
            f"Endpoint(s): {endpoints}. Undeploy it first."
        )
