"""
Several processes that train as one: which of them this is, how they connect, and what they exchange.

Without torchrun there is only one process, and the functions after `connect` exchange nothing.
"""
import os
import time
import uuid

import torch
import torch.distributed as dist

from lib.configurator import UserError


def from_environment(name, default):
    """-> the integer that torchrun has put there. UserError if somebody has put something else there."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f'{name}={text!r} in the environment is no number: start with torchrun, which sets '
                        f'it, or unset {name}')
    return int(text)


def rank_and_world():
    """-> the number of this process, and how many there are: torchrun sets both."""
    rank, world = from_environment('RANK', 0), from_environment('WORLD_SIZE', 1)
    missing = [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if world > 1 and (missing or rank >= world):
        odd = f'no {" and no ".join(missing)}' if missing else f'RANK={rank}'
        raise UserError(f'WORLD_SIZE={world} and {odd} in the environment: start with torchrun, which sets '
                        'them all, or unset WORLD_SIZE')
    return rank, world


def local_rank():
    """-> the number of this process on its machine."""
    return from_environment('LOCAL_RANK', 0)


def connect(device):
    """Joins the processes that torchrun started into one group.

    torchrun keeps one key-value store over all its restarts. There a process may find the address of one
    that has died, and wait for it (pytorch issue 135712). So each attempt gets a prefix of its own:
    rank 0 draws it and passes it to every other process, under a name that this process has just drawn.
    """
    store, rank, world = next(dist.rendezvous('env://'))
    prefix = name = uuid.uuid4().hex
    if rank > 0:
        store.set(f'name of {rank}', name)
        prefix = store.get(f'prefix for {name}').decode()  # waits until rank 0 has set it
        store.add(f'{prefix} arrived', 1)
    while rank == 0 and store.add(f'{prefix} arrived', 0) < world - 1:
        for key in (f'name of {r}' for r in range(1, world)):
            if store.check([key]):
                store.set(f'prefix for {store.get(key).decode()}', prefix)
        time.sleep(0.01)
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world)


def average_gradients(params, loss):
    """Averages the gradients over the processes, in place, and the loss, which is returned: one all_reduce.

    DistributedDataParallel would have to be told which weights take part. Here a weight without a
    gradient (in a frozen part, say) has none on any process: it is left out, and AdamW does not touch
    it. The price is that communication does not overlap with the backward pass.
    """
    if not dist.is_initialized():
        return loss
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads] + [loss[None]])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *parts, loss = flat.split([g.numel() for g in grads] + [1])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])
    return loss[0]


def summed(tensor):
    """The sum of a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest(number):
    """The largest of the integers that the processes hold."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def gathered(rows):
    """The rows of all W processes, side by side: (b, ...) -> (b, W, ...), the same on every process."""
    if not dist.is_initialized():
        return rows[:, None]
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1)
