"""How long SCAFFOLD's control variate may be that comes with a model: what honest sites can make.

The aggregator's control variate is added to every gradient of a round. A huge one, though finite,
would drown what this site's patients say and waste the budget that they pay for the round, so it is
refused before anything is charged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from consilium_client.training.clipping import gradient_multiplier
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import PrivacyParameters
from consilium_common.study import Study

#: How much longer gradients may be than those that training gets on with: there are bad starts,
#: spikes and momentum.
_ROOM: Final = 100.0
#: The same for gradients that are clipped: a site may have twice the patients that it declared, and
#: the mean over sites is not exact where other sites take part, or weigh, from round to round.
_CLIPPED_ROOM: Final = 10.0


def control_bound(study: Study, privacy: PrivacyParameters | None, values: int) -> float:
    """Return the largest L2 norm that the study's control variate can honestly have.

    A site's control variate is the mean of the gradients of its round, and the aggregator's is the
    mean of the sites', so it is no longer than the longest gradient of any of them.

    With privacy that is a gradient as it is released: the sum of at most all n patients' gradients,
    each clipped to C, and noise of standard deviation σC in each of d values, divided by the public
    q·m of the m patients whom the site declared. For n ≤ m and m ≥ 1 that is at most about
    C·(1 + σ·√d)/q, whatever the sites' data are. Ten times that is the bound.

    Without privacy nothing clips a gradient g, but the study's learning rate η says how long one
    can be from which training still gets on. To first order a step of SGD lowers the loss by η‖g‖²
    and one of Adam, whose steps have one size in each value, by at least η‖g‖. The loss is never
    negative and that of a model that knows nothing is at most 1 + ln k (Dice plus cross-entropy of
    k classes), so steps that promise more overshoot, and training diverges. Gradients may be a
    hundred times as long as that: √((1 + ln k)/η) under SGD, (1 + ln k)/η under Adam.

    Adaptive clipping lets C follow a quantile of the gradients' norms: then C is taken to be the
    bound without privacy, or the study's own where that is larger.

    Parameters
    ----------
    privacy : PrivacyParameters or None
        Of the study; None without privacy.
    values : int
        d, the number of values of the control variate.

    Returns
    -------
    float
        Positive and finite. It follows from the study alone, and from nothing that was sent.
    """
    optimiser = study.training.optimiser
    falls = (1 + math.log(max(len(study.task.classes), 2))) / optimiser.learning_rate
    longest = _ROOM * (math.sqrt(falls) if optimiser.name == "sgd" else falls)
    if privacy is None or study.privacy.mode == "none":
        return longest
    clipping = study.privacy.clipping
    clip = max(privacy.clip_norm, longest if clipping.kind == "adaptive" else 0.0)
    noise = gradient_multiplier(privacy.noise_multiplier, clipping) * math.sqrt(values)
    return _CLIPPED_ROOM * clip * (1 + noise) / privacy.sampling_rate


def require_honest_control(
    control: Mapping[str, NDArray[np.float32]], study: Study, privacy: PrivacyParameters | None
) -> None:
    """Refuse a control variate that no honest training of the study makes.

    Parameters
    ----------
    control : mapping of str to float32 arrays
        Of the study's names and shapes, finite.

    Raises
    ------
    ConsiliumError
        ``run.bad-update`` that names its norm and the bound.
    """
    squares = (float(np.square(one, dtype=np.float64).sum()) for one in control.values())
    norm = math.sqrt(math.fsum(squares))
    bound = control_bound(study, privacy, sum(one.size for one in control.values()))
    if not norm <= bound:
        raise ConsiliumError(
            "run.bad-update",
            f"The control variate that came with the model has norm {norm:.4g}; no honest training "
            f"of this study makes one above {bound:.4g}.",
            where=f"study {study.digest[:12]}",
            hint="The aggregator is hostile, or listens to a site that is: ask its operator, and "
            "withdraw if there is no good answer. Or the study diverges: propose it with a smaller "
            "training.optimiser.learning_rate.",
        )
