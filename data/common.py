"""
Text -> token files, and token files -> batches. Every data/<name>/prepare.py writes with this file; train.py and eval.py read with it.

A prepared set is a folder:  train.bin, val.bin   the token ids, one after the other: uint16, or uint32 above 65,535 ids
                             meta.json            dtype, vocabulary, tokenizer, special ids, packing, split rule, counts, checksums
Documents are joined by EOS and cut into chunks when they are read, so one file serves every block size. With wrap (the protocol
of MDLM, `_group_texts` in its dataloader.py) a chunk is BOS, block_size - 2 ids of the same stream, EOS.

A corpus is streamed as pairs (text, ends): `ends` says that a document ends with this text. Memory does not grow with the corpus
(4 bytes a document, for the split): a block is read, split, encoded in another process and appended to the file.
"""
import argparse, array, codecs, collections, concurrent.futures, hashlib, json, multiprocessing, os, shutil, signal, sys, threading
import urllib.error, urllib.request

import numpy as np
import torch
from tqdm import tqdm

from configurator import UserError, nearest, run
from noise import Noise

DATA = os.path.dirname(os.path.abspath(__file__))
PIECE = 1 << 20  # characters; a longer document is encoded in pieces

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
            self.tok = transformers.AutoTokenizer.from_pretrained(name)
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
            return Char(spec['chars'], spec['eos'])
        return GPT2() if spec['kind'] == 'gpt2' else HuggingFace(spec['name'])
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
# reading text

def read_files(files, separator='\n\n\n'):
    """Stream local files as (text, ends). Text is UTF-8, taken as it is; a file ends a document, and so does every `separator`
    (None: only the file does). Empty documents are dropped. A .parquet file holds one document per row of its column `text`."""
    with tqdm(total=sum(os.path.getsize(f) for f in files if os.path.isfile(f)), unit='B', unit_scale=True, disable=None) as bar:
        for path in files:
            try:
                if path.endswith('.parquet') and os.path.isfile(path):
                    yield from read_parquet(path)
                else:
                    yield from split_documents(read_blocks(path, bar), separator)
            except UnicodeDecodeError as e:
                raise UserError(f'{path} is not UTF-8 ({e.reason}); convert it: iconv -f LATIN1 -t UTF-8 {path}') from e
            except OSError as e:
                raise UserError(f'cannot read {path}: {e.strerror or e}') from e

def read_blocks(path, bar):
    decoder = codecs.getincrementaldecoder('utf-8')()  # bytes, not text mode: "\r\n" stays what it is
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            bar.update(len(block))
            yield decoder.decode(block)
    yield decoder.decode(b'', final=True)

def split_documents(blocks, separator):
    rest, inside = '', False  # inside: a piece of this document has gone out already
    for block in blocks:
        *whole, rest = (rest + block).split(separator) if separator else [rest + block]
        for text in whole:
            if text or inside:
                yield text, True
            inside = False
        if len(rest) > PIECE:
            cut = end = len(rest) - len(separator or ' ')  # a separator may have begun in what follows
            # between "x\n" and "y" GPT-2, Qwen and BERT cut in any case: the same ids. Without such a place we cut anywhere: the same text.
            while (cut := rest.rfind('\n', 1, cut)) > 0 and (rest[cut - 1].isspace() or rest[cut + 1].isspace()):
                pass
            cut = cut + 1 if cut > 0 else end
            yield rest[:cut], False
            rest, inside = rest[cut:], True
    if rest or inside:
        yield rest, True

def read_parquet(path):
    try:
        import pyarrow.parquet
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000, columns=['text']):
            yield from ((text, True) for text in batch['text'].to_pylist() if text)
    except ImportError as e:
        raise UserError(f'reading {path} needs `pip install pyarrow`') from e
    except (ValueError, KeyError) as e:  # pyarrow's own are among them
        raise UserError(f'{path} is not a parquet file with a column `text`: {first_line(e)}') from e

def read_hub(*args, column='text', expect=None, **kwargs):
    """Stream a parquet dataset of the Hugging Face hub, one document per row; the arguments are those of `datasets.load_dataset`."""
    way_out = 'or give local text with --input FILE'
    cache_only_if_offline()
    try:
        import datasets
    except ImportError as e:
        raise UserError(f'reading parquet needs `pip install datasets`, {way_out}') from e
    try:
        data = datasets.load_dataset(*args, **kwargs).select_columns(column)
    except Exception as e:  # the hub fails in as many ways as it has layers
        raise UserError(f'cannot load the dataset {args[0]!r}: {first_line(e)}; try again with a network, {way_out}') from e
    if expect and len(data) != expect:
        raise UserError(f'the dataset {args[0]!r} has {len(data):,} documents where {expect:,} are expected: an incomplete copy')
    for rows in tqdm(data.iter(1000), total=-(-len(data) // 1000), unit='k documents', disable=None):
        for text in rows[column]:
            if text:
                yield text, True

# ----------------------------------------------------------------------------------------------------------------------
# writing tokens

def encode(task, tok=None):
    """[(text, ends)] -> all the ids in one array, and [(number of ids, ends)]; `ends` adds EOS."""
    tok = tok or worker_tok
    batch = tok.encode_batch([text for text, _ in task])
    for ids, (_, ends) in zip(batch, task):
        ids += [tok.eos_id] * (ends and tok.eos_id is not None)
    return np.array([i for ids in batch for i in ids], dtype_of(tok)), [(len(ids), ends) for ids, (_, ends) in zip(batch, task)]

def start_worker(spec):
    global worker_tok
    worker_tok = load_tokenizer(spec)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # one thread per worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the parent's affair,
    # and nobody outlives it:
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()

def encode_all(stream, tok, workers):
    """The results of `encode` in the order of the stream. A few tasks per worker are under way, never the whole corpus."""
    def tasks():
        task, size = [], 0
        for text, ends in stream:
            task.append((text, ends))
            size += len(text)
            if size >= PIECE // 4 or len(task) >= 10_000:
                yield task
                task, size = [], 0
        if task:
            yield task

    if workers == 1:
        yield from (encode(task, tok) for task in tasks())
        return
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=start_worker, initargs=(tok.spec,)) as pool:
        pending = collections.deque()
        try:
            for task in tasks():
                pending.append(pool.submit(encode, task))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # after an error or Ctrl-C, what has not begun need not be waited for
            for future in pending:
                future.cancel()

def dtype_of(tok):
    return np.dtype('uint16' if tok.vocab_size <= 65535 else 'uint32')

def write(name, streams, tokenizer, tail=None, rule='', wrap=False, workers=1):
    """Write data/<name>/{train.bin, val.bin, meta.json}. All appear at the very end, meta.json last: what has no meta.json is not whole.

    streams: {split: function that starts the stream of (text, ends)};  rule: the split in words, for meta.json
    tail: what moves from the end of train to val: an int is a number of documents, a float a fraction of them (at least one
          document; of the tokens if there is only one document); None if `streams` names the splits itself
    """
    folder = os.path.join(DATA, name)
    fresh = not os.path.isdir(folder)
    bins = {split: os.path.join(folder, split + '.bin') for split in (['train', 'val'] if tail else streams)}
    paths = [*bins.values(), os.path.join(folder, 'meta.json')]
    tok = char_vocabulary(streams) if tokenizer == 'char' else load_tokenizer(tokenizer)
    if wrap and tok.eos_id is None:
        raise UserError('--wrap puts BOS and EOS around every chunk, and this tokenizer has none')
    old_handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it cleans up, as Ctrl-C does
    try:
        os.makedirs(folder, exist_ok=True)
        counts = {}  # documents, tokens
        for split, stream in streams.items():
            lengths, length = array.array('I'), 0  # ids per document
            with open(bins[split] + '.tmp', 'wb') as f:
                for ids, pieces in encode_all(stream(), tok, workers):
                    f.write(ids)
                    for n, ends in pieces:
                        length += n
                        if ends:
                            lengths.append(length)
                            length = 0
            lengths = np.frombuffer(lengths, np.uintc)
            counts[split] = len(lengths), int(lengths.sum(dtype=np.int64))
            if counts[split][1] < 2:
                raise UserError(f'there is no text in what was to become {bins[split]}')
            if counts[split][0] > 1 and tok.eos_id is None:
                raise UserError('this tokenizer has no EOS to join documents with: use --split=file on one file, or another tokenizer')
        if tail:
            counts = move_tail(bins['train'] + '.tmp', bins['val'] + '.tmp', lengths, tail, dtype_of(tok).itemsize)
        meta = dict(dtype=dtype_of(tok).name, vocab_size=tok.vocab_size, tokenizer=tok.spec, eos_id=tok.eos_id, bos_id=tok.bos_id, wrap=wrap,
                    packing='BOS, ids, EOS per chunk' if wrap else 'documents joined by EOS, cut into chunks', split_rule=rule)
        for split, path in bins.items():
            with open(path + '.tmp', 'rb') as f:
                meta[split] = dict(documents=counts[split][0], tokens=counts[split][1], sha256=hashlib.file_digest(f, 'sha256').hexdigest())
        with open(paths[-1] + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
        if os.path.exists(paths[-1]):
            os.remove(paths[-1])  # from here to the last rename there is no set at all, rather than half of one
        for path in paths:
            os.replace(path + '.tmp', path)
    except BaseException:
        for path in paths:
            if os.path.exists(path + '.tmp'):
                os.remove(path + '.tmp')
        if fresh and os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)
        raise
    finally:
        signal.signal(signal.SIGTERM, old_handler)
    for split in bins:
        print(f'{bins[split]}: {counts[split][1]:,} tokens of {tok.vocab_size:,} kinds, {counts[split][0]:,} documents')

def move_tail(train, val, lengths, tail, itemsize):
    """Move the end of the file `train` to the file `val`; returns {split: (documents, tokens)}."""
    documents, tokens, n = len(lengths), int(lengths.sum(dtype=np.int64)), tail
    if isinstance(tail, float):
        n = min(max(1, round(tail * documents)), documents - 1)
    if n >= documents:
        raise UserError(f'validation takes the last {n:,} documents and the input holds {documents:,}: choose a smaller --val_documents')
    first = int(lengths[:-n].sum(dtype=np.int64)) if n else min(max(1, int(tokens * (1 - tail))), tokens - 1)
    with open(train, 'r+b') as f, open(val, 'wb') as g:
        f.seek(first * itemsize)
        shutil.copyfileobj(f, g, 1 << 20)
        f.truncate(first * itemsize)
    return {'train': (documents - n if n else 1, first), 'val': (n or 1, tokens - first)}

def char_vocabulary(streams):
    """A first pass over the text: its characters, and whether there is more than one document."""
    chars, documents = set(), []
    for stream in streams.values():
        documents.append(0)
        for text, ends in stream():
            chars.update(text)
            documents[-1] += ends
    return Char(''.join(sorted(chars)), max(documents) > 1)

class Arguments(argparse.ArgumentParser):
    """The options that every prepare.py has; a mistake is a UserError."""

    def __init__(self, doc, tokenizer='gpt2'):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.add_argument('--input', nargs='+', metavar='FILE', help='local UTF-8 text, or .parquet with a column `text`')
        self.add_argument('--tokenizer', default=tokenizer, 
                          help='char, gpt2, a Hugging Face id or folder, or the folder of a prepared set (default: %(default)s)')
        self.add_argument('--wrap', nargs='?', const='True', default='False', choices=['True', 'False'],
                          help='every chunk is BOS ... EOS, as in MDLM')
        self.add_argument('--workers', type=int, default=os.cpu_count(), help='processes that encode (default: %(default)s)')

    def error(self, message):
        raise UserError(message)

    def parse_args(self, argv):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(f'unknown option {unknown[0]}; {nearest(unknown[0].split("=")[0], self._option_string_actions)}')
        if args.workers < 1:
            raise UserError('--workers must be at least 1')
        args.wrap = args.wrap == 'True'
        for path in args.input or []:
            if not os.path.isfile(path):
                raise UserError(f'there is no file {path}')
        return args

# ----------------------------------------------------------------------------------------------------------------------
# reading tokens

def read_meta(folder):
    """meta.json as a dict, with the entries that the rest relies on; raises UserError if there is none or it is not one of ours."""
    name = os.path.relpath(folder, DATA)
    # the script of zeroshot/ptb is zeroshot's
    scripts = [n for n in (name, os.path.dirname(name)) if n and os.path.exists(os.path.join(DATA, n, 'prepare.py'))]
    command = f'python data/{scripts[0]}/prepare.py' if scripts else f'python data/text/prepare.py --input FILE --name={name}'
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
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f'{folder}/meta.json is damaged ({type(e).__name__}: {first_line(e)}): run {command} again') from e
    return meta | {'command': command}

def open_data(name, split, block_size):
    """The data source that a config calls `dataset`: 'sawtooth' is computed, all else is a prepared set."""
    if name == 'sawtooth':
        from sawtooth import Sawtooth
        return Sawtooth(split)
    return Tokens(name, split, block_size)

class Tokens:
    """One split of a prepared set, as chunks of block_size ids.

    name_or_path: 'openwebtext' or 'zeroshot/ptb' is a folder of data/; any other folder with a meta.json works, too
    vocab_size: ids without [mask];  tokenizer, meta: for `load_tokenizer`;  len(): how many chunks lie side by side, for `row` and `rows`
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
        self.ids = np.memmap(path, dtype, 'r')
        self.block_size, self.body = block_size, block_size - 2 * self.wrap  # ids that a chunk takes from the file
        if not 1 <= self.body <= count:
            raise UserError(f'{path} holds {count:,} tokens, which does not make a chunk of block_size {block_size}')

    def __len__(self):
        return len(self.ids) // self.body

    def chunks(self, starts):
        """(len(starts), block_size) int64: the chunks that begin at these positions of the file."""
        x = np.stack([self.ids[i:i + self.body] for i in starts]).astype(np.int64)
        if self.wrap:
            x = np.pad(x, ((0, 0), (1, 1)), constant_values=((0, 0), (self.meta['bos_id'], self.meta['eos_id'])))
        return torch.from_numpy(x)

    def batch(self, seed, step, rows):
        """Training: a random chunk for each global row number in `rows`, (len(rows), block_size), a pure function of (seed, step, row)."""
        u = Noise(seed, step, torch.as_tensor(rows, device='cpu'), len(rows)).uniform('chunk', 2)
        high, low = (u.double() * 2**23).floor().unbind(1)  # 23 bits each: one draw is too coarse for the 9 billion places of OpenWebText
        return self.chunks(((high * 2**23 + low) * 2.0**-46 * (len(self.ids) - self.body + 1)).long().tolist())

    def row(self, i):
        """Validation: the i-th chunk, side by side in order, (block_size,)."""
        return self.rows([i])[0]

    def rows(self, indices):
        """Chunks by number, (len(indices), block_size); raises IndexError outside 0 .. len - 1."""
        indices = [int(i) for i in indices]
        if not all(0 <= i < len(self) for i in indices):
            raise IndexError(f'chunks are numbered 0 .. {len(self) - 1}')
        return self.chunks([i * self.body for i in indices])
