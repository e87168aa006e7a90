r"""
LM1B, the One Billion Word benchmark: 30,301,028 sentences for training and the 306,688 of its test split for
validation, as in MDLM; detokenised and packed (joined by EOS, cut into chunks when they are read).

    python data/lm1b/prepare.py [--tokenizer=Qwen/Qwen3-Embedding-0.6B] [--input FILE... --val FILE...]

Without --input it is downloaded from the hub (pip install datasets). Local files hold one sentence per line.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lib/
from lib.configurator import UserError, run
from lib.prepare import Arguments, read_files, read_hub, write

# The benchmark comes tokenised ("the U.S. , he said ."). The papers' perplexities are those of text that
# these rules, in this order, have put back together (`lm1b_detokenizer` of SEDD and MDLM).
RULES = [(re.compile(pattern), to) for pattern, to in [
    (r'http : / / ', 'http://'), (r'https : / / ', 'https://'),
    (r" '(\w+)", r"'\1"), (r' (\w+) \. ', r' \1. '), (r' (\w+) \.$', r' \1.'),
    (r' \? ', '? '), (r' \?$', '?'), (r' ! ', '! '), (r' !$', '!'),
    (r' , ', ', '), (r' : ', ': '), (r' ; ', '; '), (r' / ', '/'),
    (r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"), (r'\( ([^()]+) \)', r'(\1)'),
    (r'\[ ([^\[\]]+) \]', r'[\1]'), (r'\$ ', '$'), (r'£ ', '£'),
]]


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
    rule = 'separate files' if args.input else "the benchmark's own test split"
    write('lm1b', {'train': lambda: stream(args.input, 'train'), 'val': lambda: stream(args.val, 'test')},
          args.tokenizer, rule=rule, wrap=args.wrap, workers=args.workers)


if __name__ == '__main__':
    run(main)
