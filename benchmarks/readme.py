"""`make results` ends here: writes tables from benchmarks/results into the README and the pages of docs, between the
markers that name them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from hosfl.runs.config import Config
from hosfl.runs.memory import WAYS
from hosfl.settings import DEFAULTS
from hosfl.studies.page import at_ends

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(result: dict[str, Any]) -> str:
    """Processor, instruction sets and threads: those of the rows, where these were measured with several numbers.

    A file from before machines had "instruction_sets" says which one our kernels used and not torch's, and may name
    its processor vaguely. It is printed with what it says.
    """
    m = result["machine"]
    used = m.get("instruction_sets") or {"hosfl": m["backends"]["cpp"].partition(" ")[0]}
    numbers = {r["threads"] for r in result.get("rows", []) if "threads" in r} or {m["threads"]}
    threads = f"{' and '.join(map(str, sorted(numbers)))} thread{'s' if numbers != {1} else ''}"
    sets = ", ".join(f"{name} {isa}" for name, isa in used.items())
    where = f"{m['processor']}, {m['cores']} cores, {threads}, instruction sets: {sets}"
    where = f"{m['gpu']}; {where}" if m["gpu"] else where
    return f"{where}; Python {m['python']}, torch {m['torch']}, triton {m['triton']}, numpy {m['numpy']}."


def digits(result: dict[str, Any]) -> str:
    """Accuracy, gap and bytes of the methods."""
    methods = result["methods"]

    def row(label: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [label, *(cell(m) for m in methods.values())]

    def each(quantity: str) -> Callable[[dict[str, Any]], str]:
        return lambda m: ", ".join(f"{v:.3f}" for v in m[quantity])

    rows = [
        row("test accuracy", lambda m: f"{m['accuracy']:.4f}"),
        row("each seed", each("accuracies")),
        row("test loss", lambda m: f"{m['loss']:.4f}"),
        row("each seed", each("losses")),
        row("accuracy gap recovered", lambda m: f"{m['accuracy_gap_recovered'] + 0.0:.2f}"),
        row("loss gap recovered", lambda m: f"{m['loss_gap_recovered'] + 0.0:.2f}"),
    ]
    categories = [c for m in methods.values() for c in m["bytes_per_client_round"]]
    for category in dict.fromkeys(categories):
        cells = [f"{m['bytes_per_client_round'].get(category, 0):,.0f}" for m in methods.values()]
        rows.append([f"bytes per client and round: {category}", *cells])
    for kind in dict.fromkeys(k for m in methods.values() for k in m.get("passes_per_client_round", ())):
        cells = [f"{m['passes_per_client_round'][kind]:,.0f}" for m in methods.values()]
        rows.append([f"samples per client and round: {kind}", *cells])
    rows += [
        row(
            "client's answer / its forward pass, seconds", lambda m: f"{m['answer_seconds'] / m['forward_seconds']:.1f}"
        ),
        row("all clients and a newcomer hold the same bits", lambda m: "yes" if m["replicas_equal"] else "NO"),
    ]
    return _machine(result) + "\n\n" + _table(["", *methods], rows)


def _mean(values: Sequence[float]) -> str:
    """With its standard error."""
    return f"{mean(values):.4f} ± {stdev(values) / len(values) ** 0.5:.4f}"


def ways(result: dict[str, Any]) -> str:
    """Every way to learn: accuracy, loss and shares of the gap, with the standard errors of their means over seeds."""

    rows = [
        [
            way,
            _mean(r["accuracies"]),
            _mean(r["losses"]),
            f"{r['accuracy_gap_recovered'] + 0.0:.2f}",
            f"{r['loss_gap_recovered'] + 0.0:.2f}",
        ]
        for way, r in result["ways"].items()
    ]
    head = ["", "test accuracy", "test loss", "accuracy gap recovered", "loss gap recovered"]
    return f"Seeds {', '.join(map(str, result['seeds']))}. {_machine(result)}\n\n{_table(head, rows)}"


def wire(result: dict[str, Any]) -> str:
    """Bytes and what they cost: means over seeds with their standard errors, and of the loss the paired difference."""

    types = result["types"]
    plain = [run["loss"] for run in next(iter(types.values()))]
    rows = []
    for name, runs in types.items():
        more = [run["loss"] - loss for run, loss in zip(runs, plain, strict=True)]
        cells = [_mean([run[quantity] for run in runs]) for quantity in ("accuracy", "loss")]
        size = mean(run["bytes"] for run in runs)
        rows.append([name, f"{size / 1e3:.1f}", *cells, _mean(more) if any(more) else ""])
    head = ["`--wire`", "KB per client and round", "test accuracy", "test loss", "loss above the first row's"]
    return f"Digits, seeds {', '.join(map(str, result['seeds']))}. {_machine(result)}\n\n{_table(head, rows)}"


def rounds(result: dict[str, Any]) -> str:
    """A round by phase, engine by engine."""
    rows = []
    for half, engines in result["halves"].items():
        for engine, row in engines.items():
            phases = ("round", "cuts", "server", "answers", "engine", "clients")
            times = [f"{1e3 * row['seconds'][phase]:,.1f}" for phase in phases]
            rows.append([f"{half}, {engine}", *times, f"{row['ratio']:.2f}", f"{sum(row['bytes']) / 1e3:,.0f}"])
    head = ["ms", "round", "cuts", "server", "answers", "the engine alone", "the clients", "of its parts", "KB"]
    what = f"{result['clients']} clients, medians of {result['rounds']} rounds."
    return f"{what} {_machine(result)}\n\n{_table(head, rows)}"


def exchanges(result: dict[str, Any]) -> str:
    """What an exchange of bytes costs, engine by engine."""
    engines = result["engines"]
    sizes = next(iter(engines.values()))
    rows = []
    for size in sizes:
        cells = [
            f"{1e3 * r['median']:.1f} ({1e3 * r['least']:.1f} to {1e3 * r['most']:.1f})" for r in _of(engines, size)
        ]
        rows.append([size, *cells])
    what = f"{result['clients']} clients, as many bytes to and fro of each; ms, median (least to most)."
    return f"{what} {_machine(result)}\n\n{_table(['', *engines], rows)}"


def edge(result: dict[str, Any]) -> str:
    """A client without torch beside one with torch."""
    rows = []
    for name, r in result["rows"].items():
        way, _, runtime = name.rpartition(", ")
        megabytes = [result["installed"][runtime], r["peak"], r["between"]]
        seconds = [r["import"], r["seconds"]["cut"], r["seconds"]["scalars"]]
        rows.append([way, runtime, *(f"{b / 1e6:,.0f}" for b in megabytes), *(f"{s:.2f}" for s in seconds)])
    what = (
        "MiniLM's half in shape, embeddings and three layers; 16 texts of 64 tokens. Memory is the"
        " whole process's: its peak from start to end, the check of the weights included, and between rounds. Installed"
        f" with all that is required; torch is the CPU's, and comes with Triton. The process with torch also holds"
        f" transformers, of which the task makes its half. onnxruntime {result['onnxruntime']}."
    )
    head = ["what moves", "runtime", "installed, MB", "peak, MB", "between rounds, MB"]
    head += ["import, s", "cut, s", "scalars, s"]
    return f"{what} {_machine(result)}\n\n{_table(head, rows)}"


def crowd(result: dict[str, Any]) -> str:
    """A crowd of simulated clients over a few actors."""
    spent, peak = result["seconds a round"], result["peak MB"]
    actors = ", ".join(f"{size:,.0f}" for size in peak["actors"])
    return (
        f"{result['clients']:,} clients of one sample each over {result['actors']} actors, {result['sampled']} a round,"
        f" {result['rounds']} rounds, of each of which {result['dropout']:.0%} drop out:"
        f" {spent['median']:.2f} s a round (nine of ten within {spent['p90']:.2f}), at most {peak['server']:,.0f} MB at"
        f" the server and {actors} at the actors. {result['audited']} clients and a newcomer were brought up to date:"
        f" {'one digest' if result['one digest'] else 'THEIR DIGESTS DIFFER'}. {_machine(result)}"
    )


def _of(rows: dict[str, Any], name: str) -> list[Any]:
    return [row[name] for row in rows.values()]


def tuning(result: dict[str, Any]) -> str:
    """The winners of the tuning."""
    rows = [
        [
            way,
            f"{t['settings']['server_rate']:g}",
            f"{t['settings']['server_decay']:g}",
            f"{t['settings']['client_rate']:g}" if "client_rate" in t["settings"] else "",
            f"{t['validation_loss']:.4f}",
            f"{t['validation_accuracy']:.4f}",
        ]
        for way, t in result["best"].items()
    ]
    head = ["", "server rate", "server weight decay", "client rate", "validation loss", "validation accuracy"]
    return f"{_machine(result)}\n\n{_table(head, rows)}"


def _cell(row: dict[str, Any], name: str) -> str:
    """A ratio of a row, where it has one."""
    return f"{row[name]:.2f}" if name in row else ""


def kernels(result: dict[str, Any]) -> str:
    """Throughput and memory."""
    speed, memory = [], []
    for r in result["rows"]:
        if "bytes" in r:
            ratios = [_cell(r, k) for k in ("of_roof", "times_mezo", "times_randn")]
            speed.append([f"{r['group']}: {r['name']}", str(r["threads"]), f"{r['seconds'] * 1e3:.1f}", *ratios])
        else:
            share = f"{r['peak_extra_bytes'] / r['tensor_bytes']:.3f}"
            memory.append([f"{r['group'][7:]}: {r['name']}", f"{r['peak_extra_bytes']:,}", share])
    head = ["way", "threads", "ms", "share of the roof", "x MeZO's way", "x 64 passes"]
    return "\n\n".join(
        [
            f"{result['elements']:,} elements. " + _machine(result),
            _table(head, speed),
            _table(["way", "peak extra bytes", "of the tensor"], memory),
        ]
    )


def ops(result: dict[str, Any]) -> str:
    """Every op by size, and lists as models have them. Of the runs with the fewest threads."""
    fewest = min(r["threads"] for r in result["rows"])
    rows = [r for r in result["rows"] if r["threads"] == fewest]
    single, lists = {}, {}
    for r in rows:
        first, _, rest = r["of"].partition(" ")  # "list" and its name, or a size and what it moves by
        found, column, by = (lists, rest, "") if first == "list" else (single, first, rest)
        found.setdefault((f"{r['name']}, {r['dtype']}", by), {})[column] = r

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        compared = next((f" ({_cell(row, k)})" for k in ("of_roof", "times_randn") if k in row), "")
        return f"{row['seconds'] * 1e6:,.0f}{compared}"

    def table(found: dict[Any, dict[str, Any]], what: str) -> str:
        columns = list(dict.fromkeys(of for cells in found.values() for of in cells))
        head = [f"{what}: microseconds", *columns]
        return _table(head, [[way, *(cell(cells.get(of)) for of in columns)] for (way, _), cells in found.items()])

    where = _machine({**result, "rows": rows})
    return f"{where}\n\n{table(single, 'elements')}\n\n{table(lists, 'tensors of')}"


def gpu(result: dict[str, Any] | None) -> str:
    """What `make gpu` measured, or that nobody has."""
    if result is None:
        return "Not measured: `make gpu` has not run on a GPU."
    figures = ("ms", "GB/s", "of_copy", "of_forward_passes", "ps_per_draw", "host_us", "extra_bytes")
    rows = []
    for r in result["rows"]:
        cells = ["" if r.get(f) is None else f"{r[f]:,.0f}" if f == "extra_bytes" else f"{r[f]:.4g}" for f in figures]
        rows.append([f"{r['group']}: {r['name']}", *([r["failed"], *cells[1:]] if "failed" in r else cells)])
    head = ["", "ms", "GB/s", "of the copy", "of its forward passes", "ps a number", "us of the host", "extra bytes"]
    cut = "" if result["complete"] else " The session was cut short: rows are missing."
    return f"{result['elements']:,} elements; CUDA {result['cuda']}. {_machine(result)}{cut}\n\n{_table(head, rows)}"


def steps(result: dict[str, Any]) -> str:
    """A step of client, server and optimizer beside what its passes cost alone."""
    rows = [
        [
            *(r["group"], r["name"], str(r["threads"]), f"{r['seconds'] * 1e3:.1f}", _cell(r, "of_reference")),
            f"{r['peak_extra_bytes'] / 2**20:.1f}" if "peak_extra_bytes" in r else "",
        ]
        for r in sorted(result["rows"], key=lambda r: (r["group"], r["threads"]))
    ]
    head = ["step", "way", "threads", "ms", "of its passes alone", "peak extra MiB"]
    return f"{_machine(result)}\n\n{_table(head, rows)}"


def catchup(result: dict[str, Any]) -> str:
    """A late client's 1,000 rounds."""
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
    what = f"{result['rounds']:,} rounds of {result['directions']} directions, {result['elements']:,} float32 weights"
    scaled = f"the peers' seconds scaled from {result['peers_timed_passes']} timed passes"
    return f"{what}; {scaled}. {_machine(result)}\n\n{_table(head, rows)}"


def memory(result: dict[str, Any]) -> str:
    """A client's round beside inference of its half."""
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
    few = []
    for half in halves:
        for way, row in half["ways"].items():
            if way not in WAYS:
                sizes = [row["weights"], row["peak_extra"], row["weights"] + row["peak_extra"]]
                few.append([way, *(f"{size / 1e6:.1f}" for size in sizes)])
    stored = _table(["minilm: what moves, and how the rest is stored", "MB of weights", "MB above them", "sum"], few)
    return f"{_machine(result)}\n\n{_table(head, facts + rows)}\n\n{stored}"


def estimators(result: dict[str, Any]) -> str:
    """The error of every way to measure a derivative, float32 beside bfloat16."""
    found = {(r["way"], r["mu"], r["dtype"]): r for r in result["rows"]}
    rows = []
    for way, mu in dict.fromkeys((r["way"], r["mu"]) for r in result["rows"]):
        cells = [found[way, mu, dtype] for dtype in ("float32", "bfloat16")]
        step = "" if mu is None else f", mu = {mu:g}"
        errors = [f"{100 * c['error']:.3g} %" for c in cells]
        worst = f"{100 * max(cells[1]['errors']):.3g} %"
        rows.append([way + step, *errors, worst, *(f"{c['correlation']:.4f}" for c in cells)])
    head = ["", "error, float32", "error, bfloat16", "bfloat16, worst batch", "correlation, float32"]
    texts = ", ".join(f"{name} {number}" for name, number in result["packages"].items())
    what = (
        f"{result['weights']:,} weights, {result['model']}; {result['batches']} batches of {result['samples']} samples,"
    )
    what += f" {result['longest']} tokens at most, {result['directions']} directions each. {texts}."
    return f"{what} {_machine(result)}\n\n{_table([*head, 'correlation, bfloat16'], rows)}"


def optim(result: dict[str, Any]) -> str:
    """A step of the optimizers beside MeZO's, its memory, and bfloat16."""
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
            f"{_machine(result['overhead'])} Load of the machine before: {loads}.",
            _table(head, overhead),
            _table(["two steps", "peak extra bytes", "of the largest tensor"], memory),
            _table([f"{steps:,} steps of 1e-6", "share that arrived", "size of the noise / of the steps"], coarse),
        ]
    )


def curves(result: dict[str, Any]) -> str:
    """Loss and accuracy of the ways to learn from forward passes, and their trials."""

    def cell(values: Sequence[float]) -> str:
        return f"{mean(values):.4f} ± {stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""

    texts = []
    for name, task in result.items():
        rows = []
        for way, r in task["ways"].items():
            good = [run for run in r["runs"] if not run["failure"]]
            scores = [cell([run[q] for run in good]) for q in ("validation_loss", "test_loss", "test_accuracy")]
            trials = ", ".join(f"{mean(t['validation_losses']):.3g}" for t in r["trials"])
            rows.append([way, f"{r['rate']:.2g}", *scores, str(len(r["runs"]) - len(good)), trials])
        start = f"before: test loss {task['start']['test_loss']:.4f}, accuracy {task['start']['test_accuracy']:.4f}"
        seeds = ", ".join(str(run["seed"]) for run in r["runs"])
        what = f"{task['weights']:,} weights, {task['steps']} steps, batches of {task['batch']}, seeds {seeds}; {start}"
        packages = ", ".join(f"{package} {version}" for package, version in task["packages"].items())
        head = [name, "rate", "validation loss", "test loss", "test accuracy", "failures"]
        table = _table([*head, "trials: validation loss, rates rising"], rows)
        texts.append(f"{what}. Text and data: {packages}. {_machine(task)}\n\n{table}")
    return "\n\n".join(texts)


def study(result: dict[str, Any]) -> str:
    """A study's methods at the settings that tuning chose, and how much of the gap they recover."""
    metric = result["metric"]

    def cell(value: float | None, error: float | None = None, places: int = 4) -> str:
        if value is None:
            return ""
        return f"{value + 0.0:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")

    rows = []
    for method, r in result["methods"].items():
        trial = next((t for t in result["trials"] if (t["method"], t["trial"]) == (method, r["trial"])), {"choice": {}})
        shares = ("accuracy_gap_recovered", "loss_gap_recovered", "loss_gap_in_equal_seconds")
        rows.append(
            [
                method,
                ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in trial["choice"].items()),
                *(cell(r[q], r[f"{q}_error"]) for q in ("accuracy", "loss")),
                *(cell(r[share], None, 2) for share in shares),
                cell(sum(r["bytes_per_client_round"].values()) / 1e3, None, 1),
                cell(r["seconds"], None, 0),
                f"{len(r['failures'])} of {len(r['failures']) + len(r['seeds'])}",
            ]
        )
    head = ["", "chosen", f"test {metric}", "test loss", f"{metric} gap", "loss gap", "loss gap in equal seconds"]
    head += ["kB per client and round", "seconds", "failed"]
    tried = len(result["trials"]) // len(result["methods"])
    seeds = max((r["seeds"] for r in result["methods"].values()), key=len)
    what = f"{result['rounds']} rounds, seeds {', '.join(map(str, seeds))}, {tried} trials for every method."
    return f"{what} {_machine(result)}\n\n{_table(head, rows)}\n\n{at_ends(result)}".rstrip()


# Weights that move in a study's client half, where a method has no `trains` of its own.
MOVING = {
    "digits": 416,
    "digits-iid": 416,
    "digits-inverted": 416,
    "cifar10-noisy": 832,
    "cifar10-inverted": 832,
    "sst2": 6_912,
    "sst2-forward": 288,
    "cr-forward": 288,
    "sst2-centered": 288,
    "cifar10-noisy-long": 832,
    "cifar10-inverted-long": 832,
    "decoder-forward": 336,
}
LORA = {"lora:1:*.layer.5.*": 6_912, "lora:1:*.layers.5.*": 2_560}


class Numbers(NamedTuple):
    """What a run had for each weight that moves, and the share of the loss gap that it made of them."""

    per_weight: float
    study: str
    method: str
    formula: str
    share: float


def numbers_of(results: dict[str, dict[str, Any]]) -> list[Numbers]:
    """Of every HO-SFL run of the studies, by their number; `results` by name of the study."""
    found = []
    for name, result in results.items():
        for method, r in result["methods"].items():
            if r["settings"].get("method", "ho") == "ho" and r["settings"].get("trains") != "biases":
                settings = DEFAULTS | r["settings"]
                directions = settings["directions"]
                weights = LORA.get(settings["trains"], MOVING[name])
                formula = f"{directions} x {result['rounds']} / {weights}"
                count = directions * result["rounds"] / weights
                found.append(Numbers(count, name, method, formula, r["loss_gap_recovered"]))
    return sorted(found)


def numbers(results: dict[str, dict[str, Any]]) -> str:
    """How many numbers per weight a run had, and what it made of them."""
    rows = [[f"{r.study}: {r.method}", r.formula, f"{r.per_weight:.1f}", f"{r.share:.2f}"] for r in numbers_of(results)]
    return _table(["study and method", "P x rounds / weights", "numbers per weight", "loss gap recovered"], rows)


LIE = {
    "none": "none",
    "labels": "labels: C - 1 - c for c",
    "random-labels": "labels: any but the right one",
    "flipped-cuts": "cuts times -1",
    "scaled-cuts": "cuts times 1e6",
    "noisy-cuts": "noise in place of cuts",
    "flipped-scalars": "scalars times -1",
    "scalars": "scalars times 1e6 or -1e6",
}


def liars(result: dict[str, Any]) -> str:
    """Test accuracy under every lie, by the server's settings."""

    def cell(runs: list[dict[str, Any]]) -> str:
        accuracies = [r["accuracy"] for r in runs if r["accuracy"] is not None]
        diverged = len(runs) - len(accuracies)
        shown = f"{mean(accuracies):.4f}" if accuracies else ""
        return ", ".join(filter(None, [shown, f"{diverged} of {len(runs)} diverged" if diverged else ""]))

    def refusals(row: dict[str, list[dict[str, Any]]]) -> str:
        counts = [r["refusals"] for runs in row.values() for r in runs if r["refusals"] is not None]
        return f"{mean(counts):,.0f}" if counts else ""

    settings = next(iter(result["settings"].values()))
    config = Config(**settings)
    what = (
        f"{result['liars']} liars of {config.clients} clients, all of which take part in every one of {config.rounds} "
        f"rounds, with batches of {config.batch}; seeds {', '.join(map(str, result['seeds']))}."
    )
    head = ["what they lie about", *result["settings"], "messages refused in a run"]
    tables = [f"{what} {_machine(result)}"]
    for data, lies in result["rows"].items():
        rows = [[LIE[lie], *map(cell, row.values()), refusals(row)] for lie, row in lies.items()]
        tables.append(f"Clients whose data are {data}:\n\n{_table(head, rows)}")
    return "\n\n".join(tables)


def _shares(row: dict[str, Any]) -> str:
    """Of the gaps in a study's metric and in loss."""
    return f"{row['accuracy_gap_recovered'] + 0.0:.2f} / {row['loss_gap_recovered'] + 0.0:.2f}"


# What a client that only runs forward passes is advised, and what a study has in its place.
PASSES = ("ho, forward passes, normalized steps", "ho, forward passes", "ho, pool")


def overview(results: dict[str, dict[str, Any]]) -> str:
    """Every study in one row: accuracies between the two controls, and the shares of the gap."""

    def cell(row: dict[str, Any], share: bool = True) -> str:
        recovered = f" ({row['loss_gap_recovered'] + 0.0:.2f})" if share else ""
        return f"{row['accuracy']:.3f}{recovered}"

    rows = []
    for name, result in results.items():
        methods = result["methods"]
        passes = next(name for name in PASSES if name in methods)
        ho = [cell(methods[method]) if method in methods else "" for method in (passes, "ho, one backward pass")]
        controls = [cell(methods[method], share=False) for method in ("frozen", "first-order")]
        named = name if result["metric"] == "accuracy" else f"{name} ({result['metric']})"
        rows.append([named, f"{MOVING[name]:,}", str(result["rounds"]), controls[0], *ho, controls[1]])
    head = ["study", "weights that move", "rounds", "frozen", "HO-SFL, 5 forward passes", "HO-SFL, one backward pass"]
    return _table([*head, "first-order"], rows)


def lengths(results: dict[str, dict[str, Any]]) -> str:
    """One task's studies of several lengths: what is recovered of each one's gap, in accuracy and in loss."""

    ordered = sorted(results.values(), key=lambda result: result["rounds"])
    names = [name for name in ordered[0]["methods"] if name.startswith("ho")]
    rows = [
        [
            str(result["rounds"]),
            *(f"{result['methods'][name]['accuracy']:.3f}" for name in ("frozen", "first-order")),
            *(_shares(result["methods"][name]) for name in names),
        ]
        for result in ordered
    ]
    return f"{_machine(ordered[0])}\n\n" + _table(["rounds", "frozen", "first-order", *names], rows)


def uses(results: dict[str, dict[str, Any]]) -> str:
    """Uses of a round's numbers by row, a study each column: shares of its gap, in its metric and in loss."""

    def cell(result: dict[str, Any], name: str) -> str:
        if name not in result["methods"]:
            return ""
        row, controls = result["methods"][name], [result["methods"][n]["loss"] for n in ("frozen", "first-order")]
        error = row["loss_error"] / abs(controls[0] - controls[1])
        return f"{_shares(row)} ± {error:.2f}"

    names = dict.fromkeys(name for result in results.values() for name in result["methods"])
    rows = [[name, *(cell(result, name) for result in results.values())] for name in names if name != "frozen"]
    notes = []
    for study, result in results.items():
        seeds = max((len(r["seeds"]) for r in result["methods"].values()), default=0)
        tried = len(result["trials"]) // len(result["methods"])
        notes.append(f"{study}: {result['rounds']} rounds, {seeds} seeds, {tried} trials for every row")
    return f"{'; '.join(notes)}. {_machine(next(iter(results.values())))}\n\n" + _table(["", *results], rows)


# The row of Adam, and that of normalized steps, in studies that have both.
RULES = (("ho, forward passes", "ho, forward passes, normalized steps"), ("averaged, Adam", "averaged"))


def rules(results: dict[str, Any]) -> str:
    """Adam and normalized steps, study by study: shares of the gaps in the metric and in loss."""
    rows = [
        [study, *(_shares(result["methods"][name]) for name in names)]
        for study, result in results.items()
        for names in RULES
        if result["methods"].keys() >= set(names)
    ]
    return _table(["study", "Adam", "normalized steps"], rows)


Sections = dict[str, tuple[str, Callable[[dict[str, Any]], str]]]
STUDIES: Sections = {
    path.parent.name: (str(path.relative_to(RESULTS)), study) for path in sorted(RESULTS.glob("studies/*/table.json"))
}
ALL_STUDIES = "studies/*/table.json"
GPU = "gpu.json"
DOCS = ROOT / "docs"
PAGES: dict[Path, Sections] = {
    ROOT / "README.md": {"overview": (ALL_STUDIES, overview)},
    DOCS / "edge.md": {"edge": ("edge.json", edge)},
    DOCS / "estimators.md": {"estimators": ("estimators-cpu.json", estimators)},
    DOCS / "forward-passes.md": {"rules": ("*/*/table.json", rules)},
    DOCS / "federation.md": {
        "rounds": ("rounds.json", rounds),
        "exchanges": ("engines.json", exchanges),
        "wire": ("digits-wire.json", wire),
        "crowd": ("ray-clients.json", crowd),
    },
    DOCS / "results-digits.md": {
        "digits": ("digits/table.json", digits),
        "ways": ("digits-ways.json", ways),
        "tuning": ("digits-tuning.json", tuning),
    },
    DOCS / "results-optim.md": {"curves": ("optim-curves.json", curves), "optim": ("optim-cpu.json", optim)},
    DOCS / "results-speed.md": {
        "kernels": ("kernels-cpu.json", kernels),
        "kernels-zen4": ("kernels-cpu-zen4.json", kernels),
        "ops": ("ops-cpu.json", ops),
        "gpu": (GPU, gpu),
        "steps": ("steps-cpu.json", steps),
        "catch-up": ("catchup-cpu.json", catchup),
        "memory": ("client-memory.json", memory),
    },
    DOCS / "results-studies.md": {
        **STUDIES,
        "lengths": ("lengths/*/table.json", lengths),
        "uses": ("uses/*/table.json", uses),
        "numbers": (ALL_STUDIES, numbers),
    },
    DOCS / "threats.md": {"liars": ("digits-liars.json", liars)},
}


def load_result(file: str) -> Any:
    """A result file; for a pattern, the results by the names of their folders. None if the GPU's is missing."""
    if "*" not in file:
        path = RESULTS / file
        return None if file == GPU and not path.exists() else json.loads(path.read_text())
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob(file))}


def updated(page: Path) -> str:
    """A page's text with its tables made again."""
    text = page.read_text()
    for name, (file, write) in PAGES[page].items():
        table = write(load_result(file))
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, t=table: m[1] + t + "\n" + m[2], text, flags=re.S)  # type: ignore[misc]
        if found != 1:
            raise SystemExit(f"{page} has {found} sections named {name}")
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page))
