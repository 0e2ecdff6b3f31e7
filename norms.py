"""Scale vectors: the idea of "Negligible in Size, Significant in Effect" (arXiv 2605.26895) as code.

A Pre-Norm Transformer normalises the inputs of its linear maps (all but W_o and W_down) and multiplies
them by a *scale vector* gamma (the paper's section 2):

    Norm(x)           = sqrt(d) * x / ||x||          x in R^d; the result has RMS 1
    RMSNorm(x; gamma) = gamma * Norm(x)              gamma in R^d, 1 at the start

The design space (its Table 1). W_c is one of the linear branches c that one Norm feeds: {Q, K, V},
{gate, up} or {LM head}; gamma_b (in the code v) is on its input side, gamma_a (u) on its output side.

    none        W_c Norm(x)                                no scale vector anywhere
    standard    W_c (gamma * Norm(x))                      one gamma for all branches of the Norm
    hg          W_c (gamma_c * Norm(x))                    heterogeneous: one gamma per branch
    ap          gamma_a * (W_c Norm(x))                    after placement: output side only
    dp          gamma_a * (W_c (gamma_b * Norm(x)))        dual placement: both sides
    dnp         gamma_a * Norm(W_c (gamma_b * Norm(x)))    dual normalised: a Norm in between
    or          gamma = beta * Norm(alpha)                 any scale vector above, reparameterised
    er          gamma = exp(beta) * exp(alpha - mean(alpha))

All but dnp are one reparameterisation of the weight (equation 13), with v on its input side and u on
its output side:

    W  ->  diag(u) W diag(v) = W * (u v^T)

and it is computed that way here: the vectors multiply the weight (d_out x d_in numbers per step), not the
activations (tokens x d_in). Only the u of dnp multiplies activations: the output of its Norm. That Norm acts
on one head at a time for Q, K and V, and on a branch's whole output elsewhere (LM head: all logits).

Read first `norm_formula`, `NormScale`, `ScaleVector` and `Branch` here, then `Block` in model.py.
"""

import copy
import difflib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6  # added to the mean square of activations; the paper gives no value

# ---------------------------------------------------------------------------------------------------
# Norm


def norm_formula(x, u=None):
    """y = u * n with n = r x and r = 1 / rms(x), along the last axis: (y in the dtype of x, n, r).

    Its derivative is in the class Norm below: change the two together.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 rounds by up to 0.4 %
    r = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    n = r * wide
    y = n if u is None else u * n
    return y.to(x.dtype), n, r


def normalize(x, u=None):
    """Norm(x) = sqrt(d) x / ||x|| along the last axis, or u * Norm(x); EPS is added to mean(x^2).

    This is norm_formula; the class Norm below adds its derivative in closed form, for speed only.
    """
    # torch.compile differentiates and fuses the formula itself; torch 2.11 miscompiles our derivative.
    if torch.compiler.is_compiling():
        return norm_formula(x, u)[0]
    return Norm.apply(x, u)


# ---------------------------------------------------------------------------------------------------
# Variants


@dataclass(frozen=True)
class NormScale:
    """One point of the design space. The defaults are `standard`: one v for all branches of a Norm."""

    parts: tuple = ("standard",)  # its names in the grammar
    has_vectors: bool = True  # False only for `none`, where even Gemma's Norms have no u
    has_v: bool = True  # gamma_b, between the Norm and W
    v_per_branch: bool = False  # hg: one gamma_b per branch, rather than one per Norm
    has_u: bool = False  # gamma_a, after W, always one per branch
    norm_after: bool = False  # dnp: a Norm between W and gamma_a
    form: str = "direct"  # a key of FORMS
    decayed: tuple = ("Input-Norm", "Output-Norm")  # roles whose vectors decay

    @classmethod
    def parse(cls, text):
        """The variant that a string such as "hg+dp+or" names. Raises ValueError with a one-line hint."""
        return cls(**parse_parts(text))

    @property
    def label(self):
        """The variant's canonical name."""
        return "unified" if self.parts == SHORT["unified"] else "+".join(self.parts)

    def describe(self):
        """The variant in words, a line for each part."""
        return [f"{part}: {WORDS[part]}" for part in self.parts]


# ---------------------------------------------------------------------------------------------------
# Scale vectors

FORMS = {  # parameterisation of a scale vector -> (its initial raw parameters, gamma from them, by name)
    "direct": (lambda d: {"gamma": torch.ones(d)}, lambda gamma: gamma),
    # No epsilon in OR: the conservation laws of Theorem 3.2 hold only for the exact Norm.
    "or": (
        lambda d: {"beta": torch.ones(1), "alpha": torch.ones(d)},
        lambda beta, alpha: beta * len(alpha) ** 0.5 / alpha.norm() * alpha,
    ),
    "er": (
        lambda d: {"beta": torch.zeros(1), "alpha": torch.zeros(d)},
        lambda beta, alpha: beta.exp() * (alpha - alpha.mean()).exp(),
    ),
}


class ScaleVector(nn.Module):
    """gamma in R^dim, initialised to 1, in one of FORMS. Calling it returns gamma, of shape (dim,).

    role is the paper's (section 2.2) and determines weight decay: "Input-Norm" if the vector is directly
    next to a linear map and can be folded into it, "Output-Norm" if it comes after a Norm and sets the
    scale of the output.
    """

    def __init__(self, dim, role, form):
        super().__init__()
        self.role = role
        at_the_start, self.gamma_of = FORMS[form]
        for name, value in at_the_start(dim).items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self):
        return self.gamma_of(**dict(self.named_parameters()))


# ---------------------------------------------------------------------------------------------------
# Branches: the linear maps that a Norm feeds


class Branch(nn.Module):
    """A linear map W (d_out x d_in) applied to n = Norm(x), with what the variant adds around it:

        y = (W * (u v^T)) n            none, standard, hg, ap, dp: u and v where present
        y = u * Norm(W diag(v) n)      dnp: `norm` is that Norm with its u, over head_dim entries at a time

    In `standard`, as in every Llama, v is the vector shared by the branches of a Norm, and u and norm are
    None: y = W (v * n). Gemma has a Norm after Q and K in every variant, y = u' * Norm((W * (u v^T)) n).

    shared: the v that all branches of a Norm share (see `shared_vector`). output=False: nothing on the
    output side in any variant. qk_norm: Gemma's Norm, over head_dim entries, with one u' for all heads;
    DNP already has that Norm.
    n (..., d_in) -> y (..., d_out). W is uninitialised.
    """

    def __init__(self, d_in, d_out, variant, shared=None, head_dim=None, output=True, qk_norm=False):
        super().__init__()
        self.W = nn.Parameter(torch.empty(d_out, d_in))
        self.v = self.u = self.norm = None
        if variant.has_v:  # standard, hg, dp, dnp
            self.v = shared or ScaleVector(d_in, "Input-Norm", variant.form)
        if output and variant.norm_after:  # dnp: its u is in the OutputNorm
            self.norm = OutputNorm(d_out, variant, head_dim)
        elif output and variant.has_u:  # ap, dp
            self.u = ScaleVector(d_out, "Input-Norm", variant.form)
        if qk_norm and self.norm is None:  # Gemma
            self.norm = OutputNorm(head_dim, variant)

    def effective_weight(self):
        """W * (u v^T), equation 13. A u after a Norm is not part of it."""
        W = self.W
        if self.v is not None:
            W = W * self.v()
        if self.u is not None:
            W = W * self.u()[:, None]
        return W

    def forward(self, n):
        y = F.linear(n, self.effective_weight())
        return y if self.norm is None else self.norm(y)


def shared_vector(d_in, variant):
    """The v that all branches of one Norm share, or None where each has its own (hg) or none has one."""
    if variant.has_v and not variant.v_per_branch:
        return ScaleVector(d_in, "Input-Norm", variant.form)
    return None


class OutputNorm(nn.Module):
    """u * Norm(y), with no linear map after it; without u if the variant has no scale vectors.

    The Norm is over `width` entries of y at a time, such as one head, and by default over all of them.
    u has as many entries as y (dim; DNP), or as each group of `width` (dim = width; Gemma's Q/K-norm,
    one u for all heads).
    """

    def __init__(self, dim, variant, width=None):
        super().__init__()
        self.width = width or dim
        self.u = ScaleVector(dim, "Output-Norm", variant.form) if variant.has_vectors else None

    def forward(self, y):
        groups = y.unflatten(-1, (-1, self.width))  # (..., groups, width): for instance heads
        u = None if self.u is None else self.u().unflatten(0, (-1, self.width))  # one row: for all groups
        return normalize(groups, u).flatten(-2)


@torch.no_grad()
def fold(model):
    """A copy that computes the same function, with every u and v multiplied into its W (equation 13).

    Vectors after a Norm (role "Output-Norm") stay: they are part of the function.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Branch):
            module.W.copy_(module.effective_weight())
            module.u = module.v = None
    return model


def scale_parameters(model):
    """{raw parameter: the role of its scale vector}, for all scale vectors of a model."""
    vectors = [module for module in model.modules() if isinstance(module, ScaleVector)]
    return {p: vector.role for vector in vectors for p in vector.parameters()}


def decay_groups(model, variant, weight_decay):
    """The optimiser's param_groups [{"name", "params", "weight_decay"}, ...], each parameter in exactly one.

    Matrices decay; scale vectors decay where `variant.decayed` names their role (section 2.2). Decay acts on
    the raw parameters: under OR, that of beta pulls gamma to 0, that of alpha changes nothing in it; under
    ER, both pull it to 1.
    """
    role_of = scale_parameters(model)
    groups = []
    for role in (None, "Input-Norm", "Output-Norm"):  # None: in no scale vector
        params = [p for p in model.parameters() if role_of.get(p) == role]
        name = f"{role} scale vectors" if role else "matrices"
        decays = role is None or role in variant.decayed
        if params:
            groups.append({"name": name, "params": params, "weight_decay": weight_decay if decays else 0.0})
    return groups


# ---------------------------------------------------------------------------------------------------
# A first reading can end here.
#
# The derivative of Norm, by hand


class Norm(torch.autograd.Function):
    """norm_formula with its derivative in closed form, in half the time. With g = dL/dy

        dL/dx = r (I - n n^T / d) (u * g),      dL/du = sum of g * n over all x that share u

    The projection removes the component along x, since rescaling x changes nothing (apart from EPS); it is
    the projection of Theorem 3.2.
    """

    @staticmethod
    def forward(ctx, x, u):
        y, n, r = norm_formula(x, u)
        ctx.save_for_backward(n.to(x.dtype), r, u)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        n, r, u = ctx.saved_tensors
        gn = g * n
        dn, dn_n, du = g, gn, None  # dL/dn; its product with n; dL/du
        if u is not None:
            dn, dn_n, du = u * g, u * gn, gn.to(u.dtype).sum_to_size(u.shape)
        along = dn_n.mean(-1, keepdim=True, dtype=r.dtype)  # n^T dn / d
        dx = torch.addcmul(dn, n, along, value=-1).mul_(r)  # r (dn - n * along)
        return dx.to(n.dtype), du


# ---------------------------------------------------------------------------------------------------
# Parsing a variant from a string

GRAMMAR = {  # row of the grammar -> {part: (the fields of NormScale that it sets, a description)}
    "branches": {
        "hg": ({"v_per_branch": True}, "heterogeneous: one gamma_b per branch"),
    },
    "placement": {
        "ap": ({"has_v": False, "has_u": True}, "after placement: gamma_a * (W Norm(x)), with hg or without"),
        "dp": ({"has_u": True}, "dual placement: gamma_a * (W (gamma_b * Norm(x)))"),
        "dnp": (
            {"has_u": True, "norm_after": True},
            "dual normalised: gamma_a * Norm(W (gamma_b * Norm(x)))",
        ),
    },
    "parameters": {
        "or": ({"form": "or"}, "gamma = beta * Norm(alpha)"),
        "er": ({"form": "er"}, "gamma = exp(beta) * exp(alpha - mean(alpha))"),
    },
    "weight decay": {
        "iwd": ({"decayed": ("Input-Norm",)}, "weight decay on Input-Norm scale vectors only"),
        "owd": ({"decayed": ("Output-Norm",)}, "weight decay on Output-Norm scale vectors only"),
        "nowd": ({"decayed": ()}, "no weight decay on scale vectors"),
    },
}
WORDS = {part: words for parts in GRAMMAR.values() for part, (_, words) in parts.items()}
WORDS["none"] = "W Norm(x), no scale vector anywhere"
WORDS["standard"] = "W (gamma * Norm(x)), one gamma for all branches of a Norm"
SHORT = {"standard": (), "unified": ("hg", "dnp", "or", "iwd")}  # shorthands for several parts, or no part
GRAMMAR_IN_WORDS = "the grammar: none, standard, unified, or parts joined by +, at most one of each: "
GRAMMAR_IN_WORDS += ", ".join("|".join(parts) for parts in GRAMMAR.values())


def parse_parts(text):
    """The fields of the NormScale that a string names: see NormScale.parse."""

    def mistake(what):
        return ValueError(f"{what} {GRAMMAR_IN_WORDS}")

    words = text.strip().lower().split("+")
    if words == ["none"]:
        return {"parts": ("none",), "has_vectors": False, "has_v": False}
    chosen = {}  # row of the grammar -> part
    fields = {}
    for part in [part for word in words for part in SHORT.get(word, [word])]:
        row = next((row for row, parts in GRAMMAR.items() if part in parts), None)
        if part == "none":
            raise mistake(f"'none' stands alone, not as a part of {text!r};")
        if row is None:
            meant = difflib.get_close_matches(part, [*WORDS, *SHORT], n=1, cutoff=0)[0]
            raise mistake(f"unknown part {part!r} in {text!r}, did you mean {meant!r}?")
        if row in chosen:
            raise mistake(f"{text!r} has {chosen[row]!r} and {part!r}: choose one for {row};")
        chosen[row] = part
        fields |= GRAMMAR[row][part][0]
    parts = tuple(chosen[row] for row in GRAMMAR if row in chosen)
    if set(chosen) <= {"weight decay"}:  # or nothing at all
        parts = ("standard", *parts)
    return {"parts": parts, **fields}


# ---------------------------------------------------------------------------------------------------
# The theory, applied to these same classes
#
# With x ~ N(0, I) the inputs Norm(x) have covariance I, and the loss of a linear branch with effective
# weight A against a teacher W* is L = 1/2 ||A - W*||_F^2. The theorems follow its gradient flow. A vector
# gamma = Phi(raw) then moves by dgamma/dt = -P dL/dgamma, with P = J J^T and J = dPhi/draw (section 3.4):
#
#     direct   P = I
#     or       P = q q^T + (beta^2 d / ||alpha||^2) (I - q q^T / d),   q = Norm(alpha)      (Theorem 3.2)
#     er       P = diag(gamma)^2 + (1 - 1/d) gamma gamma^T   (not in the paper; equal to OR's at the start)


def student(norm_scale, teacher):
    """A Branch in the theorems' initial state: W = 0, scale vectors 1, float64. teacher (d_out, d_in)."""
    d_out, d_in = teacher.shape
    branch = Branch(d_in, d_out, NormScale.parse(norm_scale)).double()
    nn.init.zeros_(branch.W)
    return branch


def population_loss(branch, teacher):
    """1/2 ||A - W*||_F^2, with A the effective weight; teacher (d_out, d_in). ValueError for DNP."""
    if branch.norm is not None:
        raise ValueError("with a Norm after it, a branch is no linear map and has no effective weight")
    return (branch.effective_weight() - teacher).square().sum() / 2


def gradient_flow(module, loss, t_end, steps, noise=0.0, seed=0):
    """dp/dt = -dL/dp for all parameters p of the module, by the classical 4th-order Runge-Kutta method.

    loss(module) is a scalar. A generator: it yields t = 0, dt, ..., t_end with the module in its state at t.
    With noise it is dp = -dL/dp dt + sqrt(noise) dB, a Brownian motion for each parameter. Half of a step's
    noise is added before the drift and half after it, which gives weak order 2.
    """
    parameters = list(module.parameters())
    dt = t_end / steps
    generator = torch.Generator().manual_seed(seed)

    def velocity(p):
        nn.utils.vector_to_parameters(p, parameters)
        return -torch.cat([g.flatten() for g in torch.autograd.grad(loss(module), parameters)])

    def half_of_the_noise(p):
        if not noise:
            return 0.0
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
