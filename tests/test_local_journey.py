"""The whole way, by a script that knows only Google's public documentation: no account, no network."""

import os
import re
import subprocess
import sys
from pathlib import Path

from helpers.local import client

STEPS = (
    "trained and registered",
    "tuned: 3 trials",
    "tracked",
    "deployed",
    "predicted",
    "batch-predicted 2",
    "cleaned up",
)


def test_a_script_trains_tunes_registers_deploys_predicts_tracks_and_cleans_up(tmp_path):
    outside = client.original() | {"LOCAL_CLOUD_FOLDER": str(tmp_path / "cloud"), "PIP_INDEX_URL": "http://127.0.0.1:9"}
    script = Path(__file__).with_name("journey.py")
    try:
        done = subprocess.run([sys.executable, str(script), str(tmp_path)], env=outside, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        steps = re.findall(r"^ *[\d.]+ s  (.*)$", done.stdout, re.MULTILINE)
        for step in STEPS:
            assert any(said.startswith(step) for said in steps), (step, steps)
    finally:
        client.reset(tmp_path / "cloud")


def test_one_line_decides_about_the_cloud():
    text = Path(__file__).with_name("journey.py").read_text()
    assert len(re.findall(r"^ *cloud = environment\.connect\(", text, re.MULTILINE)) == 1
    assert "helpers.local" not in text
    assert os.fspath(Path.home()) not in text
