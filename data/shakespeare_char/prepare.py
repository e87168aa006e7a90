"""
Tiny Shakespeare (1.1 MB) by characters, as in nanoGPT: 65 ids, 1,003,854 characters for training and 111,540
for validation. Without --input it is downloaded from karpathy/char-rnn.

    python data/shakespeare_char/prepare.py [--input FILE]
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lib/
from lib.configurator import run
from lib.prepare import DATA, Arguments, download, read_files, write

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def main(argv):
    args = Arguments(__doc__, tokenizer='char').parse_args(argv)
    if not args.input:
        args.input = [os.path.join(DATA, 'shakespeare_char', 'input.txt')]
        if not os.path.exists(args.input[0]):
            download(URL, args.input[0])
    write('shakespeare_char', {'train': lambda: read_files(args.input, None)}, args.tokenizer, tail=0.1,
          rule='last 10 % of the text', wrap=args.wrap)


if __name__ == '__main__':
    run(main)
