"""Exercises of the chapter "PEFT: LoRA, adapters, BitFit, (IA)³".

What is compared with: the package's layers, autograd, singular values, and models that are built
without memory and counted.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_anatomy.exercises._engine import (
    Case,
    Chapter,
    Exercise,
    Mistake,
    case,
    mixed,
    normal,
    same_function,
    same_value,
    unrepaired,
)
from llm_anatomy.models.bert import BERT_BASE, BertModel
from llm_anatomy.peft import adapter, bitfit, ia3, lora, targets

# --- LoRA ----------------------------------------------------------------------------------------


def _lora_cases() -> list[Case]:
    return [
        case(
            f"in={i}, out={o}, r={r}, alpha={alpha}",
            normal(2, 3, i, seed=i),
            normal(o, i, seed=i + 1),
            normal(o, seed=i + 2),
            normal(r, i, seed=i + 3),
            normal(o, r, seed=i + 4),
            alpha,
        )
        for i, o, r, alpha in ((7, 5, 2, 6.0), (4, 9, 3, 1.5), (6, 6, 1, 4.0))
    ]


def _lora(
    x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, alpha: float, base: float = 1.0, **how
) -> Tensor:
    scale = how["scale"](alpha, len(A)) if "scale" in how else alpha / len(A)
    return base * F.linear(x, W, b) + scale * x @ A.T @ B.T


LORA_FORWARD = Exercise(
    name="lora_forward",
    title="LoRA in one line",
    level=1,
    minutes=5,
    task="""
A frozen linear layer has a weight $(O, I)$ and a bias. Beside it are the two factors of LoRA, $A$
of shape $(R, I)$ and $B$ of shape $(O, R)$. Return the output of the layer **with** its update,
which is scaled by $\\alpha / R$.
""",
    stub='''
def lora_forward(
    x: Float[Tensor, "N T I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, "O"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    alpha: float,
) -> Float[Tensor, "N T O"]:
    """What the layer puts out, its update included."""
    raise NotImplementedError
''',
    hints=(
        "Two paths run side by side and meet in a sum: the layer as it was, and x through A and "
        "then through B.",
        "The rank is the number of rows of A. Only the second path is scaled, and it has no bias.",
    ),
    solution='''
def lora_forward(
    x: Float[Tensor, "N T I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, "O"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    alpha: float,
) -> Float[Tensor, "N T O"]:
    """What the layer puts out, its update included."""
    return x @ weight.T + bias + alpha / len(A) * (x @ A.T @ B.T)
''',
    why="Read from the left: x is narrowed to R numbers and widened again. The product of the two "
    "factors, as large as the weight, is never formed.",
    point="The update costs 2R(I + O) operations a position where the layer itself costs 2IO.",
    check=same_function(
        _lora,
        _lora_cases,
        [
            Mistake(
                "The update is not scaled: alpha has no effect.",
                lambda *a: _lora(*a, scale=lambda alpha, r: 1.0),
            ),
            Mistake(
                "The scale is upside down, r / alpha.",
                lambda *a: _lora(*a, scale=lambda alpha, r: r / alpha),
            ),
            Mistake(
                "The update is scaled by alpha alone; it is also divided by the rank.",
                lambda *a: _lora(*a, scale=lambda alpha, r: alpha),
            ),
            Mistake(
                "The update is divided by the root of the rank. That is rsLoRA; here it is the "
                "rank itself.",
                lambda *a: _lora(*a, scale=lambda alpha, r: alpha / math.sqrt(r)),
            ),
            Mistake(
                "The frozen layer is missing: this is the update alone.",
                lambda *a: _lora(*a, base=0.0),
            ),
            Mistake(
                "The bias is missing. The layer keeps it.",
                lambda x, W, b, *a: _lora(x, W, torch.zeros_like(b), *a),
            ),
            Mistake(
                "The layer is scaled as well; alpha / r belongs to the update.",
                lambda x, W, b, A, B, alpha: _lora(x, W, b, A, B, alpha, base=alpha / len(A)),
            ),
        ],
    ),
)


def _merge_cases() -> list[Case]:
    return [
        case(
            f"{n}, alpha={alpha}",
            normal(i, o, seed=i) if n == "(in, out)" else normal(o, i, seed=i),
            normal(r, i, seed=i + 3),
            normal(o, r, seed=i + 4),
            alpha,
            n == "(in, out)",
        )
        for n, i, o, r, alpha in (
            ("(out, in)", 7, 5, 2, 6.0),
            ("(in, out)", 4, 9, 3, 1.5),
            ("(in, out)", 6, 6, 2, 4.0),
        )
    ]


def _merge(W: Tensor, A: Tensor, B: Tensor, alpha: float, in_out: bool, **how) -> Tensor:
    scale = how.get("scale", alpha / len(A))
    update = scale * B @ A
    if in_out and not (how.get("square") and W.shape == update.shape):
        update = update.T
    return how.get("base", 1.0) * W + how.get("sign", 1.0) * update


MERGE_LORA = Exercise(
    name="merge_lora",
    title="Merge the update into the weight",
    level=2,
    minutes=6,
    task="""
Return the weight that makes the layer with LoRA a plain layer. GPT-2's layers in `transformers`
hold their weight as (in, out); `in_out` says so. Do not change the weight that you are given.
""",
    stub='''
def merge_lora(
    weight: Tensor, A: Float[Tensor, "R I"], B: Float[Tensor, "O R"], alpha: float, in_out: bool
) -> Tensor:
    """The weight with the update in it, laid out as before."""
    raise NotImplementedError
''',
    hints=(
        "The update as a matrix has the shape (O, I). Which of the two layouts is that?",
        "Form the scaled product of the factors, turn it where the layout asks for it (a square "
        "weight gives no error if you forget), and add it.",
    ),
    solution='''
def merge_lora(
    weight: Tensor, A: Float[Tensor, "R I"], B: Float[Tensor, "O R"], alpha: float, in_out: bool
) -> Tensor:
    """The weight with the update in it, laid out as before."""
    update = alpha / len(A) * B @ A
    return weight + (update.T if in_out else update)
''',
    why="Both paths are linear in x, so their sum is one linear layer. A merge by shape alone is "
    "wrong where input and output are equally wide.",
    point="A merged layer costs what the base costs, and nobody can see that it was tuned.",
    check=same_function(
        _merge,
        _merge_cases,
        [
            Mistake("Alpha is forgotten in the merge.", lambda *a: _merge(*a, scale=1.0)),
            Mistake(
                "The scale is r / alpha, upside down.",
                lambda W, A, B, alpha, n: _merge(W, A, B, alpha, n, scale=len(A) / alpha),
            ),
            Mistake(
                "The update is turned only where its shape does not fit; a square weight gets it "
                "untransposed.",
                lambda *a: _merge(*a, square=True),
                hint=2,
            ),
            Mistake("The update is taken away from the weight.", lambda *a: _merge(*a, sign=-1.0)),
            Mistake(
                "This is the update alone, without the weight.", lambda *a: _merge(*a, base=0.0)
            ),
            Mistake(
                "The update is added twice, as by merging a second time.",
                lambda *a: _merge(*a, sign=2.0),
            ),
        ],
    ),
)


def _gradient_cases() -> list[Case]:
    rows = []
    for i, o, r, alpha, zero in ((5, 4, 2, 6.0, ""), (3, 6, 2, 1.0, "B"), (4, 3, 1, 2.0, "AB")):
        A, B = normal(r, i, seed=i), normal(o, r, seed=i + 1)
        A, B = A * ("A" not in zero), B * ("B" not in zero)
        label = f"in={i}, out={o}, r={r}, " + (f"zero: {', '.join(zero)}" if zero else "none zero")
        rows.append(case(label, normal(7, i, seed=9), A, B, alpha, normal(7, o, seed=8)))
    return rows


def _gradients(x: Tensor, A: Tensor, B: Tensor, alpha: float, g: Tensor) -> tuple[Tensor, Tensor]:
    A, B = (t.clone().requires_grad_() for t in (A, B))
    y = alpha / len(A) * x @ A.T @ B.T
    return torch.autograd.grad(y, (A, B), g)


def _scaled(part: int, by: Callable[[float, int], float]) -> Callable[..., Tensor]:
    return lambda x, A, B, alpha, g: _gradients(x, A, B, alpha, g)[part] * by(alpha, len(A))


LORA_GRADIENTS = Exercise(
    name="lora_gradients",
    title="Why not both factors at zero?",
    level=3,
    minutes=12,
    task="""
The update is $y = \\frac{\\alpha}{R} B A x$, for $N$ inputs as rows of `x`. The rows of `g` are the
gradients of the loss with respect to $y$. Return the gradients with respect to $A$ and to $B$, by
formula, without autograd. Then look at them: what if $B$ is zero? And what if both are?
""",
    stub='''
def lora_gradients(
    x: Float[Tensor, "N I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    alpha: float,
    g: Float[Tensor, "N O"],
) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    """Gradients of the loss with respect to A and to B."""
    raise NotImplementedError
''',
    hints=(
        "The gradient of a factor has the shape of that factor, and holds the other factor, not "
        "itself. Sum over the N inputs.",
        "A receives what comes back through B, times x. B receives g, times what x has become "
        "behind A. Both are scaled as the update is.",
    ),
    solution='''
def lora_gradients(
    x: Float[Tensor, "N I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    alpha: float,
    g: Float[Tensor, "N O"],
) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    """Gradients of the loss with respect to A and to B."""
    scale = alpha / len(A)
    return scale * (g @ B).T @ x, scale * g.T @ (x @ A.T)
''',
    why="Each gradient holds the other factor. With B at zero, A stands still for one step while B "
    "moves. With both at zero both gradients are zero, and nothing ever moves.",
    point="One factor at zero starts at the base; two at zero stay there for ever.",
    check=same_function(
        _gradients,
        _gradient_cases,
        mixed(
            {
                "": lambda *a: _gradients(*a)[0],
                "A: the scale is missing.": _scaled(0, lambda alpha, r: r / alpha),
                "A: averaged over the inputs. Their gradients are summed.": _scaled(
                    0, lambda alpha, r: 1 / 7
                ),
                "A: its sign is turned; that is a step, not a gradient.": _scaled(
                    0, lambda alpha, r: -1.0
                ),
            },
            {
                "": lambda *a: _gradients(*a)[1],
                "B: the scale is missing.": _scaled(1, lambda alpha, r: r / alpha),
                "B: averaged over the inputs, which are to be summed.": _scaled(
                    1, lambda alpha, r: 1 / 7
                ),
                "B: it has lost a sign; that is a step downhill.": _scaled(
                    1, lambda alpha, r: -1.0
                ),
            },
        ),
        names=("the gradient of A", "the gradient of B"),
    ),
)


_LAYER_BUGS = {
    "scale": "the scale is r / alpha",
    "dropout": "features are dropped in evaluation too",
    "base": "what the frozen layer reads is dropped as well",
    "merged": "a merged layer adds its update a second time",
}


def _layer(*bugs: str) -> Callable[..., Tensor]:
    def forward(x, weight, A, B, alpha, p, training, merged):
        scale = len(A) / alpha if "scale" in bugs else alpha / len(A)
        dropped = F.dropout(x, p, training or "dropout" in bugs)
        y = (dropped if "base" in bugs else x) @ weight.T
        if merged and "merged" not in bugs:
            return y
        return y + scale * dropped @ A.T @ B.T

    return forward


def _layer_cases() -> list[Case]:
    rows = []
    for n, (p, training, merged) in enumerate(
        [
            (0.0, True, False),
            (1.0, True, False),
            (1.0, False, False),
            (0.0, False, True),
            (0.0, True, True),
        ]
    ):
        label = f"dropout {p}, {'training' if training else 'evaluation'}"
        weights = normal(6, 4, seed=n), normal(3, 4, seed=n + 1), normal(6, 3, seed=n + 2)
        label += ", merged" if merged else ""
        x = normal(2, 5, 4, seed=n + 3)
        rows.append(case(label, x, *weights, 6.0, p, training, merged))
    return rows


_FIX_STUB = '''
def fix_lora(
    x: Float[Tensor, "N T I"],
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    alpha: float,
    p: float,
    training: bool,
    merged: bool,
) -> Float[Tensor, "N T O"]:
    """A layer with LoRA, dropout on what the update reads, and a weight that may be merged."""
    x = F.dropout(x, p)
    return x @ weight.T + len(A) / alpha * (x @ A.T @ B.T)
'''

FIX_LORA = Exercise(
    name="fix_lora",
    title="Four mistakes in a LoRA layer",
    level=3,
    minutes=10,
    task="""
This layer runs and learns something. It contains **four** mistakes. Find and repair them. `p` is
the share that dropout drops of what the update reads, in training alone; `merged` says that
`weight` already holds the update.
""",
    stub=_FIX_STUB,
    hints=(
        "Ask of each argument what it should change. Two of them are never used.",
        "The scale; when dropout acts; what dropout may touch; and what a merged layer must not.",
    ),
    solution='''
def fix_lora(
    x: Float[Tensor, "N T I"],
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    alpha: float,
    p: float,
    training: bool,
    merged: bool,
) -> Float[Tensor, "N T O"]:
    """A layer with LoRA, dropout on what the update reads, and a weight that may be merged."""
    y = x @ weight.T
    if merged:
        return y
    return y + alpha / len(A) * (F.dropout(x, p, training) @ A.T @ B.T)
''',
    why="None of the four gives an error, and with alpha equal to r and no dropout the first three "
    "change nothing at all: test with other numbers.",
    point="A test with alpha equal to r and without dropout would have passed three of the four.",
    check=same_function(_layer(), _layer_cases, unrepaired(_LAYER_BUGS, _layer), again=False),
)


# --- What trains ---------------------------------------------------------------------------------


def _names_cases() -> list[Case]:
    block = [
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in (
            "attention.q_proj.base.weight",
            "attention.q_proj.base.bias",
            "attention.q_proj.lora_A",
            "attention.q_proj.lora_B",
            "attention.k_proj.weight",
            "ffn.up_proj.bias",
            "classifier_norm.weight",
        )
    ]
    names = ["token_embedding.weight", *block, "classifier.weight", "classifier.bias"]
    other = ["encoder.v_proj.base.weight", "encoder.v_proj.lora_A", "encoder.v_proj.lora_B"]
    return [
        case("a classifier with LoRA on its queries", names, "classifier"),
        case(
            "a tagger with LoRA on its values",
            [*other, "tagger_norm.weight", "tagger.weight", "norm.bias"],
            "tagger",
        ),
    ]


def _factor(name: str) -> bool:
    return name.endswith(("lora_A", "lora_B"))


def _trains(names: list[str], head: str) -> list[str]:
    return [n for n in names if _factor(n) or n.startswith(head + ".")]


WHAT_TRAINS = Exercise(
    name="what_trains",
    title="Which parameters train?",
    level=2,
    minutes=6,
    task="""
Given the names of all parameters of a model that carries LoRA, and the name of its new head, which
is a module: return the names of those that train, in the same order.
""",
    stub='''
def what_trains(names: list[str], head: str) -> list[str]:
    """Names of the factors, and of the head's parameters."""
    raise NotImplementedError
''',
    hints=(
        "Three kinds of names: factors, the head, and everything else, which is frozen even where "
        "it sits beside a factor.",
        "A factor ends with lora_A or lora_B. A parameter of the head starts with the head's name "
        "and a dot; a longer name that merely begins alike is another module.",
    ),
    solution='''
def what_trains(names: list[str], head: str) -> list[str]:
    """Names of the factors, and of the head's parameters."""
    return [
        name
        for name in names
        if name.endswith(("lora_A", "lora_B")) or name.startswith(f"{head}.")
    ]
''',
    why="A new head is drawn at random, so it must train. What is wrapped keeps its weight and "
    "bias under another name, and these stay frozen.",
    point="Print the names of what trains before a run; it costs a second and saves days.",
    check=same_function(
        _trains,
        _names_cases,
        [
            Mistake(
                "The frozen weights inside the adapted layers train too.",
                lambda names, head: [
                    n for n in names if _factor(n) or ".base." in n or n.startswith(head + ".")
                ],
            ),
            Mistake(
                "The head is missing: it would keep its random weights.",
                lambda names, head: [n for n in names if _factor(n)],
            ),
            Mistake(
                "Only one of the two factors trains.",
                lambda names, head: [
                    n for n in names if n.endswith("lora_B") or n.startswith(head + ".")
                ],
            ),
            Mistake(
                "The head is looked for anywhere in the name; a norm of the base has its word in "
                "it too.",
                lambda names, head: [n for n in names if _factor(n) or head in n],
            ),
            Mistake(
                "A module whose name only begins as the head's does trains too.",
                lambda names, head: [n for n in names if _factor(n) or n.startswith(head)],
                hint=2,
            ),
            Mistake(
                "The biases of the base train as well. That is what BitFit does.",
                lambda names, head: [
                    n for n in names if n in _trains(names, head) or n.endswith("bias")
                ],
            ),
            Mistake(
                "This is what is frozen.",
                lambda names, head: [n for n in names if n not in _trains(names, head)],
            ),
        ],
    ),
)


def _counts() -> tuple[int, int, int, int]:
    found = []
    for put in (
        lambda m: lora.add(m, lora.LoRAConfig(r=8)),
        lambda m: adapter.add(m, adapter.AdapterConfig(width=64)),
        lambda m: ia3.add(m, ia3.IA3Config()),
        lambda m: bitfit.add(m, bitfit.BitFitConfig(targets=("q_proj",))),
    ):
        with torch.device("meta"):
            model = BertModel(BERT_BASE)
        put(model)
        found.append(sum(targets.trainable(model).values()))
    return tuple(found)


_L, _D, _F = 12, 768, 3072
_ALL_BIASES = _L * (4 * _D + _F + _D + 2 * _D) + 2 * _D  # in the end: embedding norm, pooler
COUNT_PARAMETERS = Exercise(
    name="count_parameters",
    title="Four methods on BERT-base",
    level=2,
    minutes=10,
    task="""
BERT-base has 12 blocks, $D = 768$, $F = 3072$. How many parameters train, the head aside, with

- LoRA of rank 8 on the query and the value projections,
- Houlsby's adapters of width 64, two in each block, biases included,
- (IA)³ on keys, values, and the features inside the feed-forward layer,
- BitFit on the biases of the queries alone?
""",
    stub="""
count_parameters = (
    ...,  # LoRA
    ...,  # adapters
    ...,  # (IA)³
    ...,  # BitFit, queries alone
)
""",
    hints=(
        "LoRA has two factors for each of two matrices in each block. An adapter has two matrices "
        "and two biases.",
        "A factor of rank R on a D by D matrix has R·D numbers. An adapter of width m has 2·D·m "
        "weights, m biases and then D biases. (IA)³ has one number for each feature.",
    ),
    solution="""
count_parameters = (
    12 * 2 * 8 * (768 + 768),
    12 * 2 * (2 * 768 * 64 + 64 + 768),
    12 * (768 + 768 + 3072),
    12 * 768,
)
""",
    why="In thousandths of BERT's 109 million: 2.7, 21.7, 0.5 and 0.08. The methods differ by a "
    "factor of more than 250 in what they train.",
    point="What trains is a matter of a formula; whether it is enough is a matter of measuring.",
    check=same_value(
        _counts,
        [
            Mistake(
                "LoRA: this is half. Each block has two matrices, and each of them two factors.",
                when=lambda got, _: got[0] == _L * 2 * 8 * _D,
            ),
            Mistake(
                "LoRA: this is one block. There are twelve.",
                when=lambda got, _: got[0] == 2 * 8 * 2 * _D,
            ),
            Mistake(
                "LoRA: these are the whole matrices. Only the factors train.",
                when=lambda got, _: got[0] == _L * 2 * _D * _D,
            ),
            Mistake(
                "Adapters: their biases are missing.",
                when=lambda got, want: got[0] == want[0] and got[1] == _L * 2 * 2 * _D * 64,
            ),
            Mistake(
                "Adapters: that is one a block, Pfeiffer's placement. Houlsby has two.",
                when=lambda got, want: got[0] == want[0] and 2 * got[1] == want[1],
            ),
            Mistake(
                "(IA)³: the inner features are F, not D.",
                when=lambda got, want: got[:2] == want[:2] and got[2] == _L * 3 * _D,
            ),
            Mistake(
                "(IA)³: only keys and values are counted.",
                when=lambda got, want: got[:2] == want[:2] and got[2] == _L * 2 * _D,
            ),
            Mistake(
                "(IA)³: one of the three places is missing. Keys and values have D features each.",
                when=lambda got, want: got[:2] == want[:2] and got[2] == _L * (_D + _F),
            ),
            Mistake(
                "BitFit: these are all biases of BERT. Asked for are those of the queries.",
                when=lambda got, want: got[:3] == want[:3] and got[3] == _ALL_BIASES,
            ),
            Mistake(
                "BitFit: the weights of the queries are counted; a bias has D numbers.",
                when=lambda got, want: got[:3] == want[:3] and got[3] >= _L * _D * _D,
            ),
        ],
        names=("LoRA", "adapters", "(IA)³", "BitFit"),
        rtol=0.0,
    ),
)


# --- Adapters and (IA)³ ---------------------------------------------------------------------------


def _adapter_cases() -> list[Case]:
    return [
        case(
            f"D={D}, width={m}",
            normal(2, 3, D, seed=m),
            normal(m, D, seed=m + 1),
            normal(m, seed=m + 2),
            normal(D, m, seed=m + 3),
            normal(D, seed=m + 4),
        )
        for D, m in ((7, 3), (4, 2), (5, 5))
    ]


def _adapter(h, down, b_down, up, b_up, f: Callable = F.gelu, residual: float = 1.0) -> Tensor:
    return residual * h + F.linear(f(F.linear(h, down, b_down)), up, b_up)


ADAPTER_FORWARD = Exercise(
    name="adapter_forward",
    title="A bottleneck adapter",
    level=1,
    minutes=5,
    task="""
Write an adapter: narrow `h` with the first matrix and bias, apply GELU (the exact one), widen with
the second matrix and bias, and add the result to `h`.
""",
    stub='''
def adapter_forward(
    h: Float[Tensor, "N T D"],
    down: Float[Tensor, "M D"],
    b_down: Float[Tensor, "M"],
    up: Float[Tensor, "D M"],
    b_up: Float[Tensor, "D"],
) -> Float[Tensor, "N T D"]:
    """What the adapter makes of the output of a layer."""
    raise NotImplementedError
''',
    hints=(
        "What should come out while both matrices are still zero?",
        "Weights are laid out as (out, in), as in nn.Linear. The nonlinearity stands in the "
        "bottleneck, and the sum comes last.",
    ),
    solution='''
def adapter_forward(
    h: Float[Tensor, "N T D"],
    down: Float[Tensor, "M D"],
    b_down: Float[Tensor, "M"],
    up: Float[Tensor, "D M"],
    b_up: Float[Tensor, "D"],
) -> Float[Tensor, "N T D"]:
    """What the adapter makes of the output of a layer."""
    return h + F.gelu(h @ down.T + b_down) @ up.T + b_up
''',
    why="With small weights the second term is near zero, so the model starts as it was. Without "
    "the sum the adapter would start by deleting what the layer has computed.",
    point="The residual sum is what lets a new part enter a trained model without breaking it.",
    check=same_function(
        _adapter,
        _adapter_cases,
        [
            Mistake(
                "The residual is forgotten: a fresh adapter would put out nothing.",
                lambda *a: _adapter(*a, residual=0.0),
            ),
            Mistake(
                "There is no nonlinearity, so this is a matrix of low rank and a sum.",
                lambda *a: _adapter(*a, f=lambda low: low),
            ),
            Mistake("This is ReLU; GELU is asked for.", lambda *a: _adapter(*a, f=F.relu)),
            Mistake(
                "This is GELU by its tanh formula. The exact one is asked for.",
                lambda *a: _adapter(*a, f=lambda low: F.gelu(low, approximate="tanh")),
            ),
            Mistake(
                "The biases are missing.",
                lambda h, down, b_down, up, b_up: _adapter(h, down, 0 * b_down, up, 0 * b_up),
            ),
            Mistake(
                "The nonlinearity stands after the second matrix. It belongs in the bottleneck.",
                lambda h, down, b_down, up, b_up: (
                    h + F.gelu(F.linear(F.linear(h, down, b_down), up, b_up))
                ),
            ),
        ],
    ),
)


def _ia3_cases() -> list[Case]:
    rows = []
    for o, i, of_input in ((4, 6, False), (5, 3, True), (4, 4, False), (4, 4, True)):
        gain = normal(i if of_input else o, seed=o + i)
        label = f"out={o}, in={i}, the {'input' if of_input else 'output'} is rescaled"
        rows.append(case(label, normal(o, i, seed=o), normal(o, seed=i), gain, of_input))
    return rows


def _ia3(W: Tensor, b: Tensor, gain: Tensor, of_input: bool) -> tuple[Tensor, Tensor]:
    return (W * gain, b) if of_input else (W * gain[:, None], b * gain)


def _ia3_by_shape(W: Tensor, b: Tensor, gain: Tensor, of_input: bool) -> Tensor:
    return W * gain if W.shape[1] == len(gain) else W * gain[:, None]


MERGE_IA3 = Exercise(
    name="merge_ia3",
    title="Merge (IA)³",
    level=2,
    minutes=8,
    task="""
(IA)³ multiplies what a linear layer puts out, $\\ell \\odot (Wx + b)$, or, if `of_input`, what it
reads, $W(\\ell \\odot x) + b$. Return the weight and the bias of a plain layer that computes the
same.
""",
    stub='''
def merge_ia3(
    weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"], gain: Float[Tensor, "G"], of_input: bool
) -> tuple[Float[Tensor, "O I"], Float[Tensor, "O"]]:
    """Weight and bias with the gains in them."""
    raise NotImplementedError
''',
    hints=(
        "Write one output feature as a sum over the inputs. Which numbers of the weight does a "
        "gain of the output multiply, and which does a gain of the input?",
        "Of the output: each row, and the bias with it. Of the input: each column, and the bias "
        "stays.",
    ),
    solution='''
def merge_ia3(
    weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"], gain: Float[Tensor, "G"], of_input: bool
) -> tuple[Float[Tensor, "O I"], Float[Tensor, "O"]]:
    """Weight and bias with the gains in them."""
    if of_input:
        return weight * gain, bias
    return weight * gain[:, None], bias * gain
''',
    why="A gain of an output feature multiplies everything that the feature is made of, its bias "
    "too. A gain of an input feature reaches the weights that read it and nothing else.",
    point="(IA)³ merges exactly, and where a gain is zero no division can take it out again.",
    check=same_function(
        _ia3,
        _ia3_cases,
        mixed(
            {
                "": lambda *a: _ia3(*a)[0],
                "Weight: rows or columns are chosen by the shape, and a square matrix gets the "
                "wrong ones.": _ia3_by_shape,
                "Weight: it is not changed.": lambda W, b, gain, n: W,
                "Weight: the gains divide; that takes them out.": lambda W, b, gain, n: (
                    W / gain if n else W / gain[:, None]
                ),
            },
            {
                "": lambda *a: _ia3(*a)[1],
                "Bias: it stays where the output is rescaled, and so loses its gain.": (
                    lambda W, b, gain, n: b
                ),
                "Bias: it is multiplied though only the input is rescaled.": (
                    lambda W, b, gain, n: b * gain if len(gain) == len(b) else b
                ),
            },
        ),
        names=("the weight", "the bias"),
    ),
)


# --- Ranks, tasks and bytes -----------------------------------------------------------------------


def _rank_cases() -> list[Case]:
    decay = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])
    left, right = (torch.linalg.qr(normal(n, 5, seed=n))[0] for n in (7, 6))
    smooth = left * decay @ right.T
    flat = left @ right.T
    thin = normal(7, 2, seed=1) @ normal(2, 6, seed=2)
    return [
        case("singular values 8, 4, 2, 1, 1/2; 10 %", smooth, 0.1),
        case("singular values 8, 4, 2, 1, 1/2; 30 %", smooth, 0.3),
        case("singular values 8, 4, 2, 1, 1/2; 60 %", smooth, 0.6),
        case("five singular values of 1; 50 %", flat, 0.5),
        case("a product of two thin matrices; 1 %", thin, 0.01),
    ]


def _errors(delta: Tensor, power: float = 2.0, root: bool = True) -> Tensor:
    """Relative error of the best approximation of rank 0, 1, 2, ..."""
    s = torch.linalg.svdvals(delta.double()) ** power
    rest = torch.cat((s.flip(0).cumsum(0).flip(0), torch.zeros(1))).clamp(min=0) / s.sum()
    return rest.sqrt() if root else rest


def _smallest_rank(delta: Tensor, tolerance: float, **how) -> int:
    return int((_errors(delta, **how) > tolerance).sum())


RANK_NEEDED = Exercise(
    name="rank_needed",
    title="Which rank is enough?",
    level=3,
    minutes=10,
    task="""
`delta` is what full fine-tuning added to a weight. Return the smallest rank $R$ for which some
matrix $\\Delta_R$ of rank $R$ comes so near that the relative error
$\\lVert \\Delta - \\Delta_R \\rVert_F / \\lVert \\Delta \\rVert_F$ is at most `tolerance`. The
norm is the root of the sum of all squared entries.
""",
    stub='''
def rank_needed(delta: Float[Tensor, "O I"], tolerance: float) -> int:
    """The smallest rank that comes as near as the tolerance."""
    raise NotImplementedError
''',
    hints=(
        "The nearest matrix of rank R keeps the R largest singular values. What is left over is "
        "made of the others.",
        "The squared norm of a matrix is the sum of the squares of its singular values. Compare "
        "the root of the share that is left with the tolerance.",
    ),
    solution='''
def rank_needed(delta: Float[Tensor, "O I"], tolerance: float) -> int:
    """The smallest rank that comes as near as the tolerance."""
    energy = torch.linalg.svdvals(delta) ** 2
    for r in range(len(energy) + 1):
        if (energy[r:].sum() / energy.sum()).sqrt() <= tolerance:
            return r
''',
    why="By the theorem of Eckart and Young no matrix of rank R is nearer. LoRA's two factors can "
    "express every matrix of rank R, so this is the least error that LoRA could reach.",
    point="A low rank is a claim about singular values, which you can measure before you tune.",
    check=same_function(
        lambda delta, tolerance: _smallest_rank(delta, tolerance),
        _rank_cases,
        [
            Mistake(
                "The share of the squares is compared, without its root.",
                lambda d, t: _smallest_rank(d, t, root=False),
            ),
            Mistake(
                "The singular values are summed as they are; a norm is made of their squares.",
                lambda d, t: _smallest_rank(d, t, power=1.0, root=False),
            ),
            Mistake("That is one rank too many.", lambda d, t: _smallest_rank(d, t) + 1, hint=2),
            Mistake(
                "That is one rank too few; its error is above the tolerance.",
                lambda d, t: _smallest_rank(d, t) - 1,
                hint=2,
            ),
            Mistake(
                "This counts the singular values that are above a share of the largest one.",
                lambda d, t: int(
                    (torch.linalg.svdvals(d) > t * torch.linalg.svdvals(d).max()).sum()
                ),
            ),
            Mistake(
                "This is the rank of the matrix, whatever the tolerance.",
                lambda d, t: int(torch.linalg.matrix_rank(d)),
            ),
        ],
    ),
)


def _switch_cases() -> list[Case]:
    return [
        case(
            f"in={i}, out={o}, ranks {r} and {R}",
            normal(o, i, seed=i),
            (normal(r, i, seed=1), normal(o, r, seed=2), a),
            (normal(R, i, seed=3), normal(o, R, seed=4), b),
        )
        for i, o, r, R, a, b in ((5, 7, 2, 3, 6.0, 1.5), (6, 4, 1, 2, 2.5, 8.0))
    ]


def _update(task: tuple, scaled: bool = True) -> Tensor:
    A, B, alpha = task
    return B @ A * (alpha / len(A) if scaled else 1.0)


SWITCH_TASK = Exercise(
    name="switch_task",
    title="From one task to another",
    level=1,
    minutes=5,
    task="""
A layer's weight is merged with the update of an old task. Return the weight merged with that of a
new task instead. Each task is a tuple of $A$, $B$ and $\\alpha$; their ranks differ.
""",
    stub='''
def switch_task(merged: Float[Tensor, "O I"], old: tuple, new: tuple) -> Float[Tensor, "O I"]:
    """The weight with the new task in it in the place of the old one."""
    raise NotImplementedError
''',
    hints=(
        "What did the merge of the old task add? Take that out before the other goes in.",
        "Write a small function for the update of one task, with its own alpha and its own rank, "
        "and use it twice.",
    ),
    solution='''
def switch_task(merged: Float[Tensor, "O I"], old: tuple, new: tuple) -> Float[Tensor, "O I"]:
    """The weight with the new task in it in the place of the old one."""

    def update(A, B, alpha):
        return alpha / len(A) * B @ A

    return merged - update(*old) + update(*new)
''',
    why="A merged update is still a matrix that can be subtracted. In float numbers a little "
    "rounding stays behind each time, which is why the package keeps a copy instead.",
    point="One base can serve many tasks: switching costs two thin products and two sums.",
    check=same_function(
        lambda W, old, new: W - _update(old) + _update(new),
        _switch_cases,
        [
            Mistake("The old task is still in the weight.", lambda W, old, new: W + _update(new)),
            Mistake(
                "The new task is missing: this is the base.", lambda W, old, new: W - _update(old)
            ),
            Mistake(
                "The old task is added again and the new one taken out.",
                lambda W, old, new: W + _update(old) - _update(new),
            ),
            Mistake(
                "The updates are not scaled by alpha / r.",
                lambda W, old, new: W - _update(old, False) + _update(new, False),
            ),
            Mistake(
                "The new task is scaled with the alpha and the rank of the old one.",
                lambda W, old, new: W - _update(old) + new[1] @ new[0] * (old[2] / len(old[0])),
            ),
        ],
    ),
)


def _bits() -> tuple[float, float, float]:
    single, double = 4 + 32 / 64, 4 + (8 + 32 / 256) / 64
    return single, double, 7e9 * double / 8 / 1e9


QLORA_BYTES = Exercise(
    name="qlora_bytes",
    title="How large is a model in four bits?",
    level=2,
    minutes=6,
    task="""
QLoRA stores each weight in 4 bits, and one scale of 32 bits for each block of 64 weights. Double
quantisation stores these scales in 8 bits each instead, and one scale of 32 bits for each group of
256 of them. Give the bits for a weight without and with double quantisation, and the gigabytes
($10^9$ bytes) of $7 \\cdot 10^9$ weights with it. Do not round.
""",
    stub="""
qlora_bytes = (
    ...,  # bits a weight, without double quantisation
    ...,  # bits a weight, with it
    ...,  # gigabytes of 7e9 weights, with it
)
""",
    hints=(
        "Spread each scale over the weights that share it, and add that to the four bits.",
        "With double quantisation a block of 64 weights pays 8 bits, and its share of 32 bits that "
        "256 blocks pay together. A byte has eight bits.",
    ),
    solution="""
qlora_bytes = (
    4 + 32 / 64,
    4 + 8 / 64 + 32 / (64 * 256),
    7e9 * (4 + 8 / 64 + 32 / (64 * 256)) / 8 / 1e9,
)
""",
    why="The scales cost half a bit a weight, and an eighth after the second quantisation. In 16 "
    "bits the same model has 14 GB.",
    point="Small things that come with every block are no longer small: an eighth of the weights.",
    check=same_value(
        _bits,
        [
            Mistake(
                "The first: the scale of each block is missing.",
                when=lambda got, _: abs(got[0] - 4) < 1e-3,
            ),
            Mistake(
                "The first: each weight pays a whole scale. Sixty-four share it.",
                when=lambda got, _: got[0] >= 30,
            ),
            Mistake(
                "The second: the scales of the scales are missing.",
                when=lambda got, want: abs(got[0] - want[0]) < 1e-3 and got[1] == 4 + 8 / 64,
            ),
            Mistake(
                "The second: the scales of the scales are shared by 256 weights; it is 256 blocks.",
                when=lambda got, want: (
                    abs(got[0] - want[0]) < 1e-3 and abs(got[1] - (4 + 8 / 64 + 32 / 256)) < 1e-4
                ),
            ),
            Mistake(
                "The third is without double quantisation.",
                when=lambda got, want: got[:1] == want[:1] and abs(got[2] - 3.9375) < 1e-3,
            ),
            Mistake(
                "The third is in gigabits. Eight bits make a byte.",
                when=lambda got, want: abs(got[2] - 8 * want[2]) < 0.1,
            ),
            Mistake(
                "The third is in bytes, and gigabytes are asked for.",
                when=lambda got, want: got[2] > 1e6,
            ),
        ],
        names=("bits, one quantisation", "bits, two quantisations", "gigabytes"),
        rtol=1e-4,
    ),
)


# --- The chapter ---------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        LORA_FORWARD,
        LORA_GRADIENTS,
        MERGE_LORA,
        FIX_LORA,
        WHAT_TRAINS,
        RANK_NEEDED,
        SWITCH_TASK,
        ADAPTER_FORWARD,
        MERGE_IA3,
        COUNT_PARAMETERS,
        QLORA_BYTES,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
