"""Scale vectors: the idea of "Negligible in Size, Significant in Effect" (arXiv 2605.26895) as code.

A Pre-Norm Transformer normalises the inputs of its linear maps (all but W_o and W_down) and multiplies
them by a *scale vector* gamma (the paper's section 2):

    Norm(x)           = sqrt(d) * x / ||x||          x in R^d; the result has RMS 1
    RMSNorm(x; gamma) = gamma * Norm(x)              gamma in R^d, 1 at the start

The design space (its Table 1). W_c is one of the linear *branches* c that one Norm feeds: {Q, K, V},
{gate, up} or {LM head}. gamma_b stands before it, on the input side; gamma_a after it, on the output side.

    none        W_c Norm(x)                                no scale vector anywhere
    standard    W_c (gamma * Norm(x))                      one gamma_b = gamma for all branches of the Norm
    hg          W_c (gamma_c * Norm(x))                    heterogeneous: one gamma_b = gamma_c per branch
    ap          gamma_a * (W_c Norm(x))                    after placement: output side only
    dp          gamma_a * (W_c (gamma_b * Norm(x)))        dual placement: both sides
    dnp         gamma_a * Norm(W_c (gamma_b * Norm(x)))    dual normalised: a Norm in between
    or          gamma = beta * Norm(alpha)                 any scale vector above, reparameterised
    er          gamma = exp(beta) * exp(alpha - mean(alpha))

All but dnp are one reparameterisation of the weight (equation 13), and are computed that way: the vectors
multiply the weight (d_out x d_in numbers), not the activations (tokens x d_in):

    W  ->  diag(gamma_a) W diag(gamma_b)  =  W * (gamma_a gamma_b^T)

Only dnp's gamma_a multiplies activations, those that its Norm has normalised: one head at a time for Q, K
and V, a branch's whole output for gate, up and LM head.
"""

import copy
import difflib
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6  # added to the mean square of activations; the paper gives no value


def normalize(x, eps=EPS):
    """Norm(x) = sqrt(d) x / ||x|| = x / sqrt(mean(x^2)) along the last axis, in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 rounds by up to 0.4 %
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


# ---------------------------------------------------------------------------------------------------
# Scale vectors


def gamma_or(beta, alpha):
    """beta * Norm(alpha): a magnitude and a direction (Theorem 3.2, which holds for the Norm without EPS)."""
    return beta * normalize(alpha, eps=0)


def gamma_er(beta, alpha):
    """exp(beta) * exp(alpha - mean(alpha)): the same by exponentials, each entry of gamma above 0."""
    return beta.exp() * (alpha - alpha.mean()).exp()


FORMS = {  # form -> (raw parameters at the start for a width d, where gamma = 1; gamma from them, in order)
    "direct": (lambda d: {"gamma": torch.ones(d)}, lambda gamma: gamma),
    "or": (lambda d: {"beta": torch.ones(1), "alpha": torch.ones(d)}, gamma_or),
    "er": (lambda d: {"beta": torch.zeros(1), "alpha": torch.zeros(d)}, gamma_er),
}


class ScaleVector(nn.Module):
    """gamma in R^dim, 1 at the start, in one of FORMS. Calling it returns gamma, of shape (dim,).

    role decides weight decay (section 2.2): "Input-Norm" if the vector is next to a linear map and can be
    folded into it, "Output-Norm" if it comes after a Norm of its own and sets the size of the output.
    """

    def __init__(self, dim, role, form):
        super().__init__()
        self.role = role
        raw_parameters, self.gamma_of = FORMS[form]
        for name, start in raw_parameters(dim).items():
            self.register_parameter(name, nn.Parameter(start))

    def forward(self):
        return self.gamma_of(*self.parameters())


# ---------------------------------------------------------------------------------------------------
# Variants


@dataclass(frozen=True)
class NormScale:
    """One point of the design space, in words. The defaults are `standard`."""

    parts: tuple = ("standard",)  # its names in the GRAMMAR
    input_side: bool = True  # is there a gamma_b?
    per_branch: bool = False  # hg: a gamma_b for each branch of a Norm, not one for all
    output_side: bool = False  # is there a gamma_a? It is always one per branch
    norm_between: bool = False  # dnp: a Norm between W and gamma_a
    form: str = "direct"  # a key of FORMS
    decayed: tuple = ("Input-Norm", "Output-Norm")  # roles of the vectors that decay

    @property
    def label(self):
        return "unified" if self.parts == SHORT["unified"] else "+".join(self.parts)

    @property
    def equation(self):
        """A branch of this variant, as Table 1 writes it."""
        y = "W (gamma_b * Norm(x))" if self.input_side else "W Norm(x)"
        if self.output_side:
            y = f"gamma_a * Norm({y})" if self.norm_between else f"gamma_a * ({y})"
        return y

    @classmethod
    def parse(cls, text):
        """The variant that a string such as "hg+dp+or" names. Raises ValueError with a hint in one line."""
        names = text.strip().lower().split("+")
        if names == ["none"]:
            return cls(parts=("none",), input_side=False)
        chosen, fields = {}, {}  # row of the grammar -> the part chosen from it; fields that the parts set
        for name in names:
            for part in SHORT.get(name, [name]):
                row = row_of(part, text)
                if row in chosen:
                    raise mistake(f"{text!r} has {chosen[row]!r} and {part!r}: choose one for {row}")
                chosen[row] = part
                fields |= GRAMMAR[row][part]
        parts = [chosen[row] for row in GRAMMAR if row in chosen]
        if parts == [] or list(chosen) == ["weight decay"]:
            parts.insert(0, "standard")
        return cls(parts=tuple(parts), **fields)


GRAMMAR = {  # row -> {part: the fields of NormScale that it sets}; a variant has at most one part of a row
    "branches": {"hg": {"per_branch": True}},
    "placement": {
        "ap": {"input_side": False, "output_side": True},
        "dp": {"output_side": True},
        "dnp": {"output_side": True, "norm_between": True},
    },
    "parameters": {"or": {"form": "or"}, "er": {"form": "er"}},
    "weight decay": {
        "iwd": {"decayed": ("Input-Norm",)},
        "owd": {"decayed": ("Output-Norm",)},
        "nowd": {"decayed": ()},
    },
}
SHORT = {"standard": (), "unified": ("hg", "dnp", "or", "iwd")}  # one name for no part, or for several


def row_of(part, text):
    """The row of the grammar that has this part of a text."""
    for row in GRAMMAR:
        if part in GRAMMAR[row]:
            return row
    if part == "none":
        raise mistake(f"'none' stands alone, not as a part of {text!r}")
    known = [*SHORT, "none", *itertools.chain(*GRAMMAR.values())]
    nearest = difflib.get_close_matches(part, known, n=1, cutoff=0)[0]
    raise mistake(f"unknown part {part!r} in {text!r} (did you mean {nearest!r}?)")


def mistake(what):
    rows = ", ".join("|".join(parts) for parts in GRAMMAR.values())
    grammar = f"none, standard, unified, or parts joined by +, one of each: {rows}"
    return ValueError(f"{what}; the grammar: {grammar}")


# ---------------------------------------------------------------------------------------------------
# Branches: the linear maps that a Norm feeds


def matrix(d_out, d_in, std=0.02):
    """An uninitialised weight (d_out, d_in), for Transformer.init_weights to draw from N(0, std^2)."""
    W = nn.Parameter(torch.empty(d_out, d_in))
    W.std_at_start = std
    return W


class Branch(nn.Module):
    """A linear map W of n = Norm(x), with what the variant puts around it: n (..., d_in) -> (..., d_out)

        gamma_a * (W (gamma_b * n))        without the vectors that the variant does not have
        gamma_a * Norm(W (gamma_b * n))    dnp: `norm` holds this gamma_a

    gamma_b: see branches_of_a_norm. head_dim: entries of dnp's Norm. output_side=False: never a gamma_a.
    """

    def __init__(self, d_in, d_out, variant, gamma_b, head_dim=None, output_side=True, std=0.02):
        super().__init__()
        self.W = matrix(d_out, d_in, std)
        self.gamma_b, self.gamma_a, self.norm = gamma_b, None, nn.Identity()
        if output_side and variant.norm_between:
            self.norm = OutputNorm(d_out, variant, head_dim)
        elif output_side and variant.output_side:
            self.gamma_a = ScaleVector(d_out, "Input-Norm", variant.form)  # next to W, so it can be folded

    def effective_weight(self):
        """W * (gamma_a gamma_b^T), equation 13, with 1 for a vector that is not there."""
        W = self.W
        if self.gamma_b is not None:
            W = W * self.gamma_b()
        if self.gamma_a is not None:
            W = self.gamma_a()[:, None] * W
        return W

    def forward(self, n):
        dtype = self.W.dtype  # Norms give float32 or wider
        return self.norm(F.linear(n.to(dtype), self.effective_weight().to(dtype)))


def branches_of_a_norm(d_in, variant):
    """A maker of the branches of one Norm: branch(d_out, ...). They share one gamma_b, except in hg."""

    def new_vector():
        return ScaleVector(d_in, "Input-Norm", variant.form) if variant.input_side else None

    shared = new_vector()

    def branch(d_out, **options):
        gamma_b = new_vector() if variant.per_branch else shared
        return Branch(d_in, d_out, variant, gamma_b, **options)

    return branch


class OutputNorm(nn.Module):
    """gamma_a * Norm(y), the Norm over head_dim entries at a time, or over all: (..., dim) -> (..., dim).

    It ends a branch in dnp, and Gemma's Q, K, attention and FFN. In `none` it has no gamma_a.
    """

    def __init__(self, dim, variant, head_dim=None):
        super().__init__()
        self.head_dim = head_dim or dim
        is_none = not (variant.input_side or variant.output_side)
        self.gamma_a = None if is_none else ScaleVector(dim, "Output-Norm", variant.form)

    def forward(self, y):
        normalized = normalize(y.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        if self.gamma_a is not None:
            normalized = self.gamma_a() * normalized
        return normalized.to(y.dtype)


@torch.no_grad()
def fold(model):
    """A copy with gamma_a and gamma_b multiplied into each W (equation 13): the same function of the tokens.

    Vectors after a Norm (role "Output-Norm") stay: they are part of the function.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Branch):
            module.W.copy_(module.effective_weight())
            module.gamma_a = module.gamma_b = None
    return model


def scale_parameters(model):
    """{raw parameter: the role of its scale vector}, for all scale vectors of a model."""
    roles = {}
    for module in model.modules():
        if isinstance(module, ScaleVector):
            roles |= dict.fromkeys(module.parameters(), module.role)
    return roles


def decay_groups(model, variant, weight_decay):
    """The optimiser's param_groups [{"name", "params", "weight_decay"}, ...]: matrices, and vectors by role.

    Decay acts on raw parameters: under or, that of beta pulls gamma to 0 and that of alpha changes nothing in
    it; under er, both pull it to 1.
    """
    role_of = scale_parameters(model)
    groups = []
    for role in ("matrices", "Input-Norm", "Output-Norm"):
        params = [p for p in model.parameters() if role_of.get(p, "matrices") == role]
        name = role if role == "matrices" else f"{role} scale vectors"
        decays = role in ("matrices", *variant.decayed)
        if params:
            groups.append({"name": name, "params": params, "weight_decay": weight_decay if decays else 0.0})
    return groups


# ---------------------------------------------------------------------------------------------------
# A first reading can end here.
#
# The theory (sections 2 and 3), on these same classes. With x ~ N(0, I) the inputs Norm(x) have covariance I,
# and the loss of a branch with effective weight A against a teacher W* is L = 1/2 ||A - W*||_F^2. Under its
# gradient flow a vector gamma = Phi(raw) moves by dgamma/dt = -P dL/dgamma, P = J J^T, J = dPhi/draw (3.4):
#
#     direct   P = I
#     or       P = q q^T + (beta^2 d / ||alpha||^2) (I - q q^T / d),   q = Norm(alpha)      (Theorem 3.2)
#     er       P = diag(gamma)^2 + (1 - 1/d) gamma gamma^T   (not in the paper; equal to OR's at the start)


def student(norm_scale, teacher):
    """A Branch in the theorems' initial state: W = 0, scale vectors 1, float64. teacher (d_out, d_in)."""
    d_out, d_in = teacher.shape
    branch = branches_of_a_norm(d_in, NormScale.parse(norm_scale))(d_out).double()
    nn.init.zeros_(branch.W)
    return branch


def population_loss(branch, teacher):
    """1/2 ||A - W*||_F^2, with A the effective weight; teacher (d_out, d_in). ValueError for dnp."""
    if isinstance(branch.norm, OutputNorm):
        raise ValueError("with a Norm after it, a branch is no linear map and has no effective weight")
    return (branch.effective_weight() - teacher).square().sum() / 2


def gradient_flow(module, loss, t_end, steps, noise=0.0, seed=0):
    """dp/dt = -dL/dp for all parameters p of the module, by the classical 4th-order Runge-Kutta method.

    loss(module) is a scalar. A generator: it yields t = 0, dt, ..., t_end with the module in its state at t.
    With noise, dp = -dL/dp dt + sqrt(noise) dB: half of it before and half after the drift, of weak order 2.
    """
    parameters, dt = list(module.parameters()), t_end / steps
    generator = torch.Generator().manual_seed(seed)

    def velocity(p):
        nn.utils.vector_to_parameters(p, parameters)
        return -torch.cat([g.flatten() for g in torch.autograd.grad(loss(module), parameters)])

    def half_of_the_noise(p):
        return (noise * dt / 2) ** 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)

    p = nn.utils.parameters_to_vector(parameters).detach()
    yield 0.0
    for step in range(1, steps + 1):
        p = p + half_of_the_noise(p)
        k1 = velocity(p)
        k2 = velocity(p + dt / 2 * k1)
        k3 = velocity(p + dt / 2 * k2)
        k4 = velocity(p + dt * k3)
        p = p + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4) + half_of_the_noise(p)
        nn.utils.vector_to_parameters(p, parameters)
        yield step * dt
