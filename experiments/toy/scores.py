"""How near generated actions come to a bandit's data: the paper's score as stated, and scores that can be met.

All take points of the plane, [N, 2] generated and [M, 2] of the data. Distances are Euclidean.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from utils.data import bandit

        self._within = mean_kernel(self._some)

    def __call__(self, actions: Array) -> dict[str, float]:
        """Scores by name; `reward` in percent of the best; then what describes the actions on this bandit."""
        actions = np.asarray(actions, dtype=np.float64)
        found = {
            "jaccard": jaccard(actions, self.data),
            "precision": precision(actions, self.data),
            "coverage": coverage(actions, self.data),
            "mmd": mmd(actions, self._some, self._within),
            "reward": float(bandit.normalized_score(self.task, bandit.find(self.task).reward(actions)).mean()),
        }
        if self.task == "bandit-circle-v0":
            radius = np.linalg.norm(actions, axis=1)
            return found | {"radius": float(radius.mean()), "radius_deviation": float(radius.std())}
        return found | mode_shares(actions)
