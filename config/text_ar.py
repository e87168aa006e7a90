"""
The left-to-right model on a text of your own: as many parameters and tokens as text_mdlm.py.

    python data/text/prepare.py --input FILE... --tokenizer=gpt2 --name=text
    python train.py config/text_ar.py [--dataset=NAME]
"""
dataset = 'text'  # the --name given to prepare.py
method = 'ar'
block_size = 256

hidden = 384
num_layers = 6
num_heads = 6
cond_dim = 128
dropout = 0.1

batch_size = 32
max_iters = 20000  # 164 million tokens
learning_rate = 1e-3
warmup_iters = 500
decay_lr = 'cosine'
weight_decay = 0.03
ema = 0.999
