"""Write the corpus that fuzzing begins with (tests/fuzz/corpus); what was found later lies beside it: python
tests/fuzz/seed_corpus.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mole_kernels.dispatch.tables import FORMAT as TABLE  # noqa: E402
from mole_kernels.methods.difflora.store import FORMAT as MODEL  # noqa: E402
from tests.fuzz.meeting import CORPUS  # noqa: E402
from tests.raw import entry, raw  # noqa: E402

RECORD = {
    "name": "a",
    "dialect": "kohya",
    "ranks": [2],
    "scale": 0.5,
    "scales": {"unet.y": 2.0},
    "conv": [],
    "metadata": {"k": "v"},
}
ROW = {
    "M": 64,
    "K": 32,
    "N": 16,
    "ranks": [4, 4],
    "sets": 1,
    "dtype": "bfloat16",
    "gate": "token",
    "direction": "forward",
    "us": {"plain": 2.5, "stacked": 4},
}
TABLES = {
    "format": TABLE,
    "gpu": "A GPU",
    "key": "a",
    "capability": [9, 0],
    "multiprocessors": 132,
    "software": {"torch": "2"},
    "utc": "now",
    "rows": [ROW],
}
MANIFEST = {
    "version": 1,
    "scales": {"unet.x": 0.5},
    "conv": [],
    "entries": [
        {"name": "unet.x.down", "shape": [2, 3], "offset": 0, "dtype": "float32", "exponent": 1},
        {"name": "unet.x.up", "shape": [4, 2], "offset": 6, "dtype": "bfloat16", "exponent": -1},
    ],
}
AUTOENCODER = {
    "length": 14,
    "channels": [2, 4],
    "factor": 2,
    "kernel": 3,
    "latent_channels": 1,
    "noise": [0.001, 0.1],
}
PREDICTOR = {
    "features": {"face_dim": 4, "image_dim": 4, "dim": 8, "hidden": 4},
    "denoiser": {
        "latent_channels": 1,
        "latent_length": 4,
        "condition_dim": 8,
        "depth": 1,
        "width": 8,
        "heads": 1,
        "patch": 2,
    },
    "encoders": {kind: {"small": {"dim": 4, "channels": 4, "size": 8}} for kind in ("face", "image")},
    "timesteps": 10,
}
MODEL_OF = {
    "format": MODEL,
    "weights": "w.safetensors",
    "digest": "DIGEST",
    "autoencoder": AUTOENCODER,
    "manifest": MANIFEST,
}
QUESTIONS = (
    "item_id,text,tuple,question_natural_language,proposition_id,dependency,category_broad\n"
    "1,a cat,x,Is there a cat?,1,0,entity\n"
)


def dumps(value: object) -> bytes:
    return json.dumps(value).encode()


SEEDS: dict[str, list[bytes]] = {
    "header": [
        raw(
            {"__metadata__": {"a": "b"}, "x": entry((2, 3), 0, 24), "y": entry((2,), 24, 28, "F16")},
            bytes(range(28)),
        ),
        raw({"x": entry((4,), 0, 4, "F8_E4M3"), "y": entry((0, 3), 4, 4)}, bytes(4)),
    ],
    "header_json": [
        dumps({"__metadata__": {"a": "b"}, "x": entry((2, 3), 0, 24)}),
        dumps({"x": entry((1,), 0, 4), "y": entry((1, 1, 1, 1), 4, 8, "BF16")}),
        b"{}",
    ],
    "shard_index": [dumps({"weight_map": {"x": "m-00001.safetensors", "y": "m-00002.safetensors"}})],
    "keys": [
        b"unet.mid_block.proj_in.lora_A.weight\nunet.mid_block.proj_in.lora_B.weight",
        b"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight\nlora_unet_mid_block_attentions_0_proj_in.lora_up.weight\n"
        b"lora_unet_mid_block_attentions_0_proj_in.alpha",
        b"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight\nlora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
        b"lora_unet_input_blocks_4_1_proj_in.lora_down.weight\nlora_unet_input_blocks_4_1_proj_in.lora_up.weight",
        b"unet.up_blocks.1.attn1.processor.to_q_lora.down.weight\nunet.up_blocks.1.attn1.processor.to_q_lora.up.weight",
        b"base_model.model.x.lora_A.default.weight\nbase_model.model.x.lora_B.default.weight",
    ],
    "gate_keys": [
        b"\n".join(
            b"moe_lora_unet_mid_block_attentions_0_proj_in.softmoe." + name
            for name in (
                b"Phi_1.weight",
                b"Phi_1.bias",
                b"face_scale.weight",
                b"face_scale.bias",
                b"hand_scale.weight",
                b"hand_scale.bias",
            )
        ),
        b"gate.unet.x.phi\ngate.unet.x.phi_bias",
    ],
    "gate_json": [dumps({"experts": ["face", "hand"], "metadata": {"k": "v"}})],
    "adapter_config": [
        dumps({"unet.r": 2, "unet.lora_alpha": 4, "text_encoder.r": 2, "text_encoder.lora_alpha": 1.5}),
        dumps(
            {
                "r": 4,
                "lora_alpha": 8,
                "rank_pattern": {"^mid_block.proj_in": 2, "to_q": 2, "q_proj": 2},
                "alpha_pattern": {"in$": 2},
            }
        ),
        dumps(
            {
                "unet.r": 2,
                "unet.lora_alpha": 4,
                "unet.use_rslora": True,
                "unet.use_dora": False,
                "unet.lora_bias": False,
            }
        ),
    ],
    "single_file": [dumps([RECORD, RECORD | {"name": "b", "scale": 1, "scales": {}, "conv": ["unet.x"]}])],
    "regions_text": [
        b"[a <c1> cat]-*-[blurry]-*-[0, 0, 32, 48]|[a dog]-*-[]-*-[]",
        b"[x]-*-[]-*-[1.5,+2.,64,.5e1]",
    ],
    "regions_json": [
        dumps(
            [
                {
                    "prompt": "a cat",
                    "negative": "blurry",
                    "box": [0, 0.5, 1, 1],
                    "experts": {"a": 0.8, "b": -1},
                },
                {"prompt": "a dog"},
            ]
        )
    ],
    "fusion_config": [
        dumps(
            [
                {
                    "lora_path": "c.pth",
                    "unet_alpha": 1.0,
                    "text_encoder_alpha": 0.5,
                    "concept_name": "<c1> <c2>",
                }
            ]
        ),
        dumps([{"lora_path": "none.safetensors"}]),
    ],
    "dispatch_table": [dumps(TABLES)],
    "difflora_manifest": [dumps(MANIFEST)],
    "difflora_model": [
        dumps(MODEL_OF | {"kind": "autoencoder"}),
        dumps(MODEL_OF | {"kind": "predictor"} | PREDICTOR),
    ],
    "selma_answer": [
        b'Here you are:\n\n4. A red fox\n5. **Prompt:** "Two owls"\n   on a branch\n\n6) a jug\nThat is all.',
        b"- one\n- two\n\n* three",
        b'Sure: ["a cat", "a dog"]',
        b"a first line\n5. the second",
    ],
    "selma_files": [
        dumps({"owls": {"seeds": ["one owl", "two owls", "three owls"], "about": "owls"}}),
        dumps(
            [
                {
                    "caption": "a cat",
                    "question": "a cat?",
                    "answer": "yes",
                    "choices": ["yes", "no"],
                    "element_type": "animal",
                }
            ]
        ),
        QUESTIONS.encode(),
        b'{"prompt": "x"}\n{"prompt": "y"}\n',
    ],
    "captions": [
        dumps({"file_name": "b.png", "text": "a picture"}),
        b'{"file_name": "../a.png", "text": "x"}\n\n{"file_name": "../../c.png", "text": ""}',
    ],
}


def main() -> None:
    for name, inputs in SEEDS.items():
        folder: Path = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, content in enumerate(inputs):
            (folder / f"seed-{i}").write_bytes(content)


if __name__ == "__main__":
    main()
