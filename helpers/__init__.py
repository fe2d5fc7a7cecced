"""What the lessons use, one module for each concept of the course.

Importing it costs almost nothing and prepares what a lesson imports next: TensorFlow computes the same digits on every
machine, TensorFlow and Matplotlib start without the notices that a notebook would show as a red box, and a GPU is
shared. A variable that you have set yourself is left as it is.
"""

import importlib.util
import logging
import os
import sys
import tempfile

# oneDNN picks other kernels on other processors, and with them other last digits.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# 1 hides notes on how TensorFlow was built; warnings and errors stay.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
# A GPU serves TensorFlow and JAX in one process if each takes what it needs; by default each takes nearly all of it.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Matplotlib warns when building its list of fonts takes long, which happens once, in somebody's first figure.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
# A lesson that compares networks traces a graph for each; TensorFlow takes that for a mistake in a loop. And in a
# notebook it tells of each export in a red box.
UNWANTED = (
    "triggered tf.function retracing",
    "Assets written to:",
    "Using MirroredStrategy with devices",
    "Reduce to /job:",
)
logging.getLogger("tensorflow").addFilter(lambda record: not any(words in record.getMessage() for words in UNWANTED))

# Printed before TensorFlow reads its log level: on every machine that has no NVIDIA driver (303), each time.
NOTICES = (b"before absl::InitializeLog()", b"Could not find cuda drivers", b"cuInit: UNKNOWN ERROR (303)")


class _QuietTensorFlow:
    """Finds TensorFlow as Python would, and drops the NOTICES of its first import; every other line is passed on."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Find the module `tensorflow`, with an import that is quiet."""
        if name != "tensorflow":
            return None
        sys.meta_path.remove(cls)  # or it would be asked again
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, cls)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: cls.load(execute, module)
        return spec

    @staticmethod
    def load(execute, module):
        """Execute the module; looking for devices belongs to it, since that prints too and creates none of them."""
        with tempfile.TemporaryFile() as said:
            stderr = os.dup(2)
            os.dup2(said.fileno(), 2)
            try:
                execute(module)
                module.config.list_physical_devices()
            finally:
                os.dup2(stderr, 2)
                os.close(stderr)
                said.seek(0)
                for line in said:
                    if not any(notice in line for notice in NOTICES):
                        os.write(2, line)


sys.meta_path.insert(0, _QuietTensorFlow)
