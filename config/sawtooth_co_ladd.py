"""
Co-LADD on sawtooth, the main job: one continuous latent per text, joint and sequential sampling from one
checkpoint. Tuned for two CPU cores (a little over four minutes).

How it departs from the official settings (sawtooth_co_ladd_paper.py), besides the width, rate and stage 1
that sawtooth_di_ladd.py explains:
- one model for both strategies: times are independent instead of t_z = t_x, so that the token denoiser meets
  clean latents, too, and a small latent denoiser of its own stands beside the joint one (the paper trains a
  second model for sequential sampling)
- the latent has length 1: free to grow, it carries more of the text's own coin flips and is harder to
  generate
- stage 3 trains the latent denoiser of sequential sampling alone: its steps cost a quarter of the others
"""
dataset = 'sawtooth'
method = 'ladd'
latent = 'continuous'

hidden = 64
num_layers = 4
num_heads = 2
cond_dim = 32
num_latents = 1
latent_dim = 32
latent_layers = 3        # the latent denoiser of sequential sampling
times = 'independent'
weighting = 'constant'  # the same optimum with less noise than 1/t; the paper's choice, too

stage1_iters = 400
stage1_t_min = 0.8
stage1_clean = True
stage3_start = 1250
p_start = 0.25

optimizer = 'muon'
batch_size = 32
max_iters = 1700
learning_rate = 2e-3
warmup_iters = 50
decay_lr = 'linear'
weight_decay = 0.03
ema = 0.999
eval_seqs = 1024
