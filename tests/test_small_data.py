"""Every script on one, two and four records: it works, or stops before it trains, and says why."""

import pytest

from processes import run_folder, scripts, write_files
from tiny import chat, read_jsonl, write_jsonl

RECORDS = {  # what the n-th record of each script's --data or --prompts is
    "sft": lambda n: {"messages": chat(f"the mill {n}?", "yes")},
    "reward": lambda n: {"prompt": f"the mill {n}?", "chosen": "yes", "rejected": "no no"},
    "dpo": lambda n: {"prompt": f"the mill {n}?", "chosen": "yes", "rejected": "no no"},
    "ppo": lambda n: {"prompt": f"the mill {n}?"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "files"
    write_files(folder)
    return folder


def run(files, out, name, **settings):
    """Run a script with tiny settings in the folder `out`."""
    script = scripts(files)[name]
    cfg = script.module.Config(**script.settings | settings, out=str(out), device="cpu")
    script.module.main(cfg)


def numbers(value):
    """Yield the numbers in nested lists and dicts; None is one that was not finite."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif not isinstance(value, str):
        yield value


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("name", RECORDS)
def test_few_records_train_to_finite_numbers(files, tmp_path, name, n):
    data = write_jsonl(tmp_path / "few.jsonl", *map(RECORDS[name], range(n)))
    read = {"prompts": str(data)} if name == "ppo" else {"data": str(data), "val": ""}
    out = run_folder(files, tmp_path / "out")
    run(files, out, name, **read)
    assert (out / f"{name}.pt").exists()
    assert not list(out.glob("*.state*"))
    log = read_jsonl(out / f"{name}.jsonl")
    assert log
    assert None not in list(numbers(log))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_scale_of_few_rewards_is_bounded_and_warned_about(files, tmp_path, capsys, n):
    data = write_jsonl(tmp_path / "few.jsonl", *map(RECORDS["reward"], range(n)))
    run(files, run_folder(files, tmp_path / "out"), "reward", data=str(data), val="")
    assert "to measure the scale of the scores on" in capsys.readouterr().out
