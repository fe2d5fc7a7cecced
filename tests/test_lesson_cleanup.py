"""A lesson that stops halfway leaves nothing that is billed: lesson 8, while an endpoint serves and a job runs."""

import os
import signal
import time

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from rules import ROOT

from helpers import costs

LESSON = ROOT / "notebooks/08_deploy_and_predict.ipynb"
PATIENCE = 300  # seconds in which a cell ends, and in which all is gone


def kernel_of(last, then=""):
    """Return a client that runs the lesson up to a cell, given by its id, and one more."""
    notebook = nbformat.read(LESSON, 4)
    at = next(place for place, cell in enumerate(notebook.cells) if cell.id == last)
    notebook.cells = [*notebook.cells[: at + 1], nbformat.v4.new_code_cell(then)]
    return NotebookClient(
        notebook, kernel_name="python3", timeout=PATIENCE, resources={"metadata": {"path": LESSON.parent}}
    )


def left(cloud):
    """Return what is there: what is billed, the names of endpoints, models and jobs, and those of data sets."""
    from google.cloud import aiplatform, bigquery

    made = [*aiplatform.Endpoint.list(), *aiplatform.Model.list(), *aiplatform.BatchPredictionJob.list()]
    datasets = [dataset.dataset_id for dataset in bigquery.Client(project=cloud.project).list_datasets()]
    return costs.remaining(cloud.project, cloud.region, cloud.bucket), [item.display_name for item in made], datasets


def eventually_nothing(cloud):
    """Wait until nothing is left."""
    deadline = time.monotonic() + PATIENCE
    while any(there := left(cloud)):
        assert time.monotonic() < deadline, there
        time.sleep(0.5)


def test_a_kernel_that_is_killed_leaves_nothing(cloud):
    kernel = kernel_of("batch-start")
    with kernel.setup_kernel():
        for place, cell in enumerate(kernel.nb.cells):
            kernel.execute_cell(cell, place)
        billed, names, datasets = left(cloud)
        assert "endpoint" in {item.kind for item in billed.running}
        assert billed.objects
        assert (names, datasets) == (["lesson-08"] * 3, ["lesson_08"])
        os.kill(kernel.km.provisioner.pid, signal.SIGKILL)
        eventually_nothing(cloud)


def test_a_cell_that_fails_leaves_nothing_once_the_notebook_is_closed(cloud):
    with pytest.raises(CellExecutionError, match="halfway"):
        kernel_of("deploy-it", "raise RuntimeError('halfway')").execute()
    eventually_nothing(cloud)
