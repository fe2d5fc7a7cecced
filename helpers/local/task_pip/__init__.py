"""Stands before the real pip in a task's environment, so that a task needs no network where nothing is missing.

There it is `pip`, the first on the path. It loads the environment's own pip, gives that one another `install` (see
task_install.py), and leaves its place to it. So it makes no difference how pip is called, and whoever installs another
pip over it has that one.
"""

import importlib
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

here = Path(__file__).parent
spec = PathFinder.find_spec("pip", [entry for entry in sys.path if entry != str(here.parent)])
pip = sys.modules["pip"] = module_from_spec(spec)
spec.loader.exec_module(pip)
pip.__path__.append(str(here))
commands = importlib.import_module("pip._internal.commands").commands_dict
commands["install"] = commands["install"]._replace(module_path="pip.task_install")
