"""hosfl.optim on sharded parameters, in two processes: the bits of one process that holds all."""

import copy
from pathlib import Path
from unittest import mock

import group
import pytest
import torch
from test_optim_log import Parts
from torch import distributed, nn

from hosfl.optim import ZOSGD, ZONormalizedSGD, rebuild, sharded
from hosfl.protocol.header import LogError

STEPS = 5


def make():
    """Shards of 5 x 3 are uneven, those of 1 x 5 empty on one side; the last layer is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.Linear(1, 1))
    model[3].requires_grad_(False)
    return model


def half(model, rank):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))[8 * rank : 8 * rank + 8]
    y = model(x.to(model[0].weight.dtype)).float()
    return (y - x.sum(1, keepdim=True)).square().mean().double()


def both_halves(model):
    return (half(model, 0) + half(model, 1)) / 2


def optimizer_of(model, one_sided=False, **settings):
    if one_sided:
        return ZONormalizedSGD(model.parameters(), 0.02, directions=2, two_sided=False, model=model, seed=0, **settings)
    return ZOSGD(model.parameters(), 0.02, model=model, seed=0, **settings)


def disturb(model, step):
    """What users do between steps: grow a weight beyond the lattice, load weights, evaluate."""
    with torch.no_grad():
        if step == 1:
            model[0].weight.mul_(1.5)
        if step == 2:
            model[2].bias.add_(40.0)
        if step == 3:
            sharded.shard(model[0].bias)[0].mul_(1.1)
        if step == 4:  # unseen by torch's counts, and with a shard that is empty on one side
            sharded.shard(model[2].weight)[0].data.mul_(1.1)


def trained(model, loss, one_sided, disturbed=False):
    optimizer = optimizer_of(model, one_sided)
    with torch.no_grad():
        loss(model)  # leaves weights gathered
    for step in range(STEPS):
        if disturbed:
            disturb(model, step)
        optimizer.step(lambda: loss(model))
    return optimizer


def full(model):
    return [p.clone() for p in sharded.full_tensors(model.parameters())]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def sharded_model(way):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make()
    shape, names = ((2, 2), ("replicas", "shards")) if way == "2-d" else ((2,), ("shards",))
    settings = {"mesh": init_device_mesh("cpu", shape, mesh_dim_names=names)}
    if way == "bfloat16":
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if way in ("reshard", "keep"):
        settings["reshard_after_forward"] = way == "reshard"
    fully_shard(model[0], **settings)
    return fully_shard(model, **settings)


def follows_the_bits(rank, folder):
    half_of = rank % 2
    for way in ("default", "reshard", "keep", "bfloat16") if distributed.get_world_size() == 2 else ("2-d",):
        for one_sided in (False, True):
            model = sharded_model(way)
            optimizer = trained(model, lambda model: half(model, half_of), one_sided)
            with torch.no_grad():
                after = half(model, half_of)
            sharded.reshard(model)
            path = f"{folder}/{way}-{one_sided}"
            torch.save([full(model), after], f"{path}-{rank}")
            optimizer.log.save(path if rank == 0 else f"{path}-log-{rank}")
            base = sharded_model(way)
            with torch.no_grad():
                half(base, half_of)
            rebuild(base, path if rank == 0 else f"{path}-log-{rank}")
            sharded.reshard(base)
            assert same(full(base), full(model))
            with pytest.raises(LogError, match="digest"):
                rebuild(model, path if rank == 0 else f"{path}-log-{rank}")
            found = Parts(path if rank == 0 else f"{path}-log-{rank}")
            found.header["trained"] = "0" * 64
            found.write(Path(f"{path}-wrong-{rank}"))
            base = sharded_model(way)
            before = full(base)
            with pytest.raises(LogError, match="not the weights of the run"):
                rebuild(base, f"{path}-wrong-{rank}")
            sharded.reshard(base)
            assert same(full(base), before)


def writes_between_steps(rank, folder):
    model = sharded_model("default")
    trained(model, lambda model: half(model, rank), False, disturbed=True)
    sharded.reshard(model)
    torch.save(full(model), f"{folder}/disturbed-{rank}")


def a_closure_that_raises(rank, folder):
    model, undisturbed = sharded_model("default"), sharded_model("default")
    optimizer, other = optimizer_of(model), optimizer_of(undisturbed)
    optimizer.step(lambda: half(model, rank))  # puts the weights on the lattice
    other.step(lambda: half(undisturbed, rank))
    for fatal in (0, 1):
        for where in ("before", "inside", "after"):
            sharded.reshard(model)
            before, calls = full(model), 0

            def closure(fatal=fatal, where=where):
                nonlocal calls
                calls += 1
                if calls - 1 < fatal:
                    return half(model, rank)
                if where == "before":
                    raise KeyError
                if where == "after":
                    half(model, rank)
                    raise KeyError
                hook = model[1].register_forward_pre_hook(lambda *_: {}["no such key"])
                try:
                    return half(model, rank)
                finally:
                    hook.remove()

            with pytest.raises(KeyError):
                optimizer.step(closure)
            sharded.reshard(model)
            assert same(full(model), before)
        optimizer.step(lambda: half(model, rank))
        other.step(lambda: half(undisturbed, rank))
        sharded.reshard(model)
        sharded.reshard(undisturbed)
        assert same(full(model), full(undisturbed))
    # An older torch, whose FSDP cannot be told that a forward pass was cut short.
    with mock.patch("torch.distributed.fsdp.FSDPModule.reset_iter_state", side_effect=AttributeError, create=True):
        hook = model[1].register_forward_pre_hook(lambda *_: {}["no such key"])
        with pytest.raises(KeyError):
            optimizer.step(lambda: half(model, rank))
        hook.remove()
    with pytest.raises(RuntimeError, match="evaluate it once, then go on"):
        optimizer.step(lambda: half(model, rank))
    with torch.no_grad():
        half(model, rank)
    optimizer.step(lambda: half(model, rank))
    other.step(lambda: half(undisturbed, rank))
    sharded.reshard(model)
    sharded.reshard(undisturbed)
    assert same(full(model), full(undisturbed))


def goes_on_from_a_checkpoint(rank, folder):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def step(model, optimizer):
        optimizer.step(lambda: half(model, rank))
        sharded.reshard(model)

    whole, again = sharded_model("default"), sharded_model("default")
    optimizer, other = optimizer_of(whole, True), optimizer_of(again, True)
    step(whole, optimizer)
    saved = dict(zip("mo", get_state_dict(whole, optimizer), strict=True))
    checkpoint.save(saved, checkpoint_id=f"{folder}/checkpoint")
    step(whole, optimizer)
    read = dict(zip("mo", get_state_dict(again, other), strict=True))
    checkpoint.load(read, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(again, other, model_state_dict=read["m"], optim_state_dict=read["o"])
    step(again, other)
    assert other.steps == 2
    assert same(full(again), full(whole))


def what_is_refused(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    model = sharded_model("keep")
    for settings, message in [
        ({"model": None}, "give the optimizer `model`"),
        ({"dist": "gaussian"}, "where moves are exact"),
        ({"momentum": 0.5}, "where moves are exact"),
        ({"weight_decay": 0.5}, "where moves are exact"),
    ]:
        with pytest.raises(ValueError, match=message):
            ZOSGD(model.parameters(), 0.1, **{"model": model, **settings}).step(lambda: half(model, rank))
    other = fully_shard(nn.Linear(4, 2), shard_placement_fn=lambda p: Shard(p.dim() - 1))
    with pytest.raises(ValueError, match=r"parameter 'weight': \[2, 4\], placed as \(Shard\(dim=1\),\)"):
        optimizer_of(other).step(lambda: 0.0)
    with torch.no_grad():
        half(model, rank)
    gathered = list(model.parameters())
    with pytest.raises(ValueError, match="before its first forward pass"):
        ZOSGD(gathered, 0.1, model=model)
    if rank == 1:
        with torch.no_grad():
            model[0].bias.to_local()[0] = float("nan")
    with pytest.raises(ValueError, match=r"parameter '0\.bias' has infinite or NaN weights"):  # on both
        optimizer_of(model).step(lambda: half(model, rank))
    mesh = init_device_mesh("cpu", (1, 2))
    table = nn.Parameter(torch.arange(10.0).reshape(5, 2))
    everywhere, rows = Replicate(), Shard(0)
    for placements, start in [([everywhere, rows], 6 * rank), ([rows, everywhere], 0), ([everywhere] * 2, 0)]:
        tensor = nn.Parameter(distribute_tensor(table.detach(), mesh, placements))
        here, first = sharded.shard(tensor)
        assert first == start
        assert torch.equal(here, table.flatten()[start : start + here.numel()].reshape(-1, 2))
        assert here.data_ptr() == tensor._local_tensor.data_ptr()
    for placements in ([Shard(0), Shard(0)], [Replicate(), Shard(1)]):
        with pytest.raises(ValueError, match="placed as"):
            sharded.shard(distribute_tensor(table.detach(), mesh, placements))
    with pytest.raises(ValueError, match="placed as"):
        sharded.shard(DTensor.from_local(table.detach(), mesh, [Replicate(), Partial()]))


def one_of_many(rank, folder, parts):
    for part in parts:
        part(rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes have left there, and four on a mesh of two dimensions."""
    folder = tmp_path_factory.mktemp("sharded")
    parts = (
        follows_the_bits,
        writes_between_steps,
        a_closure_that_raises,
        goes_on_from_a_checkpoint,
        what_is_refused,
    )
    for world, done in ((2, parts), (4, parts[:1])):
        group.start(one_of_many, str(folder), done, count=world)()
    return folder


@pytest.mark.parametrize("way", ["default", "reshard", "keep", "bfloat16", "2-d"])
@pytest.mark.parametrize("one_sided", [False, True])
def test_sharded_weights_hold_the_bits_of_whole_ones(folder, way, one_sided):
    model = make()
    base = copy.deepcopy(model)
    computed_with = (lambda model: copy.deepcopy(model).bfloat16()) if way == "bfloat16" else (lambda model: model)
    trained(model, lambda model: both_halves(computed_with(model)), one_sided)
    assert not torch.equal(model[0].weight, base[0].weight)
    for rank in range(4 if way == "2-d" else 2):
        weights, loss = torch.load(folder / f"{way}-{one_sided}-{rank}")
        assert same(weights, model.parameters())
        # What the user evaluates next is gathered anew, too.
        assert torch.equal(loss, half(computed_with(model), rank % 2))
    rebuild(base, folder / f"{way}-{one_sided}")
    assert same(base.parameters(), model.parameters())


def test_weights_written_between_steps_are_seen_by_all(folder):
    model = make()
    optimizer = trained(model, both_halves, False, disturbed=True)
    assert optimizer.lattice != optimizer_of(make()).lattice
    for rank in (0, 1):
        assert same(torch.load(folder / f"disturbed-{rank}"), model.parameters())
