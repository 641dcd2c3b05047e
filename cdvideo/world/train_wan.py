"""Train the embedded Wan's transformer and text encoder together, on the latents of the world's stills and clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from cdvideo.models.wan.text import FoldedPadding, FoldedTextAttention, fold_padding
from cdvideo.models.wan.vae import decode_pixels, denormalised
from cdvideo.runs import atomic_path
from cdvideo.world.config import MakeBaseConfig
from cdvideo.world.dataset import SPLITS, read_labels
from cdvideo.world.denoising import PROMPTS, SAMPLE_GUIDANCE, pick_captions
from cdvideo.world.muon import make_optimizers
from cdvideo.world.tokenizer import caption_words, with_unknown_words
from cdvideo.world.training import Average, Limits, Stage, autocast, load_array, save_grid
from cdvideo.world.wan_parts import FLOW_SHIFT, build_text_encoder, build_transformer, train_umt5_tokenizer

EDGES = ("embedding", "shared", "embed_tokens", "relative_attention_bias", "proj_out", "scale_shift_table", "embedder")
SAMPLE_STEPS = 25


class TextAndTransformer(nn.Module):
    """Both networks that are learned, as one: a batch of captions and noisy latents in, velocities out."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        self.folded = FoldedPadding()
        for block in transformer.blocks:
            block.attn2.set_processor(FoldedTextAttention(self.folded))

    def forward(self, latents_BCFHW: Tensor, times_B: Tensor, ids_BL: Tensor) -> Tensor:
        """Return the predicted velocity; ``times_B`` in [0, 1], 1 is noise; ``ids_BL`` with 0 for padding."""
        mask_BL = (ids_BL != 0).long()
        states_BLD = self.text_encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        text_BRD, self.folded.bias_B11R = fold_padding(states_BLD, mask_BL)
        return self.transformer(latents_BCFHW, 1000 * times_B, text_BRD, return_dict=False)[0]


def train_wan(config: MakeBaseConfig, device: torch.device, limits: Limits) -> dict[str, Any]:
    """Train, save model-wan/transformer and text_encoder, and return the recorded facts."""
    torch.manual_seed(config.seed)
    settings, loop = config.wan, config.wan.loop
    model = config.out / "model-wan"
    vae = AutoencoderKLWan.from_pretrained(model / "vae").to(device)
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    pools = []
    for split in ("train", "clips"):
        folder = config.cache / split
        latents = load_array(folder / "wan_latents.npy", device)
        pools.append((latents, load_array(folder / "wan_ids.npy", device), load_array(folder / "masks.npy", device)))
    empty_L = caption_ids(tokenizer, [""], settings.text_tokens)[0].to(device)

    if (model / "transformer").is_dir():
        text_encoder = UMT5EncoderModel.from_pretrained(model / "text_encoder")
        transformer = WanTransformer3DModel.from_pretrained(model / "transformer")
    else:
        text_encoder = build_text_encoder(settings)
        transformer = build_transformer(settings, latent_channels=vae.config.z_dim)
    both = TextAndTransformer(text_encoder, transformer).float().to(device).train()
    average = Average(both, decay=loop.ema)
    optimizers = make_optimizers(both, lr=loop.lr, edges=EDGES)
    generator = torch.Generator(device).manual_seed(config.seed)
    models = {"both": both, "average": average.model}
    stage = Stage(
        config.out / "wan", loop=loop, models=models, optimizers=optimizers, generator=generator, limits=limits
    )
    if loop.compile:
        both.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    for step in stage.steps():
        losses = []
        for count, (latents_N, ids_NKL, masks_NHW) in zip((loop.batch, settings.clips), pools, strict=True):
            picks_B = torch.randint(len(latents_N), (count,), generator=generator, device=device)
            ids_BL = pick_captions(
                ids_NKL,
                picks_B,
                empty_L,
                empty=settings.empty_captions,
                noisy=settings.noisy_captions,
                generator=generator,
            )
            clean_BCFHW = latents_N[picks_B].float()
            noise_BCFHW = torch.randn(clean_BCFHW.shape, generator=generator, device=device)
            times_B = training_times(count, shift=settings.shift, generator=generator)
            t = times_B.view(-1, 1, 1, 1, 1)
            with autocast(device, config.dtype):
                velocity_BCFHW = both((1 - t) * clean_BCFHW + t * noise_BCFHW, times_B, ids_BL)
            subject_B11HW = masks_NHW[picks_B].float().div(255)[:, None, None]
            weight = 1 + (settings.subject_weight - 1) * subject_B11HW
            error = (velocity_BCFHW.float() - (noise_BCFHW - clean_BCFHW)).square()
            loss = (weight * error).mean() / weight.mean()
            (loss / 2).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(step)
        stage.log(stills=losses[0], clips=losses[1])
        if stage.wants_samples:
            for name, (latents_N, _, _) in zip(("stills", "clips"), pools, strict=True):
                prompts = PROMPTS if name == "stills" else PROMPTS[:4]
                with autocast(device, config.dtype):
                    latents = sample(
                        average.model, tokenizer, prompts, tuple(latents_N.shape[1:]), settings.text_tokens
                    )
                    films_BCFHW = decode_pixels(vae, denormalised(vae, latents))
                grid_BCHW = rearrange(films_BCFHW[:, :, ::2], "b c f h w -> (b f) c h w")
                columns = 4 if name == "stills" else films_BCFHW[:, :, ::2].shape[2]
                save_grid(grid_BCHW, stage.folder / "samples" / f"{step + 1:06d}-{name}.png", columns=columns)

    average.model.transformer.save_pretrained(model / "transformer")
    average.model.text_encoder.save_pretrained(model / "text_encoder")
    return {
        "steps": stage.step,
        "of": stage.total,
        "seconds": stage.seconds,
        "batch": loop.batch + settings.clips,
    }


def training_times(count: int, *, shift: float, generator: torch.Generator) -> Tensor:
    """Return times in (0, 1): the sigmoid of a unit Gaussian (SD3, arXiv 2403.03206), shifted towards noise."""
    times_B = torch.randn(count, generator=generator, device=generator.device).sigmoid()
    return shift * times_B / (1 + (shift - 1) * times_B)


@torch.no_grad()
def sample(
    both: TextAndTransformer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    shape: tuple[int, ...],
    tokens: int,
    *,
    steps: int = SAMPLE_STEPS,
    guidance: float = SAMPLE_GUIDANCE,
    seed: int = 0,
) -> Tensor:
    """Return latents_BCFHW of a still or film per prompt, by Euler steps with guidance; ``shape`` is of one."""
    device = both.transformer.device
    ids = caption_ids(tokenizer, [*prompts, *[""] * len(prompts)], tokens).to(device)
    latents = torch.randn((len(prompts), *shape), generator=torch.Generator().manual_seed(seed)).to(device)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = FLOW_SHIFT * times / (1 + (FLOW_SHIFT - 1) * times)
    for now, after in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        time_B = torch.full((2 * len(prompts),), now, device=device)
        wanted, empty = both(torch.cat([latents, latents]), time_B, ids).float().chunk(2)
        latents = latents + (after - now) * (empty + guidance * (wanted - empty))
    return latents


def caption_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int) -> Tensor:
    """Return ids_BL of L = ``tokens``, padded with 0 behind the end of text."""
    return tokenizer(
        list(texts), padding="max_length", max_length=tokens, truncation=True, return_tensors="pt"
    ).input_ids


def tokenize_wan_world(config: MakeBaseConfig, common_words: Sequence[str]) -> None:
    """Learn the vocabulary from the training captions, once; write each split's wan_ids.npy (N, captions + 1, L).

    The last column has unknown words, as the UNet's captions have.
    """
    folder = config.out / "model-wan" / "tokenizer"
    if folder.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        captions = [str(text) for item in read_labels(config.cache / "train") for text in item["captions"]]
        tokenizer = train_umt5_tokenizer(
            folder, world_words=caption_words(captions), common_words=common_words, size=config.wan.vocabulary
        )
    for split in SPLITS:
        _tokenize_split(config.cache / split, tokenizer, common_words, tokens=config.wan.text_tokens, seed=config.seed)


def _tokenize_split(
    folder: Path, tokenizer: PreTrainedTokenizerBase, common_words: Sequence[str], *, tokens: int, seed: int
) -> None:
    file, labels_file = folder / "wan_ids.npy", folder / "labels.jsonl"
    if not labels_file.exists() or (file.exists() and file.stat().st_mtime > labels_file.stat().st_mtime):
        return
    rng = np.random.default_rng([seed, 98])
    labels = read_labels(folder)
    texts: list[str] = []
    for item in labels:
        captions: list[str] = item["captions"]
        texts += [*captions, with_unknown_words(str(rng.choice(captions)), rng, common_words)]
    ids = caption_ids(tokenizer, texts, tokens).numpy().astype(np.int16)
    with atomic_path(file) as part:
        np.save(part, ids.reshape(len(labels), -1, tokens))
