r"""
LM1B, the One Billion Word benchmark: 30,301,028 sentences for training, 306,688 (its test split) for validation as in MDLM,
detokenised and packed: sentences joined by EOS, chunks of 128 cut when they are read.

    python data/lm1b/prepare.py [--tokenizer=Qwen/Qwen3-Embedding-0.6B] [--input FILE... --val FILE...]

Without --input it comes from the hub by `datasets` (pip install datasets). Local files hold one sentence per line.
"""
import os, re, sys
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from lib.prepare import Arguments, UserError, read_files, read_hub, run, write

# The benchmark is tokenised text ("the U.S. , he said ."); the papers' perplexities are on text put back together by these rules
# (SEDD's and MDLM's `lm1b_detokenizer`), in this order.
RULES = [(re.compile(pattern), to) for pattern, to in [
    (r'http : / / ', 'http://'), (r'https : / / ', 'https://'), (r" '(\w+)", r"'\1"),
    (r' (\w+) \. ', r' \1. '), (r' (\w+) \.$', r' \1.'),
    (r' \? ', '? '), (r' \?$', '?'), (r' ! ', '! '), (r' !$', '!'), (r' , ', ', '), (r' : ', ': '), (r' ; ', '; '), (r' / ', '/'),
    (r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"), (r'\( ([^()]+) \)', r'(\1)'), (r'\[ ([^\[\]]+) \]', r'[\1]'), (r'\$ ', '$'), (r'£ ', '£')]]

def detokenise(text):
    for pattern, to in RULES:
        text = pattern.sub(to, text)
    return text

def main(argv):
    parser = Arguments(__doc__)
    parser.add_argument('--val', nargs='+', metavar='FILE', help='local validation text, with --input')
    args = parser.parse_args(argv)
    if bool(args.input) != bool(args.val):
        raise UserError('--input FILE... (training) and --val FILE... (validation) go together')
    def stream(files, split):
        for text, ends in read_files(files, '\n') if files else read_hub('dvruette/lm1b', split=split):
            yield detokenise(text), ends
    write('lm1b', {'train': lambda: stream(args.input, 'train'), 'val': lambda: stream(args.val, 'test')}, args.tokenizer,
          rule="the benchmark's own test split" if not args.input else 'separate files', wrap=args.wrap, workers=args.workers)

if __name__ == '__main__':
    run(main)
