"""A Llama-like transformer; its Norms, and the linear maps that they feed, come from norms.py.

    h = x + Attention(Norm(x)),    out = h + FFN(Norm(h)),    logits = LM head(Norm(out))

These Norms have no gamma: scale vectors belong to the Branches, the linear maps that read a Norm, since
W (gamma * Norm(x)) = (W diag(gamma)) Norm(x). Only Gemma's Norms on the outputs of attention and FFN have
their own. The modules below say which branches share a Norm; what a variant adds to each is in `Branch`.

RoPE, SwiGLU, no biases, untied embedding and head, full multi-head attention: the Llama of the paper's
section 3. Two options give the paper's other models: Gemma's extra norms, and a mixture of experts in
place of each FFN.
Shapes: B sequences, T positions, d width, H heads of d/H channels, V vocabulary, E experts, k per token.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from norms import Branch, NormScale, OutputNorm, normalize, scale_parameters, shared_vector

# ---------------------------------------------------------------------------------------------------
# The model


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
    gemma: bool = False  # Q/K-norm, and an Output-Norm on the outputs of attention and FFN
    n_expert: int = 0  # routed experts besides the shared one, of hidden width int(2 d/3); 0: a dense FFN
    top_k: int = 0  # routed experts that a token visits


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        d, variant = config.d_model, config.norm_scale
        self.attention = Attention(config)
        self.is_mixture = config.n_expert > 0
        if self.is_mixture:
            self.ffn = MixtureOfExperts(config)
        else:
            self.ffn = SwiGLU(d, config.d_ff, variant, shared_vector(d, variant))
        # Gemma normalises the outputs of both before adding them to the stream.
        self.attention_out = OutputNorm(d, variant) if config.gemma else nn.Identity()
        self.ffn_out = OutputNorm(d, variant) if config.gemma else nn.Identity()

    def forward(self, x, rotation):
        """x (B, T, d) -> the next x, and the balance loss of a mixture of experts (0 for a dense FFN)."""
        x = x + self.attention_out(self.attention(normalize(x), rotation))
        if self.is_mixture:
            y, balance_loss = self.ffn(normalize(x))
        else:
            y, balance_loss = self.ffn(normalize(x)), x.new_zeros(())
        return x + self.ffn_out(y), balance_loss


class Transformer(nn.Module):
    """Tokens (B, T) to logits (B, T, V), or to losses where the targets (B, T) are given.

    Weights are uninitialised until `init_weights`, so that a model can be counted on the meta device.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = Branch(config.d_model, config.vocab_size, config.norm_scale)
        self.register_buffer("rotation", rotations(config.seq_len, config.d_model // config.n_head).float())

    @torch.no_grad()
    def init_weights(self, seed):
        """Matrices ~ N(0, std^2): std 0.02, or 0.02 / sqrt(2 layers) where they write to the residual stream.

        Scale vectors start at 1 and use no random numbers: with the same seed every variant starts from the
        same matrices, drawn in the order of parameters(). (A variant with matrices of its own should draw
        them last.) Returns the model.
        """
        onto_the_stream = {m.o for m in self.modules() if isinstance(m, Attention)}
        onto_the_stream |= {m.down for m in self.modules() if isinstance(m, SwiGLU)}
        generator = torch.Generator().manual_seed(seed)
        scales = scale_parameters(self)
        for p in self.parameters():
            if p not in scales:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if p in onto_the_stream else 0.02
                p.normal_(std=std, generator=generator)
        return self

    def forward(self, tokens, targets=None):
        """Logits, or with targets (language loss in nats per token, balance loss: 0 for a dense model).

        Targets of -100 are ignored.
        """
        x = F.embedding(tokens, self.embedding)
        balance_losses = []
        for block in self.blocks:
            x, balance_loss = block(x, self.rotation)
            balance_losses.append(balance_loss)
        logits = self.head(normalize(x))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return loss, torch.stack(balance_losses).mean()

    @torch.no_grad()
    def generate(self, tokens, count, generator=None):
        """`count` tokens after `tokens` (1, T), sampled at temperature 1: (1, T + count)."""
        for _ in range(count):
            logits = self(tokens[:, -self.config.seq_len :])[:, -1]
            next_token = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)
            tokens = torch.cat([tokens, next_token.to(tokens.device)], dim=1)
        return tokens


# ---------------------------------------------------------------------------------------------------
# Attention


def rotations(seq_len, head_dim, theta=10_000.0):
    """The RoPE table, (2, T, 1, h): at position t, channel pair i is rotated by the angle t theta^(-2i/h).

    For the two channels of a pair, the first half of the table has (cos, cos), the second (-sin, sin).
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
    cos = torch.stack([angle.cos(), angle.cos()], dim=-1).flatten(1)
    sin = torch.stack([-angle.sin(), angle.sin()], dim=-1).flatten(1)
    return torch.stack([cos, sin])[:, :, None]


def rotate(x, rotation):
    """RoPE: rotates channels (a, b) = (2i, 2i+1) at position t by its i-th angle. x (B, T, H, h).

    (a, b) -> (a cos - b sin, b cos + a sin) = (a, b) * (cos, cos) + (b, a) * (-sin, sin)
    """
    T = x.shape[1]
    cos, sin = rotation[0, :T].to(x.dtype), rotation[1, :T].to(x.dtype)  # (T, 1, h) each
    pairs = x.unflatten(-1, (-1, 2))
    swapped = pairs.flip(-1).flatten(-2)
    return x * cos + swapped * sin


class Attention(nn.Module):
    """W_o softmax(rope(q) rope(k)^T / sqrt(d/H)) v, causal, where q, k, v are the branches of n = Norm(x)."""

    def __init__(self, config):
        super().__init__()
        d, variant = config.d_model, config.norm_scale
        self.head_dim = d // config.n_head
        shared = shared_vector(d, variant)
        self.o = nn.Parameter(torch.empty(d, d))
        self.q = Branch(d, d, variant, shared, self.head_dim, qk_norm=config.gemma)
        self.k = Branch(d, d, variant, shared, self.head_dim, qk_norm=config.gemma)
        self.v = Branch(d, d, variant, shared, self.head_dim)

    def forward(self, n, rotation):  # n (B, T, d)
        def split(y):  # (B, T, d) -> (B, T, H, d/H)
            return y.unflatten(-1, (-1, self.head_dim))

        q = rotate(split(self.q(n)), rotation).transpose(1, 2)  # (B, H, T, d/H)
        k = rotate(split(self.k(n)), rotation).transpose(1, 2)
        v = split(self.v(n)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(y.transpose(1, 2).flatten(-2), self.o)


# ---------------------------------------------------------------------------------------------------
# Feed-forward networks


class SwiGLU(nn.Module):
    """W_down (silu(gate) * up), where gate and up are branches of n = Norm(x): (..., d) -> (..., d)."""

    def __init__(self, d_model, d_ff, variant, shared):
        super().__init__()
        self.down = nn.Parameter(torch.empty(d_model, d_ff))
        self.gate = Branch(d_model, d_ff, variant, shared)
        self.up = Branch(d_model, d_ff, variant, shared)

    def forward(self, n):
        return F.linear(F.silu(self.gate(n)) * self.up(n), self.down)


class MixtureOfExperts(nn.Module):
    """One shared expert and, per token, k of E routed ones, each a SwiGLU on the same n = Norm(x):

        y = FFN_shared(n) + sum over the k largest p_i of p_i FFN_i(n),     p = softmax(W_router n)

    The p_i are used as they are, not renormalised over the k. No token is dropped. The balance loss (Switch)
    of a sequence is E sum_i f_i P_i, where f_i is the load of expert i (its share of the kT assignments) and
    P_i its mean probability; it is 1 when the load is uniform. It is averaged over sequences.
    Returns y (B, T, d) and the balance loss.
    """

    def __init__(self, config):
        super().__init__()
        d, variant = config.d_model, config.norm_scale
        self.n_expert, self.top_k = config.n_expert, config.top_k
        shared = shared_vector(d, variant)
        self.router = Branch(d, config.n_expert, variant, shared, output=False)
        self.shared_expert = SwiGLU(d, config.d_ff, variant, shared)
        experts = (SwiGLU(d, int(2 * d / 3), variant, shared) for _ in range(config.n_expert))
        self.experts = nn.ModuleList(experts)

    def forward(self, n):
        p = self.router(n).softmax(-1, dtype=torch.float32)  # (B, T, E)
        expert = p.topk(self.top_k, dim=-1).indices  # (B, T, k)
        visits = F.one_hot(expert, self.n_expert).sum(2)  # (B, T, E): 1 where the token goes to the expert
        load = visits.float().mean(1) / self.top_k  # (B, E)
        balance_loss = self.n_expert * (load * p.mean(1)).sum(-1).mean()

        y = self.shared_expert(n).flatten(0, 1)  # (B T, d)
        tokens = n.flatten(0, 1)  # (B T, d)
        p, visits = p.flatten(0, 1).to(y.dtype), visits.flatten(0, 1)  # (B T, E)
        for i, ffn in enumerate(self.experts):
            rows = visits[:, i].nonzero().squeeze(1)  # of the tokens that go to expert i
            # An expert that gets no tokens still runs, on zero rows: its gradients are zeros, not None.
            y = y.index_add(0, rows, p[rows, i, None] * ffn(tokens[rows]))  # y[rows] += p_i FFN_i
        return y.view_as(n), balance_loss


# ---------------------------------------------------------------------------------------------------
# A first reading can end here.
#
# Presets: the paper's tables of section 3, and sizes for a laptop
#
# A preset has sizes, and the settings that go with them. lr_muon and lr_wsd are the paper's learning rates
# for Muon and for the wsd schedule where it gives them; its steps amount to 100 tokens per (activated)
# parameter. A preset without vocab_size uses that of the data.


def sizes(d_model, n_head, n_layer, **others):
    return dict(d_model=d_model, n_head=n_head, n_layer=n_layer, **others)


LAPTOP = dict(seq_len=128, batch_size=8, eval_tokens=131_072)
TINY = dict(lr=4e-3, steps=2000, eval_every=250, **LAPTOP)
PAPER = dict(batch_size=512, tokens_at_once=32_768, vocab_size=50_304, eval_every=500, eval_tokens=4_194_304)
GEMMA = dict(gemma=True, **PAPER)
MIXTURE = dict(n_expert=32, top_k=4, **PAPER)
OTHER_RATES = dict(lr_muon=5e-3, lr_wsd=3e-3)
PRESETS = {
    # d_model, n_head, n_layer
    "tiny": sizes(64, 4, 4, **TINY),
    "gemma-tiny": sizes(64, 4, 4, gemma=True, **TINY),
    "moe-tiny": sizes(64, 4, 4, n_expert=8, top_k=2, **TINY),
    "small": sizes(128, 4, 4, lr=2e-3, steps=6000, eval_every=750, **LAPTOP),
    "llama-0.12b": sizes(768, 12, 6, seq_len=1024, steps=22_839, lr=4e-3, **OTHER_RATES, **PAPER),
    "llama-0.25b": sizes(1024, 16, 12, seq_len=1024, steps=48_450, lr=2e-3, **PAPER),
    "llama-0.5b": sizes(1280, 20, 18, seq_len=4096, steps=23_017, lr=2e-3, lr_muon=4e-3, **PAPER),
    "llama-0.75b": sizes(1536, 24, 21, seq_len=4096, steps=35_722, lr=2e-3, **PAPER),
    "llama-1b": sizes(1792, 28, 22, seq_len=4096, steps=49_022, lr=1e-3, **PAPER),
    "gemma-0.5b": sizes(1280, 20, 18, seq_len=4096, steps=23_019, lr=2e-3, lr_muon=4e-3, **GEMMA),
    "moe-0.25b": sizes(640, 10, 6, seq_len=1024, steps=21_674, lr=3e-3, **MIXTURE),
    "moe-0.5b": sizes(768, 12, 9, seq_len=1024, steps=35_032, lr=2e-3, lr_muon=4e-3, **MIXTURE),
    "moe-0.8b": sizes(960, 15, 10, seq_len=4096, steps=13_410, lr=2e-3, **MIXTURE),
    "moe-1b": sizes(1024, 16, 12, seq_len=4096, steps=16_927, lr=1e-3, **MIXTURE),
    "moe-2b": sizes(1280, 20, 15, seq_len=4096, steps=29_605, lr=6e-4, **MIXTURE),
}


def paper_d_ff(d_model):
    return int(8 * d_model / 3)


# ---------------------------------------------------------------------------------------------------
# Counts, and export


@dataclass(frozen=True)
class Counts:
    """Parameter counts (all, active for a token, in scale vectors), and training FLOPs per token."""

    parameters: int
    activated_parameters: int
    scale_parameters: int
    flops_per_token: int


def count(config):
    """The exact Counts of a model, from one built on the meta device: nothing is allocated.

    A token costs 6 FLOPs for each activated entry of every matrix except the embedding (2 forward, 4
    backward), plus 6 T d per layer for causal attention, half of the T x T square.
    """
    with torch.device("meta"):
        model = Transformer(config)
    idle = set()  # the experts beyond top_k, but not the vector that they may share with the router
    for ffn in (m for m in model.modules() if isinstance(m, MixtureOfExperts)):
        idle |= set(ffn.experts[ffn.top_k :].parameters()) - set(ffn.router.parameters())
    active = set(model.parameters()) - idle
    scales = scale_parameters(model)
    multiplied = sum(p.numel() for p in active - set(scales)) - model.embedding.numel()
    return Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        activated_parameters=sum(p.numel() for p in active),
        scale_parameters=sum(p.numel() for p in scales),
        flops_per_token=6 * multiplied + 6 * config.n_layer * config.seq_len * config.d_model,
    )


def llama_state_dict(model):
    """The weights of a folded dense model, with the names and layout of transformers' LlamaForCausalLM.

    Raises ValueError if the model still has a scale vector, experts, or Gemma's norms.
    """
    config = model.config
    if config.n_expert or config.gemma or scale_parameters(model):
        raise ValueError("a stock Llama is dense and has no scale vectors: fold(model) first, and no dnp")
    ones = torch.ones_like(model.embedding[0])

    def halves(W):  # their RoPE rotates channels (i, i + h/2) of a head, ours (2i, 2i + 1)
        return W.view(config.n_head, -1, 2, config.d_model).transpose(1, 2).reshape(W.shape)

    state = {"model.embed_tokens.weight": model.embedding, "lm_head.weight": model.head.W}
    state["model.norm.weight"] = ones
    for i, block in enumerate(model.blocks):
        attention, ffn = block.attention, block.ffn
        layer = {
            "self_attn.q_proj": halves(attention.q.W),
            "self_attn.k_proj": halves(attention.k.W),
            "self_attn.v_proj": attention.v.W,
            "self_attn.o_proj": attention.o,
            "mlp.gate_proj": ffn.gate.W,
            "mlp.up_proj": ffn.up.W,
            "mlp.down_proj": ffn.down,
            "input_layernorm": ones,
            "post_attention_layernorm": ones,
        }
        state |= {f"model.layers.{i}.{name}.weight": weight for name, weight in layer.items()}
    return {name: weight.detach().clone() for name, weight in state.items()}
