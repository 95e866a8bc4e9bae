from tests.patching.conftest import pipeline, unet  # noqa: F401
