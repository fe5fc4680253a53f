"""Features extractor of text observations, for the agents of Stable-Baselines3."""

from __future__ import annotations

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn


class TokenEmbeddingExtractor(BaseFeaturesExtractor):
    """Features extractor that embeds tokens, for Stable-Baselines3's own agents on a text env.

    SB3's default extractors pass token ids on as plain numbers, from which an agent learns little. Use it as follows::

        stable_baselines3.PPO(
            "MultiInputPolicy", env, policy_kwargs={"features_extractor_class": TokenEmbeddingExtractor}
        )

    On an env with `observation="flat"`, use `"MlpPolicy"`. Every token becomes the sum of a token embedding and a position
    embedding; padding becomes zero, whatever its id. The features are the concatenation of two parts. The first is the
    embedding of the last token, whose position encodes the number of tokens. The second is a linear layer with ReLU over the
    concatenated embeddings of all positions, which keeps their order.

    The linear layer has about L * embedding_dim * features_dim weights, so this class is meant for short texts and small
    vocabularies. To train a language model, use the agents of this package.

    Args:
        observation_space: observation space of a text env, dict or flat.
        features_dim: size of the feature vector, F.
        embedding_dim: size of an embedding; less than F.

    Raises:
        ValueError: If the space is not that of a text env, or `embedding_dim` is not between 1 and F - 1.
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
        """Return features (B, F). SB3 converts observations to float32, which represents ids up to 2**24 exactly."""
        if isinstance(observations, dict):
            ids, mask = observations["input_ids"], observations["attention_mask"] > 0
        else:
            ids, mask = observations, observations >= 0
        embedded = (self.tokens(ids.long().clamp(min=0)) + self.positions.weight) * mask[..., None]
        last = (mask.sum(1) - 1).clamp(min=0)
        rows = torch.arange(len(last), device=last.device)
        return torch.cat([embedded[rows, last], self.read(embedded.flatten(1)).relu()], 1)
