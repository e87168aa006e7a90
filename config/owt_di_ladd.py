"""
Di-LADD-64 on OpenWebText with the paper's settings (LADD section 5.3): as owt.py, but the pooled states are
quantised.

    python data/openwebtext/prepare.py --tokenizer=Qwen/Qwen3-Embedding-0.6B --wrap
    torchrun --standalone --nproc_per_node=8 train.py config/owt_di_ladd.py
    python sample.py --out_dir=out/owt_di_ladd --steps=32 [--strategy=seq --latent_steps=8]

Di-LADD-16:  --num_latents=16 --dead_below=0.5 --out_dir=out/owt_di_ladd_16
(512 texts of 16 latents choose each of the 8,191 codes once on average: with the threshold of 2 most codes
would be called dead at every step.)

The encoder's output for a text never changes. Stored once (288 GB), it is not computed again, see
lm1b_di_ladd.py. The paper keeps the learning rate constant; --decay_lr=cosine (or linear) ends lower. 500k
steps, and 50k for the quantizer, are the defaults of the official scripts; that the 500k include the 50k is
our choice.
"""
dataset = 'openwebtext'
method = 'ladd'
block_size = 512
seed = 42

hidden = 768
num_layers = 12
num_heads = 12
cond_dim = 128
dropout = 0.1
weighting = 'constant'

latent = 'discrete'
encoder = 'Qwen/Qwen3-Embedding-0.6B'
num_latents = 64
latent_dim = 128
codebook_size = 8191  # 8,192 with the mask
latent_schedule = 'linear'
times = 'independent'
stage1_iters = 50000  # for the quantizer

batch_size = 512  # over all processes; where memory is short: --micro_batch=16
max_iters = 500000  # both stages together: as many texts as owt_mdlm.py sees
learning_rate = 3e-4
warmup_iters = 2500
decay_lr = 'constant'
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.03
grad_clip = 1.0
ema = 0.9999
dtype = 'bfloat16'
compile = True
eval_interval = 10000
