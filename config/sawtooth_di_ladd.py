"""
Di-LADD on sawtooth: one code per text, joint and sequential sampling from one checkpoint. Tuned for two CPU
cores (training takes five minutes on one).

How it departs from the official settings (sawtooth_di_ladd_paper.py):
- a narrow network, small batches, Muon, a rate that falls to zero, as in sawtooth_mdlm.py
- stage 1 shows the token denoiser texts that are almost fully masked (t_x > .8), and the clean latent. With
  t_x from all of [0, 1] the visible tokens give the shift away, and the encoder learns almost nothing
- for the first 350 steps the latent passes unquantised; then k-means on the warm encoder places the codes.
  Codes placed before the encoder has learnt anything would quantise noise, and the straight-through gradient
  would have to move everything at once
- 63 codes: 128 coins determine the shift to about a fourteenth of a period, and a batch touches 32 codes
- a quarter of the texts in stage 2 is fully masked (p_start), because sequential sampling predicts the code
  from such texts
"""
dataset = 'sawtooth'
method = 'ladd'
latent = 'discrete'

hidden = 64
num_layers = 4
num_heads = 2
cond_dim = 32
num_latents = 1
latent_dim = 32
codebook_size = 63
vq_decay = 0.99          # .95 is for batches in which every code is chosen
dead_below = 0.05        # likewise: a code is chosen 32 / 63 = .5 times per batch on average
latent_schedule = 'linear'  # the paper's; the official config has 'polynomial'
times = 'independent'
weighting = 'constant'  # the same optimum with less noise than 1/t; the paper's choice, too

stage1_iters = 550
stage1_t_min = 0.8
stage1_clean = True
vq_start = 350
p_start = 0.25
lambda_z = 0.1           # one code loss is as large as all 128 token losses together

optimizer = 'muon'
batch_size = 32
max_iters = 1500
learning_rate = 2e-3
warmup_iters = 50
decay_lr = 'linear'
weight_decay = 0.03
ema = 0.999
eval_seqs = 2048
