"""
How fast, how large: training and sampling of a config on this machine, and what the economical vocabulary head is worth.

    python bench.py config/NAME.py [--key=value ...]         keys: those of train.py and the ones below
    python bench.py config/owt_mdlm.py --vocab_size=151669 --batch_size=32                   random tokens: no data set needed
    python bench.py config/owt_di_ladd.py --vocab_size=151669 --batch_size=32 --stored_latents=True --stage1_iters=0     the second stage

Everything is measured several times, each time in a process of its own: compiled (if the config says so), eager, and in the straightforward
way, where training takes F.cross_entropy of (B, L, V) logits and MDLM's sampling draws all positions by fp64 Gumbel noise over V + 1
outcomes. Texts are random tokens, stored latents random vectors; a frozen encoder runs as in training, from the hub or its folder.

Training FLOPs per sequence = 6 * (layers * (12 L d^2 + 2 L^2 d) + rows * d * V): two per multiply-add, backward costs twice forward;
rows = L / 2, the positions that MDLM and LADD mask on average (AR, LDLM: L). LDLM has its autoencoder besides, and the forward pass of
self-conditioning. It is the useful work, the same number for all ways; left out are embeddings, AdaLN, and other encoders. MFU divides it
by the peak that is printed.
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

from baselines import ar
import ldlm
import mdlm
from lib.checkpoint import backbones, build, compile_in_place, device_name, pick_device
from lib.configurator import UserError, configure, run
from lib.tokens import open_data
from lib.noise import Noise
from train import check, defaults

defaults = dict(
    defaults,
    vocab_size=0,              # 0: the data set's; otherwise random tokens
    iters=5,                   # training steps that are timed; the median counts
    steps=64,                  # of the sampler
    num_samples=2,             # sequences sampled at once; 0: no sampling
    variant='',                # (what a process of its own measures: compiled | eager | full)
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


def training_flops(method):
    """Useful FLOPs per sequence: see above."""
    c = method.config
    L, V = c.block_size, c.vocab_size
    if isinstance(method, ldlm.LDLM):
        autoencoder = sum(m.flops(L) for m in method.modules() if isinstance(m, ldlm.Transformer))
        return 6 * (method.flops(L) + autoencoder + L * c.latent_dim * V) + 2 * method.flops(L) * (c.self_conditioning > 0)
    return 6 * (method.flops(L) + (L if isinstance(method, ar.AR) else L / 2) * c.hidden * V)


def measure(c, config, device):
    """One variant -> dict of numbers."""
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision('high')
    method, L = build(config).to(device).train(), c.block_size
    if c.variant == 'full':
        ar.head_cross_entropy = ldlm.head_cross_entropy = full_cross_entropy
        if isinstance(method, mdlm.MDLM):
            method.token_loss = MethodType(full_token_loss, method)
    params = list(method.parameters())
    if c.variant == 'compiled':
        compile_in_place(backbones(method) if device.type == 'cpu' else [method], device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16')
    accumulate = c.batch_size // (c.micro_batch or c.batch_size)
    rows = torch.arange(c.batch_size, device=device)

    def texts(n):
        x = torch.randint(c.vocab_size, (n, L), device=device)
        return (x, torch.randn(n, c.num_latents, c.latent_dim, device=device)) if getattr(c, 'stored_latents', False) else (x,)
    batch = texts(c.batch_size)

    def gradient(step):
        noise = Noise(c.seed, step, rows, c.batch_size)
        if hasattr(method, 'begin_step'):
            with autocast:
                method.begin_step(step, texts, noise)
        for i in range(accumulate):
            x, *z_0 = (part[i::accumulate] for part in batch)
            with autocast:
                loss, _ = method(x, noise[i::accumulate], *z_0)
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
    if n and c.variant != 'full':
        if c.variant == 'compiled' and device.type != 'cpu':
            compile_in_place(backbones(method), device)
        for strategy in method.strategies:
            how = {'strategy': strategy} if len(method.strategies) > 1 else {}
            with autocast:
                method.sample(n, c.steps, **how)  # a warm-up: the number of texts in a call changes from step to step
                result[f'sampling {strategy}'] = seconds(lambda: method.sample(n, c.steps, **how), device) / n
    elif n and type(method) is mdlm.MDLM:
        alphas = mdlm.alpha(mdlm.time_grid(c.steps, device), c.schedule)
        part = min(4, c.steps)
        with autocast:
            masked = torch.full((n, L), method.mask_id, device=device)
            result['sampling joint'] = seconds(lambda: full_sample(method, masked, alphas, part), device) / n * c.steps / part
    return result


def in_its_own_process(argv, variant):
    """measure() where nothing else has been allocated before -> its dict; an empty one if it failed, for want of memory, say."""
    done = subprocess.run([sys.executable, __file__, *argv, f'--variant={variant}'], stdout=subprocess.PIPE, text=True)
    return {} if done.returncode else json.loads(done.stdout)


def cell(value):
    return f'{"-":>12}' if value is None else f'{value:12,.0f}' if value >= 1000 else f'{value:12.4g}'


def main(argv):
    config = configure(defaults, argv)
    c = SimpleNamespace(**config)
    check(c, 1)
    if c.method == 'ldlm' and c.stage != 'joint':
        raise UserError('bench.py counts the FLOPs of LDLM for --stage=joint')
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
    if c.variant:
        return print(json.dumps(measure(c, config, device)))

    L = c.block_size
    with torch.device('meta'):
        flops = training_flops(build(config))
    peak, source = peak_flops(device, getattr(torch, c.dtype))
    print(f'{c.method}, {c.num_layers} layers of width {c.hidden}, L = {L}, V = {c.vocab_size:,}, batch {c.batch_size}, {c.dtype}')
    print(f'{flops / L / 1e9:.3g} training GFLOPs per token; peak assumed for MFU: {source}', flush=True)
    results = {variant: in_its_own_process(argv, variant) for variant in [*['compiled'] * c.compile, 'eager', 'full']}
    if not any(results.values()):
        raise UserError('the measurement failed for the reason above')
    print(f'{"":44}' + ''.join(f'{"full head" if name == "full" else name:>12}' for name in results) + f'{"ratio":>10}')
    sampling = {f'sampling {s}': f'sampling {c.steps} steps, s/sequence' + f', {s}' * ('sampling seq' in results['eager']) for s in ('joint', 'seq')}
    for text, key, scale in [('training, tokens/s', 'tokens_per_s', 1), ('training, MFU in %', 'tokens_per_s', 100 * flops / L / peak),
                             ('peak memory in GB: forward, backward', 'gradient_memory', 1e-9), ('                   and AdamW, EMA', 'memory', 1e-9),
                             *((text, key, 1) for key, text in sampling.items())]:
        values = [scale * result[key] if key in result else None for result in results.values()]
        there = [v for v in values if v is not None]
        if there:
            print(f'{text:44}' + ''.join(map(cell, values)) + f'{there[0] / there[-1]:9.3g}x' * (len(there) > 1))


if __name__ == '__main__':
    run(main)
