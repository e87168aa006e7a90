"""
The backbone of every method here: DiT and MM-DiT. Nothing about diffusion.

A DiT block (Peebles & Xie, 2023, arXiv:2212.09748) is LayerNorm -> attention -> LayerNorm -> MLP, each branch
shifted, scaled and gated by a linear function of a conditioning vector. The function starts at zero:
AdaLN-Zero. An MM-DiT block (Esser et al., 2024, arXiv:2403.03206) is the same for several modalities: each
owns all its weights, and one attention runs over the concatenation of their positions. So a DiT is an
MM-DiT with one modality, and both are written once: lists hold one entry per modality.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def rope_table(positions, head_dim, base=10000.0):
    """cos and sin of RoPE (Su et al., 2021, arXiv:2104.09864), each (S, head_dim / 2).

    positions: (S,), or S for 0, 1, ..., S - 1.
    """
    if isinstance(positions, int):
        positions = torch.arange(positions)
    freqs = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = positions[:, None] * freqs
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates the pairs (i, i + head_dim/2) of x (..., S, head_dim) by the angles of their positions."""
    (a, b), cos, sin = x.chunk(2, dim=-1), cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q, k, v, causal):
    """softmax(q k^T / sqrt(head_dim)) v, each (B, H, S, head_dim); causal: the last query sees all keys."""
    past = k.shape[2] - q.shape[2]
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16:
        # PyTorch's fused kernel is slow here; at S = 128 this takes a third to a fifth of its time
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=q.dtype).triu(1 + past)
        return scores.softmax(dim=-1).to(v.dtype) @ v
    visible = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past) if causal and past else None
    return F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal and not past)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class TimeEmbedding(nn.Module):
    """t in [0, 1], (B,) -> conditioning vector (B, cond_dim): sinusoids of 1000 t, then a two-layer MLP."""

    def __init__(self, cond_dim, num_freqs=128):
        super().__init__()
        freqs = 1000 * torch.exp(-math.log(10000) * torch.arange(num_freqs) / num_freqs)
        self.register_buffer('freqs', freqs, persistent=False)
        into, through = nn.Linear(2 * num_freqs, cond_dim), nn.Linear(cond_dim, cond_dim)
        self.mlp = nn.Sequential(into, nn.SiLU(), through, nn.SiLU())

    def forward(self, t):
        angles = t[:, None].float() * self.freqs
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.mlp[0].weight.dtype))


class Modality(nn.Module):
    """What one modality owns in a block: norms, QKV, output, MLP, and AdaLN.

    AdaLN starts at zero (see DiT), so every block begins as the identity.
    """

    def __init__(self, d, cond_dim, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(d, elementwise_affine=False)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate='tanh'), nn.Linear(4 * d, d))
        self.ada = nn.Linear(cond_dim, 6 * d)
        self.dropout = nn.Dropout(dropout)


class Block(nn.Module):
    def __init__(self, d, num_heads, cond_dim, modalities, dropout, causal):
        super().__init__()
        self.modalities = nn.ModuleList(Modality(d, cond_dim, dropout) for _ in range(modalities))
        self.num_heads, self.causal = num_heads, causal

    def forward(self, xs, cs, cos, sin, cache=None):
        """xs: per modality (B, S_i, d);  cs: per modality (B, cond_dim);  cos, sin: RoPE -> like xs."""
        B, d = xs[0].shape[0], xs[0].shape[2]
        # shift, scale and gate of attention, then those of the MLP
        ada = [m.ada(c).chunk(6, dim=-1) for m, c in zip(self.modalities, cs)]

        # one attention over all positions of all modalities
        qkv = [m.qkv(modulate(m.norm1(x), *a[:2])) for m, x, a in zip(self.modalities, xs, ada)]
        qkv = qkv[0] if len(qkv) == 1 else torch.cat(qkv, dim=1)                       # (B, S, 3 d)
        qkv = qkv.view(B, -1, 3, self.num_heads, d // self.num_heads)                  # (B, S, 3, H, d / H)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split((2, 1))                               # (.., B, H, S, d / H)
        (q, k), (v,) = rotate(qk, cos, sin), v
        if cache:  # k and v of earlier positions, for sampling from left to right
            k, v = (torch.cat((old, new), dim=2) for old, new in zip(cache, (k, v)))
        if cache is not None:
            cache[:] = k, v
        y = attend(q, k, v, causal=self.causal and q.shape[2] > 1)                     # (B, H, S, d / H)
        ys = y.transpose(1, 2).reshape(B, -1, d).split([x.shape[1] for x in xs], dim=1)

        out = []
        for m, x, y, (_, _, gate1, shift2, scale2, gate2) in zip(self.modalities, xs, ys, ada):
            x = x + gate1[:, None] * m.dropout(m.out(y))
            out.append(x + gate2[:, None] * m.dropout(m.mlp(modulate(m.norm2(x), shift2, scale2))))
        return out


class DiT(nn.Module):
    """Embedded positions in, hidden states out; with modalities = 2 this is the MM-DiT.

    Embeddings and heads belong to the methods.
    """

    def __init__(self, hidden, num_layers, num_heads, cond_dim, positions, modalities=1, dropout=0.0,
                 causal=False):
        super().__init__()
        if hidden % (2 * num_heads):
            raise ValueError(f'hidden={hidden} does not divide into {num_heads} heads of an even width')
        self.hidden, self.num_layers = hidden, num_layers
        self.time = nn.ModuleList(TimeEmbedding(cond_dim) for _ in range(modalities))
        blocks = (Block(hidden, num_heads, cond_dim, modalities, dropout, causal) for _ in range(num_layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.ada = nn.ModuleList(nn.Linear(cond_dim, 2 * hidden) for _ in range(modalities))
        cos, sin = rope_table(positions, hidden // num_heads)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)
        for layer in [m.ada for b in self.blocks for m in b.modalities] + list(self.ada):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, *xs, t=None, caches=None, depth=None):
        """xs: per modality (B, S_i, d) -> hidden states, one (B, S_i, d) per modality.

        t: per modality times (B,), or None for a constant 0
        caches: one list per block, [] at first, then [k, v], each (B, H, positions so far, d / H)
        depth: stop after that many blocks, without the last norm (of one modality)
        """
        S = sum(x.shape[1] for x in xs)
        ts = t or [None] * len(xs)
        # a constant time makes one conditioning vector for the whole batch: (1, cond_dim)
        cs = [embed(xs[0].new_zeros(1) if t is None else t) for embed, t in zip(self.time, ts)]
        start = caches[0][0].shape[2] if caches and caches[0] else 0
        cos, sin = self.cos[start:start + S], self.sin[start:start + S]
        for i, block in enumerate(self.blocks[:depth]):
            xs = block(xs, cs, cos, sin, caches[i] if caches else None)
        if depth is not None:
            return xs[0]
        hs = [modulate(self.norm(x), *ada(c).chunk(2, dim=-1)) for x, ada, c in zip(xs, self.ada, cs)]
        return hs[0] if len(hs) == 1 else hs

    def flops(self, S):
        """Forward FLOPs for S positions, LADD eq. (77), without heads.

        One per multiply-add: the text says two, but only one reproduces its table 12.
        """
        return self.num_layers * (12 * S * self.hidden**2 + 2 * S**2 * self.hidden)


# ------------------------------------------------------------------------------------------------------------
# the vocabulary head: with 150k tokens it costs as much as a backbone of 184M parameters, so it sees only
# the rows that need it, and a chunk of them at a time

def rows_at_once(vocab_size, device, cpu=2**25, gpu=2**28):
    """How many rows of logits to hold at once, given how many logits (2^25 bf16 numbers are 64 MiB)."""
    return max(1, (gpu if device.type == 'cuda' else cpu) // vocab_size)


class HeadLoss(torch.autograd.Function):
    """sum_i weight_i * loss_i of logits h W^T + b, of which only a few rows exist at a time.

    replace(logits (r, V), *about of these rows) -> losses (r,), fp32, and puts their gradient in place of the
    logits. So all gradients are formed in the forward pass, and backward only scales them.
    """

    @staticmethod
    def forward(ctx, replace, h, W, b, weights, *about):
        dh, dW, db = torch.empty_like(h), torch.zeros_like(W), torch.zeros_like(b)
        loss = h.new_zeros((), dtype=torch.float32)
        size = rows_at_once(len(W), h.device)
        part = rows_at_once(len(W), h.device, cpu=2**21)  # on a CPU the fp32 softmax stays in the cache
        for start in range(0, len(h), size):
            chunk = slice(start, start + size)
            logits = F.linear(h[chunk], W, b)  # bf16 under autocast; becomes its own gradient
            parts = zip(*(rows.split(part) for rows in (logits, weights[chunk], *(a[chunk] for a in about))))
            for d_logits, weight, *a in parts:
                loss += (weight * replace(d_logits, *a)).sum()
            weight = weights[chunk, None]
            dh[chunk] = weight * (logits @ W)  # scale (rows, d) instead of (rows, V): fewer multiplications
            dW += logits.T @ (weight * h[chunk]).to(logits.dtype)
            db += weights[chunk].to(logits.dtype) @ logits
            del logits, d_logits, parts  # free this chunk's logits before the next chunk allocates its own
        ctx.save_for_backward(dh, dW, db)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        others = (None,) * (len(ctx.needs_input_grad) - 4)
        return None, *(d.mul_(d_loss) for d in ctx.saved_tensors), *others  # in place: dW is large


def cross_entropy_(logits, targets):
    """-log p(target) (r,), and in place of the logits (r, V) their gradient p - e_target."""
    targets = targets[:, None]
    log_p = logits.float().log_softmax(dim=-1)
    log_p_target = log_p.gather(1, targets)
    logits.copy_(log_p.exp_())
    logits.scatter_(1, targets, log_p_target.expm1().to(logits.dtype))  # p, and p - 1 at the target
    return -log_p_target[:, 0]


def head_loss(replace, head, h, *about, weights=None):
    """h (R, d), weights (R,) fp32 -> the weighted sum of a loss of head(h), or its mean; see HeadLoss."""
    if weights is None:
        weights = torch.full((len(h),), 1 / len(h), device=h.device)
    return HeadLoss.apply(replace, h, head.weight, head.bias, weights, *about)


def head_cross_entropy(head, h, targets, weights=None):
    """h (R, d), targets (R,) int64, weights (R,) fp32 -> the weighted sum of -log p(target), or its mean."""
    return head_loss(cross_entropy_, head, h, targets, weights=weights)


def head_logits(head, h):
    """h (R, d) -> pairs of a slice of its rows and their logits, fp32 (rows, V); one chunk at a time."""
    size = rows_at_once(head.out_features, h.device)
    for start in range(0, max(1, len(h)), size):  # without rows, an empty chunk
        rows = slice(start, start + size)
        yield rows, head(h[rows]).float()


def head_nll(head, h, targets):
    """h (R, d), targets (R,) -> -log p(target) in nats, fp32 (R,)."""
    return torch.cat([F.cross_entropy(logits, targets[rows], reduction='none')
                      for rows, logits in head_logits(head, h)])
