from __future__ import annotations

import numpy as np
import pytest

from cdvideo.media.spool import Spool


def test_frames_come_back_by_index_and_in_order() -> None:
    frames_FHWC = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    with Spool(frame[:, ::-1] for frame in frames_FHWC) as spool:  # frames need not be contiguous
        assert len(spool) == 5
        for _ in range(2):
            assert np.array_equal(np.stack(list(spool)), frames_FHWC[:, :, ::-1])
        assert np.array_equal(spool[np.int64(3)], frames_FHWC[3, :, ::-1])
        with pytest.raises(IndexError):
            spool[5]
    with pytest.raises(ValueError, match="closed file"):
        spool[0]


def test_frames_are_of_one_size() -> None:
    with pytest.raises(AssertionError, match=r"a frame of \(2, 2, 3\) in a film of \(4, 4, 3\)"):
        Spool([np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)])
