"""The training task: the same model in a notebook, in a process, in a package, after a kill and by several workers."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from tasks import SMALL, finish, kill_after, learnt, run_here, start, start_two

from helpers import data, regression, trainer
from helpers.trainer import loop, task


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_here(task.main, folder).history, folder


def checkpoint(folder):
    """Return all that a checkpoint holds, by name."""
    with np.load(folder / "checkpoint.npz") as saved:
        return {name: saved[name] for name in saved.files}


def test_it_learns_and_returns_its_history(undisturbed):
    history, _ = undisturbed
    assert set(history) == {"rmse", "val_rmse"}
    assert len(history["rmse"]) == len(history["val_rmse"]) == 12
    train, validation, _ = data.split("penguins", validation=True)
    mean_error = regression.rmse(train["body_mass_g"].mean(), validation, validation["body_mass_g"].to_numpy())
    assert history["val_rmse"][-1] < 0.5 * mean_error


def test_the_model_reads_raw_rows_and_tells_what_they_look_like(undisturbed):
    import tensorflow as tf

    history, folder = undisturbed
    train, validation, _ = data.split("penguins", validation=True)
    model = tf.saved_model.load(str(folder / "model_dir"))
    raw = data.Features("penguins", train).raw(validation)
    predicted = model.signatures["serving_default"](**raw)["output_0"].numpy()[:, 0]
    error = np.sqrt(np.mean((predicted - validation["body_mass_g"]) ** 2))
    assert error == pytest.approx(history["val_rmse"][-1], rel=1e-5)
    schema = json.loads((folder / "model_dir/assets.extra/instance_schema.json").read_text())
    assert set(schema["required"]) == set(raw) == set(schema["example"])
    assert schema["properties"]["sex"] == {"type": "string", "enum": ["FEMALE", "MALE"]}


def test_tensorboard_gets_a_point_for_each_epoch(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history, folder = undisturbed
    events = EventAccumulator(str(folder / "log_dir"), size_guidance={"tensors": 0}).Reload()
    found = {(event.step, tag) for tag in ("rmse", "val_rmse") for event in events.Tensors(tag)}
    assert found == {(step, tag) for step in range(1, 13) for tag in history}


def test_killed_and_started_again_it_ends_with_the_same_model(undisturbed, tmp_path):
    """The first run is of the package that a job installs, the second of the course."""
    packed = trainer.package(tmp_path)
    install = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", tmp_path / "installed"]
    subprocess.run([sys.executable, "-m", *install, packed], check=True, capture_output=True)
    arguments = ["--checkpoint_dir", str(tmp_path / "checkpoints"), "--model_dir", str(tmp_path / "model")]
    kill_after(start(trainer.MODULE, *arguments, path=tmp_path / "installed"), epoch=5)
    lines = finish(start(trainer.MODULE, *arguments))
    assert "epochs were done before" in lines[0]["message"]
    assert lines[1]["epoch"] >= 4
    _, folder = undisturbed
    ours, theirs = checkpoint(tmp_path / "checkpoints"), checkpoint(folder / "checkpoint_dir")
    assert json.loads(str(ours["about"]))["history"] == json.loads(str(theirs["about"]))["history"]
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"about"}:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert (tmp_path / "model/saved_model.pb").exists()


def test_a_task_that_plays_a_preemption_does_so_once(undisturbed, tmp_path):
    arguments = [f"--checkpoint_dir={tmp_path}", "--preempt_at_epoch=3"]
    killed = start(trainer.MODULE, *arguments)
    killed.communicate(timeout=180)
    assert killed.returncode == -signal.SIGKILL
    expected = json.loads(str(checkpoint(undisturbed[1] / "checkpoint_dir")["about"]))["history"]
    assert loop.history(str(tmp_path)) == expected[:2]
    finish(start(trainer.MODULE, *arguments))
    assert loop.history(str(tmp_path)) == expected


def test_two_workers_learn_what_one_learns(undisturbed, tmp_path):
    arguments = [f"--{name}={tmp_path / name}" for name in ("model_dir", "checkpoint_dir")]
    lines, silent = map(finish, start_two(trainer.MODULE, *arguments))
    for name, values in learnt(lines).items():
        np.testing.assert_allclose(values, undisturbed[0][name], rtol=1e-6)
    assert silent == []  # the primary worker writes for both
    assert (tmp_path / "model_dir/saved_model.pb").exists()


def test_a_checkpoint_of_another_training_is_refused(undisturbed):
    _, folder = undisturbed
    with pytest.raises(ValueError, match=r"is of a training with .*'units': 64.*this one has .*'units': 8"):
        task.main([*SMALL, "--units", "8", f"--checkpoint_dir={folder / 'checkpoint_dir'}"])


def test_more_epochs_go_on_from_a_finished_training(undisturbed, tmp_path):
    _, folder = undisturbed
    (tmp_path / "checkpoint.npz").write_bytes((folder / "checkpoint_dir/checkpoint.npz").read_bytes())
    more = task.main([*SMALL, "--epochs", "13", f"--checkpoint_dir={tmp_path}"]).history
    assert more["rmse"][:12] == undisturbed[0]["rmse"]
    assert len(more["rmse"]) == 13


def test_a_trial_reports_its_metric(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLOUD_ML_TRIAL_ID", "3")
    monkeypatch.setenv("CLOUD_ML_HP_METRIC_FILE", str(tmp_path / "metrics"))
    history = task.main(["--dataset", "penguins", "--epochs", "2.0", "--units", "8.0", "--learning_rate", "0.01"])
    found = [json.loads(line) for line in (tmp_path / "metrics").read_text().splitlines()]
    assert [(line["trial"], line["global_step"], float(line["val_rmse"])) for line in found] == [
        ("3", str(number + 1), value) for number, value in enumerate(history.history["val_rmse"])
    ]
    logged = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["severity"] for line in logged] == ["INFO", "INFO", "WARNING"]  # it has no place for the model
    assert logged[1]["val_rmse"] == history.history["val_rmse"][1]


def test_rows_can_come_from_csv_files(undisturbed, tmp_path, monkeypatch):
    rows = data.load("penguins")
    for number, part in enumerate((rows[:200], rows[200:])):
        part.to_csv(tmp_path / f"rows-{number}.csv", index=False)
    one = [*SMALL, "--epochs", "1"]
    first = {name: values[:1] for name, values in undisturbed[0].items()}
    assert task.main([*one, "--data", f"{tmp_path}/rows-*.csv"]).history == first
    train, validation, _ = data.split("penguins", validation=True)
    train.to_csv(tmp_path / "training-0.csv", index=False)
    validation.to_csv(tmp_path / "validation-0.csv", index=False)
    monkeypatch.setenv("AIP_TRAINING_DATA_URI", f"{tmp_path}/training-*")
    monkeypatch.setenv("AIP_VALIDATION_DATA_URI", f"{tmp_path}/validation-*")
    assert task.main(one).history == first
    monkeypatch.setenv("AIP_VALIDATION_DATA_URI", f"{tmp_path}/nothing-*")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing-\*"):
        task.main(one)


def test_a_training_that_explodes_saves_no_model(tmp_path):
    with pytest.raises(FloatingPointError, match=r"epoch 1 ends with .*nan.* try a smaller --learning_rate"):
        task.main([*SMALL, "--learning_rate", "1e30", f"--model_dir={tmp_path}", f"--checkpoint_dir={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "arguments", "words"),
    [
        ({}, ["--epochs", "2.5"], "argument --epochs: 2.5 is not a whole number above zero"),
        ({}, ["--units", "0"], "argument --units: 0 is not a whole number above zero"),
        ({}, ["--dataset", "flights"], "argument --dataset: invalid choice: 'flights'"),
        ({"CLOUD_ML_JOB_ID": "1"}, [], "no place for the model: a job with a base_output_dir gets one"),
        ({"CLOUD_ML_JOB_ID": "1"}, ["--model_dir", "model"], "--model_dir model is on the job's own disk"),
        (
            {"CLUSTER_SPEC": "{}", "AIP_MODEL_DIR": "gs://bucket/model/"},
            ["--checkpoint_dir", "/tmp/checkpoints"],
            "--checkpoint_dir /tmp/checkpoints is on the job's own disk",
        ),
        ({"AIP_TRAINING_DATA_URI": "bq://project.dataset.table"}, [], "bq://project.dataset.table is a table"),
    ],
)
def test_wrong_arguments_end_the_task_before_it_begins(monkeypatch, capsys, environment, arguments, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        task.parse(arguments)
    assert words in capsys.readouterr().err


def test_vertex_says_where_things_go(monkeypatch):
    for _, (variable, _) in task.FOLDERS.items():
        monkeypatch.setenv(variable, f"gs://bucket/{variable}/")
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "1")
    asked = task.parse(["--log_dir", "/gcs/bucket/logs"])
    assert asked.model_dir == "gs://bucket/AIP_MODEL_DIR/"
    assert asked.checkpoint_dir == "gs://bucket/AIP_CHECKPOINT_DIR/"
    assert asked.log_dir == "/gcs/bucket/logs"


def test_without_tensorflow_buckets_are_folders(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setenv("AIP_MODEL_DIR", "gs://bucket/model/")
    asked = task.parse(["--data", "gs://bucket/rows-*.csv", "--log_dir", "/tmp/gs://"])
    assert (asked.model_dir, asked.data, asked.log_dir) == (
        "/gcs/bucket/model/",
        "/gcs/bucket/rows-*.csv",
        "/tmp/gs://",
    )


def config(kind, index, **cluster):
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}, "job": '{"a": 1}'})


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("TF_CONFIG", "", ([], 0)),
        ("TF_CONFIG", "{}", ([], 0)),
        ("TF_CONFIG", config("chief", 0, chief=["a:1"], worker=["b:1", "c:1"]), (["a:1", "b:1", "c:1"], 0)),
        ("TF_CONFIG", config("worker", "1", master=["a:1"], worker=["b:1", "c:1"]), (["a:1", "b:1", "c:1"], 2)),
        ("TF_CONFIG", config("worker", 1, worker=["b:1", "c:1"], ps=["d:1"]), (["b:1", "c:1"], 1)),
        ("CLUSTER_SPEC", config("workerpool0", 0, workerpool0=["a:1"]), (["a:1"], 0)),
        (
            "CLUSTER_SPEC",
            config("workerpool1", 1, workerpool0=["a:1"], workerpool1=["b:1", "c:1"], workerpool2=["d:1"]),
            (["a:1", "b:1", "c:1"], 2),
        ),
    ],
)
def test_a_worker_knows_its_place(variable, value, expected):
    assert loop.workers({variable: value}) == expected


def test_a_replica_that_is_no_worker_is_refused():
    with pytest.raises(ValueError, match="TF_CONFIG calls this replica ps 0; this task knows chief, master, worker"):
        loop.workers({"TF_CONFIG": config("ps", 0, chief=["a:1"], ps=["b:1"])})
