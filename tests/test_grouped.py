"""Several clients' cuts in one pass of the server half: the numbers of one after another, and who is refused."""

import copy
from dataclasses import replace

import pytest
import shifted
import torch
from safetensors.torch import load_file
from test_baselines import flat_gradient
from test_protocol import Shuffled
from test_split import TEXT, text_model
from torch import nn

from hosfl import Config, train
from hosfl.halves.split import split
from hosfl.methods.cuts import CutSpec
from hosfl.methods.gathered import OutlierClipping
from hosfl.methods.grouped import GroupedServer
from hosfl.methods.server import Server
from hosfl.protocol.aggregate import AGGREGATIONS
from hosfl.protocol.messages import Cut
from hosfl.runs.assemble import assemble
from hosfl.runs.config import with_shared
from hosfl.settings import LATER
from hosfl.tasks.verbalizer import LastToken

MOST = 12  # samples of a cut
WIDTH, LENGTH = 16, 9


def served(half, shape, most, loss=nn.functional.cross_entropy, classes=2, spec=None, **settings):
    """A server after its first step, over a copy of the half, whose weights stay. most: of a group; 0: of one cut.

    spec: more of the `CutSpec`. settings: of the server.
    """
    half = copy.deepcopy(half)
    optimizer = torch.optim.SGD(half.parameters(), lr=0.0)
    cuts = CutSpec(shape, classes, MOST, **spec or {})
    shared = (half, loss, optimizer, lambda round: 0.0, None, 5, 20, cuts)
    server = GroupedServer(*shared, **settings, most=most) if most else Server(*shared, **settings)
    server._outliers.length.update(1.0)
    return server


def cut(client, samples, *shape, **fields):
    random = torch.Generator().manual_seed(client)
    labels = torch.randint(0, 2, (samples,), generator=random, dtype=torch.int32)
    outputs = torch.randn(samples, *shape, generator=random)
    return Cut(client=client, round=0, cut=outputs, **{"labels": labels} | fields)


def text(client, samples, length, **fields):
    """Its second text is the shorter half of it."""
    mask = torch.ones(samples, length, dtype=torch.uint8)
    mask[1:2, (length + 1) // 2 :] = 0
    return cut(client, samples, length, WIDTH, mask=mask, **fields)


def passes_of(server):
    """How many samples go through the half in each pass from now on."""
    found = []
    server.half.register_forward_pre_hook(lambda half, given: found.append(len(given[0])))
    return found


def alike(server, other, cuts):
    """Both servers answer the same within float32, and have the same gradients; the sizes of the second's passes."""
    found = passes_of(other)
    (answers, loss), (others, other_loss) = server.step(0, cuts), other.step(0, cuts)
    assert (server.refused, [*answers]) == (other.refused, [*others])
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for client, answer in answers.items():
        expected, got = answer.multiplier, others[client].multiplier
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert (got - expected).norm() < 1e-5 * expected.norm()
    expected, got = flat_gradient(server.half), flat_gradient(other.half)
    assert expected.norm() > 0
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert server.passes == other.passes
    assert sum(found) == server.passes["server forward"]
    return found


def same_rounds(config):
    """Rounds of a task come to the same with every round's cuts in one pass; how many lengths its texts had."""
    found, lengths = [], set()
    for most in (0, 1000):
        federation, _ = assemble(replace(config, server_batch=most))
        steady(federation.server.half).register_forward_pre_hook(lambda half, given: lengths.add(given[0].shape[1]))
        passes = passes_of(federation.server)
        federation.server._outliers.length.update(1.0)  # as if there had been steps
        found.append([federation.round(round) for round in range(config.rounds)])
        assert federation.server.refused == []
        assert len(passes) == config.rounds * (1 if most else config.sampled)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    return len(lengths)


def steady(half):
    """Without dropout, which would draw other numbers."""
    for module in half.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return half


# --- the same numbers -----------------------------------------------------------------------------------------------


class Kept(nn.BatchNorm2d):
    """In eval mode, in which it mixes nothing."""

    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize("aggregation", ["weighted", "uniform"])
def test_pictures(aggregation):
    torch.manual_seed(0)
    half = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), Kept(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    cuts = [cut(m, samples, 4, 5, 5) for m, samples in enumerate((12, 3, 12, 5, 1, 12))]
    one, many = (served(half, (4, 5, 5), n, aggregation=AGGREGATIONS[aggregation]) for n in (0, 24))
    assert alike(one, many, cuts) == [15, 18, 12]
    assert all(torch.equal(a, b) for a, b in zip(half.buffers(), many.half.buffers(), strict=True))


@pytest.mark.families
@pytest.mark.parametrize("family", TEXT)
def test_texts_of_unequal_length(family):
    """Of a classifier, or of the last token's logits."""
    head = "classifier" if family in ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert") else ""
    half = steady(split(text_model(family, head or "words"), 1).server)
    cuts = [text(m, 3, length) for m, length in enumerate((9, 4, 9, 6, 5, 2))]
    one, many = (served(half if head else LastToken(half), (LENGTH, WIDTH), n, spec={"masked": True}) for n in (0, 9))
    assert alike(one, many, cuts) == [9, 9]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_labels_of_every_token(family):
    """Padded with labels that the loss does not count, where clients have different numbers of those that it does."""
    half = steady(split(text_model(family, "words"), 1).server)

    def loss(outputs, labels):
        return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def labels(samples, length):
        found = torch.arange(samples * length, dtype=torch.int32).view(samples, length) % 7
        return found.masked_fill(found == 0, -100)

    cuts = [text(m, 3, length, labels=labels(3, length)) for m, length in enumerate((9, 4, 6))]
    spec = {"masked": True, "label_shape": (LENGTH,), "ignore_index": -100}
    shared = {"loss": loss, "classes": 97, "spec": spec}
    one, many = (served(half, (LENGTH, WIDTH), n, **shared) for n in (0, 9))
    assert alike(one, many, cuts) == [9]


class Places(nn.Module):
    """Where an answer begins: a logit for every token, those behind a text's end among them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, x, attention_mask):
        return self.linear(x)[..., 0]


class Mean(nn.Module):
    """The mean of all tokens, whatever the mask says."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2)

    def forward(self, x, attention_mask):
        return self.linear(x.mean(1))


@pytest.mark.parametrize("kind", [Places, Mean])
def test_texts_go_with_those_of_their_length_where_padding_would_count(kind):
    torch.manual_seed(0)
    cuts = [text(m, 2, length) for m, length in enumerate((9, 9, 4, 4, 9))]
    one, many = (served(kind(), (LENGTH, WIDTH), n, spec={"masked": True}) for n in (0, 9))
    many.half.load_state_dict(one.half.state_dict())
    assert alike(one, many, cuts) == [4, 4, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuts_of_several_kinds_of_numbers_get_their_own(dtype):
    cuts = [replace(c, cut=c.cut.to(kind)) for c, kind in zip(tiny(), KINDS, strict=True)]
    many = served(Roots().to(dtype), (3,), 24)
    found = passes_of(many)
    answers, _ = many.step(0, cuts)
    assert found == [24]
    assert [answers[m].multiplier.dtype for m in range(4)] == KINDS


KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float32]


# --- groups, and who is refused -------------------------------------------------------------------------------------


class Roots(nn.Module):
    """Its loss may be finite where its gradient is not; dropout, if any, tells the order of random numbers."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(self.dropout(x)) + (x[:, :2] - 6).square().sqrt()


def tiny(count=4, samples=6):
    return [cut(m, samples, 3) for m in range(count)]


def pair(most=24, **settings):
    return [served(Roots(**settings), (3,), n) for n in (0, most)]


WRONG = {
    "infinite loss": lambda c: replace(c, cut=torch.full_like(c.cut, 3e38)),
    "infinite gradient": lambda c: replace(c, cut=torch.full_like(c.cut, 6.0)),
    "labels": lambda c: replace(c, labels=c.labels + 5),
    "shape": lambda c: replace(c, cut=c.cut[:, :2]),
    "round": lambda c: replace(c, round=1),
}


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("wrong", WRONG)
def test_one_bad_cut_is_refused_alone(wrong, place):
    cuts = tiny()
    cuts[place] = WRONG[wrong](cuts[place])
    one, many = pair()
    assert [*one.step(0, cuts)[0]] == [m for m in range(4) if m != place]
    assert many.step(0, cuts)[0].keys() == one._answers.keys()
    assert (many.refused, many.refused.total) == (one.refused, 1)
    assert torch.allclose(flat_gradient(one.half), flat_gradient(many.half), rtol=1e-5)
    assert alike(*pair(), [c for c in cuts if c is not cuts[place]]) == [18]


def test_where_one_is_bad_the_others_are_learnt_from_one_after_another():
    cuts = tiny()
    one, many = pair(dropout=0.5)
    good, _ = one.step(0, cuts[1:])  # of which a refused cut takes no random numbers
    found = passes_of(many)
    answers, _ = many.step(0, [WRONG["infinite loss"](cuts[0]), *cuts[1:]])
    assert found == [24, 6, 6, 6, 6]
    assert all(torch.equal(good[m].multiplier, answers[m].multiplier) for m in good)
    assert torch.equal(flat_gradient(one.half), flat_gradient(many.half))


def test_a_second_cut_of_one_client_is_refused_while_the_first_waits():
    cuts = tiny()
    _, many = pair()
    answers, _ = many.step(0, [cuts[0], cuts[1], replace(cuts[0], cut=cuts[2].cut), cuts[2]])
    assert many.refused == ["round 0, client 0: a second cut in one round"]
    expected, _ = pair()[1].step(0, cuts[:3])
    assert all(torch.equal(answers[m].multiplier, expected[m].multiplier) for m in range(3))


def test_nothing_of_a_step_is_left_for_the_next():
    _, many = pair()
    many.begin(0)
    many.learn(tiny()[0])  # and the round dies
    found = passes_of(many)
    assert many.step(1, []) == ({}, pytest.approx(float("nan"), nan_ok=True))
    assert found == []


def test_the_first_step_is_of_one_cut_after_another():
    """It is held to the middle one of its clients' gradients, which one pass would not tell."""
    server = served(nn.Linear(3, 2), (3,), 48)
    server._outliers = OutlierClipping()
    found, cuts = passes_of(server), [cut(n, 4, 3) for n in range(3)]
    server.step(0, cuts)
    server.step(0, cuts)
    assert found == [4, 4, 4, 12]


def test_a_larger_cut_goes_by_itself():
    cuts = [cut(m, samples, 3) for m, samples in enumerate((2, 2, 12, 2, 1))]
    assert alike(*pair(most=4), cuts) == [4, 12, 3]


def test_a_cut_that_is_alone_has_the_bits_of_one_after_another():
    one, many = pair(most=1, dropout=0.5)
    answers, others = (server.step(0, tiny(samples=7))[0] for server in (one, many))  # 7 of 12: a share that rounds
    assert all(torch.equal(answers[m].multiplier, others[m].multiplier) for m in range(4))


@pytest.mark.parametrize("most", [0, 24])
def test_a_gpu_is_waited_for_a_few_times_whatever_the_half_holds(most, monkeypatch):
    """Which is whenever a number of it is asked for: not once for every tensor that has to be finite."""
    asked, was = [], torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: asked.append(1) or was(tensor))
    waits = []
    for layers in (1, 6):
        norms = [Kept(4) for _ in range(layers)]
        server = served(nn.Sequential(*norms, nn.Flatten(), nn.Linear(36, 2)), (4, 3, 3), most)
        cuts = [cut(m, 6, 4, 3, 3) for m in range(4)]
        server.begin(0)
        asked.clear()
        for message in cuts:
            server.learn(message)
        server.end()
        waits.append(len(asked))
        assert server.refused == []
    assert waits[0] == waits[1]


# --- halves that are not taken --------------------------------------------------------------------------------------


class Centred(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Beside(nn.Linear):
    def forward(self, x):
        return super().forward(x + x.roll(-1, 0))


class Counts(nn.Linear):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.passes += 1
        return super().forward(x)


NOT_APART = {
    "BatchNorm": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)),
    "without statistics": lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)),
    "one's own": lambda: Centred(3, 2),
    "the next sample": lambda: Beside(3, 2),
    "a buffer that moves": lambda: Counts(3, 2),
}


@pytest.mark.parametrize("kind", NOT_APART)
def test_halves_whose_samples_affect_each_other_are_never_grouped(kind):
    half = NOT_APART[kind]()
    half.eval()
    assert not isinstance(served(half, (3,), 0), GroupedServer)
    with pytest.raises(ValueError, match=r"samples affect each other or move buffers.*leave out server_batch"):
        served(half, (3,), 24)


@pytest.mark.parametrize("settings", [{"aggregation": AGGREGATIONS["median"]}, {"clip": 1.0}])
def test_gradients_that_are_needed_by_themselves(settings):
    with pytest.raises(ValueError, match="need each by itself: leave out server_batch"):
        served(Roots(), (3,), 24, **settings)


def test_trying_a_half_leaves_no_trace():
    half = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).eval()
    before, random = copy.deepcopy(half.state_dict()), torch.get_rng_state()
    many = served(half, (3,), 24)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in many.half.modules())
    assert all(torch.equal(value, before[name]) for name, value in many.half.state_dict().items())
    first, second = (many.step(0, tiny())[0] for _ in range(2))
    again = served(half, (3,), 24).step(0, tiny())[0]
    for other in (second, again):  # dropout is the round's, whatever was drawn before
        assert all(torch.equal(first[m].multiplier, other[m].multiplier) for m in range(4))


# --- runs -----------------------------------------------------------------------------------------------------------

SMALL = {"rounds": 3, "clients": 6, "sampled": 5, "batch": 16, "server_rate": 0.03, "client_rate": 0.05}


def halves_after(**settings):
    federation, _ = assemble(Config(**with_shared(settings, SMALL)))
    losses = [federation.round(round) for round in range(SMALL["rounds"])]
    assert federation.server.refused == federation.messenger.complaints == []
    return federation.server, losses, [p.detach() for p in federation.model().parameters()]


@pytest.mark.parametrize("settings", [{}, {"method": "first-order"}, {"method": "splitfed"}, {"method": "frozen"}])
def test_a_run_ends_where_one_after_another_does(settings):
    one, losses, weights = halves_after(**settings)
    many, other_losses, others = halves_after(**settings, server_batch=48)
    assert isinstance(many, GroupedServer)
    assert not isinstance(one, GroupedServer)
    assert other_losses == pytest.approx(losses, rel=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(weights, others, strict=True))
    assert one.passes == many.passes


def dropout(folder, **settings):
    """A run whose server half has dropout, and what it ends with."""
    quick = SMALL | {"directions": 1, "snapshot_every": 1, "server_batch": 48} | settings
    summary = train(shifted.make(), folder, **quick)
    return summary.loss, load_file(folder / "server.safetensors")


def equal(one, other):
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_with_dropout_a_seed_is_a_run_and_so_is_one_that_was_killed(tmp_path):
    whole = dropout(tmp_path / "whole")
    assert equal(whole, dropout(tmp_path / "again"))
    assert not equal(whole, dropout(tmp_path / "one", server_batch=0))  # other random numbers
    with pytest.raises(ZeroDivisionError):
        dropout_until_it_dies(tmp_path / "killed")
    assert equal(whole, dropout(tmp_path / "killed", resume=True))
    with pytest.raises(ValueError, match="server_batch was 48, is 32"):
        dropout(tmp_path / "killed", resume=True, server_batch=32)


def dropout_until_it_dies(folder):
    dropout(folder, progress=lambda done, *_: 1 // (2 - done))


def test_groups_are_the_same_whoever_comes_first():
    orders = [0, 1, 2, 3], [3, 1, 0, 2]
    found = []
    for order in orders:
        settings = {"task": "", "clients": 4, "sampled": 4, "rounds": 3, "batch": 16, "server_batch": 32}
        config = Config(**settings, server_rate=0.03, client_rate=0.05)
        federation, _ = assemble(config, task=shifted.make())
        federation.messenger.engine = Shuffled(federation, order, gone=[1])
        passes = passes_of(federation.server)
        losses = [federation.round(round) for round in range(3)]
        found.append((losses, passes, [p.detach() for p in federation.server.half.parameters()]))
    (losses, passes, weights), (others, other_passes, other_weights) = found
    assert (losses, passes) == (others, other_passes)
    assert passes == [16, 16, 16, *[32, 16] * 2]  # the first step is of one cut after another
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


REFUSED = {
    "aggregation": ({"aggregation": "median"}, "server_batch = 8 would do nothing with aggregation 'median'"),
    "hosl": ({"method": "hosl"}, "server_batch = 8 would do nothing with method 'hosl'"),
    "zo-both": ({"method": "zo-both"}, "server_batch = 8 would do nothing with method 'zo-both'"),
    "clip": ({"server_clip": 1.0}, "server_clip need each by itself: leave out server_batch"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_settings_that_do_not_go_with_it(kind):
    settings, reason = REFUSED[kind]
    with pytest.raises(ValueError, match=reason):
        assemble(Config(server_batch=8, **settings))


def test_a_run_without_it_is_described_as_before_there_was_any():
    assert LATER["server_batch"] == 0
    assert "server_batch" not in Config().decisive()
    assert Config(server_batch=8).decisive()["server_batch"] == 8
