"""A crowd under faults: whatever goes wrong, all clients end with the same bits, and the outcome says what it was."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hosfl.cli import main
from hosfl.engines.in_process import InProcessEngine
from hosfl.methods.ho import ZerothOrderClient
from hosfl.methods.travel import unpacked
from hosfl.protocol.lattice import LatticeError
from hosfl.protocol.log import Log
from hosfl.protocol.messages import Cut, Scalars, encode
from hosfl.protocol.records import EpochRecord, RoundRecord
from hosfl.protocol.replica import Replica, digest, to_records
from hosfl.protocol.terms import run_of
from hosfl.runs.assemble import assemble
from hosfl.runs.byzantine import FALSIFIERS, ByzantineClient
from hosfl.runs.checkpoint import rebuild
from hosfl.runs.config import Config, with_shared
from hosfl.runs.evaluate import evaluate
from hosfl.runs.faults import LIES, Faults
from hosfl.runs.join import WorkerFactory
from hosfl.runs.serve import Transport
from hosfl.runs.simulate import SMALLEST_SHARD, Outcome, SharedState, SimulatedFederation, simulate
from hosfl.runs.trainer import train
from hosfl.runs.unreliable import UnreliableWire
from hosfl_kernels import cpu
from hosfl_kernels.tensors import BACKENDS

RULES: dict[str, dict[str, Any]] = {
    "sgd": {"rule": "sgd", "client_rate": 0.04},
    "momentum": {"rule": "momentum", "client_rate": 0.004},
    "adamw": {"rule": "adamw", "client_rate": 0.01},
    "pool": {
        "rule": "adamw",
        "client_rate": 0.004,
        "directions_from": "pool",
        "pool_size": 16,
        "pool_rounds": 25,
        "direction_scale": "rms",
    },
}
DTYPES = ("float32", "bfloat16")
NEVER = 10**9  # rounds between deaths: snapshots are written, and nobody dies


def small(**settings: Any) -> Config:
    defaults: dict[str, Any] = {
        "rounds": 20,
        "clients": 20,
        "sampled": 4,
        "batch": 8,
        "directions": 2,
        "server_rate": 0.06,
        "client_rate": 0.04,
        "rule": "sgd",
        "snapshot_every": 5,
        "digest_every": 10,
        "evaluate_every": 10,
    }
    return Config(**defaults | settings)


def participants(log: Path) -> list[tuple[int, ...]]:
    return [record.participants for record in Log.read(log).rounds]


def make_crowd(config: Config, faults: Faults, folder: Path) -> SimulatedFederation:
    folder.mkdir(exist_ok=True)
    plain, _ = assemble(config, SMALLEST_SHARD)
    plain.open_log(folder)
    found = {"header": plain.header, "provenance": plain.provenance, "faults": faults}
    return SimulatedFederation(config, plain.server, plain.make_client, plain.base, plain.observed, **found)  # type: ignore[arg-type]


# --- one digest ---------------------------------------------------------------------------------------------------


def check_one_digest(config: Config, faults: Faults, folder: Path) -> Outcome:
    outcome = simulate(config, faults, folder)
    assert outcome.equal
    assert outcome.differed == 0  # equal without help: nobody had to be rebuilt because of a digest
    assert outcome.rounds == config.rounds
    tensors, replica = rebuild(folder / "hosfl.log", folder / "base.safetensors")
    log = Log.read(folder / "hosfl.log")
    half = assemble(config, SMALLEST_SHARD)[0].base
    assert digest([*half.parameters(), *half.buffers()]).hex() != outcome.digest
    half.load_state_dict(tensors)
    assert digest([*half.parameters(), *half.buffers()]).hex() == outcome.digest
    assert log.digests[config.rounds] == replica.digest()
    moved = sum(bool(record.coefficients.any()) for record in log.rounds)
    assert moved > 0.8 * config.rounds
    return outcome


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_one_digest(rule: str, dtype: str, tmp_path: Path) -> None:
    config = small(rounds=30, clients=30, sampled=5, dtype=dtype, digest_every=15, evaluate_every=30, **RULES[rule])
    faults = Faults(dropout=0.2, absence=0.1, longest_absence=30, delay=1, deadline=6, damage=0.02, crash_every=12)
    outcome = check_one_digest(config, faults, tmp_path)
    assert min(outcome.lost, outcome.late, outcome.damaged, outcome.deaths) > 0
    assert outcome.states > 10


@pytest.mark.parametrize(
    "settings", [{"directions_from": "fresh", "client_rate": 2.0}, {"pool_size": 16, "client_rate": 4.0}]
)
def test_one_digest_when_the_lattice_is_outgrown(settings: dict[str, Any], tmp_path: Path) -> None:
    """Clients come, go and start anew on either side of the round in which the lattice becomes coarser."""
    faults = Faults(dropout=0.2, absence=0.1, longest_absence=30, damage=0.02, crash_every=12)
    config = small(rounds=60, digest_every=15, evaluate_every=60, rule="normalized", **settings)
    check_one_digest(config, faults, tmp_path)
    assert any(record.quantum is not None for record in Log.read(tmp_path / "hosfl.log").rounds)


def test_a_crowd_elsewhere_meets_the_same_faults() -> None:
    """Over an engine whose processes can be anybody, in process here so that the same client answers first."""
    config = small(rounds=30, clients=100, sampled=5, digest_every=15, evaluate_every=30)
    faults = Faults(dropout=0.2, absence=0.1, longest_absence=30, delay=1, deadline=6, damage=0.02, crash_every=12)

    def everybody(files: dict[str, bytes], clients: int) -> InProcessEngine:
        return InProcessEngine(WorkerFactory(files, SMALLEST_SHARD)(), clients)

    here, there = simulate(config, faults), simulate(config, faults, transport=Transport(everybody))
    assert there.equal
    assert min(there.lost, there.late, there.damaged, there.deaths) > 0
    assert (there.digest, there.loss) == (here.digest, here.loss)
    with pytest.raises(ValueError, match=r"byzantine = 0.1 needs clients of this process"):
        simulate(config, Faults(byzantine=0.1), transport=Transport(everybody))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_one_digest_of_a_thousand_rounds(rule: str, dtype: str, tmp_path: Path) -> None:
    config = small(
        rounds=1000, clients=100, sampled=10, dtype=dtype, digest_every=100, evaluate_every=200, **RULES[rule]
    )
    outcome = check_one_digest(config, Faults(dropout=0.2, absence=0.2, longest_absence=300), tmp_path)
    assert outcome.accuracy > 0.7
    together = participants(tmp_path / "hosfl.log")
    seen: dict[int, int] = {}
    gaps = []
    for round, clients in enumerate(together):
        gaps += [round - seen[c] for c in clients if c in seen]
        seen |= dict.fromkeys(clients, round)
    assert len(seen) == 100
    assert max(gaps) > 250  # somebody was away for long, and came back


# --- three backends -----------------------------------------------------------------------------------------------


def replayed(folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch, at_once: int) -> Replica:
    """The log of a folder, replayed by one backend."""
    log = Log.read(folder / "hosfl.log")
    run, base = run_of(log.header), load_file(folder / "base.safetensors")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    tensors = [base[p.name].to(device) for p in log.header.parameters]
    replica = Replica(tensors, [p.stream for p in log.header.parameters], run, lambda: tensors)
    calls = []

    def counted(name: str) -> Any:
        op = getattr(BACKENDS[backend], name)
        return lambda *arguments: (calls.append(name), op(*arguments))[1]

    with monkeypatch.context() as patch:
        if device == "cpu":  # where ops.py knows of one backend
            patched = {name: counted(name) for name in ("replay_", "update_")}
            for name, op in patched.items():
                patch.setattr(cpu, name, op)
        while replica.applied < len(log.rounds):
            rows = log.rounds[replica.applied : replica.applied + at_once]
            replica.apply(to_records(rows, run, replica.applied))
    assert calls or device == "cuda"
    return replica


def check_backends(rule: str, dtype: str, rounds: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(rounds=rounds, digest_every=rounds, evaluate_every=rounds, dtype=dtype, **RULES[rule])
    simulate(config, Faults(dropout=0.3), folder)
    committed = Log.read(folder / "hosfl.log").digests[rounds]
    assert committed == replayed(folder, "cpp", monkeypatch, at_once=1).digest()
    for backend in ("numpy", "cpp", "triton"):  # nvcc's kernels run thread by thread in test_cuda.py
        assert committed == replayed(folder, backend, monkeypatch, at_once=rounds // 2).digest(), backend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_one_digest_of_three_backends(rule: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy specification, C++ and Triton (in its interpreter where there is no GPU) make the same bits of a log."""
    check_backends(rule, dtype, 4, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_one_digest_of_three_backends_longer(
    rule: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_backends(rule, dtype, 60, tmp_path, monkeypatch)


# --- Byzantine clients --------------------------------------------------------------------------------------------


def learning(**settings: Any) -> Config:
    defaults = {"rounds": 60, "clients": 10, "sampled": 10, "batch": 48, "directions": 2, "evaluate_every": 60}
    defaults |= {"partition": "iid"}  # a median of clients that are unlike costs more than a liar
    return small(**defaults | {"server_rate": 0.08, "client_rate": 0.1} | settings)


@pytest.fixture(scope="module")
def frozen_loss(seed: int) -> float:
    return train(Config(**with_shared({"method": "frozen"}, vars(learning(seed=seed))))).loss


@pytest.mark.learning
@pytest.mark.parametrize("aggregation", ["median", "trimmed"])
def test_one_liar_of_ten_does_not_stop_a_robust_aggregation(
    aggregation: str, frozen_loss: float, seed: int, below: Callable[..., None]
) -> None:
    outcome = simulate(learning(aggregation=aggregation, seed=seed), Faults(byzantine=0.1, magnitude=1e6))
    below(1 - outcome.accuracy, 0.2, "errors")
    below(outcome.loss / frozen_loss, 1.0, "loss, of that of a client half that never learns")


@pytest.mark.parametrize("aggregation", ["weighted", "uniform"])
def test_one_liar_of_ten_does_not_end_a_run_and_six_do(aggregation: str, tmp_path: Path) -> None:
    outcome = simulate(learning(aggregation=aggregation, rounds=5), Faults(byzantine=0.1, magnitude=1e30))
    assert (outcome.rounds, outcome.equal) == (5, True)
    with pytest.raises(LatticeError, match="lower the client's rate"):
        simulate(learning(aggregation=aggregation), Faults(byzantine=0.6, magnitude=1e30), tmp_path)
    written = json.loads((tmp_path / "simulation.json").read_text())
    assert "lattice" in written["failure"]
    assert (written["interrupted"], written["rounds"], written["equal"]) == (False, 0, True)


@pytest.mark.slow
@pytest.mark.learning
def test_one_liar_of_ten_costs_the_mean_of_normalised_steps_much(seed: int, below: Callable[..., None]) -> None:
    lied_to, robust = (
        simulate(learning(rule="normalized", client_rate=0.4, seed=seed, aggregation=how), Faults(byzantine=0.1)).loss
        for how in ("weighted", "median")
    )
    below(robust / lied_to, 0.8, "the median's loss, of the mean's")


# --- every knob ---------------------------------------------------------------------------------------------------


def test_without_faults_nothing_goes_wrong() -> None:
    outcome = simulate(small(), Faults())
    assert outcome.visits == 20 * 4
    wrong = ("empty", "lost", "late", "damaged", "refusals", "complaints", "differed", "deaths", "void")
    assert {name: getattr(outcome, name) for name in wrong} == dict.fromkeys(wrong, 0)
    assert [e.round for e in outcome.evaluations] == [0, 10, 20]
    assert (outcome.accuracy, outcome.loss) == (outcome.evaluations[-1].accuracy, outcome.evaluations[-1].loss)
    assert (outcome.failure, outcome.interrupted, outcome.reasons) == (None, False, [])


def test_a_simulation_without_faults_is_training(tmp_path: Path) -> None:
    """The same rounds as `train`, where the crowd is small enough for the data to be split alike."""
    config = small(rounds=6, clients=6)
    simulate(config, Faults(), tmp_path / "crowd")
    train(config, tmp_path / "train")
    logs = [Log.read(tmp_path / name / "hosfl.log") for name in ("crowd", "train")]
    assert logs[0].digest == logs[1].digest


def test_dropout_loses_one_message_per_client_and_round(tmp_path: Path) -> None:
    outcome = simulate(small(rounds=10), Faults(dropout=1.0), tmp_path)
    assert outcome.lost == 10 * 4  # everybody vanishes, at one message each: nobody waits for the next
    assert outcome.empty == 10
    assert 0 < outcome.visits < 10 * 4  # some before their cut, some after
    half = simulate(small(rounds=10), Faults(dropout=0.5))
    assert 10 < half.lost < 30


def test_absence_keeps_clients_away_for_a_while(tmp_path: Path) -> None:
    assert simulate(small(rounds=2), Faults(absence=1.0)).visits == 0
    # All 20 are sampled in every round: who is not invited is away.
    crowd = make_crowd(small(sampled=20), Faults(absence=0.1, longest_absence=12), tmp_path)
    here, longest = 0, 0
    for round in range(200):
        back = {c for c, until in crowd.away_until.items() if until == round}
        invited = crowd.invited(round)
        assert all(c in invited or crowd.away_until[c] > round for c in back)
        assert all(crowd.away_until.get(c, 0) <= round for c in invited)
        longest = max([longest, *(until - round for until in crowd.away_until.values())])
        here += len(invited)
    assert longest == 12
    # A stay lasts 9 rounds on average (odds .1 to leave), an absence 6.5.
    assert 0.5 < here / (20 * 200) < 0.68
    crowd.close()


@pytest.mark.parametrize(("longest", "rounds"), [(0, 1), (1, 1), (2, 2)])
def test_longest_absence_counts_rounds(longest: int, rounds: int, tmp_path: Path) -> None:
    crowd = make_crowd(small(sampled=20), Faults(absence=1.0, longest_absence=longest), tmp_path)
    assert crowd.invited(0) == []
    assert max(crowd.away_until.values()) == rounds
    crowd.close()


def test_delay_and_deadline() -> None:
    assert simulate(small(rounds=4), Faults(delay=5, deadline=1e6)).late == 0
    assert simulate(small(rounds=4), Faults(delay=0, deadline=0)).late == 0
    nobody = simulate(small(rounds=4), Faults(delay=5, deadline=0))
    assert (nobody.late, nobody.visits, nobody.empty) == (4 * 4, 0, 4)  # no Hello is in time
    some = simulate(small(rounds=10), Faults(delay=1, deadline=2.5))
    assert 0 < some.late < 40
    assert some.empty + some.visits > 0


def test_late_messages_are_refused_with_the_reason(tmp_path: Path) -> None:
    """A message from a client that misses the deadline arrives in the next round, and changes nothing there."""
    crowd = make_crowd(small(clients=3, sampled=3), Faults(), tmp_path)
    late: dict[int, int] = {}
    seen = Counter[int]()

    def in_time(client: int) -> bool:
        seen[client] += 1
        return seen[client] != late.get(client)

    crowd.unreliable._is_in_time = in_time  # type: ignore[method-assign]
    crowd.round(0)
    seen.clear()
    late = {0: 4, 1: 3, 2: 2}  # records and invitation, cut, multiplier, scalars
    crowd.round(1)
    late = {}
    assert crowd.server.refused == []
    assert crowd.unreliable.overdue == 3
    assert participants(tmp_path / "hosfl.log")[1] == ()
    crowd.round(2)
    assert sorted(crowd.server.refused) == [
        "round 2, client 0: Scalars of round 1, epoch 0, where Cut of round 2, epoch 0 is due",
        "round 2, client 2: Cut of round 1, epoch 0, where Cut of round 2, epoch 0 is due",
    ]
    assert participants(tmp_path / "hosfl.log")[2] == (0, 1, 2)
    assert crowd.compare_replicas().equal
    crowd.close()


def test_liars_are_as_many_and_lie_as_much_as_they_should(tmp_path: Path) -> None:
    """One client, plain SGD off the lattice: the first record is its scalars over P, honest or not."""
    config = small(rounds=1, clients=4, sampled=4, dtype="bfloat16", aggregation="uniform", evaluate_every=1)
    first = {}
    for name, faults in {
        "honest": Faults(magnitude=64.0),
        "liars": Faults(byzantine=1.0, magnitude=64.0),
        "half": Faults(byzantine=0.5, magnitude=64.0),
    }.items():
        crowd = make_crowd(config, faults, tmp_path / name)
        assert len(crowd.liars) == {"honest": 0, "liars": 4, "half": 2}[name]
        answers = {}
        for number in range(4):
            client = crowd.load_client(number)
            cut = client.output(0)
            multipliers, _ = crowd.server.step(0, [cut])
            answers[number] = client.answer(multipliers[number]).scalars  # type: ignore[attr-defined]
        first[name] = answers, crowd.liars
        crowd.close()
    honest = first["honest"][0]
    for answers, liars in first.values():
        for number in range(1):  # the server's half moves with every step: the first client's multiplier is the same
            factor = 64.0 if number in liars else 1.0
            assert torch.equal(answers[number].abs(), honest[number].abs() * factor)


def told(lies: str, folder: Path, **settings: Any) -> tuple[Cut, Scalars]:
    """What client 0 sends in round 0, whose multiplier is of an honest cut."""
    crowd = make_crowd(small(**settings), Faults(byzantine=1.0, lies=lies, magnitude=64.0), folder)
    client, honest = crowd.load_client(0), crowd.make_client(0)
    cut = client.output(0)
    multipliers, _ = crowd.server.step(0, [honest.output(0)])
    answer = client.answer(multipliers[0])
    assert isinstance(answer, Scalars)
    crowd.close()
    return cut, answer


def test_liars_lie_about_what_they_are_to_and_nothing_else(tmp_path: Path) -> None:
    plain, plain_answer = told("flipped-scalars", tmp_path / "honest", dtype="bfloat16")
    honest = plain_answer.scalars * -1
    lied = {lies: told(lies, tmp_path / lies, dtype="bfloat16") for lies in LIES}
    lied["all"] = told("labels,flipped-cuts,scaled-cuts,flipped-scalars", tmp_path / "all", dtype="bfloat16")
    for lies, (cut, answer) in lied.items():
        assert (cut.cut.dtype, cut.labels.dtype, answer.scalars.dtype) == (torch.bfloat16, torch.int32, torch.float32)
        assert torch.equal(cut.cut, plain.cut) == (lies not in ("flipped-cuts", "scaled-cuts", "noisy-cuts", "all"))
        assert torch.equal(cut.labels, plain.labels) == (lies not in ("labels", "random-labels", "all"))
        assert torch.equal(answer.scalars, honest) == (lies not in ("scalars", "flipped-scalars", "all"))
    assert torch.equal(lied["labels"][0].labels, 9 - plain.labels)
    random = lied["random-labels"][0].labels
    assert (random != plain.labels).all()
    assert ((random >= 0) & (random < 10)).all()
    assert len(set((random - plain.labels).tolist())) > 3
    assert torch.equal(lied["flipped-cuts"][0].cut, -plain.cut)
    assert torch.equal(lied["scaled-cuts"][0].cut, 64 * plain.cut)
    noise = lied["noisy-cuts"][0].cut.float()
    assert 0.9 < float(noise.square().mean() / plain.cut.float().square().mean()) < 1.1
    assert abs(float(noise.mean())) < 0.05 * float(noise.std())
    assert torch.equal(lied["all"][0].cut, -64 * plain.cut)
    assert torch.equal(lied["all"][1].scalars, -honest)
    assert torch.equal(lied["scalars"][1].scalars.abs(), 64 * honest.abs())


def test_false_labels_of_places_in_a_text_lie_in_it() -> None:
    liar: Any = type("Liar", (), {"classes": 384, "ignore_index": None, "random": np.random.default_rng(0)})
    labels = torch.tensor([[0, 6], [3, 4]], dtype=torch.int32)
    cut = Cut(client=0, round=0, epoch=0, cut=torch.zeros(2, 7, 5), labels=labels)
    assert FALSIFIERS["labels"][1](cut, liar).tolist() == [[6, 0], [3, 2]]
    for _ in range(20):
        false = FALSIFIERS["random-labels"][1](cut, liar)
        assert (false != labels).all()
        assert ((false >= 0) & (false < 7)).all()


def test_every_lie_can_be_told() -> None:
    assert tuple(FALSIFIERS) == LIES


@pytest.mark.parametrize("wire", ["float32", "int8"])
@pytest.mark.parametrize("lies", [lies for lies in LIES if lies != "scalars"])
def test_all_but_vast_lies_are_taken_for_the_truth(lies: str, wire: str, tmp_path: Path) -> None:
    outcome = simulate(small(rounds=5, wire=wire), Faults(byzantine=0.3, lies=lies, magnitude=10.0), tmp_path)
    assert outcome.refusals == 0
    assert outcome.equal


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16", "int8"])
def test_cuts_that_are_lied_about_travel_as_others_do(wire: str, tmp_path: Path) -> None:
    def values(lies: str) -> torch.Tensor:
        cut, _ = told(lies, tmp_path / lies, wire=wire)
        return unpacked(cut.cut, cut.scales, wire)

    true = values("labels")
    assert torch.equal(values("flipped-cuts"), -true)
    assert torch.allclose(values("scaled-cuts"), 64 * true, rtol=1e-6)


def test_a_liar_has_all_settings_of_the_honest_client_in_its_place(tmp_path: Path) -> None:
    crowd = make_crowd(
        small(directions_from="fresh", estimator="backward", microbatch=3), Faults(byzantine=1), tmp_path
    )
    honest = crowd.make_client(0)
    crowd.make_client = lambda number: honest
    liar = crowd.load_client(0)
    assert isinstance(liar, ByzantineClient)
    assert liar.microbatch == 3
    for field in fields(honest):
        if field.init:
            assert getattr(liar, field.name) is getattr(honest, field.name), field.name
    crowd.close()


def test_a_simulation_says_what_it_was_made_of(tmp_path: Path) -> None:
    config = small(rounds=2)
    simulate(config, Faults(), tmp_path)
    written = json.loads((tmp_path / "simulation.json").read_text())
    provenance = assemble(config, SMALLEST_SHARD)[0].provenance
    assert provenance is not None
    provenance.check(written["provenance"], "the simulation")
    assert len(provenance.log) == 64


def test_complaints_are_kept_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosfl.methods.reasons.KEPT", 3)
    outcome = simulate(small(rounds=10), Faults(damage=0.5))
    assert outcome.complaints > 3
    assert len([reason for reason in outcome.reasons if "client" in reason[:6]]) <= 3


def test_every_damaged_message_is_found() -> None:
    outcome = simulate(small(rounds=10), Faults(damage=0.2))
    assert outcome.damaged > 10
    assert outcome.refusals + outcome.complaints == outcome.damaged
    assert outcome.refusals > 0
    assert outcome.complaints > 0
    assert all(
        any(s in r for s in ("checksum", "starts with", "cut off", "too few", "bytes of")) for r in outcome.reasons
    )
    assert outcome.equal
    assert simulate(small(rounds=2), Faults(damage=1.0)).visits == 0


def test_participation() -> None:
    assert simulate(small(rounds=3, sampled=2), Faults()).visits == 3 * 2
    assert simulate(small(rounds=3, sampled=9), Faults()).visits == 3 * 9


def test_faults_follow_from_the_seed() -> None:
    faults = Faults(dropout=0.3, absence=0.3, delay=1, damage=0.1, byzantine=0.2, magnitude=3, crash_every=4)
    config = small(rounds=8, aggregation="median", snapshot_every=2)
    outcomes = [vars(simulate(c, faults)) for c in (config, config, small(**vars(config) | {"seed": 1}))]
    for outcome in outcomes:
        for timed in ("seconds", "peak_memory", "evaluations", "config"):
            del outcome[timed]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["log_digest"] != outcomes[2]["log_digest"]
    assert outcomes[0]["lost"] != outcomes[2]["lost"]


# --- deaths of the server -----------------------------------------------------------------------------------------


def dies_in(attempt: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server dies once: in the attempt-th round that begins, after so many messages and commits."""
    begun = []
    begin = UnreliableWire.begin

    def begin_and_die(wire: UnreliableWire, clients: Any) -> list[bytes]:
        late = begin(wire, clients)
        begun.append(clients)
        if len(begun) == attempt:
            wire.steps_left = step
        return late

    monkeypatch.setattr(UnreliableWire, "begin", begin_and_die)


DYING = {"rounds": 5, "clients": 3, "sampled": 2, "snapshot_every": 2, "digest_every": 2, "evaluate_every": 5}


@pytest.fixture(scope="module")
def undisturbed() -> Outcome:
    return simulate(small(**DYING), Faults())


@pytest.mark.parametrize("step", range(9))
def test_a_death_at_any_message_and_after_the_commit(
    step: int, undisturbed: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four messages for each of two clients, then the commit. The last snapshot is a round old: one round is void."""
    dies_in(4, step, monkeypatch)
    outcome = simulate(small(**DYING), Faults(crash_every=NEVER), tmp_path)
    assert outcome.deaths == 1
    after_commit = step == 8
    assert outcome.void == 2 if after_commit else outcome.void == 1
    assert outcome.equal
    assert outcome.rounds == 5
    # What is run again is what was run before: the death left no trace but in the log.
    assert outcome.digest == undisturbed.digest
    assert outcome.loss == undisturbed.loss
    records = Log.read(tmp_path / "hosfl.log").records
    epochs = [r for r in records if isinstance(r, EpochRecord)]
    assert [(e.epoch, e.round) for e in epochs] == [(1, 2)]
    assert sum(isinstance(r, RoundRecord) for r in records) == 5 + outcome.void


def test_a_death_before_the_first_snapshot(
    undisturbed: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies_in(2, 3, monkeypatch)
    outcome = simulate(small(**DYING), Faults(crash_every=NEVER), tmp_path)
    assert (outcome.deaths, outcome.void, outcome.digest) == (1, 1, undisturbed.digest)


def test_a_cut_of_a_round_that_died_arrives_when_its_sender_is_gone(tmp_path: Path) -> None:
    """Nothing was committed, and the epoch is another even so."""
    crowd = make_crowd(small(**DYING), Faults(crash_every=NEVER), tmp_path)
    invited = crowd.invited(0)
    cut = crowd.load_client(invited[0]).output(0)
    crowd.unreliable.late = [encode(cut)]
    assert crowd.restart(tmp_path) == 0
    crowd.away_until = dict.fromkeys(range(3), 5)
    crowd.round(0)
    why = "Cut of round 0, epoch 0, where Cut of round 0, epoch 1 is due"
    assert crowd.server.refused == [f"round 0, client {invited[0]}: {why}"]
    assert crowd.server.ledger.records[0].participants == ()  # type: ignore[union-attr]
    crowd.close()


def test_a_server_that_dies_often(tmp_path: Path) -> None:
    config = small(rounds=12, snapshot_every=2, digest_every=3)
    outcome = simulate(config, Faults(crash_every=3, dropout=0.2, absence=0.2, longest_absence=9, delay=1), tmp_path)
    assert outcome.deaths > 3
    assert outcome.void > 0
    assert outcome.equal
    log = Log.read(tmp_path / "hosfl.log")
    assert len(log.rounds) == outcome.rounds == 12
    assert outcome.empty == sum(not r.participants for r in log.rounds)
    assert [e.round for e in outcome.evaluations] == [0, 10, 12]


# --- the crowd ----------------------------------------------------------------------------------------------------


def test_clients_share_memory_until_they_differ(tmp_path: Path) -> None:
    crowd = make_crowd(small(sampled=20), Faults(), tmp_path)
    for round in range(3):
        crowd.round(round)
    assert len(crowd.client_states) == 20
    assert len(crowd.states) == 1  # all took part in all rounds
    (key,) = crowd.states
    assert crowd.states[key].clients == 20
    one, other = crowd.load_client(3), crowd.load_client(4)
    with torch.no_grad():
        next(one.half.parameters()).add_(1)  # a client's weights are its own while it is here
    assert other.digest() == crowd.load_client(5).digest() != one.digest()
    crowd.store_client(one)
    assert sorted(state.clients for state in crowd.states.values()) == [1, 19]
    assert crowd.load_client(3).digest() == one.digest()
    crowd.store_client(other)
    assert sorted(state.clients for state in crowd.states.values()) == [1, 19]
    crowd.close()


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_a_client_whose_bits_rot_is_found_and_rebuilt(rule: str, tmp_path: Path) -> None:
    crowd = make_crowd(small(sampled=20, digest_every=2, rule=rule), Faults(), tmp_path)
    crowd.round(0)
    key, applied, epoch = crowd.client_states[7]
    kept = crowd.states[key]
    tensors = [t.clone() for t in kept.tensors]
    tensors[0].view(-1)[5] += 0.25
    crowd.states[b"rotten", key[1]] = SharedState(tensors, kept.moments, 1)
    kept.clients -= 1
    crowd.client_states[7] = (b"rotten", key[1]), applied, epoch
    crowd.round(1)
    crowd.round(2)
    assert crowd.server.differed == ["client 7 after round 2"]
    assert 7 in participants(tmp_path / "hosfl.log")[2]
    assert crowd.compare_replicas().equal
    crowd.close()


def test_rotten_bits_that_no_digest_finds_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """`equal` is not taken on trust: a client that skips one record makes it False."""
    catch_up = ZerothOrderClient.catch_up

    def sloppy(client: ZerothOrderClient, message: Any) -> Any:
        said = catch_up(client, message)
        if client.number == 3 and client.applied == 4:
            with torch.no_grad():
                client.moved.tensors[0].view(-1)[0] += 2.0**-10
        return said

    monkeypatch.setattr(ZerothOrderClient, "catch_up", sloppy)
    assert not simulate(small(rounds=4, clients=5, digest_every=100, evaluate_every=4), Faults()).equal


# --- what users do ------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_after_the_round(tmp_path: Path) -> None:
    def progress(done: int, *rest: Any) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    outcome = simulate(small(), Faults(dropout=0.2), tmp_path, progress)
    assert outcome.interrupted
    assert outcome.rounds == 3
    assert outcome.equal
    assert outcome.evaluations[-1].round == 3
    assert json.loads((tmp_path / "simulation.json").read_text())["interrupted"]
    assert len(Log.read(tmp_path / "hosfl.log").rounds) == 3


def test_progress_and_evaluations() -> None:
    seen = []
    outcome = simulate(small(rounds=4, evaluate_every=2), Faults(), progress=lambda *now: seen.append(now))
    assert [(done, new.round if new else None) for done, _, new, _ in seen] == [(1, None), (2, 2), (3, None), (4, 4)]
    assert outcome.bytes == outcome.evaluations[-1].moved
    assert sum(outcome.bytes.values()) == seen[-1][3] == outcome.evaluations[-1].bytes


def test_validation_data_are_for_choosing(tmp_path: Path) -> None:
    config = small(rounds=1, evaluate_on="validation", evaluate_every=1)
    outcome = simulate(config, Faults())
    federation, task = assemble(config, SMALLEST_SHARD)
    assert (outcome.evaluations[0].scores, outcome.evaluations[0].loss) == evaluate(
        federation.model(), task.validation, task
    )


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("dropout", 1.5, "dropout is a share, from 0 to 1"),
        ("absence", -0.1, "absence is a share"),
        ("byzantine", float("nan"), "byzantine is a share"),
        ("lies", "", "lies are labels, random-labels"),
        ("lies", "labels,cuts", "lies are labels, random-labels"),
        ("damage", 2, "damage is a share"),
        ("delay", -1, "delay must be finite and not negative"),
        ("deadline", float("nan"), "deadline must be finite"),
        ("magnitude", float("inf"), "magnitude must be finite"),
        ("longest_absence", -1, "longest_absence must not be negative"),
        ("crash_every", -2, "crash_every must not be negative"),
        ("crash_every", 1, "dies in every round"),
    ],
)
def test_wrong_faults(knob: str, value: float | str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=message):
        Faults(**{knob: value})
    with pytest.raises(SystemExit) as ended:
        main(["simulate", f"--{knob.replace('_', '-')}={value}"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_simulated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method ho, not frozen"):
        simulate(Config(method="frozen"), Faults())
    with pytest.raises(ValueError, match="lower snapshot_every"):
        simulate(small(snapshot_every=50), Faults(crash_every=5))
    for name in ("hosfl.log", "config.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(FileExistsError, match="another run"):
            simulate(small(), Faults(), folder)
        assert [p.name for p in folder.iterdir()] == [name]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "crowd"
    small = "--rounds 4 --clients 50 --sampled 3 --batch 8 --directions 2"
    arguments = ["simulate", *small.split(), "--dropout", "0.5", "--out"]
    assert main([*arguments, str(out)]) == 0
    shown = capsys.readouterr().out
    assert "all clients hold the same bits" in shown
    written = json.loads((out / "simulation.json").read_text())
    assert written["digest"] in shown
    assert written["faults"]["dropout"] == 0.5
    assert written["config"]["clients"] == 50
    assert main(["log", "verify", str(out / "hosfl.log")]) == 0
    rebuilt = tmp_path / "client.safetensors"
    base = str(out / "base.safetensors")
    assert main(["rebuild", str(out / "hosfl.log"), "--base", base, "--out", str(rebuilt)]) == 0
    log = Log.read(out / "hosfl.log")
    assert written["log_digest"] == log.digest
    assert len(log.rounds) == 4
    with pytest.raises(SystemExit):
        main([*arguments, str(out)])
    assert "another run" in capsys.readouterr().err


@pytest.mark.slow
def test_ten_thousand_clients_fit_in_two_gigabytes(tmp_path: Path) -> None:
    arguments = "simulate --clients 10000 --sampled 50 --rounds 30 --batch 16 --snapshot-every 10 --crash-every 20"
    faults = "--dropout 0.2 --absence 0.2 --delay 1 --byzantine 0.05 --aggregation median --damage 0.01"
    command = [sys.executable, "-m", "hosfl.cli", *arguments.split(), *faults.split(), "--out", str(tmp_path / "out")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert outcome["equal"]
    assert outcome["clients"] == 10000
    assert outcome["peak_memory"]["resident"] < 2e9
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert computed < 180  # seconds of one core
    print(f"{computed:.0f} s of computing, {outcome['peak_memory']['resident'] / 1e6:.0f} MB")
