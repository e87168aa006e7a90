"""
The seven zero-shot sets of the perplexity tables: ptb wikitext lm1b lambada ag_news pubmed arxiv.

    python data/zeroshot/prepare.py --tokenizer=gpt2
    python data/zeroshot/prepare.py --tokenizer=data/text --set=ptb --input FILE...

The first command downloads all seven from the hub (pip install datasets); the second reads one from local
text, one document per line. Each becomes data/zeroshot/SET/, with a val split only. It must be encoded as the
model's training text was: name that tokenizer, or the folder of that data, and add --wrap if its chunks are
BOS ... EOS, as they are for kuleshov-group/mdlm-owt.

Splits and detokenisation are MDLM's: validation for ptb, wikitext, pubmed and arxiv; test for lm1b, ag_news
and lambada (OpenAI's version). But we drop empty lines of wikitext, and white space around a document.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lib/ and data/
from data.lm1b.prepare import detokenise as lm1b
from lib.configurator import UserError, run
from lib.prepare import Arguments, read_files, read_hub, write
from lib.tokens import named_tokenizer

SETS = {  # repository, configuration, split, column, revision
    # its main branch still holds a script
    'ptb': ('ptb-text-only/ptb_text_only', None, 'validation', 'sentence', 'refs/convert/parquet'),
    # the same articles as in wikitext-103
    'wikitext': ('Salesforce/wikitext', 'wikitext-2-raw-v1', 'validation', 'text', None),
    'lm1b': ('dvruette/lm1b', None, 'test', 'text', None),
    'lambada': ('EleutherAI/lambada_openai', 'default', 'test', 'text', None),
    'ag_news': ('fancyzhx/ag_news', None, 'test', 'text', None),
    # the parquet form of scientific_papers
    'pubmed': ('ccdv/pubmed-summarization', 'document', 'validation', 'article', None),
    'arxiv': ('ccdv/arxiv-summarization', 'document', 'validation', 'article', None),
}


def replace(text, *pairs):
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def wikitext(text):
    text = replace(text, ("s '", "s'"), (' @-@ ', '-'), (' @,@ ', ','), (' @.@ ', '.'),
                   *((f' {c} ', f'{c} ') for c in ':;.!?,'))
    for pattern, to in ((r'\(\s*([^)]*?)\s*\)', r'(\1)'), (r'\[\s*([^\]]*?)\s*\]', r'[\1]'),
                        (r'{\s*([^}]*?)\s*}', r'{\1}'), (r'"\s*([^"]*?)\s*"', r'"\1"'),
                        (r"'\s*([^']*?)\s*'", r"'\1'")):
        text = re.sub(pattern, to, text)
    return replace(text, ('= = = =', '===='), ('= = =', '==='), ('= =', '=='), (' ° ', '°'),
                   (' \n', '\n'), ('\n ', '\n'), (' N ', ' 1 '), (" 's", "'s"))


def ptb(text):
    text = replace(text, (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (' \n ', '\n'), (r'\/', '/'),
                   (' N ', ' 1 '), (' N ', ' 1 '))  # twice, for "N N"
    return replace(text, ('$ 1', '$1'), ('# 1', '#1'), ('<unk>', '?'))


def lambada(text):
    return '\n' + replace(text, ('“', '"'), ('”', '"'))


def paper(text):
    return lm1b(wikitext(text))


DETOKENISE = dict(ptb=ptb, wikitext=wikitext, lm1b=lm1b, lambada=lambada,
                  ag_news=str, pubmed=paper, arxiv=paper)


def main(argv):
    parser = Arguments(__doc__)
    parser.add_argument('--set', choices=SETS, help='only this one')
    args = parser.parse_args(argv)
    if args.tokenizer == 'char':
        raise UserError("--tokenizer=char would make a new vocabulary: name the model's data instead, "
                        'as in --tokenizer=data/text')
    if args.input and not args.set:
        raise UserError(f'--input needs --set, one of: {" ".join(SETS)}')
    if named_tokenizer(args.tokenizer).eos_id is None:
        raise UserError('a model of one document has no EOS to tell the documents of these sets apart: '
                        'evaluate it on a text file, python eval.py --out_dir=out/NAME --data=FILE')

    def stream(name):
        repo, config, split, column, revision = SETS[name]
        texts = (read_files(args.input, '\n') if args.input else
                 read_hub(repo, config, split=split, column=column, revision=revision))
        for text, ends in texts:
            if text := text.strip():
                yield DETOKENISE[name](text), ends
    for name in [args.set] if args.set else SETS:
        rule = f'all of it: {SETS[name][0]}, {SETS[name][2]}, or --input'
        write(f'zeroshot/{name}', {'val': lambda name=name: stream(name)}, args.tokenizer,
              rule=rule, wrap=args.wrap, workers=args.workers)


if __name__ == '__main__':
    run(main)
