"""The training task in PyTorch. Collected where PyTorch is installed, as test_extras.py does it for everyone."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tasks import SMALL, finish, kill_after, learnt, run_here, start, start_two

from helpers import data, trainer
from helpers.predictor import pytorch
from helpers.predictor.instances import Refused
from helpers.trainer import task, task_jax, task_torch

MODULE = "helpers.trainer.task_torch"
IMAGE = "us-central1-docker.pkg.dev/local-project/course/torch:1"
WITHOUT_TENSORFLOW = "import runpy, sys; sys.modules['tensorflow'] = None; runpy.run_module('{}', run_name='__main__')"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_here(task_torch.main, folder), folder


def test_it_learns_what_jax_learns(undisturbed):
    expected = task_jax.main(SMALL)
    for name, values in undisturbed[0].items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5)


def test_killed_and_started_again_it_ends_with_the_same_model(undisturbed, tmp_path):
    kill_after(start(MODULE, f"--checkpoint_dir={tmp_path}"), epoch=5)
    lines = finish(start(MODULE, f"--checkpoint_dir={tmp_path}"))
    assert "epochs were done before" in lines[0]["message"]
    assert lines[1]["epoch"] >= 4
    files = tmp_path / "checkpoint.pt", undisturbed[1] / "checkpoint_dir/checkpoint.pt"
    ours, theirs = (torch.load(file, weights_only=True) for file in files)
    assert ours["history"] == theirs["history"]
    for part in ("network", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)


def test_two_workers_learn_what_one_learns(undisturbed, tmp_path):
    lines, silent = map(finish, start_two(MODULE, f"--model_dir={tmp_path}"))
    for name, values in learnt(lines).items():
        np.testing.assert_allclose(values, undisturbed[0][name], rtol=1e-5)
    assert silent == []  # the primary worker tells and exports for both
    assert (tmp_path / "model.pt2").exists()


def test_the_package_runs_where_there_is_no_tensorflow(undisturbed, tmp_path):
    packed = trainer.package(tmp_path)
    install = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", tmp_path / "installed"]
    subprocess.run([sys.executable, "-m", *install, packed], check=True, capture_output=True)
    folders = [f"--{name}={tmp_path / name}" for name in task.FOLDERS]
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW.format(MODULE), *SMALL, *folders]
    run = subprocess.run(command, cwd=tmp_path / "installed", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert learnt([json.loads(line) for line in run.stdout.splitlines()]) == undisturbed[0]
    assert all(list((tmp_path / name).iterdir()) for name in task.FOLDERS)


def test_it_runs_in_a_process_that_has_tensorflow():
    """As in a notebook of the course, where a library of PyTorch's must not end the kernel."""
    script = f"import tensorflow; from helpers.trainer import task_torch; task_torch.main({[*SMALL, '--epochs=1']})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_job_trains_it_and_an_endpoint_serves_it(cloud, undisturbed):
    from google.cloud import aiplatform

    pool = {
        "machine_spec": {"machine_type": "n1-standard-4"},
        "replica_count": 1,
        "container_spec": {"image_uri": IMAGE, "command": ["python", "-m", MODULE, *SMALL]},
    }
    aiplatform.CustomJob("torch", [pool], base_output_dir=f"{cloud.bucket}/torch").run()
    model = aiplatform.Model.upload(
        display_name="torch",
        artifact_uri=f"{cloud.bucket}/torch/model",
        serving_container_image_uri=IMAGE,
        serving_container_command=["python", "-m", "helpers.predictor.pytorch"],
    )
    endpoint = model.deploy(machine_type="n1-standard-2")
    rows = data.split("penguins", validation=True)[1]
    columns = data.describe("penguins")
    instances = json.loads(rows[[*columns.numeric, *columns.categorical]].to_json(orient="records"))
    predicted = np.array(endpoint.predict(instances).predictions)[:, 0]
    error = np.sqrt(np.mean((predicted - rows["body_mass_g"]) ** 2))
    endpoint.delete(force=True)
    assert error == pytest.approx(undisturbed[0]["val_rmse"][-1], rel=1e-5)


def test_the_server_refuses_what_the_model_does_not_know(undisturbed, tmp_path):
    server = pytorch.Program()
    server.load(str(undisturbed[1] / "model_dir"))
    example = json.loads((undisturbed[1] / "model_dir/assets.extra/instance_schema.json").read_text())["example"]
    with pytest.raises(Refused, match=r"instances\[0\]\.sex is \"NONE\": Input should be 'FEMALE' or 'MALE'"):
        server.preprocess(json.dumps({"instances": [example | {"sex": "NONE"}]}))
    with pytest.raises(FileNotFoundError, match=r"there is no model\.pt2 in AIP_STORAGE_URI"):
        pytorch.Program().load(str(tmp_path))


def test_what_is_wrong_is_refused(undisturbed):
    with pytest.raises(ValueError, match=r"is of a training with .*'units': 64.*this one has .*'units': 8"):
        task_torch.main([*SMALL, "--units", "8", f"--checkpoint_dir={undisturbed[1] / 'checkpoint_dir'}"])
    with pytest.raises(ValueError, match=r"there is no --activation rely in torch\.nn\.functional; expected relu"):
        task_torch.main([*SMALL, "--activation", "rely"])
