"""What `pip install` does in a task: as ever, but without a network where nothing is missing."""

import logging
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from pip._internal.commands import install
from pip._internal.exceptions import InstallationError
from pip._internal.utils.filetypes import is_archive_file

TOOLS = {"pip", "setuptools", "wheel"}

logger = logging.getLogger(__name__)


class InstallCommand(install.InstallCommand):
    """Installs packages."""

    def run(self, options, args):
        """Install what the arguments ask for and return the exit status."""
        if options.upgrade and args and TOOLS.issuperset(args) and not (options.requirements or options.editables):
            # The first line of many images: no reason to fail, or to wait, where no index can be reached.
            logger.info("Left out --upgrade, so that this environment keeps its own %s.", " and ".join(args))
            options.upgrade = False
        with tempfile.TemporaryDirectory() as folder:
            return super().run(options, [build(arg, folder) if is_source(arg) else arg for arg in args])


def is_source(requirement):
    """Say whether a requirement is the path of a source archive or of a folder."""
    is_path = os.sep in requirement or requirement.startswith(".") or is_archive_file(requirement)
    return is_path and not requirement.endswith(".whl") and Path(requirement).exists()


def build(source, folder):
    """Return a wheel of a source, built in a folder with the tools that are there; the source if it needs others."""
    folder = tempfile.mkdtemp(dir=folder)
    # Pip would fetch the tools from an index, into an isolated environment, even if they are there.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--use-pep517"]
    run = subprocess.run(
        [*command, "--check-build-dependencies", "--wheel-dir", folder, source], capture_output=True, text=True
    )
    if "Some build dependencies" in run.stderr:
        return source
    if run.returncode:
        raise InstallationError(run.stderr.strip())
    wheel = next(Path(folder).glob("*.whl"))
    name, version = wheel.name.split("-")[:2]
    # Of an installed version, pip installs a source again but not a wheel.
    return source if is_installed(name, version) else str(wheel)


def is_installed(name, version):
    """Say whether a version of a distribution is installed."""
    try:
        return metadata.version(name) == version
    except metadata.PackageNotFoundError:
        return False
