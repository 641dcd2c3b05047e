"""The pieces of a study: concepts, pictures, films and scores, each made once and kept by a hash of its settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cdvideo.base.loader import Base, load_base
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import CONCEPT_FILE, ConceptConfig
from cdvideo.concept.file import load_concept
from cdvideo.concept.trainer import train_concept
from cdvideo.config import to_yaml
from cdvideo.device import pick_dtype, use_device
from cdvideo.errors import UserError
from cdvideo.evaluation.bench import fit
from cdvideo.evaluation.drawing import Pictures
from cdvideo.evaluation.encoders import BlipScorer, ClipEncoder, DinoEncoder, IdentityEncoder, ImageEncoder, TextScorer
from cdvideo.evaluation.identity.model import IDENTITY, WEIGHTS_FILE
from cdvideo.evaluation.judge.model import JUDGE, load_judge
from cdvideo.evaluation.study.config import TOKEN, MethodConfig, StudyConfig
from cdvideo.evaluation.study.prompts import StudyPrompt, study_prompts
from cdvideo.evaluation.study.scores import Instruments, Scores, score_films, score_pictures
from cdvideo.media.images import Picture
from cdvideo.motion.files import load_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.runs import atomic_path, open_run
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.prior import prior_pictures
from cdvideo.sampling.video import sample_video, to_uint8
from cdvideo.world.samples import heldout_individual, sample_scenes
from cdvideo.world.scenes import Scene, compose, render_clip, render_scene
from cdvideo.world.sprites import Sprites, load_sprites

FREE = ("images", "out", "device", "dtype", "base", "checkpoint_every", "sample")  # change nothing that is learned
ONE_PLACE = "meadow"


@dataclass(frozen=True)
class StudyBench:
    """What the study works with. `trainee` and `base` are the same weights, in fp32 and in the dtype of sampling."""

    config: StudyConfig
    trainee: Base
    base: Base
    motion: MotionModules | None
    instruments: Instruments
    sprites: Sprites
    pictures: Mapping[str, Pictures]  # each concept's own: images_RHWC


@dataclass(frozen=True)
class Piece:
    """One method on one concept: a training seed, and the step it is measured at (None is the last)."""

    method: MethodConfig
    concept: str
    seed: int
    step: int | None = None
    film: bool = False

    @property
    def title(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"{self.method.name}{at}, {self.concept}{', films' if self.film else ''}"


def open_study(config: StudyConfig) -> StudyBench:
    """Loads all that is needed, so that what is missing is told before anything is trained."""
    device = use_device(config.device)
    instruments = load_instruments(config, device)
    sprites = load_sprites(config.sprites)
    base = load_base(config.base, device=device, dtype=pick_dtype(config.dtype, device))
    motion = None
    if config.films.methods:
        if not (base.path / "motion").is_dir():
            raise UserError(
                f"base {config.base!r} has no motion modules of its own",
                allowed="a base with a folder `motion`",
                do="train them, or leave films out with films.methods=[]",
            )
        motion = load_motion(base.path / "motion", device=device, dtype=base.dtype)
    trainee = load_base(config.base, device=device)
    pictures = {concept: concept_images(concept, sprites, config.pictures_in) for concept in config.concepts}
    return StudyBench(config, trainee, base, motion, instruments, sprites, pictures)


def load_instruments(config: StudyConfig, device: torch.device) -> Instruments:
    """The judge, the identity encoder where there is one, and the models of transformers that the user has."""
    likeness: dict[str, ImageEncoder] = {}
    agreement: dict[str, TextScorer] = {}
    if config.identity is not None or (IDENTITY / WEIGHTS_FILE).is_file():
        likeness["identity"] = IdentityEncoder(config.identity or IDENTITY, device=device)
    if config.clip is not None:
        clip = ClipEncoder(config.clip, device=device)
        likeness["CLIP-I"], agreement["CLIP-T"] = clip, clip
    if config.dino is not None:
        likeness["DINO-I"] = DinoEncoder(config.dino, device=device)
    if config.blip is not None:
        agreement["BLIP-T"] = BlipScorer(config.blip, device=device)
    return Instruments(load_judge(config.judge or JUDGE, device=device), likeness, agreement)


def pieces(config: StudyConfig) -> list[Piece]:
    """All of the study, concept by concept, so that what is done first can already be compared."""
    found = []
    for concept in config.concepts:
        for method in config.methods:
            for seed in config.training_seeds if method.source == "trained" else config.training_seeds[:1]:
                steps = (*method.checkpoints, None)
                found += [Piece(method, concept, seed, step) for step in steps]
                if method.name in config.films.methods:
                    found.append(Piece(method, concept, seed, film=True))
    return found


def concept_images(concept: str, sprites: Sprites, where: str) -> Pictures:
    """The five pictures that a concept is learned from: images_RHWC."""
    scenes = sample_scenes(concept)
    if where == "one_place":
        rng = np.random.default_rng(7)
        place = compose(rng, heldout_individual(concept), thing="", setting=ONE_PLACE)
        kept = ("setting", "seed", "backdrop_colour", "vehicle_rgb")
        same = {name: getattr(place, name) for name in kept}
        scenes = [dataclasses.replace(scene, **same) for scene in scenes]
    return np.stack([render_scene(scene, sprites)[0] for scene in scenes])


def asked(config: StudyConfig, piece: Piece) -> tuple[list[StudyPrompt], list[int]]:
    """The prompts of all pictures (or films) of a piece, and the seed of each one's noise: equal for all methods."""
    prompts = study_prompts(piece.concept, config.prompts, seed=config.seed)
    order = list(range(len(prompts)))
    if piece.film:
        order = [i for i in order if i % config.prompts < config.films.prompts]
    count = config.films.seeds if piece.film else config.seeds
    return [prompts[i] for i in order for _ in range(count)], [1000 * s + i for i in order for s in range(count)]


def train(bench: StudyBench, piece: Piece) -> Path:
    """The folder of a piece's training, which holds its concept file; trained where it is not there yet."""
    config = bench.config.concept_config(piece.method, piece.concept, piece.seed)
    images_RHWC = bench.pictures[piece.concept]
    pictures = [Picture(name=f"{i + 1}.png", image=Image.fromarray(image)) for i, image in enumerate(images_RHWC)]
    folder = bench.config.cache / "concepts" / _name(piece.concept, _training_facts(bench, piece, config, images_RHWC))
    if (folder / CONCEPT_FILE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    prior = None
    if config.preserve.prior_weight:
        prior = prior_pictures(bench.trainee, config, bench.config.cache / "prior", quiet=True)
    options: dict[str, Any] = {"prior": prior, "snapshots": piece.method.checkpoints, "resume": True, "quiet": True}
    with open_run(folder) as run:
        run.write_text("config.yaml", to_yaml(config))
        train_concept(bench.trainee, pictures, config, run, **options)
        run.write_text("made.json", json.dumps(_made(bench.trainee, start)))
    return folder


def draw(bench: StudyBench, piece: Piece) -> Path:
    """The file of a piece's pictures, images_BHWC in the order of `asked`; drawn where it is not there yet."""
    config, place = bench.config, Path("films" if piece.film else "pictures")
    prompts, seeds = asked(config, piece)
    subject = prompts[0].subject
    facts: dict[str, Any] = {"prompts": [prompt.template for prompt in prompts], "seeds": seeds}
    if piece.film:
        facts |= {"frames": config.films.frames}
    if piece.method.source == "renders":
        facts |= {"renders": piece.concept, "side": bench.base.resolution}
        return keep(bench, place / piece.concept, facts, lambda: _render(bench, piece, prompts, seeds))
    facts |= {"subject": subject} | sampling_facts(bench, piece)
    phrase = f"{TOKEN} {subject}" if piece.method.source == "trained" else subject

    def sample() -> Pictures:
        texts = [prompt.text(phrase) for prompt in prompts]
        return (_film if piece.film else _draw_stills)(bench, texts, seeds, learned(bench, piece))

    return keep(bench, place / (subject if piece.method.source == "base" else piece.concept), facts, sample)


def learned(bench: StudyBench, piece: Piece) -> Concept | None:
    """The concept as it was at the piece's step; None for the base alone."""
    if piece.method.source != "trained":
        return None
    file = CONCEPT_FILE if piece.step is None else f"concept_{piece.step:05d}.safetensors"
    return load_concept(train(bench, piece) / file, base=bench.base)


def sampling_facts(bench: StudyBench, piece: Piece) -> dict[str, Any]:
    """What determines a picture beside its prompt and its seed."""
    facts: dict[str, Any] = {"steps": bench.config.steps, "guidance": bench.config.guidance}
    facts |= {"base": bench.base.hash, "dtype": str(bench.base.dtype)}
    if piece.method.source == "trained":
        facts |= {"concept": train(bench, piece).name, "step": piece.step}
    return facts


def score(bench: StudyBench, piece: Piece) -> tuple[Path, Scores]:
    """The file of a piece's pictures, and their scores; measured where they are not there yet."""
    file = draw(bench, piece)
    references_RHWC = bench.pictures[piece.concept]
    prompts, _ = asked(bench.config, piece)
    facts: dict[str, Any] = {"pictures": file.stem, "asked": [str(prompt) for prompt in prompts]}
    facts |= {"instruments": bench.instruments.names, "references": _digest(references_RHWC)}
    path = bench.config.cache / "scores" / f"{_name(piece.concept, facts)}.json"
    if not path.exists():
        measure = score_films if piece.film else score_pictures
        scores = measure(np.load(file), prompts, references_RHWC, bench.instruments)
        with atomic_path(path) as part:
            part.write_text(json.dumps(scores))
    return file, json.loads(path.read_text())


def _draw_stills(bench: StudyBench, texts: Sequence[str], seeds: Sequence[int], concept: Concept | None) -> Pictures:
    batch = bench.config.batch or (16 if bench.base.device.type == "cpu" else 150)
    options: dict[str, Any] = {"steps": bench.config.steps, "guidance": bench.config.guidance, "concept": concept}
    parts = [slice(start, start + batch) for start in range(0, len(texts), batch)]
    return np.concatenate([
        to_uint8(sample_images(bench.base, texts[part], seeds=seeds[part], **options)) for part in parts
    ])  # fmt: skip


def _film(bench: StudyBench, texts: Sequence[str], seeds: Sequence[int], concept: Concept | None) -> Pictures:
    assert bench.motion is not None, "films were not asked for"
    options: dict[str, Any] = {"steps": bench.config.steps, "guidance": bench.config.guidance, "concept": concept}
    options |= {"frames": bench.config.films.frames}
    return np.stack([
        sample_video(bench.base, bench.motion, text, seed=seed, **options)
        for text, seed in zip(texts, seeds, strict=True)
    ])  # fmt: skip


def _render(bench: StudyBench, piece: Piece, prompts: Sequence[StudyPrompt], seeds: Sequence[int]) -> Pictures:
    """The individual itself, drawn by the world as the prompts ask; what they leave open is drawn at random."""
    side = bench.base.resolution
    if not piece.film:
        return np.stack([
            fit(render_scene(_scene(piece, prompt, seed), bench.sprites)[0], side)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ])  # fmt: skip
    clips = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        frames = render_clip(_scene(piece, prompt, seed), bench.sprites, num_frames=bench.config.films.frames)
        clips.append(np.stack([fit(frame, side) for frame in frames]))
    return np.stack(clips)


def _scene(piece: Piece, prompt: StudyPrompt, seed: int) -> Scene:
    rng = np.random.default_rng([seed, 13])
    return compose(rng, heldout_individual(piece.concept), thing=prompt.thing or "", setting=prompt.setting or "plain")


def _training_facts(bench: StudyBench, piece: Piece, config: ConceptConfig, images_RHWC: Pictures) -> dict[str, Any]:
    """All that determines a training."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    found = {"pictures": _digest(images_RHWC), "weights of the base": bench.trainee.hash}
    return settings | found | {"checkpoints": piece.method.checkpoints}


def keep(bench: StudyBench, path: Path, facts: Mapping[str, Any], make: Callable[[], Pictures]) -> Path:
    """The file of pictures with these facts, made where it is missing, with the facts beside it.

    Args:
        path: in the cache, as far as it is for people to read; the facts' hash is added to its name.
    """
    path = bench.config.cache / path.parent / f"{_name(path.name, facts)}.npy"
    if not path.exists():
        start = time.perf_counter()
        pictures = make()
        with atomic_path(path.with_suffix(".json")) as part:
            part.write_text(json.dumps({**facts, "made": _made(bench.base, start)}, default=str))
        with atomic_path(path) as part:
            np.save(part, pictures)
    return path


def _name(concept: str, facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True, default=str).encode()).hexdigest()[:12]
    return f"{concept.replace(' ', '-')}-{digest}"


def _digest(images_RHWC: Pictures) -> str:
    return hashlib.sha256(images_RHWC.tobytes()).hexdigest()[:16]


def _made(base: Base, start: float) -> dict[str, Any]:
    """When, in how many seconds, and by what something was made."""
    name = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else platform.machine()
    seconds = round(time.perf_counter() - start, 1)
    return {"date": time.strftime("%Y-%m-%d"), "seconds": seconds, "device": name, "torch": torch.__version__}
