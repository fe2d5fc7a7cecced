"""What a lesson is: a notebook `NN_verb_object.ipynb`, and what its cells say about it.

Read with the standard library alone, so that a wrong call is answered before anything is installed.
"""

import ast
import configparser
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from helpers.course import CourseError

PLACES = (
    ("Open in Colab", "open-in-colab", "https://colab.research.google.com/github/{project}/blob/main/{path}"),
    (
        "Open in Colab Enterprise",
        "open-in-colab-enterprise",
        "https://console.cloud.google.com/vertex-ai/colab/import/{quoted_raw}",
    ),
    (
        "Open in Vertex AI Workbench",
        "open-in-workbench",
        "https://console.cloud.google.com/vertex-ai/workbench/deploy-notebook?download_url={raw}",
    ),
)
START = """\
import subprocess
from importlib.util import find_spec

url = "{url}"
if not find_spec("helpers"):  # opened on its own, as in Colab Enterprise: fetch the course, then go on
    subprocess.run(f"git clone --depth 1 {{url}} course && ln -s course/helpers", shell=True, check=True)
import helpers  # first of all: TensorFlow then starts quietly and computes the same digits on every machine"""
COMPUTED = ...  # the default of a parameter that the notebook computes


@dataclass(frozen=True, eq=False)
class Lesson:
    """One lesson, as its stored notebook tells it."""

    path: Path
    title: str
    promise: str
    parameters: dict
    seconds: float | None

    @property
    def name(self):
        """The file's name without its ending: what a learner types and links hold."""
        return self.path.stem

    @property
    def number(self):
        """The lesson's place in the course."""
        return int(self.name[:2])


def load(path):
    """Read a notebook as plain JSON."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        parameters(notebook["cells"]), notebook["metadata"]
        return notebook
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, OSError) as error:
        raise CourseError(
            f"{path} is not a notebook that can be read: {type(error).__name__}: {error}.\n"
            "Put the course's own file back: git checkout -- " + str(path)
        ) from None


def read(path):
    """Read one lesson from its notebook."""
    notebook = load(path)
    cells, metadata = notebook["cells"], notebook["metadata"]
    text = "\n\n".join(source(cell) for cell in cells if cell.get("cell_type") == "markdown")
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    after = text[heading.end() :] if heading else text
    paragraphs = (paragraph.strip() for paragraph in re.split(r"\n\s*\n", after))
    first = next((paragraph for paragraph in paragraphs if paragraph and paragraph[0] not in "#[!"), "")
    promise = re.search(r"^\*\*You will\*\*.*$", after, re.MULTILINE)
    return Lesson(
        path=path,
        title=re.sub(r"^(Lesson )?\d+\W+", "", heading[1].strip()) if heading else path.stem,
        promise=promise[0] if promise else " ".join(first.split()),
        parameters=parameters(cells),
        seconds=metadata.get("course", {}).get("seconds"),
    )


def find(folder):
    """Return all lessons of a folder, in the order of the course."""
    lessons = [read(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]
    if not lessons:
        raise CourseError(f"There are no lessons (NN_name.ipynb) in {folder}.")
    return lessons


def choose(lessons, words):
    """Return the lessons that the words name, each by number, name or a unique part of it; all without words."""
    return [lesson for lesson in lessons if lesson in {one(lessons, word) for word in words}] if words else lessons


def one(lessons, word):
    """Return the one lesson that a word names."""
    wanted = Path(word).name.removesuffix(".ipynb").lower()
    if wanted.isdigit():
        matches = [lesson for lesson in lessons if lesson.number == int(wanted)]
    else:
        matches = [lesson for lesson in lessons if lesson.name.lower() == wanted]
        matches = matches or [lesson for lesson in lessons if wanted in lesson.name.lower()]
    if len(matches) == 1:
        return matches[0]
    names = [lesson.name for lesson in matches or lessons]
    if matches:
        problem = f"{word} fits {len(matches)} lessons."
    else:
        parts = [part for name in names for part in (name[3:], *name.split("_")[1:])]
        near = difflib.get_close_matches(wanted, parts, n=1)
        problem = f"There is no lesson {word}." + (f" Did you mean {near[0]}?" if near else "")
    raise CourseError(f"{problem} Name one by its number or a part of its name:\n" + indented(names), status=2)


def parameters(cells):
    """Return names and default values of what the cell tagged `parameters` assigns."""
    found = {}
    tagged = (source(cell) for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", []))
    for statement in ast.parse("\n".join(tagged)).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        for name in (target.id for target in targets if isinstance(target, ast.Name)):
            try:
                found[name] = ast.literal_eval(statement.value)
            except ValueError:
                found[name] = COMPUTED
    return found


def settings_for(chosen, given):
    """Return for each chosen lesson the given parameters that it has, as values of their type.

    `given` holds pairs of name and text. A name that no chosen lesson has, or a text that does not fit, is an error.
    """
    for name, _ in given:
        if not any(name in lesson.parameters for lesson in chosen):
            known = sorted({name for lesson in chosen for name in lesson.parameters})
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise CourseError(
                f"None of the chosen lessons has a parameter {name}."
                + (f" Did you mean {near[0]}?" if near else "")
                + ("\nThey have:\n" + indented(known) if known else "\nThey have no parameters."),
                status=2,
            )
    return {
        lesson: {
            name: value_like(name, text, lesson.parameters[name]) for name, text in given if name in lesson.parameters
        }
        for lesson in chosen
    }


def value_like(name, text, default):
    """Return the value that a text stands for, which has to be of the default's type."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        value = text
    anything = default is COMPUTED or default is None
    if anything or type(value) is type(default) or (type(default) is float and type(value) is int):
        return value
    raise CourseError(
        f"The parameter {name} takes a value such as {default!r} ({type(default).__name__}), and {text!r} is not one.\n"
        f"For example: -p {name} {str(default).replace(' ', '')}",
        status=2,
    )


def sync(notebook, lesson, lessons, url):
    """Write the generated parts of a notebook: badges, fetch cell, navigation, and the time that computing takes.

    `notebook` is changed in place and is the same after a second call. `url` is the course's home on GitHub.
    """
    cells = notebook["cells"]
    kept = {cell["id"]: cell for cell in cells if cell.get("id") in ("open", "start", "navigation")}
    body = [cell for cell in cells if cell.get("id") not in kept]
    title = next((place for place, cell in enumerate(body) if cell.get("id") == "title"), 0) + 1
    notebook["cells"] = [
        *body[:title],
        written(kept, "open", "markdown", badges(lesson, url)),
        written(kept, "start", "code", START.format(url=url)),
        *body[title:],
        written(kept, "navigation", "markdown", navigation(lesson, lessons)),
    ]
    seconds = notebook["metadata"].get("course", {}).get("seconds")
    if body and seconds is not None:
        body[title - 1]["source"] = re.sub(
            r"(?m)^(\*\*Time\*\* .*?)(, [^,\n]* of computing on two cores)?\.?[ ]*$",
            rf"\1, {friendly(seconds)} of computing on two cores.",
            source(body[title - 1]),
        )


def written(kept, name, kind, text):
    """Return the cell with this id and text: the stored one, with its outputs if its text stays, or a new one."""
    empty = {"execution_count": None, "outputs": []} if kind == "code" else {}
    cell = kept.get(name, {"cell_type": kind, "id": name, "metadata": {}, "source": "", **empty})
    if source(cell) != text:
        cell |= {"source": text, **empty}
    return cell


def badges(lesson, url):
    """Return the links that open a lesson's notebook on Google Cloud."""
    project = url.removeprefix("https://github.com/")
    path = f"notebooks/{lesson.path.name}"
    raw = f"https://raw.githubusercontent.com/{project}/main/{path}"
    quoted = quote(raw, safe="")
    return "\n".join(
        f"[![{text}](images/{image}.svg)]({link.format(project=project, path=path, raw=raw, quoted_raw=quoted)})"
        for text, image, link in PLACES
    )


def navigation(lesson, lessons):
    """Return the links to the lessons before and after this one."""
    place = [other.path for other in lessons].index(lesson.path)
    ways = (("Previous", lessons[:place][-1:]), ("Next", lessons[place + 1 :][:1]))
    return " · ".join(f"{word}: [{other.title}]({other.path.name})" for word, there in ways for other in there)


def friendly(seconds):
    """Say a duration as one would say it to a friend."""
    if seconds < 50:
        return f"about {max(10, round(seconds, -1)):.0f} seconds"
    minutes = max(1, round(seconds / 60))
    return f"about {minutes} minute{'s' if minutes > 1 else ''}"


def home(root):
    """Return the course's address on GitHub, from the one place that holds it."""
    settings = configparser.ConfigParser()
    settings.read(root / "setup.cfg")
    return settings["metadata"]["url"]


def source(cell):
    """Return a cell's text, which a stored notebook may hold in lines."""
    text = cell.get("source", "")
    return text if isinstance(text, str) else "".join(text)


def indented(lines):
    """Return lines as an indented list."""
    return "\n".join(f"    {line}" for line in lines)
