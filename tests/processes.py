"""Run the training scripts in processes that are killed, or that share the work.

    python tests/processes.py FOLDER kills            kill and resume every script
    python tests/processes.py FOLDER kills sft ppo    these only
    python tests/processes.py FOLDER inputs           resume every script with a changed input
    python tests/processes.py FOLDER ranks            train with one process and with two

Each run is a fork, made after torch is loaded and before it has threads, so that dozens of runs
take seconds. A run trains a tiny model on tiny files. FOLDER/report.json says what happened;
tests/test_processes.py reads it.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with threads may hang
import torch  # noqa: E402

import dpo  # noqa: E402
import gpt  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import self_reward  # noqa: E402
import sft  # noqa: E402
from data import tokenizer, village  # noqa: E402
from scaffold.cli import UserError  # noqa: E402
from scaffold.distributed import init_distributed  # noqa: E402
from scaffold.run import Run, load_checkpoint  # noqa: E402
from tiny import ENC, chat, save_reward, write_jsonl, write_tokenizer  # noqa: E402

torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1)])  # imports half of torch, once for all forks
SHARED = ("gpt", "sft", "reward", "dpo", "ppo")  # the scripts that several processes can share
WORDS = "the miller has a dog and it sleeps by his mill while bread grows brown".split()


class Script(NamedTuple):
    module: object
    settings: dict
    made: str  # the checkpoint that exists once the run is finished


def write_files(folder):
    """Write all that the scripts read: texts, records, an untrained checkpoint of each stage."""
    rng = random.Random(0)
    folder.mkdir(parents=True)

    def words():
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))

    def question():
        return words() + "?"

    def write(name, record, n):
        write_jsonl(folder / name, *(record() for _ in range(n)))

    def messages():
        return {"messages": chat(question(), words())}

    def prompt():
        return {"prompt": question()}

    def ranked():
        prompt = question()
        responses = [words() for _ in range(4)]
        return {"prompt": prompt, "responses": responses, "ranks": [1, 2, 2, 3]}

    def judged():
        verdicts = ["some 1. Score: 7", "some 0. Score: 2"]
        return {"prompt": question(), "responses": [words(), words()], "verdicts": verdicts}

    text = "<|end|>\n".join(words() + "\n" for _ in range(300))
    (folder / "text.txt").write_text(text)
    write("chats.jsonl", messages, 40)
    write("prompts.jsonl", prompt, 24)
    write("ranked.jsonl", ranked, 30)
    write("judged.jsonl", judged, 30)
    for seed, name in enumerate(("gpt", "sft", "reward")):
        torch.manual_seed(seed)
        model = gpt.GPT(gpt.GPTConfig(ENC.n_vocab, 96, n_layer=1, n_head=2, n_embd=16))
        if name == "reward":
            save_reward(folder / "reward.pt", reward.RewardModel(model))
        else:
            text = dict(data=str(folder / "text.txt"), val_fraction=0.05, mixture="")
            gpt.save_model(folder / f"{name}.pt", model, ENC, "", **text)


def scripts(files):
    """Return {name of the log: Script}.

    All that is random in a script is on: dropout, sampling, the ptx term, the adapted beta.
    """
    text = f"{files}/text.txt"
    chats = f"{files}/chats.jsonl"
    prompts = f"{files}/prompts.jsonl"
    ranked = f"{files}/ranked.jsonl"

    for_gpt = dict(data=text, steps=24, save_every=3, eval_every=7, batch_tokens=96)
    for_gpt |= dict(block_size=32, n_layer=1, n_head=2, n_embd=16, dropout=0.1)
    for_sft = dict(data=chats, val=chats, epochs=3, batch_tokens=96, save_every=4, dropout=0.1)
    for_sft |= dict(max_new_tokens=4, gold="")
    for_reward = dict(data=ranked, val=ranked, epochs=2, batch_prompts=3, save_every=3)
    for_reward |= dict(max_new_tokens=4, gold="")
    for_dpo = for_reward | dict(eval_every=5, nll=0.1)
    for_ppo = dict(prompts=prompts, text=text, updates=8, rollout_size=8, epochs=2)
    for_ppo |= dict(value_warmup=1, lr=1e-2, max_new_tokens=6, ptx=0.5, ptx_tokens=64)
    for_ppo |= dict(target_kl=0.1, save_every=2, table=False, gold="")
    for_rounds = dict(data=chats, eft=f"{files}/judged.jsonl", prompts=prompts, pairs="random")
    for_rounds |= dict(iterations=4, n_prompts=12, n_test=4, batch_pairs=4, sft_epochs=1)
    for_rounds |= dict(max_new_tokens=4, epochs=1, grade="")
    rounds = "self_reward-pairs-random"
    return {
        "gpt": Script(gpt, for_gpt, "gpt.pt"),
        "sft": Script(sft, for_sft, "sft.pt"),
        "reward": Script(reward, for_reward, "reward.pt"),
        "dpo": Script(dpo, for_dpo, "dpo.pt"),
        "ppo": Script(ppo, for_ppo, "ppo.pt"),
        rounds: Script(self_reward, for_rounds, "self_reward/pairs-random-M5.pt"),
    }


def run_folder(files, out):
    """Make the folder of a run, with the checkpoints of the stages before it."""
    out.mkdir(parents=True)
    for name in ("gpt.pt", "sft.pt", "reward.pt"):
        (out / name).write_bytes((files / name).read_bytes())
    return out


def fork(work, env=None, log=os.devnull):
    """Call work() in a new process -> its pid.

    Its exit code is 0, or 2 for a UserError, 130 for Ctrl-C, 3 for any other error.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        os.environ.update(env or {})
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with (
            open(log, "a") as out,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
        ):
            try:
                work()
                code = 0
            except UserError as e:
                print(e)
                code = 2
            except KeyboardInterrupt:
                code = 130
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid, seconds=60):
    """Wait for a process -> its exit code, minus the signal that ended it, or "hung" (killed)."""
    end = time.time() + seconds
    while time.time() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def has_ended(pid):
    """Has a process ended? Unlike waitpid, this leaves its exit code for wait()."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def digest(path):
    """Hash the model of a checkpoint, tensors bit for bit."""
    h = hashlib.sha256()

    def add(x):
        if isinstance(x, torch.Tensor):
            h.update(x.contiguous().numpy().tobytes())
        elif isinstance(x, dict):
            for k, v in x.items():
                h.update(repr(k).encode())
                add(v)
        else:
            h.update(repr(x).encode())

    add(load_checkpoint(path)["model"])
    return h.hexdigest()


def lines_of(log):
    return log.read_text().splitlines() if log.exists() else []


def rows_of(log):
    """The rows of a log without their "config", which holds the folder of the run."""
    rows = [json.loads(line) for line in lines_of(log)]
    return [{k: v for k, v in row.items() if k != "config"} for row in rows]


def wait_for_rows(pid, log, n, seconds=60):
    """Wait until the log has more than n rows or the process has ended."""
    end = time.time() + seconds
    while len(lines_of(log)) <= n and time.time() < end and not has_ended(pid):
        time.sleep(0.001)


def killed_run(train, out, log, n, rng):
    """Kill train(out, resume) with SIGKILL, Ctrl-C and SIGKILL, resuming each time -> exit codes.

    The moments are random, each later than the last, and all in the first two thirds of the run's
    n rows: a process must be alive to be killed.
    """
    codes = []
    resume = False
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, None):
        have = len(lines_of(log))
        pid = fork(partial(train, out, resume), log=out / "output.txt")
        if how:
            wait_for_rows(pid, log, rng.randrange(have, max(have + 1, 2 * n // 3)))
            time.sleep(rng.random() * 0.005)  # anywhere in the next step
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        codes.append(wait(pid))
        if codes[-1] == 0:
            break
        resume = resume or log.with_suffix(".state").exists()
    return codes


def kill_script(name, script, files, folder):
    """Run a script once undisturbed and once killed again and again -> its entry in the report."""
    log = f"{name}.jsonl"

    def train(out, resume):
        cfg = script.module.Config(**script.settings, out=str(out), device="cpu", resume=resume)
        script.module.main(cfg)

    rng = random.Random(name)
    whole = run_folder(files, folder / "whole")
    first = wait(fork(lambda: train(whole, False), log=whole / "output.txt"))
    n = len(rows_of(whole / log))
    for attempt in range(5):  # a fast machine may finish before it is killed
        killed = run_folder(files, folder / f"killed{attempt}")
        (killed / script.made).unlink(missing_ok=True)
        codes = killed_run(train, killed, killed / log, n, rng)
        if -signal.SIGKILL in codes:
            break
    entry = dict(codes=[first, *codes], rows=n)
    if codes[-1] == 0:
        names = sorted(p.name for p in killed.iterdir())
        entry.update(
            same_log=rows_of(whole / log) == rows_of(killed / log),
            same_weights=digest(whole / script.made) == digest(killed / script.made),
            left=[p for p in names if ".state" in p or ".part" in p],
        )
    return entry


def kills(root, chosen):
    """Kill each script -> report."""
    files = root / "files"
    write_files(files)
    report = {}
    for name, script in scripts(files).items():
        if not chosen or name in chosen:
            report[name] = kill_script(name, script, files, root / name)
    return report


class Reader(NamedTuple):
    """A script with settings under which it reads certain files."""

    script: str
    settings: dict
    reads: list  # files of FILES, or of the folder of the run


def readers(files):
    """Return {case: Reader}: together they read every kind of file that decides a run."""
    texts = ["texts/a.txt", "texts/b.txt", "texts/mixture.json"]
    hub = ["hub/config.json", "hub/pytorch_model.bin"]
    rounds = "self_reward-pairs-random"
    village = ["sft_train.jsonl", "ranked_train.jsonl", "prompts_test.jsonl"]
    village = [f"data/{name}" for name in village]
    own_tokenizer = dict(data=f"{files}/texts", tokenizer=f"{files}/tokenizer.json")
    return {
        "gpt with its own tokenizer": Reader("gpt", own_tokenizer, [*texts, "tokenizer.json"]),
        "gpt with the embedded tokenizer": Reader("gpt", {}, ["text.txt", "embedded.json"]),
        "gpt --init": Reader("gpt", dict(init=f"{files}/gpt.pt"), ["text.txt", "gpt.pt"]),
        "gpt --init-from": Reader("gpt", dict(init_from=f"{files}/hub"), ["text.txt", *hub]),
        "sft": Reader("sft", {}, ["gpt.pt", "chats.jsonl"]),
        "sft --select reward": Reader(
            "sft", dict(select="reward"), ["gpt.pt", "chats.jsonl", "reward.pt"]
        ),
        "reward": Reader("reward", {}, ["sft.pt", "ranked.jsonl"]),
        "dpo": Reader("dpo", {}, ["sft.pt", "ranked.jsonl"]),
        "ppo --text": Reader("ppo", {}, ["sft.pt", "reward.pt", "prompts.jsonl", "text.txt"]),
        "ppo": Reader(
            "ppo", dict(text=""), ["sft.pt", "reward.pt", "prompts.jsonl", "gpt.pt", "text.txt"]
        ),
        "self_reward": Reader(
            rounds, {}, ["gpt.pt", "chats.jsonl", "judged.jsonl", "prompts.jsonl"]
        ),
        "self_reward --test": Reader(
            rounds,
            dict(test=f"{files}/test.jsonl"),
            ["gpt.pt", "chats.jsonl", "judged.jsonl", "prompts.jsonl", "test.jsonl"],
        ),
        "self_reward on the village": Reader(
            rounds, dict(data="", eft="", prompts=""), ["gpt.pt", "long/gpt.pt", *village]
        ),
    }


def write_more_files(files):
    """Write what only the readers read: a mixture, tokenizers, GPT-2 weights, test prompts."""
    (files / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (files / "texts" / name).write_bytes((files / "text.txt").read_bytes())
    (files / "texts" / "mixture.json").write_text('{"a": 1, "b": 2}')
    write_tokenizer(files / "tokenizer.json")
    write_tokenizer(files / "embedded.json")
    write_jsonl(files / "test.jsonl", *({"prompt": f"the mill {i}?"} for i in range(8)))
    model, _, _ = gpt.load_model(files / "gpt.pt")
    model.save_pretrained(files / "hub")


def write_village(files, out):
    """Write a village of few records, and the model that writes prompts, into a run's folder."""
    rng = random.Random(0)

    def ranked():
        task, prompt = village.new_task(rng)
        responses = [village.demonstration(task, rng) + f" {i}" for i in range(3)]
        return {"prompt": prompt, "task": task, "responses": responses, "ranks": [1, 2, 3]}

    def prompt():
        task, prompt = village.new_task(rng)
        return {"prompt": prompt, "task": task}

    (out / "data").mkdir()
    (out / "long").mkdir()
    write_jsonl(out / "data" / "sft_train.jsonl", *({"messages": chat(f"the mill {i}?", "yes")}
                                                    for i in range(20)))
    for name in ("ranked_train.jsonl", "ranked_val.jsonl"):
        write_jsonl(out / "data" / name, *(ranked() for _ in range(60)))
    write_jsonl(out / "data" / "prompts_test.jsonl", *(prompt() for _ in range(60)))
    (out / "data" / "village.json").write_text('{"seed": 0}')
    (out / "long" / "gpt.pt").write_bytes((files / "gpt.pt").read_bytes())


def other_version(path):
    """Return the bytes of another file of the same kind and size."""
    raw = path.read_bytes()
    if path.suffix in (".pt", ".bin"):
        state = torch.load(path, weights_only=True)
        weights = state.get("model", state)
        name = next(k for k in weights if k.endswith("wpe.weight"))
        weights[name] = -weights[name]
        buffer = io.BytesIO()
        torch.save(state, buffer)
        other = buffer.getvalue()
    elif path.name in ("tokenizer.json", "embedded.json"):
        content = json.loads(raw)
        content["ranks"][300:302] = reversed(content["ranks"][300:302])
        other = json.dumps(content).encode()
    else:
        words = {"mixture.json": (b"1", b"3"), "config.json": (b"LMHead", b"LMhead")}
        other = raw.replace(*words.get(path.name, (b"mill", b"mall")))
    assert len(other) == len(raw)
    assert other != raw
    return other


def stop_at_save(cfg, script, report):
    """Run a script up to the first save after a step; write which files it opened to `report`."""
    opened = set()
    save = Run.save

    def record(event, args):
        if event == "open" and isinstance(args[0], (str, os.PathLike)):
            opened.add(os.path.realpath(args[0]))

    def save_and_stop(run, n):
        save(run, n)
        if run.step:
            report.write_text(json.dumps(sorted(opened)))
            os._exit(0)

    def written(model, enc, shown, known, n, seed):
        return [f"write a story about the mill {seed} {i}" for i in range(n)]

    Run.save = save_and_stop
    self_reward.write_prompts = written  # an untrained model writes none
    sys.addaudithook(record)
    script.module.main(cfg)


def change_inputs(reader, files, folder):
    """Stop a script after a step; resume it with each file changed, then unchanged -> an entry."""
    out = run_folder(files, folder / "out")
    write_village(files, out)
    embedded = tokenizer.EMBEDDED
    script = scripts(files)[reader.script]
    settings = script.settings | reader.settings
    (out / script.made).unlink(missing_ok=True)
    before = {p for root in (files, out) for p in root.rglob("*") if p.is_file()}
    log = folder / "output.txt"
    report = folder / "opened.json"

    def run(resume):
        cfg = script.module.Config(
            **settings | dict(save_every=1), out=str(out), device="cpu", resume=resume
        )
        code = wait(fork(lambda: stop_at_save(cfg, script, report), log=log), 200)
        return [code, *lines_of(log)[-1:]]

    if "embedded.json" in reader.reads:
        tokenizer.EMBEDDED = gpt.EMBEDDED = files / "embedded.json"

    entry = dict(first=run(False), resumed={})
    opened = set(json.loads(report.read_text()))
    # Opened, but not an input: the seed of the village, for a notice; and a check that the
    # validation rankings are whole.
    checked = {"village.json", "ranked_val.jsonl"}
    read = [p for p in before if str(p.resolve()) in opened and p.name not in checked]
    names = {p: p.relative_to(out if out in p.parents else files).as_posix() for p in read}
    entry["read"] = sorted(set(names.values()))
    for path in read:
        raw, times = path.read_bytes(), path.stat()
        other = other_version(path)
        path.write_bytes(other)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        entry["resumed"][names[path]] = run(True)
        path.write_bytes(raw)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    entry["unchanged"] = run(True)
    tokenizer.EMBEDDED = gpt.EMBEDDED = embedded
    return entry


def inputs(root, chosen):
    """Change each file that a script reads -> report."""
    files = root / "files"
    write_files(files)
    write_more_files(files)
    report = {}
    for number, (name, reader) in enumerate(readers(files).items()):
        if not chosen or name in chosen:
            folder = root / str(number)
            folder.mkdir()
            entry = change_inputs(reader, files, folder)
            report[name] = entry | dict(expected=sorted(reader.reads))
    return report


def fork_ranks(work, n, log):
    """Call work() in n processes that know of each other, as torchrun starts them -> their pids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(n)]
    return [fork(work, env | rank, log) for rank in ranks]


def losses_of(log):
    """The first ten losses of a run, as [[policy, value]] for PPO, else [[loss]]."""
    rows = [json.loads(line) for line in lines_of(log)]
    keys = [k for k in rows[-1] if k in ("loss/policy_avg", "loss/value_avg")] or ["loss"]
    return [[row[k] for k in keys] for row in rows if keys[0] in row][:10]


def share_script(name, script, files, folder, n):
    """Run a script in one process and in n, on the same global batches -> its report entry."""
    log = folder / "log.txt"

    def train(out):
        init_distributed("cpu")
        script.module.main(script.module.Config(**script.settings, out=str(out), device="cpu"))

    one = run_folder(files, folder / "one")
    many = run_folder(files, folder / "many")
    pids = [fork(lambda: train(one), log=log), *fork_ranks(lambda: train(many), n, log)]
    codes = [wait(pid) for pid in pids]
    entry = dict(codes=codes)
    if set(codes) == {0}:
        a = losses_of(one / f"{name}.jsonl")
        b = losses_of(many / f"{name}.jsonl")
        entry.update(
            steps=len(a),
            same_length=len(a) == len(b),
            losses=a[:3],
            difference=max(abs(p - q) for x, y in zip(a, b) for p, q in zip(x, y)),
        )
    return entry


def ranks(root, chosen, n=2):
    """Train with one process and with n -> report.

    Dropout is off and sampling is greedy, since each process has its own random numbers.
    """
    files = root / "files"
    write_files(files)
    sample = gpt.generate

    def greedy(*args, **settings):
        return sample(*args, **(settings | {"temperature": 0}))

    gpt.generate = greedy
    changes = {
        "gpt": dict(steps=10, dropout=0.0, schedule="constant"),
        "sft": dict(dropout=0.0),
        "ppo": dict(updates=5, target_kl=0.0, beta=0.1),
    }
    report = {}
    for name, script in scripts(files).items():
        if name in (chosen or SHARED):
            settings = script.settings | changes.get(name, {})
            script = script._replace(settings=settings)
            report[name] = share_script(name, script, files, root / name, n)
    report["dead"] = dict(codes=kill_one_of_two(files, root / "dead"))
    return report


def kill_one_of_two(files, out):
    """Kill one of two processes in the middle of SFT -> the exit codes of both."""
    script = scripts(files)["sft"]
    run_folder(files, out)

    def train():
        init_distributed("cpu")
        settings = script.settings | dict(epochs=1000)
        sft.main(sft.Config(**settings, out=str(out), device="cpu"))

    first, second = fork_ranks(train, 2, out / "output.txt")
    wait_for_rows(first, out / "sft.jsonl", 4)
    os.kill(second, signal.SIGKILL)
    return [wait(first), wait(second)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("what", choices=("kills", "inputs", "ranks"))
    parser.add_argument("names", nargs="*", help="of scripts; default: all")
    args = parser.parse_args()
    job = {"kills": kills, "inputs": inputs, "ranks": ranks}[args.what]
    report = job(args.folder, args.names)
    text = json.dumps(report, indent=1)
    (args.folder / "report.json").write_text(text)
    print(text)
