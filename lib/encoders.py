"""
Frozen pretrained encoders: where LADD's text latents and LDLM's token states come from.

    encoder = HubEncoder('Qwen/Qwen3-Embedding-0.6B', device)    a model of the Hugging Face hub, or its folder
    encoder = RunEncoder(method, config)                         or an AR run of ours, see methods.open_encoder
    states, summary = encoder(x)                                 (b, L, width) hidden states, one per token;
                                                                 (b, width) of the whole text
They are not trained and in no checkpoint: they are read again by name when something is to be encoded.
"""
import math

import torch

from lib.configurator import UserError
from lib.tokens import cache_only_if_offline, first_line, load_tokenizer


def hub_model(auto, name, device, role):
    """A model of the class `auto` of `transformers`, frozen, in fp32.

    role: what it is to us and the key that names it, for a UserError.
    """
    cache_only_if_offline()
    try:
        import huggingface_hub
        import transformers
        transformers.utils.logging.disable_progress_bar()  # of loading; our own bars come right after it
        huggingface_hub.utils.enable_progress_bars()  # of a download
        model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=False)
        return model.float().to(device).eval().requires_grad_(False)
    except ImportError as e:
        raise UserError(f'the {role} {name} needs `pip install transformers`; an AR run of ours does not: '
                        f'--{role}=out/NAME') from e
    except Exception as e:  # the hub fails in as many ways as it has layers
        raise UserError(f'cannot load the {role} {name} ({first_line(e)}); without a network: --{role}=FOLDER of '
                        f'the hub\'s format or, of our AR, --{role}=out/NAME') from e


class HubEncoder:
    """Any model of `transformers`, with the special tokens that its own tokenizer puts around a text.

    The summary is the state of the last of them: EOS of a decoder (the embedding, for Qwen3-Embedding),
    [SEP] of a BERT (our choice).
    """

    def __init__(self, name, device):
        self.model = hub_model('AutoModel', name, device, 'encoder')
        self.tokenizer = load_tokenizer({'kind': 'huggingface', 'name': name})
        around = self.tokenizer.tok('a')['input_ids']
        a = self.tokenizer.encode('a')
        at = next(i for i in range(len(around)) if around[i:i + len(a)] == a)
        self.before, self.after = around[:at], around[at + len(a):]
        # a tokenizer that puts nothing after a text, such as GPT-2's: the summary is then the state of an
        # EOS that we add, or without an EOS that of the last token
        self.eos = [self.tokenizer.eos_id] if not self.after and self.tokenizer.eos_id is not None else []
        config = self.model.config
        self.width, self.num_layers = config.hidden_size, config.num_hidden_layers
        self.num_ids = self.model.get_input_embeddings().num_embeddings
        context = getattr(config, 'max_position_embeddings', math.inf)
        self.max_tokens = context - len(self.before) - len(self.after)
        config.use_cache = False  # a decoder would keep keys and values for a text that is not going to be continued

    @torch.no_grad()
    def __call__(self, x, blank=None, layer=-1, summary=True):
        """x (b, L) ids -> states (b, L, width), summary (b, width).

        blank: bool (b, L), positions whose input embedding is zeroed
        layer: an index into its hidden states, -1 the output
        summary=False: the second result does not matter, so a text as long as the model's context fits
        """
        def special(ids):
            return x.new_tensor(ids).expand(len(x), -1)
        ids = torch.cat((special(self.before), x, special(self.after + self.eos * summary)), dim=1)
        e = self.model.get_input_embeddings()(ids)
        first, last = len(self.before), len(self.before) + x.shape[1]
        if blank is not None:
            e[:, first:last] = e[:, first:last].masked_fill(blank[..., None], 0)
        out = self.model(inputs_embeds=e, output_hidden_states=layer != -1)  # all layers only where one is wanted
        h = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        return h[:, first:last], h[:, -1]


class RunEncoder:
    """An AR run. The state of a token has read the text up to and including it; the last one is the summary."""

    def __init__(self, method, config):
        self.model = method.requires_grad_(False)
        self.tokenizer = load_tokenizer(config['tokenizer']) if 'tokenizer' in config else None  # sawtooth has none
        self.width, self.num_layers = config['hidden'], config['num_layers']
        self.num_ids, self.max_tokens = config['vocab_size'], config['block_size']
        self.eos = []

    def __call__(self, x, blank=None, layer=-1, summary=True):
        """As HubEncoder's."""
        h = self.model.states(x, blank, layer)
        return h, h[:, -1]


def check_tokenizer(encoder, data, summary=True):
    """UserError unless the ids of a data source mean the same to the encoder, and are not too many."""
    probe = 'The quick brown fox; naïve, 2,718 times! No?'
    if encoder.tokenizer is None or data.tokenizer is None:
        same = encoder.tokenizer is data.tokenizer is None and data.vocab_size == encoder.num_ids
    else:
        ours, theirs = load_tokenizer(data.tokenizer), encoder.tokenizer
        same = data.vocab_size <= encoder.num_ids and (
            ours.spec == theirs.spec or 'char' not in (ours.spec['kind'], theirs.spec['kind'])
            and ours.encode(probe) == theirs.encode(probe))
    if not same:
        raise UserError('encoder and data have different tokenizers, so the encoder would read another text; prepare '
                        'the data with --tokenizer=ENCODER, the same hub id or folder (of an AR run: the folder of '
                        'its training data)')
    longest = encoder.max_tokens - len(encoder.eos) * summary
    if data.block_size > longest:
        raise UserError(f'the encoder reads at most {longest} tokens, and a sequence has block_size={data.block_size}')


def pool(states, summary, M):
    """(b, L, w), (b, w) -> (b, M, w). M = L: as they are. M < L: the means of M - 1 chunks, and the summary.

    The chunks are contiguous and of nearly equal size: LADD appendix D. (The released code for LM1B takes M
    chunks and no summary.)
    """
    if M == states.shape[1]:
        return states
    chunks = states.tensor_split(M - 1, dim=1) if M > 1 else ()
    return torch.stack([chunk.mean(dim=1) for chunk in chunks] + [summary], dim=1)
