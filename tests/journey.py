"""The whole way from a training script to a clean project, by what Google's public documentation says and nothing else.

`environment.connect()` is the local cloud; `environment.connect(project="...")`, one changed line, is Google's.
It prints a line after each step, with the seconds since the start.
"""

import json
import sys
import time
from pathlib import Path

from helpers import environment

started = time.time()


def done(step):
    """Say that a step is done."""
    print(f"{time.time() - started:6.1f} s  {step}", flush=True)


def main(folder):
    """Go all the way; `folder` gets the training script."""
    cloud = environment.connect()

    from google.cloud import aiplatform, storage
    from google.cloud.aiplatform import hyperparameter_tuning as tuning

    done(f"connected to {cloud.where}, SDK imported")
    bucket = storage.Client(project=cloud.project).bucket(cloud.bucket.removeprefix("gs://"))
    serving = "us-docker.pkg.dev/vertex-ai/prediction/sklearn-cpu.1-6:latest"
    training = "us-docker.pkg.dev/vertex-ai/training/sklearn-cpu.1-6:latest"
    script = Path(folder) / "task.py"
    script.write_text(TRAINING_SCRIPT)

    job = aiplatform.CustomTrainingJob(
        display_name="journey",
        script_path=str(script),
        container_uri=training,
        requirements=["cloudml-hypertune"],
        model_serving_container_image_uri=serving,
    )
    model = job.run(model_display_name="journey", args=["--alpha", "0.1"], machine_type="n1-standard-4", sync=True)
    done("trained and registered")

    custom_job = aiplatform.CustomJob.from_local_script(
        display_name="journey-trial",
        script_path=str(script),
        container_uri=training,
        requirements=["cloudml-hypertune"],
        machine_type="n1-standard-4",
    )
    search = aiplatform.HyperparameterTuningJob(
        display_name="journey-search",
        custom_job=custom_job,
        metric_spec={"rmse": "minimize"},
        parameter_spec={"alpha": tuning.DoubleParameterSpec(min=1e-3, max=10, scale="log")},
        max_trial_count=3,
        parallel_trial_count=2,
    )
    search.run()
    best = min(search.trials, key=lambda trial: trial.final_measurement.metrics[0].value)
    done(f"tuned: {len(search.trials)} trials, the best with alpha {best.parameters[0].value:.3g}")

    aiplatform.init(experiment="journey")
    with aiplatform.start_run("run-1"):
        aiplatform.log_params({"alpha": 0.1})
        aiplatform.log_metrics({"rmse": best.final_measurement.metrics[0].value})
    frame = aiplatform.get_experiment_df("journey")
    done(f"tracked: {sorted(frame.columns)}")

    second = aiplatform.Model.upload(
        display_name="journey",
        parent_model=model.resource_name,
        artifact_uri=model.uri,
        serving_container_image_uri=serving,
        is_default_version=False,
        version_aliases=["candidate"],
    )
    endpoint = model.deploy(machine_type="n1-standard-4", min_replica_count=1, max_replica_count=1)
    second.deploy(endpoint=endpoint, machine_type="n1-standard-4", traffic_percentage=10)
    done(f"deployed, traffic {sorted(endpoint.traffic_split.values())}")
    instances = [[0.0, 1.0], [2.0, 3.0]]
    online = endpoint.predict(instances=instances)
    done(f"predicted {[round(value, 1) for value in online.predictions]}")

    bucket.blob("journey/instances.jsonl").upload_from_string("\n".join(map(json.dumps, instances)))
    batch = model.batch_predict(
        job_display_name="journey",
        gcs_source=f"{cloud.bucket}/journey/instances.jsonl",
        gcs_destination_prefix=f"{cloud.bucket}/journey/predictions",
        machine_type="n1-standard-4",
    )
    lines = [
        json.loads(line)
        for blob in batch.iter_outputs()
        if "results" in blob.name
        for line in blob.download_as_text().splitlines()
    ]
    assert [line["prediction"] for line in lines] == online.predictions
    done(f"batch-predicted {batch.completion_stats.successful_count}")

    endpoint.delete(force=True)
    model.delete()
    aiplatform.Experiment("journey").delete()
    for made in (job, search, batch):
        made.delete()
    bucket.delete_blobs(list(bucket.list_blobs()))
    bucket.delete()
    left = [*aiplatform.Endpoint.list(), *aiplatform.Model.list(), *aiplatform.CustomTrainingJob.list()]
    assert not left, left
    done("cleaned up")


TRAINING_SCRIPT = """
import argparse, os
import hypertune, joblib
import numpy as np
from sklearn.linear_model import Ridge

parser = argparse.ArgumentParser()
parser.add_argument("--alpha", type=float, default=1.0)
alpha = parser.parse_args().alpha
x = np.random.default_rng(0).normal(size=(200, 2))
y = x @ [3.0, -2.0] + 1
model = Ridge(alpha).fit(x[:150], y[:150])
rmse = float(np.sqrt(np.mean((model.predict(x[150:]) - y[150:]) ** 2)))
hypertune.HyperTune().report_hyperparameter_tuning_metric("rmse", rmse)
folder = os.environ["AIP_MODEL_DIR"].replace("gs://", "/gcs/", 1)
os.makedirs(folder, exist_ok=True)
joblib.dump(model, os.path.join(folder, "model.joblib"))
print("rmse", rmse)
"""

if __name__ == "__main__":
    main(sys.argv[1])
