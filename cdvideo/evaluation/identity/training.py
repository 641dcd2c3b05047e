"""Train the identity encoder, measure it on individuals it has not seen, and write it with its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdvideo.evaluation.identity.card import write_card
from cdvideo.evaluation.identity.config import IdentityConfig
from cdvideo.evaluation.identity.data import load_views, render_heldout
from cdvideo.evaluation.identity.model import IdentityNet, load_identity, save_identity
from cdvideo.evaluation.identity.verification import Sightings, verify
from cdvideo.evaluation.judge.augmentation import degrade, move, round_trip, shift_colours
from cdvideo.evaluation.judge.model import load_judge
from cdvideo.evaluation.judge.training import LATENT_NOISE, Arrow, load_vae, vae_arrows
from cdvideo.runs import atomic_path
from cdvideo.world.muon import make_optimizers
from cdvideo.world.scenes import SUBJECTS
from cdvideo.world.sprites import load_sprites
from cdvideo.world.training import Average, Limits, Stage, autocast, to_pixels

VIEWS = 2  # of each individual in a batch


def train_identity(config: IdentityConfig, sprites: Path, device: torch.device, limits: Limits) -> dict[str, Any]:
    """Trains on the rendered views in config.cache; writes the encoder, its facts and its card into config.out.

    Returns:
        The recorded facts, verification on unseen individuals included.
    """
    torch.manual_seed(config.seed)
    loop, generator = config.loop, torch.Generator(device).manual_seed(config.seed)
    net = IdentityNet(widths=config.widths, blocks=config.blocks, width=config.width, side=config.side).to(device)
    taken = 0 if config.start is None else net.start_from(load_judge(config.start, device=device))
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(net, decay=loop.ema)
    optimizers = make_optimizers(net, lr=loop.lr)
    models = {"net": net, "average": average.model}
    stage = Stage(config.out, loop=loop, models=models, optimizers=optimizers, generator=generator, limits=limits)
    vae = load_vae(config.vae, device)
    images_NVHWC, subjects = load_views(config.cache / "train")
    subject_P = torch.tensor([SUBJECTS.index(subject) for subject in subjects[::2]], device=device)

    for step in stage.steps():
        members_B, views_B = draw_views(subject_P, images_NVHWC.shape[1], config, generator)
        images_BHWC = torch.from_numpy(images_NVHWC[members_B.cpu().numpy(), views_B.cpu().numpy()])
        pixels_BCHW = move(to_pixels(images_BHWC.to(device)), generator)
        pixels_BCHW = shift_colours(pixels_BCHW, generator, strength=config.colour)
        if vae is not None:
            share = int(config.vae_share * len(pixels_BCHW))
            encode, decode = vae_arrows(vae, device, config.dtype)
            again_BCHW = round_trip(pixels_BCHW[:share], encode, decode, noise=LATENT_NOISE, generator=generator)
            pixels_BCHW = torch.cat([again_BCHW, pixels_BCHW[share:]])
        pixels_BCHW = degrade(pixels_BCHW, generator)
        with autocast(device, config.dtype):
            features_BD = net(pixels_BCHW.contiguous(memory_format=torch.channels_last))
        loss = supervised_contrastive(features_BD, members_B, temperature=config.temperature)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(step)
        torch._foreach_copy_(list(average.model.buffers()), list(net.buffers()))  # batch norms' statistics
        stage.log(loss=loss.detach(), found=share_found(features_BD.detach(), members_B))

    return finish(config, average.model.eval(), sprites, taken, stage, device)


def draw_views(
    subject_P: Tensor, views: int, config: IdentityConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two views of both individuals of random pairs of a few classes: members_B and views_B.

    Args:
        subject_P: class index of each pair; pair p holds the individuals 2 p and 2 p + 1.
        views: how many there are of each individual.
    """
    device, pairs = subject_P.device, config.loop.batch // (2 * VIEWS)
    present = subject_P.unique()
    chosen = present[torch.randperm(len(present), generator=generator, device=device)[: config.classes]]
    eligible = torch.isin(subject_P, chosen).nonzero().flatten()
    picks = eligible[torch.randint(len(eligible), (pairs,), generator=generator, device=device)]
    members_M = torch.cat([2 * picks, 2 * picks + 1])
    order = torch.rand(len(members_M), views, generator=generator, device=device).argsort(dim=1)
    return members_M.repeat(VIEWS), order[:, :VIEWS].T.flatten()


def supervised_contrastive(features_BD: Tensor, labels_B: Tensor, *, temperature: float) -> Tensor:
    """Mean over pictures of -1/|P| sum over P of log softmax(cosine / temperature), P: others of the same label.

    Supervised contrastive loss, L_out (arXiv 2004.11362, eq. 2).

    Args:
        features_BD: unit features; every label occurs twice at least.
    """
    own_BB = torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
    logits_BB = (features_BD @ features_BD.T / temperature).masked_fill(own_BB, -torch.inf)
    positive_BB = (labels_B[:, None] == labels_B) & ~own_BB
    log_share_BB = logits_BB.log_softmax(dim=1).masked_fill(~positive_BB, 0)
    return -(log_share_BB.sum(dim=1) / positive_BB.sum(dim=1)).mean()


def share_found(features_BD: Tensor, labels_B: Tensor) -> Tensor:
    """How many pictures have one of the same label nearest to them."""
    cosine_BB = (features_BD @ features_BD.T).fill_diagonal_(-2)
    return (labels_B[cosine_BB.argmax(dim=1)] == labels_B).float().mean()


def finish(
    config: IdentityConfig, net: IdentityNet, sprites: Path, taken: int, stage: Stage, device: torch.device
) -> dict[str, Any]:
    """Writes the weights, measures what was written, and records it."""
    file = save_identity(net, config.out)
    shipped = load_identity(config.out, device=device)
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "bytes": file.stat().st_size,
        "from_judge": taken,
        "tensors": len(shipped.stages.state_dict()),
        "seed": config.seed,
        "individuals": 2 * config.pairs,
        "views": config.views,
        "dtype": config.dtype,
        **stage.facts(),
        "vae_in_training": config.vae is not None,
    }
    facts |= measure(shipped, config, sprites, device)
    with atomic_path(config.out / "training.json") as part:
        part.write_text(json.dumps(facts, indent=2) + "\n")
    write_card(config.out)
    return facts


def measure(net: IdentityNet, config: IdentityConfig, sprites: Path, device: torch.device) -> dict[str, Any]:
    """Verification on individuals never trained on, and on those held out for concepts.

    "heldout" compares pictures of the ten held out with each other, with their look-alikes' and with all unseen
    individuals'; "heldout_round_trip" the same with the pictures of the ten through the VAE, as drawn pictures are.
    """
    heldout = render_heldout(load_sprites(sprites), views=config.heldout_views, seed=config.seed)
    ten = see(net, *heldout, device)
    unseen = see(net, *load_views(config.cache / "check"), device, first=len(heldout[0]))
    everyone = Sightings(
        np.concatenate([ten.features_MD, unseen.features_MD]),
        np.concatenate([ten.member_M, unseen.member_M]),
        np.concatenate([ten.view_M, unseen.view_M]),
        np.concatenate([ten.subject_M, unseen.subject_M]),
    )
    facts = {"unseen": verify(unseen, unseen), "heldout": verify(ten.of(ten.member_M % 2 == 0), everyone)}
    vae = load_vae(config.vae, device)
    if vae is not None:
        encode, decode = vae_arrows(vae, device, "fp32")
        again = see(net, *heldout, device, through=lambda pixels_BCHW: decode(encode(pixels_BCHW)).clamp(-1, 1))
        facts["heldout_round_trip"] = verify(again.of(again.member_M % 2 == 0), everyone)
    return facts


@torch.no_grad()
def see(
    net: IdentityNet,
    images_NVHWC: NDArray[np.uint8],
    subjects: list[str],
    device: torch.device,
    *,
    first: int = 0,
    through: Arrow | None = None,
) -> Sightings:
    """The features of every view of N individuals, which are numbered from `first`, an even number."""
    count, views, *picture = images_NVHWC.shape
    features = []
    for part in np.array_split(images_NVHWC.reshape(count * views, *picture), -(-count * views // 64)):
        pixels_BCHW = to_pixels(torch.from_numpy(part.copy()).to(device))
        features.append(net(pixels_BCHW if through is None else through(pixels_BCHW)).cpu().numpy())
    member_M, view_M = np.divmod(np.arange(count * views), views)
    return Sightings(np.concatenate(features), member_M + first, view_M, np.repeat(np.array(subjects), views))
