"""Parts of models, under the names that model code imports from FlashAttention-2."""
