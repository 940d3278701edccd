"""spec.py against published words, against its vectors, and against what the noise is for."""

import math

import numpy as np
import pytest

from hosfl_kernels import spec


def test_philox_is_numpy_s_philox():
    # numpy's Philox is the 64-bit variant, so the check is against Random123's published words for 4x32-10.
    assert spec.philox(0, (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert spec.philox(2**64 - 1, (ones,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
@pytest.mark.parametrize(("n", "cut"), [(5000, 1), (5000, 1023), (140_000, 131_072)])
def test_cut_is_whole(dist, n, cut):
    whole = spec.noise(n, 7, stream=3, start=2**33 + 5, dist=dist)
    left = spec.noise(cut, 7, stream=3, start=2**33 + 5, dist=dist)
    right = spec.noise(n - cut, 7, stream=3, start=2**33 + 5 + cut, dist=dist)
    assert (np.concatenate([left, right]) == whole).all()


@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
def test_seeds_streams_and_starts_differ(dist):
    base = spec.noise(4096, 1, dist=dist)
    others = [
        spec.noise(4096, 2, dist=dist),
        spec.noise(4096, 1 + 2**32, dist=dist),
        spec.noise(4096, 1, stream=1, dist=dist),
        spec.noise(4096, 1, start=2**45, dist=dist),
    ]
    for other in others:
        # Not equal, and not a permutation or a shift either: correlation at every lag is within 6 sigma.
        lags = np.fft.irfft(np.fft.rfft(base) * np.conj(np.fft.rfft(other)))
        assert np.abs(lags).max() < 6 * math.sqrt(4096)


def test_gaussian_moments():
    z = spec.gaussian(1 << 20, 11).astype(np.float64)
    n = z.size
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert np.abs(z).max() <= 6.77


def test_gaussian_is_close_to_exact_arithmetic():
    # Box-Muller in float64 on the same words: the polynomials are good to a few float32 ulps.
    words = np.random.default_rng(0).integers(0, 2**32, (2, 100_000), dtype=np.uint32)
    z0, z1 = spec.box_muller(*words)
    u = (words[0].astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)
    turns = words[1] * 2.0**-32
    r = np.sqrt(-2 * np.log(u))
    assert np.abs(z0 - r * np.cos(2 * np.pi * turns)).max() < 1.5e-6
    assert np.abs(z1 - r * np.sin(2 * np.pi * turns)).max() < 1.5e-6


def test_stochastic_rounding_is_right_on_average():
    x = np.full(200_000, 1 + 2.0**-9, np.float32)  # a quarter of the way from 1 to the next bfloat16
    bits = spec.from_float32(x, np.dtype(np.uint16), spec.rounding_bits(x.size, 5))
    up = (spec.to_float32(bits) > 1).mean()
    assert abs(up - 0.25) < 5 * math.sqrt(0.25 * 0.75 / x.size)


def test_plain_rounding_swallows_what_stochastic_rounding_keeps():
    x = spec.from_float32(np.full(20_000, 0.02, np.float32), np.dtype(np.uint16))
    plain = spec.replay(x, list(range(50)), [1e-6] * 50)
    stochastic = spec.replay(x, list(range(50)), [1e-6] * 50, rounding_seeds=list(range(50)))
    assert (plain == x).all()
    assert (stochastic != x).mean() > 0.2


def test_derived_seeds_do_not_collide():
    seeds = {spec.derive(1, a, b) for a in range(300) for b in range(300)}
    assert len(seeds) == 300 * 300


@pytest.mark.parametrize(
    ("largest", "quantum"),
    [(0.9, 2.0**-23), (1.0, 2.0**-22), (0.5, 2.0**-23), (0.49, 2.0**-24), (0.0, 2.0**-24), (100.0, 2.0**-16)],
)
def test_quantum(largest, quantum):
    assert spec.quantum([largest / 3, largest], [1.0, 1.0]) == quantum
    assert spec.quantum([largest * 4], [4.0]) == quantum
    assert 2**24 * quantum > 2 * largest
