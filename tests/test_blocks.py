"""Directions that move one block: what a pass costs, which numbers come out, and that replay moves that block alone."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import BLOCKS, FACTORS, small
from torch import nn

from hosfl import Config, Task, split, train
from hosfl.halves.blocks import BlockEntry, BlockRun, allot_directions, blocks_of
from hosfl.halves.families import FAMILIES, example_inputs
from hosfl.halves.follow import CutError
from hosfl.halves.hub import random_trunk
from hosfl.halves.inputs import call, evaluating
from hosfl.halves.trains import select_trainable
from hosfl.methods.ho import ZerothOrderClient, make_run
from hosfl.probing.probe import trainable
from hosfl.protocol.aggregate import RunningLength
from hosfl.protocol.log import Log
from hosfl.protocol.messages import Multiplier
from hosfl.protocol.rebuild import rebuild as without_torch
from hosfl.protocol.terms import Block, Run
from hosfl.runs.checkpoint import rebuild
from hosfl_kernels import SGD, replay_

BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


ESTIMATORS = [("one-sided", 2e-2), ("two-sided", 2e-3), ("forward", 1e-5), ("backward", 1e-5)]
AT_ONCE = {"directions": 6, "probes_at_once": 3}
WHOLE = BlockEntry("", (), 1.0)


@pytest.fixture(scope="module")
def bert():
    """A client half of four layers, of which the biases of the last three move, and inputs."""
    torch.manual_seed(0)
    model = random_trunk("bert", **BERT).eval()
    half = split(model, 4).client
    return select_trainable(half, "*layer.[123].*bias", 0), example_inputs(model)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Tanh()

    def forward(self, x):
        return x + self.two(self.norm(self.one(x)))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layers = nn.Sequential(*(Residual(4) for _ in range(4)))

    def forward(self, x):
        return self.layers(torch.tanh(self.stem(x)))


def plain():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))


def pictures():
    torch.manual_seed(0)
    return select_trainable(Convolutions().eval(), "norms", 0), torch.randn(2, 3, 9, 9)


def numbers():
    torch.manual_seed(0)
    return plain(), torch.randn(3, 5)


def client_of(half, inputs, begins, **settings):
    config = Config(directions_from="fresh", rule="sgd", blocks=len(begins), **settings)
    half = copy.deepcopy(half)
    run = make_run(config, trainable(half)[0], begins)
    labels = torch.zeros(len(call(half, inputs)), dtype=torch.int64)
    how = {name: getattr(config, name) for name in ("probes_at_once", "compile")}
    return ZerothOrderClient(0, half, lambda _: (inputs, labels), run=run, begins=begins, **how)


def answer(client, multiplier, round=0):
    client.output(round)
    return client.answer(Multiplier(client=0, round=round, multiplier=multiplier)).scalars


def exact(client, inputs, multiplier, round=0):
    """<g, u_p> for the run's directions, by backpropagation and with the directions made whole."""
    half = copy.deepcopy(client.half).eval()
    parameters, streams = trainable(half)
    gradients = torch.autograd.grad(call(half, inputs), parameters, multiplier)
    found = []
    for block, positions in client.run.parts():
        for seed in client.run.seeds(round)[positions]:
            total = 0.0
            for t in block.tensors:
                u = torch.zeros(parameters[t].shape)
                replay_([u], [seed], [1.0], dist=client.run.dist, streams=[streams[t]], factors=[client.run.factors[t]])
                total += float((gradients[t].double() * u.double()).sum())
            found.append(total)
    return torch.tensor(found)


# --- where blocks begin -------------------------------------------------------------------------------------------


def test_a_layer_each_and_its_share_of_the_work(bert):
    half, inputs = bert
    begins = blocks_of(half, 3, inputs)
    assert [b.entry for b in begins] == [f"encoder.layer.{n}" for n in (1, 2, 3)]
    assert [b.share for b in begins] == pytest.approx([3 / 4, 2 / 4, 1 / 4])
    names = [name for name, p in half.named_parameters() if p.requires_grad]
    for number, begin in enumerate(begins, 1):
        assert all(f"layer.{number}." in names[t] for t in begin.tensors)
    assert sorted(t for b in begins for t in b.tensors) == list(range(len(names)))


def test_neighbours_make_a_block_where_there_are_fewer_blocks_than_layers(bert):
    half, inputs = bert
    begins = blocks_of(half, 2, inputs)
    assert [b.entry for b in begins] == ["encoder.layer.1", "encoder.layer.3"]
    assert len(begins[0].tensors) == 2 * len(begins[1].tensors)
    everything = tuple(t for b in begins for t in b.tensors)
    assert blocks_of(half, 1, inputs) == [BlockEntry("encoder.layer.1", everything, begins[0].share)]


def test_what_moves_in_front_of_the_layers_is_in_the_first_block():
    torch.manual_seed(0)
    model = random_trunk("bert", **BERT).eval()
    half = select_trainable(split(model, 2).client, "*LayerNorm*", 0)
    begins = blocks_of(half, 3, example_inputs(model))
    assert [b.entry for b in begins] == ["", "encoder.layer.0", "encoder.layer.1"]
    assert begins[0].share == 1


def test_more_blocks_than_layers_are_refused(bert):
    half, inputs = bert
    with pytest.raises(ValueError, match="blocks=4: only 3 of the client half's layers"):
        blocks_of(half, 4, inputs)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else x


def test_a_half_that_cannot_be_taken_apart_is_refused():
    with pytest.raises(CutError, match="Odd"):
        blocks_of(Odd(), 2, torch.ones(1, 2))


def wrong_from_a_block(monkeypatch):
    kept = BlockRun._inputs

    def wrong(self, block, given):
        found = kept(self, block, given)
        return {**found, "cut": found["cut"] + 1} if "cut" in found else found

    monkeypatch.setattr(BlockRun, "_inputs", wrong)


def test_a_part_that_does_not_give_the_half_s_output_is_refused(bert, monkeypatch):
    half, inputs = bert
    wrong_from_a_block(monkeypatch)
    with pytest.raises(CutError, match=r"from encoder\.layer\.1 on does not give its own output"):
        blocks_of(half, 3, inputs)


SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 16}


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "gpt2", "llama", "qwen3", "t5", "modernbert", "vit"])
def test_families(kind):
    settings = {
        "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2},
        "distilbert": {"vocab_size": 40, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
        "t5": {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2},
        "vit": {**SIZES, "image_size": 16, "patch_size": 8},
        "llama": {**SIZES, "num_key_value_heads": 2},
        "qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
        "modernbert": {**SIZES, "pad_token_id": 0},
        "roberta": SIZES,
    }[kind]
    if kind == "t5":
        transformers = pytest.importorskip("transformers")
        model = transformers.T5EncoderModel(transformers.T5Config(**settings))
    else:
        model = random_trunk(kind, **settings)
    model = model.eval()
    assert kind in FAMILIES
    half, inputs = split(model, 2).client, example_inputs(model)
    half = select_trainable(half, "*.0.*weight,*.1.*weight", 0)
    begins = blocks_of(half, 2, inputs)
    assert begins[1].share == pytest.approx(begins[0].share / 2)
    behind = BlockRun(half, [begins[1].entry])
    with evaluating(half), behind.keeping_input():
        call(half, inputs)
    with evaluating(behind.head):
        assert torch.equal(call(behind.head, inputs), behind._input)
    client = client_of(half, inputs, begins, directions=6, estimator="backward")
    multiplier = torch.randn(call(half, inputs).shape)
    with torch.no_grad():
        found = answer(client, multiplier)
    expected = exact(client, inputs, multiplier)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


# --- one block: what lies in front of it is kept, too --------------------------------------------------------------


@pytest.mark.parametrize("way", [{"estimator": e} for e, _ in ESTIMATORS] + [{"dist": "gaussian"}, AT_ONCE], ids=str)
def test_one_block_gives_the_numbers_of_the_whole_half_for_less_work(bert, way):
    half, inputs = bert
    multiplier = torch.randn(call(half, inputs).shape, generator=torch.Generator().manual_seed(1))
    from_its_layer = client_of(half, inputs, blocks_of(half, 1, inputs), **way)
    whole = client_of(half, inputs, [WHOLE], **way)
    assert from_its_layer.run == whole.run  # so is the log
    rounding = 1e-5 if way.get("estimator") == "forward" else 0  # forward mode has an attention of its own
    torch.testing.assert_close(
        answer(from_its_layer, multiplier), answer(whole, multiplier), rtol=rounding, atol=rounding
    )
    for of, from_whole in whole.passes.items():
        plain = len(multiplier) if of == "client forward" else 0  # the cut itself
        assert from_its_layer.passes[of] == plain + 3 / 4 * (from_whole - plain)


class Widening(nn.Sequential):
    """Its first layer's output is larger than the cut."""

    def __init__(self):
        super().__init__(nn.Linear(5, 50), nn.Linear(50, 4))


@pytest.mark.parametrize(
    ("half", "trains"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 400), nn.Linear(400, 4)), "1.*,2.*"),  # little is in front
        (Widening(), "1.*"),
        (plain(), "all"),
    ],
    ids=["little in front", "wide", "nothing in front"],
)
def test_one_block_is_the_whole_half_where_a_kept_input_does_not_pay(half, trains):
    half = select_trainable(half, trains, 0)
    [begin] = blocks_of(half, 1, torch.randn(2, half[0].in_features))
    assert (begin.entry, begin.share) == ("", 1.0)


def test_one_block_is_the_whole_half_where_nothing_can_be_told_about_it(bert, monkeypatch):
    moving = Odd()
    moving.a.requires_grad_(False)
    assert blocks_of(moving, 1, torch.ones(1, 2)) == [BlockEntry("", (0, 1), 1.0)]
    half, inputs = bert
    wrong_from_a_block(monkeypatch)
    [begin] = blocks_of(half, 1, inputs)
    assert (begin.entry, begin.share) == ("", 1.0)
    monkeypatch.setattr(BlockRun, "tail", lambda *arguments: {}["no such input"])
    assert blocks_of(half, 1, inputs) == [begin]


class Dropping(nn.Module):
    """Functions drop between its layers in train mode."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, x):
        for layer in (self.one, self.two, self.three):
            x = nn.functional.dropout(layer(x), 0.5, self.training)
        return self.four(x)


@pytest.mark.parametrize(("count", "how"), [(1, {}), (1, {"compile": "eager"}), (3, {"directions": 6})], ids=str)
def test_no_part_of_a_half_in_train_mode_drops_anything(count, how):
    torch.manual_seed(0)
    half, x = select_trainable(Dropping().train(), "two.*,three.*,four.*", 0), torch.randn(3, 5)
    begins = blocks_of(half, count, x)
    assert begins[0].entry == "two"
    client = client_of(half, x, begins, **how)
    with evaluating(half):
        expected = call(half, x)
    multiplier = torch.randn(expected.shape)
    for round in range(3):
        torch.testing.assert_close(client.output(round).cut, expected)
        found = client.answer(Multiplier(client=0, round=round, multiplier=multiplier)).scalars
        exactly = exact(client, x, multiplier, round)
        assert float((found - exactly).abs().max() / exactly.abs().max()) < 2e-2
    assert client.half.training


# --- how many directions each gets --------------------------------------------------------------------------------


def test_blocks_close_to_the_cut_get_more_directions():
    assert allot_directions(15, [96, 96, 96], [3 / 6, 2 / 6, 1 / 6]) == [4, 5, 6]
    assert allot_directions(3, [1000, 1, 1], [1, 1, 1]) == [1, 1, 1]
    assert allot_directions(8, [400, 100], [1, 1]) == [5, 3]
    for total in range(4, 40):
        assert sum(allot_directions(total, [7, 900, 1, 30], [1.0, 0.8, 0.5, 0.1])) == total
        assert min(allot_directions(total, [7, 900, 1, 30], [1.0, 0.8, 0.5, 0.1])) >= 1
    with pytest.raises(ValueError, match="2 directions cannot move 3 blocks"):
        allot_directions(2, [1, 1, 1], [1, 1, 1])


def test_no_split_of_the_same_work_has_less_variance():
    sizes, shares = [96.0, 48.0, 96.0], [3 / 6, 2 / 6, 1 / 6]

    def variance(counts):
        return sum(d / n for d, n in zip(sizes, counts, strict=True))

    def work(counts):
        return sum(c * n for c, n in zip(shares, counts, strict=True))

    chosen = allot_directions(60, sizes, shares)
    others = [(a, b, c) for a in range(1, 60) for b in range(1, 60) for c in range(1, 60)]
    best = min(variance(n) for n in others if work(n) <= work(chosen))
    assert variance(chosen) < 1.01 * best


# --- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "tolerance"), ESTIMATORS)
@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
@pytest.mark.parametrize("make", [pictures, numbers, "bert"])
def test_every_estimator_measures_the_block_s_derivative(estimator, tolerance, dist, make, request):
    half, inputs = request.getfixturevalue("bert") if make == "bert" else make()
    begins = blocks_of(half, 3, inputs)
    mu = {"mu": 1e-4} if estimator.endswith("sided") else {}  # float32: smaller ones lose more to rounding
    client = client_of(half, inputs, begins, directions=9, estimator=estimator, dist=dist, **mu)
    before = [p.detach().clone() for p in client.half.parameters()]
    multiplier = torch.randn(call(half, inputs).shape, generator=torch.Generator().manual_seed(1))
    found, expected = answer(client, multiplier), exact(client, inputs, multiplier)
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
    assert torch.equal(
        client.answer(Multiplier(client=0, round=0, multiplier=multiplier)).scalars, found
    )  # asked twice
    assert all(torch.equal(p, was) for p, was in zip(client.half.parameters(), before, strict=True))
    assert not any(m._forward_pre_hooks for m in client.half.modules())


@pytest.mark.slow
def test_the_estimate_is_unbiased(bert):
    """Over many rounds the mean of what a round steps along is the gradient: each block's share counts once."""
    half, inputs = bert
    begins = blocks_of(half, 3, inputs)
    client = client_of(half, inputs, begins, directions=6, estimator="backward")
    multiplier = torch.randn(call(half, inputs).shape, generator=torch.Generator().manual_seed(1))
    parameters, streams = trainable(client.half)
    gradients = torch.autograd.grad(call(half.eval(), inputs), trainable(half)[0], multiplier)
    gradient = torch.cat([g.flatten() for g in gradients]).double()
    rounds, total = 3000, torch.zeros(gradient.numel(), dtype=torch.float64)
    for round in range(rounds):
        scalars = exact_from(gradients, client.run, streams, round)
        pieces = [torch.zeros(p.shape) for p in parameters]
        for (block, positions), share in zip(
            client.run.parts(), (1 / b.directions for b in client.run.blocks), strict=True
        ):
            for seed, scalar in zip(client.run.seeds(round)[positions], scalars[positions], strict=True):
                for t in block.tensors:
                    replay_([pieces[t]], [seed], [share * scalar], streams=[streams[t]])
        total += torch.cat([p.flatten() for p in pieces]).double()
    error = total / rounds - gradient
    # The estimate's variance is about d_b / P_b |g_b|^2 for each block; the mean's is that over the rounds.
    sizes = [sum(parameters[t].numel() for t in b.tensors) / b.directions for b in client.run.blocks]
    lengths = [sum(float(gradients[t].square().sum()) for t in b.tensors) for b in client.run.blocks]
    expected = np.sqrt(sum(s * g for s, g in zip(sizes, lengths, strict=True)) / rounds)
    assert float(error.norm()) < 1.3 * expected
    assert float(gradient.norm()) > 5 * expected  # so that a share twice as large would show


def exact_from(gradients, run, streams, round):
    found = []
    for block, positions in run.parts():
        for seed in run.seeds(round)[positions]:
            total = 0.0
            for t in block.tensors:
                u = torch.zeros(gradients[t].shape)
                replay_([u], [seed], [1.0], streams=[streams[t]])
                total += float((gradients[t] * u).sum())
            found.append(total)
    return found


def test_the_kept_input_is_the_first_block_s_and_goes_on_with_the_blocks(bert):
    half, inputs = bert
    run = BlockRun(half, [f"encoder.layer.{n}" for n in (1, 2, 3)])
    calls = []
    handles = [
        layer.register_forward_hook(lambda m, a, o, n=n: calls.append(n))
        for n, layer in enumerate(half.trunk.encoder.layer)
    ]
    with torch.no_grad(), evaluating(half):
        with run.keeping_input():
            cut = call(half, inputs)
        assert calls == [0, 1, 2, 3]
        for block, expected in ((0, []), (0, []), (1, [1]), (2, [2]), (0, [0, 1, 2, 3]), (2, [1, 2])):
            calls.clear()
            module, given = run.tail(block, inputs)
            assert calls == expected
            assert torch.equal(call(module, given), cut)
    for handle in handles:
        handle.remove()


def test_work_is_counted_in_parts_of_a_pass(bert):
    half, inputs = bert
    begins = blocks_of(half, 3, inputs)
    samples = len(inputs["input_ids"])
    client = client_of(half, inputs, begins, directions=9)
    answer(client, torch.ones(call(half, inputs).shape))
    counts = [b.directions for b in client.run.blocks]
    probes = sum(n * share for n, share in zip(counts, (3 / 4, 2 / 4, 1 / 4), strict=True))
    assert client.passes["client forward"] == pytest.approx(samples * (1 + probes + 2 / 4))


# --- replay -------------------------------------------------------------------------------------------------------


def test_a_run_s_blocks_share_out_tensors_and_directions():
    shared = {"seed": 1, "directions": 4, "dist": "rademacher", "mu": 1e-3, "factors": (1.0, 1.0, 1.0)}
    run = Run(**shared, rule=SGD(), blocks=(Block((2,), 1), Block((0, 1), 3)))
    assert run.shares() == [1, 1 / 3, 1 / 3, 1 / 3]
    assert run.square([2.0, 3.0, 3.0, 3.0]) == pytest.approx(4 + 9)
    assert run.spread(np.array([[5, 1, -1, 1]], np.float32)) == 5
    assert replace(run, blocks=()).spread(np.array([[5, 1, -1, 1]], np.float32)) == 8
    for blocks in ((Block((0, 1), 4),), (Block((0, 1, 2), 4), Block((), 0)), (Block((0, 1), 2), Block((2,), 3))):
        with pytest.raises(ValueError, match="block"):
            Run(**shared, rule=SGD(), blocks=blocks)


@pytest.mark.parametrize(
    ("kind", "dist"), [("blocks", "rademacher"), ("blocks sgd", "rademacher"), ("blocks sgd", "gaussian")]
)
def test_replay_moves_a_block_along_its_own_directions(kind, dist):
    """Many rounds in one pass, against every direction added by hand where the record's position says."""
    made = small(kind, dist=dist).play(5)
    replica = made.replica()
    expected = [t.detach().double() for t in replica.tensors]
    for record in made.ledger.records[:]:
        first = 0
        for block in BLOCKS:
            for position in range(first, first + block.directions):
                (t,) = block.tensors
                step = float(record.coefficients[position]) * (1.0 if kind == "blocks" else -record.rate)
                u = torch.zeros(replica.tensors[t].shape)
                seed, stream = made.run.seeds(record.round)[position], replica.streams[t]
                replay_([u], [seed], [1.0], dist=dist, streams=[stream], factors=[FACTORS[t]])
                expected[t] += step * u.double()
            first += block.directions
    replica.apply(made.since(replica))
    assert replica.applied == 5
    for tensor, value in zip(replica.tensors, expected, strict=True):
        assert float((tensor.double() - value).abs().max()) < 1e-6
    moved = [float((t - b).abs().max()) for t, b in zip(replica.tensors, replica.base(), strict=True)]
    assert min(moved) > 1e-3


def test_lengths_are_told_block_by_block():
    """A client's estimate, which is clipped, and the gradient's, by which a normalised step is divided."""
    made = small("blocks")
    bias, weight = 2 * FACTORS[1] ** 2, 6 * FACTORS[0] ** 2
    assert made.ledger.weights.tolist() == pytest.approx([bias, *[weight / 9] * 3])
    made.ledger.step.length = RunningLength()
    _, rate = made.ledger.step(0, torch.tensor([2.0, 3.0, 0.0, 3.0]).double(), lambda moves: made.run.lattice)
    assert rate == pytest.approx(0.05 / np.sqrt(4 + 18 / 3))


def test_blocks_of_a_pool_are_refused():
    with pytest.raises(ValueError, match="blocks = 2 would do nothing with directions_from 'pool'"):
        Config(blocks=2)


def layered():
    """A task whose client half has three layers that move."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=random)
    y = (x[:, 0] > x[:, 1]).long()
    torch.manual_seed(0)
    model = nn.Sequential(*plain(), nn.Tanh(), nn.Linear(4, 2))
    rates = {"*": (0.1, 0.05)}
    return Task(
        model, (x[:160], y[:160]), (x[160:], y[160:]), nn.functional.cross_entropy, at=6, rates=rates, classes=2
    )


SETTINGS = [
    {"rule": "normalized"},
    {"rule": "adamw"},
    {"rule": "adamw", "dtype": "bfloat16", "estimator": "forward"},
    {"rule": "sgd", "dist": "gaussian", "estimator": "two-sided"},
    {"rule": "adamw", "estimator": "backward", "clip": 1.0, "direction_scale": "rms"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_a_run_with_blocks_replays_and_resumes(settings, tmp_path):
    shared = {"directions_from": "fresh", "blocks": 3, "directions": 6, "rounds": 12, "batch": 8, "clients": 3}
    shared |= {"server_rate": 0.1, "client_rate": 0.02, "digest_every": 4, "evaluate_every": 6, **settings}
    summary = train(layered(), out=tmp_path, sampled=2, **shared)
    assert summary.replicas.equal
    log = Log.read(tmp_path / "hosfl.log")
    assert [b["tensors"] for b in log.header.blocks] == [[0, 1], [2, 3], [4, 5]]
    assert len(log.digests) == 3
    _, replica = rebuild(tmp_path / "hosfl.log", tmp_path / "base.safetensors")
    _, of_numpy = without_torch(tmp_path / "hosfl.log", tmp_path / "base.safetensors")
    assert replica.digest() == of_numpy.digest() == log.digests[12]
    moved = [float((t - b).abs().max()) for t, b in zip(replica.tensors, replica.base(), strict=True)]
    assert min(moved) > 0
