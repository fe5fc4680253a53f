"""What lets the agents of Stable-Baselines3 read tokens."""

from __future__ import annotations

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn


class TokenEmbeddingExtractor(BaseFeaturesExtractor):
    """Features of the tokens so far, for SB3's own agents on a text env: token ids as plain numbers teach them little.

        stable_baselines3.PPO(
            "MultiInputPolicy", env, policy_kwargs={"features_extractor_class": TokenEmbeddingExtractor}
        )

    and `"MlpPolicy"` on an env with `observation="flat"`. Every token becomes the sum of an embedding of its id and one of
    its position. A linear layer reads all of them in their places, so that their order, and with it the prompt, is seen;
    beside it stands the last token by itself, whose position says how many there are. Padding counts as zero, whatever its id.

    The linear layer has L * embedding_dim * features_dim weights: meant for short texts and small vocabularies. A language
    model is trained with the agents of this package.

    Args:
        observation_space: a text env's, of either form.
        features_dim: F, the size of the feature vector.
        embedding_dim: size of an embedding; less than F.

    Raises:
        ValueError: If the space is not a text env's, or `embedding_dim` leaves no room.
    """

    def __init__(self, observation_space: spaces.Space, features_dim: int = 128, embedding_dim: int = 32) -> None:
        ids = observation_space["input_ids"] if isinstance(observation_space, spaces.Dict) else observation_space
        if not isinstance(ids, spaces.Box) or len(ids.shape) != 1:
            raise ValueError(f"{observation_space} is no text env's: it must be a Dict with 'input_ids', or a flat Box of ids")
        if not 0 < embedding_dim < features_dim:
            raise ValueError(f"embedding_dim={embedding_dim} must be at least 1 and less than features_dim={features_dim}")
        super().__init__(observation_space, features_dim)
        length = ids.shape[0]
        self.tokens = nn.Embedding(int(ids.high.max()) + 1, embedding_dim)
        self.positions = nn.Embedding(length, embedding_dim)
        self.read = nn.Linear(length * embedding_dim, features_dim - embedding_dim)

    def forward(self, observations: dict[str, Tensor] | Tensor) -> Tensor:
        """Features (B, F) of observations in which SB3 has made every number a float, which holds ids up to 2**24."""
        if isinstance(observations, dict):
            ids, mask = observations["input_ids"], observations["attention_mask"] > 0
        else:
            ids, mask = observations, observations >= 0
        embedded = (self.tokens(ids.long().clamp(min=0)) + self.positions.weight) * mask[..., None]
        last = (mask.sum(1) - 1).clamp(min=0)
        rows = torch.arange(len(last), device=last.device)
        return torch.cat([embedded[rows, last], self.read(embedded.flatten(1)).relu()], 1)
