"""TensorboardService: the points of time series, in a table, and the blobs that a log holds, in a bucket."""

import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from google.cloud.aiplatform_v1 import types
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from helpers.local import errors, filters
from helpers.local.service import Service, page, snake

SCHEMA = "CREATE TABLE IF NOT EXISTS points (series TEXT, step INTEGER, point BLOB, PRIMARY KEY (series, step))"
UNIQUE = ("TensorboardRun", "TensorboardTimeSeries")  # whose display names occur once below a parent

Blob, Point, Series, TimeSeriesData = (
    kind.pb()
    for kind in (types.TensorboardBlob, types.TimeSeriesDataPoint, types.TensorboardTimeSeries, types.TimeSeriesData)
)


class TensorboardService(Service):
    """What training logs, point by point."""

    name = "TensorboardService"
    resources = {
        "Tensorboard": "tensorboards",
        "TensorboardExperiment": "experiments",
        "TensorboardRun": "runs",
        "TensorboardTimeSeries": "timeSeries",
    }

    def __init__(self, cloud):
        """Serve a cloud."""
        super().__init__(cloud)
        self.store.sql(SCHEMA)

    # Resources

    def create(self, kind: str, request: Message) -> Message:
        """Make a resource below one that is there."""
        if kind == "Tensorboard":
            return super().create(kind, request)
        field = f"{snake(kind)}_id"
        if not re.fullmatch(r"([a-z0-9-]{1,128})?", getattr(request, field)):
            raise errors.invalid(f"List of found errors:\t1.Field: {field}; Message: Valid characters are [a-z][0-9]-.")
        with self.store.transaction():
            self.store.get(request.parent)
            return super().create(kind, request)

    def created(self, resource: Message) -> None:
        """Give a Tensorboard its bucket; refuse a second name among siblings, in the words that the SDK looks for."""
        kind = resource.DESCRIPTOR.name
        if kind == "Tensorboard":
            resource.blob_storage_path_prefix = f"cloud-ai-platform-{uuid.uuid4()}"
            (self.cloud.buckets / resource.blob_storage_path_prefix).mkdir()
            self._only_default(resource)
        elif kind in UNIQUE:
            parent, collection, _ = resource.name.rsplit("/", 2)
            if any(other.display_name == resource.display_name for other in self.store.list(parent, collection)):
                raise errors.invalid(f"{kind} with display name {resource.display_name!r} already exists in {parent}.")

    def update(self, kind: str, request: Message) -> Message:
        """Change a resource; there is one default Tensorboard."""
        with self.store.transaction():
            resource = super().update(kind, request)
            if kind == "Tensorboard":
                self._only_default(resource)
        return self._counted(resource)

    def _only_default(self, tensorboard: Message) -> None:
        for other in self.store.list(tensorboard.name.rsplit("/", 2)[0], "tensorboards"):
            if tensorboard.is_default and other.is_default and other.name != tensorboard.name:
                other.is_default = False
                self.store.put(other.name, other)

    def get(self, kind: str, request: Message) -> Message:
        """Return a resource."""
        return self._counted(super().get(kind, request))

    def list(self, collection: str, response: type[Message], request: Message) -> Message:
        """Return a page of a collection."""
        found = [self._counted(resource) for resource in self.store.list(request.parent, collection)]
        return page(found, request, response)

    def _counted(self, resource: Message) -> Message:
        """Return a resource, a Tensorboard with the number of its runs."""
        if resource.DESCRIPTOR.name == "Tensorboard":
            below = (resource.name + "/", resource.name + "0")
            ((resource.run_count,),) = self.store.sql(
                "SELECT COUNT(*) FROM resources WHERE collection = 'runs' AND name > ? AND name < ?", *below
            )
        return resource

    def delete(self, kind: str, request: Message) -> Empty:
        """Delete a resource and all below it: resources, points and blobs."""
        with self.store.transaction():
            folder = self._blobs(request.name)
            super().delete(kind, request)
            below = (request.name, request.name + "/", request.name + "0")
            self.store.sql("DELETE FROM points WHERE series = ? OR (series > ? AND series < ?)", *below)
        shutil.rmtree(folder, ignore_errors=True)
        return Empty()

    def batch_create_tensorboard_runs(self, request: Message) -> Message:
        """Make several runs, or none."""
        return self._create_all("TensorboardRun", request, types.BatchCreateTensorboardRunsResponse.pb())

    def batch_create_tensorboard_time_series(self, request: Message) -> Message:
        """Make several time series, or none."""
        return self._create_all("TensorboardTimeSeries", request, types.BatchCreateTensorboardTimeSeriesResponse.pb())

    def _create_all(self, kind: str, request: Message, response: type[Message]) -> Message:
        with self.store.transaction():
            for part in request.requests:
                part.parent = part.parent or request.parent
                if not f"{part.parent}/".startswith(f"{request.parent}/"):
                    raise errors.invalid(f"{part.parent} is not part of {request.parent}, the parent of the batch.")
            return response(
                **{response.DESCRIPTOR.fields[0].name: [self.create(kind, part) for part in request.requests]}
            )

    # Points

    def write_tensorboard_run_data(self, request: Message) -> Message:
        """Write points of a run's time series; a step that is written again replaces the point that was there."""
        with self.store.transaction():
            self._write(request)
        return types.WriteTensorboardRunDataResponse.pb()()

    def write_tensorboard_experiment_data(self, request: Message) -> Message:
        """Write points of several runs, or none."""
        with self.store.transaction():
            for part in request.write_run_data_requests:
                self._write(part)
        return types.WriteTensorboardExperimentDataResponse.pb()()

    def _write(self, request: Message) -> None:
        for data in request.time_series_data:
            series = self.store.get(f"{request.tensorboard_run}/timeSeries/{data.tensorboard_time_series_id}")
            if data.value_type != series.value_type:
                kinds = [Series.ValueType.Name(value) for value in (series.value_type, data.value_type)]
                raise errors.invalid("The time series {} holds values of type {}, not {}.".format(series.name, *kinds))
            for point in data.values:
                row = (series.name, point.step, point.SerializeToString())
                self.store.sql("INSERT OR REPLACE INTO points VALUES (?, ?, ?)", *row)
                _extend(series.metadata, point)
            self.store.put(series.name, series)

    def _points(self, name: str) -> Sequence[Message]:
        """Return the points of a time series in the order of their steps."""
        rows = self.store.sql("SELECT point FROM points WHERE series = ? ORDER BY step", name)
        return [Point.FromString(data) for (data,) in rows]

    def _data(self, name: str, points: Iterable[Message]) -> Message:
        series = self.store.get(name)
        return TimeSeriesData(
            tensorboard_time_series_id=name.rsplit("/", 1)[1], value_type=series.value_type, values=points
        )

    def read_tensorboard_time_series_data(self, request: Message) -> Message:
        """Return the points of a time series, as many as asked for: evenly chosen, with the first and the last."""
        name = request.tensorboard_time_series
        points = filters.select(self._points(name), request.filter)
        most = request.max_data_points
        if 0 < most < len(points):
            points = [points[round(place * (len(points) - 1) / max(most - 1, 1))] for place in range(most)]
        response = types.ReadTensorboardTimeSeriesDataResponse.pb()
        return response(time_series_data=self._data(name, points))

    def batch_read_tensorboard_time_series_data(self, request: Message) -> Message:
        """Return all points of several time series."""
        data = [self._data(name, self._points(name)) for name in request.time_series]
        return types.BatchReadTensorboardTimeSeriesDataResponse.pb()(time_series_data=data)

    def export_tensorboard_time_series_data(self, request: Message) -> Message:
        """Return a page of the points of a time series, in the order of their steps unless another is asked for."""
        self.store.get(request.tensorboard_time_series)
        points = self._points(request.tensorboard_time_series)
        return page(points, request, types.ExportTensorboardTimeSeriesDataResponse.pb())

    # Blobs

    def read_tensorboard_blob_data(self, request: Message) -> Iterator[Message]:
        """Return the blobs of a time series, one after the other."""
        self.store.get(request.time_series)
        folder = self._blobs(request.time_series)
        files = [folder / blob_id for blob_id in request.blob_ids]
        for blob_id, file in zip(request.blob_ids, files, strict=True):
            if "\0" in blob_id or file.resolve().parent != folder or not file.is_file():
                raise errors.not_found(f"{request.time_series}, blob {blob_id!r},")
        answer = types.ReadTensorboardBlobDataResponse.pb()
        return (answer(blobs=[Blob(id=file.name, data=file.read_bytes())]) for file in files)

    def _blobs(self, name: str) -> Path:
        """Return the folder of the blobs below a resource, where the SDK uploads them to."""
        tensorboard = self.store.get("/".join(name.split("/")[:6]))
        bucket = (self.cloud.buckets / tensorboard.blob_storage_path_prefix).resolve()
        ids = name.split("/")[7::2]
        folder = bucket.joinpath(f"tensorboard-{name.split('/')[5]}", *ids).resolve() if ids else bucket
        if not folder.is_relative_to(bucket):
            raise errors.invalid(f"{name} is not the name of a resource.")
        return folder

    # What it costs

    def read_tensorboard_usage(self, request: Message) -> Message:
        """Return who looked at a Tensorboard: nobody, since views are not counted here."""
        self.store.get(request.tensorboard)
        return types.ReadTensorboardUsageResponse.pb()()

    def read_tensorboard_size(self, request: Message) -> Message:
        """Return how many bytes the points and blobs of a Tensorboard take."""
        folder = self._blobs(request.tensorboard)
        below = (request.tensorboard + "/", request.tensorboard + "0")
        ((points,),) = self.store.sql("SELECT TOTAL(LENGTH(point)) FROM points WHERE series > ? AND series < ?", *below)
        size = int(points) + sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return types.ReadTensorboardSizeResponse.pb()(storage_size_byte=size)


def _extend(metadata: Message, point: Message) -> None:
    """Let what is known of a time series cover one more point."""
    metadata.max_step = max(metadata.max_step, point.step)
    metadata.max_blob_sequence_length = max(metadata.max_blob_sequence_length, len(point.blobs.values))
    if point.wall_time.ToNanoseconds() > metadata.max_wall_time.ToNanoseconds():
        metadata.max_wall_time.CopyFrom(point.wall_time)
