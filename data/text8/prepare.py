"""
text8, the letters a to z and the space: 27 ids. Any text becomes that. Letters are made lower case, digits
are spelled out ("1984" is "one nine eight four"), all else is a space, and spaces that follow one another are
one. The first 90 % are for training, the next 5 % for validation, and the last 5 %, the test set, are left
aside. Without --input the first 10^8 such characters of Wikipedia are downloaded (31 MB).

    python data/text8/prepare.py [--input FILE...]
"""
import os
import re
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lib/
from lib.configurator import UserError, run
from lib.prepare import DATA, PIECE, Arguments, download, read_files, write

URL = 'http://mattmahoney.net/dc/text8.zip'
DIGITS = 'zero one two three four five six seven eight nine'.split()


def published():
    """The text of text8.zip, which is downloaded unless it is there."""
    path = os.path.join(DATA, 'text8', 'text8.zip')
    if not os.path.exists(path):
        download(URL, path)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read('text8').decode()
    except (zipfile.BadZipFile, KeyError) as e:
        raise UserError(f'{path} is not what {URL} has ({e}); delete it, and run this again') from e


def clean(text):
    text = re.sub('[0-9]', lambda digit: f' {DIGITS[int(digit[0])]} ', text.lower())
    return re.sub('[^a-z]+', ' ', text)


def main(argv):
    args = Arguments(__doc__, tokenizer='char').parse_args(argv)
    text = clean(''.join(part for part, _ in read_files(args.input, None)) if args.input else published())
    cuts = [int(share * len(text)) for share in (0, 0.90, 0.95)]

    def pieces(start, end):  # one document
        return lambda: ((text[i:min(i + PIECE, end)], i + PIECE >= end) for i in range(start, end, PIECE))
    write('text8', {'train': pieces(*cuts[:2]), 'val': pieces(*cuts[1:])}, args.tokenizer, wrap=args.wrap,
          rule='first 90 % of the characters, the next 5 %', workers=args.workers)


if __name__ == '__main__':
    run(main)
