"""Trains one variant, or every combination of several variants, learning rates and seeds.

    python train.py --norm-scale=none                                 # some minutes on a laptop
    python train.py --norm-scale none standard unified --seed 0 1 2   # nine runs, one process each
    python train.py --model=llama-1b --norm-scale=unified --dry-run   # describes the run, does not start it
    torchrun --standalone --nproc-per-node=2 train.py ...             # the same batch over two processes

Read it from the top: a batch, the optimisers, the learning rate, the loop, evaluation. That is all of
training; the rest writes the run's folder (config.json, metrics.csv, scales.csv, checkpoint.pt), declares
the settings, and executes the command. One step of the tiny preset:

    tokens (8, 129)          8 sequences cut out of the text, determined by seed and step
    inputs, targets          (8, 128) each: all but the last token of a row, all but the first
    logits (8, 128, 2048)    from the model, for a vocabulary of 2,048
    loss                     mean of -log p(target): about ln 2048 = 7.6 at the start
    g = dloss/dweights       by backward, then clipped to a norm of at most 1 (--grad-clip)
    weights                  updated by the optimiser, with the learning rate learning_rate(step)

The functions share four things: `settings`, the value of every flag; `data`, the tokens of train.bin and
val.bin; `machine`, the device, this process's rank and the number of processes (torchrun starts several,
each with a part of the batch); `folder`, where the run's records go.

All randomness is explicitly seeded: initial weights depend only on the seed, a batch on (seed, step), an
evaluation window on its index. So variants with the same seed start from the same matrices and see the same
batches, evaluating more often changes nothing, and an interrupted run resumes as if it had never stopped.
"""

import argparse
import csv
import ctypes
import dataclasses
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.utils._triton import has_triton

import prepare_data
from model import PRESETS, Config, Transformer, count, paper_d_ff
from norms import Branch, NormScale, ScaleVector, decay_groups
from prepare_data import CommandLine, TokenFolder, UserError

# ---------------------------------------------------------------------------------------------------
# Batches


def batch(data, settings, step, machine):
    """This process's part of the batch for (seed, step): (sequences, T + 1) tokens of train.bin.

    In each row, all tokens but the last are the inputs and all but the first are the targets.
    """
    T = settings.seq_len
    generator = np.random.default_rng((settings.seed, step))
    starts = generator.integers(len(data.train) - T, size=settings.batch_size)
    local_starts = np.array_split(starts, machine.processes)[machine.rank]
    return machine.tensor(np.stack([data.train[start : start + T + 1] for start in local_starts]))


# ---------------------------------------------------------------------------------------------------
# Optimisers


def adamw(groups, settings):
    """m <- 0.9 m + 0.1 g,  s <- 0.95 s + 0.05 g^2,  w <- w - lr (m / sqrt(s) + weight_decay w)

    (m and s are bias-corrected: divided by 1 - 0.9^t and 1 - 0.95^t, as they start at 0.)
    """
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def muon(groups, settings):
    """m <- 0.95 m + 0.05 g for each matrix; with m = U S V^T, w <- w - lr (c U V^T + weight_decay w)

    With c = 0.2 sqrt(max(rows, columns)) an entry of w moves about as far as under AdamW. Two details are
    left out above: what is decomposed is 0.95 m + 0.05 g (Nesterov momentum), and five Newton-Schulz steps
    replace the decomposition and give U V^T approximately.
    """
    return torch.optim.Muon(groups, lr=settings.lr, momentum=0.95, adjust_lr_fn="match_rms_adamw")


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def make_optimizers(model, settings):
    """Two, at one learning rate: --optimizer for matrices inside the blocks, AdamW for all other weights."""
    matrices, *vectors = decay_groups(model, model.config.norm_scale, settings.weight_decay)
    in_blocks = set(model.blocks.parameters())
    inside = [p for p in matrices["params"] if p in in_blocks]
    outside = [p for p in matrices["params"] if p not in in_blocks]
    block_matrices = {**matrices, "name": "matrices inside the blocks", "params": inside}
    other_matrices = {**matrices, "name": "embedding and head", "params": outside}
    return [
        OPTIMIZERS[settings.optimizer]([block_matrices], settings),
        adamw([other_matrices, *vectors], settings),
    ]


# ---------------------------------------------------------------------------------------------------
# The learning rate


COSINE_FLOOR = 1 / 20  # final learning rate, as a fraction of the peak
WSD_DECAY = 0.2  # fraction of the steps, at the end


def cosine(settings, step):
    """From 1 at the end of the warm-up down to COSINE_FLOOR."""
    progress = max(0, step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return COSINE_FLOOR + (1 - COSINE_FLOOR) * (1 + math.cos(math.pi * progress)) / 2


def wsd(settings, step):
    """Warm-up, stable, decay: 1, then linear to 0 over the last WSD_DECAY of the steps."""
    return min(1, (settings.steps - step) / (WSD_DECAY * settings.steps))


SCHEDULES = {"cosine": cosine, "wsd": wsd}


def learning_rate(settings, step):
    """peak * min(1, (step + 1) / warmup, schedule(step)) at step 0, 1, ..."""
    warmup = min(1, (step + 1) / max(1, settings.warmup_steps))
    return settings.lr * min(warmup, SCHEDULES[settings.schedule](settings, step))


# ---------------------------------------------------------------------------------------------------
# The loop

BALANCE_LOSS = 1e-3  # coefficient of the load-balancing loss of a mixture of experts


def require_finite(settings, step, **values):
    if not all(map(math.isfinite, values.values())):
        found = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise FloatingPointError(f"diverged at step {step} with --lr={settings.lr:g}: {found}")


def train(settings, data, machine, folder):
    """One run, from its start or its checkpoint until it ends or is interrupted.

    A generator: it yields the Record at the start and after every step.
    """
    model = Transformer(make_config(settings)).init_weights(settings.seed).to(machine.device)
    optimizers = make_optimizers(model, settings)
    record = folder.restore(model, optimizers)
    forward = torch.compile(model) if settings.compile == "on" else model
    yield record

    stopping = False
    while record.step < settings.steps and not stopping:
        started = time.perf_counter()
        tokens = batch(data, settings, record.step, machine)

        # The gradient of the mean loss over the whole batch (all processes), accumulated over micro-batches.
        loss = 0.0
        for micro_batch in tokens.split(settings.micro_batch_size):
            inputs, targets = micro_batch[:, :-1], micro_batch[:, 1:]
            share = len(micro_batch) / settings.batch_size  # weight in the mean over all sequences
            with machine.autocast(settings.dtype):
                language_loss, balance_loss = forward(inputs, targets)
            (share * (language_loss + BALANCE_LOSS * balance_loss)).backward()
            loss += share * language_loss.detach()
        machine.all_reduce([p.grad for p in model.parameters()])
        train_loss = machine.sum(loss.item())
        max_norm = settings.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
        # A NaN or an infinity stops the run here, before it reaches a weight.
        require_finite(settings, record.step + 1, loss=train_loss, gradient_norm=grad_norm)

        lr = learning_rate(settings, record.step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        record.step += 1
        record.seconds += time.perf_counter() - started
        record.losses.append(train_loss)

        last = record.step == settings.steps
        if last or record.step % settings.eval_every == 0:
            val_loss = evaluate(forward, data, settings, machine)
            record.add_evaluation(settings, lr, val_loss, grad_norm, machine)
            record.scales += scale_rows(model, record.step)
            folder.write_tables(record)
            require_finite(settings, record.step, validation_loss=val_loss)
        stopping = machine.sum(STOP.signum) > 0  # Ctrl-C in one process (see Stop) stops all
        if last or stopping or (settings.checkpoint_every and record.step % settings.checkpoint_every == 0):
            folder.save(settings, model, optimizers, record)
        yield record


# ---------------------------------------------------------------------------------------------------
# Evaluation, and what a run records


def validation_batches(data, settings, machine):
    """This process's part of an evaluation: (inputs, targets, number of windows) of each batch.

    The first eval_tokens of val.bin are cut into consecutive windows of T and distributed over the
    processes. Every batch has micro_batch_size rows, to avoid recompilation for a smaller one:
    the last window is repeated to fill it, with targets of -100, which the loss ignores.
    """
    T, rows = settings.seq_len, settings.micro_batch_size
    windows = settings.eval_tokens // T
    for first in range(machine.rank * rows, windows, machine.processes * rows):
        index = [min(i, windows - 1) for i in range(first, first + rows)]
        tokens = np.stack([data.val[T * i : T * i + T + 1] for i in index]).astype(np.int64)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
        filled = min(rows, windows - first)
        targets[filled:] = -100
        yield machine.tensor(inputs), machine.tensor(targets), filled


@torch.no_grad()
def evaluate(forward, data, settings, machine):
    """The mean language loss in nats per token, over all windows."""
    loss_sum = 0.0
    for inputs, targets, windows in validation_batches(data, settings, machine):
        with machine.autocast(settings.dtype):
            language_loss, _ = forward(inputs, targets)
        loss_sum += windows * language_loss.item()
    return machine.sum(loss_sum) / (settings.eval_tokens // settings.seq_len)


@dataclasses.dataclass
class Record:
    """The results of a run so far. A checkpoint holds them, the settings, the weights and the optimisers."""

    step: int = 0  # steps done
    seconds: float = 0.0  # of training, without evaluations and checkpoints
    losses: list = dataclasses.field(default_factory=list)  # of the steps since the last evaluation
    metrics: list = dataclasses.field(default_factory=list)  # rows of metrics.csv: {column: value}
    scales: list = dataclasses.field(default_factory=list)  # rows of scales.csv

    def tokens_per_second(self, settings):
        """Since the last evaluation."""
        before = self.metrics[-1]["seconds"] if self.metrics else 0.0
        return len(self.losses) * settings.batch_size * settings.seq_len / (self.seconds - before)

    def add_evaluation(self, settings, lr, val_loss, grad_norm, machine):
        line = {
            "step": self.step,
            "tokens": self.step * settings.batch_size * settings.seq_len,
            "seconds": self.seconds,
            "lr": lr,
            "train_loss": fmean(self.losses),
            "val_loss": val_loss,
            "grad_norm": grad_norm,
            "tokens_per_second": round(self.tokens_per_second(settings), 1),
            "peak_memory_mb": machine.peak_memory_mb(),
        }
        self.metrics.append(line)
        self.losses = []


def scale_rows(model, step):
    """Rows of scales.csv: statistics of every vector's gamma, the norm of every branch's weight."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, ScaleVector):
            gamma = module().detach()
            spread = {"min": gamma.min().item(), "mean": gamma.mean().item(), "max": gamma.max().item()}
            rows.append({"step": step, "kind": "scale", "name": name, **spread, "norm": gamma.norm().item()})
        if isinstance(module, Branch):
            spread = {"min": "", "mean": "", "max": ""}
            norm = module.W.detach().norm().item()
            rows.append({"step": step, "kind": "weight", "name": f"{name}.W", **spread, "norm": norm})
    return rows


# ---------------------------------------------------------------------------------------------------
# A first reading can end here.
#
# The run folder: files are written atomically, so none is ever half-written under its final name


class RunFolder:
    """The files of one run. Only the first process writes."""

    def __init__(self, path, machine):
        self.path, self.is_writer = Path(path), machine.rank == 0

    def lock(self):
        """A context manager that keeps other processes out; the system releases the lock if this one dies."""
        if not self.is_writer:
            return nullcontext()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(self.path / ".lock").acquire(blocking=False)
        except Timeout:
            raise UserError(f"another process is training in {self.path}") from None
        except (OSError, NotImplementedError) as error:  # some network file systems lack locks
            print(f"cannot lock {self.path}, so start no second run there: {error}", file=sys.stderr)
            return nullcontext()

    def write(self, name, contents):
        """Writes under a temporary name, then renames: the old file stays until the new one is complete."""
        if not self.is_writer:
            return
        part = self.path / f"{name}.part"
        try:
            with open(part, "wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path / name)
        finally:
            part.unlink(missing_ok=True)

    def write_tables(self, record):
        self.write("metrics.csv", as_csv(record.metrics))
        self.write("scales.csv", as_csv(record.scales))

    def write_config(self, config, status, reason=None):
        text = json.dumps({**config, "status": status, "reason": reason}, indent=2)
        self.write("config.json", text.encode() + b"\n")

    def clear(self):
        """Removes the files of an old run. The checkpoint goes first, so that nothing can resume from it."""
        for name in ("checkpoint.pt", "config.json", "metrics.csv", "scales.csv"):
            if self.is_writer:
                (self.path / name).unlink(missing_ok=True)

    def save(self, settings, model, optimizers, record):
        """Writes all that is needed to resume, as checkpoint.pt."""
        if not self.is_writer:
            return
        contents = {
            "settings": dataclasses.asdict(settings),
            "record": dataclasses.asdict(record),
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        file = io.BytesIO()  # on a full disk torch.save would raise an error that does not say so
        torch.save(contents, file)
        self.write("checkpoint.pt", file.getbuffer())

    def restore(self, model, optimizers):
        """Restores model and optimisers from the checkpoint, if there is one. Returns the Record."""
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return Record()
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            return Record(**saved["record"])
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a damaged or foreign checkpoint raises errors of many types
            raise UserError(
                f"{path} is not a checkpoint of this run ({first_line(error)}); --overwrite starts over"
            ) from None


def as_csv(rows):
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def read_config(folder):
    """The contents of config.json; {} if there is none."""
    path = Path(folder, "config.json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a run's record: {error}") from None


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def load(folder):
    """(model, tokenizer) of a run folder, on the CPU: a Transformer in float32, and a tiktoken.Encoding.

    Raises UserError if its data no longer exists or has changed.
    """
    saved = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
    settings = SimpleNamespace(**saved["settings"])
    model = Transformer(make_config(settings))
    model.load_state_dict(saved["model"])
    data = TokenFolder(settings.data)
    if data.sha256 != read_config(folder).get("data_sha256"):
        raise UserError(f"{folder}: the data in {settings.data} has changed since")
    return model, data.encoding(settings.vocab_size)


# ---------------------------------------------------------------------------------------------------
# Settings: each is declared once, and everything that depends on them is derived from here


def setting(kind, help, default, several=False, detail=False):
    """A field of Settings.

    kind: an argparse type, a list of choices, or None if it has no flag. default: a value, or a function of
    the settings above it. several: the flag takes several values, one run for each. detail: affects only how
    a run is executed, with the same losses up to rounding; it is not in the folder's name, and --resume
    accepts a different value.
    """
    about = dict(kind=kind, help=help, default=default, several=several, detail=detail)
    return dataclasses.field(metadata=about)


def number(kind, low, high=10**9):
    """An argparse type: a number of this kind from low to high."""

    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:  # false for NaN
                return value
        noun = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} from {low:,} to {high:,}")

    return parse


def variant(text):
    """An argparse type: the label of the variant that a string names."""
    try:
        return NormScale.parse(text).label
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def width(text):
    """An argparse type: a width as an int, or +n as text, for n more than the default."""
    if not re.fullmatch(r"\+?\d{1,7}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a width, 1 to 9,999,999, nor +n for n more")
    return text if text.startswith("+") else int(text)


def preset(name, otherwise=None):
    """A default: the preset's value for this name, or else `otherwise`."""
    return lambda s: s.preset.get(name, otherwise)


def default_lr(s):
    """The preset's peak for this optimiser or schedule if it has one, otherwise that for AdamW."""
    names = (f"lr_{s.optimizer}", f"lr_{s.schedule}", "lr")
    return next(s.preset[name] for name in names if name in s.preset)


def default_dtype(s):
    return "bfloat16" if s.machine.has_bfloat16 else "float32"


def default_compile(s):
    """On for a GPU where torch.compile works, but not with experts: the loop over them is not compiled."""
    return "on" if s.device == "cuda" and s.machine.can_compile() and not s.n_expert else "off"


def default_micro_batch(s):
    """As many sequences as fit into the preset's tokens_at_once, at most this process's part of a batch."""
    share = math.ceil(s.batch_size / s.machine.processes)
    return max(1, min(share, s.preset.get("tokens_at_once", 10**9) // s.seq_len))


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of one run, whether they come from flags, the preset or the data.

    A field is a flag and a key of config.json. Where it differs from the default it is also part of the
    folder's name and of the command that reproduces the run. --resume checks it.
    """

    model: str = setting(list(PRESETS), "preset of sizes and settings", "tiny")
    norm_scale: str = setting(variant, "scale vectors: the variant, see norms.py", "standard", several=True)
    optimizer: str = setting(list(OPTIMIZERS), "of the matrices inside the blocks", "adamw")
    schedule: str = setting(list(SCHEDULES), "cosine, or constant and then linear to 0", "cosine")
    lr: float = setting(number(float, 1e-9), "peak learning rate", default_lr, several=True)
    seed: int = setting(number(int, 0), "for weights and batches", 0, several=True)
    batch_size: int = setting(number(int, 1), "sequences per step, over all processes", preset("batch_size"))
    seq_len: int = setting(number(int, 1), "tokens per sequence", preset("seq_len"))
    steps: int = setting(number(int, 1), "optimiser steps", preset("steps"))
    d_model: int = setting(number(int, 2, 10**6), "width", preset("d_model"))
    n_layer: int = setting(number(int, 1, 1024), "layers", preset("n_layer"))
    n_head: int = setting(number(int, 1, 1024), "attention heads", preset("n_head"))
    d_ff: int = setting(width, "hidden width, or +n for n more", lambda s: paper_d_ff(s.d_model))
    vocab_size: int = setting(None, "tokens", lambda s: s.preset.get("vocab_size", s.data_vocab_size))
    gemma: bool = setting(None, "Gemma's extra norms", preset("gemma", False))
    n_expert: int = setting(None, "routed experts", preset("n_expert", 0))
    top_k: int = setting(None, "of them for a token", preset("top_k", 0))
    weight_decay: float = setting(number(float, 0), "of matrices and of --norm-scale's vectors", 0.1)
    grad_clip: float = setting(number(float, 0), "maximum gradient norm; 0: no clipping", 1.0)
    warmup_steps: int = setting(number(int, 0), "steps to the peak", lambda s: max(10, s.steps // 20))
    data: str = setting(os.path.normpath, "folder made by prepare_data.py", os.path.normpath("data/sotu"))
    eval_every: int = setting(number(int, 1), "steps between evaluations", preset("eval_every"))
    eval_tokens: int = setting(number(int, 1, 10**12), "of val.bin, from its start", preset("eval_tokens"))
    dtype: str = setting(["auto", "float32", "bfloat16"], "of matrix products", default_dtype)
    device: str = setting(["auto", "cpu", "cuda", "mps"], "GPU or not", lambda s: s.machine.best, detail=True)
    compile: str = setting(["auto", "on", "off"], "torch.compile", default_compile, detail=True)
    micro_batch_size: int = setting(number(int, 1), "sequences at once", default_micro_batch, detail=True)
    checkpoint_every: int = setting(number(int, 0), "0: at the end", lambda s: s.eval_every, detail=True)


FIELDS = {field.name: field.metadata for field in dataclasses.fields(Settings)}
IN_EVERY_NAME = ("model", "norm_scale", "optimizer", "schedule", "lr", "seed")


def resolve(given, machine, data_vocab_size=2048, val_tokens=math.inf):
    """Fills in defaults. Returns (Settings, {name: value} of those that differ from the default)."""
    s = SimpleNamespace(
        preset=PRESETS[given.get("model") or "tiny"], machine=machine, data_vocab_size=data_vocab_size
    )
    non_default = {}
    for name, field in FIELDS.items():  # in order: a default may depend on earlier fields
        default = field["default"](s) if callable(field["default"]) else field["default"]
        value = given.get(name)
        if name == "steps" and given.get("tokens"):
            value = math.ceil(given["tokens"] / (s.batch_size * s.seq_len))
        elif name == "d_ff" and isinstance(value, str):  # +n: n more than the default
            value = default + int(value)
        elif value is None or value == "auto":
            value = default
        if value != default:
            non_default[name] = value
        setattr(s, name, value)
    # Record what is actually evaluated: whole windows only, and no more than there are.
    s.eval_tokens = max(1, min(s.eval_tokens, val_tokens - 1) // s.seq_len) * s.seq_len
    return Settings(**{name: getattr(s, name) for name in FIELDS}), non_default


def make_config(settings):
    """The model Config for these settings."""
    sizes = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Config)}
    sizes["norm_scale"] = NormScale.parse(settings.norm_scale)
    return Config(**sizes)


def folder_name(settings, non_default, data_sha256):
    """The choices that define an experiment, then whatever differs from the preset."""
    parts = [settings.model, settings.norm_scale, settings.optimizer, settings.schedule]
    parts += [f"lr{settings.lr:g}", f"seed{settings.seed}"]
    for name, value in non_default.items():
        if name in IN_EVERY_NAME or FIELDS[name]["detail"]:
            continue
        if name == "data":  # folders of two texts can have the same name
            value = re.sub(r"[^\w.+]+", "_", Path(value).name) + "_" + data_sha256["train.bin"][:6]
        parts.append(f"{name}{value}")
    return "-".join(parts)


def command_line():
    parser = CommandLine("train.py", description="Trains a Llama with the scale vectors of --norm-scale.")
    # Groups of flags of which at most one can be given.
    length, existing_run, mode = (parser.add_mutually_exclusive_group() for _ in range(3))
    for name, field in FIELDS.items():
        if field["kind"] is None:
            continue
        how = {"choices": field["kind"]} if isinstance(field["kind"], list) else {"type": field["kind"]}
        if field["several"]:
            how |= {"nargs": "+", "metavar": "VALUE"}
        default = field["default"]
        if callable(default):
            default = "auto" if "auto" in how.get("choices", []) else "the preset's"
        group = length if name == "steps" else parser
        group.add_argument(f"--{name.replace('_', '-')}", help=f"{field['help']} (default: {default})", **how)
    length.add_argument("--tokens", type=number(int, 1, 10**15), help="tokens to train on; it sets --steps")
    parser.add_argument("--out-dir", default="runs", help="where the run folders are (default: runs)")
    jobs = "how many of several runs to train at once (default: one per core; on a GPU, one)"
    parser.add_argument("--jobs", type=number(int, 1, 1024), help=jobs)
    resume = "resume from checkpoints; start runs without one, skip those that are done or diverged"
    existing_run.add_argument("--resume", action="store_true", help=resume)
    existing_run.add_argument("--overwrite", action="store_true", help="replace runs that exist already")
    dry_run = "print parameters and optimiser groups; needs no data, allocates nothing"
    mode.add_argument("--dry-run", action="store_true", help=dry_run)
    mode.add_argument("--benchmark", action="store_true", help="time the variants in turn, without training")
    return parser


# ---------------------------------------------------------------------------------------------------
# The machine, signals, and the terminal


def tune_for_a_cpu():
    """Makes runs on a CPU faster, or possible at all. Call it before the first large tensor exists."""
    # glibc returns the memory of every large tensor to the kernel when it is freed and faults it back in page
    # by page: a seventh of the time of a tiny step. With these two thresholds it keeps up to 1 GiB.
    # Without glibc, nothing happens.
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    # Muon multiplies in bfloat16, for which oneDNN uses a CPU's AMX instructions. Some virtual machines
    # report AMX but do not permit it: the process dies of an illegal instruction. So AMX is disabled; all
    # else that a CPU does here is float32, which never uses it.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


class Machine:
    """The device that a run trains on, and this process's `rank` among torchrun's `processes`."""

    def __init__(self, kind="auto"):
        under_torchrun = dist.is_torchelastic_launched()  # a stray RANK or WORLD_SIZE means nothing
        self.rank = int(os.environ["RANK"]) if under_torchrun else 0
        self.processes = int(os.environ["WORLD_SIZE"]) if under_torchrun else 1
        on_this_machine = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun else 1
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = {"cpu": math.inf, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}
        self.best = "cuda" if gpus else "cpu"
        self.kind = self.best if kind == "auto" else kind
        if devices[self.kind] < on_this_machine:
            found = f"torch finds {devices[self.kind]} {self.kind} devices"
            raise UserError(f"--device: {found} on this machine, and {on_this_machine} would be needed")
        self.device, self.is_gpu = torch.device(self.kind), self.kind == "cuda"
        self.has_bfloat16 = self.is_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        self.name = platform.processor() or platform.machine()
        if self.is_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if under_torchrun else 0)
            self.name = torch.cuda.get_device_name()
        if under_torchrun and not dist.is_initialized():
            dist.init_process_group("nccl" if self.is_gpu else "gloo")

    def tensor(self, array):
        """An array of tokens, as int64 on the device."""
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
        if self.is_gpu:
            tensor = tensor.pin_memory()  # so that the copy can be asynchronous
        return tensor.to(self.device, non_blocking=self.is_gpu)

    def autocast(self, dtype):
        return torch.autocast(self.kind, torch.bfloat16, enabled=dtype == "bfloat16")

    def sum(self, value):
        """A number summed over all processes."""
        if self.processes == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def wait_for_all(self):
        if self.processes > 1:
            dist.barrier()

    def all_reduce(self, tensors):
        """Sums each tensor over all processes, in place."""
        if self.processes > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def can_compile(self):
        """Whether torch.compile has what it needs: a C++ compiler, and on a GPU Triton (not on Windows)."""
        compilers = (os.environ.get("CXX", "c++"), "g++", "clang", "cl")
        return any(map(shutil.which, compilers)) and (has_triton() or not self.is_gpu)

    def peak_memory_mb(self):
        """The GPU's peak, or that of the process; "" where it is not known, as on Windows."""
        if self.is_gpu:
            return round(torch.cuda.max_memory_allocated() / 2**20)
        with suppress(ImportError):
            import resource

            unit = 2**20 if sys.platform == "darwin" else 2**10
            return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
        return ""

    def memory(self):
        """The device's total memory in bytes; infinite if unknown."""
        if self.is_gpu:
            return torch.cuda.mem_get_info()[1]
        if hasattr(os, "sysconf"):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return math.inf


class Stop:
    """Ctrl-C or SIGTERM: `signum` is the last signal received, or 0.

    The training loop checks it between steps and then ends; a second signal ends the program at once.
    `processes` are the runs of a sweep, and every signal is passed on to them. A sweep holds the lock while
    it starts a run and adds it here, so that no signal is lost in between.
    """

    signum, lock = 0, threading.RLock()

    def __enter__(self):
        self.signum, self.processes, self.before = 0, [], {}
        if threading.current_thread() is threading.main_thread():  # no other thread can handle signals
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.before[signum] = signal.signal(signum, self.note)

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def note(self, signum, _frame):
        with self.lock:
            second = self.signum != 0
            self.signum = signum
            if os.name == "posix":  # on Windows Ctrl-C reaches every process by itself
                for process in self.processes:
                    process.terminate()
        if second:
            raise KeyboardInterrupt


STOP = Stop()  # one per process, as signals are


def say(text):
    """Prints a permanent line, in one write: the threads of a sweep print too."""
    print(f"\r\x1b[K{text}\n" if sys.stdout.isatty() else f"{text}\n", end="", flush=True)


def show(text):
    """Prints a line that the next one overwrites; only on a terminal."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be overwritten
        print(f"\r\x1b[K{text[:width]}", end="", flush=True)


# ---------------------------------------------------------------------------------------------------
# One run


class Plan(NamedTuple):
    """One run of a command."""

    settings: Settings
    folder: RunFolder
    flags: list  # that reproduce this run on its own

    @property
    def name(self):
        return self.folder.path.name


def run(plan, data, machine, resume):
    """Trains one run and records it. Returns the exit code: 0, or 128 + the signal if interrupted."""
    settings, folder = plan.settings, plan.folder
    with folder.lock(), STOP:
        say(describe(settings))
        if resume and not (folder.path / "checkpoint.pt").exists():
            say("no checkpoint to resume from, starting at step 0")
        machine.wait_for_all()
        config = provenance(plan, data, machine)
        folder.write_config(config, "running")
        status, reason = "running", None  # what is recorded after a second Ctrl-C
        try:
            for record in train(settings, data, machine, folder):
                report(record, settings)
            status = "done" if record.step == settings.steps else "interrupted"
        except Exception as error:
            status = "diverged" if isinstance(error, FloatingPointError) else "failed"
            reason = first_line(error)
            raise
        finally:
            folder.write_config(config, status, reason)
        if status == "interrupted":
            say(f"stopped after step {record.step:,} and saved; the same command with --resume continues")
            return 128 + (STOP.signum or signal.SIGTERM)
        if machine.rank == 0:
            say(summary(record, settings, data, folder))
        return 0


def report(record, settings):
    """Prints a permanent line per evaluation, and a line that the next one overwrites per step."""
    step = f"step {record.step:,}/{settings.steps:,}"
    tokens_left = (settings.steps - record.step) * settings.batch_size * settings.seq_len
    if record.losses:  # an evaluation empties them
        rate = record.tokens_per_second(settings)
        loss = f"loss {record.losses[-1]:.3f}"
        show(f"{step}  {loss}  {rate:,.0f} tokens/s  {tokens_left / rate:,.0f} s left")
    elif record.metrics:
        row = record.metrics[-1]
        losses = f"train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f}"
        left = f"{tokens_left / row['tokens_per_second']:,.0f} s left"
        say(f"{step}: {row['tokens']:,} tokens, {losses}, {left}")


def summary(record, settings, data, folder):
    """The final message of a run: a sample from its model, and its loss."""
    model, _ = load(folder.path)
    start = torch.from_numpy(data.val[None, :8].astype(np.int64))
    text = data.decode(model.generate(start, 48, torch.Generator().manual_seed(0))[0].tolist())
    val_loss = record.metrics[-1]["val_loss"]
    scored = data.val[1 : settings.eval_tokens + 1]
    bits = val_loss * len(scored) / math.log(2) / data.token_bytes[scored].sum()
    loss = f"val loss {val_loss:.4f} nats per token, {bits:.3f} bits per byte"
    seconds = f"{record.seconds:,.0f} s of training"
    return f"\na text from this model: {text!r}\nrecord: {folder.path}\n{loss}, {seconds}"


def describe(settings):
    """The variant in words, its parameters, and the optimiser's groups with their weight decay."""
    s, config = settings, make_config(settings)
    counts = count(config)
    share = counts.scale_parameters / counts.parameters
    tokens = s.steps * s.batch_size * s.seq_len
    each = tokens / counts.activated_parameters
    lines = ["", f"--norm-scale={s.norm_scale}", *(f"  {line}" for line in config.norm_scale.describe())]
    lines.append(f"{s.model}: {counts.parameters:,} parameters, {counts.activated_parameters:,} for a token")
    lines.append(f"  {counts.scale_parameters:,} of them in scale vectors ({share:.3g})")
    with torch.device("meta"):
        optimizers = make_optimizers(Transformer(config), s)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            size = sum(p.numel() for p in group["params"])
            what = f"{type(optimizer).__name__}, {group['name']}: {size:,} in {len(group['params'])} tensors"
            lines.append(f"  {what}, weight decay {group['weight_decay']:g}")
    lines.append(
        f"{s.steps:,} steps of {s.batch_size} x {s.seq_len} tokens: {tokens:,}, {each:.1f} per parameter"
    )
    rate = f"{s.schedule}, lr {s.lr:g} after {s.warmup_steps:,} steps"
    lines.append(f"{s.optimizer}, {rate}; seed {s.seed}; {s.device}, {s.dtype}")
    return "\n".join(lines)


def provenance(plan, data, machine):
    """What config.json holds besides the outcome: command, settings, versions, machine, data and counts."""
    root, commit = Path(__file__).resolve().parent, None
    git = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}"]  # not an enclosing repository
    with suppress(OSError, subprocess.CalledProcessError):
        version = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip()
    command = ["python", "train.py", *plan.flags]
    if machine.processes > 1:
        command[:1] = ["torchrun", "--standalone", f"--nproc-per-node={machine.processes}"]
    if "OMP_NUM_THREADS" in os.environ:  # sums in another order differ in the last digits
        command.insert(0, f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
    return {
        "command": shlex.join(command),
        **dataclasses.asdict(plan.settings),
        "processes": machine.processes,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device_name": machine.name,
        "git_commit": commit,
        "data_sha256": data.sha256,
        "bytes_per_token": data.meta["bytes_per_token"],
        "tokens_per_step": plan.settings.batch_size * plan.settings.seq_len,
        **dataclasses.asdict(count(make_config(plan.settings))),
    }


# ---------------------------------------------------------------------------------------------------
# Several runs: one process each, so that the failure of one cannot affect another


def sweep(plans, jobs, resume):
    """Runs each plan in its own process, `jobs` at a time; output lines are prefixed with the run's name.

    Returns the exit code: 0, 1 if a run did not finish, 128 + the signal if all were stopped.
    """
    threads = max(1, torch.get_num_threads() // jobs)  # per job, out of this command's
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}
    began, last_words, finished = time.monotonic(), {}, []

    def run_one(plan):
        """One run, in a thread that waits for its process; returns the process's exit code."""
        with STOP.lock:
            if STOP.signum:
                return 1
            process = subprocess.Popen(
                [sys.executable, __file__, *plan.flags, *(["--resume"] if resume else [])],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env=environment,
                start_new_session=True,  # only this command gets Ctrl-C, and passes it on
            )
            STOP.processes.append(process)
        last_words[plan.name] = ""
        for text in process.stdout:
            if text.strip():
                last_words[plan.name] = text.strip()
                say(f"{plan.name}: {text.rstrip()}")
            show_status()
        if process.wait() < 0:
            killed = f"killed by signal {-process.returncode}"
            last_words[plan.name] = f"{killed}; the same command with --resume continues it"
        finished.append(plan.name)
        return process.returncode

    def show_status():
        left = "?"
        if finished:
            seconds_each = (time.monotonic() - began) / len(finished)
            left = f"{seconds_each * (len(plans) - len(finished)):,.0f}"
        under_way = ", ".join(name for name in list(last_words) if name not in finished)
        show(f"{len(finished)} of {len(plans)} done, {left} s left: {under_way}")

    with STOP, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_one, plan) for plan in plans]
        while wait(futures, timeout=0.2).not_done:  # on Windows no signal interrupts a wait without a timeout
            pass
    exit_codes = [future.result() for future in futures]  # raises any error that kept a process from starting
    if STOP.signum:
        say("stopped; what was under way is saved, and the same command with --resume continues")
        return 128 + STOP.signum
    say("")
    for plan in plans:
        say(f"{plan.name}: {last_words[plan.name]}")
    return int(any(exit_codes))


# ---------------------------------------------------------------------------------------------------
# Timing

PEAK_TFLOPS = {"H100 80GB HBM3": 989, "H200": 989}  # dense bfloat16


def benchmark(plans, data, machine, out_dir, warm_up=5, rounds=10, steps=4):
    """Times the plans' loops in turn, A B A B; writes <out_dir>/benchmark.csv. Ratios are to the first."""
    folder, loops, milliseconds = RunFolder(out_dir, machine), [], [[] for _ in plans]
    for plan in plans:
        # No evaluation or checkpoint ever comes due, so nothing is written.
        endless = dataclasses.replace(plan.settings, steps=10**9, eval_every=10**9, checkpoint_every=0)
        loops.append(train(endless, data, machine, RunFolder(folder.path / "benchmark", machine)))
        list(itertools.islice(loops[-1], 1 + warm_up))
    memory = machine.peak_memory_mb() if len(plans) == 1 else ""  # the joint peak of several says nothing
    for _ in range(rounds):
        for loop, taken in zip(loops, milliseconds):
            for _ in range(steps):
                started = time.perf_counter()
                next(loop)  # on a GPU this waits for the loss; the next step waits for the rest
                taken.append(1000 * (time.perf_counter() - started))
    rows = []
    for plan, taken in zip(plans, milliseconds):
        ms, ratio = median(taken), median(taken) / median(milliseconds[0])
        rate = 1000 * plan.settings.batch_size * plan.settings.seq_len / ms
        tflops = rate * count(make_config(plan.settings)).flops_per_token / 1e12
        row = {
            "norm_scale": plan.settings.norm_scale,
            "ms_per_step": f"{ms:.3f}",
            "tokens_per_second": f"{rate:.0f}",
            "tflops": f"{tflops:.4f}",
            "peak_memory_mb": memory,
            "ratio": f"{ratio:.4f}",
        }
        rows.append(row)
        say("  ".join(f"{name} {value}" for name, value in row.items()))
        for card, most in PEAK_TFLOPS.items():
            if card in machine.name and plan.settings.dtype == "bfloat16":
                say(f"  {tflops / most / machine.processes:.0%} of the peak of {card}")
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write("benchmark.csv", as_csv(rows))
    medians = f"medians of {rounds * steps} steps of {plans[0].settings.model} on {machine.name}"
    say(f"{medians}: {out_dir}/benchmark.csv")


# ---------------------------------------------------------------------------------------------------
# The command


def check(s, data, machine):
    """Raises UserError if the settings do not work with this data or on this machine."""
    shortest = min(len(data.train), len(data.val))
    # A lower bound on memory: weights, gradients and moments (Muon has one instead of two), logits and their
    # gradient, all in float32.
    an_entry = 12 if s.optimizer == "muon" else 16
    need = an_entry * count(make_config(s)).parameters + 8 * s.micro_batch_size * s.seq_len * s.vocab_size
    have = f"{s.device} has {machine.memory() / 2**30:,.0f}"
    vocabulary = f"the vocabulary of the data is {data.vocab_size:,}, that of {s.model} {s.vocab_size:,}"
    no_compiler = "torch.compile needs a C++ compiler, and on a GPU Triton"
    for wrong, message in [
        (s.batch_size < machine.processes, f"--batch-size: fewer than the {machine.processes} processes"),
        (s.dtype == "bfloat16" and not machine.has_bfloat16, "--dtype: bfloat16 needs a GPU that has it"),
        (s.compile == "on" and s.n_expert, "--compile: the loop over experts is not compiled"),
        (s.compile == "on" and not machine.can_compile(), f"--compile: {no_compiler}"),
        (s.vocab_size < data.vocab_size, vocabulary),
        (shortest <= s.seq_len, f"{data.folder} has a part of {shortest:,} tokens, too few for --seq-len"),
        (need > machine.memory(), f"this needs at least {need / 2**30:,.0f} GiB; {have}"),
    ]:
        if wrong:
            raise UserError(message)


def finished_status(plan, data, args):
    """done or diverged if the run is over, else None. Raises UserError if its folder must not be touched."""
    if args.overwrite:
        return None
    path, config = plan.folder.path, read_config(plan.folder.path)
    if not config:
        return None
    if not args.resume:
        raise UserError(f"{path} holds a run already; --resume continues it, --overwrite starts over")
    for name, field in FIELDS.items():
        here = getattr(plan.settings, name)
        # A run older than a setting lacks it; as the folder names match, both use its default.
        there = config.get(name, here)
        if here != there and name != "data" and not field["detail"]:
            other = f"{path} holds another run: {name} is {there} there and {here} here"
            raise UserError(f"{other}; --overwrite starts over")
    if config.get("data_sha256") != data.sha256:
        raise UserError(f"{path}: the data in {data.folder} has changed since; choose another --out-dir")
    return config.get("status") if config.get("status") in ("done", "diverged") else None


def combinations(args):
    """{name: value} for each run: every combination of the values of the flags that take several."""
    names = [name for name, field in FIELDS.items() if field["several"]]
    values = [dict.fromkeys(getattr(args, name) or [None]) for name in names]  # without duplicates
    return [dict(zip(names, chosen)) for chosen in itertools.product(*values)]


def plans_of(args, data, machine):
    """The Plan of every run of the command. Raises UserError if sizes are incompatible."""
    vocab_size, val_tokens, sha256 = 2048, math.inf, {"train.bin": ""}
    if data:
        vocab_size, val_tokens, sha256 = data.vocab_size, len(data.val), data.sha256
    plans = []
    for values in combinations(args):
        s, non_default = resolve(vars(args) | values, machine, vocab_size, val_tokens)
        if s.d_model % (2 * s.n_head):  # rotary embedding rotates pairs
            raise UserError(f"--n-head: {s.d_model} does not split into {s.n_head} heads of even width")
        flags = {name: getattr(s, name) for name in IN_EVERY_NAME} | non_default
        flags["dtype"] = s.dtype  # whose default depends on the machine
        if args.out_dir != "runs":
            flags["out_dir"] = args.out_dir
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        folder = RunFolder(Path(args.out_dir, folder_name(s, non_default, sha256)), machine)
        plans.append(Plan(s, folder, flags))
    if len({plan.name for plan in plans}) < len(plans):
        raise UserError("--lr: two of these runs would share a folder")
    return plans


def execute(args):
    """Carries out the command; returns the exit code. Wrong settings raise UserError before a run starts."""
    machine = Machine(args.device or "auto")
    if machine.rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # only the first process prints
    built_in = FIELDS["data"]["default"]
    path = Path(args.data or built_in)
    prepared = (path / "meta.json").exists()
    if args.dry_run:
        for plan in plans_of(args, TokenFolder(path) if prepared else None, machine):
            say(describe(plan.settings))
        return 0
    if not prepared and path == Path(built_in) and machine.rank == 0:
        say(f"preparing the built-in text in {path}")
        try:
            prepare_data.prepare("sotu", out_dir=path.parent)
        except (OSError, UserError):
            if not (path / "meta.json").exists():  # else a concurrent command has just prepared it
                raise
    machine.wait_for_all()  # until the data is there
    data = TokenFolder(path)
    plans = plans_of(args, data, machine)
    for plan in plans:
        check(plan.settings, data, machine)
    if args.benchmark:
        benchmark(plans, data, machine, args.out_dir)
        return 0
    if len(plans) > 1 and machine.processes > 1:
        one = "give one value each to --norm-scale, --lr and --seed"
        raise UserError(f"torchrun trains one run at a time: {one}")

    endings = [finished_status(plan, data, args) for plan in plans]
    for plan, ending in zip(plans, endings):
        if ending:
            say(f"{plan.name}: {ending} already")
    remaining = [plan for plan, ending in zip(plans, endings) if not ending]
    if not args.resume:  # before any run starts: an old one must not look like a result of this command
        old = [plan.folder for plan in remaining if plan.folder.path.exists()]
        with ExitStack() as locks:  # take all locks before deleting anything
            for folder in old:
                locks.enter_context(folder.lock())
            for folder in old:
                folder.clear()
    earlier = int("diverged" in endings)
    if not remaining:
        return earlier
    if len(plans) == 1:
        return run(plans[0], data, machine, args.resume)
    # From all runs, not only those that remain, so that a resumed run gets as many threads as before.
    jobs = min(len(plans), args.jobs or (1 if machine.is_gpu else available_cores()))
    return sweep(remaining, jobs, args.resume) or earlier


def available_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv=None):
    STOP.signum = 0
    tune_for_a_cpu()
    prepare_data.use_any_terminal()
    parser = command_line()
    args = parser.parse_args(argv)
    try:
        return execute(args)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or 'writing'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (FloatingPointError, RuntimeError, MemoryError) as error:
        no_memory = re.search("(out of|allocate|not enough) memory", str(error))
        if isinstance(error, RuntimeError) and not no_memory:
            raise
        print(first_line(error), file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    prepare_data.run_as_a_tool(main)
