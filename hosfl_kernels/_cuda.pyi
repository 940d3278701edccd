from collections.abc import Sequence

EMULATED: bool

# Addresses, sizes, dtypes, streams, starts, factors; and the device's number with a stream of it.
_Places = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], Sequence[int], Sequence[float]]
_Queue = tuple[int, int]

def records(seeds: Sequence[int], coefficients: Sequence[float], rounding_seeds: Sequence[int]) -> bytes: ...
def steps(rounds: Sequence[Sequence[float]], rounding_seeds: Sequence[int]) -> bytes: ...
def philox(address: int, key: int, c0: int, c1: int, c2: int, c3: int, queue: _Queue) -> None: ...
def noise(address: int, n: int, seed: int, stream: int, start: int, gaussian: bool, queue: _Queue) -> None: ...
def perturb(
    places: _Places, seed: int, scale: float, rounding_seeds: Sequence[int], gaussian: bool, queue: _Queue
) -> None: ...
def replay(places: _Places, records: int, count: int, gaussian: bool, stochastic: bool, queue: _Queue) -> None: ...
def update(
    places: _Places,
    moments: Sequence[Sequence[int]],
    rule: int,
    constants: Sequence[float],
    records: int,
    count: int,
    steps: int,
    rounds: int,
    gaussian: bool,
    stochastic: bool,
    queue: _Queue,
) -> None: ...
