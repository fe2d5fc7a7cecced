"""Serve what PyTorch exported: `python -m helpers.predictor.pytorch`, in all else the server of SavedModels.

A program for PyTorch (`model.pt2`) is run by the version that wrote it: no promise is made for others.
"""

import contextlib
import json
import os
import runpy
import tempfile
from pathlib import Path

import numpy as np

from helpers.predictor.instances import Instances
from helpers.predictor.server import SavedModel


class Program(SavedModel):
    """A program of `torch.export` that reads numbers, and texts by their places in the lists of the schema."""

    error = ()  # the schema refuses every row that the program would

    def load(self, artifacts_uri: str) -> None:
        """Load the program from a folder, gs:// or not, and let it predict once."""
        import torch
        from google.cloud.aiplatform.utils import prediction_utils

        source = artifacts_uri if artifacts_uri.startswith("gs://") else str(Path(artifacts_uri).absolute())
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            prediction_utils.download_model_artifacts(source)
            if not Path("model.pt2").exists():
                where = f"there is no model.pt2 in AIP_STORAGE_URI, which is {artifacts_uri!r}"
                raise FileNotFoundError(f"{where}: the artifact_uri of a model is a folder that task_torch wrote")
            self.model = torch.export.load("model.pt2").module()
            schema = json.loads(Path("assets.extra/instance_schema.json").read_text(encoding="utf-8"))
        known = {name: column.get("enum") for name, column in schema["properties"].items()}
        self.places = [{text: place for place, text in enumerate(texts)} for texts in known.values() if texts]
        inputs = {name: (np.dtype(object if texts else np.float32), (1,)) for name, texts in known.items()}
        instances = Instances(inputs, schema)
        self.preprocess = instances.read
        self.predict([self.preprocess(json.dumps({"instances": [instances.example]}))])

    def run(self, rows: list) -> list:
        """Call the program, and return a prediction for each row."""
        import torch

        numbers, texts = zip(*rows, strict=True)
        places = [[place[text] for place, text in zip(self.places, row, strict=True)] for row in texts]
        with torch.inference_mode():
            return self.model(torch.tensor(numbers, dtype=torch.float32), torch.tensor(places)).tolist()


if __name__ == "__main__":
    os.environ |= {"PREDICTOR_MODULE": "helpers.predictor.pytorch", "PREDICTOR_CLASS": "Program"}
    runpy.run_module("helpers.predictor", run_name="__main__")
