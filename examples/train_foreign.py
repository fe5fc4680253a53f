"""Train a character model of random weights on other projects' games: Gymnasium's lake, GEM's numbers, TextArena's tic-tac-toe.

    pip install gem-llm textarena
    python examples/train_foreign.py --game lake --algorithm GRPO --seed 0

The games are played through `llm_env.adapters`, unchanged, with short texts instead of their rules:

- `lake`: FrozenLake-v1 (deterministic, 4x4). The model sees the board and writes l, d, r or u, up to 16 times.
- `numbers`: GEM's game:GuessTheNumber-v0-easy, a number from 1 to 10 in four guesses. The model writes a letter from a to j,
  and sees H (higher) or L (lower). GEM pays a part of 1 for a near miss at the end.
- `tictactoe`: TextArena's TicTacToe-v0 against an opponent that moves at random, in either seat. The model sees the board and
  writes a digit; only free squares are allowed.

There is no supervised warm-up. The script prints the mean return (of tic-tac-toe the share of games won) with sampled actions,
on seeds that were not trained on, before and after training.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from stable_baselines3.common.utils import LinearSchedule
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from agents import GRPO, PPO
from llm_env import TextGenerationEnv
from llm_env.adapters import GEMEnv, GymnasiumTextEnv, TextArenaEnv

CHARACTERS = "@FHSG.OX0123456789abcdefghijlru\nHL?"
HELD_OUT = 100_000  # first seed of the games for evaluation


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters."""
    pieces = ["<eos>", *dict.fromkeys(CHARACTERS)]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="?")


TOKENIZER = make_tokenizer()


def make_model(seed: int) -> LlamaForCausalLM:
    """Return a Llama with two layers, 2048 positions and random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=2048, **sizes, **ids))


def ids_of(characters: Sequence[str]) -> list[int]:
    """Return the ids of characters."""
    return TOKENIZER.convert_tokens_to_ids(list(characters))


def number_of(letters: str, text: str) -> int:
    """Return the place of a letter; raise a ValueError if the text is none of them."""
    if len(text) != 1:
        raise ValueError("?")
    return letters.index(text)


def lake() -> dict[str, Any]:
    """Return the arguments of the lake's env."""
    make = partial(GymnasiumTextEnv, "FrozenLake-v1", is_slippery=False, text_to_action=partial(number_of, "ldru"))
    limits = {"max_turns": 16, "max_prompt_tokens": 20, "max_observation_tokens": 20}
    return {"make": make, "allowed_tokens": ids_of("ldru"), **limits}


def hint(text: str) -> str:
    """Return a hint of GEM's game as one letter."""
    return "H" if "higher" in text else "L" if "lower" in text else "?"


def boxed(text: str) -> str:
    """Return a guess as GEM reads it."""
    return rf"\boxed{{{number_of('abcdefghij', text) + 1}}}"


def numbers() -> dict[str, Any]:
    """Return the arguments of the guessing game's env."""
    make = partial(GEMEnv, "game:GuessTheNumber-v0-easy", prompt="?", observation_to_text=hint, text_to_action=boxed)
    return {
        "make": make,
        "allowed_tokens": ids_of("abcdefghij"),
        "max_turns": 4,
        "max_prompt_tokens": 2,
        "max_observation_tokens": 2,
    }


def board(messages: Sequence[tuple[int, str]]) -> str:
    """Return the last board as nine characters: O, X, and a digit where a square is free."""
    drawn = next(text for _, text in reversed(messages) if "---+---" in text)
    rows = [line for line in drawn.split("\n") if line.count("|") == 2]
    return "".join(cell.strip() for row in rows for cell in row.split("|")) + "\n"


def free_squares(context: Sequence[int], turn: Sequence[int]) -> list[int]:
    """Return the digits of the last board."""
    last = TOKENIZER.convert_ids_to_tokens(list(context))[-10:]
    return ids_of([cell for cell in last if cell.isdigit()])


def tictactoe() -> dict[str, Any]:
    """Return the arguments of tic-tac-toe's env."""
    make = partial(
        TextArenaEnv, "TicTacToe-v0", seat="parity", opponent="random", observation_to_text=board, text_to_action="[{}]".format
    )
    return {"make": make, "allowed_tokens": free_squares, "max_turns": 5, "max_prompt_tokens": 10, "max_observation_tokens": 10}


GAMES: dict[str, tuple[Any, int, dict[str, Any], float]] = {  # arguments, action tokens, GRPO's groups, entropy bonus
    "lake": (lake, 60_000, {"group_size": 64}, 0.03),  # all episodes are of one start: few cross it at first
    "numbers": (numbers, 150_000, {"group_size": 16}, 0.01),
    "tictactoe": (tictactoe, 150_000, {"group_size": 16}, 0.01),
}


def make_env(game: str, first_seed: int = 0, num_tasks: int = 2000) -> TextGenerationEnv:
    """Make the token env of a game: a turn is one character."""
    arguments = GAMES[game][0]()
    return TextGenerationEnv.from_text_env(
        arguments.pop("make"), TOKENIZER, num_tasks=num_tasks, first_seed=first_seed, max_new_tokens=1, **arguments
    )


def make_agent(game: str, algorithm: str, env: TextGenerationEnv, seed: int) -> Any:
    """Create the agent; the learning rate decreases to 0."""
    rate = LinearSchedule(3e-3, 0.0, 1.0)
    _, _, groups, entropy = GAMES[game]
    settings: dict[str, Any] = {"n_envs": 64, "seed": seed, "ent_coef": entropy}
    if algorithm == "GRPO":
        return GRPO(make_model(seed), env, rate, **groups, **settings)
    settings |= {"n_epochs": 4, "batch_size": 32, "gamma": 0.99, "gae_level": "turn"}
    return PPO(make_model(seed), env, rate, **settings)


def score_of(agent: Any, env: TextGenerationEnv) -> float:
    """Return the share of games won where the game says so, else the mean return."""
    means = agent.evaluate(env, deterministic=False, n_prompts=400)
    return means.get("success_rate", means["reward"])


def main() -> None:
    """Train on one game and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--game", choices=GAMES, default="lake")
    parser.add_argument("--algorithm", choices=("GRPO", "PPO"), default="GRPO")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timesteps", type=int, help="action tokens; by default enough for the game")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    timesteps = args.timesteps or GAMES[args.game][1]
    env, held_out = make_env(args.game), make_env(args.game, HELD_OUT, 400)
    agent = make_agent(args.game, args.algorithm, env, args.seed)
    before, begin = score_of(agent, held_out), time.perf_counter()
    agent.learn(timesteps)
    seconds = time.perf_counter() - begin
    after = score_of(agent, held_out)
    print(f"{args.game}, {args.algorithm}, seed {args.seed}: {before:.3f} before, {after:.3f} after, {seconds:.0f} s")


if __name__ == "__main__":
    main()
