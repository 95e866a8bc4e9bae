"""A patched model's state dict is the base's, whoever reads or writes it; its experts are kept elsewhere."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from mole_kernels.errors import MoleStateError, MoleWarning
from mole_kernels.patching.apply import patch
from tests.tiny_models import Mlp, make_expert, run_unet, tiny_pipeline, tiny_unet

diffusers = pytest.importorskip("diffusers")
GATES = [None, "mole", "local"]


@pytest.fixture(params=GATES, ids=str)
def patched(request):
    unet = tiny_unet()
    base = copy.deepcopy(unet)
    handle = patch(unet, {"a": make_expert(unet)}, request.param)
    return unet, base, handle


def test_names_and_tensors_are_the_base_s(patched):
    unet, base, handle = patched
    state = unet.state_dict()
    assert (
        list(state) == list(base.state_dict())
        and state._metadata.keys() == base.state_dict()._metadata.keys()
    )
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    # of a part, with a prefix, and into a dict that is there
    attention = (
        unet.mid_block.attentions[0] if unet.mid_block is not None else unet.down_blocks[0].attentions[0]
    )
    assert not any("expert" in key or ".gate." in key for key in attention.state_dict(prefix="p."))
    handle.remove()
    assert list(unet.state_dict()) == list(base.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_the_base_loads_into_the_patched_model(patched, assign):
    unet, base, handle = patched
    other = {key: value + 0.01 for key, value in base.state_dict().items()}
    assert unet.load_state_dict(copy.deepcopy(other), assign=assign) == ([], [])
    mixture = run_unet(unet)
    base.load_state_dict(other)
    moved = patch(base, handle.bank(), handle.gates())
    assert torch.equal(run_unet(base), mixture)
    moved.remove()
    handle.remove()
    assert torch.equal(run_unet(unet), run_unet(base))


def test_a_patched_model_s_state_loads_into_a_bare_one(patched):
    unet, base, _ = patched
    bare = tiny_unet()
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.zero_()
    assert bare.load_state_dict(unet.state_dict()) == ([], [])
    assert torch.equal(run_unet(bare), run_unet(base))


def test_what_is_missing_or_unknown_is_still_said(patched):
    unet, base, _ = patched
    state = base.state_dict()
    key = next(iter(state))
    del state[key]
    with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
        unet.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*stranger"):
        unet.load_state_dict(base.state_dict() | {"stranger": torch.zeros(1)})


def test_a_control_net_and_averages_see_the_base(patched):
    unet, base, _ = patched
    make = diffusers.ControlNetModel.from_unet
    ours, theirs = (make(m, conditioning_embedding_out_channels=(4, 8)).state_dict() for m in (unet, base))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items() if not k.startswith("controlnet"))
    average = torch.optim.swa_utils.AveragedModel(unet)
    average.update_parameters(unet)
    assert {key.removeprefix("module.") for key in average.state_dict() if key != "n_averaged"} == set(
        base.state_dict()
    )
    before = run_unet(unet)
    ema = diffusers.training_utils.EMAModel(unet.parameters())
    ema.step(unet.parameters())
    ema.copy_to(unet.parameters())
    torch.testing.assert_close(run_unet(unet), before)


@pytest.mark.parametrize("copied", ["model", "handle with it"])
def test_a_copy_is_patched_and_saves_itself(patched, copied, tmp_path):
    unet, base, handle = patched
    other = copy.deepcopy(unet) if copied == "model" else copy.deepcopy((unet, handle))[0]
    assert torch.equal(run_unet(other), run_unet(unet)) and list(other.state_dict()) == list(
        base.state_dict()
    )
    with torch.no_grad():
        other.conv_in.weight.add_(1)
    with pytest.warns(MoleWarning, match="experts"):
        other.save_pretrained(tmp_path)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.conv_in.weight, other.conv_in.weight)


def test_saving_warns_while_experts_are_on_the_model(tmp_path):
    pipe = tiny_pipeline()
    pipe.tokenizer = None
    base = copy.deepcopy(pipe.unet)
    handle = patch(pipe, {"a": make_expert(pipe.unet)})
    with pytest.warns(
        MoleWarning, match=r"the experts on \d+ layers of this UNet2DConditionModel are not in it"
    ):
        pipe.unet.save_pretrained(tmp_path / "unet")
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in base.state_dict().items())
    handle.remove()
    assert "save_pretrained" not in vars(pipe.unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoleWarning)
        pipe.unet.save_pretrained(tmp_path / "again")


def test_two_patches_of_one_model_guard_it_until_the_last_is_removed(tmp_path):
    unet = tiny_unet()
    paths = [p for p, m in unet.named_modules() if type(m) is nn.Linear and "attn" in p]
    first = patch(unet, {"a": make_expert(unet, paths[:2])})
    second = patch(unet, {"b": make_expert(unet, paths[2:4])})
    first.remove()
    with pytest.warns(MoleWarning, match="experts on 2 layers"):
        unet.save_pretrained(tmp_path)
    second.remove()
    assert "save_pretrained" not in vars(unet)


def test_a_pickled_state_holds_nothing_of_ours(patched):
    unet, base, _ = patched
    file = io.BytesIO()
    torch.save(unet.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == base.state_dict().keys()


def test_accelerate_keeps_the_experts_that_train(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = Mlp()
    handle = patch(model, {"a": make_expert(model)}, "mole")
    trained = handle.expert_parameters() + handle.gate_parameters()
    for parameter in trained:
        parameter.requires_grad_()
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(model)
        before = [p.detach().clone() for p in trained]
        accelerator.save_state(str(tmp_path))
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1)
        accelerator.load_state(str(tmp_path))
    finally:
        # accelerate's state is the process's, and would bind the precision of later tests
        accelerate.state.AcceleratorState._reset_state()
    assert all(torch.equal(p, was) for p, was in zip(trained, before))


@pytest.mark.parametrize("folded", [False, True, "recompute"])
def test_baked_for_good(folded):
    unet = tiny_unet()
    base = copy.deepcopy(unet)
    flags = [p.requires_grad for p in unet.parameters()]
    handle = patch(unet, {"a": make_expert(unet)}, scales={"a": 0.5})
    mixture = run_unet(unet)
    if folded:
        handle.fold(keep=folded is True)
    handle.bake()
    torch.testing.assert_close(run_unet(unet), mixture)
    assert list(unet.state_dict()) == list(base.state_dict()) and not handle.active
    assert [type(m) for m in unet.modules()] == [type(m) for m in base.modules()]
    assert [set(vars(m)) for m in unet.modules()] == [set(vars(m)) for m in base.modules()]
    assert [p.requires_grad for p in unet.parameters()] == flags
    with pytest.raises(MoleStateError, match="removed already"):
        handle.bake()
    # a plain model: it can be patched anew
    patch(unet, {"b": make_expert(unet)}).remove()


def test_what_cannot_be_folded_is_not_baked():
    unet = tiny_unet()
    handle = patch(unet, {"a": make_expert(unet)}, "mole")
    mixture = run_unet(unet)
    with pytest.raises(MoleStateError, match="MoLEGate varies by token"):
        handle.bake()
    assert handle.active and torch.equal(run_unet(unet), mixture)
