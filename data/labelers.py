"""Simulated labelers: sample K = 4..9 responses per prompt from the fine-tuned model and rank them.

A labeler scores a response by its gold score plus noise plus a liking for length, in half points,
so close responses are tied. Two labelers agree on 70 to 73% of the pairs that neither of them ties
(InstructGPT's labelers: 72.6 +- 1.5%). The reward model sees only the ranks, never the gold score.

    python data/labelers.py                          make OUT/data/ranked_*.jsonl with OUT/sft.pt
    python data/labelers.py --show 3                 also print three ranked prompts
    python data/labelers.py --candidates beam        rank the K best of a beam search instead

InstructGPT samples the responses. Some notes on it say that they come from a beam search; see
beam.py for it, and lab/candidates.py for a comparison. Its rankings go to ranked_beam_*.jsonl.
"""
import random
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import beam, corpus, village
from data.formats import write_records
from data.records import read_records
from scaffold.cli import BaseConfig, UserError, choose, pick_device, start

LABELERS = 12


@dataclass
class Config(BaseConfig):
    candidates: str = "sample"   # responses to rank: sample, or beam for the best of a beam search
    show: int = 0                # ranked prompts to print at the end


class Habit(NamedTuple):
    noise: float    # standard deviation of a labeler's error, in points
    liking: float   # points per word


def habits(seed):
    """Draw the labelers' habits. The noise makes them agree about as often as InstructGPT's did."""
    rng = random.Random(seed)
    return [Habit(rng.uniform(0.52, 0.92), rng.gauss(0.01, 0.01)) for _ in range(LABELERS)]


def opinions(task, responses, habit, rng):
    """Score the responses as one labeler does, in half points. Equal responses score the same."""
    scores = {}
    for response in sorted(set(responses)):
        error = rng.gauss(0, habit.noise)
        score = village.gold(task, response) + error + habit.liking * len(response.split())
        scores[response] = round(2 * score) / 2
    return [scores[response] for response in responses]


def ranks_of(scores):
    """Rank scores: 1 is best, equal scores share a rank, no rank is skipped."""
    levels = sorted(set(scores), reverse=True)
    return [levels.index(score) + 1 for score in scores]


def make_candidates(model, enc, chats, sizes, candidates, max_new_tokens, seed):
    """Return `size` responses per chat; with "beam" different ones, the likeliest first."""
    import sft   # a later stage, so not imported at the top

    if candidates == "beam":
        beams = beam.beam_responses(model, enc, chats, max(sizes), max_new_tokens)
        return [responses[:size] for responses, size in zip(beams, sizes)]
    repeated = [chat for chat, size in zip(chats, sizes) for _ in range(size)]
    samples = iter(sft.sample_responses(model, enc, repeated, max_new_tokens, seed=seed))
    return [list(islice(samples, size)) for size in sizes]


def rank(model, enc, prompts, seed=0, max_new_tokens=64, candidates="sample"):
    """Make responses to prompts and rank them. candidates: sample or beam.

    Return the records with "responses", "ranks", "scores", "labeler" and "ranks_other", the ranks
    of a second labeler. A prompt is skipped if all its responses are tied.
    """
    rng = random.Random(seed)
    people = habits(seed)
    sizes = [rng.randint(4, 9) for _ in prompts]
    chats = [prompt["prompt"] for prompt in prompts]
    made = make_candidates(model, enc, chats, sizes, candidates, max_new_tokens, seed)
    records = []
    for prompt, responses in zip(prompts, made):
        labeler, other = rng.sample(range(LABELERS), 2)
        scores = opinions(prompt["task"], responses, people[labeler], rng)
        other_scores = opinions(prompt["task"], responses, people[other], rng)
        if len(set(scores)) > 1:
            records.append({**prompt, "responses": responses, "ranks": ranks_of(scores),
                            "scores": scores, "labeler": labeler,
                            "ranks_other": ranks_of(other_scores)})
    return records


def ensure(out, seed=0, device="auto", candidates="sample"):
    """Return the paths of the ranked training and validation files. candidates: sample or beam.

    Make them from OUT/sft.pt first if they are missing or older than that model, because the
    rankings must be of this model's responses. Raises UserError if there is no OUT/sft.pt.
    """
    import gpt   # a later stage, so not imported at the top

    folder = corpus.ensure(Path(out) / "data", seed)
    checkpoint = Path(out) / "sft.pt"
    if not checkpoint.exists():
        raise UserError(f"{checkpoint} is missing; make it with: python sft.py --out {out}")
    model_time = checkpoint.stat().st_mtime
    stem = "ranked_beam" if candidates == "beam" else "ranked"
    paths = [folder / f"{stem}_train.jsonl", folder / f"{stem}_val.jsonl"]
    if all(path.exists() and path.stat().st_mtime >= model_time for path in paths):
        for path in paths:
            corpus.check_generated([path], path)
        return [str(path) for path in paths]
    print(f"no {paths[0].name} of {checkpoint} in {folder}: making and ranking responses")
    model, enc, _ = gpt.load_model(checkpoint, pick_device(device))
    for path, name in zip(paths, ["rank_train", "rank_val"]):
        prompts = [record for _, record in read_records(folder / f"{name}.jsonl")]
        records = rank(model, enc, prompts, seed, candidates=candidates)
        message = f"{path.name}: {len(records):,} prompts"
        if len(records) < len(prompts):
            message += f"; {len(prompts) - len(records)} more with all responses tied are skipped"
        print(message)
        write_records(path, records)
    return [str(path) for path in paths]


def show(path, n):
    """Print n ranked prompts, the best response first."""
    for _, record in read_records(path)[:n]:
        print(record["prompt"][-1]["content"])
        for place, response in sorted(zip(record["ranks"], record["responses"])):
            print(f"    rank {place}  {response}")


def main(cfg):
    choose(cfg, "candidates", "sample", "beam")
    train, val = ensure(cfg.out, cfg.seed, cfg.device, cfg.candidates)
    if cfg.show:
        show(train, cfg.show)
    print(f"next: python reward.py --out {cfg.out} --data {train} --val {val}")


if __name__ == "__main__":
    start(main, Config, __doc__)
