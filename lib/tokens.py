"""
Token files: prepared text as batches of ids, and ids as text again.

A prepared set is a folder:
    train.bin, val.bin   the ids of all documents, one after the other, as uint16 (uint32 above 65,535 ids)
    meta.json            dtype, vocabulary, tokenizer, special ids, packing, split rule, counts, checksums
Documents are joined by EOS and cut into chunks only when they are read, so one file serves every block size.
With `wrap`, the protocol of MDLM (`_group_texts` in its dataloader.py), a chunk is BOS, block_size - 2 ids of
the same stream, EOS.

A data source, such as Tokens or Sawtooth, has
    vocab_size (without [mask]), block_size, tokenizer (a spec for `load_tokenizer`, or None), wrap
    sha256 (where it has a tokenizer): the beginnings of its files' checksums, as meta.json has them
    batch(seed, step, rows) for training, rows(indices) and len() for validation; both give tuples (ids, ...)
"""
import json
import math
import os
import shlex
import urllib.error
import urllib.request

import numpy as np
import torch

from lib.configurator import UserError
from lib.files import sha256_of
from lib.noise import Noise

DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'data')


# ----------------------------------------------------------------------------
# tokenizers

class Tokenizer:
    """Has encode, encode_batch, decode, vocab_size, eos_id, bos_id (or None), spec (what meta.json keeps)."""

    def encode(self, text):
        return self.encode_batch([text])[0]


class Char(Tokenizer):
    """One id per character of the corpus, in sorted order, and one for EOS if there are documents to join."""

    def __init__(self, chars, eos):
        self.spec = {'kind': 'char', 'chars': chars, 'eos': eos}
        self.chars, self.ids = chars, {c: i for i, c in enumerate(chars)}
        self.eos_id = self.bos_id = len(chars) if eos else None
        self.vocab_size = len(chars) + eos

    def encode_batch(self, texts):
        try:
            return [[self.ids[c] for c in text] for text in texts]
        except KeyError as e:
            raise UserError(f'character {e.args[0]!r} is not one of the {len(self.chars)} that the tokenizer '
                            'knows: leave it out of the text, or train on data that has it') from None

    def decode(self, ids):
        return ''.join('<|endoftext|>' if i == self.eos_id else self.chars[i] for i in map(int, ids))


class GPT2(Tokenizer):
    """GPT-2's byte-level BPE, from tiktoken: 50,257 ids, the last of which is both EOS and BOS."""
    spec = {'kind': 'gpt2'}
    vocab_size, eos_id, bos_id = 50257, 50256, 50256

    def __init__(self):
        import tiktoken
        self.bpe = tiktoken.get_encoding('gpt2')

    def encode_batch(self, texts):
        return self.bpe.encode_ordinary_batch(texts, num_threads=1)  # "<|endoftext|>" in a text is text

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids])


class HuggingFace(Tokenizer):
    """Any tokenizer of `transformers`. A BERT's [SEP] and [CLS] serve as EOS and BOS."""

    def __init__(self, tok, spec):
        self.tok, self.spec = tok, spec
        self.eos_id = first_given(tok.eos_token_id, tok.sep_token_id)
        self.bos_id = first_given(tok.bos_token_id, tok.cls_token_id, self.eos_id)
        # tok.vocab_size leaves out added tokens, and ids may have gaps
        self.vocab_size = max(tok.get_vocab().values()) + 1

    @classmethod
    def named(cls, name):
        """By hub id or folder; Qwen's vocab.json and merges.txt are enough."""
        if os.path.isdir(name):
            name = os.path.abspath(name)
        elif os.path.isabs(name):
            raise ValueError('there is no such folder here; copy the tokenizer there')
        else:
            cache_only_if_offline()
        import transformers
        bpe, others = ('vocab.json', 'merges.txt'), ('tokenizer.json', 'tokenizer_config.json')
        if [os.path.exists(f'{name}/{f}') for f in bpe + others] == [True, True, False, False]:
            tok = transformers.Qwen2TokenizerFast(vocab=f'{name}/{bpe[0]}', merges=f'{name}/{bpe[1]}')
        else:  # trust_remote_code=False, because by default it asks whether to run the repository's code
            tok = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return cls(tok, {'kind': 'huggingface', 'name': name})

    def whole_spec(self):
        """A spec that holds the tokenizer itself, for machines that have no such folder."""
        return {'kind': 'tokenizer.json', 'json': self.tok.backend_tokenizer.to_str(),
                'eos': self.tok.eos_token or self.tok.sep_token,
                'bos': self.tok.bos_token or self.tok.cls_token}

    @classmethod
    def stored(cls, spec):
        """From its whole_spec."""
        import tokenizers
        import transformers
        try:
            tok = tokenizers.Tokenizer.from_str(spec['json'])
        except Exception as e:  # it raises no subclass
            raise ValueError(f'the stored one is damaged: {first_line(e)}') from e
        return cls(transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=spec['eos'],
                                                        bos_token=spec['bos']), spec)

    def encode_batch(self, texts):
        # split_special_tokens: "[SEP]" or "<|endoftext|>" in a text is text
        return self.tok(texts, add_special_tokens=False, split_special_tokens=True, verbose=False,
                        return_attention_mask=False, return_token_type_ids=False)['input_ids']

    def decode(self, ids):
        return self.tok.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)


def first_given(*ids):
    return next((i for i in ids if i is not None), None)


def named_tokenizer(name):
    """The tokenizer called `name`: gpt2, a hub id, or the folder of a tokenizer or of a prepared set.
    UserError if it cannot be loaded."""
    if os.path.exists(os.path.join(name, 'meta.json')):
        meta = read_meta(name)
        return load_tokenizer(meta['tokenizer'], meta['vocab_size'])
    tok = load_tokenizer({'kind': 'gpt2'} if name == 'gpt2' else {'kind': 'huggingface', 'name': name})
    if os.path.isdir(name) and tok.tok.is_fast:  # the few others are known by their folder
        tok.spec = tok.whole_spec()
    return tok


def load_tokenizer(spec, vocab_size=0):
    """The tokenizer of a spec, which is {'kind': 'gpt2'}, {'kind': 'char', 'chars': text, 'eos': bool},
    {'kind': 'huggingface', 'name': hub id or folder} or {'kind': 'tokenizer.json', 'json': text, 'eos': token
    or None, 'bos': token or None}, for data of vocab_size ids. UserError if it cannot be loaded or has fewer
    ids than the data."""
    try:
        if spec['kind'] == 'char':
            str.encode(spec['chars'])  # raises unless it is text
            tok = Char(spec['chars'], bool(spec['eos']))
        elif spec['kind'] == 'tokenizer.json':
            tok = HuggingFace.stored(spec)
        else:
            tok = GPT2() if spec['kind'] == 'gpt2' else HuggingFace.named(spec['name'])
        if tok.vocab_size < vocab_size:
            raise ValueError(f'it has {tok.vocab_size:,} ids, but the data has {vocab_size:,}')
        return tok
    except ImportError as e:
        raise UserError(f'{e}: pip install tiktoken transformers') from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        name = spec.get('name', spec.get('kind'))
        raise UserError(f'cannot load the tokenizer {name!r} (gpt2, char, a hub id or a folder; '
                        f'a download needs the network): {first_line(e)}') from e


def first_line(e):
    """The first line of an exception's message, or its class's name if the message is empty."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def cache_only_if_offline():
    """Sets HF_HUB_OFFLINE if the hub does not answer, because its client would retry for half a minute before
    it turned to its cache."""
    if 'HF_HUB_OFFLINE' in os.environ:
        return
    try:
        urllib.request.urlopen(os.environ.get('HF_ENDPOINT', 'https://huggingface.co'), timeout=10).close()
    except urllib.error.HTTPError:
        return  # an HTTP error is an answer, too
    except OSError:
        os.environ['HF_HUB_OFFLINE'] = '1'


# ----------------------------------------------------------------------------
# reading tokens

def prepare_command(folder):
    """The command that prepares the data in `folder`."""
    name = os.path.relpath(folder, DATA)
    for script in (name, os.path.dirname(name)):  # zeroshot/prepare.py also makes zeroshot/ptb
        if script not in ('', 'text') and os.path.exists(os.path.join(DATA, script, 'prepare.py')):
            return f'python data/{script}/prepare.py'
    return f'python data/text/prepare.py --input FILE --tokenizer=gpt2|char|HUB_ID --name={name}'


def folder_of(name_or_path):
    """The folder of a prepared set: one of data/, or any other."""
    folder = os.path.join(DATA, name_or_path)
    elsewhere = not os.path.isdir(folder) and os.path.isdir(name_or_path)
    return os.path.abspath(name_or_path) if elsewhere else folder


def read_meta(folder):
    """meta.json as a dict, with every entry that we rely on. UserError if it is missing or damaged."""
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        if not is_sound(meta):
            raise ValueError('an entry has an impossible value')
        return meta
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f'there is no prepared data in {folder}: run {prepare_command(folder)}') from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f'{folder}/meta.json is damaged ({type(e).__name__}: {first_line(e)}): '
                        f'run {prepare_command(folder)} again') from e


def is_sound(meta):
    """Whether the entries that we rely on have possible values; KeyError or TypeError if one is missing."""
    tokens = [meta[split]['tokens'] for split in ('train', 'val') if split in meta]
    specials = meta['eos_id'], meta['bos_id']
    return (tokens and all(type(n) is int and n > 0 for n in [*tokens, meta['vocab_size']])
            and all(i is None or type(i) is int and 0 <= i < meta['vocab_size'] for i in specials)
            and isinstance(meta['wrap'], bool) and not (meta['wrap'] and None in specials)
            and isinstance(meta['tokenizer']['kind'], str) and meta['dtype'] in ('uint16', 'uint32'))


CHEAP = 1 << 26  # bytes: a file as small as this is read once more to compare its checksum


def open_array(path, dtype, shape, command, sha256):
    """Maps a file into memory -> (the open file, the array).

    UserError, with the command that writes the file again, unless it has exactly the array's size and, if it
    is small and its sha256 is known, that checksum. data/check.py compares those of large files.
    """
    size = os.path.getsize(path) if os.path.exists(path) else 0
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if size != expected:
        raise UserError(f'data file {"shrank" if size < expected else "grew"}: {path} has {size:,} bytes '
                        f'instead of {expected:,}: run {command} again')
    if sha256 and size <= CHEAP and sha256_of(path) != sha256:
        raise UserError(f'data file changed: {path} is not as it was written: run {command} again')
    file = open(path, 'rb')
    return file, np.memmap(file, dtype, 'r', shape=shape)


def check_size(file, array):
    """UserError if a mapped file has shrunk since it was opened: reading would give zeros or SIGBUS."""
    if os.fstat(file.fileno()).st_size < array.nbytes:
        raise UserError(f'data file shrank while it was read: {file.name}; '
                        'put it back, and the same command will go on')


def random_numbers(seed, step, rows, n):
    """A random number below n for each of the global row numbers `rows`, as a list."""
    u = Noise(seed, step, torch.as_tensor(rows, device='cpu'), len(rows)).uniform('chunk', 2)
    # 23 bits each: a single draw is too coarse for the 9 billion places of OpenWebText
    high, low = (u.double() * 2**23).floor().unbind(1)
    return ((high * 2**23 + low) * 2.0**-46 * n).long().tolist()


class Tokens:
    """One split of a prepared set, in chunks of block_size ids: a data source.

    name_or_path: 'openwebtext' or 'zeroshot/ptb', folders of data/, or any other folder with a meta.json
    UserError if there is no such set or split, a file is damaged, or it is shorter than a chunk.
    """

    def __init__(self, name_or_path, split, block_size):
        self.folder, self.split, self.block_size = folder_of(name_or_path), split, block_size
        self.meta = meta = read_meta(self.folder)
        if split not in meta:
            raise UserError(f'{self.folder} has no {split} split')
        self.vocab_size, self.tokenizer, self.wrap = meta['vocab_size'], meta['tokenizer'], meta['wrap']
        self.sha256 = '-'.join(str(meta[s].get('sha256', '?'))[:16] for s in ('train', 'val') if s in meta)
        path, count = os.path.join(self.folder, split + '.bin'), meta[split]['tokens']
        self.file, self.ids = open_array(path, meta['dtype'], (count,), prepare_command(self.folder),
                                         meta[split].get('sha256'))
        self.body = block_size - 2 * self.wrap  # ids that a chunk takes from the file
        if not 1 <= self.body <= count:
            larger = ', or prepare more for validation: --val_fraction' * (split == 'val')
            raise UserError(f'{path} holds {count:,} tokens, which make no chunk of block_size {block_size}; '
                            f'give --block_size=N, from {1 + 2 * self.wrap} to {count + 2 * self.wrap}'
                            f'{larger}')

    def __len__(self):
        return len(self.ids) // self.body

    def chunks(self, starts):
        """The chunks that begin at these positions of the file: int64 (len(starts), block_size)."""
        check_size(self.file, self.ids)
        x = np.stack([self.ids[i:i + self.body] for i in starts]).astype(np.int64)
        if self.wrap:
            ends = self.meta['bos_id'], self.meta['eos_id']
            x = np.pad(x, ((0, 0), (1, 1)), constant_values=((0, 0), ends))
        return torch.from_numpy(x)

    def batch(self, seed, step, rows):
        """Training -> (ids,), int64 (len(rows), block_size): one chunk from anywhere per global row number.
        A pure function of (seed, step, row)."""
        return (self.chunks(random_numbers(seed, step, rows, len(self.ids) - self.body + 1)),)

    def rows(self, indices):
        """Validation -> (ids,), int64 (len(indices), block_size): chunks that lie side by side, by number.
        IndexError outside 0 .. len() - 1."""
        indices = [int(i) for i in indices]
        if not all(0 <= i < len(self) for i in indices):
            raise IndexError(f'chunks are numbered 0 .. {len(self) - 1}')
        return (self.chunks([i * self.body for i in indices]),)


# ----------------------------------------------------------------------------
# reading stored latents, which data/encode.py writes for LADD with a frozen encoder

def latents_folder(tokens, encoder, num_latents, latent_dim):
    """The folder for the latents of a prepared set (any split of it), and what their meta.json must hold."""
    shape = f'{tokens.block_size}_{num_latents}x{latent_dim}'
    folder = os.path.join(tokens.folder, f'latents_{os.path.basename(os.path.normpath(encoder))}_{shape}')
    splits = {split: dict(chunks=tokens.meta[split]['tokens'] // tokens.body,
                          tokens_sha256=tokens.meta[split].get('sha256'))
              for split in ('train', 'val') if split in tokens.meta}
    return folder, dict(dtype='bfloat16', encoder=encoder, block_size=tokens.block_size,
                        num_latents=num_latents, latent_dim=latent_dim, **splits)


class WithLatents:
    """Tokens whose chunks come with their stored latents: a data source of (ids, latents (n, M, D) fp32).

    Training draws from the len() chunks that have a latent; a chunk of Tokens may begin anywhere.
    encoder_weights: checkpoint.fingerprint of the encoder that made the latents, or None
    UserError if the latents are missing, damaged, or made of something else.
    """

    def __init__(self, tokens, encoder, num_latents, latent_dim):
        if tokens.tokenizer is None:
            raise UserError('latents are stored beside a prepared set; sawtooth has no folder for them')
        folder, wanted = latents_folder(tokens, encoder, num_latents, latent_dim)
        name = os.path.relpath(tokens.folder, DATA)
        name = shlex.quote(tokens.folder if name.startswith('..') else name)
        command = (f'python data/encode.py --method=ladd --dataset={name} --encoder={shlex.quote(encoder)} '
                   f'--block_size={tokens.block_size} --num_latents={num_latents} --latent_dim={latent_dim}')
        try:
            with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
                meta = json.load(f)
            changed = [key for key in wanted if meta.get(key) != wanted[key]]
            sha256 = meta.get('sha256', {}).get(tokens.split)
        except FileNotFoundError:
            raise UserError(f'there are no stored latents in {folder}: run {command}') from None
        except (OSError, ValueError, AttributeError) as e:
            raise UserError(f'{folder}/meta.json is damaged ({type(e).__name__}): run {command}') from e
        if changed:
            raise UserError(f'the latents in {folder} were made of something else '
                            f'({", ".join(changed)} changed): run {command}')
        self.tokens, self.encoder_weights = tokens, meta.get('encoder_weights')
        self.vocab_size, self.block_size = tokens.vocab_size, tokens.block_size
        self.tokenizer, self.wrap, self.sha256 = tokens.tokenizer, tokens.wrap, tokens.sha256
        path, shape = os.path.join(folder, tokens.split + '.bin'), (len(tokens), num_latents, latent_dim)
        self.file, self.latents = open_array(path, np.uint16, shape, command, sha256)  # no bfloat16 in numpy

    def __len__(self):
        return len(self.tokens)

    def batch(self, seed, step, rows):
        """Training: a random chunk for each global row number, a pure function of (seed, step, row)."""
        return self.rows(random_numbers(seed, step, rows, len(self)))

    def rows(self, indices):
        """Chunks by number; IndexError outside 0 .. len() - 1."""
        indices = [int(i) for i in indices]
        check_size(self.file, self.latents)
        latents = torch.from_numpy(self.latents[indices]).view(torch.bfloat16).float()
        return *self.tokens.rows(indices), latents
