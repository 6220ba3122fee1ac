"""FlashAttention-2's compiled module, as far as other libraries call it: for them, not for new code.

`flash_attn.flash_attn_interface` says what the arguments are, and `flash_attn.flash_attn_with_kvcache` what those of
`fwd_kvcache` are. They are positional. `gen` is the torch.Generator that dropout's random numbers come from, or None
for the default one; a backward pass needs it only without `rng_state`.
"""

from flash_attn._fa2 import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
