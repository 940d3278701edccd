from collections.abc import Sequence

def philox(key: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]: ...
def noise(address: int, n: int, seed: int, stream: int, start: int, gaussian: bool, threads: int) -> None: ...
def replay(
    addresses: Sequence[int],
    sizes: Sequence[int],
    dtypes: Sequence[int],
    streams: Sequence[int],
    starts: Sequence[int],
    factors: Sequence[float],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    rounding_seeds: Sequence[int],
    gaussian: bool,
    threads: int,
) -> None: ...
def update(
    addresses: Sequence[int],
    sizes: Sequence[int],
    dtypes: Sequence[int],
    streams: Sequence[int],
    starts: Sequence[int],
    factors: Sequence[float],
    moments: Sequence[Sequence[int]],
    rule: int,
    constants: Sequence[float],
    seeds: Sequence[int],
    coefficients: Sequence[float],
    steps: Sequence[Sequence[float]],
    rounding_seeds: Sequence[int],
    gaussian: bool,
    threads: int,
) -> None: ...
def project(
    addresses: Sequence[int],
    sizes: Sequence[int],
    dtypes: Sequence[int],
    streams: Sequence[int],
    starts: Sequence[int],
    factors: Sequence[float],
    seeds: Sequence[int],
    gaussian: bool,
    threads: int,
) -> list[float]: ...
def exchange_arithmetic(control: int) -> int: ...

IEEE_ARITHMETIC: int

def use_isa(name: str) -> None: ...
def isa() -> str: ...
def supported() -> list[str]: ...
