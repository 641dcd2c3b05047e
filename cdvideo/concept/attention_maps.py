"""Where the UNet looks: how much of its cross-attention each word of a prompt gets, and from which pixels.

ClassDiffusion (arXiv 2405.17532), section 3, sees semantic drift here too: while a concept is tuned, the attention that
the class word gets falls. Maps are kept as in Prompt-to-Prompt (arXiv 2208.01626): softmax(Q K^T), averaged over heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from transformers import CLIPTokenizer

from cdvideo.base.loader import Base
from cdvideo.base.prompts import encode_prompts, latent_sizes, repeated
from cdvideo.base.schedule import add_noise, make_scheduler
from cdvideo.base.text import tokenize
from cdvideo.concept.adapters import tuned, tuned_text
from cdvideo.concept.concept import Concept

START, REST = "<start>", "<rest>"  # beside the words: the first position, and the text's end with the padding


@torch.no_grad()
def attention_maps(
    base: Base,
    concept: Concept | None,
    prompt: str,
    latents_NCHW: Tensor,
    timesteps: Sequence[int],
    generator: torch.Generator,
) -> dict[str, dict[int, Tensor]]:
    """For each word and resolution, the share of every pixel's cross-attention that the word gets: maps_NHW in [0, 1].

    Averaged over heads, layers of a resolution, and timesteps. Over all words, `START` and `REST`, a pixel's shares sum
    to 1. The base is as before when this returns.

    Args:
        concept: Of any adapter; None measures the base itself.
        prompt: The same for all latents; the concept's token stands as one word, whatever its rows.
        latents_NCHW: Pictures, scaled as the VAE has it; the same noise is added to each at every timestep.
        timesteps: Of the training schedule, in [0, num_train_timesteps).
        generator: Draws the noise; a generator of the CPU. The same seed gives the same maps.

    Returns:
        By word, as it stands between the prompt's spaces, then by the map's height in cells. A word that stands there
        twice has one entry, of both.
    """
    rows = {} if concept is None else concept.tokens
    counts = {token: len(rows_KD) for token, rows_KD in rows.items()}
    words = word_positions(base.tokenizer, prompt, counts)
    member_LW = torch.zeros(base.tokenizer.model_max_length, len(words), device=base.device)
    for index, positions in enumerate(words.values()):
        member_LW[positions, index] = 1

    scheduler = make_scheduler(base.scheduler_config)
    noise_NCHW = torch.randn(latents_NCHW.shape, generator=generator).to(base.device)
    timesteps_B = torch.tensor(timesteps, device=base.device).repeat_interleave(len(latents_NCHW))
    repeats = (len(timesteps), 1, 1, 1)
    noisy_BCHW = add_noise(
        scheduler, latents_NCHW.to(base.device).repeat(repeats), noise_NCHW.repeat(repeats), timesteps_B
    )
    with tuned_text(base, concept):
        text = encode_prompts(base, [prompt], rows=rows)
    text_BLD = text.hidden_BLD.expand(len(timesteps_B), -1, -1)
    added = repeated(text.added(latent_sizes(base, latents_NCHW)), len(timesteps_B))
    with tuned(base.unet, concept), recording(base.unet, member_LW) as seen:
        base.unet(noisy_BCHW.to(base.dtype), timesteps_B, text_BLD, added_cond_kwargs=added)

    maps: dict[str, dict[int, Tensor]] = {word: {} for word in words}
    for pixels in sorted({shares_BQW.shape[1] for shares_BQW in seen}, reverse=True):
        layers = [shares_BQW for shares_BQW in seen if shares_BQW.shape[1] == pixels]
        shares_NQW = torch.stack(layers).mean(dim=0).unflatten(0, (len(timesteps), -1)).mean(dim=0)
        height = _height(pixels, latents_NCHW)
        for index, word in enumerate(words):
            maps[word][height] = shares_NQW[..., index].unflatten(1, (height, -1)).cpu()
    return maps


def word_positions(tokenizer: CLIPTokenizer, prompt: str, tokens: Mapping[str, int]) -> dict[str, list[int]]:
    """Which positions of the text each word takes. Words end at spaces; a concept's token is its word's name.

    Args:
        tokens: Concept tokens and their number of rows.

    Returns:
        `START`, the words in order of appearance, and `REST`; every position belongs to exactly one of them. What is
        cut from a prompt that is too long has none.
    """
    last = tokenizer.model_max_length - 1
    words: dict[str, list[int]] = {START: [0]}
    at = 1
    for piece in prompt.split():
        batch = tokenize(tokenizer, [piece], tokens=tokens)
        word = batch.slots[0].token if batch.slots else piece
        end = at + int(batch.eos_B) - 1
        words.setdefault(word, []).extend(range(at, min(end, last)))
        at = min(end, last)
    return {**words, REST: [*range(at, last + 1)]}


class _RecordingCrossAttention:
    """diffusers' attention processor, which also keeps the shares that words get: shares_BQW, over all heads."""

    def __init__(self, member_LW: Tensor, seen: list[Tensor]) -> None:
        self.member_LW, self.seen = member_LW, seen

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query_BNQE, keys_BNLE, values_BNLE = (
            read_BLC.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for read_BLC in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        # In float32, as fused kernels have them: float16 ends at 65,504, and what lies beyond would be no number.
        scores_BNQL = (query_BNQE.float() * attn.scale) @ keys_BNLE.float().transpose(2, 3)
        shares_BNQL = scores_BNQL.softmax(dim=-1)
        self.seen.append(shares_BNQL.mean(dim=1) @ self.member_LW)
        read_BQC = (shares_BNQL.to(values_BNLE) @ values_BNLE).transpose(1, 2).flatten(2)
        return attn.to_out[0](read_BQC)


@contextmanager
def recording(unet: UNet2DConditionModel, member_LW: Tensor) -> Iterator[list[Tensor]]:
    """Within the block, all cross-attentions record into the list; on leaving, the former processors are back."""
    attentions = [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]
    former = [attention.processor for attention in attentions]
    seen: list[Tensor] = []
    try:
        for attention in attentions:
            attention.set_processor(_RecordingCrossAttention(member_LW, seen))
        yield seen
    finally:
        for attention, processor in zip(attentions, former, strict=True):
            attention.set_processor(processor)


def _height(pixels: int, latents_NCHW: Tensor) -> int:
    """How high a map of so many pixels is, in the proportions of the latents."""
    high, wide = latents_NCHW.shape[-2:]
    height = round((pixels * high / wide) ** 0.5)
    assert pixels % height == 0, f"{pixels} pixels of attention for latents of {high} x {wide}"
    return height
