"""A Llama-like transformer whose Norms and the linear maps behind them come from norms.py.

    h = x + Attention(Norm(x)),    out = h + FFN(Norm(h)),    logits = LM head(Norm(out))

RoPE, SwiGLU, no biases, untied embedding and head, full multi-head attention: the models of the
paper's section 3. There is no branch on a scale-vector variant here; `PreNormLinear` takes care.
Shapes: B sequences, T positions, d width, H heads of d/H channels, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from norms import NormScale, PreNormLinear, ScaleVector


@dataclass(frozen=True)
class Config:
    """Sizes of one model. d_ff defaults to the paper's int(8 d / 3)."""

    d_model: int
    n_head: int
    n_layer: int
    d_ff: int
    vocab_size: int
    seq_len: int = 128
    norm_scale: NormScale = NormScale()

    @property
    def head_dim(self):
        return self.d_model // self.n_head


def _preset(d_model, n_head, n_layer, **training):
    return dict(d_model=d_model, n_head=n_head, n_layer=n_layer, d_ff=int(8 * d_model / 3), **training)


# Sizes and training settings (the paper's Table of section 3; about 100 tokens a parameter).
# A vocab_size of None takes the data's.
PRESETS = {
    "tiny": _preset(64, 4, 4, seq_len=128, batch_size=8, micro_batch_size=8, lr=4e-3, steps=2000,
                    vocab_size=None, eval_every=250, eval_tokens=131_072),
}  # fmt: skip


def rotations(seq_len, head_dim, theta=10_000.0):
    """e^(i angle) of RoPE's angles t * theta^(-2 i / head_dim): complex64, (T, head_dim / 2)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x, rotation):
    """RoPE: turns channel pair i at position t, read as one complex number, by its angle. x (B, T, H, d/H)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[: x.shape[1], None]).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """W_o softmax(rope(q) rope(k)^T / sqrt(d/H)) v, causal, with q, k, v = branches of Norm(x)."""

    def __init__(self, config):
        super().__init__()
        d, self.head_dim = config.d_model, config.head_dim
        self.qkv = PreNormLinear(d, {"q": d, "k": d, "v": d}, config.norm_scale, head_dim=self.head_dim)
        self.o = nn.Linear(d, d, bias=False)

    def forward(self, x, rotation):
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x))  # each (B, T, H, d/H)
        q, k = rotate(q, rotation), rotate(k, rotation)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.o(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: W_down (silu(gate) * up), with gate, up = branches of Norm(x)."""

    def __init__(self, config):
        super().__init__()
        d, d_ff = config.d_model, config.d_ff
        self.gate_up = PreNormLinear(d, {"gate": d_ff, "up": d_ff}, config.norm_scale)
        self.down = nn.Linear(d_ff, d, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.ffn = FeedForward(config)

    def forward(self, x, rotation):
        x = x + self.attention(x, rotation)
        return x + self.ffn(x)


class Transformer(nn.Module):
    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = PreNormLinear(config.d_model, {"head": config.vocab_size}, config.norm_scale)
        self.register_buffer("rotation", rotations(config.seq_len, config.head_dim), persistent=False)
        self.init_weights(seed)
    @torch.no_grad()
    def init_weights(self, seed):
        g = torch.Generator().manual_seed(seed)
        for n, p in self.named_parameters():
            if p.ndim==2:
                std = 0.02/math.sqrt(2*self.config.n_layer) if n.endswith(("o.weight","down.weight")) else 0.02
                p.normal_(0,std,generator=g)
    def forward(self, tokens):
        x = self.embedding(tokens)
        for b in self.blocks: x = b(x, self.rotation)
        return self.head(x)[0]
