"""The protocol (lib/method.py), for every method, and the keys: each shows an effect or is refused."""
import copy
import functools
import glob
import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import CHARS, TINY, TINY_METHODS, L, generator, make, scrambled, spy, whole
from torch._dynamo.utils import counters

import ldlm
import sample
import train
from ldlm import LDLM
from lib.configurator import configure, defaults_of, idle, method_keys
from lib.encoders import RunEncoder
from lib.method import Method
from methods import METHODS
from model import DiT

ROOT = os.path.dirname(train.__file__)
CONFIGS = sorted(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, 'config', '*.py')))
V = len(CHARS) + 1
FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)
CHOICES = [(name, strategy, sampler) for name, method in ((name, make(name)) for name in TINY_METHODS)
           for strategy, sampler in itertools.product(method.strategies, method.samplers)
           if (method.name, strategy, sampler) not in {('Co-LADD', 'joint', 'first_hitting'),
                                                       ('Di-LADD', 'joint', 'first_hitting')}]


def lines(n, step=0, length=L):
    """Texts (n, length): straight lines modulo V, each with a start and a slope of its own."""
    u = whole(n, seed=1, step=step).uniform('lines', 2)
    return (u[:, :1] * V + u[:, 1:] * 4 * torch.arange(length)).long() % V


# ------------------------------------------------------------------------------------------------------------
# sampling from Python: a mistake is an error, and never samples of another kind

@pytest.mark.parametrize('name', TINY_METHODS)
@pytest.mark.parametrize('wrong', [
    dict(strategy='sequential'), dict(sampler='remmdm'), dict(eta=5), dict(eta=0.5), dict(latent_steps=0),
    dict(strategy='seq', latent_steps=0), dict(strategy='seq', latent_steps=-1),
    dict(strategy='joint', latent_steps=4), dict(temperature=-1), dict(temperature=math.nan), dict(top_p=0),
    dict(top_p=1.5), dict(sampler='remdm', eta=5), dict(sampler='remdm', eta=-0.1),
    dict(sampler='ddim', eta=0.5), dict(colour='blue'), dict(latent='nothing'), dict(latent='data'),
    dict(strategy='seq', latent='data'), dict(strategy='seq', latent='none', latent_steps=3)], ids=str)
def test_a_mistake_draws_no_sample(name, wrong):
    method = make(name)

    def called(*args):
        raise AssertionError('a network was called')
    for network in method.backbones():
        network.register_forward_pre_hook(called)
    with pytest.raises(ValueError, match='|'.join(wrong)):
        method.sample(4, 1, **wrong)


@pytest.mark.parametrize('name, strategy, sampler', CHOICES)
def test_steps_are_at_least_one_where_they_matter(name, strategy, sampler):
    """Where they do not, any number gives the same samples."""
    method = make(name)

    def sample(steps):
        return method.sample(4, steps, strategy, sampler, generator=generator())
    calls = [method.denoiser_calls(steps, strategy=strategy, sampler=sampler) for steps in (1, 5)]
    if calls == [1, 5]:
        for steps in (0, -1):
            with pytest.raises(ValueError, match=f'steps must be at least 1, not {steps}'):
                sample(steps)
    else:
        assert calls == ([None, None] if name == 'ar' or sampler == 'speculative' else [L, L])
        assert torch.equal(sample(1), sample(5)) and sample(1).max() < V


@pytest.mark.parametrize('name, strategy, sampler', CHOICES)
def test_options_are_complete_and_each_has_an_effect(name, strategy, sampler):
    """With all defaults spelled out the samples are the same; with another value of any option, others.

    (That of `latent`: see test_ladd.py, test_ldlm.py.)
    """
    method = make(name)
    options = method.sampling_options(strategy, sampler)
    assert (options['strategy'], options['sampler']) == (strategy, sampler)
    others = {'temperature': 0.3, 'top_p': 0.4, 'eta': 0.05, 'latent_steps': 3, 'kappa': 0.3,
              'tail': 'greedy', 'hint': 'hard', 'verifications': 3}

    def sample(**options):
        return method.sample(64, 4, **options, generator=generator())
    x = sample(strategy=strategy, sampler=sampler)
    assert x.shape == (64, L) and x.dtype == torch.int64 and 0 <= x.min() and x.max() < V
    assert torch.equal(sample(**options), x)
    for option in options.keys() - {'strategy', 'sampler', 'latent'}:
        assert not torch.equal(sample(**{**options, option: others[option]}), x), option


@pytest.mark.parametrize('name', [name for name in TINY_METHODS if make(name).likelihood])
def test_an_unknown_strategy_has_no_likelihood(name):
    with pytest.raises(ValueError, match="no strategy 'sequential'"):
        make(name).nll_parts(lines(4), whole(4), 'sequential')


@pytest.mark.parametrize('name, strategy, sampler', CHOICES)
def test_a_callback_sees_every_step(name, strategy, sampler):
    """(step, x, z): x ends as the result; steps of a latent that comes first are negative, and x waits."""
    method, seen = make(name), []
    x = method.sample(3, 4, strategy, sampler, generator=generator(),
                      callback=lambda i, x, z: seen.append((i, x.clone(), z)))
    steps = 4 if method.denoiser_calls(4, sampler=sampler) == 4 else L
    if sampler == 'speculative':
        steps = len(seen)  # it depends on the samples
    latent_steps = 8 * (strategy == 'seq')
    assert [i for i, _, _ in seen] == list(range(-latent_steps, steps))
    assert all((x_t == method.mask_id).all() for i, x_t, _ in seen if i < 0) and torch.equal(seen[-1][1], x)
    shape = {'co': (3, 2, 4), 'di': (3, 2), 'ldlm': (3, L, 16)}.get(name)
    assert all(shape == (None if z is None else z.shape) for _, _, z in seen)
    if name == 'di':
        assert method.latent_mask_id == 5 and (seen[-1][2] < 5).all()
    if strategy == 'seq':  # the finished latent, from which the same text can be written
        assert all(torch.equal(z, seen[-1][2]) for i, _, z in seen if i >= -1)
        assert len(torch.stack([z for i, _, z in seen if i < 0]).unique(dim=0)) > 1
        without = []
        method.sample(3, 4, strategy, sampler, latent='none', callback=lambda *step: without.append(step))
        assert [i for i, *_ in without] == list(range(steps)) and all(z is None for *_, z in without)


@pytest.mark.parametrize('name', TINY_METHODS)
def test_the_first_of_each_is_the_default(name):
    method = make(name)
    first = {'strategy': next(iter(method.strategies)), 'sampler': next(iter(method.samplers))}
    assert method.sampling_options() == method.sampling_options(**first)
    a, b = (method.sample(4, 2, generator=generator(), **given) for given in ({}, first))
    assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------
# what a sample costs

def of_dit(S, layers=1, d=16):
    """By hand: matrices of 12 d^2 numbers at S positions, scores and sums of attention."""
    return layers * (S * 12 * d * d + 2 * S * S * d)


def calls_of(method, steps, **options):
    """How often `sample` really calls the denoiser."""
    calls = []
    hook = method.dit.register_forward_pre_hook(lambda *args: calls.append(1))
    method.sample(64, steps, **options)
    hook.remove()
    return len(calls)


def test_costs_of_mdlm():
    method = make('mdlm')
    for sampler, calls in (('ancestral', 5), ('remdm', 5), ('first_hitting', L)):
        assert method.denoiser_calls(5, sampler=sampler) == calls == calls_of(method, 5, sampler=sampler)
        assert method.sampling_flops(L, 5, sampler=sampler) == calls * of_dit(L)
    assert method.sampling_flops(L, 5, **method.sampling_options()) == method.sampling_flops(L, 5)


def test_costs_of_ar():
    """With keys and values kept, L calls for one position each cost what one call for a text costs."""
    method = make('ar')
    assert method.denoiser_calls(5) is None and method.sampling_flops(L, 5) == of_dit(L)


def test_costs_of_ssmd():
    """At most: a pass of the causal block for each token (there are fewer than a pass sees at once), one for
    each call's cache, and, without `steps`, a call for each token."""
    method, block = make('ssmd'), of_dit(L) + L * 3 * 16 * 16
    assert method.denoiser_calls(5) == 5 == calls_of(method, 5)
    assert method.sampling_flops(L, 5) == 5 * of_dit(L) + (L + 5) * block
    assert method.sampling_flops(L, 5, sampler='speculative') == L * (of_dit(L) + block)


@pytest.mark.parametrize('name', ['co', 'di'])
@pytest.mark.parametrize('layers', [0, 1])
def test_costs_of_ladd(name, layers):
    """joint: the MM-DiT at every step. seq: the latent first, by the MM-DiT or by a small DiT of its own."""
    method, M = make(name, latent_layers=layers), 2
    assert method.denoiser_calls(5, strategy='joint') == 5 == calls_of(method, 5, strategy='joint')
    assert method.sampling_flops(L, 5, strategy='joint') == 5 * of_dit(L + M)
    once = of_dit(M) if layers else of_dit(L + M)
    for sampler, calls in (('ancestral', 5), ('first_hitting', L)):
        options = dict(strategy='seq', sampler=sampler, latent_steps=3)
        assert method.denoiser_calls(5, **options) == calls
        assert calls_of(method, 5, **options) == calls + (0 if layers else 3)
        assert method.sampling_flops(L, 5, **options) == calls * of_dit(L + M) + 3 * once


@pytest.mark.parametrize('name, strategy, sampler', CHOICES)
def test_costs_are_those_of_the_same_call_of_sample(name, strategy, sampler):
    """Options left out count with their defaults, as `sample` takes them."""
    method = make(name)
    complete = method.sampling_options(strategy, sampler)
    costs = [method.sampling_flops(L, 5, **options)
             for options in (complete, dict(strategy=strategy, sampler=sampler))]
    assert costs[0] == costs[1]
    if (strategy, sampler) == ('joint', next(iter(method.samplers))):
        assert method.sampling_flops(L, 5) == costs[0]


def test_costs_of_ldlm():
    """The denoiser at every step; decoder and token decoder once."""
    d = 16
    perceiver = L * (3 + 1 + 2 + 4 + 4) * d * d + 2 * L * (2 * L) * d  # attends to L latents and L queries
    tokens = L * (3 + 1 + 8 + 4) * d * d + 2 * L * L * d               # SwiGLU
    for keys, once in (({}, perceiver + tokens),
                       (dict(latent_encoder='attention'), L * 12 * d * d + 2 * L * L * d + tokens),
                       (dict(latent_encoder='none', latent_layers=6), tokens),
                       (dict(decoder_layers=0), perceiver)):
        method = make('ldlm', **keys)
        assert method.denoiser_calls(5) == 5 == calls_of(method, 5)
        assert method.sampling_flops(L, 5) == 5 * of_dit(L) + once
    frozen = dict(token_encoder='name', reconstruction='mse', decode_from='latents')
    assert make('ldlm', **frozen).sampling_flops(L, 5) == 5 * of_dit(L) + tokens


def test_costs_of_a_training_step():
    """Three times the forward pass, two FLOPs per multiply-add, with the head at the rows that it sees."""
    d = 16
    for name in ('ar', 'flm', 'duo'):
        assert make(name).training_flops(L) == 6 * (of_dit(L) + L * d * V)
    assert make('duo_distilled').training_flops(L) == 8 * (of_dit(L) + L * d * V)  # with its teacher
    for name in ('mdlm', 'cadd', 'candi'):
        assert make(name).training_flops(L) == 6 * (of_dit(L) + L / 2 * d * V)
    assert make('vadd').training_flops(L) == 6 * (2 * of_dit(L) + L / 2 * d * V)  # with its recognition
    assert make('ssmd').training_flops(L) == 6 * (of_dit(L, 2) + L * 3 * d * d + 2 * L / 2 * d * V)
    method = make('ldlm')
    parts = sum(m.flops(L) for m in method.modules() if isinstance(m, ldlm.Transformer))
    expected = 6 * (of_dit(L) + parts + L * d * V) + 2 * of_dit(L)
    assert method.training_flops(L) == expected


# ------------------------------------------------------------------------------------------------------------
# a method of one's own

class Own(Method):
    """That `steps` has a default says nothing about what it does."""
    name = 'Own'

    def __init__(self):
        super().__init__()
        self.dit = DiT(16, 1, 2, 8, L)

    def sample(self, n, steps=32, strategy='', sampler='', generator=None, callback=None, **options):
        self.sampling_options(strategy, sampler, **options)
        x = torch.randn(n, L, 16, generator=generator)
        for _ in range(steps):
            x = self.dit(x)
        return x.argmax(dim=-1)


def test_a_method_of_ones_own():
    method = Own()
    for steps in (1, 2, 4):
        assert method.denoiser_calls(steps) == steps == calls_of(method, steps)
        assert method.sampling_flops(L, steps) == steps * of_dit(L)
    assert method.backbones() == [method.dit] and method.likelihood is None and method.validated == ()
    assert method.sampling_options() == {'strategy': 'joint', 'sampler': 'ancestral'}
    assert method.encoder_name == '' and method.stored_latents == {} and method.untrained_part == ''
    assert not (method.takes_prompt or method.has_latent_space or method.wants_summary)
    assert method.begin_step(0, None, None) is None and method.end_step(FINITE, None) is None
    for wrong in (dict(strategy='seq'), dict(sampler='ddim'), dict(temperature=1.0)):
        with pytest.raises(ValueError, match='Own has no'):
            method.sample(1, **wrong)


def test_the_parts_of_a_channel_are_those_of_the_method():
    """Codes use the same codebook and mask vector that LADD trains, moves and stores, also in a copy."""
    method = make('di')
    for m in (method, copy.deepcopy(method), copy.deepcopy(method).double()):
        assert m.channel.z_mask is m.z_mask and m.channel.quantizer is m.quantizer
        assert {'z_mask', 'quantizer.codebook', 'quantizer.counts', 'quantizer.sums'} <= m.state_dict().keys()
        assert m.channel.seen(torch.tensor([[5]])).dtype == m.z_mask.dtype


# ------------------------------------------------------------------------------------------------------------
# the end of a step

def buffers(method):
    return {name: b.clone() for name, b in method.named_buffers() if name in method.state_dict()}


def unchanged(method, before):
    return all(torch.equal(b, before[name]) for name, b in method.named_buffers() if name in before)


def learned(codebook, counts, sums, e, codes, decay, dead_below, noise):
    """A codebook's move, in double precision: running means of counts and sums, a restart for dead codes."""
    K, e = len(codebook), e.double()
    n = codes.bincount(minlength=K).double()
    total = torch.zeros(K, e.shape[1]).double().index_add_(0, codes, e)
    counts, sums = decay * counts + (1 - decay) * n, decay * sums + (1 - decay) * total
    order = noise.permutation('revive', max(len(e), K))
    for k in range(K):
        if counts[k] < dead_below:
            counts[k], sums[k] = dead_below, dead_below * e[order[k] % len(e)]
    return {'counts': counts, 'sums': sums, 'codebook': F.normalize(sums, dim=-1)}


@pytest.mark.parametrize('micro', [16, 4])
def test_the_codebook_moves_if_the_step_was_finite(micro):
    """By all vectors of the step, in the order of the batch, however it was cut into micro-batches."""
    method = make('di', stage1_iters=9, vq_decay=0.8, dead_below=6.0).train()
    quantizer, restarted = method.channel.quantizer, 0
    method.begin_step(0, whole(16), lambda n: (lines(n, 99),))
    for step in range(1, 6):
        noise, x = whole(16, step=step), lines(16, step)
        method.begin_step(step, noise, None)
        before, calls = buffers(method), spy(method, 'encode')
        for finite in (NOT_FINITE, FINITE):
            for i in range(16 // micro):
                rows = slice(i, None, 16 // micro)
                method(x[rows], noise[rows])
            assert unchanged(method, before)  # not by forward
            method.end_step(finite, noise)
            assert unchanged(method, before) != finite and quantizer.met == []
        with torch.no_grad():
            e = method.encode(x).flatten(0, 1)
        old = {name.split('.')[-1]: b.double() for name, b in before.items() if 'quantizer' in name}
        codes = (e @ old['codebook'].float().T).argmax(dim=-1)
        expected = learned(**old, e=e, codes=codes, decay=0.8, dead_below=6.0, noise=noise)
        for name, value in expected.items():
            torch.testing.assert_close(getattr(quantizer, name).double(), value, rtol=1e-5, atol=1e-6)
        restarted += int((quantizer.counts == 6.0).sum())
        del method.__dict__['encode'], calls
    assert restarted > 0


def test_the_codebook_survives_a_step_of_nans():
    method = make('di', stage1_iters=9).train()
    method.begin_step(0, whole(16), lambda n: (lines(n),))
    before = buffers(method)
    weight = method.encoder.out.weight.detach().clone()
    method.encoder.out.weight.data.fill_(math.nan)
    loss, _ = method(lines(16), whole(16))
    assert not loss.isfinite()
    method.end_step(NOT_FINITE, whole(16))
    assert unchanged(method, before)
    method.encoder.out.weight.data.copy_(weight)
    method(lines(16), whole(16))
    method.end_step(FINITE, whole(16))
    assert not unchanged(method, before) and all(b.isfinite().all() for b in method.buffers())


def test_the_codebook_rests_in_stage_two():
    method = make('di', stage1_iters=2).train()
    method.begin_step(2, whole(16), None)
    before = buffers(method)
    method(lines(16), whole(16))
    method.end_step(FINITE, whole(16))
    assert unchanged(method, before)


@pytest.mark.parametrize('micro', [16, 4])
def test_adaptive_times_count_the_step_if_it_was_finite(micro):
    method = make('ldlm', adaptive_memory=0.9).train()
    for step in range(1, 4):
        noise, x = whole(16, step=step), lines(16, step)
        earlier = method.times.sums.clone()
        method.begin_step(step, noise, None)
        torch.testing.assert_close(method.times.sums, 0.9 * earlier)
        before = buffers(method)
        for finite in (NOT_FINITE, FINITE):
            drawn, tracked = spy(method.times, 'draw'), spy(method.times, 'track')
            for i in range(16 // micro):
                rows = slice(i, None, 16 // micro)
                method(x[rows], noise[rows])
            assert unchanged(method, before)
            method.end_step(finite, noise)
            assert unchanged(method, before) != finite
            t, losses = (torch.cat([args[i] for args, _ in tracked]) for i in (0, 1))
            assert torch.equal(t, torch.cat([result for _, result in drawn]))
            del method.times.__dict__['draw'], method.times.__dict__['track']
        assert len(t) == len(losses) == 16
        bins = (t * 4).long().clamp(max=3)
        expected = torch.stack([torch.stack([values[bins == i].sum() for i in range(4)])
                                for values in (losses, torch.ones(16))])
        torch.testing.assert_close(method.times.sums, before['times.sums'] + expected)


def test_adaptive_times_survive_a_step_of_nans():
    method = make('ldlm').train()
    method.begin_step(1, whole(16), None)
    before = buffers(method)
    bias = method.z_out.bias.detach().clone()
    method.z_out.bias.data.fill_(math.nan)
    loss, _ = method(lines(16), whole(16))
    assert not loss.isfinite()
    method.end_step(NOT_FINITE, whole(16))
    assert unchanged(method, before)
    method.z_out.bias.data.copy_(bias)
    method(lines(16), whole(16))
    method.end_step(FINITE, whole(16))
    assert method.times.sums.isfinite().all() and float(method.times.sums[1].sum()) == 16


@pytest.mark.parametrize('name', ['mdlm', 'ar', 'flm', 'duo', 'candi', 'vadd', 'cadd', 'ssmd', 'co'])
def test_others_have_nothing_to_move(name):
    method = make(name).train()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.begin_step(0, whole(16), None)
    method(lines(16), whole(16))
    method.end_step(FINITE, whole(16))
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())


@pytest.mark.parametrize('name', TINY_METHODS)
def test_later_micro_batches_need_no_new_graph(name):
    """What a step collects must not be a number to the compiler, which gives up after eight of them.

    Stage 1 of Di-LADD is the exception: it has a graph for each micro-batch of a step, and no more.
    """
    method = make(name, **{'stage1_iters': 9} if name == 'di' else {}).train()
    torch._dynamo.reset()
    counters.clear()
    method.compile(backend='eager')
    graphs = []
    for step in (0, 1):
        noise, x = whole(15, step=step), lines(15, step)
        method.begin_step(step, noise, lambda n: (lines(n, 99),))
        for i in range(3):
            method(x[i::3], noise[i::3])
            graphs.append(counters['stats']['unique_graphs'])
        method.end_step(FINITE, noise)
    assert graphs == ([1, 2, 3, 3, 3, 3] if name == 'di' else graphs[:1] * 6)


# ------------------------------------------------------------------------------------------------------------
# no key without effect: whatever another value of a key changes has to show, or the value is refused

SIZES = dict(block_size=L, hidden=16, num_layers=1, num_heads=2, cond_dim=8, encoder_layers=1, num_latents=2,
             latent_dim=4, codebook_size=5, latent_layers=1, decoder_layers=1, stage1_iters=4, vq_start=2,
             adaptive_bins=4, adaptive_every=3, encoder_warmup=6, stage3_start=6, curriculum_iters=4, z_dim=4,
             kl_warmup=4, hint_dim=4, round_iters=3)
# settings that the configs describe beside the one that they set
LADD_SETTINGS = {
    'stored': 'text_co_ladd --stored_latents=True --encoder_dropout=False',
    'stored codes': 'text_di_ladd --stored_latents=True',
    'learned': 'text_co_ladd --encoder= --stage1_iters=5000',
    'learned codes': 'text_di_ladd --encoder= --stage1_iters=5000 --vq_start=3000',
    'codebook of another run': 'text_di_ladd --stage1_iters=0',
    'own latent denoiser': 'sawtooth_co_ladd_paper --latent_layers=3 --times=independent'}
LDLM_SETTINGS = {
    'ce': '--reconstruction=ce', 'both': '--reconstruction=both',
    'fixed times': '--adaptive_t=False --encoder_warmup=0', 'no noise': '--sigma_dec=0',
    'embeddings': '--latent_encoder=none --sigma_dec=.5 --token_encoder=scratch --reconstruction=ce',
    'learned latents of embeddings': '--token_encoder=scratch --reconstruction=ce',
    'states': '--latent_encoder=none --sigma_dec=.5',
    'autoencoder': '--stage=autoencoder --mask_states=.3 --sigma_dec=1', 'diffusion': '--stage=diffusion',
    'attention': '--latent_encoder=attention',
    'no tokens': '--token_loss=False', 'decoder': '--stage=decoder',
    'small decoder': '--stage=decoder --decode_from=latents --decoder_layers=2'}
SETTINGS = {name: [name] for name in CONFIGS} | {f'ladd: {k}': v.split() for k, v in LADD_SETTINGS.items()}
SETTINGS |= {f'ldlm: {name}': ['shakespeare_char_ldlm', *args.split()]
             for name, args in LDLM_SETTINGS.items()}
# other values, where "one more" or "the other one" would be refused or too small to show in a few steps
OTHERS = dict(block_size=10, hidden=32, num_heads=1, dropout=0.5, vq_decay=0.5, dead_below=5.0, lambda_x=0.5,
              lambda_z=0.5, p_drop=0.5, p_start=0.5, p_clean=0.5, p_noise=0.5, stage3_start=6,
              stage1_t_min=0.5, self_conditioning=1.0, tangent=1.0,
              latent_length=2.0, layer=-1, encoder_warmup=3, adaptive_every=2, adaptive_memory=0.5,
              adaptive_floor=0.9, sigma_dec=2.0, mask_states=0.6)
# whose effect is on what the scripts open and read, or (after stage 1) on the log, and not on other numbers
ELSEWHERE = ('encoder', 'token_encoder', 'stored_latents', 'dead_below')


def toy_keys(args):
    """-> the class of a setting's method, and its keys at toy size."""
    config = configure(train.Config, [os.path.join(ROOT, 'config', args[0] + '.py'), *args[1:]], METHODS)
    Class = METHODS[config['method']]
    keys = {k: config[k] for k in method_keys(Class)}
    keys.update((k, min(v, SIZES[k])) for k, v in keys.items() if k in SIZES)
    keys.update(block_size=L, vocab_size=V)
    keys.update((k, 'frozen') for k in ('encoder', 'token_encoder') if keys.get(k, '') not in ('', 'scratch'))
    if config['method'] == 'ldlm':
        keys['latent_dim'] = 16  # the encoder's
    return Class, keys


def other_values(Class, name, value):
    rule = Class.Config.__dataclass_fields__[name].metadata
    if rule.get('choices'):
        return [v for v in rule['choices'] if v != value]
    if isinstance(value, bool):
        return [not value]
    if name == 'latent_schedule':
        return [v for v in ('vp_linear', 'vp_cosine', 'vp_sqrt', 'linear', 'polynomial') if v != value]
    if isinstance(value, str):  # an encoder
        return [v for v in ('' if name == 'encoder' else 'scratch', 'another') if v != value]
    if name in OTHERS and OTHERS[name] != value:
        return [OTHERS[name]]
    return [value + 1] if isinstance(value, int) else [value / 2 + 0.1]


def with_effect(Class, keys, given=''):
    """As on a command line: keys of the file that have no effect beside a given one are left out."""
    unused = idle(Class.Config, keys).keys() - {given}
    return {k: defaults_of(Class.Config)[k] if k in unused else v for k, v in keys.items()}


ENCODER = RunEncoder(make('ar', num_layers=3), {**TINY, 'num_layers': 3})


def built(Class, config):
    """With its encoder, and random weights that are not the initialisation."""
    torch.manual_seed(0)
    method = scrambled(Class(config))
    method.head.bias.data.zero_()  # or it decides, and all samples are alike
    if Class is LDLM:  # as after steps in which the loss rose with t: to this its times adapt
        method.times.sums.fill_(16)[0].mul_(torch.linspace(0, 1, method.config.adaptive_bins) ** 2)
    if method.encoder_name and not method.stored_latents:
        method.attach(ENCODER)
    if method.name == 'Di-LADD':  # as after its first stage
        with torch.no_grad():
            e = F.normalize(ENCODER(lines(80))[0][..., :method.config.latent_dim], dim=-1)
        method.channel.quantizer.kmeans(e.flatten(0, 1), 32, whole(16))
    return method


def batch(method, n, step):
    """Texts, and stored latents if the method trains on them."""
    shape = method.stored_latents.values()
    stored = [whole(n, seed=2, step=step).normal('stored', *shape)] if shape else []
    return lines(n, step, method.config.block_size), *stored


def observations(method, elsewhere=False):
    """(what, value) of all that a key may show in: shapes, losses of eight steps, likelihood, samples."""
    usage = []
    yield 'shapes', {k: v.shape for k, v in method.state_dict().items()}
    if elsewhere:
        yield 'what it asks for', (method.encoder_name, method.stored_latents)
    optimizer = torch.optim.SGD(method.train().parameters(), lr=0.01)
    for step in range(8):
        noise = whole(16, step=step)
        torch.manual_seed(step)
        method.begin_step(step, noise, lambda n: batch(method, n, 99))
        x, *stored = batch(method, 16, step)
        loss, logs = method(x, noise, *stored)
        usage.append(logs.get('code_usage', 0))
        yield f'loss {step}', loss.detach()
        if loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
            optimizer.step()
        method.end_step(FINITE, noise)
    if elsewhere:
        yield 'the log', usage
    method.eval()
    x, *stored = batch(method, 16, 99)
    if method.likelihood:
        for strategy in method.strategies:
            yield f'nll {strategy}', sum(method.nll_parts(x, whole(16), strategy, *stored).values())
    if method.has_latent_space:
        yield 'reconstruction', method.reconstruct(x)
    if getattr(method.config, 'stage', '') != 'autoencoder':  # LDLM has no denoiser then
        for strategy, sampler in itertools.product(method.strategies, method.samplers):
            if sampler != 'first_hitting':
                x = method.sample(16, 4, strategy, sampler, generator=generator())
                yield f'samples {strategy} {sampler}', x


def differs(a, b):
    if not torch.is_tensor(a):
        return a != b
    return a.shape != b.shape or not torch.allclose(a.double(), b.double(), rtol=1e-6, atol=0)


def where_it_shows(method, base, elsewhere=False):
    for (what, value), (_, old) in zip(observations(method, elsewhere), base):
        if differs(value, old):
            return what
    return ''


@pytest.fixture(autouse=True)
def few_states(monkeypatch):
    monkeypatch.setattr(ldlm, 'STATE_TOKENS', 600)


def shows_anyway(Class, keys, name, base):
    """Where a key shows that is said to have no effect: in a run of the first edition, which may hold it."""
    try:
        shows = where_it_shows(built(Class, Class.Config.stored(keys)), base)
    except ValueError:  # refused there, too
        shows = ''
    # the buffers have a place for each bin, also if the times are not adaptive
    return '' if name == 'adaptive_bins' and shows == 'shapes' else shows


@functools.cache
def without_effect(Class, *items):
    """The key=value pairs of other values that show nowhere, though they are not refused."""
    Config, keys, silent = Class.Config, dict(items), []
    base = {elsewhere: list(observations(built(Class, Config.stored(keys)), elsewhere))
            for elsewhere in (False, True)}
    assert where_it_shows(built(Class, Config.stored(keys)), base[False]) == ''  # nothing else matters
    assert all(len(x.unique(dim=0)) > 3 for what, x in base[False] if what.startswith('samples'))
    now = with_effect(Class, keys)
    for name in method_keys(Class):
        for value in other_values(Class, name, now[name]):
            changed = {**keys, name: value}
            try:
                method = built(Class, Config(**with_effect(Class, changed, name)))
            except ValueError as e:
                print(f'{name}={value} is refused: {e}')
                assert name in str(e), f'{name}={value} is refused without a reason: {e}'
                if f'{name}={value} has no effect' in str(e) and name not in ELSEWHERE:
                    assert shows_anyway(Class, changed, name, base[False]) == '', e
                continue
            try:  # that other keys lose their effect beside it does not count
                method = built(Class, Config.stored(changed))
            except ValueError:
                pass
            shows = where_it_shows(method, base[name in ELSEWHERE], name in ELSEWHERE)
            print(f'{name}={value} shows in: {shows}')
            silent += [] if shows else [f'{name}={value}']
    return silent


@pytest.mark.parametrize('setting', SETTINGS)
def test_every_key_shows_or_is_refused(setting):
    Class, keys = toy_keys(SETTINGS[setting])
    assert without_effect(Class, *keys.items()) == []  # many are the same at toy size


@pytest.mark.parametrize('setting', ['text_co_ladd', 'text_di_ladd', 'text_ldlm'])
def test_another_encoder_gives_other_losses(setting):
    """The name of a frozen encoder says which one is attached."""
    Class, keys = toy_keys(SETTINGS[setting])
    config = Class.Config(**with_effect(Class, keys))
    base, method = list(observations(built(Class, config))), built(Class, config)
    method.attach(RunEncoder(scrambled(make('ar', num_layers=3), seed=1), {**TINY, 'num_layers': 3}))
    assert where_it_shows(method, base).startswith('loss')


@pytest.mark.parametrize('setting', ['text_co_ladd', 'text_di_ladd'])
def test_stored_latents_take_the_place_of_the_encoder(setting):
    """The same losses and likelihood as by the encoder that they come from, which is not needed."""
    Class, keys = toy_keys(SETTINGS[setting])
    keys.update(encoder_dropout=False, dropout=0.0)
    keys = with_effect(Class, keys)
    method, stored = (built(Class, Class.Config(**{**keys, 'stored_latents': wants}))
                      for wants in (False, True))
    assert method.stored_latents == {} and stored.stored_latents == {'num_latents': 2, 'latent_dim': 4}
    with torch.no_grad():
        z_0 = method.encoder(lines(80))
    for m, rows in ((method, lambda n: (lines(80)[:n],)), (stored, lambda n: (lines(80)[:n], z_0[:n]))):
        m.begin_step(keys['vq_start'] if 'discrete' in keys.values() else 0, whole(16), rows)
    x = lines(80)[:16]
    torch.testing.assert_close(stored(x, whole(16), z_0[:16])[0], method(x, whole(16))[0])
    torch.testing.assert_close(stored.nll(x, z_0=z_0[:16]), method.nll(x))


def test_every_option_is_a_key_of_the_scripts():
    """With the method's own default: the scripts pass on only what differs from theirs."""
    for method in map(make, TINY_METHODS):
        for table in (*method.strategies.values(), *method.samplers.values()):
            defaults = {k: rule.default for k, rule in table.items()}
            assert defaults.items() <= defaults_of(sample.Shared).items()
