"""Trains one variant, or every combination of several variants, learning rates and seeds.

    python train.py --norm-scale=none                                 # some minutes on a laptop
    python train.py --norm-scale none standard unified --seed 0 1 2   # nine runs, one process each
    python train.py --model=llama-1b --norm-scale=unified --dry-run   # describes the run, does not start it
    torchrun --standalone --nproc-per-node=2 train.py ...             # the same batch over two processes

Read it from the top: a batch, the optimisers, the learning rate, the loop, evaluation. That is all of
training. One batch of the tiny preset on its way through the model (model.py), and back:

    tokens      (8, 129)         8 sequences cut out of the text, determined by seed and step
    inputs      (8, 128)         all tokens of a row but the last; targets: all but the first
    x           (8, 128, 64)     their embeddings: the residual stream, to which each of four blocks adds
      q, k, v   (8, 128, 64)       three branches of n = Norm(x), each W (gamma * n), as 4 heads of 16
      x         (8, 128, 64)       x + W_o attention(q, k, v)
      gate, up  (8, 128, 170)      two branches of n = Norm(x), of the new x
      x         (8, 128, 64)       x + W_down (silu(gate) * up)
    logits      (8, 128, 2048)   the LM head, a branch of Norm(x), for a vocabulary of 2,048
    loss        ()               mean of -log p(target): first about ln 2048 = 7.6; under dnp, whose Norm
                                 gives logits an RMS of 1, about 8.1
    weights                      moved by the optimiser against the gradient, clipped to a norm of at most 1;
                                 the learning rate is 4e-5 in the first step, 4e-3 after 100, 2e-4 at last

The functions share `settings`, the flags' values; `data`, train.bin and val.bin; `machine`, the device and
this process's rank among those of torchrun; and `folder`, where the run's records go.

All randomness has an address: a first weight comes from the seed and its name, a batch from (seed, step), an
evaluation window from its index. So variants with one seed start from the same matrices and see the same
batches, evaluating more often changes nothing, and an interrupted run goes on as if it had never stopped.
"""

import csv
import ctypes
import importlib.util
import itertools
import json
import math
import os
import platform
import queue
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import prepare_data
from model import PRESETS, Config, Transformer, count, paper_d_ff
from norms import Branch, NormScale, ScaleVector, decay_groups
from prepare_data import CommandLine, TokenFolder, UserError, expanded_path, read_encoding, require

# ---------------------------------------------------------------------------------------------------
# Batches


def batch(data, settings, step, machine):
    """This process's part of the batch for (seed, step): (sequences, T + 1) tokens of train.bin."""
    T = settings.seq_len
    generator = np.random.default_rng((settings.seed, step))
    starts = generator.integers(len(data.train) - T, size=settings.batch_size)
    local_starts = np.array_split(starts, machine.processes)[machine.rank]
    return machine.tensor(np.stack([data.train[start : start + T + 1] for start in local_starts]))


# ---------------------------------------------------------------------------------------------------
# Optimisers


def adamw(groups, settings):
    """m <- 0.9 m + 0.1 g,  v <- 0.95 v + 0.05 g^2,  w <- w - lr (m / (sqrt(v) + 1e-8) + weight_decay w)

    (As m and v start at 0, they are divided by 1 - 0.9^t and 1 - 0.95^t in step t.)
    """
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def muon(groups, settings):
    """m <- 0.95 m + 0.05 g for each matrix; with m = U S V^T, w <- w - lr (c U V^T + weight_decay w)

    With c = 0.2 sqrt(max(rows, columns)) an entry of w moves about as far as under AdamW. (U V^T is taken of
    0.95 m + 0.05 g, Nesterov's momentum, and approximately, by five Newton-Schulz steps.)
    """
    return torch.optim.Muon(groups, lr=settings.lr, momentum=0.95, adjust_lr_fn="match_rms_adamw")


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def make_optimizers(model, settings):
    """Two, at one learning rate: --optimizer for matrices inside the blocks, AdamW for all other weights."""
    matrices, *vectors = decay_groups(model, model.config.norm_scale, settings.weight_decay)
    in_blocks = set(model.blocks.parameters())
    inside = [p for p in matrices["params"] if p in in_blocks]
    outside = [p for p in matrices["params"] if p not in in_blocks]
    blocks = matrices | {"name": "matrices inside the blocks", "params": inside}
    others = [matrices | {"name": "embedding and head", "params": outside}, *vectors]
    held = itertools.chain.from_iterable(group["params"] for group in [blocks, *others])
    assert sorted(map(id, held)) == sorted(map(id, model.parameters())), "each must be in exactly one group"
    return [OPTIMIZERS[settings.optimizer]([blocks], settings), adamw(others, settings)]


# ---------------------------------------------------------------------------------------------------
# The learning rate

COSINE_FLOOR = 1 / 20  # final learning rate, as a fraction of the peak
WSD_DECAY = 0.2  # fraction of the steps, at the end


def cosine(settings, step):
    """Half a wave: 1 up to the end of the warm-up (step warmup_steps), COSINE_FLOOR at the end (step steps)."""
    progress = max(0, step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return COSINE_FLOOR + (1 - COSINE_FLOOR) * (1 + math.cos(math.pi * progress)) / 2


def wsd(settings, step):
    """Warm-up, stable, decay: 1, then linear to 0 over the last WSD_DECAY of the steps."""
    return min(1, (settings.steps - step) / (WSD_DECAY * settings.steps))


SCHEDULES = {"cosine": cosine, "wsd": wsd}


def learning_rate(settings, step):
    """peak * min((step + 1) / warmup, schedule(step)) at step 0, 1, ..."""
    warmup = (step + 1) / max(1, settings.warmup_steps)
    return settings.lr * min(warmup, SCHEDULES[settings.schedule](settings, step))


# ---------------------------------------------------------------------------------------------------
# The loop

BALANCE_LOSS = 1e-3  # coefficient of the load-balancing loss of a mixture of experts


def train(settings, data, machine, folder, checkpoint=None):
    """One run, from its start or from a checkpoint to its last step; every evaluation leaves its files whole.
    Returns the rows of metrics.csv. Raises FloatingPointError if the run diverges."""
    model = Transformer(model_config(settings)).init_weights(settings.seed).to(machine.device)
    optimizers = make_optimizers(model, settings)
    metrics, scales, first_step, seconds = [], [], 0, 0.0  # rows of both tables; steps done, and their time
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        metrics, scales = checkpoint["metrics"], checkpoint["scales"]
        first_step, seconds = metrics[-1]["step"], metrics[-1]["seconds"]
    torch.compiler.reset()  # what earlier runs of this process, as in a notebook, have compiled
    forward = torch.compile(model) if settings.compile == "on" else model
    tokens_per_step = settings.batch_size * settings.seq_len
    losses = []  # of the steps since the last evaluation
    lr = grad_norm = rate = None  # of the last step; tokens per second since the last evaluation

    for step in range(first_step, settings.steps + 1):
        evaluation_is_due = step % settings.eval_every == 0 or step == settings.steps
        is_in_checkpoint = checkpoint is not None and step == first_step
        if evaluation_is_due and not is_in_checkpoint:
            if losses:
                rate = len(losses) * tokens_per_step / (seconds - metrics[-1]["seconds"])
            row = {"step": step, "tokens": step * tokens_per_step, "seconds": seconds, "lr": lr}
            row["train_loss"] = sum(losses) / len(losses) if losses else None
            row["val_loss"] = evaluate(forward, data, settings, machine)
            row |= {"grad_norm": grad_norm, "tokens_per_second": rate}
            row["peak_memory_mb"] = machine.peak_memory_mb()
            losses = []
            metrics.append(row)
            scales.extend(scale_rows(model, step))
            left = f"{seconds / step * (settings.steps - step):,.0f}" if step > 0 else "?"
            progress = f"step {step:,}/{settings.steps:,}: val loss {row['val_loss']:.4f}"
            print(f"{progress}, {left} s left", flush=True)
            require_finite(settings, step, validation_loss=row["val_loss"])
            if machine.rank == 0:
                save(folder, settings, data, model, optimizers, metrics, scales)
        if step == settings.steps:
            return metrics

        # The gradient of the mean loss over the whole batch (all processes), accumulated over micro-batches.
        started = time.perf_counter()
        loss_sum = 0.0
        for micro_batch in batch(data, settings, step, machine).split(settings.micro_batch_size):
            inputs, targets = micro_batch[:, :-1], micro_batch[:, 1:]
            share = len(micro_batch) / settings.batch_size  # weight in the mean over all sequences
            with torch.autocast(machine.kind, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                loss = forward(inputs, targets)
            (share * (loss + BALANCE_LOSS * model.balance_loss())).backward()
            loss_sum += share * loss.detach()
        if machine.processes > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)  # their sum
        train_loss = machine.sum(loss_sum.item())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf).item()
        # A NaN or an infinity stops the run here, before it reaches a weight.
        require_finite(settings, step + 1, loss=train_loss, gradient_norm=grad_norm)

        lr = learning_rate(settings, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        losses.append(train_loss)
        seconds += time.perf_counter() - started


def require_finite(settings, step, **values):
    if not all(map(math.isfinite, values.values())):
        found = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise FloatingPointError(f"diverged at step {step} with --lr={settings.lr:g}: {found}")


# ---------------------------------------------------------------------------------------------------
# Evaluation, and what a run records


@torch.no_grad()
def evaluate(forward, data, settings, machine):
    """The mean language loss in nats per token over the first eval_tokens of val.bin, in windows of T."""
    T = settings.seq_len
    windows = settings.eval_tokens // T
    rows = max(settings.micro_batch_size, math.ceil(1024 / T))  # at once, for one process
    loss_sum = 0.0
    for first in range(machine.rank * rows, windows, machine.processes * rows):
        indices = range(first, min(first + rows, windows))
        tokens = machine.tensor(np.stack([data.val[T * i : T * i + T + 1] for i in indices]))
        with torch.autocast(machine.kind, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            loss_sum += len(indices) * forward(tokens[:, :-1], tokens[:, 1:]).item()
    return machine.sum(loss_sum) / windows


SCALES = ("step", "kind", "name", "min", "mean", "max", "norm")


def scale_rows(model, step):
    """Rows of scales.csv: statistics of every vector's gamma, the norm of every branch's weight."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, ScaleVector):
            gamma = module().detach()
            statistics = torch.stack([gamma.min(), gamma.mean(), gamma.max(), gamma.norm()]).tolist()
            rows.append(dict(zip(SCALES, (step, "scale", name, *statistics))))
        if isinstance(module, Branch):
            norm = module.W.detach().norm().item()
            rows.append(dict(zip(SCALES, (step, "weight", f"{name}.W", None, None, None, norm))))
    return rows


# ---------------------------------------------------------------------------------------------------
# A first reading can end here.
#
# The run folder. Nothing is done about interruptions, all are survived: each file is replaced as a whole, and
# the checkpoint holds the rows of the tables, so that these go on from where the weights do.


@contextmanager
def replacing(path):
    """A temporary path, for what is to be at `path`; it moves there when it is complete."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield part
    os.replace(part, path)


def save(folder, settings, data, model, optimizers, metrics, scales):
    """Writes the tables, then checkpoint.pt: all that resuming (with the data) and `load` need."""
    for name, rows in (("metrics.csv", metrics), ("scales.csv", scales)):
        with replacing(folder / name) as part, open(part, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    checkpoint = {"settings": vars(settings), "tokenizer": data.meta["tokenizer"]}
    checkpoint |= {"metrics": metrics, "scales": scales, "model": model.state_dict()}
    checkpoint["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    with replacing(folder / "checkpoint.pt") as part:
        torch.save(checkpoint, part)


def read_checkpoint(folder):
    """What `save` wrote, None if there is nothing. Raises UserError if it cannot be loaded."""
    path = folder / "checkpoint.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    except Exception as error:  # of many types, for a damaged or foreign file
        raise UserError(f"{path} cannot be loaded: {error!r}") from None


def load(folder):
    """(model, tokenizer) of a run: a Transformer in float32 on the CPU, and a tiktoken.Encoding. All that it
    needs are checkpoint.pt and tokenizer.tiktoken, in any folder. Raises UserError without them."""
    checkpoint, file = read_checkpoint(Path(folder)), Path(folder, "tokenizer.tiktoken")
    require(checkpoint and file.is_file(), f"{folder} lacks checkpoint.pt or tokenizer.tiktoken")
    model = Transformer(model_config(SimpleNamespace(**checkpoint["settings"])))
    model.load_state_dict(checkpoint["model"])
    return model, read_encoding(file.read_bytes(), checkpoint["tokenizer"], model.config.vocab_size)


def read_config(folder):
    """The contents of config.json, {} if there is none. Raises UserError if train.py has not written it."""
    path, config = folder / "config.json", {}
    if path.exists():
        with suppress(ValueError, TypeError):
            config = dict(json.loads(path.read_text(encoding="utf-8")))
        require({"norm_scale", "data_sha256"} <= config.keys(), f"{path} is not the record of a run")
    return config


# ---------------------------------------------------------------------------------------------------
# Settings: each is declared once, as a row of SETTINGS. Its flag and help, its place in config.json and in
# the folder's name, and the check of --resume follow from that.

PRESET, RULE = "the preset's", "see `resolve`"
SETTINGS = [  # name, type or choices, default, help
    ("model", list(PRESETS), "tiny", "preset of sizes and settings"),
    ("norm_scale", str, "standard", "scale vectors: the variant, see norms.py"),
    ("optimizer", list(OPTIMIZERS), "adamw", "of the matrices inside the blocks"),
    ("schedule", list(SCHEDULES), "cosine", "cosine, or constant and then linear to 0"),
    ("lr", float, PRESET, "peak learning rate"),
    ("seed", int, 0, "for weights and batches"),
    ("batch_size", int, PRESET, "sequences per step, over all processes"),
    ("seq_len", int, PRESET, "tokens per sequence"),
    ("steps", int, PRESET, "optimiser steps"),
    ("d_model", int, PRESET, "width"),
    ("n_layer", int, PRESET, "layers"),
    ("n_head", int, PRESET, "attention heads"),
    ("d_ff", int, RULE, "hidden width of the FFN"),
    ("weight_decay", float, 0.1, "of matrices and of --norm-scale's vectors"),
    ("grad_clip", float, 1.0, "maximum gradient norm; 0: no clipping"),
    ("warmup_steps", int, RULE, "steps to the peak"),
    ("data", expanded_path, "data/sotu", "folder made by prepare_data.py"),
    ("eval_every", int, PRESET, "steps between evaluations, each with a checkpoint"),
    ("eval_tokens", int, PRESET, "tokens to evaluate, from the start of val.bin"),
    ("dtype", ["float32", "bfloat16"], RULE, "of matrix products"),
    ("device", ["cpu", "cuda", "mps"], RULE, "where to train"),
    ("compile", ["on", "off"], RULE, "torch.compile"),
    ("micro_batch_size", int, RULE, "sequences at once"),
]
SEVERAL = ("norm_scale", "lr", "seed")  # their flags take several values, one run for each combination
MAY_BE_ZERO = ("seed", "weight_decay", "grad_clip", "warmup_steps")
IN_EVERY_NAME = ("model", "norm_scale", "optimizer", "schedule", "lr", "seed")  # of a run folder
DETAILS = ("device", "compile", "micro_batch_size")  # they change losses by rounding alone
ANY_DATA = SimpleNamespace(folder="", vocab_size=2048, sha256={"train.bin": ""})  # for a dry run
ANY_DATA.train = ANY_DATA.val = range(10**15)


def resolve(given, machine, data):
    """All settings of one run, given its flags as {name: value}, and those that are `changed`: not the value
    of a rule below, the preset or the table. (IN_EVERY_NAME and DETAILS are not among these.)"""
    preset = PRESETS[given.get("model", "tiny")]
    defaults = {name: default for name, _, default, _ in SETTINGS}
    defaults |= {"gemma": False, "n_expert": 0, "top_k": 0, "vocab_size": data.vocab_size}  # without a flag
    defaults |= {name: value for name, value in preset.items() if name in defaults}
    s = SimpleNamespace(**defaults | given)
    rates = (f"lr_{s.optimizer}", f"lr_{s.schedule}", "lr")  # the paper has others in places
    compiles = machine.kind == "cuda" and importlib.util.find_spec("triton") and not s.n_expert
    share = math.ceil(s.batch_size / machine.processes)  # of a batch, for one process
    at_once = preset.get("tokens_at_once", 10**9) // s.seq_len
    rules = {
        "lr": next(preset[name] for name in rates if name in preset),
        "d_ff": paper_d_ff(s.d_model),
        "warmup_steps": min(max(10, s.steps // 20), s.steps // 2),
        "dtype": "bfloat16" if machine.has_bfloat16 else "float32",
        "device": machine.kind,
        "compile": "on" if compiles else "off",
        "micro_batch_size": max(1, min(at_once, share)),
    }
    settings = SimpleNamespace(**defaults | rules | given)
    windows = max(1, min(s.eval_tokens, len(data.val) - 1) // s.seq_len)
    settings.eval_tokens = windows * s.seq_len  # what is evaluated
    usual = defaults | rules | {"dtype": "float32"}  # on any machine: folders of several can be put together
    changed = {}
    for name, value in {**given, "dtype": settings.dtype}.items():
        if value != usual[name] and name not in IN_EVERY_NAME + DETAILS:
            changed[name] = getattr(settings, name)
    return settings, changed


def model_config(settings):
    """The model Config for these settings. A field that they lack, as they are older, has its default."""
    sizes = {name: value for name, value in vars(settings).items() if name in Config.__dataclass_fields__}
    return Config(**sizes | {"norm_scale": NormScale.parse(settings.norm_scale)})


# ---------------------------------------------------------------------------------------------------
# The machine


class Machine:
    """The device that a run trains on, and this process's `rank` among torchrun's `processes`."""

    runs = 0  # that this process has begun

    def __init__(self, kind=None):
        # glibc returns the memory of every large tensor to the kernel when it is freed and faults it back in
        # page by page: a seventh of the time of a tiny step. With these two thresholds it keeps up to 1 GiB.
        with suppress(OSError, AttributeError):  # without glibc, nothing happens
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        # Muon multiplies in bfloat16. A CPU has AMX instructions for that, which some virtual machines report
        # and do not permit: the process would die.
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
        self.rank, self.processes, local_rank, local_processes = 0, 1, 0, 1
        if dist.is_torchelastic_launched():  # without torchrun a stray RANK or WORLD_SIZE means nothing
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            self.rank, self.processes, local_rank, local_processes = (int(os.environ[name]) for name in names)
        found = {"cpu": math.inf, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
        self.kind = kind or ("cuda" if found["cuda"] else "cpu")
        require(found[self.kind] >= local_processes, f"--device={self.kind}: torch finds {found[self.kind]}")
        self.device, self.has_bfloat16 = torch.device(self.kind), False
        self.name = platform.processor() or platform.machine()
        if self.kind == "cuda":
            torch.cuda.set_device(local_rank)
            self.has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.name = torch.cuda.get_device_name()
            torch.cuda.reset_peak_memory_stats()  # of earlier runs of this process
        if self.processes > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.kind == "cuda" else "gloo")

    def peak_memory_mb(self):
        """The run's peak in 2^20 bytes, on a CPU its process's; None where it is not known, as on Windows."""
        if self.kind == "cuda":
            return round(torch.cuda.max_memory_allocated() / 2**20)
        if Machine.runs > 1 or sys.platform == "win32":  # the peak may be that of an earlier run
            return None
        resource = importlib.import_module("resource")  # not on Windows
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)

    def tensor(self, array):
        """An array of tokens, as int64 on the device."""
        return torch.from_numpy(array.astype(np.int64)).to(self.device)

    def sum(self, value):
        """A number summed over all processes."""
        if self.processes == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def wait(self):
        """Returns when all processes are here."""
        self.sum(0)


# ---------------------------------------------------------------------------------------------------
# One run, several runs, the command

SOURCES = ("train.py", "model.py", "norms.py", "prepare_data.py")
PROGRAM = {name: prepare_data.sha256_of(Path(__file__).with_name(name)) for name in SOURCES}  # as loaded


def run(plan, data, machine, command, resume):
    """Trains one run and records it; after an interruption config.json still says "running"."""
    Machine.runs += 1
    settings, folder = plan.settings, plan.folder
    checkpoint = read_checkpoint(folder) if resume else None
    config = read_config(folder) if resume else {}
    if config:
        step = checkpoint["metrics"][-1]["step"] if checkpoint else 0
        config.setdefault("resumed", []).append({"step": step, **provenance(machine, command)})
    else:
        config = {**provenance(machine, command), **vars(settings), "changed": plan.changed}
        config |= {"data_sha256": data.sha256, "bytes_per_token": data.meta["bytes_per_token"]}
        config |= count(model_config(settings))

    def record(status, reason=None):
        if machine.rank == 0:
            with replacing(folder / "config.json") as part:
                part.write_text(json.dumps({**config, "status": status, "reason": reason}, indent=2) + "\n")

    print(describe(settings), flush=True)
    if machine.rank == 0:
        folder.mkdir(parents=True, exist_ok=resume)  # fails if another command has just begun this run
        with replacing(folder / "tokenizer.tiktoken") as part:
            part.write_bytes(data.tokenizer_file)
    record("running")
    try:
        metrics = train(settings, data, machine, folder, checkpoint)
    except Exception as error:
        diverged = isinstance(error, FloatingPointError)
        record("diverged" if diverged else "failed", str(error) or type(error).__name__)
        raise
    record("done")
    if machine.rank == 0:
        print(summary(metrics[-1], data, folder))


def provenance(machine, command):
    """What a run is trained by, from its start or from a resumption on."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):  # without git, or without its repository
        commit = subprocess.check_output(git, text=True, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    source = {"command": command, "git_commit": commit and commit.strip(), "program": PROGRAM}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    hardware = {"device_name": machine.name, "processes": machine.processes}
    return {**source, **versions, **hardware, "threads": torch.get_num_threads()}


def describe(settings):
    """The variant, its parameters, the optimisers' groups with their weight decay, the steps, and memory."""
    s, config = settings, model_config(settings)
    counts = count(config)
    numbers = "  {parameters:,} parameters, {activated_parameters:,} a token, {scale_parameters:,} in vectors"
    lines = [
        f"{s.model}, --norm-scale={s.norm_scale}: {config.norm_scale.equation}",
        numbers.format(**counts),
    ]
    with torch.device("meta"):
        blocks, others = make_optimizers(Transformer(config), s)
    for group in blocks.param_groups + others.param_groups:
        size = f"{sum(p.numel() for p in group['params']):,} in {len(group['params'])} tensors"
        lines.append(f"  {group['name']}: {size}, weight decay {group['weight_decay']:g}")
    # In float32: each weight with its gradient and its moments, each logit with its gradient.
    logits = s.micro_batch_size * s.seq_len * s.vocab_size
    memory = (16 if s.optimizer == "adamw" else 12) * counts["parameters"] + 8 * logits
    lines.append(f"{s.steps:,} steps of {s.batch_size} x {s.seq_len} tokens, lr {s.lr:g}, seed {s.seed}")
    lines.append(f"{s.optimizer}, {s.schedule}, {s.device}, {s.dtype}, at least {memory / 2**20:,.0f} MiB")
    return "\n".join(lines)


def summary(row, data, folder):
    """The final message of a run: a text from its model, and its loss."""
    model, tokenizer = load(folder)
    start = torch.from_numpy(data.val[None, :8].astype(np.int64))
    text = tokenizer.decode(model.generate(start, 48, torch.Generator().manual_seed(0))[0].tolist())
    bits = row["val_loss"] / math.log(2) / data.meta["bytes_per_token"]
    loss = f"{folder}: val loss {row['val_loss']:.4f} nats per token, {bits:.3f} bits per byte"
    return f"a text from this model: {text!r}\n{loss}, {row['seconds']:,.0f} s of training"


def sweep(plans, jobs):
    """Each run in its own process, so that none touches another; `jobs` at a time. Returns the exit code."""
    threads = max(1, torch.get_num_threads() // jobs)  # for each run, of this command's
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    lines = queue.Queue()

    def run_one(plan):
        process = subprocess.Popen([sys.executable, __file__, *plan.flags], env=environment, **pipe)
        for line in process.stdout:
            lines.put(f"{plan.folder.name}: {line.rstrip()}")
        if process.wait() != 0:
            lines.put(
                f"{plan.folder.name}: exit code {process.returncode} (where it did not diverge, --resume)"
            )
        return process.returncode

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_one, plan) for plan in plans]
        try:
            # This thread prints, as a notebook loses what others do; the time-out lets Windows see Ctrl-C.
            while not (all(future.done() for future in futures) and lines.empty()):
                with suppress(queue.Empty):
                    print(lines.get(timeout=0.2), flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C reaches those under way by itself
            raise
    return int(any(future.result() for future in futures))


def command_line():
    parser = CommandLine("train.py", description="Trains a Llama with the scale vectors of --norm-scale.")
    flag = parser.add_argument
    for name, kind, default, words in SETTINGS:
        options = {"choices": kind} if isinstance(kind, list) else {"type": kind}
        if name in SEVERAL:
            options |= {"nargs": "+", "metavar": "VALUE", "action": "extend"}
        flag(f"--{name.replace('_', '-')}", help=f"{words} (default: {default})", **options)
    flag("--out-dir", type=expanded_path, default="runs", help="folder of the run folders (default: runs)")
    flag("--jobs", type=int, help="runs at once (default: one per core; on a GPU, one)")
    flag("--resume", action="store_true", help="continue runs, start missing ones, pass over ended ones")
    flag("--overwrite", action="store_true", help="replace runs that exist already")
    flag("--dry-run", action="store_true", help="describe the runs; needs no data, allocates nothing")
    return parser


def make_plans(args, data, machine):
    """The plan of every run of the command. Raises UserError for settings that do not go together."""
    flags = {name: getattr(args, name) for name, *_ in SETTINGS if getattr(args, name) is not None}
    try:
        flags["norm_scale"] = [NormScale.parse(text).label for text in flags.get("norm_scale", ["standard"])]
    except ValueError as error:
        raise UserError(f"--norm-scale: {error}") from None
    several = {name: dict.fromkeys(flags[name]) for name in SEVERAL if name in flags}
    runs = [flags | dict(zip(several, values)) for values in itertools.product(*several.values())]
    require(
        len(runs) == 1 or machine.processes == 1, "torchrun trains one run: one --norm-scale, --lr, --seed"
    )
    return [plan_of(given, args, data, machine) for given in runs]


def plan_of(given, args, data, machine):
    """The plan of one run with these flags: settings, folder, and the command line that trains it alone."""
    for name, value in given.items():
        fits = isinstance(value, str) or 0 < value < math.inf or (value == 0 and name in MAY_BE_ZERO)
        require(fits, f"--{name.replace('_', '-')}: {value} is too small or too large")
    s, changed = resolve(given, machine, data)
    require(s.d_model % (2 * s.n_head) == 0, f"--n-head: {s.d_model} is not {s.n_head} heads of even width")
    require(s.warmup_steps < s.steps, f"--warmup-steps: as many as all {s.steps} steps")
    require(s.batch_size >= machine.processes, f"--batch-size: fewer than the {machine.processes} processes")
    require(s.dtype == "float32" or machine.has_bfloat16, "--dtype: bfloat16 needs a GPU that has it")
    require(s.compile == "off" or not s.n_expert, "--compile: the loop over experts is not compiled")
    require(s.seq_len < min(len(data.train), len(data.val)), f"--seq-len: a part of {data.folder} is shorter")
    require(
        s.vocab_size >= data.vocab_size, f"{s.model} has {s.vocab_size:,} tokens, data {data.vocab_size:,}"
    )
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    words += [f"--out-dir={args.out_dir}"] + ["--resume"] * args.resume
    name = "{model}-{norm_scale}-{optimizer}-{schedule}-lr{lr}-seed{seed}".format(**vars(s))
    for setting, value in changed.items():
        if setting == "data":  # folders of two texts can have the same name
            value = f"{Path(value).name}_{data.sha256['train.bin'][:6]}"
        name += f"-{setting}{value}"
    return SimpleNamespace(settings=s, changed=changed, folder=Path(args.out_dir, name), flags=words)


def status_of(plan, data, args):
    """That of a run to be resumed, else "". Raises UserError for a folder that must stay as it is."""
    folder, config = plan.folder, read_config(plan.folder)
    if not args.resume:
        free = not folder.exists() or (config and args.overwrite)
        require(free, f"{folder} exists: --resume continues a run, --overwrite replaces one")
        return ""
    here = {**vars(plan.settings), "data_sha256": data.sha256}
    for name in here.keys() - {"data", *DETAILS}:
        there = config.get(name, here[name])  # a run that is older than a setting has its default
        require(there == here[name], f"{folder}: another run, {name} is {there} there and {here[name]} here")
    for name, sha256 in config.get("program", {}).items():
        if sha256 != PROGRAM.get(name):
            print(f"{folder} is of a program with another {name}", file=sys.stderr)
    return config.get("status", "")


def execute(args, command):
    """Carries out the command; returns the exit code. Wrong settings raise UserError before a run starts."""
    require(not (args.resume and args.overwrite), "--resume or --overwrite, not both")
    machine = Machine(args.device)
    if machine.rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # only the first process prints
    if args.dry_run:
        data = TokenFolder(args.data) if args.data else ANY_DATA
        print("\n\n".join(describe(plan.settings) for plan in make_plans(args, data, machine)))
        return 0
    folder = Path(args.data or "data/sotu")
    if not args.data and machine.rank == 0 and not folder.exists():
        print(f"preparing the built-in text in {folder}", flush=True)
        prepare_data.prepare("sotu", out_dir=folder.parent)
    machine.wait()  # until the data is there
    data = TokenFolder(folder)
    plans = make_plans(args, data, machine)
    statuses = {plan.folder: status_of(plan, data, args) for plan in plans}
    remaining = [plan for plan in plans if statuses[plan.folder] not in ("done", "diverged")]
    machine.wait()  # until all processes have looked at the folders
    for plan in plans:
        if plan not in remaining:
            print(f"{plan.folder}: {statuses[plan.folder]} already")
        elif args.overwrite and machine.rank == 0 and plan.folder.exists():
            shutil.rmtree(plan.folder)  # all before the first run, which may be interrupted
    code = int("diverged" in statuses.values())
    if len(plans) == 1 and remaining:
        run(plans[0], data, machine, command, args.resume)
    elif remaining:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # Of all runs, not only of those that remain, so that a resumed run has as many threads as before.
        jobs = min(len(plans), args.jobs or (1 if machine.kind == "cuda" else cores))
        code = sweep(remaining, jobs) or code
    machine.wait()  # the processes of torchrun leave together
    return code


def main(argv=None):
    parser = command_line()
    args = parser.parse_args(argv)
    command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        return execute(args, command)
    except (UserError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; with --resume the same command goes on from the last evaluation", file=sys.stderr)
        return 130
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        too_large = isinstance(error, torch.OutOfMemoryError)
        print(error, "Try a smaller --micro-batch-size." if too_large else "", file=sys.stderr)
        return 1


if __name__ == "__main__":
    code = main()
    print(end="", flush=True)
    leave = os._exit if dist.is_initialized() else sys.exit  # a thread of gloo may abort an ordinary exit
    leave(code)
