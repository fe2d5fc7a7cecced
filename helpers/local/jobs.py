"""JobService: custom jobs, and the door to tuning and batch prediction, which have modules of their own."""

from google.cloud.aiplatform_v1 import types
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from helpers.local import batch, runner, tuning
from helpers.local.background import Background
from helpers.local.service import Service, location_of

CustomJob = types.CustomJob.pb()


class JobService(Service):
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

    def __init__(self, cloud):
        """Serve a cloud."""
        super().__init__(cloud)
        self.background = Background(self.store, types.JobState, "JOB_STATE_")

    def restore(self) -> None:
        """Report what a killed server left running."""
        for collection in self.resources.values():
            self.background.interrupt(collection)
        tuning.interrupt(self.store)

    def is_busy(self) -> bool:
        """Say whether a job runs."""
        return bool(self.background.controls)

    def close(self) -> None:
        """Stop all jobs."""
        self.background.close()

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

    def get(self, kind: str, request: Message) -> Message:
        """Return a job, waiting a little for a client that polls."""
        self.check_name(kind, request.name)
        return self.background.read(request.name)

    def delete(self, kind: str, request: Message) -> Empty:
        """Delete a job that has ended."""
        self.check_name(kind, request.name)
        return self.background.delete(request.name)

    def cancel_custom_job(self, request: Message) -> Empty:
        """Cancel a job."""
        self.background.cancel(request.name)
        return Empty()

    cancel_hyperparameter_tuning_job = cancel_batch_prediction_job = cancel_custom_job
