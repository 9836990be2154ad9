"""MoRec, a baseline of the paper's Table 3: frozen text vectors behind one trainable projection.

    z = W v    (arXiv 2303.13835, as in Table 3), trained with BPR

run.py has it as --model morec. It takes all N dimensions of the vectors, and --dim is the width
that it projects them to.
"""
import models                          # run.py has put the folder above on the path
import numpy as np
import torch


class MoRec(models.LightGCN):
    """users0 (U, N) and items0 (I, N) stay as they are; projection0 (N, K) is what trains.

    If users0 are means of item vectors, their projections are the means of the projected items.
    """

    def __init__(self, graph, users0, items0, projection0, device='cpu'):
        super().__init__(graph, users0, items0, 0, device)
        self.table.requires_grad_(False)                                                # (U+I, N)
        self.K = projection0.shape[1]
        self.projection = torch.nn.Parameter(torch.from_numpy(projection0).to(device))  # (N, K)

    def z_of_all(self, graphs):
        return self.table @ self.projection                                             # (U+I, K)

    def z_at(self, nodes, graphs):
        z = self.table[nodes] @ self.projection                                         # (R, K)
        return z, z


def projection(rng, N, K):
    """Where W starts: Xavier-uniform [authors' code for tables] -> (N, K)."""
    return np.ascontiguousarray(rng.uniform(-1, 1, (N, K)) * (6 / (N + K)) ** .5, np.float32)
