"""Run by test_hf_kernels.py in a process of its own, where PEFT, diffusers and the installed package cannot
be imported.
"""

import importlib
import json
import pkgutil
import sys
from pathlib import Path

for name in ("peft", "diffusers", "transformers", "mole_kernels", "safetensors"):
    sys.modules[name] = None  # type: ignore[assignment]

import torch  # noqa: E402
from kernels import (  # noqa: E402
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from torch import nn  # noqa: E402


def mixture(x, m):
    """The same in plain torch, expert by expert."""
    y = x @ m.weight.T + m.bias
    gates = torch.sigmoid(x @ m.token_weight.T + m.token_bias)
    start = 0
    for e, rank in enumerate(m.ranks):
        down, up = m.down[0, start : start + rank], m.up[0, :, start : start + rank]
        y = y + m.scale[e] * gates[..., e : e + 1] * (x @ down.T @ up.T)
        start += rank
    return y


@use_kernel_forward_from_hub("GatedLoRALinear")
class Layer(nn.Module):
    """A user's own layer, with the tensors under the names that the kernel's layer reads."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = {"weight": (20, 24), "bias": (20,), "down": (1, 9, 24), "up": (1, 20, 9), "token_weight": (2, 24), "token_bias": (2,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=draw), requires_grad=name in ("down", "up", "token_weight")))
        self.register_buffer("scale", torch.tensor([0.7, -1.3]))
        self.ranks = (5, 4)
        self.own_calls = 0

    def forward(self, x):
        self.own_calls += 1
        return mixture(x, self)


def gradients(y, layer):
    return torch.autograd.grad(y.square().sum(), [layer.down, layer.up, layer.token_weight])


def error(found, wanted):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted))


root, other = Path(sys.argv[1]), Path(sys.argv[2])
layer, x = Layer(), torch.randn(3, 7, 24)
wanted = layer(x)
wanted_gradients = gradients(wanted, layer)
own = layer.own_calls

mapping = {"GatedLoRALinear": {"cpu": LocalLayerRepository(root, layer_name="GatedLoRALinear")}}
with use_kernel_mapping(mapping, inherit_mapping=False):
    fast = kernelize(layer, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
found = fast(x)
said = {"error": error([found], [wanted]), "gradients": error(gradients(found, fast), wanted_gradients), "own_calls": fast.own_calls - own}
said["compiled"] = error([torch.compile(fast, fullgraph=True, backend="eager")(x)], [wanted])

kernel, second = get_local_kernel(root), get_local_kernel(other)
experts = kernel.Experts(layer.down, layer.up, layer.scale, layer.ranks)
again = second.gated_lora_linear(
    x, layer.weight, layer.bias, second.Experts(*experts), second.Gates(token_weight=layer.token_weight, token_bias=layer.token_bias)
)
said |= {"second": error([again], [wanted]), "modules": [kernel.__name__, second.__name__], "ops": []}
for one in (kernel, second):
    namespace = sys.modules[f"{one.__name__}._ops"].ops
    said["ops"].append(str(namespace.gated_lora_fwd.default))
said["imported"] = [info.name for info in pkgutil.walk_packages(kernel.__path__, f"{kernel.__name__}.")]
for name in said["imported"]:
    importlib.import_module(name)
said["ours"] = sorted(name for name in sys.modules if name.partition(".")[0] in ("peft", "diffusers", "mole_kernels") and sys.modules[name])
print(json.dumps(said))
