"""The process that runs one lesson: `python -m helpers.course.worker ORDER`, started by `execute`.

It reports as lines of JSON what changes: the cell it is at, how many there are, and the failure if there is one.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

LANGUAGE_KEYS = ("name", "file_extension", "mimetype", "pygments_lexer")


def work(tell, scratch, notebook, folder, result, parameters=None, page=None):
    """Run the file `notebook` in a folder and save what came of it as `result`.

    With `page` it is a lesson of a course: it may run with other parameters, is saved even if it fails, and is written
    as a page too. Without, it is a lesson to be stored: nothing is kept that differs from run to run.
    """
    stored = nbformat.read(notebook, 4)
    kernel = AsyncKernelManager(kernel_name="python3", transport_encryption="auto")
    threading.Thread(target=end_with_parent, args=(kernel,), daemon=True).start()
    total, at = len(stored.cells) + bool(parameters), []

    def on_cell_start(cell, cell_index):
        at.append(cell)
        tell({"cell": cell_index + 1, "cells": total})

    started, failure = time.time(), None
    options = {"km": kernel, "on_cell_start": on_cell_start}
    try:
        if page:
            import papermill  # here because storing does without its second of importing

            # The page's tools are imported while the lesson runs, so that its end need not wait for them.
            threading.Thread(target=importlib.import_module, args=("helpers.course.report",), daemon=True).start()

            options |= {"cwd": folder, "kernel_name": "python3", "language": "python", "progress_bar": False}
            papermill.execute_notebook(stored, scratch, parameters, **options)
        else:
            NotebookClient(stored, resources={"metadata": {"path": folder}}, timeout=None, **options).execute()
    except Exception as error:  # whatever stops a lesson is for its reader to see
        failure = describe(error, stored, at, kernel)
    finally:
        group = kernel.provisioner and kernel.provisioner.pgid
        if kernel.has_kernel:
            run_sync(kernel.shutdown_kernel)()
        end(group)

    seconds = round(time.time() - started, 1)
    if page:
        from helpers.course import report

        executed = nbformat.read(scratch, 4) if Path(scratch).exists() else stored
        executed.metadata.pop("papermill", None)  # it holds the whole stored notebook again, as the path of its input
        clock = time.strftime("%Y-%m-%d %H:%M", time.localtime(started))
        run = {"started": clock, "seconds": seconds, "parameters": parameters or {}, "failure": failure}
        executed.metadata.setdefault("course", {})["run"] = run
        save(executed, result)
        Path(page).write_text(report.lesson_page(executed, Path(result).stem, folder), encoding="utf-8")
    elif not failure:
        tidy(stored)
        stored.metadata.setdefault("course", {})["seconds"] = seconds
        save(stored, result)
    tell({"seconds": seconds, "failure": failure})


def describe(error, stored, at, kernel):
    """Return what a reader needs to know of a failure: the cell, its source, and the error's name and message."""
    cell = at[-1] if at else None
    place = next((place for place, other in enumerate(stored.cells, 1) if cell and other.id == cell.id), len(at))
    failure = {"cell": place, "source": cell.source if cell else "", "name": type(error).__name__}
    if hasattr(error, "ename"):
        return failure | {"name": error.ename, "message": error.evalue}
    process = kernel.provisioner and kernel.provisioner.process
    status = process.poll() if process else None
    if status is None:
        return failure | {"message": str(error)}
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    guess = ", most often because the machine's memory was used up" if status == -signal.SIGKILL else ""
    return failure | {"name": "The kernel died", "message": f"it ended {how}{guess}"}


def end_with_parent(kernel):
    """Wait until the parent closes standard input or is gone, and then end the kernel and this process at once."""
    while os.read(0, 1024):
        pass
    end(kernel.provisioner and kernel.provisioner.pgid)
    kernel.cleanup_connection_file()
    os._exit(1)


def end(group):
    """End all processes of a kernel's group, which holds what the kernel started as well."""
    if group:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def tidy(notebook):
    """Leave in an executed notebook only what the next run on another machine gives as well."""
    count = 0
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        merged = []
        for output in cell.outputs:
            last = merged[-1] if merged else {}
            if output.output_type == "stream" and output.get("name") == last.get("name"):
                last.text += output.text
            else:
                merged.append(output)
        cell.outputs = merged
        if cell.execution_count is not None:
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    language = notebook.metadata.get("language_info", {})
    notebook.metadata["language_info"] = {key: language[key] for key in LANGUAGE_KEYS if key in language}


def save(notebook, path):
    """Write a notebook so that a reader finds the old one or the new one, whole."""
    partial = Path(path).with_suffix(".partial")
    partial.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed, by the kernel too, goes to the log
    work(lambda news: print(json.dumps(news), file=channel), **json.loads(sys.argv[1]))
