"""The demo: handwritten digits play faces and hands, in a tiny Stable Diffusion pipeline that ships with the
package.
"""

from __future__ import annotations

from mole_kernels.doors import door

_HOME = {
    "ASSETS": "mole_kernels.demo.model",
    "MIXTURE": "mole_kernels.demo.model",
    "load_pipeline": "mole_kernels.demo.model",
    "scene_batches": "mole_kernels.demo.stages",
}

__all__ = list(_HOME)


__getattr__, __dir__ = door(__name__, _HOME)
