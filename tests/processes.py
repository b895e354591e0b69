"""Training scripts in processes of their own, which are killed, or share the work: python tests/processes.py FOLDER kills|ranks.

Each run is a fork, made after torch is loaded and before it has threads, so that dozens of them cost seconds. A run trains a tiny
model on tiny files. FOLDER/report.json tells what happened; tests/test_processes.py calls this and reads that.
"""
import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"   # a fork of a process with threads may hang
import torch  # noqa: E402

import dpo  # noqa: E402
import gpt  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import self_reward  # noqa: E402
import sft  # noqa: E402

torch.set_num_threads(1)
TEAM = ("gpt", "sft", "reward", "dpo", "ppo")   # the scripts that several processes can share
WORDS = "the miller has a dog and it sleeps by his mill while bread grows brown".split()


def write_files(folder):
    """What the scripts read: a text, chats, ranked and judged answers, prompts, and an untrained checkpoint of each stage."""
    rng, enc = random.Random(0), gpt.get_tokenizer()
    folder.mkdir(parents=True)

    def say():
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))

    def lines(name, records):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))

    def chat():
        return {"messages": [{"role": "user", "content": say() + "?"}, {"role": "assistant", "content": say()}]}

    (folder / "text.txt").write_text("<|end|>\n".join(say() + "\n" for _ in range(300)))
    lines("chats.jsonl", (chat() for _ in range(40)))
    lines("prompts.jsonl", ({"prompt": say() + "?"} for _ in range(24)))
    lines("ranked.jsonl", ({"prompt": say() + "?", "responses": [say() for _ in range(4)], "ranks": [1, 2, 2, 3]} for _ in range(30)))
    lines("judged.jsonl", ({"prompt": say() + "?", "responses": [say(), say()], "verdicts": ["some 1. Score: 7", "some 0. Score: 2"]} for _ in range(30)))
    for seed, name in enumerate(("gpt", "sft", "reward")):
        torch.manual_seed(seed)
        model = gpt.GPT(gpt.GPTConfig(enc.n_vocab, 96, 1, 2, 16))
        if name == "reward":
            state = dict(gpt=vars(model.config), tokenizer="", fingerprint=gpt.fingerprint(enc))
            gpt.save_checkpoint(folder / "reward.pt", model=reward.RewardModel(model).state_dict(), **state)
        else:
            gpt.save_model(folder / f"{name}.pt", model, enc, "")


def scripts(files):
    """{name of the log: (module, settings, checkpoint of the end)}; what is random in them is on: dropout, sampling, ptx, adapted beta."""
    ranked = dict(data=f"{files}/ranked.jsonl", val=f"{files}/ranked.jsonl", max_new_tokens=4)
    return {
        "gpt": (gpt, dict(data=f"{files}/text.txt", steps=24, save_every=3, eval_every=7, batch_tokens=96, block_size=32, n_layer=1, n_head=2,
                          n_embd=16, dropout=0.1), "gpt.pt"),
        "sft": (sft, dict(data=f"{files}/chats.jsonl", val=f"{files}/chats.jsonl", epochs=3, batch_tokens=96, save_every=4, dropout=0.1,
                          max_new_tokens=4, gold=""), "sft.pt"),
        "reward": (reward, dict(ranked, epochs=2, batch_prompts=3, save_every=3, gold=""), "reward.pt"),
        "dpo": (dpo, dict(ranked, epochs=2, batch_prompts=3, save_every=3, eval_every=5, nll=0.1, gold=""), "dpo.pt"),
        "ppo": (ppo, dict(prompts=f"{files}/prompts.jsonl", text=f"{files}/text.txt", updates=8, rollout=8, epochs=2, warmup=1, lr=1e-2,
                          max_new_tokens=6, ptx=0.5, ptx_tokens=64, target_kl=0.1, save_every=2, table=False, gold=""), "ppo.pt"),
        "self_reward-pairs-random": (self_reward, dict(
            data=f"{files}/chats.jsonl", eft=f"{files}/judged.jsonl", prompts=f"{files}/prompts.jsonl", pairs="random", iterations=4, n_prompts=12,
            n_test=4, batch_pairs=4, sft_epochs=1, max_new_tokens=4, epochs=1, grade=""), "self_reward/pairs-random-M5.pt")}


def folder_of(files, out):
    """A run's folder, with the checkpoints of the stages before it."""
    out.mkdir(parents=True)
    for name in ("gpt.pt", "sft.pt", "reward.pt"):
        (out / name).write_bytes((files / name).read_bytes())
    return out


def fork(work, env=(), log=os.devnull):
    """work() in a process of its own -> its pid. Exit code 0, or 2 for a UserError, 3 for any other."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        os.environ.update(env)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(log, "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                work()
                code = 0
            except gpt.UserError as e:
                print(e)
                code = 2
            except KeyboardInterrupt:
                code = 130
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid, seconds=60):
    """-> exit code, minus the signal if one ended it; a process that hangs is killed and gives 'hung'."""
    end = time.time() + seconds
    while time.time() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def digest(path):
    """Of everything that a checkpoint holds, tensors bit for bit."""
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
    add(gpt.load_checkpoint(path)["model"])
    return h.hexdigest()


def rows(path):
    return path.read_text().splitlines() if path.exists() else []


def wait_for_rows(pid, path, n, seconds=60):
    """Until the log has more than n rows, or the process has ended."""
    end = time.time() + seconds
    while len(rows(path)) <= n and time.time() < end and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def killed_run(train, out, log, n, rng):
    """Killed by SIGKILL, Ctrl-C and SIGKILL at random moments of a run of n rows, resumed each time -> exit codes."""
    codes, resume = [], False
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, None):
        have = len(rows(log))
        pid = fork(lambda: train(out, resume), log=out / "output.txt")
        if how:   # not near the end: it must be alive to be killed
            wait_for_rows(pid, log, rng.randrange(have, max(have + 1, 2 * n // 3)))   # and each time later than the last
            time.sleep(rng.random() * 0.005)   # anywhere in the next step
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        codes.append(wait(pid))
        if codes[-1] == 0:
            break
        resume = resume or log.with_suffix(".state").exists()
    return codes


def kills(root, chosen):
    """Each script once undisturbed, and once killed again and again."""
    files, report = root / "files", {}
    write_files(files)
    for name, (module, settings, end) in scripts(files).items():
        if chosen and name not in chosen:
            continue

        def train(out, resume):
            module.main(module.Config(**settings, out=str(out), device="cpu", resume=resume))

        def log_of(out):
            return [{k: v for k, v in json.loads(r).items() if k != "config"} for r in rows(out / f"{name}.jsonl")]

        rng, whole = random.Random(name), folder_of(files, root / name / "whole")
        report[name] = dict(codes=[wait(fork(lambda: train(whole, False), log=whole / "output.txt"))], rows=len(log_of(whole)))
        for attempt in range(5):   # a fast machine may be through before it is killed
            killed = folder_of(files, root / name / f"killed{attempt}")
            (killed / end).unlink(missing_ok=True)
            codes = killed_run(train, killed, killed / f"{name}.jsonl", report[name]["rows"], rng)
            if -signal.SIGKILL in codes:
                break
        report[name]["codes"] += codes
        if codes[-1] == 0:
            report[name].update(same_log=log_of(whole) == log_of(killed), same_weights=digest(whole / end) == digest(killed / end),
                                left=sorted(p.name for p in killed.iterdir() if ".state" in p.name or ".part" in p.name))
    return report


def team(work, n, log):
    """work() in n processes that know of each other, as torchrun would start them -> their pids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [fork(work, dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port), log) for r in range(n)]


def ranks(root, chosen, n=2):
    """Ten steps by one process and by n, on the same global batches: no dropout, and greedy answers, since each process samples by its own seed."""
    files, report = root / "files", {}
    write_files(files)
    greedy = gpt.generate
    gpt.generate = lambda *args, **how: greedy(*args, **(how | {"temperature": 0}))
    steps = {"gpt": dict(steps=10, dropout=0.0, schedule="constant"), "sft": dict(dropout=0.0), "ppo": dict(updates=5, target_kl=0.0, beta=0.1)}
    for name, (module, settings, end) in scripts(files).items():
        if name not in (chosen or TEAM):
            continue
        settings, log = settings | steps.get(name, {}), root / name / "log.txt"

        def train(out):
            gpt.join("cpu")
            module.main(module.Config(**settings, out=str(out), device="cpu"))

        one, many = folder_of(files, root / name / "one"), folder_of(files, root / name / "many")
        pids = [fork(lambda: train(one), log=log)] + team(lambda: train(many), n, log)
        report[name] = dict(codes=[wait(p) for p in pids])
        if set(report[name]["codes"]) == {0}:
            a, b = ([json.loads(r) for r in rows(out / f"{name}.jsonl")] for out in (one, many))
            keys = [k for k in a[-1] if k in ("loss/policy_avg", "loss/value_avg")] or ["loss"]
            a, b = ([[r[k] for k in keys] for r in x if keys[0] in r][:10] for x in (a, b))
            report[name].update(steps=len(a), same_length=len(a) == len(b), losses=a[:3],
                                difference=max(abs(p - q) for x, y in zip(a, b) for p, q in zip(x, y)))
    report["dead"] = dict(codes=one_dies(files, root / "dead"))
    return report


def one_dies(files, out):
    """One of two processes is killed in the middle: the other one must end, too, and with an error. -> their exit codes."""
    module, settings, _ = scripts(files)["sft"]
    folder_of(files, out)

    def train():
        gpt.join("cpu")
        module.main(module.Config(**settings | dict(epochs=1000), out=str(out), device="cpu"))

    first, second = team(train, 2, out / "output.txt")
    wait_for_rows(first, out / "sft.jsonl", 4)
    os.kill(second, signal.SIGKILL)
    return [wait(first), wait(second)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("what", choices=("kills", "ranks"))
    parser.add_argument("names", nargs="*", help="of scripts; none: all")
    args = parser.parse_args()
    root, report = args.folder, dict(kills=kills, ranks=ranks)[args.what](args.folder, args.names)
    (root / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
