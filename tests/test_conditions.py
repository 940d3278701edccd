"""A step's evaluations are alike in all but the weights, whatever they draw and whichever thread they run in."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from hosfl.probing.conditions import Conditions


def step(conditions, closure, evaluations=3):
    with conditions.repeated({"cpu"}) as evaluate:
        return [evaluate(closure) for _ in range(evaluations)]


class Counts(nn.Module):
    """Counts its passes in a buffer, in place or by another tensor."""

    def __init__(self, assigns):
        super().__init__()
        self.assigns = assigns
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("still", torch.ones(()))

    def forward(self):
        if self.assigns:
            self.passes = self.passes + self.still
        else:
            self.passes += self.still
        return float(self.passes)


@pytest.mark.parametrize("assigns", [False, True])
def test_buffers_are_those_of_the_first_evaluation(assigns):
    conditions, module = Conditions(), Counts(assigns)
    still = module.still
    step(conditions, module)  # which modules are called
    step(conditions, module)  # which of their buffers change
    assert float(module.passes) == 4
    for passes in (5, 6, 7):
        assert step(conditions, module) == [passes] * 3
        assert float(module.passes) == passes
    with pytest.raises(ZeroDivisionError):
        step(conditions, lambda: (module(), 1 / 0))
    assert float(module.passes) == 7
    assert module.still is still


def test_a_step_that_draws_nothing_changes_nothing_for_the_next():
    conditions = Conditions()
    draw = lambda: (random.random(), float(np.random.rand()))  # noqa: E731
    assert len({*step(conditions, draw)}) == 1
    step(conditions, lambda: None)
    assert len({*step(conditions, draw)}) == 1


def test_threads_watch_beside_each_other():
    original, first_left, both_inside = nn.Module.__call__, threading.Event(), threading.Barrier(3)
    modules, conditions = [nn.Identity() for _ in range(2)], [Conditions() for _ in range(2)]

    def run(number):
        def closure():
            both_inside.wait(20)
            if number:
                first_left.wait(20)
            modules[number](torch.zeros(1))

        step(conditions[number], closure, evaluations=1)
        if not number:
            first_left.set()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    both_inside.wait(20)
    nn.Sequential(nn.Identity())(torch.zeros(1))  # a third thread, which nobody watches
    for thread in threads:
        thread.join(20)
    assert [c._modules for c in conditions] == [[m] for m in modules]
    assert nn.Module.__call__ is original


def test_a_thread_inside_a_module_leaves_nothing_behind():
    original, inside, done = nn.Module.__call__, threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self):
            inside.set()
            done.wait(20)

    other = threading.Thread(target=Slow())

    def closure():
        other.start()
        inside.wait(20)

    conditions = Conditions()
    step(conditions, closure, evaluations=1)
    done.set()
    other.join(20)
    assert nn.Module.__call__ is original
    assert conditions._modules == []


def test_inside_a_module_nothing_is_watched():
    """torch.compile looks at `nn.Module.__call__` there, and knows no other."""
    original, seen = nn.Module.__call__, []

    class Looks(nn.Module):
        def forward(self):
            seen.append(nn.Module.__call__)

    step(Conditions(), Looks(), evaluations=1)
    assert seen == [original]


def test_what_is_called_within_a_module_is_seen_as_its_part():
    conditions, outer = Conditions(), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    step(conditions, lambda: (outer(torch.zeros(1, 2)), outer[1](torch.zeros(1))))
    assert conditions._modules == [outer, outer[0], outer[1]]
