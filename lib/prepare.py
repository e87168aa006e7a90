"""
Text -> token files, see tokens.py for what they hold. Every data/<name>/prepare.py writes with this file.

A corpus is streamed as pairs (text, ends): `ends` says that a document ends with this text. Memory does not grow with the corpus
(4 bytes a document, for the split): a block is read, split, encoded in another process and appended to the file.
"""
import argparse, array, codecs, collections, concurrent.futures, contextlib, hashlib, json, multiprocessing, os, shutil, signal, sys, threading

import numpy as np
from tqdm import tqdm

from lib.configurator import UserError, nearest, run
from lib.tokens import DATA, Char, cache_only_if_offline, first_line, load_tokenizer

PIECE = 1 << 20  # characters; a longer document is encoded in pieces

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

@contextlib.contextmanager
def all_or_none(paths):
    """The block writes PATH.tmp of each path. If it ends well, they all get their names, the last one last; otherwise nothing of them is left."""
    try:
        os.makedirs(os.path.dirname(paths[-1]), exist_ok=True)
        yield
        if os.path.exists(paths[-1]):
            os.remove(paths[-1])  # from here to the last rename there is no set at all, rather than half of one
        for path in paths:
            os.replace(path + '.tmp', path)
    except OSError as e:
        raise UserError(f'cannot write {os.path.dirname(paths[-1])} ({e.strerror or e})') from e
    finally:
        for path in paths:
            with contextlib.suppress(OSError):  # no such file, or nothing can be removed where nothing can be written
                os.remove(path + '.tmp')

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
        with all_or_none(paths):
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
    finally:
        if fresh and os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)
        signal.signal(signal.SIGTERM, old_handler)
    for split in bins:
        print(f'{bins[split]}: {counts[split][1]:,} tokens of {tok.vocab_size:,} kinds, {counts[split][0]:,} document{"s" * (counts[split][0] != 1)}')

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
