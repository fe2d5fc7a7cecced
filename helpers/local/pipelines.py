"""PipelineService: training pipelines, which run a custom job or AutoML and then register the model that it saved."""

import dataclasses

from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from google.protobuf.message import Message

from helpers.local import automl, errors, runner
from helpers.local.background import BackgroundService, JobFailed
from helpers.local.service import location_of
from helpers.local.store import new_id

CustomJob, CustomJobSpec = types.CustomJob.pb(), types.CustomJobSpec.pb()
CUSTOM_TASK = "/custom_task_1.0.0.yaml"


class PipelineService(BackgroundService):
    """Training pipelines: what the SDK's Custom*TrainingJob classes and AutoMLTabularTrainingJob make."""

    name = "PipelineService"
    resources = {"TrainingPipeline": "trainingPipelines"}
    instead = {"CreatePipelineJob": "run the steps from a notebook, or use a project on Google Cloud"}

    states, prefix = types.PipelineState, "PIPELINE_STATE_"

    def create_training_pipeline(self, request: Message) -> Message:
        """Start a training pipeline."""
        pipeline = request.training_pipeline
        definition = pipeline.training_task_definition
        if pipeline.input_data_config.dataset_id:
            self.store.get(f"{location_of(request.parent)}/datasets/{pipeline.input_data_config.dataset_id}")
        if definition.endswith(automl.DEFINITION):
            settings = automl.read_inputs(pipeline.training_task_inputs)
            spec = automl.job_spec(settings, new_id())
            pipeline.model_to_upload.container_spec.CopyFrom(automl.serving_container())
        elif definition.endswith(CUSTOM_TASK):
            spec = CustomJobSpec()
            try:
                json_format.ParseDict(json_format.MessageToDict(pipeline.training_task_inputs), spec)
            except json_format.ParseError as error:
                raise errors.invalid(f"training_task_inputs is not a CustomJobSpec: {error}") from None
            runner.check(self.cloud, request.parent.split("/")[3], spec)
            # Google's service gives the inputs back in camelCase, whatever the client wrote, and the SDK reads those.
            json_format.ParseDict(json_format.MessageToDict(spec), pipeline.training_task_inputs)
        else:
            raise errors.unimplemented(f"The training task {definition.rsplit('/', 1)[-1]}")
        if pipeline.HasField("model_to_upload"):
            self.cloud.services["ModelService"].check_upload(pipeline.model_to_upload)
        created = self.create("TrainingPipeline", request)
        self.background.start(created, lambda control: self._run(created.name, spec, control))
        return self.store.get(created.name)

    def _run(self, name: str, spec: Message, control) -> None:
        pipeline = self.store.get(name)
        location = location_of(name)
        job = CustomJob(name=f"{location}/customJobs/{new_id()}", display_name=f"{pipeline.display_name}-custom-job")
        job.job_spec.CopyFrom(spec)
        job.labels.update(pipeline.labels)
        self.stamp(job, created=True)
        with self.store.change(name) as changed:
            json_format.ParseDict({"backingCustomJob": job.name}, changed.training_task_metadata)
        run = runner.Run(self.cloud, job.name.rsplit("/", 1)[1], location.split("/")[3], spec)
        if pipeline.input_data_config.dataset_id:
            datasets = self.cloud.services["DatasetService"]
            environment = datasets.environment_for(pipeline.input_data_config, location, run.base)
            run = dataclasses.replace(run, environment=environment)
        self.cloud.services["JobService"].background.run_inside(job, lambda: run.execute(control), control)
        if not control.cancelled.is_set() and pipeline.model_to_upload.container_spec.image_uri:
            self._register(name, run.base)

    def _register(self, name: str, base: str) -> None:
        """Register the model that the job saved, under the name that the pipeline asks for."""
        pipeline = self.store.get(name)
        model = pipeline.model_to_upload
        model.artifact_uri = model.artifact_uri or f"{base}/model"
        model.training_pipeline = name
        try:
            registered = self.cloud.services["ModelService"].register(
                location_of(name), model, pipeline.model_id, pipeline.parent_model
            )
        except errors.Refused as refusal:
            raise JobFailed(refusal.message, refusal.code.value[0]) from None
        with self.store.change(name) as changed:
            changed.model_to_upload.CopyFrom(registered)
        if pipeline.training_task_definition.endswith(automl.DEFINITION):
            evaluation = automl.evaluation(self.cloud.path_of(model.artifact_uri), pipeline.training_task_inputs)
            evaluation.name = f"{registered.name}/evaluations/{new_id()}"
            self.stamp(evaluation, created=True)
            self.store.put(evaluation.name, evaluation)

    cancel_training_pipeline = BackgroundService.cancel
