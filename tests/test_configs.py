"""Every file of config/: it parses, it builds, its sizes are the paper's, and those for text train."""
import glob
import os
from types import SimpleNamespace

import pytest
import torch
from helpers import Toy, log

import ladd
import train
from lib import prepare, tokens
from lib.checkpoint import save
from lib.configurator import configure
from methods import METHODS, build, open_run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIGS = sorted(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, 'config', '*.py')))
PUBLISHED = [f'{data}_{method}' for data in ('lm1b', 'owt') for method in ('flm', 'duo', 'candi')]
WORDS = {'lm1b': (30522, 'bert-base-uncased', 128), 'owt': (50257, 'gpt2', 1024)}
VOCAB = {'sawtooth': 2, 'shakespeare_char': 65, 'text': 50257, 'lm1b': 151669, 'openwebtext': 151669}


def config_file(name):
    return os.path.join(ROOT, 'config', name + '.py')


def read(name, *args):
    return configure(train.Config, [config_file(name), *args], METHODS)


def on_meta(name, *args):
    """The method of a config file on the meta device: shapes without memory."""
    config = read(name, *args)
    config['block_size'] = config['block_size'] or 128  # sawtooth's own
    with torch.device('meta'):
        vocab_size = WORDS[name.split('_')[0]][0] if name in PUBLISHED else VOCAB[config['dataset']]
        return build({**config, 'vocab_size': vocab_size})


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('name', CONFIGS)
def test_it_parses_and_builds(name):
    config = read(name)
    assert config['out_dir'] == os.path.join('out', name)
    train.check_batch(SimpleNamespace(**config), 1)
    assert parameters(on_meta(name)) > 0


def settings_of_the_paper(c):
    assert (c.learning_rate, c.beta1, c.beta2, c.weight_decay) == (3e-4, 0.9, 0.999, 0.03)
    assert (c.warmup_iters, c.decay_lr, c.grad_clip, c.dtype) == (2500, 'constant', 1.0, 'bfloat16')
    assert (c.ema, c.seed, c.dropout, c.batch_size) == (0.9999, 42, 0.1, 512)
    assert (c.block_size, c.max_iters) == ((512, 500_000) if c.dataset == 'openwebtext' else (128, 300_000))
    assert c.method == 'ar' or c.weighting == 'constant'


@pytest.mark.parametrize('name', ['lm1b_mdlm', 'lm1b_ar', 'owt_mdlm'])
def test_the_settings_of_the_paper(name):
    c = SimpleNamespace(**read(name))
    settings_of_the_paper(c)
    assert (c.hidden, c.num_layers, c.num_heads, c.cond_dim) == (1024, 13, 16, 256)
    method = on_meta(name)
    assert round(parameters(method.dit.blocks) / 1e6) == 184
    assert f'{parameters(method.dit) / 1e6:.1f}' == '184.8'
    assert method.embed.weight.shape == (151670, 1024) and method.head.weight.shape == (151669, 1024)
    # LADD table 12
    assert f'{method.flops(c.block_size) / 1e9:.2f}' == {128: '21.37', 512: '90.73'}[c.block_size]


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_published_settings_of_the_neighbours(name):
    """A DiT of width 768; bert-base-uncased and 128 tokens on LM1B, gpt2 and 1024 on OpenWebText."""
    c, method = SimpleNamespace(**read(name)), on_meta(name)
    assert (c.hidden, c.num_layers, c.num_heads, c.cond_dim, c.dropout) == (768, 12, 12, 128, 0.1)
    assert (c.learning_rate, c.beta1, c.beta2, c.weight_decay, c.ema) == (3e-4, 0.9, 0.999, 0, 0.9999)
    assert (c.warmup_iters, c.decay_lr, c.grad_clip, c.dtype) == (2500, 'constant', 1, 'bfloat16')
    assert (c.batch_size, c.max_iters) == (512, 1_500_000 if c.method == 'flm' else 1_000_000)
    vocabulary, tokenizer, L = WORDS[name.split('_')[0]]
    assert method.head.out_features == vocabulary and c.block_size == L
    with open(config_file(name)) as f:
        assert f'--tokenizer={tokenizer} ' in f.read()
    if c.method == 'duo':
        assert (c.curriculum_iters, c.tau) == (500_000, 1e-3)
    if c.method == 'candi':
        assert (c.r_min, c.r_max, c.mixing, c.weighting) == (0.05, 0.25, 0.5, 'elbo')


LM1B_DI_128 = ['--num_latents=128', '--codebook_size=511', '--latent_dim=32']


@pytest.mark.parametrize('name, overrides, M, D, K, gflops', [
    ('lm1b_co_ladd', [], 32, 32, None, '14.06'),
    ('lm1b_co_ladd', ['--num_latents=128'], 128, 32, None, '22.95'),
    ('lm1b_di_ladd', [], 32, 128, 2047, '14.06'),
    ('lm1b_di_ladd', LM1B_DI_128, 128, 32, 511, '22.95'),
    ('owt', [], 64, 32, None, '55.04'),
    ('owt', ['--num_latents=16'], 16, 32, None, '49.98'),
    ('owt_di_ladd', [], 64, 128, 8191, '55.04'),
    ('owt_di_ladd', ['--num_latents=16', '--dead_below=0.5'], 16, 128, 8191, '49.98')])
def test_the_settings_of_the_paper_with_latents(name, overrides, M, D, K, gflops):
    """LADD tables 10 and 12: 184M parameters, two modalities of 12 layers and width 768, a frozen encoder.

    The overrides are those that the files' heads name.
    """
    c = SimpleNamespace(**read(name, *overrides))
    settings_of_the_paper(c)
    with open(config_file(name)) as f:
        doc = ' '.join(f.read().split())
    assert not overrides or ' '.join(overrides) in doc
    assert (c.hidden, c.num_layers, c.num_heads, c.cond_dim) == (768, 12, 12, 128)
    assert c.encoder == 'Qwen/Qwen3-Embedding-0.6B'
    assert (c.num_latents, c.latent_dim, c.unit_norm) == (M, D, True)
    if K:
        assert (c.latent, c.codebook_size, c.latent_schedule) == ('discrete', K, 'linear')
        assert (c.times, c.stage1_iters, c.p_drop, c.encoder_dropout) == ('independent', 50_000, 0, False)
    else:
        assert (c.latent, c.latent_schedule, c.times, c.stage1_iters) == ('continuous', 'vp_sqrt', 'same', 0)
        assert (c.p_drop, c.encoder_dropout) == (0.15, True)
    method = on_meta(name, *overrides)
    assert round(parameters(method.dit.blocks) / 1e6) == 184
    assert f'{parameters(method.dit) / 1e6:.1f}' == '184.7'
    assert f'{method.flops(c.block_size) / 1e9:.2f}' == gflops
    assert not list(method.encoder.parameters())


def test_the_official_settings_on_sawtooth():
    for name, d, heads, cond_dim, ema in [('mdlm', 64, 4, 32, 0), ('co_ladd', 32, 2, 16, 0.99),
                                          ('di_ladd', 32, 2, 16, 0.99)]:
        c = SimpleNamespace(**read(f'sawtooth_{name}_paper'))
        assert (c.hidden, c.num_layers, c.num_heads, c.cond_dim, c.ema) == (d, 4, heads, cond_dim, ema)
        assert (c.dropout, c.batch_size, c.learning_rate, c.weight_decay) == (0.1, 2048, 3e-4, 0.03)
        assert (c.weighting, c.warmup_iters, c.grad_clip) == ('elbo', 2500, 1)


@pytest.mark.parametrize('name', [n for n in CONFIGS if n.startswith(('lm1b', 'owt'))])
def test_chunks_are_as_published(name):
    """LADD's are BOS ... EOS; LDLM's are cut from one stream."""
    with open(config_file(name)) as f:
        command, = (line for line in f if '/prepare.py' in line)
    assert ('--wrap' in command) == ('ldlm' not in name)


@pytest.mark.parametrize('data', ['shakespeare_char', 'text'])
@pytest.mark.parametrize('kind', ['co_ladd', 'di_ladd'])
def test_ladd_and_mdlm_are_comparable(data, kind):
    """Backbones of equal size within 2 %, the same texts and the same optimizer."""
    mdlm, ladd = read(f'{data}_mdlm'), read(f'{data}_{kind}')
    assert abs(parameters(on_meta(f'{data}_{kind}').dit) / parameters(on_meta(f'{data}_mdlm').dit) - 1) < 0.02
    changed = {k for k in mdlm if mdlm[k] != ladd[k]}
    assert changed <= {'method', 'out_dir', 'hidden', 'num_layers', 'num_heads', 'cond_dim'}


@pytest.mark.parametrize('method', ['flm', 'duo', 'candi', 'vadd', 'cadd', 'ssmd'])
@pytest.mark.parametrize('data', ['sawtooth', 'shakespeare_char'])
def test_neighbours_and_mdlm_are_comparable(data, method):
    """Equal blocks, tokens and optimizers; validation may be on fewer texts.

    On sawtooth a method whose steps take longer may make fewer, so that it, too, trains in four minutes.
    """
    mdlm, neighbour = read(f'{data}_mdlm'), read(f'{data}_{method}')
    differ = {k for k in mdlm.keys() & neighbour.keys() if mdlm[k] != neighbour[k]}
    assert differ - {'eval_seqs', 'max_iters'} == {'method', 'out_dir'}
    assert neighbour['max_iters'] == mdlm['max_iters'] or data == 'sawtooth' and method in ('vadd', 'ssmd')
    blocks = [on_meta(f'{data}_{name}').dit.blocks for name in ('mdlm', method)]
    assert parameters(blocks[0]) == parameters(blocks[1])


@pytest.mark.parametrize('data', ['shakespeare_char', 'text', 'lm1b'])
def test_ar_and_mdlm_are_comparable(data):
    """Equal networks, tokens and optimizers: nothing differs but the method, its weighting and its name."""
    mdlm, ar = ({k: v for k, v in read(f'{data}_{method}').items() if k not in ('method', 'out_dir')}
                for method in ('mdlm', 'ar'))
    assert ar == {k: v for k, v in mdlm.items() if k in ar}
    assert mdlm.keys() - ar.keys() == {'schedule', 'weighting'}
    assert parameters(on_meta(f'{data}_mdlm')) == parameters(on_meta(f'{data}_ar'))


# what a config needs to run on a tiny text by characters, without a pretrained encoder
LEARNED = {'co_ladd': ['--encoder=', '--stage1_iters=1', '--num_latents=4'],
           'di_ladd': ['--encoder=', '--stage1_iters=1', '--num_latents=4', '--codebook_size=7',
                       '--latent_dim=8']}
FROZEN = {'co_ladd': ['--encoder=AR', '--num_latents=4', '--latent_dim=8'],
          'di_ladd': ['--encoder=AR', '--stage1_iters=1', '--num_latents=4', '--codebook_size=7',
                      '--latent_dim=8']}
NO_LADD = [f'{data}_{method}' for data in ('shakespeare_char', 'text', 'lm1b') for method in ('mdlm', 'ar')]
CO_LADD = ['shakespeare_char_co_ladd', 'text_co_ladd', 'lm1b_co_ladd', 'owt']
DI_LADD = ['shakespeare_char_di_ladd', 'text_di_ladd', 'lm1b_di_ladd', 'owt_di_ladd']
NEIGHBOURS = [f'shakespeare_char_{method}' for method in ('flm', 'duo', 'candi', 'vadd', 'cadd', 'ssmd')]
TRAINS = [(name, []) for name in [*NO_LADD, 'owt_mdlm', *NEIGHBOURS, *PUBLISHED]]
TRAINS += [(name, changes[kind]) for changes in (LEARNED, FROZEN)
           for kind, names in (('co_ladd', CO_LADD), ('di_ladd', DI_LADD)) for name in names]


def prepare_in(folder, monkeypatch, text, tokenizer, tail):
    """A prepared set called tiny, in a folder that stands for data/."""
    for module in (prepare, tokens):
        monkeypatch.setattr(module, 'DATA', str(folder))
    prepare.write('tiny', {'train': lambda: iter([(text, True)])}, tokenizer, tail=tail)


@pytest.mark.parametrize('name, changes', TRAINS)
def test_it_trains(name, changes, tmp_path, monkeypatch):
    """Both ways to an encoder: learned in a stage of its own, or an AR checkpoint."""
    prepare_in(tmp_path, monkeypatch, 'to be or not to be ' * 40, 'char', tail=0.5)
    sizes = ['--block_size=16', '--hidden=16', '--num_layers=1', '--num_heads=2', '--cond_dim=8']
    if '--encoder=AR' in changes:
        data = tokens.Tokens('tiny', 'train', 16)
        ar = dict(method='ar', vocab_size=data.vocab_size, block_size=16, hidden=16, num_layers=1,
                  num_heads=2, cond_dim=8, tokenizer=data.tokenizer)
        save(f'{tmp_path}/ar/ckpt.pt', dict(config=ar, model=build(ar).state_dict(), ema={}, step=1))
        changes = [a.replace('=AR', f'={tmp_path}/ar') for a in changes]
    train.main([config_file(name), '--dataset=tiny', f'--out_dir={tmp_path}/out', '--device=cpu',
                '--compile=False', *sizes, '--batch_size=4', '--max_iters=2', '--log_interval=1',
                '--eval_seqs=4', *changes])
    records = log(tmp_path / 'out')
    # an untrained FLM is not sure even without noise, which costs m^2 / 2 nats in its bound
    assert [r['step'] for r in records] == [1, 2, 2]
    assert 0 < records[-1]['val_loss'] < (200 if name.endswith('flm') else 20)
    assert ('latent_loss' in records[1]) == (name in CO_LADD + DI_LADD)


@pytest.fixture(scope='module')
def qwen3(tmp_path_factory):
    """Folders: Qwen3-Embedding-0.6B with random weights, a tokenizer of as many invented words, and a little
    text in them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    folder = tmp_path_factory.mktemp('true_size')
    config = transformers.Qwen3Config(
        vocab_size=151669, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=32768,
        tie_word_embeddings=True)
    transformers.Qwen3Model(config).to(torch.bfloat16).save_pretrained(folder / 'qwen3')
    words = {f'w{i}': i for i in range(151668)} | {'<|endoftext|>': 151668}
    tok = Tokenizer(models.WordLevel(words, unk_token='w0'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='w0',
                                                eos_token='<|endoftext|>')
    fast.save_pretrained(folder / 'qwen3')
    text = ' '.join(f'w{i * i % 151668}' for i in range(3000))
    with pytest.MonkeyPatch.context() as patch:
        prepare_in(folder, patch, text, str(folder / 'qwen3'), tail=0.4)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lm1b_co_ladd', 'lm1b_di_ladd', 'owt', 'owt_di_ladd'])
def test_it_runs_at_true_size(name, qwen3, monkeypatch):
    """Starts, trains two steps of one text each and samples. (Only stage 2, because the k-means of stage 1
    would read a thousand texts.)"""
    monkeypatch.setattr(ladd.LADD, 'begin_step', lambda *args: None)
    for module in (prepare, tokens):
        monkeypatch.setattr(module, 'DATA', str(qwen3))
    out = qwen3 / 'out'
    train.main([config_file(name), '--dataset=tiny', f'--out_dir={out}', f'--encoder={qwen3}/qwen3',
                '--device=cpu', '--compile=False', f'--stage1_iters={int("di" in name)}', '--batch_size=1',
                '--max_iters=2', '--log_interval=1', '--eval_seqs=1', '--init_from=scratch'])
    records = log(out)
    assert [r['step'] for r in records] == [1, 2, 2]
    assert all(0 < r.get('loss', r.get('val_loss')) < 100 for r in records)
    method, config = open_run(out, 'cpu')
    assert f'{parameters(method.dit) / 1e6:.1f}' == '184.7'
    for options in ({}, {'strategy': 'seq', 'latent_steps': 2}) if 'di' in name else ({},):
        x = method.sample(1, 2, **options)
        assert x.shape == (1, config['block_size']) and x.max() < 151669


class Words(Toy):
    """Made-up texts of any size."""

    def __init__(self, vocab_size, block_size):
        self.vocab_size, self.block_size = vocab_size, block_size

    def batch(self, seed, step, rows):
        return (rows[:, None] + 7 * torch.arange(self.block_size)**2 + step) % self.vocab_size,


@pytest.mark.slow
@pytest.mark.parametrize('name', PUBLISHED)
def test_neighbours_run_at_true_size(name, tmp_path, monkeypatch):
    """Start, train two steps of one text each, and sample."""
    V, _, L = WORDS[name.split('_')[0]]
    monkeypatch.setattr(train, 'open_data', lambda name, split, block_size: Words(V, block_size))
    train.main([config_file(name), f'--out_dir={tmp_path}/out', '--device=cpu', '--compile=False',
                '--batch_size=1', '--max_iters=2', '--log_interval=1', '--eval_seqs=1'])
    records = log(tmp_path / 'out')
    assert [r['step'] for r in records] == [1, 2, 2]
    assert all(0 < r.get('loss', r.get('val_loss')) < 500 for r in records)
    method, _ = open_run(tmp_path / 'out', 'cpu')
    x = method.sample(1, 2)
    assert x.shape == (1, L) and x.max() < V
