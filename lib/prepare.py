"""
Text -> token files, whose format tokens.py describes. Every data/NAME/prepare.py writes with this file.

A corpus is a stream of pairs (text, ends), where `ends` says that a document ends with this text. It is read,
encoded in other processes, and written block by block: memory grows only by 4 bytes for each document.
"""
import argparse
import array
import codecs
import collections
import contextlib
import http.client
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import urllib.request
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tqdm import tqdm

from lib.configurator import UserError, nearest
from lib.files import sha256_of, whole
from lib.tokens import DATA, Char, cache_only_if_offline, first_line, load_tokenizer, named_tokenizer

PIECE = 1 << 20  # characters; a longer document is encoded in pieces


# ----------------------------------------------------------------------------
# reading text

def download(url, path):
    """UserError if it cannot be had whole."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as e:  # an HTTPException means that the connection broke off
        raise UserError(f'cannot download {url}: {e}; get it in another way and give --input FILE') from e
    with whole(path) as temp, open(temp, 'wb') as f:
        f.write(data)


def read_files(files, separator='\n\n\n'):
    """Streams local files as (text, ends), without empty documents. UserError if one cannot be read.

    Text is UTF-8; "\\r\\n" and "\\r" are read as "\\n", and a byte order mark is dropped. A document ends at
    every `separator` (None: nowhere) and with the file. A .parquet file holds one document per row, in its
    column `text`.
    """
    size = sum(os.path.getsize(f) for f in files if os.path.isfile(f))
    with tqdm(total=size, unit='B', unit_scale=True, disable=None) as bar:
        for path in files:
            try:
                if path.endswith('.parquet') and os.path.isfile(path):
                    yield from read_parquet(path)
                else:
                    yield from split_documents(read_blocks(path, bar), separator)
            except UnicodeError as e:
                raise UserError(f'{path} is not UTF-8 ({e}); {advice(path)}') from e
            except OSError as e:
                raise UserError(f'cannot read {path}: {e.strerror or e}') from e


def read_blocks(path, bar):
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder('utf-8-sig')(), translate=True)
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            bar.update(len(block))
            if block.count(0) > len(block) / 4:  # UTF-16 without a byte order mark would pass
                raise UnicodeError('it is full of zero bytes')
            yield decoder.decode(block)
    yield decoder.decode(b'', final=True)


def advice(path):
    """What to do about a file that is not UTF-8."""
    with open(path, 'rb') as f:
        start = f.read(1 << 12)
    if start.startswith((b'\x1f\x8b', b'PK\x03\x04', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')):
        return 'it is compressed: unpack it first'
    if start.startswith((b'\xff\xfe', b'\xfe\xff')) or start.count(0) > len(start) / 4:
        return f'it seems to be UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW_FILE'
    return f'if it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 {path} > NEW_FILE'


def split_documents(blocks, separator):
    """Blocks of text -> (text, ends). A document longer than PIECE goes out in pieces."""
    rest, begun = '', False  # begun: a piece of this document has gone out
    for block in blocks:
        *documents, rest = (rest + block).split(separator) if separator else [rest + block]
        for text in documents:
            if text or begun:
                yield text, True
            begun = False
        if len(rest) > PIECE:
            end = len(rest) - len(separator or ' ')  # the next block may complete a separator
            # cutting between "x\n" and "y" changes no ids: GPT-2, Qwen and BERT never join these two
            cut = max((m.end() for m in re.finditer(r'\S\n(?=\S)', rest[:end + 1])), default=end)
            yield rest[:cut], False
            rest, begun = rest[cut:], True
    if rest or begun:
        yield rest, True


def read_parquet(path):
    try:
        import pyarrow.parquet
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000, columns=['text']):
            yield from ((text, True) for text in batch['text'].to_pylist() if text)
    except ImportError as e:
        raise UserError(f'reading {path} needs `pip install pyarrow`') from e
    except (ValueError, KeyError) as e:  # pyarrow's own errors are ValueErrors and KeyErrors
        raise UserError(f'{path} is not a parquet file with a column `text`: {first_line(e)}') from e


def read_hub(*args, column='text', expect=None, **kwargs):
    """Streams a dataset of the Hugging Face hub, one document per row; other arguments go to load_dataset.
    UserError if it cannot be loaded or does not have `expect` rows."""
    way_out = 'or give local text with --input FILE'
    cache_only_if_offline()
    try:
        import datasets
        data = datasets.load_dataset(*args, **kwargs).select_columns(column)
    except ImportError as e:
        raise UserError(f'{e}: pip install datasets, {way_out}') from e
    except Exception as e:  # the hub fails in as many ways as it has layers
        raise UserError(f'cannot load the dataset {args[0]!r}: {first_line(e)}; '
                        f'try again with a network, {way_out}') from e
    if expect and len(data) != expect:
        raise UserError(f'this copy of the dataset {args[0]!r} is incomplete: '
                        f'it has {len(data):,} documents instead of {expect:,}')
    for rows in tqdm(data.iter(1000), total=-(-len(data) // 1000), unit='k documents', disable=None):
        yield from ((text, True) for text in rows[column] if text)


# ----------------------------------------------------------------------------
# encoding text

def encode(task, tok=None):
    """[(text, ends)] -> all their ids in one array, [(number of ids, ends)]; EOS ends a document."""
    tok = tok or worker_tok
    batch = tok.encode_batch([text for text, _ in task])
    for ids, (_, ends) in zip(batch, task):
        if ends and tok.eos_id is not None:
            ids.append(tok.eos_id)
    pieces = [(len(ids), ends) for ids, (_, ends) in zip(batch, task)]
    return np.array([i for ids in batch for i in ids], dtype_of(tok)), pieces


def dtype_of(tok):
    return np.dtype('uint16' if tok.vocab_size <= 65535 else 'uint32')


def start_worker(spec):
    global worker_tok
    worker_tok = load_tokenizer(spec)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # one thread per worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

    def exit_with_parent():  # the parent may have been killed
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def encode_all(stream, tok, workers):
    """The results of `encode` in the order of the stream, which is read a few tasks per worker ahead."""
    if workers == 1:
        yield from (encode(task, tok) for task in tasks(stream))
        return
    with ProcessPoolExecutor(workers, None, start_worker, (tok.spec,)) as pool:
        pending = collections.deque()
        try:
            for task in tasks(stream):
                pending.append(pool.submit(encode, task))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            # after an error or a signal, tasks that have not begun never do. One that has begun is soon done;
            # a worker that is killed while it hands in its result would leave the pool waiting for the rest
            for future in pending:
                future.cancel()


def tasks(stream):
    task, size = [], 0
    for text, ends in stream:
        task.append((text, ends))
        size += len(text)
        if size >= PIECE // 4 or len(task) >= 10_000:
            yield task
            task, size = [], 0
    if task:
        yield task


# ----------------------------------------------------------------------------
# writing tokens

def write(name, streams, tokenizer, tail=None, rule='', wrap=False, workers=1):
    """Writes train.bin, val.bin and meta.json of data/<name>: all of them or none. UserError if it cannot.

    streams: {split: a function that starts its stream of (text, ends)}
    tokenizer: 'char' for the characters of this text, or a name for named_tokenizer
    tail: what moves from the end of train to val: an int is a number of documents, a float a fraction of
        them, see move_tail; None if `streams` is split already
    rule: the split in words;  wrap: chunks are to be BOS ... EOS;  workers: processes that encode
    """
    folder = os.path.join(DATA, name)
    bins = {split: os.path.join(folder, split + '.bin') for split in (['train', 'val'] if tail else streams)}
    tok = char_vocabulary(streams) if tokenizer == 'char' else named_tokenizer(tokenizer)
    if wrap and tok.eos_id is None:
        raise UserError('--wrap puts BOS and EOS around every chunk, but this tokenizer has neither')
    packing = 'BOS, ids, EOS per chunk' if wrap else 'documents joined by EOS, cut into chunks'
    meta = dict(dtype=dtype_of(tok).name, vocab_size=tok.vocab_size, tokenizer=tok.spec, eos_id=tok.eos_id,
                bos_id=tok.bos_id, wrap=wrap, packing=packing, split_rule=rule)
    with tidy(folder), whole(*bins.values(), os.path.join(folder, 'meta.json')) as (*temps, meta_temp):
        lengths = [write_ids(temp, stream(), tok, workers) for temp, stream in zip(temps, streams.values())]
        if tail:
            lengths = move_tail(*temps, *lengths, tail, dtype_of(tok).itemsize)
        for split, temp, ids_per_document in zip(bins, temps, lengths):
            meta[split] = dict(documents=len(ids_per_document), tokens=sum(ids_per_document),
                               sha256=sha256_of(temp))
        with open(meta_temp, 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
    for split, path in bins.items():
        documents, tokens = meta[split]['documents'], meta[split]['tokens']
        print(f'{path}: {tokens:,} tokens of {tok.vocab_size:,} kinds, '
              f'{documents:,} document{"s" * (documents != 1)}')


def char_vocabulary(streams):
    """Reads the whole text once: its characters, and EOS if any split has more than one document."""
    chars, documents = set(), collections.Counter()
    for split, stream in streams.items():
        for text, ends in stream():
            chars.update(text)
            documents[split] += ends
    return Char(''.join(sorted(chars)), max(documents.values(), default=0) > 1)


@contextlib.contextmanager
def tidy(folder):
    """Lets SIGTERM unwind the block, as Ctrl-C does, and removes the folder if it is empty in the end."""
    old_handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty, or was never made
            os.rmdir(folder)
        signal.signal(signal.SIGTERM, old_handler)


def write_ids(path, stream, tok, workers):
    """Encodes a stream into the file `path` -> the number of ids of each document."""
    lengths, length = array.array('I'), 0
    with open(path, 'wb') as f:
        for ids, pieces in encode_all(stream, tok, workers):
            f.write(ids)
            for n, ends in pieces:
                length += n
                if ends:
                    lengths.append(length)
                    length = 0
    if sum(lengths) < 2:
        raise UserError(f'there is no text for {path.removesuffix(".tmp")}')
    if len(lengths) > 1 and tok.eos_id is None:
        raise UserError('this tokenizer has no EOS to join documents with: use another one, '
                        'or data/text/prepare.py with --split=file on one file')
    return lengths


def cut_in_two(lengths, tokens):
    """Lengths of documents -> the same after a cut behind so many tokens, how many documents follow it."""
    ends = np.cumsum(lengths, dtype=np.int64)
    i = int(np.searchsorted(ends, tokens))  # the document in which the cut falls, or that ends there
    rest = int(ends[i]) - tokens
    before, after = [*lengths[:i], lengths[i] - rest], [rest] * (rest > 0) + [*lengths[i + 1:]]
    return before + after, len(after)


def move_tail(train, val, lengths, tail, itemsize):
    """Moves the end of the file `train` to the file `val` -> the number of ids of each document, for both.

    A fraction of the documents that would be less than half or more than twice that fraction of the tokens
    is one of the tokens instead, and a document is cut in two.
    """
    documents, n = len(lengths), tail
    if isinstance(tail, float):
        n, tokens = max(1, round(tail * documents)), sum(lengths)
        share = sum(lengths[-n:]) / tokens
        if n == documents or not tail / 2 <= share <= tail * 2:
            if documents > 1:
                print(f'the last {n:,} of {documents:,} documents would be {share:.1%} of the tokens, not '
                      f'{tail:.1%}: validation is the last {tail:.1%} of the tokens instead, cut out of a '
                      'document (--split says where documents end)')
            lengths, n = cut_in_two(lengths, min(max(1, int(tokens * (1 - tail))), tokens - 1))
    if n >= len(lengths):
        raise UserError(f'validation takes the last {n:,} documents, but the input holds {documents:,}: '
                        'choose a smaller --val_documents')
    start = sum(lengths[:-n]) * itemsize
    with open(train, 'r+b') as f, open(val, 'wb') as g:
        f.seek(start)
        shutil.copyfileobj(f, g, 1 << 20)
        f.truncate(start)
    return lengths[:-n], lengths[-n:]


# ----------------------------------------------------------------------------
# the command line

class Arguments(argparse.ArgumentParser):
    """The options that every prepare.py has. parse_args(argv) raises UserError for a mistake."""

    def __init__(self, doc, tokenizer='gpt2'):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=layout, allow_abbrev=False)
        self.add_argument('--input', nargs='+', metavar='FILE', type=os.path.expanduser,
                          help='local UTF-8 text, or .parquet with a column `text`')
        self.add_argument('--tokenizer', default=tokenizer, help='char, gpt2, a Hugging Face id or folder, '
                          'or the folder of a prepared set (default: %(default)s)')
        self.add_argument('--wrap', nargs='?', const='True', default='False', choices=['True', 'False'],
                          help='every chunk is BOS ... EOS, as in MDLM')
        self.add_argument('--workers', type=int, default=os.cpu_count(),
                          help='processes that encode (default: %(default)s)')

    def error(self, message):
        raise UserError(message)

    def parse_args(self, argv):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            hint = nearest(unknown[0].split('=')[0], self._option_string_actions)
            raise UserError(f'unknown option {unknown[0]}; {hint}')
        if args.workers < 1:
            raise UserError('--workers must be at least 1')
        args.wrap = args.wrap == 'True'
        for path in [*(args.input or []), *(vars(args).get('val') or [])]:
            if os.path.isdir(path):
                raise UserError(f'{path} is a folder; name the files in it: {path.rstrip("/")}/*')
            if path == '-' or os.path.exists(path) and not os.path.isfile(path):
                raise UserError(f'{path} is a stream, and text is read twice: save it to a file')
            if not os.path.isfile(path):
                raise UserError(f'there is no file {path}')
        return args
