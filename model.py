"""A Llama-like transformer whose Norms and the linear maps behind them come from norms.py.

    h = x + Attention(Norm(x)),    out = h + FFN(Norm(h)),    logits = LM head(Norm(out))

RoPE, SwiGLU, no biases, untied embedding and head, full multi-head attention: the Llama of the paper's
section 3. Two options make its other models: Gemma's extra norms, and a mixture of experts in place of
each FFN. There is no branch on a scale-vector variant here; `PreNormLinear` takes care of that.
Shapes: B sequences, T positions, d width, H heads of d/H channels, V vocabulary, E experts, k of them a token.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from norms import NormScale, OutputNorm, PreNormLinear, ScaleVector, grouped_linear, normalize, pad_to_8


# ---------------------------------------------------------------------------------------------------
# Sizes


@dataclass(frozen=True)
class Config:
    """Sizes of one model."""

    d_model: int
    n_head: int
    n_layer: int
    d_ff: int  # hidden width of the FFN, or of the shared expert
    vocab_size: int
    seq_len: int
    norm_scale: NormScale = NormScale()
    gemma: bool = False  # Q/K-norm, and an Output-Norm on what attention and FFN emit
    n_expert: int = 0  # routed experts beside the shared one; 0: a dense FFN
    top_k: int = 0  # routed experts that a token visits

    @property
    def head_dim(self):
        return self.d_model // self.n_head

    @property
    def expert_d_ff(self):
        return int(2 * self.d_model / 3)


def paper_d_ff(d_model):
    return int(8 * d_model / 3)


def _preset(d_model, n_head, n_layer, **others):
    return dict(d_model=d_model, n_head=n_head, n_layer=n_layer, d_ff=paper_d_ff(d_model), **others)


# Sizes, and the settings that go with them: the paper's tables of section 3, and its learning rates for
# Muon and for the wsd schedule where it names them (elsewhere the one of AdamW with cosine). Steps that
# are not named follow from the paper's rule, 100 tokens for each (activated) parameter; a vocabulary
# that is not named is the data's.
_TINY = dict(seq_len=128, batch_size=8, lr=4e-3, steps=2000, vocab_size=None, eval_every=250, eval_tokens=131_072)
_PAPER = dict(batch_size=512, tokens_at_once=32_768, vocab_size=50_304, eval_every=500, eval_tokens=4_194_304)
_MOE = dict(n_expert=32, top_k=4)
PRESETS = {
    "tiny": _preset(64, 4, 4, **_TINY),
    "gemma-tiny": _preset(64, 4, 4, gemma=True, **_TINY),
    "moe-tiny": _preset(64, 4, 4, n_expert=8, top_k=2, **_TINY),
    "llama-0.12b": _preset(768, 12, 6, seq_len=1024, lr=4e-3, lr_muon=5e-3, lr_wsd=3e-3, **_PAPER),
    "llama-0.25b": _preset(1024, 16, 12, seq_len=1024, lr=2e-3, **_PAPER),
    "llama-0.5b": _preset(1280, 20, 18, seq_len=4096, lr=2e-3, lr_muon=4e-3, **_PAPER),
    "llama-0.75b": _preset(1536, 24, 21, seq_len=4096, lr=2e-3, **_PAPER),
    "llama-1b": _preset(1792, 28, 22, seq_len=4096, lr=1e-3, **_PAPER),
    "gemma-0.5b": _preset(1280, 20, 18, gemma=True, seq_len=4096, lr=2e-3, lr_muon=4e-3, **_PAPER),
    "moe-0.25b": _preset(640, 10, 6, seq_len=1024, lr=3e-3, **_MOE, **_PAPER),
    "moe-0.5b": _preset(768, 12, 9, seq_len=1024, lr=2e-3, lr_muon=4e-3, **_MOE, **_PAPER),
    "moe-0.8b": _preset(960, 15, 10, seq_len=4096, lr=2e-3, **_MOE, **_PAPER),
    "moe-1b": _preset(1024, 16, 12, seq_len=4096, lr=1e-3, **_MOE, **_PAPER),
    "moe-2b": _preset(1280, 20, 15, seq_len=4096, lr=6e-4, **_MOE, **_PAPER),
}


# ---------------------------------------------------------------------------------------------------
# Attention


def rotations(seq_len, head_dim, theta=10_000.0):
    """cos and sin of RoPE's angles t * theta^(-2 i / head_dim), written out for `rotate`: (2, T, 1, d/H)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
    cos = torch.stack([angle.cos(), angle.cos()], dim=-1).flatten(1)
    sin = torch.stack([-angle.sin(), angle.sin()], dim=-1).flatten(1)
    return torch.stack([cos, sin])[:, :, None].float()


def rotate(x, rotation):
    """RoPE: turns channels (2i, 2i+1) at position t by t's i-th angle. x (B, T, H, d/H).

    (a, b) -> (a cos - b sin, b cos + a sin): x * cos plus the swapped pairs times -sin, sin. Without
    slices, whose backward would fill zeros.
    """
    cos, sin = rotation[:, : x.shape[1]].to(x.dtype)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * cos + swapped * sin


class Attention(nn.Module):
    """W_o softmax(rope(q) rope(k)^T / sqrt(d/H)) v, causal, with q, k, v = branches of Norm(x)."""

    def __init__(self, config):
        super().__init__()
        d, self.head_dim = config.d_model, config.head_dim
        self.qkv = PreNormLinear(
            d, {"q": d, "k": d, "v": d}, config.norm_scale, head_dim=self.head_dim, qk_norm="qk" if config.gemma else ""
        )
        self.o = nn.Parameter(torch.empty(d, d))

    def forward(self, x, rotation):
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x))  # each (B, T, H, d/H)
        q, k = rotate(q, rotation), rotate(k, rotation)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return F.linear(y.transpose(1, 2).flatten(-2), self.o)

    def residual_projections(self):
        return [self.o]


# ---------------------------------------------------------------------------------------------------
# Feed-forward networks, dense and mixed; both return (what they emit, their Routing or None)


class FeedForward(nn.Module):
    """SwiGLU: W_down (silu(gate) * up), with gate, up = branches of Norm(x)."""

    def __init__(self, config):
        super().__init__()
        d, f = config.d_model, config.d_ff
        self.gate_up = PreNormLinear(d, {"gate": f, "up": f}, config.norm_scale)
        self.down = nn.Parameter(torch.empty(d, f))

    def forward(self, x):
        gate, up = self.gate_up(x)
        return F.linear(F.silu(gate) * up, self.down), None

    def residual_projections(self):
        return [self.down]


@dataclass
class Routing:
    """How one layer's router spread the tokens: the load-balancing loss, and each expert's share f_i (B, E)."""

    balance_loss: torch.Tensor
    load: torch.Tensor


class MixtureOfExperts(nn.Module):
    """One shared expert, and k of E routed ones a token, each a SwiGLU on the same Norm(x):

        y = FFN_shared(n) + sum over the k largest p_i of p_i FFN_i(n),     p = softmax(W_router n), n = Norm(x)

    The p_i are used as they are, not renormalised over the k. No token is dropped. Balance loss (Switch),
    for each sequence, then averaged: E sum_i f_i P_i, with f_i the share of the kT assignments that went
    to expert i and P_i its mean probability; it is 1 where the load is even.
    """

    def __init__(self, config):
        super().__init__()
        d, f_shared, f = config.d_model, config.d_ff, config.expert_d_ff
        self.n_expert, self.top_k = config.n_expert, config.top_k
        self.gates, self.ups = ([f"{c}_{e}" for e in range(self.n_expert)] for c in ("gate", "up"))
        widths = {"router": self.n_expert, "gate": f_shared, "up": f_shared}
        widths |= {c: f for pair in zip(self.gates, self.ups) for c in pair}
        self.inputs = PreNormLinear(d, widths, config.norm_scale, bare=("router",))
        self.down = nn.Parameter(torch.empty(d, f_shared))
        self.expert_down = nn.ParameterList(torch.empty(d, f) for _ in range(self.n_expert))

    def forward(self, x):
        n = normalize(x)
        gate, up = self.inputs.linear(n, "gate", "up")
        shared = F.linear(F.silu(gate) * up, self.down)

        p = self.inputs.linear(n, "router")[0].softmax(-1, dtype=torch.float32)  # (B, T, E)
        weight, expert = p.topk(self.top_k, dim=-1)  # (B, T, k)
        chosen = F.one_hot(expert, self.n_expert).sum(2)  # (B, T, E), 1 where a token visits an expert
        share = chosen.float().mean(1) / self.top_k  # f_i of each sequence, (B, E)
        balance_loss = self.n_expert * (share * p.mean(1)).sum(-1).mean()

        order = expert.flatten().argsort(stable=True)  # the B T k visits, sorted by expert
        token = order // self.top_k
        ends = chosen.sum((0, 1)).cumsum(0).to(torch.int32)
        visits = n.flatten(0, 1).index_select(0, token)
        gate, up = self.inputs.grouped(visits, expert.flatten()[order], ends, self.gates, self.ups)
        W_down = pad_to_8(torch.stack(list(self.expert_down)), dim=2)  # (E, d, f)
        y = grouped_linear(F.silu(gate) * up, W_down, ends) * weight.flatten()[order, None].to(gate.dtype)
        routed = torch.zeros_like(shared).flatten(0, 1).index_add(0, token, y.to(shared.dtype))
        return shared + routed.view_as(shared), Routing(balance_loss, share)

    def residual_projections(self):
        return [self.down, *self.expert_down]

    def idle_parameters(self):
        """As many parameters as a token leaves unused: those of E - k experts."""
        idle = range(self.top_k, self.n_expert)
        branches = [c[e] for c in (self.gates, self.ups) for e in idle]
        return self.inputs.parameters_of(*branches) + [self.expert_down[e] for e in idle]


# ---------------------------------------------------------------------------------------------------
# The model


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.ffn = MixtureOfExperts(config) if config.n_expert else FeedForward(config)
        # Gemma normalises what both emit before it is added.
        d, scale = config.d_model, config.norm_scale
        self.attention_out = OutputNorm(d, scale) if config.gemma else nn.Identity()
        self.ffn_out = OutputNorm(d, scale) if config.gemma else nn.Identity()

    def forward(self, x, rotation):
        x = x + self.attention_out(self.attention(x, rotation))
        y, routing = self.ffn(x)
        return x + self.ffn_out(y), routing


class Transformer(nn.Module):
    """Tokens (B, T) to logits (B, T, V), or to losses where the targets (B, T) are given.

    Weights are uninitialised until `init_weights`, so that a model can be counted on the meta device.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = PreNormLinear(config.d_model, {"head": config.vocab_size}, config.norm_scale)
        self.register_buffer("rotation", rotations(config.seq_len, config.head_dim), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed):
        """Matrices ~ N(0, std^2), std 0.02 and, for projections onto the residual stream, 0.02 / sqrt(2 layers).

        Scale vectors start at 1 and take no random number: with one seed every variant starts from the
        same matrices. Returns the model.
        """
        parts = [part for block in self.blocks for part in (block.attention, block.ffn)]
        projections = {p for part in parts for p in part.residual_projections()}
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.ndim == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if p in projections else 0.02
                p.normal_(std=std, generator=generator)
        return self

    def forward(self, tokens, targets=None):
        """Logits, or with targets (language loss in nats a token, balance loss, expert load (layers, B, E)).

        Targets of -100 do not count. A dense model's balance loss is 0 and its load None.
        """
        x = F.embedding(tokens, self.embedding)
        routings = []
        for block in self.blocks:
            x, routing = block(x, self.rotation)
            routings.append(routing)
        (logits,) = self.head(x)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        if not self.config.n_expert:
            return loss, torch.zeros_like(loss), None
        return loss, torch.stack([r.balance_loss for r in routings]).mean(), torch.stack([r.load for r in routings])

    @torch.no_grad()
    def generate(self, tokens, count, generator):
        """count tokens after `tokens` (1, T), sampled at temperature 1."""
        for _ in range(count):
            logits = self(tokens[:, -self.config.seq_len :])[:, -1]
            following = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)
            tokens = torch.cat([tokens, following.to(tokens.device)], dim=1)
        return tokens


# ---------------------------------------------------------------------------------------------------
# Counts


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters: all, those that one token uses, and those in scale vectors; and the
    floating-point operations that training does for a token."""

    parameters: int
    activated: int
    scale: int
    flops_per_token: int


def count(config):
    """The Counts of a model, to the digit, from a model on the meta device: nothing is allocated.

    A token costs 6 FLOPs for each activated entry of a matrix but the embedding's (2 forward, 4
    backward), and causal attention, half of the T x T square, 6 T d a layer.
    """
    with torch.device("meta"):
        model = Transformer(config)

    def size(parameters):
        return sum(p.numel() for p in parameters)

    everything = list(model.parameters())
    idle = [p for block in model.blocks if config.n_expert for p in block.ffn.idle_parameters()]
    scale = [p for m in model.modules() if isinstance(m, ScaleVector) for p in m.parameters()]
    matrices = size(everything) - size(scale) - size(p for p in idle if p.ndim == 2) - model.embedding.numel()
    flops = 6 * matrices + 6 * config.n_layer * config.seq_len * config.d_model
    return Counts(size(everything), size(everything) - size(idle), size(scale), flops)
