"""
Frozen pretrained encoders: where LADD's text latents and LDLM's token states come from.

    encoder = HubEncoder('Qwen/Qwen3-Embedding-0.6B', device)   a model of the hub, or its folder
    encoder = RunEncoder(method, config)                        an AR run of ours, see methods.open_encoder
    states, summary = encoder(x)                                one state per token (b, L, width),
                                                                and one for the whole text (b, width)
They are neither trained nor stored in a checkpoint: a checkpoint keeps their name, and they are opened
again when texts have to be encoded.
"""
import math

import torch

from lib.configurator import UserError
from lib.tokens import cache_only_if_offline, first_line, load_tokenizer


def hub_model(auto, name, device, role, part=lambda model, random: model):
    """A model of `transformers`, frozen, in fp32. auto: the name of the class that loads it.

    role: what the model is for, which is also the key that names it; the messages of UserErrors use it.
    part(model, ids of the parameters that the checkpoint lacks) -> the module in it that is used
    """
    cache_only_if_offline()
    try:
        import huggingface_hub
        import transformers
        transformers.utils.logging.disable_progress_bar()  # of loading; our own bar follows
        huggingface_hub.utils.enable_progress_bars()  # of downloading
        model, report = getattr(transformers, auto).from_pretrained(name, trust_remote_code=False,
                                                                    output_loading_info=True)
    except ImportError as e:
        raise UserError(f'the {role} {name} needs `pip install transformers`; an AR run of ours does not: '
                        f'--{role}=out/NAME') from e
    except Exception as e:  # the hub's layers each have exceptions of their own
        raise UserError(f'cannot load the {role} {name} ({first_line(e)}); without a network, give a folder '
                        f'in the hub\'s format, --{role}=FOLDER, or an AR run, --{role}=out/NAME') from e
    random = {id(p) for key, p in model.named_parameters() if key in report['missing_keys']}
    model = part(model, random)
    lacking = [key for key, p in model.named_parameters() if id(p) in random]
    if lacking:  # transformers fills them with random numbers
        raise UserError(f'{name} lacks weights that the {role} needs ({lacking[0]}), so it is not a trained '
                        f'{role}; give another: --{role}=NAME')
    return model.float().to(device).eval().requires_grad_(False)


def reading_part(model, random):
    """What reads a text: of an encoder-decoder such as T5 the encoder; and no pooler, if it is untrained."""
    parts = dict(model.named_children())
    if {'encoder', 'decoder'} <= parts.keys():
        return model.encoder
    if 'pooler' in parts and any(id(p) in random for p in model.pooler.parameters()):
        model.pooler = None  # it only reads the states
    return model


POSITIONS = 'position_embeddings', 'embed_positions'  # what transformers calls a table of learned positions


def context(model):
    """How many tokens a hub model reads at once: what its config says, or less if its table ends before."""
    said = getattr(model.config, 'max_position_embeddings', None)
    limits = [said if said and said > 0 else math.inf]  # XLNet says -1, T5 and BLOOM nothing
    for name, table in model.named_modules():
        if isinstance(table, torch.nn.Embedding) and name.split('.')[-1] in POSITIONS:
            # RoBERTa and MPNet begin behind the row for padding, and their config counts all rows
            limits.append(table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))
    return min(limits)


class HubEncoder:
    """Any model of `transformers`, given texts with the special tokens that its tokenizer puts around them.

    The summary is the state of the last of these: EOS for a decoder (for Qwen3-Embedding, that is the
    text's embedding), [SEP] for a BERT (our choice).
    """

    def __init__(self, name, device):
        self.model = hub_model('AutoModel', name, device, 'encoder', reading_part)
        self.tokenizer = load_tokenizer({'kind': 'huggingface', 'name': name})
        config = self.model.config
        config.use_cache = False  # no text will be continued, so keys and values need not be kept
        try:
            around = self.tokenizer.tok('a')['input_ids']
            a = self.tokenizer.encode('a')
            at = next(i for i in range(len(around)) if around[i:i + len(a)] == a)
            self.before, self.after = around[:at], around[at + len(a):]
            # some tokenizers, such as GPT-2's, put nothing after a text: then we add an EOS for the summary,
            # or, if there is no EOS, take the state of the text's last token
            self.eos = [self.tokenizer.eos_id] * (not self.after and self.tokenizer.eos_id is not None)
            self.width, self.num_layers = config.hidden_size, config.num_hidden_layers
            self.num_ids = self.model.get_input_embeddings().num_embeddings
            self.max_tokens = context(self.model) - len(self.before) - len(self.after)
            states, _ = self(torch.tensor([a], device=device))
            if states.shape != (1, len(a), self.width):
                raise ValueError(f'states of shape {tuple(states.shape)}')
        except Exception as e:  # there are hundreds of architectures
            raise UserError(f'the encoder {name} does not give one state per token of a text '
                            f'({type(e).__name__}: {first_line(e)}); take a model such as '
                            'Qwen/Qwen3-Embedding-0.6B, or an AR run, out/NAME') from e

    @torch.no_grad()
    def __call__(self, x, blank=None, layer=-1, summary=True):
        """x (b, L) ids -> states (b, L, width), summary (b, width).

        blank: bool (b, L), positions whose input embedding is zeroed
        layer: an index into the model's hidden states; -1 is its output
        summary=False: no summary is needed, so no EOS is added, and a text may fill the whole context
        """
        def special(ids):
            return x.new_tensor(ids).expand(len(x), -1)
        ids = torch.cat((special(self.before), x, special(self.after + self.eos * summary)), dim=1)
        e = self.model.get_input_embeddings()(ids)
        first, last = len(self.before), len(self.before) + x.shape[1]
        if blank is not None:
            e[:, first:last] = e[:, first:last].masked_fill(blank[..., None], 0)
        out = self.model(inputs_embeds=e, output_hidden_states=layer != -1)
        h = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        return h[:, first:last], h[:, -1]


class RunEncoder:
    """An AR run. A token's state depends on the text up to this token; the last state is the summary."""

    def __init__(self, method, config):
        self.model = method.requires_grad_(False)
        # sawtooth has no tokenizer
        self.tokenizer = load_tokenizer(config['tokenizer']) if 'tokenizer' in config else None
        self.width, self.num_layers = config['hidden'], config['num_layers']
        self.num_ids, self.max_tokens = config['vocab_size'], config['block_size']
        self.eos = []

    def __call__(self, x, blank=None, layer=-1, summary=True):
        """As in HubEncoder."""
        h = self.model.states(x, blank, layer)
        return h, h[:, -1]


def check_tokenizer(encoder, data, summary=True):
    """UserError if a data source's ids mean other tokens to the encoder, or its sequences are too long."""
    probe = 'The quick brown fox; naïve, 2,718 times! No?'
    if encoder.tokenizer is None or data.tokenizer is None:
        same = encoder.tokenizer is data.tokenizer is None and data.vocab_size == encoder.num_ids
    else:
        ours, theirs = load_tokenizer(data.tokenizer), encoder.tokenizer
        same = ours.spec == theirs.spec or ('char' not in (ours.spec['kind'], theirs.spec['kind'])
                                            and ours.encode(probe) == theirs.encode(probe))
    if not same:
        raise UserError('encoder and data have different tokenizers, so the encoder would read a different '
                        'text; prepare the data with --tokenizer=ENCODER, the same hub id or folder (for '
                        'an AR run: the folder of its training data)')
    if data.vocab_size > encoder.num_ids:
        raise UserError(f'the encoder has embeddings for {encoder.num_ids:,} tokens, and the data has '
                        f'{data.vocab_size:,}: its tokenizer has more tokens than the encoder was built for; '
                        'take another encoder')
    longest = encoder.max_tokens - len(encoder.eos) * summary
    if data.block_size > longest:
        raise UserError(f'the encoder reads at most {longest} tokens, but a sequence has '
                        f'block_size={data.block_size}')


def pool(states, summary, M):
    """States (b, L, w) and summary (b, w) of a text -> its M latents (b, M, w), LADD appendix D.

    M = L: the states themselves. M < L: the means of M - 1 contiguous chunks of nearly equal size, and
    the summary. (The released code for LM1B takes M chunks and no summary.)
    """
    if M == states.shape[1]:
        return states
    chunks = states.tensor_split(M - 1, dim=1) if M > 1 else ()
    return torch.stack([chunk.mean(dim=1) for chunk in chunks] + [summary], dim=1)
