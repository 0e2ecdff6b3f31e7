"""Plots run folders, and prints a table on the terminal.

    python plot.py                  # runs/ -> loss.png: loss against tokens, and relative to `standard`
    python plot.py --kind=weights   # the paper's figure 4: norms of W_Q, W_K, W_V; and how scale vectors move
    python plot.py --kind=scaling   # its figures 6 and 7: L(C) = E + a C^-b of two variants, gain at one loss
    python plot.py --kind=theory    # its theorems, integrated; needs no run

A run is a folder with config.json and metrics.csv, as train.py leaves it. Differences between variants
are taken seed by seed: equal first weights and equal batches remove most of the noise between seeds.
"""

import csv
import io
import json
import math
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from statistics import fmean, stdev

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no window, and no backend forced on a notebook
from matplotlib.ticker import EngFormatter

from prepare_data import CommandLine, run_as_a_tool, use_any_terminal

# ---------------------------------------------------------------------------------------------------
# Reading runs

# Runs that differ in a setting are separate curves; alike in COURSE, runs of one seed share their batches.
SIZES = ("model", "d_model", "n_layer", "n_head", "d_ff")
COURSE = ("optimizer", "schedule", "steps", "batch_size", "data", "vocab_size", "seq_len", "eval_tokens")
SETTINGS = ("norm_scale", *SIZES, *COURSE, "weight_decay", "grad_clip", "warmup_steps", "dtype", "eval_every")
WORDS = ("norm_scale", "model", "optimizer", "schedule", "dtype", "data", "status")  # the others are numbers


@dataclass(eq=False)
class Run:
    """One run folder."""

    folder: Path
    config: dict
    state: str  # done, diverged, failed or unfinished; only runs that are done count in final losses
    step: int  # the last one evaluated
    loss: dict  # tokens seen -> validation loss in nats per token, nan where not finite


@contextmanager
def reading(folder):
    """Whatever is wrong with a record becomes one line that names its folder."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError) as mistake:
        raise ValueError(f"{folder}: {type(mistake).__name__}: {mistake}") from None


def read_table(path):
    """A CSV file as [{column: text}, ...]; [] without a file."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def read_run(folder):
    """The Run in a folder. Data is identified by its folder's name and its hashes, not by its path."""
    config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    for key in (*SETTINGS, "lr", "seed", "parameters", "activated_parameters", "status"):
        if not isinstance(config.get(key), str if key in WORDS else (int, float)):
            raise ValueError(f"config.json: {key} is missing or of another kind")
    hashes = [str(sha256)[:8] for _, sha256 in sorted(dict(config["data_sha256"]).items())]
    config["data"] = " ".join([PureWindowsPath(config["data"]).name, *hashes])
    step, loss = 0, {}
    for row in read_table(folder / "metrics.csv"):
        step, value = int(row["step"]), float(row["val_loss"])
        loss[int(row["tokens"])] = value if math.isfinite(value) else math.nan
    complete = loss and step == config["steps"] and math.isfinite(value)
    known = ("diverged", "failed", "done" if complete else None)
    return Run(folder, config, config["status"] if config["status"] in known else "unfinished", step, loss)


def read_runs(folders):
    """All runs below the folders, each once."""
    found, runs = set(), []
    for root in folders:
        if not os.path.isdir(root):
            raise ValueError(f"there is no folder {root}")
        found |= {path.parent for path in Path(root).rglob("config.json")}
    for folder in sorted(found):
        with reading(folder):
            runs.append(read_run(folder))
    if not any(run.loss for run in runs):
        raise ValueError(f"no run with an evaluation in {', '.join(map(str, folders))}; train.py makes one")
    return runs


def left_out(runs):
    """A line for each run that counts in no final loss."""
    for run in runs:
        if run.state != "done":
            reason = " ".join(str(run.config.get("reason") or "counts in no final loss").split())
            yield f"{run.state}: {run.folder} (step {run.step} of {run.config['steps']}): {reason}"


# ---------------------------------------------------------------------------------------------------
# Grouping runs into curves; their labels and baselines; the table of differences by seed


@dataclass(eq=False)
class Curve:
    """Runs that differ in seed and learning rate alone."""

    config: dict  # of one of its runs
    rates: dict  # lr -> {seed: Run}
    label: str = ""
    base: "Curve | None" = None  # what it is compared with: itself if it is a baseline

    def alike(self, curves, names):
        """Those of the curves that have its values of these settings."""
        return [other for other in curves if all(self.config[name] == other.config[name] for name in names)]

    def lr(self, best):
        """The lr of lowest mean final loss, of those where all finished (best) or where most did (else)."""

        def order(lr):
            runs, finished = self.rates[lr], len(finals(self.rates[lr]))
            return finished < len(runs) if best else -finished, mean_final(runs)

        return min(self.rates, key=order)


def finals(runs):
    """{seed: final loss} of those of {seed: Run} that have finished."""
    return {seed: list(run.loss.values())[-1] for seed, run in runs.items() if run.state == "done"}


def mean_final(runs):
    """The mean of the final losses, infinite if there is none."""
    return fmean(finals(runs).values() or [math.inf])


def make_curves(runs, baseline):
    """The runs as curves: baselines first."""
    curves = {}
    for run in runs:
        key = tuple(run.config[name] for name in SETTINGS)
        seeds = curves.setdefault(key, Curve(run.config, {})).rates.setdefault(run.config["lr"], {})
        twin = seeds.setdefault(run.config["seed"], run)
        if twin is not run:
            raise ValueError(f"{twin.folder} and {run.folder} have the same settings and seed: give one")
    curves = list(curves.values())
    name_curves(curves)
    find_bases(curves, baseline)
    return sorted(curves, key=lambda curve: (curve.base is not curve, curve.label))


def name_curves(curves):
    """Sets label: norm_scale, then each setting in which curves that share a label so far differ, unless its
    value is the usual one. Settings that follow from another, as warmup_steps from steps, stay unnamed."""
    for name in SETTINGS[1:]:
        usual, count = Counter(curve.config[name] for curve in curves).most_common(1)[0]
        values = {}  # label so far -> the values of this setting
        for curve in curves:
            values.setdefault(curve.label, set()).add(curve.config[name])
        for curve in curves:
            value = curve.config[name]
            if len(values[curve.label]) > 1 and (value != usual or count <= len(curves) / 2):
                curve.label += f", {value}" if name in WORDS else f", {name} {value}"
    for curve in curves:
        curve.label = curve.config["norm_scale"] + curve.label


def find_bases(curves, baseline):
    """Sets base: the baseline that differs only in norm_scale, else the only one of the same course and, d_ff
    aside, the same sizes. A baseline that no variant can be paired with, such as a control with a wider d_ff,
    is itself compared with another."""
    bases = [curve for curve in curves if curve.config["norm_scale"] == baseline]
    variants = [curve for curve in curves if curve not in bases]
    for curve in curves:
        near = curve.alike(bases, (*(name for name in SIZES if name != "d_ff"), *COURSE))
        near = [base for base in near if base.alike(variants, SETTINGS[1:])] or near
        found = curve.alike(near, SETTINGS[1:]) or near
        curve.base = found[0] if len(found) == 1 else curve if curve in bases else None


def student_t(df, share=0.95):
    """The t with P(|T| < t) = share for Student's T with df degrees of freedom. In T = sqrt(df) tan(angle)
    the angle has the density cos(angle)^(df - 1), up to a factor."""
    angle = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (df - 1)
    integral = np.cumsum(density) - (density + density[0]) / 2  # by trapezoids
    return math.sqrt(df) * math.tan(np.interp(share * integral[-1], integral, angle))


def paired(mine, theirs):
    """(n, mean, half) of the differences mine - theirs over the seeds in both {seed: loss} dicts: their
    number, their mean, and half the width of its 95 % interval. nan where there are too few."""
    differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    n, mean, half = len(differences), math.nan, math.nan
    if n > 0:
        mean = fmean(differences)
    if n > 1:
        half = student_t(n - 1) * stdev(differences) / math.sqrt(n)
    return n, mean, half


class Row:
    """A curve beside its baseline, both at the baseline's common learning rate or each at its own best."""

    def __init__(self, curve, best):
        base = curve.base or curve
        self.curve = curve
        self.lr = (curve if best else base).lr(best)
        self.runs = curve.rates.get(self.lr, {})
        self.base_runs = base.rates[base.lr(best)] if curve.base else {}
        self.loss = mean_final(self.runs)
        self.finished = f"{len(finals(self.runs))} of {len(self.runs)}"
        others = {} if curve.base is curve else finals(self.base_runs)  # no curve is compared with itself
        self.pairs, self.mean, self.half = paired(finals(self.runs), others)

    @property
    def difference(self):
        """As "-0.0167 ± 0.0079 *", with a star if the interval excludes 0."""
        if self.pairs == 0:
            return ""
        half = f"{self.half:.4f}" if self.pairs > 1 else "-"
        star = "*" if abs(self.mean) > self.half else " "
        return f"{self.mean:+.4f} ± {half:6} {star}"


def make_rows(curves, best):
    """The rows of the curves, the largest difference first."""
    rows = [row for row in (Row(curve, best) for curve in curves) if row.runs]
    return sorted(rows, key=lambda row: (row.curve.base is None, -row.mean if row.pairs else 0, -row.loss))


def table(rows, baseline):
    """The lines of the table."""
    difference = f"minus {baseline} ± 95 % interval, * excludes 0"
    cells = [("variant", "lr", "finished", "loss", difference, "parameters")]
    for row in rows:
        numbers = f"{row.lr:g}", row.finished, f"{row.loss:.4f}", row.difference
        cells.append((row.curve.label, *numbers, f"{row.curve.config['parameters']:,}"))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [[label.ljust(widths[0]), *map(str.rjust, right, widths[1:])] for label, *right in cells]
    return ["  ".join(line).rstrip() for line in lines]


# ---------------------------------------------------------------------------------------------------
# The loss picture, as the paper's figure 1

OKABE_ITO = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # colour-blind safe
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2))]
MARKERS = "oD^vPX*dp<>hs"  # for greyscale print; 13, a prime, so that every line style meets every marker


def looks(curves):
    """{curve: line style}: baselines black, the others coloured."""
    styles = {}
    for i, curve in enumerate(curves):
        styles[curve] = {
            "color": "black" if curve.base is curve else OKABE_ITO[i % len(OKABE_ITO)],
            "ls": DASHES[i // len(OKABE_ITO) % len(DASHES)],
            "lw": 1.8,
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4.5,
        }
    return styles


def add_legend(axis, lines, **where):
    """A legend in columns no higher than the axis. Returns its width in inches."""
    where |= {"loc": "center left", "handlelength": 3, "fontsize": 9, "title_fontsize": 9}
    legend = axis.legend(handles=lines, ncols=math.ceil(len(lines) / 18), **where)
    return legend.get_window_extent().width / axis.figure.dpi


def seed_lines(row, relative):
    """[{tokens: loss}] of finished seeds, of all while none has finished; relative: minus the baseline's."""
    others = row.base_runs if relative else row.runs
    seeds = finals(row.runs).keys() & finals(others).keys() or row.runs.keys() & others.keys()
    pairs = [(row.runs[seed].loss, others[seed].loss) for seed in seeds]
    lines = [{t: loss[t] - (base[t] if relative else 0) for t in loss if t in base} for loss, base in pairs]
    return [line for line in lines if line]  # a run that has just begun has none


def draw_losses(axis, rows, styles, relative):
    """Means over seeds, single seeds faint; relative: 95 % intervals side by side, right of the last point.
    Returns the lines of the means. The y limits cover, of the last 70 % of each mean, both ends and the
    middle 70 % of the values, so that neither a spike nor the fall from ln(vocabulary) flattens the rest."""
    decided, means, shown, starts = [row for row in rows if finals(row.runs)] or rows, [], [], []
    for place, row in enumerate(rows, 1):
        style, lines = styles[row.curve], seed_lines(row, relative)
        for line in lines:
            axis.plot(line.keys(), line.values(), color=style["color"], lw=0.8, alpha=min(0.5, 2 / len(rows)))
        t = np.array(sorted(set.intersection(*map(set, lines or [{}]))))
        mean = np.array([fmean(line[tokens] for line in lines) for tokens in t])
        means += axis.plot(t, mean, **style, markevery=max(1, len(t) // 10))
        late = np.isfinite(mean) & (t >= 0.3 * max(t, default=0))
        if row in decided and any(late):
            starts.append(t[late][0])
            shown += [*mean[late][[0, -1]], *np.quantile(mean[late], (0.15, 0.85), method="nearest")]
        if relative and row.pairs > 2:  # the interval of two would flatten all the rest
            beyond = t[-1] * (1 + 0.2 * place / max(12, len(rows)))
            mark = {"color": style["color"], "marker": style["marker"], "markersize": 3.5, "alpha": 0.6}
            axis.errorbar(beyond, row.mean, row.half, **mark, elinewidth=1, capsize=2)
            shown += [row.mean - row.half, row.mean + row.half]
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) + 1e-3
        axis.set_ylim(min(shown) - margin, max(shown) + margin)
        axis.set_xlim(left=None if relative else 0.9 * min(starts))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set(xlabel="tokens", ylabel=f"{'difference' if relative else 'validation loss'}, nats per token")
    return means


def loss_picture(curves, baseline):
    """Panels at the baseline's common learning rate and, where several were tried, with each curve at its own
    best; and the lines for the terminal."""
    several = any(len({*curve.rates, *(curve.base or curve).rates}) > 1 for curve in curves)
    compared = any(curve.base not in (None, curve) for curve in curves)
    styles, text, widths = looks(curves), [], []
    figure = Figure(figsize=(12 if compared else 7, 8.4 if several else 4.2))
    for best, axes in zip((False, True), figure.subplots(1 + several, 1 + compared, squeeze=False)):
        rows = make_rows(curves, best)
        one_lr = not several and len({row.lr for row in rows}) == 1
        common = f"lr {rows[0].lr:g}" if one_lr else "at the baseline's lr"
        where = "each at its own best lr" if best else common
        text += [f"{where}:", *table(rows, baseline)]
        for axis, relative, title in zip(axes, (False, True), ("", f"relative to {baseline}, ")):
            lines = draw_losses(axis, rows, styles, relative)
            axis.set_title(title + where)
        for row, line in zip(rows, lines):
            at_lr = "" if one_lr else f", lr {row.lr:g}"
            line.set_label(f"{row.curve.label}{at_lr}, {row.finished} seeds  {row.difference}")
        title = "mean difference ± 95 % interval, * excludes 0" if compared else None
        widths.append(add_legend(axes[-1], lines, title=title, bbox_to_anchor=(1.01, 0.5)))
    figure.set_figwidth(figure.get_figwidth() + max(widths))  # no legend takes room from the axes
    for curve in curves:
        if len(curve.rates) > 1:
            by_lr = (f"{lr:g} {mean_final(curve.rates[lr]):.4f}" for lr in sorted(curve.rates))
            text.append(f"{curve.label}, loss by lr: {', '.join(by_lr)}")
    if not compared:
        text.append(f"no difference shown: nothing to compare with {baseline}; --baseline names another")
    return figure, text


# ---------------------------------------------------------------------------------------------------
# Weights and scale vectors over training: the paper's figure 4


def read_scales(run):
    """Of the middle layer: {title: {step: [(min, mean, max), ...]}}, of a weight's norm or of vectors."""
    layer = f"blocks.{run.config['n_layer'] // 2}."
    titles = {f"{layer}attention.{branch.lower()}.W": f"$\\Vert W_{branch} \\Vert_F$" for branch in "QKV"}
    titles |= {".v": "$\\gamma$, input side", ".u": "$\\gamma$, output side"}  # as the vectors' names end
    panels = {title: {} for title in titles.values()}
    with reading(run.folder):
        for row in read_table(run.folder / "scales.csv"):
            is_vector = row["kind"] == "scale" and row["name"].startswith(layer)
            name, columns = row["name"], ("min", "mean", "max") if is_vector else ("norm", "norm", "norm")
            if title := titles.get(name[-2:] if is_vector else name):
                numbers = [float(row[column]) for column in columns]
                panels[title].setdefault(int(row["step"]), []).append(numbers)
    return panels


def weights_picture(curves):
    """Norms of W_Q, W_K, W_V, and gamma (mean, and from min to max), of one run a curve: the lowest seed."""
    figure, styles = Figure(figsize=(13, 7.6)), looks(curves)
    *axes, legend_axis = figure.subplots(2, 3).flat
    for row in make_rows(curves, best=False):
        style, label = styles[row.curve], row.curve.label
        recorded = [seed for seed, run in row.runs.items() if (run.folder / "scales.csv").is_file()]
        panels = read_scales(row.runs[min(recorded)]) if recorded else {}
        for axis, (title, by_step) in zip(axes, panels.items()):
            axis.set(title=title, xlabel="step")
            if steps := list(by_step):
                low, mean, high = np.moveaxis(list(by_step.values()), 2, 0)  # each: step, vector
                axis.plot(steps, mean.mean(1), label=label, markevery=max(1, len(steps) // 10), **style)
                shade = {"color": style["color"], "alpha": 0.15, "lw": 0}
                axis.fill_between(steps, low.min(1), high.max(1), **shade)
    if not axes[0].lines:
        raise ValueError("no run has a scales.csv; train.py writes it, results/ keeps none")
    figure.suptitle("Layer n_layer // 2, lowest seed")
    legend_axis.axis("off")
    figure.set_figwidth(max(13, 9.5 + add_legend(legend_axis, axes[0].lines)))  # panels keep their room
    return figure


# ---------------------------------------------------------------------------------------------------
# Scaling laws: the paper's figures 6 and 7


def fit_power_law(C, L):
    """(E, a, b) of L = E + a C^-b by least squares with E >= 0; arrays of equal length. For a given b
    this is linear in E and a, so only b is searched for."""
    b = np.geomspace(1e-3, 4, 100_000)
    x = (C[:, None] / C.max()) ** -b
    dx = x - x.mean(0)
    a = (L @ dx) / np.square(dx).sum(0)
    a = np.where(L.mean() >= a * x.mean(0), a, (L @ x) / np.square(x).sum(0))  # with E = 0
    E = np.maximum(0, L.mean() - a * x.mean(0))
    best = np.square(E + a * x - L[:, None]).sum(0).argmin()
    return E[best], a[best] * C.max() ** b[best], b[best]


def scaling_points(curves, norm_scale):
    """Two arrays: compute, 6 N D, and mean final loss at the best lr; one point per size, smallest first."""
    points = {}
    for curve in curves:
        config, loss = curve.config, mean_final(curve.rates[curve.lr(best=True)])
        if config["norm_scale"] == norm_scale and loss < math.inf:
            size = config["activated_parameters"]
            tokens = config["steps"] * config["batch_size"] * config["seq_len"]
            if size in points:
                raise ValueError(f"two curves of one size, one is {curve.label}: give the folders of one")
            points[size] = 6 * size * tokens, loss
    if len(points) < 4:
        raise ValueError(f"a scaling law needs four finished sizes; {norm_scale} has {len(points)}")
    return np.array(sorted(points.values())).T


def scaling_picture(curves, baseline, variant):
    """The two laws, and the compute saved at equal loss; and the lines for the terminal."""
    # Not steps, batch_size, seq_len: they grow with the paper's sizes.
    same = ("data", "vocab_size", "eval_tokens", "gemma", "n_expert", "optimizer", "schedule", "weight_decay")
    for name in same:
        if len({curve.config.get(name) for curve in curves}) > 1:
            raise ValueError(f"the runs are not of the same {name}: give the folders of one")
    figure, fits, lines = Figure(figsize=(8, 5)), [], []
    axis = figure.subplots()
    for name, colour, marker, dash in ((baseline, "black", "s", "-"), (variant, OKABE_ITO[1], "o", "--")):
        C, L = scaling_points(curves, name)
        E, a, b = fit_power_law(C, L)
        if a <= 0:
            raise ValueError(f"the losses of {name} do not fall with compute")
        fits.append((E, a, b))
        lines.append(f"{name}: L(C) = {E:.4f} + {a:.4g} C^-{b:.4f}, {len(C)} sizes")
        digits, power = f"{a:.2e}".split("e")
        law = f"${E:.3f} + {digits} \\cdot 10^{{{int(power)}}}\\,C^{{-{b:.3f}}}$"
        C_line = np.geomspace(C[0] / 1.5, C[-1] * 1.5, 200)
        axis.plot(C_line, E + a * C_line**-b, color=colour, ls=dash, label=f"{name}: {law}")
        axis.plot(C, L, color=colour, ls="", marker=marker, markersize=7)
    (E0, a0, b0), (E, a, b) = fits
    largest = C[-1]  # the compute of the variant's largest size
    equal = E0 + a0 * largest**-b0  # the baseline's loss with it
    gain = "no"
    if equal > E:
        needed = (a / (equal - E)) ** (1 / b)  # the variant's compute for that loss
        gain = f"{largest / needed:.2f}"
    lines.append(f"{variant} against {baseline}: {gain}x compute at equal loss ({equal:.4f})")
    axis.set(xscale="log", xlabel="compute C in FLOPs: 6 x activated parameters x tokens")
    axis.set_ylabel("validation loss, nats per token")
    axis.legend(title=f"{gain}x compute at equal loss")
    return figure, lines


# ---------------------------------------------------------------------------------------------------
# The theory: what the theorems predict (lines) and what norms.py does (marks). norms is imported where it is
# needed, as torch takes seconds and no other picture asks for it.

LOOKS = [
    {"color": colour, "ls": DASHES[i % 4], "marker": MARKERS[i], "lw": 1.4, "markersize": 5.5, "mfc": "white"}
    for i, colour in enumerate(["black", *OKABE_ITO, "0.4"])
]


def compare(axis, look, label, t, predicted, measured, at=slice(0, None, 40)):
    """A predicted line, the measured marks at some of its points, and both in the legend."""
    axis.plot(t, predicted, label=label, markevery=[], **LOOKS[look])
    axis.plot(t[at], measured[at], **LOOKS[look] | {"ls": ""}, mew=1.3)


def flow(variant, teacher, t_end, steps):
    """t and the loss at t under gradient flow from the standard start: two arrays."""
    import norms

    branch, loss = norms.student(variant, teacher), partial(norms.population_loss, teacher=teacher)
    return np.array([(t, loss(branch).item()) for t in norms.gradient_flow(branch, loss, t_end, steps)]).T


def whole_course(axis, teacher):
    """(a) The teacher is the identity. A diagonal entry r of W obeys dr/dt = G (1 - r G), where G(r) is the
    product of its scales, given by the conservation laws. Integrated by the midpoint rule."""
    d = len(teacher)
    products = {
        "none": (lambda r: 1, "1"),
        "standard": (lambda r: (1 + r**2) ** 0.5, r"\sqrt{1 + r^2}"),
        "dp": (lambda r: 1 + r**2, "1 + r^2"),
        "or": (lambda r: (1 + d * r**2) ** 0.5, r"\sqrt{1 + d\,r^2}"),
        "dp+or": (lambda r: 1 + d * r**2, r"1 + d\,r^2"),
    }
    for look, (variant, (G, words)) in enumerate(products.items()):
        t, measured = flow(variant, teacher, t_end=2, steps=400)
        r, predicted = 0.0, []
        for _ in t:
            predicted.append(d / 2 * (1 - r * G(r)) ** 2)
            halfway = r + t[1] / 2 * G(r) * (1 - r * G(r))
            r += t[1] * G(halfway) * (1 - halfway * G(halfway))
        compare(axis, look, f"{variant}: $G = {words}$", t, predicted, measured)
    axis.set(title=f"(a) Theorems 2.2, 3.1, 3.2: $W^* = I$, $d = {d}$", xlabel="$t$", ylabel="$L$")
    axis.set(yscale="log", ylim=(1e-8, 4))
    axis.legend(title=r"lines: $\dot r = G\,(1 - r\,G)$", loc="lower left", handlelength=3)


def early_difference(axis, teacher):
    """(b) From the standard start, L_slower - L_faster = (2/3) c t^3 + O(t^4)."""
    d_out, d = teacher.shape
    columns, rows, norm = teacher.norm(dim=0), teacher.norm(dim=1), teacher.norm()
    laws = [  # faster, slower, c, c in words
        ("standard", "none", columns.pow(4).sum(), r"$\Sigma_j\,\Vert W^*_{:j}\Vert^4$"),
        ("dp", "standard", rows.pow(4).sum(), r"$\Sigma_i\,\Vert W^*_{i:}\Vert^4$"),
        ("or", "standard", (1 - 1 / d) * norm**4, r"$(1 - 1/d)\,\Vert W^*\Vert_F^4$"),
    ]
    at = np.unique(np.geomspace(1, 300, 13).astype(int)) - 1
    for look, (faster, slower, c, words) in enumerate(laws, 1):
        (t, low), (_, high) = (flow(variant, teacher, t_end=0.3, steps=300) for variant in (faster, slower))
        label = f"{faster} below {slower}: $c$ = {words}"
        compare(axis, look, label, t[1:], 2 / 3 * c.item() * t[1:] ** 3, (high - low)[1:], at)
    axis.set(title=f"(b) Theorems D.1, D.2: random $W^*$, ${d_out} \\times {d}$", xlabel="$t$")
    axis.set(ylabel="difference in $L$", xscale="log", yscale="log", ylim=(1e-11, 1e4))
    axis.legend(title=r"lines: $\frac{2}{3}\,c\,t^3$", loc="upper left", handlelength=3)


def matched_states(axis, teacher, draw):
    """(c) -dL/dt = ||grad L||^2 at random states, against that of `standard` at the same effective weight and
    input vector, where the theorem's condition holds and (grey) where not. draw(*shape): normal samples."""
    import norms

    def speed(branch):
        norms.population_loss(branch, teacher).backward()
        return sum(parameter.grad.square().sum().item() for parameter in branch.parameters())

    laws = [("dp", "v.gamma", "u.gamma", r"\gamma_a^2"), ("or", "v.alpha", "v.beta", r"\beta^2")]
    for look, (variant, vector, scale, squared) in enumerate(laws, 2):
        for sign, grey in (("≥", {}), ("<", {"color": "0.7", "zorder": 1})):
            points = []
            for _ in range(150):
                branch, standard = norms.student(variant, teacher), norms.student("standard", teacher)
                raw = {name: draw(*parameter.shape) for name, parameter in branch.named_parameters()}
                raw["W"] *= 10 ** -draw(1).abs()
                raw[vector] = norms.normalize(raw[vector])
                x = raw[scale]
                raw[scale] = (1 + x**2).sqrt() if sign == "≥" else x.abs().clamp(0.2, 0.9)
                branch.load_state_dict(raw)
                standard.v.gamma.data = branch.v().detach()
                standard.W.data = branch.effective_weight().detach() / branch.v().detach()
                points.append((speed(standard), speed(branch)))
            style = LOOKS[look] | {"ls": "", "markersize": 4} | grey
            axis.plot(*np.transpose(points), label=f"{variant}, ${squared}$ {sign} 1", **style)
    axis.axline((1, 1), (2, 2), color="black", linewidth=1)
    axis.set(title="(c) Theorems 3.1, 3.2: at matched states", xscale="log", yscale="log")
    axis.set(xlabel="$-dL/dt$ of standard", ylabel="$-dL/dt$ of dp, of or")
    axis.legend(title="line: as fast as standard", loc="upper left", handlelength=3)


def noise_and_decay(axis, teacher):
    """(d) Each column is a path of one coordinate, with target 1, decay lambda = 1/2 on w and mu on g, and
    noise q = 1/4. The invariant density is exp(-2 F / q), with F the loss and its decay; for mu = 0 its
    integral diverges."""
    import norms

    at_w, at_g = np.mgrid[-6:6:601j, -6:6:601j]
    for look, mu in enumerate((0, 0.1, 0.5), 5):

        def loss(branch, mu=mu):
            decay = branch.W.square().sum() / 4 + mu / 2 * branch.v.gamma.square().sum()
            return norms.population_loss(branch, teacher) + decay

        branch, seen = norms.student("standard", teacher), []
        for t in norms.gradient_flow(branch, loss, t_end=20, steps=400, noise=0.25):
            seen.append((t, branch.v.gamma.square().mean().item(), branch.W.square().mean().item()))
        t, g_squared, w_squared = np.transpose(seen)
        rate = w_squared - 2 * mu * g_squared
        law = 1 + w_squared + t[1] * (np.cumsum(rate) - (rate + rate[0]) / 2)  # trapezoids
        compare(axis, look, f"$\\mu$ = {mu}", t, law, g_squared)
        if mu > 0:
            density = np.exp(-4 * ((at_w * at_g - 1) ** 2 + at_w**2 / 2 + mu * at_g**2))
            axis.axhline(np.average(at_g**2, weights=density), color="0.4", lw=1, ls=":")
    axis.lines[-1].set_label("mean of the invariant measure")
    axis.set(title="(d) Theorem 2.3: noise, decay $\\mu$ on $g$", xlabel="$t$", ylabel=r"$E\,\Vert g\Vert^2$")
    axis.set(ylim=(0, 11))
    law = r"lines: $d\,E[g^2 - w^2]/dt = 2\lambda\,E\,w^2 - 2\mu\,E\,g^2$, $\lambda = \frac{1}{2}$"
    axis.legend(title=law, loc="upper left", handlelength=3)


def theory_picture():
    """Gradient flow from the standard start (a, b) and at matched states (c); noise and decay (d)."""
    import torch

    torch.set_num_threads(1)  # tiny matrices
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = draw(3, 12)
    teacher /= teacher.norm()
    figure = Figure(figsize=(10, 8.6))
    figure.suptitle("Lines: what the theorems predict. Marks: what the modules of norms.py do.", fontsize=12)
    (a, b), (c, d) = figure.subplots(2, 2)
    whole_course(a, torch.eye(4, dtype=torch.float64))
    early_difference(b, teacher)
    matched_states(c, teacher, draw)
    noise_and_decay(d, torch.ones(1, 20_000, dtype=torch.float64))
    return figure


# ---------------------------------------------------------------------------------------------------
# Command line

STYLE = dict.fromkeys(("figure.constrained_layout.use", "axes.grid"), True)
STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
STYLE |= {"font.size": 11, "axes.titlesize": 12, "grid.alpha": 0.3}


def main(arguments=None):
    """The command line."""
    use_any_terminal()
    parser = CommandLine("plot.py", description=__doc__.split("\n")[0])
    add, kinds = parser.add_argument, ("loss", "weights", "scaling", "theory")
    add("folders", nargs="*", metavar="FOLDER", default=["runs"], help="where runs are (default: runs)")
    add("--kind", choices=kinds, default="loss", help="which picture (default: loss)")
    add("--baseline", default="standard", help="norm scale to compare with (default: standard)")
    add("--variant", default="unified", help="scaling: norm scale to compare (default: unified)")
    add("--out", type=Path, help="file of the picture, .png, .pdf, .svg or .jpg (default: <kind>.png)")
    args = parser.parse_args(arguments)
    out, runs, lines = args.out or Path(f"{args.kind}.png"), [], []
    try:
        with matplotlib.rc_context(STYLE):
            if args.kind != "theory":
                runs = read_runs(args.folders)
                curves = make_curves(runs, args.baseline)
            if args.kind == "loss":
                figure, lines = loss_picture(curves, args.baseline)
            elif args.kind == "scaling":
                figure, lines = scaling_picture(curves, args.baseline, args.variant)
            else:
                figure = weights_picture(curves) if args.kind == "weights" else theory_picture()
            whole = io.BytesIO()  # a picture is there as a whole or not at all
            figure.savefig(whole, format=out.suffix[1:].lower(), dpi=160)
            out.write_bytes(whole.getvalue())
    except (ValueError, OSError) as mistake:
        parser.error(str(mistake))
    for line in (*lines, *left_out(runs), out):
        print(line)


if __name__ == "__main__":
    run_as_a_tool(main)
