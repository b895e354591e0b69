"""Self-rewarding: one model answers and grades its own answers; DPO on its own grades makes the next model.

Idea. PPO's reward model is frozen, and as good as the people who ranked. Teach the model to be its own judge instead, as one more
instruction (LLM-as-a-Judge), and let it make its own preference data, again and again (2401.10020):

    M1 = SFT(M0; IFT + EFT)        IFT: instruction -> answer.   EFT: judge prompt with an answer in it -> verdict, then score
    for t = 1, 2, 3:
      new prompts -> N = 4 answers each from M_t -> 3 verdicts on each answer by M_t itself, the scores averaged
      pair = highest against lowest          dropped: equal scores, equal texts, a difference below the margin
      M_t+1 = argmin  DPO(pairs; reference M_t) + nll * NLL(best answer) + replay * LM(IFT + EFT)

The verdict is additive, and comes before the score: what the model has written is what it adds up.

    Judge: some 1 much 1 all 1 true 3 polite 3.  ->  Ben 1 tea 1 lake 0. some 1 much 1 all 0 true 3 polite 3. Score: 8

    python self_reward.py                        M1 to M4 and the table, on the village
    python self_reward.py --pairs random         controls: --pairs gold, --frozen-judge, --replay 0
    python self_reward.py --update sft           on the best answer of each pair alone, instead of DPO
    python self_reward.py --halo 0.05            reward hacking: people who fall for a phrase teach a judge that does
    python self_reward.py --data chats.jsonl --eft judged.jsonl --prompts prompts.jsonl --out out/mine      files of your own

Each variant writes OUT/self_reward-NAME.jsonl and its checkpoints to OUT/self_reward/; the table shows all that are there.
Five minutes on two CPU cores, and three more where OUT/long/gpt.pt is missing. Needs OUT/gpt.pt and the rankings of reward.py, made first
when they are missing, too. Read dpo.py first.
"""
import copy, math, random, re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import dpo, eval, gpt, ppo, reward, self_instruct, sft
from run import Run, UserError, announce


@dataclass
class Config:
    data: str = ""
    "IFT: chats, as sft.py reads them; empty: the village's demonstrations"
    eft: str = ""
    "EFT: {'prompt', 'responses', 'verdicts'}; empty: the village's ranked answers, judged by simulated annotators"
    prompts: str = ""
    "new prompts, as ppo.py reads them; empty: OUT/long/gpt.pt writes them, in few shots of IFT prompts"
    test: str = ""
    "prompts for the table; empty: the village's prompts_test, or 5% of --prompts (by user where they have one), which are then not trained on"
    init: str = ""
    "M0; empty: OUT/gpt.pt, trained first if missing"
    out: str = "out"
    "folder of this run"
    iterations: int = 3
    "rounds of DPO: 3 end with M4"
    n_prompts: int = 1000
    "new prompts per round"
    candidates: int = 4
    "answers to each, at temperature 1: what is never sampled cannot be learned"
    judgements: int = 3
    "verdicts on each answer, averaged"
    judge_temperature: float = 0.7
    "of the verdicts: at 1 the judge repeats the annotator's slips, too"
    margin: float = 1.0
    "least difference of two mean scores that makes a pair, in points of 9"
    pairs: str = "judge"
    "who orders the answers: judge, random (nobody: the null) or gold (the grader: the ceiling)"
    update: str = "dpo"
    "dpo, or sft (on the best answer alone, of the same pairs)"
    frozen_judge: bool = False
    "M1 judges in every round, not the latest model"
    replay: float = 0.5
    "weight of the loss on IFT and EFT in every step of DPO; 0: the judge is forgotten, and then the policy spoilt"
    nll: float = 0.2
    "weight of the best answer's mean token loss: keeps its log-probability from falling"
    beta: float = 0.1
    "DPO's beta"
    lr: float = 2e-4
    "peak learning rate of a round, cosine to a tenth"
    epochs: int = 2
    "passes over a round's pairs"
    batch_pairs: int = 32
    "pairs per step; a round with fewer pairs than that ends the run"
    sft_lr: float = 1e-3
    "peak learning rate of M1"
    sft_epochs: int = 4
    "passes over IFT and EFT for M1"
    batch_tokens: int = 512
    "tokens per step of M1 and of the replay, padding included; the judge learns in small steps, and hardly at all in large ones"
    noise: float = 0.05
    "village: how often the annotator slips on a criterion"
    halo: float = 0.0
    "village: share of IFT and EFT answers with a thank-you at the end, to which the annotator gives full marks; 0.05 is enough"
    n_test: int = 256
    "prompts of the table, --candidates answers to each"
    max_new_tokens: int = 48
    "longest answer, and longest verdict"
    grade: str = "data.village:grade"
    "module:function that grades (task, answer), for the simulated annotator and for reports; used where records carry a task"
    save_every: int = 1
    "rounds between two savings of all that --resume needs, in OUT/self_reward-NAME.state; 0: on Ctrl-C alone"
    resume: bool = False
    "go on with what was stopped or killed in OUT, this stage or one before it, bit for bit from the last whole round on"
    seed: int = 0
    "same seed, same machine, same run"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


# Weights as in gold: to be rude, or to make something up, costs as much as to be of no use at all.
CRITERIA = dict(some=1, much=1, all=1, true=3, polite=3)
MOST = sum(CRITERIA.values())
INSTRUCTION = "Judge: " + " ".join(f"{name} {points}" for name, points in CRITERIA.items()) + "."


def judge_chat(prompt, answer):
    """The prompt of the judge: what was asked, the answer, and the criteria -> messages. The verdict is the next turn."""
    return prompt + [{"role": "assistant", "content": answer}, {"role": "user", "content": INSTRUCTION}]


def write_verdict(points, met):
    """[(what was wanted, whether it is there)], a truth value per criterion -> 'Ben 1 lake 0. some 1 much 0 ... Score: 7'."""
    given = [weight * bool(m) for weight, m in zip(CRITERIA.values(), met, strict=True)]
    reasons, marks = (" ".join(f"{w} {int(p)}" for w, p in row) for row in (points, zip(CRITERIA, given)))
    return f"{reasons}. {marks}. Score: {sum(given)}"


def parse_score(verdict, most=MOST):
    """'... Score: 7' -> 7.0; None where there is no score, or none between 0 and most. The last one counts."""
    found = re.findall(r"\bscore:\s*(\d+(?:\.\d+)?)", verdict, re.I)
    return float(found[-1]) if found and float(found[-1]) <= most else None


def mean_score(scores):
    """Mean of the scores that could be read; None if none could. A verdict that cannot be read says nothing about the answer:
    as a zero it would make a good answer the rejected one."""
    read = [s for s in scores if s is not None and not math.isnan(s)]
    return sum(read) / len(read) if read else None


def make_pairs(answers, scores, margin):
    """Per prompt N texts and N mean scores (None: not judged) -> [(prompt, chosen, rejected)] as indices, Counter of the rest."""
    pairs, dropped = [], Counter()
    for i, (texts, values) in enumerate(zip(answers, scores)):
        judged = [k for k, s in enumerate(values) if s is not None and not math.isnan(s)]
        if len(judged) < 2:
            dropped["fewer than two were judged"] += 1
            continue
        best, worst = max(judged, key=lambda k: values[k]), min(judged, key=lambda k: values[k])
        if values[best] == values[worst]:
            dropped["equal scores"] += 1
        elif texts[best] == texts[worst]:
            dropped["equal texts"] += 1
        elif values[best] - values[worst] < margin:
            dropped["below the margin"] += 1
        else:
            pairs.append((i, best, worst))
    return pairs, dropped


def spearman(x, y):
    """Rank correlation of two lists, ties at their mean rank; nan if one of them is constant."""
    def ranks(v):
        v = torch.tensor(v, dtype=torch.float64)
        return (v[:, None] > v).sum(1) + 0.5 * (v[:, None] == v).sum(1)                          # (n,)
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


def balanced(judged, rng):
    """[(score, ...)] -> the same with the commonest score cut down, by lot, to the number of the second commonest."""
    counts = Counter(j[0] for j in judged).most_common(2)
    if len(counts) < 2:
        return judged
    common = [i for i, j in enumerate(judged) if j[0] == counts[0][0]]
    out = set(rng.sample(common, counts[0][1] - counts[1][1]))
    return [j for i, j in enumerate(judged) if i not in out]


def asked(messages):
    """What was asked, as one text: two prompts are the same when it is."""
    return "\n".join(m["content"] for m in messages)


def prompts_in(messages):
    """Every text that a chat asks, with and without the turns before."""
    return {asked(messages[start:end]) for end, m in enumerate(messages) if m["role"] == "assistant"
            for start in range(end) if messages[start]["role"] == "user"}


def disjoint(chats, records, seed=0):
    """IFT and EFT without a prompt in common: what both of them ask is left, by lot, to one of them. -> chats, records."""
    both = set().union(*(prompts_in(c["messages"]) for c in chats)) & {asked(r["prompt"]) for r in records}
    rng = random.Random(seed)
    judged = {text for text in sorted(both) if rng.random() < 0.5}
    return ([c for c in chats if not prompts_in(c["messages"]) & judged],
            [r for r in records if asked(r["prompt"]) not in both - judged])


def load_judged(path):
    """{"prompt", "responses", "verdicts"} -> records with messages; "ranks" are optional. Raises UserError."""
    records = []
    for where, r in sft.read_records(path):
        answers, verdicts = r.get("responses"), r.get("verdicts")
        if not isinstance(answers, list) or not isinstance(verdicts, list) or len(answers) != len(verdicts) or "prompt" not in r:
            raise UserError(f'{where}: expected {{"prompt", "responses", "verdicts"}}, the last two being lists of one length')
        if not all(isinstance(a, str) for a in answers):
            raise UserError(f"{where}: every response must be a text")
        for v in verdicts:
            if v is not None and (not isinstance(v, str) or parse_score(v) is None):
                raise UserError(f"{where}: a verdict must end with 'Score: n', n from 0 to {MOST}")
        records.append({**r, "prompt": reward.as_messages(r["prompt"], where)})
    return records


def answer_tokens(enc, prompt, text):
    """A chat and the next answer -> (ids, mask); the mask is 1 on that answer alone, whatever was said before."""
    start, said = sft.render_prompt(prompt, enc), enc.encode_ordinary(text) + [gpt.end_of(enc)]
    return torch.tensor(start + said), torch.tensor([0] * len(start) + [1] * len(said))


def eft_examples(records, enc, block_size, rng):
    """Judged answers -> [(ids, mask)], balanced over the scores; the loss falls on the verdict alone. Too long ones are counted, aloud."""
    judged = {(asked(r["prompt"]), a): (parse_score(v), r["prompt"], a, v) for r in records
              for a, v in zip(r["responses"], r["verdicts"]) if v is not None}
    examples = [answer_tokens(enc, judge_chat(p, a), v) for _, p, a, v in balanced(list(judged.values()), rng)]
    fit = [e for e in examples if len(e[0]) <= block_size]
    if len(fit) < len(examples):
        print(f"{len(examples) - len(fit)} of {len(examples)} judged answers exceed the context of {block_size} and are left out")
    return fit


def write_prompts(model, enc, shown, known, n, seed):
    """n new prompts, made as Self-Instruct makes instructions: a base model goes on with lists of eight, six of people's (`shown`, texts)
    and two of its own. Kept is what passes Self-Instruct's filters, the own-likelihood filter among them, is not in `known` and not
    said twice. Its ROUGE-L filter alone is left out: in a world this small it would keep a few hundred. -> list of texts."""
    rng, new, known = random.Random(seed), [], set(known)
    while len(new) < n:
        own = min(2, len(new))
        lists = [self_instruct.list_prompt(rng.sample(rng.sample(new, own) + rng.sample(shown, 8 - own), 8)) for _ in range(64)]
        lists = [x for x in lists if len(enc.encode_ordinary(x)) < model.config.block_size - 40]
        before = len(new)
        for text, ended in self_instruct.ask(model, enc, lists, 96, top_p=0.9, seed=rng.randrange(2**31)):
            found = self_instruct.read_list(text)[:None if ended else -1]   # the last of a list that was cut off is cut off, too
            for x, p in zip(found, self_instruct.least_likely(model, enc, found)):
                if p >= self_instruct.Config.likelihood and not self_instruct.reject_reason(x, []) and x not in known:
                    new.append(x)
                    known.add(x)
        if len(new) == before:
            raise UserError(f"the base model wrote {len(new)} of {n} new prompts and knows no more; ask for fewer: --n-prompts, "
                            f"--iterations")
    return new[:n]


def new_prompts(cfg, t, test, block, pool, writer):
    """The prompts of round t: drawn from a file (pool), or written by writer = (model, tokenizer, texts to show), and saved."""
    seed = 1000 * cfg.seed + t
    if pool:
        return random.Random(seed).sample(pool, min(cfg.n_prompts, len(pool)))
    from data import tasks
    model, enc, shown = writer
    texts = write_prompts(model, enc, shown, {asked(p["prompt"]) for p in test}, cfg.n_prompts, seed)
    found = [{"prompt": [{"role": "user", "content": x}], "task": tasks.read_prompt(x)} for x in texts]
    self_instruct.write_jsonl(Path(cfg.out) / "self_reward" / f"prompts-{t}.jsonl", found)
    valid = sum(r["task"]["kind"] != "nonsense" for r in found) / len(found)
    print(f"round {t}: the base model wrote {len(found)} prompts; {valid:.0%} of them mean something")
    found = [r | {"ids": sft.render_prompt(r["prompt"], enc)} for r in found]
    return [r for r in found if len(r["ids"]) + cfg.max_new_tokens < block]


def candidates(model, enc, prompts, n, max_new_tokens, seed):
    """n answers to each prompt at temperature 1 -> a list of n texts per prompt."""
    chats, texts = [p["prompt"] for p in prompts for _ in range(n)], []
    for start in range(0, len(chats), 1024):
        texts += sft.reply(model, enc, chats[start:start + 1024], max_new_tokens, seed=seed + start)
    return [texts[i:i + n] for i in range(0, len(texts), n)]


def judge(model, enc, prompts, answers, cfg, seed):
    """Mean score of each answer by `cfg.judgements` sampled verdicts -> lists like `answers` (None: not judged), share parsed.

    The same answer to the same prompt is judged once: it must not beat itself by luck.
    """
    todo = {(asked(p["prompt"]), a): judge_chat(p["prompt"], a) for p, texts in zip(prompts, answers) for a in texts}
    fits = {k: c for k, c in todo.items() if len(sft.render_prompt(c, enc)) < model.config.block_size}
    # Similar lengths share a batch, as everywhere.
    keys, scores = sorted(list(fits) * cfg.judgements, key=lambda k: len(k[0]) + len(k[1])), {k: [] for k in todo}
    for start in range(0, len(keys), 1024):
        part = keys[start:start + 1024]
        verdicts = sft.reply(model, enc, [fits[k] for k in part], cfg.max_new_tokens, temperature=cfg.judge_temperature,
                             seed=seed + start)
        for k, verdict in zip(part, verdicts):
            scores[k].append(parse_score(verdict))
    read = sum(s is not None for row in scores.values() for s in row)
    return ([[mean_score(scores[asked(p["prompt"]), a]) for a in texts] for p, texts in zip(prompts, answers)],
            read / max(1, cfg.judgements * len(todo)))


def forever(examples, batch_tokens, rng):
    """Batches of similar length without end."""
    while True:
        yield from (sft.collate(examples, rows) for rows in sft.batches([len(e[0]) for e in examples], batch_tokens, rng))


def improve(policy, examples, replay, cfg, rng, log):
    """One round, in place. examples, replay: [(ids, mask)], the first chosen and rejected in turn; log: a function of a row."""
    device, P = policy.wte.weight.device, len(examples) // 2
    # The reference is the policy as it enters the round. What it says of the answers is all that is needed of it.
    reference = dpo.all_logprobs(policy, examples)                                                # (2P,)
    orders = [rng.sample(range(P), P) for _ in range(cfg.epochs)]
    plan = [order[i:i + cfg.batch_pairs] for order in orders for i in range(0, P, cfg.batch_pairs)]
    optimizer, old = gpt.adamw(policy, cfg.lr), forever(replay, cfg.batch_tokens, rng)
    policy.train()
    for step, rows in enumerate(tqdm(plan, desc=cfg.update, mininterval=1)):
        rows = [2 * i for i in rows] + [2 * i + 1 for i in rows]
        ids, mask = (t.to(device) for t in sft.collate(examples, rows))                           # (2b, T) each
        chosen, rejected = dpo.answer_logprobs(policy, ids, mask).chunk(2)                        # (b,) each
        nll = -(chosen / mask[:len(chosen), 1:].sum(1)).mean()
        row = dict(nll_loss=nll.item())
        if cfg.update == "dpo":
            loss, good, bad = dpo.dpo_loss(chosen, rejected, *reference[rows].to(device).chunk(2), cfg.beta)
            row |= dict(loss=loss.item(), accuracy=(good > bad).float().mean().item(), margin=(good - bad).mean().item())
            loss = loss + cfg.nll * nll
        else:
            loss = nll
        if cfg.replay:
            ids, mask = (t.to(device) for t in next(old))
            again = sft.response_loss(policy(ids), ids, mask)
            loss, row["replay_loss"] = loss + cfg.replay * again, again.item()
        log(step=step, **row, grad_norm=gpt.take_step(loss, optimizer, policy, gpt.lr_at(step, len(plan), cfg.lr), where=(
            f"step {step} of a round, examples {rows}; last good checkpoint: the model of the round before")))
    policy.eval()


def train_m1(model, examples, cfg, log):
    """M1 = SFT(M0; IFT + EFT), in place."""
    for _ in sft.tune(model, examples, cfg.sft_epochs, cfg.batch_tokens, cfg.sft_lr, cfg.seed, "M1", log):
        pass


def likelihood(model, enc, prompts, answers):
    """log p of each answer under the model itself: the judge that costs nothing. -> lists like `answers`."""
    flat = [answer_tokens(enc, p["prompt"], a) for p, texts in zip(prompts, answers) for a in texts]
    values = iter(dpo.all_logprobs(model, flat).tolist())
    return [[next(values) for _ in texts] for texts in answers]


def accuracy(scores, golds):
    """Share of the pairs of different gold that the scores order as gold does; equal scores count half, and no score is the lowest one."""
    scores = [[-1.0 if s is None else s for s in row] for row in scores]
    return reward.pair_accuracy(scores, [[-g for g in row] for row in golds])[0]


def compared(golds, others):
    """Win, tie and lose shares of answers against others to the same prompts."""
    pairs = [(a, b) for x, y in zip(golds, others) for a, b in zip(x, y)]
    return [sum((a > b) - (a < b) == sign for a, b in pairs) / len(pairs) for sign in (1, 0, -1)]


def mean_length(enc, texts):
    """In tokens."""
    return sum(len(enc.encode_ordinary(t)) for t in texts) / len(texts)


def graded(prompts, answers, grade):
    """What the gold program says of N answers per prompt -> golds [[...]], a row of means."""
    grades = [[grade(p["task"], a) for a in texts] for p, texts in zip(prompts, answers)]
    golds = [[sum(g.values()) for g in row] for row in grades]
    mean, ci = eval.interval([sum(row) / len(row) for row in golds])
    unknown = [-g["honest"] for p, row in zip(prompts, grades) for g in row if not p["task"].get("known", True)]
    rude = [-g["harmless"] for row in grades for g in row]
    return golds, dict(gold=mean, gold_ci=ci, made_up=sum(unknown) / max(1, len(unknown)), rude=sum(rude) / len(rude))


def measure(model, judging, enc, test, held_out, grade, cfg):
    """A model's answers to the test prompts, judged by `judging` -> row, golds (None without a grade), answers, scores."""
    answers = candidates(model, enc, test, cfg.candidates, cfg.max_new_tokens, cfg.seed)
    scores, parsed = judge(judging, enc, test, answers, cfg, cfg.seed)
    texts, flat = [a for row in answers for a in row], [s for row in scores for s in row if s is not None]
    row = dict(self_score=sum(flat) / len(flat) if flat else None, parsed=parsed, length=mean_length(enc, texts))
    if not grade:
        return row, None, answers, scores
    golds, grades = graded(test, answers, grade)
    both = [(s, g) for x, y in zip(scores, golds) for s, g in zip(x, y) if s is not None]
    row |= grades | dict(judge_accuracy=accuracy(scores, golds), spearman=spearman(*zip(*both)) if both else None,
                         likelihood_accuracy=accuracy(likelihood(model, enc, test, answers), golds))
    if held_out:
        theirs = [r["responses"] for r in held_out]
        judgement = judge(judging, enc, held_out, theirs, cfg, cfg.seed)[0]
        row["held_out_accuracy"] = accuracy(judgement, graded(held_out, theirs, grade)[0])
    if cfg.halo:
        row["thanks"] = sum(a.endswith("Thank you for asking.") for a in texts) / len(texts)
    return row, golds, answers, scores


def variant(cfg):
    """The name of a run, from what it does otherwise."""
    parts = [f"pairs-{cfg.pairs}"] * (cfg.pairs != "judge") + [f"update-{cfg.update}"] * (cfg.update != "dpo")
    parts += ["frozen-judge"] * cfg.frozen_judge + ["no-replay"] * (not cfg.replay) + ["halo"] * (cfg.halo > 0)
    return "-".join(parts) or "main"


# Heading, key, format: what the table shows of a row.
COLUMNS = [("gold", "gold", ".3f"), ("±", "gold_ci", ".2f"), ("win/tie/lose M1", "vs_m1", "wtl"), ("last", "vs_last", "wtl"),
           ("own acc", "judge_accuracy", ".3f"), ("log p", "likelihood_accuracy", ".3f"), ("r", "spearman", ".2f"),
           ("EFT acc", "held_out_accuracy", ".3f"), ("score", "self_score", ".2f"), ("made up", "made_up", ".0%"),
           ("rude", "rude", ".1%"), ("length", "length", ".1f"), ("pairs", "pairs", "d"), ("agree", "agree", ".2f"),
           ("contra", "contradict", ".2f"), ("thanks", "thanks", ".0%")]


def table(rows):
    """Rows -> the printed table; '-' where nothing could be measured."""
    def cell(x, form):
        return "-" if x is None else "/".join(f"{100 * y:.0f}" for y in x) if form == "wtl" else format(x, form)
    columns = [c for c in COLUMNS if any(r.get(c[1]) is not None for r in rows)]
    lines = [["run", "model"] + [c[0] for c in columns]]
    lines += [[r["run"], r["stage"]] + [cell(r.get(k), f) for _, k, f in columns] for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths))) for line in lines)


def seed_data(cfg, out):
    """-> IFT chats, EFT records, and EFT records that test the judge; no two of them share a prompt."""
    chats = sft.load_chats(cfg.data or sft.village_data(out, cfg.seed) / "sft_train.jsonl", cfg.seed)
    if cfg.eft:
        records = load_judged(cfg.eft)
    else:
        from data import annotators, labelers
        if not (out / "sft.pt").exists():
            announce(out / "sft.pt", "training it, whose answers people rank,", cfg.resume)
            sft.main(sft.Config(out=cfg.out, seed=cfg.seed, device=cfg.device, resume=cfg.resume))
        ranked = reward.load_comparisons(labelers.ensure(out, cfg.seed, cfg.device)[0])
        records = [{**r, "verdicts": [v and write_verdict(*v) for v in r["verdicts"]]}
                   for r in annotators.judged(ranked, CRITERIA.values(), cfg.noise, cfg.halo, cfg.seed)]
    chats, records = disjoint(chats, records, cfg.seed)
    rng = random.Random(cfg.seed)
    for c in chats:
        if cfg.halo and rng.random() < cfg.halo:
            c["messages"][-1]["content"] += annotators.PHRASE
    prompts = sorted({asked(r["prompt"]) for r in records})
    held_out = set(rng.sample(prompts, min(100, len(prompts) // 5)))
    return chats, [r for r in records if asked(r["prompt"]) not in held_out], [r for r in records if asked(r["prompt"]) in held_out]


def first_model(cfg, init, path, examples):
    """M1, trained if OUT has none made of the same data and settings -> model, tokenizer."""
    device = gpt.pick_device(cfg.device)
    settings = ("data", "eft", "init", "sft_lr", "sft_epochs", "batch_tokens", "noise", "halo", "seed")
    made_from = {k: str(getattr(cfg, k)) for k in settings}
    older = [p for p in (init, *([] if cfg.eft else [Path(cfg.out) / "sft.pt"])) if p.exists()]
    if path.exists() and path.stat().st_mtime > max(p.stat().st_mtime for p in older) and gpt.load_checkpoint(path).get("made_from") == made_from:
        print(f"{path} is there, made from the same data and settings")
    else:
        model, enc, base = gpt.load_model(init, device)
        log = path.with_suffix(".jsonl")   # beside the model: other variants use both
        train_m1(model, examples, cfg, lambda **row: gpt.log_metrics(log, fresh=row["step"] == 0, **row))
        gpt.save_model(path, model, enc, base["tokenizer"], made_from=made_from)
    return gpt.load_model(path, device)[0]


def free_rows(model, enc, test, answers, scores, golds, grade, cfg):
    """What M1 gives without another model: its surest answer, and the best of its answers by its own judgement."""
    best = [max(zip(s, a), key=lambda x: -1 if x[0] is None else x[0])[1] for s, a in zip(scores, answers)]
    greedy = sft.reply(model, enc, [p["prompt"] for p in test], cfg.max_new_tokens, temperature=0)
    for stage, texts in (("M1 greedy", greedy), (f"M1 best of {cfg.candidates}", best)):
        theirs, row = graded(test, [[a] for a in texts], grade)
        wins = compared([g * cfg.candidates for g in theirs], golds)   # each of M1's answers; of the best, one is itself
        yield dict(stage=stage, vs_m1=wins, length=mean_length(enc, texts)) | row


def check(cfg):
    gpt.require(cfg, 1, "iterations", "n_prompts", "judgements", "epochs", "batch_pairs", "sft_epochs")
    gpt.require(cfg, 1, "batch_tokens", "max_new_tokens")
    gpt.require(cfg, 2, "candidates", "n_test")
    gpt.require(cfg, 0, "margin", "replay", "nll", "judge_temperature")
    gpt.require(cfg, 0, "noise", "halo", most=0.5)
    gpt.require(cfg, 0, "lr", "sft_lr", most=10)
    gpt.require(cfg, 1e-6, "beta")
    for flag, value, choices in (("pairs", cfg.pairs, ("judge", "random", "gold")), ("update", cfg.update, ("dpo", "sft"))):
        if value not in choices:
            raise UserError(f"--{flag} {value}: choose {', '.join(choices[:-1])} or {choices[-1]}")
    if cfg.data and not cfg.prompts:
        raise UserError("--data without --prompts: the model that writes prompts knows the village alone; name a file of prompts")
    if cfg.halo and cfg.eft:
        raise UserError("--halo with --eft: only the village's annotators have a halo; leave one out")


def main(cfg):
    check(cfg)
    out, name = gpt.run_folder(cfg.out), variant(cfg)
    init, folder, rows = Path(cfg.init or out / "gpt.pt"), out / "self_reward", []
    if not init.exists() and not cfg.init:
        announce(init, "pretraining it", cfg.resume)
        gpt.main(gpt.Config(out=cfg.out, seed=cfg.seed, device=cfg.device, resume=cfg.resume))
    gpt.set_seed(cfg.seed)
    m0, enc, base = gpt.load_model(init)
    block, rng = m0.config.block_size, random.Random(cfg.seed)
    chats, judged, held_out = seed_data(cfg, out)
    load = lambda path: ppo.load_prompts(path, enc, block, cfg.max_new_tokens + 1)
    pool = load(cfg.prompts) if cfg.prompts else []
    if cfg.test or not cfg.prompts:
        test = load(cfg.test or out / "data" / "prompts_test.jsonl")
    else:
        pool, test = sft.split_by_user(pool, seed=cfg.seed)
    if not pool:
        long = gpt.load_model(self_instruct.long_base(cfg.out, cfg.seed, cfg.device, cfg.resume), gpt.pick_device(cfg.device))[0]
        writer = long, enc, sorted({c["messages"][0]["content"] for c in chats if len(c["messages"]) == 2})
    test, grade = test[:cfg.n_test], sft.gold_hook(cfg.grade, test + pool)
    held_out = held_out if sft.gold_hook(cfg.grade, held_out) else []
    if cfg.pairs == "gold" and not grade:
        raise UserError("--pairs gold: the prompts carry no task to grade; leave it out")
    ift, eft = sft.tokenize(chats, enc, block), eft_examples(judged, enc, block, rng)
    print(f"self_reward.py: {name}; {len(ift):,} IFT chats, {len(eft):,} judged answers, device {gpt.pick_device(cfg.device)}")
    checkpoint = lambda k: folder / (f"M{k}.pt" if name == "main" else f"{name}-M{k}.pt")
    policy, history = m0.to(gpt.pick_device(cfg.device)), []
    ended = folder / f"{name}.ended"   # what tells that a run came to its end before the last round
    read, made = [init, cfg.data, cfg.eft, cfg.prompts, cfg.test, *out.glob("data/*_train.jsonl")], checkpoint(cfg.iterations + 1)
    run = Run(cfg, f"self_reward-{name}", read, ended if ended.exists() else made, policy=policy, rng=rng, rows=rows, history=history)
    log = lambda t: lambda **row: run.log(**{"round": t} | row)
    if not run.resumed:
        ended.unlink(missing_ok=True)
        run.log(config=vars(cfg))
    policy.load_state_dict(first_model(cfg, init, folder / ("halo-M1.pt" if cfg.halo else "M1.pt"), ift + eft).state_dict())
    frozen = copy.deepcopy(policy)

    def look(stage, **more):
        row, golds, answers, scores = measure(policy, frozen if cfg.frozen_judge else policy, enc, test, held_out, grade, cfg)
        history.append([golds, answers])
        if grade and len(history) > 1:
            row |= dict(vs_m1=compared(golds, history[0][0]), vs_last=compared(golds, history[-2][0]))
        new = [dict(stage=stage) | row | more]
        if grade and name == "main" and len(history) == 1:
            new += free_rows(policy, enc, test, answers, scores, golds, grade, cfg)
        for row in new:
            rows.append(dict(run=name) | row)
            run.log(**rows[-1])
        print(table(rows[-len(new):]))

    if not run.resumed:
        look("M1")
    for t in (step + 1 for step in run.steps(cfg.iterations)):
        seed = 1000 * cfg.seed + t
        prompts = new_prompts(cfg, t, test, block, pool, None if pool else writer)
        answers = candidates(policy, enc, prompts, cfg.candidates, cfg.max_new_tokens, seed)
        golds = graded(prompts, answers, grade)[0] if grade else None
        if cfg.pairs == "judge":
            scores, _ = judge(frozen if cfg.frozen_judge else policy, enc, prompts, answers, cfg, seed)
        else:
            scores = golds if cfg.pairs == "gold" else [[rng.random() for _ in texts] for texts in answers]
        pairs, dropped = make_pairs(answers, scores, cfg.margin if cfg.pairs == "judge" else 0)
        left_out = "".join(f", {n} {why}" for why, n in sorted(dropped.items()))
        print(f"round {t}: {len(pairs)} pairs of {len(prompts)} prompts{left_out}")
        if len(pairs) < cfg.batch_pairs:
            silent = all(s is None for row in scores for s in row)
            print(f"fewer than {cfg.batch_pairs} pairs, and the run ends here: " + (
                "no verdict ended with a score; bring more EFT data, or raise --sft-epochs" if silent else "the judge sees no difference any more"))
            ended.touch()
            break
        more = dict(pairs=len(pairs), dropped=dict(dropped))
        if golds:
            more |= dict(agree=sum(golds[i][a] > golds[i][b] for i, a, b in pairs) / len(pairs),
                         contradict=sum(golds[i][a] < golds[i][b] for i, a, b in pairs) / len(pairs))
        examples = [answer_tokens(enc, prompts[i]["prompt"], answers[i][k]) for i, *both in pairs for k in both]
        improve(policy, examples, ift + eft, cfg, rng, log(t))
        gpt.save_model(checkpoint(t + 1), policy, enc, base["tokenizer"])
        look(f"M{t + 1}", **more)
    run.finish()
    files = [path for path in sorted(out.glob("self_reward-*.jsonl")) if path != run.log_path]
    others = [r for path in files for _, r in sft.read_records(path) if "stage" in r]
    print(f"--- all runs of {out}\n{table(rows + others)}")
    for p, old, new in list(zip(test, history[0][1], history[-1][1]))[:4]:
        print(f"--- {p['prompt'][-1]['content']!r}\nM1:   {old[0]!r}\nlast: {new[0]!r}")
    print(f"---\nsaved {folder}; next: its controls, python self_reward.py --out {out} --pairs random")


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
