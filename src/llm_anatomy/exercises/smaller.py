"""Exercises of the chapter "Smaller models: distillation and progressive shrinking".

What is compared with: the package's losses, autograd, loops in float64, and layers that are cut
and run.
"""

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
    normal,
    same_function,
    unrepaired,
)
from llm_anatomy.peft.distillation import alternate_layers

# --- Shared by several checks --------------------------------------------------------------------


def _softened(z: Tensor, temperature: float) -> Tensor:
    return (z.double() / temperature).softmax(dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Of each row, in nats."""
    return (p * (p.log() - q.log())).sum(dim=-1)


def _logit_cases() -> list[Case]:
    return [
        case(f"N={N}, V={V}, T={T}", 2 * normal(N, V, seed=i), 2 * normal(N, V, seed=i + 9), T)
        for i, (N, V, T) in enumerate([(4, 6, 2.0), (3, 5, 4.0), (1, 7, 0.5)])
    ]


# --- Softening -----------------------------------------------------------------------------------

SOFTEN = Exercise(
    name="soften",
    title="Soften a distribution",
    level=1,
    minutes=4,
    task="""
A teacher gives logits $(N, V)$: $N$ rows of $V$ scores. Return its **softened** distributions at
temperature $T$, the softmax of each row of logits divided by $T$.
""",
    stub='''
def soften(logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """Probabilities of each row at a temperature."""
    raise NotImplementedError
''',
    hints=(
        "A high temperature must make the scores of a row more alike, before the exponential.",
        "Divide the logits, not the probabilities, and normalise over the vocabulary.",
    ),
    solution='''
def soften(logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """Probabilities of each row at a temperature."""
    return (logits / temperature).softmax(dim=-1)
''',
    why="The ratio of two probabilities is taken to the power 1/T. As T grows all become equal, "
    "as T falls to 0 the largest takes everything; the order never changes.",
    point="A temperature bends the ratios of probabilities and never their order.",
    check=same_function(
        _softened,
        lambda: [case(c.label, c.args[0], c.args[2]) for c in _logit_cases()],
        [
            Mistake(
                "The logits are multiplied by the temperature: that sharpens where it should "
                "soften.",
                lambda z, T: _softened(z, 1 / T),
            ),
            Mistake(
                "The probabilities are divided by the temperature, so a row no longer sums to 1.",
                lambda z, T: _softened(z, 1.0) / T,
            ),
            Mistake(
                "The softmax runs down the rows, over the examples. It belongs to the vocabulary.",
                lambda z, T: (z.double() / T).softmax(dim=0),
            ),
            Mistake(
                "The temperature is not used: this is the distribution at T = 1.",
                lambda z, T: _softened(z, 1.0),
            ),
            Mistake(
                "These are logarithms of the probabilities.",
                lambda z, T: _softened(z, T).log(),
            ),
            Mistake(
                "The probabilities are softened once more by a softmax over probabilities.",
                lambda z, T: _softened(_softened(z, 1.0), T),
            ),
        ],
    ),
)


# --- The loss ------------------------------------------------------------------------------------


def _loss(z: Tensor, v: Tensor, T: float) -> Tensor:
    return T**2 * _kl(_softened(v, T), _softened(z, T)).mean()


SOFT_LOSS = Exercise(
    name="soft_loss",
    title="The loss on soft targets",
    level=2,
    minutes=9,
    task="""
Write Hinton's loss on soft targets. `student` and `teacher` are logits $(N, V)$. Soften **both**
with the temperature $T$, take the Kullback–Leibler divergence from the teacher $p$ to the student
$q$ of each row, $\\sum_j p_j \\ln (p_j / q_j)$, average over the rows, and multiply by $T^2$.
""",
    stub='''
def soft_loss(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], temperature: float
) -> Float[Tensor, ""]:
    """T² times the mean divergence from teacher to student, in nats."""
    raise NotImplementedError
''',
    hints=(
        "Four decisions: what is softened, which of the two weighs the sum, over what the mean "
        "runs, and what scales the result.",
        "F.kl_div takes the logarithms of the student first and the teacher second, and its "
        "reduction 'batchmean' sums over the vocabulary and averages over rows.",
    ),
    solution='''
def soft_loss(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], temperature: float
) -> Float[Tensor, ""]:
    """T² times the mean divergence from teacher to student, in nats."""
    log_q = (student / temperature).log_softmax(dim=-1)
    p = (teacher / temperature).softmax(dim=-1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")
''',
    why="The teacher weighs the sum, so the student must put probability wherever the teacher "
    "does. Softening shrinks the gradient by about T²; the factor gives it its size back, so "
    "that a mixture with a loss on labels keeps its proportions when T changes.",
    point="Both sides are softened, the teacher weighs the sum, and T² keeps the gradient's size.",
    check=same_function(
        _loss,
        _logit_cases,
        [
            Mistake(
                "The factor T² is forgotten, so the gradient shrinks when the temperature rises.",
                lambda z, v, T: _loss(z, v, T) / T**2,
            ),
            Mistake(
                "The factor is T. Both derivatives bring a 1/T, so it takes T².",
                lambda z, v, T: _loss(z, v, T) / T,
            ),
            Mistake(
                "The direction is swapped: the student weighs the sum, and may leave out what the "
                "teacher finds likely.",
                lambda z, v, T: _loss(v, z, T),
            ),
            Mistake(
                "Only the teacher is softened: a student that equals it would not have loss 0.",
                lambda z, v, T: T**2 * _kl(_softened(v, T), _softened(z, 1.0)).mean(),
            ),
            Mistake(
                "Only the student is softened: a student that equals the teacher would not have "
                "loss 0.",
                lambda z, v, T: T**2 * _kl(_softened(v, 1.0), _softened(z, T)).mean(),
            ),
            Mistake(
                "The mean runs over the vocabulary too (F.kl_div's reduction 'mean'). A divergence "
                "sums over it.",
                lambda z, v, T: _loss(z, v, T) / z.shape[-1],
            ),
            Mistake(
                "The rows are summed and not averaged, so the loss grows with the batch.",
                lambda z, v, T: _loss(z, v, T) * len(z),
            ),
            Mistake(
                "This is the cross-entropy: the teacher's own entropy is not taken away, so a "
                "perfect student has a loss above 0.",
                lambda z, v, T: (
                    T**2 * -(_softened(v, T) * _softened(z, T).log()).sum(dim=-1).mean()
                ),
            ),
        ],
    ),
)


# --- Its gradient --------------------------------------------------------------------------------


def _gradient(z: Tensor, v: Tensor, T: float) -> Tensor:
    z = z.double().requires_grad_()
    return torch.autograd.grad(_loss(z, v, T), z)[0]


SOFT_GRADIENT = Exercise(
    name="soft_gradient",
    title="What the student hears",
    level=2,
    minutes=8,
    task="""
Derive the gradient of that loss by the student's logits, and write it **without autograd**: with
$p$ and $q$ the softened distributions of teacher and student, the loss is the mean over $N$ rows of
$T^2 \\sum_j p_j \\ln (p_j / q_j)$. Return $(N, V)$.
""",
    stub='''
def soft_gradient(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], temperature: float
) -> Float[Tensor, "N V"]:
    """Derivative of the loss by each logit of the student."""
    raise NotImplementedError
''',
    hints=(
        "For a plain softmax, the derivative of the cross-entropy by the logits is the prediction "
        "minus the target. What does a division inside it change?",
        "The chain rule brings one factor 1/T from inside the softmax; the loss itself has T² in "
        "front, and the mean brings 1/N.",
    ),
    solution='''
def soft_gradient(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], temperature: float
) -> Float[Tensor, "N V"]:
    """Derivative of the loss by each logit of the student."""
    q = (student / temperature).softmax(dim=-1)
    p = (teacher / temperature).softmax(dim=-1)
    return temperature * (q - p) / len(student)
''',
    why="One T of the T² is used up by the chain rule. The other one makes up for the difference "
    "q - p, which itself shrinks like 1/T. So the product keeps its size.",
    point="The student is told, for each token, how much too likely it finds it.",
    check=same_function(
        _gradient,
        _logit_cases,
        [
            Mistake(
                "The sign is that of the step, not of the gradient: it should be q - p.",
                lambda z, v, T: -_gradient(z, v, T),
            ),
            Mistake(
                "A factor T is missing: T² in front, 1/T from inside the softmax.",
                lambda z, v, T: _gradient(z, v, T) / T,
            ),
            Mistake(
                "A factor T too many: the chain rule's 1/T from inside the softmax is forgotten.",
                lambda z, v, T: _gradient(z, v, T) * T,
            ),
            Mistake(
                "This is the gradient of the loss without its T².",
                lambda z, v, T: _gradient(z, v, T) / T**2,
            ),
            Mistake(
                "The mean over the rows is forgotten: it brings a factor 1/N.",
                lambda z, v, T: _gradient(z, v, T) * len(z),
            ),
            Mistake(
                "The distributions are not softened; this is T times the difference at T = 1.",
                lambda z, v, T: T * (_softened(z, 1.0) - _softened(v, 1.0)) / len(z),
            ),
        ],
    ),
)


# --- The limit -----------------------------------------------------------------------------------


def _centred(z: Tensor) -> Tensor:
    return z.double() - z.double().mean(dim=-1, keepdim=True)


def _limit(z: Tensor, v: Tensor) -> Tensor:
    return 0.5 * (_centred(z) - _centred(v)).square().mean()


LIMIT = Exercise(
    name="hot_limit",
    title="Infinitely hot",
    level=3,
    minutes=12,
    task="""
What does the loss on soft targets become when the temperature goes to infinity? Let $\\bar z$ and
$\\bar v$ be the logits $(N, V)$ of student and teacher, each row **less its own mean**. Expand
$e^{z/T} \\approx 1 + z/T$ in the softmax, and return the limit of
$T^2 \\sum_j p_j \\ln (p_j / q_j)$, averaged over the $N$ rows. It holds no exponential any more.
(The second-order form of the divergence of two distributions that are close,
$\\sum_j (p_j - q_j)^2 / (2 q_j)$, may help.)
""",
    stub='''
def hot_limit(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]
) -> Float[Tensor, ""]:
    """The loss on soft targets at an infinite temperature."""
    raise NotImplementedError
''',
    hints=(
        "To first order a softened probability is 1/V plus a small part that is the centred logit "
        "over V and T.",
        "Put p - q, which is the difference of the centred logits over V and T, and q = 1/V into "
        "the quadratic form. One V stays below, and T goes away.",
    ),
    solution='''
def hot_limit(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]
) -> Float[Tensor, ""]:
    """The loss on soft targets at an infinite temperature."""
    z = student - student.mean(dim=-1, keepdim=True)
    v = teacher - teacher.mean(dim=-1, keepdim=True)
    return 0.5 * (z - v).square().mean()
''',
    why="At a high temperature distillation is regression on logits. Every logit then counts the "
    "same, those of impossible tokens included, and a teacher says little that is meant there.",
    point="Hot distillation matches logits, the unlikely ones as eagerly as the likely ones.",
    check=same_function(
        _limit,
        lambda: [case(c.label[:8], *(a + 3 * i for i, a in enumerate(c.args[:2])))
                 for c in _logit_cases()],
        [
            Mistake(
                "The logits are not centred. To add a number to all logits of a row changes no "
                "distribution, so it must not change the loss.",
                lambda z, v: 0.5 * (z - v).double().square().mean(),
            ),
            Mistake(
                "The factor 1/2 is missing.",
                lambda z, v: 2 * _limit(z, v),
            ),
            Mistake(
                "The squares are summed over the vocabulary; 1/V of them stays in the limit.",
                lambda z, v: _limit(z, v) * z.shape[-1],
            ),
            Mistake(
                "There is one V too many below.",
                lambda z, v: _limit(z, v) / z.shape[-1],
            ),
            Mistake(
                "This is summed over the rows; the loss is their mean.",
                lambda z, v: _limit(z, v) * len(z),
            ),
            Mistake(
                "The mean of all rows together is taken away; each row has a mean of its own.",
                lambda z, v: (
                    0.5 * ((z - z.mean()) - (v - v.mean())).double().square().mean()
                ),
            ),
        ],
    ),
)  # fmt: skip


# --- Labels too ----------------------------------------------------------------------------------


def _mixture_cases() -> list[Case]:
    rows = []
    for i, (N, V, T, share) in enumerate([(5, 6, 2.0, 0.7), (6, 4, 3.0, 0.2), (4, 5, 0.5, 0.9)]):
        targets = (normal(N, seed=i + 30).abs() * 10).long() % V
        targets[1] = targets[-1] = -100
        label = f"N={N}, V={V}, T={T}, soft={share}"
        rows.append(case(label, normal(N, V, seed=i), normal(N, V, seed=i + 9), targets, T, share))
    return rows


def _mixture(
    z: Tensor,
    v: Tensor,
    y: Tensor,
    T: float,
    share: float,
    *,
    hard_T: float | None = None,
    square: float = 1.0,
    everywhere: bool = False,
    swap: bool = False,
) -> Tensor:
    counted = torch.ones_like(y, dtype=torch.bool) if everywhere else y != -100
    soft = _loss(z[counted], v[counted], T)
    real = y != -100
    hard = F.cross_entropy(z[real].double() / (hard_T or 1.0), y[real]) * square
    share = 1 - share if swap else share
    return share * soft + (1 - share) * hard


MIXED = Exercise(
    name="mixed_loss",
    title="Soft and hard together",
    level=2,
    minutes=9,
    task="""
Mix the two sources of knowledge: `soft` times the loss on soft targets (as above, with its $T^2$)
plus `1 - soft` times the ordinary cross-entropy with the labels. Where a label is $-100$ the
position counts in **neither** mean.
""",
    stub='''
def mixed_loss(
    student: Float[Tensor, "N V"],
    teacher: Float[Tensor, "N V"],
    targets: Int[Tensor, "N"],
    temperature: float,
    soft: float,
) -> Float[Tensor, ""]:
    """soft * (loss on soft targets) + (1 - soft) * (cross-entropy with the labels)."""
    raise NotImplementedError
''',
    hints=(
        "Only one of the two losses has a temperature. Take the counted rows out first, and both "
        "means are right by themselves.",
        "A label is no distribution that could be softened: the cross-entropy uses the student's "
        "logits as they are, and no T².",
    ),
    solution='''
def mixed_loss(
    student: Float[Tensor, "N V"],
    teacher: Float[Tensor, "N V"],
    targets: Int[Tensor, "N"],
    temperature: float,
    soft: float,
) -> Float[Tensor, ""]:
    """soft * (loss on soft targets) + (1 - soft) * (cross-entropy with the labels)."""
    counted = targets != -100
    z, v = student[counted], teacher[counted]
    log_q = (z / temperature).log_softmax(dim=-1)
    p = (v / temperature).softmax(dim=-1)
    from_teacher = temperature**2 * F.kl_div(log_q, p, reduction="batchmean")
    return soft * from_teacher + (1 - soft) * F.cross_entropy(z, targets[counted])
''',
    why="With T² in the first loss, its gradient has the size of the second's at every "
    "temperature, so the share means the same whatever T is.",
    point="The temperature belongs to the soft targets alone; labels stay hard.",
    check=same_function(
        _mixture,
        _mixture_cases,
        [
            Mistake(
                "The shares are swapped: `soft` belongs to the teacher.",
                lambda *a: _mixture(*a, swap=True),
            ),
            Mistake(
                "The cross-entropy with the labels is softened too. The student is used at T = 1.",
                lambda *a: _mixture(*a, hard_T=a[3]),
            ),
            Mistake(
                "The T² multiplies the loss on labels as well.",
                lambda *a: _mixture(*a, square=a[3] ** 2),
            ),
            Mistake(
                "The soft targets count where there is no label, at padding for example.",
                lambda *a: _mixture(*a, everywhere=True),
            ),
            Mistake(
                "The factor T² is missing in the loss on soft targets.",
                lambda z, v, y, T, s: (
                    _mixture(z, v, y, T, s) - s * (1 - T**-2) * _mixture(z, v, y, T, 1.0)
                ),
            ),
            Mistake(
                "The cross-entropy is summed over the labels and divided by all positions, those "
                "without a label among them.",
                lambda z, v, y, T, s: (
                    _mixture(z, v, y, T, s)
                    - (1 - s) * (y == -100).double().mean() * _mixture(z, v, y, T, 0.0)
                ),
            ),
            Mistake(
                "The two losses are added in full; the shares are not used.",
                lambda z, v, y, T, s: _mixture(z, v, y, T, 1.0) + _mixture(z, v, y, T, 0.0),
            ),
        ],
    ),
)


# --- Repair --------------------------------------------------------------------------------------

_BUGS = {
    "gradient": "the teacher receives a gradient, so it learns to be easy to imitate",
    "side": "the student is not softened, the teacher is",
    "direction": "the divergence runs from the student to the teacher",
    "square": "the factor T² is missing",
}


def _step(*bugs: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def step(x: Tensor, student: Tensor, teacher: Tensor, T: float):
        ours = student.detach().double().requires_grad_()
        theirs = teacher.detach().double().requires_grad_()
        v = x.double() @ theirs.T
        v = v if "gradient" in bugs else v.detach()
        q = _softened(x.double() @ ours.T, 1.0 if "side" in bugs else T)
        p = _softened(v, T)
        loss = (_kl(q, p) if "direction" in bugs else _kl(p, q)).mean()
        loss = loss if "square" in bugs else T**2 * loss
        gradients = torch.autograd.grad(loss, (ours, theirs), materialize_grads=True)
        return loss.detach(), *gradients

    return step


FIX_STEP = Exercise(
    name="fix_step",
    title="Four mistakes in a step of distillation",
    level=3,
    minutes=10,
    task="""
One step of distillation for two linear models with weights $(V, D)$: it returns the loss and its
gradient by the weights of the student and of the teacher. It runs, and the loss falls. It holds
**four** mistakes. Repair them. (`F.kl_div(a, b, log_target=True)` is the divergence **from** the
distribution with logarithms `b` **to** the one with logarithms `a`.)
""",
    stub='''
def fix_step(
    x: Float[Tensor, "N D"],
    student: Float[Tensor, "V D"],
    teacher: Float[Tensor, "V D"],
    temperature: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "V D"], Float[Tensor, "V D"]]:
    """The loss, its gradient by the student, and its gradient by the teacher."""
    student = student.clone().requires_grad_()
    teacher = teacher.clone().requires_grad_()
    z = x @ student.T
    v = x @ teacher.T
    log_q = z.log_softmax(dim=-1)
    log_p = (v / temperature).log_softmax(dim=-1)
    loss = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    by_student, by_teacher = torch.autograd.grad(
        loss, (student, teacher), materialize_grads=True
    )
    return loss.detach(), by_student, by_teacher
''',
    hints=(
        "Ask of each line: is it softened, is it in the right place, may it learn? The last "
        "mistake is something that is not there.",
        "The teacher's scores have to leave the graph, both sides need the temperature, the "
        "student comes first in F.kl_div, and the loss has lost its scale.",
    ),
    solution='''
def fix_step(
    x: Float[Tensor, "N D"],
    student: Float[Tensor, "V D"],
    teacher: Float[Tensor, "V D"],
    temperature: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "V D"], Float[Tensor, "V D"]]:
    """The loss, its gradient by the student, and its gradient by the teacher."""
    student = student.clone().requires_grad_()
    teacher = teacher.clone().requires_grad_()
    z = x @ student.T
    v = (x @ teacher.T).detach()
    log_q = (z / temperature).log_softmax(dim=-1)
    log_p = (v / temperature).log_softmax(dim=-1)
    loss = temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    by_student, by_teacher = torch.autograd.grad(
        loss, (student, teacher), materialize_grads=True
    )
    return loss.detach(), by_student, by_teacher
''',
    why="All four give a loss that falls, which is why they are common. A teacher that is trained "
    "too walks towards the student; the other three teach another distribution, or with another "
    "weight beside the labels.",
    point="A falling loss does not prove that the right thing is learned from the right one.",
    check=same_function(
        _step(),
        lambda: [
            case(
                f"N={N}, V={V}, D={D}, T={T}",
                normal(N, D, seed=i),
                normal(V, D, seed=i + 9),
                normal(V, D, seed=i + 19),
                T,
            )
            for i, (N, V, D, T) in enumerate([(4, 6, 3, 2.0), (5, 3, 4, 3.0)])
        ],
        unrepaired(_BUGS, _step),
        names=("the loss", "the student's gradient", "the teacher's gradient"),
    ),
)


# --- First weights -------------------------------------------------------------------------------

LAYERS = Exercise(
    name="student_layers",
    title="Which layers does the student get?",
    level=1,
    minutes=6,
    task="""
A student with $K \\geq 2$ layers starts from layers of a teacher with $N \\geq K$: **evenly spaced,
the first and the last among them**. The $i$-th of them, counted from 0, is $i (N - 1)/(K - 1)$,
rounded to the nearest integer, and up where it lies in the middle. For $N = 12$ and $K = 6$ that
gives DistilBERT's. Return their numbers.
""",
    stub='''
def student_layers(N: int, K: int) -> list[int]:
    """Numbers of the teacher's layers, one for each layer of the student."""
    raise NotImplementedError
''',
    hints=(
        "K numbers have K - 1 steps between them. Mind that Python's round takes halves to the "
        "even neighbour.",
        "To round to the nearest integer, halves up, add one half and cut off what follows the "
        "point.",
    ),
    solution='''
def student_layers(N: int, K: int) -> list[int]:
    """Numbers of the teacher's layers, one for each layer of the student."""
    return [int(i * (N - 1) / (K - 1) + 0.5) for i in range(K)]
''',
    why="For 12 and 6 these are 0, 2, 4, 7, 9 and 11, the layers in DistilBERT's published script: "
    "every other one, shifted in the middle so that both ends are kept.",
    point="Evenly spaced with both ends gives 0, 2, 4, 7, 9, 11 of 12.",
    check=same_function(
        lambda N, K: list(alternate_layers(N, K)),
        [
            case(f"N={N}, K={K}", N, K)
            for N, K in [(12, 6), (6, 3), (12, 4), (5, 5), (4, 3), (24, 2)]
        ],
        [
            Mistake(
                "These are the first layers of the teacher, taken from the front.",
                lambda N, K: list(range(K)),
            ),
            Mistake(
                "These are the last layers of the teacher, taken from the back.",
                lambda N, K: list(range(N - K, N)),
            ),
            Mistake(
                "The step is N/K, so the last layer of the teacher is never taken.",
                lambda N, K: [int(i * N / K) for i in range(K)],
            ),
            Mistake(
                "The numbers are cut off and not rounded.",
                lambda N, K: [int(i * (N - 1) / (K - 1)) for i in range(K)],
            ),
            Mistake(
                "The numbers are always rounded up, not to the nearest integer.",
                lambda N, K: [-(-i * (N - 1) // (K - 1)) for i in range(K)],
            ),
            Mistake(
                "The numbers start at 1. Layers are counted from 0.",
                lambda N, K: [n + 1 for n in alternate_layers(N, K)],
            ),
            Mistake(
                "A half is rounded to the even neighbour, as Python's round does it; here it "
                "goes up.",
                lambda N, K: [round(i * (N - 1) / (K - 1)) for i in range(K)],
            ),
        ],
    ),
)


# --- Hidden states -------------------------------------------------------------------------------


def _directions(h: Tensor, g: Tensor, keep: Tensor) -> Tensor:
    pairs = [
        1 - (a @ b) / (a.norm() * b.norm())
        for a, b in zip(h[keep].double(), g[keep].double(), strict=True)
    ]
    return torch.stack(pairs).mean()


HIDDEN = Exercise(
    name="direction_loss",
    title="The same direction",
    level=2,
    minutes=7,
    task="""
DistilBERT also compares the last hidden states of student and teacher $(B, T, D)$: **one minus the
cosine** of the two vectors at each position, averaged over the real tokens (`keep` is `True` at
these).
""",
    stub='''
def direction_loss(
    student: Float[Tensor, "B T D"],
    teacher: Float[Tensor, "B T D"],
    keep: Bool[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """Mean of 1 - cosine over the real tokens."""
    raise NotImplementedError
''',
    hints=(
        "A cosine compares two vectors of width D. Take the vectors of the real tokens first.",
        "Indexing with keep gives (M, D). F.cosine_similarity with dim=-1 gives M numbers.",
    ),
    solution='''
def direction_loss(
    student: Float[Tensor, "B T D"],
    teacher: Float[Tensor, "B T D"],
    keep: Bool[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """Mean of 1 - cosine over the real tokens."""
    return 1 - F.cosine_similarity(student[keep], teacher[keep], dim=-1).mean()
''',
    why="The loss is 0 where both point the same way, whatever their lengths, and at most 2. It "
    "needs the same width on both sides; else a linear map stands between.",
    point="Directions are compared position by position, and only where there is a token.",
    check=same_function(
        _directions,
        lambda: [
            case(
                f"B={B}, T={T}, D={D}",
                normal(B, T, D, seed=B),
                normal(B, T, D, seed=B + 9),
                torch.arange(T) < torch.tensor([T, *([2] * (B - 1))])[:, None],
            )
            for B, T, D in [(3, 5, 4), (2, 4, 6)]
        ],
        [
            Mistake(
                "The padding counts too.",
                lambda h, g, k: _directions(h, g, torch.ones_like(k)),
            ),
            Mistake(
                "The padding adds nothing, but the mean still divides by all positions.",
                lambda h, g, k: _directions(h, g, k) * k.double().mean(),
            ),
            Mistake(
                "Each sequence has a mean of its own here, so a token of a short one weighs more. "
                "All real tokens count the same.",
                lambda h, g, k: torch.stack(
                    [_directions(a, b, m) for a, b, m in zip(h, g, k, strict=True)]
                ).mean(),
            ),
            Mistake(
                "This is the cosine itself. To minimise it turns the student away from its "
                "teacher.",
                lambda h, g, k: 1 - _directions(h, g, k),
            ),
            Mistake(
                "This is minus the cosine: the gradient is right, but a perfect student has the "
                "loss -1.",
                lambda h, g, k: _directions(h, g, k) - 1,
            ),
            Mistake(
                "The vectors are not divided by their lengths: a dot product is no cosine.",
                lambda h, g, k: 1 - (h[k] * g[k]).double().sum(dim=-1).mean(),
            ),
            Mistake(
                "One cosine is taken of all positions joined into one long vector; each position "
                "has its own.",
                lambda h, g, k: 1 - F.cosine_similarity(h[k].flatten(), g[k].flatten(), dim=0),
            ),
            Mistake(
                "The cosines run along the positions; a vector lies along the width.",
                lambda h, g, k: 1 - F.cosine_similarity(h[k], g[k], dim=0).mean(),
            ),
        ],
    ),
)


# --- Width ---------------------------------------------------------------------------------------


def _kept(
    up: Tensor, bias: Tensor, down: Tensor, n: int, score: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    importance = down.abs().sum(dim=0) if score is None else score(up, down)
    order = importance.argsort(descending=True, stable=True)[:n]
    return up[order], bias[order], down[:, order]


def _unit_cases() -> list[Case]:
    return [
        case(f"D={D}, F={W}, n={n}", normal(W, D, seed=D), normal(W, seed=D + 5),
             normal(D, W, seed=D + 9), n)
        for D, W, n in [(3, 7, 4), (5, 6, 2), (4, 4, 4)]
    ]  # fmt: skip


UNITS = Exercise(
    name="keep_units",
    title="Keep the units that matter",
    level=2,
    minutes=9,
    task="""
A feed-forward layer computes $f(x W_1 + b_1) W_2 + b_2$. Its matrices come as `nn.Linear` stores
them, transposed: `up` has shape $(F, D)$, with the bias $(F)$, and `down` has $(D, F)$. Narrow it
to its `n` most important hidden units, **the most important first**. A unit's importance is the sum
of the absolute weights through which it speaks, those in `down`. Return the narrow `up`, its bias,
and the narrow `down`.
""",
    stub='''
def keep_units(
    up: Float[Tensor, "F D"], bias: Float[Tensor, "F"], down: Float[Tensor, "D F"], n: int
) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"], Float[Tensor, "D n"]]:
    """The n most important units: their rows of `up`, their biases, their columns of `down`."""
    raise NotImplementedError
''',
    hints=(
        "A hidden unit is a row of one matrix, an entry of the bias, and a column of the other: "
        "they must travel together.",
        "Sum the absolute values of `down` over its rows, sort downwards, and index three times "
        "with the first n of the order.",
    ),
    solution='''
def keep_units(
    up: Float[Tensor, "F D"], bias: Float[Tensor, "F"], down: Float[Tensor, "D F"], n: int
) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"], Float[Tensor, "D n"]]:
    """The n most important units: their rows of `up`, their biases, their columns of `down`."""
    order = down.abs().sum(dim=0).argsort(descending=True)[:n]
    return up[order], bias[order], down[:, order]
''',
    why="A layer sums over its hidden units, so their order is free, and with all of them kept "
    "the function does not change. Sorted once, every narrower layer is a prefix.",
    point="A hidden unit is a row, a bias and a column, and the three stay together.",
    check=same_function(
        _kept,
        _unit_cases,
        [
            Mistake(
                "The least important units are kept.",
                lambda u, b, d, n: _kept(u, b, d, n, lambda u, d: -d.abs().sum(dim=0)),
            ),
            Mistake(
                "The right units are kept, but the most important comes last.",
                lambda u, b, d, n: tuple(
                    kept.flip(axis) for kept, axis in zip(_kept(u, b, d, n), (0, 0, 1), strict=True)
                ),
            ),
            Mistake(
                "The importance is a sum of squares, or its root; it should be a sum of absolute "
                "values.",
                lambda u, b, d, n: _kept(u, b, d, n, lambda u, d: d.square().sum(dim=0)),
            ),
            Mistake(
                "The importance is measured at the weights by which a unit listens, those of `up`.",
                lambda u, b, d, n: _kept(u, b, d, n, lambda u, d: u.abs().sum(dim=1)),
            ),
            Mistake(
                "The weights are summed with their signs: strong weights of both signs cancel.",
                lambda u, b, d, n: _kept(u, b, d, n, lambda u, d: d.sum(dim=0)),
            ),
            Mistake(
                "The bias keeps its old order, so units get each other's.",
                lambda u, b, d, n: (_kept(u, b, d, n)[0], b[:n], _kept(u, b, d, n)[2]),
            ),
            Mistake(
                "The columns of `down` keep their old order: units speak with others' voices.",
                lambda u, b, d, n: (*_kept(u, b, d, n)[:2], d[:, :n]),
            ),
            Mistake(
                "The first n units are kept as they stand, without any sorting.",
                lambda u, b, d, n: (u[:n], b[:n], d[:, :n]),
            ),
            Mistake(
                "The right units are kept, but in their old order and not the most important "
                "first.",
                lambda u, b, d, n: _in_old_order(u, b, d, n),
            ),
        ],
        names=("up", "the bias", "down"),
    ),
)


def _in_old_order(up: Tensor, bias: Tensor, down: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    order = down.abs().sum(dim=0).argsort(descending=True)[:n].sort().values
    return up[order], bias[order], down[:, order]


# --- Heads ---------------------------------------------------------------------------------------


def _rows_of(order: Tensor, E: int) -> Tensor:
    return torch.cat([torch.arange(h * E, (h + 1) * E) for h in order.tolist()])


def _heads_in_order(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, order: Tensor, *, bug: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    H = len(order)
    E = len(q) // H
    rows = _rows_of(order.argsort() if bug == "inverse" else order, E)
    if bug == "strided":  # reads a projection as (E, H) instead of (H, E)
        rows = torch.arange(H * E).view(E, H)[:, order].flatten()
    if bug == "first":
        rows = torch.cat([order, torch.arange(H, H * E)])
    turned = o[rows].clone() if bug == "rows" else o[:, rows]
    return (
        q[rows],
        k if bug == "keys" else k[rows],
        v if bug == "values" else v[rows],
        o if bug == "out" else turned,
    )


def _head_cases() -> list[Case]:
    cases = []
    for H, E, order in ((3, 2, [2, 0, 1]), (4, 3, [1, 3, 0, 2]), (2, 4, [1, 0])):
        D = H * E
        weights = [normal(D, D, seed=10 * H + i) for i in range(4)]
        cases.append(case(f"H={H}, E={E}, order={order}", *weights, torch.tensor(order)))
    return cases


HEADS = Exercise(
    name="order_heads",
    title="Put the heads in order",
    level=3,
    minutes=12,
    task="""
Attention with $H$ heads of width $E = D/H$ has four matrices $(D, D)$ as `nn.Linear` stores them,
with the outputs along the rows and the inputs along the columns. The rows $hE$ to $(h + 1)E - 1$ of
`q`, `k` and `v` make the query, key and value of head $h$, and `o` maps the heads, side by side,
back. Put the heads into another order, so that head `order[i]` becomes the $i$-th, **without
changing what the attention computes**. Return the four matrices.
""",
    stub='''
def order_heads(
    q: Float[Tensor, "D D"],
    k: Float[Tensor, "D D"],
    v: Float[Tensor, "D D"],
    o: Float[Tensor, "D D"],
    order: Int[Tensor, "H"],
) -> tuple[
    Float[Tensor, "D D"], Float[Tensor, "D D"], Float[Tensor, "D D"], Float[Tensor, "D D"]
]:
    """q, k, v and o with the heads in another order."""
    raise NotImplementedError
''',
    hints=(
        "A head is a block of E rows, not a row. And what reads the heads must find them where "
        "they now stand.",
        "Number the D rows, view the numbers as (H, E), index with the order and flatten: that "
        "list indexes the rows of three matrices and the columns of the fourth.",
    ),
    solution='''
def order_heads(
    q: Float[Tensor, "D D"],
    k: Float[Tensor, "D D"],
    v: Float[Tensor, "D D"],
    o: Float[Tensor, "D D"],
    order: Int[Tensor, "H"],
) -> tuple[
    Float[Tensor, "D D"], Float[Tensor, "D D"], Float[Tensor, "D D"], Float[Tensor, "D D"]
]:
    """q, k, v and o with the heads in another order."""
    rows = torch.arange(len(q)).view(len(order), -1)[order].flatten()
    return q[rows], k[rows], v[rows], o[:, rows]
''',
    why="The output map sums over heads, so their order is free as long as each head keeps its "
    "own rows in all three projections and its own columns in the last one.",
    point="A head moves as a block: E rows of three matrices and E columns of the fourth.",
    check=same_function(
        _heads_in_order,
        _head_cases,
        [
            Mistake(
                "The permutation is inverted: head `order[i]` should come to place i, and head i "
                "has gone to place `order[i]`.",
                lambda *a: _heads_in_order(*a, bug="inverse"),
            ),
            Mistake(
                "The heads stand where they stood: the matrices are those that were given.",
                lambda q, k, v, o, order: (q, k, v, o),
            ),
            Mistake(
                "A head is read as every H-th row; it is a block of E rows that follow each other.",
                lambda *a: _heads_in_order(*a, bug="strided"),
            ),
            Mistake(
                "Single rows are moved, as if each head had one row only.",
                lambda *a: _heads_in_order(*a, bug="first"),
            ),
            Mistake(
                "The rows of `o` are moved. Its rows are features of the output; the heads lie "
                "along its columns.",
                lambda *a: _heads_in_order(*a, bug="rows"),
            ),
            Mistake(
                "`o` stays as it was, so it takes each head for another one.",
                lambda *a: _heads_in_order(*a, bug="out"),
            ),
            Mistake(
                "The keys stay as they were, so queries meet the keys of another head.",
                lambda *a: _heads_in_order(*a, bug="keys"),
            ),
            Mistake(
                "The values stay as they were: each head averages another head's values.",
                lambda *a: _heads_in_order(*a, bug="values"),
            ),
        ],
        names=("q", "k", "v", "o"),
    ),
)


# --- The chapter ---------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        SOFTEN,
        SOFT_LOSS,
        SOFT_GRADIENT,
        LIMIT,
        MIXED,
        FIX_STEP,
        LAYERS,
        HIDDEN,
        UNITS,
        HEADS,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
