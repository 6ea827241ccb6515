"""Tiny checkpoints as the two block-scaled formats are published: FP8 (DeepSeek-V3's) and MXFP4 (GPT-OSS's)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssForCausalLM

from tests.graft.tiny_families import tiny_model

BLOCK = 16
_FP8 = {
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
}
_NOT_CONVERTED = ["model.layers.*.self_attn", "model.embed_tokens", "lm_head", "*.router"]


def fp8_checkpoint(folder: Path, family: str = "deepseek_v3") -> Path:
    """Every matrix of the layers but the router's in FP8 with a scale per block of 16 x 16."""
    tensors = _saved(folder, family)
    found = dict(tensors)
    for name, value in tensors.items():
        if value.dim() == 2 and ".layers." in name and not name.endswith("mlp.gate.weight"):
            found[name], found[f"{name}_scale_inv"] = fp8_blocks(value.float())
    return _write(folder, found, _FP8)


def fp8_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in float8 and the factor of each block; its sides need not be multiples of a block."""
    rows, columns = (-(-side // BLOCK) for side in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    scaled = (blocks / scale[:, None, :, None].clamp(min=1e-12)).reshape(padded.shape)
    return scaled[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous(), scale


def mxfp4_checkpoint(folder: Path) -> Path:
    """GPT-OSS with experts as random blocks of 32 four-bit numbers and a power of two for each."""
    config = tiny_model("gpt_oss").config
    config.intermediate_size = 64  # a block is 32 numbers of one row
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    found = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in found if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = found.pop(name).shape
        blocks = torch.randint(
            0, 256, (experts, outer, inner // 32, 16), generator=generator, dtype=torch.uint8
        )
        scales = torch.randint(
            119, 124, (experts, outer, inner // 32), generator=generator, dtype=torch.uint8
        )
        found |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return _write(folder, found, {"quant_method": "mxfp4", "modules_to_not_convert": _NOT_CONVERTED})


def _saved(folder: Path, family: str) -> dict[str, Tensor]:
    tiny_model(family, dtype=torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _write(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, object]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder
