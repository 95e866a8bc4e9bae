from tests.tiny_models import pipeline, unet  # noqa: F401
