"""Experts of unequal ranks in blocks that are compiled one by one: as many graphs as equal ones."""

import copy

import pytest
import torch
from torch import nn

from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.patching.apply import patch


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.first, self.second = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x):
        return x + self.second(torch.relu(self.first(self.norm(x))))


class Tower(nn.Module):
    def __init__(self, blocks=12, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def tower(blocks=12):
    torch.manual_seed(0)
    return Tower(blocks).eval().requires_grad_(False)


def expert(model, rank_of, seed=0, paths=None):
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for i, (path, layer) in enumerate((p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear)):
        if paths is not None and path not in paths:
            continue
        N, K = layer.weight.shape
        r = rank_of(i)
        layers[path] = LowRank(
            torch.randn(r, K, generator=g) * 0.3, torch.randn(N, r, generator=g) * 0.3, 0.5
        )
    return Expert(layers)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def compiled_graphs(model, blocks=None):
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    for block in model.blocks if blocks is None else blocks:
        block.compile(fullgraph=True, backend=backend)
    with torch.no_grad():
        out = model(X)
    return out, len(graphs)


@pytest.mark.parametrize("gates", [None, "mole", "local"])
@pytest.mark.parametrize("experts", [1, 2])
def test_as_many_graphs_as_with_equal_ranks(experts, gates):
    def make(unequal):
        model = tower()
        torch.manual_seed(1)
        bank = {
            f"e{e}": expert(model, (lambda i, e=e: 1 + (i * (e + 1)) % 7) if unequal else lambda i: 7, seed=e)
            for e in range(experts)
        }
        handle = patch(model, bank, gates)
        return model, handle

    model, _ = make(False)
    _, equal = compiled_graphs(model)
    model, handle = make(True)
    with torch.no_grad():
        eager = model(X)
    kept = handle.bank()
    out, unequal = compiled_graphs(model)
    torch.testing.assert_close(out, eager)
    assert unequal == equal == 1
    # the experts are as wide as they were to whoever reads them back
    for name in kept.names:
        for path, layer in handle.bank().experts[name].layers.items():
            assert layer.rank == kept.experts[name].layers[path].rank
            torch.testing.assert_close(
                layer.up @ layer.down,
                kept.experts[name].layers[path].up @ kept.experts[name].layers[path].down,
            )
    handle.remove()
    assert all("compile" not in vars(module) for module in model.modules())


def test_blocks_that_were_compiled_before_the_patch_and_a_swap_after_it():
    model = tower()
    graphs = compiled_graphs(model)[1]
    handle = patch(model, {"a": expert(model, lambda i: 1 + i % 5)})
    with torch.no_grad():
        first = model(X)
    handle.swap("a", expert(model, lambda i: 2 + i % 7, seed=4))
    second, count = compiled_graphs(model)
    plain = tower()
    patch(plain, {"a": expert(plain, lambda i: 2 + i % 7, seed=4)})
    with torch.no_grad():
        torch.testing.assert_close(second, plain(X))
    assert count == graphs == 1 and not torch.equal(first, second)


def test_nothing_is_padded_in_eager_execution():
    model = tower(3)
    handle = patch(model, {"a": expert(model, lambda i: 1 + i)})
    assert [layer.experts.ranks for layer in handle.layers.values()] == [(1 + i,) for i in range(7)]
    with torch.no_grad():
        model(X)
    assert [layer.experts.down.shape[1] for layer in handle.layers.values()] == list(range(1, 8))


def test_a_copied_block_pads_its_own_experts():
    model = tower(3)
    handle = patch(model, {"a": expert(model, lambda i: 1 + i)})
    block = copy.deepcopy(model.blocks[0])
    block.compile(backend="eager")
    assert block.first.experts.ranks == (5,) and model.blocks[0].first.experts.ranks == (1,)
    handle.remove()


@pytest.mark.slow
def test_flux_s_57_blocks():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    paths = {p for p, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks." in p}

    def run():
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            return model(
                hidden_states=torch.randn(1, 4, 4, generator=g),
                encoder_hidden_states=torch.randn(1, 3, 12, generator=g),
                pooled_projections=torch.randn(1, 8, generator=g),
                timestep=torch.tensor([0.5]),
                img_ids=torch.zeros(4, 3),
                txt_ids=torch.zeros(3, 3),
            ).sample

    counts = []
    for rank_of in (lambda i: 5, lambda i: 1 + i % 11):
        graphs: list[int] = []

        def backend(module, inputs, graphs=graphs):
            graphs.append(1)
            return module

        handle = patch(model, {"a": expert(model, rank_of, paths=paths)})
        eager = run()
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
        torch.testing.assert_close(run(), eager, atol=1e-4, rtol=1e-4)
        counts.append(len(graphs))
        handle.remove()
        for module in model.modules():
            module._compiled_call_impl = None
    assert counts[1] <= counts[0] <= 3
