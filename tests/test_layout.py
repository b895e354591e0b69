"""Tests of the source itself: width, imports, and which modules may import which."""

import ast
import functools
import sys
from typing import NamedTuple

import pytest

from tiny import ROOT

FOLDERS = ["scaffold", "data", "lab", "course", "results", "tests"]
FILES = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))])
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
PAGES = ["README.md", *(f"{f}/README.md" for f in ("data", "results", "tests", "course"))]

# A module may import modules of a lower number, and modules of its own folder.
RANKS = {
    "scaffold": 0,
    "data": 1,
    "gpt": 2,
    "sft": 3,
    "reward": 4,
    "gae": 4,
    "ppo": 5,
    "dpo": 5,
    "evaluate": 6,
    "tools": 7,
    "self_instruct": 7,
    "self_reward": 8,
    "chat": 8,
    "lab": 9,
    "course": 9,
    "results": 9,
}
# Imports inside a function that go up, with their reasons.
EXCEPTIONS = {
    ("data.beam", "gpt"): "beam search needs its KV cache",
    ("data.beam", "sft"): "it renders the chats",
    ("data.huggingface", "gpt"): "it reads the checkpoint to export",
    ("data.labelers", "gpt"): "simulated labelers rank samples of the SFT model",
    ("data.labelers", "sft"): "the same",
    ("sft", "reward"): "--select reward",
    ("ppo", "lab.report"): "the table and the page at the end",
    ("chat", "lab.tokens"): "--inspect",
    ("self_instruct", "lab.instruction_quality"): "measures of the tasks it made",
    ("self_reward", "lab.judge_quality"): "measures of its table",
}
REQUIRED = {"torch", "numpy", "tiktoken", "tqdm"}
# imported only where a user asks for them
OPTIONAL = {"safetensors", "tokenizers", "matplotlib", "wandb"}
ZOO = {"mutants", "zoo"}  # of tests/; lab/break_it.py puts these bugs into a copy


class Import(NamedTuple):
    module: str  # as written, such as data.text
    names: tuple  # of `from module import names`; empty for `import module`
    lazy: bool  # inside a function
    line: int


@functools.cache
def tree_of(path):
    """Return the syntax tree of a file. It is read by many tests and parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(path):
    """Return every Import of a file."""
    found = []

    def visit(node, lazy):
        if isinstance(node, ast.Import):
            found.extend(Import(a.name, (), lazy, node.lineno) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(a.name for a in node.names)
            found.append(Import(node.module or "", names, lazy, node.lineno))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(tree_of(path), False)
    return found


def module_name(path):
    """Return the dotted name of a file: data/text.py is data.text."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(p): p for p in FILES if p.relative_to(ROOT).parts[0] != "tests"}


def targets(imported):
    """Return the modules of this repository that an Import loads."""
    submodules = [f"{imported.module}.{name}" for name in imported.names]
    found = [name for name in submodules if name in MODULES]
    if imported.module in MODULES:
        found.append(imported.module)
    return found


def arrows():
    """Return (from, to, lazy, line) for each import between two modules of this repository."""
    return [
        (name, target, imported.lazy, imported.line)
        for name, path in MODULES.items()
        for imported in imports_of(path)
        for target in targets(imported)
    ]


def rank(module):
    return RANKS[module.split(".")[0]]


def goes_up(source, target):
    same_folder = "." in source and source.split(".")[0] == target.split(".")[0]
    return not same_folder and rank(target) >= rank(source)


@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_longer_than_100_columns(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == []


@pytest.mark.parametrize("name", [*NAMES, *PAGES])
def test_no_file_has_the_marks_of_an_unfinished_merge(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    assert [n for n, line in enumerate(lines, 1) if line.startswith(marks)] == []


def test_every_module_has_a_rank():
    assert {name.split(".")[0] for name in MODULES} - {"conftest"} <= set(RANKS)


def test_no_import_goes_up():
    up = {
        f"{source}:{line} imports {target}"
        for source, target, lazy, line in arrows()
        if goes_up(source, target) and not (lazy and (source, target) in EXCEPTIONS)
    }
    assert up == set()


def test_every_exception_is_used():
    lazy = {(source, target) for source, target, is_lazy, _ in arrows() if is_lazy}
    assert set(EXCEPTIONS) <= lazy


def test_imports_make_no_circle():
    """Imports at the top of the files, and those inside functions that are no exceptions."""
    graph = {name: set() for name in MODULES}
    for source, target, _, _ in arrows():
        if (source, target) not in EXCEPTIONS:
            graph[source].add(target)
    while True:
        leaves = {name for name, known in graph.items() if not known}
        if not leaves:
            break
        graph = {name: known - leaves for name, known in graph.items() if name not in leaves}
    assert graph == {}, "these import each other"


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_what_is_required(name):
    for imported in imports_of(MODULES[name]):
        root = imported.module.split(".")[0]
        if name == "conftest" and root == "pytest":
            continue
        local = {module.split(".")[0] for module in MODULES}
        allowed = sys.stdlib_module_names | local | REQUIRED
        if imported.lazy:
            allowed = allowed | OPTIONAL
        if name == "lab.break_it":
            allowed = allowed | ZOO
        assert root in allowed, f"line {imported.line}"


@functools.cache
def imported_names(path):
    """Return {name in this file: line} for every import; `import a.b` makes the name a."""
    names = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = node.lineno
    return names


@pytest.mark.parametrize("name", NAMES)
def test_every_imported_name_is_used(name):
    """A name has one home and is imported from there: no module passes names on."""
    path = ROOT / name
    lines = path.read_text(encoding="utf-8").splitlines()
    used = {node.id for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name)}
    unused = {n: line for n, line in imported_names(path).items() if n not in used}
    assert [n for n, line in unused.items() if "noqa: F401" not in lines[line - 1]] == []


@pytest.mark.parametrize("name", NAMES)
def test_names_are_imported_from_the_module_that_defines_them(name):
    """`from gpt import UserError` would work wherever gpt imports it, too."""
    for imported in imports_of(ROOT / name):
        if imported.module in MODULES:
            passed_on = set(imported.names) & set(imported_names(MODULES[imported.module]))
            assert passed_on == set(), f"line {imported.line}"


@pytest.mark.parametrize("name", NAMES)
def test_one_import_a_line(name):
    tree = tree_of(ROOT / name)
    several = [n for n in ast.walk(tree) if isinstance(n, ast.Import) and len(n.names) > 1]
    assert [node.lineno for node in several] == []


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith("results")])
def test_every_script_is_started_by_cli(name):
    """There is one place for flags, user errors and consoles that are not UTF-8."""
    path = MODULES[name]
    text = path.read_text(encoding="utf-8")
    last = text.split('if __name__ == "__main__":\n')[-1]
    started = "\n    start(main, Config, __doc__" in "\n" + last
    assert started == ('__name__ == "__main__"' in text) or name == "scaffold.cli"
    assert "argparse" not in text or name == "scaffold.cli"


def called(node):
    """Return the name that a call ends with: glob for path.glob(...), "" for other nodes."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


@pytest.mark.parametrize("name", MODULES)
def test_nothing_depends_on_the_order_of_a_folder(name):
    """The file system decides it: a copied folder would give other data, or another checksum."""
    nodes = list(ast.walk(tree_of(MODULES[name])))
    in_order = {x for node in nodes if called(node) == "sorted" for x in ast.walk(node)}
    listings = [n for n in nodes if called(n) in ("glob", "rglob", "iterdir", "listdir", "scandir")]
    assert [node.lineno for node in listings if node not in in_order] == []


@pytest.mark.parametrize("name", MODULES)
def test_no_list_is_made_from_a_set(name):
    """Its order would differ from process to process; take list(dict.fromkeys(...)) or sorted."""
    for node in ast.walk(tree_of(MODULES[name])):
        if called(node) in ("list", "tuple") and node.args:
            [made_from] = node.args
            is_set = isinstance(made_from, ast.Set | ast.SetComp) or called(made_from) == "set"
            assert not is_set, f"line {node.lineno}"
