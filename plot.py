"""Run folders to pictures, and a table on the terminal.

    python plot.py                  # runs/ -> loss.png: loss against tokens, and relative to `standard`
    python plot.py --kind=weights   # the paper's figure 4: norms of W_Q, W_K, W_V; and how the scale vectors move
    python plot.py --kind=scaling   # its figures 6 and 7: L(C) = E + a C^-b of two variants, the gain at equal loss
    python plot.py --kind=theory    # its theorems, integrated; needs no run

A run is a folder with config.json and metrics.csv, as train.py leaves it. Differences between variants
are taken seed by seed: equal first weights and equal batches remove most of the noise between seeds.
"""

import argparse
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from statistics import fmean, median, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

# ---------------------------------------------------------------------------------------------------
# Runs

WORDS = ("norm_scale", "model", "optimizer", "schedule", "data", "dtype")
SIZES = ("steps", "batch_size", "seq_len", "d_model", "n_layer", "n_head", "d_ff", "weight_decay", "grad_clip",
         "warmup_steps", "vocab_size", "eval_tokens")  # fmt: skip
SAME_LOSS = ("data", "vocab_size", "seq_len", "eval_tokens")  # without these equal, losses are not of the same thing
SETTINGS = WORDS + SIZES  # runs that differ in one of these are different curves
NEEDED = {
    **dict.fromkeys((*WORDS, "status"), (str, "a word")),
    **dict.fromkeys((*SIZES, "seed", "lr", "parameters", "activated_parameters"), ((int, float), "a number")),
    "data_sha256": ((dict, str), "hashes"),
}


@dataclass(eq=False)
class Run:
    """One run folder: config.json, and from metrics.csv the validation loss by the tokens seen so far."""

    folder: Path
    config: dict
    loss: dict  # tokens -> nats a token, nan where not finite
    speed: float  # median tokens a second
    step: int  # the last one evaluated

    @property
    def final(self):
        return list(self.loss.values())[-1]

    @property
    def state(self):
        """done, diverged, failed or unfinished."""
        status = self.config["status"]
        if status in ("diverged", "failed"):
            return status
        if status != "done" or self.step < self.config["steps"]:
            return "unfinished"
        return "done" if math.isfinite(self.final) else "diverged"


def read_table(path, columns):
    """The named columns of a CSV file, each a list of text, without a last line that was cut off while written."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    header, *rows = [line.split(",") for line in lines] or [columns]
    if missing := [column for column in columns if column not in header]:
        raise ValueError(f"{path.name} has no column {missing[0]}")
    if rows and len(rows[-1]) < len(header):
        rows.pop()
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"{path.name} has {len(row)} fields in line {number}, not {len(header)}")
    return [[row[header.index(column)] for row in rows] for column in columns]


def floats(column):
    return [float(text or "nan") for text in column]


def read_run(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, (kind, words) in NEEDED.items():
        if not isinstance(config, dict) or key not in config:
            raise ValueError(f"config.json has no {key}")
        if not isinstance(config[key], kind):
            raise ValueError(f"config.json: {key} is {config[key]!r}, not {words}")
    config["data_sha256"] = " ".join(re.findall("[0-9a-f]{64}", str(config["data_sha256"])))  # of train.bin and val.bin
    columns = read_table(folder / "metrics.csv", ["step", "tokens", "val_loss", "tokens_per_second"])
    step, tokens, loss, speed = map(floats, columns)
    if not all(map(math.isfinite, step + tokens)):
        raise ValueError("metrics.csv: a step or tokens is not a finite number")
    loss = {t: value if math.isfinite(value) else math.nan for t, value in zip(tokens, loss)}
    speed = median([s for s in speed if math.isfinite(s)] or [math.nan])  # the first evaluation has none
    return Run(folder, config, loss, speed, int(step[-1]) if step else 0)


def read_runs(folders):
    """All runs below the folders; those without an evaluation are named on the terminal and left out."""
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        found |= {config.parent.resolve(): config.parent for config in sorted(folder.rglob("config.json"))}
    runs = []
    for folder in found.values():
        if (folder / "metrics.csv").is_file():
            try:
                runs.append(read_run(folder))
            except (ValueError, OSError, RecursionError) as mistake:
                raise ValueError(f"{folder}: {mistake}") from None
    if empty := [str(run.folder) for run in runs if not run.loss]:
        print("no evaluation yet:", ", ".join(empty))
    if len(runs) == len(empty):
        raise ValueError(f"no run with an evaluation in {', '.join(map(str, folders))}; train.py makes one")
    return [run for run in runs if run.loss]


# ---------------------------------------------------------------------------------------------------
# Curves: runs that differ in seed and learning rate alone. `runs` is {seed: Run} at one learning rate


def done(runs):
    return {seed: run for seed, run in runs.items() if run.state == "done"}


def mean_final(runs):
    return fmean([run.final for run in done(runs).values()] or [math.nan])


def broken(runs):
    return [run for run in runs.values() if run.state in ("diverged", "failed")]


@dataclass(eq=False)
class Curve:
    key: tuple  # the values of SETTINGS, the data by its hash
    rates: dict  # lr -> {seed: Run}
    label: str = ""
    base: "Curve | None" = None  # what it is compared with: itself if it is a baseline

    @property
    def config(self):
        return next(run.config for runs in self.rates.values() for run in runs.values())

    def best_lr(self):
        """Lowest mean final loss; a rate at which a run diverged, or none has finished, comes after the others."""
        return self._first(lambda runs: (len(broken(runs)) > 0, not done(runs), mean_final(runs)))

    def common_lr(self):
        """Most finished seeds, then lowest mean final loss: where a baseline is compared with the others."""
        return self._first(lambda runs: (-len(done(runs)), mean_final(runs)))

    def _first(self, rank):
        return min(self.rates, key=lambda lr: rank(self.rates[lr]))


def make_curves(runs, baseline):
    curves = {}
    for run in runs:
        key = tuple(run.config["data_sha256" if name == "data" else name] for name in SETTINGS)
        seeds = curves.setdefault(key, Curve(key, {})).rates.setdefault(run.config["lr"], {})
        if twin := seeds.get(run.config["seed"]):
            raise ValueError(f"{twin.folder} and {run.folder} have the same settings and the same seed")
        seeds[run.config["seed"]] = run
    curves = list(curves.values())
    name_curves(curves)
    find_bases(curves, baseline)
    return sorted(curves, key=lambda c: (c.base is not c, c.key[0] not in ("none", "unified"), c.label))


def name_curves(curves):
    """norm_scale, then the settings that differ, where a curve's is not the one that most have.

    A size that follows from a setting already named (warmup_steps from steps, d_ff from d_model) stays unnamed.
    """
    named = []
    for i, name in list(enumerate(SETTINGS))[1:]:
        count = Counter(curve.key[i] for curve in curves)
        follows = any(len({(c.key[j], c.key[i]) for c in curves}) == len({c.key[j] for c in curves}) for j, _ in named)
        if len(count) > 1 and not (name in SIZES and follows):
            named.append((i, next((value for value, n in count.items() if 2 * n > len(curves)), None)))
    for curve in curves:
        parts = [curve.key[0]]
        for i, usual in named:
            name, value = SETTINGS[i], curve.config[SETTINGS[i]]
            if curve.key[i] != usual:
                value = PureWindowsPath(value).name if name == "data" else value
                parts.append(value if name in WORDS else f"{name} {value}")
        curve.label = ", ".join(parts)
    for label, n in Counter(curve.label for curve in curves).items():
        for curve in curves:
            if n > 1 and curve.label == label:  # data prepared twice under one name
                curve.label += f" {curve.config['data_sha256'][:8]}"


def find_bases(curves, baseline):
    """curve.base: the baseline that differs in norm_scale alone, else the only one of the same model, optimizer,
    schedule, steps and text. A baseline that no variant goes with, as a control with a wider d_ff, has another as base."""
    bases = {curve.key[1:]: curve for curve in curves if curve.key[0] == baseline}
    paired = {curve.key[1:] for curve in curves if curve.key[0] != baseline}
    alike = [SETTINGS.index(name) for name in ("model", "optimizer", "schedule", "steps", *SAME_LOSS)]
    for curve in curves:
        curve.base = bases.get(curve.key[1:])
        if curve.base is None or (curve.base is curve and curve.key[1:] not in paired):
            near = [b for b in bases.values() if b is not curve and all(b.key[i] == curve.key[i] for i in alike)]
            near = [b for b in near if b.key[1:] in paired] or (near if curve.base is None else [])
            curve.base = near[0] if len(near) == 1 else curve.base


# ---------------------------------------------------------------------------------------------------
# Loss: a table, and a picture as the paper's figure 1


@dataclass(eq=False)
class Entry:
    """A curve at one learning rate, beside its baseline at the baseline's."""

    curve: Curve
    lr: float
    runs: dict
    base_runs: dict | None  # None for a baseline itself, and where there is none

    def differences(self):
        """Final loss minus the baseline's, one a seed that both have finished."""
        mine, theirs = done(self.runs), done(self.base_runs or {})
        return [mine[seed].final - theirs[seed].final for seed in sorted(mine.keys() & theirs.keys())]

    def breakdown(self):
        """ "1 of 3 diverged at step 500", or nothing."""
        runs = broken(self.runs)
        what = sorted({f"{run.state} at step {run.step}" for run in runs})
        return f"{len(runs)} of {len(self.runs)} {', '.join(what)}" if runs else ""


def entries(curves, best):
    """Each curve at its own best rate, or at its baseline's common one; largest loss over the baseline first."""
    chosen = []
    for curve in curves:
        base = curve.base or curve
        lr, base_lr = (curve.best_lr(), base.best_lr()) if best else (base.common_lr(), base.common_lr())
        if lr in curve.rates:
            chosen.append(Entry(curve, lr, curve.rates[lr], None if base is curve else base.rates[base_lr]))
    height = {entry: fmean(entry.differences() or [0.0]) for entry in chosen}
    return sorted(chosen, key=lambda entry: (entry.curve.base is None, -height[entry], -mean_final(entry.runs)))


def print_table(chosen, baseline):
    rows = [("variant", "lr", "seeds", "loss", f"minus {baseline}", "", "speed", "parameters", "")]
    for entry in chosen:
        differences, final = entry.differences(), mean_final(entry.runs)
        error = f"{stdev(differences) / math.sqrt(len(differences)):.4f}" if len(differences) > 1 else "-"
        pair = entry.runs, entry.base_runs or entry.runs
        speed, base_speed = (median(run.speed for run in runs.values()) for runs in pair)
        reasons = {" ".join(str(run.config.get("reason") or "no reason given").split()) for run in broken(entry.runs)}
        rows.append((
            entry.curve.label,
            f"{entry.lr:g}",
            str(len(done(entry.runs))),
            f"{final:.4f}" if final == final else "-",
            f"{fmean(differences):+.4f} +- {error:6}" if differences else "",
            f"{sum(d < 0 for d in differences)}/{len(differences)} lower" if differences else "",
            f"{speed / base_speed:.2f}x" if entry.curve.base and base_speed > 0 else "-",
            f"{entry.curve.config['parameters']:,}",
            f"{entry.breakdown()}: {'; '.join(sorted(reasons))}" if reasons else "",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    for label, *cells, note in rows:
        print("  ".join([label.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), note]).rstrip())


DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2))]


def looks(curves):
    """{curve: line style}: baselines black squares, the others in Okabe and Ito's colours, which all eyes tell apart,
    and each with a marker of its own, for print in grey."""
    okabe_ito = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    styles = {}
    for is_base, colours, markers in ((True, ["black"], "s"), (False, okabe_ito, "oD^vPX*dp<>h")):
        for i, curve in enumerate(curve for curve in curves if (curve.base is curve) == is_base):
            styles[curve] = dict(color=colours[i % len(colours)], linestyle=DASHES[i // len(colours) % len(DASHES)],
                                 marker=markers[i % len(markers)], linewidth=1.8, markersize=4.5)  # fmt: skip
    return styles


def legend(place, styles, texts, **where):
    """texts {curve: text} beside their lines, on an axis or a figure."""
    lines = [Line2D([], [], **styles[curve]) for curve in texts]
    place.legend(lines, map(plain, texts.values()), handlelength=3, **where)


def plain(text):
    return text.replace("$", r"\$")  # matplotlib takes $ for a formula


def draw_losses(axis, chosen, styles, relative):
    """Means over finished seeds, single seeds faint; relative: minus the baseline's run of the same seed."""
    late = []  # (tokens, value) that decide the limits: the fall from ln(vocabulary) would flatten all the rest
    for entry in chosen:
        lines, finished = [], []
        for seed, run in entry.runs.items():
            bases = entry.base_runs or (entry.runs if entry.curve.base else {})
            if other := bases.get(seed) if relative else run:
                lines.append({t: v - relative * other.loss[t] for t, v in run.loss.items() if t in other.loss})
                finished += [lines[-1]] if run.state == other.state == "done" else []
        finished = finished or lines
        style, tokens = styles[entry.curve], sorted(set(finished[0]).intersection(*finished)) if finished else []
        for line in lines:
            axis.plot(line.keys(), line.values(), color=style["color"], linewidth=0.8, alpha=min(0.5, 2 / len(chosen)))
        mean = [fmean(line[t] for line in finished) for t in tokens]
        axis.plot(tokens, mean, **style, markevery=max(1, len(tokens) // 10))
        late += [(t, v) for line in finished for t, v in line.items() if t >= max(line) / 3 and math.isfinite(v)]
    if late:
        low, high = min(v for _, v in late), max(v for _, v in late)
        axis.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
        axis.set_xlim(left=None if relative else 0.9 * min(late)[0])
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set(xlabel="tokens", ylabel="difference, nats a token" if relative else "validation loss, nats a token")


def loss(curves, args):
    several = any(len({*curve.rates, *(curve.base or curve).rates}) > 1 for curve in curves)
    compared = any(curve.base not in (None, curve) for curve in curves)
    styles = looks(curves)
    size = (7 + 5 * compared, 4.2 * (1 + several))
    figure, grid = plt.subplots(1 + several, 1 + compared, figsize=size, squeeze=False)
    for best, axes in zip((False, True), grid):
        chosen = entries(curves, best)
        rates = {entry.lr for entry in chosen}
        where = "each at its own best lr" if best else f"lr {min(rates):g}" if len(rates) == 1 else "lr of the baseline"
        print(f"{where}:")
        print_table(chosen, args.baseline)
        for axis, relative in zip(axes, (False, True)):
            draw_losses(axis, chosen, styles, relative)
            axis.set_title(f"relative to {args.baseline}, {where}" if relative else where)
        texts = {}
        for entry in chosen:
            text = entry.curve.label + (f", lr {entry.lr:g}" if len(rates) > 1 else "")
            if differences := entry.differences():
                text += f" ({fmean(differences):+.3f})".replace("-", "\N{MINUS SIGN}")
            texts[entry.curve] = f"{text}\n{entry.breakdown()}".strip()
        legend(axes[-1], styles, texts, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for curve in curves if several else []:
        by_rate = (f"{lr:g} {mean_final(curve.rates[lr]):.4f}" for lr in sorted(curve.rates))
        print(f"{curve.label}, loss by lr: {', '.join(by_rate)}")
    runs = [run for curve in curves for runs in curve.rates.values() for run in runs.values()]
    if late := [run for run in runs if run.state == "unfinished"]:
        steps = (f"{run.folder} (step {run.step} of {run.config['steps']})" for run in late)
        print("unfinished, drawn but in no final figure:", ", ".join(steps))
    if not compared:
        print(f"no difference shown: nothing to compare with {args.baseline}; --baseline names another variant")
    return figure


# ---------------------------------------------------------------------------------------------------
# Weights and scale vectors over training: the paper's figure 4


def read_scales(run):
    """Of the middle layer: {branch: {step: norm of W}} and {side: {step: [(min, mean, max) of a vector, ...]}}."""
    layer, norms, gammas = f"blocks.{run.config['n_layer'] // 2}.", {"q": {}, "k": {}, "v": {}}, {}
    weight = {f"{layer}attention.qkv.weight.{branch}": norms[branch] for branch in norms}
    columns = ["step", "kind", "name", "min", "mean", "max", "norm"]
    try:
        step, kind, name, *values = read_table(run.folder / "scales.csv", columns)
        for step, kind, name, *gamma, norm in zip(floats(step), kind, name, *map(floats, values)):
            if name in weight:
                weight[name][step] = norm
            elif kind == "scale" and name.startswith(layer):
                side = "input" if ".input_scale." in name else "output"
                gammas.setdefault(side, {}).setdefault(step, []).append(gamma)
    except (ValueError, OSError) as mistake:
        raise ValueError(f"{run.folder}: {mistake}") from None
    return norms, gammas


def weights(curves, args):
    chosen = {}
    for curve in curves:
        runs = curve.rates.get((curve.base or curve).common_lr()) or curve.rates[curve.best_lr()]
        if recorded := [seed for seed, run in runs.items() if (run.folder / "scales.csv").is_file()]:
            chosen[curve] = runs[min(recorded)]
    if not chosen:
        raise ValueError("no run has a scales.csv; train.py writes it, results/ keeps none")
    records = {curve: read_scales(run) for curve, run in chosen.items()}
    sides = [side for side in ("input", "output") if any(side in gammas for _, gammas in records.values())]
    styles = looks(curves)
    figure, axes = plt.subplots(1, 1 + len(sides), figsize=(6 + 4.5 * len(sides), 4.2), squeeze=False)
    for curve, (norms, gammas) in records.items():
        style = styles[curve]
        for line, dash in zip(norms.values(), DASHES):
            axes[0, 0].plot(line.keys(), line.values(), color=style["color"], linestyle=dash, linewidth=1.8)
        for axis, side in zip(axes[0, 1:], sides):
            steps = gammas.get(side, {})
            low, mean, high = ([f(g[i] for g in steps[s]) for s in steps] for i, f in enumerate((min, fmean, max)))
            axis.plot(steps.keys(), mean, **style, markevery=max(1, len(steps) // 10))
            axis.fill_between(steps.keys(), low, high, color=style["color"], alpha=0.15, linewidth=0)
            axis.set(title=f"gamma, {side} side: mean, min to max", xlabel="step", ylabel="gamma")
    layers = {f"{run.config['n_layer'] // 2} of {run.config['n_layer']}" for run in chosen.values()}
    seeds = {str(run.config["seed"]) for run in chosen.values()}
    where = f"layer {' and '.join(sorted(layers))}, seed {' and '.join(sorted(seeds))}"
    axes[0, 0].set(title=f"Frobenius norms, {where}", xlabel="step", ylabel="norm of the weight")
    handles = [Line2D([], [], color="grey", linestyle=dash) for dash in DASHES[:3]]
    axes[0, 0].legend(handles, ["$W_Q$", "$W_K$", "$W_V$"], handlelength=3)
    legend(figure, styles, {curve: curve.label for curve in chosen}, loc="outside right center")
    return figure


# ---------------------------------------------------------------------------------------------------
# Scaling laws: the paper's figures 6 and 7


def fit_power_law(C, L):
    """(E, a, b) of L = E + a C^-b by least squares with E >= 0; arrays of one length.

    For a given b this is linear in E and a, so b alone is searched, on finer and finer grids.
    """

    def solve(b):
        x = (C / C.max()) ** -b
        E, a = np.linalg.lstsq(np.stack([np.ones_like(x), x], 1), L)[0]
        if E < 0:
            E, a = 0.0, (x @ L) / (x @ x)
        return np.square(E + a * x - L).sum(), E, a * C.max() ** b, b

    low, high = 1e-3, 4.0
    for _ in range(12):
        grid = np.geomspace(low, high, 64)
        i = min(range(64), key=lambda i: solve(grid[i])[0])
        low, high = grid[max(i - 1, 0)], grid[min(i + 1, 63)]
    return solve(grid[i])[1:]


def scaling_points(curves, variant):
    """Compute 6 N D and mean final loss at the best rate, one point a size, smallest first: two arrays."""
    points = {}
    for curve in curves:
        runs = done(curve.rates[curve.best_lr()])
        if curve.key[0] == variant and runs:
            size = tuple(curve.config[name] for name in ("model", "d_model", "n_layer"))
            if size in points:
                raise ValueError(f"{variant} has two curves of one size, {size[0]}: give the folders of one")
            tokens = max(next(iter(runs.values())).loss)
            points[size] = 6 * curve.config["activated_parameters"] * tokens, mean_final(runs)
    if len({C for C, _ in points.values()}) < 4:
        raise ValueError(f"a scaling law needs four finished sizes; {variant} has {len(points)}")
    return np.array(sorted(points.values())).T


def scaling(curves, args):
    others = sorted({curve.key[0] for curve in curves} - {args.baseline})
    variant = args.variant or ("unified" if "unified" in others else others[0] if len(others) == 1 else "not given")
    if variant not in others:
        raise ValueError(f"--variant {variant}; beside {args.baseline} there are: {', '.join(others) or 'none'}")
    figure, axis = plt.subplots(figsize=(8, 5))
    fits, looks = {}, {args.baseline: ("black", "s", DASHES[0]), variant: ("#0072B2", "o", DASHES[1])}
    for name, (colour, marker, dash) in looks.items():
        C, L = scaling_points(curves, name)
        E, a, b = fit_power_law(C, L)
        if a <= 0:
            raise ValueError(f"the losses of {name} do not fall with compute")
        fits[name] = E, a, b, C[-1]
        print(f"{name}: L(C) = {E:.4f} + {a:.4g} C^-{b:.4f}, {len(C)} sizes" + ", E at its bound: no fit" * bool(E == 0))
        line = np.geomspace(C[0] / 1.5, C[-1] * 1.5, 200)
        power = math.floor(math.log10(a))
        text = f"{plain(name)}: ${E:.3f} + {a / 10**power:.2f} \\cdot 10^{{{power}}}\\,C^{{-{b:.3f}}}$"
        axis.plot(C, L, color=colour, marker=marker, linestyle="none", markersize=7)
        axis.plot(line, E + a * line**-b, color=colour, linestyle=dash, marker=marker, markevery=[], label=text)
    (E0, a0, b0, C0), (E, a, b, _) = fits.values()
    L0 = E0 + a0 * C0**-b0
    if L0 > E:
        C = (a / (L0 - E)) ** (1 / b)
        gain = f"{C0 / C:.2f}x compute at equal loss"
        print(f"{variant} against {args.baseline}: {gain} ({L0:.4f}, {args.baseline} at {C0:.3g} FLOPs)")
        axis.annotate("", (C, L0), (C0, L0), arrowprops=dict(arrowstyle="->", linewidth=1.5))
        axis.annotate(gain, (min(C, C0), L0), (-6, -4), textcoords="offset points", ha="right", va="top")
    else:
        print(f"{variant} falls to {E:.4f} at most, {args.baseline} has {L0:.4f} at {C0:.3g} FLOPs: no gain")
    axis.set(xscale="log", yscale="log", ylabel="validation loss, nats a token")
    axis.set_xlabel("compute C in FLOPs: 6 x activated parameters x tokens")
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()
    return figure


# ---------------------------------------------------------------------------------------------------
# The theory: what the theorems predict (lines) and what the modules of norms.py do (marks)

THEORY = {  # a colour of Okabe and Ito; line style and mark say the same again
    "none": ("#000000", "-", "o"),
    "standard": ("#D55E00", "--", "s"),
    "dp": ("#0072B2", "-.", "^"),
    "or": ("#009E73", (0, (5, 1, 1, 1, 1, 1)), "D"),
    "dp+or": ("#CC79A7", (0, (2, 1)), "v"),
    "mu = 0": ("#000000", "-", "P"),
    "mu = 0.1": ("#56B4E9", "-.", "X"),
    "mu = 0.5": ("#E69F00", "--", "p"),
}


def theory():
    """Gradient flow from the standard start (a, b) and at matched states (c); noise and decay (d). About 12 s."""
    import torch

    import norms

    torch.set_num_threads(1)  # tiny matrices
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figure, ((start, early), (matched, decay)) = plt.subplots(2, 2, figsize=(10, 8.6), layout="constrained")
    figure.suptitle("Lines: what the theorems predict. Marks: what the modules of norms.py do.", fontsize=12)

    def look(curve):
        colour, dashes, marker = THEORY[curve]
        return dict(color=colour, ls=dashes, marker=marker, lw=1.4, ms=5.5, mfc="white", mew=1.3)

    def compare(axis, curve, label, t, predicted, measured, at):
        axis.plot(t, predicted, **look(curve) | {"marker": ""})
        axis.plot(t[at], measured[at], **look(curve) | {"ls": ""})
        axis.plot([], [], label=label, **look(curve))

    def losses(variant, teacher, t_end, steps):
        module, loss = norms.student(variant, teacher), partial(norms.population_loss, teacher=teacher)
        return np.array([(t, loss(module).item()) for t in norms.gradient_flow(module, loss, t_end, steps)]).T

    def rate(variant, teacher, state):  # -dL/dt
        module = norms.student(variant, teacher)
        module.load_state_dict(state)
        gradients = torch.autograd.grad(norms.population_loss(module, teacher), list(module.parameters()))
        return sum(g.square().sum().item() for g in gradients)

    # (a) An entry r on the diagonal of W obeys dr/dt = G (1 - r G), if G(r) is the product of its scales, which the
    # conservation laws give. Integrated by the midpoint rule.
    d = 4
    products = {
        "none": (lambda r: 1.0, "$1$"),
        "standard": (lambda r: np.sqrt(1 + r**2), r"$\sqrt{1 + r^2}$"),
        "dp": (lambda r: 1 + r**2, "$1 + r^2$"),
        "or": (lambda r: np.sqrt(1 + d * r**2), r"$\sqrt{1 + d\,r^2}$"),
        "dp+or": (lambda r: 1 + d * r**2, r"$1 + d\,r^2$"),
    }
    for variant, (G, words) in products.items():
        t, measured = losses(variant, torch.eye(d, dtype=torch.float64), 2, 400)
        r, loss = 0.0, []
        for _ in t:
            loss.append(d / 2 * (1 - r * G(r)) ** 2)
            half = r + t[1] / 2 * G(r) * (1 - r * G(r))
            r += t[1] * G(half) * (1 - half * G(half))
        compare(start, variant, f"{variant}: $G$ = {words}", t, np.array(loss), measured, slice(0, None, 40))
    start.set(title="(a) Theorems 2.2, 3.1, 3.2: $W^* = I$, $d = 4$", xlabel="$t$", ylabel="$L$", yscale="log")
    start.set(ylim=(1e-8, 4))
    start.legend(title=r"lines: $\dot r = G\,(1 - r\,G)$", loc="lower left", handlelength=3)

    # (b) L_against - L_variant = (2/3) c t^3 + O(t^4)
    W = draw(3, 12)
    W /= W.norm()
    laws = {
        ("standard", "none"): (W.norm(dim=0).pow(4).sum(), r"$\Sigma_j\,\Vert W^*_{:j}\Vert^4$"),
        ("dp", "standard"): (W.norm(dim=1).pow(4).sum(), r"$\Sigma_i\,\Vert W^*_{i:}\Vert^4$"),
        ("or", "standard"): ((1 - 1 / 12) * W.norm() ** 4, r"$(1 - 1/d)\,\Vert W^*\Vert_F^4$"),
    }
    for (variant, against), (c, words) in laws.items():
        (t, low), (_, high) = losses(variant, W, 0.3, 300), losses(against, W, 0.3, 300)
        at = np.unique(np.geomspace(1, 300, 13).astype(int)) - 1
        label = f"{variant} below {against}: $c$ = {words}"
        compare(early, variant, label, t[1:], 2 / 3 * c.item() * t[1:] ** 3, (high - low)[1:], at)
    early.set(title="(b) Theorems D.1, D.2: random $W^*$, $3 \\times 12$", xlabel="$t$", ylabel="difference in $L$")
    early.set(xscale="log", yscale="log", ylim=(1e-11, 1e4))
    early.legend(title=r"lines: $\frac{2}{3}\,c\,t^3$", loc="upper left", handlelength=3)

    # (c) The same effective weight and input vector, where the theorem's condition holds and where it does not.
    for holds in True, False:
        points = {"dp": [], "or": []}
        for _ in range(150):
            M, q, u, beta = draw(3, 12) * 10 ** -draw(1).abs(), draw(12), draw(3), draw(1)
            q *= 12**0.5 / q.norm()
            u, beta = (x.square().add(1).sqrt() if holds else x.abs().clamp(0.2, 0.9) for x in (u, beta))
            state = {"weight.w": M, "input_scale.shared.gamma": q, "output_scale.w.gamma": u}
            match = {"weight.w": u[:, None] * M, "input_scale.shared.gamma": q}
            points["dp"].append((rate("standard", W, match), rate("dp", W, state)))
            state = {"weight.w": M, "input_scale.shared.alpha": q, "input_scale.shared.beta": beta}
            match = {"weight.w": M, "input_scale.shared.gamma": beta * q}
            points["or"].append((rate("standard", W, match), rate("or", W, state)))
        for variant, squared in ("dp", r"\gamma_a^2"), ("or", r"\beta^2"):
            paler = {"ls": "", "ms": 4, "mew": 1} | ({} if holds else {"color": "0.7", "zorder": 1})
            label = f"{variant}, ${squared}$ {'≥' if holds else '<'} 1"
            matched.plot(*np.transpose(points[variant]), label=label, **look(variant) | paler)
    matched.axline((1, 1), (2, 2), color="black", lw=1)
    matched.set(title="(c) Theorems 3.1, 3.2: at matched states", xscale="log", yscale="log")
    matched.set(xlabel="$-dL/dt$ of standard", ylabel="$-dL/dt$ of dp, of or")
    matched.legend(title="line: as fast as standard", loc="upper left", handlelength=3)

    # (d) The columns are as many paths of one coordinate: target 1, decay 1/2 on w and mu on g, noise q = 1/4. The
    # invariant density is exp(-2 F / q), F being the loss with its decay; with mu = 0 its integral diverges.
    at_w, at_g = np.meshgrid(np.linspace(-6, 6, 601), np.linspace(-6, 6, 601))
    for mu in 0, 0.1, 0.5:
        module = norms.student("standard", torch.empty(1, 20_000))
        w, g = module.weight["w"], module.input_scale["shared"].gamma

        def loss(module):
            return norms.population_loss(module, 1.0) + w.square().sum() / 4 + mu / 2 * g.square().sum()

        flow = norms.gradient_flow(module, loss, 20, 400, noise=0.25)
        t, gg, ww = np.transpose([(t, g.square().mean().item(), w.square().mean().item()) for t in flow])
        change = ww - 2 * mu * gg
        law = 1 + ww + t[1] * (np.cumsum(change) - (change + change[0]) / 2)
        compare(decay, f"mu = {mu}", f"$\\mu$ = {mu}", t, law, gg, slice(0, None, 40))
        if mu:
            density = np.exp(-4 * ((at_w * at_g - 1) ** 2 + at_w**2 / 2 + mu * at_g**2))
            decay.axhline(np.average(at_g**2, weights=density), color="0.4", lw=1, ls=":")
    decay.set(title="(d) Theorem 2.3: noise, decay $\\mu$ on $g$", xlabel="$t$", ylabel=r"$E\,\Vert g\Vert^2$")
    decay.set(ylim=(0, 11))
    decay.plot([], [], color="0.4", lw=1, ls=":", label="mean of the invariant measure")
    law = r"lines: $d\,E[g^2 - w^2]/dt = 2\lambda\,E\,w^2 - 2\mu\,E\,g^2$, $\lambda = \frac{1}{2}$"
    decay.legend(title=law, loc="upper left", handlelength=3)
    return figure


# ---------------------------------------------------------------------------------------------------
# Command line

KINDS = {"loss": loss, "weights": weights, "scaling": scaling, "theory": theory}
FORMATS = (".png", ".pdf", ".svg", ".jpg")
LOOK = {
    "figure.constrained_layout.use": True, "font.size": 11, "axes.titlesize": 12, "axes.grid": True, "grid.alpha": 0.3,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip


class CommandLine(argparse.ArgumentParser):
    """A mistake gets one line, without the usage block."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def save(figure, path):
    """Under another name first: a picture is there as a whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format=path.suffix[1:].lower(), dpi=160, bbox_inches="tight")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def main(arguments=None):
    parser = CommandLine(prog="plot.py", description="Run folders to a picture and a table.", allow_abbrev=False)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", default=["runs"], help="where runs are (default: runs)")
    parser.add_argument("--kind", choices=KINDS, default="loss", help="which picture (default: loss)")
    parser.add_argument("--baseline", help="norm scale to compare with (default: standard)")
    parser.add_argument("--variant", help="scaling: the norm scale beside it (default: unified, or the only one)")
    parser.add_argument("--out", type=Path, help="file of the picture (default: <kind>.png)")
    args = parser.parse_args(arguments)
    out = args.out or Path(f"{args.kind}.png")
    try:
        if out.suffix.lower() not in FORMATS:
            raise ValueError(f"--out={out}: a picture's name ends in one of {', '.join(FORMATS)}")
        with plt.rc_context(LOOK):
            if args.kind == "theory":
                figure = theory()
            else:
                runs = read_runs(args.folders)
                known = sorted({run.config["norm_scale"] for run in runs})
                if args.baseline and args.baseline not in known:
                    raise ValueError(f"no run of --baseline={args.baseline}; there are {', '.join(known)}")
                args.baseline = args.baseline or "standard"
                figure = KINDS[args.kind](make_curves(runs, args.baseline), args)
            save(figure, out)
    except (ValueError, OSError) as mistake:
        parser.error(mistake)
    finally:
        plt.close("all")
    print(out)


if __name__ == "__main__":
    main()
