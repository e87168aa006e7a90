"""eval.py: likelihoods against exact answers, metrics of samples, teachers, the command line, frontiers."""
import ast
import functools
import io
import json
import math
import os
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from helpers import CHARS, TINY, TINY_METHODS, L, fails, generator, make
from matplotlib.cbook import is_math_text

import eval as evaluation
import lib.prepare
import lib.tokens
import mdlm
import methods
import sample
from lib import checkpoint, plot
from lib.configurator import UserError, defaults_of
from lib.files import append
from lib.method import Method
from lib.noise import Noise
from lib.tokens import Char
from methods import open_run
from sawtooth import Exact, Sawtooth

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def sandbox(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith('{')]


# ------------------------------------------------------------------------------------------------------------
# likelihood

class ExactMDLM(Method):
    """MDLM on sawtooth whose network knows the answers."""
    likelihood = 'bound'

    def nll_parts(self, x, noise, strategy='joint', z_0=None):
        t = noise.times('t_x')
        mask = noise.uniform('mask', x.shape[1]) < t[:, None]
        nats = torch.zeros(x.shape)
        logits = Exact().denoise(x.masked_fill(mask, 2), mask)
        nats[mask] = torch.nn.functional.cross_entropy(logits, x[mask], reduction='none')
        return {'val': nats.sum(dim=1) / t}


def test_the_exact_denoiser_has_the_entropy_of_sawtooth():
    data = Sawtooth('val')
    r = evaluation.likelihood(ExactMDLM(), lambda idx: data.rows(idx)[0], 3000, batch_size=500, draws=2)
    assert r['val_nll_se'] < 0.01 and abs(r['val_nll'] - 0.5303) < 4 * r['val_nll_se']
    assert r['val_ppl'] == pytest.approx(math.exp(r['val_nll']))


def by_brute_force(method, x):
    """-log p(x) and the ELBO of a method whose network sees no time, x (L,): tokens are revealed one by one,
    in every order."""
    def nats(hidden, l):
        x_t, where = x.clone(), torch.zeros(1, len(x), dtype=torch.bool)
        x_t[list(hidden)], where[0, l] = method.mask_id, True
        return -method.denoise(x_t[None], where).double().log_softmax(dim=-1)[0, x[l]].item()

    @functools.lru_cache(None)
    def p(hidden):
        terms = (math.exp(-nats(hidden, l)) * p(hidden - {l}) for l in hidden)
        return sum(terms) / len(hidden) if hidden else 1.0

    @functools.lru_cache(None)
    def elbo(hidden):
        return sum(nats(hidden, l) + elbo(hidden - {l}) for l in hidden) / len(hidden) if hidden else 0.0
    everything = frozenset(range(len(x)))
    return -math.log(p(everything)), elbo(everything)


@pytest.mark.parametrize('V, length, schedule', [(2, 3, 'linear'), (3, 3, 'polynomial')])
@torch.no_grad()
def test_the_bound_bounds_and_its_standard_error_holds(V, length, schedule):
    method = make('mdlm', vocab_size=V, block_size=length, schedule=schedule)
    texts = torch.cartesian_prod(*[torch.arange(V)] * length)
    nll, elbo = zip(*(by_brute_force(method, x) for x in texts))
    assert sum(math.exp(-v) for v in nll) == pytest.approx(1)
    for x, least, mean in list(zip(texts, nll, elbo))[::4]:  # text by text
        r = evaluation.likelihood(method, lambda idx, x=x: x.expand(len(idx), -1), 2000, 2000)
        assert least <= mean and r['val_nll'] * length > least - 4 * r['val_nll_se'] * length
        assert abs(r['val_nll'] * length - mean) < 4 * r['val_nll_se'] * length
    means = []
    for seed in range(5):  # all texts at once
        r = evaluation.likelihood(method, lambda idx: texts[idx % len(texts)], 100 * len(texts), 5000, seed)
        means.append(r['val_nll'] * length)
        assert abs(means[-1] - sum(elbo) / len(elbo)) < 3 * r['val_nll_se'] * length
    assert torch.tensor(means).std() < 2 * r['val_nll_se'] * length and len(set(means)) == 5


@pytest.mark.parametrize('name', [name for name in TINY_METHODS if make(name).likelihood])
def test_batches_change_nothing(name):
    method, texts = make(name), torch.randint(10, (23, L), generator=generator())
    a, b = (evaluation.likelihood(method, texts.__getitem__, 23, size, seed=3, draws=2) for size in (4, 23))
    assert a == pytest.approx(b, rel=1e-5) and len(a) > 2


@pytest.mark.parametrize('name', ['co', 'di'])
def test_channels_of_ladd(name):
    texts = torch.randint(10, (40, L), generator=generator())
    method = make(name)
    joint, seq = (evaluation.likelihood(method, texts.__getitem__, 40, 40, strategy=strategy)
                  for strategy in ('joint', 'seq'))
    for r in (joint, seq):
        assert r['val_nll'] == pytest.approx(r['token_nll'] + r['latent_nll']) and r['latent_nll'] > 0
    nll = method.nll(texts, Noise(0, 0, torch.arange(40), 40))
    assert joint['val_nll'] == pytest.approx(nll.mean().item() / L, rel=1e-5)
    assert joint['token_nll'] != seq['token_nll']


def test_ar_is_exact():
    method = make('ar', vocab_size=2, block_size=4)
    texts = torch.cartesian_prod(*[torch.arange(2)] * 4)
    nll = [evaluation.likelihood(method, lambda idx, x=x: x.expand(len(idx), -1), 2, 2, seed=i)['val_nll'] * 4
           for i, x in enumerate(texts)]
    assert sum(math.exp(-v) for v in nll) == pytest.approx(1, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# metrics of samples

def test_both_entropies():
    x = torch.tensor([[0, 0, 1, 1], [0, 2, 3, 4]])
    assert evaluation.entropies(x) == pytest.approx({'entropy_position': 3 / 4 * math.log(2),
                                                     'entropy_sample': (math.log(2) + math.log(4)) / 2})


def test_diversity():
    x = [[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]]
    expected = 1.0
    for n in (2, 3, 4):
        grams = [tuple(row[i:i + n]) for row in x for i in range(len(row) - n + 1)]
        expected *= len(set(grams)) / len(grams)
    assert expected == pytest.approx((5 / 8) * (5 / 6) * 1)
    assert evaluation.diversity(torch.tensor(x)) == pytest.approx(expected)


@pytest.mark.parametrize('wrap', [False, True])
def test_recited_by_brute_force(wrap):
    """Of two letters: a quarter of the 12-grams is there by chance. One letter of each copy is changed."""
    training, x = torch.randint(2, (1000,), generator=generator()), torch.randint(2, (20, 40))
    x[:10] = training[300:700].view(10, 40)
    x[:10, 20] = 2
    there = {tuple(gram) for gram in training.unfold(0, 12, 1).tolist()}
    grams = [tuple(gram) for gram in x.unfold(1, 12, 1).flatten(0, 1).tolist()]
    share = sum(gram in there for gram in grams) / len(grams)
    assert 0.3 < share < 0.7
    if wrap:
        x = torch.nn.functional.pad(x, (1, 1))
    for chunk in 7, 989, 10**6:
        assert evaluation.recited(x, training.numpy(), wrap, chunk) == pytest.approx(share)
    assert evaluation.recited(x, training[:11].numpy(), wrap) == 0  # too short for any


def test_recited(tmp_path, monkeypatch, capsys):
    """Samples that are half of the training text; of three validation texts, one is in it, too."""
    letters = torch.randint(9, (5, 16), generator=generator())
    a, b, c, d, e = (''.join(CHARS[i] for i in row) for row in letters)
    splits = {'train': lambda: iter([(a + b + c, True), (CHARS, True)]),
              'val': lambda: iter([(b + d + e, True)])}
    lib.prepare.write(str(tmp_path / 'set'), splits, 'char')
    make('mdlm', 'out/m', block_size=16, dataset=str(tmp_path / 'set'))
    make('ar', 'out/a', block_size=16)
    monkeypatch.setattr(evaluation, 'generate', lambda *args, **options: letters[[0, 2, 3, 4]])
    argv = ['--num_samples=4', '--steps=2', '--device=cpu']
    evaluation.main(['out/m', '--teacher=out/a', *argv])
    capsys.readouterr()
    for _ in range(2):  # what has no share of it is measured again, once
        evaluation.main(['out/m', '--teacher=out/a', '--recited', *argv])
    out = capsys.readouterr().out
    result, = lines(out)
    assert result['recited'] == 0.5 and result['recited_data'] == pytest.approx(1 / 3)
    found = tables(out[out.rindex('[1] out/m'):])
    assert found['recited at gflops']['[1]'] == ['0.5']
    assert found['recited_data at gflops']['[1]'] == ['0.3333']


def test_gflops_of_a_sample():
    m, co, di = make('mdlm'), make('co'), make('di')
    call = 12 * L * 16**2 + 2 * L**2 * 16
    big = 12 * (L + 2) * 16**2 + 2 * (L + 2) ** 2 * 16  # two latents
    small = 12 * 2 * 16**2 + 2 * 2**2 * 16
    seq = {'strategy': 'seq', 'latent_steps': 8}
    for method, options, calls, flops in [
            (m, {'sampler': 'ancestral'}, 5, 5 * call), (m, {'sampler': 'first_hitting'}, L, L * call),
            (make('ar'), {}, None, call), (co, {'strategy': 'joint'}, 5, 5 * big),
            (co, seq, 5, 5 * big + 8 * small), (di, seq, 5, 13 * big)]:
        assert method.sampling_flops(L, 5, **options) == flops
        assert method.denoiser_calls(5, **options) == calls


# ------------------------------------------------------------------------------------------------------------
# teachers

ALPHABET = [*CHARS.replace('g', ''), '<unk>', '<eos>']


@pytest.fixture
def gpt2(tmp_path):
    """A GPT-2 with random weights and a tokenizer of characters, in a folder."""
    import tokenizers
    import transformers
    words = tokenizers.models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token='<unk>')
    tok = tokenizers.Tokenizer(words)
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
    tok.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<eos>', unk_token='<unk>')
    fast.save_pretrained(tmp_path / 'gpt2')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(ALPHABET), n_positions=8, n_embd=16, n_layer=1, n_head=2,
                                     initializer_range=0.5)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / 'gpt2')
    return model


@torch.no_grad()
def test_gen_ppl_with_a_hugging_face_teacher(gpt2):
    tok = Char(CHARS, True)
    x = torch.tensor([tok.encode('abc def\nabcd'), [*tok.encode('fab'), tok.eos_id, *tok.encode('g cafe f')]])
    teacher = evaluation.open_teacher('gpt2', tok, CPU)
    nats, tokens = 0.0, 0
    for text in (list('abc def\nabcd'), ['f', 'a', 'b', '<eos>', '<unk>', *' cafe f']):
        ids = [ALPHABET.index(c) for c in text]
        for window in (ids[:8], ids[8:]):  # its context is 8
            logp = gpt2(torch.tensor([window])).logits[0].double().log_softmax(dim=-1)
            nats -= sum(logp[i, window[i + 1]].item() for i in range(len(window) - 1))
            tokens += len(window) - 1
    assert teacher.score(x) == pytest.approx((nats, tokens), rel=1e-5)
    assert tokens == 2 * (7 + 3) and 'first token of each not scored' in teacher.record['gen_ppl_rule']
    # more than a batch
    assert teacher.score(x.repeat(5, 1)) == pytest.approx((5 * nats, 5 * tokens), rel=1e-5)
    import transformers
    config = transformers.BloomConfig(vocab_size=len(ALPHABET), hidden_size=16, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained('gpt2')
    teacher = evaluation.open_teacher('gpt2', tok, CPU)  # states no limit of its context
    assert 'windows of 1024' in teacher.record['gen_ppl_rule'] and teacher.score(x)[1] == 2 * 11


@torch.no_grad()
def test_gen_ppl_with_our_ar():
    ar, tok = make('ar', 'out/a'), Char(CHARS, True)
    x = torch.randint(10, (5, L), generator=generator())
    teacher = evaluation.open_teacher('out/a', tok, CPU)
    assert teacher.score(x) == pytest.approx((ar.nll(x).sum().item(), 5 * L), rel=1e-5)
    assert 'all tokens scored' in teacher.record['gen_ppl_rule']
    # another vocabulary: by way of the text, in windows of its block size, EOS becoming its EOS
    chars = CHARS[::-1] + 'xyz'
    other = make('ar', 'out/b', block_size=7, vocab_size=len(chars) + 1,
                 tokenizer={'kind': 'char', 'chars': chars, 'eos': True})
    ids = torch.tensor([[chars.index(CHARS[i]) if i < 9 else len(chars) for i in row] for row in x.tolist()])
    nll = (other.nll(ids[:, :7]) + other.nll(ids[:, 7:])).sum().item()
    assert evaluation.open_teacher('out/b', tok, CPU).score(x) == pytest.approx((nll, 5 * L), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# the command line

ARGS = ['--device=cpu', '--num_samples=6', '--batch_size=4']


def prepare(tmp_path, name, chars=CHARS, **options):
    """A prepared set of random characters, outside of data/."""
    text = ''.join(chars[i] for i in torch.randint(9, (600,), generator=generator())) + chars
    split = {'val': lambda: iter([(text[:300], True), (text[300:], True)])}
    lib.prepare.write(str(tmp_path / name), split, 'char', **options)
    return str(tmp_path / name)


def test_data_that_was_prepared_again_is_noticed(tmp_path, capsys):
    """Its validation texts may have been trained on. Other texts can still be evaluated."""
    data = prepare(tmp_path, 'set')
    sha256 = lib.tokens.Tokens(data, 'val', L).sha256
    make('mdlm', 'out/m', dataset=data, data_sha256=sha256)
    evaluation.main(['--out_dir=out/m', *ARGS])
    assert lines(open('out/m/eval.jsonl').read())[0]['data_sha256'] == sha256
    text = ''.join(CHARS[i] for i in torch.randint(9, (700,), generator=generator(1)))
    lib.prepare.write(data, {'val': lambda: iter([(text[:300], True), (text[300:], True)])}, 'char')
    with pytest.raises(UserError, match='prepared again'):
        evaluation.main(['--out_dir=out/m', *ARGS])
    evaluation.main(['--out_dir=out/m', f'--data={prepare(tmp_path, "other")}', *ARGS])


def test_every_result_is_one_object_here_and_in_the_file(tmp_path, capsys):
    data = prepare(tmp_path, 'set')
    make('di', 'out/d', dataset=data)
    make('ar', 'out/a', dataset=data)
    capsys.readouterr()
    evaluation.main(['--out_dir=out/d', '--metrics=val_ppl,gen_ppl,diversity,throughput', '--steps=1,4',
                     '--strategy=seq', '--teacher=out/a', '--plot', *ARGS])
    out, err = capsys.readouterr()
    results = lines(out)
    assert results == lines(open('out/d/eval.jsonl').read()) and len(results) == 3 == len(out.splitlines())
    first, *rest = results
    assert first['num_texts'] == (600 + 9 + 2) // L and first['val_ppl'] >= first['token_ppl']
    assert 'no bound' in first['token_ppl_is'] and first['val_ppl_is'] == 'an upper bound'
    assert [r['steps'] for r in rest] == [1, 4]
    for r in rest:
        assert {'gen_ppl', 'entropy_position', 'entropy_sample', 'diversity', 'gflops', 'teacher',
                'teacher_weights', 'weights', 'teacher_dtype', 'gen_ppl_rule', 'eos', 'num_samples', 'seed',
                'step', 'dtype', 'strategy', 'latent_steps', 'sampler', 'temperature', 'top_p', 'batch_size',
                'command', 'device', 'cpu_seconds_per_sample'} <= r.keys()
        assert r['samples_per_s_per_gen_ppl'] == pytest.approx(1 / r['seconds_per_sample'] / r['gen_ppl'])
        # what a record says repeats it
        x = sample.generate(open_run('out/d', CPU)[0], 6, r['steps'], 4, 0, strategy='seq')
        assert r['diversity'] == evaluation.diversity(x)
        assert r['entropy_sample'] == evaluation.entropies(x)['entropy_sample']
    assert 'gen_ppl' in err and err.count('\n') >= 4 and os.path.getsize('out/d/frontier.png') > 1000
    evaluation.main(['--out_dir=out/d', '--metrics=entropy', '--steps=2', *ARGS])
    assert len(lines(open('out/d/eval.jsonl').read())) == 4


def test_samplers_for_which_steps_has_no_say(tmp_path, capsys):
    make('ar', 'out/a')
    make('mdlm', 'out/m')
    evaluation.main(['--out_dir=out/a', '--metrics=entropy', '--steps=1,2,4', *ARGS])
    evaluation.main(['--out_dir=out/m', '--metrics=entropy', '--steps=1,2,4', '--sampler=first_hitting',
                     *ARGS])
    assert [r['steps'] for r in lines(capsys.readouterr().out)] == [None, L]


class Own(mdlm.MDLM):
    """A method of one's own, whose steps have a default and a limit."""

    def sample(self, n, steps=32, **options):
        if steps > 8:
            raise ValueError('more than 8 steps are too many')
        return super().sample(n, steps, **options)


def test_a_default_for_steps_collapses_nothing(monkeypatch, capsys):
    monkeypatch.setitem(methods.METHODS, 'mdlm', Own)
    call = make('mdlm', 'out/o').flops(L) / 1e9
    evaluation.main(['--out_dir=out/o', '--metrics=entropy', '--steps=1,2,4', *ARGS])
    results = lines(capsys.readouterr().out)
    assert [r['steps'] for r in results] == [1, 2, 4]
    assert [r['gflops'] for r in results] == pytest.approx([call, 2 * call, 4 * call])
    assert len({r['entropy_sample'] for r in results}) > 1
    with pytest.raises(UserError, match='too many'):  # what a method refuses is one line, too
        evaluation.main(['--out_dir=out/o', '--metrics=entropy', '--steps=9', *ARGS])


def test_latent_steps_are_swept(capsys):
    make('co', 'out/c')
    evaluation.main(['--out_dir=out/c', '--metrics=entropy', '--strategy=seq', '--steps=1,2',
                     '--latent_steps=3,5', *ARGS])
    results = lines(capsys.readouterr().out)
    assert [(r['latent_steps'], r['steps']) for r in results] == [(3, 1), (3, 2), (5, 1), (5, 2)]
    two_calls = 2 * (12 * 2 * 16**2 + 2 * 2**2 * 16) / 1e9  # over two latents
    assert results[2]['gflops'] - results[0]['gflops'] == pytest.approx(two_calls)


class Line(Method):
    """A latent space in which the tokens themselves are the coordinates, and token 3 is decoded wrongly."""
    has_latent_space = True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def reconstruct(self, x):
        return torch.where(x == 3, 4, x)

    def interpolate(self, x_a, x_b, weights):
        return torch.stack([((1 - w) * x_a + w * x_b).round().long() for w in weights])


def test_reconstruction_and_smoothness(tmp_path, monkeypatch, capsys):
    make('mdlm', 'out/l', dataset=prepare(tmp_path, 'set'))
    teacher, config = make('ar', 'out/a'), checkpoint.load('out/l/ckpt.pt')['config']
    monkeypatch.setattr(evaluation, 'open_model', lambda c, device: (Line(), {**config, 'step': 7}))
    capsys.readouterr()
    evaluation.main(['--out_dir=out/l', '--metrics=smoothness,reconstruction', '--teacher=out/a',
                     '--num_samples=50', '--batch_size=4', '--seed=1', '--device=cpu'])
    first, second = lines(capsys.readouterr().out)
    rows, n = evaluation.open_texts('', config, sample.open_tokenizer(config), CPU)
    x = rows(torch.arange(n))
    assert first['reconstruction'] == pytest.approx((x != 3).double().mean().item())
    assert first['num_texts'] == n
    pairs = n // 2  # fewer than asked for
    a, b = x[torch.randperm(n, generator=generator(1))[:2 * pairs].view(2, pairs)]
    points = [((1 - w) * a + w * b).round().long() for w in torch.linspace(0, 1, 11)]
    ppl = [math.exp(teacher.nll(point).mean().item() / L) for point in points]
    assert second['num_pairs'] == pairs and second['gen_ppl_path'] == pytest.approx(ppl, rel=1e-4)
    path = second['gen_ppl_path']
    assert second['smoothness'] == pytest.approx(max(path) / ((path[0] + path[-1]) / 2))
    assert second['points'][5] == 0.5 and 'teacher_weights' in second
    plot.main(['smoothness', 'out/l'])
    assert f'{second["smoothness"]:.3f}' in capsys.readouterr().out
    assert os.path.getsize('out/l/smoothness.png') > 1000


def test_ldlm(tmp_path, capsys):
    method = make('ldlm', 'out/l', dataset=prepare(tmp_path, 'set'))
    make('ar', 'out/a')
    capsys.readouterr()
    evaluation.main(['--out_dir=out/l', '--metrics=reconstruction,smoothness,gen_ppl', '--steps=2,4',
                     '--sampler=ddim', '--teacher=out/a', *ARGS])
    first, path, *samples = lines(capsys.readouterr().out)
    assert 0 <= first['reconstruction'] <= 1
    assert len(path['gen_ppl_path']) == len(path['entropy_sample_path']) == len(path['points']) == 11
    decoding = method.decoder[0].flops(L) + method.token_decoder[0].flops(L)
    assert [r['steps'] for r in samples] == [2, 4]
    assert samples[1]['gflops'] == pytest.approx((4 * method.flops(L) + decoding) / 1e9)
    with pytest.raises(UserError, match='LDLM has no likelihood'):
        evaluation.main(['--out_dir=out/l', *ARGS])
    make('ldlm', 'out/l', dataset=str(tmp_path / 'set'), stage='autoencoder', adaptive_bins=100)
    evaluation.main(['--out_dir=out/l', '--metrics=reconstruction', *ARGS])  # no denoiser is needed for that
    with pytest.raises(UserError, match='trains no denoiser'):
        evaluation.main(['--out_dir=out/l', '--metrics=entropy', *ARGS])


def test_other_texts(tmp_path, monkeypatch, capsys):
    for module in (lib.prepare, lib.tokens, sample):
        monkeypatch.setattr(module, 'DATA', str(tmp_path))
    prepare(tmp_path, 'set')
    prepare(tmp_path, 'zeroshot/ptb')
    prepare(tmp_path, 'zeroshot/other', 'bcdefghij')
    prepare(tmp_path, 'zeroshot/wrapped', wrap=True)
    make('mdlm', 'out/m', dataset='set')
    open('text.txt', 'w').write('abc def ' * 4)
    capsys.readouterr()
    evaluation.main(['--out_dir=out/m', '--data=zeroshot/ptb', *ARGS])
    evaluation.main(['--out_dir=out/m', '--data=text.txt', *ARGS])
    ptb, text = lines(capsys.readouterr().out)
    assert ptb['data'] == 'zeroshot/ptb' and text['num_texts'] == 32 // L
    x = torch.tensor(Char(CHARS, True).encode('abc def ' * 3)).view(2, L)
    nll = open_run('out/m', CPU)[0].nll(x, Noise(0, 0, torch.arange(2), 2)).mean().item() / L
    assert text['val_nll'] == pytest.approx(nll, rel=1e-5)
    for name in ('other', 'wrapped'):
        argv = ['--out_dir=out/m', f'--data=zeroshot/{name}', *ARGS]
        assert 'was not prepared as' in fails(evaluation, monkeypatch, capsys, *argv)


def test_text_files_are_wrapped_as_the_training_texts_were():
    open('text.txt', 'w').write('abcdef' * 4)
    tok = Char(CHARS, True)
    tok.wrap = True
    rows, n = evaluation.open_texts('text.txt', {**TINY, 'block_size': 8}, tok, CPU)
    assert n == 4 and rows(torch.tensor([1])).tolist() == [[tok.bos_id, *tok.encode('abcdef'), tok.eos_id]]


def test_the_encoder_has_to_be_that_of_training(tmp_path, monkeypatch, capsys):
    data, ar = prepare(tmp_path, 'set'), make('ar', 'out/a')
    config = dict(dataset=data, encoder='out/a', encoder_weights=checkpoint.fingerprint(ar))
    make('co', 'out/c', **config)
    make('co', 'out/s', **config, stored_latents=True)
    open('text.txt', 'w').write('abc def ' * 40)
    capsys.readouterr()
    evaluation.main(['--out_dir=out/c', *ARGS])
    evaluation.main(['--out_dir=out/s', *ARGS])  # evaluation reads the texts itself
    evaluation.main(['--out_dir=out/c', '--data=text.txt', *ARGS])
    a, b, c = (r['token_nll'] for r in lines(capsys.readouterr().out))
    assert a == b != c
    make('ar', 'out/a', num_layers=2)
    argv = ['--out_dir=out/c', *ARGS]
    assert 'other weights than the encoder' in fails(evaluation, monkeypatch, capsys, *argv)
    evaluation.main(['--out_dir=out/c', '--metrics=entropy', '--steps=2', *ARGS])  # samples need no encoder


def test_mauve(tmp_path, monkeypatch, capsys):
    """The package itself wants GPT-2 Large: here is what it is handed."""
    seen = {}

    def compute_mauve(**kwargs):
        seen.update(kwargs)
        return types.SimpleNamespace(mauve=0.5)
    make('mdlm', 'out/m', dataset=prepare(tmp_path, 'set'))
    monkeypatch.setitem(sys.modules, 'mauve', types.SimpleNamespace(compute_mauve=compute_mauve))
    capsys.readouterr()
    evaluation.main(['--out_dir=out/m', '--metrics=mauve', '--steps=2', *ARGS])
    assert lines(capsys.readouterr().out)[0]['mauve'] == 0.5
    assert len(seen['p_text']) == len(seen['q_text']) == 6
    assert seen['max_text_length'] == 1024 and seen['featurize_model_name'] == 'gpt2-large'
    monkeypatch.setitem(sys.modules, 'mauve', None)
    argv = ['--out_dir=out/m', '--metrics=mauve', *ARGS]
    assert 'pip install mauve-text' in fails(evaluation, monkeypatch, capsys, *argv)


def test_a_run_of_somebody_else(capsys, monkeypatch):
    """Its folder cannot be written: results are printed, and a frontier is drawn elsewhere."""
    make('mdlm', 'out/m')
    make('ar', 'out/a')
    monkeypatch.setattr(evaluation, 'append', lambda path, *records: append(
        path.replace('out/m/eval.jsonl', '/proc/nowhere/x'), *records))
    evaluation.main(['--out_dir=out/m', '--metrics=entropy', '--steps=2', *ARGS])
    out, err = capsys.readouterr()
    assert len(lines(out)) == 1 and 'results are printed, but not kept' in err
    evaluation.main(['out/m', '--steps=1,2', '--teacher=out/a', '--save=f.png', *ARGS])
    out = capsys.readouterr().out
    assert len(lines(out)) == 2 and '[1] out/m\n' in out and os.listdir('out/m') == ['ckpt.pt']


def test_a_result_is_kept_before_it_is_printed(monkeypatch):
    """As in `python eval.py ... | head -1`."""
    make('mdlm', 'out/m')

    def broken(*args, **kwargs):
        raise BrokenPipeError
    monkeypatch.setattr(evaluation, 'print', broken, raising=False)
    with pytest.raises(BrokenPipeError):
        evaluation.main(['--out_dir=out/m', '--metrics=entropy', '--steps=2', *ARGS])
    assert len(lines(open('out/m/eval.jsonl').read())) == 1


def test_no_diversity_of_texts_without_4_grams(capsys):
    make('mdlm', 'out/m', block_size=3)
    make('ar', 'out/a')
    evaluation.main(['--out_dir=out/m', '--metrics=diversity', '--steps=2', *ARGS])
    assert lines(capsys.readouterr().out)[0]['diversity'] is None
    evaluation.main(['out/m', '--steps=1', '--teacher=out/a', *ARGS])


@pytest.mark.parametrize('name', [*TINY_METHODS])
def test_a_batch_in_which_nothing_is_masked(name):
    """One text at an early time, as in any evaluation with batch_size=1."""
    method = make(name)
    if method.likelihood:
        x = torch.zeros(1, L, dtype=torch.int64)
        for seed in range(40):  # times are random: some mask nothing
            noise = Noise(seed, 0, torch.zeros(1, dtype=torch.int64), 1)
            assert all(part.isfinite().all() for part in method.nll_parts(x, noise).values())


def test_swd_is_sawtooths(capsys):
    make('mdlm', 'out/s', dataset='sawtooth', vocab_size=2, block_size=128)
    evaluation.main(['--out_dir=out/s', '--metrics=swd,val_ppl', '--val_seqs=8', '--steps=1', *ARGS])
    likelihood, samples = lines(capsys.readouterr().out)
    assert samples['swd'] > 0.05 and likelihood['num_texts'] == 8


@pytest.mark.parametrize('argv, match', [
    (['--out_dir=out/nothing'], 'holds no checkpoint'),
    (['config/m.py'], '--out_dir=out/m\n'),
    (['out/m/ckpt.pt'], '--out_dir=out/m\n'),
    (['--metrics=gen_pl'], 'did you mean gen_ppl'),
    (['--steps=1,x', '--metrics=entropy'], '--steps wants numbers'),
    (['--steps=0', '--metrics=entropy'], '--steps wants numbers'),
    (['--nll_draws=0'], 'nll_draws'),
    (['--val_seqs=-1'], 'val_seqs'),
    (['--strategy=seq'], "no strategy 'seq'"),
    (['--latent=none'], 'MDLM has no option latent\n'),
    (['--latent=nothing'], 'latent is one of generated, none, data, shuffled'),
    (['--out_dir=out/d', '--metrics=entropy', '--latent=none'], 'it works with strategy=seq'),
    (['--out_dir=out/d', '--metrics=entropy', '--latent=data', '--strategy=seq', '--val_seqs=3'],
     'there are 3: --num_samples=3'),
    (['--latent_steps=8,9'], 'no option latent_steps'),
    (['--latent_steps=x'], '--latent_steps wants numbers'),
    (['--temperature=-1'], 'temperature must be at least 0'),
    (['--metrics=reconstruction'], 'MDLM has no latent space'),
    (['--metrics=smoothness'], 'MDLM has no latent space'),
    (['--data=nowhere'], 'there is no prepared data'),
    (['--data=short.txt'], 'has 3 tokens'),
    (['--data=latin.txt'], 'not UTF-8'),
    (['--metrics=swd'], 'swd is a metric of sawtooth'),
    (['--metrics=gen_ppl', '--teacher=out/m'], 'MDLM, which has no exact likelihood'),
    (['--metrics=gen_ppl', '--teacher=out/none'], 'holds no checkpoint'),
    (['--metrics=gen_ppl', '--teacher=out/s'], 'nothing in common'),
    (['--out_dir=out/s', '--metrics=gen_ppl'], 'sawtooth has no text'),
    (['--out_dir=out/s', '--metrics=mauve'], 'sawtooth is not'),
    (['--out_dir=out/s', '--metrics=recited'], 'sawtooth is not'),
    (['--metrics=recited'], 'there is no prepared data'),
    (['--out_dir=out/v', '--metrics=recited'], 'has no train split'),
    (['--out_dir=out/v8', '--metrics=recited'], 'texts of 12 tokens at least'),
    (['--metrics=gen_ppl', '--teacher=broken'], 'cannot load the teacher broken'),
])
def test_mistakes(argv, match, tmp_path, monkeypatch, capsys):
    make('mdlm', 'out/m')
    make('ar', 'out/s', dataset='sawtooth', vocab_size=2)
    os.makedirs('broken')
    open('broken/config.json', 'w').write('{}')
    open('short.txt', 'w').write('abc')
    open('latin.txt', 'wb').write(b'\xe9')
    make('di', 'out/d', dataset='sawtooth', vocab_size=2)
    if argv[0].startswith('--out_dir=out/v'):
        data = prepare(tmp_path, 'set')  # validation texts alone
        make('mdlm', 'out/v', dataset=data)
        make('mdlm', 'out/v8', dataset=data, block_size=8)
        capsys.readouterr()
    named = argv[0].startswith(('--out_dir', 'config', 'out'))
    assert match in fails(evaluation, monkeypatch, capsys, *['--out_dir=out/m'] * (not named), *argv, *ARGS)


# ------------------------------------------------------------------------------------------------------------
# figures

def write_results(folder, rows, **settings):
    os.makedirs(folder, exist_ok=True)
    with open(f'{folder}/eval.jsonl', 'a') as f:
        for gflops, ppl in rows:
            f.write(json.dumps({'gflops': gflops, 'gen_ppl': ppl, 'seconds_per_sample': gflops / 10,
                                'entropy_position': 4.0, 'entropy_sample': 4.4, **settings}) + '\n')


def options(**given):
    return plot.frontier_options(types.SimpleNamespace(**{**defaults_of(plot.FrontierConfig), **given}))


def tables(text):
    """What frontier prints -> {title: {row: [cells]}}, the columns under the title itself."""
    found = {}
    for block in text.strip().split('\n\n')[1:]:
        rows = [line.split('  ') for line in block.splitlines()]
        rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
        found[rows[0][0]] = {'columns' if i == 0 else row[0]: row[1:] for i, row in enumerate(rows)}
    return found


def drawn(names, **options):
    """-> the tables of a frontier, and all that it prints."""
    out = io.StringIO()
    plot.frontier(plot.measured(names), 'f.png', out, **options)
    return tables(out.getvalue()), out.getvalue()


def test_frontier():
    write_results('a', [(40, 50.0), (10, 200.0), (20, 100.0)])
    write_results('b', [(30, 60.0), (15, 150.0), (30, 66.0)])  # measured again: the later one counts
    found, out = drawn(['a', 'b/'])
    assert out.startswith('[1] a\n[2] b\n\n')
    assert found['gen_ppl at gflops'] == {'columns': ['10', '20', '40'], '[1]': ['200', '100', '50'],
                                          '[2]': ['n/a', '122', 'n/a']}
    assert found['entropy_sample at gflops']['[2]'] == ['n/a', '4.4', 'n/a']
    assert 'diversity at gflops' not in found and os.path.getsize('f.png') > 1000
    found, _ = drawn(['a', 'b'], **options(gflops='15,30'))
    assert found['gen_ppl at gflops'] == {'columns': ['15', '30'], '[1]': ['150', '75'], '[2]': ['150', '66']}


def test_steps_are_not_interpolated():
    write_results('a', [(10, 200.0)], steps=1)
    write_results('a', [(30, 100.0)], steps=3)
    write_results('b', [(20, 150.0)], steps=2)
    assert drawn(['a', 'b'])[0]['gen_ppl at steps'] == {
        'columns': ['1', '2', '3'], '[1]': ['200', 'n/a', '100'], '[2]': ['n/a', '150', 'n/a']}


def test_seeds_are_one_curve():
    write_results('a', [(10, 200.0), (20, 100.0)], step=5)
    write_results('a_seed1', [(10, 220.0), (20, 110.0), (30, 50.0)], step=5)
    write_results('a_seed2', [(10, 999.0)], step=4)  # not yet trained to the end
    found = plot.curves(plot.measured(['a', 'a_seed1', 'a_seed2']))
    assert {k: len(v) for k, v in found.items()} == {'a, step 5 (2 seeds)': 2, 'a, step 4': 1}

    runs = found['a, step 5 (2 seeds)']

    def at(gflops):
        return plot.mean_and_deviation(plot.values_at(runs, 'gflops', gflops, 'gen_ppl'))
    assert at(10) == pytest.approx((210, 200**0.5)) and at(15)[0] == pytest.approx(157.5)
    assert at(30)[0] == 50 and math.isnan(at(30)[1]) and math.isnan(at(31)[0])
    assert drawn(['a', 'a_seed1'])[0]['gen_ppl at gflops']['[1]'] == ['210±14', '105±7.1', '50']


def test_a_curve_is_mean_and_range():
    _, ax = plot.plt.subplots()
    plot.curve(ax, [1, 2, 3], [[4.0, 1.0, 1.0], [5.0], []], label='three runs')
    line, _, (bars,) = ax.containers[0]
    assert line.get_ydata().tolist()[:2] == [2.0, 5.0] and math.isnan(line.get_ydata()[2])
    assert [segment[:, 1].tolist() for segment in bars.get_segments()[:2]] == [[1.0, 4.0], [5.0, 5.0]]
    plot.plt.close('all')


def test_seconds_are_points_and_every_line_has_a_legend(monkeypatch):
    """Also of seeds that were timed with other numbers of threads."""
    write_results('a', [(10, 200.0), (20, 100.0)], device='cpu (1 threads)')
    write_results('a_seed1', [(10, 220.0), (20, 120.0)], device='cpu (2 threads)')
    figures = []
    monkeypatch.setattr(plot, 'save', lambda figure, path: figures.append(figure))
    drawn(['a', 'a_seed1'])
    gen_ppl, timed, entropy, _ = figures[0].axes
    line, = (c[0] for c in gen_ppl.containers)
    assert line.get_xydata().tolist() == [[10, 210.0], [20, 110.0]]
    assert [p.get_linestyle() for p in timed.lines] == ['None']
    assert timed.lines[0].get_xydata().tolist() == [[1, 200], [2, 100], [1, 220], [2, 120]]
    legends = [[t.get_text() for t in ax.get_legend().get_texts()] for ax in figures[0].axes[1::2]]
    assert legends == [['a (2 seeds)'], ['within a sample', 'of a position']] and len(entropy.containers) == 2


def test_other_settings_are_another_curve():
    write_results('a', [(10, 200.0)], strategy='joint', temperature=1.0)
    write_results('a', [(10, 100.0), (20, 50.0)], strategy='seq', temperature=1.0)
    lengths = {k: [len(run) for run in runs] for k, runs in plot.curves(plot.measured(['a'])).items()}
    assert lengths == {'a, strategy joint': [1], 'a, strategy seq': [2]}


@pytest.mark.parametrize('name, L, layers, hidden', [('lm1b', 128, 13, 1024), ('owt', 512, 13, 1024)])
def test_the_papers_tables(name, L, layers, hidden):
    paper = options(paper=name)['paper']
    for row in paper['rows'].values():
        assert len(row['gen_ppl']) == len(row['entropy']) == len(paper['gflops'])
    call = round(layers * (12 * L * hidden**2 + 2 * L**2 * hidden) / 1e9, 2)
    assert paper['rows']['MDLM']['gflops_per_call'] == call
    for label, row in paper['rows'].items():
        if label != 'MDLM':
            S = L + int(label.split('-')[2].split()[0])
            assert row['gflops_per_call'] == round(12 * (12 * S * 768**2 + 2 * S**2 * 768) / 1e9, 2)
    write_results('a', [(40, 50.0), (100, 20.0)])
    found, _ = drawn(['a'], paper=paper)
    assert 'MDLM' not in found['gen_ppl at gflops'] and len(found['entropy at gflops, the paper']) == 8


def test_a_frontier_measures_what_is_missing(monkeypatch, capsys):
    make('ar', 'out/a')
    make('mdlm', 'out/m')
    make('di', 'out/d')
    args = ['--teacher=out/a', '--num_samples=6', '--batch_size=4', '--device=cpu']

    def sweep(*argv):
        evaluation.main([*argv, *args])
        out = capsys.readouterr().out
        return lines(out), out
    new, out = sweep('out/m', 'out/d', 'out/a', '--steps=1,2', '--results=all.jsonl')
    assert len(new) == 2 + 4 + 1 and os.path.getsize('out/m/frontier.png') > 1000
    assert '[1] out/m\n' in out and '[3] out/d, strategy seq, latent_steps 8\n' in out
    assert len(lines(open('all.jsonl').read())) == 7
    new, _ = sweep('out/m', 'out/d', '--steps=1,2,4', '--strategies=joint', '--save=f.png')  # a longer sweep
    assert [(r['model'], r['steps']) for r in new] == [('out/m', 4), ('out/d', 4)] and os.path.exists('f.png')
    make('mdlm', 'out/m_seed1', hidden=32)
    kept = open('all.jsonl').read()
    assert 'all.jsonl holds results' in fails(evaluation, monkeypatch, capsys, 'out/m', *args,
                                              '--results=all.jsonl')
    assert open('all.jsonl').read() == kept
    sweep('out/m', 'out/d', 'out/a', 'all.jsonl', '--steps=1,2', '--results=all.jsonl')
    assert open('all.jsonl').read() == kept
    # a seed added later, beside runs that may be gone
    new, out = sweep('out/m_seed1', 'all.jsonl', '--steps=1,2')
    assert len(new) == 2 and '[1] out/m (2 seeds)' in out
    # trained anew: the old results are of other weights
    make('mdlm', 'out/m', schedule='polynomial', num_layers=2)
    assert len(sweep('out/m', '--steps=2')[0]) == 1
    make('ar', 'out/a', num_layers=2)  # another teacher
    assert len(sweep('out/m', '--steps=2')[0]) == 1
    monkeypatch.setattr(evaluation, 'evaluate', lambda argv: pytest.fail('measured again'))
    sweep('out/m', '--steps=2', '--time=cpu')


def test_latent_steps_are_curves_of_a_frontier(capsys):
    make('ar', 'out/a')
    make('co', 'out/c')
    evaluation.main(['out/c', '--strategies=seq', '--latent_steps=2,3', '--steps=1', '--teacher=out/a',
                     *ARGS])
    out = capsys.readouterr().out
    assert [r['latent_steps'] for r in lines(out)] == [2, 3]
    assert '[1] out/c, latent_steps 2\n[2] out/c, latent_steps 3\n' in out


def test_controls_are_curves_of_a_frontier(tmp_path, monkeypatch, capsys):
    """Without a latent, and with those of texts; methods without latents have their one curve."""
    data = prepare(tmp_path, 'set')
    for name in ('mdlm', 'ar'):
        make(name, 'out/' + name)
    di, co, ldlm = (make(name, 'out/' + name, dataset=data) for name in ('di', 'co', 'ldlm'))
    capsys.readouterr()
    runs = ['out/mdlm', 'out/di', 'out/co', 'out/ldlm']
    argv = [*runs, '--latent=generated,none,data,shuffled', '--steps=1,2', '--teacher=out/ar', *ARGS]
    evaluation.main(argv)
    out = capsys.readouterr().out
    with monkeypatch.context() as patch:  # all of that is known
        patch.setattr(evaluation, 'evaluate', lambda argv: pytest.fail('measured again'))
        patch.setattr(plot, 'frontier', lambda *args, **options: None)
        evaluation.main(argv)
    for label in ('out/mdlm', *(f'out/{name}, strategy {s}' for name in ('di', 'co') for s in (
            'joint', 'seq, latent_steps 8', 'seq, latent none', 'seq, latent data', 'seq, latent shuffled')),
            'out/ldlm', 'out/ldlm, latent data'):
        assert f'] {label}\n' in out
    results = {(r['model'], r.get('strategy'), r.get('latent'), r['steps']): r
               for name in runs for r in plot.gen_ppls(name)}
    assert len(results) == 2 + 10 + 10 + 3
    config = checkpoint.load('out/di/ckpt.pt')['config']
    x = sample.open_texts('', config, sample.open_tokenizer(config), CPU)[0](torch.arange(6))
    for name, method in (('out/di', di), ('out/co', co)):
        with torch.no_grad():
            z_0 = method.latents_of(x)
        for latent, given in (('none', {}), ('data', {'z_0': z_0}),
                              ('shuffled', {'z_0': sample.shuffled(z_0, seed=0)})):
            r = results[name, 'seq', latent, 2]
            samples = sample.generate(method, 6, 2, 4, 0, strategy='seq', latent=latent, **given)
            assert r['entropy_sample'] == evaluation.entropies(samples)['entropy_sample']
            assert r['gflops'] == 2 * method.flops(L) / 1e9 and 'latent_steps' not in r
            assert r.get('data') == (None if latent == 'none' else data)
    r = results['out/ldlm', None, 'data', None]
    assert r['entropy_sample'] == evaluation.entropies(ldlm.reconstruct(x))['entropy_sample']
    assert r['gflops'] == ldlm.sampling_flops(L, 0, sampler='ddim') / 1e9 and 'sampler' not in r
    sample.main(['--out_dir=out/ldlm', '--latent=data', '--num_samples=6', '--save=x.npy', '--device=cpu'])
    assert (np.load('x.npy') == ldlm.reconstruct(x).numpy()).all()


@pytest.mark.parametrize('argv, match', [
    (['out/m', '--latent=nothing'], 'of generated, none, data, shuffled one or several'),
    (['out/m', '--latent=none'], 'none of the strategies joint,seq with latent=none'),
    ([], 'name one model'),
    (['out/none'], 'holds no checkpoint'),
    (['out/m', '--strategies=seq'], 'none of the strategies'),
    (['out/m', '--teacher=out/m'], 'no exact likelihood'),
    (['out/m', '--steps=0'], '--steps wants'),
    (['out/m', '--paper=ptb'], 'lm1b and owt'),
    (['out/m', '--time=late'], 'wall, cpu'),
    (['out/m', '--gflops=few'], '--gflops wants'),
    (['out/m', '--results=x'], '.jsonl'),
    (['out/m', '--save=x'], '.png, .pdf or .svg'),
    (['out/m', '--save=x.doc'], '.png, .pdf or .svg'),
    (['out/m', '--gflops=0,1'], '--gflops wants'),
    (['out/m', '--steps=1,9999999'], 'at most 1000000'),
    (['none.jsonl', '--teacher=out/a'], 'none.jsonl holds no Gen PPL'),
    (['out/m', '--num_samples=0'], 'at least 1'),
    (['out/m', '--metrics=val_ppl'], '--out_dir=out/m'),
])
def test_mistakes_at_the_frontier(argv, match, monkeypatch, capsys):
    make('mdlm', 'out/m')
    make('ar', 'out/a')
    argv = [*argv, '--device=cpu', *['--teacher=out/a'] * ('--teacher=out/m' not in argv)]
    assert match in fails(evaluation, monkeypatch, capsys, *argv)


@pytest.mark.parametrize('record', [
    [1], {'gen_ppl': 'high'}, {'gen_ppl': 3.0}, {'gen_ppl': 3.0, 'gflops': 1}, {'gen_ppl': [3.0]},
    {'gflops': [1]}, {'steps': '1'}, {'model': 3}, {'sampler': ['x']}, {'teacher': {}}, {'seed': {}},
    {'temperature': 'hot'}, {'diversity': 'much'}, {'compile': 'no'}])
@pytest.mark.parametrize('kind', ['frontier', 'log', 'smoothness'])
def test_lines_of_somebody_else(record, kind):
    """What is JSON, but no result of ours: one line about it."""
    os.mkdir('a')
    good = {'model': 'a', 'gen_ppl': 3.0, 'gflops': 1, 'step': 1, 'loss': 'low', 'smoothness': 'low'}
    record = {**good, **record} if isinstance(record, dict) and 'gen_ppl' not in record else record
    for name in 'eval', 'log':
        open(f'a/{name}.jsonl', 'w').write(json.dumps(record) + '\n')
    name = 'a/eval.jsonl' if kind == 'frontier' else 'a'
    with pytest.raises(UserError):
        plot.main([kind, name])
    assert len(os.listdir('a')) == 2
    plot.plt.close('all')


@pytest.mark.parametrize('points, path', [(None, [1.0]), ([0.0], 'x'), ([0.0], [1.0, 2.0]), ([[0.0]], [1.0])])
def test_a_smoothness_of_somebody_else(points, path):
    os.mkdir('a')
    open('a/eval.jsonl', 'w').write(json.dumps({'points': points, 'gen_ppl_path': path}) + '\n')
    with pytest.raises(UserError, match='no result of eval.py'):
        plot.main(['smoothness', 'a'])


def test_smoothness_that_is_not_a_number(capsys):
    os.mkdir('a')
    open('a/eval.jsonl', 'w').write('{"points": [0, 1], "gen_ppl_path": [null, 2.0], "smoothness": null}\n')
    plot.main(['smoothness', 'a'])
    assert 'a: nan' in capsys.readouterr().out


@pytest.mark.parametrize('name, drawn', [
    ('out/a', 'out/a'), ('_a', ' _a'), ('a$x^2$', r'a\$x^2\$'), ('\u4e2d\n', r'\u4e2d\n'),
    ('\udcff', r'\udcff'), ('é', 'é')])
@pytest.mark.filterwarnings('error::UserWarning')
def test_names_are_drawn_as_they_are(name, drawn):
    assert plot.literally(name) == drawn
    os.makedirs(name, exist_ok=True)
    open(f'{name}/log.jsonl', 'w').write('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    plot.main(['log', name, '--save=f.png'])
    figure, ax = plot.plt.subplots()
    ax.plot([1], [2], label=plot.literally(name))
    text, = ax.legend().get_texts()
    assert text.get_text() == drawn and not is_math_text(drawn)
    plot.plt.close(figure)


def test_loss_curves(monkeypatch, capsys):
    os.makedirs('a')
    save, figures = plot.save, []
    monkeypatch.setattr(plot, 'save', lambda figure, path: (figures.append(figure), save(figure, path)))
    with open('a/log.jsonl', 'w') as f:
        f.write('{"step": 1, "loss": 3.0, "tokens": 40, "tokens_per_s": 4}\n'
                '{"step": 2, "loss": null, "tokens": 80, "tokens_per_s": 8}\n'
                '{"step": 2, "val_loss": 2.5, "val_ppl": 12.2}\n{"step": 3, "lo')
    plot.main(['log', 'a'])
    assert '2.5000 nats per token at step 2, best 2.5000; 15 seconds of' in capsys.readouterr().out
    assert os.path.getsize('a/log.png') > 1000
    objective, validation = figures[0].axes  # they have no axis in common
    for ax, points in (objective, [[1, 3.0]]), (validation, [[2, 2.5]]):
        assert [line.get_xydata().tolist() for line in ax.lines] == [points]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ['a']


@pytest.mark.parametrize('argv, match', [
    ([], 'lib.plot log'), (['frontier'], 'lib.plot log'), (['front', 'a'], 'lib.plot log'),
    (['log', 'a'], 'no log.jsonl'), (['frontier', 'a'], 'no Gen PPL yet'),
    (['smoothness', 'a'], 'no smoothness yet'), (['log', 'a', '--sav=x'], 'did you mean save'),
    (['log', 'a', '--paper=lm1b'], 'unknown key paper'),
    (['log', 'b', '--save=b/log.jsonl/x.png'], 'cannot write'),
    (['log', 'b', '--save=x.doc'], '.png, .pdf or'), (['log', 'b', '--save=x'], '.png, .pdf or'),
])
def test_mistakes_in_plotting(argv, match, monkeypatch, capsys):
    os.makedirs('b')
    open('b/log.jsonl', 'w').write('{"step": 1, "val_loss": 3.0}\n')
    monkeypatch.setattr(plot, 'print', lambda *args, **kwargs: None, raising=False)
    assert match in fails(plot, monkeypatch, capsys, *argv)


def test_eval_remains_the_name_of_the_builtin():
    root = pathlib.Path(evaluation.__file__).parent
    for path in [*root.glob('*.py'), *root.glob('tests/*.py'), *root.glob('lib/*.py')]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert 'eval' not in [name.asname or name.name for name in node.names], path
