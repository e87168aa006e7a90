"""
Di-LADD-32 on LM1B with the paper's settings (LADD section 5.2): as lm1b_co_ladd.py, but the pooled states are
quantised.

    python data/lm1b/prepare.py --tokenizer=Qwen/Qwen3-Embedding-0.6B --wrap
    torchrun --standalone --nproc_per_node=8 train.py config/lm1b_di_ladd.py

Di-LADD-128:  --num_latents=128 --codebook_size=511 --latent_dim=32 --out_dir=out/lm1b_di_ladd_128

The encoder's output for a text never changes. Stored once, it is not computed again, and only the MM-DiT is
left to run:

    python data/encode.py config/lm1b_di_ladd.py
    torchrun --standalone --nproc_per_node=8 train.py config/lm1b_di_ladd.py --stored_latents=True

The paper keeps the learning rate constant; --decay_lr=cosine (or linear) ends lower. The number of steps is
derived, see lm1b_mdlm.py. The length of stage 1 is OpenWebText's: our choice. ("We only consider Stage 2
training", says the paper of LM1B; but a codebook has to come from somewhere.)
"""
dataset = 'lm1b'
method = 'ladd'
block_size = 128
seed = 42

hidden = 768
num_layers = 12
num_heads = 12
cond_dim = 128
dropout = 0.1
weighting = 'constant'

latent = 'discrete'
encoder = 'Qwen/Qwen3-Embedding-0.6B'
num_latents = 32
latent_dim = 128
codebook_size = 2047  # 2,048 with the mask
latent_schedule = 'linear'
times = 'independent'
stage1_iters = 50000  # for the quantizer

batch_size = 512  # over all processes; where memory is short: --micro_batch=16
max_iters = 300000  # both stages together: as many texts as lm1b_mdlm.py sees
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
