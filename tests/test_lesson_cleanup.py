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
    """Return what is there of the lesson: what is billed by the hour, resources, data sets and objects."""
    from google.cloud import aiplatform, bigquery, storage

    made = [*aiplatform.Endpoint.list(), *aiplatform.Model.list(), *aiplatform.BatchPredictionJob.list()]
    datasets = [dataset.dataset_id for dataset in bigquery.Client(project=cloud.project).list_datasets()]
    return (
        {item.kind for item in costs.running(cloud.project, cloud.region) if item.name == "lesson-08"},
        sorted(type(item).__name__ for item in made if item.display_name == "lesson-08"),
        [name for name in datasets if name == "lesson_08"],
        list(storage.Client().list_blobs(cloud.bucket.removeprefix("gs://"), prefix="lesson-08/")),
    )


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
        billed, made, datasets, objects = left(cloud)
        assert "endpoint" in billed
        assert (made, datasets) == (["BatchPredictionJob", "Endpoint", "Model"], ["lesson_08"])
        assert objects
        os.kill(kernel.km.provisioner.pid, signal.SIGKILL)
        eventually_nothing(cloud)


def test_a_cell_that_fails_leaves_nothing_once_the_notebook_is_closed(cloud):
    with pytest.raises(CellExecutionError, match="halfway"):
        kernel_of("deploy-it", "raise RuntimeError('halfway')").execute()
    eventually_nothing(cloud)
