"""The course kit: handouts hold no solution, the grader names mistakes, hostile code gets 0."""
import ast
import csv
import inspect
import itertools
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import types
import zipfile

import pytest

from course import child, grader, handout, kit, probes, sheet, tasks
from course.assignments import ASSIGNMENTS, HUNT
from course.mistakes import MISTAKES
from scaffold.cli import UserError
from tiny import ROOT
import test_layout

CODED = [name for name, a in ASSIGNMENTS.items() if a.parts]
PARTS = [part for a in ASSIGNMENTS.values() for part in a.parts]
BY_NAME = {part.name: part for part in PARTS}
README = (ROOT / "course" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sheet0():
    """The public sheet of all assignments, without pairs."""
    return sheet.make(list(ASSIGNMENTS), pairs=False)


@pytest.fixture(scope="module")
def answers(sheet0):
    """{part: its dictionary with right outputs and known mistakes}."""
    return {p["name"]: p for a in sheet0["assignments"].values() for p in a["parts"]}


def row_of(outputs):
    return {"outputs": outputs, "refused": [], "changed": []}


def judged(answer, text, seed=0):
    """Judge trusted code of one part in this process."""
    outputs = sheet.outputs_of(BY_NAME[answer["name"]], text, seed)
    return grader.judge(answer, row_of(outputs), seed)


def submit(folder, **files):
    """Write files into a submission: gae="text" becomes gae.py."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def stub(part, body):
    """Return the file of a part with `body` in place of what is cut."""
    [(name, anchor)] = part.cuts.items()
    text, _ = sheet.cut(sheet.reference(part.file), name, anchor, "stub")
    return text.replace('raise NotImplementedError("stub")', body)


def config(*words, **settings):
    return kit.Config(words=words, **settings)


# The table of the assignments


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name)
def test_a_part_is_in_step_with_the_code_and_its_probe(part):
    text = sheet.reference(part.file)
    for function, anchor in part.cuts.items():
        short, removed = sheet.cut(text, function, anchor, "message")
        compile(short, part.file, "exec")
        assert removed.strip() and removed in text
    cases, _ = probes.of(part.name)
    assert {c.concept for c in cases} == {c.name for c in part.concepts}
    assert len({c.name for c in cases}) == len(cases)
    assert {c.twin for c in cases} - {""} <= {c.name for c in cases}


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name)
def test_every_property_quotes_the_docstring_that_decides_it(part):
    tree = ast.parse(sheet.reference(part.file))
    nodes = [tree] + [child.find(tree, name) for name in part.cuts]
    nodes += [child.find(tree, name.split(".")[0]) for name in part.cuts]
    signatures = [ast.unparse(n.args) for n in nodes if isinstance(n, ast.FunctionDef)]
    texts = [ast.get_docstring(n) or "" for n in nodes] + signatures
    said = " ".join(" ".join(texts).split())
    assert [c.line for c in part.concepts if " ".join(c.line.split()) not in said] == []


def test_cutting_keeps_signature_decorators_docstring_and_guards():
    text, removed = sheet.cut(sheet.reference("gae.py"), "gae", "dtype = ", "A7")
    node = child.find(ast.parse(text), "gae")
    assert ast.unparse(node.decorator_list[0]) == "torch.no_grad()"
    assert [a.arg for a in node.args.args] == ["rewards", "values", "mask", "gamma", "lam"]
    assert "arXiv:1506.02438" in ast.get_docstring(node)
    assert "gae needs rewards" in ast.unparse(node.body)
    assert ast.unparse(node.body[-1]) == "raise NotImplementedError('A7')"
    assert "next_advantage" in removed and "next_advantage" not in ast.unparse(node)


@pytest.mark.parametrize(("anchor", "n"), [("no such statement", 0), ("if ", 2)])
def test_an_anchor_that_is_missing_or_repeated_is_an_error(anchor, n):
    text = "def f(x):\n    if x:\n        x = 1\n    if x:\n        x = 2\n    return x\n"
    with pytest.raises(ValueError, match=f"f: {n} statements begin with"):
        sheet.cut(text, "f", anchor, "")


def test_every_known_mistake_is_one_change_with_a_name_of_its_own():
    names = [name for part in PARTS for name in part.bugs.split()] + [m.name for m in MISTAKES]
    assert len(set(names)) == len(names)
    assert {m.part for m in MISTAKES} <= set(BY_NAME)
    for part in PARTS:
        for change in sheet.changes_of(part):
            assert sheet.apply(change, sheet.reference(part.file)), change.name


def test_the_readme_counts_the_known_mistakes_and_has_the_numbers_of_results():
    n = sum(len(sheet.changes_of(part)) for part in PARTS)
    assert n >= 95
    assert f"The grader knows {n} mistakes" in README
    made = README.split(sheet.BEGIN)[1].split(sheet.END)[0]
    assert made == "\n" + sheet.table()
    assert "This is no sandbox" in README
    way = re.search(r"```bash\n(.*?)```", README, re.S)[1].strip().splitlines()
    assert len(way) <= 10


# Naming mistakes


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name)
def test_every_known_mistake_is_named_and_no_other(part, answers):
    """Substitute each; this tests the probes, too: a mistake they miss would count as right."""
    for change in sheet.changes_of(part):
        found = judged(answers[part.name], sheet.apply(change, sheet.reference(part.file)))
        assert found.names == [change.name]
        assert bool(found.wrong) != change.convention, change.name
        assert any(change.says in line for line in found.lines)


def test_mistakes_are_named_on_private_inputs():
    for part in random.Random(0).sample(PARTS, 6):
        answer = sheet.answered(part, 4711, pairs=False)
        for change in sheet.changes_of(part):
            text = sheet.apply(change, sheet.reference(part.file))
            assert judged(answer, text, 4711).names == [change.name]


def test_of_random_pairs_of_mistakes_none_passes_as_right(answers):
    pairs = [(part, a, b) for part in PARTS
             for a, b in itertools.combinations(sheet.changes_of(part), 2)
             if not (a.convention or b.convention)]
    tried = 0
    for part, a, b in random.Random(1).sample(pairs, 120):
        text = sheet.apply(b, sheet.apply(a, sheet.reference(part.file)))
        if text is not None and tried < 60:
            tried += 1
            assert judged(answers[part.name], text).wrong, (a.name, b.name)
    assert tried == 60


def test_a_pair_of_mistakes_is_named():
    part = BY_NAME["whiten"]
    answer = sheet.answered(part, 0)
    text = sheet.reference(part.file)
    for name in ("whiten-over-padding", "x-times-mask"):
        change = next(c for c in sheet.changes_of(part) if c.name == name)
        text = sheet.apply(change, text)
    assert sorted(judged(answer, text).names) == ["whiten-over-padding", "x-times-mask"]


def test_the_real_solutions_are_right_in_the_child_process(sheet0):
    parts = [p for name in CODED for p in sheet0["assignments"][name]["parts"]]
    findings = grader.check({"parts": parts}, ROOT, sheet0)
    assert {f.part["name"]: f.lines for f in findings if f.lines} == {}
    assert sum(f.points for f in findings) == sum(f.most for f in findings) > 150


def test_an_unknown_mistake_is_described(answers):
    x = "    values = torch.where(mask, values, 0).to(dtype)"
    text = sheet.reference("gae.py").replace(x, x + " + 0.01 * values.sum()")
    found = judged(answers["gae"], text)
    assert found.names == []
    assert re.match(r"lambda .7, gamma .9: row 0, position \d: yours \S+, wanted", found.lines[0])
    assert "The result changes with the values outside the response." in found.lines
    assert judged(answers["masked_mean"], sheet.reference("scaffold/health.py").replace(
        "return (x * mask).sum() /", "return (x.detach() * mask).sum() /")).lines[1:] == [
        "The loss has no gradient."]


def test_properties_earn_points_one_by_one(answers):
    change = next(c for c in sheet.changes_of(BY_NAME["gae"]) if c.name == "gae-with-gradient")
    found = judged(answers["gae"], sheet.apply(change, sheet.reference("gae.py")))
    assert found.wrong == ["no gradient"]
    assert found.points == found.most - 1


@pytest.mark.parametrize("body", ["return torch.zeros_like(x)", "return x", "return None", "pass"])
def test_a_stub_earns_nothing(body, answers):
    found = judged(answers["whiten"], stub(BY_NAME["whiten"], body))
    assert found.points == 0


# Other right ways to write a function, as students do. Each replaces what the handout cuts out.
OTHER_WAYS = {
    "predicted": """
        inside = torch.zeros(len(segments), segments.shape[1] - 1, dtype=torch.bool)
        for b in range(len(segments)):
            for t in range(segments.shape[1] - 1):
                inside[b, t] = segments[b, t] == segments[b, t + 1] != 0
        return inside""",
    "token_logprobs": """
        logits = model(ids) if states is None else model.unembed(states)
        logprobs = (logits[:, :-1].float() / temperature).log_softmax(-1)
        return logprobs.gather(2, ids[:, 1:, None])[..., 0] * mask""",
    "attention": """
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = [y.view(B, T, H, D).transpose(1, 2) for y in self.c_attn(x).chunk(3, -1)]
        if cache is not None and T == 1:
            y = cache.attend(layer, q, torch.stack([k, v]))
        else:
            if cache is not None:
                cache.kv[layer][0, :, :, :T] = k
                cache.kv[layer][1, :, :, :T] = v
            seen = torch.ones(T, T).tril().bool() if mask is None else mask
            scores = (q @ k.transpose(2, 3) / math.sqrt(D)).masked_fill(~seen, -math.inf)
            y = torch.softmax(scores, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))""",
    "mlp": """
        h = self.c_fc(x)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
        return self.c_proj(h)""",
    "hidden": """
        B, T = ids.shape
        positions = torch.arange(T).expand(B, T).clone()
        mask = None
        if segments is not None:
            for b in range(B):
                for t in range(1, T):
                    same = segments[b, t] == segments[b, t - 1]
                    positions[b, t] = positions[b, t - 1] + 1 if same else 0
            mask = torch.zeros(B, 1, T, T, dtype=torch.bool)
            for t in range(T):
                for s in range(t + 1):
                    mask[:, 0, t, s] = segments[:, t] == segments[:, s]
        elif cache is not None and T == 1:
            positions = cache.open_slots()
        x = self.drop(self.wte(ids) + self.wpe(positions))
        for i in range(len(self.h)):
            x = self.h[i](x, cache=cache, layer=i, mask=mask)
        return self.ln_f(x)""",
    "sample_tokens": """
        if temperature == 0:
            return logits.argmax(-1)
        logits = logits / temperature
        if top_k is not None and top_k < logits.shape[-1]:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
        if top_p is not None:
            ordered, order = logits.softmax(-1).sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            drop = torch.zeros_like(before).scatter(1, order, (before >= top_p).double()) > 0
            drop[torch.arange(len(drop)), order[:, 0]] = False
            logits = logits.masked_fill(drop, -math.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=rng)[:, 0]""",
    "generate": """
        training = model.training
        model.eval()
        rng = None if seed is None else torch.Generator().manual_seed(seed)
        found = []
        for prompt in prompts:
            ids, new = list(prompt), []
            while len(new) < max_new_tokens and len(ids) < model.config.block_size:
                logits = model(torch.tensor([ids]))[:, -1]
                new.append(sample_tokens(logits, temperature, top_k, top_p, rng).item())
                ids.append(new[-1])
                if new[-1] == stop:
                    break
            found.append(new)
        model.train(training)
        return found""",
    "render": """
        check_messages(messages)
        ids, mask = [], []
        for m in messages:
            text = enc.encode_ordinary(m["content"])
            ids += [enc.encode_single_token("<|" + m["role"] + "|>"), *text, end_of(enc)]
            one = m["role"] == "assistant"
            mask += [False] + [one] * (len(text) + 1)
        return ids, mask""",
    "response_loss": """
        logprobs = logits[:, :-1].log_softmax(-1)
        picked = logprobs.gather(2, ids[:, 1:, None])[..., 0]
        mask = mask[:, 1:].to(picked.dtype)
        return -(torch.where(mask > 0, picked, 0)).sum() / max(1, mask.sum())""",
    "split_by_user": """
        groups = users_of(records)
        if len({g for g in groups if g is not None}) < 2:
            groups = [prompt_key(r) or str(i) for i, r in enumerate(records)]
        names = sorted({g for g in groups if g is not None})
        if len(names) == 1:
            return records, records
        val = set(random.Random(seed + 1).sample(names, max(1, round(len(names) * fraction))))
        return ([r for r, g in zip(records, groups) if g not in val],
                [r for r, g in zip(records, groups) if g in val])""",
    "pair_mask": """
        B, K = ranks.shape
        mask = torch.zeros(B, K, K)
        for b in range(B):
            for i in range(K):
                for j in range(K):
                    mask[b, i, j] = 0 < ranks[b, i] < ranks[b, j]
        return mask.bool()""",
    "ranking_loss": """
        losses = []
        for s, mask in zip(scores, pairs):
            if mask.any():
                i, j = mask.nonzero(as_tuple=True)
                losses.append(F.softplus(s[j] - s[i]).mean())
        return torch.stack(losses).mean()""",
    "score": """
        return self(ids).gather(1, lengths[:, None] - 1)[:, 0]""",
    "kl_rewards": """
        rewards = torch.zeros_like(logprobs)
        for b in range(len(mask)):
            steps = mask[b].nonzero()[:, 0]
            rewards[b, steps] = -beta * (logprobs[b, steps] - ref_logprobs[b, steps])
            if len(steps):
                rewards[b, steps[-1]] += scores[b]
        return rewards""",
    "gae": """
        mask = mask > 0
        r = torch.where(mask, rewards, 0.0)
        v = torch.where(mask, values, 0.0)
        ahead = torch.cat([v[:, 1:], torch.zeros(len(v), 1)], 1)
        delta = torch.where(mask, r + gamma * ahead - v, 0.0)
        T = mask.shape[1]
        power = torch.arange(T)[None, :] - torch.arange(T)[:, None]
        weights = torch.where(power >= 0, (gamma * lam) ** power.clamp(min=0).double(), 0.0)
        advantages = torch.where(mask, delta.double() @ weights.T, 0.0)
        return advantages, advantages + v""",
    "whiten": """
        inside = x[mask.bool()].double()
        out = torch.zeros(x.shape, dtype=torch.float64)
        std = torch.sqrt(inside.var(correction=0) + 1e-8)
        out[mask.bool()] = (inside - inside.mean()) / std
        return out""",
    "masked_mean": """
        return x[mask.bool()].mean() if mask.any() else (x * 0).sum()""",
    "policy_loss": """
        inside = mask > 0
        ratio = (logprobs[inside] - old_logprobs[inside]).exp()
        a = advantages[inside]
        low = torch.clamp(ratio, 1 - clip, 1 + clip) * a
        return -torch.min(ratio * a, low).mean(), (low < ratio * a).double().mean()""",
    "value_loss": """
        near = torch.max(torch.min(values, old_values + clip), old_values - clip)
        worst = torch.max((values - returns).abs(), (near - returns).abs())
        return masked_mean(worst * worst, mask) / 2""",
    "response_logprobs": """
        return (gpt.token_logprobs(model, ids) * mask[:, 1:]).sum(-1)""",
    "dpo_loss": """
        good = beta * (policy_chosen - ref_chosen)
        bad = beta * (policy_rejected - ref_rejected)
        e = label_smoothing
        if kind == "sigmoid":
            loss = (1 - e) * F.softplus(bad - good) + e * F.softplus(good - bad)
        elif kind == "ipo":
            loss = ((good - bad) / beta - 0.5 / beta).square()
        else:
            raise ValueError(kind)
        return loss.mean(), good.detach(), bad.detach()""",
    "mean_and_ci": """
        n = len(values)
        mean = sum(values) / n
        if n == 1:
            return mean, float("nan")
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
        return mean, 1.96 * std / n ** 0.5""",
    "win_rate": """
        points = [(a > b) + 0.5 * (a == b) for a, b in zip(mine, theirs)]
        return mean_and_ci(points)""",
    "parse_score": """
        found = re.findall("(?i)(?<![a-z])score[:：] *([0-9]+[.]?[0-9]*)", verdict)
        score = float(found[-1]) if found else None
        return None if score is None or score > max_score else score""",
    "mean_score": """
        good = [float(s) for s in scores if not (s is None or s != s)]
        return None if not good else sum(good) / len(good)""",
}


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_other_right_ways_are_right(name, answers):
    part = BY_NAME[name]
    indent = "        " if "." in next(iter(part.cuts)) else "    "
    body = textwrap.indent(textwrap.dedent(OTHER_WAYS[name]).strip(), indent).strip()
    found = judged(answers[name], stub(part, body))
    assert (found.wrong, found.lines) == ([], [])


# Transplanting


def findings_of(sheet0, folder, *parts, **limits):
    """Grade the named parts of a submission in one child -> {part: Finding}."""
    of = {p["name"]: p for a in sheet0["assignments"].values() for p in a["parts"]}
    found = grader.check({"parts": [of[name] for name in parts]}, folder, sheet0, **limits)
    return {f.part["name"]: f for f in found}


def test_functions_are_taken_alone_with_their_new_helpers(sheet0, tmp_path):
    """An unsolved neighbour, CRLF, a helper and a new import cost nothing; old code stays out."""
    whole = sheet.reference("gae.py")
    first = whole.index("    x = torch.where(mask, x, 0).to(torch")
    body = whole[first:whole.index("def print_ep")]
    solved = whole.replace(body, "    return scaled(x, mask)\n\n\n")
    helper = "from torch import rsqrt as inverse_root\n\n\ndef scaled(x, mask):\n"
    helper += body.replace("torch.rsqrt", "inverse_root")
    text = sheet.cut(solved, "gae", "dtype = ", "A7")[0] + "\n\n" + helper
    folder = submit(tmp_path / "ada")
    (folder / "gae.py").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    submit(folder, ppo="def value_loss(:\n", health="x = 1\n")
    found = findings_of(sheet0, folder, "gae", "whiten", "value_loss", "masked_mean", "dpo_loss")
    assert found["gae"].lines == ["not solved yet"]
    assert found["whiten"].points == found["whiten"].most
    assert found["value_loss"].lines[0].startswith("SyntaxError")
    assert found["value_loss"].line == 1
    assert found["masked_mean"].lines == ["LookupError: masked_mean is missing from "
                                          "scaffold/health.py"]
    assert found["dpo_loss"].lines == ["dpo.py is missing"]


HOSTILE = {
    "whiten": ("while True:\n        pass", "no result after 5 seconds"),
    "masked_mean": ("import os\n    os._exit(0)",
                    "the process ended before it had a result (exit code 0)"),
    "kl_rewards": ("x = []\n    while True:\n        x.append(b'1' * 10**8)",
                   "used more than 0.9 GB of memory"),
    "pair_mask": ("torch.equal = torch.allclose = lambda *a, **k: True\n    return ranks > 0",
                  "not allowed in a check: changed torch.allclose"),
    "dpo_loss": (f"return open({str(ROOT / 'dpo.py')!r}).read()", "not allowed in a check: open "),
    "win_rate": ("import subprocess\n    subprocess.run(['ls'])\n    return 1, 0",
                 "not allowed in a check: subprocess.Popen"),
    "mean_score": ("print('{\"part\": \"mean_score\", \"outputs\": {}}')\n    return 1e400",
                   "two scores: yours inf, wanted"),
    "parse_score": ("raise SystemExit(0)", "one score: raises SystemExit: 0"),
    "predicted": ("raise NotImplementedError('no')", "not solved yet"),
    "mean_and_ci": ("return torch.zeros(10**6), 0",
                    "nine values: raises a result of 1,000,000 numbers"),
}


def test_hostile_submissions_get_0_with_one_clear_line(sheet0, tmp_path):
    """All in one submission: whoever ends the process is blamed, the others are still graded."""
    folder = tmp_path / "eve"
    files = {}
    for name, (body, _) in HOSTILE.items():
        part = BY_NAME[name]
        base = files.get(part.file) or sheet.reference(part.file)
        [(function, anchor)] = part.cuts.items()
        text, _ = sheet.cut(base, function, anchor, "stub")
        files[part.file] = text.replace('raise NotImplementedError("stub")', body)
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    names = [*HOSTILE, "gae"]
    told = findings_of(sheet0, folder, *names, limit=5, memory=0.9 * 2**30)
    assert {name: told[name].points for name in HOSTILE} == dict.fromkeys(HOSTILE, 0)
    for name, (_, line) in HOSTILE.items():
        assert told[name].lines[0].startswith(line), (name, told[name].lines)
        assert len(told[name].lines) == 1
    assert told["gae"].points == told["gae"].most


def test_results_that_are_forged_are_no_results(answers):
    answer = answers["mean_score"]
    for outputs in ({}, {"two scores": 1}, {"": {"error": "x", "line": 0}},
                    {c.name: {"values": [None], "shape": 3} for c in probes.of("mean_score")[0]},
                    {c.name: {"values": "x"} for c in probes.of("mean_score")[0]}):
        found = grader.judge(answer, row_of(outputs), 0)
        assert found.points == 0
        assert len(found.lines) == 1


# Handouts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A handout of A12 and A13."""
    folder = tmp_path_factory.mktemp("course") / "handout"
    kit.main(config("handout", str(folder), "A12-A13"))
    return folder


def run_in(folder, *command):
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


def test_a_handout_parses_and_has_neither_answers_nor_history(made):
    files = {p.relative_to(made).as_posix(): p for p in made.rglob("*") if p.is_file()}
    for name, path in files.items():
        assert b"\r" not in path.read_bytes()
        if name.endswith(".py"):
            ast.parse(path.read_text(encoding="utf-8"))
    assert not {n for n in files if re.search(r"zoo|mutants|mistakes|sheet|\.git/|\.pyc|hypoth", n)}
    assert 'raise NotImplementedError("A12: python course/kit.py check A12")' in (
        files["data/exam.py"].read_text(encoding="utf-8"))
    text = files["README.md"].read_text(encoding="utf-8")
    assert "| `win_rate` | data/exam.py | ties count half | 2 |" in text
    assert "gold of best-of-16" in text
    assert "| `val/ratio_first` |" in text   # the page of ppo.py reads this table, too
    assert "==" not in files["requirements.txt"].read_text(encoding="utf-8")


def test_a_handout_has_every_module_that_it_imports(made):
    """Also those that a script imports only at its end, such as the page of ppo.py."""
    here = {p.relative_to(made).with_suffix("").as_posix().replace("/", ".")
            for p in made.rglob("*.py")}
    teachers = {"course.sheet", "course.handout", "course.assignments"}   # kit.py asks first
    for name in sorted(here - {"conftest"}):
        imported = test_layout.imports_of(made / (name.replace(".", "/") + ".py"))
        wanted = {t for i in imported for t in test_layout.targets(i)} - teachers
        assert wanted <= here, name


def test_the_visible_tests_of_a_handout_fail_only_where_code_was_removed(made):
    solution = sheet.cut(sheet.reference("data/exam.py"), "win_rate", "return", "A12")[0]
    before = (made / "data" / "exam.py").read_text(encoding="utf-8")
    (made / "data" / "exam.py").write_text(solution, encoding="utf-8")
    code, printed = run_in(made, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfp")
    (made / "data" / "exam.py").write_text(before, encoding="utf-8")
    failed = set(re.findall(r"^FAILED \S+test_property\[(A\d+)-(\w+)-", printed, re.M))
    passed = set(re.findall(r"^PASSED \S+test_property\[(A\d+)-(\w+)-", printed, re.M))
    assert code == 1
    cut = ("win_rate", "parse_score", "mean_score", "make_pairs")
    assert {function for _, function in failed} == set(cut)
    assert passed == {("A12", "mean_and_ci")}
    assert printed.count("FAILED") == sum(
        len(BY_NAME[name].concepts) for name in cut)
    assert "ERROR" not in printed


@pytest.mark.parametrize("names", [[name] for name in CODED] + [CODED], ids="-".join)
def test_no_handout_leaks(names, sheet0):
    clean, removed = sheet.clean_files(names)
    part = {"seed": 0, "clean": clean,
            "assignments": {name: sheet0["assignments"][name] for name in names}}
    assert handout.leaks(handout.files_of(names, part), removed) == []


@pytest.mark.parametrize("planted", [
    "x = 1\n        next_advantage = torch.where(mask[:, t], advantage, 0)  # oops\n",
    "        after = torch.where(m[:, i], a, 0)\n",
    '{"hint": ["write: next_advantage = torch.where(mask[:, t], advantage, 0)"]}',
])
def test_a_planted_leak_is_found(planted):
    _, removed = sheet.clean_files(["A7"])
    name = "data/x.json" if planted.startswith("{") else "data/x.py"
    assert handout.leaks({name: planted}, removed)
    assert handout.leaks({"x.py": "y = torch.where(mask, x, 0)\n"}, removed) == []


def test_a_handout_with_a_leak_is_not_written(tmp_path, monkeypatch):
    zoo = (ROOT / "tests" / "zoo.py").read_text(encoding="utf-8")
    assert handout.leaks({"zoo.py": zoo}, sheet.clean_files(["A7"])[1])
    files_of = handout.files_of
    lines = sheet.reference("data/exam.py")
    monkeypatch.setattr(handout, "files_of", lambda *a: files_of(*a) | {"tests/x.py": lines})
    with pytest.raises(UserError, match="it would hold parts of the solution: tests/x.py"):
        handout.write(tmp_path / "h", ["A12"])
    assert not (tmp_path / "h").exists()


def test_every_idiom_that_may_repeat_the_solution_does():
    clean, removed = sheet.clean_files(CODED)
    solution = {said for text in removed for said, _ in handout.renamed(handout.dedented(text))}
    assert handout.IDIOMS <= solution


def test_a_handout_does_not_overwrite(made):
    with pytest.raises(UserError, match="not empty"):
        handout.write(made, ["A12"])


# Commands, in the handout and in the clone


def test_a_student_checks_and_asks_for_hints(made):
    code, printed = run_in(made, "course/kit.py", "check", "A12")
    assert code == 1
    assert printed.splitlines() == [
        "A12 mean_and_ci    0 of 5", "     not solved yet",
        "A12 win_rate       0 of 4", "     not solved yet",
        "     more: python course/kit.py hint A12"]


def test_the_list_is_that_of_the_handout(made, capsys, monkeypatch):
    monkeypatch.setattr(kit, "HANDOUT", made / "course" / "handout.json")
    kit.main(config("list"))
    assert re.findall(r"^A\d+", capsys.readouterr().out, re.M) == ["A12", "A13"]
    with pytest.raises(UserError, match="this is a handout"):
        kit.main(config("handout", "x", "A12"))


@pytest.fixture
def fake_check(monkeypatch, sheet0):
    """Replace the child process by findings that a test sets: {part: Finding}."""
    known = {}

    def check(assignment, folder, sheet, limit=60, memory=0, told=lambda finding: None):
        found = [known.get(p["name"]) or right(p) for p in assignment["parts"]]
        for f in found:
            told(f)
        return found

    monkeypatch.setattr(grader, "check", check)
    monkeypatch.setattr(kit, "load_sheet", lambda *a: sheet0)
    return known


def right(part):
    return grader.Finding(part, right=[c["name"] for c in part["concepts"]])


def one_wrong(part):
    names = [c["name"] for c in part["concepts"]]
    return grader.Finding(part, right=names[1:], wrong=names[:1], names=["bug"],
                          lines=["row 0: yours 1, wanted 2", "known mistake (bug): <it>, 5% | off"],
                          printed="debug 1")


def test_a_check_that_passes_says_public_and_ends_with_0(fake_check, answers, capsys):
    kit.main(config("check", "a12"))
    printed = capsys.readouterr().out
    assert "A12: public checks passed. To finish: python evaluate.py" in printed
    assert " all " not in printed
    fake_check["win_rate"] = one_wrong(answers["win_rate"])
    with pytest.raises(SystemExit) as e:
        kit.main(config("check", "A12"))
    assert e.value.code == 1
    printed = capsys.readouterr().out
    assert "A12 win_rate       2 of 4   (ties count half wrong, wins ok)" in printed
    assert "printed: debug 1" in printed


def test_hints_have_four_steps(fake_check, answers, capsys):
    fake_check["win_rate"] = one_wrong(answers["win_rate"])
    shown = []
    for level in range(4):
        kit.main(config("hint", "A12", level=level))
        shown.append(capsys.readouterr().out.splitlines())
    assert [len(lines) for lines in shown] == [2, 3, 4, 5]
    assert shown[0] == ["A12 win_rate: ties count half", "     row 0: yours 1, wanted 2"]
    assert shown[3][-2:] == ["     in training: A model beats its own copy.",
                             '     docstring: "half of the ties"']
    with pytest.raises(UserError, match="--level 4: must be between 0 and 3"):
        kit.main(config("hint", "A12", level=4))


def test_github_gets_a_summary_and_a_line(fake_check, answers, capsys, tmp_path, monkeypatch):
    fake_check["win_rate"] = one_wrong(answers["win_rate"])
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    with pytest.raises(SystemExit):
        kit.main(config("check", "A12"))
    [error] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("::error")]
    line = sheet.reference("data/exam.py").splitlines().index("def win_rate(mine, theirs):") + 1
    assert error.startswith(f"::error file=data/exam.py,line={line}::A12 win_rate: row 0: yours 1")
    assert "5%25" in error
    summary = (tmp_path / "summary.md").read_text()
    assert "| win_rate | 2 of 4 | row 0: yours 1, wanted 2 known mistake (bug): &lt;it>" in summary
    assert "\\| off" in summary


def test_watch_checks_after_a_save_and_moves_on(fake_check, answers, capsys, tmp_path,
                                                monkeypatch):
    for file in ("data/exam.py", "data/verdicts.py", "self_reward.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("x = 1\n")
    fake_check["win_rate"] = one_wrong(answers["win_rate"])

    def save(seconds):
        del fake_check["win_rate"]
        os.utime(tmp_path / "data/exam.py", ns=(1, 1))

    monkeypatch.setattr(kit, "ROOT", tmp_path)
    monkeypatch.setattr(kit, "time", types.SimpleNamespace(sleep=save))
    kit.main(config("watch", "A12-A13"))
    printed = capsys.readouterr().out
    assert re.findall(r"^(A\d+): public", printed, re.M) == ["A12", "A13"]
    assert "waiting for a change of exam.py" in printed
    assert printed.endswith("public checks passed\n")


def test_gradescope_results_are_complete_after_every_check(fake_check, sheet0, tmp_path,
                                                           monkeypatch):
    part = {"seed": 0, "clean": sheet0["clean"],
            "assignments": {k: sheet0["assignments"][k] for k in ("A12", "A13")}}
    monkeypatch.setattr(kit, "load_sheet", lambda *a: part)
    results = tmp_path / "results.json"
    submit(tmp_path / "s", exam="")
    check = grader.check

    def crash(assignment, *args, **kwargs):
        if assignment["title"] == part["assignments"]["A13"]["title"]:
            raise MemoryError
        return check(assignment, *args, **kwargs)

    monkeypatch.setattr(grader, "check", crash)
    with pytest.raises(MemoryError):
        kit.main(config("grade", str(tmp_path / "s"), "A12", "A13", gradescope=str(results)))
    tests = json.loads(results.read_text())["tests"]
    keys = {"name", "number", "score", "max_score", "status", "output", "visibility"}
    assert all(set(t) == keys for t in tests)
    assert sum(t["max_score"] for t in tests) == 9 + 17
    assert sum(t["score"] for t in tests) == 9
    assert {t["output"] for t in tests if t["status"] == "failed"} == {"not run yet"}
    part["seed"] = 5
    assert {t["visibility"] for t in kit.gradescope_tests(part, {})} == {"after_due_date"}


def test_a_folder_of_submissions_becomes_a_table(sheet0, tmp_path, capsys):
    good = sheet.reference("data/exam.py")
    change = next(c for c in sheet.changes_of(BY_NAME["win_rate"]) if c.name == "ties-are-losses")
    submit(tmp_path / "ada", exam=good)
    submit(tmp_path / "ben", exam=sheet.apply(change, good))
    kit.main(config("grade", str(tmp_path), "A12", seed=7, csv=str(tmp_path / "grades.csv")))
    with open(tmp_path / "grades.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [(r["student"], r["A12"], r["total"], r["of"]) for r in rows] == [
        ("ada", "9", "9", "9"), ("ben", "7", "7", "9")]
    assert rows[0]["notes"] == ""
    assert "ties-are-losses" in rows[1]["notes"]
    for wrong, line in ((tmp_path / "none", "no such folder"), (ROOT / ".ci", "no submissions")):
        with pytest.raises(UserError, match=line):
            kit.main(config("grade", str(wrong), "A12"))


def test_the_autograder_grades_alone_and_has_no_solutions(tmp_path):
    kit.main(config("autograder", str(tmp_path / "a.zip"), "A12", seed=9))
    with zipfile.ZipFile(tmp_path / "a.zip") as z:
        assert z.getinfo("run_autograder").external_attr >> 16 == 0o755
        text = z.read("data/exam.py").decode()
        assert "1.96" not in text
        assert b"useradd" in z.read("setup.sh")
        command = z.read("run_autograder").decode().splitlines()[-1].split()
        z.extractall(tmp_path / "source")
    submit(tmp_path / "submission", exam=sheet.reference("data/exam.py"))
    command = [c.replace("/autograder/results", str(tmp_path)).replace(
        "/autograder", str(tmp_path)) for c in command[1:]]
    code, printed = run_in(tmp_path / "source", *command)
    assert code == 0, printed
    tests = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert [t["score"] for t in tests] == [t["max_score"] for t in tests]


@pytest.mark.parametrize(("words", "line"), [
    (("chek",), "chek: no such command"),
    (("check", "A99"), "A99: no such assignment; choose from A1"),
    (("check", "A9-A4"), "A9-A4: no such assignment"),
    (("handout",), "handout: name a folder"),
    (("handout", "x", "A13-A14"), "hand it out alone"),
])
def test_wrong_commands_are_one_line(words, line):
    with pytest.raises(UserError, match=line):
        kit.main(config(*words))


# Twists, predictions, the bug hunt


@pytest.mark.parametrize("name", [n for n, a in ASSIGNMENTS.items() if a.twists])
def test_the_public_solution_is_wrong_for_a_twist_and_named_so(name):
    a = ASSIGNMENTS[name]
    for t in a.twists:
        assert sheet.reference(BY_NAME[t.part].file).count(t.old) == 1
    seen = set()
    for student in ("ada", "ben", "eva", "tom", "zoe", "mia"):
        twist = sheet.drawn_twist(a, student, 4711)
        assert twist == sheet.drawn_twist(a, student, 4711)
        if twist["says"] in seen:
            continue
        seen.add(twist["says"])
        part = BY_NAME[twist["part"]]
        answer = sheet.answered(part, 0, twist, pairs=False)
        public = judged(answer, sheet.reference(part.file))
        assert public.names == ["public-solution"]
        assert twist["says"] in public.lines[-1]
        assert not judged(answer, sheet.apply(twist["change"], sheet.reference(part.file))).wrong
    assert len(seen) > 1
    assert sheet.drawn_twist(a, "", 4711) is None


def test_the_hunt_hides_three_bugs_per_student(tmp_path, sheet0):
    files, places = sheet.hunted("ada", 7, 3)
    assert len(files) == len(places) == 3
    assert sheet.hunted("ada", 7, 3) == (files, places)
    others = [sheet.hunted(name, 7, 3)[0] for name in ("ben", "eva", "tom")]
    assert any(set(other) != set(files) or other != files for other in others)
    a = sheet0["assignments"]["A14"] | {"student": "ada", "hunt": places}
    entries = []
    for file, text in files.items():
        compile(text, file, "exec")
        pairs = zip(text.splitlines(), sheet.reference(file).splitlines())
        line = next(n for n, (x, y) in enumerate(pairs, 1) if x != y)
        entries.append({"file": file, "line": line, "metric": "objective/kl", "why": "it falls"})
    (tmp_path / "A14.json").write_text(json.dumps(entries))
    [found] = grader.check(a, tmp_path, sheet0)
    assert found.points == found.most == 12
    entries[0]["why"] = ""
    entries[1]["line"] = 1
    (tmp_path / "A14.json").write_text(json.dumps(entries))
    [found] = grader.check(a, tmp_path, sheet0)
    assert found.points == 4
    assert [line.split(": ")[1] for line in found.lines] == ['needs "metric" and "why"',
                                                             "no bug there"]


def test_every_bug_of_the_hunt_is_in_the_zoo():
    assert set(HUNT) <= set(sheet.mutants())
    assert len(set(HUNT)) == len(HUNT) >= 20


def test_a_prediction_is_compared_with_the_students_own_log(tmp_path, sheet0):
    a = sheet0["assignments"]["A10"]
    log = (ROOT / "results" / "ppo-beta-0-seed100.jsonl").read_text(encoding="utf-8")
    assert grader.check(a, tmp_path, sheet0)[0].lines == ["A10.json is missing"]
    guess = dict.fromkeys(tasks.NUMBERS, 1)
    record = guess | {"why": "the score is not the truth"}
    (tmp_path / "A10.json").write_text(json.dumps(record))
    [found] = grader.check(a, tmp_path, sheet0)
    assert found.right == ["predictions"]
    assert "out/ppo-beta-0.jsonl is missing" in found.lines[0]
    (tmp_path / "ppo-beta-0.jsonl").write_text(log)
    truth = tasks.measured([json.loads(row) for row in log.splitlines()[1:]])
    record |= {"measured": truth, "surprise": "lists that are no words at all, from update 125"}
    (tmp_path / "A10.json").write_text(json.dumps(record))
    assert grader.check(a, tmp_path, sheet0)[0].points == 6
    record["measured"] = truth | {"last gold": 0.9}
    (tmp_path / "A10.json").write_text(json.dumps(record))
    [found] = grader.check(a, tmp_path, sheet0)
    assert found.wrong == ["measured"]
    assert found.lines[0].startswith("measured, last gold: yours 0.9, the log says")


@pytest.mark.parametrize("text", ["", "[1", '"x"', "[" * 10**5, '{"last score": "NaN"}'])
def test_json_that_is_none_gets_one_line(text, tmp_path, sheet0):
    for name in ("A10", "A14"):
        (tmp_path / f"{name}.json").write_text(text)
        [found] = grader.check(sheet0["assignments"][name], tmp_path, sheet0)
        assert found.points == 0
        assert found.lines


def test_the_numbers_of_a_prediction_are_not_in_its_readme(sheet0):
    part = {"assignments": {"A10": sheet0["assignments"]["A10"]}}
    assert "the published run" not in handout.readme(part)
    assert "the published run" in sheet0["assignments"]["A10"]["numbers"][0]


def test_the_scripts_of_the_kit_are_short():
    assert len(inspect.getsource(kit).splitlines()) <= 450
