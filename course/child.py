"""The process that runs a student's code: it computes outputs and judges nothing.

course/grader.py calls `main` with `python -I`, in a copy of the project in which every graded
function is cut out, so that there is no right answer here to copy. job.json in the folder names the
parts to run; each result is one line of JSON in result.jsonl, written as soon as it is known. The
same `transplant` and `run` serve the grader for code that it trusts.

This keeps honest mistakes and simple tricks apart from the grader. It is no sandbox.
"""
import ast
import builtins
import contextlib
import functools
import importlib
import io
import json
import math
import os
import random
import sys
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F

from course import probes

TREE = Path(__file__).resolve().parent.parent

LARGEST = 20_000   # numbers in one output
MEMORY = 4 * 2**30   # bytes of address space
WRITTEN = 50 * 2**20   # bytes of a file, printed lines included


@functools.lru_cache(64)
def parsed(text):
    return ast.parse(text)


def find(tree, name):
    """Return the definition of "function" or "Class.method" in a syntax tree, None if missing."""
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [n for n in tree.body if isinstance(n, kinds) and n.name == part]
        if not found:
            return None
        tree = found[-1]   # the last definition is the one that Python calls
    return tree


def names_of(nodes):
    """Return the names that statements define or import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.Assign):
            names |= {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return names


def new_in(ours, theirs):
    """Return the definitions, imports and constants of `theirs` that `ours` does not have."""
    known = names_of(ours.body)
    return [node for node in theirs.body if names_of([node]) - known]


def transplant(module, text, clean, names, filename):
    """Compile functions of a student's file as members of a clean module.

    text, clean: the student's file and the file as it was handed out. names: the functions to take,
    "function" or "Class.method"; top-level helpers and methods that `clean` does not have come
    along, nothing else. Returns (namespace, {name: function}). Raises LookupError, SyntaxError and
    what running the definitions raises.
    """
    tree = ast.parse(text, filename)
    ours = parsed(clean)
    helpers = new_in(ours, tree)
    wanted = {}
    for name in names:
        node = find(tree, name)
        if node is None:
            raise LookupError(f"{name} is missing from {filename}")
        wanted[name] = node
        if "." in name:
            owner = name.split(".")[0]
            for method in new_in(find(ours, owner), find(tree, owner)):
                if isinstance(method, ast.FunctionDef):
                    wanted.setdefault(f"{owner}.{method.name}", method)
    namespace = dict(vars(module))
    exec(compile(ast.Module(helpers, []), filename, "exec"), namespace)
    functions = {}
    for name, node in wanted.items():
        exec(compile(ast.Module([node], []), filename, "exec"), namespace)
        functions[name] = namespace[node.name]
    return namespace, functions


@contextlib.contextmanager
def in_place(module, namespace, functions, stand_ins):
    """Make functions members of their module, and stand-ins of every project module; undo it.

    stand_ins: {name: function}. A probe brings them for what a graded function calls and what is
    graded elsewhere, so that one unsolved function does not sink another.
    """
    changed = []

    def put(owner, name, value):
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    for name, function in functions.items():
        owner, _, method = name.rpartition(".")
        if owner:
            cls = getattr(module, owner)
            if hasattr(cls, method):
                put(cls, method, function)
            else:
                setattr(cls, method, function)
        else:
            put(module, name, function)
    folders = {str(TREE), str(TREE / "data"), str(TREE / "scaffold")}
    ours = [m for m in list(sys.modules.values()) if stand_ins
            and os.path.dirname(getattr(m, "__file__", None) or "") in folders]
    for name, value in stand_ins.items():
        for other in ours:
            if hasattr(other, name):
                put(other, name, value)
    namespace.update({n: v for n, v in stand_ins.items() if n in namespace})
    try:
        yield
    finally:
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)


def plain(x):
    """Turn a result into JSON: tensors and numbers keep shape, kind and values."""
    if torch.is_tensor(x):
        if x.numel() > LARGEST:
            return {"error": f"a result of {x.numel():,} numbers"}
        values = x.detach().double().flatten().tolist()
        return {"shape": list(x.shape), "dtype": str(x.dtype)[6:], "values": values}
    if isinstance(x, bool | int | float):
        try:
            return {"shape": [], "dtype": type(x).__name__, "values": [float(x)]}
        except OverflowError:
            return {"error": "a number that is too large"}
    if isinstance(x, list | tuple) and len(x) <= LARGEST:
        return [plain(item) for item in x]
    if isinstance(x, dict):
        return [[str(k), plain(v)] for k, v in sorted(x.items(), key=str)]
    if x is None or isinstance(x, str):
        return str(x)[:500]
    return {"error": f"a result of type {type(x).__name__}"}


def error_of(e, filename):
    """Describe an exception -> {"error", "line"}; line is the last in the student's file."""
    frames = traceback.walk_tb(e.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == filename]
    message = " ".join(str(e).split())[:300]
    line = lines[-1] if lines else getattr(e, "lineno", None) or 0
    return {"error": f"{type(e).__name__}: {message}", "line": line}


def run(case, function, filename=""):
    """Run one case of a probe -> JSON. An exception is a result, too."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    try:
        return plain(case.run(function))
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as e:   # SystemExit is a mistake like any other
        return error_of(e, filename)


def run_part(part, text, clean, seed, filename):
    """Run all cases of one part on one file -> {case: result}, or {"": why it cannot run}."""
    module = importlib.import_module(part["module"])
    cases, stand_ins = probes.of(part["name"], seed)
    try:
        namespace, functions = transplant(module, text, clean, part["functions"], filename)
    except BaseException as e:
        return {"": error_of(e, filename)}
    with in_place(module, namespace, functions, stand_ins):
        function = functions[part["functions"][0]]
        return {case.name: run(case, function, filename) for case in cases}


OWNERS = {"torch": torch, "torch.nn.functional": F, "torch.Tensor": torch.Tensor,
          "torch.nn.Module": torch.nn.Module, "math": math, "json": json, "random": random,
          "builtins": builtins, "the probes": probes}


class Watch:
    """Notices what a student's function should leave alone: files, processes, torch."""

    def __init__(self, folders):
        self.folders = [str(Path(f).resolve()) for f in folders]
        self.found = []
        self.active = False
        self.before = {name: dict(vars(owner)) for name, owner in OWNERS.items()}

    def allowed(self, path):
        if isinstance(path, int):
            return True
        path = str(Path(str(path)).resolve())
        return any(path.startswith(folder) for folder in self.folders)

    def __call__(self, event, args):
        if not self.active:
            return
        reads = event in ("open", "os.listdir", "os.scandir", "os.chdir")
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        starts = event.startswith(("subprocess.", "socket.", "ctypes.dlopen", "os.exec", "os.fork",
                                   "os.posix_spawn", "os.spawn", "os.system", "os.kill"))
        removes = event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate")
        self.active = False   # resolving a path must not ask again
        try:
            refused = starts or removes or writes or (reads and not self.allowed(args[0]))
            if refused:
                what = f"{event} {args[0]}" if args else event
                self.found.append(" ".join(str(what).split())[:200])
        finally:
            self.active = True
        if refused:
            raise PermissionError(f"a check does not allow {event}")

    def changes(self):
        """Return what was changed of torch and others, after putting it back."""
        changed = []
        for name, owner in OWNERS.items():
            before = self.before[name]
            now = dict(vars(owner))
            added = set(now) - set(before) if name == "torch.Tensor" else set()
            for key in added:
                delattr(owner, key)
            other = [k for k, v in before.items() if k in now and now[k] is not v]
            for key in other:
                if not key.startswith("__"):
                    setattr(owner, key, before[key])
                    changed.append(f"{name}.{key}")
            changed += [f"{name}.{key}" for key in added]
        return changed


def limit_resources():
    """Cap written files and, where that is known to work, the address space."""
    if sys.platform != "win32":
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
        if sys.platform == "linux" and torch.version.cuda is None:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def main(folder):
    folder = Path(folder)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    results = open(folder / "result.jsonl", "a", encoding="utf-8", buffering=1)
    torch.set_num_threads(1)
    for part in job["parts"]:
        importlib.import_module(part["module"])
        probes.of(part["name"], job["seed"])
    limit_resources()
    # A SyntaxError looks for its file in the current folder.
    watch = Watch([folder, TREE, sys.prefix, sys.base_prefix, Path(torch.__file__).parent.parent])
    sys.addaudithook(watch)
    results.write(json.dumps({"ready": True}) + "\n")
    for part in job["parts"]:
        watch.found.clear()
        printed = io.StringIO()
        watch.active = True
        with contextlib.redirect_stdout(printed):
            outputs = run_part(part, job["files"][part["file"]], part["clean"], job["seed"],
                               part["file"])
        watch.active = False
        row = {"part": part["name"], "outputs": outputs, "refused": list(watch.found),
               "changed": watch.changes(), "printed": printed.getvalue()[:1000]}
        results.write(json.dumps(row) + "\n")
