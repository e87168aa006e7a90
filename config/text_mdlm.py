"""
MDLM on a text of your own: a small network for a laptop or one GPU.

    python data/text/prepare.py --input FILE... --tokenizer=gpt2 --name=text
    python train.py config/text_mdlm.py [--dataset=NAME]

With 50,000 words most of the work is in the vocabulary head; a small text trains much faster by characters
(--tokenizer=char).
"""
dataset = 'text'  # the --name given to prepare.py
method = 'mdlm'
block_size = 256

hidden = 384
num_layers = 6
num_heads = 6
cond_dim = 128
dropout = 0.1  # a text of your own is short: it will be seen many times
weighting = 'constant'

batch_size = 32
max_iters = 20000  # 164 million tokens
learning_rate = 1e-3
warmup_iters = 500
decay_lr = 'cosine'
weight_decay = 0.03
ema = 0.999
