"""A step's update of the weights, on their lattices or by a rule; returns a row for the log for each group.

th = th - lr * sum_p e_p u_p    e_p: the gradient's coefficients on the directions
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from hosfl.optim.groups import Group
from hosfl.optim.lattices import Lattices
from hosfl.optim.log import Row, RunLog
from hosfl.optim.moved import InPlace, ReadOnly
from hosfl.optim.terms import Terms, apply_rule, zeros
from hosfl.protocol.seeds import Purpose, round_seed
from hosfl_kernels import SGD, derive

LARGEST_FLOAT32 = torch.finfo(torch.float32).max

State = MutableMapping[Tensor, dict[str, Any]]  # torch's `Optimizer.state`: of each parameter its moment


def check_reach(groups: Sequence[Group], estimates: Sequence[Sequence[float]]) -> None:
    """Raises FloatingPointError for a step whose numbers are beyond float32."""
    pairs = zip(groups, estimates, strict=True)
    reach = max((max(group.rate, 1.0) * sum(map(abs, e)) for group, e in pairs), default=0.0)
    if not reach < LARGEST_FLOAT32 / 4:
        raise FloatingPointError(f"a step of {reach:g}: lower lr, or raise mu")
    for group in groups:
        shrinking = group.rate * group.weight_decay
        if not shrinking < LARGEST_FLOAT32:
            raise FloatingPointError(f"lr * weight_decay is {shrinking:g}: lower one of them")


def lattice_step(
    weights: InPlace,
    estimates: Sequence[Sequence[float]],
    lattices: Lattices,
    terms: Terms,
    step: int,
    log: RunLog,
    processes: distributed.ProcessGroup | None,
) -> list[Row]:
    """Restore the weights and add the step, in one pass. Coefficients are rounded to the lattice stochastically.

    Where lattices become too small, `weights.groups` are other parts afterwards, to which the rows belong.
    """
    distances = [g.rate * sum(map(abs, e)) + g.mu for g, e in zip(weights.groups, estimates, strict=True)]
    if lattices.outgrown(weights.groups, distances):
        weights.restore()
        try:
            lattices.make_room(weights.groups, distances, log, processes)
        except ValueError as error:
            raise FloatingPointError(f"a step of {max(distances):g} is too long: lower lr. After it {error}") from None
        parts = [lattices.parts(group) for group in weights.groups]
        estimates = [e for e, mine in zip(estimates, parts, strict=True) for _ in mine]
        weights.groups = [part for mine in parts for part in mine]
    key = round_seed(terms.seed, Purpose.COEFFICIENTS, step)
    rows = []
    for group, estimate in zip(weights.groups, estimates, strict=True):
        # The same for all parts of a parameter group.
        uniforms = [derive(key, p, group.index) / 2.0**64 for p in range(terms.directions)]
        moves = lattices.round(group, [-group.rate * c for c in estimate], uniforms)
        rows.append(Row(moves, group.rate, 1.0))
    weights.move(0, 0, [(terms.seeds(step), row.coefficients) for row in rows])
    for group, row in zip(weights.groups, rows, strict=True):
        lattices.add_distance(group, row.coefficients)
    return rows


def rule_steps(
    weights: InPlace | ReadOnly,
    estimates: Sequence[list[float]],
    state: State,
    terms: Terms,
    step: int,
) -> list[Row]:
    """Restore the weights, then step by SGD with momentum and weight decay. Every move is rounded."""
    # If there is not enough memory, that must show before the first group moves: so this allocates the moments of all
    # groups, and the largest copy through which weights in channels_last move, which is freed at once.
    moments = [_moments(group, state) for group in weights.groups]
    strided = [t for group in weights.groups for t in group.tensors if not t.is_contiguous()]
    if strided:
        torch.empty(max(t.nbytes for t in strided), dtype=torch.uint8, device=strided[0].device)
    weights.restore()
    triples = zip(weights.groups, estimates, moments, strict=True)
    return [_rule_step(*triple, state, terms, step) for triple in triples]


def _rule_step(
    group: Group, estimate: list[float], moments: list[Tensor], state: State, terms: Terms, step: int
) -> Row:
    rule = SGD(group.momentum, group.weight_decay)
    row = Row(estimate, *rule.steps([step], [group.rate])[0, :2].tolist())
    coefficients = torch.tensor([row.coefficients], dtype=torch.float32, device="cpu")
    steps = torch.tensor([[row.rate, row.keep]], dtype=torch.float32, device="cpu")
    place = group.tensors, group.numbers, group.starts
    apply_rule(terms, rule.momentum, *place, moments, step, coefficients, steps)
    for tensor, moment in zip(group.tensors, moments, strict=False):
        state[tensor]["moment"] = moment
    return row


def _moments(group: Group, state: Mapping[Tensor, dict[str, Any]]) -> list[Tensor]:
    """A moment for each tensor, zeros if it has none yet; an empty list without momentum."""
    if not group.momentum:
        return []
    kept = [state.get(t, {}).get("moment") for t in group.tensors]
    return [zeros(t) if moment is None else moment for t, moment in zip(group.tensors, kept, strict=True)]


def make_moments(groups: Sequence[dict[str, Any]], state: State) -> None:
    """Make zero moments where there are none, for a state_dict to be loaded into."""
    for group in groups:
        for parameter in group["params"] if group["momentum"] else []:
            if parameter.requires_grad and not state.get(parameter):
                state[parameter]["moment"] = zeros(parameter)
