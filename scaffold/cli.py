"""The command line of every script: flags from a Config, and one-line messages for user errors.

    @dataclass
    class Config(RunConfig):     # adds --out, --seed, --device, --save-every and --resume
        lr: float = 1e-3         # peak learning rate

    def main(cfg): ...

    if __name__ == "__main__":
        start(main, Config, __doc__)    # python script.py --lr 1e-4

Every field of Config becomes a flag, and its trailing comment becomes the help text.
"""
import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import math
import os
import sys
import textwrap
import tokenize
from dataclasses import dataclass
from pathlib import Path

import torch

from scaffold.distributed import init_distributed


class UserError(ValueError):
    """A mistake the user can fix. The message says what, where, and what to type."""


@dataclass
class BaseConfig:
    """The flags that all scripts share."""
    out: str = "out"             # folder of this run; use one folder per seed
    seed: int = 0                # the same seed on the same machine gives the same run
    device: str = "auto"         # auto (cuda if available, else cpu), cpu, cuda or mps


@dataclass
class RunConfig(BaseConfig):
    """The flags of a script whose training loop can be resumed."""
    save_every: int = 500        # steps between saves of the training state; 0 saves on Ctrl-C only
    resume: bool = False         # continue a stopped or killed run, in this stage or an earlier one


def field_help(cls):
    """Return {field: help text}, read from the comments of a Config and its bases.

    A comment may continue in comment-only lines below its field. A subclass that redefines a field
    without a comment keeps the text of its base.
    """
    texts = {f.name: "" for f in dataclasses.fields(cls)}
    for c in reversed(cls.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(c))
        body = ast.parse(source).body[0].body
        field_at = {node.lineno: node.target.id for node in body if isinstance(node, ast.AnnAssign)}
        comments, field = {}, None
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            field = field_at.get(token.start[0], field)
            if token.type == tokenize.COMMENT and field:
                comments.setdefault(field, []).append(token.string.lstrip("# "))
        texts |= {field: " ".join(lines) for field, lines in comments.items()}
    return texts


def positional():
    """Declare a field of a Config that is typed without its flag: python script.py VALUE."""
    return dataclasses.field(default="", metadata={"positional": True})


class OneLineParser(argparse.ArgumentParser):
    """Raise UserError instead of printing the usage; suggest the nearest flag."""

    def error(self, message):
        known = [option for action in self._actions for option in action.option_strings]
        unknown = [word for word in message.split() if word.startswith("--")]
        if "unrecognized" in message and unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1, 0.4)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            message = f"unknown flag {unknown[0]}; {hint}"
        raise UserError(message)


def parse(cls, doc, argv=None):
    """Turn the command line into a Config: one flag per field (n_layer -> --n-layer)."""
    texts = field_help(cls)
    parser = OneLineParser(description=doc, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(cls):
        flag = "--" + f.name.replace("_", "-")
        text = f"{texts[f.name]} [{f.default}]".replace("%", "%%")
        if f.metadata.get("positional"):
            parser.add_argument(f.name, nargs="?", default="", metavar=f.name.upper(),
                                help=texts[f.name].replace("%", "%%"))
        elif isinstance(f.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default,
                                help=text)
        else:
            kind = type(f.default)
            parser.add_argument(flag, type=kind, default=f.default, metavar=kind.__name__,
                                help=text)
    cfg = cls(**vars(parser.parse_args(argv)))
    numbers = [f.name for f in dataclasses.fields(cls) if type(f.default) in (int, float)]
    # torch takes seeds and sizes of 64 bits, and the scripts multiply them. This refuses nan, too.
    require(cfg, -2**53, *numbers, most=2**53)
    return cfg


def require(cfg, least, *names, most=math.inf):
    """Raise UserError unless each named setting is between `least` and `most`."""
    for name in names:
        value = getattr(cfg, name)
        if not least <= value <= most:
            bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {bounds}")


def choose(cfg, name, *choices):
    """Raise UserError unless the named setting is one of the choices."""
    value = getattr(cfg, name)
    if value not in choices:
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise UserError(f"--{name.replace('_', '-')} {value}: choose {listed}")


def check_name(cfg, *stages):
    """Raise UserError if --name is a path or the name of another stage."""
    if cfg.name in ("", "base", *stages) or "/" in cfg.name:
        raise UserError(f"--name {cfg.name!r}: must not be empty, a path or another stage's name")


def pick_device(name):
    """Return the torch.device of --device. Raises UserError if the machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True,
                 "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if name not in available:
        raise UserError(f"--device {name}: choose auto, cpu, cuda or mps")
    if not available[name]:
        raise UserError(f"--device {name}: torch finds no such device here; type --device cpu")
    return torch.device(name)


def run_folder(path):
    """Return --out as a Path without creating the folder. Raises UserError if it is a file."""
    if Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"--out {path}: this is a file; name a folder")
    return Path(path)


def brief(text, most=160):
    """Shorten foreign text, such as a library's error message, to part of one line."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[:most - 3] + "..."


def fail(message, code=2):
    """Print one line on stderr and exit."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


def is_out_of_memory(e):
    """Return whether an exception says that a tensor or a list of this size cannot be made."""
    words = ("out of memory", "can't allocate", "cannot allocate", "not enough memory", "overflow",
             "negative dimension", "exceeds the maximum")
    return isinstance(e, (MemoryError, OverflowError)) or any(w in str(e).lower() for w in words)


def start(main, cls, doc, distributed=False):
    """Run a script. A user's mistake ends it with one line and exit code 2, not with a traceback.

    distributed: whether torchrun may run the script in several processes.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")   # a console that is not UTF-8 prints "?"
    try:
        cfg = parse(cls, doc)
        if "RANK" in os.environ and not distributed:
            raise UserError("this script runs in one process; use python instead of torchrun")
        init_distributed(getattr(cfg, "device", "cpu"))
        main(cfg)
    except UserError as e:
        fail(e)
    except OSError as e:   # disk full, no permission, a file where a folder should be
        fail(f"{e.filename or 'file'}: {e.strerror or e}")
    except (RuntimeError, MemoryError, OverflowError) as e:
        if not is_out_of_memory(e):
            raise
        fail(f"out of memory; make the model or the batches smaller ({brief(e)})")
    except KeyboardInterrupt:
        hint = "; continue with --resume" if hasattr(cls, "resume") else ""
        print(f"\nstopped{hint}", file=sys.stderr)
        sys.exit(130)
