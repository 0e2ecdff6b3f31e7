"""Trains one variant, or every combination of several variants, learning rates and seeds.

    python train.py --norm-scale=none                                 # about two minutes on a laptop
    python train.py --norm-scale none standard unified --seed 0 1 2   # nine runs, one after the other
    python train.py --model=llama-1b --norm-scale=unified --dry-run   # what it would be, without a run
    torchrun --standalone --nproc-per-node=2 train.py ...             # the same batch over two processes

Each run leaves a folder under runs/ that can be read without this code: config.json (what was asked),
metrics.csv and scales.csv (what was measured), checkpoint.pt (all that --resume needs). Randomness has
an address: weights follow from the seed, a batch from (seed, step), an evaluation window from its index.
So variants of one seed start from the same matrices and see the same batches, evaluating more often
changes nothing, and a run that was cut off goes on as if it had not been.
"""

import argparse
import contextlib
import csv
import dataclasses
import gc
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

# Muon multiplies in bfloat16. Some virtual machines announce AMX, which oneDNN then uses for that on a
# CPU, but do not allow it: an illegal instruction. Float32, all else that runs on a CPU here, loses nothing.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import prepare_data
from model import PRESETS, Config, Transformer, count, paper_d_ff
from norms import NormScale, PreNormLinear, ScaleVector, decay_groups
from prepare_data import CommandLine, UserError

BUILT_IN_DATA = "data/sotu"
BALANCE_LOSS = 1e-3  # coefficient of the load-balancing loss of a mixture of experts
WSD_STABLE = 0.8  # share of the steps before wsd's decay
METRICS = "step tokens seconds lr train_loss val_loss grad_norm tokens_per_second peak_memory_mb".split()
SCALES = "step kind name min mean max norm".split()
# What reading a record that this program did not write can raise, besides OSError.
FOREIGN = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, argparse.ArgumentTypeError)
BENCHMARK = "norm_scale ms_per_step tokens_per_second tflops peak_memory_mb ratio".split()


class Diverged(Exception):
    """The loss or the gradient of a run is not finite."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM came, and the run was saved; the argument is the exit code."""


# ---------------------------------------------------------------------------------------------------
# Flags, and the settings of one run


def number(kind, low, high):
    """An argparse type: a number of this kind from low to high."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high:  # false for NaN
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number from {low:,} to {high:,}")

    return parse


def width(text):
    """An argparse type: a width, or +n for n more than the default."""
    if not re.fullmatch(r"\+?\d{1,7}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a width, 1 to 9,999,999, nor +n for n more")
    return text


def norm_scale(text):
    """An argparse type: the variant that a string names."""
    try:
        return NormScale.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def command_line():
    parser = CommandLine(prog="train.py", description="Trains a small Llama with the scale vectors of --norm-scale.")
    length, again, instead = (parser.add_mutually_exclusive_group() for _ in range(3))

    def add(name, kind, what, default=None, group=parser, **how):
        how |= {"choices": kind} if isinstance(kind, (list, dict)) else {"type": kind}
        shown = default if isinstance(default, str | int | float) else how.pop("shown", "the preset's")
        group.add_argument(name, help=f"{what} (default: {shown})".replace("%", "%%"), default=default, **how)

    def switch(name, what, group):
        group.add_argument(name, help=what, action="store_true")

    def whole(low, high=10**9):
        return number(int, low, high)

    several = {"nargs": "+", "metavar": "VALUE"}  # all combinations are run, one after the other
    variants = "none, standard, unified, or parts joined by + such as hg+dp, see norms.py; one or more"
    add("--norm-scale", norm_scale, variants, [NormScale()], shown="standard", **several)
    add("--lr", number(float, 1e-9, 1e3), "peak learning rate, one or more", **several)
    add("--seed", whole(0, 2**32 - 1), "of weights and batches, one or more", [0], shown=0, **several)
    add("--model", PRESETS, "preset of sizes and settings", "tiny")
    add("--optimizer", ["adamw", "muon"], "muon: for matrices inside the blocks, AdamW for the rest", "adamw")
    add("--schedule", ["cosine", "wsd"], "cosine to 1/20, or constant and linear to 0 in the last fifth", "cosine")
    add("--steps", whole(1), "optimiser steps", group=length)
    add("--tokens", whole(1, 10**15), "as many steps as see this many tokens", group=length)
    add("--batch-size", whole(1, 2**20), "sequences a step, over all processes")
    at_once = "all; for the paper's presets what fits in 32,768 tokens"
    add("--micro-batch-size", whole(1, 2**20), "sequences at once on one process", shown=at_once)
    add("--seq-len", whole(1, 2**20), "tokens a sequence")
    add("--d-model", whole(2, 2**16), "width")
    add("--n-layer", whole(1, 1024), "layers")
    add("--n-head", whole(1, 1024), "attention heads")
    add("--d-ff", width, "hidden width, or +n for n more than the default", shown="int(8 d_model / 3)")
    add("--weight-decay", number(float, 0, 100), "decoupled; of which scale vectors, --norm-scale says", 0.1)
    add("--grad-clip", number(float, 0, 1e9), "largest norm of the gradient; 0 leaves it as it is", 1.0)
    add("--warmup-steps", whole(0), "steps to the peak", shown="5 % of the steps, at least 10")
    add("--data", str, "folder made by prepare_data.py; the default's is made where it is missing", BUILT_IN_DATA)
    add("--eval-every", whole(1), "steps from one evaluation to the next")
    add("--eval-tokens", whole(1, 10**12), "evaluate on this many of the first tokens of val.bin")
    add("--checkpoint-every", whole(0), "steps; 0: when the run ends or is stopped", shown="eval-every")
    add("--device", ["auto", "cpu", "cuda", "mps"], "auto: cuda where there is one, else cpu", "auto")
    add("--dtype", ["auto", "float32", "bfloat16"], "of products; auto: bfloat16 on a GPU that has it", "auto")
    add("--compile", ["auto", "on", "off"], "torch.compile; auto: on a GPU", "auto")
    add("--out-dir", str, "where the run folders are", "runs")
    switch("--resume", "go on from checkpoints; start runs without one, pass over those that are done", again)
    switch("--overwrite", "start anew where a run folder exists", again)
    switch("--dry-run", "print parameters and optimiser groups; needs no data, allocates nothing", instead)
    switch("--benchmark", "time the variants in turn instead of training them", instead)
    return parser


def preset_steps(name):
    """The preset's steps, or by the paper's rule 100 tokens for each activated parameter of its standard model."""
    p = PRESETS[name]
    if "steps" in p:
        return p["steps"]
    return round(100 * count(make_config(argparse.Namespace(**p), p)).activated / (p["batch_size"] * p["seq_len"]))


def default_warmup(steps):
    return max(10, steps // 20)


def make_config(s, preset, scale=NormScale()):
    kind = {key: preset[key] for key in ("gemma", "n_expert", "top_k") if key in preset}
    return Config(s.d_model, s.n_head, s.n_layer, s.d_ff, s.vocab_size, s.seq_len, scale, **kind)


def resolve(args, scale, lr, seed, world, vocab_size):
    """All settings of one run, under their flags' names: what was given, else the preset's."""
    preset = PRESETS[args.model]

    def choose(name, default=None):
        given = getattr(args, name)
        return preset.get(name, default) if given is None else given

    s = argparse.Namespace(model=args.model, norm_scale=scale.label, seed=seed)
    s.optimizer, s.schedule, s.data = args.optimizer, args.schedule, args.data
    s.weight_decay, s.grad_clip = args.weight_decay, args.grad_clip
    s.lr = lr or preset.get("lr_muon" if s.optimizer == "muon" else f"lr_{s.schedule}", preset["lr"])
    s.batch_size, s.seq_len = choose("batch_size"), choose("seq_len")
    s.d_model, s.n_layer, s.n_head = choose("d_model"), choose("n_layer"), choose("n_head")
    extra = args.d_ff or "+0"
    s.d_ff = int(extra) + paper_d_ff(s.d_model) * extra.startswith("+")
    s.vocab_size = preset["vocab_size"] or vocab_size
    s.steps = args.steps or preset_steps(args.model)
    if args.tokens:
        s.steps = math.ceil(args.tokens / (s.batch_size * s.seq_len))
    s.warmup_steps = choose("warmup_steps", default_warmup(s.steps))
    s.eval_every, s.eval_tokens = choose("eval_every"), choose("eval_tokens")
    s.checkpoint_every = choose("checkpoint_every", s.eval_every)
    s.device, s.processes, s.threads = world.device.type, world.size, torch.get_num_threads()
    s.dtype = {"auto": "bfloat16" if world.has_bfloat16 else "float32"}.get(args.dtype, args.dtype)
    # The compiler knows grouped_mm, by which experts multiply, in bfloat16 alone.
    can_compile = s.device == "cuda" and (s.dtype == "bfloat16" or not preset.get("n_expert"))
    s.compile = {"auto": "on" if can_compile else "off"}.get(args.compile, args.compile)
    part, limit = s.batch_size // world.size, preset.get("tokens_at_once", math.inf) / s.seq_len
    fitting = (m for m in range(part, 0, -1) if part % m == 0 and m <= limit)
    s.micro_batch_size = choose("micro_batch_size", next(fitting, 1))
    return s


def check_settings(s, world):
    """Raises UserError where settings do not go together."""
    part, head_dim = s.batch_size // world.size, s.d_model // s.n_head
    experts, bfloat16 = PRESETS[s.model].get("n_expert"), s.dtype == "bfloat16"
    mistakes = {
        f"--n-head: {s.n_head} heads do not divide the width {s.d_model}": s.d_model % s.n_head,
        f"--n-head: rotary embedding turns pairs, not heads of width {head_dim}": head_dim % 2,
        f"--d-model: {s.d_model} is no multiple of 8, which experts need": experts and s.d_model % 8,
        f"--batch-size: {s.batch_size} sequences do not split over {world.size} processes": s.batch_size % world.size,
        f"--micro-batch-size: {s.micro_batch_size} does not divide {part} sequences": part % s.micro_batch_size,
        f"--dtype: bfloat16 needs a GPU that has it, not {s.device}": bfloat16 and not world.has_bfloat16,
        "--compile: torch compiles experts in bfloat16 only": experts and s.compile == "on" and not bfloat16,
    }
    for message, wrong in mistakes.items():
        if wrong:
            raise UserError(message)


SAME_RUN = (  # what a run is: where one of these differs, it is another run
    "model norm_scale optimizer schedule lr seed steps batch_size seq_len d_model n_layer n_head d_ff vocab_size "
    "weight_decay grad_clip warmup_steps eval_every eval_tokens dtype"
).split()


def run_name(s, args, default):
    """The run folder's name: the choices that make an experiment, then what was given and differs from the preset."""
    given = {name for name in SAME_RUN if getattr(args, name, None) is not None} | ({"steps"} if args.tokens else set())
    fixed = {"model", "norm_scale", "optimizer", "schedule", "lr", "seed"}
    fixed |= {"steps"} if s.schedule == "wsd" else set()  # such a run can be continued
    new = [name for name in SAME_RUN if name in given - fixed and getattr(s, name) != getattr(default, name)]
    others = "".join(f"-{name}{getattr(s, name)}" for name in new)
    if Path(s.data) != Path(BUILT_IN_DATA):
        others += "-data" + re.sub(r"[^\w.+]+", "_", Path(s.data).name)
    return f"{s.model}-{s.norm_scale}-{s.optimizer}-{s.schedule}-lr{s.lr:g}-seed{s.seed}{others}"


def command_of(args, s):
    """A command that makes this one run: the given flags, with one value each."""
    once = {"norm_scale": s.norm_scale, "seed": s.seed, "lr": s.lr}
    if s.schedule == "wsd":  # whose steps may have grown since the warm-up was chosen
        warmup = {} if s.warmup_steps == default_warmup(s.steps) else {"warmup_steps": s.warmup_steps}
        once |= {"steps": s.steps, "tokens": None, **warmup}
    values = {name: once.get(name, value) for name, value in (vars(args) | once).items()}
    default = vars(command_line().parse_args([]))
    words = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in values.items()
        if value is not None and (name in once or value != default[name]) and name not in ("resume", "overwrite")
    ]
    start = ["python"] if s.processes == 1 else ["torchrun", "--standalone", f"--nproc-per-node={s.processes}"]
    threads = [f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in os.environ else []
    return shlex.join([*threads, *start, "train.py", *words])


# ---------------------------------------------------------------------------------------------------
# Processes and data


class World:
    """This process among those that torchrun started (rank of size), or alone; and the device it trains on."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        kind = ("cuda" if available["cuda"] else "cpu") if device == "auto" else device
        if not available[kind]:
            raise UserError(f"--device: this machine has no {kind} device that torch can use")
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")

    @property
    def has_bfloat16(self):
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def sum(self, values):
        """The float64 vector `values` summed over all processes."""
        values = torch.as_tensor(values, dtype=torch.float64)
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.tolist()

    def wait(self):
        if self.size > 1:
            dist.barrier()


def say(text, end="\n"):
    """print, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, end=end, flush=True)


class Data:
    """The tokens of a folder made by prepare_data.py, checked against its meta.json. Raises UserError."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.vocab_size, self.sha256 = int(meta["vocab_size"]), dict(meta["sha256"])
            self.bytes_per_token = number(float, 1e-9, 1e9)(meta["bytes_per_token"])
            self.vocabulary = prepare_data.load_vocabulary(folder)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"no {Path(error.filename).name} in {folder}: prepare_data.py makes such a folder") from None
        except FOREIGN as error:
            raise UserError(f"meta.json or tokenizer.tiktoken of {folder} is not prepare_data.py's: {error}") from None
        self.train, self.val = self._tokens("train.bin"), self._tokens("val.bin")

    def _tokens(self, name):
        path = self.folder / name
        if not path.is_file() or prepare_data.sha256_of(path) != self.sha256.get(name):
            raise UserError(f"{path} is missing, or has another sha256 than meta.json says: prepare the data again")
        tokens = np.memmap(path, dtype="<u2", mode="r") if path.stat().st_size else np.zeros(0, "<u2")
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(f"{path} has token {tokens.max()}, beyond meta.json's vocabulary of {self.vocab_size:,}")
        return tokens

    def check(self, s):
        if self.vocab_size > s.vocab_size:
            raise UserError(f"{self.folder} has {self.vocab_size:,} different tokens, {s.model} takes {s.vocab_size:,}")
        for name, tokens in ("train.bin", self.train), ("val.bin", self.val):
            if len(tokens) <= s.seq_len:
                few = f"{len(tokens):,} tokens, too few for --seq-len {s.seq_len} and one"
                raise UserError(f"{self.folder / name} has {few}")

    def batch(self, s, step, world):
        """This process's part of the batch that (seed, step) names: (sequences, T + 1), on its way to the device."""
        starts = np.random.default_rng((s.seed, step)).integers(len(self.train) - s.seq_len, size=s.batch_size)
        part = s.batch_size // world.size
        windows = [self.train[start : start + s.seq_len + 1] for start in starts[world.rank * part :][:part]]
        return to_device(np.stack(windows), world.device)

    def evaluation(self, s, world):
        """The first eval_tokens of val.bin in windows one after the other, as (inputs, targets) of one shape.

        Where windows run out the last batch is filled up with targets of -100, which do not count.
        """
        T, at_once = s.seq_len, s.micro_batch_size
        windows = min(s.eval_tokens, len(self.val) - 1) // T or 1
        for first in range(world.rank * at_once, windows, world.size * at_once):
            index = np.arange(first, first + at_once)
            tokens = np.stack([self.val[i * T : i * T + T + 1] for i in index.clip(max=windows - 1)]).astype(np.int64)
            targets = np.where(index[:, None] < windows, tokens[:, 1:], -100)
            yield to_device(tokens[:, :-1], world.device), to_device(targets, world.device)


def to_device(array, device):
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ---------------------------------------------------------------------------------------------------
# Optimisers and the learning rate


def make_optimizers(model, scale, s):
    """AdamW on everything, or Muon on the matrices inside the blocks and AdamW on the rest."""
    groups = decay_groups(model, scale, s.weight_decay)
    matrices_in_blocks = {p for p in model.blocks.parameters() if p.ndim == 2} if s.optimizer == "muon" else set()
    adamw, muon = [], []
    for group in groups:
        for chosen, inside in (muon, True), (adamw, False):
            params = [p for p in group["params"] if (p in matrices_in_blocks) == inside]
            if params:
                chosen.append({**group, "params": params})
    optimizers = [torch.optim.AdamW(adamw, lr=s.lr, betas=(0.9, 0.95), fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=s.lr, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"))
    taken = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(taken) == len(set(taken)) and set(taken) == set(model.parameters())
    return optimizers


def learning_rate(s, step):
    """peak * min((step + 1) / warmup, schedule(step)) at step 0, 1, ...; the schedule starts after the warm-up."""
    if s.schedule == "wsd":
        shape = (s.steps - step) / ((1 - WSD_STABLE) * s.steps)
    else:
        progress = max(0, step - s.warmup_steps) / max(1, s.steps - s.warmup_steps)
        shape = 1 / 20 + (1 - 1 / 20) * (1 + math.cos(math.pi * progress)) / 2
    return s.lr * min(1, (step + 1) / max(1, s.warmup_steps), shape)


class Trainer:
    """A model, its optimisers, and a step of training."""

    def __init__(self, s, scale, world):
        self.s, self.world = s, world
        self.model = Transformer(make_config(s, PRESETS[s.model], scale)).init_weights(s.seed).to(world.device)
        self.optimizers = make_optimizers(self.model, scale, s)
        self.parallel = DistributedDataParallel(self.model) if world.size > 1 else self.model
        self.train_forward, self.eval_forward = self.parallel, self.model
        if s.compile == "on":
            self.train_forward = self.eval_forward = torch.compile(self.model)
            if world.size > 1:
                self.train_forward = torch.compile(self.parallel)

    def autocast(self):
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.s.dtype == "bfloat16")

    def step(self, step, tokens, signals=None):
        """One optimiser step on `tokens` (sequences, T + 1): (loss, gradient norm, whether a process is to stop).

        Raises Diverged where loss or norm is not finite, before any weight is touched.
        """
        parts = tokens.split(self.s.micro_batch_size)
        loss = 0
        for part in parts:
            # Gradients meet once a step, with the last part.
            alone = self.world.size > 1 and part is not parts[-1]
            with self.parallel.no_sync() if alone else contextlib.nullcontext():
                with self.autocast():
                    language, balance, _ = self.train_forward(part[:, :-1], part[:, 1:])
                ((language + BALANCE_LOSS * balance) / len(parts)).backward()
            loss += language.detach() / len(parts)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.s.grad_clip or math.inf)
        size, signum = self.world.size, signals.signum if signals else 0
        loss, norm, stop = self.world.sum([loss.item() / size, norm.item() / size, signum])
        lr = learning_rate(self.s, step)
        if not math.isfinite(loss + norm):
            where = f"step {step + 1}, learning rate {lr:.3g} of --lr={self.s.lr:g}"
            raise Diverged(f"diverged at {where}: loss {loss:g}, gradient norm {norm:g}")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        return loss, norm, stop > 0

    @torch.no_grad()
    def evaluate(self, data):
        """(mean language loss in nats a token, expert load (layers, E) or None) over the validation windows."""
        total, tokens, loads = 0.0, 0, torch.zeros(0)
        for inputs, targets in data.evaluation(self.s, self.world):
            with self.autocast():
                loss, _, load = self.eval_forward(inputs, targets)
            counted = int((targets >= 0).sum())
            total, tokens = total + loss.item() * counted, tokens + counted
            if load is not None:
                load = load[:, targets[:, 0] >= 0].sum(1).cpu()
                loads = loads + load if len(loads) else load
        total, tokens, *loads_of_all = self.world.sum([total, tokens, *loads.flatten().tolist()])
        windows = tokens / self.s.seq_len
        return total / tokens, torch.tensor(loads_of_all).view_as(loads) / windows if len(loads) else None


# ---------------------------------------------------------------------------------------------------
# The run folder: nothing in it is ever half a file under a whole file's name


class RunFolder:
    """The records of one run. Only the first process writes."""

    RECORDS = ("metrics.csv", "scales.csv")

    def __init__(self, path, world):
        self.path, self.writes = Path(path), world.rank == 0

    def lock(self):
        """Keeps other processes out for as long as this one lives; the operating system lets go at its death."""
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self.held = open(self.path / ".lock", "a")
            try:
                if os.name == "nt":
                    import msvcrt

                    msvcrt.locking(self.held.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process is training in {self.path}") from None

    def replace(self, name, write):
        """write(file) under another name, synced, then renamed: what was there stays until the new is whole."""
        if self.writes:
            part = self.path / f"{name}.part"
            try:
                with open(part, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, self.path / name)
            finally:
                part.unlink(missing_ok=True)
            if os.name == "posix":  # the new name, too, has to survive a power cut
                folder = os.open(self.path, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)

    def append(self, name, columns, rows):
        if self.writes:
            with open(self.path / name, "a", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows(rows if file.tell() else [columns, *rows])
                file.flush()
                os.fsync(file.fileno())

    def config(self):
        """What config.json holds, or None where there is none."""
        try:
            config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            return {**dict.fromkeys(("status", "data_sha256", *SAME_RUN)), **config}
        except FileNotFoundError:
            return None
        except FOREIGN as error:
            raise UserError(f"{self.path / 'config.json'} is not a run's record: {error}") from None

    def set_config(self, config, **outcome):
        config.update(outcome)
        self.replace("config.json", lambda file: file.write((json.dumps(config, indent=2) + "\n").encode()))

    def clear(self):
        if self.writes:
            # config.json first: without it nothing is a run, should this be killed in between.
            for name in ("config.json", "checkpoint.pt", "checkpoint-stable.pt", *self.RECORDS):
                (self.path / name).unlink(missing_ok=True)

    def save(self, name, trainer, progress):
        """All that going on needs. The records' lengths say which of their lines are older than this."""
        records = {record: self.path / record for record in self.RECORDS}
        contents = {
            "run": {key: vars(trainer.s)[key] for key in SAME_RUN},
            "progress": dataclasses.asdict(progress),
            "model": trainer.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "records": {name: path.stat().st_size if path.exists() else 0 for name, path in records.items()},
        }
        try:
            self.replace(name, lambda file: torch.save(contents, file))
        except RuntimeError as error:  # torch.save covers a full disk with an error of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    def read(self, name):
        """The contents of a checkpoint: (what `save` put there, the progress in it)."""
        path = self.path / name
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            progress = Progress(**saved["progress"])
            saved["records"] = [int(saved["records"][name]) for name in self.RECORDS]
            if saved["run"].keys() != set(SAME_RUN) or not 0 <= progress.step:
                raise ValueError("other contents")
            return saved, progress
        except Exception as error:  # whatever torch makes of bytes that it did not write
            reason = (str(error) or type(error).__name__).splitlines()[0][:100]
            raise UserError(f"{path} is not a whole checkpoint ({reason}); --overwrite starts anew") from None

    def load(self, trainer, name="checkpoint.pt"):
        """Puts the trainer where its checkpoint was saved, and drops younger lines from the records.

        A wsd run that is to be longer goes on from before its decay.
        """
        path, (saved, progress) = self.path / name, self.read(name)
        check_same(path, saved["run"], trainer.s)
        steps = saved["run"]["steps"]
        if steps != trainer.s.steps and progress.step > int(WSD_STABLE * steps):
            return self.load(trainer, "checkpoint-stable.pt")
        try:
            trainer.model.load_state_dict(saved["model"])
            for optimizer, state in zip(trainer.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        except Exception as error:
            raise UserError(f"{path} does not fit this model: {str(error).splitlines()[0][:100]}") from None
        for name, columns, length in zip(self.RECORDS, (METRICS, SCALES), saved["records"]):
            self._cut(self.path / name, columns, length)
        return progress

    def _cut(self, path, columns, length):
        if self.writes and (length or path.exists()):
            header = ",".join(columns).encode()
            whole = path.read_bytes() if path.exists() else b""
            if len(whole) < length or (length and not whole.startswith(header + b"\n")):
                raise UserError(f"{path} has lost lines, or other columns than {header.decode()}")
            os.truncate(path, length)


def check_same(where, old, s):
    """Raises UserError where a record is of another run than the settings s. wsd may be prolonged."""
    for key in SAME_RUN:
        longer = key == "steps" and s.schedule == "wsd" and isinstance(old[key], int)
        if old[key] != vars(s)[key] and not longer:
            there = f"{key} is {old[key]} there and {vars(s)[key]} here"
            raise UserError(f"{where} is of another run: {there}; --overwrite starts anew")


class StopSignals:
    """Notes Ctrl-C and SIGTERM in `signum`, for the loop to look at between steps; the same one again acts at once."""

    def __enter__(self):
        self.signum = 0
        self.before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, signum, _frame):
        self.signum = signum
        signal.signal(signum, self.before[signum])

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


# ---------------------------------------------------------------------------------------------------
# The loop


@dataclasses.dataclass
class Progress:
    """Where a run is: what a checkpoint keeps beside weights and optimisers."""

    step: int = 0  # steps done
    seconds: float = 0.0  # of training, without evaluation and checkpoints
    loss_sum: float = 0.0  # of the training losses since the last line of metrics.csv
    line_step: int = 0  # steps and seconds at that line
    line_seconds: float = 0.0
    val_loss: float = math.nan  # in that line


class StatusLine:
    """One line that is rewritten in place on a terminal, and a line now and then in a file; others stay."""

    START = "\r\x1b[K"  # back to the line's start, and clear it

    def __init__(self):
        self.live, self.due = sys.stdout.isatty(), 0.0

    def show(self, text):
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + (0.1 if self.live else 10)
            say(self.START * self.live + text, end="" if self.live else "\n")

    def keep(self, text):
        say(self.START * self.live + text)


def train(s, scale, data, world, folder, config, resume):
    """One run, from its start or from its checkpoint, to its end. Raises Diverged and Stopped."""
    resume = resume and folder.config() is not None and (folder.path / "checkpoint.pt").exists()
    if not resume:
        folder.clear()
    folder.set_config(config, status="running", reason=None)
    trainer, progress, line = Trainer(s, scale, world), Progress(), StatusLine()
    if resume:
        progress = folder.load(trainer)
        say(f"goes on after step {progress.step:,}")
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first, began = progress.step, progress.seconds
    stable = int(WSD_STABLE * s.steps) if s.schedule == "wsd" else None
    batch = data.batch(s, progress.step, world)
    with StopSignals() as stop:
        while progress.step < s.steps:
            start = time.perf_counter()
            loss, norm, stopped = trainer.step(progress.step, batch, stop)
            progress.step += 1
            last = progress.step == s.steps
            if not last:
                batch = data.batch(s, progress.step, world)
            progress.seconds += time.perf_counter() - start
            progress.loss_sum += loss

            rate = (progress.step - first) / (progress.seconds - began)
            speed = f"{rate * s.batch_size * s.seq_len:,.0f} tokens/s  {(s.steps - progress.step) / rate:,.0f} s left"
            line.show(f"step {progress.step:,}/{s.steps:,}  loss {loss:.3f}  {speed}")
            if last or progress.step % s.eval_every == 0:
                progress = record_evaluation(trainer, data, folder, progress, norm, line)
            if progress.step == stable:
                folder.save("checkpoint-stable.pt", trainer, progress)
            if last or stopped or (s.checkpoint_every and progress.step % s.checkpoint_every == 0):
                folder.save("checkpoint.pt", trainer, progress)
            if stopped and not last:
                folder.set_config(config, status="interrupted")
                line.keep(f"stopped after step {progress.step:,} and saved; the same command with --resume goes on")
                raise Stopped(128 + (stop.signum or signal.SIGTERM))
    folder.set_config(config, status="done")
    bits = progress.val_loss / math.log(2) / data.bytes_per_token
    say(f"\nval loss {progress.val_loss:.4f} nats a token, {bits:.3f} bits a byte, {progress.seconds:,.0f} s of training")
    say(f"record: {folder.path}\n\na text from this model: {sample(trainer.model, data, world)!r}\n")
    if stop.signum:  # came with the last step: other runs of the command do not start
        raise Stopped(128 + stop.signum)


def record_evaluation(trainer, data, folder, progress, norm, line):
    """Evaluates, and writes a line of metrics.csv and those of scales.csv. Returns the progress from this line on."""
    s, step, seconds = trainer.s, progress.step, progress.seconds
    val_loss, load = trainer.evaluate(data)
    if not math.isfinite(val_loss):
        raise Diverged(f"diverged at step {step}: validation loss {val_loss:g}, --lr={s.lr:g}")
    train_loss = progress.loss_sum / (step - progress.line_step)
    rate = (step - progress.line_step) * s.batch_size * s.seq_len / (seconds - progress.line_seconds)
    tokens, memory = step * s.batch_size * s.seq_len, peak_memory_mb(trainer.world.device)
    lr = learning_rate(s, step - 1)
    row = [step, tokens, f"{seconds:.3f}", lr, train_loss, val_loss, norm, f"{rate:.1f}", memory]
    folder.append("metrics.csv", METRICS, [row])
    folder.append("scales.csv", SCALES, scale_rows(trainer.model, step, load))
    line.keep(f"step {step:,}: {tokens:,} tokens, train loss {train_loss:.4f}, val loss {val_loss:.4f}")
    return Progress(step, seconds, line_step=step, line_seconds=seconds, val_loss=val_loss)


def scale_rows(model, step, load):
    """The lines of scales.csv: every scale vector's gamma, every branch's weight, every layer's load of the experts."""
    for name, module in model.named_modules():
        if isinstance(module, ScaleVector):
            gamma = module().detach()
            yield [step, "scale", name, *spread(gamma), gamma.norm().item()]
        if isinstance(module, PreNormLinear):
            for branch, weight in module.weight.items():
                yield [step, "weight", f"{name}.weight.{branch}", "", "", "", weight.detach().norm().item()]
    for layer, shares in enumerate([] if load is None else load):
        yield [step, "load", f"blocks.{layer}.ffn", *spread(shares), ""]


def spread(vector):
    return [vector.min().item(), vector.mean().item(), vector.max().item()]


def peak_memory_mb(device):
    """The GPU's peak of this run, or the process's so far; empty where neither is known."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return f"{peak / (2**20 if sys.platform == 'darwin' else 2**10):.0f}"
    return ""


def sample(model, data, world, prompt=8, length=48):
    """The start of the validation text, and what the model makes of it."""
    tokens = to_device(data.val[None, :prompt], world.device)
    tokens = model.generate(tokens, length, torch.Generator().manual_seed(0))[0].tolist()
    known = (data.vocabulary[token] for token in tokens if token < data.vocab_size)
    return b"".join(known).decode("utf-8", errors="replace")


# ---------------------------------------------------------------------------------------------------
# The command


def configuration(s, counts, data, command):
    """What config.json holds beside the outcome: settings, versions, machine, data and counts."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    device_name = torch.cuda.get_device_name() if s.device == "cuda" else platform.processor() or platform.machine()
    return {
        "command": command,
        **vars(s),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device_name": device_name,
        "git_commit": commit,
        "data_sha256": data.sha256,
        "bytes_per_token": data.bytes_per_token,
        "parameters": counts.parameters,
        "activated_parameters": counts.activated,
        "scale_parameters": counts.scale,
        "tokens_per_step": s.batch_size * s.seq_len,
        "flops_per_token": counts.flops_per_token,
    }


def describe(s, scale, counts):
    """The variant in words, its parameters, and the optimiser's groups with their weight decay."""
    share = f"{counts.scale:,} of them in scale vectors ({counts.scale / counts.parameters:.3g})"
    activated = f", {counts.activated:,} activated" if counts.activated != counts.parameters else ""
    lines = ["", f"--norm-scale={scale.label}", *(f"  {line}" for line in scale.describe())]
    lines.append(f"{s.model}: {counts.parameters:,} parameters{activated}, {share}")
    with torch.device("meta"):
        model = Transformer(make_config(s, PRESETS[s.model], scale))
        optimizers = make_optimizers(model, scale, s)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            size = sum(p.numel() for p in group["params"])
            what = f"{type(optimizer).__name__}, {group['name']}: {len(group['params'])} with {size:,} entries"
            lines.append(f"  {what}, weight decay {group['weight_decay']:g}")
    tokens = s.steps * s.batch_size * s.seq_len
    each = f"{tokens:,}, {tokens / counts.activated:.1f} a parameter"
    lines.append(f"{s.steps:,} steps of {s.batch_size} x {s.seq_len} tokens: {each}")
    rate = f"{s.schedule}, lr {s.lr:g} after {s.warmup_steps:,} steps"
    lines.append(f"{s.optimizer}, {rate}; seed {s.seed}; {s.device}, {s.dtype}")
    return "\n".join(lines)


def check_memory(s, counts, world):
    """Raises UserError where what training must hold at the least is more than the machine has.

    Weights, gradients and moments; logits and their gradient; in each layer what the backward pass reads.
    """
    size, tokens = 2 if s.dtype == "bfloat16" else 4, s.micro_batch_size * s.seq_len
    need = 16 * counts.parameters + 8 * tokens * s.vocab_size
    need += size * tokens * s.n_layer * (8 * s.d_model + 4 * s.d_ff)
    if world.device.type == "cuda":
        have = torch.cuda.mem_get_info()[1]
    elif hasattr(os, "sysconf"):
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if need > have:
        raise UserError(f"this needs {need / 2**30:,.0f} GiB or more, the {world.device.type} has {have / 2**30:,.0f}")


def ready_data(args, world):
    """The data of --data; the built-in text is prepared where it is missing."""
    built_in = Path(args.data) == Path(BUILT_IN_DATA)
    if built_in and world.rank == 0 and not Path(args.data, "meta.json").exists():
        say(f"preparing the built-in text in {BUILT_IN_DATA}")
        prepare_data.prepare("sotu", out_dir=Path(BUILT_IN_DATA).parent)
    world.wait()
    return Data(args.data)


def benchmark(runs, data, world, out_dir, warm_up=5, rounds=10, steps=4):
    """Times the variants in turn, A B A B; <out_dir>/benchmark.csv. The ratio is of ms a step to the first one's."""
    gpu = world.device.type == "cuda"
    trainers, memory, times = [], [], [[] for _ in runs]
    for s, scale, _ in runs:
        before = torch.cuda.memory_allocated() if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        trainers.append(Trainer(s, scale, world))
        for step in range(warm_up):
            trainers[-1].step(step, data.batch(s, step, world))
        # On a CPU the process's peak is the variant's where it is the only one.
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if gpu else peak_memory_mb(world.device)
        memory.append(f"{peak:.0f}" if gpu else peak if len(runs) == 1 else "")
    for round in range(rounds):
        for trainer, taken in zip(trainers, times):
            for step in range(warm_up + round * steps, warm_up + (round + 1) * steps):
                start = time.perf_counter()
                trainer.step(step, data.batch(trainer.s, step, world))
                if gpu:
                    torch.cuda.synchronize()
                taken.append(1000 * (time.perf_counter() - start))
    rows = []
    for (s, _, counts), taken, peak in zip(runs, times, memory):
        ms = statistics.median(taken)
        rate = s.batch_size * s.seq_len / ms * 1000
        tflops = rate * counts.flops_per_token / 1e12
        ratio = ms / statistics.median(times[0])
        rows.append([s.norm_scale, f"{ms:.3f}", f"{rate:.0f}", f"{tflops:.4f}", peak, f"{ratio:.4f}"])
    path = Path(out_dir, "benchmark.csv")
    if world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([BENCHMARK, *rows])
    for row in [BENCHMARK, *rows]:
        say("  ".join(f"{cell:>17}" for cell in row))
    say(f"median of {rounds * steps} steps each, {runs[0][0].model} on {world.device}; record: {path}")


def check_folder(folder, s, args, data):
    """Raises UserError where the run may not go into its folder; True where it is done already."""
    config = None if args.overwrite else folder.config()
    if config is None:
        return False
    if not args.resume:
        raise UserError(f"{folder.path} holds a run already; --resume goes on with it, --overwrite starts anew")
    if s.schedule == "wsd" and args.warmup_steps is None and isinstance(config["warmup_steps"], int):
        s.warmup_steps = config["warmup_steps"]  # a longer run goes on from the same warm-up
    check_same(folder.path, config, s)
    if config["data_sha256"] != data.sha256:
        raise UserError(f"{folder.path} is of other data than {data.folder} holds now; --overwrite starts anew")
    if config["steps"] == s.steps:
        return config["status"] == "done"
    if s.steps * WSD_STABLE < int(WSD_STABLE * config["steps"]):
        constant = f"{int(WSD_STABLE * config['steps'])} steps at a constant rate"
        raise UserError(f"{folder.path} has {constant}: --steps={s.steps} would have decayed before")
    return False


def run(args):
    """Everything that the command asks for. Returns the exit code; raises UserError before a run starts."""
    world = World(args.device)
    dry = Path(args.data, "meta.json")
    data = None if args.dry_run else ready_data(args, world)
    vocab_size = data.vocab_size if data else Data(args.data).vocab_size if dry.exists() else 2048
    default = resolve(command_line().parse_args([f"--model={args.model}"]), NormScale(), None, 0, world, vocab_size)
    runs = []
    for scale, lr, seed in itertools.product(*map(dict.fromkeys, (args.norm_scale, args.lr or [None], args.seed))):
        s = resolve(args, scale, lr, seed, world, vocab_size)
        check_settings(s, world)
        runs.append((s, scale, count(make_config(s, PRESETS[s.model], scale))))
    if args.dry_run:
        for s, scale, counts in runs:
            say(describe(s, scale, counts))
        return 0
    for s, _, counts in runs:
        data.check(s)
        check_memory(s, counts, world)
    if args.benchmark:
        return benchmark(runs, data, world, args.out_dir) or 0

    folders = [RunFolder(Path(args.out_dir, run_name(s, args, default)), world) for s, _, _ in runs]
    if len({folder.path for folder in folders}) < len(folders):
        raise UserError("--lr: two of these runs would share a folder")
    done = [check_folder(folder, s, args, data) for folder, (s, _, _) in zip(folders, runs)]
    for folder in folders:
        folder.lock()
    failed = 0
    for folder, (s, scale, counts), is_done in zip(folders, runs, done):
        if is_done:
            say(f"{folder.path} is done")
            continue
        say(describe(s, scale, counts))
        config = configuration(s, counts, data, command_of(args, s))
        try:
            world.wait()
            train(s, scale, data, world, folder, config, args.resume)
        except (Diverged, UserError, RuntimeError, MemoryError) as error:
            if isinstance(error, UserError) and len(runs) == 1:
                raise
            diverged = isinstance(error, Diverged)
            if world.size > 1 and not diverged:
                raise  # the other processes wait for this one: it has to end, and torchrun ends them
            known = isinstance(error, (Diverged, UserError, MemoryError)) or "memory" in str(error)
            if not known:  # not a thing that users run into: tell where
                traceback.print_exc()
            failed += 1
            reason = (str(error) or type(error).__name__).splitlines()[0]
            folder.set_config(config, status="diverged" if diverged else "failed", reason=reason)
            if world.rank == 0:
                print(f"{folder.path}: {reason}", file=sys.stderr)
        gc.collect()  # a failed run's tensors hang on its traceback
    return 1 if failed else 0


def main(argv=None):
    parser = command_line()
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sampled text may have letters that a terminal has not
    try:
        return run(args)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or 'writing'}: {error.strerror or error}")
    except Diverged as error:  # in a benchmark
        print(error, file=sys.stderr)
        return 1
    except Stopped as stopped:
        return stopped.args[0]
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
