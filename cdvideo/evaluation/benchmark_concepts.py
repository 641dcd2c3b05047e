"""Many concepts at once: a batch of films of as many concepts, beside a batch of films of one."""

from __future__ import annotations

from typing import Any

import numpy as np

from cdvideo.evaluation.benchmark_films import ConceptsBenchmark
from cdvideo.evaluation.benchmark_sampler import Progress, alternate, require_base, row, side, spread, write_results


def concepts(config: ConceptsBenchmark, progress: Progress = print) -> dict[str, Any]:
    """From prompts to latents; results-concepts.json and .md in config.out.

    `time_ratio`, `peak_ratio`, `run_ratio`: over those of the batch of one concept. `from_one_by_one`: the largest
    difference of any film's latents from those of the film made alone. `from_one_concept`: the least that another
    concept changes in a film, else the same; it tells that there was something to compare.
    """
    require_base(config.base)
    film = config.film
    with (
        side("one concept", film) as one,
        side("many concepts", film) as many,
        side("many concepts, one by one", film) as alone,
    ):
        sides = [one, many, alone]
        alternate(sides, config.pairs, progress)
        rows = []
        for each in sides:
            ratios = [own / least for own, least in zip(each.seconds, one.seconds, strict=True)]
            found = {**row(each, None), "time_ratio": spread(ratios)}
            found["peak_ratio"] = round(each.peak_bytes / one.peak_bytes, 4)
            found["run_ratio"] = round(each.run_bytes / one.run_bytes, 4)
            rows.append(found)
        latents_many, latents_alone, latents_one = (np.stack(each.made) for each in (many, alone, one))  # RBFCHW
        rows[1]["from_one_by_one"] = float(np.abs(latents_many - latents_alone).max())
        # Of both, the first film is of the same concept.
        rows[1]["from_one_concept"] = float(np.abs(latents_many - latents_one)[:, 1:].max(axis=(2, 3, 4, 5)).min())
        if config.concepts:
            kind = "each from a file of its own"
        else:
            kind = "made from the sample concept by adding noise of half its own size"
        against = f"{config.films} films of one concept in a batch; the {config.films} concepts are {kind}"
        return write_results("concepts", config, [{"against": against, **one.where, "rows": rows}])
