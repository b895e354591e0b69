"""The zoo in mutants.py stays in step with the code: every mutant still finds its line. Whether tests kill it: --slow, for a few."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import mutants  # noqa: E402


@pytest.mark.parametrize("m", mutants.MUTANTS, ids=lambda m: m.name)
def test_a_mutant_is_one_change_that_still_compiles(m):
    text = (ROOT / m.file).read_text(encoding="utf-8")
    changed = mutants.mutated(m, text)   # raises where `old` does not stand exactly once
    assert changed != text
    compile(changed, m.file, "exec")
    assert m.tests and all((ROOT / "tests" / f"test_{t}.py").exists() for t in m.tests.split())
    assert m.bug and m.published


def test_there_are_enough_of_them_and_each_has_a_name():
    names = [m.name for m in mutants.MUTANTS]
    assert len(set(names)) == len(names) >= 40
    assert len({(m.file, m.old, m.new) for m in mutants.MUTANTS}) == len(names)


@pytest.mark.parametrize("times", [0, 2])
def test_a_line_that_has_gone_or_is_there_twice_is_an_error(times):
    m = mutants.Mutant("x", "gpt.py", "a = 1\n", "a = 2\n", "bug", "somewhere", "gpt")
    with pytest.raises(ValueError, match=f"x: its old text stands {times} times in gpt.py"):
        mutants.mutated(m, times * "a = 1\n")
    assert mutants.mutated(m, "b = 1\na = 1\n") == "b = 1\na = 2\n"


def test_the_table_goes_between_its_marks_and_the_rest_stays(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(mutants, "README", readme)
    readme.write_text(f"# Tests\n\nbefore\n{mutants.BEGIN}\nold\n{mutants.END}\nafter\n")
    mutants.write_table([(mutants.MUTANTS[0], "gpt: test_x")])
    head, rows, tail = readme.read_text().partition(mutants.BEGIN)[0], *readme.read_text().split(mutants.BEGIN)[1].split(mutants.END)
    assert head == "# Tests\n\nbefore\n" and tail == "\nafter\n"
    assert "old" not in rows and f"`{mutants.MUTANTS[0].name}`" in rows and "gpt: `test_x`" in rows


def test_the_tests_readme_has_the_marks():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert text.count(mutants.BEGIN) == text.count(mutants.END) == 1


@pytest.mark.slow
def test_five_by_lot_are_killed():
    done = subprocess.run([sys.executable, "tests/mutants.py", "--sample", "5"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
