"""
MDLM on Tiny Shakespeare by characters: nine minutes on two CPU cores.

    python data/shakespeare_char/prepare.py
    python train.py config/shakespeare_char_mdlm.py
    python sample.py --out_dir=out/shakespeare_char_mdlm --steps=128

shakespeare_char_ar.py is the same network, causal, on the same tokens. On a recent CPU bfloat16 products are
three times faster than float32 ones; on a CPU without them use --dtype=float32.
"""
dataset = 'shakespeare_char'
method = 'mdlm'
block_size = 128  # characters

hidden = 192
num_layers = 4
num_heads = 3  # few wide heads: attention is what a CPU does worst
cond_dim = 32
weighting = 'constant'  # the paper's choice on text: less noise than 1/t

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
