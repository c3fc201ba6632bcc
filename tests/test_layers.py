"""The one-way rule: a module imports only from its own row of this table or from rows below it."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "pumice"
ROWS = [
    {"__main__"},
    {"cli", "serve"},
    {"tune", "report"},
    {"eval", "train"},
    {"api"},
    {"hub", "runtime", "methods"},
    {"kernels", "calib"},
    {"plan", "forms", "arch", "budget", "store"},
    {"sites", "recipe", "registry"},
    {"errors", "disk"},
]
LEVEL = {name: len(ROWS) - level for level, row in enumerate(ROWS) for name in row}
STRANGERS = [{"hub", "runtime", "methods"}]  # in one row, but never each other
HEAVY = {"transformers": {"arch", "hub", "train", "eval", "api", "serve"}}
ONE_FILE = ("fastapi", "lm_eval", "datasets", "triton", "matplotlib", "xllamacpp")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.name != "__init__.py")


def noun(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_never_run_up(path):
    me = noun(path)
    assert me in LEVEL, f"{me} has no row"
    for name in imports(path):
        if name.startswith("pumice."):
            other = name.split(".")[1]
            if other in LEVEL and other != me:
                assert LEVEL[other] <= LEVEL[me], f"{me} imports {name}, which is a row above it"
                assert not any({me, other} <= row for row in STRANGERS), f"{me} imports {name}"
        top = name.split(".")[0]
        assert me in HEAVY.get(top, {me}), f"{me} imports {top}"


@pytest.mark.parametrize("library", ONE_FILE)
def test_an_optional_library_is_imported_in_one_file(library):
    users = [path for path in FILES if any(name.split(".")[0] == library for name in imports(path))]
    assert len(users) <= 1, users
