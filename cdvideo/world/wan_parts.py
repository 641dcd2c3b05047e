"""The parts of the embedded Wan, with new weights: autoencoder, tokenizer, text encoder, transformer, scheduler."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from cdvideo.models.wan.text import TEXT_ROWS
from cdvideo.world.config import WanConfig, WanVaeConfig
from cdvideo.world.tokenizer import WORLD_WEIGHT

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as UMT5 has them
FLOW_SHIFT = 3.0
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": FLOW_SHIFT,
    "solver_order": 2,
    "solver_type": "bh2",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
}


def build_vae(config: WanVaeConfig) -> AutoencoderKLWan:
    """Return the autoencoder in Wan 2.2's residual form: patches of 2 pixels, 8 x 8 x 4 pixels a latent."""
    return AutoencoderKLWan(
        base_dim=config.width,
        z_dim=config.latent_channels,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.blocks,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * config.latent_channels,
        latents_std=[1.0] * config.latent_channels,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
    )


def build_transformer(config: WanConfig, *, latent_channels: int) -> WanTransformer3DModel:
    """Return the transformer with new weights; its last layer is zero, so that it begins by predicting nothing."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=config.text_width,
        freq_dim=256,
        ffn_dim=config.ffn,
        num_layers=config.layers,
        rope_max_seq_len=64,
    )
    transformer.proj_out.weight.data.zero_()
    transformer.proj_out.bias.data.zero_()
    return transformer


def build_text_encoder(config: WanConfig) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocabulary,
            d_model=config.text_width,
            d_kv=config.text_width // config.text_heads,
            d_ff=3 * config.text_width // 2,
            num_layers=config.text_layers,
            num_heads=config.text_heads,
            dropout_rate=0.0,
        )
    )


def train_umt5_tokenizer(
    folder: Path, *, world_words: Iterable[str], common_words: Iterable[str], size: int
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE whose single tokens are the world's words; write and return it.

    It ends every prompt with ``</s>`` and fills up with ``<pad>``, as UMT5's does; any text tokenises, by its bytes.

    Raises:
        ValueError: ``size`` is too small for every world word to become one token.
    """
    world = sorted({word.lower() for word in world_words})
    common = sorted({word.lower() for word in common_words} - set(world))
    learner = Tokenizer(models.BPE(unk_token=UNKNOWN))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator([" ".join([word] * WORLD_WEIGHT) for word in world] + common, trainer)
    learner.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learner, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=TEXT_ROWS
    )
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    # transformers 5 would name a class that transformers 4 does not know
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    )
    split = [word for word in world if len(tokenizer(word, add_special_tokens=False).input_ids) != 1]
    if split:
        raise ValueError(f"vocabulary of {size} is too small: {len(split)} world words are split, such as {split[:5]}")
    return tokenizer
