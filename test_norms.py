"""The paper's equations a second time, as tests; then what the trainer promises.

    python -m pytest                # all but kill; peers and gpu where they can run
    python -m pytest -m peers       # against transformers' models, where it is installed
    python -m pytest -m kill        # a run killed ten times: about a minute
    python -m pytest -m gpu         # where there is one
Equations are checked in float64 against formulas that are written out once more.
"""

import copy
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
import torch
import torch.nn.functional as F

import norms
import plot
import prepare_data
import train
from model import Transformer, count, llama_state_dict
from norms import NormScale, OutputNorm, ScaleVector, branches_of_a_norm, fold, normalize, scale_parameters
from prepare_data import TokenFolder

torch.set_num_threads(1)  # tensors so small only suffer from a second one
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # marks need no file of their own
HERE = Path(__file__).parent

CHOICES = itertools.product(*(["", *parts] for parts in norms.GRAMMAR.values()))
LABELS = ["none", *("+".join(filter(None, parts)) or "standard" for parts in CHOICES)]  # all of the grammar
VARIANTS = [label for label in LABELS if label.split("+")[-1] not in norms.GRAMMAR["weight decay"]]
MODELS = ["tiny", "gemma-tiny", "moe-tiny"]
SMALL = "--d-model=40 --n-head=2 --n-layer=2 --d-ff=48 --seq-len=17"  # experts have a width of 26
TOKENS = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(2))


def config_of(flags):
    """The model's Config for these flags, with a vocabulary of 64 where the preset has none."""
    return train.model_config(planned(flags).settings)


def small_model(label, model="tiny", seed=0):
    return Transformer(config_of(f"--model={model} --norm-scale={label} {SMALL}")).init_weights(seed)


def draw(*shape, seed):
    """Normal random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def stirred_model(label, model="tiny"):
    """A small model away from its start: no vector is 1 any more, neither attention nor router is flat."""
    built = small_model(label, model)
    vectors = scale_parameters(built)
    for i, p in enumerate(built.parameters()):
        p.copy_(p + 0.3 * draw(*p.shape, seed=i) if p in vectors else 4 * p)
    return built


@pytest.fixture
def in_float64(monkeypatch):
    """Models are made in float64, and what they compute in float32 (Norm, RoPE, router, loss) is float64."""
    float32 = torch.float32
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)  # a name that transformers uses
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(float32)


def agree(ours, expected, what="the two sides of the equation", tolerance=1e-8):
    """Fails, with `what` first, where tensors or dicts of tensors differ by more than the tolerance."""
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def gradients(y, leaves):
    """{name: gradient of ||y||^2} for {name: tensor}."""
    values = torch.autograd.grad(y.square().sum(), leaves.values(), materialize_grads=True)
    return dict(zip(leaves, values, strict=True))


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
# Norm and gamma alone, and the strings that name a variant


def rms_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def gamma_of(vector, label):
    """gamma of a ScaleVector by the paper's formula; a form added to FORMS later has no second one here."""
    if "or" in label.split("+"):
        return vector.beta * math.sqrt(len(vector.alpha)) * vector.alpha / vector.alpha.norm()
    if "er" in label.split("+"):
        return vector.beta.exp() * vector.alpha.exp() / vector.alpha.mean().exp()
    return vector()


def test_norm_divides_by_the_length_in_float32():
    x = torch.tensor([[3.0, 4.0], [0.0, -2.0]]).double()
    expected = math.sqrt(2) * x / torch.tensor([[5.0], [2.0]])
    agree(normalize(1e4 * x), expected, "Norm(x) should be sqrt(d) x / ||x||, here with d = 2")
    agree(normalize(1e-3 * x), rms_norm(1e-3 * x), "1e-6 should be added to the mean square of x")
    y, norm = draw(1000, 64, seed=0).bfloat16(), OutputNorm(64, NormScale())
    norm.gamma_a.gamma.data += 2**-9  # rounded to bfloat16 this gamma is 1 still
    expected = ((1 + 2**-9) * rms_norm(y.float())).bfloat16()
    agree(normalize(y), rms_norm(y.float()), "Norm of bfloat16 numbers should be in float32", 1e-6)
    assert norm(y).dtype == torch.bfloat16, "an OutputNorm should give back the type that it was given"
    assert (norm(y) == expected).float().mean() > 0.99, "gamma or the Norm was rounded before their product"


GAMMAS = {  # form -> (where its raw parameters start, some other values of theirs, gamma at those)
    "direct": (1, {"gamma": [3.0, 4.0]}, [3.0, 4.0]),
    "or": (1, {"beta": [5.0], "alpha": [3e-4, 4e-4]}, [3 * 2**0.5, 4 * 2**0.5]),  # where EPS would be felt
    "er": (0, {"beta": [2.0], "alpha": [3.0, 5.0]}, [math.e, math.e**3]),
}


@pytest.mark.parametrize("form", norms.FORMS)
def test_gamma(form):
    vector = ScaleVector(2, "Input-Norm", form).double()
    agree(vector(), torch.ones(2).double(), f"gamma of {form!r} should be 1 at the start", 1e-12)
    if form in GAMMAS:  # it was not added later
        start, raw, expected = GAMMAS[form]
        assert all((p == start).all() for p in vector.parameters()), f"{form!r} should start at {start}"
        vector.load_state_dict({name: torch.tensor(values) for name, values in raw.items()})
        agree(vector(), torch.tensor(expected).double(), f"{form!r} at {raw} should be {expected}", 1e-6)
    assert torch.autograd.gradcheck(vector.gamma_of, tuple(vector.parameters()))


@pytest.mark.parametrize("label", LABELS)
def test_labels_come_back_in_the_grammars_order(label):
    variant = NormScale.parse(label)
    shuffled = " " + "+".join(reversed(label.split("+"))).upper()
    names = {policy: f"standard+{policy}" for policy in norms.GRAMMAR["weight decay"]}
    names["hg+dnp+or+iwd"] = "unified"
    assert variant.label == names.get(label, label)
    assert NormScale.parse(shuffled) == NormScale.parse(variant.label) == variant


# ---------------------------------------------------------------------------------------------------
# Table 1: every variant of a branch against the formula on the activations

EQUATIONS = {
    "none": "W Norm(x)",
    "standard": "W (gamma_b * Norm(x))",
    "ap": "gamma_a * (W Norm(x))",
    "dp": "gamma_a * (W (gamma_b * Norm(x)))",
    "dnp": "gamma_a * Norm(W (gamma_b * Norm(x)))",
}


def naive_branch(branch, n, label, head_dim=None, output_side=True):
    """Its row of Table 1 for n = Norm(x), with the vectors on activations; dnp's Norm is over head_dim."""
    parts = label.split("+")
    if "none" not in parts and "ap" not in parts:
        n = gamma_of(branch.gamma_b, label) * n
    y = n @ branch.W.T
    if output_side and ("ap" in parts or "dp" in parts):
        y = gamma_of(branch.gamma_a, label) * y
    if output_side and "dnp" in parts:
        y = rms_norm(y.unflatten(-1, (-1, head_dim or y.shape[-1]))).flatten(-2)
        y = gamma_of(branch.norm.gamma_a, label) * y
    return y


@pytest.mark.parametrize("label", VARIANTS)
@pytest.mark.parametrize("head_dim", [None, 4])
def test_outputs_and_gradients_equal_the_formula_on_activations(label, head_dim, in_float64):
    variant = NormScale.parse(label)
    row = (set(label.split("+")) & EQUATIONS.keys() or {"standard"}).pop()
    assert variant.equation == EQUATIONS[row]
    new_branch = branches_of_a_norm(12, variant)
    branches = torch.nn.ModuleList(new_branch(8, head_dim=head_dim, std=0.5) for _ in range(3))
    assert branches[0].W.std_at_start == 0.5
    for i, p in enumerate(branches.parameters()):
        p.data = draw(*p.shape, seed=i) + (p.ndim == 1)  # vectors around 1
    x = draw(5, 12, seed=98).requires_grad_()
    ours = torch.stack([branch(normalize(x)) for branch in branches])
    theirs = torch.stack([naive_branch(branch, rms_norm(x), label, head_dim) for branch in branches])
    agree(ours, theirs, f"branches of {label!r} should be {variant.equation}")
    leaves = {"x": x, **dict(branches.named_parameters())}
    agree(gradients(ours, leaves), gradients(theirs, leaves), "gradients")
    vectors = {branch.gamma_b for branch in branches}  # {None} where there is no input side
    assert len(vectors) == (3 if "hg" in label and variant.input_side else 1), "only in hg one a branch"
    if variant.norm_between:
        with pytest.raises(ValueError, match="no effective weight"):
            norms.population_loss(branches[0], torch.zeros(8, 12))


# ---------------------------------------------------------------------------------------------------
# The transformer, against one written out


def naive_attention(q, k, v):
    """Causal, RoPE as one complex number for channels i and i + h/2: (B, T, H, h) each -> (B, T, H h)."""
    T, h = q.shape[1], q.shape[-1]
    angle = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, h, 2) / h)

    def turned(x):  # (B, T, H, h/2)
        return torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angle)[:, None]

    score = torch.einsum("bthc,bshc->bhts", turned(q), turned(k).conj()).real / math.sqrt(h)
    p = score.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
    return torch.einsum("bhts,bshc->bthc", p, v).flatten(-2)


def naive_ffn(ffn, n, label):
    gate, up = naive_branch(ffn.gate, n, label), naive_branch(ffn.up, n, label)
    return (gate / (1 + (-gate).exp()) * up) @ ffn.down.T


def naive_mixture(ffn, n, label):
    """(output, balance loss) of moe-tiny's 8 experts, 2 a token, where each sees all tokens."""
    p = naive_branch(ffn.router, n, label, output_side=False).softmax(-1, dtype=torch.float32)
    visits = (p >= p.sort(-1).values[..., [-2]]).to(p.dtype)
    y = naive_ffn(ffn.shared_expert, n, label)
    for i, expert in enumerate(ffn.experts):
        y = y + (visits * p)[..., [i]] * naive_ffn(expert, n, label)
    return y, 8 * (visits.mean(1) / 2 * p.mean(1)).sum(-1).mean()


def naive_transformer(model, tokens, label):
    """(logits, balance loss) of a small Transformer, written out."""

    def gemma_norm(norm, y):
        if not model.config.gemma:
            return y
        return rms_norm(y) if label == "none" else gamma_of(norm.gamma_a, label) * rms_norm(y)

    x, balance = model.embedding[tokens], torch.zeros(())
    for block in model.blocks:
        attention, n = block.attention, rms_norm(x)
        branches = (attention.q, attention.k, attention.v)
        q, k, v = (naive_branch(branch, n, label, head_dim=20).unflatten(-1, (2, 20)) for branch in branches)
        if "dnp" not in label:  # whose branches have normalised each head
            q, k = gemma_norm(attention.q_norm, q), gemma_norm(attention.k_norm, k)
        x = x + gemma_norm(block.attention_out, naive_attention(q, k, v) @ attention.o.T)
        ffn, n = block.ffn, rms_norm(x)
        y, loss = naive_mixture(ffn, n, label) if model.config.n_expert else (naive_ffn(ffn, n, label), 0)
        x = x + gemma_norm(block.ffn_out, y)
        balance = balance + loss / 2  # the mean of two layers
    return naive_branch(model.head, rms_norm(x), label), balance


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("label", VARIANTS)
def test_the_transformer_is_the_one_written_out(label, model, in_float64):
    built = stirred_model(label, model)
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    logits, balance = naive_transformer(built, inputs, label)
    language = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    loss = built(inputs, targets)
    agree(built(inputs), logits, "the logits")
    agree(loss, language, "the language loss")
    agree(built.balance_loss() + torch.zeros(()), balance, "the balance loss, 0 for a dense model")
    named = dict(built.named_parameters())
    agree(gradients(loss + built.balance_loss(), named), gradients(language + balance, named), "gradients")
    folded = fold(built)  # a copy, although the balance loss of a mixture holds a graph
    agree(folded(inputs), logits, "the logits of the folded model")
    assert dict(built.named_parameters()).keys() == named.keys(), "fold should leave the model as it was"
    agree(built(inputs), logits, "the logits after fold has made its copy")
    assert set(scale_parameters(folded).values()) <= {"Output-Norm"}
    for exported in (built, folded):
        if model == "tiny" and not scale_parameters(exported):
            state = llama_state_dict(exported)
            agree(state, weights_of(exported), "the weights of a stock Llama", 0)
            assert len({tensor.data_ptr() for tensor in state.values()}) == len(state), "no two share memory"
        else:
            with pytest.raises(ValueError, match="fold"):
                llama_state_dict(exported)


def test_mixed_precision_and_idle_experts():
    built, tokens = small_model("unified", "moe-tiny"), TOKENS[:1, :3]  # 6 visits to 8 experts
    ffn, n = built.blocks[0].ffn, normalize(draw(1, 5, 40, seed=0).float())
    with torch.autocast("cpu", torch.bfloat16):
        ffn(n)
        agree(ffn.balance_loss, naive_mixture(ffn, n, "none")[1], "the router's softmax in float32", 1e-5)
        loss = built(tokens, tokens)
    assert loss.dtype == torch.float32, "the loss itself should be computed in float32"
    agree(loss, built(tokens, tokens), "the loss in mixed precision", 0.01)
    agree(copy.deepcopy(built).bfloat16()(tokens).float(), built(tokens), "logits in bfloat16", 0.1)
    (loss + built.balance_loss()).backward()
    assert all(p.grad is not None for p in built.parameters()), "optimisers need zeros, also of idle experts"
    assert "rotation" not in built.state_dict(), "RoPE's table should follow from the sizes, not be saved"


def test_generation_samples_from_the_last_position():
    built, expected, generator = stirred_model("none"), TOKENS[:1], torch.Generator().manual_seed(0)
    built.head.W.data *= 4  # neither flat, nor so steep that the temperature would not be felt
    for _ in range(40):
        p = built(expected[:, -17:])[0, -1].softmax(-1)
        expected = torch.cat([expected, torch.multinomial(p, 1, generator=generator)[None]], 1)
    assert torch.equal(built.generate(TOKENS[:1], 40, torch.Generator().manual_seed(0)), expected)
    with pytest.raises(ValueError, match="^generate needs a prompt of at least one token$"):
        built.generate(TOKENS[:1, :0], 4)


# ---------------------------------------------------------------------------------------------------
# First weights, counts, groups, export. All records under results/ depend on these first entries for seed 0.

FIRST_WEIGHTS = {"embedding": 0.039011, "blocks.1.attention.o": 0.000748, "blocks.1.ffn.router.W": 0.006274}


@pytest.mark.parametrize("model", MODELS)
def test_first_weights_depend_on_role_seed_and_name_alone(model, monkeypatch):
    """W_o and each W_down at 0.02 / sqrt(2 * 2 layers) = 0.01, all others at 0.02, as measured."""
    two_rows = (lambda d: {"alpha": torch.zeros(2, d)}, lambda alpha: 1 + alpha.sum(0))
    monkeypatch.setitem(norms.FORMS, "or", two_rows)  # a raw parameter with two axes is no matrix
    unified, seed_4 = small_model("unified", model), small_model("none", model, seed=4)
    again = copy.deepcopy(seed_4).init_weights(0)
    mixture = dict(small_model("none", "moe-tiny").named_parameters())
    assert {name: mixture[name][0, 0].item() for name in FIRST_WEIGHTS} == pytest.approx(FIRST_WEIGHTS, 1e-3)
    for name, W in small_model("none", model).named_parameters():
        std = 0.01 if name.removesuffix(".W").endswith((".o", ".down")) else 0.02
        assert W.std().item() == pytest.approx(std, rel=0.15), f"{name} should start with std {std}"
        assert not torch.equal(W, seed_4.get_parameter(name)), f"{name} is the same for another seed"
        assert torch.equal(W, again.get_parameter(name)), f"{name} starts elsewhere in a copy"
        assert torch.equal(W, unified.get_parameter(name)), f"{name} depends on the variant"
        assert torch.equal(W, mixture.get(name, W)), f"{name} depends on the matrices before it"


PARAMETERS = {  # of each preset: all, and those that a token activates
    "llama-0.12b": (119_744_256, 119_744_256), "llama-0.25b": (254_018_560, 254_018_560),
    "llama-0.5b": (482_696_960, 482_696_960), "llama-0.75b": (749_142_528, 749_142_528),
    "llama-1b": (1_028_065_024, 1_028_065_024), "gemma-0.5b": (482_745_344, 482_745_344),
    "moe-0.25b": (251_044_480, 113_633_920), "moe-0.5b": (480_942_336, 183_671_040),
    "moe-0.8b": (797_327_040, 281_231_040), "moe-1b": (1_058_931_712, 354_976_768),
    "moe-2b": (1_996_574_720, 620_856_320),
}  # fmt: skip


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameters_and_steps_are_the_papers(model):
    settings = planned(f"--model={model}").settings
    ours = count(train.model_config(settings))
    assert (ours["parameters"], ours["activated_parameters"]) == PARAMETERS[model]
    assert settings.batch_size == 512 and settings.micro_batch_size * settings.seq_len == 32_768
    assert settings.steps == round(100 * ours["activated_parameters"] / (512 * settings.seq_len))


def test_scale_vectors_are_as_many_as_the_papers():
    assert count(config_of("--model=llama-1b"))["scale_parameters"] == 80_640
    flags = ("", "--norm-scale=unified", "--d-ff=2056")  # figure 10: unified, and its control
    standard, unified, wider = (count(config_of(f"--model=llama-0.12b {flag}")) for flag in flags)
    assert unified["scale_parameters"] - standard["scale_parameters"] == 102_528 + 62  # with the betas
    assert wider["parameters"] == 119_854_848
    mixture = count(config_of("--model=moe-tiny --norm-scale=hg"))  # 6 idle experts a layer, with own vectors
    assert mixture["parameters"] - mixture["activated_parameters"] == 4 * 6 * (3 * 64 * 42 + 2 * 64)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("label", LABELS)
def test_every_parameter_decays_as_its_role_says(label, model, monkeypatch):
    built, parts = small_model(label, model), set(label.split("+"))
    settings = SimpleNamespace(optimizer="muon", lr=1, weight_decay=0.1)
    muon, adamw = train.make_optimizers(built, settings)
    group_of = {}
    for group in muon.param_groups + adamw.param_groups:
        group_of |= dict.fromkeys(group["params"], (group["name"], group["weight_decay"]))
    for name, p in built.named_parameters():
        expected = ("Input-Norm scale vectors", 0.0 if {"owd", "nowd"} & parts else 0.1)
        if name in ("embedding", "head.W"):
            expected = ("embedding and head", 0.1)
        elif name.endswith((".W", ".o", ".down")):
            expected = ("matrices inside the blocks", 0.1)
        elif any(f"{norm}.gamma_a." in name for norm in (".norm", "q_norm", "k_norm", "_out")):
            expected = ("Output-Norm scale vectors", 0.0 if {"iwd", "nowd"} & parts else 0.1)
        assert group_of[p] == expected, name
    assert [group["name"] for group in muon.param_groups] == ["matrices inside the blocks"]
    monkeypatch.setattr(train, "decay_groups", lambda *_: [{"name": "matrices", "params": [built.embedding]}])
    with pytest.raises(AssertionError, match="exactly one group"):  # the others are in none
        train.make_optimizers(built, settings)


LLAMA_LAYER = {  # the names of transformers, and ours
    "input_layernorm": "attention.q.gamma_b.gamma", "post_attention_layernorm": "ffn.gate.gamma_b.gamma",
    "self_attn.q_proj": "attention.q.W", "self_attn.k_proj": "attention.k.W",
    "self_attn.v_proj": "attention.v.W", "self_attn.o_proj": "attention.o",
    "mlp.gate_proj": "ffn.gate.W", "mlp.up_proj": "ffn.up.W", "mlp.down_proj": "ffn.down",
}  # fmt: skip


def weights_of(model, layer=LLAMA_LAYER):
    """{name in transformers: our parameter; 1 for a folded vector}, of two layers."""
    names = {"model.embed_tokens": "embedding", "model.norm": "head.gamma_b.gamma", "lm_head": "head.W"}
    for i in range(2):
        names |= {f"model.layers.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in layer.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {f"{theirs}.weight": parameters.get(ours, torch.ones(40)) for theirs, ours in names.items()}


# ---------------------------------------------------------------------------------------------------
# The theory: gradient flow of the classes that train.py trains, against closed forms (sections 2, 3, D)
# g_b and g_a are a branch's gamma_b and gamma_a, A is its effective weight, R = W* - A, d_in = 3, d_out = 4.
# <R, dA/dt> is -dL/dt, the speed of the loss: Theorems 2.2, 3.1 and 3.2 say where it is larger.

TEACHER = draw(4, 3, seed=0)


def jacobian(outputs, parameters):
    """J = d outputs / d parameters, (number of outputs, number of parameters)."""
    y = outputs.flatten()
    each = torch.eye(len(y), dtype=torch.float64)
    rows = torch.autograd.grad(y, list(parameters), each, retain_graph=True, is_grads_batched=True)
    return torch.cat([g.flatten(1) for g in rows], dim=1)


def gamma_and_preconditioner(vector, d, label):
    """A scale vector in R^d and its P, as norms.py states it; 1 and 0 where there is none."""
    identity = torch.eye(d, dtype=torch.float64)
    if vector is None:
        return identity.sum(0), 0 * identity
    gamma = vector()
    if "or" in label.split("+"):
        q = vector.alpha * d**0.5 / vector.alpha.norm()
        along = torch.outer(q, q)
        return gamma, along + vector.beta**2 * d / vector.alpha.norm() ** 2 * (identity - along / d)
    if "er" in label.split("+"):
        return gamma, torch.diag(gamma**2) + (1 - 1 / d) * torch.outer(gamma, gamma)
    J = jacobian(gamma, vector.parameters())  # the identity, but for a form that was added later
    return gamma, J @ J.T


@pytest.mark.parametrize("label", [label for label in VARIANTS if not {"hg", "dnp"} & set(label.split("+"))])
@pytest.mark.parametrize("seed", range(3))
def test_section_3_4_and_theorems_3_1_and_3_2_at_random_states(label, seed):
    """dA/dt = g_a^2 R g_b^2 + W * (P_a h_a g_b^T + g_a (P_b h_b)^T) with h = -dL/dgamma (section 3.4). So the
    speed is ||g_a R g_b||^2 + h_a P_a h_a + h_b P_b h_b. Standard has ||R g_b||^2 + ||h_b||^2 at this A and
    g_b: no more if all g_a^2 >= 1 (Theorem 3.1) and all eigenvalues of P_b are at least 1 (Theorem 3.2)."""
    branch = norms.student(label, TEACHER)
    for i, p in enumerate(branch.parameters()):
        p.data = (1 + seed) * draw(*p.shape, seed=100 * seed + i)
    W, A = branch.W, branch.effective_weight()
    R, J = TEACHER - A, jacobian(A, branch.parameters())
    g_b, P_b = gamma_and_preconditioner(branch.gamma_b, 3, label)
    g_a, P_a = gamma_and_preconditioner(branch.gamma_a, 4, label)
    h_b, h_a = g_a @ (W * R), (W * R) @ g_b
    of_vectors = torch.outer(P_a @ h_a, g_b) + torch.outer(g_a, P_b @ h_b)
    agree((J @ J.T @ R.flatten()).view_as(R), torch.outer(g_a, g_b) ** 2 * R + W * of_vectors)
    norms.population_loss(branch, TEACHER).backward()
    speed = sum(p.grad.square().sum() for p in branch.parameters())
    agree(speed, (torch.outer(g_a, g_b) * R).square().sum() + h_a @ P_a @ h_a + h_b @ P_b @ h_b)
    least = (g_a**2).min() * (R * g_b).square().sum() + torch.linalg.eigvalsh(P_b)[0] * (h_b @ h_b)
    assert speed >= least - 1e-9  # that eigenvalue is beta^2 d / ||alpha||^2 under or, if less than d
    if label == "dp":  # conserved: g_b^2 - ||W_:j||^2 and g_a^2 - ||W_i:||^2
        agree(g_b * branch.gamma_b.gamma.grad, (W * W.grad).sum(0))
        agree(g_a * branch.gamma_a.gamma.grad, (W * W.grad).sum(1))
    if label == "or":  # conserved: beta^2 - ||W||^2, and ||alpha||
        agree(branch.gamma_b.beta * branch.gamma_b.beta.grad, (W * W.grad).sum()[None])
        agree(branch.gamma_b.alpha @ branch.gamma_b.alpha.grad, torch.zeros(()).double())


def losses(label, teacher, t_end=1, steps=200):
    """(t, the loss at t) in the steps of the gradient flow from the standard start: W = 0, vectors 1."""
    branch, loss = norms.student(label, teacher), partial(norms.population_loss, teacher=teacher)
    rows = [[t, loss(branch).item()] for t in norms.gradient_flow(branch, loss, t_end, steps)]
    return torch.tensor(rows, dtype=torch.float64).unbind(1)


FASTER = {  # (variant, against): c of W*, where the variant's loss minus the other's is -2/3 c t^3 + O(t^4)
    ("standard", "none"): lambda teacher: teacher.norm(dim=0).pow(4).sum(),  # Theorem 2.2
    ("ap", "none"): lambda teacher: teacher.norm(dim=1).pow(4).sum(),
    ("dp", "standard"): lambda teacher: teacher.norm(dim=1).pow(4).sum(),  # Theorems 3.1 and D.1
    ("or", "standard"): lambda teacher: (1 - 1 / 3) * teacher.norm() ** 4,  # Theorems 3.2 and D.2, d_in = 3
    ("er", "standard"): lambda teacher: (1 - 1 / 3) * teacher.norm() ** 4,  # not in the paper
}


@pytest.mark.parametrize("label, against", FASTER)
def test_a_variant_falls_faster_from_the_standard_start(label, against):
    """Early for any W*; here to t = 1, as rows have at most one entry (dp) and columns one length (or)."""
    teacher = torch.tensor([[0, -1.5, 0], [0, 0, 0], [1.5, 0, 0], [0, 0, 1.5]]).double()
    assert (losses(label, teacher)[1][1:] < losses(against, teacher)[1][1:]).all()
    t, none = losses("none", TEACHER, 0.05, 50)
    agree(none, torch.exp(-2 * t) * TEACHER.square().sum() / 2)
    difference = losses(label, TEACHER, 0.05, 50)[1] - losses(against, TEACHER, 0.05, 50)[1]
    series = torch.linalg.lstsq(t[10:, None] ** torch.arange(3, 7), difference[10:, None]).solution
    assert series[0].item() == pytest.approx(-2 / 3 * FASTER[label, against](TEACHER).item(), rel=2e-3)


def hessian_sizes(w, g, target):
    """Trace, largest eigenvalue, Frobenius norm of the Hessian of 1/2 (w g - target)^2 at a coordinate."""
    trace, cross = g**2 + w**2, 2 * w * g - target
    largest = (trace + ((g**2 - w**2).square() + 4 * cross**2).sqrt()) / 2
    return trace, largest, (g**4 + w**4 + 2 * cross**2).sqrt()


def test_theorem_2_3_hessian():
    target, branch = TEACHER[:1], norms.student("standard", TEACHER[:1])
    w, g = branch.W, branch.gamma_b.gamma
    w.data, g.data = draw(1, 3, seed=1), draw(3, seed=2)
    slopes = torch.autograd.grad(norms.population_loss(branch, target), [w, g], create_graph=True)
    hessian = jacobian(torch.cat([slope.flatten() for slope in slopes]), [w, g])
    trace, largest, frobenius = hessian_sizes(w[0], g, target[0])
    found = [hessian.trace(), torch.linalg.eigvalsh(hessian)[-1], hessian.norm()]
    agree(found, [trace.sum(), largest.max(), frobenius.norm()])


@pytest.mark.parametrize("q", [0.1, 0.5])
@pytest.mark.parametrize("mu", [0.0, 0.25])
def test_theorem_2_3_drift_and_invariant_measure(mu, q):
    """d/dt E[||g||^2 - ||w||^2] = 2 lambda E||w||^2 - 2 mu E||g||^2 for any noise q; a path a column."""
    target, decay, columns = 1.0, 0.5, 5_000  # decay is lambda
    branch = norms.student("standard", torch.full((1, columns), target))
    w, g = branch.W, branch.gamma_b.gamma

    def loss(branch):
        return norms.population_loss(branch, target) + (decay * w.square().sum() + mu * g.square().sum()) / 2

    def mean_is(expected, paths):  # over paths (the last axis), within four standard errors
        return ((paths.mean(-1) - expected).abs() < 4 * paths.std(-1) / columns**0.5).all()

    path = [torch.stack([w[0], g]).detach() for _ in norms.gradient_flow(branch, loss, 20, 500, noise=q)]
    w_t, g_t = torch.stack(path, 1)  # each (501, columns)
    drift = torch.cumulative_trapezoid(2 * decay * w_t**2 - 2 * mu * g_t**2, dx=20 / 500, dim=0)
    assert mean_is(0, ((g_t**2 - w_t**2)[1:] - 1 - drift)[[49, 124, 499]])  # 1 at first; at t = 2, 5, 20
    if mu > 0:  # else the invariant density exp(-2 F / q), F the loss with its decay, has no finite integral
        grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
        at_w, at_g = torch.meshgrid(grid, grid, indexing="ij")
        density = torch.exp(-((at_w * at_g - target).square() + decay * at_w**2 + mu * at_g**2) / q)
        observed = [g_t**2, *hessian_sizes(w_t, g_t, target)]
        for seen, exact in zip(observed, [at_g**2, *hessian_sizes(at_w, at_g, target)]):
            assert mean_is((density * exact).sum() / density.sum(), seen[250:].mean(0))  # from t = 10 on


# ---------------------------------------------------------------------------------------------------
# Against implementations by others: transformers' Llama, Gemma 3 and Qwen2-MoE

SHAPE = {
    "vocab_size": 64, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 20,
    "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA_PEER = {
    "hidden_activation": "silu", "query_pre_attn_scalar": 20, "layer_types": 2 * ["full_attention"],
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
}  # fmt: skip
MIXTURE_PEER = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 26, "norm_topk_prob": False,
    "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1, "qkv_bias": False,
}  # fmt: skip
GEMMA_LAYER = LLAMA_LAYER | {
    "post_attention_layernorm": "attention_out.gamma_a.gamma",
    "pre_feedforward_layernorm": "ffn.gate.gamma_b.gamma",
    "post_feedforward_layernorm": "ffn_out.gamma_a.gamma",
    "self_attn.q_norm": "attention.q_norm.gamma_a.gamma",
    "self_attn.k_norm": "attention.k_norm.gamma_a.gamma",
}


def peer_of(model, built):
    """(the same architecture from transformers, {its parameter: ours, through which gradients flow})."""
    transformers = pytest.importorskip("transformers", reason="transformers, a peer, is not installed")
    if model == "gemma-tiny":
        peer = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SHAPE, **GEMMA_PEER))
        peer.model.embed_tokens.embed_scale.fill_(1.0)
        state = weights_of(built, GEMMA_LAYER)
        return peer, {name: W - 1 if "norm" in name else W for name, W in state.items()}  # gamma = 1 + weight
    if model == "tiny":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)), weights_of(built)
    peer = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SHAPE, **MIXTURE_PEER))
    peer.set_experts_implementation("eager")
    layer = {"mlp.gate": "ffn.router.W"}
    for theirs, ours in LLAMA_LAYER.items():
        layer[theirs.replace("mlp", "mlp.shared_expert")] = ours.replace("ffn", "ffn.shared_expert")
    state = weights_of(built, layer)
    for i, block in enumerate(built.blocks):
        experts, name = block.ffn.experts, f"model.layers.{i}.mlp.experts"
        state[f"{name}.gate_up_proj"] = torch.stack([torch.cat([e.gate.W, e.up.W]) for e in experts])
        state[f"{name}.down_proj"] = torch.stack([e.down for e in experts])
        peer.model.layers[i].mlp.shared_expert_gate.forward = lambda x: 100 + 0 * x[:, :1]  # sigmoid(100) = 1
    return peer, state


@pytest.mark.peers
@pytest.mark.parametrize("model", MODELS)
def test_logits_and_gradients_are_those_of_transformers(model, in_float64):
    built = stirred_model("standard", model)
    peer, state = peer_of(model, built)
    logits, expected = built(TOKENS), torch.func.functional_call(peer, state, (TOKENS,)).logits
    agree(logits, expected, "the logits", 1e-12)
    named = dict(built.named_parameters())
    agree(gradients(logits, named), gradients(expected, named), "gradients", 1e-12)
    if model == "tiny":
        peer.load_state_dict(llama_state_dict(fold(built)), strict=True)
        agree(peer(TOKENS).logits, logits, "the logits of the folded model as a stock Llama")


# ---------------------------------------------------------------------------------------------------
# prepare_data.py: text to tokens, and back

PARAGRAPHS = [f"Paragraph {i} says that {i * i} is the square of {i},\nand that's that." for i in range(500)]
BOOK = "\n\n".join(PARAGRAPHS)


def prepared(tmp_path, text, *flags):
    """The folder made from text, with a vocabulary of 300 if the text yields that many."""
    (tmp_path / "book.txt").write_bytes(text.encode())
    paths = [f"--out-dir={tmp_path / 'data'}", f"--input={tmp_path / 'book.txt'}"]
    prepare_data.main(["--vocab-size=300", *paths, *flags])
    return tmp_path / "data" / "book"


def decoded(folder):
    """Its training and its validation text."""
    data = TokenFolder(folder)
    return tuple(data.encoding(data.vocab_size).decode(part.tolist()) for part in (data.train, data.val))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A little prepared text, and nothing to download."""
    return prepared(tmp_path_factory.mktemp("data"), BOOK)


def test_validation_begins_with_the_first_paragraph_of_the_last_tenth(tmp_path):
    book = BOOK.replace("\n\n", "\n \t\n  ")
    for text, start in [
        (book, book.index("\n \t\n", len(book) * 9 // 10) + 4),  # after the blank line
        ("x " * 472 + "\n\n" + "x " * 27, 946),  # just before the middle of the last tenth
        ("x " * 476 + "\n\n" + "x " * 23, 900),  # just after it
        ("x " * 470 + "\n\n" + " " * 58, 900),  # no paragraph begins in it
        (" " * 1_500_000 + "中\u2028\U0001f469" * 100_000, 1_620_000),
    ]:
        folder = prepared(tmp_path, text.replace("\n\n", "\r\r\n"), "--overwrite")
        assert decoded(folder) == (text[:start], text[start:])


def test_vocabulary_comes_from_the_training_text_alone_and_files_are_joined(tmp_path):
    val, more = tmp_path / "val.txt", tmp_path / "more.txt"
    more.write_bytes("\ufeffMore text.".encode())
    files = [f"--input={more}", f"--val-input={val}"]  # a second --input, after that of `prepared`
    learnt = prepare_data.learn_bpe(BOOK + "\n\nMore text.", 300).token_byte_values()
    for text in ("Wörter 中文 <|endoftext|>", "zyx " * 500):
        val.write_bytes(text.encode())
        folder = prepared(tmp_path, BOOK, *files, "--overwrite")
        assert decoded(folder) == (BOOK + "\n\nMore text.", text)
        assert TokenFolder(folder).encoding(300).token_byte_values() == learnt


def test_a_long_text_is_tokenised_in_pieces_that_end_before_a_space(monkeypatch):
    encoding = prepare_data.learn_bpe(BOOK, 300)
    monkeypatch.setattr(prepare_data, "PIECE", 100)
    pieces = list(prepare_data.pieces_of(BOOK))
    assert max(map(len, pieces)) <= 100 and len(pieces) < len(BOOK) / 80
    assert sum(map(encoding.encode_ordinary, pieces), []) == encoding.encode_ordinary(BOOK)
    monkeypatch.setattr(prepare_data, "SAMPLE", 250)
    encoding = prepare_data.learn_bpe(("ab" * 50 + "yz" * 50) * 2, 300)  # every second piece is read
    assert [len(encoding.encode_ordinary(text)) for text in ("ab", "yz")] == [1, 2]
    assert prepare_data.PATTERNS["gpt2"] == tiktoken_ext.openai_public.r50k_pat_str


def test_a_failure_halfway_leaves_everything_as_it_was(tmp_path, monkeypatch, told_in_one_line):
    folder, data = prepared(tmp_path, BOOK), tmp_path / "data"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for error, code, flag in ((OSError(), 2, "--overwrite"), (KeyboardInterrupt(), 130, "--name=new")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"^{code}$"):
            patch.setattr(prepare_data, "sha256_of", Mock(side_effect=error))  # late
            prepared(tmp_path, BOOK, flag)
        assert os.listdir(data) == ["book"]
    faster = Mock(side_effect=lambda new, *_: [shutil.copytree(folder, path) for path in (new, data / "new")])
    monkeypatch.setattr(prepare_data, "write_folder", faster)  # another process makes the folder meanwhile
    told_in_one_line(lambda: prepared(tmp_path, BOOK, "--name=new"), str(data / "new"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_downloads(tmp_path, monkeypatch, told_in_one_line):
    def serve(name, tokens, version=1, more=0):
        header = np.array([20240520, version, len(tokens) + more] + [0] * 253, "<i4")
        Path(f"fineweb_{name}.bin").write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())

    monkeypatch.chdir(tmp_path)  # a folder in place of the network, and a toy in place of GPT-2's encoding
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", (tmp_path / "input.txt").as_uri())
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(BOOK.encode()).hexdigest())
    monkeypatch.setattr(prepare_data, "FINEWEB_URL", tmp_path.as_uri() + "/")
    ranks, special = {bytes([i]): i for i in range(256)} | {b"ab": 256}, {"end": 50_256}
    toy = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    answers = [ConnectionError("no route\nto host"), ValueError("no route to host: hash"), *8 * [DEFAULT]]
    monkeypatch.setattr(tiktoken, "get_encoding", Mock(wraps={"gpt2": toy}.get, side_effect=answers))
    prepare = partial(prepare_data.main, ["--dataset=shakespeare", "--tokenizer=gpt2", "--overwrite"])
    Path("input.txt").write_text(BOOK[:-9])
    for words in ("no route to host", "no route to host: hash", "input.txt"):
        told_in_one_line(prepare, words, "--dataset=sotu with --tokenizer=bpe needs no network")
    assert list(Path("data").rglob("*")) == [Path("data/downloads")]
    Path("input.txt").write_text(BOOK)
    prepare()
    Path("input.txt").unlink()
    prepare()  # the download is kept
    assert "".join(decoded("data/shakespeare")) == BOOK
    Path("data/downloads/tinyshakespeare.txt").write_text(BOOK[:-9])  # unless it is damaged
    told_in_one_line(prepare, "input.txt")
    prepare = partial(prepare_data.main, ["--dataset=fineweb", "--shards=2"])
    serve("val_000000", [50_256, 256, 97, 10])
    serve("train_000001", [256, 97])
    for token, version, more in ((1, 2, 0), (1, 1, 1), (50_304, 1, 0)):
        serve("train_000002", [token], version, more)
        told_in_one_line(prepare, "damaged")
    serve("train_000002", [256, 98])
    prepare()
    made = TokenFolder("data/fineweb")
    assert made.train.tolist() == [256, 97, 256, 98] and not made.train.flags.writeable
    assert made.encoding(made.vocab_size).decode([*made.val, 50_303]) == "\ufffd50256aba\n\ufffd50303"
    assert made.meta.items() >= {"train_tokens": 4, "val_tokens": 4, "bytes_per_token": 1}.items()


def test_broken_folders(data_folder, tmp_path):
    spoilt, vocabulary = tmp_path / "größer als nötig", (data_folder / "tokenizer.tiktoken").read_text()
    for spoil, words in [
        (lambda folder: os.truncate(folder / "train.bin", 1000), "train.bin has changed"),
        (with_json("meta.json", tokenizer="words"), "not a words vocabulary"),
        (with_json("meta.json", vocab_size=299), "too many tokens"),
        (with_json("meta.json", vocab_size=65_537), "meta.json"),
        (with_json("meta.json", bytes_per_token=math.nan), "meta.json"),
        (with_text("tokenizer.tiktoken", vocabulary.replace(" 255", " 300")), "a bpe .* of 300: .*0, 1, 2"),
        (with_text("tokenizer.tiktoken", vocabulary.replace("/w==", "/?w==")), "base64"),
        (with_text("tokenizer.tiktoken", vocabulary.replace("/w==", "eHl6eHl6")), "some byte"),
    ]:
        spoil(shutil.copytree(data_folder, spoilt, dirs_exist_ok=True))
        with pytest.raises(prepare_data.UserError, match=f"größer als nötig.*{words}"):
            TokenFolder(spoilt)


def test_mistakes_in_preparing_data(tmp_path, monkeypatch, told_in_one_line):
    monkeypatch.chdir(tmp_path)
    for name, text in (("book.txt", BOOK), ("blank.txt", " \n\n "), ("ab.txt", "ab"), ("nul.txt", "a\0b\0")):
        Path(name).write_text(text)
    Path("far.txt").write_bytes(b"\xef\xbb\xbf" + b"ab\r\n" * 100_000 + b"\xff")
    Path("И (м.txt").symlink_to("book.txt")
    Path("data", "mine").mkdir(parents=True)
    before = sorted(Path().rglob("*"))
    for flags, words in [
        ("--input *.txt", "there is no file *.txt"),
        ("--input blank.txt", "blank.txt holds no text"),
        ("--input ab.txt", "too little text"),
        ("--input far.txt", "not UTF-8 text: invalid start byte at byte 400003"),
        ("--input nul.txt", "nul.txt contains NUL: UTF-16? save it as UTF-8"),
        ("--input ab.txt book.txt --val-input 'И (м.txt'", "И (м.txt is in --input already"),
        ("--input book.txt --dataset=sotu", "not both"),
        ("--val-input book.txt", "--val-input needs --input"),
        ("--input book.txt --name=a.", "'a.' cannot be --name"),
        ("--input book.txt --name=mine --overwrite", "mine exists"),
        ("--vocab-size=65537", "256 to 65536"),
        ("--tokenizer=gpt2 --vocab-size=300", "--vocab-size is for"),
        ("--dataset=fineweb --tokenizer=bpe", "no --tokenizer=bpe"),
        ("--dataset=fineweb --shards=104", "1 to 103"),
        ("--shards=1", "--shards is for --dataset=fineweb"),
        ("--vocab=300", "unrecognized arguments: --vocab=300"),
    ]:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *shlex.split(flags)])
        told_in_one_line(prepare_data.main, "prepare_data.py: error: ", words)
        assert sorted(Path().rglob("*")) == before
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare_data.main(["--out-dir=~/x", "--input=~/И (м.txt"])
    assert os.listdir("x") == ["И _м"]


# ---------------------------------------------------------------------------------------------------
# The trainer: learning rate, optimisers, settings; then its promises


def planned(flags):
    """The plan of a command with these flags, for data with a vocabulary of 64."""
    data = SimpleNamespace(**vars(train.ANY_DATA) | {"vocab_size": 64, "sha256": {"train.bin": "ab12cd34"}})
    (plan,) = train.make_plans(train.command_line().parse_args(flags.split()), data, train.Machine("cpu"))
    return plan


def test_learning_rate_is_the_smaller_of_warm_up_and_schedule():
    for flags, step, lr in (
        ("--schedule=cosine --steps=100", 0, 1 / 10),  # the warm-up takes 10 steps
        ("--schedule=cosine --steps=100", 40, 1 / 20 + 19 / 20 * 3 / 4),  # a third of the way to a twentieth
        ("--schedule=wsd --steps=100 --warmup-steps=90", 84, 16 / 20),  # the product would be 0.76
        ("--steps=3 --warmup-steps=0", 0, 1),
    ):
        assert train.learning_rate(planned(f"--lr=1 {flags}").settings, step) == pytest.approx(lr)


def test_adamw_and_muon_are_the_formulas_of_their_docstrings(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)  # in which Muon multiplies
    w, W = (torch.nn.Parameter(draw(6, 10, seed=0)) for _ in range(2))
    adamw = train.adamw([{"params": [w], "weight_decay": 0.1}], SimpleNamespace(lr=0.01))
    muon = train.muon([{"params": [W], "weight_decay": 0.1}], SimpleNamespace(lr=0.01))
    a = b = draw(6, 10, seed=0)
    m = v = momentum = 0
    for t in (1, 2, 3):
        g = w.grad = W.grad = draw(6, 10, seed=t)
        adamw.step()
        muon.step()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        a = a - 0.01 * (m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8) + 0.1 * a)
        momentum = 0.95 * momentum + 0.05 * g
        X = F.normalize(0.95 * momentum + 0.05 * g, dim=(0, 1))
        for _ in range(5):
            X = 3.4445 * X - 4.7750 * X @ X.T @ X + 2.0315 * X @ X.T @ X @ X.T @ X
        b = b - 0.01 * (0.2 * math.sqrt(10) * X + 0.1 * b)
    torch.testing.assert_close([w.detach(), W.detach()], [a, b], rtol=1e-12, atol=1e-12)


def test_defaults_follow_from_preset_flags_data_and_machine_and_the_folder_names_others(monkeypatch):
    for flags, names, values in (
        ("", "seq_len steps warmup_steps lr d_ff vocab_size", [128, 2000, 100, 4e-3, 170, 64]),
        ("--steps=3 --d-model=96 --batch-size=9", "warmup_steps d_ff micro_batch_size", [1, 256, 9]),
        ("--model=llama-0.12b --schedule=wsd --seq-len=65536", "lr micro_batch_size", [3e-3, 1]),
        ("--model=llama-0.12b --schedule=wsd --optimizer=muon", "lr eval_every", [5e-3, 100]),
    ):
        assert [getattr(planned(flags).settings, name) for name in names.split()] == values
    gpu = SimpleNamespace(kind="cuda", has_bfloat16=True, processes=3)
    for asked, tokens, evaluated in (100, 13, 12), (100, 12, 8), (1, 13, 4), (9, 1000, 8):
        data = SimpleNamespace(vocab_size=64, val=range(tokens))
        assert train.resolve({"seq_len": 4, "eval_tokens": asked}, gpu, data)[0].eval_tokens == evaluated
    for triton, model, switch in (True, "tiny", "on"), (True, "moe-tiny", "off"), (None, "tiny", "off"):
        monkeypatch.setattr(importlib.util, "find_spec", {"triton": triton}.get)
        settings, changed = train.resolve({"model": model}, gpu, data)
        assert (settings.device, settings.compile, settings.micro_batch_size) == ("cuda", switch, 3)
        assert changed == {"dtype": "bfloat16"} and train.resolve({"dtype": "float32"}, gpu, data)[1] == {}
    plan = planned("--data=~/my --d-model=64 --lr=0.0045 --steps=6000 --d-ff=178 --micro-batch-size=2")
    assert plan.folder.name == "tiny-standard-adamw-cosine-lr0.0045-seed0-steps6000-d_ff178-datamy_ab12cd"
    assert plan.changed == {"steps": 6000, "d_ff": 178, "data": os.path.expanduser("~/my")}


@pytest.fixture
def run(data_folder, tmp_path, monkeypatch):
    """A function that trains for a second with these flags, in a folder of its own, and returns the code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")  # a leftover, which means nothing without torchrun

    def run(flags="", start=train.main):
        own = "--d-model=16 --n-layer=2 --n-head=2 --seq-len=16 --batch-size=4 --steps=20 --eval-every=5"
        own = [*own.split(), "--eval-tokens=500", f"--data={data_folder}"]
        return start([flag for flag in own if flag.split("=")[0] not in flags] + flags.split())

    return run


class Run:
    """What the only run in a folder has left."""

    def __init__(self, parent="runs"):
        (self.folder,) = Path(parent).iterdir()
        self.config = json.loads((self.folder / "config.json").read_text())
        self.checkpoint = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.weights = {name: weight.tolist() for name, weight in self.checkpoint["model"].items()}

    def column(self, name):
        return [row[name] for row in self.checkpoint["metrics"] if row[name] is not None]

    def results(self):
        """All that two runs of the same command have in common, bit for bit."""
        columns = [self.column(name) for name in ("step", "lr", "train_loss", "val_loss", "grad_norm")]
        return columns, self.checkpoint["scales"], self.weights


def statuses():
    configs = [json.loads(path.read_text()) for path in Path("runs").glob("*/config.json")]
    return {config["norm_scale"]: config["status"] for config in configs}


def interrupted(function, call):
    """The function, with Ctrl-C in this call. (DEFAULT: what the Mock wraps.)"""
    return Mock(wraps=function, side_effect=[DEFAULT] * (call - 1) + [KeyboardInterrupt] + [DEFAULT] * 100)


def test_golden_step(run):
    golden = [[5.6864, 5.6211, 5.5129], [5.6864, 5.6211, 5.5121], [6.2189, 5.2354, 4.4269]]
    what = "weights, batches, model, optimiser or schedule have changed: if they should, renew results/ too"
    for variant, losses in zip(("none", "standard", "unified"), golden, strict=True):
        run(f"--norm-scale={variant} --steps=3 --eval-every=1 --out-dir={variant}")
        assert Run(variant).column("train_loss") == pytest.approx(losses, abs=2e-4), what


def test_a_batch_depends_on_seed_and_step_alone_and_every_window_can_be_drawn():
    def starts(step, flags=""):
        settings = planned(f"--seq-len=8 --batch-size=64 {flags}").settings
        data = SimpleNamespace(train=np.arange(10, dtype="<u2"))
        return train.batch(data, settings, step, train.Machine("cpu"))[:, 0].tolist()

    assert set(starts(0)) == {0, 1} and starts(3) == starts(3, "--norm-scale=unified --model=moe-tiny")
    assert starts(3) not in (starts(4), starts(3, "--seed=1"), starts(2, "--seed=1"))


@pytest.mark.parametrize("T, at_once, processes, rows", [(16, 2, 1, [64, 36]), (2000, 3, 3, [3, 1])])
def test_validation_takes_every_window_once_a_micro_batch_or_1024_tokens_at_once(T, at_once, processes, rows):
    tokens, mean, machine = sum(rows) * T, 0, train.Machine("cpu")
    data = SimpleNamespace(val=np.arange(tokens + 1, dtype="<u2"))  # none beyond the last target
    settings = SimpleNamespace(seq_len=T, eval_tokens=tokens, micro_batch_size=at_once, dtype="float32")
    machine.processes, machine.sum = processes, lambda part: part
    forward = Mock(side_effect=lambda inputs, targets: inputs.double().mean())
    for machine.rank in range(processes):  # one after the other
        mean += train.evaluate(forward, data, settings, machine)
    seen = [call.args[0] for call in forward.call_args_list]
    assert torch.cat(seen).flatten().tolist() == list(range(tokens)) and list(map(len, seen)) == rows
    assert mean == pytest.approx((tokens - 1) / 2)


@pytest.mark.parametrize("clip", [0, 0.1])
def test_a_step_follows_the_clipped_gradient_of_both_losses(run, data_folder, monkeypatch, clip):
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr))
    monkeypatch.setattr(train, "BALANCE_LOSS", 1000 * train.BALANCE_LOSS)  # 1, where it is felt
    flags = "--model=moe-tiny --steps=1 --micro-batch-size=2 --weight-decay=0 --lr=1 --seed=3"
    run(f"{flags} --grad-clip={clip}")
    settings = SimpleNamespace(**Run().checkpoint["settings"])
    model = Transformer(train.model_config(settings)).init_weights(3)
    tokens = train.batch(TokenFolder(data_folder), settings, 0, train.Machine("cpu"))
    language = model(tokens[:, :-1], tokens[:, 1:])
    (language + model.balance_loss()).backward()
    norm = math.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    found = Run().column("grad_norm") + Run().column("train_loss")
    assert found == pytest.approx([norm, language.item()], rel=1e-4)
    for p, trained in zip(model.parameters(), train.load(Run().folder)[0].parameters(), strict=True):
        torch.testing.assert_close(trained, p - p.grad * (clip or norm) / norm, rtol=1e-4, atol=1e-6)


def test_evaluations_micro_batches_and_processes_change_nothing(run, monkeypatch):
    monkeypatch.setattr(train.Machine, "runs", 0)
    for owner, name in (torch.compiler, "reset"), (torch, "autocast"):
        monkeypatch.setattr(owner, name, Mock(wraps=getattr(owner, name)))
    flags = "--model=moe-tiny --norm-scale=unified --batch-size=5 --steps=4"
    run(flags)
    run(f"{flags} --eval-every=2 --eval-tokens=100 --out-dir=often")
    run(f"{flags} --micro-batch-size=2 --out-dir=micro")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*torchrun, HERE / "train.py", *run(f"{flags} --out-dir=two", list)]
    printed = subprocess.run(words, check=True, timeout=300, stdout=subprocess.PIPE, text=True).stdout
    rarely, often = Run(), Run("often")
    assert rarely.weights == often.weights
    assert fmean(often.column("train_loss")) == pytest.approx(fmean(rarely.column("train_loss")))
    for other in (Run("micro"), Run("two")):
        for name in ("train_loss", "val_loss", "grad_norm", "lr"):
            assert other.column(name) == pytest.approx(rarely.column(name), rel=1e-4)
    assert Run("two").config["processes"] == 2 and printed.count("step 0/4") == 1
    assert torch.compiler.reset.call_count == 3  # no run here takes what another has compiled
    assert torch.autocast.call_count == (2 + 4) + (3 + 4) + (2 + 4 * 3)  # evaluations and micro-batches
    assert min(rarely.column("peak_memory_mb")) > 100 and often.column("peak_memory_mb") == []


@pytest.mark.parametrize(
    "flags, owner, name, call, last",
    [
        ("--norm-scale=unified", train, "learning_rate", 13, 10),  # in step 13
        ("--model=moe-tiny --optimizer=muon --n-layer=1", torch, "save", 3, 5),  # after the tables of step 10
        ("--model=gemma-tiny --schedule=wsd", json, "dumps", 2, 20),  # before config.json says "done"
    ],
)
def test_a_run_that_was_cut_off_goes_on_as_before(run, monkeypatch, capsys, flags, owner, name, call, last):
    assert run(f"--out-dir=whole {flags}") == 0
    monkeypatch.setattr(owner, name, interrupted(getattr(owner, name), call))
    assert run(flags) == 130 and "--resume" in capsys.readouterr().err
    assert Run().config["status"] == "running" and Run().column("step")[-1] == last
    monkeypatch.setitem(train.PROGRAM, "norms.py", "edited")
    assert run(f"{flags} --resume") == 0 and "program with another norms.py" in capsys.readouterr().err
    assert Run().results() == Run("whole").results() and Run().column("step") == [0, 5, 10, 15, 20]
    config, (resumed,) = Run().config, Run().config["resumed"]
    assert config["status"] == "done" and config["program"] == Run("whole").config["program"]
    assert (resumed["step"], resumed["program"]["norms.py"]) == (last, "edited")


def test_what_a_run_leaves_reads_without_this_code_loads_and_gives_the_same_run_again(run, data_folder):
    flags = "--model=moe-tiny --norm-scale=unified --d-ff=50 --optimizer=muon --schedule=wsd --lr=3e-3"
    run(f"{flags} --seed=7 --warmup-steps=2 --n-layer=1 --eval-tokens=100")
    folder, config, checkpoint = Run().folder, Run().config, Run().checkpoint
    *_, before, row = checkpoint["metrics"]
    others = {"python", "torch", "numpy", "threads", "git_commit", "parameters", "bytes_per_token"}
    assert config.keys() >= others | {name for name, *_ in train.SETTINGS}
    assert (config["status"], config["changed"]["d_ff"], row["tokens"]) == ("done", 50, 20 * 64)
    for name in ("train.py", "model.py", "norms.py", "prepare_data.py"):
        assert config["program"][name] == hashlib.sha256((HERE / name).read_bytes()).hexdigest()
    head, first, *_, last = (folder / "metrics.csv").read_text().splitlines()
    assert head == "step,tokens,seconds,lr,train_loss,val_loss,grad_norm,tokens_per_second,peak_memory_mb"
    assert first.startswith("0,0,0.0,,,6.") and last.startswith(",".join(map(str, list(row.values())[:-1])))
    assert checkpoint["optimizers"][0]["param_groups"][0]["lr"] == row["lr"] == 0.003 / 4
    assert row["tokens_per_second"] == pytest.approx(5 * 64 / (row["seconds"] - before["seconds"]))
    assert train.main([*shlex.split(config["command"])[2:], "--out-dir=again"]) == 0
    assert Run("again").folder.name == folder.name and Run("again").results() == Run().results()
    del checkpoint["settings"]["gemma"]  # a field of Config that has come since
    torch.save(checkpoint, "checkpoint.pt")
    (folder / "checkpoint.pt").unlink()
    for lacking in (folder, "."):  # which have the vocabulary alone, the checkpoint alone
        with pytest.raises(train.UserError, match="lacks checkpoint.pt or tokenizer.tiktoken"):
            train.load(lacking)
    (folder / "tokenizer.tiktoken").rename("tokenizer.tiktoken")
    model, tokenizer = train.load(".")
    text = torch.from_numpy(TokenFolder(data_folder).val[:97].astype(np.int64))  # 6 windows of 16
    loss = model(text[:-1].view(6, 16), text[1:].view(6, 16)).item()
    assert row["val_loss"] == pytest.approx(loss) and tokenizer.decode(text.tolist()) in BOOK
    scales = {row["name"]: row for row in plot.read_table(folder / "scales.csv")}
    gamma, W = model.head.gamma_b().tolist(), model.blocks[0].attention.q.W.detach()
    recorded = [float(scales["head.gamma_b"][name]) for name in ("min", "mean", "max", "norm")]
    assert recorded == pytest.approx([min(gamma), fmean(gamma), max(gamma), math.hypot(*gamma)])
    assert float(scales["blocks.0.attention.q.W"]["norm"]) == pytest.approx(math.sqrt(W.square().sum()))


def test_a_run_that_fails_or_diverges_is_recorded(run, monkeypatch, capsys, told_in_one_line):
    evaluations = [torch.OutOfMemoryError("full"), 5.0, math.nan, 5.0]  # of the first step of four runs
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=evaluations))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    assert run() == 1 and "--micro-batch-size" in capsys.readouterr().err
    assert statuses() == {"standard": "failed"} and run("--resume") == 1
    error = capsys.readouterr().err
    assert error.startswith("diverged at step 1 with --lr=0.004: loss 5.") and error.count("\n") == 1
    assert Run().config["status"] == "diverged" and Run().config["reason"] in error
    assert run("--resume") == 1 and "diverged already" in capsys.readouterr().out
    assert run("--overwrite") == 1 and "validation_loss nan" in capsys.readouterr().err
    assert statuses() == {"standard": "diverged"} and not list(Path("runs").glob("*/checkpoint.pt"))
    results = [None] * 4 + 2 * [OSError(28, "No space left")]  # for the checkpoint, then for this record
    monkeypatch.setattr(os, "replace", Mock(side_effect=results))
    told_in_one_line(partial(run, "--out-dir=full"), "No space left")
    assert {path.suffix for path in Path("full").glob("*/*")} == {".part"}  # nothing has a final name


def test_a_sweep_is_a_process_a_run_and_ctrl_c_ends_it(run, capfd, monkeypatch):
    run("--norm-scale=hg")
    hg, popen, given, seen = Run().folder, subprocess.Popen, [], set()
    with_json("config.json", status="running")(hg)
    with_text("checkpoint.pt", "hello")(hg)

    def killing(words, **options):
        killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
        return popen(killed if "--norm-scale=none" in words else words, **options)

    def other_program(words, **options):
        given.append((options["env"]["OMP_NUM_THREADS"], statuses()))
        script = "import os, time; os.write(1, b'\\xff\\n'); time.sleep(0.3)"
        return popen([sys.executable, "-c", script], **options)

    monkeypatch.setattr(subprocess, "Popen", killing)
    assert run("--norm-scale hg none --norm-scale standard --jobs=2 --resume") == 1
    out = capfd.readouterr().out
    for words in ("hg-.* cannot be loaded", "hg-.*code 2", "none-.*code -9 .where", "standard-.*val loss"):
        assert re.search(words, out)
    assert statuses() == {"hg": "running", "standard": "done"}  # neither of the two touches another
    with_json("config.json", status="diverged")(hg)
    monkeypatch.setattr(subprocess, "Popen", other_program)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    monkeypatch.setattr(train, "print", lambda *_, **__: seen.add(threading.current_thread()), raising=False)
    assert run("--norm-scale none hg --resume --jobs=9") == 1  # hg diverged; 6 threads for 2 runs
    assert run("--norm-scale none hg ap dp ap --overwrite") == 0  # 6 for 3 at once; the old went first
    assert given == [("3", {"hg": "diverged", "standard": "done"}), *[("2", {"standard": "done"})] * 4]
    assert seen == {threading.main_thread()}  # a notebook loses what other threads print
    monkeypatch.setattr(train, "print", interrupted(print, 1), raising=False)
    assert run("--norm-scale none hg ap --jobs=1") == 130 and given[5:] == [("6", {"standard": "done"})]


def test_an_existing_run_is_neither_overwritten_nor_shared(run, capsys, monkeypatch, told_in_one_line):
    run()
    told_in_one_line(run, "exists: --resume continues a run, --overwrite replaces one")
    folder, config = Run().folder, Run().config | {"status": "running"}
    torch.save(SimpleNamespace(), folder / "checkpoint.pt")  # to load an object may be to run its code
    for text, words in (
        (json.dumps(config | {"lr": 1}), "lr is 1 there and 0.004 here"),
        (json.dumps(config | {"data_sha256": "other"}), "data_sha256 is other there"),
        ("{", "config.json is not the record of a run"),
        ("[1]", "config.json is not the record of a run"),
        ('{"model_type": "llama"}', "config.json is not the record of a run"),
        (json.dumps(config), "checkpoint.pt cannot be loaded"),
    ):
        with_text("config.json", text)(folder)
        told_in_one_line(partial(run, "--resume"), words)
    older = config.keys() - {"grad_clip", "changed", "program"}  # these have come since
    with_text("config.json", json.dumps({name: config[name] for name in older} | {"status": "done"}))(folder)
    monkeypatch.setattr(train, "SETTINGS", [*train.SETTINGS, ("new", int, 3, "a setting of one's own")])
    assert run("--resume --micro-batch-size=2") == 0 and "done already" in capsys.readouterr().out
    assert run("--new=4") == 0
    next(Path("runs").glob("*-new4/config.json")).unlink()  # in a folder of its own
    told_in_one_line(partial(run, "--new=4 --overwrite"), "exists")  # it may be somebody else's


def test_without_data_a_dry_run_and_a_first_command(tmp_path, monkeypatch, capsys, told_in_one_line):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry-run", "--model=llama-1b", "--norm-scale", "standard", "unified"]) == 0
    out, least = capsys.readouterr().out, (16 * 1_028_065_024 + 8 * 32_768 * 50_304) / 2**20
    assert "1,028,065,024 parameters, 1,028,065,024 a token, 80,640 in vectors\n" in out and not os.listdir()
    assert f"at least {least:,.0f} MiB" in out and "vectors: 378,919 in 222 tensors, weight decay 0\n" in out
    flags = "--d-model=2 --n-head=1 --seq-len=1 --batch-size=1 --steps=1 --eval-tokens=5000"
    assert train.main(flags.split()) == 0 and statuses() == {"standard": "done"}
    told_in_one_line(lambda: prepare_data.main([]), "sotu exists")  # the default is the same text
    data, (_, val) = TokenFolder("data/sotu"), decoded("data/sotu")
    assert data.vocab_size == 2048 and data.meta["bytes_per_token"] == len(val.encode()) / len(data.val)
    # The tokens of all records under results/.
    assert data.sha256["train.bin"] == "9e1b1d5621273a229836cb50678ff5d8710954bab207fbd981eafd5237ea5c53"
    assert data.sha256["val.bin"] == "ea715945305fa360bddf0f44523af982b69d3e17214c5a32142916c60d72c001"


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_torch_compile_gives_the_same_losses(run, monkeypatch):
    monkeypatch.setattr(torch, "compile", Mock(wraps=torch.compile))
    for switch in ("on", "off"):
        run(f"--compile={switch} --norm-scale=unified --n-layer=1 --steps=6 --out-dir={switch}")
    assert torch.compile.call_count == 1
    assert Run("on").column("val_loss") == pytest.approx(Run("off").column("val_loss"), abs=1e-5)


def test_a_mistake_is_told_before_a_run_starts(run, data_folder, told_in_one_line, monkeypatch):
    with_json("meta.json", vocab_size=60_000)(shutil.copytree(data_folder, Path("large")))
    for flags, words in (
        ("--seq-len=0", "--seq-len: 0 is too small"),
        ("--lr=nan", "--lr: nan is too small or too large"),
        ("--grad-clip=inf", "--grad-clip: inf is too small or too large"),
        ("--warmup-steps=20", "--warmup-steps: as many as all 20 steps"),
        ("--norm-scale none hg+hgg", "'hgg' in 'hg+hgg' (did you mean 'hg'?); the grammar: none, standard"),
        ("--norm-scale=unifed", "'unified'?); the grammar: none, standard, unified, or parts joined by +"),
        ("--norm-scale=dp+er+ap", "'dp+er+ap' has 'dp' and 'ap': choose one for placement; the grammar"),
        ("--norm-scale=none+iwd", "'none' stands alone, not as a part of 'none+iwd'; the grammar"),
        ("--dtype=bfloat16 --device=cpu", "bfloat16 needs a GPU"),
        ("--n-head=16 --dry-run", "16 is not 16 heads of even width"),
        ("--model=moe-tiny --compile=on", "--compile: the loop over experts"),
        ("--seq-len=100000", "--seq-len: a part of"),
        ("--data=nowhere", "nowhere is not a folder made by prepare_data.py"),
        ("--model=llama-0.12b --data=large", "llama-0.12b has 50,304 tokens, data 60,000"),
        ("--jobs=2 --jobs=3", "--jobs is given twice"),
        ("--resume --overwrite", "not both"),
    ):
        told_in_one_line(partial(run, flags), "train.py: error: ", words)
    for name, value in ("RANK", "0"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4"), ("LOCAL_RANK", "0"):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    told_in_one_line(run, "--device=cuda: torch finds 3")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _: None)
    monkeypatch.setattr(train.Machine, "sum", lambda self, value: value)
    told_in_one_line(partial(run, "--device=cpu --batch-size=7"), "fewer than the 8 processes")
    told_in_one_line(partial(run, "--device=cpu --batch-size=8 --seed 0 1"), "torchrun trains one run")
    assert [path.name for path in Path().iterdir()] == ["large"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("variant", ["none", "standard", "unified", "hg+dp+or"])
@pytest.mark.parametrize("model", MODELS)
def test_a_gpu_computes_in_bfloat16_and_compiles_what_is_dense(run, monkeypatch, model, variant):
    flags = f"--model={model} --norm-scale={variant} --lr=1e-3 --d-model=64"  # at 4e-3 rounding moves it 0.09
    run(f"{flags} --dtype=float32 --compile=off --out-dir=exact")
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)  # to evaluate and to train, nothing again
    run(f"{flags} --dtype=bfloat16 --out-dir=fast")
    assert Run("exact").column("val_loss") == pytest.approx(Run("fast").column("val_loss"), abs=0.02)
    assert Run("fast").config["compile"] == ("off" if model == "moe-tiny" else "on")
    monkeypatch.setattr(train, "learning_rate", interrupted(train.learning_rate, 13))
    assert run(flags) == 130 and run(f"{flags} --resume") == 0
    assert Run().column("val_loss")[-1] == pytest.approx(Run("fast").column("val_loss")[-1], abs=1e-3)


@pytest.mark.kill
@pytest.mark.skipif("'kill' not in config.option.markexpr", reason="runs with -m kill")
def test_killed_at_any_moment_a_run_goes_on_as_before(run):
    words = [sys.executable, HERE / "train.py", *run("--steps=600 --eval-tokens=100 --resume", list)]
    subprocess.run([*words, "--out-dir=whole"], check=True)
    for number in range(10):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        next(line for line in process.stdout if line.startswith("step"))  # the first of this sitting
        time.sleep(0.03 * number)
        process.kill()
        assert process.wait() == -9
    subprocess.run(words, check=True)
    assert Run().results() == Run("whole").results()


# ---------------------------------------------------------------------------------------------------
# Pictures and the table


def write_run(root, norm_scale="standard", seed=0, losses=(7.6, 4.0, 3.9), cost=",", **config):
    """A run folder, 1,000 tokens a step, with an evaluation every 10; cost: "tokens a second,peak memory"."""
    made = {"model": "tiny", "norm_scale": norm_scale, "optimizer": "adamw", "schedule": "cosine"}
    made |= {"lr": 0.004, "seed": seed, "batch_size": 8, "seq_len": 125, "steps": 10 * (len(losses) - 1)}
    made |= {"data": "data/sotu", "data_sha256": {"val.bin": "ab" * 32}, "n_layer": 4, "status": "done"}
    made |= {"parameters": 459_328, "activated_parameters": 459_328} | config.get("changed", {}) | config
    folder = root / config.get("name", f"run{len(list(root.iterdir()))}")
    folder.mkdir()
    with_text("config.json", json.dumps(made))(folder)
    rows = [f"{10 * i},{10_000 * i},{loss},{cost}\n" for i, loss in enumerate(losses)]
    head = "step,tokens,val_loss,tokens_per_second,peak_memory_mb\n"
    with_text("metrics.csv", head + "".join(rows))(folder)
    return folder


def plotted(capsys, folder, *flags):
    """What plot.py prints, split where two spaces or more are, and its stderr; its picture must be there."""
    out = folder / "picture.png"
    with warnings.catch_warnings(action="error"):
        plot.main([str(folder), f"--out={out}", *flags])
    assert out.read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr()
    return [re.split("  +", line) for line in told.out.splitlines()], told.err


def curves_of(*folders):
    return {curve.label: curve for curve in plot.make_curves(plot.read_runs(folders)[0], "standard")}


def axes_of(kind, folder):
    return plot.PICTURES[kind](list(curves_of(folder).values()), SimpleNamespace(baseline="standard"))[0].axes


def test_quantiles_of_students_t():
    angle = (np.arange(100_000) + 0.5) / 100_000 * np.pi / 2  # T = sqrt(df) tan(angle)
    for df, t in zip(range(1, 31), plot.T_95, strict=True):
        share = np.average(angle < np.arctan(t / df**0.5), weights=np.cos(angle) ** (df - 1))
        assert share == pytest.approx(0.95, abs=7e-5)


def test_the_table_pairs_by_seed_and_counts_only_what_finished(tmp_path, capsys):
    for seed, (loss, speed) in enumerate(((3.90, 100_000), (3.91, 50_000), (3.95, 10_000), (3.99, 50_000))):
        write_run(tmp_path, "standard", seed, losses=(7.6, 4.0, loss), cost=f"{speed},1000")
    for seed, loss in enumerate((3.87, 3.91, 3.93)):  # minus standard: -0.03, 0, -0.02
        write_run(tmp_path, "unified", seed, losses=(7.6, 4.0, loss), cost="40000,")
        write_run(tmp_path, "hg", seed, losses=(7.6, 4.0, loss - 0.03), cost=",500.5")
    write_run(tmp_path, "unified", 3, losses=(7.6, 1.0), steps=20, status="running", cost="1,1")
    write_run(tmp_path, "unified", 4, losses=(7.6, 1.0), steps=20)  # done, it says: an evaluation is missing
    write_run(tmp_path, "none", 0, losses=(7, 5, 4), program={"train.py": 1, "model.py": 2, "norms.py": 3})
    write_run(tmp_path, "none", 1, losses=(7.6, 5, "inf"), status="diverged", reason="not\nfinite")
    write_run(tmp_path, "dp", 9, program={"train.py": 1, "model.py": 4, "new.py": 5})
    with_text("config.json", "{{")(write_run(tmp_path, name="foreign"))
    lines, told = plotted(capsys, tmp_path)
    assert lines[0][-4:] == ["ms a step", "ratio", "memory, MB", "ratio"]
    # standard error of (-0.03, 0, -0.02): sqrt((0.0133^2 + 0.0167^2 + 0.0033^2) / 6) = 0.00882; times 4.303
    assert [" | ".join([row[0], *row[2:]]) for row in lines[1:-1] if row[1] == "459,328"] == [
        "hg | 3 of 3 | 3.8733 | standard | -0.0467 ± 0.0379 * | 500 | 0.50",
        "dp | 1 of 1 | 3.9000 | standard | no common seed",
        "unified | 3 of 5 | 3.9033 | standard | -0.0167 ± 0.0379 | 25.0 | 1.25",
        "standard | 4 of 4 | 3.9375 | 20.0 | 1,000",
        "none | 1 of 2 | 4.0000 | standard | +0.1000, one seed",
    ]
    ends = ["running at step 10 of 20.", "done at step 10 of 20.", "diverged at step 20 of 20. not finite"]
    skipped, *unfinished, programs = told.splitlines()
    assert sorted(line.split(", ")[1] for line in unfinished) == sorted(ends)
    assert skipped.startswith(f"plot.py: no run, skipped: {tmp_path / 'foreign'}: JSONDecodeError: Expecting")
    assert programs.endswith("different programs, which differ in model.py, norms.py, new.py")


def test_labels_name_what_differs_baselines_follow_and_no_run_is_read_twice(tmp_path, capsys):
    for label, baseline, run in (
        ("standard", None, {}),  # without `changed`, as older runs are
        ("none", "standard", {"seed": 5}),
        ("standard, lr 0.1", "standard", {"lr": 0.1, "losses": (7, 4, 3.8)}),  # best but for its second seed
        ("standard, lr 0.1", "standard", {"lr": 0.1, "losses": (7, 4), "steps": 20, "seed": 1}),
        ("standard, lr 0.2", "standard", {"lr": 0.2, "losses": (7, 4, 3.95)}),
        ("none, lr 0.1", "standard, lr 0.1", {"lr": 0.1}),
        ("none, lr 0.1", "standard, lr 0.1", {"lr": 0.1, "seed": 6, "data": "../sotu/"}),  # by another way
        ("none, lr 0.3", "standard", {"lr": 0.3}),
        ("none, optimizer muon", "standard", {"optimizer": "muon"}),
        ("none, schedule wsd", "standard", {"schedule": "wsd"}),
        ("standard, d_ff 176", "standard", {"changed": {"d_ff": 176}}),  # is itself compared
        ("none, d_ff 176", "standard, d_ff 176", {"changed": {"d_ff": 176}}),
        ("hg, d_ff 176, weight_decay 0", "standard", {"changed": {"d_ff": 176, "weight_decay": 0}}),
        ("none, model small", None, {"model": "small"}),
        ("standard, model small, d_ff 1", None, {"model": "small", "changed": {"d_ff": 1}}),  # two of the
        ("standard, model small, d_ff 2", None, {"model": "small", "changed": {"d_ff": 2}}),  # fewest changed
        ("none, data my cdcdcd", None, {"data": "C:\\my", "data_sha256": {"val.bin": "cd" * 32}}),
        ("none, steps 60", None, {"changed": {"steps": 60}}),
        ("none, eval_tokens 9", None, {"changed": {"eval_tokens": 9}}),  # losses of another text
    ):
        with_text("expected", f"{label} | {baseline}")(write_run(tmp_path, label.split(",")[0], **run))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "above").symlink_to(tmp_path)
    curves = curves_of(tmp_path / "links", tmp_path / "run0")  # through a link, which leads in a circle
    usual = re.compile(", (model tiny|optimizer adamw|schedule cosine|lr 0.004|data sotu ababab)")
    for curve in curves.values():
        found = usual.sub("", f"{curve.label} | {curve.baseline and curve.baseline.label}")
        assert {(run.folder / "expected").read_text() for run in curve.runs.values()} == {found}
    assert "none, model tiny, optimizer adamw, schedule cosine, lr 0.004, data sotu ababab" in curves
    assert sum(len(curve.runs) for curve in curves.values()) == 19
    assert sorted(curves) == sorted(row[0] for row in plotted(capsys, tmp_path)[0][1:-1])  # the table has all


def test_every_curve_that_is_drawn_has_a_look_of_its_own(tmp_path, capsys):
    for number in range(23):
        write_run(tmp_path, "none", changed={"twist": 100 + number})
    for number in range(6):  # baselines: more than there are dashes
        write_run(tmp_path, changed={"twist": 100 + number})
    curves = list(curves_of(tmp_path).values())
    styles, (line,) = plot.looks(curves, curves)
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == 28 == len(styles)
    black = [curve.label for curve in styles if styles[curve]["color"] == "black"]
    assert black == [f"standard, twist {100 + number}" for number in range(4)]
    assert line.endswith("or no scales.csv: standard, twist 105")
    assert plotted(capsys, tmp_path)[0][30:-1] == [[line]]  # below the table, which has all 29


def test_lines_of_what_has_finished_and_their_limits(tmp_path):
    falling = np.array([7.6, 6.0, 5.0, 4.5, 4.4, 4.3, 4.2, 4.1, 4.0])  # of 11; the last 70 % begin at 4.5
    for seed in (0, 1, 2):
        write_run(tmp_path, "standard", seed, losses=[*falling, 4.0, 3.9])
        ends = [4.3 + seed / 5, 4.1 + seed / 5][: 2 - seed // 2]  # seed 2 has not finished
        write_run(tmp_path, "none", seed, losses=[*(falling + 0.2), *ends], steps=100)
    write_run(tmp_path, "hg", losses=[*falling, 50.0], steps=100, status="diverged")
    write_run(tmp_path, "hg", seed=1, losses=(), steps=100, status="running")  # has just begun: hides nothing
    absolute, relative = axes_of("loss", tmp_path)
    (mean,) = [line.get_ydata() for line in relative.lines if line.get_label().startswith("none")]
    np.testing.assert_allclose(mean[-3:], [0.2, 0.4, 0.3])  # each margin: a tenth of the range, and 0.001
    assert absolute.get_ylim() == pytest.approx((3.9 - 0.081, 4.7 + 0.081))
    assert relative.get_ylim() == pytest.approx((0 - 0.041, 0.4 + 0.041))
    alone = plot.loss_picture([curves_of(tmp_path)["hg"]], SimpleNamespace(baseline="standard"))[0].axes[0]
    assert alone.get_ylim() == pytest.approx((4.0 - 4.601, 50 + 4.601))  # while none has finished


def test_scales_of_the_middle_layer_with_no_curve_left_out_silently(tmp_path, capsys):
    rows = ["step,kind,name,min,mean,max,norm"]
    for layer in range(4):
        rows.append(f"0,scale,blocks.{layer}.attention.q.gamma_b,0.5,1,{layer},1")
        for i, branch in enumerate("qkv"):
            rows.append(f"0,weight,blocks.{layer}.attention.{branch}.W,,,,{layer}.5")
            rows.append(f"0,scale,blocks.{layer}.attention.{branch}.norm.gamma_a,{layer + i},1,{11 - i},1")
    write_run(tmp_path, "unified", 0)
    for seed, lr in ((1, 0.004), (0, 0.1), (2, 0.004)):
        table = "\n".join(rows).replace(".5", f".{5 + seed}")
        with_text("scales.csv", table)(write_run(tmp_path, "unified", seed, lr=lr))
    write_run(tmp_path, "none")
    rows, told = plotted(capsys, tmp_path, "--kind=weights")
    assert len(rows) == 2 and rows[0][0].endswith("or no scales.csv: none, lr 0.004") and told == ""
    axes = axes_of("weights", tmp_path)
    drawn = [[line.get_ydata().tolist() for line in axis.lines] for axis in axes]
    assert drawn == [[[2.6], [2.5]]] * 3 + [[[1], [1]]] * 2 + [[]]  # layer 2, lowest seed with a scales.csv
    shades = [axis.collections[0].get_paths()[0].vertices[:, 1] for axis in axes[3:5]]
    assert [(min(shade), max(shade)) for shade in shades] == [(0.6, 2), (2, 11)]


def test_neither_a_backend_nor_the_users_style_nor_letters_matter(tmp_path):
    code = "import matplotlib, sys; matplotlib.use('svg'); matplotlib.rc('text', usetex=True); import plot; "
    code += "plot.main(sys.argv[1:]); assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules); "
    code += "assert matplotlib.get_backend() == 'svg' and matplotlib.rcParams['text.usetex']"
    out = write_run(tmp_path, name="Жук", steps=30) / "picture.pdf"
    command = [sys.executable, "-c", code, str(tmp_path), f"--out={out}"]
    environment = os.environ | {"PATH": "", "PYTHONIOENCODING": "cp1252"}
    told = subprocess.run(command, cwd=HERE, check=True, env=environment, capture_output=True)
    assert out.read_bytes().startswith(b"%PDF") and b"???" in told.stdout and b"???" in told.stderr


E, A, B, GAIN = 1.7, 60.0, 0.11, 1.25
SAME = ("data", "vocab_size", "eval_tokens", "gemma", "n_expert", "optimizer", "schedule", "weight_decay")


def write_sizes(root, losses_at=lambda C: E + A * C**-B):
    """Five sizes of standard and unified; unified needs GAIN times less compute. Seeds are averaged."""
    for i, width in enumerate((64, 128, 256, 512, 1024)):
        size = {"changed": {"d_model": width}, "activated_parameters": round(10 ** (5 + i / 2))}
        C = 6 * size["activated_parameters"] * 20_000
        for seed, shift in enumerate((-0.01, 0.01)):
            write_run(root, "standard", seed, losses=(7, 5, losses_at(C) + shift), **size)
            write_run(root, "unified", seed, losses=(7, 5, losses_at(GAIN * C) + shift), **size)


def test_scaling_law_of_exact_losses_at_each_sizes_best_rate(tmp_path, capsys):
    write_sizes(tmp_path)
    write_run(tmp_path, lr=0.1, losses=(7, 5, 7), changed={"d_model": 64}, activated_parameters=100_000)
    rows, _ = plotted(capsys, tmp_path, "--kind=scaling")
    numbers = [float(number) for number in re.findall(r"[\d.]+", str(rows[:3]))[:9]]
    np.testing.assert_allclose(numbers, [E, A, B, 5, E, A * GAIN**-B, B, 5, GAIN], rtol=1e-3)


def test_theory_lines_and_marks_meet(tmp_path, monkeypatch):
    pictures = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda figure, *_, **__: pictures.append(figure))
    plot.main(["nowhere", "--kind=theory", f"--out={tmp_path / 'theory.svg'}"])  # needs no run
    a, b, c, d = pictures[0].axes
    for panel, known, rtol in (a, slice(None), 0.01), (b, slice(4), 0.05), (d, slice(None), 0.05):
        lines = [line for line in panel.lines if len(line.get_xdata()) > 2]  # not the means of the measure
        assert len(lines) == {a: 10, b: 6, d: 6}[panel]
        for line, marks in zip(lines[::2], lines[1::2]):
            t, measured = (numbers[known] for numbers in marks.get_data())
            np.testing.assert_allclose(measured, np.interp(t, *line.get_data()), rtol=rtol)
    for points in c.lines[:4]:
        gain, holds = points.get_ydata(), "geq" in points.get_label()
        assert all(gain > 1 - 1e-9) == holds
    # With w integrated out, the density of g under exp(-2 F / q) is known: w is normal given g.
    g, q, decay = np.linspace(-40, 40, 400_001), 0.25, 0.5
    for mu, dotted in zip((0.1, 0.5), [line for line in d.lines if len(line.get_xdata()) == 2], strict=True):
        least = decay / (g**2 + decay) + mu * g**2  # of 2 F over w, at w = g / (g^2 + decay)
        density = np.exp(-least / q) / np.sqrt(g**2 + decay)
        assert dotted.get_ydata() == pytest.approx(2 * [np.sum(g**2 * density) / np.sum(density)], rel=2e-3)


@pytest.mark.parametrize(
    "spoil, kind, words",
    [(partial(write_run, changed={name: "other"}), "scaling", f"not of the same {name}:") for name in SAME]
    + [
        (with_text("run0/config.json", "[" * 100_000), "loss", "RecursionError: "),
        (with_text("run0/config.json", '{"model_type": "llama"}'), "loss", "KeyError: 'data_sha256'"),
        (with_text("run0/metrics.csv", "step,tokens,loss\n0,0,7\n"), "loss", "KeyError: 'val_loss'"),
        (with_text("run0/metrics.csv", ""), "loss", "no run with an evaluation"),
        (shutil.rmtree, "loss", "there is no folder"),
        (lambda root: None, "weights", "no run has a scales.csv"),
        (with_text("run0/scales.csv", "step,kind\n0,scale\n"), "weights", "KeyError: 'name'"),
        (write_run, "loss", "run1 have the same settings and seed"),
        (partial(write_run, seed=1), "scaling", "needs four finished sizes; standard has 1"),
        (partial(write_sizes, losses_at=lambda C: 10 - A * C**-B), "scaling", "do not fall"),
        (lambda root: [write_sizes(root), write_run(root, changed={"twist": 1})], "scaling", "more than lr"),
    ],
)
def test_mistakes_in_records(spoil, kind, words, tmp_path, told_in_one_line):
    write_run(tmp_path)
    spoil(tmp_path)
    command = [str(tmp_path), f"--out={tmp_path / 'picture.png'}", f"--kind={kind}"]
    told_in_one_line(lambda: plot.main(command), "plot.py: error: ", words)
    assert not (tmp_path / "picture.png").exists()
