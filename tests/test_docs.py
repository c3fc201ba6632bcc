"""The documentation is true: its tables are made from the code, its commands and its Python are run."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pumice import registry
from pumice.calib import sources
from pumice.cli import demo
from pumice.report.methods import markdown
from test_cli import STORIES, write_tokenizer
from test_cli import pumice as command
from tiny import tiny

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
METHODS = [entry.name for entry in registry.methods().values() if entry.when in registry.WHEN]
FENCE = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def fill():
    spec = importlib.util.spec_from_file_location("fill", ROOT / "docs" / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def shorter_texts():
    """Enough of the builtin texts for the commands of the pages."""
    texts = {split: sources.read("builtin", split)[:60] for split in ("train", "test")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "builtin", lambda split: texts[split])
        yield


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty folder to stand in, with a small model under the name that the pages use."""
    if STORIES.exists():
        shutil.copytree(STORIES, tmp_path / "smollm2", copy_function=shutil.copyfile)
    else:
        tiny("llama", vocab_size=259, max_position_embeddings=512).save_pretrained(tmp_path / "smollm2")
        write_tokenizer(tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Mark, language and body of every fenced block."""
    return [(found["mark"] or "", found["language"], found["body"]) for found in FENCE.finditer(page.read_text())]


def write_files(page: Path, folder: Path) -> None:
    for mark, _, body in blocks(page):
        if mark.startswith("file: "):
            (folder / mark.removeprefix("file: ")).write_text(body)


def run_python(page: Path) -> None:
    """The marked blocks in order, in one namespace, as a reader would type them."""
    namespace: dict = {}
    for mark, language, body in blocks(page):
        if language == "python":
            assert mark == "run" or mark.startswith("file: "), f"{page.name} has Python that no test runs:\n{body}"
        if mark == "run":
            exec(compile(body, str(page), "exec"), namespace)


def commands(page: Path) -> list[list[str]]:
    lines = [line for _, language, body in blocks(page) if language == "sh" for line in body.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("pumice ")]


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_the_readme_lists_the_methods_that_there_are():
    found = re.search(r"<!-- methods -->\n(.*?)<!-- /methods -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found, "README.md needs the marks <!-- methods --> and <!-- /methods -->"
    assert found[1].strip() == markdown(), "run `python docs/fill.py README.md`, or paste `pumice methods --markdown`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_parts_are_those_that_the_code_makes(page, fill):
    def results_may_be_newer(text: str) -> str:
        return re.sub(r"(<!-- figures \w+ -->\n)None is committed yet.*?(<!-- /figures -->)", r"\1\2", text, flags=re.S)

    text = page.read_text()
    expected = fill.filled(text)
    if "None is committed yet" in text:
        expected = re.sub(r"(<!-- figures \w+ -->\n).*?(<!-- /figures -->)", r"\1\2", expected, flags=re.S)
        text = results_may_be_newer(text)
    assert text == expected, f"run `python docs/fill.py {page.relative_to(ROOT)}`"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_with_its_settings_paper_and_costs(name):
    text = (ROOT / "docs/methods" / f"{name}.md").read_text()
    parts = [f"<!-- settings {name} -->", f"<!-- figures {name} -->", "## When to use it", "## What it costs"]
    assert all(part in text for part in [*parts, "arxiv.org/abs/"])


def test_no_page_is_of_a_method_that_is_gone():
    assert {page.stem for page in (ROOT / "docs/methods").glob("*.md")} == set(METHODS)


def test_a_block_is_filled_from_a_result(fill, tmp_path, monkeypatch):
    machine = {"cpu": "CPU", "threads": 2, "torch": "2"}
    run = {
        "recipe": [{"method": "griffin"}],
        "model": "smollm2",
        "prompt": 8,
        "new": 4,
        "repeats": 1,
        "dtype": "float32",
    }
    run |= {"sparsity": 0.5, "speedup": 1.234, "bytes_bound": 1.5, "machine": machine}
    (tmp_path / "griffin_speed.json").write_text(json.dumps({"runs": [run]}))
    row = {"method": "griffin", "select": "random", "sparsity": 0.5, "achieved_sparsity": 0.5, "perplexity": 97.04}
    row |= {"ratio": 3.9, "ratio_95": [3.5, 4.2], "standard_error": 9.0}
    rows = [{"method": "dense", "perplexity": 24.5, "standard_error": 1.0}, row]
    protocol = {"source": "wiki", "windows": 16, "window": 512}
    data = {"protocol": protocol, "prompt": 256, "rows": rows, "machine": machine}
    (tmp_path / "prompt_level.json").write_text(json.dumps(data))
    monkeypatch.setattr(fill, "RESULTS", tmp_path)
    text = fill.filled("a\n<!-- figures griffin -->\nold\n<!-- /figures -->\nb")
    assert "| float32 | 0.5000 | 1.23× | 1.50× |" in text and "old" not in text
    assert "| `select=random` | 0.5000 | 97.04 | 3.90× [3.50, 4.20] |" in text and text.endswith("<!-- /figures -->\nb")
    assert "None is committed yet" in fill.figures("glass")


# ---- links and words ------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short_and_code_is_named_as_it_is(page):
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert len(line) <= 120 or line.startswith("|") or line.startswith("`python "), f"{page.name}:{number}"
    for script in re.findall(r"bench/(\w+\.py)", page.read_text()):
        assert (ROOT / "bench" / script).exists(), script
    for file in re.findall(r"`((?:arch|calib|runtime|methods|tests|docs)/\w+\.\w+)`", page.read_text()):
        assert (ROOT / "src/pumice" / file).exists() or (ROOT / file).exists() or "peak" in file, file


# ---- code -----------------------------------------------------------------------------------------------------------


def test_quickstart_commands_run(work):
    page = ROOT / "docs/quickstart.md"
    write_files(page, work)
    for arguments in commands(page):
        result = command(*arguments)
        assert result.code == 0, (arguments, result.err)


def test_quickstart_python_runs(work, capsys):
    run_python(ROOT / "docs/quickstart.md")
    assert "dense" in capsys.readouterr().out


def test_the_method_of_the_page_runs_from_python(work, capsys):
    page = ROOT / "docs/add-a-method.md"
    write_files(page, work)
    run_python(page)
    assert capsys.readouterr().out


def test_the_method_of_the_page_runs_as_a_package(work, monkeypatch):
    """Installed as pip would: a module on the path, and a dist-info with the entry points of its pyproject.toml."""
    page = ROOT / "docs/add-a-method.md"
    write_files(page, work)
    project = tomllib.loads((work / "pyproject.toml").read_text())["project"]
    info = work / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["pumice.methods"].items()
    (info / "entry_points.txt").write_text("[pumice.methods]\n" + "".join(f"{k} = {v}\n" for k, v in points))
    outputs = {arguments[0]: command(*arguments) for arguments in commands(page)}
    assert all(result.code == 0 for result in outputs.values()), [result.err for result in outputs.values()]
    assert "peak" in outputs["methods"].out and "recipe: method=peak" in outputs["inspect"].out
    assert "peak" not in markdown(), "the README lists Pumice's own methods"
    refused = command("sparsify", "smollm2", "--method", "peak", "--power", "-1", "--out", "x")
    assert refused.code == 1 and "peak.power is at least 0" in refused.err
    (work / "peak.py").unlink()
    (info / "entry_points.txt").unlink()
    assert command("eval", "smol-peak", "--window", "32", "--windows", "2").code == 0, "a plan is data, not code"


def test_the_method_of_the_page_runs_as_a_file_in_pumice(work):
    """A copy of the package with one more file in `methods/static`."""
    write_files(ROOT / "docs/add-a-method.md", work)
    copy = work / "source" / "pumice"
    shutil.copytree(ROOT / "src" / "pumice", copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.move(work / "peak.py", copy / "methods" / "static" / "peak.py")
    # the finder of an editable install comes before PYTHONPATH
    first = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__]; "
    code = (
        "import pumice; from pumice import recipe; print(recipe.describe(pumice.Peak(pattern='2:4')), pumice.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(work / "source")}
    command = [sys.executable, "-c", first + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert str(copy) in done.stdout and "'method': 'peak'" in done.stdout, done.stderr
    command = [sys.executable, "-c", first + "from pumice.cli.main import run; run()", "methods", "--json"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True)
    cards = {card["name"]: card for card in json.loads(listed.stdout)["methods"]}
    assert cards["peak"]["decides"] == "static" and cards["peak"]["about"].startswith("in each output row drop")


def test_the_readme_shows_the_rows_that_the_demo_has():
    shown = (ROOT / "README.md").read_text().partition("<!-- demo -->")[2].partition("<!-- /demo -->")[0]
    rows = re.findall(r"^(\w+) 0\.\d ", shown, re.MULTILINE)
    assert tuple(dict.fromkeys(rows)) == demo.METHODS
