"""The zoo stays in step with the code: every mutant finds its line. --slow also kills a few."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import mutants
from zoo import MUTANTS, Mutant


@pytest.mark.parametrize("m", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_is_one_change_that_compiles(m):
    text = (ROOT / m.file).read_text(encoding="utf-8")
    changed = mutants.mutated(m, text)   # raises unless `old` stands exactly once
    assert changed != text
    compile(changed, m.file, "exec")


@pytest.mark.parametrize("m", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_names_its_tests_and_its_source(m):
    assert m.tests
    for module in m.tests.split():
        assert (ROOT / "tests" / f"test_{module}.py").exists()
    assert m.bug
    assert m.published


def test_there_are_103_mutants_with_different_names():
    assert len(MUTANTS) >= 103
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


def test_no_two_mutants_are_the_same_change():
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("times", [0, 2])
def test_a_line_that_is_missing_or_repeated_is_an_error(times):
    m = Mutant("x", "gpt.py", "a = 1\n", "a = 2\n", "bug", "somewhere", "gpt")
    with pytest.raises(ValueError, match=f"x: its old text stands {times} times in gpt.py"):
        mutants.mutated(m, times * "a = 1\n")


def test_only_the_line_of_the_mutant_changes():
    m = Mutant("x", "gpt.py", "a = 1\n", "a = 2\n", "bug", "somewhere", "gpt")
    assert mutants.mutated(m, "b = 1\na = 1\n") == "b = 1\na = 2\n"


@pytest.mark.parametrize(("exitcode", "output", "verdict"), [
    (0, "3 passed", "passed"),
    (1, "FAILED tests/test_ppo.py::test_x[1] - assert 0", "killed"),
    (1, "ERROR tests/test_ppo.py::test_x - fixture", "broken"),
    (2, "ERROR tests/test_ppo.py - ImportError", "broken"),
    (3, "", "broken"),
])
def test_only_a_failed_test_is_a_kill(exitcode, output, verdict):
    assert mutants.verdict_of(exitcode, output)[0] == verdict


def test_the_table_is_written_between_its_marks(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(mutants, "README", readme)
    readme.write_text(f"# Tests\n\nbefore\n{mutants.BEGIN}\nold\n{mutants.END}\nafter\n")
    mutants.write_table([(MUTANTS[0], "gpt: test_x")])
    head, rest = readme.read_text().split(mutants.BEGIN)
    rows, tail = rest.split(mutants.END)
    assert head == "# Tests\n\nbefore\n"
    assert tail == "\nafter\n"
    assert "old" not in rows
    assert f"`{MUTANTS[0].name}`" in rows
    assert "gpt: `test_x`" in rows


def test_the_readme_of_the_tests_has_the_marks():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert text.count(mutants.BEGIN) == 1
    assert text.count(mutants.END) == 1


@pytest.mark.slow
def test_five_random_mutants_are_killed():
    done = subprocess.run([sys.executable, "tests/mutants.py", "--sample", "5"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
