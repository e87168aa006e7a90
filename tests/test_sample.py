"""sample.py: generate, prompts, the command line, and the denoising drawn live."""
import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CHARS, TINY, TINY_METHODS, L, chi_square, fails, generator, make

import sample
from lib.configurator import UserError
from lib.tokens import Char
from sample import generate, read_prompt


@pytest.fixture(autouse=True)
def sandbox(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def tokenizer(wrap=False):
    tok = Char(CHARS, True)
    tok.wrap = wrap
    return tok


# ------------------------------------------------------------------------------------------------------------
# generate

@pytest.mark.parametrize('name', TINY_METHODS)
def test_compiled_networks_sample_the_same(name, monkeypatch):
    make(name, 'out/m')
    compile, networks = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, 'compile',
                        lambda self: networks.append(self) or compile(self, backend='eager'))
    keys = dict(out_dir='out/m', init_from='', copula='')
    (method, _), (compiled, _) = (
        sample.open_model(SimpleNamespace(**keys, compile=c), torch.device('cpu')) for c in (False, True))
    assert networks and set(networks) == set(compiled.backbones())
    assert torch.equal(generate(method, 3, 3, 2, 0), generate(compiled, 3, 3, 2, 0))


@pytest.mark.parametrize('name', TINY_METHODS)
def test_samples_are_a_function_of_the_seed(name):
    method = make(name)
    x = generate(method, 10, 4, batch_size=4, seed=1)
    torch.manual_seed(9)  # the global generator has no part in it
    assert x.shape == (10, L) and x.dtype == torch.int64 and 0 <= x.min() and x.max() < TINY['vocab_size']
    assert torch.equal(x, generate(method, 10, 4, batch_size=4, seed=1))
    # more samples do not change the ones before
    assert torch.equal(x[:8], generate(method, 8, 4, batch_size=4, seed=1))
    assert not torch.equal(x, generate(method, 10, 4, batch_size=4, seed=2))
    assert not torch.equal(x[:4], x[4:8])


def test_shuffled_latents_keep_the_marginal_of_each_place_and_nothing_else():
    """Before, each place of a text determines the others; after, a pair is as frequent as its product."""
    codes = torch.multinomial(torch.tensor([.4, .3, .2, .1]), 4000, True, generator=generator())
    z_0 = (codes[:, None] + torch.arange(3)) % 4
    z = sample.shuffled(z_0, seed=0)
    assert torch.equal(z.sort(dim=0).values, z_0.sort(dim=0).values)
    for a, b in (0, 1), (0, 2), (1, 2):
        product = torch.outer(z_0[:, a].bincount(), z_0[:, b].bincount())
        before, after = (chi_square((4 * x[:, a] + x[:, b]).bincount(minlength=16), product)
                         for x in (z_0, z))
        assert after < 4 < before
    vectors = torch.nn.functional.one_hot(z_0).float()
    assert torch.equal(sample.shuffled(vectors, seed=0).argmax(dim=-1), z)
    assert not torch.equal(sample.shuffled(z_0, seed=1), z)


# ------------------------------------------------------------------------------------------------------------
# prompts

VARIANTS = [('mdlm', {}), ('mdlm', {'sampler': 'first_hitting'}), ('mdlm', {'sampler': 'remdm', 'eta': 1.0}),
            ('vadd', {}), ('vadd', {'sampler': 'fixed_z'}), ('cadd', {}), ('candi', {}), ('ssmd', {}),
            ('co', {}), ('co', {'strategy': 'seq'}), ('di', {'strategy': 'joint', 'sampler': 'remdm'}),
            ('di', {'strategy': 'seq', 'sampler': 'first_hitting'})]


@pytest.mark.parametrize('name, options', VARIANTS)
def test_infilling_keeps_what_is_given(name, options):
    method, tok = make(name), tokenizer()
    prompt = read_prompt('ab[MASK:3]cd[MASK]e', tok, L, method)
    m = method.mask_id
    expected = [*tok.encode('ab'), m, m, m, *tok.encode('cd'), m, *tok.encode('e'), m, m, m]
    assert prompt.tolist() == expected
    x = generate(method, 6, 5, 4, 0, prompt, **options)
    given = prompt != m
    assert (x[:, given] == prompt[given]).all() and (x != m).all() and len(x.unique(dim=0)) > 1


def test_ar_continues_a_prefix():
    method, tok = make('ar'), tokenizer()
    x = generate(method, 5, 1, 4, 0, read_prompt('abc[MASK:2]', tok, L, method))
    assert x.shape == (5, L) and len(x.unique(dim=0)) > 1
    assert (x[:, :3] == torch.tensor(tok.encode('abc'))).all()
    with pytest.raises(ValueError, match='gap'):
        generate(method, 1, 1, 1, 0, read_prompt('a[MASK:2]b', tok, L, method))


def test_prompt_follows_bos_where_texts_are_wrapped():
    method, tok = make('mdlm'), tokenizer(wrap=True)
    assert read_prompt('ab', tok, 4, method).tolist() == [tok.bos_id, *tok.encode('ab'), method.mask_id]


@pytest.mark.parametrize('start, match', [
    ('a' * L, 'nothing is left to write'), ('a' * 13, 'more than the 12'), ('a[MASK:12]', 'more than the 12'),
    ('[MASK:99999999999999]', 'more than the 12'), ('aXb', "'X' is not one of")])
def test_bad_prompts(start, match):
    with pytest.raises(UserError, match=match):
        read_prompt(start, tokenizer(), L, make('mdlm'))


# ------------------------------------------------------------------------------------------------------------
# the command line

def test_save_round_trip(capsys):
    make('mdlm', 'out/m')
    for name in ('x.npy', 'x.jsonl'):
        sample.main(['--out_dir=out/m', '--num_samples=5', '--batch_size=2', '--steps=3', '--seed=4',
                     '--device=cpu', f'--save={name}'])
        printed = capsys.readouterr().out
    x, lines = np.load('x.npy'), [json.loads(line) for line in open('x.jsonl', encoding='utf-8')]
    assert x.shape == (5, L) and x.dtype.kind == 'i' and x.tolist() == [line['ids'] for line in lines]
    assert all(Char(CHARS, True).decode(line['ids']) == line['text'] in printed for line in lines)
    assert sorted(os.listdir('.')) == ['out', 'x.jsonl', 'x.npy'] and printed.count('--- sample ') == 5
    assert printed.endswith('\n--- wrote 5 texts to x.jsonl\n')


def test_sawtooth_prints_a_picture(capsys):
    make('di', 'out/s', dataset='sawtooth', vocab_size=2, tokenizer=None)
    sample.main(['--out_dir=out/s', '--num_samples=1', '--device=cpu', '--strategy=seq', '--start=▁█▁'])
    text = capsys.readouterr().out.split('\n')[1]
    assert len(text) == L and set(text) <= set('▁█') and text.startswith('▁█▁')


def test_tokenizer_comes_from_the_data_if_the_checkpoint_has_none(tmp_path):
    os.makedirs('set')
    meta = dict(dtype='uint16', vocab_size=10, tokenizer=TINY['tokenizer'], eos_id=9, bos_id=9, wrap=True,
                val=dict(tokens=5))
    with open('set/meta.json', 'w') as f:
        json.dump(meta, f)
    tok = sample.open_tokenizer({'dataset': str(tmp_path / 'set')})
    assert tok.chars == CHARS and tok.wrap


def test_a_tokenizer_with_too_few_ids_is_refused(monkeypatch, capsys):
    """A text cannot hold every id: the mistake is found before sampling, not when one of them turns up."""
    make('mdlm', 'out/m', tokenizer={'kind': 'char', 'chars': CHARS[:-1], 'eos': True})
    assert 'has 9 ids' in fails(sample, monkeypatch, capsys, '--out_dir=out/m', '--device=cpu')


def test_published_weights(monkeypatch, capsys):
    config = {**TINY, 'method': 'mdlm'}
    monkeypatch.setattr(sample, 'open_published', lambda name, device: (make('mdlm'), config))
    sample.main(['--init_from=who/what', '--num_samples=2', '--steps=2', '--device=cpu'])
    assert capsys.readouterr().out.count('--- sample') == 2


@pytest.mark.parametrize('argv, match', [
    (['--out_dir=out/nothing'], 'holds no checkpoint'),
    ([], 'name one model'),
    (['--out_dir=out/m', '--init_from=a/b'], 'name one model'),
    *(([arg], 'a run is named by its folder, --out_dir=out/m\n') for arg in
      ('out/m', 'config/m.py', 'out/m/ckpt.pt', '--out_dir=config/m.py', '--out_dir=out/m/ckpt.pt',
       '--init_from=out/m')),
    (['--out_dir=out/m', '--step=3'], 'did you mean steps'),
    (['--out_dir=out/m', '--steps=0'], 'steps must be at least 1'),
    (['--out_dir=out/m', '--steps=many'], 'steps wants an integer'),
    (['--out_dir=out/m', '--num_samples=0'], 'at least 1'),
    (['--out_dir=out/m', '--strategy=seq'], "no strategy 'seq'; it has: joint"),
    (['--out_dir=out/m', '--sampler=magic'], "no sampler 'magic'; it has: ancestral, first_hitting, remdm"),
    (['--out_dir=out/m', '--latent_steps=4'], 'no option latent_steps'),
    (['--out_dir=out/d', '--latent_steps=4'], 'no option latent_steps with strategy=joint'),
    (['--out_dir=out/d', '--strategy=seq', '--latent_steps=0'], 'latent_steps must be at least 1'),
    (['--out_dir=out/m', '--eta=.5'], 'no option eta with strategy=joint, sampler=ancestral'),
    (['--out_dir=out/m', '--sampler=remdm', '--eta=2'], 'eta must be at most 1'),
    (['--out_dir=out/m', '--top_p=0'], 'top_p'),
    (['--out_dir=out/m', '--temperature=-1'], 'temperature'),
    (['--out_dir=out/d', '--sampler=first_hitting'], 'strategy=seq'),
    (['--out_dir=out/m', '--dtype=float8'], 'dtype'),
    (['--out_dir=out/m', '--device=abacus'], 'device'),
    (['--out_dir=out/m', '--start='], '--start is empty'),
    (['--out_dir=out/m', '--start=Zebra'], "'Z' is not one of"),
    (['--out_dir=out/m', '--start=' + 'a' * 50], 'more than the 12'),
    (['--out_dir=out/a', '--start=a[MASK:2]b', '--save=x.npy'], 'fills no gap'),
    (['--out_dir=out/a', '--sampler=remdm'], 'AR has no sampler'),
    (['--out_dir=out/l', '--start=abc'], 'LDLM takes no prompt'),
    (['--out_dir=out/l', '--latent=none'], 'latent is one of generated, data'),
    (['--out_dir=out/l', '--latent=shuffled'], 'latent is one of generated, data'),
    (['--out_dir=out/l', '--latent=data', '--sampler=ddim'], 'without a sampler'),
    (['--out_dir=out/a', '--latent=none'], 'AR has no option latent\n'),
    (['--out_dir=out/d', '--latent=data'], 'it works with strategy=seq'),
    (['--out_dir=out/d', '--latent=data', '--strategy=seq'], 'there is no prepared data'),
    (['--out_dir=out/l', '--top_p=.9'], 'LDLM has no option top_p'),
    (['--out_dir=out/e'], 'train one: --stage=diffusion'),
    (['--out_dir=out/m', '--save=x.txt'], 'ends with .npy'),
    (['--out_dir=out/m', '--save=out/m/ckpt.pt/x.npy'], 'cannot write out/m/ckpt.pt/x.npy'),
])
def test_mistakes(argv, match, monkeypatch, capsys):
    for name in ('mdlm', 'ar', 'di', 'ldlm'):
        make(name, 'out/' + name[0])
    make('ldlm', 'out/e', stage='autoencoder')
    cpu = [] if '--device=abacus' in argv else ['--device=cpu']
    assert match in fails(sample, monkeypatch, capsys, *argv, *cpu)


def test_an_unwritable_path_is_found_before_sampling(monkeypatch):
    make('mdlm', 'out/m')
    monkeypatch.setattr(sample, 'generate', lambda *args, **kwargs: pytest.fail('sampled'))
    with pytest.raises(UserError, match='cannot write'):
        sample.main(['--out_dir=out/m', '--device=cpu', '--save=out/m/ckpt.pt/x.npy'])


def test_an_interruption_leaves_the_old_file(monkeypatch):
    make('mdlm', 'out/m')
    with open('x.npy', 'w') as f:
        f.write('old')

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, 'generate', interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.main(['--out_dir=out/m', '--device=cpu', '--save=x.npy'])
    assert open('x.npy').read() == 'old' and not os.path.exists('x.npy.tmp')


# ------------------------------------------------------------------------------------------------------------
# --show

class Screen(io.StringIO):
    def isatty(self):
        return True


def test_show_redraws_in_place_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sample.time, 'sleep', lambda s: None)
    tok, out = Char(CHARS, True), Screen()
    callback = sample.show(tok.decode, 10, None, out)
    for i, x in enumerate([[2, 10, 10], [2, 3, 10]]):
        callback(i, torch.tensor([x]), None)
    frames = out.getvalue().split('\033[H\033[J')[1:]
    assert frames[0].startswith('\033[1;32ma\033[0m\033[2m░░\033[0m\n')  # one new, two masked
    assert frames[1].startswith('a\033[0m\033[1;32mb\033[0m\033[2m░\033[0m\n')  # one old, one new, one masked


def test_show_prints_some_frames_elsewhere():
    tok, out = Char(CHARS, True), io.StringIO()
    callback = sample.show(tok.decode, 10, None, out)
    for i in range(7):
        callback(i, torch.tensor([[2] * i + [10] * (7 - i)]), None)
    frames = {1: '░' * 7, 2: 'a' + '░' * 6, 4: 'aaa' + '░' * 4}
    assert out.getvalue() == ''.join(f'--- step {i}\n{text}\n' for i, text in frames.items())


def test_show_cuts_at_the_edge_of_the_screen():
    chars = [('', c) for c in 'abcd\nefghijk']
    for lines, shown in (1, 'abcd'), (2, 'abcd\nefgh'), (3, 'abcd\nefgh\nijk'):
        assert ''.join(c for _, c in sample.fit_screen(chars, columns=4, lines=lines)) == shown


def test_show_draws_the_latent():
    """Vectors as bars, codes as numbers; its steps before those of the tokens have names of their own."""
    tok, out = Char(CHARS, True), io.StringIO()
    masked, a = torch.full((1, 130), 10), torch.full((1, 130), 2)
    vectors = sample.show(tok.decode, 10, None, out)
    for i, x, z in (-2, masked, [-2.0, 0.0, 2.0]), (-1, masked, [0.1, 0.0, 0.05]), (0, a, [0.1, 0.0, 0.05]):
        vectors(i, x, torch.tensor([[z]]))
    codes = sample.show(tok.decode, 10, 5, out)
    codes(0, a, torch.tensor([[5, 0, 3]]))
    blocks, text = '\n'.join('░' * n for n in (64, 64, 2)), '\n'.join('a' * n for n in (64, 64, 2))
    assert out.getvalue() == (f'--- latent step 1\nlatent ▁▅█\n{blocks}\n'
                              f'--- latent step 2\nlatent █▅▆\n{blocks}\n'
                              f'--- step 1\nlatent █▅▆\n{text}\n--- step 1\nlatent ░ 0 3\n{text}\n')


def test_show_fits_80_columns(capsys):
    for name, options in ('co', ['--strategy=seq']), ('di', ['--strategy=seq']), ('ldlm', []):
        make(name, 'out/x', block_size=130, **({'num_latents': 70} if options else {}))
        sample.main(['--out_dir=out/x', '--num_samples=1', '--steps=2', '--show', '--device=cpu', *options])
        shown = capsys.readouterr().out.partition('--- sample')[0]
        assert shown.count('latent ') >= 2 and max(map(len, shown.splitlines())) <= 80, name


def test_show_where_nothing_is_masked(capsys):
    make('ldlm', 'out/l')
    sample.main(['--out_dir=out/l', '--num_samples=1', '--steps=4', '--show', '--sampler=ddim',
                 '--device=cpu'])
    assert capsys.readouterr().out.count('--- step ') == 3


def test_show_from_the_command_line(capsys):
    make('ar', 'out/a')
    sample.main(['--out_dir=out/a', '--num_samples=3', '--batch_size=2', '--show', '--start=abc',
                 '--device=cpu'])
    out = capsys.readouterr().out
    assert out.count('--- step 4\n') == 2 and '░' in out  # of each batch
