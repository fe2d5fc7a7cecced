"""What a course found, as pages: one for each executed lesson, and one that shows the result of all.

The executed notebooks in the output folder are the only record; the page is made anew from them each time.
"""

import contextlib
import html
import importlib.metadata
import platform
import re
import string
import time
from pathlib import Path

from helpers.course import CourseError, cores, lessons
from helpers.course.execute import duration

TEMPLATE = Path(__file__).with_name("report.html")


def lesson_page(notebook, name, folder):
    """Return an executed notebook as a page that needs no other file and no network."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(theme="light", embed_images=True, exclude_anchor_links=True)
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": name, "path": str(folder)}})
    # Its scripts would be fetched from elsewhere; a page that is only read does without them.
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    # Links from lesson to lesson stay among the executed ones.
    return re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', page)


def write_index(output, everything, runs, seconds):
    """Write index.html for the `runs` that took so many seconds and the lessons run before; return its path."""
    failed = {run.lesson: run.failure for run in runs if run.failure}
    results = {}
    for lesson in everything:
        if executed := load_executed(output / lesson.path.name):
            executed["metadata"]["course"]["run"]["failure"] = failed.get(lesson) or run_of(executed)["failure"]
            results[lesson] = executed
    facts = {
        "Lessons": f"{len(results)} of {len(everything)}",
        "Time": f"{duration(seconds)}; one after another {duration(sum(run.seconds for run in runs))}"
        + (f" (the {len(runs)} run last)" if len(runs) < len(results) else ""),
        "Date": time.strftime("%-d %B %Y, %H:%M"),
        "Software": ", ".join(versions()),
        "Machine": f"{cores()} cores, {platform.machine()}",
    }
    missing = ", ".join(f"{lesson.number} {inline(lesson.title)}" for lesson in everything if lesson not in results)
    index = output / "index.html"
    index.write_text(
        string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
            facts="\n".join(f"<div><dt>{name}</dt><dd>{html.escape(fact)}</dd></div>" for name, fact in facts.items()),
            contents="\n".join(content(lesson, run_of(executed)) for lesson, executed in results.items()),
            lessons="\n".join(section(lesson, executed) for lesson, executed in results.items()),
            missing=f"<p>Not run yet: {missing}.</p>" if missing else "",
        ),
        encoding="utf-8",
    )
    return index


def load_executed(path):
    """Return a notebook that a course has run, None if there is none."""
    try:
        notebook = lessons.load(path)
        return notebook if run_of(notebook) else None
    except (CourseError, KeyError):
        return None


def run_of(executed):
    """Return what the worker noted about a run: started, seconds, parameters, failure."""
    return executed["metadata"]["course"]["run"]


def versions():
    """Return the versions of what the lessons compute with."""
    yield f"Python {platform.python_version()}"
    for name, title in (("tensorflow", "TensorFlow"), ("keras", "Keras")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{title} {importlib.metadata.version(name)}"


def content(lesson, run):
    """Return a lesson's line in the table of contents."""
    status = "failed" if run["failure"] else duration(run["seconds"])
    return (
        f'<li class="{"failed" if run["failure"] else "done"}"><a href="#{lesson.name}">'
        f"<span>{lesson.number}</span> {inline(lesson.title)}</a> <small>{status}</small></li>"
    )


def section(lesson, executed):
    """Return a lesson's part of the page."""
    run = run_of(executed)
    changed = ", ".join(f"{name} = {value!r}" for name, value in run["parameters"].items())
    link, failure = f"{lesson.name}.html", run["failure"]
    if failure:
        status = f'<strong class="failed">Failed</strong> after {duration(run["seconds"])}'
        error = f"{failure['name']}: {failure['message']}".rstrip(": ")
        found = (
            f'<div class="failure"><p>Stopped in cell {failure["cell"]}:</p>'
            f'<pre tabindex="0">{html.escape(failure["source"])}</pre>'
            f'<pre tabindex="0" class="error">{html.escape(plain(error))}</pre></div>'
        )
        link += "#papermill-error-cell"
    else:
        status, found = f"Ran in {duration(run['seconds'])}", headline(executed)
    return f"""<section id="{lesson.name}" aria-labelledby="{lesson.name}-title">
<h2 id="{lesson.name}-title"><span class="number">{lesson.number}</span> {inline(lesson.title)}</h2>
<p class="promise">{inline(lesson.promise)}</p>
{found}
<p class="run">{status}, {run["started"]}{f"; with <code>{html.escape(changed)}</code>" if changed else ""}.
<a href="{link}">Read the lesson as it ran<span class="hidden">: {inline(lesson.title)}</span></a></p>
</section>"""


def headline(executed):
    """Return all outputs of the cells tagged `headline`, in order."""
    cells = (cell for cell in executed["cells"] if "headline" in cell["metadata"].get("tags", []))
    return "\n".join(show(output) for cell in cells for output in cell.get("outputs", []))


def show(output):
    """Return one output of a cell, in the richest form that a page without scripts can show."""
    data = {kind: text if isinstance(text, str) else "".join(text) for kind, text in output.get("data", {}).items()}
    if "text/html" in data:
        # The page has its own style for tables, in light and in dark.
        bare = re.sub(r"<(style|script)\b.*?</\1>", "", data["text/html"], flags=re.DOTALL)
        bare = re.sub(r'\s(border|style|class|align)="[^"]*"', "", bare)
        kind = "table" if "<table" in bare else "figure"
        focus = ' tabindex="0" role="group" aria-label="Table"' if kind == "table" else ""
        return f'<div class="{kind}"{focus}>{bare}</div>'
    if "image/png" in data:
        alt = html.escape(plain(data.get("text/plain", "")))
        return f'<div class="figure"><img alt="{alt}" src="data:image/png;base64,{data["image/png"].strip()}"></div>'
    text = data.get("text/plain") or output.get("text", "")
    return f'<pre tabindex="0">{html.escape(plain("".join(text)).rstrip())}</pre>' if text else ""


def plain(text):
    """Return text without the codes that colour it on a terminal."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def inline(markdown):
    """Return a line of Markdown as HTML: code, bold and emphasis; of a link its text."""
    text = html.escape(re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown), quote=False)
    for mark, tag in (("`", "code"), (r"\*\*", "strong"), (r"\*", "em")):
        text = re.sub(rf"{mark}(.+?){mark}", rf"<{tag}>\1</{tag}>", text)
    return text
