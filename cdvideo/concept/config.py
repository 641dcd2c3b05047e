"""The settings of concept training, and why they are what they are. Imports no torch.

Every group stands beside the part of the loss or of the loop that it steers; the defaults are for the embedded base.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cdvideo.config import check, text_rules

CONCEPT_FILE = "concept.safetensors"  # what a run leaves in its folder
SAMPLE_PICTURES = Path(__file__).parents[1] / "world" / "samples" / "dog"  # what a run without pictures learns from
TOKEN_FORM = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What the UNet is shown: a few pictures, each in several variants, encoded once."""

    style: Literal["picture", "photo"] = "picture"
    """What the prompts call the pictures: "a picture of a sks dog" or "a photo of a sks dog". The embedded base knows
    pictures; bases that learned from the web know photos."""
    variants: int = 12
    """Latents kept of each picture, each augmented differently. More variety, more time before the first step."""
    flip: bool = True
    """Mirror half of the variants. Right for animals and most objects; wrong for writing and for uneven faces."""
    rescale: float = 0.5
    """The share of variants in another size, said in the prompt ("far away", "close up"), after Custom Diffusion. It
    teaches that size and place are not part of the thing."""
    smallest_scale: float = 0.6
    """The least size of such a variant. 0.6 of 128 pixels is what the embedded base can still draw; for 512 pixels
    Custom Diffusion takes 0.33."""
    largest_scale: float = 1.3
    """The largest size; what stands over the edge is cut off."""
    focus: Literal["picture", "subject"] = "subject"
    """Where the loss counts: on the whole picture, as in the papers, or only where the base itself sees the class, so
    that what stands around the thing is not learned as a part of it. Asks the base once, before training; no masks
    are needed. masks.png in the run's folder shows what it saw; a picture in which that is nearly nothing or nearly all
    is learned whole, with a warning."""

    def __post_init__(self) -> None:
        check(
            (self.variants >= 1, f"variants={self.variants}: must be at least 1"),
            (0 <= self.rescale <= 1, f"rescale={self.rescale}: a share, must be in [0, 1]"),
            (0.2 <= self.smallest_scale <= 1, f"smallest_scale={self.smallest_scale}: must be in [0.2, 1]"),
            (1 <= self.largest_scale <= 2, f"largest_scale={self.largest_scale}: must be in [1, 2]"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What is learned: the token's own rows, and something in the UNet."""

    kind: Literal["lora", "kv", "token", "unet"] = "lora"
    """`lora`: low-rank changes of `targets`, with peft. `kv`: K and V of cross-attentions (Custom Diffusion), which
    read text, and nothing else of the UNet: its strength can then change over a film's frames too, and films of several
    such concepts be made in one batch. `token`: nothing but the rows (Textual Inversion). `unet`: every weight
    (DreamBooth)."""
    keys: Literal["tuned", "locked"] = "tuned"
    """`locked` keeps K the base's, so that only V learns (after Perfusion). For `kv` alone."""
    num_rows: int = 1
    """Rows of text input that the token stands for. More rows hold more of the thing and drift more easily."""
    initialiser: str = ""
    """The words whose embedding the rows start from; empty is the class word. ClassDiffusion starts from a rare token
    ("ktn"); the class word starts inside of the class, so that little has to be learned and little has to be
    preserved, and a small base's rare tokens mean nothing at all."""
    train_rows: bool = True
    """Whether the rows learn. DreamBooth as published leaves a rare word as it is: false, with an initialiser."""
    rank: int = 8
    """LoRA: the rank of each change."""
    alpha: float = 8.0
    """LoRA: the change is multiplied by alpha / rank."""
    targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
        "proj_in",
        "proj_out",
        "conv1",
        "conv2",
    )
    """LoRA: the layers that are changed, by the last parts of their names. These are those of attentions, feed-forwards
    and residual blocks; the first four, the attentions alone, learn the look of a thing less well."""
    dora: bool = False
    """LoRA: learn each output's magnitude apart from its direction (DoRA)."""

    def __post_init__(self) -> None:
        check(
            (1 <= self.num_rows <= 8, f"num_rows={self.num_rows}: must be in [1, 8]"),
            (self.keys == "tuned" or self.kind == "kv", f"keys={self.keys}: needs kind=kv, which has keys"),
            (self.train_rows or self.kind != "token", "train_rows=false: with kind=token nothing else learns"),
            (
                self.train_rows or bool(self.initialiser),
                "train_rows=false: needs an initialiser, without which the token is the class word",
            ),
            (self.rank >= 1, f"rank={self.rank}: must be at least 1"),
            (self.alpha > 0, f"alpha={self.alpha}: must be above 0"),
            (len(self.targets) >= 1, "targets=[]: at least one name of layers, such as to_v"),
        )

    @property
    def settings(self) -> dict[str, str | int | float | bool]:
        """What a concept's file has to tell of its adapter beside its kind."""
        if self.kind == "lora":
            return {"rank": self.rank, "alpha": self.alpha, "dora": self.dora}
        return {"keys": self.keys} if self.kind == "kv" else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticConfig:
    """The semantic preservation loss (SPL): keeps "sks dog" meaning a dog while the pictures are learned."""

    weight: float = 1.0
    """How much it counts beside the denoising loss. Higher keeps composition, lower keeps identity; 0 turns it off."""
    phrases: int = 2
    """Phrases compared at each step, drawn from the whole list; their mean is what the loss is defined over. Over the
    steps all have their turn, so two do what eight do, for two percent of a step's time instead of four."""
    variant: Literal["true_eos", "released"] = "true_eos"
    """`true_eos` pools at the end of the text, as the paper says. `released` repeats what the paper's code computes:
    one phrase, pooled at the concept's token, whose position embedding is dropped. For ablation only."""
    form: Literal["point", "relation"] = "point"
    """`point` pulls each of the concept's phrases to the same phrase of the class. `relation` keeps its cosines to all
    other phrases of the class what they are for the class itself (as ACCORD does), and leaves free where it stands."""
    margin: float = 0.0
    """How large a distance, or a change of cosine, may be before it counts: room for what makes the thing itself."""

    def __post_init__(self) -> None:
        point = self.form == "point"
        check(
            (self.weight >= 0, f"weight={self.weight}: must not be negative"),
            (self.phrases >= 1, f"phrases={self.phrases}: must be at least 1"),
            (point or self.variant == "true_eos", f"form={self.form}: needs variant=true_eos, which has many phrases"),
            (0 <= self.margin < 2, f"margin={self.margin}: must be in [0, 2)"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PreserveConfig:
    """What keeps the UNet, which SPL does not see, and the rows near the base. What is 0 costs nothing."""

    prior_weight: float = 0.0
    """How much pictures of the class that the base drew itself count; beside the concept's pictures, as many of them
    are in every step, which takes nearly twice the time (DreamBooth's prior preservation)."""
    prior_images: int = 32
    """Pictures of each class drawn for it once, in 20 steps at a guidance of 5. Custom Diffusion takes 200."""
    output_weight: float = 0.0
    """How much it counts that the tuned UNet predicts for the class prompt what the base does, on the concept's own
    noisy latents (differential output preservation). 1 keeps other dogs what they are while the concept is loaded, and
    costs a little of its likeness. Needs no pictures; a second pass, and one without gradients."""
    background_weight: float = 1.0
    """With data.focus=subject: how much it counts that around the subject the tuned UNet predicts what the base does
    for the class prompt. Without it nothing holds there, and what was learned of the subject runs over. One pass
    without gradients, a third more time."""
    anchor_weight: float = 0.0
    """How much the squared norm of the weights' change counts, relative to that of the base's weights. 1% of change is
    1e-4 here, so weights of 10 and more are felt."""
    keep_norm: bool = False
    """Bring each row back to the norm of the class word's embedding after every step: only its direction learns."""

    def __post_init__(self) -> None:
        check(
            *(
                (getattr(self, name) >= 0, f"{name}={getattr(self, name)}: must not be negative")
                for name in ("prior_weight", "output_weight", "background_weight", "anchor_weight")
            ),
            (self.prior_images >= 1, f"prior_images={self.prior_images}: must be at least 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW without warm-up. The rates are the ones used: nothing multiplies them by the batch size."""

    batch_size: int = 4
    """Pictures in a step."""
    lr: float = 5e-4
    """Learning rate of what is learned in the UNet. On the embedded base `adapter.kind=kv` wants 3e-4, `unet` 1e-4."""
    token_lr: float = 3e-3
    """Learning rate of the token's rows: a few numbers, which have to go further."""
    decay: float = 0.5
    """The share of the steps, at the end, over which both rates fall linearly to zero. With a few pictures the last
    steps leave their own noise behind; smaller ones average it away, and pictures come out cleaner. 0: constant."""
    weight_decay: float = 0.01
    """Pulls the change of the UNet's weights towards zero, that is towards the base. The rows are never decayed."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps the optimizer's state in 8 bits instead of 32, with bitsandbytes, on CUDA: 6 bytes less for
    every weight that is learned. That is little for LoRA, and 5 GB for `adapter.kind=unet` on Stable Diffusion 1."""
    grad_clip: float = 1.0
    """The largest norm of the gradient of all that is learned."""
    gradient_checkpointing: bool = False
    """Recompute the UNet's activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        check(
            (self.batch_size >= 1, f"batch_size={self.batch_size}: must be at least 1"),
            (self.lr > 0, f"lr={self.lr}: must be above 0"),
            (self.token_lr > 0, f"token_lr={self.token_lr}: must be above 0"),
            (0 <= self.decay <= 1, f"decay={self.decay}: a share, must be in [0, 1]"),
            (self.weight_decay >= 0, f"weight_decay={self.weight_decay}: must not be negative"),
            (self.grad_clip > 0, f"grad_clip={self.grad_clip}: must be above 0"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """What is drawn while training: the same prompts from the same noise, so that only the concept changes."""

    every: int = 100
    """Steps from one contact sheet to the next; there is always one at step 0 and one at the end. 0 draws none."""
    prompts: tuple[str, ...] = ("a {}", "a {} wearing sunglasses", "a {} surfing", "a {} in the snow")
    """Prompts; {} stands for the concept's phrase ("sks dog")."""
    steps: int = 20
    """Sampling steps."""
    guidance: float = 5.0
    """Classifier-free guidance."""
    seed: int = 0
    """The noise that all contact sheets start from."""

    def __post_init__(self) -> None:
        check(
            (self.every >= 0, f"every={self.every}: must not be negative"),
            (len(self.prompts) >= 1, "prompts=[]: at least one prompt, or every=0 for no samples"),
            (
                all("{}" in p for p in self.prompts),
                f"prompts={list(self.prompts)}: each must hold {{}} for the concept",
            ),
            *(rule for prompt in self.prompts for rule in text_rules("prompts", prompt)),
            (self.steps >= 1, f"steps={self.steps}: must be at least 1"),
            (self.guidance >= 1, f"guidance={self.guidance}: must be at least 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SubjectConfig:
    """One more thing that a concept is to hold."""

    images: Path
    """A folder of 3 to 20 pictures of it."""
    token: str
    """The word that will stand for it; another one than those of the other subjects."""
    class_word: str
    """What kind of thing it is; may be that of another subject."""

    def __post_init__(self) -> None:
        check(*_rules_of_name(self.token, self.class_word))


def _rules_of_name(token: str, class_word: str) -> tuple[tuple[bool, str], ...]:
    return (
        (TOKEN_FORM.fullmatch(token) is not None, f"token={token}: one word, a letter, then letters, digits or _"),
        (bool(class_word.strip()), "class_word=: must not be empty"),
        *text_rules("class_word", class_word),
        (
            token.lower() not in class_word.lower().split(),
            f"token={token}: must differ from class_word={class_word}",
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptConfig:
    """One concept: what it is, from which pictures, on which base, for how long."""

    images: Path | None = None
    """A folder of 3 to 20 pictures of the one thing. None: the five pictures of a dog that ship with the project."""
    token: str = "sks"
    """The word that will stand for the thing. Must not be a word that the base knows."""
    class_word: str = "dog"
    """What kind of thing it is, in words that the base knows; several words are fine ("stuffed animal")."""
    others: tuple[SubjectConfig, ...] = ()
    """More things to learn at once, each with its own token and rows, and all with the same weights:
    others=[{images: photos/tom, token: tomcat7, class_word: cat}]. Prompts may then hold several of them."""
    base: str = "tiny"
    """The model to teach: "tiny" is the embedded one; else a diffusers folder, a single file, or a hub id."""
    resolution: int | None = None
    """Side in pixels of what it is shown and of what it draws while training; null is the base's own. A lower one takes
    less memory and time; far from the base's own it draws badly. A multiple of what one latent stands for (8)."""
    steps: int = 400
    """Optimizer steps."""
    seed: int = 0
    """The same seed gives the same concept on the same machine."""
    out: Path | None = None
    """The run's folder. None: runs/<token>-<class word>."""
    device: str = "auto"
    dtype: str = "auto"
    checkpoint_every: int = 100
    """Steps from one resumable state to the next. An interrupt (Ctrl-C) always leaves one."""
    data: DataConfig = DataConfig()
    adapter: AdapterConfig = AdapterConfig()
    semantic: SemanticConfig = SemanticConfig()
    preserve: PreserveConfig = PreserveConfig()
    optim: OptimConfig = OptimConfig()
    sample: SampleConfig = SampleConfig()

    def __post_init__(self) -> None:
        tokens = [self.token.lower(), *(other.token.lower() for other in self.others)]
        check(
            *_rules_of_name(self.token, self.class_word),
            (len(set(tokens)) == 1 + len(self.others), f"others: tokens must differ, they are {', '.join(tokens)}"),
            (
                self.resolution is None or self.resolution >= 64,
                f"resolution={self.resolution}: must be at least 64, or null",
            ),
            (self.steps >= 1, f"steps={self.steps}: must be at least 1"),
            (self.seed >= 0, f"seed={self.seed}: must not be negative"),
            (self.checkpoint_every >= 1, f"checkpoint_every={self.checkpoint_every}: must be at least 1"),
            (
                self.data.focus == "subject" or not self.preserve.background_weight,
                f"preserve.background_weight={self.preserve.background_weight:g}: needs data.focus=subject, which says "
                "where the background is; with data.focus=picture set it to 0",
            ),
            (
                self.adapter.train_rows or not (self.semantic.weight or self.preserve.keep_norm),
                "semantic.weight, preserve.keep_norm: must be 0 and false with adapter.train_rows=false: they act on "
                "rows that learn",
            ),
            (
                self.adapter.kind != "token" or self.preserve.output_weight == self.preserve.anchor_weight == 0,
                "preserve.output_weight, preserve.anchor_weight: must be 0 with adapter.kind=token, which leaves the "
                "UNet as it is",
            ),
        )

    @property
    def phrase(self) -> str:
        """How prompts name the concept: "sks dog"."""
        return f"{self.token} {self.class_word}"

    @property
    def class_words(self) -> dict[str, str]:
        """The class word of every subject, by its token."""
        return {self.token: self.class_word, **{other.token: other.class_word for other in self.others}}

    @property
    def phrases(self) -> dict[str, str]:
        """How prompts name every subject, by its token."""
        return {token: f"{token} {class_word}" for token, class_word in self.class_words.items()}

    @property
    def loss_weights(self) -> dict[str, float]:
        """What each term of the loss counts, by its name in the log; terms that count nothing are not computed."""
        preserve = self.preserve
        names = ("prior", "output", "background", "anchor")
        weights = {"semantic": self.semantic.weight, **{name: getattr(preserve, f"{name}_weight") for name in names}}
        return {"denoise": 1.0, **{name: weight for name, weight in weights.items() if weight > 0}}
