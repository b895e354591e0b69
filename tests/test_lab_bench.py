"""lab/bench.py with lab/bench_nanogpt.py: who runs when, what is counted, life without a peer."""
import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import gpt
from lab import bench, bench_nanogpt
from scaffold.cli import UserError, parse
from tiny import ROOT, random_gpt

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    """Make every row small enough for a test, and keep the number of threads."""
    sizes = dict(n_layer=1, n_head=2, n_embd=8)
    monkeypatch.setattr(bench, "SMALL", sizes)
    monkeypatch.setattr(bench, "GENERATION", [(sizes, 2), (sizes, 3)])
    monkeypatch.setattr(bench_nanogpt, "SIZES", dict(block_size=16, **sizes))
    monkeypatch.setattr(bench, "PPO", replace(bench.PPO, max_new_tokens=4, rollout_size=6))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


@pytest.fixture
def alone(monkeypatch):
    """Hide the peers, if they are installed."""
    for name in ("transformers", "trl", "trl.experimental", "trl.experimental.ppo"):
        monkeypatch.setitem(sys.modules, name, None)


def test_sides_take_turns_and_the_medians_are_compared():
    calls = []

    def side(name, values):
        def measure(n):
            calls.append((name, n))
            return values[n]
        return measure

    sides = [side("ours", [3, 1, 80]), side("theirs", [10, 900, 12])]
    rate = bench.row(bench.Config(rounds=3), "x", "tokens/s", sides, "Peer")
    assert calls == [(name, n) for n in range(3) for name in ("ours", "theirs")]
    assert rate == bench.Row("x", "tokens/s", 3, 12, 3 / 12, "Peer")
    used = bench.row(bench.Config(rounds=3), "x", "CPU s", sides, "Peer", reverse=True)
    assert used.ratio == 12 / 3


def test_without_a_peer_the_row_has_ours_alone():
    alone = bench.row(bench.Config(rounds=2), "x", "CPU s", [lambda n: 4.0 + n], "Peer", "a note")
    assert alone == bench.Row("x", "CPU s", 4.5, None, None, None, "a note")


def spin(cpu_seconds):
    end = time.process_time() + cpu_seconds
    while time.process_time() < end:
        pass


def test_seconds_counts_work_and_not_waiting():
    assert bench.seconds(lambda: time.sleep(0.3)) < 0.1
    assert 0.2 <= bench.seconds(lambda: spin(0.2)) < 0.3


def test_seconds_counts_the_work_of_a_child():
    code = "import time\nwhile time.process_time() < 0.4: pass"
    used = bench.seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True))
    assert 0.4 <= used < 0.8


@pytest.mark.parametrize("T", [16, 64])
def test_training_flops_are_those_that_torch_counts(T):
    model = random_gpt(vocab=40, block=T, dtype=torch.float32)
    ids = torch.randint(40, (3, T))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids).sum().backward()
    assert bench.training_flops(model.config, 3, T) == counter.get_total_flops()


def test_text_loss_predicts_every_character_of_the_windows_once():
    T = bench_nanogpt.SIZES["block_size"]
    ids = [i % 50 for i in range(3 * T + 10)]
    even = bench_nanogpt.text_loss(lambda x: torch.zeros(*x.shape, 50), ids)
    assert even == pytest.approx(math.log(50))

    def knows(x):
        """Put e^5 times the odds on the token that follows; guess evenly after 7."""
        right = torch.nn.functional.one_hot((x + 1) % 50, 50)
        return 5.0 * right * (x != 7)[..., None]

    sevens = sum(i == 7 for i in ids[:3 * T])
    sure = math.log(math.exp(5) + 49) - 5
    expected = (sevens * math.log(50) + (3 * T - sevens) * sure) / (3 * T)
    assert bench_nanogpt.text_loss(knows, ids) == pytest.approx(expected, rel=1e-5)


def test_machine_is_the_share_of_a_matrix_product(tiny):
    row = bench.machine(bench.Config(rounds=1))
    assert 0 < row.ours < row.theirs
    assert row.ratio == row.ours / row.theirs
    assert "512 x 128 x 512" in row.note


def test_missing_peers_are_named_and_ours_runs_alone(tiny, alone, capsys):
    bench.main(bench.Config(only="generation", rounds=1))
    out, err = capsys.readouterr()
    assert "pip install transformers" in err
    header, *rows = out.splitlines()
    assert header.split() == ["row", "ours", "unit"]
    assert [line.split(",")[1].split()[:2] for line in rows] == [["batch", "2"], ["batch", "3"]]


def test_json_has_one_object_a_row(tiny, alone, tmp_path, capsys):
    saved = tmp_path / "new" / "bench.jsonl"
    bench.main(bench.Config(only="generation", rounds=1, json=True, save=str(saved)))
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["name"][-7:] for row in rows] == ["batch 2", "batch 3"]
    assert all(row["ours"] > 0 and row["theirs"] is None for row in rows)
    assert saved.read_text() == out


def test_our_ppo_runs_alone(tiny, alone, capsys):
    row = bench.ppo_updates(bench.Config(rounds=1))
    assert row.ours > 0 and row.theirs is None
    assert "pip install trl==1.12.0" in capsys.readouterr().err


def test_no_response_of_our_ppo_ends_early(tiny, monkeypatch):
    lengths = []
    rollout = bench.ppo.rollout

    def recorded(*args, **kwargs):
        b = rollout(*args, **kwargs)
        lengths.extend(map(len, b.responses))
        return b

    monkeypatch.setattr(bench.ppo, "rollout", recorded)

    def body():
        return gpt.GPT(gpt.GPTConfig(bench.VOCAB, 12, **bench.SMALL)).eval()

    bench.our_ppo(body, [[1, 2, 3]] * 6, seed=0)
    assert lengths == [4] * 6 * (1 + bench.UPDATES)


TRAIN = """
import sys
import torch
assert "--max_iters=2000" in sys.argv and "--n_embd=8" in sys.argv
assert open("data/shakespeare_char/ids").read() == "prepared"
torch.save({"model_args": {"V": 4}, "model": {"bias": torch.zeros(4)}}, "out/ckpt.pt")
"""
MODEL = """
import torch

def GPTConfig(V):
    return V

class GPT(torch.nn.Module):
    def __init__(self, V):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.ones(V))

    def forward(self, x, y):
        return self.bias.expand(*x.shape, -1), None
"""
PREPARE = """
from pathlib import Path
assert set(Path("data/shakespeare_char/input.txt").read_text()) == set("abc\\n")
Path("data/shakespeare_char/ids").write_text("prepared")
"""


def make_clone(folder):
    """Write a stand-in for nanoGPT that needs no training: four characters are equally likely."""
    (folder / "data" / "shakespeare_char").mkdir(parents=True)
    (folder / "out").mkdir()
    (folder / "train.py").write_text(TRAIN)
    (folder / "model.py").write_text(MODEL)
    (folder / "data" / "shakespeare_char" / "prepare.py").write_text(PREPARE)
    return folder


def make_text(path):
    path.write_text("".join("abcabcab\ncab\n"[i % 13] for i in range(2000)))
    return path


def test_pretraining_compares_both_losses_and_leaves_the_clone_alone(tiny, tmp_path):
    clone = make_clone(tmp_path / "nanoGPT")
    before = sorted(tmp_path.rglob("*"))
    text = make_text(tmp_path / "text.txt")
    row = bench.pretraining(bench.Config(rounds=1, pretrain_steps=2, pretrain_lr=0.0,
                                         text=str(text), nanogpt=str(clone)))
    assert sorted(tmp_path.rglob("*")) == sorted([*before, text])
    assert row.ratio == row.theirs / row.ours
    ours, theirs = row.note.split(", ")
    assert theirs == f"theirs {math.log(4):.4f}"
    assert ours.endswith(" after 2 steps")
    # At learning rate 0, the model knows no more than that there are 261 tokens.
    assert float(ours.split()[1]) == pytest.approx(math.log(261), abs=0.3)


def test_our_pretraining_gets_its_settings_and_the_seed_of_the_round(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(bench_nanogpt, "run_python", lambda *args: commands.append(args[0]))
    cfg = bench.Config(pretrain_steps=5, pretrain_tokens=640, pretrain_lr=0.5, seed=10)
    bench_nanogpt.train_ours(cfg, tmp_path, 3)
    script, *flags = commands[0]
    ours = parse(gpt.Config, "", flags)
    assert script == gpt.__file__
    assert (ours.steps, ours.batch_tokens, ours.lr, ours.seed) == (5, 640, 0.5, 13)
    assert ours.optimizer == gpt.Config.optimizer


def test_a_command_that_fails_is_one_line(tmp_path):
    (tmp_path / "x.py").write_text("raise ValueError('no luck')")
    with pytest.raises(UserError, match="^x.py failed: ValueError: no luck$"):
        bench_nanogpt.run_python(["x.py"], bench.Config(), tmp_path)


@pytest.mark.parametrize("settings, message", [
    (dict(only="speed"), "--only speed: choose"),
    (dict(device="mps"), "--device mps: choose cpu or cuda"),
    (dict(rounds=0), "--rounds 0: must be at least 1"),
    (dict(pretrain_tokens=0), "--pretrain-tokens 0: must be at least 1"),
    (dict(device="cuda", only="ppo"), "--only ppo: choose"),
    (dict(), "pretraining needs --text"),
    (dict(text="missing.txt"), "missing.txt: No such file"),
    (dict(text="accents.txt"), "accents.txt: not ASCII"),
    (dict(text="text.txt", nanogpt="."), "--nanogpt .: no train.py there"),
])
def test_a_mistake_is_found_before_the_first_measurement(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_text(tmp_path / "text.txt")
    (tmp_path / "accents.txt").write_text("é" * 100, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        bench.main(bench.Config(**settings))


def test_a_mistake_on_the_command_line_ends_with_one_line_and_code_2():
    command = [sys.executable, ROOT / "lab" / "bench.py", "--only", "speed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_transformers_gets_the_same_weights(tiny):
    transformers = pytest.importorskip("transformers")
    model = random_gpt(vocab=40, dtype=torch.float32)
    peer = bench.to_transformers(transformers.GPT2LMHeadModel, model)
    ids = torch.randint(40, (2, 20))
    torch.testing.assert_close(model(ids), peer(ids).logits, rtol=1e-4, atol=1e-4)
    for row in [bench.generation(bench.Config(rounds=1), CPU, *bench.GENERATION[0])]:
        assert row.theirs > 0 and row.peer == "transformers"


def test_trl_runs_as_many_updates(tiny):
    pytest.importorskip("trl.experimental.ppo")
    row = bench.ppo_updates(bench.Config(rounds=1))
    assert row.theirs > 0 and row.peer == "TRL"
