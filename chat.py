"""Chat with a checkpoint in the terminal. A model from lab/tool_use.py can query a database.

Responses are printed while they are sampled. Two things delay a piece of text: the bytes of a UTF-8
character may be spread over several tokens, and `<<<` may start a call (see tools.py). When `>>>`
ends the call, the query runs, its result takes the place of the call, and stderr shows the query.

    python chat.py                                             the best policy in OUT
    python chat.py --checkpoint out/tools/sft.pt               with the shop of lab/tool_use.py
    python chat.py --checkpoint out/tools/sft.pt --db my.db    with your own database
    python chat.py --inspect                                   each token: policy, sft and score
    echo "What does the cow say?" | python chat.py             responses on stdout, notes on stderr

The prompt is the whole conversation while it fits the context. Then the oldest turns are dropped;
the system message stays. A base model (gpt.pt) knows no turns: it continues each line.
"""
import codecs
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import gpt
import tools
from data.formats import save_chat
from data.tokenizer import decode_token, token_bytes
from scaffold.cli import BaseConfig, UserError, brief, pick_device, require, start
from scaffold.table import printable
from sft import render_prompt

HELP = """/reset         forget the conversation, except the system message
/system TEXT   set the system message; without TEXT, remove it (the village's models know none)
/save FILE     write the conversation to a new file, in a format that sft.py --data reads
/quit          end; Ctrl-D and Ctrl-C do the same"""


@dataclass
class Config(BaseConfig):
    checkpoint: str = ""         # policy; empty: ppo.pt of OUT, else dpo.pt, sft.pt or gpt.pt
    db: str = ""                 # SQLite file of plain tables; empty: shop.db beside the checkpoint
    system: str = ""             # system message at the start
    temperature: float = 0.7     # 0 always takes the most likely token; 1 samples as in training
    max_new_tokens: int = 100    # longest piece of a response, in tokens
    inspect: bool = False        # show the tokens of each response: log-probs (at temperature 1) of
                                 # policy and OUT/sft.pt, KL penalty, score by OUT/reward.pt so far


@torch.no_grad()
def stream(model, ids, max_new_tokens, temperature=1.0, rng=None):
    """Yield the tokens that gpt.generate samples for one prompt (ids), as soon as each is known.

    The caller decides which tokens end a response. rng is a torch.Generator, or None.
    Raises UserError for a prompt that does not fit the context.
    """
    block_size = model.config.block_size
    device = model.wte.weight.device
    if not 0 < len(ids) < block_size:
        raise UserError(f"the prompt has {len(ids)} tokens; it must have 1 to {block_size - 1}")
    cache = gpt.KVCache(model, 1, len(ids))
    states = model.hidden(torch.tensor([ids], device=device), cache)          # (1, T, C)
    cache.fill([len(ids)])
    for n in range(1, max_new_tokens + 1):
        logits = model.unembed(states[:, -1])                                 # (1, V)
        token = gpt.sample_tokens(logits, temperature, rng=rng)               # (1,)
        yield token.item()
        if n == max_new_tokens or len(ids) + n == block_size:
            return
        states = model.hidden(token[:, None], cache)                          # (1, 1, C)
        cache.step()


def held_back(text):
    """Count the characters at the end of `text` that may become a call: `<<< ...`, `<<` or `<`."""
    return len(re.search(r"<<<.*|<{0,2}\Z", text, re.DOTALL)[0])


def respond(model, enc, prompt, cfg, rng, db=None, on_query=None, on_token=None):
    """Yield the response to a prompt (ids) in pieces of text; on_query receives each tools.Query.

    on_token receives each id that the model writes.

    Any special token ends the response. tools.respond_with_tools is the same loop for a batch; it
    cannot serve here, because a response must be shown while it grows.
    """
    block_size = model.config.block_size
    text = ""                                   # the response so far, results included
    for turn in range(tools.MAX_CALLS + 1):
        ids = prompt + enc.encode_ordinary(text)
        if len(ids) >= block_size:
            return
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        written = ""                            # by the model, since the last result
        shown = 0                               # number of its characters that are shown
        call = None
        for token in stream(model, ids, cfg.max_new_tokens, cfg.temperature, rng):
            if on_token:
                on_token(token)
            raw = decode_token(enc, token)
            if raw is None:
                break
            written += decoder.decode(raw)
            call = tools.find_call(written) if db else None
            if call:
                break
            ready = len(written) - held_back(written) if db else len(written)
            if ready > shown:
                yield written[shown:ready]
                shown = ready
        if call is None:                        # the response is over: show what was held back
            written += decoder.decode(b"", final=True)
            if len(written) > shown:
                yield written[shown:]
            return
        result = tools.run_query(db, call.statement) if turn < tools.MAX_CALLS else tools.TOO_MANY
        if on_query:
            on_query(tools.Query(call.statement, result))
        longer = tools.splice(enc, prompt, text + call.before, result, block_size)
        yield longer[len(text) + shown:]
        text = longer


def fit_context(messages, enc, block_size, reserve):
    """Drop the oldest turns until `reserve` tokens of the context are free for the response.

    The system message and the last turn always stay. Raises UserError if they leave fewer than 16.
    """
    system = [m for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    n_bytes = max(len(m["content"].encode("utf-8", "replace")) for m in system + turns[-1:])
    # More bytes than this cannot fit. Do not tokenize them: one long word takes quadratic time.
    if n_bytes <= block_size * max(map(len, token_bytes(enc))):
        while len(turns) > 1 and len(render_prompt(system + turns, enc)) > block_size - reserve:
            turns = turns[2:]
        if len(render_prompt(system + turns, enc)) <= block_size - 16:
            return system + turns
    subject = "the system message and your message" if system else "your message"
    raise UserError(f"too long: {subject} must leave 16 tokens of the context of {block_size} for "
                    "the response; write less")


def make_prompt(messages, enc, block_size, base, cfg):
    """Encode a conversation that ends with the user's line -> ids. Raises UserError if too long."""
    reserve = min(cfg.max_new_tokens, block_size // 2)
    kept = fit_context(messages[-1:] if base else messages, enc, block_size, reserve)
    if base:
        return enc.encode_ordinary(kept[0]["content"])
    if len(kept) < len(messages):
        note("(the context is full: the model no longer sees the oldest turns)")
    return render_prompt(kept, enc)


def load_policy(cfg, device):
    """Load the checkpoint to chat with -> (model, tokenizer, path, whether it is a base model)."""
    paths = [Path(cfg.out) / f"{name}.pt" for name in ("ppo", "dpo", "sft", "gpt")]
    found = [path for path in paths if path.exists()]
    if not cfg.checkpoint and not found:
        raise UserError(f"{cfg.out}: no checkpoint; make one: python ppo.py --out {cfg.out}")
    path = Path(cfg.checkpoint or found[0])
    model, enc, state = gpt.load_model(path, device)
    if "head.weight" in state["model"]:
        raise UserError(f"{path} is a reward model; name a policy, such as sft.pt")
    return model, enc, path, "val_fraction" in state   # only pretraining stores a val_fraction


def run_command(line, messages):
    """Run a line that starts with "/" -> the messages after it; None for /quit."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    system = [m for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    if name == "/quit":
        return None
    if name == "/reset":
        note("forgotten")
        return system
    if name == "/system":
        note("system message " + ("set" if argument else "removed"))
        return [{"role": "system", "content": argument}, *turns] if argument else turns
    if name == "/save":
        if not argument.isprintable():
            raise UserError("/save FILE: the name has control characters; name another file")
        save_chat(argument, messages)
        note(f"saved {argument}")
    elif name in ("/help", "/?"):
        note(HELP)
    else:
        raise UserError(f"unknown command {name}; the commands are /reset /system /save /quit")
    return messages


def read_lines(terminal):
    """Yield the user's lines until the end of input."""
    try:
        while True:
            yield input("> ") if terminal else next(sys.stdin).rstrip("\n")
    except (EOFError, StopIteration):
        return


def note(text):
    """Print a note on stderr. It may quote what was typed or read."""
    print(printable(text), file=sys.stderr, flush=True)


def converse(model, enc, db, base, cfg, terminal, view=None):
    """Read a line and respond, until the end of input or /quit; view shows the tokens (ids)."""
    rng = torch.Generator(model.wte.weight.device).manual_seed(cfg.seed)
    messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
    for line in read_lines(terminal):
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                messages = run_command(line.strip(), messages)
                if messages is None:
                    return
                continue
            asked = [*messages, {"role": "user", "content": line}]
            prompt = make_prompt(asked, enc, model.config.block_size, base, cfg)
        except UserError as e:
            note(brief(e, 300))
            if not terminal and not line.startswith("/"):
                print()   # one line of output for each line of input, even for an error
            continue
        text = ""
        queries = []
        tokens = []
        try:
            for piece in respond(model, enc, prompt, cfg, rng, db, queries.append, tokens.append):
                text += piece
                print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:   # at a terminal it stops the response, not the chat
            if not terminal:
                raise
        print(flush=True)
        for query in queries:
            note(f"    {query.statement} -> {query.result}")
        if view and not queries:   # with results in between, the tokens are not the response
            print(view(prompt, tokens), file=sys.stderr, flush=True)
        messages = [] if base else [*asked, {"role": "assistant", "content": text}]


def main(cfg):
    require(cfg, 0, "temperature")
    require(cfg, 1, "max_new_tokens")
    model, enc, path, base = load_policy(cfg, pick_device(cfg.device))
    shop = Path(cfg.db) if cfg.db else path.with_name("shop.db")
    db = tools.open_database(shop) if cfg.db or shop.exists() else None
    view = None
    if cfg.inspect:
        from lab.tokens import Inspector   # lazy: it needs the reward model
        view = Inspector(cfg.out, model, enc, colour=sys.stderr.isatty())
    terminal = sys.stdin.isatty()
    for stdio in (sys.stdin, sys.stdout):   # pipes are UTF-8; invalid bytes do not end the chat
        stdio.reconfigure(encoding=None if stdio.isatty() else "utf-8", errors="replace")
    if terminal:
        note(f"{path}{f', database {shop}' if db else ''}; /help lists the commands")
    if base:
        note(f"{path} is a base model: it continues each line and knows no turns")
    try:
        converse(model, enc, db, base, cfg, terminal, view)
    except KeyboardInterrupt:
        if not terminal:
            sys.exit(130)
    except BrokenPipeError:   # the reader is gone; keep Python from flushing to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if terminal:
        print()


if __name__ == "__main__":
    start(main, Config, __doc__)
