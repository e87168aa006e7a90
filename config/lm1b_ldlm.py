"""
LDLM on LM1B with the paper's settings (section 8, appendix C): latent encoder and decoder of 50M parameters
each, a denoiser of 131M, a token decoder of 67M with its head; GPT-2 small is the frozen token encoder.

    python data/lm1b/prepare.py --tokenizer=gpt2
    torchrun --standalone --nproc_per_node=8 train.py config/lm1b_ldlm.py

The text of the paper that we worked from had lost the learning rate, betas, eps, weight decay, clipping and
the average of the weights; these are from the authors' earlier code [family]. It had also lost which of the
two warmups is LM1B's: 10k is our choice.
"""
dataset = 'lm1b'
method = 'ldlm'
block_size = 128

token_encoder = 'gpt2'
layer = -3
latent_dim = 768
latent_layers = 6
decoder_layers = 3

hidden = 768
num_layers = 12
num_heads = 12
cond_dim = 768

reconstruction = 'mse'
encoder_warmup = 10000
adaptive_t = True
sigma_dec = 3.0

batch_size = 512  # over all processes; where memory is short: --micro_batch=16
max_iters = 1000000
learning_rate = 2e-4
warmup_iters = 5000
decay_lr = 'constant'
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-6
weight_decay = 0.01
grad_clip = 1.0
ema = 0.9999
dtype = 'bfloat16'
compile = True
eval_interval = 10000
