"""Tables of what is learnt: the digits task, optimizers on real tasks, wire formats, and lying clients."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

from benchmarks.tables import describe_machine, markdown_table, mean_with_error
from hosfl.runs.config import Config


def digits(result: dict[str, Any]) -> str:
    """Return the table of the methods on the digits: accuracy, gap and bytes."""
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
    return describe_machine(result) + "\n\n" + markdown_table(["", *methods], rows)


def ways(result: dict[str, Any]) -> str:
    """Return the table of ways to learn: means and standard errors of accuracy and loss, and shares of the gap."""
    rows = [
        [
            way,
            mean_with_error(r["accuracies"]),
            mean_with_error(r["losses"]),
            f"{r['accuracy_gap_recovered'] + 0.0:.2f}",
            f"{r['loss_gap_recovered'] + 0.0:.2f}",
        ]
        for way, r in result["ways"].items()
    ]
    head = ["", "test accuracy", "test loss", "accuracy gap recovered", "loss gap recovered"]
    return f"Seeds {', '.join(map(str, result['seeds']))}. {describe_machine(result)}\n\n{markdown_table(head, rows)}"


def wire(result: dict[str, Any]) -> str:
    """Return the table of wire formats: bytes, accuracy, loss, and the paired difference to the first row's loss."""
    types = result["types"]
    first_losses = [run["loss"] for run in next(iter(types.values()))]
    rows = []
    for name, runs in types.items():
        differences = [run["loss"] - loss for run, loss in zip(runs, first_losses, strict=True)]
        cells = [mean_with_error([run[quantity] for run in runs]) for quantity in ("accuracy", "loss")]
        size = mean(run["bytes"] for run in runs)
        rows.append([name, f"{size / 1e3:.1f}", *cells, mean_with_error(differences) if any(differences) else ""])
    head = ["`--wire`", "KB per client and round", "test accuracy", "test loss", "loss above the first row's"]
    seeds = ", ".join(map(str, result["seeds"]))
    return f"Digits, seeds {seeds}. {describe_machine(result)}\n\n{markdown_table(head, rows)}"


def tuning(result: dict[str, Any]) -> str:
    """Return the table of the settings that tuning chose."""
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
    return f"{describe_machine(result)}\n\n{markdown_table(head, rows)}"


def curves(result: dict[str, Any]) -> str:
    """Return the tables of the optimizers on real tasks: loss, accuracy and trials."""
    texts = []
    for name, task in result.items():
        rows = []
        for way, r in task["ways"].items():
            good = [run for run in r["runs"] if not run["failure"]]
            quantities = ("validation_loss", "test_loss", "test_accuracy")
            scores = [mean_with_error([run[q] for run in good]) if len(good) > 1 else "" for q in quantities]
            trials = ", ".join(f"{mean(t['validation_losses']):.3g}" for t in r["trials"])
            rows.append([way, f"{r['rate']:.2g}", *scores, str(len(r["runs"]) - len(good)), trials])
        start = f"before: test loss {task['start']['test_loss']:.4f}, accuracy {task['start']['test_accuracy']:.4f}"
        seeds = ", ".join(str(run["seed"]) for run in r["runs"])
        setup = (
            f"{task['weights']:,} weights, {task['steps']} steps, batches of {task['batch']}, seeds {seeds}; {start}"
        )
        packages = ", ".join(f"{package} {version}" for package, version in task["packages"].items())
        head = [name, "rate", "validation loss", "test loss", "test accuracy", "failures"]
        table = markdown_table([*head, "trials: validation loss, rates rising"], rows)
        texts.append(f"{setup}. Text and data: {packages}. {describe_machine(task)}\n\n{table}")
    return "\n\n".join(texts)


LIES = {  # in the words of the table
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
    """Return the tables of test accuracy under every lie, by the server's settings."""

    def cell(runs: list[dict[str, Any]]) -> str:
        accuracies = [r["accuracy"] for r in runs if r["accuracy"] is not None]
        diverged = len(runs) - len(accuracies)
        mean_accuracy = f"{mean(accuracies):.4f}" if accuracies else ""
        return ", ".join(filter(None, [mean_accuracy, f"{diverged} of {len(runs)} diverged" if diverged else ""]))

    def refusals(row: dict[str, list[dict[str, Any]]]) -> str:
        counts = [r["refusals"] for runs in row.values() for r in runs if r["refusals"] is not None]
        return f"{mean(counts):,.0f}" if counts else ""

    settings = next(iter(result["settings"].values()))
    config = Config(**settings)
    setup = (
        f"{result['liars']} liars of {config.clients} clients, all of which take part in every one of {config.rounds} "
        f"rounds, with batches of {config.batch}; seeds {', '.join(map(str, result['seeds']))}."
    )
    head = ["what they lie about", *result["settings"], "messages refused in a run"]
    tables = [f"{setup} {describe_machine(result)}"]
    for data, lies in result["rows"].items():
        rows = [[LIES[lie], *map(cell, row.values()), refusals(row)] for lie, row in lies.items()]
        tables.append(f"Clients whose data are {data}:\n\n{markdown_table(head, rows)}")
    return "\n\n".join(tables)
