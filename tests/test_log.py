"""The log: what was appended is read back, whatever happens to the end of the file; damage elsewhere is refused."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hosfl.protocol.header import Header, LogError, Parameter
from hosfl.protocol.log import Log
from hosfl.protocol.records import DigestRecord, EpochRecord, Packed, RoundRecord

SOURCE = Path(__file__).parent.parent / "hosfl" / "protocol" / "log.py"

# Subprocesses load the module on its own: it needs neither torch nor the rest of the package, and starts sooner.
LOAD = f"""
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("hosfl_log", {str(SOURCE)!r})
log = importlib.util.module_from_spec(spec)
sys.modules["hosfl_log"] = log
spec.loader.exec_module(log)
"""

MUTATIONS = 3000
MUTATIONS_SLOW = 10_000
KILLS = 3
KILLS_SLOW = 40

P = 5
HEADER = Header(
    seed=2**64 - 1,
    directions=P,
    dist="rademacher",
    mu=0.1,
    quantum=2.0**-21,
    rule={"name": "adam", "beta": 0.9, "eps": 1e-8},
    pool={"size": 64, "rounds": 60},
    parameters=(
        Parameter("0.weight", 0, (3, 4), "float32", 0.25),
        Parameter("0.bias", 2**32 - 1, (), "bfloat16", tied=("2.bias",)),
    ),
    base=hashlib.sha256(b"base").hexdigest(),
    settings={"task": "digits", "rates": [0.1, 1 / 3], "größe": None},
)


def coefficients(round, epoch=0):
    return np.random.default_rng((round, epoch)).standard_normal(P).astype(np.float32)


def a_round(round, epoch=0, participants=(7, 0, 2**32 - 1), quantum=None):
    values = coefficients(round, epoch) if participants else np.zeros(P, dtype=np.float32)
    return RoundRecord(epoch, round, 0.1 / (round + 1), values, participants, quantum)


def a_digest(round, epoch=0):
    return DigestRecord(epoch, round, hashlib.sha256(bytes([round, epoch])).digest())


RECORDS = [
    a_digest(0),
    a_round(0),
    a_round(1, participants=()),
    a_round(2, quantum=2.0**-16),
    a_digest(3),
    EpochRecord(2, 1),
    a_round(1, 2),
    a_digest(2, 2),
    a_round(2, 2, participants=tuple(range(9)), quantum=2.0**-17),  # its coarser lattice of old is void
]


def write(path, records=RECORDS, header=HEADER):
    """The log's bytes, and where each record ends: ends[n] after n records."""
    with Log.create(path, header, sync="never") as log:
        ends = [log.nbytes]
        for record in records:
            log.append(record)
            ends.append(log.nbytes)
    return path.read_bytes(), ends


# The format once more, from its description, to write files that `Log` would not.


def frame(running, payload):
    running = hashlib.blake2b(running + payload, digest_size=32).digest()
    body = payload + running[:8]
    length = struct.pack("<I", len(body))
    return running, b"\xabR" + length + struct.pack("<I", zlib.crc32(length + body)) + body


def head(text):
    start = b"hosfllog" + struct.pack("<HHI", 1, 0, len(text))
    return start + struct.pack("<I", zlib.crc32(start + text)) + text


def forged(data_head, payloads):
    """A file whose checksums and chain are right, whatever its payloads say."""
    running, parts = hashlib.blake2b(data_head, digest_size=32).digest(), [data_head]
    for payload in payloads:
        running, part = frame(running, payload)
        parts.append(part)
    return b"".join(parts)


def payload(record):
    kinds = {RoundRecord: 1, EpochRecord: 2, DigestRecord: 3}
    coarser = isinstance(record, RoundRecord) and record.quantum is not None
    start = struct.pack("<BHI", 4 if coarser else kinds[type(record)], record.epoch, record.round)
    if isinstance(record, RoundRecord):
        k = len(record.participants)
        start += struct.pack("<h", round(math.log2(record.quantum))) if coarser else b""
        return start + struct.pack(f"<f{P}f{k}I", record.rate, *record.coefficients, *record.participants)
    return start + (record.sha256 if isinstance(record, DigestRecord) else b"")


def header_text(**changes):
    values = {name: getattr(HEADER, name) for name in HEADER.__dataclass_fields__ if name != "blocks"}
    values["parameters"] = [vars(p) for p in HEADER.parameters]
    values |= changes
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# --- what is written is read --------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    path = tmp_path / "hosfl.log"
    with Log.create(path, HEADER) as log:
        for record in RECORDS:
            log.append(record)
    for again in (Log.read(path), Log.open(path)):
        assert again.header == HEADER
        assert again.records == RECORDS == log.records
        assert again.rounds == log.rounds == [RECORDS[1], RECORDS[6], RECORDS[8]]
        assert again.epoch == log.epoch == 2
        assert again.digests == log.digests == {0: RECORDS[0].sha256, 2: RECORDS[7].sha256}
        assert again.digest == log.digest
        assert again.nbytes == log.nbytes == path.stat().st_size
        assert again.cut == again.torn == 0
        again.close()


def test_the_file_is_what_the_module_says(tmp_path):
    data, _ = write(tmp_path / "log")
    assert data == forged(head(header_text()), [payload(r) for r in RECORDS])


def test_bytes_per_round(tmp_path):
    _, ends = write(tmp_path / "log")
    sizes = np.diff(ends)
    assert sizes[1] == 61  # P = 5, three participants
    assert sizes[2] == 61 - 12
    assert sizes[5] == 25
    assert sizes[4] == 57


def test_an_empty_log(tmp_path):
    with Log.create(tmp_path / "log", HEADER) as log:
        assert log.records == log.rounds == []
        assert log.digests == {}
        assert log.epoch == 0
    assert Log.read(tmp_path / "log").digest == log.digest


def test_coefficients_keep_their_bits(tmp_path):
    values = np.array([-0.0, 1e-45, -3.4028235e38, 2.0**-149, 1 / 3], dtype=np.float32)
    record = RoundRecord(0, 0, 0.1, values, (1,))
    write(tmp_path / "log", [record])
    (again,) = Log.read(tmp_path / "log").rounds
    assert again.coefficients.tobytes() == values.tobytes()
    assert again.rate == np.float32(0.1)
    assert again == record
    assert hash(again) == hash(record)
    assert again != RoundRecord(0, 0, 0.1, np.abs(values), (1,))
    values[0] = 1
    assert record.coefficients[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        again.coefficients[0] = 1


def test_floats_of_the_header_keep_their_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**62, 2000).view(np.float64).tolist()
    header = replace(HEADER, mu=5e-324, quantum=2.0**-1074, settings={"values": values})
    write(tmp_path / "log", header=header)
    assert Log.read(tmp_path / "log").header == header


def test_what_a_list_holds_is_the_reader_s_own(tmp_path):
    settings = {"rates": (1, 2)}
    header = replace(HEADER, settings=settings)
    settings["rates"] = 0
    assert header.settings == {"rates": [1, 2]}
    write(tmp_path / "log")
    log = Log.read(tmp_path / "log")
    log.rounds.truncate(0)
    log.records.truncate(0)
    log.digests.clear()
    assert log.records == RECORDS
    assert len(log.rounds) == 3
    assert len(log.digests) == 2


def test_packed_records_are_a_list_that_takes_their_bytes():
    rounds = [a_round(n, quantum=None if n % 3 else 2.0**-n) for n in range(6)]
    packed = Packed(P)
    for record in rounds:
        packed.append(record)
    assert list(packed) == rounds
    assert (packed[-1], packed[2:5], packed[:99]) == (rounds[-1], rounds[2:5], rounds)
    with pytest.raises(IndexError):
        packed[6]
    packed.truncate(2)
    assert (list(packed), len(packed)) == (rounds[:2], 2)
    packed.append(rounds[2])
    assert list(packed) == rounds[:3]
    assert (packed == rounds[:3], packed == rounds[:2], packed == 3) == (True, False, False)
    copy = packed[:]
    copy.append(rounds[3])
    assert (len(copy), len(packed)) == (4, 3)  # a slice is a copy
    tracemalloc.start()
    many = Packed(P)
    for _ in range(10_000):
        many.append(rounds[1])
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used < 10_000 * 1.3 * (len(many.payload(0)) + 8)  # as objects they take nine times that


def test_columns_are_what_the_records_hold():
    packed = Packed(P)
    for n in range(6):
        packed.append(a_round(n, participants=tuple(range(n)), quantum=2.0 ** (n - 9) if n % 3 == 1 else None))
    for part in (packed, packed[2:], packed[:0]):
        coefficients, rates, lattices = part.columns()
        assert (coefficients.dtype, rates.dtype, lattices.dtype) == (np.float32, np.float32, np.int32)
        assert coefficients.tolist() == [record.coefficients.tolist() for record in part]
        assert coefficients.shape == (len(part), P)
        assert rates.tolist() == [record.rate for record in part]
        assert lattices.tolist() == [[r.round, round(math.log2(r.quantum))] for r in part if r.quantum is not None]
        assert lattices.shape[1:] == (2,)


def test_the_running_digest_is_known_at_every_record(tmp_path):
    path = tmp_path / "log"
    with Log.create(path, HEADER) as log:
        digests = [log.digest]
        for record in RECORDS:
            log.append(record)
            digests.append(log.digest)
            assert log.position == (len(digests) - 1, log.digest)
    assert [Log.read(path).digest_after(n) for n in range(len(digests))] == digests
    with pytest.raises(LogError, match="records, not"):
        log.digest_after(len(digests))


def test_the_running_digest_tells_logs_apart(tmp_path):
    write(tmp_path / "a", RECORDS[:2])
    write(tmp_path / "b", RECORDS[:1])
    write(tmp_path / "c", RECORDS[:2], replace(HEADER, seed=1))
    assert len({Log.read(tmp_path / name).digest for name in "abc"}) == 3


def test_the_module_needs_no_torch(tmp_path):
    write(tmp_path / "log")
    code = LOAD + f"assert len(log.Log.read({str(tmp_path / 'log')!r}).rounds) == 3"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- what may come next -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (a_round(2), "epoch 0, round 2 cannot come in epoch 2 after 3 rounds"),
        (a_round(4, 2), "round 4 cannot come"),
        (a_round(2, 2), "round 2 cannot come"),
        (a_round(3, 3), "epoch 3, round 3 cannot come"),
        (EpochRecord(2, 1), "epoch 2 cannot start after epoch 2"),
        (EpochRecord(3, 4), "cannot start at round 4: there are 3 rounds"),
        (a_digest(4, 2), "round 4 cannot come"),
        (a_digest(2, 2), "round 2 cannot come"),
        (RoundRecord(2, 3, 0.1, np.zeros(P + 1), (1,)), "6 coefficients in a run of 5"),
        (a_round(3, 2, quantum=2.0**-17), "cannot follow one of"),
        (a_round(3, 2, quantum=2.0**-30), "cannot follow one of"),
        ("a record", "str is no kind of record"),
    ],
)
def test_records_out_of_order_are_refused(tmp_path, record, reason):
    data, _ = write(tmp_path / "log")
    with Log.open(tmp_path / "log") as log:
        with pytest.raises(LogError, match=reason):
            log.append(record)
        assert (tmp_path / "log").read_bytes() == data
        log.append(a_round(3, 2))
    assert Log.read(tmp_path / "log").records == [*RECORDS, a_round(3, 2)]
    if not isinstance(record, str) and "coefficients" not in reason:
        (tmp_path / "log").write_bytes(forged(head(header_text()), [payload(r) for r in [*RECORDS, record]]))
        with pytest.raises(LogError, match=rf"record 9 at byte {len(data)}: .*{reason}"):
            Log.read(tmp_path / "log")


def test_two_digests_of_one_round_agree(tmp_path):
    with Log.create(tmp_path / "log", HEADER) as log:
        log.append(a_digest(0))
        log.append(a_digest(0))
        with pytest.raises(LogError, match="another digest"):
            log.append(DigestRecord(0, 0, bytes(32)))


def test_an_epoch_may_void_every_round(tmp_path):
    records = [a_digest(0), a_round(0), a_digest(1), EpochRecord(9, 0), EpochRecord(10, 0), a_round(0, 10)]
    write(tmp_path / "log", records)
    log = Log.read(tmp_path / "log")
    assert log.rounds == [a_round(0, 10)]
    assert set(log.digests) == {0}


BAD_RECORDS = [
    (lambda: RoundRecord(0, 0, 0.1, [1.0, np.nan], (1,)), "coefficients must be finite"),
    (lambda: RoundRecord(0, 0, 0.1, [1.0, np.inf], (1,)), "coefficients must be finite"),
    (lambda: RoundRecord(0, 0, 0.1, [1e39], (1,)), "coefficients must be finite"),
    (lambda: RoundRecord(0, 0, 0.1, [0.1], (1,)), "coefficients must be float32"),
    (lambda: RoundRecord(0, 0, 0.1, [1], (1,)), "floats in one dim"),
    (lambda: RoundRecord(0, 0, 0.1, [[1.0]], (1,)), "floats in one dim"),
    (lambda: RoundRecord(0, 0, 0.1, [1.0], ()), "nobody took part"),
    (lambda: RoundRecord(0, 0, 0.1, [1.0], (1, 1)), "twice"),
    (lambda: RoundRecord(0, 0, 0.1, [1.0], (2**32,)), "a participant must"),
    (lambda: RoundRecord(0, 0, 0.1, [1.0], (-1,)), "a participant must"),
    (lambda: RoundRecord(0, 0, 0.1, [1.0], (True,)), "a participant must"),
    (lambda: RoundRecord(0, 0, np.nan, [1.0], (1,)), "rate must"),
    (lambda: RoundRecord(0, 0, 1e39, [1.0], (1,)), "rate must"),
    (lambda: RoundRecord(2**16, 0, 0.1, [1.0], (1,)), "epoch must"),
    (lambda: RoundRecord(0, 2**32, 0.1, [1.0], (1,)), "round must"),
    (lambda: RoundRecord(0, 0, 0.1, [1.0], (1,), 3.0), "power of two"),
    (lambda: RoundRecord(0, 0, 0.1, [1.0], (1,), -2.0), "power of two"),
    (lambda: RoundRecord(0, 0, 0.1, [1.0], (1,), np.inf), "finite"),
    (lambda: RoundRecord(0, 0, 0.1, [1.0], (1,), 2.0**104), "exponent must"),
    (lambda: EpochRecord(-1, 0), "epoch must"),
    (lambda: EpochRecord(1, 0.0), "round must"),
    (lambda: DigestRecord(0, 0, b"short"), "32 bytes"),
    (lambda: DigestRecord(0, 0, "0" * 32), "32 bytes"),
]


@pytest.mark.parametrize(("make", "reason"), BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_bad_records_are_refused(make, reason):
    with pytest.raises(LogError, match=reason):
        make()


BAD_HEADERS = [
    ({"seed": -1}, "seed must"),
    ({"seed": 2**64}, "seed must"),
    ({"seed": True}, "seed must"),
    ({"seed": 1.0}, "seed must"),
    ({"directions": 0}, "directions must"),
    ({"directions": 2**20 + 1}, "directions must"),
    ({"dist": "uniform"}, "dist must"),
    ({"dist": None}, "dist must"),
    ({"mu": -0.1}, "mu must"),
    ({"mu": "0.1"}, "mu must"),
    ({"quantum": 0.3}, "quantum must be a power of two"),
    ({"quantum": 0.0}, "quantum must"),
    ({"rule": {}}, "rule: name"),
    ({"rule": {"name": ""}}, "rule: name"),
    ({"rule": {"name": "sgd", "betas": [0.9]}}, "rule: betas"),
    ({"rule": "sgd"}, "rule must be a dict"),
    ({"pool": {"size": 64}}, "pool must have"),
    ({"pool": {"size": 4, "rounds": 1}}, "pool: size"),
    ({"pool": {"size": 64, "rounds": -1}}, "pool: rounds"),
    ({"pool": 64}, "pool must be a dict"),
    ({"base": "0" * 63}, "base must"),
    ({"base": "A" * 64}, "base must"),
    ({"settings": []}, "settings must"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD_HEADERS, ids=[next(iter(c)) for c, _ in BAD_HEADERS])
def test_bad_headers_are_refused(tmp_path, changes, reason):
    with pytest.raises(LogError, match=reason):
        replace(HEADER, **changes)
    (tmp_path / "log").write_bytes(head(header_text(**changes)))
    with pytest.raises(LogError, match=reason):
        Log.read(tmp_path / "log")


BAD_PARAMETERS = [
    ({"name": ""}, "a parameter name must"),
    ({"stream": 2**32}, "parameter '0.weight': stream must"),
    ({"shape": 3}, "shape must"),
    ({"shape": [3, -1]}, "a size in shape must"),
    ({"shape": [2**62] * 300}, "no tensor has as many elements as one of shape"),
    ({"dtype": "float64"}, "dtype must"),
    ({"factor": 0.3}, "factor must be a power of two"),
    ({"factor": -1.0}, "factor must be a power of two"),
    ({"name": "0.bias"}, "two have the same name"),
    ({"tied": ("0.weight",)}, "two have the same name"),
    ({"tied": ("2.bias",)}, "two have the same name"),
    ({"tied": "2.weight"}, "tied must be"),
    ({"tied": ("",)}, "a name in tied must"),
    ({"stream": 2**32 - 1}, "two have the same stream"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD_PARAMETERS, ids=[next(iter(c)) for c, _ in BAD_PARAMETERS])
def test_bad_parameters_are_refused(tmp_path, changes, reason):
    with pytest.raises(LogError, match=reason):
        replace(HEADER, parameters=(replace(HEADER.parameters[0], **changes), HEADER.parameters[1]))
    parameters = [vars(HEADER.parameters[0]) | changes, vars(HEADER.parameters[1])]
    (tmp_path / "log").write_bytes(head(header_text(parameters=parameters)))
    with pytest.raises(LogError, match=reason):
        Log.read(tmp_path / "log")


@pytest.mark.parametrize(
    ("value", "reason"),
    [({"x": float("nan")}, "settings"), ({"x": {1, 2}}, "settings"), ({"x": "\ud800"}, "settings")],
)
def test_settings_that_are_no_json(value, reason):
    with pytest.raises(LogError, match=reason):
        replace(HEADER, settings=value)


def test_parameters_must_be_parameters():
    with pytest.raises(LogError, match="parameters must"):
        replace(HEADER, parameters=[{"name": "a"}])


DEEP = b"[" * 100_000 + b"]" * 100_000
HOSTILE_TEXTS = [
    (b"", "no JSON"),
    (b"\xff", "no JSON"),
    (b"[]", "must have exactly"),
    (b"{}", "must have exactly"),
    (DEEP, "the header"),
    (header_text(settings={"x": 0}).replace(b'"x":0', b'"x":' + DEEP), "the header"),
    (header_text(settings={"x": 0}).replace(b'"x":0', b'"x":' + b"9" * 5000), "the header"),
    (header_text(settings={"x": 0}).replace(b'"x":0', b'"x":NaN'), "settings cannot be written as JSON"),
    (header_text(settings={"x": 0}).replace(b'"x":0', b'"x":0,"x":0'), "canonical"),
    (header_text().replace(b":", b": ", 1), "canonical"),
    (header_text().replace(b'"mu":0.1', b'"mu":0.10'), "canonical"),
    (header_text(mu=1), "canonical"),
    (header_text(extra=1), "must have exactly"),
    (header_text(parameters={}), "parameters must be a list"),
    (header_text(parameters=[1]), "a parameter must have exactly"),
]


@pytest.mark.parametrize(("text", "reason"), HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_hostile_header_texts(tmp_path, text, reason):
    (tmp_path / "log").write_bytes(head(text))
    with pytest.raises(LogError, match=reason):
        Log.read(tmp_path / "log")


@pytest.mark.parametrize("depth", [50, 300, 900, 3000])
def test_deep_settings(tmp_path, depth):
    text = header_text(settings={"x": 0}).replace(b'"x":0', b'"x":' + b"[" * depth + b"]" * depth)
    (tmp_path / "log").write_bytes(head(text))
    try:
        with Log.open(tmp_path / "log") as log:
            log.append(a_round(0))
    except LogError:
        assert depth > 100


START = struct.pack("<BHI", 1, 0, 0)
HOSTILE_PAYLOADS = [
    (START + struct.pack("<f5f1I", 0.1, 1, 2, float("nan"), 4, 5, 1), "finite"),
    (START + struct.pack("<f5f1I", 0.1, 1, 2, float("inf"), 4, 5, 1), "finite"),
    (START + struct.pack("<f5f1I", float("nan"), 1, 2, 3, 4, 5, 1), "rate"),
    (START + struct.pack("<f5f2I", 0.1, 1, 2, 3, 4, 5, 1, 1), "twice"),
    (START + struct.pack("<f5f", 0.1, 1, 2, 3, 4, 5), "nobody"),
    (START + struct.pack("<f4f", 0.1, 1, 2, 3, 4), "does not take"),
    (START + struct.pack("<f5f1I", 0.1, 1, 2, 3, 4, 5, 1) + b"x", "does not take"),
    (START, "does not take"),
    (struct.pack("<BHI", 2, 1, 0) + b"x", "unknown kind 2 of 8 bytes"),
    (struct.pack("<BHI", 3, 0, 0) + bytes(31), "32 bytes"),
    (struct.pack("<BHI", 3, 0, 0) + bytes(33), "32 bytes"),
    (struct.pack("<BHI", 0, 0, 0), "unknown kind 0"),
    (struct.pack("<BHI", 4, 0, 0), "unknown kind 4"),
    (struct.pack("<BHI", 4, 0, 0) + b"x", "unknown kind 4"),
    (struct.pack("<BHIh", 4, 0, 0, 3), "does not take"),
    (struct.pack("<BHIhf5f1I", 4, 0, 0, 104, 0.1, 1, 2, 3, 4, 5, 1), "exponent must"),
    (struct.pack("<BHIhf5f1I", 4, 0, 0, -150, 0.1, 1, 2, 3, 4, 5, 1), "exponent must"),
    (struct.pack("<BHI", 255, 0, 0), "unknown kind 255"),
]


@pytest.mark.parametrize(("hostile", "reason"), HOSTILE_PAYLOADS, ids=range(len(HOSTILE_PAYLOADS)))
def test_hostile_payloads_with_right_checksums(tmp_path, hostile, reason):
    for before in ([], [payload(EpochRecord(1, 0))]):
        for after in ([], [payload(a_digest(0, 1))]):
            (tmp_path / "log").write_bytes(forged(head(header_text()), [*before, hostile, *after]))
            with pytest.raises(LogError, match=rf"record {len(before)} at byte \d+: .*{reason}"):
                Log.read(tmp_path / "log")


# --- the tail -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [0, 1, 3, 61, 4096], ids=lambda n: f"{n} zeros")
@pytest.mark.parametrize("last", [8, 7, 5], ids=["round", "digest", "epoch"])
def test_every_torn_length_of_the_last_record(tmp_path, last, zeros):
    path, records = tmp_path / "log", RECORDS[: last + 1]
    data, ends = write(path, records)
    for length in range(ends[last], len(data)):
        torn = data[:length] + bytes(zeros)
        if torn[: len(data)] == data:
            continue  # a record that ends with a zero byte is whole with it
        path.write_bytes(torn)
        log = Log.read(path)
        assert log.records == records[:last]
        assert (log.torn, log.cut, log.nbytes) == (len(torn) - ends[last], 0, ends[last])
        assert path.read_bytes() == torn
        with Log.open(path, sync="never") as log:
            assert (log.torn, log.cut) == (0, len(torn) - ends[last])
            assert log.records == records[:last]
            assert path.read_bytes() == data[: ends[last]]
            log.append(records[last])
        assert path.read_bytes() == data


def test_zeros_after_the_last_record(tmp_path):
    path = tmp_path / "log"
    data, _ = write(path)
    for zeros in (1, 9, 10, 11, 511, 5000):
        path.write_bytes(data + bytes(zeros))
        log = Log.read(path)
        assert log.records == RECORDS
        assert log.torn == zeros


def test_a_large_record_with_sectors_that_were_not_written(tmp_path):
    path = tmp_path / "log"
    large = a_round(3, 2, participants=tuple(range(1, 1001)))
    data, ends = write(path, [*RECORDS, large])
    begin = ends[-2]
    for hole in (slice(0, 10), slice(0, 512), slice(0, 3000), slice(512, 1024), slice(1024, 3000)):
        torn = bytearray(data)
        torn[begin + hole.start : begin + hole.stop] = bytes(hole.stop - hole.start)
        path.write_bytes(torn)
        assert Log.read(path).records == RECORDS


def test_a_header_cut_short_is_refused(tmp_path):
    path = tmp_path / "log"
    data, ends = write(path)
    for length in range(ends[0]):
        path.write_bytes(data[:length])
        for way in (Log.read, Log.open):
            with pytest.raises(LogError, match="never finished"):
                way(path)
            assert path.read_bytes() == data[:length]


def test_reading_changes_nothing(tmp_path):
    path = tmp_path / "log"
    data, _ = write(path)
    path.write_bytes(data[:-1])
    path.chmod(0o444)
    before = path.stat()
    assert Log.read(path).torn > 0
    after = path.stat()
    assert (before.st_mtime_ns, before.st_size, before.st_ino) == (after.st_mtime_ns, after.st_size, after.st_ino)
    assert path.read_bytes() == data[:-1]
    with pytest.raises(LogError, match="reading only"):
        Log.read(path).append(a_round(3, 2))
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


# --- damage -------------------------------------------------------------------------------------------------------


def judge(path, data, original, ends, records=RECORDS, header=HEADER):
    """Reads `data`: a true prefix of the records that drops nothing readable, or LogError. How many; None: refused."""
    path.unlink(missing_ok=True)  # a new file costs less than one cut and written again, which some systems sync
    path.write_bytes(data)
    try:
        log = Log.read(path)
    except LogError:
        return None
    count = len(log.records)
    assert log.header == header
    assert log.records == records[:count]
    assert data[: ends[count]] == original[: ends[count]]
    assert log.torn == len(data) - ends[count]
    for n in range(count, len(records)):
        assert original[ends[n] : ends[n + 1]] not in data[ends[count] :]
    return count


def test_every_flipped_bit(tmp_path):
    path = tmp_path / "log"
    small = replace(HEADER, pool=None, parameters=HEADER.parameters[:1], settings={})
    data, ends = write(path, header=small)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        count = judge(path, bytes(flipped), data, ends, header=small)
        if bit // 8 < ends[-2]:
            assert count is None, bit
        else:
            assert count in (None, len(RECORDS) - 1), bit


def test_damage_is_located(tmp_path):
    path = tmp_path / "log"
    data, ends = write(path)
    for n in range(len(RECORDS) - 1):
        for at in range(ends[n], ends[n + 1]):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
            with pytest.raises(
                LogError, match=rf"record {n} at byte {ends[n]} is damaged.*follows it at byte {ends[n + 1]}$"
            ):
                Log.open(path)


def test_a_damaged_header_is_called_damaged(tmp_path):
    path = tmp_path / "log"
    data, ends = write(path)
    for at in (*range(16, 20), *range(20, ends[0])):
        path.unlink()
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(LogError, match="the header is damaged: its checksum is wrong"):
            Log.read(path)


def test_two_damaged_records_at_the_end_are_no_torn_append(tmp_path):
    path = tmp_path / "log"
    data, ends = write(path)
    damaged = bytearray(data)
    damaged[ends[-3] + 20] ^= 1
    damaged[ends[-2] + 20] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(LogError, match=r"record 7 .* no torn append"):
        Log.open(path)
    assert path.read_bytes() == damaged


def test_junk_at_the_end_is_no_torn_append(tmp_path):
    path = tmp_path / "log"
    data, _ = write(path)
    for junk in (b"x", b"\xabx", b"R\0\0", data[-61:-1]):
        path.write_bytes(data + junk)
        with pytest.raises(LogError, match="no torn append"):
            Log.read(path)


def test_records_removed_repeated_and_exchanged(tmp_path):
    path = tmp_path / "log"
    data, ends = write(path)
    frames = [data[a:b] for a, b in itertools.pairwise(ends)]
    for n in range(len(frames)):
        for m in range(len(frames)):
            moved = frames.copy()
            moved.insert(m, moved.pop(n))
            repeated = [*frames[:m], frames[n], *frames[m:]]
            for changed in (moved, repeated):
                if changed != frames:
                    path.write_bytes(data[: ends[0]] + b"".join(changed))
                    with pytest.raises(LogError, match="missing, repeated or out of order"):
                        Log.read(path)
        path.write_bytes(data[: ends[0]] + b"".join(frames[:n] + frames[n + 1 :]))
        if n + 1 < len(frames):
            with pytest.raises(LogError, match=f"record {n} at byte {ends[n]}: does not continue"):
                Log.read(path)


def test_a_record_of_another_log_is_refused(tmp_path):
    data, ends = write(tmp_path / "log", [a_round(0), a_round(1)])
    other, others = write(tmp_path / "other", [a_round(0, participants=(1,)), a_round(1)])
    (tmp_path / "log").write_bytes(data[: ends[1]] + other[others[1] :])
    with pytest.raises(LogError, match="does not continue"):
        Log.read(tmp_path / "log")


def mutated(rng, data, ends):
    """One to three random damages."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        n = rng.randrange(len(ends) - 1)
        at = rng.choice((rng.randrange(len(data) + 1), min(ends[n], len(data)), max(0, len(data) - rng.randrange(70))))
        length = rng.choice((1, 2, 4, 8, 61, 200, 4096))
        match rng.randrange(10):
            case 0:
                for _ in range(rng.randint(1, 8)):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[max(1, at) :]
            case 2:
                data[at:at] = rng.randbytes(length)
            case 3:
                data[at:at] = bytes(length)
            case 4:
                del data[max(1, at) : at + length]
            case 5:
                data[at : at + length] = bytes(len(data[at : at + length]))
            case 6:  # a length, huge or small
                value = rng.choice((2**32 - 1, 2**31, 2**20, 15, 14, 0, len(data)))
                data[ends[n] + 2 : ends[n] + 6] = struct.pack("<I", value)
            case 7:  # a record removed, repeated or carried elsewhere
                part = data[ends[n] : ends[n + 1]]
                if rng.random() < 0.7:
                    del data[ends[n] : ends[n + 1]]
                if rng.random() < 0.7:
                    to = rng.choice(ends)
                    data[to:to] = part
            case 8:  # NaN coefficients, the checksum made right
                begin, end = ends[n] + 10, ends[n + 1]
                if end <= len(data) and end - begin > 40:
                    data[begin + 11 : begin + 15] = struct.pack("<f", float("nan"))
                    data[ends[n] + 6 : begin] = struct.pack(
                        "<I", zlib.crc32(data[ends[n] + 2 : ends[n] + 6] + data[begin:end])
                    )
            case 9:
                data += data[at : at + length]
        data = data or bytearray(1)
    return bytes(data)


def judge_mutations(path, count, seed):
    data, ends = write(path.with_name("original"))
    rng = random.Random(seed)
    results = {"refused": 0, "cut": 0, "whole": 0}
    for _ in range(count):
        kept = judge(path, mutated(rng, data, ends), data, ends)
        results["refused" if kept is None else "whole" if kept == len(RECORDS) else "cut"] += 1
    assert results["refused"] > count / 2
    assert results["cut"] > count / 50


def test_mutations(tmp_path):
    judge_mutations(tmp_path / "log", MUTATIONS, seed=0)


@pytest.mark.slow
def test_many_mutations(tmp_path):
    judge_mutations(tmp_path / "log", MUTATIONS_SLOW, seed=1)


def test_no_claim_allocates_more_than_the_file_holds(tmp_path):
    path = tmp_path / "log"
    data, ends = write(path, [a_round(n) for n in range(200)])
    rng = random.Random(0)
    header = bytearray(data)
    header[12:16] = struct.pack("<I", 2**32 - 1)
    files = [bytes(header), head(header_text(directions=2**20)) + data[ends[0] :]]
    for n in (0, 100, 199):
        for length in (2**32 - 1, 2**31, 2**24):
            claim = bytearray(data)
            claim[ends[n] + 2 : ends[n] + 6] = struct.pack("<I", length)
            files.append(bytes(claim))
    files += [mutated(rng, data, ends) for _ in range(50)]
    tracemalloc.start()
    try:
        for file in files:
            path.write_bytes(file)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(LogError):
                Log.read(path)
            assert tracemalloc.get_traced_memory()[1] - before < 16 * len(file) + (1 << 17)
    finally:
        tracemalloc.stop()


def test_a_claim_of_more_than_is_there_is_torn_whatever_its_checksum(tmp_path):
    data, ends = write(tmp_path / "log")
    length, body = struct.pack("<I", ends[-1] - ends[-2] + 990), data[ends[-2] + 10 :]
    claim = b"\xabR" + length + struct.pack("<I", zlib.crc32(length + body)) + body
    (tmp_path / "log").write_bytes(data[: ends[-2]] + claim)
    log = Log.read(tmp_path / "log")
    assert log.records == RECORDS[:-1]
    assert log.torn == len(claim)


def test_a_million_beginnings_of_records_take_no_ages(tmp_path):
    data, _ = write(tmp_path / "log")
    (tmp_path / "log").write_bytes(data + (b"\xabR" + struct.pack("<I", 1 << 20)) * 500_000)
    begin = time.perf_counter()
    with pytest.raises(LogError, match="too many beginnings"):
        Log.read(tmp_path / "log")
    assert time.perf_counter() - begin < 10


def test_what_is_no_log(tmp_path):
    (tmp_path / "log").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(LogError, match=r"log: starts with .* no log"):
        Log.read(tmp_path / "log")
    with pytest.raises(LogError, match="no regular file"):
        Log.read("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for opened in (Log.read, Log.open):  # which do not wait for somebody who writes
        with pytest.raises(LogError, match="no regular file"):
            opened(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        Log.open(tmp_path / "none")
    data = head(header_text())
    for at, number in ((8, r"3\.0"), (10, r"1\.3")):
        (tmp_path / "log").write_bytes(data[:at] + b"\3" + data[at + 1 :])
        with pytest.raises(LogError, match=f"format {number}"):
            Log.read(tmp_path / "log")


# --- disks and processes ------------------------------------------------------------------------------------------


def test_an_existing_file_is_kept(tmp_path):
    data, _ = write(tmp_path / "log")
    with pytest.raises(FileExistsError):
        Log.create(tmp_path / "log", HEADER)
    assert (tmp_path / "log").read_bytes() == data


@contextlib.contextmanager
def largest_file(size):
    """A full disk, in effect: writes beyond `size` are cut short, then fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_at_every_byte(tmp_path):
    path = tmp_path / "log"
    with Log.create(path, HEADER, sync="never") as log:
        for room in range(61):
            log.append(a_round(room))
            data, digest = path.read_bytes(), log.digest
            with largest_file(len(data) + room), pytest.raises(OSError, match="too large"):
                log.append(a_round(room + 1))
            assert path.read_bytes() == data
            assert (log.nbytes, log.digest, len(log.rounds)) == (len(data), digest, room + 1)
    assert Log.read(path).rounds == [a_round(n) for n in range(61)]


def test_a_full_disk_at_creation_leaves_no_file(tmp_path):
    with largest_file(100), pytest.raises(OSError, match="too large"):
        Log.create(tmp_path / "log", HEADER)
    assert not list(tmp_path.iterdir())


def test_after_a_failed_fsync_the_log_takes_no_more(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    log = Log.create(tmp_path / "log", HEADER)
    log.append(a_round(0))
    data = (tmp_path / "log").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            log.append(a_round(1))
    assert (tmp_path / "log").read_bytes() == data
    assert len(log.rounds) == 1
    with pytest.raises(LogError, match="could not be synced"):
        log.append(a_round(1))
    log.close()
    with Log.open(tmp_path / "log") as log:
        log.append(a_round(1))


def test_a_file_changed_by_others_is_not_written_to(tmp_path):
    with Log.create(tmp_path / "log", HEADER) as log:
        with (tmp_path / "log").open("ab") as other:
            other.write(b"x")
        with pytest.raises(LogError, match="something else changed it"):
            log.append(a_round(0))
        assert log.rounds == []


@pytest.mark.parametrize(("sync", "expected"), [("always", 7), (1, 7), (3, 2), (7, 1), (8, 0), ("never", 0)])
def test_how_often_the_file_is_synced(tmp_path, monkeypatch, sync, expected):
    calls = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (calls.append(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor))
    )
    path = tmp_path / "log"
    log = Log.create(path, HEADER, sync=sync)
    assert calls == [str(path), str(tmp_path)]
    calls.clear()
    for n in range(7):
        log.append(a_round(n))
    assert len(calls) == expected
    log.close()
    log.close()
    assert len(calls) == expected + (sync in (3, 8))
    calls.clear()
    with Log.open(path, sync=sync):
        assert calls == [str(path), str(tmp_path)]


@pytest.mark.parametrize("sync", ["sometimes", 0, -1, True, 1.5, None])
def test_wrong_sync(tmp_path, sync):
    with pytest.raises(LogError, match="sync"):
        Log.create(tmp_path / "log", HEADER, sync=sync)
    assert not list(tmp_path.iterdir())


def test_a_closed_log(tmp_path):
    with Log.create(tmp_path / "log", HEADER) as log:
        log.append(a_round(0))
    log.close()
    log.flush()
    assert len(log.rounds) == 1
    with pytest.raises(LogError, match="is closed"):
        log.append(a_round(1))


def test_one_writer(tmp_path):
    path = tmp_path / "log"
    code = LOAD + f"log.Log.open({str(path)!r})"

    def other():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    with Log.create(path, HEADER) as log:
        log.append(a_round(0))
        assert Log.read(path).rounds == log.rounds  # must not end the lock
        for _ in range(2):
            with pytest.raises(LogError, match="log: another writer"):
                Log.open(path)
        refused = other()
        assert refused.returncode != 0
        assert "another writer has this log open" in refused.stderr
        log.append(a_round(1))
    assert other().returncode == 0
    with Log.open(path) as log:
        assert len(log.rounds) == 2


WRITER = """
import numpy as np
mine = log.Log.open(sys.argv[1], sync="always")
rng = np.random.default_rng(0)
for n in range(len(mine.rounds), 1_000_000):
    clients = tuple(range(int(rng.integers(0, 400))))
    row = np.full(mine.header.directions, n if clients else 0, dtype=np.float32)
    mine.append(log.RoundRecord(0, n, 0.1, row, clients))
    sys.stdout.write(f"{n}\\n")
    sys.stdout.flush()
"""


def kill_and_reopen(path, times, seed):
    """Kill a writer at random moments; every record that it had acknowledged is there, and numbers go on."""
    with Log.create(path, HEADER):
        pass
    rng = random.Random(seed)
    for _ in range(times):
        process = subprocess.Popen(
            [sys.executable, "-c", LOAD + WRITER, str(path)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        try:
            first = process.stdout.readline()
            time.sleep(rng.uniform(0, 0.1))
        finally:
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read()
            process.wait()
            process.stdout.close()
        acknowledged = int((first + rest).split(b"\n")[-2])
        with Log.open(path) as log:
            assert len(log.rounds) >= acknowledged + 1
            assert len(log.rounds) <= acknowledged + 2
            for record in log.rounds[: acknowledged + 1]:
                assert record.coefficients[0] == (record.round if record.participants else 0)


def test_a_killed_writer_loses_nothing(tmp_path):
    kill_and_reopen(tmp_path / "log", KILLS, seed=0)


@pytest.mark.slow
def test_a_writer_killed_often_loses_nothing(tmp_path):
    kill_and_reopen(tmp_path / "log", KILLS_SLOW, seed=1)
