"""
Sawtooth: a toy language of which everything is known (LADD section 5.1, appendix E.1).

A text is L = 128 coin flips whose bias is a triangle wave, k = 2 periods long, shifted by one random number w per text:
    s_l = k ((l / L + w) mod 1) mod 1,     p(x_l = 1 | w) = m + (1 - 2m)(1 - |2 s_l - 1|),     w ~ U[0, 1)     LADD eq. (78), (79)
Given w the tokens are independent; without it each is a fair coin. So all there is to learn is the shift, and a good latent is w.
A mixture over one number can be integrated: the exact p(x_l | visible tokens) is here as a denoiser that fits the samplers.

    python sawtooth.py out/sawtooth_*      the paper's Table 1 and Figure 2 from those checkpoints; a .jsonl among them adds results of old
"""
import functools
import json
import os
import re

import numpy as np
import torch

from lib.noise import Noise

L, K, M = 128, 2, 0.01  # tokens, periods, smallest probability
PERIOD = 1 / K  # shifts that differ by this are the same text distribution


def bias(w):
    """p(x_l = 1 | w): w (...,) -> (..., L)."""
    s = K * ((torch.arange(L, device=w.device) / L + w[..., None]) % 1) % 1
    return M + (1 - 2 * M) * (1 - (2 * s - 1).abs())


class Sawtooth:
    """The data: an infinite stream, a function of seed, step and row; `rows` are the validation texts."""
    vocab_size, block_size, tokenizer, wrap = 2, L, None, False

    def __init__(self, split='train'):
        self.split = split

    def batch(self, seed, step, rows):
        """rows int64 (b,) -> texts (b, L) int64."""
        noise = Noise(seed, step, rows, None)
        return ((noise.uniform('tokens ' + self.split, L) < bias(noise.uniform('shift ' + self.split))).long(),)

    def rows(self, idx):
        return self.batch(0, 0, idx)

    def __len__(self):
        return 2**31

def report(method):
    pass


# ----------------------------------------------------------------------------------------------------------------------------------
# exact answers

class Exact:
    """The Bayes-optimal denoiser: a posterior over `points` shifts in one period, given the visible tokens."""

    def __init__(self, points=512, device='cpu'):
        self.p = bias((torch.arange(points, device=device) + 0.5) / points * PERIOD)  # (P, L)
        self.log_ratio, self.log_p0 = (self.p / (1 - self.p)).log().T, (1 - self.p).log().T  # (L, P)

    def log_likelihood(self, x):
        """log p(visible tokens | shift): x (n, L) with 0, 1 or 2 = [mask] -> (n, P)."""
        return (x == 1).float() @ self.log_ratio + (x != 2).float() @ self.log_p0

    def denoise(self, x_t, where):
        """A drop-in for the networks': logits (where.sum(), 2)."""
        p1 = (self.log_likelihood(x_t).softmax(dim=1) @ self.p)[where]
        return torch.stack((1 - p1, p1), dim=1).log()

    def joint_denoise(self, x_t, z_t, t, where):
        """The same with the shift as the one code, z_t (n, 1) in 0 ... P-1, or P for [mask]: token logits and code logits (n, 1, P)."""
        posterior = self.log_likelihood(x_t)
        known = z_t[:, 0] < len(self.p)
        p1 = torch.where(known[:, None], self.p[z_t[:, 0] % len(self.p)], posterior.softmax(dim=1) @ self.p)[where]
        return torch.stack((1 - p1, p1), dim=1).log(), posterior[:, None]

    def nll(self, x):
        """-log p(x), nats (n,): the least ELBO that any MDLM can have. On average 0.5303 L."""
        return np.log(len(self.p)) - self.log_likelihood(x).logsumexp(dim=1)

    def oracle(self):
        """H(x | w) / L, nats per token: 0.5096."""
        return float(-(torch.special.xlogy(self.p, self.p) + torch.special.xlogy(1 - self.p, 1 - self.p)).mean())


# ----------------------------------------------------------------------------------------------------------------------------------
# the distance: LADD eq. (85) to (88)

@functools.lru_cache(maxsize=4)
def reference(draw, n, directions):
    """Sorted projections (directions, n) of the draw-th reference sample, fp32."""
    x = Sawtooth(f'reference {draw}').rows(torch.arange(n))
    return project(x, directions)


def project(x, directions):
    theta = torch.randn(directions, L, generator=torch.Generator().manual_seed(0))
    theta = theta / theta.norm(dim=1, keepdim=True)
    with torch.autocast('cpu', enabled=False):
        return torch.from_numpy(np.sort((theta @ x.float().T).numpy(), axis=1))


def swd(x, draws=3, directions=1000):
    """Sliced Wasserstein distance of order 1 of x (n, L), raw {0, 1} vectors, to fresh data of the same size; mean over `draws`."""
    px = project(x, directions)
    return float(np.mean([(px - reference(d, len(x), directions)).abs().mean() for d in range(draws)]))


# ----------------------------------------------------------------------------------------------------------------------------------
# python sawtooth.py out/sawtooth_*: what is measured of a trained method, and of the exact denoisers through the same samplers

PAPER = {'oracle': 0.5075, 'MDLM': 0.5301, 'Di-LADD joint': 0.5055, 'Di-LADD seq': 0.5067, 'Co-LADD joint': 0.4109, 'Co-LADD seq': 0.2558}
LATENT_STEPS = 32  # DDIM steps of sequential Co-LADD; a single code needs one


def label(config):
    return {'continuous': 'Co-LADD', 'discrete': 'Di-LADD'}[config.latent] if hasattr(config, 'latent') else 'MDLM'


def draw(method, n, steps, strategy='joint', seed=0, batch=128):
    """n texts (n, L) from a trained method."""
    g = torch.Generator(method.head.weight.device).manual_seed(seed)
    how = {} if strategy == 'joint' else dict(strategy='seq', latent_steps=1 if method.discrete else LATENT_STEPS)
    return torch.cat([method.sample(min(batch, n - i), steps, generator=g, **how).cpu() for i in range(0, n, batch)])


def token_losses(method, n, batch=256):
    """Table 1: token loss in nats per token over n fresh texts; for LADD given the clean latent, and given the latent noised at t_z = t_x."""
    device = method.head.weight.device
    x, rows = Sawtooth('table 1').rows(torch.arange(n)).to(device), torch.arange(n, device=device)
    noise = Noise(0, 0, rows, n)
    records = []
    for strategy in method.strategies:
        def nats(i):
            if len(method.strategies) == 1:
                return method.nll(x[i:i + batch], noise[i:i + batch])
            return method.channel_nll(x[i:i + batch], noise[i:i + batch], strategy)[0]
        losses = torch.cat([nats(i) for i in range(0, n, batch)]) / L
        records.append(dict(strategy=strategy, n=n, token_loss=losses.mean().item(), error=(losses.std() / n**0.5).item()))
    return records


def bayes_gap(method, n=2048):
    """KL from Bayes to an MDLM network, nats per masked token, with half of the tokens visible: of data, and of fair coins. -> records

    Likelihood training asks for the first only. The second is what a sampler of two steps shows the network: its first step sees nothing.
    """
    device, exact = method.head.weight.device, Exact()
    noise, records = Noise(0, 0, torch.arange(n), n), []
    for kind, x in ('data', Sawtooth('gap').rows(torch.arange(n))), ('coins', (noise.uniform('coins', L) < 0.5).long()):
        x_t = torch.where(noise.uniform('visible', L) < 0.5, x, 2)
        with torch.autocast('cpu', enabled=False):  # the truth is not to be rounded
            p = exact.denoise(x_t, x_t == 2).log_softmax(dim=-1)
        q = torch.cat([method.denoise(part, part == 2) for part in x_t.to(device).split(128)]).cpu().float().log_softmax(dim=-1)
        wave = {name: (v.exp()[:, 1] - 0.5).abs().mean().item() for name, v in (('network', q), ('bayes', p))}
        records.append(dict(visible=kind, n=n, kl=(p.exp() * (p - q)).sum(dim=-1).mean().item(), **wave))
    return records


def exact_draw(kind, n, steps, seed=0, batch=1024):
    """n texts from a perfect network: 'MDLM', or with the shift as the latent 'joint', 'joint ahead' (latent 1 - t^2) or 'seq'."""
    from ladd import code_step, joint
    from mdlm import alpha, ancestral, time_grid
    exact, g, alphas = Exact(), torch.Generator().manual_seed(seed), alpha(time_grid(steps))
    P, texts = len(exact.p), []
    for i in range(0, n, batch):
        x = torch.full((min(batch, n - i), L), 2)
        if kind == 'MDLM':
            texts.append(ancestral(exact.denoise, x, alphas, 2, generator=g))
            continue
        # sequential: the shift is drawn first, uniformly; then the same sampler has nothing left to do in the latent channel
        z = torch.randint(P, (len(x), 1), generator=g) if kind == 'seq' else torch.full((len(x), 1), P)
        schedule = 'polynomial' if kind == 'joint ahead' else 'linear'
        texts.append(joint(exact.joint_denoise, x, z, steps, alphas, lambda z, p, t, s: code_step(z, p, t, s, schedule, g), 2, generator=g))
    return torch.cat(texts)


def exact_records(n, steps):
    kinds = ('MDLM', 'joint', 'joint ahead', 'seq')
    floor = [dict(name='data', n=n, swd=swd(Sawtooth('fresh').rows(torch.arange(n))))]
    return floor + [dict(name='exact', strategy=kind, steps=T, n=n, swd=swd(exact_draw(kind, n, T))) for kind in kinds for T in steps]


def told_apart(records):
    """Where runs of one method differ in more than the seed (out/A, out/A_seed1), the folder becomes part of the name."""
    def folder(r):
        return re.sub(r'_seed\d+$', '', r['out_dir'])
    several = [name for name, _ in {(r['name'], folder(r)) for r in records}]
    return [dict(r, name=f'{r["name"]} ({folder(r)})') if several.count(r['name']) > 1 else r for r in records]


def curves(records):
    """Records -> {curve: {steps: [SWD of each run]}}, steps rising."""
    found = {}
    for r in sorted((r for r in records if 'steps' in r), key=lambda r: r['steps']):
        name = r['name'] if r['name'].startswith('MDLM') else f'{r["name"]} {r["strategy"]}'
        found.setdefault(name, {}).setdefault(r['steps'], []).append(r['swd'])
    return found


def print_tables(records):
    losses, gaps = {}, {}
    for r in records:
        if 'token_loss' in r:
            losses.setdefault((r['name'], r['strategy']), []).append(r['token_loss'])
        if 'kl' in r:
            gaps.setdefault((r['name'], r['visible']), []).append([r['kl'], r['network'], r['bayes']])
    print('\ntoken loss, nats per token (LADD table 1)              ours    exact    paper')
    print(f'  {"oracle: the shift is known":50s}      -   {Exact().oracle():.4f}   {PAPER["oracle"]:.4f}')
    for (name, strategy), values in losses.items():
        method = name.split(' (')[0]
        what, key, best = f'{name}, {"clean latent" if strategy == "seq" else "latent at t_z = t_x"}', f'{method} {strategy}', '     -'
        if method == 'MDLM':
            what, key, best = name, method, '0.5303'
        print(f'  {what:50s} {np.mean(values):.4f}   {best}   {PAPER[key]:.4f}')
    if gaps:
        print('\nAgainst Bayes, half of the tokens visible                KL      mean |p - 1/2|: network, Bayes')
    for (name, kind), values in gaps.items():
        kl, network, bayes = map(np.mean, zip(*values))
        print(f'  {name + (", of a text" if kind == "data" else ", fair coins"):50s} {kl:.4f}   {network:.3f}, {bayes:.3f}')
    table, floor = curves(records), [r for r in records if r['name'] == 'data']
    steps = sorted({T for curve in table.values() for T in curve})
    print(f'\nSWD from {floor[0]["n"]:,} samples; data against data: {np.mean([r["swd"] for r in floor]):.4f}')
    print(f'  {"token steps":24s}' + ''.join(f'{T:>8d}' for T in steps) + '   runs')
    for name, curve in sorted(table.items(), key=lambda kv: kv[0].startswith('exact')):
        runs = dict.fromkeys(str(len(curve[T])) for T in steps if T in curve)
        print(f'  {name:24s}' + ''.join(f'{np.mean(curve[T]):8.4f}' if T in curve else '       -' for T in steps) + f'   {", ".join(runs)}')


def figure(records, path):
    """LADD figure 2: SWD against token steps. Lines: trained, mean over seeds; dashes: perfect networks; grey: the floor."""
    from lib.plot import log_scale, plt, save
    colors = {'MDLM': 'C0', 'Di-LADD joint': 'C1', 'Di-LADD seq': 'C2', 'Co-LADD joint': 'C3', 'Co-LADD seq': 'C4',
              'exact MDLM': 'C0', 'exact joint': 'C1', 'exact seq': 'C2', 'exact joint ahead': 'C7'}
    chart = plt.figure(figsize=(7, 4.2))
    for name, curve in curves(records).items():
        style = dict(ls='--', lw=1, alpha=0.7) if name.startswith('exact') else dict(marker='o', ms=4)
        plt.plot(list(curve), [np.mean(v) for v in curve.values()], color=colors.get(name), label=name, **style)
    plt.axhline(np.mean([r['swd'] for r in records if r['name'] == 'data']), color='grey', lw=1, label='data against data')
    plt.xscale('log', base=2)
    plt.gca().xaxis.set_major_formatter('{x:.0f}')
    log_scale(plt.gca().yaxis)
    plt.xlabel('token steps')
    plt.ylabel('sliced Wasserstein distance')
    plt.legend(fontsize=7, ncol=2)
    save(chart, path)


def pictures(panels, path):
    """Samples as images, one text a row, sorted by their most likely shift: coherent texts show diagonal waves. panels: {title: (n, L)}."""
    from lib.plot import plt, save
    exact = Exact()
    chart, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(2.4 * -(-len(panels) // 2), 4.6), squeeze=False)
    for ax in axes.flat:
        ax.axis('off')
    for ax, (title, x) in zip(axes.flat, panels.items()):
        ax.imshow(x[exact.log_likelihood(x).argmax(dim=1).argsort()].numpy(), cmap='Blues', aspect='auto', interpolation='nearest')
        ax.set_title(title, fontsize=8)
    save(chart, path)


defaults = dict(
    num_samples=20480,
    steps='1,2,4,8,16,32',  # token steps
    device='cpu',
    compile=False,          # torch.compile the networks: half the time, once it is done
    save='out/sawtooth',    # -> out/sawtooth.png, out/sawtooth_samples.png; the numbers are kept in each out_dir
)


def main(argv):
    from lib.checkpoint import append, backbones, compile_in_place, fingerprint, load_method, pick_device
    from lib.configurator import UserError, configure, numbers
    from mdlm import MDLM
    from lib.plot import read
    c = configure(defaults, [a for a in argv if a.startswith('-')])
    out_dirs, n = [a for a in argv if not a.startswith('-') and not a.endswith('.png')], c['num_samples']  # out/sawtooth_* finds our pictures, too
    if not out_dirs or n < 1:
        raise UserError('which runs, and how many samples? python sawtooth.py out/sawtooth_* --num_samples=20480')
    steps, device = numbers('steps', c['steps']), pick_device(c['device'])
    os.makedirs(os.path.dirname(c['save']) or '.', exist_ok=True)
    records, panels = [], {}
    for out_dir in out_dirs:
        if out_dir.endswith('.jsonl'):  # results of runs whose checkpoints are gone
            if not os.path.exists(out_dir):
                raise UserError(f'there is no file {out_dir}')
            records += [r for r in read(out_dir, '') if r['n'] == n or 'kl' in r]
            continue
        method, checkpoint = load_method(out_dir, device)
        if checkpoint['config']['dataset'] != 'sawtooth' or not isinstance(method, MDLM):
            raise UserError(f'{out_dir} is {checkpoint["config"]["method"]} on {checkpoint["config"]["dataset"]}; the tables are of mdlm and ladd on sawtooth')
        if c['compile']:
            compile_in_place(backbones(method), device)
        common = dict(name=label(method.config), out_dir=os.path.normpath(out_dir), step=checkpoint['step'], seed=checkpoint['config']['seed'],
                      weights=fingerprint(method))
        # measured once, and kept: sampling is what takes long
        known = [r for r in read(out_dir, 'sawtooth.jsonl') if r.get('weights') == common['weights'] and (r['n'] == n or 'kl' in r)]

        def keep(record):
            known.append({**common, **record})
            print(json.dumps(known[-1]), flush=True)
            append(os.path.join(out_dir, 'sawtooth.jsonl'), known[-1])
        with torch.autocast(device.type, torch.bfloat16, enabled=checkpoint['config']['dtype'] == 'bfloat16'):
            if not any('token_loss' in r for r in known):
                for r in token_losses(method, n):
                    keep(r)
            if len(method.strategies) == 1 and not any('kl' in r for r in known):
                for r in bayes_gap(method):
                    keep(r)
            for strategy in method.strategies:
                for T in steps if strategy == 'joint' else [T for T in steps if T <= 8]:  # seq does not change after that
                    if not any(r.get('steps') == T and r['strategy'] == strategy for r in known):
                        keep(dict(strategy=strategy, steps=T, n=n, swd=swd(draw(method, n, T, strategy))))
                for T in (1, 2):
                    title = f'{common["name"]}{f" {strategy}" * (len(method.strategies) > 1)}, {T} step{"s" * (T > 1)}'
                    if title not in panels:
                        panels[title] = draw(method, 128, T, strategy)
        records += [dict(r, out_dir=common['out_dir']) for r in known]  # it may have been renamed
    # a run may be among the .jsonl, too
    records = told_apart(list({(r['weights'], r.get('strategy'), r.get('steps'), r.get('visible')): r for r in records}.values()))
    records += exact_records(n, sorted({r['steps'] for r in records if 'steps' in r}))
    print_tables(records)
    panels = {'data': Sawtooth('fresh').rows(torch.arange(128)), 'perfect MDLM, 1 step': exact_draw('MDLM', 128, 1), **panels}
    figure(records, c['save'] + '.png')
    pictures(panels, c['save'] + '_samples.png')
    print(f'\nwrote {c["save"]}.png and {c["save"]}_samples.png')


if __name__ == '__main__':
    import sys

    from lib.configurator import run
    run(main)
