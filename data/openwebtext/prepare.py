"""
OpenWebText: 8,013,769 documents, 9 billion GPT-2 tokens (18 GB; 36 GB with more than 65,535 ids).
The last 100k documents are for validation, as in MDLM and both of our papers.

    python data/openwebtext/prepare.py [--tokenizer=Qwen/Qwen3-Embedding-0.6B] [--input FILE...]

Without --input it is downloaded from the hub (pip install datasets), whose cache keeps another 55 GB.
An --input of text holds documents separated by two blank lines; .parquet holds one per row.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lib/
from lib.configurator import UserError, run
from lib.prepare import Arguments, read_files, read_hub, write


def main(argv):
    parser = Arguments(__doc__)
    parser.add_argument('--val_documents', type=int, default=100_000, help='(default: %(default)s)')
    args = parser.parse_args(argv)
    if args.val_documents < 1:
        raise UserError('--val_documents must be at least 1')

    def stream():
        if args.input:
            return read_files(args.input)
        # not from refs/convert/parquet, which has only the first 5 GB of a large dataset ("partial-train")
        return read_hub('Skylion007/openwebtext', split='train', expect=8_013_769)
    write('openwebtext', {'train': stream}, args.tokenizer, tail=args.val_documents,
          rule=f'last {args.val_documents} documents', wrap=args.wrap, workers=args.workers)


if __name__ == '__main__':
    run(main)
