"""What the local cloud costs: its start, a prediction through it, its storage, and the whole way from nothing.

Each benchmark runs in a local cloud of its own, which is gone afterwards.
"""

import json
import statistics
import sys
import tempfile
import time

from helpers.course.bench import ROOT, Row, duration, run, verdict

TURNS = 200  # predictions of each kind, in turns
STORED_BYTES = 100_000_000


def bench_server():
    """Starting the local cloud, and the memory of its server while nothing happens."""
    from helpers.environment import fresh_local_cloud
    from helpers.local import client

    seconds = []
    with fresh_local_cloud() as place:
        for _ in range(5):
            started = time.perf_counter()
            address = client.wait(place, client.start(place))
            seconds.append(time.perf_counter() - started)
            memory = resident_bytes(address["pid"])
            client.stop(place)
    start = statistics.median(seconds)
    return [
        Row("start of the local cloud", duration(start), "-", "-", "<= 3 s", verdict(start <= 3)),
        Row("its memory, idle", f"{memory / 1e6:.0f} MB", "-", "-", "<= 250 MB", verdict(memory <= 250e6)),
    ]


def resident_bytes(pid):
    """Return the memory that a process holds."""
    return 1024 * int(run(["ps", "-o", "rss=", "-p", str(pid)]))


def bench_predict():
    """One prediction by the SDK's endpoint.predict, against the same body posted straight to the model's server."""
    code = """
import http.client, json, statistics, sys, time
from helpers import environment
cloud = environment.connect()
import keras, psutil
from google.cloud import aiplatform
network = keras.Sequential([keras.Input((26,), name="features"), *map(keras.layers.Dense, (64, 64, 1))])
network.export(cloud.bucket + "/bench/model", verbose=False)
model = aiplatform.Model.upload(display_name="bench", artifact_uri=cloud.bucket + "/bench/model",
    serving_container_image_uri="us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest")
endpoint = model.deploy(machine_type="n1-standard-4")
instance = [0.5] * 26
body = json.dumps({"instances": [instance]})
server = next(one for one in psutil.process_iter(["cmdline"]) if "helpers.local.model_server" in one.info["cmdline"])
variables = server.environ()
straight = http.client.HTTPConnection("127.0.0.1", int(variables["AIP_HTTP_PORT"]))
def by_sdk():
    return endpoint.predict(instances=[instance]).predictions[0]
def by_post():
    straight.request("POST", variables["AIP_PREDICT_ROUTE"], body, {"Content-Type": "application/json"})
    return json.loads(straight.getresponse().read())["predictions"][0]
assert abs(by_sdk()[0] - by_post()[0]) < 1e-6
times = {by_sdk: [], by_post: []}
for _ in range(int(sys.argv[1])):
    for call, seconds in times.items():
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
print(json.dumps([statistics.median(seconds) for seconds in times.values()]))
"""
    sdk, post = in_own_cloud(code, str(TURNS))
    met = sdk - post <= 0.003
    ratio = f"+{1000 * (sdk - post):.1f} ms"
    return [Row("endpoint.predict / a bare POST, p50", duration(sdk), duration(post), ratio, "<= +3 ms", verdict(met))]


def bench_storage():
    """An object up and down by google-cloud-storage, against copying the same file twice."""
    code = """
import json, pathlib, shutil, sys, time
from helpers import environment
cloud = environment.connect()
from google.cloud import storage
folder, size = pathlib.Path(sys.argv[1]), int(sys.argv[2])
(folder / "source").write_bytes(bytes(range(256)) * (size // 256))
blob = storage.Client().bucket(cloud.bucket.removeprefix("gs://")).blob("bench")
def by_client():
    blob.upload_from_filename(folder / "source")
    blob.download_to_filename(folder / "down")
def by_copy():
    shutil.copyfile(folder / "source", folder / "copy")
    shutil.copyfile(folder / "copy", folder / "down")
times = {by_client: [], by_copy: []}
for _ in range(3):
    for way, seconds in times.items():
        started = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - started)
print(json.dumps([min(seconds) for seconds in times.values()]))
"""
    with tempfile.TemporaryDirectory() as scratch:
        client, copy = in_own_cloud(code, scratch, str(STORED_BYTES))
    rate = 2 * STORED_BYTES / client / 1e6
    shown = f"{duration(client)} ({rate:.0f} MB/s)"
    return [Row("100 MB up and down / copied twice", shown, duration(copy), f"{client / copy:.1f}", "-", "-")]


def bench_journey():
    """Train, register, deploy and predict with TensorFlow from nothing: no server, no SDK imported."""
    code = """
import json, time
started = time.perf_counter()
from helpers import environment
cloud = environment.connect()
from google.cloud import aiplatform
connected = time.perf_counter()
import pathlib, sys
script = pathlib.Path(sys.argv[1]) / "task.py"
script.write_text('''
import os, time
started = time.time()
import keras
import numpy as np
print("imports", time.time() - started)
x = np.random.default_rng(0).normal(size=(512, 4)).astype("float32")
network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
network.compile("adam", "mse")
network.fit(x, x.sum(axis=1), epochs=3, verbose=0)
network.export(os.environ["AIP_MODEL_DIR"], verbose=False)
''')
job = aiplatform.CustomTrainingJob(display_name="bench", script_path=str(script),
    container_uri="us-docker.pkg.dev/vertex-ai/training/tf-cpu.2-17.py310:latest",
    model_serving_container_image_uri="us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest")
model = job.run(model_display_name="bench", machine_type="n1-standard-4")
trained = time.perf_counter()
endpoint = model.deploy(machine_type="n1-standard-4")
endpoint.predict(instances=[[0.0] * 4])
print(json.dumps([connected - started, trained - connected, time.perf_counter() - trained]))
"""
    with tempfile.TemporaryDirectory() as scratch:
        parts = in_own_cloud(code, scratch)
    total = sum(parts)
    steps = "connect and import the SDK {:.0f} s, train {:.0f} s, deploy and predict {:.0f} s".format(*parts)
    imports = float(run([sys.executable, "-c", IMPORTS]))
    shown = f"{total:.1f} s, of which importing TensorFlow once and the SDK once takes {imports:.1f} s ({steps})"
    return [Row("train, deploy, predict from nothing", shown, "-", "-", "<= 40 s", verdict(total <= 40))]


IMPORTS = """
import subprocess, sys, time
started = time.perf_counter()
for module in ("keras", "google.cloud.aiplatform"):
    subprocess.run([sys.executable, "-c", f"import helpers; import {module}"], check=True, capture_output=True)
print(time.perf_counter() - started)
"""


def in_own_cloud(code, *arguments):
    """Run Python with a fresh local cloud in a process of its own; return the JSON value that it prints last."""
    from helpers.environment import fresh_local_cloud

    with fresh_local_cloud():
        printed = run([sys.executable, "-c", code, *arguments], ROOT)
    return json.loads(printed.strip().splitlines()[-1])


BENCHMARKS = {
    "server": bench_server,
    "predict": bench_predict,
    "storage": bench_storage,
    "journey": bench_journey,
}
