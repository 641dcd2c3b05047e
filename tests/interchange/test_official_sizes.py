"""The keys and sizes of Stable Diffusion 1.5 in other people's files."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from cdvideo.base.loader import Base
from cdvideo.interchange.adapter import read_adapter
from cdvideo.interchange.custom_diffusion import read_custom_diffusion
from cdvideo.interchange.files import CUSTOM_DIFFUSION, KOHYA, Foreign
from cdvideo.interchange.lora import adaptable_layers
from cdvideo.interchange.names import kohya_name
from tests.interchange.parts import (
    kohya_layers,
)


def test_the_keys_of_stable_diffusion_1_5() -> None:
    """Stable Diffusion 1.5: 192 layers in the UNet and 72 in the text encoder, as in the files that people own."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    base = Base("sd15", Path(), "", unet, None, text_encoder, None, {}, 512, torch.device("meta"), torch.float32)  # type: ignore[arg-type]
    official = kohya_layers(base, ("Transformer2DModel",))
    assert sum(name.startswith("lora_unet_") for name in official) == 192
    assert sum(name.startswith("lora_te_text_model_encoder_layers_") for name in official) == 72
    assert {kohya_name(name) for name in adaptable_layers(base)} >= official.keys()
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in official
    assert "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj" in official
    assert len({kohya_name(name) for name in adaptable_layers(base)}) == len(adaptable_layers(base))

    tensors = {}
    for stem, (_, layer) in official.items():
        tensors[f"{stem}.lora_down.weight"] = torch.ones(1, *layer.weight.shape[1:])
        tensors[f"{stem}.lora_up.weight"] = torch.ones(len(layer.weight), 1, *[1] * (layer.weight.ndim - 2))
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    kind, factors, settings = read_adapter(Foreign(Path("a.safetensors"), KOHYA, tensors, {}), base)
    assert kind == "lora" and len(factors) == 2 * len(official) and settings == {"rank": 1, "alpha": 1.0, "dora": False}

    attentions = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    whole = {
        f"{name}.{part}_custom_diffusion.weight": torch.empty(
            unet.get_submodule(name.removesuffix("processor") + part).weight.shape, device="meta"
        )
        for name in attentions
        for part in ("to_k", "to_v")
    }
    assert len(read_custom_diffusion(Foreign(Path("a.bin"), CUSTOM_DIFFUSION, whole, {}), base)) == 32
