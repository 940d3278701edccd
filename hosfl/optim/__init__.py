"""Drop-in optimizers that need forward passes only: no backward, no server, no split, no memory of the model's size.

    optimizer = ZOSGD(model.parameters(), lr=1e-3)
    loss = optimizer.step(lambda: loss_of(model(x), y))  # evaluated twice, at moved weights

A step t draws P directions u_1 .. u_P from the run's seed, moves the weights along each, and sees how the loss changes:

    d_p = (loss(th + mu u_p) - loss(th - mu u_p)) / 2    one-sided: loss(th + mu u_p) - loss(th)
    v_p = d_p / mu                                       the derivative of the loss along u_p
    th  = th - lr * (1 / P) sum_p v_p u_p

Two-sided, that is SPSA (Spall, IEEE Transactions on Automatic Control, 1992), which MeZO (Malladi et al., arXiv
2305.17333) takes with one direction. How weights are moved depends on what they are:

* Exact: float32 weights, Rademacher directions, no momentum and no weight decay. They are moved in place, and taken
  back to the very bits.
* Read only: all else, if `model` is given. Moved weights exist one layer at a time; the weights themselves change by
  the update alone, which bfloat16 rounds stochastically.
* Drifting: all else without `model`. They are moved in place and back, every move rounded: after one step 29 % of
  float32 and 45 % of bfloat16 weights hold other bits than the update alone would give. For float32 that is noise far
  below the update's; for bfloat16 and float16 give `model`.

What else there is to know:

* Noise of a parameter depends on its number among all the parameters that were given to the optimizer, in that order,
  on the seed and on the step. Freezing one (`requires_grad_(False)`) or adding a group changes nobody else's.
* Lattices. Before the first exact move weights are put on lattices, as by `hosfl_kernels.snap_`, on which moves round
  nothing. A weight changes by at most 2^-16 of the largest of its tensor, or of mu. mu is the nearest multiple of the
  lattice's quantum, and a step's coefficients are rounded to multiples stochastically. Parameters of one group share a
  lattice where their largest weights (or mu, if that is larger) are within a factor of 16; a tensor of zeros lies
  where most of its group does. A parameter that outgrows its lattice gets a coarser one. One whose quantum would be
  above mu, because float32 has no room for both, is an error that names it.
* Rates of 0. A group whose learning rate is 0 is not moved at all, not even onto a lattice. Where all rates are 0 the
  closure is evaluated once, at the weights as they are.
* Weights that somebody else writes between steps, as where a checkpoint is loaded, are put on their lattice again by
  the next step, whether it succeeds or not. Writes through `.data`, which torch does not count, are noticed by 16
  elements of each tensor: not those that change single elements, or that keep to the lattice.
* Memory. Momentum keeps one float32 tensor per parameter. Nothing else is ever as large as a parameter but a copy, one
  parameter at a time: where weights in channels_last move, and where a digest is taken, at the first step and by
  `log.save`: of weights on a GPU in the host's memory, of sharded ones whole on every process.
* CUDA graphs. The closure may replay a captured graph of the forward pass where weights are moved in place: they stay
  at their addresses, and between two evaluations nothing waits for the device. The step itself cannot be captured;
  steps of `hosfl_kernels` can be. None of this has run on a GPU yet.
* Several processes. Where they share a model (DDP, or FSDP2's `fully_shard`) its losses are averaged, and all of them
  hold the bits of one process with the mean loss. Sharded parameters need `model`, and must be exact; every process
  must call `log.save` and `rebuild`.
* The log. `optimizer.log.save(path)` writes the run: 4 (P + 2) bytes per step, parameter group and lattice in it.
  `rebuild(model, path)` makes the trained weights again from the base model, in one pass. There is no log where
  weights drift, where two parameters have one name, or where during the run parameters were taken away, replaced or
  converted, or seed, directions, pool or dist changed: a step warns of it, and `log.save` raises `LogError`.
  Where somebody else wrote weights during the run, the log is saved, and `rebuild` refuses it.
"""

from hosfl.optim.log import RunLog
from hosfl.optim.optimizers import ZOSGD, ZONormalizedSGD
from hosfl.optim.replay import rebuild

__all__ = ["ZOSGD", "RunLog", "ZONormalizedSGD", "rebuild"]
