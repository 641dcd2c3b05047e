"""Films of the base beside real clips: what is in them, how much they move, how steady the subject is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cdvideo.evaluation.bench import Bench, Report, Shown, all_heads, fit, right_heads
from cdvideo.evaluation.drawing import Pictures, draw_films
from cdvideo.evaluation.figures import mean, ratio, share
from cdvideo.evaluation.metrics import dis_flow, flow_magnitude, subject_consistency
from cdvideo.evaluation.prompts import Ask, choose_asks
from cdvideo.motion.modules import MotionModules
from cdvideo.world.individuals import sample_individual
from cdvideo.world.scenes import compose, render_clip

SHOWN_FILMS = 8
ALIKE_FLOW = (0.6, 1.6)  # of the real clips' flow
RIGHT_FRAMES = 0.75  # of a film's frames must show all three: 12 of 16


def measure_films(bench: Bench, motion: MotionModules, report: Report) -> None:
    """Films of held-out triples beside real clips of the same triples."""
    config = bench.config
    asks = choose_asks("heldout", config.films, seed=config.seed)
    films_BFHWC = draw_films(bench.base, motion, asks, bench.store, "film", config)
    clips_BFHWC = real_clips(bench, [ask for ask in asks for _ in range(config.clips)])
    drawn = [look_at_film(bench, film, ask) for film, ask in zip(films_BFHWC, asks, strict=True)]
    real = [look_at_film(bench, clip, asks[i // config.clips]) for i, clip in enumerate(clips_BFHWC)]
    reference = [real[i : i + config.clips] for i in range(0, len(real), config.clips)]
    needed, of = frames_needed(config.frames), f"films of held-out triples, {config.frames} frames"

    part, name = "Films", f"all three right in {needed} of {config.frames} frames"
    report.figures += [
        share(np.array([film.right for film in drawn]), part=part, name=name, of=of, at_least=70),
        share(np.array([clip.right for clip in real]), part=part, name=f"{name}, real clips", of="real clips"),
    ]
    side = bench.base.resolution
    real_flow = [float(np.mean([clip.flow for clip in clips])) for clips in reference]
    real_consistency = [float(np.mean([clip.consistency for clip in clips])) for clips in reference]
    flow, consistency = [film.flow for film in drawn], [film.consistency for film in drawn]
    alike, unit = "subject consistency", f"pixels of {side} a frame"
    report.figures += [
        ratio(
            flow, real_flow, part=part, name="flow magnitude against real clips", of=of,
            at_least=ALIKE_FLOW[0], at_most=ALIKE_FLOW[1],
        ),
        mean(flow, part=part, name="flow magnitude", unit=unit, of=of),
        mean(real_flow, part=part, name="flow magnitude, real clips", unit=unit, of="filmed triples"),
        ratio(consistency, real_consistency, part=part, name=f"{alike} against real clips", of=of, at_least=0.95),
        mean(consistency, part=part, name=alike, unit="", of=of),
        mean(real_consistency, part=part, name=f"{alike}, real clips", unit="", of="filmed triples"),
    ]  # fmt: skip
    settings = by_setting(asks, flow, real_flow)
    report.tables["Flow magnitude, by setting"] = {
        setting: {"drawn": a, "real": b, "ratio": a / b, "films": n} for setting, (a, b, n) in settings.items()
    }
    lively = np.array([ALIKE_FLOW[0] <= a / b <= ALIKE_FLOW[1] for a, b, _ in settings.values()])
    name = f"settings whose flow is {ALIKE_FLOW[0]} to {ALIKE_FLOW[1]} x"
    report.figures += [share(lively, part=part, name=name, of="settings")]
    report.films = [
        Shown(ask, film, seen.seen, seen.right)
        for ask, film, seen in zip(asks[:SHOWN_FILMS], films_BFHWC, drawn, strict=False)
    ]


@dataclass(frozen=True)
class Seen:
    """What was found in one film; `seen`: the triple named in most frames."""

    seen: tuple[str, str, str]
    right: bool
    flow: float
    consistency: float


def look_at_film(bench: Bench, frames_FHWC: Pictures, ask: Ask) -> Seen:
    """The judge's verdict on a film, its flow and its subject consistency."""
    verdicts = bench.look(frames_FHWC)
    right_F = all_heads(right_heads(verdicts, [ask.triple] * len(frames_FHWC)))
    names = [verdicts.names(f) for f in range(len(frames_FHWC))]
    return Seen(
        seen=max(names, key=names.count),
        right=bool(right_F.sum() >= frames_needed(len(frames_FHWC))),
        flow=flow_magnitude(frames_FHWC, dis_flow()),
        consistency=subject_consistency(verdicts.features_BD.numpy()),
    )


def frames_needed(frames: int) -> int:
    return int(np.ceil(RIGHT_FRAMES * frames))


def real_clips(bench: Bench, asks: Sequence[Ask]) -> Pictures:
    """A rendered clip of each triple, at the base's resolution: clips_BFHWC."""
    rng = np.random.default_rng([bench.config.seed, 12])
    clips = []
    for ask in asks:
        individual = sample_individual(rng, ask.subject, bench.sprites.artists(ask.subject))
        scene = compose(rng, individual, thing=ask.thing, setting=ask.setting)
        frames_FHWC = render_clip(scene, bench.sprites, num_frames=bench.config.frames)
        clips.append(np.stack([fit(frame, bench.base.resolution) for frame in frames_FHWC]))
    return np.stack(clips)


def by_setting(
    asks: Sequence[Ask], drawn: Sequence[float], real: Sequence[float]
) -> dict[str, tuple[float, float, int]]:
    """Means over the films of each setting, drawn and real, and how many they are."""
    found = {}
    for setting in sorted({ask.setting for ask in asks}):
        picks = [i for i, ask in enumerate(asks) if ask.setting == setting]
        found[setting] = float(np.mean([drawn[i] for i in picks])), float(np.mean([real[i] for i in picks])), len(picks)
    return found
