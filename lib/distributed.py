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

BUCKET = 25 * 2**20  # bytes of gradients that are exchanged at a time; as in DistributedDataParallel


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


class GradientAverage:
    """Averages the gradients over the processes while the backward pass still computes the next ones.

    Gradients arrive from the last layer to the first. As soon as BUCKET bytes of them are there, their
    all_reduce begins in the background. A gradient becomes a view of its bucket, so there is no second copy.

    DistributedDataParallel would have to be told which weights take part. Here a weight without a gradient
    (in a frozen part, say) has none on any process: no bucket holds it, and AdamW does not touch it. Every
    process runs the same code on its rows, so the order of arrival is the same, and buckets match. A forward
    pass compiled as one graph hands over all its gradients at the end: then nothing overlaps.
    """

    def __init__(self, params):
        self.params, self.listening = params, False
        for p in params if rank_and_world()[1] > 1 else ():
            p.register_post_accumulate_grad_hook(self.arrived)

    def begin(self):
        """Before the last backward pass of a step: the gradients that it hands over are whole."""
        self.listening, self.waiting, self.seen, self.sent = dist.is_initialized(), [], set(), []

    def arrived(self, p):
        if self.listening:
            self.waiting.append(p)
            self.seen.add(id(p))
            if sum(p.grad.nbytes for p in self.waiting) >= BUCKET:
                self.send()

    def send(self, *numbers):
        """Begins the all_reduce of all that waits, and of numbers (1,) -> their place in the bucket."""
        grads = [p.grad for p in self.waiting]
        bucket = torch.cat([g.flatten() for g in grads] + [*numbers])
        *parts, rest = bucket.split([g.numel() for g in grads] + [len(numbers)])
        for p, part in zip(self.waiting, parts):
            p.grad = part.view_as(p)
        self.sent.append((bucket, dist.all_reduce(bucket, async_op=True)))
        self.waiting = []
        return rest

    def finish(self, loss):
        """Waits until all gradients are averages over the processes -> the average of the losses."""
        if not self.listening:
            return loss
        self.listening = False
        # the last bucket; with it, weights that an earlier micro-batch used, but not the last one
        self.waiting += [p for p in self.params if p.grad is not None and id(p) not in self.seen]
        loss = self.send(loss[None])[0]
        for bucket, work in self.sent:
            work.wait()
            bucket /= dist.get_world_size()
        self.sent = []
        return loss


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
