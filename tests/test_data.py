"""Text -> tokens -> chunks: data/, lib/prepare.py and lib/tokens.py, without network or corpus.

Every tokenizer is built here.
"""
import gzip
import http.client
import importlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import disk_full

import lib.prepare
import lib.tokens
from lib.configurator import UserError, run
from lib.prepare import write
from lib.tokens import Char, Tokens, WithLatents, latents_folder, load_tokenizer, named_tokenizer, read_meta
from sample import read_texts

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ODD = ('naïve café\r\n\u2028tab\t \u00a0 e\u0301 \U0001f469\u200d\U0001f680 \u202eabc\u202c \x00 [MASK] '
       '<|endoftext|> 中文\ufeff\uffff\n')


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Writes go to a folder of our own, and the handler of SIGTERM, which write() sets, is put back."""
    for module in (lib.prepare, lib.tokens):
        monkeypatch.setattr(module, 'DATA', str(tmp_path / 'data'))
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def answer(monkeypatch, instead):
    """What cache_only_if_offline does instead of asking the hub."""
    for module in (lib.prepare, lib.tokens):
        monkeypatch.setattr(module, 'cache_only_if_offline', instead)


def tiny_bpe():
    """A byte-level BPE (lossless, as GPT-2's and Qwen's) of about 300 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(['the cat sat on the mat, the naïve cat'] * 9, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tok


def word_level(path, words, **specials):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tok, **specials).save_pretrained(path)
    return str(path)


def hf_folder(tmp_path):
    from transformers import PreTrainedTokenizerFast
    tok = PreTrainedTokenizerFast(tokenizer_object=tiny_bpe(), eos_token='<|endoftext|>')
    tok.save_pretrained(tmp_path / 'hf')
    return str(tmp_path / 'hf')


def qwen_folder(tmp_path):
    (tmp_path / 'qwen').mkdir()
    tiny_bpe().model.save(str(tmp_path / 'qwen'))  # vocab.json and merges.txt, nothing else
    return str(tmp_path / 'qwen')


def tiktoken_gpt2(tmp_path, monkeypatch):
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)}
    bytes_only = tiktoken.Encoding('gpt2', pat_str=r'\S+|\s+', mergeable_ranks=ranks,
                                   special_tokens={'<|endoftext|>': 50256})
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: bytes_only)
    return 'gpt2'


@pytest.fixture
def cli(monkeypatch):
    """Runs data/NAME/prepare.py with some arguments -> its exit code."""
    def call(name, *argv):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, argv)])
        try:
            run(importlib.import_module(f'data.{name}.prepare').main)
        except SystemExit as e:
            return e.code
        return 0
    return call


def save(path, text):
    path.write_bytes(text.encode())
    return path


def everything(name, split):
    """All the ids of a split."""
    folder = os.path.join(lib.tokens.DATA, name)
    return np.fromfile(f'{folder}/{split}.bin', read_meta(folder)['dtype']).tolist()


def snapshot(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())} if folder.exists() else None


# ----------------------------------------------------------------------------
# round trips

@pytest.mark.parametrize('kind', ['char', 'gpt2', 'hf', 'qwen'])
def test_round_trip(kind, tmp_path, monkeypatch, cli):
    documents = ['the cat\n\nsat', ODD, 'on the mat  ', ' \n\n', ' the end\n']
    # where a document ends in line breaks, the first three in a row are the separator
    documents = '\n\n\n'.join(documents).replace('\r\n', '\n').replace('\r', '\n').split('\n\n\n')
    source = save(tmp_path / 'in.txt', '\n\n\n'.join(documents))
    name = {'char': lambda: 'char', 'gpt2': lambda: tiktoken_gpt2(tmp_path, monkeypatch),
            'hf': lambda: hf_folder(tmp_path), 'qwen': lambda: qwen_folder(tmp_path)}[kind]()
    argv = f'--tokenizer={name}', '--name=t', '--workers=1', '--val_fraction=.4'
    assert cli('text', '--input', source, *argv) == 0
    meta = read_meta(tmp_path / 'data/t')
    tok = load_tokenizer(meta['tokenizer'], meta['vocab_size'])
    assert meta['train']['documents'] + meta['val']['documents'] in (5, 6)  # 6: one is in both
    ids = everything('t', 'train') + everything('t', 'val')
    assert ids.count(tok.eos_id) == 5  # "<|endoftext|>" in the text is not EOS
    texts, start = [], 0
    for i, token in enumerate(ids):
        if token == tok.eos_id:
            texts.append(tok.decode(ids[start:i]))
            start = i + 1
    same = (lambda s: unicodedata.normalize('NFC', s)) if kind == 'qwen' else str
    assert texts == [same(d) for d in documents]
    assert max(ids) < tok.vocab_size == meta['vocab_size']
    assert tok.decode(tok.encode('the cat')) == 'the cat'
    assert tok.spec == meta['tokenizer'] == named_tokenizer(str(tmp_path / 'data/t')).spec


def test_pieces_learned_from_a_text(tmp_path, cli, monkeypatch, capsys):
    """They cross words, come from the first --share of the text only, and give every text back."""
    text = 'the cat sat on the mat. ' * 200 + 'zebra ' * 200
    source = save(tmp_path / 'in.txt', text)
    argv = [f'--input={source}', '--vocab_size=40', '--share=0.5', '--out=bpe']
    monkeypatch.setattr(sys, 'argv', ['bpe.py', *argv])
    run(importlib.import_module('data.text.bpe').main)
    assert 'bpe: 40 pieces, of ' in capsys.readouterr().out
    tok = named_tokenizer('bpe')
    assert tok.decode(tok.encode('the cat sat on the mat. ')) == 'the cat sat on the mat. '
    assert len(tok.encode('the cat sat on the mat. ')) < 6  # words
    assert not any('ebra' in piece for piece in tok.tok.get_vocab())


def test_bert_has_sep_and_cls(tmp_path):
    path = word_level(tmp_path / 'bert', ['[UNK]', 'a', 'b', '[SEP]', '[CLS]'],
                      unk_token='[UNK]', sep_token='[SEP]', cls_token='[CLS]')
    tok = named_tokenizer(path)
    assert (tok.eos_id, tok.bos_id, tok.vocab_size) == (3, 4, 5) and tok.encode('a b zebra') == [1, 2, 0]


def test_a_tokenizer_is_that_of_the_data(tmp_path):
    spec = {'kind': 'char', 'chars': 'abc', 'eos': True}
    assert load_tokenizer(spec, 4).vocab_size == 4
    with pytest.raises(UserError, match='cannot load the tokenizer .*4 ids, but the data has 5'):
        load_tokenizer(spec, 5)
    path = word_level(tmp_path / 'words', ['a', 'b', 'c'], eos_token='c')
    write('t', {'train': lambda: iter([('a b', True), ('b', True)])}, path, tail=1)
    word_level(tmp_path / 'words', ['a', 'c'], eos_token='c')  # another one in its place
    tok = named_tokenizer(str(tmp_path / 'data/t'))  # meta.json holds the one that wrote the data
    assert tok.vocab_size == 3 and tok.encode('b a') == [1, 0]


def test_char_without_documents_to_join_is_nanogpt(tmp_path, cli):
    text = 'First Citizen:\nBefore we proceed\n\n\nany further, hear me speak.' * 9
    assert cli('shakespeare_char', '--input', save(tmp_path / 'in.txt', text)) == 0
    tokens = Tokens('shakespeare_char', 'train', 8)
    assert tokens.vocab_size == len(set(text)) and tokens.meta['eos_id'] is None
    assert len(tokens.ids) == int(len(text) * .9)
    ids = everything('shakespeare_char', 'train') + everything('shakespeare_char', 'val')
    assert load_tokenizer(tokens.tokenizer).decode(ids) == text
    with pytest.raises(UserError, match='é'):
        load_tokenizer(tokens.tokenizer).encode('é')


@pytest.mark.parametrize('separator', ['\n\n\n', '\n', None, '<d>'])
def test_documents_whatever_the_blocks(separator, monkeypatch):
    text = 'a\n\n\n\nb\n \n\n<d><d\n>c\n\n\nd<d>\n'
    monkeypatch.setattr(lib.prepare, 'PIECE', 7)
    for size in range(1, 9):
        blocks = [text[i:i + size] for i in range(0, len(text), size)]
        documents = ['']
        for piece, ends in lib.prepare.split_documents(blocks, separator):
            documents[-1] += piece
            documents += [''] * ends
        assert documents.pop() == ''
        assert documents == [d for d in (text.split(separator) if separator else [text]) if d]


def test_long_document_goes_out_in_pieces(tmp_path, monkeypatch, cli):
    text = 'the cat sat\non the mat\n\n' * 500
    tok = hf_folder(tmp_path)
    for piece in (1 << 20, 300):
        monkeypatch.setattr(lib.prepare, 'PIECE', piece)
        source = save(tmp_path / 'in.txt', text)
        argv = '--split=file', '--tokenizer', tok, f'--name=p{piece}', '--workers=1'
        assert cli('text', '--input', source, *argv) == 0
    # the same ids, for we cut where the tokenizer cuts
    assert snapshot(tmp_path / 'data/p300') == snapshot(tmp_path / f'data/p{1 << 20}')


def test_above_65535_ids(tmp_path, cli):
    path = word_level(tmp_path / 'big', [f'w{i}' for i in range(70_000)], eos_token='w0')
    source = save(tmp_path / 'in.txt', 'w69999 w65536\nw1 w65535\nw7')
    argv = '--split=line', '--tokenizer', path, '--name=big', '--workers=1'
    assert cli('text', '--input', source, *argv) == 0
    tokens = Tokens('big', 'train', 3)
    assert tokens.ids.dtype == np.uint32 and tokens.vocab_size == 70_000
    assert tokens.rows([1, 0])[0].tolist() == [[1, 65535, 0], [69999, 65536, 0]]


def test_workers_do_not_change_the_files(tmp_path, monkeypatch, cli):
    tok = hf_folder(tmp_path)
    source = save(tmp_path / 'in.txt', '\n'.join(f'the cat {i} sat' for i in range(3000)))
    monkeypatch.setattr(lib.prepare, 'PIECE', 4000)
    for n in (1, 2):
        argv = '--split=line', '--tokenizer', tok, f'--name=w{n}', f'--workers={n}'
        assert cli('text', '--input', source, *argv) == 0
    assert snapshot(tmp_path / 'data/w1') == snapshot(tmp_path / 'data/w2')


# ----------------------------------------------------------------------------
# chunks

def prepared(name='t', n=1000, **kwargs):
    """Documents of 9 digits: with the character tokenizer, ids 0 .. 9 and EOS = 10."""
    write(name, {'train': lambda: ((f'{i:09d}', True) for i in range(n))}, 'char', tail=0.1, **kwargs)
    return Tokens(name, 'train', 16)


def test_batch_is_a_function_of_seed_step_and_row():
    tokens = prepared()
    x, = tokens.batch(1, 5, torch.arange(8))
    assert x.shape == (8, 16) and x.dtype == torch.int64
    assert torch.equal(x[1::2], tokens.batch(1, 5, torch.arange(1, 8, 2))[0])
    assert torch.equal(x[3:4], Tokens('t', 'train', 16).batch(1, 5, [3])[0])
    assert not torch.equal(x, tokens.batch(1, 6, torch.arange(8))[0])
    assert not torch.equal(x, tokens.batch(2, 5, torch.arange(8))[0])
    stream = ''.join(map(chr, tokens.ids))
    assert all(''.join(map(chr, row)) in stream for row in x.tolist())


def test_every_place_is_drawn_equally_often(monkeypatch):
    tokens = prepared()
    starts = []
    monkeypatch.setattr(tokens, 'chunks', starts.extend)
    tokens.ids = tokens.ids[:22]  # 7 places for a chunk of 16
    tokens.batch(0, 0, range(7000))
    assert set(starts) == set(range(7)) and np.abs(np.bincount(starts) - 1000).max() < 150
    tokens.ids = range(9_000_000_000)  # all that is asked of it is its length
    starts.clear()
    tokens.batch(0, 0, range(4000))
    assert len(set(starts)) == 4000 and max(starts) <= 9_000_000_000 - 16
    assert np.std(np.array(starts) % 1000) > 280  # uniform: 289; no lattice


def test_rows_lie_side_by_side():
    tokens = prepared()
    x, = tokens.rows(range(len(tokens)))
    assert len(tokens) == 9000 // 16 and x.dtype == torch.int64
    assert np.array_equal(x.flatten(), tokens.ids[:len(tokens) * 16])
    assert torch.equal(tokens.rows([3])[0], x[[3]]) and torch.equal(tokens.rows([2, 3])[0], x[2:4])
    for i in (-1, len(tokens)):
        with pytest.raises(IndexError):
            tokens.rows([i])


def test_wrap_is_the_protocol_of_mdlm():
    tokens = prepared(wrap=True)
    assert tokens.meta['wrap'] and 'BOS' in tokens.meta['packing']
    (x,), stream = tokens.rows(range(len(tokens))), prepared('plain').ids
    assert len(tokens) == 9000 // 14 and (x[:, 0] == 10).all() and (x[:, -1] == 10).all()
    # MDLM's _group_texts: block_size - 2 ids of the stream in each chunk
    assert np.array_equal(x[:, 1:-1].flatten(), stream[:len(tokens) * 14])
    y, = tokens.batch(0, 0, [0, 1])
    assert y.shape == (2, 16) and (y[:, 0] == 10).all() and (y[:, -1] == 10).all()
    with pytest.raises(UserError, match='EOS'):
        write('one', {'train': lambda: iter([('abc', True)])}, 'char', tail=0.1, wrap=True)


def test_split_rules():
    digits = {'train': lambda: ((str(i), True) for i in range(10))}
    write('k', digits, 'char', tail=3, rule='last 3 documents')
    meta = read_meta(os.path.join(lib.prepare.DATA, 'k'))
    assert (meta['train']['documents'], meta['val']['documents']) == (7, 3)
    assert meta['split_rule'] == 'last 3 documents'
    assert everything('k', 'val') == [7, 10, 8, 10, 9, 10]
    with pytest.raises(UserError, match='--val_documents'):
        write('k2', digits, 'char', tail=10)


def test_line_ends_and_a_byte_order_mark(tmp_path, monkeypatch):
    """However the blocks cut them, they are no characters of the text."""
    text = 'one\n\n\ntwo\nlines\n\n\n\nthree'
    dos, mac = text.replace('\n', '\r\n'), text.replace('\n', '\r')
    for i, written in enumerate((text, dos, mac, '\ufeff' + text)):
        source = save(tmp_path / f'{i}.txt', written)
        assert list(lib.prepare.read_files([str(source)])) == [('one', True), ('two\nlines', True),
                                                               ('\nthree', True)]
    for cut in range(1, 8):
        blocks = io.BytesIO(('\ufeff' + dos).encode())
        monkeypatch.setattr(lib.prepare, 'open', lambda *args, b=blocks, n=cut: b, raising=False)
        blocks.read = lambda n, read=blocks.read, cut=cut: read(cut)
        assert ''.join(lib.prepare.read_blocks('x', SimpleNamespace(update=bool))) == text


@pytest.mark.parametrize('lengths, tail, parts, said', [
    ([100] * 50, 0.02, (4900, 100), ''), ([1000], 0.1, (900, 100), ''),
    ([42, 300_000], 0.02, (294_041, 6001), 'would be 100.0% of the tokens, not 2.0%'),  # a title, a book
    ([400, 420, 176], 0.05, (946, 50), 'would be 17.7% of the tokens, not 5.0%'),
    ([90, 100, 10], 0.3, (140, 60), 'would be 5.0% of the tokens, not 30.0%'),
    ([70, 60, 60, 10], 0.25, (150, 50), 'would be 5.0% of the tokens, not 25.0%')])
def test_validation_has_the_share_that_was_asked_for(lengths, tail, parts, said, tmp_path, capsys):
    """Within a factor of two by whole documents, otherwise by tokens."""
    ids = np.arange(sum(lengths), dtype=np.uint32)
    ids.tofile(tmp_path / 'train')
    train, val = lib.prepare.move_tail(tmp_path / 'train', tmp_path / 'val', lengths, tail, 4)
    assert (sum(train), sum(val)) == parts and len(train) + len(val) in (len(lengths), len(lengths) + 1)
    files = [np.fromfile(tmp_path / name, np.uint32) for name in ('train', 'val')]
    assert np.array_equal(np.concatenate(files), ids) and len(files[1]) == parts[1]
    out = capsys.readouterr().out
    assert (said in out) if said else out == ''


def test_check_reads_every_byte(tmp_path, monkeypatch, capsys):
    """A byte changes: reading a small set finds it, data/check.py that of any."""
    prepared('t')

    def check():
        monkeypatch.setattr(sys, 'argv', ['check.py', 't'])
        try:
            run(importlib.import_module('data.check').main)
        except SystemExit as e:
            return e.code
    assert check() is None and capsys.readouterr().out.count(': whole\n') == 2
    path = tmp_path / 'data/t/train.bin'
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(UserError, match='train.bin is not as it was written: run python data/text'):
        Tokens('t', 'train', 16)
    monkeypatch.setattr(lib.tokens, 'CHEAP', 10)
    Tokens('t', 'train', 16)
    assert check() == 2
    shown = capsys.readouterr()
    assert 'train.bin: DAMAGED' in shown.out and 'val.bin: whole' in shown.out
    assert 'not as they were written' in shown.err


def test_a_text_file_is_read_as_it_would_be_prepared(tmp_path):
    tok = Char('\nabc', False)
    tok.wrap = False
    for text in 'ab\nc', '\ufeffab\r\nc', 'ab\rc':
        assert read_texts(save(tmp_path / 'in.txt', text), tok, 4).tolist() == [[1, 2, 0, 3]]


def test_separators_may_be_those_of_windows(tmp_path, cli):
    source = save(tmp_path / 'in.txt', 'one\r\n\r\ntwo\r\nlines\r\n\r\nthree')
    argv = '--input', source, '--tokenizer=char', '--workers=1', '--val_fraction=.3', '--name=t'
    for separator in (r'\r\n\r\n', '\r\n\r\n', r'\n\n'):
        assert cli('text', *argv, f'--split={separator}') == 0
        assert read_meta(tmp_path / 'data/t')['train']['documents'] == 2


def test_a_data_source_says_what_it_is(tmp_path):
    """Tokens and WithLatents have the same attributes and give tuples that begin with the ids."""
    tokens = prepared(wrap=True)
    assert (tokens.vocab_size, tokens.block_size, tokens.wrap) == (11, 16, True)
    assert load_tokenizer(tokens.tokenizer).decode([1, 10]) == '1<|endoftext|>'
    folder, meta = latents_folder(tokens, 'org/encoder', 3, 4)
    assert folder == str(tmp_path / 'data/t/latents_encoder_16_3x4')
    os.mkdir(folder)
    latents = torch.randn(len(tokens), 3, 4, dtype=torch.bfloat16)
    latents.view(torch.uint16).numpy().tofile(f'{folder}/train.bin')
    save(tmp_path / folder / 'meta.json', json.dumps(meta | {'encoder_weights': 'abc'}))
    stored = WithLatents(tokens, 'org/encoder', 3, 4)
    for key in ('vocab_size', 'block_size', 'tokenizer', 'wrap'):
        assert getattr(stored, key) == getattr(tokens, key)
    assert len(stored) == len(tokens) and stored.encoder_weights == 'abc'
    x, z_0 = stored.rows([5, 2])
    assert torch.equal(x, tokens.rows([5, 2])[0]) and torch.equal(z_0, latents[[5, 2]].float())
    tokens.tokenizer = None  # as sawtooth, which is computed
    with pytest.raises(UserError, match='prepared set'):
        WithLatents(tokens, 'org/encoder', 3, 4)


# ----------------------------------------------------------------------------
# what can go wrong

def interrupted():
    for i in range(1000):
        if i == 900:
            raise KeyboardInterrupt
        yield f'{i:09d}', True


def die_at_rename(n):
    rename, count = os.replace, itertools.count(1)

    def replace(a, b):
        if next(count) == n:
            os._exit(9)
        rename(a, b)
    os.replace = replace
    prepared(n=500)


def test_interrupted_write(tmp_path, monkeypatch):
    folder = tmp_path / 'data/t'
    monkeypatch.setattr(lib.prepare, 'PIECE', 400)
    prepared('digits')
    digits = str(tmp_path / 'data/digits')  # a tokenizer that need not read the text first
    with pytest.raises(KeyboardInterrupt):
        write('t', {'train': interrupted}, digits, tail=0.1)
    assert not folder.exists()
    prepared()
    whole = snapshot(folder)
    with pytest.raises(KeyboardInterrupt):  # a second run over a good set
        write('t', {'train': interrupted}, digits, tail=0.1)
    assert snapshot(folder) == whole
    for n in (1, 2, 3):  # killed between the renames, with no time to clean up: no set is left
        child = os.fork()
        if child == 0:
            die_at_rename(n)
        assert os.waitpid(child, 0)[1] == 9 << 8
        with pytest.raises(UserError, match='no prepared data'):
            Tokens('t', 'train', 16)
        prepared()
        assert snapshot(folder) == whole


def test_missing_data_names_the_command(tmp_path):
    for name in ('text', 'lm1b', 'zeroshot'):
        os.makedirs(tmp_path / 'data' / name)
        save(tmp_path / 'data' / name / 'prepare.py', '')
    own = 'text/prepare.py --input FILE --tokenizer=gpt2|char|HUB_ID --name='
    for name, command in [('lm1b', 'lm1b/prepare.py'), ('zeroshot/ptb', 'zeroshot/prepare.py'),
                          ('mine', own + 'mine'), ('text', own + 'text')]:
        with pytest.raises(UserError) as e:
            Tokens(name, 'train', 16)
        assert str(e.value).endswith(f'data/{name}: run python data/{command}')


def test_sigterm_and_sigkill(tmp_path, cli):
    """Stopped from outside: no worker outlives the script, and the next run is like any other."""
    for part in ('lib', 'data/text'):
        shutil.copytree(os.path.join(ROOT, part), tmp_path / part, ignore=lambda folder, names: {
            name for name in names if not name.endswith('.py')})
    source = save(tmp_path / 'in.txt', 'the cat sat on the mat\n' * 200_000)
    argv = '--split=line', '--tokenizer=char', '--name=v', '--workers=1'
    assert cli('text', '--input', save(tmp_path / 'v.txt', 'the cat sat on m\n!'), *argv) == 0
    argv = '--split=line', '--tokenizer', str(tmp_path / 'data/v'), '--name=t'  # v's tokenizer
    command = [sys.executable, 'data/text/prepare.py', '--input', str(source), *argv, '--workers=2']
    folder = tmp_path / 'data/t'
    for sign in (signal.SIGTERM, signal.SIGKILL):
        script = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not (folder / 'train.bin.tmp').exists() or not (folder / 'train.bin.tmp').stat().st_size:
            assert script.poll() is None, script.stderr.read()
            time.sleep(0.02)
        script.send_signal(sign)
        script.communicate(timeout=300)  # also waits until the last worker has closed standard error
        assert script.returncode == (143 if sign == signal.SIGTERM else -9)
        assert sign == signal.SIGKILL or not folder.exists()
    assert not (folder / 'meta.json').exists() and not (folder / 'train.bin').exists()
    assert cli('text', '--input', save(source, 'the cat\n' * 9), *argv, '--workers=1') == 0
    assert sorted(snapshot(folder)) == ['meta.json', 'train.bin', 'val.bin']


BAD = [  # arguments, what the line says
    ('text', ['--input', 'empty.txt'], 'no text'),
    ('text', ['--input', 'latin.txt'], 'latin.txt is not UTF-8'),
    ('text', ['--input', 'good.txt', 'cut.txt'], 'cut.txt is not UTF-8'),
    ('text', ['--input', 'nowhere.txt'], 'nowhere.txt'),
    ('text', ['--input', '.'], '. is a folder; name the files in it: ./*'),
    ('text', ['--input', '-'], 'save it to a file'),
    ('text', ['--input=~/nowhere.txt'], os.path.expanduser('~/nowhere.txt')),
    ('text', ['--input', 'pipe'], 'save it to a file'),
    ('text', ['--input', 'latin.txt'], 'iconv -f LATIN1 -t UTF-8 latin.txt > NEW_FILE'),
    ('text', ['--input', 'packed.gz'], 'it is compressed: unpack it first'),
    ('text', ['--input', 'utf16.txt'], 'iconv -f UTF-16 -t UTF-8 utf16.txt > NEW_FILE'),
    ('text', ['--input', 'utf16le.txt'], 'iconv -f UTF-16 -t UTF-8 utf16le.txt > NEW_FILE'),
    ('text', ['--input', 'good.txt', '--name=sawtooth'], '--name=sawtooth is taken'),
    ('text', [], '--input'),
    ('text', ['--input', 'good.txt', '--tokeniser=char'], '--tokenizer'),
    ('text', ['--input', 'good.txt', '--tokenizer=./nowhere'], './nowhere'),
    ('text', ['--input', 'good.txt', '--name=../x'], '--name'),
    ('text', ['--input', 'good.txt', '--split='], '--split'),
    ('text', ['--input', 'good.txt', '--val_fraction=1.5'], '--val_fraction'),
    ('text', ['--input', 'good.txt', '--workers=0'], '--workers'),
    ('text', ['--input', 'good.txt', '--workers=two'], '--workers'),
    ('text', ['--input', 'good.txt', '--split=file', '--wrap'], '--wrap'),
    ('text', ['--input', 'good.txt', '--name=good.txt', '--tokenizer=good.txt'], 'good.txt'),
    ('shakespeare_char', ['--input', 'empty.txt'], 'no text'),
    ('openwebtext', ['--input', 'good.txt'], '--val_documents'),
    ('openwebtext', ['--input', 'broken.parquet'], 'broken.parquet'),
    ('lm1b', ['--input', 'good.txt'], '--val'),
    ('zeroshot', ['--input', 'good.txt'], '--set'),
    ('zeroshot', ['--set=imdb'], 'imdb'),
    ('zeroshot', ['--set=ptb', '--input', 'good.txt', '--tokenizer=letters'], 'eval.py --out_dir=out/NAME'),
    ('lm1b', ['--input', 'good.txt', '--val', 'nowhere.txt'], 'there is no file nowhere.txt'),
]


@pytest.mark.parametrize('name, argv, says', BAD, ids=[f'{name} {" ".join(argv)}' for name, argv, _ in BAD])
def test_mistakes_are_one_line(name, argv, says, tmp_path, monkeypatch, capsys, cli):
    save(tmp_path / 'good.txt', 'one\n\n\ntwo')
    save(tmp_path / 'empty.txt', '')
    (tmp_path / 'latin.txt').write_bytes('good\n\n\ncaf\u00e9 au lait'.encode('latin1'))
    (tmp_path / 'cut.txt').write_bytes('caf\u00e9'.encode()[:-1])
    (tmp_path / 'packed.gz').write_bytes(gzip.compress(b'good'))
    (tmp_path / 'utf16.txt').write_bytes('good'.encode('utf-16'))
    (tmp_path / 'utf16le.txt').write_bytes('good'.encode('utf-16-le'))
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'broken.parquet').write_bytes(b'PAR1 no')
    if 'parquet' in ' '.join(argv):
        pytest.importorskip('pyarrow')
    if '--tokenizer' not in ' '.join(argv) and name != 'zeroshot':
        argv = ['--tokenizer=char', *argv]
    with monkeypatch.context() as m:
        m.setattr(lib.prepare, 'DATA', '.')
        write('letters', {'train': lambda: iter([('one document', True)])}, 'char', tail=0.5)
    answer(monkeypatch, lambda: monkeypatch.setenv('HF_HUB_OFFLINE', '1'))
    assert cli(name, *argv) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and says in err
    assert [p for p in (tmp_path / 'data').rglob('*') if p.is_file()] == []


def test_without_datasets(monkeypatch, capsys, cli):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    answer(monkeypatch, lambda: None)
    for name in ('openwebtext', 'lm1b'):
        assert cli(name, '--tokenizer=char') == 2
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and 'pip install datasets' in err and '--input FILE' in err


def test_shrunk_or_grown_file(tmp_path):
    prepared()
    path = tmp_path / 'data/t/train.bin'
    whole = path.read_bytes()
    for content, word in ((whole[:-2], 'shrank'), (b'', 'shrank'), (whole + b'xx', 'grew')):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f'data file {word}.*prepare.py.*again'):
            Tokens('t', 'train', 16)
    path.unlink()
    with pytest.raises(UserError, match='shrank'):
        Tokens('t', 'train', 16)


def test_tokens_refuses(tmp_path):
    prepared()
    for name, split, block_size, says in (
            ('nowhere', 'train', 16, '--name=nowhere'), ('t', 'test', 16, 'no test split'),
            ('t', 'train', 9001, 'block_size 9001'),
            ('t', 'train', 0, 'block_size 0; give --block_size=N, from 1 to 9000')):
        with pytest.raises(UserError, match=says) as e:
            Tokens(name, split, block_size)
        assert '\n' not in str(e.value)
    tokens = Tokens(str(tmp_path / 'data/t'), 'train', 9000)  # a path works, too
    assert len(tokens) == 1 and tokens.block_size == 9000


def test_damaged_meta(tmp_path):
    prepared()
    path = tmp_path / 'data/t/meta.json'
    good = json.loads(path.read_text())
    bad = [b'', b'{', b'null', b'[]', b'3', b'"meta"', b'{}', b'\xff\xfe', b'[' * 100_000]
    bad.append(path.read_bytes()[:-20])
    for key in ('dtype', 'vocab_size', 'tokenizer', 'eos_id', 'wrap', 'train', 'bos_id'):
        if key != 'train':
            bad.append(json.dumps({k: v for k, v in good.items() if k != key}).encode())
        values = 'float16', -1, [], {}, 1.5, 10**30 if key != 'vocab_size' else 0
        bad += [json.dumps(good | {key: value}).encode() for value in values]
    bad += [json.dumps(good | {'train': {'tokens': n}}).encode() for n in (-9000, '9000', None, 0, 9e3, True)]
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r'(damaged|shrank|no train split)') as e:
            Tokens('t', 'train', 16)
        assert '\n' not in str(e.value), content[:80]


# ----------------------------------------------------------------------------
# the other scripts

def test_lm1b_and_zeroshot(tmp_path, cli):
    save(tmp_path / 'train.txt', 'The U.S. , he said : " yes " .\nIt \'s $ 5 ( five ) ?\n')
    save(tmp_path / 'val.txt', 'No , he did n\'t .\n')
    assert cli('lm1b', '--tokenizer=char', '--workers=1', '--input', 'train.txt', '--val', 'val.txt') == 0
    decode = named_tokenizer(str(tmp_path / 'data/lm1b')).decode
    text = decode(everything('lm1b', 'train'))
    assert text == 'The U.S., he said: "yes" .<|endoftext|>It\'s $5 (five)?<|endoftext|>'
    save(tmp_path / 'ptb.txt', ' the $ N N <unk> did n\'t fall \n\n it \'s\n')
    save(tmp_path / 'ptb_vocabulary.txt', 'the $ 1 ?\'didn fall it s\n')
    argv = '--tokenizer=char', '--workers=1', '--name=v'
    assert cli('text', *argv, '--input', 'ptb_vocabulary.txt', 'ptb.txt') == 0
    argv = '--workers=1', '--set=ptb', '--input', 'ptb.txt'
    assert cli('zeroshot', f'--tokenizer={tmp_path}/data/v', *argv) == 0
    tokens = Tokens('zeroshot/ptb', 'val', 4)
    text = load_tokenizer(tokens.tokenizer, tokens.vocab_size).decode(tokens.ids)
    assert text == "the $1 1 ? didn't fall<|endoftext|>it's<|endoftext|>"
    assert not (tmp_path / 'data/zeroshot/ptb/train.bin').exists()
    with pytest.raises(UserError, match='no train split'):
        Tokens('zeroshot/ptb', 'train', 4)
    assert cli('zeroshot', '--tokenizer=char', *argv) == 2


def test_parquet(tmp_path, capsys, cli):
    pyarrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    for name, column in (('x.parquet', 'text'), ('y.parquet', 'sentence')):
        table = pyarrow.table({column: ['one', '', 'two\n\n\nand', 'three'], 'id': [1, 2, 3, 4]})
        parquet.write_table(table, tmp_path / name)
    argv = '--tokenizer=char', '--workers=1', '--val_documents=1', '--input'
    assert cli('openwebtext', *argv, 'x.parquet') == 0
    tok = named_tokenizer(str(tmp_path / 'data/openwebtext'))
    assert tok.decode(everything('openwebtext', 'train')) == 'one<|endoftext|>two\n\n\nand<|endoftext|>'
    assert tok.decode(everything('openwebtext', 'val')) == 'three<|endoftext|>'
    assert cli('openwebtext', *argv, 'y.parquet') == 2 and 'y.parquet' in capsys.readouterr().err


def test_hub(monkeypatch, capsys, cli):
    """A stand-in for `load_dataset`: what we ask it for, make of its rows, and say when it fails."""
    datasets = pytest.importorskip('datasets')
    asked, rows = [], datasets.Dataset.from_dict({'sentence': ['a', '', 'b c'], 'text': ['d', 'e\n', 'f']})
    answer(monkeypatch, lambda: None)

    def load(*args, **kwargs):
        asked.append((*args, kwargs['split']))
        return rows
    monkeypatch.setattr(datasets, 'load_dataset', load)
    assert cli('lm1b', '--tokenizer=char', '--workers=1') == 0
    assert set(asked) == {('dvruette/lm1b', 'train'), ('dvruette/lm1b', 'test')}
    assert Tokens('lm1b', 'val', 3).rows([0])[0].tolist() == [[1, 4, 2]]  # "d", EOS, "e"
    assert list(lib.prepare.read_hub('x', split='test', column='sentence')) == [('a', True), ('b c', True)]
    assert cli('openwebtext', '--tokenizer=char') == 2  # these are not 8,013,769 documents
    assert 'incomplete' in capsys.readouterr().err

    def offline(*args, **kwargs):
        raise ConnectionError('no route\nto host')
    monkeypatch.setattr(datasets, 'load_dataset', offline)
    assert cli('openwebtext', '--tokenizer=char') == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'no route' in err and '--input FILE' in err


class Download:
    def __init__(self, content):
        self.content = content

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self):
        if isinstance(self.content, bytes):
            return self.content
        raise self.content


def zipped(text):
    """A zip file of text8, as bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('text8', text)
    return buffer.getvalue()


@pytest.mark.parametrize('name, content, keeps', [
    ('shakespeare_char', b'to be or not' * 10, 'input.txt'),
    ('text8', zipped('to be or not' * 10), 'text8.zip')])
def test_a_text_is_downloaded(name, content, keeps, tmp_path, monkeypatch, capsys, cli):
    """A stand-in for the network: a connection that breaks off gives one line and leaves nothing."""
    monkeypatch.setattr(importlib.import_module(f'data.{name}.prepare'), 'DATA', str(tmp_path / 'data'))
    for error in (ConnectionResetError('reset'), http.client.IncompleteRead(b'half')):
        monkeypatch.setattr(lib.prepare.urllib.request, 'urlopen', lambda *_, e=error, **__: Download(e))
        assert cli(name) == 2 and 'cannot download' in capsys.readouterr().err
        assert not (tmp_path / 'data').exists()
    monkeypatch.setattr(lib.prepare.urllib.request, 'urlopen', lambda *_, **__: Download(content))
    with disk_full(100):
        assert cli(name) == 2 and 'cannot write' in capsys.readouterr().err
    assert cli(name) == 0
    assert {*os.listdir(tmp_path / 'data' / name)} == {keeps, 'meta.json', 'train.bin', 'val.bin'}


def test_text8_is_letters_and_spaces(tmp_path, monkeypatch, capsys, cli):
    """As its published cleaning does: digits are words, other characters spaces, and spaces are single."""
    from data.text8 import prepare
    assert prepare.clean('In 1984:\n\n"Café\u00a0No.7", x_y') == \
        'in one nine eight four caf no seven x y'
    assert cli('text8', '--input', save(tmp_path / 'in.txt', 'It was 20 degrees! ' * 100)) == 0
    text = 'it was two zero degrees ' * 100
    train, val = everything('text8', 'train'), everything('text8', 'val')
    tokens = Tokens('text8', 'train', 8)
    assert tokens.vocab_size == len(set(text))
    assert load_tokenizer(tokens.tokenizer).decode(train + val) == text[:int(0.95 * len(text))]
    assert len(train) == int(0.9 * len(text))

    monkeypatch.setattr(prepare, 'DATA', str(tmp_path))
    (tmp_path / 'text8').mkdir()
    save(tmp_path / 'text8/text8.zip', 'not a zip file')
    assert cli('text8') == 2 and 'text8.zip is not what http://mattmahoney' in capsys.readouterr().err
