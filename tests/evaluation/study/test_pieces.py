from __future__ import annotations

from pathlib import Path

from cdvideo.base.loader import Base
from cdvideo.concept.config import ConceptConfig, PreserveConfig, SampleConfig
from cdvideo.evaluation.judge.model import Judge
from cdvideo.evaluation.study.config import StudyConfig
from cdvideo.evaluation.study.pieces import StudyBench, class_pictures
from cdvideo.evaluation.study.scores import Instruments
from cdvideo.world.sprites import Sprites


def test_pictures_of_the_class_are_of_the_trainings_resolution(tiny_base: Base, tmp_path: Path) -> None:
    judge = Judge(widths=(4, 4, 4, 8), blocks=(0, 0, 0, 1), side=32)
    config = StudyConfig(cache=tmp_path)
    bench = StudyBench(config, tiny_base, tiny_base, None, Instruments(judge, {}, {}), Sprites({}, {}), {})
    preserve, sample = PreserveConfig(prior_images=1), SampleConfig(steps=1)
    for resolution, side in ((None, 64), (128, 128), (None, 64)):
        concept = ConceptConfig(resolution=resolution, preserve=preserve, sample=sample)
        (picture,) = class_pictures(bench, concept)["dog"]
        assert picture.image.size == (side, side)
