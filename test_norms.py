"""The second reading of the paper, then the promises of the trainer. Quick tests first; `-m kill` runs the slow one.

    python -m pytest                # all but the test that kills runs
    python -m pytest -m kill        # that one: some minutes

Equations are checked in float64 against formulas that are written out here once more, activation by activation.
"""

import csv
import hashlib
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
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import model as model_module
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
    return raw["gamma"]


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
        torch.testing.assert_close(load.sum(-1), torch.ones(2))


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

    def step_with_signal(self, number, tokens, stop=0):
        if number + 1 == step:
            os.kill(os.getpid(), signum)
        return original(self, number, tokens, stop)

    monkeypatch.setattr(train.Trainer, "step", step_with_signal)


@pytest.mark.parametrize(
    "signum, code, flags",
    [
        (signal.SIGTERM, 143, []),
        (signal.SIGINT, 130, ["--model=moe-tiny", "--optimizer=muon", "--batch-size=2"]),
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


def test_wsd_goes_on_from_where_its_decay_began(small):
    small("--schedule=wsd", "--out-dir=long", "--steps=40", "--warmup-steps=10")
    small("--schedule=wsd", "--out-dir=grown")
    folder = only_run("grown")
    assert torch.load(folder / "checkpoint-stable.pt", weights_only=True)["progress"]["step"] == 16
    assert [row["step"] for row in rows_of(folder)] == ["5", "10", "15", "20"]
    assert small("--schedule=wsd", "--out-dir=grown", "--steps=40", "--resume") == 0
    assert rows_of(folder) == rows_of(only_run("long"))
    command = json.loads((folder / "config.json").read_text())["command"]
    assert "--steps=40" in command and "--warmup-steps=10" in command


def test_a_diverging_run_stops_before_its_weights_are_touched_and_others_go_on(small, monkeypatch, capsys):
    original = train.Trainer.step

    def poisoned(self, number, tokens, stop=0):
        if number == 12 and self.s.norm_scale == "none":
            next(iter(self.model.blocks.parameters())).register_hook(lambda grad: grad * math.nan)
        return original(self, number, tokens, stop)

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
    # A checkpoint of two processes goes on in one.
    shutil.copytree("two", "then-one")
    folder = only_run("then-one")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"status": "running"}))
    assert small("--out-dir=then-one", "--resume", *flags) == 0
    bad = torchrun([*SMALL, f"--data={data_folder}", "--batch-size=3"])
    assert bad.returncode != 0 and "3 sequences do not split over 2 processes" in bad.stderr


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
        (["--model=moe-tiny", "--d-model=12"], ["12", "multiple of 8"]),
        (["--batch-size=4", "--micro-batch-size=3"], ["--micro-batch-size"]),
        (["--d-model=65536", "--n-layer=1000"], ["GiB"]),
        (["--batch-size=1048576", "--micro-batch-size=1048576"], ["GiB"]),
        (["--seq-len=100000"], ["train.bin", "too few"]),
        (["--data=nowhere"], ["nowhere", "prepare_data.py"]),
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
    elif how == "meta is a list":
        (folder / "meta.json").write_text("[1]")
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


@pytest.mark.kill
def test_killed_at_any_moment_a_run_goes_on_as_if_it_had_not_been(request, small, data_folder, tmp_path):
    if "kill" not in (request.config.getoption("-m") or ""):
        pytest.skip("runs with -m kill")
    steps = ["--steps=400", "--eval-every=7", "--checkpoint-every=2"]
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
