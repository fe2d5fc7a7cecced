"""JobService: custom jobs, and the door to tuning and batch prediction, which have modules of their own."""

from google.cloud.aiplatform_v1 import types
from google.protobuf.message import Message

from helpers.local import batch, runner, tuning
from helpers.local.background import BackgroundService
from helpers.local.service import location_of


class JobService(BackgroundService):
    """Jobs that are not part of a training pipeline."""

    name = "JobService"
    resources = {
        "CustomJob": "customJobs",
        "HyperparameterTuningJob": "hyperparameterTuningJobs",
        "BatchPredictionJob": "batchPredictionJobs",
    }
    instead = {
        "CreateDataLabelingJob": "label the data yourself, and create a dataset from it",
        "CreateNasJob": "search with a HyperparameterTuningJob",
        "CreateModelDeploymentMonitoringJob": "compare logged requests with the training data in a notebook",
    }

    states, prefix = types.JobState, "JOB_STATE_"

    def restore(self) -> None:
        """Report what a killed server left running, and the trials of its tuning jobs."""
        super().restore()
        tuning.interrupt(self.store)

    def create_custom_job(self, request: Message) -> Message:
        """Start a custom job."""
        runner.check(self.cloud, request.parent.split("/")[3], request.custom_job.job_spec)
        return self._begin("CustomJob", request, self._run_custom_job)

    def create_hyperparameter_tuning_job(self, request: Message) -> Message:
        """Start a tuning job."""
        job = request.hyperparameter_tuning_job
        tuning.check(job)
        runner.check(self.cloud, request.parent.split("/")[3], job.trial_job_spec, "trial_job_spec")
        return self._begin("HyperparameterTuningJob", request, tuning.run)

    def create_batch_prediction_job(self, request: Message) -> Message:
        """Start a batch prediction."""
        batch.check(self.cloud, location_of(request.parent), request.batch_prediction_job)
        return self._begin("BatchPredictionJob", request, batch.run)

    def _begin(self, kind: str, request: Message, run) -> Message:
        job = self.create(kind, request)
        self.background.start(job, lambda control: run(self.cloud, job.name, control))
        return self.store.get(job.name)

    @staticmethod
    def _run_custom_job(cloud, name: str, control) -> None:
        job = cloud.store.get(name)
        runner.Run(cloud, name.rsplit("/", 1)[1], name.split("/")[3], job.job_spec).execute(control)

    cancel_custom_job = cancel_hyperparameter_tuning_job = cancel_batch_prediction_job = BackgroundService.cancel
