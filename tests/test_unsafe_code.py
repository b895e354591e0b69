"""No file of the project unpickles, evaluates or executes what it reads.

The check reads source code. It knows the usual ways to run code from a file, and the tests at the
end show which.
"""
import ast

import pytest

from tiny import ROOT

UNSAFE_MODULES = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"
}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_ATTRIBUTES = {
    "os.system", "os.popen", "torch.jit.load", "torch.package", "builtins.eval", "builtins.exec"
}
# The course's grader runs the functions that students hand in, in a process of their own.
PURPOSE = {"course/child.py": {"exec", "compile"}}
UNSAFE_IMPORTS = UNSAFE_BUILTINS | {"load", "system", "popen"}  # from torch, os, numpy, builtins


def unsafe(source):
    """Return what in a program could run code from a file, as a list of (line, name)."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        name = unsafe_name(node, tree)
        if name:
            line = node.value.lineno if isinstance(node, ast.keyword) else node.lineno
            found.append((line, name))
    return found


def unsafe_name(node, tree):
    """Return the unsafe name in a node of a syntax tree, or None."""
    if isinstance(node, ast.Import):
        modules = [alias.name.split(".")[0] for alias in node.names]
        return next((m for m in modules if m in UNSAFE_MODULES), None)
    if isinstance(node, ast.ImportFrom):
        return unsafe_import(node)
    if isinstance(node, ast.Name):
        return node.id if node.id in UNSAFE_BUILTINS else None
    if isinstance(node, ast.Attribute):
        return unsafe_attribute(node, tree)
    if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle"):
        return None if is_constant(node.value, False) else node.arg
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value if node.value in UNSAFE_MODULES else None  # import_module("pickle")
    return None


def unsafe_import(node):
    module = (node.module or "").split(".")[0]
    names = {alias.name for alias in node.names}
    if module in UNSAFE_MODULES:
        return module
    if module in ("torch", "os", "numpy", "builtins") and names & UNSAFE_IMPORTS:
        return module
    return None


def unsafe_attribute(node, tree):
    name = ast.unparse(node)
    if name in UNSAFE_ATTRIBUTES:
        return name
    if name not in ("torch.load", "np.load", "numpy.load"):
        return None
    calls = [c for c in ast.walk(tree) if isinstance(c, ast.Call) and c.func is node]
    arguments = [argument for call in calls for argument in call.keywords]
    if any(a.arg == "weights_only" and is_constant(a.value, True) for a in arguments):
        return None
    if calls and name != "torch.load":  # numpy unpickles only with allow_pickle
        return None
    return name


def is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_unpickles_evaluates_or_executes():
    found = {}
    for folder in (ROOT, ROOT / "data", ROOT / "scaffold", ROOT / "lab", ROOT / "course"):
        for path in folder.glob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            places = unsafe(path.read_text(encoding="utf-8"))
            found[name] = [p for p in places if p[1] not in PURPOSE.get(name, ())]
    assert len(found) > 15
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.parametrize("source", [
    "import pickle",
    "import os, marshal as m",
    "from pickle import loads",
    "import yaml",
    "from torch import load",
    "import importlib; importlib.import_module('pickle')",
    "eval('1')",
    "f = exec",
    "print(list(map(eval, x)))",
    "__import__('os')",
    "compile(x, '', 'exec')",
    "import builtins; builtins.eval(x)",
    "torch.load(p)",
    "torch.load(p, weights_only=False)",
    "torch.load(p, weights_only=w)",
    "f = torch.load",
    "np.load(p, allow_pickle=True)",
    "subprocess.run(x, shell=True)",
    "subprocess.run(x, shell=s)",
    "os.system(x)",
    "from os import system",
])
def test_unsafe_code_is_found(source):
    assert unsafe(source)


@pytest.mark.parametrize("source", [
    "import evaluate\nevaluate.main(cfg)",
    "model.eval()",
    "torch.load(p, weights_only=True)",
    "re.compile(x)",
    "subprocess.run([x])",
    "json.load(f)",
    "np.load(p)",
    "shell = 1",
])
def test_safe_code_is_not_found(source):
    assert not unsafe(source)
