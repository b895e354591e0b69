"""A training run that survives a kill, stops at a NaN, and logs what it does.

The next step of a run depends on its weights, its optimizer, its random states and its position in
the data. Run saves all of these every --save-every steps; a new file replaces the old one only when
it is complete. --resume loads the newest complete file and continues, bit for bit, as if the run
had never stopped.

    run = Run(cfg, "sft", model=model, optimizer=optimizer, rng=rng)   # all that a step changes
    for step in run.steps(n):                                          # saves, also on Ctrl-C
        loss = response_loss(model(ids), ids, mask)
        norm = run.take_step(loss, optimizer, model, lr, rows)         # a NaN ends the run
        run.log(step=step, loss=loss.item(), grad_norm=norm)
    run.finish()

A second process in the same folder is refused. `python lab/resume.py` demonstrates resuming.
"""
import json
import math
import os
import random
import signal
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from scaffold.cli import UserError, brief, run_folder
from scaffold.distributed import all_reduce_mean, average_gradients, barrier, rank, world_size
from scaffold.record import describe, record_path, write_record

try:
    import fcntl
except ImportError:   # Windows has no fcntl; a second process is not refused there
    fcntl = None


class Diverged(UserError):
    """The loss or the gradient norm is NaN or infinite; the weights are unchanged."""


def set_seed(seed):
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)   # CPUs multiply denormal numbers 100 times slower


def tensors_of(state):
    """Return the tensors in nested dicts, lists and tuples."""
    found, seen, rest = [], set(), [state]
    while rest:   # no recursion: a file may nest deeply, or hold the same list a billion times
        part = rest.pop()
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            rest.extend(part.values() if isinstance(part, dict) else part)
    return found


def older(path):
    """Return the path that keeps the file that a new one at `path` replaced."""
    return path.with_name(path.name + ".old")


def save_checkpoint(path, **state):
    """Write a checkpoint; when it is whole, it replaces the file at `path`, kept as NAME.old.

    A crash or a full disk loses neither. Raises Diverged, and writes nothing, if a number is NaN or
    infinite: even the very last step of a run may do that.
    """
    path = Path(path)
    if not all(tensor.isfinite().all() for tensor in tensors_of(state)):
        raise Diverged(f"{path}: not saved, because the weights are NaN or infinite; "
                       f"train again with a lower --lr")
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        try:
            with open(temporary, "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            if path.exists():
                os.replace(path, older(path))   # a kill here leaves only the old one
            os.replace(temporary, path)
        except BaseException as e:
            temporary.unlink(missing_ok=True)
            # torch wraps a full disk in a RuntimeError; raise the OSError instead.
            cause = e.__context__ if isinstance(e.__context__, OSError) else e
            raise cause from None
    barrier()   # no other rank may read the file earlier


def check_archive(path):
    """Raise ValueError if a file of a zip archive is damaged, or larger than the archive."""
    with zipfile.ZipFile(path) as archive:
        if sum(file.file_size for file in archive.infolist()) > path.stat().st_size:
            raise ValueError("compressed")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"checksum of {damaged}")


def load_checkpoint(path):
    """Read a checkpoint of tensors and plain data: no file can run code. Raises UserError.

    Nor can a small file fill the memory, as with a tensor that repeats one number.
    """
    path = Path(path)
    try:
        # torch.load ignores checksums, so a flipped bit would become a weight. Files older than
        # 2020 are not zip files and have no checksums.
        if zipfile.is_zipfile(path):
            check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        # Hugging Face's files have the token embedding twice: they store it once.
        if sum(tensor.nbytes for tensor in tensors_of(state)) > 2 * path.stat().st_size:
            raise ValueError("tensors larger than the file")
        return state
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as e:   # each kind of damage raises its own exception
        kind = type(e).__name__
        raise UserError(f"{path}: not a readable checkpoint ({kind}); train it again") from None


def finite(value):
    """Replace NaN and infinite numbers by None, in nested dicts and lists, too."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_line(row, **options):
    """Return one line of strict JSON: it has no NaN, which Python would write and few can read."""
    return json.dumps(finite(row), allow_nan=False, **options) + "\n"


def log_metrics(path, fresh=False, **row):
    """Append one JSON object to a metrics file; `fresh` empties the file first."""
    if rank() == 0:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w" if fresh else "a") as f:
            f.write(json_line(row))


def take_step(loss, optimizer, model, lr, clip=1.0, where="training"):
    """Take one optimizer step at learning rate lr; return the gradient norm before clipping.

    Raises Diverged, naming `where`, if the loss or the gradient is not finite; the weights are then
    unchanged.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss.backward()
    average_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    if not (math.isfinite(norm) and math.isfinite(loss.item())):
        raise Diverged(f"{where}: loss {loss.item():.4g}, gradient norm {norm:.4g}; "
                       f"training cannot continue from here: try a lower --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)   # frees their memory, too
    return norm


def keep_best(best, model, quality, **about):
    """Copy the model and the facts `about` it into `best` if its quality is the highest so far."""
    if not best or quality > best["quality"]:
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        best.update(about, quality=quality, model=weights)


def digest(paths):
    """Return a checksum of the files a run reads; empty paths are skipped.

    Of a folder the names of its files count, too. Where the file or the folder stands does not.
    """
    crc = 0
    for path in map(Path, filter(None, paths)):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                name = os.fsencode(file.relative_to(path))
                crc = zlib.crc32(name + file.read_bytes(), crc)
    return f"{crc:08x}"


def ensure_stage(path, stage, cfg, **settings):
    """Run an earlier stage if its checkpoint is missing.

    stage: the module, with Config and main; settings: fields of its Config besides the shared ones.
    Raises UserError if that stage was stopped half-way, because a new start would discard it.
    """
    resume = getattr(cfg, "resume", False)
    state = path.with_suffix(".state")
    name = stage.__name__
    if path.exists():
        if state.exists():
            print(f"{path} is used; a later run of {name}.py stopped before it could replace it")
        return
    if state.exists() and not resume:
        raise UserError(f"{state}: a run stopped here; continue it with --resume (with "
                        f"its settings: python {name}.py --resume ...), or delete this file")
    how = "" if settings else ", with its default settings and data"
    print(f"{path} is missing: running {name}.py first{how}")
    stage.main(stage.Config(out=str(path.parent), seed=cfg.seed, device=cfg.device, resume=resume,
                            **settings))


LOCKS = {}   # folder -> open file; the system releases the lock when the process ends


def lock(folder):
    """Reserve the folder for this process, or raise UserError if another one trains in it."""
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if fcntl and rank() == 0 and key not in LOCKS:
        handle = os.open(key, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise UserError(f"{folder}: another process is training there; wait for it, "
                            f"or name another folder with --out") from None
        LOCKS[key] = handle


def unlock(folder):
    """Release the folder."""
    handle = LOCKS.pop(folder.resolve(), None)
    if handle is not None:
        os.close(handle)


def random_states():
    """Return the states of all global generators as plain data."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return dict(torch=torch.get_rng_state(), cuda=cuda, numpy=(name, keys.tolist(), *rest),
                python=random.getstate())


def set_random_states(states):
    """Restore what random_states returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


def snapshot(part):
    """Turn a module, an optimizer, a generator, a dict or a list into tensors and plain data."""
    if isinstance(part, random.Random):
        return part.getstate()
    if hasattr(part, "state_dict"):
        return part.state_dict()
    return part


def restore(part, saved):
    """Invert snapshot, in place."""
    if isinstance(part, random.Random):
        part.setstate(saved)
    elif hasattr(part, "load_state_dict"):
        part.load_state_dict(saved)
    elif isinstance(part, dict):
        part.clear()
        part.update(saved)
    else:
        part[:] = saved


def is_state(state):
    """Return whether a loaded file has the entries of a Run's state."""
    kinds = dict(settings=dict, parts=dict, random=dict, step=int, n=int, log_bytes=int,
                 seconds=float)
    if not isinstance(state, dict) or not all(type(state.get(k)) is t for k, t in kinds.items()):
        return False
    return 0 <= state["step"] <= state["n"] and state["log_bytes"] >= 0


# The checkpoints of a folder that rest on that of a stage: its weights, or its samples.
RESTING = {"gpt": ("long/gpt.pt", "sft.pt", "reward.pt", "dpo*.pt", "ppo*.pt", "self_reward/*.pt"),
           "sft": ("reward.pt", "dpo*.pt", "ppo*.pt"),
           "reward": ("ppo*.pt",)}


def announce_retraining(path):
    """Say that a finished checkpoint is trained again, and which later ones rest on it."""
    print(f"{path} is trained again; the old one stays until the new one is whole, and is then "
          f"{older(path).name}")
    patterns = RESTING.get(path.stem, ())
    resting = sorted(made.relative_to(path.parent).as_posix()
                     for pattern in patterns for made in path.parent.glob(pattern))
    if resting:
        print(f"these rest on the old one: {', '.join(resting)}")


class Run:
    """One training run in the folder cfg.out: log NAME.jsonl, state NAME.state, NAME.run.json.

    cfg     has out, save_every, resume, and the settings that a resumed run must share
    inputs  files and folders the run reads; a resumed run must find them unchanged
    made    the file that a finished run leaves behind; NAME.pt by default
    parts   everything that a step changes, see snapshot

    A resumed run restores its parts at the first step, so setup code runs identically on fresh and
    resumed runs. `resumed` tells the two apart.
    """

    def __init__(self, cfg, name, inputs=(), made=None, **parts):
        folder = run_folder(cfg.out)
        lock(folder)
        self.name = name
        self.parts = parts
        self.every = cfg.save_every
        self.step = 0
        self.stop = False
        self.path = folder / f"{name}.state"
        self.log_path = folder / f"{name}.jsonl"
        self.record_path = record_path(folder, name)
        self.cfg = cfg
        self.inputs = [path for path in inputs if path]
        self.check_inputs()
        excluded = ("out", "resume", "save_every", "device")
        self.settings = {k: str(v) for k, v in vars(cfg).items() if k not in excluded}
        read = {Path(path) for path in inputs if path}   # of these only the content counts
        self.settings |= {k: "a file" for k, v in self.settings.items() if v and Path(v) in read}
        self.settings |= {"processes": str(world_size()), "files": digest(inputs)}
        self.start = time.time()
        self.saved_at = None   # step of the last saved state
        self.damaged = []      # unreadable states
        self.logged = False
        self.saved = self.newest() if cfg.resume else None
        barrier()   # all ranks read before rank 0 writes
        self.resumed = bool(self.saved)
        made = made or folder / f"{name}.pt"
        if cfg.resume and not self.resumed:
            if made.exists():
                again = hasattr(cfg, "init") and name != "reward"   # its --init is a GPT
                more = f", or train it further with --init {made}" if again else ""
                raise UserError(f"nothing to resume: {made} is finished; "
                                f"leave --resume out to train it again{more}")
            print(f"nothing to resume in {folder}: {name} starts from the beginning")
        if not cfg.resume and rank() == 0:
            if made.exists():
                announce_retraining(made)
                if self.log_path.exists() and not self.path.exists():   # the log of that checkpoint
                    os.replace(self.log_path, older(self.log_path))
                    if self.record_path.exists():
                        os.replace(self.record_path, older(self.record_path))
            if self.path.exists():
                print(f"discarding {self.path} of an unfinished run; --resume would continue it")
            self.delete_states()
        if world_size() > 1:
            self.synchronise()

    def check_inputs(self):
        """Raise UserError if the run would write its log over a file that it reads."""
        log = self.log_path.resolve()
        for path in self.inputs:
            if Path(path).resolve() in (log, *log.parents):
                raise UserError(f"{path}: this run would write its log {self.log_path} over your "
                                f"data; move them, or name another folder with --out")

    def delete_states(self):
        self.path.unlink(missing_ok=True)
        older(self.path).unlink(missing_ok=True)

    def synchronise(self):
        """Give all ranks the weights of rank 0, and each rank its own random numbers."""
        torch.manual_seed(torch.initial_seed() + rank())
        for part in self.parts.values():
            if isinstance(part, nn.Module):
                for tensor in part.state_dict().values():
                    dist.broadcast(tensor, 0)

    def newest(self):
        """Return the newest complete state, or None if there is none; warn about a damaged one.

        Raises UserError for changed settings or files.
        """
        candidates = [path for path in (self.path, older(self.path)) if path.exists()]
        for path in candidates:
            if path in self.damaged:
                continue
            try:
                state = load_checkpoint(path)
                if not is_state(state):
                    raise UserError(f"{path}: not the state of a run")
            except UserError as e:
                self.skip(path, e)
                continue
            self.check_settings(state["settings"])
            self.source = path
            return state
        if candidates:
            raise UserError(f"{self.path}: neither this state nor the one before is readable; "
                            f"leave --resume out to start again")
        return None

    def skip(self, path, reason):
        """Note that a state cannot be used, and why."""
        self.damaged.append(path)
        if rank() == 0:
            print(f"warning: {reason}; trying the one before", file=sys.stderr)

    def check_settings(self, saved):
        """Raise UserError if the run was started with other settings, files or processes."""
        changed = [k for k, v in self.settings.items() if saved.get(k) != v]
        if not changed:
            return
        if changed == ["files"]:
            raise UserError("--resume: a file that this run reads has changed since it started; "
                            "restore it, or leave --resume out")
        name = changed[0]
        if name == "processes":
            raise UserError(f"--resume: {self.name} was started by {saved.get('processes')} "
                            f"processes, not {world_size()}")
        raise UserError(f"--resume: {self.name} was started with --{name.replace('_', '-')} "
                        f"{saved.get(name)}, not {self.settings[name]}; "
                        f"type the same settings, or leave --resume out")

    def save(self, n):
        """Write the state of a run of n steps; the previous state stays beside it."""
        if self.log_path.exists() and rank() == 0:
            with open(self.log_path, "a") as f:
                os.fsync(f.fileno())
        log_bytes = self.log_path.stat().st_size if self.log_path.exists() else 0
        parts = {k: snapshot(v) for k, v in self.parts.items()}
        save_checkpoint(self.path, step=self.step, n=n, settings=self.settings,
                        log_bytes=log_bytes, random=random_states(), seconds=self.seconds(),
                        parts=parts)
        self.saved_at = self.step
        self.write_record()

    def write_record(self, finished=False):
        """Write what scaffold/record.py describes, with the time so far."""
        if rank() == 0:
            write_record(self.record_path,
                         self.record | dict(seconds=self.seconds(), finished=finished))

    def put_back(self, n):
        """Restore the loaded state in place and cut the log back to it.

        If its parts are not those of this run, restore the one before.
        """
        while True:
            saved = self.saved
            if saved["n"] != n:
                raise UserError(f"--resume: this data gives {n} steps, the saved run had "
                                f"{saved['n']}; use the same data, or leave --resume out")
            try:
                for name, part in self.parts.items():
                    restore(part, saved["parts"][name])
                set_random_states(saved["random"])
                break
            except Exception as e:   # anything may stand in a damaged file
                self.skip(self.source, f"{self.source}: not a state of this run ({brief(e)})")
                self.saved = self.newest()
        if rank() == 0:
            for path in self.damaged:   # else the next save would keep it in place of the good one
                path.unlink()
        self.step = saved["step"]
        self.saved_at = saved["step"]
        self.start = time.time() - saved["seconds"]
        if rank() == 0 and self.log_path.exists():   # drop rows of steps that will run again
            os.truncate(self.log_path, min(saved["log_bytes"], self.log_path.stat().st_size))
        print(f"resuming {self.name} at step {self.step} of {n}")
        self.saved = None   # free it: it may be as large as the model

    def seconds(self):
        """Return the seconds spent on this run, including those before a kill."""
        return time.time() - self.start

    def interrupt(self, *_):
        """Handle Ctrl-C: finish the step and save; a second Ctrl-C quits at once."""
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        print("\nCtrl-C: finishing this step and saving; press again to quit without saving",
              file=sys.stderr)

    def catches_interrupts(self):
        """Return whether Ctrl-C may wait for the end of a step.

        Several processes would stop at different steps, so there Ctrl-C ends them at once.
        """
        return (world_size() == 1
                and threading.current_thread() is threading.main_thread()
                and signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    def steps(self, n):
        """Yield the numbers of the remaining steps up to n; save the state between two of them."""
        device = next((p.device for part in self.parts.values() if isinstance(part, nn.Module)
                       for p in part.parameters()), "cpu")
        inputs = {str(path): digest([path]) for path in self.inputs}
        self.record = describe(self.cfg, device, world_size(), inputs, n)
        if self.resumed:
            self.put_back(n)
        else:
            if not self.logged and rank() == 0:   # the log of an earlier run
                self.log_path.unlink(missing_ok=True)
            if self.every:
                self.save(n)
        self.write_record()
        catching = self.catches_interrupts()
        if catching:
            signal.signal(signal.SIGINT, self.interrupt)
        try:
            with tqdm(total=n, initial=self.step, desc=self.name, mininterval=1,
                      disable=rank() > 0) as self.bar:
                while self.step < n:
                    yield self.step
                    self.step += 1
                    self.bar.update()
                    # No save after the last step: a run killed after the loop repeats some steps.
                    due = self.every and self.step % self.every == 0
                    if self.step < n and (self.stop or due):
                        self.save(n)
                        if self.stop:
                            raise KeyboardInterrupt
        finally:
            if catching:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def take_step(self, loss, optimizer, model, lr, batch, unit="record"):
        """Take one optimizer step; return the gradient norm.

        If it diverges, the message names the step, the batch and the last good checkpoint. batch:
        numbers that identify the batch; unit: what they number.
        """
        try:
            return take_step(loss, optimizer, model, lr, where=f"{self.name}, step {self.step}")
        except Diverged as e:
            good = "none"
            if self.saved_at is not None:
                good = f"{self.path}, of step {self.saved_at}"
            numbers = [int(i) for i in batch]
            raise Diverged(f"{e}; batch of {unit}s {numbers}; "
                           f"last good checkpoint: {good}") from None

    def log(self, **row):
        """Append a row to the log; floats are averaged over the processes."""
        fresh = not self.resumed and not self.logged
        log_metrics(self.log_path, fresh=fresh, **all_reduce_mean(row))
        self.logged = True

    def finish(self):
        """Delete the states and unlock the folder; call it after writing the last checkpoint."""
        if rank() == 0:
            self.delete_states()
        self.write_record(finished=True)
        unlock(self.path.parent)
