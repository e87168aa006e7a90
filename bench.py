"""
How fast a config trains and samples here, how much memory that takes, and what the economical vocabulary head is worth.

    python bench.py config/NAME.py [--key=value ...]         keys: those of train.py and the ones below
    python bench.py config/owt_mdlm.py --vocab_size=50257 --batch_size=8      random tokens: no data set needed

Everything is measured twice, each time in a process of its own: as it is, and in the straightforward way, where training
takes F.cross_entropy of (B, L, V) logits and sampling draws all positions by fp64 Gumbel noise over V + 1 outcomes.

Training FLOPs per sequence = 6 * (layers * (12 L d^2 + 2 L^2 d) + rows * d * V): two per multiply-add, backward costs twice forward;
rows = L / 2, the positions that MDLM masks on average (AR: L). It is the useful work, the same number for both ways; left out
are embeddings, AdaLN, and an encoder. MFU divides it by the peak that is printed.
"""
import json
import resource
import statistics
import subprocess
import sys
import time
from types import MethodType, SimpleNamespace

import torch
import torch.nn.functional as F

import ar
import mdlm
from checkpoint import build, device_name, pick_device
from configurator import UserError, configure, run
from data.tokens import open_data
from noise import Noise
from train import check, compile_in_place, defaults

defaults = dict(
    defaults,
    vocab_size=0,              # 0: the data set's; otherwise random tokens
    iters=5,                   # training steps that are timed; the median counts
    steps=64,                  # of the sampler
    num_samples=2,             # sequences sampled at once; 0: no sampling
    variant='',                # (what a process of its own measures: ours | full)
)
PEAKS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'RTX 4090': 165e12}  # dense bf16 FLOP/s by the data sheets


# ----------------------------------------------------------------------------------------------------------------------------------
# the straightforward way

def full_cross_entropy(head, h, targets, weights):
    """What head_cross_entropy computes, from all the logits at once."""
    return (weights * F.cross_entropy(head(h).float(), targets, reduction='none')).sum()


def full_token_loss(self, h, x, mask, t, uniform=True):
    """What MDLM.token_loss computes, from the logits of every position."""
    weight = mdlm.elbo_weight(t, self.config.schedule) if self.config.weighting == 'elbo' else torch.ones_like(t)
    weights = (weight[:, None] * mask / x.numel()).flatten()
    return full_cross_entropy(self.head, h.flatten(0, 1), x.flatten(), weights), mask.new_zeros((), dtype=torch.int64)


@torch.no_grad()
def full_sample(method, x, alphas, steps):
    """The first `steps` steps along alphas with head and noise on every position; each costs the same."""
    for alpha_t, alpha_s in list(mdlm.pairs(alphas))[:steps]:
        logits = method.head(method.dit(method.embed(x))).to(mdlm.wide(x.device))
        reveal = (alpha_s - alpha_t) / (1 - alpha_t)
        probs = torch.cat((logits.softmax(dim=-1) * reveal, (1 - reveal).expand(*x.shape, 1)), dim=-1)  # the last outcome: stay masked
        drawn = (probs.log() - torch.rand_like(probs).log_().neg_().log_()).argmax(dim=-1)
        x = torch.where(x == method.mask_id, drawn, x)
    return x


# ----------------------------------------------------------------------------------------------------------------------------------
# measuring

def seconds(f, device):
    if device.type == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(device):
    """Bytes: what the GPU's allocator held at most, or the process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def peak_flops(device, dtype):
    """(FLOP/s, where that number is from)."""
    name = device_name(device)
    for key, peak in PEAKS.items():
        if key in name and dtype == torch.bfloat16:
            return peak, f'{name}: {peak / 1e12:.0f} TFLOP/s dense bf16 by the data sheet'
    n = 8192 if device.type == 'cuda' else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    peak = 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5))
    return peak, f'{name}: {peak / 1e12:.3g} TFLOP/s, the best of five {n} x {n} products in {str(dtype)[6:]}'


def measure(c, config, device, L):
    """One variant -> dict of numbers."""
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision('high')
    method = build(config).to(device).train()
    if c.variant == 'full':
        ar.head_cross_entropy = full_cross_entropy
        if isinstance(method, mdlm.MDLM):
            method.token_loss = MethodType(full_token_loss, method)
    params = list(method.parameters())
    if c.compile:
        compile_in_place(method, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16')
    accumulate = c.batch_size // (c.micro_batch or c.batch_size)
    rows = torch.arange(c.batch_size, device=device)
    x = torch.randint(c.vocab_size, (c.batch_size, L), device=device)

    def gradient(step):
        noise = Noise(c.seed, step, rows, c.batch_size)
        if hasattr(method, 'begin_step'):
            with autocast:
                method.begin_step(step, lambda n: (torch.randint(c.vocab_size, (n, L), device=device),), noise)
        for i in range(accumulate):
            with autocast:
                loss, _ = method(x[i::accumulate], noise[i::accumulate])
            (loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(params, c.grad_clip or float('inf'))

    for step in range(2):
        gradient(step)
        method.zero_grad(set_to_none=True)
    result = {'gradient_memory': peak_memory(device)}
    ema = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)

    def train_step(step):
        gradient(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - c.ema)

    train_step(2)
    times = [seconds(lambda: train_step(3 + i), device) for i in range(c.iters)]
    result.update(tokens_per_s=c.batch_size * L / statistics.median(times), memory=peak_memory(device))
    del optimizer, ema
    method.eval()
    n = c.num_samples
    if n and c.variant == 'ours':
        with autocast:
            result['sampling'] = seconds(lambda: method.sample(n, c.steps), device) / n
    elif n and type(method) is mdlm.MDLM:
        alphas = mdlm.alpha(mdlm.time_grid(c.steps, device), c.schedule)
        part = min(4, c.steps)
        with autocast:
            masked = torch.full((n, L), method.mask_id, device=device)
            result['sampling'] = seconds(lambda: full_sample(method, masked, alphas, part), device) / n * c.steps / part
    return result


def in_its_own_process(argv, variant):
    """measure() where nothing else has been allocated before -> its dict; an empty one if the full head needs more than there is."""
    done = subprocess.run([sys.executable, __file__, *argv, f'--variant={variant}'], stdout=subprocess.PIPE, text=True)
    if done.returncode and variant == 'ours':
        raise UserError('the measurement failed for the reason above')
    return {} if done.returncode else json.loads(done.stdout)


def main(argv):
    config = configure(defaults, argv)
    c = SimpleNamespace(**config)
    check(c, 1)
    if c.method == 'ldlm':
        raise UserError('bench.py knows mdlm, ladd and ar: LDLM has no masked rows to save, and several networks to count')
    device = pick_device(c.device)
    if c.vocab_size and not c.block_size:
        raise UserError('random tokens (vocab_size) want a block_size too')
    if not c.vocab_size:
        try:
            data = open_data(c.dataset, 'train', c.block_size)
        except UserError as e:
            raise UserError(f'{e}; or --vocab_size=50257 for random tokens') from e
        config.update(vocab_size=data.vocab_size, block_size=data.block_size)
        c = SimpleNamespace(**config)
    L, V = c.block_size, c.vocab_size
    if c.variant:
        return print(json.dumps(measure(c, config, device, L)))

    with torch.device('meta'):
        method = build(config)
    flops = 6 * (method.flops(L) + (L if c.method == 'ar' else L / 2) * c.hidden * V)
    peak, source = peak_flops(device, getattr(torch, c.dtype))
    print(f'{c.method}, {c.num_layers} layers of width {c.hidden}, L = {L}, V = {V:,}, batch {c.batch_size}, {c.dtype}{", compiled" if c.compile else ""}')
    print(f'{flops / L / 1e9:.3g} training GFLOPs per token; peak assumed for MFU: {source}', flush=True)
    ours, full = in_its_own_process(argv, 'ours'), in_its_own_process(argv, 'full')
    print(f'{"":38}{"here":>12}{"full head":>12}{"ratio":>9}')
    for text, key, scale in [('training, tokens/s', 'tokens_per_s', 1), ('training, MFU in %', 'tokens_per_s', 100 * flops / L / peak),
                             ('peak memory in GB: forward, backward', 'gradient_memory', 1e-9),
                             ('                   and AdamW, EMA', 'memory', 1e-9), (f'sampling {c.steps} steps, s/sequence', 'sampling', 1)]:
        if key in ours:
            a, b = ours[key], full.get(key)
            print(f'{text:38}{a * scale:12,.4g}' + (f'{b * scale:12,.4g}{a / b:8.3g}x' if b else f'{"-":>12}'))


if __name__ == '__main__':
    run(main)
