"""Concept training: the one loop, from cached latents to a concept file's content.

L = L_denoise + weight * L_SPL + what else is to preserve the base, minimised over the adapter's weights and the tokens'
own rows (ClassDiffusion, arXiv 2405.17532, on top of Custom Diffusion, arXiv 2212.04488, or of another adapter).
Nothing else is ever written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cdvideo.base.loader import Base
from cdvideo.base.prompts import encode_prompts, text_widths
from cdvideo.base.schedule import add_noise, make_scheduler, training_target
from cdvideo.concept.adapters import Adapter, make_adapter, squared_change
from cdvideo.concept.concept import Concept, ConceptMetadata, public_base_name
from cdvideo.concept.config import CONCEPT_FILE, ConceptConfig, DataConfig
from cdvideo.concept.data import LatentCache, cache_latents, draw_mixed, joined, picture_side
from cdvideo.concept.drift import DriftMeter
from cdvideo.concept.file import frozen_copy, png_preview, save_concept
from cdvideo.concept.kv import embedding_norms, initial_rows
from cdvideo.concept.losses import background_loss, denoising_loss, output_preservation_loss
from cdvideo.concept.masks import MASKS_FILE, mask_sheet
from cdvideo.concept.optimizer import check_optimizer, checkpointing, make_optimizer
from cdvideo.concept.phrases import fill
from cdvideo.concept.semantic import SemanticPreservation
from cdvideo.concept.state import STATE_FILE, TrainState, deferred_interrupt
from cdvideo.errors import UserError
from cdvideo.media.images import Picture, contact_sheet
from cdvideo.runs import Run, atomic_path

logger = logging.getLogger(__name__)

Sampler: TypeAlias = Callable[[Concept, Sequence[str]], Tensor]  # concept, prompts -> pixels_BCHW in [-1, 1]
Pictures: TypeAlias = Mapping[str, Sequence[Picture]]
SNAPSHOT_FILE = "concept_{:05d}.safetensors"


def train_concept(
    base: Base,
    pictures: Sequence[Picture] | Pictures,
    config: ConceptConfig,
    run: Run,
    *,
    prior: Pictures | None = None,
    sample: Sampler | None = None,
    snapshots: Sequence[int] = (),
    resume: bool = False,
    quiet: bool = False,
) -> Concept:
    """Learns a concept from its pictures, and writes its file, metrics, drift, masks and contact sheets into the run.

    Args:
        base: Frozen; bit-equal afterwards.
        pictures: Of the one thing; of several things, by their tokens.
        run: Its folder; while training it also holds the resumable state.
        prior: Pictures that the base draws of each class, by its class word, where `preserve.prior_weight` asks for
            them (sampling/prior.py makes them).
        sample: Draws pictures of a concept for the contact sheets, from the same noise each time; None draws none.
        snapshots: Steps after which the concept, as it stands, is also kept as concept_<step>.safetensors.
        resume: Continue from the run's state, where there is one.
        quiet: No progress bar.

    Returns:
        The concept, exactly as its file holds it.

    Raises:
        UserError: When the loss is no longer finite, the state does not belong to these settings and pictures, the base
            can not draw at the resolution, or the optimizer is not to be had here.
        KeyboardInterrupt: After Ctrl-C, once the step has ended and the state is written.
    """
    assert not any(p.requires_grad for m in base.modules for p in m.parameters())
    pictures = pictures if isinstance(pictures, Mapping) else {config.token: pictures}
    optim, preserve, loss_weights = config.optim, config.preserve, config.loss_weights
    check_optimizer(optim, base.device)
    adapter = make_adapter(base.unet, config.adapter, seed=config.seed)
    concept = new_concept(base, config, adapter)
    scheduler = make_scheduler(base.scheduler_config)
    caches = _cache_subjects(base, pictures, config, quiet=quiet)
    prior_caches = _cache_prior(base, prior or {}, config, quiet=quiet) if preserve.prior_weight else []
    semantic_preservation = SemanticPreservation(base, config)
    plain = slice(None, None, config.data.variants)  # each picture as it is
    latents = {token: cache.latents_NCHW[plain] for token, cache in zip(config.class_words, caches, strict=True)}
    drift = DriftMeter(base, config.class_words, latents, steps=config.steps)

    weights, rows = [*adapter.weights.values()], [*concept.tokens.values()] if config.adapter.train_rows else []
    optimizer = make_optimizer(weights, rows, optim)
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
    settings = _fixed_settings(base, pictures, config)
    state = TrainState({**adapter.weights, **concept.tokens}, optimizer, scaler, settings)
    state_file = run.folder / STATE_FILE
    start = _resume(state, drift, run, config.steps) if resume else 0
    if config.data.focus == "subject":
        _show_masks(pictures, caches, config, run, quiet=quiet)

    def predict(noisy_BCHW: Tensor, timesteps_B: Tensor, prompts: Sequence[str], sizes_B6: Tensor) -> Tensor:
        text = encode_prompts(base, prompts, rows=concept.tokens)
        added = text.added(sizes_B6)
        return base.unet(noisy_BCHW.to(base.dtype), timesteps_B, text.hidden_BLD, added_cond_kwargs=added).sample

    bar = tqdm(desc=config.phrase, unit="step", total=config.steps, initial=start, disable=quiet)
    with base.in_use, checkpointing(base.unet, optim.gradient_checkpointing), deferred_interrupt() as interrupted, bar:
        if start == 0:
            run.log({"step": 0, **_drift_metrics(base, adapter, concept, drift, step=0)})
            _draw(sample, concept, config, run, step=0)
        for step in range(start + 1, config.steps + 1):
            generator = _step_generator(config.seed, step)
            batch, size = draw_mixed(caches, optim.batch_size, generator), optim.batch_size
            if prior_caches:  # the second half
                batch = joined([batch, draw_mixed(prior_caches, size, generator)])
            noise_BCHW = torch.randn(batch.latents_BCHW.shape, generator=generator).to(base.device)
            timesteps_B = torch.randint(
                scheduler.config["num_train_timesteps"], (len(batch.prompts),), generator=generator
            ).to(base.device)
            noisy_BCHW = add_noise(scheduler, batch.latents_BCHW, noise_BCHW, timesteps_B)
            target_BCHW = training_target(scheduler, batch.latents_BCHW, noise_BCHW, timesteps_B)
            of_class = noisy_BCHW[:size], timesteps_B[:size], batch.class_prompts[:size], batch.sizes_B6[:size]
            if preserve.output_weight or preserve.background_weight:
                with torch.no_grad():
                    base_prediction_BCHW = predict(*of_class)

            losses = {}
            if preserve.anchor_weight:  # while the UNet has its own weights
                losses["anchor"] = squared_change(base.unet, concept)
            with adapter.attached():
                prediction_BCHW = predict(noisy_BCHW, timesteps_B, batch.prompts, batch.sizes_B6)
                masks_B1HW = batch.masks_B1HW
                losses["denoise"] = denoising_loss(prediction_BCHW[:size], target_BCHW[:size], masks_B1HW[:size])
                if config.semantic.weight:
                    losses["semantic"] = semantic_preservation(concept.tokens, generator)
                if preserve.prior_weight:
                    losses["prior"] = denoising_loss(prediction_BCHW[size:], target_BCHW[size:], masks_B1HW[size:])
                if preserve.output_weight:
                    losses["output"] = output_preservation_loss(predict(*of_class), base_prediction_BCHW)
                if preserve.background_weight:
                    around_B1HW = batch.around_B1HW[:size]
                    losses["background"] = background_loss(prediction_BCHW[:size], base_prediction_BCHW, around_B1HW)
                loss = torch.stack([loss_weights[name] * value for name, value in losses.items()]).sum()
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_([*weights, *rows], optim.grad_clip)
            # fp16's scaler skips steps with infinite gradients and lowers its scale; else they are a divergence.
            if not loss.isfinite() or not (norm.isfinite() or scaler.is_enabled()):
                raise _diverged(step, losses, config)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_factor(step, steps=config.steps, decay=optim.decay)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if preserve.keep_norm:
                _keep_norm(base, concept)

            metrics = {f"loss_{name}": value.item() for name, value in losses.items()}
            metrics |= _drift_metrics(base, adapter, concept, drift, step=step)
            run.log({"step": step, **metrics})
            bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items() if name.startswith("loss")})
            bar.update()
            if step in snapshots:
                save_concept(frozen_copy(concept), run.folder / SNAPSHOT_FILE.format(step))
            if step % config.checkpoint_every == 0 or interrupted.is_set():
                drift.save(run.folder)
                state.save(state_file, step)
            if interrupted.is_set():
                raise KeyboardInterrupt
            if config.sample.every and step % config.sample.every == 0 and step < config.steps:
                _draw(sample, concept, config, run, step=step)
    if start == config.steps and start not in drift.record.text_steps:  # resumed only to end where it stood
        run.log({"step": config.steps, **_drift_metrics(base, adapter, concept, drift, step=config.steps)})
    drift.save(run.folder)
    return _finish(sample, concept, config, run)


def _step_generator(seed: int, step: int) -> torch.Generator:
    """Every step has its own, so that runs of one seed see the same pictures, whatever their losses draw besides."""
    return torch.Generator().manual_seed((1_000_003 * seed + step) % 2**32)


def rate_factor(step: int, *, steps: int, decay: float) -> float:
    """What the learning rates are multiplied by at a step in [1, steps]: 1, then a linear fall over the last part."""
    return min(1.0, (steps - step + 1) / (decay * steps)) if decay else 1.0


def new_concept(base: Base, config: ConceptConfig, adapter: Adapter) -> Concept:
    """The concept before its first step: trainable, and without any effect on the UNet."""
    starts = {token: config.adapter.initialiser or class_word for token, class_word in config.class_words.items()}
    rows = {token: initial_rows(base, words, config.adapter.num_rows) for token, words in starts.items()}
    metadata = ConceptMetadata(
        class_words=config.class_words,
        initialiser=starts[config.token],
        base_name=public_base_name(base.name),
        base_hash=base.hash,
        resolution=picture_side(base, config.resolution),
        prediction_type=base.scheduler_config["prediction_type"],
        steps=config.steps,
        lr=config.optim.lr,
        token_lr=config.optim.token_lr,
        seed=config.seed,
        loss_weights=config.loss_weights,
        sample_prompt=fill(config.sample.prompts[0], config.phrase),
        adapter=config.adapter.kind,
        adapter_settings=config.adapter.settings,
    )
    return Concept(tokens=rows, weights=adapter.weights, metadata=metadata)


def _cache_subjects(base: Base, pictures: Pictures, config: ConceptConfig, *, quiet: bool) -> list[LatentCache]:
    assert pictures.keys() == config.phrases.keys(), f"pictures of {list(pictures)}, tokens {list(config.phrases)}"
    return [
        cache_latents(
            base,
            pictures[token],
            config.data,
            phrase=phrase,
            class_phrase=config.class_words[token],
            seed=config.seed,
            resolution=config.resolution,
            at_once=config.optim.batch_size,
            quiet=quiet,
        )
        for token, phrase in config.phrases.items()
    ]


def _show_masks(
    pictures: Pictures, caches: Sequence[LatentCache], config: ConceptConfig, run: Run, *, quiet: bool
) -> None:
    """Draws masks.png, each picture beside what will be learned of it, and tells the shares."""
    masks_N1HW = torch.cat([cache.masks_N1HW[:: config.data.variants] for cache in caches])  # of pictures as they are
    shown = [picture for token in config.phrases for picture in pictures[token]]
    title = f"what is learned of each picture of {', '.join(config.phrases.values())}"
    sheet = mask_sheet(shown, masks_N1HW, title=title)
    with atomic_path(run.folder / MASKS_FILE) as part:
        sheet.save(part)
    shares = ", ".join(f"{p.name} {mask.mean():.0%}" for p, mask in zip(shown, masks_N1HW, strict=True))
    report = logger.info if quiet else tqdm.write
    report(f"learned of each picture, see {run.folder / MASKS_FILE}: {shares}")


def _cache_prior(base: Base, prior: Pictures, config: ConceptConfig, *, quiet: bool) -> list[LatentCache]:
    """The base's own pictures of each class, as they are and whole: what they teach the base, it knows already.

    Whatever `data.focus` says of the concept's pictures: DreamBooth (arXiv 2208.12242, eq. 2) and Custom Diffusion
    preserve all that the base draws of the class, what stands around it too.
    """
    plain = DataConfig(style=config.data.style, variants=1, focus="picture")
    missing = set(config.class_words.values()) - prior.keys()
    if missing:
        raise UserError(
            f"preserve.prior_weight={config.preserve.prior_weight:g} without pictures of {', '.join(sorted(missing))}",
            allowed="prior: pictures that the base drew of each class, by class word",
            do="draw them with cdvideo.sampling.prior.prior_pictures, or set preserve.prior_weight=0",
        )
    return [
        cache_latents(
            base,
            prior[word],
            plain,
            phrase=word,
            class_phrase=word,
            seed=config.seed,
            resolution=config.resolution,
            quiet=quiet,
        )
        for word in dict.fromkeys(config.class_words.values())
    ]


@torch.no_grad()
def _keep_norm(base: Base, concept: Concept) -> None:
    """Brings every row back to the norm of its class word's embedding: drift that grows by norm alone is no meaning.

    CoRe (arXiv 2408.15914) rescales the concept's embedding so; DTI (arXiv 2512.13672) learns its direction alone.
    """
    for token, rows_KD in concept.tokens.items():
        norms = embedding_norms(base, concept.metadata.class_words[token])
        for part_KD, norm in zip(rows_KD.split(text_widths(base), dim=1), norms, strict=True):
            part_KD *= norm / part_KD.norm(dim=-1, keepdim=True)


@torch.no_grad()
def _drift_metrics(base: Base, adapter: Adapter, concept: Concept, drift: DriftMeter, *, step: int) -> dict[str, float]:
    """At steps to measure at: where the concept stands, and how far the UNet's weights have moved from the base's."""
    if not drift.due(step):
        return {}
    with adapter.attached():  # so that no second set of weights, with a LoRA in them, is made for it
        measured = drift.measure(dataclasses.replace(concept, weights={}), step)
    return {**measured, "weight_change": squared_change(base.unet, concept).sqrt().item()}


def _draw(sample: Sampler | None, concept: Concept, config: ConceptConfig, run: Run, *, step: int) -> Tensor | None:
    """Writes the contact sheet of a step; returns its pictures, as frames_BHWC in [0, 255]."""
    if sample is None or config.sample.every == 0:
        return None
    prompts = [fill(prompt, phrase) for phrase in config.phrases.values() for prompt in config.sample.prompts]
    pixels_BCHW = sample(frozen_copy(concept), prompts)
    frames_BHWC = ((pixels_BCHW.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu()
    sheet = contact_sheet(frames_BHWC.numpy(), prompts, title=f"{', '.join(config.phrases.values())}, step {step}")
    with atomic_path(run.folder / f"samples_{step:05d}.png") as part:
        sheet.save(part)
    return frames_BHWC


def _finish(sample: Sampler | None, concept: Concept, config: ConceptConfig, run: Run) -> Concept:
    """The last contact sheet and the concept file, both of the concept as it is stored; the state goes."""
    frames_BHWC = _draw(sample, concept, config, run, step=config.steps)
    preview = "" if frames_BHWC is None else png_preview(Image.fromarray(frames_BHWC[0].numpy()))
    finished = frozen_copy(concept, preview=preview)
    save_concept(finished, run.folder / CONCEPT_FILE)
    (run.folder / STATE_FILE).unlink(missing_ok=True)
    return finished


def _resume(state: TrainState, drift: DriftMeter, run: Run, steps: int) -> int:
    """Loads the run's state and drops what was logged and measured after it; returns the number of steps done."""
    if (run.folder / CONCEPT_FILE).exists():
        raise UserError(
            f"{run.folder} has ended, there is nothing to resume",
            allowed="a run that was interrupted",
            do="name an interrupted run's folder with --out, or start a new run without --resume",
        )
    path, metrics = run.folder / STATE_FILE, run.folder / "metrics.jsonl"
    start = state.load(path) if path.exists() else 0  # interrupted before its first state: from the beginning
    if start > steps:
        raise UserError(f"steps={steps}, {start} are done", allowed=f"{start} or more", do="raise --steps")
    if start:
        drift.restore(run.folder, start)
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith("}\n")]  # the last may be torn
    run.write_text(metrics.name, "".join(line for line in whole if 0 < start >= json.loads(line)["step"]))
    return start


def _fixed_settings(base: Base, pictures: Pictures, config: ConceptConfig) -> dict[str, str]:
    """What must be equal for a run to be continued exactly, as texts by name."""
    settings = dataclasses.asdict(config)
    for free in ("images", "out", "device", "dtype", "base", "steps", "checkpoint_every", "sample"):
        del settings[free]
    for other in settings["others"]:
        del other["images"]  # told apart by what they hold, below
    digest = hashlib.sha256()
    for picture in (picture for of_subject in pictures.values() for picture in of_subject):
        digest.update(picture.image.tobytes())
    found = {"dtype": base.dtype, "weights of the base": base.hash, "pictures": digest.hexdigest()[:16]}
    return {name: str(value) for name, value in {**settings, **found}.items()}


def _diverged(step: int, losses: Mapping[str, Tensor], config: ConceptConfig) -> UserError:
    values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
    return UserError(
        f"training diverged at step {step}: losses {values}; lr {config.optim.lr:g}, token_lr "
        f"{config.optim.token_lr:g}; no concept was written",
        allowed="finite losses and gradients",
        do="lower optim.lr and optim.token_lr, or compute with --dtype fp32",
    )
