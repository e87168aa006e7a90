"""sawtooth.py against direct formulas, quadrature and enumeration; and the samplers of mdlm.py and ladd.py
with the exact denoiser.

Statistical bounds are 4.5 standard errors; those of SWD are 4 of the standard deviations of one draw that are
quoted beside each value (200 independent draws of N = 20,480 with 1000 directions). Seeds are fixed.
"""
import functools
import json
import os
import re
import shutil
from math import log

import numpy as np
import pytest
import torch
from helpers import generator, whole

import ladd
import sawtooth
import train
from examples.calibration import Circle
from ladd import LADD, abar, code_step, ddim_step, joint
from lib import plot
from lib.configurator import UserError
from lib.files import append
from mdlm import MDLM, Config, alpha, ancestral, first_hitting, time_grid
from methods import open_published
from sample import generate
from sawtooth import Exact, Sawtooth, bias, gap_to_exact, swd

N = 20480
MASK = 2


def data(n, name='train', seed=0, step=0):
    return Sawtooth(name).batch(seed, step, torch.arange(n))[0]


def all_masked(n=N):
    return torch.full((n, 128), MASK)


def numpy_bias(w):
    """LADD eq. (78), (79) in numpy, position by position: w (W,) -> (W, 128)."""
    p = np.zeros((len(w), 128))
    for l in range(128):
        s = (2 * ((l / 128 + w) % 1)) % 1
        p[:, l] = np.where(s < 0.5, 0.01 + 0.98 * 2 * s, 0.01 + 0.98 * 2 * (1 - s))
    return p


@functools.cache
def fine_grid():
    """20,000 shifts over the whole circle, in double precision."""
    return numpy_bias((np.arange(20000) + 0.5) / 20000)


# ------------------------------------------------------------------------------------------------------------
# the data

def test_bias_is_its_formula():
    w = np.random.default_rng(0).random(500)
    np.testing.assert_allclose(bias(torch.tensor(w)).numpy(), numpy_bias(w), atol=1e-9)
    assert bias(torch.rand(3, 2)).shape == (3, 2, 128)


def test_tokens_are_flips_of_a_shifted_wave():
    """Marginals are fair; positions half a period apart disagree, a whole period apart they agree, as
    E[p_l p_m] over the shift says."""
    x, p = data(N).double(), fine_grid()
    assert set(x.unique().tolist()) == {0, 1}
    assert ((x.mean(0) - 0.5).abs() < 4.5 * 0.5 / N**0.5).all()
    for distance in (1, 16, 32, 64, 127):
        both = float((p[:, 0] * p[:, distance]).mean())
        assert abs(float((x[:, 0] * x[:, distance]).mean()) - both) < 4.5 * (both * (1 - both) / N) ** 0.5
    assert float((p[:, 0] * p[:, 32]).mean()) < 0.2 < 0.3 < float((p[:, 0] * p[:, 64]).mean())


def test_data_does_not_depend_on_how_rows_are_split():
    """And its splits, seeds and steps share no texts."""
    x = data(64, seed=1, step=2)
    for rank in range(4):
        assert torch.equal(Sawtooth().batch(1, 2, torch.arange(rank, 64, 4))[0], x[rank::4])
    others = [data(64, seed=1, step=3), data(64, seed=2, step=2), data(64, 'val', seed=1, step=2)]
    assert all((x != other).float().mean() > 0.4 for other in others)
    val = Sawtooth('val')
    assert torch.equal(val.rows(torch.tensor([5, 3]))[0], val.texts(6)[[5, 3]])


# ------------------------------------------------------------------------------------------------------------
# exact answers

def test_oracle_is_the_entropy_given_the_shift():
    p = fine_grid()
    quadrature = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
    assert Exact().oracle() == pytest.approx(quadrature, abs=5e-5)
    assert round(Exact().oracle(), 4) == 0.5096


def test_nll_agrees_with_a_finer_quadrature():
    x, p = data(100).double().numpy(), fine_grid()
    log_p = x @ np.log(p).T + (1 - x) @ np.log(1 - p).T
    nll = np.log(len(p)) - np.logaddexp.reduce(log_p, axis=1)
    np.testing.assert_allclose(Exact().nll(data(100)).numpy(), nll, atol=0.02)  # of about 68 nats


def test_entropy_of_the_data():
    """H(x) / L = 0.5303, below log 2 and above the oracle."""
    nll = Exact().nll(data(N)).double() / 128
    assert abs(float(nll.mean()) - 0.5303) < 4 * float(nll.std()) / N**0.5 + 1e-4


@pytest.mark.parametrize('visible', [0, 1, 2, 5, 20])
def test_exact_denoiser_is_the_posterior(visible):
    """p(x_l = 1 | visible tokens) by summing over 20,000 shifts, for random sets of visible positions."""
    x_t, p = data(20), fine_grid()
    hidden = torch.rand(20, 128, generator=generator()).argsort(dim=1).argsort(dim=1) >= visible
    x_t[hidden] = MASK
    expected = np.zeros((20, 128))
    for i, row in enumerate(x_t.numpy()):
        weights = np.ones(len(p))
        for l in np.flatnonzero(row != MASK):
            weights *= p[:, l] if row[l] == 1 else 1 - p[:, l]
        expected[i] = weights @ p / weights.sum()
    logits = Exact().denoise(x_t, hidden)
    assert logits.shape == (int(hidden.sum()), 2)
    np.testing.assert_allclose(logits.exp().sum(dim=1).numpy(), 1, atol=1e-5)
    np.testing.assert_allclose(logits.exp()[:, 1].numpy(), expected[hidden.numpy()], atol=2e-3)


def test_predictions_from_evidence_of_any_kind():
    """p(x_l = 1 | evidence) by summing over 20,000 shifts, all of it or all but that at l; positions that are
    masked, visible, nearly certain and doubtful."""
    p, b = fine_grid(), torch.rand(4, 128, generator=generator()).mul(2).sub(1)
    b[:, ::4], b[:, 1::4] = 0, 2 * data(4)[:, 1::4] - 1
    b[:, 2::8] = 0.9999 * (2 * data(4)[:, 2::8] - 1)
    weight, found = (b + 1).double().numpy() / 2, [Exact().predict(b, one_out) for one_out in (False, True)]
    for i, q in enumerate(weight):
        evidence = p * q + (1 - p) * (1 - q)                                           # (shifts, L)
        likelihood = evidence.prod(axis=1, keepdims=True)
        both = (likelihood * p * q / evidence).sum(axis=0) / likelihood.sum()
        rest = likelihood / evidence
        elsewhere = (rest * p).sum(axis=0) / rest.sum(axis=0)
        np.testing.assert_allclose(found[0][i].numpy(), both, atol=2e-3)
        np.testing.assert_allclose(found[1][i].numpy(), elsewhere, atol=2e-3)


def test_predictions_from_tokens_are_the_denoiser():
    """And the evidence at l is left out as if l were masked."""
    exact, x, hidden = Exact(64), data(20), torch.rand(20, 128, generator=generator()) < 0.7
    b = torch.where(hidden, 0.0, 2.0 * x - 1)
    logits = exact.denoise(x.masked_fill(hidden, MASK), hidden)
    torch.testing.assert_close(exact.predict(b)[hidden], logits.exp()[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(exact.predict(b)[~hidden], x[~hidden].float(), atol=1e-5, rtol=0)
    l = int((~hidden[0]).nonzero()[0])
    without = b.clone()
    without[:, l] = 0
    torch.testing.assert_close(exact.predict(b, True)[:, l], exact.predict(without)[:, l], atol=1e-5, rtol=0)


def test_exact_joint_denoiser():
    """A known shift makes the tokens independent flips; an unknown one leaves the denoiser above, and its
    posterior as code logits."""
    exact, x_t = Exact(64), data(10)
    x_t[:, 20:] = MASK
    where, z = x_t == MASK, torch.tensor([[3], [64]]).repeat(5, 1)
    tokens, codes = exact.joint_denoise(x_t, z, None, where)
    p1 = torch.zeros(10, 128)
    p1[where] = tokens.exp()[:, 1]
    torch.testing.assert_close(p1[0, 20:], exact.p[3, 20:])
    unknown = exact.denoise(x_t, where).exp()[:, 1].view(10, 108)[1::2].flatten()
    torch.testing.assert_close(p1[1::2][where[1::2]], unknown)
    visible = x_t[:, :20].double()
    log_likelihood = torch.stack([(visible * p.log() + (1 - visible) * (1 - p).log()).sum(dim=1)
                                  for p in exact.p[:, :20].double()], dim=1)
    torch.testing.assert_close(codes[:, 0].softmax(dim=1).double(), log_likelihood.softmax(dim=1),
                               rtol=1e-3, atol=1e-6)


def test_elbo_of_the_exact_denoiser_is_the_entropy():
    """MDLM's estimator with the exact denoiser in place of its network: the bound is tight."""
    exact = Exact(128)
    model = MDLM(Config(2, 128, hidden=8, num_layers=1, num_heads=2, cond_dim=8))
    model.embed, model.dit = torch.nn.Identity(), torch.nn.Identity()

    def masked_nll(x_t, x, mask):
        nats = torch.zeros(x.shape)
        nats[mask] = -exact.denoise(x_t, mask).gather(1, x[mask][:, None])[:, 0]
        return nats.sum(dim=1)
    model.masked_nll = masked_nll
    x = data(N)
    nats, entropy = model.nll(x, whole(N)).double() / 128, exact.nll(x).double() / 128
    error = float((nats - entropy).std()) / N**0.5
    assert abs(float((nats - entropy).mean())) < 4 * error  # on the same texts
    assert error < 0.002
    assert abs(float(nats.mean()) - 0.5303) < 4 * error + 4 * float(entropy.std()) / N**0.5 + 1e-4


# ------------------------------------------------------------------------------------------------------------
# SWD

def test_swd_of_the_reference_to_itself_is_zero():
    assert swd(data(500, 'reference 0', 0, 0), draws=1) == 0


def test_swd_is_the_mean_transport_cost_over_directions():
    """Against a loop: unit directions, sorted projections, mean absolute difference; the order of the texts
    does not matter."""
    x, y = data(300, 'a'), data(300, 'reference 0')
    theta = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)).double().numpy()
    costs = []
    for direction in theta:
        direction = direction / np.sqrt((direction**2).sum())
        costs.append(np.abs(np.sort(x.numpy() @ direction) - np.sort(y.numpy() @ direction)).mean())
    assert swd(x, draws=1, directions=50) == pytest.approx(np.mean(costs), rel=1e-4)
    assert swd(x.flip(0), draws=1, directions=50) == pytest.approx(swd(x, draws=1, directions=50), rel=1e-6)


def test_swd_floor():
    assert abs(swd(data(N, 'fresh'), draws=1) - 0.0061) < 4 * 0.0004


# ------------------------------------------------------------------------------------------------------------
# exact denoisers in our samplers

@pytest.mark.parametrize('steps, mean, sd', [(1, 0.0496, 0.0011), (2, 0.0335, 0.0007), (4, 0.0189, 0.0004),
                                             (8, 0.0107, 0.0002)])
def test_exact_mdlm(steps, mean, sd):
    x = ancestral(Exact(128).denoise, all_masked(), alpha(time_grid(steps)), MASK, generator=generator())
    assert abs(swd(x, draws=1) - mean) < 4 * sd


def test_latents_of_texts_give_texts_in_one_step():
    """`--latent=data` of an exact LADD whose latent is the shift, a point on a circle: SWD at the floor."""
    exact, x = Circle(1), data(N, 'texts')
    model = LADD(ladd.Config(vocab_size=2, block_size=128, hidden=2, num_layers=1, num_heads=1, cond_dim=2,
                             num_latents=1, latent_dim=2, unit_norm=False))

    def hidden_states(x_t, z_0, t):
        p = exact.p[(z_0[:, 0] @ exact.z.T).argmax(dim=1)]
        return torch.stack((1 - p, p), dim=2).log().float(), None
    model.hidden_states, model.encode = hidden_states, lambda x, **_: exact.latents_of(x)
    torch.nn.init.eye_(model.head.weight)
    samples = generate(model, N, 1, 1024, seed=0, z_0=model.latents_of(x), strategy='seq', latent='data')
    assert abs(swd(samples, draws=1) - 0.0061) < 4 * 0.0004 and not torch.equal(samples, x)


@pytest.mark.parametrize('steps, mean, sd', [(1, 0.0496, 0.0010), (2, 0.0358, 0.0008), (4, 0.0201, 0.0005)])
def test_exact_joint_ladd(steps, mean, sd):
    """The code is the shift itself. It is no better than exact MDLM: of two steps, the first flips half of
    the tokens blindly either way."""
    g = generator()
    x = joint(Exact(128).joint_denoise, all_masked(), torch.full((N, 1), 128), steps, alpha(time_grid(steps)),
              lambda z, logits, t, s: code_step(z, logits, t, s, generator=g), MASK, generator=g)
    assert abs(swd(x, draws=1) - mean) < 4 * sd


def test_exact_co_ladd_with_a_latent_for_each_token():
    """CCDD-like: 128 latents, all of which are the shift, a place on a circle. Two steps are no better."""
    exact, g, places = Exact(64), generator(), torch.arange(64) * torch.pi / 32
    circle = torch.stack((places.cos(), places.sin()), dim=1)

    def denoise(x, z, t, where):
        a = abar(t, 'vp_linear').float()
        evidence = a / (1 - a**2) * z.sum(dim=1) @ circle.T
        posterior = (exact.log_likelihood(x) + evidence).softmax(dim=1)
        p1 = (posterior @ exact.p)[where]
        return torch.stack((1 - p1, p1), dim=1).log(), (posterior @ circle)[:, None].expand(z.shape)
    x = joint(denoise, all_masked(), torch.randn(N, 128, 2, generator=g), 2, alpha(time_grid(2)),
              lambda z, z_0, t, s: ddim_step(z, z_0, t, s, 'vp_linear').float(), MASK, generator=g)
    assert abs(swd(x, draws=1) - 0.0354) < 4 * 0.0008


def test_a_kind_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match='no exact Di-LADD; there are: MDLM; joint; .*; DCD, AR alone'):
        sawtooth.exact_draw('Di-LADD', 1, 1)


def test_exact_sequential_ladd_needs_one_step():
    z = torch.randint(512, (N, 1), generator=generator())
    x = joint(Exact().joint_denoise, all_masked(), z, 1, alpha(time_grid(1)), lambda z, logits, t, s: z, MASK,
              generator=generator())
    assert abs(swd(x, draws=1) - 0.0061) < 4 * 0.0004


def exact_ladd(points):
    """Di-LADD with the exact denoiser, whose one code is a shift: of a text, the likeliest."""
    exact = Exact(points)
    keys = dict(vocab_size=2, block_size=128, hidden=2, num_layers=1, num_heads=1, cond_dim=2)
    model = LADD(LADD.Config(**keys, latent='discrete', latent_schedule='linear', codebook_size=points))

    def hidden_states(x_t, z_t, t):
        logits, _ = exact.joint_denoise(x_t, z_t, t, torch.ones_like(x_t, dtype=torch.bool))
        return logits.view(*x_t.shape, 2), None
    model.channel.seen, model.hidden_states = lambda z: z, hidden_states
    model.latents_of = lambda x: exact.log_likelihood(x).argmax(dim=1, keepdim=True)
    torch.nn.init.eye_(model.head.weight)
    return model


def test_exact_ladd_given_the_latents_of_texts_needs_one_step():
    model, n = exact_ladd(128), N // 5
    x = model.sample(n, 1, 'seq', z_0=model.latents_of(data(n)), generator=generator())
    assert abs(swd(x, draws=1) / 5**0.5 - 0.0061) < 4 * 0.0004  # the floor is in proportion to n^-1/2


def test_exact_ladd_without_its_latent_is_mdlm():
    x = exact_ladd(64).sample(16, 4, 'seq', latent='none', generator=generator())
    assert torch.equal(x, ancestral(Exact(64).denoise, all_masked(16), alpha(time_grid(4)), MASK,
                                    generator=generator()))


def test_first_hitting_equals_ancestral_in_law():
    """With the exact denoiser it samples the data, in 128 calls: SWD at the floor, texts as probable as the
    data's; so does ancestral in many steps.

    The floor grows as N^-1/2: at N = 2,560 it is .0173 +- .0011. After 256 steps, ancestral's texts are still
    1e-3 nats per token less probable.
    """
    n, exact, calls = 2560, Exact(64), []

    def denoise(x_t, where):
        calls.append(1)
        return exact.denoise(x_t, where)
    hitting = first_hitting(denoise, all_masked(n), MASK, generator=generator())
    many = ancestral(exact.denoise, all_masked(n), alpha(time_grid(256)), MASK, generator=generator())
    assert len(calls) == 128
    for x, remaining in ((hitting, 0), (many, 1e-3)):
        assert abs(swd(x, draws=1) - 0.0173) < 4 * 0.0011
        nll = exact.nll(x).double() / 128
        assert abs(float(nll.mean()) - 0.5303) < 4.5 * float(nll.std()) / n**0.5 + remaining


class Network(torch.nn.Linear):
    """Whatever denoises, as a module."""

    def __init__(self, denoise):
        super().__init__(1, 1)
        self.denoise = denoise


def test_the_gap_to_the_exact_denoiser():
    """None for the exact one itself. A network that always says 1/2 misses log 2 - H, and has flat waves."""
    for r in gap_to_exact(Network(Exact().denoise), 128):
        assert abs(r['kl']) < 1e-6 and r['network'] == pytest.approx(r['bayes'], rel=1e-5)
    coin = gap_to_exact(Network(lambda x_t, where: torch.zeros(int(where.sum()), 2)), 128)
    assert [r['visible'] for r in coin] == ['data', 'coins'] and all(r['network'] == 0 for r in coin)
    for r in coin:  # KL(p || 1/2) for a |p - 1/2| that varies is at least that of its mean (Jensen)
        d = r['bayes']
        assert log(2) > r['kl'] >= log(2) + (0.5 + d) * log(0.5 + d) + (0.5 - d) * log(0.5 - d) > 0.05


# ------------------------------------------------------------------------------------------------------------
# the command line

def table(capsys):
    """The SWD table that sawtooth.py has printed -> {curve: its cells}."""
    _, *lines = capsys.readouterr().out.split('token steps')[1].splitlines()
    rows = [re.split(r' {2,}', line.strip()) for line in lines if line]
    return {name: cells for name, *cells in rows}


def swd_of(records, steps):
    return [r['swd'] for r in records if r.get('steps') == steps]


def test_the_figure_tells_how_many_seeds(monkeypatch):
    """Mean and range of those; the exact curves and the floor have none."""
    records = [dict(name='MDLM', strategy='joint', steps=T, swd=d)
               for T, d in ((1, .2), (1, .4), (1, .3), (2, .1))]
    records += [dict(name='exact', strategy='MDLM', steps=1, swd=.3), dict(name='data', swd=.01)]
    charts = []
    monkeypatch.setattr(plot, 'save', lambda chart, path: charts.append(chart))
    sawtooth.figure(records, 'x.png')
    ax, = charts[0].axes
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(labels) == ['MDLM (1 or 3 seeds)', 'data against data', 'exact MDLM']
    (line, _, (bars,)), *_ = ax.containers
    np.testing.assert_allclose(line.get_ydata(), [.3, .1])
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [.2, .4])


TINY = ['--dataset=sawtooth', '--hidden=8', '--num_layers=1', '--num_heads=1', '--cond_dim=4',
        '--max_iters=3', '--batch_size=4', '--eval_seqs=4']
FEW = ['--num_samples=256', '--steps=1,2']


def test_the_weights_that_come_with_it():
    """assets/sawtooth_co_ladd: in one step, as near to the data as fresh texts are, where MDLM is not.

    The means and deviations of 512 texts are those of exact draws.
    """
    method, config = open_published(os.path.join(plot.ASSETS, 'sawtooth_co_ladd'), 'cpu')
    assert (config['dataset'], method.name) == ('sawtooth', 'Co-LADD')
    x = sawtooth.draw(method, 512, 1, 'seq')
    floor = [swd(sawtooth.exact_draw('seq', 512, 1, seed), draws=1) for seed in range(4)]
    mdlm = swd(sawtooth.exact_draw('MDLM', 512, 1), draws=1)
    assert swd(x, draws=1) < (np.mean(floor) + mdlm) / 2


def test_tables_and_figures_from_checkpoints(tmp_path, monkeypatch, capsys):
    """Two runs -> both tables, both pictures, results kept and not measured again; a .jsonl stands for a run
    that is gone."""
    monkeypatch.chdir(tmp_path)
    train.main(['--method=mdlm', '--out_dir=out/m', *TINY])
    train.main(['--method=ladd', '--latent=discrete', '--latent_schedule=linear', '--codebook_size=7',
                '--encoder_layers=1', '--stage1_iters=2', '--vq_start=1', '--out_dir=out/d', *TINY])
    # train.py reports, too, behind a bar of its own; a run that is called again has nothing to report
    shown = capsys.readouterr()
    assert re.findall('sampling 4,096 texts each: 100%', shown.err)
    assert shown.out.count('token loss, nats per token') == shown.out.count('for the draw; token steps') == 2
    train.main(['--method=mdlm', '--out_dir=out/m', *TINY])
    assert 'token loss' not in capsys.readouterr().out
    for _ in range(2):
        sawtooth.main(['out/m', 'out/d', *FEW, '--save=out/fig'])
        out = capsys.readouterr().out
        for name in ('Di-LADD, clean latent', 'Di-LADD joint', 'exact joint ahead', 'data against data'):
            assert name in out
    assert len(open('out/m/sawtooth.jsonl').readlines()) == 5
    assert len(open('out/d/sawtooth.jsonl').readlines()) == 6
    assert os.path.exists('out/fig.png') and os.path.exists('out/fig_samples.png')
    sawtooth.main(['out/m', 'out/m/sawtooth.jsonl', *FEW, '--save=out/fig'])
    assert table(capsys)['MDLM'][2:] == ['1']  # one run, named twice

    # other weights: what was kept is not theirs
    train.main(['--method=mdlm', '--out_dir=out/m', '--init_from=scratch', '--seed=1', *TINY])
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: compiled.append(self))
    sawtooth.main(['out/m', 'out/d/sawtooth.jsonl', '--num_samples=256', '--steps=1', '--save=out/fig',
                   '--compile'])
    assert [type(network).__name__ for network in compiled] == ['DiT']
    assert 'Di-LADD seq' in capsys.readouterr().out
    kept = [json.loads(line) for line in open('out/m/sawtooth.jsonl')]
    assert len(kept) == 5 + 4
    sawtooth.main(['out/m/sawtooth.jsonl', '--num_samples=256', '--steps=1', '--save=out/new/fig'])
    one, two = swd_of(kept, 1), swd_of(kept, 2)
    # means, and of how many runs
    assert table(capsys)['MDLM'] == [f'{sum(one) / 2:.4f}', f'{two[0]:.4f}', '2, 1']

    os.rename('out/m', 'out/deeper')  # a folder that differs in more than _seed1: another curve
    old = next(r for r in kept if 'swd' in r) | {'out_dir': 'out/m_seed1', 'weights': 'others'}
    with open('out/old.jsonl', 'w') as f:
        f.write(json.dumps(old) + '\n')
    sawtooth.main(['out/deeper', 'out/old.jsonl', '--num_samples=256', '--steps=1', '--save=out/fig'])
    assert {'MDLM (out/deeper)', 'MDLM (out/m)'} <= set(table(capsys))


def test_runs_without_such_tables(tmp_path, monkeypatch, capsys):
    """These tables are not the AR's, and a mistake writes nothing."""
    monkeypatch.chdir(tmp_path)
    train.main(['--method=ar', '--out_dir=out/ar', *TINY])
    assert 'nats per token (LADD' not in capsys.readouterr().out
    train.main(['--method=mdlm', '--out_dir=out/m', *TINY])
    before = sorted(os.listdir('out/m'))
    shutil.copy(os.path.join(os.path.dirname(sawtooth.__file__), 'assets', 'arxiv.jsonl'), 'arxiv.jsonl')
    for bad in ([], ['out/none'], ['out/m', '--steps=one'], ['out/m', '--num_samples=0'], ['gone.jsonl'],
                ['out/ar'], ['arxiv.jsonl']):
        with pytest.raises(UserError):
            sawtooth.main(bad)
    assert sorted(os.listdir('out/m')) == before and sorted(os.listdir('out')) == ['ar', 'm']


GOOD = dict(name='Di-LADD', out_dir='out/a', weights='x', strategy='seq', steps=1, n=256, swd=0.1)


@pytest.mark.parametrize('changes', [
    {'name': 'AR'}, {'name': None}, {'strategy': None}, {'strategy': 'both'}, {'swd': 'low'}, {'swd': None},
    {'steps': [1]}, {'n': None}, {'weights': None}, {'weights': []}, {'out_dir': 3},
    {'name': 'MDLM'}, {'swd': None, 'kl': 0.1, 'visible': 'data'}, {'name': ['Di-LADD']}])
def test_results_of_somebody_else(changes, tmp_path):
    path = str(tmp_path / 'a.jsonl')
    append(path, GOOD)
    assert sawtooth.read_results(path, 256) == [GOOD] and sawtooth.read_results(path, 128) == []
    append(path, {k: v for k, v in {**GOOD, **changes}.items() if v is not None})
    with pytest.raises(UserError, match='line 2 is no result of '):
        sawtooth.read_results(path, 256)


def test_the_results_in_assets_are_ours():
    path = os.path.join(os.path.dirname(sawtooth.__file__), 'assets', 'sawtooth.jsonl')
    assert len(sawtooth.read_results(path, 20480)) == 83
