"""Makes what students get: the project with some functions cut out, and the grader.

Only files of an allowlist go in, with "\\n" as the line end. Then every file is scanned: no line
that was removed, and no renamed copy of one, may stand anywhere in the handout. For teachers only.
"""
import builtins
import functools
import io
import json
import keyword
import re
import tokenize
import zipfile
from pathlib import Path

from course import sheet as sheets
from scaffold.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
LABS = [f"lab/{name}.py" for name in (   # what the scripts import
    "instruction_quality", "judge_quality", "report", "charts", "healthy", "replay", "run_files",
    "samples", "tokens")]
ALLOWED = ["LICENSE", "conftest.py", "gpt.py", "sft.py", "reward.py", "gae.py", "ppo.py", "dpo.py",
           "evaluate.py", "self_instruct.py", "self_reward.py", "tools.py", "chat.py", "data/*.py",
           "data/tokenizer.json", "data/README.md", "scaffold/*.py", *LABS, "course/kit.py",
           "course/grader.py", "course/child.py", "course/probes.py", "course/tasks.py",
           "tests/tiny.py", "tests/test_tokenizer.py", "tests/test_table.py",
           "tests/test_encodings.py"]
# Statements of the solution that other code in the handout has for reasons of its own.
IDIOMS = {"for layer , kv in enumerate ( self . kv ) :",
          "starts = torch . tensor ( [ len ( p ) for p in prompts ] , device = device )",
          "scores = in_parts ( reward_model . score , cfg . grad_accum , ids , lengths )"}
SHORT = 28   # a removed line up to this length may stand elsewhere
FEW = 11      # a renamed statement of so many tokens or fewer may, too
KEPT = {"torch", "F", "math", "random", "self", "nn"} | set(dir(builtins))

VISIBLE_TESTS = '''\
"""One test per property of the functions to write. They fail until a function is written."""
import functools

import pytest

from course import grader, kit

SHEET = kit.load_sheet()
PROPERTIES = [(name, part["name"], concept["name"])
              for name, assignment in SHEET["assignments"].items()
              for part in assignment["parts"] for concept in part["concepts"]]


@functools.cache
def findings(name):
    return grader.check(SHEET["assignments"][name], kit.ROOT, SHEET)


@pytest.mark.parametrize(("assignment", "function", "prop"), PROPERTIES)
def test_property(assignment, function, prop):
    found = next(f for f in findings(assignment) if f.part["name"] == function)
    assert prop in found.right, found.lines
'''

WORKFLOW = '''\
name: check
on: [push]
jobs:
  check:
    runs-on: ubuntu-latest
    timeout-minutes: 20
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {python-version: "3.11"}
      - run: pip install torch --index-url https://download.pytorch.org/whl/cpu
      - run: pip install -r requirements.txt
      - run: python course/kit.py check
'''

SETUP = '''\
#!/usr/bin/env bash
# Gradescope runs this once, when the image is built.
set -euo pipefail
apt-get update && apt-get install -y python3 python3-pip
pip3 install torch --index-url https://download.pytorch.org/whl/cpu
pip3 install -r /autograder/source/requirements.txt
id student || useradd --no-create-home student
chmod -R go-rwx /autograder/source
'''

RUN = '''\
#!/usr/bin/env bash
# Gradescope runs this for every submission, as root; the student's code runs as the user `student`.
cd /autograder/source
python3 course/kit.py grade /autograder/submission --gradescope /autograder/results/results.json
'''


@functools.lru_cache(1024)   # the files that no assignment changes are scanned once
def code_lines(text):
    """Return the lines of a program without comments and outer blanks."""
    comments = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = token.start[1]
    except (tokenize.TokenError, SyntaxError):   # a fragment, or no program
        pass
    lines = text.splitlines()
    return [" ".join(line[:comments.get(n)].split()) for n, line in enumerate(lines, 1)]


@functools.lru_cache(1024)
def renamed(text):
    """Return the statements of a program with their variables numbered by appearance.

    -> [(statement as written, statement with v0, v1, ...)]. Two statements that differ in names of
    variables alone become equal. Attributes, keywords and names that are called stay.
    """
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):   # no program
        return []
    found, words, numbered, names = [], [], [], {}
    for token, following in zip(tokens, tokens[1:] + tokens[-1:]):
        word = token.string
        if token.type == tokenize.NEWLINE:
            found.append((" ".join(words), " ".join(numbered)))
            words, numbered, names = [], [], {}
        elif word.strip() and token.type != tokenize.COMMENT:
            words.append(word)
            stays = (token.type != tokenize.NAME or keyword.iskeyword(word) or word in KEPT
                     or following.string == "(" or numbered[-1:] == ["."])
            numbered.append(word if stays else names.setdefault(word, f"v{len(names)}"))
    return found


def dedented(text):
    """Shift a removed piece to the left margin, so that it can be read as a program."""
    lines = [line for line in text.splitlines() if line.strip()]
    width = min(len(line) - len(line.lstrip()) for line in lines)
    return "\n".join(line[width:] for line in lines) + "\n"


def strings_in(value):
    """Return all strings of a JSON value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [s for v in value.values() for s in strings_in(v)]
    return [s for v in value for s in strings_in(v)] if isinstance(value, list) else []


def leaks(files, removed):
    """Return where lines of the removed texts stand in files {name: text} -> ["file: line"]."""
    idioms = {line.replace(" ", "") for line in IDIOMS}
    exact = {line for text in removed for line in code_lines(dedented(text))
             if len(line) > SHORT and line.replace(" ", "") not in idioms}
    copies = {canon: said for text in removed for said, canon in renamed(dedented(text))
              if len(said) > SHORT and canon.count(" ") >= FEW and said not in IDIOMS}
    found = []
    for name, whole in sorted(files.items()):
        for text in [whole, *(strings_in(json.loads(whole)) if name.endswith(".json") else [])]:
            squeezed = {" ".join(line.split()) for line in text.splitlines()}
            squeezed |= set(code_lines(text))
            stands = [line for line in exact if any(line in s for s in squeezed)]
            if name.endswith((".py", ".json")):
                stands += [f"a renamed copy of {copies[canon]}" for said, canon in renamed(text)
                           if canon in copies]
            found += [f"{name}: {line}" for line in stands]
    return sorted(set(found))


def readme(sheet):
    """Return the README of a handout, for students."""
    lines = ["# Assignments", "",
             "In this project some functions are missing. Their signatures and docstrings say what "
             "they do. Write them, and check them as often as you like:", "",
             "```bash",
             "pip install -r requirements.txt",
             "python course/kit.py list            # what there is to do",
             f"python course/kit.py check {next(iter(sheet['assignments']))}        "
             "# your functions, property by property",
             f"python course/kit.py hint {next(iter(sheet['assignments']))} --level 3  "
             "# more help, never code",
             "python course/kit.py watch           # checks again whenever you save a file",
             "python -m pytest                     # the same as tests",
             "```", "",
             "A check takes your functions one at a time out of their files, with new helpers at "
             "the top level of the same file. It runs each alone: what you have not solved yet "
             "does not count against what you have. It runs on a CPU, in double precision, and "
             "allows neither files nor processes nor changes to torch. Your own prints are shown. "
             "It says *public checks passed*; your teacher's have other inputs.", "",
             "Read the docstring at the top of the file first. Letters, frames and masks are "
             "explained there.", ""]
    for name, a in sheet["assignments"].items():
        lines += [f"## {name}: {a['title']}", "",
                  f"Goal: {a['goal']}. Level {a['level']} of 3, about {a['hours']} hours.", ""]
        if a["parts"]:
            lines += ["| function | file | property | points |", "|---|---|---|---|"]
        for part in a["parts"]:
            for c in part["concepts"]:
                functions = ", ".join(f"`{f}`" for f in part["functions"]) or "-"
                lines.append(f"| {functions} | {part['file']} | {c['name']} | {c['points']} |")
        lines.append("")
        if a["task"]:
            lines += [a["task"], ""]
        if a["twist"]:
            lines += [f"**Your specification differs from the docstring**: {a['twist']} The public "
                      "code of this project is wrong for it.", ""]
        lines += [f"To finish: `{a['finish']}`"]
        if a["numbers"] and name != "A10":   # they would answer its question
            lines += ["", "Numbers to reproduce; other seeds and machines fall into the band:", ""]
            lines += [f"- {number}" for number in a["numbers"]]
        lines.append("")
    whole = (ROOT / "README.md").read_text(encoding="utf-8")
    healthy = re.search(r"^## Is my PPO run healthy\?.*?(?=^## )", whole, re.M | re.S)
    return "\n".join(lines) + "\n" + healthy[0].rstrip() + "\n"


def requirements():
    """Return the requirements without exact versions: a course takes the torch that is there."""
    names = re.findall(r"^[a-z0-9_-]+", (ROOT / "requirements.txt").read_text(), re.M)
    return "".join(f"{name}\n" for name in names)


def files_of(names, sheet):
    """Return all files of a handout as {path: text}."""
    clean, _ = sheets.clean_files(names)
    files = {}
    for pattern in ALLOWED:
        paths = sorted(ROOT.glob(pattern))
        if not paths:
            raise UserError(f"{pattern}: not in this project, but a handout needs it")
        for path in paths:
            name = path.relative_to(ROOT).as_posix()
            files[name] = clean.get(name) or path.read_text(encoding="utf-8")
    if "A14" in names:   # the tests would say what is broken
        files = {name: text for name, text in files.items() if not name.startswith("tests/")}
    return files | {
        "README.md": readme(sheet),
        "requirements.txt": requirements(),
        ".gitattributes": "* text=auto eol=lf\n",
        ".gitignore": "out/\n__pycache__/\n.pytest_cache/\n",
        ".github/workflows/check.yml": WORKFLOW,
        "tests/test_assignments.py": VISIBLE_TESTS,
        "course/handout.json": json.dumps(sheet)}


def write(folder, names, seed=0, student="", twist_seed=0):
    """Write a handout into an empty folder. Raises UserError if it would hold a solution."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(sorted(folder.iterdir()))):
        raise UserError(f"{folder}: not empty; name a new folder")
    if "A14" in names and len(names) > 1:
        raise UserError("A14 has bugs in files that other assignments need: hand it out alone")
    sheet = sheets.make(names, seed, student, twist_seed)
    sheet["clean"], removed = sheets.clean_files(names)
    files = files_of(names, sheet)
    if "A14" in names:
        files |= sheets.hunted(student, twist_seed, len(sheet["assignments"]["A14"]["hunt"]))[0]
    found = leaks(files, removed)
    if found:
        raise UserError(f"{folder}: not written, because it would hold parts of the solution: "
                        f"{'; '.join(found[:5])}")
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def write_autograder(path, folder):
    """Zip a handout for Gradescope, with setup.sh and run_autograder."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            z.write(file, file.relative_to(folder).as_posix())
        for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o755 << 16
            z.writestr(entry, text)
