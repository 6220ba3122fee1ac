"""Run beside an installed wheel: the compiled module loads and its ops are there. The first line is torch's version."""

import json

import torch

print(torch.__version__)

import flash_attn  # noqa: E402
from flash_attn import _extension  # noqa: E402

print("flash_attn", flash_attn.__version__, "from", flash_attn.__file__)
print("built with", _extension.build_info)
assert _extension.load_error() is None, _extension.load_error()
for name in ("forward", "forward_out", "append_kv", "rotary", "combine"):
    print(getattr(torch.ops.flash_attn, name).default._schema)
kernels = json.loads(torch.ops.flash_attn.built_kernels())
print("kernels:", json.dumps(kernels))
assert kernels["kernels"], "the module holds no kernel"

q = torch.randn(1, 5, 2, 64)
out = flash_attn.flash_attn_func(q, q, q, causal=True)
torch.testing.assert_close(out[:, 0], q[:, 0])
