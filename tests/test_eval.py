import functools
import io
import itertools
import json
import math
import os
import sys
import types

import pytest
import torch

from lib import checkpoint
import eval
import frontier
import mdlm
from lib import plot
import sample
from lib.configurator import UserError
from lib import prepare as common
from lib.tokens import Char
from sawtooth import Exact, Sawtooth
from test_sample import CHARS, L, TINY, fails, make, there  # noqa: F401


def lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith('{')]


# --- likelihood -------------------------------------------------------------------------------------------------------------------

class ExactMDLM(torch.nn.Module):
    """MDLM on sawtooth whose network knows the answers."""

    def __init__(self):
        super().__init__()
        self.exact, self.weight = Exact(), torch.nn.Parameter(torch.zeros(()))

    def nll(self, x, noise):
        t = noise.times('t_x')
        mask = noise.uniform('mask', x.shape[1]) < t[:, None]
        nats = torch.zeros(x.shape)
        nats[mask] = torch.nn.functional.cross_entropy(self.exact.denoise(x.masked_fill(mask, 2), mask), x[mask], reduction='none')
        return nats.sum(dim=1) / t


def test_the_exact_denoiser_has_the_entropy_of_sawtooth():
    r = eval.likelihood(ExactMDLM(), Sawtooth('val').rows, 3000, 128, batch_size=500, draws=2)
    assert r['val_nll_se'] < 0.01 and abs(r['val_nll'] - 0.5303) < 4 * r['val_nll_se']
    assert r['val_ppl'] == pytest.approx(math.exp(r['val_nll']))


def by_brute_force(method, x):
    """-log p(x) and the ELBO of a method whose network sees no time, x (L,): tokens are revealed one by one, in every order."""
    def nats(hidden, l):
        x_t, where = x.clone(), torch.zeros(1, len(x), dtype=torch.bool)
        x_t[list(hidden)], where[0, l] = method.mask_id, True
        return -method.denoise(x_t[None], where).double().log_softmax(dim=-1)[0, x[l]].item()

    @functools.lru_cache(None)
    def p(hidden):
        return sum(math.exp(-nats(hidden, l)) * p(hidden - {l}) for l in hidden) / len(hidden) if hidden else 1.0

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
        r = eval.likelihood(method, lambda idx: x.expand(len(idx), -1), 2000, length, 2000)
        assert least <= mean and r['val_nll'] * length > least - 4 * r['val_nll_se'] * length
        assert abs(r['val_nll'] * length - mean) < 4 * r['val_nll_se'] * length
    means = []
    for seed in range(5):  # all texts at once
        r = eval.likelihood(method, lambda idx: texts[idx % len(texts)], 100 * len(texts), length, 5000, seed=seed)
        means.append(r['val_nll'] * length)
        assert abs(means[-1] - sum(elbo) / len(elbo)) < 3 * r['val_nll_se'] * length
    assert torch.tensor(means).std() < 2 * r['val_nll_se'] * length and len(set(means)) == 5


@pytest.mark.parametrize('name', ['mdlm', 'co', 'di', 'ar'])
def test_batches_change_nothing(name):
    method, texts = make(name), torch.randint(10, (23, L), generator=torch.Generator().manual_seed(0))
    a, b = (eval.likelihood(method, texts.__getitem__, 23, L, size, seed=3, draws=2) for size in (4, 23))
    assert a == pytest.approx(b, rel=1e-5) and len(a) > 2


def test_channels_of_ladd():
    texts = torch.randint(10, (40, L), generator=torch.Generator().manual_seed(0))
    method = make('di')
    joint, seq = (eval.likelihood(method, texts.__getitem__, 40, L, 40, strategy=s) for s in ('joint', 'seq'))
    for r in (joint, seq):
        assert r['val_nll'] == pytest.approx(r['token_nll'] + r['latent_nll']) and r['latent_nll'] > 0
    assert joint['val_nll'] == pytest.approx(method.nll(texts, eval.Noise(0, 0, torch.arange(40), 40)).mean().item() / L, rel=1e-5)
    assert joint['token_nll'] != seq['token_nll']
    assert eval.likelihood(make('co'), texts.__getitem__, 40, L, 40).keys() == {'token_nll', 'token_nll_se', 'token_ppl'}


def test_ar_is_exact():
    method = make('ar', vocab_size=2, block_size=4)
    texts = torch.cartesian_prod(*[torch.arange(2)] * 4)
    nll = [eval.likelihood(method, lambda idx: x.expand(len(idx), -1), 2, 4, 2, seed=i)['val_nll'] * 4 for i, x in enumerate(texts)]
    assert sum(math.exp(-v) for v in nll) == pytest.approx(1, rel=1e-5)


# --- metrics of samples -----------------------------------------------------------------------------------------------------------

def test_both_entropies():
    x = torch.tensor([[0, 0, 1, 1], [0, 2, 3, 4]])
    assert eval.entropies(x) == pytest.approx({'entropy_position': 3 / 4 * math.log(2), 'entropy_sample': (math.log(2) + math.log(4)) / 2})


def test_diversity():
    x = [[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]]
    expected = 1.0
    for n in (2, 3, 4):
        grams = [tuple(row[i:i + n]) for row in x for i in range(len(row) - n + 1)]
        expected *= len(set(grams)) / len(grams)
    assert eval.diversity(torch.tensor(x)) == pytest.approx(expected) == pytest.approx((5 / 8) * (5 / 6) * 1)


def test_gflops_of_a_sample():
    m, co, di = make('mdlm'), make('co'), make('di')
    call = 12 * L * 16**2 + 2 * L**2 * 16
    big = 12 * (L + 2) * 16**2 + 2 * (L + 2) ** 2 * 16  # two latents
    small = 12 * 2 * 16**2 + 2 * 2**2 * 16
    seq = {'strategy': 'seq', 'latent_steps': 8}
    for method, calls, options, flops in [(m, 5, {'sampler': 'ancestral'}, 5 * call), (m, L, {'sampler': 'first_hitting'}, L * call),
                                          (make('ar'), None, {}, call), (co, 5, {'strategy': 'joint'}, 5 * big),
                                          (co, 5, seq, 5 * big + 8 * small), (di, 5, seq, 13 * big)]:
        assert eval.sampling_gflops(method, L, calls, options) == pytest.approx(flops / 1e9)


# --- teachers ---------------------------------------------------------------------------------------------------------------------

ALPHABET = [*CHARS.replace('g', ''), '<unk>', '<eos>']


@pytest.fixture
def gpt2(tmp_path):
    """A GPT-2 with random weights and a tokenizer of characters, in a folder."""
    import tokenizers
    import transformers
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token='<unk>'))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
    tok.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<eos>', unk_token='<unk>').save_pretrained(tmp_path / 'gpt2')
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(ALPHABET), n_positions=8, n_embd=16, n_layer=1, n_head=2,
                                                                 initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path / 'gpt2')
    return model


@torch.no_grad()
def test_gen_ppl_with_a_hugging_face_teacher(gpt2):
    tok = Char(CHARS, True)
    x = torch.stack([torch.tensor(tok.encode('abc def\nabcd')), torch.tensor([*tok.encode('fab'), tok.eos_id, *tok.encode('g cafe f')])])
    score, says = eval.open_teacher('gpt2', TINY, tok, torch.device('cpu'))
    nats, tokens = 0.0, 0
    for text in (list('abc def\nabcd'), ['f', 'a', 'b', '<eos>', '<unk>', *' cafe f']):
        ids = [ALPHABET.index(c) for c in text]
        for window in (ids[:8], ids[8:]):  # its context is 8
            logp = gpt2(torch.tensor([window])).logits[0].double().log_softmax(dim=-1)
            nats -= sum(logp[i, window[i + 1]].item() for i in range(len(window) - 1))
            tokens += len(window) - 1
    assert score(x) == pytest.approx((nats, tokens), rel=1e-5)
    assert tokens == 2 * (7 + 3) and 'first token of each not scored' in says['gen_ppl_rule']
    assert score(x.repeat(5, 1)) == pytest.approx((5 * nats, 5 * tokens), rel=1e-5)  # more than a batch
    import transformers
    transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=len(ALPHABET), hidden_size=16, n_layer=1, n_head=2)).save_pretrained('gpt2')
    score, says = eval.open_teacher('gpt2', TINY, tok, torch.device('cpu'))  # states no limit of its context
    assert 'windows of 1024' in says['gen_ppl_rule'] and score(x)[1] == 2 * 11


@torch.no_grad()
def test_gen_ppl_with_our_ar():
    teacher, tok = make('ar', 'out/a'), Char(CHARS, True)
    x = torch.randint(10, (5, L), generator=torch.Generator().manual_seed(0))
    score, says = eval.open_teacher('out/a', TINY, tok, torch.device('cpu'))
    assert score(x) == pytest.approx((teacher.nll(x).sum().item(), 5 * L), rel=1e-5) and 'all tokens scored' in says['gen_ppl_rule']
    # another vocabulary: by way of the text, in windows of its block size, EOS becoming its EOS
    chars = CHARS[::-1] + 'xyz'
    other = make('ar', 'out/b', block_size=7, vocab_size=len(chars) + 1, tokenizer={'kind': 'char', 'chars': chars, 'eos': True})
    ids = torch.tensor([[chars.index(CHARS[i]) if i < 9 else len(chars) for i in row] for row in x.tolist()])
    score, _ = eval.open_teacher('out/b', TINY, tok, torch.device('cpu'))
    assert score(x) == pytest.approx(((other.nll(ids[:, :7]) + other.nll(ids[:, 7:])).sum().item(), 5 * L), rel=1e-5)


# --- the command line -------------------------------------------------------------------------------------------------------------

ARGS = ['--device=cpu', '--num_samples=6', '--batch_size=4']


def prepare(tmp_path, name, chars=CHARS, **options):
    """A prepared set of random characters, outside of data/."""
    g = torch.Generator().manual_seed(0)
    text = ''.join(chars[i] for i in torch.randint(9, (600,), generator=g)) + chars
    common.write(str(tmp_path / name), {'val': lambda: iter([(text[:300], True), (text[300:], True)])}, 'char', **options)
    return str(tmp_path / name)


def test_every_result_is_one_object_here_and_in_the_file(tmp_path, capsys):
    data = prepare(tmp_path, 'set')
    make('di', 'out/d', dataset=data)
    make('ar', 'out/a', dataset=data)
    capsys.readouterr()
    eval.main(['--out_dir=out/d', '--metrics=val_ppl,gen_ppl,diversity,throughput', '--steps=1,4', '--strategy=seq', '--teacher=out/a', '--plot', *ARGS])
    out, err = capsys.readouterr()
    results = lines(out)
    assert results == lines(open('out/d/eval.jsonl').read()) and len(results) == 3 == len(out.splitlines())
    first, *rest = results
    assert first['num_texts'] == (600 + 9 + 2) // L and first['val_ppl'] >= first['token_ppl'] and 'no bound' in first['token_ppl_is']
    assert [r['steps'] for r in rest] == [1, 4]
    for r in rest:
        assert {'gen_ppl', 'entropy_position', 'entropy_sample', 'diversity', 'gflops', 'teacher', 'teacher_weights', 'weights', 'teacher_dtype', 'gen_ppl_rule', 'eos', 'num_samples', 'seed',
                'step', 'dtype', 'strategy', 'latent_steps', 'sampler', 'temperature', 'top_p', 'batch_size', 'command', 'device', 'cpu_seconds_per_sample'} <= r.keys()
        assert r['samples_per_s_per_gen_ppl'] == pytest.approx(1 / r['seconds_per_sample'] / r['gen_ppl'])
        x = sample.generate(checkpoint.load_method('out/d', 'cpu')[0], 6, r['steps'], 4, 0, strategy='seq')
        assert r['diversity'] == eval.diversity(x) and r['entropy_sample'] == eval.entropies(x)['entropy_sample']  # what it says repeats it
    assert 'gen_ppl' in err and err.count('\n') >= 4 and os.path.getsize('out/d/frontier.png') > 1000
    eval.main(['--out_dir=out/d', '--metrics=entropy', '--steps=2', *ARGS])
    assert len(lines(open('out/d/eval.jsonl').read())) == 4


def test_samplers_for_which_steps_has_no_say(tmp_path, capsys):
    make('ar', 'out/a')
    make('mdlm', 'out/m')
    eval.main(['--out_dir=out/a', '--metrics=entropy', '--steps=1,2,4', *ARGS])
    eval.main(['--out_dir=out/m', '--metrics=entropy', '--steps=1,2,4', '--sampler=first_hitting', *ARGS])
    assert [r['steps'] for r in lines(capsys.readouterr().out)] == [None, L]


def test_latent_steps_are_swept(capsys):
    make('co', 'out/c')
    eval.main(['--out_dir=out/c', '--metrics=entropy', '--strategy=seq', '--steps=1,2', '--latent_steps=3,5', *ARGS])
    results = lines(capsys.readouterr().out)
    assert [(r['latent_steps'], r['steps']) for r in results] == [(3, 1), (3, 2), (5, 1), (5, 2)]
    assert results[2]['gflops'] - results[0]['gflops'] == pytest.approx(2 * (12 * 2 * 16**2 + 2 * 2**2 * 16) / 1e9)  # two calls over two latents


class Line(torch.nn.Module):
    """A latent space in which the tokens themselves are the coordinates, and token 3 is decoded wrongly."""

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
    monkeypatch.setattr(eval, 'open_model', lambda c, device: (Line(), {**config, 'step': 7}))
    monkeypatch.setattr(eval, 'variants', lambda c, method: [{}])
    capsys.readouterr()
    eval.main(['--out_dir=out/l', '--metrics=smoothness,reconstruction', '--teacher=out/a', '--num_samples=50', '--batch_size=4', '--seed=1', '--device=cpu'])
    first, second = lines(capsys.readouterr().out)
    rows, n = eval.open_texts('', config, sample.open_tokenizer(config))
    x = rows(torch.arange(n))
    assert first['reconstruction'] == pytest.approx((x != 3).double().mean().item()) and first['num_texts'] == n
    pairs = n // 2  # fewer than asked for
    ends = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:2 * pairs].view(2, pairs)
    nll = [teacher.nll(((1 - w) * x[ends[0]] + w * x[ends[1]]).round().long()).mean().item() / L for w in torch.linspace(0, 1, 11)]
    assert second['num_pairs'] == pairs and second['gen_ppl_path'] == pytest.approx([math.exp(v) for v in nll], rel=1e-4)
    path = second['gen_ppl_path']
    assert second['smoothness'] == pytest.approx(max(path) / ((path[0] + path[-1]) / 2)) and second['points'][5] == 0.5 and 'teacher_weights' in second
    plot.main(['smoothness', 'out/l'])
    assert f'{second["smoothness"]:.3f}' in capsys.readouterr().out and os.path.getsize('out/l/smoothness.png') > 1000


def test_ldlm(tmp_path, capsys):
    method = make('ldlm', 'out/l', dataset=prepare(tmp_path, 'set'))
    make('ar', 'out/a')
    capsys.readouterr()
    eval.main(['--out_dir=out/l', '--metrics=reconstruction,smoothness,gen_ppl', '--steps=2,4', '--sampler=ddim', '--teacher=out/a', *ARGS])
    first, path, *samples = lines(capsys.readouterr().out)
    assert 0 <= first['reconstruction'] <= 1 and len(path['gen_ppl_path']) == len(path['entropy_sample_path']) == len(path['points']) == 11
    assert [r['steps'] for r in samples] == [2, 4] and samples[1]['gflops'] == pytest.approx((4 * method.flops(L) + method.flops_once(L)) / 1e9)
    with pytest.raises(UserError, match='ldlm has no likelihood'):
        eval.main(['--out_dir=out/l', *ARGS])


def test_other_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, 'DATA', str(tmp_path))
    monkeypatch.setattr(sample, 'DATA', str(tmp_path))
    prepare(tmp_path, 'set')
    prepare(tmp_path, 'zeroshot/ptb')
    prepare(tmp_path, 'zeroshot/other', 'bcdefghij')
    prepare(tmp_path, 'zeroshot/wrapped', wrap=True)
    make('mdlm', 'out/m', dataset='set')
    open('text.txt', 'w').write('abc def ' * 4)
    capsys.readouterr()
    eval.main(['--out_dir=out/m', '--data=zeroshot/ptb', *ARGS])
    eval.main(['--out_dir=out/m', '--data=text.txt', *ARGS])
    ptb, text = lines(capsys.readouterr().out)
    assert ptb['data'] == 'zeroshot/ptb' and text['num_texts'] == 32 // L
    x = torch.tensor(Char(CHARS, True).encode('abc def ' * 3)).view(2, L)
    method = checkpoint.load_method('out/m', 'cpu')[0]
    assert text['val_nll'] == pytest.approx(method.nll(x, eval.Noise(0, 0, torch.arange(2), 2)).mean().item() / L, rel=1e-5)
    for name in ('other', 'wrapped'):
        assert 'was not prepared as' in fails(eval, monkeypatch, capsys, '--out_dir=out/m', f'--data=zeroshot/{name}', *ARGS)


def test_text_files_are_wrapped_as_the_training_texts_were():
    open('text.txt', 'w').write('abcdef' * 4)
    tok = Char(CHARS, True)
    tok.wrap = True
    rows, n = eval.open_texts('text.txt', {**TINY, 'block_size': 8}, tok)
    assert n == 4 and rows(torch.tensor([1])).tolist() == [[tok.bos_id, *tok.encode('abcdef'), tok.eos_id]]


def test_mauve(tmp_path, monkeypatch, capsys):
    """The package itself wants GPT-2 Large: here is what it is handed."""
    seen = {}

    def compute_mauve(**kwargs):
        seen.update(kwargs)
        return types.SimpleNamespace(mauve=0.5)
    make('mdlm', 'out/m', dataset=prepare(tmp_path, 'set'))
    monkeypatch.setitem(sys.modules, 'mauve', types.SimpleNamespace(compute_mauve=compute_mauve))
    capsys.readouterr()
    eval.main(['--out_dir=out/m', '--metrics=mauve', '--steps=2', *ARGS])
    assert lines(capsys.readouterr().out)[0]['mauve'] == 0.5
    assert len(seen['p_text']) == len(seen['q_text']) == 6 and seen['max_text_length'] == 1024 and seen['featurize_model_name'] == 'gpt2-large'
    monkeypatch.setitem(sys.modules, 'mauve', None)
    assert 'pip install mauve-text' in fails(eval, monkeypatch, capsys, '--out_dir=out/m', '--metrics=mauve', *ARGS)


def test_swd_is_sawtooths(capsys):
    make('mdlm', 'out/s', dataset='sawtooth', vocab_size=2, block_size=128)
    eval.main(['--out_dir=out/s', '--metrics=swd,val_ppl', '--val_seqs=8', '--steps=1', *ARGS])
    likelihood, samples = lines(capsys.readouterr().out)
    assert samples['swd'] > 0.05 and likelihood['num_texts'] == 8


@pytest.mark.parametrize('argv, match', [
    (['--out_dir=out/nothing'], 'holds no checkpoint'),
    (['config/m.py'], '--out_dir=out/m\n'),
    (['--metrics=gen_pl'], 'did you mean gen_ppl'),
    (['--steps=1,x', '--metrics=entropy'], '--steps wants numbers'),
    (['--steps=0', '--metrics=entropy'], '--steps wants numbers'),
    (['--nll_draws=0'], 'nll_draws'),
    (['--strategy=seq'], "no strategy 'seq'"),
    (['--latent_steps=8,9'], 'latent_steps works with'),
    (['--latent_steps=x'], '--latent_steps wants numbers'),
    (['--metrics=reconstruction'], 'mdlm has no autoencoder'),
    (['--metrics=smoothness'], 'mdlm has no latent space'),
    (['--data=nowhere'], 'there is no prepared data'),
    (['--data=short.txt'], 'has 3 tokens'),
    (['--data=latin.txt'], 'not UTF-8'),
    (['--metrics=swd'], 'swd is a metric of sawtooth'),
    (['--metrics=gen_ppl', '--teacher=out/m'], 'is mdlm, which bounds'),
    (['--metrics=gen_ppl', '--teacher=out/none'], 'holds no checkpoint'),
    (['--metrics=gen_ppl', '--teacher=out/s'], 'nothing in common'),
    (['--out_dir=out/s', '--metrics=gen_ppl'], 'sawtooth has no text'),
    (['--out_dir=out/s', '--metrics=mauve'], 'sawtooth is not'),
    (['--metrics=gen_ppl', '--teacher=broken'], 'cannot load the teacher broken'),
])
def test_mistakes(argv, match, tmp_path, monkeypatch, capsys):
    make('mdlm', 'out/m')
    make('ar', 'out/s', dataset='sawtooth', vocab_size=2)
    os.makedirs('broken')
    open('broken/config.json', 'w').write('{}')
    open('short.txt', 'w').write('abc')
    open('latin.txt', 'wb').write(b'\xe9')
    assert match in fails(eval, monkeypatch, capsys, *([] if argv[0].startswith('--out_dir') else ['--out_dir=out/m']), *argv, *ARGS)


# --- figures ----------------------------------------------------------------------------------------------------------------------

def write_results(folder, rows, **settings):
    os.makedirs(folder, exist_ok=True)
    with open(f'{folder}/eval.jsonl', 'a') as f:
        for gflops, ppl in rows:
            f.write(json.dumps({'gflops': gflops, 'gen_ppl': ppl, 'seconds_per_sample': gflops / 10, 'entropy_position': 4.0, 'entropy_sample': 4.4,
                                **settings}) + '\n')


def tables(text):
    """What frontier prints -> {title: {row: [cells]}}, the columns under the title itself."""
    found = {}
    for block in text.strip().split('\n\n')[1:]:
        rows = [line.split('  ') for line in block.splitlines()]
        rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
        found[rows[0][0]] = {'columns' if i == 0 else row[0]: row[1:] for i, row in enumerate(rows)}
    return found


def test_frontier():
    write_results('a', [(40, 50.0), (10, 200.0), (20, 100.0)])
    write_results('b', [(30, 60.0), (15, 150.0), (30, 66.0)])  # measured again: the later one counts
    out = io.StringIO()
    plot.frontier(plot.measured(['a', 'b/']), 'f.png', out)
    assert out.getvalue().startswith('[1] a\n[2] b\n\n')
    found = tables(out.getvalue())
    assert found['gen_ppl at gflops'] == {'columns': ['10', '20', '40'], '[1]': ['200', '100', '50'], '[2]': ['n/a', '122', 'n/a']}
    assert found['entropy_sample at gflops']['[2]'] == ['n/a', '4.4', 'n/a'] and 'diversity at gflops' not in found
    assert os.path.getsize('f.png') > 1000
    out = io.StringIO()
    plot.frontier(plot.measured(['a', 'b']), 'f.png', out, **plot.frontier_options(gflops='15,30'))
    assert tables(out.getvalue())['gen_ppl at gflops'] == {'columns': ['15', '30'], '[1]': ['150', '75'], '[2]': ['150', '66']}


def test_steps_are_not_interpolated():
    write_results('a', [(10, 200.0)], steps=1)
    write_results('a', [(30, 100.0)], steps=3)
    write_results('b', [(20, 150.0)], steps=2)
    out = io.StringIO()
    plot.frontier(plot.measured(['a', 'b']), 'f.png', out)
    assert tables(out.getvalue())['gen_ppl at steps'] == {'columns': ['1', '2', '3'], '[1]': ['200', 'n/a', '100'], '[2]': ['n/a', '150', 'n/a']}


def test_seeds_are_one_curve():
    write_results('a', [(10, 200.0), (20, 100.0)], step=5)
    write_results('a_seed1', [(10, 220.0), (20, 110.0), (30, 50.0)], step=5)
    write_results('a_seed2', [(10, 999.0)], step=4)  # not yet trained to the end
    found = plot.curves(plot.measured(['a', 'a_seed1', 'a_seed2']))
    assert {k: len(v) for k, v in found.items()} == {'a, step 5 (2 seeds)': 2, 'a, step 4': 1}
    runs = found['a, step 5 (2 seeds)']
    assert plot.over_runs(runs, 'gflops', 10, 'gen_ppl') == pytest.approx((210, 200**0.5))
    assert plot.over_runs(runs, 'gflops', 15, 'gen_ppl')[0] == pytest.approx(157.5)
    mean, deviation = plot.over_runs(runs, 'gflops', 30, 'gen_ppl')
    assert mean == 50 and math.isnan(deviation)
    out = io.StringIO()
    plot.frontier(plot.measured(['a', 'a_seed1']), 'f.png', out)
    assert tables(out.getvalue())['gen_ppl at gflops']['[1]'] == ['210±14', '105±7.1', '50']


def test_other_settings_are_another_curve():
    write_results('a', [(10, 200.0)], strategy='joint', temperature=1.0)
    write_results('a', [(10, 100.0), (20, 50.0)], strategy='seq', temperature=1.0)
    found = plot.curves(plot.measured(['a']))
    assert {k: [len(run) for run in runs] for k, runs in found.items()} == {'a, strategy joint': [1], 'a, strategy seq': [2]}


@pytest.mark.parametrize('name, L, layers, hidden', [('lm1b', 128, 13, 1024), ('owt', 512, 13, 1024)])
def test_the_papers_tables(name, L, layers, hidden):
    paper = plot.frontier_options(name)['paper']
    for row in paper['rows'].values():
        assert len(row['gen_ppl']) == len(row['entropy']) == len(paper['gflops'])
    assert paper['rows']['MDLM']['gflops_per_call'] == round(layers * (12 * L * hidden**2 + 2 * L**2 * hidden) / 1e9, 2)
    for label, row in paper['rows'].items():
        if label != 'MDLM':
            S = L + int(label.split('-')[2].split()[0])
            assert row['gflops_per_call'] == round(12 * (12 * S * 768**2 + 2 * S**2 * 768) / 1e9, 2)
    write_results('a', [(40, 50.0), (100, 20.0)])
    out = io.StringIO()
    plot.frontier(plot.measured(['a']), 'f.png', out, paper=paper)
    found = tables(out.getvalue())
    assert 'MDLM' not in found['gen_ppl at gflops'] and len(found['entropy at gflops, the paper']) == 8


def test_frontier_measures_what_is_missing(monkeypatch, capsys):
    make('ar', 'out/a')
    make('mdlm', 'out/m')
    make('di', 'out/d')
    args = ['--teacher=out/a', '--num_samples=6', '--batch_size=4', '--device=cpu']
    frontier.main(['out/m', 'out/d', 'out/a', '--steps=1,2', *args, '--results=all.jsonl'])
    out = capsys.readouterr().out
    assert len(lines(out)) == 2 + 4 + 1 and os.path.getsize('out/m/frontier.png') > 1000
    assert '[1] out/m\n' in out and '[3] out/d, strategy seq, latent_steps 8\n' in out and len(lines(open('all.jsonl').read())) == 7
    frontier.main(['out/m', 'out/d', '--steps=1,2,4', '--strategies=joint', *args, '--save=f.png'])  # a longer sweep
    new = lines(capsys.readouterr().out)
    assert [(r['model'], r['steps']) for r in new] == [('out/m', 4), ('out/d', 4)] and os.path.exists('f.png')
    make('mdlm', 'out/m_seed1', hidden=32)
    kept = open('all.jsonl').read()
    assert 'all.jsonl holds results' in fails(frontier, monkeypatch, capsys, 'out/m', *args, '--results=all.jsonl') and open('all.jsonl').read() == kept
    frontier.main(['out/m', 'out/d', 'out/a', 'all.jsonl', '--steps=1,2', *args, '--results=all.jsonl'])
    assert open('all.jsonl').read() == kept
    capsys.readouterr()
    frontier.main(['out/m_seed1', 'all.jsonl', '--steps=1,2', *args])  # a seed added later, beside runs that may be gone
    out = capsys.readouterr().out
    assert len(lines(out)) == 2 and '[1] out/m (2 seeds)' in out
    make('mdlm', 'out/m', schedule='polynomial', num_layers=2)  # trained anew: the old results are of other weights
    frontier.main(['out/m', '--steps=2', *args])
    assert len(lines(capsys.readouterr().out)) == 1
    make('ar', 'out/a', num_layers=2)  # another teacher
    frontier.main(['out/m', '--steps=2', *args])
    assert len(lines(capsys.readouterr().out)) == 1
    monkeypatch.setattr(eval, 'main', lambda argv: pytest.fail('measured again'))
    frontier.main(['out/m', '--steps=2', *args, '--time=cpu'])


@pytest.mark.parametrize('argv, match', [([], 'which runs'), (['out/none'], 'holds no checkpoint'), (['out/m', '--strategies=seq'], 'none of the strategies'),
                                         (['out/m', '--teacher=out/m'], 'bounds a likelihood'), (['out/m', '--steps=0'], '--steps wants'),
                                         (['out/m', '--paper=ptb'], 'lm1b and owt'), (['out/m', '--time=late'], 'wall or cpu'),
                                         (['out/m', '--gflops=few'], '--gflops wants'), (['out/m', '--results=x'], '.jsonl'),
                                         (['none.jsonl', '--teacher=out/a'], 'none.jsonl holds no Gen PPL'), (['out/m', '--num_samples=0'], 'at least 1')])
def test_mistakes_at_the_frontier(argv, match, monkeypatch, capsys):
    make('mdlm', 'out/m')
    make('ar', 'out/a')
    assert match in fails(frontier, monkeypatch, capsys, *argv, '--device=cpu', *([] if '--teacher=out/m' in argv else ['--teacher=out/a']))


def test_loss_curves(monkeypatch, capsys):
    os.makedirs('a')
    save, labels = plot.save, []
    monkeypatch.setattr(plot, 'save', lambda figure, path: (labels.extend(figure.axes[0].get_legend_handles_labels()[1]), save(figure, path)))
    with open('a/log.jsonl', 'w') as f:
        f.write('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": null}\n{"step": 2, "val_loss": 2.5, "val_ppl": 12.2}\n{"step": 3, "lo')
    plot.main(['log', 'a'])
    assert '2.5000 nats per token at step 2' in capsys.readouterr().out and os.path.getsize('a/log.png') > 1000
    assert labels == ['a, training objective', 'a, validation']


@pytest.mark.parametrize('argv, match', [([], 'plot.py log'), (['frontier'], 'plot.py log'), (['front', 'a'], 'plot.py log'), (['log', 'a'], 'no log.jsonl'),
                                         (['frontier', 'a'], 'no Gen PPL yet'), (['log', 'a', '--sav=x'], 'did you mean save'),
                                         (['log', 'a', '--paper=lm1b'], 'unknown key paper'),
                                         (['log', 'b', '--save=no/where.png'], 'cannot write'), (['log', 'b', '--save=x.doc'], 'cannot write')])
def test_mistakes_in_plotting(argv, match, monkeypatch, capsys):
    os.makedirs('b')
    open('b/log.jsonl', 'w').write('{"step": 1, "val_loss": 3.0}\n')
    monkeypatch.setattr(plot, 'print', lambda *args, **kwargs: None, raising=False)
    assert match in fails(plot, monkeypatch, capsys, *argv)
