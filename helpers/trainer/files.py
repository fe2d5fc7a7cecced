"""Files of a training, gs:// or not. TensorFlow reads gs://, and is imported for that alone."""

import glob
from pathlib import Path


def find(pattern: str) -> list[str]:
    """Return the names of the files that a pattern such as gs://bucket/rows-*.csv stands for, in order."""
    if not pattern.startswith("gs://"):
        return sorted(glob.glob(pattern))  # noqa: PTH207 - the pattern may be absolute
    import tensorflow as tf

    return sorted(tf.io.gfile.glob(pattern))


def read(path: str) -> bytes | None:
    """Return what a file holds; None if there is no such file."""
    if not path.startswith("gs://"):
        return Path(path).read_bytes() if Path(path).exists() else None
    import tensorflow as tf

    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path, "rb") as file:
        return file.read()


def write(path: str, content: bytes) -> None:
    """Write a file, which is whole at any moment: the one before, or this one."""
    if path.startswith("gs://"):
        import tensorflow as tf

        with tf.io.gfile.GFile(path, "wb") as file:  # an object appears when all of it has come
            file.write(content)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial")
    partial.write_bytes(content)
    partial.replace(path)
