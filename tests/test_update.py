"""Update rules: the numbers of the rounds, the contract of `update_`, and that AdamW is torch's AdamW.

Every backend against spec.py is in test_ops.py's `test_case`: the cases of check.py hold update_ too.
"""

import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import hosfl_kernels as hk
from hosfl_kernels import _cpp, check, cpu, reference, spec
from hosfl_kernels.place import DISTRIBUTIONS, Place
from hosfl_kernels.tensors import DTYPES

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
RULES = [
    hk.SGD(),
    hk.SGD(weight_decay=0.1),
    hk.SGD(momentum=0.9, weight_decay=0.1),
    hk.AdamW(betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1),
]
KINDS = [*((dtype, "nearest") for dtype in DTYPES), (torch.bfloat16, "stochastic")]
FIRST_ROUND = 7  # a run is under way: Adam's t is not 1


def bits(x):
    return x.detach().cpu().contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def same(left, right):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(left, right, strict=True))


class State:
    """Weights and moments, and the calls that move them."""

    def __init__(self, rule, tensors):
        self.rule = rule
        self.tensors = tensors
        self.moments = [[torch.zeros_like(x, dtype=torch.float32) for x in tensors] for _ in range(rule.moments)]

    def copy(self):
        other = State(self.rule, [x.clone() for x in self.tensors])
        other.moments = [[m.clone() for m in kept] for kept in self.moments]
        return other

    def move(self, record, rows=slice(None), **place):
        seeds, coefficients, steps, rounding_seeds = (None if part is None else part[rows] for part in record)
        rounding = {"rounding": "stochastic", "rounding_seeds": rounding_seeds} if rounding_seeds is not None else {}
        hk.update_(self.tensors, self.moments, self.rule, seeds, coefficients, steps, **rounding, **place)

    def all(self):
        return [*self.tensors, *(m for kept in self.moments for m in kept)]


def record(rule, rounds, directions, rounding="nearest"):
    """Seeds, coefficients, steps and rounding seeds, different in every number."""
    generator = torch.Generator().manual_seed(rounds * 100 + directions)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rounds, directions), generator=generator)
    coefficients = torch.randn(rounds, directions, generator=generator) * 0.3
    rates = [0.02 / (1 + r) for r in range(rounds)]
    steps = rule.steps(range(FIRST_ROUND, FIRST_ROUND + rounds), rates)
    rounding_seeds = torch.arange(rounds) - 3 if rounding == "stochastic" else None
    return seeds, coefficients, steps, rounding_seeds


def weights(n, dtype=torch.float32, device="cpu"):
    return (torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.1).to(dtype).to(device)


# --- the rules' numbers ---------------------------------------------------------------------------------------


def test_steps_are_made_of_the_global_round():
    rule = hk.AdamW(betas=(0.9, 0.999), weight_decay=0.01)
    rounds, rates = [0, 1, 9, 123_456], [1e-3, 2e-3, 3e-3, 4e-3]
    steps = rule.steps(rounds, rates)
    assert steps.dtype == np.float32
    assert steps.shape == (4, 3)
    for row, round_, rate in zip(steps, rounds, rates, strict=True):
        t = round_ + 1
        want = rate / (1 - 0.9**t), 1 - rate * 0.01, 1 / math.sqrt(1 - 0.999**t)
        assert np.allclose(row.astype(np.float64), want, rtol=2**-24, atol=0)
    assert (np.concatenate([rule.steps([r], [x]) for r, x in zip(rounds, rates, strict=True)]) == steps).all()
    sgd = hk.SGD(momentum=0.5, weight_decay=0.25).steps([3, 4], [0.5, 1.0])
    assert sgd.tolist() == [[0.5, 0.875, 1.0], [1.0, 0.75, 1.0]]
    assert hk.SGD().steps([], []).shape == (0, 3)


def test_steps_round_once():
    # 1 - rate * decay in float32 would be 1 - 2^-24 rounded twice; powers are by squaring, not by the machine's pow.
    assert hk.SGD(weight_decay=0.3).steps([0], [0.1])[0, 1].item() == float(np.float32(1 - 0.1 * 0.3))
    squared = 0.999 * 0.999
    root = 1 / math.sqrt(1 - squared * 0.999)
    assert hk.AdamW().steps([2], [1.0])[0, 2].item() == float(np.float32(root))


def test_moments():
    assert [rule.moments for rule in (hk.SGD(), hk.SGD(momentum=0.9), hk.AdamW())] == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hk.SGD(momentum=1.0), "momentum must be at least 0 and below 1"),
        (lambda: hk.SGD(momentum=1 - 1e-12), "below 1 in float32"),
        (lambda: hk.SGD(momentum=float("nan")), "momentum"),
        (lambda: hk.SGD(weight_decay=-0.1), "weight_decay must be finite and 0 or more, got -0.1"),
        (lambda: hk.AdamW(betas=(0.9, 1.0)), "betas\\[1\\] must be at least 0 and below 1"),
        (lambda: hk.AdamW(betas=(-0.1, 0.9)), "betas\\[0\\]"),
        (lambda: hk.AdamW(betas=(0.9,)), "betas must be two numbers"),
        (lambda: hk.AdamW(eps=0.0), "eps must be finite and above 0"),
        (lambda: hk.AdamW(eps=1e-60), "above 0 in float32"),
        (lambda: hk.AdamW(weight_decay=float("inf")), "weight_decay"),
        (lambda: hk.AdamW().steps([0], [1.0, 2.0]), "1 rounds but 2 rates"),
        (lambda: hk.AdamW().steps([0, -1], [1.0, 2.0]), "rounds\\[1\\] must be 0 or more"),
        (lambda: hk.SGD().steps([0], [float("nan")]), "rates\\[0\\] must be finite"),
        (lambda: hk.SGD().steps([0, 1], [1.0, -1.0]), "rates\\[1\\]"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- the same bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dist", DISTRIBUTIONS)
@pytest.mark.parametrize(("dtype", "rounding"), check.KINDS)
@pytest.mark.parametrize("rule", check.RULES, ids=str)
def test_cpp_is_spec_at_every_length(rule, dtype, rounding, dist):
    # The C++ takes 32 records at once, tiles of 64 columns and blocks of 4 or 128 rows.
    kind = {"dtype": dtype, "dist": dist, "rounding": rounding, "rule": rule}
    for n, start, rounds, directions in [
        (1, 77, 2, 33),
        (3, 1023, 35, 1),
        (65, 2**33 - 1, 3, 32),
        (1025, 131_071, 4, 17),
        (5000, 2**40 + 8191, 7, 5),
        (150_001, 63, 1, 2),
        (4200, 63, 2, 70),  # a round of three chunks, over several rows
    ]:
        case = check.UpdateCase(**kind, n=n, start=start, stream=4, factor=0.5, records=rounds, directions=directions)
        assert check.run_case(cpu, case, "cpu") is None, case


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dist", DISTRIBUTIONS)
@pytest.mark.parametrize(("dtype", "rounding"), KINDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("rounds", "directions"), [(40, 1), (9, 5), (3, 33), (2, 64)])
def test_many_rounds_are_one_after_another(rounds, directions, rule, dtype, rounding, dist, device):
    tensors = [weights(1027, dtype, device), weights(1, dtype, device), weights(0, dtype, device)]
    place = {"dist": dist, "factors": [1.0, 4.0, 1.0], "streams": [5, 2**32 - 1, 0], "starts": [2**33 - 7, 131_071, 0]}
    many = State(rule, tensors)
    one, before = many.copy(), many.copy()
    records = record(rule, rounds, directions, rounding)
    for r in range(rounds):
        one.move(records, slice(r, r + 1), **place)
    many.move(records, **place)
    assert same(many.all(), one.all())
    assert not same(many.tensors[:1], before.tensors[:1])


@pytest.mark.parametrize("dist", DISTRIBUTIONS)
@pytest.mark.parametrize(("dtype", "rounding"), KINDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sharding_changes_no_bit(rule, dtype, rounding, dist):
    whole = State(rule, [weights(9001, dtype)])
    cut, sizes = whole.copy(), [1, 1022, 4000, 3978]
    cut.tensors = list(cut.tensors[0].split(sizes))
    cut.moments = [list(kept[0].split(sizes)) for kept in cut.moments]
    records = record(rule, 5, 3, rounding)
    start = 2**40 + 1000
    whole.move(records, dist=dist, streams=[6], starts=[start])
    starts = [start + at for at in (0, 1, 1023, 5023)]
    cut.move(records, dist=dist, streams=[6] * 4, starts=starts)
    assert same([torch.cat(cut.tensors), *map(torch.cat, cut.moments)], whole.all())


@pytest.mark.parametrize("isa", _cpp.supported())
@pytest.mark.parametrize("threads_", [1, 2, 3, 4])
@pytest.mark.parametrize("dist", DISTRIBUTIONS)
@pytest.mark.parametrize("rule", RULES[2:], ids=str)
def test_threads_and_instruction_sets_change_no_bit(isa, threads_, dist, rule, threads):
    want = State(rule, [weights(140_001), weights(3333, torch.bfloat16)])
    got = want.copy()
    records = record(rule, 6, 3, "stochastic")
    before = _cpp.isa()
    try:
        for state, isa_, n in ((want, _cpp.supported()[0], 1), (got, isa, threads_)):
            _cpp.use_isa(isa_)
            threads(n)
            state.move(records, dist=dist, starts=[7, 2**35])
    finally:
        _cpp.use_isa(before)
    assert same(got.all(), want.all())


def test_flushed_denormals_change_no_bit():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        state = State(hk.AdamW(), [torch.zeros(300_000)])
        state.moments[0][0].view(torch.int32).fill_(0x1000)  # subnormal
        state.moments[1][0].view(torch.int32).fill_(0x2000)
        state.move(([[1]], [[1e-30]], [[1.0, 1.0, 1e20]], None))
    finally:
        torch.set_flush_denormal(False)
    want = State(hk.AdamW(), [torch.zeros(300_000)])
    want.moments[0][0].view(torch.int32).fill_(0x1000)
    want.moments[1][0].view(torch.int32).fill_(0x2000)
    k = hk.AdamW().constants
    reference.update_(want.tensors, want.moments, "adamw", k, [1], [1e-30], [[1.0, 1.0, 1e20]], Place.single(), None)
    assert same(state.all(), want.all())
    assert (state.moments[1][0] > 0).all()


# --- the definition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (hk.SGD(weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=1, weight_decay=0.1)),
        (hk.SGD(momentum=0.9), lambda p: torch.optim.SGD(p, lr=1, momentum=0.9)),
        (hk.AdamW(weight_decay=0.2), lambda p: torch.optim.AdamW(p, lr=1, weight_decay=0.2)),
        (hk.AdamW((0.5, 0.7), eps=0.1), lambda p: torch.optim.AdamW(p, lr=1, betas=(0.5, 0.7), eps=0.1)),
    ],
    ids=["sgd", "momentum", "adamw", "adamw with other constants"],
)
def test_it_is_torch_s_optimizer(rule, make, device):
    seeds, coefficients, _, _ = record(rule, 60, 4)
    rates = [0.03 * (1 - r / 60) for r in range(60)]
    state = State(rule, [torch.full((200,), 0.5, device=device), weights(50, device=device)])
    theirs = [torch.nn.Parameter(x.clone().double()) for x in state.tensors]
    optimizer = make(theirs)
    for r, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for stream, parameter in enumerate(theirs):
            noise = [hk.noise(parameter.numel(), s % 2**64, stream=stream, device=device) for s in seeds[r].tolist()]
            parameter.grad = sum(c * z for c, z in zip(coefficients[r].tolist(), noise, strict=True)).double()
        optimizer.step()
    state.move((seeds, coefficients, rule.steps(range(60), rates), None))
    for ours, other in zip(state.tensors, theirs, strict=True):
        assert torch.allclose(ours.double(), other.detach(), rtol=1e-4, atol=1e-5)


def test_without_a_rule_s_extras_it_is_replay():
    x = weights(5000)
    y = x.clone()
    hk.update_(x, [], hk.SGD(), [[1], [2]], [[0.5], [-0.25]], [[1.0, 1.0, 1.0]] * 2)
    hk.replay_(y, [1, 2], [-0.5, 0.25])
    assert torch.equal(x, y)


def test_bfloat16_keeps_small_steps_only_with_stochastic_rounding():
    rule = hk.AdamW(weight_decay=0.0)
    records = record(rule, 100, 2, "stochastic")
    steps = rule.steps(range(100), [2e-6] * 100)
    nearest, stochastic = (State(rule, [torch.full((20_000,), 0.02, dtype=torch.bfloat16)]) for _ in range(2))
    nearest.move((*records[:2], steps, None))
    stochastic.move((*records[:2], steps, records[3]))
    assert (nearest.tensors[0] == nearest.tensors[0][0]).all()
    assert (stochastic.tensors[0] != nearest.tensors[0]).float().mean() > 0.2


def test_a_step_by_hand():
    # One element, numbers that float32 holds exactly.
    x, m, v = torch.tensor([2.0]), torch.tensor([0.25]), torch.tensor([4.0])
    z = float(hk.noise(1, 3))
    rule = hk.AdamW(betas=(0.5, 0.75), eps=0.5, weight_decay=0.5)
    hk.update_(x, [m, v], rule, [[3, 3]], [[1.0, 1.0]], [[0.5, 0.75, 0.25]])
    g = 2 * z
    assert m.item() == 0.125 + 0.5 * g
    assert v.item() == 3.0 + 0.25 * 4
    assert x.item() == 2.0 * 0.75 - 0.5 * (m.item() / (2.0 * 0.25 + 0.5))
    y, n = torch.tensor([2.0]), torch.tensor([0.25])
    hk.update_(y, [n], hk.SGD(momentum=0.5), [[3, 3]], [[1.0, 1.0]], [[0.5, 0.75, 1.0]])
    assert n.item() == 0.125 + g
    assert y.item() == 1.5 - 0.5 * n.item()


def test_the_order_of_the_directions_counts():
    x = [np.float32(0.1) * np.ones(1000, np.float32)] * 2
    place = {"coefficients": [[1e8, 1.0, -1e8]], "steps": [(1.0, 1.0, 1.0)]}
    left, _ = spec.update(x[0], [], "sgd", [], [[1, 2, 3]], **place)
    tensor = torch.from_numpy(x[0].copy())
    hk.update_(tensor, [], hk.SGD(), [[1, 2, 3]], **place)
    assert (tensor.numpy() == left).all()
    right, _ = spec.update(x[1], [], "sgd", [], [[1, 3, 2]], coefficients=[[1e8, -1e8, 1.0]], steps=place["steps"])
    assert (left != right).any()


# --- the contract ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_do(device):
    hk.update_([], [[], []], hk.AdamW(), [[1]], [[1.0]], [[1.0, 1.0, 1.0]])
    state = State(hk.AdamW(), [torch.ones(3, device=device)])
    state.move(([], [], [], None))
    state.move((torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5), torch.zeros(0, 3), None))
    assert torch.equal(state.tensors[0], torch.ones(3, device=device))
    # A round without a direction has the gradient 0: weights decay, moments too.
    state.moments[0][0].fill_(1.0)
    state.move(([[], []], torch.zeros(2, 0), [[0.0, 0.5, 1.0]] * 2, None))
    assert torch.equal(state.tensors[0], torch.full((3,), 0.25, device=device))
    assert state.moments[0][0][0].item() == pytest.approx(0.81)


@pytest.mark.parametrize("device", DEVICES)
def test_autograd_knows_that_weights_and_moments_changed(device):
    state = State(hk.AdamW(), [torch.ones(3, device=device)])
    before = [x._version for x in state.all()]
    state.move(([[1]], [[1.0]], [[1.0, 1.0, 1.0]], None))
    assert all(x._version > version for x, version in zip(state.all(), before, strict=True))


ONE_ROUND = {"seeds": [[1, 2]], "coefficients": [[0.5, 0.5]], "steps": [[0.1, 1.0, 1.0]]}


def call(xs, m, v, rule=None, **changes):
    hk.update_(xs, [m, v], rule or hk.AdamW(), **{**ONE_ROUND, **changes})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda xs, m, v: call(xs, m, v, rule="adamw"), TypeError, "rule must be SGD or AdamW, got str"),
        (lambda xs, m, v: call(xs, m, v, rule=hk.SGD()), ValueError, "keeps 0 moments per tensor, got 2 lists"),
        (lambda xs, m, v: hk.update_(xs, [m], hk.AdamW(), **ONE_ROUND), ValueError, "keeps 2 moments .* got 1 list"),
        (lambda xs, m, v: call(xs, m, v[:1]), ValueError, "2 tensors but 1 in moments\\[1\\]"),
        (lambda xs, m, v: call(xs, m, [v[0], 3]), TypeError, "moments\\[1\\]\\[1\\] is int"),
        (lambda xs, m, v: call(xs, m, [v[0], v[1].double()]), TypeError, "moments\\[1\\]\\[1\\] is torch.float64"),
        (lambda xs, m, v: call(xs, m, [v[0], v[1].bfloat16()]), TypeError, "moments are float32"),
        (
            lambda xs, m, v: call(xs, [m[0][:4], m[1]], v),
            ValueError,
            "moments\\[0\\]\\[0\\] is \\[4\\], tensors\\[0\\]",
        ),
        (lambda xs, m, v: call(xs, [m[0], torch.zeros(16)[::2]], v), RuntimeError, "moments\\[0\\]\\[1\\] is not cont"),
        (lambda xs, m, v: call(xs, m, [v[0].to("meta"), v[1]]), RuntimeError, "meta"),
        (
            lambda xs, m, v: call(xs, m, [m[0], v[1]]),
            RuntimeError,
            "moments\\[0\\]\\[0\\] and moments\\[1\\]\\[0\\] share",
        ),
        (lambda xs, m, v: call(xs, m, [v[0], xs[0]]), RuntimeError, "tensors\\[0\\] and moments\\[1\\]\\[1\\] share"),
        (lambda xs, m, v: call([xs[0], xs[0]], m, v), RuntimeError, "tensors\\[0\\] and tensors\\[1\\] share"),
        (lambda xs, m, v: call([xs[0], xs[1].double()], m, v), TypeError, "tensors\\[1\\] is torch.float64"),
        (
            lambda xs, m, v: call(xs, m, [v[0], v[1].requires_grad_()]),
            RuntimeError,
            "moments\\[1\\]\\[1\\] requires grad",
        ),
        (lambda xs, m, v: call(xs, m, v, seeds=[1, 2]), TypeError, "seeds\\[0\\] must be a list of integers"),
        (lambda xs, m, v: call(xs, m, v, seeds=[[1, 2], [3]]), ValueError, "seeds\\[0\\] has 2 .* seeds\\[1\\] has 1"),
        (lambda xs, m, v: call(xs, m, v, seeds=[[1, 2**64]]), ValueError, "seeds\\[0\\]\\[1\\]"),
        (lambda xs, m, v: call(xs, m, v, seeds=torch.tensor([1, 2])), TypeError, "int64 \\[rounds, directions\\]"),
        (
            lambda xs, m, v: call(xs, m, v, coefficients=[[0.5]]),
            ValueError,
            "coefficients must be \\[1, 2\\].*\\[1, 1\\]",
        ),
        (lambda xs, m, v: call(xs, m, v, coefficients=[[0.5, math.nan]]), ValueError, "coefficients\\[0\\]\\[1\\]"),
        (lambda xs, m, v: call(xs, m, v, coefficients=[[0.5, 1e39]]), ValueError, "coefficients\\[0\\]\\[1\\]"),
        (lambda xs, m, v: call(xs, m, v, coefficients=[[1e38, 1]], factors=[1.0, 1024.0]), ValueError, "its factor"),
        (
            lambda xs, m, v: call(xs, m, v, coefficients=torch.ones(1, 2).double()),
            TypeError,
            "coefficients as a tensor",
        ),
        (lambda xs, m, v: call(xs, m, v, steps=[[0.1, 1.0]]), ValueError, "steps must be \\[1, 3\\]"),
        (
            lambda xs, m, v: call(xs, m, v, steps=[[0.1, 1.0, 1.0]] * 2),
            ValueError,
            "steps must be \\[1, 3\\].*\\[2, 3\\]",
        ),
        (lambda xs, m, v: call(xs, m, v, steps=[[0.1, math.inf, 1.0]]), ValueError, "steps\\[0\\]\\[1\\]"),
        (lambda xs, m, v: call(xs, m, v, rounding="stochastic"), ValueError, "go together"),
        (
            lambda xs, m, v: call(xs, m, v, rounding="stochastic", rounding_seeds=[1, 2]),
            ValueError,
            "1 rounds but 2 rou",
        ),
        (
            lambda xs, m, v: call([x.half() for x in xs], m, v, rounding="stochastic", rounding_seeds=[1]),
            TypeError,
            "bfloat16",
        ),
        (lambda xs, m, v: call(xs, m, v, dist="normal"), ValueError, "dist must be one of"),
        (lambda xs, m, v: call(xs, m, v, streams=[1]), ValueError, "2 tensors but 1 streams"),
        (lambda xs, m, v: call(xs, m, v, starts=[0, 2**63 - 1]), ValueError, "beyond 2\\^63"),
    ],
)
def test_bad_arguments_change_nothing(change, error, message):
    xs, m, v = ([torch.full((8,), 0.5), torch.full((8,), 0.5)] for _ in range(3))
    with pytest.raises(error, match=message):
        change(xs, m, v)
    assert all(torch.equal(x, torch.full((8,), 0.5)) for x in (*xs, *m, *v))


# --- inside torch ---------------------------------------------------------------------------------------------


def test_compile_does_not_recompile_per_round():
    torch._dynamo.reset()
    rule = hk.AdamW()

    def step(x, m, v, seeds, coefficients, steps):
        hk.update_(x, [m, v], rule, seeds, coefficients, steps)
        return x + 1

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")  # with inductor: test_register.py
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for r in range(8):
        rounds, directions = 1 + r % 3, 2 + r % 4
        seeds = torch.randint(0, 1000, (rounds, directions))
        arguments = (seeds, torch.rand(rounds, directions), rule.steps(range(r, r + rounds), [0.1 * (r + 1)] * rounds))
        got, want = ([torch.ones(500), torch.zeros(500), torch.zeros(500)] for _ in range(2))
        assert torch.equal(compiled(*got, *arguments), step(*want, *arguments))
        assert same(got, want)
    assert counter.frame_count <= 3  # one round, several, and no more
    torch._dynamo.reset()


def test_schema():
    x, m, v = torch.randn(10), torch.zeros(10), torch.zeros(10)
    record_ = (torch.tensor([[1, 2]]), torch.tensor([[0.5, 1.0]]), torch.tensor([[0.1, 1.0, 1.0]]))
    arguments = ([x], [m, v], "adamw", hk.AdamW().constants, *record_, "rademacher", [], [], [], None)
    torch.library.opcheck(torch.ops.hosfl.update_.default, arguments)
