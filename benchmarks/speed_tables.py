"""Tables of seconds and memory: kernels, steps, rounds, engines, clients without torch, and a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.contenders import ROOF
from benchmarks.tables import by_group_and_name, describe_machine, markdown_table, plural, processor, ratio
from hosfl.runs.memory import WAYS


def rounds(result: dict[str, Any]) -> str:
    """Return the table of a round's milliseconds by phase, for every engine."""
    rows = []
    for half, engines in result["halves"].items():
        for engine, row in engines.items():
            phases = ("round", "cuts", "server", "answers", "engine", "clients")
            times = [f"{1e3 * row['seconds'][phase]:,.1f}" for phase in phases]
            rows.append([f"{half}, {engine}", *times, f"{row['ratio']:.2f}", f"{sum(row['bytes']) / 1e3:,.0f}"])
    head = ["ms", "round", "cuts", "server", "answers", "the engine alone", "the clients", "of its parts", "KB"]
    setup = f"{result['clients']} clients, medians of {result['rounds']} rounds."
    return f"{setup} {describe_machine(result)}\n\n{markdown_table(head, rows)}"


def exchanges(result: dict[str, Any]) -> str:
    """Return the table of an exchange's milliseconds by message size, for every engine."""
    engines = result["engines"]
    sizes = next(iter(engines.values()))
    rows = []
    for size in sizes:
        timed = [by_size[size] for by_size in engines.values()]
        cells = [f"{1e3 * r['median']:.1f} ({1e3 * r['least']:.1f} to {1e3 * r['most']:.1f})" for r in timed]
        rows.append([size, *cells])
    setup = f"{result['clients']} clients, as many bytes to and fro of each; ms, median (least to most)."
    return f"{setup} {describe_machine(result)}\n\n{markdown_table(['', *engines], rows)}"


def edge(result: dict[str, Any]) -> str:
    """Return the table that compares clients without and with torch: memory and seconds."""
    rows = []
    for name, r in result["rows"].items():
        way, _, runtime = name.rpartition(", ")
        megabytes = [result["installed"][runtime], r["peak"], r["between"]]
        seconds = [r["import"], r["seconds"]["cut"], r["seconds"]["scalars"]]
        rows.append([way, runtime, *(f"{b / 1e6:,.0f}" for b in megabytes), *(f"{s:.2f}" for s in seconds)])
    setup = (
        "MiniLM's half in shape, embeddings and three layers; 16 texts of 64 tokens. Memory is the"
        " whole process's: its peak from start to end, the check of the weights included, and between rounds. Installed"
        f" with all that is required; torch is the CPU's, and comes with Triton. The process with torch also holds"
        f" transformers, of which the task makes its half. onnxruntime {result['onnxruntime']}."
    )
    head = ["what moves", "runtime", "installed, MB", "peak, MB", "between rounds, MB"]
    head += ["import, s", "cut, s", "scalars, s"]
    return f"{setup} {describe_machine(result)}\n\n{markdown_table(head, rows)}"


def crowd(result: dict[str, Any]) -> str:
    """Return a sentence about many simulated clients over a few actors."""
    seconds, peak = result["seconds a round"], result["peak MB"]
    actors = ", ".join(f"{size:,.0f}" for size in peak["actors"])
    digests = "one digest" if result["one digest"] else "THEIR DIGESTS DIFFER"
    return (
        f"{result['clients']:,} clients of one sample each over {result['actors']} actors, {result['sampled']} a round,"
        f" {result['rounds']} rounds, of each of which {result['dropout']:.0%} drop out:"
        f" {seconds['median']:.2f} s a round (nine of ten within {seconds['p90']:.2f}), at most"
        f" {peak['server']:,.0f} MB at the server and {actors} at the actors. {result['audited']} clients and a"
        f" newcomer were brought up to date: {digests}. {describe_machine(result)}"
    )


def kernels(result: dict[str, Any]) -> str:
    """Return the tables of the kernels' throughput and memory, and of passes that measure several probes."""
    rows = result["rows"]
    counts = sorted({r["threads"] for r in rows})
    timed = by_group_and_name([r for r in rows if "bytes" in r])
    memory = {f"{r['group'].removeprefix('memory ')}: {r['name']}": r for r in rows if "bytes" not in r}
    speed = []
    for (group, name), by_threads in timed.items():
        if "probes" in group:
            continue
        one = by_threads[counts[0]]
        peer = "times_mezo" if "times_mezo" in one else "times_randn"
        shares = [ratio(by_threads[n], "of_roof") for n in counts]
        extra = memory.get(f"{group}: {name}")
        speed.append(
            [
                f"{group}: {name}",
                *(f"{by_threads[n]['seconds'] * 1e3:,.1f}" for n in counts),
                *shares,
                *(ratio(by_threads[n], peer, digits=1) for n in counts),
                "" if extra is None else f"{abs(extra['peak_extra_bytes'] / extra['tensor_bytes']):.1f}",
            ]
        )
    columns = [plural(n, "thread") for n in counts]
    head = ["way", *(f"ms, {c}" for c in columns), *(f"of the roof, {c}" for c in columns)]
    head += [*(f"x its peer, {c}" for c in columns), "extra memory"]
    return "\n\n".join(
        [
            f"{result['elements']:,} elements. " + describe_machine(result),
            markdown_table(head, speed),
            _probes({key: row for key, row in timed.items() if "probes" in key[0]}, counts),
        ]
    )


def _probes(timed: dict[tuple[str, str], dict[int, dict[str, Any]]], counts: Sequence[int]) -> str:
    """Return the table of probes: milliseconds by how many of them a pass measures."""
    ways: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for (group, name), by_threads in timed.items():
        estimator, _, together = name.partition(", ")
        ways.setdefault(f"{group}, {estimator}", {})[together] = by_threads
    together = list(dict.fromkeys(name for by_pass in ways.values() for name in by_pass))
    head = ["ms", *(f"{name}, {plural(n, 'thread')}" for n in counts for name in together)]
    rows = [
        [way, *(f"{by_pass[name][n]['seconds'] * 1e3:,.0f}" for n in counts for name in together)]
        for way, by_pass in ways.items()
    ]
    return markdown_table(head, rows)


def machines(results: dict[str, Any]) -> str:
    """Return the table of the kernels' share of the roof on every machine. results: those of `kernels` by name."""
    timed = {name: by_group_and_name([r for r in result["rows"] if "of_roof" in r]) for name, result in results.items()}
    ways = dict.fromkeys(key for by_way in timed.values() for key in by_way if "hosfl" in key[1])
    rows = [
        [
            f"{group}: {name}",
            *(" / ".join(ratio(r, "of_roof") for r in timed[m][group, name].values()) for m in results),
        ]
        for group, name in ways
    ]
    roofs = {
        name: f"{8 * r['elements'] / timed[name]['perturb', ROOF][1]['seconds'] / 1e9:.0f}"
        for name, r in results.items()
    }
    rows.append(["GB/s of the roof, 1 thread", *roofs.values()])
    return markdown_table(["share of the roof, 1 / 2 threads", *map(processor, results.values())], rows)


def ops(result: dict[str, Any]) -> str:
    """Return the tables of every op by size, and of lists with models' shapes, at the smallest number of threads."""
    fewest = min(r["threads"] for r in result["rows"])
    rows = [r for r in result["rows"] if r["threads"] == fewest]
    single, lists = {}, {}
    for r in rows:
        first, _, rest = r["of"].partition(" ")  # "list" and its name, or a size and the distribution
        cells, column, dist = (lists, rest, "") if first == "list" else (single, first, rest)
        cells.setdefault((f"{r['name']}, {r['dtype']}", dist), {})[column] = r

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        compared = next((f" ({ratio(row, k)})" for k in ("of_roof", "times_randn") if k in row), "")
        return f"{row['seconds'] * 1e6:,.0f}{compared}"

    def table(by_way: dict[Any, dict[str, Any]], unit: str) -> str:
        columns = list(dict.fromkeys(column for cells in by_way.values() for column in cells))
        head = [f"{unit}: microseconds", *columns]
        return markdown_table(
            head, [[way, *(cell(cells.get(c)) for c in columns)] for (way, _), cells in by_way.items()]
        )

    machine = describe_machine({**result, "rows": rows})
    return f"{machine}\n\n{table(single, 'elements')}\n\n{table(lists, 'tensors of')}"


def gpu(result: dict[str, Any] | None) -> str:
    """Return the table of `make gpu`, or a sentence that it has not run. result: None for the latter."""
    if result is None:
        return "Not measured: `make gpu` has not run on a GPU."
    figures = ("ms", "GB/s", "of_copy", "of_forward_passes", "ps_per_draw", "host_us", "extra_bytes")
    rows = []
    for r in result["rows"]:
        cells = ["" if r.get(f) is None else f"{r[f]:,.0f}" if f == "extra_bytes" else f"{r[f]:.4g}" for f in figures]
        rows.append([f"{r['group']}: {r['name']}", *([r["failed"], *cells[1:]] if "failed" in r else cells)])
    head = ["", "ms", "GB/s", "of the copy", "of its forward passes", "ps a number", "us of the host", "extra bytes"]
    cut = "" if result["complete"] else " The session was cut short: rows are missing."
    setup = f"{result['elements']:,} elements; CUDA {result['cuda']}. {describe_machine(result)}{cut}"
    return f"{setup}\n\n{markdown_table(head, rows)}"


def steps(result: dict[str, Any]) -> str:
    """Return the table of a step of client, server and optimizer, and its ratio to the forward passes alone."""
    rows = [
        [
            *(r["group"], r["name"], str(r["threads"]), f"{r['seconds'] * 1e3:.1f}", ratio(r, "of_reference")),
            f"{r['peak_extra_bytes'] / 2**20:.1f}" if "peak_extra_bytes" in r else "",
        ]
        for r in sorted(result["rows"], key=lambda r: (r["group"], r["threads"]))
    ]
    head = ["step", "way", "threads", "ms", "of its passes alone", "peak extra MiB"]
    return f"{describe_machine(result)}\n\n{markdown_table(head, rows)}"


def catchup(result: dict[str, Any]) -> str:
    """Return the table of a late client's 1,000 rounds."""
    rows = [
        [
            r["name"],
            str(r["threads"]),
            f"{r['seconds']:.1f}",
            f"{r['peers_seconds']:,.0f}",
            f"{r['ratio']:.0f}",
            f"{r['peak_extra_bytes']:,}",
        ]
        for r in result["rows"]
    ]
    head = ["way", "threads", "seconds", "peers' seconds", "times as fast", "peak extra bytes"]
    setup = f"{result['rounds']:,} rounds of {result['directions']} directions, {result['elements']:,} float32 weights"
    scaled = f"the peers' seconds scaled from {result['peers_timed_passes']} timed passes"
    return f"{setup}; {scaled}. {describe_machine(result)}\n\n{markdown_table(head, rows)}"


def memory(result: dict[str, Any]) -> str:
    """Return the tables of the memory of a client's round, compared with inference of its half."""
    head = ["MB above the weights", *(f"{name}: {half['what']}" for name, half in result["halves"].items())]
    halves = list(result["halves"].values())
    rows = [
        [way, *(f"{h['ways'][way]['peak_extra'] / 1e6:.1f} ({h['ways'][way]['of_bound']:.2f})" for h in halves)]
        for way in WAYS
    ]
    facts = [
        ["batch", *(str(h["batch"]) for h in halves)],
        ["weights, float32", *(f"{h['ways']['inference']['weights'] / 1e6:.1f}" for h in halves)],
        ["a cut tensor, float32", *(f"{h['ways']['inference']['cut'] / 1e6:.1f}" for h in halves)],
    ]
    narrow = []
    for half in halves:
        for way, row in half["ways"].items():
            if way not in WAYS:
                sizes = [row["weights"], row["peak_extra"], row["weights"] + row["peak_extra"]]
                narrow.append([way, *(f"{size / 1e6:.1f}" for size in sizes)])
    stored = markdown_table(
        ["minilm: what moves, and how the rest is stored", "MB of weights", "MB above them", "sum"], narrow
    )
    return f"{describe_machine(result)}\n\n{markdown_table(head, facts + rows)}\n\n{stored}"


def estimators(result: dict[str, Any]) -> str:
    """Return the table of the error of every way to measure a derivative, in float32 and bfloat16."""
    by_case = {(r["way"], r["mu"], r["dtype"]): r for r in result["rows"]}
    rows = []
    for way, mu in dict.fromkeys((r["way"], r["mu"]) for r in result["rows"]):
        cells = [by_case[way, mu, dtype] for dtype in ("float32", "bfloat16")]
        step = "" if mu is None else f", mu = {mu:g}"
        errors = [f"{100 * c['error']:.3g} %" for c in cells]
        worst = f"{100 * max(cells[1]['errors']):.3g} %"
        rows.append([way + step, *errors, worst, *(f"{c['correlation']:.4f}" for c in cells)])
    head = ["", "error, float32", "error, bfloat16", "bfloat16, worst batch", "correlation, float32"]
    texts = ", ".join(f"{name} {number}" for name, number in result["packages"].items())
    setup = (
        f"{result['weights']:,} weights, {result['model']}; {result['batches']} batches of {result['samples']} samples,"
    )
    setup += f" {result['longest']} tokens at most, {result['directions']} directions each. {texts}."
    return f"{setup} {describe_machine(result)}\n\n{markdown_table([*head, 'correlation, bfloat16'], rows)}"


def optim(result: dict[str, Any]) -> str:
    """Return the tables of an optimizer's step compared with MeZO's, of its memory, and of steps in bfloat16."""
    overhead = [
        [
            r["name"],
            str(r["threads"]),
            f"{r['overhead_seconds'] * 1e3:.0f}",
            f"{r['times_mezo']:.1f}",
            f"{r['constant_loss_seconds'] * 1e3:.0f}",
            f"{r['times_mezo_constant_loss']:.1f}",
            f"{r['overhead_seconds'] / r['add_seconds']:.1f}",
            f"{r['first_step_seconds'] * 1e3:.0f}",
        ]
        for r in result["overhead"]["rows"]
    ]
    memory = [
        [r["name"], f"{r['peak_extra_bytes']:,}", f"{r['peak_extra_bytes'] / r['largest_tensor_bytes']:.3f}"]
        for r in result["memory"]["rows"]
    ]
    coarse = [
        [f"{r['name']}, {r['dtype']}", f"{r['share']:.3f} ± {r['share_error']:.3f}", f"{r['noise']:.2f}"]
        for r in result["bfloat16"]["rows"]
    ]
    head = ["a step less its forward passes", "threads", "ms", "times as fast as MeZO", "ms, constant loss"]
    head += ["times as fast as MeZO", "passes of the roof", "the first step, ms"]
    loads = ", ".join(f"{part} {result[part]['load']:.1f}" for part in result)
    steps = result["bfloat16"]["rows"][0]["steps"]
    return "\n\n".join(
        [
            f"{describe_machine(result['overhead'])} Load of the machine before: {loads}.",
            markdown_table(head, overhead),
            markdown_table(["two steps", "peak extra bytes", "of the largest tensor"], memory),
            markdown_table(
                [f"{steps:,} steps of 1e-6", "share that arrived", "size of the noise / of the steps"], coarse
            ),
        ]
    )
