"""Tiny models of all architectures of transformers that take "flash_attention_2": our attention beside the eager one.

Each model runs a batch with and without padding, decodes with its cache, and takes a training step. On the CPU path, in
float32, its logits have to be those of the eager model. On a GPU, in bfloat16, they may differ from those of the eager
model in float32 twice as much as the eager model's in bfloat16 do, but for a tenth of the tokens, which a mixture of
experts may send to another one.

usage: python tests/clients/transformers_models.py [MODEL_TYPE ...]     all, if none is given
"""

from __future__ import annotations

import copy
import sys
import warnings
from contextlib import contextmanager

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import import_utils

import flash_attn
from flash_attn import _ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE, SLACK, COMPARED = (torch.bfloat16, 0.02, 0.9) if DEVICE == "cuda" else (torch.float32, 1e-3, 1.0)
MOST_PARAMETERS = 30e6
BATCH, LENGTH, PROMPT, PADDING = 2, 24, 18, 7
SIZES = {
    32: "hidden_size_per_layer_input moe_intermediate_size shared_expert_intermediate_size",
    64: "hidden_size n_embd d_model word_embed_proj_dim",
    96: "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim",
    128: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions",
    16: "head_dim global_head_dim kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim",
    8: "sliding_window rotary_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok eos_token_id",
    1: "n_group topk_group first_k_dense_replace bos_token_id",
    0: "pad_token_id",
}
PARTS = ("padded", "full", "decoded")

# Two layers are enough, but for models that have one layer of attention among several of another kind.
NUM_LAYERS = (2, 8)
NAMES_OF_LAYERS = "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers".split()
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
TINY |= dict.fromkeys(NAMES_OF_LAYERS, NUM_LAYERS[0])

# Failures of transformers 5.23 itself, whatever package serves flash_attention_2.
NOT_OURS = {"phimoe": "the window reaches the eager attention alone"}
if DTYPE == torch.float32:
    NOT_OURS["gpt2"] = "float32 needs a torch.nn.Linear in the attention layer, which has none"


class Unfit(Exception):
    """The tiny model can't be made, or not even the eager one runs."""


def allow_the_cpu():
    """transformers takes flash_attention_2 where there is a GPU."""
    import_utils.is_torch_cuda_available = lambda: True
    import_utils.is_flash_attn_2_available.cache_clear()


def make_models(config_class, model_class, num_layers):
    """(eager in float32, eager, ours), of the same weights."""
    for base in model_class.__mro__:
        if "_compatible_flash_implementations" in vars(base):  # with sinks: only the forks that have them
            base._compatible_flash_implementations = None
    try:
        known = config_class()
        names = [name for name in TINY if hasattr(known, "layer_types") or hasattr(known, name)]
        sizes = {name: num_layers if name in NAMES_OF_LAYERS else TINY[name] for name in names}
        if hasattr(known, "kv_lora_rank"):  # latent attention has as many key heads as query heads
            sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        config = config_class(**sizes)
        with torch.device("meta"):
            probe = model_class._from_config(copy.deepcopy(config), attn_implementation="eager")
        if sum(weight.numel() for weight in probe.parameters()) > MOST_PARAMETERS:
            raise Unfit("its size can't be set")
        torch.manual_seed(0)
        exact = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").float().eval()
        exact.load_state_dict({name: value.to(DTYPE) for name, value in exact.state_dict().items()})
        others = []
        for implementation in ("eager", "flash_attention_2"):
            model = model_class._from_config(copy.deepcopy(config), attn_implementation=implementation)
            others.append(model.to(DTYPE).eval())
            others[-1].load_state_dict(exact.state_dict())
    except Unfit:
        raise
    except Exception as error:
        raise Unfit(f"{type(error).__name__}: {error}") from error
    return [model.to(DEVICE) for model in (exact, *others)]


def logits_of(model, decodes):
    """Of the rows that count: padded, full, and decoded one by one after a prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (BATCH, LENGTH), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        full = model(input_ids=ids).logits
        if not decodes:
            return [padded.float(), full.float()]
        step = model(input_ids=ids[:, :PROMPT], use_cache=True)
        decoded = []
        for at in range(PROMPT, LENGTH):
            step = model(input_ids=ids[:, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            decoded.append(step.logits)
    return [part.float() for part in (padded, full, torch.cat(decoded, 1))]


def train(model):
    model.train()
    ids = torch.randint(3, 128, (BATCH, LENGTH)).to(DEVICE)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients), "gradients aren't finite"


@contextmanager
def seen_calls():
    """The list of attention calls that reach this package inside the `with` block."""
    forward, calls = _ops.forward, []

    def seen(path, call):
        calls.append(call)
        return forward(path, call)

    _ops.forward = seen
    try:
        yield calls
    finally:
        _ops.forward = forward


def error_of(logits, expected):
    """Of the tokens that are compared, the largest difference."""
    of_tokens = (logits - expected).abs().flatten(0, -2).amax(-1)
    return of_tokens.quantile(COMPARED).item() if of_tokens.isfinite().all() else torch.inf


def check(classes, decodes, num_layers):
    """What is wrong, or nothing."""
    exact, eager, ours = make_models(*classes, num_layers)
    try:
        expected, low = logits_of(exact, decodes), logits_of(eager, decodes)
    except Exception as error:
        raise Unfit(f"the eager model: {type(error).__name__}: {error}") from error
    try:
        with seen_calls() as calls:
            results = logits_of(ours, decodes)
        train(ours)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not calls:
        return "flash_attn was never called"
    for what, got, other, want in zip(PARTS[: len(expected)], results, low, expected, strict=True):
        error, allowed = error_of(got, want), 2 * error_of(other, want) + SLACK
        if not error <= allowed:
            return f"{what}: logits are off by {error:.3f}, allowed are {allowed:.3f}"
    return ""


def architectures(chosen):
    """(name, its classes, whether it decodes) of those that take flash_attention_2."""
    for decodes, mapping in ((True, MODEL_FOR_CAUSAL_LM_MAPPING), (False, MODEL_FOR_MASKED_LM_MAPPING)):
        for config_class, model_class in mapping.items():
            model_class = model_class[0] if isinstance(model_class, tuple) else model_class
            name = config_class.model_type
            if model_class._supports_flash_attn and (not chosen or name in chosen):
                yield name, (config_class, model_class), decodes


def main(chosen):
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    if DEVICE == "cpu":
        allow_the_cpu()
    found = {"right": {}, "wrong": {}, "wrong in transformers": {}, "not tried": {}}
    for name, classes, decodes in architectures(chosen):
        title = name if decodes else f"{name} (masked)"
        for num_layers in NUM_LAYERS:
            try:
                failure = check(classes, decodes, num_layers)
                break
            except Unfit as error:
                reason = str(error).splitlines()[0][:150]
        else:
            found["not tried"][title] = reason
            continue
        if failure and name in NOT_OURS:
            found["wrong in transformers"][title] = NOT_OURS[name]
        else:
            found["wrong" if failure else "right"][title] = failure[:300]
    print(f"flash_attn {flash_attn.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    for verdict, models in found.items():
        print(f"{verdict}, {len(models)}:")
        for name, why in models.items():
            print(f"  {name}: {why}" if why else f"  {name}")
    return 1 if found["wrong"] or not found["right"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
