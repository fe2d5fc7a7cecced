"""The code that a training job runs: `task`, the training task, and `loop`, its training loop.

`task_jax` and `task_torch` are the same task in other frameworks. `package` makes of it all what
`CustomPythonPackageTrainingJob` takes. A custom container needs no package: its image has the course's environment, and
its command is `python -m helpers.trainer.task`.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# What a job runs of the package, its python_module_name; on a PyTorch image it is helpers.trainer.task_torch.
MODULE = "helpers.trainer.task"
FILES = (
    "__init__.py",
    "data.py",
    "fit.py",
    "regression.py",
    "datasets/__init__.py",
    "datasets/sources.json",
    "datasets/penguins.csv",
    "datasets/diamonds.parquet",
    "trainer/__init__.py",
    "trainer/files.py",
    "trainer/loop.py",
    "trainer/task.py",
    "trainer/task_jax.py",
    "trainer/task_torch.py",
)
SETUP = """\
from setuptools import setup

setup(
    name="course_trainer",
    version="0.1",
    python_requires=">=3.10",  # of the prebuilt training images
    install_requires=["cloudml-hypertune", "pandas>=2", "pyarrow", "tensorboard"],  # images bring their framework
    packages=["helpers", "helpers.datasets", "helpers.trainer"],
    package_data={"helpers.datasets": ["*"]},
)
"""


def package(folder: str | Path, wheel: bool = False) -> Path:
    """Write the Python package of the training task into a folder, and return its .tar.gz.

    The task runs on Python 3.10 with TensorFlow 2.17, as Google's newest prebuilt image has them, or with PyTorch 2.4.
    A `wheel` is for a command of your own: pip has nothing to build, and takes a sixth of the time.
    """
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        for name in FILES:
            copy = Path(scratch) / "helpers" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, copy)
        (Path(scratch) / "setup.py").write_text(SETUP, encoding="utf-8")
        words = ["bdist_wheel"] if wheel else ["sdist", "--formats=gztar"]
        command = [sys.executable, "setup.py", "--quiet", *words, "--dist-dir", str(Path(folder).resolve())]
        subprocess.run(command, cwd=scratch, check=True, capture_output=True)
    return Path(folder) / ("course_trainer-0.1-py3-none-any.whl" if wheel else "course_trainer-0.1.tar.gz")
