"""How well features tell individuals apart: the measures of verification, on arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Sightings:
    """M pictures of individuals: unit features_MD, which individual and which view of it each shows, and its class.

    Individuals 2k and 2k + 1 are look-alikes.
    """

    features_MD: Floats
    member_M: NDArray[np.int64]
    view_M: NDArray[np.int64]
    subject_M: NDArray[np.str_]

    def of(self, members: NDArray[np.bool_]) -> Sightings:
        """Those of the pictures."""
        return Sightings(
            self.features_MD[members], self.member_M[members], self.view_M[members], self.subject_M[members]
        )


def verify(rows: Sightings, columns: Sightings) -> dict[str, Any]:
    """Cosines of pictures of the same individual beside those of three kinds of others.

    Every row is compared with every column; the same view of the same individual is left out.

    Returns:
        "same": mean cosine and n; "look_alike", "same_class", "other_class": these, and the area under the curve and
        the equal error rate against "same".
    """
    cosine = rows.features_MD @ columns.features_MD.T
    member = rows.member_M[:, None] == columns.member_M
    view = rows.view_M[:, None] == columns.view_M
    twin = rows.member_M[:, None] == columns.member_M ^ 1
    subject = rows.subject_M[:, None] == columns.subject_M
    same = cosine[member & ~view]
    facts: dict[str, Any] = {"same": {"cosine": round(float(same.mean()), 5), "n": len(same)}}
    others = {"look_alike": twin, "same_class": subject & ~twin & ~member, "other_class": ~subject}
    for kind, chosen in others.items():
        if not chosen.any():
            continue
        facts[kind] = {
            "cosine": round(float(cosine[chosen].mean()), 5),
            "auc": round(area_under_curve(same, cosine[chosen]), 5),
            "equal_error_rate": round(equal_error_rate(same, cosine[chosen]), 5),
            "n": int(chosen.sum()),
        }
    return facts


def area_under_curve(same: Floats, other: Floats) -> float:
    """The share of (same, other) pairs in which `same` scores higher, ties half (Mann and Whitney, 1947)."""
    assert len(same) and len(other), "an area needs both kinds"
    ordered = np.sort(other)
    below = np.searchsorted(ordered, same, side="left") + np.searchsorted(ordered, same, side="right")
    return float(below.mean() / (2 * len(other)))


def equal_error_rate(same: Floats, other: Floats) -> float:
    """The error at the threshold where as large a share of `same` lies below it as of `other` lies at or above it."""
    assert len(same) and len(other), "a rate needs both kinds"
    thresholds = np.concatenate([np.sort(np.concatenate([same, other])), [np.inf]])
    missed = np.searchsorted(np.sort(same), thresholds, side="left") / len(same)
    let_in = 1 - np.searchsorted(np.sort(other), thresholds, side="left") / len(other)
    nearest = int(np.abs(missed - let_in).argmin())
    return float((missed[nearest] + let_in[nearest]) / 2)
