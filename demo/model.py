"""A small causal language model over bytes: grouped-query attention, rotary embedding, sliding windows.

It has two ways to run. `forward` takes whole sequences; its attention is a function that the caller passes,
so that the same weights run on flash_attn and on PyTorch's attention. `decode` takes the next tokens of
sequences whose keys and values lie in a paged cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from paged_cache import PagedKVCache
from torch import Tensor, nn

from flash_attn import flash_attn_with_kvcache

Window = tuple[int, int]
# Causal: q (B, S, heads, head_dim), k and v (B, S, kv_heads, head_dim), window_size -> output of q's shape.
Attend = Callable[[Tensor, Tensor, Tensor, Window], Tensor]

UNLIMITED: Window = (-1, -1)


@dataclass(frozen=True)
class Config:
    vocab: int = 128  # ASCII
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2  # two query heads share one key and value head
    head_dim: int = 32
    window: int = 64  # how many tokens a sliding-window layer sees, the token itself included

    def window_size(self, layer_idx: int) -> Window:
        """Even layers see a sliding window, odd ones everything before them."""
        return (self.window - 1, 0) if layer_idx % 2 == 0 else UNLIMITED


def rotary_tables(length: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles (RoFormer, arXiv:2104.09864), each (length, head_dim / 2)."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (0, d/2), (1, d/2 + 1), ... of x (B, S, heads, d) by the angle of each position."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]  # (S, 1, d/2)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.window_size = config.window_size(layer_idx)
        self.q = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self._project(x)
        cos, sin = rotary_tables(x.shape[1], self.config.head_dim, x.device, q.dtype)
        attended = attend(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, self.window_size)
        return self.out(attended.flatten(-2))

    def decode(self, x: Tensor, cache: PagedKVCache, rows: slice) -> Tensor:
        """One call rotates the queries and new keys, appends keys and values to their pages, and attends."""
        q, k, v = self._project(x)
        cos, sin = rotary_tables(cache.max_length, self.config.head_dim, x.device, q.dtype)
        attended = flash_attn_with_kvcache(
            q,
            cache.k_pages[self.layer_idx],
            cache.v_pages[self.layer_idx],
            k,
            v,
            rotary_cos=cos,
            rotary_sin=sin,
            rotary_interleaved=False,
            cache_seqlens=cache.lengths[rows],
            block_table=cache.block_table[rows],
            causal=True,
            window_size=self.window_size,
        )
        return self.out(attended.flatten(-2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (-1, self.config.head_dim)
        return self.q(x).unflatten(-1, heads), self.k(x).unflatten(-1, heads), self.v(x).unflatten(-1, heads)


class Block(nn.Module):
    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config, layer_idx)
        self.mlp = nn.Sequential(
            nn.RMSNorm(config.dim),
            nn.Linear(config.dim, 4 * config.dim, bias=False),
            nn.GELU(),
            nn.Linear(4 * config.dim, config.dim, bias=False),
        )

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), attend)
        return x + self.mlp(x)

    def decode(self, x: Tensor, cache: PagedKVCache, rows: slice) -> Tensor:
        x = x + self.attention.decode(self.attention_norm(x), cache, rows)
        return x + self.mlp(x)


class LanguageModel(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        """Logits (B, S, vocab) of tokens (B, S)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, attend)
        return self._logits(x)

    def loss(self, tokens: Tensor, attend: Attend) -> Tensor:
        """Mean cross-entropy, in nats per byte, of predicting each token but the first from those before."""
        logits = self(tokens[:, :-1], attend)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def decode(self, tokens: Tensor, cache: PagedKVCache, rows: slice = slice(None)) -> Tensor:
        """Logits of the next tokens (B, S) of the cache's entries `rows`; keys and values join the cache."""
        cache.reserve(rows, tokens.shape[1])
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block.decode(x, cache, rows)
        cache.advance(rows, tokens.shape[1])
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embedding.weight)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[Tensor],
    num_new: int,
    cache: PagedKVCache,
    on_step: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Greedy continuations of prompts of different lengths: each is read in alone, then all go on at once."""
    last = []
    for entry_idx, prompt in enumerate(prompts):
        logits = model.decode(prompt[None], cache, slice(entry_idx, entry_idx + 1))
        last.append(logits[:, -1].argmax(-1))
    tokens = [torch.cat(last)]  # each (num prompts,)
    on_step()
    for _ in range(num_new - 1):
        logits = model.decode(tokens[-1][:, None], cache)
        tokens.append(logits[:, -1].argmax(-1))
        on_step()
    new = torch.stack(tokens, dim=1)
    return [torch.cat((prompt, new[entry_idx])) for entry_idx, prompt in enumerate(prompts)]
