"""Drop-in optimizers that need forward passes only: no backward, no server, no split, no memory of the model's size.

    optimizer = ZOSGD(model.parameters(), lr=1e-3)
    loss = optimizer.step(lambda: loss_of(model(x), y))  # evaluated twice, at weights moved to either side

A step t draws P directions u_1 .. u_P from the run's seed, moves the weights along each, and sees how the loss changes:

    d_p = (loss(th + mu u_p) - loss(th - mu u_p)) / 2    or one-sided: loss(th + mu u_p) - loss(th)
    v_p = d_p / mu                                       the derivative of the loss along u_p
    th  = th - lr * (1 / P) sum_p v_p u_p

Noise of a parameter depends on its number among all the parameters that were given to the optimizer, in that order, on
the seed and on the step; freezing one (`requires_grad_(False)`) or adding a group changes nobody else's.

Where weights are moved, and what that costs:

* Exact, wherever it can be: float32 weights, Rademacher directions, no momentum and no weight decay. Before their first
  move the weights are put on lattices (as by `hosfl_kernels.snap_`) on which moves round nothing. They are moved in
  place and taken back to the very bits; mu is the nearest multiple of the lattice's quantum and a step's coefficients
  are rounded to multiples stochastically. Parameters of one group share a lattice where their largest weights (or mu,
  if that is larger) are within a factor of 16, so that a weight changes by at most 2^-16 of the largest of its tensor,
  or of mu; a tensor of zeros lies where most of its group does. A parameter that outgrows its lattice gets a coarser
  one. One whose quantum would be above mu, because float32 has no room for both, is an error that names it.
* Read only: all else, if the module is given as `model`. Moved weights exist one layer at a time
  (`hosfl.probing.displaced`), the weights themselves change by the update alone; bfloat16 rounds it stochastically.
* Drifting: all else without `model`. Moved in place and back, every move rounded: after one step 29 % of float32 and
  45 % of bfloat16 weights hold other bits than the update alone would give. For float32 that is noise far below the
  update's; for bfloat16 and float16 give `model`.

A group whose learning rate is 0 is not moved at all, not even onto a lattice. Where all rates are 0 the closure is
evaluated once, at the weights as they are.

Weights that somebody else writes between steps (a checkpoint that is loaded, weights swapped for an evaluation) are put
on their lattice again by the next step, whether it succeeds or not. Writes through `.data`, which torch does not count,
are noticed by 16 elements of each tensor: not those that change single elements, or that keep to the lattice.

Momentum keeps one float32 tensor per parameter. Nothing else is ever as large as a parameter, but for a copy, one
parameter at a time, where a digest is taken, at the first step and by `log.save`: of weights on a GPU in the host's
memory, of sharded ones whole on every process; and where weights in channels_last move.

A closure may replay a captured CUDA graph of the forward pass in the first case and in the last: weights stay at their
addresses, between two evaluations nothing waits for the device, and the loss is copied out of the graph's output. Not
in the second, where the moved weights are elsewhere; and the step itself cannot be captured: the host reads the losses,
refuses those that are not finite, puts the step on the lattice and writes it into the log. Steps of `hosfl_kernels` can
be, with records on the GPU. None of this has run on a GPU yet.

Where processes share a model (DDP, or FSDP2's `fully_shard`) its losses are averaged, and all of them hold the bits of
one process with the mean loss. Sharded parameters need `model`, and must be in the first case above; every process must
call `log.save` and `rebuild`.

`optimizer.log.save(path)` writes the run: 4 (P + 2) bytes per step, parameter group and lattice in it.
`rebuild(model, path)` makes the trained weights again from the base model, in one pass. There is no such log where
weights drift, where two parameters have one name, or where during the run parameters were taken away, replaced or
converted, or seed, directions, pool or dist changed: a step warns of it, `log.save` raises `LogError`.
"""

from hosfl.optim.log import RunLog, rebuild
from hosfl.optim.optimizers import ZOSGD, ZONormalizedSGD

__all__ = ["ZOSGD", "RunLog", "ZONormalizedSGD", "rebuild"]
