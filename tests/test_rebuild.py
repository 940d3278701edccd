"""hosfl rebuild: logs that no run has written are a LogError, in time, or the weights of the run."""

import copy
import hashlib
import json
import random
import struct
import time
import zlib
from dataclasses import asdict, replace

import pytest
from small import RULES
from test_fuzz import extend, flip, remove, truncate
from test_ledger import logged

from hosfl.protocol import header as header_module
from hosfl.protocol import log as log_module
from hosfl.protocol.header import LogError
from hosfl.protocol.log import Log
from hosfl.protocol.records import DigestRecord, EpochRecord, History, encode_record
from hosfl.protocol.replica import Replica
from hosfl.runs.checkpoint import rebuild

# Seconds of this thread. A log is read in milliseconds; what the tests look for would take minutes or hours.
LIMIT = 10


def sealed(log, header):
    """The bytes of a log of the same records behind another header, its fields as JSON."""
    header = {name: value for name, value in header.items() if value or name != "blocks"}
    version = header_module.WITH_BLOCKS if "blocks" in header else header_module.VERSION
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    head = header_module.HEADER.pack(header_module.MAGIC, version, 0, len(text), 0)[:-4]
    data = head + struct.pack("<I", zlib.crc32(text, zlib.crc32(head))) + text
    running = hashlib.blake2b(data, digest_size=32).digest()
    for record in log.records:
        payload = encode_record(record)
        running = hashlib.blake2b(running + payload, digest_size=32).digest()
        data += log_module._frame(payload + running[: log_module.CHAIN])
    return data


def at(*path):
    def put(value):
        def change(header):
            for key in path[:-1]:
                header = header[key]
            header[path[-1]] = value

        return change

    return put


SGD_RULE = {"name": "sgd", "momentum": 0.5, "weight_decay": 0.0}
ADAMW_RULE = {"name": "adamw", "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}
HOSTILE_HEADERS = [
    ("moves", at("dist")("gaussian"), "on a lattice are"),
    ("moves", at("parameters", 0, "dtype")("bfloat16"), "on a lattice are"),
    *(("moves", at("quantum")(q), "exponent must be") for q in (2.0**-150, 2.0**104, 2.0**-1070, 2.0**1023)),
    ("moves", at("quantum")(2.0**-140), "beyond the lattice's limit"),
    ("moves", at("mu")(1e300), "beyond the lattice's limit"),
    *(("moves", at("mu")(mu), "finite number") for mu in (10**400, -(10**400), True, "0")),
    ("moves", at("rule")(SGD_RULE), "a lattice, where records are moves, or an update rule"),
    ("sgd", at("rule")({"name": "moves"}), "a lattice, where records are moves, or an update rule"),
    ("sgd", at("rule")({"name": "adam"}), "unknown update rule"),
    *(("sgd", at("rule")({**SGD_RULE, "momentum": m}), "momentum must be") for m in (1, -1, True, "0", None, 10**400)),
    *(("sgd", at("rule")({**ADAMW_RULE, "eps": e}), "eps must be") for e in (0, -1, True, "0", None, 10**400)),
    ("sgd", at("rule")({**SGD_RULE, "beta1": 0.9}), "makes no run"),
    ("sgd", at("rule")({**SGD_RULE, "weight_decay": 1e300}), "no run has made"),
    *(("sgd", at("parameters", 0, "factor")(f), "no run has made") for f in (2.0**101, 2.0**-101)),
    *(("moves", at("parameters", 0, "factor")(f), "digest") for f in (2.0**101, 2.0**-1000, 2.0**1000)),
    # Finer than what its moves are multiples of, so that they would carry weights beyond it.
    ("moves", at("quantum")(2.0**-30), "no run has made"),
    ("moves", at("quantum")(2.0**-15), "digest|no run has made"),
    ("blocks", at("blocks", 0, "tensors")([0, 1]), "in one block"),
    ("blocks", at("blocks", 0, "tensors")([]), "in one block"),
    ("blocks", at("blocks", 0, "tensors")([2]), "in one block"),
    ("blocks", at("blocks", 0, "tensors")("0"), "must be a list"),
    ("blocks", at("blocks", 0, "tensors")([True]), "a block's tensor must be"),
    *(("blocks", at("blocks", 0, "directions")(n), "a block's directions must be") for n in (0, -1, 5, 10**400, "1")),
    ("blocks", at("blocks", 0, "directions")(3), "blocks of"),
    ("blocks", at("blocks")([{"directions": 1}]), "a block must have exactly"),
    ("blocks", at("blocks")(7), "blocks must be a list"),
    ("blocks", at("blocks")([0]), "must be a dict"),
    ("blocks", at("pool")({"size": 8, "rounds": 0}), "directions of a pool move all tensors: leave out blocks"),
]


@pytest.mark.parametrize(("kind", "change", "reason"), HOSTILE_HEADERS, ids=range(len(HOSTILE_HEADERS)))
def test_headers_that_no_run_has_are_refused(kind, change, reason, tmp_path):
    logged(kind, tmp_path)
    log = Log.read(tmp_path / "hosfl.log")
    header = asdict(log.header)
    change(header)
    (tmp_path / "hosfl.log").write_bytes(sealed(log, header))
    with pytest.raises(LogError, match=reason):
        rebuild(tmp_path / "hosfl.log", tmp_path / "base.safetensors")


@pytest.mark.parametrize("rounds", [0, 1, 2**32 - 1])
def test_a_vast_pool_takes_no_time(rounds, tmp_path):
    logged("moves", tmp_path)
    log = Log.read(tmp_path / "hosfl.log")
    header = {**asdict(log.header), "pool": {"size": 2**32 - 1, "rounds": rounds}}
    (tmp_path / "hosfl.log").write_bytes(sealed(log, header))
    begin = time.thread_time()
    with pytest.raises(LogError, match="the digests differ"):
        rebuild(tmp_path / "hosfl.log", tmp_path / "base.safetensors")
    assert time.thread_time() - begin < LIMIT


VALUES = (None, True, False, 0, 1, -1, 3, 0.5, 1e300, 2.0**-149, 2.0**-1000, 2.0**103, 2.0**1000, 2**32 - 1, 2**64 - 1)
VALUES += (
    10**400,
    "",
    "sgd",
    "moves",
    "adamw",
    "gaussian",
    "rademacher",
    "bfloat16",
    [],
    {},
    [1],
    ["weight"],
    20_000_000,
)


def mutated(header, chance):
    def places(value):
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield value, key
            yield from places(value[key])

    for _ in range(chance.choice((1, 1, 2, 3))):
        place, key = chance.choice([*places(header)])
        other, again = chance.choice([*places(header)])
        place[key] = copy.deepcopy(chance.choice((chance.choice(VALUES), other[again])))


def fuzz(kind, count, seed, folder):
    """Logs behind mutated headers, and with mutated bytes: refused, or the half of the log. Returns why."""
    made, digests = logged(kind, folder)
    log, path, chance = Log.read(folder / "hosfl.log"), folder / "mutated.log", random.Random(seed)
    data, plain, reasons = (folder / "hosfl.log").read_bytes(), json.dumps(asdict(log.header)), set()
    for _ in range(count):
        header = json.loads(plain)
        if chance.random() < 0.8:
            mutated(header, chance)
            path.write_bytes(sealed(log, header))
        else:
            path.write_bytes(bytes(chance.choice((flip, truncate, extend, remove))(bytearray(data), chance)))
        begin = time.thread_time()
        try:
            _, replica = rebuild(path, folder / "base.safetensors")
            assert replica.digest() in digests
        except LogError as error:
            reasons.add(str(error).removeprefix(str(path))[:50])
        assert time.thread_time() - begin < LIMIT
    return reasons


@pytest.mark.parametrize("kind", RULES)
def test_mutated_logs_are_refused_or_right(kind, tmp_path):
    assert len(fuzz(kind, 100, 0, tmp_path)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
def test_ten_thousand_mutated_logs_are_refused_or_right(kind, tmp_path):
    fuzz(kind, 1500, 1, tmp_path)


def test_a_known_digest_costs_one_pass_over_the_half(tmp_path, monkeypatch):
    logged("moves", tmp_path, rounds=23)
    digest, taken = Replica.digest, []
    monkeypatch.setattr(Replica, "digest", lambda replica: taken.append(replica.applied) or digest(replica))
    rebuild(tmp_path / "hosfl.log", tmp_path / "base.safetensors")
    assert taken == [10, 20]


class CountedReads(dict):
    """A dict that counts how many of its keys are gone through."""

    read = 0

    def _counted(self, keys):
        for key in keys:
            self.read += 1
            yield key

    def __iter__(self):
        return self._counted(super().__iter__())

    def __reversed__(self):
        return self._counted(super().__reversed__())

    def keys(self):
        return iter(self)

    def items(self):
        return ((key, self[key]) for key in self)


def test_a_restart_looks_at_no_digest_that_stays(tmp_path):
    """It once looked at every digest before it, so that many restarts took minutes."""
    made, _ = logged("moves", tmp_path, rounds=1)
    history = History(Log.read(tmp_path / "hosfl.log").header)
    history.digests = CountedReads()
    first = made.ledger.records[0]
    for round in range(2000):
        history.add(replace(first, round=round))
        history.add(DigestRecord(0, round + 1, bytes(32)))
    for epoch in range(1, 21):
        history.add(EpochRecord(epoch, 2000))
    assert history.digests.read <= 20
    assert len(history.digests) == 2000
    history.add(EpochRecord(21, 3))
    assert list(history.digests) == [1, 2, 3]
