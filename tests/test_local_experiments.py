"""Experiments, lineage and TensorBoard of the local cloud, through the SDK as anybody uses it."""

import re

import numpy as np
import pytest
from google.api_core import exceptions
from google.cloud import aiplatform
from google.cloud.aiplatform import gapic
from google.cloud.aiplatform.metadata import context as contexts
from google.cloud.aiplatform.metadata.metadata import _experiment_tracker
from google.cloud.aiplatform.tensorboard import tensorboard_resource

POINT_TYPES = tensorboard_resource.gca_tensorboard_time_series.TensorboardTimeSeries.ValueType


@pytest.fixture
def experiment(cloud, request):
    """A new experiment named after the test, which `aiplatform.start_run` and the log functions use."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")
    # Whoever calls `init` without a project is answered over REST from then on.
    aiplatform.init(project=cloud.project, experiment=name, api_transport=getattr(request, "param", "grpc"))
    yield aiplatform.Experiment(name)
    _experiment_tracker.reset()
    aiplatform.init(project=cloud.project, api_transport="grpc")


@pytest.fixture
def metadata(cloud):
    """The client of the MetadataService, for what the SDK's classes have no method for."""
    return contexts.Context._instantiate_client()


@pytest.fixture
def tensorboard(cloud, request):
    return aiplatform.Tensorboard.create(display_name=request.node.name)


def store_of(cloud):
    return f"projects/{cloud.project}/locations/{cloud.region}/metadataStores/default"


def artifact(name, **fields):
    return aiplatform.Artifact.create(schema_title="system.Artifact", display_name=name, **fields)


# Experiments


@pytest.mark.parametrize("experiment", ["grpc", "rest"], indirect=True)
def test_experiment_remembers_what_its_runs_logged(experiment):
    for rate, losses in ((0.1, [3.0, 1.0]), (0.01, [4.0, 2.0])):
        with aiplatform.start_run(f"rate-{rate}".replace(".", "-")):
            aiplatform.log_params({"rate": rate, "optimizer": "adam"})
            for step, loss in enumerate(losses, 1):
                aiplatform.log_time_series_metrics({"loss": loss}, step=step)
            aiplatform.log_metrics({"rmse": losses[-1]})
    table = aiplatform.get_experiment_df(experiment.name).set_index("run_name").sort_index()
    assert list(table.index) == ["rate-0-01", "rate-0-1"]
    assert set(table["state"]) == {"COMPLETE"}
    assert list(table["param.rate"]) == [0.01, 0.1]
    assert set(table["param.optimizer"]) == {"adam"}
    assert list(table["metric.rmse"]) == [2.0, 1.0]
    assert list(table["time_series_metric.loss"]) == [2.0, 1.0]
    run = aiplatform.ExperimentRun("rate-0-1", experiment)
    assert run.get_params() == {"rate": 0.1, "optimizer": "adam"}
    assert run.get_metrics() == {"rmse": 1.0}
    assert list(run.get_time_series_data_frame()["loss"]) == [3.0, 1.0]


def test_run_that_fails_says_so_and_can_be_resumed(experiment):
    with pytest.raises(ZeroDivisionError), aiplatform.start_run("fragile"):
        aiplatform.log_params({"tries": 1})
        1 / 0  # noqa: B018
    assert aiplatform.ExperimentRun("fragile", experiment).state == gapic.Execution.State.FAILED
    with aiplatform.start_run("fragile", resume=True):
        aiplatform.log_params({"tries": 2})
    assert aiplatform.ExperimentRun("fragile", experiment).get_params() == {"tries": 2}
    assert aiplatform.ExperimentRun("fragile", experiment).state == gapic.Execution.State.COMPLETE


def test_two_who_log_to_one_run_lose_nothing(experiment):
    """A job and a notebook hold the same run; what one wrote after the other read it stays."""
    aiplatform.start_run("shared")
    job, notebook = (aiplatform.ExperimentRun("shared", experiment) for _ in range(2))
    job.log_params({"rate": 0.1})
    notebook.log_params({"epochs": 5})
    job.log_metrics({"rmse": 1.5})
    aiplatform.end_run()
    run = aiplatform.ExperimentRun("shared", experiment)
    assert (run.get_params(), run.get_metrics()) == ({"rate": 0.1, "epochs": 5}, {"rmse": 1.5})
    assert run.state == gapic.Execution.State.COMPLETE


def test_classification_metrics_come_back(experiment):
    curve = {"fpr": [0.1, 0.9], "tpr": [0.5, 1.0], "threshold": [0.9, 0.1]}
    with aiplatform.start_run("classes") as run:
        aiplatform.log_classification_metrics(labels=["a", "b"], matrix=[[9, 1], [2, 8]], display_name="two", **curve)
        (found,) = run.get_classification_metrics()
    assert found.items() >= {"display_name": "two", "labels": ["a", "b"], "matrix": [[9, 1], [2, 8]], **curve}.items()


def test_logged_model_predicts_as_before(cloud, experiment):
    from sklearn.linear_model import LinearRegression

    x = np.arange(6.0).reshape(-1, 1)
    model = LinearRegression().fit(x, 2 * x.ravel() + 1)
    with aiplatform.start_run("fitted") as run:
        aiplatform.log_model(model, display_name="line", uri=f"{cloud.bucket}/experiments/line")
        (logged,) = run.get_experiment_models()
    assert logged.display_name == "line"
    np.testing.assert_allclose(logged.load_model().predict([[10.0]]), [21.0])


def test_deleted_experiment_leaves_nothing(experiment, metadata, cloud):
    with aiplatform.start_run("gone") as run:
        aiplatform.log_time_series_metrics({"loss": 1.0}, step=1)
    series = run._backing_tensorboard_run.resource
    experiment.delete(delete_backing_tensorboard_runs=True)
    assert aiplatform.Experiment.get(experiment.name) is None
    assert not contexts.Context.list(filter=f'display_name="gone" AND name:"{experiment.name}"')
    with pytest.raises(exceptions.NotFound):
        aiplatform.TensorboardRun(series.resource_name)


# Contexts


def test_an_update_keeps_what_it_does_not_name(experiment, metadata):
    """Without a mask the SDK sends the run as it was before it became a child: it stays a child."""
    run = aiplatform.start_run("child")._metadata_node
    before = metadata.get_context(name=run.resource_name)
    assert list(before.parent_contexts) == [experiment.resource_name]
    changed = {"name": run.resource_name, "description": "new", "metadata": {"lost": 1}, "parent_contexts": []}
    after = metadata.update_context(context=changed, update_mask={"paths": ["description", "parent_contexts", "name"]})
    assert (after.description, after.display_name) == ("new", "child")
    assert after.metadata == before.metadata
    assert list(after.parent_contexts) == [experiment.resource_name]
    assert after.create_time == before.create_time
    assert after.update_time > before.update_time
    without_mask = metadata.update_context(context={"name": run.resource_name, "labels": {"a": "b"}})
    assert list(without_mask.parent_contexts) == [experiment.resource_name]
    assert without_mask.description == "new"
    assert metadata.get_context(name=run.resource_name) == without_mask


def test_an_old_etag_is_refused_in_the_words_that_the_sdk_reads(experiment, metadata):
    stale = metadata.get_context(name=experiment.resource_name)
    metadata.update_context(context={"name": experiment.resource_name, "description": "first"})
    stale.description = "second"
    with pytest.raises(exceptions.Aborted, match=contexts._ETAG_ERROR_REGEX):
        metadata.update_context(context=stale)
    assert metadata.get_context(name=experiment.resource_name).description == "first"


def test_update_makes_what_is_missing_only_if_asked(cloud, metadata):
    context = {"name": f"{store_of(cloud)}/contexts/made-by-update", "schema_title": "system.Experiment"}
    with pytest.raises(exceptions.NotFound, match="made-by-update"):
        metadata.update_context(context=context)
    request = {"context": context, "allow_missing": True}
    assert metadata.update_context(request=request).schema_title == "system.Experiment"
    for wrong in ("artifacts/another", "contexts/With_Capitals", ""):
        with pytest.raises((exceptions.NotFound, exceptions.InvalidArgument)):
            metadata.update_context(request={**request, "context": {"name": f"{store_of(cloud)}/{wrong}"}})
    with pytest.raises(exceptions.NotFound):
        metadata.update_context(request={**request, "context": {"name": ""}})


def test_names_that_vertex_ai_refuses_are_refused(cloud, tensorboard):
    for name in ("Climb", "climb_1", "-climb", "../climb", "a" * 129):
        with pytest.raises(exceptions.InvalidArgument, match=r"must match the regular expression '\[a-z0-9\]"):
            aiplatform.Experiment.create(name)
        with pytest.raises(exceptions.InvalidArgument, match="tensorboard_experiment_id; Message: Valid characters"):
            aiplatform.TensorboardExperiment.create(f"{name}/..", tensorboard.resource_name)


def test_contexts_form_a_tree_without_cycles(cloud, metadata):
    names = ["tree-a", "tree-b", "tree-c"]
    a, b, c = (contexts.Context.create("system.Experiment", resource_id=name) for name in names)
    a.add_context_children([b])
    a.add_context_children([b])
    b.add_context_children([c])
    for child, parent in ((a, c), (a, a)):
        with pytest.raises(exceptions.InvalidArgument, match="above itself"):
            parent.add_context_children([child])

    def selected(expression):
        return [found.name for found in contexts.Context.list(filter=expression)]

    assert selected(f'parent_contexts:"{a.resource_name}"') == ["tree-b"]
    assert selected(f'child_contexts:"{c.resource_name}"') == ["tree-b"]
    metadata.remove_context_children(context=a.resource_name, child_contexts=[b.resource_name, c.resource_name])
    assert selected(f'parent_contexts:"{a.resource_name}"') == []
    b.delete()
    c.sync_resource()
    assert list(c.parent_contexts) == []


# Lineage


def test_lineage_is_followed_from_data_to_model(experiment):
    with aiplatform.start_run("trained") as run:
        with aiplatform.start_execution(schema_title="system.ContainerExecution", display_name="prepare") as prepare:
            raw, rows = artifact("raw", uri="gs://data/raw.csv"), artifact("rows")
            prepare.assign_input_artifacts([raw])
            prepare.assign_output_artifacts([rows])
        with aiplatform.start_execution(schema_title="system.ContainerExecution", display_name="train") as train:
            model = artifact("model")
            train.assign_input_artifacts([rows])
            train.assign_output_artifacts([model])
    assert prepare.state == gapic.Execution.State.COMPLETE
    (found,) = train.get_input_artifacts()
    assert (found.name, train.get_output_artifacts()[0].name) == (rows.name, model.name)
    assert {one.display_name for one in run.get_executions()} == {"prepare", "train"}
    assert {raw.name, rows.name, model.name} <= {one.name for one in run.get_artifacts()}
    graph = run._metadata_node.query_lineage_subgraph()
    assert len(graph.events) == 4
    assert aiplatform.Artifact.get_with_uri("gs://data/raw.csv").name == raw.name

    def around(**limits):
        request = {"artifact": raw.resource_name, **limits}
        graph = raw.api_client.query_artifact_lineage_subgraph(request=request)
        return [one.display_name for one in (*graph.artifacts, *graph.executions)], len(graph.events)

    assert around() == (["raw", "rows", "model", "prepare", "train"], 4)
    assert around(max_hops=2) == (["raw", "rows", "prepare"], 2)
    assert around(max_hops=1) == (["raw", "prepare"], 1)
    assert around(filter='display_name!="rows"') == (["raw", "model", "prepare", "train"], 2)
    rows.delete()
    assert around() == (["raw", "prepare"], 1)
    assert train.get_input_artifacts() == []


def test_artifacts_are_found_by_what_they_hold(cloud):
    with_metadata = artifact("findable", metadata={"rmse": 2.5, "of:run": "one"}, uri="gs://findable/here")
    artifact("findable", metadata={"rmse": 30})
    context = contexts.Context.create("system.Experiment", resource_id="findable-context")
    context.add_artifacts_and_executions([with_metadata.resource_name])

    def found(expression):
        return len(aiplatform.Artifact.list(filter=f'display_name="findable" AND {expression}'))

    assert found("metadata.rmse.number_value < 10") == 1
    assert found('metadata."of:run".string_value = "one"') == 1
    assert found('uri="gs://findable/here"') == 1
    assert found(f'in_context("{context.resource_name}")') == 1
    by_id = context.resource_name.replace(context.resource_name.split("/")[1], cloud.project)
    assert found(f'in_context("{by_id}")') == 1
    newest, oldest = aiplatform.Artifact.list(filter='display_name="findable"', order_by="create_time desc")
    assert newest.create_time > oldest.create_time


def test_what_names_something_that_is_not_there_is_refused(cloud, metadata):
    context = contexts.Context.create("system.Experiment", resource_id="lonely")
    missing = f"{store_of(cloud)}/artifacts/missing"
    with pytest.raises(exceptions.NotFound, match="artifacts/missing"):
        context.add_artifacts_and_executions([missing])
    with pytest.raises(exceptions.NotFound, match="metadataStores/nowhere"):
        metadata.create_context(parent=store_of(cloud).replace("default", "nowhere"), context={})
    assert context.get_artifacts() == []


def test_purge_deletes_only_with_force(cloud, metadata):
    for _ in range(3):
        artifact("to-purge")
    request = {"parent": store_of(cloud), "filter": 'display_name="to-purge"'}
    response = metadata.purge_artifacts(request=request).result()
    assert (response.purge_count, len(response.purge_sample)) == (3, 3)
    assert metadata.purge_artifacts(request={**request, "force": True}).result().purge_count == 3
    assert aiplatform.Artifact.list(filter='display_name="to-purge"') == []
    with pytest.raises(exceptions.InvalidArgument, match="filter"):
        metadata.purge_artifacts(request={"parent": store_of(cloud), "force": True})


# TensorBoard


@pytest.fixture
def run(tensorboard):
    experiment = aiplatform.TensorboardExperiment.create("climb", tensorboard.resource_name)
    return aiplatform.TensorboardRun.create("first", experiment.resource_name)


def test_a_step_that_is_written_again_is_replaced(run):
    run.create_tensorboard_time_series("loss")
    for step, loss in ((2, 0.5), (1, 0.7), (2, 0.4)):
        run.write_tensorboard_scalar_data({"loss": loss}, step=step)
    points = run.read_time_series_data()["loss"].values
    assert [(point.step, point.scalar.value) for point in points] == [(1, 0.7), (2, 0.4)]
    (series,) = aiplatform.TensorboardTimeSeries.list(run.resource_name)
    assert series.gca_resource.metadata.max_step == 2
    assert series.gca_resource.metadata.max_wall_time >= points[0].wall_time


def test_points_are_read_in_part_and_in_pages(run):
    series = run.create_tensorboard_time_series("loss").resource_name
    for step in range(10):
        run.write_tensorboard_scalar_data({"loss": step / 10}, step=step)
    client = run.api_client
    some = client.read_tensorboard_time_series_data(request={"tensorboard_time_series": series, "max_data_points": 4})
    assert [point.step for point in some.time_series_data.values] == [0, 3, 6, 9]
    late = client.read_tensorboard_time_series_data(request={"tensorboard_time_series": series, "filter": "step > 7"})
    assert [point.step for point in late.time_series_data.values] == [8, 9]
    pages = client.export_tensorboard_time_series_data(
        request={"tensorboard_time_series": series, "page_size": 4, "order_by": "step desc"}
    )
    assert [point.step for point in pages] == list(range(9, -1, -1))


def test_names_of_series_and_runs_are_unique(run):
    run.create_tensorboard_time_series("loss")
    with pytest.raises(exceptions.InvalidArgument, match="already exist"):
        run.create_tensorboard_time_series("loss")
    experiment = run.resource_name.rsplit("/", 2)[0]
    with pytest.raises(exceptions.AlreadyExists):
        aiplatform.TensorboardRun.create("first", experiment, display_name="another")
    requests = [
        {"parent": experiment, "tensorboard_run": {"display_name": name}, "tensorboard_run_id": name}
        for name in ("second", "first")
    ]
    with pytest.raises(exceptions.AlreadyExists):
        run.api_client.batch_create_tensorboard_runs(parent=experiment, requests=requests)
    assert [one.display_name for one in aiplatform.TensorboardRun.list(experiment)] == ["first"]


def test_values_of_another_type_are_refused(run):
    series = run.create_tensorboard_time_series("weights", value_type="TENSOR")
    data = {"tensorboard_time_series_id": series.name, "value_type": "SCALAR", "values": [{"step": 1, "scalar": {}}]}
    with pytest.raises(exceptions.InvalidArgument, match="TENSOR, not SCALAR"):
        run.api_client.write_tensorboard_run_data(tensorboard_run=run.resource_name, time_series_data=[data])
    assert not run.read_time_series_data()["weights"].values


def test_one_tensorboard_is_the_default(cloud):
    first = aiplatform.Tensorboard.create(display_name="first", is_default=True)
    second = aiplatform.Tensorboard.create(display_name="second", is_default=True)
    assert [one.name for one in aiplatform.Tensorboard.list(filter="is_default=true")] == [second.name]
    first.update(is_default=True)
    assert [one.name for one in aiplatform.Tensorboard.list(filter="is_default=true")] == [first.name]


@pytest.mark.filterwarnings(
    "ignore:html5lib's sanitizer is deprecated:DeprecationWarning"
)  # TensorBoard's import of it
def test_log_directory_is_uploaded_with_pictures_and_graph(cloud, tensorboard, tmp_path):
    import tensorflow as tf

    picture = np.zeros((1, 4, 4, 3))
    with tf.summary.create_file_writer(str(tmp_path)).as_default():
        for step in range(3):
            tf.summary.scalar("loss", 1 / (step + 1), step=step)
        tf.summary.histogram("weights", [1.0, 2.0], step=0)
        tf.summary.image("picture", picture, step=0)
        tf.summary.graph(tf.function(lambda x: x + 1).get_concrete_function(tf.TensorSpec([])).graph)
    aiplatform.upload_tb_log("uploaded-log", str(tmp_path), tensorboard_id=tensorboard.name)
    _experiment_tracker.reset()
    (run,) = aiplatform.TensorboardRun.list(f"{tensorboard.resource_name}/experiments/uploaded-log")
    data = run.read_time_series_data()
    assert [point.scalar.value for point in data["loss"].values] == pytest.approx([1, 1 / 2, 1 / 3])
    assert data["weights"].values[0].tensor.value
    assert {name for name, series in data.items() if series.value_type == POINT_TYPES.BLOB_SEQUENCE} == {
        "picture",
        "__run_graph__",
    }
    series = f"{run.resource_name}/timeSeries/{data['picture'].tensorboard_time_series_id}"
    ids = [blob.id for blob in data["picture"].values[0].blobs.values]
    request = {"time_series": series, "blob_ids": ids}
    blobs = [blob for part in run.api_client.read_tensorboard_blob_data(request=request) for blob in part.blobs]
    assert [blob.id for blob in blobs] == ids
    assert blobs[-1].data.startswith(b"\x89PNG")
    table = aiplatform.get_experiment_df("uploaded-log")
    assert list(table["state"]) == ["COMPLETE"]
    for wrong in ("../" * 30 + "etc/passwd", "..", "", "missing"):
        with pytest.raises(exceptions.NotFound):
            list(run.api_client.read_tensorboard_blob_data(request={"time_series": series, "blob_ids": [wrong]}))


def test_deleted_tensorboard_takes_all_below_it_along(run, tensorboard):
    run.create_tensorboard_time_series("loss")
    run.write_tensorboard_scalar_data({"loss": 1.0}, step=1)
    assert run.api_client.read_tensorboard_size(tensorboard=tensorboard.resource_name).storage_size_byte > 0
    assert aiplatform.Tensorboard(tensorboard.name).gca_resource.run_count == 1
    tensorboard.delete()
    with pytest.raises(exceptions.NotFound):
        aiplatform.TensorboardRun(run.resource_name)
