"""The federation: client, client map, algorithms, loop, checkpoint."""

from fedrobust.federated.algorithms import CodedState, FederatedState, RoundInfo, fedavg
from fedrobust.federated.checkpoint import latest, save
from fedrobust.federated.client import GradInfo, local_update, mean_grad
from fedrobust.federated.client_map import BACKENDS, default_backend, map_clients
from fedrobust.federated.link import LinkState, Sent
from fedrobust.federated.loop import rounds

__all__ = [
    "BACKENDS",
    "CodedState",
    "FederatedState",
    "GradInfo",
    "LinkState",
    "RoundInfo",
    "Sent",
    "default_backend",
    "fedavg",
    "latest",
    "local_update",
    "map_clients",
    "mean_grad",
    "rounds",
    "save",
]
