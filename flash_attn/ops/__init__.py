"""Single operations, under the names that other libraries import from FlashAttention-2."""
