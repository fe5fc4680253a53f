"""Train a small language model by self-play on Kuhn poker, and measure exactly how far it is from an equilibrium.

    python examples/self_play_kuhn.py --seed 0

Kuhn poker (1950): three cards, J < Q < K; each of two players antes one chip and gets one card. Player 0 passes or bets one
chip; player 1 does; after pass and bet, player 0 does once more. A pass after a bet folds. There are 12 information sets, and
the game's value is -1/18 for player 0.

The opponent is a snapshot of the agent, taken every few rollouts: one drawn among all so far, or the last one
(`--opponents last`). Even seeds are played in seat 0, others in seat 1. At every snapshot, the probabilities of all 12
information sets are read from the model. The exploitability of a policy is the mean of what a best response wins against it in
either seat, above the game's value: 0 in equilibrium. It is printed for the last policy and for the average over the snapshots
(weighted by the probability of reaching an information set).

The script prints a table and draws `self_play_kuhn.png` in `outputs`.
"""

import argparse
from itertools import permutations, product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from agents import PPO
from llm_env import TextGenerationEnv

CARDS = "JQK"
HISTORIES = ("", "p", "b", "pb")
SETS = [card + history for history in HISTORIES for card in CARDS]  # the 12 information sets
ENDS = {"pp": 1, "pbp": -1, "pbb": 2, "bp": 1, "bb": 2}  # chips; at a showdown the sign is that of the cards
Strategy = dict[str, float]  # probability of a bet in each information set


def payoff(cards: tuple[str, str], history: str) -> int:
    """Return what player 0 wins."""
    if history == "pbp":
        return -1
    if history == "bp":
        return 1
    return ENDS[history] * (1 if CARDS.index(cards[0]) > CARDS.index(cards[1]) else -1)


def value(first: Strategy, second: Strategy) -> float:
    """Return the expected winnings of player 0."""

    def play(cards: tuple[str, str], history: str) -> float:
        if history in ENDS:
            return payoff(cards, history)
        player = len(history) % 2
        bet = (first, second)[player][cards[player] + history]
        return (1 - bet) * play(cards, history + "p") + bet * play(cards, history + "b")

    return float(np.mean([play((a, b), "") for a, b in permutations(CARDS, 2)]))


def responses(histories: tuple[str, str]) -> list[Strategy]:
    """Return all pure strategies of the player who acts after these histories."""
    sets = [card + history for history in histories for card in CARDS]
    return [dict(zip(sets, choice, strict=True)) for choice in product((0.0, 1.0), repeat=len(sets))]


FIRST, SECOND = responses(("", "pb")), responses(("p", "b"))


def exploitability(strategy: Strategy) -> float:
    """Return the mean winnings of best responses in both seats; the game's value cancels."""
    against_second = max(value(pure, strategy) for pure in FIRST)
    against_first = max(-value(strategy, pure) for pure in SECOND)
    return (against_second + against_first) / 2


def reach(strategy: Strategy) -> Strategy:
    """Return the probability with which a player's own moves lead to each information set."""
    return {name: 1 - strategy[name[0]] if name[1:] == "pb" else 1.0 for name in SETS}


def average(strategies: list[Strategy]) -> Strategy:
    """Return the behaviour that plays as one of these strategies, drawn before the game."""
    weights = [reach(strategy) for strategy in strategies]
    mean = {}
    for name in SETS:
        total = sum(weight[name] for weight in weights)
        bets = sum(weight[name] * strategy[name] for weight, strategy in zip(weights, strategies, strict=True))
        mean[name] = bets / total if total > 0 else 0.5
    return mean


class Kuhn:
    """A text environment: one hand against a strategy. Observations are the card, and the opponent's moves.

    A seed keeps the opponent that it has first met, so that it always gives the same hand, also after the next snapshot.

    Attributes:
        opponents: the strategies so far.
        last_only: whether the last of them is the opponent; else one is drawn.
        met: the number of the opponent by seed.
    """

    opponents: ClassVar[list[Strategy]] = [dict.fromkeys(SETS, 0.5)]
    last_only: ClassVar[bool] = False
    met: ClassVar[dict[int | None, int]] = {}

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        """Deal."""
        self.rng = np.random.default_rng(seed)
        self.cards = tuple(self.rng.permutation(list(CARDS))[:2].tolist())
        self.seat, self.history = (0 if seed is None else seed) % 2, ""
        if seed not in self.met:
            newest, draw = len(self.opponents) - 1, np.random.default_rng([seed or 0, 1])  # apart from the hand's own numbers
            self.met[seed] = newest if self.last_only else int(draw.integers(newest + 1))
        self.opponent = self.opponents[self.met[seed]]
        return self.cards[self.seat] + (self.move() if self.seat == 1 else ""), {}

    def move(self) -> str:
        """Let the opponent move."""
        name = self.cards[1 - self.seat] + self.history
        new = "b" if self.rng.random() < self.opponent[name] else "p"
        self.history += new
        return new

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take a turn."""
        self.history += action
        said = "" if self.history in ENDS else self.move()
        if self.history not in ENDS:
            return said, 0.0, False, False, {}
        won = payoff(self.cards, self.history) * (1 - 2 * self.seat)
        return "", float(won), True, False, {"is_success": won > 0}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters."""
    pieces = ["<eos>", *CARDS, "p", "b"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def strategy_of(agent: PPO, tokenizer: Any) -> Strategy:
    """Read the probabilities of a bet from the model, exactly: among the two allowed tokens."""
    pass_id, bet_id = tokenizer.convert_tokens_to_ids(["p", "b"])
    contexts = [tokenizer.convert_tokens_to_ids(list(name)) for name in SETS]
    with torch.no_grad():
        bets = [float(row.exp()) for row in agent.policy.log_probs(contexts, [[bet_id]] * len(SETS))]
        passes = [float(row.exp()) for row in agent.policy.log_probs(contexts, [[pass_id]] * len(SETS))]
    assert np.allclose(np.add(bets, passes), 1, atol=1e-5)
    return dict(zip(SETS, bets, strict=True))


class Snapshots(BaseCallback):
    """Makes the agent its own opponent every few rollouts, and keeps all snapshots."""

    def __init__(self, tokenizer: Any, rollouts: int, every: int) -> None:
        super().__init__()
        self.tokenizer, self.wanted, self.every, self.rollouts = tokenizer, rollouts, every, 0
        self.taken: list[Strategy] = []

    def _on_step(self) -> bool:
        return self.rollouts < self.wanted

    def _on_rollout_end(self) -> None:
        if self.rollouts % self.every == 0:
            assert isinstance(self.model, PPO)
            self.taken.append(strategy_of(self.model, self.tokenizer))
            Kuhn.opponents.append(self.taken[-1])
        self.rollouts += 1


def make_agent(seed: int, entropy: float, rate: float) -> tuple[PPO, PreTrainedTokenizerFast]:
    """Create the agent on Kuhn poker, with a bonus for entropy."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "max_position_embeddings": 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids))
    env = TextGenerationEnv.from_text_env(
        Kuhn,
        tokenizer,
        num_tasks=None,
        max_turns=2,
        max_new_tokens=1,
        max_prompt_tokens=2,
        max_observation_tokens=1,
        allowed_tokens=tokenizer.convert_tokens_to_ids(["p", "b"]),
    )
    settings = {"n_envs": 512, "n_epochs": 1, "batch_size": 512, "gae_lambda": 1.0, "gamma": 1.0, "separate_critic": True}
    return PPO(model, env, rate, seed=seed, ent_coef=entropy, **settings), tokenizer


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Draw exploitability over the snapshots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour in zip(curves.items(), ("0.6", "black"), strict=True):
        axes.plot(range(1, len(curve) + 1), curve, color=colour, linewidth=1.2, label=name)
    axes.set(xlabel="snapshots", ylabel="exploitability (chips a hand)", ylim=(0, None))
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, and print the exploitability of the last and of the average policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rollouts", type=int, default=600)
    parser.add_argument("--opponents", choices=("all", "last"), default="all", help="the snapshots that are played against")
    parser.add_argument("--every", type=int, default=1, help="rollouts between two snapshots (default 1)")
    parser.add_argument("--entropy", type=float, default=0.2, help="weight of the entropy bonus (default 0.2)")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("outputs/self_play_kuhn.png"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    agent, tokenizer = make_agent(args.seed, args.entropy, args.rate)
    Kuhn.last_only = args.opponents == "last"
    snapshots = Snapshots(tokenizer, args.rollouts, args.every)
    agent.learn(10**9, callback=snapshots)
    taken = [*snapshots.taken, strategy_of(agent, tokenizer)]
    curves = {
        "last policy": [exploitability(strategy) for strategy in taken],
        "average policy": [exploitability(average(taken[: i + 1])) for i in range(len(taken))],
    }
    for name, curve in curves.items():
        marks = [0, len(curve) // 4, len(curve) // 2, 3 * len(curve) // 4, len(curve) - 1]
        print(f"{name:<15}", "  ".join(f"{curve[i]:.3f}" for i in marks))
    mean = average(taken)
    for name, strategy in (("average", mean), ("last", taken[-1])):
        print(f"bets, {name}:", ", ".join(f"{each} {strategy[each]:.2f}" for each in SETS))
    share = curves["average policy"][-1] / curves["average policy"][0]
    print(f"seed {args.seed}: the average's exploitability is {share:.2f} of the start's")
    draw(curves, args.out)


if __name__ == "__main__":
    main()
