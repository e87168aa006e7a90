"""
MDLM on sawtooth with the official settings (LADD appendix E.1 and the released code; the number of steps is
not known: our choice). One thing differs: the official denoiser is told t there, ours reads it off the masks.
A batch of 2,048 needs a GPU, or patience: about an hour for 1,000 steps on two CPU cores.
"""
dataset = 'sawtooth'
method = 'mdlm'

hidden = 64
num_layers = 4
num_heads = 4
cond_dim = 32
dropout = 0.1
weighting = 'elbo'

batch_size = 2048
max_iters = 20000
learning_rate = 3e-4
warmup_iters = 2500
weight_decay = 0.03
ema = 0.0                # samples come from the weights themselves
eval_seqs = 2048
