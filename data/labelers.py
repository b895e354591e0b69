"""Simulated labelers: sample K = 4..9 answers per prompt from the fine-tuned model, and rank them as people would.

Each labeler sees the gold score through habits of their own: a noise level, a liking for long answers, and a scale of
half points, so that answers they cannot tell apart are tied. Two labelers agree on 70 to 73% of the pairs that neither
ties (InstructGPT: 72.6 +- 1.5%). The reward model sees the ranks alone, never the gold score.

    python data/labelers.py                          OUT/sft.pt + OUT/data/rank_*.jsonl -> OUT/data/ranked_*.jsonl
    python data/labelers.py --show 3                 and print three ranked prompts
"""
import argparse, json, os, random, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt, sft
from data import corpus, village

LABELERS = 12


def habits(seed):
    """[(noise, liking per word)]: the noise level was set once so that two labelers agree as InstructGPT's did."""
    rng = random.Random(seed)
    return [(rng.uniform(0.48, 0.88), rng.gauss(0.01, 0.01)) for _ in range(LABELERS)]


def opinions(task, answers, habit, rng):
    """A labeler's scores of the answers, in half points."""
    noise, liking = habit
    felt = {a: village.gold(task, a) + rng.gauss(0, noise) + liking * len(a.split()) for a in sorted(set(answers))}
    return [round(2 * felt[a]) / 2 for a in answers]   # the same text gets the same score, as from a person


def ranks_of(scores):
    """Scores -> ranks: 1 is best, equal scores share a rank."""
    levels = sorted(set(scores), reverse=True)
    return [levels.index(s) + 1 for s in scores]


def rank(model, enc, prompts, seed=0, max_new_tokens=64):
    """-> records {"prompt", "responses", "ranks", "scores", "labeler", "ranks_other", ...}; ranks_other is a second labeler's."""
    rng, people = random.Random(seed), habits(seed)
    sizes = [rng.randint(4, 9) for _ in prompts]
    chats = [p["prompt"] for p, k in zip(prompts, sizes) for _ in range(k)]
    answers = []
    for start in range(0, len(chats), 1024):
        answers += sft.reply(model, enc, chats[start:start + 1024], max_new_tokens, seed=seed + start)
    records, it = [], iter(answers)
    for p, k in zip(prompts, sizes):
        mine = [next(it) for _ in range(k)]
        one, two = rng.sample(range(LABELERS), 2)
        scores = opinions(p["task"], mine, people[one], rng)
        other = ranks_of(opinions(p["task"], mine, people[two], rng))
        if len(set(scores)) > 1:
            records.append({**p, "responses": mine, "ranks": ranks_of(scores), "scores": scores, "labeler": one,
                            "ranks_other": other})
    return records


def ensure(out, seed=0, device="auto"):
    """Paths of the ranked training and validation files, made from OUT/sft.pt when they are missing."""
    folder = corpus.ensure(Path(out) / "data", seed)
    paths = [folder / "ranked_train.jsonl", folder / "ranked_val.jsonl"]
    model_time = (Path(out) / "sft.pt").stat().st_mtime
    if not all(p.exists() and p.stat().st_mtime >= model_time for p in paths):   # people rank the answers of this model
        print(f"no ranked answers of {Path(out) / 'sft.pt'} in {folder}: sampling them and asking the labelers")
        model, enc, _ = gpt.load_model(Path(out) / "sft.pt", gpt.pick_device(device))
        for path, name in zip(paths, ("rank_train", "rank_val")):
            prompts = [json.loads(line) for line in open(folder / f"{name}.jsonl", encoding="utf-8")]
            records = rank(model, enc, prompts, seed)
            tied = len(prompts) - len(records)
            print(f"{path.name}: {len(records):,} prompts" + (f"; {tied} more, whose answers are all tied, are left out" if tied else ""))
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records),
                            encoding="utf-8", newline="\n")
            os.replace(part, path)
    return [str(p) for p in paths]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the run [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="then print N ranked prompts")
    args = parser.parse_args()
    try:
        train, _ = ensure(args.out, args.seed, args.device)
    except gpt.UserError as e:
        sys.exit(print(f"labelers.py: {e}", file=sys.stderr) or 2)
    except OSError as e:
        sys.exit(print(f"labelers.py: {e.filename}: {e.strerror}; make it with: python sft.py --out {args.out}", file=sys.stderr) or 2)
    for line in open(train, encoding="utf-8").readlines()[:args.show]:
        record = json.loads(line)
        print(record["prompt"][-1]["content"])
        for r, answer in sorted(zip(record["ranks"], record["responses"])):
            print(f"    rank {r}  {answer}")
