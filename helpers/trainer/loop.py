"""The training loop: several workers share it, and one that was killed goes on where it was.

    addresses, rank = loop.workers()                  # from CLUSTER_SPEC or TF_CONFIG; one worker has no addresses
    strategy = loop.strategy(addresses, rank)
    train = loop.epoch(network, optimizer, x, y, batch_size=128, seed=0, strategy=strategy)
    train(0), train(1)                                # the training RMSE of the first epoch and of the second

Keras' own `fit` cannot train over several workers (TensorFlow backend, 3.15). This loop gives the same errors, to
float32's precision, however many workers and GPUs share each batch.
"""

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from helpers.trainer import files

# What the primary worker and its helpers are called: by TensorFlow, and by Vertex AI in every job.
ROLES = {"TF_CONFIG": ("chief", "master", "worker"), "CLUSTER_SPEC": ("workerpool0", "workerpool1")}


def workers(environment: Mapping[str, str] = os.environ) -> tuple[list[str], int]:
    """Return the addresses of a job's workers, the primary one first, and which of them this process is.

    Outside of a job there are no addresses, and this process is number 0. Raises ValueError for a replica that has
    another role, such as a parameter server.
    """
    for variable, roles in ROLES.items():
        spec = json.loads(environment.get(variable) or "{}")
        cluster, task = spec.get("cluster", {}), spec.get("task", {})
        found = {(role, i): host for role in roles for i, host in enumerate(cluster.get(role, []))}
        if found:
            me = task.get("type"), int(task.get("index", 0))
            if me not in found:
                raise ValueError(f"{variable} calls this replica {me[0]} {me[1]}; this task knows {', '.join(roles)}")
            return list(found.values()), list(found).index(me)
    return [], 0


def strategy(addresses: list[str], rank: int):
    """Return the tf.distribute.Strategy for these workers and this machine's GPUs, before TensorFlow does anything."""
    import tensorflow as tf

    if len(addresses) > 1:
        cluster = tf.train.ClusterSpec({"worker": addresses})
        me = {"task_type": "worker", "task_id": rank, "rpc_layer": "grpc"}
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, **me)
        return tf.distribute.MultiWorkerMirroredStrategy(resolver)
    several = len(tf.config.list_physical_devices("GPU")) > 1
    return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


def epoch(network, optimizer, x, y, batch_size: int, seed: int, strategy) -> Callable[[int], float]:
    """Return a function that trains for one epoch, given its number, and returns the training RMSE.

    Its order of rows depends on the seed and its number alone. `batch_size` rows make one update, whoever computes it.
    """
    import tensorflow as tf

    x, y = tf.constant(x), tf.constant(y)

    def update(rows):
        context = tf.distribute.get_replica_context()
        mine = rows[context.replica_id_in_sync_group :: context.num_replicas_in_sync]
        with tf.GradientTape() as tape:
            predicted = network(tf.gather(x, mine), training=True)[:, 0]
            squares = tf.reduce_sum(tf.square(predicted - tf.gather(y, mine)))
            # The mean over the whole batch: the optimizer adds up what the replicas contribute to it.
            loss = squares / tf.cast(len(rows), tf.float32)
        variables = network.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return squares

    @tf.function
    def run(number):
        order = tf.random.experimental.stateless_shuffle(tf.range(len(x)), seed=[seed, number])
        squares = 0.0
        for start in tf.range(0, len(x), batch_size):
            parts = strategy.run(update, [order[start : start + batch_size]])
            squares += strategy.reduce("SUM", parts, axis=None)
        return tf.sqrt(squares / len(x))

    return lambda number: float(run(tf.constant(number)))


def weights(inputs: int, units: Sequence[int], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return weights to begin with, the same in every framework: for each layer a kernel (inputs, units) and a bias.

    Kernels are uniform within sqrt(6 / (inputs + units)), as Keras draws them by default (Glorot); biases are zero.
    """
    generator, layers = np.random.default_rng(seed), []
    for shape in zip((inputs, *units), units, strict=False):
        limit = math.sqrt(6 / sum(shape))
        layers.append((generator.uniform(-limit, limit, shape).astype(np.float32), np.zeros(shape[1], np.float32)))
    return layers


def check(settings: Mapping, found: Mapping, place: str) -> None:
    """Refuse to go on from a training with other settings, which were found at a place."""
    if settings != found:
        raise ValueError(
            f"{place} is of a training with {found}; this one has {settings}. "
            "Give this one a folder of its own (--checkpoint_dir), or delete the file."
        )


def history(folder: str) -> list[dict]:
    """Return the errors of each epoch that is in the checkpoint of a folder, gs:// or not."""
    with np.load(io.BytesIO(files.read(f"{folder.rstrip('/')}/checkpoint.npz"))) as saved:
        return json.loads(str(saved["about"]))["history"]


class Checkpoint:
    """One file in a folder, gs:// or not: all that a training needs to go on exactly as if nothing had happened."""

    def __init__(self, folder: str | None, variables: list, settings: Mapping, rank: int):
        """Keep the `variables` of a training in a folder, if there is one; a file from other settings is refused.

        All workers read it, and number 0 writes it.
        """
        self.file = folder and f"{folder.rstrip('/')}/checkpoint.npz"
        self.variables, self.settings, self.rank = variables, settings, rank

    def restore(self) -> list[dict]:
        """Set the variables to what the file holds, and return the history that it holds; [] if there is none."""
        content = self.file and files.read(self.file)
        if not content:
            return []
        with np.load(io.BytesIO(content)) as saved:
            about = json.loads(str(saved["about"]))
            check(self.settings, about["settings"], self.file)
            for number, variable in enumerate(self.variables):
                variable.assign(saved[str(number)])
        return about["history"]

    def save(self, history: list[dict]) -> None:
        """Write the file anew."""
        if not self.file or self.rank:
            return
        about = json.dumps({"settings": self.settings, "history": history})
        content = io.BytesIO()
        np.savez(content, about=about, **{str(number): value.numpy() for number, value in enumerate(self.variables)})
        files.write(self.file, content.getvalue())
