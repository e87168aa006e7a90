"""
CANDI on Tiny Shakespeare by characters: the network, texts and optimizer of shakespeare_char_mdlm.py.

    python data/shakespeare_char/prepare.py
    python train.py config/shakespeare_char_candi.py
    python sample.py --out_dir=out/shakespeare_char_candi --steps=128

Of its bound, .455 nats per token are the price of the start: see baselines/candi.py.
"""
dataset = 'shakespeare_char'
method = 'candi'
block_size = 128  # characters

hidden = 192
num_layers = 4
num_heads = 3  # few wide heads: attention is what a CPU does worst
cond_dim = 32
weighting = 'constant'

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
