"""What stands around a training loop: a run that survives a kill, stops at a NaN, and may be shared by several processes.

Idea. What a run does next is decided by its weights, its optimizer, its random states and its place in the data. So write all
of that down every now and then, the new file beside the last one until it is whole. Then a run can die at any moment: --resume
reads the newest file that is whole, and the next step is, bit for bit, the step that would have come.

    run = Run(cfg, "sft", model=model, optimizer=optimizer, rng=rng)      all that changes from step to step
    for step in run.steps(n):                                             saves every --save-every steps, and on Ctrl-C
        loss = fair(response_loss(model(ids), ids, mask), mask.sum())     several processes: the mean over all of them
        norm = run.take_step(loss, optimizer, model, lr, batch="...")     a NaN ends the run and names the batch
        run.log(step=step, loss=loss.item(), grad_norm=norm)
    run.finish()

    python run.py                                   see it: a small run, killed again and again, ends with the very same bits
    python ppo.py --resume                          go on with what was killed, in whatever stage of the chain
    torchrun --nproc_per_node=2 sft.py              two processes share every batch of gpt, sft, reward, dpo or ppo

A second process in the same folder is refused. With several processes only the first one writes.
"""
import json, math, os, random, signal, subprocess, sys, tempfile, threading, time, zipfile, zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:   # Windows has other locks; there nobody is refused
    fcntl = None


class UserError(ValueError):
    """A mistake a user can mend. Its text says what, where, and what to type; `gpt.run` prints it as one line."""


class Diverged(UserError):
    """A loss or a gradient that is no number any more. The weights are still those before the step."""


def run_folder(path):
    """The folder of a run as a Path; it is made when the first file is written. Raises UserError where a file stands."""
    if Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"--out {path}: a file stands there; name a folder")
    return Path(path)


def set_seed(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)   # else tiny gradients become denormal numbers, which a CPU multiplies 100 times slower


def save_checkpoint(path, older=None, **state):
    """Write atomically: a crash or a full disk leaves the old file as it was. older: a path that keeps it beside the new one."""
    path = Path(path)
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        try:
            with open(temporary, "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            if older and path.exists():
                os.replace(path, older)   # a kill before the next line leaves the older one alone: readers look for both
            os.replace(temporary, path)
        except BaseException as e:
            temporary.unlink(missing_ok=True)
            # torch wraps "disk full" in a RuntimeError: raise the OSError itself.
            raise e.__context__ if isinstance(e.__context__, OSError) else e
    barrier()   # nobody reads it before it is there


def load_checkpoint(path):
    """Read a checkpoint: tensors and plain data only, so that no file can run code. Raises UserError."""
    try:
        # torch.load does not compare checksums: a flipped bit would become a weight. (Files of before 2020 have none.)
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as e:  # a damaged zip, a truncated file and a pickle with code in it all raise different things
        raise UserError(f"{path}: not a readable checkpoint ({type(e).__name__}); train it again") from None


def log_metrics(path, fresh=False, **row):
    """Append one JSON object to a metrics file; `fresh` starts the file anew."""
    if rank() == 0:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w" if fresh else "a") as f:
            f.write(json.dumps(row) + "\n")


def take_step(loss, optimizer, model, lr, clip=1.0, where="training"):
    """One optimizer step at learning rate lr; returns the gradient norm before clipping.

    Raises Diverged, which says `where`, before any weight changes if there is no finite loss or gradient.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    if not (math.isfinite(norm) and math.isfinite(loss.item())):
        raise Diverged(f"{where}: loss {loss.item():.4g}, gradient norm {norm:.4g}; nothing can be learned from that: try a lower --lr")
    optimizer.step()
    return norm


def rank():
    """The number of this process among those that torchrun started; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world() > 1:
        dist.barrier()


def join(device="auto"):
    """Under torchrun: meet the other processes, all but the first of which are silent. Who waits 10 minutes for a lost one gives up."""
    if "RANK" in os.environ and not dist.is_initialized():
        cuda = device in ("auto", "cuda") and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
        if rank():
            sys.stdout = open(os.devnull, "w")


def share(rows):
    """This process's part of a batch; all of it where it has fewer rows than there are processes (`fair` makes up for that)."""
    return rows[rank()::world()] if len(rows) >= world() else rows


def fair(loss, n):
    """A mean over this process's n terms -> loss * n * world / sum of all n: the average of these over processes is the mean of all."""
    if world() == 1:
        return loss
    total = torch.as_tensor(n, dtype=torch.float32, device=loss.device).clone()
    dist.all_reduce(total)
    return loss * (n * world() / total)


def average_gradients(model):
    """All processes get the same gradient, and so they stay the same model.

    DistributedDataParallel does this, too, and overlaps it with the backward pass; but it wraps forward() alone, and our losses call
    hidden(), score() and others.
    """
    if world() > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads]) / world()
        dist.all_reduce(flat)
        for g, mean in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))


def gathered(rows, length, device="cpu"):
    """Lists of ids (at most `length` each) that every process made of its `share` -> all of them, in the order of the whole."""
    if world() == 1:
        return rows
    mine = torch.full((len(rows), length), -1)
    for i, row in enumerate(rows):
        mine[i, :len(row)] = torch.tensor(row)
    parts = [torch.empty_like(mine, device=device) for _ in range(world())]
    dist.all_gather(parts, mine.to(device))   # (n / world, length) each: shares of the same size
    return [[i for i in row if i >= 0] for row in torch.stack(parts, 1).flatten(0, 1).tolist()]


def averaged(row):
    """The floats of a row of the log, averaged over processes."""
    names = [k for k, v in row.items() if isinstance(v, float)]
    if world() == 1 or not names:
        return row
    means = torch.tensor([row[k] for k in names], dtype=torch.float64) / world()
    means = means.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(means)
    return row | dict(zip(names, means.tolist()))


def once(make):
    """make() in the first process, then in the others, who find what it wrote."""
    if rank():
        barrier()
    made = make()
    if rank() == 0:
        barrier()
    return made


def digest(paths):
    """A checksum of files, and of all that is in folders: what a run reads is a part of what it will do. An empty path is none."""
    crc = 0
    for path in map(Path, filter(None, paths)):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                crc = zlib.crc32(file.name.encode() + file.read_bytes(), crc)
    return f"{crc:08x}"


def announce(path, making, resume):
    """Say that a stage before this one is run now; or raise UserError where it was stopped on its way, for that would throw it away."""
    state = path.with_suffix(".state")
    if state.exists() and not resume:
        raise UserError(f"{state}: a run was stopped there; go on with --resume (with settings of its own: python {path.stem}.py --resume "
                        f"and these), or delete that file to start anew")
    print(f"{path} is missing: {making} first")


LOCKS = {}   # folder -> open file; the system lets go of them when the process ends, however it ends


def lock(folder):
    """Make the folder ours until this process ends, or raise UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if fcntl and rank() == 0 and key not in LOCKS:
        handle = os.open(key, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise UserError(f"{folder}: another process is training there; wait for it, or name another folder with --out") from None
        LOCKS[key] = handle


def unlock(folder):
    handle = LOCKS.pop(folder.resolve(), None)
    if handle is not None:
        os.close(handle)


def random_states():
    name, keys, *rest = np.random.get_state()
    return dict(torch=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                numpy=(name, keys.tolist(), *rest), python=random.getstate())


def set_random_states(states):
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


def snapshot(part):
    """Anything that changes from step to step -> tensors and plain data: a module, an optimizer, a random.Random, a dict or a list."""
    return part.getstate() if isinstance(part, random.Random) else part.state_dict() if hasattr(part, "state_dict") else part


def restore(part, saved):
    """The inverse of snapshot, in place."""
    if isinstance(part, random.Random):
        part.setstate(saved)
    elif hasattr(part, "load_state_dict"):
        part.load_state_dict(saved)
    elif isinstance(part, dict):
        part.clear()
        part.update(saved)
    else:
        part[:] = saved


class Run:
    """One training run in folder cfg.out: its lock, its log NAME.jsonl, its state NAME.state, and its end if it diverges.

    cfg has out, save_every, resume and the settings, which a resumed run must share. parts: see snapshot; they are put back at the
    first step, so that what a script computes before its loop is computed on a resumed run as on the first. `resumed` says which
    of the two it is. inputs: the files and folders it reads, which must not have changed. made: the file that exists once the run is
    finished, by default NAME.pt.
    """

    def __init__(self, cfg, name, inputs=(), made=None, **parts):
        folder = run_folder(cfg.out)
        lock(folder)
        self.name, self.parts, self.every, self.step, self.stop = name, parts, cfg.save_every, 0, False
        self.path, self.older, self.log_path = (folder / f"{name}{end}" for end in (".state", ".state.old", ".jsonl"))
        self.settings = {k: str(v) for k, v in vars(cfg).items() if k not in ("out", "resume", "save_every", "device")}
        self.settings |= {"processes": str(world()), "files": digest(inputs)}
        self.start, self.saved_at, self.damaged, self.logged = time.time(), None, [], False
        self.saved = self.newest() if cfg.resume else None
        barrier()   # all have looked before the first one writes
        self.resumed = bool(self.saved)
        if cfg.resume and not self.resumed:
            made = made or folder / f"{name}.pt"
            if made.exists():
                raise UserError(f"nothing to resume: {made} is finished; leave --resume out to train it anew")
            print(f"nothing to resume in {folder}: {name} starts from the beginning")
        if not cfg.resume and rank() == 0:
            if self.path.exists():
                print(f"{self.path} belongs to an unfinished run, which is discarded now; --resume would have gone on with it")
            self.path.unlink(missing_ok=True)
            self.older.unlink(missing_ok=True)
        if world() > 1:   # all start as the first one, and draw on differently
            torch.manual_seed(torch.initial_seed() + rank())
            for tensor in (t for p in parts.values() if isinstance(p, nn.Module) for t in p.state_dict().values()):
                dist.broadcast(tensor, 0)

    def newest(self):
        """The newest state that is whole, or None if there is none; a damaged one is said. Raises UserError for other settings."""
        there = [path for path in (self.path, self.older) if path.exists()]
        for path in there:
            try:
                state = load_checkpoint(path)
                if "settings" not in state:
                    raise UserError(f"{path}: not the state of a run")
            except UserError as e:
                self.damaged.append(path)
                if rank() == 0:
                    print(f"warning: {e}; looking for the one before", file=sys.stderr)
                continue
            changed = [k for k, v in self.settings.items() if state["settings"].get(k) != v]
            if changed == ["files"]:
                raise UserError("--resume: a file that this run reads is not what it was when the run was started; bring it back, or "
                                "leave --resume out")
            if changed:
                if changed[0] == "processes":
                    raise UserError(f"--resume: {self.name} was started by {state['settings']['processes']} processes, not {world()}")
                raise UserError(f"--resume: {self.name} was started with --{changed[0].replace('_', '-')} {state['settings'].get(changed[0])}, "
                                f"not {self.settings[changed[0]]}; type the same settings, or leave --resume out")
            return state
        if there:
            raise UserError(f"{self.path}: neither this state nor the one before is readable; leave --resume out to start anew")

    def save(self, n):
        if self.log_path.exists() and rank() == 0:
            with open(self.log_path, "a") as f:
                os.fsync(f.fileno())
        size = self.log_path.stat().st_size if self.log_path.exists() else 0
        save_checkpoint(self.path, self.older, step=self.step, n=n, settings=self.settings, log_bytes=size, random=random_states(),
                        seconds=self.seconds(), parts={k: snapshot(v) for k, v in self.parts.items()})
        self.saved_at = self.step

    def put_back(self, n):
        if self.saved["n"] != n:
            raise UserError(f"--resume: the data make {n} steps now and made {self.saved['n']} then; bring the same data, or leave "
                            f"--resume out")
        for path in self.damaged if rank() == 0 else ():   # or the next saving would put it in the place of the good one
            path.unlink()
        for name, part in self.parts.items():
            restore(part, self.saved["parts"][name])
        set_random_states(self.saved["random"])
        self.step = self.saved_at = self.saved["step"]
        self.start = time.time() - self.saved["seconds"]
        if rank() == 0 and self.log_path.exists():   # rows of steps that are done again
            os.truncate(self.log_path, min(self.saved["log_bytes"], self.log_path.stat().st_size))
        print(f"going on with {self.name} at step {self.step} of {n}")
        self.saved = None   # it may be as large as the model

    def seconds(self):
        """Spent on this run, before a kill and after."""
        return time.time() - self.start

    def interrupt(self, *_):
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        print("\nCtrl-C: finishing this step and saving; press again to quit without", file=sys.stderr)

    def steps(self, n):
        """The numbers of the steps that are still to be done, up to n; between two of them the state is saved."""
        if self.resumed:
            self.put_back(n)
        else:
            if not self.logged and rank() == 0:   # an earlier run's
                self.log_path.unlink(missing_ok=True)
            if self.every:
                self.save(n)
        # Several processes would not all stop at the same step: there, Ctrl-C ends them at once.
        patient = world() == 1 and threading.current_thread() is threading.main_thread() \
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if patient:
            signal.signal(signal.SIGINT, self.interrupt)
        try:
            with tqdm(total=n, initial=self.step, desc=self.name, mininterval=1, disable=rank() > 0) as self.bar:
                while self.step < n:
                    yield self.step
                    self.step += 1
                    self.bar.update()
                    # Not after the last step: what a script does then is done again by a run that is killed there.
                    if self.step < n and (self.stop or self.every and self.step % self.every == 0):
                        self.save(n)
                        if self.stop:
                            raise KeyboardInterrupt
        finally:
            if patient:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def take_step(self, loss, optimizer, model, lr, batch):
        """The function above; if it finds no number, the run ends with the step, the batch and the last good checkpoint named."""
        good = f"{self.path}, of step {self.saved_at}" if self.saved_at is not None else "none"
        where = f"{self.name}, step {self.step}, batch: {batch}; last good checkpoint: {good}"
        return take_step(loss, optimizer, model, lr, where=where)

    def log(self, **row):
        log_metrics(self.log_path, fresh=not self.resumed and not self.logged, **averaged(row))
        self.logged = True

    def finish(self):
        """The last checkpoint is written: the states have served, and the folder is free for others."""
        if rank() == 0:
            self.path.unlink(missing_ok=True)
            self.older.unlink(missing_ok=True)
        unlock(self.path.parent)


def demo(out, kill_at=None, resume=False):
    """A small run with everything that can go wrong in it: dropout, noise from three generators, and a kill by the system."""
    from types import SimpleNamespace
    set_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer, rng = torch.optim.AdamW(model.parameters()), random.Random(0)
    run = Run(SimpleNamespace(out=out, save_every=10, resume=resume), "demo", model=model, optimizer=optimizer, rng=rng)
    for step in run.steps(100):
        x = torch.randn(8, 4) + rng.random() + np.random.rand()
        loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        run.log(step=step, loss=loss.item(), grad_norm=run.take_step(loss, optimizer, model, 1e-2, "random numbers"))
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save(model.state_dict(), Path(out) / "demo.weights")


def main():
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        call = [sys.executable, "-c", "import sys, run; run.demo(sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'again')"]
        for out, kills in ((whole, [-1]), (killed, [5, 37, 71, -1])):
            for i, kill_at in enumerate(kills):
                args = [*call, out, str(kill_at), "again" if i else ""]
                code = subprocess.run(args, cwd=Path(__file__).parent, capture_output=True).returncode
                print(f"{out.name:7} {'killed at step ' + str(kill_at) if code == -signal.SIGKILL else 'came to its end'}")
        a, b = (torch.load(out / "demo.weights", weights_only=True) for out in (whole, killed))
        print("same weights, bit for bit:", all(torch.equal(a[k], b[k]) for k in a))
        print("same log, byte for byte:  ", (whole / "demo.jsonl").read_bytes() == (killed / "demo.jsonl").read_bytes())


if __name__ == "__main__":
    main()
