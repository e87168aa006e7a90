"""
OpenWebText: 8,013,769 documents, 9 billion GPT-2 tokens (18 GB; 36 GB with more than 65,535 ids). The last 100k documents are for
validation, the split of MDLM and of both our papers.

    python data/openwebtext/prepare.py [--tokenizer=Qwen/Qwen3-Embedding-0.6B] [--input FILE...]

Without --input it comes from the hub by `datasets` (pip install datasets), which keeps its own copy of about 55 GB in its cache.
An --input of text holds documents separated by two blank lines; .parquet holds one per row.
"""
import os, sys
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from lib.prepare import Arguments, UserError, read_files, read_hub, run, write

def main(argv):
    parser = Arguments(__doc__)
    parser.add_argument('--val_documents', type=int, default=100_000, help='(default: %(default)s)')
    args = parser.parse_args(argv)
    if args.val_documents < 1:
        raise UserError('--val_documents must be at least 1')
    # The main branch, not refs/convert/parquet: the hub converts only the first 5 GB of a large dataset ("partial-train").
    stream = lambda: read_files(args.input) if args.input else read_hub('Skylion007/openwebtext', split='train', expect=8_013_769)
    write('openwebtext', {'train': stream}, args.tokenizer, tail=args.val_documents,
          rule=f'last {args.val_documents} documents', wrap=args.wrap, workers=args.workers)

if __name__ == '__main__':
    run(main)
