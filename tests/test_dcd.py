"""baselines/dcd.py against the laws of small texts, by enumeration; and the commands that call it.

Statistical bounds are 4.5 standard errors, and the seeds are fixed.
"""
import itertools
import json
import os

import numpy as np
import pytest
import torch
from helpers import chi_square, fails, generator, make

import eval as evaluation
import sample
from baselines.dcd import DCD
from sawtooth import Exact, exact_draw

V, L = 2, 3
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))


@torch.no_grad()
def law_of(method, x_t, correction=1.0):
    """Of all texts that x_t (L,) may become: the product of the rule's probabilities, fp64 (texts,)."""
    rule, q = method.rule(x_t.repeat(len(TEXTS), 1), correction), torch.ones(len(TEXTS)).double()
    for l in range(L):
        if x_t[l] == V:
            given = TEXTS.where(torch.arange(L) < l, V)
            p = rule(l, method.ar.logits(given, l)).double().softmax(dim=1)
            q = q * p.gather(1, TEXTS[:, l:l + 1])[:, 0]
    return q * ((x_t == TEXTS) | (x_t == V)).all(dim=1)


class Toy:
    """A random law of all texts."""

    def __init__(self, seed, sharpness):
        noise = torch.randn(V**L, generator=generator(seed)).double()
        self.p = (sharpness * noise).softmax(dim=0)

    def given(self, x_t):
        """x_t (L,) -> p(x | its visible tokens), (texts,)."""
        p = self.p * ((x_t == TEXTS) | (x_t == V)).all(dim=1)
        return p / p.sum()

    def marginals(self, x_t, places):
        """x_t (n, L) -> log p(x_l | visible tokens) (n, V), l = places[i] for row i."""
        rows = [self.given(x) @ (TEXTS[:, [l]] == torch.arange(V)).double() for x, l in zip(x_t, places)]
        return torch.stack(rows).log()

    def method(self):
        """DCD in which all networks are exact, and the states are log-probabilities."""
        method = tiny()
        method.mdlm.head = torch.nn.Identity()

        def states(x_t, causal=False):
            seen = [torch.where(torch.arange(L) < l, x_t, V) if causal else x_t for l in range(L)]
            return torch.stack([self.marginals(seen[l], [l] * len(x_t)) for l in range(L)], dim=1)
        method.states = states
        method.ar.logits = lambda given, l: self.marginals(given, [l] * len(given))
        return method


def tiny(**changes):
    """An MDLM and an AR of random weights."""
    mdlm, ar = (make(name, vocab_size=V, block_size=L, **changes) for name in ('mdlm', 'ar'))
    ar.logits = lambda given, l: ar.head(ar.dit(ar.embed(ar.shifted(given)))[:, l]).detach()
    return DCD(mdlm, ar)


# ------------------------------------------------------------------------------------------------------------
# the rule

@pytest.mark.parametrize('x_t', [[2, 2, 2], [1, 2, 2], [0, 1, 2], [2, 1, 2], [2, 0, 1]], ids=str)
def test_exact_if_no_visible_token_has_two_masked_ones_to_its_left(x_t):
    for seed in range(10):
        toy, x_t = Toy(seed, 2.0), torch.as_tensor(x_t)
        torch.testing.assert_close(law_of(toy.method(), x_t), toy.given(x_t), rtol=0, atol=1e-6)


def projection(p, marginals, rounds=300):
    """The copula p* of pairs of tokens: p (n, V, V) times e^{V_1} e^{V_2}, with those marginals, each (n, V).

    By fitting one after the other, again and again.
    """
    for _ in range(rounds):
        p = p * (marginals[0] / p.sum(dim=2))[:, :, None]
        p = p * (marginals[1] / p.sum(dim=1))[:, None]
    return p


def odds(p):
    return p[:, 0, 0] * p[:, 1, 1] / (p[:, 0, 1] * p[:, 1, 0])


def kl(p, q):
    return (p * (p / q).log()).sum(dim=(1, 2))


def test_not_exact_if_a_visible_token_has_two_masked_ones_to_its_left():
    """But nearer to the truth than independent draws and AR alone, in the mean of texts of 30 laws."""
    p = torch.stack([Toy(seed, 2.0).p for seed in range(30)]).view(-1, V, V, V)
    apart = torch.zeros(3).double()
    for last in range(V):
        rule = [law_of(Toy(seed, 2.0).method(), torch.tensor([2, 2, last])) for seed in range(30)]
        rule = torch.stack(rule).view(-1, V, V, V)[..., last]
        torch.testing.assert_close(rule.sum(dim=(1, 2)), torch.ones(30).double(), rtol=0, atol=1e-6)
        weight, ar = p[..., last].sum(dim=(1, 2)), p.sum(dim=3)
        truth = p[..., last] / weight[:, None, None]
        marginals = truth.sum(dim=2), truth.sum(dim=1)
        independent = marginals[0][:, :, None] * marginals[1][:, None]
        apart += torch.stack([weight @ (q - truth).abs().sum(dim=(1, 2)) for q in (rule, independent, ar)])

        copula = projection(ar, marginals)
        torch.testing.assert_close(copula.sum(dim=2), marginals[0])
        torch.testing.assert_close(copula.sum(dim=1), marginals[1])
        torch.testing.assert_close(odds(copula), odds(ar))
        assert (projection(ar, marginals, rounds=1).sum(dim=2) - marginals[0]).abs().max() > 0.05
        for change in (-0.01, 0.01):  # to another law of these marginals, farther from AR's
            other = copula + change * copula.amin(dim=(1, 2), keepdim=True) * torch.tensor([[1, -1], [-1, 1]])
            assert (kl(other, ar) > kl(copula, ar)).all()
    assert 0.03 < apart[0] / 60 < 0.08 < apart[1] / 60 < 0.13 < apart[2] / 60


def test_without_correction_it_is_ar():
    method = tiny()
    a, b = (m.sample(64, 1, generator=generator(), **options)
            for m, options in ((method, dict(correction=0.0)), (method.ar, {})))
    assert torch.equal(a, b) and len(a.unique(dim=0)) > 4
    law = (-method.ar.nll(TEXTS)).exp().double()
    torch.testing.assert_close(law_of(method, torch.full((L,), V), 0.0), law, rtol=0, atol=1e-6)


def test_an_ar_that_knows_nothing_leaves_mdlm_alone():
    """Uniform in all places, and so is what MDLM sees on the left: independent draws from MDLM."""
    method, x_t = tiny(), torch.tensor([2, 2, 1])
    for p in method.ar.head.parameters():
        torch.nn.init.zeros_(p)
    states = method.states

    def uniform_left(x_t, causal=False):
        return states(x_t) * (not causal)
    torch.nn.init.zeros_(method.mdlm.head.bias)
    method.states = uniform_left
    p = method.mdlm.head(states(x_t[None]))[0].softmax(dim=-1).detach().double()
    expected = p[0][TEXTS[:, 0]] * p[1][TEXTS[:, 1]] * (TEXTS[:, 2] == 1)
    torch.testing.assert_close(law_of(method, x_t), expected, rtol=0, atol=1e-6)


def test_what_mdlm_sees_on_the_left():
    """Causal attention of the same blocks: nothing to the right matters; afterwards all is as before."""
    method = DCD(make('mdlm', num_layers=2), make('ar'))
    x_t = torch.randint(11, (2, 12), generator=generator())
    with torch.no_grad():
        both, left = method.states(x_t), method.states(x_t, causal=True)
        for l in (0, 5, 11):
            changed = x_t.clone()
            changed[:, l] = (x_t[:, l] + 1) % 11
            differs = (method.states(changed, causal=True) != left).any(dim=2)
            assert not differs[:, :l].any() and differs[:, l:].all()
        assert torch.equal(method.states(x_t), both) and not torch.equal(both, left)
        with pytest.raises(IndexError):
            method.states(x_t + 11, causal=True)
        assert torch.equal(method.states(x_t), both)


def test_exact_networks_on_sawtooth():
    """Two steps, of which the first reveals half of the tokens: texts nearly as probable as the data, .5303
    nats per token, and not those of AR alone, which knows nothing of what stands to the right."""
    both, alone = (float(Exact().nll(exact_draw(kind, 512, 2)).mean()) / 128
                   for kind in ('DCD', 'DCD, AR alone'))
    assert 0.515 < both < 0.54 and 0.55 < alone


# ------------------------------------------------------------------------------------------------------------
# samples

@pytest.mark.parametrize('steps', [1, 2, 3])
def test_chunks_have_the_law_of_the_rule(steps):
    """The product over chunks, each of which has its own x_t, sums to 1."""
    method, law = tiny(), torch.ones(V**L).double()
    for i in range(steps):
        start, end = L * i // steps, L * (i + 1) // steps
        for text in range(V**L):
            x_t = TEXTS[text].where(torch.arange(L) < start, V)
            rest = law_of(method, x_t)
            chunk = (TEXTS[:, :end] == TEXTS[text, :end]).all(dim=1)
            law[text] *= rest[chunk].sum()
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)
    x = method.sample(8000, steps, sampler='chunks', generator=generator())
    assert chi_square((x * torch.tensor([4, 2, 1])).sum(dim=1).bincount(minlength=8), law) < 4.5


def test_random_reveals_are_those_of_mdlm():
    """All [mask]s of a step at once have the rule's law; and they vanish as in mdlm.ancestral."""
    method, seen = DCD(make('mdlm'), make('ar')), []
    x = method.sample(2000, 4, generator=generator(), callback=lambda i, x, z: seen.append(x == 10))
    left = torch.stack(seen).double().mean(dim=(1, 2))
    assert (left - torch.tensor([0.75, 0.5, 0.25, 0])).abs().max() < 4.5 * 0.5 / 24000**0.5
    assert all((later <= earlier).all() for earlier, later in zip(seen, seen[1:])) and x.max() < 10


@pytest.mark.parametrize('sampler', DCD.samplers)
def test_prompts_stay_and_every_gap_is_filled(sampler):
    method = DCD(make('mdlm'), make('ar'))
    x = torch.randint(10, (6, 12), generator=generator())
    start = x.masked_fill(torch.rand(6, 12, generator=generator()) < 0.6, method.mask_id)
    start[0] = x[0]
    for steps in (1, 3, 40):
        filled = method.sample(6, steps, sampler=sampler, x=start, generator=generator())
        assert torch.equal(filled[start < 10], x[start < 10]) and filled.max() < 10
    options = {}, dict(temperature=0.3), dict(top_p=0.4), dict(correction=3.0)
    drawn = [method.sample(64, 2, sampler=sampler, generator=generator(), **o) for o in options]
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:])


def test_costs_and_mistakes():
    method = DCD(make('mdlm'), make('ar'))
    once = 12 * 12 * 16 * 16 + 2 * 12 * 12 * 16
    assert method.denoiser_calls(5) == 5 and method.sampling_flops(12, 5) == 5 * 3 * once
    for pair in (('ar', 'mdlm'), ('mdlm', 'mdlm'), ('co', 'ar'), ('ssmd', 'ar')):
        with pytest.raises(ValueError, match='DCD is of an MDLM and an AR'):
            DCD(*map(make, pair))
    for wrong in (dict(correction=-1.0), dict(sampler='ancestral'), dict(eta=0.1)):
        with pytest.raises(ValueError):
            method.sample(2, 2, **wrong)
    with pytest.raises(ValueError, match='steps must be at least 1'):
        method.sample(2, 0, sampler='chunks')


# ------------------------------------------------------------------------------------------------------------
# commands

def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make('mdlm', 'm'), make('ar', 'ar'), make('ar', 'wide', block_size=14), make('co', 'co')
    few = ['--out_dir=m', '--copula=ar', '--num_samples=4', '--device=cpu']
    sample.main([*few, '--steps=2', '--start=ab[MASK:3]c', '--save=x.npy', '--sampler=chunks'])
    x = np.load('x.npy')
    assert x.shape == (4, 12) and (x[:, [0, 1, 5]] == [2, 3, 4]).all() and x.max() < 10
    evaluation.main([*few, '--steps=1,3', '--metrics=gen_ppl,entropy', '--teacher=ar', '--correction=0.5'])
    records = [json.loads(line) for line in open('m/eval.jsonl')]
    assert [(r['method'], r['steps'], r['sampler'], r['correction']) for r in records] == [
        ('dcd', T, 'copula', 0.5) for T in (1, 3)]
    capsys.readouterr()
    for wrong, why in ((['--copula=m'], 'DCD is of an MDLM and an AR'), (['--copula=none'], 'none'),
                       (['--copula=wide'], 'another block_size'), (['--save_hub=hub'], 'weights of its own'),
                       (['--sampler=ancestral'], 'no sampler'), (['--out_dir=co'], 'not of Co-LADD'),
                       (['--correction=-1'], 'correction')):
        assert why in fails(sample, monkeypatch, capsys, *few, *wrong)
    assert 'has no likelihood' in fails(evaluation, monkeypatch, capsys, *few, '--metrics=val_ppl')
    assert not os.path.exists('hub')
