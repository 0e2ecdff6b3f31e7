"""Scale vectors: the idea of "Negligible in Size, Significant in Effect" (arXiv 2605.26895) as code.

A Pre-Norm Transformer feeds its linear maps with normalised activations, and multiplies them by a
*scale vector* gamma on the way (the paper's section 2):

    Norm(x)           = sqrt(d) * x / ||x||          x in R^d; the result has RMS 1
    RMSNorm(x; gamma) = gamma * Norm(x)              gamma in R^d, 1 at the start

The design space (the paper's Table 1). W_c is one of the linear branches c that one Norm feeds:
{Q, K, V}, {gate, up} or {LM head}; gamma_b stands on its input side, gamma_a on its output side.

    none        W_c Norm(x)                                no scale vector anywhere
    standard    W_c (gamma * Norm(x))                      one gamma for all branches of the Norm
    hg          W_c (gamma_c * Norm(x))                    one gamma per branch
    ap          gamma_a * (W_c Norm(x))                    output side only
    dp          gamma_a * (W_c (gamma_b * Norm(x)))        both sides
    dnp         gamma_a * Norm(W_c (gamma_b * Norm(x)))    both sides, a Norm between
    or          gamma = beta * Norm(alpha)                 any scale vector above, written so
    er          gamma = exp(beta) * exp(alpha - mean(alpha))

Everything but DNP is one reparameterisation of the weight (equation 13), with u = gamma_a or 1 and
v = gamma_b or 1:

    W_c -> diag(u) W_c diag(v) = W_c * (u v^T)

and this is how it is computed here: the vectors meet the weight (d_out x d_in numbers a step), never
the activations (tokens x d_in). DNP folds v, multiplies, normalises, and then scales by u.
"""

import copy
import difflib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6  # added to the mean square of activations; the paper names none


# ---------------------------------------------------------------------------------------------------
# Which variant: one string, one dataclass

GRAMMAR = {  # row of the grammar -> {part: (the fields of NormScale that it sets, the same in words)}
    "branches": {
        "hg": ({"per_branch": True}, "an input vector of its own for every branch"),
    },
    "placement": {
        "ap": ({"input": False, "output": True}, "gamma_a * (W Norm(x)): output side only"),
        "dp": ({"output": True}, "gamma_a * (W (gamma_b * Norm(x))): both sides"),
        "dnp": ({"output": True, "output_norm": True}, "gamma_a * Norm(W (gamma_b * Norm(x))): and a Norm between"),
    },
    "parameters": {
        "or": ({"parameters": "or"}, "gamma = beta * Norm(alpha)"),
        "er": ({"parameters": "er"}, "gamma = exp(beta) * exp(alpha - mean(alpha))"),
    },
    "weight decay": {
        "iwd": ({"decayed": ("input",)}, "weight decay on Input-Norm scale vectors only"),
        "owd": ({"decayed": ("output",)}, "weight decay on Output-Norm scale vectors only"),
        "nowd": ({"decayed": ()}, "no weight decay on scale vectors"),
    },
}
ROW_OF = {part: row for row, parts in GRAMMAR.items() for part in parts}
UNIFIED = ("hg", "dnp", "or", "iwd")  # the paper's unified strategy
GRAMMAR_IN_WORDS = "none, standard, unified, or parts joined by +, at most one of each: " + ", ".join(
    "|".join(parts) for parts in GRAMMAR.values()
)


@dataclass(frozen=True)
class NormScale:
    """One point of the design space: where scale vectors stand, how they are written, which decay.

    Made by `NormScale.parse`; nothing else in the project looks at the string again.
    """

    label: str = "standard"
    scaled: bool = True  # False: no scale vector anywhere, behind Output-Norms neither
    input: bool = True  # gamma_b on the input side of the linear branches
    per_branch: bool = False  # one gamma_b a branch, rather than one a Norm
    output: bool = False  # gamma_a on the output side, always one a branch
    output_norm: bool = False  # a Norm between W and gamma_a
    parameters: str = "direct"  # key of PARAMETERS
    decayed: tuple = ("input", "output")  # the roles whose vectors decay

    @classmethod
    def parse(cls, text):
        """The variant that a string such as "hg+dp+or" names. Raises ValueError with one helpful line."""
        parts = text.strip().lower().split("+")
        if parts == ["none"]:
            return cls("none", scaled=False, input=False)
        chosen = {}
        for part in parts:
            for piece in {"standard": (), "unified": UNIFIED}.get(part, (part,)):
                row = ROW_OF.get(piece)
                if piece == "none":
                    raise ValueError(f"'none' stands alone, not as a part of {text!r}; the grammar: {GRAMMAR_IN_WORDS}")
                if row is None:
                    known = ["none", "standard", "unified", *ROW_OF]
                    nearest = difflib.get_close_matches(piece, known, n=1, cutoff=0)[0]
                    meant = f"did you mean {nearest!r}? the grammar: {GRAMMAR_IN_WORDS}"
                    raise ValueError(f"unknown part {piece!r} in {text!r}, {meant}")
                if row in chosen:
                    clash = f"{piece!r} in {text!r} meets {chosen[row]!r}: at most one part for {row}"
                    raise ValueError(f"{clash}; the grammar: {GRAMMAR_IN_WORDS}")
                chosen[row] = piece
        in_order = [chosen[row] for row in GRAMMAR if row in chosen]
        fields = {name: value for row in chosen for name, value in GRAMMAR[row][chosen[row]][0].items()}
        only_decay = set(chosen) <= {"weight decay"}
        label = "unified" if tuple(in_order) == UNIFIED else "+".join(["standard"] * only_decay + in_order)
        return cls(label, **fields)

    def describe(self):
        """The variant in words, a line a choice."""
        if not self.scaled:
            return ["none: W Norm(x), no scale vector anywhere"]
        parts = UNIFIED if self.label == "unified" else self.label.split("+")
        words = {part: text for options in GRAMMAR.values() for part, (_, text) in options.items()}
        words["standard"] = "W (gamma * Norm(x)), one input vector for all branches of a Norm"
        return [f"{part}: {words[part]}" for part in parts]


# ---------------------------------------------------------------------------------------------------
# Norm and scale vectors


def _norm_and_r(x, eps, d):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # statistics are never bfloat16
    r = (wide.square().sum(-1, keepdim=True) / d + eps).rsqrt()
    return (wide * r).to(x.dtype), r


class _Norm(torch.autograd.Function):
    """Norm in closed form. With y = r x and r = 1 / rms(x), the derivative is r times a projection,

        dL/dx = r (g - y mean(g y)) = r (I - y y^T / d) g          g = dL/dy,

    which takes out the part of g along x: rescaling x changes nothing. It is the same projection as in
    the paper's Theorem 3.2. Written out, forward and backward are a third of the work that the
    composite of elementary operations takes on a CPU. First derivatives only.
    """

    @staticmethod
    def forward(ctx, x, eps, d):
        y, r = _norm_and_r(x, eps, d)
        ctx.save_for_backward(y, r)
        ctx.d = d
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        y, r = ctx.saved_tensors
        along = (g * y).sum(-1, keepdim=True, dtype=r.dtype) / ctx.d
        return (r * (g - y * along)).to(g.dtype), None, None


def normalize(x, eps=EPS, d=None):
    """Norm(x) = sqrt(d) x / ||x|| along the last axis, in the dtype of x. eps is added to mean(x^2).

    d is the width where x is padded with zeros, by default the length of the last axis.
    """
    d = d or x.shape[-1]
    if torch.compiler.is_compiling():  # which fuses as well by itself, and in torch 2.11 gets _Norm's gradient wrong
        return _norm_and_r(x, eps, d)[0]
    return _Norm.apply(x, eps, d)


PARAMETERS = {  # how a scale vector is written -> (what each raw parameter starts at, gamma of them)
    "direct": ({"gamma": 1.0}, lambda gamma: gamma),
    # No epsilon in OR: the conservation laws of Theorem 3.2 hold for the exact Norm alone.
    "or": ({"beta": 1.0, "alpha": 1.0}, lambda beta, alpha: beta * normalize(alpha, eps=0.0)),
    "er": ({"beta": 0.0, "alpha": 0.0}, lambda beta, alpha: beta.exp() * (alpha - alpha.mean(-1, keepdim=True)).exp()),
}


class ScaleVector(nn.Module):
    """gamma in R^dim, equal to 1 at the start, in one of the forms of PARAMETERS.

    role says what it does in the function (the paper's section 2.2), and with it whether it decays:
    "input" if a linear map follows it, or it follows one, directly, so that it can be folded into that
    map; "output" if it stands behind a Norm and sets the size of what comes out.
    Called, it returns gamma, shape (dim,). The scalar beta has shape (1,).
    """

    def __init__(self, dim, role, parameters="direct"):
        super().__init__()
        self.role = role
        start, self.form = PARAMETERS[parameters]
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(torch.full((1 if name == "beta" else dim,), value)))

    def forward(self):
        return self.form(*self.parameters())

    @staticmethod
    def stack(vectors):
        """gamma of several vectors of one dim, shape (len(vectors), dim), in a few operations."""
        return vectors[0].form(*map(torch.stack, zip(*(vector.parameters() for vector in vectors))))


class OutputNorm(nn.Module):
    """gamma * Norm(x), or Norm(x) without scale vectors; x (..., dim). No linear map follows: Q/K-norm, and
    Gemma's norms on what attention and FFN emit."""

    def __init__(self, dim, scale):
        super().__init__()
        self.scale = ScaleVector(dim, "output", scale.parameters) if scale.scaled else None

    def forward(self, x):
        return normalize(x) if self.scale is None else self.scale().to(x.dtype) * normalize(x)


# ---------------------------------------------------------------------------------------------------
# Norm, then linear branches


class PreNormLinear(nn.Module):
    """Norm(x), then the linear branches W_c that it feeds, in the form that `scale` says.

    d_out names the branches and gives the width of each. Under DNP the outputs are normalised over
    head_dim entries at a time, or over the whole width where head_dim is None.
    bare names branches without anything on their output side: the router of a mixture of experts.
    qk_norm names branches whose heads are normalised in any variant, with one vector shared by the
    heads (Gemma); under DNP they are already, which *is* Q/K-norm, and there is no second one.
    Weights are separate matrices (d_out, d_in), uninitialised; call on x (..., d_in) returns a tuple
    with an output (..., d_out) for each branch.
    """

    def __init__(self, d_in, d_out, scale, head_dim=None, bare=(), qk_norm=()):
        super().__init__()
        self.head_dim = head_dim
        self.output_norm = scale.output_norm
        self.weight = nn.ParameterDict()
        for c, d in d_out.items():  # one by one, as a dict given to ParameterDict would be sorted
            self.weight[c] = nn.Parameter(torch.empty(d, d_in))
        self.input_scale, self.output_scale = nn.ModuleDict(), nn.ModuleDict()
        if scale.input:
            for c in d_out if scale.per_branch else ["shared"]:
                self.input_scale[c] = ScaleVector(d_in, "input", scale.parameters)
        if scale.output:
            role = "output" if scale.output_norm else "input"  # behind a Norm gamma_a is part of the function
            for c in [c for c in d_out if c not in bare]:
                self.output_scale[c] = ScaleVector(d_out[c], role, scale.parameters)
        self.qk_norm = nn.ModuleDict({c: OutputNorm(head_dim, scale) for c in qk_norm if not scale.output_norm})

    def effective_weight(self, *branches):
        """W * (u v^T), equation 13, for branches of one width: shape (len(branches), d_out, d_in).

        Under DNP u stands behind the Norm and is left out.
        """
        W = torch.stack([self.weight[c] for c in branches])
        v = self._gamma(self.input_scale, branches)
        u = None if self.output_norm else self._gamma(self.output_scale, branches)
        if u is not None and v is not None:
            return W * (u[:, :, None] * v[:, None, :])
        if v is not None:
            return W * v[:, None, :]
        return W if u is None else W * u[:, :, None]

    @staticmethod
    def _gamma(scales, branches):
        """The branches' vectors, (len(branches), dim), or (1, dim) where they share one; None where there is none."""
        if "shared" in scales:
            return scales["shared"]()[None]
        return ScaleVector.stack([scales[c] for c in branches]) if branches[0] in scales else None

    def forward(self, x):
        return self.linear(normalize(x), *self.weight.keys())  # keys: torch.compile of torch 2.11 stops at the bare dict

    def parameters_of(self, *branches):
        """The parameters that belong to these branches alone."""
        own = [scales[c] for scales in (self.input_scale, self.output_scale) for c in branches if c in scales]
        return [self.weight[c] for c in branches] + [p for scale in own for p in scale.parameters()]

    def linear(self, n, *branches):
        """The outputs, each (..., d_out), of branches of one width for n = Norm(x), shape (..., d_in)."""
        W = self.effective_weight(*branches)
        u = self._gamma(self.output_scale, branches) if self.output_norm else None  # (branch, d_out)
        if u is not None and self.head_dim is None:
            return self._normalised_outputs(n, W, u)
        y = F.linear(n, W.flatten(0, 1))  # (..., branch * d_out)
        if len(branches) == 1 and u is None:
            return (y,)  # logits are wide: taking them apart would cost a copy of them in the backward pass
        y = y.unflatten(-1, W.shape[:2])
        if u is not None:
            y = self._per_head(normalize, y) * u.to(y.dtype)
        return tuple(
            self._per_head(self.qk_norm[c], y_c) if c in self.qk_norm else y_c for c, y_c in zip(branches, y.unbind(-2))
        )

    def _per_head(self, norm, y):
        return norm(y.unflatten(-1, (-1, self.head_dim))).flatten(-2)

    @staticmethod
    def _normalised_outputs(n, W, u):
        """u * Norm(W n) over the whole width, without a pass over W n, which can be as wide as a vocabulary:

            mean((W n)^2) = n^T G n,      G = W^T W / d_out,
            u * Norm(W n) = (W * u) (n r),    r = (n^T G n + eps)^(-1/2)

        n (..., d_in), W (branch, d_out, d_in), u (branch, d_out) -> a tuple of (..., d_out).
        """
        G = W.mT @ W / W.shape[1]
        outputs = []
        for W_c, G_c, u_c in zip(W, G, u):
            r = ((n @ G_c) * n).sum(-1, keepdim=True).add(EPS).rsqrt()
            outputs.append(F.linear(n * r.to(n.dtype), W_c * u_c[:, None]))
        return tuple(outputs)

    def grouped(self, n, group, ends, *branches):
        """As `linear`, for rows that are sorted into groups (experts), each with branches of its own.

        n (rows, d_in); group (rows,), the group of each row, ascending; ends (groups,) int32, where each
        group's rows end; branches: for each output a list with one name a group. Returns a tuple of
        (rows, d_out padded with zeros to a multiple of 8), because grouped_mm wants rows of 16 bytes.
        """
        names = [c for of_group in zip(*branches) for c in of_group]
        W = pad_to_8(self.effective_weight(*names), dim=1)
        W = W.unflatten(0, (-1, len(branches)))  # (group, branch, d_out, d_in)
        y = grouped_linear(n, W.flatten(1, 2), ends).unflatten(-1, W.shape[1:3])  # (rows, branch, d_out)
        if self.output_norm:
            u = pad_to_8(self._gamma(self.output_scale, names), dim=1).view(W.shape[:3])
            y = normalize(y, d=self.weight[names[0]].shape[0]) * u.to(y.dtype).index_select(0, group)
        return y.unbind(-2)


def grouped_linear(x, W, ends):
    """x W_g^T for the rows of each group g: x (rows, d_in), W (group, d_out, d_in) -> (rows, d_out)."""
    if torch.is_autocast_enabled(x.device.type):  # grouped_mm is not on autocast's list
        x, W = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, W))
    return F.grouped_mm(x, W.mT, offs=ends)


def pad_to_8(x, dim):
    """x with zeros at the end of axis dim, up to a multiple of 8 entries."""
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, -x.shape[dim] % 8])


# ---------------------------------------------------------------------------------------------------
# Folding, and which parameters decay


@torch.no_grad()
def fold(model):
    """A copy of the model that computes the same with every foldable scale vector multiplied into its own
    branch's weight, equation 13. Vectors behind a Norm (role "output") stay: they are part of the function."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, PreNormLinear):
            for c in module.weight:
                module.weight[c].copy_(module.effective_weight(c)[0])
            module.input_scale = nn.ModuleDict()
            if not module.output_norm:
                module.output_scale = nn.ModuleDict()
    return model


def decay_groups(model, scale, weight_decay):
    """The optimiser's groups: [{"name", "params", "weight_decay"}, ...], every parameter in exactly one.

    Matrices decay; scale vectors decay where `scale.decayed` names their role (section 2.2). Under OR
    and ER it is the raw alpha and beta that decay. Empty groups are left out.
    """
    role = {p: m.role for m in model.modules() if isinstance(m, ScaleVector) for p in m.parameters()}
    by_role = {"matrices": [], "input": [], "output": []}
    for parameter in model.parameters():
        by_role[role.get(parameter, "matrices")].append(parameter)
    names = {"matrices": "matrices", "input": "Input-Norm scale vectors", "output": "Output-Norm scale vectors"}
    decayed = ("matrices", *scale.decayed)
    return [
        {"name": names[role], "params": params, "weight_decay": weight_decay if role in decayed else 0.0}
        for role, params in by_role.items()
        if params
    ]


# ---------------------------------------------------------------------------------------------------
# The theory on these very classes
#
# With x ~ N(0, I) the inputs Norm(x) have covariance I, and the loss of a linear branch with effective
# weight A against a teacher W* is L = 1/2 ||A - W*||_F^2. The theorems follow its gradient flow. A vector
# gamma = Phi(raw) then moves by dgamma/dt = -P dL/dgamma, with P = J J^T and J = dPhi/draw (section 3.4):
#
#     direct   P = I
#     or       P = q q^T + (beta^2 d / ||alpha||^2) (I - q q^T / d),   q = Norm(alpha)      (Theorem 3.2)
#     er       P = diag(gamma)^2 + (1 - 1/d) gamma gamma^T             (not in the paper; at gamma = 1 it is OR's)


def student(variant, teacher):
    """One linear branch where the theorems start it: weight 0, scale vectors 1, in float64. teacher (d_out, d_in)."""
    d_out, d_in = teacher.shape
    module = PreNormLinear(d_in, {"w": d_out}, NormScale.parse(variant)).double()
    nn.init.zeros_(module.weight["w"])
    return module


def population_loss(module, teacher):
    """1/2 ||A - W*||_F^2 summed over the branches; teacher (d_out, d_in) or (branches, d_out, d_in). Not for DNP."""
    return (module.effective_weight(*module.weight) - teacher).square().sum() / 2


def gradient_flow(module, loss, t_end, steps, noise=0.0, seed=0):
    """dp/dt = -dL/dp for all parameters p of the module at once, by the classical Runge-Kutta method of order 4.

    loss(module) is a scalar. A generator: it yields t = 0, dt, ..., t_end with the module in its state at t.
    With noise q it is dp = -dL/dp dt + sqrt(q) dB, a Brownian motion for each parameter: half of a step's
    noise before the drift and half after it, which is of weak order 2.
    """
    parameters, dt, generator = list(module.parameters()), t_end / steps, torch.Generator().manual_seed(seed)

    def velocity(p):
        nn.utils.vector_to_parameters(p, parameters)
        return -torch.cat([g.flatten() for g in torch.autograd.grad(loss(module), parameters)])

    def kick(p):
        return p + (noise * dt / 2) ** 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype) if noise else p

    p = nn.utils.parameters_to_vector(parameters).detach()
    yield 0.0
    for step in range(1, steps + 1):
        p = kick(p)
        k1 = velocity(p)
        k2 = velocity(p + dt / 2 * k1)
        k3 = velocity(p + dt / 2 * k2)
        k4 = velocity(p + dt * k3)
        p = kick(p + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
        nn.utils.vector_to_parameters(p, parameters)
        yield step * dt


def jacobian(outputs, parameters):
    """J = d outputs / d parameters, a row an output: (number of outputs, number of parameters)."""
    parameters = list(parameters)
    rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in outputs.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
