"""
Gen PPL: how likely a causal language model, the teacher, finds samples.
"""
import itertools
import math

import torch
import torch.nn.functional as F

from lib.checkpoint import fingerprint
from lib.configurator import UserError
from lib.encoders import context, hub_model
from lib.tokens import load_tokenizer


class Teacher:
    """Scores samples in windows of its context.

    nll: ids (b, l), l <= window -> nats (b,), of all tokens but the first `unscored`
    translate: the ids of a sample (L,) -> the teacher's ids
    """

    def __init__(self, name, model, nll, translate, window, unscored):
        self.nll, self.translate, self.window, self.unscored = nll, translate, window, unscored
        self.device = next(model.parameters()).device
        rule = (f'whole samples, in windows of {window} tokens of the teacher, '
                + ('first token of each not scored' if unscored else 'all tokens scored'))
        self.record = {'teacher': name, 'teacher_weights': fingerprint(model), 'teacher_dtype': 'float32',
                       'gen_ppl_rule': rule}

    @torch.no_grad()
    def score(self, x):
        """Ids x (N, L) -> (nats, how many tokens of the teacher were scored)."""
        texts = map(self.translate, x)
        windows = [w for ids in texts for w in ids.split(self.window) if len(w) > self.unscored]
        nats, tokens = 0.0, 0
        for length, group in itertools.groupby(sorted(windows, key=len), key=len):  # one length: no padding
            for batch in torch.stack(list(group)).split(4):
                with torch.autocast(self.device.type, enabled=False):
                    nats += self.nll(batch.to(self.device)).double().sum().item()
                tokens += len(batch) * (length - self.unscored)
        return nats, tokens

    def gen_ppl(self, x):
        """-> Gen PPL of ids x (N, L), and how many tokens of the teacher were scored."""
        nats, tokens = self.score(x)
        return math.exp(nats / tokens) if tokens else math.nan, tokens


def hub_teacher(name, tok, device):
    """-> a causal model of the Hugging Face hub, or of a folder, as a Teacher of ids of the tokenizer tok.

    It has nothing to predict a window's first token from.
    """
    model = hub_model('AutoModelForCausalLM', name, device, 'teacher')
    if looks_ahead(model):
        raise UserError(f'the teacher {name} is no causal language model: what it predicts changes with the '
                        'tokens that follow; take one that reads from left to right, such as gpt2-large')
    window = min(1024, context(model))

    def nll(ids):
        logits = model(ids).logits[:, :-1].float()
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction='none').sum(dim=1)
    translate = translation(tok, load_tokenizer({'kind': 'huggingface', 'name': name}))
    return Teacher(name, model, nll, translate, window, unscored=1)


@torch.no_grad()
def looks_ahead(model):
    """Whether a token's logits change with the tokens after it, as those of a BERT do."""
    ids = torch.arange(4, device=model.device)[None]
    other = ids.clone()
    other[:, -1] = 0
    a, b = (model(x).logits[:, :-1].float() for x in (ids, other))
    return not torch.allclose(a, b, rtol=0, atol=1e-5 * a.abs().max().item())


def translation(ours, theirs):
    """-> a function from ids (L,) of our tokenizer to theirs, by way of the text.

    Both EOS and BOS become their EOS, if they have one.
    """
    boundaries, eos = (ours.eos_id, ours.bos_id), [theirs.eos_id] * (theirs.eos_id is not None)

    def translate(ids):
        found = []
        for is_boundary, run_of in itertools.groupby(ids.tolist(), key=lambda i: i in boundaries):
            run_of = list(run_of)
            found += eos * len(run_of) if is_boundary else theirs.encode(ours.decode(run_of))
        return torch.tensor(found, dtype=torch.int64)
    return translate
