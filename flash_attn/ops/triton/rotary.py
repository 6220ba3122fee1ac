"""Where FlashAttention-2 keeps `apply_rotary`, which vLLM and models of transformers import from here."""

from flash_attn.layers.rotary import apply_rotary

__all__ = ["apply_rotary"]
