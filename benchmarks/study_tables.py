"""Tables of the studies: one study, all studies, and comparisons across studies."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.tables import describe_machine, markdown_table
from hosfl.settings import DEFAULTS
from hosfl.studies.page import at_ends, number

# The number of trainable weights in a study's client half, if a method has no `trains` of its own.
TRAINED_WEIGHTS = {
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
LORA_WEIGHTS = {"lora:1:*.layer.5.*": 6_912, "lora:1:*.layers.5.*": 2_560}  # by `trains`
# The method that is advised to a client of forward passes only, then those that stand for it in studies without it.
FORWARD_METHODS = ("ho, forward passes, normalized steps", "ho, forward passes", "ho, pool")
# Pairs of methods that differ in the rule only: Adam, normalized steps.
RULES = (("ho, forward passes", "ho, forward passes, normalized steps"), ("averaged, Adam", "averaged"))


def study(result: dict[str, Any]) -> str:
    """Return the table of a study's methods, at the settings that tuning chose."""
    metric = result["metric"]
    rows = []
    for method, r in result["methods"].items():
        trial = next((t for t in result["trials"] if (t["method"], t["trial"]) == (method, r["trial"])), {"choice": {}})
        shares = ("accuracy_gap_recovered", "loss_gap_recovered", "loss_gap_in_equal_seconds")
        rows.append(
            [
                method,
                ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in trial["choice"].items()),
                *(number(r[q], r[f"{q}_error"]) for q in ("accuracy", "loss")),
                *(number(r[share], None, 2) for share in shares),
                number(sum(r["bytes_per_client_round"].values()) / 1e3, None, 1),
                number(r["seconds"], None, 0),
                f"{len(r['failures'])} of {len(r['failures']) + len(r['seeds'])}",
            ]
        )
    head = ["", "chosen", f"test {metric}", "test loss", f"{metric} gap", "loss gap", "loss gap in equal seconds"]
    head += ["kB per client and round", "seconds", "failed"]
    trials = len(result["trials"]) // len(result["methods"])
    seeds = max((r["seeds"] for r in result["methods"].values()), key=len)
    setup = f"{result['rounds']} rounds, seeds {', '.join(map(str, seeds))}, {trials} trials for every method."
    return f"{setup} {describe_machine(result)}\n\n{markdown_table(head, rows)}\n\n{at_ends(result)}".rstrip()


def _gap_shares(row: dict[str, Any]) -> str:
    """Return the shares of the gaps in a study's metric and in loss that a row recovers."""
    return f"{row['accuracy_gap_recovered'] + 0.0:.2f} / {row['loss_gap_recovered'] + 0.0:.2f}"


def overview(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of all studies, one row each: accuracies between the controls, and shares of the gap."""

    def cell(row: dict[str, Any], share: bool = True) -> str:
        recovered = f" ({row['loss_gap_recovered'] + 0.0:.2f})" if share else ""
        return f"{row['accuracy']:.3f}{recovered}"

    rows = []
    for name, result in results.items():
        methods = result["methods"]
        forward = next(name for name in FORWARD_METHODS if name in methods)
        ho = [cell(methods[method]) if method in methods else "" for method in (forward, "ho, one backward pass")]
        controls = [cell(methods[method], share=False) for method in ("frozen", "first-order")]
        label = name if result["metric"] == "accuracy" else f"{name} ({result['metric']})"
        rows.append([label, f"{TRAINED_WEIGHTS[name]:,}", str(result["rounds"]), controls[0], *ho, controls[1]])
    head = ["study", "weights that move", "rounds", "frozen", "HO-SFL, 5 forward passes", "HO-SFL, one backward pass"]
    return markdown_table([*head, "first-order"], rows)


def lengths(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of one task's studies of several lengths: shares of the gaps in accuracy and in loss."""
    ordered = sorted(results.values(), key=lambda result: result["rounds"])
    names = [name for name in ordered[0]["methods"] if name.startswith("ho")]
    rows = [
        [
            str(result["rounds"]),
            *(f"{result['methods'][name]['accuracy']:.3f}" for name in ("frozen", "first-order")),
            *(_gap_shares(result["methods"][name]) for name in names),
        ]
        for result in ordered
    ]
    return f"{describe_machine(ordered[0])}\n\n" + markdown_table(["rounds", "frozen", "first-order", *names], rows)


def uses(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of uses of a round's numbers, a column for each study: shares of the gaps in metric and loss."""

    def cell(result: dict[str, Any], name: str) -> str:
        if name not in result["methods"]:
            return ""
        row, controls = result["methods"][name], [result["methods"][n]["loss"] for n in ("frozen", "first-order")]
        error = row["loss_error"] / abs(controls[0] - controls[1])
        return f"{_gap_shares(row)} ± {error:.2f}"

    names = dict.fromkeys(name for result in results.values() for name in result["methods"])
    rows = [[name, *(cell(result, name) for result in results.values())] for name in names if name != "frozen"]
    notes = []
    for study, result in results.items():
        seeds = max((len(r["seeds"]) for r in result["methods"].values()), default=0)
        trials = len(result["trials"]) // len(result["methods"])
        notes.append(f"{study}: {result['rounds']} rounds, {seeds} seeds, {trials} trials for every row")
    return f"{'; '.join(notes)}. {describe_machine(next(iter(results.values())))}\n\n" + markdown_table(
        ["", *results], rows
    )


def rules(results: dict[str, Any]) -> str:
    """Return the table that compares Adam with normalized steps in every study: shares of the gaps."""
    rows = [
        [study, *(_gap_shares(result["methods"][name]) for name in names)]
        for study, result in results.items()
        for names in RULES
        if result["methods"].keys() >= set(names)
    ]
    return markdown_table(["study", "Adam", "normalized steps"], rows)


class Numbers(NamedTuple):
    """The numbers that a run measured per trainable weight, and the share of the loss gap that it recovered."""

    per_weight: float
    study: str
    method: str
    formula: str
    share: float


def numbers_of(results: dict[str, dict[str, Any]]) -> list[Numbers]:
    """Return the `Numbers` of every HO-SFL run of the studies, sorted. results: by the study's name."""
    runs = []
    for name, result in results.items():
        for method, r in result["methods"].items():
            if r["settings"].get("method", "ho") == "ho" and r["settings"].get("trains") != "biases":
                settings = DEFAULTS | r["settings"]
                directions = settings["directions"]
                weights = LORA_WEIGHTS.get(settings["trains"], TRAINED_WEIGHTS[name])
                formula = f"{directions} x {result['rounds']} / {weights}"
                count = directions * result["rounds"] / weights
                runs.append(Numbers(count, name, method, formula, r["loss_gap_recovered"]))
    return sorted(runs)


def numbers(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of numbers per weight and recovered gap of every HO-SFL run."""
    rows = [[f"{r.study}: {r.method}", r.formula, f"{r.per_weight:.1f}", f"{r.share:.2f}"] for r in numbers_of(results)]
    return markdown_table(
        ["study and method", "P x rounds / weights", "numbers per weight", "loss gap recovered"], rows
    )
