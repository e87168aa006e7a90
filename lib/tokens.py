"""
Prepared token files -> batches, and ids -> text: what train.py, sample.py and eval.py need of data/.

A prepared set is a folder:  train.bin, val.bin   the token ids, one after the other: uint16, or uint32 above 65,535 ids
                             meta.json            dtype, vocabulary, tokenizer, special ids, packing, split rule, counts, checksums
Documents are joined by EOS and cut into chunks when they are read, so one file serves every block size. With wrap (the protocol
of MDLM, `_group_texts` in its dataloader.py) a chunk is BOS, block_size - 2 ids of the same stream, EOS.
"""
import json, os, shlex
import urllib.error, urllib.request

import numpy as np
import torch

from lib.configurator import UserError
from lib.noise import Noise

DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'data')

# ----------------------------------------------------------------------------------------------------------------------
# tokenizers: encode(text) -> ids, decode(ids) -> text, vocab_size, eos_id and bos_id (or None), spec (what meta.json keeps)

class Tokenizer:
    def encode(self, text):
        return self.encode_batch([text])[0]

class Char(Tokenizer):
    """One id per character of the corpus, in sorted order; EOS is one id more, where there is more than one document to join."""

    def __init__(self, chars, eos):
        self.spec = {'kind': 'char', 'chars': chars, 'eos': eos}
        self.chars, self.ids = chars, {c: i for i, c in enumerate(chars)}
        self.eos_id = self.bos_id = len(chars) if eos else None
        self.vocab_size = len(chars) + eos

    def encode_batch(self, texts):
        try:
            return [[self.ids[c] for c in text] for text in texts]
        except KeyError as e:
            raise UserError(f'the character {e.args[0]!r} is not among the {len(self.chars)} of this character vocabulary') from None

    def decode(self, ids):
        return ''.join('<|endoftext|>' if i == self.eos_id else self.chars[i] for i in map(int, ids))

class GPT2(Tokenizer):
    """The byte-level BPE of GPT-2, by tiktoken: 50,257 ids, the last one is EOS (and BOS)."""
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
    """Any tokenizer of `transformers`, by hub id or folder; Qwen's vocab.json + merges.txt are enough. BERT: [SEP], [CLS] are EOS, BOS."""

    def __init__(self, name):
        if os.path.isdir(name):
            name = os.path.abspath(name)
        else:
            cache_only_if_offline()
        import transformers
        files = [os.path.join(name, f) for f in ('vocab.json', 'merges.txt', 'tokenizer.json', 'tokenizer_config.json')]
        if [os.path.exists(f) for f in files] == [True, True, False, False]:
            self.tok = transformers.Qwen2TokenizerFast(vocab=files[0], merges=files[1])
        else:
            self.tok = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # by default it asks whether to run code
        first = lambda *ids: next((i for i in ids if i is not None), None)
        self.spec = {'kind': 'huggingface', 'name': name}
        self.eos_id = first(self.tok.eos_token_id, self.tok.sep_token_id)
        self.bos_id = first(self.tok.bos_token_id, self.tok.cls_token_id, self.eos_id)
        self.vocab_size = max(self.tok.get_vocab().values()) + 1  # tok.vocab_size leaves out the added tokens; ids may have gaps

    def encode_batch(self, texts):
        # split_special_tokens: "[SEP]" or "<|endoftext|>" in a text is text
        return self.tok(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
                        return_token_type_ids=False, verbose=False)['input_ids']

    def decode(self, ids):
        return self.tok.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)

def load_tokenizer(which):
    """which: 'gpt2', a hub id, a folder of a tokenizer or of a prepared set, a meta.json as a dict, or its 'tokenizer' entry."""
    if isinstance(which, str) and os.path.exists(os.path.join(which, 'meta.json')):
        which = read_meta(which)
    if isinstance(which, str):
        which = {'kind': 'gpt2'} if which == 'gpt2' else {'kind': 'huggingface', 'name': which}
    spec = which.get('tokenizer', which)
    try:
        if spec['kind'] == 'char':
            str.encode(spec['chars'])  # fails unless it is text
            tok = Char(spec['chars'], bool(spec['eos']))
        else:
            tok = GPT2() if spec['kind'] == 'gpt2' else HuggingFace(spec['name'])
        if tok.vocab_size < which.get('vocab_size', 0):
            raise ValueError(f'it has {tok.vocab_size:,} ids where the data has {which["vocab_size"]:,}')
        return tok
    except ImportError as e:
        raise UserError(f'{e}: pip install tiktoken transformers') from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f'cannot load the tokenizer {spec.get("name", spec.get("kind"))!r} (gpt2, char, a hub id or a folder; '
                        f'a download needs the network): {first_line(e)}') from e

def first_line(e):
    return (str(e).strip().splitlines() or [type(e).__name__])[0]

def cache_only_if_offline():
    """Ask whether the hub answers: without a network its client would retry for half a minute before it looks into its cache."""
    if 'HF_HUB_OFFLINE' in os.environ:
        return
    try:
        urllib.request.urlopen(os.environ.get('HF_ENDPOINT', 'https://huggingface.co'), timeout=10).close()
    except urllib.error.HTTPError:
        return  # an answer, too
    except OSError:
        os.environ['HF_HUB_OFFLINE'] = '1'

# ----------------------------------------------------------------------------------------------------------------------
# reading tokens

def read_meta(folder):
    """meta.json as a dict, with the entries that the rest relies on; raises UserError if there is none or it is not one of ours."""
    name = os.path.relpath(folder, DATA)
    # the script of zeroshot/ptb is zeroshot's; that of text is for texts of one's own
    scripts = [n for n in (name, os.path.dirname(name)) if n not in ('', 'text') and os.path.exists(os.path.join(DATA, n, 'prepare.py'))]
    command = 'python data/' + (f'{scripts[0]}/prepare.py' if scripts else f'text/prepare.py --input FILE --tokenizer=gpt2|char|HUB_ID --name={name}')
    count = lambda x, least=1: type(x) is int and x >= least
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        splits, specials = [meta[s] for s in ('train', 'val') if s in meta], [meta['eos_id'], meta['bos_id']]
        if not (splits and all(count(s['tokens']) for s in splits) and count(meta['vocab_size']) and meta['dtype'] in ('uint16', 'uint32')
                and all(i is None or count(i, 0) and i < meta['vocab_size'] for i in specials)
                and isinstance(meta['tokenizer']['kind'], str) and isinstance(meta['wrap'], bool) and not (meta['wrap'] and None in specials)):
            raise ValueError('an entry is not what it should be')
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f'there is no prepared data in {folder}: run {command}') from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f'{folder}/meta.json is damaged ({type(e).__name__}: {first_line(e)}): run {command} again') from e
    return meta | {'command': command}

def open_data(name, split, block_size):
    """The data source that a config calls `dataset`: 'sawtooth' is computed, all else is a prepared set."""
    if name == 'sawtooth':
        from sawtooth import Sawtooth
        return Sawtooth(split)
    return Tokens(name, split, block_size)

def check_whole(file, array):
    """UserError if a memory-mapped file has shrunk since it was opened: to read on would be SIGBUS, an end without a word, or zeros."""
    if os.fstat(file.fileno()).st_size < array.nbytes:
        raise UserError(f'data file shrank while it was read: {file.name}; put it back, and the same command goes on')

def random_numbers(seed, step, rows, n):
    """A random number below n for each global row number in `rows`, a list."""
    u = Noise(seed, step, torch.as_tensor(rows, device='cpu'), len(rows)).uniform('chunk', 2)
    high, low = (u.double() * 2**23).floor().unbind(1)  # 23 bits each: one draw is too coarse for the 9 billion places of OpenWebText
    return ((high * 2**23 + low) * 2.0**-46 * n).long().tolist()

class Tokens:
    """One split of a prepared set, as chunks of block_size ids.

    name_or_path: 'openwebtext' or 'zeroshot/ptb' is a folder of data/; any other folder with a meta.json works, too
    vocab_size: ids without [mask];  tokenizer, meta: for `load_tokenizer`;  len(): how many chunks lie side by side, for `rows`
    """

    def __init__(self, name_or_path, split, block_size):
        folder = os.path.join(DATA, name_or_path)
        if not os.path.isdir(folder) and os.path.isdir(name_or_path):
            folder = os.path.abspath(name_or_path)
        self.meta = read_meta(folder)
        if split not in self.meta:
            raise UserError(f'{folder} has no {split} split')
        path, dtype, count = os.path.join(folder, split + '.bin'), np.dtype(self.meta['dtype']), self.meta[split]['tokens']
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != count * dtype.itemsize:
            raise UserError(f'data file {"shrank" if size < count * dtype.itemsize else "grew"}: {path} has {size:,} bytes and meta.json says '
                            f'{count * dtype.itemsize:,}: run {self.meta["command"]} again')
        self.vocab_size, self.tokenizer, self.wrap = self.meta['vocab_size'], self.meta['tokenizer'], self.meta['wrap']
        self.file = open(path, 'rb')
        self.ids = np.memmap(self.file, dtype, 'r')
        self.folder, self.split = folder, split
        self.block_size, self.body = block_size, block_size - 2 * self.wrap  # ids that a chunk takes from the file
        if not 1 <= self.body <= count:
            raise UserError(f'{path} holds {count:,} tokens, which does not make a chunk of block_size {block_size}; '
                            f'give --block_size=N, from {1 + 2 * self.wrap} to {count + 2 * self.wrap}')

    def __len__(self):
        return len(self.ids) // self.body

    def chunks(self, starts):
        """(len(starts), block_size) int64: the chunks that begin at these positions of the file."""
        check_whole(self.file, self.ids)
        x = np.stack([self.ids[i:i + self.body] for i in starts]).astype(np.int64)
        if self.wrap:
            x = np.pad(x, ((0, 0), (1, 1)), constant_values=((0, 0), (self.meta['bos_id'], self.meta['eos_id'])))
        return torch.from_numpy(x)

    def batch(self, seed, step, rows):
        """Training: a random chunk for each global row number in `rows`, (len(rows), block_size), a pure function of (seed, step, row)."""
        return self.chunks(random_numbers(seed, step, rows, len(self.ids) - self.body + 1))

    def rows(self, indices):
        """Validation: chunks that lie side by side, by number: (len(indices), block_size); raises IndexError outside 0 .. len - 1."""
        indices = [int(i) for i in indices]
        if not all(0 <= i < len(self) for i in indices):
            raise IndexError(f'chunks are numbered 0 .. {len(self) - 1}')
        return self.chunks([i * self.body for i in indices])

# ----------------------------------------------------------------------------------------------------------------------
# reading stored latents: data/encode.py writes them, LADD with a frozen encoder trains on them

def latents_of(tokens, encoder, num_latents, latent_dim):
    """Where the latents of a set (any split of it, a Tokens) belong, and what their meta.json has to say: (folder, dict)."""
    shape = f'{tokens.block_size}_{num_latents}x{latent_dim}'
    splits = {s: dict(chunks=tokens.meta[s]['tokens'] // tokens.body, tokens_sha256=tokens.meta[s].get('sha256')) for s in ('train', 'val') if s in tokens.meta}
    return (os.path.join(tokens.folder, f'latents_{os.path.basename(os.path.normpath(encoder))}_{shape}'),
            dict(dtype='bfloat16', encoder=encoder, block_size=tokens.block_size, num_latents=num_latents, latent_dim=latent_dim, **splits))

class WithLatents:
    """A split of a prepared set in chunks that lie side by side, each with its latent: `batch` and `rows` give (ids, latents (n, M, D) fp32).

    Without latents a training chunk may begin anywhere. Here there are len() of them, and they come again in every epoch.
    encoder_weights: checkpoint.fingerprint of the encoder that made them
    """

    def __init__(self, tokens, encoder, num_latents, latent_dim):
        if not isinstance(tokens, Tokens):
            raise UserError('latents are stored beside a prepared set; what is computed, as sawtooth is, has no such place')
        folder, wanted = latents_of(tokens, encoder, num_latents, latent_dim)
        name = os.path.relpath(tokens.folder, DATA)
        command = f'python data/encode.py --method=ladd --dataset={shlex.quote(tokens.folder if name.startswith("..") else name)} ' \
                  f'--encoder={shlex.quote(encoder)} --block_size={tokens.block_size} --num_latents={num_latents} --latent_dim={latent_dim}'
        try:
            with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
                meta = json.load(f)
            wrong = [k for k in wanted if meta.get(k) != wanted[k]]
        except FileNotFoundError:
            raise UserError(f'there are no stored latents in {folder}: run {command}') from None
        except (OSError, ValueError, AttributeError) as e:
            raise UserError(f'{folder}/meta.json is damaged ({type(e).__name__}): run {command}') from e
        if wrong:
            raise UserError(f'the latents in {folder} were made of something else ({", ".join(wrong)} changed): run {command}')
        self.tokens, self.block_size, self.vocab_size, self.encoder_weights = tokens, tokens.block_size, tokens.vocab_size, meta.get('encoder_weights')
        path, shape = os.path.join(folder, tokens.split + '.bin'), (len(tokens), num_latents, latent_dim)
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != 2 * np.prod(shape, dtype=np.int64):
            raise UserError(f'{path} has {size:,} bytes where {shape} numbers of 2 bytes are expected: run {command}')
        self.file = open(path, 'rb')
        self.latents = np.memmap(self.file, np.uint16, 'r', shape=shape)  # numpy has no bfloat16

    def __len__(self):
        return len(self.tokens)

    def batch(self, seed, step, rows):
        """Training: a random chunk for each global row number in `rows`, a pure function of (seed, step, row)."""
        return self.rows(random_numbers(seed, step, rows, len(self)))

    def rows(self, indices):
        """Chunks by number; raises IndexError outside 0 .. len - 1."""
        indices = [int(i) for i in indices]
        check_whole(self.file, self.latents)
        return self.tokens.rows(indices), torch.from_numpy(self.latents[indices]).view(torch.bfloat16).float()
