"""The second reading of the paper, then the promises of the trainer.

    python -m pytest                # all but what the marks below ask for
    python -m pytest -m peers       # against transformers' models, where it is installed
    python -m pytest -m kill        # a run killed twenty times: some minutes
    python -m pytest -m gpu         # where there is one

Equations are checked in float64 against formulas that are written out here once more, activation by activation.
"""

import csv
import dataclasses
import errno
import hashlib
import http.server
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken

import train  # before torch, for the allocator  # isort: skip
import torch
import torch.nn.functional as F

import norms
import plot
import prepare_data
from model import PRESETS, Attention, Config, MixtureOfExperts, SwiGLU, Transformer, count, llama_state_dict, rotations
from norms import GRAMMAR, Branch, NormScale, OutputNorm, ScaleVector, decay_groups, fold, normalize, shared_vector

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # marks need no file of their own
HERE = Path(__file__).parent


def all_labels(rows):
    """Every string of the grammar over these of its rows, in the table's order."""
    for parts in itertools.product(*([None, *GRAMMAR[row]] for row in rows)):
        yield "+".join(part for part in parts if part) or "standard"


FORMS = ["none", *all_labels(["branches", "placement", "parameters"])]  # each another function
POLICIES = list(all_labels(GRAMMAR))  # with each weight decay
FOLDABLE = [form for form in FORMS if "dnp" not in form]
MODELS = ["tiny", "gemma-tiny", "moe-tiny"]


def small_config(variant, model="tiny", **sizes):
    """Two layers, 40 wide; the experts of moe-tiny get a hidden width of 26."""
    kind = {key: PRESETS[model][key] for key in ("gemma", "n_expert", "top_k") if key in PRESETS[model]}
    sizes = dict(d_model=40, n_head=2, n_layer=2, d_ff=48, vocab_size=64, seq_len=17) | kind | sizes
    return Config(norm_scale=NormScale.parse(variant), **sizes)


def small_model(variant, model="tiny", seed=0, stir=0.0, **sizes):
    """A small model whose raw scale parameters are `stir` away from their start."""
    built = Transformer(small_config(variant, model, **sizes)).init_weights(seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            if p.ndim == 1:
                p += stir * torch.randn(p.shape, generator=generator)
    return built


TOKENS = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(2))


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
    """A branch of n = Norm(x): scale vectors on the activations, the Norm over the outputs of each head or of all."""
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
    branches = torch.nn.ModuleList(Branch(12, 8, scale, shared, head_dim) for _ in range(3)).double()
    for branch in branches:
        if qk_norm and branch.norm is None:
            branch.norm = OutputNorm(4, scale).double()
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
    [  # what each row of Table 1 puts around a branch, and how many scale vectors three branches of one Norm have
        ("none", set(), 0),
        ("standard", {"v"}, 1),
        ("hg", {"v"}, 3),
        ("ap", {"u"}, 3),
        ("hg+ap", {"u"}, 3),
        ("dp", {"v", "u"}, 4),
        ("hg+dp", {"v", "u"}, 6),
        ("dnp", {"v", "norm"}, 4),
        ("hg+dnp", {"v", "norm"}, 6),
    ],
)
def test_rows_of_table_1(form, expected, vectors):
    attention = small_model(form).blocks[0].attention
    assert all(slots(branch) == expected for branch in (attention.q, attention.k, attention.v))
    assert sum(isinstance(m, ScaleVector) for m in attention.modules()) == vectors
    gates = small_model(form, "moe-tiny").blocks[0].ffn
    assert slots(gates.router) == expected & {"v"} and slots(gates.experts[3].up) == expected
    if "dnp" in form:  # per head for Q, K and V, over the whole output for the others, with a vector as long as it
        assert attention.q.norm.width == 20 and attention.q.norm.u().numel() == 40
        assert gates.experts[3].up.norm.width == gates.experts[3].up.norm.u().numel() == 26


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", FOLDABLE)
def test_at_the_start_the_function_is_that_of_none(form, model):
    logits = small_model(form, model)(TOKENS)
    torch.testing.assert_close(logits, small_model("none", model)(TOKENS), rtol=1e-6, atol=1e-6)


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


def test_norm_has_rms_one_and_its_own_derivative():
    x = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(normalize(1e6 * x).norm(dim=-1), torch.full((4,), math.sqrt(10.0)).double())
    torch.testing.assert_close(normalize(1e-3 * x), rms_norm(1e-3 * x))  # where eps is felt
    assert torch.autograd.gradcheck(normalize, x.requires_grad_())


def test_norm_keeps_statistics_out_of_bfloat16():
    x = (torch.randn(1000, 64) * 300).bfloat16()
    torch.testing.assert_close(normalize(x).float(), rms_norm(x.float()), rtol=2**-8, atol=0.0)


def test_norm_behind_a_branch_is_sound_in_bfloat16():
    """mean((W n)^2) as n^T (W^T W / d_out) n would be -0.0078 here, where 3.8e-5 is true; all is exact in bfloat16."""
    W = torch.tensor([[1, 1 + 2**-7]] * 5 + [[1.0, 1.0]] * 3)
    branch = Branch(2, 8, NormScale.parse("dnp"))
    branch.W.data = W
    n = torch.tensor([[1.0, -1.0]]).bfloat16()
    y = branch.norm(n @ branch.effective_weight().bfloat16().T)
    assert y.dtype == torch.bfloat16 and y.float().square().mean().sqrt().item() == pytest.approx(1, rel=0.03)
    exact = rms_norm(n.float() @ W.T)
    torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=0)


def test_gamma_is_multiplied_in_float32():
    norm, y = OutputNorm(64, NormScale()), torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm.u.gamma.data += 2**-9  # in bfloat16 this is 1 still
    expected = ((1 + 2**-9) * rms_norm(y.float())).bfloat16()
    assert norm(y).dtype == torch.bfloat16 and (norm(y) == expected).float().mean() > 0.99
    assert (normalize(y) == expected).float().mean() < 0.7


# ---------------------------------------------------------------------------------------------------
# The grammar, counts and groups


@pytest.mark.parametrize("label", [*POLICIES, "none"])
def test_labels_come_back_in_the_tables_order(label):
    scale = NormScale.parse(label)
    shuffled = " " + "+".join(reversed(label.split("+"))).upper()
    names = {"hg+dnp+or+iwd": "unified", "iwd": "standard+iwd", "owd": "standard+owd", "nowd": "standard+nowd"}
    assert scale.label == names.get(label, label)
    assert NormScale.parse(shuffled) == scale and NormScale.parse(scale.label) == scale
    assert all(any(line.startswith(part) for line in scale.describe()) for part in label.split("+"))


@pytest.mark.parametrize(
    "text, words",
    [
        ("hgg", ["'hgg'", "'hg'"]),
        ("standart", ["'standart'", "'standard'"]),
        ("ap+dp", ["'dp'", "'ap'", "at most one part for placement"]),
        ("or+er", ["at most one"]),
        ("none+hg", ["'none' stands alone"]),
        ("unified+ap", ["at most one"]),
        ("", ["unknown part ''"]),
        ("hg++or", ["unknown part ''"]),
    ],
)
def test_a_mistake_in_the_string_is_named(text, words):
    with pytest.raises(ValueError) as caught:
        NormScale.parse(text)
    assert all(word in str(caught.value) for word in [*words, "none, standard, unified, or parts joined by +"])
    assert "\n" not in str(caught.value)


def settings(*flags):
    """The Settings of one run, for data of 64 different tokens."""
    args = vars(train.command_line().parse_args(list(flags)))
    one = {name: values[0] for name, values in args.items() if isinstance(values, list)}
    return train.resolve(args | one, train.Machine("cpu"), 64)[0]


def counts(name, variant="standard", *flags):
    return count(train.make_config(settings(f"--model={name}", f"--norm-scale={variant}", *flags)))


@pytest.mark.parametrize(
    "name, parameters, activated",
    [
        ("llama-0.12b", 119_744_256, None),
        ("llama-0.25b", 254_018_560, None),
        ("llama-0.5b", 482_696_960, None),
        ("llama-0.75b", 749_142_528, None),
        ("llama-1b", 1_028_065_024, None),
        ("gemma-0.5b", 482_745_344, None),
        ("moe-0.25b", 251_044_480, 113_633_920),
        ("moe-0.5b", 480_942_336, 183_671_040),
        ("moe-0.8b", 797_327_040, 281_231_040),
        ("moe-1b", 1_058_931_712, 354_976_768),
        ("moe-2b", 1_996_574_720, 620_856_320),
    ],
)
def test_parameters_and_steps_are_the_papers(name, parameters, activated):
    activated = activated or parameters
    assert (counts(name).parameters, counts(name).activated_parameters) == (parameters, activated)
    s = settings(f"--model={name}")
    assert s.steps == round(100 * activated / (s.batch_size * s.seq_len)) and s.batch_size == 512
    assert s.micro_batch_size * s.seq_len == 32_768 and s.warmup_steps == s.steps // 20


def test_scale_vectors_are_as_many_as_the_papers():
    assert counts("llama-1b").scale_parameters == 80_640
    assert counts("llama-0.12b", "none").scale_parameters == 0
    unified = counts("llama-0.12b", "unified").parameters
    assert unified == 119_846_784 + 62 and unified - counts("llama-0.12b").parameters == 102_528 + 62
    assert round(counts("llama-0.12b", "standard", "--d-ff=+8").parameters / 1e9, 5) == 0.11985  # figure 10's control
    # Section 4.4 by its own definitions: unified adds 4.84e-4 to Llama-1B, without the betas.
    added = counts("llama-1b", "hg+dnp").parameters - 1_028_065_024
    assert round(added / 1_028_065_024, 6) == 4.84e-4
    assert counts("llama-0.12b", "hg+ap") == counts("llama-0.12b", "ap")
    idle = counts("moe-tiny", "hg").parameters - counts("moe-tiny", "hg").activated_parameters
    assert idle == 4 * 6 * (3 * 64 * 42 + 2 * 64)  # 6 experts a layer, with the vectors of their own


def test_flops_count_matrices_without_the_embedding_and_half_of_the_square():
    d, f, layers, T, V = 768, 2048, 6, 1024, 50_304
    forward = 2 * (layers * (4 * d * d + 3 * d * f) + V * d) + layers * 2 * (2 * d * T) / 2
    assert counts("llama-0.12b", "unified").flops_per_token == 3 * forward
    E, k, f_e = 32, 4, 426  # the router, the shared expert and 4 routed ones
    active = 4 * 640**2 + E * 640 + 3 * 640 * 1706 + k * 3 * 640 * f_e
    assert counts("moe-0.25b", "unified").flops_per_token == 6 * (6 * active + V * 640) + 6 * 6 * T * 640


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("label", [*POLICIES, "none"])
def test_every_parameter_decays_as_its_role_says(label, model):
    with torch.device("meta"):
        built = Transformer(small_config(label, model))
    groups = decay_groups(built, NormScale.parse(label), 0.1)
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(list(built.parameters()))
    assert all(group["params"] for group in groups)
    policy = next((part for part in ("iwd", "owd", "nowd") if part in label.split("+")), "all")
    for name, p in built.named_parameters():
        behind_a_norm = ".norm.u" in name or "_out.u" in name
        if p.ndim == 2:
            assert decay[p] == 0.1
        else:
            assert decay[p] == (0.1 if policy == "all" or policy == ("owd" if behind_a_norm else "iwd") else 0.0), name


# ---------------------------------------------------------------------------------------------------
# The transformer, against one written out


def naive_attention(q, k, v, n_head):
    """Causal attention with RoPE as one complex number a channel pair, position by position; q, k, v (B, T, d)."""
    B, T, d = q.shape
    h = d // n_head
    frequency = 10_000.0 ** (-torch.arange(0, h, 2, dtype=torch.float64) / h)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    out = torch.zeros_like(q)
    for part in (slice(head * h, (head + 1) * h) for head in range(n_head)):
        qh, kh = turned(q[..., part]), turned(k[..., part])
        for t in range(T):
            p = (qh[:, t, None] * kh[:, : t + 1]).sum(-1).div(math.sqrt(h)).softmax(-1)
            out[:, t, part] = (p[..., None] * v[:, : t + 1, part]).sum(1)
    return out


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

    config = model.config
    x, balances = model.embedding[tokens], []
    for block in model.blocks:
        a, n = block.attention, rms_norm(x)
        q, k, v = (naive_branch(branch, n, form, config.d_model // config.n_head) for branch in (a.q, a.k, a.v))
        x = x + emitted(block.attention_out, naive_attention(q, k, v, config.n_head) @ a.o.T)
        if config.n_expert:
            y, balance = naive_moe(block.ffn, rms_norm(x), form)
            balances.append(balance)
        else:
            y = naive_ffn(block.ffn, rms_norm(x), form)
        x = x + emitted(block.ffn_out, y)
    logits = naive_branch(model.head, rms_norm(x), form)
    loss = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    return logits, loss, sum(balances) / len(balances) if balances else torch.zeros(())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_the_transformer_is_the_one_written_out(form, model):
    built = small_model(form, model, stir=0.2)
    with torch.no_grad():
        for p in built.parameters():
            p.mul_(4 if p.ndim == 2 else 1)  # weights large enough that attention and router are not flat
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    expected_logits, *expected = naive_transformer(built, inputs, targets, form)
    loss, balance, load = built(inputs, targets)
    torch.testing.assert_close(built(inputs), expected_logits, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close((loss, balance), tuple(e.to(loss.dtype) for e in expected), rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(loss + balance, list(built.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(sum(expected), list(built.parameters()), allow_unused=True)
    for (name, p), a, b in zip(built.named_parameters(), ours, theirs):
        b = torch.zeros_like(p) if b is None else b.to(p.dtype)
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5, name
    if load is not None:
        torch.testing.assert_close(load.sum(-1), torch.ones(2, 3))


def test_experts_without_tokens_have_gradients_of_zero():
    ffn = small_model("unified", "moe-tiny", stir=0.2).blocks[0].ffn
    n = torch.randn(1, 3, 40, requires_grad=True)  # 6 visits to 8 experts
    (y, balance, load), (expected, expected_balance) = ffn(n), naive_moe(ffn, n, "hg+dnp+or")
    torch.testing.assert_close((y, balance), (expected, expected_balance), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), n, retain_graph=True)[0] for out in (y, expected)))
    y.sum().backward()
    (idle, *_) = (load[0] == 0).nonzero()[0]
    assert all(p.grad is not None and not p.grad.any() for p in ffn.experts[idle].parameters())


def test_balance_loss_is_one_where_the_load_is_even():
    ffn = MixtureOfExperts(small_config("none", "moe-tiny"))
    for p in ffn.parameters():
        torch.nn.init.normal_(p, std=0.02)
    torch.nn.init.zeros_(ffn.router.W)
    assert ffn(torch.randn(1, 8, 40))[1].item() == pytest.approx(1.0)


def test_gemma_under_dnp_has_one_norm_on_q_and_k():
    unified, dp, none = (small_model(form, "gemma-tiny") for form in ("unified", "hg+dp", "none"))
    assert unified.blocks[0].attention.q.norm.u().numel() == 40  # DNP's, not one vector for all heads
    q, v = dp.blocks[0].attention.q, dp.blocks[0].attention.v
    assert slots(q) == {"v", "u", "norm"} and slots(v) == {"v", "u"} and q.norm.u().numel() == q.norm.width == 20
    assert not any(p.ndim == 1 for p in none.parameters())


def test_variants_of_one_seed_start_from_the_same_matrices():
    one, other = ({n: p for n, p in small_model(v, seed=3).named_parameters() if p.ndim == 2} for v in ("none", "unified"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert not torch.equal(one["embedding"], small_model("none", seed=4).embedding)
    for model in ("tiny", "moe-tiny"):
        built = small_model("none", model)
        small = {m.o for m in built.modules() if isinstance(m, Attention)}
        small |= {m.down for m in built.modules() if isinstance(m, SwiGLU)}
        for p in built.parameters():  # onto the residual stream: 0.02 / sqrt(2 * 2 layers)
            assert p.std().item() == pytest.approx(0.01 if p in small else 0.02, rel=0.15)


def test_generation_samples_from_the_last_position():
    built, tokens = small_model("none"), TOKENS[:1]
    with torch.no_grad():
        built.head.W.mul_(50)
    expected, generator = tokens, torch.Generator().manual_seed(0)
    for _ in range(4):
        p = built(expected[:, -17:])[0, -1].softmax(-1)
        expected = torch.cat([expected, torch.multinomial(p, 1, generator=generator)[None]], 1)
    assert torch.equal(built.generate(tokens, 4, torch.Generator().manual_seed(0)), expected)


def test_a_model_made_empty_is_whole_once_its_state_is_loaded():
    before = small_model("unified", stir=0.2)
    with torch.device("meta"):
        after = Transformer(before.config)
    after = after.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*after.parameters(), *after.buffers()):
            tensor.fill_(math.nan)
    after.load_state_dict(before.state_dict())
    assert torch.equal(after(TOKENS), before(TOKENS))


# ---------------------------------------------------------------------------------------------------
# Optimisers, schedules, presets


@pytest.mark.parametrize("model", MODELS)
def test_muon_takes_the_matrices_inside_the_blocks_and_moves_each_by_the_papers_step(model):
    s = settings(f"--model={model}", "--norm-scale=unified", "--optimizer=muon", "--weight-decay=0")
    built = Transformer(dataclasses.replace(train.make_config(s), n_layer=2)).init_weights(0)
    muon, adamw = train.make_optimizers(built, s)
    assert isinstance(muon, torch.optim.Muon) and (muon.defaults["momentum"], muon.defaults["nesterov"]) == (0.95, True)
    inside = {p: p.detach().clone() for p in built.blocks.parameters() if p.ndim == 2}
    assert {p for group in muon.param_groups for p in group["params"]} == inside.keys()
    tokens = torch.randint(64, (8, 65), generator=torch.Generator().manual_seed(0))
    built(tokens[:, :-1], tokens[:, 1:])[0].backward()
    muon.step()
    for p, before in inside.items():
        assert (p.detach() - before).square().mean().sqrt().item() == pytest.approx(0.18 * s.lr, rel=0.2)


def test_optimisers_have_the_papers_settings():
    s = settings("--norm-scale=unified", "--optimizer=muon", "--weight-decay=0.3")
    optimizers = train.make_optimizers(small_model("unified"), s)
    assert [o.defaults["lr"] for o in optimizers] == [s.lr, s.lr] and optimizers[1].defaults["betas"] == (0.9, 0.95)
    decay = [(group["name"], group["weight_decay"]) for o in optimizers for group in o.param_groups]
    expected = [("matrices", 0.3), ("matrices", 0.3), ("Input-Norm scale vectors", 0.3), ("Output-Norm scale vectors", 0.0)]
    assert decay == expected


@pytest.mark.parametrize(
    "schedule, step, factor",
    [
        ("cosine", 0, 1 / 10),
        ("cosine", 9, 1),
        ("cosine", 10, 1),
        ("cosine", 55, 1 / 20 + 19 / 40),
        ("cosine", 100, 1 / 20),
        ("wsd", 4, 1 / 2),
        ("wsd", 80, 1),
        ("wsd", 90, 1 / 2),
        ("wsd", 99, 1 / 20),
        ("wsd", 100, 0),
    ],
)
def test_learning_rate(schedule, step, factor):
    s = settings(f"--schedule={schedule}", "--steps=100", "--lr=0.5")
    assert s.warmup_steps == 10 and train.learning_rate(s, step) == pytest.approx(0.5 * factor)


def test_learning_rate_where_all_is_warmup_or_nothing_is():
    assert train.learning_rate(settings("--steps=10", "--lr=1"), 9) == 1
    assert train.learning_rate(settings("--steps=3", "--lr=1", "--warmup-steps=0"), 0) == 1
    assert train.learning_rate(settings("--steps=5", "--lr=1", "--warmup-steps=100"), 4) == 0.05


def test_presets_and_what_follows_from_flags():
    llama = "--model=llama-0.12b"
    assert settings(llama).lr == 4e-3 and settings(llama, "--optimizer=muon").lr == 5e-3
    assert settings(llama, "--schedule=wsd").lr == 3e-3 and settings("--model=moe-2b").lr == 6e-4
    assert settings("--model=moe-0.5b", "--optimizer=muon").lr == settings("--model=gemma-0.5b", "--optimizer=muon").lr == 4e-3
    assert settings(llama, "--batch-size=48").micro_batch_size == 24
    small = settings("--model=small")
    assert (small.d_model, small.lr, small.steps, small.eval_every, small.d_ff) == (128, 2e-3, 6000, 750, 341)
    assert settings("--d-ff=+8").d_ff == 178 and settings("--d-model=96", "--d-ff=7").d_ff == 7
    assert settings("--tokens=1025").steps == 2 and settings("--steps=6000").warmup_steps == 300
    s = settings()
    assert (s.batch_size, s.seq_len, s.steps, s.lr, s.d_ff, s.vocab_size) == (8, 128, 2000, 4e-3, 170, 64)
    assert (s.dtype, s.compile, s.micro_batch_size, s.checkpoint_every, s.eval_tokens) == ("float32", "off", 8, 250, 131_072)


# ---------------------------------------------------------------------------------------------------
# The theory: gradient flow on the trained classes against closed forms (the paper's sections 2 and 3, appendix D)
#
# d_out = 4, d_in = 3. L_none is the paper's L_g (no scale vector), L_standard its L_f. R = W* - A.

TEACHER = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def branch(variant, seed, teacher=TEACHER, **raw):
    """A branch with random raw parameters, but those given: W, v_gamma, u_gamma, v_alpha, ..."""
    module = norms.student(variant, teacher)
    for i, (name, parameter) in enumerate(module.named_parameters()):
        given = raw.get(name.replace(".", "_"))
        parameter.data = draw(*parameter.shape, seed=100 * seed + i) if given is None else given.detach()
    return module


def jacobian(outputs, parameters):
    """J = d outputs / d parameters, a row an output: (number of outputs, number of parameters)."""
    parameters = list(parameters)
    rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in outputs.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def flow(variant, teacher, t_end, steps, observe):
    """[t, then each quantity that observe(module) returns], stacked over the steps from the standard start."""
    module, loss = norms.student(variant, teacher), partial(norms.population_loss, teacher=teacher)
    times = norms.gradient_flow(module, loss, t_end, steps)
    seen = [[torch.tensor(t, dtype=torch.float64), *(y.detach() for y in observe(module))] for t in times]
    return [torch.stack(quantity) for quantity in zip(*seen)]


def losses(variant, teacher, t_end=2.0, steps=400):
    return flow(variant, teacher, t_end, steps, lambda m: [norms.population_loss(m, teacher)])[1]


def parts_of(module):
    """M, v = gamma_b and u = gamma_a; 1 where there is no vector."""
    one = torch.ones(1, dtype=torch.float64)
    return module.W, one if module.v is None else module.v(), one if module.u is None else module.u()


def P_of(vector):
    """The preconditioner of one scale vector, as norms.py states it."""
    d = len(vector())
    if hasattr(vector, "gamma"):
        return torch.eye(d, dtype=torch.float64)
    if vector.form is norms.FORMS["or"][1]:
        q = vector.alpha * d**0.5 / vector.alpha.norm()
        along = torch.outer(q, q)
        return along + vector.beta**2 * d / vector.alpha.norm() ** 2 * (torch.eye(d) - along / d)
    if vector.form is norms.FORMS["er"][1]:
        gamma = torch.exp(vector.beta + vector.alpha - vector.alpha.sum() / d)
        return torch.diag(gamma**2) + (1 - 1 / d) * torch.outer(gamma, gamma)
    with torch.enable_grad():
        J = jacobian(vector(), vector.parameters())  # of a form of your own
    return J @ J.T


def dissipation(module, teacher=TEACHER):
    """-dL/dt under gradient flow: the squared norm of the gradient."""
    gradients = torch.autograd.grad(norms.population_loss(module, teacher), list(module.parameters()))
    return sum(g.square().sum() for g in gradients)


def time_of(r, s, scale):
    """When a scalar problem reaches r: dr/dt = G(r) (s - r G(r)) from r = 0, where `scale` is G, the product of the
    scales that the conservation laws leave at r. By Gauss-Legendre quadrature."""
    node, weight = map(torch.tensor, np.polynomial.legendre.leggauss(100))
    rho = r[..., None] * (node + 1) / 2
    return (weight / (scale(rho) * (s[..., None] - rho * scale(rho)))).sum(-1) * r / 2


def test_theorem_2_2_input_scales_help():
    t, loss, U, g = flow("standard", TEACHER, 1.0, 400, lambda m: [norms.population_loss(m, TEACHER), *parts_of(m)[:2]])
    none = losses("none", TEACHER, 1.0, 400)
    torch.testing.assert_close(none, torch.exp(-2 * t) * TEACHER.square().sum() / 2, rtol=1e-9, atol=0)
    assert (loss[1:] < none[1:]).all()
    torch.testing.assert_close(g**2 - U.square().sum(1), torch.ones_like(g), rtol=0, atol=1e-8)
    # The whole curve: with ||u_j|| = r, g_j = sqrt(1 + r^2) by the conservation law, and r obeys a scalar equation.
    r, s = U[1:].norm(dim=1), TEACHER.norm(dim=0).expand(400, -1)
    torch.testing.assert_close(time_of(r, s, lambda r: (1 + r**2) ** 0.5), t[1:, None].expand(-1, 3), rtol=0, atol=1e-8)


def test_theorem_2_2_each_column_has_its_preconditioner():
    for seed in range(20):
        module = branch("standard", seed)
        U, g, _ = parts_of(module)
        J = jacobian(module.effective_weight().T, module.parameters())  # columns of A one after the other
        P = [torch.diag(g_j.expand(4) ** 2) + torch.outer(u_j, u_j) for g_j, u_j in zip(g, U.T)]
        torch.testing.assert_close(J @ J.T, torch.block_diag(*P), rtol=0, atol=1e-12)
        assert all(torch.linalg.eigvalsh(P_j)[0] > g_j**2 - 1e-12 for P_j, g_j in zip(P, g))


CUBIC = {  # (variant, against): -3/2 times the coefficient of t^3 in L_variant - L_against, from W, d_out, d_in
    ("standard", "none"): lambda W, m, d: W.norm(dim=0).pow(4).sum(),
    ("ap", "none"): lambda W, m, d: W.norm(dim=1).pow(4).sum(),
    ("dp", "standard"): lambda W, m, d: W.norm(dim=1).pow(4).sum(),  # Theorem D.1
    ("or", "standard"): lambda W, m, d: (1 - 1 / d) * W.norm() ** 4,  # Theorem D.2
    ("er", "standard"): lambda W, m, d: (1 - 1 / d) * W.norm() ** 4,  # not in the paper, as the next
    ("dp+or", "standard"): lambda W, m, d: W.norm(dim=1).pow(4).sum() + (2 - 1 / d - 1 / m) * W.norm() ** 4,
}


@pytest.mark.parametrize("variant, against", CUBIC)
def test_early_difference_is_cubic(variant, against):
    t = torch.linspace(0, 0.05, 51, dtype=torch.float64)[10:]
    difference = (losses(variant, TEACHER, 0.05, 50) - losses(against, TEACHER, 0.05, 50))[10:]
    series = torch.linalg.lstsq(t[:, None] ** torch.arange(4), (difference / t**3)[:, None]).solution[:, 0]
    torch.testing.assert_close(series[0], -2 / 3 * CUBIC[variant, against](TEACHER, *TEACHER.shape), rtol=2e-3, atol=0)


def test_theorem_3_1_dp_falls_faster_from_the_same_state():
    for seed in range(200):
        u = (1 + draw(4, seed=seed).square()).sqrt() * draw(4, seed=1000 + seed).sign()  # g_a^2 >= 1
        dp = branch("dp", seed, u_gamma=u)
        M, g, _ = parts_of(dp)
        standard = branch("standard", seed, W=u[:, None] * M, v_gamma=g)
        R = TEACHER - u[:, None] * M * g
        gain = ((u**2 - 1)[:, None] * g**2 * R**2).sum() + (M * g * R).sum(1).square().sum()
        torch.testing.assert_close(dissipation(dp) - dissipation(standard), gain, rtol=1e-9, atol=1e-9)
        assert gain >= 0
    # The condition matters: with g_a = 1/2 and M = 0, DP's rate is a quarter of the other.
    M, g, u = torch.zeros(4, 3).double(), torch.ones(3).double(), torch.full((4,), 0.5).double()
    dp = branch("dp", 0, W=M, v_gamma=g, u_gamma=u)
    standard = branch("standard", 0, W=M, v_gamma=g)
    torch.testing.assert_close(dissipation(dp) / dissipation(standard), torch.tensor(0.25).double())


def test_theorem_3_1_dp_from_the_standard_start():
    _, M, v, u = flow("dp", TEACHER, 2.0, 400, parts_of)
    torch.testing.assert_close(u**2 - M.square().sum(2), torch.ones_like(u), rtol=0, atol=1e-8)
    torch.testing.assert_close(v**2 - M.square().sum(1), torch.ones_like(v), rtol=0, atol=1e-8)
    # At most one nonzero in each row and each column: an entry m has g_a g_b = 1 + m^2, and the rest stays 0.
    matching = torch.tensor([[0, -1.2, 0], [0, 0, 0], [0.7, 0, 0], [0, 0, 2.0]]).double()
    t, M, dp = flow("dp", matching, 1.0, 400, lambda m: [m.W, norms.population_loss(m, matching)])
    assert (dp[1:] < losses("standard", matching, 1.0, 400)[1:]).all()
    s = matching[matching != 0].abs().expand(400, -1)
    predicted = time_of(M[1:, matching != 0].abs(), s, lambda r: 1 + r**2)
    torch.testing.assert_close(predicted, t[1:, None].expand(-1, 3), rtol=0, atol=1e-8)
    assert not M[:, matching == 0].any()


@pytest.mark.parametrize("form", norms.FORMS)
def test_preconditioner_of_a_scale_vector(form):
    for seed in range(20):
        vector = ScaleVector(5, "Input-Norm", form).double()
        for i, p in enumerate(vector.parameters()):
            p.data = (1 + seed / 5) * draw(*p.shape, seed=10 * seed + i)  # alphas of any length
        J = jacobian(vector(), vector.parameters())
        torch.testing.assert_close(J @ J.T, P_of(vector), rtol=1e-10, atol=1e-10)


def test_theorem_3_2_or_falls_faster_from_the_same_state():
    for seed in range(200):
        alpha, beta = draw(3, seed=seed), draw(1, seed=1000 + seed)
        alpha, beta = alpha * 3**0.5 / alpha.norm(), (1 + beta**2).sqrt() * beta.sign()
        or_branch = branch("or", seed, v_alpha=alpha, v_beta=beta)
        V, g, _ = parts_of(or_branch)
        standard = branch("standard", seed, W=V, v_gamma=g)
        h, P = (V * (TEACHER - V * g)).sum(0), P_of(or_branch.v)  # h = -dL/dg
        gain = h @ P @ h - h @ h
        torch.testing.assert_close(dissipation(or_branch) - dissipation(standard), gain, rtol=1e-9, atol=1e-9)
        assert dissipation(or_branch) >= dissipation(standard)
    # The condition matters: h orthogonal to q, where P is beta^2 d / ||alpha||^2, here 1/4 and then 1/9.
    V, ones = torch.tensor([[1.0, -1.0]]).double(), torch.ones(2).double()
    for alpha, beta, factor in (1, 0.5, 1 / 4), (3, 1, 1 / 9):
        teacher = beta * V + 1  # R = 1, so grad_V L has the squared norm 2 beta^2 and h = (1, -1)
        or_branch = branch("or", 0, teacher, W=V, v_alpha=alpha * ones, v_beta=beta * ones[:1])
        standard = branch("standard", 0, teacher, W=V, v_gamma=beta * ones)
        torch.testing.assert_close(dissipation(or_branch, teacher).item(), 2 * beta**2 + 2 * factor)
        torch.testing.assert_close(dissipation(standard, teacher).item(), 2 * beta**2 + 2.0)


def test_theorem_3_2_or_from_the_standard_start():
    _, V, beta, alpha = flow("or", TEACHER, 1.0, 500, lambda m: [m.W, *m.v.parameters()])
    torch.testing.assert_close(alpha.norm(dim=1), torch.tensor(3.0).double().sqrt().expand(501), rtol=0, atol=1e-8)
    torch.testing.assert_close(beta[:, 0] ** 2 - V.square().sum((1, 2)), torch.ones(501).double(), rtol=0, atol=1e-8)
    # Equal column norms: gamma stays beta = sqrt(1 + d r^2) in every entry, where r is the norm of each column of V.
    equal = 1.5 * TEACHER / TEACHER.norm(dim=0)
    t, V, loss = flow("or", equal, 1.0, 500, lambda m: [m.W, norms.population_loss(m, equal)])
    assert (loss[1:] < losses("standard", equal, 1.0, 500)[1:]).all()
    predicted = time_of(V[1:].norm(dim=1), torch.full((500, 3), 1.5).double(), lambda r: (1 + 3 * r**2) ** 0.5)
    torch.testing.assert_close(predicted, t[1:, None].expand(-1, 3), rtol=0, atol=1e-8)


def test_er_from_the_standard_start():
    """Not in the paper: under ER gamma_j = exp((||v_j||^2 + (1 - 1/d) ||V||_F^2) / 2) >= 1 along the whole flow. There
    P >= diag(gamma)^2 >= I, so ER's loss falls at least as fast as the standard one's from the same effective state."""
    _, V, gamma, _ = flow("er", TEACHER, 1.0, 1000, parts_of)
    columns = V.square().sum(1)
    predicted = torch.exp((columns + (1 - 1 / 3) * columns.sum(1, keepdim=True)) / 2)
    torch.testing.assert_close(gamma, predicted, rtol=1e-8, atol=0)
    for seed in range(200):
        alpha = draw(3, seed=seed)
        er = branch("er", seed, v_alpha=alpha, v_beta=alpha.mean(-1, keepdim=True) - alpha.min())  # gamma >= 1
        V, g, _ = parts_of(er)
        assert dissipation(er) >= dissipation(branch("standard", seed, W=V, v_gamma=g))


def hessian_sizes(w, g, target):
    """Trace, largest eigenvalue and Frobenius norm of the Hessian of 1/2 (w g - target)^2 at one coordinate."""
    trace, cross = g**2 + w**2, 2 * w * g - target
    return trace, (trace + ((g**2 - w**2).square() + 4 * cross**2).sqrt()) / 2, (g**4 + w**4 + 2 * cross**2).sqrt()


def test_theorem_2_3_hessian():
    module = branch("standard", 1, target := TEACHER[:1])
    w, g = module.W, module.v.gamma
    gradients = torch.autograd.grad(norms.population_loss(module, target), [w, g], create_graph=True)
    hessian = jacobian(torch.cat([y.flatten() for y in gradients]), [w, g])
    trace, largest, frobenius = hessian_sizes(w[0], g, target[0])
    torch.testing.assert_close(hessian.trace(), trace.sum())
    torch.testing.assert_close(torch.linalg.eigvalsh(hessian)[-1], largest.max())
    torch.testing.assert_close(hessian.norm(), frobenius.norm())


def assert_mean_is(expected, paths):
    """The mean over paths (the last axis) within four of its standard errors."""
    error = paths.std(-1) / paths.shape[-1] ** 0.5
    assert ((paths.mean(-1) - expected).abs() < 4 * error).all(), (paths.mean(-1), expected, error)


@pytest.mark.parametrize("q", [0.1, 0.5])
@pytest.mark.parametrize("mu", [0.0, 0.25])
def test_theorem_2_3_decay_on_scales(mu, q):
    """The coordinates of w * g are independent, so that the columns of one branch are as many paths of one.

    d/dt E[||g||^2 - ||w||^2] = 2 lambda E||w||^2 - 2 mu E||g||^2 holds whatever q if the noise enters w and g with the
    same strength, dp = -dL/dp dt + sqrt(q) dB: then the Ito terms q of w^2 and of g^2 cancel. (Noise chained through
    the product, sqrt(q) g dB on w and sqrt(q) w dB on g, would leave -q (||g||^2 - ||w||^2).) The invariant density
    is then exp(-2 F / q), F the loss with its decay: for mu = 0 its integral diverges, for mu > 0 it gives all means.
    """
    target, decay, columns = 1.0, 0.5, 5_000
    module = norms.student("standard", torch.full((1, columns), target))
    w, g = module.W, module.v.gamma

    def loss(module):
        return norms.population_loss(module, target) + decay / 2 * w.square().sum() + mu / 2 * g.square().sum()

    path = [torch.stack([w[0], g]).detach() for _ in norms.gradient_flow(module, loss, 20, 500, noise=q)]
    w, g = torch.stack(path, 1)  # each (501, columns)
    drift = torch.cumulative_trapezoid(2 * decay * w**2 - 2 * mu * g**2, dx=20 / 500, dim=0)
    assert_mean_is(0, ((g**2 - w**2)[1:] - 1 - drift)[[49, 124, 499]])
    if mu == 0:
        growth = (g**2)[[100, 200, 300, 400, 500]].diff(dim=0)
        assert (growth.mean(1) > 4 * growth.std(1) / columns**0.5).all()
    else:
        grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
        at_w, at_g = torch.meshgrid(grid, grid, indexing="ij")
        density = torch.exp(-((at_w * at_g - target).square() + decay * at_w**2 + mu * at_g**2) / q)
        for observed, exact in zip([g**2, *hessian_sizes(w, g, target)], [at_g**2, *hessian_sizes(at_w, at_g, target)]):
            assert_mean_is((density * exact).sum() / density.sum(), observed[250:].mean(0))


@pytest.mark.parametrize("variant", [form for form in FOLDABLE if "hg" not in form])
def test_section_3_4_effective_weight_moves_by_the_preconditioned_gradient(variant):
    """Two branches of A = W * (u v^T) with one v: dA/dt = u^2 R v^2 + W * (P_u h_u v^T + u (P_v h_v)^T), h = -dL/dgamma."""
    scale = NormScale.parse(variant)
    module = torch.nn.ModuleList(Branch(3, 4, scale, shared) for shared in 2 * [shared_vector(3, scale)]).double()
    for i, p in enumerate(module.parameters()):
        p.data = draw(*p.shape, seed=i) / 2
    teacher = draw(2, 4, 3, seed=99)

    def effective(module):
        return torch.stack([one.effective_weight() for one in module])

    A = effective(module)
    R, J = teacher - A.detach(), jacobian(A, module.parameters())
    P = J @ J.T

    closed_form, first = [], []
    with torch.no_grad():
        W = torch.stack([one.W for one in module])
        u = torch.stack([torch.ones(4).double() if one.u is None else one.u() for one in module])[:, :, None]
        v = torch.ones(3).double() if module[0].v is None else module[0].v()
        dv = torch.zeros(3).double() if module[0].v is None else P_of(module[0].v) @ (W * R * u).sum((0, 1))
        for i, one in enumerate(module):
            du = torch.zeros(4).double() if one.u is None else P_of(one.u) @ (W[i] * R[i] * v).sum(1)
            closed_form.append((u[i] * v) ** 2 * R[i] + W[i] * (du[:, None] * v + u[i] * dv))
            first.append(((u[i] * v) ** 2).flatten())
    closed_form = torch.stack(closed_form)
    torch.testing.assert_close((P @ R.flatten()).view_as(R), closed_form, rtol=1e-9, atol=1e-9)
    assert torch.linalg.eigvalsh(P - torch.diag(torch.cat(first)))[0] > -1e-10 * P.trace()  # so P > 0

    states, h = [], 1e-6
    for t_end in h, -2 * h:  # to t = h, and back to t = -h
        for _ in norms.gradient_flow(module, lambda m: (effective(m) - teacher).square().sum() / 2, t_end, 1):
            pass
        states.append(effective(module).detach())
    torch.testing.assert_close((states[0] - states[1]) / (2 * h), closed_form, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------
# Against implementations by others: transformers' Llama, Gemma 3 and Qwen2-MoE

SHAPE = dict(vocab_size=64, hidden_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=20,
             intermediate_size=48, rms_norm_eps=1e-6, max_position_embeddings=17, tie_word_embeddings=False)  # fmt: skip


@pytest.fixture(params=["as they ship", "in float64"])
def precision(request, monkeypatch):
    """The tolerance; in float64 their float32 islands, RoPE and the statistics of norms, are lifted too."""
    if request.param == "as they ship":
        return 2e-5
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return 1e-12


def peer_of(model, dtype):
    """The same architecture from transformers, and {its parameter: ours in its layout}, which gradients flow through."""
    transformers = pytest.importorskip("transformers", reason="transformers, a peer, is not installed")
    config = model.config

    def gamma(vector):
        scale = torch.ones(config.d_model, dtype=dtype) if vector is None else vector()
        return scale - 1 if config.gemma else scale  # Gemma multiplies by 1 + w

    def halves(W):  # our RoPE turns neighbours, theirs channels h/2 apart
        return W.reshape(-1, 10, 2, *W.shape[1:]).transpose(1, 2).reshape(W.shape)

    state = {"model.embed_tokens.weight": model.embedding, "lm_head.weight": model.head.W}
    state["model.norm.weight"] = gamma(model.head.v)
    for i, block in enumerate(model.blocks):
        a, ffn = block.attention, block.ffn
        layer = {"self_attn.q_proj.weight": halves(a.q.W), "self_attn.k_proj.weight": halves(a.k.W)}
        layer |= {"self_attn.v_proj.weight": a.v.W, "self_attn.o_proj.weight": a.o, "input_layernorm.weight": gamma(a.q.v)}
        if config.n_expert:
            gate_up = [torch.cat([expert.gate.W, expert.up.W]) for expert in ffn.experts]
            layer |= {"mlp.gate.weight": ffn.router.W, "mlp.experts.gate_up_proj": torch.stack(gate_up)}
            layer["mlp.experts.down_proj"] = torch.stack([expert.down for expert in ffn.experts])
            prefix, dense, v = "mlp.shared_expert.", ffn.shared_expert, ffn.router.v
        else:
            prefix, dense, v = "mlp.", ffn, ffn.gate.v
        layer |= {f"{prefix}gate_proj.weight": dense.gate.W, f"{prefix}up_proj.weight": dense.up.W}
        layer[f"{prefix}down_proj.weight"] = dense.down
        if config.gemma:
            layer["pre_feedforward_layernorm.weight"] = gamma(v)
            layer["post_attention_layernorm.weight"] = gamma(block.attention_out.u)
            layer["post_feedforward_layernorm.weight"] = gamma(block.ffn_out.u)
            layer["self_attn.q_norm.weight"] = halves(gamma(a.q.norm.u))
            layer["self_attn.k_norm.weight"] = halves(gamma(a.k.norm.u))
        else:
            layer["post_attention_layernorm.weight"] = gamma(v)
        state |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}

    if config.gemma:
        more = dict(hidden_activation="silu", query_pre_attn_scalar=20, layer_types=2 * ["full_attention"])
        more["rope_parameters"] = {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
        peer = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SHAPE, **more))
        peer.model.embed_tokens.embed_scale.fill_(1.0)
    elif config.n_expert:
        more = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=26, shared_expert_intermediate_size=48)
        more |= dict(qkv_bias=False, norm_topk_prob=False, decoder_sparse_step=1)
        peer = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SHAPE, **more))
        peer.set_experts_implementation("eager")
        for layer in peer.model.layers:
            layer.mlp.shared_expert_gate = Open()
    else:
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    peer = peer.to(dtype)
    peer.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, strict=True)
    return peer, state


class Open(torch.nn.Module):
    """A gate whose sigmoid is 1."""

    def forward(self, x):
        return torch.full_like(x[:, :1], 100.0)


@pytest.mark.peers
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("variant", ["standard", "none"])
def test_logits_and_gradients_are_those_of_transformers(variant, model, precision):
    if (variant, model) == ("none", "gemma-tiny"):
        pytest.skip("transformers has no Gemma without scale vectors")
    dtype = torch.float32
    built = small_model(variant, model, stir=0.3).to(dtype)
    built.rotation = rotations(17, 20).to(dtype)
    for p in built.parameters():
        p.data *= 4 if p.ndim == 2 else 1
    peer, state = peer_of(built, dtype)
    theirs, ours = peer(TOKENS).logits, built(TOKENS)
    torch.testing.assert_close(ours, theirs, rtol=precision, atol=precision)
    weights = torch.randn(theirs.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((theirs * weights).mean(), list(peer.parameters()))
    product = sum((state[name] * g).sum() for (name, _), g in zip(peer.named_parameters(), expected, strict=True))
    expected = torch.autograd.grad(product, list(built.parameters()), allow_unused=True)
    gradients = torch.autograd.grad((ours * weights).mean(), list(built.parameters()))
    for (name, _), g, e in zip(built.named_parameters(), gradients, expected):
        assert (g - e).norm() <= 10 * precision * max(e.norm(), 1e-3), name


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
    transformers = pytest.importorskip("transformers", reason="transformers, a peer, is not installed")
    built = small_model(variant, stir=0.3)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    peer.load_state_dict(llama_state_dict(fold(built)), strict=True)
    torch.testing.assert_close(peer(TOKENS).logits, built(TOKENS), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("variant, model", [("standard", "tiny"), ("hg+dnp", "tiny"), ("none", "moe-tiny"), ("none", "gemma-tiny")])
def test_what_is_no_stock_llama(variant, model):
    built = small_model(variant, model)
    with pytest.raises(ValueError, match="fold"):
        llama_state_dict(fold(built) if variant == "hg+dnp" else built)


def test_muon_is_newton_schulz_in_the_papers_scale(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    W = torch.nn.Parameter(torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    model = SimpleNamespace(blocks=torch.nn.ParameterList([W]), config=small_config("none"))
    model.parameters, model.modules = model.blocks.parameters, model.blocks.modules
    muon, _ = train.make_optimizers(model, settings("--optimizer=muon", "--lr=0.01"))
    before, momentum = W.detach().clone(), 0
    for seed in range(3):
        W.grad = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        muon.step()
        momentum = 0.95 * momentum + 0.05 * W.grad
        X = 0.95 * momentum + 0.05 * W.grad  # Nesterov
        X = X / X.norm()
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        before = before * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(10) * X
    torch.testing.assert_close(W.detach(), before, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------
# Where there is a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("compile", ["on", "off"])
@pytest.mark.parametrize("variant", ["none", "standard", "unified", "hg+dp+or"])
@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_on_a_gpu(small, model, variant, compile):
    if model == "moe-tiny" and compile == "on":
        pytest.skip("the loop over experts is not for torch.compile")
    flags = [f"--model={model}", f"--norm-scale={variant}", "--d-model=64", "--device=cuda"]
    fast = [f"--compile={compile}", "--dtype=bfloat16"]
    small(*flags, "--dtype=float32", "--compile=off", "--out-dir=exact")
    torch._dynamo.reset()
    small(*flags, *fast, "--out-dir=fast")
    exact, ours = rows_of(only_run("exact")), rows_of(only_run("fast"))
    for a, b in zip(exact, ours, strict=True):
        assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), abs=0.02)
    # Resumed in the middle: the same up to rounding, and nothing is compiled again after the first evaluation.
    shutil.copytree("fast", "half")
    folder = only_run("half")
    in_config(status="running")(folder)
    assert small(*flags, *fast, "--out-dir=half", "--resume") == 0
    assert float(rows_of(folder)[-1]["val_loss"]) == pytest.approx(float(ours[-1]["val_loss"]), abs=1e-3)
    assert small(*flags, *fast, "--benchmark", "--out-dir=bench") == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_nothing_is_compiled_again_after_the_first_evaluation(small, data_folder):
    torch._dynamo.reset()
    machine, data = train.Machine("cuda"), prepare_data.TokenFolder(data_folder)
    args = vars(train.command_line().parse_args([*SMALL, "--norm-scale=unified", "--compile=on"]))
    s, _ = train.resolve(args | {"norm_scale": "unified"}, machine, data.vocab_size, len(data.val))
    compiled = []
    folder = SimpleNamespace(load=lambda *_: train.Record(), write_tables=lambda *_: None, save=lambda *_: None)
    for record in train.train(s, data, machine, folder):
        compiled.append(sum(torch._dynamo.utils.counters["frames"].values()))
    assert compiled[s.eval_every] == compiled[-1]


# ---------------------------------------------------------------------------------------------------
# prepare_data.py: text to tokens, and back
# (paste: no import beyond those of the old test_norms.py, of which HERE too)

TokenFolder = prepare_data.TokenFolder
PARAGRAPHS = [f"Paragraph {i} says that {i * i} is the square of {i},\nand that's that." for i in range(100)]
BOOK = "\n\n".join(PARAGRAPHS)


def prepared(tmp_path, text, *flags):
    """The folder made from text, with 300 tokens where the text has as many."""
    (tmp_path / "book.txt").write_bytes(text.encode())
    paths = [f"--out-dir={tmp_path / 'data'}", "--input", str(tmp_path / "book.txt")]
    prepare_data.main(["--vocab-size=300", *paths, *flags])
    return tmp_path / "data" / "book"


def decoded(folder, *parts):
    data = TokenFolder(folder)
    return "".join(data.decode(getattr(data, part)) for part in parts)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A little prepared text of made-up words, and nothing to download."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 5))) for _ in range(60)]
    lines = [" ".join(rng.choices(words, weights=range(60, 0, -1), k=12)) for _ in range(400)]
    (folder / "words.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return prepare_data.prepare(inputs=[folder / "words.txt"], out_dir=folder, vocab_size=300)


def test_sotu_every_tenth_address_by_date_is_validation(tmp_path, capsys):
    prepare_data.main([f"--out-dir={tmp_path}"])
    folder, source = tmp_path / "sotu", Path(importlib.metadata.distribution("sotu").locate_file("sotu/data"))
    rows = csv.DictReader((source / "metadata.csv").read_text(encoding="utf-8").splitlines())
    dates = {row["fileid"]: row["date"] for row in rows}
    by_date = sorted((source / "speeches").glob("*.txt"), key=lambda path: (dates[path.stem], path.stem))
    texts = [path.read_text(encoding="utf-8") for path in by_date]
    assert decoded(folder, "val") == (val_text := "\n\n".join(texts[9::10]))
    del texts[9::10]
    assert decoded(folder, "train") == "\n\n".join(texts)
    data = TokenFolder(folder)
    assert data.meta == {
        "dataset": "sotu",
        "tokenizer": "bpe",
        "vocab_size": 2048,
        "train_tokens": len(data.train),
        "val_tokens": len(data.val),
        "bytes_per_token": len(val_text.encode()) / len(data.val),
        "sha256": {  # all records under results/ are of these tokens
            "train.bin": "9e1b1d5621273a229836cb50678ff5d8710954bab207fbd981eafd5237ea5c53",
            "val.bin": "ea715945305fa360bddf0f44523af982b69d3e17214c5a32142916c60d72c001",
        },
    }
    out, err = capsys.readouterr()
    assert f"{len(data.train):,} tokens" in out and f'train.py --data="{folder}"' in out and err == ""


def test_validation_begins_with_the_first_paragraph_of_the_last_tenth(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "BLOCK", 150)  # blocks end inside and beside blank lines
    folder = prepared(tmp_path, BOOK.replace("\n\n", "\r\n \t\r\n  "))
    text = BOOK.replace("\n\n", "\n \t\n  ")
    start = text.index("\n \t\n", len(text) * 9 // 10) + 4
    assert (decoded(folder, "train"), decoded(folder, "val")) == (text[:start], text[start:])
    for text in ("Title\n\n" + "x" * 1000, "x" * 970 + "\n\n" + "x" * 28, "x" * 940 + "\n\n" + " " * 58):
        folder = prepared(tmp_path, text, "--overwrite")
        assert decoded(folder, "train", "val") == text
        assert len(decoded(folder, "train")) == len(text) * 9 // 10


def test_files_are_joined_and_validation_can_be_given(tmp_path):
    more, val, text = tmp_path / "more.txt", tmp_path / "val.txt", "Wörter 中文 \x00 <|endoftext|>"
    more.write_bytes("\ufeffMore text.".encode())
    val.write_bytes(text.encode())
    folder = prepared(tmp_path, BOOK, str(more), "--val-input", str(val), "--name=a b").with_name("a b")
    assert (decoded(folder, "train"), decoded(folder, "val")) == (BOOK + "\n\nMore text.", text)


def test_vocabulary_comes_from_the_training_text_alone(tmp_path, monkeypatch):
    def tokenizer(train, val):
        (tmp_path / "val.txt").write_text(val)
        folder = prepared(tmp_path, train, "--overwrite", "--val-input", str(tmp_path / "val.txt"))
        return (folder / "tokenizer.tiktoken").read_bytes()

    zyx = "zyx " * 500
    assert tokenizer(BOOK, "short") == tokenizer(BOOK, zyx) != tokenizer(BOOK + zyx, "short")
    assert TokenFolder(prepared(tmp_path, "abab cdcd " * 9, "--overwrite")).vocab_size < 270  # no more pairs
    monkeypatch.setattr(prepare_data, "BLOCK", 100)  # of a large text, pieces from all over it
    monkeypatch.setattr(prepare_data, "BPE_CHARACTERS", 3_000)
    assert b"IHp5eA==" in tokenizer("abc " * 1000 + zyx, "short")  # " zyx"


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
    encode = encoding.encode_ordinary
    for block in (64, 100, 1000):
        monkeypatch.setattr(prepare_data, "BLOCK", block)
        pieces = list(prepare_data.read([tmp_path / "book.txt"]))
        assert max(map(len, pieces)) < 3 * block and sum(map(encode, pieces), []) == encode(text)


KINDS = {
    "CRLF": "one\r\ntwo\r\n\r\n" * 50, "NUL": "a\x00b \x00\n" * 50, "one line": "without end, " * 230_000,
    "Chinese": "中文没有空格。\n" * 50, "Thai": "ภาษาไทยไม่มีช่องว่าง " * 50,
    "emoji": "\U0001f469\u200d\U0001f680 " * 50, "U+2028": "line\u2028paragraph\u2029 " * 50,
    "code": "def f(x):\n\treturn x\n\n\n" * 50,
    "BOM": "\ufeffBOM " * 50, "blanks": " " * 1_500_000 + "a", "newlines": "\n" * 1_500_000 + "a",
    "no gap": "ab" * 750_000, "no gap in Chinese": "中" * 500_000,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_text(tmp_path, kind):
    text = decoded(prepared(tmp_path, KINDS[kind]), "train", "val")
    assert text == KINDS[kind].removeprefix("\ufeff").replace("\r\n", "\n")


FILES = {
    "book.txt": BOOK.encode(), "empty.txt": b"", "bom.txt": b"\xef\xbb\xbf", "blank.txt": b" \n\n ",
    "ab.txt": b"ab", "latin.txt": b"hello\xe9 \xe8", "end.txt": b"ab \xe4",
    "far.txt": b"\xef\xbb\xbf" + b"ab\r\n" * 100_000 + b"\xff",
}  # fmt: skip
MISTAKES = [  # a command, and words of what it says
    ("--input none.txt", "none.txt is not a file"), ("--input . --name=x", ". is not a file"),
    ("--input pipe", "save it to a file"), ("--input book.txt --val-input pipe", "save it to a file"),
    ("--input empty.txt", "empty.txt holds no text"), ("--input bom.txt", "bom.txt holds no text"),
    ("--input blank.txt", "no text"), ("--input ab.txt", "too little text"), ("--input", "at least one"),
    ("--input latin.txt", "latin.txt is not UTF-8 text: invalid continuation byte at byte 5"),
    ("--input far.txt", "at byte 400003"), ("--input end.txt", "at byte 3"),
    ("--val-input book.txt", "needs --input"), ("--input book.txt --dataset=sotu", "not both"),
    *((f"--input book.txt --val-input {name}.txt", f"{name}.txt") for name in ("latin", "empty", "none")),
    *((f"--input book.txt --name={name}", "cannot be --name") for name in ("", "..", "a/b", "downloads")),
    ("--dataset=bible", "invalid choice"), ("--tokenizer=x", "invalid choice"), ("--vocab-size=x", "int"),
    *((f"--vocab-size={size}", "256 to 65536") for size in (0, 255, 65_537)), ("--shards=2", "fineweb"),
    ("--tokenizer=gpt2 --vocab-size=300", "--vocab-size is"),
    ("--dataset=fineweb --vocab-size=300", "--vocab-size is"), ("--dataset=fineweb --tokenizer=bpe", "no --tok"),
    *((f"--dataset=fineweb --shards={shards}", "1 to 103") for shards in (0, 104)),
    ("--out-dir=book.txt", "book.txt"), ("--over", "--over"), ("book.txt", "book.txt"),
    *((f"--input book.txt --name=mine {flag}", "mine is there") for flag in ("", "--overwrite")),
]  # fmt: skip


def refused(flags, words, capsys):
    """The command ends with code 2 and one line that has the words in it."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        prepare_data.main(flags)
    out, err = capsys.readouterr()
    err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("downloading "))
    assert out == "" and err.startswith("prepare_data.py: error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("command, words", MISTAKES)
def test_mistakes_get_one_line(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    os.mkfifo("pipe")
    Path("data", "mine").mkdir(parents=True)
    refused(command.split(), words, capsys)
    assert sorted(os.listdir()) == sorted([*FILES, "pipe", "data"]) and os.listdir("data") == ["mine"]


def test_a_failure_halfway_leaves_everything_as_it_was(tmp_path, monkeypatch, capsys):
    folder, data, empty = prepared(tmp_path, BOOK), tmp_path / "data", tmp_path / "empty"
    flags = [f"--out-dir={data}", "--input", str(tmp_path / "book.txt")]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(flags, "--overwrite replaces", capsys)
    empty.mkdir()  # the user's folder stays, those made on the way to another do not
    for error, code in ((OSError(errno.ENOSPC, "No space left"), 2), (KeyboardInterrupt(), 130)):
        for more in ("--overwrite", "--name=new", f"--out-dir={empty}", f"--out-dir={tmp_path / 'a' / 'b'}"):
            with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"^{code}$"):
                patch.setattr(prepare_data, "sha256_of", Mock(side_effect=error))  # late
                prepare_data.main([*flags, more])
            assert capsys.readouterr().err.count("\n") == 1
            assert [sorted(os.listdir(path)) for path in (tmp_path, data, empty)] == [
                ["book.txt", "data", "empty"], ["book"], []
            ]  # fmt: skip
    rename = Path.rename
    with monkeypatch.context() as patch:  # the new folder cannot take the place of the old one
        patch.setattr(Path, "rename", lambda path, to: rename(path, "/no/way" if path.name == "new" else to))
        refused([*flags, "--overwrite"], "No such file", capsys)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    prepare_data.main([*flags, "--overwrite"])
    assert TokenFolder(folder).vocab_size > 300 and os.listdir(data) == ["book"]


def test_links_are_written_through(tmp_path):
    folder, far = prepared(tmp_path, BOOK), tmp_path / "far" / "disk"
    far.mkdir(parents=True)
    folder.rename(far / "real")
    for name in ("real", "later"):  # a link to a folder, and one to where a folder may come
        folder.unlink(missing_ok=True)
        folder.symlink_to(far / name)
        assert decoded(prepared(tmp_path, BOOK + name, "--overwrite"), "train", "val") == BOOK + name
        assert folder.is_symlink() and os.listdir(folder.parent) == ["book"]
    assert sorted(os.listdir(far)) == ["later", "real"]


def test_the_first_of_two_processes_wins(tmp_path, monkeypatch):
    first = prepared(tmp_path, BOOK, "--name=first").with_name("first")
    write_folder = prepare_data.write_folder

    def overtaken(*args):
        (shutil.copytree(first, first.with_name("book")) / "winner").touch()
        return write_folder(*args)

    monkeypatch.setattr(prepare_data, "write_folder", overtaken)
    assert (prepared(tmp_path, BOOK) / "winner").exists()
    assert sorted(os.listdir(first.parent)) == ["book", "first"]


def test_a_missing_output_is_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    prepare_data.use_any_terminal()
    assert sys.stdout.write("ö") == 1


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize("ending", ["", ">&-", ">&- 2>&-", "> /dev/full", "| true"])
def test_any_terminal_will_do(tmp_path, ending):
    (tmp_path / "book.txt").write_text(BOOK)
    script = HERE / "prepare_data.py"
    command = f'"{sys.executable}" "{script}" --input book.txt --name=Имя --vocab-size=300 {ending}'
    command = ["bash", "-o", "pipefail", "-c", command]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUNBUFFERED": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "" and ("???" in result.stdout) == (ending == "")
    assert decoded(tmp_path / "data" / "Имя", "train", "val") == BOOK


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


def shard(tokens, magic=20240520, version=1, extra=0):
    header = np.array([magic, version, len(tokens) + extra] + [0] * 253, "<i4")
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


def test_shakespeare(tmp_path, server, monkeypatch, capsys):
    flags, book, data = ["--out-dir=data", "--dataset=shakespeare"], BOOK.encode(), tmp_path / "data"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(book).hexdigest())
    refused(flags, "input.txt", capsys)
    (server / "input.txt").write_bytes(book[:-9])
    refused(flags, "damaged", capsys)
    assert os.listdir() == []
    (server / "input.txt").write_bytes(book)
    prepare_data.main(flags)
    (server / "input.txt").unlink()  # the download is kept
    prepare_data.main([*flags, "--name=again", "--tokenizer=gpt2"])
    for name, tokenizer in (("shakespeare", "bpe"), ("again", "gpt2")):
        assert decoded(data / name, "train", "val") == BOOK
        assert TokenFolder(data / name).meta["tokenizer"] == tokenizer
    assert TokenFolder(data / "again").vocab_size == 50_304
    (data / "downloads" / "tinyshakespeare.txt").write_bytes(book[:-9])  # unless it is damaged
    refused([*flags, "--overwrite"], "input.txt", capsys)
    (server / "input.txt").write_bytes(book)
    prepare_data.main([*flags, "--overwrite"])
    assert sorted(os.listdir(data)) == ["again", "downloads", "shakespeare"]


def test_fineweb(tmp_path, server, capsys):
    flags, val = [f"--out-dir={tmp_path / 'data'}", "--dataset=fineweb"], [50_256, 256, 97, 10]
    (server / "fineweb_val_000000.bin").write_bytes(shard(val))
    for content, words in [
        (shard([1], magic=1), "damaged"), (shard([1], version=2), "damaged"), (shard([])[:8], "damaged"),
        (shard([1, 2], extra=1), "damaged"), (shard([1])[:-2], "damaged"), (shard([50_304]), "token 50304"),
    ]:  # fmt: skip
        (server / "fineweb_train_000001.bin").write_bytes(content)
        refused(flags, words, capsys)
        assert not list(tmp_path.glob("data/*fineweb*"))
    shutil.rmtree(tmp_path / "data")
    for number in (1, 2):
        (server / f"fineweb_train_00000{number}.bin").write_bytes(shard([256, 96 + number]))
    prepare_data.main([*flags, "--shards=2"])
    data = TokenFolder(tmp_path / "data" / "fineweb")
    assert data.train.tolist() == [256, 97, 256, 98] and data.decode(data.val) == "aba\n"
    expected = {"tokenizer": "gpt2", "vocab_size": 50_304, "train_tokens": 4, "bytes_per_token": 1}
    assert data.meta.items() >= expected.items()
    assert data.token_bytes[[256, 97, 50_256, 50_303]].tolist() == [2, 1, 0, 0]


def test_no_network(tmp_path, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.setattr(prepare_data.urllib.request, "urlopen", offline)
    for flag in ("--dataset=fineweb", "--tokenizer=gpt2", "--dataset=shakespeare"):
        refused([flag, f"--out-dir={tmp_path / 'data'}"], "--dataset=sotu", capsys)
        assert os.listdir(tmp_path) == []


def test_reading(data_folder):
    data = TokenFolder(str(data_folder))
    text = (data_folder.parent / "words.txt").read_text()
    assert data.folder == data_folder and data.vocab_size == 300 and data.train.dtype == "<u2"
    assert data.decode(data.train) + data.decode(data.val) == text and data.token_bytes.shape == (300,)
    assert data.token_bytes[data.val].sum() / len(data.val) == data.meta["bytes_per_token"]
    for name in ("train.bin", "val.bin"):
        assert data.sha256[name] == hashlib.sha256((data_folder / name).read_bytes()).hexdigest()
    assert data.encoding().encode_ordinary(data.decode(data.val)) == data.val.tolist()
    assert data.decode([97, -1, 300, 98, *"ö".encode(), 0xC3]) == "abö\ufffd"  # bytes come first


def test_patterns_are_those_of_the_libraries():
    bpe, gpt2 = prepare_data.rustbpe.Tokenizer(), pytest.importorskip("tiktoken_ext.openai_public")
    bpe.train_from_iterator([], 256)
    assert prepare_data.PATTERNS == {"bpe": bpe.get_pattern(), "gpt2": gpt2.r50k_pat_str}


def with_meta(**changes):
    def spoil(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | changes))

    return spoil


def with_tokens(*tokens):
    def spoil(folder):
        np.array(tokens, "<u2").tofile(folder / "val.bin")
        sha256 = {name: prepare_data.sha256_of(folder / name) for name in ("train.bin", "val.bin")}
        with_meta(sha256=sha256)(folder)

    return spoil


def with_file(name, content):
    return lambda folder: (folder / name).write_text(content)


BROKEN = {  # what spoils the folder, and a word of the message
    "no folder": (shutil.rmtree, "meta.json"),
    **{f"no {name}": (lambda folder, name=name: (folder / name).unlink(), name)
       for name in ("meta.json", "tokenizer.tiktoken", "train.bin", "val.bin")},
    "meta is not JSON": (with_file("meta.json", "{"), "JSON"),
    "meta is empty": (with_file("meta.json", "{}"), "vocab_size"),
    "meta is a list": (with_file("meta.json", "[1]"), "TypeError"),
    "meta is deep": (with_file("meta.json", "[" * 100_000), "RecursionError"),
    "no sha256": (with_meta(sha256={}), "train.bin"),
    "another tokenizer": (with_meta(tokenizer="words"), "tokenizer"),
    **{f"vocab_size={n}": (with_meta(vocab_size=n), "Error") for n in (0, -1, 65_537, 299, 300.5, "300", None)},
    **{f"bytes_per_token={n}": (with_meta(bytes_per_token=n), "_token") for n in (0, math.inf, math.nan)},
    "tokenizer is text": (with_file("tokenizer.tiktoken", "not base64 at all"), "ValueError"),
    "tokenizer is not base64": (with_file("tokenizer.tiktoken", "Y!Q== 97"), "Error"),
    "truncated": (lambda folder: os.truncate(folder / "train.bin", 1000), "train.bin has another sha256"),
    "foreign": (with_file("val.bin", "something else"), "val.bin has another sha256"),
    "beyond the vocabulary": (with_tokens(1, 300, 2), "val.bin has token 300"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_broken_folders(data_folder, tmp_path, how):
    spoil, words = BROKEN[how]
    folder = shutil.copytree(data_folder, tmp_path / "größer als nötig")
    spoil(folder)
    with pytest.raises(prepare_data.UserError, match=words) as told:
        TokenFolder(folder)
    assert "\n" not in str(told.value) and "größer als nötig" in str(told.value)


def test_tokens_at_the_edges(data_folder, tmp_path):
    folder = shutil.copytree(data_folder, tmp_path / "data")
    for tokens in ([299], []):
        with_tokens(*tokens)(folder)
        val = TokenFolder(folder).val
        assert val.tolist() == tokens and val.dtype == "<u2"
    with_meta(vocab_size=60_000)(folder)
    assert TokenFolder(folder).token_bytes[300:].tolist() == [0] * 59_700
# ---------------------------------------------------------------------------------------------------
# The trainer's promises

SMALL = "--d-model=16 --n-layer=2 --n-head=2 --seq-len=16 --batch-size=4 --steps=20 --eval-every=5 --eval-tokens=500".split()
CLOCKS = ("seconds", "tokens_per_second", "peak_memory_mb")


@pytest.fixture
def small(data_folder, tmp_path, monkeypatch):
    """train.main with flags for a run of a second, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: train.main([*SMALL, f"--data={data_folder}", "--out-dir=runs", *flags])


def rows_of(folder):
    """metrics.csv as dictionaries, without clocks and memory."""
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def only_run(parent="runs"):
    (config,) = Path(parent).glob("*/config.json")
    return config.parent


def checkpoint_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def statuses(parent="runs"):
    return {config_of(path.parent)["norm_scale"]: config_of(path.parent)["status"] for path in Path(parent).glob("*/config.json")}


def same_weights(one, other):
    return all(torch.equal(p, checkpoint_of(other)["model"][name]) for name, p in checkpoint_of(one)["model"].items())


def at_step(monkeypatch, number, act):
    """Calls act() while the batch of a step is made."""
    original = train.batch

    def batch(data, settings, step, machine):
        if step + 1 == number:
            act()
        return original(data, settings, step, machine)

    monkeypatch.setattr(train, "batch", batch)


def told_in_one_line(capsys, command, *words):
    """command exits with 2 and one line on stderr that has all the words."""
    with pytest.raises(SystemExit) as stopped:
        command()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and len(error.splitlines()) == 1 and all(word in error for word in words), error


@pytest.mark.parametrize(
    "signum, code, flags",
    [
        (signal.SIGTERM, 143, []),
        (signal.SIGINT, 130, ["--model=moe-tiny", "--optimizer=muon", "--batch-size=2", "--n-layer=1"]),
        (signal.SIGTERM, 143, ["--schedule=wsd", "--checkpoint-every=3", "--model=gemma-tiny"]),
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(small, monkeypatch, capsys, signum, code, flags):
    before = signal.getsignal(signum)
    flags = ["--norm-scale=unified", *flags]
    assert small("--out-dir=whole", *flags) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 13, lambda: os.kill(os.getpid(), signum))
        assert small(*flags) == code
    assert "--resume" in capsys.readouterr().out and config_of(only_run())["status"] == "interrupted"
    (only_run() / "metrics.csv").write_text("torn")  # tables are written whole, from the checkpoint
    assert small("--resume", *flags) == 0
    whole, cut = only_run("whole"), only_run()
    assert rows_of(whole) == rows_of(cut) and [row["step"] for row in rows_of(cut)] == ["5", "10", "15", "20"]
    assert (whole / "scales.csv").read_bytes() == (cut / "scales.csv").read_bytes()
    assert same_weights(whole, cut) and signal.getsignal(signum) == before


def test_a_signal_acts_at_once_the_second_time(small, monkeypatch):
    at_step(monkeypatch, 3, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    assert small() == 130 and config_of(only_run())["status"] == "running"


def test_evaluating_more_often_changes_nothing(small):
    small("--out-dir=often", "--eval-every=2", "--eval-tokens=100")
    small("--out-dir=rarely", "--eval-every=10")
    often, rarely = only_run("often"), only_run("rarely")
    assert same_weights(often, rarely)
    losses = {row["step"]: float(row["train_loss"]) for row in rows_of(often)}
    assert float(rows_of(rarely)[0]["train_loss"]) == pytest.approx(sum(losses[str(s)] for s in range(2, 11, 2)) / 5)


def test_the_recorded_command_gives_the_same_metrics(small):
    flags = ["--optimizer=muon", "--d-ff=+8", "--lr=3e-3", "--checkpoint-every=4", "--warmup-steps=2", "--steps=10"]
    small("--norm-scale=hg+or", "--seed=7", *flags)
    folder = only_run()
    command = config_of(folder)["command"].split("train.py ")[1].split()
    assert train.main([*command, "--out-dir=again"]) == 0
    assert rows_of(folder) == rows_of(Path("again", folder.name)) and rows_of(folder)[-1]["step"] == "10"


def test_a_run_leaves_a_record_that_reads_without_this_code(small):
    small("--norm-scale=unified", "--model=moe-tiny", "--schedule=wsd")
    folder = only_run()
    config, state = config_of(folder), checkpoint_of(folder)["model"]
    assert config["norm_scale"] == "unified" and config["steps"] == 20 and config["tokens_per_step"] == 64
    assert config["status"] == "done" and config["data_sha256"].keys() == {"train.bin", "val.bin"}
    assert {*train.FIELDS, "command", "python", "torch", "git_commit", "flops_per_token"} <= config.keys()
    built = small_model("unified", "moe-tiny", d_model=16, d_ff=42, vocab_size=300, seq_len=16)
    assert config["parameters"] == sum(p.numel() for p in built.parameters())
    assert config["scale_parameters"] == sum(p.numel() for p in built.parameters() if p.ndim == 1)
    assert folder.name.startswith("moe-tiny-unified-adamw-wsd-lr0.004-seed0-batch_size4-seq_len16-steps20")
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,tokens,seconds,lr,train_loss,val_loss,grad_norm,tokens_per_second,peak_memory_mb"
    with open(folder / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert (int(last["tokens"]), float(last["lr"])) == (1280, pytest.approx(0.004 / 4))
    assert 50 < float(last["peak_memory_mb"]) < 50_000 and float(last["tokens_per_second"]) > 64 / float(last["seconds"])
    with open(folder / "scales.csv", newline="") as file:
        scales = {row["name"]: row for row in csv.DictReader(file) if row["step"] == "20"}
    assert float(scales["blocks.0.attention.q.W"]["norm"]) == pytest.approx(state["blocks.0.attention.q.W"].norm().item())
    gamma = state["head.v.beta"] * state["head.v.alpha"] / state["head.v.alpha"].square().mean().sqrt()
    expected = [gamma.min(), gamma.mean(), gamma.max(), gamma.norm()]
    assert [float(scales["head.v"][c]) for c in ("min", "mean", "max", "norm")] == pytest.approx([e.item() for e in expected])
    load = scales["blocks.1.ffn"]
    assert 0 <= float(load["min"]) <= float(load["mean"]) == pytest.approx(1 / 8) and float(load["max"]) <= 1
    vectors = {name.rpartition(".")[0] for name, p in state.items() if p.ndim == 1}
    assert sum(row["kind"] == "scale" for row in scales.values()) == len(vectors)


def test_validation_loss_is_the_language_loss_of_the_first_windows_and_bits_are_of_the_same_text(small, data_folder, capsys):
    small("--model=moe-tiny", "--eval-tokens=100", "--micro-batch-size=4")
    folder, out = only_run(), capsys.readouterr().out
    assert config_of(folder)["eval_tokens"] == 96  # 6 windows of 16: what was evaluated
    model, tokenizer = train.load(folder)
    text = np.fromfile(data_folder / "val.bin", "<u2").astype(np.int64)[:97]
    tokens = torch.from_numpy(text)
    losses = [F.cross_entropy(model(tokens[None, i : i + 16])[0], tokens[i + 1 : i + 17]).item() for i in range(0, 96, 16)]
    val_loss = sum(losses) / 6
    assert float(rows_of(folder)[-1]["val_loss"]) == pytest.approx(val_loss, rel=1e-6)
    size = sum(len(tokenizer.decode_single_token_bytes(token)) for token in text[1:])
    assert f"{96 * val_loss / math.log(2) / size:.3f} bits a byte" in out


def test_every_window_can_be_drawn_and_what_is_evaluated_is_recorded():
    data = SimpleNamespace(train=np.arange(10, dtype="<u2"))
    s, machine = settings("--seq-len=8", "--batch-size=64"), train.Machine("cpu")
    assert set(train.batch(data, s, 0, machine)[:, 0].tolist()) == {0, 1}
    assert torch.equal(train.batch(data, s, 3, machine), train.batch(data, s, 3, machine))
    assert not torch.equal(train.batch(data, s, 3, machine), train.batch(data, s, 4, machine))
    assert not torch.equal(train.batch(data, s, 3, machine), train.batch(data, dataclasses.replace(s, seed=1), 3, machine))
    for asked, tokens, evaluated in (100, 13, 12), (100, 12, 8), (1, 13, 4), (9, 1000, 8):
        given = {"seq_len": 4, "eval_tokens": asked}
        assert train.resolve(given, machine, 64, tokens)[0].eval_tokens == evaluated


def test_micro_batches_change_nothing_but_rounding(small):
    for size in (4, 1):
        small(f"--micro-batch-size={size}", "--model=moe-tiny", "--eval-tokens=112", f"--out-dir=size{size}")
    for a, b in zip(rows_of(only_run("size4")), rows_of(only_run("size1"))):
        assert {k: float(v) for k, v in a.items()} == pytest.approx({k: float(v) for k, v in b.items()}, rel=1e-4)


@pytest.mark.parametrize("clip", [0, 0.1, 100])
def test_the_step_takes_the_clipped_gradient_of_both_losses(small, data_folder, monkeypatch, clip):
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.extend(
        (p, p.grad.clone()) for group in self.param_groups for p in group["params"]))  # fmt: skip
    small("--model=moe-tiny", f"--grad-clip={clip}", "--steps=1", "--micro-batch-size=2")
    s, config = checkpoint_of(only_run())["settings"], Config(16, 2, 2, 42, 300, 16, n_expert=8, top_k=2)
    model, data = Transformer(config).init_weights(0), prepare_data.TokenFolder(data_folder)
    tokens = train.batch(data, train.Settings(**s), 0, train.Machine("cpu"))
    language, balance, _ = model(tokens[:, :-1], tokens[:, 1:])
    gradients = torch.autograd.grad(language + 1e-3 * balance, list(model.parameters()))
    norm = torch.nn.utils.parameters_to_vector(gradients).norm()
    assert float(rows_of(only_run())[0]["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    factor = min(1, (clip or math.inf) / norm)
    total = sum(gradient.square().sum() for _, gradient in seen).sqrt()
    assert len(seen) == len(gradients) and total.item() == pytest.approx((factor * norm).item(), rel=1e-4)


def test_a_diverging_run_is_recorded_and_passed_over(small, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        clip = torch.nn.utils.clip_grad_norm_
        steps = itertools.count(1)
        infinite = lambda *args: clip(*args) * (math.nan if next(steps) == 13 else 1)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
        assert small("--norm-scale=none") == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "step 13" in error and "nan" in error and "--lr=0.004" in error
    assert config_of(only_run())["status"] == "diverged" and "step 13" in config_of(only_run())["reason"]
    saved = checkpoint_of(only_run())
    assert saved["record"]["step"] == 10 and all(p.isfinite().all() for p in saved["model"].values())
    assert small("--norm-scale=none", "--resume") == 1 and "step 13" in capsys.readouterr().out
    assert small("--norm-scale=none", "--overwrite") == 0 and statuses() == {"none": "done"}


def test_a_validation_loss_that_is_not_finite_is_a_divergence(small, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: (math.nan, torch.zeros(0)))
    assert small() == 1 and statuses() == {"standard": "diverged"}


def test_a_run_out_of_memory_is_told_in_one_line(small, monkeypatch, capsys):
    monkeypatch.setattr(train, "evaluate", lambda *_: torch.empty(2**60))
    assert small() == 1 and statuses() == {"standard": "failed"} and len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_ends_with_an_evaluation_and_a_checkpoint(small):
    assert small("--steps=7", "--checkpoint-every=0") == 0
    assert [row["step"] for row in rows_of(only_run())] == ["5", "7"] and checkpoint_of(only_run())["record"]["step"] == 7
    folder = only_run()
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {"status": "running"}))  # killed after its last step
    assert small("--steps=7", "--checkpoint-every=0", "--resume") == 0 and config_of(folder)["status"] == "done"


def test_nothing_of_an_overwritten_run_can_come_back(small, monkeypatch):
    small()
    monkeypatch.setattr(train, "train", Mock(side_effect=MemoryError))
    assert small("--overwrite") == 1
    assert {path.name for path in only_run().iterdir()} == {".lock", "config.json"}


def run_in_a_process(data_folder, *flags, **how):
    command = [sys.executable, HERE / "train.py", *SMALL, f"--data={data_folder}", "--out-dir=runs", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | how.pop("env", {})
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **how)


def test_a_sweep_is_a_process_a_run(small, data_folder, capfd):
    """One was done before, one is killed, one has a bad checkpoint: none touches another."""
    assert small("--norm-scale=hg") == 0
    bad = Path("runs", small_name(data_folder, "ap"))
    bad.mkdir()
    (bad / "checkpoint.pt").write_text("hello")
    threading.Thread(target=kill_when_it_trains, args=(small_name(data_folder, "none"),), daemon=True).start()
    code = small("--norm-scale", "hg", "none", "ap", "standard", "--resume", "--jobs=2")
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("tiny-")]
    last = {line.split("-")[1]: line for line in lines}
    assert code == 1 and "done already" in last["hg"] and "no checkpoint of this run" in last["ap"]
    assert "killed by signal 9" in last["none"] and "--resume" in last["none"] and "val loss" in last["standard"]
    assert statuses() == {"hg": "done", "none": "running", "ap": "failed", "standard": "done"}
    assert small("--norm-scale", "none", "hg", "--resume") == 0 and statuses()["none"] == "done"


def small_name(data_folder, label):
    args = vars(train.command_line().parse_args([*SMALL, f"--data={data_folder}", f"--norm-scale={label}"]))
    given = args | {name: values[0] for name, values in args.items() if isinstance(values, list)}
    data = prepare_data.TokenFolder(data_folder)
    return train.folder_name(*train.resolve(given, train.Machine("cpu"), data.vocab_size, len(data.val)), data.sha256)


def kill_when_it_trains(name):
    while not Path("runs", name, "config.json").exists():
        time.sleep(0.01)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--norm-scale=none" in words and b"--resume" in words:
            os.kill(int(process.name), signal.SIGKILL)


def test_a_sweep_that_is_stopped_saves_what_is_under_way(data_folder, tmp_path):
    flags = [*SMALL, f"--data={data_folder}", "--out-dir=runs", "--norm-scale", "none", "hg", "ap", "--steps=100000"]
    command = [sys.executable, HERE / "train.py", *flags, "--jobs=2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if ": step 5: " in line and "hg" in line:
            break
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "--resume goes on" in out
    assert statuses(tmp_path / "runs") == {"none": "interrupted", "hg": "interrupted"}


def test_a_closed_pipe_is_a_request_to_stop(data_folder, tmp_path):
    command = shlex_join([sys.executable, HERE / "train.py", *SMALL, f"--data={data_folder}", "--steps=100000"])
    shell = f"set -o pipefail; {command} | head -n 12"
    result = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 141 and result.stderr == "" and statuses(tmp_path / "runs") == {"standard": "interrupted"}


def shlex_join(words):
    return " ".join(f"'{word}'" for word in words)


def test_without_standard_output(data_folder, tmp_path):
    command = shlex_join([sys.executable, HERE / "train.py", *SMALL, f"--data={data_folder}", "--steps=5"])
    assert subprocess.run(["bash", "-c", f"{command} >&-"], cwd=tmp_path, timeout=120).returncode == 0
    assert statuses(tmp_path / "runs") == {"standard": "done"}


def test_in_a_thread_as_in_a_notebook(small):
    codes = []
    thread = threading.Thread(target=lambda: codes.extend([small("--steps=5"), small("--norm-scale", "none", "hg", "--steps=5")]))
    thread.start()
    thread.join()
    assert codes == [0, 0] and set(statuses().values()) == {"done"}


def test_a_stray_rank_says_nothing(small, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert small("--steps=5") == 0 and config_of(only_run())["processes"] == 1


def test_resume_says_that_it_starts_from_nothing_and_passes_over_what_is_done(small, capsys):
    assert small("--resume") == 0 and "starts at step 0" in capsys.readouterr().out
    before = (only_run() / "metrics.csv").stat().st_mtime_ns
    assert small("--resume") == 0 and "done already" in capsys.readouterr().out
    assert (only_run() / "metrics.csv").stat().st_mtime_ns == before


def test_an_existing_run_is_neither_overwritten_nor_shared(small, capsys, monkeypatch):
    small()
    told_in_one_line(capsys, small, "--resume", "--overwrite")
    with train.RunFolder(only_run(), train.Machine("cpu")).lock():
        told_in_one_line(capsys, lambda: small("--overwrite"), "another process")
    assert small("--overwrite") == 0  # and no lock is left behind
    monkeypatch.setattr(train.FileLock, "acquire", Mock(side_effect=OSError(37, "No locks available")))
    assert small("--overwrite") == 0 and "No locks available" in capsys.readouterr().err


def test_two_texts_in_folders_of_one_name_are_two_runs(small, data_folder, tmp_path):
    (tmp_path / "other.txt").write_text("some other words and more of them\n\n" * 400)
    other = prepare_data.prepare(inputs=[tmp_path / "other.txt"], out_dir=tmp_path / "x", name=data_folder.name, vocab_size=257)
    assert small("--steps=5") == small("--steps=5", f"--data={other}") == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_folder_names_and_commands():
    def named(*flags):
        args = vars(train.command_line().parse_args(list(flags)))
        given = args | {name: values[0] for name, values in args.items() if isinstance(values, list)}
        return train.folder_name(*train.resolve(given, train.Machine("cpu")), {"train.bin": "0123456789"})

    plain = "tiny-standard-adamw-cosine-lr0.004-seed0"
    assert named() == named("--d-model=64", "--data=data/../data/sotu", "--compile=off", "--checkpoint-every=3") == plain
    assert named("--tokens=10240") == plain + "-steps10" and named("--data=x/a b") == plain + "-dataa_b_012345"
    assert named("--lr=0.0045") == plain.replace("0.004", "0.0045")
    assert named("--steps=6000", "--d-ff=+8") == plain + "-steps6000-d_ff178"  # the warm-up follows from the steps


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry-run", "--model=llama-1b", "--norm-scale", "standard", "unified"]) == 0
    out = capsys.readouterr().out
    assert "1,028,065,024 parameters" in out and "Output-Norm scale vectors" in out and "weight decay 0" in out
    assert list(tmp_path.iterdir()) == []


def test_benchmark_leaves_its_table(small):
    assert small("--benchmark", "--norm-scale", "standard", "unified", "--out-dir=bench here") == 0
    with open("bench here/benchmark.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == "norm_scale ms_per_step tokens_per_second tflops peak_memory_mb ratio".split()
    assert [row["norm_scale"] for row in rows] == ["standard", "unified"] and float(rows[0]["ratio"]) == 1
    speed, rate = float(rows[1]["ms_per_step"]), float(rows[1]["tokens_per_second"])
    assert float(rows[1]["ratio"]) == pytest.approx(speed / float(rows[0]["ms_per_step"]), rel=1e-3)
    flops = count(Config(16, 2, 2, 42, 300, 16, NormScale.parse("unified"))).flops_per_token
    assert rate == pytest.approx(64_000 / speed, rel=1e-3) and float(rows[1]["tflops"]) == pytest.approx(rate * flops / 1e12, abs=1e-4)
    assert os.listdir("bench here") == ["benchmark.csv"]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_torch_compile_gives_the_same_losses(small):
    for switch in ("on", "off"):
        small(f"--compile={switch}", "--norm-scale=unified", "--steps=6", f"--out-dir={switch}")
    for a, b in zip(rows_of(only_run("on")), rows_of(only_run("off"))):
        assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), abs=1e-5)


@pytest.mark.parametrize("gpu, triton, experts, expected", [(0, 1, 0, "off"), (1, 1, 0, "on"), (1, 0, 0, "off"), (1, 1, 8, "off")])
def test_compile_where_it_works(monkeypatch, gpu, triton, experts, expected):
    monkeypatch.setattr(train, "has_triton", lambda: triton)
    assert train.default_compile(SimpleNamespace(device="cuda" if gpu else "cpu", n_expert=experts)) == expected


def test_two_processes_give_the_losses_of_one(small, data_folder):
    flags = ["--model=moe-tiny", "--norm-scale=unified", "--micro-batch-size=1", "--eval-tokens=16"]  # one window for two
    small("--out-dir=one", *flags)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", HERE / "train.py"]

    def torchrun(*more):
        command = [*start, *SMALL, f"--data={data_folder}", "--out-dir=two", *flags, *more]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)

    assert (result := torchrun()).returncode == 0, result.stderr
    for a, b in zip(rows_of(only_run("one")), rows_of(only_run("two")), strict=True):
        for key, tolerance in (("train_loss", 1e-5), ("val_loss", 1e-5), ("grad_norm", 1e-4)):
            assert float(a[key]) == pytest.approx(float(b[key]), abs=tolerance)
    assert "torchrun --standalone --nproc-per-node=2 train.py" in config_of(only_run("two"))["command"]
    for more, words in (["--batch-size=3"], "do not split over 2"), (["--seed", "0", "1"], "one run at a time"):
        assert (bad := torchrun(*more)).returncode != 0 and words in bad.stderr


# ---------------------------------------------------------------------------------------------------
# Mistakes: one line, exit code 2, nothing half-written

WHOLE = "steps tokens batch-size micro-batch-size seq-len d-model n-layer n-head d-ff eval-every eval-tokens jobs".split()


@pytest.mark.parametrize("flag", [f"--{name}" for name in WHOLE])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "nan", "many", "1" + "0" * 30])
def test_whole_numbers_have_a_range(small, tmp_path, capsys, flag, value):
    told_in_one_line(capsys, lambda: small(f"{flag}={value}"), flag, value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lr=0"], ["--lr", "0"]),
        (["--lr=-1e-3"], ["--lr"]),
        (["--lr=nan"], ["--lr", "nan"]),
        (["--lr=inf"], ["--lr"]),
        (["--lr=1e9"], ["--lr"]),
        (["--lr=fast"], ["fast"]),
        (["--lr"], ["--lr"]),
        (["--weight-decay=-0.1"], ["--weight-decay"]),
        (["--weight-decay=nan"], ["--weight-decay"]),
        (["--grad-clip=-1"], ["--grad-clip"]),
        (["--grad-clip=nan"], ["--grad-clip"]),
        (["--warmup-steps=-1"], ["--warmup-steps"]),
        (["--checkpoint-every=-1"], ["--checkpoint-every"]),
        (["--seed=-1"], ["--seed"]),
        (["--seed=1e3"], ["--seed"]),
        (["--seed", "0", "99999999999999"], ["--seed"]),
        (["--d-ff=+0"], ["--d-ff"]),
        (["--d-ff=+-3"], ["--d-ff"]),
        (["--d-ff=++5"], ["--d-ff"]),
        (["--lr", "0.004", "0.0040000001"], ["share a folder"]),
        (["--norm-scale=standart"], ["standart", "standard"]),
        (["--norm-scale", "none", "hg+hgg"], ["hgg"]),
        (["--model=llama"], ["llama", "tiny"]),
        (["--optimizer=sgd"], ["sgd"]),
        (["--schedule=linear"], ["linear"]),
        (["--device=tpu"], ["tpu"]),
        (["--device=mps"] if not torch.backends.mps.is_available() else ["--device=x"], ["--device"]),
        (["--dtype=float16"], ["float16"]),
        (["--dtype=bfloat16", "--device=cpu"], ["bfloat16", "cpu"]),
        (["--compile=maybe"], ["maybe"]),
        (["--steps=3", "--tokens=100"], ["--tokens", "--steps"]),
        (["--resume", "--overwrite"], ["--overwrite"]),
        (["--dry-run", "--benchmark"], ["--benchmark"]),
        (["--n-heads=4"], ["--n-heads"]),
        (["--step=3"], ["--step"]),
        (["--n-head=3"], ["3 heads", "16"]),
        (["--n-head=16"], ["rotary"]),
        (["--model=moe-tiny", "--compile=on"], ["--compile", "experts"]),
        (["--batch-size=4", "--micro-batch-size=3"], ["--micro-batch-size"]),
        (["--d-model=65536", "--n-layer=1000"], ["GiB"]),
        (["--batch-size=1048576", "--micro-batch-size=1048576"], ["GiB"]),
        (["--seq-len=100000"], ["train.bin", "too few"]),
        (["--data=nowhere"], ["nowhere", "prepare_data.py"]),
        (["--batch-size=100000", "--n-layer=1000"], ["GiB"]),
        (["--out-dir=/dev/null/runs"], ["/dev/null"]),
        (["--out-dir=/dev/null/runs", "--benchmark", "--steps=1"], ["/dev/null"]),
        (["stray"], ["stray"]),
    ],
)
def test_mistakes_on_the_command_line(small, tmp_path, capsys, flags, words):
    told_in_one_line(capsys, lambda: small(*flags), *words)
    assert list(tmp_path.iterdir()) == []


def test_compile_without_a_compiler(small, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    told_in_one_line(capsys, lambda: small("--compile=on"), "C++ compiler")


def test_a_vocabulary_larger_than_the_presets(data_folder, tmp_path, capsys, monkeypatch):
    shutil.copytree(data_folder, tmp_path / "large")
    meta = json.loads((data_folder / "meta.json").read_text())
    (tmp_path / "large" / "meta.json").write_text(json.dumps(meta | {"vocab_size": 60_000}))
    flags = [*SMALL, "--model=llama-0.12b", f"--data={tmp_path / 'large'}"]
    told_in_one_line(capsys, lambda: train.main(flags), "60,000", "50,304")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def rewrite(folder, change):
    saved = checkpoint_of(folder)
    change(saved)
    torch.save(saved, folder / "checkpoint.pt")


def in_config(**values):
    return lambda folder: (folder / "config.json").write_text(json.dumps(config_of(folder) | values))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (in_config(lr="other"), ["lr is other"]),
        (in_config(norm_scale="other"), ["norm_scale is other"]),
        (in_config(d_ff="other"), ["d_ff is other"]),
        (in_config(data_sha256="other"), ["other data"]),
        (lambda folder: (folder / "config.json").write_text("not JSON"), ["config.json"]),
        (lambda folder: (folder / "config.json").write_text("[1]"), ["config.json"]),
        (lambda folder: os.truncate(folder / "checkpoint.pt", 3000), ["no checkpoint of this run"]),
        (lambda folder: os.truncate(folder / "checkpoint.pt", 0), ["no checkpoint of this run"]),
        (lambda folder: (folder / "checkpoint.pt").write_text("hello"), ["no checkpoint of this run"]),
        (lambda folder: torch.save({"weights": torch.zeros(3)}, folder / "checkpoint.pt"), ["no checkpoint of this run"]),
        (lambda folder: torch.save({"model": Payload()}, folder / "checkpoint.pt"), ["no checkpoint of this run"]),
        (lambda folder: rewrite(folder, lambda saved: saved["model"].pop("embedding")), ["no checkpoint", "--overwrite"]),
        (lambda folder: rewrite(folder, lambda saved: saved["optimizers"].pop()), ["no checkpoint", "--overwrite"]),
    ],
)
def test_mistakes_in_a_run_that_goes_on(small, capsys, spoil, words):
    small("--steps=6")
    in_config(status="running")(only_run())
    spoil(only_run())
    capsys.readouterr()
    told_in_one_line(capsys, lambda: small("--steps=6", "--resume"), *words)
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoint.pt", "config.json"])
def test_a_full_disk_is_told_and_leaves_whole_files(small, monkeypatch, capsys, name):
    def full(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told_in_one_line(capsys, small, "No space left on device")
    assert not list(Path("runs").glob("*/*.part")) and not list(Path("runs").glob("*/checkpoint.pt"))


def test_a_disk_that_fills_up_within_a_checkpoint(small, capsys):
    resource = pytest.importorskip("resource")  # not on Windows
    small("--steps=5", "--out-dir=before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file may grow larger
    try:
        told_in_one_line(capsys, small, "too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in only_run().iterdir()} == {".lock", "config.json", "metrics.csv", "scales.csv"}


# ---------------------------------------------------------------------------------------------------
# The slow one


@pytest.mark.kill
def test_killed_at_any_moment_a_run_goes_on_as_if_it_had_not_been(request, small, data_folder):
    if "kill" not in (request.config.getoption("-m") or ""):
        pytest.skip("runs with -m kill")
    steps = ["--steps=3000", "--eval-every=9", "--eval-tokens=100", "--checkpoint-every=2"]
    small("--out-dir=whole", *steps)
    command = [sys.executable, HERE / "train.py", *SMALL, f"--data={data_folder}", "--out-dir=cut", "--resume", *steps]
    rng, killed = random.Random(0), 0
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:  # to the first step of this sitting
            if line.startswith("step"):
                break
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        lines = [row["step"] for row in rows_of(only_run("cut"))] if list(Path("cut").glob("*/metrics.csv")) else []
        assert len(lines) == len(set(lines))
    assert killed >= 15
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert rows_of(only_run("cut")) == rows_of(only_run("whole")) and same_weights(only_run("cut"), only_run("whole"))
# ---------------------------------------------------------------------------------------------------
# Pictures and the table
# (imports: itertools, json, os, re, subprocess, sys, warnings; partial, numpy as np, pytest, torch, plot; HERE)


def write_run(root, norm_scale="standard", seed=0, lr=0.004, losses=(7.6, 4.0, 3.9), name=None, **config):
    """A run folder with an evaluation every 10 steps of 1,000 tokens; returns it."""
    config = {
        "norm_scale": norm_scale, "seed": seed, "lr": lr, "model": "tiny", "optimizer": "adamw", "schedule": "cosine",
        "data": "data/sotu", "data_sha256": {"val.bin": "ab" * 32}, "dtype": "float32", "steps": 10 * (len(losses) - 1),
        "batch_size": 8, "seq_len": 125, "d_model": 64, "n_layer": 4, "n_head": 4, "d_ff": 170, "weight_decay": 0.1,
        "grad_clip": 1.0, "warmup_steps": 10, "vocab_size": 2048, "eval_tokens": 1000, "parameters": 459_328,
        "activated_parameters": 459_328, "status": "done", "reason": None,
    } | config  # fmt: skip
    folder = root / (name or f"run{len(list(root.iterdir()))}")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [f"{10 * i},{10_000 * i},,{lr},,{loss},1.0,1000,100" for i, loss in enumerate(losses)]
    header = "step,tokens,seconds,lr,train_loss,val_loss,grad_norm,tokens_per_second,peak_memory_mb"
    (folder / "metrics.csv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return folder


def plotted(capsys, root, *flags):
    """What plot.py prints, split where two spaces or more are; its picture must be there, whole."""
    plot.main([str(root), f"--out={root / 'picture.png'}", *flags])
    assert (root / "picture.png").read_bytes().startswith(b"\x89PNG")
    return [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]


def loss_axes(root, baseline="standard"):
    with plot.matplotlib.rc_context(plot.STYLE):
        figure, _ = plot.loss_picture(plot.make_curves(plot.read_runs([root]), baseline), baseline)
    figure.draw_without_rendering()
    return figure, figure.axes


@pytest.mark.parametrize("df, t", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_quantile_of_students_t(df, t):
    assert plot.student_t(df) == pytest.approx(t, abs=5e-4)


def test_table_pairs_by_seed_and_counts_only_what_finished(tmp_path, capsys):
    for seed, loss in enumerate((3.90, 3.91, 3.95, 3.99)):
        write_run(tmp_path, "standard", seed, losses=(7.6, 4.0, loss))
    for seed, loss in enumerate((3.87, 3.91, 3.93)):  # minus standard: -0.03, 0, -0.02
        torn = write_run(tmp_path, "unified", seed, losses=(7.6, 4.0, loss)) / "metrics.csv"
        torn.write_text(torn.read_text() + "30,30000,,,,1,,,1", encoding="utf-8")  # cut off: no line
        write_run(tmp_path, "hg", seed, losses=(7.6, 4.0, loss - 0.03))
    write_run(tmp_path, "unified", 3, losses=(7.6, 1.0), steps=20, status="running")
    write_run(tmp_path, "unified", 4, losses=(7.6, 1.0), steps=20)  # done, it says, but one evaluation is missing
    write_run(tmp_path, "none", 0, losses=(7.6, 4.1, 4.0))
    write_run(tmp_path, "none", 1, losses=(7.6, "nan"), steps=20, status="diverged", reason="not\nfinite")
    write_run(tmp_path, "ap", 0, losses=(7.6, 4.0, "inf"))  # done, it says
    write_run(tmp_path, "ap", 1, losses=(7.6, "-inf"), steps=20, status="failed")
    (write_run(tmp_path, "ap", 2, steps=20, status="failed", reason="no memory") / "metrics.csv").unlink()
    lines = plotted(capsys, tmp_path)
    table, left_out = {row[0]: row[1:] for row in lines[2:7]}, [row[0] for row in lines[7:-1]]
    # standard error of (-0.03, 0, -0.02): sqrt((0.0133^2 + 0.0167^2 + 0.0033^2) / 2 / 3) = 0.00882; times 4.303
    assert "95 %" in lines[1][4]
    assert table["unified"] == ["0.004", "3 of 5", "3.9033", "-0.0167 ± 0.0379", "459,328"]
    assert table["hg"][2:4] == ["3.8733", "-0.0467 ± 0.0379 *"]
    assert table["standard"] == ["0.004", "4 of 4", "3.9375", "459,328"]
    assert table["none"][:4] == ["0.004", "1 of 2", "4.0000", "+0.1000 ± -"]
    assert table["ap"][:3] == ["0.004", "0 of 3", "inf"]
    reasons = {re.sub(r".*?: .*(run\d+) \(", r"\1 (", line) for line in left_out}
    assert len(left_out) == 6 and {line.split(":")[0] for line in left_out} == {"unfinished", "diverged", "failed"}
    assert {"run13 (step 10 of 20): not finite", "run16 (step 0 of 20): no memory"} < reasons


def test_each_variant_at_one_common_and_at_its_own_best_lr(tmp_path, capsys):
    finals = {"standard": {0.002: 3.8, 0.004: 3.9}, "none": {0.004: 4.0, 0.002: 4.1, 0.008: 3.6}}
    for norm_scale, rates in finals.items():
        for lr, loss in rates.items():
            for seed in range(2 if lr == 0.004 else 1):
                write_run(tmp_path, norm_scale, seed, lr, (7.6, 4.0, loss))
    write_run(tmp_path, "none", 1, 0.008, (7.6, "inf"), steps=20, status="diverged")  # so 0.008 is not none's best
    common, best = [row for row in plotted(capsys, tmp_path) if row[0] == "none"]
    assert common[1:5] == ["0.004", "2 of 2", "4.0000", "+0.1000 ± 0.0000 *"]
    assert best[1:5] == ["0.004", "2 of 2", "4.0000", "+0.2000 ± -"]  # standard at its best, 0.002


def test_labels_name_what_differs_and_bases_follow(tmp_path):
    other = {"val.bin": "cd" * 32}
    for settings in (
        dict(norm_scale="standard"), dict(norm_scale="unified"), dict(norm_scale="none", seed=5, lr=0.1),
        dict(norm_scale="standard", d_ff=178), dict(norm_scale="none", d_ff=171), dict(norm_scale="none", dtype="half"),
        dict(norm_scale="none", model="big", d_model=128, n_head=8), dict(norm_scale="none", steps=60, warmup_steps=30),
        dict(norm_scale="none", data="C:\\$_$", data_sha256=other), dict(norm_scale="none", eval_tokens=2000),
        dict(norm_scale="none", data="x/$_$", data_sha256={"train.bin": "ef" * 32} | other),
        dict(norm_scale="none", data="../data/sotu", seed=6, lr=0.1),  # the same data by another way
    ):  # fmt: skip
        write_run(tmp_path, **settings)
    curves = plot.make_curves(plot.read_runs([tmp_path, tmp_path / "run1" / ".." / "run0"]), "standard")
    assert {curve.label: curve.base and curve.base.label for curve in curves} == {
        "standard": "standard", "unified": "standard", "none": "standard", "none, half": "standard",
        "standard, d_ff 178": "standard",  # the width control is itself compared
        "none, d_ff 171": "standard",  # the only standard that others are paired with
        "none, big": None, "none, steps 60": None,  # d_model, n_head and warmup_steps follow
        "none, eval_tokens 2000": None,  # other losses are never compared
        "none, $_$ cdcdcdcd": None, "none, $_$ efefefef cdcdcdcd": None,
    }  # fmt: skip
    plot.main([str(tmp_path), f"--out={tmp_path / 'a.pdf'}"])


def test_each_size_is_compared_with_its_own(tmp_path):
    for norm_scale, d_model in itertools.product(("standard", "unified"), (64, 128)):
        write_run(tmp_path, norm_scale, d_model=d_model)
    curves = plot.make_curves(plot.read_runs([tmp_path]), "standard")
    assert all(curve.config["d_model"] == curve.base.config["d_model"] for curve in curves)


def test_a_copy_counts_once_through_links_and_cycles(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    folder = write_run(tmp_path / "elsewhere")
    write_run(tmp_path / "runs", "none")
    try:
        (tmp_path / "runs" / "link").symlink_to(folder, target_is_directory=True)
        (folder / "cycle").symlink_to(tmp_path / "runs", target_is_directory=True)
    except OSError:
        pytest.skip("no permission to make links")
    write_run(tmp_path / "runs", name="copy", data="../data/sotu")  # the same losses
    runs = plot.read_runs([tmp_path / "runs", folder])
    assert [run.folder.name for run in runs] == ["copy", "link", "run0"]
    curves = plot.make_curves(runs, "standard")
    assert [[list(seeds) for seeds in curve.rates.values()] for curve in curves] == [[[0]], [[0]]]


@pytest.mark.parametrize("is_baseline, most", [(True, 52), (False, 312)])
def test_every_curve_has_a_look_of_its_own_or_is_refused(is_baseline, most):
    curves = [plot.Curve({}, {}) for _ in range(most + 1)]
    for curve in curves:
        curve.base = curve if is_baseline else None
    styles = plot.looks(curves[:most]).values()
    assert len({(style["color"], style["ls"], style["marker"]) for style in styles}) == most
    with pytest.raises(ValueError, match="cannot be told apart"):
        plot.looks(curves)


def test_legends_of_30_variants_leave_the_axes_their_room(tmp_path):
    for i in range(30):
        write_run(tmp_path, "standard" if i == 0 else f"variant {i}")
    figure, axes = loss_axes(tmp_path)
    for axis in axes:
        box = axis.get_window_extent()
        assert box.width > 400 and box.height > 330  # of 600 by 420, with the ticks
    legend = axes[-1].get_legend().get_window_extent()
    assert legend.y0 >= 0 and legend.y1 <= figure.bbox.y1 and legend.x1 <= figure.bbox.x1


def test_limits_hold_the_ends_but_no_spike_and_bars_stand_apart(tmp_path):
    falling = [7.6, *(4 + 0.5**i for i in range(9))]
    for norm_scale, end in (("standard", 4.0), ("none", 4.6), ("unified", 3.99)):
        for seed in (0, 1, 2):
            losses = [*falling, end + 0.001 * seed * (norm_scale == "none")]
            losses[7] += 90 * (norm_scale == "unified" and seed == 0)
            write_run(tmp_path, norm_scale, seed, losses=losses)
    _, (absolute, relative) = loss_axes(tmp_path)
    assert absolute.get_xlim()[0] == 27_000  # 0.9 of the first evaluation after 30 % of 100,000
    low, high = absolute.get_ylim()
    assert low < 3.99 and 4.6 < high < 5.5
    low, high = relative.get_ylim()
    assert low < -0.01 and 0.6 < high < 1
    bars = [bar.get_children()[0] for bar in relative.containers]
    centres = {round(bar.get_ydata()[0], 4): bar.get_xdata()[0] for bar in bars}
    assert sorted(centres) == [-0.01, 0.601] and len(set(centres.values())) == 2
    assert all(x > 100_000 for x in centres.values())
    ends = relative.containers[0].get_children()[-1].get_segments()[0][:, 1]  # differences 0.6, 0.601, 0.602
    np.testing.assert_allclose(ends, 0.601 + np.array([-1, 1]) * 4.3027 * 0.001 / 3**0.5, rtol=1e-6)


def test_names_are_drawn_as_they_are(tmp_path):
    assert plot.plain("$x$ \u4e2d \u0416") == r"\$x\$ \u4e2d " + "\u0416"
    write_run(tmp_path, data="\u4e2d\u6587")
    write_run(tmp_path, data="a$b$", data_sha256={"val.bin": "cd" * 32})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.main([str(tmp_path), f"--out={tmp_path / 'picture.png'}"])


@pytest.mark.parametrize("command", ["{} > out", "PYTHONIOENCODING=cp1252 {} > out", "{} >&-", "{} | true"])
def test_picture_is_saved_wherever_the_words_go(command, tmp_path):
    write_run(tmp_path, name="\u0416\u4e2d", status="running")
    if os.name == "nt":
        pytest.skip("a shell of Unix")
    run = f'"{sys.executable}" "{HERE / "plot.py"}" . --out=picture.png'
    ended = subprocess.run(command.format(run), shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and (tmp_path / "picture.png").is_file()
    if "cp1252" in command:
        assert "unfinished: ?? (step 20 of 20)" in (tmp_path / "out").read_text(encoding="cp1252")


def test_import_leaves_the_backend_alone():
    code = "import matplotlib, sys; matplotlib.use('svg'); import plot; "
    code += "assert matplotlib.get_backend() == 'svg' and not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


def test_scaling_law_of_exact_losses(tmp_path, capsys):
    E, a, b, gain = 1.7, 60.0, 0.11, 1.25
    for i, D in enumerate((64, 128, 256, 512, 1024)):
        N = 10 ** (5 + i / 2)
        for norm_scale, C in (("standard", 6 * N * 20_000), ("unified", gain * 6 * N * 20_000)):
            for seed, shift in enumerate((-0.01, 0.01)):  # seeds are averaged
                loss = E + a * C**-b + shift
                write_run(tmp_path, norm_scale, seed, losses=(7, 5, loss), d_model=D, activated_parameters=N)
    rows = plotted(capsys, tmp_path, "--kind=scaling")
    numbers = [[float(x) for x in re.findall(r"\d+\.?\d*(?:e\+\d+)?", row[0])] for row in rows]
    np.testing.assert_allclose(numbers[0][:3], [E, a, b], rtol=1e-3)
    np.testing.assert_allclose(numbers[1][:3], [E, a * gain**-b, b], rtol=1e-3)
    assert numbers[2][0] == pytest.approx(gain, rel=0.01)
    C = np.geomspace(1e10, 1e12, 5)
    E, a, b = plot.fit_power_law(C, 20 - np.log10(C))  # the best E would be negative
    np.testing.assert_allclose(E + a * C**-b, 20 - np.log10(C), rtol=0.01)
    assert E == 0


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


def test_theory_lines_and_marks_meet():
    teacher = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for panel, W, known, rtol in (
        (plot.whole_course, torch.eye(4, dtype=torch.float64), slice(None), 0.01),
        (plot.early_difference, teacher / teacher.norm(), slice(4), 0.05),
    ):
        axis = plot.Figure().subplots()
        panel(axis, W)
        for line, marks in zip(axis.lines[::2], axis.lines[1::2]):
            t, measured = (numbers[known] for numbers in marks.get_data())
            np.testing.assert_allclose(measured, np.interp(t, *line.get_data()), rtol=rtol)


def test_matched_states_lie_where_the_theorems_say():
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    axis = plot.Figure().subplots()
    plot.matched_states(axis, draw(3, 12), draw)
    for points in axis.lines[:4]:
        standard, variant = points.get_data()
        holds = "≥" in points.get_label()
        assert all(variant > standard * (1 - 1e-9)) == holds and (holds or any(variant < standard))


def test_theory_needs_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "theory_picture", plot.Figure)
    plot.main(["nowhere", "--kind=theory", f"--out={tmp_path / 'theory.svg'}"])
    assert (tmp_path / "theory.svg").read_text(encoding="utf-8").startswith("<?xml")


def spoil_record(name, old, new):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    "mistake, flags, words",
    [
        (spoil_record("config.json", "{", "{{"), [], "run0: JSONDecodeError: Expecting property name"),
        (spoil_record("config.json", '"lr"', '"rate"'), [], "run0: ValueError: config.json: lr is missing or of another"),
        (spoil_record("config.json", '"seed": 0', '"seed": "0"'), [], "run0: ValueError: config.json: seed is missing or"),
        (spoil_record("config.json", '{"val.bin"', '["val.bin", 1], "_": {"1"'), [], "run0: ValueError: "),
        (spoil_record("metrics.csv", "val_loss", "loss"), [], "run0: KeyError: 'val_loss'"),
        (spoil_record("metrics.csv", "4.0,", ""), [], "run0: ValueError: metrics.csv: lines with different numbers of"),
        (spoil_record("metrics.csv", "20000", "nan"), [], "run0: ValueError: invalid literal for int"),
        (lambda folder: (folder / "metrics.csv").unlink(), [], "no run with an evaluation"),
        (lambda folder: write_run(folder.parent, losses=(7, 4, 3)), [], "run1: the same settings and seed, but other losses"),
        (None, ["nowhere"], "there is no folder nowhere"),
        (None, ["--kind=weights"], "no run has a scales.csv"),
        (lambda folder: (folder / "scales.csv").write_text("step\n1\n"), ["--kind=weights"], "run0: KeyError: 'kind'"),
        (lambda folder: write_run(folder.parent, "hg"), ["--kind=scaling"], "four finished sizes; standard has 1"),
        (lambda folder: write_run(folder.parent, "hg", eval_tokens=9), ["--kind=scaling"], "not of the same eval_tokens"),
        (None, ["--out=picture.exe"], "'exe' is not supported"),
        (None, ["--out=nowhere/picture.png"], "No such file or directory"),
        (None, ["--kin=loss"], "unrecognized arguments"),
    ],
)  # fmt: skip
def test_mistakes_in_records(mistake, flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path)
    if mistake:
        mistake(folder)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error
    assert not [path for path in tmp_path.glob("*.p*") if path.is_file()]
