"""Probing reads the weights: the bits of a whole displaced copy, a buffer at a time, and no trace afterwards."""

import copy
import hashlib
import io
import os
import pickle
import signal
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.profiler import profile

from hosfl.halves.inputs import evaluating
from hosfl.probing import displaced
from hosfl.probing.displaced import Displacement, evaluate_displaced, refuse_references
from hosfl.probing.probe import PerturbedTensors, probe_in_place, probe_untouched, trainable
from hosfl_kernels import perturb_, snap_

MU = 2.0**-8
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Gpt(nn.Module):
    """Two blocks, learned positions, and an output layer that shares the table of the embedding."""

    def __init__(self, vocabulary=50, width=8, length=12):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width, padding_idx=3), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, batch_first=True) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, mask=None):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, src_key_padding_mask=mask)
        return self.head(x)


class Lists(nn.Module):
    """Weights in lists and dictionaries, read by index, by name, by iteration and by `parameters()`; one is shared."""

    def __init__(self):
        super().__init__()
        self.several = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(3)])
        self.named = nn.ParameterDict({"a": torch.randn(4), "b": self.several[0]})
        self.nothing = None
        self.register_parameter("none", None)

    def forward(self, x):
        for weight in self.several:
            x = x @ weight
        penalty = sum(p.square().sum() for p in self.parameters())
        return x @ self.named["b"] + self.named["a"] * self.several[-1][0] + penalty


class Twice(nn.Module):
    """One layer that runs twice, and a weight read without its module being called."""

    def __init__(self):
        super().__init__()
        self.inner, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(7, 7)

    def __getattr__(self, name):
        return super().__getattr__("inner") if name == "alias" else super().__getattr__(name)

    def forward(self, x):
        return F.linear(self.inner(self.frozen(self.alias(x).relu())), self.inner.weight.t(), self.inner.bias)


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn, self.cell = kind(4, 6, 2, batch_first=True, bidirectional=True, **options), nn.GRUCell(4, 4)

    def forward(self, x):
        return self.rnn(torch.stack([self.cell(t) for t in x], 0))[0]


class TableRead(nn.Module):
    """Everything a model may do with a table beside calling its embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.bag = nn.EmbeddingBag(20, 4, mode="mean", padding_idx=2)

    def forward(self, ids):
        weight = self.table.weight
        x = F.embedding(ids, weight).to(weight.dtype) * weight.shape[0]
        x = x @ weight.t() @ weight + weight[ids] + self.bag(ids)[:, None]
        logits = F.linear(x.transpose(0, 1), weight).transpose(0, 1)  # as a tied output layer may do it
        return (
            F.linear(x, torch.cat([weight, weight])) + logits.repeat(1, 1, 2) + next(self.parameters()).square().mean()
        )


def chain(*layers):
    return nn.Sequential(*layers)


def cnn():
    module = chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4))
    module[1].running_mean.uniform_()
    return module


def transposed():
    module = nn.Linear(4, 6)
    module.weight = nn.Parameter(torch.randn(4, 6).t())
    return module


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(4, 3))


def accelerated():
    """A forward on the instance, as libraries that wrap models leave it."""
    module = nn.Linear(4, 4)
    forward = module.forward
    module.forward = lambda x: forward(x) * 2
    return module


def vectors():
    return torch.randn(5, 4)


def sequences(width=8):
    return torch.randn(3, 7, width)


def images():
    return torch.randn(2, 3, 8, 8)


def ids():
    return torch.randint(0, 20, (3, 9))


MODELS = {
    "mlp": (lambda: chain(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2, bias=False)), vectors),
    "cnn": (cnn, images),
    "channels last": (lambda: cnn().to(memory_format=torch.channels_last), images),
    "not contiguous": (transposed, vectors),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: (sequences(), sequences(), sequences()),
    ),
    "attention of three widths": (
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True, batch_first=True),
        lambda: (sequences(), sequences(4), sequences(6)),
    ),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), sequences),
    "encoder layer, slow path": (lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True), sequences),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
        lambda: {"src": sequences(), "src_key_padding_mask": torch.arange(7).repeat(3, 1) > 4},
    ),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(8, 2, 16), lambda: (sequences(), sequences())),
    "gpt, tied": (Gpt, lambda: {"ids": ids(), "mask": None}),
    "lstm": (lambda: Recurrent(nn.LSTM, proj_size=3), lambda: sequences(4)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: sequences(4)),
    "rnn": (lambda: Recurrent(nn.RNN), lambda: sequences(4)),
    "lists": (Lists, vectors),
    "twice": (Twice, vectors),
    "tables": (TableRead, ids),
    "bilinear": (lambda: nn.Bilinear(4, 4, 3), lambda: (torch.randn(5, 4), torch.randn(5, 4))),
    "prelu, transposed convolution": (lambda: chain(nn.ConvTranspose2d(3, 2, 3), nn.PReLU(2)), images),
    "weight norm": (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), vectors),
    "weight norm, old": (old_weight_norm, vectors),
    "spectral norm": (lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), vectors),
    "orthogonal": (lambda: torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), vectors),
    "forward on the instance": (accelerated, vectors),
    "empty": (lambda: chain(nn.Linear(4, 0), nn.Linear(0, 2)), vectors),
}
HALVES = ("mlp", "cnn", "attention", "encoder layer", "gpt, tied", "twice", "tables", "lists")  # run in 16 bits too


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    make, draw = MODELS[name]
    inputs = draw()
    cast = lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    inputs = torch.utils._pytree.tree_map(cast, inputs)
    return make().to(dtype).eval(), inputs


def arguments(inputs):
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def first(output):
    return output[0] if isinstance(output, tuple) else output


class First(nn.Module):
    """The half of the tests: the first output of a module that has several."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return first(self.module(*args, **kwargs))


def whole_copy(module, inputs, seed, scale, dist="rademacher", factors=None):
    """What evaluate_displaced must equal: every trainable parameter copied and moved, then functional_call."""
    parameters, streams = trainable(module)
    copies = [p.detach().clone(memory_format=torch.contiguous_format) for p in parameters]
    perturb_(copies, seed, scale, dist=dist, streams=streams, factors=factors)
    copies = [c if p.is_contiguous() else torch.empty_like(p).copy_(c) for p, c in zip(parameters, copies, strict=True)]
    copies = {id(p): nn.Parameter(c) for p, c in zip(parameters, copies, strict=True)}
    moved = {name: copies[id(p)] for name, p in module.named_parameters() if p.requires_grad}
    args, kwargs = arguments(inputs)
    return functional_call(module, moved, args, kwargs)


def digest(module):
    sha = hashlib.sha256()
    for name, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def identity(module):
    """All that a probe must not touch beside the bits: objects, versions, classes, attributes, tied pairs."""
    return [
        (
            name,
            id(m),
            type(m),
            type(m._parameters),
            id(m._parameters),
            [(k, id(p), None if p is None else (p._version, p.data_ptr())) for k, p in m._parameters.items()],
            sorted(m.__dict__),
            [id(w) for w in m.__dict__.get("_flat_weights", [])],
        )
        for name, m in module.named_modules(remove_duplicate=False)
    ]


def displacement(module, seed=7, scale=MU, dist="gaussian", factors=None):
    parameters, streams = trainable(module)
    return Displacement(parameters, streams, seed, scale, dist, factors)


# --- the value ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_of_a_whole_copy(name, dist):
    module, inputs = build(name)
    args, kwargs = arguments(inputs)
    factors = [2.0 ** (t % 5 - 2) for t in range(len(trainable(module)[0]))]
    with torch.no_grad():
        plain = first(module(*args, **kwargs))
        for seed, scale, these in ((1, MU, None), (2, -MU, factors), (3, 0.5, factors)):
            expected = first(whole_copy(module, inputs, seed, scale, dist, these))
            got = first(evaluate_displaced(module, inputs, displacement(module, seed, scale, dist, these)))
            assert torch.equal(got, expected)
            assert type(got) is torch.Tensor
            if name != "empty":
                assert not torch.equal(got, plain)
        assert torch.equal(first(module(*args, **kwargs)), plain)


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("name", HALVES)
def test_the_bits_of_a_whole_copy_in_16_bits(name, dtype):
    module, inputs = build(name, dtype)
    with torch.no_grad():
        for seed in (1, 2):
            expected = first(whole_copy(module, inputs, seed, 0.125, "gaussian"))
            assert torch.equal(first(evaluate_displaced(module, inputs, displacement(module, seed, 0.125))), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", HALVES)
def test_scalars_of_both_ways(name, dtype):
    module, inputs = build(name, dtype)
    module = First(module)
    parameters, streams = trainable(module)
    factors = [2.0 ** (t % 3) for t in range(len(parameters))]
    moved = PerturbedTensors(parameters, streams, factors)
    if dtype is torch.float32:
        snap_([p.detach() for p in parameters], headroom=64.0)
    args, kwargs = arguments(inputs)
    with evaluating(module):
        cut = module(*args, **kwargs)
        lam = torch.randn_like(cut)
        expected = [
            float(((whole_copy(module, inputs, s, MU, "rademacher", factors) - cut).double() * lam.double()).sum()) / MU
            for s in (1, 2, 3)
        ]
        got = probe_untouched(module, inputs, lam, cut, [1, 2, 3], MU, "rademacher", moved)
        assert got.tolist() == torch.tensor(expected).tolist()
        if dtype is torch.float32:
            in_place = probe_in_place(lambda: module(*args, **kwargs), moved, lam, cut, [1, 2, 3], MU)
            assert torch.equal(in_place, got)
    assert got.abs().min() > 0


@pytest.mark.parametrize("name", [name for name in MODELS if name != "not contiguous"])
def test_rows_of_large_tables(name, monkeypatch):
    """By row or whole, the scalars are the same; a table that is moved by row is not written."""
    module, inputs = build(name)
    module = First(module)
    parameters, streams = trainable(module)
    snap_([p.detach() for p in parameters], headroom=64.0)
    factors = [2.0 ** (t % 3) for t in range(len(parameters))]
    moved = PerturbedTensors(parameters, streams, factors)
    args, kwargs = arguments(inputs)
    with evaluating(module):
        cut = module(*args, **kwargs)
        probe = partial(probe_in_place, lambda: module(*args, **kwargs), moved)
        rest = (torch.randn_like(cut), cut, [1, 2, 3], MU)
        want = probe(*rest)
        assert torch.equal(probe(*rest, two_sided=True, module=module), probe(*rest, two_sided=True))

        monkeypatch.setattr(displaced, "LARGE", 1)
        tables = displaced.large_tables(module, parameters)
        assert len(tables) == {"tables": 1, "gpt, tied": 1}.get(name, 0)  # of the second, positions: the other is tied
        before, same, versions = digest(module), identity(tables), [p._version for p in parameters]
        assert torch.equal(probe(*rest, module=module), want)
        assert identity(tables) == same
        assert digest(module) == before
        assert torch.equal(probe(*rest, two_sided=True, module=module), probe(*rest, two_sided=True))
        by_row = {id(p) for p in tables.parameters()}
        assert all(p._version > v or id(p) in by_row for p, v in zip(parameters, versions, strict=True) if p.numel())


def test_which_tables_are_large(monkeypatch):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small, self.frozen = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Embedding(9, 4)
            self.frozen.requires_grad_(False)
            self.writes, self.tied, self.head = nn.Embedding(9, 4, max_norm=1.0), nn.Embedding(9, 4), nn.Linear(4, 9)
            self.head.weight = self.tied.weight

    monkeypatch.setattr(displaced, "LARGE", 36)
    half = Half()
    assert [*displaced.large_tables(half, trainable(half)[0])] == [half.large]
    assert [*displaced.large_tables(half, [half.head.weight])] == []
    half.compile(backend="eager")
    assert [*displaced.large_tables(half, trainable(half)[0])] == []


def test_no_directions():
    half, x, lam = nn.Linear(3, 2), torch.randn(1, 3), torch.ones(1, 2)
    assert probe_untouched(half, x, lam, lam, [], MU, "gaussian").shape == (0,)
    with evaluating(half):
        assert probe_in_place(lambda: half(x), PerturbedTensors.of(half), lam, lam, [], MU).shape == (0,)


def test_no_graph_is_recorded():
    for name in ("mlp", "gpt, tied"):
        module, inputs = build(name)
        assert not evaluate_displaced(module, inputs, displacement(module)).requires_grad


def test_hooks_run():
    module, seen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), []
    module[0].register_forward_pre_hook(lambda m, args: seen.append("pre"))
    module[1].register_forward_hook(lambda m, args, out: seen.append("post") or out * 2)
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(
            evaluate_displaced(module, x, displacement(module)), whole_copy(module, x, 7, MU, "gaussian")
        )
    assert seen == ["pre", "post"] * 2


def test_the_encoder_s_fast_path_is_taken(monkeypatch):
    taken = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: taken.append(1) or fast(*a))
    module, inputs = build("encoder layer")
    with torch.no_grad():
        evaluate_displaced(module, inputs, displacement(module))
    assert taken == [1]


@pytest.mark.parametrize("vocabulary", [1, 30, 70_000])
def test_gathered_rows_are_rows_of_the_whole_table(vocabulary):
    table = nn.Embedding(vocabulary, 5)
    for shape in ((), (0,), (1,), (4, 100)):
        rows = torch.randint(0, vocabulary, shape, dtype=torch.int32)
        for dist in ("rademacher", "gaussian"):
            with torch.no_grad():
                got = evaluate_displaced(table, rows, displacement(table, dist=dist))
                assert torch.equal(got, whole_copy(table, rows, 7, MU, dist))


def test_forward_inside_autocast():
    # autocast keeps its casts of weights: without care a probe in place would measure zeros.
    half = nn.Linear(16, 4)
    parameters = trainable(half)[0]
    snap_([p.detach() for p in parameters], headroom=16.0)
    x, lam = torch.randn(3, 16), torch.ones(3, 4)
    with evaluating(half), torch.autocast("cpu", torch.bfloat16):
        cut = half(x)
        in_place = probe_in_place(lambda: half(x), PerturbedTensors.of(half), lam, cut, [1, 2], 0.25)
        assert torch.equal(in_place, probe_untouched(half, x, lam, cut, [1, 2], 0.25, "rademacher"))
        assert in_place.abs().min() > 0
        assert torch.equal(half(x), cut)


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_read_from_their_modules(name):
    module, inputs = build(name)
    module = First(module)
    before = digest(module)
    refuse_references(module, inputs)
    assert digest(module) == before


class Refers(nn.Module):
    """Reads its layer's weight by another way than its layer."""

    def __init__(self, how):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.kept = [self.layer.weight] if how == "list" else [self.layer.weight.detach()[:2]]
        if how == "closure":
            weight = self.layer.weight
            self.kept = []
            self.read = lambda: weight

    def forward(self, x):
        return self.layer(x).sum(1) + F.linear(x, self.kept[0] if self.kept else self.read()).sum(1)


@pytest.mark.parametrize("how", ["list", "view", "closure"])
def test_weights_that_are_read_by_other_references(how):
    torch.manual_seed(0)
    module = Refers(how)
    before = digest(module)
    with pytest.raises(ValueError, match="reads a weight by a reference of its own"):
        refuse_references(module, vectors())
    assert digest(module) == before
    module.layer.weight.requires_grad_(False)  # what does not move may be read in any way
    refuse_references(module, vectors())


# --- no trace -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in MODELS for d in FLOATS if n in HALVES or d is torch.float32]
)
def test_no_trace(name, dtype):
    module, inputs = build(name, dtype)
    module = First(module)
    args, kwargs = arguments(inputs)
    with evaluating(module):
        cut = module(*args, **kwargs)
        before, same = digest(module), identity(module)
        hidden = pickle.dumps(module.state_dict())
        for dist in ("rademacher", "gaussian"):
            probe_untouched(module, inputs, torch.ones_like(cut), cut, [1, 2, 3], MU, dist)
            assert digest(module) == before
            assert identity(module) == same
        assert pickle.dumps(module.state_dict()) == hidden
        assert torch.equal(module(*args, **kwargs), cut)


class Fails(nn.Module):
    """Raises in its n-th forward pass, deep inside."""

    def __init__(self, error, after):
        super().__init__()
        self.error, self.left = error, after
        self.table, self.rnn, self.head = nn.Embedding(9, 4), nn.GRU(4, 4), nn.Linear(4, 9)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x, _ = self.rnn(self.table(ids))
        out = self.head(x)
        self.left -= 1
        if self.left < 0:
            raise self.error("out of luck")
        return out


IN_PLACE = [("in place", torch.float32), ("in place, by row", torch.float32)]


@pytest.mark.parametrize(("way", "dtype"), [*IN_PLACE, *(("untouched", dtype) for dtype in FLOATS)])
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_model(error, after, way, dtype, monkeypatch):
    torch.manual_seed(0)
    module, ids = Fails(error, after).to(dtype).eval(), torch.randint(0, 9, (3, 2))
    if way == "in place, by row":
        monkeypatch.setattr(displaced, "LARGE", 1)
        module.head.weight = nn.Parameter(torch.randn(9, 4))
    parameters = trainable(module)[0]
    if dtype is torch.float32:
        snap_([p.detach() for p in parameters], headroom=16.0)
    before, same, table = digest(module), identity(module), identity(module.table)
    lam = torch.ones(3, 2, 9)
    with evaluating(module), pytest.raises(error, match="out of luck"):
        if way in dict(IN_PLACE):
            by_row = module if way == "in place, by row" else None
            probe_in_place(lambda: module(ids), PerturbedTensors.of(module), lam, lam, [1, 2, 3, 4], MU, module=by_row)
        else:
            probe_untouched(module, ids, lam, lam, [1, 2, 3, 4], MU, "gaussian")
    assert digest(module) == before
    if way == "untouched":
        assert identity(module) == same
    elif way == "in place, by row":
        assert identity(module.table) == table


@pytest.mark.parametrize("way", ["in place", "untouched"])
def test_interrupts_at_any_moment(way):
    # Real signals, most of them while a kernel runs: then the interrupt comes up between the move and its note.
    torch.manual_seed(0)
    module, x = nn.Linear(1500, 1500), torch.randn(1, 1500)
    parameters = trainable(module)[0]
    snap_([p.detach() for p in parameters], headroom=16.0)
    lam, seeds = torch.ones(1, 1500), list(range(3000))
    before, same, handler = digest(module), identity(module), signal.getsignal(signal.SIGINT)
    delay = torch.rand(25, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.005
    for wait in delay.tolist():
        timer = threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT))
        with evaluating(module), pytest.raises(KeyboardInterrupt):
            timer.start()
            if way == "in place":
                probe_in_place(lambda: module(x), PerturbedTensors.of(module), lam, lam, seeds, MU)
            else:
                probe_untouched(module, x, lam, lam, seeds, MU, "rademacher")
        timer.join()
        assert digest(module) == before
        assert signal.getsignal(signal.SIGINT) is handler
    if way == "untouched":
        assert identity(module) == same


def test_probing_in_another_thread():
    module, x, results = nn.Linear(3, 2), torch.randn(1, 3), []
    lam = torch.ones(1, 2)

    def work():
        with evaluating(module):
            results.append(probe_in_place(lambda: module(x), PerturbedTensors.of(module), lam, lam, [1], MU))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(results) == 1


@pytest.mark.parametrize("name", ["mlp", "gpt, tied", "lstm", "lists", "tables"])
def test_copies_and_pickles_as_before(name):
    module, inputs = build(name)
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        cut = module(*args, **kwargs)
        evaluate_displaced(module, inputs, displacement(module))
        stream = io.BytesIO()
        torch.save(module, stream)
        stream.seek(0)
        for twin in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
            assert digest(twin) == digest(module)
            assert torch.equal(twin(*args, **kwargs), cut)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(*args, **kwargs).square().sum().backward()  # the graph reaches the parameters again
    before = digest(module)
    optimizer.step()
    assert digest(module) != before


def test_what_the_model_assigns_is_forgotten():
    class Assigns(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            self.weight = nn.Parameter(self.weight * 2)
            return x * self.weight

    module = Assigns()
    before, same = digest(module), identity(module)
    with torch.no_grad():
        assert torch.equal(
            evaluate_displaced(module, torch.ones(3), displacement(module, dist="rademacher")).abs().round(),
            torch.full((3,), 2.0),
        )
    assert digest(module) == before
    assert identity(module) == same


# --- memory -------------------------------------------------------------------------------------------------------


def peak_bytes(work):
    """The most bytes that the allocator had given out and not got back while work() ran, beyond those before it."""
    work()  # code and caches are there
    with profile(profile_memory=True) as profiler:
        work()
    now, peak = 0, 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


class Big(nn.Module):
    """A vocabulary of 1 MiB, then 24 weights of 256 KiB, read in as many ways as there are."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1024, 256)
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(8))
        self.encoder = nn.Sequential(*(nn.MultiheadAttention(256, 4, batch_first=True) for _ in range(2)))
        self.several = nn.ParameterList(torch.randn(256, 256) / 16 for _ in range(8))

    def forward(self, ids):
        x = self.table(ids) * next(self.parameters()).shape[1]
        for layer in self.layers:
            assert layer.weight.dtype == x.dtype
            x = layer(x)
        for attention in self.encoder:
            x, _ = attention(x, x, x)
        for weight in self.several:
            x = x @ weight
        return x


def test_memory_is_one_layer():
    torch.manual_seed(0)
    module, ids = Big().eval(), torch.randint(0, 1024, (2, 4))
    args = (module, ids)
    trainable_bytes = sum(p.nbytes for p in module.parameters())
    largest_layer = 4 * 256 * 256 * 4  # an attention's in_proj and out_proj
    with torch.no_grad():
        activations = peak_bytes(lambda: module(ids))
        whole = peak_bytes(lambda: whole_copy(*args, 7, MU))
        lazy = peak_bytes(lambda: evaluate_displaced(*args, displacement(module)))
    assert whole > trainable_bytes > 5 * largest_layer
    assert lazy < largest_layer + activations + 100_000


def test_a_table_is_never_copied():
    table, ids = nn.Embedding(100_000, 16), torch.tensor([[5, 6, 99_999], [0, 5, 7]])
    with torch.no_grad():
        assert peak_bytes(lambda: evaluate_displaced(table, ids, displacement(table))) < 20_000


def test_a_weight_is_freed_when_its_layer_has_run():
    # Independent of the allocator: the second layer counts what is left of the first one's weight.
    alive = []

    class Looks(nn.Linear):
        def forward(self, x):
            weight = self.weight
            assert self.weight is weight  # made once while it is held
            alive.append(weakref.ref(weight))
            return super().forward(x)

    class Counts(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            assert [ref() for ref in alive] == [None]
            return out

    module = nn.Sequential(Looks(150, 150), Counts(150, 150))  # larger than what is displaced in groups
    with torch.no_grad():
        evaluate_displaced(module, torch.randn(1, 150), displacement(module))
    assert len(alive) == 1


def test_weights_without_biases_between_them_are_freed_first():
    module, x = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))), torch.randn(1, 256)
    with torch.no_grad():
        assert peak_bytes(lambda: evaluate_displaced(module, x, displacement(module))) < 256 * 256 * 4 + 20_000


def test_a_weight_asked_for_its_dtype_is_made_once(monkeypatch):
    class Asks(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    made = []
    monkeypatch.setattr("hosfl.probing.displaced.perturb_", lambda *a, **k: made.append(1) or perturb_(*a, **k))
    module = Asks(150, 150)
    with torch.no_grad():
        evaluate_displaced(module, torch.randn(1, 150), displacement(module))
    assert len(made) == 2


def test_small_weights_are_made_in_groups(monkeypatch):
    """Neighbours together, so many that a group stays small. A large weight goes by itself."""
    made = []
    monkeypatch.setattr(
        "hosfl.probing.displaced.perturb_", lambda xs, *a, **k: made.append(len(xs)) or perturb_(xs, *a, **k)
    )
    # Of 9,120 elements each: seven of them stay below 2^16.
    module = nn.Sequential(*(nn.Linear(95, 95) for _ in range(8)), nn.Linear(95, 200), nn.Linear(200, 10))
    x = torch.randn(2, 95)
    with torch.no_grad():
        found = evaluate_displaced(module, x, displacement(module))
    assert made == [14, 5, 1]
    assert torch.equal(found, whole_copy(module, x, 7, MU, "gaussian"))


# --- refused, and compiled ----------------------------------------------------------------------------------------


def test_refused():
    x = torch.zeros(1, dtype=torch.int64)
    for module, error, match in [
        (nn.Embedding(3, 2, max_norm=1.0), ValueError, "max_norm"),
        (nn.Sequential(nn.EmbeddingBag(3, 2, max_norm=1.0)), ValueError, "max_norm"),
        (torch.jit.script(nn.Linear(2, 2)), TypeError, "scripted"),
        (nn.Sequential(torch.jit.script(nn.Linear(2, 2))), TypeError, "scripted"),
    ]:
        before = digest(module)
        with torch.no_grad(), pytest.raises(error, match=match):
            evaluate_displaced(module, x, displacement(module))
        assert digest(module) == before
    table = nn.Embedding(3, 2)
    before = digest(table)
    table.forward = lambda ids: F.embedding(ids, table.weight, max_norm=0.1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="writes its embedding table"):
        evaluate_displaced(table, x, displacement(table))
    assert digest(table) == before
    with pytest.raises(ValueError, match="shorter"):
        displacement(nn.Linear(2, 2), factors=[1.0])


class Counter:
    """A backend for torch.compile that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def compiled_part(module, backend):
    module.first = torch.compile(module.first, backend=backend)
    return module


def compiled_in_place(module, backend):
    module.compile(backend=backend)
    return module


@pytest.mark.parametrize(
    "compiled", [lambda m, b: torch.compile(m, backend=b), compiled_part, compiled_in_place], ids=["all", "part", "own"]
)
def test_compiled_modules_are_not_compiled_again_for_every_direction(compiled):
    torch.manual_seed(0)
    torch.compiler.reset()
    plain, x, backend = Two(), torch.randn(3, 4), Counter()
    module = compiled(copy.deepcopy(plain), backend)
    with torch.no_grad():
        cut = module(x)
        before, same = digest(module), identity(module)
        for seed in range(12):
            expected = whole_copy(plain, x, seed, MU)
            assert torch.equal(evaluate_displaced(module, x, displacement(module, seed, dist="rademacher")), expected)
        assert torch.equal(module(x), cut)
    assert 1 <= backend.graphs <= 2
    assert digest(module) == before
    assert identity(module) == same


def test_a_compiled_function_inside_the_model():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.fast = torch.compile(lambda x: self.linear(x).relu(), backend="eager")

        def forward(self, x):
            return self.fast(x)

    torch.manual_seed(0)
    torch.compiler.reset()
    module, x = Inside(), torch.randn(3, 4)
    with torch.no_grad():
        cut = module(x)
        for seed in range(12):  # more than dynamo's limit of recompilations
            expected = F.relu(whole_copy(module.linear, x, seed, MU))
            assert torch.equal(evaluate_displaced(module, x, displacement(module, seed, dist="rademacher")), expected)
        assert torch.equal(module(x), cut)


# --- real models, where they are installed ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_transformers(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config, model, options = {
        "bert": (transformers.BertConfig, transformers.BertModel, {"intermediate_size": 32}),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {"bos_token_id": 0, "eos_token_id": 0}),
        "llama": (transformers.LlamaConfig, transformers.LlamaModel, {"intermediate_size": 32}),
        "t5": (transformers.T5Config, transformers.T5EncoderModel, {"d_kv": 8, "d_ff": 32}),
    }[kind]

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model(config(**common, **options))

        def forward(self, **inputs):
            return self.model(**inputs)[0]

    module = Half().eval()
    inputs = {
        "input_ids": torch.randint(0, 60, (2, 7)),
        "attention_mask": (torch.arange(14).reshape(2, 7) != 13).long(),
    }
    before, same = digest(module), identity(module)
    with torch.no_grad():
        for seed in (1, 2):
            expected = whole_copy(module, inputs, seed, MU)
            got = evaluate_displaced(module, inputs, displacement(module, seed, dist="rademacher"))
            assert torch.equal(got, expected)
    assert digest(module) == before
    assert identity(module) == same
