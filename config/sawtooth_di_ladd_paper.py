"""
Di-LADD on sawtooth with the official settings (LADD appendix E.1 and the released code; the lengths of the
stages are not known: our choice). What differs: our encoder adds a query for the latent, where the official
one reads the state of the last token; dropout reaches it, too; and the codebook rests after stage 1. A batch
of 2,048 needs a GPU, or patience.
"""
dataset = 'sawtooth'
method = 'ladd'
latent = 'discrete'

hidden = 32
num_layers = 4
num_heads = 2
cond_dim = 16
dropout = 0.1
encoder_layers = 4
num_latents = 1
latent_dim = 32
codebook_size = 511      # "512" counts the mask
latent_schedule = 'polynomial'
times = 'independent'
weighting = 'elbo'

stage1_iters = 10000

batch_size = 2048
max_iters = 30000
learning_rate = 3e-4
warmup_iters = 2500
weight_decay = 0.03
ema = 0.99
eval_seqs = 2048
