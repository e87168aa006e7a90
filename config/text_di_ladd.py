"""
Di-LADD on a text of your own: as many parameters as text_mdlm.py, in two modalities; codes from a small
frozen sentence encoder.

    python data/text/prepare.py --input FILE... --tokenizer=sentence-transformers/all-MiniLM-L6-v2 --name=text
    python train.py config/text_di_ladd.py [--dataset=NAME]
    python sample.py --out_dir=out/text_di_ladd [--strategy=seq]

Other encoders, and what to do without a network: see text_co_ladd.py. (A learned encoder: --encoder=
--stage1_iters=5000 --vq_start=3000.) The encoder's output for a text never changes, so it can be stored once;
training chunks then begin at multiples of block_size:

    python data/encode.py config/text_di_ladd.py
    python train.py config/text_di_ladd.py --stored_latents=True
"""
dataset = 'text'  # the --name given to prepare.py
method = 'ladd'
block_size = 256

hidden = 256  # with two modalities and this depth, as many parameters as text_mdlm.py
num_layers = 7
num_heads = 4
cond_dim = 64
dropout = 0.1  # a text of your own is short: it will be seen many times
weighting = 'constant'

latent = 'discrete'
encoder = 'sentence-transformers/all-MiniLM-L6-v2'
num_latents = 32
latent_dim = 128
codebook_size = 511
vq_decay = 0.99   # .95 and a threshold of 2 are for batches in which every code is chosen often;
dead_below = 0.2  # here 32 texts of 32 latents choose each twice
latent_schedule = 'linear'
times = 'independent'
stage1_iters = 2000  # for the quantizer

batch_size = 32
max_iters = 20000  # 164 million tokens
learning_rate = 1e-3
warmup_iters = 500
decay_lr = 'cosine'
weight_decay = 0.03
ema = 0.999
