"""Named after where FlashAttention-2 keeps them: nothing here needs Triton."""
