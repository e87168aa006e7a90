"""
Trains any method of this folder on any data set, on one core or many GPUs.

    python train.py config/NAME.py [--key=value ...]                                          -> out/NAME/ckpt.pt, out/NAME/log.jsonl
    torchrun --standalone --nproc_per_node=8 train.py config/NAME.py [--key=value ...]        the same run, on 8 GPUs
    python train.py config/NAME.py --help                   every key, the method's too; what those mean is in the Config of its file

The same command again continues the run, to the same numbers as if it had never stopped and on any number of processes: data, times and
masks are functions of (seed, step, global row), see noise.py. Stop it with Ctrl-C or SIGTERM and it saves first.
"""
import math
import os
import signal
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from lib.checkpoint import (FORMAT, append, backbones, begin_with, build, check_fits, compile_in_place, cut_log, device_name, is_run, load, pick_device,
                        save)
from lib.configurator import UserError, configure, run
from lib.tokens import WithLatents, open_data
from lib.noise import Noise

defaults = dict(
    out_dir='out/run',         # a config file NAME.py makes it out/NAME
    init_from='auto',          # auto: continue what out_dir holds, start if it holds nothing | scratch: start over | resume: continue or fail
                               # | out/OTHER: as auto, but start from the averaged weights of that run, where names and shapes agree
                               # | HUB_ID or folder: as auto, but start from published MDLM weights, see hub.py
    method='mdlm',             # mdlm | ladd | ar | ldlm; its own keys (hidden, num_layers ...) are in the Config of its file
    dataset='sawtooth',        # sawtooth, or a folder of data/ that prepare.py has filled
    block_size=0,              # tokens per sequence; 0: sawtooth's own 128, a prepared set wants a number
    seed=0,
    # the machine
    device='auto',             # auto | cpu | cuda | mps
    dtype='bfloat16',          # of the matrix products (autocast): bfloat16 | float32; weights and moments stay float32
    compile=False,             # torch.compile the forward pass; on a CPU it needs a C++ compiler and takes a minute
    batch_size=64,             # sequences per step, over all processes
    micro_batch=0,             # sequences per forward pass of one process; 0: all of its share, otherwise gradients are accumulated
    # the optimizer: AdamW
    max_iters=10000,
    learning_rate=3e-4,
    warmup_iters=0,            # steps of linear warmup
    decay_lr='constant',       # after warmup: constant | cosine | linear, down to min_lr * learning_rate at max_iters
    min_lr=0.0,
    beta1=0.9,
    beta2=0.999,
    adam_eps=1e-8,
    weight_decay=0.0,          # of matrices; gains and biases have none
    grad_clip=1.0,             # norm of the gradient; 0: no clipping
    ema=0.9999,                # decay of the averaged weights, which are the ones evaluated and sampled from
    # what is written, and when (in steps)
    log_interval=10,
    eval_interval=1000,
    eval_seqs=512,             # validation sequences per evaluation
    checkpoint_interval=0,     # 0: at evaluations
    wandb=False,               # log to Weights & Biases too
)
EVAL_SEED = 0xE0A1  # evaluation draws the same times and masks whenever, whatever and wherever we train


# ----------------------------------------------------------------------------------------------------
# optimization and evaluation

def learning_rate(c, step):
    """Linear warmup, then constant, half a cosine or a line."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / c.warmup_iters
    x = (step - c.warmup_iters) / max(1, c.max_iters - c.warmup_iters)  # 0 ... 1
    fall = {'constant': 1.0, 'cosine': (1 + math.cos(math.pi * x)) / 2, 'linear': 1 - x}[c.decay_lr]
    return c.learning_rate * (c.min_lr + (1 - c.min_lr) * fall)


def average_gradients(params, loss, world):
    """Mean over the processes of the gradients, in place, and of the loss, which is returned: one flat all_reduce.

    Not DistributedDataParallel, which must be told which weights take part. Here a weight without gradient (of the frozen stage, say) has none
    on any process, stays out, and AdamW leaves it untouched. The price is that communication does not overlap with the backward pass.
    """
    if world == 1:
        return loss
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads] + [loss[None]])
    dist.all_reduce(flat)
    flat /= world
    *parts, loss = flat.split([g.numel() for g in grads] + [1])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])
    return loss[0]


@contextmanager
def averaged(method, params, ema):
    """Within, the method is in eval mode and its weights are the averaged ones."""
    def swap():
        for p, e in zip(params, ema):
            p.data, e.data = e.data, p.data
    swap()
    method.eval()
    try:
        with torch.compiler.set_stance('force_eager'):  # not worth compiling another time
            yield
    finally:
        swap()
        method.train()


def parts(batch):
    """What a data source gives: ids, or (ids, stored latents) -> a tuple."""
    return batch if isinstance(batch, tuple) else (batch,)


@torch.no_grad()
def evaluate(method, data, n, batch, rank, world, device):
    """What method.nll estimates (see there for which bound, if any), in nats per token, over the first n validation sequences.

    The same for every batch size and number of processes.
    """
    n, nats = min(n, len(data)), torch.zeros((), dtype=torch.float64)
    for first in range(rank, n, world * batch):
        rows = torch.arange(first, min(first + world * batch, n), world)
        x, *z_0 = (part.to(device) for part in parts(data.rows(rows)))
        nats += method.nll(x, Noise(EVAL_SEED, 0, rows.to(device), n), *z_0).sum().item()
    if world > 1:
        dist.all_reduce(nats)
    return nats.item() / (n * data.block_size)


# ----------------------------------------------------------------------------------------------------
# processes

def connect(backend):
    """Joins the processes that torchrun started.

    torchrun keeps one key-value store over its restarts, where a process may find the address of one that died (pytorch issue 135712) and
    wait for it. So each attempt gets a prefix of its own: rank 0 draws it, and tells the others under a name that no earlier attempt knew.
    """
    store, rank, world = next(dist.rendezvous('env://'))
    prefix = name = uuid.uuid4().hex
    if rank > 0:
        store.set(f'name of {rank}', name)
        prefix = store.get(f'prefix for {name}').decode()  # waits for it
        store.add(f'{prefix} arrived', 1)
    while rank == 0 and store.add(f'{prefix} arrived', 0) < world - 1:
        for key in (f'name of {r}' for r in range(1, world)):
            if store.check([key]):
                store.set(f'prefix for {store.get(key).decode()}', prefix)
        time.sleep(0.01)
    dist.init_process_group(backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world)


# ----------------------------------------------------------------------------------------------------
# mistakes

def check(c, world):
    """UserError for values of the right type that make no sense together."""
    share = c.batch_size // world
    rules = [
        (c.init_from in ('auto', 'scratch', 'resume') or '/' in c.init_from, f'init_from is auto, scratch, resume, out/OTHER, OWNER/NAME of the hub or a folder, not {c.init_from!r}'),
        (c.dtype in ('bfloat16', 'float32'), f'dtype is bfloat16 or float32, not {c.dtype!r}'),
        (c.decay_lr in ('constant', 'cosine', 'linear'), f'decay_lr is constant, cosine or linear, not {c.decay_lr!r}'),
        *((getattr(c, key, 1) >= 1, f'{key} must be at least 1, not {getattr(c, key, 1)}') for key in
          ('batch_size', 'max_iters', 'log_interval', 'eval_interval', 'eval_seqs', 'hidden', 'num_layers', 'num_heads', 'cond_dim',
           'encoder_layers', 'num_latents', 'latent_dim', 'codebook_size', 'adaptive_every')),
        *((getattr(c, key, 1) > 0, f'{key} must be greater than 0, not {getattr(c, key, 1)}') for key in ('latent_length', 'dead_below', 'tangent')),
        (getattr(c, 'adaptive_bins', 2) >= 2, 'adaptive_bins must be at least 2: the loss rises from one to the next'),
        *((getattr(c, key, 0) >= 0, f'{key} must not be negative, as {getattr(c, key, 0)} is') for key in
          ('block_size', 'micro_batch', 'learning_rate', 'warmup_iters', 'min_lr', 'adam_eps', 'weight_decay', 'grad_clip', 'checkpoint_interval',
           'latent_layers', 'decoder_layers', 'stage1_iters', 'vq_start', 'encoder_warmup', 'lambda_x', 'lambda_z', 'sigma_dec', 'adaptive_floor')),
        *((0 <= getattr(c, key, 0) < 1, f'{key} must be in [0, 1), not {getattr(c, key, 0)}') for key in ('beta1', 'beta2', 'ema', 'dropout')),
        *((0 <= getattr(c, key, 0) <= 1, f'{key} must be in [0, 1], not {getattr(c, key, 0)}') for key in
          ('p_drop', 'p_start', 'stage1_t_min', 'vq_decay', 'self_conditioning', 'mask_states', 'adaptive_memory')),
        (c.batch_size % world == 0, f'batch_size={c.batch_size} does not divide among {world} processes; {max(share, 1) * world} would'),
        (share % (c.micro_batch or 1) == 0, f'micro_batch={c.micro_batch} does not divide the {share} sequences of a process; '
                                            f'{math.gcd(share, c.micro_batch)} would'),
    ]
    for good, message in rules:
        if not good:
            raise UserError(message)
    if hasattr(c, 'num_heads') and c.hidden % (2 * c.num_heads):
        raise UserError(f'hidden={c.hidden} does not divide into {c.num_heads} heads of an even width')


# ----------------------------------------------------------------------------------------------------
# the run

def main(argv):
    # ------------------------------------------------------------------------
    # everything that can be wrong, before anything is written
    config = configure(defaults, argv)
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    c = SimpleNamespace(**config)
    if c.init_from == 'scratch' and int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)):
        c.init_from = 'auto'  # a worker died, and torchrun has given the same command again: it is to go on
    check(c, world)
    device = pick_device(c.device)
    path = os.path.join(c.out_dir, 'ckpt.pt')
    checkpoint = load(path) if c.init_from == 'resume' or c.init_from != 'scratch' and os.path.exists(path) else None
    published = '/' in c.init_from and not is_run(c.init_from)  # weights of others, and so their shape
    if published:
        if checkpoint:
            theirs = checkpoint['config']
        elif c.method == 'mdlm':
            from lib.hub import load_hub
            network, theirs = load_hub(c.init_from, 'cpu')
        else:
            raise UserError(f'{c.init_from} holds no run of ours, and published weights are of mdlm, not of {c.method}')
        shape = ('block_size', 'hidden', 'num_layers', 'num_heads', 'cond_dim', 'dropout')
        config.update({k: theirs[k] for k in shape if k in theirs and not (k == 'block_size' and c.block_size)})
        c = SimpleNamespace(**config)
    train_data = open_data(c.dataset, 'train', c.block_size)
    val_data = open_data(c.dataset, 'val', c.block_size)
    L = train_data.block_size
    if c.block_size not in (0, L):
        raise UserError(f'{c.dataset} has sequences of {L} tokens, not block_size={c.block_size}')
    config.update(vocab_size=train_data.vocab_size, block_size=L)
    if hasattr(train_data, 'tokenizer'):  # the checkpoint can then read and write text without the data
        config.update(tokenizer=train_data.tokenizer, wrap=train_data.wrap)

    torch.manual_seed(c.seed)  # every process begins with the same weights
    method = build(config)
    if hasattr(method, 'check_data'):
        config['encoder_weights'] = method.check_data(train_data, device)
    if getattr(c, 'stored_latents', False):
        train_data, val_data = (WithLatents(data, c.encoder, c.num_latents, c.latent_dim) for data in (train_data, val_data))
        config['encoder_weights'] = train_data.encoder_weights
    if checkpoint:
        check_fits(checkpoint, config, method, c.out_dir)
        method.load_state_dict(checkpoint['model'])
    elif published:
        if train_data.vocab_size != theirs['vocab_size']:
            raise UserError(f'{c.init_from} has {theirs["vocab_size"]:,} tokens and {c.dataset} has {train_data.vocab_size:,}; '
                            'prepare the data with its tokenizer')
        method.load_state_dict(network.state_dict())
    elif '/' in c.init_from:
        begin_with(method, config, c.init_from)
    elif not (getattr(c, 'stage1_iters', 1) or c.encoder and c.latent == 'continuous'):
        raise UserError('stage 2 freezes encoder and codebook: train them first, --stage1_iters=N, or bring them along, --init_from=out/OTHER')
    start, tokens = (checkpoint['step'], checkpoint['tokens']) if checkpoint else (0, 0)
    if c.wandb:
        try:
            import wandb
        except ImportError as e:
            raise UserError('wandb=True needs the package: pip install wandb') from e

    # ------------------------------------------------------------------------
    # the method, its optimizer and its average
    method.to(device).train()
    torch.set_float32_matmul_precision('high')
    names, params = zip(*method.named_parameters())
    buffers = [b for name, b in method.named_buffers() if name in method.state_dict()]
    ema = [p.detach().clone() for p in params]
    matrices, vectors = [p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{'params': matrices}, {'params': vectors, 'weight_decay': 0.0}], lr=c.learning_rate,
                                  betas=(c.beta1, c.beta2), eps=c.adam_eps, weight_decay=c.weight_decay, fused=True)
    if checkpoint:
        optimizer.load_state_dict({'state': checkpoint['optimizer'], 'param_groups': optimizer.state_dict()['param_groups']})
        torch._foreach_copy_(ema, [checkpoint['ema'][name].to(device) for name in names])
        checkpoint = None  # it is four times as large as the weights
    if c.compile:
        # the whole forward pass; on a CPU the heads keep out: their number of rows changes from step to step
        compile_in_place(backbones(method) if device.type == 'cpu' else [method], device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16')
    if world > 1:
        connect('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo')
        starts = torch.tensor([start, -start])
        dist.all_reduce(starts, op=dist.ReduceOp.MAX)
        if starts.sum() != 0:
            raise UserError(f'processes begin at steps {-starts[1]} to {starts[0]}: {c.out_dir} must be one folder that all nodes see')

    # ------------------------------------------------------------------------
    # files and signals
    log = os.path.join(c.out_dir, 'log.jsonl')
    if rank == 0:
        cut_log(log, start)
        if c.init_from == 'scratch' and os.path.exists(path):
            os.remove(path)
        if c.wandb:
            wandb.init(project='nanoladd', name=os.path.basename(c.out_dir), dir=c.out_dir, config=config)
        backbone = sum(p.numel() for m in backbones(method) for p in m.parameters())
        print(f'{c.method} on {c.dataset}: {sum(p.numel() for p in params) / 1e6:.2f}M parameters, {backbone / 1e6:.2f}M in transformers; '
              f'{method.flops(L) / 1e9:.3g} GFLOPs per denoiser call; {c.batch_size * L:,} tokens per step; {world} x {device_name(device)}, {c.dtype}',
              flush=True)
        if start:
            print(f'{c.out_dir} is at step {start:,} of {c.max_iters:,}' + ('; a larger --max_iters goes on' if start >= c.max_iters else ''), flush=True)

    def record(numbers):
        if rank == 0:
            append(log, numbers)
            if c.wandb:
                wandb.log(numbers, step=numbers['step'])

    stop, stopped_by = [], 0  # signals received, and the one that all processes heed; the step is finished first, a second signal does not wait

    def on_signal(signum, frame):
        if stop:
            raise KeyboardInterrupt
        stop.append(signum)
    old_handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}

    # ------------------------------------------------------------------------
    # the loop
    share = c.batch_size // world
    micro = c.micro_batch or share
    accumulate = share // micro
    rows = rank + world * torch.arange(share)  # interleaved: these rows of the global batch are ours
    device_rows = rows.to(device)
    bad_run, worst_run, skipped = torch.zeros(3, device=device)

    def fetch(step):
        batch = parts(train_data.batch(c.seed, step, rows))
        return [part.pin_memory() for part in batch] if device.type == 'cuda' else batch

    def draw_rows(n):  # for a method that wants to see more of the data than the batch
        return [part.to(device) for part in parts(train_data.batch(c.seed, step, torch.arange(n)))]

    bar = tqdm(total=c.max_iters, initial=start, disable=rank != 0, mininterval=0.5 if sys.stderr.isatty() else 30, dynamic_ncols=True, unit='step')
    feed = ThreadPoolExecutor(1)
    try:
        coming = feed.submit(fetch, start)
        clock, clock_tokens, done = time.time(), tokens, start
        for step in range(start, c.max_iters):
            x, *z_0 = (part.to(device, non_blocking=True) for part in coming.result())  # (share, L), and stored latents where there are
            coming = feed.submit(fetch, step + 1)
            noise = Noise(c.seed, step, device_rows, c.batch_size)
            torch.manual_seed((c.seed * 1000003 + step) * 65536 + rank & 0x7FFFFFFFFFFFFFFF)  # dropout, too, is a function of the step
            lr = learning_rate(c, step)
            for group in optimizer.param_groups:
                group['lr'] = lr
            if hasattr(method, 'begin_step'):
                with autocast:
                    begins = method.begin_step(step, draw_rows, noise)
                if begins and rank == 0:
                    bar.write(f'step {step:,}: {begins}')
            before = [b.clone() for b in buffers]

            # gradient
            loss, logs = 0.0, {}
            for i in range(accumulate):
                every = slice(i, None, accumulate)  # evenly spaced rows have evenly spaced times
                with autocast:
                    part, part_logs = method(x[every], noise[every], *(z[every] for z in z_0))
                (part / accumulate).backward()
                loss = loss + part.detach().float() / accumulate
                logs = {k: logs.get(k, 0) + v / accumulate for k, v in part_logs.items()}
            loss = average_gradients(params, loss, world)
            grad_norm = torch.nn.utils.clip_grad_norm_(params, c.grad_clip or math.inf)

            # step; if loss or gradient is not finite the device skips it, without asking the host: weights and buffers stay, the average still
            # moves towards them
            bad = ~torch.isfinite(loss + grad_norm)
            optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # fused AdamW skips the step itself, as it does for a GradScaler
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for b, old in zip(buffers, before):
                    b.copy_(torch.where(bad, old, b))
                torch._foreach_lerp_(ema, params, 1 - min(c.ema, (step + 1) / (step + 10)))  # a short run forgets its start, too
            bad_run = (bad_run + 1) * bad
            worst_run, skipped = torch.maximum(worst_run, bad_run), skipped + bad
            tokens += c.batch_size * L
            bar.update()

            done = step + 1
            stopped_by = max(stop, default=0)  # a signal from here on waits for the next step: this one might not be saved
            if world > 1:  # all processes stop after the same step
                flag = torch.tensor(stopped_by)
                dist.all_reduce(flag, op=dist.ReduceOp.MAX)
                stopped_by = flag.item()
            last = stopped_by > 0 or done == c.max_iters
            saving = last or done % (c.checkpoint_interval or c.eval_interval) == 0
            evaluating = hasattr(method, 'nll') and not stopped_by and (done % c.eval_interval == 0 or last)

            if saving or evaluating or done % c.log_interval == 0:  # the only place where the host waits for the device
                values = torch.stack([torch.as_tensor(v, device=device).float() for v in logs.values()] or [loss])
                if world > 1:
                    dist.all_reduce(values)
                logs = dict(zip(logs, (values / world).tolist()))
                numbers = dict(zip(('loss', 'grad_norm', 'skipped', 'worst'), torch.stack([loss, grad_norm, skipped, worst_run]).tolist()))
                if numbers.pop('worst') >= 3:
                    text = f'loss or gradient was not finite in 3 steps in a row, up to step {done}; ' \
                           f'{c.out_dir} keeps its last checkpoint; try a lower --learning_rate'
                    sys.exit(f'error: {text}' if rank == 0 else 1)
                speed = (tokens - clock_tokens) / (time.time() - clock)
                record({'step': done, **logs, **numbers, 'lr': lr, 'tokens_per_s': round(speed), 'tokens': tokens})
                bar.set_postfix(loss=f'{numbers["loss"]:.4f}', tokens_per_s=f'{speed:,.0f}', refresh=False)
                clock, clock_tokens = time.time(), tokens
            if evaluating:
                with averaged(method, params, ema), autocast:
                    val_loss = evaluate(method, val_data, c.eval_seqs, micro, rank, world, device)
                record({'step': done, 'val_loss': val_loss, 'val_ppl': math.exp(min(val_loss, 700))})
                if rank == 0:
                    bar.write(f'step {done:,}: loss {numbers["loss"]:.4f}, validation {val_loss:.4f} nats per token, perplexity '
                              f'{math.exp(min(val_loss, 700)):.2f}{getattr(method, "no_bound", "")}')
            if saving and rank == 0:  # when all records of the step are written: whoever resumes from here misses none of them
                save(path, {'format': FORMAT, 'config': config, 'model': method.state_dict(), 'ema': dict(zip(names, ema)),
                            'optimizer': optimizer.state_dict()['state'], 'step': done, 'tokens': tokens})
            if saving or evaluating:
                clock = time.time()
            if stopped_by:
                break
    finally:
        bar.close()
        feed.shutdown(cancel_futures=True)
        for s, handler in old_handlers.items():
            signal.signal(s, handler)
    if world > 1:
        dist.destroy_process_group()
    if stopped_by:
        if rank == 0:
            print(f'stopped after step {done:,}; the same command continues')
        sys.exit(128 + stopped_by)
    if rank == 0 and hasattr(train_data, 'report'):
        with averaged(method, params, ema), autocast:
            train_data.report(method)


if __name__ == '__main__':
    run(main)
