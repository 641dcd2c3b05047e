"""Settings of the study that compares ways to learn a concept (imports no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cdvideo.concept.config import ConceptConfig
from cdvideo.config import check, load_config
from cdvideo.world.heldout import HELDOUT_INDIVIDUALS

TOKEN = "sks"
# As in the papers: K and V, and the whole picture.
PUBLISHED = ("adapter.kind=kv", "optim.lr=3e-4", "data.focus=picture", "preserve.background_weight=0")
# What the study itself says of every training.
TAKEN = ("images", "token", "class_word", "base", "seed", "out", "device", "dtype", "sample", "others")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """One row of the study."""

    name: str
    source: Literal["trained", "base", "renders"] = "trained"
    """`trained`: a concept is learned and asked for. `base`: the class word alone on the untouched base, the ceiling of
    composition. `renders`: the world's own drawings of the individual, the ceiling of every instrument."""
    settings: tuple[str, ...] = ()
    """key=value for the training (concept/config.py), over those that all methods share."""
    checkpoints: tuple[int, ...] = ()
    """Steps after which it is measured as well; best with optim.decay=0, so that each is as good as a last step."""
    line: str = ""
    """Methods of the same line are joined by one in the plot of composition against identity, as listed."""

    def __post_init__(self) -> None:
        trained = self.source == "trained"
        check(
            (bool(self.name.strip()), "name=: must not be empty"),
            (trained or not self.settings, f"settings={list(self.settings)}: source={self.source} trains nothing"),
            (
                trained or not self.checkpoints,
                f"checkpoints={list(self.checkpoints)}: source={self.source} trains nothing",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FilmConfig:
    """The same study on films."""

    methods: tuple[str, ...] = ()
    """Names of the methods that film; none leaves films out."""
    prompts: int = 1
    """Prompts of each kind, the first ones of those that are drawn as stills."""
    seeds: int = 1
    frames: int = 16

    def __post_init__(self) -> None:
        check(
            (self.prompts >= 1, f"prompts={self.prompts}: must be at least 1"),
            (self.seeds >= 1, f"seeds={self.seeds}: must be at least 1"),
            (self.frames >= 2, f"frames={self.frames}: must be at least 2, since films are measured by their motion"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """What is compared, on what, and how often. The default is a small study: two concepts, minutes."""

    seed: int = 0
    """Of the choice of prompts, and of the pictures that the page shows."""
    choose_on: tuple[str, ...] = ("dog",)
    """Concepts on which settings may be chosen (world/heldout.py)."""
    report_on: tuple[str, ...] = ("robot",)
    """Concepts on which nothing was chosen: what is claimed is claimed of these."""
    pictures_in: Literal["varied", "one_place"] = "varied"
    """Whether a concept's five pictures show it in five places, or five times before the same backdrop."""
    training: tuple[str, ...] = ()
    """key=value for every training (concept/config.py)."""
    methods: tuple[MethodConfig, ...] = (
        MethodConfig(name="base, class word", source="base"),
        MethodConfig(name="Custom Diffusion", settings=("semantic.weight=0", *PUBLISHED)),
        MethodConfig(name="ClassDiffusion", settings=PUBLISHED),
        MethodConfig(name="ours"),
    )
    against: str = "Custom Diffusion"
    """The method that the others are compared with, pair by pair; empty compares with none."""
    training_seeds: tuple[int, ...] = (0,)
    """Each method trains once with each of them."""
    prompts: int = 3
    """Prompts of each kind: something worn; a scene; a doing; worn and doing at once, every other one held out."""
    seeds: int = 2
    """Pictures of each prompt, from the same noise for all methods."""
    steps: int = 20
    guidance: float = 5.0
    batch: int = 0
    """Pictures drawn at once; 0 takes 16 on a CPU and 150 on a GPU."""
    films: FilmConfig = FilmConfig()
    base: str = "tiny"
    """ "tiny" is the embedded base; or a folder in diffusers' layout."""
    judge: Path | None = None
    """The judge's folder; null is the one that ships."""
    identity: Path | None = None
    """The identity encoder's folder; null is the one that ships, where there is one."""
    clip: Path | None = None
    """A folder with a CLIP model of transformers, for CLIP-I and CLIP-T; null leaves them out."""
    dino: Path | None = None
    """A folder with a DINO or DINOv2 model of transformers, for DINO-I."""
    blip: Path | None = None
    """A folder with a BLIP or BLIP-2 model of transformers for image-text retrieval, for BLIP-T."""
    sprites: Path = Path(".sprites")
    """The world's drawings, for the pictures that concepts are learned from."""
    cache: Path = Path(".cache/study")
    """Concepts, pictures and scores, each named by a hash of the settings that determine it, shared by all studies. It
    knows settings, not code: after a change of what trains or draws, name another one."""
    out: Path = Path("runs/study")
    """The results and the page."""
    json: Path | None = None
    """Another place for the results as JSON, beside out/results.json."""
    device: str = "auto"
    dtype: str = "bf16"
    """Precision of sampling; training is always in fp32."""
    quiet: bool = False

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        unknown = sorted({*self.concepts} - HELDOUT_INDIVIDUALS.keys())
        known = ", ".join(HELDOUT_INDIVIDUALS)
        unfilmed = sorted({*self.films.methods} - {*names})
        check(
            (self.seed >= 0, f"seed={self.seed}: must be at least 0"),
            (bool(self.concepts), "choose_on and report_on are both empty: name a concept"),
            (not unknown, f"concepts {', '.join(unknown)}: must be some of {known}"),
            (
                len({*self.concepts}) == len(self.concepts),
                f"concepts {', '.join(self.concepts)}: each only once, in choose_on or in report_on",
            ),
            (bool(names), "methods=[]: at least one"),
            (len({*names}) == len(names), f"methods {', '.join(names)}: each name only once"),
            (not self.against or self.against in names, f"against={self.against}: must be one of {', '.join(names)}"),
            (not unfilmed, f"films.methods {', '.join(unfilmed)}: must be some of {', '.join(names)}"),
            (bool(self.training_seeds), "training_seeds=[]: at least one"),
            (1 <= self.prompts <= 6, f"prompts={self.prompts}: must be from 1 to 6, as many as there are scenes"),
            (self.films.prompts <= self.prompts, f"films.prompts={self.films.prompts}: at most prompts={self.prompts}"),
            (self.seeds >= 1, f"seeds={self.seeds}: must be at least 1"),
            (1 <= self.steps <= 1000, f"steps={self.steps}: must be from 1 to 1000"),
            (1 <= self.guidance <= 30, f"guidance={self.guidance:g}: must be from 1 (off) to 30"),
            (self.batch >= 0, f"batch={self.batch}: must be at least 0"),
            *(rule for method in self.methods for rule in self._training_rules(method)),
        )

    @property
    def concepts(self) -> tuple[str, ...]:
        """All concepts: those to choose on, then those to report on."""
        return self.choose_on + self.report_on

    def concept_config(self, method: MethodConfig, concept: str, seed: int) -> ConceptConfig:
        """The settings of one training. Raises UserError where some are wrong."""
        ours = {"token": TOKEN, "class_word": HELDOUT_INDIVIDUALS[concept].subject, "base": self.base, "seed": seed}
        overrides = [f"{name}={value}" for name, value in ours.items()]
        return load_config(ConceptConfig, overrides=[*self.training, *method.settings, *overrides, "sample.every=0"])

    def _training_rules(self, method: MethodConfig) -> list[tuple[bool, str]]:
        """Whether the settings of a method's training are right, told before anything is trained."""
        if method.source != "trained":
            return []
        given = [text.partition("=")[0].strip().split(".")[0] for text in (*self.training, *method.settings)]
        taken = sorted({*given} & {*TAKEN})
        rules = [(not taken, f"method {method.name}: {', '.join(taken)}: is set by the study itself")]
        try:
            config = self.concept_config(method, next(iter(HELDOUT_INDIVIDUALS)), 0)
        except ValueError as error:
            return [*rules, (False, f"method {method.name}: {error}")]
        late = [step for step in method.checkpoints if not 1 <= step < config.steps]
        return [*rules, (not late, f"method {method.name}: checkpoints {late}: must be from 1 to below {config.steps}")]
