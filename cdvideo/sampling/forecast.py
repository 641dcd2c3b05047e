"""Steps whose answer is not asked from the model, but forecast from its last ones."""

from __future__ import annotations

from torch import Tensor

from cdvideo.sampling.denoise import Predict
from cdvideo.sampling.speed import Speed

DAMPING = 0.5  # each further step of a forecast follows the last slope by half as much as the one before it


def forecasting(predict: Predict, speed: Speed, *, steps: int) -> Predict:
    """A model that is asked at `speed.computed_steps` only, and at the first two that come.

    TaylorSeer (arXiv 2503.06923) continues features within the model along their last slope. Over as many steps as are
    left out here that overshoots, so the slope is damped (as the trend of a time series, Gardner and McKenzie 1985).
    Measured on the embedded base at 8 of 25 steps, four films: 25.2 dB; a slope of half its size all along has 24.7.
    """
    if speed.stride == 0:
        return predict
    computed = set(speed.computed_steps(steps))
    answers: list[tuple[int, Tensor]] = []  # the last two, with their steps

    def predict_or_forecast(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        if answers and step <= answers[-1][0]:  # another film has begun
            answers.clear()
        if step not in computed and len(answers) == 2:
            (first, earlier), (second, later) = answers
            reach = DAMPING * (1 - DAMPING ** (step - second)) / (1 - DAMPING)
            return later + reach / (second - first) * (later - earlier)
        answers.append((step, predict(latents, timestep, step)))
        del answers[:-2]
        return answers[-1][1]

    return predict_or_forecast
