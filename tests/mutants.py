"""The bug zoo: put published bugs back into this project, one at a time, and run the tests.

Each mutant of tests/zoo.py runs in a copy of the tree and is killed if a test fails there. A module
that cannot be imported or collected is no kill: the tests must judge what the code does, not that
it is broken.

    python tests/mutants.py                        all, a few minutes on one core; exit code 1 if
                                                   one survives
    python tests/mutants.py kl-sign whiten-per-row these
    python tests/mutants.py --sample 5 --seed 3    five drawn at random
    python tests/mutants.py --list                 names, files and bugs; runs nothing
    python tests/mutants.py --write                all, and write the table into tests/README.md

To learn from it: print the change with `--show NAME`, apply it, train, and find the metric that
shows it first.
"""
import argparse
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from zoo import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "tests" / "README.md"
BEGIN = "<!-- mutants -->"
END = "<!-- /mutants -->"
LIMIT = 120   # seconds for the tests of one mutant, so that an endless loop is seen, too


def mutated(m, text):
    """Return the file's text with the bug. Raises ValueError unless the old text stands once."""
    n = text.count(m.old)
    if n != 1:
        raise ValueError(f"{m.name}: its old text stands {n} times in {m.file}, "
                         f"not once: {m.old!r}")
    return text.replace(m.old, m.new)


def copy_tree(source, target):
    """Copy what the tests need. The mtimes stay, so compiled test modules stay valid."""
    skip = shutil.ignore_patterns("out", ".*", "venv", "*.part")
    shutil.copytree(source, target, ignore=skip)
    return target


def pytest_in(tree, paths, report):
    """Run pytest on a copy and exit with its code; its output goes into the file `report`."""
    import pytest
    out = os.open(report, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    foreign = [p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests")]
    sys.path[:] = [str(tree)] + foreign
    sys.modules.pop("zoo", None)
    os.chdir(tree)
    code = pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *paths])
    sys.stdout.flush()
    os._exit(int(code))


def verdict_of(exitcode, output):
    """Read pytest's exit code and output -> ("passed" | "killed" | "broken", why)."""
    # Only a test that fails is a kill; pytest says ERROR if it cannot collect or set up a test.
    failed = re.search(r"^FAILED tests/test_(\S+)\.py::([^\s\[]+)", output, re.M)
    if exitcode == 0:
        return "passed", ""
    if exitcode == 1 and failed:
        return "killed", f"{failed[1]}: {failed[2]}"
    lines = re.findall(r"^(?:ERROR|E  ).*", output, re.M) or output.strip().splitlines()
    return "broken", lines[-1] if lines else "?"


def run_tests(tree, modules, limit):
    """Run test modules in a process -> (verdict, why).

    Where fork exists, the process inherits torch from main(); the project is imported only there.
    """
    report = Path(f"{tree}.txt")
    fork = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if fork else "spawn")
    paths = [f"tests/test_{m}.py" for m in modules]
    process = context.Process(target=pytest_in, args=(tree, paths, report))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "killed", f"time limit of {limit} s"
    return verdict_of(process.exitcode, report.read_text(encoding="utf-8", errors="replace"))


def judge(m, base, folder, limit=LIMIT):
    """Put one mutant into a copy of the tree `base` and run its tests -> (verdict, why)."""
    tree = copy_tree(base, Path(folder) / m.name)
    try:
        path = tree / m.file
        path.write_text(mutated(m, path.read_text(encoding="utf-8")), encoding="utf-8")
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()
        verdict, why = run_tests(tree, m.tests.split(), limit)
    finally:
        shutil.rmtree(tree)
    return {"passed": "SURVIVED", "broken": "BROKEN"}.get(verdict, verdict), why


def table(rows):
    """Format rows (mutant, test) as Markdown."""
    lines = ["| mutant | file | the bug, as published | killed by |", "|---|---|---|---|"]
    for m, test in rows:
        module, _, name = test.partition(": ")
        killer = f"{module}: `{name}`" if name else test
        cells = [f"`{m.name}`", m.file, f"{m.bug} ({m.published})", killer]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def write_table(rows):
    """Write the table between its two marks in tests/README.md."""
    text = f"# Tests\n\n{BEGIN}\n{END}\n"
    if README.exists():
        text = README.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{README}: needs one line {BEGIN} and one line {END}")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}", encoding="utf-8")


def parse(argv):
    """Return the command line's arguments; exit with one line for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run; default: all")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--show", metavar="NAME", help="print the change of one mutant")
    parser.add_argument("--sample", type=int, metavar="N", help="run N of them")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--write", action="store_true", help="write the table of tests/README.md")
    args = parser.parse_args(argv)
    named = args.names + ([args.show] if args.show else [])
    unknown = [name for name in named if name not in {m.name for m in MUTANTS}]
    if unknown:
        sys.exit(f"no such mutant: {', '.join(unknown)}; see --list")
    if args.write and (args.names or args.sample):
        sys.exit("--write needs all mutants, or the table would lose the others")
    return args


def run_all(chosen):
    """Run the mutants and print a line for each -> [(mutant, verdict, why)]."""
    os.environ["OMP_NUM_THREADS"] = "1"   # torch may only be forked while it has no threads
    os.environ.pop("PYTHONPATH", None)
    import pytest  # noqa: F401, for the forks
    import tiktoken  # noqa: F401
    import torch
    torch.optim.AdamW([torch.zeros(1)])   # the first optimizer imports half of torch: two seconds
    results = []
    with tempfile.TemporaryDirectory() as folder:
        base = copy_tree(ROOT, Path(folder) / "unchanged")
        modules = list(dict.fromkeys(t for m in chosen for t in m.tests.split()))
        start = time.time()
        verdict, why = run_tests(base, modules, 10 * LIMIT)   # also compiles the test modules
        print(f"unchanged: {verdict} {why} ({time.time() - start:.0f} s)", flush=True)
        if verdict != "passed":
            sys.exit("the tests fail without any mutant; fix that first")
        for i, m in enumerate(chosen, 1):
            try:
                verdict, why = judge(m, base, folder)
            except ValueError as e:
                verdict, why = "ERROR", str(e)
            results.append((m, verdict, why))
            print(f"{i:3d}/{len(chosen)}  {verdict:8}  {m.name:26} {m.file:16} {why}", flush=True)
    return results


def main(argv=None):
    args = parse(argv)
    by_name = {m.name: m for m in MUTANTS}
    if args.show:
        m = by_name[args.show]
        print(f"{m.file}: {m.bug} ({m.published})\n- {m.old}\n+ {m.new}")
        return 0
    chosen = [by_name[name] for name in args.names] or MUTANTS
    if args.sample:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    if args.list:
        for m in chosen:
            print(f"{m.name:26} {m.file:16} {m.bug}")
        return 0
    start = time.time()
    results = run_all(chosen)
    bad = [m.name for m, verdict, _ in results if verdict != "killed"]
    not_killed = f"; not: {', '.join(bad)}" if bad else ""
    cpu = sum(os.times()[:4])   # other programs may share the machine
    print(f"{len(results) - len(bad)} of {len(results)} killed in {time.time() - start:.0f} s, "
          f"{cpu:.0f} CPU seconds{not_killed}")
    if args.write and not bad:
        write_table([(m, why) for m, _, why in results])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
