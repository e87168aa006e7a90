"""
Learns a tokenizer of a chosen size from a text, for prepare.py: byte pairs, which may cross words.

    python data/text/bpe.py --input FILE --vocab_size=4096 --out=FOLDER
    python data/text/prepare.py --input FILE --split=file --tokenizer=FOLDER --name=NAME

It reads the first --share of the text, so that the validation text of prepare.py stays unseen, and prints how
many characters a piece has on average. RESULTS.md uses it to give MDLM pieces as long as those that a code of
LADD stands for.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lib/
from lib.configurator import UserError, run

LINE = 2000  # characters that are tokenized at a time: no piece crosses from one such line to the next


def train(text, vocab_size):
    """-> a tokenizer of transformers, whose end of text is <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(lines(text), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=['<|endoftext|>'], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<|endoftext|>',
                                   clean_up_tokenization_spaces=False)


def lines(text):
    return [text[i:i + LINE] for i in range(0, len(text), LINE)]


def main(argv):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument('--input', required=True, metavar='FILE')
    parser.add_argument('--vocab_size', type=int, default=4096)
    parser.add_argument('--share', type=float, default=0.9)
    parser.add_argument('--out', required=True, metavar='FOLDER')
    args = parser.parse_args(argv)
    try:
        text = Path(args.input).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'cannot read {args.input}: {e}') from e
    text = text[:int(args.share * len(text))]
    tok = train(text, args.vocab_size)
    tok.save_pretrained(args.out)
    pieces = sum(map(len, tok(lines(text), add_special_tokens=False)['input_ids']))
    print(f'{args.out}: {len(tok):,} pieces, of {len(text) / pieces:.2f} characters on average')


if __name__ == '__main__':
    run(main)
