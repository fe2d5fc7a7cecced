"""A lesson runs to its end with other parameters than its own: what the learner is invited to try."""

import json
import os
import subprocess
import sys

import pytest
from rules import ROOT

from helpers.course import lessons
from helpers.environment import fresh_local_cloud

SETS = {
    "01_choose_how_to_build": [{"region": "europe-west4", "epochs": 6, "seed": 3}],
    "02_choose_where_to_run": [{"region": "europe-west4", "machine_type": "e2-standard-4", "epochs": 5}],
    "03_climb_the_tensorflow_stack": [{"seed": 7}],
    "04_create_compile_fit": [{"epochs": 5, "seed": 3}, {"dataset": "penguins", "epochs": 40}],
    "05_choose_activations_losses_optimizers": [{"epochs": 6, "seed": 2}],
    "06_choose_a_strategy": [{"region": "europe-west4", "epochs": 2, "seed": 3}],
    "07_train_on_vertex": [{"region": "europe-west4", "epochs": 3, "trials": 2, "seed": 2}],
    "08_deploy_and_predict": [{"region": "europe-west4", "epochs": 5, "seed": 2}],
    "09_train_with_jax": [{"region": "europe-west4", "epochs": 2, "seed": 2}],
}

# papermill changes the working folder of its process, so each run has a process of its own. It ignores a parameter
# that the lesson does not have, which is why names are tested apart.
RUN = """
import json, sys
import papermill

source, target, parameters = sys.argv[1:]
papermill.execute_notebook(source, target, json.loads(parameters), cwd="notebooks", progress_bar=False)
"""


@pytest.fixture(autouse=True, scope="module")
def other_cloud():
    """Let the lessons run here beside the same lessons elsewhere, which have the other local cloud to themselves."""
    before = os.environ.pop("LOCAL_CLOUD_FOLDER", None)
    with fresh_local_cloud():
        yield
    if before is not None:
        os.environ["LOCAL_CLOUD_FOLDER"] = before


def test_every_lesson_has_other_parameters():
    assert sorted(SETS) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert all(SETS.values())


@pytest.mark.parametrize("name", SETS)
def test_the_lesson_has_these_parameters_and_other_values(name):
    own = lessons.read(ROOT / f"notebooks/{name}.ipynb").parameters
    for parameters in SETS[name]:
        assert set(parameters) <= set(own)
        assert all(own[key] != value for key, value in parameters.items())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        pytest.param(name, parameters, id=f"{name}-" + ",".join(f"{key}={value}" for key, value in parameters.items()))
        for name, sets in SETS.items()
        for parameters in sets
    ],
)
def test_lesson_runs_to_its_end(name, parameters, tmp_path):
    target = tmp_path / f"{name}.ipynb"
    command = [sys.executable, "-c", RUN, f"notebooks/{name}.ipynb", target, json.dumps(parameters)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    notebook = json.loads(target.read_text(encoding="utf-8"))
    unrun = [cell["id"] for cell in notebook["cells"] if cell["cell_type"] == "code" and not cell["execution_count"]]
    assert unrun == []
