"""The denoising loss against diffusers' own noising and a float64 formula."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, MoleValueError
from mole_kernels.training.data import counted_generator
from mole_kernels.training.loss import DenoisingLoss, denoising_error, denoising_loss, min_snr_weight


class Recorder(torch.nn.Module):
    """Stands where a UNet stands: predicts a fixed linear function of what it is given, and remembers
    that.
    """

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, noisy, timesteps, text, added_cond_kwargs=None, return_dict=True):
        self.seen = {"noisy": noisy, "timesteps": timesteps, "text": text, "added": added_cond_kwargs}
        return (self.weight * noisy + text.mean(),)


def inputs(seed=0, n=5):
    g = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(n, 4, 3, 5, generator=g), torch.randn(n, 4, 3, 5, generator=g)
    return latents, torch.tensor([0, 1, 500, 998, 999])[:n], noise, torch.randn(n, 7, 6, generator=g)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_target_are_diffusers_own(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    latents, t, noise, text = inputs()
    unet = Recorder()
    error = denoising_error(unet, scheduler, latents, t, noise, text)
    noisy = scheduler.add_noise(latents, noise, t)
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, t)
    torch.testing.assert_close(unet.seen["noisy"], noisy)
    torch.testing.assert_close(error, (0.5 * noisy + text.mean() - target) ** 2)
    assert torch.equal(denoising_loss(unet, scheduler, latents, t, noise, text), error.mean())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_the_papers_formula(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    latents, t, noise, text = inputs()
    kept = scheduler.alphas_cumprod[t].double()
    snr = kept / (1 - kept)
    wanted = snr.clamp(max=5.0) / (snr if kind == "epsilon" else snr + 1)
    torch.testing.assert_close(min_snr_weight(scheduler, t, 5.0), wanted.float())
    assert wanted.min() < 0.1 and (kind == "v_prediction" or wanted.max() == 1)
    error = denoising_error(Recorder(), scheduler, latents, t, noise, text)
    loss = denoising_loss(Recorder(), scheduler, latents, t, noise, text, snr_gamma=5.0)
    torch.testing.assert_close(loss, (wanted.float() * error.mean((1, 2, 3))).mean())


def test_min_snr_is_finite_at_zero_terminal_snr():
    for kind, wanted in (("epsilon", 1.0), ("v_prediction", 0.0)):
        scheduler = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
        scheduler.alphas_cumprod[999] = 0.0
        assert min_snr_weight(scheduler, torch.tensor([999]), 5.0).item() == wanted


def test_mask_counts_its_pixels_only():
    scheduler = DDPMScheduler()
    latents, t, noise, text = inputs()
    error = denoising_error(Recorder(), scheduler, latents, t, noise, text)
    mask = torch.zeros(5, 1, 3, 5)
    mask[1, 0, 2, 3], mask[4, 0, 0, 1] = 1, 1
    loss = denoising_loss(Recorder(), scheduler, latents, t, noise, text, mask=mask)
    torch.testing.assert_close(loss, torch.cat([error[1, :, 2, 3], error[4, :, 0, 1]]).mean())
    assert (
        denoising_loss(Recorder(), scheduler, latents, t, noise, text, mask=torch.zeros(5, 1, 3, 5)).item()
        == 0
    )
    with pytest.raises(MoleShapeError, match="mask"):
        denoising_loss(Recorder(), scheduler, latents, t, noise, text, mask=torch.zeros(5, 3, 5))


def test_conditions_are_dropped_at_the_rate_asked_for():
    g = torch.Generator().manual_seed(1)
    text, null = torch.randn(400, 2, 3, generator=g), torch.randn(2, 3, generator=g)
    added = {"text_embeds": torch.ones(400, 3), "time_ids": torch.ones(400, 6)}
    batch = {"latents": torch.zeros(400, 4, 2, 2), "encoder_hidden_states": text} | added
    loss = DenoisingLoss(
        DDPMScheduler(), {"encoder_hidden_states": null, "text_embeds": torch.zeros(3)}, cond_dropout=0.25
    )
    unet = Recorder()
    loss(unet, batch, counted_generator(0, 1))
    dropped = (unet.seen["text"] == null).all((1, 2))
    assert torch.equal(unet.seen["text"][~dropped], text[~dropped])
    assert torch.equal(unet.seen["added"]["text_embeds"][:, 0] == 0, dropped)
    assert torch.equal(unet.seen["added"]["time_ids"], batch["time_ids"])
    # five standard deviations of a binomial with n = 400, p = 1/4
    assert abs(dropped.sum().item() - 100) < 5 * 75**0.5


def test_draws_depend_on_the_generator_alone():
    batch = {"latents": torch.zeros(3, 4, 2, 2), "encoder_hidden_states": torch.zeros(3, 2, 3)}
    seen = []
    for key in (7, 7, 8):
        unet = Recorder()
        torch.randn(key)
        DenoisingLoss(DDPMScheduler())(unet, batch, counted_generator(0, key))
        seen.append(unet.seen["noisy"])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_errors():
    latents, t, noise, text = inputs()
    with pytest.raises(MoleTypeError, match="FlowMatchEulerDiscreteScheduler"):
        DenoisingLoss(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(MoleValueError, match="sample"):
        denoising_loss(Recorder(), DDPMScheduler(prediction_type="sample"), latents, t, noise, text)
    with pytest.raises(MoleShapeError, match="noise"):
        denoising_loss(Recorder(), DDPMScheduler(), latents, t, noise[:2], text)
    with pytest.raises(MoleShapeError, match="timesteps"):
        denoising_loss(Recorder(), DDPMScheduler(), latents, t[:2], noise, text)
    with pytest.raises(MoleTypeError, match="integers"):
        denoising_loss(Recorder(), DDPMScheduler(), latents, t.float(), noise, text)
    with pytest.raises(MoleValueError, match="null"):
        DenoisingLoss(DDPMScheduler(), cond_dropout=0.1)
    with pytest.raises(MoleKeyError, match="encoder_hidden_states"):
        DenoisingLoss(DDPMScheduler())(Recorder(), {"latents": latents}, torch.Generator())
    with pytest.raises(MoleShapeError, match="null encoder_hidden_states"):
        batch = {"latents": latents, "encoder_hidden_states": text}
        DenoisingLoss(DDPMScheduler(), torch.zeros(6), cond_dropout=1.0)(Recorder(), batch, torch.Generator())
