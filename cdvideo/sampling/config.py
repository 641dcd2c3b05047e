"""The settings of a film (no torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cdvideo.config import check, text_rules
from cdvideo.interchange.config import check_files, parse_files
from cdvideo.sampling.keyframes import parse_prompts
from cdvideo.sampling.options import Control, FilmSettings, Noise, StartFrom, Windows, rule
from cdvideo.sampling.speed import PRESETS

FORMATS = ("mp4", "webm", "gif", "webp", "png")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnimateConfig:
    """What to film, and how."""

    prompt: str
    """What is to be seen. A concept's token in it brings the concept in. A prompt that changes along the film is
    written as "0: a sks dog surfing | 24: a sks dog on the beach"; in a file, after `prompt: |`, as lines of
    `frame: prompt`. In a loop the last goes over into the first."""
    negative_prompt: str = ""
    """What is to be avoided."""
    frames: int = 16
    """Length of the film in frames; those that are longer than the motion modules reach (the embedded ones 32) are made
    in overlapping windows."""
    fps: float = 8.0
    """Frames shown in a second."""
    steps: int | None = None
    """Denoising steps. More is finer and slower; null is 25, or what the motion modules were distilled for."""
    guidance: float | None = None
    """Scale of classifier-free guidance: higher follows the prompt more closely, 1 switches it off. On the embedded
    base things worn get lost below 4, and colours run over above 7. Null is 5, or what the motion modules were
    distilled for."""
    scheduler: Literal["auto", "ddim", "dpm++", "euler", "lcm"] = "auto"
    """The sampler: DDIM; DPM-Solver++, which needs fewer steps; `euler` and `lcm`, which AnimateDiff-Lightning and
    AnimateLCM were distilled for. `auto` is DDIM, or what the motion modules were distilled for."""
    speed: Literal["exact", "balanced", "fast"] = "exact"
    """What may be left out to be faster: nothing; or steps whose answer can be forecast, so that the film differs a
    little (balanced) or visibly (fast) from the exact one of the same seed."""
    compare: bool = False
    """Also makes the exact film, and prints how far this one is from it."""
    compile: bool = False
    """Compile the UNet by torch.compile before the first step, in place of the sampler's own blocks. It takes minutes
    for each size and length. For GPUs: on CPUs the sampler's own blocks are what fuses."""
    seed: int = 0
    """Seed of the first film; the next ones have seed + 1, seed + 2, ..."""
    num_videos: int = 1
    """How many films, or pictures with `still`."""
    batch: int = 1
    """Films that go through the model at once. 1: a film's bytes depend on no other film. More may be faster on a GPU,
    and a film may then differ by a rounding."""
    still: bool = False
    """A picture instead of a film."""
    also_still: bool = False
    """A picture beside each film, from the same prompt and seed, by the image model alone."""
    windows: Windows = Windows()
    noise: Noise = Noise()
    control: Control = Control()
    start: StartFrom = StartFrom()
    format: str = "mp4,gif"
    """Files to write of each film, separated by commas: mp4, webm, gif, webp, and png (a folder of frames)."""
    codec: Literal["h264", "hevc", "av1"] = "h264"
    """Of the mp4. h264 plays everywhere; hevc and av1 are smaller, where imageio's ffmpeg has an encoder for them."""
    dither: Literal["none", "ordered", "diffusion"] = "none"
    """Of the gif's 256 colours: none; a pattern that stands still; or error diffusion, whose grain crawls."""
    width: int | None = None
    height: int | None = None
    """Size in pixels that the model draws at; null is the base's own."""
    offload: bool = False
    """Keep in RAM what is not at work: text encoder, then UNet and motion modules, then VAE come to the GPU one after
    the other. The same film, in less GPU memory and some seconds more."""
    decode_chunk: int = 1
    """Frames that the VAE decodes at once: more take more memory, and keep a large GPU busier."""
    vae_tiling: bool = False
    """Decode pictures larger than the VAE was made for (512 pixels for Stable Diffusion 1) in overlapping tiles: less
    memory, and colours may differ a little from tile to tile."""
    watch_size: int = 384
    """Smaller pictures are enlarged by a whole factor until their short side has this many pixels; 0 leaves them."""
    base: str = "tiny"
    """The image model: "tiny" is the embedded one; or a folder in diffusers' layout, a single file, or a hub id."""
    motion: str = "auto"
    """Motion modules: a MotionAdapter folder, or a file of AnimateDiff's; "auto" is the folder `motion` of the base."""
    motion_lora: str = "none"
    """Motion LoRAs to add to the motion modules, separated by commas, each a file or file:strength; "none" is none."""
    concept: str = "auto"
    """A concept file, or several, separated by commas, which are merged; "auto" is the newest one whose token stands in
    the prompt, "none" is none. Files from elsewhere are taken too: LoRA, textual inversion, Custom Diffusion; and each
    may have a weight: rex.safetensors,style.safetensors:0.8."""
    out: Path = Path("runs/films")
    """The folder to write into."""
    attention: Literal["sdpa", "flash", "cudnn", "efficient", "xformers"] = "sdpa"
    """What computes attention: torch's own choice; one of its kernels before the others; or xformers. Each is tried on
    the device before it is used."""
    device: str = "auto"
    dtype: str = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        codec = f"codec={self.codec} without an mp4: format={self.format}"
        unknown = [name for name in self.formats if name not in FORMATS]
        sides = [("width", self.width), ("height", self.height)]
        check(
            (bool(self.prompt.strip()), "prompt is empty: say what is to be seen"),
            (self.frames >= 1, f"frames={self.frames}: must be at least 1"),
            (0.1 <= self.fps <= 60, f"fps={self.fps:g}: must be from 0.1 to 60"),
            ("gif" not in self.formats or self.fps <= 50, f"fps={self.fps:g}: a gif shows at most 50 frames a second"),
            (self.steps is None or 1 <= self.steps <= 1000, f"steps={self.steps}: must be from 1 to 1000"),
            (
                self.guidance is None or 1 <= self.guidance <= 30,
                f"guidance={self.guidance}: must be from 1 (off) to 30",
            ),
            (0 <= self.seed < 2**32, f"seed={self.seed}: must be from 0 to 2^32 - 1, which is what torch reads of it"),
            (self.num_videos >= 1, f"num_videos={self.num_videos}: must be at least 1"),
            (self.batch >= 1, f"batch={self.batch}: must be at least 1"),
            *rule("prompt", parse_prompts, self.prompt),
            *text_rules("prompt", self.prompt),
            *text_rules("negative_prompt", self.negative_prompt),
            *self._impossible_pairs(),
            (not unknown, f"format={self.format}: must be some of {', '.join(FORMATS)}, separated by commas"),
            (self.codec == "h264" or "mp4" in self.formats, codec),
            (self.decode_chunk >= 1, f"decode_chunk={self.decode_chunk}: must be at least 1"),
            *((side is None or side >= 16, f"{name}={side}: must be at least 16 pixels") for name, side in sides),
            (0 <= self.watch_size <= 4096, f"watch_size={self.watch_size}: must be from 0 to 4096"),
            *check_files(self.concept_files),
        )

    def _impossible_pairs(self) -> Iterator[tuple[bool, str]]:
        """For `check`: what can not go together."""
        of_films = {
            "also_still": self.also_still,
            "windows": self.windows != Windows(),
            "noise": self.noise != Noise(),
            "control": self.control != Control(),
            "start": self.start != StartFrom(),
            "batch": self.batch > 1,
            "compile": self.compile,
            "motion_lora": self.motion_lora != "none",
        }
        asked = ", ".join(name for name, given in of_films.items() if given)
        yield not self.still or self.speed == "exact", f"speed={self.speed} with still: presets are for films"
        yield not self.compare or self.speed != "exact", "compare with speed=exact: that is the exact film itself"
        yield not (self.still and asked), f"still with {asked}: a picture has none of it"
        freeinit = f"noise.freeinit={self.noise.freeinit} with start: FreeInit begins from noise alone"
        yield not (self.noise.freeinit and self.start.given), freeinit
        if any(True for _ in rule("prompt", parse_prompts, self.prompt)):
            return
        last = max(self.prompts)
        yield last < self.frames, f"prompt={self.prompt}: frame {last} lies beyond the film's {self.frames}"
        yield not self.still or last == 0, f"prompt={self.prompt}: a picture has one prompt, without a frame"

    @property
    def prompts(self) -> dict[int, str]:
        """The prompts by the frame from which they are meant."""
        return parse_prompts(self.prompt)

    @property
    def film_settings(self) -> FilmSettings:
        """What the sampler is told of all films alike, once sampler, steps and guidance are settled."""
        assert self.steps is not None and self.guidance is not None and self.scheduler != "auto"
        return FilmSettings(
            frames=self.frames,
            steps=self.steps,
            guidance=self.guidance,
            scheduler=self.scheduler,
            width=self.width,
            height=self.height,
            windows=self.windows,
            noise=self.noise,
            speed=dataclasses.replace(PRESETS[self.speed], compiled=self.compile),
        )

    @property
    def concept_files(self) -> tuple[tuple[Path, float], ...]:
        """The concept's files with their weights; none for "auto" and "none"."""
        return () if self.concept in ("auto", "none") else parse_files(self.concept)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats by name, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.format.split(",")))

    @property
    def codecs(self) -> tuple[Literal["h264", "hevc", "av1", "vp9"], ...]:
        """What the formats are encoded with."""
        films = () if self.still else self.formats
        return (*((self.codec,) if "mp4" in films else ()), *(("vp9",) if "webm" in films else ()))
