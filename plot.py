"""Run folders to pictures and a table; and a picture of the theory.

    python plot.py                  # runs/ -> loss.png: loss against tokens, and minus `standard`; a table
    python plot.py --kind=weights   # the paper's figure 4: norms of W_Q, W_K, W_V; and how scale vectors move
    python plot.py --kind=scaling   # its figures 6 and 7: L(C) = E + a C^-b of two variants, gain at one loss
    python plot.py --kind=theory    # its theorems, integrated; needs no run

A run is a folder as train.py leaves it; a curve is all runs that differ in seed alone. Curves are compared
seed by seed: equal first weights and batches remove most of the noise. Losses are in nats per token.
"""

import csv
import io
import json
import math
import os
import sys
from functools import partial
from itertools import product
from pathlib import Path, PureWindowsPath
from statistics import fmean, median, stdev

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no window, and no backend forced on a notebook
from matplotlib.ticker import EngFormatter

from prepare_data import CommandLine, UserError, expanded_path, require

# ---------------------------------------------------------------------------------------------------
# Runs

NAMED = ("model", "norm_scale", "optimizer", "schedule", "lr", "data")  # beside `changed`, tell curves apart


class Run:
    """A run folder, read. Raises whatever it meets where there is none, or a damaged one."""

    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        hashes = [sha256[:6] for _, sha256 in sorted(config["data_sha256"].items())]
        config["data"] = " ".join([PureWindowsPath(config["data"]).name, *hashes])  # by whatever path
        self.folder, self.config = folder, config
        self.settings = {name: config[name] for name in [*NAMED, *config.get("changed", {})]}
        self.loss = {}  # tokens seen -> validation loss
        self.last = {"step": 0}  # the last row of metrics.csv, nan where it is empty, and ms_per_step
        for row in read_table(folder / "metrics.csv"):
            self.last = {column: float(text or "nan") for column, text in row.items()}
            self.loss[self.last["tokens"]] = self.last["val_loss"]
        tokens_per_step = config["batch_size"] * config["seq_len"]
        self.last["ms_per_step"] = 1000 * tokens_per_step / self.last.get("tokens_per_second", math.nan)
        self.final = self.last.get("val_loss", math.nan)  # the final loss, if the run is done
        self.done = self.last["step"] == config["steps"] and math.isfinite(self.final)


def read_table(path):
    """A CSV file as [{column: text}, ...]; [] without a file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return list(csv.DictReader(text.splitlines(), restval=""))


def read_runs(roots):
    """All runs in and below the folders, each once; and what is to be told of them, a line each."""
    runs, told, seen = [], [], set()
    for root in roots:
        require(os.path.isdir(root), f"there is no folder {root}")
        for folder, below, files in os.walk(root, followlinks=True):
            below.sort()
            place = os.path.realpath(folder)
            if place in seen:
                below.clear()  # given twice, or a link to a folder above
            elif "config.json" in files:
                try:
                    runs.append(Run(Path(folder)))
                except Exception as mistake:  # noqa: BLE001  whatever a foreign folder leads to
                    told.append(f"no run, skipped: {folder}: {type(mistake).__name__}: {mistake}")
            seen.add(place)
    for run in runs:
        if not run.done:
            where = f"{run.config['status']} at step {run.last['step']:.0f} of {run.config['steps']}"
            told.append(f"no final loss: {run.folder}, {where}. {run.config.get('reason') or ''}")
    require(any(run.loss for run in runs), "; ".join(["no run with an evaluation: see train.py", *told]))
    programs = differing([run.config["program"] for run in runs if run.config.get("program")])
    if programs:
        told.append(f"the runs come from different programs, which differ in {', '.join(programs)}")
    return runs, told


def differing(records):
    """The names whose values are not the same in all of these dicts; a dict may lack a name."""
    names = {}
    for record in records:
        names |= record
    return [name for name in names if any(record.get(name) != records[0].get(name) for record in records)]


# ---------------------------------------------------------------------------------------------------
# Curves, their labels and baselines; the table

COURSE = {"model", "data", "steps", "batch_size", "seq_len", "eval_tokens"}  # equal in what is compared
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]  # P(|T| < t) = 0.95 for
T_95 += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]  # Student's T with 1, 2, ...
T_95 += [2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]  # 30 degrees of freedom
COMPARISON = "minus baseline ± 95 % interval, * excludes 0"


class Curve:
    """Runs that differ in seed alone. make_curves gives it its label and, if any, its baseline."""

    def __init__(self, runs):
        self.runs = runs  # seed -> Run
        self.done = {seed: run for seed, run in runs.items() if run.done}
        self.finals = {seed: run.final for seed, run in self.done.items()}
        self.mean_final = fmean(self.finals.values() or [math.inf])
        any_run = next(iter(runs.values()))
        self.config, self.settings = any_run.config, any_run.settings


def make_curves(runs, baseline):
    """The runs as Curves, the lowest loss first. A label is the norm scale and every setting in which the
    runs differ, as "none, lr 0.004, d_ff 176"; a setting at its default stays unnamed."""
    groups = {}
    for run in runs:
        group = groups.setdefault(frozenset(run.settings.items()), {})
        twin = group.setdefault(run.config["seed"], run)
        require(twin is run, f"{twin.folder} and {run.folder} have the same settings and seed: give one")
    curves = [Curve(group) for group in groups.values()]
    told_apart = [name for name in differing([curve.settings for curve in curves]) if name != "norm_scale"]
    for curve in curves:
        named = [f"{name} {curve.settings[name]}" for name in told_apart if name in curve.settings]
        curve.label = ", ".join([curve.settings["norm_scale"], *named])
        curve.baseline = find_baseline(curve, curves, baseline)
    return sorted(curves, key=lambda curve: (curve.mean_final, curve.label))


def find_baseline(curve, curves, baseline):
    """The curve of norm scale `baseline` with all its other settings equal; else, of those with its COURSE,
    the one with the fewest settings changed, at its best lr, if there is one such. None if that is itself."""
    bases = [base for base in curves if base.settings["norm_scale"] == baseline]
    equal = [base for base in bases if differing([curve.settings, base.settings]) == ["norm_scale"]]
    near = [base for base in bases if not COURSE.intersection(differing([curve.config, base.config]))]
    fewest = min((len(base.settings) for base in near), default=0)
    found = best_rate(equal or [base for base in near if len(base.settings) == fewest])
    return None if found is curve else found


def best_rate(curves):
    """Of curves that differ in lr alone (else: None) that of lowest loss; unfinished ones come last."""
    if not curves or differing([curve.settings for curve in curves]) not in ([], ["lr"]):
        return None
    return min(curves, key=lambda curve: (len(curve.done) < len(curve.runs), curve.mean_final))


def minus(mine, theirs):
    """Of two dicts of numbers, what is in both: mine minus theirs."""
    return {name: value - theirs[name] for name, value in mine.items() if name in theirs}


def difference(curve):
    """The mean final loss minus its baseline's, over the seeds of both, as in COMPARISON; "" without one."""
    if curve.baseline is None:
        return ""
    differences = list(minus(curve.finals, curve.baseline.finals).values())
    if len(differences) < 2:
        return f"{differences[0]:+.4f}, one seed" if differences else "no common seed"
    mean, t = fmean(differences), T_95[min(len(differences), 31) - 2]  # beyond 31 seeds a little too large
    half = t * stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.4f} ± {half:.4f} {'*' if abs(mean) > half else ' '}"


def typical(curve, quantity):
    """The median over a curve's finished seeds of a quantity in Run.last, nan if none has it."""
    values = [run.last.get(quantity, 0) for run in curve.done.values()]
    return median([value for value in values if value > 0] or [math.nan])


def table(curves):
    """The lines of the table, one a curve."""
    rows = [["variant", "parameters", "finished", "loss", "baseline", COMPARISON]]
    rows[0] += ["ms a step", "ratio", "memory, MB", "ratio"]
    for curve in curves:
        row = [curve.label, f"{curve.config['parameters']:,}", f"{len(curve.done)} of {len(curve.runs)}"]
        row += [f"{curve.mean_final:.4f}", curve.baseline.label if curve.baseline else "", difference(curve)]
        for quantity, digits in (("ms_per_step", ".1f"), ("peak_memory_mb", ",.0f")):
            value = typical(curve, quantity)
            ratio = value / typical(curve.baseline, quantity) if curve.baseline else math.nan
            row += [f"{value:{digits}}", f"{ratio:.2f}"]
        rows.append(["" if cell in ("nan", "inf") else cell for cell in row])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


# ---------------------------------------------------------------------------------------------------
# Pictures of runs: the paper's figure 1 (loss), 4 (weights), 6 and 7 (scaling laws)

COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe, Ito: colour-blind safe
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2))]
BLACK = [{"color": "black", "linestyle": dash} for dash in DASHES]
COLOURED = [{"color": colour, "linestyle": dash} for dash, colour in product(DASHES, COLOURS)]


def looks(curves, drawable):
    """{curve: line style} of the drawable curves, as many as can be told apart, black for what others are
    compared with; and the line for the terminal that names the rest, if any."""
    baselines = {curve.baseline for curve in curves}
    black = [curve for curve in drawable if curve in baselines][: len(BLACK)]
    coloured = [curve for curve in drawable if curve not in black]
    styles = dict(zip(black, BLACK)) | dict(zip(coloured, COLOURED))
    rest = "; ".join(curve.label for curve in curves if curve not in styles)
    return styles, [f"not drawn, too many to tell apart or no scales.csv: {rest}"] if rest else []


def seed_lines(curve, relative):
    """{seed: {tokens: loss}} of the runs done or, while none is, of all; relative: minus the baseline's."""
    lines = {seed: run.loss for seed, run in (curve.done or curve.runs).items() if run.loss}
    if relative:
        theirs = seed_lines(curve.baseline, relative=False)
        lines = {seed: minus(line, theirs[seed]) for seed, line in lines.items() if seed in theirs}
    return lines


def draw_losses(axis, styles, relative):
    """Loss against tokens, or relative to the baseline's: seeds faint, and their mean where all have one.
    The limits are those of its last 70 %, of finished curves if any: the fall from ln(vocabulary) is cut."""
    decided = [curve for curve in styles if curve.done] or styles
    shown = [0.0] if relative else []
    for curve, style in styles.items():
        lines = seed_lines(curve, relative).values()
        for line in lines:
            axis.plot(list(line), list(line.values()), color=style["color"], linewidth=0.8, alpha=0.2)
        common = sorted(set.intersection(*map(set, lines))) if lines else []
        mean = [fmean(line[tokens] for line in lines) for tokens in common]
        label = f"{curve.label}, {len(curve.done)} of {len(curve.runs)} seeds  {difference(curve)}"
        axis.plot(common, mean, linewidth=1.8, label=label, **style)
        if curve in decided:
            shown += [loss for loss in mean[len(mean) * 3 // 10 :] if math.isfinite(loss)]
    low, high = min(shown, default=0), max(shown, default=0)
    margin = 0.1 * (high - low) + 1e-3
    axis.set(xlabel="tokens", ylim=(low - margin, high + margin))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def loss_picture(curves, args):
    """Loss against tokens and, beside it if anything is compared, minus the baseline's."""
    styles, lines = looks(curves, curves)
    compared = {curve: style for curve, style in styles.items() if curve.baseline}
    columns = 2 if compared else 1
    figure = Figure(figsize=(5 + 5 * columns, 5))
    left = figure.add_subplot(1, columns, 1, ylabel="validation loss, nats per token")
    draw_losses(left, styles, relative=False)
    if compared:
        right = figure.add_subplot(1, columns, 2, ylabel=f"minus {args.baseline}, nats per token")
        draw_losses(right, compared, relative=True)
        right.axhline(0, color="black", linewidth=1)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", title=COMPARISON)
    return figure, table(curves) + lines


SCALES = [(f"$\\Vert W_{c} \\Vert_F$", f".attention.{c.lower()}.W", ["norm"] * 3) for c in "QKV"]
SCALES += [("$\\gamma_b$, input side", ".gamma_b", ["min", "mean", "max"])]
SCALES += [("$\\gamma_a$, output side", ".gamma_a", ["min", "mean", "max"])]


def weights_picture(curves, args):
    """SCALES in the middle layer against the step, of each curve's lowest seed that has a scales.csv: the
    mean over the rows whose name ends so, shaded from the least to the largest."""
    recorded = {}
    for curve in curves:
        seeds = [seed for seed, run in curve.runs.items() if (run.folder / "scales.csv").is_file()]
        if seeds:
            recorded[curve] = curve.runs[min(seeds)]
    require(recorded, "no run has a scales.csv; train.py writes it, results/ keeps none")
    styles, lines = looks(curves, recorded)
    figure = Figure(figsize=(13, 7.6))
    figure.suptitle("Layer n_layer // 2, lowest seed")
    axes = figure.subplots(2, 3).ravel()
    for curve, style in styles.items():
        run = recorded[curve]
        middle, rows = f"blocks.{run.config['n_layer'] // 2}.", read_table(run.folder / "scales.csv")
        for axis, (title, ending, columns) in zip(axes, SCALES):
            by_step = {}
            for row in rows:
                if row["name"].startswith(middle) and row["name"].endswith(ending):
                    by_step.setdefault(int(row["step"]), []).append([float(row[name]) for name in columns])
            axis.set(title=title, xlabel="step")
            if by_step:
                low, mean, high = np.moveaxis(list(by_step.values()), 2, 0)  # each: (steps, vectors)
                axis.plot(list(by_step), mean.mean(1), label=curve.label, **style)
                axis.fill_between(list(by_step), low.min(1), high.max(1), color=style["color"], alpha=0.15)
    axes[5].axis("off")
    axes[5].legend(*axes[0].get_legend_handles_labels(), loc="center left")
    return figure, lines


def fit_power_law(C, L):
    """(E, a, b) of the least squares of L = E + a C^-b with E >= 0. Given b, it is linear in E and a."""
    b = np.geomspace(1e-3, 4, 100_000)
    x = (C[:, None] / C.max()) ** -b
    dx = x - x.mean(0)
    a = (L @ dx) / np.square(dx).sum(0)
    a = np.where(L.mean() >= a * x.mean(0), a, (L @ x) / np.square(x).sum(0))  # with E = 0
    E = np.maximum(0, L.mean() - a * x.mean(0))
    best = np.square(E + a * x - L[:, None]).sum(0).argmin()
    return E[best], a[best] * C.max() ** b[best], b[best]


def scaling_points(curves, norm_scale):
    """Two arrays: compute, 6 N D, and mean final loss at the best lr; one point a size, smallest first."""
    sizes, points = {}, []
    for curve in curves:
        if curve.settings["norm_scale"] == norm_scale and curve.done:
            sizes.setdefault(curve.config["activated_parameters"], []).append(curve)
    require(len(sizes) >= 4, f"a scaling law needs four finished sizes; {norm_scale} has {len(sizes)}")
    for size, rates in sizes.items():
        best, labels = best_rate(rates), "; ".join(curve.label for curve in rates)
        require(best, f"curves of one size differ in more than lr, give the folders of one: {labels}")
        tokens = best.config["steps"] * best.config["batch_size"] * best.config["seq_len"]
        points.append((6 * size * tokens, best.mean_final))
    return np.array(sorted(points)).T


def scaling_picture(curves, args):
    """The laws of --baseline and --variant, and the compute saved at equal loss."""
    # Not steps, batch_size, seq_len: they grow with the paper's sizes.
    same = ("data", "vocab_size", "eval_tokens", "gemma", "n_expert", "optimizer", "schedule", "weight_decay")
    for name in differing([curve.config for curve in curves]):
        require(name not in same, f"the runs are not of the same {name}: give the folders of one")
    figure, fits, lines = Figure(figsize=(8, 5)), [], []
    axis = figure.subplots()
    for name, colour, dash in ((args.baseline, "black", "-"), (args.variant, COLOURS[1], "--")):
        C, L = scaling_points(curves, name)
        E, a, b = fit_power_law(C, L)
        require(a > 0, f"the losses of {name} do not fall with compute")
        fits.append((E, a, b))
        lines.append(f"{name}: L(C) = {E:.4f} + {a:.4g} C^-{b:.4f}, {len(C)} sizes")
        C_line = np.geomspace(C[0] / 1.5, C[-1] * 1.5, 200)
        axis.plot(C_line, E + a * C_line**-b, color=colour, linestyle=dash, label=lines[-1])
        axis.plot(C, L, "o", color=colour)
    (E_base, a_base, b_base), (E, a, b) = fits
    equal = E_base + a_base * C[-1] ** -b_base  # the baseline's loss, with the variant's largest compute
    gain = C[-1] * (max(0, equal - E) / a) ** (1 / b)  # over the variant's compute for that loss
    lines.append(f"{args.variant} against {args.baseline}: {gain:.2f}x compute at equal loss ({equal:.4f})")
    axis.set(xscale="log", xlabel="6 x activated parameters x tokens, FLOPs", ylabel="loss, nats per token")
    axis.legend(title=f"{gain:.2f}x compute at equal loss", loc="upper right")
    return figure, lines


# ---------------------------------------------------------------------------------------------------
# The theory: what the theorems predict (lines) and what norms.py does (marks). The module norms is handed to
# the panels, as it imports torch, which takes seconds and which no other picture asks for.

LOOKS = {"none": ("black", "o"), "standard": (COLOURS[0], "D"), "dp": (COLOURS[1], "^")}
LOOKS |= {"or": (COLOURS[2], "v"), "dp+or": (COLOURS[3], "P")}
LOOKS |= {0: (COLOURS[4], "X"), 0.1: (COLOURS[5], "*"), 0.5: ("0.4", "d")}  # mu of panel (d)


def compare(axis, name, label, t, predicted, measured, at=slice(0, None, 40)):
    """A predicted line, the measured marks at some of its points, and both in the legend."""
    colour, marker = LOOKS[name]
    axis.plot(t, predicted, color=colour, marker=marker, markevery=[], label=label)
    axis.plot(t[at], measured[at], marker, color=colour)


def flow(norms, variant, teacher, t_end, steps):
    """t and the loss at t under gradient flow from the standard start: two arrays."""
    branch, loss = norms.student(variant, teacher), partial(norms.population_loss, teacher=teacher)
    return np.array([(t, loss(branch).item()) for t in norms.gradient_flow(branch, loss, t_end, steps)]).T


def whole_course(axis, norms, teacher):
    """(a) The teacher is the identity. A diagonal entry r of W obeys dr/dt = G (1 - r G), where G(r) is the
    product of its scales, given by the conservation laws. Integrated by the midpoint rule."""
    d = len(teacher)
    laws = [("none", lambda r: 1, "1"), ("standard", lambda r: (1 + r**2) ** 0.5, r"\sqrt{1 + r^2}")]
    laws += [("dp", lambda r: 1 + r**2, "1 + r^2"), ("dp+or", lambda r: 1 + d * r**2, r"1 + d\,r^2")]
    laws += [("or", lambda r: (1 + d * r**2) ** 0.5, r"\sqrt{1 + d\,r^2}")]
    for variant, G, words in laws:
        t, measured = flow(norms, variant, teacher, t_end=2, steps=400)
        r, predicted = 0.0, []
        for _ in t:
            predicted.append(d / 2 * (1 - r * G(r)) ** 2)
            halfway = r + t[1] / 2 * G(r) * (1 - r * G(r))
            r += t[1] * G(halfway) * (1 - halfway * G(halfway))
        compare(axis, variant, f"{variant}: $G = {words}$", t, predicted, measured)
    axis.set(title=f"(a) Theorems 2.2, 3.1, 3.2: $W^* = I$, $d = {d}$", xlabel="$t$", ylabel="$L$")
    axis.set(yscale="log", ylim=(1e-8, 4))
    axis.legend(title=r"lines: $\dot r = G\,(1 - r\,G)$", loc="lower left")


def early_difference(axis, norms, teacher):
    """(b) From the standard start, L_slower - L_faster = (2/3) c t^3 + O(t^4)."""
    d_out, d = teacher.shape
    laws = [("standard", "none", teacher.norm(dim=0).pow(4).sum(), r"$\Sigma_j\,\Vert W^*_{:j}\Vert^4$")]
    laws += [("dp", "standard", teacher.norm(dim=1).pow(4).sum(), r"$\Sigma_i\,\Vert W^*_{i:}\Vert^4$")]
    laws += [("or", "standard", (1 - 1 / d) * teacher.norm() ** 4, r"$(1 - 1/d)\,\Vert W^*\Vert_F^4$")]
    at = np.unique(np.geomspace(1, 300, 13).astype(int)) - 1
    for faster, slower, c, words in laws:
        t, low = flow(norms, faster, teacher, t_end=0.3, steps=300)
        high = flow(norms, slower, teacher, t_end=0.3, steps=300)[1]
        label = f"{faster} below {slower}: $c$ = {words}"
        compare(axis, faster, label, t[1:], 2 / 3 * c.item() * t[1:] ** 3, (high - low)[1:], at)
    axis.set(title=f"(b) Theorems D.1, D.2: random $W^*$, ${d_out} \\times {d}$", xlabel="$t$")
    axis.set(ylabel="difference in $L$", xscale="log", yscale="log", ylim=(1e-11, 1e4))
    axis.legend(title=r"lines: $\frac{2}{3}\,c\,t^3$")


def matched_states(axis, norms, teacher, draw):
    """(c) The speed -dL/dt = ||grad L||^2 of `dp`, `or` over that of `standard` with the same A and gamma_b, at
    random raw parameters (alpha normalised) that meet the theorem's condition on `scale` or (grey) do not."""
    laws = [("dp", r"\gamma_a^2 < 1", "gamma_a.gamma", -1), ("dp", r"\gamma_a^2 \geq 1", "gamma_a.gamma", 1)]
    laws += [("or", r"\beta^2 < 1", "gamma_b.beta", -1), ("or", r"\beta^2 \geq 1", "gamma_b.beta", 1)]
    for variant, words, scale, power in laws:
        speeds = []
        for _ in range(150):
            branch, standard = norms.student(variant, teacher), norms.student("standard", teacher)
            raw = {name: draw(*parameter.shape) for name, parameter in branch.named_parameters()}
            raw["W"] *= 10 ** -draw(1).abs()
            if variant == "or":
                raw["gamma_b.alpha"] = norms.normalize(raw["gamma_b.alpha"])
            raw[scale] = (1 + raw[scale].abs()) ** power  # every entry above 1, or every entry below
            branch.load_state_dict(raw)
            gamma_b = branch.gamma_b().detach()
            standard.load_state_dict({"W": branch.effective_weight() / gamma_b, "gamma_b.gamma": gamma_b})
            for module in (standard, branch):
                norms.population_loss(module, teacher).backward()
                speeds.append(sum(parameter.grad.square().sum().item() for parameter in module.parameters()))
        colour = LOOKS[variant][0] if power > 0 else "0.7"
        ratios = np.divide(speeds[1::2], speeds[::2])
        axis.plot(speeds[::2], ratios, LOOKS[variant][1], color=colour, label=f"{variant}, ${words}$")
    axis.axhline(1, color="black", linewidth=1)
    axis.set(title="(c) Theorems 3.1, 3.2: at matched states", xscale="log", yscale="log")
    axis.set(xlabel="$-dL/dt$ of standard", ylabel="that of dp, of or, relative to it", ylim=(0.1, 500))
    axis.legend(title="line: as fast as standard")


def noise_and_decay(axis, norms, teacher):
    """(d) Each column is a path of one coordinate: target 1, decay 1/2 on w and mu on g, noise q = 1/4. The
    invariant density is exp(-2 F / q), with F the loss and its decay; for mu = 0 its integral diverges."""

    def loss(branch, mu):
        decay = branch.W.square().sum() / 4 + mu / 2 * branch.gamma_b().square().sum()
        return norms.population_loss(branch, teacher) + decay

    w, g = np.mgrid[-6:6:601j, -6:6:601j]
    for mu in (0, 0.1, 0.5):
        branch, seen = norms.student("standard", teacher), []
        for t in norms.gradient_flow(branch, partial(loss, mu=mu), t_end=20, steps=400, noise=0.25):
            seen.append((t, branch.gamma_b().square().mean().item(), branch.W.square().mean().item()))
        t, g_squared, w_squared = np.transpose(seen)
        slope = w_squared - 2 * mu * g_squared  # of E[g^2 - w^2]; its integral by trapezoids
        law = 1 + w_squared + t[1] * (np.cumsum(slope) - (slope + slope[0]) / 2)
        compare(axis, mu, f"$\\mu$ = {mu}", t, law, g_squared)
        if mu > 0:
            F = ((w * g - 1) ** 2 + w**2 / 2 + mu * g**2) / 2
            mean = np.average(g**2, weights=np.exp(-2 * F / 0.25))
            axis.axhline(mean, color="0.4", linewidth=1, linestyle=":")
    axis.lines[-1].set_label("mean of the invariant measure")
    axis.set(title="(d) Theorem 2.3: noise, decay $\\mu$ on $g$", xlabel="$t$", ylim=(0, 11))
    axis.set_ylabel(r"$E\,\Vert g\Vert^2$")
    axis.legend(title=r"lines: $d\,E[g^2 - w^2]/dt = 2\lambda\,E\,w^2 - 2\mu\,E\,g^2,\ \lambda = 1/2$")


def theory_picture(curves, args):
    """Gradient flow from the standard start (a, b) and at matched states (c); noise and decay (d)."""
    import norms
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices so small only suffer from a second one
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = draw(3, 12) / 6  # a norm of about 1
    figure = Figure(figsize=(10, 8.6))
    figure.suptitle("Lines: what the theorems predict. Marks: what the modules of norms.py do.")
    (a, b), (c, d) = figure.subplots(2, 2)
    whole_course(a, norms, torch.eye(4, dtype=torch.float64))
    early_difference(b, norms, teacher)
    matched_states(c, norms, teacher, draw)
    noise_and_decay(d, norms, torch.ones(1, 20_000, dtype=torch.float64))
    torch.set_num_threads(threads)
    return figure, []


# ---------------------------------------------------------------------------------------------------
# Command line. Each kind makes a figure, and lines for the terminal, of the curves and the arguments.

PICTURES = {"loss": loss_picture, "weights": weights_picture}
PICTURES |= {"scaling": scaling_picture, "theory": theory_picture}
STYLE = {"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "lines.markersize": 5}
STYLE |= {"lines.markerfacecolor": "white", "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"legend.frameon": False, "legend.fontsize": 9, "legend.loc": "upper left"}


def main(arguments=None):
    parser = CommandLine("plot.py", description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("folders", nargs="*", type=expanded_path, default=["runs"], help="searched for runs (default: runs)")
    flag("--kind", choices=PICTURES, default="loss", help="which picture (default: loss)")
    flag("--baseline", default="standard", help="norm scale to compare with (default: standard)")
    flag("--variant", default="unified", help="scaling: norm scale to compare (default: unified)")
    flag("--out", type=expanded_path, help=".png, .pdf, .svg or .jpg to write (default: <kind>.png)")
    args = parser.parse_args(arguments)
    out, whole = Path(args.out or f"{args.kind}.png"), io.BytesIO()
    try:
        with matplotlib.style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
            runs, told = ([], []) if args.kind == "theory" else read_runs(args.folders)
            curves = make_curves(runs, args.baseline)
            figure, lines = PICTURES[args.kind](curves, args)
            figure.savefig(whole, format=out.suffix[1:].lower(), dpi=120)
        out.write_bytes(whole.getvalue())  # a picture is there as a whole or not at all
    except UserError as mistake:
        parser.error(str(mistake))
    except (ValueError, OSError, LookupError, TypeError) as mistake:
        parser.error(f"{type(mistake).__name__}: {mistake}")
    for line in told:
        print("plot.py:", *line.split(), file=sys.stderr)
    print(*lines, out, sep="\n")


if __name__ == "__main__":
    main()
