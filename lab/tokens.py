"""The token view: a response as coloured tokens, with what each token was paid.

    log-ratio     log pi(token) - log pi_ref(token): what training has changed; its sum is the KL
    KL penalty    -beta * log-ratio
    reward        the KL penalty; on the last token, plus the score of the reward model
    V             the critic's prediction before the token
    A             the advantage, whitened: what the update makes likelier (above 0) or rarer
    score         of the reward model, if the response ended after this token
    mask          1 on the tokens that are trained; 0 on those of the prompt

lab/report.py shows it on its page, for a rollout of PPO; chat.py --inspect in the terminal, for
what you type.
"""
import math
from pathlib import Path

import torch

import gpt
import reward
from data.rollouts import token_text
from data.tokenizer import fingerprint
from lab.charts import escape, table
from scaffold.cli import UserError
from scaffold.table import format_table, is_missing, printable

COLUMNS = {"token": ("token", ""),
           "mask": ("mask", "d"),
           "log pi": ("logprob", ".3f"),
           "log pi ref": ("ref_logprob", ".3f"),
           "log-ratio": ("log_ratio", "+.3f"),
           "KL penalty": ("penalty", "+.3f"),
           "reward": ("reward", "+.3f"),
           "V": ("value", "+.3f"),
           "A": ("advantage", "+.3f"),
           "score": ("score", "+.3f")}
MOST = 80   # tokens of a table


def token_rows(row):
    """Turn a row of data/rollouts.py into one dict per token, see COLUMNS."""
    made = []
    names = dict(logprob="logprobs", ref_logprob="ref_logprobs", reward="rewards", value="values",
                 advantage="advantages")
    for i, token in enumerate(row["tokens"]):
        cells = dict(token=token, mask=1)
        for name, key in names.items():
            cells[name] = row[key][i]
        cells["log_ratio"] = cells["logprob"] - cells["ref_logprob"]
        cells["penalty"] = -row["beta"] * cells["log_ratio"]
        made.append(cells)
    return made


def visible(token):
    """Return a token on one line: its spaces stay, its line ends and tabs become signs."""
    return printable(token.replace("\n", "\u21b5").replace("\t", "\u21e5"))


def strength(value, full):
    """Map a number to a strength of colour, 0 to 1; `full` and more is 1."""
    return 0.0 if is_missing(value) else min(1.0, abs(value) / full)


def number(value, form):
    """Format a number; one that rounds to zero has no minus sign."""
    text = format(value, form)
    return format(0.0, form) if form != "d" and float(text) == 0 else text


def strip(rows, key, full, prompt=""):
    """Return tokens as HTML, coloured by one number: blue above 0, orange below.

    Framed tokens are trained (mask 1); the prompt stands before them without a frame.
    """
    made = [f'<span class="soft">{escape(visible(prompt))} </span>'] if prompt else []
    for row in rows:
        colour = "accent" if row[key] >= 0 else "bad"
        percent = round(70 * strength(row[key], full))
        numbers = ", ".join(f"{head} {number(row[name], form)}"
                            for head, (name, form) in COLUMNS.items()
                            if name in row and name != "token")
        made.append(f'<b style="background:color-mix(in srgb,var(--{colour}) {percent}%,'
                    f'transparent)" title="{escape(numbers)}">{escape(visible(row["token"]))}</b>')
    return f'<div class="tokens">{"".join(made)}</div>'


def token_table(rows):
    """Return the numbers of all tokens as an HTML table."""
    columns = {head: column for head, column in COLUMNS.items() if column[0] in rows[0]}
    lines = [[f"<code>{escape(visible(row['token']))}</code>",
              *[number(row[key], form) for key, form in list(columns.values())[1:]]]
             for row in rows[:MOST]]
    more = len(rows) - MOST
    note = f'<p class="soft">and {more} more tokens</p>' if more > 0 else ""
    return table(list(columns), lines, numbers=range(1, len(columns))) + note


def token_view(row):
    """Return a rollout's response as two strips of coloured tokens and a table."""
    rows = token_rows(row)
    prompt = row["prompt"][-1]["content"]
    kl = sum(r["log_ratio"] for r in rows)
    grade = f", gold {row['gold']:.2f}" if "gold" in row else ""
    return (f"<h3>{escape(prompt)}</h3>"
            f"<p>score {row['score']:.2f}{grade}; the log-ratios add up to {kl:.2f} nats</p>"
            f'<div class="soft">log-ratio: blue tokens became likelier than in sft</div>'
            + strip(rows, "log_ratio", 2.0, prompt[-200:])
            + '<div class="soft">advantage: this update makes blue tokens likelier, orange '
              'ones rarer</div>'
            + strip(rows, "advantage", 2.5) + token_table(rows))


@torch.no_grad()
def measure(policy, reference, reward_model, enc, prompt, response, beta):
    """Compare two policies on one response, both ids -> one dict per token, see COLUMNS.

    reward_model: None leaves the score out.
    """
    device = policy.wte.weight.device
    ids = torch.tensor([prompt + response], device=device)                    # (1, T)
    start = len(prompt)
    mine = gpt.token_logprobs(policy, ids)[0, start - 1:].tolist()            # (T - start,)
    theirs = gpt.token_logprobs(reference, ids)[0, start - 1:].tolist()
    scores = reward_model(ids)[0, start:].tolist() if reward_model else [math.nan] * len(mine)
    return [dict(token=token_text(enc, token), mask=1, logprob=a, ref_logprob=b, log_ratio=a - b,
                 penalty=-beta * (a - b), score=score)
            for token, a, b, score in zip(response, mine, theirs, scores)]


def coloured(rows, key="log_ratio", full=2.0):
    """Return the tokens with terminal colours: blue above 0, red below, stronger if larger."""
    made = []
    for row in rows:
        share = strength(row[key], full)
        text = visible(row["token"])
        if share < 0.05:
            made.append(text)
            continue
        # 256 colours: 16 + 36 red + 6 green + blue, each 0 to 5
        level = 1 + round(4 * share)
        code = 16 + level if row[key] > 0 else 16 + 36 * level
        made.append(f"\033[97;48;5;{code}m{text}\033[0m")
    return "".join(made)


class Inspector:
    """Shows the token view of responses in the terminal. It loads OUT/sft.pt and OUT/reward.pt."""

    def __init__(self, out, policy, enc, beta=0.1, colour=True):
        out = Path(out)
        self.colour = colour
        if not (out / "sft.pt").exists():
            raise UserError(f"--inspect compares with {out / 'sft.pt'}, which is missing; "
                            f"name its folder with --out")
        self.policy = policy
        self.enc = enc
        self.beta = beta
        device = policy.wte.weight.device
        self.reference, reference_enc, _ = gpt.load_model(out / "sft.pt", device)
        encs = [reference_enc]
        self.reward_model = None
        if (out / "reward.pt").exists():
            self.reward_model, reward_enc = reward.load_reward(out / "reward.pt", device)
            encs.append(reward_enc)
        if any(fingerprint(other) != fingerprint(enc) for other in encs):
            raise UserError(f"--inspect: {out} has another tokenizer than the policy; "
                            f"name the folder of its sft.pt with --out")

    def __call__(self, prompt, response):
        """Return the view of a response (ids) to a prompt (ids) as lines for the terminal."""
        blocks = [self.policy, self.reference]
        if self.reward_model:
            blocks.append(self.reward_model.body)
        room = min(model.config.block_size for model in blocks)
        kept = response[:room - len(prompt)]
        if not kept:
            return "(no token to show: the prompt fills the context)"
        rows = measure(self.policy, self.reference, self.reward_model, self.enc, prompt, kept,
                       self.beta)
        shown = [row | dict(token=repr(row["token"])) for row in rows]
        lines = [coloured(rows)] if self.colour else []
        lines.append(format_table(shown, COLUMNS))
        lines.append(f"KL {sum(row['log_ratio'] for row in rows):.3f} nats; "
                     f"KL penalty at beta {self.beta:g}")
        return "\n".join(lines)
