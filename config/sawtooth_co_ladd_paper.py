"""
Co-LADD on sawtooth with the official settings (LADD appendix E.1 and the released code; the lengths of the
stages are not known: our choice). Three things differ: our encoder adds a query for the latent, where the
official one reads the state of the last token; dropout reaches it, too; and only the latent's stream is told
the time. A batch of 2,048 needs a GPU, or patience. For joint sampling train it as it is; for sequential
sampling add --latent_layers=3 --times=independent.
"""
dataset = 'sawtooth'
method = 'ladd'
latent = 'continuous'

hidden = 32
num_layers = 4
num_heads = 2
cond_dim = 16
dropout = 0.1
encoder_layers = 4
num_latents = 1
latent_dim = 32
unit_norm = False        # off in the released config
latent_schedule = 'vp_sqrt'
times = 'same'
weighting = 'elbo'

stage1_iters = 10000

batch_size = 2048
max_iters = 30000
learning_rate = 3e-4
warmup_iters = 2500
weight_decay = 0.03
ema = 0.99
eval_seqs = 2048
