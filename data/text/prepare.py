r"""
Any local text, written to data/NAME/:

    python data/text/prepare.py --input FILE... --tokenizer=gpt2|char|HUB_ID_OR_PATH --name=NAME

Documents are separated by two blank lines; a file without any is one document. With --split=line every line
is a document, with --split=file every file; any other value is the separator itself (\n and \t allowed).
Separators and empty documents are dropped; every other character is kept, single blank lines included, but
line ends become "\n" and a byte order mark at the start of a file is dropped.
Validation is the last --val_fraction of the documents, at least one; where that would be less than half or
more than twice that fraction of the tokens (and of a single document), of the tokens.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lib/
from lib.configurator import UserError, run
from lib.prepare import Arguments, read_files, write


def main(argv):
    parser = Arguments(__doc__)
    parser.add_argument('--name', default='text', help='the folder of data/ to write (default: %(default)s)')
    parser.add_argument('--split', default=r'\n\n\n', help='line, file or separator (default: 2 blank lines)')
    parser.add_argument('--val_fraction', type=float, default=0.02, help='(default: %(default)s)')
    args = parser.parse_args(argv)
    if not args.input:
        raise UserError('which text? give --input FILE...')
    if not 0 < args.val_fraction < 1:
        raise UserError('--val_fraction must lie between 0 and 1')
    if not re.fullmatch(r'[\w-][\w.-]*', args.name):
        raise UserError(f'--name={args.name} is not a folder name: use letters, digits, "_", "-" and "."')
    if args.name == 'sawtooth':
        raise UserError('--name=sawtooth is taken: train.py computes that data set; choose another name')
    if not args.split:
        raise UserError('--split must not be empty; --split=file keeps every file whole')
    literally = args.split.replace(r'\r', '\r').replace(r'\n', '\n').replace(r'\t', '\t')
    literally = re.sub('\r\n?', '\n', literally)  # as in the text
    separator = {'line': '\n', 'file': None}.get(args.split, literally)
    rule = (f'last {args.val_fraction} of the documents, or of the tokens where that is much more or less; '
            f'split={args.split}; line ends as "\\n"')
    write(args.name, {'train': lambda: read_files(args.input, separator)}, args.tokenizer,
          tail=args.val_fraction, rule=rule, wrap=args.wrap, workers=args.workers)


if __name__ == '__main__':
    run(main)
