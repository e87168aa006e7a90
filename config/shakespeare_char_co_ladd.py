"""
Co-LADD on Tiny Shakespeare by characters: minutes on a CPU. Parameters, tokens and optimizer are those of
shakespeare_char_mdlm.py; the frozen encoder is the left-to-right model of shakespeare_char_ar.py, so nothing
has to be downloaded.

    python data/shakespeare_char/prepare.py
    python train.py config/shakespeare_char_ar.py
    python train.py config/shakespeare_char_co_ladd.py
    python sample.py --out_dir=out/shakespeare_char_co_ladd --steps=16

The states of that model were never meant to be read by their first 32 coordinates, as those of
Qwen3-Embedding are; the question here is what LADD can do with so simple an encoder. One latent per character
(--num_latents=128) would be CCDD-like.
"""
dataset = 'shakespeare_char'
method = 'ladd'
block_size = 128  # characters

hidden = 128  # with two modalities, as many parameters as shakespeare_char_mdlm.py
num_layers = 4
num_heads = 2
cond_dim = 48
weighting = 'constant'

latent = 'continuous'
encoder = 'out/shakespeare_char_ar'
num_latents = 16  # the means over 15 pieces of 8 or 9 characters, and the state that has read all
latent_dim = 32
p_drop = 0.15
encoder_dropout = True

batch_size = 16
max_iters = 6000  # 12 million characters, 12 times the text; many small steps beat few large ones
learning_rate = 2e-3
warmup_iters = 100
decay_lr = 'linear'
beta2 = 0.99  # small batches of little text
weight_decay = 0.03
ema = 0.999
eval_seqs = 871  # the whole validation text
compile = True  # a third off each step; without a C++ compiler: --compile=False
