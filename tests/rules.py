"""The rules of the course, each a function of a stored notebook and its path that returns a list of shortfalls.

A notebook is the JSON of its file as a dictionary. A shortfall names the cell. `RULES` holds all of them.
"""

import ast
import configparser
import importlib.metadata
import json
import re
import statistics
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
TAGS = {"parameters", "headline", "nbval-check-output", "exercise", "solution"}
ML = re.compile(
    r"\.fit\(|\.predict\(|\.compile\(|keras\.|tf\.\w+\(|jax\.|jnp\.|nnx\.|Dense\(|CREATE (OR REPLACE )?MODEL|Magika"
    r"|AutoML|TrainingJob|CustomJob|Endpoint|Model\.upload|\btrainer\.\w+"
    r"|\b(data|regression|strategy|containers|hardware)\.\w+\(",
    re.IGNORECASE,
)
SECRETS = re.compile(
    r"AIza[\w-]{35}|ya29\.[\w-]{20}|-----BEGIN [A-Z ]*PRIVATE KEY|\"private_key|gh[pousr]_\w{36}|AKIA[A-Z0-9]{16}"
    r"|Bearer [\w.-]{20}"
)


# Reading a notebook


def source(cell):
    """The text of a cell, which a file may hold in lines."""
    return joined(cell["source"])


def joined(text):
    """A text that a file may hold in lines."""
    return text if isinstance(text, str) else "".join(text)


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tags(cell):
    return cell["metadata"].get("tags", [])


def lines(cell):
    """The lines of a cell that are code: neither empty nor a comment."""
    return [line for line in source(cell).splitlines() if line.strip() and not line.strip().startswith("#")]


def tree(cell):
    """The syntax of a cell without its magics."""
    text = source(cell)
    plain = "" if text.startswith("%%") else re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", text)
    return ast.walk(ast.parse(plain))


def text(notebook):
    """All that a notebook says, written or computed, without the bytes of its pictures."""
    return re.sub(r"base64,[\w+/=\\]+", "base64,", json.dumps(notebook, ensure_ascii=False))


def said(notebook):
    """The markdown of a notebook."""
    return "\n\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def settings():
    """What setup.cfg says."""
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg", encoding="utf-8")
    return found


def requirements(listed):
    """The requirements in a list as setup.cfg holds it."""
    return [Requirement(line.partition("#")[0]) for line in listed.splitlines() if line.partition("#")[0].strip()]


def public_modules():
    """The modules that a lesson may import: the standard library's, and those of the course's requirements."""
    wanted = {
        requirement.name.lower().replace("_", "-")
        for requirement in requirements(settings()["options"]["install_requires"])
    }
    installed = importlib.metadata.packages_distributions()
    modules = {module for module, names in installed.items() if wanted & {n.lower().replace("_", "-") for n in names}}
    return modules | sys.stdlib_module_names


# The page


def opens_in_order(notebook, path):
    """Title with its four lines, badges, the cell that fetches the course, parameters."""
    cells = notebook["cells"]
    found = [cell["id"] for cell in cells[:3]] + [
        "parameters" if "parameters" in tags(cell) else cell["id"] for cell in cells[3:4]
    ]
    short = []
    if found != ["title", "open", "start", "parameters"]:
        short.append(f"the first cells are {found}, expected title, open, start and one tagged parameters")
    title = source(cells[0])
    for start, pattern in {
        "# a title": r"\A# \S",
        "**You will": r"^\*\*You will",
        "**Time** ... computing on two cores.": r"^\*\*Time\*\* .* computing on two cores\.$",
        "**Cost on the cloud** ...": r"^\*\*Cost on the cloud\*\* \S",
        "**Next** ...": r"^\*\*Next\*\* \S",
    }.items():
        if not re.search(pattern, title, re.MULTILINE):
            short.append(f"cell {cells[0]['id']}: no line {start!r}")
    return short


def closes_in_order(notebook, path):
    """A summary, three to six questions, and the way on."""
    short = []
    last = notebook["cells"][-1]
    if (last["id"], last["cell_type"]) != ("navigation", "markdown"):
        short.append(f"the last cell is {last['id']}, expected the text navigation")
    summary, _, questions = said(notebook).partition("\n## Questions\n")
    if not re.search(r"^## Summary$", summary, re.MULTILINE):
        short.append("no heading '## Summary' before '## Questions'")
    count = len(re.findall(r"^\d\. ", questions.partition("\n## ")[0], re.MULTILINE))
    if not 3 <= count <= 6:
        short.append(f"{count} numbered questions under '## Questions', expected three to six")
    return short


def names_what_it_does(notebook, path):
    """The file is NN_verb_object.ipynb, and the title begins with that verb."""
    if not re.fullmatch(r"\d\d(_[a-z0-9]+)+\.ipynb", path.name):
        return [f"{path.name} is not NN_verb_object.ipynb"]
    _, verb, *rest = path.stem.split("_")
    first = source(notebook["cells"][0]).split()[1:2]
    if rest and [verb] != [word.lower().rstrip(",") for word in first]:
        return [f"the title begins with {first}, the file's name with {verb!r}"]
    return []


def has_valid_ids(notebook, path):
    """Cells keep their ids: format 4.5, valid and unique."""
    short = []
    if (notebook["nbformat"], notebook["nbformat_minor"]) != (4, 5):
        short.append(f"format {notebook['nbformat']}.{notebook['nbformat_minor']}, expected 4.5")
    ids = [cell.get("id", "") for cell in notebook["cells"]]
    short += [f"cell {name!r}: not a valid id" for name in ids if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name)]
    return short + [f"cell {name}: an id used twice" for name in sorted(set(ids)) if ids.count(name) > 1]


def links_lead_somewhere(notebook, path):
    """Relative links and images in the text exist."""
    return [f"a link to {link}, which does not exist" for link in missing_links(said(notebook), path)]


def missing_links(markdown, path):
    """Relative links of a page at `path` that lead nowhere."""
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", markdown)
    parts = [urlsplit(markdown_link or html_link) for markdown_link, html_link in links]
    return [p.path for p in parts if not p.scheme and p.path and not (path.parent / unquote(p.path)).exists()]


def badges_open_this_file(notebook, path):
    """The badges open this very file from the course's home in setup.cfg; computed without lessons.py."""
    project = settings()["metadata"]["url"].removeprefix("https://github.com/")
    raw = f"https://raw.githubusercontent.com/{project}/main/notebooks/{path.name}"
    expected = [
        f"https://colab.research.google.com/github/{project}/blob/main/notebooks/{path.name}",
        f"https://console.cloud.google.com/vertex-ai/colab/import/{raw}",
        f"https://console.cloud.google.com/vertex-ai/workbench/deploy-notebook?download_url={raw}",
    ]
    cell = next((source(cell) for cell in notebook["cells"] if cell["id"] == "open"), "")
    found = [unquote(link) for link in re.findall(r"\]\((https://[^)]+)\)", cell)]
    return [] if found == expected else [f"cell open: the badges lead to {found}, expected {expected}"]


def describes_images_in_text(notebook, path):
    """An image in the text has alt text of its own."""
    alts = re.findall(r"!\[([^\]]*)\]\(", said(notebook))
    return [f"an image in the text has the alt text {alt!r}" for alt in alts if len(alt) < 8]


# The code


def starts_with_ml(notebook, path):
    """The first line of ML comes within two code cells and ten lines."""
    before = [0, 0]
    for cell in code_cells(notebook):
        if "parameters" in tags(cell):
            continue
        found = [bool(ML.search(line)) and not re.match(r"\s*(import|from)\b", line) for line in lines(cell)]
        if any(found):
            before[1] += found.index(True)
            break
        before = [before[0] + 1, before[1] + len(found)]
    cells, count = before
    return [] if cells < 2 and count <= 10 else [f"the first line of ML comes after {cells} cells and {count} lines"]


def has_short_cells(notebook, path):
    """A code cell has at most 15 lines."""
    sizes = {cell["id"]: len(lines(cell)) for cell in code_cells(notebook)}
    return [f"cell {name}: {size} lines, at most 15" for name, size in sizes.items() if size > 15]


def has_a_low_median(notebook, path):
    """Half of the code cells have at most 8 lines."""
    median = statistics.median(len(lines(cell)) for cell in code_cells(notebook))
    return [f"the median code cell has {median} lines, at most 8"] if median > 8 else []


def imports_public_libraries(notebook, path):
    """A lesson imports `helpers` and public libraries, and not the rooms of helpers that are the course's own."""
    allowed = public_modules() | {"helpers"}
    short = []
    for cell in code_cells(notebook):
        for node in tree(cell):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{'.' * node.level}{node.module or ''}.{name}" for name in names]
            for name in names:
                if name.partition(".")[0] not in allowed:
                    short.append(f"cell {cell['id']}: imports {name}, which is no requirement of the course")
                if re.match(r"helpers\.(course|local)\b", name):
                    short.append(f"cell {cell['id']}: imports {name}, which is not for lessons")
    return short


def shows_values(notebook, path):
    """A cell's last value is its result: nothing is printed."""
    return [
        f"cell {cell['id']}: prints; let the value be the cell's last line"
        for cell in code_cells(notebook)
        if any(isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" for node in tree(cell))
    ]


def asserts_its_numbers(notebook, path):
    """What is trained is asserted, at least twice."""
    count = sum(isinstance(node, ast.Assert) for cell in code_cells(notebook) for node in tree(cell))
    return [] if count >= 2 else [f"{count} asserts, at least two"]


def has_known_tags(notebook, path):
    """Tags mean something to the course."""
    return [
        f"cell {cell['id']}: unknown tag {tag!r}; there are {', '.join(sorted(TAGS))}"
        for cell in notebook["cells"]
        for tag in tags(cell)
        if tag not in TAGS
    ]


def has_a_headline(notebook, path):
    """One cell at least shows the lesson's finding."""
    return [] if any("headline" in tags(cell) for cell in code_cells(notebook)) else ["no cell tagged headline"]


def compares_exact_outputs(notebook, path):
    """One cell at least has an output that is compared in every test run; each such cell has one."""
    cells = [cell for cell in code_cells(notebook) if "nbval-check-output" in tags(cell)]
    short = [f"cell {cell['id']}: nothing stored to compare" for cell in cells if not cell["outputs"]]
    return short if cells else ["no cell tagged nbval-check-output"]


def knows_no_tests(notebook, path):
    """No branch and no skip for a test run."""
    found = re.findall(
        r"IS_TESTING|CI_RUN|PYTEST_CURRENT_TEST|(?i:nbval-skip|nbval_skip)|environ[^\n]{0,7}\bCI\b", text(notebook)
    )
    return [f"a branch or a skip for tests: {word}" for word in found]


# What is stored


def is_one_run(notebook, path):
    """The stored outputs are those of one run from top to bottom."""
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    expected = list(range(1, len(counts) + 1))
    return [] if counts == expected else [f"execution counts are {counts}, expected 1 to {len(counts)}"]


def has_no_red_box(notebook, path):
    """Nothing was written to standard error, and nothing failed."""
    return [
        f"cell {cell['id']}: a stored {output.get('ename', 'red box (stderr)')}"
        for cell in code_cells(notebook)
        for output in cell["outputs"]
        if output["output_type"] == "error" or output.get("name") == "stderr"
    ]


def describes_figures(notebook, path):
    """A figure is an HTML image with alt text, so that who cannot see it is told."""
    short = []
    for cell in code_cells(notebook):
        for data in (output.get("data", {}) for output in cell["outputs"]):
            if {"image/png", "image/jpeg", "image/svg+xml"} & set(data):
                short.append(f"cell {cell['id']}: a bare image")
            for image in re.findall(r"<img\b[^>]*>", joined(data.get("text/html", ""))):
                if not re.search(r"\balt=(\"[^\"]{20,}\"|'[^']{20,}')", image):
                    short.append(f"cell {cell['id']}: a figure without alt text of 20 characters")
    return short


def is_small(notebook, path):
    """A stored notebook stays under 400 KB."""
    size = len(json.dumps(notebook, indent=1, ensure_ascii=False).encode())
    return [] if size < 400_000 else [f"{size / 1000:.0f} KB, at most 400"]


def names_no_machine(notebook, path):
    """No absolute path of the machine on which it was written or run."""
    return [
        f"the path {found}"
        for found in re.findall(r"(?<![\w.:/<-])/(?:root|home|work|tmp|Users)\b[\w/.-]*", text(notebook))
    ]


def holds_no_secrets(notebook, path):
    """Nothing that looks like a credential."""
    return [f"what looks like a credential: {found[:12]}..." for found in SECRETS.findall(text(notebook))]


RULES = [
    opens_in_order,
    closes_in_order,
    names_what_it_does,
    has_valid_ids,
    links_lead_somewhere,
    badges_open_this_file,
    describes_images_in_text,
    starts_with_ml,
    has_short_cells,
    has_a_low_median,
    imports_public_libraries,
    shows_values,
    asserts_its_numbers,
    has_known_tags,
    has_a_headline,
    compares_exact_outputs,
    knows_no_tests,
    is_one_run,
    has_no_red_box,
    describes_figures,
    is_small,
    names_no_machine,
    holds_no_secrets,
]
