"""transformers' continuous batching: requests that share steps, over packed rows, then over a paged cache.

A tiny model generates greedily for a few prompts at once; each token has to be the one that the eager model finds most
likely. On the CPU that is in float32, and what transformers asks of a GPU is switched off; on a GPU in bfloat16, where
a token may be almost as likely as the first.

usage: python tests/clients/continuous_batching.py
"""

from __future__ import annotations

import copy
import sys

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.continuous_batching import initialization
from transformers_models import DEVICE, DTYPE, TINY, allow_the_cpu, seen_calls

LENGTHS = (5, 17, 9, 30)
NUM_TOKENS = 10
PAGES_PER_REQUEST = 16
ALLOWED = 0.05  # by how much a token's logit may lie below the highest one


def pages_for_decoding(allowed):
    """Whether steps that only decode take the path of a block table."""
    pages = PAGES_PER_REQUEST if allowed else 0
    initialization.ensure_decode_fast_path_is_available = lambda _, options, *__: setattr(
        options, "max_blocks_per_request", pages
    )


def main():
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    if DEVICE == "cpu":
        allow_the_cpu()
    known = LlamaConfig()
    config = LlamaConfig(**{name: size for name, size in TINY.items() if hasattr(known, name)})
    torch.manual_seed(0)
    eager = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation="eager").to(DEVICE, DTYPE).eval()
    ours = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation="flash_attention_2")
    ours = ours.to(DEVICE, DTYPE).eval()
    ours.load_state_dict(eager.state_dict())
    prompts = [torch.randint(3, 128, (length,)).tolist() for length in LENGTHS]
    # Without a token that ends them, all requests have the same number of tokens.
    options = GenerationConfig(max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for paged in (False, True):
        pages_for_decoding(paged)
        with seen_calls() as calls:
            results = ours.generate_batch(inputs=prompts, generation_config=options)
        tables = [call.block_table is not None for call in calls]
        assert tables and any(tables) == paged, f"{sum(tables)} of {len(tables)} calls had a block table"
        for prompt in prompts:
            (tokens,) = [result.generated_tokens for result in results.values() if result.prompt_ids == prompt]
            assert len(tokens) == NUM_TOKENS
            with torch.no_grad():
                logits = eager(torch.tensor([prompt + tokens], device=DEVICE)).logits[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, torch.tensor(tokens, device=DEVICE)[:, None])[:, 0]
            behind = (logits.amax(-1) - chosen).max().item()
            assert behind <= (ALLOWED if DTYPE == torch.bfloat16 else 0), f"a token's logit is {behind} too low"
        print(f"continuous batching: right; {sum(tables)} of {len(tables)} calls had a block table")


if __name__ == "__main__":
    sys.exit(main())
