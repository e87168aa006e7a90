"""
Tiny Shakespeare (1.1 MB) by characters, as in nanoGPT: 65 ids, 1,003,854 training and 111,540 validation characters.

    python data/shakespeare_char/prepare.py [--input FILE]        downloads it from karpathy/char-rnn if there is no --input
"""
import http.client, os, sys, urllib.request
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from lib.prepare import DATA, Arguments, UserError, all_or_none, read_files, run, write

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'

def main(argv):
    args = Arguments(__doc__, tokenizer='char').parse_args(argv)
    if not args.input:
        args.input = [os.path.join(DATA, 'shakespeare_char', 'input.txt')]
        if not os.path.exists(args.input[0]):
            try:
                with urllib.request.urlopen(URL, timeout=60) as response:
                    text = response.read()
            except (OSError, http.client.HTTPException) as e:  # the latter: the connection broke off
                raise UserError(f'cannot download {URL}: {e}; get it in another way and give --input FILE') from e
            with all_or_none(args.input), open(args.input[0] + '.tmp', 'wb') as f:
                f.write(text)
    write('shakespeare_char', {'train': lambda: read_files(args.input, None)}, args.tokenizer, tail=0.1,
          rule='last 10 % of the text', wrap=args.wrap, workers=1)

if __name__ == '__main__':
    run(main)
