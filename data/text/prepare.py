r"""
Any local text:  python data/text/prepare.py --input FILE... --tokenizer=gpt2|char|HUB_ID_OR_PATH --name=NAME   writes data/NAME/

What a document is: by default documents are separated by two blank lines; a file without any is one document.
--split=line: every line is one. --split=file: every file is one. Anything else is taken literally (\n and \t allowed).
The separator itself is not kept and empty documents are dropped; every other character is, single blank lines too.
Validation is the last --val_fraction of the documents, at least one; of a single document, the last fraction of its tokens.
"""
import os, sys
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from lib.prepare import Arguments, UserError, read_files, run, write

def main(argv):
    parser = Arguments(__doc__)
    parser.add_argument('--name', default='text', help='the folder in data/ to write to (default: %(default)s)')
    parser.add_argument('--split', default=r'\n\n\n', help='line, file, or a separator (default: two blank lines)')
    parser.add_argument('--val_fraction', type=float, default=0.02, help='(default: %(default)s)')
    args = parser.parse_args(argv)
    if not args.input:
        raise UserError('which text? give --input FILE...')
    if not 0 < args.val_fraction < 1:
        raise UserError('--val_fraction must lie between 0 and 1')
    if not args.name.replace('-', '').replace('_', '').replace('.', 'x').isalnum() or args.name.startswith('.'):
        raise UserError(f'--name={args.name} is no folder name: letters, digits, "_", "-" and "." only')
    if not args.split:
        raise UserError('--split must not be empty; --split=file keeps every file whole')
    separator = {'line': '\n', 'file': None}.get(args.split, args.split.replace(r'\n', '\n').replace(r'\t', '\t'))
    write(args.name, {'train': lambda: read_files(args.input, separator)}, args.tokenizer, tail=args.val_fraction,
          rule=f'last {args.val_fraction} of the documents (of one document: of its tokens); split={args.split}',
          wrap=args.wrap, workers=args.workers)

if __name__ == '__main__':
    run(main)
