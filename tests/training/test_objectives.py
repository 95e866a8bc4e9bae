"""Objectives against the schedulers' own noising, stepping and shifting, and the papers' formulas in float64."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError
from mole_kernels.training.objectives.levels import FLUX, QWEN_IMAGE, SD3, WAN, LevelSampling, ResolutionShift
from mole_kernels.training.objectives.objective import Diffusion, FlowMatching, noisy, objective_of
from mole_kernels.training.objectives.reduce import offset_noise, reduced


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(n=5, shape=(4, 3, 5)):
    g = seeded()
    return torch.randn(n, *shape, generator=g), torch.randn(n, *shape, generator=g)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_is_the_schedulers_own(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    objective = objective_of(scheduler)
    latents, noise = inputs()
    t = torch.tensor([0, 1, 500, 998, 999])
    levels = objective.levels(t)
    torch.testing.assert_close(noisy(latents, noise, levels), scheduler.add_noise(latents, noise, t))
    wanted = {"epsilon": noise, "sample": latents, "v_prediction": scheduler.get_velocity(latents, noise, t)}
    torch.testing.assert_close(objective.target(latents, noise, levels), wanted[kind])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_sampler_that_is_told_the_target_finds_the_latent(kind):
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    objective = objective_of(scheduler)
    latents, noise = inputs(1)
    levels = objective.levels(torch.tensor([400]))
    step = scheduler.step(objective.target(latents, noise, levels), 400, noisy(latents, noise, levels))
    torch.testing.assert_close(step.pred_original_sample, latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weights_are_one_weight_of_the_latents_error(kind):
    """An error δ of x is a·δ of the target, so w for x, divided by a², is the weight there."""
    alphas = DDPMScheduler().alphas_cumprod
    t = torch.tensor([3, 100, 500, 900])
    alpha = alphas[t].double()
    snr = alpha / (1 - alpha)
    per_target = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
    min_snr = Diffusion(alphas, kind, snr_gamma=5.0).levels(t).weight
    torch.testing.assert_close(min_snr, (snr.clamp(max=5.0) / per_target).float())
    debiased = Diffusion(alphas, kind, debiased=True).levels(t).weight
    bound = snr.clamp(max=1000)
    per_target = {"epsilon": bound, "v_prediction": bound + 1, "sample": torch.ones_like(snr)}[kind]
    torch.testing.assert_close(debiased, (bound.sqrt() / per_target).float())
    with pytest.raises(MoleValueError, match="one weight"):
        Diffusion(alphas, kind, snr_gamma=5.0, debiased=True)


@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler()]
)
def test_flow_matching_is_the_schedulers_own(scheduler):
    objective = objective_of(scheduler)
    latents, noise = inputs()
    picked = [0, 10, 500, 998, 999]
    levels = objective.levels(scheduler.sigmas[picked])
    torch.testing.assert_close(levels.timesteps, scheduler.timesteps[picked])
    wanted = scheduler.scale_noise(latents, scheduler.timesteps[picked], noise)
    torch.testing.assert_close(noisy(latents, noise, levels), wanted)
    # one Euler step of the whole way along the target arrives at the latent
    scheduler.set_timesteps(1)
    velocity = objective.target(latents, noise, levels)
    start = noisy(latents, noise, objective.levels(scheduler.sigmas[:1].expand(5)))
    end = scheduler.step(velocity, scheduler.timesteps[0], start).prev_sample
    torch.testing.assert_close(end, latents, atol=1e-5, rtol=1e-5)


def test_wans_scheduler_noises_as_the_objective_does():
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    )
    objective = objective_of(scheduler, density="uniform")
    assert objective.sampling == WAN
    latents, noise = inputs(3, (4, 2, 3, 5))
    scheduler.set_timesteps(12)
    picked = [0, 5, 11]
    wanted = scheduler.add_noise(latents, noise, scheduler.timesteps[picked])
    levels = objective.levels(scheduler.sigmas[picked])
    torch.testing.assert_close(noisy(latents, noise, levels), wanted)
    converted = torch.stack(
        [
            _original(
                scheduler, i, objective.target(latents, noise, levels)[n], noisy(latents, noise, levels)[n]
            )
            for n, i in enumerate(picked)
        ]
    )
    torch.testing.assert_close(converted, latents, atol=1e-4, rtol=1e-4)


def _original(scheduler, i, velocity, sample):
    scheduler._step_index = i
    return scheduler.convert_model_output(velocity, sample=sample)


def test_static_shift_is_the_schedulers():
    u = torch.linspace(1, 1000, 1000).flip(0) / 1000
    for sampling, shift in ((SD3, 3.0), (WAN, 5.0)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        torch.testing.assert_close(sampling.shifted(u, 0), scheduler.sigmas)
        assert LevelSampling.of_scheduler(scheduler, sampling.density) == sampling


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        (FLUX, {"base_shift": 0.5, "max_shift": 1.15}),
        (QWEN_IMAGE, {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}),
        (
            LevelSampling(by_resolution=ResolutionShift(0.25, 0.75, 256, 4096, "linear")),
            {"base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"},
        ),
    ],
    ids=["flux", "qwen-image", "cogview4"],
)
def test_shift_by_resolution_is_the_schedulers_and_the_pipelines(sampling, options):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)
    assert LevelSampling.of_scheduler(scheduler) == sampling
    u = torch.linspace(0.01, 1, 50)
    for tokens in (16, 256, 1024, 4096):
        config = scheduler.config
        mu = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        torch.testing.assert_close(sampling.shifted(u, tokens), scheduler.time_shift(mu, 1.0, u))


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_densities_are_diffusers(density):
    sampling = LevelSampling(density, mean=-0.3, std=0.8, mode_scale=1.29)
    ours = sampling.draw(4000, 0, seeded())
    theirs = compute_density_for_timestep_sampling(density, 4000, -0.3, 0.8, 1.29, generator=seeded())
    torch.testing.assert_close(ours, theirs.clamp_min(torch.finfo(torch.float32).eps), atol=1e-6, rtol=1e-5)
    assert ours.min() > 0 and ours.max() <= 1


@pytest.mark.parametrize("weights", ["none", "sigma_sqrt", "cosmap"])
def test_flow_weights_are_diffusers(weights):
    sigma = torch.linspace(0.01, 1, 30)
    ours = FlowMatching(weights=weights).levels(sigma).weight
    torch.testing.assert_close(ours, compute_loss_weighting_for_sd3(weights, sigma))


def test_reduction_counts_what_it_says():
    error = torch.rand(4, 2, 3, 3, generator=seeded())
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0])
    each = error.mean((1, 2, 3))
    torch.testing.assert_close(reduced(error), error.mean())
    torch.testing.assert_close(reduced(error, weight), (weight * each).mean())
    prior = torch.tensor([False, True, True, False])
    wanted = (each[0] + each[3]) / 2 + 0.7 * (each[1] + each[2]) / 2
    torch.testing.assert_close(reduced(error, prior=prior, prior_weight=0.7), wanted)
    torch.testing.assert_close(reduced(error[:1], prior=prior[:1]), each[0])
    mask = torch.zeros(4, 1, 3, 3)
    mask[1, 0, 2, 1] = mask[3, 0, 0, 0] = 1
    torch.testing.assert_close(
        reduced(error, mask=mask), torch.cat([error[1, :, 2, 1], error[3, :, 0, 0]]).mean()
    )
    assert reduced(error, mask=torch.zeros_like(mask)) == 0
    with pytest.raises(MoleShapeError, match="mask"):
        reduced(error, mask=mask[:2])


def test_offset_noise_moves_the_mean_of_each_channel():
    noise = torch.zeros(64, 8, 4, 4)
    moved = offset_noise(noise, 0.1, seeded())
    assert torch.equal(moved, moved[:, :, :1, :1].expand_as(moved))
    # 512 draws of N(0, 0.1²): the estimate of the deviation is within 4 of its standard errors
    assert abs(moved[:, :, 0, 0].std().item() - 0.1) < 4 * 0.1 / math.sqrt(2 * 511)
    assert offset_noise(noise, 0.0, seeded()) is noise


def test_what_does_not_fit_is_named():
    with pytest.raises(MoleValueError, match="density"):
        LevelSampling("normal")
    with pytest.raises(MoleValueError, match="std"):
        LevelSampling(std=0.0)
    with pytest.raises(MoleValueError, match="flow matching"):
        objective_of(FlowMatchEulerDiscreteScheduler(), snr_gamma=5.0)
    with pytest.raises(MoleValueError, match="not of flow matching"):
        objective_of(DDPMScheduler(), weights="cosmap")
    with pytest.raises(MoleTypeError, match="alphas_cumprod"):
        objective_of(object())
