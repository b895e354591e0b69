"""Talk to a checkpoint in the terminal; a model that has learned to use the SQL tool may ask its database.

Every answer is sampled token by token and printed as it comes. A character of UTF-8 may span several tokens, so bytes are
held back until they make a character; from `<<<` on, text is held back until `>>>` says that it is a call (tools.py), which is
run, shown on a line of its own, and replaced by its result.

    python chat.py                                             the best policy of OUT: ppo.pt, else dpo.pt, else sft.pt
    python chat.py --checkpoint out/tools/sft.pt               with the shop that tools.py made
    python chat.py --checkpoint out/tools/sft.pt --db my.db    with a database of your own
    echo "What does the cow say?" | python chat.py             answers on stdout, notes on stderr, no prompts

The whole talk is in the prompt, as long as it fits the context: then the oldest turns are forgotten, whole, and the system
message is kept. A base model (gpt.pt) has not learned turns: it continues each line by itself.
"""
import codecs, json, os, sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import gpt, sft, tools
from gpt import UserError

HELP = """/reset         forget the talk; the system message stays
/system TEXT   set the system message; without TEXT: none. (The village's models have never seen one)
/save FILE     write the talk to a new file, as one line that sft.py --data reads
/quit          end; so do Ctrl-D and Ctrl-C"""


@dataclass
class Config:
    out: str = "out"
    "folder of the run whose best policy talks"
    checkpoint: str = ""
    "the checkpoint to talk to; empty: OUT/ppo.pt, else dpo.pt, else sft.pt, else gpt.pt"
    db: str = ""
    "a SQLite database that answers may ask, only ever read; empty: shop.db beside the checkpoint, if there is one"
    system: str = ""
    "system message to begin with"
    temperature: float = 0.7
    "0 always takes the likeliest token; 1 samples as in training"
    max_new_tokens: int = 100
    "longest piece of an answer"
    seed: int = 0
    "same seed, same talk"
    device: str = "auto"
    "auto (cuda if there is one, else cpu), cpu, cuda or mps"


@torch.no_grad()
def stream(model, ids, max_new_tokens, temperature=1.0, rng=None):
    """Continue ids (a list), one token at a time: what gpt.generate does for one prompt, as an iterator over token ids.

    It ends after max_new_tokens or at the end of the context; where else to end is up to who reads. The same tokens as
    gpt.generate with `seed`, if rng is a torch.Generator of that seed. Raises UserError for a prompt that does not fit.
    """
    block, device = model.config.block_size, model.wte.weight.device
    if not 0 < len(ids) < block:
        raise UserError(f"a prompt of {len(ids)} tokens; the context of {block} wants 1 to {block - 1}")
    cache = gpt.KVCache(model.config, 1, min(block, len(ids) + max_new_tokens), device, model.wte.weight.dtype)
    states = model.hidden(torch.tensor([ids], device=device), cache)          # (1, T, C)
    cache.lengths, cache.longest = torch.tensor([len(ids)], device=device), len(ids)
    for n in range(1, max_new_tokens + 1):
        token = gpt.sample_tokens(F.linear(states[:, -1], model.wte.weight), temperature, rng=rng)              # (1,)
        yield token.item()
        if n == max_new_tokens or len(ids) + n == block:
            return
        states = model.hidden(token[:, None], cache)                          # (1, 1, C)
        cache.lengths, cache.longest = cache.lengths + 1, cache.longest + 1


def printable(text):
    """Text for a terminal: of control characters only newline and tab, so that no model and no database can send escape codes."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def token_bytes(enc, token):
    """The bytes of a token; None for a special one, b"" for an id that the tokenizer leaves unused."""
    if token in enc._special_tokens.values():
        return None
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return b""


def held_back(text):
    """How many characters at the end of `text` may yet turn out to be a call: from `<<<` on, or the beginning of a `<<<`."""
    at = text.find("<<<")
    return len(text) - at if at >= 0 else next((n for n in (2, 1) if text.endswith("<" * n)), 0)


def answer(model, enc, prompt, cfg, rng, db=None, on_call=None):
    """Yield the answer to `prompt` (ids) in pieces of text, calls replaced by results; on_call(statement, result) hears of each.

    The loop of tools.answer_with_tools for one answer that is shown as it grows. Any special token ends an answer.
    """
    said = ""                                                                 # the answer so far, results included
    for turn in range(tools.MAX_CALLS + 1):
        ids = prompt + enc.encode_ordinary(said)
        if len(ids) >= model.config.block_size:
            return
        decoder, new, shown, call = codecs.getincrementaldecoder("utf-8")("replace"), "", 0, None
        for token in stream(model, ids, cfg.max_new_tokens, cfg.temperature, rng):
            raw = token_bytes(enc, token)
            if raw is None:
                break
            new += decoder.decode(raw)
            call = tools.find_call(new) if db else None
            if call:
                break
            ready = len(new) - (held_back(new) if db else 0)
            if ready > shown:
                yield new[shown:ready]
                shown = ready
        if call is None:   # no more to come: what was held back is only text, and a broken character shows as one
            rest = (new + decoder.decode(b"", final=True))[shown:]
            if rest:
                yield rest
            return
        before, statement, _ = call
        result = tools.run_query(db, statement) if turn < tools.MAX_CALLS else "[error: too many calls]"
        if on_call:
            on_call(statement, result)
        grown = tools.splice(enc, prompt, said + before, result, model.config.block_size)
        yield grown[len(said) + shown:]
        said = grown


def fit(messages, enc, block_size, reserve):
    """The chat without its oldest turns: system message, and as many of the latest turns as leave `reserve` tokens for the answer.

    The last turn is never dropped; raises UserError where it leaves less than 16 tokens.
    """
    system, turns = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
    longest = max(map(len, enc._mergeable_ranks))
    # A text of more bytes than this cannot fit; it is not tokenized, as that takes quadratic time for one long word.
    if max(len(m["content"].encode("utf-8", "replace")) for m in system + turns[-1:]) <= block_size * longest:
        while len(turns) > 1 and len(sft.render_prompt(system + turns, enc)) > block_size - reserve:
            turns = turns[2:]
        n = len(sft.render_prompt(system + turns, enc))
        if n <= block_size - 16:
            return system + turns
        size = f"{n} tokens"
    else:
        size = f"more than {block_size} tokens"
    raise UserError(f"too long: {size}" + (" with the system message" if system else "")
                    + f", and the context of {block_size} must hold an answer, too; say it shorter")


def save(path, messages):
    """One line of {"messages": [...]} in a new file: an old one is never overwritten."""
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError("nothing to save yet")
    try:
        with open(path, "x", encoding="utf-8") as f:
            f.write(json.dumps({"messages": messages}) + "\n")
    except FileExistsError:
        raise UserError(f"{path} exists; name a new file") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def load_policy(cfg, device):
    """-> (model, tokenizer, path, is it a base model?). Raises UserError where there is nothing to talk to."""
    found = [p for p in (Path(cfg.out) / f"{name}.pt" for name in ("ppo", "dpo", "sft", "gpt")) if p.exists()]
    if not cfg.checkpoint and not found:
        raise UserError(f"{cfg.out}: no checkpoint to talk to; make them all: python ppo.py --out {cfg.out}")
    path = Path(cfg.checkpoint or found[0])
    model, enc, state = gpt.load_model(path, device)
    if "head.weight" in state["model"]:
        raise UserError(f"{path} is a reward model: it scores answers and gives none; name a policy, such as sft.pt")
    return model, enc, path, "val_fraction" in state   # what only pretraining keeps in its checkpoint


def command(line, messages):
    """Do a line that begins with "/" -> (messages, note); None for /quit. Raises UserError for what is no command."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/quit":
        return None
    if name == "/reset":
        return [m for m in messages if m["role"] == "system"], "forgotten"
    if name == "/system":
        talk = [m for m in messages if m["role"] != "system"]
        return [{"role": "system", "content": rest}] * bool(rest) + talk, "system message " + ("set" if rest else "removed")
    if name == "/save" and rest:
        save(rest, messages)
        return messages, f"saved {rest}"
    if name in ("/help", "/?"):
        return messages, HELP
    raise UserError("write it as /save FILE" if name == "/save" else
                    f"unknown command {name}; there are /reset /system /save /quit")


def lines(terminal):
    """What the user says, line by line, until the end of input."""
    try:
        while True:
            yield input("> ") if terminal else next(sys.stdin).rstrip("\n")
    except (EOFError, StopIteration):
        return


def note(text):
    print(text, file=sys.stderr, flush=True)


def talk(model, enc, db, base, cfg, terminal):
    """Read, answer, remember, until the end of input or /quit."""
    rng = torch.Generator(model.wte.weight.device).manual_seed(cfg.seed)
    messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
    for line in lines(terminal):
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                done = command(line.strip(), messages)
                if done is None:
                    return
                messages = done[0]
                note(done[1])
                continue
            asked = messages + [{"role": "user", "content": line}]
            block = model.config.block_size
            kept = fit(asked[-1:] if base else asked, enc, block, min(cfg.max_new_tokens, block // 2))
            prompt = enc.encode_ordinary(line) if base else sft.render_prompt(kept, enc)
            if len(kept) < len(asked) and not base:
                note(f"(the context is full: only the last {sum(m['role'] == 'user' for m in kept)} turns are seen)")
        except UserError as e:
            note(str(e))
            if not terminal and not line.startswith("/"):
                print()   # a line of output for each line of input, even so
            continue
        said, calls = "", []
        try:
            for piece in answer(model, enc, prompt, cfg, rng, db, lambda *call: calls.append(call)):
                said += piece
                print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            if not terminal:
                raise
        print(flush=True)   # Ctrl-C at a terminal stops the answer, not the talk
        for statement, result in calls:
            note(f"    {printable(statement)} -> {result}")
        messages = [] if base else asked + [{"role": "assistant", "content": said}]


def main(cfg):
    gpt.require(cfg, 0, "temperature")
    gpt.require(cfg, 1, "max_new_tokens")
    model, enc, path, base = load_policy(cfg, gpt.pick_device(cfg.device))
    shop = Path(cfg.db) if cfg.db else path.with_name("shop.db")
    db = tools.open_database(shop) if cfg.db or shop.exists() else None
    terminal = sys.stdin.isatty()
    for f in (sys.stdin, sys.stdout):   # a pipe speaks UTF-8; and no odd byte ends the talk
        f.reconfigure(encoding=None if f.isatty() else "utf-8", errors="replace")
    if terminal:
        note(f"{path}{f', database {shop}' if db else ''}; /help lists the commands")
    if base:
        note(f"{path} is a base model: it continues each line, and has no turns")
    try:
        talk(model, enc, db, base, cfg, terminal)
    except KeyboardInterrupt:
        if not terminal:
            sys.exit(130)
    except BrokenPipeError:   # whoever read the answers has gone; Python must not try to flush them once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if terminal:
        print()


if __name__ == "__main__":
    gpt.run(main, Config, __doc__)
