from tests.tiny_models import flux, mlp, pipeline, unet, x  # noqa: F401
