"""`fit` with Keras' own signature, at the speed of the machine: whole epochs run on the device.

    fit.fit(model, x, y, batch_size=32, epochs=10)             # a compiled Keras model, TensorFlow or JAX backend
    fit.fit(model, dataset, epochs=10)                         # a tf.data.Dataset of batches, of any length
    fit.order(rows=100, epoch=0, seed=0)                       # the order in which an epoch takes the rows

Keras' own `fit` comes back to Python after each update; for a small network that costs more than the update. Here a
compiled loop makes all updates of an epoch, by the model's own `train_step`: the same mathematics, the same metrics,
the same callbacks. What a loop on the device cannot do (a callback that hears of each batch, say) goes to Keras' own
`fit`, with a warning that says why.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np

# Bytes of rows that one call of the loop takes. A stream of any length then needs the same memory; with four times as
# much a call, malloc no longer gives all of it back.
BLOCK = 2**22
# TensorFlow: XLA compiles for about a second, and then saves about a tenth of a millisecond an update.
XLA_PAYS = 5_000
BATCH = 32  # Keras' own, where none is given


def order(rows: int, epoch: int, seed: int = 0) -> np.ndarray:
    """Return the order in which an epoch (from 0) takes its rows, int32 of shape (rows,): the same in every framework.

    It depends on the seed and the epoch's number alone, so that a training that resumes goes on as it would have.
    """
    return np.random.default_rng([seed, epoch]).permutation(rows).astype(np.int32)


def fit(
    model,
    x=None,
    y=None,
    batch_size=None,
    epochs=1,
    verbose="auto",
    callbacks=None,
    validation_split=0.0,
    validation_data=None,
    shuffle=True,
    class_weight=None,
    sample_weight=None,
    initial_epoch=0,
    steps_per_epoch=None,
    validation_steps=None,
    validation_batch_size=None,
    validation_freq=1,
    seed=0,
):
    """Train a compiled Keras model; return its History. The arguments are those of Keras' `fit`, and `seed`.

    `x` and `y` (and `sample_weight`) are arrays of one length, or structures of such; or `x` is a tf.data.Dataset of
    batches of one size, which streams. With `shuffle`, an epoch takes the rows of arrays in the `order` for its number
    and `seed`. (Keras' own `fit`, where it has to do the work, shuffles as it does.)

    The devices of a tf.distribute strategy, or of Keras' distribution (JAX), share each batch; a last batch that is
    smaller is computed by each of them, so that no row counts more than another. Several workers are given the same
    rows, all of them. Raises ValueError for arrays of different lengths, and for a batch that cannot be shared.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("model", "seed")}
    import keras

    if not model.compiled:
        raise ValueError("compile the model first: fit needs its loss and its optimizer")
    reason = _unfit(model, arguments)
    if reason:
        warnings.warn(f"Keras' own fit trains this model: {reason}.", stacklevel=2)
        return model.fit(**arguments)

    batch_size = batch_size or BATCH
    rows, validation = _rows((x, y, sample_weight), batch_size), None
    if validation_split and validation_data is None:
        rows, validation = rows.split(validation_split, validation_batch_size or batch_size)
    if validation_data is not None:
        validation = _rows(validation_data, validation_batch_size or batch_size)
    _build(model, rows)
    compiled = model.jit_compile or (rows.steps or XLA_PAYS) * epochs >= XLA_PAYS
    train = _loop(model, "train", rows.batch_size, compiled)
    test = validation and _loop(model, "test", validation.batch_size, compiled)

    callbacks = keras.callbacks.CallbackList(
        callbacks,
        add_history=True,
        add_progbar=verbose != 0,
        verbose=verbose,
        epochs=epochs,
        steps=rows.steps,
        model=model,
    )
    model.stop_training = False
    callbacks.on_train_begin()
    logs = {}
    for epoch in range(getattr(model, "_initial_epoch", None) or initial_epoch, epochs):  # set by BackupAndRestore
        callbacks.on_epoch_begin(epoch)
        model.reset_metrics()
        done = 0
        for block in rows.blocks(train.put, epoch if shuffle else None, seed):
            callbacks.on_train_batch_begin(done)
            logs = train(*block)
            done += math.ceil(block[2] / rows.batch_size)
            callbacks.on_train_batch_end(done - 1, logs)
        if validation and _due(epoch, validation_freq):
            callbacks.on_test_begin()
            model.reset_metrics()
            for block in validation.blocks(test.put):
                found = test(*block)
            callbacks.on_test_end(found)
            logs = logs | {f"val_{name}": value for name, value in found.items()}
        callbacks.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    model.optimizer.finalize_variable_values(model.trainable_variables)
    callbacks.on_train_end(logs)
    return model.history


def _due(epoch: int, frequency) -> bool:
    """Return whether an epoch is validated: every so many, or those whose numbers (from 1) are listed."""
    return (epoch + 1) % frequency == 0 if isinstance(frequency, int) else epoch + 1 in frequency


# What the loop cannot do


def _unfit(model, arguments: dict) -> str | None:
    """Return why the loop on the device does not fit, or None if it does."""
    import keras

    backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax"):
        return f"the backend is {backend}, and the loop is written for TensorFlow and JAX"
    if model.run_eagerly:
        return "it is compiled with run_eagerly"
    for step in ("train_step", "test_step"):
        if getattr(type(model), step) is not getattr(keras.Model, step):
            return f"its class has a {step} of its own"
    if backend == "tensorflow":
        import tensorflow as tf

        # Neither has replicas that take each update together.
        apart = tf.distribute.experimental.ParameterServerStrategy, tf.distribute.experimental.CentralStorageStrategy
        if isinstance(model.distribute_strategy, apart):
            return f"the loop is not for a {type(model.distribute_strategy).__name__}"
    for name in ("class_weight", "steps_per_epoch", "validation_steps"):
        if arguments[name]:
            return f"the loop has no {name}"
    for callback in keras.tree.flatten(arguments["callbacks"] or []):
        if _watches_batches(callback):
            return f"{type(callback).__name__} is to hear of each batch"
    given = arguments["x"], arguments["y"], arguments["sample_weight"]
    return _unknown(_parts(given)) or _unknown(_parts(arguments["validation_data"]))


def _watches_batches(callback) -> bool:
    import keras

    if "epoch" in (getattr(callback, name, None) for name in ("save_freq", "update_freq")):
        return False  # Keras' own callbacks that save or log: their hooks for batches then do nothing
    names = [f"on_{kind}batch_{end}" for kind in ("", "train_", "test_") for end in ("begin", "end")]
    return any(
        getattr(getattr(callback, name), "__func__", None) is not getattr(keras.callbacks.Callback, name)
        for name in names
    )


def _unknown(parts: tuple) -> str | None:
    """Return why data is not what the loop takes, or None if it is."""
    import keras

    if parts and _is_dataset(parts[0]):
        import tensorflow as tf

        specs = keras.tree.flatten(parts[0].element_spec)
        if not all(isinstance(spec, tf.TensorSpec) and spec.dtype != tf.string for spec in specs):
            return "its dataset has other things in it than tensors of numbers"
        return "its dataset has no end" if parts[0].cardinality() == tf.data.INFINITE_CARDINALITY else None
    for part in keras.tree.flatten(parts):
        if not hasattr(part, "__array__"):
            return f"a {type(part).__name__} is neither an array nor a tf.data.Dataset"
        if np.asarray(part).dtype.kind not in "biuf":
            return f"it reads {np.asarray(part).dtype}, and the loop takes numbers"
    return None


def _parts(data) -> tuple:
    """Return a data set, or x, y and sample weights as far as there are any, as a tuple."""
    parts = tuple(data) if isinstance(data, tuple | list) else (data,)
    while parts and parts[-1] is None:
        parts = parts[:-1]
    return parts


def _is_dataset(data) -> bool:
    # Without importing TensorFlow, which a training on JAX does not need.
    return any(kind.__name__ == "DatasetV2" for kind in type(data).__mro__)


# The rows


def _rows(data, batch_size: int):
    """Return the rows of a data set, or of x, y and sample weights, in batches."""
    parts = _parts(data)
    return _Stream(parts[0]) if _is_dataset(parts[0]) else _Arrays(parts, batch_size)


class _Arrays:
    """Rows of arrays, all of which are on the device."""

    def __init__(self, parts: tuple, batch_size: int):
        """Take the arrays as the device will; they have one length."""
        import keras

        def ready(part):
            array = np.asarray(part)
            return array.astype(keras.config.floatx()) if array.dtype.kind == "f" else array

        self.data, self.batch_size = keras.tree.map_structure(ready, parts), batch_size
        lengths = [len(array) for array in keras.tree.flatten(self.data)]
        if len(set(lengths)) != 1:
            raise ValueError(f"arrays of one length are expected, one row for each; found {lengths} rows")
        if not lengths[0]:
            raise ValueError("there are no rows to take")
        self.count, self.on_device = lengths[0], None
        self.steps = math.ceil(self.count / batch_size)

    def split(self, fraction: float, batch_size: int):
        """Return the first rows, and the last ones, in other batches: a fraction of all."""
        import keras

        at = int(self.count * (1 - fraction))
        first, last = (keras.tree.map_structure(lambda a, s=s: a[s], self.data) for s in (slice(at), slice(at, None)))
        return _Arrays(first, self.batch_size), _Arrays(last, batch_size)

    def blocks(self, put: Callable, epoch: int | None = None, seed: int = 0) -> Iterator[tuple]:
        """Yield the data as `put` has put it on the device, an order of rows, and how many of that order are rows."""
        if self.on_device is None:
            self.on_device = put(self.data)
        rows = np.arange(self.count, dtype=np.int32) if epoch is None else order(self.count, epoch, seed)
        size = min(_block(self.data, self.batch_size), self.steps * self.batch_size)
        for start in range(0, self.count, size):
            part = rows[start : start + size]
            yield self.on_device, np.pad(part, (0, size - len(part))), len(part)


class _Stream:
    """Rows of a tf.data.Dataset of batches, as they come."""

    def __init__(self, dataset):
        """Learn the size of the batches from the first one."""
        import keras
        import tensorflow as tf

        first = next(iter(dataset.take(1)), None)
        if first is None:
            raise ValueError("the dataset is empty")
        first = first if isinstance(first, tuple) else (first,)
        self.dataset, self.batch_size = dataset, int(keras.tree.flatten(first)[0].shape[0])
        self.data = keras.tree.map_structure(lambda tensor: tensor.numpy(), first)
        known = dataset.cardinality()
        self.steps = None if known == tf.data.UNKNOWN_CARDINALITY else int(known)
        self.order = np.arange(_block(self.data, self.batch_size), dtype=np.int32)

    def split(self, fraction: float, batch_size: int):
        """Refuse: which rows are the last ones is known when all have been read."""
        raise ValueError("validation_split needs arrays; split a dataset with its take() and skip()")

    def blocks(self, put: Callable, *_) -> Iterator[tuple]:
        """Yield rows of a block's size, put on the device, their own order, and how many are rows, not padding."""
        import keras
        import tensorflow as tf

        size = len(self.order)
        # Copied, since rebatch complains of tensors that are slices of others, such as those of a rebatch before it.
        batches = self.dataset.map(lambda *batch: keras.tree.map_structure(lambda x: tf.raw_ops.DeepCopy(x=x), batch))
        for block in batches.rebatch(size).prefetch(1).as_numpy_iterator():
            block = block if isinstance(block, tuple) else (block,)
            count = len(keras.tree.flatten(block)[0])
            if count < size:
                block = keras.tree.map_structure(
                    lambda a, missing=size - count: np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)), block
                )
            yield put(block), self.order, count


def _block(data, batch_size: int) -> int:
    """Return how many rows one call of the loop takes: whole batches of them."""
    import keras

    row = sum(array.nbytes // max(1, len(array)) for array in keras.tree.flatten(data))
    return batch_size * max(1, BLOCK // (row * batch_size))


# The loops


def _build(model, rows) -> None:
    """Let a model learn its shapes, and its optimizer and metrics make their variables, from the first row."""
    import keras

    one = keras.tree.map_structure(lambda array: array[:1], rows.data)
    is_tensorflow = keras.backend.backend() == "tensorflow"
    with model.distribute_strategy.scope() if is_tensorflow else contextlib.nullcontext():
        model._symbolic_build(data_batch=one)


def _loop(model, kind: str, batch_size: int, compiled: bool):
    """Return the loop that trains or tests a model; it is kept until `compile` makes new metrics."""
    import keras

    tracker, kept = vars(model).get("_device_loops", (None, {}))
    if tracker is not model.metrics[0]:
        kept = {}
        object.__setattr__(model, "_device_loops", (model.metrics[0], kept))  # Keras would track it as a part
    key = kind, batch_size, compiled
    if key not in kept:
        loop = _JaxLoop(model, kind, batch_size) if keras.backend.backend() == "jax" else _TensorFlowLoop(model, *key)
        kept[key] = loop
    return kept[key]


class _TensorFlowLoop:
    """A loop over batches in one TensorFlow function, for one device or the replicas of a strategy."""

    def __init__(self, model, kind: str, batch_size: int, compiled: bool):
        """Make the functions; TensorFlow traces each when it is first called."""
        import tensorflow as tf

        self.model, self.batch_size = model, batch_size
        self.step = getattr(model, f"{kind}_step")
        self.strategy = model.distribute_strategy
        self.replicas = self.strategy.num_replicas_in_sync
        if batch_size % self.replicas:
            raise ValueError(f"{self.replicas} devices cannot share {batch_size} rows equally: take a multiple of them")
        self.optional = compiled and not model.jit_compile  # nobody asked for XLA
        self.run = tf.function(self._run, autograph=False, jit_compile=compiled and self.replicas == 1)
        self.rest = tf.function(self._rest, autograph=False)  # one update: not worth XLA's second

    def put(self, data):
        """Return arrays as tensors."""
        import keras
        import tensorflow as tf

        return keras.tree.map_structure(tf.constant, data)

    def __call__(self, tensors, order: np.ndarray, count: int) -> dict[str, float]:
        """Take the first `count` rows of an order of the data, and return the metrics so far."""
        import tensorflow as tf

        steps = count // self.batch_size
        if steps:
            logs = self._try(tensors, tf.constant(order), tf.constant(steps))
        if count % self.batch_size:
            logs = self.rest(tensors, tf.constant(order[steps * self.batch_size : count]))
        if self.replicas > 1:
            logs = self.model.get_metrics_result()
        return {name: float(value) for name, value in logs.items()}

    def _try(self, *arguments):
        import tensorflow as tf

        try:
            return self.run(*arguments)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
            if not self.optional:
                raise
            # XLA does not know an operation, which shows before anything has been computed; TensorFlow does.
            self.optional, self.run = False, tf.function(self._run, autograph=False)
            return self.run(*arguments)

    def _run(self, tensors, order, steps):
        import keras
        import tensorflow as tf

        share = self.batch_size // self.replicas

        # Gathered at once, and each replica its own rows: batches are then slices of what is on its device.
        def gather(tensors, order):
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            mine = tf.reshape(tf.reshape(order, [-1, self.replicas, share])[:, replica], [-1])
            return keras.tree.map_structure(lambda tensor: tf.gather(tensor, mine), tensors)

        def update(block, number):
            def part(tensor):
                others = tensor.shape[1:]
                return tf.slice(tensor, [number * share] + [0] * len(others), [share, *others])

            self.step(keras.tree.map_structure(part, block))

        def body(number):
            self.strategy.run(update, (block, number))
            return number + 1

        block = self.strategy.run(gather, (tensors, order))
        tf.while_loop(lambda number: number < steps, body, [0])
        return self._metrics()

    def _rest(self, tensors, rows):
        import keras
        import tensorflow as tf

        part = keras.tree.map_structure(lambda tensor: tf.gather(tensor, rows), tensors)

        def update(part):
            before = [tf.identity(variable) for variable in self.model.metrics_variables]
            self.step(part)
            # Each replica has computed all of these rows: its part of what the metrics have added up.
            for variable, old in zip(self.model.metrics_variables, before, strict=True):
                variable.assign(old + (variable - old) / self.replicas)

        if self.replicas == 1:
            self.step(part)
        else:
            self.strategy.run(update, (part,))
        return self._metrics()

    def _metrics(self):
        # Those of several replicas are added up outside, where each worker does it at the same time.
        return self.model.get_metrics_result() if self.replicas == 1 else {}


class _JaxLoop:
    """A loop over batches in one jitted function, for one device or those of Keras' distribution."""

    def __init__(self, model, kind: str, batch_size: int):
        """Make the functions; JAX traces each when it is first called."""
        import jax
        import keras

        self.model, self.batch_size = model, batch_size
        self.step = getattr(model, f"{kind}_step")
        self.variables = [model.trainable_variables, model.non_trainable_variables, model.metrics_variables]
        if kind == "train":
            self.variables.insert(2, model.optimizer.variables)
        self.distribution = keras.distribution.distribution()
        if self.distribution:
            mesh = self.distribution.device_mesh.backend_mesh
            devices = mesh.shape[self.distribution.batch_dim_name]
            if batch_size % devices:
                raise ValueError(f"{devices} devices cannot share {batch_size} rows equally: take a multiple of them")
            name = jax.sharding.PartitionSpec(None, self.distribution.batch_dim_name)
            self.everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            self.shared = jax.sharding.NamedSharding(mesh, name)
        self.run, self.rest = jax.jit(self._run), jax.jit(self._rest)

    def __call__(self, arrays, order: np.ndarray, count: int) -> dict[str, float]:
        """Take the first `count` rows of an order of the data, and return the metrics so far."""
        state = [[variable.value for variable in part] for part in self.variables]
        steps = count // self.batch_size
        if steps:
            logs, state = self.run(state, arrays, self.put(order), steps)
        if count % self.batch_size:
            logs, state = self.rest(state, arrays, self.put(order[steps * self.batch_size : count]))
        # A callback may look at any variable, or set it.
        for variables, values in zip(self.variables, state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        return {name: float(value) for name, value in logs.items()}

    def put(self, data):
        """Return arrays on the device, or on each device of each process."""
        import jax
        import keras

        def everywhere(array):
            return jax.make_array_from_callback(array.shape, self.everywhere, lambda index: array[index])

        return keras.tree.map_structure(everywhere if self.distribution else jax.numpy.asarray, data)

    def _run(self, state, arrays, order, steps):
        import jax
        import keras

        order = order.reshape(-1, self.batch_size)

        # Gathered at once, batches are slices: faster than gathering each, for the memory of one block.
        def gather(array):
            block = array[order]
            return jax.lax.with_sharding_constraint(block, self.shared) if self.distribution else block

        block = keras.tree.map_structure(gather, arrays)

        def body(number, state):
            part = keras.tree.map_structure(lambda array: jax.lax.dynamic_index_in_dim(array, number, 0, False), block)
            return self.step(state, part)[1]

        return self._finish(jax.lax.fori_loop(0, steps, body, tuple(state)))

    def _rest(self, state, arrays, rows):
        import keras

        part = keras.tree.map_structure(lambda array: array[rows], arrays)
        return self._finish(self.step(tuple(state), part)[1])

    def _finish(self, state):
        """Return the metrics, and the state where it was: each variable on its devices."""
        import jax
        import keras

        with keras.StatelessScope(state_mapping=list(zip(self.model.metrics_variables, state[-1], strict=True))):
            logs = self.model.get_metrics_result()
        if self.distribution:
            layouts = [[variable.value.sharding for variable in part] for part in self.variables]
            state = jax.tree.map(jax.lax.with_sharding_constraint, list(state), layouts)
        return logs, state
