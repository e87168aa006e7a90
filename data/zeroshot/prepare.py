"""
The seven zero-shot sets of the perplexity tables: ptb wikitext lm1b lambada ag_news pubmed arxiv. Each becomes data/zeroshot/SET/, a
val split only, which has to be encoded as the training text of the model was: name its tokenizer, or the folder of its data, and say --wrap
if that has BOS and EOS around every chunk, as for kuleshov-group/mdlm-owt.

    python data/zeroshot/prepare.py --tokenizer=gpt2                                  all seven from the hub (pip install datasets)
    python data/zeroshot/prepare.py --tokenizer=data/text --set=ptb --input FILE...   one set from local text, one document per line

Splits and detokenisation as in MDLM: validation for ptb, wikitext, pubmed, arxiv; test for lm1b, ag_news, lambada (OpenAI's version).
Two liberties: empty lines of wikitext are dropped, and white space around a document is.
"""
import os, re, sys
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from lib.prepare import Arguments, UserError, read_files, read_hub, run, write
from data.lm1b.prepare import detokenise as lm1b

SETS = {  # repository, configuration, split, column, revision
    'ptb': ('ptb-text-only/ptb_text_only', None, 'validation', 'sentence', 'refs/convert/parquet'),  # main still holds a script
    'wikitext': ('Salesforce/wikitext', 'wikitext-2-raw-v1', 'validation', 'text', None),  # the same articles as in wikitext-103
    'lm1b': ('dvruette/lm1b', None, 'test', 'text', None),
    'lambada': ('EleutherAI/lambada_openai', 'default', 'test', 'text', None),
    'ag_news': ('fancyzhx/ag_news', None, 'test', 'text', None),
    'pubmed': ('ccdv/pubmed-summarization', 'document', 'validation', 'article', None),  # the parquet form of scientific_papers
    'arxiv': ('ccdv/arxiv-summarization', 'document', 'validation', 'article', None),
}

def replace(text, *pairs):
    for old, new in pairs:
        text = text.replace(old, new)
    return text

def wikitext(text):
    text = replace(text, ("s '", "s'"), (' @-@ ', '-'), (' @,@ ', ','), (' @.@ ', '.'), *((f' {c} ', f'{c} ') for c in ':;.!?,'))
    for pattern, to in ((r'\(\s*([^)]*?)\s*\)', r'(\1)'), (r'\[\s*([^\]]*?)\s*\]', r'[\1]'), (r'{\s*([^}]*?)\s*}', r'{\1}'),
                        (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'")):
        text = re.sub(pattern, to, text)
    return replace(text, ('= = = =', '===='), ('= = =', '==='), ('= =', '=='), (' ° ', '°'), (' \n', '\n'), ('\n ', '\n'), (' N ', ' 1 '),
                   (" 's", "'s"))

def ptb(text):
    text = replace(text, (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (' \n ', '\n'), (r'\/', '/'), *[(' N ', ' 1 ')] * 2)  # twice: "N N"
    return replace(text, ('$ 1', '$1'), ('# 1', '#1'), ('<unk>', '?'))

DETOKENISE = {'ptb': ptb, 'wikitext': wikitext, 'lm1b': lm1b, 'lambada': lambda text: '\n' + replace(text, ('“', '"'), ('”', '"')),
              'ag_news': str, 'pubmed': lambda text: lm1b(wikitext(text)), 'arxiv': lambda text: lm1b(wikitext(text))}

def main(argv):
    parser = Arguments(__doc__)
    parser.add_argument('--set', choices=SETS, help='only this one')
    args = parser.parse_args(argv)
    if args.tokenizer == 'char':
        raise UserError("--tokenizer=char would make a new vocabulary: name the model's data instead, as in --tokenizer=data/shakespeare_char")
    if args.input and not args.set:
        raise UserError(f'--input needs --set, one of: {" ".join(SETS)}')
    def stream(name):
        repo, config, split, column, revision = SETS[name]
        for text, ends in read_files(args.input, '\n') if args.input else read_hub(repo, config, split=split, column=column, revision=revision):
            if text := text.strip():
                yield DETOKENISE[name](text), ends
    for name in [args.set] if args.set else SETS:
        write(f'zeroshot/{name}', {'val': lambda: stream(name)}, args.tokenizer, rule=f'all of it: {SETS[name][0]}, {SETS[name][2]}, or --input',
              wrap=args.wrap, workers=args.workers)

if __name__ == '__main__':
    run(main)
