"""A Llama-like transformer; its Norms, and the linear maps that they feed, come from norms.py.

    h = x + Attention(Norm(x)),    out = h + FFN(Norm(h)),    logits = LM head(Norm(out))

These Norms have no gamma: scale vectors belong to the Branches, the linear maps that read a Norm, since
W (gamma * Norm(x)) = (W diag(gamma)) Norm(x). The modules below say which branches share a Norm; what a
variant adds to each is in `Branch`.

RoPE, SwiGLU, no biases, untied embedding and head, full multi-head attention: the Llama of the paper's
section 3. Two options give its other models: Gemma's Norms (with a gamma_a of their own) on Q and K and on
the outputs of attention and FFN, and a mixture of experts in place of each FFN.
Shapes: B sequences, T positions, d width, H heads of h = d/H channels, V vocabulary, E experts, k per token.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from norms import NormScale, OutputNorm, branches_of_a_norm, matrix, normalize, scale_parameters

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

    @property
    def residual_std(self):
        """std of the first values of W_o and W_down, of which 2 n_layer add up in the residual stream."""
        return 0.02 / math.sqrt(2 * self.n_layer)


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each added to the residual stream x (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        d, variant = config.d_model, config.norm_scale
        self.attention = Attention(config)
        if config.n_expert:
            self.ffn = MixtureOfExperts(config)
        else:
            self.ffn = SwiGLU(d, config.d_ff, branches_of_a_norm(d, variant), config.residual_std)
        self.attention_out = OutputNorm(d, variant) if config.gemma else nn.Identity()
        self.ffn_out = OutputNorm(d, variant) if config.gemma else nn.Identity()

    def forward(self, x, rotation):
        x = x + self.attention_out(self.attention(normalize(x), rotation))
        return x + self.ffn_out(self.ffn(normalize(x)))


class Transformer(nn.Module):
    """Tokens (B, T) to logits (B, T, V), or with targets to the loss. Uninitialised before `init_weights`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = matrix(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = branches_of_a_norm(config.d_model, config.norm_scale)(config.vocab_size)
        rotation = rotations(config.seq_len, config.d_model // config.n_head).float()
        self.register_buffer("rotation", rotation, persistent=False)
        vectors, parameters = scale_parameters(self), self.named_parameters()
        self.std_at_start = {name: W.std_at_start for name, W in parameters if W not in vectors}

    @torch.no_grad()
    def init_weights(self, seed):
        """Draws each matrix from N(0, std^2), with the std that it was made with. Returns the model.

        The random numbers come from the seed and the matrix's name alone, and scale vectors start at 1: with
        one seed all variants start from the same matrices, even one that has others besides.
        """
        for name, std in self.std_at_start.items():
            address = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(address[:8], "little"))
            self.get_parameter(name).normal_(std=std, generator=generator)
        return self

    def forward(self, tokens, targets=None):
        """Logits, or with targets the language loss: mean of -log p(target), in nats per token."""
        x = F.embedding(tokens, self.embedding)  # (B, T, d)
        for block in self.blocks:
            x = block(x, self.rotation)
        logits = self.head(normalize(x))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def balance_loss(self):
        """Of the last forward pass, mean over layers; 0 for a dense model."""
        return sum(block.ffn.balance_loss for block in self.blocks) / self.config.n_layer

    @torch.no_grad()
    def generate(self, tokens, count, generator=None):
        """`count` tokens after `tokens` (1, T), sampled at temperature 1: (1, T + count)."""
        if tokens.shape[1] == 0:
            raise ValueError("generate needs a prompt of at least one token")
        for _ in range(count):
            logits = self(tokens[:, -self.config.seq_len :])[:, -1]
            next_token = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)
            tokens = torch.cat([tokens, next_token.to(tokens.device)], dim=1)
        return tokens


# ---------------------------------------------------------------------------------------------------
# Attention


def rotations(seq_len, head_dim, theta=10_000.0):
    """The table of RoPE, (2, T, h): cos, and sin with its signs, of the angles t theta^(-2i/h).

    Channels i and i + h/2 are a pair, i = 0 ... h/2 - 1: each angle stands in two columns.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)  # (T, h/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def rotate(x, rotation):
    """RoPE: rotates each channel pair (a, b) at position t by its angle. x (B, H, T, h).

    (a, b) -> (a cos - b sin, b cos + a sin) = (a, b) * (cos, cos) + (b, a) * (-sin, sin)
    """
    cos, sin = rotation[:, : x.shape[-2]].to(x.dtype)  # (T, h) each
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    """W_o softmax(rope(q) rope(k)^T / sqrt(h)) v, causal, where q, k, v are the branches of n = Norm(x)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        d, variant, head_dim = config.d_model, config.norm_scale, config.d_model // config.n_head
        branch = branches_of_a_norm(d, variant)
        self.q = branch(d, head_dim=head_dim)
        self.k = branch(d, head_dim=head_dim)
        self.v = branch(d, head_dim=head_dim)
        self.o = matrix(d, d, std=config.residual_std)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.gemma and not variant.norm_between:  # dnp has this Norm already, in the branches
            self.q_norm, self.k_norm = OutputNorm(head_dim, variant), OutputNorm(head_dim, variant)

    def forward(self, n, rotation):
        """n (B, T, d) -> (B, T, d)."""

        def heads(y):  # (B, T, d) -> (B, H, T, h)
            return y.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

        q = rotate(self.q_norm(heads(self.q(n))), rotation)
        k = rotate(self.k_norm(heads(self.k(n))), rotation)
        y = F.scaled_dot_product_attention(q, k, heads(self.v(n)), is_causal=True)  # (B, H, T, h)
        return F.linear(y.transpose(1, 2).flatten(-2), self.o)


# ---------------------------------------------------------------------------------------------------
# Feed-forward networks


class SwiGLU(nn.Module):
    """W_down (silu(gate) * up), where gate and up are branches of n = Norm(x): (..., d) -> (..., d)."""

    balance_loss = 0.0  # only a mixture has one

    def __init__(self, d_model, d_ff, branch, residual_std):
        super().__init__()
        self.gate = branch(d_ff)
        self.up = branch(d_ff)
        self.down = matrix(d_model, d_ff, std=residual_std)

    def forward(self, n):
        return F.linear(F.silu(self.gate(n)) * self.up(n), self.down)


class MixtureOfExperts(nn.Module):
    """One shared expert and, per token, k of E routed ones, each a SwiGLU on the same n = Norm(x):

        y = FFN_shared(n) + sum over the k largest p_i of p_i FFN_i(n),     p = softmax(W_router n)

    The p_i are used as they are, not renormalised over the k. No token is dropped. A forward pass leaves
    its balance loss (Switch): of a sequence E sum_i f_i P_i, where f_i is the load of expert i (its share of
    the kT assignments) and P_i its mean probability, 1 when the load is uniform; averaged over sequences.
    """

    def __init__(self, config):
        super().__init__()
        self.n_expert, self.top_k, d = config.n_expert, config.top_k, config.d_model
        branch, std = branches_of_a_norm(d, config.norm_scale), config.residual_std
        self.router = branch(config.n_expert, output_side=False)
        self.shared_expert = SwiGLU(d, config.d_ff, branch, std)
        self.experts = nn.ModuleList(SwiGLU(d, int(2 * d / 3), branch, std) for _ in range(config.n_expert))
        self.balance_loss = 0.0

    def __getstate__(self):
        """A copy has no last forward pass: its loss still has a graph, which cannot be copied."""
        return self.__dict__ | {"balance_loss": 0.0}

    def forward(self, n):
        """n (B, T, d) -> (B, T, d)."""
        p = self.router(n).softmax(-1, dtype=torch.float32)  # (B, T, E)
        expert = p.topk(self.top_k, dim=-1).indices  # (B, T, k)
        visits = F.one_hot(expert, self.n_expert).sum(2)  # (B, T, E): 1 where the token goes to the expert
        load = visits.float().mean(1) / self.top_k  # (B, E)
        self.balance_loss = self.n_expert * (load * p.mean(1)).sum(-1).mean()

        y = self.shared_expert(n).flatten(0, 1)  # (B T, d)
        tokens = n.flatten(0, 1)  # (B T, d)
        p, visits = p.flatten(0, 1).to(y.dtype), visits.flatten(0, 1)  # (B T, E)
        for i, ffn in enumerate(self.experts):
            rows = visits[:, i].nonzero().squeeze(1)  # of the tokens that go to expert i
            # An expert that gets no tokens still runs, on zero rows: its gradients are zeros, not None.
            y = y.index_add(0, rows, p[rows, i, None] * ffn(tokens[rows]))  # y[rows] += p_i FFN_i
        return y.view_as(n)


# ---------------------------------------------------------------------------------------------------
# A first reading can end here.
#
# Presets: sizes, and the settings that go with them; the paper's tables of section 3, and for a laptop.
# lr_muon and lr_wsd are its learning rates for Muon and wsd where it gives them; its steps amount to 100
# tokens per (activated) parameter. A preset without vocab_size uses that of the data.


def sizes(d_model, n_head, n_layer, **others):
    return dict(d_model=d_model, n_head=n_head, n_layer=n_layer, **others)


LAPTOP = dict(seq_len=128, batch_size=8, eval_tokens=131_072)
TINY = dict(lr=4e-3, steps=2000, eval_every=250, **LAPTOP)
PAPER = dict(batch_size=512, tokens_at_once=32_768, vocab_size=50_304, eval_every=100, eval_tokens=4_194_304)
GEMMA = dict(gemma=True, **PAPER)
MIXTURE = dict(n_expert=32, top_k=4, **PAPER)
OTHER_RATES = dict(lr_muon=5e-3, lr_wsd=3e-3)
PRESETS = {  # d_model, n_head, n_layer, and the settings
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


def count(config):
    """Exact numbers of parameters: all, active for a token, in scale vectors. Nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(config)
    idle = set()  # the experts beyond top_k, but not the vector that they may share with the router
    for ffn in model.modules():
        if isinstance(ffn, MixtureOfExperts):
            idle |= set(ffn.experts[ffn.top_k :].parameters()) - set(ffn.router.parameters())
    everything = sum(p.numel() for p in model.parameters())
    return {
        "parameters": everything,
        "activated_parameters": everything - sum(p.numel() for p in idle),
        "scale_parameters": sum(p.numel() for p in scale_parameters(model)),
    }


def llama_state_dict(model):
    """The weights of a folded dense model, with the names of transformers' LlamaForCausalLM.

    Raises ValueError if the model still has a scale vector, experts, or Gemma's norms.
    """
    config = model.config
    if config.n_expert or config.gemma or scale_parameters(model):
        raise ValueError("a stock Llama is dense and has no scale vectors: fold(model) first, and no dnp")
    ones = torch.ones_like(model.embedding[0])
    state = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": ones}
    state["lm_head.weight"] = model.head.W
    for i, block in enumerate(model.blocks):
        attention, ffn = block.attention, block.ffn
        layer = {
            "self_attn.q_proj": attention.q.W,
            "self_attn.k_proj": attention.k.W,
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
