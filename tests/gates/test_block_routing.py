"""One gate for a block and sample: its formula, its gradient through the balancing loss, its hooks."""

import pytest
import torch

from mole_kernels.errors import MoleKeyError, MoleStateError, MoleTypeError
from mole_kernels.gates.block import BlockRouting
from mole_kernels.patching.apply import patch
from tests.tiny_models import Mlp, make_expert, run_flux, run_unet, tiny_flux, tiny_unet


@pytest.fixture
def unet():
    return tiny_unet()


def routed(unet):
    routing = BlockRouting(unet)
    experts = {"a": make_expert(unet, rank=2), "b": make_expert(unet, rank=3, seed=1)}
    return routing, patch(unet, experts, routing, strict=False)


def test_every_layer_of_a_block_gets_the_softmax_of_its_input(unet):
    routing, handle = routed(unet)
    seen = {}
    blocks = {path: m for path, m in unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"}
    for path, block in blocks.items():
        block.register_forward_pre_hook(lambda m, args, path=path: seen.__setitem__(path, args[0].detach()))
    run_unet(unet, batch=2)
    assert set(routing.gates()) == set(blocks) and len(blocks) > 1
    maps = handle.gate_maps()
    for path, h in seen.items():
        router = routing.routers[path]
        want = torch.softmax(
            torch.nn.functional.normalize(h.mean(1), dim=-1)
            @ router.weight.mT
            / router.log_temperature.exp(),
            -1,
        )
        torch.testing.assert_close(routing.gates()[path], want)
        inside = [m for p, m in maps.items() if p.startswith(path + ".")]
        assert len(inside) >= 10 and all(torch.equal(m.given[:, 0], routing.gates()[path]) for m in inside)
    outside = [m for p, m in maps.items() if not any(p.startswith(b + ".") for b in blocks)]
    assert outside and all(m.given is None for m in outside)


def test_the_balancing_loss_has_a_gradient_and_is_least_where_all_are_used_alike(unet):
    routing, handle = routed(unet)
    with torch.enable_grad():
        unet(torch.randn(2, 4, 8, 6), torch.tensor([3, 3]), torch.randn(2, 5, 12))
        loss = routing.balance_loss()
    mean = torch.cat(list(routing.gates().values())).mean(0)
    torch.testing.assert_close(loss, -mean.log().sum())
    assert loss >= 2 * torch.tensor(2.0).log() - 1e-6
    parameters = list(routing.parameters())
    assert parameters and set(map(id, parameters)) == set(map(id, handle.gate_parameters()))
    grads = torch.autograd.grad(loss, parameters)
    assert all(g.norm() > 0 for g, p in zip(grads, parameters) if p.dim() == 2)
    with torch.no_grad():
        for p, g in zip(parameters, grads):
            p -= 5 * g
    run_unet(unet, batch=2)
    routed_loss = routing.balance_loss()
    assert routed_loss < loss


def test_removing_the_patch_and_the_hooks_restores_the_model(unet):
    before = run_unet(unet)
    routing, handle = routed(unet)
    assert not torch.equal(run_unet(unet), before)
    handle.remove()
    routing.remove()
    assert torch.equal(run_unet(unet), before)
    assert not any(m._forward_pre_hooks for m in unet.modules())


def test_joint_attention_blocks_called_by_keyword():
    flux = tiny_flux()
    routing = BlockRouting(flux)
    patch(flux, {"a": make_expert(flux), "b": make_expert(flux, seed=1)}, routing, strict=False)
    run_flux(flux)
    assert {type(flux.get_submodule(path)).__name__ for path in routing.gates()} == {
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
    }


def test_bad_routing_is_named(unet):
    with pytest.raises(MoleTypeError, match="expected an"):
        BlockRouting("unet")
    with pytest.raises(MoleKeyError, match="no transformer block in this Mlp"):
        BlockRouting(Mlp())
    with pytest.raises(MoleStateError, match="no routed block has run"):
        BlockRouting(unet).balance_loss()
